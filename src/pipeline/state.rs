//! The state of the loop: its parts, what it remembers from before a restart, which input goes
//! to which file, and when something is due although nothing happens. The rules themselves are
//! in the files of their subjects. No other room reads or changes the state.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::aggregation::Unpublished;
use super::breaker::Breaker;
use super::cases::Cases;
use super::diffs::PendingDiff;
use super::endpoints::Endpoints;
use super::gaps::{Gap, Gaps, Until};
use super::messages::{Effect, Input};
use super::process_kills::{self, ProcessKills};
use super::requests::LookupError;
use super::sessions::Sessions;
use super::unannounced::Unannounced;
use crate::health::{Failure, Health};
use crate::history::Record;
use crate::inventory::{Inventory, Killed};
use crate::model::{Command, ContainerId, Finding, FindingId, Member, Probe, Session};
use crate::policy::Policy;
use crate::respond::{Action, Response, ResponseRequest};

/// The state, and the rules by which it changes.
#[derive(Debug)]
pub struct State {
    pub(super) node: String,
    pub(super) started_at: Timestamp,
    pub(super) policy: Policy,
    pub(super) health: Arc<Health>,
    pub(super) inventory: Inventory,
    pub(super) endpoints: Endpoints,
    /// Containers whose baseline is missing, perhaps only for a moment.
    pub(super) without_baseline: HashSet<ContainerId>,
    next_ticket: u64,
    pub(super) diffs: HashMap<u64, PendingDiff>,
    pub(super) responses: Responses,
    pub(super) gaps: Gaps,
    /// Whether driftd was down for a time: containers have run meanwhile.
    pub(super) was_down: bool,
    pub(super) unannounced: Unannounced,
    pub(super) unpublished: Unpublished,
    pub(super) sessions: Sessions,
}

/// Responses that were requested.
#[derive(Debug, Default)]
pub(super) struct Responses {
    /// Those that are being carried out, by ticket, each with the client that waits for it.
    pub(super) pending: HashMap<u64, (ResponseRequest, Option<ResponseReply>)>,
    /// Containers with a response that has failed. It may be requested again.
    pub(super) failed: HashSet<ContainerId>,
    /// Kills of processes that are recorded together.
    pub(super) processes: HashMap<process_kills::Key, ProcessKills>,
    pub(super) breaker: Breaker,
    pub(super) cases: Cases,
}

/// Sends the outcome of a response to the client that has requested it.
pub(super) type ResponseReply = oneshot::Sender<Result<Response, LookupError>>;

impl State {
    pub fn new(
        node: String,
        policy: Policy,
        health: Arc<Health>,
        known: Vec<Finding>,
        now: Timestamp,
    ) -> State {
        State {
            node,
            started_at: now,
            policy,
            health,
            inventory: Inventory::with_history(known),
            endpoints: Endpoints::default(),
            without_baseline: HashSet::new(),
            next_ticket: 0,
            diffs: HashMap::new(),
            responses: Responses::default(),
            gaps: Gaps::default(),
            was_down: false,
            unannounced: Unannounced::default(),
            unpublished: Unpublished::default(),
            sessions: Sessions::default(),
        }
    }

    /// Takes in the sessions of the history that were open, and its probes. Each session
    /// comes with those of its commands that have not ended.
    pub fn remember_sessions(
        &mut self,
        sessions: Vec<(Session, Vec<Command>)>,
        probes: Vec<Probe>,
    ) {
        self.sessions.remember(sessions, probes);
    }

    /// Nothing was seen from `since` until now. Returns the gap, for the history.
    pub fn was_not_running(&mut self, since: Timestamp, now: Timestamp) -> Record {
        let _ = self.health.record(Failure::NotRunning);
        self.was_down = true;
        let gap = Gap {
            failure: Failure::NotRunning,
            container: None,
            detail: "driftd did not run: what ran meanwhile and left nothing was not seen".into(),
            since: since.min(now),
            until: Some(now),
        };
        self.gaps.opened(gap.clone(), Until::Listed);
        gap.into_record()
    }

    /// Takes in the findings of a container from the history, before the container appears.
    pub fn remember(&mut self, findings: Vec<Finding>) {
        self.inventory.remember(findings);
    }

    /// Takes in the last kill of a container or its restart from the history; after its
    /// findings.
    pub fn remember_kill(&mut self, last: &Response) {
        if let Some(killed) = successful_kill(last) {
            self.inventory.entry(&last.container).killed = Some(Box::new(killed));
        }
    }

    /// Takes in one file of an aggregated finding from the history.
    pub fn remember_member(&mut self, finding: FindingId, member: &Member) {
        self.inventory.remember_member(finding, member);
    }

    /// Reacts to one input.
    pub fn handle(&mut self, input: Input, now: Timestamp, effects: &mut Vec<Effect>) {
        match input {
            Input::Runtime(event) => self.runtime_event(event, now, effects),
            Input::Baseline(event, image) => self.baseline_event(event, image, now, effects),
            Input::Sensor(event) => self.sensor_event(event, now, effects),
            Input::Question(question) => self.question(&question, now, effects),
            Input::Request(request) => self.serve(request, now, effects),
            Input::Response(response) => self.response_ended(response, now, effects),
            Input::HistoryBegun => self.record_everything(effects),
            Input::Due => self.due(now, effects),
        }
    }

    /// Records everything that is known. An aggregated finding comes with the number of its
    /// files, without the files.
    fn record_everything(&mut self, effects: &mut Vec<Effect>) {
        self.publish_aggregates(effects);
        let of_containers = self.inventory.iter().flat_map(|(_, entry)| entry.findings.iter());
        effects.extend(of_containers.chain(self.inventory.of_layers.values()).map(Effect::finding));
        self.record_sessions(effects);
    }

    /// When something is due although nothing happens.
    pub fn next_due(&self) -> Option<Timestamp> {
        let others = [self.unpublished.due(), self.sessions.due(), self.gaps.next_due()];
        others.into_iter().chain([self.missing_baseline_due(), self.response_due()]).flatten().min()
    }

    fn due(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        effects.extend(self.gaps.due(now).into_iter().map(Effect::gap));
        if self.unpublished.due().is_some_and(|due| due <= now) {
            self.publish_aggregates(effects);
        }
        if self.sessions.due().is_some_and(|due| due <= now) {
            self.publish_sessions(now, effects);
        }
        self.retry_answers(now, effects);
        self.record_process_kills(now, false, effects);
        self.report_missing_baselines(now, effects);
    }

    pub(super) fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }
}

/// The kill that a response has carried out, if it has.
pub(super) fn successful_kill(response: &Response) -> Option<Killed> {
    let Response { incarnation, finding, outcome, .. } = response;
    let is_done = outcome.action == Action::Kill.name() && outcome.succeeded;
    let incarnation = incarnation.filter(|_| is_done)?;
    Some(Killed { incarnation, finding: *finding, outcome: outcome.clone() })
}
