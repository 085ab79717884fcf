//! The files in the state directory: the database, the lock and the heartbeat.
//!
//! Opens and identifies them. What the database holds is the business of `schema`, the
//! reader and the writer.

use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags};

use super::{error::Error, schema};

/// The history's file in the state directory.
pub const FILE: &str = "history.db";

/// How often the heartbeat is set while driftd runs.
const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);

/// A file whose modification time is the time until which every observation has been
/// processed and stored. Setting it needs no space on the disk.
#[derive(Debug)]
pub(super) struct Heartbeat {
    file: Option<File>,
    pub(super) last: Option<Timestamp>,
    next: Instant,
}

impl Heartbeat {
    pub(super) fn open(state_dir: &Path) -> Heartbeat {
        let path = state_dir.join("beat");
        let last = std::fs::metadata(&path).and_then(|stat| stat.modified());
        let last = last.ok().and_then(|time| Timestamp::try_from(time).ok());
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        Heartbeat { file: file.ok(), last, next: Instant::now() }
    }

    /// Makes the heartbeat due now.
    pub(super) fn hurry(&mut self) {
        self.next = Instant::now();
    }

    pub(super) fn is_due(&self) -> bool {
        self.next <= Instant::now()
    }

    pub(super) fn set(&mut self, at: SystemTime) {
        self.next = Instant::now() + HEARTBEAT_EVERY;
        if let Some(file) = &self.file
            && let Err(err) = file.set_modified(at)
        {
            tracing::warn!("cannot note that driftd runs: {err}");
        }
    }
}

/// Device and inode of a database file.
pub(super) type Identity = (u64, u64);

/// Stands for the identity of a file where none is open.
pub(super) const NOT_OPEN: Identity = (0, 0);

/// Opens or creates the database, and returns it with the identity of its file.
pub(super) fn open(path: &Path) -> Result<(Connection, Identity), Error> {
    // SQLite gives its side files the mode of the database.
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("open the history", path))?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(Error::io("open the history", path))?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_URI;
    let mut connection =
        Connection::open_with_flags(path, flags).map_err(Error::sql("open", path))?;
    schema::prepare(&mut connection, path)?;
    let stat = file.metadata().map_err(Error::io("examine the history", path))?;
    Ok((connection, (stat.dev(), stat.ino())))
}

/// The identity of the file at `path`.
pub(super) fn identity_of(path: &Path) -> io::Result<Identity> {
    let stat = std::fs::metadata(path)?;
    Ok((stat.dev(), stat.ino()))
}

/// Held for its effect only: it keeps a second driftd away from the state directory.
#[derive(Debug)]
pub(super) struct StateLock(pub(super) Option<File>);

impl Drop for StateLock {
    fn drop(&mut self) {
        // Closing the file is not enough: a child process that is being started has it too,
        // until it executes its program.
        if let Some(file) = &self.0
            && let Err(err) = file.unlock()
        {
            tracing::warn!("cannot unlock the state directory: {err}");
        }
    }
}

pub(super) fn lock(state_dir: &Path) -> Result<StateLock, Error> {
    let path = state_dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&path)
        .map_err(Error::io("open the lock", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(StateLock(Some(file))),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: state_dir.into() }),
        Err(TryLockError::Error(source)) => Err(Error::io("lock", &path)(source)),
    }
}

/// Whether a driftd uses the state directory that holds this history.
pub(super) fn is_in_use(history: &Path) -> bool {
    let lock = File::open(history.with_file_name("lock"));
    lock.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// The format of the history in `state_dir`, read without opening it for writing. `None`
/// if there is no history yet.
pub fn format_of(state_dir: &Path) -> Result<Option<i64>, Error> {
    let path = state_dir.join(FILE);
    if !path.try_exists().map_err(Error::io("check for the history", &path))? {
        return Ok(None);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(&path, flags).map_err(Error::sql("open", &path))?;
    schema::check(&connection, &path).map(Some)
}
