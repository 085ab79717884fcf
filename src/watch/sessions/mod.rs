//! Sessions: who comes into a container from outside, and what is done there.
//!
//! It knows `core`, `process` and `files`.

pub(in crate::watch) mod acts;
pub(in crate::watch) mod attachments;
pub(in crate::watch) mod calls;
pub(in crate::watch) mod opening;
pub(in crate::watch) mod terminals;
