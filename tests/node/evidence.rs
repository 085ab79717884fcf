//! Evidence on a real node: it comes before the kill that destroys it, outlives its container, and
//! is whole or marked as cut whatever the container and the machine do meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use driftd::evidence::verify;
use libtest_mimic::Trial;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::fuse::{Answers, Fuse, MAY_MOUNT};
use crate::node::{Container, DEADLINE, Node, talk, wait_for, wait_within};
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    const ON: &str = "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"on\"";
    const DRY: &str = "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"dry-run\"";
    const SMALL: &str = "[evidence]\ndirectory = \"{node}/small\"\nmax_file_bytes = \"64MiB\"";
    const PAUSE: &str = "[evidence]\npause = true";
    vec![
        test_alone("evidence_comes_before_the_kill_and_outlives_the_container", ON, by_rule),
        test_alone("evidence_comes_before_a_process_is_killed_and_no_other", ON, of_process),
        test_alone("evidence_is_not_taken_in_a_dry_run", DRY, dry_run),
        test_alone("evidence_of_hostile_files_and_processes", "", hostile),
        test_alone("evidence_of_a_flood_of_files_is_cut_at_its_limits", "", flood),
        test_alone("evidence_of_a_hundred_thousand_files_is_cut_at_its_limits", "", giant)
            .with_ignored_flag(true),
        test_alone("evidence_is_whole_or_cut_after_kill_9", "", killed),
        test_alone("evidence_on_a_full_disk_is_cut_and_says_so", SMALL, full),
        test_alone("evidence_pauses_and_resumes_even_after_kill_9", PAUSE, pauses),
    ]
}

fn rule(node: &Node, answer: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        format!(
            "[[rule]]\nid = \"keep\"\nreason = \"a test\"\neffect = \"report\"\n\
             answer = {answer}\n[rule.match]\nkind = [\"exec.new\"]\n"
        ),
    )?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", talk(&reload));
    Ok(())
}

fn cases(node: &Node) -> anyhow::Result<Vec<Value>> {
    let output = node.driftd(&["evidence", "ls", "-o", "json"])?;
    ensure!(output.status.success(), "{}", talk(&output));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Takes evidence by hand. Returns the reply.
fn take(container: &Container<'_>, more: &[&str]) -> anyhow::Result<Value> {
    let arguments = [&["evidence", "take", &container.id, "-o", "json"], more].concat();
    let output = container.node.driftd(&arguments)?;
    ensure!(output.status.success(), "{}", talk(&output));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The directory of a case, which verifies as it is.
fn directory_of(node: &Node, case: &str) -> anyhow::Result<PathBuf> {
    let directory = node.path("driftd/evidence").join(case);
    let verified = verify(&directory)?;
    ensure!(verified.problems.is_empty(), "{:#?}", verified.problems);
    Ok(directory)
}

fn json(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

fn lines(path: &Path) -> anyhow::Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// What a case says of the file at a path.
fn entry(case: &Path, path: &str) -> anyhow::Result<Value> {
    let all = lines(&case.join("takes/0001/files.jsonl"))?;
    let found = all.iter().find(|entry| entry["path"] == path);
    found.cloned().with_context(|| format!("{path} is not in {all:#?}"))
}

/// The content that a case has of an entry.
fn object(case: &Path, entry: &Value) -> anyhow::Result<Vec<u8>> {
    let name = entry["object"].as_str().with_context(|| format!("no object: {entry:#}"))?;
    Ok(fs::read(case.join("objects").join(name))?)
}

/// What is kept of the processes.
fn processes(case: &Path) -> anyhow::Result<Vec<Value>> {
    let all = fs::read_dir(case.join("processes"))?;
    all.map(|one| json(&one?.path().join("process.json"))).collect()
}

/// The responses to a container: the action and the message.
fn responses(container: &Container<'_>) -> anyhow::Result<Vec<(String, String)>> {
    let timeline = container.node.answer(&["timeline", &container.id])?;
    let responses = timeline.iter().filter(|entry| entry["type"] == "response");
    let text = |entry: &Value, key: &str| {
        entry["response"]["outcome"][key].as_str().unwrap_or_default().to_owned()
    };
    Ok(responses.map(|one| (text(one, "action"), text(one, "message"))).collect())
}

fn by_rule(node: &Node) -> anyhow::Result<()> {
    rule(node, "[\"kill\", \"evidence\"]")?;
    let container = node.container_with(&["--env", "TOKEN=hunter2hunter2"])?;
    container.wait_until_watched()?;
    container.lay_payload("x")?;
    let content = fs::read(container.laid("x"))?;
    container.begin("cp /.control/x /tmp/x; /tmp/x 600000").map(drop)?;
    let happened = wait_for("the kill", || {
        let all = responses(&container)?;
        Ok(all.iter().any(|(action, _)| action == "kill").then_some(all))
    })?;
    let actions: Vec<&str> = happened.iter().map(|(action, _)| action.as_str()).collect();
    ensure!(actions == ["begin-evidence", "evidence", "kill"], "{happened:#?}");
    container.remove()?;

    let all = cases(node)?;
    ensure!(all.len() == 1, "{all:#?}");
    let id = all[0]["id"].as_str().context("no ID")?.to_owned();
    ensure!(all[0]["cut"] == serde_json::json!([]), "{all:#?}");
    let finding = all[0]["finding"].as_str().context("no finding")?;
    ensure!(happened[1].1.contains(&id), "{happened:#?}");
    // The history has kept the digest.
    let verified = node.driftd(&["evidence", "verify", &id[..8], "-o", "json"])?;
    ensure!(verified.status.success(), "{}", talk(&verified));
    let verified: Value = serde_json::from_slice(&verified.stdout)?;
    ensure!(verified["recorded"] == verified["digest"], "{verified:#}");
    let status = node.status()?;
    ensure!(status["evidence"]["cases"] == 1, "{status:#}");

    // Exported, unpacked elsewhere, and verified without the daemon.
    let archive = node.path("case.tar.zst");
    let archive = archive.to_str().context("a path")?;
    let exported = node.driftd(&["evidence", "export", &id, "-o", archive])?;
    ensure!(exported.status.success(), "{}", talk(&exported));
    node.stop_driftd()?;
    let elsewhere = tempfile::tempdir()?;
    let plain = zstd::decode_all(fs::File::open(archive)?)?;
    tar::Archive::new(&plain[..]).unpack(elsewhere.path())?;
    let case = elsewhere.path().join(&id);
    let digest = verified["digest"].as_str().context("no digest")?;
    let path = case.to_str().context("a path")?;
    let checked = node.driftd(&["evidence", "verify", path, "--digest", digest])?;
    ensure!(checked.status.success(), "{}", talk(&checked));

    let file = entry(&case, "/tmp/x")?;
    ensure!(object(&case, &file)? == content, "{file:#}");
    let manifest = json(&case.join("manifest.json"))?;
    ensure!(manifest["finding"] == finding, "{manifest:#}");
    let all = processes(&case)?;
    let x = all.iter().find(|one| one["exe"] == "/tmp/x").with_context(|| format!("{all:#?}"))?;
    let expected = sha256(&content);
    ensure!(x["program"]["object"] == expected.as_str(), "{x:#}");
    let variables = x["environment"].as_array().context("no environment")?;
    let token = variables.iter().find(|one| one["name"] == "TOKEN");
    ensure!(token.is_some_and(|one| one["bytes"] == 14), "{variables:?}");
    let findings = lines(&case.join("takes/0001/findings.jsonl"))?;
    ensure!(findings[0]["id"] == finding, "{findings:#?}");
    let layer = lines(&case.join("takes/0001/layer.jsonl"))?;
    ensure!(layer.iter().any(|entry| entry["path"] == "/tmp/x"), "{layer:#?}");
    let described = json(&case.join("takes/0001/container.json"))?;
    ensure!(described["specification"]["process"]["args"][0] == "/bin/sh", "{described:#}");
    let mounts = fs::read_to_string(case.join("takes/0001/mountinfo"))?;
    ensure!(mounts.contains("/.control"), "{mounts}");
    // No value of a variable is anywhere in it.
    ensure!(!plain.windows(14).any(|part| part == b"hunter2hunter2"), "a secret is kept");

    // A case that was changed as a whole is consistent, and the history knows better.
    node.start_driftd()?;
    let own = directory_of(node, &id)?;
    let text = fs::read_to_string(own.join("manifest.json"))?;
    let changed = text.replace("rule keep", "rule other");
    let sums = fs::read_to_string(own.join("SHA256SUMS"))?;
    fs::write(own.join("manifest.json"), &changed)?;
    let sums = sums.replace(&sha256(text.as_bytes()), &sha256(changed.as_bytes()));
    fs::write(own.join("SHA256SUMS"), sums)?;
    ensure!(changed != text && verify(&own)?.problems.is_empty());
    let verified = node.driftd(&["evidence", "verify", &id])?;
    ensure!(verified.status.code() == Some(1), "{}", talk(&verified));
    ensure!(talk(&verified).contains("the history has kept another digest"), "{}", talk(&verified));
    Ok(())
}

/// The SHA-256 of a content, by which objects are named.
fn sha256(content: &[u8]) -> String {
    driftd::model::finding::hex(&Sha256::digest(content))
}

/// The process is kept, then killed; the container goes on, and its next run has a case of its own.
fn of_process(node: &Node) -> anyhow::Result<()> {
    rule(node, "[\"evidence\", \"kill-process\"]")?;
    let container = node.settled_container()?;
    container.lay_payload("x")?;
    let run = |count: usize| -> anyhow::Result<Value> {
        let ran = container.try_sh("cp /.control/x /tmp/x; /tmp/x 600000; echo ended $?")?;
        ensure!(ran.output.contains("ended 137"), "{ran:?}");
        let all = wait_for("the case", || {
            let all = cases(node)?;
            Ok((all.len() == count).then_some(all))
        })?;
        let case = directory_of(node, all[0]["id"].as_str().context("no ID")?)?;
        let all = processes(&case)?;
        let is_it = |one: &&Value| one["exe"] == "/tmp/x" && one["program"]["object"].is_string();
        all.iter().find(is_it).cloned().with_context(|| format!("{all:#?}"))
    };
    let first = run(1)?;
    container.sh("true")?;
    // Started again under the same ID.
    container.stop()?;
    container.start_again()?;
    let second = run(2)?;
    ensure!(first["pid"] != second["pid"], "{first:#} {second:#}");
    // The second kill for one finding is recorded with those that follow.
    let expected = ["begin-evidence", "evidence", "kill-process", "begin-evidence", "evidence"];
    wait_for("every record", || {
        let happened = responses(&container)?;
        let order: Vec<&str> = happened.iter().map(|(action, _)| action.as_str()).collect();
        Ok(order.starts_with(&expected).then_some(()))
    })
    .with_context(|| format!("{:#?}", responses(&container)))
}

fn dry_run(node: &Node) -> anyhow::Result<()> {
    rule(node, "[\"evidence\", \"kill\"]")?;
    let container = node.settled_container()?;
    container.run_dropped("x")?;
    let finding = wait_for("the finding", || {
        let all = container.findings()?;
        Ok(all.into_iter().find(|one| one["kind"] == "exec.new"))
    })?;
    let answers = &finding["verdict"]["answers"];
    ensure!(answers[0]["action"] == "evidence" && answers[0]["dry_run"] == true, "{answers:#}");
    ensure!(responses(&container)?.is_empty() && cases(node)?.is_empty());
    Ok(())
}

fn hostile(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(MAY_MOUNT)?;
    container.wait_until_watched()?;
    container.lay_payload("x")?;
    let content = fs::read(container.laid("x"))?;
    container.lay_payload("memory")?;
    container.lay_payload("gone")?;
    container.sh("/usr/bin/loader memfd 1 /.control/memory 600000 >/dev/null 2>&1 &")?;
    container.sh("cp /.control/gone /tmp/gone; /tmp/gone 600000 >/dev/null 2>&1 &")?;
    wait_for("the program to run", || {
        let all = container.findings()?;
        Ok(all.iter().any(|one| one["file"]["path"] == "/tmp/gone").then_some(()))
    })?;
    container.sh("rm /tmp/gone")?;
    container.sh("cp /.control/x /tmp/giant; truncate -s 10G /tmp/giant; mkfifo /tmp/fifo\n\
         cp /.control/x /tmp/was-link; cp /.control/x /tmp/was-fifo\n\
         cp /.control/x /tmp/was-device; cp /.control/x /tmp/grows\n\
         cp /.control/x \"/tmp/$(printf 'a\\nb\\033[2J\\377')\"")?;
    let fuse = Fuse::mount(&container, "/mnt/fuse", Answers::Own, &[("f", "/.control/x")])?;
    container.sh("/mnt/fuse/f 600000 >/dev/null 2>&1 &")?;
    wait_for("the findings", || {
        let all = container.findings()?;
        let has = |path: &str| all.iter().any(|one| one["file"]["path"] == path);
        let kinds = |kind: &str| all.iter().any(|one| one["kind"] == kind);
        Ok((has("/tmp/giant")
            && has("/tmp/was-device")
            && has("/tmp/grows")
            && has("/tmp/was-link")
            && has("/tmp/was-fifo")
            && has("/mnt/fuse/f")
            && kinds("exec.fileless"))
        .then_some(()))
    })?;
    // What was a drifted file is something else by now.
    container.sh("rm /tmp/was-link /tmp/was-fifo /tmp/was-device
        ln -s /etc/shadow /tmp/was-link; mkfifo /tmp/was-fifo; mknod /tmp/was-device c 1 5")?;
    // These change while they are read: a file that grows, and a process that becomes another
    // program again and again.
    container.sh("( while :; do echo more >>/tmp/grows; done ) >/dev/null 2>&1 &\n\
         echo 'exec sh /tmp/over' >/tmp/over; sh /tmp/over >/dev/null 2>&1 &")?;
    let begun = Instant::now();
    let taken = take(&container, &[])?;
    ensure!(begun.elapsed() < DEADLINE, "it took {:?}", begun.elapsed());
    let case = directory_of(node, taken["case"].as_str().context("no case")?)?;

    let giant = entry(&case, "/tmp/giant")?;
    ensure!(giant["found"]["size"] == 10_u64 << 30, "{giant:#}");
    ensure!(giant["cut"].as_str().is_some_and(|cut| cut.contains("max_file_bytes")), "{giant:#}");
    ensure!(giant["extents"][0][0] == 0 && object(&case, &giant)?.starts_with(b"\x7fELF"));
    let link = entry(&case, "/tmp/was-link")?;
    ensure!(link["found"]["target"] == "/etc/shadow" && link["object"].is_null(), "{link:#}");
    let fifo = entry(&case, "/tmp/was-fifo")?;
    ensure!(fifo["found"]["type"] == "fifo" && fifo["object"].is_null(), "{fifo:#}");
    // Reading it would never end.
    let device = entry(&case, "/tmp/was-device")?;
    ensure!(device["object"].is_null(), "{device:#}");
    let grows = entry(&case, "/tmp/grows")?;
    ensure!(object(&case, &grows)?.starts_with(&content), "{grows:#}");
    let named = lines(&case.join("takes/0001/files.jsonl"))?;
    let odd =
        named.iter().find(|one| one["path"].as_str().is_some_and(|p| p.starts_with("/tmp/a")));
    let odd = odd.with_context(|| format!("{named:#?}"))?;
    ensure!(object(&case, odd)? == content && odd["path_bytes"].is_string(), "{odd:#}");

    let all = processes(&case)?;
    let program = |mark: &str| -> anyhow::Result<Vec<u8>> {
        let is_it = |one: &&Value| one["exe"].as_str().is_some_and(|exe| exe.contains(mark));
        let one = all.iter().find(is_it).with_context(|| format!("{mark}: {all:#?}"))?;
        object(&case, &one["program"])
    };
    ensure!(program("/memfd:")? == fs::read(container.laid("memory"))?);
    ensure!(program("/tmp/gone (deleted)")? == fs::read(container.laid("gone"))?);
    let served =
        all.iter().find(|one| one["exe"] == "/mnt/fuse/f").context("the program on FUSE")?;
    ensure!(served["program"]["object"].is_null(), "{served:#}");
    let why = served["program"]["not_taken"].as_str().unwrap_or_default();
    ensure!(why.contains("was not opened"), "{served:#}");
    ensure!(fuse.unanswered().is_empty(), "driftd has asked: {:?}", fuse.unanswered());

    // Nothing can be taken of a container that is gone, and the reply says so.
    drop(fuse);
    container.remove()?;
    let gone = wait_for("the container to be gone", || {
        let output = node.driftd(&["evidence", "take", &container.id])?;
        Ok((output.status.code() == Some(2)).then_some(output))
    })?;
    ensure!(talk(&gone).contains("see: driftd containers"), "{}", talk(&gone));
    Ok(())
}

fn flood(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    container.lay_payload("x")?;
    // Hard links are files of their own to a scan, and cost the test no room.
    container.sh("mkdir /tmp/d; cp /.control/x /tmp/d/0; cd /tmp/d\n\
         i=1; while [ $i -lt 3000 ]; do ln 0 $i; i=$((i+1)); done")?;
    wait_within(Duration::from_secs(120), "the files to be reported", || {
        let all = container.findings()?;
        let count: u64 = all.iter().filter_map(|one| one["files"].as_u64()).sum();
        Ok((count >= 2900).then_some(()))
    })?;
    let begun = Instant::now();
    let taken = take(&container, &["--environment", "--reason", "a flood"])?;
    ensure!(begun.elapsed() < Duration::from_secs(120), "it took {:?}", begun.elapsed());
    let id = taken["case"].as_str().context("no case")?;
    let case = directory_of(node, id)?;
    let listed = lines(&case.join("takes/0001/files.jsonl"))?;
    ensure!(listed.len() >= 2900, "{} are listed", listed.len());
    let objects = fs::read_dir(case.join("objects"))?.count();
    ensure!(objects < 20, "the same content is kept once: {objects}");
    ensure!(fs::read_dir(case.join("processes"))?.next().is_some());
    // Asked for, values are kept.
    let environ = fs::read_dir(case.join("processes"))?
        .filter_map(|one| fs::read(one.ok()?.path().join("environ")).ok())
        .find(|text| text.windows(5).any(|part| part == b"PATH="));
    ensure!(environ.is_some(), "no environment is kept");
    let removed = node.driftd(&["evidence", "rm", id])?;
    ensure!(removed.status.success() && cases(node)?.is_empty(), "{}", talk(&removed));
    Ok(())
}

fn giant(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    let files = "mkdir /tmp/d; cd /tmp/d; i=0; while [ $i -lt 1000 ]; do : >$i; i=$((i+1)); done
        cd ..; i=1; while [ $i -lt 110 ]; do cp -r d d$i; i=$((i+1)); done";
    container.begin(files)?.finish(Duration::from_secs(300))?;
    let begun = Instant::now();
    let taken = take(&container, &[])?;
    eprintln!("it took {:?}", begun.elapsed());
    let case = directory_of(node, taken["case"].as_str().context("no case")?)?;
    let listed = lines(&case.join("takes/0001/layer.jsonl"))?.len();
    ensure!(listed == 100_000, "{listed} are listed");
    let message = taken["outcome"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("more than 100000 entries"), "{taken:#}");
    Ok(())
}

/// Lays many programs of a megabyte, so that evidence of them takes a while.
fn many(container: &Container<'_>) -> anyhow::Result<()> {
    container.lay_payload("x")?;
    container.sh("mkdir /tmp/d; i=0; while [ $i -lt 150 ]; do\n\
         cp /.control/x /tmp/d/$i; dd if=/dev/urandom bs=65536 count=40 2>/dev/null >>/tmp/d/$i\n\
         i=$((i+1)); done")?;
    wait_within(Duration::from_secs(120), "the files to be reported", || {
        let all = container.findings()?;
        let count: u64 = all.iter().map(|one| one["files"].as_u64().unwrap_or(1)).sum();
        Ok((count >= 140).then_some(()))
    })
}

fn killed(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    many(&container)?;
    let mut client = node.driftd_command(&["evidence", "take", &container.id]).spawn()?;
    let store = node.path("driftd/evidence");
    let written = wait_for("some of it to be written", || {
        let drafts = fs::read_dir(&store).into_iter().flatten().flatten();
        let draft = drafts.map(|one| one.path()).find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let objects = fs::read_dir(path.join("objects")).map_or(0, Iterator::count);
            name.starts_with(".draft-") && objects > 5
        });
        Ok(draft)
    });
    node.crash_driftd()?;
    client.wait()?;
    written?;
    node.start_driftd()?;
    let all = cases(node)?;
    ensure!(all.len() == 1 && all[0]["damaged"].is_null(), "{all:#?}");
    let cut = all[0]["cut"][0].as_str().unwrap_or_default();
    ensure!(cut.contains("driftd ended while it was taken"), "{all:#?}");
    let case = directory_of(node, all[0]["id"].as_str().context("no ID")?)?;
    // What is kept has its name.
    let listed = lines(&case.join("takes/0001/files.jsonl"))?;
    let objects = fs::read_dir(case.join("objects"))?.count();
    ensure!(objects >= 5 && listed.len() + 1 >= objects, "{objects} of {}", listed.len());
    let verified =
        node.driftd(&["evidence", "verify", all[0]["id"].as_str().unwrap_or_default()])?;
    ensure!(verified.status.success(), "{}", talk(&verified));
    // It goes on as before.
    container.wait_until_watched()?;
    let again = take(&container, &[])?;
    directory_of(node, again["case"].as_str().context("no case")?).map(drop)
}

fn full(node: &Node) -> anyhow::Result<()> {
    node.stop_driftd()?;
    let small = node.path("small");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=80M", "tmpfs"])
        .arg(&small)
        .status()?;
    ensure!(mounted.success(), "cannot mount a tmpfs");
    node.start_driftd()?;
    let container = node.settled_container()?;
    many(&container)?;
    let taken = take(&container, &[])?;
    let message = taken["outcome"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("the disk of the store is nearly full"), "{taken:#}");
    let id = taken["case"].as_str().context("no case")?;
    let verified = verify(&small.join(id))?;
    ensure!(verified.problems.is_empty() && verified.files > 10, "{verified:#?}");
    ensure!(node.losses("evidence_cut")? == 1);
    // The next one has no room at all, and takes none of the first one's.
    let next = node.driftd(&["evidence", "take", &container.id])?;
    ensure!(talk(&next).contains("nearly full"), "{}", talk(&next));
    ensure!(verify(&small.join(id))? == verified, "the first case was changed");
    let removed = node.driftd(&["evidence", "rm", id])?;
    ensure!(removed.status.success(), "{}", talk(&removed));
    Ok(())
}

fn pauses(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    many(&container)?;
    let is_paused =
        || -> anyhow::Result<bool> { Ok(node.ctr(&["task", "ls"])?.contains("PAUSED")) };
    let taken = take(&container, &[])?;
    let case = directory_of(node, taken["case"].as_str().context("no case")?)?;
    let manifest = json(&case.join("manifest.json"))?;
    ensure!(manifest["takes"][0]["frozen"] == true, "{manifest:#}");
    ensure!(!is_paused()?, "it is still paused");
    container.sh("true")?;
    // A container that was paused before stays paused.
    node.ctr(&["task", "pause", &container.id])?;
    take(&container, &[])?;
    ensure!(is_paused()?, "it was resumed");
    node.ctr(&["task", "resume", &container.id])?;
    // Killed while it is frozen: the next start resumes it.
    let mut client = node.driftd_command(&["evidence", "take", &container.id]).spawn()?;
    let frozen = wait_for("the pause", || Ok(is_paused()?.then_some(())));
    node.crash_driftd()?;
    client.wait()?;
    frozen?;
    node.start_driftd()?;
    wait_for("it to be resumed", || Ok((!is_paused()?).then_some(())))?;
    container.sh("true")?;
    wait_for("the record of that", || {
        let all = responses(&container)?;
        Ok(all.iter().any(|(action, _)| action == "resume").then_some(()))
    })
}
