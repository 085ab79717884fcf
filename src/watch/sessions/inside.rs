//! Whether a process is in a container: by its namespaces, its control group or its root.

use crate::sys::file;
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;

/// Whether a process is in the container: by its mount namespace, its pid namespace,
/// its control group or its root directory. One of them is enough: who joins only one
/// of them is in it all the same. `None` of who is ending: nothing is known of it.
pub(crate) fn is_inside(handle: &Handle, watched: &Watched) -> Option<bool> {
    let shares_pids = || {
        handle.pid_namespace().is_ok_and(|namespace| {
            watched.has_namespaces()
                && watched.pid_namespace == Some(namespace)
                && !procfs::is_host_pid_namespace(namespace)
        })
    };
    let is_inside =
        is_within(handle, watched) || (watched.has_own_pid_namespace() && shares_pids());
    // Asked last: what can be read now could be read before.
    (is_inside || is_known(handle)).then_some(is_inside)
}

/// A process loses its namespaces while it ends.
pub(crate) fn is_known(handle: &Handle) -> bool {
    handle.mount_namespace().is_ok()
}

/// The same without the pid namespace, into which other containers can be put.
pub(crate) fn is_within(handle: &Handle, watched: &Watched) -> bool {
    let is_in_mount_namespace = handle.mount_namespace().is_ok_and(|namespace| {
        watched.has_namespaces()
            && watched.mount_namespace == Some(namespace)
            && !procfs::is_host_mount_namespace(namespace)
    });
    is_in_mount_namespace
        || is_in_control_group(handle, watched) == Some(true)
        || file::stat_path(handle.root_path())
            .is_ok_and(|root| root.device == watched.device && root.mount == watched.mount)
}

/// `None` if the container has none of its own, or the process is gone.
pub(crate) fn is_in_control_group(handle: &Handle, watched: &Watched) -> Option<bool> {
    let unified = || watched.holds_cgroup(&handle.cgroup().ok()?);
    // Where the unified hierarchy is not what runtimes use.
    let of_records = || Some(handle.perf_cgroup() == Some(watched.perf_cgroup?));
    let is_in = unified().or_else(of_records)?;
    // A process that has ended may be shown in another one, and never in a container's that
    // it was not in.
    (is_in || !handle.stat().ok()?.has_ended()).then_some(is_in)
}
