//! The one thread that makes baselines, and the pool that hashes for it.
//!
//! Whoever submits a job never waits. Containers go before images: their
//! findings are waiting. A layer is recorded once, from its directory or else
//! from its blob; what proves it is read by [`verify`](super::verify)'s thread,
//! and what comes out is kept here. Only this thread writes to the store.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, at, bounded, select, select_biased};
use jiff::Timestamp;

use super::compare::Comparison;
use super::proof::{Checked, LayerProof, unchanged_since};
use super::store::{self, ImageName, Store};
use super::stream::Limits;
use super::urgency::{Urgency, hashing_pool};
use super::verify::{
    Agenda, Found, NO_BLOB, Outcome, Task, Unpacked, Unproved, Verifier, What, limits,
    of_the_layer, unpack,
};
use super::walk::{self, Reading, walk_to};
use super::{
    BaselineEvent, Blobs, Collected, ImageBaseline, KnownBy, LayerBaseline, LayerDifference,
    LayerEntry, LayerReport, MAX_DIFFERENCES, Progress, Proof, Recorded, Witness,
};
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{Blob, ChainId, ContainerId, FileTime, Layer, LayerId, printable};

/// A stack of layers somebody wants the baseline of.
pub struct RecordRequest {
    /// The image's name, if the job is for an image.
    pub image: Option<ImageName>,
    /// The container that waits for it, if the job is for a container.
    pub container: Option<ContainerId>,
    /// Bottom first. A directory need not exist if its layer is recorded.
    pub layers: Vec<Layer>,
    pub proof: Proof,
    pub progress: Option<Arc<Progress>>,
    /// Called when the job is over, on the recorder's thread.
    pub done: Option<Done>,
}

pub type Done = Box<dyn FnOnce(Result<Recorded, String>) + Send>;

impl fmt::Debug for RecordRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordRequest")
            .field("image", &self.image)
            .field("container", &self.container)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

impl RecordRequest {
    fn chain_id(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

/// How many jobs may wait: more than a node has images or containers.
const QUEUE: usize = 4096;

/// How often what nobody needs is looked for.
const COLLECT: Duration = Duration::from_secs(60 * 60);

/// How long after a container's baseline could not be had it is tried again; ever
/// less often, until the longest wait.
const RETRY: Duration = Duration::from_secs(5);
const LONGEST_RETRY: Duration = Duration::from_secs(10 * 60);

/// How often the recording of one layer may be given up for a container that
/// waits for others.
const INTERRUPTIONS: u32 = 3;

/// What waits to be recorded and proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Jobs at work.
    pub recording: usize,
    /// Jobs that wait for their turn.
    pub waiting: usize,
    /// How long ago the oldest job that is not over was submitted.
    pub oldest: Option<Duration>,
    /// Layers that are to be compared with their blob or directory.
    pub verifying: usize,
}

/// Called when what was asked is done, or refused.
pub type Answer<T> = Box<dyn FnOnce(Result<T, String>) + Send>;

/// A job, and by what it is struck off when it is over.
struct Submitted {
    job: RecordRequest,
    ticket: u64,
}

/// What the thread is told besides the containers' jobs, in order.
enum Request {
    Record(Submitted),
    Remove { chain_id: ChainId, done: Answer<()> },
    Prune { done: Answer<Collected> },
    SetNames { endpoint: String, listed: Vec<(ImageName, ChainId)> },
    ImageRemoved { namespace: String, name: String },
    Collect { in_use: HashSet<ChainId> },
}

/// A handle to the recording thread.
#[derive(Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder({} pending)", self.pending())
    }
}

struct Shared {
    store: Arc<Store>,
    health: Arc<Health>,
    urgent: Sender<Submitted>,
    orders: Sender<Request>,
    agenda: Arc<Agenda>,
    urgency: Arc<Urgency>,
    /// When each job that is not over was submitted, in order of submission.
    unfinished: Mutex<BTreeMap<u64, Instant>>,
    submitted: AtomicU64,
    recording: AtomicUsize,
    /// Chains whose jobs found the queue full; the thread tells of them.
    turned_away: Mutex<HashMap<ChainId, String>>,
    /// The layer being recorded, if that may be interrupted.
    current: Mutex<Option<LayerId>>,
    /// Ends the reading at hand: for good, or for a container.
    interrupt: AtomicBool,
    stop: AtomicBool,
    /// Nothing is ever sent; that it is gone ends the threads' waiting.
    running: Mutex<Option<Sender<Infallible>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Recorder {
    /// Starts the threads.
    pub fn start(
        store: Arc<Store>,
        settings: &config::Baseline,
        blobs: Arc<dyn Blobs>,
        news: Sender<BaselineEvent>,
        health: Arc<Health>,
    ) -> Recorder {
        let (urgent, urgent_jobs) = bounded(QUEUE);
        let (orders, ordered) = bounded(QUEUE);
        let (told, outcomes) = bounded(0);
        let (running, stopped) = bounded(0);
        let agenda = Arc::new(Agenda::default());
        let verifier = Verifier::new(
            Arc::clone(&agenda),
            Arc::clone(&store),
            Arc::clone(&blobs),
            settings,
            told,
            stopped.clone(),
        );
        let shared = Arc::new(Shared {
            store,
            health,
            urgent,
            orders,
            agenda,
            urgency: Arc::default(),
            unfinished: Mutex::default(),
            submitted: AtomicU64::new(0),
            recording: AtomicUsize::new(0),
            turned_away: Mutex::default(),
            current: Mutex::default(),
            interrupt: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            running: Mutex::new(Some(running)),
            threads: Mutex::default(),
        });
        let now = Instant::now();
        let worker = Worker {
            shared: Arc::clone(&shared),
            urgent: urgent_jobs,
            orders: ordered,
            outcomes,
            stopped,
            news,
            limits: limits(settings),
            settings: settings.clone(),
            blobs,
            users: HashMap::new(),
            asked: HashMap::new(),
            wrong_blobs: HashSet::new(),
            given_up: HashSet::new(),
            rechecked: HashMap::new(),
            told_since: HashMap::new(),
            retries: HashMap::new(),
            in_use: None,
            next_collection: now + COLLECT,
            next_recheck: now,
            pool: None,
        };
        let start = |name: &'static str, run: Box<dyn FnOnce() + Send>| {
            let health = Arc::clone(&shared.health);
            std::thread::Builder::new()
                .name(name.into())
                .spawn(move || {
                    let _end = End { name, health };
                    run();
                })
                .expect("a thread can be started when the daemon starts")
        };
        let threads = vec![
            start("recorder", Box::new(move || worker.run())),
            start("verifier", Box::new(move || verifier.run())),
        ];
        *lock(&shared.threads) = threads;
        let recorder = Recorder { shared };
        let threads = &recorder.shared.health.threads;
        // Weak, since the recorder's end is what its threads wait for.
        let shared = Arc::downgrade(&recorder.shared);
        let jobs = move || shared.upgrade().map_or(0, |shared| lock(&shared.unfinished).len());
        threads.show_queue("recorder", Box::new(jobs));
        let agenda = Arc::downgrade(&recorder.shared.agenda);
        let layers = move || agenda.upgrade().map_or(0, |agenda| agenda.len());
        threads.show_queue("verifier", Box::new(layers));
        recorder
    }

    /// Asks for a baseline. [`BaselineEvent`] and `done` tell how it went; a job whose
    /// chain is recorded is news as well.
    pub fn submit(&self, job: RecordRequest) {
        let ticket = self.shared.ticket();
        let job = Submitted { job, ticket };
        let refused = if job.job.container.is_some() {
            let needed: Vec<LayerId> = job.job.layers.iter().map(|layer| layer.id).collect();
            self.shared.urgency.raise();
            let sent = self.shared.urgent.try_send(job);
            self.shared.interrupt_for(&needed);
            sent.err().map(|err| (is_full(&err), err.into_inner()))
        } else {
            let sent = self.shared.orders.try_send(Request::Record(job));
            sent.err().and_then(|err| match (is_full(&err), err.into_inner()) {
                (full, Request::Record(job)) => Some((full, job)),
                (_, _) => None,
            })
        };
        let Some((full, Submitted { job, ticket })) = refused else { return };
        lock(&self.shared.unfinished).remove(&ticket);
        let reason = if full {
            format!("{QUEUE} baselines are waiting to be recorded already; it is tried again")
        } else {
            STOPPING.to_owned()
        };
        let _degrade = self.shared.health.record(Failure::BaselineUnavailable);
        if let Some(chain_id) = job.chain_id() {
            lock(&self.shared.turned_away).insert(chain_id, reason.clone());
        }
        if let Some(done) = job.done {
            done(Err(reason));
        }
    }

    /// Which layers of a stack, bottom first, would have to be read.
    pub fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        let store = &self.shared.store;
        let missing = |(place, id): (usize, &LayerId)| {
            (!store.has_layer_for(*id, place == 0).unwrap_or(false)).then_some(*id)
        };
        layers.iter().enumerate().filter_map(missing).collect()
    }

    /// All images that one socket of containerd has now.
    pub fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        self.order(Request::SetNames { endpoint: endpoint.to_owned(), listed });
    }

    /// An image was removed; its baseline stays while it is in use.
    pub fn image_removed(&self, namespace: &str, name: &str) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.order(Request::ImageRemoved { namespace, name });
    }

    /// Forgets what has had no name and no user for the retention period.
    pub fn collect(&self, in_use: HashSet<ChainId>) {
        self.order(Request::Collect { in_use });
    }

    fn order(&self, order: Request) {
        if self.shared.orders.try_send(order).is_err() {
            // The next list of images, or the next collection, says it again.
            tracing::warn!("the recorder is too busy to keep the names of images up to date");
        }
    }

    /// Forgets one image's baseline. Refused while a container uses it.
    pub fn remove(&self, chain_id: ChainId, done: Answer<()>) {
        self.ask(Request::Remove { chain_id, done });
    }

    /// Forgets at once what [`collect`](Recorder::collect) would forget after the
    /// retention period.
    pub fn prune(&self, done: Answer<Collected>) {
        self.ask(Request::Prune { done });
    }

    fn ask(&self, order: Request) {
        if let Err(err) = self.shared.orders.try_send(order) {
            let busy = "the recorder is too busy; try again later";
            let reason = if is_full(&err) { busy } else { STOPPING };
            refuse(err.into_inner(), reason);
        }
    }

    /// Jobs that are not over.
    pub fn pending(&self) -> usize {
        lock(&self.shared.unfinished).len()
    }

    pub fn queue(&self) -> Queue {
        let verifying = self.shared.agenda.len();
        let unfinished = lock(&self.shared.unfinished);
        let recording = self.shared.recording.load(Ordering::Relaxed).min(unfinished.len());
        Queue {
            recording,
            waiting: unfinished.len() - recording,
            oldest: unfinished.values().next().map(Instant::elapsed),
            verifying,
        }
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// Ends the threads, in the middle of a layer if need be, and waits for them.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        {
            let _current = lock(&self.shared.current);
            self.shared.interrupt.store(true, Ordering::Relaxed);
        }
        self.shared.agenda.stop();
        drop(lock(&self.shared.running).take());
        for thread in std::mem::take(&mut *lock(&self.shared.threads)) {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                tracing::error!("the {name} has panicked");
            }
        }
    }
}

/// Says that a thread has ended by a panic. An image may be the reason, so that the
/// process goes on: a new one would meet the same image.
struct End {
    name: &'static str,
    health: Arc<Health>,
}

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { name, health } = self;
            let detail =
                format!("the thread `{name}` has panicked: no baseline is recorded or verified");
            let _ = health.record(Failure::ThreadStuck);
            health.begin(Failure::ThreadStuck, &detail);
            tracing::error!(thread = *name, "{detail}");
        }
    }
}

impl Shared {
    /// Notes a job that begins to wait.
    fn ticket(&self) -> u64 {
        let ticket = self.submitted.fetch_add(1, Ordering::Relaxed);
        lock(&self.unfinished).insert(ticket, Instant::now());
        ticket
    }

    /// Ends the recording of a layer for which a container need not wait.
    fn interrupt_for(&self, needed: &[LayerId]) {
        let current = lock(&self.current);
        if current.is_some_and(|current| !needed.contains(&current)) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
    }

    /// From here on it may be interrupted for containers, or never.
    fn set_current(&self, layer: Option<LayerId>) {
        let mut current = lock(&self.current);
        *current = layer;
        // What interrupted the layer before is over, unless all is.
        self.interrupt.store(self.stop.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn is_full<T>(err: &TrySendError<T>) -> bool {
    match err {
        TrySendError::Full(_) => true,
        TrySendError::Disconnected(_) => false,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

const STOPPING: &str = "driftd is being stopped";

/// Answers an order that will not be followed.
fn refuse(order: Request, reason: &str) {
    match order {
        Request::Record(Submitted { job, .. }) => {
            if let Some(done) = job.done {
                done(Err(reason.into()));
            }
        }
        Request::Remove { done, .. } => done(Err(reason.into())),
        Request::Prune { done } => done(Err(reason.into())),
        Request::SetNames { .. } | Request::ImageRemoved { .. } | Request::Collect { .. } => (),
    }
}

/// A container that has asked for a baseline.
struct User {
    chain_id: ChainId,
    layers: Vec<Layer>,
}

/// A container's job that failed, to be tried again.
struct Retry {
    at: Instant,
    wait: Duration,
    layers: Vec<Layer>,
}

/// A job whose layers are being compared with what proves them.
struct Asked {
    chain_id: ChainId,
    layers: Vec<LayerReport>,
    /// How many comparisons each layer still waits for.
    open: Vec<usize>,
    progress: Option<Arc<Progress>>,
    done: Option<Done>,
}

/// Why what a directory holds was not kept.
#[derive(Debug, thiserror::Error)]
enum Reason {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Walk(#[from] walk::Error),
}

/// Why a layer was not recorded.
enum NotRecorded {
    /// Something else is more urgent.
    Interrupted,
    Failed(String),
}

/// What the thread owns.
struct Worker {
    shared: Arc<Shared>,
    urgent: Receiver<Submitted>,
    orders: Receiver<Request>,
    outcomes: Receiver<Outcome>,
    stopped: Receiver<Infallible>,
    news: Sender<BaselineEvent>,
    settings: config::Baseline,
    limits: Limits,
    blobs: Arc<dyn Blobs>,
    users: HashMap<ContainerId, User>,
    /// By ticket.
    asked: HashMap<u64, Asked>,
    /// Blobs that were read and are not what they should be.
    wrong_blobs: HashSet<Blob>,
    /// Directories that differ from their layer or cannot be read. Nobody looks
    /// again by himself, only when asked, periodically, or after a restart.
    given_up: HashSet<(LayerId, PathBuf)>,
    /// When directories last had their turn to be compared again.
    rechecked: HashMap<(LayerId, PathBuf), Timestamp>,
    told_since: HashMap<ChainId, Option<FileTime>>,
    retries: HashMap<ContainerId, Retry>,
    /// What containers used when that was last known for all.
    in_use: Option<HashSet<ChainId>>,
    next_collection: Instant,
    next_recheck: Instant,
    /// Only while there is work: an idle node pays for no threads.
    pool: Option<rayon::ThreadPool>,
}

impl Worker {
    fn run(mut self) {
        self.shared.urgency.join();
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.tell_turned_away();
            if self.urgent.is_empty() && self.orders.is_empty() {
                self.pool = None;
            }
            let alarm = at(self.next_alarm());
            select_biased! {
                recv(self.stopped) -> _ => break,
                recv(self.urgent) -> job => match job {
                    Ok(job) => self.record(job, None),
                    Err(_) => break,
                },
                recv(self.outcomes) -> outcome => match outcome {
                    Ok(outcome) => self.keep(outcome),
                    Err(_) => break,
                },
                recv(alarm) -> _ => self.on_time(),
                recv(self.orders) -> order => match order {
                    Ok(order) => self.follow(order),
                    Err(_) => break,
                },
            }
        }
        for order in self.urgent.try_iter().map(Request::Record).chain(self.orders.try_iter()) {
            refuse(order, STOPPING);
        }
        for done in self.asked.drain().filter_map(|(_, asked)| asked.done) {
            done(Err(STOPPING.into()));
        }
        lock(&self.shared.unfinished).clear();
        self.shared.urgency.leave();
    }

    fn follow(&mut self, order: Request) {
        let store = Arc::clone(&self.shared.store);
        let result = match order {
            Request::Record(job) => return self.record(job, None),
            Request::SetNames { endpoint, listed } => store.set_names(&endpoint, &listed),
            Request::ImageRemoved { namespace, name } => store.remove_name(&namespace, &name),
            Request::Collect { in_use } => {
                self.users.retain(|_, user| in_use.contains(&user.chain_id));
                self.retries.retain(|container, _| self.users.contains_key(container));
                self.told_since.retain(|chain_id, _| in_use.contains(chain_id));
                let users = self.users.values();
                let layers: HashSet<LayerId> =
                    users.flat_map(|user| &user.layers).map(|layer| layer.id).collect();
                self.given_up.retain(|(id, path)| layers.contains(id) && path.exists());
                self.in_use = Some(in_use);
                return self.collect();
            }
            Request::Remove { chain_id, done } => {
                let user = self.users.iter().find(|(_, user)| user.chain_id == chain_id);
                return done(match user {
                    Some((container, _)) => Err(format!("the container {container} uses it")),
                    None => store.remove(chain_id).map_err(|err| in_full(&err)),
                });
            }
            Request::Prune { done } => {
                let collected = store.collect(&self.in_use(), Duration::ZERO);
                return done(collected.map_err(|err| in_full(&err)));
            }
        };
        if let Err(err) = result {
            // What is on disk is then older than what is in memory, until the
            // next change of the same image or the next list.
            tracing::warn!("{}", in_full(&err));
        }
    }

    // ---- by the clock

    fn next_alarm(&self) -> Instant {
        let retries = self.retries.values().map(|retry| retry.at);
        let recheck = (!self.settings.recheck_period.is_zero()).then_some(self.next_recheck);
        retries.chain(recheck).fold(self.next_collection, Instant::min)
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        let due = |(container, retry): (&ContainerId, &Retry)| {
            (retry.at <= now).then(|| container.clone())
        };
        let due: Vec<ContainerId> = self.retries.iter().filter_map(due).collect();
        for container in due {
            let Some(Retry { wait, layers, .. }) = self.retries.remove(&container) else {
                continue;
            };
            let ticket = self.shared.ticket();
            let job = RecordRequest {
                image: None,
                container: Some(container),
                layers,
                proof: Proof::Later,
                progress: None,
                done: None,
            };
            self.record(Submitted { job, ticket }, Some(wait));
        }
        if self.next_collection <= now {
            self.next_collection = now + COLLECT;
            if self.in_use.is_some() {
                self.collect();
            }
        }
        if !self.settings.recheck_period.is_zero() && self.next_recheck <= now {
            self.recheck(now);
        }
    }

    /// What no baseline is removed of, as far as is known.
    fn in_use(&self) -> HashSet<ChainId> {
        let users = self.users.values().map(|user| user.chain_id);
        self.in_use.iter().flatten().copied().chain(users).collect()
    }

    fn collect(&self) {
        match self.shared.store.collect(&self.in_use(), self.settings.retention) {
            Ok(collected) if collected.images + collected.layers > 0 => tracing::info!(
                images = collected.images,
                layers = collected.layers,
                "forgot baselines that nobody uses"
            ),
            Ok(_) => (),
            Err(err) => tracing::warn!("{}", in_full(&err)),
        }
    }

    /// Has the directory read again that was read the longest ago.
    ///
    /// In half of the period every directory has its turn, and one is left out
    /// only if it is younger than the other half: so none gets older than the
    /// period, and the reading is spread over it.
    fn recheck(&mut self, now: Instant) {
        let half = self.settings.recheck_period / 2;
        let mut oldest: Option<(Option<Timestamp>, Task)> = None;
        let mut directories = HashSet::new();
        for user in self.users.values() {
            for (place, layer) in user.layers.iter().enumerate() {
                let Some(directory) = directory_of(layer) else { continue };
                let key = (layer.id, directory.to_owned());
                let proof = self.shared.store.proof(layer.id);
                let checked = proof.as_ref().and_then(|proof| proof.directory(directory));
                // One that differs or cannot be read has its turn, not all turns.
                let turn = checked
                    .map(|checked| checked.checked_at)
                    .max(self.rechecked.get(&key).copied());
                if !directories.insert(key) {
                    continue;
                }
                if oldest.as_ref().is_none_or(|(other, _)| turn < *other) {
                    let what = What::Again(directory.to_owned());
                    oldest = Some((turn, task(&user.layers, place, what)));
                }
            }
        }
        let turns = u32::try_from(directories.len()).unwrap_or(u32::MAX).max(1);
        self.next_recheck = now + (half / turns).max(Duration::from_millis(10));
        self.rechecked.retain(|key, _| directories.contains(key));
        if let Some((turn, task)) = oldest
            && turn.is_none_or(|turn| age(turn) >= half)
            && let What::Again(directory) = &task.what
        {
            self.rechecked.insert((task.layer.id, directory.clone()), Timestamp::now());
            self.shared.agenda.add(task);
        }
    }

    // ---- recording

    /// `waited`: how long it was waited before this was tried again.
    fn record(&mut self, Submitted { job, ticket }: Submitted, waited: Option<Duration>) {
        if job.container.is_some() {
            self.shared.urgency.raise();
        }
        self.shared.recording.fetch_add(1, Ordering::Relaxed);
        self.shared.agenda.recording_begins();
        let result = self.baseline_of(&job);
        self.shared.agenda.recording_ends();
        if self.urgent.is_empty() {
            self.shared.urgency.lower();
        }
        let RecordRequest { image, container, layers, proof, progress, done } = job;
        if let Some(container) = &container {
            self.keep_user(container, &layers, result.is_err(), waited);
        }
        if let Err(reason) = &result {
            let _degrade = self.shared.health.record(Failure::BaselineUnavailable);
            tracing::warn!(
                image = image.map(|image| crate::model::printable(image.name.as_bytes())),
                container = container.as_ref().map(ToString::to_string),
                "no baseline: {reason}"
            );
        }
        let asked = result.map(|baseline| {
            let asked = self.ask_for_proof(ticket, &layers, proof, progress, &baseline);
            (asked, baseline)
        });
        // Whoever has the news sees the job over.
        let waits = matches!(&asked, Ok((asked, _)) if asked.open.iter().any(|open| *open > 0));
        if !waits {
            self.is_over(ticket);
        }
        if let Some(layer) = layers.last() {
            let chain_id = layer.chain_id;
            match &asked {
                Ok((_, baseline)) => self.tell_ready(chain_id, Arc::clone(baseline)),
                Err(reason) => {
                    self.tell(BaselineEvent::Failed { chain_id, reason: reason.clone() });
                }
            }
        }
        if asked.is_ok() {
            if let (Some(_), Some(top)) = (&container, layers.last()) {
                self.look_at_directories(top.chain_id);
            }
            self.prove_later(&layers);
        }
        match asked {
            Ok((asked, _)) if waits => {
                self.asked.insert(ticket, Asked { done, ..asked });
            }
            Ok((asked, baseline)) => {
                if let Some(done) = done {
                    done(Ok(Recorded { baseline, layers: asked.layers }));
                }
            }
            Err(reason) => {
                if let Some(done) = done {
                    done(Err(reason));
                }
            }
        }
    }

    fn is_over(&self, ticket: u64) {
        lock(&self.shared.unfinished).remove(&ticket);
        self.shared.recording.fetch_sub(1, Ordering::Relaxed);
    }

    fn keep_user(
        &mut self,
        container: &ContainerId,
        layers: &[Layer],
        failed: bool,
        waited: Option<Duration>,
    ) {
        let Some(top) = layers.last() else { return };
        self.retries.remove(container);
        if failed {
            let wait = waited.map_or(RETRY, |waited| (waited * 2).min(LONGEST_RETRY));
            let retry = Retry { at: Instant::now() + wait, wait, layers: layers.to_vec() };
            self.retries.insert(container.clone(), retry);
        }
        let user = User { chain_id: top.chain_id, layers: layers.to_vec() };
        self.users.insert(container.clone(), user);
    }

    fn baseline_of(&mut self, job: &RecordRequest) -> Result<Arc<ImageBaseline>, String> {
        let Some(chain_id) = job.chain_id() else { return Err("there are no layers".into()) };
        let store = Arc::clone(&self.shared.store);
        // Layers are counted once: as they are proved, if that is asked for.
        let counted = job.progress.as_deref().filter(|_| job.proof == Proof::Later);
        if let Some(progress) = &job.progress {
            let total = u32::try_from(job.layers.len()).unwrap_or(u32::MAX);
            progress.layers_total.store(total, Ordering::Relaxed);
        }
        let text = |err: store::Error| in_full(&err);

        // Held open until the image holds them, so that each is checked once.
        let mut held = Vec::with_capacity(job.layers.len());
        let mut ids = Vec::with_capacity(job.layers.len());
        for layer in &job.layers {
            if job.container.is_none() {
                self.record_for_containers();
            }
            if !store.has_layer_for(layer.id, ids.is_empty()).map_err(text)? {
                self.record_layer(job, layer, &ids)?;
            }
            held.push(store.layer(layer.id).map_err(text)?);
            ids.push(layer.id);
            if let Some(progress) = counted {
                progress.layers_done.fetch_add(1, Ordering::Relaxed);
            }
        }
        if store.layers_of(chain_id).as_ref() == Some(&ids)
            && let Some(baseline) = store.image(chain_id).map_err(text)?
        {
            if let Some(image) = &job.image {
                store.name_image(chain_id, image).map_err(text)?;
            }
            return Ok(baseline);
        }
        store
            .write_image(chain_id, ids, job.image.as_ref())
            .map_err(text)?
            .ok_or_else(|| "a layer's baseline was lost while it was recorded".into())
    }

    /// Containers do not wait for the rest of an image.
    fn record_for_containers(&mut self) {
        while let Ok(job) = self.urgent.try_recv() {
            self.record(job, None);
        }
    }

    fn record_layer(
        &mut self,
        job: &RecordRequest,
        layer: &Layer,
        below: &[LayerId],
    ) -> Result<(), String> {
        let mut interruptions = if job.container.is_some() { 0 } else { INTERRUPTIONS };
        loop {
            self.shared.set_current((interruptions > 0).then_some(layer.id));
            let result = self.read_layer(layer, below, job.progress.as_deref());
            self.shared.set_current(None);
            match result {
                Ok(()) => return Ok(()),
                // Recorded, but its proof was lost. It may lack what it hides, if it was
                // the bottom of an image then; that is better than no baseline.
                Err(NotRecorded::Failed(reason))
                    if self.shared.store.proof(layer.id).is_none()
                        && self.shared.store.has_layer(layer.id).unwrap_or(false) =>
                {
                    tracing::warn!(
                        layer = %layer.id,
                        "what was recorded earlier is used, because it cannot be read again: {reason}"
                    );
                    return Ok(());
                }
                Err(NotRecorded::Failed(reason)) => {
                    return Err(format!("layer {}: {reason}", layer.id));
                }
                Err(NotRecorded::Interrupted) if self.shared.stop.load(Ordering::Relaxed) => {
                    return Err(STOPPING.into());
                }
                Err(NotRecorded::Interrupted) => {
                    interruptions = interruptions.saturating_sub(1);
                    self.record_for_containers();
                    // One of them may have needed it too.
                    let store = &self.shared.store;
                    if store.has_layer_for(layer.id, below.is_empty()).unwrap_or(false) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Reads a layer from its directory, or else from its blob, and keeps it.
    fn read_layer(
        &mut self,
        layer: &Layer,
        below: &[LayerId],
        progress: Option<&Progress>,
    ) -> Result<(), NotRecorded> {
        let Some(directory) = directory_of(layer) else {
            return self.read_blob(layer, below, progress);
        };
        let started = Timestamp::now();
        let pool = match self.pool.take() {
            Some(pool) => pool,
            None => hashing_pool(self.settings.threads, &self.shared.urgency)
                .map_err(|err| NotRecorded::Failed(in_full(&err)))?,
        };
        let pool = self.pool.insert(pool);
        let store = Arc::clone(&self.shared.store);
        // Read again because it was recorded as the bottom of an image: all that is
        // known of it holds, except that it lacks what it hides.
        let bottom = below.is_empty();
        let before = store.proof(layer.id).filter(|proof| !proof.hides && !bottom);
        let before = match (before, store.layer(layer.id)) {
            (Some(proof), Ok(Some(known))) => Some((proof, known)),
            (_, _) => None,
        };
        let recorded = store.record_layer(layer.id, |found| {
            let interrupt = &self.shared.interrupt;
            walk_to(pool, directory, &Reading::default(), progress, interrupt, found)
        });
        let newest_change = match recorded {
            Ok(newest_change) => newest_change,
            Err(Reason::Walk(walk::Error::Stopped)) => return Err(NotRecorded::Interrupted),
            Err(Reason::Walk(err)) if layer.blob.is_some() => {
                tracing::info!(
                    layer = %layer.id,
                    "recording from the blob, because its directory cannot be read: {}",
                    in_full(&err)
                );
                return self.read_blob(layer, below, progress).map_err(|not| match not {
                    NotRecorded::Interrupted => NotRecorded::Interrupted,
                    NotRecorded::Failed(reason) => {
                        NotRecorded::Failed(format!("{}; and {reason}", in_full(&err)))
                    }
                });
            }
            Err(err) => return Err(NotRecorded::Failed(in_full(&err))),
        };
        let failed = |err: store::Error| NotRecorded::Failed(in_full(&err));
        let lost = || NotRecorded::Failed("it was not read back as it was written".to_owned());
        let written = store.layer(layer.id).map_err(failed)?.ok_or_else(lost)?;
        let before =
            before.filter(|(_, known)| self.still_holds(layer, directory, known, &written));
        let mut proof = match before {
            Some((proof, _)) => LayerProof { checksum: written.checksum(), ..proof },
            None => LayerProof::new(written.checksum(), layer.chain_id),
        };
        proof.hides = !bottom;
        proof.recorded_in = layer.chain_id;
        proof.not_verified = layer.blob.is_none().then(|| NO_BLOB.to_owned());
        proof.set_directory(Checked {
            path: directory.to_owned(),
            newest_change,
            checked_at: started,
            unchanged_at: started,
        });
        self.write_proof(layer.id, proof);
        Ok(())
    }

    /// Whether what was recorded of a layer as the bottom of an image is what was
    /// now recorded of it elsewhere, apart from what it hides.
    ///
    /// If not, two directories of one layer differ, and nothing here tells which
    /// is right. The later one is needed; the blob, if there is one, will tell.
    fn still_holds(
        &self,
        layer: &Layer,
        directory: &Path,
        known: &LayerBaseline,
        written: &LayerBaseline,
    ) -> bool {
        let mut comparison = Comparison::new(known, true);
        written.entries().for_each(|record| comparison.found(&record.to_entry()));
        let (differences, total) = of_the_layer(comparison.finish(), false);
        if total > 0 {
            let (layer, witness) = (layer.id, directory_name(directory));
            let directories = vec![directory.to_owned()];
            self.tell(BaselineEvent::Tampered { layer, witness, directories, differences, total });
        }
        total == 0
    }

    fn read_blob(
        &mut self,
        layer: &Layer,
        below: &[LayerId],
        progress: Option<&Progress>,
    ) -> Result<(), NotRecorded> {
        let store = Arc::clone(&self.shared.store);
        let failed = |err: store::Error| NotRecorded::Failed(in_full(&err));
        let stack = match below {
            [] => None,
            _ => store.stack(layer.chain_id, below).map_err(failed)?,
        };
        let unpacked = unpack(
            self.blobs.as_ref(),
            layer,
            stack.as_ref(),
            &self.limits,
            progress,
            &self.shared.interrupt,
        );
        let Unpacked { entries, .. } = unpacked.map_err(|unproved| {
            self.note_wrong(layer, &unproved);
            match unproved {
                Unproved::Stopped => NotRecorded::Interrupted,
                unproved if directory_of(layer).is_none() => NotRecorded::Failed(format!(
                    "it has no directory of its own, and {}",
                    unproved.reason()
                )),
                unproved => NotRecorded::Failed(unproved.reason().to_owned()),
            }
        })?;
        let written = store.write_layer(layer.id, entries).map_err(failed)?;
        self.write_proof(
            layer.id,
            LayerProof {
                known_by: KnownBy::Verified,
                blob: layer.blob.as_ref().map(|blob| blob.digest.clone()),
                verified_at: Some(Timestamp::now()),
                ..LayerProof::new(written.checksum(), layer.chain_id)
            },
        );
        Ok(())
    }

    // ---- proving

    /// The comparisons that a job waits for.
    fn ask_for_proof(
        &mut self,
        ticket: u64,
        layers: &[Layer],
        proof: Proof,
        progress: Option<Arc<Progress>>,
        baseline: &ImageBaseline,
    ) -> Asked {
        let store = Arc::clone(&self.shared.store);
        let mut asked = Asked {
            chain_id: baseline.chain_id(),
            layers: Vec::with_capacity(layers.len()),
            open: vec![0; layers.len()],
            progress,
            done: None,
        };
        for (place, layer) in layers.iter().enumerate() {
            let known_by = store.proof(layer.id).map_or(KnownBy::Snapshot, |proof| proof.known_by);
            let mut report = LayerReport {
                id: layer.id,
                known_by,
                blob: Witness::NotAsked,
                directory: Witness::NotAsked,
                differences: Vec::new(),
            };
            let mut whats = Vec::new();
            let blob_is_asked = match proof {
                Proof::Later => false,
                Proof::Blobs => known_by != KnownBy::Verified,
                Proof::Deep => true,
            };
            if blob_is_asked {
                whats.push(What::Blob);
            }
            if proof == Proof::Deep {
                let directories = self.directories_of(layer);
                if directories.is_empty() {
                    let reason = "its snapshotter keeps no directory of it that is known";
                    report.directory = Witness::Unavailable(reason.into());
                }
                whats.extend(directories.into_iter().map(What::Directory));
            }
            asked.open[place] = whats.len();
            if let (0, Some(progress), true) = (whats.len(), &asked.progress, proof != Proof::Later)
            {
                progress.layers_done.fetch_add(1, Ordering::Relaxed);
            }
            for what in whats {
                let progress = asked.progress.clone();
                let ticket = Some(ticket);
                self.shared.agenda.add(Task { ticket, progress, ..task(layers, place, what) });
            }
            asked.layers.push(report);
        }
        asked
    }

    /// Where a layer is unpacked, as far as anybody has said.
    fn directories_of(&self, layer: &Layer) -> Vec<PathBuf> {
        let users = self.users.values().flat_map(|user| &user.layers);
        let same = users.filter(|other| other.id == layer.id).filter_map(directory_of);
        let mut directories: Vec<PathBuf> =
            directory_of(layer).into_iter().chain(same).map(Path::to_owned).collect();
        directories.sort();
        directories.dedup();
        directories
    }

    /// Has the directories compared that containers have of this chain and that
    /// nobody has read yet, or not since the newest of them was unpacked.
    fn look_at_directories(&self, chain_id: ChainId) {
        let store = &self.shared.store;
        let mut known = Vec::new();
        for user in self.users.values().filter(|user| user.chain_id == chain_id) {
            for (place, layer) in user.layers.iter().enumerate() {
                let Some(directory) = directory_of(layer) else { continue };
                let proof = store.proof(layer.id);
                match proof.as_ref().and_then(|proof| proof.directory(directory)) {
                    Some(checked) => known.push((user, place, checked.clone())),
                    None if self.given_up.contains(&(layer.id, directory.to_owned())) => (),
                    None => {
                        let what = What::Directory(directory.to_owned());
                        self.shared.agenda.add(task(&user.layers, place, what));
                    }
                }
            }
        }
        let since = unchanged_since(known.iter().map(|(_, _, checked)| Some(checked)));
        for (user, place, checked) in &known {
            if since.is_some_and(|since| checked.seen_until() < since.newest) {
                let (directory, since) = (checked.path.clone(), checked.newest_change);
                let what = What::Changes { directory, since };
                self.shared.agenda.add(task(&user.layers, *place, what));
            }
        }
    }

    /// Has the blobs read of layers that are not verified.
    fn prove_later(&mut self, layers: &[Layer]) {
        for (place, layer) in layers.iter().enumerate() {
            let Some(proof) = self.proof_or_new(layer) else { continue };
            if proof.known_by == KnownBy::Verified {
                continue;
            }
            let reason = match &layer.blob {
                _ if !self.settings.verify => "verification is turned off (baseline.verify)",
                Some(blob) if self.wrong_blobs.contains(blob) => continue,
                Some(_) => {
                    self.shared.agenda.add(task(layers, place, What::Blob));
                    continue;
                }
                None if proof.not_verified.is_some() => continue,
                None => NO_BLOB,
            };
            self.write_proof(layer.id, LayerProof { not_verified: Some(reason.into()), ..proof });
        }
    }

    /// What is known of a layer's file; nothing, if that was lost. `None` if the
    /// file was lost as well.
    fn proof_or_new(&self, layer: &Layer) -> Option<LayerProof> {
        let store = &self.shared.store;
        store.proof(layer.id).or_else(|| {
            let file = store.layer(layer.id).ok()??;
            Some(LayerProof::new(file.checksum(), layer.chain_id))
        })
    }

    /// Keeps what came of a comparison.
    fn keep(&mut self, Outcome { task, started, against, found }: Outcome) {
        let store = Arc::clone(&self.shared.store);
        let id = task.layer.id;
        // The layer was recorded anew meanwhile: this is about another one.
        let proof = self.proof_or_new(&task.layer).filter(|proof| against == Some(proof.checksum));
        let mut report = Report::default();
        match (found, proof) {
            (Found::Proved { .. } | Found::Compared { .. }, None) => {
                if store.has_layer(id).unwrap_or(false) {
                    return self.shared.agenda.add_again(task);
                }
                report.unavailable("its baseline was removed meanwhile".to_owned(), &task);
            }
            (Found::Proved { differences, total, entries }, Some(proof)) => {
                self.keep_proved(&task, &proof, differences, total, entries, &mut report);
            }
            (Found::NotProved(unproved), proof) => {
                self.note_wrong(&task.layer, &unproved);
                let reason = unproved.reason();
                if let Some(proof) = proof.filter(|proof| proof.known_by != KnownBy::Verified) {
                    self.write_proof(
                        id,
                        LayerProof { not_verified: Some(reason.to_owned()), ..proof },
                    );
                }
                report.blob = Some(Witness::Unavailable(reason.to_owned()));
            }
            (Found::Compared { differences, total, newest_change }, Some(proof)) => {
                let compared = Compared { started, differences, total, newest_change };
                self.keep_compared(&task, proof, compared, &mut report);
            }
            (Found::NotCompared(reason), proof) => {
                if let (What::Directory(path) | What::Again(path), Some(mut proof)) =
                    (&task.what, proof)
                {
                    tracing::debug!(layer = %id, "a directory was not compared: {reason}");
                    self.given_up.insert((id, path.clone()));
                    proof.forget_directory(path);
                    self.write_proof(id, proof);
                }
                report.unavailable(reason, &task);
            }
        }
        self.tell_changed_since(id, &task.what);
        if let Some(ticket) = task.ticket {
            self.answer(ticket, id, report);
        }
    }

    fn keep_proved(
        &mut self,
        task: &Task,
        proof: &LayerProof,
        differences: Vec<LayerDifference>,
        total: u64,
        entries: Vec<LayerEntry>,
        report: &mut Report,
    ) {
        let id = task.layer.id;
        let store = Arc::clone(&self.shared.store);
        let hides = |entry: &LayerEntry| match entry {
            LayerEntry::Whiteout(_) | LayerEntry::OpaqueDirectory(_) => true,
            LayerEntry::File(_) => false,
        };
        let lacks_what_it_hides = !proof.hides && entries.iter().any(hides);
        let mut proved = LayerProof {
            hides: true,
            known_by: KnownBy::Verified,
            blob: task.layer.blob.as_ref().map(|blob| blob.digest.clone()),
            verified_at: Some(Timestamp::now()),
            not_verified: None,
            ..proof.clone()
        };
        report.blob = Some(Witness::Same);
        if total > 0 || lacks_what_it_hides {
            match store.write_layer(id, entries) {
                Ok(layer) => proved.checksum = layer.checksum(),
                Err(err) => {
                    // The next job tries it again.
                    tracing::warn!("{}", in_full(&err));
                    report.blob = Some(Witness::Unavailable(in_full(&err)));
                    return;
                }
            }
        }
        let directories: Vec<PathBuf> =
            proof.directories.iter().map(|checked| checked.path.clone()).collect();
        if total > 0 {
            proved.recorded_in = task.layer.chain_id;
            proved.directories.clear();
        }
        self.write_proof(id, proved);
        if total == 0 {
            return;
        }
        let names: Vec<String> = directories.iter().map(|path| directory_name(path)).collect();
        let witness = match names.as_slice() {
            [] => "the directory it was recorded from".to_owned(),
            names => names.join(", "),
        };
        tracing::warn!(
            layer = %id,
            differences = total,
            "what was recorded from {witness} differs from the layer's blob; the baseline is the blob's now"
        );
        self.given_up.extend(directories.iter().map(|path| (id, path.clone())));
        self.tell(BaselineEvent::Tampered {
            layer: id,
            witness,
            directories,
            differences: differences.clone(),
            total,
        });
        self.renew_images(id);
        report.directory = Some(Witness::Differs(total));
        report.differences = differences;
    }

    fn keep_compared(
        &mut self,
        task: &Task,
        mut proof: LayerProof,
        compared: Compared,
        report: &mut Report,
    ) {
        let Compared { started, differences, total, newest_change } = compared;
        let id = task.layer.id;
        let (path, is_whole) = match &task.what {
            What::Directory(path) | What::Again(path) => (path, true),
            What::Changes { directory, .. } => (directory, false),
            // Blobs are proved, not compared.
            What::Blob => return,
        };
        if total == 0 {
            let checked_at = match proof.directory(path) {
                Some(checked) if !is_whole => checked.checked_at,
                // It was given up meanwhile: what changed since is not all of it.
                None if !is_whole => return,
                Some(_) | None => started,
            };
            // Those of snapshots that were removed meanwhile.
            proof.directories.retain(|checked| checked.path.exists());
            proof.set_directory(Checked {
                path: path.clone(),
                newest_change,
                checked_at,
                unchanged_at: started,
            });
            self.given_up.remove(&(id, path.clone()));
            self.write_proof(id, proof);
            report.directory = Some(Witness::Same);
            return;
        }
        let witness = directory_name(path);
        tracing::warn!(layer = %id, differences = total, "{witness} differs from the layer's baseline");
        proof.forget_directory(path);
        self.write_proof(id, proof);
        self.given_up.insert((id, path.clone()));
        self.tell(BaselineEvent::Tampered {
            layer: id,
            witness,
            directories: vec![path.clone()],
            differences: differences.clone(),
            total,
        });
        report.directory = Some(Witness::Differs(total));
        report.differences = differences;
    }

    /// Counts and tells of a blob that is not what the image says.
    fn note_wrong(&mut self, layer: &Layer, unproved: &Unproved) {
        let Some(blob) = &layer.blob else { return };
        match unproved {
            Unproved::Wrong(reason) => {
                let _degrade = self.shared.health.record(Failure::BlobCorrupt);
                tracing::warn!(layer = %layer.id, "a layer cannot be verified: {reason}");
            }
            Unproved::Unreadable(reason) => {
                tracing::warn!(layer = %layer.id, "a layer cannot be verified: {reason}");
            }
            Unproved::Unavailable(_) | Unproved::Stopped => return,
        }
        self.wrong_blobs.insert(blob.clone());
    }

    /// Tells containers of the new baseline of a layer they have.
    fn renew_images(&mut self, id: LayerId) {
        let store = Arc::clone(&self.shared.store);
        for chain_id in store.images_with(id) {
            let layers = store.layers_of(chain_id).unwrap_or_default();
            match store.write_image(chain_id, layers, None) {
                Ok(Some(baseline)) => {
                    if self.users.values().any(|user| user.chain_id == chain_id) {
                        self.tell_ready(chain_id, baseline);
                    }
                }
                Ok(None) => (),
                Err(err) => tracing::warn!("{}", in_full(&err)),
            }
        }
    }

    /// Adds to the report that somebody waits for, and hands it over when it is
    /// whole.
    fn answer(&mut self, ticket: u64, id: LayerId, report: Report) {
        let Some(asked) = self.asked.get_mut(&ticket) else { return };
        // A layer may be in a stack twice: each has its own comparisons.
        let place = (0..asked.layers.len())
            .find(|&place| asked.layers[place].id == id && asked.open[place] > 0);
        let Some(place) = place else { return };
        asked.open[place] -= 1;
        report.add_to(&mut asked.layers[place]);
        if asked.open[place] == 0
            && let Some(progress) = &asked.progress
        {
            progress.layers_done.fetch_add(1, Ordering::Relaxed);
        }
        if asked.open.iter().any(|open| *open > 0) {
            return;
        }
        let Some(Asked { chain_id, mut layers, done, .. }) = self.asked.remove(&ticket) else {
            return;
        };
        self.is_over(ticket);
        let store = &self.shared.store;
        for layer in &mut layers {
            let proof = store.proof(layer.id);
            layer.known_by = proof.map_or(KnownBy::Snapshot, |proof| proof.known_by);
        }
        let baseline = match store.image(chain_id) {
            Ok(Some(baseline)) => Ok(baseline),
            Ok(None) => Err("its baseline was removed meanwhile".to_owned()),
            Err(err) => Err(in_full(&err)),
        };
        if let Some(done) = done {
            done(baseline.map(|baseline| Recorded { baseline, layers }));
        }
    }

    fn write_proof(&self, id: LayerId, proof: LayerProof) {
        if let Err(err) = self.shared.store.write_proof(id, proof) {
            // It is kept in memory; after a restart it is found out again.
            tracing::warn!("{}", in_full(&err));
        }
    }

    // ---- telling

    /// Up to when all directories that containers have of a chain equal its
    /// baseline.
    fn since(&self, chain_id: ChainId) -> Option<FileTime> {
        let store = &self.shared.store;
        let users = self.users.values().filter(|user| user.chain_id == chain_id);
        let checked: Vec<Option<Checked>> = users
            .flat_map(|user| &user.layers)
            .map(|layer| {
                let proof = store.proof(layer.id)?;
                proof.directory(directory_of(layer)?).cloned()
            })
            .collect();
        unchanged_since(checked.iter().map(Option::as_ref)).map(|since| since.time)
    }

    fn tell_ready(&mut self, chain_id: ChainId, baseline: Arc<ImageBaseline>) {
        let unchanged_since = self.since(chain_id);
        self.told_since.insert(chain_id, unchanged_since);
        self.tell(BaselineEvent::Ready { chain_id, baseline, unchanged_since });
    }

    /// After a comparison with a layer: tells the containers that have it if the
    /// time has changed up to which their directories are known.
    fn tell_changed_since(&mut self, id: LayerId, what: &What) {
        let with =
            self.users.values().filter(|user| user.layers.iter().any(|layer| layer.id == id));
        let chains: HashSet<ChainId> = with.map(|user| user.chain_id).collect();
        for chain_id in chains {
            let told = self.told_since.get(&chain_id);
            if told.is_some_and(|told| *told != self.since(chain_id))
                && let Ok(Some(baseline)) = self.shared.store.image(chain_id)
            {
                self.tell_ready(chain_id, baseline);
            }
            match what {
                What::Directory(_) | What::Again(_) => self.look_at_directories(chain_id),
                // The end of it, also where a clock is wrong.
                What::Changes { .. } | What::Blob => (),
            }
        }
    }

    fn tell_turned_away(&self) {
        let turned_away = std::mem::take(&mut *lock(&self.shared.turned_away));
        for (chain_id, reason) in turned_away {
            self.tell(BaselineEvent::Failed { chain_id, reason });
        }
    }

    /// Waits for the pipeline, but not for ever when both are being stopped.
    fn tell(&self, news: BaselineEvent) {
        select! {
            // Nobody listens any more: there is nobody to tell.
            send(self.news, news) -> _ => (),
            recv(self.stopped) -> _ => (),
        }
    }
}

/// What a directory was found to be.
struct Compared {
    started: Timestamp,
    differences: Vec<LayerDifference>,
    total: u64,
    newest_change: FileTime,
}

/// What one comparison adds to a layer's report.
#[derive(Default)]
struct Report {
    blob: Option<Witness>,
    directory: Option<Witness>,
    differences: Vec<LayerDifference>,
}

impl Report {
    fn unavailable(&mut self, reason: String, task: &Task) {
        match task.what {
            What::Blob => self.blob = Some(Witness::Unavailable(reason)),
            What::Directory(_) | What::Changes { .. } | What::Again(_) => {
                self.directory = Some(Witness::Unavailable(reason));
            }
        }
    }

    fn add_to(self, report: &mut LayerReport) {
        if let Some(blob) = self.blob {
            report.blob = blob;
        }
        if let Some(directory) = self.directory {
            let before = std::mem::replace(&mut report.directory, Witness::NotAsked);
            report.directory = worse(before, directory);
        }
        let room = MAX_DIFFERENCES.saturating_sub(report.differences.len());
        for difference in self.differences.into_iter().take(room) {
            if !report.differences.contains(&difference) {
                report.differences.push(difference);
            }
        }
    }
}

/// Of two directories of one layer, what there is to say about both.
fn worse(one: Witness, other: Witness) -> Witness {
    match (one, other) {
        (Witness::Differs(one), Witness::Differs(other)) => Witness::Differs(one.max(other)),
        (Witness::Differs(total), _) | (_, Witness::Differs(total)) => Witness::Differs(total),
        (Witness::Unavailable(reason), _) | (_, Witness::Unavailable(reason)) => {
            Witness::Unavailable(reason)
        }
        (Witness::Same, _) | (_, Witness::Same) => Witness::Same,
        (Witness::NotAsked, Witness::NotAsked) => Witness::NotAsked,
    }
}

/// A task for the layer at that place of a stack.
fn task(layers: &[Layer], place: usize, what: What) -> Task {
    Task {
        layer: layers[place].clone(),
        below: layers[..place].iter().map(|layer| layer.id).collect(),
        what,
        ticket: None,
        progress: None,
    }
}

/// Where the layer is unpacked, if it is.
fn directory_of(layer: &Layer) -> Option<&Path> {
    layer.directory.as_deref().filter(|directory| !directory.as_os_str().is_empty())
}

fn directory_name(path: &Path) -> String {
    format!("the directory {}", printable(path.as_os_str().as_bytes()))
}

fn age(time: Timestamp) -> Duration {
    // A clock that was set back makes everything young for a while.
    Duration::try_from(Timestamp::now().duration_since(time)).unwrap_or_default()
}

/// An error with its causes, for people.
pub(super) fn in_full(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text = format!("{text}: {err}");
        cause = err.source();
    }
    text
}

#[cfg(test)]
mod tests;
