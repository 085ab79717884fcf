//! Carries responses out through containerd, and reports their outcome.
//!
//! Requests for one container are carried out one after the other, in their order; the kill of a
//! process needs no turn, unless evidence comes first. Requests for different containers are carried
//! out at the same time, so that one hanging shim does not delay the others. This room decides on
//! no response: the pipeline requests them. `turns` has their order, `evidence` how evidence is
//! asked for.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::containerd::{Containerd, Error, Killed};
pub use crate::hooks::HookCall;
use crate::model::{
    Answer, CaseId, Container, ContainerId, FindingId, Incarnation, Kind, Outcome, ProcessIdentity,
    RootfsPath, Sha256Hash,
};

mod evidence;
mod hook;
mod turns;

pub use hook::hook_of;
pub use turns::run;

/// The action of the record that a killed container was started again. No request causes it.
pub const RESTART: &str = "restart";
/// The message of a response to a request that has no room.
pub const TOO_MANY: &str = "too many responses wait to be carried out";

/// The actions of the records that the answers of a rule were stopped, and go on. No request to
/// a container runtime causes them.
pub const STOP_ANSWERS: &str = "stop-answers";
pub const RESUME_ANSWERS: &str = "resume-answers";
/// The action of the record that evidence is about to be taken.
pub const BEGIN_EVIDENCE: &str = "begin-evidence";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Takes evidence, and changes nothing.
    Evidence,
    /// Runs a program of the administrator.
    Hook,
    /// Kills one process.
    KillProcess,
    Kill,
    Pause,
    Resume,
}

impl From<Answer> for Action {
    fn from(answer: Answer) -> Action {
        match answer {
            Answer::Evidence => Action::Evidence,
            Answer::Hook => Action::Hook,
            // What was not denied is killed.
            Answer::Deny | Answer::KillProcess => Action::KillProcess,
            Answer::Pause => Action::Pause,
            Answer::Kill => Action::Kill,
        }
    }
}

impl Action {
    pub fn name(self) -> &'static str {
        match self {
            Action::Evidence => "evidence",
            Action::Hook => "hook",
            Action::KillProcess => "kill-process",
            Action::Kill => "kill",
            Action::Pause => "pause",
            Action::Resume => "resume",
        }
    }
}

/// A response that a client or the settings request.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponseRequest {
    /// Identifies the response to this request. No two requests have the same.
    pub ticket: u64,
    pub container: ContainerId,
    /// What the limits of rules count: its pod, as `NAMESPACE/NAME`, and its image.
    pub pod: Option<String>,
    pub image: Option<String>,
    /// The run that is meant. `None` if no run was known at the time of the request.
    pub incarnation: Option<Incarnation>,
    /// For a kill of one process: which. A start time of 0 stands for the process that has the
    /// pid now.
    pub process: Option<ProcessIdentity>,
    pub action: Action,
    pub reason: String,
    /// `uid 0 (pid 4242)` for a person, `setting respond.kill_on` for the policy.
    pub requested_by: String,
    pub requested_at: Timestamp,
    /// The finding that it responds to.
    pub finding: Option<FindingId>,
    /// For a kill: containerd's restart monitor is to leave the container stopped.
    pub no_restart: bool,
    /// For evidence: what is to be taken.
    pub evidence: Option<Box<Order>>,
    /// For a hook: which one, and what it gets.
    pub hook: Option<Box<HookCall>>,
}

impl ResponseRequest {
    /// What is known of the evidence that the request is for.
    fn order(&self) -> Option<Order> {
        self.evidence.as_deref().filter(|_| self.action == Action::Evidence).cloned()
    }

    /// The response if the request was not carried out.
    pub fn failed(&self, message: String) -> Response {
        self.ended(false, false, message)
    }

    /// The record that comes before the response itself.
    pub fn begins(&self, action: &str, message: String) -> Response {
        let mut response = self.ended(true, false, message);
        (response.ticket, response.changed) = (0, false);
        action.clone_into(&mut response.outcome.action);
        response
    }

    fn ended(&self, succeeded: bool, gone: bool, message: String) -> Response {
        let action = self.action.name().to_owned();
        let message = match &self.hook {
            Some(call) => format!("{}{}: {message}", hook::BEGIN, call.name),
            None => message,
        };
        Response {
            ticket: self.ticket,
            container: self.container.clone(),
            incarnation: self.incarnation,
            process: self.process,
            pod: self.pod.clone(),
            image: self.image.clone(),
            changed: succeeded,
            case: None,
            reason: self.reason.clone(),
            requested_by: self.requested_by.clone(),
            requested_at: self.requested_at,
            finding: self.finding,
            outcome: Outcome {
                action,
                succeeded,
                gone,
                message,
                restarter: None,
                at: Timestamp::now(),
            },
        }
    }
}

/// What is to be taken. The request has the container, the run, the finding and the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub case: CaseId,
    /// As the pipeline knows it: its layers, its image and its pod.
    pub container: Box<Container>,
    /// What shares one limit: its pod, or the container.
    pub workload: String,
    pub kind: Option<Kind>,
    /// The process and the file that the finding is about.
    pub process: Option<ProcessIdentity>,
    pub path: Option<RootfsPath>,
    /// A rule asks for it, and no user.
    pub by_rule: bool,
    /// The values of environment variables are kept, too.
    pub environment: bool,
    pub until: Until,
}

impl Order {
    /// Another request waits for it.
    pub(super) fn is_followed(&self, by: Action, deadline: Duration) {
        self.until.shorten(Instant::now() + deadline);
        if matches!(by, Action::Kill | Action::Pause) {
            self.until.0.is_followed_by_stronger.store(true, Ordering::Release);
        }
    }
}

/// Until when evidence may be taken. What comes to wait for it makes this earlier.
#[derive(Clone, Debug, Default)]
pub struct Until(Arc<Limits>);

#[derive(Debug, Default)]
struct Limits {
    until: Mutex<Option<Instant>>,
    is_followed_by_stronger: AtomicBool,
}

impl Until {
    pub fn get(&self) -> Option<Instant> {
        *self.0.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn shorten(&self, to: Instant) {
        let mut until = self.0.until.lock().unwrap_or_else(PoisonError::into_inner);
        *until = Some(until.map_or(to, |until| until.min(to)));
    }
}

// When it ends is no part of what is asked for.
impl PartialEq for Until {
    fn eq(&self, _: &Until) -> bool {
        true
    }
}

impl Eq for Until {}

/// What a collector is given.
#[derive(Debug)]
pub struct Task {
    pub request: ResponseRequest,
    pub order: Order,
    /// The container's specification, or why it is not known.
    pub specification: Result<Vec<u8>, String>,
    /// The container is frozen for it.
    pub is_frozen: bool,
}

/// What was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    pub case: CaseId,
    pub digest: Sha256Hash,
    /// A text for people.
    pub message: String,
}

/// How evidence is taken, by the settings.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub deadline: Duration,
    pub pause: bool,
}

/// A run that is frozen for as long as its evidence is taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    pub container: ContainerId,
    pub run: Incarnation,
}

/// Notes on disk of the runs that are frozen for their evidence, so that the next start thaws them
/// if this one ends meanwhile. Each of these may wait for the disk.
pub trait Notes {
    fn freezes(&self, frozen: &Frozen) -> io::Result<()>;

    fn has_thawed(&self, frozen: &Frozen);

    /// The runs that were frozen when driftd ended.
    fn left_frozen(&self) -> Vec<Frozen>;
}

/// What takes evidence.
pub trait Collector: Notes + Clone + Send + Sync + 'static {
    fn patience(&self) -> Patience;

    /// Takes evidence on a thread of its own. Never waits. It ends by itself at the end of
    /// `order.until`, and what was taken until then is kept.
    fn take(&self, task: Task) -> oneshot::Receiver<Result<Taken, String>>;

    /// The receiver of a result has waited as long as it may.
    fn is_late(&self);
}

/// Takes no evidence: where there is no store.
#[derive(Clone, Copy, Debug)]
pub struct NoEvidence;

impl Collector for NoEvidence {
    fn patience(&self) -> Patience {
        Patience { deadline: Duration::from_secs(1), pause: false }
    }

    fn take(&self, _: Task) -> oneshot::Receiver<Result<Taken, String>> {
        let (sender, receiver) = oneshot::channel();
        let _ = sender.send(Err("there is no store of evidence".to_owned()));
        receiver
    }

    fn is_late(&self) {}
}

impl Notes for NoEvidence {
    fn freezes(&self, _: &Frozen) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn has_thawed(&self, _: &Frozen) {}

    fn left_frozen(&self) -> Vec<Frozen> {
        Vec::new()
    }
}

/// What a response needs of a container runtime. Each of these names one run: where that
/// is over, nothing is done and the error is [`Error::Gone`].
pub trait Runtime: Clone + Send + Sync + 'static {
    /// Kills all processes of a run. `None` stands for a container without a known
    /// run. With `no_restart` the runtime does not start it again, if it would.
    fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        no_restart: bool,
    ) -> impl Future<Output = Result<Killed, Error>> + Send;

    /// Kills one process of a run; returns what happened, for people. A start time of 0 stands
    /// for the process that has the pid now.
    fn kill_process(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        process: ProcessIdentity,
    ) -> impl Future<Output = Result<String, Error>> + Send;

    /// Freezes a run.
    fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> impl Future<Output = Result<Killed, Error>> + Send;

    /// Thaws a run; returns what happened, for people.
    fn resume(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> impl Future<Output = Result<String, Error>> + Send;

    /// The container's specification, as its runtime has it.
    fn specification(
        &self,
        container: &ContainerId,
    ) -> impl Future<Output = Result<Vec<u8>, Error>> + Send;
}

impl Runtime for Containerd {
    async fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        no_restart: bool,
    ) -> Result<Killed, Error> {
        Containerd::kill(self, container, meant, no_restart).await
    }

    async fn kill_process(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        process: ProcessIdentity,
    ) -> Result<String, Error> {
        Containerd::kill_process(self, container, meant, process).await
    }

    async fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<Killed, Error> {
        Containerd::pause(self, container, meant).await
    }

    async fn resume(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<String, Error> {
        Containerd::resume(self, container, meant).await
    }

    async fn specification(&self, container: &ContainerId) -> Result<Vec<u8>, Error> {
        Containerd::specification(self, container).await
    }
}

/// The outcome of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The ticket of the request. 0 if it was read from the history.
    pub ticket: u64,
    pub container: ContainerId,
    pub incarnation: Option<Incarnation>,
    /// The process that was meant, if it was not the whole run.
    pub process: Option<ProcessIdentity>,
    /// What the limits of rules count: its pod, as `NAMESPACE/NAME`, and its image.
    pub pod: Option<String>,
    pub image: Option<String>,
    /// Whether it has changed anything: a container may have been paused already. If it has
    /// failed: whether it may have, and must not be asked for again.
    pub changed: bool,
    /// The case into which evidence was taken, with its digest.
    pub case: Option<KeptCase>,
    pub reason: String,
    pub requested_by: String,
    pub requested_at: Timestamp,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}

/// A case as it was when evidence was taken. The history keeps the digest, so that a case that
/// was changed as a whole is known, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptCase {
    pub id: CaseId,
    /// The SHA-256 of its `SHA256SUMS`.
    pub digest: Sha256Hash,
}

/// Carries out one request by a runtime that never waits, such as a replayed one.
pub fn carry_out_now(runtime: &impl Runtime, request: &ResponseRequest) -> Response {
    let sent = pin!(send_to(runtime, request));
    match sent.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => response_to(request, result),
        Poll::Pending => request.failed("the runtime did not answer at once".into()),
    }
}

async fn send_to(runtime: &impl Runtime, request: &ResponseRequest) -> Result<Killed, Error> {
    let ResponseRequest { container, incarnation: meant, process, no_restart, .. } = request;
    let done = |message| Killed { message, restarter: None, changed: true };
    match request.action {
        Action::Kill => runtime.kill(container, *meant, *no_restart).await,
        Action::KillProcess => {
            let Some(process) = process else {
                return Err(Error::Failed("no process is named: nothing was done".into()));
            };
            runtime.kill_process(container, *meant, *process).await.map(done)
        }
        // `run` gives it to a collector. Replays have none.
        Action::Evidence => Ok(Killed {
            message: "evidence would be taken".into(),
            restarter: None,
            changed: false,
        }),
        // Elsewhere a runner does it.
        Action::Hook => Ok(done("exit status 0 (a replay runs no program)".into())),
        Action::Pause => runtime.pause(container, *meant).await,
        Action::Resume => runtime.resume(container, *meant).await.map(done),
    }
}

fn response_to(request: &ResponseRequest, result: Result<Killed, Error>) -> Response {
    match result {
        Ok(Killed { message, restarter, changed }) => {
            let mut response = request.ended(true, false, message);
            response.changed = changed;
            response.outcome.restarter = restarter;
            response
        }
        Err(err @ (Error::Gone(_) | Error::UnknownContainer(_))) => {
            request.ended(false, true, err.to_string())
        }
        Err(err) => request.failed(err.to_string()),
    }
}

/// The pause after which a full channel is tried again. The async runtime must not block on a
/// crossbeam channel, and no response may be dropped.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// False if the receiver is gone.
async fn send(responses: &Sender<Response>, mut response: Response) -> bool {
    loop {
        match responses.try_send(response) {
            Ok(()) => return true,
            Err(TrySendError::Full(back)) => response = back,
            Err(TrySendError::Disconnected(_)) => return false,
        }
        tokio::time::sleep(FULL_PAUSE).await;
    }
}
