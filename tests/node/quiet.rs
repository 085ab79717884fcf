//! Ordinary work that must not raise an alarm, each with an attack beside it that is reported
//! at full severity.

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::Layer;
use crate::node::{Node, bench, only, summaries, wait_for};
use crate::{programs, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("r22_w19_persistence_paths_are_known_by_the_program_that_reads_them", places),
        test("r23_bits_that_grant_nothing_are_silent", bits),
        test("r31_w09_content_of_the_image_on_a_tmpfs_is_relocated", tmpfs),
        test("r32_w06_scripts_of_numbered_steps_are_one_finding", steps),
        test("r37_data_that_was_only_touched_is_no_difference", touched),
        test("w03_r15_r17_code_that_a_program_makes_for_itself_is_no_alarm", generated),
        test("w16_a_removed_directory_is_as_bad_as_the_worst_in_it", removed),
    ]
}

fn places(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh(
        "mkdir -p /etc/crontabs /etc/bash /etc/periodic/daily /etc/local.d /etc/supervisor/conf.d\n\
         mkdir -p /usr/lib/python3/dist-packages /etc/service/x/supervise /opt/lib\n\
         echo '* * * * * /tmp/x' >> /etc/crontabs/root; echo evil >> /etc/bash/bashrc\n\
         echo evil > /etc/periodic/daily/x; echo evil > /etc/local.d/a.start\n\
         echo evil >> /etc/environment\n\
         echo evil > /etc/supervisor/conf.d/x.conf; echo evil > /etc/service/x/run\n\
         echo 1 > /etc/service/x/supervise/status\n\
         echo evil > /usr/lib/python3/usercustomize.py\n\
         echo evil > /usr/lib/python3/dist-packages/x.pth; echo evil > /opt/lib/x.pth\n\
         echo evil > /app/.profile; echo evil > /opt/.profile\n\
         echo evil > /docker-entrypoint.d/99-x.sh; chmod 755 /docker-entrypoint.d/10-x.sh",
    )?;
    container
        .expect_findings(&[
            // The home of a user of the image.
            "high file.persistence /app/.profile",
            "high file.persistence /docker-entrypoint.d/99-x.sh",
            "high file.persistence /etc/bash/bashrc",
            "high file.persistence /etc/crontabs/root",
            "high file.persistence /etc/environment",
            "high file.persistence /etc/local.d/a.start",
            "high file.persistence /etc/periodic/daily/x",
            "high file.persistence /etc/service/x/run",
            "high file.persistence /etc/supervisor/conf.d/x.conf",
            "high file.persistence /usr/lib/python3/dist-packages/x.pth",
            "high file.persistence /usr/lib/python3/usercustomize.py",
        ])
        .map(drop)
}

fn bits(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container
        .sh("mkdir /srv; i=0; while [ $i -lt 40 ]; do echo $i > /srv/$i.txt; i=$((i+1)); done\n\
         chmod ug+sx /srv/*.txt /etc/app.conf; chmod u+s /usr/bin/app")?;
    container.expect_findings(&["high file.privileged /usr/bin/app"]).map(drop)
}

fn tmpfs(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("mkdir /run/s6; cp /usr/bin/app /run/s6/app; /run/s6/app\n\
         cp /.control/x /run/s6/x; /run/s6/x")?;
    container
        .expect_findings(&["high exec.tmpfs /run/s6/x", "medium exec.relocated /run/s6/app"])
        .map(drop)
}

fn steps(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /work/_temp; i=0\n\
         while [ $i -lt 40 ]; do\n\
         echo sleep 0.02 > /work/_temp/$i.sh; sh -e /work/_temp/$i.sh; rm /work/_temp/$i.sh\n\
         i=$((i+1)); done\n\
         echo sleep 0.3 > /work/evil.sh; sh /work/evil.sh")?;
    let findings = wait_for("both findings", || {
        let findings = container.findings()?;
        Ok((findings.len() >= 2).then_some(findings))
    })?;
    let lines = summaries(&findings);
    ensure!(lines.iter().all(|line| line.starts_with("medium exec.interpreted")), "{lines:#?}");
    ensure!(lines.len() == 2, "{lines:#?}");
    let evil = findings.iter().find(|one| one["file"]["path"] == "/work/evil.sh");
    ensure!(evil.context("no evil.sh")?["files"].is_null(), "{findings:#?}");
    let steps = findings.iter().find(|one| !one["files"].is_null()).context("no steps")?;
    ensure!(steps["files"].as_u64() >= Some(30), "{steps:#}");
    Ok(())
}

fn touched(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let change = |path: &str| {
        let differences = container.diff()?;
        let found = differences.into_iter().find(|one| one["path"] == path);
        anyhow::Ok(found.context("not listed")?["change"].clone())
    };
    container.sh("chmod 600 /etc/app.conf; chown app /etc/nginx/default.conf.template\n\
         chmod 755 /etc/group; echo more >> /var/log/nginx/access.log")?;
    // Also after a scan has seen them.
    for _ in 0..2 {
        ensure!(change("/etc/app.conf")? == "metadata", "{:#?}", container.diff()?);
        ensure!(change("/etc/nginx/default.conf.template")? == "metadata");
        ensure!(change("/var/log/nginx/access.log")? == "modified");
    }
    // Another content of the same length.
    container.sh("printf 'listen = 81\\n' > /etc/app.conf")?;
    ensure!(change("/etc/app.conf")? == "modified", "{:#?}", container.diff()?);
    container.expect_silence()
}

const IMAGE: &str = "registry.test/jit:1";

fn generated(node: &Node) -> anyhow::Result<()> {
    let bench = bench()?;
    let mut layers = programs::workbench(&bench.payload)?;
    let jit = programs::compile(bench.scratch.path(), "jit", include_str!("jit.c"))?;
    layers.push(Layer::new().file("/usr/bin/jit", 0o755, &jit));
    node.import_layers(IMAGE, layers)?;
    let container = node.container_of(IMAGE)?;
    container.lay_payload("lib")?;
    container.sh(
        "for name in AbCdEf qwerty 0a1b2c ZZZZZZ housex; do /usr/bin/jit data /tmp/ffi$name; done\n\
         mkdir -p -m 700 /root/.cache/JNA/temp\n\
         /usr/bin/jit unpack /.control/lib /root/.cache/JNA/temp/jna77281.tmp",
    )?;
    // A library that another process has written.
    container.lay_payload("evil")?;
    container.sh("cat /.control/evil > /tmp/evil.so; /usr/bin/jit load /tmp/evil.so")?;
    let made_there = |one: &&Value| {
        one["file"]["path"].as_str().is_some_and(|path| path.starts_with("/tmp/ffi"))
    };
    let findings = wait_for("all five, and the library of another process", || {
        let findings = container.findings()?;
        let is_reported = findings.iter().any(|one| one["file"]["path"] == "/tmp/evil.so");
        let made = findings.iter().filter(made_there);
        let count: u64 = made.filter_map(|one| one["count"].as_u64()).sum();
        Ok((is_reported && count >= 5).then_some(findings))
    })?;
    let high: Vec<String> = summaries(&findings)
        .into_iter()
        .filter(|line| !line.starts_with("info ") && !line.starts_with("low "))
        .collect();
    ensure!(high == ["high library.loaded /tmp/evil.so"], "{findings:#?}");
    // If a process ends before it is examined, its program may not be known.
    let made: Vec<&Value> = findings.iter().filter(made_there).collect();
    ensure!(made.len() <= 2, "{made:#?}");
    let unpacked = findings
        .iter()
        .find(|one| one["file"]["path"] == "/root/.cache/JNA/temp/jna77281.tmp")
        .with_context(|| format!("the unpacked library is in no finding: {findings:#?}"))?;
    ensure!(unpacked["kind"] == "library.loaded", "{unpacked:#}");
    Ok(())
}

fn removed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("rm -r /usr/sbin")?;
    let findings = container.expect_findings(&["medium file.removed /usr/sbin"])?;
    only(&findings, "file.removed").map(drop)
}
