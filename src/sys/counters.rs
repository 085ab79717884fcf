//! Counters in memory that several processes share: a memfd of one page. `pulse` gives the
//! counters their meaning.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};

const SIZE: usize = 4096;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A page of counters. Every process that maps it can change them: they are for processes of
/// one program, which trust each other.
#[derive(Debug)]
pub struct Counters {
    memory: OwnedFd,
    map: memmap2::MmapRaw,
}

impl Counters {
    /// Makes a page of zeros.
    pub fn new() -> io::Result<Counters> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("driftd-counters", flags)?;
        rustix::fs::ftruncate(&memory, SIZE as u64)?;
        // If the page could shrink under a mapping, a later access would end the process
        // (SIGBUS).
        rustix::fs::fcntl_add_seals(&memory, SEALS)?;
        Counters::map(memory)
    }

    /// Maps the page of another process.
    pub fn map(memory: OwnedFd) -> io::Result<Counters> {
        let sealed = rustix::fs::fcntl_get_seals(&memory)?;
        if !sealed.contains(SealFlags::SHRINK) || rustix::fs::fstat(&memory)?.st_size < SIZE as i64
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let file = File::from(memory);
        let map = memmap2::MmapOptions::new().len(SIZE).map_raw(&file)?;
        Ok(Counters { memory: file.into(), map })
    }

    /// The counter with this number.
    pub fn at(&self, number: usize) -> &AtomicU64 {
        assert!(number < SIZE / size_of::<AtomicU64>(), "there are not so many counters");
        let counters = self.map.as_mut_ptr().cast::<AtomicU64>();
        // SAFETY: the page is mapped as long as `self` lives, cannot shrink, and is aligned.
        // The counter lies inside it (see the assertion), any bytes are a valid counter, and
        // every access to it, here and in other processes, is atomic.
        unsafe { &*counters.add(number) }
    }
}

impl AsFd for Counters {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn two_mappings_share_one_counter() {
        let here = Counters::new().unwrap();
        let there = Counters::map(here.as_fd().try_clone_to_owned().unwrap()).unwrap();
        here.at(3).store(7, Ordering::Relaxed);
        assert_eq!(there.at(3).fetch_add(1, Ordering::Relaxed), 7);
        assert_eq!(
            (here.at(3).load(Ordering::Relaxed), here.at(0).load(Ordering::Relaxed)),
            (8, 0)
        );
    }

    #[test]
    fn memory_that_can_shrink_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE as u64).unwrap();
        Counters::map(file.into()).unwrap_err();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("open", flags).unwrap();
        rustix::fs::ftruncate(&memory, SIZE as u64).unwrap();
        Counters::map(memory).unwrap_err();
    }
}
