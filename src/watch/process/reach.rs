//! The processes of a container, and files as one of them reaches them.

use std::os::fd::OwnedFd;

use crate::sys::door::{self, Held, Way};
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;

/// The processes of a container, as far as its namespaces tell.
pub(crate) fn processes_of(watched: &Watched) -> Vec<Handle> {
    let namespace = watched.pid_namespace.filter(|_| watched.has_namespaces());
    let Some(namespace) = namespace else { return Vec::new() };
    let Ok(pids) = procfs::all() else { return Vec::new() };
    pids.into_iter()
        .filter_map(|pid| Handle::open(pid).ok())
        .filter(|handle| {
            handle.pid_namespace().ok() == Some(namespace)
                && handle.mount_namespace().ok() == watched.mount_namespace
        })
        .collect()
}

/// Looks up a name as a process does whose root is that of `handle`.
pub(crate) fn open_in(watched: &Watched, handle: &Handle, name: &[u8]) -> Option<OwnedFd> {
    let view = watched.view([handle]);
    match door::walk(handle.open_root().ok()?, None, name, &view) {
        Ok(Way::Found(Held { fd, .. })) => Some(fd),
        Ok(Way::Foreign(_) | Way::Process(_)) | Err(_) => None,
    }
}
