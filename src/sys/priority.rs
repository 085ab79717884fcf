//! The priority of a thread in the kernel's schedulers of processors and of disks.
//!
//! `baseline` uses it for work that may wait, and `threads` for the number of a thread.

use std::io;

/// A thread of this process. If it has ended, its priority cannot be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(rustix::thread::Pid);

impl Thread {
    /// The kernel's number of it.
    pub fn number(self) -> u32 {
        self.0.as_raw_nonzero().get().unsigned_abs()
    }
}

/// The calling thread.
pub fn current() -> Thread {
    Thread(rustix::thread::gettid())
}

/// The classes of the disk scheduler that driftd uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Best effort, at the default level.
    Usual,
    /// Only when no other process uses the disk.
    Idle,
}

// <linux/ioprio.h>; libc does not have them.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
const IOPRIO_CLASS_SHIFT: libc::c_int = 13;
const IOPRIO_CLASS_BE: libc::c_int = 2;
const IOPRIO_CLASS_IDLE: libc::c_int = 3;
const IOPRIO_USUAL: libc::c_int = 4;

/// Sets both priorities of one thread. A lower `nice` than it has needs
/// CAP_SYS_NICE or RLIMIT_NICE.
pub fn set(thread: Thread, nice: i32, disk: Disk) -> io::Result<()> {
    let (class, level) = match disk {
        Disk::Usual => (IOPRIO_CLASS_BE, IOPRIO_USUAL),
        Disk::Idle => (IOPRIO_CLASS_IDLE, 0),
    };
    let pid = thread.0.as_raw_nonzero().get();
    // SAFETY: the call takes three numbers and touches no memory of this process.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            IOPRIO_WHO_PROCESS,
            pid,
            class << IOPRIO_CLASS_SHIFT | level,
        )
    };
    let disk = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // On Linux this sets the priority of one thread.
    let processor = rustix::process::setpriority_process(Some(thread.0), nice);
    disk.and(processor.map_err(io::Error::from))
}
