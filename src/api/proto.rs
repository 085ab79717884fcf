//! The generated messages, client and server of `proto/driftd/v1/driftd.proto`.
//!
//! Nothing here is written by hand. `build.rs` compiles the proto; only the rooms `api` and `cli`
//! may use these types.

tonic::include_proto!("driftd.v1");

/// The compiled proto, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/driftd.v1.bin"));
