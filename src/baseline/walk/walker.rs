//! What all threads of one walk share: the open directory, the bounds, the first failure.
//! And how something in the layer is opened.
//!
//! Nothing in the layer is followed: every file is opened by name below a directory that
//! is held open.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::error::{EntryError, Error, WalkEnd};
use super::reading::{Moment, Reading};
use crate::baseline::types::Progress;
use crate::model::{Blake3Hash, Format, RootfsPath};

/// How much a walk may keep in memory, and whether it may ask the kernel to keep
/// nothing in the page cache.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// Bytes of entries that wait for one before them, which is still being read.
    pub(super) waiting: usize,
    /// Bytes of names, in one directory, and in all that lead to the current one. The rest
    /// is listed again when it is due.
    pub(super) names: usize,
    pub(super) all_names: usize,
    /// How many files with more than one name are remembered.
    pub(super) links: usize,
    pub(super) dontcache: bool,
}

pub(super) const BOUNDS: Bounds = Bounds {
    waiting: 8 << 20,
    names: 2 << 20,
    all_names: 8 << 20,
    links: 1 << 15,
    dontcache: true,
};

pub(super) struct Walk<'a> {
    pub(super) bounds: Bounds,
    pub(super) root: OwnedFd,
    pub(super) directory: &'a Path,
    pub(super) reading: &'a Reading<'a>,
    pub(super) progress: Option<&'a Progress>,
    pub(super) stop: &'a AtomicBool,
    /// Whether files are opened with `O_NOATIME`, so that their access times stay. Cleared
    /// at the first refusal.
    pub(super) noatime: AtomicBool,
    /// Whether reads pass the page cache by. Cleared where the kernel or the filesystem
    /// cannot do that.
    pub(super) uncached: AtomicBool,
    /// Files with more than one name are read once: by device and inode.
    pub(super) links: Mutex<HashMap<(u64, u64), (Moment, ContentRead)>>,
    /// The first failure. It ends the work of all threads.
    pub(super) failure: OnceLock<Error>,
    /// No more entries are wanted.
    pub(super) ended: AtomicBool,
}

#[derive(Clone, Copy)]
pub(super) struct ContentRead {
    pub(super) blake3: Blake3Hash,
    pub(super) format: Format,
}

impl Walk<'_> {
    pub(super) fn open_directory(&self, path: &RootfsPath) -> Result<OwnedFd, EntryError> {
        self.open(self.root.as_fd(), relative(path), OFlags::DIRECTORY)
            .map_err(EntryError::at("open"))
    }

    /// Opens something for reading, without a change of its access time where allowed.
    pub(super) fn open(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        flags: OFlags,
    ) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::RDONLY;
        if self.noatime.load(Ordering::Relaxed) {
            match open_below(directory, name, flags | OFlags::NOATIME) {
                // Only the file's owner, or root with CAP_FOWNER, may use `O_NOATIME`.
                Err(Errno::PERM) => self.noatime.store(false, Ordering::Relaxed),
                result => return result,
            }
        }
        open_below(directory, name, flags)
    }

    pub(super) fn error(&self, path: &RootfsPath, err: EntryError) -> Error {
        let directory = self.directory.into();
        let path = path.clone();
        match err {
            EntryError::Failed(doing, source) => Error::Entry { directory, path, doing, source },
            EntryError::Changed => Error::Changed { directory, path },
            EntryError::Unsupported(attribute) => Error::Unsupported { directory, path, attribute },
        }
    }

    pub(super) fn fail<E>(&self, error: Error) -> WalkEnd<E> {
        // Only the first failure is kept.
        let _ = self.failure.set(error);
        WalkEnd::Failed
    }

    pub(super) fn is_over(&self) -> bool {
        self.failure.get().is_some()
            || self.ended.load(Ordering::Relaxed)
            || self.stop.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Walk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Walk({})", self.directory.display())
    }
}

/// Opens something in the layer. The kernel refuses a path that leaves the layer or its
/// filesystem.
pub(super) fn open_below(
    directory: BorrowedFd<'_>,
    name: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    // EAGAIN: a rename elsewhere raced with the look-up. That means nothing for this path.
    let mut attempts = 0;
    loop {
        match openat2(directory, name, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
            opened => return opened,
        }
    }
}

pub(super) fn relative(path: &RootfsPath) -> &[u8] {
    match path.relative() {
        b"" => b".",
        relative => relative,
    }
}
