//! What one of driftd's processes sets for itself as it starts.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Leaves stopping to the daemon: a signal to the whole group (systemd, a terminal) must
/// not end its gate or its guardian first.
pub fn leave_stopping_to_the_daemon() -> io::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    Ok(signals.thread_block()?)
}

/// Raises the limit of open files as far as it goes, and says what it is.
pub fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // The soft limit is for programs that use select(2).
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
