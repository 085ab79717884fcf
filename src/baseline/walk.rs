//! A layer's unpacked directory, read into entries.
//!
//! The directory was written by whoever made the image. Nothing in it is
//! followed: every file is opened by name below a directory that is held open,
//! and the kernel is told to leave neither the layer nor its file system. What
//! is no regular file or directory is never opened.
//!
//! A walk tells everything or fails: an entry that vanishes or changes under it
//! means that this is not the committed layer it was taken for.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;
use rustix::fs::{
    Advice, AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags, Stat, fadvise, fgetxattr, flistxattr,
    fstat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

use super::Progress;
use super::layer::{Device, FileEntry, LayerEntry, MAX_PATH};
use crate::model::{Blake3Hash, FileType, Format, RootfsPath};

/// Why a layer could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot open the layer directory {} (was the image removed or its layer cleaned up? pull the image again)",
        directory.display()
    )]
    Directory { directory: PathBuf, source: Errno },
    #[error("cannot {doing} {path} in the layer directory {}", directory.display())]
    Entry { directory: PathBuf, path: RootfsPath, doing: &'static str, source: Errno },
    #[error(
        "{path} in the layer directory {} changed while it was read; a layer that still changes has no baseline",
        directory.display()
    )]
    Changed { directory: PathBuf, path: RootfsPath },
    #[error(
        "{path} in the layer directory {} has the attribute {attribute}, whose meaning driftd does not know",
        directory.display()
    )]
    Unsupported { directory: PathBuf, path: RootfsPath, attribute: &'static str },
    #[error("the name `{name}` in {path} in the layer directory {} is too long or no name", directory.display())]
    Name { directory: PathBuf, path: RootfsPath, name: String },
    #[error("driftd is being stopped")]
    Stopped,
}

/// Reads everything in `directory`, on all threads of `pool`.
///
/// `stop` ends the walk early.
pub fn walk(
    pool: &rayon::ThreadPool,
    directory: &Path,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Vec<LayerEntry>, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|source| Error::Directory { directory: directory.into(), source })?;
    let walk = Walk {
        root,
        directory,
        progress,
        stop,
        noatime: AtomicBool::new(true),
        found: Mutex::default(),
        visited: Mutex::default(),
        links: Mutex::default(),
        failure: OnceLock::new(),
    };
    pool.scope(|scope| walk.visit(scope, &RootfsPath::root()));
    pool.install(|| walk.look_back());
    walk.finish()
}

/// How many files one thread takes at a time.
const BATCH: usize = 16;

/// How much of a file is read at once. Larger than a core's share of the cache
/// is slower; much smaller leaves BLAKE3 with less than it can do side by side.
const BUFFER: usize = 128 * 1024;

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

struct Walk<'a> {
    root: OwnedFd,
    directory: &'a Path,
    progress: Option<&'a Progress>,
    stop: &'a AtomicBool,
    /// Reading leaves no trace in the files' access times, where we may.
    noatime: AtomicBool,
    found: Mutex<Vec<LayerEntry>>,
    /// Directories as they were when they were read.
    visited: Mutex<Vec<(RootfsPath, Moment)>>,
    links: Mutex<Links>,
    /// The first failure; the others stop at the sight of it.
    failure: OnceLock<Error>,
}

/// Files with more than one name are read once.
#[derive(Default)]
struct Links {
    /// By device and inode; `None` while the first name is being read.
    contents: HashMap<(u64, u64), Option<(Moment, ContentRead)>>,
    /// The other names, whose content is filled in at the end.
    others: Vec<(FileEntry, (u64, u64), Moment)>,
}

#[derive(Clone, Copy)]
struct ContentRead {
    blake3: Blake3Hash,
    format: Format,
}

/// A file's state at one moment. Two equal moments: nobody wrote in between.
#[derive(Clone, Copy)]
struct Moment(Stat);

impl PartialEq for Moment {
    fn eq(&self, other: &Moment) -> bool {
        let (a, b) = (&self.0, &other.0);
        (a.st_dev, a.st_ino, a.st_mode, a.st_size) == (b.st_dev, b.st_ino, b.st_mode, b.st_size)
            && (a.st_mtime, a.st_mtime_nsec) == (b.st_mtime, b.st_mtime_nsec)
            && (a.st_ctime, a.st_ctime_nsec) == (b.st_ctime, b.st_ctime_nsec)
    }
}

/// Why one entry ends the walk; the walk adds where it was.
#[derive(Clone, Copy)]
enum Trouble {
    Failed(&'static str, Errno),
    Changed,
    Unsupported(&'static str),
}

impl Trouble {
    fn at(doing: &'static str) -> impl Fn(Errno) -> Trouble {
        move |errno| match errno {
            // It was there a moment ago, or it was something else.
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::STALE => Trouble::Changed,
            _ => Trouble::Failed(doing, errno),
        }
    }
}

/// An entry of a directory that is neither read nor visited yet.
struct Name {
    name: CString,
    path: RootfsPath,
    regular: bool,
}

impl<'a> Walk<'a> {
    /// Reads one directory and leaves what is in it to whoever has time.
    fn visit<'s>(&'s self, scope: &rayon::Scope<'s>, path: &RootfsPath) {
        if self.is_over() {
            return;
        }
        match self.read_directory(path) {
            Ok((directory, files, directories)) => {
                for child in directories {
                    scope.spawn(move |scope| self.visit(scope, &child));
                }
                // Last in, first out: a thread reads the files before it goes on
                // to the directories, so that few directories are open at once.
                let directory = Arc::new(directory);
                let mut files = files.into_iter();
                loop {
                    let batch: Vec<Name> = files.by_ref().take(BATCH).collect();
                    if batch.is_empty() {
                        break;
                    }
                    let directory = Arc::clone(&directory);
                    scope.spawn(move |_| self.read_batch(directory.as_fd(), batch));
                }
            }
            Err(error) => self.fail(error),
        }
    }

    fn read_directory(
        &self,
        path: &RootfsPath,
    ) -> Result<(OwnedFd, Vec<Name>, Vec<RootfsPath>), Error> {
        let at = |trouble| self.error(path, trouble);
        let name = match path.relative() {
            b"" => &b"."[..],
            relative => relative,
        };
        let directory = self
            .open(self.root.as_fd(), name, OFlags::DIRECTORY)
            .map_err(Trouble::at("open"))
            .map_err(at)?;
        let before = Moment(fstat(&directory).map_err(Trouble::at("stat")).map_err(at)?);
        let attributes = Attributes::read(directory.as_fd()).map_err(at)?;
        if let Some(attribute) = attributes.unsupported {
            return Err(at(Trouble::Unsupported(attribute)));
        }

        let mut files = Vec::new();
        let mut directories = Vec::new();
        let mut buffer: Vec<u8> = Vec::with_capacity(32 * 1024);
        let mut names = RawDir::new(&directory, buffer.spare_capacity_mut());
        while let Some(entry) = names.next() {
            let entry = entry.map_err(Trouble::at("list")).map_err(at)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let child = path
                .join(name.to_bytes())
                .ok()
                .filter(|child| {
                    child.as_bytes().len() <= MAX_PATH && child.file_name() == name.to_bytes()
                })
                .ok_or_else(|| Error::Name {
                    directory: self.directory.into(),
                    path: path.clone(),
                    name: crate::model::printable(name.to_bytes()),
                })?;
            let file_type = match entry.file_type() {
                rustix::fs::FileType::Unknown => {
                    let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW);
                    let stat = stat.map_err(Trouble::at("stat"));
                    rustix::fs::FileType::from_raw_mode(
                        stat.map_err(|trouble| self.error(&child, trouble))?.st_mode,
                    )
                }
                known => known,
            };
            if file_type.is_dir() {
                directories.push(child);
            } else {
                let regular = file_type.is_file();
                files.push(Name { name: name.to_owned(), path: child, regular });
            }
        }

        let entry = entry_of(path.clone(), FileType::Directory, &before.0, attributes.capability);
        let entry = if attributes.opaque {
            LayerEntry::OpaqueDirectory(entry)
        } else {
            LayerEntry::File(entry)
        };
        lock(&self.found).push(entry);
        lock(&self.visited).push((path.clone(), before));
        Ok((directory, files, directories))
    }

    fn read_batch(&self, directory: BorrowedFd<'_>, batch: Vec<Name>) {
        let mut found = Vec::with_capacity(batch.len());
        let (mut files, mut bytes) = (0, 0);
        for Name { name, path, regular } in batch {
            if self.is_over() {
                return;
            }
            let entry = if regular {
                self.read_regular(directory, &name, path.clone())
            } else {
                read_special(directory, &name, path.clone()).map(Some)
            };
            match entry {
                Ok(entry) => {
                    files += u64::from(regular);
                    if let Some(LayerEntry::File(file)) = &entry {
                        bytes += file.size;
                    }
                    found.extend(entry);
                }
                Err(trouble) => return self.fail(self.error(&path, trouble)),
            }
        }
        lock(&self.found).extend(found);
        if let Some(progress) = self.progress {
            progress.files_done.fetch_add(files, Ordering::Relaxed);
            progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// `None` if this is one more name of a file that is read already.
    fn read_regular(
        &self,
        directory: BorrowedFd<'_>,
        name: &CStr,
        path: RootfsPath,
    ) -> Result<Option<LayerEntry>, Trouble> {
        let file = File::from(
            self.open(directory, name.to_bytes(), OFlags::NONBLOCK).map_err(Trouble::at("open"))?,
        );
        let before = Moment(fstat(&file).map_err(Trouble::at("stat"))?);
        if !rustix::fs::FileType::from_raw_mode(before.0.st_mode).is_file() {
            return Err(Trouble::Changed);
        }
        let attributes = Attributes::read(file.as_fd())?;
        if let Some(attribute) = attributes.unsupported {
            return Err(Trouble::Unsupported(attribute));
        }
        if attributes.whiteout && before.0.st_size == 0 {
            return Ok(Some(LayerEntry::Whiteout(path)));
        }
        let mut entry = entry_of(path, FileType::Regular, &before.0, attributes.capability);
        if before.0.st_nlink <= 1 {
            let content = self.hash(file, &before)?;
            entry.blake3 = Some(content.blake3);
            entry.format = content.format;
            return Ok(Some(LayerEntry::File(entry)));
        }

        let inode = (before.0.st_dev, before.0.st_ino);
        {
            let mut links = lock(&self.links);
            if links.contents.contains_key(&inode) {
                links.others.push((entry, inode, before));
                return Ok(None);
            }
            links.contents.insert(inode, None);
        }
        let content = self.hash(file, &before)?;
        lock(&self.links).contents.insert(inode, Some((before, content)));
        entry.blake3 = Some(content.blake3);
        entry.format = content.format;
        Ok(Some(LayerEntry::File(entry)))
    }

    fn hash(&self, mut file: File, before: &Moment) -> Result<ContentRead, Trouble> {
        let size = size_of(&before.0);
        let content = READ_BUFFER.with_borrow_mut(|buffer| {
            if size > BUFFER as u64 {
                // Advice only: without it the file is read all the same.
                let _ = fadvise(&file, 0, None, Advice::Sequential);
            }
            let mut hasher = blake3::Hasher::new();
            let mut format = Format::Empty;
            let mut done = 0;
            while done < size {
                if self.stop.load(Ordering::Relaxed) {
                    // The walk is over; what this returns is not looked at.
                    return Err(Trouble::Changed);
                }
                let length = match file.read(buffer) {
                    Ok(length) => length,
                    Err(err) if err.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(err) => {
                        let errno = Errno::from_io_error(&err).unwrap_or(Errno::IO);
                        return Err(Trouble::Failed("read", errno));
                    }
                };
                if length == 0 {
                    return Err(Trouble::Changed);
                }
                if done == 0 {
                    format = Format::sniff(&buffer[..length.min(Format::HEAD)]);
                }
                hasher.update(&buffer[..length]);
                done += length as u64;
            }
            Ok(ContentRead { blake3: Blake3Hash(*hasher.finalize().as_bytes()), format })
        })?;
        // The end of the file was not read: that nobody wrote says where it is.
        match fstat(&file) {
            Ok(after) if Moment(after) == *before => Ok(content),
            Ok(_) | Err(_) => Err(Trouble::Changed),
        }
    }

    /// Opens something in the layer, and nothing outside of it.
    fn open(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let open = |flags: OFlags| {
            let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH
                | ResolveFlags::NO_SYMLINKS
                | ResolveFlags::NO_MAGICLINKS
                | ResolveFlags::NO_XDEV;
            openat2(directory, name, flags, Mode::empty(), resolve)
        };
        if self.noatime.load(Ordering::Relaxed) {
            match open(flags | OFlags::NOATIME) {
                // Only the owner, or root with CAP_FOWNER, may read without a trace.
                Err(Errno::PERM) => self.noatime.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        open(flags)
    }

    /// Whether every directory still is what it was when it was read, so that
    /// nothing came into it unseen.
    fn look_back(&self) {
        let visited = std::mem::take(&mut *lock(&self.visited));
        visited.par_iter().for_each(|(path, before)| {
            if self.is_over() {
                return;
            }
            let relative = match path.relative() {
                b"" => &b"."[..],
                relative => relative,
            };
            let after = statat(&self.root, relative, AtFlags::SYMLINK_NOFOLLOW);
            if after.is_ok_and(|after| Moment(after) == *before) {
                return;
            }
            self.fail(self.error(path, Trouble::Changed));
        });
    }

    fn finish(self) -> Result<Vec<LayerEntry>, Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let Walk { directory, found, links, failure, .. } = self;
        if let Some(failure) = failure.into_inner() {
            return Err(failure);
        }
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Links { contents, others } = links.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (mut entry, inode, moment) in others {
            match contents.get(&inode) {
                Some(Some((first, content))) if *first == moment => {
                    entry.blake3 = Some(content.blake3);
                    entry.format = content.format;
                    found.push(LayerEntry::File(entry));
                }
                Some(_) | None => {
                    return Err(Error::Changed { directory: directory.into(), path: entry.path });
                }
            }
        }
        Ok(found)
    }

    fn error(&self, path: &RootfsPath, trouble: Trouble) -> Error {
        let directory = self.directory.into();
        let path = path.clone();
        match trouble {
            Trouble::Failed(doing, source) => Error::Entry { directory, path, doing, source },
            Trouble::Changed => Error::Changed { directory, path },
            Trouble::Unsupported(attribute) => Error::Unsupported { directory, path, attribute },
        }
    }

    fn fail(&self, error: Error) {
        // Only the first failure is told.
        let _ = self.failure.set(error);
    }

    fn is_over(&self) -> bool {
        self.failure.get().is_some() || self.stop.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Walk({})", self.directory.display())
    }
}

/// A thread that panicked has pushed whole entries or none.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn entry_of(
    path: RootfsPath,
    file_type: FileType,
    stat: &Stat,
    capability: Option<Box<[u8]>>,
) -> FileEntry {
    FileEntry {
        path,
        file_type,
        format: Format::Unknown,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: match file_type {
            FileType::Regular | FileType::Symlink => size_of(stat),
            _ => 0,
        },
        blake3: None,
        capability,
        link_target: None,
        device: match file_type {
            FileType::CharDevice | FileType::BlockDevice => Some(Device {
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            }),
            _ => None,
        },
    }
}

/// Links, pipes, sockets and devices: looked at, never opened.
fn read_special(
    directory: BorrowedFd<'_>,
    name: &CStr,
    path: RootfsPath,
) -> Result<LayerEntry, Trouble> {
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(Trouble::at("stat"))?;
    let file_type = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Symlink => FileType::Symlink,
        rustix::fs::FileType::Fifo => FileType::Fifo,
        rustix::fs::FileType::Socket => FileType::Socket,
        rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
        rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
        rustix::fs::FileType::RegularFile
        | rustix::fs::FileType::Directory
        | rustix::fs::FileType::Unknown => return Err(Trouble::Changed),
    };
    let mut entry = entry_of(path, file_type, &stat, None);
    if entry.file_type == FileType::CharDevice
        && entry.device == Some(Device { major: 0, minor: 0 })
    {
        return Ok(LayerEntry::Whiteout(entry.path));
    }
    if file_type == FileType::Symlink {
        let target = readlinkat(directory, name, Vec::new()).map_err(Trouble::at("read"))?;
        entry.link_target = Some(target.into_bytes().into());
    }
    Ok(LayerEntry::File(entry))
}

/// What a file's extended attributes mean to overlayfs and to exec.
#[derive(Default)]
struct Attributes {
    opaque: bool,
    whiteout: bool,
    capability: Option<Box<[u8]>>,
    /// Overlay says the content is elsewhere. Snapshotters make no such layers.
    unsupported: Option<&'static str>,
}

impl Attributes {
    fn read(file: BorrowedFd<'_>) -> Result<Attributes, Trouble> {
        let mut attributes = Attributes::default();
        let mut names = [0_u8; 1024];
        let length = match flistxattr(file, &mut names) {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(attributes),
            Err(Errno::RANGE) => {
                let mut names = vec![0; 64 * 1024];
                let length = flistxattr(file, &mut names[..]).map_err(Trouble::at("list"))?;
                return attributes.take(file, &names[..length]).map(|()| attributes);
            }
            Err(errno) => return Err(Trouble::at("list the attributes of")(errno)),
        };
        attributes.take(file, &names[..length])?;
        Ok(attributes)
    }

    fn take(&mut self, file: BorrowedFd<'_>, names: &[u8]) -> Result<(), Trouble> {
        // Mounts with `userxattr` keep overlay's attributes under `user.`.
        for name in names.split(|&byte| byte == 0) {
            match name {
                b"trusted.overlay.opaque" | b"user.overlay.opaque" => {
                    self.opaque |= value_of(file, name)?.as_deref() == Some(b"y");
                }
                b"trusted.overlay.whiteout" | b"user.overlay.whiteout" => self.whiteout = true,
                b"security.capability" => self.capability = value_of(file, name)?,
                b"trusted.overlay.redirect" => self.unsupported = Some("trusted.overlay.redirect"),
                b"trusted.overlay.metacopy" => self.unsupported = Some("trusted.overlay.metacopy"),
                _ => (),
            }
        }
        Ok(())
    }
}

fn value_of(file: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Box<[u8]>>, Trouble> {
    let mut value = [0_u8; 1024];
    match fgetxattr(file, name, &mut value) {
        Ok(length) => Ok(Some(value[..length].into())),
        Err(Errno::NODATA) => Err(Trouble::Changed),
        Err(errno) => Err(Trouble::Failed("read the attributes of", errno)),
    }
}
