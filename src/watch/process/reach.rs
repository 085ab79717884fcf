//! Lists the processes of a container, and opens files as one of its processes reaches them.
//!
//! It reads /proc and keeps nothing. A file is opened only if that cannot wait for another
//! process (`sys::door`).

use std::os::fd::OwnedFd;

use crate::sys::door::{self, Held, Way};
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;

/// The processes of a container, by its namespaces.
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

/// Opens a name in the root directory of `handle`'s process.
pub(crate) fn open_in(watched: &Watched, handle: &Handle, name: &[u8]) -> Option<OwnedFd> {
    let view = watched.view([handle]);
    match door::walk(handle.open_root().ok()?, None, name, &view) {
        Ok(Way::Found(Held { fd, .. })) => Some(fd),
        Ok(Way::Foreign(_) | Way::Process(_)) | Err(_) => None,
    }
}
