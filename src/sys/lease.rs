//! Whether a file is open for writing, by anybody and in any way: a descriptor, or a
//! mapping that has outlived it.
//!
//! The kernel counts who may write to an inode and shows the count to nobody. It
//! grants a read lease only while that count is zero, so the answer to the request is
//! the answer to the question. The lease is given back at once.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Which signal says that somebody waits for a lease (`fcntl.h`; the same everywhere).
const F_SETSIG: i32 = 10;

/// Whether the inode of a file has a writer. The file has to be open for reading, on
/// the filesystem that holds its content: an overlay's own inode knows nothing of the
/// mappings that were made through it.
///
/// An error where the filesystem has no leases, or where the file belongs to another
/// user and `CAP_LEASE` is missing. Whoever opens the file for writing between the two
/// calls waits until the second.
pub fn has_writer(file: BorrowedFd<'_>) -> io::Result<bool> {
    // Whoever opens it for writing meanwhile has the kernel send a signal to this
    // process. It is SIGIO unless it is chosen, which would end the process; this one
    // is ignored.
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
    // SAFETY: these commands take a number and touch no memory of ours.
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
        assert!(!has_writer(reader.as_fd()).unwrap(), "who reads is no writer");
        drop(another_reader);
        let writer = File::options().append(true).open(&name).unwrap();
        assert!(has_writer(reader.as_fd()).unwrap());
        drop(writer);
        assert!(!has_writer(reader.as_fd()).unwrap());
        // No lease is left that would keep a writer waiting.
        drop(File::options().append(true).open(&name).unwrap());
    }

    #[test]
    fn whoever_opens_the_file_meanwhile_does_no_harm() {
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
