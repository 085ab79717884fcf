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
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::IoSliceMut;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, bounded};
use rustix::fs::{
    Advice, AtFlags, CWD, Mode, OFlags, RawDir, ResolveFlags, Stat, fadvise, fgetxattr, flistxattr,
    fstat, openat2, readlinkat, statat,
};
use rustix::io::{Errno, ReadWriteFlags};

use super::Progress;
use super::layer::{Device, FileEntry, LayerBaseline, LayerEntry, MAX_PATH};
use crate::model::{Blake3Hash, FileTime, FileType, Format, RootfsPath};
use crate::sys::map::any_cached;

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
    /// In the order of paths (see [`super::layer`]).
    pub entries: Vec<LayerEntry>,
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
    collect(|found| walk_to(pool, directory, &Reading::default(), progress, stop, found))
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
    let unchanged = since.map(|since| Unchanged { layer: known, since });
    collect(|found| walk_to(pool, directory, &Reading { unchanged, rate }, progress, stop, found))
}

fn collect(
    walk: impl FnOnce(&mut dyn FnMut(LayerEntry) -> Result<(), Error>) -> Result<FileTime, Error>,
) -> Result<Walked, Error> {
    let mut entries = Vec::new();
    let newest_change = walk(&mut |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(Walked { entries, newest_change })
}

/// Like [`walk`], but keeps nothing: `found` is given every entry, in the order
/// of paths, and can end the walk. However many entries there are, no more than
/// some tens of megabytes of them are in memory at once.
///
/// Returns the newest ctime of anything in the directory, itself included, but
/// none later than the beginning of the walk: what is changed after it was read
/// has a later one, even if something else was changed after that and read then.
pub fn walk_to<E: From<Error>>(
    pool: &rayon::ThreadPool,
    directory: &Path,
    reading: &Reading<'_>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
    found: &mut dyn FnMut(LayerEntry) -> Result<(), E>,
) -> Result<FileTime, E> {
    walk_within(BOUNDS, pool, directory, reading, progress, stop, found)
}

fn walk_within<E: From<Error>>(
    bounds: Bounds,
    pool: &rayon::ThreadPool,
    directory: &Path,
    reading: &Reading<'_>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
    found: &mut dyn FnMut(LayerEntry) -> Result<(), E>,
) -> Result<FileTime, E> {
    let begin = last_tick();
    // The way to the layer is the snapshotter's: Docker names layers by symlinks.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|source| Error::Directory { directory: directory.into(), source })?;
    let walk = Walk {
        bounds,
        root,
        directory,
        reading,
        progress,
        stop,
        noatime: AtomicBool::new(true),
        uncached: AtomicBool::new(bounds.dontcache),
        links: Mutex::default(),
        failure: OnceLock::new(),
        ended: AtomicBool::new(false),
    };
    let result = pool.in_place_scope(|scope| {
        let mut order = Order::new(&walk, found);
        let result = walk.descend(|batch| order.dispatch(scope, batch));
        let result = result.and_then(|()| order.finish());
        // Those still at work stop where they are.
        walk.ended.store(true, Ordering::Relaxed);
        result
    });
    match result {
        Ok(newest) => Ok(newest.min(begin)),
        Err(End::Found(err)) => Err(err),
        Err(End::Failed) if stop.load(Ordering::Relaxed) => Err(Error::Stopped.into()),
        Err(End::Failed) => {
            Err(walk.failure.into_inner().expect("a walk that has failed says why").into())
        }
    }
}

/// The kernel's clock for files, one tick back: what is changed from now on has a
/// later ctime than this.
fn last_tick() -> FileTime {
    // The longest tick that Linux can be configured with.
    const TICK: Duration = Duration::from_millis(10);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let before = now.saturating_sub(TICK);
    FileTime {
        seconds: i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: before.subsec_nanos(),
    }
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
        const LONGEST: Duration = Duration::from_secs(86_400);
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = u64::try_from(nanoseconds).map_or(LONGEST, Duration::from_nanos).min(LONGEST);
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

/// What need not be read, and how fast the rest may be. By default everything
/// is read, as fast as it goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading<'a> {
    pub unchanged: Option<Unchanged<'a>>,
    pub rate: Option<&'a Rate>,
}

/// A baseline that held at a time.
#[derive(Clone, Copy, Debug)]
pub struct Unchanged<'a> {
    pub layer: &'a LayerBaseline,
    pub since: FileTime,
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
const BATCH: usize = 32;

/// How much of a file is read at once. Larger than a core's share of the cache
/// is slower; much smaller leaves BLAKE3 with less than it can do side by side.
const BUFFER: usize = 128 * 1024;

/// What a walk may keep in memory, and whether the page cache may be asked to
/// keep nothing.
#[derive(Clone, Copy)]
struct Bounds {
    /// Of entries that wait for one before them, which is still being read.
    waiting: usize,
    /// Of names, in one directory, and in all that lead to where the walk is. The
    /// rest is listed again when it is due.
    names: usize,
    all_names: usize,
    /// How many files with more than one name are remembered.
    links: usize,
    dontcache: bool,
}

const BOUNDS: Bounds = Bounds {
    waiting: 8 << 20,
    names: 2 << 20,
    all_names: 8 << 20,
    links: 1 << 15,
    dontcache: true,
};

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

struct Walk<'a> {
    bounds: Bounds,
    root: OwnedFd,
    directory: &'a Path,
    reading: &'a Reading<'a>,
    progress: Option<&'a Progress>,
    stop: &'a AtomicBool,
    /// Reading leaves no trace in the files' access times, where we may.
    noatime: AtomicBool,
    /// Nor in the page cache, where the kernel and the file system can.
    uncached: AtomicBool,
    /// Files with more than one name are read once: by device and inode.
    links: Mutex<HashMap<(u64, u64), (Moment, ContentRead)>>,
    /// The first failure; the others stop at the sight of it.
    failure: OnceLock<Error>,
    /// Nobody wants any more entries.
    ended: AtomicBool,
}

/// Why a walk ends early: for a reason that it keeps, or one that it was given.
enum End<E> {
    Failed,
    Found(E),
}

#[derive(Clone, Copy)]
struct ContentRead {
    blake3: Blake3Hash,
    format: Format,
}

/// A file's state at one moment. Two equal moments: nobody wrote in between.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Moment {
    device: u64,
    inode: u64,
    mode: u32,
    size: i64,
    modified: (i64, i64),
    changed: FileTime,
}

impl Moment {
    fn of(stat: &Stat) -> Moment {
        Moment {
            device: stat.st_dev,
            inode: stat.st_ino,
            mode: stat.st_mode,
            size: stat.st_size,
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(i64::MAX)),
            changed: change_of(stat),
        }
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

// ---- the order of things

/// Something to be read, or told, in its turn.
enum Item {
    /// A directory, with the ctime of what was read of it.
    Directory { entry: LayerEntry, changed: FileTime },
    /// Anything but a directory. `unchanged`: no directory on the way to it has
    /// changed since it was known.
    File { path: RootfsPath, regular: bool, unchanged: bool },
    /// All that is in a directory comes before this.
    End { path: RootfsPath, before: Moment },
}

/// What one thread takes at a time.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    /// About how much memory it takes when it is read.
    cost: usize,
}

impl Batch {
    fn push(&mut self, item: Item) {
        let path = match &item {
            Item::Directory { entry, .. } => entry.path(),
            Item::File { path, .. } | Item::End { path, .. } => path,
        };
        self.cost += size_of::<LayerEntry>() + size_of::<Item>() + path.as_bytes().len();
        self.items.push(item);
    }
}

/// What was read of a batch.
#[derive(Default)]
struct Read {
    entries: Vec<LayerEntry>,
    /// Directories that are over, as they were when they were listed.
    ends: Vec<(RootfsPath, Moment)>,
    newest_change: Option<FileTime>,
}

/// Batches that are being read, in the order in which they are told.
struct Order<'w, 'a, E> {
    walk: &'w Walk<'a>,
    found: &'w mut dyn FnMut(LayerEntry) -> Result<(), E>,
    /// `None` comes from a thread that has failed.
    reading: VecDeque<(Receiver<Option<Read>>, usize)>,
    cost: usize,
    newest_change: FileTime,
}

impl<'w, 'a, E> Order<'w, 'a, E> {
    fn new(
        walk: &'w Walk<'a>,
        found: &'w mut dyn FnMut(LayerEntry) -> Result<(), E>,
    ) -> Order<'w, 'a, E> {
        let newest_change = FileTime { seconds: i64::MIN, nanoseconds: 0 };
        Order { walk, found, reading: VecDeque::new(), cost: 0, newest_change }
    }

    fn dispatch(&mut self, scope: &rayon::Scope<'w>, batch: Batch) -> Result<(), End<E>> {
        let (sender, receiver) = bounded(1);
        self.cost += batch.cost;
        self.reading.push_back((receiver, batch.cost));
        let walk = self.walk;
        scope.spawn(move |_| {
            // Nobody waits for what is read once the walk has ended.
            let _ = sender.send(walk.read_batch(batch));
        });
        while self.cost > self.walk.bounds.waiting
            || self.reading.front().is_some_and(|(first, _)| !first.is_empty())
        {
            self.tell_next()?;
        }
        Ok(())
    }

    /// Waits for the first batch and tells it.
    fn tell_next(&mut self) -> Result<(), End<E>> {
        let Some((first, cost)) = self.reading.pop_front() else { return Ok(()) };
        self.cost -= cost;
        // A thread that panicked sends nothing; the scope passes the panic on.
        let read = first.recv().ok().flatten().ok_or(End::Failed)?;
        for entry in read.entries {
            (self.found)(entry).map_err(End::Found)?;
        }
        for (path, before) in read.ends {
            self.walk.look_back(&path, &before).map_err(|err| self.walk.fail(err))?;
        }
        self.newest_change =
            read.newest_change.map_or(self.newest_change, |newest| newest.max(self.newest_change));
        Ok(())
    }

    fn finish(mut self) -> Result<FileTime, End<E>> {
        while !self.reading.is_empty() {
            self.tell_next()?;
        }
        Ok(self.newest_change)
    }
}

/// Names of one directory, in order.
#[derive(Default)]
struct Names {
    /// One after the other.
    bytes: Vec<u8>,
    /// Where each begins and ends, and what it is; the next one last.
    left: Vec<(u32, u8, Kind)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    Regular,
    Special,
}

impl Names {
    fn push(&mut self, name: &[u8], kind: Kind) {
        let start = u32::try_from(self.bytes.len());
        let length = u8::try_from(name.len());
        // One listing ends far below 4 GiB, and no file system has longer names.
        if let (Ok(start), Ok(length)) = (start, length) {
            self.bytes.extend_from_slice(name);
            self.left.push((start, length, kind));
        }
    }

    fn name(&self, (start, length, _): (u32, u8, Kind)) -> &[u8] {
        &self.bytes[start as usize..][..usize::from(length)]
    }

    fn pop(&mut self) -> Option<(&[u8], Kind)> {
        let next = self.left.pop()?;
        Some((self.name(next), next.2))
    }

    fn sort(&mut self) {
        let mut left = std::mem::take(&mut self.left);
        left.sort_unstable_by(|a, b| self.name(*b).cmp(self.name(*a)));
        self.left = left;
    }

    /// The first half of what is there, in order.
    fn halve(&mut self) {
        self.sort();
        let mut half = Names::default();
        for name in self.left.split_off(self.left.len() / 2) {
            half.push(self.name(name), name.2);
        }
        *self = half;
    }

    fn memory(&self) -> usize {
        self.bytes.len() + self.left.len() * size_of::<(u32, u8, Kind)>()
    }
}

/// A directory on the way to where the walk is.
struct Visited {
    path: RootfsPath,
    before: Moment,
    unchanged: bool,
    names: Names,
    /// The last name that was taken.
    after: Vec<u8>,
    /// There are names that `names` does not hold.
    more: bool,
}

impl<'a> Walk<'a> {
    /// Goes through all directories, in order, and hands out what is in them.
    fn descend<E>(
        &self,
        mut dispatch: impl FnMut(Batch) -> Result<(), End<E>>,
    ) -> Result<(), End<E>> {
        let fail = |err| self.fail(err);
        let mut batch = Batch::default();
        let (root, entry) = self.enter(RootfsPath::root(), true).map_err(fail)?;
        batch.push(entry);
        let mut visited = vec![root];
        while let Some(current) = visited.last_mut() {
            if self.is_over() {
                return Err(End::Failed);
            }
            if batch.items.len() >= BATCH {
                dispatch(std::mem::take(&mut batch))?;
            }
            let Some((name, kind)) = current.names.pop() else {
                if current.more {
                    self.list_again(current).map_err(fail)?;
                } else if let Some(Visited { path, before, .. }) = visited.pop() {
                    batch.push(Item::End { path, before });
                }
                continue;
            };
            let path = self.child(&current.path, name).map_err(fail)?;
            current.after.clear();
            current.after.extend_from_slice(name);
            match kind {
                Kind::Regular | Kind::Special => {
                    let (regular, unchanged) = (kind == Kind::Regular, current.unchanged);
                    batch.push(Item::File { path, regular, unchanged });
                }
                Kind::Directory => {
                    let (directory, entry) = self.enter(path, current.unchanged).map_err(fail)?;
                    batch.push(entry);
                    visited.push(directory);
                    forget_names(&mut visited, self.bounds.all_names);
                }
            }
        }
        dispatch(batch)
    }

    /// Reads a directory's own attributes and its names.
    fn enter(&self, path: RootfsPath, unchanged: bool) -> Result<(Visited, Item), Error> {
        let at = |trouble| self.error(&path, trouble);
        let directory = self.open_directory(&path).map_err(at)?;
        let stat = fstat(&directory).map_err(Trouble::at("stat")).map_err(at)?;
        let attributes = Attributes::read(directory.as_fd()).map_err(at)?;
        if let Some(attribute) = attributes.unsupported {
            return Err(at(Trouble::Unsupported(attribute)));
        }
        let entry = entry_of(path.clone(), FileType::Directory, &stat, attributes.capability);
        let entry = if attributes.opaque {
            LayerEntry::OpaqueDirectory(entry)
        } else {
            LayerEntry::File(entry)
        };
        let (names, more) = self.list(&path, &directory, &[])?;
        let before = Moment::of(&stat);
        let changed = before.changed;
        // Whatever comes into a directory, goes, or is renamed changes it.
        let since = self.reading.unchanged.map(|known| known.since);
        let unchanged = unchanged && since.is_some_and(|since| changed <= since);
        let visited = Visited { path, before, unchanged, names, after: Vec::new(), more };
        Ok((visited, Item::Directory { entry, changed }))
    }

    /// Fetches the names after those that are used up.
    fn list_again(&self, current: &mut Visited) -> Result<(), Error> {
        let at = |trouble| self.error(&current.path, trouble);
        let directory = self.open_directory(&current.path).map_err(at)?;
        let now = fstat(&directory).map_err(Trouble::at("stat")).map_err(at)?;
        if Moment::of(&now) != current.before {
            return Err(at(Trouble::Changed));
        }
        (current.names, current.more) = self.list(&current.path, &directory, &current.after)?;
        Ok(())
    }

    /// The first names after `after`, and whether there are more.
    fn list(
        &self,
        path: &RootfsPath,
        directory: &OwnedFd,
        after: &[u8],
    ) -> Result<(Names, bool), Error> {
        let at = |trouble| self.error(path, trouble);
        let mut found = Names::default();
        // The names from here on are for another time.
        let mut end: Option<Vec<u8>> = None;
        let mut buffer: Vec<u8> = Vec::with_capacity(32 * 1024);
        let mut names = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = names.next() {
            let entry = entry.map_err(Trouble::at("list")).map_err(at)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..")
                || (!after.is_empty() && name <= after)
                || end.as_deref().is_some_and(|end| name >= end)
            {
                continue;
            }
            let file_type = match entry.file_type() {
                rustix::fs::FileType::Unknown => {
                    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
                    let stat = stat.map_err(Trouble::at("stat")).map_err(at)?;
                    rustix::fs::FileType::from_raw_mode(stat.st_mode)
                }
                known => known,
            };
            let kind = match file_type {
                file_type if file_type.is_dir() => Kind::Directory,
                file_type if file_type.is_file() => Kind::Regular,
                _ => Kind::Special,
            };
            found.push(name, kind);
            if found.left.len() > 1 && found.memory() > 2 * self.bounds.names {
                if self.is_over() {
                    return Err(at(Trouble::Changed));
                }
                found.sort();
                let middle = found.left[found.left.len() / 2 - 1];
                end = Some(found.name(middle).to_vec());
                found.halve();
            }
        }
        found.sort();
        Ok((found, end.is_some()))
    }

    fn child(&self, path: &RootfsPath, name: &[u8]) -> Result<RootfsPath, Error> {
        let child = path.join(name).ok();
        child
            .filter(|child| child.as_bytes().len() <= MAX_PATH && child.file_name() == name)
            .ok_or_else(|| Error::Name {
                directory: self.directory.into(),
                path: path.clone(),
                name: crate::model::printable(name),
            })
    }

    /// `None` if the walk is over.
    fn read_batch(&self, batch: Batch) -> Option<Read> {
        let mut read = Read { entries: Vec::with_capacity(batch.items.len()), ..Read::default() };
        let (mut files, mut bytes) = (0, 0);
        // Files are opened in their directory, which is opened for them once.
        let mut opened: Option<(RootfsPath, OwnedFd)> = None;
        for item in batch.items {
            let (path, regular, unchanged) = match item {
                Item::Directory { entry, changed } => {
                    read.entries.push(entry);
                    read.newest_change = read.newest_change.max(Some(changed));
                    continue;
                }
                Item::End { path, before } => {
                    read.ends.push((path, before));
                    continue;
                }
                Item::File { path, regular, unchanged } => (path, regular, unchanged),
            };
            if self.is_over() {
                return None;
            }
            let result = self.directory_of(&path, &mut opened).and_then(|directory| {
                let name = path.file_name();
                if regular {
                    self.read_regular(directory, name, &path, unchanged)
                } else {
                    read_special(directory, name, &path)
                }
            });
            match result {
                Ok((entry, changed)) => {
                    files += u64::from(regular);
                    if let LayerEntry::File(file) = &entry {
                        bytes += file.size;
                    }
                    read.entries.push(entry);
                    read.newest_change = read.newest_change.max(Some(changed));
                }
                Err(trouble) => {
                    let _: End<Error> = self.fail(self.error(&path, trouble));
                    return None;
                }
            }
        }
        if let Some(progress) = self.progress {
            progress.files_done.fetch_add(files, Ordering::Relaxed);
            progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        }
        Some(read)
    }

    /// The directory that holds `path`, which is opened if it is not the one that
    /// was asked for last.
    fn directory_of<'o>(
        &self,
        path: &RootfsPath,
        opened: &'o mut Option<(RootfsPath, OwnedFd)>,
    ) -> Result<BorrowedFd<'o>, Trouble> {
        let parent = super::layer::parent_of(path.as_bytes()).unwrap_or(b"/");
        if opened.as_ref().is_none_or(|(known, _)| known.as_bytes() != parent) {
            let parent = path.parent().unwrap_or_else(RootfsPath::root);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let directory = open_below(self.root.as_fd(), relative(&parent), flags)
                .map_err(Trouble::at("open"))?;
            *opened = Some((parent, directory));
        }
        opened.as_ref().map(|(_, directory)| directory.as_fd()).ok_or(Trouble::Changed)
    }

    fn read_regular(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        path: &RootfsPath,
        unchanged: bool,
    ) -> Result<(LayerEntry, FileTime), Trouble> {
        if unchanged && let Some(known) = &self.reading.unchanged {
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(Trouble::at("stat"))?;
            if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
                && let Some(file) = known.file(path, &stat)
            {
                let entry = FileEntry {
                    format: file.format,
                    blake3: file.blake3,
                    ..entry_of(path.clone(), FileType::Regular, &stat, file.capability)
                };
                return Ok((LayerEntry::File(entry), change_of(&stat)));
            }
        }
        let file = self.open(directory, name, OFlags::NONBLOCK).map_err(Trouble::at("open"))?;
        let stat = fstat(&file).map_err(Trouble::at("stat"))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(Trouble::Changed);
        }
        let before = Moment::of(&stat);
        let attributes = Attributes::read(file.as_fd())?;
        if let Some(attribute) = attributes.unsupported {
            return Err(Trouble::Unsupported(attribute));
        }
        if attributes.whiteout && stat.st_size == 0 {
            return Ok((LayerEntry::Whiteout(path.clone()), before.changed));
        }
        let content = if stat.st_nlink <= 1 {
            self.hash(&file, &before)?
        } else {
            let inode = (before.device, before.inode);
            let known = lock(&self.links).get(&inode).copied();
            match known {
                Some((moment, content)) if moment == before => content,
                Some(_) => return Err(Trouble::Changed),
                None => {
                    let content = self.hash(&file, &before)?;
                    let mut links = lock(&self.links);
                    if links.len() < self.bounds.links {
                        links.insert(inode, (before, content));
                    }
                    content
                }
            }
        };
        let entry = FileEntry {
            format: content.format,
            blake3: Some(content.blake3),
            ..entry_of(path.clone(), FileType::Regular, &stat, attributes.capability)
        };
        Ok((LayerEntry::File(entry), before.changed))
    }

    fn hash(&self, file: &OwnedFd, before: &Moment) -> Result<ContentRead, Trouble> {
        let size = u64::try_from(before.size).unwrap_or(0);
        // Where a read cannot be told to leave nothing behind, what it has left is
        // dropped afterwards, unless somebody had use for the file before.
        let leave =
            self.uncached.load(Ordering::Relaxed) || any_cached(file.as_fd(), size).unwrap_or(true);
        let content = READ_BUFFER.with_borrow_mut(|buffer| {
            if size > BUFFER as u64 {
                // Advice only: without it the file is read all the same.
                let _ = fadvise(file, 0, None, Advice::Sequential);
            }
            let mut hasher = blake3::Hasher::new();
            let mut format = Format::Empty;
            let mut done = 0;
            while done < size {
                if self.is_over() {
                    // What this returns is not looked at.
                    return Err(Trouble::Changed);
                }
                if let Some(rate) = self.reading.rate {
                    rate.take((size - done).min(BUFFER as u64), self.stop);
                }
                let length = self.read(file, buffer, done)?;
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
        if !leave {
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
        // The end of the file was not read: that nobody wrote says where it is.
        match fstat(file) {
            Ok(after) if Moment::of(&after) == *before => Ok(content),
            Ok(_) | Err(_) => Err(Trouble::Changed),
        }
    }

    /// Reads without evicting what the node has in its page cache: pages that were
    /// not there before do not stay.
    fn read(&self, file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Result<usize, Trouble> {
        let read = |buffer: &mut [u8], flags| {
            rustix::io::retry_on_intr(|| {
                rustix::io::preadv2(file, &mut [IoSliceMut::new(buffer)], offset, flags)
            })
        };
        let failed = |errno| Trouble::Failed("read", errno);
        if self.uncached.load(Ordering::Relaxed) {
            match read(buffer, RWF_DONTCACHE) {
                // An older kernel, or a file system that cannot.
                Err(Errno::OPNOTSUPP) => self.uncached.store(false, Ordering::Relaxed),
                result => return result.map_err(failed),
            }
        }
        read(buffer, ReadWriteFlags::empty()).map_err(failed)
    }

    fn open_directory(&self, path: &RootfsPath) -> Result<OwnedFd, Trouble> {
        self.open(self.root.as_fd(), relative(path), OFlags::DIRECTORY).map_err(Trouble::at("open"))
    }

    /// Opens something for reading, without a trace where we may.
    fn open(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::RDONLY;
        if self.noatime.load(Ordering::Relaxed) {
            match open_below(directory, name, flags | OFlags::NOATIME) {
                // Only the owner, or root with CAP_FOWNER, may read without a trace.
                Err(Errno::PERM) => self.noatime.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        open_below(directory, name, flags)
    }

    /// Whether a directory still is what it was when it was listed, so that
    /// nothing came into it unseen.
    fn look_back(&self, path: &RootfsPath, before: &Moment) -> Result<(), Error> {
        match statat(&self.root, relative(path), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(after) if Moment::of(&after) == *before => Ok(()),
            Ok(_) | Err(_) => Err(self.error(path, Trouble::Changed)),
        }
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

    fn fail<E>(&self, error: Error) -> End<E> {
        // Only the first failure is told.
        let _ = self.failure.set(error);
        End::Failed
    }

    fn is_over(&self) -> bool {
        self.failure.get().is_some()
            || self.ended.load(Ordering::Relaxed)
            || self.stop.load(Ordering::Relaxed)
    }
}

/// Linux 6.14; rustix has no name for it. What the read brings into the page
/// cache leaves it again, what was there before stays.
const RWF_DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Opens something in the layer, and nothing outside of it.
fn open_below(directory: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // EAGAIN: a rename elsewhere raced with the look-up, which proves nothing.
    let mut attempts = 0;
    loop {
        match openat2(directory, name, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
            opened => return opened,
        }
    }
}

fn relative(path: &RootfsPath) -> &[u8] {
    match path.relative() {
        b"" => b".",
        relative => relative,
    }
}

/// Drops names, of the directories farthest from where the walk is first, until
/// the rest is not too much.
fn forget_names(visited: &mut [Visited], most: usize) {
    let mut memory: usize = visited.iter().map(|directory| directory.names.memory()).sum();
    for directory in visited {
        if memory <= most {
            return;
        }
        if !directory.names.left.is_empty() {
            memory -= directory.names.memory();
            directory.names = Names::default();
            directory.more = true;
        }
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
            FileType::Regular | FileType::Symlink => u64::try_from(stat.st_size).unwrap_or(0),
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
    name: &[u8],
    path: &RootfsPath,
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
    let mut entry = entry_of(path.clone(), file_type, &stat, None);
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
    use std::sync::Arc;

    use rustix::fs::{XattrFlags, makedev, mknodat, setxattr};

    use super::*;
    use crate::baseline::layer::{self, compare_paths};
    use crate::baseline::urgency::hashing_pool;
    use crate::baseline::{ImageBaseline, LayerBaseline, blake3_of};
    use crate::model::{ChainId, DiffId, LayerId};

    fn walked(directory: &Path) -> Result<Vec<LayerEntry>, Error> {
        let pool = hashing_pool(2, &Arc::default()).unwrap();
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
        let pool = hashing_pool(1, &Arc::default()).unwrap();
        let result = walk(&pool, scratch.path(), None, &AtomicBool::new(true));
        assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
    }

    /// With hardly any room, everything is told all the same.
    #[test]
    fn a_walk_needs_little_memory() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..300_usize {
            let name =
                format!("d{}/e{}/{}-{number}", number % 3, number % 5, "n".repeat(number % 40));
            write(&scratch.path().join(name), 0o644, &number.to_string());
            write(&scratch.path().join(format!("d{}-/{number}", number % 3)), 0o644, "x");
        }
        for number in 0..20 {
            let link = scratch.path().join(format!("d1/link-{number}"));
            fs::hard_link(scratch.path().join(format!("d0-/{}", number % 5 * 3)), link).unwrap();
        }
        let pool = hashing_pool(2, &Arc::default()).unwrap();
        let all = walk(&pool, scratch.path(), None, &AtomicBool::new(false)).unwrap().entries;
        let sorted = |entries: &[LayerEntry]| {
            let order = |a: &LayerEntry, b: &LayerEntry| {
                compare_paths(a.path().as_bytes(), b.path().as_bytes()).is_lt()
            };
            entries.is_sorted_by(order)
        };
        assert!(sorted(&all), "{all:?}");
        // 600 files, their 15 + 3 + 3 directories, the links, and the root.
        assert_eq!(all.len(), 600 + 21 + 20 + 1);
        for (waiting, names, all_names, links) in
            [(0, 0, 0, 0), (1, 100, 10, 1), (1000, 500, 700, 2), (1 << 20, 1, 1 << 20, 100)]
        {
            let bounds = Bounds { waiting, names, all_names, links, ..BOUNDS };
            let mut found = Vec::new();
            let nothing = AtomicBool::new(false);
            walk_within::<Error>(
                bounds,
                &pool,
                scratch.path(),
                &Reading::default(),
                None,
                &nothing,
                &mut |entry| {
                    found.push(entry);
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(found, all);
        }
    }

    #[test]
    fn whoever_is_told_can_end_the_walk() {
        #[derive(Debug)]
        enum Told {
            Enough,
            Walk(Error),
        }
        impl From<Error> for Told {
            fn from(err: Error) -> Told {
                Told::Walk(err)
            }
        }
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..200 {
            write(&scratch.path().join(number.to_string()), 0o644, "x");
        }
        let pool = hashing_pool(2, &Arc::default()).unwrap();
        let mut left = 100;
        let never = AtomicBool::new(false);
        let result = walk_to(&pool, scratch.path(), &Reading::default(), None, &never, &mut |_| {
            left -= 1;
            if left == 0 { Err(Told::Enough) } else { Ok(()) }
        });
        match result {
            Err(Told::Enough) => assert_eq!(left, 0),
            Err(Told::Walk(err)) => panic!("{err}"),
            Ok(_) => panic!("the walk went on"),
        }
    }

    /// The newest ctime below a directory, itself included.
    fn newest_below(directory: &Path) -> FileTime {
        use std::os::unix::fs::MetadataExt as _;
        let metadata = fs::symlink_metadata(directory).unwrap();
        let own = FileTime {
            seconds: metadata.ctime(),
            nanoseconds: u32::try_from(metadata.ctime_nsec()).unwrap(),
        };
        if !metadata.is_dir() {
            return own;
        }
        let below =
            fs::read_dir(directory).unwrap().map(|entry| newest_below(&entry.unwrap().path()));
        below.fold(own, FileTime::max)
    }

    /// Until the kernel's clock for files has moved on, twice.
    fn let_a_tick_pass() {
        std::thread::sleep(Duration::from_millis(25));
    }

    #[test]
    fn the_newest_change_is_told_wherever_it_was() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["a/b/file", "c/file", "d/e/f/file"] {
            write(&scratch.path().join(name), 0o644, "x");
        }
        symlink("x", scratch.path().join("link")).unwrap();
        for name in ["a/b/file", "a/b", "d/e/f", ".", "c/file"] {
            let_a_tick_pass();
            let changed = scratch.path().join(name);
            let mode = fs::metadata(&changed).unwrap().permissions();
            fs::set_permissions(&changed, mode).unwrap();
            let_a_tick_pass();
            let pool = hashing_pool(1, &Arc::default()).unwrap();
            let walked = walk(&pool, scratch.path(), None, &AtomicBool::new(false)).unwrap();
            assert_eq!(
                walked.newest_change,
                newest_below(&changed).max(newest_below(scratch.path()))
            );
        }
    }

    /// Else a file that was changed after it was read would count as unchanged,
    /// because another one, read later, was changed still later.
    #[test]
    fn what_is_changed_during_a_walk_counts_as_changed_later() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..BATCH * 3 {
            write(&scratch.path().join(format!("{number:04}")), 0o644, "x");
        }
        let last = scratch.path().join(format!("{:04}", BATCH * 3 - 1));
        let_a_tick_pass();
        let pool = hashing_pool(1, &Arc::default()).unwrap();
        // One batch at a time: the last file is read long after the first was told.
        let bounds = Bounds { waiting: 0, ..BOUNDS };
        let mut touched = false;
        let mut touch = |_| {
            if !std::mem::replace(&mut touched, true) {
                fs::set_permissions(&last, fs::Permissions::from_mode(0o600)).unwrap();
            }
            Ok::<(), Error>(())
        };
        let everything = Reading::default();
        let never = AtomicBool::new(false);
        let newest =
            walk_within(bounds, &pool, scratch.path(), &everything, None, &never, &mut touch);
        let newest = newest.unwrap();
        assert!(newest < newest_below(&last), "{newest:?}");
        assert!(newest >= newest_below(&scratch.path().join("0000")), "{newest:?}");
    }

    fn layer_of(entries: Vec<LayerEntry>) -> LayerBaseline {
        let id = LayerId::Diff(DiffId([1; 32]));
        LayerBaseline::from_bytes(layer::write(id, entries, Vec::new()).unwrap()).unwrap()
    }

    /// Changes a file on the disk so that it looks as it did: same size, same
    /// mtime. Only the ctime tells.
    fn tamper(path: &Path) {
        let before = fs::metadata(path).unwrap().modified().unwrap();
        let mut content = fs::read(path).unwrap();
        content[0] ^= 1;
        fs::write(path, content).unwrap();
        fs::File::options().write(true).open(path).unwrap().set_modified(before).unwrap();
    }

    #[test]
    fn a_recheck_finds_what_was_changed_and_reads_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..40 {
            let name = format!("d{}/{number}", number % 4);
            write(&scratch.path().join(name), 0o755, &format!("#!content of {number}"));
        }
        let_a_tick_pass();
        let pool = hashing_pool(2, &Arc::default()).unwrap();
        let never = AtomicBool::new(false);
        let first = walk(&pool, scratch.path(), None, &never).unwrap();
        let known = layer_of(first.entries.clone());
        let since = Some(first.newest_change);

        let read = |since| {
            let rate = Rate::new(NonZeroU64::new(1 << 40).unwrap());
            let before = *lock(&rate.free_at);
            let again =
                recheck(&pool, scratch.path(), &known, since, Some(&rate), None, &never).unwrap();
            let after = *lock(&rate.free_at);
            (again, after != before)
        };
        let (again, has_read) = read(since);
        assert_eq!(again.entries, first.entries);
        assert_eq!(again.newest_change, first.newest_change);
        assert!(!has_read, "files that have not changed were read again");
        assert!(read(None).1, "without a time everything is read");

        tamper(&scratch.path().join("d1/5"));
        let (again, _) = read(since);
        let changed: Vec<&LayerEntry> =
            again.entries.iter().filter(|entry| !first.entries.contains(entry)).collect();
        assert_eq!(changed.len(), 1, "{changed:?}");
        assert_eq!(changed[0].path(), &path("/d1/5"));
        assert!(again.newest_change > first.newest_change);
    }

    /// The files' own ctimes say nothing then: each is the old one.
    #[test]
    fn a_recheck_notices_directories_that_changed_places() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        write(&at("x/one/deep/file"), 0o755, "one");
        write(&at("x/two/deep/file"), 0o755, "two");
        let_a_tick_pass();
        let pool = hashing_pool(1, &Arc::default()).unwrap();
        let never = AtomicBool::new(false);
        let first = walk(&pool, scratch.path(), None, &never).unwrap();
        let known = layer_of(first.entries.clone());
        fs::rename(at("x/one"), at("x/tmp")).unwrap();
        fs::rename(at("x/two"), at("x/one")).unwrap();
        fs::rename(at("x/tmp"), at("x/two")).unwrap();
        let since = Some(first.newest_change);
        let again = recheck(&pool, scratch.path(), &known, since, None, None, &never).unwrap();
        let content = |name: &str| {
            again.entries.iter().find_map(|entry| match entry {
                LayerEntry::File(file) if file.path == path(name) => file.blake3,
                _ => None,
            })
        };
        assert_eq!(content("/x/one/deep/file"), Some(blake3_of("two")));
        assert_eq!(content("/x/two/deep/file"), Some(blake3_of("one")));
    }

    #[test]
    fn a_rate_is_kept_and_given_up_when_stopped() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..8 {
            write(&scratch.path().join(number.to_string()), 0o644, &"x".repeat(BUFFER));
        }
        let pool = hashing_pool(2, &Arc::default()).unwrap();
        let rechecked = |per_second: u64, stop: &AtomicBool| {
            let rate = Rate::new(NonZeroU64::new(per_second).unwrap());
            let known = layer_of(vec![LayerEntry::File(directory("/"))]);
            let start = Instant::now();
            recheck(&pool, scratch.path(), &known, None, Some(&rate), None, stop)
                .map(|_| start.elapsed())
        };
        // Eight reads, of which the first need not wait: seven tenths of a second.
        let took = rechecked(10 * BUFFER as u64, &AtomicBool::new(false)).unwrap();
        assert!(took >= Duration::from_millis(690), "{took:?}");

        let stop = AtomicBool::new(false);
        let start = Instant::now();
        std::thread::scope(|scope| {
            let walker = scope.spawn(|| rechecked(1, &stop));
            std::thread::sleep(Duration::from_millis(100));
            stop.store(true, Ordering::Relaxed);
            let result = walker.join().unwrap();
            assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
        });
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }

    /// Which part of a file is in the page cache, in bytes.
    fn cached(path: &Path) -> u64 {
        let output = Command::new("fincore").args(["-nb", "-o", "RES"]).arg(path).output();
        let output = output.expect("fincore is in util-linux, which scripts/setup installs");
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }

    /// Reads a file of which all is in the page cache and one of which nothing is.
    #[track_caller]
    fn check_page_cache(dontcache: bool) {
        // Not below /tmp, which may be a tmpfs: that is nothing but a page cache.
        let scratch = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let (warm, cold) = (scratch.path().join("warm"), scratch.path().join("cold"));
        let content = "some text ".repeat(400_000);
        for path in [&warm, &cold] {
            write(path, 0o644, &content);
            fs::File::open(path).unwrap().sync_all().unwrap();
        }
        let file = fs::File::open(&cold).unwrap();
        let mut one = [0; 1];
        let alone = rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut one)], 0, RWF_DONTCACHE);
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        let whole = content.len() as u64;
        assert_eq!(cached(&cold), 0, "the file system keeps what is advised away");
        assert!(cached(&warm) >= whole, "{}", cached(&warm));
        if dontcache && alone == Err(Errno::OPNOTSUPP) {
            eprintln!("not tried: this kernel or file system has no RWF_DONTCACHE");
            return;
        }
        let bounds = Bounds { dontcache, ..BOUNDS };
        let pool = hashing_pool(2, &Arc::default()).unwrap();
        let mut hashes = Vec::new();
        let mut found = |entry| {
            if let LayerEntry::File(FileEntry { blake3: Some(blake3), .. }) = entry {
                hashes.push(blake3);
            }
            Ok::<(), Error>(())
        };
        let (everything, never) = (Reading::default(), AtomicBool::new(false));
        walk_within(bounds, &pool, scratch.path(), &everything, None, &never, &mut found).unwrap();
        assert_eq!(hashes, [blake3_of(&content); 2]);
        assert!(cached(&cold) < whole / 10, "{} of {whole} bytes stayed", cached(&cold));
        assert!(cached(&warm) >= whole, "only {} of {whole} bytes stayed", cached(&warm));
    }

    #[test]
    fn what_is_in_the_page_cache_stays_and_nothing_else_comes() {
        check_page_cache(true);
    }

    #[test]
    fn the_page_cache_is_left_as_it_was_where_reads_cannot_pass_it_by() {
        check_page_cache(false);
    }

    #[test]
    fn a_path_may_be_as_long_as_the_kernel_allows_and_no_longer() {
        let scratch = tempfile::tempdir().unwrap();
        // 16 × (1 + 255) bytes: exactly 4096, with the slash that a layer's path begins with.
        let mut current =
            rustix::fs::open(scratch.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let name = "n".repeat(255);
        for _ in 0..15 {
            rustix::fs::mkdirat(&current, &name, Mode::from_raw_mode(0o755)).unwrap();
            current =
                rustix::fs::openat(&current, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        let make = |name: &str| {
            let flags = OFlags::CREATE | OFlags::WRONLY;
            rustix::fs::openat(&current, name, flags, Mode::from_raw_mode(0o644)).unwrap();
        };
        make(&name[1..]);
        assert_eq!(walked(scratch.path()).unwrap().last().unwrap().path().as_bytes().len(), 4095);
        rustix::fs::mkdirat(&current, &name, Mode::from_raw_mode(0o755)).unwrap();
        current = rustix::fs::openat(&current, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
        let flags = OFlags::CREATE | OFlags::WRONLY;
        rustix::fs::openat(&current, "x", flags, Mode::from_raw_mode(0o644)).unwrap();
        let err = walked(scratch.path()).unwrap_err();
        assert!(matches!(&err, Error::Name { name, .. } if name == "x"), "{err:?}");
    }

    #[test]
    fn pipes_sockets_and_devices_are_never_opened() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        node(&at("fifo"), rustix::fs::FileType::Fifo, 0, 0);
        drop(UnixListener::bind(at("socket")).unwrap());
        // A tape that rewinds, a watchdog that bites: opening is doing.
        node(&at("watchdog"), rustix::fs::FileType::CharacterDevice, 10, 130);
        let start = Instant::now();
        assert_eq!(walked(scratch.path()).unwrap().len(), 4);
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    /// Holes are read as the zeros they are; that takes time, and ends when told.
    #[test]
    fn a_large_hole_is_read_and_can_be_stopped() {
        let scratch = tempfile::tempdir().unwrap();
        let hole = fs::File::create(scratch.path().join("hole")).unwrap();
        hole.set_len(3 << 20).unwrap();
        let found = walked(scratch.path()).unwrap();
        let zeros = blake3::hash(&vec![0; 3 << 20]);
        let LayerEntry::File(file) = &found[1] else { panic!("{found:?}") };
        assert_eq!(file.blake3, Some(Blake3Hash(*zeros.as_bytes())));

        hole.set_len(1 << 42).unwrap();
        let pool = hashing_pool(1, &Arc::default()).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let walker = scope.spawn(|| walk(&pool, scratch.path(), None, &stop));
            std::thread::sleep(Duration::from_millis(200));
            let start = Instant::now();
            stop.store(true, Ordering::Relaxed);
            let result = walker.join().unwrap();
            assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        });
    }

    #[test]
    fn a_layer_removed_under_the_walk_is_noticed() {
        check_noticed(|directory, _| {
            let _ = fs::remove_dir_all(directory.join("d"));
            let _ = fs::create_dir(directory.join("d"));
            let _ = fs::write(directory.join("d/250"), "x");
        });
    }

    #[test]
    fn progress_counts_files_and_bytes() {
        let scratch = tempfile::tempdir().unwrap();
        for number in 0..50 {
            write(&scratch.path().join(format!("d{}/{number}", number % 7)), 0o644, "12345");
        }
        let pool = hashing_pool(2, &Arc::default()).unwrap();
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
