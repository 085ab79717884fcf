//! Whether any process has a file open for writing: by a descriptor, or by a mapping that
//! has outlived it.
//!
//! The kernel counts the writers of an inode and does not show the count. But it grants a
//! read lease only while the count is zero. So this file requests a lease, and gives it back
//! at once.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Sets the signal that reports a process waiting for a lease (`fcntl.h`; the same on every
/// architecture).
const F_SETSIG: i32 = 10;

/// Whether the inode of a file has a writer. The file has to be open for reading, on the
/// filesystem that holds its content: an overlay's own inode does not count the mappings
/// that were made through it.
///
/// An error if the filesystem has no leases, or if the file belongs to another user and
/// `CAP_LEASE` is missing. A process that opens the file for writing between the two calls
/// waits until the second.
pub fn has_writer(file: BorrowedFd<'_>) -> io::Result<bool> {
    // If a process opens the file for writing meanwhile, the kernel sends a signal to this
    // process. The default is SIGIO, which would end the process; SIGURG is ignored.
    fcntl(file, F_SETSIG, libc::SIGURG)?;
    match fcntl(file, libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {
            fcntl(file, libc::F_SETLEASE, libc::F_UNLCK)?;
            Ok(false)
        }
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(err) => Err(err),
    }
}

fn fcntl(file: BorrowedFd<'_>, command: i32, argument: i32) -> io::Result<()> {
    // SAFETY: these commands take a number and touch no memory of this process.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if outcome == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_writer_is_seen_while_it_has_the_file_open() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("f");
        std::fs::write(&name, "x").unwrap();
        let reader = File::open(&name).unwrap();
        assert!(!has_writer(reader.as_fd()).unwrap());
        let another_reader = File::open(&name).unwrap();
        assert!(!has_writer(reader.as_fd()).unwrap(), "a reader is not a writer");
        drop(another_reader);
        let writer = File::options().append(true).open(&name).unwrap();
        assert!(has_writer(reader.as_fd()).unwrap());
        drop(writer);
        assert!(!has_writer(reader.as_fd()).unwrap());
        // No lease is left that would keep a writer waiting.
        drop(File::options().append(true).open(&name).unwrap());
    }

    #[test]
    fn a_process_that_opens_the_file_meanwhile_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("f");
        std::fs::write(&name, "x").unwrap();
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    drop(File::options().append(true).open(&name).unwrap());
                }
            });
            let reader = File::open(&name).unwrap();
            for _ in 0..20_000 {
                has_writer(reader.as_fd()).unwrap();
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
}
