//! The history while its disk cannot be written: a database in memory over the one on the
//! disk.
//!
//! Readers open the one in memory and attach the one on disk. Views with the tables' names
//! join both, so that every query stays the same. If a row is in both, the one in memory
//! is newer. When the disk can be written again, all rows go there in one transaction.

use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OpenFlags, params};

use super::error::Error;
use super::schema;
use super::sql::{newest_seq, sql_integer};

/// Most bytes that the database in memory takes.
pub(super) const MAX_BYTES: u64 = 64 << 20;

/// The database that is in memory now, shared by the writer and all readers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared(Arc<Mutex<Option<Overlay>>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Overlay>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self) -> Option<Overlay> {
        self.lock().clone()
    }

    pub(super) fn set(&self, overlay: Option<Overlay>) {
        *self.lock() = overlay;
    }
}

/// The database in memory, and the one on disk below it.
#[derive(Clone, Debug)]
pub(super) struct Overlay {
    memory: String,
    /// The URI of the history on disk. `None` if that cannot be read.
    disk: Option<String>,
}

/// How the history on disk is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disk {
    /// Another connection of ours has it open.
    Open,
    /// No connection has it open, and the disk has no space for SQLite's side files. It was
    /// closed in order, and nothing changes it.
    Still,
    Unreadable,
}

impl Overlay {
    pub(super) fn new(path: &Path, disk: Disk) -> Overlay {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let disk = match disk {
            Disk::Open => Some("mode=ro"),
            Disk::Still => Some("immutable=1"),
            Disk::Unreadable => None,
        };
        Overlay {
            // A name that begins with a slash is shared by the connections of a process.
            memory: format!("file:/driftd-history-{number}?vfs=memdb"),
            disk: disk.map(|options| format!("file:{}?vfs=unix&{options}", encoded(path))),
        }
    }

    /// The format of the history on disk and its newest sequence number. `None` if it cannot
    /// be read.
    pub(super) fn disk_format_and_newest(&self, path: &Path) -> Result<Option<(i64, u64)>, Error> {
        let Some(disk) = &self.disk else { return Ok(None) };
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
            | OpenFlags::SQLITE_OPEN_URI
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let Ok(connection) = Connection::open_with_flags(disk, flags) else { return Ok(None) };
        match schema::check(&connection, path) {
            Ok(format) => Ok(newest_seq(&connection).ok().map(|newest| (format, newest))),
            Err(err) if err.is_of_the_disk() => Ok(None),
            Err(err) => Err(err),
        }
    }

    /// Creates the database. The writer's connection keeps it alive. Sequence numbers go on
    /// after `newest`.
    pub(super) fn begin(&self, newest: u64, path: &Path) -> Result<Connection, Error> {
        let failed = Error::sql("keep in memory", path);
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE;
        let mut connection = self.open(flags).map_err(&failed)?;
        schema::prepare(&mut connection, path)?;
        // Without a file on disk that can be read, it is not known what followers have
        // received.
        let mut pruned_through = sql_integer(newest);
        if let Some(disk) = &self.disk {
            connection.execute("ATTACH ?1 AS disk", [disk]).map_err(&failed)?;
            pruned_through = connection
                .query_row("SELECT through FROM disk.pruned", [], |row| row.get(0))
                .map_err(&failed)?;
        }
        connection
            .execute("INSERT INTO sqlite_sequence VALUES ('record', ?1)", [sql_integer(newest)])
            .and_then(|_| {
                connection.execute("UPDATE main.pruned SET through = ?1", [pruned_through])
            })
            .map_err(&failed)?;
        Ok(connection)
    }

    /// A connection that reads both as one.
    pub(super) fn read(&self) -> rusqlite::Result<Connection> {
        let connection = self.open(OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        if let Some(disk) = &self.disk {
            // SQLite stores temporary views somewhere; it must not be on a disk.
            connection.pragma_update(None, "temp_store", "MEMORY")?;
            connection.execute("ATTACH ?1 AS disk", [disk])?;
            connection.execute_batch(&views())?;
        }
        Ok(connection)
    }

    fn open(&self, flags: OpenFlags) -> rusqlite::Result<Connection> {
        let flags = flags | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.memory, flags)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        Ok(connection)
    }

    /// Writes everything to the disk in one transaction. Returns the newest sequence number.
    pub(super) fn pour(&self, disk: &mut Connection) -> rusqlite::Result<u64> {
        disk.execute("ATTACH ?1 AS memory", [&self.memory])?;
        let poured = self.pour_attached(disk);
        disk.execute_batch("DETACH memory")?;
        poured
    }

    fn pour_attached(&self, disk: &mut Connection) -> rusqlite::Result<u64> {
        let transaction = disk.transaction()?;
        for what in ["finding", "session"] {
            transaction.execute_batch(&format!(
                "DELETE FROM main.record WHERE type = '{what}' AND {what} IN
                     (SELECT {what} FROM memory.record WHERE type = '{what}')"
            ))?;
        }
        for (table, key) in TABLES {
            let columns = columns(&transaction, table)?;
            let listed = columns.join(", ");
            let set: Vec<String> = columns
                .iter()
                .filter(|column| !key.contains(column.as_str()))
                .map(|column| self.assignment(table, column))
                .collect();
            transaction.execute_batch(&format!(
                "INSERT INTO main.{table} ({listed}) SELECT {listed} FROM memory.{table}
                 WHERE true ON CONFLICT ({key}) DO UPDATE SET {}",
                set.join(", ")
            ))?;
        }
        let columns = columns(&transaction, "record")?;
        let others: Vec<&str> =
            columns.iter().map(String::as_str).filter(|column| *column != "seq").collect();
        let others = others.join(", ");
        // Sequence numbers can clash only if the disk could not be read before.
        let newest = newest_seq(&transaction)?;
        let first: Option<i64> =
            transaction.query_row("SELECT min(seq) FROM memory.record", [], |row| row.get(0))?;
        let taken = sql_integer(newest);
        let shift = first.map_or(0, |first| (taken - first + 1).max(0));
        transaction.execute(
            &format!(
                "INSERT INTO main.record (seq, {others})
                 SELECT seq + ?1, {others} FROM memory.record ORDER BY seq"
            ),
            [shift],
        )?;
        transaction.execute_batch(
            "UPDATE main.pruned SET through = max(through, (SELECT through FROM memory.pruned))",
        )?;
        let given: i64 = transaction.query_row(
            "SELECT seq FROM memory.sqlite_sequence WHERE name = 'record'",
            [],
            |row| row.get(0),
        )?;
        transaction.execute(
            "UPDATE main.sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'record'",
            params![given],
        )?;
        let newest = newest_seq(&transaction)?;
        transaction.commit()?;
        Ok(newest)
    }

    /// How a column is set in a row that both databases have. If the disk could not be read,
    /// a finding that it has was begun a second time in memory.
    fn assignment(&self, table: &str, column: &str) -> String {
        let is_anew = table == "finding" && self.disk.is_none();
        match column {
            "revision" if is_anew => format!("revision = {REVISION}"),
            "first_seen" if is_anew => format!("first_seen = {FIRST_SEEN}"),
            "count" if is_anew => format!("count = {COUNT}"),
            "json" if is_anew => format!(
                "json = json_set(excluded.json, '$.revision', {REVISION}, '$.count', {COUNT},
                     '$.first_seen', CASE WHEN finding.first_seen < excluded.first_seen
                         THEN finding.json ->> '$.first_seen'
                         ELSE excluded.json ->> '$.first_seen' END)"
            ),
            _ => format!("{column} = excluded.{column}"),
        }
    }

    /// How many records are in memory only.
    pub(super) fn count(connection: &Connection) -> u64 {
        let count = connection
            .prepare_cached("SELECT count(*) FROM main.record")
            .and_then(|mut query| query.query_row([], |row| row.get::<_, i64>(0)));
        count.unwrap_or_default().unsigned_abs()
    }
}

const REVISION: &str = "max(finding.revision + 1, excluded.revision)";
const FIRST_SEEN: &str = "min(finding.first_seen, excluded.first_seen)";
const COUNT: &str = "finding.count + excluded.count";

/// The tables whose rows replace each other, with their keys. Members come after findings: a
/// trigger finds their container by the finding.
const TABLES: [(&str, &str); 6] = [
    ("labels", "container, namespace, id"),
    ("finding", "id"),
    ("member", "finding, path"),
    ("session", "id"),
    ("command", "session, number"),
    ("probe", "id"),
];

fn columns(connection: &Connection, table: &str) -> rusqlite::Result<Vec<String>> {
    connection
        .prepare("SELECT name FROM pragma_table_info(?1, 'main')")?
        .query_map([table], |row| row.get(0))?
        .collect()
}

/// Views that join both databases, with the tables' own names.
fn views() -> String {
    let both = TABLES.map(|(table, key)| {
        let same: Vec<String> =
            key.split(", ").map(|column| format!("new.{column} = old.{column}")).collect();
        (table, same.join(" AND "))
    });
    let record = "old.type IN ('finding', 'session') AND new.type = old.type
         AND new.finding IS old.finding AND new.session IS old.session";
    let all = both.into_iter().chain([("record", record.to_owned())]);
    let mut views: String = all
        .map(|(table, same)| {
            format!(
                "CREATE TEMP VIEW {table} AS
                     SELECT * FROM main.{table}
                     UNION ALL
                     SELECT * FROM disk.{table} AS old WHERE NOT EXISTS
                         (SELECT 1 FROM main.{table} AS new WHERE {same});\n"
            )
        })
        .collect();
    views.push_str("CREATE TEMP VIEW pruned AS SELECT * FROM main.pruned;");
    views
}

/// A path in a URI.
fn encoded(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' => {
                text.push(char::from(*byte));
            }
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}
