//! The other mounts of containers, and their marks.
//!
//! It knows `core`, `process` and `files`.

pub(crate) mod find;
pub(crate) mod marking;
pub(crate) mod marks;
pub(crate) mod namespaces;
pub(crate) mod pace;
