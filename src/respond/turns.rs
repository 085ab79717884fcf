//! The requests of all containers in their turns.
//!
//! Each request has one response, whatever happens. What a request does is in `respond` and
//! `evidence`.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crossbeam_channel::Sender;
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use super::evidence;
use super::{
    Action, Collector, Order, Response, ResponseRequest, Runtime, TOO_MANY, response_to, send,
    send_to,
};
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
    requests: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) {
    tokio::spawn(evidence::thaw_left(runtime.clone(), collector.clone(), responses.clone()));
    let deadline = collector.patience().deadline;
    let carry_out = move |request: ResponseRequest| {
        let (runtime, collector) = (runtime.clone(), collector.clone());
        async move {
            match request.action {
                Action::Evidence => evidence::take(&runtime, &collector, request).await,
                _ => carry_out(runtime, request).await,
            }
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

    /// What begins when the request before has ended: the kills of processes that waited for it,
    /// and the next request whose end others wait for.
    fn next(&mut self, deadline: Duration) -> Vec<(ResponseRequest, bool)> {
        self.taking = None;
        let mut next = Vec::new();
        while let Some(request) = self.waiting.pop_front() {
            if request.action == Action::KillProcess {
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
                let is_of_process = request.action == Action::KillProcess;
                match lines.get_mut(&request.container) {
                    // The processes of a container are killed side by side, but after evidence.
                    line if is_of_process && !line.as_ref().is_some_and(|line| line.has_evidence()) => {
                        if running.len() < MAX_RUNNING {
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
    let response = match tokio::time::timeout(deadline, send_to(&runtime, &request)).await {
        Ok(result) => response_to(&request, result),
        Err(_) => request.failed(format!(
            "containerd did not answer within {} s; the {} may still happen",
            deadline.as_secs(),
            request.action.name()
        )),
    };
    let outcome = &response.outcome;
    tracing::info!(
        container = %response.container,
        action = outcome.action,
        succeeded = outcome.succeeded,
        "{}",
        outcome.message
    );
    response
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
        let running = tokio::spawn(run(containerd, NoEvidence, requests, response_to));
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
}
