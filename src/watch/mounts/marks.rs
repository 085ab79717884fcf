//! Where the marks are placed by which executions are seen.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::gate::{Marks, Place};
use crate::sys::fanotify::Group;

/// Where the marks are placed by which executions are seen.
#[derive(Clone, Debug)]
pub(crate) enum ExecMarks {
    /// In the gate's process, which the kernel asks.
    Gate(Marks),
    /// In a group of this process, which the kernel notifies.
    Feed(Arc<Group>),
}

impl ExecMarks {
    /// Marks a container's own overlay.
    pub(crate) fn mark_root(&self, place: Place, root: BorrowedFd<'_>) -> io::Result<()> {
        match self {
            ExecMarks::Gate(marks) => marks.mark_root(place, root),
            ExecMarks::Feed(group) => group.mark_filesystem_of(root, libc::FAN_OPEN_EXEC),
        }
    }

    /// Marks what each descriptor points into: the whole filesystem where that is said,
    /// or what is reached through its mount. The descriptors are closed as early as can be.
    pub(crate) fn mark_others(&self, within: Vec<(OwnedFd, bool)>) -> Vec<io::Result<()>> {
        const MASK: u64 = libc::FAN_OPEN_EXEC;
        match self {
            ExecMarks::Gate(marks) => marks.mark_others(within),
            ExecMarks::Feed(group) => within
                .into_iter()
                .map(|(within, is_whole)| match is_whole {
                    true => group.mark_filesystem_of(within.as_fd(), MASK),
                    false => group.mark_mount_of(within.as_fd(), MASK),
                })
                .collect(),
        }
    }
}
