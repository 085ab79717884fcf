//! Whether a process still runs a program from outside of the container that it is in.

use std::time::Duration;

use crate::model::process::may_be_runtime;
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, overlay};

/// A runtime has no more time than this between its copy in memory and what it was asked
/// for, unless the copy is recognised.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_secs(10);

/// Whether a process is called as a runtime's init is until it becomes the container's
/// program, or a session's command. A process chooses its name, so this is a reason to
/// look at it and evidence of nothing.
pub(crate) fn is_before_entry_point(comm: &[u8]) -> bool {
    may_be_runtime(comm)
}

/// Whether a process runs a program of the host's.
pub(crate) fn runs_program_of_host(handle: &Handle) -> bool {
    handle.has_host_root() || runs_from_outside(handle)
}

/// Whether a process is a runtime on its way into the container, before it becomes what it
/// was asked for. What a program of the host's calls itself may be believed.
pub(crate) fn is_on_its_way(handle: &Handle) -> bool {
    is_before_entry_point(&handle.first_stat().comm) && runs_program_of_host(handle)
}

/// Whether a process runs a program that lies on no mount of its own namespace: it
/// was started before the process came here.
pub(crate) fn runs_from_outside(handle: &Handle) -> bool {
    is_from_outside(handle) == Some(true)
}

/// The same; `None` of a process that has ended.
pub(crate) fn is_from_outside(handle: &Handle) -> Option<bool> {
    let exe = handle.open_exe().and_then(file::stat).ok()?;
    let Some(mount) = exe.mount else { return Some(false) };
    // A file in memory is on no mount, whoever runs it.
    let may_be = exe.links > 0 || procfs::age(handle.identity()) < ON_ITS_WAY;
    Some(may_be && overlay::find_place(&handle.mountinfo().ok()?, mount).is_none())
}
