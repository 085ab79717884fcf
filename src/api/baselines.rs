//! Baselines, as the API shows them.
//!
//! Reads the store and converts what it holds to the messages of the proto. The command line
//! uses this too, when it reads a directory of baselines without a daemon.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use super::{convert, proto};
use crate::baseline::{
    self, FileEntry, FindError, ImageBaseline, ImageDifference, ImageRecord, KnownBaseline,
    KnownBy, LayerDifference, LayerEntry, LayerReport, Progress, Proof, Recorded, Witness,
};
use crate::containerd::Containerd;
use crate::model::printable;

/// Finds an image by its name and records it. A trait, so that the API is tested without
/// containerd.
pub trait RecordImage: Send + Sync {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> Pin<Box<dyn Future<Output = Result<Recorded, String>> + Send + 'a>>;

    /// Sentences that name the images which cannot be recorded, with the reason.
    fn problems(&self) -> Vec<String>;
}

impl RecordImage for Containerd {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> Pin<Box<dyn Future<Output = Result<Recorded, String>> + Send + 'a>> {
        Box::pin(async move {
            let recording = Containerd::record_image(self, name, proof, progress);
            recording.await.map_err(|err| err.to_string())
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

/// Why the files of an image cannot be listed.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error(transparent)]
    NotFound(#[from] FindError),
    #[error("the baseline of {0} is not whole; it is recorded again when the image is next used")]
    NotWhole(String),
    #[error(transparent)]
    Store(#[from] baseline::store::Error),
}

impl From<Unusable> for tonic::Status {
    fn from(err: Unusable) -> tonic::Status {
        match &err {
            Unusable::NotFound(FindError::Unknown { .. }) => {
                tonic::Status::not_found(err.to_string())
            }
            Unusable::NotFound(FindError::Ambiguous { .. }) => {
                tonic::Status::invalid_argument(err.to_string())
            }
            Unusable::NotWhole(_) => tonic::Status::failed_precondition(err.to_string()),
            Unusable::Store(_) => tonic::Status::internal(err.to_string()),
        }
    }
}

/// All baselines, or the one that `image` names.
pub fn list(store: &baseline::Store, image: &str) -> Result<Vec<proto::Baseline>, FindError> {
    let records = if image.is_empty() { store.images() } else { vec![store.find(image)?] };
    Ok(records.into_iter().map(|record| baseline_to_proto(store, record)).collect())
}

/// The image that `image` names, with all its files.
pub fn open(store: &baseline::Store, image: &str) -> Result<Arc<ImageBaseline>, Unusable> {
    let record = store.find(image)?;
    let baseline = store.image(record.chain_id)?;
    baseline.ok_or_else(|| Unusable::NotWhole(record.chain_id.to_string()))
}

pub fn baseline_to_proto(store: &baseline::Store, record: ImageRecord) -> proto::Baseline {
    let state = match store.image(record.chain_id) {
        Ok(Some(_)) => "ready".to_owned(),
        Ok(None) => "not recorded".to_owned(),
        Err(err) => err.to_string(),
    };
    let (known_by, layers) = store.known_by(record.chain_id);
    let verified_at = |id| store.proof(id).and_then(|proof| proof.verified_at);
    let last_verified = match known_by {
        KnownBy::Verified => layers.iter().filter_map(|(id, _, _)| verified_at(*id)).max(),
        KnownBy::Snapshot => None,
    };
    let proofs: Vec<proto::LayerProof> = layers
        .into_iter()
        .map(|(id, known_by, reason)| proto::LayerProof {
            known_by: known_by_name(known_by).into(),
            reason: reason.unwrap_or_default(),
            verified_at: verified_at(id).map(convert::time_to_proto),
        })
        .collect();
    let is_ready = state == "ready";
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
        known_by: if is_ready { known_by_name(known_by).into() } else { String::new() },
        proofs,
        verified_at: last_verified.map(convert::time_to_proto),
    }
}

pub fn known_by_name(known_by: KnownBy) -> &'static str {
    match known_by {
        KnownBy::Snapshot => "snapshot",
        KnownBy::Verified => "verified",
    }
}

pub fn file_to_proto(known: KnownBaseline) -> proto::BaselineFile {
    let KnownBaseline { entry, layer } = known;
    proto::BaselineFile { layer: layer.to_string(), ..entry_to_proto(entry) }
}

fn entry_to_proto(entry: FileEntry) -> proto::BaselineFile {
    let FileEntry {
        path,
        file_type,
        format,
        mode,
        uid,
        gid,
        size,
        blake3,
        capability,
        link_target,
        device,
    } = entry;
    proto::BaselineFile {
        path: path.as_bytes().to_vec(),
        file_type: convert::file_type_name(file_type).into(),
        mode,
        uid,
        gid,
        size,
        blake3: blake3.map(|hash| hash.to_string()).unwrap_or_default(),
        format: format.name().into(),
        capability: capability.map(Vec::from).unwrap_or_default(),
        layer: String::new(),
        link_target: link_target.map(Vec::from).unwrap_or_default(),
        device: device.map(|device| proto::Device { major: device.major, minor: device.minor }),
    }
}

pub fn difference_to_proto(difference: ImageDifference) -> proto::BaselineDifference {
    use proto::difference::Change;
    let (change, a, b) = match difference {
        ImageDifference::Added(b) => (Change::Added, None, Some(b)),
        ImageDifference::Removed(a) => (Change::Removed, Some(a), None),
        ImageDifference::Modified(a, b) => (Change::Modified, Some(a), Some(b)),
        ImageDifference::Metadata(a, b) => (Change::Metadata, Some(a), Some(b)),
    };
    let path = a.as_ref().or(b.as_ref()).map(|known| known.entry.path.as_bytes().to_vec());
    proto::BaselineDifference {
        path: path.unwrap_or_default(),
        change: change.into(),
        a: a.map(file_to_proto),
        b: b.map(file_to_proto),
    }
}

pub(super) fn report_to_proto(report: LayerReport) -> proto::LayerReport {
    proto::LayerReport {
        layer: report.id.to_string(),
        known_by: known_by_name(report.known_by).into(),
        blob: Some(witness_to_proto(report.blob)),
        directory: Some(witness_to_proto(report.directory)),
        differences: report.differences.into_iter().map(layer_difference_to_proto).collect(),
    }
}

fn witness_to_proto(witness: Witness) -> proto::Witness {
    use proto::witness::State;
    let (state, differences, reason) = match witness {
        Witness::NotAsked => (State::NotAsked, 0, String::new()),
        Witness::Same => (State::Same, 0, String::new()),
        Witness::Differs(differences) => (State::Differs, differences, String::new()),
        Witness::Unavailable(reason) => (State::Unavailable, 0, reason),
    };
    proto::Witness { state: state.into(), differences, reason }
}

fn layer_difference_to_proto(difference: LayerDifference) -> proto::LayerDifference {
    proto::LayerDifference {
        path: difference.path.as_bytes().to_vec(),
        expected: difference.expected.map(layer_entry_to_proto),
        found: difference.found.map(layer_entry_to_proto),
    }
}

fn layer_entry_to_proto(entry: LayerEntry) -> proto::LayerEntry {
    use proto::layer_entry::Entry;
    let entry = match entry {
        LayerEntry::Whiteout(_) => Entry::Whiteout(proto::Whiteout {}),
        LayerEntry::File(file) => Entry::File(entry_to_proto(file)),
        LayerEntry::OpaqueDirectory(file) => Entry::OpaqueDirectory(entry_to_proto(file)),
    };
    proto::LayerEntry { entry: Some(entry) }
}
