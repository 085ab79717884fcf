//! Why a request to containerd could not be carried out, with texts for administrators.
//!
//! `respond` and `api` receive these errors.

use crate::model::ContainerId;

/// Why a request to containerd could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no containerd knows the container {0} (see: driftd containers)")]
    UnknownContainer(ContainerId),
    /// The run that was meant is over. Nothing was done.
    #[error("gone: {0}")]
    Gone(String),
    #[error("{0}")]
    Failed(String),
    #[error("containerd at {socket} is not connected")]
    NotConnected { socket: String },
    #[error("containerd at {socket} refused: {reason}")]
    Refused { socket: String, reason: String },
    #[error("containerd has no image `{name}` (see: ctr -n NAMESPACE images ls)")]
    UnknownImage { name: String },
    #[error(
        "`{name}` is no container image: it holds something else, such as a signature, an \
         attestation, a chart or a checkpoint, and no container runs it (nothing to record)"
    )]
    NoImage { name: String },
    #[error(
        "the image `{name}` cannot be read: {reason} (pull it again, or start a container of it)"
    )]
    NotUnpacked { name: String, reason: String },
    #[error("the image `{name}` cannot be recorded: {reason} ({digest})")]
    Unresolvable { name: String, digest: String, reason: String },
}
