//! The list of all processes, and the parents of one process.
//!
//! A parent is identified by its start time as well, because its pid may have been used again.

use std::io;

use super::error::into_io;
use super::handle::Handle;
use super::namespaces::host_mount_namespaces;
use super::stat::Stat;

const MAX_ANCESTORS: usize = 32;

/// The parents of a process, nearest first, up to and including the first one outside
/// `pid_namespace` or in a mount namespace of the host: a container can share the host's pid
/// namespace. A parent is younger than its child only if its pid has been used again, so the
/// chain ends there.
pub fn ancestors(stat: &Stat, pid_namespace: Option<u64>) -> Vec<Handle> {
    let host = host_mount_namespaces();
    let mut chain: Vec<Handle> = Vec::new();
    let mut child_start_time = stat.identity.start_time;
    let mut parent = stat.parent;
    while chain.len() < MAX_ANCESTORS {
        let Ok(handle) = Handle::open(parent) else { break };
        let stat = handle.first_stat();
        if stat.identity.start_time > child_start_time {
            break;
        }
        child_start_time = stat.identity.start_time;
        parent = stat.parent;
        let is_outside = (pid_namespace.is_some() && handle.pid_namespace().ok() != pid_namespace)
            || handle.mount_namespace().is_ok_and(|namespace| host.contains(&namespace));
        chain.push(handle);
        if is_outside {
            break;
        }
    }
    chain
}

/// A process and its parents on the host, nearest first. A parent that is younger than its
/// child ends the chain, because its pid was used again.
pub fn chain(pid: u32) -> Vec<Handle> {
    let mut chain: Vec<Handle> = Vec::new();
    let (mut next, mut started) = (pid, u64::MAX);
    while chain.len() < MAX_ANCESTORS
        && let Ok(handle) = Handle::open(next)
        && handle.identity().start_time <= started
    {
        started = handle.identity().start_time;
        next = handle.first_stat().parent;
        chain.push(handle);
    }
    chain
}

/// The pids of all processes. A process that ends meanwhile is left out.
pub fn all() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for process in procfs::process::all_processes().map_err(into_io)?.flatten() {
        pids.extend(u32::try_from(process.pid));
    }
    Ok(pids)
}
