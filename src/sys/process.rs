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

/// Keeps SIGHUP waiting, from before any other thread is started, until
/// [`take_hangups`]: until somebody listens, it would end the process.
pub fn hold_hangups() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_block()?)
}

/// Lets this thread take SIGHUP, once there is a handler.
pub fn take_hangups() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_unblock()?)
}

/// Raises the limit of open files as far as it goes, and says what it is.
pub fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // The soft limit is for programs that use select(2).
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The environment variable in which systemd names the journal's stream.
const JOURNAL_STREAM: &str = "JOURNAL_STREAM";

/// Whether standard error is what systemd has connected to the journal.
pub fn is_the_journal() -> bool {
    let Some(stream) = std::env::var_os(JOURNAL_STREAM) else { return false };
    rustix::fs::fstat(rustix::stdio::stderr())
        .is_ok_and(|stat| format!("{}:{}", stat.st_dev, stat.st_ino).as_str() == stream)
}

/// The variable for a child whose environment is otherwise empty, and whose standard error
/// is ours.
pub fn journal() -> Option<(&'static str, std::ffi::OsString)> {
    std::env::var_os(JOURNAL_STREAM).map(|stream| (JOURNAL_STREAM, stream))
}

/// What a line on standard error begins with, so that the journal gives it this priority of
/// syslog's.
pub fn priority_prefix(priority: u8) -> String {
    if is_the_journal() { format!("<{priority}>") } else { String::new() }
}
