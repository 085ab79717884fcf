//! What the API requests from the loop, and the replies. Types only: `serve` and `status` make
//! the replies, and the room `api` converts them for clients.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::breaker::StoppedRule;
use super::gaps::Gap;
pub use crate::detect::Change as DifferenceKind;
use crate::model::{
    Container, ContainerId, Finding, FindingId, Incarnation, Kind, Probe, ProbeId, ProcessIdentity,
    RootfsPath, Severity,
};
use crate::policy::Policy;
use crate::respond::{Action, Response};

/// A request of the API. The loop sends the reply; it is no error if the client has gone.
#[derive(Debug)]
pub enum ApiRequest {
    Status(oneshot::Sender<Status>),
    Containers(oneshot::Sender<Vec<ContainerView>>),
    /// The reply comes when the scan that this starts is over.
    Diff {
        container: String,
        reply: oneshot::Sender<Result<Diff, LookupError>>,
    },
    /// The reply comes when the response was carried out and recorded.
    Respond {
        container: String,
        /// The finding that the response is for, and the run in which it was seen. Without
        /// one, the response is for the run that there is now.
        cause: Option<Box<(FindingId, Incarnation)>>,
        /// For a kill of one process: which. A start time of 0 stands for the process that has
        /// the pid now.
        process: Option<Box<ProcessIdentity>>,
        action: Action,
        reason: String,
        requested_by: String,
        no_restart: bool,
        /// For evidence: the values of environment variables are kept, too.
        environment: bool,
        /// For a hook: its name, and the finding that it gets.
        hook: Option<Box<(String, Finding)>>,
        reply: oneshot::Sender<Result<Response, LookupError>>,
    },
    /// Lets the answers of a rule, or of all rules, be carried out again. The reply names those
    /// that were stopped.
    ResumeAnswers {
        rule: Option<String>,
        reason: String,
        requested_by: String,
        reply: oneshot::Sender<Vec<StoppedRule>>,
    },
    /// Which container the text of a user names.
    Lookup {
        container: String,
        reply: oneshot::Sender<Result<ContainerId, LookupError>>,
    },
    /// The settings or the policy files were read again. They apply from now on.
    SetPolicy(Box<Policy>),
    /// The policy files were read again and refused: the rules stay.
    PolicyRefused(String),
    /// The rules in force.
    Policy(oneshot::Sender<Policy>),
    /// Whether a probe is reported from now on.
    SetProbe {
        probe: ProbeId,
        reported: bool,
        reply: oneshot::Sender<Result<Probe, LookupError>>,
    },
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
    /// The times in which the view was incomplete: first those that still last, then the
    /// others, newest first.
    pub gaps: Vec<Gap>,
    /// The rules whose answers are stopped.
    pub stopped_rules: Vec<StoppedRule>,
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
    pub findings_by_severity: BTreeMap<Severity, u64>,
    /// The losses that make the view of it incomplete now.
    pub incomplete: Vec<&'static str>,
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
    /// The finding that reports it; `None` if it is no drift.
    pub finding: Option<(Kind, Severity)>,
}

/// Why a request about one container cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    #[error("no container `{0}` is known (see: driftd containers)")]
    Unknown(String),
    #[error("`{0}` could be {1} containers: write more of the ID, or NAMESPACE/ID")]
    Ambiguous(String, usize),
    #[error(
        "no container `{0}` is known, and a beginning is no name: write the whole ID, \
         NAMESPACE/ID, or at least 8 digits of a hexadecimal ID (there is: {1})"
    )]
    NotWhole(String, String),
    #[error("container {0} is gone: nothing on this node has its ID now (see: driftd containers)")]
    Gone(String),
    #[error(
        "the run of container {0} in which the finding was seen is over (to respond to the \
         current run, name the container)"
    )]
    RunGone(String),
    #[error("container {0} is not watched: {1}")]
    NotWatched(String, String),
    #[error("probe {0} belongs to no container on this node (see: driftd probes)")]
    UnknownProbe(ProbeId),
    #[error("the settings have no hook `{0}` ([hooks.NAME] in /etc/driftd/driftd.toml)")]
    UnknownHook(String),
    #[error("driftd is stopping")]
    Stopping,
}
