//! Baselines: which files an image holds, recorded layer by layer.
//!
//! ```text
//!  a layer's directory ── walk ──┐
//!                                ├─> entries ── layer::write ──> layers/<diff ID>.layer
//!  a layer's blob ────── stream ─┘      ^                           │ mapped, never copied
//!                                       │ compare                   v
//!  BaselineEvent <── recorder <── verify: compares with blobs      merge: ImageBaseline over
//!           (one thread)  (one thread, in the background)   the layers of a chain
//! ```
//!
//! A layer is recorded once for all images that use it, and proved once, by its
//! blob; `proofs/` keeps how far it is proved. This room does not judge containers:
//! `detect` compares files with an [`ImageBaseline`].

pub mod archive;
mod causes;
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
mod types;
mod unpack;
pub mod urgency;
mod verify;
pub mod walk;

pub use diff::{ImageDifference, diff};
pub use layer::{Device, FileEntry, LayerBaseline, LayerEntry};
pub use merge::{ImageBaseline, KnownBaseline, Totals};
pub use recorder::{Answer, Queue, RecordRequest, Recorder};
pub use store::{Collected, FindError, ImageName, ImageRecord, Store};
pub use types::{
    BaselineEvent, Blobs, KnownBy, LayerDifference, LayerReport, MAX_DIFFERENCES, Progress, Proof,
    Recorded, Witness,
};
pub use urgency::Urgency;

#[doc(hidden)]
pub use text::blake3_of;
