//! The messages to the thread `sessions`, which follows session activity.
//!
//! Every thread that sees a session or one of its processes sends them, with `shared`. This
//! file holds only their types.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use jiff::Timestamp;

use crate::model::ProcessIdentity;
use crate::watch::core::watched::Watched;

/// A message to the thread `sessions`.
#[derive(Debug)]
pub(crate) enum Activity {
    Event(Event),
    Ran(Ran),
    /// The watchers must stop.
    End,
    /// A container runtime was invoked on the host.
    Runtime {
        pid: u32,
    },
    /// A process of a container in which a session is open. Its handle was opened when it was
    /// about to execute a program.
    Alive {
        identity: ProcessIdentity,
        process: OwnedFd,
    },
}

/// An event of a session, other than an execution.
#[derive(Debug)]
pub(crate) enum Event {
    /// A session has opened, with a handle of its first process if one could be opened.
    Opened {
        watched: Arc<Watched>,
        root: ProcessIdentity,
        is_interactive: bool,
        process: Option<OwnedFd>,
    },
    /// Executions beyond those that are reported one by one.
    RanMore { watched: Arc<Watched>, root: ProcessIdentity, times: u64 },
    /// A process of a session has ended.
    Exited { watched: Arc<Watched>, root: ProcessIdentity, pid: u32, at: Timestamp },
}

/// An execution in a session.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) watched: Arc<Watched>,
    pub(crate) root: ProcessIdentity,
    pub(crate) pid: u32,
    pub(crate) at: Timestamp,
    /// As the kernel recorded it: for a script, its interpreter.
    pub(crate) exe: Option<Vec<u8>>,
    /// The time of the execve, by the clock of the kernel's records.
    pub(crate) time: u64,
    pub(crate) process: Option<OwnedFd>,
}
