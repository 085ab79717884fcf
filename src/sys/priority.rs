//! How urgent a thread's work is, to the kernel's schedulers of processors and
//! of disks.

use std::io;

/// A thread of this process, or of one that ended: then nothing happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(rustix::thread::Pid);

impl Thread {
    /// As the kernel numbers it.
    pub fn number(self) -> u32 {
        self.0.as_raw_nonzero().get().unsigned_abs()
    }
}

/// The calling thread.
pub fn current() -> Thread {
    Thread(rustix::thread::gettid())
}

/// The classes of disk schedulers that a thread of ours may be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// Best effort at the level that threads have which never chose one.
    Usual,
    /// Only when nobody else wants the disk.
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
    // SAFETY: three numbers; the kernel reads and writes no memory of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            IOPRIO_WHO_PROCESS,
            pid,
            class << IOPRIO_CLASS_SHIFT | level,
        )
    };
    let disk = if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // On Linux the priority of a "process" is that of the one thread.
    let processor = rustix::process::setpriority_process(Some(thread.0), nice);
    disk.and(processor.map_err(io::Error::from))
}
