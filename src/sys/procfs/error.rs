//! The procfs crate's errors as [`io::Error`].
//!
//! A process that has ended is [`io::ErrorKind::NotFound`], or ESRCH from the kernel.

use std::io;

pub(super) fn into_io(err: procfs::ProcError) -> io::Error {
    match err {
        procfs::ProcError::Io(err, _) => err,
        procfs::ProcError::NotFound(_) => io::ErrorKind::NotFound.into(),
        procfs::ProcError::PermissionDenied(_) => io::ErrorKind::PermissionDenied.into(),
        other => io::Error::other(other.to_string()),
    }
}
