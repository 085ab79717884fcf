//! Sessions, their commands, and probes: programs that run again and again.
//!
//! Only reads. The pipeline reads the open sessions when driftd starts, `api` reads the rest.

use rusqlite::params;

use super::connection::Reader;
use super::filter::{Conditions, SessionFilter};
use super::pages::{
    CommandToken, CommandsPage, PAGE_BYTES, PageToken, ProbeLookup, SessionLookup, SessionsPage,
};
use crate::history::error::Error;
use crate::history::json;
use crate::history::sql::length;
use crate::model::{Command, ContainerId, Probe, Session, SessionId};

/// Most open sessions that are returned, the newest.
const OPEN_SESSIONS: usize = 10_000;
/// Most probes that are listed, those with the newest sighting.
const PROBES: usize = 2_000;

impl Reader {
    /// One page of at most `limit` sessions; fewer if they are large.
    pub fn sessions(
        &self,
        filter: &SessionFilter,
        after: Option<PageToken<SessionId>>,
        limit: usize,
    ) -> Result<SessionsPage, Error> {
        let conditions = Conditions::of_sessions(filter);
        let (sessions, next) = self.page(conditions, "started_at", after, limit)?;
        Ok(SessionsPage { sessions, next })
    }

    /// The session whose ID is `text` or begins with it.
    pub fn session(&self, text: &str) -> Result<SessionLookup, Error> {
        self.lookup(text)
    }

    /// The probe whose ID is `text` or begins with it.
    pub fn probe(&self, text: &str) -> Result<ProbeLookup, Error> {
        self.lookup(text)
    }

    /// One page of at most `limit` commands of a session; fewer if they are large.
    pub fn commands(
        &self,
        session: SessionId,
        after: Option<CommandToken>,
        limit: usize,
    ) -> Result<CommandsPage, Error> {
        let after =
            after.map_or(0, |CommandToken(number)| i64::try_from(number).unwrap_or(i64::MAX));
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT session, json FROM command WHERE session = ? AND number > ?
                     ORDER BY number LIMIT ?",
                )
                .map_err(&failed)?;
            let most = i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX);
            let mut rows =
                query.query(params![session.to_string(), after, most]).map_err(&failed)?;
            let (mut commands, mut bytes) = (Vec::<Command>::new(), 0);
            while let Some(row) = rows.next().map_err(&failed)? {
                if commands.len() == limit || bytes > PAGE_BYTES {
                    let next = commands.last().map(|last| CommandToken(last.number));
                    return Ok(CommandsPage { commands, next });
                }
                commands.push(json::kept(row, 0, 1, &self.path)?);
                bytes += length(row, 1).map_err(&failed)?;
            }
            Ok(CommandsPage { commands, next: None })
        })
    }

    /// The sessions without a known end, newest first. When driftd starts, they either
    /// go on or ended while it did not run.
    pub fn open_sessions(&self) -> Result<Vec<Session>, Error> {
        self.select(
            &format!(
                "session WHERE state = 'open'
                 ORDER BY started_at DESC, id DESC LIMIT {OPEN_SESSIONS}"
            ),
            &[],
        )
    }

    /// The probes of one container, or of all, the newest sighting first.
    pub fn probes(&self, container: Option<&ContainerId>) -> Result<Vec<Probe>, Error> {
        let order = format!("ORDER BY last_seen DESC, id DESC LIMIT {PROBES}");
        match container {
            None => self.select(&format!("probe {order}"), &[]),
            Some(container) => self.select(
                &format!("probe WHERE container = ? AND namespace = ? {order}"),
                &[&container.id, &container.namespace],
            ),
        }
    }
}
