//! The only room that speaks to the kernel in its own words.
//!
//! Everything `unsafe` in driftd is in this folder. Each file wraps one kernel
//! interface, takes and returns owned Rust types, and decides nothing: no
//! policy, no retries, no logging. The rest of the crate denies `unsafe_code`.
#![allow(unsafe_code)]

pub mod capabilities;
pub mod channel;
pub mod clock;
pub mod closings;
pub mod connector;
pub mod counters;
pub mod door;
pub mod errand;
pub mod fanotify;
pub mod file;
pub mod freezer;
pub mod handle;
pub mod hash;
pub mod lease;
pub mod map;
pub mod mounts;
pub mod overlay;
pub mod peer;
pub mod perf;
pub mod pidfd;
pub mod priority;
pub mod process;
pub mod procfs;
pub mod stack;
