//! Questions to the history, on read-only connections of their own: no reader
//! ever waits for the writer, nor the writer for a reader.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::config::DbConfig;
use rusqlite::types::Value;
use rusqlite::{Connection, OpenFlags, Row, params, params_from_iter};

use super::json::Kept;
use super::writer::newest_seq;
use super::{Error, Record, json, memory};
use crate::model::finding::{MEMBER_SCHEMA, hex};
use crate::model::{
    Command, ContainerId, Finding, FindingId, Kind, Labels, ManifestDigest, Member, Probe,
    RootfsPath, Session, SessionId, SessionState, Severity,
};
use crate::respond::Response;

/// Idle connections that are kept for the next question.
const IDLE: usize = 8;

/// Most JSON on one page: below the 4 MiB that a gRPC client takes by default.
pub(super) const PAGE_BYTES: usize = 2 << 20;

/// Most sessions that are handed over as open, the newest.
const OPEN_SESSIONS: usize = 10_000;
/// Most findings of one container that are handed over when it shows up: the worst and
/// the newest.
const TOLD: usize = 32 * 1024;
/// Most probes that are listed, those seen last.
const PROBES: usize = 2_000;

/// Which findings are asked for. The default is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub container: Option<ContainerId>,
    /// An image's name or manifest digest.
    pub image: Option<String>,
    /// Any of these kinds; empty means every kind.
    pub kinds: Vec<Kind>,
    pub minimum_severity: Option<Severity>,
    /// Last seen at or after this time.
    pub since: Option<Timestamp>,
    /// First seen at or before this time.
    pub until: Option<Timestamp>,
}

/// Which sessions are asked for. The default is all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionFilter {
    pub container: Option<ContainerId>,
    pub state: Option<SessionState>,
    /// Open at or after this time.
    pub since: Option<Timestamp>,
    /// Started at or before this time.
    pub until: Option<Timestamp>,
}

/// Where the next page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToken<Id = FindingId> {
    time: i64,
    id: Id,
}

/// Text that no page has handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the page token is not one that driftd gave out (leave it out to begin with the first page)"
)]
pub struct BadPageToken;

impl<Id: fmt::Display> fmt::Display for PageToken<Id> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.time, self.id)
    }
}

impl<Id: FromStr> FromStr for PageToken<Id> {
    type Err = BadPageToken;

    fn from_str(text: &str) -> Result<PageToken<Id>, BadPageToken> {
        let (time, id) = text.split_once('.').ok_or(BadPageToken)?;
        Ok(PageToken {
            time: time.parse().map_err(|_| BadPageToken)?,
            id: id.parse().map_err(|_| BadPageToken)?,
        })
    }
}

/// Where the next page of commands begins: after the one of this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandToken(u64);

impl fmt::Display for CommandToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for CommandToken {
    type Err = BadPageToken;

    fn from_str(text: &str) -> Result<CommandToken, BadPageToken> {
        text.parse().map(CommandToken).map_err(|_| BadPageToken)
    }
}

/// Where the next page of members begins: after this path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberToken(RootfsPath);

impl fmt::Display for MemberToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(self.0.as_bytes()))
    }
}

impl FromStr for MemberToken {
    type Err = BadPageToken;

    fn from_str(text: &str) -> Result<MemberToken, BadPageToken> {
        let digit = |digit: &u8| char::from(*digit).to_digit(16);
        let bytes = text.as_bytes().chunks(2).map(|pair| match pair {
            [high, low] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
            _ => None,
        });
        let bytes: Vec<u8> = bytes.collect::<Option<_>>().ok_or(BadPageToken)?;
        let path = RootfsPath::new(&bytes).map_err(|_| BadPageToken)?;
        // Any other spelling would begin elsewhere.
        if path.as_bytes() == bytes { Ok(MemberToken(path)) } else { Err(BadPageToken) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembersPage {
    /// Sorted by path.
    pub members: Vec<Member>,
    /// `None` on the last page.
    pub next: Option<MemberToken>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct FindingsPage {
    /// Newest `last_seen` first.
    pub findings: Vec<Finding>,
    /// `None` on the last page.
    pub next: Option<PageToken>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct SessionsPage {
    /// Newest `started_at` first.
    pub sessions: Vec<Session>,
    /// `None` on the last page.
    pub next: Option<PageToken<SessionId>>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct CommandsPage {
    /// In the order in which they were begun.
    pub commands: Vec<Command>,
    /// `None` on the last page.
    pub next: Option<CommandToken>,
}

/// What follows a cursor.
#[derive(Clone, Debug, PartialEq)]
pub struct Followed {
    /// Oldest first, each with its cursor.
    pub records: Vec<(u64, Record)>,
    /// Everything up to here was looked at.
    pub cursor: u64,
    /// Whether more is there already.
    pub more: bool,
    /// Some records up to this cursor have been pruned.
    pub pruned_through: u64,
}

/// What an ID, or the beginning of one, leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup<T> {
    Found(Box<T>),
    Unknown,
    /// How many begin like this.
    Ambiguous(u64),
}

pub type FindingLookup = Lookup<Finding>;
pub type SessionLookup = Lookup<Session>;
pub type ProbeLookup = Lookup<Probe>;

/// Reads the history. Clones share a few connections. Calls block.
#[derive(Clone, Debug)]
pub struct Reader {
    pub(super) path: PathBuf,
    /// Which file is at the path; moved by the writer.
    generation: Arc<AtomicU64>,
    memory: memory::Shared,
    /// Each with the file that it was opened for.
    idle: Arc<Mutex<Vec<(u64, Connection)>>>,
}

impl Reader {
    pub(super) fn new(path: PathBuf, generation: Arc<AtomicU64>, memory: memory::Shared) -> Reader {
        Reader { path, generation, memory, idle: Arc::default() }
    }

    /// One page of at most `limit` findings; fewer if they are large.
    pub fn findings(
        &self,
        filter: &Filter,
        after: Option<PageToken>,
        limit: usize,
    ) -> Result<FindingsPage, Error> {
        let (findings, next) =
            self.page(Conditions::of(filter, ""), "last_seen", after, limit, |one: &Finding| {
                one.id
            })?;
        Ok(FindingsPage { findings, next })
    }

    /// One page of at most `limit` sessions; fewer if they are large.
    pub fn sessions(
        &self,
        filter: &SessionFilter,
        after: Option<PageToken<SessionId>>,
        limit: usize,
    ) -> Result<SessionsPage, Error> {
        let conditions = Conditions::of_sessions(filter);
        let (sessions, next) =
            self.page(conditions, "started_at", after, limit, |one: &Session| one.id)?;
        Ok(SessionsPage { sessions, next })
    }

    /// Those that meet `conditions`, by `time`, newest first.
    fn page<T: Kept, Id: Copy + fmt::Display>(
        &self,
        mut conditions: Conditions,
        time: &str,
        after: Option<PageToken<Id>>,
        limit: usize,
        id_of: impl Fn(&T) -> Id,
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
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection.prepare_cached(&sql).map_err(&failed)?;
            let mut rows = query.query(params_from_iter(&conditions.values)).map_err(&failed)?;
            let mut all: Vec<T> = Vec::new();
            let (mut time, mut bytes) = (0, 0);
            while let Some(row) = rows.next().map_err(&failed)? {
                if all.len() == limit || bytes > PAGE_BYTES {
                    let next = all.last().map(|last| PageToken { time, id: id_of(last) });
                    return Ok((all, next));
                }
                all.push(json::kept(row, 0, 1, &self.path)?);
                time = row.get(2).map_err(&failed)?;
                bytes += length(row, 1).map_err(&failed)?;
            }
            Ok((all, None))
        })
    }

    /// The finding whose ID is `text` or begins with it.
    pub fn finding(&self, text: &str) -> Result<FindingLookup, Error> {
        self.lookup(text)
    }

    /// The session whose ID is `text` or begins with it.
    pub fn session(&self, text: &str) -> Result<SessionLookup, Error> {
        self.lookup(text)
    }

    /// The probe whose ID is `text` or begins with it.
    pub fn probe(&self, text: &str) -> Result<ProbeLookup, Error> {
        self.lookup(text)
    }

    fn lookup<T: Kept>(&self, text: &str) -> Result<Lookup<T>, Error> {
        let prefix = text.to_ascii_lowercase();
        if prefix.is_empty() || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Ok(Lookup::Unknown);
        }
        // `g` sorts after every hexadecimal digit.
        let beyond = format!("{prefix}g");
        self.ask(|connection| {
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

    /// Those of these findings that are kept, in this order, as many as one page holds.
    pub fn findings_of(&self, ids: &[FindingId]) -> Result<Vec<Finding>, Error> {
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT id, {} FROM finding WHERE id = ?",
                    Finding::column()
                ))
                .map_err(&failed)?;
            let (mut findings, mut bytes) = (Vec::new(), 0);
            for id in ids {
                let mut rows = query.query([id.to_string()]).map_err(&failed)?;
                let Some(row) = rows.next().map_err(&failed)? else { continue };
                findings.push(json::kept(row, 0, 1, &self.path)?);
                bytes += length(row, 1).map_err(&failed)?;
                if bytes > PAGE_BYTES {
                    break;
                }
            }
            Ok(findings)
        })
    }

    /// The newest revision of every finding of a container, or of none, by their IDs.
    pub fn told_of(&self, container: Option<&ContainerId>) -> Result<Vec<Finding>, Error> {
        match container {
            None => self.select("finding WHERE container IS NULL ORDER BY id", &[]),
            Some(container) => self.select(
                &format!(
                    "finding WHERE container = ? AND namespace = ?
                     ORDER BY severity DESC, last_seen DESC, id LIMIT {TOLD}"
                ),
                &[&container.id, &container.namespace],
            ),
        }
    }

    /// Tells of every file that an aggregated finding stands for.
    pub fn each_member(
        &self,
        finding: FindingId,
        mut tell: impl FnMut(Member),
    ) -> Result<(), Error> {
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!("SELECT {MEMBER} FROM member WHERE finding = ?"))
                .map_err(&failed)?;
            let mut rows = query.query([finding.to_string()]).map_err(&failed)?;
            while let Some(row) = rows.next().map_err(&failed)? {
                tell(member(row, &self.path)?);
            }
            Ok(())
        })
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
        self.ask(|connection| {
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

    /// The sessions of which no end is known, newest first: what goes on when driftd
    /// starts, or ended while it did not run.
    pub fn open_sessions(&self) -> Result<Vec<Session>, Error> {
        self.select(
            &format!(
                "session WHERE state = 'open'
                 ORDER BY started_at DESC, id DESC LIMIT {OPEN_SESSIONS}"
            ),
            &[],
        )
    }

    /// The probes of one container, or of all, those seen last first.
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

    /// All that `rows` gives: a table, and which of its rows.
    fn select<T: Kept>(&self, rows: &str, values: &[&str]) -> Result<Vec<T>, Error> {
        let sql = format!("SELECT id, {} FROM {rows}", T::column());
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection.prepare_cached(&sql).map_err(&failed)?;
            let mut rows = query.query(params_from_iter(values)).map_err(&failed)?;
            let mut all = Vec::new();
            let mut last = Labels::default();
            while let Some(row) = rows.next().map_err(&failed)? {
                let mut one: T = json::kept(row, 0, 1, &self.path)?;
                if let Some(labels) = one.labels() {
                    // Those of one container share them.
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

    /// One page of at most `limit` files that an aggregated finding stands for;
    /// fewer if their paths are long.
    pub fn members(
        &self,
        finding: FindingId,
        after: Option<MemberToken>,
        limit: usize,
    ) -> Result<MembersPage, Error> {
        let after = after.map_or(Vec::new(), |token| token.0.as_bytes().to_vec());
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT {MEMBER} FROM member WHERE finding = ? AND path > ?
                     ORDER BY path LIMIT ?"
                ))
                .map_err(&failed)?;
            let most = i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX);
            let mut rows =
                query.query(params![finding.to_string(), after, most]).map_err(&failed)?;
            let mut members: Vec<Member> = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.next().map_err(&failed)? {
                if members.len() == limit || bytes > PAGE_BYTES {
                    let next = members.last().map(|last| MemberToken(last.path.clone()));
                    return Ok(MembersPage { members, next });
                }
                let member = member(row, &self.path)?;
                bytes += member.path.as_bytes().len() + 128;
                members.push(member);
            }
            Ok(MembersPage { members, next: None })
        })
    }

    /// How many findings are kept.
    pub fn count(&self) -> Result<u64, Error> {
        self.ask(|connection| {
            connection
                .query_row("SELECT count(*) FROM finding", [], |row| row.get::<_, i64>(0))
                .map(i64::unsigned_abs)
                .map_err(Error::sql("read", &self.path))
        })
    }

    /// The newest cursor there is.
    pub fn newest(&self) -> Result<u64, Error> {
        self.ask(|connection| newest_seq(connection).map_err(Error::sql("read", &self.path)))
    }

    /// Up to `limit` records after `cursor` that concern `filter`, and how far
    /// that looked. A gap concerns a filter unless it is another container's; a
    /// response and a session concern their container only.
    pub fn after(&self, cursor: u64, filter: &Filter, limit: usize) -> Result<Followed, Error> {
        self.page_after(cursor, filter, limit, usize::MAX)
    }

    /// The same; fewer if they have more than about `bytes` of JSON.
    pub fn page_after(
        &self,
        cursor: u64,
        filter: &Filter,
        limit: usize,
        bytes: usize,
    ) -> Result<Followed, Error> {
        let mut of_finding = Conditions::of(filter, "finding.");
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

        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            // One transaction: rows, newest and pruned belong to the same moment.
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
                let kind: String = row.get(1).map_err(&failed)?;
                followed
                    .records
                    .push((seq.unsigned_abs(), json::record(row, &kind, 2, &self.path)?));
            }
            Ok(followed)
        })
    }

    /// The responses to a container, oldest first.
    pub fn responses(&self, container: &ContainerId) -> Result<Vec<Response>, Error> {
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT json FROM record
                     WHERE type = 'response' AND container = ? AND namespace = ? ORDER BY seq",
                )
                .map_err(&failed)?;
            let mut rows =
                query.query(params![&*container.id, &*container.namespace]).map_err(&failed)?;
            let mut responses = Vec::new();
            while let Some(row) = rows.next().map_err(&failed)? {
                if let Record::Response(response) = json::record(row, "response", 0, &self.path)? {
                    responses.push(*response);
                }
            }
            Ok(responses)
        })
    }

    /// Every container with a finding, a session or a probe that a person names by
    /// `text`; see [`ContainerId::named_by`]. A whole ID beats a beginning.
    pub fn containers(&self, text: &str) -> Result<Vec<ContainerId>, Error> {
        let whole = match text.split_once('/') {
            Some((namespace, id)) => {
                self.select_containers("container = ?1 AND namespace = ?2", &[id, namespace])?
            }
            None => self.select_containers("container = ?1", &[text])?,
        };
        if !whole.is_empty() {
            return Ok(whole);
        }
        let mut found = self.containers_beginning_with(text)?;
        found.retain(|container| container.named_by(text).is_some());
        Ok(found)
    }

    /// Those whose ID begins with `text`, which may name none of them.
    pub fn containers_beginning_with(&self, text: &str) -> Result<Vec<ContainerId>, Error> {
        let (condition, id, namespace) = match text.split_once('/') {
            Some((namespace, id)) => ("AND namespace = ?3", id, Some(namespace)),
            None => ("", text, None),
        };
        if id.is_empty() {
            return Ok(Vec::new());
        }
        // The greatest character there is: the end of all texts that begin with `id`.
        let end = format!("{id}{}", char::MAX);
        let values: Vec<&str> = [id, &end].into_iter().chain(namespace).collect();
        self.select_containers(&format!("container BETWEEN ?1 AND ?2 {condition}"), &values)
    }

    fn select_containers(
        &self,
        condition: &str,
        values: &[&str],
    ) -> Result<Vec<ContainerId>, Error> {
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            connection
                .prepare_cached(&format!(
                    "SELECT namespace, container FROM finding WHERE {condition}
                     UNION SELECT namespace, container FROM session WHERE {condition}
                     UNION SELECT namespace, container FROM probe WHERE {condition}
                     ORDER BY namespace, container LIMIT 1000"
                ))
                .and_then(|mut query| {
                    query
                        .query_map(params_from_iter(values), |row| {
                            Ok(ContainerId::new(
                                &row.get::<_, String>(0)?,
                                &row.get::<_, String>(1)?,
                            ))
                        })?
                        .collect()
                })
                .map_err(&failed)
        })
    }

    pub(super) fn ask<T>(
        &self,
        ask: impl FnOnce(&mut Connection) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let lock = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.generation.load(Ordering::Acquire);
        let idle = {
            let mut idle = lock();
            idle.retain(|(generation, _)| *generation == current);
            idle.pop()
        };
        let mut connection = match idle {
            Some((_, connection)) => connection,
            None => self.connect()?,
        };
        let answer = ask(&mut connection);
        let mut idle = lock();
        if idle.len() < IDLE {
            idle.push((current, connection));
        }
        answer
    }

    fn connect(&self) -> Result<Connection, Error> {
        let failed = Error::sql("open", &self.path);
        let connection = match self.memory.get() {
            Some(overlay) => overlay.read(),
            None => {
                let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
                Connection::open_with_flags(&self.path, flags)
            }
        };
        let connection = connection.map_err(&failed)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(&failed)?;
        // In KiB: there are many of them, and the kernel has a cache too.
        connection.pragma_update(None, "cache_size", -256).map_err(&failed)?;
        // The last one to close a file that is gone would remove the side files of the
        // one that has its name now.
        connection
            .set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
            .map_err(&failed)?;
        Ok(connection)
    }
}

/// How long the text in a column is.
pub(super) fn length(row: &Row<'_>, column: usize) -> rusqlite::Result<usize> {
    Ok(row.get_ref(column)?.as_str()?.len())
}

/// The columns that [`member`] reads, from the first on.
pub(super) const MEMBER: &str = "path, kind, blake3, first_seen, last_seen, removed";

pub(super) fn member(row: &Row<'_>, path: &Path) -> Result<Member, Error> {
    let failed = Error::sql("read", path);
    let corrupt =
        |what: &str| Error::Corrupt { path: path.into(), detail: format!("a member's {what}") };
    let time = |column| -> Result<Timestamp, Error> {
        Timestamp::from_microsecond(row.get(column).map_err(&failed)?).map_err(|_| corrupt("time"))
    };
    let kind: String = row.get(1).map_err(&failed)?;
    let blake3: Option<String> = row.get(2).map_err(&failed)?;
    Ok(Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: RootfsPath::new(row.get::<_, Vec<u8>>(0).map_err(&failed)?)
            .map_err(|_| corrupt("path"))?,
        kind: kind.parse().map_err(|_| corrupt("kind"))?,
        blake3: blake3.map(|hash| hash.parse()).transpose().map_err(|_| corrupt("content"))?,
        first_seen: time(3)?,
        last_seen: time(4)?,
        removed: row.get(5).map_err(&failed)?,
    })
}

/// Parts of a WHERE clause with the values of their placeholders.
#[derive(Debug, Default)]
struct Conditions {
    parts: Vec<String>,
    values: Vec<Value>,
}

impl Conditions {
    /// `table` is put before every column's name, as in `finding.`.
    fn of(filter: &Filter, table: &str) -> Conditions {
        let mut all = Conditions::default();
        if let Some(container) = &filter.container {
            all.add(&format!("{table}container = ?"), [Value::Text(container.id.to_string())]);
            all.add(
                &format!("{table}namespace = ?"),
                [Value::Text(container.namespace.to_string())],
            );
        }
        if let Some(image) = &filter.image {
            let column =
                if image.parse::<ManifestDigest>().is_ok() { "manifest_digest" } else { "image" };
            all.add(&format!("{table}{column} = ?"), [Value::Text(image.clone())]);
        }
        if !filter.kinds.is_empty() {
            let placeholders = vec!["?"; filter.kinds.len()].join(", ");
            all.add(
                &format!("{table}kind IN ({placeholders})"),
                filter.kinds.iter().map(|kind| Value::Text(kind.name().into())),
            );
        }
        if let Some(severity) = filter.minimum_severity {
            all.add(&format!("{table}severity >= ?"), [Value::Integer(severity as i64 + 1)]);
        }
        if let Some(since) = filter.since {
            all.add(&format!("{table}last_seen >= ?"), [Value::Integer(since.as_microsecond())]);
        }
        if let Some(until) = filter.until {
            all.add(&format!("{table}first_seen <= ?"), [Value::Integer(until.as_microsecond())]);
        }
        all
    }

    fn of_sessions(filter: &SessionFilter) -> Conditions {
        let mut all = Conditions::default();
        if let Some(container) = &filter.container {
            all.add("container = ?", [Value::Text(container.id.to_string())]);
            all.add("namespace = ?", [Value::Text(container.namespace.to_string())]);
        }
        if let Some(state) = filter.state {
            all.add("state = ?", [Value::Text(state.name().into())]);
        }
        if let Some(since) = filter.since {
            all.add(
                "(state = 'open' OR coalesce(ended_at, changed_at) >= ?)",
                [Value::Integer(since.as_microsecond())],
            );
        }
        if let Some(until) = filter.until {
            all.add("started_at <= ?", [Value::Integer(until.as_microsecond())]);
        }
        all
    }

    fn add(&mut self, part: &str, values: impl IntoIterator<Item = Value>) {
        self.parts.push(part.to_owned());
        self.values.extend(values);
    }

    fn joined(&self) -> String {
        self.parts.join(" AND ")
    }

    fn sql(&self) -> String {
        if self.parts.is_empty() { String::new() } else { format!("WHERE {}", self.joined()) }
    }
}
