//! What an image says its files are.
//!
//! ```text
//!  a layer's directory ── walk ──┐
//!                                ├─> entries ── layer::write ──> layers/<diff ID>.layer
//!  a layer's blob ────── stream ─┘      ^                           │ mapped, never copied
//!                                       │ compare                   v
//!  BaselineEvent <── recorder <── verify: reads the other witness    merge: ImageBaseline over
//!           (one thread)  (one thread, in the background)   the layers of a chain
//! ```
//!
//! A layer is recorded once, whatever images use it, and proved once, by what its
//! blob says; `proofs/` remembers how it is known. Nothing here judges a
//! container: `detect` asks an [`ImageBaseline`] what a path should be.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use serde::{Deserialize, Serialize};

use crate::model::{Blob, ChainId, FileTime, LayerId, RootfsPath};

pub mod archive;
pub mod compare;
pub mod diff;
pub mod layer;
pub mod merge;
#[doc(hidden)]
pub mod oci;
pub mod proof;
pub mod recorder;
pub mod store;
pub mod stream;
mod tar;
mod text;
mod unpack;
pub mod urgency;
mod verify;
pub mod walk;

pub use diff::{ImageDifference, diff};
pub use layer::{Device, FileEntry, LayerBaseline, LayerEntry};
pub use merge::{ImageBaseline, Known, Totals};
pub use recorder::{Answer, Queue, RecordRequest, Recorder};
pub use store::{Collected, FindError, ImageName, ImageRecord, Store};
pub use urgency::Urgency;

#[doc(hidden)]
pub use text::blake3_of;

/// Where the archives of layers are read.
pub trait Blobs: Send + Sync {
    /// The blob from its first byte on. May be called, and read, by a thread that
    /// may block, and by no other. The error is a reason for people: the blob is
    /// gone (`discard_unpacked_layers`), or containerd is.
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String>;
}

/// How far a baseline is proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KnownBy {
    /// Read from the directory that the snapshotter had unpacked.
    Snapshot,
    /// The blob has the digest that the manifest says, its content the diff ID
    /// that the image's config says, and the baseline is the blob's.
    Verified,
}

/// How much a job proves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proof {
    /// Records what is not recorded; the blobs are read later, in the background.
    #[default]
    Later,
    /// Reads the blobs of layers that are not verified yet, now.
    Blobs,
    /// Reads all blobs and all directories again, now.
    Deep,
}

/// What came of a job.
#[derive(Clone, Debug)]
pub struct Recorded {
    pub baseline: Arc<ImageBaseline>,
    /// Bottom first.
    pub layers: Vec<LayerReport>,
}

/// How one layer's baseline is known, and what was compared with it just now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerReport {
    pub id: LayerId,
    pub known_by: KnownBy,
    pub blob: Witness,
    pub directory: Witness,
    /// Of both witnesses; at most [`MAX_DIFFERENCES`].
    pub differences: Vec<LayerDifference>,
}

/// What one of the two things that a layer's baseline can be compared with says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Witness {
    NotAsked,
    Same,
    /// In so many places.
    Differs(u64),
    /// Why there is nothing to compare with.
    Unavailable(String),
}

/// How many differences of one layer are told one by one.
pub const MAX_DIFFERENCES: usize = 1000;

/// Where what a layer holds differs from what its baseline says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDifference {
    pub path: RootfsPath,
    /// As the baseline has it; `None`: it has no such path.
    pub expected: Option<LayerEntry>,
    /// As it is; `None`: it is not there.
    pub found: Option<LayerEntry>,
}

/// Baselines have changed.
#[derive(Debug, Clone)]
pub enum BaselineEvent {
    Ready {
        chain_id: ChainId,
        baseline: Arc<ImageBaseline>,
        /// When the layers' directories were last known to equal the baseline, in
        /// their filesystem's time: a lower file with a later ctime was changed
        /// since. `None`: nobody has looked yet.
        unchanged_since: Option<FileTime>,
    },
    /// The recorder gave up on this stack of layers; the reason is for people.
    Failed { chain_id: ChainId, reason: String },
    /// What is on disk, or what the image's blob holds, is not what the baseline
    /// said. `total` counts all differences; the list may be shorter.
    Tampered {
        layer: LayerId,
        /// What was compared with the baseline, for people: a directory or a blob.
        witness: String,
        /// The layer's directories of which this is said. Another one, of the same
        /// layer in another namespace, may be whole.
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
