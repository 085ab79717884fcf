//! What this kernel's fanotify offers to this process, and how many groups are left.
//!
//! Found by trying: `doctor` and the start of the daemon use it.

use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use super::error::Error;
use super::group::{Group, Queue};

/// How many groups this user can still make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupsLeft {
    pub count: u64,
    /// There are more, which were not counted.
    pub is_more: bool,
}

/// Counts the groups that this user can still make, up to `at_most`. The kernel does not
/// show the number, so this function makes the groups and closes them at once: for that
/// moment no other process of the user can make one.
pub fn groups_left(at_most: u64) -> Result<GroupsLeft, Error> {
    let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC;
    let mut made = Vec::new();
    for count in 0..at_most {
        match Fanotify::init(flags, EventFFlags::O_CLOEXEC) {
            Ok(group) => made.push(group),
            Err(Errno::EMFILE) => {
                // The limit of open files has the same error.
                let is_more = std::fs::File::open("/proc/self/stat").is_err();
                return Ok(GroupsLeft { count, is_more });
            }
            Err(errno) => return Err(Error::from_init(errno)),
        }
    }
    Ok(GroupsLeft { count: at_most, is_more: true })
}

/// What this kernel's fanotify offers to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Events of the gate name the process by a handle, not only by its pid.
    pub pidfd: bool,
    /// Renames, removals and changes of metadata are reported when they happen. Without this
    /// only scans find them.
    pub names: bool,
}

/// Whether the kernel asks before a file is read, on the filesystem of an open directory. No
/// file is marked: the question is about the directory itself, which is not read as a file.
pub fn asks_before_reads(directory: BorrowedFd<'_>) -> Result<bool, Error> {
    let group = Group::read_gate()?;
    match group.guard(directory) {
        Ok(()) => Ok(true),
        // EINVAL: the kernel is older. EOPNOTSUPP: the filesystem does not take part.
        Err(err) => match err.raw_os_error() {
            Some(libc::EINVAL | libc::EOPNOTSUPP) => Ok(false),
            _ => Err(Error::Other(err)),
        },
    }
}

/// Tries what the watchers need. The error names what is missing.
pub fn probe() -> Result<Capabilities, Error> {
    let gate = Group::gate()?;
    // A directory is never opened for execution, so this mark has no events.
    match gate.fanotify.mark(
        MarkFlags::FAN_MARK_ADD,
        MaskFlags::FAN_OPEN_EXEC_PERM,
        nix::fcntl::AT_FDCWD,
        Some(Path::new("/")),
    ) {
        Ok(()) => (),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Err(Error::NoPermissionEvents),
        Err(errno) => return Err(Error::Other(errno.into())),
    }
    Group::feed(Queue::Unlimited)?;
    Ok(Capabilities { pidfd: gate.reports_pidfd, names: Group::names().is_ok() })
}
