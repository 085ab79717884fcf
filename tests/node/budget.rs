//! How much driftd keeps. What a container can make without end is bounded in bytes, and
//! neither a more severe finding nor a response is lost because of it.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Deaf, Node, only, wait_for};
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone(
            "x03_labels_without_end_take_a_bounded_number_of_bytes_in_memory_and_history",
            "",
            x03_labels,
        ),
        test_alone(
            "x12_a_program_in_memory_is_killed_although_the_findings_are_full",
            "[respond]\nkill_on = [\"exec.fileless\"]",
            x12_fileless,
        ),
        test_alone(
            "x18_a_removed_history_is_a_named_loss_and_is_written_again",
            "",
            x18_history_removed,
        ),
    ]
}

/// Bytes of memory that the daemon has.
pub(crate) fn resident(node: &Node) -> anyhow::Result<u64> {
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

    // All followers that read nothing share one limit.
    let memory = resident(node)?;
    let followers: Vec<Deaf> = (0..20).map(|_| Deaf::start(node)).collect::<anyhow::Result<_>>()?;
    thread::sleep(Duration::from_secs(3));
    let held = resident(node)?.saturating_sub(memory);
    drop(followers);
    eprintln!("x03/x17: {each} bytes a finding on disk, {grown} in memory, {held} for followers");
    ensure!(held < 40 << 20, "{held} bytes more in memory for followers");
    Ok(())
}

/// Runs programs whose findings hold as many arguments as findings may, until the budget for
/// findings is full.
fn flood(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let long = "x".repeat(4000);
    // The arguments of programs that end at once are not always known.
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
        // The container may be faster than a busy machine judges it.
        wait_for("the batch to be judged", || {
            let status = node.status()?;
            let waits = status["backlogs"].as_array().into_iter().flatten();
            let is_judged = waits.filter(|one| one["stage"] != "settled").count() == 0;
            Ok((is_judged || node.losses("findings_full")? > 0).then_some(()))
        })?;
        begin = end;
    }
    let status = node.status()?;
    ensure!(status["complete"] == false, "{status:#}");
    ensure!(status["problems"].to_string().contains("findings_full"), "{status:#}");
    Ok(())
}

fn is_killed(container: &Container<'_>, kind: &str) -> anyhow::Result<()> {
    let killed = wait_for("the response", || {
        let findings = container.findings()?;
        let reported = only(&findings, kind);
        Ok(reported.ok().filter(|reported| reported["outcome"]["succeeded"] == true).cloned())
    })?;
    ensure!(killed["verdict"]["disposition"] == "kill", "{killed:#}");
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
    container.run_dropped("x")?;
    let before = container.expect_findings(&["critical exec.new /tmp/x"])?;
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(node.path(&format!("driftd/history.db{suffix}")))?;
    }
    wait_for("the loss to be named", || Ok((node.losses("history_gone")? > 0).then_some(())))?;
    let after = wait_for_findings(&container, 1)?;
    assert_eq!(after, before, "the findings are in the new history");
    ensure!(node.path("driftd/history.db").exists());
    container.sh("cp /.control/x /tmp/y; echo >> /tmp/y; /tmp/y")?;
    let findings = wait_for_findings(&container, 2)?;
    ensure!(findings.iter().any(|one| one["file"]["path"] == "/tmp/y"), "{findings:#?}");
    Ok(())
}
