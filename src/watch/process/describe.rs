//! What is told of a process, gathered while it may be ending.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use super::arguments::Words;
use crate::model::{Ancestor, Process, ProcessIdentity, RootfsPath, bytes_of_printable, printable};
use crate::sys::overlay;
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::watched::Watched;

/// How often a process is looked at while its execve is under way.
pub(crate) const STEP: Duration = Duration::from_micros(100);

/// What the gate saw of a process: the caller of execve, before it became the
/// new program.
#[derive(Debug)]
pub(crate) struct Caller {
    /// `None` if the process is not visible in our pid namespace.
    pub(crate) stat: Option<Stat>,
    pub(crate) pid: u32,
    /// When the gate was asked, by the clock of the kernel's records: its execve ends
    /// later. `None` if nobody had to be asked.
    pub(crate) asked: Option<u64>,
    pub(crate) pidfd: Option<OwnedFd>,
}

impl Caller {
    /// `None` if there is no descriptor left for the handle.
    pub(crate) fn try_clone(&self) -> Option<Caller> {
        let pidfd = self.pidfd.as_ref().map(OwnedFd::try_clone).transpose().ok()?;
        Some(Caller { stat: self.stat.clone(), pid: self.pid, asked: self.asked, pidfd })
    }
}

/// A process after its execve.
#[derive(Debug)]
pub(crate) struct Executing {
    pub(crate) process: Process,
}

pub(crate) fn text(bytes: &[u8]) -> String {
    printable(bytes)
}

pub(crate) fn texts(arguments: &[Vec<u8>]) -> Vec<String> {
    arguments.iter().map(|argument| printable(argument)).collect()
}

/// How long an execve may take before its arguments are not waited for while
/// others wait, and at all: on a busy machine it may be long before it gets a turn.
pub(crate) const PATIENCE: Duration = Duration::from_millis(2);
pub(crate) const PATIENCE_WHEN_IDLE: Duration = Duration::from_millis(250);

/// Waits until the caller has become the new program, but not for long if
/// `others_wait`, and describes that. What is still the caller's own (the event comes before
/// execve is over) is never told as the new program's: then it is `None`.
pub(crate) fn after_exec(
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
pub(crate) fn words_after_exec(caller: &Caller, others_wait: &dyn Fn() -> bool) -> Option<Words> {
    let stat = caller.stat.as_ref()?;
    let handle = Handle::open_exactly(stat.identity).ok()?;
    let now = wait_for_program(&handle, stat, caller, others_wait)?;
    let argv = handle.arguments().ok()??;
    let exe = handle.exe().ok();
    is_still(&handle, &now).then(|| Words { exe: exe.as_deref().map(text), argv: texts(&argv) })
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
pub(crate) fn as_it_is(handle: &Handle, watched: &Watched) -> Process {
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
pub(crate) fn root_by_name(path: &RootfsPath, exe: Option<&str>) -> Option<String> {
    let exe = exe?.strip_suffix(" (deleted)").or(exe)?;
    let root = path.as_bytes().strip_suffix(&*bytes_of_printable(exe))?;
    (exe.starts_with('/') && !root.is_empty()).then(|| printable(root))
}

/// The ancestors of a process that is gone, from its parent on.
pub(crate) fn ancestors_from(parent: u32, watched: &Watched) -> Vec<Ancestor> {
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

pub(crate) fn ancestor(handle: &Handle) -> Ancestor {
    Ancestor {
        identity: handle.identity(),
        exe: handle.exe().ok().as_deref().map(text),
        argv: handle.arguments().ok().flatten().as_deref().map(texts),
    }
}

/// The name under which a program was called, where that says more than `path`.
pub(crate) fn invoked_as(exec_name: &[u8], path: &RootfsPath) -> Option<String> {
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
