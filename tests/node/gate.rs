//! No stopped, killed or busy process of driftd holds up a container: not the daemon, not the
//! gate, not the guardian, and not two of them together.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::node::{Container, DEADLINE, Node, wait_for, wait_within};
use crate::programs;
use crate::test_alone;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("x01_a_stopped_gate_is_ended_and_programs_go_on", "", stopped_gate),
        test_alone("x01_a_stopped_daemon_holds_up_no_program", "", stopped_daemon),
        test_alone("x01_a_stopped_gate_and_daemon_are_ended", "", stopped_gate_and_daemon),
        test_alone("x01_a_stopped_gate_and_guardian_are_ended", "", stopped_gate_and_guardian),
        test_alone("x01_a_stopped_guardian_is_replaced_with_the_daemon", "", stopped_guardian),
        test_alone("x01_no_program_waits_when_a_process_of_driftd_is_killed", "", killed),
        test_alone("x09_a_stop_with_a_full_queue_holds_up_no_program", "", stop_under_load),
        test_alone("the_gate_holds_every_permission_group_and_nothing_else", "", gate_alone),
    ]
}

/// driftd's processes.
pub(crate) struct Processes {
    pub(crate) daemon: Pid,
    pub(crate) gate: Pid,
    pub(crate) guardian: Pid,
}

impl Processes {
    pub(crate) fn of(node: &Node) -> anyhow::Result<Processes> {
        let daemon = node.driftd_pid()?;
        let child = |name: &str| {
            let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"));
            let mut children = children.unwrap_or_default();
            for task in fs::read_dir(format!("/proc/{daemon}/task"))?.flatten() {
                let more = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                children.push(' ');
                children.push_str(&more);
            }
            children
                .split_whitespace()
                .find(|pid| {
                    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                    words.split(|&byte| byte == 0).nth(1) == Some(name.as_bytes())
                })
                .with_context(|| format!("driftd has no process called {name}"))?
                .parse::<i32>()
                .map(Pid::from_raw)
                .context("a pid")
        };
        Ok(Processes { daemon, gate: child("gate")?, guardian: child("guardian")? })
    }
}

/// Stops all threads of a process.
pub(crate) fn stop(process: Pid) -> anyhow::Result<()> {
    kill(process, Signal::SIGSTOP)?;
    // The kernel stops one thread after the other.
    wait_for("every thread to stop", || {
        for thread in fs::read_dir(format!("/proc/{process}/task"))? {
            let stat = fs::read_to_string(thread?.path().join("stat"))?;
            if !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")) {
                return Ok(None);
            }
        }
        Ok(Some(()))
    })
}

pub(crate) fn is_there(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.starts_with(" Z") && !rest.is_empty())
}

/// For how long two programs of the container's image are held up.
pub(crate) fn held_up(
    container: &Container<'_>,
    processes: &Processes,
) -> anyhow::Result<Duration> {
    let began = Instant::now();
    let ran = container.begin("/usr/bin/app; /usr/bin/app")?.finish(Duration::from_secs(15));
    if ran.is_err() {
        // While they are stopped, the container cannot be ended.
        for process in [processes.gate, processes.daemon] {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
    ensure!(ran?.status == 0, "a program was refused");
    Ok(began.elapsed())
}

/// Waits until the daemon has ended. Started again, as systemd does, it watches as before.
fn goes_on(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    node.driftd_ended(Duration::from_secs(15))?;
    watches_again(node, container)
}

/// Starts driftd, and makes sure that it reports a canary.
pub(crate) fn watches_again(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    node.start_driftd()?;
    container.wait_until_watched()?;
    container.run_dropped("canary")?;
    container.expect_findings(&["critical exec.new /tmp/canary"]).map(drop)
}

fn stopped_gate(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    stop(processes.gate)?;
    let took = held_up(&container, &processes)?;
    ensure!(took > Duration::from_secs(1), "nothing was held up ({took:?}): a vacuous test");
    ensure!(took < Duration::from_secs(5), "programs were held up for {took:?}");
    goes_on(node, &container)
}

fn stopped_daemon(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    stop(processes.daemon)?;
    let took = held_up(&container, &processes)?;
    ensure!(took < Duration::from_secs(4), "programs were held up for {took:?}");
    // The gate does not stay alive for a daemon that reads nothing from it.
    wait_within(Duration::from_secs(10), "the gate to be ended", || {
        Ok((!is_there(processes.gate)).then_some(()))
    })?;
    goes_on(node, &container)
}

fn stopped_gate_and_daemon(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    stop(processes.daemon)?;
    stop(processes.gate)?;
    let took = held_up(&container, &processes)?;
    ensure!(took < Duration::from_secs(5), "programs were held up for {took:?}");
    goes_on(node, &container)
}

fn stopped_gate_and_guardian(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    stop(processes.guardian)?;
    stop(processes.gate)?;
    // The daemon checks the gate later than the guardian would.
    let took = held_up(&container, &processes)?;
    ensure!(took < Duration::from_secs(8), "programs were held up for {took:?}");
    goes_on(node, &container)
}

fn stopped_guardian(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    stop(processes.guardian)?;
    let took = held_up(&container, &processes)?;
    ensure!(took < Duration::from_secs(4), "programs were held up for {took:?}");
    goes_on(node, &container)
}

fn killed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    for which in ["gate", "guardian", "daemon"] {
        let processes = Processes::of(node)?;
        let victim = match which {
            "gate" => processes.gate,
            "guardian" => processes.guardian,
            _ => processes.daemon,
        };
        kill(victim, Signal::SIGKILL)?;
        let took = held_up(&container, &processes).context(which)?;
        ensure!(took < Duration::from_secs(4), "{which}: programs were held up for {took:?}");
        node.driftd_ended(Duration::from_secs(15)).context(which)?;
        // None of them lives on alone.
        wait_within(Duration::from_secs(10), "the other processes to end", || {
            let left = [processes.daemon, processes.gate, processes.guardian].map(is_there);
            Ok((left == [false; 3]).then_some(()))
        })
        .context(which)?;
        node.start_driftd()?;
        container.wait_until_watched()?;
    }
    container.expect_silence()
}

/// Executes a program again and again for a time, and prints the longest that one took
/// from fork to exit, in milliseconds.
const WORST: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <spawn.h>
#include <time.h>
#include <sys/wait.h>

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
    double end = now() + atof(argv[1]), worst = 0;
    char *words[] = { argv[2], NULL };
    while (now() < end) {
        double began = now();
        pid_t pid;
        if (posix_spawn(&pid, argv[2], NULL, NULL, words, NULL))
            return 1;
        waitpid(pid, NULL, 0);
        if (now() - began > worst)
            worst = now() - began;
    }
    printf("%d\n", (int)worst);
    return 0;
}
"#;

/// A stop while forty programs of 300 MB, made of holes, wait to be hashed.
fn stop_under_load(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let neighbour = node.container()?;
    neighbour.lay("worst", &programs::compile(&node.path(""), "worst", WORST)?)?;
    neighbour
        .sh("cp /.control/worst /tmp/worst; chmod 755 /tmp/worst; /tmp/worst 1 /usr/bin/app")?;
    container.lay_payload("big")?;
    container.sh("i=0; while [ $i -lt 40 ]; do cp /.control/big /tmp/big$i; \
         dd if=/dev/zero of=/tmp/big$i bs=1 count=1 seek=300M 2>/dev/null; \
         /tmp/big$i; i=$((i+1)); done")?;
    let running = neighbour.begin("/tmp/worst 4000 /usr/bin/app")?;
    thread::sleep(Duration::from_millis(500));
    node.stop_driftd()?;
    let ran = running.finish(DEADLINE)?;
    let worst: u64 = ran.output.trim().parse().context("the program's worst time")?;
    // A machine with two busy processors holds up a program for some time by itself.
    ensure!(worst < 1000, "a stop held up a program for {worst} ms");
    Ok(())
}

fn gate_alone(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let processes = Processes::of(node)?;
    let groups_of = |process: Pid| -> anyhow::Result<Vec<String>> {
        let mut groups = Vec::new();
        for fd in fs::read_dir(format!("/proc/{process}/fdinfo"))?.flatten() {
            let info = fs::read_to_string(fd.path()).unwrap_or_default();
            if info.contains("fanotify flags:") {
                groups.push(info);
            }
        }
        Ok(groups)
    };
    // FAN_CLASS_CONTENT and FAN_CLASS_PRE_CONTENT are the classes with permission events.
    let is_permission = |info: &String| {
        let flags = info.split("fanotify flags:").nth(1).and_then(|rest| rest.split(' ').next());
        let flags =
            flags.and_then(|flags| i64::from_str_radix(flags.trim_start_matches("0x"), 16).ok());
        flags.is_some_and(|flags| flags & 0xc != 0)
    };
    ensure!(groups_of(processes.gate)?.iter().any(is_permission), "the gate has no group");
    for process in [processes.daemon, processes.guardian] {
        ensure!(
            !groups_of(process)?.iter().any(is_permission),
            "{process} holds a permission group"
        );
    }
    // The gate has no file open, neither of a container nor of the host.
    container.sh("/usr/bin/app")?;
    let mut others = Vec::new();
    let nothing_else = wait_for("the gate to hold nothing but its own", || {
        others.clear();
        for fd in fs::read_dir(format!("/proc/{}/fd", processes.gate))?.flatten() {
            let target = fs::read_link(fd.path()).unwrap_or_default();
            let name = target.to_string_lossy().into_owned();
            let is_own = name.starts_with("anon_inode:") || name.starts_with("socket:");
            let is_memory = name.starts_with("/memfd:driftd-counters");
            let is_standard = matches!(fd.file_name().to_str(), Some("0" | "1" | "2"));
            if !is_own && !is_memory && !is_standard {
                others.push(name);
            }
        }
        Ok(others.is_empty().then_some(()))
    });
    nothing_else.with_context(|| format!("{others:?}"))
}
