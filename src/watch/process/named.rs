//! A process as an event names it: by a pid, at a time.
//!
//! A pid alone is not enough, because the kernel reuses it. This file also converts between
//! the daemon's clock ticks and the clock of the kernel's records.

use crate::sys::{perf, procfs};

/// A process as an event names it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    pub(crate) pid: u32,
    /// When the event was read, in clock ticks since boot.
    pub(crate) read_at: u64,
}

impl Named {
    pub(crate) fn now(pid: u32) -> Named {
        Named { pid, read_at: procfs::ticks_since_boot() }
    }
}

/// The time of `read_at` by the clock of the kernel's records. Events within the same clock
/// tick count as earlier.
pub(crate) fn record_time_of(read_at: u64) -> u64 {
    let ticks = procfs::ticks_since_boot().saturating_sub(read_at).saturating_sub(1);
    let age = procfs::time_of_ticks(ticks);
    perf::now().saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX))
}
