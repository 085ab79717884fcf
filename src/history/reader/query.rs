//! Queries that several subjects share: a page, a lookup by the beginning of an ID, and all
//! rows of a selection.
//!
//! Each works on every type that is stored as published JSON (`json::Kept`).

use std::fmt;
use std::str::FromStr;

use rusqlite::types::Value;
use rusqlite::{params, params_from_iter};

use super::connection::Reader;
use super::filter::Conditions;
use super::pages::{Lookup, PAGE_BYTES, PageToken};
use crate::history::error::Error;
use crate::history::json::{self, Kept};
use crate::history::sql::length;
use crate::model::Labels;

impl Reader {
    /// One page of the rows that meet `conditions`, ordered by `time`, newest first.
    pub(super) fn page<T: Kept, Id: FromStr + fmt::Display>(
        &self,
        mut conditions: Conditions,
        time: &str,
        after: Option<PageToken<Id>>,
        limit: usize,
    ) -> Result<(Vec<T>, Option<PageToken<Id>>), Error> {
        if let Some(token) = after {
            conditions.add(
                &format!("({time}, id) < (?, ?)"),
                [Value::Integer(token.time), Value::Text(token.id.to_string())],
            );
        }
        let sql = format!(
            "SELECT id, {}, {time} FROM {} {} ORDER BY {time} DESC, id DESC LIMIT {}",
            T::column(),
            T::TABLE,
            conditions.sql(),
            limit.saturating_add(1),
        );
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection.prepare_cached(&sql).map_err(&failed)?;
            let mut rows = query.query(params_from_iter(&conditions.values)).map_err(&failed)?;
            let mut all: Vec<T> = Vec::new();
            let (mut id, mut time, mut bytes) = (None, 0, 0);
            while let Some(row) = rows.next().map_err(&failed)? {
                if all.len() == limit || bytes > PAGE_BYTES {
                    return Ok((all, id.map(|id| PageToken { time, id })));
                }
                all.push(json::kept(row, 0, 1, &self.path)?);
                id = row.get_ref(0).and_then(|id| Ok(id.as_str()?)).map_err(&failed)?.parse().ok();
                time = row.get(2).map_err(&failed)?;
                bytes += length(row, 1).map_err(&failed)?;
            }
            Ok((all, None))
        })
    }

    /// The row whose ID is `text` or begins with it.
    pub(super) fn lookup<T: Kept>(&self, text: &str) -> Result<Lookup<T>, Error> {
        let prefix = text.to_ascii_lowercase();
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Lookup::Unknown);
        }
        // `g` sorts after every hexadecimal digit.
        let beyond = format!("{prefix}g");
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT id, {}, count(*) OVER () FROM {} WHERE id >= ? AND id < ? LIMIT 1",
                    T::column(),
                    T::TABLE
                ))
                .map_err(&failed)?;
            let mut rows = query.query(params![prefix, beyond]).map_err(&failed)?;
            let Some(row) = rows.next().map_err(&failed)? else {
                return Ok(Lookup::Unknown);
            };
            match row.get::<_, i64>(2).map_err(&failed)? {
                1 => json::kept(row, 0, 1, &self.path).map(|one| Lookup::Found(Box::new(one))),
                count => Ok(Lookup::Ambiguous(count.unsigned_abs())),
            }
        })
    }

    /// All rows of a selection. `rows` names a table and the condition, order and limit of
    /// its rows.
    pub(super) fn select<T: Kept>(&self, rows: &str, values: &[&str]) -> Result<Vec<T>, Error> {
        let sql = format!("SELECT id, {} FROM {rows}", T::column());
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection.prepare_cached(&sql).map_err(&failed)?;
            let mut rows = query.query(params_from_iter(values)).map_err(&failed)?;
            let mut all = Vec::new();
            let mut last = Labels::default();
            while let Some(row) = rows.next().map_err(&failed)? {
                let mut one: T = json::kept(row, 0, 1, &self.path)?;
                if let Some(labels) = one.labels() {
                    // Rows of one container share the memory of their labels.
                    if *labels == last {
                        labels.clone_from(&last);
                    }
                    last.clone_from(labels);
                }
                all.push(one);
            }
            Ok(all)
        })
    }
}
