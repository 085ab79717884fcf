//! Describes a process for a report, while it may be ending.
//!
//! It reads /proc and keeps nothing. The gate's event comes before execve is over: what is
//! still the caller's must never be reported as the new program's. The threads that describe
//! and check processes use it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use super::arguments::ReadProgram;
use crate::model::{Ancestor, Process, ProcessIdentity, RootfsPath, bytes_of_printable, printable};
use crate::sys::overlay;
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::watched::Watched;

/// How often a process is read while its execve is in progress.
pub(crate) const STEP: Duration = Duration::from_micros(100);

/// A process as the gate saw it: the caller of execve, before it became the new program.
#[derive(Debug)]
pub(crate) struct Caller {
    /// `None` if the process is not visible in the daemon's pid namespace.
    pub(crate) stat: Option<Stat>,
    pub(crate) pid: u32,
    /// When the gate was asked, by the clock of the kernel's records: the execve ends later.
    /// `None` if the gate was not asked.
    pub(crate) asked: Option<u64>,
    pub(crate) pidfd: Option<OwnedFd>,
}

impl Caller {
    /// `None` if no descriptor is left for the handle.
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

/// How long driftd waits for the end of an execve: while other executions wait, and otherwise.
/// On a busy machine, the process may get no processor for long.
pub(crate) const PATIENCE: Duration = Duration::from_millis(2);
pub(crate) const PATIENCE_WHEN_IDLE: Duration = Duration::from_millis(250);

/// Waits until the caller has become the new program, but not for long if `others_wait`, and
/// describes the program. What is still the caller's own (the event comes before execve is
/// over) is never reported as the new program's: those fields are `None` then.
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
        // The root is read first: it is the same before execve, and the process may end before
        // it is described.
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

/// Describes a process that is about to become the program at `path`. Its arguments cannot be
/// read before.
pub(crate) fn before_exec(caller: &Stat, watched: &Watched, path: &RootfsPath) -> Process {
    let handle = Handle::open_exactly(caller.identity).ok();
    let root = handle.as_ref().and_then(|handle| own_root(handle, watched));
    Process {
        identity: caller.identity,
        exe: Some(text(path.as_bytes())),
        argv: None,
        uid: handle.and_then(|handle| handle.uid().ok()),
        tty: caller.tty(),
        root,
        ancestors: ancestors(caller, watched.pid_namespace),
    }
}

/// Waits until the caller has become another program; `None` if it has not, or if it has
/// ended.
fn wait_for_program(
    handle: &Handle,
    before: &Stat,
    caller: &Caller,
    others_wait: &dyn Fn() -> bool,
) -> Option<Stat> {
    let start = Instant::now();
    loop {
        // Before the look: this thread itself may be late after it.
        let waited = start.elapsed();
        let now = handle.stat().ok().filter(|now| !now.has_ended())?;
        if now.area.is_complete() && now.area != before.area {
            return Some(now);
        }
        if waited >= PATIENCE_WHEN_IDLE || waited >= PATIENCE && others_wait() {
            return None;
        }
        wait_or_end(caller, STEP);
    }
}

/// Whether a process has not become another program meanwhile. If it has ended, what was read
/// is still true.
fn is_still(handle: &Handle, now: &Stat) -> bool {
    let then = handle.stat().ok().filter(|then| !then.has_ended());
    then.is_none_or(|then| then.area == now.area)
}

/// The program that the caller has become, with as few reads as possible: for processes that
/// end within a moment.
pub(crate) fn program_after_exec(
    caller: &Caller,
    others_wait: &dyn Fn() -> bool,
) -> Option<ReadProgram> {
    let stat = caller.stat.as_ref()?;
    let handle = Handle::open_exactly(stat.identity).ok()?;
    let now = wait_for_program(&handle, stat, caller, others_wait)?;
    let argv = handle.arguments().ok()??;
    let exe = handle.exe().ok();
    is_still(&handle, &now)
        .then(|| ReadProgram { exe: exe.as_deref().map(text), argv: texts(&argv) })
}

/// What a process runs now, and the device and inode of that program, if it has become another
/// program since `before`.
pub(crate) fn program_now(before: &Stat) -> Option<(ReadProgram, (u64, u64))> {
    let handle = Handle::open_exactly(before.identity).ok()?;
    let now = handle.stat().ok().filter(|now| !now.has_ended())?;
    if !now.area.is_complete() || now.area == before.area {
        return None;
    }
    let program = handle.exe_identity().ok()?;
    let argv = handle.arguments().ok()??;
    let exe = handle.exe().ok();
    let read = ReadProgram { exe: exe.as_deref().map(text), argv: texts(&argv) };
    is_still(&handle, &now).then_some((read, program))
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

/// Describes a process that is in no execve that driftd knows of.
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

/// The root directory of a process, if it is not the container's.
fn own_root(handle: &Handle, watched: &Watched) -> Option<String> {
    let root = handle.root().ok()?;
    let root = overlay::strip_directory(&root, &watched.root_name).unwrap_or(&root);
    (root.starts_with(b"/") && root != b"/").then(|| printable(root))
}

/// The root directory in which the file at `path` has the name `exe`: that of a process with
/// a mount namespace of its own.
pub(crate) fn root_by_name(path: &RootfsPath, exe: Option<&str>) -> Option<String> {
    let exe = exe?.strip_suffix(" (deleted)").or(exe)?;
    let root = path.as_bytes().strip_suffix(&*bytes_of_printable(exe))?;
    (exe.starts_with('/') && !root.is_empty()).then(|| printable(root))
}

/// The ancestors of a process that has ended, from its parent on.
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
        is_proven_inside: false,
    }
}

/// The name by which a program was executed, if it is another one than `path`.
pub(crate) fn invoked_as(exec_name: &[u8], path: &RootfsPath) -> Option<String> {
    let is_the_same = if exec_name.starts_with(b"/") {
        RootfsPath::new(exec_name).as_ref() == Ok(path)
    } else {
        // The name is relative to a directory that is not known here.
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
    fn a_nested_root_is_known_by_the_files_name_in_it() {
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
    fn another_name_is_reported_and_another_spelling_is_not() {
        check("/bin/ls", "/bin/busybox", Some("/bin/ls"));
        check("/bin//busybox", "/bin/busybox", None);
        check("./busybox", "/bin/busybox", None);
        check("./ls", "/bin/busybox", Some("./ls"));
        check("/proc/self/fd/3", "/tmp/x", Some("/proc/self/fd/3"));
        check("", "/tmp/x", None);
    }
}
