//! Files of the container's own layer where the host keeps it, and their writers.

use std::os::fd::{AsFd as _, OwnedFd};

use super::shared::Files;
use crate::model::RootfsPath;
use crate::sys::file::{self, Stat};
use crate::sys::handle::FileHandle;
use crate::sys::lease;
use crate::watch::core::watched::Watched;

/// Whether a file of the container's own layer that is read or mapped as code has a
/// writer now. Nothing keeps such a file from being written to.
pub(crate) fn has_writer(watched: &Watched, path: &RootfsPath, stat: &Stat) -> bool {
    let fd = upper(watched, path, stat);
    fd.is_some_and(|fd| lease::has_writer(fd.as_fd()).unwrap_or(false))
}

/// Opens a file of the container's own layer in that layer. `None` if it has another
/// name by now.
pub(crate) fn upper(watched: &Watched, path: &RootfsPath, stat: &Stat) -> Option<OwnedFd> {
    let upper = file::open_directory(&watched.layers()?.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    (found.is_regular() && is_same(&found, stat)).then_some(fd)
}

/// Listens to the directory of the upper layer that holds a file, which no walk may
/// have come to yet.
pub(crate) fn listen_near(
    shared: &Files,
    watched: &Watched,
    path: &RootfsPath,
) -> Option<FileHandle> {
    let upper = file::open_directory(&watched.layers()?.dirs.upperdir).ok()?;
    let directory = file::open_directory_beneath(&upper, path.parent()?.relative()).ok()?;
    let handle = FileHandle::of(&directory).ok()?;
    shared.closings.listen_to(handle.clone(), &directory);
    Some(handle)
}

/// Whether both are one file of the upper layer. An overlay shows the number of the
/// image's inode for a copy of its file, and the times of the copy.
pub(crate) fn is_same(upper: &Stat, overlay: &Stat) -> bool {
    match (upper.born, overlay.born) {
        (Some(upper), Some(overlay)) => upper == overlay,
        _ => !has_changed(upper, overlay),
    }
}

/// Whether a file may hold something else than when it was looked at before.
pub(crate) fn has_changed(before: &Stat, now: &Stat) -> bool {
    (before.changed, before.modified, before.size) != (now.changed, now.modified, now.size)
}
