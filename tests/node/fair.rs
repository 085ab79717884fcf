//! One container's flood delays no findings of another container: hashing, scanning and
//! describing is done by turns of containers.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, SETTLE, bench, wait_within};
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("x10_huge_sparse_programs_delay_no_neighbour", "", x10_holes),
        test_alone("x10_large_programs_take_turns_and_their_delay_is_shown", "", x10_turns),
        test_alone(
            "h04_huge_programs_that_are_touched_all_the_time_delay_no_neighbour",
            "",
            h04_touched,
        ),
    ]
}

/// How late a neighbour's finding may be. Alone it takes some milliseconds; tests run
/// beside each other on few processors.
const SOON: Duration = Duration::from_secs(4);

/// Just below the largest file that is hashed (1 GiB).
const GIANT: u64 = 1000 << 20;

fn is_reported(container: &Container<'_>, kind: &str, path: &str) -> anyhow::Result<bool> {
    let findings = container.findings()?;
    let is_it = |finding: &Value| finding["kind"] == kind && finding["file"]["path"] == path;
    Ok(findings.iter().any(is_it))
}

/// Drops a program and executes it, drops another one, and waits until both are reported.
fn neighbour_is_reported_soon(calm: &Container<'_>) -> anyhow::Result<()> {
    calm.lay_payload("run")?;
    calm.lay_payload("dropped")?;
    calm.sh("cp /.control/run /tmp/run; /tmp/run; cp /.control/dropped /tmp/dropped")?;
    let began = Instant::now();
    wait_within(SOON, "the neighbour's execution to be reported", || {
        Ok(is_reported(calm, "exec.new", "/tmp/run")?.then_some(()))
    })?;
    let left = (SETTLE + SOON).saturating_sub(began.elapsed());
    wait_within(left, "the neighbour's dropped program to be reported", || {
        Ok(is_reported(calm, "file.added", "/tmp/dropped")?.then_some(()))
    })
}

fn x10_holes(node: &Node) -> anyhow::Result<()> {
    let (noisy, calm) = (node.container()?, node.container()?);
    noisy.lay_payload("x")?;
    noisy.sh(&format!(
        "for i in $(seq 60); do cp /.control/x /tmp/h$i; echo $i >> /tmp/h$i\n\
         busybox truncate -s {GIANT} /tmp/h$i; /tmp/h$i; done"
    ))?;
    // They have settled, and are being examined.
    thread::sleep(SETTLE + Duration::from_millis(500));
    neighbour_is_reported_soon(&calm)?;
    let run = wait_within(Duration::from_secs(10), "all huge programs to be reported", || {
        let findings = noisy.findings()?;
        let reported: Vec<Value> =
            findings.into_iter().filter(|finding| finding["kind"] == "exec.new").collect();
        Ok((reported.len() >= 60).then(|| reported[0].clone()))
    })?;
    ensure!(run["file"]["unhashed"].is_null() && !run["file"]["blake3"].is_null(), "{run:#}");
    ensure!(run["file"]["sha256"].is_null(), "zeros were hashed for nothing: {run:#}");
    Ok(())
}

fn h04_touched(node: &Node) -> anyhow::Result<()> {
    let (noisy, calm) = (node.container()?, node.container()?);
    noisy.lay_payload("x")?;
    let touching = noisy.begin(&format!(
        "for i in $(seq 40); do cp /.control/x /tmp/h$i; echo $i >> /tmp/h$i\n\
         busybox truncate -s {GIANT} /tmp/h$i; done\n\
         for round in 1 2 3 4; do sleep 2; touch /tmp/h*; done"
    ))?;
    thread::sleep(SETTLE + Duration::from_millis(2500));
    neighbour_is_reported_soon(&calm)?;
    let ran = touching.finish(Duration::from_secs(30))?;
    ensure!(ran.status == 0, "{ran:?}");
    Ok(())
}

/// A program followed by a few bytes of data in each segment of a long file: all of it
/// has to be hashed, and little has to be written.
fn write_comb(directory: &Path, name: &str, len: u64) -> anyhow::Result<()> {
    let program = bench()?.payload.marked(name);
    let path = directory.join(name);
    let file = File::create(&path)?;
    file.write_all_at(&program, 0)?;
    let begin = (program.len() as u64).next_multiple_of(64 << 10);
    for offset in (begin..len).step_by(64 << 10) {
        file.write_all_at(name.as_bytes(), offset)?;
    }
    file.set_len(len)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn x10_turns(node: &Node) -> anyhow::Result<()> {
    // In memory: a disk takes its time with so many extents.
    let combs = tempfile::Builder::new().prefix("driftd-combs.").tempdir_in("/dev/shm")?;
    let names: Vec<String> = (0..5).map(|number| format!("comb{number}")).collect();
    for name in &names {
        write_comb(combs.path(), name, GIANT)?;
    }
    write_comb(combs.path(), "calm", 20 << 20)?;
    let source = combs.path().display();
    let mount = format!("type=bind,src={source},dst=/combs,options=rbind:ro");
    let container = || node.container_with(&["--mount", &mount]);
    let (noisy, calm) = (container()?, container()?);
    let reported_of_noisy = || -> anyhow::Result<usize> {
        let findings = noisy.findings()?;
        Ok(findings.iter().filter(|finding| finding["kind"] == "exec.tmpfs").count())
    };
    noisy.sh(&names.iter().map(|name| format!("/combs/{name}\n")).collect::<String>())?;
    calm.sh("/combs/calm")?;
    wait_within(Duration::from_secs(12), "the neighbour's large program to be reported", || {
        Ok(is_reported(&calm, "exec.tmpfs", "/combs/calm")?.then_some(()))
    })?;
    let status = node.status()?;
    // On a fast machine too: it did not wait for all that came before it.
    ensure!(reported_of_noisy()? < names.len(), "the neighbour's program was reported last");
    let backlogs = status["backlogs"].as_array().context("status has no backlogs")?;
    let of_noisy = format!("{}/{}", node.namespace, noisy.id);
    let large = backlogs
        .iter()
        .find(|backlog| backlog["stage"] == "large" && backlog["container"] == of_noisy.as_str());
    ensure!(large.is_some_and(|large| large["waiting"].as_u64() > Some(0)), "{backlogs:#?}");
    // Waiting files delay no stop.
    let began = Instant::now();
    node.stop_driftd()?;
    ensure!(began.elapsed() < Duration::from_secs(5), "a stop took {:?}", began.elapsed());
    Ok(())
}
