//! What the watchers are asked, and what they report: the only types that the rest of the
//! daemon knows of them, beside [`Watch`](crate::watch::Watch).

use std::io;
use std::path::PathBuf;

use jiff::Timestamp;

use super::trust::{Trust, Verdict};
use crate::health::Failure;
use crate::model::{ContainerId, LayerFile, Observation, OverlayDirs, RootfsPath};
use crate::sys::fanotify;

/// What the pipeline asks of the watchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SensorCommand {
    /// Mark the overlay of the container whose init is `pid`, then scan it.
    /// Asking again for the same container and pid only fills in `rootfs`.
    Attach { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    /// The init process has ended: scan the upperdir a last time, then forget
    /// the container. With a pid, only if that was its init: the container may run
    /// anew by the time that this is read.
    Detach { container: ContainerId, pid: Option<u32> },
    /// Walk the upperdir now. With a ticket, the batches and the end of this
    /// scan carry it.
    Scan { container: ContainerId, ticket: Option<u64> },
    /// Walk the upperdir of a container that does not run, for whoever has asked with this
    /// ticket. Nothing is marked, and nothing is reported but [`SensorEvent::Compared`].
    Compare {
        container: ContainerId,
        ticket: u64,
        rootfs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    },
    /// From now on, this is how far the files of the image's layers are trusted.
    /// What was judged before counts no more.
    Trust { container: ContainerId, trust: Trust },
    /// These files of the image start the container: what they hold matters, even
    /// where it is no program.
    EntryPoint { container: ContainerId, paths: Vec<RootfsPath> },
    /// Its init may have a terminal. This FIFO leads there, where that is known; with
    /// `is_handed_on`, its manager holds it open for whoever attaches.
    Terminal { container: ContainerId, input: Option<PathBuf>, is_handed_on: bool },
    /// How an executed file of the image's layers was judged.
    Judged { container: ContainerId, file: LayerFile, verdict: Verdict },
}

/// What the watchers tell the pipeline.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "nearly every report is an observation")]
pub enum SensorEvent {
    Attached {
        container: ContainerId,
        /// The init of the run that was meant: a report may come when another one has begun.
        pid: u32,
        /// The gate was in place before the entry point ran.
        before_start: bool,
    },
    /// The container began while driftd ran, and ran for a moment before its marks were in
    /// place. May come before or after [`SensorEvent::Attached`], and is right where they differ.
    Unarmed {
        container: ContainerId,
        pid: u32,
        began: Timestamp,
        marked: Timestamp,
    },
    /// The container cannot be watched, or not any more.
    NotAttached {
        container: ContainerId,
        pid: u32,
        reason: String,
    },
    Observed(Observation),
    /// Some of what a scan found; a scan reports every entry of the upperdir
    /// that is not a plain directory.
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
        /// Whether the whole upperdir was walked.
        complete: bool,
    },
    /// What a walk of a container that does not run has found. It answers a question and is
    /// not judged: nobody saw it happen.
    Compared {
        ticket: u64,
        observations: Vec<Observation>,
        /// The walk is over, and whether it was whole.
        end: Option<bool>,
    },
    /// What was said to be seen no more, and what no walk makes up for, is seen again.
    Over {
        failure: Failure,
        container: Option<ContainerId>,
    },
    /// Something was not seen. `container` is `None` when it may be any of them.
    /// The watchers have already asked themselves for the rescan.
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
    #[error("cannot prepare for being asked before a container's runtime runs: {0}")]
    Arming(#[source] io::Error),
    #[error("cannot make an event descriptor: {0}")]
    Wake(#[source] io::Error),
    #[error("cannot start the thread `{name}`: {source}")]
    Thread { name: &'static str, source: io::Error },
}
