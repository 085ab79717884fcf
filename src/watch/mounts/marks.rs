//! Places the marks that report executions: in the gate, or in a group of the daemon.
//!
//! Which of both depends on `watch.gate`. `marking` and `control` decide what is marked. This
//! file only passes it on, and keeps no descriptor longer than that takes.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::gate::{Enforced, Marks, Place};
use crate::sys::fanotify::Group;

/// The place of the marks that report executions.
#[derive(Clone, Debug)]
pub(crate) enum ExecMarks {
    /// In the process of the gate, which the kernel asks before an execution.
    Gate(Marks),
    /// In a group of this process, which the kernel notifies of executions.
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

    /// Has the executions of a container wait for decisions. No execution waits that the kernel
    /// only reports.
    pub(crate) fn enforce(&self, enforced: Enforced) -> io::Result<()> {
        match self {
            ExecMarks::Gate(marks) => marks.enforce(enforced),
            ExecMarks::Feed(_) => Ok(()),
        }
    }

    pub(crate) fn enforce_no_more(&self, device: u64) -> io::Result<()> {
        match self {
            ExecMarks::Gate(marks) => marks.enforce_no_more(device),
            ExecMarks::Feed(_) => Ok(()),
        }
    }

    /// Marks the whole filesystem of each descriptor where the flag is set, or else only its
    /// mount. The descriptors are closed as early as possible.
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
