//! Who types into the terminal of a container's init where nothing has to be opened
//! for that: the kubelet's runtime and Docker hold its input open from the beginning
//! and hand on what whoever attaches sends them. That something was typed is seen
//! where it is read, inside; whose fingers those were is not.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};

use super::attachments;
use crate::model::{Fact, ProcessIdentity, Source};
use crate::sys::door::{Ground, View};
use crate::sys::file;
use crate::sys::procfs::{self, Descriptor, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::roots::Arrival;
use crate::watch::process::shared::Processes;
use crate::watch::process::{describe, outside};

/// Terminals that are listened to at once.
const MAX_TERMINALS: usize = 1024;
/// How often it is asked whose session is over. So long nothing is heard of a terminal
/// in which somebody types: a program that reads all the time costs no more than that.
const TURN: Duration = Duration::from_secs(5);
/// While somebody is there, whose last word says when he was.
const TURN_THERE: Duration = Duration::from_secs(1);
/// While an init has not begun, which gets its terminal before.
const TURN_BEFORE: Duration = Duration::from_millis(100);
/// When nobody has typed for so long, whoever had attached is taken to have left.
const IDLE: Duration = Duration::from_secs(15 * 60);
/// How late it is heard that something was typed, and what was begun meanwhile is read
/// of: the latter in clock ticks, of which Linux tells a hundred a second.
const LATE: SignedDuration = SignedDuration::from_millis(20);
const LATE_TICKS: u64 = 10;

/// Listens to terminals.
pub(crate) struct Terminals {
    /// `None` where the kernel gives none.
    inotify: Option<OwnedFd>,
    known: Mutex<Vec<Terminal>>,
}

/// The terminal of one container's init.
struct Terminal {
    watched: Arc<Watched>,
    /// Its init has become the container's program.
    has_begun: bool,
    /// What the kernel calls it while it listens: it does until something is read.
    listening: Option<i32>,
    session: Option<Session>,
}

#[derive(Clone, Copy)]
struct Session {
    root: ProcessIdentity,
    /// When something that was typed was last read, as far as was heard.
    typed: (Instant, Timestamp),
}

impl Terminals {
    pub(crate) fn new() -> Terminals {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK);
        if let Err(err) = &inotify {
            tracing::warn!(
                "who attaches through the kubelet or Docker is not seen: the kernel gives no \
                 inotify (fs.inotify.max_user_instances may be used up): {err}"
            );
        }
        Terminals { inotify: inotify.ok(), known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Vec<Terminal>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it is told when somebody types into the terminal of its init.
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
        let mut terminal = Terminal { watched, has_begun: false, listening: None, session: None };
        let armed = arm(inotify, &mut terminal);
        // Where there is no room, there may be later.
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
            // Nothing to read is an error too; none of the others can last.
            while let Ok(event) = events.next() {
                self.heard(shared, event.wd(), event.events());
            }
            if last_turn.elapsed() >= turn {
                last_turn = Instant::now();
                self.look(shared, inotify);
            }
        }
    }

    fn turn(&self) -> Duration {
        let known = self.known();
        if known.iter().any(|terminal| !terminal.has_begun && terminal.listening.is_none()) {
            TURN_BEFORE
        } else if known.iter().any(|terminal| terminal.session.is_some()) {
            TURN_THERE
        } else {
            TURN
        }
    }

    fn heard(&self, shared: &Processes, number: i32, events: ReadFlags) {
        let mut known = self.known();
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            // Whatever was not told is not asked for any more.
            known.iter_mut().for_each(|terminal| terminal.listening = None);
            return;
        }
        let is_it = |terminal: &&mut Terminal| terminal.listening == Some(number);
        let Some(terminal) = known.iter_mut().find(is_it) else { return };
        // Heard once, or gone.
        terminal.listening = None;
        if events.contains(ReadFlags::ACCESS) {
            terminal.typed(shared);
        }
    }

    /// Ends the sessions of those who have left, and listens anew.
    fn look(&self, shared: &Processes, inotify: &OwnedFd) {
        let mut known = self.known();
        known.retain_mut(|terminal| {
            if terminal.watched.is_detaching() {
                if let Some(number) = terminal.listening {
                    // It may be gone with the terminal.
                    let _ = inotify::remove_watch(inotify, number);
                }
                return false;
            }
            if let Some(session) = terminal.session
                && session.typed.0.elapsed() >= IDLE
            {
                shared.roots().left_terminal(session.root);
                let fact = Fact::SessionProcessEnded {
                    root: session.root,
                    process: session.root,
                    exit: None,
                };
                if shared.observe(&terminal.watched, session.typed.1, Source::Change, fact) {
                    terminal.session = None;
                }
            }
            if terminal.listening.is_some() {
                return true;
            }
            match arm(inotify, terminal) {
                Ok(has_terminal) => has_terminal || terminal.session.is_some(),
                // That was said when it was first asked for.
                Err(_) => true,
            }
        });
    }
}

impl Terminal {
    /// Something that was typed has been read.
    fn typed(&mut self, shared: &Processes) {
        let watched = &self.watched;
        let (typed, now) = ((Instant::now(), Timestamp::now()), procfs::ticks_since_boot());
        if let Some(session) = &mut self.session {
            session.typed = typed;
            return;
        }
        let is_known = {
            let roots = shared.roots();
            // Whoever has opened its input is at it, or init is a session itself.
            roots.at_terminal(watched.init).is_some() || roots.is_open(watched.init)
        };
        if is_known {
            return;
        }
        let Ok(init) = Handle::open_exactly(watched.init) else { return };
        // Nobody knows who came: it is known by when.
        let root = ProcessIdentity { pid: watched.init.pid, start_time: now };
        let process = describe::as_it_is(&init, watched);
        let fact = attachments::opened(root, process, Vec::new(), None);
        shared.note_session(watched);
        if shared.observe(watched, typed.1, Source::Change, fact) {
            let at = typed.1.saturating_sub(LATE).unwrap_or(typed.1);
            let arrival = Arrival { session: root, at, ticks: now.saturating_sub(LATE_TICKS) };
            shared.roots().came_to_terminal(&watched.container, watched.init, arrival);
            self.session = Some(Session { root, typed });
        }
    }
}

/// Asks the kernel to tell of the next time something is read from the terminal of a
/// container's init. False if that has none, and will have none.
fn arm(inotify: &OwnedFd, terminal: &mut Terminal) -> io::Result<bool> {
    let Ok(init) = Handle::open_exactly(terminal.watched.init) else { return Ok(false) };
    terminal.has_begun = !outside::runs_program_of_host(&init);
    let is_terminal = matches!(init.descriptor(0), Ok(Descriptor::Terminal(_)));
    let Some(input) = is_terminal.then(|| init.open_descriptor(0).ok()).flatten() else {
        return Ok(!terminal.has_begun);
    };
    // A container's own filesystem can show such a device too, and would be asked.
    if View::of([&init]).ground(&file::stat(&input)?) != Ground::Kernel {
        return Ok(!terminal.has_begun);
    }
    let path = format!("/proc/self/fd/{}", input.as_raw_fd());
    let flags = WatchFlags::ACCESS | WatchFlags::ONESHOT;
    terminal.listening = Some(inotify::add_watch(inotify, path, flags)?);
    Ok(true)
}
