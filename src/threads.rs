//! One harness for the named threads: what waits for each of them, whether it makes
//! progress, and what a stop leaves undone.
//!
//! A thread is *idle* while it waits for its next item and *busy* from then on; while it
//! waits for another thread it is *blocked*, and that one is looked at instead. Each step
//! of its work is a beat: an item that is finished, or, in the middle of a long legal one
//! (a large file is hashed, an upper layer is walked), a part of it. A thread that has not
//! beaten for [`STUCK`], and is busy or has items that it does not take, is stuck:
//!
//! - If it does nothing but take items from a queue, another thread takes over that
//!   queue. The stuck one finishes its item if it ever comes back, and ends.
//! - If it owns state, nobody can replace it. After [`Role::patience`] the daemon ends
//!   in good order, with an error, and systemd starts it again.
//! - If it holds a lock that others need, those are stuck too, and their replacements:
//!   then there is nobody left to replace them, and the daemon ends as well.
//!
//! A thread that wants a processor and gets none is not stuck: a container may take what
//! there is of them, and ending the daemon would be what it wants.
//!
//! The time of a machine that was suspended, or of a daemon that was stopped, is nobody's
//! fault: the supervisor counts its own turns and not the clock's seconds.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, RecvTimeoutError};

use crate::model::ContainerId;
use crate::sys::{priority, procfs};

pub mod stop;

/// A thread that has been busy for so long without a beat is stuck.
pub const STUCK: Duration = Duration::from_secs(5);
/// Threads that may be stuck under one name, each with another in its place.
pub const MAX_REPLACED: usize = 3;
/// How often the supervisor looks.
pub const TURN: Duration = Duration::from_millis(250);
/// How long the daemon may take to end once a thread was given up.
const LAST_RESORT: Duration = Duration::from_secs(20);
/// Points of a queue's past that are remembered.
const MAX_POINTS: usize = 256;

/// What is to be done about a thread that is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes items from a queue and owns nothing else.
    Consumer,
    /// It owns state that nobody else has.
    Owner,
    /// It waits for the disk that holds the state directory. A new daemon would wait
    /// for the same disk, so it gets far more time.
    Disk,
    /// Somebody else watches over it.
    Unsupervised,
}

impl Role {
    /// How long one item may take before the daemon ends because of it.
    pub fn patience(self) -> Duration {
        match self {
            Role::Consumer | Role::Owner => Duration::from_secs(20),
            Role::Disk => Duration::from_secs(120),
            Role::Unsupervised => Duration::MAX,
        }
    }
}

type Run = Arc<dyn Fn() + Send + Sync>;

/// How many items wait in a queue.
pub type Depth = Box<dyn Fn() -> usize + Send + Sync>;

/// The depth of a channel, by one of its receivers.
pub fn depth_of<T: Send + 'static>(queue: &Receiver<T>) -> Depth {
    let queue = queue.clone();
    Box::new(move || queue.len())
}

/// A queue, and how many items were ever taken from it.
struct Queue {
    depth: Depth,
    taken: AtomicU64,
}

/// One thread.
struct Seat {
    id: u64,
    name: &'static str,
    role: Role,
    /// How many steps of work it has done, and its [`State`] in the lowest bits.
    turns: AtomicU64,
    /// Whose item it is busy with, if it is a container's.
    about: Mutex<Option<ContainerId>>,
    queue: Option<Arc<Queue>>,
    /// What a replacement runs; gone once the threads are to end, since it holds on to
    /// the queues that the thread itself fills.
    run: Mutex<Option<Run>>,
    is_replaced: AtomicBool,
    is_over: AtomicBool,
    /// Its number, once it runs.
    number: AtomicU32,
    /// Its turns when they were last looked at, and for how long it had run.
    last: Mutex<(u64, Duration)>,
}

/// What a thread does, as the lowest bits of its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Idle = 0,
    Busy = 1,
    Blocked = 2,
}

/// One step, in turns.
const STEP: u64 = 4;

impl State {
    fn of(turns: u64) -> State {
        match turns % STEP {
            0 => State::Idle,
            1 => State::Busy,
            _ => State::Blocked,
        }
    }
}

thread_local! {
    static SEAT: RefCell<Option<Arc<Seat>>> = const { RefCell::new(None) };
}

/// Calls `with` for the thread that runs, if it is one of the harness's.
fn seated<T>(with: impl FnOnce(&Seat) -> T) -> Option<T> {
    // A thread that is ending has no seat any more.
    SEAT.try_with(|seat| seat.borrow().as_ref().map(|seat| with(seat))).ok().flatten()
}

/// One more step of this thread's work is done.
pub fn beat() {
    seated(|seat| seat.turns.fetch_add(STEP, Ordering::Relaxed));
}

/// Says whose item this thread is busy with.
pub fn about(container: &ContainerId) {
    seated(|seat| *lock(&seat.about) = Some(container.clone()));
    beat();
}

/// This thread is idle while `wait` waits for its next item.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    while_in(State::Idle, wait)
}

/// This thread is blocked while `wait` waits for another one.
pub fn blocked<T>(wait: impl FnOnce() -> T) -> T {
    while_in(State::Blocked, wait)
}

fn while_in<T>(state: State, wait: impl FnOnce() -> T) -> T {
    // Nobody else changes a thread's turns.
    let enter = |state: State| {
        seated(|seat| {
            let turns = seat.turns.load(Ordering::Relaxed);
            let steps = turns - turns % STEP + STEP;
            seat.turns.store(steps + state as u64, Ordering::Relaxed);
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

/// Whether another thread has this thread's place: it is to end when its item is done.
pub fn is_replaced() -> bool {
    seated(|seat| seat.is_replaced.load(Ordering::Acquire)).unwrap_or(false)
}

/// An item was taken from this thread's queue by another way than those below.
pub fn took() {
    seated(|seat| {
        *lock(&seat.about) = None;
        if let Some(queue) = &seat.queue {
            queue.taken.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// Waits for the next item. A thread that was replaced gets none.
pub fn recv<T>(queue: &Receiver<T>) -> Result<T, RecvError> {
    if is_replaced() {
        return Err(RecvError);
    }
    let item = idle(|| queue.recv())?;
    took();
    Ok(item)
}

/// The same, for as long as `timeout`.
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

/// A thread as the supervisor sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    pub id: u64,
    pub name: &'static str,
    pub role: Role,
    pub turns: u64,
    pub is_replaced: bool,
    /// It wants a processor and hardly gets one.
    is_starved: bool,
    /// How many items wait in its queue, and how many were ever taken from that.
    pub queue: Option<(u64, u64)>,
}

/// What the supervisor has found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Stuck {
        id: u64,
        name: &'static str,
        still: Duration,
        is_replaced: bool,
    },
    /// No thread is stuck any more.
    Recovered,
    /// Nobody can replace it: the daemon has to end.
    Hopeless {
        name: &'static str,
        still: Duration,
    },
}

/// A thread or a queue, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub name: &'static str,
    /// How many items wait; `None` where there is no queue.
    pub depth: Option<u64>,
    /// For how long the oldest one has waited.
    pub oldest: Duration,
    /// For how long it has been busy without a beat.
    pub still: Duration,
    pub is_stuck: bool,
}

/// Decides by what it sees which threads are stuck. It has no clock and no threads.
#[derive(Debug, Default)]
pub struct Supervisor {
    seen: BTreeMap<u64, Seen>,
    queues: HashMap<&'static str, Past>,
    is_any_stuck: bool,
    now: Duration,
}

#[derive(Debug, Default)]
struct Seen {
    turns: u64,
    still: Duration,
    is_told: bool,
    is_given_up: bool,
}

/// When how many items had ever been put into a queue.
#[derive(Debug, Default)]
struct Past(VecDeque<(Duration, u64)>);

impl Past {
    /// For how long the oldest item has waited, as exactly as the turns are.
    fn oldest(&mut self, depth: u64, taken: u64, now: Duration) -> Duration {
        while self.0.front().is_some_and(|(_, put)| *put <= taken) {
            self.0.pop_front();
        }
        let put = taken + depth;
        if depth > 0
            && self.0.back().is_none_or(|(_, last)| *last < put)
            && self.0.len() < MAX_POINTS
        {
            self.0.push_back((now, put));
        }
        match self.0.front() {
            Some((since, _)) if depth > 0 => now - *since,
            _ => Duration::ZERO,
        }
    }
}

impl Supervisor {
    /// Looks at every thread that has not ended, `elapsed` after the last time.
    pub fn turn(&mut self, threads: &[Look], elapsed: Duration) -> (Vec<Found>, Vec<View>) {
        // A supervisor that did not run itself has not seen anybody fail.
        let elapsed = elapsed.min(4 * TURN);
        self.now += elapsed;
        let mut found = Vec::new();
        let mut views: Vec<View> = Vec::new();
        self.seen.retain(|id, _| threads.iter().any(|look| look.id == *id));
        let mut replaced: HashMap<&str, usize> = HashMap::new();
        for look in threads.iter().filter(|look| look.is_replaced) {
            *replaced.entry(look.name).or_default() += 1;
        }
        for look in threads {
            let seen = self.seen.entry(look.id).or_default();
            let is_to_move = match State::of(look.turns) {
                _ if look.role == Role::Unsupervised => false,
                State::Busy => true,
                State::Blocked => false,
                State::Idle => !look.is_replaced && look.queue.is_some_and(|(depth, _)| depth > 0),
            };
            if is_to_move && seen.turns == look.turns {
                seen.still += if look.is_starved { Duration::ZERO } else { elapsed };
            } else {
                *seen = Seen { turns: look.turns, ..Seen::default() };
            }
            let is_stuck = seen.still >= STUCK;
            if is_stuck && !seen.is_told {
                seen.is_told = true;
                let others = replaced.entry(look.name).or_default();
                let is_replaced = look.role == Role::Consumer && *others < MAX_REPLACED;
                *others += usize::from(is_replaced);
                let Look { id, name, .. } = *look;
                found.push(Found::Stuck { id, name, still: seen.still, is_replaced });
            }
            if seen.still >= look.role.patience() && !look.is_replaced && !seen.is_given_up {
                seen.is_given_up = true;
                found.push(Found::Hopeless { name: look.name, still: seen.still });
            }
            let (depth, oldest) = match look.queue {
                Some((depth, taken)) => {
                    let past = self.queues.entry(look.name).or_default();
                    (Some(depth), past.oldest(depth, taken, self.now))
                }
                None => (None, Duration::ZERO),
            };
            let still = seen.still;
            // A thread and its replacements are one line.
            match views.iter_mut().find(|view| view.name == look.name) {
                Some(view) => {
                    view.still = view.still.max(still);
                    view.is_stuck |= is_stuck;
                }
                None => {
                    views.push(View { name: look.name, depth, oldest, still, is_stuck });
                }
            }
        }
        let is_any_stuck = self.seen.values().any(|seen| seen.is_told);
        if std::mem::replace(&mut self.is_any_stuck, is_any_stuck) && !is_any_stuck {
            found.push(Found::Recovered);
        }
        (found, views)
    }
}

/// What happened to the threads, for whoever supervises them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It does nothing but wait for one item. `about`: whose that is.
    Stuck {
        name: &'static str,
        still: Duration,
        is_replaced: bool,
        about: Option<ContainerId>,
    },
    Recovered,
}

/// Items that nobody has taken.
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
    seats: Mutex<Vec<Arc<Seat>>>,
    next: AtomicU64,
    supervisor: Mutex<(Supervisor, Vec<View>)>,
    beats: Arc<AtomicU64>,
    give_up: OnceLock<GiveUp>,
    is_given_up: AtomicBool,
}

impl fmt::Debug for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(lock(&self.0.seats).iter().map(|seat| seat.name)).finish()
    }
}

impl Threads {
    /// Starts a thread that nobody can replace.
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

    /// Starts a thread that takes items from a queue until there are none any more. It
    /// is started again with the same queue while it is stuck with one item.
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
        let seat = Arc::new(Seat {
            id: self.0.next.fetch_add(1, Ordering::Relaxed),
            name,
            role,
            turns: AtomicU64::new(1),
            about: Mutex::default(),
            queue,
            run: Mutex::new(run),
            is_replaced: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            number: AtomicU32::new(0),
            last: Mutex::default(),
        });
        let own = seat.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            let _end = End(own.clone());
            own.number.store(priority::current().number(), Ordering::Relaxed);
            SEAT.with(|seat| *seat.borrow_mut() = Some(own));
            body();
        })?;
        let mut seats = lock(&self.0.seats);
        let has_ended = |seat: &Seat| seat.is_over.load(Ordering::Acquire);
        seats.retain(|seat| !(has_ended(seat) && seat.is_replaced.load(Ordering::Acquire)));
        seats.push(seat);
        Ok(())
    }

    /// Shows a queue whose items no thread of the harness takes.
    pub fn show_queue(&self, name: &'static str, depth: Depth) {
        let seat = Seat {
            id: self.0.next.fetch_add(1, Ordering::Relaxed),
            name,
            role: Role::Unsupervised,
            turns: AtomicU64::new(0),
            about: Mutex::default(),
            queue: Some(Arc::new(Queue { depth, taken: AtomicU64::new(0) })),
            run: Mutex::default(),
            is_replaced: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            number: AtomicU32::new(0),
            last: Mutex::default(),
        };
        lock(&self.0.seats).push(Arc::new(seat));
    }

    /// Looks at all threads, `elapsed` after the last time, and replaces those that are
    /// stuck and can be replaced.
    pub fn supervise(&self, elapsed: Duration) -> Vec<Event> {
        let seats: Vec<Arc<Seat>> = lock(&self.0.seats).clone();
        let alive = seats.iter().filter(|seat| !seat.is_over.load(Ordering::Acquire));
        let looks: Vec<Look> = alive.map(|seat| seat.look(elapsed)).collect();
        let (found, views) = {
            let mut supervisor = lock(&self.0.supervisor);
            let (found, views) = supervisor.0.turn(&looks, elapsed);
            supervisor.1.clone_from(&views);
            (found, views)
        };
        let mut events = Vec::new();
        for found in found {
            match found {
                Found::Stuck { id, name, still, is_replaced } => {
                    let Some(seat) = seats.iter().find(|seat| seat.id == id) else { continue };
                    let about = lock(&seat.about).clone();
                    let is_replaced = is_replaced && self.replace(seat);
                    events.push(Event::Stuck { name, still, is_replaced, about });
                }
                Found::Recovered => events.push(Event::Recovered),
                Found::Hopeless { name, still } => self.give_up(name, still),
            }
        }
        let is_hopeless = self.0.is_given_up.load(Ordering::Relaxed);
        if !is_hopeless && !views.is_empty() {
            self.0.beats.fetch_add(1, Ordering::Relaxed);
        }
        events
    }

    fn replace(&self, seat: &Seat) -> bool {
        let Some(run) = lock(&seat.run).clone() else { return false };
        let body = run.clone();
        seat.is_replaced.store(true, Ordering::Release);
        let started =
            self.start(seat.name, seat.role, seat.queue.clone(), Some(run), move || body());
        if started.is_err() {
            seat.is_replaced.store(false, Ordering::Release);
        }
        started.is_ok()
    }

    /// Called, once, with the reason for which the daemon has to end.
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
        // The end in good order may wait for the same thing. Nobody joins this thread.
        let _ = std::thread::Builder::new().name("last-resort".into()).spawn(|| {
            std::thread::sleep(LAST_RESORT);
            std::process::abort();
        });
    }

    /// The threads as they were when last looked at.
    pub fn views(&self) -> Vec<View> {
        lock(&self.0.supervisor).1.clone()
    }

    /// Counts the supervisor's turns, as long as no thread is beyond help: while this
    /// moves, the daemon makes progress.
    pub fn beats(&self) -> Arc<AtomicU64> {
        self.0.beats.clone()
    }

    /// From here on these threads are not replaced: they are to end.
    pub fn begin_end(&self, names: &[&'static str]) {
        for seat in lock(&self.0.seats).iter().filter(|seat| names.contains(&seat.name)) {
            drop(lock(&seat.run).take());
        }
    }

    /// Waits until no thread of these names runs any more; hands back those that do.
    pub fn wait_for_end(&self, names: &[&'static str], deadline: Instant) -> Vec<&'static str> {
        loop {
            let mut running: Vec<&'static str> = lock(&self.0.seats)
                .iter()
                .filter(|seat| names.contains(&seat.name) && !seat.is_over.load(Ordering::Acquire))
                .map(|seat| seat.name)
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
        for seat in lock(&self.0.seats).iter().filter(|seat| names.contains(&seat.name)) {
            let Some(queue) = &seat.queue else { continue };
            let count = (queue.depth)() as u64;
            if count > 0 && !left.iter().any(|left| left.what == seat.name) {
                left.push(Left { what: seat.name, count });
            }
        }
        left
    }

    /// Forgets these threads, and with them what was kept of their queues.
    pub fn forget(&self, names: &[&'static str]) {
        lock(&self.0.seats).retain(|seat| !names.contains(&seat.name));
    }
}

impl Seat {
    fn look(&self, elapsed: Duration) -> Look {
        // First, so that nothing that is put meanwhile looks older than it is.
        let taken = self.queue.as_ref().map(|queue| queue.taken.load(Ordering::Relaxed));
        let depth = self.queue.as_ref().map(|queue| (queue.depth)() as u64);
        let turns = self.turns.load(Ordering::Relaxed);
        Look {
            id: self.id,
            name: self.name,
            role: self.role,
            turns,
            is_replaced: self.is_replaced.load(Ordering::Acquire),
            is_starved: self.is_starved(turns, elapsed),
            queue: depth.zip(taken),
        }
    }
}

impl Seat {
    /// Asks the kernel only about a thread that has not moved.
    fn is_starved(&self, turns: u64, elapsed: Duration) -> bool {
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

/// Marks a thread's end. A panic ends the process: without one of its threads driftd
/// would be blind and look healthy, and whoever started it is to know.
struct End(Arc<Seat>);

impl Drop for End {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
        self.0.is_over.store(true, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Under these locks nothing is left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::{bounded, unbounded};

    use super::*;

    fn look(id: u64, name: &'static str, role: Role, turns: u64) -> Look {
        Look { id, name, role, turns, is_replaced: false, is_starved: false, queue: None }
    }

    fn names(found: &[Found]) -> Vec<String> {
        let name = |found: &Found| match found {
            Found::Stuck { name, is_replaced, .. } => format!("stuck {name} {is_replaced}"),
            Found::Recovered => "recovered".into(),
            Found::Hopeless { name, .. } => format!("hopeless {name}"),
        };
        found.iter().map(name).collect()
    }

    /// What is found within so many seconds in which nothing changes.
    fn within(supervisor: &mut Supervisor, threads: &[Look], seconds: u32) -> Vec<String> {
        let turns = 0..seconds * 4;
        turns.flat_map(|_| names(&supervisor.turn(threads, TURN).0)).collect()
    }

    #[test]
    fn x02_a_busy_thread_without_progress_is_stuck_and_an_idle_one_is_not() {
        let mut supervisor = Supervisor::default();
        let threads = [look(1, "idle", Role::Owner, 4), look(2, "busy", Role::Consumer, 5)];
        assert_eq!(within(&mut supervisor, &threads, 5), [""; 0]);
        assert_eq!(within(&mut supervisor, &threads, 1), ["stuck busy true"]);
        let views = supervisor.turn(&threads, TURN).1;
        let seen: Vec<_> = views.iter().map(|view| (view.name, view.is_stuck)).collect();
        assert_eq!(seen, [("idle", false), ("busy", true)]);
        // It has come back.
        let threads = [look(1, "idle", Role::Owner, 4), look(2, "busy", Role::Consumer, 9)];
        assert_eq!(within(&mut supervisor, &threads, 1), ["recovered"]);
    }

    #[test]
    fn x02_a_thread_that_does_not_take_what_waits_for_it_is_stuck_and_a_blocked_one_is_not() {
        let mut supervisor = Supervisor::default();
        let waits =
            |id, name, turns| Look { queue: Some((3, 0)), ..look(id, name, Role::Consumer, turns) };
        let threads = [waits(1, "frozen", 4), waits(2, "blocked", 4 + State::Blocked as u64)];
        assert_eq!(within(&mut supervisor, &threads, 30), ["stuck frozen true", "hopeless frozen"]);
    }

    #[test]
    fn long_work_that_beats_is_never_stuck() {
        let mut supervisor = Supervisor::default();
        for turn in 0..400 {
            let threads = [look(1, "large", Role::Consumer, STEP * (turn / 8) + 1)];
            assert_eq!(names(&supervisor.turn(&threads, TURN).0), [""; 0]);
        }
    }

    #[test]
    fn a_thread_without_a_processor_is_not_stuck() {
        let mut supervisor = Supervisor::default();
        let starved = Look { is_starved: true, ..look(1, "large", Role::Consumer, 1) };
        assert_eq!(within(&mut supervisor, &[starved], 60), [""; 0]);
        // One that runs in circles wants a processor too, and has it.
        let threads = Threads::default();
        let end = Arc::new(AtomicBool::new(false));
        let ends = end.clone();
        let spin = move || while !ends.load(Ordering::Relaxed) {};
        threads.spawn("spins", Role::Owner, None, spin).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        let is_moving = || {
            let seats = lock(&threads.0.seats);
            seats[0].is_starved(1, Duration::ZERO);
            !seats[0].is_starved(1, Duration::from_nanos(10))
        };
        while !is_moving() {
            assert!(Instant::now() < deadline);
        }
        end.store(true, Ordering::Relaxed);
    }

    #[test]
    fn an_owner_is_given_up_after_its_patience_and_a_disk_later() {
        let mut supervisor = Supervisor::default();
        let threads = [look(1, "scan", Role::Owner, 1), look(2, "history", Role::Disk, 1)];
        assert_eq!(
            within(&mut supervisor, &threads, 25),
            ["stuck scan false", "stuck history false", "hopeless scan"]
        );
        assert_eq!(within(&mut supervisor, &threads, 100), ["hopeless history"]);
    }

    #[test]
    fn replacements_are_few_and_the_last_one_that_is_stuck_ends_the_daemon() {
        let mut supervisor = Supervisor::default();
        let mut threads = Vec::new();
        let mut found = Vec::new();
        for id in 1..10 {
            if found.last().is_none_or(|last: &String| last == "stuck content true") {
                for look in &mut threads {
                    let Look { is_replaced, .. } = look;
                    *is_replaced = true;
                }
                threads.push(look(id, "content", Role::Consumer, 1));
            }
            found.extend(within(&mut supervisor, &threads, 6));
        }
        let replaced = vec!["stuck content true"; MAX_REPLACED];
        assert_eq!(found, [replaced, vec!["stuck content false", "hopeless content"]].concat());
    }

    #[test]
    fn a_machine_that_was_suspended_has_no_stuck_threads() {
        let mut supervisor = Supervisor::default();
        let threads = [look(1, "scan", Role::Owner, 1)];
        let asleep = Duration::from_secs(3600);
        assert_eq!(names(&supervisor.turn(&threads, asleep).0), [""; 0]);
        assert_eq!(names(&supervisor.turn(&threads, asleep).0), [""; 0]);
    }

    #[test]
    fn a_queue_shows_its_depth_and_for_how_long_the_oldest_item_has_waited() {
        let mut supervisor = Supervisor::default();
        let mut ages = Vec::new();
        // Two items, then a third; the first two are taken; then the last.
        for queue in [(0, 0), (2, 0), (2, 0), (3, 0), (1, 2), (1, 2), (0, 3)] {
            let thread = Look { queue: Some(queue), ..look(1, "describe", Role::Consumer, 4) };
            let view = supervisor.turn(&[thread], TURN).1.remove(0);
            ages.push((view.depth.unwrap(), view.oldest.as_millis()));
        }
        assert_eq!(ages, [(0, 0), (2, 0), (2, 250), (3, 500), (1, 250), (1, 500), (0, 0)]);
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
    fn the_daemon_makes_progress_until_a_thread_is_beyond_help() {
        let threads = Threads::default();
        let (told, reasons) = unbounded();
        // In a test the process goes on.
        threads.0.is_given_up.store(false, Ordering::Relaxed);
        threads.on_give_up(move |reason| told.send(reason).unwrap());
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
