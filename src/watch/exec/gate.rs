//! Takes the executions that the gate's process has answered, and finds the container of
//! each file.
//!
//! The gate answers before it hands anything on, so no process waits for this thread. The
//! thread must not wait either: it passes each execution to other threads by channels, and
//! what a full channel refuses is a named loss. It must not read files or describe
//! processes.
//!
//! ```text
//! gate's process ── Executed ──> own layer, other ──> take thread (with the file)
//!                                filesystem, or changed in a layer
//!                            └─> image layer ───────> processes thread (file closed)
//!                ── Runtime ───> arming
//! ```
//!
//! With `watch.gate = "notify"` no process waits at all: the kernel reports executions to
//! a group of this process, and `Feed` handles them in the same way.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::execution::Execution;
use super::questions::{Asking, New, NewRead, Stage};
use super::repeats::{self, Repeats};
use super::shared::Exec;
use super::take;
use crate::gate::{self, Asked, Calm, Decision, Decisions, Events, File, Marks};
use crate::health::Failure;
use crate::model::{Fact, FileFact, Filesystem, Observation};
use crate::pulse::{Pulse, TURN};
use crate::sys::fanotify::{Buffer, Event, Group, Incoming, Range, ReadError};
use crate::sys::procfs::{self, Handle, Stat, Whereabouts};
use crate::sys::{file, perf, pidfd};
use crate::threads;
use crate::watch::core::copy::Copy;
use crate::watch::core::copyup::Residence;
use crate::watch::core::fair::Sender;
use crate::watch::core::held::Held;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::mounts::find;
use crate::watch::process::describe::Caller;
use crate::watch::process::seen::Seen;

/// How much one read may bring: about a hundred events, each with a descriptor.
const READ_BYTES: usize = 4 * 1024;

/// How long the thread that is notified rests after nothing but unchanged programs.
const PACE: Duration = Duration::from_millis(2);

/// How many executions may wait for a decision: as many as the gate lets wait.
const MAX_WAITING: usize = 1024;

/// After a stop, the gate's process gets this long to end.
const LAST_PACKETS: Duration = Duration::from_secs(4);

/// An execution, as the gate or the kernel reports it.
struct Arrival {
    file: OwnedFd,
    stat: file::Stat,
    caller: Caller,
    /// The namespaces and the control group of the process, if the gate has read them.
    whereabouts: Option<Whereabouts>,
    at: Timestamp,
    /// Set if the file may be ignored from now on.
    calm: Option<Calm>,
}

/// What [`Gate`] and [`Feed`] have in common.
pub(crate) struct Arrivals {
    pub(crate) shared: Arc<Exec>,
    pub(crate) marks: Marks,
    pub(crate) pulse: Arc<Pulse>,
    pub(crate) content: take::Entrance,
    pub(crate) repeats: RefCell<Repeats>,
    pub(crate) processes: Sender<Box<Seen>>,
}

/// Takes what the gate's process hands on.
pub(crate) struct Gate {
    pub(crate) arrivals: Arrivals,
    pub(crate) events: Events,
    pub(crate) invocations: crossbeam_channel::Sender<Invocation>,
    pub(crate) waiting: Waiting,
    /// Counts the turns of this thread.
    pub(crate) turns: Arc<AtomicU64>,
    pub(crate) losses: Losses,
}

/// Executions that wait for a decision, by number.
pub(crate) struct Waiting {
    arrivals: RefCell<HashMap<u64, Arrival>>,
    asking: Sender<Asking>,
    decisions: Decisions,
}

/// The gate's counts of losses when they were last read.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    dropped: Cell<u64>,
    unreadable: Cell<u64>,
    late: Cell<u64>,
    undecided: Cell<u64>,
}

impl Waiting {
    pub(crate) fn new(asking: Sender<Asking>, decisions: Decisions) -> Waiting {
        Waiting { arrivals: RefCell::default(), asking, decisions }
    }
}

impl Gate {
    /// Ends when the gate's process has ended and all that it handed on is taken.
    pub(crate) fn run(self) {
        // Without CAP_SYS_NICE this thread runs like the others, and later under load.
        let _ = rustix::process::setpriority_process(None, -10);
        let shared = &self.arrivals.shared;
        let mut last = Instant::now();
        loop {
            wait_for(&self.events);
            self.turns.fetch_add(1, Ordering::Relaxed);
            loop {
                match self.events.receive() {
                    Ok(event) => {
                        last = Instant::now();
                        threads::beat();
                        self.take(event);
                    }
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                    Err(err) if err.kind() == io::ErrorKind::InvalidData => {
                        let detail = format!("a message of the gate is not readable: {err}");
                        shared.lose(Failure::EventUnreadable, None, &detail);
                        shared.gate_taken.fetch_add(1, Ordering::Release);
                    }
                    Err(err) => {
                        self.note_losses();
                        if !shared.is_gate_closed.load(Ordering::Relaxed) {
                            tracing::error!("the gate's process has ended: {err}");
                        }
                        return;
                    }
                }
            }
            self.note_losses();
            if shared.is_stopping() && last.elapsed() > LAST_PACKETS {
                tracing::warn!(
                    "the gate's process does not end; the executions that it still holds are lost"
                );
                return;
            }
        }
    }

    /// Reports what the gate itself could not hand on.
    fn note_losses(&self) {
        let Arrivals { shared, pulse, .. } = &self.arrivals;
        let is_news = |counter: &AtomicU64, seen: &Cell<u64>| {
            let now = counter.load(Ordering::Relaxed);
            seen.replace(now) != now
        };
        if is_news(pulse.dropped(), &self.losses.dropped) {
            let detail = "more programs were executed than could be handed on";
            shared.lose(Failure::GateQueueFull, None, detail);
        }
        if is_news(pulse.unreadable(), &self.losses.unreadable) {
            let detail = "an event of the gate could not be opened";
            shared.lose(Failure::EventUnreadable, None, detail);
        }
        if is_news(pulse.late(), &self.losses.late) {
            let detail = "a runtime was allowed to run before its container was marked";
            shared.lose(Failure::ArmedLate, None, detail);
        }
        if is_news(pulse.undecided(), &self.losses.undecided) {
            let detail = "programs that rules may deny were answered without a decision";
            shared.lose(Failure::Undecided, None, detail);
        }
    }

    fn take(&self, event: gate::Event) {
        match event {
            gate::Event::Executed { asked, process, file, handle } => {
                let caller =
                    Caller { stat: process, pid: asked.pid, asked: Some(asked.at), pidfd: handle };
                self.executed(asked, caller, file);
            }
            gate::Event::Reads { asked, range, file } => self.reads(asked, range, file),
            gate::Event::Answered { number, denied, at, is_read: true } => {
                self.answered_read(number, denied, at);
            }
            gate::Event::Answered { number, denied, at, is_read: false } => {
                self.answered(number, denied, at);
            }
            gate::Event::Runtime { number, process } => {
                let Arrivals { shared, marks, .. } = &self.arrivals;
                let Some(process) = process else { return marks.release(number) };
                if self.invocations.try_send(Invocation { number, caller: process }).is_err() {
                    marks.release(number);
                    let detail = "too many runtimes run at once to examine each one";
                    shared.lose(Failure::ArmedLate, None, detail);
                }
            }
        }
    }
}

impl Gate {
    fn executed(&self, asked: Asked, caller: Caller, file: OwnedFd) {
        let at = Timestamp::from_nanosecond(asked.time.into()).unwrap_or_default();
        match asked.stat {
            Ok(stat) => {
                let Asked { whereabouts, calm, waits, .. } = asked;
                let seen = Arrival { file, stat, caller, whereabouts, at, calm };
                match waits {
                    None => self.arrivals.hand_on(seen),
                    // It is taken when it is answered.
                    Some(number) => return self.ask(number, seen),
                }
            }
            Err(errno) => self.arrivals.lose_sight(&io::Error::from_raw_os_error(errno)),
        }
        self.arrivals.shared.gate_taken.fetch_add(1, Ordering::Release);
    }

    /// Has it decided whether a program may run that waits under this number.
    fn ask(&self, number: u64, seen: Arrival) {
        match self.arrivals.question(&seen) {
            Ok(new) => self.send(Asking { number, stage: Stage::New(Box::new(new)) }),
            Err(decision) => self.waiting.decisions.decide(number, decision),
        }
        let mut arrivals = self.waiting.arrivals.borrow_mut();
        if arrivals.len() >= MAX_WAITING {
            // The gate lets no more wait: the others were answered, and that was not handed on.
            let dropped = arrivals.len() as u64;
            arrivals.clear();
            let detail = format!("the answers to {dropped} programs were not handed on");
            self.arrivals.shared.lose(Failure::GateQueueFull, None, &detail);
        }
        arrivals.insert(number, seen);
    }

    /// An execution that waited was answered.
    fn answered(&self, number: u64, denied: bool, at: u64) {
        let shared = &self.arrivals.shared;
        let observed = shared.observed().take(number);
        if let Some(mut seen) = self.waiting.arrivals.borrow_mut().remove(&number) {
            if !denied {
                // The kernel records its execve after this moment.
                seen.caller.asked = Some(at);
                if let Some(process) = &seen.caller.stat {
                    shared.observed().allowed(process.identity, &seen.stat);
                }
                self.arrivals.hand_on(seen);
            } else if let Some((observation, _)) = observed
                && let Fact::File(FileFact::Executed { path, .. }) = &observation.fact
            {
                shared.observed().denied(seen.caller.pid, at, path.clone());
                self.report_denial(observation);
            }
        }
        shared.gate_taken.fetch_add(1, Ordering::Release);
    }

    fn report_denial(&self, mut observation: Observation) {
        let shared = &self.arrivals.shared;
        observation.set_denied();
        let container = observation.container.clone();
        if shared.try_report(SensorEvent::Observed(observation)).is_err() {
            let watched = shared.table.get(&container);
            let detail = "the pipeline has no room for an observation";
            shared.lose(Failure::PipelineFull, watched.as_ref(), detail);
        }
    }

    /// Has it decided whether a thread may read a guarded file.
    fn reads(&self, asked: Asked, range: Option<Range>, file: OwnedFd) {
        let Asked { pid: thread, time, stat, whereabouts, waits, .. } = asked;
        let Some(number) = waits else { return };
        let table = &self.arrivals.shared.table;
        let watched = whereabouts.as_ref().and_then(|it| table.of_whereabouts(it));
        let at = Timestamp::from_nanosecond(time.into()).unwrap_or_default();
        match (watched, stat) {
            (Some(watched), Ok(stat)) => {
                let read = NewRead { watched, file, stat, range, thread, at };
                self.send(Asking { number, stage: Stage::Read(Box::new(read)) });
            }
            _ => self.waiting.decisions.decide(number, Decision::None),
        }
    }

    /// A question that finds no room, or that makes room for another one, is not decided.
    fn send(&self, asking: Asking) {
        let dropped = match self.waiting.asking.try_send(asking) {
            Ok(()) => return,
            Err(TrySendError::Full(dropped) | TrySendError::Disconnected(dropped)) => dropped,
        };
        self.waiting.decisions.decide(dropped.number, Decision::None);
    }

    /// A thread that waited to read a guarded file may read it, or may not.
    fn answered_read(&self, number: u64, denied: bool, at: u64) {
        let shared = &self.arrivals.shared;
        let observed = shared.observed().take(number);
        let Some((observation, file)) = observed.filter(|_| denied) else { return };
        if let Some(process) = observation.fact.process()
            && let Some(watched) = shared.table.get(&observation.container)
        {
            shared.guards.deny(&watched, process.identity.pid, &file, at);
        }
        self.report_denial(observation);
    }
}

/// Waits until there is something to take, also during a stop.
fn wait_for(events: &Events) {
    let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
    let turn = Timespec::try_from(TURN).expect("a quarter of a second fits");
    // An error here (a signal) only means that the turn comes early.
    let _ = threads::idle(|| rustix::event::poll(&mut fds, Some(&turn)));
}

/// Takes the executions that the kernel reports without a permission event.
pub(crate) struct Feed {
    pub(crate) arrivals: Arrivals,
    pub(crate) group: Arc<Group>,
}

impl Feed {
    pub(crate) fn run(self) {
        let _ = rustix::process::setpriority_process(None, -10);
        let Feed { arrivals, group } = self;
        let shared = &arrivals.shared;
        let mut buffer = Buffer::new();
        let mut may_rest = false;
        while !shared.is_stopping() {
            if may_rest {
                shared.wait_for_stop(PACE);
            } else {
                shared.wait_for(&*group, Some(TURN));
            }
            may_rest = false;
            match group.read(&mut buffer, READ_BYTES) {
                Ok(incoming) => {
                    may_rest = !incoming.is_empty();
                    incoming.into_iter().for_each(|incoming| match incoming {
                        Incoming::Notification(event) => may_rest &= arrivals.notified(event),
                        // This group gets no permission events.
                        Incoming::Permission(_) => (),
                        Incoming::Overflow => shared.lose(
                            Failure::KernelQueueOverflow,
                            None,
                            "the kernel dropped events of executions",
                        ),
                    });
                }
                Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                    Some(Errno::AGAIN | Errno::INTR) => (),
                    Some(Errno::BADF | Errno::INVAL | Errno::FAULT) | None => {
                        panic!("executions cannot be read any more: {err}")
                    }
                    // The event is consumed, and its container is not known.
                    Some(_) => shared.lose(
                        Failure::EventUnreadable,
                        None,
                        &format!("an event of an execution could not be opened: {err}"),
                    ),
                },
                Err(ReadError::Malformed(err)) => panic!("executions cannot be read: {err}"),
            }
        }
    }
}

impl Arrivals {
    /// A program has been opened for execution, and its process has not waited for an
    /// answer. Returns whether it is an unchanged one of an image.
    fn notified(&self, event: Event) -> bool {
        let file = file::stat(&event.file);
        let is_known = |stat| self.shared.unchanged().is_some_and(|files| files.holds(stat));
        if file.as_ref().is_ok_and(is_known) {
            self.pulse.unchanged().fetch_add(1, Ordering::Relaxed);
            return true;
        }
        let stat = procfs::read_stat(event.pid).ok();
        let caller = Caller { stat, pid: event.pid, asked: None, pidfd: None };
        let at = Timestamp::now();
        self.pulse.answers().fetch_add(1, Ordering::Relaxed);
        match file {
            Ok(stat) => {
                let Event { file, .. } = event;
                let (whereabouts, calm) = (None, None);
                self.hand_on(Arrival { file, stat, caller, whereabouts, at, calm });
            }
            Err(err) => self.lose_sight(&err),
        }
        self.shared.gate_taken.fetch_add(1, Ordering::Release);
        false
    }

    fn lose_sight(&self, err: &io::Error) {
        self.shared.lose(
            Failure::EventUnreadable,
            None,
            &format!("an executed file could not be examined: {err}"),
        );
    }

    fn container_of(&self, seen: &Arrival) -> Option<(Arc<Watched>, Filesystem)> {
        let Arrival { file, stat, caller, whereabouts, .. } = seen;
        let owner = self.shared.table.owner(stat).map(|owner| (owner, Filesystem::Overlay));
        owner.or_else(|| {
            // The gate has not read it: no process has waited, or the file was on a
            // container's own overlay.
            let now = || Some(Handle::open(caller.pid).ok()?.whereabouts());
            let whereabouts = whereabouts.clone().or_else(now)?;
            let found = find::whose(&self.shared.table, file, stat, &whereabouts)?;
            let at = caller.asked.unwrap_or_else(perf::now);
            self.shared.note_asked(caller.pid, (stat.device, stat.inode), at);
            Some(found)
        })
    }

    /// What is to be decided about an execution that waits, or the decision if nothing is.
    fn question(&self, seen: &Arrival) -> Result<New, Decision> {
        let Some((watched, filesystem)) = self.container_of(seen) else {
            return Err(Decision::Allow);
        };
        let stat = &seen.stat;
        let (layer_file, is_movable) = match standing(&watched, filesystem, stat) {
            Standing::Own => (None, false),
            Standing::Doubtful(layer_file) => (Some(layer_file), false),
            Standing::Movable(layer_file) => (Some(layer_file), true),
            Standing::Image => return Err(Decision::Allow),
        };
        // A process that is not visible here is in no container, or is gone.
        let caller = seen.caller.stat.clone().ok_or(Decision::None)?;
        let file = seen.file.try_clone().map_err(|_| Decision::None)?;
        let (stat, at) = (*stat, seen.at);
        Ok(New { watched, filesystem, file, stat, layer_file, is_movable, caller, at })
    }

    /// Copies a short file of a tmpfs in memory and closes it.
    fn close_early(
        &self,
        filesystem: Filesystem,
        file: OwnedFd,
        stat: &file::Stat,
    ) -> Result<OwnedFd, (Vec<u8>, Copy)> {
        let is_short = stat.size <= self.shared.settings.max_hash_bytes;
        let early = (filesystem == Filesystem::Tmpfs && is_short)
            .then(|| self.content.copy_at_once(&file, stat))
            .flatten();
        early.map_or(Ok(file), Err)
    }

    /// Hands on the process that executes a file of the image; the file is closed already.
    fn hand_on_process(&self, watched: Arc<Watched>, mut caller: Caller, at: Timestamp) {
        if caller.pidfd.is_none() && watched.has_sessions() {
            caller.pidfd = pidfd::open(caller.pid).ok();
        }
        match self.processes.try_send(Box::new(Seen {
            watched,
            caller,
            at,
            born: None,
            program: None,
        })) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(seen)) => self.shared.lose(
                Failure::ProcessQueueFull,
                Some(&seen.watched),
                "too many processes wait to be examined",
            ),
        }
    }

    /// Has further executions of an unchanged file not handed on: nothing would be learned from
    /// them that the kernel's records do not show.
    fn leave_out(&self, watched: &Watched, stat: &file::Stat) {
        let shared = &self.shared;
        let Some(unchanged) = shared.unchanged() else { return };
        let may_be_left_out = || {
            shared.shows_arrivals()
                && watched.is_certain(stat)
                && !watched.is_detaching()
                && !(watched.has_sessions()
                    && shared.roots().has_open(&watched.container, watched.init))
        };
        if stat.device != watched.device || !may_be_left_out() {
            return;
        }
        let ignorable_from = watched.residence().map(Residence::ignorable_from);
        unchanged.add(File::of(stat), ignorable_from);
        // Another thread may have changed that meanwhile, and have forgotten all files before
        // this one was added.
        if !may_be_left_out() {
            unchanged.forget(watched.device);
        }
    }

    fn hand_on(&self, seen: Arrival) {
        // Otherwise it belongs to the host, or to a container that is not watched any more.
        let Some((watched, filesystem)) = self.container_of(&seen) else { return };
        let Arrival { file, stat, caller, at, calm, .. } = seen;
        let pid = caller.pid;
        if pid == watched.init.pid && !watched.entry_is_recorded() {
            if let (Filesystem::Overlay, Some(at)) = (filesystem, caller.asked) {
                self.shared.note_asked(pid, (stat.device, stat.inode), at);
            }
            watched.set_init_asked_about();
        }
        // Before anything else: an open file keeps its mount busy.
        let file = self.close_early(filesystem, file, &stat);
        let standing = standing(&watched, filesystem, &stat);
        let is_movable = matches!(standing, Standing::Movable(_));
        let layer_file = match standing {
            Standing::Own => None,
            Standing::Doubtful(layer_file) | Standing::Movable(layer_file) => Some(layer_file),
            Standing::Image => {
                let calm = calm.filter(|_| {
                    watched.residence().is_some_and(Residence::has_settled)
                        && !watched.is_detaching()
                        && watched.is_certain(&stat)
                });
                if let (Some(calm), Ok(file)) = (calm, &file) {
                    self.marks.ignore(calm, file.as_fd());
                }
                drop(file);
                self.leave_out(&watched, &stat);
                return self.hand_on_process(watched, caller, at);
            }
        };
        let more = match &caller.stat {
            Some(caller) if self.content.len() >= repeats::FEW => {
                match self.repeats.borrow_mut().join(&stat, caller.parent) {
                    None => return,
                    more => more,
                }
            }
            _ => None,
        };
        // The handle only serves to sleep no longer than the process lives. The start time
        // identifies the process, and a handle with every event would cost more than all
        // the rest.
        let pidfd = caller.pidfd.or_else(|| pidfd::open(pid).ok());
        let caller = Caller { pidfd, ..caller };
        let (name, file) = match file {
            Ok(file) => (None, watched.hold(file)),
            Err((name, copy)) => (Some(name), Held::of_copy(copy)),
        };
        let execution = Execution {
            watched,
            filesystem,
            file,
            name,
            stat,
            layer_file,
            is_movable,
            caller,
            at,
            more,
        };
        match self.content.try_send(execution) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(execution)) => self.shared.lose(
                Failure::ContentQueueFull,
                Some(&execution.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }
}

/// The origin of an executed file.
fn standing(watched: &Watched, filesystem: Filesystem, stat: &file::Stat) -> Standing {
    match filesystem {
        Filesystem::Overlay => watched.standing(stat),
        // Images have no files there.
        Filesystem::Tmpfs | Filesystem::Volume | Filesystem::Anonymous | Filesystem::Container => {
            Standing::Own
        }
    }
}

/// A runtime invocation that the gate holds.
#[derive(Debug)]
pub(crate) struct Invocation {
    pub(crate) number: u64,
    /// The process before it becomes the runtime.
    pub(crate) caller: Stat,
}
