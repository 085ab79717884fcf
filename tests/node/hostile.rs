//! Containers that attack driftd itself: with names, with links to the host, with FIFOs and
//! devices, with files that change while they are read. driftd opens no file of the host for
//! them, nothing hangs, and its output stays readable.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use serde_json::Value;

use crate::node::{Container, Node, only, wait_for};
use crate::{test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("a40_no_link_leads_driftd_to_a_file_of_the_host", "", a40_links),
        test_alone(
            "a40_a_file_exchanged_while_it_is_read_is_never_a_file_of_the_host",
            "",
            a40_exchange,
        ),
        test("a40_fifos_and_devices_are_not_reported_and_not_waited_for", a40_no_files),
        test("a40_names_stay_harmless_wherever_they_are_shown", a40_names),
        test("a40_a_huge_sparse_program_is_reported_without_its_hash", a40_sparse),
        test("a40_deep_and_wide_trees_stop_nothing", a40_trees),
        test("a40_arguments_stay_harmless_and_bounded", a40_arguments),
        test("a40_a_program_that_removes_itself_is_reported", a40_removes_itself),
        test("a40_unreadable_programs_are_reported", a40_unreadable),
        test("a41_a_program_renamed_at_once_is_reported_with_its_content", a41_renamed),
    ]
}

// ---- what driftd opens

/// Records every file that the daemon opens on the host's filesystems while this lives.
struct Baits {
    group: Fanotify,
    daemon: i32,
    opened: BTreeSet<PathBuf>,
    seen: usize,
}

impl Baits {
    /// Watches the whole filesystem of each path in `host`.
    fn lay(node: &Node, host: &[&Path]) -> anyhow::Result<Baits> {
        let group = Fanotify::init(
            InitFlags::FAN_CLASS_NOTIF
                | InitFlags::FAN_CLOEXEC
                | InitFlags::FAN_NONBLOCK
                | InitFlags::FAN_UNLIMITED_QUEUE,
            EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC | EventFFlags::O_LARGEFILE,
        )?;
        for place in host {
            group.mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM,
                MaskFlags::FAN_OPEN,
                nix::fcntl::AT_FDCWD,
                Some(*place),
            )?;
        }
        let daemon = node.driftd_pid()?.as_raw();
        Ok(Baits { group, daemon, opened: BTreeSet::new(), seen: 0 })
    }

    fn read(&mut self) -> anyhow::Result<()> {
        loop {
            let events = match self.group.read_events() {
                Ok(events) => events,
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(err) => return Err(err.into()),
            };
            for event in events {
                ensure!(!event.mask().contains(MaskFlags::FAN_Q_OVERFLOW), "events were dropped");
                self.seen += 1;
                let Some(fd) = event.fd() else { continue };
                if event.pid() == self.daemon && is_on_a_mount_of_ours(fd)? {
                    use std::os::fd::AsRawFd as _;
                    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
                    self.opened.insert(fs::read_link(link)?);
                }
            }
        }
    }

    /// Reads until `done`, so that the queue does not grow without end.
    fn while_not(&mut self, done: &AtomicBool) -> anyhow::Result<()> {
        while !done.load(Ordering::SeqCst) {
            self.read()?;
            thread::sleep(Duration::from_millis(20));
        }
        self.read()
    }
}

/// An overlay opens the files of its layers through private mounts. A file on such a mount is
/// the container's.
fn is_on_a_mount_of_ours(fd: BorrowedFd<'_>) -> anyhow::Result<bool> {
    use std::os::fd::AsRawFd as _;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let mount = info
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))
        .context("no mnt_id in fdinfo")?
        .trim();
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mounts.lines().any(|line| line.split(' ').next() == Some(mount)))
}

/// Runs `work` and hands back what the daemon opened on the host meanwhile.
fn opened_during(
    node: &Node,
    work: impl FnOnce() -> anyhow::Result<()> + Send,
) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut baits = Baits::lay(node, &[Path::new("/"), node.directory.path()])?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let outcome = work();
            done.store(true, Ordering::SeqCst);
            outcome
        });
        baits.while_not(&done)?;
        worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the work panicked")))
    })?;
    // A mark that sees nothing would prove nothing.
    ensure!(baits.seen > 0, "no process opened anything: a vacuous test");
    ensure!(
        baits.opened.iter().any(|path| path.starts_with(node.directory.path())),
        "driftd opened nothing of its own: {:?}",
        baits.opened
    );
    Ok(baits.opened)
}

/// Makes sure that only files of driftd and containerd were opened on the host.
fn nothing_of_the_host(node: &Node, opened: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
    let ours = [node.path("driftd"), node.path("root"), node.path("state")];
    // For the names of users, and of the group that may use the socket.
    let usual = ["/etc/group", "/etc/passwd", "/etc/nsswitch.conf", "/etc/ld.so.cache"];
    // The request of containerd's shim to runc: a file of the host, opened without following
    // links.
    let asked_for = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("runc-process")
    };
    let foreign: Vec<_> = opened
        .iter()
        .filter(|path| !ours.iter().any(|ours| path.starts_with(ours)))
        .filter(|path| !usual.iter().any(|usual| Path::new(usual) == path.as_path()))
        .filter(|path| {
            // Programs and libraries, its own log, directories above its own.
            !path.starts_with("/usr")
                && !asked_for(path)
                && !node.directory.path().starts_with(path)
                && !path.ends_with("driftd.log")
        })
        .collect();
    ensure!(foreign.is_empty(), "driftd opened {foreign:?}");
    Ok(())
}

/// A file of the host that a container's links point at, and that driftd must not open.
fn bait(node: &Node) -> anyhow::Result<PathBuf> {
    let bait = node.path("bait");
    fs::write(&bait, b"\x7fELF of the host")?;
    fs::set_permissions(&bait, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(bait)
}

fn a40_links(node: &Node) -> anyhow::Result<()> {
    let bait = bait(node)?;
    let container = node.container()?;
    container.lay_payload("x")?;
    let opened = opened_during(node, || {
        let bait = bait.display();
        container.sh(&format!(
            "ln -s /etc/shadow /tmp/a; ln -s {bait} /tmp/bait; ln -s / /tmp/root\n\
             ln -s /proc/1/root/etc/shadow /tmp/through; ln -s /proc /tmp/proc\n\
             ln -s loop2 /tmp/loop1; ln -s loop1 /tmp/loop2; ln -s . /tmp/here\n\
             ln -s ../../../../../../../..{bait} /tmp/up\n\
             mkdir -p /tmp/d; ln -s {bait} /tmp/d/ls; rm -rf /usr/sbin; ln -s / /usr/sbin\n\
             cp /.control/x /tmp/x; ln -s /tmp/x /tmp/y; /tmp/y 100\n\
             ln -sf {bait} /usr/bin/curl; ln -sf /etc/shadow /usr/bin/wget"
        ))?;
        container.diff()?;
        container.expect_findings(&[
            "critical exec.new /tmp/x",
            "medium file.removed /usr/sbin",
            "medium file.modified /usr/bin/curl",
            "medium file.modified /usr/bin/wget",
        ])?;
        every_finding_is_of_a_regular_file_or_a_link_in_its_place(&container)
    })?;
    nothing_of_the_host(node, &opened)
}

/// Only regular files can be run.
fn every_finding_is_of_a_regular_file_or_a_link_in_its_place(
    container: &Container<'_>,
) -> anyhow::Result<()> {
    for finding in container.findings()? {
        let file = &finding["file"];
        let is_replaced = !finding["expected"].is_null();
        ensure!(
            file["file_type"] == "regular" || is_replaced && file["blake3"].is_null(),
            "{finding:#}"
        );
    }
    Ok(())
}

fn a40_exchange(node: &Node) -> anyhow::Result<()> {
    let bait = bait(node)?;
    let container = node.container()?;
    let opened = opened_during(node, || {
        let bait = bait.display();
        let running = container.begin(&format!(
            "i=0; while [ $i -lt 300 ]; do\n\
             ln -sf {bait} /tmp/b; cp /bin/ls /tmp/b2; mv /tmp/b2 /tmp/b\n\
             ln -s {bait} /tmp/c2; mv /tmp/c2 /tmp/c; cp /bin/ls /tmp/c.2; mv /tmp/c.2 /tmp/c\n\
             mkdir -p /tmp/e; cp /bin/ls /tmp/e/shadow; mv /tmp/e /tmp/f; ln -s /etc /tmp/e\n\
             rm -rf /tmp/f /tmp/e; i=$((i+1)); done"
        ))?;
        // Scans, and reads of settled files, meet every state of it.
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(8) {
            container.diff()?;
        }
        running.finish(Duration::from_secs(120))?;
        container.diff()?;
        let content = fs::read(crate::programs::find("ls")?)?;
        let real = blake3::hash(&content).to_hex();
        for finding in container.findings()? {
            let hash = finding["file"]["blake3"].as_str();
            // An incomplete copy is a file of the container too.
            let is_whole = hash == Some(real.as_str());
            ensure!(finding["kind"] == "file.relocated" || !is_whole, "{finding:#}");
            ensure!(finding["file"]["file_type"] == "regular", "{finding:#}");
            let of_host = blake3::hash(b"\x7fELF of the host").to_hex();
            ensure!(hash != Some(of_host.as_str()), "a file of the host was read: {finding:#}");
        }
        Ok(())
    })?;
    nothing_of_the_host(node, &opened)
}

fn a40_no_files(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir /usr/local/bin/dir; mkfifo /usr/local/bin/ls; mkfifo /usr/bin/app2\n\
         busybox mknod /usr/local/bin/null c 1 3 || true\n\
         busybox mknod /usr/local/bin/zero c 1 5 || true\n\
         busybox mknod /usr/local/bin/disk b 7 0 || true\n\
         chmod 0755 /usr/local/bin/*; /usr/bin/app 1 /usr/local/bin/sock\n\
         rm /usr/bin/curl; mkfifo /usr/bin/curl")?;
    answers(node)?;
    container.diff()?;
    container.expect_findings(&["medium file.modified /usr/bin/curl"])?;
    answers(node)
}

/// The API answers at once, whatever a container has prepared.
fn answers(node: &Node) -> anyhow::Result<()> {
    let began = Instant::now();
    node.status()?;
    node.answer(&["containers"])?;
    ensure!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    Ok(())
}

// ---- names and arguments

/// Names of programs, as `printf` reads them.
const NAMES: &[&str] = &[
    r"line\nfeed",
    r"\033[31mred\033[0m",
    r"\033]0;title\007",
    r"back\010\010\010\010space",
    r"\377\376invalid",
    r"carriage\rreturn",
    r"right-\342\200\256to-left",
    r"tab\there",
    r"-rf",
    r"quote'\042`$(true)",
    r"ends-with (deleted)",
    r"\303",
    r" ",
];

fn a40_names(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    let mut commands = String::from(
        "cd /tmp; run() { cp /.control/x \"./$1\"; printf \"$2\" >> \"./$1\"; \"./$1\"; }\n",
    );
    for (number, name) in NAMES.iter().enumerate() {
        let name = name.replace('\'', r"'\''");
        // Command substitution would drop a line feed at the end, so one x more.
        commands += &format!("n=$(printf '{name}x'); run \"${{n%x}}\" {number}\n");
    }
    let long = "n".repeat(255);
    commands += &format!("run {long} long\n");
    container.sh(&commands)?;
    let findings = wait_for("all names to be reported", || {
        let findings = container.findings()?;
        Ok((findings.len() == NAMES.len() + 1).then_some(findings))
    })?;
    for finding in &findings {
        ensure!(finding["kind"] == "exec.new", "{finding:#}");
    }
    let invalid = findings.iter().filter(|finding| !finding["file"]["path_bytes"].is_null());
    ensure!(invalid.count() == 2, "names that are no text have their bytes: {findings:#?}");
    clean_to_read(node, &container)
}

/// Makes sure that text for users has no control characters, and that JSON is JSON.
fn clean_to_read(node: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let id = &container.id;
    let mut commands: Vec<Vec<String>> = vec![
        vec!["findings".into(), "--container".into(), id.clone()],
        vec!["findings".into(), "--container".into(), id.clone(), "-o".into(), "wide".into()],
        vec!["diff".into(), id.clone()],
        vec!["containers".into()],
        vec!["status".into()],
    ];
    for finding in container.findings()? {
        commands.push(vec!["show".into(), finding["id"].as_str().context("no id")?.into()]);
    }
    for words in &commands {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let text = node.driftd(&words)?.stdout;
        ensure!(!text.is_empty(), "{words:?} prints nothing");
        clean(&words, &text)?;
    }
    clean(&["the log"], &fs::read(node.path("driftd.log"))?)?;
    for format in ["json", "jsonl"] {
        let text = node.driftd(&["findings", "--container", id, "-o", format])?.stdout;
        clean(&["findings", format], &text)?;
        for value in serde_json::Deserializer::from_slice(&text).into_iter::<Value>() {
            value?;
        }
    }
    Ok(())
}

fn clean(what: &[&str], text: &[u8]) -> anyhow::Result<()> {
    let text = std::str::from_utf8(text).with_context(|| format!("{what:?} is no text"))?;
    let is_harmful = |character: char| {
        character.is_control() && character != '\n'
            || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if let Some(at) = text.find(is_harmful) {
        let around: String = text[at..].chars().take(40).collect();
        anyhow::bail!("{what:?} has {around:?}");
    }
    Ok(())
}

fn a40_arguments(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    // As long as the kernel lets one argument be, and more than a page of them.
    container.sh(
        "cp /.control/x /tmp/x; long=$(printf '%0100000d' 7)\n\
         e=$(printf '\\033]0;owned\\007\\nsecond\\rline'); /tmp/x 300 \"\" \"$e\" \"$long\" \"$long\"",
    )?;
    let findings = container.expect_findings(&["critical exec.new /tmp/x"])?;
    let size = serde_json::to_vec(only(&findings, "exec.new")?)?.len();
    ensure!(size < 64 * 1024, "a finding of {size} bytes");
    clean_to_read(node, &container)
}

// ---- sizes and shapes

fn a40_sparse(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    let began = Instant::now();
    container.sh("cp /.control/x /tmp/sparse; busybox truncate -s 10G /tmp/sparse; /tmp/sparse")?;
    let findings = container.expect_findings(&["critical exec.new /tmp/sparse"])?;
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["file"]["unhashed"], "size", "{run:#}");
    assert_eq!(run["file"]["blake3"], Value::Null, "{run:#}");
    assert_eq!(run["file"]["size"], 10_u64 << 30, "{run:#}");
    ensure!(began.elapsed() < Duration::from_secs(30), "it took {:?}", began.elapsed());
    answers(node)
}

fn a40_trees(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    let running = container.begin(
        "set -e; mkdir /tmp/wide /tmp/deep; cd /tmp/wide\n\
         i=0; while [ $i -lt 50000 ]; do : > $i; i=$((i+1)); done\n\
         cd /tmp/deep; i=0; while [ $i -lt 300 ]; do mkdir d; cd d; i=$((i+1)); done\n\
         cp /.control/x x; echo deep >> x; ./x; cd /tmp\n\
         # The image's own shell gives up at 4,096 bytes.\n\
         /bin/bash -ec 'n=$(printf %0250d 7); for i in {1..20}; do mkdir $n; cd $n; done\n\
         cp /.control/x x; echo long >> x; ./x'\n\
         cp /.control/x /tmp/x; /tmp/x",
    )?;
    let ran = running.finish(Duration::from_secs(120))?;
    ensure!(ran.status == 0, "{ran:?}");
    container.diff()?;
    let findings = wait_for("what ran to be reported", || {
        let findings = container.findings()?;
        let of = |path: &str| findings.iter().any(|finding| finding["file"]["path"] == path);
        let deep = format!("/tmp/deep{}/x", "/d".repeat(300));
        Ok((of("/tmp/x") && of(&deep)).then_some(findings))
    })?;
    // A scan may have come between the copy and its execution.
    let (executed, others): (Vec<_>, Vec<_>) =
        findings.iter().partition(|finding| finding["kind"] == "exec.new");
    ensure!(others.iter().all(|finding| finding["kind"] == "file.added"), "{findings:#?}");
    let unreadable = node.losses("event_unreadable")?;
    // The kernel cannot report a path of more than 4,096 bytes. The execution is not hidden:
    // it is reported without a path, or counted as unreadable.
    ensure!(
        executed.len() == 3 || unreadable > 0,
        "what ran below a path that is too long left no trace: {findings:#?}"
    );
    answers(node)
}

fn a40_removes_itself(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay("s", b"#!/bin/sh\nrm -f \"$0\"\nexec /bin/true\n")?;
    container.sh("cp /.control/s /tmp/s; /tmp/s")?;
    let findings = wait_for("the script to be reported as removed", || {
        let findings = container.findings()?;
        let reported = findings.iter().any(|finding| finding["file"]["deleted"] == true);
        Ok(reported.then_some(findings))
    })?;
    let script = only(&findings, "exec.script")?;
    assert_eq!(script["file"]["path"], "/tmp/s", "{script:#}");
    Ok(())
}

fn a40_unreadable(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; chmod 0111 /tmp/x; /tmp/x\n\
         cp /.control/x /tmp/never; echo 1 >> /tmp/never; chmod 0 /tmp/never")?;
    let findings =
        container.expect_findings(&["critical exec.new /tmp/x", "low file.added /tmp/never"])?;
    for finding in &findings {
        ensure!(finding["file"]["blake3"].is_string(), "{finding:#}");
    }
    Ok(())
}

fn a41_renamed(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    let x = blake3::hash(&fs::read(container.laid("x"))?).to_hex();
    // A lookup by name after the event finds the shell of the image.
    container
        .begin(
            "i=0; while [ $i -lt 100 ]; do cp /.control/x /tmp/x; cp /bin/busybox /tmp/sh\n\
             /tmp/x 5 & mv /tmp/sh /tmp/x; wait; i=$((i+1)); done",
        )?
        .finish(Duration::from_secs(60))?;
    let findings = wait_for("100 executions", || {
        let findings = container.findings()?;
        let count: u64 = findings
            .iter()
            .filter(|finding| {
                finding["kind"] == "exec.new" && finding["file"]["blake3"] == x.as_str()
            })
            .filter_map(|finding| finding["count"].as_u64())
            .sum();
        let image: u64 = findings
            .iter()
            .filter(|finding| finding["kind"] == "exec.relocated")
            .filter_map(|finding| finding["count"].as_u64())
            .sum();
        // The shell's `mv` may be quicker than the start of the program.
        Ok((count + image >= 100).then_some(findings))
    })?;
    for finding in &findings {
        let path = finding["file"]["path"].as_str().context("no path")?;
        ensure!(Path::new(path).as_os_str().as_bytes().starts_with(b"/tmp/"), "{finding:#}");
    }
    Ok(())
}
