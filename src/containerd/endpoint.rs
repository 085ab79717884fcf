//! One containerd socket: waits for it, connects, subscribes, lists and follows, and begins
//! anew whenever that ends.
//!
//! What an event means is decided in `events`, what is sent in `outbox`. This file only moves
//! things between containerd and these.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use crossbeam_channel::Sender;
use jiff::Timestamp;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tonic::Status;

use super::changes::{Lane, RuntimeEvent};
use super::connection::{Connection, Namespace, interrupted, words};
use super::error::Error;
use super::events::{self, Event};
use super::images::{ImageError, Images};
use super::outbox::{Delivery, Outbox, Stopped};
use super::recording::Recording;
use super::{containers, snapshots, tasks};
use crate::health::{Failure, Health};
use crate::model::{Container, ContainerId, printable};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often it is checked that a silent containerd still answers.
const LIVENESS_CHECK: Duration = Duration::from_secs(10);
/// Events waiting for the dispatcher. containerd's own queue has no bound, so the stream must
/// always be drained.
const QUEUE: usize = 4096;
/// How much of the queue is kept free of events of execs.
const QUEUE_WITHOUT_EXECS: usize = QUEUE / 2;
/// How long driftd's own marker may take before the list is made without it.
const MARKER_PATIENCE: Duration = Duration::from_secs(5);
const MARKER_PAUSE: Duration = Duration::from_millis(50);
const RELIST: Duration = Duration::from_secs(60);
/// Containers whose records are being requested at the same time.
const DESCRIBING: usize = 8;
/// How long to wait before a record that lagged behind an event is requested again.
const LAG: Duration = Duration::from_secs(6);

/// Why a connection ended.
#[derive(Debug)]
enum Ended {
    /// It is tried again. The reason is a text for administrators.
    Lost(String),
    /// driftd is stopping.
    Stopped,
}

impl From<Stopped> for Ended {
    fn from(_: Stopped) -> Ended {
        Ended::Stopped
    }
}

impl From<Status> for Ended {
    fn from(status: Status) -> Ended {
        Ended::Lost(words(&status))
    }
}

pub(super) struct Endpoint {
    socket: PathBuf,
    name: Arc<str>,
    exclude: BTreeSet<String>,
    outbox: Outbox,
    lane: Option<Lane>,
    pub(super) images: Arc<Images>,
    health: Arc<Health>,
    connection: Mutex<Option<Connection>>,
}

/// The subscription on one connection, shared by the tasks that serve it.
struct Subscription {
    connection: Connection,
    /// The connection was reported to the pipeline.
    connected: AtomicBool,
    /// A list was completed.
    listed: AtomicBool,
    /// The topic of driftd's own event.
    marker: String,
    /// Whether the marker has come back.
    marked: watch::Sender<bool>,
    /// Something was missed: list again.
    relist: Notify,
    /// Events were dropped on the way into the queue.
    overflowed: AtomicBool,
    /// The list is made without the marker. The first event causes another list.
    unmarked: AtomicBool,
    /// Containers whose record is to be requested.
    stale: Mutex<HashSet<ContainerId>>,
    found_stale: Notify,
}

impl Subscription {
    fn new(connection: Connection) -> Subscription {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = Timestamp::now().as_millisecond();
        Subscription {
            connection,
            connected: AtomicBool::new(false),
            listed: AtomicBool::new(false),
            marker: format!("/driftd/subscribed/{}-{now}-{number}", std::process::id()),
            marked: watch::Sender::new(false),
            relist: Notify::new(),
            overflowed: AtomicBool::new(false),
            unmarked: AtomicBool::new(false),
            stale: Mutex::default(),
            found_stale: Notify::new(),
        }
    }

    fn mark_stale(&self, container: ContainerId) {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).insert(container);
        self.found_stale.notify_one();
    }

    fn take_stale(&self) -> Vec<ContainerId> {
        self.stale.lock().unwrap_or_else(PoisonError::into_inner).drain().collect()
    }
}

impl Endpoint {
    pub(super) fn new(
        socket: &Path,
        exclude: &BTreeSet<String>,
        changes: Sender<RuntimeEvent>,
        recorder: Arc<dyn Recording>,
        health: Arc<Health>,
        lane: Option<Lane>,
    ) -> Endpoint {
        let name: Arc<str> = socket.to_string_lossy().into();
        Endpoint {
            socket: socket.into(),
            name: Arc::clone(&name),
            exclude: exclude.clone(),
            outbox: Outbox::new(Arc::clone(&name), changes, lane.clone()),
            lane,
            images: Arc::new(Images::new(name, recorder, Arc::clone(&health))),
            health,
            connection: Mutex::default(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    fn socket_words(&self) -> String {
        printable(self.name.as_bytes())
    }

    pub(super) fn refused(&self, status: &Status) -> Error {
        Error::Refused { socket: self.socket_words(), reason: words(status) }
    }

    /// Why a kill, a pause or a resume was not carried out.
    pub(super) fn refused_response(&self, refused: tasks::Refused) -> Error {
        match refused {
            tasks::Refused::Gone(how) => Error::Gone(how),
            tasks::Refused::Failed(why) => Error::Failed(why),
            tasks::Refused::Containerd(status) => self.refused(&status),
        }
    }

    /// Why the image `name` could not be recorded.
    pub(super) fn not_recorded(&self, name: &str, err: ImageError) -> Error {
        let name = printable(name.as_bytes());
        match err {
            ImageError::Interrupted(status) => self.refused(&status),
            ImageError::Unknown => Error::UnknownImage { name },
            ImageError::NoImage => Error::NoImage { name },
            ImageError::NotUnpacked { reason, .. } => {
                let reason = reason.unwrap_or_else(|| "it is not unpacked yet".into());
                Error::NotUnpacked { name, reason }
            }
            ImageError::Bad { digest, reason } => Error::Unresolvable { name, digest, reason },
            ImageError::NotRecorded { chain_id, reason } => {
                Error::Unresolvable { name, digest: chain_id.to_string(), reason }
            }
        }
    }

    /// A container that was made from the image `name`.
    pub(super) async fn container_of_image(
        &self,
        namespace: &Namespace,
        name: &str,
    ) -> Result<Option<Container>, Status> {
        containers::of_image(namespace, &self.name, name, &self.images).await
    }

    fn set_connection(&self, connection: Option<Connection>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = connection;
    }

    fn connection(&self) -> Result<Connection, Error> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
            .ok_or_else(|| Error::NotConnected { socket: self.socket_words() })
    }

    pub(super) fn namespace(&self, name: &str) -> Result<Namespace, Error> {
        self.connection()?.namespace(name).map_err(|status| self.refused(&status))
    }

    /// The namespaces that are followed.
    pub(super) async fn namespaces(&self) -> Result<Vec<Namespace>, Error> {
        let connection = self.connection()?;
        let names = self.followed(&connection).await.map_err(|status| self.refused(&status))?;
        let namespaces: Result<_, Status> =
            names.iter().map(|name| connection.namespace(name)).collect();
        namespaces.map_err(|status| self.refused(&status))
    }

    async fn followed(&self, connection: &Connection) -> Result<Vec<String>, Status> {
        let mut names = connection.namespaces().await?;
        names.retain(|name| !self.exclude.contains(name));
        names.sort();
        Ok(names)
    }

    pub(super) async fn knows(&self, container: &ContainerId) -> bool {
        self.outbox.knows(container).await
    }

    /// Follows this containerd until driftd stops.
    pub(super) async fn run(self: Arc<Self>) {
        let mut pause = FIRST_PAUSE;
        // Logged and sent once per change of state, not once per try.
        let mut reported: Option<String> = None;
        loop {
            let reason = match Connection::open(&self.socket).await {
                Err(err) => {
                    format!("cannot reach containerd at {}: {err}", self.socket_words())
                }
                Ok(connection) => {
                    self.set_connection(Some(connection.clone()));
                    let subscription = Arc::new(Subscription::new(connection));
                    let ended = self.follow(&subscription).await;
                    self.set_connection(None);
                    let Ended::Lost(reason) = ended else { return };
                    let _retry = self.health.record(Failure::ContainerdLost);
                    if subscription.connected.load(Ordering::Relaxed) {
                        reported = None;
                    }
                    if subscription.listed.load(Ordering::Relaxed) {
                        pause = FIRST_PAUSE;
                    }
                    format!("lost containerd at {}: {reason}", self.socket_words())
                }
            };
            if reported.as_ref() != Some(&reason) {
                tracing::warn!("{reason}; trying again until it is there");
                if self.outbox.disconnected(reason.clone()).await.is_err() {
                    return;
                }
                reported = Some(reason);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One connection's life.
    async fn follow(self: &Arc<Self>, subscription: &Arc<Subscription>) -> Ended {
        let (queue, waiting) = mpsc::channel(QUEUE);
        // Dropped when the first task ends, which ends the others.
        let mut parts: JoinSet<Ended> = JoinSet::new();
        parts.spawn(read(Arc::clone(self), Arc::clone(subscription), queue));
        parts.spawn(check_liveness(subscription.connection.clone()));
        parts.spawn({
            let (endpoint, subscription) = (Arc::clone(self), Arc::clone(subscription));
            async move { endpoint.keep_listed(subscription, waiting).await }
        });
        let ended = match parts.join_next().await {
            Some(Ok(ended)) => ended,
            Some(Err(err)) => Ended::Lost(format!("a task of driftd's ended: {err}")),
            None => Ended::Stopped,
        };
        parts.shutdown().await;
        ended
    }

    /// Waits for the subscription, lists, follows, lists again when needed.
    async fn keep_listed(
        self: &Arc<Self>,
        subscription: Arc<Subscription>,
        waiting: mpsc::Receiver<Event>,
    ) -> Ended {
        if !subscribed(&subscription).await {
            tracing::warn!(
                socket = self.socket_words(),
                "containerd does not send back driftd's own event; listing without it"
            );
            subscription.unmarked.store(true, Ordering::Relaxed);
        }
        if self.outbox.connected().await.is_err() {
            return Ended::Stopped;
        }
        subscription.connected.store(true, Ordering::Relaxed);
        tracing::info!(socket = self.socket_words(), "connected to containerd");
        let mut parts: JoinSet<Ended> = JoinSet::new();
        let (endpoint, shared) = (Arc::clone(self), Arc::clone(&subscription));
        parts.spawn(async move { endpoint.dispatch(&shared, waiting).await });
        let (endpoint, shared) = (Arc::clone(self), Arc::clone(&subscription));
        parts.spawn(async move { endpoint.describe_stale(&shared).await });

        let lists = async {
            loop {
                if let Err(ended) = self.list(&subscription).await {
                    return ended;
                }
                if !subscription.listed.swap(true, Ordering::Relaxed) {
                    self.remove_stale_views(&subscription.connection).await;
                }
                tokio::select! {
                    () = subscription.relist.notified() => (),
                    () = tokio::time::sleep(RELIST) => (),
                }
            }
        };
        tokio::select! {
            ended = lists => ended,
            Some(ended) = parts.join_next() => match ended {
                Ok(ended) => ended,
                Err(err) => Ended::Lost(format!("a task of driftd's ended: {err}")),
            },
        }
    }

    /// Sends an urgent change at once, past the events that wait before it.
    fn send_urgent(&self, event: &Event) {
        if let (Some(lane), Some(urgent)) = (&self.lane, event.urgent())
            && event.namespace().is_some_and(|name| !self.exclude.contains(name))
        {
            lane(urgent);
        }
    }

    /// Hands on events in their order, without any request to containerd.
    async fn dispatch(
        &self,
        subscription: &Arc<Subscription>,
        mut waiting: mpsc::Receiver<Event>,
    ) -> Ended {
        while let Some(event) = waiting.recv().await {
            if subscription.unmarked.swap(false, Ordering::Relaxed) {
                subscription.relist.notify_one();
            }
            if let Err(ended) = self.handle(subscription, event).await {
                return ended;
            }
            // Only now, so that the list is newer than every event that waited.
            if waiting.is_empty() && subscription.overflowed.swap(false, Ordering::Relaxed) {
                subscription.relist.notify_one();
            }
        }
        // The reader has ended; its task returns the reason.
        std::future::pending().await
    }

    async fn handle(&self, subscription: &Arc<Subscription>, event: Event) -> Result<(), Ended> {
        let namespace = match event.namespace() {
            Some(name) if self.exclude.contains(name) => return Ok(()),
            Some(name) => subscription.connection.namespace(name)?,
            None => return Ok(()),
        };
        match event {
            Event::TaskCreated { container, pid, rootfs } => {
                self.outbox.task_created(container.clone(), pid, rootfs).await?;
                subscription.mark_stale(container);
            }
            Event::TaskExited { container, .. } => self.outbox.task_exited(container).await?,
            Event::ExecStarted { container, exec_id, pid } => {
                self.send_exec(RuntimeEvent::ExecStarted { container, exec_id, pid })?;
            }
            Event::ExecExited { container, exec_id, pid, exit, at } => {
                self.send_exec(RuntimeEvent::ExecExited { container, exec_id, pid, exit, at })?;
            }
            Event::ContainerChanged { container } => {
                self.outbox.changed(&container).await;
                subscription.mark_stale(container);
            }
            Event::ContainerRemoved { container } => self.outbox.removed(container).await?,
            Event::ImageChanged { name, .. } => self.images.changed(&namespace, &name),
            Event::ImageRemoved { name, .. } => self.images.removed(&namespace.name, &name),
            Event::LayerCommitted { chain_id, .. } => {
                self.images.layer_committed(&namespace, chain_id);
            }
            Event::Marker => (),
        }
        Ok(())
    }

    fn send_exec(&self, change: RuntimeEvent) -> Result<(), Stopped> {
        if !self.outbox.exec(change)? {
            too_many_execs(&self.health);
        }
        Ok(())
    }

    /// Requests the records of containers that events have named.
    async fn describe_stale(self: &Arc<Self>, subscription: &Arc<Subscription>) -> Ended {
        let room = Arc::new(Semaphore::new(DESCRIBING));
        let mut asking: JoinSet<Result<(), Ended>> = JoinSet::new();
        loop {
            for container in subscription.take_stale() {
                let permit =
                    Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
                let (endpoint, subscription) = (Arc::clone(self), Arc::clone(subscription));
                asking.spawn(async move {
                    let _permit = permit;
                    endpoint.describe(&subscription, &container).await
                });
            }
            while let Some(done) = asking.try_join_next() {
                match done {
                    Ok(Ok(())) => (),
                    Ok(Err(ended)) => return ended,
                    Err(err) => return Ended::Lost(format!("a task of driftd's ended: {err}")),
                }
            }
            tokio::select! {
                () = subscription.found_stale.notified() => (),
                Some(done) = asking.join_next() => match done {
                    Ok(Ok(())) => (),
                    Ok(Err(ended)) => return ended,
                    Err(err) => return Ended::Lost(format!("a task of driftd's ended: {err}")),
                },
            }
        }
    }

    /// Requests one container's record and sends it.
    async fn describe(
        &self,
        subscription: &Arc<Subscription>,
        container: &ContainerId,
    ) -> Result<(), Ended> {
        let namespace = subscription.connection.namespace(&container.namespace)?;
        let requested = self.outbox.request_time().await;
        let Some(record) = containers::get(&namespace, &container.id).await? else {
            if self.outbox.gone(requested, container).await? == Delivery::Outdated {
                subscription.mark_stale(container.clone());
            }
            return Ok(());
        };
        let task = match tasks::get(&namespace, &container.id).await {
            Ok(task) => task,
            Err(status) if interrupted(&status) => return Err(status.into()),
            Err(status) => {
                let reason = words(&status);
                tracing::warn!(%container, "containerd cannot describe its task: {reason}");
                None
            }
        };
        let described =
            containers::describe(&namespace, &self.name, record, task, &self.images).await?;
        match self.outbox.container(requested, described).await? {
            Delivery::Accepted => (),
            Delivery::Outdated => subscription.mark_stale(container.clone()),
            Delivery::RetryLater => {
                let (subscription, container) = (Arc::downgrade(subscription), container.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(LAG).await;
                    if let Some(subscription) = subscription.upgrade() {
                        subscription.mark_stale(container);
                    }
                });
            }
        }
        Ok(())
    }

    /// Lists everything there is.
    async fn list(&self, subscription: &Arc<Subscription>) -> Result<(), Ended> {
        let requested = self.outbox.request_time().await;
        let names = self.followed(&subscription.connection).await?;
        let mut listed = Vec::new();
        for name in &names {
            let namespace = subscription.connection.namespace(name)?;
            // Images first: the layers of containers are named by them.
            self.images.list(&namespace).await?;
            self.list_containers(subscription, &namespace, &mut listed).await?;
        }
        self.images.retain_namespaces(&names);
        self.images.report_names();
        self.outbox.listed(requested, listed).await?;
        Ok(())
    }

    async fn list_containers(
        &self,
        subscription: &Arc<Subscription>,
        namespace: &Namespace,
        listed: &mut Vec<ContainerId>,
    ) -> Result<(), Ended> {
        let requested = self.outbox.request_time().await;
        let records = containers::list(namespace).await?;
        let mut tasks = tasks::list(namespace).await?;
        for record in records {
            let id = ContainerId::new(&namespace.name, &record.id);
            listed.push(id.clone());
            let task = tasks.remove(&record.id);
            let described =
                containers::describe(namespace, &self.name, record, task, &self.images).await?;
            match self.outbox.container(requested, described).await? {
                Delivery::Accepted => (),
                Delivery::Outdated | Delivery::RetryLater => subscription.mark_stale(id),
            }
        }
        Ok(())
    }

    async fn remove_stale_views(&self, connection: &Connection) {
        let Ok(names) = self.followed(connection).await else { return };
        for namespace in names.iter().filter_map(|name| connection.namespace(name).ok()) {
            if let Err(status) =
                snapshots::remove_stale_views(&namespace, self.images.leases()).await
            {
                tracing::debug!("stale views stay until they expire: {}", words(&status));
            }
        }
    }
}

/// Drains the event stream into the queue; never waits for anything else.
async fn read(
    endpoint: Arc<Endpoint>,
    subscription: Arc<Subscription>,
    queue: mpsc::Sender<Event>,
) -> Ended {
    let health = &endpoint.health;
    let request = SubscribeRequest { filters: events::filters(&subscription.marker) };
    let mut stream = match subscription.connection.event_stream().subscribe(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ended::Lost(format!("its event stream: {}", words(&status))),
    };
    loop {
        let envelope = match stream.message().await {
            Ok(Some(envelope)) => envelope,
            Ok(None) => return Ended::Lost("it ended the event stream".into()),
            Err(status) => return Ended::Lost(format!("its event stream: {}", words(&status))),
        };
        let missed = match events::decode(&envelope, &subscription.marker, Timestamp::now()) {
            Ok(Some(Event::Marker)) => {
                subscription.marked.send_replace(true);
                false
            }
            // No list is made for it, because no list contains execs.
            Ok(Some(event)) if event.is_of_exec() && queue.capacity() <= QUEUE_WITHOUT_EXECS => {
                too_many_execs(health);
                false
            }
            Ok(Some(event)) => {
                endpoint.send_urgent(&event);
                queue.try_send(event).is_err()
            }
            Ok(None) => false,
            Err(err) => {
                tracing::warn!(
                    topic = printable(envelope.topic.as_bytes()),
                    "an event of containerd's cannot be read: {err}"
                );
                true
            }
        };
        if missed && !subscription.overflowed.swap(true, Ordering::Relaxed) {
            let _relist = health.record(Failure::ContainerdLost);
            tracing::warn!("events of containerd were missed; listing again");
            // The dispatcher requests the list when it has caught up. If the queue is empty, it
            // has nothing to catch up with, so the list is requested here.
            if queue.capacity() == QUEUE {
                subscription.overflowed.store(false, Ordering::Relaxed);
                subscription.relist.notify_one();
            }
        }
    }
}

/// Counts an event of an exec that was dropped. No list makes up for it.
fn too_many_execs(health: &Health) {
    let failure = Failure::ExecEventsFull;
    let _degraded = health.record(failure);
    health
        .happened(failure, "containerd's names of some sessions were not reported: too many execs");
}

/// Publishes driftd's marker until it comes back. False if it does not.
async fn subscribed(subscription: &Subscription) -> bool {
    let mut marked = subscription.marked.subscribe();
    let deadline = tokio::time::Instant::now() + MARKER_PATIENCE;
    // Events must be published in a namespace, which need not exist.
    let Ok(namespace) = subscription.connection.namespace("driftd") else { return false };
    while tokio::time::Instant::now() < deadline {
        let request = PublishRequest {
            topic: subscription.marker.clone(),
            event: Some(prost_types::Any {
                type_url: "google.protobuf.Empty".into(),
                value: Vec::new(),
            }),
        };
        if let Err(status) = namespace.events().publish(request).await {
            tracing::debug!("containerd refuses driftd's own event: {}", words(&status));
            return false;
        }
        if tokio::time::timeout(MARKER_PAUSE, marked.wait_for(|&marked| marked)).await.is_ok() {
            return true;
        }
    }
    false
}

/// Ends when containerd does not answer any more. A stream without events does not show whether
/// containerd is idle or hangs.
async fn check_liveness(connection: Connection) -> Ended {
    loop {
        tokio::time::sleep(LIVENESS_CHECK).await;
        if let Err(status) = connection.version(LIVENESS_CHECK).await {
            return Ended::Lost(format!("it does not answer: {}", words(&status)));
        }
    }
}
