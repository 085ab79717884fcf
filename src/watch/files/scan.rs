//! The thread `scan`: scans upperdirs, and examines single paths that have settled.
//!
//! It serves all containers in turns ([`crate::watch::core::fair`]): a slice of the changed
//! files and of the walk of one container, then a slice of the next. A walk and a file that
//! is being read are values that wait between their slices. Periodic scans of all
//! containers together take 2 % of a processor. Urgent work takes half of one.
//!
//! This file decides what is due and whose turn it is. `settle` examines paths, `walk` walks
//! directories. All files are opened by descriptor, component by component, through no
//! symlink: the container controls the content of its upperdir, but not the path to it.

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

/// After a walk, its container's next one waits this many times as long as the walk took.
/// Periodic walks of all containers together take at most this fraction of a processor.
const REST_PER_WALK: u32 = 50;

/// The processor time that periodic scans may save up while there are none.
const PERIODIC_BURST: Duration = Duration::from_millis(200);

/// How often the thread checks what is due, and how many times as long as the check took it
/// waits before the next one.
const CHECK_EVERY: Duration = Duration::from_millis(20);
const REST_PER_CHECK: u32 = 50;

/// How often the thread checks whether something has waited too long.
const DELAYS_EVERY: Duration = Duration::from_secs(1);

/// The most directories that unfinished walks hold open. Beyond that no other walk begins.
const MAX_OPEN: usize = 768;

/// What the scan thread remembers of one container between walks.
struct Memory {
    watched: Arc<Watched>,
    cache: Cache,
    next_scan: Instant,
    may_walk_from: Instant,
    /// After a loss a scan comes sooner, but not before this.
    may_rescan_from: Instant,
}

impl Memory {
    fn new(watched: Arc<Watched>, next_scan: Instant, now: Instant) -> Memory {
        Memory { watched, cache: Cache::new(), next_scan, may_walk_from: now, may_rescan_from: now }
    }
}

pub(crate) struct Scan {
    pub(crate) shared: Arc<Files>,
    pub(crate) requests: Receiver<ScanRequest>,
    pub(crate) wake: Receiver<()>,
    memories: HashMap<ContainerId, Memory>,
    work: HashMap<ContainerId, Work>,
    turns: Turns<ContainerId>,
    periodic: Pace,
    /// When the thread next checks what is due.
    next_check: Instant,
    delays_checked: Instant,
    /// The stages and containers whose findings are known to be delayed.
    late: HashSet<(&'static str, String)>,
}

impl Scan {
    pub(crate) fn new(
        shared: Arc<Files>,
        requests: Receiver<ScanRequest>,
        wake: Receiver<()>,
    ) -> Scan {
        let now = Instant::now();
        Scan {
            shared,
            requests,
            wake,
            memories: HashMap::new(),
            work: HashMap::new(),
            turns: Turns::default(),
            periodic: Pace::new(REST_PER_WALK, PERIODIC_BURST, now),
            next_check: now,
            delays_checked: now,
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
                     their content only"
                );
                for watched in self.shared.table.all() {
                    self.shared.forget_unchanged(&watched);
                }
            }
            let has_requests = self.take_requests();
            if has_requests || self.next_check <= Instant::now() {
                let begun = Instant::now();
                self.find_due();
                self.next_check =
                    Instant::now() + CHECK_EVERY.max(begun.elapsed() * REST_PER_CHECK);
            }
            if self.serve_next() {
                continue;
            }
            let idle = self.idle_time();
            match threads::idle(|| self.wake.recv_timeout(idle)) {
                Ok(()) => self.next_check = Instant::now(),
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Takes new requests. Returns whether there were any.
    fn take_requests(&mut self) -> bool {
        let mut has_requests = false;
        // The channel is bounded, and so are the requests taken from it.
        let taken: usize = self.work.values().map(|work| work.requests.len()).sum();
        let room = self.requests.capacity().unwrap_or(usize::MAX).saturating_sub(taken);
        for request in self.requests.try_iter().take(room) {
            has_requests = true;
            let (ScanRequest::Scan { watched, .. }
            | ScanRequest::Last { watched }
            | ScanRequest::Compare { watched, .. }) = &request;
            let work = self.work.entry(watched.container.clone()).or_default();
            if let ScanRequest::Last { watched } = &request {
                // The last scan covers the remaining work for this container.
                let is_its = |other: &Arc<Watched>| Arc::ptr_eq(other, watched);
                work.below.retain(|(other, _)| !is_its(other));
                work.taken.retain(|settled| !is_its(&settled.watched));
                work.reading.take_if(|(settled, _)| is_its(&settled.watched));
                work.walk.take_if(|walk| is_its(&walk.watched) && walk.ticket.is_none());
            }
            work.hurry();
            work.requests.push_back(request);
        }
        has_requests
    }

    /// Finds what is due: paths that have settled, and scans of containers that lost events,
    /// in which drift was executed, or whose interval has passed.
    fn find_due(&mut self) {
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
                // The container was started again.
                memory.watched = watched.clone();
                memory.cache = Cache::new();
            }
        }
        for container in self.shared.dirty.take_due_scans(now) {
            if let Some(memory) = self.memories.get_mut(&container) {
                memory.next_scan = memory.next_scan.min(now);
            }
        }
        let has_room = self.shared.has_room();
        for watched in all {
            let memory = &self.memories[&watched.container];
            let is_urgent = has_room && watched.wants_rescan() && memory.may_rescan_from <= now;
            if is_urgent || memory.next_scan.max(memory.may_walk_from) <= now {
                let work = self.work.entry(watched.container.clone()).or_default();
                if is_urgent {
                    work.hurry();
                }
                work.due = Some(Due { watched, is_urgent });
            }
        }
        self.work.retain(|_, work| !work.is_idle());
        if self.delays_checked.elapsed() >= DELAYS_EVERY {
            self.delays_checked = Instant::now();
            self.record_delays();
        }
    }

    /// Counts and logs once which findings are late. While they are, `status` shows it.
    fn record_delays(&mut self) {
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
            periodic: self.periodic.wait(Instant::now()).is_zero(),
            begin: open < MAX_OPEN,
        }
    }

    fn idle_time(&mut self) -> Duration {
        let now = Instant::now();
        // This thread is not woken for a path that has yet to settle.
        let tick = self.shared.settings.settle.min(Duration::from_millis(250));
        let next = self.memories.values().map(|memory| memory.next_scan.max(memory.may_walk_from));
        let idle = next
            .chain(self.shared.dirty.next_due())
            .filter(|due| *due > now)
            .min()
            .map_or(tick, |due| due.saturating_duration_since(now).min(tick));
        let waits = self.work.values().any(|work| !work.is_idle());
        if !waits {
            return idle.max(Duration::from_millis(5));
        }
        let rest = match (self.shared.rest(), self.periodic.wait(now)) {
            (Duration::ZERO, rest) | (rest, Duration::ZERO) => rest,
            (one, other) => one.min(other),
        };
        idle.min(rest).max(Duration::from_millis(2))
    }

    /// Does a slice of work for the next container; false if nothing can be done now.
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
                    self.periodic.spend(used);
                }
                match outcome {
                    Ok(false) => work.walk = Some(walk),
                    ended => {
                        if matches!(walk.extent, Extent::All | Extent::Last) {
                            // A scan that is due now was due before this walk.
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

    /// Begins the next walk of a container; requested ones come first.
    fn begin(&mut self, work: &mut Work) -> Option<Walk> {
        if let Some(request) = work.requests.pop_front() {
            let (watched, ticket, extent) = match request {
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
            // The directories of an ended container must not be marked again.
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
        // Losses are reported before the walk, so that the walk makes up for them.
        self.shared.report_losses();
        threads::about(&watched.container);
        let mut walk = Walk::new(watched, extent, is_urgent);
        // Taken before the walk, so that a loss during it causes another scan; and before its time
        // of begin, so that it never claims to make up for such a loss.
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
                    "the pipeline accepted no files of a new directory for half a minute",
                );
            }
            // What failed now is found by a scan of the whole upperdir.
            if problem.is_some() {
                self.shared.dirty.mark_for_scan(&watched);
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
                "the pipeline accepted no results of a scan for half a minute",
            );
        }
        if let Some(problem) = problem {
            // The snapshot of an ended container may be removed at any time.
            if extent != Extent::Last {
                let detail = format!("a scan of its upper layer is incomplete: {problem}");
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
            memory.next_scan = now + self.shared.settings.sweep_interval.max(rest);
            memory.may_walk_from = now + rest;
            memory.may_rescan_from = now + cost * 2;
        }
    }
}
