//! gRPC on a Unix socket of the node (async).
//!
//! [`proto`] is generated from `proto/driftd/v1/driftd.proto`; only
//! [`convert`] and the service itself know it. The service owns no state: it
//! asks the pipeline, reads the history and looks at the baselines.

pub mod baselines;
pub mod convert;

mod follow;
mod outbox;
mod peer;
mod server;
mod service;
mod verify;

pub use baselines::RecordImage;
pub use server::{Error, Listener, Transport, serve, without_daemon};
pub use service::Backend;

/// The generated messages, client and server.
#[allow(
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    reason = "generated code is not ours to polish"
)]
pub mod proto {
    tonic::include_proto!("driftd.v1");

    /// The compiled proto, for gRPC reflection.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/driftd.v1.bin"));
}
