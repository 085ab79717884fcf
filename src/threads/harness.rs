//! All named threads of a daemon: starts them, replaces those that are stuck, and ends them.
//!
//! `supervisor` decides which are stuck. The daemon sets what happens when it must end.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::supervisor::{Found, Role, Sample, State, Supervisor, View};
use super::worker::{Depth, Queue, Run, Worker, lock};
use crate::model::ContainerId;

/// How long the daemon may take to end once a thread has been given up.
const LAST_RESORT: Duration = Duration::from_secs(20);
/// What the supervisor reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The thread makes no progress with its item, which is the container's of `about`.
    Stuck {
        name: &'static str,
        still: Duration,
        is_replaced: bool,
        about: Option<ContainerId>,
    },
    Recovered,
}

/// Items that no thread has taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub what: &'static str,
    pub count: u64,
}

type GiveUp = Box<dyn Fn(String) + Send + Sync>;

/// All named threads of one daemon. Clones are handles to the same.
#[derive(Clone, Default)]
pub struct Threads(Arc<Inner>);

#[derive(Default)]
struct Inner {
    workers: Mutex<Vec<Arc<Worker>>>,
    next: AtomicU64,
    supervisor: Mutex<(Supervisor, Vec<View>)>,
    beats: Arc<AtomicU64>,
    give_up: OnceLock<GiveUp>,
    is_given_up: AtomicBool,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(lock(&self.0.workers).iter().map(|worker| worker.name)).finish()
    }
}

impl Threads {
    /// Starts a thread that no other thread can replace.
    pub fn spawn(
        &self,
        name: &'static str,
        role: Role,
        depth: Option<Depth>,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let queue = depth.map(|depth| Arc::new(Queue { depth, taken: AtomicU64::new(0) }));
        self.start(name, role, queue, None, run)
    }

    /// Starts a thread that takes items from a queue until the queue is closed. While it is
    /// stuck with one item, another thread runs with the same queue.
    pub fn spawn_consumer(
        &self,
        name: &'static str,
        depth: Depth,
        run: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<()> {
        let queue = Arc::new(Queue { depth, taken: AtomicU64::new(0) });
        let run: Run = Arc::new(run);
        self.start(name, Role::Consumer, Some(queue), Some(run.clone()), move || run())
    }

    fn start(
        &self,
        name: &'static str,
        role: Role,
        queue: Option<Arc<Queue>>,
        run: Option<Run>,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let worker = Arc::new(Worker::new(id, name, role, queue, run, State::Busy));
        let own = worker.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || own.work(body))?;
        let mut workers = lock(&self.0.workers);
        let has_ended = |worker: &Worker| worker.is_over.load(Ordering::Acquire);
        workers.retain(|worker| !(has_ended(worker) && worker.is_replaced.load(Ordering::Acquire)));
        workers.push(worker);
        Ok(())
    }

    /// Shows a queue whose items no thread of the harness takes.
    pub fn show_queue(&self, name: &'static str, depth: Depth) {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let queue = Arc::new(Queue { depth, taken: AtomicU64::new(0) });
        let worker = Worker::new(id, name, Role::Unsupervised, Some(queue), None, State::Idle);
        lock(&self.0.workers).push(Arc::new(worker));
    }

    /// Checks all threads, `elapsed` after the last check, and replaces the stuck threads
    /// that can be replaced.
    pub fn supervise(&self, elapsed: Duration) -> Vec<Event> {
        let workers: Vec<Arc<Worker>> = lock(&self.0.workers).clone();
        let alive = workers.iter().filter(|worker| !worker.is_over.load(Ordering::Acquire));
        let samples: Vec<Sample> = alive.map(|worker| worker.sample(elapsed)).collect();
        let (found, views) = {
            let mut supervisor = lock(&self.0.supervisor);
            let (found, views) = supervisor.0.turn(&samples, elapsed);
            supervisor.1.clone_from(&views);
            (found, views)
        };
        let mut events = Vec::new();
        for found in found {
            match found {
                Found::Stuck { id, name, still, is_replaced } => {
                    let Some(worker) = workers.iter().find(|worker| worker.id == id) else {
                        continue;
                    };
                    let about = lock(&worker.about).clone();
                    let is_replaced = is_replaced && self.replace(worker);
                    events.push(Event::Stuck { name, still, is_replaced, about });
                }
                Found::Recovered => events.push(Event::Recovered),
                Found::GivenUp { name, still } => self.give_up(name, still),
            }
        }
        let is_given_up = self.0.is_given_up.load(Ordering::Relaxed);
        if !is_given_up && !views.is_empty() {
            self.0.beats.fetch_add(1, Ordering::Relaxed);
        }
        events
    }

    fn replace(&self, worker: &Worker) -> bool {
        let Some(run) = lock(&worker.run).clone() else { return false };
        let body = run.clone();
        worker.is_replaced.store(true, Ordering::Release);
        let started =
            self.start(worker.name, worker.role, worker.queue.clone(), Some(run), move || body());
        if started.is_err() {
            worker.is_replaced.store(false, Ordering::Release);
        }
        started.is_ok()
    }

    /// Sets the function that is called, once, with the reason for which the daemon has to
    /// end.
    pub fn on_give_up(&self, give_up: impl Fn(String) + Send + Sync + 'static) {
        let _ = self.0.give_up.set(Box::new(give_up));
    }

    fn give_up(&self, name: &'static str, still: Duration) {
        let reason = format!(
            "the thread `{name}` has made no progress for {} s and cannot be replaced",
            still.as_secs()
        );
        tracing::error!(thread = name, "{reason}; driftd ends, to be started again");
        let Some(give_up) = self.0.give_up.get() else { return };
        if self.0.is_given_up.swap(true, Ordering::Relaxed) {
            return;
        }
        give_up(reason);
        // The end in good order may wait for the same thing. No thread joins this one.
        let _ = std::thread::Builder::new().name("last-resort".into()).spawn(|| {
            std::thread::sleep(LAST_RESORT);
            std::process::abort();
        });
    }

    /// The threads as they were at the last check.
    pub fn views(&self) -> Vec<View> {
        lock(&self.0.supervisor).1.clone()
    }

    /// The count of the supervisor's turns, which goes on as long as no thread was given up:
    /// while it grows, the daemon makes progress.
    pub fn beats(&self) -> Arc<AtomicU64> {
        self.0.beats.clone()
    }

    /// From now on these threads are not replaced: they are to end.
    pub fn begin_end(&self, names: &[&'static str]) {
        for worker in lock(&self.0.workers).iter().filter(|worker| names.contains(&worker.name)) {
            drop(lock(&worker.run).take());
        }
    }

    /// Waits until no thread of these names runs any more. Returns the names of those that
    /// still run at the deadline.
    pub fn wait_for_end(&self, names: &[&'static str], deadline: Instant) -> Vec<&'static str> {
        loop {
            let mut running: Vec<&'static str> = lock(&self.0.workers)
                .iter()
                .filter(|worker| {
                    names.contains(&worker.name) && !worker.is_over.load(Ordering::Acquire)
                })
                .map(|worker| worker.name)
                .collect();
            running.dedup();
            if running.is_empty() || Instant::now() >= deadline {
                return running;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// What waits in the queues of these threads.
    pub fn left(&self, names: &[&'static str]) -> Vec<Left> {
        let mut left: Vec<Left> = Vec::new();
        for worker in lock(&self.0.workers).iter().filter(|worker| names.contains(&worker.name)) {
            let Some(queue) = &worker.queue else { continue };
            let count = (queue.depth)() as u64;
            if count > 0 && !left.iter().any(|left| left.what == worker.name) {
                left.push(Left { what: worker.name, count });
            }
        }
        left
    }

    /// Forgets these threads, and releases their queues.
    pub fn forget(&self, names: &[&'static str]) {
        lock(&self.0.workers).retain(|worker| !names.contains(&worker.name));
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::{Receiver, bounded, unbounded};

    use super::super::supervisor::{STUCK, TURN};
    use super::super::worker::{depth_of, recv};
    use super::*;

    #[test]
    fn a_thread_that_spins_is_not_starved() {
        // It is always ready to run, and it does run.
        let threads = Threads::default();
        let end = Arc::new(AtomicBool::new(false));
        let ends = end.clone();
        let spin = move || while !ends.load(Ordering::Relaxed) {};
        threads.spawn("spins", Role::Owner, None, spin).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let is_moving = || {
            let workers = lock(&threads.0.workers);
            workers[0].is_starved(1, Duration::ZERO);
            !workers[0].is_starved(1, Duration::from_nanos(10))
        };
        while !is_moving() {
            assert!(Instant::now() < deadline);
        }
        end.store(true, Ordering::Relaxed);
    }

    #[test]
    fn x02_a_replacement_takes_the_rest_of_the_queue_and_the_stuck_one_ends_when_it_is_back() {
        let threads = Threads::default();
        let (items, queue) = unbounded::<Receiver<()>>();
        let (done, results) = unbounded();
        let (release, hangs) = bounded::<()>(0);
        let taken = queue.clone();
        threads
            .spawn_consumer("test", depth_of(&queue), move || {
                while let Ok(item) = recv(&taken) {
                    let _ = item.recv();
                    done.send(std::thread::current().id()).unwrap();
                }
            })
            .unwrap();
        let (_, at_once) = bounded(0);
        items.send(hangs).unwrap();
        items.send(at_once.clone()).unwrap();
        let mut events = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        while results.is_empty() && Instant::now() < deadline {
            events.extend(threads.supervise(Duration::from_secs(1)));
            std::thread::sleep(Duration::from_millis(1));
        }
        let still = STUCK;
        let stuck = Event::Stuck { name: "test", still, is_replaced: true, about: None };
        assert_eq!(events, [stuck]);
        let replacement = results.recv_timeout(Duration::from_secs(10)).unwrap();
        // Its result is taken, and then it ends.
        drop(release);
        let first = results.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_ne!(first, replacement);
        items.send(at_once).unwrap();
        assert_eq!(results.recv_timeout(Duration::from_secs(10)), Ok(replacement));
        while !events.contains(&Event::Recovered) && Instant::now() < deadline {
            events.extend(threads.supervise(TURN));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(events.last(), Some(&Event::Recovered));
        drop(items);
        threads.begin_end(&["test"]);
        let running = threads.wait_for_end(&["test"], deadline);
        assert_eq!(running, [""; 0]);
    }

    #[test]
    fn the_daemon_makes_progress_until_a_thread_is_given_up() {
        let threads = Threads::default();
        let (send, reasons) = unbounded();
        // In a test the process goes on.
        threads.0.is_given_up.store(false, Ordering::Relaxed);
        threads.on_give_up(move |reason| send.send(reason).unwrap());
        let beats = threads.beats();
        let beats = || beats.load(Ordering::Relaxed);
        let (end, ends) = bounded::<()>(0);
        threads.spawn("test", Role::Owner, None, move || assert!(ends.recv().is_err())).unwrap();
        threads.supervise(TURN);
        assert_eq!(beats(), 1);
        // The daemon's end is the test's: the last resort is not waited for.
        threads.0.is_given_up.store(true, Ordering::Relaxed);
        for _ in 0..30 {
            threads.supervise(Duration::from_secs(1));
        }
        let last = beats();
        threads.supervise(TURN);
        assert_eq!(beats(), last);
        assert!(reasons.is_empty());
        drop(end);
    }
}
