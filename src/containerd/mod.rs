//! What runs on this node, as containerd tells it (async).

pub mod describe;

use std::sync::Arc;

use crate::model::{Container, ContainerId, OverlayDirs};

/// One change on the node. containerd replays nothing, so after every
/// (re)connection everything is listed anew and [`Change::Listed`] ends the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Connected {
        endpoint: Arc<str>,
    },
    /// The stream ended or the socket is not there; it is being tried again.
    Disconnected {
        endpoint: Arc<str>,
        reason: String,
    },
    /// A task was created: its init exists and has not yet executed the
    /// container's entry point. Sent before anything else is asked of
    /// containerd, because only milliseconds are left.
    TaskCreated {
        container: ContainerId,
        pid: u32,
        /// From the event itself, when it names an overlay.
        rootfs: Option<OverlayDirs>,
    },
    /// A container's full record: new, or changed.
    Container(Box<Container>),
    /// The init process has ended.
    TaskExited {
        container: ContainerId,
    },
    /// The container's record is gone.
    Removed {
        container: ContainerId,
    },
    /// Everything this endpoint has was sent; what is not named is gone.
    Listed {
        endpoint: Arc<str>,
        containers: Vec<ContainerId>,
    },
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

#[derive(Debug, Clone)]
pub struct Containerd;

impl Containerd {
    pub async fn record_image(
        &self,
        name: &str,
        _progress: Arc<crate::baseline::Progress>,
    ) -> Result<crate::model::ChainId, Error> {
        Err(Error(format!("no image `{name}` is known to containerd")))
    }
}
