//! What is done in sessions: which programs they run, how those end, and whether a
//! terminal is opened.
//!
//! ```text
//! trace ── records ──> Acts ── of a session? ──> Act ─┐
//! gate ─> processes ── a session opens ──────────────┴─> this thread ─> Report
//! ```
//!
//! The kernel's records say what was run, in which order and when it ended; they are
//! kept for a moment, since a session is told a little later than what it has begun
//! with. How something ended, a handle of the process says that was opened while it
//! lived.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;

use super::calls;
use super::shared::Sessions;
use crate::model::session::MAX_COMMANDS;
use crate::model::{Exit, Fact, Interactive, ProcessIdentity, Run, Source, printable};
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, pidfd};
use crate::threads;
use crate::watch::core::watched::Watched;
use crate::watch::process::activity::{Act, Event, Ran};
use crate::watch::process::named::Named;
use crate::watch::process::recorded;
use crate::watch::process::records::{self, TraceConsumer};
use crate::watch::process::shared::Processes;

/// How long what was run waits for a session that it belongs to, and how much of it.
const BEFORE_OPENING: Duration = Duration::from_secs(3);
const MAX_WAITING: usize = 4 * 1024;
/// Processes of sessions whose end is waited for.
const MAX_RUNNING: usize = 16 * 1024;
/// How long it is remembered how much a session has run that does nothing any more.
const COUNTED: Duration = Duration::from_secs(600);
/// How often those that were run beyond the listed ones are told.
const TELL_MORE_EVERY: Duration = Duration::from_secs(1);

/// By the kernel's records: what sessions run.
#[derive(Default)]
pub(crate) struct Acts {
    /// Run by processes that are of no session, as far as is known yet.
    waiting: VecDeque<(Instant, Ran)>,
    /// When processes ended, while something waits.
    ends: HashMap<u32, u64>,
    /// How many sessions had opened when `waiting` was last looked through.
    opened: u64,
    /// What is told of, and not over, by pid.
    running: HashMap<u32, (ProcessIdentity, Arc<Watched>)>,
    counts: HashMap<ProcessIdentity, Count>,
    told_more: Option<Instant>,
}

/// What one session has run.
struct Count {
    watched: Arc<Watched>,
    told: u64,
    more: u64,
    last: Instant,
}

impl Acts {
    fn ran(&mut self, shared: &Processes, ran: Ran) {
        let count = self.counts.entry(ran.root).or_insert_with(|| Count {
            watched: ran.watched.clone(),
            told: 0,
            more: 0,
            last: Instant::now(),
        });
        count.last = Instant::now();
        if count.told >= MAX_COMMANDS {
            count.more += 1;
            return;
        }
        count.told += 1;
        if self.running.len() < MAX_RUNNING {
            self.running.insert(ran.pid, (ran.root, ran.watched.clone()));
        }
        let watched = ran.watched.clone();
        shared.act(&watched, Act::Ran(ran));
    }
}

impl TraceConsumer for Acts {
    fn executed(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    ) {
        // In the order in which it was run.
        self.look_again(shared);
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

    fn runtime_called(&mut self, shared: &Processes, pid: u32) {
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
        self.look_again(shared);
        self.forget(shared);
    }

    fn lost(&mut self) {
        self.waiting.clear();
    }
}

impl Acts {
    /// A process has ended that was told.
    fn end(&mut self, shared: &Processes, pid: u32, time: u64) {
        let Some((root, watched)) = self.running.remove(&pid) else { return };
        let event =
            Event::Exited { watched: watched.clone(), root, pid, at: records::time_of(time) };
        shared.act(&watched, Act::Event(event));
    }

    /// What was run by processes of sessions that have opened meanwhile.
    fn look_again(&mut self, shared: &Processes) {
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
        if self.told_more.is_none_or(|told| told.elapsed() >= TELL_MORE_EVERY) {
            self.told_more = Some(Instant::now());
            self.counts.retain(|root, count| {
                let times = std::mem::take(&mut count.more);
                if times > 0 {
                    let watched = count.watched.clone();
                    let event = Event::RanMore { watched, root: *root, times };
                    shared.act(&count.watched, Act::Event(event));
                }
                self.running.contains_key(&root.pid) || count.last.elapsed() < COUNTED
            });
        }
    }
}

/// In which session a process has become a program.
fn session_of(
    shared: &Processes,
    watched: &Watched,
    pid: u32,
    at: Timestamp,
) -> Option<ProcessIdentity> {
    let roots = shared.roots();
    let root = roots.of(&watched.container, &shared.births(), Named::now(pid))?;
    // What init was before anybody came to its terminal is the container's own.
    let arrival = roots.at_terminal(watched.init).filter(|_| pid == watched.init.pid);
    let is_own = arrival.is_some_and(|arrival| arrival.session == root && at < arrival.at);
    (!is_own).then_some(root)
}

/// A process whose end is waited for.
struct Running {
    watched: Arc<Watched>,
    root: ProcessIdentity,
    identity: ProcessIdentity,
    process: OwnedFd,
    /// When the kernel's record says that it ended.
    ended: Option<Timestamp>,
}

/// How often it is asked who has ended, where no record told.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Handles of processes that are held open.
const MAX_HANDLES: usize = 2 * 1024;

/// A process of which no handle has come yet.
struct Unheld {
    watched: Arc<Watched>,
    root: ProcessIdentity,
    identity: ProcessIdentity,
    since: Instant,
    ended: Option<Timestamp>,
}

/// How long a handle may come behind what it is of.
const HANDLE_WITHIN: Duration = Duration::from_secs(1);

/// What the thread knows of open sessions.
#[derive(Default)]
struct Eye {
    running: HashMap<u32, Running>,
    /// What was run and of which no handle has come: those come by another way.
    unheld: HashMap<u32, Unheld>,
    /// Handles that nobody has asked for yet.
    alive: HashMap<u32, (ProcessIdentity, OwnedFd, Instant)>,
    interactive: HashMap<ProcessIdentity, bool>,
    /// What is to be told, in its order.
    untold: VecDeque<Untold>,
}

/// What is told when everything before it is.
#[derive(Debug)]
enum Untold {
    Event(Event),
    Looked(Looked),
}

/// A program that was run in a session, as far as it could be looked at.
#[derive(Debug)]
struct Looked {
    ran: Ran,
    since: Instant,
    run: Run,
}

/// For how long what is over waits for whoever was asked about it at the gate and may
/// have read its arguments; and while how many others wait.
const WORDS_WITHIN: Duration = Duration::from_millis(20);
const FEW: usize = 64;
const STEP: Duration = Duration::from_millis(2);
/// How long after a stop the last of them may come.
const LAST_WITHIN: Duration = Duration::from_millis(50);

pub(crate) fn run(shared: &Sessions, acts: &Receiver<Box<Act>>) {
    let mut eye = Eye::default();
    let mut last_look = Instant::now();
    while shared.may_tell() {
        let is_stopping = shared.is_stopping();
        let act = if is_stopping {
            threads::recv_timeout(acts, LAST_WITHIN)
        } else if eye.is_idle() {
            threads::recv_timeout(acts, Duration::MAX)
        } else {
            threads::recv_timeout(acts, if eye.untold.is_empty() { LOOK_EVERY } else { STEP })
        };
        match act {
            Ok(act) => eye.take(shared, *act),
            Err(RecvTimeoutError::Timeout) if is_stopping && eye.untold.is_empty() => return,
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        eye.tell(shared);
        if last_look.elapsed() >= LOOK_EVERY {
            last_look = Instant::now();
            eye.look_who_ended(shared);
        }
    }
    shared.leave(eye.untold.len());
}

impl Eye {
    fn is_idle(&self) -> bool {
        self.running.is_empty()
            && self.alive.is_empty()
            && self.unheld.is_empty()
            && self.untold.is_empty()
    }

    fn take(&mut self, shared: &Sessions, act: Act) {
        match act {
            Act::End => (),
            Act::Runtime { pid } => {
                if let Some(call) = calls::read(pid) {
                    shared.calls().keep(call);
                }
            }
            Act::Alive { identity, process } => {
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
            // At once, while it lives.
            Act::Ran(ran) => {
                let looked = look_at(shared, ran);
                self.untold.push_back(Untold::Looked(looked));
            }
            Act::Event(event) => self.untold.push_back(Untold::Event(event)),
        }
    }

    /// Tells what has happened, in its order.
    fn tell(&mut self, shared: &Processes) {
        while let Some(first) = self.untold.pop_front() {
            match first {
                Untold::Event(event) => self.tell_event(shared, event),
                Untold::Looked(mut looked) => {
                    let Ran { pid, time, exe, .. } = &looked.ran;
                    if looked.run.argv.is_none() {
                        looked.run.argv = recorded::found(shared, (*pid, *time), exe.as_deref());
                    }
                    let waits = looked.run.argv.is_none()
                        && looked.since.elapsed() < WORDS_WITHIN
                        && self.untold.len() < FEW;
                    if waits {
                        self.untold.push_front(Untold::Looked(looked));
                        return;
                    }
                    self.tell_ran(shared, looked);
                }
            }
        }
    }

    fn tell_event(&mut self, shared: &Processes, event: Event) {
        match event {
            Event::Opened { watched, root, is_interactive, process } => {
                if self.interactive.len() >= MAX_HANDLES {
                    self.interactive.clear();
                }
                self.interactive.insert(root, is_interactive);
                if let Some(process) = process.or_else(|| handle_of(root)) {
                    self.wait_for(shared, watched, root, root, process);
                } else {
                    // Gone before anybody looked.
                    let fact = Fact::SessionProcessEnded { root, process: root, exit: None };
                    shared.observe(&watched, Timestamp::now(), Source::Trace, fact);
                }
            }
            Event::RanMore { watched, root, times } => {
                let fact = Fact::SessionRanMore { root, times };
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
                    // Nobody had a handle of it.
                    let process =
                        if pid == root.pid { root } else { ProcessIdentity { pid, start_time: 0 } };
                    let fact = Fact::SessionProcessEnded { root, process, exit: None };
                    shared.observe(&watched, at, Source::Trace, fact);
                }
            },
        }
    }

    fn tell_ran(&mut self, shared: &Processes, looked: Looked) {
        let Looked { ran: Ran { watched, root, pid, at, process, .. }, mut run, .. } = looked;
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
            let fact = Fact::SessionInteractive { root, interactive, tty };
            shared.observe(&watched, at, Source::Trace, fact);
        }
        let fact = Fact::SessionRan { root, run: Arc::new(run) };
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
            // It is waited for already, whatever program it runs.
            return;
        }
        if self.running.len() >= MAX_HANDLES {
            return;
        }
        let running = Running { watched, root, identity, process, ended: None };
        self.running.insert(identity.pid, running);
        self.try_to_end(shared, identity.pid, false);
    }

    fn look_who_ended(&mut self, shared: &Processes) {
        self.alive.retain(|_, (.., since)| since.elapsed() < BEFORE_OPENING);
        let late = |_: &u32, unheld: &mut Unheld| unheld.since.elapsed() >= HANDLE_WITHIN;
        for (_, unheld) in self.unheld.extract_if(late) {
            // Nobody had a handle of it. If it lives, the records tell its end.
            let Unheld { watched, root, identity: process, ended: Some(at), .. } = unheld else {
                continue;
            };
            let fact = Fact::SessionProcessEnded { root, process, exit: None };
            shared.observe(&watched, at, Source::Trace, fact);
        }
        let pids: Vec<u32> = self.running.keys().copied().collect();
        for pid in pids {
            threads::beat();
            self.try_to_end(shared, pid, true);
        }
    }

    /// Tells the end of a process that has ended. With `is_last`, also if how it ended
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
        let fact = Fact::SessionProcessEnded { root, process: identity, exit };
        shared.observe(&watched, ended.unwrap_or_else(Timestamp::now), Source::Trace, fact);
    }
}

/// What is to be seen of a program that was run, while it lives.
fn look_at(shared: &Processes, ran: Ran) -> Looked {
    let Ran { pid, time, exe, .. } = &ran;
    let (pid, time) = (*pid, *time);
    let handle = Handle::open(pid).ok();
    let stat = handle.as_ref().map(Handle::first_stat);
    let identity = stat.map(|stat| stat.identity).unwrap_or(ProcessIdentity { pid, start_time: 0 });
    let tty = stat.and_then(procfs::Stat::tty);
    let argv = recorded::recorded(shared, pid, time, time);
    // It may have gone on to another program meanwhile: then these are not its words.
    let is_still_it =
        |handle: &Handle| exe.as_ref().is_none_or(|exe| handle.exe().is_ok_and(|now| now == *exe));
    let argv = argv.or_else(|| {
        let handle = handle.as_ref()?;
        let argv = handle.arguments().ok()??;
        is_still_it(handle).then(|| argv.iter().map(|argument| printable(argument)).collect())
    });
    let exe = exe.as_deref();
    let exe = exe.map(|exe| printable(exe.strip_suffix(file::DELETED).unwrap_or(exe)));
    let run = Run { process: identity, exe, argv, tty };
    Looked { ran, since: Instant::now(), run }
}

fn handle_of(identity: ProcessIdentity) -> Option<OwnedFd> {
    let process = pidfd::open(identity.pid).ok()?;
    // The number may have been another's before it was opened.
    Handle::open_exactly(identity).ok()?;
    Some(process)
}

/// How a process ended that nobody has waited for yet.
fn exit_of(identity: ProcessIdentity) -> Option<Exit> {
    Handle::open_exactly(identity).ok()?.exit()
}
