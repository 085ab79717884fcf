//! Says to the pipeline what has changed, in an order that is true.
//!
//! Events tell what *happened*; records are *asked for* and take a while. A
//! record asked for before an event and answered after it would take the event
//! back. So every event moves a clock, an answer carries the clock's time at
//! which it was asked for, and an answer older than its container's last event
//! is refused: the asker asks again.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::Mutex;

use super::{Lane, RuntimeEvent, Urgent};
use crate::model::{Container, ContainerId, OverlayDirs, Task};

/// The pipeline is gone: driftd is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped;

/// When something was asked for, on the outbox's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Asked(u64);

/// What became of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Taken,
    /// Something has happened since it was asked for; ask again.
    Outdated,
    /// Taken, but it contradicts a recent event, which was believed instead.
    AskAgainLater,
}

/// For this long the event "task created" is believed although containerd does
/// not know the task: the shim publishes the event before containerd has filed it.
const BELIEVE_EVENT: Duration = Duration::from_secs(5);
/// The runtime must not be blocked by a crossbeam channel, and a change of what
/// there is must not be dropped.
const FULL_PAUSE: Duration = Duration::from_millis(2);

pub(super) struct Outbox {
    endpoint: Arc<str>,
    changes: Sender<RuntimeEvent>,
    lane: Option<Lane>,
    state: Mutex<State>,
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    clock: u64,
    /// When the connection began: answers asked for on an earlier one may miss
    /// what nobody heard of in between.
    connected: u64,
    containers: HashMap<ContainerId, Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// The clock's time of its last event.
    changed: u64,
    removed: bool,
    /// The task the pipeline was told of.
    running: Option<u32>,
    /// When an event said that this task was created.
    created: Option<Instant>,
    /// The record the pipeline has, while nothing has happened since.
    sent: Option<Container>,
}

impl State {
    /// Notes that something has happened to `container`.
    fn event(&mut self, container: &ContainerId) -> &mut Known {
        self.clock += 1;
        let known = self.containers.entry(container.clone()).or_default();
        known.changed = self.clock;
        known.sent = None;
        known
    }

    fn is_outdated(&self, asked: Asked, container: &ContainerId) -> bool {
        let changed = self.containers.get(container).map_or(0, |known| known.changed);
        asked.0 < changed.max(self.connected)
    }
}

impl Outbox {
    pub(super) fn new(
        endpoint: Arc<str>,
        changes: Sender<RuntimeEvent>,
        lane: Option<Lane>,
    ) -> Outbox {
        Outbox { endpoint, changes, lane, state: Mutex::default() }
    }

    /// What no event has told, but a record, is said on the fast way too, before anything
    /// else and in its order: whoever calls this holds the lock.
    fn created(&self, container: &ContainerId, pid: u32, rootfs: Option<&OverlayDirs>) {
        if let Some(lane) = &self.lane {
            let (container, rootfs) = (container.clone(), rootfs.cloned());
            lane(Urgent::TaskCreated { container, pid, rootfs });
        }
    }

    fn exited(&self, container: &ContainerId, pid: Option<u32>) {
        if let (Some(lane), Some(pid)) = (&self.lane, pid) {
            lane(Urgent::TaskExited { container: container.clone(), pid });
        }
    }

    pub(super) async fn connected(&self) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        state.clock += 1;
        state.connected = state.clock;
        for known in state.containers.values_mut() {
            known.sent = None;
        }
        self.send(RuntimeEvent::Connected { endpoint: Arc::clone(&self.endpoint) }).await
    }

    pub(super) async fn disconnected(&self, reason: String) -> Result<(), Stopped> {
        let _order = self.state.lock().await;
        self.send(RuntimeEvent::Disconnected { endpoint: Arc::clone(&self.endpoint), reason }).await
    }

    pub(super) async fn task_created(
        &self,
        container: ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
    ) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        let known = state.event(&container);
        known.removed = false;
        known.running = Some(pid);
        known.created = Some(Instant::now());
        self.send(RuntimeEvent::TaskCreated { container, pid, rootfs }).await
    }

    pub(super) async fn task_exited(&self, container: ContainerId) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        let known = state.event(&container);
        known.running = None;
        known.created = None;
        self.send(RuntimeEvent::TaskExited { container }).await
    }

    pub(super) async fn removed(&self, container: ContainerId) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        let known = state.event(&container);
        // What is left marks that answers from before are outdated.
        *known = Known { changed: known.changed, removed: true, ..Known::default() };
        self.send(RuntimeEvent::Removed { container }).await
    }

    /// Gives on what is said of an exec; false if it was dropped, for want of room.
    ///
    /// Nobody waits here, neither for the lock nor for the channel, of which execs
    /// get no more than half: however many there are, a task that was created finds
    /// room behind them. It is no event of the container's record, which stays true.
    pub(super) fn exec(&self, change: RuntimeEvent) -> Result<bool, Stopped> {
        let has_room =
            self.changes.capacity().is_none_or(|capacity| self.changes.len() < capacity / 2);
        if !has_room {
            return Ok(false);
        }
        match self.changes.try_send(change) {
            Ok(()) => Ok(true),
            Err(TrySendError::Full(_)) => Ok(false),
            Err(TrySendError::Disconnected(_)) => Err(Stopped),
        }
    }

    /// Something else has happened to it: what was asked before is outdated.
    pub(super) async fn changed(&self, container: &ContainerId) {
        self.state.lock().await.event(container);
    }

    /// containerd has no such record (any more).
    pub(super) async fn gone(
        &self,
        asked: Asked,
        container: &ContainerId,
    ) -> Result<Answer, Stopped> {
        let mut state = self.state.lock().await;
        if state.is_outdated(asked, container) {
            return Ok(Answer::Outdated);
        }
        if state.containers.get(container).is_some_and(|known| !known.removed) {
            let known = state.event(container);
            self.exited(container, known.running);
            *known = Known { changed: known.changed, removed: true, ..Known::default() };
            self.send(RuntimeEvent::Removed { container: container.clone() }).await?;
        }
        Ok(Answer::Taken)
    }

    /// To be called before containerd is asked.
    pub(super) async fn asking(&self) -> Asked {
        Asked(self.state.lock().await.clock)
    }

    /// Sends a record, unless it is outdated or what the pipeline has already.
    pub(super) async fn container(
        &self,
        asked: Asked,
        mut container: Container,
    ) -> Result<Answer, Stopped> {
        let mut state = self.state.lock().await;
        if state.is_outdated(asked, &container.id) {
            return Ok(Answer::Outdated);
        }
        let known = state.containers.entry(container.id.clone()).or_default();
        let mut answer = Answer::Taken;
        if container.task.is_none()
            && let (Some(pid), Some(created)) = (known.running, known.created)
            && created.elapsed() < BELIEVE_EVENT
        {
            container.task =
                Some(Task { pid, start_time: None, paused: false, terminal_input: None });
            answer = Answer::AskAgainLater;
        }
        known.removed = false;
        if known.sent.as_ref() == Some(&container) {
            return Ok(answer);
        }
        let pid = container.task.as_ref().map(|task| task.pid);
        if known.running != pid {
            self.exited(&container.id, known.running);
            if let Some(pid) = pid {
                self.created(&container.id, pid, container.rootfs.as_ref());
            }
        }
        if known.running.is_some() && known.running != pid {
            // Its exit was not heard of.
            self.send(RuntimeEvent::TaskExited { container: container.id.clone() }).await?;
        }
        known.running = pid;
        known.sent = Some(container.clone());
        self.send(RuntimeEvent::Container(Box::new(container))).await?;
        Ok(answer)
    }

    /// Ends a list that was asked for at `asked`. What has come or gone by an
    /// event since is added or left out, and what is in neither is forgotten.
    pub(super) async fn listed(
        &self,
        asked: Asked,
        listed: Vec<ContainerId>,
    ) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        let mut containers: HashSet<ContainerId> = listed.into_iter().collect();
        state.containers.retain(|container, known| {
            if known.changed > asked.0 {
                if known.removed {
                    containers.remove(container);
                } else {
                    containers.insert(container.clone());
                }
                true
            } else {
                !known.removed && containers.contains(container)
            }
        });
        let mut containers: Vec<_> = containers.into_iter().collect();
        containers.sort();
        self.send(RuntimeEvent::Listed { endpoint: Arc::clone(&self.endpoint), containers }).await
    }

    /// Whether this container was heard of and not removed.
    pub(super) async fn knows(&self, container: &ContainerId) -> bool {
        self.state.lock().await.containers.get(container).is_some_and(|known| !known.removed)
    }

    async fn send(&self, mut change: RuntimeEvent) -> Result<(), Stopped> {
        loop {
            match self.changes.try_send(change) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(back)) => change = back,
                Err(TrySendError::Disconnected(_)) => return Err(Stopped),
            }
            tokio::time::sleep(FULL_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::Receiver;

    use super::*;
    use crate::model::{EntryPoint, ImageReference};

    fn id(name: &str) -> ContainerId {
        ContainerId::new("default", name)
    }

    fn record(name: &str, task: Option<u32>) -> Container {
        Container {
            id: id(name),
            endpoint: "test".into(),
            runtime: "io.containerd.runc.v2".into(),
            labels: crate::model::Labels::default(),
            pod: None,
            image: ImageReference::default(),
            snapshotter: "overlayfs".into(),
            snapshot_key: name.into(),
            layers: Vec::new(),
            rootfs: None,
            created_at: None,
            task: task.map(|pid| Task {
                pid,
                start_time: None,
                paused: false,
                terminal_input: None,
            }),
            no_baseline: None,
            id_map: None,
            entry_point: EntryPoint::default(),
            probes: Vec::new(),
        }
    }

    fn outbox() -> (Outbox, Receiver<RuntimeEvent>) {
        let (changes, received) = crossbeam_channel::bounded(16);
        (Outbox::new("test".into(), changes, None), received)
    }

    #[tokio::test]
    async fn h08_what_a_record_tells_of_a_task_is_told_at_once() {
        let (changes, _received) = crossbeam_channel::bounded(16);
        let (told, urgent) = crossbeam_channel::unbounded();
        let lane: Lane = Arc::new(move |one| told.send(one).unwrap());
        let outbox = Outbox::new("test".into(), changes, Some(lane));
        for task in [Some(7), Some(7), Some(8), None] {
            outbox.container(outbox.asking().await, record("c", task)).await.unwrap();
        }
        outbox.container(outbox.asking().await, record("d", Some(9))).await.unwrap();
        outbox.gone(outbox.asking().await, &id("d")).await.unwrap();
        let created = |name, pid| Urgent::TaskCreated { container: id(name), pid, rootfs: None };
        let exited = |name, pid| Urgent::TaskExited { container: id(name), pid };
        assert_eq!(
            urgent.try_iter().collect::<Vec<_>>(),
            [
                created("c", 7),
                exited("c", 7),
                created("c", 8),
                exited("c", 8),
                created("d", 9),
                exited("d", 9),
            ]
        );
    }

    fn sent(received: &Receiver<RuntimeEvent>) -> Vec<RuntimeEvent> {
        received.try_iter().collect()
    }

    fn container(name: &str, task: Option<u32>) -> RuntimeEvent {
        RuntimeEvent::Container(Box::new(record(name, task)))
    }

    #[tokio::test]
    async fn an_answer_does_not_take_an_event_back() {
        let (outbox, received) = outbox();
        let asked = outbox.asking().await;
        outbox.task_created(id("c"), 7, None).await.unwrap();
        outbox.task_exited(id("c")).await.unwrap();
        let answer = outbox.container(asked, record("c", Some(7))).await;
        assert_eq!(answer, Ok(Answer::Outdated));
        let answer = outbox.container(outbox.asking().await, record("c", None)).await;
        assert_eq!(answer, Ok(Answer::Taken));
        assert_eq!(
            sent(&received),
            [
                RuntimeEvent::TaskCreated { container: id("c"), pid: 7, rootfs: None },
                RuntimeEvent::TaskExited { container: id("c") },
                container("c", None),
            ]
        );
    }

    #[tokio::test]
    async fn a_removed_container_stays_removed() {
        let (outbox, received) = outbox();
        let asked = outbox.asking().await;
        outbox.removed(id("c")).await.unwrap();
        let answer = outbox.container(asked, record("c", None)).await;
        assert_eq!(answer, Ok(Answer::Outdated));
        outbox.listed(asked, vec![id("c"), id("d")]).await.unwrap();
        assert_eq!(
            sent(&received),
            [
                RuntimeEvent::Removed { container: id("c") },
                RuntimeEvent::Listed { endpoint: "test".into(), containers: vec![id("d")] },
            ]
        );
        assert!(!outbox.knows(&id("c")).await);
    }

    #[tokio::test]
    async fn what_comes_while_listing_is_not_called_gone() {
        let (outbox, received) = outbox();
        let asked = outbox.asking().await;
        outbox.task_created(id("new"), 7, None).await.unwrap();
        outbox.listed(asked, vec![id("old")]).await.unwrap();
        assert_eq!(
            sent(&received).last(),
            Some(&RuntimeEvent::Listed {
                endpoint: "test".into(),
                containers: vec![id("new"), id("old")]
            })
        );
    }

    #[tokio::test]
    async fn an_event_is_believed_before_a_record_that_lags() {
        let (outbox, received) = outbox();
        outbox.task_created(id("c"), 7, None).await.unwrap();
        let answer = outbox.container(outbox.asking().await, record("c", None)).await;
        assert_eq!(answer, Ok(Answer::AskAgainLater));
        assert_eq!(sent(&received)[1..], [container("c", Some(7))]);
    }

    #[tokio::test]
    async fn an_exit_that_was_not_heard_of_is_told() {
        let (outbox, received) = outbox();
        outbox.container(outbox.asking().await, record("c", Some(7))).await.unwrap();
        outbox.container(outbox.asking().await, record("c", Some(7))).await.unwrap();
        outbox.container(outbox.asking().await, record("c", Some(8))).await.unwrap();
        assert_eq!(
            sent(&received),
            [
                container("c", Some(7)),
                RuntimeEvent::TaskExited { container: id("c") },
                container("c", Some(8)),
            ]
        );
    }

    #[tokio::test]
    async fn after_a_reconnection_everything_is_sent_again() {
        let (outbox, received) = outbox();
        outbox.container(outbox.asking().await, record("c", Some(7))).await.unwrap();
        outbox.connected().await.unwrap();
        outbox.container(outbox.asking().await, record("c", Some(7))).await.unwrap();
        assert_eq!(
            sent(&received),
            [
                container("c", Some(7)),
                RuntimeEvent::Connected { endpoint: "test".into() },
                container("c", Some(7)),
            ]
        );
    }

    #[tokio::test]
    async fn an_answer_from_an_earlier_connection_is_outdated() {
        let (outbox, received) = outbox();
        let asked = outbox.asking().await;
        outbox.connected().await.unwrap();
        let answer = outbox.container(asked, record("c", Some(7))).await;
        assert_eq!(answer, Ok(Answer::Outdated));
        assert_eq!(sent(&received), [RuntimeEvent::Connected { endpoint: "test".into() }]);
    }

    #[tokio::test]
    async fn a_late_event_does_not_bring_a_removed_container_back() {
        let (outbox, received) = outbox();
        outbox.container(outbox.asking().await, record("c", None)).await.unwrap();
        outbox.gone(outbox.asking().await, &id("c")).await.unwrap();
        outbox.changed(&id("c")).await;
        outbox.gone(outbox.asking().await, &id("c")).await.unwrap();
        assert_eq!(
            sent(&received),
            [container("c", None), RuntimeEvent::Removed { container: id("c") }]
        );
    }

    fn exec(name: &str, pid: u32) -> RuntimeEvent {
        RuntimeEvent::ExecStarted { container: id(name), exec_id: "e".into(), pid }
    }

    #[tokio::test]
    async fn an_exec_outdates_no_record() {
        let (outbox, received) = outbox();
        outbox.container(outbox.asking().await, record("c", Some(7))).await.unwrap();
        let asked = outbox.asking().await;
        assert_eq!(outbox.exec(exec("c", 8)), Ok(true));
        let answer = outbox.container(asked, record("c", Some(7))).await;
        assert_eq!(answer, Ok(Answer::Taken));
        // Nobody has heard of this container, and nobody is made to ask.
        assert_eq!(outbox.exec(exec("new", 9)), Ok(true));
        assert!(!outbox.knows(&id("new")).await);
        assert_eq!(sent(&received), [container("c", Some(7)), exec("c", 8), exec("new", 9)]);
    }

    #[tokio::test]
    async fn a_flood_of_execs_leaves_room_for_a_task() {
        let (outbox, received) = outbox();
        let given = (0..100).filter(|&pid| outbox.exec(exec("c", pid)) == Ok(true)).count();
        assert_eq!(given, 8, "half of the channel");
        // Somebody waits with the lock in the hand, and still execs wait for nothing.
        let held = outbox.state.lock().await;
        assert_eq!(outbox.exec(exec("c", 100)), Ok(false));
        drop(held);
        outbox.task_created(id("c"), 7, None).await.unwrap();
        let created = RuntimeEvent::TaskCreated { container: id("c"), pid: 7, rootfs: None };
        assert_eq!(sent(&received).last(), Some(&created));
    }

    #[tokio::test]
    async fn a_pipeline_that_is_gone_ends_it() {
        let (outbox, received) = outbox();
        drop(received);
        assert_eq!(outbox.connected().await, Err(Stopped));
        assert_eq!(outbox.exec(exec("c", 7)), Err(Stopped));
    }
}
