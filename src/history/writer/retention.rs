//! Retention: drops what is older than the history keeps.
//!
//! Works in small steps, so that new records never wait long. Also holds the functions that drop
//! a finding, a session or labels, which `shrink` uses.

use std::time::Duration;

use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::writing::Writing;
use crate::health::Failure;
use crate::respond::{RESUME_ANSWERS, STOP_ANSWERS};

/// Most records that one transaction prunes, so that new records never wait long behind it.
const PRUNE_STEP: usize = 500;

impl Writing {
    /// Drops some of the records that are too old. It is due again at once while there are
    /// more.
    pub(super) fn prune(&mut self) {
        let retention = self.keep().retention;
        let pruned = prune_step(&mut self.database.disk, retention);
        if let Ok(pruned @ 1..) = pruned {
            // In a directory that was copied to be read, this may be the only copy.
            tracing::info!(
                history = %self.database.path.display(),
                records = pruned,
                ?retention,
                "records that are older than the retention are dropped (to read an old history \
                 whole: driftd --history FILE findings)"
            );
        }
        match pruned {
            Ok(pruned) if pruned == PRUNE_STEP => (),
            Ok(_) => {
                self.schedule.prune_later();
                if self.shrinking.is_none() {
                    self.health.end(Failure::HistoryFull);
                }
            }
            Err(err) => {
                let _reaction = self.health.record(Failure::HistoryWrite);
                tracing::error!(
                    history = %self.database.path.display(),
                    "cannot prune the history: {err}"
                );
                self.schedule.prune_later();
            }
        }
    }
}

/// Drops up to [`PRUNE_STEP`] records older than `retention`, with their findings and
/// sessions, and up to as many probes. Returns how many records or probes, whichever are
/// more. An open session stays, and so do the records by which rules are stopped.
fn prune_step(connection: &mut Connection, retention: Duration) -> rusqlite::Result<usize> {
    let now = Timestamp::now().as_microsecond();
    let cutoff = now.saturating_sub(i64::try_from(retention.as_micros()).unwrap_or(i64::MAX));
    let transaction = connection.transaction()?;
    let old: Vec<(i64, String, Option<String>, Option<String>)> = transaction
        .prepare_cached(
            "SELECT record.seq, record.type, record.finding, record.session FROM record
             LEFT JOIN session ON record.type = 'session' AND session.id = record.session
             WHERE record.at < ?1 AND (session.state IS NULL OR session.state = 'closed')
                 AND (record.type <> 'response' OR record.json ->> '$.outcome.action'
                      NOT IN (?3, ?4))
             ORDER BY record.at LIMIT ?2",
        )?
        .query_map(params![cutoff, PRUNE_STEP as i64, STOP_ANSWERS, RESUME_ANSWERS], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    for (seq, kind, finding, session) in &old {
        match kind.as_str() {
            "finding" => drop_finding(&transaction, finding.as_deref())?,
            "session" => drop_session(&transaction, session.as_deref())?,
            _ => (),
        }
        transaction.prepare_cached("DELETE FROM record WHERE seq = ?1")?.execute([seq])?;
    }
    let probes = transaction
        .prepare_cached(
            "DELETE FROM probe WHERE id IN
                 (SELECT id FROM probe WHERE last_seen < ?1 ORDER BY last_seen LIMIT ?2)",
        )?
        .execute(params![cutoff, PRUNE_STEP as i64])?;
    if let Some(through) = old.iter().map(|(seq, ..)| seq).max() {
        transaction.execute("UPDATE pruned SET through = max(through, ?1)", [through])?;
    }
    if !old.is_empty() {
        drop_labels(&transaction)?;
    }
    transaction.commit()?;
    if !old.is_empty() || probes > 0 {
        return_space(connection)?;
    }
    Ok(old.len().max(probes))
}

/// Returns the free pages of the file to the disk.
pub(super) fn return_space(connection: &Connection) -> rusqlite::Result<()> {
    // Steps through the result: each row frees one page.
    let mut vacuum = connection.prepare_cached("PRAGMA incremental_vacuum(4096)")?;
    let mut pages = vacuum.query([])?;
    while pages.next()?.is_some() {}
    Ok(())
}

pub(super) fn drop_finding(connection: &Connection, id: Option<&str>) -> rusqlite::Result<()> {
    // The members first: a trigger finds their container by the finding.
    connection.prepare_cached("DELETE FROM member WHERE finding = ?1")?.execute([id])?;
    connection.prepare_cached("DELETE FROM finding WHERE id = ?1")?.execute([id])?;
    Ok(())
}

pub(super) fn drop_session(connection: &Connection, id: Option<&str>) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM command WHERE session = ?1")?.execute([id])?;
    connection.prepare_cached("DELETE FROM session WHERE id = ?1")?.execute([id])?;
    Ok(())
}

/// Drops the record of a finding or a session, and returns its sequence number.
pub(super) fn drop_record(connection: &Connection, what: &str, id: &str) -> rusqlite::Result<i64> {
    let seq: Option<i64> = connection
        .prepare_cached(&format!(
            "DELETE FROM record WHERE type = '{what}' AND {what} = ?1 RETURNING seq"
        ))?
        .query_row([id], |row| row.get(0))
        .optional()?;
    Ok(seq.unwrap_or_default())
}

/// Drops the labels of a container when nothing else about it is stored.
pub(super) fn drop_labels(connection: &Connection) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM held WHERE bytes <= 0")?.execute([])?;
    connection
        .prepare_cached(
            "DELETE FROM labels WHERE NOT EXISTS
                 (SELECT 1 FROM held WHERE held.container = labels.container
                      AND held.namespace = labels.namespace)
             AND NOT EXISTS
                 (SELECT 1 FROM probe WHERE probe.container = labels.container
                      AND probe.namespace = labels.namespace)",
        )?
        .execute([])?;
    Ok(())
}
