//! Walks of upperdirs, and looks at single paths that have settled.
//!
//! One thread serves all containers by turns ([`crate::watch::core::fair`]): a slice of one's
//! changed files and of its walk, then a slice of another's. A walk and a file that
//! is being read are values that wait between their slices. Walks that are made
//! because time has passed take 2 % of a processor, those of all containers together;
//! what somebody waits for takes half of one.
//!
//! Everything here is reached by descriptor, component by component, through no
//! symlink: the upperdir's content is the container's to choose, its path is not.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;

use super::entry::Slice;
use super::settle;
use super::shared::Files;
use super::walk::{Cache, Extent, Walk};
use super::ways;
use super::work::{Allowed, Due, ScanRequest, Work};
use crate::health::{Backlog, Failure};
use crate::model::ContainerId;
use crate::sys::clock;
use crate::threads;
use crate::watch::core::fair::{self, Pace, Turns};
use crate::watch::core::message::SensorEvent;
use crate::watch::core::watched::Watched;

/// A walk is made at most this much less often than it takes, and those of all
/// containers together take at most one part in so many of a processor.
const REST_PER_WALK: u32 = 50;

/// What sweeps may save up while nothing is walked.
const SWEEP_BURST: Duration = Duration::from_millis(200);

/// How often it is looked for what is due, and how many times longer than that takes
/// it is left alone.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const REST_PER_LOOK: u32 = 50;

/// How often it is asked whether something waits for too long.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Directories that walks which wait for their turn hold open. No other walk begins
/// beyond that.
const MAX_OPEN: usize = 768;

/// What the scan thread remembers of one container between walks.
struct Memory {
    watched: Arc<Watched>,
    cache: Cache,
    next_sweep: Instant,
    may_walk_from: Instant,
    /// After a loss the walk is made sooner, but not without end.
    may_rescan_from: Instant,
}

impl Memory {
    fn new(watched: Arc<Watched>, next_sweep: Instant, now: Instant) -> Memory {
        Memory {
            watched,
            cache: Cache::new(),
            next_sweep,
            may_walk_from: now,
            may_rescan_from: now,
        }
    }
}

pub(crate) struct Scan {
    pub(crate) shared: Arc<Files>,
    pub(crate) orders: Receiver<ScanRequest>,
    pub(crate) wake: Receiver<()>,
    memories: HashMap<ContainerId, Memory>,
    work: HashMap<ContainerId, Work>,
    turns: Turns<ContainerId>,
    sweeps: Pace,
    /// When it is looked next for what is due.
    next_look: Instant,
    last_asked: Instant,
    /// Whose findings are known to be delayed, and where.
    late: HashSet<(&'static str, String)>,
}

impl Scan {
    pub(crate) fn new(
        shared: Arc<Files>,
        orders: Receiver<ScanRequest>,
        wake: Receiver<()>,
    ) -> Scan {
        let now = Instant::now();
        Scan {
            shared,
            orders,
            wake,
            memories: HashMap::new(),
            work: HashMap::new(),
            turns: Turns::default(),
            sweeps: Pace::new(REST_PER_WALK, SWEEP_BURST, now),
            next_look: now,
            last_asked: now,
            late: HashSet::new(),
        }
    }

    pub(crate) fn run(mut self) {
        let mut times_set = clock::times_set();
        while !self.shared.is_stopping() {
            threads::beat();
            if times_set != clock::times_set() {
                times_set = clock::times_set();
                tracing::warn!(
                    "the machine's clock was set: programs of running containers are judged by \
                     their content alone"
                );
            }
            let is_told = self.take_orders();
            if is_told || self.next_look <= Instant::now() {
                let begun = Instant::now();
                self.look();
                self.next_look = Instant::now() + LOOK_EVERY.max(begun.elapsed() * REST_PER_LOOK);
            }
            if self.serve_next() {
                continue;
            }
            let idle = self.idle_time();
            match threads::idle(|| self.wake.recv_timeout(idle)) {
                Ok(()) => self.next_look = Instant::now(),
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Whether there were any.
    fn take_orders(&mut self) -> bool {
        let mut is_told = false;
        // The channel is bounded, and so is what was taken from it.
        let taken: usize = self.work.values().map(|work| work.orders.len()).sum();
        let room = self.orders.capacity().unwrap_or(usize::MAX).saturating_sub(taken);
        for order in self.orders.try_iter().take(room) {
            is_told = true;
            let (ScanRequest::Scan { watched, .. }
            | ScanRequest::Last { watched }
            | ScanRequest::Compare { watched, .. }) = &order;
            let work = self.work.entry(watched.container.clone()).or_default();
            if let ScanRequest::Last { watched } = &order {
                // It covers what of this one is still to be done.
                let is_its = |other: &Arc<Watched>| Arc::ptr_eq(other, watched);
                work.below.retain(|(other, _)| !is_its(other));
                work.taken.retain(|settled| !is_its(&settled.watched));
                work.reading.take_if(|(settled, _)| is_its(&settled.watched));
                work.walk.take_if(|walk| is_its(&walk.watched) && walk.ticket.is_none());
            }
            work.hurry();
            work.orders.push_back(order);
        }
        is_told
    }

    /// Looks for what is due: paths that have settled; containers that lost something,
    /// those where drift was executed, and those whose turn has come.
    fn look(&mut self) {
        let now = Instant::now();
        for work in self.work.values_mut() {
            work.has_settled = false;
            work.due = None;
        }
        for (container, ..) in self.shared.dirty.overdue(now) {
            self.work.entry(container).or_default().has_settled = true;
        }
        let interval = self.shared.settings.sweep_interval;
        let all = self.shared.table.all();
        for watched in &all {
            let memory = self
                .memories
                .entry(watched.container.clone())
                .or_insert_with(|| Memory::new(watched.clone(), now + interval, now));
            if !Arc::ptr_eq(&memory.watched, watched) {
                // The container runs anew.
                memory.watched = watched.clone();
                memory.cache = Cache::new();
            }
        }
        for container in self.shared.dirty.take_due_sweeps(now) {
            if let Some(memory) = self.memories.get_mut(&container) {
                memory.next_sweep = memory.next_sweep.min(now);
            }
        }
        let has_room = self.shared.has_room();
        for watched in all {
            let memory = &self.memories[&watched.container];
            let is_urgent = has_room && watched.wants_rescan() && memory.may_rescan_from <= now;
            if is_urgent || memory.next_sweep.max(memory.may_walk_from) <= now {
                let work = self.work.entry(watched.container.clone()).or_default();
                if is_urgent {
                    work.hurry();
                }
                work.due = Some(Due { watched, is_urgent });
            }
        }
        self.work.retain(|_, work| !work.is_idle());
        if self.last_asked.elapsed() >= ASK_EVERY {
            self.last_asked = Instant::now();
            self.ask_who_is_late();
        }
    }

    /// Counts and logs once whose findings come late. While they do, `status` says so.
    fn ask_who_is_late(&mut self) {
        let late = self.shared.backlogs().into_iter().filter(Backlog::is_late);
        let late: HashSet<_> = late.map(|backlog| (backlog.stage, backlog.container)).collect();
        for (stage, container) in late.difference(&self.late) {
            let failure = Failure::FindingsDelayed;
            let _ = self.shared.health.record(failure);
            tracing::warn!(failure = failure.name(), container, stage, "findings are delayed");
        }
        self.late = late;
    }

    fn allowed(&mut self) -> Allowed {
        let open: usize =
            self.work.values().map(|work| work.walk.as_ref().map_or(0, Walk::open)).sum();
        Allowed {
            urgent: self.shared.rest().is_zero(),
            sweeps: self.sweeps.wait(Instant::now()).is_zero(),
            begin: open < MAX_OPEN,
        }
    }

    fn idle_time(&mut self) -> Duration {
        let now = Instant::now();
        // Nobody wakes this thread for a path that is to settle first.
        let tick = self.shared.settings.settle.min(Duration::from_millis(250));
        let next = self.memories.values().map(|memory| memory.next_sweep.max(memory.may_walk_from));
        let idle = next
            .chain(self.shared.dirty.next_due())
            .filter(|due| *due > now)
            .min()
            .map_or(tick, |due| due.saturating_duration_since(now).min(tick));
        let waits = self.work.values().any(|work| !work.is_idle());
        if !waits {
            return idle.max(Duration::from_millis(5));
        }
        let rest = match (self.shared.rest(), self.sweeps.wait(now)) {
            (Duration::ZERO, rest) | (rest, Duration::ZERO) => rest,
            (one, other) => one.min(other),
        };
        idle.min(rest).max(Duration::from_millis(2))
    }

    /// Does a slice of work for the container whose turn it is; false if nothing can be
    /// done now.
    fn serve_next(&mut self) -> bool {
        let allowed = self.allowed();
        let ready = self.work.iter().filter(|(_, work)| work.is_ready(allowed));
        let Some(container) = self.turns.next(ready.map(|(container, _)| container)).cloned()
        else {
            return false;
        };
        let begun = Instant::now();
        let bytes = self.serve(&container, allowed);
        self.turns.charge(&container, fair::cost(begun.elapsed(), bytes));
        true
    }

    fn serve(&mut self, container: &ContainerId, allowed: Allowed) -> u64 {
        let Some(mut work) = self.work.remove(container) else { return 0 };
        let mut bytes = 0;
        if allowed.urgent && work.settles() {
            let (used, mut slice) = (fair::processor_time(), Slice::new());
            settle::settle(&self.shared, container, &mut work, &mut slice);
            self.shared.spend(fair::processor_time().saturating_sub(used));
            bytes += slice.bytes;
        }
        if work.walks(allowed) {
            let (used, mut slice) = (fair::processor_time(), Slice::new());
            if let Some(mut walk) = work.walk.take().or_else(|| self.begin(&mut work)) {
                let outcome = walk.step(&self.shared, &mut slice);
                let used = fair::processor_time().saturating_sub(used);
                walk.cost += used;
                if walk.is_urgent {
                    self.shared.spend(used);
                } else {
                    self.sweeps.spend(used);
                }
                match outcome {
                    Ok(false) => work.walk = Some(walk),
                    ended => {
                        if matches!(walk.extent, Extent::All | Extent::Last) {
                            // What is due now was due before it.
                            work.due = None;
                        }
                        self.end(walk, ended.is_ok());
                    }
                }
            }
            bytes += slice.bytes;
        }
        if !work.is_idle() {
            self.work.insert(container.clone(), work);
        }
        bytes
    }

    /// Begins the next walk of a container: what was ordered first.
    fn begin(&mut self, work: &mut Work) -> Option<Walk> {
        if let Some(order) = work.orders.pop_front() {
            let (watched, ticket, extent) = match order {
                ScanRequest::Scan { watched, ticket } => (watched, ticket, Extent::All),
                ScanRequest::Last { watched } => (watched, None, Extent::Last),
                ScanRequest::Compare { watched, ticket } => {
                    return Some(Walk::stopped(&self.shared, &watched, ticket));
                }
            };
            work.due.take_if(|due| Arc::ptr_eq(&due.watched, &watched));
            return Some(self.begin_walk(&watched, ticket, extent, true));
        }
        while let Some((watched, path)) = work.below.pop_front() {
            // Of one that has ended nothing is to be listened to any more.
            if !watched.is_detaching() {
                return Walk::below(&self.shared, &watched, &path);
            }
        }
        let Due { watched, is_urgent } = work.due.take()?;
        Some(self.begin_walk(&watched, None, Extent::All, is_urgent))
    }

    fn begin_walk(
        &mut self,
        watched: &Arc<Watched>,
        ticket: Option<u64>,
        extent: Extent,
        is_urgent: bool,
    ) -> Walk {
        // Told before the walk, so that the walk makes up for them.
        self.shared.report_losses();
        threads::about(&watched.container);
        let mut walk = Walk::new(watched, extent, is_urgent);
        // Before the walk, so that what is lost during it asks for another; and before
        // its time is taken, so that it never claims to make up for that.
        let is_lossy = watched.take_rescan();
        walk.began = Timestamp::now();
        self.shared.names.begin_walk(watched);
        ways::learn_image(&self.shared, watched);
        watched.ways.begin_walk();
        walk.ticket = ticket;
        walk.leaves_settling = ticket.is_none() && !is_lossy;
        if let Some(memory) = self.memories.get_mut(&watched.container)
            && Arc::ptr_eq(&memory.watched, watched)
        {
            walk.known = std::mem::take(&mut memory.cache);
        }
        if extent == Extent::Last {
            walk.writers = self
                .shared
                .dirty
                .take_dirty_of(&watched.container)
                .into_iter()
                .filter_map(|(path, writer)| Some((path, self.shared.process_of(watched, writer)?)))
                .collect();
        }
        walk.open_root(&self.shared);
        walk
    }

    fn end(&mut self, walk: Walk, is_whole: bool) {
        let Walk { watched, ticket, extent, problem, seen, began, cost, .. } = walk;
        if extent == Extent::Below {
            if !is_whole && !self.shared.is_stopping() {
                self.shared.lose(
                    Failure::PipelineFull,
                    Some(&watched),
                    "the pipeline had no room for a new directory's files for half a minute",
                );
            }
            // What could not be walked now is walked when all is.
            if problem.is_some() {
                self.shared.dirty.mark_for_sweep(&watched);
            }
            return;
        }
        let is_complete = is_whole && problem.is_none();
        if let (Extent::Stopped, Some(ticket)) = (extent, ticket) {
            let (observations, end) = (Vec::new(), Some(is_complete));
            let _ =
                self.shared.report_patiently(SensorEvent::Compared { ticket, observations, end });
            return;
        }
        if is_complete {
            watched.ways.end_walk();
            if self.shared.names.end_walk(&watched) {
                self.shared.restore(Failure::NamesFull, Some(&watched));
                self.shared.restore(Failure::MarkRefused, Some(&watched));
            }
        }
        if !is_whole && !self.shared.is_stopping() {
            self.shared.lose(
                Failure::PipelineFull,
                Some(&watched),
                "the pipeline had no room for a scan for half a minute",
            );
        }
        if let Some(problem) = problem {
            // The snapshot of a container that has ended may go at any time.
            if extent != Extent::Last {
                let detail = format!("a walk of its upper layer is incomplete: {problem}");
                self.shared.degrade(Failure::ScanIncomplete, Some(&watched), &detail);
            }
        }
        let scanned = SensorEvent::Scanned {
            container: watched.container.clone(),
            ticket,
            began,
            complete: is_complete,
        };
        let _ = self.shared.report_patiently(scanned);
        if extent == Extent::Last {
            let is_its = |memory: &mut Memory| Arc::ptr_eq(&memory.watched, &watched);
            self.memories
                .extract_if(|container, memory| *container == watched.container && is_its(memory))
                .for_each(drop);
            self.shared.forget(&watched);
            return;
        }
        let now = Instant::now();
        let rest = cost * REST_PER_WALK;
        if let Some(memory) = self.memories.get_mut(&watched.container)
            && Arc::ptr_eq(&memory.watched, &watched)
        {
            memory.cache = seen;
            memory.next_sweep = now + self.shared.settings.sweep_interval.max(rest);
            memory.may_walk_from = now + rest;
            memory.may_rescan_from = now + cost * 2;
        }
    }
}
