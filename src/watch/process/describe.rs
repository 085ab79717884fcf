//! What is told of a process, gathered while it may be ending.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use super::arguments::Recorded;
use super::arguments::Words;
use crate::model::{Ancestor, Process, ProcessIdentity, RootfsPath, bytes_of_printable, printable};
use crate::sys::overlay;
use crate::sys::perf;
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;

/// How often a process is looked at while its execve is under way.
const STEP: Duration = Duration::from_micros(100);

/// What the gate saw of a process: the caller of execve, before it became the
/// new program.
#[derive(Debug)]
pub(in crate::watch) struct Caller {
    /// `None` if the process is not visible in our pid namespace.
    pub(in crate::watch) stat: Option<Stat>,
    pub(in crate::watch) pid: u32,
    /// When the gate was asked, by the clock of the kernel's records: its execve ends
    /// later. `None` if nobody had to be asked.
    pub(in crate::watch) asked: Option<u64>,
    pub(in crate::watch) pidfd: Option<OwnedFd>,
}

impl Caller {
    /// `None` if there is no descriptor left for the handle.
    pub(in crate::watch) fn try_clone(&self) -> Option<Caller> {
        let pidfd = self.pidfd.as_ref().map(OwnedFd::try_clone).transpose().ok()?;
        Some(Caller { stat: self.stat.clone(), pid: self.pid, asked: self.asked, pidfd })
    }
}

/// A process after its execve.
#[derive(Debug)]
pub(in crate::watch) struct Executing {
    pub(in crate::watch) process: Process,
}

fn text(bytes: &[u8]) -> String {
    printable(bytes)
}

fn texts(arguments: &[Vec<u8>]) -> Vec<String> {
    arguments.iter().map(|argument| printable(argument)).collect()
}

/// How long an execve may take before its arguments are not waited for while
/// others wait, and at all: on a busy machine it may be long before it gets a turn.
const PATIENCE: Duration = Duration::from_millis(2);
const PATIENCE_WHEN_IDLE: Duration = Duration::from_millis(250);

/// Waits until the caller has become the new program, but not for long if
/// `others_wait`, and describes that. What is still the caller's own (the event comes before
/// execve is over) is never told as the new program's: then it is `None`.
pub(in crate::watch) fn after_exec(
    caller: &Caller,
    watched: &Watched,
    others_wait: &dyn Fn() -> bool,
) -> Executing {
    let Some(stat) = &caller.stat else {
        return Executing {
            process: Process {
                identity: ProcessIdentity { pid: caller.pid, start_time: 0 },
                exe: None,
                argv: None,
                uid: None,
                tty: None,
                root: None,
                ancestors: Vec::new(),
            },
        };
    };
    let mut executing = Executing {
        process: Process {
            identity: stat.identity,
            exe: None,
            argv: None,
            uid: None,
            tty: stat.tty(),
            root: None,
            ancestors: Vec::new(),
        },
    };
    if let Ok(handle) = Handle::open_exactly(stat.identity) {
        // It is the caller's too, and a program may be over before it is described.
        executing.process.root = own_root(&handle, watched);
        if let Some(now) = wait_for_program(&handle, stat, caller, others_wait) {
            let exe = handle.exe().ok();
            let argv = handle.arguments().ok().flatten();
            if is_still(&handle, &now) {
                executing.process.exe = exe.as_deref().map(text);
                executing.process.argv = argv.as_deref().map(texts);
            }
        }
        executing.process.uid = handle.uid().ok();
    }
    executing.process.ancestors = ancestors(stat, watched.pid_namespace);
    executing
}

/// Waits until the caller has become another program; `None` if it has not, or has ended.
fn wait_for_program(
    handle: &Handle,
    before: &Stat,
    caller: &Caller,
    others_wait: &dyn Fn() -> bool,
) -> Option<Stat> {
    let start = Instant::now();
    loop {
        let now = handle.stat().ok().filter(|now| !now.has_ended())?;
        if now.area.is_complete() && now.area != before.area {
            return Some(now);
        }
        let waited = start.elapsed();
        if waited >= PATIENCE_WHEN_IDLE || waited >= PATIENCE && others_wait() {
            return None;
        }
        wait_or_end(caller, STEP);
    }
}

/// Whether a process has not gone on to another program meanwhile. That it has ended
/// makes nothing untrue.
fn is_still(handle: &Handle, now: &Stat) -> bool {
    let then = handle.stat().ok().filter(|then| !then.has_ended());
    then.is_none_or(|then| then.area == now.area)
}

/// What the caller has become, in as few looks as will do: of what is over within a
/// moment.
pub(in crate::watch) fn words_after_exec(
    caller: &Caller,
    others_wait: &dyn Fn() -> bool,
) -> Option<Words> {
    let stat = caller.stat.as_ref()?;
    let handle = Handle::open_exactly(stat.identity).ok()?;
    let now = wait_for_program(&handle, stat, caller, others_wait)?;
    let argv = handle.arguments().ok()??;
    let exe = handle.exe().ok();
    is_still(&handle, &now).then(|| Words { exe: exe.as_deref().map(text), argv: texts(&argv) })
}

/// For how long after the question the kernel's records of an execve are waited for.
const PATIENCE_FOR_RECORDS: Duration = Duration::from_millis(20);

/// With what arguments a process has become a program that the gate was asked about, by
/// the kernel's records: of one that had ended before /proc was read. Waits until they
/// have been read, but not for long if `others_wait`. Counted from the question on, so
/// that of many who wait each one has been waited for with the others.
pub(in crate::watch) fn recorded_arguments(
    shared: &Shared,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Vec<String>> {
    // Of a process that is not visible in our pid namespace there are no records either.
    let asked = asked.filter(|_| pid != 0 && shared.records_arguments())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    loop {
        let now = perf::now();
        match shared.arguments().of(pid, asked, until) {
            Recorded::Arguments(arguments) => return listed(&arguments),
            Recorded::Unknown => return None,
            Recorded::NotYet => (),
        }
        let waited = Duration::from_nanos(now.saturating_sub(asked));
        if waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return None;
        }
        std::thread::sleep(STEP);
    }
}

/// By what path a process has become a program that the gate was asked about, by the same
/// records. Its own memory is not read for it: a container can put there what is read from
/// a filesystem of its own.
pub(in crate::watch) fn recorded_name(
    shared: &Shared,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Box<[u8]>> {
    let asked = asked.filter(|_| pid != 0 && shared.records_executions())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    loop {
        let now = perf::now();
        let name = shared.arguments().name_of(pid, asked, until);
        let waited = Duration::from_nanos(now.saturating_sub(asked));
        if name.is_some() || waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return name;
        }
        std::thread::sleep(STEP);
    }
}

/// Waits until the kernel's records of an execve that the gate was asked about have been
/// read, but not for long if `others_wait`.
pub(in crate::watch) fn wait_for_records(
    shared: &Shared,
    (pid, asked): (u32, u64),
    others_wait: &dyn Fn() -> bool,
) {
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    let is_read = || !matches!(shared.arguments().of(pid, asked, until), Recorded::NotYet);
    while shared.records_executions() && !is_read() {
        let waited = Duration::from_nanos(perf::now().saturating_sub(asked));
        if waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return;
        }
        std::thread::sleep(STEP);
    }
}

/// The same without waiting: of the first execve between two times.
pub(in crate::watch) fn recorded(
    shared: &Shared,
    pid: u32,
    since: u64,
    until: u64,
) -> Option<Vec<String>> {
    match shared.arguments().of(pid, since, until) {
        Recorded::Arguments(arguments) => listed(&arguments),
        Recorded::Unknown | Recorded::NotYet => None,
    }
}

/// What was read of the program that a process has become, at the gate's question.
pub(in crate::watch) fn found(
    shared: &Shared,
    (pid, time): (u32, u64),
    exe: Option<&[u8]>,
) -> Option<Vec<String>> {
    let arguments = shared.arguments();
    let words = arguments.found_of(pid, time)?;
    // A process may have gone on to another program before anything was read.
    let is_it = words.exe.is_none() || exe.is_none_or(|exe| words.exe == Some(text(exe)));
    is_it.then(|| words.argv.clone())
}

fn listed(arguments: &[u8]) -> Option<Vec<String>> {
    procfs::split_arguments(arguments).as_deref().map(texts)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Sleeps, but not longer than the process lives.
fn wait_or_end(caller: &Caller, step: Duration) {
    let Some(pidfd) = &caller.pidfd else {
        std::thread::sleep(step);
        return;
    };
    let mut fds =
        [rustix::event::PollFd::from_borrowed_fd(pidfd.as_fd(), rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec::try_from(step).expect("a fraction of a second fits");
    if rustix::event::poll(&mut fds, Some(&timeout)).is_err() {
        std::thread::sleep(step);
    }
}

/// Describes a process that is not in the middle of anything we know of.
pub(in crate::watch) fn as_it_is(handle: &Handle, watched: &Watched) -> Process {
    let stat = handle.first_stat();
    Process {
        identity: stat.identity,
        exe: handle.exe().ok().as_deref().map(text),
        argv: handle.arguments().ok().flatten().as_deref().map(texts),
        uid: handle.uid().ok(),
        tty: stat.tty(),
        root: own_root(handle, watched),
        ancestors: ancestors(stat, watched.pid_namespace),
    }
}

/// A process's root directory, where that is not the container's.
fn own_root(handle: &Handle, watched: &Watched) -> Option<String> {
    let root = handle.root().ok()?;
    let root = overlay::strip_directory(&root, &watched.root_name).unwrap_or(&root);
    (root.starts_with(b"/") && root != b"/").then(|| printable(root))
}

/// The root directory by which the file at `path` is called `exe` there: that of a
/// process that has a mount namespace of its own.
pub(in crate::watch) fn root_by_name(path: &RootfsPath, exe: Option<&str>) -> Option<String> {
    let exe = exe?.strip_suffix(" (deleted)").or(exe)?;
    let root = path.as_bytes().strip_suffix(&*bytes_of_printable(exe))?;
    (exe.starts_with('/') && !root.is_empty()).then(|| printable(root))
}

/// The ancestors of a process that is gone, from its parent on.
pub(in crate::watch) fn ancestors_from(parent: u32, watched: &Watched) -> Vec<Ancestor> {
    let gone = Stat {
        // Later than any parent can have started.
        identity: ProcessIdentity { pid: 0, start_time: u64::MAX },
        comm: Box::default(),
        state: b'X',
        parent,
        session: 0,
        tty_nr: 0,
        area: procfs::ArgumentArea { arguments: (0, 0), environment: (0, 0) },
    };
    ancestors(&gone, watched.pid_namespace)
}

fn ancestors(stat: &Stat, pid_namespace: Option<u64>) -> Vec<Ancestor> {
    procfs::ancestors(stat, pid_namespace).iter().map(ancestor).collect()
}

pub(in crate::watch) fn ancestor(handle: &Handle) -> Ancestor {
    Ancestor {
        identity: handle.identity(),
        exe: handle.exe().ok().as_deref().map(text),
        argv: handle.arguments().ok().flatten().as_deref().map(texts),
    }
}

/// The name under which a program was called, where that says more than `path`.
pub(in crate::watch) fn invoked_as(exec_name: &[u8], path: &RootfsPath) -> Option<String> {
    let is_the_same = if exec_name.starts_with(b"/") {
        RootfsPath::new(exec_name).as_ref() == Ok(path)
    } else {
        // Relative to a directory that is not known here.
        let name = exec_name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        name == path.file_name()
    };
    (!is_the_same && !exec_name.is_empty()).then(|| printable(exec_name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(exec_name: &str, path: &str, expected: Option<&str>) {
        let path = RootfsPath::new(path).unwrap();
        assert_eq!(invoked_as(exec_name.as_bytes(), &path).as_deref(), expected);
    }

    #[test]
    fn a_nested_root_is_known_by_what_the_file_is_called_there() {
        let check = |path: &str, exe, expected: Option<&str>| {
            let path = RootfsPath::new(path).unwrap();
            assert_eq!(root_by_name(&path, Some(exe)).as_deref(), expected, "{exe}");
        };
        check("/tmp/alpine/bin/sh", "/bin/sh", Some("/tmp/alpine"));
        check("/bin/sh", "/bin/sh", None);
        check("/tmp/alpine/bin/sh", "/tmp/alpine/bin/sh", None);
        check("/tmp/alpine/bin/sh", "/bin/ash", None);
    }

    #[test]
    fn another_name_is_told_and_another_spelling_is_not() {
        check("/bin/ls", "/bin/busybox", Some("/bin/ls"));
        check("/bin//busybox", "/bin/busybox", None);
        check("./busybox", "/bin/busybox", None);
        check("./ls", "/bin/busybox", Some("./ls"));
        check("/proc/self/fd/3", "/tmp/x", Some("/proc/self/fd/3"));
        check("", "/tmp/x", None);
    }
}
