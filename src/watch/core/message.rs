//! The commands to the watchers, their reports, and the errors of their start.
//!
//! Beside [`Watch`](crate::watch::Watch), these are the only types of the watchers that the
//! rest of the daemon knows. The pipeline sends the commands and receives the reports.

use std::io;
use std::path::PathBuf;

use jiff::Timestamp;

use super::trust::{Trust, Verdict};
use crate::gate::Undecided;
use crate::health::Failure;
use crate::model::{ContainerId, LayerFile, Observation, OverlayDirs, RootfsPath};
use crate::sys::fanotify;

/// A command of the pipeline to the watchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SensorCommand {
    /// Mark the overlay of the container whose init is `pid`, then scan it. A second command
    /// for the same container and pid only fills in `rootfs`.
    Attach { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    /// The init process has ended: scan the upperdir a last time, then forget the container.
    /// With a pid, only if that was its init: when this is read, the container may run again.
    Detach { container: ContainerId, pid: Option<u32> },
    /// Scan the upperdir now. The batches and the end of this scan carry the ticket.
    Scan { container: ContainerId, ticket: Option<u64> },
    /// Scan the upperdir of a container that does not run, for the request with this ticket.
    /// Nothing is marked, and only [`SensorEvent::Compared`] is reported.
    Compare {
        container: ContainerId,
        ticket: u64,
        rootfs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    },
    /// From now on, the files of the image's layers are trusted this far. Earlier judgements
    /// are void.
    Trust { container: ContainerId, trust: Trust },
    /// These files of the image start the container: their content matters, even if it is not
    /// a program.
    EntryPoint { container: ContainerId, paths: Vec<RootfsPath> },
    /// The container's init may have a terminal. `input` is the FIFO that leads to it, if
    /// known. With `is_handed_on`, the container's manager keeps the FIFO open for clients
    /// that attach.
    Terminal { container: ContainerId, input: Option<PathBuf>, is_handed_on: bool },
    /// From now on, executions of this container wait for a decision, and each has this answer
    /// if none comes. `None`: they wait no more.
    Enforce { container: ContainerId, undecided: Option<Undecided> },
    /// How an executed file of the image's layers was judged.
    Judged { container: ContainerId, file: LayerFile, verdict: Verdict },
}

/// An execution that waits for a decision of the pipeline.
#[derive(Debug, Clone)]
pub struct Question {
    pub number: u64,
    /// What it would be.
    pub observation: Observation,
}

/// A report of the watchers to the pipeline.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "nearly every report is an observation")]
pub enum SensorEvent {
    Attached {
        container: ContainerId,
        /// The init of the run that is meant: when the report is read, a later run may have
        /// begun.
        pid: u32,
        /// The gate was in place before the entry point ran.
        before_start: bool,
    },
    /// The container began while driftd ran, and ran for a moment before its marks were in
    /// place. May come before or after [`SensorEvent::Attached`]. If the two differ, this one
    /// is right.
    Unarmed {
        container: ContainerId,
        pid: u32,
        began: Timestamp,
        marked: Timestamp,
    },
    /// The container cannot be watched, or no longer.
    NotAttached {
        container: ContainerId,
        pid: u32,
        reason: String,
    },
    Observed(Observation),
    /// A part of a scan's results. A scan reports every entry of the upperdir that is not a
    /// plain directory.
    ScanBatch {
        container: ContainerId,
        ticket: Option<u64>,
        observations: Vec<Observation>,
    },
    /// The scan is over.
    Scanned {
        container: ContainerId,
        ticket: Option<u64>,
        began: Timestamp,
        /// Whether the whole upperdir was scanned.
        complete: bool,
    },
    /// The results of a scan of a container that does not run. They answer a request and are
    /// not judged: driftd did not see when they happened.
    Compared {
        ticket: u64,
        observations: Vec<Observation>,
        /// Set when the scan is over: whether it was complete.
        end: Option<bool>,
    },
    /// A process has run a program of the same name after a denial.
    RanInstead {
        container: ContainerId,
        denied: RootfsPath,
        /// As execve received it.
        instead: String,
    },
    /// A lasting loss, which no scan makes up for, is over.
    Over {
        failure: Failure,
        container: Option<ContainerId>,
    },
    /// Something was not seen. `container` is `None` if it may be any container. The watchers
    /// have already requested the rescan.
    Lost {
        failure: Failure,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
    },
}

/// Why the watchers cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Fanotify(#[from] fanotify::Error),
    #[error("cannot prepare to hold container runtimes: {0}")]
    Arming(#[source] io::Error),
    #[error("cannot make an event descriptor: {0}")]
    Wake(#[source] io::Error),
    #[error("cannot start the thread `{name}`: {source}")]
    Thread { name: &'static str, source: io::Error },
}
