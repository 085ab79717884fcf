//! What an upper layer holds under one name, read a slice at a time.
//!
//! `settle` and `walk` use it. It finds the file's state and its twin in the layers below
//! (`lower`), through descriptors and through no symlink. It does not decide what is
//! reported. A reading can be put aside between slices, so that containers take turns.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::lower::{self, Finding, TwinReading};
use super::shared::Files;
use super::state::{self, Begun, Reading, Which};
use super::{upper, ways};
use crate::model::{FileState, FileType, LowerTwin, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::overlay::{self, Opacity};
use crate::watch::core::fair;
use crate::watch::core::held::{Held, Left};
use crate::watch::core::layers::Layers;
use crate::watch::core::watched::Watched;

/// How much work one container gets in its turn.
pub(crate) struct Slice {
    pub(crate) until: Instant,
    /// How many bytes were read or computed.
    pub(crate) bytes: u64,
}

impl Slice {
    pub(crate) fn new() -> Slice {
        Slice { until: Instant::now() + fair::SLICE, bytes: 0 }
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }
}

#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
pub(crate) enum Found {
    Directory,
    Whiteout,
    Entry { stat: Stat, state: FileState, lower: Option<LowerTwin> },
}

/// The result of examining a name: complete, or to be continued.
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
pub(crate) enum Examined {
    Found(Found),
    Reading(Box<EntryReading>),
}

/// A directory of an upper layer in which names are examined.
pub(crate) struct Place {
    pub(crate) watched: Arc<Watched>,
    pub(crate) path: RootfsPath,
    /// `None` if there is no such directory.
    pub(crate) directory: Option<OwnedFd>,
    pub(crate) holds_file_whiteouts: bool,
    /// Whether the image has this directory too.
    pub(crate) in_image: bool,
}

#[derive(Clone, Copy)]
pub(crate) struct OpenPlace<'a> {
    pub(crate) directory: BorrowedFd<'a>,
    pub(crate) holds_file_whiteouts: bool,
    pub(crate) in_image: bool,
    /// Whether data files are compared too, where the image may have the same file.
    pub(crate) compares_data: bool,
}

impl Place {
    pub(crate) fn open(
        watched: &Arc<Watched>,
        layers: &Layers,
        path: RootfsPath,
    ) -> io::Result<Place> {
        let gone = |err: &io::Error| {
            // A directory on the path was replaced: the path leads nowhere now.
            matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
        };
        // An error here counts as an error: without the upperdir nothing is known of the path.
        let upper = file::open_directory(&layers.dirs.upperdir)?;
        let in_image = lower::holds(layers, &path);
        let directory = match file::open_directory_beneath(&upper, path.relative()) {
            Ok(directory) => Some(directory),
            Err(err) if gone(&err) => None,
            Err(err) => return Err(err),
        };
        let holds_file_whiteouts = directory.as_ref().is_some_and(|directory| {
            overlay::opacity(directory, layers.userxattr)
                .is_ok_and(|opacity| opacity == Opacity::HoldsFileWhiteouts)
        });
        Ok(Place { watched: watched.clone(), path, directory, holds_file_whiteouts, in_image })
    }

    pub(crate) fn is(&self, watched: &Arc<Watched>, path: &RootfsPath) -> bool {
        Arc::ptr_eq(&self.watched, watched) && self.path == *path
    }

    /// Where rules may deny, guards what may be code under the last name of `path`: it may have
    /// been renamed since it was written.
    pub(crate) fn guard(&self, shared: &Files, path: &RootfsPath) {
        if let Some(directory) = self.directory.as_ref().filter(|_| self.watched.is_enforced())
            && let Ok(stat) = file::stat_at(directory, path.file_name())
        {
            shared.guards.found(&self.watched, directory.as_fd(), path.file_name(), &stat);
        }
    }

    /// What is under the last name of `path`; `None` if nothing.
    pub(crate) fn examine(
        &self,
        shared: &Files,
        layers: &Layers,
        path: &RootfsPath,
    ) -> io::Result<Option<Examined>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let Place { holds_file_whiteouts, in_image, .. } = *self;
        let compares_data = false;
        let directory = directory.as_fd();
        let open = OpenPlace { directory, holds_file_whiteouts, in_image, compares_data };
        let found = file::stat_at(open.directory, path.file_name())
            .and_then(|stat| entry(shared, &self.watched, layers, open, path, stat));
        match found {
            Ok(found) => Ok(Some(found)),
            Err(err) if is_gone(&err) || err.raw_os_error() == Some(libc::ELOOP) => Ok(None),
            Err(err) => Err(err),
        }
    }
}

/// What a directory of the upper layer holds under the last name of `path`.
pub(crate) fn entry(
    shared: &Files,
    watched: &Arc<Watched>,
    layers: &Layers,
    place: OpenPlace<'_>,
    path: &RootfsPath,
    stat: Stat,
) -> io::Result<Examined> {
    if stat.is_whiteout_device() {
        return Ok(Examined::Found(Found::Whiteout));
    }
    let OpenPlace { directory, holds_file_whiteouts, in_image, compares_data } = place;
    let is_sensitive = shared.is_sensitive(watched, path);
    let mut reading = EntryReading {
        watched: watched.clone(),
        path: path.clone(),
        stat,
        in_image,
        is_sensitive,
        is_compared: is_sensitive,
        stage: Stage::Over,
    };
    match stat.file_type {
        FileType::Directory => return Ok(Examined::Found(Found::Directory)),
        FileType::Regular => (),
        FileType::Symlink if is_sensitive || shared.leads_to_sensitive(watched, path) => {
            let target = rustix::fs::readlinkat(directory, path.file_name(), Vec::new())?;
            ways::note_link(shared, watched, path, target.as_bytes());
            let state = state::of_link(&stat, target.as_bytes());
            return Ok(reading.find_twin(shared, state, false));
        }
        // If the image has a program there, it matters that this is not one.
        FileType::Symlink
        | FileType::CharDevice
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket => return Ok(reading.find_twin(shared, state::unopened(&stat), false)),
    }
    let (fd, stat) = file::open_file_beneath(directory, path.file_name())?;
    if !stat.is_regular() {
        // Replaced since it was listed. The next examination will find what it is then.
        let state = state::unopened(&stat);
        return Ok(Examined::Found(Found::Entry { stat, state, lower: None }));
    }
    let user = layers.userxattr;
    if holds_file_whiteouts && stat.size == 0 && overlay::is_file_whiteout(&fd, user)? {
        return Ok(Examined::Found(Found::Whiteout));
    }
    reading.stat = stat;
    let has_program = in_image && lower::holds_program(layers, path);
    let has_its_size = || in_image && lower::holds_file_of(layers, path, stat.size);
    reading.is_compared |= has_program || compares_data && has_its_size();
    let content = if overlay::is_metacopy(&fd, user)? {
        // The content is in a layer below. The merged view shows it, but does not exist any
        // more once the container has ended.
        match open_merged(watched, path) {
            // An open descriptor keeps the container's mount busy.
            Ok(merged) => Stored::Merged { merged: watched.hold(merged), upper: fd },
            Err(_) => Stored::below(layers, path, fd),
        }
    } else {
        if has_program && has_its_size() {
            upper::listen_to_file(shared, watched, &fd);
        }
        Stored::Own(fd)
    };
    Ok(reading.begin(shared, content))
}

/// Where the content of an upper layer's file is.
pub(crate) enum Stored {
    Own(OwnedFd),
    /// As the container sees it. The descriptor must not be kept when the container ends.
    Merged {
        merged: Held,
        upper: OwnedFd,
    },
    Below {
        below: OwnedFd,
        upper: OwnedFd,
    },
    Nowhere,
}

impl Stored {
    pub(crate) fn below(layers: &Layers, path: &RootfsPath, upper: OwnedFd) -> Stored {
        match open_below(layers, path, &upper) {
            Some(below) => Stored::Below { below, upper },
            None => Stored::Nowhere,
        }
    }

    /// The file whose attributes count, if the content comes from another file.
    pub(crate) fn upper(&self) -> Option<&OwnedFd> {
        match self {
            Stored::Merged { upper, .. } | Stored::Below { upper, .. } => Some(upper),
            Stored::Own(_) | Stored::Nowhere => None,
        }
    }
}

/// A file of an upper layer that is being read, and after it the file below that it hides.
/// It can be put aside at any time.
pub(crate) struct EntryReading {
    pub(crate) watched: Arc<Watched>,
    pub(crate) path: RootfsPath,
    pub(crate) stat: Stat,
    pub(crate) in_image: bool,
    pub(crate) is_sensitive: bool,
    /// Whether its content is hashed even if it is not a program.
    pub(crate) is_compared: bool,
    pub(crate) stage: Stage,
}

pub(crate) enum Stage {
    Content(Stored, Box<Reading>),
    Twin(FileState, Box<TwinReading>),
    Over,
}

impl EntryReading {
    pub(crate) fn begin(mut self, shared: &Files, stored: Stored) -> Examined {
        let which = if self.is_compared { Which::Always } else { Which::Programs };
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let begin = |fd: BorrowedFd<'_>| Reading::begin(fd, &self.stat, which, max_hash_bytes);
        let begun = match &stored {
            Stored::Own(fd) | Stored::Below { below: fd, .. } => begin(fd.as_fd()),
            Stored::Merged { merged, .. } => match merged.take() {
                Left::Open(fd) => {
                    let begun = begin(fd.as_fd());
                    self.watched.give_back(merged, fd);
                    begun
                }
                Left::Name(_) | Left::Copy(_) => return self.begin_below(shared, stored),
            },
            Stored::Nowhere => Begun::Known(state::unopened(&self.stat)),
        };
        match begun {
            Begun::Known(state) => self.has(shared, &stored, state),
            Begun::Reads(reading) => {
                self.stage = Stage::Content(stored, Box::new(reading));
                Examined::Reading(Box::new(self))
            }
        }
    }

    /// The container has ended, and its merged view with it.
    pub(crate) fn begin_below(self, shared: &Files, stored: Stored) -> Examined {
        let stored = match (stored, self.watched.layers()) {
            (Stored::Merged { upper, .. }, Some(layers)) => {
                Stored::below(layers, &self.path, upper)
            }
            _ => Stored::Nowhere,
        };
        self.begin(shared, stored)
    }

    /// Continues when the content is known.
    pub(crate) fn has(self, shared: &Files, stored: &Stored, state: FileState) -> Examined {
        // The attributes come from the upper file.
        let state = match stored.upper() {
            Some(upper) => FileState {
                capability: file::xattr(upper, "security.capability").unwrap_or(None),
                ..state
            },
            None => state,
        };
        let is_program = state.is_program() || self.is_sensitive;
        self.find_twin(shared, state, is_program)
    }

    pub(crate) fn find_twin(
        mut self,
        shared: &Files,
        state: FileState,
        is_program: bool,
    ) -> Examined {
        let stat = self.stat;
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let finding = match self.watched.layers() {
            Some(layers) if self.in_image => {
                shared.lower_twins.begin(layers, &self.path, is_program, max_hash_bytes)
            }
            Some(_) | None => Finding::Known(None),
        };
        match finding {
            Finding::Known(lower) => Examined::Found(Found::Entry { stat, state, lower }),
            Finding::Reads(twin) => {
                self.stage = Stage::Twin(state, twin);
                Examined::Reading(Box::new(self))
            }
        }
    }

    /// Reads one more slice. `None`: there is more to read.
    pub(crate) fn step(self: &mut Box<Self>, shared: &Files, slice: &mut Slice) -> Option<Found> {
        let found = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Content(stored, mut reading) => {
                let before = reading.cost();
                let state = match &stored {
                    Stored::Own(fd) | Stored::Below { below: fd, .. } => {
                        reading.step(fd.as_fd(), state::SLICE)
                    }
                    Stored::Merged { merged, .. } => match merged.take() {
                        Left::Open(fd) => {
                            let state = reading.step(fd.as_fd(), state::SLICE);
                            self.watched.give_back(merged, fd);
                            state
                        }
                        Left::Name(_) | Left::Copy(_) => {
                            return self.continue_with(|entry| entry.begin_below(shared, stored));
                        }
                    },
                    Stored::Nowhere => Some(state::unopened(&self.stat)),
                };
                slice.bytes += reading.cost() - before;
                let Some(state) = state else {
                    self.stage = Stage::Content(stored, reading);
                    return None;
                };
                return self.continue_with(|entry| entry.has(shared, &stored, state));
            }
            Stage::Twin(state, mut twin) => {
                let before = twin.cost();
                let lower = twin.step(&shared.lower_twins, state::SLICE);
                slice.bytes += twin.cost() - before;
                match lower {
                    Some(lower) => Found::Entry { stat: self.stat, state, lower },
                    None => {
                        self.stage = Stage::Twin(state, twin);
                        return None;
                    }
                }
            }
            Stage::Over => {
                let state = state::unopened(&self.stat);
                Found::Entry { stat: self.stat, state, lower: None }
            }
        };
        Some(found)
    }

    pub(crate) fn continue_with(
        self: &mut Box<Self>,
        next: impl FnOnce(EntryReading) -> Examined,
    ) -> Option<Found> {
        let EntryReading { stat, in_image, is_sensitive, is_compared, .. } = **self;
        let (watched, path) = (self.watched.clone(), self.path.clone());
        let stage = Stage::Over;
        let entry =
            EntryReading { watched, path, stat, in_image, is_sensitive, is_compared, stage };
        match next(entry) {
            Examined::Found(found) => Some(found),
            Examined::Reading(reading) => {
                *self = reading;
                None
            }
        }
    }
}

/// Opens the content of a metadata-only copy in the layer that holds it.
pub(crate) fn open_below(layers: &Layers, path: &RootfsPath, upper: &OwnedFd) -> Option<OwnedFd> {
    let redirect = overlay::redirect(upper, layers.userxattr).ok()?;
    let path = match redirect.as_deref() {
        None => path.clone(),
        Some(absolute) if absolute.starts_with(b"/") => RootfsPath::new(absolute).ok()?,
        Some(name) => path.parent()?.join(name).ok()?,
    };
    lower::open(layers, &path)
}

/// Opens a file as the container sees it. The descriptor is on the container's mount and
/// must not be kept.
pub(crate) fn open_merged(watched: &Watched, path: &RootfsPath) -> io::Result<OwnedFd> {
    if watched.has_foreign_layers() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let handle = crate::sys::procfs::Handle::open_exactly(watched.init)?;
    let root = handle.open_root()?;
    if file::stat(&root)?.device != watched.device {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (fd, stat) = file::open_file_beneath(&root, path.relative())?;
    if stat.is_regular() { Ok(fd) } else { Err(io::ErrorKind::InvalidData.into()) }
}

pub(crate) fn is_gone(err: &io::Error) -> bool {
    err.raw_os_error() == Some(libc::ENOENT)
}
