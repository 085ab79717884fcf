//! One row of the table `record`, and the labels that rows refer to.
//!
//! The table gives each record its sequence number. The other tables are filled in `findings` and
//! `sessions`.

use jiff::Timestamp;
use rusqlite::{Connection, params};

use crate::history::json;
use crate::model::ContainerId;
use crate::model::finding::ContainerEvidence;

/// One row of the table `record`.
pub(super) struct Row<'a> {
    pub(super) at: Timestamp,
    pub(super) kind: &'a str,
    pub(super) finding: Option<&'a str>,
    pub(super) session: Option<&'a str>,
    pub(super) container: Option<&'a ContainerId>,
    pub(super) json: Option<&'a str>,
}

impl<'a> Row<'a> {
    pub(super) fn of(kind: &'a str, at: Timestamp) -> Row<'a> {
        Row { at, kind, finding: None, session: None, container: None, json: None }
    }

    pub(super) fn insert(&self, connection: &Connection) -> rusqlite::Result<()> {
        connection
            .prepare_cached(
                "INSERT INTO record (at, type, finding, session, namespace, container, json)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                self.at.as_microsecond(),
                self.kind,
                self.finding,
                self.session,
                self.container.map(|id| &id.namespace),
                self.container.map(|id| &id.id),
                self.json,
            ])?;
        Ok(())
    }
}

pub(super) fn unwritable(err: serde_json::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(Box::new(err))
}

/// Stores a container's labels, and returns the ID under which they are stored.
pub(super) fn store_labels(
    connection: &Connection,
    container: &ContainerEvidence,
) -> rusqlite::Result<Option<String>> {
    if container.labels.is_empty() {
        return Ok(None);
    }
    let (name, text) = json::labels(&container.labels).map_err(unwritable)?;
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO labels (namespace, container, id, json) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![container.id.namespace, container.id.id, name, text])?;
    Ok(Some(name))
}
