//! The memory into which the kernel writes an event's records: mapped, read and unmapped
//! here. `decode` reads what is copied out of it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// `data_head` and `data_tail` in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

pub(super) struct Buffer {
    /// `struct perf_event_mmap_page`, one page long, then the records.
    memory: ptr::NonNull<u8>,
    page: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and every access to the two words that
// the kernel uses as well is atomic.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Maps a buffer of the first of these sizes that the kernel allows.
    pub(super) fn map(
        event: BorrowedFd<'_>,
        sizes: impl IntoIterator<Item = usize>,
    ) -> io::Result<Buffer> {
        let page = rustix::param::page_size();
        let mut outcome = Err(io::Error::from(io::ErrorKind::InvalidInput));
        for bytes in sizes {
            outcome = map(event, page + bytes).map(|memory| Buffer { memory, page, bytes });
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: `offset` is `DATA_HEAD` or `DATA_TAIL`, which lie in the first page of the
        // mapping, and the mapping lives as long as `self`. Both words are eight bytes wide
        // and aligned to eight bytes, and the kernel accesses them as whole words.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(offset).cast()) }
    }

    /// Copies the records to the end of `into` and frees their place in the buffer.
    pub(super) fn take(&self, into: &mut Vec<u8>) {
        let head = self.word(DATA_HEAD).load(Ordering::Acquire);
        let tail = self.word(DATA_TAIL).load(Ordering::Relaxed);
        let size = self.bytes as u64;
        // Both only grow, and the kernel does not overwrite what was not read.
        let length = usize::try_from(head.wrapping_sub(tail).min(size)).expect("a ring's size");
        let start = usize::try_from(tail % size).expect("a ring's size");
        let first = length.min(self.bytes - start);
        for (start, length) in [(start, first), (0, length - first)] {
            // SAFETY: both pieces lie within the records of the mapping, and the kernel does
            // not write between tail and head.
            let piece = unsafe {
                let records = self.memory.as_ptr().add(self.page);
                std::slice::from_raw_parts(records.add(start), length)
            };
            into.extend_from_slice(piece);
        }
        self.word(DATA_TAIL).store(head, Ordering::Release);
    }
}

fn map(event: BorrowedFd<'_>, length: usize) -> io::Result<ptr::NonNull<u8>> {
    // SAFETY: the kernel chooses the address of this new mapping, so it replaces none.
    let memory = unsafe {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        libc::mmap(ptr::null_mut(), length, access, kind, event.as_raw_fd(), 0)
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    ptr::NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: this mapping was made with this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.page + self.bytes) };
    }
}
