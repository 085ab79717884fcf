//! What containerd reports to the other rooms: changes for the pipeline, and the few that are
//! urgent for the watchers.
//!
//! Plain values. `outbox` decides which of them are sent, and in which order.

use std::sync::Arc;

use jiff::Timestamp;

use crate::model::{Container, ContainerId, Exit, OverlayDirs};

/// One change on the node. containerd replays nothing: after every connection everything is
/// listed anew, and [`RuntimeEvent::Listed`] ends the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    Connected {
        endpoint: Arc<str>,
    },
    /// The stream ended, or the socket is not there. It is tried again.
    Disconnected {
        endpoint: Arc<str>,
        reason: String,
    },
    /// A task was created: its init exists and has not yet executed the container's entry
    /// point. Sent before any request to containerd, because only milliseconds are left.
    TaskCreated {
        container: ContainerId,
        pid: u32,
        /// From the event itself, if it names an overlay.
        rootfs: Option<OverlayDirs>,
    },
    /// A container's full record: new, or changed.
    Container(Box<Container>),
    /// The init process has ended.
    TaskExited {
        container: ContainerId,
    },
    /// A process that the runtime was asked to execute in a container exists. The container
    /// may be one that has not been announced yet.
    ExecStarted {
        container: ContainerId,
        exec_id: String,
        pid: u32,
    },
    /// Such a process has ended.
    ExecExited {
        container: ContainerId,
        exec_id: String,
        pid: u32,
        exit: Exit,
        at: Timestamp,
    },
    /// The container's record is gone.
    Removed {
        container: ContainerId,
    },
    /// Everything that this endpoint has was sent. A container that is not named is gone.
    Listed {
        endpoint: Arc<str>,
        containers: Vec<ContainerId>,
    },
}

/// A change that goes to the watchers at once, past the pipeline, where it would wait for the
/// disk. The pipeline receives it too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Urgent {
    TaskCreated { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    TaskExited { container: ContainerId, pid: u32 },
}

/// Takes urgent changes. Must never wait.
pub type Lane = Arc<dyn Fn(Urgent) + Send + Sync>;
