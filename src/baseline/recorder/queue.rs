//! The handle through which other rooms use the recorder, and the queue behind it.
//!
//! No caller waits for the recorder: a request that finds the queue full is refused at
//! once. Containers' jobs have a queue of their own and go first, because their
//! findings wait for the baseline.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::convert::Infallible;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, TrySendError};

use crate::baseline::store::{Collected, ImageName, Store};
use crate::baseline::types::{Progress, Proof, Recorded};
use crate::baseline::urgency::Urgency;
use crate::baseline::verify::Agenda;
use crate::health::{Failure, Health};
use crate::model::{ChainId, ContainerId, Layer, LayerId};

/// How many jobs may wait: more than a node has images or containers.
pub(super) const QUEUE: usize = 4096;

pub(super) const STOPPING: &str = "driftd is being stopped";

/// A request for the baseline of a stack of layers.
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

/// Called when a request is carried out or refused.
pub type Answer<T> = Box<dyn FnOnce(Result<T, String>) + Send>;

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
    pub(super) fn chain_id(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

/// How much waits to be recorded and proved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Queue {
    /// Jobs that are being recorded or proved.
    pub recording: usize,
    /// Jobs that wait for their turn.
    pub waiting: usize,
    /// How long ago the oldest job that is not over was submitted.
    pub oldest: Option<Duration>,
    /// Comparisons of layers with their blob or directory that are not done yet.
    pub verifying: usize,
}

/// A job, and its number among the jobs that are not over.
pub(super) struct Submitted {
    /// Boxed: the queues take the room for all that may wait at once.
    pub(super) job: Box<RecordRequest>,
    pub(super) ticket: u64,
}

/// What the recorder's thread does besides containers' jobs, in order.
pub(super) enum Request {
    Record(Submitted),
    Remove { chain_id: ChainId, done: Answer<()> },
    Prune { done: Answer<Collected> },
    SetNames { endpoint: String, listed: Vec<(ImageName, ChainId)> },
    ImageRemoved { namespace: String, name: String },
    Collect { in_use: HashSet<ChainId> },
}

/// Refuses a request that will not be carried out.
pub(super) fn refuse(request: Request, reason: &str) {
    match request {
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

/// A handle to the recorder's threads.
#[derive(Clone)]
pub struct Recorder {
    pub(super) shared: Arc<Shared>,
}

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recorder({} pending)", self.pending())
    }
}

/// What the handles and the recorder's thread share.
pub(super) struct Shared {
    pub(super) store: Arc<Store>,
    pub(super) health: Arc<Health>,
    pub(super) urgent: Sender<Submitted>,
    pub(super) requests: Sender<Request>,
    pub(super) agenda: Arc<Agenda>,
    pub(super) urgency: Arc<Urgency>,
    pub(super) jobs: Jobs,
    /// Chains whose jobs found the queue full, with the reason; the thread reports them.
    pub(super) turned_away: Mutex<HashMap<ChainId, String>>,
    pub(super) interruption: Interruption,
    /// Nothing is ever sent. Dropping it ends the threads' waiting.
    pub(super) running: Mutex<Option<Sender<Infallible>>>,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Recorder {
    /// Requests a baseline. A [`BaselineEvent`](crate::baseline::BaselineEvent) and `done`
    /// report the result. The event is sent also if the chain was recorded before.
    pub fn submit(&self, job: RecordRequest) {
        let ticket = self.shared.jobs.add();
        let job = Submitted { job: Box::new(job), ticket };
        let refused = if job.job.container.is_some() {
            let needed: Vec<LayerId> = job.job.layers.iter().map(|layer| layer.id).collect();
            self.shared.urgency.raise();
            let sent = self.shared.urgent.try_send(job);
            self.shared.interruption.interrupt_for(&needed);
            sent.err().map(|err| (is_full(&err), err.into_inner()))
        } else {
            let sent = self.shared.requests.try_send(Request::Record(job));
            sent.err().and_then(|err| match (is_full(&err), err.into_inner()) {
                (full, Request::Record(job)) => Some((full, job)),
                (_, _) => None,
            })
        };
        let Some((full, Submitted { job, ticket })) = refused else { return };
        self.shared.jobs.withdraw(ticket);
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

    /// The layers of a stack, bottom first, that would have to be read.
    pub fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        let store = &self.shared.store;
        let missing = |(place, id): (usize, &LayerId)| {
            (!store.has_layer_for(*id, place == 0).unwrap_or(false)).then_some(*id)
        };
        layers.iter().enumerate().filter_map(missing).collect()
    }

    /// Sets all images that one socket of containerd has now.
    pub fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        self.send(Request::SetNames { endpoint: endpoint.to_owned(), listed });
    }

    /// An image was removed. Its baseline stays while it is in use.
    pub fn image_removed(&self, namespace: &str, name: &str) {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.send(Request::ImageRemoved { namespace, name });
    }

    /// Removes the baselines that have had no name and no container for the retention
    /// period.
    pub fn collect(&self, in_use: HashSet<ChainId>) {
        self.send(Request::Collect { in_use });
    }

    /// Sends a request that the caller repeats anyway, if it is lost now.
    fn send(&self, request: Request) {
        if self.shared.requests.try_send(request).is_err() {
            // The next list of images or the next collection makes up for it.
            tracing::warn!("the recorder is too busy to keep the names of images up to date");
        }
    }

    /// Removes one image's baseline. Refused while a container uses it.
    pub fn remove(&self, chain_id: ChainId, done: Answer<()>) {
        self.send_or_refuse(Request::Remove { chain_id, done });
    }

    /// Removes at once what [`collect`](Recorder::collect) would remove after the
    /// retention period.
    pub fn prune(&self, done: Answer<Collected>) {
        self.send_or_refuse(Request::Prune { done });
    }

    fn send_or_refuse(&self, request: Request) {
        if let Err(err) = self.shared.requests.try_send(request) {
            let busy = "the recorder is too busy; try again later";
            let reason = if is_full(&err) { busy } else { STOPPING };
            refuse(err.into_inner(), reason);
        }
    }

    /// How many jobs are not over.
    pub fn pending(&self) -> usize {
        self.shared.jobs.len()
    }

    pub fn queue(&self) -> Queue {
        Queue { verifying: self.shared.agenda.len(), ..self.shared.jobs.queue() }
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// Ends the threads, in the middle of a layer if need be, and waits for them.
    pub fn stop(self) {
        self.shared.interruption.stop();
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

/// The jobs that are not over.
#[derive(Default)]
pub(super) struct Jobs {
    /// When each was submitted, by ticket and so in order of submission.
    unfinished: Mutex<BTreeMap<u64, Instant>>,
    submitted: AtomicU64,
    recording: AtomicUsize,
}

impl Jobs {
    /// Adds a job that waits, and returns its ticket.
    pub(super) fn add(&self) -> u64 {
        let ticket = self.submitted.fetch_add(1, Ordering::Relaxed);
        lock(&self.unfinished).insert(ticket, Instant::now());
        ticket
    }

    /// Removes a job that was refused before its turn.
    fn withdraw(&self, ticket: u64) {
        lock(&self.unfinished).remove(&ticket);
    }

    /// A job's turn has come.
    pub(super) fn begin(&self) {
        self.recording.fetch_add(1, Ordering::Relaxed);
    }

    /// A job that had its turn is over.
    pub(super) fn finish(&self, ticket: u64) {
        lock(&self.unfinished).remove(&ticket);
        self.recording.fetch_sub(1, Ordering::Relaxed);
    }

    pub(super) fn clear(&self) {
        lock(&self.unfinished).clear();
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.unfinished).len()
    }

    fn queue(&self) -> Queue {
        let unfinished = lock(&self.unfinished);
        let recording = self.recording.load(Ordering::Relaxed).min(unfinished.len());
        Queue {
            recording,
            waiting: unfinished.len() - recording,
            oldest: unfinished.values().next().map(Instant::elapsed),
            verifying: 0,
        }
    }
}

/// Ends the reading of a layer early: because the daemon stops, or for a container.
#[derive(Default)]
pub(super) struct Interruption {
    /// The layer that is being recorded, if that may be interrupted.
    current: Mutex<Option<LayerId>>,
    interrupted: AtomicBool,
    stopped: AtomicBool,
}

impl Interruption {
    /// Interrupts the recording of a layer that a container does not need.
    fn interrupt_for(&self, needed: &[LayerId]) {
        let current = lock(&self.current);
        if current.is_some_and(|current| !needed.contains(&current)) {
            self.interrupted.store(true, Ordering::Relaxed);
        }
    }

    /// Sets the layer that may be interrupted for containers from now on; `None`: what is
    /// read from now on may not be.
    pub(super) fn set_current(&self, layer: Option<LayerId>) {
        let mut current = lock(&self.current);
        *current = layer;
        // An interruption was for the layer before, unless the daemon stops.
        self.interrupted.store(self.is_stopped(), Ordering::Relaxed);
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        let _current = lock(&self.current);
        self.interrupted.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Set while the reading must end.
    pub(super) fn flag(&self) -> &AtomicBool {
        &self.interrupted
    }
}

fn is_full<T>(err: &TrySendError<T>) -> bool {
    match err {
        TrySendError::Full(_) => true,
        TrySendError::Disconnected(_) => false,
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that can panic runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
