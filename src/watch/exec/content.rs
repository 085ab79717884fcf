//! Executed files of the container's own layer, and those of the image's layers
//! that may have been changed there: who runs them, and what they hold. Hashed
//! by the descriptor that the kernel opened for the event, so that no rename can
//! put another file in its place.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;

use super::crowd;
use super::described::{Described, Executed, Progress};
use super::execution::Execution;
use super::shared::Exec;
use super::take::Taken;
use super::unproven::Question;
use crate::health::Failure;
use crate::model::{Fact, Filesystem, Format, Process, RootfsPath, Source};
use crate::sys::{perf, priority, procfs};
use crate::threads;
use crate::watch::core::fair::{self, Receiver, Sender};
use crate::watch::core::shared::Next;
use crate::watch::core::trust::Verdict;
use crate::watch::core::watched::Watched;
use crate::watch::files::paths;
use crate::watch::mounts::find;
use crate::watch::process::arguments::Words;
use crate::watch::process::describe::{self, Executing};
use crate::watch::process::named::Named;
use crate::watch::process::{deeds, membership, recorded, records};

/// How long an execve may take, in clock ticks.
const MOMENT: u64 = 25;

/// How often those are looked for that are not recorded.
const LOOK_FOR_UNPROVEN: Duration = Duration::from_millis(250);

/// Describes processes. A thread of its own, because a process may live for less
/// time than the file before it takes to hash.
pub(crate) fn describe(shared: &Exec, executions: &Receiver<Taken>, described: &Sender<Described>) {
    // Without CAP_SYS_NICE it runs like the others, and is late more often.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(execution) = shared.next_to_tell(executions) {
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
    let Taken { execution, path, look, could_change, .. } = taken;
    let Execution {
        watched, filesystem, file, stat, layer_file, is_movable, caller, at, more, ..
    } = execution;
    let times = 1 + more.map_or(0, |more| more.take());
    threads::about(&watched.container);
    let holder = watched;
    let seen = caller.stat.clone();
    let actor = seen.as_ref().and_then(|seen| deeds::other_than(shared, &holder, seen));
    if filesystem == Filesystem::Overlay && actor.is_some() {
        return None;
    }
    let watched = actor.unwrap_or_else(|| holder.clone());

    let executing = {
        // Held until the session is told, so that it is told before what it does.
        let mut sessions = shared.openings();
        sessions.open(shared, &caller, &watched, at, &|| others.len())
    };
    membership::keep_handle(shared, &watched, &caller);
    let mut executing = executing.unwrap_or_else(|| {
        let executing = describe::after_exec(&caller, &watched, &|| !others.is_empty());
        let described = &executing.process;
        let words = described.argv.clone().map(|argv| Words { exe: described.exe.clone(), argv });
        membership::keep_words(shared, &watched, &caller, words);
        executing
    });
    if let Some(stat) = &caller.stat {
        let mut packages = shared.packages();
        packages.executes(shared, &watched, stat);
        // Its parents may have ended with it.
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
        // The common case, where directories can be moved at all.
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
                look,
                could_change,
                executing,
                asked: caller.asked,
                at,
                times,
                progress: Progress::Waiting,
            })
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be told: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            None
        }
    }
}

/// Hashes what was executed, but for large files, which must not keep the others
/// waiting.
pub(crate) fn hash(shared: &Exec, described: &Receiver<Described>, large: &Sender<Described>) {
    let mut last_look = Instant::now();
    loop {
        if last_look.elapsed() >= LOOK_FOR_UNPROVEN {
            last_look = Instant::now();
            look_for_unproven(shared);
        }
        let mut execution = match shared.next_within(described, LOOK_FOR_UNPROVEN) {
            Next::Item(execution) => execution,
            Next::Nothing => continue,
            Next::End => return report_unproven(shared),
        };
        let is_crowded = described.len() >= crowd::FEW;
        loop {
            if execution.is_large(shared) {
                hand_on_large(shared, execution, large);
                break;
            }
            if execution.read_on(shared, is_crowded) {
                tell(shared, execution, is_crowded);
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

/// Hashes large files that were executed, when nobody else needs the processor: a
/// slice of one, then a slice of another container's.
pub(crate) fn hash_large(shared: &Exec, large: &Receiver<Described>) {
    let _ = priority::set(priority::current(), 10, priority::Disk::Usual);
    while let Some(mut execution) = shared.next_to_tell(large) {
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
            tell(shared, execution, false);
            large.finish();
        } else {
            large.put_back(execution);
        }
        shared.keep_pace();
    }
}

/// What the kernel records if the gate's question becomes an execution. `None` of another
/// kind of file: its execve fails, and the shell that tried it reads the text itself.
fn question(shared: &Exec, execution: &Described) -> Option<Question> {
    let Progress::Done(state, _) = &execution.progress else { return None };
    // Of many that are counted, the others may be executions.
    if !matches!(state.format, Format::Elf | Format::Script) || execution.times > 1 {
        return None;
    }
    let process = execution.seen.as_ref()?.identity;
    let asked = execution.asked.filter(|_| shared.records_executions())?;
    Some(Question { process, asked })
}

/// An execution that the kernel has recorded. One that it has not may be a mere check or
/// an execve that failed, and waits.
fn proven(shared: &Exec, execution: Described) -> Option<Described> {
    let Some(question) = question(shared, &execution) else { return Some(execution) };
    let mut unproven = shared.unproven();
    // After a stop no record is read that could prove it.
    if unproven.is_proven(&question) || shared.is_stopping() {
        return Some(execution);
    }
    if let Executed::Held(held) = &execution.file {
        // Open, it keeps its mount busy.
        drop(held.take());
    }
    unproven.wait(question, execution).err()
}

/// Reports what waits for records that are not read, and looks at the files of what is
/// not recorded.
fn look_for_unproven(shared: &Exec) {
    let overdue = shared.unproven().overdue(perf::now());
    overdue.into_iter().for_each(|execution| report(shared, execution, false));
    let not_executed: Vec<_> = shared.unproven().not_executed().map(Described::place).collect();
    not_executed.into_iter().for_each(|place| look_at_file(shared, place));
}

/// Nothing is recorded any more.
fn report_unproven(shared: &Exec) {
    let waiting = shared.unproven().forget_all(perf::now());
    for execution in waiting {
        if shared.may_tell() {
            report(shared, execution, true);
        } else {
            shared.leave(1);
        }
    }
}

/// Looks at the file of what was not executed: a walk finds those of an upper layer.
pub(crate) fn look_at_file(shared: &Exec, place: Option<(Arc<Watched>, RootfsPath)>) {
    if let Some((watched, path)) = place {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
}

/// Reports what was executed and what it holds.
fn tell(shared: &Exec, execution: Described, is_crowded: bool) {
    if let Some(execution) = proven(shared, execution) {
        report(shared, execution, is_crowded);
    }
}

/// Adds what the kernel's records tell of a process, and by what name it was asked to
/// execute the file.
fn complete(
    shared: &Exec,
    mut process: Process,
    asked: Option<u64>,
    is_crowded: bool,
) -> (Process, Option<Box<[u8]>>) {
    if process.argv.is_none() {
        // Here and not where it was described: those who wait there may be ending.
        let execve = (process.identity.pid, asked);
        process.argv = recorded::recorded_arguments(shared, execve, &|| is_crowded);
    }
    if process.exe.is_none() {
        // It has ended, or it reads a text without `#!` itself: then it is what it was.
        let pid = process.identity.pid;
        let read_at = asked.map_or_else(procfs::ticks_since_boot, records::ticks_of);
        // Its execve is over within a moment, and later its number may be another's.
        let named = Named { pid, read_at: read_at.saturating_add(MOMENT) };
        process = shared.complete(named, process);
    }
    let execve = (process.identity.pid, asked);
    let exec_name = recorded::recorded_name(shared, execve, &|| is_crowded);
    (process, exec_name)
}

fn report(shared: &Exec, execution: Described, is_crowded: bool) {
    let Described {
        mut watched,
        holder,
        seen,
        filesystem,
        path,
        file,
        stat,
        layer_file,
        is_movable,
        look,
        could_change,
        executing,
        asked,
        at,
        times,
        progress,
    } = execution;
    drop(file);
    let Progress::Done(mut state, lower) = progress else { return };
    state.could_change |= could_change.unwrap_or(look.had_writer());
    let is_on_overlay = filesystem == Filesystem::Overlay;
    let Executing { process } = executing;
    let (process, exec_name) = complete(shared, process, asked, is_crowded);
    // By now the record of its birth has been read.
    if filesystem != Filesystem::Overlay
        && Arc::ptr_eq(&holder, &watched)
        && let Some(other) = seen.and_then(|seen| deeds::other_than(shared, &holder, &seen))
    {
        watched = other;
    }
    let is_deleted = state.deleted;
    // The gate looked before it ran. It may also just have lost its name.
    let is_nameless = layer_file.is_none() && stat.links == 0 && paths::has_a_number(&path);
    let filesystem = if is_nameless { Filesystem::Anonymous } else { filesystem };
    let path = paths::path(path.as_bytes(), is_nameless).unwrap_or(path);
    // What is said of a file that was moved holds for its new path only.
    if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
        // First, so that its judgement finds it.
        watched.layer_files_mut().tell(layer_file, state.clone(), at);
    }
    let writer = match filesystem {
        Filesystem::Overlay if layer_file.is_none() => shared.writer_of_file(&watched, &stat),
        _ => None,
    };
    let fact = Fact::Executed {
        invoked_as: exec_name.and_then(|name| describe::invoked_as(&name, &path)),
        path: path.clone(),
        filesystem,
        running: false,
        times,
        state,
        lower,
        process: Arc::new(process),
        layer_file,
        writer,
    };
    let file_of = (!Arc::ptr_eq(&holder, &watched)).then(|| holder.container.clone());
    let is_told = shared.observe_file_of(&watched, file_of, at, Source::Gate, fact);
    if let Some(layer_file) = layer_file {
        if !is_told {
            watched.layer_files_mut().judge(&layer_file, Verdict::Lost);
        }
        // It is not in the upper layer: no walk would find it.
        return;
    }
    if !is_on_overlay {
        // No walk goes there.
        return;
    }

    // The overlay's marks do not see renames, removals and chmod; where drift is
    // executed, they are looked for soon.
    if !is_deleted {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
    shared.dirty.mark_for_sweep(&watched);
}
