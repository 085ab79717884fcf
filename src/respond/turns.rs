//! The requests of all containers in their turns.
//!
//! Each request has one response, whatever happens. What a request does is in `respond` and
//! `evidence`.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use super::{
    Action, Collector, Order, Response, ResponseRequest, Runtime, TOO_MANY, response_to, send,
    send_to,
};
use super::{evidence, hook};
use crate::hooks::Queue;
use crate::model::ContainerId;

/// How long one request may take before it has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same for a pause: runtimes themselves wait 10 s for the processes to stop.
const PAUSE_DEADLINE: Duration = Duration::from_secs(20);
/// Requests for one container that may wait while another one is carried out.
const MAX_WAITING: usize = 32;
/// Processes that are killed at the same time.
const MAX_RUNNING: usize = 256;

/// Carries out requests until their sender is gone and the last one is done, or until the
/// receiver of the responses is gone. Each request has one response, whatever happens.
pub async fn run(
    runtime: impl Runtime,
    collector: impl Collector,
    hooks: Queue,
    requests: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) {
    tokio::spawn(evidence::thaw_left(runtime.clone(), collector.clone(), responses.clone()));
    let deadline = collector.patience().deadline;
    let late = responses.clone();
    let carry_out = move |request: ResponseRequest| {
        let (runtime, collector, late) = (runtime.clone(), collector.clone(), late.clone());
        let hooks = hooks.clone();
        async move {
            let response = match request.action {
                Action::Evidence => {
                    return evidence::take(&runtime, &collector, request, &late).await;
                }
                Action::Hook => hook::run(&hooks, request).await,
                _ => carry_out(runtime, request).await,
            };
            log(&response);
            response
        }
    };
    run_with(carry_out, deadline, requests, responses).await;
}

/// The requests for one container.
#[derive(Default)]
struct Line {
    /// What is known of the evidence that is being taken.
    taking: Option<Order>,
    /// Requests that wait for the one that is being carried out.
    waiting: VecDeque<ResponseRequest>,
    /// Nothing is carried out, and nothing waits.
    is_over: bool,
}

impl Line {
    fn has_evidence(&self) -> bool {
        let is_evidence = |one: &ResponseRequest| one.action == Action::Evidence;
        self.taking.is_some() || self.waiting.iter().any(is_evidence)
    }

    /// What begins when the request before has ended: the kills of processes and the hooks that
    /// waited for it, and the next request whose end others wait for.
    fn next(&mut self, deadline: Duration) -> Vec<(ResponseRequest, bool)> {
        self.taking = None;
        let mut next = Vec::new();
        while let Some(request) = self.waiting.pop_front() {
            if is_beside(request.action) {
                next.push((request, false));
                continue;
            }
            self.taking = request.order();
            if let Some(taking) = &self.taking {
                self.waiting.iter().for_each(|one| taking.is_followed(one.action, deadline));
            }
            next.push((request, true));
            return next;
        }
        self.is_over = true;
        next
    }

    /// Evidence that something waits for does not last longer than a deadline.
    fn push(&mut self, request: ResponseRequest, deadline: Duration) {
        if let Some(taking) = &self.taking {
            taking.is_followed(request.action, deadline);
        }
        self.waiting.push_back(request);
    }
}

/// Whether others of its container do not wait for it. The processes of a container are killed
/// side by side, and no kill waits for a hook; but both come after evidence.
fn is_beside(action: Action) -> bool {
    matches!(action, Action::KillProcess | Action::Hook)
}

async fn run_with<Responding>(
    respond: impl Fn(ResponseRequest) -> Responding,
    deadline: Duration,
    mut requests: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) where
    Responding: Future<Output = Response> + Send + 'static,
{
    let mut lines: HashMap<ContainerId, Line> = HashMap::new();
    let mut running: JoinSet<Response> = JoinSet::new();
    // Requests that are being carried out, and whether others of their container wait for them.
    let mut carried: HashMap<task::Id, (ResponseRequest, bool)> = HashMap::new();
    let begin = |request: ResponseRequest,
                 in_turn,
                 running: &mut JoinSet<_>,
                 carried: &mut HashMap<_, _>| {
        let task = running.spawn(respond(request.clone()));
        carried.insert(task.id(), (request, in_turn));
    };
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            request = requests.recv(), if open => {
                let Some(request) = request else {
                    open = false;
                    continue;
                };
                let is_beside = is_beside(request.action);
                match lines.get_mut(&request.container) {
                    line if is_beside && !line.as_ref().is_some_and(|line| line.has_evidence()) => {
                        let is_hook = |one: &&(ResponseRequest, bool)| one.0.action == Action::Hook;
                        let hooks = carried.values().filter(is_hook).count();
                        // The queue of hooks has bounds of its own.
                        let has_room = running.len().saturating_sub(hooks) < MAX_RUNNING;
                        if has_room || request.action == Action::Hook {
                            begin(request, false, &mut running, &mut carried);
                        } else if !send(&responses, request.failed(TOO_MANY.to_owned())).await {
                            return;
                        }
                    }
                    Some(line) if line.waiting.len() < MAX_WAITING => line.push(request, deadline),
                    Some(_) => {
                        let full = request.failed(TOO_MANY.to_owned());
                        if !send(&responses, full).await {
                            return;
                        }
                    }
                    None => {
                        let line = Line { taking: request.order(), ..Line::default() };
                        lines.insert(request.container.clone(), line);
                        begin(request, true, &mut running, &mut carried);
                    }
                }
            },
            Some(done) = running.join_next_with_id() => {
                let (id, response) = match done {
                    Ok((id, response)) => (id, Ok(response)),
                    Err(err) => (err.id(), Err(err)),
                };
                let Some((request, in_turn)) = carried.remove(&id) else { continue };
                let response = response.unwrap_or_else(|err| {
                    tracing::error!("a response request ended without a response: {err}");
                    request.failed("driftd failed while it was carried out; it may have happened".into())
                });
                if in_turn {
                    let line = lines.entry(request.container.clone()).or_default();
                    for (next, in_turn) in line.next(deadline) {
                        begin(next, in_turn, &mut running, &mut carried);
                    }
                    lines.retain(|_, line| !line.is_over);
                }
                if !send(&responses, response).await {
                    return;
                }
            }
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::baseline::{ImageName, RecordRequest};
    use crate::config;
    use crate::containerd::{Containerd, Recording};
    use crate::health::Health;
    use crate::model::{ChainId, LayerId};
    use crate::respond::NoEvidence;

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
            evidence: None,
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
        let running =
            tokio::spawn(run(containerd, NoEvidence, Queue::default(), requests, response_to));
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
        run_with(respond, Duration::from_secs(1), waiting, response_to).await;
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

    /// What was begun and ended, in order.
    type Log = Arc<std::sync::Mutex<Vec<String>>>;

    fn of(ticket: u64, action: Action) -> ResponseRequest {
        ResponseRequest { ticket, ..request("c", action) }
    }

    fn order() -> Order {
        let id = ContainerId::new("default", "c");
        let container = crate::model::Container {
            id: id.clone(),
            endpoint: "".into(),
            runtime: String::new(),
            created_at: None,
            labels: Default::default(),
            pod: None,
            image: Default::default(),
            snapshotter: String::new(),
            snapshot_key: String::new(),
            layers: Vec::new(),
            rootfs: None,
            task: None,
            no_baseline: None,
            id_map: None,
            entry_point: Default::default(),
            probes: Vec::new(),
        };
        Order {
            case: crate::model::CaseId([1; 16]),
            container: Box::new(container),
            workload: "container default/c".into(),
            kind: None,
            process: None,
            path: None,
            by_rule: true,
            environment: false,
            until: Default::default(),
        }
    }

    fn evidence(ticket: u64) -> ResponseRequest {
        let evidence = Some(Box::new(order()));
        ResponseRequest { evidence, ..of(ticket, Action::Evidence) }
    }

    #[tokio::test]
    async fn what_destroys_waits_for_evidence_and_processes_are_killed_side_by_side_after_it() {
        let log = Log::default();
        let written = log.clone();
        let requests = vec![
            evidence(1),
            of(2, Action::KillProcess),
            of(3, Action::KillProcess),
            of(4, Action::Kill),
            ResponseRequest { container: ContainerId::new("default", "d"), ..of(5, Action::Kill) },
        ];
        let reported = responses_of(requests, move |request| {
            let log = written.clone();
            async move {
                let write =
                    |what: &str| log.lock().unwrap().push(format!("{what} {}", request.ticket));
                write("begins");
                let (other, long) = (request.ticket == 5, Duration::from_millis(100));
                tokio::time::sleep(if other { Duration::ZERO } else { long }).await;
                write("ends");
                request.ended(true, false, "done".into())
            }
        })
        .await;
        assert_eq!(reported.len(), 5);
        let log = log.lock().unwrap();
        let at = |what: &str| log.iter().position(|line| line == what).unwrap();
        assert!(at("begins 2") > at("ends 1") && at("begins 3") > at("ends 1"), "{log:?}");
        assert!(at("begins 3") < at("ends 2") && at("begins 4") < at("ends 2"), "{log:?}");
        assert!(at("ends 5") < at("ends 1"), "another container does not wait: {log:?}");
    }

    #[tokio::test]
    async fn evidence_by_hand_has_less_time_as_soon_as_something_waits_for_it() {
        let by_hand = evidence(1);
        let until = by_hand.evidence.as_ref().unwrap().until.clone();
        let long = std::time::Instant::now() + Duration::from_secs(600);
        until.shorten(long);
        assert_eq!(until.get(), Some(long));
        let asked = until.clone();
        responses_of(vec![by_hand, of(2, Action::Kill)], move |request| {
            let until = asked.clone();
            async move {
                while request.ticket == 1 && until.get() == Some(long) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                request.ended(true, false, "done".into())
            }
        })
        .await;
        assert!(until.get().unwrap() <= std::time::Instant::now() + Duration::from_secs(1));
    }

    /// A runtime that does all it is asked to, and a collector that takes 300 ms.
    #[derive(Clone)]
    struct Slow(Log);

    impl Slow {
        fn done(&self, what: &str) -> Result<crate::containerd::Killed, crate::containerd::Error> {
            self.0.lock().unwrap().push(what.to_owned());
            let message = what.to_owned();
            Ok(crate::containerd::Killed { message, restarter: None, changed: true })
        }
    }

    impl Runtime for Slow {
        async fn kill(
            &self,
            _: &ContainerId,
            _: Option<crate::model::Incarnation>,
            _: bool,
        ) -> Result<crate::containerd::Killed, crate::containerd::Error> {
            self.done("kill")
        }

        async fn kill_process(
            &self,
            _: &ContainerId,
            _: Option<crate::model::Incarnation>,
            _: crate::model::ProcessIdentity,
        ) -> Result<String, crate::containerd::Error> {
            self.done("kill-process").map(|done| done.message)
        }

        async fn pause(
            &self,
            _: &ContainerId,
            _: Option<crate::model::Incarnation>,
        ) -> Result<crate::containerd::Killed, crate::containerd::Error> {
            self.done("pause")
        }

        async fn resume(
            &self,
            _: &ContainerId,
            _: Option<crate::model::Incarnation>,
        ) -> Result<String, crate::containerd::Error> {
            self.done("resume").map(|done| done.message)
        }

        async fn specification(
            &self,
            _: &ContainerId,
        ) -> Result<Vec<u8>, crate::containerd::Error> {
            Ok(b"{}".to_vec())
        }
    }

    impl crate::respond::Notes for Slow {
        fn freezes(&self, _: &crate::respond::Frozen) -> std::io::Result<()> {
            self.0.lock().unwrap().push("noted".into());
            Ok(())
        }

        fn has_thawed(&self, _: &crate::respond::Frozen) {
            self.0.lock().unwrap().push("forgotten".into());
        }

        fn left_frozen(&self) -> Vec<crate::respond::Frozen> {
            Vec::new()
        }
    }

    impl Collector for Slow {
        fn patience(&self) -> crate::respond::Patience {
            crate::respond::Patience { deadline: Duration::from_millis(100), pause: true }
        }

        fn take(
            &self,
            task: crate::respond::Task,
        ) -> tokio::sync::oneshot::Receiver<Result<crate::respond::Taken, String>> {
            let (reply, receiver) = tokio::sync::oneshot::channel();
            self.0.lock().unwrap().push(format!("take, frozen: {}", task.is_frozen));
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(300));
                let digest = crate::model::Sha256Hash([7; 32]);
                let message = "kept".to_owned();
                reply.send(Ok(crate::respond::Taken { case: task.order.case, digest, message }))
            });
            receiver
        }

        fn is_late(&self) {
            self.0.lock().unwrap().push("late".into());
        }
    }

    async fn with_slow(requests: Vec<ResponseRequest>) -> (Vec<Response>, Vec<String>) {
        let slow = Slow(Log::default());
        let (request_to, waiting) = mpsc::channel(8);
        let (response_to, responses) = crossbeam_channel::unbounded();
        for request in requests {
            request_to.send(request).await.unwrap();
        }
        drop(request_to);
        run(slow.clone(), slow.clone(), Queue::default(), waiting, response_to).await;
        // The late record comes when the thread has ended.
        let all = tokio::task::spawn_blocking(move || responses.iter().collect()).await.unwrap();
        (all, slow.0.lock().unwrap().clone())
    }

    #[tokio::test]
    async fn an_answer_waits_no_longer_than_the_deadline_and_what_was_kept_is_recorded_later() {
        let run = Some(crate::model::Incarnation { pid: 7, start_time: Some(1), created_at: None });
        let asked = ResponseRequest { incarnation: run, ..evidence(1) };
        let begun = std::time::Instant::now();
        let kill = ResponseRequest { incarnation: run, ..of(2, Action::Kill) };
        let (responses, log) = with_slow(vec![asked, kill]).await;
        let short = |one: &Response| {
            let outcome = &one.outcome;
            (one.ticket, outcome.action.clone(), outcome.succeeded, one.case.is_some())
        };
        let all: Vec<_> = responses.iter().map(short).collect();
        let expected = [
            (1, "evidence".to_owned(), false, false),
            (2, "kill".to_owned(), true, false),
            (0, "evidence".to_owned(), true, true),
        ];
        assert_eq!(all, expected);
        assert!(responses[2].outcome.message.ends_with("(after its deadline)"));
        let kill_after = responses[1].outcome.at.duration_since(responses[0].outcome.at);
        assert!(kill_after.as_millis() < 200 && begun.elapsed() >= Duration::from_millis(300));
        // It is not thawed, because a kill follows.
        assert_eq!(log, ["noted", "pause", "take, frozen: true", "forgotten", "late", "kill"]);
        let alone = ResponseRequest { incarnation: run, ..evidence(1) };
        let (_, log) = with_slow(vec![alone]).await;
        let expected = ["noted", "pause", "take, frozen: true", "resume", "forgotten", "late"];
        assert_eq!(log, expected);
    }
}
