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

impl Deref for FileMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
