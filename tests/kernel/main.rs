//! The watchers against the real kernel: the tests mount overlays, run programs in
//! them, and compare what the gate, the change feed and the scans report.
//!
//! Needs root, fanotify and a static busybox (`make setup`), and fails without.

use std::fs;

mod changes;
#[path = "../common/mod.rs"]
mod common;
mod container;
#[path = "../node/executable.rs"]
mod executable;
mod executions;
mod gate;
mod layers;
mod mounts;
mod node;
mod scans;
mod sessions;
mod start;

pub(crate) fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
}

pub(crate) fn kernel_version() -> (u32, u32) {
    let release = kernel_release();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}
