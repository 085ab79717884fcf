//! Responses: kills, pauses and resumes, and restarts after a kill.
//!
//! Only reads what was recorded about them. `respond` carries responses out.

use jiff::Timestamp;
use rusqlite::{Rows, params};

use super::connection::Reader;
use crate::history::error::Error;
use crate::history::json;
use crate::model::ContainerId;
use crate::respond::{RESTART, RESUME_ANSWERS, Response, STOP_ANSWERS};

impl Reader {
    /// The responses to a container, oldest first.
    pub fn responses(&self, container: &ContainerId) -> Result<Vec<Response>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT CAST(seq AS TEXT), json FROM record
                     WHERE type = 'response' AND container = ? AND namespace = ? ORDER BY seq",
                )
                .map_err(&failed)?;
            let parameters = params![&*container.id, &*container.namespace];
            self.all_kept(query.query(parameters).map_err(&failed)?)
        })
    }

    /// The responses that count for the limits of rules, oldest first: those that rules have
    /// requested since a time, and all by which the answers of a rule were stopped or resumed.
    pub fn answers_since(&self, since: Timestamp) -> Result<Vec<Response>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT CAST(seq AS TEXT), json FROM record
                     WHERE type = 'response'
                         AND (at >= ?1 OR json ->> '$.outcome.action' IN (?2, ?3))
                     ORDER BY seq",
                )
                .map_err(&failed)?;
            let parameters = params![since.as_microsecond(), STOP_ANSWERS, RESUME_ANSWERS];
            self.all_kept(query.query(parameters).map_err(&failed)?)
        })
    }

    fn all_kept(&self, mut rows: Rows<'_>) -> Result<Vec<Response>, Error> {
        let mut responses = Vec::new();
        while let Some(row) = rows.next().map_err(Error::sql("read", &self.path))? {
            responses.push(json::kept(row, 0, 1, &self.path)?);
        }
        Ok(responses)
    }

    /// The last response to a container that is a kill which succeeded, or the report that
    /// the container was started again after one.
    pub fn last_kill(&self, container: &ContainerId) -> Result<Option<Response>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT CAST(seq AS TEXT), json FROM record
                     WHERE type = 'response' AND container = ? AND namespace = ?
                         AND json ->> '$.outcome.succeeded'
                         AND json ->> '$.outcome.action' IN ('kill', ?)
                     ORDER BY seq DESC LIMIT 1",
                )
                .map_err(&failed)?;
            let mut rows = query
                .query(params![&*container.id, &*container.namespace, RESTART])
                .map_err(&failed)?;
            let Some(row) = rows.next().map_err(&failed)? else { return Ok(None) };
            json::kept(row, 0, 1, &self.path).map(Some)
        })
    }
}
