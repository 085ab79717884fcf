//! The verifier's thread: makes one comparison after the other, and sends the results to
//! the recorder's thread. It only reads.

use std::convert::Infallible;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, select};
use jiff::Timestamp;

use super::agenda::Agenda;
use super::blob::{Unpacked, limits, unpack, without_implied};
use super::task::{ComparedWith, Outcome, Task, TaskResult, Unproved};
use crate::baseline::causes::with_causes;
use crate::baseline::compare::{Comparison, compare};
use crate::baseline::layer::LayerBaseline;
use crate::baseline::proof::may_be_implied;
use crate::baseline::store::Store;
use crate::baseline::stream::Limits;
use crate::baseline::types::{Blobs, LayerDifference};
use crate::baseline::urgency::{Urgency, hashing_pool};
use crate::baseline::walk::{self, Rate, Reading, Unchanged, walk_to};
use crate::config;
use crate::model::{Blake3Hash, Blob, FileTime};
use crate::sys::priority::{self, Disk};

/// Blobs whose readers wait while layers are recorded.
struct YieldingBlobs {
    blobs: Arc<dyn Blobs>,
    agenda: Arc<Agenda>,
}

impl Blobs for YieldingBlobs {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        let inner = self.blobs.open(blob)?;
        Ok(Box::new(YieldingReader { inner, agenda: Arc::clone(&self.agenda) }))
    }
}

struct YieldingReader {
    inner: Box<dyn Read + Send>,
    agenda: Arc<Agenda>,
}

impl Read for YieldingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.agenda.wait_for_recordings()?;
        self.inner.read(buffer)
    }
}

/// The nice value of comparisons that no job waits for.
const IDLE: i32 = 19;

/// The nice value of comparisons that a job waits for.
const NICE: i32 = 10;

pub(crate) struct Verifier {
    agenda: Arc<Agenda>,
    store: Arc<Store>,
    blobs: YieldingBlobs,
    threads: usize,
    limits: Limits,
    rate: Rate,
    outcomes: Sender<Outcome>,
    stopped: Receiver<Infallible>,
}

impl Verifier {
    pub(crate) fn new(
        agenda: Arc<Agenda>,
        store: Arc<Store>,
        blobs: Arc<dyn Blobs>,
        settings: &config::Baseline,
        outcomes: Sender<Outcome>,
        stopped: Receiver<Infallible>,
    ) -> Verifier {
        let rate = NonZeroU64::new(settings.recheck_rate).unwrap_or(NonZeroU64::MIN);
        Verifier {
            blobs: YieldingBlobs { blobs, agenda: Arc::clone(&agenda) },
            agenda,
            store,
            threads: settings.threads,
            limits: limits(settings),
            rate: Rate::new(rate),
            outcomes,
            stopped,
        }
    }

    pub(crate) fn run(self) {
        while let Some(task) = self.agenda.next() {
            let (nice, disk) =
                if task.ticket.is_some() { (NICE, Disk::Usual) } else { (IDLE, Disk::Idle) };
            // Best effort: the result is the same at another priority.
            let _ = priority::set(priority::current(), nice, disk);
            let started = Timestamp::now();
            let (against, result) = self.compare(&task);
            if self.agenda.interrupt.load(Ordering::Relaxed) && !is_complete(&result) {
                self.agenda.put_back(task);
                continue;
            }
            let outcome = Outcome { task, started, against, result };
            // The recorder must keep the result before the task leaves the agenda: else the
            // same task could be added again.
            select! {
                send(self.outcomes, outcome) -> _ => (),
                recv(self.stopped) -> _ => return,
            }
            self.agenda.done();
        }
    }

    fn compare(&self, task: &Task) -> (Option<Blake3Hash>, TaskResult) {
        let layer = match self.store.layer(task.layer.id) {
            Ok(Some(layer)) => layer,
            Ok(None) => {
                return (None, TaskResult::NotCompared("it is not recorded any more".into()));
            }
            Err(err) => return (None, TaskResult::NotCompared(with_causes(&err))),
        };
        let result = match &task.with {
            ComparedWith::Blob => match self.blob(task, &layer) {
                Ok(proved) => proved,
                Err(unproved) => TaskResult::NotProved(unproved),
            },
            ComparedWith::Directory(directory) => {
                self.directory(task, &layer, directory, None, None)
            }
            ComparedWith::Changes { directory, since } => {
                self.directory(task, &layer, directory, Some(*since), None)
            }
            ComparedWith::Again(directory) => {
                self.directory(task, &layer, directory, None, Some(&self.rate))
            }
        };
        (Some(layer.checksum()), result)
    }

    fn blob(&self, task: &Task, layer: &LayerBaseline) -> Result<TaskResult, Unproved> {
        // Only its tree is used, so its chain ID does not matter.
        let below = match self.store.stack(task.layer.chain_id, &task.below) {
            Ok(Some(below)) => below,
            Ok(None) => {
                return Err(Unproved::Unavailable("a layer below it is not recorded".into()));
            }
            Err(err) => return Err(Unproved::Unavailable(with_causes(&err))),
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
        let (mut differences, mut total) = without_implied(compared, self.in_its_stack(task));
        // Unpackers differ in the owner and mode of implied directories: containerd takes
        // them from the layers below, but cannot when it unpacks an image's layers in
        // parallel.
        let all = differences.len();
        differences.retain(|difference| {
            !(may_be_implied(difference) && implied.contains(&difference.path))
        });
        total = total.saturating_sub((all - differences.len()) as u64);
        for LayerDifference { expected, found, .. } in &mut differences {
            std::mem::swap(expected, found);
        }
        Ok(TaskResult::Proved { differences, total, entries })
    }

    fn directory(
        &self,
        task: &Task,
        layer: &LayerBaseline,
        directory: &Path,
        since: Option<FileTime>,
        rate: Option<&Rate>,
    ) -> TaskResult {
        let threads = if task.ticket.is_some() { self.threads } else { 1 };
        let pool = match hashing_pool(threads, &Arc::new(Urgency::default())) {
            Ok(pool) => pool,
            Err(err) => return TaskResult::NotCompared(with_causes(&err)),
        };
        let reading = Reading { unchanged: since.map(|since| Unchanged { layer, since }), rate };
        let mut comparison = Comparison::new(layer, task.bottom());
        let walked = walk_to::<walk::Error>(
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
                let (differences, total) = without_implied(comparison.finish(), same_stack);
                TaskResult::Compared { differences, total, newest_change }
            }
            Err(err) => TaskResult::NotCompared(with_causes(&err)),
        }
    }

    fn in_its_stack(&self, task: &Task) -> bool {
        let proof = self.store.proof(task.layer.id);
        proof.is_some_and(|proof| proof.recorded_in == task.layer.chain_id)
    }
}

/// Whether the comparison came to its end, although it was interrupted meanwhile.
fn is_complete(result: &TaskResult) -> bool {
    match result {
        TaskResult::Proved { .. } | TaskResult::Compared { .. } => true,
        TaskResult::NotProved(_) | TaskResult::NotCompared(_) => false,
    }
}
