//! What an image says its files are.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::model::{ChainId, LayerId, ManifestDigest};

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
