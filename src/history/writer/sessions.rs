//! Writes sessions, their commands, and probes.
//!
//! Only the newest revision of a session is kept, and one record that refers to it. A probe has no
//! record: followers do not receive probes.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use super::row::{Row, store_labels, unwritable};
use crate::history::sql::sql_integer;
use crate::model::{Command, Probe, Session};

pub(super) fn store_session(
    connection: &Connection,
    session: &Session,
    text: &str,
) -> rusqlite::Result<()> {
    let id = session.id.to_string();
    let container = &session.container.id;
    // The time of this record. The session's own times do not serve: its end may not have
    // been observed.
    let now = Timestamp::now();
    let labels = store_labels(connection, &session.container)?;
    connection
        .prepare_cached(
            "INSERT INTO session (id, revision, namespace, container, state, started_at,
                 ended_at, changed_at, json, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
             ON CONFLICT (id) DO UPDATE SET
                 revision = excluded.revision, state = excluded.state,
                 started_at = excluded.started_at, ended_at = excluded.ended_at,
                 changed_at = excluded.changed_at, json = excluded.json,
                 labels = excluded.labels",
        )?
        .execute(params![
            id,
            sql_integer(session.revision),
            container.namespace,
            container.id,
            session.state.name(),
            session.started_at.as_microsecond(),
            session.ended_at.map(Timestamp::as_microsecond),
            now.as_microsecond(),
            text,
            labels,
        ])?;
    connection
        .prepare_cached("DELETE FROM record WHERE type = 'session' AND session = ?1")?
        .execute([&id])?;
    Row { session: Some(&id), container: Some(container), ..Row::of("session", now) }
        .insert(connection)
}

/// Stores a command. Does nothing if its session is not stored.
pub(super) fn store_command(connection: &Connection, command: &Command) -> rusqlite::Result<()> {
    let text = serde_json::to_string(command).map_err(unwritable)?;
    connection
        .prepare_cached(
            "INSERT INTO command (session, number, namespace, container, started_at, json)
             SELECT id, ?2, namespace, container, ?3, ?4 FROM session WHERE id = ?1
             ON CONFLICT (session, number) DO UPDATE SET
                 started_at = excluded.started_at, json = excluded.json",
        )?
        .execute(params![
            command.session.to_string(),
            sql_integer(command.number),
            command.started_at.as_microsecond(),
            text,
        ])?;
    Ok(())
}

pub(super) fn store_probe(
    connection: &Connection,
    probe: &Probe,
    text: &str,
) -> rusqlite::Result<()> {
    let container = &probe.container.id;
    let labels = store_labels(connection, &probe.container)?;
    connection
        .prepare_cached(
            "INSERT INTO probe (id, namespace, container, last_seen, json, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen, json = excluded.json,
                 labels = excluded.labels",
        )?
        .execute(params![
            probe.id.to_string(),
            container.namespace,
            container.id,
            probe.last_seen.as_microsecond(),
            text,
            labels,
        ])?;
    Ok(())
}
