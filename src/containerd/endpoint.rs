//! One containerd socket: wait for it, connect, subscribe, list, follow; and
//! from the beginning whenever that ends.

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

use super::connection::{Connection, Namespace, interrupted, words};
use super::events::{self, Event};
use super::images::{Images, Trouble};
use super::outbox::{Answer, Outbox, Stopped};
use super::{Error, Lane, Recording, RuntimeEvent, containers, snapshots, tasks};
use crate::health::{Failure, Health};
use crate::model::{Container, ContainerId, printable};

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often a containerd that says nothing is asked whether it is there.
const PULSE: Duration = Duration::from_secs(10);
/// Events waiting for the dispatcher. containerd's own queue has no bound, so
/// the stream must be drained, whatever happens here.
const QUEUE: usize = 4096;
/// How much of the queue is kept free of what is told of execs.
const QUEUE_WITHOUT_EXECS: usize = QUEUE / 2;
/// How long our own marker may take before the list is made without it.
const MARKER_PATIENCE: Duration = Duration::from_secs(5);
const MARKER_PAUSE: Duration = Duration::from_millis(50);
const RELIST: Duration = Duration::from_secs(60);
/// Containers that are being asked for at the same time.
const DESCRIBING: usize = 8;
/// How long to wait before asking again for a record that lagged behind an event.
const LAG: Duration = Duration::from_secs(6);

/// Why a connection ended.
#[derive(Debug)]
enum Ended {
    /// To be tried again; the reason is for people.
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

/// What the tasks of one connection share.
struct Following {
    connection: Connection,
    /// The pipeline was told of this connection.
    connected: AtomicBool,
    /// A list was completed.
    listed: AtomicBool,
    /// The topic of our own event.
    marker: String,
    /// Whether the marker has come back.
    marked: watch::Sender<bool>,
    /// Something was missed: list again.
    relist: Notify,
    /// Events were dropped on the way into the queue.
    overflowed: AtomicBool,
    /// The list is made without the marker; the first event calls for another.
    unmarked: AtomicBool,
    /// Containers whose record is to be asked for.
    stale: Mutex<HashSet<ContainerId>>,
    found_stale: Notify,
}

impl Following {
    fn new(connection: Connection) -> Following {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let now = Timestamp::now().as_millisecond();
        Following {
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

    fn look_again(&self, container: ContainerId) {
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

    pub(super) fn not_answered(&self, refused: tasks::Refused) -> Error {
        match refused {
            tasks::Refused::Gone(how) => Error::Gone(how),
            tasks::Refused::Failed(why) => Error::Failed(why),
            tasks::Refused::Containerd(status) => self.refused(&status),
        }
    }

    /// Why the image `name` could not be recorded.
    pub(super) fn trouble(&self, name: &str, trouble: Trouble) -> Error {
        let name = printable(name.as_bytes());
        match trouble {
            Trouble::Interrupted(status) => self.refused(&status),
            Trouble::Unknown => Error::UnknownImage { name },
            Trouble::NoImage => Error::NoImage { name },
            Trouble::NotUnpacked { reason, .. } => {
                let reason = reason.unwrap_or_else(|| "it is not unpacked yet".into());
                Error::NotUnpacked { name, reason }
            }
            Trouble::Bad { digest, reason } => Error::Unresolvable { name, digest, reason },
            Trouble::NotRecorded { chain_id, reason } => {
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
        // Said once per change of state, not once per try.
        let mut told: Option<String> = None;
        loop {
            let reason = match Connection::open(&self.socket).await {
                Err(reason) => {
                    format!("cannot reach containerd at {}: {reason}", self.socket_words())
                }
                Ok(connection) => {
                    self.set_connection(Some(connection.clone()));
                    let following = Arc::new(Following::new(connection));
                    let ended = self.follow(&following).await;
                    self.set_connection(None);
                    let Ended::Lost(reason) = ended else { return };
                    let _retry = self.health.record(Failure::ContainerdLost);
                    if following.connected.load(Ordering::Relaxed) {
                        told = None;
                    }
                    if following.listed.load(Ordering::Relaxed) {
                        pause = FIRST_PAUSE;
                    }
                    format!("lost containerd at {}: {reason}", self.socket_words())
                }
            };
            if told.as_ref() != Some(&reason) {
                tracing::warn!("{reason}; trying again until it is there");
                if self.outbox.disconnected(reason.clone()).await.is_err() {
                    return;
                }
                told = Some(reason);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One connection's life.
    async fn follow(self: &Arc<Self>, following: &Arc<Following>) -> Ended {
        let (queue, waiting) = mpsc::channel(QUEUE);
        // Dropped, and with it all of them ended, when the first one ends.
        let mut parts: JoinSet<Ended> = JoinSet::new();
        parts.spawn(read(Arc::clone(self), Arc::clone(following), queue));
        parts.spawn(pulse(following.connection.clone()));
        parts.spawn({
            let (endpoint, following) = (Arc::clone(self), Arc::clone(following));
            async move { endpoint.keep_listed(following, waiting).await }
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
        following: Arc<Following>,
        waiting: mpsc::Receiver<Event>,
    ) -> Ended {
        if !subscribed(&following).await {
            tracing::warn!(
                socket = self.socket_words(),
                "containerd does not send back driftd's own event; listing without it"
            );
            following.unmarked.store(true, Ordering::Relaxed);
        }
        if self.outbox.connected().await.is_err() {
            return Ended::Stopped;
        }
        following.connected.store(true, Ordering::Relaxed);
        tracing::info!(socket = self.socket_words(), "connected to containerd");
        let mut parts: JoinSet<Ended> = JoinSet::new();
        let (endpoint, shared) = (Arc::clone(self), Arc::clone(&following));
        parts.spawn(async move { endpoint.dispatch(&shared, waiting).await });
        let (endpoint, shared) = (Arc::clone(self), Arc::clone(&following));
        parts.spawn(async move { endpoint.describe_stale(&shared).await });

        let lists = async {
            loop {
                if let Err(ended) = self.list(&following).await {
                    return ended;
                }
                if !following.listed.swap(true, Ordering::Relaxed) {
                    self.remove_stale_views(&following.connection).await;
                }
                tokio::select! {
                    () = following.relist.notified() => (),
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

    /// Hands on at once what cannot wait for those that come before it.
    fn tell_urgent(&self, event: &Event) {
        if let (Some(lane), Some(urgent)) = (&self.lane, event.urgent())
            && event.namespace().is_some_and(|name| !self.exclude.contains(name))
        {
            lane(urgent);
        }
    }

    /// Gives events on in their order, without asking containerd anything.
    async fn dispatch(
        &self,
        following: &Arc<Following>,
        mut waiting: mpsc::Receiver<Event>,
    ) -> Ended {
        while let Some(event) = waiting.recv().await {
            if following.unmarked.swap(false, Ordering::Relaxed) {
                following.relist.notify_one();
            }
            if let Err(ended) = self.handle(following, event).await {
                return ended;
            }
            // Only now: what the list says is newer than all that waited.
            if waiting.is_empty() && following.overflowed.swap(false, Ordering::Relaxed) {
                following.relist.notify_one();
            }
        }
        // The reader has ended, and says why.
        std::future::pending().await
    }

    async fn handle(&self, following: &Arc<Following>, event: Event) -> Result<(), Ended> {
        let namespace = match event.namespace() {
            Some(name) if self.exclude.contains(name) => return Ok(()),
            Some(name) => following.connection.namespace(name)?,
            None => return Ok(()),
        };
        match event {
            Event::TaskCreated { container, pid, rootfs } => {
                self.outbox.task_created(container.clone(), pid, rootfs).await?;
                following.look_again(container);
            }
            Event::TaskExited { container, .. } => self.outbox.task_exited(container).await?,
            Event::ExecStarted { container, exec_id, pid } => {
                self.tell_exec(RuntimeEvent::ExecStarted { container, exec_id, pid })?;
            }
            Event::ExecExited { container, exec_id, pid, exit, at } => {
                self.tell_exec(RuntimeEvent::ExecExited { container, exec_id, pid, exit, at })?;
            }
            Event::ContainerChanged { container } => {
                self.outbox.changed(&container).await;
                following.look_again(container);
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

    fn tell_exec(&self, change: RuntimeEvent) -> Result<(), Stopped> {
        if !self.outbox.exec(change)? {
            too_many_execs(&self.health);
        }
        Ok(())
    }

    /// Asks for the records of containers that events have named.
    async fn describe_stale(self: &Arc<Self>, following: &Arc<Following>) -> Ended {
        let room = Arc::new(Semaphore::new(DESCRIBING));
        let mut asking: JoinSet<Result<(), Ended>> = JoinSet::new();
        loop {
            for container in following.take_stale() {
                let permit =
                    Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
                let (endpoint, following) = (Arc::clone(self), Arc::clone(following));
                asking.spawn(async move {
                    let _permit = permit;
                    endpoint.describe(&following, &container).await
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
                () = following.found_stale.notified() => (),
                Some(done) = asking.join_next() => match done {
                    Ok(Ok(())) => (),
                    Ok(Err(ended)) => return ended,
                    Err(err) => return Ended::Lost(format!("a task of driftd's ended: {err}")),
                },
            }
        }
    }

    /// Asks for one container's record and sends it.
    async fn describe(
        &self,
        following: &Arc<Following>,
        container: &ContainerId,
    ) -> Result<(), Ended> {
        let namespace = following.connection.namespace(&container.namespace)?;
        let asked = self.outbox.asking().await;
        let Some(record) = containers::get(&namespace, &container.id).await? else {
            if self.outbox.gone(asked, container).await? == Answer::Outdated {
                following.look_again(container.clone());
            }
            return Ok(());
        };
        let task = match tasks::get(&namespace, &container.id).await {
            Ok(task) => task,
            Err(status) if interrupted(&status) => return Err(status.into()),
            Err(status) => {
                tracing::warn!(%container, "containerd cannot tell its task: {}", words(&status));
                None
            }
        };
        let described =
            containers::describe(&namespace, &self.name, record, task, &self.images).await?;
        match self.outbox.container(asked, described).await? {
            Answer::Taken => (),
            Answer::Outdated => following.look_again(container.clone()),
            Answer::AskAgainLater => {
                let (following, container) = (Arc::downgrade(following), container.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(LAG).await;
                    if let Some(following) = following.upgrade() {
                        following.look_again(container);
                    }
                });
            }
        }
        Ok(())
    }

    /// Lists everything there is.
    async fn list(&self, following: &Arc<Following>) -> Result<(), Ended> {
        let asked = self.outbox.asking().await;
        let names = self.followed(&following.connection).await?;
        let mut listed = Vec::new();
        for name in &names {
            let namespace = following.connection.namespace(name)?;
            // First, because containers' layers are named by their images.
            self.images.list(&namespace).await?;
            self.list_containers(following, &namespace, &mut listed).await?;
        }
        self.images.retain_namespaces(&names);
        self.images.tell_names();
        self.outbox.listed(asked, listed).await?;
        Ok(())
    }

    async fn list_containers(
        &self,
        following: &Arc<Following>,
        namespace: &Namespace,
        listed: &mut Vec<ContainerId>,
    ) -> Result<(), Ended> {
        let asked = self.outbox.asking().await;
        let records = containers::list(namespace).await?;
        let mut tasks = tasks::list(namespace).await?;
        for record in records {
            let id = ContainerId::new(&namespace.name, &record.id);
            listed.push(id.clone());
            let task = tasks.remove(&record.id);
            let described =
                containers::describe(namespace, &self.name, record, task, &self.images).await?;
            match self.outbox.container(asked, described).await? {
                Answer::Taken => (),
                Answer::Outdated | Answer::AskAgainLater => following.look_again(id),
            }
        }
        Ok(())
    }

    async fn remove_stale_views(&self, connection: &Connection) {
        let Ok(names) = self.followed(connection).await else { return };
        for namespace in names.iter().filter_map(|name| connection.namespace(name).ok()) {
            if let Err(status) = snapshots::remove_stale_views(&namespace, self.images.held()).await
            {
                tracing::debug!("stale views stay until they expire: {}", words(&status));
            }
        }
    }
}

/// Drains the event stream into the queue; never waits for anything else.
async fn read(
    endpoint: Arc<Endpoint>,
    following: Arc<Following>,
    queue: mpsc::Sender<Event>,
) -> Ended {
    let health = &endpoint.health;
    let request = SubscribeRequest { filters: events::filters(&following.marker) };
    let mut stream = match following.connection.event_stream().subscribe(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return Ended::Lost(format!("its event stream: {}", words(&status))),
    };
    loop {
        let envelope = match stream.message().await {
            Ok(Some(envelope)) => envelope,
            Ok(None) => return Ended::Lost("it ended the event stream".into()),
            Err(status) => return Ended::Lost(format!("its event stream: {}", words(&status))),
        };
        let missed = match events::decode(&envelope, &following.marker, Timestamp::now()) {
            Ok(Some(Event::Marker)) => {
                following.marked.send_replace(true);
                false
            }
            // A list cannot tell it again, so none is made for it.
            Ok(Some(event)) if event.is_of_exec() && queue.capacity() <= QUEUE_WITHOUT_EXECS => {
                too_many_execs(health);
                false
            }
            Ok(Some(event)) => {
                endpoint.tell_urgent(&event);
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
        if missed && !following.overflowed.swap(true, Ordering::Relaxed) {
            let _relist = health.record(Failure::ContainerdLost);
            tracing::warn!("events of containerd were missed; listing again");
            // The dispatcher asks for the list when it has caught up; this is for
            // one that has nothing to catch up with.
            if queue.capacity() == QUEUE {
                following.overflowed.store(false, Ordering::Relaxed);
                following.relist.notify_one();
            }
        }
    }
}

/// No list tells of an exec again.
fn too_many_execs(health: &Health) {
    let failure = Failure::ExecEventsFull;
    let _degraded = health.record(failure);
    health.happened(failure, "what containerd calls some sessions was not told: too many execs");
}

/// Publishes our marker until it comes back; false if it does not.
async fn subscribed(following: &Following) -> bool {
    let mut marked = following.marked.subscribe();
    let deadline = tokio::time::Instant::now() + MARKER_PATIENCE;
    // Events must be published in some namespace; it need not exist.
    let Ok(namespace) = following.connection.namespace("driftd") else { return false };
    while tokio::time::Instant::now() < deadline {
        let request = PublishRequest {
            topic: following.marker.clone(),
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

/// Ends when containerd does not answer any more: a stream on which nothing
/// comes looks the same whether containerd is idle or hangs.
async fn pulse(connection: Connection) -> Ended {
    loop {
        tokio::time::sleep(PULSE).await;
        if let Err(status) = connection.version(PULSE).await {
            return Ended::Lost(format!("it does not answer: {}", words(&status)));
        }
    }
}
