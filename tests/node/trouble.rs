//! Trouble on a node: crashes, stops, damaged files, bad settings. The daemon names what it
//! lost, finds it again, and reports nothing twice.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::Layer;
use crate::node::{Container, DEADLINE, Node, bench, wait_for};
use crate::programs::{self, WORKBENCH};
use crate::{test_alone, test_without_node};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("a46_a_restart_during_drift_reports_nothing_twice", "", restarted),
        test_alone("kill_9_during_drift_loses_nothing_and_repeats_nothing", "", crashed),
        test_alone("containerd_killed_and_restarted_loses_nothing", "", containerd_restarted),
        test_alone("containerd_that_is_not_there_yet_is_waited_for", "", containerd_late),
        test_alone("a_corrupt_baseline_is_recorded_again", "", corrupt_baseline),
        test_alone("a_newer_history_is_refused_by_name", "", newer_history),
        test_alone("an_image_with_a_missing_blob_stops_no_other", "", missing_blob),
        test_alone("a_second_daemon_is_refused", "", second_daemon),
        test_without_node("unreadable_settings_are_refused_by_name", unreadable_settings),
        test_without_node("an_unknown_setting_is_refused_by_name", unknown_setting),
        test_without_node("a_wrong_socket_is_named", wrong_socket),
        test_without_node("without_root_the_daemon_ends_and_names_root", not_root),
        test_without_node("without_fanotify_the_daemon_ends_and_names_the_capability", no_fanotify),
    ]
}

// ---- crashes and restarts

fn restarted(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.lay_payload("y")?;
    container.sh("cp /.control/x /tmp/x; /tmp/x; rm /usr/bin/wget")?;
    container.diff()?;
    let before = container
        .expect_findings(&["critical exec.new /tmp/x", "low file.removed /usr/bin/wget"])?;

    node.stop_driftd()?;
    container.sh("cp /.control/y /tmp/y; /tmp/y")?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    // driftd did not see /tmp/y run, but the file is there.
    let after = container.expect_findings(&[
        "critical exec.new /tmp/x",
        "low file.removed /usr/bin/wget",
        "low file.added /tmp/y",
    ])?;
    same_as_before(&before, &after)
}

/// Makes sure that every finding of `before` is unchanged in `after`.
fn same_as_before(before: &[Value], after: &[Value]) -> anyhow::Result<()> {
    let by_id: BTreeMap<&str, &Value> =
        after.iter().filter_map(|finding| Some((finding["id"].as_str()?, finding))).collect();
    ensure!(by_id.len() == after.len(), "two findings share an id: {after:#?}");
    for old in before {
        let id = old["id"].as_str().context("no id")?;
        let new = by_id.get(id).with_context(|| format!("{id} was lost: {old:#}"))?;
        ensure!(new["first_seen"] == old["first_seen"], "{id} began anew: {old:#} {new:#}");
        ensure!(new["count"] == old["count"], "{id} was counted twice: {old:#} {new:#}");
        ensure!(new["revision"] == old["revision"], "{id} was reported twice: {old:#} {new:#}");
    }
    Ok(())
}

const FLOOD: usize = 120;

/// The findings when the flood is well under way.
fn some_of_the_flood(container: &Container<'_>) -> anyhow::Result<Vec<Value>> {
    wait_for("some drift", || {
        let findings = container.findings()?;
        Ok((findings.len() >= 20).then_some(findings))
    })
}

/// Commands that drop and run `FLOOD` programs, each of its own content.
fn flood(container: &Container<'_>) -> anyhow::Result<String> {
    container.lay_payload("x")?;
    Ok(format!(
        "i=0; while [ $i -lt {FLOOD} ]; do\n\
         d=/tmp/$((i%10)); mkdir -p $d; cp /.control/x $d/d$i; echo $i >> $d/d$i; $d/d$i\n\
         sleep 0.02; i=$((i+1)); done"
    ))
}

/// Waits for a finding about each of the flood's files, and exactly one.
fn flood_was_reported_once(container: &Container<'_>) -> anyhow::Result<Vec<Value>> {
    let mut findings = Vec::new();
    let waited = wait_for("the whole flood", || {
        findings = container.findings()?;
        Ok((findings.len() >= FLOOD).then_some(()))
    });
    thread::sleep(crate::node::SETTLE + Duration::from_millis(500));
    container.diff()?;
    thread::sleep(Duration::from_millis(500));
    findings = container.findings()?;
    let mut reported: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for finding in &findings {
        let path = finding["file"]["path"].as_str().context("no path")?.to_owned();
        reported.entry(path).or_default().push(finding["kind"].as_str().context("no kind")?);
    }
    for number in 0..FLOOD {
        // In directories of their own: many dropped files of one directory are one finding.
        let path = format!("/tmp/{}/d{number}", number % 10);
        let kinds = reported.remove(&path).unwrap_or_default();
        ensure!(
            matches!(kinds[..], ["exec.new" | "file.added"]),
            "{path} was reported as {kinds:?} (waiting: {waited:?})"
        );
    }
    ensure!(reported.is_empty(), "the flood did not make {reported:?}");
    Ok(findings)
}

fn crashed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let commands = flood(&container)?;
    let running = container.begin(&commands)?;
    let before = some_of_the_flood(&container)?;
    node.crash_driftd()?;
    // The flood goes on: nothing blocks in a container without a driftd.
    thread::sleep(Duration::from_secs(1));
    node.start_driftd()?;
    running.finish(DEADLINE)?;
    container.wait_until_watched()?;
    let after = flood_was_reported_once(&container)?;
    // A dropped file may have got another finding, by its execution.
    let firm: Vec<Value> =
        before.iter().filter(|finding| finding["kind"] == "exec.new").cloned().collect();
    same_as_before(&firm, &after)?;
    history_is_whole(&node.path("driftd/history.db"))
}

fn history_is_whole(file: &Path) -> anyhow::Result<()> {
    let history =
        rusqlite::Connection::open_with_flags(file, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let verdict: String = history.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    assert_eq!(verdict, "ok");
    Ok(())
}

fn containerd_restarted(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let commands = flood(&container)?;
    let running = container.begin(&commands)?;
    let before = some_of_the_flood(&container)?;
    node.crash_containerd()?;
    wait_for("driftd to notice", || Ok((node.losses("containerd_lost")? > 0).then_some(())))?;
    node.start_containerd()?;
    running.finish(DEADLINE)?;
    wait_for("driftd to be connected again", || {
        let status = node.status()?;
        Ok((status["endpoints"][0]["connected"] == true).then_some(()))
    })?;
    container.wait_until_watched()?;
    let after = flood_was_reported_once(&container)?;
    let firm: Vec<Value> =
        before.iter().filter(|finding| finding["kind"] == "exec.new").cloned().collect();
    same_as_before(&firm, &after)?;
    for finding in &after {
        ensure!(finding["kind"] == "exec.new", "the gate never went away, but: {finding:#}");
    }

    // A container that starts after that is watched too.
    let next = node.container()?;
    next.expect_silence()
}

fn containerd_late(node: &Node) -> anyhow::Result<()> {
    node.stop_driftd()?;
    node.crash_containerd()?;
    node.start_driftd()?;
    let status = node.status()?;
    assert_eq!(status["complete"], false, "{status:#}");
    assert_eq!(status["endpoints"][0]["connected"], false, "{status:#}");
    node.start_containerd()?;
    let container = node.container()?;
    container.expect_silence()
}

// ---- damaged and missing files

fn corrupt_baseline(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    node.stop_driftd()?;
    let layers = node.path("driftd/baselines/layers");
    let mut files: Vec<PathBuf> = fs::read_dir(&layers)
        .with_context(|| format!("no {}", layers.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<anyhow::Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "layer"));
    files.sort();
    ensure!(files.len() >= 3, "only {files:?}");
    for file in &files {
        let mut bytes = fs::read(file)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(file, bytes)?;
    }
    node.start_driftd()?;
    container.wait_until_watched()?;
    ensure!(node.losses("baseline_corrupt")? > 0, "{:#}", node.status()?);
    container.sh("cp /bin/ls /bin/.cache-ls; /bin/.cache-ls; /usr/bin/app")?;
    container.expect_findings(&["medium exec.relocated /bin/.cache-ls"]).map(drop)
}

fn newer_history(node: &Node) -> anyhow::Result<()> {
    node.stop_driftd()?;
    let file = node.path("driftd/history.db");
    let history = rusqlite::Connection::open(&file)?;
    let format: i64 = history.pragma_query_value(None, "user_version", |row| row.get(0))?;
    history.pragma_update(None, "user_version", 999)?;
    drop(history);
    let output = Command::new(env!("CARGO_BIN_EXE_driftd"))
        .arg("run")
        .arg("--config")
        .arg(node.path("driftd.toml"))
        .output()?;
    refused(&output, 2, &["history.db", "999"])?;
    // The history was not touched: with its number put back, driftd starts.
    rusqlite::Connection::open(&file)?.pragma_update(None, "user_version", format)?;
    node.start_driftd()
}

fn missing_blob(node: &Node) -> anyhow::Result<()> {
    let image = "registry.test/broken:1";
    let file = node.path("broken.tar");
    let layer = Layer::new().file("/bin/tool", 0o755, b"#!/bin/sh\n");
    let digests = crate::image::write(&file, image, vec![layer])?;
    node.stop_driftd()?;
    node.ctr(&["images", "import", "--no-unpack", &file.to_string_lossy()])?;
    let config = digests.config.strip_prefix("sha256:").context("a digest has a prefix")?;
    let blobs = node.path("root/io.containerd.content.v1.content/blobs/sha256");
    fs::remove_file(blobs.join(config)).context("the blob is not where containerd keeps it")?;
    node.start_driftd()?;

    let output = node.driftd(&["baseline", "record", image])?;
    refused(&output, 2, &[image])?;
    let container = node.container_of(WORKBENCH)?;
    container.expect_silence()
}

fn second_daemon(node: &Node) -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_driftd"))
        .arg("run")
        .arg("--config")
        .arg(node.path("driftd.toml"))
        .output()?;
    refused(&output, 2, &["another driftd"])?;
    // The first one was not disturbed.
    ensure!(node.driftd(&["status"])?.status.success(), "the first daemon no longer answers");
    node.container()?.expect_silence()
}

// ---- bad input, without a node

/// driftd ended with `code` and its message has all of `words`.
fn refused(output: &Output, code: i32, words: &[&str]) -> anyhow::Result<()> {
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "ended with {}: {message}", output.status);
    for word in words {
        ensure!(message.contains(word), "`{word}` is not in: {message}");
    }
    Ok(())
}

/// A directory with settings that keep a daemon apart from every other.
fn settings(more: &str) -> anyhow::Result<(tempfile::TempDir, PathBuf)> {
    let directory =
        tempfile::Builder::new().prefix("settings.").tempdir_in(bench()?.scratch.path())?;
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let file = directory.path().join("driftd.toml");
    let place = directory.path().display();
    fs::write(
        &file,
        format!(
            "state_dir = \"{place}/state\"\nsocket = \"{place}/driftd.sock\"\n\
             [containerd]\nsockets = [\"{place}/containerd.sock\"]\n{more}\n"
        ),
    )?;
    Ok((directory, file))
}

/// Runs the daemon, which must end by itself, through `wrapper`.
fn run_with(wrapper: &[&str], settings: &Path) -> anyhow::Result<Output> {
    let mut words = vec!["timeout", "--kill-after=1", "20"];
    words.extend(wrapper);
    Ok(Command::new(words[0])
        .args(&words[1..])
        .arg(&bench()?.driftd)
        .args(["run", "--config"])
        .arg(settings)
        .output()?)
}

/// Runs the daemon by `setpriv` with these options. It must end and name `missing`.
fn run_restricted(options: &[&str], missing: &str) -> anyhow::Result<()> {
    let (_directory, file) = settings("")?;
    let setpriv = programs::find("setpriv")?;
    let setpriv = [setpriv.to_str().context("a path of Debian")?];
    refused(&run_with(&[&setpriv[..], options].concat(), &file)?, 2, &[missing])
}

fn unreadable_settings() -> anyhow::Result<()> {
    let missing = Path::new("/nonexistent/driftd.toml");
    refused(&run_with(&[], missing)?, 64, &["/nonexistent/driftd.toml"])
}

fn unknown_setting() -> anyhow::Result<()> {
    let (_directory, file) = settings("[respond]\nkil_on = []")?;
    refused(&run_with(&[], &file)?, 64, &["kil_on", "kill_on", "driftd.toml"])
}

fn wrong_socket() -> anyhow::Result<()> {
    let output = Command::new(env!("CARGO_BIN_EXE_driftd"))
        .args(["status", "--socket", "/nonexistent/driftd.sock"])
        .output()?;
    refused(&output, 2, &["/nonexistent/driftd.sock", "is the daemon running"])
}

fn not_root() -> anyhow::Result<()> {
    run_restricted(&["--reuid=65534", "--regid=65534", "--clear-groups"], "root")
}

fn no_fanotify() -> anyhow::Result<()> {
    run_restricted(&["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"], "CAP_SYS_ADMIN")
}
