//! Processes that come into a container from outside, and what all of a container's
//! processes run when nobody has seen them start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;

use super::gate::Seen;
use super::process;
use super::shared::Shared;
use super::table::Watched;
use super::unseen::{Running, Runtimes};
use crate::model::Source;
use crate::sys::file;
use crate::sys::procfs::{self, Handle};

/// How often it is asked whether all processes are to be looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) fn run(shared: &Shared, seen: &Receiver<Seen>) {
    let mut last_look = Instant::now();
    let mut runtimes = Runtimes::default();
    while !shared.is_stopping() {
        if last_look.elapsed() >= LOOK_EVERY {
            last_look = Instant::now();
            let wanted: Vec<Wanted> = shared
                .table
                .all()
                .into_iter()
                .filter_map(|watched| {
                    let since = watched.take_process_scan()?;
                    Some(Wanted { watched, since })
                })
                .collect();
            if !wanted.is_empty() {
                look_at_all(shared, &wanted, &mut runtimes);
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

/// A container whose processes are to be looked at.
struct Wanted {
    watched: Arc<Watched>,
    /// What has started after this was seen when it did.
    since: u64,
}

/// Sessions and programs that were there before the marks, or whose start was lost.
fn look_at_all(shared: &Shared, wanted: &[Wanted], runtimes: &mut Runtimes) {
    let Ok(pids) = procfs::all() else { return };
    let mut running = Running::default();
    for pid in pids {
        let Ok(handle) = Handle::open(pid) else { continue };
        if let Some(watched) = owner(shared, wanted, &handle) {
            running.tell(shared, runtimes, &watched, &handle);
        }
        for wanted in wanted {
            find_open_session(shared, &wanted.watched, &handle);
        }
    }
}

/// Whose process this is: by its namespaces and control group, or by what it runs.
fn owner(shared: &Shared, wanted: &[Wanted], handle: &Handle) -> Option<Arc<Watched>> {
    let own = shared.table.of_process(handle).or_else(|| {
        let stat = file::stat(handle.open_exe().ok()?).ok()?;
        shared.table.owner(&stat)
    })?;
    // Without records of executions, whatever is not on a marked filesystem is
    // found here or never.
    let is_late = |since| handle.identity().start_time > since && shared.records_executions();
    let wanted = wanted.iter().find(|wanted| Arc::ptr_eq(&wanted.watched, &own))?;
    (!is_late(wanted.since)).then_some(own)
}

fn find_open_session(shared: &Shared, watched: &Arc<Watched>, handle: &Handle) {
    let Some(namespace) = watched.pid_namespace else { return };
    // Containers of one pod may share a pid namespace, but not a mount namespace.
    if handle.pid_namespace().ok() != Some(namespace)
        || handle.mount_namespace().ok() != watched.mount_namespace
    {
        return;
    }
    let mut sessions = shared.sessions();
    if sessions.is_open(handle, namespace, watched) {
        let process = process::as_it_is(handle, watched);
        sessions.tell(shared, watched, Timestamp::now(), Source::Scan, process);
    }
}
