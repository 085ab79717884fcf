//! What clients ask of driftd: baselines, the stream of findings, and the responses kill,
//! pause and resume.

use std::io::{BufRead as _, BufReader, Read};
use std::process::Stdio;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::Layer;
use crate::node::{Node, bench, only, talk, wait_for, wait_within};
use crate::programs::WORKBENCH;
use crate::sources::export_equals_mount;
use crate::{test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("an_image_is_recorded_before_any_container_starts", recorded_at_import),
        test("an_exported_baseline_equals_the_files_of_the_image", export_equals_files),
        test("the_gate_is_armed_when_a_container_starts", armed),
        test("diff_reports_every_difference_and_exits_with_1", diff_reports),
        test("findings_are_filtered_and_shown_whole", filtered_and_shown),
        test_alone("a_follower_sees_findings_live_and_goes_on_after_a_stop", "", follow),
        test("kill_on_request_ends_the_container_and_is_recorded", kill_on_request),
        test("pause_and_resume_are_carried_out_and_recorded", pause_and_resume),
        test("a_response_needs_a_reason_and_a_known_container", response_refused),
        test_alone(
            "a_setting_kills_on_a_new_program",
            "[respond]\nkill_on = [\"exec.new\"]",
            kill_by_setting,
        ),
        test_alone("a_deleted_image_keeps_judging_its_container", "", deleted_image),
    ]
}

fn recorded_at_import(node: &Node) -> anyhow::Result<()> {
    let image = "registry.test/never-started:1";
    let digests = node.import_layers(
        image,
        vec![
            Layer::new().file("/etc/one", 0o644, b"one"),
            Layer::new().file("/bin/two", 0o755, b"#!/bin/sh\n").whiteout("/etc/one"),
        ],
    )?;
    let baseline = wait_for("the baseline", || node.baseline_of(image))?;
    assert_eq!(baseline["manifest_digest"], digests.manifest.as_str());
    assert_eq!(baseline["layers"].as_array().map(Vec::len), Some(2), "{baseline:#}");
    assert_eq!(baseline["files"], 1, "the whiteout hides the other: {baseline:#}");
    // It is found by its name, and by the beginning of its digest.
    let manifest = digests.manifest.trim_start_matches("sha256:");
    for name in [image, &manifest[..12]] {
        let shown = node.driftd(&["baseline", "show", name])?;
        ensure!(shown.status.success(), "{name}: {}", talk(&shown));
        let shown = String::from_utf8(shown.stdout)?;
        ensure!(shown.contains(image) && shown.contains(manifest), "{name}: {shown}");
    }
    Ok(())
}

/// Compares `baseline export` with the files of the unpacked image, as an independent
/// program reads them.
fn export_equals_files(node: &Node) -> anyhow::Result<()> {
    wait_for("the baseline", || node.baseline_of(WORKBENCH))?;
    let files = export_equals_mount(node, WORKBENCH)?;
    ensure!(files.len() > 40, "the image has only {} files", files.len());
    let has = |path: &str| files.contains_key(path.as_bytes());
    ensure!(!has("/usr/bin/left-behind"), "the whiteout was not applied");
    ensure!(!has("/opt/old/tool"), "the opaque directory was not applied");

    // The other format is `b3sum`'s own, and it checks the image by itself.
    let list = node.path("exported.b3sum");
    let output = node.driftd(&["baseline", "export", WORKBENCH])?;
    ensure!(output.status.success(), "{}", talk(&output));
    std::fs::write(&list, output.stdout)?;
    let mounted = tempfile::Builder::new().prefix("mounted.").tempdir_in(node.directory.path())?;
    let target = mounted.path().to_string_lossy();
    node.ctr(&["images", "mount", WORKBENCH, &target])?;
    let checked = std::process::Command::new(crate::programs::find("b3sum")?)
        .args(["--check", "--quiet"])
        .arg(&list)
        .current_dir(mounted.path())
        .output();
    node.ctr(&["images", "unmount", "--rm", &target])?;
    let checked = checked?;
    ensure!(checked.status.success(), "{}", talk(&checked));
    Ok(())
}

/// Whether the gate is armed before the entry point runs is a race, which containerd's
/// events usually win. That driftd watches soon after is certain.
fn armed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let known = node.answer(&["containers"])?;
    let this = known.iter().find(|one| one["id"] == container.id.as_str());
    let this = this.context("`driftd containers` does not know it")?;
    assert_eq!(this["namespace"], node.namespace.as_str());
    assert_eq!(this["image"]["name"], WORKBENCH);
    assert_eq!(this["image"]["manifest_digest"], bench()?.digests.manifest.as_str());
    assert_eq!(this["snapshotter"], "overlayfs");
    ensure!(this["pid"].as_u64() > Some(0), "{this:#}");
    Ok(())
}

fn diff_reports(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let clean = node.driftd(&["diff", &container.id])?;
    assert_eq!(clean.status.code(), Some(0), "{}", talk(&clean));

    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; cat /.control/x > /usr/bin/curl; cp /bin/ls /bin/sl\n\
         rm /usr/bin/wget; chmod 0700 /usr/bin/app")?;
    let output = node.driftd(&["diff", &container.id, "-o", "jsonl"])?;
    assert_eq!(output.status.code(), Some(1), "{}", talk(&output));
    let mut reported: Vec<String> = String::from_utf8(output.stdout)?
        .lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line)?;
            let word = |name: &str| line[name].as_str().unwrap_or("-").to_owned();
            Ok(format!("{} {} {}", word("change"), word("path"), word("kind")))
        })
        .collect::<anyhow::Result<_>>()?;
    reported.sort();
    assert_eq!(
        reported,
        [
            "added /tmp/x file.added",
            "metadata /usr/bin/app -",
            "modified /usr/bin/curl file.modified",
            "relocated /bin/sl file.relocated",
            "removed /usr/bin/wget file.removed",
        ]
    );
    Ok(())
}

fn filtered_and_shown(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; /tmp/x; rm /usr/bin/wget")?;
    container.diff()?;
    let findings = container
        .expect_findings(&["critical exec.new /tmp/x", "low file.removed /usr/bin/wget"])?;
    let id = only(&findings, "exec.new")?["id"].as_str().context("no id")?.to_owned();

    let of_kind =
        node.answer(&["findings", "--container", &container.id, "--kind", "file.removed"])?;
    assert_eq!(crate::node::summaries(&of_kind), ["low file.removed /usr/bin/wget"]);
    let severe = node.answer(&["findings", "--container", &container.id, "--severity", "high"])?;
    assert_eq!(crate::node::summaries(&severe), ["critical exec.new /tmp/x"]);
    let output = node.driftd(&["findings", "--container", &container.id, "--exit-code"])?;
    assert_eq!(output.status.code(), Some(1), "{}", talk(&output));
    let text = String::from_utf8(output.stdout)?;
    ensure!(text.contains("exec.new") && text.contains("/tmp/x"), "{text}");

    let shown = node.driftd(&["show", &id[..12], "-o", "json"])?;
    assert_eq!(shown.status.code(), Some(0), "{}", talk(&shown));
    let mut shown: Value = serde_json::from_slice(&shown.stdout)?;
    let also_in = shown.as_object_mut().context("no object")?.remove("also_in");
    let containers = also_in.context("no also_in")?["containers"].clone();
    ensure!(containers.is_u64(), "{containers}");
    assert_eq!(&shown, only(&findings, "exec.new")?);
    assert_eq!(shown["schema"], "driftd.finding/v1");

    let unknown = node.driftd(&["findings", "--kind", "exec.odd"])?;
    assert_eq!(unknown.status.code(), Some(64), "{}", talk(&unknown));
    Ok(())
}

/// `driftd findings --follow`, line by line.
struct Follower {
    child: std::process::Child,
    lines: Receiver<String>,
    /// What it reports about the stream itself.
    notes: Receiver<String>,
}

impl Follower {
    fn start(node: &Node, more: &[&str]) -> anyhow::Result<Follower> {
        let mut child = node
            .driftd_command(&[&["findings", "--follow", "-o", "jsonl"], more].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = lines_of(child.stdout.take().context("stdout is piped")?);
        let notes = lines_of(child.stderr.take().context("stderr is piped")?);
        Ok(Follower { child, lines, notes })
    }

    fn next(&self) -> anyhow::Result<Value> {
        let line = self.lines.recv_timeout(crate::node::DEADLINE).context("nothing came")?;
        Ok(serde_json::from_str(&line)?)
    }

    /// The next finding that is about a file of this path.
    fn sees(&self, path: &str) -> anyhow::Result<Value> {
        loop {
            let line = self
                .lines
                .recv_timeout(crate::node::DEADLINE)
                .with_context(|| format!("{path} was not followed"))?;
            let reported: Value = serde_json::from_str(&line)?;
            if reported["file"]["path"] == path {
                return Ok(reported);
            }
        }
    }

    /// What comes behind these words on standard error.
    fn notes(&self, words: &str) -> anyhow::Result<String> {
        loop {
            let note = self
                .notes
                .recv_timeout(crate::node::DEADLINE)
                .with_context(|| format!("it did not print {words:?}"))?;
            if let Some((_, rest)) = note.split_once(words) {
                return Ok(rest.to_owned());
            }
        }
    }
}

/// Reads in a thread, so that waiting for a line can time out.
fn lines_of(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn follow(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("one")?;
    container.lay_payload("two")?;
    container.lay_payload("three")?;
    let follower = Follower::start(node, &["--container", &container.id])?;
    container.sh("cp /.control/one /tmp/one; /tmp/one")?;
    assert_eq!(follower.sees("/tmp/one")?["kind"], "exec.new");
    container.sh("cp /.control/two /tmp/two; /tmp/two")?;
    assert_eq!(follower.sees("/tmp/two")?["kind"], "exec.new");

    // When driftd stops, the follower prints where it will go on, and goes on there.
    node.stop_driftd()?;
    let cursor = follower.notes("waiting for it, to go on after ")?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    follower.notes("driftd is back")?;
    container.sh("cp /.control/three /tmp/three; /tmp/three")?;
    let resumed = Follower::start(node, &["--container", &container.id, "--after", &cursor])?;
    for follower in [&follower, &resumed] {
        let mut first = follower.next()?;
        assert_eq!(first["name"], "not_running", "{first:#}");
        // The gap comes once more when it has ended.
        while first["name"] == "not_running" {
            first = follower.next()?;
        }
        assert_eq!(first["file"]["path"], "/tmp/three", "{first:#}");
    }
    Ok(())
}

fn kill_on_request(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.run_dropped("x")?;
    container.expect_findings(&["critical exec.new /tmp/x"])?;

    let output = node.driftd(&["respond", "kill", &container.id, "--reason", "seen in a test"])?;
    assert_eq!(output.status.code(), Some(0), "{}", talk(&output));
    wait_for("the container to end", || Ok((!is_running(node, &container.id)?).then_some(())))?;

    let responses = recorded_responses(node, &container.id, 1)?;
    let [kill] = &responses[..] else { anyhow::bail!("not one response: {responses:#?}") };
    assert_eq!(kill["reason"], "seen in a test", "{kill:#}");
    assert_eq!(kill["outcome"]["action"], "kill", "{kill:#}");
    assert_eq!(kill["outcome"]["succeeded"], true, "{kill:#}");
    Ok(())
}

/// The responses to a container in the history's file, oldest first. Waits for `expected`
/// of them.
pub(crate) fn recorded_responses(
    node: &Node,
    id: &str,
    expected: usize,
) -> anyhow::Result<Vec<Value>> {
    let history = rusqlite::Connection::open_with_flags(
        node.path("driftd/history.db"),
        rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY,
    )?;
    let mut query = history.prepare(
        "SELECT json FROM record WHERE type = 'response' AND container = ?1 ORDER BY seq",
    )?;
    wait_for("the responses to be recorded", || {
        let rows = query.query_map([id], |row| row.get::<_, String>(0))?;
        let responses: Vec<Value> =
            rows.map(|row| Ok(serde_json::from_str(&row?)?)).collect::<anyhow::Result<_>>()?;
        Ok((responses.len() >= expected).then_some(responses))
    })
}

fn pause_and_resume(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let respond = |action: &str| -> anyhow::Result<()> {
        let output = node.driftd(&["respond", action, &container.id, "--reason", "a test"])?;
        ensure!(output.status.code() == Some(0), "{}", talk(&output));
        Ok(())
    };
    respond("pause")?;
    let running = container.begin("true")?;
    let listed = node.ctr(&["task", "ls"])?;
    ensure!(state_in(&listed, &container.id) == Some("PAUSED"), "{listed}");
    respond("resume")?;
    running.finish(crate::node::DEADLINE)?;
    let responses = recorded_responses(node, &container.id, 2)?;
    let actions: Vec<&Value> =
        responses.iter().map(|response| &response["outcome"]["action"]).collect();
    assert_eq!(actions, ["pause", "resume"], "{responses:#?}");
    container.expect_silence()
}

fn response_refused(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let output = node.driftd(&["respond", "kill", &container.id])?;
    assert_eq!(output.status.code(), Some(64), "{}", talk(&output));
    ensure!(talk(&output).contains("--reason"), "{}", talk(&output));
    let output = node.driftd(&["respond", "kill", "no-such-container", "--reason", "test"])?;
    assert_eq!(output.status.code(), Some(2), "{}", talk(&output));
    ensure!(talk(&output).contains("no-such-container"), "{}", talk(&output));
    ensure!(is_running(node, &container.id)?, "the container was killed after all");
    Ok(())
}

fn kill_by_setting(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    // A modified file is not in `kill_on`.
    container.lay_payload("x")?;
    container.sh("cat /.control/x > /usr/bin/curl")?;
    container.expect_findings(&["medium file.modified /usr/bin/curl"])?;
    ensure!(is_running(node, &container.id)?, "killed for a kind that is not in `kill_on`");

    container.lay("y", &bench()?.payload.marked("another"))?;
    // The shell is killed before it can report its end.
    let _ = container.begin("cp /.control/y /tmp/y; /tmp/y; sleep 600")?;
    wait_for("the container to end", || Ok((!is_running(node, &container.id)?).then_some(())))?;
    let outcome = wait_within(Duration::from_secs(10), "the outcome", || {
        let findings = container.findings()?;
        let run = only(&findings, "exec.new")?.clone();
        Ok((!run["outcome"].is_null()).then_some(run))
    })?;
    assert_eq!(outcome["outcome"]["action"], "kill", "{outcome:#}");
    assert_eq!(outcome["outcome"]["succeeded"], true, "{outcome:#}");
    assert_eq!(outcome["verdict"]["disposition"], "kill", "{outcome:#}");
    assert_eq!(outcome["verdict"]["rule"], "respond.kill_on", "{outcome:#}");
    Ok(())
}

fn deleted_image(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    node.ctr(&["images", "rm", "--sync", WORKBENCH])?;
    wait_for("the name to go", || Ok(node.baseline_of(WORKBENCH)?.is_none().then_some(())))?;
    container.sh("cp /bin/ls /bin/.cache-ls; /bin/.cache-ls; /usr/bin/app")?;
    container.expect_findings(&["medium exec.relocated /bin/.cache-ls"])?;

    // A restart changes nothing about it.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    container.sh("cp /usr/bin/curl /tmp/copy; /tmp/copy")?;
    container
        .expect_findings(&["medium exec.relocated /bin/.cache-ls", "high exec.relocated /tmp/copy"])
        .map(drop)
}

pub(crate) fn is_running(node: &Node, id: &str) -> anyhow::Result<bool> {
    let listed = node.ctr(&["task", "ls"])?;
    Ok(state_in(&listed, id) == Some("RUNNING"))
}

/// The state of a task in what `ctr task ls` prints.
pub(crate) fn state_in<'a>(listed: &'a str, id: &str) -> Option<&'a str> {
    listed
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.first() == Some(&id))
        .and_then(|words| words.last().copied())
}
