//! Answers what the kernel's records show of an execution, and waits for records that are not
//! read yet.
//!
//! Each wait is short and bounded, and shorter if other executions wait. `arguments` keeps
//! the records; the threads that describe executions ask. It never reads a process's memory.

use std::time::Duration;

use super::arguments::Recorded;
use super::describe::{self, PATIENCE, PATIENCE_WHEN_IDLE, STEP};
use super::shared::Processes;
use crate::sys::{perf, procfs};

/// How long driftd waits for the records of an execve, counted from the gate's request on.
pub(crate) const PATIENCE_FOR_RECORDS: Duration = Duration::from_millis(20);

/// The arguments of an execution that the gate was asked about, by the kernel's records: for
/// a process that had ended before /proc was read. Waits until the records have been read,
/// but not for long if `others_wait`.
pub(crate) fn recorded_arguments(
    shared: &Processes,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Vec<String>> {
    // A process that is not visible in the daemon's pid namespace has no records either.
    let asked = asked.filter(|_| pid != 0 && shared.records_arguments())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    when_read(shared, asked, others_wait, || match shared.arguments().of(pid, asked, until) {
        Recorded::Arguments(arguments) => Some(listed(&arguments)),
        Recorded::Unknown => Some(None),
        Recorded::NotYet => None,
    })?
}

/// The path of an execution that the gate was asked about, by the same records. The process's
/// own memory is not read for it: a container can map a file there that is read from a
/// filesystem which it serves itself.
pub(crate) fn recorded_name(
    shared: &Processes,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Box<[u8]>> {
    let asked = asked.filter(|_| pid != 0 && shared.records_executions())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    when_read(shared, asked, others_wait, || shared.arguments().name_of(pid, asked, until))
}

/// Waits until the kernel's records of an execve that the gate was asked about have been
/// read, but not for long if `others_wait`.
pub(crate) fn wait_for_records(
    shared: &Processes,
    (pid, asked): (u32, u64),
    others_wait: &dyn Fn() -> bool,
) {
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    let is_read = || !matches!(shared.arguments().of(pid, asked, until), Recorded::NotYet);
    if shared.records_executions() {
        when_read(shared, asked, others_wait, || is_read().then_some(()));
    }
}

/// What is found in the records when they have been read, or `None` after a while. The wait is
/// counted from the gate's request on, so that the waits for many executions overlap.
fn when_read<T>(
    shared: &Processes,
    asked: u64,
    others_wait: &dyn Fn() -> bool,
    find: impl Fn() -> Option<T>,
) -> Option<T> {
    let start = perf::now();
    loop {
        let now = perf::now();
        if let Some(found) = find() {
            return Some(found);
        }
        let [waited, here] =
            [asked, start].map(|since| Duration::from_nanos(now.saturating_sub(since)));
        // On a busy machine the request may be old already, and the trace no further.
        let is_late = waited >= PATIENCE_FOR_RECORDS && here >= PATIENCE;
        if is_late || waited >= PATIENCE && others_wait() {
            return None;
        }
        shared.rest_of_trace.hurry();
        std::thread::sleep(STEP);
    }
}

/// The recorded arguments of the first execve between two times, without waiting.
pub(crate) fn recorded(
    shared: &Processes,
    pid: u32,
    since: u64,
    until: u64,
) -> Option<Vec<String>> {
    match shared.arguments().of(pid, since, until) {
        Recorded::Arguments(arguments) => listed(&arguments),
        Recorded::Unknown | Recorded::NotYet => None,
    }
}

/// The arguments that were read of a process after its execve at `time`, because the gate was
/// asked about it.
pub(crate) fn found(
    shared: &Processes,
    (pid, time): (u32, u64),
    exe: Option<&[u8]>,
) -> Option<Vec<String>> {
    let arguments = shared.arguments();
    let read = arguments.found_of(pid, time)?;
    // The process may have become yet another program before it was read.
    let is_it = read.exe.is_none() || exe.is_none_or(|exe| read.exe == Some(describe::text(exe)));
    is_it.then(|| read.argv.clone())
}

pub(crate) fn listed(arguments: &[u8]) -> Option<Vec<String>> {
    procfs::split_arguments(arguments).as_deref().map(describe::texts)
}

pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
