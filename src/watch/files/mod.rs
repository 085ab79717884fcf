//! The wing of files: which files of a container's upper layer exist or change, what the
//! image's layers hold below them, and which process wrote them.
//!
//! It uses `core` and `process` and no other wing. It reports what it finds as observations.
//! It does not judge whether a file is drift.

pub(crate) mod changes;
pub(crate) mod closings;
pub(crate) mod dirty;
pub(crate) mod entry;
pub(crate) mod feed;
pub(crate) mod guards;
pub(crate) mod hashed;
pub(crate) mod inputs;
pub(crate) mod lower;
pub(crate) mod names;
pub(crate) mod packages;
pub(crate) mod paths;
pub(crate) mod progress;
pub(crate) mod scan;
pub(crate) mod settle;
pub(crate) mod shared;
pub(crate) mod state;
pub(crate) mod upper;
pub(crate) mod walk;
pub(crate) mod ways;
pub(crate) mod work;
pub(crate) mod writers;
