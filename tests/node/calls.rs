//! What one execution of an unchanged program costs driftd, in system calls: an exact count by
//! strace, of all its processes and threads.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::gate::Processes;
use crate::node::{Node, wait_for, wait_within};
use crate::programs::TINY;
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    // Five in the gate. Where executions are further apart than the trace's rest, each wakes it.
    let ask = |node: &Node| an_execution_costs(node, 8);
    let busy = |node: &Node| {
        let _loops = Loops::start()?;
        an_execution_costs(node, 8)
    };
    let notify = |node: &Node| an_execution_costs(node, 3);
    vec![
        test_alone("an_unchanged_program_costs_eight_system_calls", "", ask),
        test_alone("beside_busy_loops_an_unchanged_program_costs_eight_system_calls", "", busy),
        test_alone(
            "an_unchanged_program_costs_three_system_calls_where_no_program_waits",
            "gate = \"notify\"",
            notify,
        ),
    ]
}

/// How many executions are counted: few, because what other tests execute meanwhile is counted
/// as well. So it is tried again and again.
const TIMES: u32 = 500;
const PATIENCE: Duration = Duration::from_secs(120);

fn an_execution_costs(node: &Node, at_most: u64) -> anyhow::Result<()> {
    let container = node.container()?;
    container.diff()?;
    let run = |times| {
        let commands = format!("i=0; while [ $i -lt {times} ]; do {TINY}; i=$((i+1)); done");
        container.sh(&commands)
    };
    let executions = || node.status()?["gate_answers"].as_u64().context("no answers");
    // A runtime has brought the container in, and for some seconds another process may come.
    let mut last = String::new();
    wait_within(PATIENCE, "executions to be cheap", || {
        let before = executions()?;
        let count = Count::begin(node)?;
        run(TIMES)?;
        let calls = count.end()?;
        let seen = executions()? - before;
        ensure!(seen >= u64::from(TIMES), "driftd saw {seen} executions of {TIMES}");
        let all: u64 = calls.iter().map(|(_, times)| times).sum();
        last = format!("{all} system calls for {TIMES}: {calls:?}");
        Ok((all <= at_most * u64::from(TIMES)).then_some(()))
    })
    .with_context(|| last)?;
    // And they are not cheap because nothing looks.
    container.run_dropped("dropped")?;
    container.expect_findings(&["critical exec.new /tmp/dropped"]).map(drop)
}

/// A strace that counts.
struct Count {
    strace: Child,
    summary: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Count {
    fn begin(node: &Node) -> anyhow::Result<Count> {
        let directory = tempfile::tempdir()?;
        let summary = directory.path().join("summary");
        let Processes { daemon, gate, guardian } = Processes::of(node)?;
        let mut command = Command::new("strace");
        command.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(&summary);
        for process in [daemon, gate, guardian] {
            command.args(["-p", &process.to_string()]);
        }
        let strace =
            command.stderr(Stdio::null()).spawn().context("no strace (run: make setup)")?;
        let count = Count { strace, summary, _directory: directory };
        for process in [daemon, gate, guardian] {
            wait_for("every thread to be traced", || {
                for thread in fs::read_dir(format!("/proc/{process}/task"))? {
                    let status = fs::read_to_string(thread?.path().join("status"))?;
                    if status.contains("TracerPid:\t0\n") {
                        return Ok(None);
                    }
                }
                Ok(Some(()))
            })?;
        }
        Ok(count)
    }

    /// The calls by name.
    fn end(mut self) -> anyhow::Result<Vec<(String, u64)>> {
        kill(Pid::from_raw(self.strace.id().cast_signed()), Signal::SIGINT)?;
        self.strace.wait()?;
        let summary = fs::read_to_string(&self.summary)?;
        let calls = summary.lines().filter_map(|line| {
            let (times, name) = line.trim().split_once(' ')?;
            Some((name.trim().to_owned(), times.parse().ok()?))
        });
        // In a debug build, std checks each descriptor by `fcntl` before it closes it.
        let counts = |name: &str| !["total", "fcntl"].contains(&name);
        let calls: Vec<(String, u64)> = calls.filter(|(name, _)| counts(name)).collect();
        ensure!(!calls.is_empty(), "strace counted nothing: {summary}");
        Ok(calls)
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        // It has ended, but for a test that failed.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

/// Two processes that want a processor each.
struct Loops([Child; 2]);

impl Loops {
    fn start() -> anyhow::Result<Loops> {
        let start = || Command::new("sh").args(["-c", "while :; do :; done"]).spawn();
        Ok(Loops([start()?, start()?]))
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        for one in &mut self.0 {
            let _ = one.kill();
            let _ = one.wait();
        }
    }
}
