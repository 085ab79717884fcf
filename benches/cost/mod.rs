//! Measurements that the benches share: time, processor time, memory.

#![allow(dead_code, reason = "each bench measures what it needs")]

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::resource::{UsageWho, getrusage};

#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) wall: Duration,
    pub(crate) cpu: Duration,
}

pub(crate) fn measure(
    usage_of: UsageWho,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Cost> {
    let before = cpu_time(usage_of)?;
    let start = Instant::now();
    work()?;
    let wall = start.elapsed();
    Ok(Cost { wall, cpu: cpu_time(usage_of)?.saturating_sub(before) })
}

fn cpu_time(usage_of: UsageWho) -> anyhow::Result<Duration> {
    let usage = getrusage(usage_of)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// For how long another process's only thread has run.
pub(crate) fn cpu_time_of(pid: u32) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    let run = text.split_whitespace().next().context("no time in schedstat")?;
    Ok(Duration::from_nanos(run.parse()?))
}

/// A figure from /proc/self/status, in bytes.
pub(crate) fn memory(name: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("no {name} in /proc/self/status"))?
        .parse()?;
    Ok(kib * 1024)
}

pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
