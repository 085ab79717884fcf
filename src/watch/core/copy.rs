//! Copies of small files in memory, so that the files themselves can be closed at once.
//!
//! All copies together use a bounded amount of memory. A file that does not fit, or is not
//! small, stays open and is read where it is hashed.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::sys::file::{self, Stat};

/// The size of a small file, at most.
pub(crate) const SMALL: u64 = 4 << 20;

/// The size of all copies together, at most.
pub(crate) const MOST: usize = 32 << 20;

/// How much is read at a time. Between two chunks, the caller can serve new files.
pub(crate) const CHUNK: usize = 256 << 10;

/// The content of a small file.
#[derive(Debug)]
pub(crate) struct Copy {
    pub(crate) bytes: Vec<u8>,
    pub(crate) capability: Option<Box<[u8]>>,
    /// The memory that is left for all copies.
    pub(crate) room: Arc<AtomicUsize>,
    pub(crate) size: usize,
}

impl Copy {
    /// Reserves room for a file's content, if the file is small and there is room.
    pub(crate) fn begin(room: &Arc<AtomicUsize>, stat: &Stat) -> Option<Copy> {
        let size = usize::try_from(stat.size).ok()?;
        if !stat.is_regular() || stat.size > SMALL {
            return None;
        }
        let less = |room: usize| room.checked_sub(size);
        room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        Some(Copy { bytes: Vec::new(), capability: None, room: room.clone(), size })
    }

    /// Reads as many bytes as the file had, and calls `between` after each chunk. False if
    /// the file could not be read or has become shorter.
    pub(crate) fn read(&mut self, fd: &OwnedFd, mut between: impl FnMut()) -> bool {
        self.capability = file::xattr(fd, "security.capability").unwrap_or(None);
        self.bytes.reserve_exact(self.size);
        while self.bytes.len() < self.size {
            let most = CHUNK.min(self.size - self.bytes.len());
            match file::read_on(fd.as_fd(), &mut self.bytes, most) {
                Ok(0) | Err(_) => return false,
                Ok(_) => between(),
            }
        }
        true
    }

    /// Copies a small file that is open for reading.
    pub(crate) fn of(room: &Arc<AtomicUsize>, fd: &OwnedFd, stat: &Stat) -> Option<Copy> {
        let mut copy = Copy::begin(room, stat)?;
        copy.read(fd, || ()).then_some(copy)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn capability(&self) -> Option<Box<[u8]>> {
        self.capability.clone()
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        self.room.fetch_add(self.size, Ordering::Relaxed);
    }
}

/// Room for all copies of the threads that share it.
pub(crate) fn room() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(MOST))
}
