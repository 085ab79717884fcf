//! A second, tiny process that ends a stuck daemon.
//!
//! While driftd is stopped, every exec in every watched container waits for its
//! answer; once driftd is dead, the kernel allows them all at once. So a driftd
//! that makes no progress is worse than none. The guardian holds the reading end
//! of a pipe into which the gate's own thread writes a byte every quarter of a
//! second. When the bytes stay away it kills the daemon; when the pipe closes,
//! the daemon has ended by itself and so does the guardian.
//!
//! It counts its own turns, not seconds: a machine that was suspended, or a
//! guardian that was stopped itself, has not seen the daemon fail.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal};

/// How long the guardian waits for a byte in one turn.
const TURN: Duration = Duration::from_millis(250);
/// How many turns without a byte it allows: three seconds.
const PATIENCE: u32 = 12;

/// Starts the guardian of this process. The descriptor is the writing end of its
/// pipe, non-blocking; from the first byte on, the guardian counts.
pub fn start() -> io::Result<(Child, OwnedFd)> {
    let (reader, writer) = io::pipe()?;
    let writer = OwnedFd::from(writer);
    rustix::io::ioctl_fionbio(&writer, true)?;
    // By this link, not by argv[0]: after an upgrade it is still this very program.
    let child = Command::new("/proc/self/exe")
        .arg("guardian")
        .arg(std::process::id().to_string())
        .stdin(Stdio::from(OwnedFd::from(reader)))
        .stdout(Stdio::null())
        .spawn()?;
    Ok((child, writer))
}

/// Why the guardian ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The pipe was closed: the daemon is gone, or is stopping in good order.
    DaemonGone,
    /// The daemon made no progress and was killed.
    Killed,
}

/// The guardian itself: watches over `daemon`, which must be the parent.
pub fn watch_over(daemon: u32) -> io::Result<Ended> {
    // Stopping is the daemon's to decide; a signal to the whole group (systemd, a
    // terminal) must not take its guardian away first.
    let mut ignored = nix::sys::signal::SigSet::empty();
    for signal in [
        nix::sys::signal::Signal::SIGTERM,
        nix::sys::signal::Signal::SIGINT,
        nix::sys::signal::Signal::SIGHUP,
    ] {
        ignored.add(signal);
    }
    ignored.thread_block()?;
    let wrong = || io::Error::new(io::ErrorKind::InvalidInput, "the daemon is not my parent");
    let daemon = i32::try_from(daemon).ok().and_then(Pid::from_raw).ok_or_else(wrong)?;
    let pidfd = pidfd_open(daemon, PidfdFlags::empty())?;
    // Only now is it certain that the pid was not another process's by then.
    if getppid() != Some(daemon) {
        return Ok(Ended::DaemonGone);
    }
    // Unbuffered: what is read ahead would be hidden from `poll`.
    let stdin = rustix::stdio::stdin();
    let turn = Timespec::try_from(TURN).expect("a quarter of a second fits");
    let mut armed = false;
    let mut silent_turns = 0;
    loop {
        let mut fds = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut fds, Some(&turn)) {
            Ok(0) => silent_turns += u32::from(armed),
            Ok(_) => {
                let mut bytes = [0; 64];
                if rustix::io::read(stdin, &mut bytes)? == 0 {
                    return Ok(Ended::DaemonGone);
                }
                armed = true;
                silent_turns = 0;
            }
            Err(rustix::io::Errno::INTR) => (),
            Err(err) => return Err(err.into()),
        }
        if silent_turns >= PATIENCE {
            // Kill first: standard error may be what is stuck.
            pidfd_send_signal(&pidfd, Signal::KILL)?;
            eprintln!(
                "driftd guardian: the gate made no progress for {} s; killed driftd (pid {}), \
                 so that the kernel lets waiting programs run",
                (TURN * PATIENCE).as_secs(),
                daemon.as_raw_nonzero(),
            );
            return Ok(Ended::Killed);
        }
    }
}
