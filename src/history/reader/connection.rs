//! The read-only connections of a [`Reader`]: how they are opened, kept and reused.
//!
//! Chooses between the file, a file without a daemon, and the database in memory. Knows no
//! table; the queries are in the other files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::history::error::Error;
use crate::history::files;
use crate::history::memory;
use crate::history::schema;

/// Idle connections that are kept for the next query.
const IDLE: usize = 8;

/// Reads the history. Clones share a few connections. Calls block.
#[derive(Clone, Debug)]
pub struct Reader {
    pub(super) path: PathBuf,
    /// Counts the files that were at the path. The writer raises it.
    generation: Arc<AtomicU64>,
    memory: memory::Shared,
    /// Idle connections, each with the generation that it was opened for.
    idle: Arc<Mutex<Vec<(u64, Connection)>>>,
    opening: Opening,
}

/// How a connection is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// Beside a writer.
    Shared,
    /// No process writes, and the reader writes no file at all. The write-ahead log holds
    /// records that are not in the database yet; they are read there.
    WithLog,
    /// No process writes, and the write-ahead log is empty.
    Immutable,
}

impl Reader {
    pub(crate) fn new(path: PathBuf, generation: Arc<AtomicU64>, memory: memory::Shared) -> Reader {
        Reader { path, generation, memory, idle: Arc::default(), opening: Opening::Shared }
    }

    /// Reads the history at `path`, or in the state directory at `path`, and changes
    /// nothing there. A running driftd may be using it.
    pub fn of_file(path: &Path) -> Result<Reader, Error> {
        let path = if path.is_dir() { path.join(files::FILE) } else { path.to_owned() };
        std::fs::metadata(&path).map_err(Error::io("read the history", &path))?;
        let mut log = path.clone().into_os_string();
        log.push("-wal");
        let has_log = std::fs::metadata(log).is_ok_and(|log| log.len() > 0);
        let mut reader = Reader::new(path, Arc::default(), memory::Shared::default());
        reader.opening = match has_log {
            _ if files::is_in_use(&reader.path) => Opening::Shared,
            true => Opening::WithLog,
            false => Opening::Immutable,
        };
        let found = reader.query(|connection| schema::check(connection, &reader.path))?;
        if found < schema::FORMAT {
            return Err(Error::OlderFormat { path: reader.path, found, supported: schema::FORMAT });
        }
        Ok(reader)
    }

    /// Runs `query` on a connection of the current generation.
    pub(super) fn query<T>(
        &self,
        query: impl FnOnce(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let lock = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.generation.load(Ordering::Acquire);
        let idle = {
            let mut idle = lock();
            idle.retain(|(generation, _)| *generation == current);
            idle.pop()
        };
        let mut connection = match idle {
            Some((_, connection)) => connection,
            None => self.connect()?,
        };
        let result = query(&mut connection);
        let mut idle = lock();
        if idle.len() < IDLE {
            idle.push((current, connection));
        }
        result
    }

    fn connect(&self) -> Result<Connection, Error> {
        let failed = Error::sql("open", &self.path);
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = match (self.memory.get(), self.opening) {
            (Some(overlay), _) => overlay.read(),
            (None, Opening::Shared) => Connection::open_with_flags(&self.path, flags),
            // Takes no locks in the file, and keeps the log's index in memory.
            (None, Opening::WithLog) => {
                Connection::open_with_flags_and_vfs(&self.path, flags, c"unix-none").and_then(
                    |connection| {
                        connection.pragma_update_and_check(
                            None,
                            "locking_mode",
                            "EXCLUSIVE",
                            |_| Ok(()),
                        )?;
                        Ok(connection)
                    },
                )
            }
            (None, Opening::Immutable) => Connection::open_with_flags(
                immutable(&self.path),
                flags | OpenFlags::SQLITE_OPEN_URI,
            ),
        }
        .map_err(&failed)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(&failed)?;
        // In KiB, and small: there are many connections, and the kernel caches too.
        connection.pragma_update(None, "cache_size", -256).map_err(&failed)?;
        // Without this, the last connection to a file that was removed would, when it is
        // closed, remove the side files of the file that has its name now.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .map_err(&failed)?;
        Ok(connection)
    }
}

/// The URI by which SQLite opens a file that does not change.
fn immutable(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' => uri.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            byte => uri.push_str(&format!("%{byte:02x}")),
        }
    }
    uri + "?immutable=1"
}
