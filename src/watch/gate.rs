//! The gate: asked by the kernel before a program runs.
//!
//! While the kernel asks, a process of the container waits, so this thread does
//! as little as can be: what the file is, who asks, the answer. Everything else
//! is handed to other threads by channels that never make it wait, and what does
//! not fit in them is a named loss.
//!
//! ```text
//! kernel ── Permission ──> statx(fd), /proc/PID/stat ── Allow ──> kernel
//!                              │
//!                              ├── own layer, other ──> describe thread (with the fd)
//!                              │   filesystem, or changed in a layer
//!                              └── image layer ────> processes thread (fd closed)
//! ```
//!
//! If it cannot go on, the whole process ends: then the kernel allows what is
//! pending, while a gate that is open and unread would stop every exec.

use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::copyup::{Calm, Residence, Shard};
use super::crowd::{self, Crowd, More};
use super::fair::Sender;
use super::files::Held;
use super::mounts;
use super::process::Caller;
use super::sessions::is_before_entry_point;
use super::shared::Shared;
use super::table::{Standing, Watched};
use crate::config;
use crate::health::Failure;
use crate::model::{Filesystem, LayerFile};
use crate::sys::fanotify::{Answer, Buffer, Event, Group, Incoming, Permission, ReadError};
use crate::sys::{file, perf, pidfd, procfs};

/// A file that is being executed and is to be judged by its content.
#[derive(Debug)]
pub(super) struct Execution {
    pub(super) watched: Arc<Watched>,
    pub(super) filesystem: Filesystem,
    pub(super) file: Held,
    pub(super) stat: file::Stat,
    /// `None` for a file of the container's own layer.
    pub(super) layer_file: Option<LayerFile>,
    /// It is the image's own, unless its path has become another.
    pub(super) is_movable: bool,
    pub(super) caller: Caller,
    pub(super) at: Timestamp,
    /// Others like it, if too many wait to look at each.
    pub(super) more: Option<Arc<More>>,
}

/// A process that executes a file of the image.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) watched: Arc<Watched>,
    /// Before it became the program, or, if nobody had to be asked, after that: then
    /// its `stat` is `None`.
    pub(super) caller: Caller,
    pub(super) at: Timestamp,
}

/// The gate turns at least this often, with or without events.
pub(super) const TURN: Duration = Duration::from_millis(250);

/// How much one read may bring: about a hundred events, each with two
/// descriptors. With none left to open, the kernel denies.
const READ_BYTES: usize = 4 * 1024;

/// Which events the gate's marks ask for.
pub(super) fn events(gate: config::Gate) -> u64 {
    match gate {
        config::Gate::Ask | config::Gate::Free => libc::FAN_OPEN_EXEC_PERM,
        config::Gate::Notify => libc::FAN_OPEN_EXEC,
    }
}

/// Whether every thread that somebody may wait for still turns.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    threads: Vec<Arc<AtomicBool>>,
}

/// One thread's part in the pulse.
#[derive(Debug)]
pub(super) struct Turns(Arc<AtomicBool>);

impl Turns {
    pub(super) fn turn(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Pulse {
    pub(super) fn of_another(&mut self) -> Turns {
        let turned = Arc::new(AtomicBool::new(false));
        self.threads.push(turned.clone());
        Turns(turned)
    }

    /// Whether all of them have turned since this was last true.
    fn beats(&self) -> bool {
        let beats = self.threads.iter().all(|turned| turned.load(Ordering::Relaxed));
        if beats {
            self.threads.iter().for_each(|turned| turned.store(false, Ordering::Relaxed));
        }
        beats
    }
}

/// Who tells that the gate makes progress.
#[derive(Debug)]
pub(super) struct Heart {
    pub(super) pulse: Pulse,
    /// Who watches the gate's progress reads the other end. Non-blocking.
    pub(super) heartbeat: Option<OwnedFd>,
}

/// Since when another thread's count of turns is what it is.
struct Progress {
    turns: u64,
    since: Instant,
}

pub(super) struct Gate {
    pub(super) group: Arc<Group>,
    /// The containers of this gate, if unchanged programs are asked about only once.
    pub(super) shard: Option<Arc<Shard>>,
    pub(super) shared: Arc<Shared>,
    pub(super) content: Sender<Execution>,
    pub(super) crowd: RefCell<Crowd>,
    pub(super) processes: Sender<Box<Seen>>,
    pub(super) turns: Turns,
    /// The first gate has it.
    pub(super) heart: Option<Heart>,
}

impl Gate {
    pub(super) fn run(self) {
        // Without CAP_SYS_NICE it runs like the others, only later under load.
        let _ = rustix::process::setpriority_process(None, -10);
        let mut buffer = Buffer::new();
        let mut last_beat = None;
        let mut arming = Progress { turns: 0, since: Instant::now() };
        while !self.shared.is_stopping() {
            self.wait();
            self.turns.turn();
            if !self.is_arming_stuck(&mut arming) {
                self.beat(&mut last_beat);
            }
            match self.group.read(&mut buffer, READ_BYTES) {
                Ok(incoming) => incoming.into_iter().for_each(|incoming| self.take(incoming)),
                Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                    Some(Errno::AGAIN | Errno::INTR) => (),
                    Some(Errno::BADF | Errno::INVAL | Errno::FAULT) | None => give_up(&err),
                    // The event is used up. Nobody knows which container's it was.
                    Some(_) => self.shared.lose(
                        Failure::EventUnreadable,
                        None,
                        &format!("an event of the gate could not be opened: {err}"),
                    ),
                },
                Err(ReadError::Malformed(err)) => give_up(&err),
            }
        }
    }

    fn wait(&self) {
        let mut fds = [PollFd::from_borrowed_fd(self.group.as_fd(), PollFlags::IN)];
        let timeout = Timespec::try_from(TURN).expect("a quarter of a second fits");
        // An error here (a signal) only means that the turn comes early.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }

    /// Whether the thread that is asked before a runtime runs has made no turn in a
    /// while. Containers could not start: then there is no heartbeat from here.
    fn is_arming_stuck(&self, last: &mut Progress) -> bool {
        if self.shared.arming.since.get().is_none() {
            return false;
        }
        let turns = self.shared.arming.turns.load(Ordering::Relaxed);
        if turns != last.turns {
            *last = Progress { turns, since: Instant::now() };
        }
        last.since.elapsed() > 4 * TURN
    }

    fn beat(&self, last: &mut Option<Instant>) {
        let Some(Heart { pulse, heartbeat }) = &self.heart else { return };
        if last.is_some_and(|last| last.elapsed() < TURN / 4) || !pulse.beats() {
            return;
        }
        *last = Some(Instant::now());
        self.shared.health.gate_turns.fetch_add(1, Ordering::Relaxed);
        if let Some(heartbeat) = heartbeat {
            // A full pipe means that the last beats were not read yet: they are there.
            let _ = rustix::io::write(heartbeat, b".");
        }
    }

    fn take(&self, incoming: Incoming<'_>) {
        match incoming {
            Incoming::Permission(permission) => self.answer(permission),
            Incoming::Overflow => self.shared.lose(
                Failure::KernelQueueOverflow,
                None,
                "the kernel dropped events of the gate",
            ),
            // Only where nobody is to wait.
            Incoming::Notification(event) => self.told(event),
        }
    }

    fn answer(&self, permission: Permission<'_>) {
        let event = permission.event();
        // Before anything is known of the file: see `copyup`.
        let calm = self.shard.as_ref().and_then(|shard| shard.calm());
        let stat = file::stat(&event.file);
        // The one look into /proc before the answer. It takes no lock that the
        // container could hold (no cred_guard_mutex, no mmap_lock, unlike most
        // files beside it), and only now is the process certain to be there.
        let caller = procfs::read_stat(event.pid).ok();
        let whose = stat.as_ref().ok().and_then(|stat| self.whose(event, stat));
        // Who comes in may be over before anybody else looks, and how it ended is
        // told by a handle only.
        let is_coming_in =
            caller.as_ref().is_some_and(|caller| is_before_entry_point(&caller.comm));
        let pidfd = if is_coming_in { pidfd::open(event.pid).ok() } else { None };
        let at = Timestamp::now();
        let asked = Some(perf::now());
        let caller = Caller { stat: caller, pid: event.pid, asked, pidfd };
        // First, so that who has been answered finds itself counted.
        self.shared.health.gate_answers.fetch_add(1, Ordering::Relaxed);
        let (event, answered) = permission.answer(Answer::Allow);
        if let Err(err) = answered {
            // ENOENT: the process was killed while it waited.
            if err.raw_os_error() != Some(Errno::NOENT.raw_os_error()) {
                give_up(&err);
            }
        }
        match stat {
            Ok(stat) => {
                self.hand_on(event, whose, stat, caller, at, calm.as_ref());
            }
            Err(err) => self.lose_sight(&err),
        }
    }

    /// A program has been opened for execution, and nobody has waited for us.
    fn told(&self, event: Event) {
        let stat = procfs::read_stat(event.pid).ok();
        let caller = Caller { stat, pid: event.pid, asked: None, pidfd: None };
        let at = Timestamp::now();
        self.shared.health.gate_answers.fetch_add(1, Ordering::Relaxed);
        match file::stat(&event.file) {
            Ok(stat) => {
                let whose = self.whose(&event, &stat);
                self.hand_on(event, whose, stat, caller, at, None);
            }
            Err(err) => self.lose_sight(&err),
        }
    }

    fn lose_sight(&self, err: &std::io::Error) {
        self.shared.lose(
            Failure::EventUnreadable,
            None,
            &format!("an executed file could not be looked at: {err}"),
        );
    }

    fn whose(&self, event: &Event, stat: &file::Stat) -> Option<(Arc<Watched>, Filesystem)> {
        let owner = self.shared.table.owner(stat).map(|owner| (owner, Filesystem::Overlay));
        // Slower, and so for no other file.
        owner.or_else(|| {
            let whose = mounts::whose(&self.shared.table, event, stat)?;
            self.shared.note_asked(event.pid, (stat.device, stat.inode));
            Some(whose)
        })
    }

    fn hand_on(
        &self,
        event: Event,
        whose: Option<(Arc<Watched>, Filesystem)>,
        stat: file::Stat,
        caller: Caller,
        at: Timestamp,
        calm: Option<&Calm>,
    ) {
        // Of a container that is not watched any more, or the host's.
        let Some((watched, filesystem)) = whose else { return };
        let Event { file, pid, .. } = event;
        let standing = match filesystem {
            Filesystem::Overlay => watched.standing(&stat),
            // No image has a file there.
            Filesystem::Tmpfs | Filesystem::Volume | Filesystem::Anonymous => Standing::Own,
        };
        let is_movable = matches!(standing, Standing::Movable(_));
        let layer_file = match standing {
            Standing::Own => None,
            Standing::Doubtful(layer_file) | Standing::Movable(layer_file) => Some(layer_file),
            Standing::Image => {
                if let (Some(shard), Some(calm)) = (&self.shard, calm)
                    && watched.residence().is_some_and(Residence::has_settled)
                    && !watched.is_detaching()
                    && watched.is_certain(&stat)
                    && shard.ignore(&file, calm)
                {
                    self.shared.health.gate_ignored.fetch_add(1, Ordering::Relaxed);
                }
                drop(file);
                let mut caller = caller;
                if caller.pidfd.is_none() && watched.has_sessions() {
                    caller.pidfd = pidfd::open(pid).ok();
                }
                match self.processes.try_send(Box::new(Seen { watched, caller, at })) {
                    Ok(()) | Err(TrySendError::Disconnected(_)) => (),
                    Err(TrySendError::Full(seen)) => self.shared.lose(
                        Failure::ProcessQueueFull,
                        Some(&seen.watched),
                        "too many processes wait to be looked at",
                    ),
                }
                return;
            }
        };
        let more = match &caller.stat {
            Some(caller) if self.content.len() >= crowd::FEW => {
                match self.crowd.borrow_mut().join(&stat, caller.parent) {
                    None => return,
                    more => more,
                }
            }
            _ => None,
        };
        // Only to sleep no longer than the process lives: who it is, its start time
        // says, and a handle with every event would cost more than all the rest.
        let pidfd = caller.pidfd.or_else(|| pidfd::open(pid).ok());
        let caller = Caller { pidfd, ..caller };
        let file = Held::new(&watched, file);
        let execution =
            Execution { watched, filesystem, file, stat, layer_file, is_movable, caller, at, more };
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

/// Execs would wait for ever at a gate that nobody can read or answer.
pub(super) fn give_up(err: &dyn std::fmt::Display) -> ! {
    panic!("the gate cannot go on ({err}); driftd ends so that the kernel opens it");
}
