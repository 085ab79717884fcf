//! Sessions: how processes enter a container from outside, and what they run there.
//!
//! `opening` decides what opens a session, `origin` shows how it came in, and `acts` follows
//! session activity. `attachments` and `terminals` find clients at a container's terminal.
//! `calls` and `runtimes` read the host's container runtimes.
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
