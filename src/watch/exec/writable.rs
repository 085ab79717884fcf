//! Whether what an executed file holds now is what it held when it was executed.
//!
//! The kernel lets nobody execute a file that is open for writing, and lets nobody
//! open a running program for writing. An overlay has a hole there: a shared mapping
//! belongs to the file of the upper layer, the check to the overlay's own inode. So a
//! process can open a program for writing, map it, close it, store other bytes, have
//! it executed, and put the old bytes back. Neither an event nor a time shows this:
//! the times of a file move when a clean page is first stored to, and then not until
//! that page has been written back.
//!
//! Three observations leave little room:
//!
//! - Nobody has the upper file open or mapped for writing: the kernel grants a lease
//!   (`sys::lease`). This is asked as soon as the gate has handed the file on.
//! - No writer has gone between the execution and that moment (`closings`).
//! - The file's times are the same after it was read as when the gate was asked. A new
//!   writer has to store to a page that it has not mapped yet, which moves them. (Since
//!   Linux 6.13 each change after a look has a time of its own; before, two changes
//!   within a tick of the clock can share one.) Times that move without a writer are
//!   those of a file that was renamed, removed, or given another mode or owner.

use std::os::fd::{AsFd as _, OwnedFd};

use super::execution::Execution;
use crate::model::{Filesystem, RootfsPath};
use crate::sys::file::Stat;
use crate::sys::handle::FileHandle;
use crate::sys::lease;
use crate::watch::core::watched::Watched;
use crate::watch::files::closings::{Executed, Writers};
use crate::watch::files::shared::Files;
use crate::watch::files::upper;

/// What was observed of the writers of an executed file.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// Somebody could write to it while it was executed.
    had_writer: bool,
    /// The kernel tells of what happens to this file.
    was_told: bool,
    is_own: bool,
    upper: Option<Upper>,
    pid: u32,
    asked: Option<u64>,
}

#[derive(Debug)]
struct Upper {
    /// Until it was read, if that is at once.
    fd: Option<OwnedFd>,
    file: FileHandle,
    directory: FileHandle,
}

impl Look {
    /// Looks at a file that is executed now. Only those of the container's own layer
    /// can be taken for the image's.
    pub(crate) fn at(shared: &Files, execution: &Execution, path: Option<&RootfsPath>) -> Look {
        let Execution { watched, filesystem, stat, layer_file, caller, .. } = execution;
        let is_own = *filesystem == Filesystem::Overlay && layer_file.is_none();
        let mut look = Look { is_own, pid: caller.pid, asked: caller.asked, ..Look::default() };
        let Some(path) = path.filter(|_| is_own) else { return look };
        let Some(fd) = upper::upper(watched, path, stat) else { return look };
        let has_writer = lease::has_writer(fd.as_fd());
        look.upper = Upper::of(shared, watched, path, fd);
        if let (Ok(has_writer), writers) = (has_writer, look.writers(shared)) {
            look.had_writer = has_writer || writers.is_some_and(|writers| writers.has_gone);
            look.was_told = writers.is_some_and(|writers| writers.was_told);
        }
        look
    }

    fn writers(&self, shared: &Files) -> Option<Writers> {
        let Upper { file, directory, .. } = self.upper.as_ref()?;
        let executed = Executed { file, directory, pid: self.pid, asked: self.asked? };
        Some(shared.closings.writers(&executed))
    }

    /// Whether the file may have held something else when it was executed than what
    /// was read of it until now. `now` is what is open.
    pub(crate) fn could_change(
        &self,
        shared: &Files,
        watched: &Watched,
        path: &RootfsPath,
        before: &Stat,
        now: &Stat,
    ) -> bool {
        if !self.is_own || self.had_writer || !upper::has_changed(before, now) {
            return self.had_writer;
        }
        let had_none = || {
            if before.links.max(now.links) > 1 {
                // By another name it could be changed where nobody listens.
                return None;
            }
            let has_writer = match &self.upper.as_ref()?.fd {
                Some(fd) => lease::has_writer(fd.as_fd()),
                None => lease::has_writer(upper::upper(watched, path, now)?.as_fd()),
            };
            let writers = self.writers(shared)?;
            let is_told = self.was_told || writers.was_told;
            Some(!has_writer.ok()? && is_told && writers.none_since)
        };
        !had_none().unwrap_or(false)
    }

    /// Closes what would wait for a file that is not read at once.
    pub(crate) fn release(&mut self) {
        if let Some(upper) = &mut self.upper {
            upper.fd = None;
        }
    }

    /// The same of a file that was not read.
    pub(crate) fn had_writer(&self) -> bool {
        self.had_writer
    }
}

impl Upper {
    fn of(shared: &Files, watched: &Watched, path: &RootfsPath, fd: OwnedFd) -> Option<Upper> {
        let directory = upper::listen_near(shared, watched, path)?;
        let file = FileHandle::of(&fd).ok()?;
        Some(Upper { fd: Some(fd), file, directory })
    }
}
