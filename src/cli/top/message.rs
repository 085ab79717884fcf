//! What goes into the state of `driftd top`, and what it asks for. Values only.

use std::time::Instant;

use jiff::Timestamp;
use ratatui::crossterm::event::KeyEvent;

use crate::api::{convert, proto};
use crate::cli::containers::ContainerJson;
use crate::cli::status::StatusJson;
use crate::model::{Finding, Session, Severity};

/// Everything that can change what is shown.
pub(super) enum Input {
    Key(KeyEvent),
    /// Text that was pasted, and not typed.
    Pasted(String),
    Resized {
        width: u16,
        height: u16,
    },
    /// The time of day, once a second.
    Time(Timestamp),
    /// The daemon was asked for its state.
    Polled(Result<Box<Poll>, String>),
    /// From the stream that was asked for by the wish with this number.
    Followed(u64, Followed),
    /// The text of the finding or session with this ID.
    Shown(String, Result<String, String>),
    /// The outcome of a response.
    Answered(Result<Answered, String>),
}

/// The state of the daemon at one time.
pub(super) struct Poll {
    pub(super) at: Instant,
    pub(super) status: StatusJson,
    /// A daemon that is stuck has a status, which names the reason, and nothing else.
    pub(super) node: Result<Node, String>,
}

/// What runs on the node.
pub(super) struct Node {
    pub(super) containers: Vec<ContainerJson>,
    /// The open sessions, newest first.
    pub(super) sessions: Vec<Session>,
    /// There are more open sessions than these.
    pub(super) more_sessions: bool,
}

/// News of the findings.
pub(super) enum Followed {
    /// The newest findings that the history holds, and whether there are more. They take the
    /// place of all that came before.
    Listed(Vec<Finding>, bool),
    /// One that is new, or has changed.
    Finding(Box<Finding>),
    /// The stream has ended, or could not be opened.
    Lost(String),
}

/// A response that was carried out, or failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answered {
    pub(super) succeeded: bool,
    /// Safe for a terminal.
    pub(super) text: String,
}

/// Which findings are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// One more for each wish.
    pub(super) number: u64,
    /// That hold this text anywhere; empty for all.
    pub(super) text: String,
    /// With this severity or a higher one.
    pub(super) floor: Option<Severity>,
    /// In this container, as NAMESPACE/ID; empty for all.
    pub(super) container: String,
}

impl Wish {
    pub(super) fn to_proto(&self) -> proto::FindingFilter {
        proto::FindingFilter {
            container: self.container.clone(),
            minimum_severity: self
                .floor
                .map_or(proto::Severity::Unspecified, convert::severity_to_proto)
                .into(),
            texts: Some(&self.text).filter(|text| !text.is_empty()).into_iter().cloned().collect(),
            ..Default::default()
        }
    }
}

/// What the state asks for.
#[derive(Debug, PartialEq)]
pub(super) enum Effect {
    Quit,
    /// Stop until the shell continues it.
    Suspend,
    /// Draw the whole screen anew.
    Redraw,
    Follow(Wish),
    /// The text of a finding or session.
    Show(String),
    Respond(Box<proto::RespondRequest>),
}
