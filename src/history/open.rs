//! Opening the history, on disk or, while the disk cannot be written, in memory.
//!
//! [`History`] is what has been opened. The writer takes it over and starts its thread.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use rusqlite::Connection;

use super::error::Error;
use super::files::{self, FILE, Heartbeat, Identity, NOT_OPEN, StateLock, identity_of};
use super::memory::{self, Disk, Overlay};
use super::reader::Reader;
use super::schema::FORMAT;

/// The open history, before its thread is started.
#[derive(Debug)]
pub struct History {
    pub(super) connection: Connection,
    pub(super) identity: Identity,
    /// Counts the files that have taken the place of the first one.
    pub(super) generation: Arc<AtomicU64>,
    pub(super) path: PathBuf,
    pub(super) lock: StateLock,
    pub(super) heartbeat: Heartbeat,
    pub(super) memory: memory::Shared,
    /// The database in memory, and why the one on disk is not written.
    pub(super) kept_in_memory: Option<(Connection, String)>,
}

impl History {
    /// Opens or creates `<state_dir>/history.db` and brings it to [`FORMAT`].
    /// Changes nothing in a file that it refuses. While the disk is full, the history is
    /// kept in memory.
    pub fn open(state_dir: &Path) -> Result<History, Error> {
        let path = state_dir.join(FILE);
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(Error::io("create the state directory", state_dir));
        let lock = match made.and_then(|()| files::lock(state_dir)) {
            Err(err) if err.is_of_the_disk() => StateLock(None),
            lock => lock?,
        };
        let (generation, memory) = Default::default();
        let heartbeat = Heartbeat::open(state_dir);
        let history = |connection, identity, kept_in_memory| {
            let path = path.clone();
            History {
                connection,
                identity,
                generation,
                path,
                lock,
                heartbeat,
                memory,
                kept_in_memory,
            }
        };
        match files::open(&path) {
            Ok((connection, identity)) => Ok(history(connection, identity, None)),
            Err(err) if err.is_of_the_disk() => {
                let (overlay, newest) = memory_over(&path)?;
                let connection = overlay.begin(newest, &path)?;
                let none = Connection::open_in_memory().map_err(Error::sql("open", &path))?;
                let history = history(none, NOT_OPEN, Some((connection, err.with_source())));
                history.memory.set(Some(overlay));
                Ok(history)
            }
            Err(err) => Err(err),
        }
    }

    /// The time until which the last run of driftd had processed and stored every
    /// observation.
    pub fn last_beat(&self) -> Option<Timestamp> {
        self.heartbeat.last
    }

    /// Reads what is stored, before the thread runs and while it does.
    pub fn reader(&self) -> Reader {
        Reader::new(self.path.clone(), self.generation.clone(), self.memory.clone())
    }
}

/// A history in memory over a file that cannot be opened for writing, and the newest
/// sequence number of its records.
fn memory_over(path: &Path) -> Result<(Overlay, u64), Error> {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    // A daemon that was killed leaves a log here, and SQLite needs disk space to read it.
    let is_closed = std::fs::metadata(&wal).map_or(true, |wal| wal.len() == 0);
    if is_closed && identity_of(path).is_ok() {
        let overlay = Overlay::new(path, Disk::Still);
        let known = overlay.disk_format_and_newest(path)?;
        if let Some((FORMAT, newest)) = known {
            return Ok((overlay, newest));
        }
    }
    // Above every sequence number that can have been given: no daemon writes a thousand
    // records a second for years.
    let newest = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
    Ok((Overlay::new(path, Disk::Unreadable), newest))
}
