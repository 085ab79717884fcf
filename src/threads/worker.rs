//! One thread of the harness, from its own side: its beats, its state, and how it takes items
//! from its queue. `harness` starts the thread; the functions here are called by it.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError};

use super::supervisor::{Role, STEP, Sample, State};
use crate::model::ContainerId;
use crate::sys::{priority, procfs};

pub(super) type Run = Arc<dyn Fn() + Send + Sync>;

/// How many items wait in a queue.
pub type Depth = Box<dyn Fn() -> usize + Send + Sync>;

/// The depth of a channel, by one of its receivers.
pub fn depth_of<T: Send + 'static>(queue: &Receiver<T>) -> Depth {
    let queue = queue.clone();
    Box::new(move || queue.len())
}

/// A queue, and how many items were ever taken from it.
pub(super) struct Queue {
    pub(super) depth: Depth,
    pub(super) taken: AtomicU64,
}

/// What the harness knows of one thread.
pub(super) struct Worker {
    pub(super) id: u64,
    pub(super) name: &'static str,
    pub(super) role: Role,
    /// How many steps of work it has done, and its [`State`] in the lowest bits.
    turns: AtomicU64,
    /// The container whose item it is busy with, if the item is a container's.
    pub(super) about: Mutex<Option<ContainerId>>,
    pub(super) queue: Option<Arc<Queue>>,
    /// What a replacement runs. `None` once the threads are to end, because it keeps open
    /// the queues that the thread fills.
    pub(super) run: Mutex<Option<Run>>,
    pub(super) is_replaced: AtomicBool,
    pub(super) is_over: AtomicBool,
    /// The kernel's number of the thread, once it runs.
    number: AtomicU32,
    /// Its turns at the last sample, and how much processor time it had used.
    last: Mutex<(u64, Duration)>,
}

thread_local! {
    static OWN: RefCell<Option<Arc<Worker>>> = const { RefCell::new(None) };
}

/// Calls `with` for the current thread, if the harness started it.
fn with_own<T>(with: impl FnOnce(&Worker) -> T) -> Option<T> {
    // While a thread ends, its local variable is gone.
    OWN.try_with(|worker| worker.borrow().as_ref().map(|worker| with(worker))).ok().flatten()
}

/// This thread has done one more step of its work.
pub fn beat() {
    with_own(|worker| worker.turns.fetch_add(STEP, Ordering::Relaxed));
}

/// This thread is busy with an item of this container.
pub fn about(container: &ContainerId) {
    with_own(|worker| *lock(&worker.about) = Some(container.clone()));
    beat();
}

/// This thread is idle while `wait` waits for its next item.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    while_in(State::Idle, wait)
}

/// This thread is blocked while `wait` waits for another thread.
pub fn blocked<T>(wait: impl FnOnce() -> T) -> T {
    while_in(State::Blocked, wait)
}

fn while_in<T>(state: State, wait: impl FnOnce() -> T) -> T {
    // Only the thread itself changes its turns.
    let enter = |state: State| {
        with_own(|worker| {
            let turns = worker.turns.load(Ordering::Relaxed);
            let steps = turns - turns % STEP + STEP;
            worker.turns.store(steps + state as u64, Ordering::Relaxed);
            State::of(turns)
        })
    };
    let before = enter(state);
    let waited = wait();
    if let Some(before) = before {
        enter(before);
    }
    waited
}

/// Whether another thread has replaced this one, which then ends after its item.
pub fn is_replaced() -> bool {
    with_own(|worker| worker.is_replaced.load(Ordering::Acquire)).unwrap_or(false)
}

/// This thread has taken an item from its queue by another way than the functions below.
pub fn took() {
    with_own(|worker| {
        *lock(&worker.about) = None;
        if let Some(queue) = &worker.queue {
            queue.taken.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// Waits for the next item. A replaced thread gets none.
pub fn recv<T>(queue: &Receiver<T>) -> Result<T, RecvError> {
    if is_replaced() {
        return Err(RecvError);
    }
    let item = idle(|| queue.recv())?;
    took();
    Ok(item)
}

/// The same, for at most `timeout`.
pub fn recv_timeout<T>(queue: &Receiver<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    if is_replaced() {
        return Err(RecvTimeoutError::Disconnected);
    }
    let item = idle(|| queue.recv_timeout(timeout))?;
    took();
    Ok(item)
}

/// Takes an item without waiting.
pub fn try_next<T>(queue: &Receiver<T>) -> Option<T> {
    if is_replaced() {
        return None;
    }
    let item = queue.try_recv().ok()?;
    took();
    Some(item)
}

impl Worker {
    pub(super) fn new(
        id: u64,
        name: &'static str,
        role: Role,
        queue: Option<Arc<Queue>>,
        run: Option<Run>,
        state: State,
    ) -> Worker {
        Worker {
            id,
            name,
            role,
            turns: AtomicU64::new(state as u64),
            about: Mutex::default(),
            queue,
            run: Mutex::new(run),
            is_replaced: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            number: AtomicU32::new(0),
            last: Mutex::default(),
        }
    }

    /// Runs `body` as this worker's thread.
    pub(super) fn work(self: Arc<Worker>, body: impl FnOnce()) {
        let _end = End(self.clone());
        self.number.store(priority::current().number(), Ordering::Relaxed);
        OWN.with(|own| *own.borrow_mut() = Some(self));
        body();
    }

    pub(super) fn sample(&self, elapsed: Duration) -> Sample {
        // Read first, so that an item that is put meanwhile does not appear older than it is.
        let taken = self.queue.as_ref().map(|queue| queue.taken.load(Ordering::Relaxed));
        let depth = self.queue.as_ref().map(|queue| (queue.depth)() as u64);
        let turns = self.turns.load(Ordering::Relaxed);
        let mut sample = Sample {
            id: self.id,
            name: self.name,
            role: self.role,
            turns,
            is_replaced: self.is_replaced.load(Ordering::Acquire),
            is_starved: false,
            queue: depth.zip(taken),
        };
        sample.is_starved = sample.is_to_move() && self.is_starved(turns, elapsed);
        sample
    }

    /// Whether it is ready to run and gets hardly any processor time. Reads `/proc` only for
    /// a thread that should make progress and made none.
    pub(super) fn is_starved(&self, turns: u64, elapsed: Duration) -> bool {
        let mut last = lock(&self.last);
        let (turns_before, ran_before) = *last;
        if turns_before != turns || self.role == Role::Unsupervised {
            *last = (turns, Duration::ZERO);
            return false;
        }
        let Some((wants, ran)) = procfs::activity(self.number.load(Ordering::Relaxed)) else {
            return false;
        };
        *last = (turns, ran);
        wants && ran.saturating_sub(ran_before) < elapsed / 10
    }
}

/// Marks a thread's end. A panic ends the process: without one of its threads, driftd would
/// miss events and appear healthy.
struct End(Arc<Worker>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
        self.0.is_over.store(true, Ordering::Release);
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under one of these locks leaves no half-done change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
