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
//! Two observations together leave no room, if the first comes in time:
//!
//! - Nobody has the upper file open or mapped for writing ([`has_writer`]).
//! - Its times, asked again after the content was read, are what they were when the
//!   gate was asked ([`has_changed`]). A new writer has to store to a page that it has
//!   not mapped yet, which moves them. (Since Linux 6.13 each change after a look has a
//!   time of its own; before, two changes within a tick of the clock can share one.)

use std::os::fd::AsFd as _;

use super::table::Watched;
use crate::model::RootfsPath;
use crate::sys::file::{self, Stat};
use crate::sys::lease;

/// Whether somebody can write to a file of the container's own layer. `None` if there
/// is no telling: it has another name by now, or its filesystem does not say.
pub(super) fn has_writer(watched: &Watched, path: &RootfsPath, stat: &Stat) -> Option<bool> {
    let layers = watched.layers()?;
    let upper = file::open_directory(&layers.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    if !found.is_regular() || !is_same(&found, stat) {
        return None;
    }
    lease::has_writer(fd.as_fd()).ok()
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
pub(super) fn has_changed(before: &Stat, now: &Stat) -> bool {
    (before.changed, before.modified, before.size) != (now.changed, now.modified, now.size)
}
