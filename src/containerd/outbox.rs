//! Sends changes to the pipeline in a consistent order.
//!
//! Events report what *happened*; records are *requested*, and that takes a while. A record that
//! was requested before an event and arrives after it would undo the event. So every event
//! advances a clock, and each record carries the clock's time at its request. A record that was
//! requested before its container's last event is refused, and has to be requested again.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::Mutex;

use super::changes::{Lane, RuntimeEvent, Urgent};
use crate::model::{Container, ContainerId, OverlayDirs, Task};

/// The pipeline is gone: driftd is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stopped;

/// When something was requested, on the outbox's own clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestTime(u64);

/// What became of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Accepted,
    /// Something has happened since it was requested. Request it again.
    Outdated,
    /// Accepted, but it contradicts a recent event, which takes precedence. Request it again
    /// later.
    RetryLater,
}

/// How long the event "task created" takes precedence over a record without a task: the shim
/// publishes the event before containerd has stored the task.
const EVENT_PRECEDENCE: Duration = Duration::from_secs(5);
/// The pause before a full channel is tried again. A crossbeam channel must not block the tokio
/// runtime, and a change must not be dropped.
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
    /// When the connection began. Records that were requested on an earlier one may miss events
    /// that happened in between.
    connected: u64,
    containers: HashMap<ContainerId, ContainerState>,
}

#[derive(Debug, Default)]
struct ContainerState {
    /// The clock's time of its last event.
    changed: u64,
    removed: bool,
    /// The task that was reported to the pipeline.
    running: Option<u32>,
    /// When the event came that this task was created.
    created: Option<Instant>,
    /// The record that the pipeline has. `None` if something has happened since.
    sent: Option<Container>,
}

impl State {
    /// Notes that something has happened to `container`.
    fn event(&mut self, container: &ContainerId) -> &mut ContainerState {
        self.clock += 1;
        let known = self.containers.entry(container.clone()).or_default();
        known.changed = self.clock;
        known.sent = None;
        known
    }

    fn is_outdated(&self, requested: RequestTime, container: &ContainerId) -> bool {
        let changed = self.containers.get(container).map_or(0, |known| known.changed);
        requested.0 < changed.max(self.connected)
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

    /// Reports on the urgent lane a task that only a record has shown. Done before anything
    /// else, and in order: the caller holds the lock.
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
        // The entry stays, so that records requested before are outdated.
        *known =
            ContainerState { changed: known.changed, removed: true, ..ContainerState::default() };
        self.send(RuntimeEvent::Removed { container }).await
    }

    /// Sends an event of an exec. False if it was dropped because the channel is full.
    ///
    /// Waits neither for the lock nor for the channel. Execs get at most half of the channel, so
    /// that the creation of a task always finds room behind them. An exec does not change the
    /// container's record, so no record becomes outdated.
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

    /// Something else has happened to it: records that were requested before are outdated.
    pub(super) async fn changed(&self, container: &ContainerId) {
        self.state.lock().await.event(container);
    }

    /// containerd has no such record (any more).
    pub(super) async fn gone(
        &self,
        requested: RequestTime,
        container: &ContainerId,
    ) -> Result<Delivery, Stopped> {
        let mut state = self.state.lock().await;
        if state.is_outdated(requested, container) {
            return Ok(Delivery::Outdated);
        }
        if state.containers.get(container).is_some_and(|known| !known.removed) {
            let known = state.event(container);
            self.exited(container, known.running);
            *known = ContainerState {
                changed: known.changed,
                removed: true,
                ..ContainerState::default()
            };
            self.send(RuntimeEvent::Removed { container: container.clone() }).await?;
        }
        Ok(Delivery::Accepted)
    }

    /// To be called before a request to containerd.
    pub(super) async fn request_time(&self) -> RequestTime {
        RequestTime(self.state.lock().await.clock)
    }

    /// Sends a record, unless it is outdated or the pipeline has the same already.
    pub(super) async fn container(
        &self,
        requested: RequestTime,
        mut container: Container,
    ) -> Result<Delivery, Stopped> {
        let mut state = self.state.lock().await;
        if state.is_outdated(requested, &container.id) {
            return Ok(Delivery::Outdated);
        }
        let known = state.containers.entry(container.id.clone()).or_default();
        let mut delivery = Delivery::Accepted;
        if container.task.is_none()
            && let (Some(pid), Some(created)) = (known.running, known.created)
            && created.elapsed() < EVENT_PRECEDENCE
        {
            container.task =
                Some(Task { pid, start_time: None, paused: false, terminal_input: None });
            delivery = Delivery::RetryLater;
        }
        known.removed = false;
        if known.sent.as_ref() == Some(&container) {
            return Ok(delivery);
        }
        let pid = container.task.as_ref().map(|task| task.pid);
        if known.running != pid {
            self.exited(&container.id, known.running);
            if let Some(pid) = pid {
                self.created(&container.id, pid, container.rootfs.as_ref());
            }
        }
        if known.running.is_some() && known.running != pid {
            // No event has reported its exit.
            self.send(RuntimeEvent::TaskExited { container: container.id.clone() }).await?;
        }
        known.running = pid;
        known.sent = Some(container.clone());
        self.send(RuntimeEvent::Container(Box::new(container))).await?;
        Ok(delivery)
    }

    /// Ends a list that was requested at `requested`. Containers that an event has added or
    /// removed since are added or left out. A container in neither is forgotten.
    pub(super) async fn listed(
        &self,
        requested: RequestTime,
        listed: Vec<ContainerId>,
    ) -> Result<(), Stopped> {
        let mut state = self.state.lock().await;
        let mut containers: HashSet<ContainerId> = listed.into_iter().collect();
        state.containers.retain(|container, known| {
            if known.changed > requested.0 {
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

    /// Whether this container is known and was not removed.
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
    async fn h08_a_task_that_a_record_shows_is_reported_at_once() {
        let (changes, _received) = crossbeam_channel::bounded(16);
        let (lane_sender, urgent) = crossbeam_channel::unbounded();
        let lane: Lane = Arc::new(move |one| lane_sender.send(one).unwrap());
        let outbox = Outbox::new("test".into(), changes, Some(lane));
        for task in [Some(7), Some(7), Some(8), None] {
            outbox.container(outbox.request_time().await, record("c", task)).await.unwrap();
        }
        outbox.container(outbox.request_time().await, record("d", Some(9))).await.unwrap();
        outbox.gone(outbox.request_time().await, &id("d")).await.unwrap();
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
    async fn a_record_does_not_undo_an_event() {
        let (outbox, received) = outbox();
        let requested = outbox.request_time().await;
        outbox.task_created(id("c"), 7, None).await.unwrap();
        outbox.task_exited(id("c")).await.unwrap();
        let delivery = outbox.container(requested, record("c", Some(7))).await;
        assert_eq!(delivery, Ok(Delivery::Outdated));
        let delivery = outbox.container(outbox.request_time().await, record("c", None)).await;
        assert_eq!(delivery, Ok(Delivery::Accepted));
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
        let requested = outbox.request_time().await;
        outbox.removed(id("c")).await.unwrap();
        let delivery = outbox.container(requested, record("c", None)).await;
        assert_eq!(delivery, Ok(Delivery::Outdated));
        outbox.listed(requested, vec![id("c"), id("d")]).await.unwrap();
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
    async fn a_container_that_comes_while_listing_is_not_gone() {
        let (outbox, received) = outbox();
        let requested = outbox.request_time().await;
        outbox.task_created(id("new"), 7, None).await.unwrap();
        outbox.listed(requested, vec![id("old")]).await.unwrap();
        assert_eq!(
            sent(&received).last(),
            Some(&RuntimeEvent::Listed {
                endpoint: "test".into(),
                containers: vec![id("new"), id("old")]
            })
        );
    }

    #[tokio::test]
    async fn an_event_takes_precedence_over_a_record_that_lags() {
        let (outbox, received) = outbox();
        outbox.task_created(id("c"), 7, None).await.unwrap();
        let delivery = outbox.container(outbox.request_time().await, record("c", None)).await;
        assert_eq!(delivery, Ok(Delivery::RetryLater));
        assert_eq!(sent(&received)[1..], [container("c", Some(7))]);
    }

    #[tokio::test]
    async fn an_exit_without_an_event_is_reported() {
        let (outbox, received) = outbox();
        outbox.container(outbox.request_time().await, record("c", Some(7))).await.unwrap();
        outbox.container(outbox.request_time().await, record("c", Some(7))).await.unwrap();
        outbox.container(outbox.request_time().await, record("c", Some(8))).await.unwrap();
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
        outbox.container(outbox.request_time().await, record("c", Some(7))).await.unwrap();
        outbox.connected().await.unwrap();
        outbox.container(outbox.request_time().await, record("c", Some(7))).await.unwrap();
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
    async fn a_record_from_an_earlier_connection_is_outdated() {
        let (outbox, received) = outbox();
        let requested = outbox.request_time().await;
        outbox.connected().await.unwrap();
        let delivery = outbox.container(requested, record("c", Some(7))).await;
        assert_eq!(delivery, Ok(Delivery::Outdated));
        assert_eq!(sent(&received), [RuntimeEvent::Connected { endpoint: "test".into() }]);
    }

    #[tokio::test]
    async fn a_late_event_does_not_bring_a_removed_container_back() {
        let (outbox, received) = outbox();
        outbox.container(outbox.request_time().await, record("c", None)).await.unwrap();
        outbox.gone(outbox.request_time().await, &id("c")).await.unwrap();
        outbox.changed(&id("c")).await;
        outbox.gone(outbox.request_time().await, &id("c")).await.unwrap();
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
        outbox.container(outbox.request_time().await, record("c", Some(7))).await.unwrap();
        let requested = outbox.request_time().await;
        assert_eq!(outbox.exec(exec("c", 8)), Ok(true));
        let delivery = outbox.container(requested, record("c", Some(7))).await;
        assert_eq!(delivery, Ok(Delivery::Accepted));
        // This container is not known, and its record is not requested either.
        assert_eq!(outbox.exec(exec("new", 9)), Ok(true));
        assert!(!outbox.knows(&id("new")).await);
        assert_eq!(sent(&received), [container("c", Some(7)), exec("c", 8), exec("new", 9)]);
    }

    #[tokio::test]
    async fn a_flood_of_execs_leaves_room_for_a_task() {
        let (outbox, received) = outbox();
        let given = (0..100).filter(|&pid| outbox.exec(exec("c", pid)) == Ok(true)).count();
        assert_eq!(given, 8, "half of the channel");
        // Another task holds the lock; execs do not wait for it.
        let held = outbox.state.lock().await;
        assert_eq!(outbox.exec(exec("c", 100)), Ok(false));
        drop(held);
        outbox.task_created(id("c"), 7, None).await.unwrap();
        let created = RuntimeEvent::TaskCreated { container: id("c"), pid: 7, rootfs: None };
        assert_eq!(sent(&received).last(), Some(&created));
    }

    #[tokio::test]
    async fn a_pipeline_that_is_gone_stops_the_outbox() {
        let (outbox, received) = outbox();
        drop(received);
        assert_eq!(outbox.connected().await, Err(Stopped));
        assert_eq!(outbox.exec(exec("c", 7)), Err(Stopped));
    }
}
