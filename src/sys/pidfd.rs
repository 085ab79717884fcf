//! Handles of processes: pidfd_open(2), and what the kernel returns for them.
//!
//! A handle means one process for good, whatever its pid means later. A pid is only needed
//! to open one.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags};

use crate::model::Exit;

/// A handle of a process, by its pid alone: a hint, because the pid can be another process's
/// by now.
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::NotFound)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether [`open`] failed because there is no such process.
pub fn is_gone(err: &io::Error) -> bool {
    err.kind() == io::ErrorKind::NotFound
        || matches!(err.raw_os_error(), Some(libc::ESRCH | libc::EINVAL | libc::ENOENT))
}

/// Ends the process, and no other one, whatever its pid means by now.
pub fn kill(process: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL)?)
}

/// Whether the process has ended.
pub fn has_ended(process: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}

/// Waits until the process has ended.
pub fn wait(process: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(process, PollFlags::IN)];
    // The only possible error is a signal.
    while !matches!(rustix::event::poll(&mut fds, None), Ok(1..)) {}
}

/// `struct pidfd_info` in its first version (Linux 6.13), which has all that is read here.
/// Newer kernels accept this shorter one.
#[repr(C)]
#[derive(Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    pid: u32,
    thread_group: u32,
    parent: u32,
    users: [u32; 8],
    exit_code: i32,
}

/// `PIDFD_INFO_EXIT` (Linux 6.15): how it ended, even if its parent has waited for it.
const INFO_EXIT: u64 = 1 << 3;
/// `_IOWR(0xFF, 11, struct pidfd_info)`
const GET_INFO: libc::c_ulong = 0xc000_ff0b | (size_of::<Info>() << 16) as libc::c_ulong;

/// How a process ended. `None` while it runs, and before Linux 6.15.
pub fn exit(process: BorrowedFd<'_>) -> Option<Exit> {
    let mut info = Info { mask: INFO_EXIT, ..Info::default() };
    // SAFETY: `info` lives during the call and has the length that `GET_INFO` contains.
    let done = unsafe { libc::ioctl(process.as_fd().as_raw_fd(), GET_INFO, &raw mut info) };
    (done == 0 && info.mask & INFO_EXIT != 0).then(|| Exit::from_wait_status(info.exit_code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_a_process_ended_is_known_after_its_parent_has_waited() {
        let end_of = |command: &str| {
            let mut child = std::process::Command::new("sh").args(["-c", command]).spawn().unwrap();
            let handle = open(child.id()).unwrap();
            child.wait().unwrap();
            exit(handle.as_fd())
        };
        let code = end_of("exit 3");
        let signal = end_of("kill -9 $$");
        if code.is_none() {
            // Before Linux 6.15 nothing is known.
            assert_eq!(signal, None);
            return;
        }
        assert_eq!(code, Some(Exit { code: Some(3), signal: None }));
        assert_eq!(signal, Some(Exit { code: None, signal: Some(9) }));
    }

    #[test]
    fn a_kill_reaches_the_process_that_was_opened_and_no_later_one() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let handle = open(child.id()).unwrap();
        assert!(!has_ended(handle.as_fd()));
        kill(handle.as_fd()).unwrap();
        child.wait().unwrap();
        assert!(has_ended(handle.as_fd()));
        assert!(is_gone(&kill(handle.as_fd()).unwrap_err()));
        assert!(is_gone(&open(child.id()).unwrap_err()) && is_gone(&open(0).unwrap_err()));
    }

    #[test]
    fn a_running_process_has_no_exit() {
        let me = open(std::process::id()).unwrap();
        assert_eq!(exit(me.as_fd()), None);
        assert!(open(0).is_err() && open(u32::MAX).is_err());
    }
}
