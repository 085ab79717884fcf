//! Interpreters of the image, checked when they start: which script they run, and whether
//! their input and output lead to a connection.
//!
//! This is best effort. A process that has ended before its check shows nothing, and a
//! process is checked only twice more after that. The thread `interpreters` takes
//! [`Started`] from `libraries`. It finds the script with `given`, examines it with
//! `inspect`, and reports to the pipeline. `scripts` and `shells` decide; this file reads
//! the processes for them.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::given::{self, Given};
use super::inspect::{self, Code};
use super::scripts::{self, Language, Runs};
use super::shells::{self, Neighbour, Pipe, Standard};
use super::started::Started;
use crate::health::Failure;
use crate::model::{
    ContainerId, Fact, FileFact, Filesystem, Process, RootfsPath, Script, SessionFact, Source,
};
use crate::sys::procfs::{self, Connection, Descriptor, Handle};
use crate::sys::{errand, file, mounts, overlay};
use crate::threads;
use crate::watch::core::fair::Receiver;
use crate::watch::core::shared::Next;
use crate::watch::core::watched::Watched;
use crate::watch::files::progress::Backlog;
use crate::watch::files::shared::Files;
use crate::watch::files::upper;
use crate::watch::process::activity::{Activity, Event};
use crate::watch::process::arguments::Recorded;
use crate::watch::process::{describe, reach, records};

/// When a shell is checked again: its input and output may be connected later than its
/// start.
const AGAIN: [Duration; 2] = [Duration::from_millis(200), Duration::from_secs(2)];

/// No more shells than this wait for a later check.
const MAX_WAITING: usize = 16 * 1024;

/// The maximum number of descriptors of a neighbour that are read.
const MAX_DESCRIPTORS: usize = 256;

/// The shortest time between scans of all processes of a container for their pipes,
/// sockets and terminals.
const BETWEEN_NEIGHBOURS: Duration = Duration::from_millis(50);

/// An interpreter that is being checked.
struct Check {
    watched: Arc<Watched>,
    at: Timestamp,
    /// When, by the clock of the kernel's records.
    executed: u64,
    handle: Handle,
    process: Process,
    /// A script that is reported by the next check. From a pipe: unless the process turns out
    /// to be a shell on a connection. From a file: by then its writer may be known.
    pending: Option<Pending>,
    /// It runs a script of the image, which may use connections.
    is_service: bool,
    /// The script that it was given by name.
    script: Option<Named>,
    /// Its script may not be read before that was decided: it is checked again soon.
    is_asked_about: bool,
    again: usize,
    due: Instant,
}

/// A script that is reported later.
struct Pending {
    script: Script,
    written: Written,
    /// What the change feed has to read first: then the writer of a file is known.
    backlog: Option<Backlog>,
}

/// What shows the writer of a script.
#[derive(Default)]
struct Written {
    writer: Option<Arc<Process>>,
    /// For a file on the container's overlay.
    stat: Option<file::Stat>,
}

/// A script, by the name that an interpreter was given.
struct Named {
    name: Vec<u8>,
    /// The interpreter is a shell, which keeps its script open.
    is_shells: bool,
    /// The script itself was executed.
    is_executed: bool,
    /// Nothing was found there.
    is_missing: bool,
    /// It was examined by the descriptor that the shell reads from.
    is_certain: bool,
}

/// Shells that wait for a later check. The thread does not own them, so that a thread that
/// replaces it can continue with them.
#[derive(Default)]
pub(crate) struct Waiting(Mutex<Queues>);

#[derive(Default)]
struct Queues {
    waiting: [VecDeque<Check>; AGAIN.len()],
    /// Checks for which there was no time. A process must not escape its check because many
    /// wait.
    deferred: VecDeque<Check>,
}

impl Waiting {
    /// Locked for one step at a time, and never while a process is checked.
    fn queues(&self) -> MutexGuard<'_, Queues> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queues {
    fn next_due(&self) -> Option<Instant> {
        let queues = self.waiting.iter().chain([&self.deferred]);
        queues.filter_map(|queue| Some(queue.front()?.due)).min()
    }

    /// Takes a deferred check first. Otherwise others could defer it for ever.
    fn take_due(&mut self, now: Instant) -> Option<Check> {
        std::iter::once(&mut self.deferred)
            .chain(&mut self.waiting)
            .find(|queue| queue.front().is_some_and(|check| check.due <= now))
            .and_then(VecDeque::pop_front)
    }

    fn take_any(&mut self) -> Option<Check> {
        std::iter::once(&mut self.deferred).chain(&mut self.waiting).find_map(VecDeque::pop_front)
    }
}

pub(crate) fn run(shared: &Files, started: &Receiver<Box<Started>>, waiting: &Waiting) {
    let mut around = Around::default();
    let mut unreadable = Unreadable { reported: errand::given_up(), last: None };
    loop {
        unreadable.report(shared);
        let due = waiting.queues().next_due();
        // The senders end when the watchers stop, and that ends the wait.
        let patience =
            due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
        match shared.next_within(started, patience) {
            Next::Item(one) => {
                threads::about(&one.watched.container);
                if let Some(check) = first(shared, *one) {
                    let mut queues = waiting.queues();
                    if check.is_asked_about {
                        defer(shared, &mut queues.deferred, check);
                    } else {
                        wait_for(shared, &mut queues.waiting, check);
                    }
                }
            }
            Next::Nothing => (),
            Next::End if threads::is_replaced() => return,
            Next::End => return check_a_last_time(shared, waiting, &mut around),
        }
        let now = Instant::now();
        loop {
            let check = waiting.queues().take_due(now);
            let Some(check) = check else { break };
            threads::about(&check.watched.container);
            let outcome = again(shared, check, &mut around);
            let mut queues = waiting.queues();
            match outcome {
                Outcome::Enough => (),
                Outcome::ForNow(check) => wait_for(shared, &mut queues.waiting, *check),
                Outcome::NotYet(check) => defer(shared, &mut queues.deferred, *check),
            }
        }
    }
}

/// Makes the last checks and reports what is known: no check follows.
fn check_a_last_time(shared: &Files, waiting: &Waiting, around: &mut Around) {
    let mut queues = std::mem::take(&mut *waiting.queues());
    while let Some(check) = queues.take_any() {
        if !shared.may_report() {
            return shared.leave(
                1 + queues.deferred.len() + queues.waiting.iter().map(VecDeque::len).sum::<usize>(),
            );
        }
        let _ = again(shared, check, around);
    }
}

/// How many reads of processes' memory were given up and reported, and when last.
struct Unreadable {
    reported: u64,
    last: Option<Instant>,
}

/// How often that is reported. No container is scanned again for it: the read would fail
/// again.
const BETWEEN_UNREADABLE: Duration = Duration::from_secs(10);

impl Unreadable {
    fn report(&mut self, shared: &Files) {
        let count = errand::given_up();
        if count == self.reported
            || self.last.is_some_and(|last| last.elapsed() < BETWEEN_UNREADABLE)
        {
            return;
        }
        let detail =
            format!("the memory of a process could not be read, {} times", count - self.reported);
        (self.reported, self.last) = (count, Some(Instant::now()));
        shared.degrade(Failure::ProcessUnreadable, None, &detail);
    }
}

/// The outcome of a later check.
enum Outcome {
    /// No further check is needed.
    Enough,
    /// A further check may show more.
    ForNow(Box<Check>),
    /// Its neighbours could not be scanned yet.
    NotYet(Box<Check>),
}

fn wait_for(shared: &Files, waiting: &mut [VecDeque<Check>; AGAIN.len()], mut check: Check) {
    let Some(after) = AGAIN.get(check.again) else { return };
    check.due = Instant::now() + *after;
    push(shared, &mut waiting[check.again], check);
}

fn defer(shared: &Files, deferred: &mut VecDeque<Check>, mut check: Check) {
    check.due = Instant::now() + BETWEEN_NEIGHBOURS;
    push(shared, deferred, check);
}

fn push(shared: &Files, queue: &mut VecDeque<Check>, mut check: Check) {
    if queue.len() < MAX_WAITING {
        queue.push_back(check);
    } else {
        report_pending(shared, &mut check, true);
        let detail = "too many shells wait to be checked again";
        shared.lose(Failure::CodeQueueFull, Some(&check.watched), detail);
    }
}

/// The first check, right after the execve. `None` if no further check is needed.
fn first(shared: &Files, started: Started) -> Option<Check> {
    let Started { watched, pid, file, exec_name, executed, at } = started;
    let handle = Handle::open(pid).ok()?;
    let exe = handle.exe().ok()?;
    // The process may have executed another program by now. Then /proc shows that one.
    if file.as_deref().is_some_and(|file| file != exe) {
        return None;
    }
    // The kernel's record comes first: the process can change what /proc shows.
    let recorded = match shared.arguments().of(pid, executed, executed) {
        Recorded::Arguments(arguments) => procfs::split_arguments(&arguments),
        Recorded::Unknown | Recorded::NotYet => None,
    };
    let arguments = match recorded {
        Some(arguments) => arguments,
        None => handle.arguments().ok()??,
    };
    let standard = standard(&handle);
    // A multi-call shell executes its own file again for each of its programs, under any
    // name.
    if *exec_name == *b"/proc/self/exe" {
        scripts::interpreter(b"busybox", &arguments)?;
    }
    // A hard link to a multi-call program may have the name of any other program.
    let is_multicall =
        handle.exe_identity().is_ok_and(|(device, inode)| watched.is_multicall(device, inode));
    let program = if is_multicall { b"busybox" } else { exe.as_slice() };
    let (language, rest) = scripts::interpreter(program, &arguments)?;
    let process = describe::as_it_is(&handle, &watched);
    let mut check = Check {
        watched,
        at,
        executed,
        handle,
        process,
        pending: None,
        is_service: false,
        script: None,
        is_asked_about: false,
        again: 0,
        due: Instant::now(),
    };
    match scripts::runs(language, rest) {
        Runs::Inline => (),
        Runs::File(name) => {
            check.script = Some(Named {
                is_shells: language == Language::Shell,
                is_executed: *name == *exec_name,
                is_missing: false,
                is_certain: false,
                name,
            });
            named(shared, &mut check);
        }
        Runs::Input => match standard.0[0] {
            Some(Descriptor::Socket(inode)) if standard.socket().is_none() => {
                let from = check.handle.connections().remove(&inode);
                check.pending = from.map(|from| {
                    let from = Some(format!("a connection to {}", from.remote));
                    Pending::piped(Script::Pipe { from })
                });
            }
            Some(Descriptor::Socket(_)) | None => (),
            Some(_) => {
                let given = given::by_descriptor(&check.handle, 0);
                take(shared, &mut check, given);
            }
        },
    }
    let is_reported = direct(shared, &mut check, &standard);
    (!is_reported).then_some(check)
}

/// Finds the script that was given by name, and judges it. The name is looked up before the
/// descriptor: if the shell has not opened the script yet, it will find it there.
fn named(shared: &Files, check: &mut Check) {
    let Some(script) = &check.script else { return };
    let by_name = given::by_name(&check.watched, &check.handle, &script.name);
    let held = if script.is_shells { given::held_by_shell(&check.handle) } else { Vec::new() };
    let held = held_script(shared, check, &by_name, held);
    if let Some(script) = &mut check.script {
        script.is_certain = held.is_some();
    }
    take(shared, check, held.map_or(by_name, Given::File));
}

/// Which of the files that a shell holds is its script: the one that its name leads to, or else
/// the first that is not the image's own. `None` if the shell has perhaps not opened it yet.
fn held_script(
    shared: &Files,
    check: &Check,
    by_name: &Given,
    mut held: Vec<OwnedFd>,
) -> Option<OwnedFd> {
    let identity = |fd: &OwnedFd| file::stat(fd).ok().map(|stat| (stat.device, stat.inode));
    let named = match by_name {
        Given::File(fd) => identity(fd),
        _ => None,
    };
    let is_named = |fd: &OwnedFd| named.is_some() && identity(fd) == named;
    let is_images = |fd: &OwnedFd| {
        let examined = inspect::examine(shared, &check.watched, Some(&check.handle), fd);
        matches!(examined, inspect::Examined::Image)
    };
    let found = held.iter().position(is_named);
    let found = found.or_else(|| held.iter().position(|fd| !is_images(fd)))?;
    Some(held.swap_remove(found))
}

/// Reports a script, if it is not the image's own.
fn take(shared: &Files, check: &mut Check, given: Given) {
    match given {
        Given::File(fd) => {
            match inspect::examine(shared, &check.watched, Some(&check.handle), &fd) {
                inspect::Examined::Image => check.is_service = true,
                inspect::Examined::Code(code) | inspect::Examined::Hosts(code) => {
                    let stat = file::stat(&fd).ok();
                    // The gate reports a script that was itself executed, if it was asked.
                    let is_reported = stat
                        .as_ref()
                        .is_some_and(|stat| shared.table.is_marked(stat.device, stat.mount));
                    let is_own = code.filesystem == Filesystem::Overlay && code.file_of.is_none();
                    let stat = stat.filter(|_| is_own);
                    let writer = stat.as_ref().and_then(|stat| {
                        let now = Duration::ZERO;
                        shared.writer_of_used(&check.watched, &code.path, stat, now)
                    });
                    report_script(shared, check, code, Written { writer, stat }, is_reported);
                }
                inspect::Examined::Nothing => (),
            }
        }
        Given::Pipe(pipe) => check.pending = piped_script(check, pipe).map(Pending::piped),
        // For a root whose layers are not read, the upper layer decides.
        Given::Foreign(path) if check.watched.has_foreign_layers() && is_on_root(check, &path) => {
            let Ok(path) = RootfsPath::new(path) else { return };
            match inspect::of_unread(shared, &check.watched, path, None) {
                Some(code) => report_script(shared, check, code, Written::default(), false),
                None => check.is_service = true,
            }
        }
        Given::Foreign(path) => {
            if shared.settings.looks_at(Filesystem::Volume)
                && let Ok(path) = RootfsPath::new(path)
            {
                report_script(shared, check, inspect::unasked(path), Written::default(), false);
            }
        }
        Given::Nothing => (),
        Given::Missing => {
            if let Some(script) = &mut check.script {
                script.is_missing = true;
            }
        }
    }
}

/// Whether a path leads onto no other mount than the container's root, by its text.
fn is_on_root(check: &Check, path: &[u8]) -> bool {
    let Ok(mountinfo) = check.handle.mountinfo() else { return false };
    let mut mounts: Vec<_> = mounts::parse(&mountinfo)
        .filter(|mount| overlay::strip_directory(path, &mount.mount_point).is_some())
        .collect();
    mounts.sort_by_key(|mount| mount.mount_point.len());
    mounts.last().is_some_and(|mount| mount.device == check.watched.device)
}

/// A later check of a script: by now the shell has opened it, or the name has led nowhere
/// for so long that the script is really gone.
fn named_again(shared: &Files, check: &mut Check) {
    let Some(script) = &mut check.script else { return };
    let is_missing = std::mem::take(&mut script.is_missing);
    let is_shells = script.is_shells && !std::mem::replace(&mut script.is_certain, true);
    let name = script.name.clone();
    let is_open = is_shells && (is_missing || check.is_service);
    if !is_open && !is_missing {
        return;
    }
    let given = given::by_name(&check.watched, &check.handle, &name);
    let held = if is_open { given::held_by_shell(&check.handle) } else { Vec::new() };
    if let Some(held) = held_script(shared, check, &given, held) {
        check.is_service = false;
        return take(shared, check, Given::File(held));
    }
    if !is_missing {
        return;
    }
    if !matches!(given, Given::Missing) {
        return take(shared, check, given);
    }
    // The interpreter runs, so there was a script. A script that cannot be found does not
    // count as the image's own.
    let path = if name.starts_with(b"/") {
        RootfsPath::new(name)
    } else {
        let directory = check.handle.cwd().unwrap_or_default();
        RootfsPath::new([&directory, &b"/"[..], &name].concat())
    };
    if let Ok(path) = path {
        report_script(
            shared,
            check,
            inspect::gone(path, Filesystem::Overlay),
            Written::default(),
            false,
        );
    }
}

/// A later check: the process may have become a shell on a connection, or may have been one
/// from the beginning, with pipes in between.
fn again(shared: &Files, mut check: Check, around: &mut Around) -> Outcome {
    let is_alive = !check.handle.has_ended();
    if is_alive {
        named_again(shared, &mut check);
        let standard = standard(&check.handle);
        if direct(shared, &mut check, &standard) {
            return Outcome::Enough;
        }
        if !check.is_service && standard.may_be_relayed() {
            let Some(others) = around.of(&check.watched) else {
                return Outcome::NotYet(Box::new(check));
            };
            let evidence = shells::piped(&standard, others);
            if let Some(evidence) = evidence.or_else(|| shells::relayed(&standard, others)) {
                report_shell(shared, &mut check, false, evidence);
                return Outcome::Enough;
            }
        }
    }
    check.again += 1;
    let is_last = check.again >= AGAIN.len() || shared.is_stopping();
    // Only now: a shell on a connection is not also reported as a script from a pipe.
    report_pending(shared, &mut check, is_last);
    if is_alive || check.pending.is_some() {
        Outcome::ForNow(Box::new(check))
    } else {
        Outcome::Enough
    }
}

/// The processes of the container that was scanned last. One scan serves all shells that
/// start together.
#[derive(Default)]
struct Around {
    last: Option<(Instant, ContainerId, Vec<Neighbour>)>,
}

impl Around {
    /// `None` if another container's processes were scanned just now.
    fn of(&mut self, watched: &Watched) -> Option<&[Neighbour]> {
        let is_young = |at: &Instant| at.elapsed() < BETWEEN_NEIGHBOURS;
        let last = self.last.take().filter(|(at, ..)| is_young(at));
        let is_others =
            last.as_ref().is_some_and(|(_, container, _)| *container != watched.container);
        let now = || (Instant::now(), watched.container.clone(), neighbours(watched));
        let last = last.unwrap_or_else(now);
        let (_, _, neighbours) = self.last.insert(last);
        (!is_others).then_some(neighbours.as_slice())
    }
}

fn standard(handle: &Handle) -> Standard {
    Standard([0, 1, 2].map(|number| handle.descriptor(number).ok()))
}

/// Reports a shell on a connection. True if the process is one.
fn direct(shared: &Files, check: &mut Check, standard: &Standard) -> bool {
    let Some(inode) = standard.socket().filter(|_| !check.is_service) else { return false };
    let Some(connection) = check.handle.connections().remove(&inode) else { return false };
    report_shell(shared, check, true, shells::direct(&connection.remote));
    true
}

/// Reports a shell. Text from a pipe is what comes in by the connection, and no finding of its
/// own; a script that the shell runs from a file is one.
fn report_shell(shared: &Files, check: &mut Check, direct: bool, evidence: String) {
    check.pending.take_if(|pending| matches!(pending.script, Script::Pipe { .. }));
    report_pending(shared, check, true);
    let root = check.process.identity;
    let process = Arc::new(check.process.clone());
    let fact = Fact::Session(SessionFact::ReverseShell { process, direct, evidence });
    // What it runs from now on is activity over the connection, and so of a session.
    shared.note_session(&check.watched);
    if shared.observe(&check.watched, check.at, Source::Trace, fact)
        && shared.open_root(&check.watched, root)
    {
        let watched = check.watched.clone();
        let event = Event::Opened { watched, root, is_interactive: true, process: None };
        shared.note_activity(&check.watched, Activity::Event(event));
    }
}

impl Pending {
    fn piped(script: Script) -> Pending {
        Pending { script, written: Written::default(), backlog: None }
    }
}

/// Reports the script that has waited for a later check. On a busy machine the change feed may
/// be behind still: then the script waits for another check, if one follows.
fn report_pending(shared: &Files, check: &mut Check, is_last: bool) {
    let has_reached = |backlog| shared.progress.has_reached(backlog);
    let is_read = check.pending.as_ref().and_then(|it| it.backlog).is_none_or(has_reached);
    let Some(Pending { script, written, .. }) = check.pending.take_if(|_| is_read || is_last)
    else {
        return;
    };
    let known = |path, stat| shared.writer_read(&check.watched, path, stat);
    let writer = match (&script, &written.stat) {
        (Script::File { path, .. }, Some(stat)) if written.writer.is_none() && is_read => {
            known(path, stat)
        }
        _ => written.writer,
    };
    let process = Arc::new(check.process.clone());
    if written.stat.as_ref().is_some_and(|stat| was_denied(shared, check, &script, stat)) {
        return;
    }
    let denied = false;
    let fact = Fact::File(FileFact::Interpreted { script, process, writer, denied });
    shared.observe(&check.watched, check.at, Source::Trace, fact);
}

/// Whether the interpreter may not read its script before that was decided.
fn is_asked_about(shared: &Files, check: &Check, script: &Script, stat: &file::Stat) -> bool {
    // Where the kernel refuses all marks, nothing is asked.
    let Check { watched, executed, .. } = check;
    shared.health.guarded().0 > 0
        && below(watched, script, stat)
            .is_some_and(|below| shared.guards.was_guarded(watched, &below, *executed))
}

/// Whether it was not allowed to read it, and has ended. Then the script has not run, and that was
/// reported.
fn was_denied(shared: &Files, check: &Check, script: &Script, stat: &file::Stat) -> bool {
    let (Check { watched, executed, .. }, pid) = (check, check.handle.identity().pid);
    below(watched, script, stat)
        .is_some_and(|below| shared.guards.is_denied(watched, pid, &below, *executed))
        && check.handle.has_ended()
}

/// A script of the container's own layer, as it is below the overlay.
fn below(watched: &Watched, script: &Script, stat: &file::Stat) -> Option<file::Stat> {
    let Script::File { path, .. } = script else { return None };
    file::stat(upper::upper(watched, path, stat)?).ok()
}

fn report_script(
    shared: &Files,
    check: &mut Check,
    code: Code,
    written: Written,
    is_reported_when_executed: bool,
) {
    let Code { path, filesystem, state, lower, file_of } = code;
    let process = Arc::new(check.process.clone());
    let executed = check.script.as_ref().filter(|script| script.is_executed);
    let fact = match executed {
        // The trace reports a descriptor that was executed.
        Some(script)
            if is_reported_when_executed || records::descriptor(&script.name).is_some() =>
        {
            return;
        }
        Some(_) => Fact::File(FileFact::Executed {
            path,
            filesystem,
            running: false,
            denied: false,
            times: 1,
            state,
            lower,
            process,
            invoked_as: None,
            layer_file: None,
            writer: written.writer,
        }),
        None => {
            // `#!/usr/bin/env X`, or a text without `#!`: the gate reports that it was
            // executed, and that comes first.
            // The event of its closing may not have been read yet.
            let may_show_its_writer = written.writer.is_none() && written.stat.is_some();
            let may_be_executed = is_reported_when_executed && state.mode & 0o111 != 0;
            let script = Script::File { path, filesystem, state, lower };
            // It waits to be read, or was not allowed to be.
            let stat = written.stat.as_ref();
            let is_asked_about =
                stat.is_some_and(|stat| is_asked_about(shared, check, &script, stat));
            check.is_asked_about |= is_asked_about;
            if (may_be_executed || may_show_its_writer || is_asked_about)
                && file_of.is_none()
                && check.pending.is_none()
            {
                let backlog = written.writer.is_none().then(|| shared.progress.backlog());
                check.pending = Some(Pending { script, written, backlog });
                return;
            }
            let writer = written.writer;
            Fact::File(FileFact::Interpreted { script, process, writer, denied: false })
        }
    };
    shared.observe_file_of(&check.watched, file_of, check.at, Source::Trace, fact);
}

/// A script from a pipe that the container's own processes have made. `None` for a pipe that
/// came in with a session or with the container's start: the process outside that opened it
/// is the source.
fn piped_script(check: &Check, pipe: Pipe) -> Option<Script> {
    let stat = check.handle.first_stat();
    // The last one is outside.
    let mut chain = procfs::ancestors(stat, check.watched.pid_namespace);
    chain.retain(|ancestor| {
        ancestor.pid_namespace().ok() == check.watched.pid_namespace
            && ancestor.mount_namespace().ok() == check.watched.mount_namespace
    });
    let is_it =
        |found| matches!(found, Ok(Descriptor::Pipe { device, inode }) if (device, inode) == pipe);
    if is_it(chain.last()?.descriptor(0)) {
        return None;
    }
    let from = neighbours(&check.watched).into_iter().find(|other| other.writes.contains(&pipe));
    Some(Script::Pipe { from: from.map(|from| from.name) })
}

/// Whether a process is itself reported as a shell on this connection. Such a process is no
/// relay for the processes that it gives a terminal to.
fn is_shell_on(handle: &Handle, connection: u64) -> bool {
    let is_interpreter = || {
        let (exe, arguments) = (handle.exe().ok()?, handle.arguments().ok()??);
        scripts::interpreter(&exe, &arguments).map(drop)
    };
    standard(handle).socket() == Some(connection) && is_interpreter().is_some()
}

/// The processes of a container, with their pipes, sockets and terminals.
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
                        // One table serves all processes of a container, except those
                        // that have created a network of their own.
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
