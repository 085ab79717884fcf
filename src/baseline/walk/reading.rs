//! What a walk reads, how fast, and what it need not read again; and the times of files
//! that this rests on.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::Stat;

use crate::baseline::layer::{FileEntry, LayerBaseline, LayerEntry};
use crate::model::{FileTime, FileType, RootfsPath};

/// How much is read in a second, by all threads together.
#[derive(Debug)]
pub struct Rate {
    bytes_per_second: u64,
    /// When the bytes that were taken so far have used up their time.
    pub(super) free_at: Mutex<Instant>,
}

impl Rate {
    pub fn new(bytes_per_second: NonZeroU64) -> Rate {
        Rate { bytes_per_second: bytes_per_second.get(), free_at: Mutex::new(Instant::now()) }
    }

    /// Waits until `bytes` more may be read, or until `stop`.
    pub fn take(&self, bytes: u64, stop: &AtomicBool) {
        // Longer than any read may wait, and far below what an Instant can hold.
        const LONGEST: Duration = Duration::from_secs(86_400);
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = u64::try_from(nanoseconds).map_or(LONGEST, Duration::from_nanos).min(LONGEST);
        let start = {
            let mut free_at = lock(&self.free_at);
            let start = (*free_at).max(Instant::now());
            *free_at = start + cost;
            start
        };
        while !stop.load(Ordering::Relaxed) {
            let left = start.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }
}

/// What need not be read, and how fast the rest may be read. By default everything is
/// read, as fast as possible.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reading<'a> {
    pub unchanged: Option<Unchanged<'a>>,
    pub rate: Option<&'a Rate>,
}

/// A baseline that a directory equalled at a time.
#[derive(Clone, Copy, Debug)]
pub struct Unchanged<'a> {
    pub layer: &'a LayerBaseline,
    pub since: FileTime,
}

impl Unchanged<'_> {
    /// The regular file that the baseline has at `path`, if the file there has not changed
    /// since.
    pub(super) fn file(&self, path: &RootfsPath, stat: &Stat) -> Option<FileEntry> {
        if change_of(stat) > self.since {
            return None;
        }
        match self.layer.get(path)?.to_entry() {
            LayerEntry::File(file) if file.file_type == FileType::Regular => Some(file),
            LayerEntry::File(_) | LayerEntry::OpaqueDirectory(_) | LayerEntry::Whiteout(_) => None,
        }
    }
}

pub(super) fn change_of(stat: &Stat) -> FileTime {
    FileTime {
        seconds: stat.st_ctime,
        // The kernel keeps this below one thousand million.
        nanoseconds: u32::try_from(stat.st_ctime_nsec).unwrap_or(u32::MAX),
    }
}

/// A file's state at one moment. If two moments are equal, nothing was written between
/// them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment {
    pub(super) device: u64,
    pub(super) inode: u64,
    mode: u32,
    pub(super) size: i64,
    modified: (i64, i64),
    pub(super) changed: FileTime,
}

impl Moment {
    pub(super) fn of(stat: &Stat) -> Moment {
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

/// The kernel's clock for files, one tick back: what is changed from now on has a
/// later ctime than this.
pub(super) fn last_tick() -> FileTime {
    // The longest tick that Linux can be configured with.
    const TICK: Duration = Duration::from_millis(10);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let before = now.saturating_sub(TICK);
    FileTime {
        seconds: i64::try_from(before.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: before.subsec_nanos(),
    }
}

/// Every change under these locks is whole, also if a thread panics.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
