//! The files of upper layers and of the layers below: what changes, what is there, and
//! by which process it was written.
//!
//! It knows `core` and `process`.

pub(in crate::watch) mod closings;
pub(in crate::watch) mod feed;
pub(in crate::watch) mod lower;
pub(in crate::watch) mod names;
pub(in crate::watch) mod packages;
pub(in crate::watch) mod scan;
pub(in crate::watch) mod state;
pub(in crate::watch) mod ways;
pub(in crate::watch) mod writers;
