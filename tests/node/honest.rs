//! A complete view is complete: everything that was not seen, kept or reported is named, by
//! `status`, its exit code and the history's gaps.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use driftd::model::finding::hex;
use libtest_mimic::Trial;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::node::{DEADLINE, Node, bench, talk, wait_for};
use crate::programs::WORKBENCH;
use crate::threads::thread_of;
use crate::{test, test_alone, test_of_recording};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_of_recording(
            "r28_d07_on_a_full_disk_driftd_starts_and_reports_what_is_new",
            disk_full,
        ),
        test_alone("u03_a_time_without_driftd_is_a_gap_and_new_files_may_have_run", "", down),
        test_alone("r36_containers_that_start_at_once_are_seen_or_named_as_late", "", burst),
        test_alone("u06_a_stopped_container_is_compared_with_its_image", "", stopped),
        test("u12_arguments_in_json_are_raw_and_have_bytes_where_they_are_no_text", raw),
        test("d06_d08_an_artifact_that_is_no_image_is_refused_and_is_no_problem", no_image),
    ]
}

// ---- a disk without room

/// How `driftd status` ends, and whether it calls the view complete.
fn view(node: &Node) -> anyhow::Result<(Option<i32>, bool)> {
    let output = node.driftd(&["status", "-o", "json"])?;
    let status: Value = serde_json::from_slice(&output.stdout)?;
    Ok((output.status.code(), status["complete"].as_bool().context("no `complete`")?))
}

/// A small disk of its own, unmounted at the end.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    pub(crate) fn mount(at: PathBuf) -> anyhow::Result<SmallDisk> {
        fs::create_dir_all(&at)?;
        let options = ["-t", "tmpfs", "-o", "size=8m", "tmpfs"];
        let output = Command::new("mount").args(options).arg(&at).output()?;
        ensure!(output.status.success(), "{}", talk(&output));
        Ok(SmallDisk(at))
    }

    pub(crate) fn fill(&self) -> anyhow::Result<PathBuf> {
        let path = self.0.join("filler");
        let mut file = File::create(&path)?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// The paths of the findings in the file on disk.
fn paths_on_disk(history: &Path) -> anyhow::Result<Vec<String>> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    let history = rusqlite::Connection::open_with_flags(history, flags)?;
    let mut query = history.prepare("SELECT json ->> '$.file.path' FROM finding ORDER BY 1")?;
    let paths = query.query_map([], |row| row.get(0))?;
    Ok(paths.collect::<rusqlite::Result<_>>()?)
}

fn disk_full(node: &Node) -> anyhow::Result<()> {
    let disk = SmallDisk::mount(node.path("driftd"))?;
    node.import(&bench()?.workbench)?;
    // Started before driftd: a container that starts later may be reported as armed late.
    let container = node.unwatched_container_of(WORKBENCH)?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    node.wait_until_complete()?;
    assert_eq!(view(node)?, (Some(0), true));
    let drop_one = |name: &str| -> anyhow::Result<()> {
        container.lay_payload(name)?;
        container.sh(&format!("cp /.control/{name} /tmp/{name}; /tmp/{name}")).map(drop)
    };
    let expect = |names: &[&str]| {
        let expected: Vec<String> =
            names.iter().map(|name| format!("critical exec.new /tmp/{name}")).collect();
        container
            .expect_findings(&expected.iter().map(String::as_str).collect::<Vec<_>>())
            .map(drop)
    };
    drop_one("d0")?;
    expect(&["d0"])?;

    let filler = disk.fill()?;
    for name in ["d1", "d2"] {
        drop_one(name)?;
    }
    expect(&["d0", "d1", "d2"]).context("while the disk is full")?;
    assert_eq!(view(node)?, (Some(1), false), "{:#}", node.status()?["problems"]);
    let before = ticks_of(node, "history")?;
    thread::sleep(Duration::from_secs(2));
    let used = ticks_of(node, "history")? - before;
    // A thread that tries again without a pause would have used all of them.
    ensure!(used < 50, "a thread that waits for room used {used} of 200 ticks of a processor");
    fs::remove_file(&filler)?;
    node.wait_until_complete()?;

    // The same at the start.
    node.stop_driftd()?;
    let filler = disk.fill()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    assert_eq!(view(node)?, (Some(1), false));
    let problems = node.status()?["problems"].to_string();
    ensure!(problems.contains("history_write"), "{problems}");
    drop_one("d3")?;
    expect(&["d0", "d1", "d2", "d3"]).context("after a start on a full disk")?;
    fs::remove_file(filler)?;
    node.wait_until_complete()?;
    node.stop_driftd()?;
    let kept = paths_on_disk(&node.path("driftd/history.db"))?;
    assert_eq!(kept, ["/tmp/d0", "/tmp/d1", "/tmp/d2", "/tmp/d3"]);
    Ok(())
}

/// How long a thread of the daemon has had a processor, in hundredths of a second.
fn ticks_of(node: &Node, name: &str) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(thread_of(node, name)?.join("stat"))?;
    let (_, rest) = stat.rsplit_once(") ").context("no stat")?;
    // utime and stime.
    rest.split(' ').skip(11).take(2).map(|ticks| Ok(ticks.parse::<u64>()?)).sum()
}

// ---- times and containers that driftd did not watch

const FLOOD: usize = 200;

fn down(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let gaps = node.status()?["gaps"].to_string();
    ensure!(!gaps.contains("not_running"), "a first start is no gap: {gaps}");
    container.lay_payload("x")?;
    let running = container.begin(&format!(
        "i=0; while [ $i -lt {FLOOD} ]; do\n\
         d=/tmp/$((i%20)); mkdir -p $d; cp /.control/x $d/d$i; echo $i >> $d/d$i; $d/d$i\n\
         i=$((i+1)); done"
    ))?;
    wait_for("some drift", || Ok((container.findings()?.len() >= 5).then_some(())))?;
    let killed = jiff::Timestamp::now();
    node.crash_driftd()?;
    thread::sleep(Duration::from_millis(700));
    node.start_driftd()?;
    let gaps = node.status()?["gaps"].clone();
    let gap = gaps.as_array().into_iter().flatten().find(|gap| gap["name"] == "not_running");
    let gap = gap.with_context(|| format!("no gap in {gaps:#}"))?;
    let time = |key: &str| -> anyhow::Result<jiff::Timestamp> {
        Ok(gap[key].as_str().with_context(|| format!("no {key}: {gap:#}"))?.parse()?)
    };
    let (since, until) = (time("at")?, time("until")?);
    ensure!(since <= killed && killed < until, "killed at {killed}: {gap:#}");
    running.finish(DEADLINE)?;
    container.wait_until_watched()?;
    node.wait_until_complete()?;
    wait_for("the whole flood", || Ok((container.findings()?.len() >= FLOOD).then_some(())))?;
    // Each was seen to run, or is reported as perhaps run.
    let mut found = 0;
    for finding in container.findings()? {
        if finding["kind"] == "file.added" && finding["source"] == "scan" {
            let detail = finding["detail"].as_str().unwrap_or_default();
            ensure!(detail.contains("may have run"), "{finding:#}");
            found += 1;
        }
    }
    ensure!(found > 0, "nothing was done while driftd did not run: a vacuous test");
    let timeline = node.answer(&["timeline", &container_name(&container.findings()?)?])?;
    ensure!(timeline.iter().any(|entry| entry.to_string().contains("not_running")));
    Ok(())
}

fn container_name(findings: &[Value]) -> anyhow::Result<String> {
    let id = findings.first().and_then(|finding| finding["container"]["id"].as_str());
    Ok(id.context("no container")?.to_owned())
}

const CONTAINERS: usize = 12;
const SCRIPTS: usize = 6;

fn burst(node: &Node) -> anyhow::Result<()> {
    node.container()?;
    // Keeps the machine busy.
    let mut load: Vec<_> = (0..2)
        .map(|_| Command::new("sh").args(["-c", "while :; do :; done"]).spawn())
        .collect::<Result<_, _>>()?;
    let script = format!(
        "i=0; while [ $i -lt {SCRIPTS} ]; do\n\
         printf '#!/bin/sh\\n: %s\\n' $HOSTNAME$i > /tmp/s$i; chmod +x /tmp/s$i; /tmp/s$i\n\
         i=$((i+1)); done; sleep 600"
    );
    let started: anyhow::Result<Vec<String>> = thread::scope(|scope| {
        let start = || node.run_plainly(&[], &["/bin/sh", "-c", &script]);
        let starts: Vec<_> = (0..CONTAINERS).map(|_| scope.spawn(start)).collect();
        starts.into_iter().map(|start| start.join().expect("no panic")).collect()
    });
    let judged = started.and_then(|ids| {
        for id in &ids {
            wait_for(&format!("the scripts of {id}, or that it was late"), || {
                let findings = node.answer(&["findings", "--container", id])?;
                let ran = findings.iter().filter(|one| one["kind"] == "exec.script").count();
                let entries = node.answer(&["timeline", id])?;
                let is_named = entries.iter().any(|one| one.to_string().contains("armed_late"));
                Ok((ran == SCRIPTS || is_named).then_some(()))
            })?;
        }
        Ok(())
    });
    for busy in &mut load {
        crate::node::end(busy);
    }
    judged
}

// ---- a container that does not run

fn stopped(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .sh("cp /.control/x /tmp/x; echo more >> /etc/passwd; rm /bin/true; chmod 0700 /bin/ls")?;
    let mut running = Vec::new();
    wait_for("what the running container shows", || {
        running = container.diff()?;
        Ok((running.len() >= 4).then_some(()))
    })?;
    container.stop()?;
    wait_for("the container to be stopped", || {
        let known = node.answer(&["containers"])?;
        let mut known = known.iter().filter(|one| one["id"] == container.id.as_str());
        Ok(known.any(|one| one["pid"].is_null()).then_some(()))
    })?;
    assert_eq!(container.diff()?, running);
    // The same when driftd has never seen it run.
    node.stop_driftd()?;
    node.start_driftd()?;
    wait_for("its baseline", || {
        let output = node.driftd(&["diff", &container.id])?;
        Ok((output.status.code() == Some(1)).then_some(()))
    })?;
    let findings = container.findings()?;
    assert_eq!(container.diff()?, running);
    assert_eq!(container.findings()?, findings, "a diff adds no finding");
    Ok(())
}

fn raw(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .sh(r#"cp /.control/x /tmp/x; /tmp/x "$(printf 'a\\b\033[2J')" 木 "$(printf '\376')""#)?;
    let findings = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let process = &findings[0]["process"];
    assert_eq!(process["exe_bytes"], Value::Null);
    let arguments = process["argv"].as_array().context("no arguments")?;
    assert_eq!(arguments[1..], [json!("a\\b\u{1b}[2J"), json!("木"), json!("\\xfe")]);
    assert_eq!(process["argv_bytes"][3], "/g==");
    let id = findings[0]["id"].as_str().context("no ID")?;
    let shown = node.driftd(&["show", id])?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(!shown.contains('\u{1b}') && shown.contains('木'), "{shown}");
    Ok(())
}

// ---- what is no image

/// An archive with one image, whose top document and blobs the test makes.
struct Archive {
    tar: tar::Builder<File>,
}

impl Archive {
    fn append(&mut self, path: &str, content: &[u8]) -> anyhow::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len().try_into()?);
        header.set_mode(0o644);
        self.tar.append_data(&mut header, path, content)?;
        Ok(())
    }

    fn blob(&mut self, media_type: &str, content: &[u8]) -> anyhow::Result<Value> {
        let digest = hex(&Sha256::digest(content));
        self.append(&format!("blobs/sha256/{digest}"), content)?;
        let (digest, size) = (format!("sha256:{digest}"), content.len());
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": size }))
    }

    /// Imports an image of this name. `top` appends its blobs and returns its descriptor.
    fn import(
        node: &Node,
        name: &str,
        top: impl FnOnce(&mut Archive) -> anyhow::Result<Value>,
    ) -> anyhow::Result<()> {
        let file = node.path(&format!("odd-{}.tar", node.next_id()));
        let mut archive = Archive { tar: tar::Builder::new(File::create(&file)?) };
        let mut top = top(&mut archive)?;
        top["annotations"] = json!({ "io.containerd.image.name": name });
        let index = json!({ "schemaVersion": 2, "manifests": [top] });
        archive.append("index.json", index.to_string().as_bytes())?;
        archive.append("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.tar.into_inner()?.sync_all()?;
        let file = file.to_string_lossy().into_owned();
        node.ctr(&["images", "import", "--no-unpack", "--all-platforms", &file]).map(drop)
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

fn no_image(node: &Node) -> anyhow::Result<()> {
    let [signature, checkpoint] =
        ["registry.test/app:sha256-0123.sig", "registry.test/checkpoint:1"];
    Archive::import(node, signature, |archive| {
        let payload = b"{\"critical\":{}}";
        let layer = archive.blob("application/vnd.dev.cosign.simplesigning.v1+json", payload)?;
        let diff_ids = [layer["digest"].clone()];
        let config = json!({
            "architecture": "", "os": "", "config": {},
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = archive.blob(CONFIG, config.to_string().as_bytes())?;
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
        });
        archive.blob(MANIFEST, manifest.to_string().as_bytes())
    })?;
    Archive::import(node, checkpoint, |archive| {
        let criu = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
        let memory = archive.blob(criu, b"no archive of layers")?;
        let spec = "application/vnd.containerd.container.checkpoint.config.v1+proto";
        let spec = archive.blob(spec, b"\x0a\x00")?;
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX, "manifests": [memory, spec],
        });
        archive.blob(INDEX, index.to_string().as_bytes())
    })?;
    for name in [signature, checkpoint] {
        let output = node.driftd(&["baseline", "record", name])?;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(2), "{}", talk(&output));
        ensure!(message.contains("is no container image") && message.contains(name), "{message}");
        let problems = node.status()?["problems"].to_string();
        ensure!(!problems.contains(name), "{problems}");
    }
    Ok(())
}
