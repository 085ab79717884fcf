//! Carries a response out, through containerd, and says what came of it.

use jiff::Timestamp;

use crate::model::{ContainerId, FindingId, Outcome};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Kill,
    Pause,
    Resume,
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Action::Kill => "kill",
            Action::Pause => "pause",
            Action::Resume => "resume",
        }
    }
}

/// A response somebody or some setting asked for.
#[derive(Debug)]
pub struct Order {
    pub container: ContainerId,
    pub action: Action,
    pub reason: String,
    /// `uid 0 (pid 4242)` for a person, `setting respond.kill_on` for the policy.
    pub requested_by: String,
    pub requested_at: Timestamp,
    /// The finding that asked for it.
    pub finding: Option<FindingId>,
}

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub container: ContainerId,
    pub reason: String,
    pub requested_by: String,
    pub requested_at: Timestamp,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}
