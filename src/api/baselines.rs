//! Baselines, as the API shows them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::{convert, proto};
use crate::baseline::{self, ImageRecord, Known, Progress, Proof};
use crate::containerd::Containerd;
use crate::model::{ChainId, printable};

/// Who can bring in and record an image that is asked for by name. A trait, so
/// that the API is tested without containerd.
pub trait RecordImage: Send + Sync {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        progress: Arc<Progress>,
    ) -> Pin<Box<dyn Future<Output = Result<ChainId, String>> + Send + 'a>>;

    /// Images that cannot be recorded, and why, in words.
    fn problems(&self) -> Vec<String>;
}

impl RecordImage for Containerd {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        progress: Arc<Progress>,
    ) -> Pin<Box<dyn Future<Output = Result<ChainId, String>> + Send + 'a>> {
        Box::pin(async move {
            Containerd::record_image(self, name, Proof::Later, progress)
                .await
                .map(|recorded| recorded.baseline.chain_id())
                .map_err(|err| err.to_string())
        })
    }

    fn problems(&self) -> Vec<String> {
        let problems = self.image_problems().into_iter().map(|problem| {
            format!(
                "image {} in {} has no baseline: {} ({})",
                printable(problem.name.as_bytes()),
                printable(problem.namespace.as_bytes()),
                printable(problem.reason.as_bytes()),
                printable(problem.digest.as_bytes()),
            )
        });
        problems.collect()
    }
}

/// All baselines, or the one that `image` names.
pub(super) fn list(
    store: &baseline::Store,
    image: &str,
) -> Result<Vec<proto::Baseline>, baseline::FindError> {
    let records = if image.is_empty() { store.images() } else { vec![store.find(image)?] };
    Ok(records.into_iter().map(|record| baseline_to_proto(store, record)).collect())
}

pub(super) fn baseline_to_proto(store: &baseline::Store, record: ImageRecord) -> proto::Baseline {
    let state = match store.image(record.chain_id) {
        Ok(Some(_)) => "ready".to_owned(),
        Ok(None) => "not recorded".to_owned(),
        Err(err) => err.to_string(),
    };
    proto::Baseline {
        chain_id: record.chain_id.to_string(),
        manifest_digest: record
            .manifest_digest
            .map(|digest| digest.to_string())
            .unwrap_or_default(),
        names: record.names.into_iter().map(|name| name.name).collect(),
        layers: record.layers.iter().map(ToString::to_string).collect(),
        recorded_at: Some(convert::time_to_proto(record.recorded_at)),
        files: record.totals.files,
        bytes: record.totals.bytes,
        state,
    }
}

pub(super) fn file_to_proto(known: Known) -> proto::BaselineFile {
    let Known { entry, layer } = known;
    proto::BaselineFile {
        path: entry.path.as_bytes().to_vec(),
        file_type: convert::file_type_name(entry.file_type).into(),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        size: entry.size,
        blake3: entry.blake3.map(|hash| hash.to_string()).unwrap_or_default(),
        format: entry.format.name().into(),
        capability: entry.capability.map(Vec::from).unwrap_or_default(),
        layer: layer.to_string(),
    }
}

pub(super) fn not_found(err: &baseline::FindError) -> tonic::Status {
    match err {
        baseline::FindError::Unknown { .. } => tonic::Status::not_found(err.to_string()),
        baseline::FindError::Ambiguous { .. } => tonic::Status::invalid_argument(err.to_string()),
    }
}
