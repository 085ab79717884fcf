//! One comparison of a layer, and its result. Values only.

use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::baseline::layer::LayerEntry;
use crate::baseline::types::{LayerDifference, Progress};
use crate::model::{Blake3Hash, FileTime, Layer, LayerId};

/// One comparison to be made.
#[derive(Clone)]
pub(crate) struct Task {
    pub(crate) layer: Layer,
    /// The layers below it, bottom first.
    pub(crate) below: Vec<LayerId>,
    pub(crate) with: ComparedWith,
    /// The job that waits for it; `None` for a comparison that no job waits for.
    pub(crate) ticket: Option<u64>,
    pub(crate) progress: Option<Arc<Progress>>,
}

/// What a layer's baseline is compared with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ComparedWith {
    /// The blob that the layer names.
    Blob,
    /// All of a directory.
    Directory(PathBuf),
    /// The files of a directory that have changed since the directory was equal.
    Changes { directory: PathBuf, since: FileTime },
    /// All of a directory, at the rate of the settings.
    Again(PathBuf),
}

impl Task {
    pub(super) fn class(&self) -> usize {
        match self.with {
            _ if self.ticket.is_some() => REQUESTED,
            ComparedWith::Changes { .. } => 1,
            ComparedWith::Directory(_) => 2,
            ComparedWith::Blob => 3,
            ComparedWith::Again(_) => AGAIN,
        }
    }

    pub(super) fn bottom(&self) -> bool {
        self.below.is_empty()
    }
}

/// The classes of tasks, the most urgent first.
pub(super) const CLASSES: usize = 5;
pub(super) const REQUESTED: usize = 0;
pub(super) const AGAIN: usize = CLASSES - 1;

/// The outcome of a task.
pub(crate) struct Outcome {
    pub(crate) task: Task,
    /// The time before anything was read.
    pub(crate) started: Timestamp,
    /// The checksum of the layer's file that was compared; `None` if there was none.
    pub(crate) against: Option<Blake3Hash>,
    pub(crate) result: TaskResult,
}

pub(crate) enum TaskResult {
    /// The blob has the right digests. `differences` has the blob's entries as expected,
    /// and the recorded ones as found.
    Proved {
        differences: Vec<LayerDifference>,
        total: u64,
        entries: Vec<LayerEntry>,
    },
    NotProved(Unproved),
    Compared {
        differences: Vec<LayerDifference>,
        total: u64,
        newest_change: FileTime,
    },
    NotCompared(String),
}

/// Why a blob proves nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Unproved {
    /// It does not exist, or cannot be read. This is no failure: many nodes keep no blobs.
    Unavailable(String),
    /// It does not have the digest of the manifest or the diff ID of the image's config.
    Wrong(String),
    /// Its digest is right, but it is no layer that driftd can read.
    Unreadable(String),
    Stopped,
}

impl Unproved {
    pub(crate) fn reason(&self) -> &str {
        match self {
            Unproved::Unavailable(reason)
            | Unproved::Wrong(reason)
            | Unproved::Unreadable(reason) => reason,
            Unproved::Stopped => "driftd is being stopped",
        }
    }
}
