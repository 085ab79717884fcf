//! Keeps what is needed of a process that may belong to a session, until that is known.
//!
//! It stores a handle of the process with the thread `sessions`, and its program with
//! `arguments`. In containers without sessions it does nothing.

use std::sync::Arc;

use super::activity::Activity;
use super::arguments::ReadProgram;
use super::describe::Caller;
use super::named::Named;
use super::shared::Processes;
use crate::sys::procfs::Stat;
use crate::watch::core::watched::Watched;

/// Keeps a handle of a process that may belong to a session: its exit status may be needed.
pub(crate) fn keep_handle(shared: &Processes, watched: &Arc<Watched>, caller: &Caller) {
    if !watched.has_sessions() {
        return;
    }
    let (Some(stat), Some(pidfd)) = (&caller.stat, &caller.pidfd) else { return };
    if let Ok(process) = pidfd.try_clone() {
        shared.note_activity(watched, Activity::Alive { identity: stat.identity, process });
    }
}

/// Whether a process is known to belong to a session. The record of its birth may not have
/// been read yet; that of its parent's birth has.
pub(crate) fn is_in_session(shared: &Processes, watched: &Watched, caller: &Stat) -> bool {
    if !watched.has_sessions() {
        return false;
    }
    let (roots, births) = (shared.roots(), shared.births());
    let of = |pid| roots.of(&watched.container, &births, Named::now(pid));
    of(caller.identity.pid).or_else(|| of(caller.parent)).is_some()
}

/// Keeps the program and arguments of a process after an execve that the gate was asked
/// about.
pub(crate) fn keep_read_program(
    shared: &Processes,
    watched: &Watched,
    caller: &Caller,
    read: Option<ReadProgram>,
) {
    if let (Some(asked), Some(read)) = (caller.asked, read)
        && watched.has_sessions()
    {
        shared.arguments().found(caller.pid, asked, read);
    }
}
