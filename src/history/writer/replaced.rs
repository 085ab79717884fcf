//! A history file that was removed or replaced while driftd runs: a new one is begun.
//!
//! Sequence numbers go on where they were, a gap records the loss, and the pipeline is asked to
//! hand over again what it knows.

use std::path::Path;
use std::time::Instant;

use jiff::Timestamp;
use rusqlite::Connection;

use super::store::store;
use super::writing::Writing;
use crate::health::Failure;
use crate::history::error::Error;
use crate::history::files::open;
use crate::history::record::Record;
use crate::history::sql::{newest_seq, sql_integer};

impl Writing {
    /// Begins a new file if the one that is open is not at its path any more.
    pub(super) fn check_file(&mut self) {
        if Instant::now() < self.schedule.next_file_check && self.pending.is_empty() {
            return;
        }
        self.schedule.check_file_later();
        if self.database.is_in_place() {
            return;
        }
        let _reaction = self.health.record(Failure::HistoryGone);
        let path = self.database.path.display().to_string();
        match self.begin_file() {
            Ok(()) => {
                tracing::error!("the history {path} was removed or replaced: a new one is begun");
                self.health.end(Failure::HistoryGone);
                self.shrinking = None;
                // If the channel is full, an earlier message waits there; it is enough.
                let _ = self.begun.try_send(());
            }
            Err(err) => {
                let problem = format!("the history {path} is gone, and none can be begun: {err}");
                tracing::error!("{problem}");
                self.health.begin(Failure::HistoryGone, &problem);
                // Nothing is written into a file that has no path any more.
                self.schedule.retry_after_file_check();
            }
        }
    }

    pub(super) fn begin_file(&mut self) -> Result<(), Error> {
        let newest = *self.committed.borrow();
        let path = &self.database.path;
        // The old file is closed first: SQLite removes its side files by their names.
        let none = Connection::open_in_memory().map_err(Error::sql("open", path))?;
        drop(std::mem::replace(&mut self.database.disk, none));
        if !path.exists() {
            remove_side_files(path)?;
        }
        let (mut connection, identity) = open(path)?;
        begin(&mut connection, newest).map_err(Error::sql("begin", path))?;
        let newest = newest_seq(&connection).map_err(Error::sql("read", path))?;
        (self.database.disk, self.database.identity) = (connection, identity);
        self.schedule.end_retry();
        self.database.readers_open_again();
        self.committed.send_replace(newest);
        Ok(())
    }
}

fn remove_side_files(path: &Path) -> Result<(), Error> {
    for suffix in ["-wal", "-shm"] {
        let mut name = path.to_owned().into_os_string();
        name.push(suffix);
        match std::fs::remove_file(&name) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", Path::new(&name))(err));
            }
            Ok(()) | Err(_) => (),
        }
    }
    Ok(())
}

/// Begins a new file: its sequence numbers go on after `newest`, and a gap is its first record.
fn begin(connection: &mut Connection, newest: u64) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    // A sequence number is never given twice, so that followers can read on.
    if newest_seq(&transaction)? < newest {
        transaction.execute("DELETE FROM sqlite_sequence WHERE name = 'record'", [])?;
        transaction.execute(
            "INSERT INTO sqlite_sequence (name, seq) VALUES ('record', ?1)",
            [sql_integer(newest)],
        )?;
        transaction
            .execute("UPDATE pruned SET through = max(through, ?1)", [sql_integer(newest)])?;
    }
    let gap = Record::Gap {
        name: Failure::HistoryGone.name().into(),
        container: None,
        detail: "the history's file was removed or replaced: what is still known is written again"
            .into(),
        at: Timestamp::now(),
        until: None,
    };
    store(&transaction, &gap)?;
    transaction.commit()
}
