//! Denial on a real node: what a rule denies does not run, from wherever it is, and what it does
//! not deny runs as before. Nothing waits for driftd longer than it may.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, bench, talk, wait_for};
use crate::programs::compile;
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    const SETTINGS: &str = "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"on\"";
    const DRY_RUN: &str = "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"dry-run\"";
    vec![
        test_alone("what_a_rule_denies_does_not_run_wherever_it_lies", SETTINGS, |node| {
            denied(node, 50)
        }),
        test_alone("a_thousand_of_each_are_denied", SETTINGS, |node| denied(node, 1000))
            .with_ignored_flag(true),
        test_alone("a_rehearsal_denies_nothing_and_says_what_it_would", DRY_RUN, rehearsed),
        test_alone("what_cannot_be_denied_is_killed", SETTINGS, killed),
    ]
}

/// Tries to run a program many times. Prints how many ran, how many were refused with EPERM, how
/// many failed otherwise, and how long the slowest and the median took, in microseconds.
const ATTEMPT: &str = r#"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000L + time.tv_nsec / 1000;
}

static int by_size(const void *one, const void *other)
{
    long difference = *(const long *)one - *(const long *)other;
    return difference < 0 ? -1 : difference > 0;
}

int main(int argc, char **argv)
{
    (void)argc;
    long times = atol(argv[1]), ran = 0, refused = 0, failed = 0;
    long *took = calloc(times, sizeof *took);
    for (long i = 0; i < times; i++) {
        int status;
        long begin = now();
        pid_t child = fork();
        if (!child) {
            execv(argv[2], argv + 2);
            _exit(errno == EPERM ? 201 : 202);
        }
        waitpid(child, &status, 0);
        took[i] = now() - begin;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 201)
            refused++;
        else if (WIFEXITED(status) && WEXITSTATUS(status) == 202)
            failed++;
        else
            ran++;
    }
    qsort(took, times, sizeof *took, by_size);
    printf("ran %ld refused %ld failed %ld median %ld slowest %ld\n", ran, refused, failed,
           took[times / 2], took[times - 1]);
    return 0;
}
"#;

/// Puts one rule in force that denies what is run from these paths.
fn deny(node: &Node, paths: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        format!(
            "[[rule]]\nid = \"no-drift\"\nreason = \"a test\"\neffect = \"report\"\n\
             answer = [\"deny\"]\n[rule.match]\nkind = [\"exec.*\"]\npath = [{paths}]\n"
        ),
    )?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", talk(&reload));
    Ok(())
}

fn attempt(container: &Container<'_>, times: u32, command: &str) -> anyhow::Result<String> {
    let command = format!("/.control/attempt {times} {command}");
    let ran = container.begin(&command)?.finish(Duration::from_secs(300))?;
    Ok(ran.output.trim().to_owned())
}

/// A container with the program that tries, a tmpfs and a volume, and its programs there.
fn prepared(node: &Node) -> anyhow::Result<Container<'_>> {
    let memory = "type=tmpfs,src=shm,dst=/dev/shm,options=rw:nosuid:mode=1777";
    let container = node.container_with(&["--mount", memory])?;
    container.wait_until_watched()?;
    container.lay("attempt", &compile(bench()?.scratch.path(), "attempt", ATTEMPT)?)?;
    container.lay_payload("x")?;
    container.lay_payload("y")?;
    container.lay_payload("on-volume")?;
    container.lay("marker.sh", b"#!/bin/sh\necho ran >>/.control/ran\n")?;
    container.sh(
        "cp /.control/x /tmp/x; cp /.control/x /dev/shm/x; cat /.control/y >/usr/bin/curl
        cp /.control/marker.sh /tmp/marker.sh; cp /.control/marker.sh /dev/shm/marker.sh
        chmod 755 /tmp/x /dev/shm/x /tmp/marker.sh /dev/shm/marker.sh /.control/marker.sh",
    )?;
    Ok(container)
}

fn denied(node: &Node, times: u32) -> anyhow::Result<()> {
    deny(node, "\"/tmp/**\", \"/dev/shm/**\", \"/usr/bin/curl\", \"/.control/on-volume\"")?;
    let container = prepared(node)?;
    let all = format!("ran 0 refused {times} failed 0");
    for program in [
        "/tmp/x",
        "/dev/shm/x",
        "/usr/bin/curl",
        "/.control/on-volume",
        "/tmp/marker.sh",
        "/dev/shm/marker.sh",
    ] {
        let output = attempt(&container, times, program)?;
        ensure!(output.starts_with(&all), "{program}: {output}\n{}", node.logs());
        eprintln!("{program}: {output}");
    }
    ensure!(!container.laid("ran").exists(), "a script ran");
    // Beside it, everything else runs.
    let output = attempt(&container, times, "/bin/true")?;
    ensure!(output.starts_with(&format!("ran {times} ")), "{output}");
    eprintln!("/bin/true: {output}");
    let findings = wait_for("the findings", || {
        let findings = container.findings()?;
        let count = |path: &str| {
            let of = |one: &&Value| one["file"]["path"] == path && one["count"] == times;
            findings.iter().filter(of).count()
        };
        let counted = count("/tmp/x") == 1 && count("/dev/shm/x") == 1;
        Ok((counted && count("/usr/bin/curl") == 1).then_some(findings))
    })
    .with_context(|| format!("{:#?}", container.findings()))?;
    let of_x = findings.iter().find(|one| one["file"]["path"] == "/tmp/x").context("no finding")?;
    ensure!(of_x["outcome"]["action"] == "deny", "{of_x:#}");
    ensure!(of_x["verdict"]["disposition"] == "deny", "{of_x:#}");
    let message = of_x["outcome"]["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("EPERM") && message.contains(&format!("({times} so far)")),
        "{of_x:#}"
    );
    ensure!(node.losses("undecided")? == 0, "{:#}", node.status()?);

    // The rule ends, and it runs.
    fs::remove_file(node.path("policy.d").join("10.toml"))?;
    node.driftd(&["policy", "reload"])?;
    wait_for("it to run", || {
        let output = attempt(&container, 1, "/tmp/x")?;
        Ok(output.starts_with("ran 1 ").then_some(()))
    })
}

fn rehearsed(node: &Node) -> anyhow::Result<()> {
    deny(node, "\"/tmp/**\"")?;
    let container = prepared(node)?;
    let output = attempt(&container, 5, "/tmp/x")?;
    ensure!(output.starts_with("ran 5 "), "{output}");
    let finding = wait_for("the finding", || {
        let findings = container.findings()?;
        Ok(findings.into_iter().find(|one| one["file"]["path"] == "/tmp/x" && one["count"] == 5))
    })?;
    let answer = &finding["verdict"]["answers"][0];
    ensure!(answer["action"] == "deny" && answer["dry_run"] == true, "{finding:#}");
    ensure!(finding["outcome"].is_null(), "{finding:#}");
    Ok(())
}

/// A program in memory is not asked about.
fn killed(node: &Node) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        "[[rule]]\nid = \"no-drift\"\nreason = \"a test\"\neffect = \"report\"\n\
         answer = [\"deny\"]\n[rule.match]\nkind = [\"exec.fileless\", \"exec.interpreted\"]\n",
    )?;
    node.driftd(&["policy", "reload"])?;
    let container = node.container()?;
    container.wait_until_watched()?;
    container.sh("echo 'sleep 20; exit 3' >/tmp/dropped.sh")?;
    let ran = container.try_sh("( sh /tmp/dropped.sh ); echo $?")?;
    ensure!(ran.output.trim().ends_with("137"), "{ran:?}");
    let finding = wait_for("the outcome", || {
        let findings = container.findings()?;
        Ok(findings.into_iter().find(|one| one["outcome"]["action"] == "kill-process"))
    })?;
    ensure!(finding["verdict"]["action"] == "deny", "{finding:#}");
    Ok(())
}
