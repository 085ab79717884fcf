//! What each of driftd's processes sets for itself at its start: signals, limits, and
//! standard error.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Blocks the signals that stop driftd: when systemd or a terminal signals the whole group,
/// the daemon must end its gate and its guardian in order.
pub fn leave_stopping_to_the_daemon() -> io::Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    Ok(signals.thread_block()?)
}

/// Keeps SIGHUP pending until [`take_hangups`], because without a handler it would end the
/// process. Call this before any other thread is started.
pub fn hold_hangups() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_block()?)
}

/// Unblocks SIGHUP for this thread, once there is a handler.
pub fn take_hangups() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_unblock()?)
}

/// Raises the limit of open files as far as possible, and returns it.
pub fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // The soft limit only protects programs that use select(2).
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// The environment variable in which systemd names the journal's stream.
const JOURNAL_STREAM: &str = "JOURNAL_STREAM";

/// Whether systemd has connected standard error to the journal.
pub fn is_the_journal() -> bool {
    let Some(stream) = std::env::var_os(JOURNAL_STREAM) else { return false };
    rustix::fs::fstat(rustix::stdio::stderr())
        .is_ok_and(|stat| format!("{}:{}", stat.st_dev, stat.st_ino).as_str() == stream)
}

/// The variable for a child whose environment is otherwise empty, and whose standard error
/// is the same.
pub fn journal() -> Option<(&'static str, std::ffi::OsString)> {
    std::env::var_os(JOURNAL_STREAM).map(|stream| (JOURNAL_STREAM, stream))
}

/// The beginning of a line on standard error, so that the journal gives it this syslog
/// priority.
pub fn priority_prefix(priority: u8) -> String {
    if is_the_journal() { format!("<{priority}>") } else { String::new() }
}
