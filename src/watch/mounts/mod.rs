//! The other mounts of containers, and their marks.
//!
//! It knows `core`, `process` and `files`.

pub(in crate::watch) mod marking;
pub(in crate::watch) mod namespaces;
