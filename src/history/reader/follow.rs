//! The records after a cursor, for followers.
//!
//! A cursor is the sequence number of a record. This file only reads; the followers themselves
//! are in `api`.

use rusqlite::params_from_iter;
use rusqlite::types::Value;

use super::connection::Reader;
use super::filter::{Conditions, Filter};
use super::pages::{Followed, Stored};
use crate::history::error::Error;
use crate::history::json::{self, FindingText, Kept as _};
use crate::history::sql::{length, newest_seq};
use crate::model::{Finding, Session};

impl Reader {
    /// The newest cursor there is.
    pub fn newest(&self) -> Result<u64, Error> {
        self.query(|connection| newest_seq(connection).map_err(Error::sql("read", &self.path)))
    }

    /// Up to `limit` records after `cursor` that concern `filter`, and how far was read. A gap
    /// concerns every filter that does not name another container. A response and a session
    /// concern their container only.
    pub fn after(&self, cursor: u64, filter: &Filter, limit: usize) -> Result<Followed, Error> {
        self.page_after(cursor, filter, limit, usize::MAX)
    }

    /// The same; fewer records if they have more than about `bytes` of JSON.
    pub fn page_after(
        &self,
        cursor: u64,
        filter: &Filter,
        limit: usize,
        bytes: usize,
    ) -> Result<Followed, Error> {
        self.read_after(cursor, filter, (limit, bytes), json::record)
    }

    /// The same, with findings as the text that is stored.
    pub fn stored_after(
        &self,
        cursor: u64,
        filter: &Filter,
        limit: usize,
        bytes: usize,
    ) -> Result<Followed<Stored>, Error> {
        self.read_after(cursor, filter, (limit, bytes), |kind, text| match kind {
            "finding" => FindingText::read(text).map(Stored::Finding),
            _ => json::record(kind, text).map(Stored::Other),
        })
    }

    fn read_after<R>(
        &self,
        cursor: u64,
        filter: &Filter,
        (limit, bytes): (usize, usize),
        parse: impl Fn(&str, &str) -> serde_json::Result<R>,
    ) -> Result<Followed<R>, Error> {
        let mut of_finding = Conditions::of(filter, &self.images(filter)?);
        let mut of_others = Conditions::default();
        if let Some(container) = &filter.container {
            of_others.add(
                "(record.container IS NULL OR (record.container, record.namespace) = (?, ?))",
                [
                    Value::Text(container.id.to_string()),
                    Value::Text(container.namespace.to_string()),
                ],
            );
        }
        of_finding.add("record.type = 'finding'", []);
        of_others.add("record.type <> 'finding'", []);
        let sql = format!(
            "SELECT record.seq, record.type, coalesce(record.json, {}, {})
             FROM record
             LEFT JOIN finding ON record.type = 'finding' AND finding.id = record.finding
             LEFT JOIN session ON record.type = 'session' AND session.id = record.session
             WHERE record.seq > ? AND (({}) OR ({}))
             ORDER BY record.seq LIMIT {}",
            Finding::column(),
            Session::column(),
            of_finding.joined(),
            of_others.joined(),
            limit.saturating_add(1),
        );
        let position = i64::try_from(cursor).unwrap_or(i64::MAX);
        let values: Vec<Value> = std::iter::once(Value::Integer(position))
            .chain(of_finding.values)
            .chain(of_others.values)
            .collect();

        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            // One transaction, so that the rows, `newest` and `pruned` are of the same moment.
            let transaction = connection.transaction().map_err(&failed)?;
            let newest = newest_seq(&transaction).map_err(&failed)?;
            let pruned_through: i64 = transaction
                .query_row("SELECT through FROM pruned", [], |row| row.get(0))
                .map_err(&failed)?;
            let mut query = transaction.prepare_cached(&sql).map_err(&failed)?;
            let mut rows = query.query(params_from_iter(&values)).map_err(&failed)?;
            let mut followed = Followed {
                records: Vec::new(),
                cursor: newest.max(cursor),
                more: false,
                pruned_through: pruned_through.unsigned_abs(),
            };
            let mut read = 0;
            while let Some(row) = rows.next().map_err(&failed)? {
                if followed.records.len() == limit || read > bytes {
                    followed.cursor = followed.records.last().map_or(cursor, |(seq, _)| *seq);
                    followed.more = true;
                    break;
                }
                read += length(row, 2).map_err(&failed)?;
                let seq: i64 = row.get(0).map_err(&failed)?;
                let column = |column| row.get_ref(column).and_then(|value| Ok(value.as_str()?));
                let (kind, text) = (column(1).map_err(&failed)?, column(2).map_err(&failed)?);
                let record = parse(kind, text).map_err(|err| Error::Corrupt {
                    path: self.path.clone(),
                    detail: format!("a {kind}: {err}"),
                })?;
                followed.records.push((seq.unsigned_abs(), record));
            }
            Ok(followed)
        })
    }
}
