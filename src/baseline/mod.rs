//! What an image says its files are.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::model::{ChainId, ContainerId, Layer, LayerId, ManifestDigest};

/// Baselines have changed.
#[derive(Debug, Clone)]
pub enum News {
    Ready { chain_id: ChainId, baseline: Arc<ImageBaseline> },
    /// The recorder gave up on this stack of layers; the reason is for people.
    Failed { chain_id: ChainId, reason: String },
}

/// Shared counters of one recording, for a progress bar.
#[derive(Debug, Default)]
pub struct Progress {
    pub files_done: AtomicU64,
    pub bytes_done: AtomicU64,
    pub layers_done: AtomicU32,
    pub layers_total: AtomicU32,
}

#[derive(Debug)]
pub struct ImageBaseline;

#[derive(Debug)]
pub struct LayerBaseline;

impl ImageBaseline {
    pub fn new(_: ChainId, _: Vec<(LayerId, Arc<LayerBaseline>)>) -> ImageBaseline {
        ImageBaseline
    }
}

#[derive(Debug, Clone)]
pub struct ImageName {
    pub namespace: String,
    pub name: String,
    pub manifest_digest: Option<ManifestDigest>,
}

pub struct Job {
    pub image: Option<ImageName>,
    pub container: Option<ContainerId>,
    pub layers: Vec<Layer>,
    pub progress: Option<Arc<Progress>>,
    #[expect(clippy::type_complexity, reason = "stub")]
    pub done: Option<Box<dyn FnOnce(Result<Arc<ImageBaseline>, String>) + Send>>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("image", &self.image).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone)]
pub struct Recorder;

impl Recorder {
    pub fn submit(&self, _job: Job) {}
    pub fn unrecorded(&self, ids: &[LayerId]) -> Vec<LayerId> {
        ids.to_vec()
    }
    pub fn image_names(&self, _endpoint: &str, _listed: Vec<(ImageName, ChainId)>) {}
    pub fn image_removed(&self, _namespace: &str, _name: &str) {}
}
