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

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;
use rustix::fs::Dir;

use super::lower;
use super::lower::Finding;
use super::lower::LowerNames;
use super::lower::TwinReading;
use super::names::Deaf;
use super::state;
use super::state::Begun;
use super::state::Reading;
use super::state::Which;
use super::ways;
use crate::health::{Backlog, Failure};
use crate::model::file::{SETGID, SETUID};
use crate::model::{
    ContainerId, Content, Fact, FileState, FileType, LowerTwin, Observation, Process, RootfsPath,
    Source, Unhashed,
};
use crate::sys::clock;
use crate::sys::file::{self, Stat};
use crate::sys::overlay::{self, Opacity};
use crate::threads;
use crate::watch::core::fair;
use crate::watch::core::fair::Pace;
use crate::watch::core::fair::Turns;
use crate::watch::core::held::Held;
use crate::watch::core::held::Left;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::shared::Settled;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Layers;
use crate::watch::core::table::Watched;

/// An upperdir that is to be walked now.
#[derive(Debug)]
pub(in crate::watch) enum ScanRequest {
    Scan {
        watched: Arc<Watched>,
        ticket: Option<u64>,
    },
    /// The container has ended: a last walk, then forget it.
    Last {
        watched: Arc<Watched>,
    },
    /// The container does not run, and somebody asks what it holds.
    Compare {
        watched: Arc<Watched>,
        ticket: u64,
    },
}

const MAX_DEPTH: usize = 256;
const MAX_PATH: usize = 4096;
const BATCH: usize = 512;

/// Entries of one upperdir that are remembered between walks.
const MAX_CACHED: usize = 64 * 1024;

/// A file is hashed again in each walk until its ctime was this old when it was
/// hashed. A store through a shared mapping changes the content and leaves the
/// ctime as it is until the kernel has written the page back, half a minute later.
const STABLE_AFTER: Duration = Duration::from_secs(60);

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

/// New directories of one container that are walked one by one.
const MAX_BELOW: usize = 1024;

/// What a walk found at a path, and by what it can be known again.
#[derive(Clone)]
struct Cached {
    stat: Stat,
    state: FileState,
    lower: Option<LowerTwin>,
}

type Cache = HashMap<RootfsPath, Cached>;

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

/// How much of one container's work is done in its turn.
struct Slice {
    until: Instant,
    /// What was read or computed.
    bytes: u64,
}

impl Slice {
    fn new() -> Slice {
        Slice { until: Instant::now() + fair::SLICE, bytes: 0 }
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.until
    }
}

/// What of one container is being done, and what is to be done next.
#[derive(Default)]
struct Work {
    /// Some of its paths have settled.
    has_settled: bool,
    taken: VecDeque<Settled>,
    reading: Option<(Settled, Box<EntryReading>)>,
    walk: Option<Walk>,
    orders: VecDeque<ScanRequest>,
    /// Directories that are new or were moved.
    below: VecDeque<(Arc<Watched>, RootfsPath)>,
    due: Option<Due>,
}

/// A walk that nobody has ordered.
struct Due {
    watched: Arc<Watched>,
    is_urgent: bool,
}

/// Which kinds of work may be done now.
#[derive(Clone, Copy)]
struct Allowed {
    urgent: bool,
    sweeps: bool,
    /// Another walk may begin.
    begin: bool,
}

impl Work {
    fn settles(&self) -> bool {
        self.has_settled || self.reading.is_some() || !self.taken.is_empty()
    }

    fn walks(&self, allowed: Allowed) -> bool {
        let Allowed { urgent, sweeps, begin } = allowed;
        let may = |is_urgent| if is_urgent { urgent } else { sweeps };
        match (&self.walk, &self.due) {
            (Some(walk), _) => may(walk.is_urgent),
            (None, _) if !self.orders.is_empty() || !self.below.is_empty() => begin && urgent,
            (None, Some(due)) => begin && may(due.is_urgent),
            (None, None) => false,
        }
    }

    fn is_ready(&self, allowed: Allowed) -> bool {
        allowed.urgent && self.settles() || self.walks(allowed)
    }

    fn is_idle(&self) -> bool {
        let everything = Allowed { urgent: true, sweeps: true, begin: true };
        !self.is_ready(everything)
    }

    /// Something is to be walked that a walk which has begun does not make up for:
    /// that one is not to keep it waiting.
    fn hurry(&mut self) {
        if let Some(walk) = &mut self.walk {
            walk.is_urgent = true;
        }
    }
}

pub(in crate::watch) struct Scan {
    pub(in crate::watch) shared: Arc<Shared>,
    pub(in crate::watch) orders: Receiver<ScanRequest>,
    pub(in crate::watch) wake: Receiver<()>,
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

/// The thread is to end, or the pipeline has no room.
struct Interrupted;

impl Scan {
    pub(in crate::watch) fn new(
        shared: Arc<Shared>,
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

    pub(in crate::watch) fn run(mut self) {
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
        for (container, ..) in self.shared.overdue(now) {
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
        for container in self.shared.take_due_sweeps(now) {
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
            .chain(self.shared.next_due())
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
            settle(&self.shared, container, &mut work, &mut slice);
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
                self.shared.mark_for_sweep(&watched);
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

/// Looks at some of a container's paths that have settled.
fn settle(shared: &Shared, container: &ContainerId, work: &mut Work, slice: &mut Slice) {
    // Not kept: what a name of a directory leads to may change.
    let mut place: Option<Place> = None;
    while !slice.is_over() && !shared.is_stopping() {
        if let Some((settled, mut reading)) = work.reading.take() {
            match reading.step(shared, slice) {
                None => work.reading = Some((settled, reading)),
                Some(found) => tell_settled(shared, work, settled, Ok(Some(found)), true),
            }
            continue;
        }
        let Some(settled) = work.taken.pop_front() else {
            work.taken = shared.take_settled(container, Instant::now()).into();
            if work.taken.is_empty() {
                work.has_settled = false;
                return;
            }
            continue;
        };
        let Settled { watched, path, .. } = &settled;
        let Some(layers) = watched.layers() else {
            shared.done(container, path);
            continue;
        };
        let parent = path.parent().unwrap_or_else(RootfsPath::root);
        // Neighbours follow each other.
        let opened = match place.take().filter(|place| place.is(watched, &parent)) {
            Some(place) => Ok(place),
            None => Place::open(watched, layers, parent),
        };
        let looked = opened.and_then(|opened| place.insert(opened).look(shared, layers, path));
        let in_image = place.as_ref().is_none_or(|place| place.in_image);
        match looked {
            Ok(Some(Look::Reading(reading))) => work.reading = Some((settled, reading)),
            Ok(Some(Look::Found(found))) => {
                tell_settled(shared, work, settled, Ok(Some(found)), in_image);
            }
            Ok(None) => tell_settled(shared, work, settled, Ok(None), in_image),
            Err(err) => tell_settled(shared, work, settled, Err(err), in_image),
        }
    }
}

/// Reports what was found at a path that had settled.
fn tell_settled(
    shared: &Shared,
    work: &mut Work,
    settled: Settled,
    found: io::Result<Option<Found>>,
    in_image: bool,
) {
    let Settled { watched, path, writer, source } = settled;
    shared.done(&watched.container, &path);
    let Some(layers) = watched.layers() else { return };
    let writer = writer.and_then(|writer| shared.process_of(&watched, writer));
    let tell = |fact| shared.observe_patiently(&watched, Timestamp::now(), source, fact);
    match found {
        Ok(Some(Found::Entry { stat, state, lower })) => {
            if stat.file_type != FileType::Symlink {
                watched.ways.forget(&path);
            }
            if matters(shared, &watched, &path, &state, lower.as_ref()) {
                let writer = writer.or_else(|| shared.last_writer(&watched, &stat));
                tell(Fact::Present { path, state, lower, writer });
            }
        }
        // Whether the container or its owner removed it cannot be told.
        Ok(Some(Found::Whiteout) | None) if watched.is_detaching() => (),
        Ok(Some(Found::Whiteout)) => {
            watched.ways.forget(&path);
            tell(Fact::Absent { path, writer });
        }
        // The image's own file shows through: executed before it was known
        // which files are the image's.
        Ok(None) if in_image && lower::holds(layers, &path) => (),
        Ok(None) if layers.is_cut_off() && open_merged(&watched, &path).is_ok() => (),
        Ok(None) => {
            watched.ways.forget(&path);
            tell(Fact::Absent { path, writer });
        }
        Ok(Some(Found::Directory)) => {
            watched.ways.forget(&path);
            if work.below.len() < MAX_BELOW {
                // Walked behind everything that is told by itself, so that nothing is told
                // twice.
                work.below.push_back((watched, path));
            } else {
                watched.ask_for_walk();
            }
        }
        Err(_) if watched.is_detaching() || shared.is_stopping() => (),
        Err(err) => {
            let detail = format!("the changed file {path} cannot be looked at: {err}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
        }
    }
}

/// Whether something in an upper layer can be more than data. What a walk was
/// ordered for is told whole; what changes all the time is not.
fn matters(
    shared: &Shared,
    watched: &Watched,
    path: &RootfsPath,
    state: &FileState,
    lower: Option<&LowerTwin>,
) -> bool {
    lower.is_some()
        || state.capability.is_some()
        || state.mode & (SETUID | SETGID) != 0
        || !matches!(state.content, Content::Unhashed(Unhashed::NotAProgram | Unhashed::NotRegular))
        || shared.is_sensitive(watched, path)
}

#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
enum Found {
    Directory,
    Whiteout,
    Entry { stat: Stat, state: FileState, lower: Option<LowerTwin> },
}

/// A look at a name, which may have to go on.
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
enum Look {
    Found(Found),
    Reading(Box<EntryReading>),
}

/// A directory of an upper layer, in which names are looked at.
struct Place {
    watched: Arc<Watched>,
    path: RootfsPath,
    /// `None` if there is no such directory.
    directory: Option<OwnedFd>,
    holds_file_whiteouts: bool,
    /// Whether the image has this directory too.
    in_image: bool,
}

#[derive(Clone, Copy)]
struct OpenPlace<'a> {
    directory: BorrowedFd<'a>,
    holds_file_whiteouts: bool,
    in_image: bool,
    /// Whether data is compared too, where it may be the image's.
    compares_data: bool,
}

impl Place {
    fn open(watched: &Arc<Watched>, layers: &Layers, path: RootfsPath) -> io::Result<Place> {
        let gone = |err: &io::Error| {
            // A directory of the way was replaced: what the path named is not there.
            matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
        };
        // Not part of the question: without the upperdir nothing is known of the path.
        let upper = file::open_directory(&layers.dirs.upperdir)?;
        let in_image = lower::holds(layers, &path);
        let directory = match file::open_directory_beneath(&upper, path.relative()) {
            Ok(directory) => Some(directory),
            Err(err) if gone(&err) => None,
            Err(err) => return Err(err),
        };
        let holds_file_whiteouts = directory.as_ref().is_some_and(|directory| {
            overlay::opacity(directory, layers.userxattr)
                .is_ok_and(|opacity| opacity == Opacity::HoldsFileWhiteouts)
        });
        Ok(Place { watched: watched.clone(), path, directory, holds_file_whiteouts, in_image })
    }

    fn is(&self, watched: &Arc<Watched>, path: &RootfsPath) -> bool {
        Arc::ptr_eq(&self.watched, watched) && self.path == *path
    }

    /// What is under the last name of `path`; `None` if nothing.
    fn look(
        &self,
        shared: &Shared,
        layers: &Layers,
        path: &RootfsPath,
    ) -> io::Result<Option<Look>> {
        let Some(directory) = &self.directory else { return Ok(None) };
        let Place { holds_file_whiteouts, in_image, .. } = *self;
        let compares_data = false;
        let directory = directory.as_fd();
        let open = OpenPlace { directory, holds_file_whiteouts, in_image, compares_data };
        let found = file::stat_at(open.directory, path.file_name())
            .and_then(|stat| entry(shared, &self.watched, layers, open, path, stat));
        match found {
            Ok(found) => Ok(Some(found)),
            Err(err) if is_gone(&err) || err.raw_os_error() == Some(libc::ELOOP) => Ok(None),
            Err(err) => Err(err),
        }
    }
}

/// What a directory of the upper layer holds under the last name of `path`.
fn entry(
    shared: &Shared,
    watched: &Arc<Watched>,
    layers: &Layers,
    place: OpenPlace<'_>,
    path: &RootfsPath,
    stat: Stat,
) -> io::Result<Look> {
    if stat.is_whiteout_device() {
        return Ok(Look::Found(Found::Whiteout));
    }
    let OpenPlace { directory, holds_file_whiteouts, in_image, compares_data } = place;
    let is_sensitive = shared.is_sensitive(watched, path);
    let mut reading = EntryReading {
        watched: watched.clone(),
        path: path.clone(),
        stat,
        in_image,
        is_sensitive,
        is_compared: is_sensitive,
        stage: Stage::Over,
    };
    match stat.file_type {
        FileType::Directory => return Ok(Look::Found(Found::Directory)),
        FileType::Regular => (),
        FileType::Symlink if is_sensitive || shared.leads_to_sensitive(watched, path) => {
            let target = rustix::fs::readlinkat(directory, path.file_name(), Vec::new())?;
            ways::note_link(shared, watched, path, target.as_bytes());
            let state = state::of_link(&stat, target.as_bytes());
            return Ok(reading.look_below(shared, state, false));
        }
        // Where the image has a program, it matters that this is none.
        FileType::Symlink
        | FileType::CharDevice
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket => return Ok(reading.look_below(shared, state::unopened(&stat), false)),
    }
    let (fd, stat) = file::open_file_beneath(directory, path.file_name())?;
    if !stat.is_regular() {
        // Exchanged since we looked; the next look will see what it is by then.
        let state = state::unopened(&stat);
        return Ok(Look::Found(Found::Entry { stat, state, lower: None }));
    }
    let user = layers.userxattr;
    if holds_file_whiteouts && stat.size == 0 && overlay::is_file_whiteout(&fd, user)? {
        return Ok(Look::Found(Found::Whiteout));
    }
    reading.stat = stat;
    reading.is_compared |= in_image
        && (lower::holds_program(layers, path)
            || compares_data && lower::holds_file_of(layers, path, stat.size));
    let content = if overlay::is_metacopy(&fd, user)? {
        // The content is in a layer below. The merged view knows where; once the
        // container has ended there is none.
        match open_merged(watched, path) {
            // Open, it keeps the container's mount busy.
            Ok(merged) => Stored::Merged { merged: Held::new(watched, merged), upper: fd },
            Err(_) => Stored::below(layers, path, fd),
        }
    } else {
        Stored::Own(fd)
    };
    Ok(reading.begin(shared, content))
}

/// Where the content of an upper layer's file lies.
enum Stored {
    Own(OwnedFd),
    /// Seen as the container does. Its descriptor must not be kept when that ends.
    Merged {
        merged: Held,
        upper: OwnedFd,
    },
    Below {
        below: OwnedFd,
        upper: OwnedFd,
    },
    Nowhere,
}

impl Stored {
    fn below(layers: &Layers, path: &RootfsPath, upper: OwnedFd) -> Stored {
        match open_below(layers, path, &upper) {
            Some(below) => Stored::Below { below, upper },
            None => Stored::Nowhere,
        }
    }

    /// The file whose attributes count, if its content is another one's.
    fn upper(&self) -> Option<&OwnedFd> {
        match self {
            Stored::Merged { upper, .. } | Stored::Below { upper, .. } => Some(upper),
            Stored::Own(_) | Stored::Nowhere => None,
        }
    }
}

/// A file of an upper layer that is being read, and then the one that it hides. It
/// can be put aside at any time.
struct EntryReading {
    watched: Arc<Watched>,
    path: RootfsPath,
    stat: Stat,
    in_image: bool,
    is_sensitive: bool,
    /// Whether its content is compared, whatever it is.
    is_compared: bool,
    stage: Stage,
}

enum Stage {
    Content(Stored, Box<Reading>),
    Twin(FileState, Box<TwinReading>),
    Over,
}

impl EntryReading {
    fn begin(mut self, shared: &Shared, stored: Stored) -> Look {
        let which = if self.is_compared { Which::Always } else { Which::Programs };
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let begin = |fd: BorrowedFd<'_>| Reading::begin(fd, &self.stat, which, max_hash_bytes);
        let begun = match &stored {
            Stored::Own(fd) | Stored::Below { below: fd, .. } => begin(fd.as_fd()),
            Stored::Merged { merged, .. } => match merged.take() {
                Left::Open(fd) => {
                    let begun = begin(fd.as_fd());
                    merged.give_back(&self.watched, fd);
                    begun
                }
                Left::Name(_) | Left::Copy(_) => return self.begin_below(shared, stored),
            },
            Stored::Nowhere => Begun::Known(state::unopened(&self.stat)),
        };
        match begun {
            Begun::Known(state) => self.has(shared, &stored, state),
            Begun::Reads(reading) => {
                self.stage = Stage::Content(stored, Box::new(reading));
                Look::Reading(Box::new(self))
            }
        }
    }

    /// The container has ended: there is no merged view any more.
    fn begin_below(self, shared: &Shared, stored: Stored) -> Look {
        let stored = match (stored, self.watched.layers()) {
            (Stored::Merged { upper, .. }, Some(layers)) => {
                Stored::below(layers, &self.path, upper)
            }
            _ => Stored::Nowhere,
        };
        self.begin(shared, stored)
    }

    /// Its content is known.
    fn has(self, shared: &Shared, stored: &Stored, state: FileState) -> Look {
        // The attributes are the upper file's.
        let state = match stored.upper() {
            Some(upper) => FileState {
                capability: file::xattr(upper, "security.capability").unwrap_or(None),
                ..state
            },
            None => state,
        };
        let is_program = state.is_program() || self.is_sensitive;
        self.look_below(shared, state, is_program)
    }

    fn look_below(mut self, shared: &Shared, state: FileState, is_program: bool) -> Look {
        let stat = self.stat;
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let finding = match self.watched.layers() {
            Some(layers) if self.in_image => {
                shared.lower_twins.begin(layers, &self.path, is_program, max_hash_bytes)
            }
            Some(_) | None => Finding::Known(None),
        };
        match finding {
            Finding::Known(lower) => Look::Found(Found::Entry { stat, state, lower }),
            Finding::Reads(twin) => {
                self.stage = Stage::Twin(state, twin);
                Look::Reading(Box::new(self))
            }
        }
    }

    /// Reads a little more. `None`: there is more to read.
    fn step(self: &mut Box<Self>, shared: &Shared, slice: &mut Slice) -> Option<Found> {
        let look = match std::mem::replace(&mut self.stage, Stage::Over) {
            Stage::Content(stored, mut reading) => {
                let before = reading.cost();
                let state = match &stored {
                    Stored::Own(fd) | Stored::Below { below: fd, .. } => {
                        reading.step(fd.as_fd(), state::SLICE)
                    }
                    Stored::Merged { merged, .. } => match merged.take() {
                        Left::Open(fd) => {
                            let state = reading.step(fd.as_fd(), state::SLICE);
                            merged.give_back(&self.watched, fd);
                            state
                        }
                        Left::Name(_) | Left::Copy(_) => {
                            return self.goes_on(|entry| entry.begin_below(shared, stored));
                        }
                    },
                    Stored::Nowhere => Some(state::unopened(&self.stat)),
                };
                slice.bytes += reading.cost() - before;
                let Some(state) = state else {
                    self.stage = Stage::Content(stored, reading);
                    return None;
                };
                return self.goes_on(|entry| entry.has(shared, &stored, state));
            }
            Stage::Twin(state, mut twin) => {
                let before = twin.cost();
                let lower = twin.step(&shared.lower_twins, state::SLICE);
                slice.bytes += twin.cost() - before;
                match lower {
                    Some(lower) => Found::Entry { stat: self.stat, state, lower },
                    None => {
                        self.stage = Stage::Twin(state, twin);
                        return None;
                    }
                }
            }
            Stage::Over => {
                let state = state::unopened(&self.stat);
                Found::Entry { stat: self.stat, state, lower: None }
            }
        };
        Some(look)
    }

    fn goes_on(self: &mut Box<Self>, next: impl FnOnce(EntryReading) -> Look) -> Option<Found> {
        let EntryReading { stat, in_image, is_sensitive, is_compared, .. } = **self;
        let (watched, path) = (self.watched.clone(), self.path.clone());
        let stage = Stage::Over;
        let entry =
            EntryReading { watched, path, stat, in_image, is_sensitive, is_compared, stage };
        match next(entry) {
            Look::Found(found) => Some(found),
            Look::Reading(reading) => {
                *self = reading;
                None
            }
        }
    }
}

/// Opens the content of a metadata-only copy where the layers have it.
fn open_below(layers: &Layers, path: &RootfsPath, upper: &OwnedFd) -> Option<OwnedFd> {
    let redirect = overlay::redirect(upper, layers.userxattr).ok()?;
    let path = match redirect.as_deref() {
        None => path.clone(),
        Some(absolute) if absolute.starts_with(b"/") => RootfsPath::new(absolute).ok()?,
        Some(name) => path.parent()?.join(name).ok()?,
    };
    lower::open(layers, &path)
}

/// Opens a file as the container sees it. The descriptor is on the container's
/// mount and must not be kept.
fn open_merged(watched: &Watched, path: &RootfsPath) -> io::Result<OwnedFd> {
    if watched.has_foreign_layers() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let handle = crate::sys::procfs::Handle::open_exactly(watched.init)?;
    let root = handle.open_root()?;
    if file::stat(&root)?.device != watched.device {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (fd, stat) = file::open_file_beneath(&root, path.relative())?;
    if stat.is_regular() { Ok(fd) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// How much of an upperdir is walked, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    All,
    /// The container has ended.
    Last,
    /// One directory with everything below it.
    Below,
    /// The container does not run: nothing is listened to, and nobody is known to write.
    Stopped,
}

/// One walk of one upperdir, depth first. It can be put aside at any time.
struct Walk {
    watched: Arc<Watched>,
    ticket: Option<u64>,
    extent: Extent,
    /// Somebody waits for it.
    is_urgent: bool,
    /// Files that have not settled are left to who looks at them then.
    leaves_settling: bool,
    writers: HashMap<RootfsPath, Arc<Process>>,
    /// From the last walk, and for the next one.
    known: Cache,
    seen: Cache,
    batch: Vec<Observation>,
    /// The first reason for which the walk is not complete.
    problem: Option<String>,
    began: Timestamp,
    /// What it has taken of a processor.
    cost: Duration,
    /// The directories that it is in. One descriptor for each is open.
    directories: Vec<Directory>,
    reading: Option<WalkedFile>,
}

/// A directory that is being walked.
struct Directory {
    entries: Dir,
    path: RootfsPath,
    depth: usize,
    holds_file_whiteouts: bool,
    in_image: bool,
    /// Names of the layers below that it hides, if it is opaque.
    hidden: std::vec::IntoIter<Vec<u8>>,
}

/// A file that a walk has come to and that is being read.
struct WalkedFile {
    path: RootfsPath,
    is_stable: bool,
    reading: Box<EntryReading>,
}

impl Walk {
    fn new(watched: &Arc<Watched>, extent: Extent, is_urgent: bool) -> Walk {
        Walk {
            watched: watched.clone(),
            ticket: None,
            extent,
            is_urgent,
            leaves_settling: true,
            writers: HashMap::new(),
            known: Cache::new(),
            seen: Cache::new(),
            batch: Vec::new(),
            problem: None,
            began: Timestamp::now(),
            cost: Duration::ZERO,
            directories: Vec::new(),
            reading: None,
        }
    }

    /// A walk of a directory that is new or was moved: listens to everything below it,
    /// and tells what it holds.
    fn below(shared: &Shared, watched: &Arc<Watched>, path: &RootfsPath) -> Option<Walk> {
        let layers = watched.layers()?;
        let mut walk = Walk::new(watched, Extent::Below, true);
        let opened = file::open_directory(&layers.dirs.upperdir)
            .and_then(|upper| file::open_directory_beneath(&upper, path.relative()));
        match opened {
            Ok(directory) => {
                let depth = path.as_bytes().iter().filter(|&&byte| byte == b'/').count();
                let in_image = lower::holds(layers, path);
                walk.enter(shared, layers, directory, path.clone(), depth, in_image);
            }
            // Gone again, which is told too.
            Err(err) => walk.note(format!("cannot open {path}: {err}")),
        }
        Some(walk)
    }

    fn stopped(shared: &Shared, watched: &Arc<Watched>, ticket: u64) -> Walk {
        threads::about(&watched.container);
        let mut walk = Walk::new(watched, Extent::Stopped, true);
        walk.ticket = Some(ticket);
        walk.leaves_settling = false;
        walk.open_root(shared);
        walk
    }

    fn open_root(&mut self, shared: &Shared) {
        let watched = self.watched.clone();
        let Some(layers) = watched.layers() else {
            return self.note("the upperdir is not known".into());
        };
        match file::open_directory(&layers.dirs.upperdir) {
            Ok(upper) => self.enter(shared, layers, upper, RootfsPath::root(), 0, true),
            Err(err) => self.note(format!(
                "cannot open the upperdir {}: {err}",
                layers.dirs.upperdir.display()
            )),
        }
    }

    /// How many directories it holds open.
    fn open(&self) -> usize {
        self.directories.len()
    }

    /// Listens to a directory before it is listed, or no more.
    fn listen(&mut self, shared: &Shared, path: &RootfsPath, directory: &OwnedFd) {
        let names = &shared.names;
        if self.extent == Extent::Stopped {
            return;
        }
        if self.extent == Extent::Last {
            names.unlisten(directory, &shared.attachments);
            shared.closings.unlisten(directory);
            return;
        }
        shared.closings.listen(directory);
        let (failure, why) = match names.listen(&self.watched, path, directory) {
            Ok(()) | Err(Deaf::Missing | Deaf::Full(false) | Deaf::Refused(_, false)) => return,
            Err(Deaf::Full(true)) => {
                (Failure::NamesFull, "its upper layer has too many directories".to_owned())
            }
            Err(Deaf::Refused(err, true)) => (Failure::MarkRefused, format!("{path}: {err}")),
        };
        let detail = format!("not every directory can be listened to, sweeps do the rest: {why}");
        shared.degrade(failure, Some(&self.watched), &detail);
    }

    fn note(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }

    /// Goes on with everything in a directory.
    fn enter(
        &mut self,
        shared: &Shared,
        layers: &Layers,
        directory: OwnedFd,
        path: RootfsPath,
        depth: usize,
        in_image: bool,
    ) {
        self.listen(shared, &path, &directory);
        let opacity = overlay::opacity(&directory, layers.userxattr).unwrap_or_else(|err| {
            self.note(format!("cannot tell what {path} hides: {err}"));
            Opacity::Transparent
        });
        let mut hidden = Vec::new();
        if opacity == Opacity::Opaque {
            match lower::names_in(layers, &path) {
                LowerNames::NotADirectory => self.absent(shared, path.clone()),
                LowerNames::Names(names) => hidden = names.into_iter().collect(),
            }
        }
        match Dir::new(directory) {
            Ok(entries) => self.directories.push(Directory {
                entries,
                path,
                depth,
                holds_file_whiteouts: opacity == Opacity::HoldsFileWhiteouts,
                in_image,
                hidden: hidden.into_iter(),
            }),
            Err(err) => self.note(format!("cannot list {path}: {err}")),
        }
    }

    /// Goes on for a slice; true when it is done.
    fn step(&mut self, shared: &Shared, slice: &mut Slice) -> Result<bool, Interrupted> {
        let watched = self.watched.clone();
        let Some(layers) = watched.layers() else { return Ok(true) };
        while !slice.is_over() {
            if shared.is_stopping() {
                return Err(Interrupted);
            }
            if self.batch.len() >= BATCH {
                self.flush(shared)?;
            }
            if let Some(WalkedFile { path, is_stable, mut reading }) = self.reading.take() {
                match reading.step(shared, slice) {
                    None => self.reading = Some(WalkedFile { path, is_stable, reading }),
                    Some(found) => self.found(shared, path, found, is_stable),
                }
                continue;
            }
            let Some(directory) = self.directories.last_mut() else {
                self.flush(shared)?;
                return Ok(true);
            };
            if let Some(name) = directory.hidden.next() {
                let path = directory.hides(&name);
                if let Some(path) = path {
                    self.absent(shared, path);
                }
                continue;
            }
            match directory.entries.next() {
                None => drop(self.directories.pop()),
                Some(Ok(listed)) => self.listed(shared, layers, listed.file_name()),
                Some(Err(err)) => {
                    let problem = format!("cannot list all of {}: {err}", directory.path);
                    self.note(problem);
                    self.directories.pop();
                }
            }
        }
        Ok(false)
    }

    /// Looks at one name in the directory that the walk is in.
    fn listed(&mut self, shared: &Shared, layers: &Layers, name: &CStr) {
        let Some(directory) = self.directories.last() else { return };
        if matches!(name.to_bytes(), b"." | b"..") {
            return;
        }
        let Ok(child) = directory.path.join(name.to_bytes()) else { return };
        let (depth, in_image) = (directory.depth, directory.in_image);
        if child.as_bytes().len() > MAX_PATH {
            let problem = format!("{} holds paths of more than {MAX_PATH} bytes", directory.path);
            return self.note(problem);
        }
        let opened = directory.open();
        // An entry that vanishes between listing and looking is no error.
        match opened.and_then(|place| Ok((place, file::stat_at(place.directory, name)?))) {
            Ok((place, stat)) if stat.file_type == FileType::Directory => {
                if depth >= MAX_DEPTH {
                    return self.note(format!("{child} is more than {MAX_DEPTH} directories deep"));
                }
                match file::open_directory_beneath(place.directory, name.to_bytes()) {
                    Ok(fd) => {
                        let in_image = in_image && lower::holds(layers, &child);
                        self.enter(shared, layers, fd, child, depth + 1, in_image);
                    }
                    Err(err) if is_gone(&err) => (),
                    Err(err) => self.note(format!("cannot open {child}: {err}")),
                }
            }
            Ok((_, stat)) => {
                let is_watched = self.extent != Extent::Stopped;
                if is_watched && stat.is_regular() && layers.note_birth(&stat) {
                    let detail = format!("{child} looks older than the layer that holds it");
                    shared.lose(Failure::ClockSet, Some(&self.watched), &detail);
                }
                self.entry(shared, layers, child, stat);
            }
            Err(err) if is_gone(&err) => (),
            Err(err) => self.note(format!("cannot look at {child}: {err}")),
        }
    }

    fn entry(&mut self, shared: &Shared, layers: &Layers, path: RootfsPath, stat: Stat) {
        if self.leaves_settling {
            // It is looked at when it has settled, and told with who wrote it.
            if shared.is_dirty(&self.watched.container, &path) {
                return;
            }
            // Its event may still be on its way. Where its change lies ahead, no waiting
            // would make it older.
            let is_young = stat.age().is_some_and(|age| age < shared.settings.settle);
            if self.extent != Extent::Last && is_young {
                return shared.mark_dirty(&self.watched, path, Source::Scan, None);
            }
        }
        let is_whole = |cached: &Cached| {
            // What starts the container is known later than what lies in it.
            // A link is looked at each time: where it leads is not remembered with it.
            match cached.state.file_type {
                FileType::Symlink => {
                    !shared.leads_to_sensitive(&self.watched, &path)
                        && !shared.is_sensitive(&self.watched, &path)
                }
                // Whoever asks for the differences wants to know whether it is one.
                _ => {
                    cached.state.content != Content::Unhashed(Unhashed::NotAProgram)
                        || self.ticket.is_none() && !shared.is_sensitive(&self.watched, &path)
                }
            }
        };
        if let Some(cached) = self.known.remove(&path)
            && cached.stat == stat
            && is_whole(&cached)
        {
            return self.present(shared, path, cached, true);
        }
        let is_stable = is_stable(&stat);
        let Some(directory) = self.directories.last() else { return };
        let compares_data = self.ticket.is_some();
        let looked = directory.open().and_then(|place| {
            let place = OpenPlace { compares_data, ..place };
            entry(shared, &self.watched, layers, place, &path, stat)
        });
        match looked {
            Ok(Look::Reading(reading)) => {
                self.reading = Some(WalkedFile { path, is_stable, reading });
            }
            Ok(Look::Found(found)) => self.found(shared, path, found, is_stable),
            Err(err) if is_gone(&err) => (),
            Err(err) => {
                self.note(format!("cannot read {path}: {err}"));
                let state = state::unopened(&stat);
                self.present(shared, path, Cached { stat, state, lower: None }, false);
            }
        }
    }

    fn found(&mut self, shared: &Shared, path: RootfsPath, found: Found, is_stable: bool) {
        match found {
            Found::Entry { stat, state, lower } => {
                self.present(shared, path, Cached { stat, state, lower }, is_stable);
            }
            Found::Whiteout => self.absent(shared, path),
            Found::Directory => (),
        }
    }

    fn present(&mut self, shared: &Shared, path: RootfsPath, cached: Cached, is_stable: bool) {
        let Cached { state, lower, .. } = &cached;
        if self.extent == Extent::Below
            && !matters(shared, &self.watched, &path, state, lower.as_ref())
        {
            return;
        }
        let writer = self.writer(shared, &path).or_else(|| {
            let is_watched = self.extent != Extent::Stopped;
            is_watched.then(|| shared.last_writer(&self.watched, &cached.stat)).flatten()
        });
        let Cached { stat, state, lower } = cached;
        // What could not be read is tried again next time.
        let is_known = state.content != Content::Unhashed(Unhashed::Unreadable);
        if is_known && is_stable && self.seen.len() < MAX_CACHED {
            self.seen.insert(path.clone(), Cached { stat, state: state.clone(), lower });
        }
        self.push(shared, Fact::Present { path, state, lower, writer });
    }

    fn absent(&mut self, shared: &Shared, path: RootfsPath) {
        let writer = self.writer(shared, &path);
        self.push(shared, Fact::Absent { path, writer });
    }

    /// Who changed a path that has not settled yet: what is found here is told, and
    /// would be told without its writer.
    fn writer(&mut self, shared: &Shared, path: &RootfsPath) -> Option<Arc<Process>> {
        if self.extent == Extent::Stopped {
            return None;
        }
        let known = self.writers.remove(path);
        known.or_else(|| shared.writer_of(&self.watched, path))
    }

    fn push(&mut self, shared: &Shared, fact: Fact) {
        let observation = shared.observation(&self.watched, Timestamp::now(), Source::Scan, fact);
        self.batch.push(observation);
    }

    fn flush(&mut self, shared: &Shared) -> Result<(), Interrupted> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let observations = std::mem::take(&mut self.batch);
        let report = match (self.extent, self.ticket) {
            (Extent::Stopped, Some(ticket)) => {
                SensorEvent::Compared { ticket, observations, end: None }
            }
            (_, ticket) => {
                let container = self.watched.container.clone();
                SensorEvent::ScanBatch { container, ticket, observations }
            }
        };
        if shared.report_patiently(report) { Ok(()) } else { Err(Interrupted) }
    }
}

impl Directory {
    fn open(&self) -> io::Result<OpenPlace<'_>> {
        let Directory { holds_file_whiteouts, in_image, .. } = *self;
        let directory = self.entries.fd()?;
        Ok(OpenPlace { directory, holds_file_whiteouts, in_image, compares_data: false })
    }

    /// The path of a name in the layers below, if this directory hides it.
    fn hides(&self, name: &[u8]) -> Option<RootfsPath> {
        // A whiteout is reported when the walk comes to it.
        let stat = self.open().and_then(|place| file::stat_at(place.directory, name));
        if stat.is_err_and(|err| is_gone(&err)) { self.path.join(name).ok() } else { None }
    }
}

fn is_gone(err: &io::Error) -> bool {
    err.raw_os_error() == Some(libc::ENOENT)
}

/// Whether a hash made now stays true for as long as the file looks the same.
fn is_stable(stat: &Stat) -> bool {
    let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) else { return false };
    let Ok(changed) = u64::try_from(stat.changed.seconds) else { return true };
    now.as_secs() >= changed.saturating_add(STABLE_AFTER.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::held::some_container;

    const CLOSED: Allowed = Allowed { urgent: false, sweeps: false, begin: true };
    const URGENT: Allowed = Allowed { urgent: true, ..CLOSED };
    const SWEEPS: Allowed = Allowed { sweeps: true, ..CLOSED };

    #[track_caller]
    fn check(work: &Work, expected: [bool; 3]) {
        let ready = [CLOSED, URGENT, SWEEPS].map(|allowed| work.is_ready(allowed));
        assert_eq!(ready, expected, "closed, urgent, sweeps");
        // However much waits, no walk begins where too many directories are open.
        let begins = work.walk.is_none() && !work.settles();
        assert!(!begins || !work.is_ready(Allowed { begin: false, ..URGENT }));
    }

    #[test]
    fn w14_sweeps_wait_for_their_pace_and_nothing_else_does() {
        let watched = Arc::new(some_container(1));
        let due = |is_urgent| Some(Due { watched: watched.clone(), is_urgent });
        check(&Work::default(), [false; 3]);
        check(&Work { due: due(false), ..Work::default() }, [false, false, true]);
        check(&Work { due: due(true), ..Work::default() }, [false, true, false]);
        check(&Work { has_settled: true, ..Work::default() }, [false, true, false]);
        let order = ScanRequest::Scan { watched: watched.clone(), ticket: Some(1) };
        check(&Work { orders: [order].into(), ..Work::default() }, [false, true, false]);
        let walk = |is_urgent| Some(Walk::new(&watched, Extent::All, is_urgent));
        let mut work = Work { walk: walk(false), due: due(true), ..Work::default() };
        check(&work, [false, false, true]);
        // What a sweep does not make up for is not to wait for its end.
        work.hurry();
        check(&work, [false, true, false]);
    }
}
