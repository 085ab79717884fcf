//! Attach sessions without an open: input that was typed into the terminal of a container's
//! init.
//!
//! The kubelet's runtime and Docker hold that input open from the beginning and pass on what
//! an attached client sends. So no open shows the client. driftd sees the input when init
//! reads it, through inotify on the terminal; the person typing is not known.
//! Clients that open the input themselves are found by `attachments`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

use super::attachments;
use crate::model::{Fact, ProcessIdentity, SessionFact, Source};
use crate::sys::door::{Ground, View};
use crate::sys::file;
use crate::sys::procfs::{self, Descriptor, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::roots::Arrival;
use crate::watch::process::shared::Processes;
use crate::watch::process::{describe, outside};

/// The maximum number of terminals that are watched at once.
const MAX_TERMINALS: usize = 1024;
/// How often sessions are checked for their end, and terminals are watched anew. After input
/// the terminal is not watched until then, so that a program that reads all the time costs
/// no more than one event.
const TURN: Duration = Duration::from_secs(5);
/// The same while a session is open: its last input gives the time of its end.
const TURN_THERE: Duration = Duration::from_secs(1);
/// The same while an init has not begun: it gets its terminal before that.
const TURN_BEFORE: Duration = Duration::from_millis(100);
/// After so long without input, the client counts as detached.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// How late the event for typed input arrives. What started in that time belongs to the
/// session. `LATE_TICKS` is the same for start times, in clock ticks: Linux reports a hundred
/// of them per second.
const LATE: SignedDuration = SignedDuration::from_millis(20);
const LATE_TICKS: u64 = 10;

/// The terminals that are watched for input.
pub(crate) struct Terminals {
    /// `None` if the kernel gave no instance.
    inotify: Option<OwnedFd>,
    known: Mutex<Vec<Terminal>>,
}

/// The terminal of one container's init.
struct Terminal {
    watched: Arc<Watched>,
    /// Its init has become the container's program.
    has_begun: bool,
    /// The kernel's number of the watch. The watch ends when something is read.
    watch: Option<i32>,
    session: Option<Session>,
}

#[derive(Clone, Copy)]
struct Session {
    root: ProcessIdentity,
    /// When typed input was last read, by the events that arrived.
    typed: (Instant, Timestamp),
}

impl Terminals {
    pub(crate) fn new() -> Terminals {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        if let Err(err) = &inotify {
            tracing::warn!(
                "cannot watch containers' terminals, sessions attached through the kubelet or \
                 Docker will be missed: the kernel gives no inotify instance \
                 (fs.inotify.max_user_instances may be used up): {err}"
            );
        }
        Terminals { inotify: inotify.ok(), known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Vec<Terminal>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches the terminal of a container's init for input from now on.
    pub(crate) fn listen(&self, watched: &Arc<Watched>) -> io::Result<()> {
        let Some(inotify) = &self.inotify else { return Ok(()) };
        let mut known = self.known();
        known.retain(|terminal| !terminal.watched.is_detaching());
        if known.iter().any(|terminal| Arc::ptr_eq(&terminal.watched, watched)) {
            return Ok(());
        }
        if known.len() >= MAX_TERMINALS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let watched = watched.clone();
        let mut terminal = Terminal { watched, has_begun: false, watch: None, session: None };
        let armed = arm(inotify, &mut terminal);
        // If the watch failed for lack of room, a later turn tries again.
        if !matches!(armed, Ok(false)) {
            known.push(terminal);
        }
        armed.map(drop)
    }

    pub(crate) fn run(&self, shared: &Processes) {
        let Some(inotify) = &self.inotify else { return };
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut last_turn = Instant::now();
        while !shared.is_stopping() {
            let turn = self.turn();
            shared.wait_for(inotify, Some(turn));
            let mut events = Reader::new(inotify, &mut buffer);
            // An empty queue is an error too. No other error is permanent.
            while let Ok(event) = events.next() {
                self.handle_event(shared, event.wd(), event.events());
            }
            if last_turn.elapsed() >= turn {
                last_turn = Instant::now();
                self.check(shared, inotify);
            }
        }
    }

    fn turn(&self) -> Duration {
        let known = self.known();
        if known.iter().any(|terminal| !terminal.has_begun && terminal.watch.is_none()) {
            TURN_BEFORE
        } else if known.iter().any(|terminal| terminal.session.is_some()) {
            TURN_THERE
        } else {
            TURN
        }
    }

    fn handle_event(&self, shared: &Processes, number: i32, events: ReadFlags) {
        let mut known = self.known();
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            // Watches whose events were lost have ended. All are placed anew.
            known.iter_mut().for_each(|terminal| terminal.watch = None);
            return;
        }
        let is_it = |terminal: &&mut Terminal| terminal.watch == Some(number);
        let Some(terminal) = known.iter_mut().find(is_it) else { return };
        // A watch gives one event, or ends with the terminal.
        terminal.watch = None;
        if events.contains(ReadFlags::ACCESS) {
            terminal.typed(shared);
        }
    }

    /// Ends the sessions of clients that have detached, and watches terminals anew.
    fn check(&self, shared: &Processes, inotify: &OwnedFd) {
        let mut known = self.known();
        known.retain_mut(|terminal| {
            if terminal.watched.is_detaching() {
                if let Some(number) = terminal.watch {
                    // The watch may be gone with the terminal.
                    let _ = inotify::remove_watch(inotify, number);
                }
                return false;
            }
            if let Some(session) = terminal.session
                && session.typed.0.elapsed() >= IDLE
            {
                shared.roots().left_terminal(session.root);
                let fact = Fact::Session(SessionFact::ProcessEnded {
                    root: session.root,
                    process: session.root,
                    exit: None,
                });
                if shared.observe(&terminal.watched, session.typed.1, Source::Change, fact) {
                    terminal.session = None;
                }
            }
            if terminal.watch.is_some() {
                return true;
            }
            match arm(inotify, terminal) {
                Ok(has_terminal) => has_terminal || terminal.session.is_some(),
                // The failure was reported by `listen`.
                Err(_) => true,
            }
        });
    }
}

impl Terminal {
    /// Typed input has been read.
    fn typed(&mut self, shared: &Processes) {
        let watched = &self.watched;
        let (typed, now) = ((Instant::now(), Timestamp::now()), procfs::ticks_since_boot());
        if let Some(session) = &mut self.session {
            session.typed = typed;
            return;
        }
        let is_known = {
            let roots = shared.roots();
            // A client that has opened the input is attached, or init is a session itself.
            roots.at_terminal(watched.init).is_some() || roots.is_open(watched.init)
        };
        if is_known {
            return;
        }
        let Ok(init) = Handle::open_exactly(watched.init) else { return };
        // The client is not known. The time of its first input identifies the session.
        let root = ProcessIdentity { pid: watched.init.pid, start_time: now };
        let process = describe::as_it_is(&init, watched);
        let fact = attachments::opened(root, process, Vec::new(), None);
        shared.note_session(watched);
        if shared.observe(watched, typed.1, Source::Change, fact) {
            let at = typed.1.saturating_sub(LATE).unwrap_or(typed.1);
            let arrival = Arrival { session: root, at, ticks: now.saturating_sub(LATE_TICKS) };
            shared.came_to_terminal(watched, arrival);
            self.session = Some(Session { root, typed });
        }
    }
}

/// Watches for the next read from the terminal of a container's init. False if the init has
/// no terminal and will have none.
fn arm(inotify: &OwnedFd, terminal: &mut Terminal) -> io::Result<bool> {
    let Ok(init) = Handle::open_exactly(terminal.watched.init) else { return Ok(false) };
    terminal.has_begun = !outside::runs_program_of_host(&init);
    let is_terminal = matches!(init.descriptor(0), Ok(Descriptor::Terminal(_)));
    let Some(input) = is_terminal.then(|| init.open_descriptor(0).ok()).flatten() else {
        return Ok(!terminal.has_begun);
    };
    // A container's own filesystem can show such a device too. The watch would then ask that
    // filesystem.
    if View::of([&init]).ground(&file::stat(&input)?) != Ground::Kernel {
        return Ok(!terminal.has_begun);
    }
    let path = format!("/proc/self/fd/{}", input.as_raw_fd());
    let flags = WatchFlags::ACCESS | WatchFlags::ONESHOT;
    terminal.watch = Some(inotify::add_watch(inotify, path, flags)?);
    Ok(true)
}
