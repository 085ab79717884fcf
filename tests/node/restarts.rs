//! After a response: a killed container that is started again, and a container that is frozen
//! although containerd lists it as running.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::commands::{is_running, recorded_responses, state_in};
use crate::fuse::{Answers, Fuse, MAY_MOUNT};
use crate::node::{Container, DEADLINE, Node, talk, wait_for};
use crate::test;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test(
            "d01_the_program_that_restarts_a_killed_container_is_named_and_recorded",
            d01_restarts,
        ),
        test("d03_a_container_that_is_frozen_without_containerd_is_thawed", d03_frozen),
        test("d03_a_pause_that_a_process_in_the_kernel_delays_is_half_done", d03_held),
    ]
}

/// Makes driftd respond, and returns its exit code and the response.
fn respond(node: &Node, arguments: &[&str]) -> anyhow::Result<(i32, Value)> {
    let usual = ["--reason", "a test", "-o", "json"];
    let output = node.driftd(&[&["respond"], arguments, &usual].concat())?;
    let response = serde_json::from_slice(&output.stdout).with_context(|| talk(&output))?;
    Ok((output.status.code().context("it was killed")?, response))
}

fn message(response: &Value) -> &str {
    response["outcome"]["message"].as_str().unwrap_or_default()
}

// ---- after a kill

const STATUS: &str = "containerd.io/restart.status";

/// A container that containerd's restart monitor keeps running, until this is dropped.
struct Monitored<'a>(Container<'a>);

impl<'a> Monitored<'a> {
    fn start(node: &'a Node, labels: &[&str]) -> anyhow::Result<Monitored<'a>> {
        let status = format!("{STATUS}=running");
        let labels = [&[status.as_str()], labels].concat();
        let options: Vec<&str> = labels.iter().flat_map(|label| ["--label", label]).collect();
        Ok(Monitored(node.container_with(&options)?))
    }

    fn is_running_as_another_than(&self, init: i32) -> anyhow::Result<bool> {
        let is_running = is_running(self.0.node, &self.0.id)?;
        Ok(is_running && self.0.init()? != init)
    }
}

impl Drop for Monitored<'_> {
    fn drop(&mut self) {
        let stopped = format!("{STATUS}=stopped");
        let _ = self.0.node.ctr(&["containers", "label", &self.0.id, &stopped]);
    }
}

fn d01_restarts(node: &Node) -> anyhow::Result<()> {
    // No policy, and an empty one: both mean always, whatever containerd's version is.
    let kept = Monitored::start(node, &["containerd.io/restart.explicitly-stopped=true"])?;
    let back = Monitored::start(node, &["containerd.io/restart.policy="])?;
    let (kept_id, back_id) = (kept.0.id.as_str(), back.0.id.as_str());

    let (code, stopped) = respond(node, &["kill", kept_id, "--no-restart"])?;
    ensure!(code == 0 && message(&stopped).contains("was set first"), "{stopped:#}");
    ensure!(stopped["outcome"]["restarter"].is_null(), "{stopped:#}");
    let before = back.0.init()?;
    let (code, killed) = respond(node, &["kill", back_id])?;
    ensure!(code == 0, "{killed:#}");
    let advice = format!("containers label {back_id} {STATUS}=stopped");
    for part in ["containerd's restart monitor starts it again", "--no-restart", &advice] {
        ensure!(message(&killed).contains(part), "{part} is missing: {killed:#}");
    }
    ensure!(killed["outcome"]["restarter"] == "restart_monitor", "{killed:#}");

    wait_for("the container to run again", || {
        Ok(back.is_running_as_another_than(before)?.then_some(()))
    })?;
    let recorded = recorded_responses(node, back_id, 2)?;
    let [kill, restart] = &recorded[..] else { anyhow::bail!("not two: {recorded:#?}") };
    ensure!(kill["outcome"]["restarter"] == "restart_monitor", "{kill:#}");
    ensure!(restart["outcome"]["action"] == "restart", "{restart:#}");
    ensure!(message(restart).contains("started again"), "{restart:#}");
    ensure!(restart["requested_by"].as_str().is_some_and(|by| by.contains("restart monitor")));
    let timeline = node.driftd(&["timeline", back_id])?;
    ensure!(
        talk(&timeline).contains("started again") || {
            String::from_utf8_lossy(&timeline.stdout).contains("started again")
        }
    );
    // The monitor has checked both by now.
    ensure!(!is_running(node, kept_id)?, "it was started again");
    let info = node.ctr(&["containers", "info", kept_id])?;
    let labels = &serde_json::from_str::<Value>(&info)?["Labels"];
    ensure!(labels[STATUS] == "stopped", "{labels:#}");
    ensure!(labels["containerd.io/restart.explicitly-stopped"] == "true", "{labels:#}");
    Ok(())
}

// ---- frozen

/// The control group by which a container is frozen.
struct Freezer {
    directory: PathBuf,
    is_unified: bool,
}

impl Freezer {
    fn of(container: &Container<'_>) -> anyhow::Result<Freezer> {
        let groups = fs::read_to_string(format!("/proc/{}/cgroup", container.init()?))?;
        let mut lines = groups.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
        let of_v1 = lines.find(|line| line.get(1) == Some(&"freezer"));
        let is_unified = of_v1.is_none();
        let path = match of_v1 {
            Some(line) => line.get(2).map(|path| (*path).to_owned()),
            None => groups.lines().find_map(|line| Some(line.strip_prefix("0::")?.to_owned())),
        };
        let path = path.filter(|path| path.len() > 1).context("it has no group of its own")?;
        let mount = if is_unified { "/sys/fs/cgroup" } else { "/sys/fs/cgroup/freezer" };
        Ok(Freezer { directory: Path::new(mount).join(&path[1..]), is_unified })
    }

    fn file(&self) -> PathBuf {
        self.directory.join(if self.is_unified { "cgroup.freeze" } else { "freezer.state" })
    }

    fn freeze(&self) -> anyhow::Result<()> {
        Ok(fs::write(self.file(), if self.is_unified { "1" } else { "FROZEN" })?)
    }

    fn is_ordered(&self) -> anyhow::Result<bool> {
        Ok(!["0", "THAWED"].contains(&fs::read_to_string(self.file())?.trim()))
    }

    fn is_frozen(&self) -> anyhow::Result<bool> {
        let state =
            if self.is_unified { self.directory.join("cgroup.events") } else { self.file() };
        let state = fs::read_to_string(state)?;
        Ok(state.contains("frozen 1") || state.trim() == "FROZEN")
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        // A frozen container cannot be ended.
        let _ = fs::write(self.file(), if self.is_unified { "0" } else { "THAWED" });
    }
}

fn d03_frozen(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let id = container.id.as_str();
    let freezer = Freezer::of(&container)?;
    let (code, running) = respond(node, &["resume", id])?;
    ensure!(code == 0 && message(&running) == "it was not paused", "{running:#}");

    freezer.freeze()?;
    wait_for("the group to be frozen", || Ok(freezer.is_frozen()?.then_some(())))?;
    let listed = node.ctr(&["task", "ls"])?;
    ensure!(state_in(&listed, id) == Some("RUNNING"), "containerd knows it: {listed}");
    let (code, paused) = respond(node, &["pause", id])?;
    ensure!(code == 0 && message(&paused).contains("freeze already"), "{paused:#}");
    let (code, thawed) = respond(node, &["resume", id])?;
    ensure!(code == 0 && message(&thawed).starts_with("thawed (pid "), "{thawed:#}");
    ensure!(!freezer.is_ordered()?, "it is still frozen");
    container.sh("true")?;

    // A container that containerd has paused is resumed as well.
    let (code, paused) = respond(node, &["pause", id])?;
    ensure!(code == 0 && message(&paused).starts_with("paused (pid "), "{paused:#}");
    ensure!(freezer.is_frozen()? && !message(&paused).contains("not yet"), "{paused:#}");
    let (code, resumed) = respond(node, &["resume", id])?;
    ensure!(code == 0 && message(&resumed).starts_with("resumed (pid "), "{resumed:#}");

    // A frozen container can be killed.
    freezer.freeze()?;
    let (code, killed) = respond(node, &["kill", id])?;
    ensure!(code == 0 && message(&killed).starts_with("killed (pid "), "{killed:#}");
    wait_for("the container to end", || Ok((!is_running(node, id)?).then_some(())))
}

fn d03_held(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(MAY_MOUNT)?;
    let id = container.id.as_str();
    let freezer = Freezer::of(&container)?;
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::None, &[("x", "/usr/bin/app")])?;
    let waits = container.begin("/bin/busybox cat /mnt/f/x")?;
    wait_for("a request", || Ok((!fuse.unanswered().is_empty()).then_some(())))?;

    // By hand: the group was ordered to freeze, and cannot while a process waits.
    freezer.freeze()?;
    let (_, paused) = respond(node, &["pause", id])?;
    let is_half = !freezer.is_frozen()?;
    ensure!(message(&paused).contains("not yet frozen") == is_half, "{paused:#}");
    let (code, thawed) = respond(node, &["resume", id])?;
    ensure!(code == 0 && message(&thawed).starts_with("thawed (pid "), "{thawed:#}");
    ensure!(!freezer.is_ordered()?, "it still freezes");

    // By containerd: the response states what the group's files state.
    let (code, paused) = respond(node, &["pause", id])?;
    let (is_ordered, is_frozen) = (freezer.is_ordered()?, freezer.is_frozen()?);
    let (half, not_yet) =
        (message(&paused).contains("half paused"), message(&paused).contains("not yet frozen"));
    let expected = match (code, is_ordered) {
        (0, _) => (false, !is_frozen),
        (_, true) => (true, false),
        (_, false) => (false, false),
    };
    ensure!((half, not_yet) == expected, "{is_ordered} {is_frozen} {paused:#}");
    let (code, resumed) = respond(node, &["resume", id])?;
    ensure!(code == 0 && !freezer.is_ordered()?, "{resumed:#}");
    fuse.abort();
    waits.finish(DEADLINE)?;
    Ok(())
}
