//! Writes one record, whatever it is about, into an open transaction.
//!
//! Responses and gaps are written here; findings, sessions and probes have files of their own.

use rusqlite::Connection;

use super::findings::store_finding;
use super::row::{Row, unwritable};
use super::sessions::{store_probe, store_session};
use crate::history::json;
use crate::history::record::Record;

pub(super) fn store(connection: &Connection, record: &Record) -> rusqlite::Result<()> {
    let text = json::text(record).map_err(unwritable)?;
    match record {
        Record::Finding(finding) | Record::Aggregate { finding, .. } => {
            store_finding(connection, finding, &text)
        }
        Record::Session { session, .. } => store_session(connection, session, &text),
        Record::Probe(probe) => store_probe(connection, probe, &text),
        Record::Response(response) => {
            let finding = response.finding.map(|id| id.to_string());
            let row = Row {
                finding: finding.as_deref(),
                container: Some(&response.container),
                json: Some(&text),
                ..Row::of("response", response.outcome.at)
            };
            row.insert(connection)
        }
        Record::Gap { container, at, .. } => {
            let container = container.as_ref();
            Row { container, json: Some(&text), ..Row::of("gap", *at) }.insert(connection)
        }
    }
}
