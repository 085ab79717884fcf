//! What the pipeline hands to the history, and what followers receive from it.
//!
//! Plain values. `json` makes the text that the database stores for them.

use jiff::Timestamp;

use crate::model::{Command, ContainerId, Finding, Member, Probe, RootfsPath, Session};
use crate::respond::Response;

/// One record of the history. Records keep the order in which the pipeline made them.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// A finding's newest revision.
    Finding(Box<Finding>),
    /// A finding's newest revision, with the changes to its members. Both are kept, or
    /// neither.
    Aggregate {
        finding: Box<Finding>,
        changes: Vec<MemberChange>,
    },
    /// A session's newest revision, with its commands that are new or have ended.
    Session {
        session: Box<Session>,
        commands: Vec<Command>,
    },
    /// A probe's newest count.
    Probe(Box<Probe>),
    Response(Box<Response>),
    /// A named loss: something was not observed.
    Gap {
        name: String,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
        /// When a scan had made up for the loss. The loss is recorded first with `None`,
        /// and a second time with its end once that is known.
        until: Option<Timestamp>,
    },
}

/// A change to a member: one of the files that an aggregated finding stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberChange {
    /// The file is there, for the first time or with another content.
    Seen(Member),
    Gone {
        path: RootfsPath,
        at: Timestamp,
    },
}
