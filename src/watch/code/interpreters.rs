//! Interpreters of the image, looked at as they start: what script they run, and
//! whether their input and output lead to a connection.
//!
//! Best effort. A process that has ended by the time it is looked at tells nothing,
//! and what it does later is looked at twice more only.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::given::{self, Given};
use super::inspect::{self, Code};
use super::scripts::{self, Language, Runs};
use super::shells::{self, Neighbour, Pipe, Standard};
use super::started::Started;
use crate::health::Failure;
use crate::model::{ContainerId, Fact, Filesystem, Process, RootfsPath, Script, Source};
use crate::sys::procfs::{self, Connection, Descriptor, Handle};
use crate::sys::{errand, file, mounts, overlay};
use crate::threads;
use crate::watch::core::fair::Receiver;
use crate::watch::core::shared::Next;
use crate::watch::core::watched::Watched;
use crate::watch::files::shared::Files;
use crate::watch::process::activity::{Act, Event};
use crate::watch::process::arguments::Recorded;
use crate::watch::process::{describe, reach, records};

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
    /// The script that it was given by name.
    script: Option<Named>,
    again: usize,
    due: Instant,
}

/// A script, by the name that an interpreter was given.
struct Named {
    name: Vec<u8>,
    /// The interpreter is a shell, which keeps its script open.
    is_shells: bool,
    /// It was itself what was executed.
    is_executed: bool,
    /// Nothing was found there.
    is_missing: bool,
    /// Looked at by the descriptor that the shell reads from.
    is_certain: bool,
}

/// Shells that are to be looked at again. Not the thread's own, so that another one can
/// go on with them.
#[derive(Default)]
pub(crate) struct Waiting(Mutex<Queues>);

#[derive(Default)]
struct Queues {
    waiting: [VecDeque<Look>; AGAIN.len()],
    /// Those for which there was no time; whoever is in a crowd must not be overlooked.
    deferred: VecDeque<Look>,
}

impl Waiting {
    /// Locked for one step at a time, and never while a process is looked at.
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queues {
    fn next_due(&self) -> Option<Instant> {
        let queues = self.waiting.iter().chain([&self.deferred]);
        queues.filter_map(|queue| Some(queue.front()?.due)).min()
    }

    /// Whoever had to stand back goes first, or others could keep it there for ever.
    fn take_due(&mut self, now: Instant) -> Option<Look> {
        std::iter::once(&mut self.deferred)
            .chain(&mut self.waiting)
            .find(|queue| queue.front().is_some_and(|look| look.due <= now))
            .and_then(VecDeque::pop_front)
    }

    fn take_any(&mut self) -> Option<Look> {
        std::iter::once(&mut self.deferred).chain(&mut self.waiting).find_map(VecDeque::pop_front)
    }
}

pub(crate) fn run(shared: &Files, started: &Receiver<Box<Started>>, waiting: &Waiting) {
    let mut around = Around::default();
    let mut unreadable = Unreadable { told: errand::given_up(), last: None };
    loop {
        unreadable.tell(shared);
        let due = waiting.queues().next_due();
        // Whoever hands on ends when the watchers do.
        let patience =
            due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
        match shared.next_within(started, patience) {
            Next::Item(one) => {
                threads::about(&one.watched.container);
                if let Some(look) = first(shared, *one) {
                    wait_for(shared, &mut waiting.queues().waiting, look);
                }
            }
            Next::Nothing => (),
            Next::End if threads::is_replaced() => return,
            Next::End => return look_a_last_time(shared, waiting, &mut around),
        }
        let now = Instant::now();
        loop {
            let look = waiting.queues().take_due(now);
            let Some(look) = look else { break };
            threads::about(&look.watched.container);
            let seen = again(shared, look, &mut around);
            let mut queues = waiting.queues();
            match seen {
                Seen::Enough => (),
                Seen::ForNow(look) => wait_for(shared, &mut queues.waiting, *look),
                Seen::NotYet(look) => defer(shared, &mut queues.deferred, *look),
            }
        }
    }
}

/// What waits is told as far as it is known: nobody looks again after this.
fn look_a_last_time(shared: &Files, waiting: &Waiting, around: &mut Around) {
    let mut queues = std::mem::take(&mut *waiting.queues());
    while let Some(look) = queues.take_any() {
        if !shared.may_tell() {
            return shared.leave(
                1 + queues.deferred.len() + queues.waiting.iter().map(VecDeque::len).sum::<usize>(),
            );
        }
        let _ = again(shared, look, around);
    }
}

/// Processes whose memory could not be read in time, as far as that has been reported.
struct Unreadable {
    told: u64,
    last: Option<Instant>,
}

/// How often that is reported. No container is scanned again for it: it would be refused
/// again.
const BETWEEN_UNREADABLE: Duration = Duration::from_secs(10);

impl Unreadable {
    fn tell(&mut self, shared: &Files) {
        let count = errand::given_up();
        if count == self.told || self.last.is_some_and(|last| last.elapsed() < BETWEEN_UNREADABLE) {
            return;
        }
        let detail = format!("the memory of processes was not read, {} times", count - self.told);
        (self.told, self.last) = (count, Some(Instant::now()));
        shared.degrade(Failure::ProcessUnreadable, None, &detail);
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

fn wait_for(shared: &Files, waiting: &mut [VecDeque<Look>; AGAIN.len()], mut look: Look) {
    let Some(after) = AGAIN.get(look.again) else { return };
    look.due = Instant::now() + *after;
    push(shared, &mut waiting[look.again], look);
}

fn defer(shared: &Files, deferred: &mut VecDeque<Look>, mut look: Look) {
    look.due = Instant::now() + BETWEEN_NEIGHBOURS;
    push(shared, deferred, look);
}

fn push(shared: &Files, queue: &mut VecDeque<Look>, look: Look) {
    if queue.len() < MAX_WAITING {
        queue.push_back(look);
    } else {
        let detail = "too many shells wait to be looked at again";
        shared.lose(Failure::CodeQueueFull, Some(&look.watched), detail);
    }
}

/// The first look, right behind the execve; `None` if there is nothing more to see.
fn first(shared: &Files, started: Started) -> Option<Look> {
    let Started { watched, pid, file, exec_name, executed, at } = started;
    let handle = Handle::open(pid).ok()?;
    let exe = handle.exe().ok()?;
    // By now it may be another program: then what it has is not what was executed.
    if file.as_deref().is_some_and(|file| file != exe) {
        return None;
    }
    // As the kernel has recorded them: what /proc shows, the process can change.
    let recorded = match shared.arguments().of(pid, executed, executed) {
        Recorded::Arguments(arguments) => procfs::split_arguments(&arguments),
        Recorded::Unknown | Recorded::NotYet => None,
    };
    let arguments = match recorded {
        Some(arguments) => arguments,
        None => handle.arguments().ok()??,
    };
    let standard = standard(&handle);
    // A shell that is many programs runs its own file again for each of them, by
    // whatever name it has itself.
    if *exec_name == *b"/proc/self/exe" {
        scripts::interpreter(b"busybox", &arguments)?;
    }
    // A hard link to it may be called like any other program.
    let is_multicall =
        handle.exe_identity().is_ok_and(|(device, inode)| watched.is_multicall(device, inode));
    let program = if is_multicall { b"busybox" } else { exe.as_slice() };
    let (language, rest) = scripts::interpreter(program, &arguments)?;
    let process = describe::as_it_is(&handle, &watched);
    let mut look = Look {
        watched,
        at,
        handle,
        process,
        pipe: None,
        is_service: false,
        script: None,
        again: 0,
        due: Instant::now(),
    };
    match scripts::runs(language, rest) {
        Runs::Inline => (),
        Runs::File(name) => {
            look.script = Some(Named {
                is_shells: language == Language::Shell,
                is_executed: *name == *exec_name,
                is_missing: false,
                is_certain: false,
                name,
            });
            named(shared, &mut look);
        }
        Runs::Input => match standard.0[0] {
            Some(Descriptor::Socket(inode)) if standard.socket().is_none() => {
                let from = look.handle.connections().remove(&inode);
                look.pipe = from.map(|from| Script::Pipe {
                    from: Some(format!("a connection to {}", from.remote)),
                });
            }
            Some(Descriptor::Socket(_)) | None => (),
            Some(_) => {
                let given = given::by_descriptor(&look.handle, 0);
                take(shared, &mut look, given);
            }
        },
    }
    let is_told = direct(shared, &look, &standard);
    (!is_told).then_some(look)
}

/// Finds the script that was given by name, and judges it. The name is looked up first:
/// what the shell has not opened yet, it will find there.
fn named(shared: &Files, look: &mut Look) {
    let Some(script) = &look.script else { return };
    let by_name = given::by_name(&look.watched, &look.handle, &script.name);
    let held = script.is_shells.then(|| given::held_by_shell(&look.handle)).flatten();
    if let (Some(script), Some(_)) = (&mut look.script, &held) {
        script.is_certain = true;
    }
    take(shared, look, held.map_or(by_name, Given::File));
}

/// Tells of a script, if it is not the image's own.
fn take(shared: &Files, look: &mut Look, given: Given) {
    match given {
        Given::File(fd) => {
            match inspect::look_at(shared, &look.watched, Some(&look.handle), &fd) {
                inspect::Look::Image => look.is_service = true,
                inspect::Look::Code(code) | inspect::Look::Hosts(code) => {
                    let stat = file::stat(&fd);
                    // What was executed itself is told by the gate, if that was asked.
                    let is_told =
                        stat.is_ok_and(|stat| shared.table.is_marked(stat.device, stat.mount));
                    tell_script(shared, look, code, is_told);
                }
                inspect::Look::Nothing => (),
            }
        }
        Given::Pipe(pipe) => look.pipe = piped_script(look, pipe),
        // Of a root whose layers are not read, the upper layer tells.
        Given::Foreign(path) if look.watched.has_foreign_layers() && is_on_root(look, &path) => {
            let Ok(path) = RootfsPath::new(path) else { return };
            match inspect::of_unread(shared, &look.watched, path, None) {
                Some(code) => tell_script(shared, look, code, false),
                None => look.is_service = true,
            }
        }
        Given::Foreign(path) => {
            if shared.settings.looks_at(Filesystem::Volume)
                && let Ok(path) = RootfsPath::new(path)
            {
                tell_script(shared, look, inspect::unasked(path), false);
            }
        }
        Given::Nothing => (),
        Given::Missing => {
            if let Some(script) = &mut look.script {
                script.is_missing = true;
            }
        }
    }
}

/// Whether a path leads onto no other mount than the container's root, by its text.
fn is_on_root(look: &Look, path: &[u8]) -> bool {
    let Ok(mountinfo) = look.handle.mountinfo() else { return false };
    let mut mounts: Vec<_> = mounts::parse(&mountinfo)
        .filter(|mount| overlay::strip_directory(path, &mount.mount_point).is_some())
        .collect();
    mounts.sort_by_key(|mount| mount.mount_point.len());
    mounts.last().is_some_and(|mount| mount.device == look.watched.device)
}

/// A later look at a script: by now the shell has opened it, or the name has led nowhere
/// for so long that it was no mistake.
fn named_again(shared: &Files, look: &mut Look) {
    let Some(script) = &mut look.script else { return };
    let is_missing = std::mem::take(&mut script.is_missing);
    let is_shells = script.is_shells && !std::mem::replace(&mut script.is_certain, true);
    if is_shells
        && (is_missing || look.is_service)
        && let Some(held) = given::held_by_shell(&look.handle)
    {
        look.is_service = false;
        return take(shared, look, Given::File(held));
    }
    if !is_missing {
        return;
    }
    let given = given::by_name(&look.watched, &look.handle, &script.name);
    if !matches!(given, Given::Missing) {
        return take(shared, look, given);
    }
    // It runs, so there was one. What cannot be found is not the image's own.
    let name = script.name.clone();
    let path = if name.starts_with(b"/") {
        RootfsPath::new(name)
    } else {
        let directory = look.handle.cwd().unwrap_or_default();
        RootfsPath::new([&directory, &b"/"[..], &name].concat())
    };
    if let Ok(path) = path {
        tell_script(shared, look, inspect::gone(path, Filesystem::Overlay), false);
    }
}

/// A later look: it may have become a shell on a connection, or have been one all
/// along, with pipes in between.
fn again(shared: &Files, mut look: Look, around: &mut Around) -> Seen {
    let is_alive = look.handle.stat().is_ok_and(|stat| !stat.has_ended());
    if is_alive {
        named_again(shared, &mut look);
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
fn direct(shared: &Files, look: &Look, standard: &Standard) -> bool {
    let Some(inode) = standard.socket().filter(|_| !look.is_service) else { return false };
    let Some(connection) = look.handle.connections().remove(&inode) else { return false };
    tell_shell(shared, look, true, shells::direct(&connection.remote));
    true
}

fn tell_shell(shared: &Files, look: &Look, direct: bool, evidence: String) {
    let root = look.process.identity;
    let process = Arc::new(look.process.clone());
    let fact = Fact::ReverseShell { process, direct, evidence };
    // What it runs from here on is what is done over the connection.
    shared.note_session(&look.watched);
    if shared.observe(&look.watched, look.at, Source::Trace, fact)
        && shared.roots().open(&look.watched.container, root)
    {
        let watched = look.watched.clone();
        let event = Event::Opened { watched, root, is_interactive: true, process: None };
        shared.act(&look.watched, Act::Event(event));
    }
}

fn tell_script(shared: &Files, look: &mut Look, code: Code, is_told_when_executed: bool) {
    let Code { path, filesystem, state, lower, file_of } = code;
    let process = Arc::new(look.process.clone());
    let executed = look.script.as_ref().filter(|script| script.is_executed);
    let fact = match executed {
        // A descriptor that was executed is the trace's affair.
        Some(script) if is_told_when_executed || records::descriptor(&script.name).is_some() => {
            return;
        }
        Some(_) => Fact::Executed {
            path,
            filesystem,
            running: false,
            times: 1,
            state,
            lower,
            process,
            invoked_as: None,
            layer_file: None,
            writer: None,
        },
        None => {
            let may_be_executed = is_told_when_executed && state.mode & 0o111 != 0;
            let script = Script::File { path, filesystem, state, lower };
            if may_be_executed && file_of.is_none() && look.pipe.is_none() {
                // `#!/usr/bin/env X`, or a text without `#!`: the gate reports that it was
                // executed, and that comes first.
                look.pipe = Some(script);
                return;
            }
            Fact::Interpreted { script, process }
        }
    };
    shared.observe_file_of(&look.watched, file_of, look.at, Source::Trace, fact);
}

/// A script from a pipe that the container's own processes have made. What came in
/// with a session, or with the container's start, is whoever's who opened it.
fn piped_script(look: &Look, pipe: Pipe) -> Option<Script> {
    let stat = look.handle.first_stat();
    // The last one is outside.
    let mut chain = procfs::ancestors(stat, look.watched.pid_namespace);
    chain.retain(|ancestor| {
        ancestor.pid_namespace().ok() == look.watched.pid_namespace
            && ancestor.mount_namespace().ok() == look.watched.mount_namespace
    });
    let is_it =
        |found| matches!(found, Ok(Descriptor::Pipe { device, inode }) if (device, inode) == pipe);
    if is_it(chain.last()?.descriptor(0)) {
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
    reach::processes_of(watched)
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
