//! Facts, as they happen: the gate, the change feed, scans.

use crate::health::Failure;
use crate::model::{ContainerId, Observation, OverlayDirs};

/// What the pipeline asks of the watchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Mark the overlay of the container whose init is `pid`, then scan it.
    /// Asking again for the same container and pid only fills in `rootfs`.
    Attach { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    /// The init process has ended: scan the upperdir a last time, then forget
    /// the container.
    Detach { container: ContainerId },
    /// Walk the upperdir now. With a ticket, the batches and the end of this
    /// scan carry it.
    Scan { container: ContainerId, ticket: Option<u64> },
}

/// What the watchers tell the pipeline.
#[derive(Debug, Clone)]
pub enum Report {
    Attached {
        container: ContainerId,
        /// The gate was in place before the entry point ran.
        before_start: bool,
    },
    /// The container cannot be watched, or not any more.
    NotAttached {
        container: ContainerId,
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
        /// Whether the whole upperdir was walked.
        complete: bool,
    },
    /// Something was not seen. `container` is `None` when it may be any of them.
    /// The watchers have already asked themselves for the rescan.
    Lost {
        failure: Failure,
        container: Option<ContainerId>,
        detail: String,
    },
}
