//! What the kernel's records say of an execution, waited for where that is worth it.

use std::time::Duration;

use super::arguments::Recorded;
use super::describe::{self, PATIENCE, PATIENCE_WHEN_IDLE, STEP};
use super::shared::Processes;
use crate::sys::{perf, procfs};

/// For how long after the question the kernel's records of an execve are waited for.
pub(crate) const PATIENCE_FOR_RECORDS: Duration = Duration::from_millis(20);

/// With what arguments a process has become a program that the gate was asked about, by
/// the kernel's records: of one that had ended before /proc was read. Waits until they
/// have been read, but not for long if `others_wait`. Counted from the question on, so
/// that of many who wait each one has been waited for with the others.
pub(crate) fn recorded_arguments(
    shared: &Processes,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Vec<String>> {
    // Of a process that is not visible in our pid namespace there are no records either.
    let asked = asked.filter(|_| pid != 0 && shared.records_arguments())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    loop {
        let now = perf::now();
        match shared.arguments().of(pid, asked, until) {
            Recorded::Arguments(arguments) => return listed(&arguments),
            Recorded::Unknown => return None,
            Recorded::NotYet => (),
        }
        let waited = Duration::from_nanos(now.saturating_sub(asked));
        if waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return None;
        }
        std::thread::sleep(STEP);
    }
}

/// By what path a process has become a program that the gate was asked about, by the same
/// records. Its own memory is not read for it: a container can put there what is read from
/// a filesystem of its own.
pub(crate) fn recorded_name(
    shared: &Processes,
    (pid, asked): (u32, Option<u64>),
    others_wait: &dyn Fn() -> bool,
) -> Option<Box<[u8]>> {
    let asked = asked.filter(|_| pid != 0 && shared.records_executions())?;
    let until = asked.saturating_add(nanoseconds(PATIENCE_WHEN_IDLE));
    loop {
        let now = perf::now();
        let name = shared.arguments().name_of(pid, asked, until);
        let waited = Duration::from_nanos(now.saturating_sub(asked));
        if name.is_some() || waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return name;
        }
        std::thread::sleep(STEP);
    }
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
    while shared.records_executions() && !is_read() {
        let waited = Duration::from_nanos(perf::now().saturating_sub(asked));
        if waited >= PATIENCE_FOR_RECORDS || waited >= PATIENCE && others_wait() {
            return;
        }
        std::thread::sleep(STEP);
    }
}

/// The same without waiting: of the first execve between two times.
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

/// What was read of the program that a process has become, at the gate's question.
pub(crate) fn found(
    shared: &Processes,
    (pid, time): (u32, u64),
    exe: Option<&[u8]>,
) -> Option<Vec<String>> {
    let arguments = shared.arguments();
    let words = arguments.found_of(pid, time)?;
    // A process may have gone on to another program before anything was read.
    let is_it = words.exe.is_none() || exe.is_none_or(|exe| words.exe == Some(describe::text(exe)));
    is_it.then(|| words.argv.clone())
}

pub(crate) fn listed(arguments: &[u8]) -> Option<Vec<String>> {
    procfs::split_arguments(arguments).as_deref().map(describe::texts)
}

pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
