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
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;
use rustix::fs::{
    Advice, AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags, Stat, fadvise, fgetxattr, flistxattr,
    fstat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

use super::Progress;
use super::layer::{Device, FileEntry, LayerBaseline, LayerEntry, MAX_PATH};
use crate::model::{Blake3Hash, FileTime, FileType, Format, RootfsPath};

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

/// What a walk found.
#[derive(Debug)]
pub struct Walked {
    /// In no order.
    pub entries: Vec<LayerEntry>,
    /// The newest ctime of anything in the directory, itself included. What is
    /// changed later has a later one.
    pub newest_change: FileTime,
}

/// Reads everything in `directory`, on all threads of `pool`.
///
/// `stop` ends the walk early.
pub fn walk(
    pool: &rayon::ThreadPool,
    directory: &Path,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Walked, Error> {
    walk_with(pool, directory, Reading { known: None, rate: None }, progress, stop)
}

/// Like [`walk`], for a layer whose baseline is `known`. What has not changed
/// since `since` is not read again: such a file keeps the hash that is known. A
/// file has not changed if neither it nor any directory on the way to it has a
/// later ctime; without `since` all files are read.
///
/// `rate` bounds how much is read in a second.
pub fn recheck(
    pool: &rayon::ThreadPool,
    directory: &Path,
    known: &LayerBaseline,
    since: Option<FileTime>,
    rate: Option<&Rate>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Walked, Error> {
    let known = since.map(|since| Unchanged { layer: known, since });
    walk_with(pool, directory, Reading { known, rate }, progress, stop)
}

fn walk_with(
    pool: &rayon::ThreadPool,
    directory: &Path,
    reading: Reading<'_>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Walked, Error> {
    // The way to the layer is the snapshotter's: Docker names layers by symlinks.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|source| Error::Directory { directory: directory.into(), source })?;
    let walk = Walk {
        root,
        directory,
        reading,
        progress,
        stop,
        noatime: AtomicBool::new(true),
        newest_change: Mutex::new(FileTime { seconds: i64::MIN, nanoseconds: 0 }),
        found: Mutex::default(),
        visited: Mutex::default(),
        links: Mutex::default(),
        failure: OnceLock::new(),
    };
    let kept = walk.reading.known.is_some();
    pool.scope(|scope| walk.visit(scope, &RootfsPath::root(), kept));
    pool.install(|| walk.look_back());
    walk.finish()
}

/// How much is read in a second, by all threads together.
#[derive(Debug)]
pub struct Rate {
    bytes_per_second: u64,
    /// When what has been read so far has had its time.
    free_at: Mutex<Instant>,
}

impl Rate {
    pub fn new(bytes_per_second: NonZeroU64) -> Rate {
        Rate { bytes_per_second: bytes_per_second.get(), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read, or until `stop`.
    pub fn take(&self, bytes: u64, stop: &AtomicBool) {
        // Longer than anybody's patience, and far from what an Instant can hold.
        const FOREVER: u64 = 86_400;
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = u64::try_from(nanoseconds)
            .map_or(Duration::from_secs(FOREVER), Duration::from_nanos)
            .min(Duration::from_secs(FOREVER));
        let ours = {
            let mut free_at = lock(&self.free_at);
            let ours = (*free_at).max(Instant::now());
            *free_at = ours + cost;
            ours
        };
        while !stop.load(Ordering::Relaxed) {
            let left = ours.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// What need not be read, and how fast the rest may be.
#[derive(Clone, Copy)]
struct Reading<'a> {
    known: Option<Unchanged<'a>>,
    rate: Option<&'a Rate>,
}

#[derive(Clone, Copy)]
struct Unchanged<'a> {
    layer: &'a LayerBaseline,
    since: FileTime,
}

impl Unchanged<'_> {
    /// The regular file that is known at `path`, if what is there now is that.
    fn file(&self, path: &RootfsPath, stat: &Stat) -> Option<FileEntry> {
        if change_of(stat) > self.since {
            return None;
        }
        match self.layer.get(path)?.to_entry() {
            LayerEntry::File(file) if file.file_type == FileType::Regular => Some(file),
            LayerEntry::File(_) | LayerEntry::OpaqueDirectory(_) | LayerEntry::Whiteout(_) => None,
        }
    }
}

fn change_of(stat: &Stat) -> FileTime {
    FileTime {
        seconds: stat.st_ctime,
        // The kernel counts below a thousand million.
        nanoseconds: u32::try_from(stat.st_ctime_nsec).unwrap_or(u32::MAX),
    }
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
    reading: Reading<'a>,
    progress: Option<&'a Progress>,
    stop: &'a AtomicBool,
    newest_change: Mutex<FileTime>,
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
    ///
    /// `unchanged`: no directory on the way to it has changed since it was known.
    fn visit<'s>(&'s self, scope: &rayon::Scope<'s>, path: &RootfsPath, unchanged: bool) {
        if self.is_over() {
            return;
        }
        match self.read_directory(path) {
            Ok((directory, changed, files, directories)) => {
                // Whatever comes into a directory, goes, or is renamed changes it.
                let since = self.reading.known.map(|known| known.since);
                let unchanged = unchanged && since.is_some_and(|since| changed <= since);
                for child in directories {
                    scope.spawn(move |scope| self.visit(scope, &child, unchanged));
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
                    scope.spawn(move |_| self.read_batch(directory.as_fd(), batch, unchanged));
                }
            }
            Err(error) => self.fail(error),
        }
    }

    fn read_directory(
        &self,
        path: &RootfsPath,
    ) -> Result<(OwnedFd, FileTime, Vec<Name>, Vec<RootfsPath>), Error> {
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
        let changed = change_of(&before.0);
        self.changed_at(changed);
        Ok((directory, changed, files, directories))
    }

    fn read_batch(&self, directory: BorrowedFd<'_>, batch: Vec<Name>, unchanged: bool) {
        let mut found = Vec::with_capacity(batch.len());
        let (mut files, mut bytes) = (0, 0);
        let mut newest = None;
        for Name { name, path, regular } in batch {
            if self.is_over() {
                return;
            }
            let entry = if regular {
                self.read_regular(directory, &name, path.clone(), unchanged)
            } else {
                read_special(directory, &name, path.clone())
                    .map(|(entry, changed)| (Some(entry), changed))
            };
            match entry {
                Ok((entry, changed)) => {
                    newest = newest.max(Some(changed));
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
        if let Some(newest) = newest {
            self.changed_at(newest);
        }
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
        unchanged: bool,
    ) -> Result<(Option<LayerEntry>, FileTime), Trouble> {
        if unchanged && let Some(known) = self.reading.known {
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(Trouble::at("stat"))?;
            if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
                && let Some(file) = known.file(&path, &stat)
            {
                let entry = FileEntry {
                    format: file.format,
                    blake3: file.blake3,
                    ..entry_of(path, FileType::Regular, &stat, file.capability)
                };
                return Ok((Some(LayerEntry::File(entry)), change_of(&stat)));
            }
        }
        let file = File::from(
            self.open(directory, name.to_bytes(), OFlags::NONBLOCK).map_err(Trouble::at("open"))?,
        );
        let before = Moment(fstat(&file).map_err(Trouble::at("stat"))?);
        if !rustix::fs::FileType::from_raw_mode(before.0.st_mode).is_file() {
            return Err(Trouble::Changed);
        }
        let changed = change_of(&before.0);
        let attributes = Attributes::read(file.as_fd())?;
        if let Some(attribute) = attributes.unsupported {
            return Err(Trouble::Unsupported(attribute));
        }
        if attributes.whiteout && before.0.st_size == 0 {
            return Ok((Some(LayerEntry::Whiteout(path)), changed));
        }
        let mut entry = entry_of(path, FileType::Regular, &before.0, attributes.capability);
        if before.0.st_nlink <= 1 {
            let content = self.hash(file, &before)?;
            entry.blake3 = Some(content.blake3);
            entry.format = content.format;
            return Ok((Some(LayerEntry::File(entry)), changed));
        }

        let inode = (before.0.st_dev, before.0.st_ino);
        {
            let mut links = lock(&self.links);
            if links.contents.contains_key(&inode) {
                links.others.push((entry, inode, before));
                return Ok((None, changed));
            }
            links.contents.insert(inode, None);
        }
        let content = self.hash(file, &before)?;
        lock(&self.links).contents.insert(inode, Some((before, content)));
        entry.blake3 = Some(content.blake3);
        entry.format = content.format;
        Ok((Some(LayerEntry::File(entry)), changed))
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
                if let Some(rate) = self.reading.rate {
                    rate.take((size - done).min(BUFFER as u64), self.stop);
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

    fn changed_at(&self, time: FileTime) {
        let mut newest = lock(&self.newest_change);
        *newest = time.max(*newest);
    }

    fn finish(self) -> Result<Walked, Error> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let Walk { directory, found, links, failure, newest_change, .. } = self;
        let newest_change = newest_change.into_inner().unwrap_or_else(PoisonError::into_inner);
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
        Ok(Walked { entries: found, newest_change })
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
) -> Result<(LayerEntry, FileTime), Trouble> {
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
        return Ok((LayerEntry::Whiteout(entry.path), change_of(&stat)));
    }
    if file_type == FileType::Symlink {
        let target = readlinkat(directory, name, Vec::new()).map_err(Trouble::at("read"))?;
        entry.link_target = Some(target.into_bytes().into());
    }
    Ok((LayerEntry::File(entry), change_of(&stat)))
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
        // Not `user.overlay.*`: only overlays mounted with `userxattr`, which a root
        // containerd does not do, read those, and anyone may set them. An image
        // could hide its own files from its baseline with them.
        for name in names.split(|&byte| byte == 0) {
            match name {
                b"trusted.overlay.opaque" => {
                    self.opaque |= value_of(file, name)?.as_deref() == Some(b"y");
                }
                b"trusted.overlay.whiteout" => self.whiteout = true,
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

/// Needs root: device nodes, `trusted.` attributes and overlay mounts.
#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::{PermissionsExt as _, symlink};
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    use rustix::fs::{XattrFlags, makedev, mknodat, setxattr};

    use super::*;
    use crate::baseline::layer::{self, compare_paths};
    use crate::baseline::recorder::hashing_pool;
    use crate::baseline::{ImageBaseline, LayerBaseline, blake3_of};
    use crate::model::{ChainId, DiffId, LayerId};

    fn walked(directory: &Path) -> Result<Vec<LayerEntry>, Error> {
        let pool = hashing_pool(2).unwrap();
        let mut entries = walk(&pool, directory, None, &AtomicBool::new(false))?.entries;
        entries.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
        Ok(entries)
    }

    fn write(path: &Path, mode: u32, content: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn node(path: &Path, file_type: rustix::fs::FileType, major: u32, minor: u32) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        mknodat(CWD, path, file_type, Mode::from_raw_mode(0o600), makedev(major, minor))
            .expect("this test must run as root, with CAP_MKNOD");
    }

    fn whiteout(path: &Path) {
        node(path, rustix::fs::FileType::CharacterDevice, 0, 0);
    }

    fn attribute(path: &Path, name: &str, value: &[u8]) {
        setxattr(path, name, value, XattrFlags::empty())
            .expect("this test must run as root, on a file system with trusted attributes");
    }

    fn path(text: impl AsRef<[u8]>) -> RootfsPath {
        RootfsPath::new(text).unwrap()
    }

    fn directory(at: &str) -> FileEntry {
        FileEntry::directory(path(at), 0o755)
    }

    fn regular(at: impl AsRef<[u8]>, mode: u32, format: Format, content: &str) -> FileEntry {
        FileEntry {
            path: path(at),
            file_type: FileType::Regular,
            format,
            mode,
            size: content.len() as u64,
            blake3: Some(blake3_of(content)),
            ..directory("/")
        }
    }

    /// `cap_net_raw` permitted and effective, as setcap(8) writes it.
    const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

    #[test]
    fn everything_in_a_layer_is_told() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let long = "x".repeat(BUFFER * 2 + 1);
        let elf = "\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0…";
        write(&at("bin/ping"), 0o4755, elf);
        attribute(&at("bin/ping"), "security.capability", &NET_RAW);
        fs::hard_link(at("bin/ping"), at("bin/ping6")).unwrap();
        write(&at("bin/run"), 0o755, "#!/bin/sh\n");
        write(&at("data/long"), 0o600, &long);
        write(&at("data/empty"), 0o644, "");
        fs::write(scratch.path().join(OsStr::from_bytes(b"data/\xff\n")), "odd").unwrap();
        symlink("/etc/passwd", at("data/link")).unwrap();
        symlink("..", at("data/up")).unwrap();
        node(&at("dev/fifo"), rustix::fs::FileType::Fifo, 0, 0);
        node(&at("dev/null"), rustix::fs::FileType::CharacterDevice, 1, 3);
        node(&at("dev/sda"), rustix::fs::FileType::BlockDevice, 8, 300);
        drop(UnixListener::bind(at("dev/socket")).unwrap());
        whiteout(&at("gone"));
        write(&at("opaque/new"), 0o644, "new");
        attribute(&at("opaque"), "trusted.overlay.opaque", b"y");
        write(&at("xwhiteouts/gone"), 0o644, "");
        attribute(&at("xwhiteouts"), "trusted.overlay.opaque", b"x");
        attribute(&at("xwhiteouts/gone"), "trusted.overlay.whiteout", b"");

        let ping = |name| FileEntry {
            capability: Some(NET_RAW.into()),
            ..regular(name, 0o4755, Format::Elf, elf)
        };
        let link = |name, target: &str| FileEntry {
            file_type: FileType::Symlink,
            mode: 0o777,
            size: target.len() as u64,
            link_target: Some(target.as_bytes().into()),
            ..directory(name)
        };
        let special = |name, file_type, mode, device: Option<(u32, u32)>| FileEntry {
            file_type,
            mode,
            device: device.map(|(major, minor)| Device { major, minor }),
            ..directory(name)
        };
        let found = walked(scratch.path()).unwrap();
        // What umask left of the socket's mode is not the point.
        let socket = fs::metadata(at("dev/socket")).unwrap().permissions().mode() & 0o7777;
        let mode = fs::metadata(scratch.path().join(OsStr::from_bytes(b"data/\xff\n")));
        let odd = mode.unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            found,
            [
                LayerEntry::File(directory("/")),
                LayerEntry::File(directory("/bin")),
                LayerEntry::File(ping("/bin/ping")),
                LayerEntry::File(ping("/bin/ping6")),
                LayerEntry::File(regular("/bin/run", 0o755, Format::Script, "#!/bin/sh\n")),
                LayerEntry::File(directory("/data")),
                LayerEntry::File(regular("/data/empty", 0o644, Format::Empty, "")),
                LayerEntry::File(link("/data/link", "/etc/passwd")),
                LayerEntry::File(regular("/data/long", 0o600, Format::Data, &long)),
                LayerEntry::File(link("/data/up", "..")),
                LayerEntry::File(regular(b"/data/\xff\n", odd, Format::Data, "odd")),
                LayerEntry::File(directory("/dev")),
                LayerEntry::File(special("/dev/fifo", FileType::Fifo, 0o600, None)),
                LayerEntry::File(special("/dev/null", FileType::CharDevice, 0o600, Some((1, 3)))),
                LayerEntry::File(special("/dev/sda", FileType::BlockDevice, 0o600, Some((8, 300)))),
                LayerEntry::File(special("/dev/socket", FileType::Socket, socket, None)),
                LayerEntry::Whiteout(path("/gone")),
                LayerEntry::OpaqueDirectory(directory("/opaque")),
                LayerEntry::File(regular("/opaque/new", 0o644, Format::Data, "new")),
                LayerEntry::File(directory("/xwhiteouts")),
                LayerEntry::Whiteout(path("/xwhiteouts/gone")),
            ]
        );
    }

    /// Unmounts when a test ends, however it ends.
    struct Mount(PathBuf);

    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }

    #[test]
    fn an_image_is_what_the_kernel_shows_of_its_layers() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        write(&at("0/kept/a"), 0o644, "a");
        write(&at("0/kept/covered"), 0o644, "lower");
        write(&at("0/removed/deep/b"), 0o644, "b");
        write(&at("0/removed-not"), 0o644, "c");
        write(&at("0/opaque/old"), 0o644, "old");
        write(&at("0/opaque/sub/old"), 0o644, "old");
        write(&at("0/replaced/c"), 0o644, "c");
        write(&at("0/file"), 0o644, "file");
        write(&at("0/back/old"), 0o644, "old");
        write(&at("1/kept/covered"), 0o755, "upper");
        whiteout(&at("1/removed"));
        write(&at("1/opaque/sub/new"), 0o644, "new");
        attribute(&at("1/opaque"), "trusted.overlay.opaque", b"y");
        write(&at("1/replaced"), 0o644, "a file now");
        fs::remove_file(at("1/replaced")).unwrap();
        symlink("kept", at("1/replaced")).unwrap();
        write(&at("1/file/now-a-directory"), 0o644, "x");
        whiteout(&at("1/back"));
        fs::create_dir_all(at("2/back")).unwrap();
        write(&at("2/back/new"), 0o644, "new");
        write(&at("2/opaque/newest"), 0o644, "newest");
        whiteout(&at("2/never-was"));
        whiteout(&at("2/kept/a"));
        fs::create_dir(at("merged")).unwrap();
        fs::create_dir(at("3")).unwrap();

        let layers: Vec<_> = (0..3_u8)
            .map(|number| {
                let id = LayerId::Diff(DiffId([number; 32]));
                let entries = walked(&at(&number.to_string())).unwrap();
                let bytes = layer::write(id, entries, Vec::new()).unwrap();
                (id, Arc::new(LayerBaseline::from_bytes(bytes).unwrap()))
            })
            .collect();
        let image = ImageBaseline::new(ChainId([0; 32]), layers);

        let base = scratch.path().display();
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("lowerdir={base}/2:{base}/1:{base}/0"))
            .arg(at("merged"))
            .status()
            .unwrap();
        assert!(status.success(), "this test must run as root, on a kernel with overlayfs");
        let mount = Mount(at("merged"));
        let shown: Vec<FileEntry> = walked(&mount.0)
            .unwrap()
            .into_iter()
            .filter_map(|entry| match entry {
                LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => Some(file),
                LayerEntry::Whiteout(_) => None,
            })
            .collect();
        assert_eq!(image.files().map(|known| known.entry).collect::<Vec<_>>(), shown);
        assert_eq!(shown.len(), 13);
    }

    #[test]
    fn a_layer_that_is_gone_is_named_with_the_next_step() {
        let scratch = tempfile::tempdir().unwrap();
        let err = walked(&scratch.path().join("none")).unwrap_err();
        assert!(matches!(err, Error::Directory { source: Errno::NOENT, .. }), "{err:?}");
        assert!(err.to_string().contains("pull the image again"), "{err}");
    }

    #[test]
    fn a_layer_whose_content_is_elsewhere_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        write(&scratch.path().join("a/b"), 0o644, "b");
        attribute(&scratch.path().join("a"), "trusted.overlay.redirect", b"/c");
        let err = walked(scratch.path()).unwrap_err();
        assert!(
            matches!(err, Error::Unsupported { attribute: "trusted.overlay.redirect", .. }),
            "{err:?}"
        );
    }

    #[test]
    fn a_walk_that_is_stopped_tells_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        write(&scratch.path().join("a"), 0o644, "a");
        let pool = hashing_pool(1).unwrap();
        let result = walk(&pool, scratch.path(), None, &AtomicBool::new(true));
        assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
    }

    #[test]
    fn progress_counts_files_and_bytes() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..50 {
            write(&scratch.path().join(format!("d{}/{number}", number % 7)), 0o644, "12345");
        }
        let pool = hashing_pool(2).unwrap();
        let progress = Progress::default();
        walk(&pool, scratch.path(), Some(&progress), &AtomicBool::new(false)).unwrap();
        assert_eq!(progress.files_done.load(Ordering::Relaxed), 50);
        assert_eq!(progress.bytes_done.load(Ordering::Relaxed), 250);
    }

    /// Walks while `disturb` is at work, until a walk has failed.
    #[track_caller]
    fn check_noticed(disturb: impl Fn(&Path, u32) + Send + Sync) {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..500 {
            write(&scratch.path().join(format!("d/{number}")), 0o644, &"x".repeat(10_000));
        }
        let over = AtomicBool::new(false);
        let err = std::thread::scope(|scope| {
            scope.spawn(|| {
                for turn in 0.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    disturb(scratch.path(), turn);
                }
            });
            let deadline = Instant::now() + Duration::from_secs(30);
            let err = loop {
                match walked(scratch.path()) {
                    Err(err) => break Some(err),
                    Ok(_) if Instant::now() > deadline => break None,
                    Ok(_) => (),
                }
            };
            over.store(true, Ordering::Relaxed);
            err
        });
        assert!(matches!(err, Some(Error::Changed { .. })), "{err:?}");
    }

    #[test]
    fn a_file_that_changes_is_noticed() {
        check_noticed(|directory, _| {
            let file = fs::OpenOptions::new().append(true).open(directory.join("d/250"));
            std::io::Write::write_all(&mut file.unwrap(), b"more").unwrap();
        });
    }

    #[test]
    fn names_that_come_and_go_are_noticed() {
        check_noticed(|directory, turn| {
            let name = directory.join("d").join(format!("new-{turn}"));
            fs::write(&name, "new").unwrap();
            fs::remove_file(name).unwrap();
        });
    }
}
