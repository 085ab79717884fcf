//! Sessions: how processes enter a container from outside, and what they run there.
//!
//! `opening` decides what opens a session, `origin` shows how it came in, and `follow` follows
//! session activity. `attachments` and `terminals` find clients at a container's terminal.
//! `invocations` and `runtimes` read the host's container runtimes.
//!
//! It knows `core`, `process` and `files`.

pub(crate) mod attachments;
pub(crate) mod follow;
pub(crate) mod inside;
pub(crate) mod invocations;
pub(crate) mod opening;
pub(crate) mod origin;
pub(crate) mod runtimes;
pub(crate) mod shared;
pub(crate) mod terminals;
