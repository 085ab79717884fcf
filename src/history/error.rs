//! Why the history cannot be used, with texts that name the way out for an administrator.
//!
//! Also decides which of these reasons may pass by themselves: a full disk may, damage does
//! not.

use std::io;
use std::path::{Path, PathBuf};

/// Why the history cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the history {} has format {found}, and this driftd knows formats up to {supported} \
         (install the newer driftd again, or move the history aside: {})",
        path.display(), move_aside(path)
    )]
    NewerFormat { path: PathBuf, found: i64, supported: i64 },
    #[error(
        "the history {} has format {found}; without a daemon only format {supported} can be read \
         (start driftd with a copy of its directory as --state-dir, and with a `history.retention` \
         that is longer than its records are old: older ones are dropped)",
        path.display()
    )]
    OlderFormat { path: PathBuf, found: i64, supported: i64 },
    #[error(
        "another driftd uses the state directory {} (stop it first: systemctl stop driftd, \
         or name another directory with --state-dir)",
        path.display()
    )]
    Locked { path: PathBuf },
    #[error(
        "the history {} is damaged: {detail} (driftd never deletes it; move it aside and start \
         again: {})",
        path.display(), move_aside(path)
    )]
    Corrupt { path: PathBuf, detail: String },
    #[error(
        "{} is a database of some other program (move it aside, or name another directory with \
         --state-dir)",
        path.display()
    )]
    Foreign { path: PathBuf },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot {what} the history {}", path.display())]
    Sql { what: &'static str, path: PathBuf, source: rusqlite::Error },
}

/// The command that keeps the history as evidence and lets driftd begin a new one.
fn move_aside(path: &Path) -> String {
    let aside = path.with_extension("aside");
    format!("mkdir {0} && mv {1} {1}-* {0}/", aside.display(), path.display())
}

impl Error {
    /// Whether the disk is the reason: it is full, or cannot be written. That may pass by
    /// itself, and the data on it is sound.
    pub(super) fn is_of_the_disk(&self) -> bool {
        use rusqlite::ErrorCode;
        match self {
            Error::Io { source, .. } => is_of_the_disk(source),
            Error::Sql { source, .. } => matches!(
                source.sqlite_error_code(),
                Some(
                    ErrorCode::DiskFull
                        | ErrorCode::SystemIoFailure
                        | ErrorCode::CannotOpen
                        | ErrorCode::ReadOnly
                )
            ),
            _ => false,
        }
    }

    /// The error's text, followed by that of its cause.
    pub(super) fn with_source(&self) -> String {
        let source = std::error::Error::source(self);
        source.map_or_else(|| self.to_string(), |source| format!("{self}: {source}"))
    }

    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, path: path.into(), source }
    }

    /// Keeps damage, which an administrator must deal with, apart from errors that may
    /// pass by themselves.
    pub(super) fn sql(what: &'static str, path: &Path) -> impl Fn(rusqlite::Error) -> Error {
        move |source| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                Error::Corrupt { path: path.into(), detail: source.to_string() }
            }
            _ => Error::Sql { what, path: path.into(), source },
        }
    }
}

/// Whether a disk is full or cannot be written.
pub fn is_of_the_disk(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
    ) || err.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}
