//! What records the images that containerd has, and the images that have no baseline.
//!
//! An interface, so that tests can do without the recorder of `baseline`.

use std::sync::Arc;

use crate::baseline::{ImageName, RecordRequest, Recorder};
use crate::model::{ChainId, LayerId};

/// Records the layers of images as baselines.
pub trait Recording: Send + Sync + 'static {
    /// May wait until the recorder has room.
    fn submit(&self, job: RecordRequest);
    /// The `layers` that have no baseline yet.
    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId>;
    /// All images that one containerd has now. Must not wait.
    fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>);
    /// No image has this name any more. Must not wait.
    fn image_removed(&self, namespace: &str, name: &str);
}

impl Recording for Recorder {
    fn submit(&self, job: RecordRequest) {
        Recorder::submit(self, job);
    }

    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        Recorder::unrecorded(self, layers)
    }

    fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        Recorder::image_names(self, endpoint, listed);
    }

    fn image_removed(&self, namespace: &str, name: &str) {
        Recorder::image_removed(self, namespace, name);
    }
}

/// An image without a baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageProblem {
    pub endpoint: Arc<str>,
    pub namespace: String,
    pub name: String,
    /// The blob, or the stack of layers, that the reason is about.
    pub digest: String,
    pub reason: String,
}
