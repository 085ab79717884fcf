//! How many of the kernel's fanotify groups driftd takes. Root has 128, together with all
//! containers that have no user namespace.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::unistd::Pid;

use crate::node::{Node, Setup};
use crate::test_on;

const STRICT: Setup = Setup {
    driftd: "arm = \"strict\"\nruntimes = [\"{node}/bin/runc\"]",
    cri: None,
    own_runtime: true,
    unwatched: None,
};
const FREE: Setup = Setup { driftd: "gate = \"free\"", ..PLAIN };
const NOTIFY: Setup = Setup { driftd: "gate = \"notify\"", ..PLAIN };
const PLAIN: Setup = Setup { driftd: "", cri: None, own_runtime: false, unwatched: None };

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_on("x14_a_daemon_takes_five_groups", PLAIN, |node| groups(node, 5)),
        test_on("x14_a_daemon_with_a_free_gate_takes_seven_groups", FREE, |node| groups(node, 7)),
        test_on("x14_a_daemon_with_a_notify_gate_takes_six_groups", NOTIFY, |node| groups(node, 6)),
        test_on("x14_a_daemon_that_arms_strictly_takes_five_groups", STRICT, |node| {
            groups(node, 5)
        }),
    ]
}

/// The number of groups that are open in a process and in each of its descendants.
fn groups_of(process: Pid) -> anyhow::Result<BTreeMap<i32, usize>> {
    let mut parents: Vec<(i32, i32)> = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let rest = stat.rsplit_once(") ").context("no stat")?.1;
        parents.push((pid, rest.split(' ').nth(1).context("no parent")?.parse()?));
    }
    let mut family = vec![process.as_raw()];
    let mut at = 0;
    while let Some(&parent) = family.get(at) {
        family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    let mut groups = BTreeMap::new();
    for pid in family {
        let Ok(open) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let is_group = |entry: &fs::DirEntry| {
            fs::read_link(entry.path())
                .is_ok_and(|target| target.as_os_str() == "anon_inode:[fanotify]")
        };
        groups.insert(pid, open.flatten().filter(is_group).count());
    }
    Ok(groups)
}

fn groups(node: &Node, expected: usize) -> anyhow::Result<()> {
    // Two containers: their number changes nothing.
    let (first, second) = (node.container()?, node.container()?);
    first.diff()?;
    second.diff()?;
    let groups = groups_of(node.driftd_pid()?)?;
    let all: usize = groups.values().sum();
    ensure!(all == expected, "{all} groups by process: {groups:?}");
    // The daemon and its gate; in a third process, groups would outlive them.
    ensure!(groups.values().filter(|count| **count > 0).count() == 2, "{groups:?}");

    let output = node.driftd(&["doctor", "-o", "jsonl"])?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find(|line| line.contains("\"fanotify groups\"")).context("no line")?;
    let check: serde_json::Value = serde_json::from_str(line)?;
    let detail = check["detail"].as_str().context("no detail")?;
    let left: u64 = detail.split(' ').next().unwrap_or_default().parse()?;
    let limit = fs::read_to_string("/proc/sys/fs/fanotify/max_user_groups")?;
    let limit: u64 = limit.trim().parse()?;
    ensure!(left + u64::try_from(all)? <= limit, "{detail}, and driftd has {all}");
    ensure!(detail.contains("driftd takes up to 8"), "{detail}");
    Ok(())
}
