//! What happened, kept (SQLite).
//!
//! One thread owns the only connection that writes. Records come in through a
//! bounded channel, are committed in groups, and only then are they told to
//! anybody: what a follower or a page has shown survives a `kill -9` and a loss
//! of power.
//!
//! ```text
//! pipeline ─ Record ─> writer ─ commit ─> history.db <─ Reader (read-only connections)
//!                         └──── newest sequence number ──> followers
//! ```
//!
//! The file's format is described in docs/history-format.md, so that it can be
//! read with `sqlite3` and without driftd.

use std::fs::{DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags};

use crate::model::{Command, ContainerId, Finding, Member, Probe, RootfsPath, Session};
use crate::respond::Response;

mod json;
mod memory;
mod reader;
mod schema;
mod timeline;
mod writer;

pub use reader::{
    AlsoIn, BadPageToken, CommandToken, CommandsPage, Content, Filter, FindingLookup, FindingsPage,
    Followed, Lookup, MemberToken, MembersPage, PageToken, ProbeLookup, Reader, SessionFilter,
    SessionLookup, SessionsPage,
};
pub use timeline::{Happened, TimelineEntry, TimelinePage, TimelineToken};
pub use writer::{Keep, Writer};

/// The history's file in the state directory.
pub const FILE: &str = "history.db";

/// The newest format this driftd writes and reads.
pub const FORMAT: i64 = schema::MIGRATIONS.len() as i64;

/// One line of the history, in the order in which the pipeline decided it.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A finding's newest revision.
    Finding(Box<Finding>),
    /// The same, with what is new of the files that it stands for: kept together or
    /// not at all.
    Aggregate {
        finding: Box<Finding>,
        changes: Vec<MemberChange>,
    },
    /// A session's newest revision, with those of its commands that are new or have
    /// ended.
    Session {
        session: Box<Session>,
        commands: Vec<Command>,
    },
    /// A probe's newest count.
    Probe(Box<Probe>),
    Response(Box<Response>),
    /// Something was not seen: a named loss.
    Gap {
        name: String,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
        /// When what made up for it was complete. `None` when the loss is told, and
        /// once more with an end when that is known.
        until: Option<Timestamp>,
    },
}

/// What happened to a file that an aggregated finding stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberChange {
    /// It is there, for the first time or with another content.
    Seen(Member),
    Gone {
        path: RootfsPath,
        at: Timestamp,
    },
}

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

/// The command that keeps a history as evidence and lets driftd begin a new one.
fn move_aside(path: &Path) -> String {
    let aside = path.with_extension("aside");
    format!("mkdir {0} && mv {1} {1}-* {0}/", aside.display(), path.display())
}

impl Error {
    /// Whether the disk is why: it has no room, or cannot be written. That may pass by
    /// itself, and nothing is wrong with what it holds.
    fn is_of_the_disk(&self) -> bool {
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

    /// Its text with that of its cause.
    fn with_source(&self) -> String {
        let source = std::error::Error::source(self);
        source.map_or_else(|| self.to_string(), |source| format!("{self}: {source}"))
    }

    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { what, path: path.into(), source }
    }

    /// Tells damage, which needs a person, from what may pass by itself.
    fn sql(what: &'static str, path: &Path) -> impl Fn(rusqlite::Error) -> Error {
        move |source| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
                Error::Corrupt { path: path.into(), detail: source.to_string() }
            }
            _ => Error::Sql { what, path: path.into(), source },
        }
    }
}

/// The open history, before its thread is started.
#[derive(Debug)]
pub struct History {
    connection: Connection,
    /// Device and inode of the file.
    identity: (u64, u64),
    /// Moves when another file takes its place.
    generation: Arc<AtomicU64>,
    path: PathBuf,
    lock: StateLock,
    beat: Beat,
    memory: memory::Shared,
    /// The database in memory, and why the one on disk is not written.
    kept_in_memory: Option<(Connection, String)>,
}

impl History {
    /// Opens or creates `<state_dir>/history.db` and brings it to [`FORMAT`].
    /// Changes nothing in a file that it refuses. Where the disk has no room, the history
    /// is kept in memory until it has.
    pub fn open(state_dir: &Path) -> Result<History, Error> {
        let path = state_dir.join(FILE);
        let made = DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(Error::io("create the state directory", state_dir));
        let lock = match made.and_then(|()| lock(state_dir)) {
            Err(err) if err.is_of_the_disk() => StateLock(None),
            lock => lock?,
        };
        let (generation, memory) = Default::default();
        let beat = Beat::open(state_dir);
        let history = |connection, identity, kept_in_memory| {
            let path = path.clone();
            History { connection, identity, generation, path, lock, beat, memory, kept_in_memory }
        };
        match open(&path) {
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

    /// Until when all that was seen had been told and kept, when driftd ran last.
    pub fn last_beat(&self) -> Option<Timestamp> {
        self.beat.last
    }

    /// Reads what is kept, before and while the thread runs.
    pub fn reader(&self) -> Reader {
        Reader::new(self.path.clone(), self.generation.clone(), self.memory.clone())
    }
}

/// A file whose time of change says until when all that was seen is told and kept. To
/// set it takes no room on the disk.
#[derive(Debug)]
struct Beat {
    file: Option<File>,
    last: Option<Timestamp>,
}

impl Beat {
    fn open(state_dir: &Path) -> Beat {
        let path = state_dir.join("beat");
        let last = std::fs::metadata(&path).and_then(|stat| stat.modified());
        let last = last.ok().and_then(|time| Timestamp::try_from(time).ok());
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&path);
        Beat { file: file.ok(), last }
    }

    fn set(&self, at: std::time::SystemTime) {
        if let Some(file) = &self.file
            && let Err(err) = file.set_modified(at)
        {
            tracing::warn!("cannot note that driftd runs: {err}");
        }
    }
}

/// Instead of a file's identity: none is open.
const NOT_OPEN: (u64, u64) = (0, 0);

/// A history in memory over a file that cannot be opened for writing, and the newest
/// number of its records.
fn memory_over(path: &Path) -> Result<(memory::Overlay, u64), Error> {
    let mut wal = path.as_os_str().to_owned();
    wal.push("-wal");
    // What a daemon that was killed has left in there, SQLite needs room to read.
    let is_closed = std::fs::metadata(&wal).map_or(true, |wal| wal.len() == 0);
    if is_closed && identity_of(path).is_ok() {
        let overlay = memory::Overlay::new(path, memory::Disk::Still);
        let known = overlay.disk_format_and_newest(path)?;
        if let Some((FORMAT, newest)) = known {
            return Ok((overlay, newest));
        }
    }
    // Above every number that can have been given: no daemon gives a thousand a second
    // for years.
    let newest = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0);
    Ok((memory::Overlay::new(path, memory::Disk::Unreadable), newest))
}

/// Opens or creates the file, and says which one it is.
fn open(path: &Path) -> Result<(Connection, (u64, u64)), Error> {
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
    let stat = file.metadata().map_err(Error::io("look at the history", path))?;
    Ok((connection, (stat.dev(), stat.ino())))
}

/// Whether there is no room on a disk, or it cannot be written.
pub fn is_of_the_disk(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
    ) || err.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// Which file is at this path.
fn identity_of(path: &Path) -> io::Result<(u64, u64)> {
    let stat = std::fs::metadata(path)?;
    Ok((stat.dev(), stat.ino()))
}

/// Held, not used: it keeps a second driftd away from the state directory.
#[derive(Debug)]
struct StateLock(Option<File>);

impl Drop for StateLock {
    fn drop(&mut self) {
        // Closing would not do: a child that is just being started has the file too,
        // until it executes its program.
        if let Some(file) = &self.0
            && let Err(err) = file.unlock()
        {
            tracing::warn!("cannot unlock the state directory: {err}");
        }
    }
}

fn lock(state_dir: &Path) -> Result<StateLock, Error> {
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

/// Whether a driftd has the state directory in which this history lies.
fn is_in_use(history: &Path) -> bool {
    let lock = File::open(history.with_file_name("lock"));
    lock.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}

/// The format of the history in `state_dir` without opening it for writing;
/// `None` when there is none yet.
pub fn format_of(state_dir: &Path) -> Result<Option<i64>, Error> {
    let path = state_dir.join(FILE);
    if !path.try_exists().map_err(Error::io("look for the history", &path))? {
        return Ok(None);
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection =
        Connection::open_with_flags(&path, flags).map_err(Error::sql("open", &path))?;
    schema::check(&connection, &path).map(Some)
}
