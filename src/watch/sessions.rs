//! Who comes into a container from outside: a process in the container's pid
//! namespace whose parent is not, and that is not the container's init.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::shared::Shared;
use super::table::Watched;
use crate::model::{Fact, Process, ProcessIdentity, Source};
use crate::sys::procfs::{self, Handle, Stat};

/// Half of how many processes are remembered.
const GENERATION: usize = 16 * 1024;

/// Processes that have been judged, so that each session is told once and most
/// processes cost nothing the second time.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    judged: Recent,
    /// Those of them that are known to be in a container, as parents of others.
    inside: Recent,
}

/// How long others wait for the arguments of who opens a session: on a busy machine an
/// execve may take its time, and a session without its command says little. Not while
/// many wait: anybody can call himself a runtime's init.
const PATIENCE: Duration = Duration::from_millis(50);
const FEW: usize = 64;

/// Whether those who wait since `began` have waited long enough.
pub(super) fn others_wait(began: Instant, waiting: usize) -> bool {
    waiting > FEW || waiting > 0 && began.elapsed() >= PATIENCE
}

/// A bounded set that forgets what was not asked for in a while.
#[derive(Debug, Default)]
struct Recent {
    young: HashSet<ProcessIdentity>,
    old: HashSet<ProcessIdentity>,
}

impl Recent {
    fn insert(&mut self, identity: ProcessIdentity) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(identity);
    }

    fn remove(&mut self, identity: ProcessIdentity) {
        self.young.remove(&identity);
        self.old.remove(&identity);
    }

    fn contains(&mut self, identity: ProcessIdentity) -> bool {
        if self.young.contains(&identity) {
            return true;
        }
        let is_old = self.old.contains(&identity);
        if is_old {
            self.insert(identity);
        }
        is_old
    }
}

/// The name that runc's init has until it becomes the container's program, or a
/// session's command.
fn is_runtime_init(comm: &[u8]) -> bool {
    comm.starts_with(b"runc:[")
}

/// Whether init has not yet become the container's program. crun and youki keep
/// their own name until then.
pub(super) fn is_before_entry_point(comm: &[u8]) -> bool {
    is_runtime_init(comm) || comm == b"crun" || comm.starts_with(b"youki")
}

impl Sessions {
    /// Judges a process that the gate saw; true once for each session's root.
    pub(super) fn opens(&mut self, caller: &Stat, watched: &Watched) -> bool {
        let identity = caller.identity;
        if self.judged.contains(identity) {
            return false;
        }
        if identity == watched.init || identity.pid == watched.init.pid {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return false;
        }
        if is_runtime_init(&caller.comm) {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return true;
        }
        if self.has_parent_inside(caller) {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return false;
        }
        let Some(namespace) = watched.pid_namespace else { return false };
        let Ok(handle) = Handle::open_exactly(identity) else {
            // Gone, and its parent tells nothing certain: no session is invented.
            return false;
        };
        let Some(is_root) = is_root(&handle, Some(caller.parent), namespace) else { return false };
        self.judged.insert(identity);
        if handle.pid_namespace().is_ok_and(|own| own == namespace) {
            self.inside.insert(identity);
        }
        is_root
    }

    /// Judges a process that a scan found.
    pub(super) fn is_open(&mut self, handle: &Handle, namespace: u64, watched: &Watched) -> bool {
        let stat = handle.first_stat();
        // One that has not become its command yet will be seen by the gate.
        if stat.identity == watched.init
            || stat.has_ended()
            || is_before_entry_point(&stat.comm)
            || self.judged.contains(stat.identity)
            || is_root(handle, None, namespace) != Some(true)
        {
            return false;
        }
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        true
    }

    /// Tells that a session has opened. If that is lost, the next look at the
    /// container's processes tells it again.
    pub(super) fn tell(
        &mut self,
        shared: &Shared,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        process: Process,
    ) {
        let identity = process.identity;
        let opening = crate::model::Opening {
            entry: crate::model::Entry::RuntimeExec,
            interactive: process.tty.is_some().then_some(crate::model::Interactive::Terminal),
            process,
            host: Vec::new(),
            login: None,
            requested_by: None,
        };
        let fact = Fact::SessionOpened { opening: Arc::new(opening) };
        if !shared.observe(watched, at, source, fact) {
            self.judged.remove(identity);
        }
    }

    fn has_parent_inside(&mut self, caller: &Stat) -> bool {
        procfs::read_stat(caller.parent).is_ok_and(|parent| {
            parent.identity.start_time <= caller.identity.start_time
                && self.inside.contains(parent.identity)
        })
    }
}

/// Whether a process is in the namespace and its parent is not; `None` if that
/// cannot be told any more.
fn is_root(handle: &Handle, parent_at_exec: Option<u32>, namespace: u64) -> Option<bool> {
    if handle.pid_namespace().ok()? != namespace {
        return Some(false);
    }
    let start_time = handle.identity().start_time;
    // The parent at the time of the exec may be gone; then the kernel has given
    // the process to the next reaper: the shim outside, or init inside.
    let parent = parent_at_exec
        .and_then(|pid| Handle::open(pid).ok())
        .filter(|parent| parent.identity().start_time <= start_time)
        .or_else(|| Handle::open(handle.stat().ok()?.parent).ok())?;
    Some(parent.pid_namespace().ok()? != namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_not_forgotten_and_the_rest_is() {
        let process = |pid| ProcessIdentity { pid, start_time: 1 };
        let mut recent = Recent::default();
        for pid in 0..u32::try_from(4 * GENERATION).unwrap() {
            recent.insert(process(pid));
            assert!(recent.contains(process(0)), "after {pid}");
        }
        assert!(!recent.contains(process(1)));
        assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
    }
}
