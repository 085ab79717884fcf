//! What the thread of session activity receives. It comes from wherever sessions or
//! their processes are seen.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use jiff::Timestamp;

use crate::model::ProcessIdentity;
use crate::watch::core::watched::Watched;

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Act {
    Event(Event),
    Ran(Ran),
    /// The watchers are to stop.
    End,
    /// A container runtime was called on the host.
    Runtime {
        pid: u32,
    },
    /// A process of a container in which a session is open, with a handle of it that
    /// was opened when it was about to become a program.
    Alive {
        identity: ProcessIdentity,
        process: OwnedFd,
    },
}

/// What has happened in a session, but for what was run.
#[derive(Debug)]
pub(crate) enum Event {
    /// A session has opened; with a handle of its first process, if one was had.
    Opened {
        watched: Arc<Watched>,
        root: ProcessIdentity,
        is_interactive: bool,
        process: Option<OwnedFd>,
    },
    /// Beyond those that are told one by one.
    RanMore { watched: Arc<Watched>, root: ProcessIdentity, times: u64 },
    /// A process of a session has ended.
    Exited { watched: Arc<Watched>, root: ProcessIdentity, pid: u32, at: Timestamp },
}

/// A program that was run in a session.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) watched: Arc<Watched>,
    pub(crate) root: ProcessIdentity,
    pub(crate) pid: u32,
    pub(crate) at: Timestamp,
    /// As the kernel recorded it: of a script, its interpreter.
    pub(crate) exe: Option<Vec<u8>>,
    /// The same execve, by the records' clock.
    pub(crate) time: u64,
    pub(crate) process: Option<OwnedFd>,
}
