//! A container that CRIU has restored from a checkpoint: none of its programs was executed
//! here. `make test-checkpoint` unpacks CRIU and runs this test; without that it is shown as
//! ignored.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Node, wait_within};
use crate::{programs, test_alone};

const CHECKPOINT: &str = "docker.io/driftd/checkpoint:1";
/// Long before driftd lists containerd's containers again.
const SOON: Duration = Duration::from_secs(15);

pub(crate) fn tests() -> Vec<Trial> {
    let name = "d05_a_container_restored_from_a_checkpoint_is_watched";
    vec![test_alone(name, "", restored).with_ignored_flag(true)]
}

fn restored(node: &Node) -> anyhow::Result<()> {
    programs::find("criu").context("run: make test-checkpoint")?;
    let new_sleep = "cp /bin/sleep /tmp/sleep && echo >>/tmp/sleep && exec /tmp/sleep 3600";
    let id = node.run_plainly(&[], &["/bin/sh", "-c", new_sleep])?;
    let executed = executed(node, &id, "/tmp/sleep")?;
    node.ctr(&["container", "checkpoint", "--task", "--image", "--rw", &id, CHECKPOINT])?;
    node.ctr(&["task", "kill", "--signal", "SIGKILL", &id])?;

    let again = node.next_id();
    node.own_container(&again);
    node.ctr(&["container", "restore", "--live", "--rw", &again, CHECKPOINT])?;
    let running = self::executed(node, &again, "/tmp/sleep")?;
    assert_eq!(running["file"]["blake3"], executed["file"]["blake3"]);
    assert_eq!((&running["source"], &running["session"]), (&"scan".into(), &Value::Null));
    let sessions = node.answer(&["sessions", "-c", &again])?;
    ensure!(sessions.is_empty(), "no process came into it from outside: {sessions:#?}");

    // From now on it is a container like any other.
    let new_cat = "cp /bin/cat /tmp/cat && echo >>/tmp/cat && /tmp/cat /etc/passwd";
    let fifo = node.path("fifo").display().to_string();
    let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id", "later", &again];
    node.ctr(&[&exec[..], &["/bin/sh", "-c", new_cat]].concat())?;
    let executed = self::executed(node, &again, "/tmp/cat")?;
    assert_eq!(executed["source"], "gate");
    ensure!(executed["session"].is_string(), "{executed:#}");
    Ok(())
}

/// Waits for the finding of a program that is not the image's.
fn executed(node: &Node, container: &str, path: &str) -> anyhow::Result<Value> {
    wait_within(SOON, path, || {
        let findings = node.answer(&["findings", "--container", container])?;
        let mut executed = findings.into_iter().filter(|finding| finding["kind"] == "exec.new");
        Ok(executed.find(|finding| finding["file"]["path"] == path))
    })
}
