//! The threads that take evidence, and their queue.
//!
//! They have a low priority among driftd's own threads, and nothing waits for them longer than the
//! deadline of a take. A disk that never answers holds one of them for good; the supervisor leaves
//! them alone, because a new daemon would wait for the same disk.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::draft::{Limits, NO_DISK, NO_TIME};
use super::manifest::summary;
use super::store::{Begun, Store};
use super::take::{Outcome, earlier, take};
use crate::health::{Failure, Health};
use crate::history::Reader;
use crate::respond::{Collector, Frozen, Notes, Patience, Taken, Task};
use crate::sys::priority::{self, Disk};
use crate::threads::{self, Role};

/// How many containers' evidence is taken at the same time.
const THREADS: usize = 8;
/// How many more may wait.
const QUEUE: usize = 64;
/// Below driftd's other threads.
const NICE: i32 = 10;
/// How often it is looked for cases that are too old.
const EXPIRE_AFTER: Duration = Duration::from_secs(600);

type Reply = oneshot::Sender<Result<Taken, String>>;

/// Takes evidence. Clones are handles to the same.
#[derive(Clone)]
pub struct Keeper {
    shared: Arc<Shared>,
    queue: Sender<(Task, Reply)>,
}

struct Shared {
    store: Arc<Store>,
    reader: Reader,
    health: Arc<Health>,
    is_stopping: Arc<AtomicBool>,
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keeper")
    }
}

impl Keeper {
    pub fn start(store: Arc<Store>, reader: Reader, health: &Arc<Health>) -> io::Result<Keeper> {
        let (queue, tasks) = bounded(QUEUE);
        let shared =
            Arc::new(Shared { store, reader, health: health.clone(), is_stopping: Arc::default() });
        for number in 0..THREADS {
            let (shared, tasks) = (shared.clone(), tasks.clone());
            let depth = (number == 0).then(|| threads::depth_of(&tasks));
            let run = move || shared.run(&tasks, number == 0);
            health.threads.spawn("evidence", Role::Unsupervised, depth, run)?;
        }
        Ok(Keeper { shared, queue })
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// Ends what is being taken: what was kept until now is marked as cut.
    pub fn stop(&self) {
        self.shared.is_stopping.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn run(&self, tasks: &Receiver<(Task, Reply)>, expires: bool) {
        // Without the priority, it works all the same.
        let _ = priority::set(priority::current(), NICE, Disk::Usual);
        let mut due = Instant::now();
        loop {
            if expires && due <= Instant::now() {
                self.store.expire(Timestamp::now());
                due = Instant::now() + EXPIRE_AFTER;
            }
            match threads::recv_timeout(tasks, EXPIRE_AFTER) {
                Ok((task, reply)) => {
                    threads::about(&task.request.container);
                    // If it is too late, no client waits any more.
                    let _ = reply.send(self.take(&task));
                }
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn take(&self, task: &Task) -> Result<Taken, String> {
        let until = task.order.until.clone();
        if until.get().is_some_and(|until| until <= Instant::now()) {
            return Err("its turn came after its deadline: other evidence was taken".to_owned());
        }
        let limits = Limits { room: 0, until, is_stopping: self.is_stopping.clone() };
        let begun = self.store.begin(task, &limits).inspect_err(|why| {
            self.lose(Failure::EvidenceRefused, task, why);
        })?;
        let Begun { mut draft, number, before, request } = begun;
        let known = before.as_ref().map(|before| earlier(draft.directory(), before));
        let max_file = self.store.settings().max_file_bytes;
        let outcome =
            take(&mut draft, task, &self.reader, number, max_file, known.unwrap_or_default());
        let Outcome { counts, cut } = outcome;
        if let Some(why) = cut.iter().find(|why| [NO_DISK, NO_TIME].contains(&why.as_str())) {
            self.lose(Failure::EvidenceCut, task, why);
        }
        let begun = Begun { draft, number, before, request };
        let finished = self.store.end(begun, counts, cut.clone()).inspect_err(|why| {
            self.lose(Failure::EvidenceFailed, task, why);
        })?;
        self.health.end(Failure::EvidenceFailed);
        let case = task.order.case;
        let message = format!("case {case}: {}", summary(&counts, finished.bytes, &cut));
        Ok(Taken { case, digest: finished.digest, message })
    }

    fn lose(&self, failure: Failure, task: &Task, why: &str) {
        let _ = self.health.record(failure);
        let detail = format!("evidence of container {}: {why}", task.request.container);
        tracing::warn!("{detail}");
        self.health.happened(failure, &detail);
    }
}

impl Collector for Keeper {
    fn patience(&self) -> Patience {
        let settings = self.shared.store.settings();
        Patience { deadline: settings.deadline, pause: settings.pause }
    }

    fn take(&self, task: Task) -> oneshot::Receiver<Result<Taken, String>> {
        let (reply, receiver) = oneshot::channel();
        let refused = match self.queue.try_send((task, reply)) {
            Ok(()) => return receiver,
            Err(TrySendError::Full(refused) | TrySendError::Disconnected(refused)) => refused,
        };
        let (task, reply) = refused;
        let why = format!("the evidence of {QUEUE} other containers waits already");
        self.shared.lose(Failure::EvidenceRefused, &task, &why);
        let _ = reply.send(Err(why));
        receiver
    }

    fn is_late(&self) {
        let _ = self.shared.health.record(Failure::EvidenceLate);
        self.shared.health.happened(
            Failure::EvidenceLate,
            "an answer did not wait for evidence that was not complete at its deadline",
        );
    }
}

impl Notes for Keeper {
    fn freezes(&self, frozen: &Frozen) -> io::Result<()> {
        self.shared.store.freezes(frozen)
    }

    fn has_thawed(&self, frozen: &Frozen) {
        self.shared.store.has_thawed(frozen);
    }

    fn left_frozen(&self) -> Vec<Frozen> {
        self.shared.store.left_frozen()
    }
}
