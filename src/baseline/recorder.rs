//! The one thread that makes baselines, and the pool that hashes for it.
//!
//! Whoever submits a job never waits. Containers go before images: their
//! findings are waiting. A layer that is recorded is never read again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select, select_biased};

use super::store::{ImageName, Store};
use super::walk::walk;
use super::{Blobs, Collected, ImageBaseline, News, Progress, Proof, Recorded};
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{ChainId, ContainerId, Layer, LayerId};

/// A stack of layers somebody wants the baseline of.
pub struct Job {
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

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("image", &self.image)
            .field("container", &self.container)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}

impl Job {
    fn chain_id(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

/// How many jobs may wait: more than a node has images or containers.
const QUEUE: usize = 4096;

/// How much less urgent than the node's own work hashing is.
const NICE: i32 = 10;

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
    job: Job,
    ticket: u64,
}

/// What the thread is told besides the containers' jobs, in order.
enum Order {
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
    orders: Sender<Order>,
    /// When each job that is not over was submitted, in order of submission.
    unfinished: Mutex<BTreeMap<u64, Instant>>,
    submitted: AtomicU64,
    recording: AtomicUsize,
    /// Chains whose jobs found the queue full; the thread tells of them.
    turned_away: Mutex<HashMap<ChainId, String>>,
    stop: AtomicBool,
    /// Nothing is ever sent; that it is gone ends the thread's waiting.
    running: Mutex<Option<Sender<Infallible>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Starts the thread.
    pub fn start(
        store: Arc<Store>,
        settings: &config::Baseline,
        blobs: Arc<dyn Blobs>,
        news: Sender<News>,
        health: Arc<Health>,
    ) -> Recorder {
        let (urgent, urgent_jobs) = bounded(QUEUE);
        let (orders, ordered) = bounded(QUEUE);
        let (running, stopped) = bounded(0);
        let shared = Arc::new(Shared {
            store,
            health,
            urgent,
            orders,
            unfinished: Mutex::default(),
            submitted: AtomicU64::new(0),
            recording: AtomicUsize::new(0),
            turned_away: Mutex::default(),
            stop: AtomicBool::new(false),
            running: Mutex::new(Some(running)),
            thread: Mutex::default(),
        });
        let worker = Worker {
            shared: Arc::clone(&shared),
            urgent: urgent_jobs,
            orders: ordered,
            stopped,
            news,
            settings: settings.clone(),
            blobs,
            users: HashMap::new(),
            pool: None,
        };
        let thread = std::thread::Builder::new()
            .name("recorder".into())
            .spawn(move || worker.run())
            .expect("a thread can be started when the daemon starts");
        *lock(&shared.thread) = Some(thread);
        Recorder { shared }
    }

    /// Asks for a baseline. [`News`] and `done` tell how it went; a job whose
    /// chain is recorded is news as well.
    pub fn submit(&self, job: Job) {
        let ticket = self.shared.submitted.fetch_add(1, Ordering::Relaxed);
        lock(&self.shared.unfinished).insert(ticket, Instant::now());
        let job = Submitted { job, ticket };
        let refused = if job.job.container.is_some() {
            self.shared.urgent.try_send(job).err().map(|err| (is_full(&err), err.into_inner()))
        } else {
            let sent = self.shared.orders.try_send(Order::Record(job));
            sent.err().and_then(|err| match (is_full(&err), err.into_inner()) {
                (full, Order::Record(job)) => Some((full, job)),
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

    /// Which of these layers would have to be read from their directories.
    pub fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        let missing = |id: &LayerId| !self.shared.store.has_layer(*id).unwrap_or(false);
        layers.iter().copied().filter(missing).collect()
    }

    /// All images that one socket of containerd has now.
    pub fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        self.order(Order::SetNames { endpoint: endpoint.to_owned(), listed });
    }

    /// An image was removed; its baseline stays while it is in use.
    pub fn image_removed(&self, namespace: &str, name: &str) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.order(Order::ImageRemoved { namespace, name });
    }

    /// Forgets what has no name and is not in use.
    pub fn collect(&self, in_use: HashSet<ChainId>) {
        self.order(Order::Collect { in_use });
    }

    fn order(&self, order: Order) {
        if self.shared.orders.try_send(order).is_err() {
            // The next list of images, or the next collection, says it again.
            tracing::warn!("the recorder is too busy to keep the names of images up to date");
        }
    }

    /// Forgets one image's baseline. Refused while a container uses it.
    pub fn remove(&self, chain_id: ChainId, done: Answer<()>) {
        self.ask(Order::Remove { chain_id, done });
    }

    /// Forgets at once what [`collect`](Recorder::collect) would forget after the
    /// retention period.
    pub fn prune(&self, done: Answer<Collected>) {
        self.ask(Order::Prune { done });
    }

    /// Waits for room: who asks this waits for an answer anyway.
    fn ask(&self, order: Order) {
        if let Err(err) = self.shared.orders.send(order) {
            refuse(err.into_inner(), STOPPING);
        }
    }

    /// Jobs that are not over.
    pub fn pending(&self) -> usize {
        lock(&self.shared.unfinished).len()
    }

    pub fn queue(&self) -> Queue {
        let unfinished = lock(&self.shared.unfinished);
        let recording = self.shared.recording.load(Ordering::Relaxed).min(unfinished.len());
        Queue {
            recording,
            waiting: unfinished.len() - recording,
            oldest: unfinished.values().next().map(Instant::elapsed),
            verifying: 0,
        }
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// Ends the thread, in the middle of a layer if need be, and waits for it.
    pub fn stop(self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        drop(lock(&self.shared.running).take());
        if let Some(thread) = lock(&self.shared.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the recorder has panicked");
        }
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
fn refuse(order: Order, reason: &str) {
    match order {
        Order::Record(Submitted { job, .. }) => {
            if let Some(done) = job.done {
                done(Err(reason.into()));
            }
        }
        Order::Remove { done, .. } => done(Err(reason.into())),
        Order::Prune { done } => done(Err(reason.into())),
        Order::SetNames { .. } | Order::ImageRemoved { .. } | Order::Collect { .. } => (),
    }
}

/// What the thread owns.
struct Worker {
    shared: Arc<Shared>,
    urgent: Receiver<Submitted>,
    orders: Receiver<Order>,
    stopped: Receiver<Infallible>,
    news: Sender<News>,
    settings: config::Baseline,
    blobs: Arc<dyn Blobs>,
    /// The containers that have asked for a baseline, with their chains.
    users: HashMap<ContainerId, ChainId>,
    /// Only while there is work: an idle node pays for no threads.
    pool: Option<rayon::ThreadPool>,
}

impl Worker {
    fn run(mut self) {
        lower_priority();
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.tell_turned_away();
            if self.urgent.is_empty() && self.orders.is_empty() {
                self.pool = None;
            }
            select_biased! {
                recv(self.stopped) -> _ => break,
                recv(self.urgent) -> job => match job {
                    Ok(job) => self.record(job),
                    Err(_) => break,
                },
                recv(self.orders) -> order => match order {
                    Ok(order) => self.follow(order),
                    Err(_) => break,
                },
            }
        }
        for order in self.urgent.try_iter().map(Order::Record).chain(self.orders.try_iter()) {
            refuse(order, STOPPING);
        }
        lock(&self.shared.unfinished).clear();
    }

    fn follow(&mut self, order: Order) {
        let store = &self.shared.store;
        let result = match order {
            Order::Record(job) => return self.record(job),
            Order::SetNames { endpoint, listed } => store.set_names(&endpoint, &listed),
            Order::ImageRemoved { namespace, name } => store.remove_name(&namespace, &name),
            Order::Collect { in_use } => {
                self.users.retain(|_, chain_id| in_use.contains(chain_id));
                store.collect(&in_use).map(|collected| {
                    if collected.images + collected.layers > 0 {
                        tracing::info!(
                            images = collected.images,
                            layers = collected.layers,
                            "forgot baselines that nobody uses"
                        );
                    }
                })
            }
            Order::Remove { chain_id, done } => {
                return done(match self.user_of(chain_id) {
                    Some(container) => Err(format!("the container {container} uses it")),
                    None => store.remove(chain_id).map_err(|err| in_full(&err)),
                });
            }
            Order::Prune { done } => {
                let in_use = self.users.values().copied().collect();
                return done(store.collect(&in_use).map_err(|err| in_full(&err)));
            }
        };
        if let Err(err) = result {
            // What is on disk is then older than what is in memory, until the
            // next change of the same image or the next list.
            tracing::warn!("{}", in_full(&err));
        }
    }

    fn user_of(&self, chain_id: ChainId) -> Option<&ContainerId> {
        self.users.iter().find(|(_, used)| **used == chain_id).map(|(container, _)| container)
    }

    fn record(&mut self, Submitted { job, ticket }: Submitted) {
        self.shared.recording.store(1, Ordering::Relaxed);
        let Job { image, container, layers, proof: _, progress, done } = job;
        if let (Some(container), Some(layer)) = (&container, layers.last()) {
            self.users.insert(container.clone(), layer.chain_id);
        }
        let result = self.baseline_of(image.as_ref(), &layers, progress.as_deref());
        if let Err(reason) = &result {
            let _degrade = self.shared.health.record(Failure::BaselineUnavailable);
            tracing::warn!(
                image = image.map(|image| crate::model::printable(image.name.as_bytes())),
                container = container.map(|container| container.to_string()),
                "no baseline: {reason}"
            );
        }
        // Whoever has the news sees the job over.
        lock(&self.shared.unfinished).remove(&ticket);
        self.shared.recording.store(0, Ordering::Relaxed);
        if let Some(layer) = layers.last() {
            let chain_id = layer.chain_id;
            self.tell(match &result {
                Ok(baseline) => {
                    News::Ready { chain_id, baseline: Arc::clone(baseline), unchanged_since: None }
                }
                Err(reason) => News::Failed { chain_id, reason: reason.clone() },
            });
        }
        if let Some(done) = done {
            done(result.map(|baseline| Recorded { baseline, layers: Vec::new() }));
        }
    }

    fn baseline_of(
        &mut self,
        image: Option<&ImageName>,
        layers: &[Layer],
        progress: Option<&Progress>,
    ) -> Result<Arc<ImageBaseline>, String> {
        let Some(chain_id) = layers.last().map(|layer| layer.chain_id) else {
            return Err("there are no layers".into());
        };
        if let Some(progress) = progress {
            let total = u32::try_from(layers.len()).unwrap_or(u32::MAX);
            progress.layers_total.store(total, Ordering::Relaxed);
        }
        let store = Arc::clone(&self.shared.store);
        if let Some(baseline) = store.image(chain_id).map_err(|err| in_full(&err))? {
            if let Some(progress) = progress {
                let total = progress.layers_total.load(Ordering::Relaxed);
                progress.layers_done.store(total, Ordering::Relaxed);
            }
            if let Some(image) = image {
                store.name_image(chain_id, image).map_err(|err| in_full(&err))?;
            }
            return Ok(baseline);
        }

        // Held open until the image holds them, so that each is checked once.
        let mut held = Vec::with_capacity(layers.len());
        for layer in layers {
            let mut known = store.layer(layer.id).map_err(|err| in_full(&err))?;
            if known.is_none() {
                self.record_layer(layer, progress)?;
                known = store.layer(layer.id).map_err(|err| in_full(&err))?;
            }
            held.push(known);
            if let Some(progress) = progress {
                progress.layers_done.fetch_add(1, Ordering::Relaxed);
            }
        }
        let ids = layers.iter().map(|layer| layer.id).collect();
        store
            .write_image(chain_id, ids, image)
            .map_err(|err| in_full(&err))?
            .ok_or_else(|| "a layer's baseline was lost while it was recorded".into())
    }

    fn record_layer(&mut self, layer: &Layer, progress: Option<&Progress>) -> Result<(), String> {
        let pool = match self.pool.take() {
            Some(pool) => pool,
            None => hashing_pool(self.settings.threads).map_err(|err| in_full(&err))?,
        };
        let pool = self.pool.insert(pool);
        let Some(directory) = &layer.directory else {
            return Err(match &layer.blob {
                Some(blob) => match self.blobs.open(blob) {
                    Ok(_) => format!("layer {} has no directory", layer.id),
                    Err(reason) => format!("layer {} has no directory, and {reason}", layer.id),
                },
                None => format!("layer {} has neither a directory nor a blob", layer.id),
            });
        };
        let walked = walk(pool, directory, progress, &self.shared.stop)
            .map_err(|err| format!("layer {}: {}", layer.id, in_full(&err)))?;
        let entries = walked.entries;
        self.shared.store.write_layer(layer.id, entries).map_err(|err| in_full(&err))
    }

    fn tell_turned_away(&self) {
        let turned_away = std::mem::take(&mut *lock(&self.shared.turned_away));
        for (chain_id, reason) in turned_away {
            self.tell(News::Failed { chain_id, reason });
        }
    }

    /// Waits for the pipeline, but not for ever when both are being stopped.
    fn tell(&self, news: News) {
        select! {
            // Nobody listens any more: there is nobody to tell.
            send(self.news, news) -> _ => (),
            recv(self.stopped) -> _ => (),
        }
    }
}

/// The threads that read and hash.
pub fn hashing_pool(threads: usize) -> Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|number| format!("hash-{number}"))
        .start_handler(|_| lower_priority())
        .build()
}

/// Of the calling thread. Best effort: a baseline at the usual priority is a
/// baseline all the same.
fn lower_priority() {
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICE);
}

/// An error with its causes, for people.
fn in_full(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(err) = cause {
        text = format!("{text}: {err}");
        cause = err.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use super::*;
    use crate::baseline::blake3_of;
    use crate::model::{Blob, DiffId, RootfsPath};

    const SOON: Duration = Duration::from_secs(20);

    struct Bench {
        scratch: tempfile::TempDir,
        store: Arc<Store>,
        health: Arc<Health>,
        news: Receiver<News>,
        recorder: Recorder,
    }

    struct NoBlobs;

    impl Blobs for NoBlobs {
        fn open(&self, _: &Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
            Err("there are no blobs here".into())
        }
    }

    fn start(store: Arc<Store>, news: Sender<News>, health: Arc<Health>) -> Recorder {
        let settings = config::Baseline { threads: 2, ..config::Baseline::default() };
        Recorder::start(store, &settings, Arc::new(NoBlobs), news, health)
    }

    /// A recorder whose news nobody has read yet: `room` of them find a place.
    fn bench(room: usize) -> Bench {
        let scratch = tempfile::tempdir().unwrap();
        let health = Arc::new(Health::default());
        let store =
            Arc::new(Store::open(&scratch.path().join("baselines"), Arc::clone(&health)).unwrap());
        let (sender, news) = bounded(room);
        let recorder = start(Arc::clone(&store), sender, Arc::clone(&health));
        Bench { scratch, store, health, news, recorder }
    }

    impl Bench {
        fn layer_directory(&self, number: u8) -> PathBuf {
            self.scratch.path().join(format!("layer-{number}"))
        }

        /// Unpacks a layer with one file, which holds the layer's number.
        fn unpack(&self, number: u8) {
            fs::create_dir(self.layer_directory(number)).unwrap();
            fs::write(self.layer_directory(number).join("file"), number.to_string()).unwrap();
        }

        /// A job for a stack of layers; its chain ID is the last layer's number.
        fn job(&self, layers: &[u8]) -> Job {
            let layers = layers.iter().map(|number| Layer {
                id: LayerId::Diff(DiffId([*number; 32])),
                chain_id: chain(*number),
                directory: Some(self.layer_directory(*number)),
                blob: None,
            });
            Job {
                image: None,
                container: None,
                layers: layers.collect(),
                proof: Proof::Later,
                progress: None,
                done: None,
            }
        }

        fn image_job(&self, name: &str, layers: &[u8]) -> Job {
            let image =
                ImageName { namespace: "default".into(), name: name.into(), manifest_digest: None };
            Job { image: Some(image), ..self.job(layers) }
        }

        #[track_caller]
        fn next(&self) -> Result<(ChainId, Arc<ImageBaseline>), (ChainId, String)> {
            match self.news.recv_timeout(SOON).expect("the recorder has news") {
                News::Ready { chain_id, baseline, .. } => Ok((chain_id, baseline)),
                News::Failed { chain_id, reason } => Err((chain_id, reason)),
                News::Tampered { layer, .. } => panic!("{layer} was not tampered with"),
            }
        }
    }

    fn chain(number: u8) -> ChainId {
        ChainId([number; 32])
    }

    #[track_caller]
    fn content_of(baseline: &ImageBaseline) -> Option<crate::model::Blake3Hash> {
        baseline.get(&RootfsPath::new("/file").unwrap()).unwrap().entry.blake3
    }

    #[test]
    fn a_chain_is_recorded_once_and_then_known_without_its_directories() {
        let bench = bench(4);
        bench.unpack(1);
        bench.unpack(2);
        let progress = Arc::new(Progress::default());
        let (done, told) = bounded(1);
        bench.recorder.submit(Job {
            progress: Some(Arc::clone(&progress)),
            done: Some(Box::new(move |result| done.send(result).unwrap())),
            ..bench.image_job("busybox", &[1, 2])
        });
        let (chain_id, baseline) = bench.next().unwrap();
        assert_eq!((chain_id, content_of(&baseline)), (chain(2), Some(blake3_of("2"))));
        assert!(Arc::ptr_eq(&told.recv_timeout(SOON).unwrap().unwrap().baseline, &baseline));
        assert_eq!(progress.files_done.load(Ordering::Relaxed), 2);
        assert_eq!(progress.layers_done.load(Ordering::Relaxed), 2);
        assert_eq!(progress.layers_total.load(Ordering::Relaxed), 2);
        assert_eq!(bench.store.find("busybox").unwrap().chain_id, chain(2));

        fs::remove_dir_all(bench.layer_directory(1)).unwrap();
        fs::remove_dir_all(bench.layer_directory(2)).unwrap();
        assert_eq!(bench.recorder.unrecorded(&bench.store.layers_of(chain(2)).unwrap()), []);
        bench.recorder.submit(bench.job(&[1, 2]));
        assert!(Arc::ptr_eq(&bench.next().unwrap().1, &baseline));
        // Another image over a layer that is known.
        bench.unpack(3);
        bench.recorder.submit(bench.job(&[1, 3]));
        assert_eq!(bench.next().unwrap().0, chain(3));
        assert_eq!(bench.health.losses(), []);
        bench.recorder.stop();
    }

    #[test]
    fn a_layer_that_is_gone_fails_its_image_and_no_other() {
        let bench = bench(4);
        bench.unpack(2);
        let (done, told) = bounded(1);
        bench.recorder.submit(Job {
            done: Some(Box::new(move |result| done.send(result.map(drop)).unwrap())),
            ..bench.job(&[1])
        });
        bench.recorder.submit(bench.job(&[2]));
        let (chain_id, reason) = bench.next().unwrap_err();
        assert_eq!(chain_id, chain(1));
        let directory = bench.layer_directory(1);
        assert!(reason.contains(directory.to_str().unwrap()), "{reason}");
        assert_eq!(told.recv_timeout(SOON).unwrap(), Err(reason));
        assert_eq!(bench.next().unwrap().0, chain(2));
        assert_eq!(bench.health.count(Failure::BaselineUnavailable), 1);
        assert_eq!(bench.recorder.pending(), 0);
        bench.recorder.stop();
    }

    fn corrupt(store: &Path) {
        for file in fs::read_dir(store.join("layers")).unwrap() {
            let path = file.unwrap().path();
            let mut bytes = fs::read(&path).unwrap();
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            // A new file: the old one may be mapped.
            fs::remove_file(&path).unwrap();
            fs::write(&path, bytes).unwrap();
        }
    }

    #[test]
    fn a_corrupt_layer_is_recorded_again() {
        let bench = bench(4);
        bench.unpack(1);
        bench.recorder.submit(bench.job(&[1]));
        drop(bench.next().unwrap());
        corrupt(&bench.scratch.path().join("baselines"));
        // As after a restart; also whoever got the news has let go of it.
        bench.recorder.clone().stop();
        let store = Store::open(&bench.scratch.path().join("baselines"), Arc::clone(&bench.health));
        let (sender, news) = bounded(4);
        let again = start(Arc::new(store.unwrap()), sender, Arc::clone(&bench.health));
        assert_eq!(
            again.unrecorded(&[LayerId::Diff(DiffId([1; 32]))]),
            [LayerId::Diff(DiffId([1; 32]))]
        );
        again.submit(bench.job(&[1]));
        let news = news.recv_timeout(SOON).unwrap();
        assert!(matches!(news, News::Ready { .. }), "{news:?}");
        assert_eq!(bench.health.count(Failure::BaselineCorrupt), 1);
        again.stop();
    }

    #[test]
    fn containers_go_before_images() {
        let bench = bench(0);
        for number in 1..=3 {
            bench.unpack(number);
        }
        // The first job's news wait for a reader, so the others queue up.
        bench.recorder.submit(bench.job(&[1]));
        while !bench.store.images().iter().any(|record| record.chain_id == chain(1)) {
            std::thread::yield_now();
        }
        bench.recorder.submit(bench.image_job("busybox", &[2]));
        let container = Some(ContainerId::new("default", "c"));
        bench.recorder.submit(Job { container, ..bench.job(&[3]) });
        let order: Vec<ChainId> = (0..3).map(|_| bench.next().unwrap().0).collect();
        assert_eq!(order, [chain(1), chain(3), chain(2)]);
        bench.recorder.stop();
    }

    #[test]
    fn a_full_queue_turns_jobs_away_and_says_so() {
        let bench = bench(0);
        let (done, told) = bounded(1);
        // The first job fails, and then waits for somebody to read its news.
        bench.recorder.submit(bench.job(&[1]));
        while bench.health.count(Failure::BaselineUnavailable) < 1 {
            std::thread::yield_now();
        }
        for _ in 0..QUEUE {
            bench.recorder.submit(bench.job(&[1]));
        }
        assert_eq!(bench.health.count(Failure::BaselineUnavailable), 1);
        bench.recorder.submit(Job {
            done: Some(Box::new(move |result| done.send(result.map(drop)).unwrap())),
            ..bench.job(&[2])
        });
        let reason = told.try_recv().expect("submit answers at once").unwrap_err();
        assert!(reason.contains("tried again"), "{reason}");
        // The news of the job that was turned away come as soon as there is room.
        let mut news = std::iter::from_fn(|| Some(bench.next().unwrap_err()));
        assert!(news.any(|(chain_id, why)| chain_id == chain(2) && why == reason));
        bench.recorder.stop();
    }

    #[test]
    fn stopping_waits_for_no_reader_and_answers_every_job() {
        let bench = bench(0);
        let (done, told) = bounded(3);
        for _ in 0..3 {
            let done = done.clone();
            bench.recorder.submit(Job {
                done: Some(Box::new(move |result| done.send(result.map(drop)).unwrap())),
                ..bench.job(&[1])
            });
        }
        bench.recorder.clone().stop();
        assert_eq!(told.try_iter().count(), 3);
        assert_eq!(bench.recorder.pending(), 0);
    }

    #[test]
    fn names_follow_the_images_and_what_has_none_is_forgotten() {
        let bench = bench(4);
        bench.unpack(1);
        bench.recorder.submit(bench.image_job("busybox", &[1]));
        drop(bench.next().unwrap());
        bench.recorder.image_removed("default", "busybox");
        bench.recorder.collect(HashSet::from([chain(1)]));
        bench.recorder.submit(bench.job(&[1]));
        drop(bench.next().unwrap());
        assert_eq!(bench.store.images()[0].names, []);

        bench.recorder.collect(HashSet::new());
        bench.recorder.submit(bench.job(&[9]));
        bench.next().unwrap_err();
        assert_eq!(bench.store.images(), []);
        bench.recorder.stop();
    }
}
