//! Whether an executed file holds now what it held when it was executed.
//!
//! The kernel refuses to execute a file that is open for writing, and refuses to open a
//! running program for writing. An overlay has a gap there: a shared mapping belongs to the
//! file of the upper layer, but the check to the overlay's own inode. So a process can open a
//! program for writing, map it, close it, store other bytes, have it executed, and restore the
//! old bytes. Neither an event nor a time shows this: the times of a file move when a clean
//! page is first stored to, and then not until that page has been written back.
//!
//! Four observations close most of this gap:
//!
//! - No process has the upper file open or mapped for writing: the kernel grants a lease
//!   (`sys::lease`). The lease is requested as soon as the gate has handed the file on.
//! - No writer has gone between the execution and that moment (`closings`), by the directory's
//!   mark. A file with several names is marked itself when it is first executed.
//! - Each file is marked itself while it is examined (Linux 5.19). If its times had not moved by
//!   then, and no writer has closed it since by any name, it was not written to.
//! - The file's times after it was read are those from when the gate was asked. A new
//!   writer has to store to a page that it has not mapped yet, which moves them. (Since
//!   Linux 6.13 each change after the times were read gets a time of its own; before, two
//!   changes within a tick of the clock can share one.) Times that move without a writer are
//!   those of a file that was renamed, removed, or given another mode or owner.
//!
//! It must not hash or report anything: `take` and `described` ask it while they read the
//! file.

use std::os::fd::{AsFd as _, OwnedFd};

use super::execution::Execution;
use crate::model::{CouldChange, Filesystem, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::handle::FileHandle;
use crate::sys::lease;
use crate::watch::core::watched::Watched;
use crate::watch::files::closings::{Executed, Position, Reported, Writers};
use crate::watch::files::shared::Files;
use crate::watch::files::upper;

/// What was observed of the writers of an executed file.
#[derive(Debug, Default)]
pub(crate) struct WriterCheck {
    /// A process could write to it while it was executed.
    had_writer: bool,
    /// The kernel's report of this execution.
    reported: Option<Reported>,
    /// Up to where the closings were read when it was checked first.
    seen: Option<Position>,
    /// Its times were still those of the gate's request then, and it was listened to itself.
    was_unchanged: bool,
    is_own: bool,
    upper: Option<Upper>,
    pid: u32,
    asked: Option<u64>,
}

#[derive(Debug)]
struct Upper {
    /// Open until the file was read, if it is read at once.
    fd: Option<OwnedFd>,
    file: FileHandle,
    /// The directory by which it was executed; the file itself if it has several names.
    marked: FileHandle,
}

impl WriterCheck {
    /// Checks a file that is being executed. Only a file of the container's own layer can
    /// be mistaken for one of the image.
    pub(crate) fn at(
        shared: &Files,
        execution: &Execution,
        file: &OwnedFd,
        path: Option<&RootfsPath>,
    ) -> WriterCheck {
        let Execution { watched, filesystem, stat, layer_file, caller, .. } = execution;
        let is_own = *filesystem == Filesystem::Overlay && layer_file.is_none();
        let mut check =
            WriterCheck { is_own, pid: caller.pid, asked: caller.asked, ..WriterCheck::default() };
        let Some(path) = path.filter(|_| is_own) else { return check };
        let Some(fd) = upper::upper(watched, path, stat) else { return check };
        // First: what happens after the checks is an event.
        let is_listened_to = shared.closings.listen_for_now(&fd);
        let has_writer = lease::has_writer(fd.as_fd());
        check.upper = Upper::of(shared, watched, path, stat, fd);
        if let (Ok(has_writer), writers) = (has_writer, check.writers(shared)) {
            check.had_writer = has_writer || writers.is_some_and(|writers| writers.has_gone);
            check.reported = writers.and_then(|writers| writers.reported);
            check.seen = writers.map(|writers| writers.seen);
            check.was_unchanged =
                is_listened_to && file::stat(file).is_ok_and(|now| !upper::has_changed(stat, &now));
        }
        check
    }

    fn writers(&self, shared: &Files) -> Option<Writers> {
        let Upper { file, marked, .. } = self.upper.as_ref()?;
        let (pid, asked, reported) = (self.pid, self.asked?, self.reported);
        let executed = Executed { file, marked, pid, asked, reported, since: self.seen };
        Some(shared.closings.writers(&executed))
    }

    /// Whether the file may have held something else when it was executed than what was
    /// read from it. `now` is the state of the open file after the reading.
    pub(crate) fn could_change(
        &self,
        shared: &Files,
        watched: &Watched,
        path: &RootfsPath,
        before: &Stat,
        now: &Stat,
    ) -> CouldChange {
        if !self.is_own || self.had_writer || !upper::has_changed(before, now) {
            return self.had_writer();
        }
        let shown = || {
            let upper = self.upper.as_ref()?;
            // By another name it can be changed in a directory that has no mark.
            let is_observed = before.links.max(now.links) <= 1 || upper.marked == upper.file;
            let has_writer = match &upper.fd {
                Some(fd) => lease::has_writer(fd.as_fd()),
                None => lease::has_writer(upper::upper(watched, path, now)?.as_fd()),
            };
            let writers = self.writers(shared)?;
            let none_since = is_observed && writers.reported.is_some() && writers.none_since;
            let is_proven = none_since || self.was_unchanged && writers.none_since_asked;
            Some(match (has_writer.ok()? || writers.has_gone, is_proven) {
                (true, _) => CouldChange::HadWriter,
                (false, true) => CouldChange::No,
                (false, false) => CouldChange::Unproven,
            })
        };
        shown().unwrap_or(CouldChange::Unproven)
    }

    /// Closes the upper file, which would stay open as long as the executed file waits to be
    /// read.
    pub(crate) fn release(&mut self) {
        if let Some(upper) = &mut self.upper {
            upper.fd = None;
        }
    }

    /// Whether a process could write to the file, where it was not read.
    pub(crate) fn had_writer(&self) -> CouldChange {
        if self.had_writer { CouldChange::HadWriter } else { CouldChange::No }
    }
}

impl Upper {
    fn of(
        shared: &Files,
        watched: &Watched,
        path: &RootfsPath,
        stat: &Stat,
        fd: OwnedFd,
    ) -> Option<Upper> {
        let directory = upper::listen_near(shared, watched, path)?;
        let file = FileHandle::of(&fd).ok()?;
        if stat.links > 1 {
            shared.closings.listen_to_file(&watched.container, file.clone(), &fd);
        }
        // It may have had several names before, and get some again while it runs.
        let is_marked = shared.closings.listens_to(&file);
        let marked = if is_marked { file.clone() } else { directory };
        Some(Upper { fd: Some(fd), file, marked })
    }
}
