//! Programs that have no name, and programs on filesystems without a mark: they are found by
//! the kernel's records, and by a scan of the running processes.

use std::time::Duration;

use anyhow::ensure;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Node, bench, only};
use crate::{sessions, test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a10_memfd_is_fileless", a10_memfd),
        test("a10_script_in_a_memfd_is_fileless", a10_script),
        test("a10_file_that_never_had_a_name_is_fileless", a10_tmpfile),
        test("a10_memfd_executed_by_another_thread_is_fileless", a10_thread),
        test("a10_a_thousand_memfds_are_all_counted", a10_a_thousand),
        test(
            "a12_a_program_on_a_tmpfs_in_a_mount_namespace_of_its_own_is_reported",
            a12_nested_namespace,
        ),
        test_alone("a15_what_ran_before_the_daemon_is_found_by_a_scan", "", a15_running),
        test("a41_the_hash_is_of_what_ran_whatever_is_renamed", a41_rename_race),
        test("a47_image_program_by_descriptor_is_silent", a47_by_descriptor),
        test("b04_code_in_memory_that_is_not_executed_is_silent", b04_just_in_time),
        test("b23_runtimes_copy_of_itself_is_silent", b23_runtime),
    ]
}

fn hash_of_payload(node: &Node, id: &str, name: &str) -> anyhow::Result<String> {
    let mark = format!("{} {id} {name}", node.namespace);
    Ok(blake3::hash(&bench()?.payload.marked(&mark)).to_hex().to_string())
}

fn a10_memfd(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("/usr/bin/loader memfd 1 /.control/x 300")?;
    let findings = container.expect_findings(&["critical exec.fileless /memfd:a"])?;
    let run = only(&findings, "exec.fileless")?;
    assert_eq!(run["file"]["blake3"], hash_of_payload(node, &container.id, "x")?.as_str());
    assert_eq!((&run["file"]["deleted"], &run["count"]), (&true.into(), &1.into()), "{run:#}");
    assert_eq!(run["source"], "trace", "{run:#}");
    // The arguments of the new program, not those of its loader.
    assert_eq!(run["process"]["argv"], serde_json::json!(["a", "300"]), "{run:#}");
    assert_eq!(run["process"]["ancestors"][0]["exe"], "/usr/bin/loader", "{run:#}");
    Ok(())
}

fn a10_script(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay("script", b"#!/bin/sh\nsleep 0.3\n")?;
    container.sh("/usr/bin/loader script /.control/script")?;
    let findings = container.expect_findings(&["critical exec.fileless /memfd:s"])?;
    assert_eq!(only(&findings, "exec.fileless")?["file"]["type"], "script");
    Ok(())
}

fn a10_tmpfile(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh(
        "/usr/bin/loader tmpfile /tmp 2 /.control/x; /usr/bin/loader tmpfile /tmp 1 /.control/x",
    )?;
    container.counted("exec.fileless", 3)?;
    let findings = container.expect_findings(&["critical exec.fileless /tmp/#tmpfile"])?;
    let run = only(&findings, "exec.fileless")?;
    assert_eq!(run["file"]["blake3"], hash_of_payload(node, &container.id, "x")?.as_str());
    assert_eq!((&run["file"]["deleted"], &run["count"]), (&true.into(), &3.into()), "{run:#}");
    Ok(())
}

fn a10_thread(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("/usr/bin/loader thread /.control/x")?;
    container.expect_findings(&["critical exec.fileless /memfd:t"]).map(drop)
}

fn a10_a_thousand(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .begin("/usr/bin/loader memfd 1000 /.control/x 0")?
        .finish(Duration::from_secs(120))?;
    let count = || -> anyhow::Result<(u64, Vec<Value>)> {
        let findings = container.findings()?;
        let fileless = findings.iter().filter(|finding| finding["kind"] == "exec.fileless");
        Ok((fileless.map(|finding| finding["count"].as_u64().unwrap_or(0)).sum(), findings))
    };
    crate::node::wait_within(Duration::from_secs(120), "a thousand executions", || {
        Ok((count()?.0 >= 1000).then_some(()))
    })?;
    let (count, findings) = count()?;
    assert_eq!(count, 1000, "{findings:#?}");
    ensure!(findings.iter().all(|finding| finding["kind"] == "exec.fileless"), "{findings:#?}");
    Ok(())
}

fn a12_nested_namespace(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("mkdir /tmp/m\n\
         /bin/busybox unshare -U -r -m /bin/sh -c '/bin/busybox mount -t tmpfs t /tmp/m; \
         cp /.control/x /tmp/m/x; /tmp/m/x 100'")?;
    let findings = container.expect_findings(&["high exec.tmpfs /tmp/m/x"])?;
    let run = only(&findings, "exec.tmpfs")?;
    assert_eq!(run["file"]["blake3"], hash_of_payload(node, &container.id, "x")?.as_str());
    assert_eq!((&run["source"], &run["count"]), (&"trace".into(), &1.into()), "{run:#}");
    Ok(())
}

fn a15_running(node: &Node) -> anyhow::Result<()> {
    node.stop_driftd()?;
    let container = node.unwatched_container_of(crate::programs::WORKBENCH)?;
    container.lay_payload("x")?;
    container.lay_payload("y")?;
    let running = container.begin(
        "cp /.control/x /tmp/x; /tmp/x 3600000 & \n\
         /usr/bin/loader memfd 1 /.control/y 3600000 & \n\
         sleep 1; rm /tmp/x",
    )?;
    running.finish(crate::node::DEADLINE)?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    let findings = container
        .expect_findings(&["high exec.deleted /tmp/x", "critical exec.fileless /memfd:a"])?;
    let deleted = only(&findings, "exec.deleted")?;
    assert_eq!(deleted["source"], "scan", "{deleted:#}");
    assert_eq!(deleted["file"]["blake3"], hash_of_payload(node, &container.id, "x")?.as_str());
    assert_eq!(deleted["file"]["deleted"], true, "{deleted:#}");
    let fileless = only(&findings, "exec.fileless")?;
    assert_eq!(fileless["source"], "scan", "{fileless:#}");
    assert_eq!(fileless["file"]["blake3"], hash_of_payload(node, &container.id, "y")?.as_str());

    // Found again, it is not reported a second time.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    let findings = container
        .expect_findings(&["high exec.deleted /tmp/x", "critical exec.fileless /memfd:a"])?;
    ensure!(findings.iter().all(|finding| finding["count"] == 1), "{findings:#?}");
    Ok(())
}

fn a41_rename_race(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .begin(
            "i=0; while [ $i -lt 100 ]; do\n\
             cp /.control/x /tmp/x; cp /bin/ls /tmp/y\n\
             /tmp/x & mv /tmp/y /tmp/x; wait; rm /tmp/x; i=$((i+1)); done >/dev/null",
        )?
        .finish(Duration::from_secs(120))?;
    let payload = hash_of_payload(node, &container.id, "x")?;
    let executed = || -> anyhow::Result<Vec<Value>> {
        let mut findings = container.findings()?;
        findings.retain(|finding| {
            finding["kind"].as_str().is_some_and(|kind| kind.starts_with("exec."))
        });
        Ok(findings)
    };
    let sum = |findings: &[Value]| -> u64 {
        findings.iter().filter_map(|finding| finding["count"].as_u64()).sum()
    };
    crate::node::wait_within(Duration::from_secs(60), "a hundred executions", || {
        Ok((sum(&executed()?) >= 100).then_some(()))
    })?;
    let findings = executed()?;
    assert_eq!(sum(&findings), 100, "{findings:#?}");
    for finding in findings {
        let is_payload = finding["file"]["blake3"] == payload.as_str();
        let is_ls = finding["expected"]["blake3"] == finding["file"]["blake3"];
        match finding["kind"].as_str() {
            Some("exec.new" | "exec.fileless") if is_payload => (),
            Some("exec.relocated") if is_ls => assert_eq!(finding["expected"]["path"], "/bin/ls"),
            // It lost its name before it ran.
            Some("exec.fileless") if is_ls => (),
            _ => anyhow::bail!("reported, although it did not run: {finding:#}"),
        }
    }
    Ok(())
}

fn a47_by_descriptor(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("/usr/bin/loader fd /usr/bin/app; /usr/bin/loader self")?;
    container.expect_silence()
}

fn b04_just_in_time(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("/usr/bin/loader map")?;
    container.expect_silence()
}

fn b23_runtime(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    for number in 0..5 {
        sessions::run(
            &container,
            &["--exec-id", &format!("run-{number}")],
            &["/bin/sleep", "0.3"],
        )?;
    }
    container.counted("session.exec", 5)?;
    container.expect_findings(&["info session.exec"])?;
    Ok(())
}
