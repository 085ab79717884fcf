//! Mapped files: a file of the baseline store, for look-ups, and any file, to find out
//! whether the page cache has anything of it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr;

/// The whole of a file, mapped read-only.
#[derive(Debug)]
pub struct FileMap(memmap2::Mmap);

/// Maps a file of the baseline store.
///
/// Only for files that do not change any more: a mapped file that is truncated ends the
/// process with SIGBUS. Never for a file that a container or another user can write.
pub fn map_immutable(file: &File) -> io::Result<FileMap> {
    // SAFETY: `Mmap::map` requires that the file does not change while it is mapped. The
    // store's files lie in a directory that only root can enter. They are written under
    // another name, renamed into place when they are complete, and from then on only renamed
    // or unlinked, which does not change a mapping.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(FileMap(map))
}

impl FileMap {
    /// Removes the pages from this process. The page cache keeps them, and the next access
    /// maps them again. Advice only.
    pub fn forget(&self) {
        // SAFETY: the mapping is shared and read-only, and the file does not change (see
        // `map_immutable`): a removed page comes back with the same content.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Whether the page cache has anything of the first `length` bytes of a file. The kernel
/// always returns yes to a process that neither owns the file nor may write it.
pub fn any_cached(file: BorrowedFd<'_>, length: u64) -> io::Result<bool> {
    const PIECE: usize = 64 << 20;
    const SMALLEST_PAGE: usize = 4096;
    let mut pages = Vec::new();
    let mut offset = 0;
    while offset < length {
        let piece = usize::try_from(length - offset).unwrap_or(PIECE).min(PIECE);
        let start = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        pages.clear();
        pages.resize(piece.div_ceil(SMALLEST_PAGE), 0_u8);
        // SAFETY: the kernel chooses the address of this new mapping, so it replaces none.
        // Its content is never read, so that changes of the file do not matter.
        let address = unsafe {
            let (access, kind) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(ptr::null_mut(), piece, access, kind, file.as_raw_fd(), start)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping was just made with this length, and `pages` has a byte for each
        // of its pages, which are no smaller than `SMALLEST_PAGE`.
        let asked = unsafe { libc::mincore(address, piece, pages.as_mut_ptr()) };
        let asked = if asked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        // SAFETY: this mapping was made with this length, and nothing refers to it.
        unsafe { libc::munmap(address, piece) };
        asked?;
        if pages.iter().any(|page| page & 1 != 0) {
            return Ok(true);
        }
        offset += piece as u64;
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn what_is_forgotten_comes_back_as_it_was() {
        let mut file = tempfile::tempfile().unwrap();
        let content = b"some text ".repeat(10_000);
        file.write_all(&content).unwrap();
        let map = map_immutable(&file).unwrap();
        for _ in 0..2 {
            assert!(*map == content[..]);
            map.forget();
        }
    }
}
