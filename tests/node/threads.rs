//! Threads that hang are replaced, or end the daemon. Executions from before a stop are in the
//! history, or counted as lost.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::node::{Node, bench, wait_for, wait_within};
use crate::{programs, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("h05_what_was_executed_before_a_stop_is_kept_or_counted", "", h05_stop),
        test_alone("x02_a_thread_that_hangs_is_named_and_replaced", "", x02_replaced),
        // It takes longer than the others may: the daemon waits long for a thread.
        test_alone("x02_a_thread_that_cannot_be_replaced_ends_the_daemon", "", x02_ends)
            .with_ignored_flag(true),
        test_alone("h08_a_container_is_marked_while_the_pipeline_waits", "", h08_fast_lane),
        test_alone("h02_the_view_is_incomplete_while_a_loss_lasts", "", h02_lasting),
    ]
}

/// A thread of the daemon, below `/proc`.
pub(crate) fn thread_of(node: &Node, name: &str) -> anyhow::Result<PathBuf> {
    let daemon = node.driftd_pid()?;
    let threads = fs::read_dir(format!("/proc/{daemon}/task"))?;
    threads
        .flatten()
        .map(|thread| thread.path())
        .find(|thread| {
            fs::read_to_string(thread.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
        })
        .with_context(|| format!("there is no thread {name}"))
}

/// One thread of the daemon that is stopped, while all others run.
struct Held(Child);

impl Held {
    fn new(node: &Node, name: &str) -> anyhow::Result<Held> {
        let thread = thread_of(node, name)?;
        let mut child = Command::new(holder()?)
            .arg(thread.file_name().context("a thread has a number")?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
        let held = Held(child);
        ensure!(line == "held\n", "{name} cannot be held (is ptrace allowed?)");
        Ok(held)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn holder() -> anyhow::Result<&'static PathBuf> {
    static HOLDER: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let compiled = HOLDER.get_or_init(|| {
        let scratch = bench().map_err(|err| format!("{err:#}"))?.scratch.path();
        programs::compile(scratch, "hold", include_str!("../data/hold.c"))
            .map_err(|err| format!("{err:#}"))?;
        Ok(scratch.join("hold"))
    });
    compiled.as_ref().map_err(|err| anyhow::anyhow!("{err}"))
}

fn log(node: &Node) -> anyhow::Result<String> {
    Ok(fs::read_to_string(node.path("driftd.log"))?)
}

fn problems(status: &Value) -> String {
    status["problems"].to_string()
}

/// How many items the stages of the stop have left, by their log lines.
fn left(log: &str) -> u64 {
    log.lines()
        .filter(|line| line.contains("a stop leaves") || line.contains("leaves something undone"))
        .flat_map(|line| line.split("left=").skip(1))
        .flat_map(|left| left.split(|byte: char| !byte.is_ascii_digit()))
        .filter_map(|number| number.parse::<u64>().ok())
        .sum()
}

fn h05_stop(node: &Node) -> anyhow::Result<()> {
    const PROGRAMS: usize = 400;
    let container = node.container()?;
    container.sh(&format!(
        "i=0; while [ $i -lt {PROGRAMS} ]; do \
         cp /usr/bin/tiny /opt/t$i; echo $i >>/opt/t$i; i=$((i+1)); done"
    ))?;
    container.sh(&format!("i=0; while [ $i -lt {PROGRAMS} ]; do /opt/t$i; i=$((i+1)); done"))?;
    let daemon = node.driftd_pid()?;
    kill(daemon, Signal::SIGTERM)?;
    // A second signal changes nothing.
    kill(daemon, Signal::SIGTERM)?;
    ensure!(node.driftd_ended(Duration::from_secs(20))?.is_none(), "it did not end by itself");
    let log = log(node)?;
    let stages: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("a stage of the stop"))
        .filter_map(|line| line.split("stage=\"").nth(1)?.split('"').next())
        .collect();
    let order = ["gate", "containerd", "watchers", "pipeline", "baselines", "history", "followers"];
    assert_eq!(stages, order, "{log}");
    let is_error = |line: &&str| line.contains(" ERROR ") && !line.contains("driftd::findings");
    assert_eq!(log.lines().find(is_error), None, "a stop is no error");
    node.start_driftd()?;
    let reported = container.findings()?;
    let reported = reported.iter().filter(|finding| finding["kind"] == "exec.new").count();
    let left = left(&log);
    ensure!(
        reported as u64 + left >= PROGRAMS as u64,
        "of {PROGRAMS} programs {reported} were kept, and {left} counted"
    );
    // The machine is slow, but not that slow.
    ensure!(reported > PROGRAMS / 4, "{reported} of {PROGRAMS} were kept");
    Ok(())
}

fn x02_replaced(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    // Long enough to be examined late.
    container.lay("script", b"sleep 2; sleep 1\n")?;
    let held = Held::new(node, "interpreters")?;
    container.sh("cp /.control/script /tmp/script; sh /tmp/script")?;
    let status = wait_within(Duration::from_secs(20), "the thread to be named", || {
        let status = node.status()?;
        Ok(problems(&status).contains("`interpreters`").then_some(status))
    })?;
    assert_eq!(status["complete"], false, "{status:#}");
    let thread = status["threads"].as_array().context("no threads")?;
    let thread = thread.iter().find(|thread| thread["name"] == "interpreters");
    assert_eq!(thread.context("it is not listed")?["stuck"], true, "{status:#}");
    ensure!(node.losses("thread_stuck")? == 1, "{status:#}");
    // Another thread goes on with waiting and with new work.
    container.sh("cp /.control/script /tmp/other; sh /tmp/other")?;
    wait_for("what is interpreted to be reported", || {
        let findings = container.findings()?;
        Ok(findings
            .iter()
            .any(|one| one["file"]["path"] == "/tmp/other" && one["kind"] == "exec.interpreted")
            .then_some(()))
    })?;
    drop(held);
    node.wait_until_complete()?;
    let gaps = node.status()?["gaps"].to_string();
    ensure!(gaps.contains("thread_stuck"), "{gaps}");
    Ok(())
}

fn x02_ends(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let held = Held::new(node, "control")?;
    // The thread that would take this container's commands is held.
    let other = node.unwatched_container_of(programs::WORKBENCH)?;
    let began = Instant::now();
    let log = wait_within(Duration::from_secs(60), "the daemon to end", || {
        Ok(Some(log(node)?).filter(|log| log.contains("stage=\"followers\"")))
    })?;
    ensure!(began.elapsed() > Duration::from_secs(10), "it ended too soon");
    // The held thread must be released before its process can end.
    drop(held);
    ensure!(node.driftd_ended(Duration::from_secs(10))?.is_none(), "it did not end by itself");
    ensure!(log.contains("left=\"") && log.contains(" control\""), "{log}");
    ensure!(log.contains("the thread `control` has made no progress"), "{log}");
    // No program waits for it.
    container.sh("/usr/bin/app")?;
    node.start_driftd()?;
    other.wait_until_watched()
}

fn h08_fast_lane(node: &Node) -> anyhow::Result<()> {
    let held = Held::new(node, "pipeline")?;
    // It is marked within milliseconds of its start, so the entry point waits first.
    let drop = "sleep 1; cp /usr/bin/tiny /tmp/early; echo evil >>/tmp/early; /tmp/early; \
                echo done >/tmp/done; exec sleep 60";
    let id = node.run_plainly(&[], &["/bin/sh", "-c", drop])?;
    let upper = node.upperdir(&id)?;
    wait_for("the program to have run", || Ok(upper.join("tmp/done").exists().then_some(())))?;
    std::mem::drop(held);
    let finding = wait_for("what ran meanwhile to be reported", || {
        let findings = node.answer(&["findings", "--container", &id])?;
        Ok(findings.into_iter().find(|finding| finding["kind"] == "exec.new"))
    })?;
    assert_eq!(finding["source"], "gate", "{finding:#}");
    // Its end is noticed too.
    node.ctr(&["task", "kill", "--signal", "SIGKILL", &id])?;
    wait_for("its end to be noticed", || {
        let containers = node.answer(&["containers"])?;
        Ok(containers
            .iter()
            .all(|one| one["id"] != id.as_str() || one["watched"] == false)
            .then_some(()))
    })
}

fn h02_lasting(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    assert_eq!(node.status()?["complete"], true);
    // Deeper than a scan goes.
    container.sh("d=/tmp; i=0; while [ $i -lt 260 ]; do d=$d/d; mkdir $d; i=$((i+1)); done")?;
    // A diff reports that it has not seen everything.
    let scan = || node.driftd(&["diff", &container.id]);
    assert_eq!(scan()?.status.code(), Some(2));
    let status = node.status()?;
    assert_eq!(status["complete"], false, "{status:#}");
    ensure!(problems(&status).contains("scan_incomplete"), "{status:#}");
    // It stays incomplete after another scan.
    assert_eq!(scan()?.status.code(), Some(2));
    assert_eq!(node.status()?["complete"], false);
    container.sh("rm -r /tmp/d")?;
    assert_eq!(scan()?.status.code(), Some(0));
    node.wait_until_complete()?;
    let status = node.status()?;
    let gap = &status["gaps"][0];
    assert_eq!(gap["name"], "scan_incomplete", "{status:#}");
    ensure!(gap["until"].is_string(), "{status:#}");
    Ok(())
}
