//! The wing of mounts: the filesystems of containers besides their root overlays, which of
//! them carry marks, and the paths of files on them.
//!
//! It uses `core`, `process` and `files` and no other wing. It places marks and follows
//! changes of mounts. The events of the marks are handled by `exec`.

pub(crate) mod find;
pub(crate) mod marking;
pub(crate) mod marks;
pub(crate) mod namespaces;
pub(crate) mod pace;
