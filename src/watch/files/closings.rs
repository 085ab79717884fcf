//! When the last writer of an upper layer's file closed it, and whether that was before or
//! after an execution of the file.
//!
//! ```text
//! walk ── directory ──> marks ──> kernel ──> log <── asked ── writable
//! ```
//!
//! The kernel queues the event of a closing before it revokes write access. So a thread that
//! first finds that a file has no writer, and then reads the queue to its end, knows every
//! earlier writer.
//!
//! This file owns the log of closings and executions. Walks mark the directories. `exec`
//! asks about executed files and decides what the reply means for the time of check.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::model::ContainerId;
use crate::sys::closings::{self, Happened, READ_BYTES};
use crate::sys::handle::FileHandle;
use crate::sys::perf;
use crate::watch::core::shared::Core;

/// Files and directories that are remembered. Beyond that all are forgotten, and earlier
/// events count as unknown.
const MOST: usize = 64 * 1024;

/// Files with several names that are listened to, of one container and of all. Each pins an
/// inode until the file is removed.
const MOST_FILES: usize = 256;
const MOST_FILES_OF_ALL: usize = 8 * 1024;

/// How many reads of the queue are remembered with their time.
const READINGS: usize = 256;

/// After a read of at least `MANY` events, the thread pauses for `REST`, so that it reads more
/// at once. After fewer it reads on immediately: events that are read early can be
/// distinguished in time from those that follow.
const MANY: u64 = 16;
const REST: Duration = Duration::from_millis(2);

/// A place in the kernel's queue.
pub(crate) type Position = u64;

#[derive(Debug)]
pub(crate) struct Closings {
    /// `None` if the kernel does not support it.
    group: Option<closings::Closings>,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    last: Position,
    /// The last closing of each file.
    closed: HashMap<FileHandle, Position>,
    executed: HashMap<(FileHandle, u32), Position>,
    /// Since when a directory, or a file with several names, is marked, by the clock of the
    /// kernel's records.
    marked: HashMap<FileHandle, u64>,
    /// The marked files, by container. Their marks end with the files.
    files: HashMap<ContainerId, Vec<FileHandle>>,
    /// When the queue was read to its end, and how far that was.
    readings: VecDeque<(u64, Position)>,
    /// Events up to this position are unknown.
    forgotten: Position,
}

/// An execution of a file of an upper layer.
#[derive(Debug)]
pub(crate) struct Executed<'a> {
    pub(crate) file: &'a FileHandle,
    /// What was marked to observe it: the directory by which it was executed, or the file
    /// itself.
    pub(crate) marked: &'a FileHandle,
    pub(crate) pid: u32,
    /// When the gate was asked, by the clock of the kernel's records.
    pub(crate) asked: u64,
    /// The kernel's report of the execution, if it was taken before.
    pub(crate) reported: Option<Reported>,
    /// What was read when it was asked first: the file is listened to since.
    pub(crate) since: Option<Position>,
}

/// The kernel's report of one execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reported(Position);

/// What is known of the writers of an executed file that has none left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Writers {
    /// A writer that existed at the execution has closed the file since.
    pub(crate) has_gone: bool,
    /// No writer can have closed it since; `false` also if that is unknown.
    pub(crate) none_since: bool,
    /// No writer can have closed it since it was asked first; `false` also if that is unknown.
    pub(crate) none_since_asked: bool,
    /// The kernel reported the execution. Without that event, nothing is known of it.
    pub(crate) reported: Option<Reported>,
    /// What was read by now.
    pub(crate) seen: Position,
}

impl Closings {
    pub(crate) fn new() -> Closings {
        let group = closings::Closings::new()
            .inspect_err(|err| {
                tracing::warn!("short-lived writers of executed files will be missed: {err}");
            })
            .ok();
        Closings { group, log: Mutex::default() }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        // A panic leaves at worst a log that lacks events.
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens to an open directory of an upper layer from now on.
    pub(crate) fn listen(&self, directory: &OwnedFd) {
        if let Ok(handle) = FileHandle::of(directory) {
            self.listen_to(handle, directory);
        }
    }

    /// Like [`listen`](Self::listen), for a directory whose handle is known.
    pub(crate) fn listen_to(&self, handle: FileHandle, directory: &OwnedFd) {
        self.mark(handle, |group| group.mark(directory.as_fd()));
    }

    /// Listens to an open file from now on: with several names, it can be written to by way of
    /// a directory that is not marked. A container has room for some; nothing is proven of the
    /// others.
    pub(crate) fn listen_to_file(
        &self,
        container: &ContainerId,
        handle: FileHandle,
        file: &OwnedFd,
    ) {
        {
            let files = &mut self.log().files;
            let all: usize = files.values().map(Vec::len).sum();
            let own = files.entry(container.clone()).or_default();
            if own.contains(&handle) || own.len() >= MOST_FILES || all >= MOST_FILES_OF_ALL {
                return;
            }
            own.push(handle.clone());
        }
        self.mark(handle, |group| group.mark_file(file.as_fd()));
    }

    /// Listens to an open file while it is examined, whatever its names are. False if the kernel
    /// cannot.
    pub(crate) fn listen_for_now(&self, file: &OwnedFd) -> bool {
        let group = self.group.as_ref();
        group.is_some_and(|group| group.mark_file_loosely(file.as_fd()).is_ok())
    }

    /// Forgets the files of a container that has ended.
    pub(crate) fn forget_files(&self, container: &ContainerId) {
        let mut log = self.log();
        for handle in log.files.remove(container).unwrap_or_default() {
            log.marked.remove(&handle);
        }
    }

    /// Whether it listens to this file or directory.
    pub(crate) fn listens_to(&self, handle: &FileHandle) -> bool {
        self.log().marked.contains_key(handle)
    }

    fn mark(
        &self,
        handle: FileHandle,
        mark: impl FnOnce(&closings::Closings) -> std::io::Result<()>,
    ) {
        let Some(group) = &self.group else { return };
        if self.log().marked.contains_key(&handle) || mark(group).is_err() {
            return;
        }
        let now = perf::now();
        let marked = &mut self.log().marked;
        if marked.len() >= MOST {
            marked.clear();
        }
        marked.insert(handle, now);
    }

    pub(crate) fn unlisten(&self, directory: &OwnedFd) {
        let Some(group) = &self.group else { return };
        if let Ok(handle) = FileHandle::of(directory) {
            self.log().marked.remove(&handle);
        }
        // Most errors mean that there is no mark. A mark ends with its directory.
        let _ = group.unmark(directory.as_fd());
    }

    /// Keeps the queue short until the watchers stop.
    pub(crate) fn run(&self, shared: &Core) {
        let Some(group) = &self.group else { return };
        // Without CAP_SYS_NICE this thread has normal priority and is late more often.
        let _ = rustix::process::setpriority_process(None, -10);
        while !shared.is_stopping() {
            shared.wait_for(group, None);
            let read = {
                let mut log = self.log();
                let before = log.last;
                self.read_all(&mut log);
                log.last - before
            };
            if read >= MANY {
                std::thread::sleep(REST);
            }
        }
    }

    /// Reads the queue; true if it was read to its end.
    fn read_all(&self, log: &mut Log) -> bool {
        let Some(group) = &self.group else { return false };
        let mut buffer = vec![0; READ_BYTES];
        // Bounded: a container that fills the queue as fast as it is read must not delay others.
        for _ in 0..64 {
            match group.read(&mut buffer) {
                Ok(happened) => happened.into_iter().for_each(|happened| log.add(happened)),
                Err(err) if err.kind() == std::io::ErrorKind::WouldBlock => {
                    log.has_read_all(perf::now());
                    return true;
                }
                Err(_) => {
                    log.forget();
                    return false;
                }
            }
        }
        false
    }

    /// What is known of the writers of an executed file. Call it once the file has no writer.
    pub(crate) fn writers(&self, executed: &Executed<'_>) -> Writers {
        let mut log = self.log();
        let is_all = self.read_all(&mut log);
        let writers = log.writers(executed);
        Writers {
            none_since: writers.none_since && is_all,
            none_since_asked: writers.none_since_asked && is_all,
            ..writers
        }
    }
}

impl Log {
    fn add(&mut self, happened: Happened) {
        self.last += 1;
        let Happened::To { file, pid, executed, closed } = happened else {
            self.forget();
            return;
        };
        if self.closed.len() >= MOST || self.executed.len() >= MOST {
            self.forget();
        }
        if closed {
            self.closed.insert(file.clone(), self.last);
        }
        if executed {
            // Placed after the closing: a process that executes a file drops its mappings first.
            self.last += 1;
            self.executed.insert((file, pid), self.last);
        }
    }

    fn forget(&mut self) {
        self.closed.clear();
        self.executed.clear();
        self.forgotten = self.last;
    }

    /// The queue was empty at some time before `now`.
    fn has_read_all(&mut self, now: u64) {
        if self.readings.len() >= READINGS {
            self.readings.pop_front();
        }
        self.readings.push_back((now, self.last));
    }

    fn writers(&mut self, executed: &Executed<'_>) -> Writers {
        let Executed { file, marked, pid, asked, reported, since } = *executed;
        let closed = self.closed.get(file).copied().unwrap_or(0);
        // Removed: its process may execute it again.
        let newest = self.executed.remove(&(file.clone(), pid)).map(Reported);
        let reported = reported.or(newest);
        // The last read that ended before the gate was asked: its events are older.
        let before = self.readings.iter().rev().find(|(read, _)| *read <= asked);
        let was_marked = self.marked.get(marked).is_some_and(|since| *since <= asked);
        // After its report, or after all that was read before the gate was asked.
        let none_after = |position: Position| closed <= position && self.forgotten <= position;
        // The directory reports what is executed by its name. A file with several names must
        // have been marked itself.
        let is_observed = was_marked || marked != file;
        Writers {
            reported,
            has_gone: reported.is_some_and(|Reported(execution)| closed > execution)
                || since.is_some_and(|since| closed > since),
            none_since: reported
                .is_some_and(|Reported(execution)| is_observed && none_after(execution))
                || was_marked && before.is_some_and(|(_, before)| none_after(*before)),
            none_since_asked: since.is_some_and(none_after),
            seen: self.last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle(name: &str) -> FileHandle {
        FileHandle::new(1, 1, name.as_bytes())
    }

    /// Events of the file `f` by process and letter, `x` for executed, `c` for closed, `?` for
    /// an unknown event; `|` where the queue was read to its end, one tick later each time.
    /// The gate was asked about process 7 at tick `asked`.
    #[track_caller]
    fn check(events: &str, asked: u64, expected: &str) {
        let mut log = Log::default();
        log.marked.insert(handle("d"), 1);
        let mut tick = 1;
        for event in events.split_whitespace() {
            match event.split_at(1) {
                ("|", _) => {
                    log.has_read_all(tick);
                    tick += 1;
                }
                ("?", _) => log.add(Happened::Unknown),
                (pid, what) => log.add(Happened::To {
                    file: handle("f"),
                    pid: pid.parse().unwrap(),
                    executed: what.contains('x'),
                    closed: what.contains('c'),
                }),
            }
        }
        let (file, marked) = (&handle("f"), &handle("d"));
        let executed = Executed { file, marked, pid: 7, asked, reported: None, since: None };
        let writers = log.writers(&executed);
        // What is known does not change by asking.
        let again = Executed { reported: writers.reported, ..executed };
        assert_eq!(log.writers(&again), writers, "{events}");
        let mut facts = Vec::new();
        facts.extend(writers.has_gone.then_some("gone"));
        facts.extend(writers.none_since.then_some("none since"));
        facts.extend(writers.reported.map(|_| "reported"));
        assert_eq!(facts.join(", "), expected, "{events}");
    }

    #[test]
    fn a_writer_that_closes_after_the_execution_existed_before_it() {
        check("| 7x 8c |", 1, "gone, reported");
        check("| 8c 7x |", 1, "none since, reported");
        check("| 8c | 7x |", 2, "none since, reported");
        check("| 8c | 7x | 8c |", 2, "gone, reported");
        // The writer belongs to another execution.
        check("| 6x 8c 7x |", 1, "none since, reported");
    }

    #[test]
    fn a_process_that_executes_a_file_it_has_mapped_drops_the_mapping() {
        check("| 7xc |", 1, "none since, reported");
    }

    #[test]
    fn without_the_execution_nothing_is_known() {
        check("| 8c |", 1, "");
        check("|", 1, "none since");
        // The directory was not marked yet, or the queue was not read.
        check("| | 8c |", 0, "");
        check("8c", 1, "");
        // The report of the execution shows that it was marked.
        check("| | 7x |", 0, "none since, reported");
        check("7x", 1, "none since, reported");
    }

    #[test]
    fn a_file_that_is_listened_to_is_known_from_then_on() {
        let mut log = Log::default();
        let (file, marked) = (&handle("f"), &handle("d"));
        let executed = Executed { file, marked, pid: 7, asked: 1, reported: None, since: None };
        let first = log.writers(&executed);
        assert!(!first.none_since_asked, "nothing was asked before");
        let again = Executed { since: Some(first.seen), ..executed };
        assert!(log.writers(&again).none_since_asked);
        let closed =
            |name: &str| Happened::To { file: handle(name), pid: 8, executed: false, closed: true };
        log.add(closed("other"));
        assert!(log.writers(&again).none_since_asked);
        log.add(closed("f"));
        let Writers { none_since_asked, has_gone, .. } = log.writers(&again);
        assert_eq!((none_since_asked, has_gone), (false, true));
        let now = log.last;
        log.add(Happened::Unknown);
        assert!(!log.writers(&Executed { since: Some(now), ..executed }).none_since_asked);
    }

    #[test]
    fn lost_events_do_not_count_as_no_events() {
        check("| 7x ? |", 1, "");
        check("| ? | 7x |", 2, "none since, reported");
    }
}
