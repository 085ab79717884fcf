//! Why an image could not be resolved or recorded.
//!
//! Kept apart by kind, because `names` decides by the kind when an image is tried again.

use tonic::Status;

use crate::containerd::connection::{interrupted, words};
use crate::model::ChainId;

#[derive(Debug)]
pub(crate) enum ImageError {
    /// The connection failed; nothing was learnt.
    Interrupted(Status),
    /// No image has this name (any more).
    Unknown,
    /// The name stands for something else: a chart, a signature, a checkpoint.
    NoImage,
    /// The layers are not unpacked. With a reason, their archives cannot be read either;
    /// without one, the archives are not to be read yet.
    NotUnpacked { chain_id: ChainId, reason: Option<String> },
    /// Something about the blob `digest` is wrong.
    Bad { digest: String, reason: String },
    /// The recorder gave up. It has counted and logged that itself.
    NotRecorded { chain_id: ChainId, reason: String },
}

impl ImageError {
    /// What a failed call for the blob `digest` means.
    pub(super) fn of_call(status: Status, digest: &str) -> ImageError {
        if interrupted(&status) {
            ImageError::Interrupted(status)
        } else {
            ImageError::Bad { digest: digest.into(), reason: words(&status) }
        }
    }
}
