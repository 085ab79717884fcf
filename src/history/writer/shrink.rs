//! Shrinking: drops rows when the history takes more bytes than it may.
//!
//! Takes rows from the container that takes the most space, so that one noisy container does not
//! push out the records of the others. Age alone is the business of `retention`.

use std::collections::HashSet;

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::pending::BATCH;
use super::retention::{drop_finding, drop_labels, drop_record, drop_session, return_space};
use super::store::store;
use super::writing::Writing;
use crate::health::Failure;
use crate::history::memory;
use crate::history::record::Record;
use crate::history::sql::newest_seq;
use crate::model::{ContainerId, Severity};

/// Most rows that one transaction drops: more than one commit can add.
const SHRINK_STEP: usize = 4 * BATCH;
/// Most containers that are tried for something to drop.
const SHRINK_FROM: usize = 64;

impl Writing {
    /// Drops some rows while the history is too large. Once it was full, rows are dropped
    /// until it is well below the limit.
    pub(super) fn shrink(&mut self) {
        let most = self.keep().max_bytes;
        let most = self.database.memory.as_ref().map_or(most, |_| most.min(memory::MAX_BYTES));
        let connection = self.database.current();
        let limit = if self.shrinking.is_some() { most - most / 8 } else { most };
        let excess = match bytes_of(connection) {
            Ok(bytes) if bytes <= limit => {
                self.shrinking = None;
                return;
            }
            Ok(bytes) => bytes - (most - most / 8),
            Err(err) => {
                tracing::error!("cannot ask how large the history is: {err}");
                return;
            }
        };
        let reported = self.shrinking.get_or_insert_default();
        let _reaction = self.health.record(Failure::HistoryFull);
        match shrink_step(connection, reported, excess, most) {
            Ok(Some(newest)) => {
                let problem = format!(
                    "the history is full (history.max_bytes is {most}): what is old or not severe \
                     was dropped"
                );
                self.health.begin(Failure::HistoryFull, &problem);
                self.schedule.prune_later();
                self.committed.send_replace(newest);
            }
            Ok(None) => {
                let problem = format!(
                    "the history is full (history.max_bytes is {most}), and nothing in it may be \
                     dropped"
                );
                tracing::error!("{problem}");
                self.health.begin(Failure::HistoryFull, &problem);
                self.shrinking = None;
            }
            Err(err) => {
                let _reaction = self.health.record(Failure::HistoryWrite);
                tracing::error!(
                    history = %self.database.path.display(),
                    "cannot shrink the history: {err}"
                );
                self.shrinking = None;
            }
        }
    }
}

/// How many bytes of the file are in use.
fn bytes_of(connection: &Connection) -> rusqlite::Result<u64> {
    let pragma = |name: &str| -> rusqlite::Result<u64> {
        let value: i64 = connection
            .prepare_cached(&format!("PRAGMA {name}"))?
            .query_row([], |row| row.get(0))?;
        Ok(value.unsigned_abs())
    };
    let pages = pragma("page_count")?.saturating_sub(pragma("freelist_count")?);
    Ok(pages * pragma("page_size")?)
}

/// The bytes that the rows of all containers take, by the table `held`.
fn held_bytes(connection: &Connection) -> rusqlite::Result<u64> {
    let sum: i64 = connection
        .prepare_cached("SELECT coalesce(sum(bytes), 0) FROM held")?
        .query_row([], |row| row.get(0))?;
    Ok(sum.unsigned_abs())
}

/// Drops about `excess` bytes, in up to [`SHRINK_STEP`] rows, of the container that takes the
/// most. Records a gap for each container that is not in `reported` yet. Returns the newest
/// sequence number, or `None` if there is nothing that may be dropped.
fn shrink_step(
    connection: &mut Connection,
    reported: &mut HashSet<ContainerId>,
    excess: u64,
    max_bytes: u64,
) -> rusqlite::Result<Option<u64>> {
    let transaction = connection.transaction()?;
    // The table counts rows without pages and indexes, which take as much again.
    let (bytes, held) = (bytes_of(&transaction)?, held_bytes(&transaction)?);
    let excess = u64::try_from(u128::from(excess) * u128::from(held) / u128::from(bytes.max(1)))
        .unwrap_or(excess);
    let largest: Vec<(String, String)> = transaction
        .prepare_cached("SELECT namespace, container FROM held ORDER BY bytes DESC LIMIT ?1")?
        .query_map([SHRINK_FROM as i64], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (namespace, container) in largest {
        let (dropped, through) = shrink_container(&transaction, &namespace, &container, excess)?;
        if dropped == 0 {
            continue;
        }
        transaction.execute("UPDATE pruned SET through = max(through, ?1)", [through])?;
        drop_labels(&transaction)?;
        let container = ContainerId::new(&namespace, &container);
        if reported.insert(container.clone()) {
            let gap = Record::Gap {
                name: Failure::HistoryFull.name().into(),
                container: Some(container).filter(|container| !container.id.is_empty()),
                detail: format!(
                    "the history is full: what is not severe and old is dropped \
                     (history.max_bytes is {max_bytes})"
                ),
                at: Timestamp::now(),
                until: None,
            };
            store(&transaction, &gap)?;
        }
        let newest = newest_seq(&transaction)?;
        transaction.commit()?;
        return_space(connection)?;
        return Ok(Some(newest));
    }
    Ok(None)
}

/// Drops the least severe rows of one container, among these the oldest. Returns how many,
/// and the newest sequence number among them. Closed sessions count as low severity. An empty
/// name stands for rows of no container: gaps, and findings in layers.
fn shrink_container(
    connection: &Connection,
    namespace: &str,
    container: &str,
    excess: u64,
) -> rusqlite::Result<(usize, i64)> {
    const LOW: i64 = Severity::Low as i64 + 1;
    let most = SHRINK_STEP as i64;
    let is_none = container.is_empty();
    if is_none {
        let gaps = "SELECT seq FROM record WHERE type = 'gap' ORDER BY at, seq LIMIT ?1";
        let through: Option<i64> = connection
            .prepare_cached(&format!("SELECT max(seq) FROM ({gaps})"))?
            .query_row([most], |row| row.get(0))?;
        let dropped = connection
            .prepare_cached(&format!("DELETE FROM record WHERE seq IN ({gaps})"))?
            .execute([most])?;
        if dropped > 0 {
            return Ok((dropped, through.unwrap_or_default()));
        }
    }
    let whose = if is_none {
        "container IS NULL AND ?2 = ?2 AND ?1 = ?1"
    } else {
        "container = ?1 AND namespace = ?2"
    };
    let findings: Vec<(String, i64, u64)> = connection
        .prepare_cached(&format!(
            "SELECT id, severity, octet_length(json) + 512 FROM finding WHERE {whose}
             ORDER BY severity, last_seen, id LIMIT ?3"
        ))?
        .query_map(params![container, namespace, most], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?.unsigned_abs()))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let lowest = findings.first().map_or(i64::MAX, |(_, severity, _)| *severity);
    let mut freed = 0;
    let mut through = 0;
    let mut dropped = 0;
    if lowest > LOW && !is_none {
        let sessions: Vec<(String, u64)> = connection
            .prepare_cached(
                "SELECT id, octet_length(json) + 512 +
                     (SELECT coalesce(sum(octet_length(json) + 256), 0) FROM command
                      WHERE command.session = session.id)
                 FROM session WHERE container = ?1 AND namespace = ?2
                     AND state = 'closed' ORDER BY coalesce(ended_at, changed_at), id LIMIT ?3",
            )?
            .query_map(params![container, namespace, most / 8], |row| {
                Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs()))
            })?
            .collect::<rusqlite::Result<_>>()?;
        for (id, bytes) in &sessions {
            if freed >= excess {
                break;
            }
            freed += bytes;
            drop_session(connection, Some(id))?;
            through = drop_record(connection, "session", id)?.max(through);
            dropped += 1;
        }
    }
    if dropped == 0 {
        for (id, _, bytes) in findings.iter().filter(|(_, severity, _)| *severity == lowest) {
            if freed >= excess {
                break;
            }
            freed += bytes;
            drop_finding(connection, Some(id))?;
            through = drop_record(connection, "finding", id)?.max(through);
            dropped += 1;
        }
    }
    Ok((dropped, through))
}
