//! Processes that come into a container from outside, and what all of a container's
//! processes run when nobody has seen them start.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, TrySendError};
use jiff::Timestamp;

use super::acts;
use super::calls;
use super::fair::{Owned, Receiver, Sender};
use super::gate::Seen;
use super::process::{self, Caller};
use super::sessions::{Opened, is_before_entry_point};
use super::shared::Shared;
use super::table::Watched;
use super::trace::TraceConsumer;
use super::unseen::{Running, Runtimes};
use crate::health::Failure;
use crate::model::{ContainerId, Process, Source};
use crate::sys::file;
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};

/// Of how many that wait each one that belongs to a session is looked at.
const FEW: usize = 64;

/// How often it is asked whether all processes are to be looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

impl Owned for Seen {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

pub(super) fn run(shared: &Shared, seen: &Receiver<Box<Seen>>) {
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
            Ok(one) => judge(shared, &one, seen),
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn judge(shared: &Shared, seen: &Seen, others: &Receiver<Box<Seen>>) {
    let Some(stat) = &seen.caller.stat else { return judge_running(shared, seen) };
    // First: what runs in a session may be over when its record is read.
    if others.len() < FEW && acts::is_in_session(shared, &seen.watched, stat) {
        let words = process::words_after_exec(&seen.caller, &|| !others.is_empty());
        acts::keep_words(shared, &seen.watched, &seen.caller, words);
    }
    shared.packages().executes(shared, &seen.watched, stat);
    acts::keep_handle(shared, &seen.watched, &seen.caller);
    // Held until the session is told, so that it is told before what it does.
    let mut sessions = shared.sessions();
    sessions.open(shared, &seen.caller, &seen.watched, seen.at, &|| others.len());
}

/// Nobody was asked before it became what it is.
fn judge_running(shared: &Shared, seen: &Seen) {
    let Ok(handle) = Handle::open(seen.caller.pid) else { return };
    let stat = handle.first_stat();
    // What the runtime is on its way in will be seen again when it is there.
    if stat.has_ended() || is_before_entry_point(&stat.comm) {
        return;
    }
    let process = Arc::new(process::as_it_is(&handle, &seen.watched));
    shared.packages().has_begun(shared, &seen.watched, &process);
    let mut sessions = shared.sessions();
    if sessions.opens(shared, stat, &seen.watched) {
        let mut process = Process::clone(&process);
        let asked_for = calls::asked_for(&mut shared.calls(), stat.parent, &seen.watched, false);
        process.argv = asked_for.or(process.argv);
        let opened = Opened { process, pidfd: None, is_by_runtime: false };
        sessions.tell(shared, &seen.watched, seen.at, Source::Trace, opened);
    }
}

/// By the trace, which is not asked before: whoever comes into a container to execute
/// what the gate does not ask about.
pub(super) struct Entries {
    processes: Sender<Box<Seen>>,
}

impl Entries {
    pub(super) fn new(processes: Sender<Box<Seen>>) -> Entries {
        Entries { processes }
    }
}

impl TraceConsumer for Entries {
    fn entered(&mut self, shared: &Shared, watched: &Arc<Watched>, executed: &Executed) {
        let caller = Caller { stat: None, pid: executed.pid, asked: None, pidfd: None };
        let seen = Seen { watched: watched.clone(), caller, at: Timestamp::now() };
        match self.processes.try_send(Box::new(seen)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(seen)) => shared.lose(
                Failure::ProcessQueueFull,
                Some(&seen.watched),
                "too many processes wait to be looked at",
            ),
        }
    }

    fn executed(&mut self, _: &Shared, _: &Arc<Watched>, _: &Executed, _: Option<&Mapped>) {}
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
    let mut sessions = shared.sessions();
    if sessions.is_open(shared, handle, watched) {
        let process = process::as_it_is(handle, watched);
        let opened = Opened { process, pidfd: None, is_by_runtime: false };
        let began = Timestamp::now() - procfs::age(handle.identity());
        sessions.tell(shared, watched, began, Source::Scan, opened);
    }
}
