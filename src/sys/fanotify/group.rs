//! Groups, and how each kind of group is made.
//!
//! `marks` adds marks to a group, and `read` reads its events. Which groups exist is for
//! `gate` and `watch` to decide.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags};

use super::error::Error;

// Linux 6.14, and not yet in libc.
const FAN_REPORT_MNT: u32 = 0x4000;

/// How many unread events the kernel keeps for a group. Each of them keeps its file in
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Unlimited,
    /// `fs.fanotify.max_queued_events`. More are dropped, and the group reports
    /// [`super::Incoming::Overflow`].
    Bounded,
}

/// A fanotify group.
pub struct Group {
    pub(super) fanotify: Fanotify,
    /// Whether events carry a pidfd (Linux 5.15, or 5.10.220).
    pub reports_pidfd: bool,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({})", self.fanotify.as_fd().as_raw_fd())
    }
}

impl Group {
    /// A group that the kernel asks before a program runs. The kernel allows a permission
    /// event in silence if the queue is full: so the queue has no limit, and the group must
    /// never have notification events too.
    pub fn gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, true)
    }

    /// The same without a handle of the process. The kernel makes a handle for every event,
    /// and most of them would not be used.
    pub fn exec_gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, false)
    }

    /// A group that is notified of what has happened.
    pub fn feed(queue: Queue) -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_NOTIF, queue, false)
    }

    /// A group that is notified of changes of names and metadata, by a directory's handle
    /// and the name in it (Linux 5.9). Its queue has no limit, so that one container's flood
    /// cannot displace another's events. If the kernel has no memory for an event, it
    /// reports an overflow.
    pub fn names() -> Result<Group, Error> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::from_bits_retain(libc::FAN_REPORT_DFID_NAME);
        let fanotify = Fanotify::init(flags, EventFFlags::O_CLOEXEC).map_err(Error::from_init)?;
        Ok(Group { fanotify, reports_pidfd: false })
    }

    /// A group that is notified of programs that were opened for execution. No process waits
    /// for it.
    pub fn exec_feed() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_NOTIF, Queue::Unlimited, false)
    }

    /// A group that the kernel asks before a file is opened, as overlayfs does when it copies
    /// a file up. Its queue has no limit either, for the same reason as the gate's.
    pub fn copy_up_gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, false)
    }

    /// A group that the kernel asks before a guarded file is read. Its events name the thread,
    /// because only the thread waits. Any kernel makes such a group; marks for reads need
    /// Linux 6.14.
    pub fn read_gate() -> Result<Group, Error> {
        let flags = InitFlags::FAN_CLASS_PRE_CONTENT
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::from_bits_retain(libc::FAN_REPORT_TID);
        let event_flags = EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NONBLOCK
            | EventFFlags::O_NOATIME;
        let fanotify = Fanotify::init(flags, event_flags).map_err(Error::from_init)?;
        Ok(Group { fanotify, reports_pidfd: false })
    }

    /// Tries sets of flags, the richest first: a kernel's version does not show which flags
    /// were backported to it.
    fn richest(class: InitFlags, queue: Queue, want_pidfd: bool) -> Result<Group, Error> {
        let queue = match queue {
            Queue::Unlimited => InitFlags::FAN_UNLIMITED_QUEUE,
            Queue::Bounded => InitFlags::empty(),
        };
        let flags = class
            | queue
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_MARKS;
        // O_NONBLOCK: the kernel opens the file during our read(2). Without the flag, a FIFO
        // would wait for a writer there.
        let plain = EventFFlags::from_bits_retain(0)
            | EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NONBLOCK;
        let mut refused = Errno::EINVAL;
        for reports_pidfd in [true, false] {
            if reports_pidfd && !want_pidfd {
                continue;
            }
            let pidfd =
                if reports_pidfd { InitFlags::FAN_REPORT_PIDFD } else { InitFlags::empty() };
            for event_flags in [plain | EventFFlags::O_NOATIME, plain] {
                match Fanotify::init(flags | pidfd, event_flags) {
                    Ok(fanotify) => return Ok(Group { fanotify, reports_pidfd }),
                    Err(Errno::EINVAL) => refused = Errno::EINVAL,
                    Err(errno) => return Err(Error::from_init(errno)),
                }
            }
        }
        Err(Error::from_init(refused))
    }

    /// A group that reports attached and detached mounts (Linux 6.14). Its queue can
    /// overflow: then any mount may have changed.
    pub(in crate::sys) fn mounts() -> Result<Group, Error> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::from_bits_retain(FAN_REPORT_MNT);
        let fanotify = Fanotify::init(flags, EventFFlags::O_CLOEXEC).map_err(Error::from_init)?;
        Ok(Group { fanotify, reports_pidfd: false })
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fanotify.as_fd()
    }
}
