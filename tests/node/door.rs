//! Filesystems that a process of a container answers for: nobody of driftd asks one. And
//! what a process says of itself, which is no evidence.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use libtest_mimic::Trial;

use crate::fuse::{Answers, Fuse, MAY_MOUNT};
use crate::node::{Node, wait_within};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("a_filesystem_that_answers_only_its_own_lets_others_wait", others_wait)]
}

/// That the tests' own filesystem does what the others rely on.
fn others_wait(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(MAY_MOUNT)?;
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::ItsOwn, &[("x", "/usr/bin/app")])?;
    ensure!(container.sh("cat /mnt/f/x | wc -c; ls /mnt/f")?.ends_with("x\n"));
    let root = format!("/proc/{}/root/mnt/f/x", container.init()?);
    let mut asks = Command::new("/bin/cat").arg(root).spawn()?;
    let five = Duration::from_secs(5);
    wait_within(five, "a question", || Ok((!fuse.unanswered().is_empty()).then_some(())))?;
    ensure!(asks.try_wait()?.is_none(), "it was answered");
    drop(fuse);
    wait_within(five, "an error", || Ok(asks.try_wait()?.filter(|status| !status.success())))?;
    Ok(())
}
