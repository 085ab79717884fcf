//! Processes that may belong to a session: what is kept of them until that is known.

use std::sync::Arc;

use super::activity::Act;
use super::arguments::Words;
use super::describe::Caller;
use super::named::Named;
use super::shared::Processes;
use crate::sys::procfs::Stat;
use crate::watch::core::watched::Watched;

/// Keeps a handle of a process that may be a session's: how it ends may be asked for.
pub(crate) fn keep_handle(shared: &Processes, watched: &Arc<Watched>, caller: &Caller) {
    if !watched.has_sessions() {
        return;
    }
    let (Some(stat), Some(pidfd)) = (&caller.stat, &caller.pidfd) else { return };
    if let Ok(process) = pidfd.try_clone() {
        shared.act(watched, Act::Alive { identity: stat.identity, process });
    }
}

/// Whether a process is known to belong to a session. Its birth may not have been read
/// yet, its parent's has.
pub(crate) fn is_in_session(shared: &Processes, watched: &Watched, caller: &Stat) -> bool {
    if !watched.has_sessions() {
        return false;
    }
    let (roots, births) = (shared.roots(), shared.births());
    let of = |pid| roots.of(&watched.container, &births, Named::now(pid));
    of(caller.identity.pid).or_else(|| of(caller.parent)).is_some()
}

/// Keeps with what words a process has become a program that the gate was asked about.
pub(crate) fn keep_words(
    shared: &Processes,
    watched: &Watched,
    caller: &Caller,
    words: Option<Words>,
) {
    if let (Some(asked), Some(words)) = (caller.asked, words)
        && watched.has_sessions()
    {
        shared.arguments().found(caller.pid, asked, words);
    }
}
