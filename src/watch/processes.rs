//! Processes that come into a container from outside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;

use super::gate::Seen;
use super::process;
use super::shared::Shared;
use super::table::Watched;
use crate::model::Source;
use crate::sys::procfs::{self, Handle};

/// How often it is asked whether all processes are to be looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) fn run(shared: &Shared, seen: &Receiver<Seen>) {
    let mut last_look = Instant::now();
    while !shared.is_stopping() {
        if last_look.elapsed() >= LOOK_EVERY {
            last_look = Instant::now();
            for watched in shared.table.all() {
                if watched.take_process_scan() {
                    find_open_sessions(shared, &watched);
                }
            }
        }
        match seen.recv_timeout(LOOK_EVERY) {
            Ok(one) => judge(shared, &one, &|| !seen.is_empty()),
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn judge(shared: &Shared, seen: &Seen, others_wait: &dyn Fn() -> bool) {
    let Some(stat) = &seen.caller.stat else { return };
    shared.packages().executes(shared, &seen.watched, stat);
    // Held until the session is told, so that it is told before what it does.
    let mut sessions = shared.sessions();
    if sessions.opens(stat, &seen.watched) {
        let executing = process::after_exec(&seen.caller, &seen.watched, others_wait);
        sessions.tell(shared, &seen.watched, seen.at, Source::Gate, executing.process);
    }
}

/// Sessions that were there before the marks, or whose start was lost.
fn find_open_sessions(shared: &Shared, watched: &Arc<Watched>) {
    let Some(namespace) = watched.pid_namespace else { return };
    let Ok(pids) = procfs::all() else { return };
    for pid in pids {
        let Ok(handle) = Handle::open(pid) else { continue };
        // Containers of one pod may share a pid namespace, but not a mount namespace.
        if handle.pid_namespace().ok() != Some(namespace)
            || handle.mount_namespace().ok() != watched.mount_namespace
        {
            continue;
        }
        let mut sessions = shared.sessions();
        if sessions.is_open(&handle, namespace, watched) {
            let process = process::as_it_is(&handle, watched);
            sessions.tell(shared, watched, Timestamp::now(), Source::Scan, process);
        }
    }
}
