//! The one loop that owns driftd's mutable state.

use jiff::Timestamp;
use tokio::sync::oneshot;

use crate::model::{Container, ContainerId, Kind, RootfsPath, Severity};
use crate::respond::{Action, Response};

/// What the API asks of the loop. Replies are sent from the loop; an asker that
/// has gone is no error.
#[derive(Debug)]
pub enum Question {
    Status(oneshot::Sender<Status>),
    Containers(oneshot::Sender<Vec<ContainerView>>),
    /// Answered when the scan that this starts is over.
    Diff { container: String, reply: oneshot::Sender<Result<Diff, LookupError>> },
    /// Answered when the response was carried out and recorded.
    Respond {
        container: String,
        action: Action,
        reason: String,
        requested_by: String,
        reply: oneshot::Sender<Result<Response, LookupError>>,
    },
    /// Which one container a person means.
    Lookup { container: String, reply: oneshot::Sender<Result<ContainerId, LookupError>> },
}

/// The loop's own part of the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub started_at: Timestamp,
    pub endpoints: Vec<EndpointView>,
    pub containers_watched: u32,
    /// Containers whose baseline is not there yet.
    pub containers_waiting: u32,
    /// What is missing from the view, in words.
    pub problems: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointView {
    pub socket: String,
    pub connected: bool,
    pub reason: String,
}

/// A container as `driftd containers` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerView {
    pub container: Container,
    /// `ready`, `pending`, or `none: <reason>`.
    pub baseline: String,
    pub watched: bool,
    pub armed_before_start: bool,
    pub problem: Option<String>,
    pub findings: u64,
}

/// How a container differs from its image right now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    pub container: ContainerId,
    /// Sorted by path.
    pub differences: Vec<Difference>,
    pub incomplete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    pub path: RootfsPath,
    pub change: DifferenceKind,
    /// The finding this is; `None` when it is no drift.
    pub finding: Option<(Kind, Severity)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    Added,
    Modified,
    Removed,
    /// Same content; mode, owner, time or an attribute differ.
    Metadata,
    Relocated,
}

/// Why a question about one container has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("no container `{0}` is known (see: driftd containers)")]
    Unknown(String),
    #[error("`{0}` could be {1} containers: write more of the ID, or NAMESPACE/ID")]
    Ambiguous(String, usize),
    #[error("container {0} is not watched: {1}")]
    NotWatched(String, String),
    #[error("driftd is stopping")]
    Stopping,
}
