//! What an image says its files are.
//!
//! ```text
//!  a layer's directory ── walk ──> entries ── layer::write ──> layers/<diff ID>.layer
//!                                                                 │ mapped, never copied
//!  News <── recorder (one thread, a pool that hashes)             v
//!                                            merge: ImageBaseline over the layers of a chain
//! ```
//!
//! A layer is recorded once, whatever images use it. Nothing here judges a
//! container: `detect` asks an [`ImageBaseline`] what a path should be.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::model::ChainId;

pub mod layer;
pub mod merge;
pub mod recorder;
pub mod store;
mod text;
pub mod walk;

pub use layer::{Device, FileEntry, LayerBaseline, LayerEntry};
pub use merge::{ImageBaseline, Known, Totals};
pub use recorder::{Job, Recorder};
pub use store::{FindError, ImageName, ImageRecord, Store};

#[doc(hidden)]
pub use text::blake3_of;

/// Baselines have changed.
#[derive(Debug, Clone)]
pub enum News {
    Ready {
        chain_id: ChainId,
        baseline: Arc<ImageBaseline>,
    },
    /// The recorder gave up on this stack of layers; the reason is for people.
    Failed {
        chain_id: ChainId,
        reason: String,
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
