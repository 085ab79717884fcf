//! Denial on a real node: what a rule denies does not run, from wherever it is, and what it does
//! not deny runs as before. Nothing waits for driftd longer than it may.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::code;
use crate::fuse::{Answers, Fuse, MAY_MOUNT};
use crate::honest::SmallDisk;
use crate::node::{Container, Node, Setup, bench, talk, wait_for};
use crate::programs::compile;
use crate::{run_without_driftd, test_alone};

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
        test_alone("a_stopped_or_killed_driftd_that_denies_holds_no_program", SETTINGS, stuck),
        Trial::test("a_hung_filesystem_and_a_full_disk_while_denying_hold_no_program", || {
            let setup = Setup { driftd: SETTINGS, ..Setup::default() };
            run_without_driftd(setup, |node| hindered(node))
        }),
        test_alone("what_is_changed_after_it_was_allowed_does_not_last", SETTINGS, |node| {
            changed(node, 400)
        }),
        test_alone(
            "never_does_a_program_last_that_was_changed_after_it_was_allowed",
            SETTINGS,
            |node| changed(node, 100_000),
        )
        .with_ignored_flag(true),
        test_alone("what_a_rule_denies_is_not_read_as_code_either", SETTINGS, |node| {
            not_read(node, 20)
        }),
        test_alone("what_is_read_before_it_is_guarded_is_killed", SETTINGS, read_at_once),
        test_alone("a_thousand_scripts_and_libraries_are_not_read", SETTINGS, |node| {
            not_read(node, 1000)
        })
        .with_ignored_flag(true),
        test_alone("a_storm_of_reads_delays_no_other_container", SETTINGS, storm_of_reads),
        test_alone("a_storm_of_denied_programs_delays_no_other_container", SETTINGS, storm)
            .with_ignored_flag(true),
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
    printf("ran %ld refused %ld failed %ld median %ld p99 %ld slowest %ld\n", ran, refused, failed,
           took[times / 2], took[times * 99 / 100], took[times - 1]);
    return 0;
}
"#;

/// Puts one rule in force that denies what is run from these paths.
fn deny(node: &Node, paths: &str) -> anyhow::Result<()> {
    deny_where(node, &format!("kind = [\"exec.*\"]\npath = [{paths}]"))
}

/// The same by any conditions.
fn deny_where(node: &Node, conditions: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        format!(
            "[[rule]]\nid = \"no-drift\"\nreason = \"a test\"\neffect = \"report\"\n\
             answer = [\"deny\"]\n[rule.match]\n{conditions}\n"
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
fn prepared<'a>(node: &'a Node, options: &[&str]) -> anyhow::Result<Container<'a>> {
    let memory = "type=tmpfs,src=shm,dst=/dev/shm,options=rw:nosuid:mode=1777";
    let container = node.container_with(&[&["--mount", memory], options].concat())?;
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
    let container = prepared(node, &[])?;
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

    // A shell goes on along PATH, and the finding says what ran.
    container.sh("cp /.control/x /tmp/app; chmod 755 /tmp/app
        ( PATH=/tmp:/usr/bin; app )")?;
    wait_for("what ran instead", || {
        let findings = container.findings()?;
        let is_it = |one: &Value| {
            let detail = one["detail"].as_str().unwrap_or_default();
            one["file"]["path"] == "/tmp/app" && detail.contains("ran `/usr/bin/app` instead")
        };
        Ok(findings.iter().any(is_it).then_some(()))
    })
    .with_context(|| format!("{:#?}", container.findings()))?;

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
    let container = prepared(node, &[])?;
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

/// About a script on a tmpfs, and a program in memory, the kernel does not ask.
fn killed(node: &Node) -> anyhow::Result<()> {
    deny_where(node, "kind = [\"exec.fileless\", \"exec.interpreted\"]")?;
    let container = node.container()?;
    container.wait_until_watched()?;
    container.lay_payload("x")?;
    container.sh("echo 'sleep 20; exit 3' >/dev/shm/dropped.sh")?;
    for (command, kind) in [
        ("sh /dev/shm/dropped.sh", "exec.interpreted"),
        ("/usr/bin/loader memfd 1 /.control/x 20000", "exec.fileless"),
    ] {
        let ran = container.try_sh(&format!("( {command} ); echo $?"))?;
        // The second one is killed as a child of the loader.
        let is_killed = ran.output.trim().ends_with("137") || ran.output.contains("status 9");
        ensure!(is_killed, "{command}: {ran:?}");
        let finding = wait_for("the outcome", || {
            let findings = container.findings()?;
            let is_it =
                |one: &Value| one["kind"] == kind && one["outcome"]["action"] == "kill-process";
            Ok(findings.into_iter().find(is_it))
        })
        .with_context(|| format!("{command}: {:#?}", container.findings()))?;
        ensure!(finding["verdict"]["action"] == "deny", "{finding:#}");
    }
    Ok(())
}

/// Scripts that are given to an interpreter, and libraries, are not executed: their reading is
/// denied.
fn not_read(node: &Node, times: u32) -> anyhow::Result<()> {
    deny_where(node, "kind = [\"exec.*\", \"library.*\"]")?;
    code::import(node)?;
    let container = node.container_of(code::IMAGE)?;
    container.wait_until_watched()?;
    container.lay("evil.so", &code::library(code::PRELOADED, "not read")?)?;
    let guarded = || anyhow::Ok(node.status()?["gate"]["guarded"].as_u64().unwrap_or_default());
    container.sh("echo 'echo ran >>/.control/ran' >/tmp/plain; cp /tmp/plain /tmp/input
        cat /.control/evil.so >/tmp/evil.so; cat /.control/evil.so >/usr/lib/libidle.so.1.2
        printf '#!/bin/sh\\necho ran >>/.control/ran\\n' >/tmp/executed; chmod 755 /tmp/executed
        echo 'some data' >/tmp/data")?;
    wait_for("the files to be guarded", || Ok((guarded()? >= 6).then_some(())))?;
    let refused = |command: &str, expected: &str| -> anyhow::Result<()> {
        let script = format!(
            "i=0; while [ $i -lt {times} ]; do ( {command} ) >/.control/out 2>&1; \
             echo $?; i=$((i+1)); done | sort | uniq -c; tail -n 1 /.control/out"
        );
        let ran = container.begin(&script)?.finish(Duration::from_secs(300))?;
        ensure!(
            ran.output.contains(expected),
            "{command}: {}\n{:#?}\n{}",
            ran.output,
            container.findings()?,
            node.logs()
        );
        ensure!(!container.laid("ran").exists(), "{command}: it ran: {}", ran.output);
        Ok(())
    };
    // Busybox's shell takes a script that it may not read for an empty one.
    refused("sh /tmp/plain", &format!(" {times} 0\n"))?;
    refused("sh </tmp/input", &format!(" {times} 0\n"))?;
    refused("/tmp/executed", &format!(" {times} 126\n"))?;
    refused("sh /tmp/executed", &format!(" {times} 0\n"))?;
    refused("LD_PRELOAD=/tmp/evil.so /usr/bin/unpacks", "ERROR: ld.so")?;
    refused("/usr/bin/unpacks loads /usr/lib/libidle.so.1.2", &format!(" {times} 4\n"))?;
    for (kind, path, count) in [
        ("exec.interpreted", "/tmp/plain", times),
        ("exec.interpreted", "/tmp/input", times),
        ("exec.script", "/tmp/executed", times),
        ("exec.interpreted", "/tmp/executed", times),
        ("library.loaded", "/tmp/evil.so", times),
        ("library.loaded", "/usr/lib/libidle.so.1.2", times),
    ] {
        let finding = wait_for("the finding", || {
            let findings = container.findings()?;
            Ok(findings.into_iter().find(|one| {
                one["kind"] == kind && one["file"]["path"] == path && one["count"] == count
            }))
        })
        .with_context(|| format!("{kind} {path}: {:#?}", container.findings()))?;
        ensure!(finding["outcome"]["action"] == "deny", "{finding:#}");
    }
    let killed = |one: &&Value| one["outcome"]["action"] == "kill-process";
    let findings = container.findings()?;
    ensure!(findings.iter().find(killed).is_none(), "{findings:#?}");

    // To read is not to run: these go on, and so do the host's own processes.
    container.sh("echo one >/tmp/list")?;
    for command in [
        "cat /tmp/plain",
        "cp /tmp/evil.so /tmp/copy.so",
        "grep -q data /tmp/data",
        "head -c 64 /tmp/evil.so",
        "cmp /tmp/evil.so /tmp/copy.so",
        "od -N 16 /tmp/evil.so",
        "while read -r line; do echo $line; done </tmp/plain",
        // An image's script that has a data file open where shells have their scripts.
        "[ \"$(bash /usr/bin/lists.sh)\" = 'got one' ]",
        "[ \"$(/usr/bin/lists.sh)\" = 'got one' ]",
    ] {
        let ran = container.try_sh(command)?;
        ensure!(ran.status == 0, "{command}: {ran:?}");
    }
    let below = node.upperdir(&container.id)?.join("tmp/plain");
    ensure!(fs::read(below)?.starts_with(b"echo ran"), "the host cannot read it");
    ensure!(node.losses("undecided")? == 0, "{:#}", node.status()?);

    // The rule ends, and it runs.
    fs::remove_file(node.path("policy.d").join("10.toml"))?;
    node.driftd(&["policy", "reload"])?;
    wait_for("it to run", || {
        container.try_sh("sh /tmp/plain")?;
        Ok(container.laid("ran").exists().then_some(()))
    })
}

/// Each process that reads a guarded file as data is asked about once.
fn storm_of_reads(node: &Node) -> anyhow::Result<()> {
    deny(node, "\"/tmp/**\"")?;
    let (stormy, calm) = (prepared(node, &[])?, prepared(node, &[])?);
    stormy.sh("i=0; while [ $i -lt 16 ]; do\n\
         ( while :; do cat /tmp/marker.sh; done ) >/dev/null 2>&1 &\n\
         i=$((i+1)); done")?;
    for (command, expected) in
        [("/bin/true", "ran 50 "), ("/tmp/x", "ran 0 refused 50 "), ("/tmp/marker.sh", "ran 0 ")]
    {
        let output = attempt(&calm, 50, command)?;
        eprintln!("{command}: {output}");
        ensure!(output.starts_with(expected), "{command}: {output}");
        ensure!(slowest(&output)? < 5_000_000, "{command}: {output}");
    }
    calm.sh("cat /tmp/marker.sh >/dev/null")?;
    Ok(())
}

/// A script that is run the moment it is written: its interpreter may read it before the kernel
/// asks. Then it is killed.
fn read_at_once(node: &Node) -> anyhow::Result<()> {
    const TIMES: usize = 100;
    let container = node.container()?;
    container.wait_until_watched()?;
    container.sh("echo 'echo $0 >>/.control/survived' >/tmp/before")?;
    deny(node, "\"/tmp/**\"")?;
    // What was there before the rule is guarded by a scan.
    wait_for("the file to be guarded", || {
        Ok((node.status()?["gate"]["guarded"].as_u64() > Some(0)).then_some(()))
    })?;
    container.sh("sh /tmp/before")?;
    ensure!(!container.laid("survived").exists(), "it ran\n{}", node.logs());
    let script = format!(
        "i=0; while [ $i -lt {TIMES} ]; do
            echo \"sleep 2; echo $i >>/.control/survived\" >/tmp/s$i
            ( sh /tmp/s$i ) >/dev/null 2>&1
            echo $?; i=$((i+1))
        done"
    );
    let ran = container.begin(&script)?.finish(Duration::from_secs(500))?;
    let ended = |with: &str| ran.output.lines().filter(|line| *line == with).count();
    let (denied, killed) = (ended("0"), ended("137"));
    eprintln!("{denied} were not read, {killed} were killed");
    ensure!(!container.laid("survived").exists(), "{}\n{}", ran.output, node.logs());
    ensure!(denied + killed == TIMES, "{}", ran.output);
    Ok(())
}

/// Nothing waits longer than the deadline and the guardian's patience.
fn stuck(node: &Node) -> anyhow::Result<()> {
    deny(node, "\"/tmp/**\"")?;
    let container = prepared(node, &[])?;
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        let output = attempt(&container, 3, "/tmp/x")?;
        ensure!(output.starts_with("ran 0 refused 3 "), "{signal}: {output}");
        kill(node.driftd_pid()?, signal)?;
        // The reading of a guarded file waits like an execution.
        container.sh("cat /tmp/marker.sh >/dev/null; ( sh /tmp/marker.sh )")?;
        let output = attempt(&container, 10, "/tmp/x")?;
        let slowest = slowest(&output)?;
        ensure!(slowest < 5_000_000, "{signal}: {output}");
        eprintln!("{signal}: {output}");
        node.driftd_ended(Duration::from_secs(20)).with_context(|| signal.to_string())?;
        // What ends driftd lets everything run.
        let output = attempt(&container, 3, "/tmp/x")?;
        ensure!(output.starts_with("ran 3 "), "{signal}: {output}");
        node.start_driftd()?;
        container.wait_until_watched()?;
        wait_for("denial", || {
            Ok(attempt(&container, 1, "/tmp/x")?.starts_with("ran 0 refused 1 ").then_some(()))
        })?;
    }
    Ok(())
}

/// How long the slowest attempt took, in microseconds.
fn slowest(output: &str) -> anyhow::Result<u64> {
    let (_, number) = output.rsplit_once("slowest ").context("no time")?;
    Ok(number.trim().parse()?)
}

/// What driftd cannot read, and a history that it cannot write, delay no decision.
fn hindered(node: &Node) -> anyhow::Result<()> {
    let disk = SmallDisk::mount(node.path("driftd"))?;
    node.import(&bench()?.workbench)?;
    node.start_driftd()?;
    deny(node, "\"/tmp/**\", \"/mnt/**\"")?;
    let container = prepared(node, MAY_MOUNT)?;
    let files = [("x", "/.control/x"), ("s", "/.control/marker.sh")];
    let fuse = Fuse::mount(&container, "/mnt", Answers::Own, &files)?;
    let nothing_waits = |when: &str| -> anyhow::Result<()> {
        container.begin("for i in 1 2 3 4; do /mnt/x 60000 & sh /mnt/s & done").map(drop)?;
        for (command, expected) in [
            ("/tmp/x", "ran 0 refused 20 "),
            ("/bin/true", "ran 20 "),
            ("/tmp/marker.sh", "ran 0 "),
        ] {
            let output = attempt(&container, 20, command)?;
            ensure!(output.starts_with(expected), "{when}: {command}: {output}");
            ensure!(slowest(&output)? < 5_000_000, "{when}: {command}: {output}");
        }
        Ok(())
    };
    nothing_waits("beside a filesystem that does not answer")?;
    disk.fill()?;
    nothing_waits("with a full disk")?;
    ensure!(node.losses("undecided")? == 0, "{:#}", node.status()?);
    drop(fuse);
    Ok(())
}

/// A program that ends at once, or, compiled with `EVIL`, after a third of a second, in which it
/// would leave a file.
const SWAPPED: &str = r#"
#include <fcntl.h>
#include <unistd.h>

volatile const char kind[] = KIND;

int main(void)
{
    if (kind[0] == 'g')
        return 0;
    usleep(1500000);
    close(open("/.control/survived", O_CREAT | O_WRONLY, 0600));
    return 77;
}
"#;

/// Runs `argv[1]` again and again while a child writes the contents of `argv[2]` and `argv[3]`
/// into it, and prints what became of that.
const SWAPPER: &str = r#"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000L + time.tv_nsec / 1000;
}

static char *content(const char *path, long *size)
{
    int file = open(path, O_RDONLY);
    struct stat stat;
    fstat(file, &stat);
    char *bytes = malloc(stat.st_size);
    *size = read(file, bytes, stat.st_size);
    close(file);
    return bytes;
}

static void swap(const char *path, const char *good, const char *evil)
{
    long sizes[2];
    char *both[2] = {content(good, &sizes[0]), content(evil, &sizes[1])};
    for (unsigned turn = 0;; turn++) {
        int file = open(path, O_WRONLY);
        if (file < 0) {
            usleep(20);
            continue;
        }
        if (write(file, both[turn % 2], sizes[turn % 2]) < 0)
            _exit(1);
        close(file);
        usleep(rand() % 2000);
    }
}

int main(int argc, char **argv)
{
    (void)argc;
    long ran = 0, refused = 0, killed = 0, other = 0, lasted = 0, longest = 0;
    pid_t writer = fork();
    if (!writer)
        swap(argv[1], argv[2], argv[3]);
    for (long left = atol(argv[4]); left > 0; left--) {
        int status;
        pid_t child = fork();
        if (!child) {
            execv(argv[1], argv + 1);
            _exit(errno == EPERM ? 201 : 202);
        }
        long begin = now();
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) {
            killed++;
            long took = now() - begin;
            longest = took > longest ? took : longest;
        } else if (WEXITSTATUS(status) == 77)
            lasted++, printf("at %ld lasted\n", now() - 1500000);
        else if (WEXITSTATUS(status) == 201)
            refused++;
        else if (WEXITSTATUS(status) == 202)
            other++;
        else
            ran++;
    }
    kill(writer, SIGKILL);
    printf("ran %ld refused %ld killed %ld other %ld lasted %ld longest %ld\n", ran, refused,
           killed, other, lasted, longest);
    return 0;
}
"#;

/// A program is allowed by its content, and overwritten with what is denied while it is looked
/// at and while it begins. The kernel protects it only once it runs.
fn changed(node: &Node, rounds: u32) -> anyhow::Result<()> {
    let scratch = bench()?.scratch.path();
    let of = |name: &str, kind: &str| {
        compile(scratch, name, &SWAPPED.replace("KIND", &format!("\"{kind}\"")))
    };
    let (good, evil) = (of("swapped-good", "good")?, of("swapped-evil", "evil")?);
    ensure!(good.len() == evil.len() && good != evil, "they differ in a word");
    deny(node, "\"/tmp/p\"")?;
    let file = node.path("policy.d").join("10.toml");
    let hash = blake3::hash(&good).to_hex();
    let exception = format!(
        "[[rule]]\nid = \"good\"\nreason = \"a test\"\neffect = \"accept\"\n\
         expires = \"never\"\n[rule.match]\ncontent = [\"blake3:{hash}\"]\n"
    );
    fs::write(&file, fs::read_to_string(&file)? + &exception)?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", talk(&reload));
    let container = node.container()?;
    container.wait_until_watched()?;
    container.lay("good", &good)?;
    container.lay("evil", &evil)?;
    container.lay("swapper", &compile(scratch, "swapper", SWAPPER)?)?;
    container.sh("cp /.control/good /tmp/p")?;
    let command = format!("/.control/swapper /tmp/p /.control/good /.control/evil {rounds}");
    let limit = Duration::from_secs(60 + u64::from(rounds) / 10);
    let output = container.begin(&command)?.finish(limit)?.output;
    eprintln!("{}", output.trim());
    if container.laid("survived").exists() {
        let findings = container.findings()?;
        let timeline = container.node.answer(&["timeline", &container.id])?;
        anyhow::bail!("a changed program lasted: {output}\n{findings:#?}\n{timeline:#?}");
    }
    let count = |name: &str| -> anyhow::Result<u32> {
        let mut words = output.split_whitespace().skip_while(|word| *word != name);
        Ok(words.nth(1).context("no such count")?.parse()?)
    };
    ensure!(count("ran")? > 0 && count("refused")? > 0, "a vacuous test: {output}");
    Ok(())
}

/// Prints how long programs wait beside a container that has as many denied as it can.
fn storm(node: &Node) -> anyhow::Result<()> {
    deny(node, "\"/tmp/**\"")?;
    let (quiet, loud) = (prepared(node, &[])?, prepared(node, &[])?);
    for program in ["/tmp/x", "/bin/true"] {
        let output = attempt(&quiet, 500, program)?;
        eprintln!("alone: {program}: {output}");
    }
    let storm = "for i in 1 2 3 4 5 6 7 8; do /.control/attempt 100000 /tmp/x & done; \
                 while ! [ -e /.control/enough ]; do sleep 0.1; done; kill $(jobs -p)";
    let running = loud.begin(storm)?;
    for program in ["/tmp/x", "/bin/true"] {
        let output = attempt(&quiet, 500, program)?;
        eprintln!("beside the storm: {program}: {output}");
    }
    loud.lay("enough", b"")?;
    running.finish(Duration::from_secs(30))?;
    eprintln!("without a decision: {}", node.losses("undecided")?);
    Ok(())
}
