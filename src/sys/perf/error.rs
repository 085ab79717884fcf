//! Why there are no rings.
//!
//! Each error names what is missing; the daemon then runs with the process connector.

use std::io;

/// Why there are no rings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this kernel has no perf events (CONFIG_PERF_EVENTS)")]
    Missing,
    #[error(
        "the kernel refuses perf events to this process (it needs CAP_PERFMON or \
         CAP_SYS_ADMIN, and a system call filter that lets perf_event_open pass)"
    )]
    NotPermitted,
    #[error("the tracepoint sched:sched_process_exec cannot be found in tracefs: {0}")]
    NoTracepoint(#[source] io::Error),
    #[error("cannot open the kernel's records: {0}")]
    Other(#[source] io::Error),
}

impl From<io::Error> for Error {
    fn from(err: io::Error) -> Error {
        match err.raw_os_error() {
            Some(libc::ENOSYS) => Error::Missing,
            Some(libc::EPERM | libc::EACCES) => Error::NotPermitted,
            _ => Error::Other(err),
        }
    }
}
