//! Files of a container's upper layer, opened on the host's side of the overlay, and whether
//! they have writers.
//!
//! `exec` and `code` use it for files that are executed or mapped. The overlay hides writers
//! and inodes of the upper layer; here they are visible. It does not judge what it finds.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use super::shared::Files;
use crate::model::RootfsPath;
use crate::sys::file::{self, Stat};
use crate::sys::handle::FileHandle;
use crate::sys::lease;
use crate::watch::core::watched::Watched;

/// Whether a file of the upper layer that is read or mapped as code has a writer now. The kernel
/// does not prevent writes to such a file.
pub(crate) fn has_writer(watched: &Watched, path: &RootfsPath, stat: &Stat) -> bool {
    let fd = upper(watched, path, stat);
    fd.is_some_and(|fd| lease::has_writer(fd.as_fd()).unwrap_or(false))
}

/// Opens a file of the upper layer on the host's side. `None` if it has another name by now.
pub(crate) fn upper(watched: &Watched, path: &RootfsPath, stat: &Stat) -> Option<OwnedFd> {
    let upper = file::open_directory(&watched.layers()?.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    (found.is_regular() && is_same(&found, stat)).then_some(fd)
}

/// Listens to the upper layer's directory of a file, because a walk may not have reached it yet.
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

/// Listens for writers of a program of the image that was copied up, before it is executed there:
/// it may get other names meanwhile (`busybox --install`), and be written to by way of a
/// directory that is not marked.
pub(crate) fn listen_to_file(shared: &Files, watched: &Arc<Watched>, file: &OwnedFd) {
    let is_running =
        shared.table.get(&watched.container).is_some_and(|it| Arc::ptr_eq(&it, watched));
    if is_running && let Ok(handle) = FileHandle::of(file) {
        shared.closings.listen_to_file(&watched.container, handle, file);
    }
}

/// Whether both are the same file of the upper layer. For a copy of an image's file, an overlay
/// shows the inode number of the image's file and the times of the copy.
pub(crate) fn is_same(upper: &Stat, overlay: &Stat) -> bool {
    match (upper.born, overlay.born) {
        (Some(upper), Some(overlay)) => upper == overlay,
        _ => !has_changed(upper, overlay),
    }
}

/// Whether both are the same file of the upper layer, where nothing else shows it, such as its
/// path. Files that were made within a tick of the clock have the same time of birth.
pub(crate) fn is_this(upper: &Stat, overlay: &Stat) -> bool {
    let is_same_inode = upper.inode == overlay.inode;
    is_same(upper, overlay) && (is_same_inode || !has_changed(upper, overlay))
}

/// Whether a file's content may have changed between two examinations.
pub(crate) fn has_changed(before: &Stat, now: &Stat) -> bool {
    (before.changed, before.modified, before.size) != (now.changed, now.modified, now.size)
}
