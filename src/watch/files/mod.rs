//! The files of upper layers and of the layers below: what changes, what is there, and
//! by which process it was written.
//!
//! It knows `core` and `process`.

pub(crate) mod changes;
pub(crate) mod closings;
pub(crate) mod dirty;
pub(crate) mod entry;
pub(crate) mod feed;
pub(crate) mod hashed;
pub(crate) mod inputs;
pub(crate) mod lower;
pub(crate) mod names;
pub(crate) mod packages;
pub(crate) mod paths;
pub(crate) mod scan;
pub(crate) mod settle;
pub(crate) mod shared;
pub(crate) mod state;
pub(crate) mod upper;
pub(crate) mod walk;
pub(crate) mod ways;
pub(crate) mod work;
pub(crate) mod writers;
