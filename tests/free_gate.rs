//! The free gate against the real kernel, and against attempts to run changed bytes
//! unseen.
//!
//! Needs root, and a kernel on which the gate can intercept copy-ups; fails without.

// The free gate must notice stores through a shared mapping, which need unsafe code.
#![allow(unsafe_code)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use common::{Watchers, changed, mount_overlay, patience, require_root, run, wait_until};
use driftd::config::{self, Gate};
use driftd::model::{ContainerId, Fact, FileFact, FileTime, Observation};
use driftd::sys::mounts::Notifier;
use driftd::watch::{self, SensorCommand, SensorEvent, Trust};
use nix::sys::signal::Signal;

/// How many files of the image are raced for in one container.
const FILES: usize = 500;

/// Ends at once: mov eax, 60; xor edi, edi; syscall.
const EXIT: &[u8] = b"\xb8\x3c\0\0\0\x31\xff\x0f\x05";

/// Takes the name of runc's init with prctl(PR_SET_NAME), and waits with pause().
const INIT: &[u8] = b"\xbf\x0f\0\0\0\x48\x8d\x35\x10\0\0\0\xb8\x9d\0\0\0\x0f\x05\
    \xb8\x22\0\0\0\x0f\x05\xeb\xf7runc:[2:INIT]\0";

fn program() -> Vec<u8> {
    elf(EXIT)
}

/// A static program without libc: 4096 bytes, of which the kernel reads 200.
fn elf(code: &[u8]) -> Vec<u8> {
    #[cfg(not(target_arch = "x86_64"))]
    compile_error!("these tests hold machine code for x86-64 only");
    let base = 0x40_0000_u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend(2_u16.to_le_bytes()); // an executable
    elf.extend(62_u16.to_le_bytes()); // x86-64
    elf.extend(1_u32.to_le_bytes());
    elf.extend((base + 120).to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend(0_u64.to_le_bytes());
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes()); // load
    elf.extend(5_u32.to_le_bytes()); // read, execute
    for word in [0_u64, base, base, 4096, 4096, 4096] {
        elf.extend(word.to_le_bytes());
    }
    assert_eq!(elf.len(), 120);
    elf.extend(code);
    elf.resize(4096, 0);
    elf
}

fn execute(path: &Path) -> io::Result<()> {
    let mut child = Command::new(path).stdin(Stdio::null()).spawn()?;
    child.wait().map(drop)
}

/// Runs a program, and retries while another process has it open for writing.
fn run_surely(path: &Path) {
    let deadline = Instant::now() + patience();
    while let Err(err) = execute(path) {
        assert_eq!(err.raw_os_error(), Some(libc_etxtbsy()), "{}", path.display());
        assert!(Instant::now() < deadline, "{} stays busy", path.display());
    }
}

fn libc_etxtbsy() -> i32 {
    nix::errno::Errno::ETXTBSY as i32
}

/// Opens a file, and retries while it is being executed.
fn busily(mut attempt: impl FnMut() -> io::Result<File>) -> File {
    let deadline = Instant::now() + patience();
    loop {
        match attempt() {
            Ok(file) => return file,
            Err(err) if err.raw_os_error() == Some(libc_etxtbsy()) => {
                assert!(Instant::now() < deadline, "the file stays busy");
            }
            Err(err) => panic!("{err}"),
        }
    }
}

/// The image of all containers of a test.
struct Image {
    dir: tempfile::TempDir,
    recorded: FileTime,
}

impl Image {
    fn new(files: usize) -> Image {
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let lower = dir.path().join("lower");
        fs::create_dir_all(lower.join("f")).unwrap();
        fs::create_dir(lower.join("tmp")).unwrap();
        write(&dir.path().join("init"), &elf(INIT));
        for number in 0..files {
            write(&lower.join("f").join(number.to_string()), &program());
        }
        let recorded = changed(&lower.join("f").join((files - 1).to_string()));
        // Longer than a tick of the clock.
        thread::sleep(Duration::from_millis(30));
        Image { dir, recorded }
    }
}

fn write(path: &Path, content: &[u8]) {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

struct Container {
    id: ContainerId,
    own: tempfile::TempDir,
    init: Child,
    has_tmpfs: bool,
}

impl Container {
    fn start(image: &Image, options: &str) -> Container {
        let own = tempfile::tempdir_in(image.dir.path()).unwrap();
        let has_tmpfs = options.contains("upper-on-tmpfs");
        if has_tmpfs {
            run(&["mount", "-t", "tmpfs", "none", own.path().to_str().unwrap()]);
        }
        for name in ["upper", "work", "merged"] {
            fs::create_dir(own.path().join(name)).unwrap();
        }
        let options: Vec<&str> =
            options.split(',').filter(|option| *option != "upper-on-tmpfs").collect();
        let merged = own.path().join("merged");
        mount_overlay(&image.dir.path().join("lower"), own.path(), &merged, &options.join(","));
        // It has the name of runc's init and, like runc's init, runs a program of the host:
        // so no program of the container ran before the marks.
        let program = File::open(image.dir.path().join("init")).unwrap();
        let root = merged.clone();
        let mut init = Command::new("init");
        let execute = move || {
            nix::unistd::chroot(&root)?;
            nix::unistd::chdir("/")?;
            nix::unistd::fexecve(&program, &[c"init"], &[] as &[&std::ffi::CStr])?;
            Ok(())
        };
        // SAFETY: only system calls are made between fork and exec.
        let init = unsafe { init.stdin(Stdio::null()).pre_exec(execute) }.spawn().unwrap();
        let comm = format!("/proc/{}/comm", init.id());
        wait_until("init", || fs::read(&comm).unwrap() == b"runc:[2:INIT]\n");
        let name = own.path().file_name().unwrap().to_str().unwrap();
        Container { id: ContainerId::new("race", name), own, init, has_tmpfs }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.own.path().join("merged").join(name)
    }

    fn file(&self, number: usize) -> PathBuf {
        self.path("f").join(number.to_string())
    }

    /// Ends the container; fails if a filesystem stays busy.
    fn stop(mut self, node: &mut Node) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        node.detach(&self.id);
        // For a moment a thread of driftd still holds a descriptor: the last scan of the
        // upper layer keeps its filesystem busy.
        let unmount = |path: &Path| {
            wait_until("the filesystem to be free", || {
                let status = Command::new("umount").arg(path).stderr(Stdio::null()).status();
                status.unwrap().success()
            });
        };
        unmount(&self.path(""));
        if self.has_tmpfs {
            unmount(self.own.path());
            self.has_tmpfs = false;
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        let _ = Command::new("umount").arg("-lq").arg(self.path("")).status();
        if self.has_tmpfs {
            let _ = Command::new("umount").arg("-lq").arg(self.own.path()).status();
        }
    }
}

fn signal_process(pid: u32, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// The tests run one at a time: each needs fanotify groups, of which a user may have 128.
static TURN: Mutex<()> = Mutex::new(());

struct Node {
    watchers: Watchers,
    _turn: MutexGuard<'static, ()>,
}

impl Node {
    fn start(gate: Gate) -> Node {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let settings = config::Watch {
            sweep_interval: Duration::from_secs(3600),
            gate,
            ..config::Watch::default()
        };
        let watchers = Watchers::start(&settings, 64 * 1024, Notifier::new());
        Node { watchers, _turn: turn }
    }

    fn attach(&mut self, container: &Container, image: &Image) {
        let id = container.id.clone();
        self.watchers.attach(&id, container.init.id(), Trust::UpTo(image.recorded));
        self.watchers.send(SensorCommand::Scan { container: id.clone(), ticket: Some(1) });
        self.until("the first scan", |report| match report {
            SensorEvent::NotAttached { reason, .. } => panic!("not attached: {reason}"),
            SensorEvent::Scanned { container, ticket: Some(1), .. } => *container == id,
            _ => false,
        });
    }

    fn detach(&mut self, id: &ContainerId) {
        self.watchers.send(SensorCommand::Detach { container: id.clone(), pid: None });
        // Commands are carried out in order.
        let unknown = ContainerId::new("race", "unknown");
        self.watchers.send(SensorCommand::Scan { container: unknown.clone(), ticket: Some(2) });
        self.until(
            "the container to be forgotten",
            |report| matches!(report, SensorEvent::Scanned { container, .. } if *container == unknown),
        );
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut is_it: impl FnMut(&SensorEvent) -> bool) {
        let deadline = Instant::now() + patience();
        loop {
            let report = self.watchers.reports.recv_deadline(deadline);
            match report {
                Ok(report) if is_it(&report) => return,
                Ok(_) => (),
                Err(_) => panic!("waited in vain for {what}"),
            }
        }
    }

    /// Stops the gate's process, or continues it.
    fn signal_gate(&self, signal: Signal) {
        signal_process(self.watchers.watch().gate().id(), signal);
    }

    /// Runs a program until the kernel no longer asks the gate about it.
    #[track_caller]
    fn until_ignored(&self, path: &Path) {
        wait_until("the program to be ignored", || !self.is_asked_about(path));
    }

    fn answers(&self) -> u64 {
        self.watchers.health.gate_answers()
    }

    /// Runs a program, and returns whether the kernel asked the gate.
    fn is_asked_about(&self, path: &Path) -> bool {
        let before = self.answers();
        run_surely(path);
        // Answers are counted before they are sent.
        self.answers() != before
    }
}

/// An image with some files, and a container of it that a node watches.
fn watched(files: usize, gate: Gate) -> (Image, Container, Node) {
    let image = Image::new(files);
    let container = Container::start(&image, "");
    let mut node = Node::start(gate);
    node.attach(&container, &image);
    (image, container, node)
}

/// Ways to change a file of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// `open(O_RDWR)`, a shared mapping, `close`, and then a store.
    Map,
    Chmod,
    Link,
    Exchange,
    Truncate,
    Rewrite,
    Touch,
    Attribute,
    Rename,
}

const CHANGES: [Change; 9] = [
    Change::Map,
    Change::Chmod,
    Change::Link,
    Change::Exchange,
    Change::Truncate,
    Change::Rewrite,
    Change::Touch,
    Change::Attribute,
    Change::Rename,
];

/// Makes the change. Returns the files about which the kernel must then ask the gate,
/// and the mapping through which the caller still stores a byte.
fn change(
    change: Change,
    container: &Container,
    number: usize,
) -> (Vec<PathBuf>, Option<memmap2::MmapMut>) {
    let path = container.file(number);
    let other = container.path("tmp").join(number.to_string());
    let open = |flags: i32| {
        busily(|| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path))
    };
    let mut map = None;
    let mut paths = vec![path.clone()];
    match change {
        Change::Map => {
            let file = open(0);
            // SAFETY: the file is not truncated meanwhile.
            map = Some(unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap());
        }
        Change::Chmod => {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).unwrap();
        }
        Change::Link => {
            fs::hard_link(&path, &other).unwrap();
            paths.push(other);
        }
        Change::Exchange => {
            write(&other, &program());
            rustix::fs::renameat_with(
                rustix::fs::CWD,
                &path,
                rustix::fs::CWD,
                &other,
                rustix::fs::RenameFlags::EXCHANGE,
            )
            .unwrap();
            paths.push(other);
        }
        Change::Truncate => {
            busily(|| {
                nix::unistd::truncate(&path, 4095)
                    .map_err(io::Error::from)
                    .and_then(|()| File::open(&path))
            });
        }
        Change::Rewrite => {
            use std::io::Write as _;
            let mut file = open(nix::libc::O_TRUNC);
            file.write_all(&program()).unwrap();
        }
        Change::Touch => {
            let file = File::open(&path).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }
        Change::Attribute => {
            rustix::fs::setxattr(&path, "trusted.x", b"y", rustix::fs::XattrFlags::empty())
                .unwrap();
        }
        Change::Rename => {
            fs::rename(&path, &other).unwrap();
            paths = vec![other];
        }
    }
    (paths, map)
}

#[derive(Debug, Default)]
struct Tally {
    rounds: usize,
    missed: usize,
    asked: usize,
}

/// Changes files of the image, half of them while they are executed, and executes the
/// changed files: the kernel must ask the gate about each.
fn race(mount_options: &str, containers: usize, rounds: usize) -> Tally {
    let image = Image::new(FILES);
    let mut node = Node::start(Gate::Free);
    let gate = node.watchers.watch().gate().id();
    let mut tally = Tally::default();
    let mut number = 0;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    while tally.rounds < rounds {
        let all: Vec<Container> =
            (0..containers).map(|_| Container::start(&image, mount_options)).collect();
        for container in &all {
            node.attach(container, &image);
        }
        let free = node.watchers.health.gate_ignored();
        for file in 0..FILES {
            if tally.rounds >= rounds {
                break;
            }
            for (turn, container) in all.iter().enumerate() {
                number += 1;
                tally.rounds += 1;
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let kind =
                    if number % 2 == 0 { Change::Map } else { CHANGES[number / 2 % CHANGES.len()] };
                let is_raced = random & 1 == 0;
                let pause = Duration::from_micros(random >> 8 & 0x7ff);
                let is_held = random >> 32 & 0x1f == 0;
                let stop = Arc::new(AtomicBool::new(false));
                let mut racers = Vec::new();
                if is_raced {
                    // One thread runs the file in this container, one in another container of
                    // the same image.
                    let other = if containers > 1 && number % 4 < 2 {
                        &all[(turn + 1) % containers]
                    } else {
                        container
                    };
                    for path in [container.file(file), other.file(file)] {
                        let stop = stop.clone();
                        racers.push(thread::spawn(move || {
                            while !stop.load(Ordering::Relaxed) {
                                let _ = execute(&path);
                            }
                        }));
                    }
                    thread::sleep(pause);
                } else {
                    run_surely(&container.file(file));
                    run_surely(&container.file(file));
                }
                if is_held {
                    signal_process(gate, Signal::SIGSTOP);
                    thread::spawn(move || {
                        thread::sleep(Duration::from_millis(2));
                        signal_process(gate, Signal::SIGCONT);
                    });
                }
                let (paths, mut map) = change(kind, container, file);
                thread::sleep(pause / 4);
                stop.store(true, Ordering::Relaxed);
                racers.into_iter().for_each(|racer| racer.join().unwrap());
                if let Some(map) = &mut map {
                    map[4000] ^= 1;
                }
                for path in &paths {
                    if node.is_asked_about(path) {
                        tally.asked += 1;
                    } else {
                        tally.missed += 1;
                        eprintln!("MISSED: round {number}, {kind:?}, raced {is_raced}");
                    }
                }
                // A changed file is never ignored, not even later.
                if number % 8 == 0 && !node.is_asked_about(&paths[0]) {
                    tally.missed += 1;
                    eprintln!("MISSED the second time: round {number}, {kind:?}");
                }
                while node.watchers.reports.try_recv().is_ok() {}
            }
        }
        let ignored = node.watchers.health.gate_ignored() - free;
        // Where directories can be moved, the kernel asks about every program.
        let may_ignore = !mount_options.contains("redirect_dir=on");
        assert_eq!(ignored > 0, may_ignore, "ignored {ignored}");
        for container in all {
            container.stop(&mut node);
        }
    }
    eprintln!(
        "{mount_options:?}: {tally:?}, ignored {}, copy-ups {}, answers {}",
        node.watchers.health.gate_ignored(),
        node.watchers.health.copy_ups(),
        node.answers()
    );
    tally
}

/// How many rounds to run: `make race` multiplies them.
fn rounds(short: usize) -> usize {
    let times = std::env::var("DRIFTD_RACE_TIMES").ok().map(|times| times.parse().unwrap());
    short * times.unwrap_or(1)
}

#[test]
fn changed_bytes_never_run_unseen() {
    let tally = race("", 1, rounds(1500));
    assert_eq!(tally.missed, 0, "{tally:?}");
}

#[test]
fn changed_bytes_never_run_unseen_in_ten_containers_of_one_image() {
    let tally = race("", 10, rounds(1500));
    assert_eq!(tally.missed, 0, "{tally:?}");
}

#[test]
fn the_gate_is_asked_about_an_unchanged_program_once() {
    let (_image, container, mut node) = watched(4, Gate::Free);
    assert!(node.is_asked_about(&container.file(0)));
    node.until_ignored(&container.file(0));
    for _ in 0..20 {
        assert!(!node.is_asked_about(&container.file(0)));
    }
    // Another program is asked about separately, and its copy-up has all asked about again.
    assert!(node.is_asked_about(&container.file(1)));
    fs::set_permissions(container.file(1), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(node.is_asked_about(&container.file(0)));
    wait_until("the copy-up to be over", || !node.is_asked_about(&container.file(0)));
    // The kernel keeps asking about the changed file.
    for _ in 0..3 {
        assert!(node.is_asked_about(&container.file(1)));
    }
    container.stop(&mut node);
}

#[test]
fn with_another_trust_the_gate_is_asked_about_every_program_again() {
    let (_image, container, mut node) = watched(1, Gate::Free);
    node.until_ignored(&container.file(0));
    node.watchers
        .send(SensorCommand::Trust { container: container.id.clone(), trust: Trust::Unknown });
    wait_until("the trust to be withdrawn", || node.is_asked_about(&container.file(0)));
    for _ in 0..3 {
        assert!(node.is_asked_about(&container.file(0)), "an untrusted file is never ignored");
    }
    container.stop(&mut node);
}

#[test]
fn while_the_gate_is_stopped_writers_wait_and_ignored_programs_do_not() {
    let (_image, container, mut node) = watched(2, Gate::Free);
    node.until_ignored(&container.file(1));
    node.signal_gate(Signal::SIGSTOP);
    let path = container.file(0);
    let writer = thread::spawn(move || {
        OpenOptions::new().write(true).open(path).map(drop).unwrap();
    });
    run_surely(&container.file(1));
    thread::sleep(Duration::from_millis(500));
    assert!(!writer.is_finished(), "the copy-up was not asked about");
    node.signal_gate(Signal::SIGCONT);
    writer.join().unwrap();
    container.stop(&mut node);
}

#[test]
fn an_ended_container_leaves_no_mark_of_the_gate_behind() {
    let (_image, mut container, mut node) = watched(1, Gate::Free);
    let _ = container.init.kill();
    let _ = container.init.wait();
    node.detach(&container.id);
    node.signal_gate(Signal::SIGSTOP);
    // If the gate were asked about the copy-up, this would block.
    OpenOptions::new().write(true).open(container.file(0)).map(drop).unwrap();
    node.signal_gate(Signal::SIGCONT);
}

#[test]
fn programs_of_an_already_running_container_are_asked_about_for_a_while() {
    let image = Image::new(1);
    let container = Container::start(&image, "");
    // Any process can take the name; the program is the container's own.
    write(&container.path("tmp/runc:[2:INIT]"), &elf(INIT));
    let mut entry = Command::new("chroot")
        .arg(container.path(""))
        .arg("/tmp/runc:[2:INIT]")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let comm = format!("/proc/{}/comm", entry.id());
    wait_until("the entry point", || fs::read(&comm).unwrap() == b"runc:[2:INIT]\n");
    let mut node = Node::start(Gate::Free);
    node.watchers.attach(&container.id, entry.id(), Trust::UpTo(image.recorded));
    node.until("the container to be attached", |report| {
        matches!(report, SensorEvent::Attached { .. })
    });
    for _ in 0..5 {
        assert!(node.is_asked_about(&container.file(0)));
    }
    let _ = entry.kill();
    let _ = entry.wait();
    container.stop(&mut node);
}

#[test]
fn the_self_test_passes_on_this_kernel() {
    let dir = tempfile::tempdir().unwrap();
    watch::try_free_gate(dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the self-test leaves no file behind");
}

#[test]
fn in_notify_mode_a_dropped_program_is_reported_and_no_program_waits() {
    let (_image, container, mut node) = watched(1, Gate::Notify);
    let path = container.path("tmp/dropped");
    write(&path, &program());
    run_surely(&path);
    node.until("the dropped program", |report| {
        matches!(report, SensorEvent::Observed(Observation { fact: Fact::File(FileFact::Executed { path, .. }), .. })
            if path.as_bytes() == b"/tmp/dropped")
    });
    container.stop(&mut node);
}

/// Other mount options of overlays.
#[test]
#[ignore = "takes long: make race runs it"]
fn changed_bytes_never_run_unseen_however_the_overlay_is_mounted() {
    for options in [
        "index=on",
        "metacopy=on,redirect_dir=on",
        "redirect_dir=on",
        "volatile",
        "userxattr",
        "xino=on",
        "upper-on-tmpfs",
        "upper-on-tmpfs,xino=on",
    ] {
        let tally = race(options, 2, rounds(200));
        assert_eq!(tally.missed, 0, "{options}: {tally:?}");
    }
}
