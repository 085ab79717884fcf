//! Session activity: which programs a session runs, how they end, and whether a terminal
//! is opened.
//!
//! `SessionActivity` takes the records of the thread `trace` and finds the session of each.
//! The thread `sessions` (`run`) receives that as [`Activity`], completes it from /proc and
//! reports it to the pipeline. This file does not decide what opens a session: `opening` does.
//!
//! ```text
//! trace ── records ──> SessionActivity ── of a session? ──> Activity ─┐
//! gate ─> processes ── a session opens ───────────────────────────────┴─> this thread ─> report
//! ```
//!
//! The kernel's records show what was run, in which order and when it ended. `SessionActivity`
//! keeps them for a moment, since a session is reported a little later than its first programs.
//! How a process ended comes from a handle that was opened while the process lived.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;

use super::invocations;
use super::shared::Sessions;
use crate::model::session::MAX_COMMANDS;
use crate::model::{Exit, Fact, Interactive, ProcessIdentity, Run, SessionFact, Source, printable};
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, pidfd};
use crate::threads;
use crate::watch::core::watched::Watched;
use crate::watch::process::activity::{Activity, Event, Ran};
use crate::watch::process::named::Named;
use crate::watch::process::recorded;
use crate::watch::process::records::{self, TraceConsumer};
use crate::watch::process::shared::Processes;

/// How long executions wait for the opening of their session, and how many may wait.
const BEFORE_OPENING: Duration = Duration::from_secs(3);
const MAX_WAITING: usize = 4 * 1024;
/// The maximum number of session processes whose end is awaited.
const MAX_RUNNING: usize = 16 * 1024;
/// How long the count of an inactive session's executions is kept.
const COUNTED: Duration = Duration::from_secs(600);
/// How often the number of executions beyond the listed ones is reported.
const REPORT_MORE_EVERY: Duration = Duration::from_secs(1);

/// What sessions run, by the kernel's records.
#[derive(Default)]
pub(crate) struct SessionActivity {
    /// Executions by processes of no known session, oldest first.
    waiting: VecDeque<(Instant, Ran)>,
    /// When processes ended, by pid. Kept only while `waiting` is not empty.
    ends: HashMap<u32, u64>,
    /// How many sessions had opened when `waiting` was last checked.
    opened: u64,
    /// Processes that were reported and have not ended, by pid.
    running: HashMap<u32, (ProcessIdentity, Arc<Watched>)>,
    counts: HashMap<ProcessIdentity, Count>,
    reported_more: Option<Instant>,
}

/// How much one session has run.
struct Count {
    watched: Arc<Watched>,
    reported: u64,
    more: u64,
    last: Instant,
}

impl SessionActivity {
    fn ran(&mut self, shared: &Processes, ran: Ran) {
        let count = self.counts.entry(ran.root).or_insert_with(|| Count {
            watched: ran.watched.clone(),
            reported: 0,
            more: 0,
            last: Instant::now(),
        });
        count.last = Instant::now();
        if count.reported >= MAX_COMMANDS {
            count.more += 1;
            return;
        }
        count.reported += 1;
        if self.running.len() < MAX_RUNNING {
            self.running.insert(ran.pid, (ran.root, ran.watched.clone()));
        }
        let watched = ran.watched.clone();
        shared.note_activity(&watched, Activity::Ran(ran));
    }
}

impl TraceConsumer for SessionActivity {
    fn executed(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    ) {
        // Keeps the order of execution: older executions of new sessions come first.
        self.pass_on_waiting(shared);
        let at = records::time_of(executed.time);
        let root = session_of(shared, watched, executed.pid, at);
        let mut ran = Ran {
            watched: watched.clone(),
            root: root.unwrap_or(ProcessIdentity { pid: 0, start_time: 0 }),
            pid: executed.pid,
            at,
            exe: program.map(|program| program.name.to_vec()),
            time: executed.time,
            process: None,
        };
        if root.is_some() {
            ran.process = pidfd::open(executed.pid).ok();
            self.ran(shared, ran);
            return;
        }
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back((Instant::now(), ran));
    }

    fn runtime_invoked(&mut self, shared: &Processes, pid: u32) {
        shared.note_runtime(pid);
    }

    fn exited(&mut self, shared: &Processes, pid: u32, time: u64) {
        shared.roots().ended(pid, procfs::ticks_since_boot());
        if !self.waiting.is_empty() && self.ends.len() < 2 * MAX_WAITING {
            self.ends.insert(pid, time);
        }
        self.end(shared, pid, time);
    }

    fn turn(&mut self, shared: &Processes) {
        self.pass_on_waiting(shared);
        self.forget(shared);
    }

    fn lost(&mut self) {
        self.waiting.clear();
    }
}

impl SessionActivity {
    /// Passes on the end of a process, if the process was reported.
    fn end(&mut self, shared: &Processes, pid: u32, time: u64) {
        let Some((root, watched)) = self.running.remove(&pid) else { return };
        let event =
            Event::Exited { watched: watched.clone(), root, pid, at: records::time_of(time) };
        shared.note_activity(&watched, Activity::Event(event));
    }

    /// Passes on waiting executions whose sessions have opened meanwhile.
    fn pass_on_waiting(&mut self, shared: &Processes) {
        let opened = shared.roots().opened();
        if opened != self.opened {
            self.opened = opened;
            for (since, mut ran) in std::mem::take(&mut self.waiting) {
                let root = || session_of(shared, &ran.watched, ran.pid, ran.at);
                match ran.watched.has_sessions().then(root).flatten() {
                    Some(root) => {
                        ran.root = root;
                        let (pid, time) = (ran.pid, ran.time);
                        let ended = self.ends.get(&pid).copied().filter(|ended| *ended >= time);
                        if ended.is_none() {
                            ran.process = pidfd::open(pid).ok();
                        }
                        self.ran(shared, ran);
                        if let Some(ended) = ended {
                            self.end(shared, pid, ended);
                        }
                    }
                    None => self.waiting.push_back((since, ran)),
                }
            }
        }
    }

    fn forget(&mut self, shared: &Processes) {
        while self.waiting.front().is_some_and(|(since, _)| since.elapsed() > BEFORE_OPENING) {
            self.waiting.pop_front();
        }
        if self.waiting.is_empty() {
            self.ends.clear();
        }
        if self.reported_more.is_none_or(|last| last.elapsed() >= REPORT_MORE_EVERY) {
            self.reported_more = Some(Instant::now());
            self.counts.retain(|root, count| {
                let times = std::mem::take(&mut count.more);
                if times > 0 {
                    let watched = count.watched.clone();
                    let event = Event::RanMore { watched, root: *root, times };
                    shared.note_activity(&count.watched, Activity::Event(event));
                }
                self.running.contains_key(&root.pid) || count.last.elapsed() < COUNTED
            });
        }
    }
}

/// The session to which an execution of this process at this time belongs.
fn session_of(
    shared: &Processes,
    watched: &Watched,
    pid: u32,
    at: Timestamp,
) -> Option<ProcessIdentity> {
    let roots = shared.roots();
    let root = roots.of(&watched.container, &shared.births(), Named::now(pid))?;
    // What init executed before a client attached to its terminal belongs to the
    // container, not to the session.
    let arrival = roots.at_terminal(watched.init).filter(|_| pid == watched.init.pid);
    let is_own = arrival.is_some_and(|arrival| arrival.session == root && at < arrival.at);
    (!is_own).then_some(root)
}

/// A process whose end is awaited.
struct Running {
    watched: Arc<Watched>,
    root: ProcessIdentity,
    identity: ProcessIdentity,
    process: OwnedFd,
    /// When it ended, by the kernel's record.
    ended: Option<Timestamp>,
}

/// How often processes are checked for having ended without a record.
const CHECK_EVERY: Duration = Duration::from_millis(250);
/// The maximum number of process handles that are held open.
const MAX_HANDLES: usize = 2 * 1024;

/// A process whose handle has not arrived yet.
struct Unheld {
    watched: Arc<Watched>,
    root: ProcessIdentity,
    identity: ProcessIdentity,
    since: Instant,
    ended: Option<Timestamp>,
}

/// How much later than the execution the handle of its process may arrive.
const HANDLE_WITHIN: Duration = Duration::from_secs(1);

/// What the thread `sessions` knows about open sessions.
#[derive(Default)]
struct Tracker {
    running: HashMap<u32, Running>,
    /// Processes whose handle has not arrived: handles come from another thread.
    unheld: HashMap<u32, Unheld>,
    /// Handles that no execution has used yet.
    alive: HashMap<u32, (ProcessIdentity, OwnedFd, Instant)>,
    interactive: HashMap<ProcessIdentity, bool>,
    /// What is to be reported, in order.
    unreported: VecDeque<Unreported>,
}

/// Something to be reported, after everything before it.
#[derive(Debug)]
enum Unreported {
    Event(Event),
    Inspected(Inspected),
}

/// A program that was run in a session, with what could be read of it.
#[derive(Debug)]
struct Inspected {
    ran: Ran,
    since: Instant,
    run: Run,
}

/// How long an execution without arguments waits for the gate's thread, which may have
/// read them; and the number of later reports from which on it does not wait.
const ARGUMENTS_WITHIN: Duration = Duration::from_millis(20);
const FEW: usize = 64;
const STEP: Duration = Duration::from_millis(2);
/// How long after a stop the last session activity may arrive.
const LAST_WITHIN: Duration = Duration::from_millis(50);

pub(crate) fn run(shared: &Sessions, activity: &Receiver<Box<Activity>>) {
    let mut tracker = Tracker::default();
    let mut last_check = Instant::now();
    while shared.may_report() {
        let is_stopping = shared.is_stopping();
        let act = if is_stopping {
            threads::recv_timeout(activity, LAST_WITHIN)
        } else if tracker.is_idle() {
            threads::recv_timeout(activity, Duration::MAX)
        } else {
            threads::recv_timeout(
                activity,
                if tracker.unreported.is_empty() { CHECK_EVERY } else { STEP },
            )
        };
        match act {
            Ok(act) => tracker.take(shared, *act),
            Err(RecvTimeoutError::Timeout) if is_stopping && tracker.unreported.is_empty() => {
                return;
            }
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        tracker.report(shared);
        if last_check.elapsed() >= CHECK_EVERY {
            last_check = Instant::now();
            tracker.check_ended(shared);
        }
    }
    shared.leave(tracker.unreported.len());
}

impl Tracker {
    fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.alive.is_empty()
            && self.unheld.is_empty()
            && self.unreported.is_empty()
    }

    fn take(&mut self, shared: &Sessions, act: Activity) {
        match act {
            Activity::End => (),
            Activity::Runtime { pid } => {
                if let Some(invocation) = invocations::read(pid) {
                    shared.invocations().keep(invocation);
                }
            }
            Activity::Alive { identity, process } => {
                if let Some(unheld) = self.unheld.remove(&identity.pid) {
                    let Unheld { watched, root, ended, .. } = unheld;
                    self.wait_for(shared, watched, root, identity, process);
                    if let Some(running) = self.running.get_mut(&identity.pid) {
                        running.ended = ended;
                    }
                } else if self.alive.len() < MAX_HANDLES {
                    self.alive.insert(identity.pid, (identity, process, Instant::now()));
                }
            }
            // Read at once, while the process lives.
            Activity::Ran(ran) => {
                let inspected = inspect(shared, ran);
                self.unreported.push_back(Unreported::Inspected(inspected));
            }
            Activity::Event(event) => self.unreported.push_back(Unreported::Event(event)),
        }
    }

    /// Reports what has happened, in order.
    fn report(&mut self, shared: &Processes) {
        while let Some(first) = self.unreported.pop_front() {
            match first {
                Unreported::Event(event) => self.report_event(shared, event),
                Unreported::Inspected(mut inspected) => {
                    let Ran { pid, time, exe, .. } = &inspected.ran;
                    if inspected.run.argv.is_none() {
                        inspected.run.argv = recorded::found(shared, (*pid, *time), exe.as_deref());
                    }
                    let waits = inspected.run.argv.is_none()
                        && inspected.since.elapsed() < ARGUMENTS_WITHIN
                        && self.unreported.len() < FEW;
                    if waits {
                        self.unreported.push_front(Unreported::Inspected(inspected));
                        return;
                    }
                    self.report_ran(shared, inspected);
                }
            }
        }
    }

    fn report_event(&mut self, shared: &Processes, event: Event) {
        match event {
            Event::Opened { watched, root, is_interactive, process } => {
                if self.interactive.len() >= MAX_HANDLES {
                    self.interactive.clear();
                }
                self.interactive.insert(root, is_interactive);
                if let Some(process) = process.or_else(|| handle_of(root)) {
                    self.wait_for(shared, watched, root, root, process);
                } else {
                    // It ended before a handle could be opened.
                    let fact = Fact::Session(SessionFact::ProcessEnded {
                        root,
                        process: root,
                        exit: None,
                    });
                    shared.observe(&watched, Timestamp::now(), Source::Trace, fact);
                }
            }
            Event::RanMore { watched, root, times } => {
                let fact = Fact::Session(SessionFact::RanMore { root, times });
                shared.observe(&watched, Timestamp::now(), Source::Trace, fact);
            }
            Event::Exited { watched, root, pid, at } => match self.running.get_mut(&pid) {
                Some(running) if running.root == root => {
                    running.ended = Some(at);
                    self.try_to_end(shared, pid, false);
                }
                Some(_) | None => {
                    if let Some(unheld) = self.unheld.get_mut(&pid) {
                        unheld.ended = Some(at);
                        return;
                    }
                    // There was no handle of it.
                    let process =
                        if pid == root.pid { root } else { ProcessIdentity { pid, start_time: 0 } };
                    let fact =
                        Fact::Session(SessionFact::ProcessEnded { root, process, exit: None });
                    shared.observe(&watched, at, Source::Trace, fact);
                }
            },
        }
    }

    fn report_ran(&mut self, shared: &Processes, inspected: Inspected) {
        let Inspected { ran: Ran { watched, root, pid, at, process, .. }, mut run, .. } = inspected;
        let alive = self.alive.remove(&pid);
        if let Some((identity, ..)) = &alive
            && run.process.start_time == 0
        {
            run.process = *identity;
        }
        let process = process.or(alive.map(|(_, process, _)| process));
        let (identity, tty) = (run.process, run.tty.clone());
        if tty.is_some()
            && let Some(is_interactive) = self.interactive.get_mut(&root)
            && !std::mem::replace(is_interactive, true)
        {
            let interactive = Interactive::TerminalLater;
            let fact = Fact::Session(SessionFact::Interactive { root, interactive, tty });
            shared.observe(&watched, at, Source::Trace, fact);
        }
        let fact = Fact::Session(SessionFact::Ran { root, run: Arc::new(run) });
        shared.observe(&watched, at, Source::Trace, fact);
        match process {
            Some(process) => self.wait_for(shared, watched, root, identity, process),
            None if !self.running.contains_key(&pid) && self.unheld.len() < MAX_HANDLES => {
                let since = Instant::now();
                let unheld = Unheld { watched, root, identity, since, ended: None };
                self.unheld.insert(pid, unheld);
            }
            None => (),
        }
    }

    fn wait_for(
        &mut self,
        shared: &Processes,
        watched: Arc<Watched>,
        root: ProcessIdentity,
        identity: ProcessIdentity,
        process: OwnedFd,
    ) {
        if let Some(known) = self.running.get(&identity.pid)
            && (known.identity == identity || identity.start_time == 0)
        {
            // Its end is awaited already, whatever program it runs.
            return;
        }
        if self.running.len() >= MAX_HANDLES {
            return;
        }
        let running = Running { watched, root, identity, process, ended: None };
        self.running.insert(identity.pid, running);
        self.try_to_end(shared, identity.pid, false);
    }

    fn check_ended(&mut self, shared: &Processes) {
        self.alive.retain(|_, (.., since)| since.elapsed() < BEFORE_OPENING);
        let late = |_: &u32, unheld: &mut Unheld| unheld.since.elapsed() >= HANDLE_WITHIN;
        for (_, unheld) in self.unheld.extract_if(late) {
            // There was no handle of it. If it lives, a record will show its end.
            let Unheld { watched, root, identity: process, ended: Some(at), .. } = unheld else {
                continue;
            };
            let fact = Fact::Session(SessionFact::ProcessEnded { root, process, exit: None });
            shared.observe(&watched, at, Source::Trace, fact);
        }
        let pids: Vec<u32> = self.running.keys().copied().collect();
        for pid in pids {
            threads::beat();
            self.try_to_end(shared, pid, true);
        }
    }

    /// Reports the end of a process that has ended. With `is_last`, also if how it ended
    /// is not known.
    fn try_to_end(&mut self, shared: &Processes, pid: u32, is_last: bool) {
        let Some(running) = self.running.get(&pid) else { return };
        let exit = pidfd::exit(running.process.as_fd()).or_else(|| exit_of(running.identity));
        let has_ended = exit.is_some() || pidfd::has_ended(running.process.as_fd());
        if !has_ended || exit.is_none() && !is_last {
            return;
        }
        let Some(running) = self.running.remove(&pid) else { return };
        let Running { watched, root, identity, ended, .. } = running;
        if identity == root {
            self.interactive.remove(&root);
        }
        let fact = Fact::Session(SessionFact::ProcessEnded { root, process: identity, exit });
        shared.observe(&watched, ended.unwrap_or_else(Timestamp::now), Source::Trace, fact);
    }
}

/// Reads what /proc and the records show of an execution, while the process lives.
fn inspect(shared: &Processes, ran: Ran) -> Inspected {
    let Ran { pid, time, exe, .. } = &ran;
    let (pid, time) = (*pid, *time);
    let handle = Handle::open(pid).ok();
    let stat = handle.as_ref().map(Handle::first_stat);
    let identity = stat.map(|stat| stat.identity).unwrap_or(ProcessIdentity { pid, start_time: 0 });
    let tty = stat.and_then(procfs::Stat::tty);
    let argv = recorded::recorded(shared, pid, time, time);
    // The process may have executed another program meanwhile. Then /proc shows the
    // arguments of that one.
    let runs_it_still =
        |handle: &Handle| exe.as_ref().is_none_or(|exe| handle.exe().is_ok_and(|now| now == *exe));
    let argv = argv.or_else(|| {
        let handle = handle.as_ref()?;
        let argv = handle.arguments().ok()??;
        runs_it_still(handle).then(|| argv.iter().map(|argument| printable(argument)).collect())
    });
    let exe = exe.as_deref();
    let exe = exe.map(|exe| printable(exe.strip_suffix(file::DELETED).unwrap_or(exe)));
    let run = Run { process: identity, exe, argv, tty };
    Inspected { ran, since: Instant::now(), run }
}

fn handle_of(identity: ProcessIdentity) -> Option<OwnedFd> {
    let process = pidfd::open(identity.pid).ok()?;
    // The pid may have been reused before the handle was opened.
    Handle::open_exactly(identity).ok()?;
    Some(process)
}

/// How a process ended whose parent has not waited for it yet.
fn exit_of(identity: ProcessIdentity) -> Option<Exit> {
    Handle::open_exactly(identity).ok()?.exit()
}
