//! Sessions: who comes into a container from outside, and what is done there.
//!
//! It knows `core`, `process` and `files`.

pub(crate) mod acts;
pub(crate) mod attachments;
pub(crate) mod calls;
pub(crate) mod inside;
pub(crate) mod opening;
pub(crate) mod origin;
pub(crate) mod runtimes;
pub(crate) mod shared;
pub(crate) mod terminals;
