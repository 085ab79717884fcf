//! A response affects only the run of a container for which it was given: no later run of
//! the same ID, and no container with a similar name. It is repeated while that run exists.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::commands::{is_running, recorded_responses, state_in};
use crate::node::{Control, Node, bench, only, talk, wait_for, wait_within};
use crate::programs::WORKBENCH;
use crate::{test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone(
            "x11_a_clean_container_is_not_killed_for_an_earlier_one_of_its_id",
            "[respond]\nkill_on = [\"exec.new\"]",
            x11_reused_id,
        ),
        test(
            "u19_a_response_takes_a_whole_name_and_refuses_a_container_that_is_gone",
            u19_whole_names,
        ),
        test("u19_a_response_to_a_finding_is_refused_when_its_run_is_over", u19_of_a_finding),
        test_alone(
            "h10_a_kill_that_failed_is_repeated_until_the_container_has_ended",
            "[respond]\nkill_on = [\"exec.new\"]",
            h10_repeated,
        ),
        test("a_kill_ends_every_process_in_a_shared_pid_namespace_too", shared_pid_namespace),
    ]
}

/// Starts a container with an ID of the test's own.
fn run(node: &Node, id: &str, options: &[&str], command: &str) -> anyhow::Result<()> {
    let cgroup = format!("/{}/{id}", node.namespace);
    let usual = ["run", "-d", "--null-io", "--cgroup", &cgroup];
    let image = [WORKBENCH, id, "/bin/sh", "-c", command];
    node.ctr(&[&usual[..], options, &image].concat()).map(drop)
}

fn remove(node: &Node, id: &str) -> anyhow::Result<()> {
    wait_for("the task to be removed", || Ok(node.ctr(&["task", "rm", "--force", id]).ok()))?;
    node.ctr(&["container", "rm", id]).map(drop)
}

/// The first container ends while a large program that it has run is still being hashed. Its
/// finding comes when another container has the ID.
fn x11_reused_id(node: &Node) -> anyhow::Result<()> {
    /// Rounds in which the finding comes after another container has the ID.
    const LATE: usize = 1;
    const MOST_ROUNDS: usize = 6;
    let id = "reused";
    node.own_container(id);
    let control = Control::new(node, id)?;
    let bind = format!("type=bind,src={},dst=/.control,options=rbind:rw", control.path.display());
    let mut late = 0;
    for round in 0..MOST_ROUNDS {
        let program = bench()?.payload.marked(&format!("{} {round}", node.namespace));
        let laid = control.path.join("big");
        std::fs::write(&laid, program)?;
        let hole = std::fs::OpenOptions::new().write(true).open(&laid)?;
        hole.set_len(2_097_152)?;
        let path = format!("/tmp/big{round}");
        let drop_and_end = format!(
            "dd if=/dev/zero of={path} bs=1M count=500 2>/dev/null; \
             dd if=/.control/big of={path} bs=4096 count=512 conv=notrunc 2>/dev/null; \
             chmod +x {path}; {path} 20"
        );
        run(node, id, &["--mount", &bind], &drop_and_end)?;
        wait_for("the first one to end", || Ok((!is_running(node, id)?).then_some(())))?;
        remove(node, id)?;
        run(node, id, &[], "sleep 600")?;
        let is_reported = || {
            let reported = node.answer(&["findings", "--kind", "exec.new"])?;
            anyhow::Ok(reported.iter().any(|one| one["file"]["path"] == path.as_str()))
        };
        late += usize::from(!is_reported()?);
        wait_within(Duration::from_secs(20), "the finding of the first one", || {
            Ok(is_reported()?.then_some(()))
        })?;
        // Long enough for a kill that the finding has caused.
        std::thread::sleep(Duration::from_millis(500));
        ensure!(is_running(node, id)?, "round {round}: the clean container was killed");
        remove(node, id)?;
        if late == LATE {
            return Ok(());
        }
    }
    anyhow::bail!("in {late} of {MOST_ROUNDS} rounds the finding came late enough")
}

fn u19_whole_names(node: &Node) -> anyhow::Result<()> {
    let web = node.next_id();
    let canary = format!("{web}-canary");
    let generated = format!("4f2a90cc{:056x}", std::process::id());
    for id in [&web, &canary, &generated] {
        node.own_container(id);
        run(node, id, &[], "sleep 600")?;
    }
    for id in [&web, &canary, &generated] {
        node.wait_until_watched(id)?;
    }
    let respond = |action: &str, id: &str, expected: i32| {
        let output = node.driftd(&["respond", action, id, "--reason", "a test"])?;
        ensure!(output.status.code() == Some(expected), "{action} {id}: {}", talk(&output));
        Ok(talk(&output))
    };
    let state = |id: &str| anyhow::Ok(state_in(&node.ctr(&["task", "ls"])?, id).map(str::to_owned));
    respond("pause", &web, 0)?;
    assert_eq!(state(&web)?.as_deref(), Some("PAUSED"));
    assert_eq!(state(&canary)?.as_deref(), Some("RUNNING"));
    respond("resume", &format!("{}/{web}", node.namespace), 0)?;
    assert_eq!(state(&web)?.as_deref(), Some("RUNNING"));

    remove(node, &web)?;
    for action in ["pause", "kill", "resume"] {
        let message = respond(action, &web, 2)?;
        ensure!(message.contains("gone") || message.contains("write the whole ID"), "{message}");
    }
    let message = respond("pause", &canary[..canary.len() - 1], 2)?;
    ensure!(message.contains("write the whole ID") && message.contains(&canary), "{message}");
    for action in ["pause", "kill", "resume"] {
        respond(action, &web, 2)?;
        respond(action, &web[..web.len() - 1], 2)?;
    }
    let beginning = format!("{web}-can");
    for query in [
        &["diff", &web][..],
        &["diff", &beginning],
        &["timeline", &beginning],
        &["sessions", "--container", &beginning],
        &["probes", "--container", &beginning],
        &["findings", "--container", &beginning],
    ] {
        let output = node.driftd(query)?;
        ensure!(output.status.code() == Some(2), "{query:?}: {}", talk(&output));
    }
    assert_eq!(state(&canary)?.as_deref(), Some("RUNNING"));

    respond("pause", &generated[..7], 2)?;
    respond("pause", &generated[..8], 0)?;
    assert_eq!(state(&generated)?.as_deref(), Some("PAUSED"));
    // A frozen container is killed too.
    respond("kill", &generated[..12], 0)?;
    wait_for("it to end", || Ok((state(&generated)?.as_deref() == Some("STOPPED")).then_some(())))?;
    let message = respond("pause", &generated, 2)?;
    ensure!(message.contains("FAILED") || message.contains("gone"), "{message}");
    Ok(())
}

fn u19_of_a_finding(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.run_dropped("x")?;
    let reported = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let run = only(&reported, "exec.new")?;
    let id = run["id"].as_str().context("it has no ID")?;
    assert_eq!(run["run"]["pid"].as_u64(), Some(pid_of(node, &container.id)?));
    let respond = |action: &str, more: &[&str], expected: i32| {
        let words = ["respond", action, "--finding", &id[..12], "--reason", "a test"];
        let output = node.driftd(&[&words[..], more].concat())?;
        ensure!(output.status.code() == Some(expected), "{action}: {}", talk(&output));
        Ok(talk(&output))
    };
    respond("pause", &[], 0)?;
    respond("resume", &[&container.id], 0)?;
    respond("pause", &["another"], 2)?;
    container.stop()?;
    container.start_again()?;
    let message = respond("kill", &[], 2)?;
    ensure!(message.contains("is over"), "{message}");
    ensure!(is_running(node, &container.id)?, "a later run was killed");
    Ok(())
}

fn h10_repeated(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    node.crash_containerd()?;
    // The shell is killed before it can report its end.
    let _ = container.begin("cp /.control/x /tmp/x; /tmp/x; sleep 600")?;
    let failed = recorded_responses(node, &container.id, 2)?;
    for response in &failed {
        assert_eq!(response["outcome"]["succeeded"], false, "{response:#}");
        ensure!(response["incarnation"]["pid"].as_u64() > Some(0), "{response:#}");
        ensure!(response["incarnation"]["start_time"].as_u64() > Some(0), "{response:#}");
    }
    node.start_containerd()?;
    wait_for("the container to end", || Ok((!is_running(node, &container.id)?).then_some(())))?;
    wait_for("the kill to be recorded", || {
        let all = recorded_responses(node, &container.id, failed.len() + 1)?;
        let last = all.last().context("no response")?;
        Ok((last["outcome"]["succeeded"] == true).then_some(()))
    })
}

/// If init is not process 1 of its pid namespace, its end does not end the other processes.
fn shared_pid_namespace(node: &Node) -> anyhow::Result<()> {
    let host = node.container()?;
    let init = pid_of(node, &host.id)?;
    let container = node.container_with(&["--with-ns", &format!("pid:/proc/{init}/ns/pid")])?;
    container.sh("sleep 7654321 >/dev/null 2>&1 &")?;
    let sleeps = || -> anyhow::Result<bool> {
        let mut processes = std::fs::read_dir("/proc")?.flatten();
        Ok(processes.any(|process| {
            std::fs::read(process.path().join("cmdline"))
                .is_ok_and(|line| line.ends_with(b"sleep\x007654321\0"))
        }))
    };
    wait_for("its process", || Ok(sleeps()?.then_some(())))?;
    let output = node.driftd(&["respond", "kill", &container.id, "--reason", "a test"])?;
    ensure!(output.status.code() == Some(0), "{}", talk(&output));
    wait_for("all of it to end", || Ok((!sleeps()?).then_some(())))?;
    ensure!(is_running(node, &host.id)?, "the other one was killed");
    Ok(())
}

fn pid_of(node: &Node, id: &str) -> anyhow::Result<u64> {
    let known = node.answer(&["containers"])?;
    let this = known.iter().find(|one| one["id"] == id).context("it is not listed")?;
    this["pid"].as_u64().context("it has no pid")
}
