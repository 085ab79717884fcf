//! gRPC on a Unix socket of the node (async).
//!
//! The service owns no state: it sends requests to the pipeline, reads the history and reads
//! the baselines. [`proto`] is the published interface, [`convert`] translates it to the
//! model. `service/` has one file for each subject, `server.rs` the socket, `peer.rs` the
//! check of who connects, `follow.rs` and `outbox.rs` the streams of new findings.

pub mod baselines;
pub mod convert;
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    reason = "generated code is not ours to polish"
)]
pub mod proto;

mod failure;
mod follow;
mod outbox;
mod peer;
mod server;
mod service;

pub use baselines::RecordImage;
pub use server::{Error, Listener, Transport, serve, without_daemon};
pub use service::{Backend, PolicyReload};
