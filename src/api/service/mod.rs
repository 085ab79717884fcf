//! The service `driftd.v1.DriftService`, one file for each subject.
//!
//! `backend.rs` owns [`Service`] and the ways to the pipeline and the history, `grpc.rs`
//! implements the generated trait and hands each request to the file of its subject.

mod backend;
mod baselines;
mod containers;
mod evidence;
mod findings;
mod grpc;
mod hooks;
mod paging;
mod policy;
mod probes;
mod responses;
mod sessions;
mod status;
mod verify;

pub(super) use backend::Service;
pub use backend::{Backend, PolicyReload};
