//! The timeline of one container: everything that happened in it, in the order of time.
//!
//! Each source yields the next few of its entries by an index of its own, and the earliest of
//! all comes first. Entries of the same time come in the order of [`Source::ALL`].

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use rusqlite::{Connection, named_params, params};

use super::connection::Reader;
use super::pages::{BadPageToken, PAGE_BYTES};
use crate::history::error::Error;
use crate::history::json::{self, FindingText, Kept as _};
use crate::model::{Command, ContainerId, Finding, Session};
use crate::respond::Response;

#[derive(Clone, Debug, PartialEq)]
pub struct TimelineEntry<F = Finding> {
    pub at: Timestamp,
    pub what: Happened<F>,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Happened<F = Finding> {
    SessionOpened(Box<Session>),
    /// A session ran a command.
    Command(Box<Command>),
    /// Something was found for the first time.
    Finding(Box<F>),
    /// A session ended, or its end was noticed.
    SessionClosed(Box<Session>),
    Response(Box<Response>),
    /// Something was not observed, in this container or in any.
    Gap {
        name: String,
        container: Option<ContainerId>,
        detail: String,
        /// When a scan had made up for it.
        until: Option<Timestamp>,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct TimelinePage {
    /// Oldest first.
    pub entries: Vec<TimelineEntry<FindingText>>,
    /// `None` on the last page.
    pub next: Option<TimelineToken>,
}

/// Where the next page begins: after this entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimelineToken {
    at: i64,
    source: Source,
    key: String,
}

impl fmt::Display for TimelineToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.at, self.source as usize, self.key)
    }
}

impl FromStr for TimelineToken {
    type Err = BadPageToken;

    fn from_str(text: &str) -> Result<TimelineToken, BadPageToken> {
        let mut parts = text.splitn(3, '.');
        let mut part = || parts.next().ok_or(BadPageToken);
        let at = part()?.parse().map_err(|_| BadPageToken)?;
        let source: usize = part()?.parse().map_err(|_| BadPageToken)?;
        let source = *Source::ALL.get(source).ok_or(BadPageToken)?;
        let key = part()?;
        let is_key = !key.is_empty()
            && key.len() < 64
            && key.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'.');
        if is_key {
            Ok(TimelineToken { at, source, key: key.to_owned() })
        } else {
            Err(BadPageToken)
        }
    }
}

/// Where entries come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    Opened,
    Command,
    Finding,
    Closed,
    Response,
    Gap,
}

/// A gap may be recorded twice. Selects the later record, which has its end.
const LATEST_OF_GAP: &str = "NOT EXISTS (
    SELECT 1 FROM record AS later
    WHERE later.type = 'gap' AND later.container IS record.container
        AND later.namespace IS record.namespace AND later.at = record.at
        AND later.seq > record.seq AND later.json ->> '$.name' = record.json ->> '$.name')";

impl Source {
    const ALL: [Source; 6] = [
        Source::Opened,
        Source::Command,
        Source::Finding,
        Source::Closed,
        Source::Response,
        Source::Gap,
    ];

    /// The table, and the condition that its rows meet.
    fn rows(self) -> String {
        let own = "container = :container AND namespace = :namespace";
        match self {
            Source::Opened => format!("session WHERE {own}"),
            Source::Command => format!("command WHERE {own}"),
            Source::Finding => format!("finding WHERE {own}"),
            Source::Closed => format!("session WHERE state = 'closed' AND {own}"),
            Source::Response => format!("record WHERE type = 'response' AND {own}"),
            Source::Gap => format!(
                "record WHERE type = 'gap' AND (container IS NULL OR {own}) AND {LATEST_OF_GAP}"
            ),
        }
    }

    fn time(self) -> &'static str {
        match self {
            Source::Opened | Source::Command => "started_at",
            Source::Finding => "first_seen",
            Source::Closed => "coalesce(ended_at, changed_at)",
            Source::Response | Source::Gap => "at",
        }
    }

    /// A text that orders entries of the same time, and by which the row is found again.
    fn key(self) -> &'static str {
        match self {
            Source::Opened | Source::Finding | Source::Closed => "id",
            Source::Command => "printf('%s.%020d', session, number)",
            Source::Response | Source::Gap => "printf('%020d', seq)",
        }
    }

    /// The JSON of the row with this key.
    fn json(self, connection: &Connection, key: &str) -> rusqlite::Result<String> {
        let number = |text: &str| text.parse::<i64>().unwrap_or(0);
        match self {
            Source::Opened | Source::Closed => connection
                .prepare_cached(&format!("SELECT {} FROM session WHERE id = ?", Session::column()))?
                .query_row([key], |row| row.get(0)),
            Source::Finding => connection
                .prepare_cached(&format!("SELECT {} FROM finding WHERE id = ?", Finding::column()))?
                .query_row([key], |row| row.get(0)),
            Source::Command => {
                let (session, digits) = key.split_once('.').unwrap_or_default();
                connection
                    .prepare_cached("SELECT json FROM command WHERE session = ? AND number = ?")?
                    .query_row(params![session, number(digits)], |row| row.get(0))
            }
            Source::Response | Source::Gap => connection
                .prepare_cached("SELECT json FROM record WHERE seq = ?")?
                .query_row([number(key)], |row| row.get(0)),
        }
    }

    fn read(self, text: &str) -> serde_json::Result<Happened<FindingText>> {
        Ok(match self {
            Source::Opened => Happened::SessionOpened(serde_json::from_str(text)?),
            Source::Command => Happened::Command(serde_json::from_str(text)?),
            Source::Finding => Happened::Finding(Box::new(FindingText::read(text)?)),
            Source::Closed => Happened::SessionClosed(serde_json::from_str(text)?),
            Source::Response => Happened::Response(Box::new(Response::read(text)?)),
            Source::Gap => {
                let gap = json::gap(text)?;
                Happened::Gap {
                    name: gap.name,
                    container: gap.container,
                    detail: gap.detail,
                    until: gap.until,
                }
            }
        })
    }
}

/// The keys of the next entries: a few of each source, then the earliest of all of them.
fn query() -> String {
    let parts: Vec<String> = Source::ALL
        .into_iter()
        .map(|source| {
            let (rows, time, key) = (source.rows(), source.time(), source.key());
            let number = source as usize;
            format!(
                "SELECT * FROM (
                    SELECT {time} AS time, {number} AS source, {key} AS key FROM {rows}
                    AND {time} BETWEEN max(:since, :at) AND :until
                    AND ({time} > :at OR {number} > :source OR ({number} = :source AND {key} > :key))
                    ORDER BY 1, 3 LIMIT :limit)"
            )
        })
        .collect();
    format!("{} ORDER BY 1, 2, 3 LIMIT :limit", parts.join(" UNION ALL "))
}

impl Reader {
    /// One page of at most `limit` entries of a container's timeline, from `since` to
    /// `until`; fewer if they are large.
    pub fn timeline(
        &self,
        container: &ContainerId,
        since: Option<Timestamp>,
        until: Option<Timestamp>,
        after: Option<TimelineToken>,
        limit: usize,
    ) -> Result<TimelinePage, Error> {
        let after = after.unwrap_or(TimelineToken {
            at: i64::MIN,
            source: Source::Opened,
            key: String::new(),
        });
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            // One transaction, so that every key still has its row.
            let transaction = connection.transaction().map_err(&failed)?;
            let mut query = transaction.prepare_cached(&query()).map_err(&failed)?;
            let mut rows = query
                .query(named_params! {
                    ":container": container.id,
                    ":namespace": container.namespace,
                    ":since": since.map_or(i64::MIN, Timestamp::as_microsecond),
                    ":until": until.map_or(i64::MAX, Timestamp::as_microsecond),
                    ":at": after.at,
                    ":source": after.source as u8,
                    ":key": after.key,
                    ":limit": i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX),
                })
                .map_err(&failed)?;
            let (mut entries, mut bytes, mut last) = (Vec::new(), 0, None);
            while let Some(row) = rows.next().map_err(&failed)? {
                if entries.len() == limit || bytes > PAGE_BYTES {
                    return Ok(TimelinePage { entries, next: last });
                }
                let time: i64 = row.get(0).map_err(&failed)?;
                let source = Source::ALL[usize::from(row.get::<_, u8>(1).map_err(&failed)?)];
                let key: String = row.get(2).map_err(&failed)?;
                let text = source.json(&transaction, &key).map_err(&failed)?;
                bytes += text.len();
                let corrupt = |why: &dyn fmt::Display| Error::Corrupt {
                    path: self.path.clone(),
                    detail: format!("{source:?} {key}: {why}"),
                };
                let what = source.read(&text).map_err(|err| corrupt(&err))?;
                let at = Timestamp::from_microsecond(time).map_err(|err| corrupt(&err))?;
                entries.push(TimelineEntry { at, what });
                last = Some(TimelineToken { at: time, source, key });
            }
            Ok(TimelinePage { entries, next: None })
        })
    }
}
