//! Decides whether a process in a container still runs a program from outside of it, such as
//! a container runtime.
//!
//! It reads /proc of one process. The wings above use it to keep a runtime's own processes
//! apart from a container's. The name of a process alone is evidence of nothing.

use std::time::Duration;

use crate::model::process::may_be_runtime;
use crate::model::programs;
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, overlay};

/// A runtime that runs from a copy of itself in memory must become the requested program
/// within this time, unless the copy is recognised.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_secs(10);

/// Whether a process has the name of a runtime's init, before it becomes the container's
/// program or a session's command. A process chooses its name, so this is a reason to examine
/// it and evidence of nothing.
pub(crate) fn is_before_entry_point(comm: &[u8]) -> bool {
    may_be_runtime(comm)
}

/// Whether a process runs a program of the host.
pub(crate) fn runs_program_of_host(handle: &Handle) -> bool {
    handle.has_host_root() || runs_from_outside(handle)
}

/// Whether a process is a runtime on its way into the container, before it becomes the
/// requested program. The name of a host's program can be trusted.
pub(crate) fn is_on_its_way(handle: &Handle) -> bool {
    is_before_entry_point(&handle.first_stat().comm) && runs_program_of_host(handle)
}

/// Whether a process still is the tool that enters (`nsenter`, `chroot`). The record of its own
/// execution may be read when it has joined the container already; its command has another.
pub(crate) fn is_entering(handle: &Handle) -> bool {
    programs::is_entrance(&handle.first_stat().comm) && runs_from_outside(handle)
}

/// Whether a process runs a program that lies on no mount of its own namespace: the program
/// was started before the process entered the namespace.
pub(crate) fn runs_from_outside(handle: &Handle) -> bool {
    is_from_outside(handle) == Some(true)
}

/// Like [`runs_from_outside`]; `None` if the process has ended.
pub(crate) fn is_from_outside(handle: &Handle) -> Option<bool> {
    let exe = handle.open_exe().and_then(file::stat).ok()?;
    let Some(mount) = exe.mount else { return Some(false) };
    // A file in memory is on no mount, for any process.
    let may_be = exe.links > 0 || procfs::age(handle.identity()) < ON_ITS_WAY;
    Some(may_be && overlay::find_place(&handle.mountinfo().ok()?, mount).is_none())
}
