//! The kernel's interfaces: fanotify, perf events, `/proc`, mounts, overlays, file handles,
//! pidfds, control groups.
//!
//! All `unsafe` code of driftd is in this folder; the rest of the crate denies
//! `unsafe_code`. Each file or folder wraps one interface, and takes and returns owned Rust
//! types. It has no policy, does not retry, and writes no log.
#![allow(unsafe_code)]

pub mod capabilities;
pub mod channel;
pub mod clock;
pub mod closings;
pub mod connector;
pub mod counters;
pub mod door;
pub mod errand;
pub mod extents;
pub mod fanotify;
pub mod file;
pub mod freezer;
pub mod handle;
pub mod hash;
pub mod lease;
pub mod map;
pub mod memory;
pub mod mounts;
pub mod overlay;
pub mod peer;
pub mod perf;
pub mod pidfd;
pub mod priority;
pub mod process;
pub mod procfs;
pub mod stack;
