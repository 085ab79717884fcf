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
use serde::Serialize;

use super::json::Kept;
use super::writer::newest_seq;
use super::{Error, Record, json, memory};
use crate::model::finding::{MEMBER_SCHEMA, hex};
use crate::model::{
    Command, ContainerId, Finding, FindingId, Kind, Labels, Member, Probe, RootfsPath, Session,
    SessionId, SessionState, Severity,
};
use crate::respond::{RESTART, Response};

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
/// Most containers that are named where the same content was found.
const ALSO_IN: usize = 10;

/// The other containers in which a finding's content was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AlsoIn {
    /// How many they are.
    pub containers: u32,
    /// Some of them: where it was seen last comes first.
    pub newest: Vec<ContainerId>,
}

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
    pub content: Content,
}

/// What a finding must hold. Of several paths, hashes, sessions, pods or namespaces it
/// must hold one; of labels and texts all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// A path, or a directory above it; `*` and `?` stand for any text.
    pub paths: Vec<String>,
    /// Beginnings of hashes.
    pub hashes: Vec<String>,
    /// Beginnings of IDs.
    pub sessions: Vec<String>,
    /// NAME or NAMESPACE/NAME; `*` and `?` stand for any text.
    pub pods: Vec<String>,
    pub pod_namespaces: Vec<String>,
    /// KEY or KEY=VALUE.
    pub labels: Vec<String>,
    pub texts: Vec<String>,
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
    opening: Opening,
}

/// How a connection is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opening {
    /// Beside a writer.
    Shared,
    /// No process writes, and the reader writes no file at all. What a writer has
    /// not moved into the database yet is read where it lies.
    WithLog,
    /// The same, without such a rest.
    Immutable,
}

impl Reader {
    pub(super) fn new(path: PathBuf, generation: Arc<AtomicU64>, memory: memory::Shared) -> Reader {
        Reader { path, generation, memory, idle: Arc::default(), opening: Opening::Shared }
    }

    /// Reads the history at `path`, or in the state directory at `path`, and changes
    /// nothing there. A driftd may be using it.
    pub fn of_file(path: &Path) -> Result<Reader, Error> {
        let path = if path.is_dir() { path.join(super::FILE) } else { path.to_owned() };
        std::fs::metadata(&path).map_err(Error::io("read the history", &path))?;
        let mut log = path.clone().into_os_string();
        log.push("-wal");
        let has_log = std::fs::metadata(log).is_ok_and(|log| log.len() > 0);
        let mut reader = Reader::new(path, Arc::default(), memory::Shared::default());
        reader.opening = match has_log {
            _ if super::is_in_use(&reader.path) => Opening::Shared,
            true => Opening::WithLog,
            false => Opening::Immutable,
        };
        let found = reader.ask(|connection| super::schema::check(connection, &reader.path))?;
        if found < super::FORMAT {
            return Err(Error::OlderFormat { path: reader.path, found, supported: super::FORMAT });
        }
        Ok(reader)
    }

    /// One page of at most `limit` findings; fewer if they are large.
    pub fn findings(
        &self,
        filter: &Filter,
        after: Option<PageToken>,
        limit: usize,
    ) -> Result<FindingsPage, Error> {
        let conditions = Conditions::of(filter, &self.images(filter)?);
        let (findings, next) =
            self.page(conditions, "last_seen", after, limit, |one: &Finding| one.id)?;
        Ok(FindingsPage { findings, next })
    }

    /// The images of findings that the filter's text names. A whole name beats an end.
    fn images(&self, filter: &Filter) -> Result<Vec<String>, Error> {
        let Some(text) = filter.image.as_deref() else { return Ok(Vec::new()) };
        let known: Vec<String> = self.ask(|connection| {
            connection
                // Each step finds the next name in the index: findings are many, images few.
                .prepare_cached(
                    "WITH RECURSIVE known (image) AS (
                         SELECT min(image) FROM finding
                         UNION ALL
                         SELECT (SELECT min(image) FROM finding WHERE image > known.image)
                         FROM known WHERE known.image IS NOT NULL
                     )
                     SELECT image FROM known WHERE image IS NOT NULL",
                )
                .and_then(|mut query| query.query_map([], |row| row.get(0))?.collect())
                .map_err(Error::sql("read", &self.path))
        })?;
        if known.iter().any(|name| name == text) {
            return Ok(vec![text.to_owned()]);
        }
        Ok(known.into_iter().filter(|name| is_named(name, text)).collect())
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

    /// Where else the content of a finding's file was found, in a file of its own or among
    /// those that one finding stands for.
    pub fn also_in(&self, finding: &Finding) -> Result<AlsoIn, Error> {
        let Some(content) = finding.file.as_ref().and_then(|file| file.blake3) else {
            return Ok(AlsoIn::default());
        };
        let (namespace, container) =
            finding.container_id().map_or(("", ""), |own| (&*own.namespace, &*own.id));
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT namespace, container, count(*) OVER () FROM (
                         SELECT namespace, container, last_seen FROM finding
                         WHERE json_extract(json, '$.file.blake3') = ?1
                             AND container IS NOT NULL
                         UNION ALL
                         SELECT finding.namespace, finding.container, member.last_seen
                         FROM member JOIN finding ON finding.id = member.finding
                         WHERE member.blake3 = ?1 AND finding.container IS NOT NULL)
                     WHERE (namespace, container) <> (?2, ?3)
                     GROUP BY namespace, container
                     ORDER BY max(last_seen) DESC, namespace, container LIMIT {ALSO_IN}"
                ))
                .map_err(&failed)?;
            let mut rows =
                query.query(params![content.to_string(), namespace, container]).map_err(&failed)?;
            let mut also = AlsoIn::default();
            while let Some(row) = rows.next().map_err(&failed)? {
                let text = |column| row.get_ref(column)?.as_str().map_err(rusqlite::Error::from);
                let (namespace, id) = (text(0).map_err(&failed)?, text(1).map_err(&failed)?);
                also.newest.push(ContainerId::new(namespace, id));
                also.containers = row.get(2).map_err(&failed)?;
            }
            Ok(also)
        })
    }

    /// The last response to a container that was a kill which was carried out, or told that
    /// the container was started again after one.
    pub fn last_kill(&self, container: &ContainerId) -> Result<Option<Response>, Error> {
        self.ask(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT json FROM record
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
            Ok(match json::record(row, "response", 0, &self.path)? {
                Record::Response(response) => Some(*response),
                _ => None,
            })
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
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = match (self.memory.get(), self.opening) {
            (Some(overlay), _) => overlay.read(),
            (None, Opening::Shared) => Connection::open_with_flags(&self.path, flags),
            // No locks in the file, and the log's index in memory.
            (None, Opening::WithLog) => {
                Connection::open_with_flags_and_vfs(&self.path, flags, c"unix-none").and_then(
                    |connection| {
                        connection.pragma_update_and_check(
                            None,
                            "locking_mode",
                            "EXCLUSIVE",
                            |_| Ok(()),
                        )?;
                        Ok(connection)
                    },
                )
            }
            (None, Opening::Immutable) => Connection::open_with_flags(
                immutable(&self.path),
                flags | OpenFlags::SQLITE_OPEN_URI,
            ),
        }
        .map_err(&failed)?;
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

/// A file as SQLite names one that does not change.
fn immutable(path: &Path) -> String {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut uri = "file:".to_owned();
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' => uri.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            byte => uri.push_str(&format!("%{byte:02x}")),
        }
    }
    uri + "?immutable=1"
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

/// Text with `*` or `?` as SQLite's GLOB reads it; `None` without either of them.
fn pattern(text: &str) -> Option<String> {
    text.contains(['*', '?']).then(|| text.replace('[', "[[]"))
}

/// The manifest digests that begin like `text`, if it is the beginning of one.
fn digest_range(text: &str) -> Option<(String, String)> {
    let digits = text.strip_prefix("sha256:")?.to_ascii_lowercase();
    let is_digest = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    // `g` sorts after every hexadecimal digit.
    is_digest.then(|| (format!("sha256:{digits}"), format!("sha256:{digits}g")))
}

/// Whether `text` is the name of an image, or its last components; without a tag it is of
/// any tag.
fn is_named(name: &str, text: &str) -> bool {
    let untagged = |name: &'_ str| -> usize {
        let last = name.rfind('/').map_or(0, |slash| slash + 1);
        name[last..].find(':').map_or(name.len(), |colon| last + colon)
    };
    let mut name = name;
    if !text.contains('@') {
        name = name.split_once('@').map_or(name, |(name, _)| name);
        if untagged(text) == text.len() {
            name = &name[..untagged(name)];
        }
    }
    let ends = |name: &str| {
        name.strip_suffix(text).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    };
    // As Docker abbreviates it.
    let short = name.strip_prefix("docker.io/library/").map(|rest| format!("docker.io/{rest}"));
    !text.is_empty() && (ends(name) || short.is_some_and(|short| ends(&short)))
}

/// Parts of a WHERE clause with the values of their placeholders.
#[derive(Debug, Default)]
struct Conditions {
    parts: Vec<String>,
    values: Vec<Value>,
}

impl Conditions {
    /// `images`: the names that the filter's image stands for.
    fn of(filter: &Filter, images: &[String]) -> Conditions {
        let mut all = Conditions::default();
        if let Some(container) = &filter.container {
            all.add("finding.container = ?", [Value::Text(container.id.to_string())]);
            all.add("finding.namespace = ?", [Value::Text(container.namespace.to_string())]);
        }
        if let Some(image) = &filter.image {
            match digest_range(image) {
                Some((first, beyond)) => all.add(
                    "(finding.manifest_digest >= ? AND finding.manifest_digest < ?)",
                    [Value::Text(first), Value::Text(beyond)],
                ),
                None => all.add_in("finding.image", images.iter().map(String::as_str)),
            }
        }
        if !filter.kinds.is_empty() {
            all.add_in("finding.kind", filter.kinds.iter().map(|kind| kind.name()));
        }
        if let Some(severity) = filter.minimum_severity {
            all.add("finding.severity >= ?", [Value::Integer(severity as i64 + 1)]);
        }
        if let Some(since) = filter.since {
            all.add("finding.last_seen >= ?", [Value::Integer(since.as_microsecond())]);
        }
        if let Some(until) = filter.until {
            all.add("finding.first_seen <= ?", [Value::Integer(until.as_microsecond())]);
        }
        all.add_content(&filter.content);
        all
    }

    fn add_content(&mut self, content: &Content) {
        const PATH: &str = "coalesce(json_extract(finding.json, '$.file.path'), \
                            json_extract(finding.json, '$.expected.path'))";
        let member = |part: &str| {
            format!("EXISTS (SELECT 1 FROM member WHERE finding = finding.id AND {part})")
        };
        let text = |text: &str| Value::Text(text.to_owned());
        self.add_any(&content.paths, |path| match pattern(path) {
            Some(pattern) => (
                format!("({PATH} GLOB ? OR {})", member("CAST(path AS TEXT) GLOB ?")),
                vec![text(&pattern), text(&pattern)],
            ),
            None => {
                let path = path.trim_end_matches('/');
                // `0` follows `/`.
                let (below, beyond) = (format!("{path}/"), format!("{path}0"));
                let inside =
                    |column: &str| format!("({column} = ? OR ({column} >= ? AND {column} < ?))");
                let blob = |text: &str| Value::Blob(text.as_bytes().to_vec());
                (
                    format!("({} OR {})", inside(PATH), member(&inside("path"))),
                    vec![
                        text(path),
                        text(&below),
                        text(&beyond),
                        blob(path),
                        blob(&below),
                        blob(&beyond),
                    ],
                )
            }
        });
        self.add_any(&content.hashes, |hash| {
            let begins = |column: &str| format!("substr({column}, 1, length(?1)) = ?1");
            let parts = [
                begins("json_extract(finding.json, '$.file.blake3')"),
                begins("json_extract(finding.json, '$.file.sha256')"),
                member(&begins("blake3")),
            ];
            let part = format!("({})", parts.join(" OR ")).replace("?1", "?");
            (part, vec![text(hash); 6])
        });
        self.add_any(&content.sessions, |session| {
            (
                "substr(json_extract(finding.json, '$.session'), 1, length(?)) = ?".to_owned(),
                vec![text(session), text(session)],
            )
        });
        const POD: &str = "json_extract(finding.json, '$.container.pod.name')";
        const POD_NAMESPACE: &str = "json_extract(finding.json, '$.container.pod.namespace')";
        self.add_any(&content.pods, |pod| {
            let of = if pod.contains('/') {
                format!("{POD_NAMESPACE} || '/' || {POD}")
            } else {
                POD.to_owned()
            };
            match pattern(pod) {
                Some(pattern) => (format!("{of} GLOB ?"), vec![text(&pattern)]),
                None => (format!("{of} = ?"), vec![text(pod)]),
            }
        });
        self.add_any(&content.pod_namespaces, |namespace| {
            (format!("{POD_NAMESPACE} = ?"), vec![text(namespace)])
        });
        for label in &content.labels {
            let (key, value) = match label.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (&**label, None),
            };
            let values = [Some(key), value].into_iter().flatten().map(text);
            self.add(
                &format!(
                    "EXISTS (SELECT 1 FROM json_each(coalesce(
                         (SELECT labels.json FROM labels
                          WHERE labels.container = finding.container
                              AND labels.namespace = finding.namespace
                              AND labels.id = finding.labels),
                         json_extract(finding.json, '$.container.labels'), '{{}}'))
                     WHERE key = ? {})",
                    if value.is_some() { "AND value = ?" } else { "" }
                ),
                values,
            );
        }
        for wanted in &content.texts {
            // Values only: the names of keys are in all of them. Arguments also as they
            // are written in a shell.
            self.add(
                &format!(
                    "(EXISTS (SELECT 1 FROM json_tree(finding.json)
                              WHERE atom IS NOT NULL AND key IS NOT 'schema'
                                  AND instr(lower(atom), lower(?)) > 0)
                      OR instr(lower((SELECT group_concat(value, ' ')
                                      FROM json_each(finding.json, '$.process.argv'))),
                               lower(?)) > 0
                      OR {})",
                    member("instr(lower(CAST(path AS TEXT)), lower(?)) > 0")
                ),
                vec![text(wanted); 3],
            );
        }
    }

    /// That one of `wanted` is met.
    fn add_any(
        &mut self,
        wanted: &[String],
        mut condition: impl FnMut(&str) -> (String, Vec<Value>),
    ) {
        if wanted.is_empty() {
            return;
        }
        let (parts, values): (Vec<String>, Vec<Vec<Value>>) =
            wanted.iter().map(|one| condition(one)).unzip();
        self.add(&format!("({})", parts.join(" OR ")), values.into_iter().flatten());
    }

    fn add_in<'a>(&mut self, column: &str, values: impl Iterator<Item = &'a str>) {
        let values: Vec<Value> = values.map(|value| Value::Text(value.to_owned())).collect();
        let placeholders = vec!["?"; values.len()].join(", ");
        self.add(&format!("{column} IN ({placeholders})"), values);
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

#[cfg(test)]
mod tests {
    use super::is_named;

    #[test]
    fn u14_an_image_is_found_by_the_end_of_its_name() {
        let nginx = "docker.io/library/nginx:1.25";
        for text in ["nginx", "nginx:1.25", "library/nginx", "docker.io/nginx", nginx] {
            assert!(is_named(nginx, text), "{text}");
        }
        for text in ["", "ginx", "nginx:1", "nginx:1.2", "/nginx", "nginx/", "other/nginx", "1.25"]
        {
            assert!(!is_named(nginx, text), "{text}");
        }
        assert!(is_named("registry.example:5000/team/shop:1.4", "shop"));
        assert!(is_named("registry.example:5000/team/shop", "team/shop"));
        assert!(is_named("registry.example/shop:1@sha256:00ff", "shop:1"));
        assert!(is_named("registry.example/shop:1@sha256:00ff", "shop:1@sha256:00ff"));
        assert!(!is_named("registry.example/shop:1@sha256:00ff", "shop:1@sha256:00"));
    }
}
