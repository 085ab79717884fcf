//! Describes the processes of executions, hashes the files, and reports both. The files are
//! those of the container's own layer, and those of the image's layers that may have been
//! changed there.
//!
//! Each file is hashed by the descriptor that the kernel opened for the event, so that no
//! rename can substitute another file. Three threads run here: `describe`, `content` and
//! `large`. They take from `take`, hold executions in `unproven` until `trace` reads their
//! record, and must not hash a file by its path while its container runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;

use super::again;
use super::described::{Described, Executed, Progress};
use super::execution::Execution;
use super::repeats;
use super::shared::Exec;
use super::take::Taken;
use super::unproven::Request;
use crate::health::Failure;
use crate::model::{Fact, FileFact, Filesystem, Format, Process, RootfsPath, Source};
use crate::sys::file::Stat;
use crate::sys::{perf, priority, procfs};
use crate::threads;
use crate::watch::core::fair::{self, Receiver, Sender};
use crate::watch::core::shared::Next;
use crate::watch::core::trust::Verdict;
use crate::watch::core::watched::Watched;
use crate::watch::files::{paths, progress};
use crate::watch::mounts::find;
use crate::watch::process::arguments::ReadProgram;
use crate::watch::process::describe::{self, Executing};
use crate::watch::process::named::Named;
use crate::watch::process::{attribution, membership, recorded, records};

/// How long an execve may take, in clock ticks.
const MOMENT: u64 = 25;

/// How often the executions without a record are checked.
const CHECK_UNPROVEN: Duration = Duration::from_millis(250);

/// The same, of the executions that wait for the change feed.
const CHECK_LATE: Duration = Duration::from_millis(2);

/// Describes processes. It has a thread of its own, because a process may end while the file
/// of an earlier one is hashed.
pub(crate) fn describe(shared: &Exec, executions: &Receiver<Taken>, described: &Sender<Described>) {
    // Without CAP_SYS_NICE this thread runs like the others, and is late more often.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(execution) = shared.next_to_report(executions) {
        let Some(execution) = describe_one(shared, execution, executions) else {
            continue;
        };
        match described.try_send(execution) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(execution)) => shared.lose(
                Failure::ContentQueueFull,
                Some(&execution.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }
}

fn describe_one(shared: &Exec, taken: Taken, others: &Receiver<Taken>) -> Option<Described> {
    let Taken { execution, path, writer_check, could_change, .. } = taken;
    let Execution {
        watched, filesystem, file, stat, layer_file, is_movable, caller, at, more, ..
    } = execution;
    let times = 1 + more.map_or(0, |more| more.take());
    threads::about(&watched.container);
    let holder = watched;
    let seen = caller.stat.clone();
    let actor = seen.as_ref().and_then(|seen| attribution::other_than(shared, &holder, seen));
    if filesystem == Filesystem::Overlay && actor.is_some() {
        return None;
    }
    let watched = actor.unwrap_or_else(|| holder.clone());

    let executing = {
        // Held until the session is reported, so that the session precedes its activity.
        let mut sessions = shared.openings();
        sessions.open(shared, &caller, &watched, at, &|| others.len())
    };
    membership::keep_handle(shared, &watched, &caller);
    let mut executing = executing.unwrap_or_else(|| {
        let executing = describe::after_exec(&caller, &watched, &|| !others.is_empty());
        let described = &executing.process;
        let arguments =
            described.argv.clone().map(|argv| ReadProgram { exe: described.exe.clone(), argv });
        membership::keep_read_program(shared, &watched, &caller, arguments);
        executing
    });
    if let Some(stat) = &caller.stat {
        let mut packages = shared.packages();
        packages.executes(shared, &watched, stat);
        // By now its parents may have ended with it.
        if let Some(ancestors) = packages.ancestors_of(stat.identity)
            && ancestors.len() > executing.process.ancestors.len()
        {
            executing.process.ancestors = ancestors.to_vec();
        }
    }
    if let (Ok((path, _)), None) = (&path, &executing.process.root) {
        executing.process.root = describe::root_by_name(path, executing.process.exe.as_deref());
    }
    match path {
        // Where directories can be moved, this is the common case: the file is at its own path.
        Ok((path, _)) if is_movable && paths::is_where_the_image_has_it(&watched, &path, &stat) => {
            None
        }
        Ok((path, is_certain)) => {
            let exe = executing.process.exe.as_deref().filter(|_| !is_certain);
            let path = exe.and_then(|exe| find::path_of_program(exe, &path)).unwrap_or(path);
            Some(Described {
                watched,
                holder,
                seen,
                filesystem,
                path,
                file: Executed::Held(file),
                stat,
                layer_file,
                is_movable,
                writer_check,
                could_change,
                executing,
                asked: caller.asked,
                at,
                times,
                progress: Progress::Waiting,
            })
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be determined: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            None
        }
    }
}

/// Hashes executed files and hands on the large ones, for which the others must not wait.
pub(crate) fn hash(shared: &Exec, described: &Receiver<Described>, large: &Sender<Described>) {
    let mut last_check = Instant::now();
    loop {
        if last_check.elapsed() >= CHECK_UNPROVEN {
            last_check = Instant::now();
            check_unproven(shared);
        }
        let patience = if shared.late().is_empty() { CHECK_UNPROVEN } else { CHECK_LATE };
        let next = shared.next_within(described, patience);
        report_late(shared);
        let mut execution = match next {
            Next::Item(execution) => execution,
            Next::Nothing => continue,
            Next::End => return report_unproven(shared),
        };
        let is_busy = described.len() >= repeats::FEW;
        loop {
            if execution.is_large(shared) {
                hand_on_large(shared, execution, large);
                break;
            }
            if execution.read_on(shared, is_busy) {
                report_if_proven(shared, execution, is_busy);
                break;
            }
        }
    }
}

fn hand_on_large(shared: &Exec, execution: Described, large: &Sender<Described>) {
    match large.try_send(execution) {
        Ok(()) | Err(TrySendError::Disconnected(_)) => (),
        Err(TrySendError::Full(execution)) => shared.lose(
            Failure::ContentQueueFull,
            Some(&execution.watched),
            "too many large executed files wait to be hashed",
        ),
    }
}

/// Hashes large executed files, when no other thread needs the processor: a slice of one
/// file, then a slice of another container's file.
pub(crate) fn hash_large(shared: &Exec, large: &Receiver<Described>) {
    let _ = priority::set(priority::current(), 10, priority::Disk::Usual);
    while let Some(mut execution) = shared.next_to_report(large) {
        let (begun, used) = (Instant::now(), fair::processor_time());
        let is_done = loop {
            if execution.read_on(shared, false) {
                break true;
            }
            if begun.elapsed() >= fair::SLICE {
                break false;
            }
        };
        shared.spend(fair::processor_time().saturating_sub(used));
        if is_done {
            report_if_proven(shared, execution, false);
            large.finish();
        } else {
            large.put_back(execution);
        }
        shared.keep_pace();
    }
}

/// The gate's request, for which the kernel writes a record if it becomes an execution. `None`
/// where no record is awaited. So for files that are neither ELF nor a script: their execve
/// fails, and the shell that tried it reads the text itself.
fn request(shared: &Exec, execution: &Described) -> Option<Request> {
    let Progress::Done(state, _) = &execution.progress else { return None };
    // With repeats: the others that were counted may be executions.
    if !matches!(state.format, Format::Elf | Format::Script) || execution.times > 1 {
        return None;
    }
    let process = execution.seen.as_ref()?.identity;
    let asked = execution.asked.filter(|_| shared.records_executions())?;
    Some(Request { process, asked })
}

/// Returns an execution that the kernel has recorded. One without a record may be a mere
/// check or an execve that failed: it waits in [`unproven`](super::unproven).
fn proven(shared: &Exec, execution: Described) -> Option<Described> {
    let Some(request) = request(shared, &execution) else { return Some(execution) };
    let mut unproven = shared.unproven();
    // After a stop no more records are read that could prove it.
    if unproven.is_proven(&request) || shared.is_stopping() {
        return Some(execution);
    }
    if let Executed::Held(held) = &execution.file {
        // An open file keeps its mount busy.
        drop(held.take());
    }
    let execution = unproven.wait(request, execution).err();
    drop(unproven);
    shared.rest_of_trace.hurry();
    execution
}

/// Reports executions whose records are not read in time, and has the files of those
/// without a record checked.
fn check_unproven(shared: &Exec) {
    let overdue = shared.unproven().overdue(perf::now());
    overdue.into_iter().for_each(|execution| report(shared, execution, false));
    let not_executed: Vec<_> = shared.unproven().not_executed().map(Described::place).collect();
    not_executed.into_iter().for_each(|place| check_file(shared, place));
}

/// Reports the executions for which the change feed has read enough, or that have waited for
/// too long.
fn report_late(shared: &Exec) {
    loop {
        let progress = &shared.progress;
        let next = shared.late().take(|backlog| progress.has_reached(backlog), Instant::now());
        let Some((execution, is_read)) = next else { return };
        finish(shared, execution, false, is_read);
    }
}

/// At the end no records are read any more: reports what waits for them, and for the feed.
fn report_unproven(shared: &Exec) {
    loop {
        let Some((execution, _)) = shared.late().take(|_| true, Instant::now()) else { break };
        let is_read = shared.progress.has_reached(shared.progress.backlog());
        finish(shared, execution, true, is_read);
    }
    let waiting = shared.unproven().forget_all(perf::now());
    for execution in waiting {
        if shared.may_report() {
            report(shared, execution, true);
        } else {
            shared.leave(1);
        }
    }
}

/// Has the file of an execve that did not execute checked, if it lies in an upper layer.
pub(crate) fn check_file(shared: &Exec, place: Option<(Arc<Watched>, RootfsPath)>) {
    if let Some((watched, path)) = place {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
}

/// Reports an execution and the content of its file, or lets it wait for its record.
fn report_if_proven(shared: &Exec, execution: Described, is_busy: bool) {
    if let Some(execution) = proven(shared, execution) {
        report(shared, execution, is_busy);
    }
}

/// Adds what the kernel's records hold of a process. Returns also the name by which it
/// executed the file.
fn complete(
    shared: &Exec,
    mut process: Process,
    asked: Option<u64>,
    is_busy: bool,
) -> (Process, Option<Box<[u8]>>) {
    if process.argv.is_none() {
        // Here and not where it was described: processes that wait there may be ending.
        let execve = (process.identity.pid, asked);
        process.argv = recorded::recorded_arguments(shared, execve, &|| is_busy);
    }
    // If it has ended, or reads a text without `#!` itself, its program is still the one before.
    let pid = process.identity.pid;
    let read_at = asked.map_or_else(procfs::ticks_since_boot, records::ticks_of);
    // Its execve is over within a moment, and later another process may have its pid.
    let named = Named { pid, read_at: read_at.saturating_add(MOMENT) };
    let process = shared.complete_if_ended(named, process);
    let execve = (process.identity.pid, asked);
    let exec_name = recorded::recorded_name(shared, execve, &|| is_busy);
    (process, exec_name)
}

/// Adds what can be read now of a process that was described before its execve was over, and
/// of whose arguments there is no record. Both happen on a busy machine.
fn read_late(
    shared: &Exec,
    process: &mut Process,
    before: &procfs::Stat,
    asked: Option<u64>,
    file: &Stat,
) {
    let Some((read, program)) = describe::program_now(before) else { return };
    // It may have become yet another program since. A script is not the program that runs.
    let pid = before.identity.pid;
    let is_last = || asked.is_some_and(|asked| shared.arguments().is_last(pid, asked));
    if program == (file.device, file.inode) || is_last() {
        process.exe = read.exe.or(process.exe.take());
        process.argv = Some(read.argv);
    }
}

/// Reports an execution, or lets it wait for the change feed, which knows the writer of its file.
fn report(shared: &Exec, mut execution: Described, is_busy: bool) {
    // At once, while the process lives.
    again::look(shared, &mut execution);
    let backlog = shared.progress.backlog();
    let is_read = shared.progress.has_reached(backlog);
    let is_own = execution.filesystem == Filesystem::Overlay && execution.layer_file.is_none();
    if is_read || !is_own || shared.is_stopping() {
        return finish(shared, execution, is_busy, is_read);
    }
    if let Executed::Held(held) = &execution.file {
        // An open file keeps its mount busy.
        drop(held.take());
    }
    let until = Instant::now() + progress::PATIENCE;
    let waits = shared.late().wait(backlog, until, execution);
    if let Err(execution) = waits {
        finish(shared, execution, is_busy, false);
    }
}

// Long: it takes apart all that is known of an execution.
fn finish(shared: &Exec, execution: Described, is_busy: bool, is_read: bool) {
    let named = execution.named();
    let Described {
        mut watched,
        holder,
        seen,
        filesystem,
        path: _,
        file,
        stat,
        layer_file,
        is_movable,
        writer_check,
        could_change,
        executing,
        asked,
        at,
        times,
        progress,
    } = execution;
    drop(file);
    let Progress::Done(mut state, lower) = progress else { return };
    let could_change = could_change.unwrap_or(writer_check.had_writer());
    state.could_change = state.could_change.max(could_change);
    let is_on_overlay = filesystem == Filesystem::Overlay;
    let Executing { process } = executing;
    let (mut process, exec_name) = complete(shared, process, asked, is_busy);
    if process.argv.is_none() {
        seen.iter().for_each(|seen| read_late(shared, &mut process, seen, asked, &stat));
    }
    // By now the record of the process's birth has been read.
    if filesystem != Filesystem::Overlay
        && Arc::ptr_eq(&holder, &watched)
        && let Some(other) = seen.and_then(|seen| attribution::other_than(shared, &holder, &seen))
    {
        watched = other;
    }
    let is_deleted = state.deleted;
    let (filesystem, path) = named;
    // For a file that was moved, the state holds for its new path only.
    if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
        // First, so that the verdict on the file finds it.
        watched.layer_files_mut().note_reported(layer_file, state.clone(), at);
    }
    let has_writer = is_read && filesystem == Filesystem::Overlay && layer_file.is_none();
    let writer = has_writer.then(|| shared.writer_read(&watched, &path, &stat)).flatten();
    let fact = Fact::File(FileFact::Executed {
        invoked_as: exec_name.and_then(|name| describe::invoked_as(&name, &path)),
        path: path.clone(),
        filesystem,
        running: false,
        denied: false,
        times,
        state,
        lower,
        process: Arc::new(process),
        layer_file,
        writer,
    });
    let file_of = (!Arc::ptr_eq(&holder, &watched)).then(|| holder.container.clone());
    let is_reported = shared.observe_file_of(&watched, file_of, at, Source::Gate, fact);
    if let Some(layer_file) = layer_file {
        if !is_reported {
            watched.layer_files_mut().judge(&layer_file, Verdict::Lost);
        }
        // A file of the image is not in the upper layer: no walk would find it.
        return;
    }
    if !is_on_overlay {
        // Walks cover only the overlay.
        return;
    }

    // The overlay's marks do not see renames, removals and chmod; where drift is executed,
    // a scan finds them soon.
    if !is_deleted {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
    shared.dirty.mark_for_scan(&watched);
}
