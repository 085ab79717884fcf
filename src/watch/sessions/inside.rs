//! Whether a process is in a container: by its namespaces, its control group or its root.
//!
//! The functions only read /proc and compare the result with what is known of the container.
//! `opening` and `origin` decide what follows from it.

use crate::sys::file;
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;

/// Whether a process is in the container: by its mount namespace, its pid namespace,
/// its control group or its root directory. One of them is enough: a process that has
/// joined only one of them is in the container too. `None` if the process is exiting.
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
    // Checked last: if the namespace can be read now, the reads above could succeed too.
    (is_inside || is_known(handle)).then_some(is_inside)
}

/// Whether the namespaces of a process can be read. A process loses them while it exits.
pub(crate) fn is_known(handle: &Handle) -> bool {
    handle.mount_namespace().is_ok()
}

/// Like [`is_inside`], but without the pid namespace, which containers can share.
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

/// `None` if the container has no control group of its own, or the process is gone.
pub(crate) fn is_in_control_group(handle: &Handle, watched: &Watched) -> Option<bool> {
    let unified = || watched.holds_cgroup(&handle.cgroup().ok()?);
    // For nodes whose runtimes do not use the unified hierarchy.
    let by_perf = || Some(handle.perf_cgroup() == Some(watched.perf_cgroup?));
    let is_in = unified().or_else(by_perf)?;
    // A process that has ended may be shown in another control group, but never in that of
    // a container which it was not in.
    (is_in || !handle.stat().ok()?.has_ended()).then_some(is_in)
}
