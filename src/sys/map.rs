//! A baseline file as memory.

use std::fs::File;
use std::io;
use std::ops::Deref;

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
