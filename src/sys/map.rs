//! Files as memory: a baseline's, to look things up in; any file's, to ask what
//! the page cache holds of it.

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
/// Only for files that nobody changes any more: one that is truncated while it
/// is mapped ends the process with SIGBUS. Never a file that a container or
/// another user can write.
pub fn map_immutable(file: &File) -> io::Result<FileMap> {
    // SAFETY: `Mmap::map` wants the file not to be changed while it is mapped.
    // The store's files lie in a directory that only root can enter. They are
    // written under another name, renamed into place when they are complete,
    // and from then on only renamed or unlinked, which leaves a mapping alone.
    let map = unsafe { memmap2::Mmap::map(file) }?;
    Ok(FileMap(map))
}

impl FileMap {
    /// Takes the pages out of this process; the page cache keeps them, and they
    /// come back when they are looked at. Advice only.
    pub fn forget(&self) {
        // SAFETY: the mapping is shared and read-only, and nobody changes the
        // file: a page that is dropped comes back with the same content.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Whether the page cache holds anything of the first `length` bytes of a file.
/// The kernel says yes to whoever neither owns the file nor may write it.
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
        // SAFETY: a new mapping at an address of the kernel's choice. Nobody ever
        // looks at its content, so that it does not matter who changes the file.
        let address = unsafe {
            let (access, kind) = (libc::PROT_READ, libc::MAP_SHARED);
            libc::mmap(ptr::null_mut(), piece, access, kind, file.as_raw_fd(), start)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping was just made, with this length, and `pages` has a
        // byte for each of its pages, which are no smaller than assumed.
        let asked = unsafe { libc::mincore(address, piece, pages.as_mut_ptr()) };
        let asked = if asked == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
        // SAFETY: the mapping was just made, and nothing refers to it.
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
