//! Carries a response out, through containerd, and says what came of it.
//!
//! Orders for one container are carried out one after the other, in their
//! order; those for different containers at the same time, so that one hanging
//! shim does not keep the others alive.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::{self, JoinSet};

use crate::containerd::{Containerd, Error, Killed};
use crate::model::{ContainerId, FindingId, Incarnation, Outcome};

/// How long one order may take before it has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// The same for a pause: runtimes wait 10 s themselves for processes to stand still.
const PAUSE_DEADLINE: Duration = Duration::from_secs(20);
/// The runtime must not be blocked by a crossbeam channel, and a response must
/// not be dropped.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// Orders for one container that may wait while one of its is carried out.
const MOST_BEHIND: usize = 32;
/// What the record is called that a killed container was started again. Nobody asked driftd
/// for that.
pub const RESTART: &str = "restart";
/// What is said of an order for which there is no room.
pub const TOO_MANY: &str = "too many responses wait to be carried out";

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseRequest {
    /// By which its response is known; no two orders have the same.
    pub ticket: u64,
    pub container: ContainerId,
    /// The run that is meant. `None` if no run was known when it was ordered.
    pub incarnation: Option<Incarnation>,
    pub action: Action,
    pub reason: String,
    /// `uid 0 (pid 4242)` for a person, `setting respond.kill_on` for the policy.
    pub requested_by: String,
    pub requested_at: Timestamp,
    /// The finding that asked for it.
    pub finding: Option<FindingId>,
    /// Of a kill: containerd's restart monitor is to leave the container stopped.
    pub no_restart: bool,
}

impl ResponseRequest {
    /// That it was not carried out, and why.
    pub fn failed(&self, message: String) -> Response {
        self.answered(false, false, message)
    }

    fn answered(&self, succeeded: bool, gone: bool, message: String) -> Response {
        let action = self.action.name().to_owned();
        Response {
            ticket: self.ticket,
            container: self.container.clone(),
            incarnation: self.incarnation,
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
    /// Kills all processes of a run. `None` stands for a container of which no run is
    /// known. With `no_restart` the runtime does not start it again, if it would.
    fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        no_restart: bool,
    ) -> impl Future<Output = Result<Killed, Error>> + Send;

    /// Freezes a run; returns what happened, for people.
    fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> impl Future<Output = Result<String, Error>> + Send;

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

    async fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<String, Error> {
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

/// What came of an order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The order's. 0 for one that was read from the history.
    pub ticket: u64,
    pub container: ContainerId,
    pub incarnation: Option<Incarnation>,
    pub reason: String,
    pub requested_by: String,
    pub requested_at: Timestamp,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}

/// Carries out orders until their sender is gone and the last one is done, or
/// nobody wants the responses any more. Each order has one response, whatever happens.
pub async fn run(
    runtime: impl Runtime,
    orders: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) {
    let by_runtime = move |order: ResponseRequest| carry_out(runtime.clone(), order);
    run_with(by_runtime, orders, responses).await;
}

async fn run_with<Answering>(
    answer: impl Fn(ResponseRequest) -> Answering,
    mut orders: mpsc::Receiver<ResponseRequest>,
    responses: Sender<Response>,
) where
    Answering: Future<Output = Response> + Send + 'static,
{
    // Orders behind the one that is being carried out, by container.
    let mut behind: HashMap<ContainerId, VecDeque<ResponseRequest>> = HashMap::new();
    let mut running: JoinSet<Response> = JoinSet::new();
    // What is being carried out, for the case that this ends without a response.
    let mut carried: HashMap<task::Id, ResponseRequest> = HashMap::new();
    let begin =
        |order: ResponseRequest, running: &mut JoinSet<Response>, carried: &mut HashMap<_, _>| {
            carried.insert(running.spawn(answer(order.clone())).id(), order);
        };
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            order = orders.recv(), if open => match order {
                None => open = false,
                Some(order) => match behind.get_mut(&order.container) {
                    Some(queue) if queue.len() < MOST_BEHIND => queue.push_back(order),
                    Some(_) => {
                        let full = order.failed(TOO_MANY.to_owned());
                        if !send(&responses, full).await {
                            return;
                        }
                    }
                    None => {
                        behind.insert(order.container.clone(), VecDeque::new());
                        begin(order, &mut running, &mut carried);
                    }
                },
            },
            Some(done) = running.join_next_with_id() => {
                let (id, response) = match done {
                    Ok((id, response)) => (id, Ok(response)),
                    Err(err) => (err.id(), Err(err)),
                };
                let Some(order) = carried.remove(&id) else { continue };
                let response = response.unwrap_or_else(|err| {
                    tracing::error!("an order ended without a response: {err}");
                    order.failed("driftd failed while it was carried out; it may have happened".into())
                });
                match behind.get_mut(&order.container).and_then(VecDeque::pop_front) {
                    Some(next) => begin(next, &mut running, &mut carried),
                    None => {
                        behind.remove(&order.container);
                    }
                }
                if !send(&responses, response).await {
                    return;
                }
            }
        }
    }
}

/// False if nobody is there to receive it.
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

async fn carry_out(runtime: impl Runtime, order: ResponseRequest) -> Response {
    let deadline = if order.action == Action::Pause { PAUSE_DEADLINE } else { DEADLINE };
    let response = match tokio::time::timeout(deadline, ask(&runtime, &order)).await {
        Ok(result) => response_to(&order, result),
        Err(_) => order.failed(format!(
            "containerd did not answer within {} s; the {} may still happen",
            deadline.as_secs(),
            order.action.name()
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

/// Carries out one request by a runtime that never waits, such as a replayed one.
pub fn carry_out_now(runtime: &impl Runtime, order: &ResponseRequest) -> Response {
    let asked = pin!(ask(runtime, order));
    match asked.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => response_to(order, result),
        Poll::Pending => order.failed("the runtime did not answer at once".into()),
    }
}

async fn ask(runtime: &impl Runtime, order: &ResponseRequest) -> Result<Killed, Error> {
    let ResponseRequest { container, incarnation: meant, no_restart, .. } = order;
    let done = |message| Killed { message, restarter: None };
    match order.action {
        Action::Kill => runtime.kill(container, *meant, *no_restart).await,
        Action::Pause => runtime.pause(container, *meant).await.map(done),
        Action::Resume => runtime.resume(container, *meant).await.map(done),
    }
}

fn response_to(order: &ResponseRequest, result: Result<Killed, Error>) -> Response {
    match result {
        Ok(Killed { message, restarter }) => {
            let mut response = order.answered(true, false, message);
            response.outcome.restarter = restarter;
            response
        }
        Err(err @ (Error::Gone(_) | Error::UnknownContainer(_))) => {
            order.answered(false, true, err.to_string())
        }
        Err(err) => order.failed(err.to_string()),
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

    fn order(id: &str, action: Action) -> ResponseRequest {
        ResponseRequest {
            ticket: 0,
            container: ContainerId::new("default", id),
            incarnation: None,
            action,
            reason: "a test".into(),
            requested_by: "uid 0 (pid 1)".into(),
            requested_at: Timestamp::UNIX_EPOCH,
            finding: None,
            no_restart: false,
        }
    }

    #[tokio::test]
    async fn an_order_that_cannot_be_carried_out_is_answered_all_the_same() {
        let (changes, _received) = crossbeam_channel::bounded(1);
        let settings = config::Containerd { sockets: Vec::new(), ..config::Containerd::default() };
        let containerd =
            Containerd::start(&settings, &changes, NoRecorder, &Arc::new(Health::default()));
        let (order_to, orders) = mpsc::channel(4);
        // Room for one: the others wait, and none is dropped.
        let (response_to, responses) = crossbeam_channel::bounded(1);
        for action in [Action::Kill, Action::Pause, Action::Resume] {
            order_to.send(order("c", action)).await.unwrap();
        }
        drop(order_to);
        let running = tokio::spawn(run(containerd, orders, response_to));
        let told: Vec<(String, bool, String)> =
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
            told,
            ["kill", "pause", "resume"].map(|action| (action.into(), false, message.into())),
            "in their order"
        );
    }

    /// Has `orders` carried out by `answer`, and hands back whose response said what.
    async fn responses_of<Answering>(
        orders: Vec<ResponseRequest>,
        answer: impl Fn(ResponseRequest) -> Answering + Send + 'static,
    ) -> Vec<(u64, bool, String)>
    where
        Answering: Future<Output = Response> + Send + 'static,
    {
        let (order_to, waiting) = mpsc::channel(128);
        let (response_to, responses) = crossbeam_channel::bounded(128);
        for order in orders {
            order_to.send(order).await.unwrap();
        }
        drop(order_to);
        run_with(answer, waiting, response_to).await;
        let told = responses.iter();
        told.map(|one| (one.ticket, one.outcome.succeeded, one.outcome.message)).collect()
    }

    #[tokio::test]
    async fn h11_an_order_that_panics_has_a_response_and_holds_up_no_later_one() {
        let numbered = |ticket| ResponseRequest { ticket, ..order("c", Action::Kill) };
        let told = responses_of(vec![numbered(1), numbered(2)], |order| async move {
            assert_ne!(order.ticket, 1, "this one panics");
            order.answered(true, false, "killed".into())
        })
        .await;
        let failed = "driftd failed while it was carried out; it may have happened";
        assert_eq!(told, [(1, false, failed.into()), (2, true, "killed".into())]);
    }

    #[tokio::test]
    async fn orders_for_one_container_beyond_those_that_may_wait_are_refused_at_once() {
        let count = MOST_BEHIND as u64 + 3;
        let orders =
            (0..count).map(|ticket| ResponseRequest { ticket, ..order("c", Action::Kill) });
        let told = responses_of(orders.collect(), |order| async move {
            tokio::task::yield_now().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
            order.answered(true, false, "killed".into())
        })
        .await;
        assert_eq!(told.len() as u64, count, "each order has one response");
        let refused: Vec<u64> = told
            .iter()
            .filter(|(_, succeeded, _)| !succeeded)
            .map(|(ticket, ..)| *ticket)
            .collect();
        assert_eq!(refused, [count - 2, count - 1]);
    }
}
