//! Layers are compared with what proves them: their blobs, and the directories
//! that containers use.
//!
//! One thread does it, in the background: it starts nothing while layers are
//! recorded, and reads no further in a blob either. What somebody asked for goes
//! first. It only reads; the recorder's thread keeps what comes out.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, select};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};

use super::compare::{Comparison, compare};
use super::proof::may_be_implied;
use super::recorder::in_full;
use super::store::Store;
use super::stream::{self, Limits};
use super::urgency::{Urgency, hashing_pool};
use super::walk::{Rate, Reading, Unchanged, walk_to};
use super::{Blobs, ImageBaseline, LayerBaseline, LayerDifference, LayerEntry, Progress};
use crate::config;
use crate::model::{Blake3Hash, Blob, FileTime, Layer, LayerId, RootfsPath, printable};
use crate::sys::priority::{self, Disk};

/// One comparison to be made.
#[derive(Clone)]
pub(super) struct Task {
    pub layer: Layer,
    /// The layers below it, bottom first.
    pub below: Vec<LayerId>,
    pub what: What,
    /// Of the job that waits for it; nobody waits for what is done by itself.
    pub ticket: Option<u64>,
    pub progress: Option<Arc<Progress>>,
}

/// What a layer's baseline is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// The blob that the layer names.
    Blob,
    /// All of a directory.
    Directory(PathBuf),
    /// What has changed in a directory since it was equal.
    Changes { directory: PathBuf, since: FileTime },
    /// All of a directory, at the rate of the settings.
    Again(PathBuf),
}

impl Task {
    fn class(&self) -> usize {
        match self.what {
            _ if self.ticket.is_some() => ASKED,
            What::Changes { .. } => 1,
            What::Directory(_) => 2,
            What::Blob => 3,
            What::Again(_) => AGAIN,
        }
    }

    fn bottom(&self) -> bool {
        self.below.is_empty()
    }
}

/// The classes of tasks, the most urgent first.
const CLASSES: usize = 5;
const ASKED: usize = 0;
const AGAIN: usize = CLASSES - 1;

/// What came of a task.
pub(super) struct Outcome {
    pub task: Task,
    /// Before anything was looked at.
    pub started: Timestamp,
    /// The checksum of the layer's file that was compared.
    pub against: Option<Blake3Hash>,
    pub found: Found,
}

pub(super) enum Found {
    /// The blob is what the digests say. `differences` are those of what was
    /// recorded from what the blob leads one to expect.
    Proved {
        differences: Vec<LayerDifference>,
        total: u64,
        entries: Vec<LayerEntry>,
    },
    NotProved(Unproved),
    Compared {
        differences: Vec<LayerDifference>,
        total: u64,
        newest_change: FileTime,
    },
    NotCompared(String),
}

/// Why a blob proves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unproved {
    /// It is not there, or cannot be read. No error: many nodes keep no blobs.
    Unavailable(String),
    /// It is not what the manifest or the image's config says.
    Wrong(String),
    /// It is what its digest says, and no layer that can be understood.
    Unreadable(String),
    Stopped,
}

impl Unproved {
    pub(super) fn reason(&self) -> &str {
        match self {
            Unproved::Unavailable(reason)
            | Unproved::Wrong(reason)
            | Unproved::Unreadable(reason) => reason,
            Unproved::Stopped => "driftd is being stopped",
        }
    }
}

/// Why there is no blob of a layer of which nobody has seen one.
pub(super) const NO_BLOB: &str = "containerd's content store did not have its blob when it was looked for (discard_unpacked_layers removes blobs, and foreign layers have none)";

// ---- blobs

/// What a layer's blob says the layer holds, if the digests prove it.
pub(super) fn unpack(
    blobs: &dyn Blobs,
    layer: &Layer,
    below: Option<&ImageBaseline>,
    limits: &Limits,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Unpacked, Unproved> {
    let blob = layer.blob.as_ref().ok_or_else(|| Unproved::Unavailable(NO_BLOB.into()))?;
    let LayerId::Diff(diff_id) = layer.id else {
        let reason = "nobody can tell its diff ID any more: the image's config is gone";
        return Err(Unproved::Unavailable(reason.into()));
    };
    let media_type = printable(blob.media_type.as_bytes());
    if blob.media_type.ends_with("+encrypted") {
        return Err(Unproved::Unavailable(format!("its blob is encrypted ({media_type})")));
    }
    let open = || {
        let opened = blobs.open(blob).map_err(|reason| {
            Unproved::Unavailable(if is_foreign(&blob.media_type) {
                format!(
                    "it is a foreign layer ({media_type}), whose blob is kept elsewhere: {reason}"
                )
            } else {
                reason
            })
        })?;
        // More than the manifest says is not what its digest is of.
        Ok(Stoppable { inner: opened, stop }.take(blob.size.saturating_add(1)))
    };
    let read = stream::read(open()?, limits, progress, stop);
    if stop.load(Ordering::Relaxed) {
        return Err(Unproved::Stopped);
    }
    let digest = printable(blob.digest.as_bytes());
    let stream = match read {
        Ok(stream) => stream,
        Err(err) => {
            // Why it makes no sense: because it is not what was pulled, perhaps.
            let actual = sha256_of(open()?).map_err(|err| {
                Unproved::Unavailable(format!("its blob {digest} cannot be read: {err}"))
            });
            if stop.load(Ordering::Relaxed) {
                return Err(Unproved::Stopped);
            }
            let actual = actual?;
            check_digest(blob, actual)?;
            return Err(Unproved::Unreadable(format!("its blob {digest}: {}", in_full(&err))));
        }
    };
    check_digest(blob, stream.blob_sha256)?;
    if stream.diff_id != diff_id {
        return Err(Unproved::Wrong(format!(
            "its blob {digest} unpacks to {}, not to the diff ID that the image's config says",
            stream.diff_id
        )));
    }
    let unreadable =
        |err: stream::Error| Unproved::Unreadable(format!("its blob {digest}: {}", in_full(&err)));
    let implied = stream.implied().map_err(unreadable)?;
    Ok(Unpacked { entries: stream.settle(below).map_err(unreadable)?, implied })
}

/// What a blob holds.
pub(super) struct Unpacked {
    /// In no order.
    pub(super) entries: Vec<LayerEntry>,
    /// Directories that the archive does not name.
    implied: HashSet<RootfsPath>,
}

/// Ends with an error, however slowly what it reads comes in.
struct Stoppable<'a> {
    inner: Box<dyn Read + Send>,
    stop: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped"));
        }
        self.inner.read(buffer)
    }
}

fn check_digest(blob: &Blob, actual: [u8; 32]) -> Result<(), Unproved> {
    let expected = &blob.digest;
    let digest = printable(expected.as_bytes());
    if !expected.starts_with("sha256:") {
        let reason = format!("the digest of its blob is no SHA-256 ({digest})");
        return Err(Unproved::Unavailable(reason));
    }
    let actual = crate::model::ManifestDigest(actual).to_string();
    if actual == *expected {
        return Ok(());
    }
    Err(Unproved::Wrong(format!(
        "its blob {digest} in the content store of {} (namespace {}) has the digest {actual}: it is damaged, or somebody changed it",
        printable(blob.endpoint.as_bytes()),
        printable(blob.namespace.as_bytes()),
    )))
}

fn sha256_of(mut blob: impl Read) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(length) => hasher.update(&buffer[..length]),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => (),
            Err(err) => return Err(err),
        }
    }
}

/// Layers that registries did not pass on (OCI calls them non-distributable).
fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

/// Without what only the stack of layers explains, if it is another stack.
pub(super) fn of_the_layer(
    (mut differences, mut total): (Vec<LayerDifference>, u64),
    same_stack: bool,
) -> (Vec<LayerDifference>, u64) {
    if !same_stack {
        let all = differences.len();
        differences.retain(|difference| !may_be_implied(difference));
        total = total.saturating_sub((all - differences.len()) as u64);
    }
    (differences, total)
}

// ---- what is to be done

/// What the verifier has to do, and when it may.
#[derive(Default)]
pub(super) struct Agenda {
    state: Mutex<State>,
    changed: Condvar,
    /// Ends the comparison at hand: for good, or because something else is more
    /// urgent.
    interrupt: AtomicBool,
}

#[derive(Default)]
struct State {
    tasks: [VecDeque<Task>; CLASSES],
    /// What is being done.
    current: Option<Task>,
    /// How many recordings are going on.
    recordings: usize,
    stopped: bool,
}

impl Agenda {
    /// Adds a task, unless it is there.
    pub(super) fn add(&self, task: Task) {
        let mut state = self.state();
        let class = task.class();
        let is_it = |other: &Task| {
            (&other.layer.id, other.layer.chain_id, &other.what, other.ticket)
                == (&task.layer.id, task.layer.chain_id, &task.what, task.ticket)
        };
        if state.current.iter().chain(&state.tasks[class]).any(is_it) {
            return;
        }
        let current = state.current.as_ref().map(Task::class);
        if current.is_some_and(|current| match class {
            ASKED => current != ASKED,
            _ => current == AGAIN && class < AGAIN,
        }) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        state.tasks[class].push_back(task);
        self.changed.notify_all();
    }

    /// Adds a task that has to be done once more.
    pub(super) fn add_again(&self, task: Task) {
        self.state().tasks[task.class()].push_back(task);
        self.changed.notify_all();
    }

    /// How many layers are to be compared, the one at hand included.
    pub(super) fn len(&self) -> usize {
        let state = self.state();
        state.tasks.iter().map(VecDeque::len).sum::<usize>() + usize::from(state.current.is_some())
    }

    pub(super) fn recording_begins(&self) {
        self.state().recordings += 1;
    }

    pub(super) fn recording_ends(&self) {
        self.state().recordings -= 1;
        self.changed.notify_all();
    }

    pub(super) fn stop(&self) {
        self.state().stopped = true;
        self.interrupt.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// The next task, when it may be done; `None` when all is over.
    fn next(&self) -> Option<Task> {
        let mut state = self.state();
        loop {
            if state.stopped {
                return None;
            }
            let classes = if state.recordings == 0 { CLASSES } else { ASKED + 1 };
            if let Some(task) = state.tasks[..classes].iter_mut().find_map(VecDeque::pop_front) {
                self.interrupt.store(false, Ordering::Relaxed);
                state.current = Some(task.clone());
                return Some(task);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The task at hand was interrupted: it is the next of its class.
    fn put_back(&self, task: Task) {
        let mut state = self.state();
        state.current = None;
        state.tasks[task.class()].push_front(task);
    }

    /// The task at hand is over.
    fn done(&self) {
        self.state().current = None;
    }

    /// Waits while layers are recorded, unless somebody waits for the task.
    fn give_way(&self) -> io::Result<()> {
        let mut state = self.state();
        loop {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
            let asked = state.current.as_ref().is_some_and(|task| task.ticket.is_some());
            if asked || state.recordings == 0 {
                return Ok(());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Agenda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Agenda({} tasks)", self.len())
    }
}

/// Blobs whose readers give way to recordings.
struct Patient {
    blobs: Arc<dyn Blobs>,
    agenda: Arc<Agenda>,
}

impl Blobs for Patient {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        let inner = self.blobs.open(blob)?;
        Ok(Box::new(GivesWay { inner, agenda: Arc::clone(&self.agenda) }))
    }
}

struct GivesWay {
    inner: Box<dyn Read + Send>,
    agenda: Arc<Agenda>,
}

impl Read for GivesWay {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.agenda.give_way()?;
        self.inner.read(buffer)
    }
}

// ---- the thread

/// How much less urgent than all other work what nobody waits for is.
const IDLE: i32 = 19;

/// The same for what somebody waits for.
const NICE: i32 = 10;

pub(super) struct Verifier {
    agenda: Arc<Agenda>,
    store: Arc<Store>,
    blobs: Patient,
    threads: usize,
    limits: Limits,
    rate: Rate,
    outcomes: Sender<Outcome>,
    stopped: Receiver<std::convert::Infallible>,
}

impl Verifier {
    pub(super) fn new(
        agenda: Arc<Agenda>,
        store: Arc<Store>,
        blobs: Arc<dyn Blobs>,
        settings: &config::Baseline,
        outcomes: Sender<Outcome>,
        stopped: Receiver<std::convert::Infallible>,
    ) -> Verifier {
        let rate = NonZeroU64::new(settings.recheck_rate).unwrap_or(NonZeroU64::MIN);
        Verifier {
            blobs: Patient { blobs, agenda: Arc::clone(&agenda) },
            agenda,
            store,
            threads: settings.threads,
            limits: limits(settings),
            rate: Rate::new(rate),
            outcomes,
            stopped,
        }
    }

    pub(super) fn run(self) {
        while let Some(task) = self.agenda.next() {
            let (nice, disk) =
                if task.ticket.is_some() { (NICE, Disk::Usual) } else { (IDLE, Disk::Idle) };
            // Best effort: at another priority the answer is the same.
            let _ = priority::set(priority::current(), nice, disk);
            let started = Timestamp::now();
            let (against, found) = self.compare(&task);
            if self.agenda.interrupt.load(Ordering::Relaxed) && !is_complete(&found) {
                self.agenda.put_back(task);
                continue;
            }
            let outcome = Outcome { task, started, against, found };
            // What is known of it has to be kept before the agenda forgets it.
            select! {
                send(self.outcomes, outcome) -> _ => (),
                recv(self.stopped) -> _ => return,
            }
            self.agenda.done();
        }
    }

    fn compare(&self, task: &Task) -> (Option<Blake3Hash>, Found) {
        let layer = match self.store.layer(task.layer.id) {
            Ok(Some(layer)) => layer,
            Ok(None) => return (None, Found::NotCompared("it is not recorded any more".into())),
            Err(err) => return (None, Found::NotCompared(in_full(&err))),
        };
        let found = match &task.what {
            What::Blob => match self.blob(task, &layer) {
                Ok(found) => found,
                Err(unproved) => Found::NotProved(unproved),
            },
            What::Directory(directory) => self.directory(task, &layer, directory, None, None),
            What::Changes { directory, since } => {
                self.directory(task, &layer, directory, Some(*since), None)
            }
            What::Again(directory) => {
                self.directory(task, &layer, directory, None, Some(&self.rate))
            }
        };
        (Some(layer.checksum()), found)
    }

    fn blob(&self, task: &Task, layer: &LayerBaseline) -> Result<Found, Unproved> {
        // Only its tree is asked for; under which name does not matter.
        let below = match self.store.stack(task.layer.chain_id, &task.below) {
            Ok(Some(below)) => below,
            Ok(None) => {
                return Err(Unproved::Unavailable("a layer below it is not recorded".into()));
            }
            Err(err) => return Err(Unproved::Unavailable(in_full(&err))),
        };
        let Unpacked { entries, implied } = unpack(
            &self.blobs,
            &task.layer,
            (!task.bottom()).then_some(&below),
            &self.limits,
            task.progress.as_deref(),
            &self.agenda.interrupt,
        )?;
        let compared = compare(layer, &entries, task.bottom());
        let (mut differences, mut total) = of_the_layer(compared, self.in_its_stack(task));
        // Unpackers do not agree on them: containerd takes them from the layers below,
        // or cannot where it unpacks the layers of an image side by side.
        let all = differences.len();
        differences.retain(|difference| {
            !(may_be_implied(difference) && implied.contains(&difference.path))
        });
        total = total.saturating_sub((all - differences.len()) as u64);
        for LayerDifference { expected, found, .. } in &mut differences {
            std::mem::swap(expected, found);
        }
        Ok(Found::Proved { differences, total, entries })
    }

    fn directory(
        &self,
        task: &Task,
        layer: &LayerBaseline,
        directory: &Path,
        since: Option<FileTime>,
        rate: Option<&Rate>,
    ) -> Found {
        let threads = if task.ticket.is_some() { self.threads } else { 1 };
        let pool = match hashing_pool(threads, &Arc::new(Urgency::default())) {
            Ok(pool) => pool,
            Err(err) => return Found::NotCompared(in_full(&err)),
        };
        let reading = Reading { unchanged: since.map(|since| Unchanged { layer, since }), rate };
        let mut comparison = Comparison::new(layer, task.bottom());
        let walked = walk_to::<super::walk::Error>(
            &pool,
            directory,
            &reading,
            task.progress.as_deref(),
            &self.agenda.interrupt,
            &mut |entry| {
                comparison.found(&entry);
                Ok(())
            },
        );
        match walked {
            Ok(newest_change) => {
                let same_stack = self.in_its_stack(task);
                let (differences, total) = of_the_layer(comparison.finish(), same_stack);
                Found::Compared { differences, total, newest_change }
            }
            Err(err) => Found::NotCompared(in_full(&err)),
        }
    }

    fn in_its_stack(&self, task: &Task) -> bool {
        let proof = self.store.proof(task.layer.id);
        proof.is_some_and(|proof| proof.recorded_in == task.layer.chain_id)
    }
}

pub(super) fn limits(settings: &config::Baseline) -> Limits {
    Limits { bytes: settings.max_layer_bytes, entries: settings.max_layer_entries }
}

/// Whether the comparison came to its end, however it was interrupted meanwhile.
fn is_complete(found: &Found) -> bool {
    match found {
        Found::Proved { .. } | Found::Compared { .. } => true,
        Found::NotProved(_) | Found::NotCompared(_) => false,
    }
}

#[cfg(test)]
mod tests;
