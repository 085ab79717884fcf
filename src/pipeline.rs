//! The one loop that owns driftd's mutable state.
//!
//! ```text
//!  containerd ── RuntimeEvent ──┐                      ┌─ Record ───────────> history ──> api
//!  baseline ──── BaselineEvent ─┤                      ├─ ResponseRequest ──> respond
//!  watch ─────── SensorEvent ───┼─> Input ─> [State] ──┼─ RecordRequest ────> baseline
//!  api ───────── ApiRequest ────┤                      └─ SensorCommand ────> watch
//!  respond ───── Response ──────┘
//! ```
//!
//! [`State::handle`] is pure apart from the clock it is given: an input in,
//! effects out. [`run`] carries the effects out and does nothing else. When the
//! history falls behind, the loop waits for it rather than drop a finding; the
//! watchers, which must never wait, then find their channel full and ask
//! themselves for a rescan.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvError, SendTimeoutError, Sender, TryRecvError};
use jiff::Timestamp;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::oneshot;

use crate::baseline::{
    BaselineEvent, FileEntry, ImageBaseline, Known, Proof, RecordRequest, Recorder, Store,
};
use crate::budget::{self, Pool, Waiting};
use crate::containerd::RuntimeEvent;
use crate::detect::{self, Assessment, Judgement, Sensitive};
use crate::health::{Failure, Health, Reaction};
use crate::history::{self, Reader, Record};
use crate::inventory::{BaselineState, Deed, Entry, Inventory, Kill, Killed, Told, WatchState};
use crate::model::finding::{ContainerEvidence, SCHEMA, Subject, octal};
use crate::model::{
    Blake3Hash, ChainId, Container, ContainerId, Content, Disposition, Expected, Fact,
    FileEvidence, FileState, FileType, Filesystem, Finding, FindingId, IdMap, ImageReference,
    Incarnation, Kind, LayerId, LowerTwin, Member, Observation, Outcome, OverlayDirs, Probe,
    ProbeId, Process, ProcessIdentity, RootfsPath, Script, Session, Severity, Source,
    bytes_of_printable, capability_in_words,
};
use crate::policy::Policy;
use crate::respond::{Action, RESTART, Response, ResponseRequest, TOO_MANY};
use crate::threads;
use crate::watch::{self, SensorCommand, SensorEvent, Trust};

mod aggregate;
mod gaps;
mod layers;
mod names;
mod probes;
mod sessions;
mod together;

pub use self::gaps::Gap;
use self::gaps::{Gaps, Until};
use self::layers::Tampered;
use self::sessions::Sessions;
use self::together::Unsaid;

/// Everything that can make the loop do something. The list is closed: to know
/// what driftd reacts to, read this enum.
#[derive(Debug)]
pub enum Input {
    Node(RuntimeEvent),
    /// With an image that a layer which was tampered with is of, if one is known.
    Baseline(BaselineEvent, ImageReference),
    Watch(SensorEvent),
    Asked(ApiRequest),
    Responded(Response),
    /// The history begins anew: it wants everything that is known.
    HistoryBegun,
    /// It is [`State::next_due`].
    Due,
}

/// Everything the loop can make others do.
#[derive(Debug)]
pub enum Effect {
    Watch(SensorCommand),
    RecordBaseline(RecordRequest),
    /// Forget baselines that neither an image nor one of these chains needs.
    CollectBaselines(HashSet<ChainId>),
    Record(Record),
    Respond(ResponseRequest),
}

impl Effect {
    fn record(finding: &Finding) -> Effect {
        Effect::Record(Record::Finding(Box::new(finding.clone())))
    }
}

/// What the API asks of the loop. Replies are sent from the loop; an asker that
/// has gone is no error.
#[derive(Debug)]
pub enum ApiRequest {
    Status(oneshot::Sender<Status>),
    Containers(oneshot::Sender<Vec<ContainerView>>),
    /// Answered when the scan that this starts is over.
    Diff {
        container: String,
        reply: oneshot::Sender<Result<Diff, LookupError>>,
    },
    /// Answered when the response was carried out and recorded.
    Respond {
        container: String,
        /// The finding that is answered, and the run in which it was seen. Without one the
        /// run that there is now is meant.
        cause: Option<Box<(FindingId, Incarnation)>>,
        action: Action,
        reason: String,
        requested_by: String,
        no_restart: bool,
        reply: oneshot::Sender<Result<Response, LookupError>>,
    },
    /// Which one container a person means.
    Lookup {
        container: String,
        reply: oneshot::Sender<Result<ContainerId, LookupError>>,
    },
    /// The settings were read again: what is decided from now on is decided by these.
    SetPolicy(Box<Policy>),
    /// Whether a probe is to be reported, from now on.
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
    /// From when to when it was incomplete: what still is, then the newest.
    pub gaps: Vec<Gap>,
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

pub use crate::detect::Change as DifferenceKind;

/// Why a question about one container has no answer.
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
        "the run of container {0} in which the finding was seen is over (to answer what runs \
         now, name the container)"
    )]
    RunGone(String),
    #[error("container {0} is not watched: {1}")]
    NotWatched(String, String),
    #[error("probe {0} is of no container that is there (see: driftd probes)")]
    UnknownProbe(ProbeId),
    #[error("driftd is stopping")]
    Stopping,
}

/// How long observations may wait for containerd to tell of their container.
const ANNOUNCED_WITHIN: jiff::SignedDuration = jiff::SignedDuration::from_secs(10);
/// Of how many such containers.
const MAX_UNANNOUNCED: usize = 256;
/// How many containers are named to somebody who may have meant one of them.
const MOST_ALIKE: usize = 3;
/// How many differences one answer may hold.
const MAX_DIFFERENCES: usize = 100_000;
/// And how many bytes of paths.
const MAX_DIFFERENCE_BYTES: usize = 64 << 20;

/// The state and the rules by which it changes.
#[derive(Debug)]
pub struct State {
    node: String,
    started_at: Timestamp,
    policy: Policy,
    health: Arc<Health>,
    inventory: Inventory,
    /// Every socket of containerd, and why it is not connected.
    endpoints: BTreeMap<Arc<str>, Option<String>>,
    /// Connected, and not listed since.
    unlisted: HashSet<Arc<str>>,
    /// Containers whose baseline is missing, perhaps only for a moment.
    unsettled: HashSet<ContainerId>,
    next_ticket: u64,
    diffs: HashMap<u64, PendingDiff>,
    /// Orders without a response, by ticket, with whoever waits for it.
    out: HashMap<u64, (ResponseRequest, Option<Asker>)>,
    /// Containers of which a kill has failed that may be ordered again.
    failed_kills: HashSet<ContainerId>,
    gaps: Gaps,
    /// Whether there was a time without driftd: containers have run meanwhile.
    was_down: bool,
    /// Seen of containers that containerd has not told of yet.
    unannounced: BTreeMap<ContainerId, Waiting>,
    unannounced_pool: Arc<Pool>,
    /// What is new of aggregated findings and not told yet.
    unsaid: Unsaid,
    sessions: Sessions,
}

#[derive(Debug)]
struct PendingDiff {
    container: ContainerId,
    differences: Vec<Difference>,
    /// Of their paths.
    bytes: usize,
    truncated: bool,
    reply: oneshot::Sender<Result<Diff, LookupError>>,
}

/// Who waits for a response.
type Asker = oneshot::Sender<Result<Response, LookupError>>;

/// Why something is answered.
struct Cause<'a> {
    container: &'a ContainerId,
    /// The init of the run that did it; without one, whatever runs now.
    init: Option<ProcessIdentity>,
    kind: Kind,
    finding: FindingId,
}

/// The pauses before a failed kill is tried again: each twice as long as the last one.
const FIRST_PAUSE: jiff::SignedDuration = jiff::SignedDuration::from_secs(1);
const LONGEST_PAUSE: jiff::SignedDuration = jiff::SignedDuration::from_secs(300);

fn pause_after(failures: u32) -> jiff::SignedDuration {
    (FIRST_PAUSE * (1 << failures.saturating_sub(1).min(16))).min(LONGEST_PAUSE)
}

/// Whether both name one run, as far as they tell.
fn is_same_run(one: &Incarnation, other: &Incarnation) -> bool {
    one.pid == other.pid
        && one.start_time.zip(other.start_time).is_none_or(|(one, other)| one == other)
        && one.created_at.zip(other.created_at).is_none_or(|(one, other)| one == other)
}

/// Whether a run that was told of before its container's record belongs to that.
fn is_run_of(container: &Container, pid: u32) -> bool {
    container.task.as_ref().is_none_or(|task| task.pid == pid)
}

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
            endpoints: BTreeMap::new(),
            unlisted: HashSet::new(),
            unsettled: HashSet::new(),
            next_ticket: 0,
            diffs: HashMap::new(),
            out: HashMap::new(),
            failed_kills: HashSet::new(),
            gaps: Gaps::default(),
            was_down: false,
            unannounced: BTreeMap::new(),
            unannounced_pool: Pool::new(budget::ALL_UNANNOUNCED),
            unsaid: Unsaid::default(),
            sessions: Sessions::default(),
        }
    }

    /// Takes in what the history tells of sessions that were open, and of probes.
    /// Sessions come with those of their commands that have not ended.
    pub fn remember_sessions(
        &mut self,
        sessions: Vec<(Session, Vec<crate::model::Command>)>,
        probes: Vec<Probe>,
    ) {
        self.sessions.remember(sessions, probes);
    }

    /// Nothing was seen from `since` until now. The gap is for the history.
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
        gap_record(gap)
    }

    /// Takes in what the history tells of a container before that shows up.
    pub fn remember(&mut self, findings: Vec<Finding>) {
        self.inventory.remember(findings);
    }

    /// Takes in the last kill of a container or its restart, as the history tells it; after
    /// its findings.
    pub fn remember_kill(&mut self, last: &Response) {
        if let Some(killed) = killed(last) {
            self.inventory.entry(&last.container).killed = Some(Box::new(killed));
        }
    }

    /// Takes in what the history tells of one file of an aggregated finding.
    pub fn remember_member(&mut self, finding: FindingId, member: &Member) {
        self.inventory.remember_member(finding, member);
    }

    /// Reacts to one input.
    pub fn handle(&mut self, input: Input, now: Timestamp, effects: &mut Vec<Effect>) {
        match input {
            Input::Node(change) => self.node_changed(change, now, effects),
            Input::Baseline(news, image) => self.baseline_changed(news, image, now, effects),
            Input::Watch(report) => self.watched(report, now, effects),
            Input::Asked(question) => self.asked(question, now, effects),
            Input::Responded(response) => self.responded(response, now, effects),
            Input::HistoryBegun => self.report_again(effects),
            Input::Due => self.due(now, effects),
        }
    }

    /// Hands on everything that is known. Of files that are counted in one finding only
    /// the number is.
    fn report_again(&mut self, effects: &mut Vec<Effect>) {
        self.say_all(effects);
        let of_containers = self.inventory.iter().flat_map(|(_, entry)| entry.findings.values());
        effects.extend(of_containers.chain(self.inventory.of_layers.values()).map(Effect::record));
        self.sessions_again(effects);
    }

    // ---- the node

    fn node_changed(&mut self, change: RuntimeEvent, now: Timestamp, effects: &mut Vec<Effect>) {
        match change {
            RuntimeEvent::Connected { endpoint } => {
                self.unlisted.insert(endpoint.clone());
                self.endpoints.insert(endpoint, None);
            }
            RuntimeEvent::Disconnected { endpoint, reason } => {
                let was_connected =
                    self.endpoints.insert(endpoint.clone(), Some(reason.clone())) == Some(None);
                if was_connected {
                    let detail = format!("{endpoint}: {reason}");
                    self.lost(Failure::ContainerdLost, None, detail, now, effects);
                }
            }
            RuntimeEvent::TaskCreated { container, pid, rootfs } => {
                let entry = self.inventory.entry(&container);
                if std::mem::take(&mut entry.removed) {
                    entry.replaced();
                }
                entry.began(pid);
                entry.watch = WatchState::Asked;
                entry.armed_before_start = false;
                entry.fresh = true;
                let trust = layers::trust(entry);
                effects.push(Effect::Watch(SensorCommand::Attach {
                    container: container.clone(),
                    pid,
                    rootfs,
                }));
                let id = container.clone();
                self.announced(&container, now, effects);
                if trust != Trust::Unknown {
                    effects.push(Effect::Watch(SensorCommand::Trust { container, trust }));
                }
                layers::tell_entry_point(&id, self.inventory.entry(&id), effects);
                self.started_again(&id, now, effects);
            }
            RuntimeEvent::Container(container) => self.container_changed(*container, now, effects),
            RuntimeEvent::TaskExited { container } => self.task_exited(&container, now, effects),
            RuntimeEvent::ExecStarted { container, exec_id, pid } => {
                self.exec_started(&container, exec_id, pid, now);
            }
            RuntimeEvent::ExecExited { container, exec_id, pid, exit, at } => {
                self.exec_exited(&container, &exec_id, pid, exit, at, now, effects);
            }
            RuntimeEvent::Removed { container } => {
                self.task_exited(&container, now, effects);
                self.forget(&container, effects);
            }
            RuntimeEvent::Listed { endpoint, containers } => {
                self.listed(&endpoint, &containers, now, effects);
            }
        }
    }

    fn container_changed(
        &mut self,
        container: Container,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let id = container.id.clone();
        let entry = self.inventory.entry(&id);
        let is_another = std::mem::take(&mut entry.removed)
            || entry.container.as_ref().is_some_and(|known| {
                known.created_at.is_some()
                    && container.created_at.is_some()
                    && known.created_at != container.created_at
            });
        if is_another {
            let pid = entry.pid;
            entry.replaced();
            // What containerd has told of before its record is a run of the new one.
            if let Some(pid) = pid.filter(|pid| is_run_of(&container, *pid)) {
                entry.began(pid);
            }
        }
        let mut trusted = layers::trust(entry);
        if let Some(task) = &container.task {
            let rootfs_is_news = container.rootfs.is_some()
                && entry.container.as_ref().is_none_or(|known| known.rootfs.is_none());
            // An event of the task's start does not tell it; the record that follows does.
            let known = entry.container.as_ref().and_then(|known| known.task.as_ref());
            let input_has_changed = known.and_then(|known| known.terminal_input.as_ref())
                != task.terminal_input.as_ref();
            if entry.pid != Some(task.pid) || matches!(entry.watch, WatchState::No) {
                entry.began(task.pid);
                entry.watch = WatchState::Asked;
                entry.fresh = true;
            }
            if let Some(start_time) = task.start_time {
                entry.init = Some(ProcessIdentity { pid: task.pid, start_time });
            }
            let is_attached_anew =
                entry.fresh || rootfs_is_news || matches!(entry.watch, WatchState::Refused(_));
            if is_attached_anew {
                let rootfs = container.rootfs.clone();
                effects.push(Effect::Watch(SensorCommand::Attach {
                    container: id.clone(),
                    pid: task.pid,
                    rootfs,
                }));
                // So it is for whoever is attached anew.
                trusted = Trust::Unknown;
                layers::tell_entry_point(&id, entry, effects);
            }
            let input = task.terminal_input.clone();
            let input_is_news = input.is_some() && (is_attached_anew || input_has_changed);
            let is_handed_on = sessions::manager(&id, Some(&container)) != sessions::CONTAINERD;
            if is_attached_anew && is_handed_on || input_is_news {
                let container = id.clone();
                effects.push(Effect::Watch(SensorCommand::Terminal {
                    container,
                    input,
                    is_handed_on,
                }));
            }
        }
        let chain_id = container.chain_id();
        let wanted = match (&entry.baseline, chain_id) {
            (_, None) => {
                let reason = container
                    .no_baseline
                    .clone()
                    .unwrap_or_else(|| "the runtime names no layers".to_owned());
                entry.baseline = BaselineState::None(reason);
                None
            }
            (BaselineState::Ready(baseline), Some(chain_id)) if baseline.chain_id() == chain_id => {
                None
            }
            (BaselineState::Pending(pending), Some(chain_id)) if *pending == chain_id => None,
            (_, Some(chain_id)) => Some(chain_id),
        };
        if let Some(chain_id) = wanted {
            entry.baseline = BaselineState::Pending(chain_id);
            effects.push(record_baseline(&container));
        }
        entry.container = Some(container);
        if layers::trust(entry) != trusted {
            layers::tell_trust(&id, entry, effects);
        }
        if matches!(entry.baseline, BaselineState::Failed(..) | BaselineState::None(_)) {
            self.misses_baseline(&id, now);
        }
        self.started_again(&id, now, effects);
    }

    fn task_exited(&mut self, id: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        // First: what is told of it from here on is answered by nothing.
        let pid = self.inventory.get_mut(id).and_then(Entry::run_ended);
        self.sessions_ended(id, now, effects);
        let Some(entry) = self.inventory.get_mut(id) else { return };
        if let Some(pid) = pid {
            entry.watch = WatchState::No;
            if let Some(container) = &mut entry.container {
                container.task = None;
            }
            effects.push(Effect::Watch(SensorCommand::Detach {
                container: id.clone(),
                pid: Some(pid),
            }));
            tell_closed(self.gaps.ended(id, now), effects);
        }
    }

    /// The container's record is gone. What its last scan still finds is judged
    /// with the baseline it had, so the entry stays until that scan is over.
    fn forget(&mut self, id: &ContainerId, effects: &mut Vec<Effect>) {
        self.say_all(effects);
        if let Some(entry) = self.inventory.get_mut(id) {
            entry.removed = true;
        }
        // Only a node that is known whole says what nobody needs.
        if self.is_whole() {
            effects.push(Effect::CollectBaselines(self.chains_in_use()));
        }
    }

    /// Whether every containerd is connected and listed.
    fn is_whole(&self) -> bool {
        self.unlisted.is_empty() && self.endpoints.values().all(Option::is_none)
    }

    fn chains_in_use(&self) -> HashSet<ChainId> {
        self.inventory
            .iter()
            .filter(|(_, entry)| !entry.removed)
            .filter_map(|(_, entry)| entry.chain_id())
            .collect()
    }

    fn listed(
        &mut self,
        endpoint: &str,
        listed: &[ContainerId],
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let listed: HashSet<&ContainerId> = listed.iter().collect();
        let gone: Vec<ContainerId> = self
            .inventory
            .iter()
            .filter(|(id, entry)| !listed.contains(id) && entry.belongs_to(endpoint))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            let forgotten = self.inventory.get(&id).is_some_and(|entry| entry.removed);
            if forgotten {
                self.say_all(effects);
                // Its last scan was never reported; nothing more will come.
                self.inventory.remove(&id);
                self.forget_sessions(&id, effects);
                tell_closed(self.gaps.gone(&id, now), effects);
            } else {
                self.task_exited(&id, now, effects);
                self.forget(&id, effects);
            }
        }
        // While the connection was away anything may have happened; the lists that
        // are made now and then only confirm what events have told.
        let reconnected = self.unlisted.remove(endpoint);
        for (id, entry) in self.inventory.iter_mut() {
            if !entry.belongs_to(endpoint) || entry.removed {
                continue;
            }
            if let (BaselineState::Failed(chain_id, _), Some(container)) =
                (&entry.baseline, &entry.container)
            {
                let chain_id = *chain_id;
                effects.push(record_baseline(container));
                entry.baseline = BaselineState::Pending(chain_id);
                layers::tell_trust(id, entry, effects);
            }
            let fresh = std::mem::take(&mut entry.fresh);
            if entry.pid.is_some() && reconnected && !fresh {
                effects.push(Effect::Watch(SensorCommand::Scan {
                    container: id.clone(),
                    ticket: None,
                }));
            }
        }
        if self.is_whole() {
            tell_closed(self.gaps.over(Failure::ContainerdLost, None, now), effects);
            let is_to_be_walked = |entry: &Entry| {
                entry.pid.is_some() && !matches!(entry.watch, WatchState::Refused(_))
            };
            let running = self.inventory.iter().filter(|(_, entry)| is_to_be_walked(entry));
            let running = running.map(|(id, _)| id.clone()).collect();
            tell_closed(self.gaps.listed(&running, now), effects);
            self.inventory.forget_remembered();
            self.forget_remembered_sessions(effects);
            if reconnected {
                // What went while nobody listened is needed by nobody.
                effects.push(Effect::CollectBaselines(self.chains_in_use()));
            }
        }
    }

    // ---- baselines

    fn baseline_changed(
        &mut self,
        news: BaselineEvent,
        image: ImageReference,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        match news {
            BaselineEvent::Tampered { layer, witness, directories, differences, total } => {
                let tampered = Tampered { layer, witness, directories, differences, total, image };
                self.layer_tampered(tampered, now, effects);
            }
            BaselineEvent::Ready { chain_id, baseline, unchanged_since } => {
                let waiting: Vec<ContainerId> = self
                    .inventory
                    .iter()
                    .filter(|(_, entry)| entry.chain_id() == Some(chain_id))
                    .map(|(id, _)| id.clone())
                    .collect();
                for id in waiting {
                    let entry = self.inventory.entry(&id);
                    let is_known = entry.unchanged_since == unchanged_since
                        && matches!(&entry.baseline, BaselineState::Ready(known)
                            if Arc::ptr_eq(known, &baseline));
                    if is_known {
                        // Another container's job was answered.
                        continue;
                    }
                    entry.baseline = BaselineState::Ready(baseline.clone());
                    entry.unchanged_since = unchanged_since;
                    entry.without_baseline = None;
                    self.unsettled.remove(&id);
                    layers::tell_trust(&id, entry, effects);
                    if let Some(container) = &entry.container {
                        entry.entry_point = detect::entry_point(&baseline, &container.entry_point);
                    }
                    layers::tell_entry_point(&id, entry, effects);
                    for observation in entry.backlog.take() {
                        self.judge(&observation, now, effects);
                    }
                    if self.gaps.is_open(Failure::BaselineBacklogFull, &id) {
                        // What found no room is found again.
                        effects.push(Effect::Watch(SensorCommand::Scan {
                            container: id,
                            ticket: None,
                        }));
                    }
                }
                self.former_baseline(chain_id, &baseline, now, effects);
            }
            BaselineEvent::Failed { chain_id, reason } => {
                let mut failed = Vec::new();
                for (id, entry) in self.inventory.iter_mut() {
                    if entry.chain_id() == Some(chain_id)
                        && !matches!(entry.baseline, BaselineState::Ready(_))
                    {
                        entry.baseline = BaselineState::Failed(chain_id, reason.clone());
                        layers::tell_trust(id, entry, effects);
                        failed.push(id.clone());
                    }
                }
                for id in failed {
                    self.misses_baseline(&id, now);
                }
            }
        }
    }

    /// A container may have given its ID away before its baseline was there.
    fn former_baseline(
        &mut self,
        chain_id: ChainId,
        baseline: &Arc<ImageBaseline>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let mut waiting = Vec::new();
        for (_, entry) in self.inventory.iter_mut().filter(|(_, entry)| entry.has_former()) {
            entry.swap_with_former();
            if entry.chain_id() == Some(chain_id)
                && !matches!(entry.baseline, BaselineState::Ready(_))
            {
                entry.baseline = BaselineState::Ready(Arc::clone(baseline));
                if let Some(container) = &entry.container {
                    entry.entry_point = detect::entry_point(baseline, &container.entry_point);
                }
                waiting.extend(entry.backlog.take());
            }
            entry.swap_with_former();
        }
        for observation in waiting {
            self.judge(&observation, now, effects);
        }
    }

    // ---- what the watchers tell

    fn watched(&mut self, report: SensorEvent, now: Timestamp, effects: &mut Vec<Effect>) {
        match report {
            SensorEvent::Attached { container, pid, before_start } => {
                if let Some(entry) = self.inventory.get_mut(&container)
                    && entry.is_newest_run(pid)
                {
                    let is_news = !matches!(entry.watch, WatchState::Attached { .. });
                    if is_news && !before_start && self.was_down && entry.unwatched.is_none() {
                        entry.unwatched = Some(WHILE_DOWN);
                    }
                    entry.watch = WatchState::Attached { before_start };
                    entry.armed_before_start = before_start && entry.unarmed_run != Some(pid);
                }
            }
            SensorEvent::NotAttached { container, pid, reason } => {
                if let Some(entry) = self.inventory.get_mut(&container)
                    && entry.is_newest_run(pid)
                {
                    entry.watch = WatchState::Refused(reason);
                    // No walk of it comes; that it is not watched is said by itself.
                    tell_closed(self.gaps.gone(&container, now), effects);
                }
            }
            SensorEvent::Unarmed { container, pid, began, marked } => {
                if let Some(entry) = self.inventory.get_mut(&container) {
                    entry.unarmed_run = Some(pid);
                    if entry.is_newest_run(pid) {
                        entry.armed_before_start = false;
                    }
                    entry.unwatched = Some(BEFORE_MARKS);
                }
                let milliseconds = marked.duration_since(began).as_millis();
                let gap = Gap {
                    failure: Failure::ArmedLate,
                    container: Some(container),
                    detail: format!(
                        "it had run for {milliseconds} ms when its marks were in place: what ran \
                         meanwhile and left nothing was not seen"
                    ),
                    since: began,
                    until: Some(marked),
                };
                // Nothing makes up for what was there and is gone.
                self.open_gap(gap, Until::Quiet, effects);
            }
            SensorEvent::Observed(observation) => self.judge(&observation, now, effects),
            SensorEvent::ScanBatch { ticket, observations, .. } => {
                for observation in observations {
                    if let Some(ticket) = ticket {
                        self.note_difference(ticket, &observation);
                    }
                    self.judge(&observation, now, effects);
                }
            }
            SensorEvent::Scanned { container, ticket, began, complete } => {
                let has_ended =
                    self.inventory.get(&container).is_none_or(|entry| entry.pid.is_none());
                let closed = if complete {
                    self.gaps.walked(&container, began, now)
                } else if has_ended {
                    self.gaps.gone(&container, now)
                } else {
                    Vec::new()
                };
                tell_closed(closed, effects);
                if complete && let Some(entry) = self.inventory.get_mut(&container) {
                    entry.unwatched = None;
                }
                if let Some(pending) = ticket.and_then(|ticket| self.diffs.remove(&ticket)) {
                    pending.answer(complete);
                }
                if self
                    .inventory
                    .get(&container)
                    .is_some_and(|entry| entry.removed && matches!(entry.watch, WatchState::No))
                {
                    self.say_all(effects);
                    self.inventory.remove(&container);
                    self.forget_sessions(&container, effects);
                    tell_closed(self.gaps.gone(&container, now), effects);
                }
            }
            SensorEvent::Compared { ticket, observations, end } => {
                for observation in &observations {
                    self.note_difference(ticket, observation);
                }
                if let Some(complete) = end
                    && let Some(pending) = self.diffs.remove(&ticket)
                {
                    pending.answer(complete);
                }
            }
            SensorEvent::Lost { failure, container, detail, at } => {
                self.lost(failure, container, detail, at, effects);
            }
            SensorEvent::Over { failure, container } => {
                tell_closed(self.gaps.over(failure, container.as_ref(), now), effects);
            }
        }
    }

    /// Something was lost. While that lasts, the view is incomplete; the history keeps
    /// one gap for each cause and container, with its beginning and its end.
    fn lost(
        &mut self,
        failure: Failure,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let until = match (failure, &container) {
            // Of containers that nobody has told of: none of them can be walked.
            (Failure::BaselineBacklogFull, container)
                if container.as_ref().is_none_or(|id| self.inventory.get(id).is_none()) =>
            {
                Until::Quiet
            }
            // Of layers: nobody makes room for more.
            (Failure::FindingsFull, None) => Until::Quiet,
            (Failure::ScanIncomplete, Some(container)) => {
                Until::Walked(HashSet::from([container.clone()]))
            }
            // Nobody reads it once more.
            (Failure::ProcessUnreadable, _) => Until::Quiet,
            _ if failure.reaction() != Reaction::Rescan => Until::Over,
            (_, Some(container)) => Until::Walked(HashSet::from([container.clone()])),
            (_, None) => Until::Walked(
                self.inventory
                    .iter()
                    .filter(|(_, entry)| matches!(entry.watch, WatchState::Attached { .. }))
                    .map(|(id, _)| id.clone())
                    .collect(),
            ),
        };
        self.open_gap(Gap { failure, container, detail, since: at, until: None }, until, effects);
    }

    fn open_gap(&mut self, gap: Gap, until: Until, effects: &mut Vec<Effect>) {
        // Over at once, where there is nothing that a walk could make up for.
        let is_over = until == Until::Walked(HashSet::new());
        let record = Record::Gap {
            name: gap.failure.name().to_owned(),
            container: gap.container.clone(),
            detail: gap.detail.clone(),
            at: gap.since,
            until: gap.until.or(is_over.then_some(gap.since)),
        };
        if self.gaps.opened(gap, until) {
            effects.push(Effect::Record(record));
        }
    }

    fn note_difference(&mut self, ticket: u64, observation: &Observation) {
        let Some(pending) = self.diffs.get_mut(&ticket) else { return };
        let Some(Entry { baseline: BaselineState::Ready(baseline), .. }) =
            self.inventory.get(&observation.container)
        else {
            pending.truncated = true;
            return;
        };
        let path = match &observation.fact {
            Fact::Present { path, .. } | Fact::Absent { path, .. } => path,
            Fact::Executed { .. }
            | Fact::Loaded { .. }
            | Fact::Interpreted { .. }
            | Fact::ReverseShell { .. }
            | Fact::PackageManager { .. }
            | Fact::SessionOpened { .. }
            | Fact::SessionRan { .. }
            | Fact::SessionRanMore { .. }
            | Fact::SessionInteractive { .. }
            | Fact::SessionProcessEnded { .. } => return,
        };
        let Some(entry) = self.inventory.get(&observation.container) else { return };
        let sensitive = Sensitive {
            persistence: &self.policy.persistence,
            entry_point: &entry.entry_point,
            reached_as: observation.reached_as.as_ref(),
        };
        let Some(assessment) = detect::assess(baseline, sensitive, &observation.fact) else {
            return;
        };
        pending.bytes += path.as_bytes().len();
        let is_full = pending.differences.len() == MAX_DIFFERENCES;
        if is_full || pending.bytes > MAX_DIFFERENCE_BYTES {
            pending.truncated = true;
            return;
        }
        pending.differences.push(Difference {
            path: path.clone(),
            change: assessment.change,
            finding: assessment
                .judgements
                .iter()
                .map(|judgement| (judgement.kind, judgement.severity))
                .max_by_key(|(_, severity)| *severity),
        });
    }

    /// Whether a finding reports that this content was executed as a script: its
    /// interpreter is a part of that.
    fn is_told_as_script(
        &self,
        observation: &Observation,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
    ) -> bool {
        let Some(entry) = self.inventory.get(&observation.container) else { return false };
        content.is_some()
            && observation.file_of.is_none()
            && entry.about_content(path, content).any(|told| told.kind == Kind::ExecScript)
    }

    /// Keeps what was seen of a container that nobody has told of yet.
    fn keep_for_later(
        &mut self,
        observation: &Observation,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        self.unannounced.retain(|_, waiting| {
            let is_old = |one: &Observation| now.duration_since(one.at) >= ANNOUNCED_WITHIN;
            while waiting.first().is_some_and(is_old) {
                waiting.pop();
            }
            !waiting.is_empty()
        });
        let container = &observation.container;
        let lost = if self.unannounced.contains_key(container)
            || self.unannounced.len() < MAX_UNANNOUNCED
        {
            let pool = &self.unannounced_pool;
            let waiting = self
                .unannounced
                .entry(container.clone())
                .or_insert_with(|| Waiting::new(pool, budget::UNANNOUNCED));
            waiting.push(observation.clone())
        } else {
            vec![observation.clone()]
        };
        self.not_judged(lost, "containerd has not reported the container", now, effects);
    }

    /// What waited for something found no room.
    fn not_judged(
        &mut self,
        lost: Vec<Observation>,
        awaited: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        for observation in lost {
            judged(&observation, watch::Verdict::Lost, effects);
            let _ = self.health.record(Failure::BaselineBacklogFull);
            let detail = format!("{awaited}, and more observations wait than may wait");
            let container = Some(observation.container);
            self.lost(Failure::BaselineBacklogFull, container, detail, now, effects);
        }
    }

    /// Judges what was seen of a container before it was told of.
    fn announced(&mut self, container: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let Some(mut waiting) = self.unannounced.remove(container) else { return };
        for observation in waiting.take() {
            self.judge(&observation, now, effects);
        }
    }

    /// Turns one fact into findings.
    fn judge(&mut self, observation: &Observation, now: Timestamp, effects: &mut Vec<Effect>) {
        let container = &observation.container;
        let is_of_former =
            self.inventory.get(container).is_some_and(|entry| entry.is_of_former(observation.init));
        // What the container did that had this ID before is judged by that one's image.
        let swap = |state: &mut State| {
            state.inventory.get_mut(container).into_iter().for_each(Entry::swap_with_former);
        };
        if is_of_former {
            swap(self);
        }
        self.judge_as_it_is(observation, now, effects);
        if is_of_former {
            swap(self);
        }
    }

    fn judge_as_it_is(
        &mut self,
        observation: &Observation,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        // A container that we do not know has gone, or was armed by its runtime's call
        // before containerd's event of it came.
        let Some(entry) = self.inventory.get_mut(&observation.container) else {
            self.keep_for_later(observation, now, effects);
            return;
        };
        match &observation.fact {
            Fact::SessionOpened { opening } => {
                return self.session_opened(observation, opening, now, effects);
            }
            Fact::SessionRan { root, run } => {
                return self.session_ran(observation, *root, run, now);
            }
            Fact::SessionRanMore { root, times } => {
                return self.session_ran_more(&observation.container, *root, *times, now);
            }
            Fact::SessionInteractive { root, interactive, tty } => {
                let tty = tty.as_deref();
                return self.session_interactive(
                    observation,
                    *root,
                    *interactive,
                    tty,
                    now,
                    effects,
                );
            }
            Fact::SessionProcessEnded { root, process, exit } => {
                return self.session_process_ended(
                    observation,
                    *root,
                    *process,
                    *exit,
                    now,
                    effects,
                );
            }
            Fact::ReverseShell { process, direct, evidence } => {
                let assessment = detect::reverse_shell(*direct);
                let evidence = Evidence {
                    process: Some(process),
                    detail: Some(evidence),
                    ..Evidence::default()
                };
                if self.is_reverse_shell(&observation.container, process.identity) {
                    // However often it becomes another program, it is one.
                    return;
                }
                let subject = evidence.subject(None);
                let id = FindingId::new(Some(&observation.container), Kind::ShellReverse, &subject);
                self.reverse_shell_opened(observation, process, *direct, id, now, effects);
                self.tell(observation, &assessment, &evidence, now, effects);
                return;
            }
            _ => (),
        }
        let baseline = match &entry.baseline {
            BaselineState::Ready(baseline) => baseline.clone(),
            BaselineState::None(_) => return,
            BaselineState::Unknown | BaselineState::Pending(_) | BaselineState::Failed(..) => {
                let lost = entry.backlog.push(observation.clone());
                self.not_judged(lost, "its baseline is not ready", now, effects);
                return;
            }
        };
        if let Fact::PackageManager { process } = &observation.fact {
            self.package_manager(&observation.container, process, &baseline);
            return;
        }
        let sensitive = Sensitive {
            persistence: &self.policy.persistence,
            entry_point: &entry.entry_point,
            reached_as: observation.reached_as.as_ref(),
        };
        let Some(mut assessment) = detect::assess(&baseline, sensitive, &observation.fact) else {
            return;
        };
        let is_image = assessment.judgements.is_empty();
        let verdict = if is_image { watch::Verdict::Image } else { watch::Verdict::Drift };
        judged(observation, verdict, effects);
        match &observation.fact {
            Fact::Executed {
                path,
                filesystem,
                running: _,
                times: _,
                state,
                lower,
                process,
                invoked_as,
                layer_file,
                writer,
            } => {
                let evidence = Evidence {
                    path: Some(path),
                    filesystem: *filesystem,
                    state: Some(state),
                    lower: lower.as_ref(),
                    process: Some(process),
                    writer: writer.as_deref(),
                    invoked_as: invoked_as.as_deref(),
                    detail: layer_file.is_some().then_some(IN_LAYER),
                };
                self.tell(observation, &assessment, &evidence, now, effects);
            }
            Fact::Loaded {
                path,
                filesystem,
                state,
                lower,
                process,
                by_linker,
                is_shared,
                writer,
            } => {
                let written = entry
                    .about_content(path, state.blake3())
                    .filter(|told| told.kind == Kind::FileAdded)
                    .find_map(|told| told.process.as_ref());
                let is_own = writer.as_deref().or(written).is_some_and(|writer| {
                    detect::is_extracted_by_itself(&baseline, path, process, writer)
                }) && self
                    .sessions
                    .of(&observation.container, observation.session, Some(process))
                    .is_none()
                    && !is_drift(entry, process);
                if is_own {
                    for judgement in &mut assessment.judgements {
                        judgement.severity = judgement.severity.min(Severity::Info);
                    }
                }
                let is_generated =
                    detect::is_generated(&baseline, path, *filesystem, state, *is_shared);
                let detail = match (is_own, by_linker) {
                    _ if is_generated => Some(GENERATED),
                    (true, _) => Some(EXTRACTED),
                    (false, true) => Some(BY_LINKER),
                    (false, false) => None,
                };
                let evidence = Evidence {
                    path: Some(path),
                    filesystem: *filesystem,
                    state: Some(state),
                    lower: lower.as_ref(),
                    process: Some(process),
                    writer: writer.as_deref(),
                    detail,
                    ..Evidence::default()
                };
                self.tell(observation, &assessment, &evidence, now, effects);
            }
            Fact::Interpreted { script, process } => {
                let evidence = Evidence { process: Some(process), ..Evidence::default() };
                match script {
                    Script::File { path, filesystem, state, lower } => {
                        if self.is_told_as_script(observation, path, state.blake3()) {
                            return;
                        }
                        let evidence = Evidence {
                            path: Some(path),
                            filesystem: *filesystem,
                            state: Some(state),
                            lower: lower.as_ref(),
                            ..evidence
                        };
                        self.tell(observation, &assessment, &evidence, now, effects);
                    }
                    Script::Pipe { from } => {
                        let detail = match from {
                            Some(from) => format!("{BY_PIPE} from {from}"),
                            None => BY_PIPE.to_owned(),
                        };
                        let evidence = Evidence { detail: Some(&detail), ..evidence };
                        self.tell(observation, &assessment, &evidence, now, effects);
                    }
                }
            }
            Fact::Present { path, state, lower, writer } => {
                self.mark_deleted(&observation.container, path, state.blake3(), false, effects);
                let evidence = Evidence {
                    path: Some(path),
                    state: Some(state),
                    lower: lower.as_ref(),
                    process: writer.as_deref(),
                    detail: (state.file_type == FileType::Directory).then_some(BY_MOUNT),
                    ..Evidence::default()
                };
                self.tell(observation, &assessment, &evidence, now, effects);
            }
            Fact::Absent { path, writer } => {
                self.mark_deleted(&observation.container, path, None, true, effects);
                self.mark_gone(observation, path, now);
                let evidence = Evidence {
                    path: Some(path),
                    process: writer.as_deref(),
                    ..Evidence::default()
                };
                self.tell(observation, &assessment, &evidence, now, effects);
            }
            Fact::ReverseShell { .. }
            | Fact::PackageManager { .. }
            | Fact::SessionOpened { .. }
            | Fact::SessionRan { .. }
            | Fact::SessionRanMore { .. }
            | Fact::SessionInteractive { .. }
            | Fact::SessionProcessEnded { .. } => {
                unreachable!("handled above")
            }
        }
    }

    /// An executed file was removed, or is back.
    fn mark_deleted(
        &mut self,
        container: &ContainerId,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
        deleted: bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let changed: Vec<FindingId> = entry
            .about(path)
            .filter(|finding| {
                finding.kind.is_exec()
                    && finding.file.as_ref().is_some_and(|file| {
                        file.deleted != deleted && (deleted || file.blake3 == content)
                    })
            })
            .map(|finding| finding.id)
            .collect();
        for id in changed {
            let Some(finding) = entry.findings.get_mut(&id) else { continue };
            if let Some(file) = &mut finding.file {
                file.deleted = deleted;
            }
            finding.revision += 1;
            effects.push(Effect::Record(Record::Finding(Box::new(finding.clone()))));
        }
    }

    fn tell(
        &mut self,
        observation: &Observation,
        assessment: &Assessment,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        for judgement in &assessment.judgements {
            if !self.tell_together(observation, judgement, evidence, now, effects) {
                self.tell_alone(observation, judgement, evidence, now, effects);
            }
        }
    }

    /// Tells one thing as a finding of its own.
    fn tell_alone(
        &mut self,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(&observation.container) else { return };
        let content = evidence.state.and_then(FileState::blake3);
        let kind = judgement.kind;
        let is_run = kind.is_exec() || kind == Kind::LibraryLoaded;
        let id = match evidence.path.filter(|_| content.is_none() && is_run) {
            // It was gone before it could be read: what is known of its name is
            // likelier the same program than another one.
            Some(path) => entry.about(path).find(|told| told.kind == kind).map(|told| told.id),
            None => None,
        };
        let subject = evidence.subject(content);
        let id = id.unwrap_or_else(|| FindingId::new(Some(&observation.container), kind, &subject));
        // Written, and run before it settled; or seen when it started: the exec's
        // finding tells it.
        if (kind.is_written() || kind == Kind::ExecDeleted)
            && !entry.findings.contains_key(&id)
            && evidence.path.is_some_and(|path| is_told_as_executed(entry, path, content))
        {
            return;
        }
        let run = entry.run_of(observation.init);
        if let Some(finding) = entry.findings.get_mut(&id) {
            if observation.source == Source::Scan {
                // What a scan finds again was told already.
                return;
            }
            finding.run = Some(run);
            finding.count += observation.times();
            finding.revision += 1;
            finding.last_seen = finding.last_seen.max(observation.at);
            if let (Some(file), Some(state)) = (&mut finding.file, evidence.state) {
                file.deleted = state.deleted;
            }
        } else {
            let finding = self.about_file(id, observation, judgement, evidence);
            let Some(entry) = self.inventory.get_mut(&observation.container) else { return };
            if !entry.has_room_for(&finding) {
                self.fold(observation, judgement, evidence, &finding, now, effects);
                return;
            }
            entry.insert_finding(finding);
        }
        self.session_caused(observation, evidence.process, id, now, effects);
        self.publish(&observation.container, id, Some(observation.init), now, effects);
    }

    /// A finding that has not been told yet.
    fn about_file(
        &self,
        id: FindingId,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
    ) -> Finding {
        let kind = judgement.kind;
        let (source, at) = (observation.source.name(), observation.at);
        let mut finding = new_finding(&self.node, &self.policy, id, kind, source, at);
        finding.severity = judgement.severity;
        finding.count = observation.times();
        finding.process = evidence.process.map(budget::process);
        finding.invoked_as = evidence.invoked_as.map(ToOwned::to_owned);
        let could_change = evidence.state.is_some_and(|state| state.could_change);
        let details = detail(observation, evidence.detail).into_iter();
        let details = details.chain(could_change.then(|| COULD_CHANGE.to_owned()));
        finding.detail = details.reduce(|all, next| all + "; " + &next);
        let Some(entry) = self.inventory.get(&observation.container) else { return finding };
        if let Some(unwatched) = entry.unwatched
            && observation.source == Source::Scan
            && evidence.process.is_none()
            && evidence.state.is_some_and(FileState::is_program)
        {
            let said = finding.detail.take().map_or(String::new(), |detail| detail + "; ");
            finding.detail = Some(format!("{said}{unwatched}"));
        }
        finding.belongs_to(&observation.container, entry);
        finding.run = Some(entry.run_of(observation.init));
        let id_map = entry.container.as_ref().and_then(|known| known.id_map.as_ref());
        finding.file = evidence
            .path
            .zip(evidence.state)
            .map(|(path, state)| file_evidence(path, evidence.filesystem, state, id_map));
        finding.expected = judgement
            .expected
            .as_ref()
            .map(|known| expected(known, evidence.lower, evidence.state));
        if finding.file.is_none() {
            // A removed file is known by what was expected in its place.
            let removed = evidence.path.zip(judgement.expected.as_ref());
            finding.file = removed.map(|(path, known)| removed_evidence(path, known));
        }
        finding.session = self.session_of(observation, evidence.process);
        let content = evidence.state.and_then(FileState::blake3);
        let is_run = kind.is_exec() || kind == Kind::LibraryLoaded;
        let Some(path) = evidence.path else { return finding };
        if is_run {
            let own = entry.about_content(path, content).find(|told| told.kind.is_written());
            finding.story = own.map(|told| told.id);
            if let Some((told_by, told)) = entry.members.of(Deed::Written, path)
                && told == Told::content(content)
            {
                match entry.findings.get(&told_by).map(|told| told.kind) {
                    Some(Kind::PackageTransaction) => finding.transaction = Some(told_by),
                    Some(_) => finding.story = finding.story.or(Some(told_by)),
                    None => (),
                }
            }
            if finding.transaction.is_none() {
                let manager = evidence.writer.and_then(|writer| entry.package_manager_of(writer));
                finding.transaction = manager
                    .map(|manager| together::transaction_id(&observation.container, manager));
            }
        } else if let Some(manager) =
            evidence.process.and_then(|writer| entry.package_manager_of(writer))
        {
            finding.transaction = Some(together::transaction_id(&observation.container, manager));
        }
        finding
    }

    fn findings_full(
        &mut self,
        container: &ContainerId,
        kind: Kind,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(entry) = self.inventory.get_mut(container) {
            entry.fold();
        }
        let _ = self.health.record(Failure::FindingsFull);
        let detail =
            format!("more {kind} than are kept one by one: they are counted in one finding");
        self.lost(Failure::FindingsFull, Some(container.clone()), detail, now, effects);
    }

    /// Hands a finding's newest revision on, and answers it as the policy says. `init` is
    /// of the run that it tells of; without one it tells of what is there now.
    fn publish(
        &mut self,
        container: &ContainerId,
        id: FindingId,
        init: Option<ProcessIdentity>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(finding) = entry.findings.get(&id) else { return };
        effects.push(Effect::record(finding));
        let cause = Cause { container, init, kind: finding.kind, finding: id };
        self.answer(&cause, now, effects);
    }

    // ---- responses

    /// Answers what was judged as the policy says, once for a run. Whether the finding was
    /// kept anywhere makes no difference.
    fn answer(&mut self, cause: &Cause<'_>, now: Timestamp, effects: &mut Vec<Effect>) {
        let Cause { container, init, kind, finding } = *cause;
        if self.policy.decide(kind).disposition != Disposition::Kill {
            return;
        }
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let meant = init.map_or_else(|| entry.incarnation(), |init| entry.incarnation_of(init));
        // Whoever did it has ended: what runs now is another one.
        let Some(incarnation) = meant else { return };
        if entry.kill.as_ref().is_some_and(|kill| is_same_run(&kill.incarnation, &incarnation)) {
            return;
        }
        let (ticket, failures, due) = (None, 0, None);
        entry.kill = Some(Kill { incarnation, kind, finding, ticket, failures, due });
        self.order_kill(container, now, effects);
    }

    /// Orders the kill that a container's entry holds.
    fn order_kill(&mut self, container: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let ticket = self.ticket();
        let kill = self.inventory.get_mut(container).and_then(|entry| entry.kill.as_mut());
        let Some(kill) = kill else { return };
        (kill.ticket, kill.due) = (Some(ticket), None);
        let order = ResponseRequest {
            ticket,
            container: container.clone(),
            incarnation: Some(kill.incarnation),
            action: Action::Kill,
            reason: format!("{} {}", kill.kind, kill.finding),
            requested_by: "setting respond.kill_on".into(),
            requested_at: now,
            finding: Some(kill.finding),
            no_restart: false,
        };
        self.order(order, None, effects);
    }

    fn order(&mut self, order: ResponseRequest, asker: Option<Asker>, effects: &mut Vec<Effect>) {
        self.out.insert(order.ticket, (order.clone(), asker));
        effects.push(Effect::Respond(order));
    }

    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }

    fn responded(&mut self, response: Response, now: Timestamp, effects: &mut Vec<Effect>) {
        effects.push(Effect::Record(Record::Response(Box::new(response.clone()))));
        if let Some(entry) = self.inventory.get_mut(&response.container) {
            if let Some(kill) = &mut entry.kill
                && kill.ticket == Some(response.ticket)
            {
                kill.ticket = None;
                if !response.outcome.succeeded && !response.outcome.gone {
                    kill.failures = kill.failures.saturating_add(1);
                    kill.due = Some(now.saturating_add(pause_after(kill.failures)).unwrap_or(now));
                    self.failed_kills.insert(response.container.clone());
                }
            }
            if let Some(finding) = response.finding.and_then(|id| entry.findings.get_mut(&id)) {
                finding.outcome = Some(response.outcome.clone());
                finding.revision += 1;
                effects.push(Effect::record(finding));
            }
            if let Some(killed) = killed(&response) {
                entry.killed = Some(Box::new(killed));
                let container = response.container.clone();
                self.started_again(&container, now, effects);
            }
        }
        if let Some((_, Some(asker))) = self.out.remove(&response.ticket) {
            let _ = asker.send(Ok(response));
        }
    }

    /// Records that a container runs again whose run was killed, if it does.
    fn started_again(&mut self, id: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        let Some(incarnation) = entry.incarnation() else { return };
        let Some(killed) =
            entry.killed.take_if(|killed| !is_same_run(&killed.incarnation, &incarnation))
        else {
            return;
        };
        let Killed { incarnation: before, finding, outcome } = *killed;
        let is_another = before
            .created_at
            .is_some_and(|created_at| incarnation.created_at.is_some_and(|is| is != created_at));
        if is_another {
            return;
        }
        let seconds = now.duration_since(outcome.at).as_secs_f64().max(0.0);
        let message = format!(
            "started again (pid {}), seen {seconds:.1} s after the kill; its files are those of \
             before",
            incarnation.pid
        );
        tracing::warn!(container = %id, "a killed container was {message}");
        let by = match outcome.restarter {
            Some(restarter) => format!("{restarter}, as was expected"),
            None => "nothing that driftd knows of".to_owned(),
        };
        effects.push(Effect::Record(Record::Response(Box::new(Response {
            ticket: 0,
            container: id.clone(),
            incarnation: Some(incarnation),
            reason: format!("pid {} was killed", before.pid),
            requested_by: by,
            requested_at: outcome.at,
            finding,
            outcome: Outcome {
                action: RESTART.to_owned(),
                succeeded: true,
                gone: false,
                message,
                restarter: outcome.restarter,
                at: now,
            },
        }))));
    }

    /// When a kill that has failed is ordered again.
    fn kill_due(&self) -> Option<Timestamp> {
        let kills = self.failed_kills.iter().filter_map(|id| self.inventory.get(id)?.kill.as_ref());
        kills.filter_map(|kill| kill.due).min()
    }

    /// Orders again what has failed, as long as that run is there.
    fn kill_again(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let is_due = |due: Timestamp| {
            // After a clock was set back it would be far away.
            due <= now || due.duration_since(now) > LONGEST_PAUSE
        };
        for id in std::mem::take(&mut self.failed_kills) {
            let kill = self.inventory.get(&id).and_then(|entry| entry.kill.as_ref());
            match kill.and_then(|kill| kill.due) {
                Some(due) if is_due(due) => self.order_kill(&id, now, effects),
                Some(_) => {
                    self.failed_kills.insert(id);
                }
                None => (),
            }
        }
    }

    /// Whether something was ordered of which it is not known what came of it.
    fn has_orders_out(&self) -> bool {
        !self.out.is_empty()
    }

    /// Records that it is not known what came of the orders that are out.
    fn give_up_orders(&mut self, effects: &mut Vec<Effect>) {
        for (_, (order, _)) in std::mem::take(&mut self.out) {
            let message = "driftd was stopped before it was known what came of it; it may happen";
            let response = order.failed(message.to_owned());
            effects.push(Effect::Record(Record::Response(Box::new(response))));
        }
    }

    // ---- questions

    fn asked(&mut self, question: ApiRequest, now: Timestamp, effects: &mut Vec<Effect>) {
        // Whoever asked may have gone: a reply nobody takes is no error.
        match question {
            ApiRequest::Status(reply) => {
                let _ = reply.send(self.status());
            }
            ApiRequest::Containers(reply) => {
                let views = self.inventory.iter().filter_map(|(_, entry)| view(entry)).collect();
                let _ = reply.send(views);
            }
            ApiRequest::Lookup { container, reply } => {
                let _ = reply.send(self.lookup(&container));
            }
            ApiRequest::SetPolicy(policy) => {
                let generation = self.policy.generation + 1;
                self.policy = Policy { generation, ..*policy };
            }
            ApiRequest::SetProbe { probe, reported, reply } => {
                let answer = self.set_probe(probe, reported, effects);
                let _ = reply.send(answer.ok_or(LookupError::UnknownProbe(probe)));
            }
            ApiRequest::Diff { container, reply } => match self.diffable(&container) {
                Err(err) => {
                    let _ = reply.send(Err(err));
                }
                Ok((container, stopped)) => {
                    let ticket = self.ticket();
                    self.diffs.retain(|_, pending| !pending.reply.is_closed());
                    self.diffs.insert(
                        ticket,
                        PendingDiff {
                            container: container.clone(),
                            differences: Vec::new(),
                            bytes: 0,
                            truncated: false,
                            reply,
                        },
                    );
                    effects.push(Effect::Watch(match stopped {
                        Some(Stopped { rootfs, entry_point }) => {
                            SensorCommand::Compare { container, ticket, rootfs, entry_point }
                        }
                        None => SensorCommand::Scan { container, ticket: Some(ticket) },
                    }));
                }
            },
            ApiRequest::Respond {
                container,
                cause,
                action,
                reason,
                requested_by,
                no_restart,
                reply,
            } => {
                let cause = cause.map(|cause| *cause);
                match self.answerable(&container, cause.map(|(_, run)| run)) {
                    Err(err) => {
                        let _ = reply.send(Err(err));
                    }
                    Ok((container, incarnation)) => {
                        let order = ResponseRequest {
                            ticket: self.ticket(),
                            container,
                            incarnation,
                            action,
                            reason,
                            requested_by,
                            requested_at: now,
                            finding: cause.map(|(finding, _)| finding),
                            no_restart,
                        };
                        self.order(order, Some(reply), effects);
                    }
                }
            }
        }
    }

    fn lookup(&self, text: &str) -> Result<ContainerId, LookupError> {
        let text_safe = || crate::model::printable(text.as_bytes());
        match self.inventory.named(text)[..] {
            [] => {
                let mut alike = self.inventory.beginning_with(text).peekable();
                if alike.peek().is_none() {
                    return Err(LookupError::Unknown(text_safe()));
                }
                let alike: Vec<String> = alike.take(MOST_ALIKE).map(ToString::to_string).collect();
                Err(LookupError::NotWhole(text_safe(), alike.join(", ")))
            }
            [id] => Ok(id.clone()),
            ref several => Err(LookupError::Ambiguous(text_safe(), several.len())),
        }
    }

    /// The container to be answered, and the run of it that there is: `meant`, where that
    /// is said.
    fn answerable(
        &self,
        text: &str,
        meant: Option<Incarnation>,
    ) -> Result<(ContainerId, Option<Incarnation>), LookupError> {
        let id = self.lookup(text)?;
        let entry = self.inventory.get(&id).filter(|entry| !entry.removed);
        let Some(entry) = entry else { return Err(LookupError::Gone(id.to_string())) };
        let run = entry.incarnation();
        let is_meant = meant.is_none_or(|meant| run.is_some_and(|run| is_same_run(&run, &meant)));
        if is_meant { Ok((id, run)) } else { Err(LookupError::RunGone(id.to_string())) }
    }

    /// The container that is to be compared, with what its layers are if it does not run.
    fn diffable(&self, text: &str) -> Result<(ContainerId, Option<Stopped>), LookupError> {
        let id = self.lookup(text)?;
        let entry = self.inventory.get(&id).ok_or(LookupError::Unknown(text.to_owned()))?;
        let refuse = |reason: String| Err(LookupError::NotWatched(id.to_string(), reason));
        match (&entry.watch, &entry.baseline) {
            (WatchState::No, _) if entry.removed => refuse("it was removed".into()),
            (WatchState::Refused(reason), _) => refuse(reason.clone()),
            (WatchState::Asked | WatchState::Attached { .. }, BaselineState::Ready(_)) => {
                Ok((id, None))
            }
            (WatchState::No, BaselineState::Ready(_)) => {
                let rootfs = entry.container.as_ref().and_then(|known| known.rootfs.clone());
                let Some(rootfs) = rootfs else {
                    return refuse("it does not run, and where its files are is not known".into());
                };
                let entry_point = entry.entry_point.clone();
                Ok((id, Some(Stopped { rootfs, entry_point })))
            }
            (_, baseline) => refuse(format!("its baseline is {}", baseline.describe())),
        }
    }

    pub fn status(&self) -> Status {
        let mut problems = Vec::new();
        let mut endpoints = Vec::new();
        for (socket, lost) in &self.endpoints {
            if let Some(reason) = lost {
                problems.push(format!("not connected to {socket}: {reason}"));
            }
            endpoints.push(EndpointView {
                socket: socket.to_string(),
                connected: lost.is_none(),
                reason: lost.clone().unwrap_or_default(),
            });
        }
        let (mut watched, mut waiting) = (0, 0);
        for (id, entry) in self.inventory.iter().filter(|(_, entry)| entry.pid.is_some()) {
            match &entry.watch {
                WatchState::Attached { .. } => watched += 1,
                WatchState::Refused(reason) => {
                    problems.push(format!("container {id} is not watched: {reason}"));
                }
                WatchState::No | WatchState::Asked => (),
            }
            match &entry.baseline {
                BaselineState::Unknown | BaselineState::Pending(_) => waiting += 1,
                BaselineState::Failed(_, reason) | BaselineState::None(reason) => {
                    problems.push(format!("container {id} has no baseline: {reason}"));
                }
                BaselineState::Ready(_) => (),
            }
        }
        problems.extend(self.inventory.iter().filter(|(_, entry)| entry.folded() > 0).map(
            |(id, entry)| {
                let folded = entry.folded();
                format!(
                    "container {id} has more findings than are kept one by one: {folded} sightings \
                     are counted in one finding of each kind (findings_full)"
                )
            },
        ));
        // While the connection is away, that is said above, and so is what was folded.
        let is_folded =
            |id: &ContainerId| self.inventory.get(id).is_some_and(|entry| entry.folded() > 0);
        let is_said = |gap: &&Gap| match gap.failure {
            Failure::ContainerdLost => endpoints.iter().all(|one| one.connected),
            Failure::FindingsFull => !gap.container.as_ref().is_some_and(is_folded),
            _ => true,
        };
        problems.extend(self.gaps.open().filter(is_said).map(|gap| {
            let whose = gap
                .container
                .as_ref()
                .map_or("every container".to_owned(), |id| format!("container {id}"));
            let (since, name) = (gap.since, gap.failure.name());
            format!("the view of {whose} is incomplete since {since} ({name}): {}", gap.detail)
        }));
        Status {
            started_at: self.started_at,
            endpoints,
            containers_watched: watched,
            containers_waiting: waiting,
            problems,
            gaps: self.gaps.all(),
        }
    }
}

/// What of a container that does not run is compared.
struct Stopped {
    rootfs: OverlayDirs,
    entry_point: Vec<RootfsPath>,
}

impl PendingDiff {
    fn answer(mut self, complete: bool) {
        self.differences.sort_by(|one, other| one.path.cmp(&other.path));
        let _ = self.reply.send(Ok(Diff {
            container: self.container,
            differences: self.differences,
            incomplete: self.truncated || !complete,
        }));
    }
}

/// The history learns the end of what it knows the beginning of.
fn tell_closed(closed: Vec<Gap>, effects: &mut Vec<Effect>) {
    effects.extend(closed.into_iter().map(|gap| Effect::Record(gap_record(gap))));
}

fn gap_record(gap: Gap) -> Record {
    Record::Gap {
        name: gap.failure.name().to_owned(),
        container: gap.container,
        detail: gap.detail,
        at: gap.since,
        until: gap.until,
    }
}

fn record_baseline(container: &Container) -> Effect {
    Effect::RecordBaseline(RecordRequest {
        image: None,
        container: Some(container.id.clone()),
        layers: container.layers.clone(),
        proof: Proof::Later,
        progress: None,
        done: None,
    })
}

/// What a file finding is made of besides the judgement.
struct Evidence<'a> {
    path: Option<&'a RootfsPath>,
    filesystem: Filesystem,
    state: Option<&'a FileState>,
    lower: Option<&'a LowerTwin>,
    process: Option<&'a Process>,
    /// Who wrote the file, where that is known and is not `process`.
    writer: Option<&'a Process>,
    invoked_as: Option<&'a str>,
    detail: Option<&'a str>,
}

impl Default for Evidence<'_> {
    fn default() -> Self {
        Evidence {
            path: None,
            filesystem: Filesystem::Overlay,
            state: None,
            lower: None,
            process: None,
            writer: None,
            invoked_as: None,
            detail: None,
        }
    }
}

impl Evidence<'_> {
    /// What makes a finding this one.
    fn subject(&self, content: Option<Blake3Hash>) -> Subject<'_> {
        match (self.path, self.process) {
            (Some(path), _) => Subject::File { path, content },
            (None, Some(process)) => {
                Subject::Command { exe: process.exe.as_deref(), argv: process.argv.as_deref() }
            }
            (None, None) => Subject::Reason(self.detail.unwrap_or_default()),
        }
    }
}

/// Whether a file's content is known because it was run.
fn is_told_as_executed(entry: &Entry, path: &RootfsPath, content: Option<Blake3Hash>) -> bool {
    entry
        .about_content(path, content)
        .any(|told| told.kind.is_exec() || told.kind == Kind::LibraryLoaded)
        || Kind::ALL.iter().filter(|kind| is_run(**kind)).any(|kind| {
            let known = entry.members.of(Deed::of(*kind), path);
            known.is_some_and(|(_, told)| told == Told::content(content))
        })
}

/// Whether a finding of this kind says that code was run.
fn is_run(kind: Kind) -> bool {
    kind.is_exec() || kind == Kind::LibraryLoaded
}

/// What is said of code that somebody could write to while it was run.
const COULD_CHANGE: &str = "its content could change between its execution and the moment it was \
     read: what ran may not be the content that is reported here";

/// What is said of an executed file that is not the container's own.
const IN_LAYER: &str =
    "it lies in a layer of the image on this node's disk, not in the container's own layer";

/// What is said of a program that was given to the dynamic linker.
/// What is to be said of a file beside what the other keys hold: first whose it is.
fn detail(observation: &Observation, detail: Option<&str>) -> Option<String> {
    let owner = observation.file_of.as_ref();
    let owner = owner.map(|owner| format!("the file lies in the root of the container {owner}"));
    let way = observation.reached_as.as_ref();
    let way = way.map(|path| match path.parent().and_then(|home| home.parent()) {
        // A home that lies elsewhere has this name by its user alone.
        Some(homes) if homes.as_bytes() == b"/home" => format!("it counts as {path}"),
        _ => format!("the container reaches it as {path}"),
    });
    let parts: Vec<String> =
        owner.into_iter().chain(way).chain(detail.map(ToOwned::to_owned)).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// What is said of a program that nobody saw come.
const WHILE_DOWN: &str = "it was found after a time in which driftd did not run, and may have run";
const BEFORE_MARKS: &str =
    "it was found after a time in which the container was not watched yet, and may have run";

const BY_MOUNT: &str = "something was mounted there while the container ran";

const BY_LINKER: &str = "it was run as an argument of the dynamic linker";

/// What is said of a library that a program of the image brings along packed.
const EXTRACTED: &str = "the program of the image that loads it has written it itself, into a \
     temporary directory or one of its own, as programs do that bring libraries along packed";

/// What is said of executable code in a file that is no library.
const GENERATED: &str = "executable code in a file that is no library: programs generate such \
     code for themselves";

/// Whether a process runs a program that was told as drift itself.
fn is_drift(entry: &Entry, process: &Process) -> bool {
    let exe = process.exe.as_deref().map(bytes_of_printable);
    let exe = exe.and_then(|exe| RootfsPath::new(exe).ok());
    exe.is_none_or(|exe| entry.about(&exe).any(|told| told.kind.is_exec()))
}

/// What is said of a script without a file.
const BY_PIPE: &str = "its text came through a pipe";

/// Lets the watchers know how a file of the layers was judged.
fn judged(observation: &Observation, verdict: watch::Verdict, effects: &mut Vec<Effect>) {
    if let Fact::Executed { layer_file: Some(file), .. } = &observation.fact {
        let (container, file) = (observation.container.clone(), *file);
        effects.push(Effect::Watch(SensorCommand::Judged { container, file, verdict }));
    }
}

/// A finding of no container about nothing yet.
fn new_finding(
    node: &str,
    policy: &Policy,
    id: FindingId,
    kind: Kind,
    source: &str,
    at: Timestamp,
) -> Finding {
    Finding {
        schema: SCHEMA.to_owned(),
        id,
        revision: 1,
        kind,
        severity: kind.severity(),
        first_seen: at,
        last_seen: at,
        count: 1,
        source: source.to_owned(),
        node: node.to_owned(),
        runtime: "containerd".to_owned(),
        container: None,
        run: None,
        image: ImageReference::default(),
        file: None,
        expected: None,
        process: None,
        invoked_as: None,
        session: None,
        story: None,
        transaction: None,
        files: None,
        verdict: policy.decide(kind),
        outcome: None,
        attack: kind.attack(),
        detail: None,
    }
}

impl Finding {
    fn belongs_to(&mut self, id: &ContainerId, entry: &Entry) {
        let (container, image) = whose(id, entry);
        (self.container, self.image) = (Some(container), image);
        self.run = entry.incarnation();
    }
}

/// The container and its image, as findings and sessions name them.
fn whose(id: &ContainerId, entry: &Entry) -> (ContainerEvidence, ImageReference) {
    let container = entry.container.as_ref();
    let evidence = ContainerEvidence {
        id: id.clone(),
        labels: container.map(|container| container.labels.clone()).unwrap_or_default(),
        pod: container.and_then(|container| container.pod.clone()),
    };
    let mut image = container.map(|container| container.image.clone()).unwrap_or_default();
    image.chain_id = image.chain_id.or_else(|| entry.chain_id());
    (evidence, image)
}

/// Owners are told as the container and its image name them.
fn file_evidence(
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
    id_map: Option<&IdMap>,
) -> FileEvidence {
    let (blake3, sha256, unhashed) = match state.content {
        Content::Hashed { blake3, sha256 } => (Some(blake3), sha256, None),
        Content::Unhashed(reason) => (None, None, Some(reason.name().to_owned())),
    };
    FileEvidence {
        path: path.clone(),
        file_type: state.file_type,
        format: state.format,
        mode: octal(state.mode),
        uid: id_map.map_or(state.uid, |map| map.uid_to_container(state.uid)),
        gid: id_map.map_or(state.gid, |map| map.gid_to_container(state.gid)),
        size: state.size,
        capability: state.capability.as_deref().map(capability_in_words),
        blake3,
        sha256,
        unhashed,
        deleted: state.deleted,
        filesystem: filesystem.name().to_owned(),
    }
}

/// The file that is gone, as the image has it.
fn removed_evidence(path: &RootfsPath, known: &Known) -> FileEvidence {
    FileEvidence {
        path: path.clone(),
        blake3: None,
        deleted: true,
        ..entry_evidence(&known.entry, "overlay")
    }
}

/// A file of a layer or of an image.
fn entry_evidence(entry: &FileEntry, filesystem: &str) -> FileEvidence {
    FileEvidence {
        path: entry.path.clone(),
        file_type: entry.file_type,
        format: entry.format,
        mode: octal(entry.mode),
        uid: entry.uid,
        gid: entry.gid,
        size: entry.size,
        capability: entry.capability.as_deref().map(capability_in_words),
        blake3: entry.blake3,
        sha256: None,
        unhashed: None,
        deleted: false,
        filesystem: filesystem.to_owned(),
    }
}

fn expected(known: &Known, lower: Option<&LowerTwin>, state: Option<&FileState>) -> Expected {
    // A baseline keeps no SHA-256; what has the expected BLAKE3 has it.
    let sha256 = known.entry.blake3.and_then(|blake3| {
        lower.filter(|twin| twin.blake3 == blake3).and_then(|twin| twin.sha256).or_else(|| {
            match state.map(|state| state.content) {
                Some(Content::Hashed { blake3: actual, sha256 }) if actual == blake3 => sha256,
                _ => None,
            }
        })
    });
    Expected {
        path: known.entry.path.clone(),
        blake3: known.entry.blake3,
        sha256,
        mode: octal(known.entry.mode),
        uid: known.entry.uid,
        gid: known.entry.gid,
        size: known.entry.size,
        capability: known.entry.capability.as_deref().map(capability_in_words),
        layer: known.layer.to_string(),
    }
}

fn view(entry: &Entry) -> Option<ContainerView> {
    let mut container = entry.container.clone().filter(|_| !entry.removed)?;
    if container.task.as_ref().map(|task| task.pid) != entry.pid {
        let task = |pid| crate::model::Task {
            pid,
            start_time: entry.init.map(|init| init.start_time),
            paused: false,
            terminal_input: None,
        };
        container.task = entry.pid.map(task);
    }
    let problem = match (&entry.watch, &entry.baseline) {
        (WatchState::Refused(reason), _)
        | (_, BaselineState::Failed(_, reason) | BaselineState::None(reason)) => {
            Some(reason.clone())
        }
        _ => None,
    };
    Some(ContainerView {
        baseline: entry.baseline.describe(),
        watched: entry.is_attached(),
        armed_before_start: entry.armed_before_start,
        problem,
        findings: entry.findings.len() as u64,
        container,
    })
}

/// The loop's channels.
#[derive(Clone, Debug)]
pub struct Inputs {
    pub changes: Receiver<RuntimeEvent>,
    pub reports: Receiver<Box<SensorEvent>>,
    pub news: Receiver<BaselineEvent>,
    pub questions: Receiver<ApiRequest>,
    pub responses: Receiver<Response>,
    /// Something comes when the history begins anew.
    pub history_begun: Receiver<()>,
    /// Closed when the daemon stops.
    pub stop: Receiver<std::convert::Infallible>,
}

#[derive(Debug)]
pub struct Outputs {
    pub commands: Sender<SensorCommand>,
    pub recorder: Recorder,
    pub records: Sender<Record>,
    pub orders: tokio::sync::mpsc::Sender<ResponseRequest>,
}

/// Clocks are set back: what is due then is not as far away as it seems.
const LONGEST_SLEEP: std::time::Duration = std::time::Duration::from_secs(60);

/// How long what is queued may take when the daemon stops, with the responses that are
/// being carried out.
pub const DRAIN_WITHIN: std::time::Duration = std::time::Duration::from_millis(3500);

/// Runs until it is stopped, or the history cannot be read. A stop takes in everything
/// that is queued first.
pub fn run(
    mut state: State,
    history: &Reader,
    inputs: &Inputs,
    outputs: &Outputs,
) -> Result<(), history::Error> {
    let mut carrier = Carrier { outputs, stop: &inputs.stop, dropped: 0 };
    let ended = run_until_stopped(&mut state, history, inputs, &mut carrier);
    let drained = match ended {
        Ok(Ended::Stopped) => drain(&mut state, history, inputs, &mut carrier),
        Ok(Ended::WithoutHistory) => Ok(()),
        Err(err) => Err(err),
    };
    keep_the_rest(&mut state, inputs, &mut carrier);
    drained
}

/// Why the loop has ended.
enum Ended {
    Stopped,
    /// Nobody takes records any more.
    WithoutHistory,
}

fn run_until_stopped(
    state: &mut State,
    history: &Reader,
    inputs: &Inputs,
    carrier: &mut Carrier<'_>,
) -> Result<Ended, history::Error> {
    // Whoever has nothing more to say is not listened to; that is no reason to end.
    let mut open = inputs.clone();
    loop {
        let due = match state.next_due() {
            Some(due) => {
                let left = due.duration_since(Timestamp::now());
                let left = std::time::Duration::try_from(left).unwrap_or_default();
                crossbeam_channel::after(left.min(LONGEST_SLEEP))
            }
            None => crossbeam_channel::never(),
        };
        // Biased: a new container must be marked within milliseconds, however
        // many observations wait.
        let input = threads::idle(|| {
            crossbeam_channel::select_biased! {
                recv(inputs.stop) -> _ => None,
                recv(open.changes) -> change => {
                    Some(listen(change, &mut open.changes).map(Input::Node))
                }
                recv(open.news) -> news => {
                    let news = listen(news, &mut open.news);
                    Some(news.map(|news| baseline_input(news, &carrier.outputs.recorder)))
                }
                recv(open.responses) -> response => {
                    Some(listen(response, &mut open.responses).map(Input::Responded))
                }
                recv(open.history_begun) -> begun => {
                    Some(listen(begun, &mut open.history_begun).map(|()| Input::HistoryBegun))
                }
                recv(open.questions) -> question => {
                    Some(listen(question, &mut open.questions).map(Input::Asked))
                }
                recv(due) -> _ => Some(Some(Input::Due)),
                recv(open.reports) -> report => {
                    let report = listen(report, &mut open.reports);
                    report.iter().for_each(|_| threads::took());
                    Some(report.map(|report| Input::Watch(*report)))
                }
            }
        });
        let Some(input) = input else { return Ok(Ended::Stopped) };
        if let Some(input) = input
            && !carrier.react(state, history, input)?
        {
            return Ok(Ended::WithoutHistory);
        }
    }
}

/// What was received; a channel whose senders are gone is never ready again.
fn listen<T>(received: Result<T, RecvError>, from: &mut Receiver<T>) -> Option<T> {
    if received.is_err() {
        *from = crossbeam_channel::never();
    }
    received.ok()
}

fn baseline_input(news: BaselineEvent, recorder: &Recorder) -> Input {
    let image = match &news {
        BaselineEvent::Tampered { layer, .. } => image_of(recorder.store(), *layer),
        BaselineEvent::Ready { .. } | BaselineEvent::Failed { .. } => ImageReference::default(),
    };
    Input::Baseline(news, image)
}

/// Takes in what is queued, and waits for the responses that are being carried out.
fn drain(
    state: &mut State,
    history: &Reader,
    inputs: &Inputs,
    carrier: &mut Carrier<'_>,
) -> Result<(), history::Error> {
    let deadline = Instant::now() + DRAIN_WITHIN;
    while Instant::now() < deadline {
        let queued = || {
            let Inputs { changes, reports, news, questions, responses, history_begun, stop: _ } =
                inputs;
            let change = || changes.try_recv().ok().map(Input::Node);
            let news = || {
                let news = news.try_recv().ok()?;
                Some(baseline_input(news, &carrier.outputs.recorder))
            };
            let report = || {
                let report = reports.try_recv().ok()?;
                threads::took();
                Some(Input::Watch(*report))
            };
            change()
                .or_else(news)
                .or_else(|| responses.try_recv().ok().map(Input::Responded))
                .or_else(report)
                .or_else(|| history_begun.try_recv().ok().map(|()| Input::HistoryBegun))
                .or_else(|| questions.try_recv().ok().map(Input::Asked))
        };
        let input = match queued() {
            Some(input) => input,
            None if !state.has_orders_out() => break,
            None => {
                let wait = || inputs.responses.recv_deadline(deadline);
                match threads::blocked(wait) {
                    Ok(response) => Input::Responded(response),
                    Err(_) => break,
                }
            }
        };
        if !carrier.react(state, history, input)? {
            break;
        }
    }
    Ok(())
}

/// What was judged is kept, and what was ordered is recorded, whatever came of it. What
/// there was no more time for is counted.
fn keep_the_rest(state: &mut State, inputs: &Inputs, carrier: &mut Carrier<'_>) {
    let mut effects = Vec::new();
    state.say_all(&mut effects);
    state.say_sessions(Timestamp::now(), &mut effects);
    let without_response = state.out.len();
    state.give_up_orders(&mut effects);
    effects.drain(..).for_each(|effect| drop(carrier.carry_out(effect)));
    let Inputs { changes, reports, news, questions, .. } = inputs;
    let left = [
        ("reports", reports.len()),
        ("changes", changes.len()),
        ("baselines", news.len()),
        ("questions", questions.len()),
        ("responses", without_response),
        ("records", carrier.dropped),
    ];
    let left: Vec<String> = left
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    if !left.is_empty() {
        tracing::warn!(left = left.join(", "), "a stop leaves what the pipeline had no time for");
    }
}

/// Carries out everything, and what comes of that for which there is no room. False if
/// nobody takes records any more.
fn carry_out_all(
    state: &mut State,
    effects: Vec<Effect>,
    carry_out: &mut dyn FnMut(Effect) -> Carried,
) -> bool {
    let mut effects = VecDeque::from(effects);
    let mut more = Vec::new();
    while let Some(effect) = effects.pop_front() {
        match carry_out(effect) {
            Carried::Out => (),
            Carried::Back(order) => {
                let failure = Failure::ResponseQueueFull;
                let _ = state.health.record(failure);
                state.health.begin(failure, "responses are refused: too many wait");
                let refused = Input::Responded(order.failed(TOO_MANY.to_owned()));
                state.handle(refused, Timestamp::now(), &mut more);
                effects.extend(more.drain(..));
            }
            Carried::Nowhere => return false,
        }
    }
    true
}

/// A kill that was carried out, by its response.
fn killed(response: &Response) -> Option<Killed> {
    let Response { incarnation, finding, outcome, .. } = response;
    let is_done = outcome.action == Action::Kill.name() && outcome.succeeded;
    let incarnation = incarnation.filter(|_| is_done)?;
    Some(Killed { incarnation, finding: *finding, outcome: outcome.clone() })
}

/// Reads what was told of a container that shows up, if it may have run before driftd
/// was started. Of all that ever ran on a node, the history may hold more than fits.
fn recall(
    state: &mut State,
    history: &Reader,
    change: &RuntimeEvent,
) -> Result<(), history::Error> {
    let container = match change {
        RuntimeEvent::TaskCreated { container, .. } => container,
        RuntimeEvent::Container(container) => &container.id,
        _ => return Ok(()),
    };
    if !state.inventory.may_remember(container) {
        return Ok(());
    }
    let findings = history.told_of(Some(container))?;
    let together: Vec<FindingId> =
        findings.iter().filter(|finding| finding.files.is_some()).map(|one| one.id).collect();
    state.remember(findings);
    for finding in together {
        history.each_member(finding, |member| state.remember_member(finding, &member))?;
    }
    if let Some(last) = history.last_kill(container)? {
        state.remember_kill(&last);
    }
    Ok(())
}

/// An image of which a layer is, to name it by. A name is better than none.
fn image_of(store: &Store, layer: LayerId) -> ImageReference {
    let images = store.images();
    let mut of_layer = images.iter().filter(|image| image.layers.contains(&layer));
    let Some(first) = of_layer.clone().find(|image| !image.names.is_empty()).or(of_layer.next())
    else {
        return ImageReference::default();
    };
    ImageReference {
        name: first.names.first().map(|name| name.name.clone()),
        manifest_digest: first.manifest_digest,
        chain_id: Some(first.chain_id),
    }
}

/// What became of an effect.
enum Carried {
    Out,
    /// Too many orders wait already.
    Back(ResponseRequest),
    /// Nobody takes records any more.
    Nowhere,
}

/// Carries effects out.
struct Carrier<'a> {
    outputs: &'a Outputs,
    stop: &'a Receiver<std::convert::Infallible>,
    /// Records that the history did not take.
    dropped: usize,
}

impl Carrier<'_> {
    /// Lets the state react to an input; false if there is no history any more.
    fn react(
        &mut self,
        state: &mut State,
        history: &Reader,
        input: Input,
    ) -> Result<bool, history::Error> {
        if let Input::Node(change) = &input {
            recall(state, history, change)?;
        }
        let mut effects = Vec::new();
        state.handle(input, Timestamp::now(), &mut effects);
        let is_kept = carry_out_all(state, effects, &mut |effect| self.carry_out(effect));
        if !state.has_orders_out() {
            state.health.end(Failure::ResponseQueueFull);
        }
        Ok(is_kept)
    }

    fn is_stopping(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    fn carry_out(&mut self, effect: Effect) -> Carried {
        let outputs = self.outputs;
        match effect {
            Effect::Watch(command) => self.command(command),
            Effect::RecordBaseline(job) => outputs.recorder.submit(job),
            Effect::CollectBaselines(in_use) => outputs.recorder.collect(in_use),
            // Waits for the history: see the module's head.
            Effect::Record(record) => {
                if threads::blocked(|| outputs.records.send(record)).is_err() {
                    self.dropped += 1;
                    return Carried::Nowhere;
                }
            }
            Effect::Respond(order) => match outputs.orders.try_send(order) {
                // Where nobody takes it any more, it is given up at the end.
                Ok(()) | Err(TrySendError::Closed(_)) => (),
                Err(TrySendError::Full(order)) => return Carried::Back(order),
            },
        }
        Carried::Out
    }

    /// Asks the watchers. When they stop they take no command any more, and none is
    /// worth waiting for.
    fn command(&self, mut command: SensorCommand) {
        const STEP: std::time::Duration = std::time::Duration::from_millis(100);
        loop {
            if self.is_stopping() {
                return;
            }
            match threads::blocked(|| self.outputs.commands.send_timeout(command, STEP)) {
                Ok(()) | Err(SendTimeoutError::Disconnected(_)) => return,
                Err(SendTimeoutError::Timeout(back)) => command = back,
            }
        }
    }
}

#[cfg(test)]
mod tests;
