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

use super::gate::Execution;
use crate::model::{Filesystem, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::handle::FileHandle;
use crate::sys::lease;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;
use crate::watch::files::closings::Executed;
use crate::watch::files::closings::Writers;

/// What was observed of the writers of an executed file.
#[derive(Debug, Default)]
pub(in crate::watch) struct Look {
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
    pub(in crate::watch) fn at(
        shared: &Shared,
        execution: &Execution,
        path: Option<&RootfsPath>,
    ) -> Look {
        let Execution { watched, filesystem, stat, layer_file, caller, .. } = execution;
        let is_own = *filesystem == Filesystem::Overlay && layer_file.is_none();
        let mut look = Look { is_own, pid: caller.pid, asked: caller.asked, ..Look::default() };
        let Some(path) = path.filter(|_| is_own) else { return look };
        let Some(fd) = upper(watched, path, stat) else { return look };
        let has_writer = lease::has_writer(fd.as_fd());
        look.upper = Upper::of(shared, watched, path, fd);
        if let (Ok(has_writer), writers) = (has_writer, look.writers(shared)) {
            look.had_writer = has_writer || writers.is_some_and(|writers| writers.has_gone);
            look.was_told = writers.is_some_and(|writers| writers.was_told);
        }
        look
    }

    fn writers(&self, shared: &Shared) -> Option<Writers> {
        let Upper { file, directory, .. } = self.upper.as_ref()?;
        let executed = Executed { file, directory, pid: self.pid, asked: self.asked? };
        Some(shared.closings.writers(&executed))
    }

    /// Whether the file may have held something else when it was executed than what
    /// was read of it until now. `now` is what is open.
    pub(in crate::watch) fn could_change(
        &self,
        shared: &Shared,
        watched: &Watched,
        path: &RootfsPath,
        before: &Stat,
        now: &Stat,
    ) -> bool {
        if !self.is_own || self.had_writer || !has_changed(before, now) {
            return self.had_writer;
        }
        let had_none = || {
            if before.links.max(now.links) > 1 {
                // By another name it could be changed where nobody listens.
                return None;
            }
            let has_writer = match &self.upper.as_ref()?.fd {
                Some(fd) => lease::has_writer(fd.as_fd()),
                None => lease::has_writer(upper(watched, path, now)?.as_fd()),
            };
            let writers = self.writers(shared)?;
            let is_told = self.was_told || writers.was_told;
            Some(!has_writer.ok()? && is_told && writers.none_since)
        };
        !had_none().unwrap_or(false)
    }

    /// Closes what would wait for a file that is not read at once.
    pub(in crate::watch) fn release(&mut self) {
        if let Some(upper) = &mut self.upper {
            upper.fd = None;
        }
    }

    /// The same of a file that was not read.
    pub(in crate::watch) fn had_writer(&self) -> bool {
        self.had_writer
    }
}

/// Whether a file of the container's own layer that is read or mapped as code has a
/// writer now. Nothing keeps such a file from being written to.
pub(in crate::watch) fn has_writer(watched: &Watched, path: &RootfsPath, stat: &Stat) -> bool {
    let fd = upper(watched, path, stat);
    fd.is_some_and(|fd| lease::has_writer(fd.as_fd()).unwrap_or(false))
}

/// Opens a file of the container's own layer in that layer. `None` if it has another
/// name by now.
fn upper(watched: &Watched, path: &RootfsPath, stat: &Stat) -> Option<OwnedFd> {
    let upper = file::open_directory(&watched.layers()?.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    (found.is_regular() && is_same(&found, stat)).then_some(fd)
}

/// Listens to the directory of the upper layer that holds a file, which no walk may
/// have come to yet.
pub(in crate::watch) fn listen_near(
    shared: &Shared,
    watched: &Watched,
    path: &RootfsPath,
) -> Option<FileHandle> {
    let upper = file::open_directory(&watched.layers()?.dirs.upperdir).ok()?;
    let directory = file::open_directory_beneath(&upper, path.parent()?.relative()).ok()?;
    let handle = FileHandle::of(&directory).ok()?;
    shared.closings.listen_to(handle.clone(), &directory);
    Some(handle)
}

impl Upper {
    fn of(shared: &Shared, watched: &Watched, path: &RootfsPath, fd: OwnedFd) -> Option<Upper> {
        let directory = listen_near(shared, watched, path)?;
        let file = FileHandle::of(&fd).ok()?;
        Some(Upper { fd: Some(fd), file, directory })
    }
}

/// Whether both are one file of the upper layer. An overlay shows the number of the
/// image's inode for a copy of its file, and the times of the copy.
fn is_same(upper: &Stat, overlay: &Stat) -> bool {
    match (upper.born, overlay.born) {
        (Some(upper), Some(overlay)) => upper == overlay,
        _ => !has_changed(upper, overlay),
    }
}

/// Whether a file may hold something else than when it was looked at before.
pub(in crate::watch) fn has_changed(before: &Stat, now: &Stat) -> bool {
    (before.changed, before.modified, before.size) != (now.changed, now.modified, now.size)
}
