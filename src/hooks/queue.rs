//! The hooks that wait for a runner, and those that it runs. Bounded.
//!
//! One runner is connected at a time. It gets as many orders at once as it asks for, and one at
//! a time for each container. What no runner takes in time has failed. What a runner has taken
//! and not reported is not known.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::call::{End, Ended, Order};
use crate::model::ContainerId;

/// Orders that may wait.
const MAX_WAITING: usize = 256;
/// How long a runner may take to report an end, beyond the time that the program has.
const REPORT_WITHIN: Duration = Duration::from_secs(10);

/// Hooks that wait and run. A clone is the same queue.
#[derive(Clone, Debug, Default)]
pub struct Queue(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// The last number of an order.
    number: u64,
    waiting: VecDeque<Waiting>,
    running: HashMap<u64, Running>,
    runner: Option<Runner>,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    container: ContainerId,
    order: Order,
    started: oneshot::Sender<()>,
    ended: oneshot::Sender<Ended>,
}

#[derive(Debug)]
struct Running {
    container: ContainerId,
    ended: oneshot::Sender<Ended>,
}

#[derive(Debug)]
struct Runner {
    number: u64,
    /// The client, for people.
    client: String,
    at_once: usize,
    orders: mpsc::Sender<(u64, Order)>,
}

/// Another runner is connected: this client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("another runner is connected ({0}): stop it first (systemctl stop driftd-hooks)")]
pub struct Busy(pub String);

/// A connected runner. When it is dropped, another one may connect.
#[derive(Debug)]
pub struct Connection {
    queue: Queue,
    number: u64,
    pub orders: mpsc::Receiver<(u64, Order)>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        if state.runner.as_ref().is_some_and(|runner| runner.number == self.number) {
            state.runner = None;
            // Dropped senders: the end of what it ran is not known.
            state.running.clear();
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connected runner, how many orders wait for it, and how many it runs.
    pub fn view(&self) -> (Option<String>, usize, usize) {
        let state = self.lock();
        let runner = state.runner.as_ref().map(|runner| runner.client.clone());
        (runner, state.waiting.len(), state.running.len())
    }

    /// How many orders wait for a runner.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    pub fn connect(&self, at_once: usize, client: String) -> Result<Connection, Busy> {
        let mut state = self.lock();
        if let Some(runner) = &state.runner {
            return Err(Busy(runner.client.clone()));
        }
        let number = state.next_number();
        let (sender, orders) = mpsc::channel(at_once.max(1));
        state.runner = Some(Runner { number, client, at_once, orders: sender });
        state.hand_out();
        Ok(Connection { queue: self.clone(), number, orders })
    }

    /// Takes in how a hook has ended. False if its end is not waited for.
    pub fn ended(&self, number: u64, ended: Ended) -> bool {
        let mut state = self.lock();
        let Some(running) = state.running.remove(&number) else { return false };
        let is_waited_for = running.ended.send(ended).is_ok();
        state.hand_out();
        is_waited_for
    }

    /// Waits for a runner, at most this long, and until it has run the program.
    pub async fn run(&self, container: ContainerId, order: Order, wait: Duration) -> Ended {
        let report = order.timeout.saturating_add(REPORT_WITHIN);
        self.run_within(container, order, wait, report).await
    }

    async fn run_within(
        &self,
        container: ContainerId,
        order: Order,
        wait: Duration,
        report: Duration,
    ) -> Ended {
        let (started, is_started) = oneshot::channel();
        let (ended, end) = oneshot::channel();
        let number = {
            let mut state = self.lock();
            if state.waiting.len() >= MAX_WAITING {
                let why = format!("{MAX_WAITING} hooks wait already");
                return End::NotStarted(why).into();
            }
            let number = state.next_number();
            state.waiting.push_back(Waiting { number, container, order, started, ended });
            state.hand_out();
            number
        };
        // An error only means that it waited too long: the queue drops no sender before that.
        if tokio::time::timeout(wait, is_started).await.is_err()
            && let Some(why) = self.lock().give_up(number)
        {
            return End::NotStarted(why).into();
        }
        match tokio::time::timeout(report, end).await {
            Ok(Ok(ended)) => ended,
            Ok(Err(_)) => End::RunnerGone.into(),
            Err(_) => {
                let mut state = self.lock();
                state.running.remove(&number);
                state.hand_out();
                End::NoReport.into()
            }
        }
    }
}

impl State {
    /// Numbers of another run of the daemon are others: a late report must end no other hook.
    fn next_number(&mut self) -> u64 {
        let now = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or_default();
        self.number = now.max(self.number.saturating_add(1));
        self.number
    }

    /// Takes back an order that waits, and returns why it waited in vain. `None` if it runs.
    fn give_up(&mut self, number: u64) -> Option<String> {
        let at = self.waiting.iter().position(|one| one.number == number)?;
        self.waiting.remove(at);
        Some(match &self.runner {
            None => "no runner is connected (start it: systemctl enable --now driftd-hooks)".into(),
            Some(_) => "other hooks ran all the time".to_owned(),
        })
    }

    /// Gives the runner what it may run now, the oldest first.
    fn hand_out(&mut self) {
        let State { waiting, running, runner, .. } = self;
        let Some(runner) = runner else { return };
        // The request of one that waits may be gone, when the daemon stops.
        waiting.retain(|one| !one.ended.is_closed());
        while running.len() < runner.at_once {
            let is_free =
                |one: &Waiting| !running.values().any(|other| other.container == one.container);
            let Some(at) = waiting.iter().position(is_free) else { return };
            // A runner that does not take what it has gets no more.
            let Ok(place) = runner.orders.try_reserve() else { return };
            let Some(Waiting { number, container, order, started, ended }) = waiting.remove(at)
            else {
                return;
            };
            place.send((number, order));
            let _ = started.send(());
            running.insert(number, Running { container, ended });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);
    const SHORT: Duration = Duration::from_millis(20);

    fn order(hook: &str) -> Order {
        Order {
            hook: hook.into(),
            program: "/bin/true".into(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            input: Vec::new(),
            timeout: Duration::from_secs(1),
            user: None,
        }
    }

    /// Requests a hook for a container, and lets it begin to wait.
    async fn request(queue: &Queue, hook: &str, container: &str) -> tokio::task::JoinHandle<Ended> {
        let (queue, order, container) =
            (queue.clone(), order(hook), ContainerId::new("n", container));
        let running = tokio::spawn(async move { queue.run(container, order, LONG).await });
        tokio::task::yield_now().await;
        running
    }

    fn taken(connection: &mut Connection) -> Vec<(u64, String)> {
        std::iter::from_fn(|| connection.orders.try_recv().ok())
            .map(|(number, order)| (number, order.hook))
            .collect()
    }

    #[tokio::test]
    async fn without_a_runner_a_hook_waits_and_then_says_what_to_start() {
        let queue = Queue::default();
        let ended = queue.run(ContainerId::new("n", "c"), order("h"), SHORT).await;
        let End::NotStarted(why) = &ended.end else { panic!("{ended:?}") };
        assert!(why.contains("systemctl enable --now driftd-hooks"), "{why}");
        assert!(!ended.is_unknown() && !ended.is_done());
        assert_eq!(queue.waiting(), 0);
    }

    #[tokio::test]
    async fn a_runner_gets_one_hook_of_a_container_at_a_time_and_no_more_than_it_asks_for() {
        let queue = Queue::default();
        let mut waiting = Vec::new();
        for (hook, container) in [("1", "a"), ("2", "a"), ("3", "b"), ("4", "c")] {
            waiting.push(request(&queue, hook, container).await);
        }
        let mut runner = queue.connect(2, "uid 0 pid 1".into()).unwrap();
        let first = taken(&mut runner);
        assert_eq!(first.iter().map(|one| one.1.as_str()).collect::<Vec<_>>(), ["1", "3"]);
        assert!(queue.ended(first[0].0, End::Exited(0).into()));
        assert!(!queue.ended(first[0].0, End::Exited(0).into()), "once");
        assert_eq!(waiting.remove(0).await.unwrap(), End::Exited(0).into());
        assert_eq!(taken(&mut runner)[0].1, "2");
    }

    #[tokio::test]
    async fn a_second_runner_is_refused_and_takes_over_when_the_first_is_gone() {
        let queue = Queue::default();
        let runner = queue.connect(1, "uid 0 pid 1".into()).unwrap();
        assert_eq!(queue.connect(1, "x".into()).unwrap_err(), Busy("uid 0 pid 1".into()));
        let interrupted = request(&queue, "1", "a").await;
        let next = request(&queue, "2", "a").await;
        drop(runner);
        let ended = interrupted.await.unwrap();
        assert_eq!(ended, End::RunnerGone.into());
        assert!(ended.is_unknown());
        let mut runner = queue.connect(1, "x".into()).unwrap();
        let (number, hook) = taken(&mut runner).remove(0);
        assert_eq!(hook, "2");
        assert!(queue.ended(number, End::Exited(1).into()));
        assert_eq!(next.await.unwrap(), End::Exited(1).into());
    }

    #[tokio::test]
    async fn a_runner_that_reports_nothing_holds_its_place_for_a_limited_time() {
        let queue = Queue::default();
        let _runner = queue.connect(4, "x".into()).unwrap();
        let container = ContainerId::new("n", "c");
        let ended = queue.run_within(container, order("h"), LONG, SHORT).await;
        assert_eq!(ended, End::NoReport.into());
        assert!(queue.lock().running.is_empty());
    }

    #[tokio::test]
    async fn more_than_may_wait_are_refused_at_once() {
        let queue = Queue::default();
        let mut waiting = Vec::new();
        for number in 0..MAX_WAITING {
            waiting.push(request(&queue, "h", &number.to_string()).await);
        }
        let refused = queue.run(ContainerId::new("n", "c"), order("h"), LONG).await;
        assert_eq!(refused, End::NotStarted("256 hooks wait already".into()).into());
        for one in waiting {
            one.abort();
        }
    }
}
