//! What the watchers' threads have in common: the table, the way out, the flag
//! that ends them, and the one place where a loss is counted and answered.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, SendTimeoutError, Sender, TrySendError};
use jiff::Timestamp;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::fair;
use super::fair::Owned;
use super::fair::Pace;
use super::fair::Waits;
use super::message::SensorEvent;
use super::table::Table;
use super::table::Watched;
use crate::config;
use crate::health::{Backlog, Failure, Health};
use crate::model::{
    Ancestor, ContainerId, Fact, Observation, Process, ProcessIdentity, RootfsPath, Source,
};
use crate::sys::file;
use crate::sys::procfs::{self, Handle};
use crate::threads;
use crate::watch::code::inspect::Hashed;
use crate::watch::exec::content::Described;
use crate::watch::exec::unproven::Unproven;
use crate::watch::files::closings::Closings;
use crate::watch::files::lower::LowerTwins;
use crate::watch::files::names::Names;
use crate::watch::files::packages::Births;
use crate::watch::files::packages::Packages;
use crate::watch::files::writers::Named;
use crate::watch::files::writers::Writer;
use crate::watch::files::writers::Writers;
use crate::watch::files::writers::record_time_of;
use crate::watch::process::arguments::Arguments;
use crate::watch::process::arguments::Program;
use crate::watch::process::arguments::Recorded;
use crate::watch::process::describe;
use crate::watch::process::roots::Roots;
use crate::watch::sessions::acts::Act;
use crate::watch::sessions::attachments::Attachments;
use crate::watch::sessions::calls::Calls;
use crate::watch::sessions::opening::Sessions;
use crate::watch::sessions::terminals::Terminals;

/// How long a stop waits for what was seen before it.
/// How many parents of a process are described by the kernel's records.
const MAX_RECORDED_PARENTS: usize = 16;

pub(in crate::watch) const LAST_WORDS: Duration = Duration::from_secs(4);

/// What a queue has for its thread.
pub(in crate::watch) enum Next<T> {
    Item(T),
    /// Nothing came in time.
    Nothing,
    /// The thread is to end.
    End,
}

pub(in crate::watch) struct Shared {
    pub(in crate::watch) settings: config::Watch,
    pub(in crate::watch) table: Table,
    pub(in crate::watch) health: Arc<Health>,
    pub(in crate::watch) lower_twins: LowerTwins,
    pub(in crate::watch) hashed: Hashed,
    pub(in crate::watch) names: Names,
    pub(in crate::watch) closings: Closings,
    pub(in crate::watch) attachments: Attachments,
    pub(in crate::watch) terminals: Terminals,
    reports: Sender<Box<SensorEvent>>,
    dirty: Mutex<HashMap<ContainerId, Dirty>>,
    /// Where executions and code wait for a thread.
    stages: OnceLock<Vec<(&'static str, Arc<dyn Waits>)>>,
    /// What reading and walking may take of the processors, for all containers.
    pace: Mutex<Pace>,
    sessions: Mutex<Sessions>,
    roots: Mutex<Roots>,
    acts: Sender<Box<Act>>,
    calls: Mutex<Calls>,
    /// Files on other filesystems about which the gate was asked, by who executes
    /// them: the kernel's records come later and must not tell them again.
    asked: Mutex<HashMap<u32, Vec<Asked>>>,
    arguments: Mutex<Arguments>,
    unproven: Mutex<Unproven<Described>>,
    packages: Mutex<Packages>,
    births: Mutex<Births>,
    writers: Mutex<Writers>,
    unsent_losses: Mutex<Vec<SensorEvent>>,
    wake_scan: Sender<()>,
    stopped_at: OnceLock<Instant>,
    /// What threads had taken from their queues when there was no more time for it.
    untold: AtomicU64,
    /// Readable once the watchers are to stop.
    end: OwnedFd,
    records_executions: AtomicBool,
    records_arguments: AtomicBool,
    /// Executions that the gate has answered and that have been taken from it.
    pub(in crate::watch) gate_taken: AtomicU64,
    /// The gate's process was asked to end.
    pub(in crate::watch) is_gate_closed: AtomicBool,
    /// Of the thread that is asked before a runtime runs, if there is one.
    pub(in crate::watch) arming: Arming,
    /// Since when containers are watched, as processes tell when they started.
    began: u64,
}

/// A file about which the gate was asked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    file: (u64, u64),
    /// By the clock of the kernel's records.
    at: u64,
}

/// What is known of the thread that is asked before a runtime runs.
#[derive(Debug, Default)]
pub(in crate::watch) struct Arming {
    /// Since when, in the clock ticks by which processes tell when they started;
    /// unset without such a thread.
    pub(in crate::watch) since: OnceLock<u64>,
}

/// More paths of one container than this are not waited for one by one: it is
/// walked. One container's flood takes nothing from another.
const MAX_DIRTY_PATHS: usize = 4 * 1024;

/// How many paths of one container are taken at once.
const TAKEN: usize = 32;

/// Changed files that have settled and wait to be looked at.
const SETTLED: &str = "settled";

/// Reading large files and walking takes at most one processor in so many, when what
/// it saved up is used.
const PART: u32 = 2;
const BURST: Duration = Duration::from_secs(2);

/// Losses that wait for room in the pipeline.
const MAX_UNSENT_LOSSES: usize = 1024;

/// Processes whose executions the kernel's records have not told of yet, and files
/// that one of them may have tried.
const MAX_ASKED: usize = 4 * 1024;
const MAX_ASKED_OF_ONE: usize = 16;

/// How long a scan waits for room in the pipeline before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// What of one container has changed and is to be looked at when it has been left
/// alone.
#[derive(Default)]
struct Dirty {
    paths: HashMap<RootfsPath, DirtyPath>,
    sweep: Option<Instant>,
}

struct DirtyPath {
    watched: Arc<Watched>,
    writer: Option<Writer>,
    /// `Change` if it was written, `Scan` if it was only executed.
    source: Source,
    first: Instant,
    last: Instant,
    /// Somebody is looking at it.
    is_taken: bool,
}

/// A path that is being looked at.
pub(in crate::watch) struct Settled {
    pub(in crate::watch) path: RootfsPath,
    pub(in crate::watch) watched: Arc<Watched>,
    pub(in crate::watch) writer: Option<Writer>,
    pub(in crate::watch) source: Source,
}

impl Shared {
    pub(in crate::watch) fn new(
        settings: config::Watch,
        reports: Sender<Box<SensorEvent>>,
        health: Arc<Health>,
        wake_scan: Sender<()>,
        acts: Sender<Box<Act>>,
    ) -> io::Result<Shared> {
        let end = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let names = Names::new();
        Ok(Shared {
            settings,
            table: Table::default(),
            health,
            lower_twins: LowerTwins::default(),
            hashed: Hashed::default(),
            attachments: Attachments::new(names.group()),
            closings: Closings::new(),
            names,
            terminals: Terminals::new(),
            reports,
            dirty: Mutex::default(),
            stages: OnceLock::new(),
            pace: Mutex::new(Pace::new(PART, BURST, Instant::now())),
            sessions: Mutex::default(),
            roots: Mutex::default(),
            acts,
            calls: Mutex::default(),
            asked: Mutex::default(),
            arguments: Mutex::default(),
            unproven: Mutex::default(),
            packages: Mutex::default(),
            births: Mutex::default(),
            writers: Mutex::default(),
            unsent_losses: Mutex::default(),
            wake_scan,
            stopped_at: OnceLock::new(),
            untold: AtomicU64::new(0),
            end,
            records_executions: AtomicBool::new(false),
            is_gate_closed: AtomicBool::new(false),
            records_arguments: AtomicBool::new(false),
            gate_taken: AtomicU64::new(0),
            arming: Arming::default(),
            began: crate::sys::procfs::ticks_since_boot(),
        })
    }

    pub(in crate::watch) fn stop(&self) {
        let _ = self.stopped_at.set(Instant::now());
        // Full, it is readable already.
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
        self.wake_scan();
        // Full, its reader is awake.
        let _ = self.acts.try_send(Box::new(Act::End));
    }

    /// Whether what was seen is still told: after a stop for a moment more, since no
    /// walk finds what was executed.
    pub(in crate::watch) fn may_tell(&self) -> bool {
        self.stopped_at.get().is_none_or(|stopped_at| stopped_at.elapsed() < LAST_WORDS)
    }

    /// The next item of a thread's queue. Whoever fills it ends when the watchers do;
    /// what a stop has no more time for is counted.
    pub(in crate::watch) fn next_to_tell<T: Owned>(&self, queue: &fair::Receiver<T>) -> Option<T> {
        match self.next_within(queue, Duration::MAX) {
            Next::Item(item) => Some(item),
            Next::Nothing | Next::End => None,
        }
    }

    /// The same, for as long as `patience`.
    pub(in crate::watch) fn next_within<T: Owned>(
        &self,
        queue: &fair::Receiver<T>,
        patience: Duration,
    ) -> Next<T> {
        // A stop makes nobody wait for longer than it takes itself.
        match queue.recv_timeout(patience) {
            Ok(item) if self.may_tell() => Next::Item(item),
            Ok(_) => {
                self.leave(1);
                Next::End
            }
            Err(RecvTimeoutError::Timeout) if self.may_tell() => Next::Nothing,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// Counts what a stop has no more time for.
    pub(in crate::watch) fn leave(&self, items: usize) {
        self.untold.fetch_add(items as u64, Ordering::Relaxed);
    }

    /// What was taken from queues and could not be told before the stop was over.
    pub(in crate::watch) fn untold(&self) -> u64 {
        self.untold.load(Ordering::Relaxed)
    }

    /// Says where executions and code wait.
    pub(in crate::watch) fn set_stages(&self, stages: Vec<(&'static str, Arc<dyn Waits>)>) {
        let _ = self.stages.set(stages);
    }

    /// What waits, of each container in each place, and for how long.
    pub(in crate::watch) fn backlogs(&self) -> Vec<Backlog> {
        let now = Instant::now();
        let stages = self.stages.get().into_iter().flatten();
        let waiting = stages.flat_map(|(stage, waits)| {
            waits.waiting().into_iter().map(|waiting| (*stage, waiting))
        });
        let settled = self.overdue(now).into_iter().map(|waiting| (SETTLED, waiting));
        let backlog = |(stage, (container, waiting, since)): (_, fair::Waiting)| Backlog {
            stage,
            container: container.to_string(),
            waiting,
            oldest: now.saturating_duration_since(since),
        };
        waiting.chain(settled).map(backlog).collect()
    }

    /// Something that can wait has used the processor for so long.
    pub(in crate::watch) fn spend(&self, used: Duration) {
        self.pace().spend(used);
    }

    /// How long what can wait has to, so that it takes no more than its part of the
    /// processors.
    pub(in crate::watch) fn rest(&self) -> Duration {
        self.pace().wait(Instant::now())
    }

    /// Waits for that long, or until a stop.
    pub(in crate::watch) fn keep_pace(&self) {
        loop {
            let rest = self.rest();
            if rest.is_zero() || self.is_stopping() {
                return;
            }
            threads::idle(|| std::thread::sleep(rest.min(Duration::from_millis(20))));
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody has come into a container.
    pub(in crate::watch) fn note_session(&self, watched: &Watched) {
        watched.set_has_sessions();
        if let Some(pulse) = self.health.pulse.get() {
            pulse.handles().store(1, Ordering::Relaxed);
        }
    }

    pub(in crate::watch) fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// Waits until there is something to read, or the watchers are to stop.
    pub(in crate::watch) fn wait_for(&self, events: impl AsFd, at_most: Option<Duration>) {
        let mut fds = [events.as_fd(), self.end.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let at_most = at_most.and_then(|at_most| Timespec::try_from(at_most).ok());
        // An error here (a signal) only means that the turn comes early.
        let _ = threads::idle(|| rustix::event::poll(&mut fds, at_most.as_ref()));
    }

    /// Waits until the watchers are to stop, or `at_most` so long.
    pub(in crate::watch) fn wait_for_stop(&self, at_most: Duration) {
        self.wait_for(&self.end, Some(at_most));
    }

    /// The kernel records every execution for us.
    pub(in crate::watch) fn set_records_executions(&self) {
        drop(self.unproven().forget_all(crate::sys::perf::now()));
        self.records_executions.store(true, Ordering::Release);
    }

    pub(in crate::watch) fn records_executions(&self) -> bool {
        self.records_executions.load(Ordering::Acquire)
    }

    /// The kernel records arguments for us.
    pub(in crate::watch) fn set_records_arguments(&self) {
        self.records_arguments.store(true, Ordering::Release);
    }

    pub(in crate::watch) fn records_arguments(&self) -> bool {
        self.records_arguments.load(Ordering::Acquire)
    }

    /// Whether the daemon watched already when this container began.
    pub(in crate::watch) fn has_begun_before(&self, init: ProcessIdentity) -> bool {
        init.start_time > self.began
    }

    pub(in crate::watch) fn wake_scan(&self) {
        // Full: it has been woken already and has not looked yet.
        let _ = self.wake_scan.try_send(());
    }

    /// Whether what a path holds matters, be it a program or not.
    pub(in crate::watch) fn is_sensitive(&self, watched: &Watched, path: &RootfsPath) -> bool {
        self.settings.persistence.matches(path)
            || watched.is_entry_point(path)
            || watched.ways.leading_to(path).is_some_and(|as_well| {
                self.settings.persistence.matches(&as_well) || watched.is_entry_point(&as_well)
            })
            || self.known_as(watched, path).is_some()
    }

    /// The sensitive path for which this one stands in the image.
    fn known_as(&self, watched: &Watched, path: &RootfsPath) -> Option<RootfsPath> {
        watched.ways.known_as(path, |as_well| self.settings.persistence.matches(as_well))
    }

    /// Whether what lies below a path may matter, so that it does not stand for itself
    /// if it is a link.
    pub(in crate::watch) fn leads_to_sensitive(
        &self,
        watched: &Watched,
        path: &RootfsPath,
    ) -> bool {
        let persistence = &self.settings.persistence;
        persistence.leads_to(path)
            || watched.ways.leading_to(path).is_some_and(|path| persistence.leads_to(&path))
    }

    pub(in crate::watch) fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::watch) fn packages(&self) -> MutexGuard<'_, Packages> {
        self.packages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who changed a file a moment ago.
    pub(in crate::watch) fn writer(&self, watched: &Arc<Watched>, pid: u32) -> Writer {
        let named = Named::now(pid);
        let process = self.writers().describe(pid, watched);
        if let Some(process) = &process {
            self.packages().looked_at(self, watched, process);
        }
        let process = self.completed(named, process);
        Writer { named, process }
    }

    /// Who wrote a file a moment ago, which is remembered of the file.
    pub(in crate::watch) fn writer_to(
        &self,
        watched: &Arc<Watched>,
        pid: u32,
        stat: &file::Stat,
    ) -> Writer {
        let writer = self.writer(watched, pid);
        self.writers().remember(watched.device, stat, writer.clone());
        writer
    }

    /// Who wrote a file of the upper layer last, by whatever name.
    pub(in crate::watch) fn last_writer(
        &self,
        watched: &Watched,
        stat: &file::Stat,
    ) -> Option<Arc<Process>> {
        let writer = self.writers().of(watched.device, stat)?;
        self.process_of(watched, writer)
    }

    /// The process, if it was looked at or descended from a package manager.
    pub(in crate::watch) fn process_of(
        &self,
        watched: &Watched,
        writer: Writer,
    ) -> Option<Arc<Process>> {
        let Writer { named, process } = writer;
        let descended = self.packages().descended(watched, &self.births(), named);
        let process = match (process, descended) {
            // Known by the records alone, which name its parents and not their start times:
            // those of a package manager's descendants say whose transaction it is.
            (Some(recorded), Some(descended)) if recorded.identity.start_time == 0 => {
                let Process { exe, argv, .. } = Process::clone(&recorded);
                Some(Arc::new(Process { exe, argv, ..Process::clone(&descended) }))
            }
            // Its parents had ended when it was looked at.
            (Some(process), Some(descended))
                if [0, process.identity.start_time].contains(&descended.identity.start_time)
                    && process.ancestors.len() < descended.ancestors.len() =>
            {
                let ancestors = descended.ancestors.clone();
                Some(Arc::new(Process { ancestors, ..Process::clone(&process) }))
            }
            (process, descended) => process.or(descended),
        };
        self.completed(named, process)
    }

    fn completed(&self, named: Named, process: Option<Arc<Process>>) -> Option<Arc<Process>> {
        match process {
            Some(known) if known.exe.is_some() && known.argv.is_some() => Some(known),
            Some(known) => Some(Arc::new(self.complete(named, Process::clone(&known)))),
            None => self.recorded_process(named).map(Arc::new),
        }
    }

    /// Adds what the kernel's records say of a process that had ended, or was ending, when
    /// it was looked at.
    pub(in crate::watch) fn complete(&self, named: Named, mut known: Process) -> Process {
        let Some(recorded) = self.recorded_process(named) else { return known };
        // What was read while it was ending is of the same program, or of none.
        if known.exe.is_none() || known.exe == recorded.exe {
            known.exe = recorded.exe;
            known.argv = known.argv.or(recorded.argv);
        }
        if known.ancestors.len() < recorded.ancestors.len() {
            known.ancestors = recorded.ancestors;
        }
        known
    }

    /// A process by the kernel's records alone. `None` if it has run nothing lately.
    pub(in crate::watch) fn recorded_process(&self, named: Named) -> Option<Process> {
        let mut pids = vec![named.pid];
        pids.extend(self.births().parents_of(named).take(MAX_RECORDED_PARENTS));
        let at = record_time_of(named.read_at);
        let mut programs: Vec<Option<Program>> = {
            let arguments = self.arguments();
            pids.iter().map(|pid| arguments.running(*pid, at)).collect()
        };
        if programs.iter().all(Option::is_none) {
            // What they run was executed before the container was watched.
            let unrecorded = |pid: &u32| self.unrecorded_program(Named { pid: *pid, ..named }, at);
            for (program, pid) in programs.iter_mut().zip(&pids) {
                *program = unrecorded(pid);
                if program.is_some() {
                    break;
                }
            }
        }
        // One that has executed nothing runs what its parent does.
        let of = |index: usize| programs[index..].iter().flatten().next().cloned();
        let identity = |pid| ProcessIdentity { pid, start_time: 0 };
        let Program { exe, argv } = of(0)?;
        let ancestors = pids.iter().enumerate().skip(1).filter_map(|(index, pid)| {
            let Program { exe, argv } = of(index)?;
            Some(Ancestor { identity: identity(*pid), exe, argv })
        });
        Some(Process {
            identity: identity(named.pid),
            exe,
            argv,
            uid: None,
            tty: None,
            root: None,
            ancestors: ancestors.collect(),
        })
    }

    /// What a container's process runs that was there at a time, and has executed nothing
    /// since.
    fn unrecorded_program(&self, named: Named, at: u64) -> Option<Program> {
        let handle = Handle::open(named.pid).ok()?;
        let stat = handle.first_stat();
        let is_it = stat.identity.start_time <= named.read_at && !stat.has_ended();
        let is_containers = || self.table.of_process(&handle).is_some();
        if !is_it || !is_containers() {
            return None;
        }
        let Ancestor { exe, argv, .. } = describe::ancestor(&handle);
        // Asked last: an execve meanwhile is recorded by then, or was read as no program.
        let has_executed = self.arguments().of(named.pid, at, u64::MAX) != Recorded::NotYet;
        (exe.is_some() && !has_executed).then_some(Program { exe, argv })
    }

    pub(in crate::watch) fn births(&self) -> MutexGuard<'_, Births> {
        self.births.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writers(&self) -> MutexGuard<'_, Writers> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The gate was asked about a file at that time, by its device and inode, and it is
    /// reported as that.
    pub(in crate::watch) fn note_asked(&self, pid: u32, file: (u64, u64), at: u64) {
        let mut asked = self.asked();
        if asked.len() >= MAX_ASKED && !asked.contains_key(&pid) {
            // Told twice is better than never.
            asked.clear();
        }
        let files = asked.entry(pid).or_default();
        if files.len() < MAX_ASKED_OF_ONE {
            files.push(Asked { file, at });
        }
    }

    /// Waits for a moment until what the gate has answered by now is taken from it, so
    /// that it is known before the kernel's record of the same execution is looked at.
    pub(in crate::watch) fn wait_for_gate(&self) {
        let Some(pulse) = self.health.pulse.get() else { return };
        let answered = pulse.answers().load(Ordering::SeqCst);
        self.wait_until(|| {
            let lost = pulse.dropped().load(Ordering::Relaxed);
            self.gate_taken.load(Ordering::Acquire) + lost >= answered
        });
    }

    /// Waits until something is so, for a tenth of a second at most.
    pub(in crate::watch) fn wait_until(&self, is_so: impl Fn() -> bool) {
        const STEP: Duration = Duration::from_micros(100);
        const AT_MOST: u32 = 1000;
        for _ in 0..AT_MOST {
            if is_so() || self.is_stopping() {
                return;
            }
            std::thread::sleep(STEP);
        }
    }

    /// A container that began while driftd ran was not marked before its entry point ran.
    pub(in crate::watch) fn armed_late(&self, watched: &Watched) {
        let Watched { container, init, .. } = watched;
        let _ = self.health.record(Failure::ArmedLate);
        let marked = Timestamp::now();
        let began = marked - procfs::age(*init);
        tracing::warn!(%container, "its entry point ran before its marks were in place");
        let (container, pid) = (container.clone(), init.pid);
        self.say(SensorEvent::Unarmed { container, pid, began, marked });
    }

    /// How many executions the gate has answered that were not taken from it.
    pub(in crate::watch) fn untaken(&self) -> u64 {
        let Some(pulse) = self.health.pulse.get() else { return 0 };
        let answered = pulse.answers().load(Ordering::SeqCst);
        let lost = pulse.dropped().load(Ordering::Relaxed);
        answered.saturating_sub(self.gate_taken.load(Ordering::Acquire) + lost)
    }

    /// What the gate was asked about between a process's last execve and this time, by
    /// the clock of the kernel's records. What it was asked later is of a later one.
    pub(in crate::watch) fn take_asked(&self, pid: u32, until: u64) -> Vec<(u64, u64)> {
        let mut asked = self.asked();
        let Some(files) = asked.get_mut(&pid) else { return Vec::new() };
        let taken = files.extract_if(.., |asked| asked.at <= until).map(|asked| asked.file);
        let taken = taken.collect();
        if files.is_empty() {
            asked.remove(&pid);
        }
        taken
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<u32, Vec<Asked>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was seen, and in which session it was done.
    pub(in crate::watch) fn observation(
        &self,
        watched: &Watched,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> Observation {
        self.observation_of(watched, None, at, source, fact)
    }

    fn observation_of(
        &self,
        watched: &Watched,
        file_of: Option<ContainerId>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> Observation {
        let session = fact.process().and_then(|process| {
            let named = Named::now(process.identity.pid);
            self.roots().of(&watched.container, &self.births(), named)
        });
        let reached_as = match &fact {
            Fact::Present { path, .. } => {
                watched.ways.leading_to(path).or_else(|| self.known_as(watched, path))
            }
            _ => None,
        };
        let (container, init) = (watched.container.clone(), watched.init);
        Observation { container, init, at, source, session, file_of, reached_as, fact }
    }

    pub(in crate::watch) fn roots(&self) -> MutexGuard<'_, Roots> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the thread that keeps an eye on sessions, without ever waiting.
    pub(in crate::watch) fn act(&self, watched: &Arc<Watched>, act: Act) {
        match self.acts.try_send(Box::new(act)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(_)) => self.lose(
                Failure::ProcessQueueFull,
                Some(watched),
                "too many acts of sessions wait to be looked at",
            ),
        }
    }

    /// With what arguments processes have become programs.
    pub(in crate::watch) fn arguments(&self) -> MutexGuard<'_, Arguments> {
        self.arguments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executions that the kernel has not recorded.
    pub(in crate::watch) fn unproven(&self) -> MutexGuard<'_, Unproven<Described>> {
        self.unproven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What runtimes were called for lately.
    pub(in crate::watch) fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A runtime was called; without room it is asked when a session opens.
    pub(in crate::watch) fn note_runtime(&self, pid: u32) {
        let _ = self.acts.try_send(Box::new(Act::Runtime { pid }));
    }

    /// Hands an observation on without ever waiting; false if it was lost.
    pub(in crate::watch) fn observe(
        &self,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> bool {
        self.observe_file_of(watched, None, at, source, fact)
    }

    /// The same of a file that lies in the root of another container, if `file_of` is
    /// one.
    pub(in crate::watch) fn observe_file_of(
        &self,
        watched: &Arc<Watched>,
        file_of: Option<ContainerId>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> bool {
        let observation = self.observation_of(watched, file_of, at, source, fact);
        match self.reports.try_send(Box::new(SensorEvent::Observed(observation))) {
            // Nobody listens any more: the daemon is ending.
            Ok(()) | Err(TrySendError::Disconnected(_)) => true,
            Err(TrySendError::Full(_)) => {
                self.lose(
                    Failure::PipelineFull,
                    Some(watched),
                    "the pipeline has no room for an observation",
                );
                false
            }
        }
    }

    /// Counts a loss, asks for the walks that make up for it, and says so once
    /// until that walk has begun.
    pub(in crate::watch) fn lose(
        &self,
        failure: Failure,
        watched: Option<&Arc<Watched>>,
        detail: &str,
    ) {
        // The reaction to every failure of the watchers is a rescan.
        let _ = self.health.record(failure);
        // Before the walk is asked for: one that begins after this makes up for it.
        let at = Timestamp::now();
        // Each failure by itself: a flood of one must not hide another.
        let is_news = |watched: &Arc<Watched>| {
            watched.ask_for_rescan();
            watched.loses(failure)
        };
        let is_news = match watched {
            Some(watched) => is_news(watched),
            None => self.table.all().iter().filter(|watched| is_news(watched)).count() > 0,
        };
        if is_news {
            let container = watched.map(|watched| watched.container.clone());
            tracing::warn!(
                failure = failure.name(),
                container = container.as_ref().map(tracing::field::display),
                "{detail}"
            );
            self.say(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
        }
        self.wake_scan();
    }

    /// Says what must not be dropped, without waiting: where there is no room, the scan
    /// thread says it later.
    pub(in crate::watch) fn say(&self, report: SensorEvent) {
        if let Err(TrySendError::Full(report)) = self.reports.try_send(Box::new(report)) {
            let _ = self.health.record(Failure::PipelineFull);
            let mut unsent = self.unsent_losses();
            // There are few for each container between two walks of it; more are
            // counted, and the walk makes up for them all the same.
            if unsent.len() < MAX_UNSENT_LOSSES {
                unsent.push(*report);
            }
        }
    }

    /// Says that less is seen from now on, once for each caller's news, until
    /// [`restore`](Shared::restore) says that this is over or the container ends. No
    /// walk is asked for: it would not help.
    pub(in crate::watch) fn degrade(
        &self,
        failure: Failure,
        watched: Option<&Watched>,
        detail: &str,
    ) {
        let _ = self.health.record(failure);
        let container = watched.map(|watched| watched.container.clone());
        tracing::warn!(
            failure = failure.name(),
            container = container.as_ref().map(tracing::field::display),
            "{detail}"
        );
        let at = Timestamp::now();
        self.say(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
    }

    /// What was degraded is seen again.
    pub(in crate::watch) fn restore(&self, failure: Failure, watched: Option<&Watched>) {
        let container = watched.map(|watched| watched.container.clone());
        self.say(SensorEvent::Over { failure, container });
    }

    /// Hands an observation on and waits for room, for the scan thread only.
    pub(in crate::watch) fn observe_patiently(
        &self,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) {
        let observation = self.observation(watched, at, source, fact);
        if !self.report_patiently(SensorEvent::Observed(observation)) && !self.is_stopping() {
            self.lose(
                Failure::PipelineFull,
                Some(watched),
                "the pipeline had no room for an observation for half a minute",
            );
        }
    }

    fn unsent_losses(&self) -> MutexGuard<'_, Vec<SensorEvent>> {
        self.unsent_losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the losses that found no room, for the scan thread only.
    pub(in crate::watch) fn report_losses(&self) {
        let unsent = std::mem::take(&mut *self.unsent_losses());
        for lost in unsent {
            if !self.report_patiently(lost) {
                return;
            }
        }
    }

    /// Sends without waiting and hands the report back if there is no room.
    #[expect(clippy::result_large_err, reason = "the report is the caller's own, handed back")]
    pub(in crate::watch) fn try_report(&self, report: SensorEvent) -> Result<(), SensorEvent> {
        match self.reports.try_send(Box::new(report)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(report)) => Err(*report),
        }
    }

    /// Waits for room in the pipeline, for the scan thread only. Whether it was
    /// sent.
    #[must_use]
    pub(in crate::watch) fn report_patiently(&self, report: SensorEvent) -> bool {
        let mut report = Box::new(report);
        let deadline = Instant::now() + PATIENCE;
        while !self.is_stopping() {
            let sent = || self.reports.send_timeout(report, Duration::from_millis(100));
            match threads::blocked(sent) {
                Ok(()) => return true,
                Err(SendTimeoutError::Disconnected(_)) => return false,
                Err(SendTimeoutError::Timeout(unsent)) if Instant::now() < deadline => {
                    report = unsent;
                }
                Err(SendTimeoutError::Timeout(_)) => return false,
            }
        }
        false
    }

    /// Whether the pipeline has caught up enough for what can wait.
    pub(in crate::watch) fn has_room(&self) -> bool {
        match self.reports.capacity() {
            Some(capacity) => self.reports.len() <= capacity / 2,
            None => true,
        }
    }

    fn dirty(&self) -> MutexGuard<'_, HashMap<ContainerId, Dirty>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a path is to be looked at once it has settled. The scan thread
    /// looks often enough to need no waking.
    pub(in crate::watch) fn mark_dirty(
        &self,
        watched: &Arc<Watched>,
        path: RootfsPath,
        source: Source,
        writer: Option<Writer>,
    ) {
        let now = Instant::now();
        let mut all = self.dirty();
        let dirty = all.entry(watched.container.clone()).or_default();
        if let Some(entry) = dirty.paths.get_mut(&path) {
            if std::mem::take(&mut entry.is_taken) {
                entry.first = now;
            }
            entry.last = now;
            entry.watched = watched.clone();
            entry.writer = writer.or(entry.writer.take());
            if source == Source::Change {
                entry.source = source;
            }
        } else if dirty.paths.len() < MAX_DIRTY_PATHS {
            let watched = watched.clone();
            let (first, last) = (now, now);
            let entry = DirtyPath { watched, writer, source, first, last, is_taken: false };
            dirty.paths.insert(path, entry);
        } else {
            // A walk finds it too; only who wrote it is not known any more.
            drop(all);
            self.health.left_to_sweeps.fetch_add(1, Ordering::Relaxed);
            watched.ask_for_walk();
        }
    }

    /// Whether a path will be looked at by itself.
    pub(in crate::watch) fn is_dirty(&self, container: &ContainerId, path: &RootfsPath) -> bool {
        self.dirty().get(container).is_some_and(|dirty| dirty.paths.contains_key(path))
    }

    /// Who wrote a path that has not settled yet, if that is known.
    pub(in crate::watch) fn writer_of(
        &self,
        watched: &Watched,
        path: &RootfsPath,
    ) -> Option<Arc<Process>> {
        let writer = self.dirty().get(&watched.container)?.paths.get(path)?.writer.clone()?;
        self.process_of(watched, writer)
    }

    /// Who wrote a file last, whatever it is called by now.
    pub(in crate::watch) fn writer_of_file(
        &self,
        watched: &Watched,
        stat: &file::Stat,
    ) -> Option<Arc<Process>> {
        let writer = self.writers().of(watched.device, stat)?;
        self.process_of(watched, writer)
    }

    /// Notes that a container's upperdir is to be walked once it has settled.
    pub(in crate::watch) fn mark_for_sweep(&self, watched: &Arc<Watched>) {
        let due = Instant::now() + self.settings.settle;
        self.dirty().entry(watched.container.clone()).or_default().sweep.get_or_insert(due);
    }

    /// Takes the sweeps that are due.
    pub(in crate::watch) fn take_due_sweeps(&self, now: Instant) -> Vec<ContainerId> {
        let mut all = self.dirty();
        let is_due = |dirty: &Dirty| dirty.sweep.is_some_and(|due| due <= now);
        let due = all.iter_mut().filter(|(_, dirty)| is_due(dirty));
        due.map(|(container, dirty)| {
            dirty.sweep = None;
            container.clone()
        })
        .collect()
    }

    /// Containers of which paths have settled, or never do: how many, and since when
    /// the oldest is due.
    pub(in crate::watch) fn overdue(&self, now: Instant) -> Vec<fair::Waiting> {
        let settle = self.settings.settle;
        let mut all = self.dirty();
        all.retain(|_, dirty| !dirty.paths.is_empty() || dirty.sweep.is_some());
        let overdue = all.iter().filter_map(|(container, dirty)| {
            let due = dirty.paths.values().map(|path| path.due(settle)).filter(|due| *due <= now);
            let (waiting, oldest) = due.fold((0, None), |(waiting, oldest), due| {
                (waiting + 1, Some(oldest.map_or(due, |oldest: Instant| oldest.min(due))))
            });
            Some((container.clone(), waiting, oldest?))
        });
        overdue.collect()
    }

    /// Takes some paths of a container that have settled. They stay known until they
    /// are [`done`](Self::done), and are sorted, so that neighbours follow each other.
    pub(in crate::watch) fn take_settled(
        &self,
        container: &ContainerId,
        now: Instant,
    ) -> Vec<Settled> {
        let settle = self.settings.settle;
        let mut all = self.dirty();
        let Some(dirty) = all.get_mut(container) else { return Vec::new() };
        let due =
            dirty.paths.iter_mut().filter(|(_, path)| !path.is_taken && path.due(settle) <= now);
        let taken = due.take(TAKEN).map(|(path, dirty)| {
            dirty.is_taken = true;
            let DirtyPath { watched, writer, source, .. } = dirty;
            let (path, watched, writer) = (path.clone(), watched.clone(), writer.clone());
            Settled { path, watched, writer, source: *source }
        });
        let mut taken: Vec<Settled> = taken.collect();
        taken.sort_by(|one, other| one.path.cmp(&other.path));
        taken
    }

    /// A path that was taken has been looked at. It stays if it has changed since.
    pub(in crate::watch) fn done(&self, container: &ContainerId, path: &RootfsPath) {
        if let Some(dirty) = self.dirty().get_mut(container)
            && dirty.paths.get(path).is_some_and(|path| path.is_taken)
        {
            dirty.paths.remove(path);
        }
    }

    /// Takes all of one container's paths, with who wrote them.
    pub(in crate::watch) fn take_dirty_of(
        &self,
        container: &ContainerId,
    ) -> Vec<(RootfsPath, Writer)> {
        let dirty = self.dirty().remove(container).map(|dirty| dirty.paths).unwrap_or_default();
        dirty.into_iter().filter_map(|(path, dirty)| Some((path, dirty.writer?))).collect()
    }

    /// How many paths have not been looked at yet.
    pub(in crate::watch) fn unsettled(&self) -> u64 {
        self.dirty().values().map(|dirty| dirty.paths.len() as u64).sum()
    }

    /// When the next path or sweep is due.
    pub(in crate::watch) fn next_due(&self) -> Option<Instant> {
        let settle = self.settings.settle;
        let all = self.dirty();
        let paths = all.values().flat_map(|dirty| dirty.paths.values());
        let paths = paths.filter(|path| !path.is_taken);
        let sweeps = all.values().filter_map(|dirty| dirty.sweep);
        paths.map(|path| path.due(settle)).chain(sweeps).min()
    }

    /// Forgets a container that has ended, or this attachment of it.
    pub(in crate::watch) fn forget(&self, watched: &Arc<Watched>) {
        self.table.remove(watched);
        self.names.forget(watched);
        self.roots().forget(&watched.container);
    }
}

impl DirtyPath {
    /// A file that is written all the time must be judged all the same.
    fn due(&self, settle: Duration) -> Instant {
        (self.last + settle).min(self.first + settle * 10)
    }
}
