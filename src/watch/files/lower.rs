//! What the image's layers hold below an upper layer, read directly from the directories that
//! the snapshotter unpacked.
//!
//! It applies overlayfs rules itself (whiteouts, opaque directories), so it works without the
//! container's mount and after the container has ended. It follows no symlinks. It compares
//! nothing: callers receive states and hashes of lower files ([`LowerTwins`]).

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};

use crate::model::file::is_program;
use crate::model::{FileTime, FileType, Format, LowerTwin, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::hash::{Hashed, Hashing};
use crate::sys::overlay::{self, Opacity};
use crate::threads;
use crate::watch::core::layers::Layers;

/// More twins than this are not remembered.
const MAX_TWINS: usize = 16 * 1024;

/// Hashes of lower files, by inode and ctime. Layers do not change, and every container of an
/// image needs the same files.
#[derive(Debug, Default)]
pub(crate) struct LowerTwins {
    known: Mutex<HashMap<Key, Option<Twin>>>,
}

type Key = (u64, u64, FileTime);

#[derive(Clone, Copy, Debug)]
struct Twin {
    is_program: bool,
    hashes: Option<LowerTwin>,
}

impl LowerTwins {
    /// The regular file that the layers hold at `path`, if it or the upper file
    /// is a program.
    pub(crate) fn find(
        &self,
        layers: &Layers,
        path: &RootfsPath,
        upper_is_program: bool,
        max_hash_bytes: u64,
    ) -> Option<LowerTwin> {
        match self.begin(layers, path, upper_is_program, max_hash_bytes) {
            Finding::Known(twin) => twin,
            Finding::Reads(mut reading) => loop {
                if let Some(twin) = reading.step(self, u64::MAX) {
                    return twin;
                }
            },
        }
    }

    /// Like [`find`](Self::find), but the content is read later, in slices.
    pub(crate) fn begin(
        &self,
        layers: &Layers,
        path: &RootfsPath,
        upper_is_program: bool,
        max_hash_bytes: u64,
    ) -> Finding {
        let nothing = Finding::Known(None);
        let lower = at(layers, path).filter(|lower| lower.stat.is_regular());
        let Some(lower) = lower else { return nothing };
        let key = (lower.stat.device, lower.stat.inode, lower.stat.changed);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
        let wants = |twin: &Twin| upper_is_program || twin.is_program;
        match known {
            Some(None) => return nothing,
            Some(Some(twin)) if !wants(&twin) => return nothing,
            Some(Some(Twin { hashes: Some(hashes), .. })) => return Finding::Known(Some(hashes)),
            Some(Some(Twin { hashes: None, .. })) | None => (),
        }
        let Some((file, stat)) = lower.read() else {
            self.remember(key, None);
            return nothing;
        };
        let format = file::sniff(file.as_fd()).unwrap_or(Format::Unknown);
        let twin = Twin { is_program: is_program(format, stat.mode), hashes: None };
        if !wants(&twin) || stat.size > max_hash_bytes {
            self.remember(key, Some(twin));
            return nothing;
        }
        let hash = Hashing::new(max_hash_bytes);
        Finding::Reads(Box::new(TwinReading { key, file, twin, size: stat.size, hash }))
    }

    fn remember(&self, key: Key, twin: Option<Twin>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_TWINS {
            known.clear();
        }
        known.insert(key, twin);
    }
}

/// What is known of a lower file before its content is read.
#[derive(Debug)]
pub(crate) enum Finding {
    Known(Option<LowerTwin>),
    Reads(Box<TwinReading>),
}

/// A lower file that is being read. It can be put aside at any time.
#[derive(Debug)]
pub(crate) struct TwinReading {
    key: Key,
    file: OwnedFd,
    twin: Twin,
    size: u64,
    hash: Hashing,
}

impl TwinReading {
    /// Reads one more slice. `None`: there is more to read.
    pub(crate) fn step(&mut self, twins: &LowerTwins, slice: u64) -> Option<Option<LowerTwin>> {
        threads::beat();
        let hashed = match self.hash.step(self.file.as_fd(), slice) {
            Ok(None) => return None,
            Ok(Some(Hashed::Whole(hashes))) => Some(hashes),
            Ok(Some(Hashed::TooLong)) | Err(_) => None,
        };
        self.twin.hashes =
            hashed.map(|hashes| LowerTwin { blake3: hashes.blake3, sha256: hashes.sha256 });
        twins.remember(self.key, Some(self.twin));
        Some(self.twin.hashes)
    }

    /// How many bytes have been read or computed so far.
    pub(crate) fn cost(&self) -> u64 {
        self.hash.cost()
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }
}

/// A name in one of the lower layers.
struct Lower {
    layer: OwnedFd,
    path: Vec<u8>,
    stat: Stat,
}

impl Lower {
    fn read(&self) -> Option<(OwnedFd, Stat)> {
        let opened = file::open_file_beneath(&self.layer, &self.path).ok()?;
        opened.1.is_regular().then_some(opened)
    }
}

/// Whether the layers hold anything at `path`.
pub(crate) fn holds(layers: &Layers, path: &RootfsPath) -> bool {
    at(layers, path).is_some()
}

/// Whether the layers hold a regular file at `path`.
pub(crate) fn holds_file(layers: &Layers, path: &RootfsPath) -> bool {
    at(layers, path).is_some_and(|lower| lower.stat.is_regular())
}

/// Whether the layers hold a regular file of this size at `path`.
pub(crate) fn holds_file_of(layers: &Layers, path: &RootfsPath, size: u64) -> bool {
    at(layers, path).is_some_and(|lower| lower.stat.is_regular() && lower.stat.size == size)
}

/// Whether the layers hold a program at `path`.
pub(crate) fn holds_program(layers: &Layers, path: &RootfsPath) -> bool {
    let Some((file, stat)) = at(layers, path).and_then(|lower| lower.read()) else { return false };
    file::sniff(file.as_fd()).is_ok_and(|format| is_program(format, stat.mode))
}

/// The device and inode of the regular file that the layers hold at `path`.
pub(crate) fn inode(layers: &Layers, path: &RootfsPath) -> Option<(u64, u64)> {
    let lower = at(layers, path).filter(|lower| lower.stat.is_regular())?;
    Some((lower.stat.device, lower.stat.inode))
}

/// Whether the layers hold exactly this file at `path`, by the `stat` that the overlay shows.
/// False also if that cannot be determined.
pub(crate) fn is_at(layers: &Layers, path: &RootfsPath, stat: &Stat) -> bool {
    at(layers, path).is_some_and(|lower| {
        let Lower { stat: own, .. } = lower;
        (own.inode, own.changed, own.size) == (stat.inode, stat.changed, stat.size)
    })
}

/// Opens the regular file that the layers hold at `path`.
pub(crate) fn open(layers: &Layers, path: &RootfsPath) -> Option<OwnedFd> {
    at(layers, path).filter(|lower| lower.stat.is_regular())?.read().map(|(fd, _)| fd)
}

/// The target of the symlink that the layers hold at `path`; `None` if there is none.
pub(crate) fn link_target(layers: &Layers, path: &RootfsPath) -> Option<Vec<u8>> {
    let lower = at(layers, path).filter(|lower| lower.stat.file_type == FileType::Symlink)?;
    let parent = path.parent()?;
    let directory = file::open_directory_beneath(&lower.layer, parent.relative()).ok()?;
    let target = rustix::fs::readlinkat(directory, path.file_name(), Vec::new()).ok()?;
    Some(target.into_bytes())
}

/// The beginning of the regular file that the layers hold at `path`.
pub(crate) fn read(layers: &Layers, path: &RootfsPath, limit: u64) -> Option<Vec<u8>> {
    let file = std::fs::File::from(open(layers, path)?);
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// What the merged lower layers show at `path`.
fn at(layers: &Layers, path: &RootfsPath) -> Option<Lower> {
    for directory in &layers.dirs.lowerdirs {
        let Ok(layer) = file::open_directory(directory) else { continue };
        match file::open_path_beneath(&layer, path.relative()) {
            Ok(fd) => {
                let stat = file::stat(&fd).ok()?;
                if stat.is_whiteout_device() {
                    return None;
                }
                return Some(Lower { layer, path: path.relative().to_vec(), stat });
            }
            Err(err) if hides_what_is_below(&layer, path, &err, layers.userxattr) => return None,
            Err(_) => (),
        }
    }
    None
}

/// Whether a layer without `path` also hides it in the layers below: a directory on the path
/// is opaque in this layer, or is not a directory.
fn hides_what_is_below(layer: &OwnedFd, path: &RootfsPath, err: &io::Error, user: bool) -> bool {
    match err.raw_os_error() {
        Some(libc::ENOENT) => (),
        // A whiteout, a file or a symlink where the path needs a directory.
        _ => return true,
    }
    let mut parent = path.parent();
    while let Some(directory) = parent {
        let opacity = file::open_directory_beneath(layer, directory.relative())
            .and_then(|fd| overlay::opacity(&fd, user));
        if opacity.is_ok_and(|opacity| opacity == Opacity::Opaque) {
            return true;
        }
        parent = directory.parent();
    }
    false
}

/// The names that the merged lower layers show directly in a directory, or that they hold
/// something other than a directory there.
pub(crate) enum LowerNames {
    NotADirectory,
    Names(Vec<Vec<u8>>),
}

pub(crate) fn names_in(layers: &Layers, path: &RootfsPath) -> LowerNames {
    // Whether each name is visible. The topmost layer that has it decides.
    let mut names: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
    let mut found_directory = false;
    for directory in &layers.dirs.lowerdirs {
        let Ok(layer) = file::open_directory(directory) else { continue };
        let fd = match file::open_directory_beneath(&layer, path.relative()) {
            Ok(fd) => fd,
            Err(err) => {
                let is_something = file::open_path_beneath(&layer, path.relative())
                    .and_then(file::stat)
                    .is_ok_and(|stat| {
                        stat.file_type != FileType::Directory && !stat.is_whiteout_device()
                    });
                if is_something && !found_directory {
                    return LowerNames::NotADirectory;
                }
                if hides_what_is_below(&layer, path, &err, layers.userxattr) {
                    break;
                }
                continue;
            }
        };
        found_directory = true;
        let is_opaque =
            overlay::opacity(&fd, layers.userxattr).is_ok_and(|opacity| opacity == Opacity::Opaque);
        let Ok(entries) = rustix::fs::Dir::read_from(&fd) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") || names.contains_key(name) {
                continue;
            }
            let is_visible =
                !file::stat_at(&fd, entry.file_name()).is_ok_and(|stat| stat.is_whiteout_device());
            names.insert(name.to_vec(), is_visible);
        }
        if is_opaque {
            break;
        }
    }
    LowerNames::Names(
        names.into_iter().filter(|(_, is_visible)| *is_visible).map(|(name, _)| name).collect(),
    )
}
