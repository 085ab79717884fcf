//! The start and the end of containers: they are armed before the entry point runs, released
//! when they have ended, and never held by a driftd that hangs or is gone.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::commands::state_in;
use crate::node::{DEADLINE, KUBERNETES, Node, Setup, bench, wait_for};
use crate::{executable, programs, test_alone, test_on};

const STRICT: Setup = Setup {
    driftd: "arm = \"strict\"\nruntimes = [\"{node}/bin/runc\"]",
    cri: None,
    own_runtime: true,
    unwatched: None,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_on("strict_arms_every_container_before_its_entry_point", STRICT, strict),
        test_alone("events_arm_nearly_every_container_and_driftd_reports_which", "", by_events),
        test_on("a_pods_containers_are_armed_before_they_start", STRICT_PODS, pods),
        test_on("a_runtime_that_was_upgraded_is_still_watched", STRICT, upgraded),
        test_on("a_runtime_within_a_container_is_not_held", STRICT, runtime_inside),
        test_alone("a_busy_container_is_removed_and_leaves_nothing", "", removed),
        test_alone("a_huge_program_is_reported_without_a_hash_and_delays_no_other", "", huge),
        test_on("containers_start_while_driftd_is_stopped_or_killed", STRICT, stopped),
    ]
}

const STRICT_PODS: Setup = Setup { cri: Some(""), ..STRICT };

/// Processes that keep every processor busy.
struct Load(Vec<Child>);

impl Load {
    fn start() -> anyhow::Result<Load> {
        let count = thread::available_parallelism()?.get() * 2;
        let mut load = Load(Vec::new());
        for _ in 0..count {
            let busy = ["-c", "while :; do :; done"];
            load.0.push(Command::new("sh").args(busy).stdin(Stdio::null()).spawn()?);
        }
        Ok(load)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Exits within a millisecond or two.
const SHORT: &str = "/usr/bin/app";

/// Starts a container whose entry point differs from the image and lives for a millisecond.
/// Returns its ID.
fn start_changed(node: &Node) -> anyhow::Result<String> {
    let id = node.run_plainly(&[], &[SHORT])?;
    wait_until_stopped(node, &id)?;
    node.ctr(&["tasks", "rm", &id])?;
    let upper = node.upperdir(&id)?;
    let entry = upper.join(SHORT.trim_start_matches('/'));
    fs::create_dir_all(entry.parent().context("a path with a parent")?)?;
    let mark = format!("{} {id} entry", node.namespace);
    executable::write(&entry, &bench()?.payload.marked(&mark))?;
    node.ctr(&["tasks", "start", "-d", "--null-io", &id])?;
    Ok(id)
}

fn wait_until_stopped(node: &Node, id: &str) -> anyhow::Result<()> {
    wait_for(&format!("the task of {id} to end"), || {
        let tasks = node.ctr(&["tasks", "ls"])?;
        Ok((state_in(&tasks, id) == Some("STOPPED")).then_some(()))
    })
}

/// Starts several such containers on a busy machine; returns their IDs.
fn start_many_changed(node: &Node) -> anyhow::Result<Vec<String>> {
    // The baseline exists from now on.
    node.container()?;
    let _load = Load::start()?;
    (0..STARTS).map(|_| start_changed(node)).collect()
}

/// Whether driftd reports that a container was armed before it started.
fn armed(node: &Node, id: &str) -> anyhow::Result<bool> {
    let known = node.answer(&["containers"])?;
    let container = known.iter().find(|container| container["id"] == id);
    let container = container.with_context(|| format!("{id} is not known"))?;
    container["armed_before_start"].as_bool().context("no answer")
}

/// Whether the changed entry point was seen running.
fn seen(node: &Node, id: &str) -> anyhow::Result<bool> {
    let findings = node.answer(&["findings", "--container", id])?;
    Ok(findings.iter().any(|finding| finding["kind"] == "exec.modified"))
}

const STARTS: usize = 30;

fn strict(node: &Node) -> anyhow::Result<()> {
    let ids = start_many_changed(node)?;
    let mut late = 0;
    for id in &ids {
        // A start is held for half a second at most. Then the container runs, and is named.
        let is_late = wait_for(&format!("the entry point of {id} to be reported"), || {
            let is_late = !armed(node, id)? && node.losses("armed_late")? > late;
            Ok((is_late || seen(node, id)?).then_some(is_late))
        })?;
        late += u64::from(is_late);
        ensure!(is_late || armed(node, id)?, "{id} was not armed before its start");
    }
    ensure!(late * 10 <= STARTS as u64, "{late} of {STARTS} were armed too late");
    Ok(())
}

fn by_events(node: &Node) -> anyhow::Result<()> {
    let ids = start_many_changed(node)?;
    // By then the events of the last one have come.
    let (mut were_armed, mut were_seen) = (0, 0);
    thread::sleep(Duration::from_secs(5));
    for id in &ids {
        if armed(node, id)? {
            wait_for(&format!("the entry point of {id}, which was armed, to be seen"), || {
                Ok(seen(node, id)?.then_some(()))
            })?;
            were_armed += 1;
        }
        were_seen += usize::from(seen(node, id)?);
    }
    eprintln!("by events: {were_armed} of {STARTS} armed before start, {were_seen} seen");
    Ok(())
}

fn pods(node: &Node) -> anyhow::Result<()> {
    let pause = node.path("pause.tar");
    programs::write_pause(&pause, &bench()?.payload)?;
    for image in [&pause, &bench()?.workbench] {
        node.ctr_in(KUBERNETES, &["images", "import", &image.to_string_lossy()])?;
    }
    for _ in 0..3 {
        let (sandbox, container) = node.pod_of(programs::WORKBENCH)?;
        ensure!(armed(node, &sandbox)?, "the sandbox was armed late");
        ensure!(armed(node, &container.id)?, "the container was armed late");
    }
    assert_eq!(node.losses("armed_late")?, 0);
    Ok(())
}

fn upgraded(node: &Node) -> anyhow::Result<()> {
    node.container()?;
    for _ in 0..3 {
        node.renew_runtime()?;
        // driftd checks the runtimes four times a second.
        thread::sleep(Duration::from_secs(1));
        let id = start_changed(node)?;
        wait_for("the entry point to be reported", || Ok(seen(node, &id)?.then_some(())))?;
        ensure!(armed(node, &id)?, "not armed after the upgrade");
    }
    assert_eq!(node.losses("armed_late")?, 0);
    Ok(())
}

fn runtime_inside(node: &Node) -> anyhow::Result<()> {
    let runtime = format!("type=bind,src={},dst=/mnt,options=rbind:ro", node.path("bin").display());
    let container = node.container_with(&["--mount", &runtime])?;
    // A process that calls itself a shim.
    let commands = "cp $(command -v bash) /tmp/containerd-shim-runc-v2; i=0
        while [ $i -lt 20 ]; do
            /tmp/containerd-shim-runc-v2 -c '/mnt/runc --version' -namespace x -address y \
                >/dev/null 2>&1 || true
            i=$((i+1))
        done; true";
    let began = Instant::now();
    container.sh(commands)?;
    let took = began.elapsed();
    ensure!(took < Duration::from_secs(5), "20 runs took {took:?}");
    assert_eq!(node.losses("armed_late")?, 0);
    // A runtime that a shell of the host starts is not held either.
    let began = Instant::now();
    let output = Command::new(node.path("bin/runc")).arg("--version").output()?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(began.elapsed() < Duration::from_secs(2), "held for {:?}", began.elapsed());
    Ok(())
}

fn stopped(node: &Node) -> anyhow::Result<()> {
    node.container()?;
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        kill(node.driftd_pid()?, signal)?;
        let began = Instant::now();
        let id = node.run_plainly(&[], &["/bin/sleep", "1000"]);
        let took = began.elapsed();
        if id.is_err() {
            let _ = kill(node.driftd_pid()?, Signal::SIGKILL);
        }
        let id = id?;
        eprintln!("a container started in {took:?} after {signal}");
        ensure!(took < Duration::from_secs(10), "its start took {took:?}");
        // The guardian has ended a driftd that was stopped.
        assert_eq!(node.driftd_ended(DEADLINE)?, Some(Signal::SIGKILL));
        node.start_driftd()?;
        node.wait_until_watched(&id)?;
        // It ran before driftd, which is no failure to arm it.
        ensure!(!armed(node, &id)?, "{id} ran before driftd did");
        assert_eq!(node.losses("armed_late")?, 0);
    }
    Ok(())
}

/// How many files a process has open, and how many of these lie below `directory`.
fn open_files(
    pid: nix::unistd::Pid,
    directory: &std::path::Path,
) -> anyhow::Result<(usize, usize)> {
    let (mut all, mut below) = (0, 0);
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        all += 1;
        below += usize::from(target.starts_with(directory));
    }
    Ok((all, below))
}

fn removed(node: &Node) -> anyhow::Result<()> {
    node.container()?.diff()?;
    let daemon = node.driftd_pid()?;
    let (before, _) = open_files(daemon, &node.path("driftd"))?;
    let mounts = || -> anyhow::Result<usize> {
        let all = fs::read_to_string("/proc/self/mountinfo")?;
        let place = node.path("state");
        Ok(all.lines().filter(|line| line.contains(place.to_str().unwrap_or("/"))).count())
    };
    let mounts_before = mounts()?;
    // New programs as fast as possible, and a large one that takes long to hash.
    let commands = "cp /bin/busybox /tmp/large; dd if=/dev/zero of=/tmp/large bs=1 count=0 \
        seek=900M 2>/dev/null; /tmp/large true; i=0
        while :; do cp /bin/busybox /tmp/b$i; echo $i >> /tmp/b$i; /tmp/b$i true; i=$((i+1)); done";
    for _ in 0..8 {
        let id = node.run_plainly(&[], &["/bin/sh", "-c", commands])?;
        wait_for("drift to be reported", || {
            Ok((!node.answer(&["findings", "--container", &id])?.is_empty()).then_some(()))
        })?;
        node.ctr(&["tasks", "kill", "--signal", "SIGKILL", &id])?;
        wait_until_stopped(node, &id)?;
        node.ctr(&["tasks", "rm", &id])?;
        node.ctr(&["containers", "rm", &id])?;
        // A busy mount would stay, and be named in containerd's log.
        assert_eq!(mounts()?, mounts_before);
    }
    let log = fs::read_to_string(node.path("containerd.log"))?;
    ensure!(!log.contains("device or resource busy"), "{log}");
    wait_for("driftd's files to be closed", || {
        let (now, _) = open_files(daemon, &node.path("driftd"))?;
        Ok((now <= before + 8).then_some(()))
    })
}

fn huge(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh(
        "cp /.control/x /tmp/huge; dd if=/dev/zero of=/tmp/huge bs=1 count=0 seek=10G 2>/dev/null
         cp /.control/x /tmp/large; dd if=/dev/zero of=/tmp/large bs=1 count=0 seek=128M 2>/dev/null
         /tmp/huge; /tmp/large; cp /.control/x /tmp/small; /tmp/small",
    )?;
    let began = Instant::now();
    let reported = |path: &str| -> anyhow::Result<serde_json::Value> {
        wait_for(&format!("{path} to be reported"), || {
            let findings = container.findings()?;
            Ok(findings
                .into_iter()
                .find(|finding| finding["kind"] == "exec.new" && finding["file"]["path"] == path))
        })
    };
    let huge = reported("/tmp/huge")?;
    assert_eq!(huge["file"]["unhashed"], "size", "{huge:#}");
    assert_eq!(huge["file"]["blake3"], serde_json::Value::Null, "{huge:#}");
    reported("/tmp/small")?;
    eprintln!("a small program was reported after {:?}, behind a large one", began.elapsed());
    let large = reported("/tmp/large")?;
    ensure!(large["file"]["blake3"].is_string(), "{large:#}");
    Ok(())
}
