//! Carries a response out, through containerd, and says what came of it.
//!
//! Orders for one container are carried out one after the other, in their
//! order; those for different containers at the same time, so that one hanging
//! shim does not keep the others alive.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::containerd::Containerd;
use crate::model::{ContainerId, FindingId, Outcome};

/// How long one order may take before it has failed.
const DEADLINE: Duration = Duration::from_secs(10);
/// The runtime must not be blocked by a crossbeam channel, and a response must
/// not be dropped.
const FULL_PAUSE: Duration = Duration::from_millis(2);

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

/// Carries out orders until their sender is gone and the last one is done, or
/// nobody wants the responses any more.
pub async fn run(
    containerd: Containerd,
    mut orders: mpsc::Receiver<Order>,
    responses: Sender<Response>,
) {
    // Orders behind the one that is being carried out, by container.
    let mut behind: HashMap<ContainerId, VecDeque<Order>> = HashMap::new();
    let mut running: JoinSet<Response> = JoinSet::new();
    let mut open = true;
    while open || !running.is_empty() {
        tokio::select! {
            order = orders.recv(), if open => match order {
                None => open = false,
                Some(order) => match behind.get_mut(&order.container) {
                    Some(queue) => queue.push_back(order),
                    None => {
                        behind.insert(order.container.clone(), VecDeque::new());
                        running.spawn(carry_out(containerd.clone(), order));
                    }
                },
            },
            Some(done) = running.join_next() => {
                let response = match done {
                    Ok(response) => response,
                    Err(err) => {
                        tracing::error!("an order ended without a response: {err}");
                        continue;
                    }
                };
                match behind.get_mut(&response.container).and_then(VecDeque::pop_front) {
                    Some(next) => {
                        running.spawn(carry_out(containerd.clone(), next));
                    }
                    None => {
                        behind.remove(&response.container);
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

async fn carry_out(containerd: Containerd, order: Order) -> Response {
    let asked = async {
        match order.action {
            Action::Kill => containerd.kill(&order.container).await,
            Action::Pause => containerd.pause(&order.container).await,
            Action::Resume => containerd.resume(&order.container).await,
        }
    };
    let (succeeded, message) = match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(message)) => (true, message),
        Ok(Err(err)) => (false, err.to_string()),
        Err(_) => (
            false,
            format!(
                "containerd did not answer within {} s; the {} may still happen",
                DEADLINE.as_secs(),
                order.action.name()
            ),
        ),
    };
    let outcome =
        Outcome { action: order.action.name().into(), succeeded, message, at: Timestamp::now() };
    tracing::info!(
        container = %order.container,
        action = outcome.action,
        succeeded,
        "{}",
        outcome.message
    );
    Response {
        container: order.container,
        reason: order.reason,
        requested_by: order.requested_by,
        requested_at: order.requested_at,
        finding: order.finding,
        outcome,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::baseline::{ImageName, Job};
    use crate::config;
    use crate::containerd::Recording;
    use crate::health::Health;
    use crate::model::{ChainId, LayerId};

    struct NoRecorder;

    impl Recording for NoRecorder {
        fn submit(&self, _job: Job) {}
        fn unrecorded(&self, _layers: &[LayerId]) -> Vec<LayerId> {
            Vec::new()
        }
        fn image_names(&self, _endpoint: &str, _listed: Vec<(ImageName, ChainId)>) {}
        fn image_removed(&self, _namespace: &str, _name: &str) {}
    }

    fn order(id: &str, action: Action) -> Order {
        Order {
            container: ContainerId::new("default", id),
            action,
            reason: "a test".into(),
            requested_by: "uid 0 (pid 1)".into(),
            requested_at: Timestamp::UNIX_EPOCH,
            finding: None,
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
}
