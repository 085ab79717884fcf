//! containerd's descriptors, turned into those of the OCI.
//!
//! `baseline` decodes the documents that they describe; its functions are re-exported here for
//! `images`.

pub(super) use crate::baseline::oci::{
    DOCUMENT_LIMIT, Descriptor, Document, brief, candidates, diff_ids, document, holds_no_image,
    host,
};

impl Descriptor {
    pub(super) fn of(target: containerd_client::types::Descriptor) -> Descriptor {
        Descriptor {
            media_type: target.media_type,
            digest: target.digest,
            size: target.size.try_into().unwrap_or(u64::MAX),
            platform: None,
            annotations: None,
        }
    }
}
