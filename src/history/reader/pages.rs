//! Pages, the tokens that lead to the next one, and other results of reading. Pure.
//!
//! A token is a text that `api` hands to its clients. Its format stays the same, because a client
//! may send it to a newer driftd.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::Serialize;

use crate::history::json::FindingText;
use crate::history::record::Record;
use crate::model::finding::hex;
use crate::model::{
    Command, ContainerId, Finding, FindingId, Member, Probe, RootfsPath, Session, SessionId,
};

/// Most JSON on one page: below the 4 MiB that a gRPC client accepts by default.
pub(super) const PAGE_BYTES: usize = 2 << 20;

/// The other containers in which a finding's content was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AlsoIn {
    /// How many there are.
    pub containers: u32,
    /// Some of them, the one with the newest sighting first.
    pub newest: Vec<ContainerId>,
}

/// How often a rule has matched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleHits {
    /// Sightings.
    pub hits: u64,
    pub last: Timestamp,
}

/// Where the next page begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageToken<Id = FindingId> {
    pub(super) time: i64,
    pub(super) id: Id,
}

/// The text is not a token that a page has handed out.
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

/// Where the next page of commands begins: after the command with this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandToken(pub(super) u64);

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
pub struct MemberToken(pub(super) RootfsPath);

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
        // Another spelling of the path would begin elsewhere.
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
pub struct FindingsPage<F = Finding> {
    /// Newest `last_seen` first.
    pub findings: Vec<F>,
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

/// A record for a follower who sends findings on as they are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Stored {
    Finding(FindingText),
    Other(Record),
}

/// What follows a cursor.
#[derive(Clone, Debug, PartialEq)]
pub struct Followed<R = Record> {
    /// Oldest first, each with its cursor.
    pub records: Vec<(u64, R)>,
    /// Every record up to here was read.
    pub cursor: u64,
    /// Whether there are more records already.
    pub more: bool,
    /// Some records up to this cursor have been pruned.
    pub pruned_through: u64,
}

/// What an ID, or the beginning of one, leads to.
#[derive(Clone, Debug, PartialEq)]
pub enum Lookup<T> {
    Found(Box<T>),
    Unknown,
    /// How many IDs begin with the text.
    Ambiguous(u64),
}

pub type FindingLookup = Lookup<Finding>;
pub type SessionLookup = Lookup<Session>;
pub type ProbeLookup = Lookup<Probe>;
