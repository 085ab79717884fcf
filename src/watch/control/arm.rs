//! Arming before the start: the gate is asked before the host's container runtime runs, so that
//! a container has its marks before its entry point runs.
//!
//! A shim invokes the runtime twice: `create` leaves the container's init waiting in its
//! namespaces, `start` lets it become the entry point. The gate holds the second invocation
//! until the marks are there.
//!
//! ```text
//! shim execs runc ──> gate ── is it named like a shim? ──> arming: is it one of the host's?
//!                      ^                                      │ bundle/init.pid: init waits?
//!                      └───────── marked, or nothing to do <──┘ then its marks
//! ```
//!
//! Every container start of the node passes here, so nothing may hold it: after half a second
//! the gate lets the runtime run by itself, and counts that. An invocation that comes from no
//! shim (in a container, at a terminal, or by the runtime itself) continues at once. This
//! thread must not place a container's marks itself: `marker` does.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::marker::{Marked, Marker};
use crate::gate::Marks;
use crate::model::ContainerId;
use crate::sys::file;
use crate::sys::procfs::{self, Handle, Stat};
use crate::threads;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::shared::Core;
use crate::watch::exec::gate::Invocation;
use crate::watch::process::outside;

/// Which containers are armed before they start.
#[derive(Debug, Clone)]
pub struct Scope {
    /// The runtimes' programs. One that does not exist yet is marked when it appears.
    pub runtimes: Vec<PathBuf>,
    /// The sockets of the containerds whose containers are armed.
    pub sockets: Vec<PathBuf>,
    /// containerd namespaces that are not watched.
    pub exclude_namespaces: BTreeSet<String>,
}

const TURN: Duration = Duration::from_millis(250);
/// How many invocations may wait at a time.
pub(crate) const QUEUE: usize = 256;
/// How many bundles of a shim's namespace are examined for one invocation.
const MAX_BUNDLES: usize = 8 * 1024;

/// A runtime's program.
#[derive(Debug)]
struct Runtime {
    path: PathBuf,
    /// Device and inode of the file that is marked.
    marked: Option<(u64, u64)>,
}

/// The thread that handles the invocations and has the marks placed.
pub(crate) struct Arming {
    shared: Arc<Core>,
    marker: Arc<Marker>,
    marks: Marks,
    scope: Scope,
    runtimes: Vec<Runtime>,
    invocations: Receiver<Invocation>,
    pid_namespace: u64,
}

impl Arming {
    pub(crate) fn new(
        shared: Arc<Core>,
        marker: Arc<Marker>,
        marks: Marks,
        scope: &Scope,
        invocations: Receiver<Invocation>,
    ) -> Result<Arming, crate::watch::core::message::Error> {
        let own =
            Handle::open(std::process::id()).map_err(crate::watch::core::message::Error::Arming)?;
        let pid_namespace =
            own.pid_namespace().map_err(crate::watch::core::message::Error::Arming)?;
        let runtime = |path: &PathBuf| Runtime { path: path.clone(), marked: None };
        let runtimes = scope.runtimes.iter().map(runtime).collect();
        let scope = scope.clone();
        let mut arming =
            Arming { shared, marker, marks, scope, runtimes, invocations, pid_namespace };
        arming.mark_runtimes();
        let _ = arming.shared.arming.since.set(own.identity().start_time);
        Ok(arming)
    }

    pub(crate) fn run(mut self) {
        let _ = rustix::process::setpriority_process(None, -10);
        let mut marked = Instant::now();
        while !self.shared.is_stopping() {
            match threads::recv_timeout(&self.invocations, TURN) {
                Ok(invocation) => {
                    self.arm_containers_of(&invocation.caller);
                    self.marks.release(invocation.number);
                }
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if marked.elapsed() >= TURN {
                marked = Instant::now();
                self.mark_runtimes();
            }
        }
    }

    /// Marks the runtimes that are new, or were replaced by an upgrade.
    fn mark_runtimes(&mut self) {
        for runtime in &mut self.runtimes {
            let Ok(stat) = file::stat_path(&runtime.path) else {
                runtime.marked = None;
                continue;
            };
            let found = (stat.device, stat.inode);
            if runtime.marked == Some(found) || !stat.is_regular() {
                continue;
            }
            let shown = runtime.path.display();
            let marked = file::open_host_file(&runtime.path)
                .and_then(|program| self.marks.mark_runtime(program.as_fd()));
            match marked {
                Ok(()) => tracing::info!(runtime = %shown, "container starts are armed here"),
                Err(err) => tracing::warn!(runtime = %shown, %err, "the runtime cannot be marked"),
            }
            // Also after an error, so that it is not reported four times a second.
            runtime.marked = Some(found);
        }
    }

    /// Whether a process that looks like a shim belongs to the host. A container's process can
    /// give itself any name, but is not in driftd's pid namespace; and one that shares it is in
    /// a mount namespace that is known.
    fn is_of_host(&self, shim: &Handle) -> bool {
        shim.pid_namespace().is_ok_and(|namespace| namespace == self.pid_namespace)
            && shim
                .mount_namespace()
                .is_ok_and(|namespace| !self.shared.table.is_mount_namespace(namespace))
    }

    /// Arms the containers of the invoking shim that have not begun. What cannot be read
    /// belongs to a shim that has ended.
    fn arm_containers_of(&self, caller: &Stat) -> Option<()> {
        let shim = Handle::open_exactly(caller.identity).ok()?;
        if !self.is_of_host(&shim) || shim.uid().ok()? != 0 {
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
            if let Some(pid) = waiting_init(&directory, id, caller.parent) {
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
                // If the channel is full, the command to attach reports it once more.
                let report = SensorEvent::Attached { container, pid, before_start };
                let _ = self.shared.try_report(report);
                self.shared.wake_scan();
            }
            Ok(Marked { is_news: false, .. }) => (),
            // The command to attach is refused too, and reports it.
            Err(refusal) => {
                tracing::debug!(%container, reason = %refusal, "not armed before its start");
            }
        }
    }
}

/// A shim, by its arguments.
#[derive(Debug, PartialEq, Eq)]
struct Shim {
    namespace: String,
    /// The socket of the containerd whose shim it is.
    address: PathBuf,
}

impl Shim {
    fn parse(arguments: &[Vec<u8>]) -> Option<Shim> {
        let after = |flag: &str| {
            let is_flag = |given: &&Vec<u8>| {
                given.strip_prefix(b"-").is_some_and(|given| {
                    given.strip_prefix(b"-").unwrap_or(given) == flag.as_bytes()
                })
            };
            let mut from_flag = arguments.iter().skip_while(|given| !is_flag(given));
            from_flag.nth(1)
        };
        let namespace = String::from_utf8(after("namespace")?.clone()).ok()?;
        let address = Path::new(std::ffi::OsStr::from_bytes(after("address")?)).to_owned();
        is_identifier(&namespace).then_some(Shim { namespace, address })
    }
}

/// Whether containerd accepts this as the name of a namespace or a container.
fn is_identifier(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// The init of a bundle, if it is the shim's child and waits for its start. The pid in the
/// file may be another process's by now.
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
    (init.parent == shim && outside::is_before_entry_point(&init.comm)).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(line: &str, expected: Option<(&str, &str)>) {
        let arguments: Vec<Vec<u8>> =
            line.split_whitespace().map(|argument| argument.as_bytes().to_vec()).collect();
        let shim = Shim::parse(&arguments);
        let shim = shim.as_ref().map(|it| (it.namespace.as_str(), it.address.to_str().unwrap()));
        assert_eq!(shim, expected, "{line:?}");
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
    fn a_path_is_no_identifier() {
        for good in ["c001", "0f", "k8s.io", "a_b-c"] {
            assert!(is_identifier(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a\n", "é"] {
            assert!(!is_identifier(bad), "{bad}");
        }
    }
}
