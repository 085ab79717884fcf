//! Arming for certain: asked by the kernel before the host's container runtime
//! runs, so that a container carries its marks before its entry point does.
//!
//! A shim calls the runtime twice: `create` leaves the container's init waiting in
//! its namespaces, `start` lets it become the entry point. The second call is held
//! until the marks are there.
//!
//! ```text
//! shim execs runc ──> arm ── is it a shim of the host's? ──> arming
//!                      ^                                       │ bundle/init.pid: init waits?
//!                      └───────── marked, or nothing to do <───┘ then its marks
//! ```
//!
//! Every container start of the node passes here, so nothing may hold it: this
//! thread only looks at what cannot block, another one does the work, and after
//! [`LIMIT`] the runtime runs whatever came of it. A call that is no shim's (a
//! runtime within a container, at a terminal, or the runtime's own) goes on at
//! once. The gate's heartbeat depends on this thread's turns.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::Report;
use super::control::{Marked, Marker};
use super::sessions;
use super::shared::Shared;
use crate::health::Failure;
use crate::model::{ContainerId, ProcessIdentity};
use crate::sys::fanotify::{Answer, Buffer, Group, Incoming, Permission, ReadError};
use crate::sys::file;
use crate::sys::procfs::{self, Handle};

/// Which containers are armed before they start.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The runtimes' programs. Those that are not there yet are waited for.
    pub runtimes: Vec<PathBuf>,
    /// The containerds whose shims are listened to, by their sockets.
    pub sockets: Vec<PathBuf>,
    /// containerd namespaces that are not watched.
    pub exclude_namespaces: BTreeSet<String>,
}

/// For how long a runtime may be held.
const LIMIT: Duration = Duration::from_millis(500);
const TURN: Duration = Duration::from_millis(250);
/// About a hundred calls of the runtime.
const READ_BYTES: usize = 4 * 1024;
/// How many calls may be held at a time.
pub(super) const QUEUE: usize = 256;
/// Bundles of one shim's namespace that are looked at in one call.
const MAX_BUNDLES: usize = 8 * 1024;

/// A call of a runtime that is to be looked into.
#[derive(Debug)]
pub(super) struct Call {
    number: u64,
    caller: ProcessIdentity,
    /// The shim, if the caller is its child.
    parent: u32,
}

/// A call that is held.
struct Held<'group> {
    number: u64,
    permission: Permission<'group>,
    since: Instant,
}

struct Runtime {
    path: PathBuf,
    /// Device and inode of what is marked.
    marked: Option<(u64, u64)>,
}

pub(super) struct Arm {
    group: Group,
    shared: Arc<Shared>,
    runtimes: Vec<Runtime>,
    calls: Sender<Call>,
    done: Receiver<u64>,
    /// Told when there is something in `done`.
    wake: Arc<OwnedFd>,
    pid_namespace: u64,
}

impl Arm {
    pub(super) fn new(
        shared: Arc<Shared>,
        scope: &Scope,
        calls: Sender<Call>,
        done: Receiver<u64>,
        wake: Arc<OwnedFd>,
    ) -> Result<Arm, super::Error> {
        let own = Handle::open(std::process::id()).map_err(super::Error::Arming)?;
        let pid_namespace = own.pid_namespace().map_err(super::Error::Arming)?;
        let runtimes = scope
            .runtimes
            .iter()
            .map(|path| Runtime { path: path.clone(), marked: None })
            .collect();
        let mut arm =
            Arm { group: Group::gate()?, shared, runtimes, calls, done, wake, pid_namespace };
        arm.mark_runtimes();
        let _ = arm.shared.arming.since.set(own.identity().start_time);
        Ok(arm)
    }

    pub(super) fn run(mut self) {
        let _ = rustix::process::setpriority_process(None, -10);
        let mut buffer = Buffer::new();
        let mut number = 0;
        // Outside of `self`, so that what is held can borrow it.
        let mut runtimes = std::mem::take(&mut self.runtimes);
        let this = self;
        let mut held: Vec<Held<'_>> = Vec::new();
        while !this.shared.is_stopping() {
            this.wait(&held);
            this.shared.arming.turns.fetch_add(1, Ordering::Relaxed);
            mark(&this.group, &mut runtimes);
            match this.group.read(&mut buffer, READ_BYTES) {
                Ok(incoming) => {
                    for incoming in incoming {
                        // The group has permission events only.
                        let Incoming::Permission(permission) = incoming else { continue };
                        number += 1;
                        held.extend(this.judge(number, permission));
                    }
                }
                Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                    Some(Errno::AGAIN | Errno::INTR) => (),
                    Some(Errno::BADF | Errno::INVAL | Errno::FAULT) | None => give_up(&err),
                    // The kernel has refused that call: a start has failed because of us.
                    Some(_) => this.shared.lose(
                        Failure::EventUnreadable,
                        None,
                        &format!("a runtime's execution could not be looked at: {err}"),
                    ),
                },
                Err(ReadError::Malformed(err)) => give_up(&err),
            }
            while let Ok(done) = this.done.try_recv() {
                if let Some(at) = held.iter().position(|held| held.number == done) {
                    allow(held.swap_remove(at).permission);
                }
            }
            let is_late = |held: &mut Held<'_>| held.since.elapsed() >= LIMIT;
            for late in held.extract_if(.., is_late) {
                allow(late.permission);
                this.late("marks took too long to place; the runtime was let run before");
            }
        }
        // What is still held is allowed as it is dropped.
    }

    fn wait(&self, held: &[Held<'_>]) {
        let mut fds = [
            PollFd::from_borrowed_fd(self.group.as_fd(), PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        let next = held.iter().map(|held| LIMIT.saturating_sub(held.since.elapsed())).min();
        let timeout =
            Timespec::try_from(next.unwrap_or(TURN).min(TURN)).expect("a quarter of a second fits");
        // An error here (a signal) only means that the turn comes early.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    /// Holds a call that a shim makes; every other one goes on at once.
    fn judge<'group>(&self, number: u64, permission: Permission<'group>) -> Option<Held<'group>> {
        let Some(call) = self.call_of_shim(number, permission.event().pid) else {
            allow(permission);
            return None;
        };
        if self.calls.try_send(call).is_err() {
            allow(permission);
            self.late("too many runtimes run at once to look at each");
            return None;
        }
        Some(Held { number, permission, since: Instant::now() })
    }

    /// Nothing here can be made to wait: see [`procfs::read_stat`].
    fn call_of_shim(&self, number: u64, pid: u32) -> Option<Call> {
        let stat = procfs::read_stat(pid).ok()?;
        if !stat.comm.starts_with(b"containerd-shim") {
            return None;
        }
        // A container's process may call itself anything, but not be in our pid
        // namespace; and one that shares it is in a mount namespace that we know.
        let handle = Handle::open_exactly(stat.identity).ok()?;
        let is_foreign = handle.pid_namespace().ok()? != self.pid_namespace
            || self.shared.table.is_mount_namespace(handle.mount_namespace().ok()?);
        (!is_foreign).then_some(Call { number, caller: stat.identity, parent: stat.parent })
    }

    fn late(&self, detail: &str) {
        self.shared.lose(Failure::ArmedLate, None, detail);
    }

    fn mark_runtimes(&mut self) {
        mark(&self.group, &mut self.runtimes);
    }
}

/// Marks the runtimes that are new, or were replaced by an upgrade.
fn mark(group: &Group, runtimes: &mut [Runtime]) {
    for runtime in runtimes {
        let Ok(stat) = file::stat_path(&runtime.path) else {
            runtime.marked = None;
            continue;
        };
        let found = (stat.device, stat.inode);
        if runtime.marked == Some(found) || !stat.is_regular() {
            continue;
        }
        let shown = runtime.path.display();
        match group.mark_host_file(&runtime.path, libc::FAN_OPEN_EXEC_PERM) {
            Ok(()) => tracing::info!(runtime = %shown, "container starts are armed here"),
            Err(err) => tracing::warn!(runtime = %shown, %err, "the runtime cannot be marked"),
        }
        // Also after an error, so that it is not told four times a second.
        runtime.marked = Some(found);
    }
}

fn allow(permission: Permission<'_>) {
    if let (_, Err(err)) = permission.answer(Answer::Allow)
        && err.raw_os_error() != Some(Errno::NOENT.raw_os_error())
    {
        give_up(&err);
    }
}

/// Containers would wait for ever at a gate that nobody can read or answer.
fn give_up(err: &dyn std::fmt::Display) -> ! {
    panic!("runtimes cannot be answered ({err}); driftd ends so that the kernel lets them run");
}

pub(super) fn waker() -> Result<Arc<OwnedFd>, super::Error> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map(Arc::new)
        .map_err(|errno| super::Error::Arming(errno.into()))
}

/// The thread that looks into the calls and places the marks.
pub(super) struct Arming {
    pub(super) shared: Arc<Shared>,
    pub(super) marker: Arc<Marker>,
    pub(super) scope: Scope,
    pub(super) calls: Receiver<Call>,
    pub(super) done: Sender<u64>,
    pub(super) wake: Arc<OwnedFd>,
}

impl Arming {
    pub(super) fn run(self) {
        let _ = rustix::process::setpriority_process(None, -10);
        while !self.shared.is_stopping() {
            match self.calls.recv_timeout(TURN) {
                Ok(call) => {
                    self.look_into(&call);
                    // There are never more answers than calls that may wait.
                    let _ = self.done.try_send(call.number);
                    let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
                }
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Arms the containers of the calling shim that have not begun. Whatever
    /// cannot be read belongs to a shim that has ended.
    fn look_into(&self, call: &Call) -> Option<()> {
        let shim = Handle::open_exactly(call.caller).ok()?;
        if shim.uid().ok()? != 0 {
            return None;
        }
        let shim_of = Shim::parse(&shim.arguments().ok()??)?;
        if !self.is_in_scope(&shim_of) {
            return None;
        }
        // The shim of a pod has the bundle of its sandbox as its directory, and the
        // bundles of the pod's containers lie beside it.
        let bundle = shim.working_directory().ok()?;
        let bundles = bundle.parent()?;
        if bundles.file_name()?.as_bytes() != shim_of.namespace.as_bytes() {
            return None;
        }
        let directory = file::open_directory(bundles).ok()?;
        let entries = std::fs::read_dir(bundles).ok()?;
        for entry in entries.flatten().take(MAX_BUNDLES) {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|name| is_identifier(name)) else { continue };
            let container = ContainerId::new(&shim_of.namespace, id);
            let is_known = self.shared.table.get(&container).is_some_and(|it| !it.is_detaching());
            if is_known && bundle.file_name() != Some(&name) {
                continue;
            }
            if let Some(pid) = waiting_init(&directory, id, call.parent) {
                self.arm(container, pid);
            }
        }
        Some(())
    }

    fn is_in_scope(&self, shim: &Shim) -> bool {
        let same = |socket: &PathBuf| {
            *socket == shim.address
                || socket.canonicalize().is_ok_and(|socket| {
                    shim.address.canonicalize().is_ok_and(|address| address == socket)
                })
        };
        !self.scope.exclude_namespaces.contains(&shim.namespace)
            && self.scope.sockets.iter().any(same)
    }

    fn arm(&self, container: ContainerId, pid: u32) {
        match self.marker.mark(&container, pid, None) {
            Ok(Marked { before_start, is_news: true }) => {
                if let Some(watched) = self.shared.table.get(&container) {
                    watched.set_unannounced(true);
                }
                // If it is not taken, the command to attach tells it once more.
                let _ = self.shared.try_report(Report::Attached { container, before_start });
                self.shared.wake_scan();
            }
            Ok(Marked { is_news: false, .. }) => (),
            // The command to attach meets it too, and tells.
            Err(refusal) => {
                tracing::debug!(%container, reason = %refusal, "not armed before its start");
            }
        }
    }
}

/// A shim, as its arguments say.
#[derive(Debug, PartialEq, Eq)]
struct Shim {
    namespace: String,
    /// The socket of the containerd whose shim it is.
    address: PathBuf,
}

impl Shim {
    fn parse(arguments: &[Vec<u8>]) -> Option<Shim> {
        let after = |flag: &str| {
            let is_flag = |word: &&Vec<u8>| {
                word.strip_prefix(b"-")
                    .is_some_and(|word| word.strip_prefix(b"-").unwrap_or(word) == flag.as_bytes())
            };
            let mut words = arguments.iter().skip_while(|word| !is_flag(word));
            words.nth(1)
        };
        let namespace = String::from_utf8(after("namespace")?.clone()).ok()?;
        let address = Path::new(std::ffi::OsStr::from_bytes(after("address")?)).to_owned();
        is_identifier(&namespace).then_some(Shim { namespace, address })
    }
}

/// What containerd takes as the name of a namespace or a container.
fn is_identifier(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// The init of a bundle, if it is the shim's child and waits for its start. The
/// number in a file may be another process's by now.
fn waiting_init(bundles: &OwnedFd, id: &str, shim: u32) -> Option<u32> {
    let name = format!("{id}/init.pid");
    let (file, stat) = file::open_file_beneath(bundles, name.as_bytes()).ok()?;
    if !stat.is_regular() {
        return None;
    }
    let mut text = [0; 16];
    let read = rustix::io::pread(file.as_fd(), &mut text[..], 0).ok()?;
    let pid = str::from_utf8(&text[..read]).ok()?.trim().parse().ok()?;
    let init = procfs::read_stat(pid).ok()?;
    (init.parent == shim && sessions::is_before_entry_point(&init.comm)).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(words: &str, expected: Option<(&str, &str)>) {
        let words: Vec<Vec<u8>> =
            words.split_whitespace().map(|word| word.as_bytes().to_vec()).collect();
        let shim = Shim::parse(&words);
        let shim = shim.as_ref().map(|it| (it.namespace.as_str(), it.address.to_str().unwrap()));
        assert_eq!(shim, expected, "{words:?}");
    }

    #[test]
    fn a_shim_is_known_by_its_arguments() {
        let runc = "/usr/bin/containerd-shim-runc-v2";
        check(
            &format!("{runc} -namespace k8s.io -id c1 -address /run/containerd/containerd.sock"),
            Some(("k8s.io", "/run/containerd/containerd.sock")),
        );
        check(
            &format!("{runc} --address /a.sock --namespace moby --id c1 start"),
            Some(("moby", "/a.sock")),
        );
        check(&format!("{runc} -namespace ../x -id c1 -address /a.sock"), None);
        check(&format!("{runc} -namespace x -id c1 -address"), None);
        check("runc init", None);
    }

    #[test]
    fn an_identifier_is_no_path() {
        for good in ["c001", "0f", "k8s.io", "a_b-c"] {
            assert!(is_identifier(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a\n", "é"] {
            assert!(!is_identifier(bad), "{bad}");
        }
    }
}
