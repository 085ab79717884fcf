//! What a report holds, and its JSON `driftd.report/v1`.
//!
//! Values only. `collect.rs` and `gather.rs` fill them, the renderers read them.

use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;
use serde::Serialize;

use crate::cli::gap::GapJson;
use crate::cli::policy::PolicyJson;
use crate::cli::timeline::ResponseJson;
use crate::model::{
    CaseId, Command, ContainerId, Finding, FindingId, ImageReference, Incarnation, Labels, Member,
    Pod, Session, SessionId, Severity,
};

pub(super) const SCHEMA: &str = "driftd.report/v1";

/// Absent means null in JSON, never a missing key.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) schema: &'static str,
    pub(super) made: Made,
    /// Null for a report about the whole container.
    pub(super) session_id: Option<SessionId>,
    /// The case of evidence by which the container was named; else null.
    pub(super) case_id: Option<CaseId>,
    pub(super) period: Period,
    pub(super) container: Identity,
    pub(super) policy: PolicyUsed,
    pub(super) counts: Counts,
    /// In the order of their start.
    pub(super) sessions: Vec<SessionPart>,
    /// The worst first.
    pub(super) findings: Vec<FindingPart>,
    /// Oldest first.
    pub(super) responses: Vec<ResponseJson>,
    /// Oldest first.
    pub(super) gaps: Vec<GapJson>,
    pub(super) view: View,
    /// What the drawing shows, which is more than the lists name.
    #[serde(skip)]
    pub(super) marks: Marks,
    /// The findings that are listed, for links to them.
    #[serde(skip)]
    pub(super) listed: HashSet<FindingId>,
}

/// When, by what and from what the report was made.
#[derive(Debug, Serialize)]
pub(super) struct Made {
    pub(super) at: Timestamp,
    /// The version of the driftd that made the report.
    pub(super) by: String,
    /// `daemon` or `history`.
    pub(super) from: &'static str,
    /// The socket, or the history file.
    pub(super) path: String,
    /// Null if no record names it and no daemon was there to ask.
    pub(super) node: Option<String>,
    /// The version of the daemon; null without one.
    pub(super) daemon: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Period {
    /// As the user has asked; null: from the first record on.
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
    /// The time of the first and of the last record in it; null without any.
    pub(super) first: Option<Timestamp>,
    pub(super) last: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
pub(super) struct Identity {
    #[serde(flatten)]
    pub(super) id: ContainerId,
    pub(super) labels: Labels,
    pub(super) pod: Option<Pod>,
    pub(super) image: ImageReference,
    /// The container's runtime; null if no finding names it.
    pub(super) runtime: Option<String>,
    /// The runs of the container that findings and responses name, at most [`MOST_RUNS`].
    pub(super) runs: Vec<Incarnation>,
    /// What the daemon knows of it now; null without a daemon, or if the container is gone.
    pub(super) now: Option<Now>,
}

pub(super) const MOST_RUNS: usize = 20;

#[derive(Debug, Serialize)]
pub(super) struct Now {
    /// `running`, `paused` or `stopped`.
    pub(super) state: &'static str,
    pub(super) pid: Option<u32>,
    /// A later container may have the same ID and another image.
    pub(super) image: ImageReference,
    pub(super) snapshotter: String,
    pub(super) baseline: String,
    pub(super) known_by: Option<String>,
    pub(super) watched: bool,
    pub(super) problem: Option<String>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct PolicyUsed {
    /// The first and the last generation that decided about these findings; null without any.
    pub(super) first_generation: Option<u64>,
    pub(super) last_generation: Option<u64>,
    /// The rules in force when the report was made; null without a daemon.
    pub(super) now: Option<PolicyJson>,
    /// The rules that the findings name, accepted ones included.
    pub(super) rules: Vec<RuleUsed>,
}

#[derive(Debug, Serialize)]
pub(super) struct RuleUsed {
    pub(super) id: String,
    /// How many findings of this report name it.
    pub(super) findings: u64,
    /// How many of them it has accepted as an exception.
    pub(super) accepted: u64,
    /// Null if the rule is not in force any more, or there is no daemon to ask.
    pub(super) effect: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) owner: Option<String>,
}

/// How much there is, and how much of it the lists hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Counts {
    pub(super) findings: u64,
    pub(super) findings_listed: u64,
    pub(super) by_severity: BTreeMap<Severity, u64>,
    /// What exceptions accept. It is not among `findings`.
    pub(super) accepted: u64,
    pub(super) sessions: u64,
    pub(super) sessions_listed: u64,
    pub(super) sessions_open: u64,
    pub(super) sessions_interactive: u64,
    /// How many commands all sessions have run.
    pub(super) commands: u64,
    pub(super) commands_listed: u64,
    pub(super) responses: u64,
    pub(super) responses_listed: u64,
    pub(super) gaps: u64,
    pub(super) gaps_listed: u64,
    /// Entries of a kind that only a newer driftd knows.
    pub(super) unknown: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct SessionPart {
    pub(super) session: Session,
    /// In the order of their start; the first ones.
    pub(super) commands: Vec<Command>,
    /// How many of them driftd keeps.
    pub(super) commands_kept: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct FindingPart {
    pub(super) finding: Finding,
    /// The first files that an aggregated finding stands for.
    pub(super) members: Vec<Member>,
}

/// The view of the node when the report was made.
#[derive(Debug, Default, Serialize)]
pub(super) struct View {
    /// Null without a daemon.
    pub(super) complete: Option<bool>,
    pub(super) problems: Vec<String>,
    /// What was lost on the node since the daemon's start, by name.
    pub(super) losses: BTreeMap<String, u64>,
    pub(super) daemon_started_at: Option<Timestamp>,
}

/// One mark for each thing that happened: small, because there may be very many.
#[derive(Debug, Default)]
pub(super) struct Marks {
    pub(super) findings: Vec<(Timestamp, Severity)>,
    pub(super) sessions: Vec<SessionMark>,
    pub(super) responses: Vec<Timestamp>,
    pub(super) gaps: Vec<GapMark>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SessionMark {
    pub(super) id: SessionId,
    pub(super) start: Timestamp,
    /// `None` for one that is open.
    pub(super) end: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GapMark {
    pub(super) start: Timestamp,
    /// `None` for one that is not over.
    pub(super) end: Option<Timestamp>,
}

impl Report {
    /// Where what has no end is taken to end: when the report was made or, in a history that
    /// nothing adds to any more, at its last record.
    pub(super) fn horizon(&self) -> Timestamp {
        let end = match (self.made.from, self.period.last) {
            ("history", Some(last)) => last,
            (_, _) => self.made.at,
        };
        self.period.until.map_or(end, |until| until.min(end))
    }
}
