//! The answers of rules on a real node: one process is killed and no other, a container is
//! frozen, and a rule that is wrong ends three containers and no more.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, bench, talk, wait_for, wait_within};
use crate::programs::compile;
use crate::{sessions, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    const SETTINGS: &str = "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"on\"";
    vec![
        test_alone("a_rule_that_matches_everything_ends_three_containers", SETTINGS, everything),
        test_alone("a_rule_kills_the_process_that_did_it_and_no_other", SETTINGS, processes),
        test_alone("a_process_outside_of_the_container_is_not_killed", "", not_outside),
        test_alone("a_rule_freezes_a_container_and_a_user_resumes_it", SETTINGS, pauses),
        test_alone("how_long_a_process_runs_before_it_is_killed", SETTINGS, how_long)
            .with_ignored_flag(true),
    ]
}

/// What a process runs that is not the image's. What lies on a volume is no part of it: the tests
/// start their programs there.
const CODE: &str = "kind = [\"exec.new\", \"exec.interpreted\", \"exec.fileless\"]";

/// Puts one rule in force.
fn rule(node: &Node, id: &str, answer: &str, conditions: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        format!(
            "[[rule]]\nid = \"{id}\"\nreason = \"a test\"\neffect = \"report\"\n\
             answer = [\"{answer}\"]\n[rule.match]\n{conditions}\n"
        ),
    )?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", talk(&reload));
    Ok(())
}

fn running(node: &Node) -> anyhow::Result<usize> {
    let tasks = node.ctr(&["task", "ls"])?;
    Ok(tasks.lines().filter(|line| line.contains("RUNNING")).count())
}

/// The responses to a container, as text.
fn responses(container: &Container<'_>) -> anyhow::Result<Vec<String>> {
    let timeline = container.node.answer(&["timeline", &container.id])?;
    let responses = timeline.iter().filter(|entry| entry["type"] == "response");
    let text = |entry: &Value| {
        let outcome = &entry["response"]["outcome"];
        format!("{} {} {}", outcome["action"], outcome["succeeded"], outcome["message"])
    };
    Ok(responses.map(text).collect())
}

fn everything(node: &Node) -> anyhow::Result<()> {
    let containers: Vec<Container<'_>> =
        (0..5).map(|_| node.container()).collect::<anyhow::Result<_>>()?;
    for container in &containers {
        container.lay_payload("x")?;
    }
    let before = running(node)?;
    rule(node, "everything", "kill", "everything = true")?;
    let drift =
        |container: &Container<'_>| container.begin("cp /.control/x /tmp/x; /tmp/x").map(drop);
    containers.iter().try_for_each(drift)?;
    let stopped = wait_for("the rule to be stopped", || {
        let status = node.status()?;
        Ok(status["stopped_rules"].as_array().and_then(|all| all.first()).cloned())
    })?;
    ensure!(stopped["rule"] == "everything", "{stopped}");
    wait_for("every container to be reported", || {
        let all = containers.iter().map(Container::findings).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(all.iter().all(|findings| !findings.is_empty()).then_some(()))
    })?;
    wait_for("three kills", || Ok((running(node)? == before - 3).then_some(())))?;
    // The rule says what it has not done, and goes on to say it.
    let text = node.driftd(&["status"])?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    ensure!(text.contains("of rule everything STOPPED since"), "{text}");
    let metrics = node.driftd(&["metrics"])?;
    let metrics = String::from_utf8_lossy(&metrics.stdout).into_owned();
    ensure!(metrics.contains("driftd_answers_stopped 1"), "{metrics}");
    let spared = |container: &&Container<'_>| {
        responses(container).is_ok_and(|all| all.iter().any(|one| one.contains("not carried out")))
    };
    ensure!(containers.iter().filter(spared).count() == 2, "two are spared, and say so");

    // Not even a restart of driftd changes that.
    node.stop_driftd()?;
    node.start_driftd()?;
    let rest = containers.iter().find(spared).context("none is spared")?;
    rest.wait_until_watched()?;
    rest.begin("cp /.control/x /tmp/y; /tmp/y; sleep 1").map(drop)?;
    wait_for("the same after a restart", || {
        let status = node.status()?;
        Ok((status["stopped_rules"].as_array().is_some_and(|all| all.len() == 1)).then_some(()))
    })?;
    ensure!(running(node)? == before - 3);

    for (rule, code) in [("other", 2), ("everything", 0)] {
        let resumed = node.driftd(&["respond", "resume-answers", rule, "--reason", "a test"])?;
        ensure!(resumed.status.code() == Some(code), "{}", talk(&resumed));
    }
    rest.begin("cp /.control/x /tmp/z; /tmp/z").map(drop)?;
    wait_for("the fourth kill", || Ok((running(node)? == before - 4).then_some(())))
}

/// Each line is how a command has ended.
fn codes(container: &Container<'_>, commands: &[&str]) -> anyhow::Result<Vec<String>> {
    let lines: Vec<String> =
        commands.iter().map(|command| format!("( {command} ); echo $?")).collect();
    let output = container.try_sh(&lines.join("\n"))?.output;
    Ok(output.lines().filter(|line| line.parse::<u8>().is_ok()).map(str::to_owned).collect())
}

fn processes(node: &Node) -> anyhow::Result<()> {
    rule(node, "p", "kill-process", CODE)?;
    let container = node.container()?;
    container.lay_payload("x")?;
    container.lay("starter", &compile(bench()?.scratch.path(), "starter", STARTER)?)?;
    container.sh("sleep 600 & echo $! >/.control/beside")?;
    container.sh("cp /.control/x /tmp/x; echo 'sleep 5; exit 3' >/tmp/dropped.sh")?;
    let killed = codes(
        &container,
        &[
            "/tmp/x 5000",
            "sh /tmp/dropped.sh",
            "/.control/starter 1 memfd /.control/x 5000 >/.control/in-memory; cat /.control/in-memory",
            "sleep 0.1",
        ],
    )?;
    ensure!(killed == ["137", "137", "0", "0"], "{killed:?}");
    let in_memory = container.sh("cat /.control/in-memory")?;
    ensure!(in_memory.trim().ends_with(" 1"), "{in_memory}");
    container.sh("kill -0 $(cat /.control/beside)").context("another process was killed")?;
    let all = wait_for("the responses", || {
        let all = responses(&container)?;
        Ok((all.len() >= 3).then_some(all))
    })?;
    ensure!(all.iter().all(|one| one.contains("killed the process")), "{all:#?}");
    let findings = container.findings()?;
    let killed = findings.iter().filter(|one| one["outcome"]["action"] == "kill-process");
    ensure!(killed.count() >= 3, "{findings:#?}");
    ensure!(running(node)? >= 1, "the container goes on");

    // By hand: by the finding, and by a pid.
    fs::remove_file(node.path("policy.d").join("10.toml"))?;
    node.driftd(&["policy", "reload"])?;
    let long = container.begin("cp /.control/x /tmp/long; /tmp/long 30000; echo ended $?")?;
    let finding = wait_for("the finding", || {
        let all = container.findings()?;
        Ok(all.into_iter().find(|one| one["file"]["path"] == "/tmp/long"))
    })?;
    let id = finding["id"].as_str().context("no ID")?;
    let by_finding = ["respond", "kill-process", "--finding", id, "--reason", "a test"];
    let output = node.driftd(&by_finding)?;
    ensure!(output.status.success(), "{}", talk(&output));
    ensure!(long.finish(Duration::from_secs(10))?.output.contains("ended 137"));
    let again = node.driftd(&by_finding)?;
    ensure!(again.status.code() == Some(2), "{}", talk(&again));
    ensure!(talk(&again).contains("has ended; nothing was done"), "{}", talk(&again));
    Ok(())
}

/// A pid of the host, of driftd and of another container.
fn not_outside(node: &Node) -> anyhow::Result<()> {
    let (container, other) = (node.container()?, node.container()?);
    let mut mine = std::process::Command::new("sleep").arg("60").spawn()?;
    let pids = [
        mine.id().to_string(),
        node.driftd_pid()?.to_string(),
        other.init()?.to_string(),
        "1".to_owned(),
    ];
    for pid in &pids {
        let arguments =
            ["respond", "kill-process", &container.id, "--pid", pid, "--reason", "a test"];
        let output = node.driftd(&arguments)?;
        ensure!(!output.status.success(), "{pid}: {}", talk(&output));
    }
    ensure!(mine.try_wait()?.is_none(), "a process of the host was killed");
    mine.kill()?;
    mine.wait()?;
    other.sh("true")?;
    node.driftd_pid()?;
    // One of its own, by pid.
    let running = container.begin("sh -c 'echo $$ >/.control/own; exec sleep 30'; echo $?")?;
    let init = container.init()?;
    let child = wait_for("its process", || {
        let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
        let mut all: Vec<String> = children.split_whitespace().map(str::to_owned).collect();
        while let Some(pid) = all.pop() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            if name.trim() == "sleep" {
                return Ok(Some(pid));
            }
            let below = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
            all.extend(below.unwrap_or_default().split_whitespace().map(str::to_owned));
        }
        Ok(None)
    })?;
    let arguments =
        ["respond", "kill-process", &container.id, "--pid", &child, "--reason", "a test"];
    let output = node.driftd(&arguments)?;
    ensure!(output.status.success(), "{}", talk(&output));
    ensure!(running.finish(Duration::from_secs(10))?.output.contains("137"));
    Ok(())
}

fn pauses(node: &Node) -> anyhow::Result<()> {
    rule(node, "p", "pause", "kind = [\"exec.new\"]")?;
    let container = node.container()?;
    container.lay_payload("x")?;
    let running = container.begin("cp /.control/x /tmp/x; /tmp/x 300; echo went on")?;
    let is_paused = || Ok(node.ctr(&["task", "ls"])?.contains("PAUSED").then_some(()));
    wait_for("the pause", is_paused)?;
    fs::remove_file(node.path("policy.d").join("10.toml"))?;
    node.driftd(&["policy", "reload"])?;
    let resume = node.driftd(&["respond", "resume", &container.id, "--reason", "a test"])?;
    ensure!(resume.status.success(), "{}", talk(&resume));
    ensure!(running.finish(Duration::from_secs(20))?.output.contains("went on"));
    reported(node, &container)
}

/// A report has what was found, what was answered and the sessions.
fn reported(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    sessions::run(container, &["--exec-id", "visit"], &["/bin/sh", "-c", "sleep 0.3"])?;
    let report = wait_for("the report of the session", || {
        let report = node.driftd(&["report", &container.id, "-o", "json"])?;
        let report: Value =
            serde_json::from_slice(&report.stdout).with_context(|| talk(&report))?;
        let commands = report["sessions"][0]["commands"].to_string();
        Ok(commands.contains("sleep 0.3").then_some(report))
    })?;
    let mut findings = report["findings"].as_array().context("no findings")?.iter();
    let program = findings.find(|part| part["finding"]["file"]["path"] == "/tmp/x");
    let finding = &program.context("the program is not reported")?["finding"];
    ensure!(finding["kind"] == "exec.new" && finding["verdict"]["rule"] == "p", "{finding:#}");
    let responses = report["responses"].as_array().context("no responses")?.iter();
    let responses: Vec<&Value> = responses.map(|one| &one["outcome"]["action"]).collect();
    ensure!(responses == ["pause", "resume"], "{responses:?}");
    ensure!(report["policy"]["rules"][0]["id"] == "p", "{:#}", report["policy"]);
    ensure!(report["container"]["now"]["state"] == "running", "{:#}", report["container"]);
    let page = node.driftd(&["report", &container.id])?;
    ensure!(page.status.success() && page.stdout.starts_with(b"<!doctype html>"), talk(&page));
    Ok(())
}

/// Runs a command many times, or a program in memory, and prints for each how long it ran, in
/// microseconds, and whether it was killed.
const STARTER: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void run(char **argv)
{
    if (!strcmp(argv[0], "memfd")) {
        int file = open(argv[1], O_RDONLY), memory = memfd_create("program", MFD_CLOEXEC);
        while (sendfile(memory, file, NULL, 1 << 20) > 0)
            ;
        fexecve(memory, argv + 1, environ);
    } else {
        execv(argv[0], argv);
    }
    _exit(127);
}

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000L + time.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
    (void)argc;
    for (long left = atol(argv[1]); left > 0; left--) {
        int status;
        long begin = now();
        pid_t child = fork();
        if (!child)
            run(argv + 2);
        waitpid(child, &status, 0);
        printf("%ld %d\n", now() - begin, WIFSIGNALED(status));
    }
    return 0;
}
"#;

/// Prints a table: for each way, a thousand processes that would run for a second.
fn how_long(node: &Node) -> anyhow::Result<()> {
    const TIMES: usize = 1000;
    rule(node, "p", "kill-process", CODE)?;
    let container = node.container()?;
    container.lay_payload("x")?;
    container.lay("starter", &compile(bench()?.scratch.path(), "starter", STARTER)?)?;
    container.sh("cp /.control/x /tmp/x; echo 'sleep 1' >/tmp/dropped.sh")?;
    eprintln!("| what | killed | p50 | p99 |\n|---|---|---|---|");
    for (what, command) in [
        ("a dropped program", "/tmp/x 1000"),
        ("a script given to a shell", "/bin/sh /tmp/dropped.sh"),
        ("a program in memory", "memfd /.control/x 1000"),
    ] {
        let ran = container
            .begin(&format!("/.control/starter {TIMES} {command}"))?
            .finish(Duration::from_secs(1500))?;
        let mut took = Vec::new();
        let mut killed = 0;
        for line in ran.output.lines() {
            let Some((micros, signal)) = line.split_once(' ') else { continue };
            took.push(micros.parse::<u64>()?);
            killed += usize::from(signal == "1");
        }
        took.sort_unstable();
        ensure!(took.len() == TIMES, "{} of {TIMES}: {:?}", took.len(), ran.status);
        let (p50, p99) = (took[TIMES / 2], took[TIMES * 99 / 100]);
        eprintln!("| {what} | {killed} of {TIMES} | {p50} µs | {p99} µs |");
    }
    wait_within(Duration::from_secs(60), "the records", || {
        Ok((responses(&container)?.len() >= 3).then_some(()))
    })
}
