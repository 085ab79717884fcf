//! Clock ticks, in which the kernel counts the start times of processes.
//!
//! Start times are in ticks after boot, and this file converts between them and durations.

use std::time::Duration;

/// The time since boot, in the unit of processes' start times.
pub fn ticks_since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let per_second = rustix::param::clock_ticks_per_second();
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * per_second + nanoseconds * per_second / 1_000_000_000
}

/// The time of a number of clock ticks.
pub fn time_of_ticks(ticks: u64) -> Duration {
    let per_second = rustix::param::clock_ticks_per_second();
    Duration::from_secs(ticks / per_second)
        + Duration::from_nanos(ticks % per_second * 1_000_000_000 / per_second)
}

/// The number of clock ticks of a time.
pub fn ticks_in(time: Duration) -> u64 {
    let per_second = rustix::param::clock_ticks_per_second();
    time.as_secs() * per_second + u64::from(time.subsec_nanos()) * per_second / 1_000_000_000
}
