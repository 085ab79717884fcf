//! The baselines of this node, on disk.
//!
//! ```text
//! baselines/                             0700, root's
//!   layers/<diff ID in hex>.layer        one layer, for all images that use it
//!   layers/chain-<chain ID in hex>.layer a layer whose diff ID is not known
//!   images/<chain ID in hex>.json        an image's names and its layers
//!   proofs/<like its layer>.json         how far a layer is proved
//! ```
//!
//! The recorder writes it; the API and the CLI read it. It does not decide what is
//! recorded or what a difference means.

mod collect;
mod error;
mod files;
mod images;
mod layers;
mod names;
mod records;
mod state;

pub use collect::Collected;
pub use error::{Error, FindError};
pub use records::{ImageName, ImageRecord};
pub use state::{Claim, Store};

#[cfg(test)]
mod tests;
