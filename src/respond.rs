//! Carries responses out through containerd, and reports their outcome.
//!
//! Requests for one container are carried out one after the other, in their order; the kill of a
//! process needs no turn. Requests for different containers are carried out at the same time, so
//! that one hanging shim does not delay the others. This room decides on no response: the pipeline requests them.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use crate::containerd::{Containerd, Error, Killed};
pub use crate::hooks::HookCall;
use crate::hooks::{Queue, Request};
use crate::model::{Answer, ContainerId, FindingId, Incarnation, Outcome, ProcessIdentity};

/// How long one request may take before it has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same for a pause: runtimes themselves wait 10 s for the processes to stop.
const PAUSE_DEADLINE: Duration = Duration::from_secs(20);
/// The pause after which a full channel is tried again. The async runtime must not block on a
/// crossbeam channel, and no response may be dropped.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// Requests for one container that may wait while another one is carried out.
const MAX_WAITING: usize = 32;
/// Processes that are killed at the same time.
const MAX_RUNNING: usize = 256;
/// The action of the record that a killed container was started again. No request causes it.
pub const RESTART: &str = "restart";
/// The message of a response to a request that has no room.
pub const TOO_MANY: &str = "too many responses wait to be carried out";

/// The actions of the records that the answers of a rule were stopped, and go on. No request to
/// a container runtime causes them.
pub const STOP_ANSWERS: &str = "stop-answers";
pub const RESUME_ANSWERS: &str = "resume-answers";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
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
    /// For a hook: which one, and what it gets.
    pub hook: Option<Box<HookCall>>,
}

impl ResponseRequest {
    /// The response if the request was not carried out.
    pub fn failed(&self, message: String) -> Response {
        self.ended(false, false, message)
    }

    fn ended(&self, succeeded: bool, gone: bool, message: String) -> Response {
        let action = self.action.name().to_owned();
        let message = match &self.hook {
            Some(call) => format!("{HOOK_BEGIN}{}: {message}", call.name),
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
    pub reason: String,
    pub requested_by: String,
    pub requested_at: Timestamp,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}

/// Carries out requests until their sender is gone and the last one is done, or until the
/// receiver of the responses is gone. Each request has one response, whatever happens.
pub async fn run(
    runtime: impl Runtime,
    hooks: Queue,
    requests: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) {
    let respond = move |request: ResponseRequest| {
        let (runtime, hooks) = (runtime.clone(), hooks.clone());
        async move {
            let response = match request.action {
                Action::Hook => run_hook(&hooks, request).await,
                _ => carry_out(runtime, request).await,
            };
            log(&response);
            response
        }
    };
    run_with(respond, requests, responses).await;
}

async fn run_with<Responding>(
    respond: impl Fn(ResponseRequest) -> Responding,
    mut requests: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) where
    Responding: Future<Output = Response> + Send + 'static,
{
    // Requests that wait for the one that is being carried out, by container.
    let mut waiting: HashMap<ContainerId, VecDeque<ResponseRequest>> = HashMap::new();
    let mut running: JoinSet<Response> = JoinSet::new();
    // Requests that are being carried out. Needed if one ends without a response.
    let mut carried: HashMap<task::Id, ResponseRequest> = HashMap::new();
    let begin =
        |request: ResponseRequest, running: &mut JoinSet<Response>, carried: &mut HashMap<_, _>| {
            carried.insert(running.spawn(respond(request.clone())).id(), request);
        };
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            request = requests.recv(), if open => match request {
                None => open = false,
                // The queue of hooks has bounds of its own, and no kill waits for a hook.
                Some(request) if request.action == Action::Hook => {
                    begin(request, &mut running, &mut carried);
                }
                // The processes of a container are killed side by side.
                Some(request) if request.action == Action::KillProcess => {
                    let is_hook = |one: &&ResponseRequest| one.action == Action::Hook;
                    let hooks = carried.values().filter(is_hook).count();
                    if running.len().saturating_sub(hooks) < MAX_RUNNING {
                        begin(request, &mut running, &mut carried);
                    } else if !send(&responses, request.failed(TOO_MANY.to_owned())).await {
                        return;
                    }
                }
                Some(request) => match waiting.get_mut(&request.container) {
                    Some(queue) if queue.len() < MAX_WAITING => queue.push_back(request),
                    Some(_) => {
                        let full = request.failed(TOO_MANY.to_owned());
                        if !send(&responses, full).await {
                            return;
                        }
                    }
                    None => {
                        waiting.insert(request.container.clone(), VecDeque::new());
                        begin(request, &mut running, &mut carried);
                    }
                },
            },
            Some(done) = running.join_next_with_id() => {
                let (id, response) = match done {
                    Ok((id, response)) => (id, Ok(response)),
                    Err(err) => (err.id(), Err(err)),
                };
                let Some(request) = carried.remove(&id) else { continue };
                let response = response.unwrap_or_else(|err| {
                    tracing::error!("a response request ended without a response: {err}");
                    request.failed("driftd failed while it was carried out; it may have happened".into())
                });
                if !matches!(request.action, Action::KillProcess | Action::Hook) {
                    match waiting.get_mut(&request.container).and_then(VecDeque::pop_front) {
                        Some(next) => begin(next, &mut running, &mut carried),
                        None => {
                            waiting.remove(&request.container);
                        }
                    }
                }
                if !send(&responses, response).await {
                    return;
                }
            }
        }
    }
}

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

async fn carry_out(runtime: impl Runtime, request: ResponseRequest) -> Response {
    let deadline = if request.action == Action::Pause { PAUSE_DEADLINE } else { DEADLINE };
    match tokio::time::timeout(deadline, send_to(&runtime, &request)).await {
        Ok(result) => response_to(&request, result),
        Err(_) => request.failed(format!(
            "containerd did not answer within {} s; the {} may still happen",
            deadline.as_secs(),
            request.action.name()
        )),
    }
}

fn log(response: &Response) {
    let outcome = &response.outcome;
    tracing::info!(
        container = %response.container,
        action = outcome.action,
        succeeded = outcome.succeeded,
        "{}",
        outcome.message
    );
}

/// Waits until a runner has run the hook of a request.
async fn run_hook(hooks: &Queue, request: ResponseRequest) -> Response {
    let Some(call) = &request.hook else {
        return request.failed("not run: its finding is not kept any more".to_owned());
    };
    let ResponseRequest { container, reason, requested_by, requested_at, .. } = &request;
    let about = Request { container, reason, requested_by, requested_at: *requested_at };
    let (order, settings) = match (call.order(&about), &call.settings) {
        (Ok(order), Some(settings)) => (order, settings),
        (Err(why), _) => return request.failed(format!("not run: {why}")),
        (Ok(_), None) => return request.failed("not run".to_owned()),
    };
    let ended = hooks.run(container.clone(), order, settings.wait).await;
    let message = ended.message(settings.timeout);
    let mut response = request.ended(ended.is_done(), false, message);
    // Only the administrator knows whether it may do twice what it has perhaps done.
    response.changed = ended.is_done() || ended.is_unknown() && !settings.retry;
    response
}

/// How the message about a hook begins, before its name.
const HOOK_BEGIN: &str = "hook ";

/// The hook that an outcome is of.
pub fn hook_of(outcome: &Outcome) -> Option<&str> {
    let text = outcome.message.strip_prefix(HOOK_BEGIN)?;
    let (name, _) = text.split_once(':')?;
    (outcome.action == Action::Hook.name()).then_some(name)
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
        // Elsewhere `run_hook` does it.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::baseline::{ImageName, RecordRequest};
    use crate::config;
    use crate::containerd::Recording;
    use crate::health::Health;
    use crate::model::{ChainId, LayerId};

    struct NoRecorder;

    impl Recording for NoRecorder {
        fn submit(&self, _job: RecordRequest) {}
        fn unrecorded(&self, _layers: &[LayerId]) -> Vec<LayerId> {
            Vec::new()
        }
        fn image_names(&self, _endpoint: &str, _listed: Vec<(ImageName, ChainId)>) {}
        fn image_removed(&self, _namespace: &str, _name: &str) {}
    }

    fn request(id: &str, action: Action) -> ResponseRequest {
        ResponseRequest {
            ticket: 0,
            container: ContainerId::new("default", id),
            pod: None,
            image: None,
            incarnation: None,
            process: None,
            action,
            reason: "a test".into(),
            requested_by: "uid 0 (pid 1)".into(),
            requested_at: Timestamp::UNIX_EPOCH,
            finding: None,
            no_restart: false,
            hook: None,
        }
    }

    #[tokio::test]
    async fn a_request_that_cannot_be_carried_out_has_a_response_all_the_same() {
        let (changes, _received) = crossbeam_channel::bounded(1);
        let settings = config::Containerd { sockets: Vec::new(), ..config::Containerd::default() };
        let containerd =
            Containerd::start(&settings, &changes, NoRecorder, &Arc::new(Health::default()));
        let (request_to, requests) = mpsc::channel(4);
        // Room for one response: the others wait, and none is dropped.
        let (response_to, responses) = crossbeam_channel::bounded(1);
        for action in [Action::Kill, Action::Pause, Action::Resume] {
            request_to.send(request("c", action)).await.unwrap();
        }
        drop(request_to);
        let running = tokio::spawn(run(containerd, Queue::default(), requests, response_to));
        let reported: Vec<(String, bool, String)> =
            tokio::task::spawn_blocking(move || responses.iter().collect::<Vec<_>>())
                .await
                .unwrap()
                .into_iter()
                .map(|response| {
                    let outcome = response.outcome;
                    (outcome.action, outcome.succeeded, outcome.message)
                })
                .collect();
        running.await.unwrap();
        let message = "no containerd knows the container default/c (see: driftd containers)";
        assert_eq!(
            reported,
            ["kill", "pause", "resume"].map(|action| (action.into(), false, message.into())),
            "in their order"
        );
    }

    /// Lets `respond` carry out `requests`, and returns the ticket and outcome of each.
    async fn responses_of<Responding>(
        requests: Vec<ResponseRequest>,
        respond: impl Fn(ResponseRequest) -> Responding + Send + 'static,
    ) -> Vec<(u64, bool, String)>
    where
        Responding: Future<Output = Response> + Send + 'static,
    {
        let (request_to, waiting) = mpsc::channel(128);
        let (response_to, responses) = crossbeam_channel::bounded(128);
        for request in requests {
            request_to.send(request).await.unwrap();
        }
        drop(request_to);
        run_with(respond, waiting, response_to).await;
        let reported = responses.iter();
        reported.map(|one| (one.ticket, one.outcome.succeeded, one.outcome.message)).collect()
    }

    #[tokio::test]
    async fn h11_a_request_that_panics_has_a_response_and_delays_no_later_one() {
        let numbered = |ticket| ResponseRequest { ticket, ..request("c", Action::Kill) };
        let reported = responses_of(vec![numbered(1), numbered(2)], |request| async move {
            assert_ne!(request.ticket, 1, "this one panics");
            request.ended(true, false, "killed".into())
        })
        .await;
        let failed = "driftd failed while it was carried out; it may have happened";
        assert_eq!(reported, [(1, false, failed.into()), (2, true, "killed".into())]);
    }

    #[tokio::test]
    async fn requests_for_one_container_beyond_those_that_may_wait_are_refused_at_once() {
        let count = MAX_WAITING as u64 + 3;
        let requests =
            (0..count).map(|ticket| ResponseRequest { ticket, ..request("c", Action::Kill) });
        let reported = responses_of(requests.collect(), |request| async move {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            request.ended(true, false, "killed".into())
        })
        .await;
        assert_eq!(reported.len() as u64, count, "each request has one response");
        let refused: Vec<u64> = reported
            .iter()
            .filter(|(_, succeeded, _)| !succeeded)
            .map(|(ticket, ..)| *ticket)
            .collect();
        assert_eq!(refused, [count - 2, count - 1]);
    }
}
