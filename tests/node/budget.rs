//! How much driftd keeps: what a container can make more of without end is bounded in
//! bytes, and neither what is worse nor an answer is lost for it.

use std::fs;
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, end, only, wait_for};
use crate::trial_alone;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial_alone(
            "x03_labels_without_end_take_a_bounded_number_of_bytes_in_memory_and_history",
            "",
            x03_labels,
        ),
        trial_alone(
            "x12_no_flood_of_large_findings_keeps_a_program_in_memory_from_its_answer",
            "[respond]\nkill_on = [\"exec.fileless\"]",
            x12_fileless,
        ),
        trial_alone(
            "x18_a_history_that_is_removed_is_a_named_loss_and_has_again_what_is_known",
            "",
            x18_history_removed,
        ),
    ]
}

/// Bytes of memory that the daemon has.
fn resident(node: &Node) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", node.driftd_pid()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes << 10)
}

/// Bytes of the history's file and of what is beside it.
fn history(node: &Node) -> u64 {
    let names = ["driftd/history.db", "driftd/history.db-wal"];
    names.iter().filter_map(|name| fs::metadata(node.path(name)).ok()).map(|one| one.len()).sum()
}

fn wait_for_findings(container: &Container<'_>, number: usize) -> anyhow::Result<Vec<Value>> {
    wait_for("the findings", || {
        let findings = container.findings()?;
        Ok((findings.len() >= number).then_some(findings))
    })
}

/// Follows the history and never reads what it is sent.
fn follower(node: &Node) -> anyhow::Result<Child> {
    let mut command = node.driftd_command(&["findings", "--follow", "-o", "jsonl"]);
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?)
}

fn x03_labels(node: &Node) -> anyhow::Result<()> {
    const PROGRAMS: usize = 200;
    let value = "v".repeat(4000);
    let labels: Vec<String> =
        (0..150).map(|number| format!("example.test/label-{number}={value}")).collect();
    let mut options: Vec<&str> = labels.iter().flat_map(|label| ["--label", label]).collect();
    options.extend(["--label", "team=shop"]);
    let container = node.container_with(&options)?;
    let (memory, bytes) = (resident(node)?, history(node));
    container.sh(&format!(
        "i=0; while [ $i -lt {PROGRAMS} ]; do
             printf '#!/bin/true %s\\n' $i > /tmp/$i; chmod 755 /tmp/$i; /tmp/$i; i=$((i+1))
         done"
    ))?;
    let findings = wait_for_findings(&container, PROGRAMS)?;
    let labels = findings[0]["container"]["labels"].as_object().context("no labels")?;
    ensure!(labels["team"] == "shop", "{labels:#?}");
    let kept: usize = labels.iter().map(|(name, value)| name.len() + value.to_string().len()).sum();
    ensure!(labels.len() <= 64 && kept < 9000, "{} labels of {kept} bytes", labels.len());
    let cut = labels["driftd.io/cut"].as_str().context("the cut is not marked")?;
    ensure!(cut.contains("labels left out"), "{cut}");
    let each = history(node).saturating_sub(bytes) / PROGRAMS as u64;
    ensure!(each < 24 << 10, "{each} bytes a finding in the history");
    let grown = resident(node)?.saturating_sub(memory);
    ensure!(grown < 32 << 20, "{grown} bytes more in memory");

    // Followers that read nothing share what they may hold.
    let memory = resident(node)?;
    let mut followers = Vec::new();
    for _ in 0..20 {
        followers.push(follower(node)?);
    }
    thread::sleep(Duration::from_secs(3));
    let held = resident(node)?.saturating_sub(memory);
    followers.iter_mut().for_each(end);
    eprintln!("x03/x17: {each} bytes a finding on disk, {grown} in memory, {held} for followers");
    ensure!(held < 40 << 20, "{held} bytes more in memory for followers");
    Ok(())
}

/// Runs programs whose findings hold as many arguments as findings may, until there is
/// no room for more of them.
fn flood(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let long = "x".repeat(4000);
    // Of programs that end at once the arguments are not always known.
    let mut begin = 0;
    while node.losses("findings_full")? == 0 {
        let end = begin + 300;
        ensure!(end < 6000, "the budget is never full");
        container.sh(&format!(
            "i={begin}; while [ $i -lt {end} ]; do
                 printf '#!/bin/true %s\\n' $i > /tmp/$i; chmod 755 /tmp/$i
                 /tmp/$i {long} {long} {long} {long} {long}; i=$((i+1))
             done"
        ))?;
        begin = end;
    }
    let status = node.status()?;
    ensure!(status["complete"] == false, "{status:#}");
    ensure!(status["problems"].to_string().contains("findings_full"), "{status:#}");
    Ok(())
}

fn is_killed(container: &Container<'_>, kind: &str) -> anyhow::Result<()> {
    let answered = wait_for("the answer", || {
        let findings = container.findings()?;
        let told = only(&findings, kind);
        Ok(told.ok().filter(|told| told["outcome"]["succeeded"] == true).cloned())
    })?;
    ensure!(answered["verdict"]["disposition"] == "kill", "{answered:#}");
    Ok(())
}

fn x12_fileless(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    flood(node, &container)?;
    container.lay_payload("x")?;
    let _running = container.begin("/usr/bin/loader memfd 1 /.control/x 300")?;
    is_killed(&container, "exec.fileless")
}

fn x18_history_removed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; /tmp/x")?;
    let before = container.told(&["critical exec.new /tmp/x"])?;
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(node.path(&format!("driftd/history.db{suffix}")))?;
    }
    wait_for("the loss to be named", || Ok((node.losses("history_gone")? > 0).then_some(())))?;
    let after = wait_for_findings(&container, 1)?;
    assert_eq!(after, before, "what is known is there again");
    ensure!(node.path("driftd/history.db").exists());
    container.sh("cp /.control/x /tmp/y; echo >> /tmp/y; /tmp/y")?;
    let findings = wait_for_findings(&container, 2)?;
    ensure!(findings.iter().any(|one| one["file"]["path"] == "/tmp/y"), "{findings:#?}");
    Ok(())
}
