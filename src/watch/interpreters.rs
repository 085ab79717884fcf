//! Interpreters of the image, looked at as they start: what script they run, and
//! whether their input and output lead to a connection.
//!
//! Best effort. A process that has ended by the time it is looked at tells nothing,
//! and what it does later is looked at twice more only.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use jiff::Timestamp;

use super::acts::{Act, Event};
use super::code::{self, Code};
use super::fair::{Owned, Receiver};
use super::libraries::processes_of;
use super::process;
use super::scripts::{self, Runs};
use super::shared::Shared;
use super::shells::{self, Neighbour, Standard};
use super::table::Watched;
use crate::health::Failure;
use crate::model::{ContainerId, Fact, Process, Script, Source};
use crate::sys::overlay;
use crate::sys::procfs::{self, Connection, Descriptor, Handle};

/// A process of a container that has become something that may be an interpreter.
#[derive(Clone, Debug)]
pub(super) struct Started {
    pub(super) watched: Arc<Watched>,
    pub(super) pid: u32,
    /// The program's own file, if it was recorded.
    pub(super) file: Option<Arc<[u8]>>,
    /// As it was given to execve.
    pub(super) exec_name: Box<[u8]>,
    pub(super) at: Timestamp,
}

impl Owned for Started {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// When a shell is looked at again: what it has for input and output may come
/// later than its start.
const AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];

/// More shells than this are not looked at again.
const MAX_WAITING: usize = 16 * 1024;

/// Descriptors of a neighbour that are looked at.
const MAX_DESCRIPTORS: usize = 256;

/// How often all processes of a container are looked at for what leads to them.
const BETWEEN_NEIGHBOURS: Duration = Duration::from_millis(50);

struct Look {
    watched: Arc<Watched>,
    at: Timestamp,
    handle: Handle,
    process: Process,
    /// A script from a pipe is told if it turns out to be nothing worse.
    pipe: Option<Script>,
    /// It runs a script of the image: a connection is its business.
    is_service: bool,
    again: usize,
    due: Instant,
}

pub(super) fn run(shared: &Shared, started: &Receiver<Box<Started>>) {
    let mut waiting: [VecDeque<Look>; AGAIN.len()] = Default::default();
    // Those for which there was no time; whoever is in a crowd must not be overlooked.
    let mut deferred: VecDeque<Look> = VecDeque::new();
    let mut around = Around::default();
    while !shared.is_stopping() {
        let queues = waiting.iter().chain([&deferred]);
        let next = queues.filter_map(|queue| Some(queue.front()?.due)).min();
        // Whoever hands on ends when the watchers do.
        let patience =
            next.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
        match started.recv_timeout(patience) {
            Ok(one) => {
                if let Some(look) = first(shared, *one) {
                    wait_for(shared, &mut waiting, look);
                }
            }
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
        // Whoever had to stand back goes first, or others could keep it there for ever.
        let mut due = Vec::new();
        for queue in std::iter::once(&mut deferred).chain(&mut waiting) {
            while queue.front().is_some_and(|look| look.due <= Instant::now()) {
                due.extend(queue.pop_front());
            }
        }
        for look in due {
            match again(shared, look, &mut around) {
                Seen::Enough => (),
                Seen::ForNow(look) => wait_for(shared, &mut waiting, *look),
                Seen::NotYet(look) => defer(shared, &mut deferred, *look),
            }
        }
    }
}

/// What a later look has led to.
enum Seen {
    /// There is nothing more to see.
    Enough,
    ForNow(Box<Look>),
    /// Its neighbours could not be asked.
    NotYet(Box<Look>),
}

fn wait_for(shared: &Shared, waiting: &mut [VecDeque<Look>; AGAIN.len()], mut look: Look) {
    let Some(after) = AGAIN.get(look.again) else { return };
    look.due = Instant::now() + *after;
    push(shared, &mut waiting[look.again], look);
}

fn defer(shared: &Shared, deferred: &mut VecDeque<Look>, mut look: Look) {
    look.due = Instant::now() + BETWEEN_NEIGHBOURS;
    push(shared, deferred, look);
}

fn push(shared: &Shared, queue: &mut VecDeque<Look>, look: Look) {
    if queue.len() < MAX_WAITING {
        queue.push_back(look);
    } else {
        let detail = "too many shells wait to be looked at again";
        shared.lose(Failure::CodeQueueFull, Some(&look.watched), detail);
    }
}

/// The first look, right behind the execve; `None` if there is nothing more to see.
fn first(shared: &Shared, started: Started) -> Option<Look> {
    let Started { watched, pid, file, exec_name, at } = started;
    let handle = Handle::open(pid).ok()?;
    let arguments = handle.arguments().ok()??;
    let standard = standard(&handle);
    let exe = handle.exe().ok()?;
    // By now it may be another program: then these are not the arguments.
    if file.as_deref().is_some_and(|file| file != exe) {
        return None;
    }
    let file = exe;
    // A shell that is many programs runs its own file again for each of them, by
    // whatever name it has itself.
    if *exec_name == *b"/proc/self/exe" {
        scripts::interpreter(b"busybox", &arguments)?;
    }
    let (language, rest) = scripts::interpreter(&file, &arguments)?;
    let process = process::as_it_is(&handle, &watched);
    let mut look = Look {
        watched,
        at,
        handle,
        process,
        pipe: None,
        is_service: false,
        again: 0,
        due: Instant::now(),
    };
    match scripts::runs(language, rest) {
        Runs::Inline => (),
        // It is the script that was executed, and the gate has seen that.
        Runs::File(name) if *name == *exec_name => look.is_service = true,
        Runs::File(name) => match script(shared, &look, &name) {
            Some(code) => tell_script(shared, &look, code),
            None => look.is_service = true,
        },
        Runs::Input => match standard.0[0] {
            Some(Descriptor::Pipe { .. }) => look.pipe = piped_script(&look, &standard),
            Some(Descriptor::Socket(inode)) if standard.socket().is_none() => {
                let from = look.handle.connections().remove(&inode);
                look.pipe = from.map(|from| Script::Pipe {
                    from: Some(format!("a connection to {}", from.remote)),
                });
            }
            Some(Descriptor::Other | Descriptor::Terminal(_) | Descriptor::TerminalMaster(_)) => {
                let fd = look.handle.open_descriptor(0).ok();
                let code = fd.and_then(|fd| {
                    code::of_descriptor(shared, &look.watched, Some(&look.handle), &fd)
                });
                if let Some(code) = code {
                    tell_script(shared, &look, code);
                }
            }
            Some(Descriptor::Socket(_)) | None => (),
        },
    }
    let is_told = direct(shared, &look, &standard);
    (!is_told).then_some(look)
}

/// A later look: it may have become a shell on a connection, or have been one all
/// along, with pipes in between.
fn again(shared: &Shared, mut look: Look, around: &mut Around) -> Seen {
    let is_alive = look.handle.stat().is_ok_and(|stat| !stat.has_ended());
    if is_alive {
        let standard = standard(&look.handle);
        if direct(shared, &look, &standard) {
            return Seen::Enough;
        }
        if !look.is_service && standard.may_be_relayed() {
            let Some(others) = around.of(&look.watched) else {
                return Seen::NotYet(Box::new(look));
            };
            let evidence = shells::piped(&standard, others);
            if let Some(evidence) = evidence.or_else(|| shells::relayed(&standard, others)) {
                tell_shell(shared, &look, false, evidence);
                return Seen::Enough;
            }
        }
    }
    look.again += 1;
    // A shell on a connection is no script from a pipe as well.
    if let Some(script) = look.pipe.take() {
        let fact = Fact::Interpreted { script, process: Arc::new(look.process.clone()) };
        shared.observe(&look.watched, look.at, Source::Trace, fact);
    }
    if is_alive { Seen::ForNow(Box::new(look)) } else { Seen::Enough }
}

/// The processes of the container that was looked at last: shells that start together
/// are looked at together.
#[derive(Default)]
struct Around {
    last: Option<(Instant, ContainerId, Vec<Neighbour>)>,
}

impl Around {
    /// `None` if another container's were looked at just now.
    fn of(&mut self, watched: &Watched) -> Option<&[Neighbour]> {
        let is_young = |at: &Instant| at.elapsed() < BETWEEN_NEIGHBOURS;
        let last = self.last.take().filter(|(at, ..)| is_young(at));
        let is_others = last.as_ref().is_some_and(|(_, whose, _)| *whose != watched.container);
        let now = || (Instant::now(), watched.container.clone(), neighbours(watched));
        let last = last.unwrap_or_else(now);
        let (_, _, neighbours) = self.last.insert(last);
        (!is_others).then_some(neighbours.as_slice())
    }
}

fn standard(handle: &Handle) -> Standard {
    Standard([0, 1, 2].map(|number| handle.descriptor(number).ok()))
}

/// Tells of a shell on a connection; whether it is one.
fn direct(shared: &Shared, look: &Look, standard: &Standard) -> bool {
    let Some(inode) = standard.socket().filter(|_| !look.is_service) else { return false };
    let Some(connection) = look.handle.connections().remove(&inode) else { return false };
    tell_shell(shared, look, true, shells::direct(&connection.remote));
    true
}

fn tell_shell(shared: &Shared, look: &Look, direct: bool, evidence: String) {
    let root = look.process.identity;
    let process = Arc::new(look.process.clone());
    let fact = Fact::ReverseShell { process, direct, evidence };
    // What it runs from here on is what is done over the connection.
    look.watched.set_has_sessions();
    if shared.observe(&look.watched, look.at, Source::Trace, fact)
        && shared.roots().open(&look.watched.container, root)
    {
        let watched = look.watched.clone();
        let event = Event::Opened { watched, root, is_interactive: true, process: None };
        shared.act(&look.watched, Act::Event(event));
    }
}

fn tell_script(shared: &Shared, look: &Look, code: Code) {
    let Code { path, filesystem, state, lower } = code;
    let script = Script::File { path, filesystem, state, lower };
    let fact = Fact::Interpreted { script, process: Arc::new(look.process.clone()) };
    shared.observe(&look.watched, look.at, Source::Trace, fact);
}

/// The script's file, unless it is the image's own or there is none.
fn script(shared: &Shared, look: &Look, name: &[u8]) -> Option<Code> {
    let fd = if name.starts_with(b"/") {
        code::open_in(&look.handle, name)?
    } else {
        // The kernel names the directory as seen from the container's root.
        let cwd = look.handle.cwd().ok()?;
        let mut path = overlay::strip_directory(&cwd, &look.watched.root_name)?.to_vec();
        path.push(b'/');
        path.extend_from_slice(name);
        let init = Handle::open_exactly(look.watched.init).ok();
        code::open_in(init.as_ref().unwrap_or(&look.handle), &path)?
    };
    code::of_descriptor(shared, &look.watched, Some(&look.handle), &fd)
}

/// A script from a pipe that the container's own processes have made. What came in
/// with a session, or with the container's start, is whoever's who opened it.
fn piped_script(look: &Look, standard: &Standard) -> Option<Script> {
    let pipe = standard.input_pipe()?;
    let stat = look.handle.first_stat();
    // The last one is outside.
    let mut chain = procfs::ancestors(stat, look.watched.pid_namespace);
    chain.retain(|ancestor| {
        ancestor.pid_namespace().ok() == look.watched.pid_namespace
            && ancestor.mount_namespace().ok() == look.watched.mount_namespace
    });
    let root = chain.last()?;
    if root.descriptor(0).ok() == standard.0[0] {
        return None;
    }
    let from = neighbours(&look.watched).into_iter().find(|other| other.writes.contains(&pipe));
    Some(Script::Pipe { from: from.map(|from| from.name) })
}

/// Whether a process is itself what is told of as a shell on this connection: what it
/// gives a terminal to is its own affair.
fn is_shell_on(handle: &Handle, connection: u64) -> bool {
    let is_interpreter = || {
        let (exe, arguments) = (handle.exe().ok()?, handle.arguments().ok()??);
        scripts::interpreter(&exe, &arguments).map(drop)
    };
    standard(handle).socket() == Some(connection) && is_interpreter().is_some()
}

/// The processes of a container, with what leads to and from them.
fn neighbours(watched: &Watched) -> Vec<Neighbour> {
    let mut connections = None;
    processes_of(watched)
        .into_iter()
        .map(|handle| {
            let mut neighbour = Neighbour {
                name: shells::name_of(&handle.exe().unwrap_or_default()),
                ..Neighbour::default()
            };
            let mut held: BTreeMap<u64, Connection> = BTreeMap::new();
            let numbers = handle.descriptors(MAX_DESCRIPTORS).unwrap_or_default();
            for number in numbers {
                match handle.descriptor(number) {
                    Ok(Descriptor::Pipe { device, inode }) => {
                        let (reads, writes) = handle.access(number).unwrap_or_default();
                        if reads {
                            neighbour.reads.push((device, inode));
                        }
                        if writes {
                            neighbour.writes.push((device, inode));
                        }
                    }
                    Ok(Descriptor::Socket(inode)) => {
                        // All of a container's processes, but for those that have
                        // made themselves a network of their own.
                        let known = connections.get_or_insert_with(|| handle.connections());
                        match known.get(&inode) {
                            Some(connection) => _ = held.insert(inode, connection.clone()),
                            None => neighbour.sockets.push(inode),
                        }
                    }
                    Ok(Descriptor::TerminalMaster(number)) => neighbour.terminals.push(number),
                    Ok(Descriptor::Terminal(_) | Descriptor::Other) | Err(_) => (),
                }
            }
            neighbour.is_relay = held.len() == 1
                && held.iter().all(|(inode, connection)| {
                    !connection.is_accepted && !is_shell_on(&handle, *inode)
                });
            neighbour.connection = held.into_values().next().map(|connection| connection.remote);
            neighbour
        })
        .collect()
}
