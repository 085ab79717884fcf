//! Images: from a name to the layers that it stands for, and to their recording.
//!
//! Everything is keyed by digest. An event or a list only means *check this name again*.
//! Checking twice does no harm, and costs one call if nothing has changed. An image whose
//! layers are not unpacked yet waits until its top layer is committed. If nothing is unpacked
//! for a while, its archives are read instead of its directories.
//!
//! `follow` keeps up with the names, `resolve` reads manifests and configs, `record` plans and
//! requests recordings. `names` and `state` hold what is known. Reading the layers themselves
//! is the work of `baseline`.

mod error;
mod follow;
mod names;
mod record;
mod resolve;
mod state;
#[cfg(test)]
mod tests;

pub(super) use self::error::ImageError;
pub(super) use self::record::RecordOptions;
pub(super) use self::state::{Facts, Images};
