//! The types that the files of this room share and that other rooms see: how a
//! baseline is proved, what came of a job, and the events that report it.
//!
//! Values only, and the one trait through which a layer's blob is opened. The logic
//! is in the files beside this one; none of them may be used here but `layer` and
//! `merge`, which define what a baseline holds.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use serde::{Deserialize, Serialize};

use super::layer::LayerEntry;
use super::merge::ImageBaseline;
use crate::model::{Blob, ChainId, FileTime, LayerId, RootfsPath};

/// How far a baseline is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KnownBy {
    /// Read from the directory that the snapshotter had unpacked.
    Snapshot,
    /// The blob has the digest that the manifest names, its content has the diff ID
    /// that the image's config names, and the baseline equals the blob's content.
    Verified,
}

/// How much a job proves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proof {
    /// Records what is not recorded yet. The blobs are read later, in the background.
    #[default]
    Later,
    /// Reads the blobs of the layers that are not verified yet, now.
    Blobs,
    /// Reads all blobs and all directories again, now.
    Deep,
}

/// The result of a job.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub baseline: Arc<ImageBaseline>,
    /// Bottom first.
    pub layers: Vec<LayerReport>,
}

/// How one layer's baseline is known, and the comparisons that the job made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerReport {
    pub id: LayerId,
    pub known_by: KnownBy,
    pub blob: Witness,
    pub directory: Witness,
    /// Those of the blob and of the directories together; at most [`MAX_DIFFERENCES`].
    pub differences: Vec<LayerDifference>,
}

/// The result of comparing a layer's baseline with its blob or its directories; the
/// `Witness` of the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Witness {
    /// The job did not request this comparison.
    NotAsked,
    Same,
    /// The number of places that differ.
    Differs(u64),
    /// Why there is nothing to compare with.
    Unavailable(String),
}

/// How many differences of one layer are listed one by one.
pub const MAX_DIFFERENCES: usize = 1000;

/// One path at which a layer's content differs from its baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDifference {
    pub path: RootfsPath,
    /// The baseline's entry; `None` if the baseline has no such path.
    pub expected: Option<LayerEntry>,
    /// The entry that was found; `None` if there is nothing at the path.
    pub found: Option<LayerEntry>,
}

/// Opens the archives of layers.
pub trait Blobs: Send + Sync {
    /// Opens a blob; the reader begins at its first byte. Both this call and the
    /// reader may block, so only a thread that may block uses them. The error is a
    /// reason for users: the blob is gone (`discard_unpacked_layers`), or containerd
    /// does not run.
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String>;
}

/// A change of a baseline, or of what is known of it.
#[derive(Debug, Clone)]
pub enum BaselineEvent {
    Ready {
        chain_id: ChainId,
        baseline: Arc<ImageBaseline>,
        /// The time up to which the layers' directories are known to equal the
        /// baseline, in the time of their filesystem: a lower file with a later ctime
        /// was changed since. `None`: a directory has not been compared yet.
        unchanged_since: Option<FileTime>,
    },
    /// The recorder has no baseline for this stack of layers; the reason is for users.
    Failed { chain_id: ChainId, reason: String },
    /// A directory or a blob of the layer differs from its baseline. `total` counts
    /// all differences; the list may be shorter.
    Tampered {
        layer: LayerId,
        /// The directory or blob that the baseline was compared with, for users.
        compared_with: String,
        /// The directories of the layer that differ. Another directory of the same
        /// layer, in another namespace, may be unchanged.
        directories: Vec<PathBuf>,
        differences: Vec<LayerDifference>,
        total: u64,
    },
}

/// Shared counters of one recording, for a progress bar.
#[derive(Debug, Default)]
pub struct Progress {
    pub files_done: AtomicU64,
    pub bytes_done: AtomicU64,
    pub layers_done: AtomicU32,
    pub layers_total: AtomicU32,
}
