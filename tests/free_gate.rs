//! The free gate against the real kernel, and against who would like to run changed
//! bytes unseen.
//!
//! Needs root, and a kernel on which copy-ups can be met; fails without.

// A store through a shared mapping is what the free gate must not be blind for.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use driftd::config::{self, Gate};
use driftd::health::Health;
use driftd::model::{ContainerId, Fact, FileTime, Observation};
use driftd::watch::{self, SensorCommand, SensorEvent, Trust, Watch};
use nix::sys::signal::Signal;

const PATIENCE: Duration = Duration::from_secs(30);

/// Files of the image that are raced for in one container.
const FILES: usize = 500;

/// Ends at once: mov eax, 60; xor edi, edi; syscall.
const EXIT: &[u8] = b"\xb8\x3c\0\0\0\x31\xff\x0f\x05";

/// Calls itself what runc's init is called, prctl(PR_SET_NAME), and waits: pause().
const INIT: &[u8] = b"\xbf\x0f\0\0\0\x48\x8d\x35\x10\0\0\0\xb8\x9d\0\0\0\x0f\x05\
    \xb8\x22\0\0\0\x0f\x05\xeb\xf7runc:[2:INIT]\0";

fn program() -> Vec<u8> {
    elf(EXIT)
}

/// A static program without libc: 4096 bytes, of which the kernel looks at 200.
fn elf(code: &[u8]) -> Vec<u8> {
    #[cfg(not(target_arch = "x86_64"))]
    compile_error!("these tests know no other machine code");
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

fn run(path: &Path) -> io::Result<()> {
    let mut child = Command::new(path).stdin(Stdio::null()).spawn()?;
    child.wait().map(drop)
}

/// Runs it, however long somebody has it open for writing.
fn run_surely(path: &Path) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(err) = run(path) {
        assert_eq!(err.raw_os_error(), Some(libc_etxtbsy()), "{}", path.display());
        assert!(Instant::now() < deadline, "{} stays busy", path.display());
    }
}

fn libc_etxtbsy() -> i32 {
    nix::errno::Errno::ETXTBSY as i32
}

fn busily(mut attempt: impl FnMut() -> io::Result<File>) -> File {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(file) => return file,
            // It is being executed.
            Err(err) if err.raw_os_error() == Some(libc_etxtbsy()) => {
                assert!(Instant::now() < deadline, "the file stays busy");
            }
            Err(err) => panic!("{err}"),
        }
    }
}

/// What all containers of a test are made from.
struct Image {
    dir: tempfile::TempDir,
    recorded: FileTime,
}

impl Image {
    fn new(files: usize) -> Image {
        assert!(rustix::process::geteuid().is_root(), "these tests mount overlays: run as root");
        let dir = tempfile::tempdir().unwrap();
        let lower = dir.path().join("lower");
        fs::create_dir_all(lower.join("f")).unwrap();
        fs::create_dir(lower.join("tmp")).unwrap();
        write(&dir.path().join("init"), &elf(INIT));
        for number in 0..files {
            write(&lower.join("f").join(number.to_string()), &program());
        }
        let newest = fs::metadata(lower.join("f").join((files - 1).to_string())).unwrap();
        let recorded = FileTime {
            seconds: newest.ctime(),
            nanoseconds: newest.ctime_nsec().try_into().unwrap(),
        };
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
            command("mount", &["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), own.path()]);
        }
        for name in ["upper", "work", "merged"] {
            fs::create_dir(own.path().join(name)).unwrap();
        }
        let mut all = format!(
            "lowerdir={},upperdir={},workdir={}",
            image.dir.path().join("lower").display(),
            own.path().join("upper").display(),
            own.path().join("work").display()
        );
        for option in
            options.split(',').filter(|name| !name.is_empty() && *name != "upper-on-tmpfs")
        {
            all.push(',');
            all.push_str(option);
        }
        let merged = own.path().join("merged");
        command(
            "mount",
            &["-t", "overlay", "overlay", "-o", &all]
                .map(Path::new)
                .iter()
                .copied()
                .chain([&*merged])
                .collect::<Vec<_>>(),
        );
        // As runc's init is called until the entry point runs, and like that a program
        // of the host's: then nothing of the container can have run before the marks.
        let program = File::open(image.dir.path().join("init")).unwrap();
        let root = merged.clone();
        let mut init = Command::new("init");
        let execute = move || {
            nix::unistd::chroot(&root)?;
            nix::unistd::chdir("/")?;
            nix::unistd::fexecve(&program, &[c"init"], &[] as &[&std::ffi::CStr])?;
            Ok(())
        };
        // SAFETY: system calls, and no more, between fork and exec.
        let init = unsafe { init.stdin(Stdio::null()).pre_exec(execute) }.spawn().unwrap();
        let comm = format!("/proc/{}/comm", init.id());
        wait_for("init", || fs::read(&comm).unwrap() == b"runc:[2:INIT]\n");
        let name = own.path().file_name().unwrap().to_str().unwrap();
        Container { id: ContainerId::new("race", name), own, init, has_tmpfs }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.own.path().join("merged").join(name)
    }

    fn file(&self, number: usize) -> PathBuf {
        self.path("f").join(number.to_string())
    }

    /// Fails if something is busy.
    fn stop(mut self, node: &mut Node) {
        let _ = self.init.kill();
        let _ = self.init.wait();
        node.detach(&self.id);
        // What a thread is about to let go is busy for that moment: the last walk of the
        // upper layer holds what that lies on.
        let unmount = |path: &Path| {
            wait_for("the filesystem to be let go", || {
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

#[track_caller]
fn command(program: &str, arguments: &[&Path]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
}

fn signal_process(pid: u32, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[track_caller]
fn wait_for(what: &str, is_there: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_there() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// One at a time: each has groups, of which a user may have 128.
static TURN: Mutex<()> = Mutex::new(());

/// The gate's process, of the program that is installed.
fn start_gate(gate: Gate) -> driftd::gate::Gate {
    let program = Path::new(env!("CARGO_BIN_EXE_driftd"));
    driftd::gate::Gate::start(program, watch::shards(gate)).unwrap()
}

struct Node {
    _turn: MutexGuard<'static, ()>,
    watch: Option<Watch>,
    reports: Receiver<Box<SensorEvent>>,
    health: Arc<Health>,
}

impl Node {
    fn start(gate: Gate) -> Node {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (sender, reports) = bounded(64 * 1024);
        let health = Arc::new(Health::default());
        let settings = config::Watch {
            sweep_interval: Duration::from_secs(3600),
            gate,
            ..config::Watch::default()
        };
        let watch = Watch::start(&settings, sender, health.clone(), start_gate(gate)).unwrap();
        Node { _turn: turn, watch: Some(watch), reports, health }
    }

    fn order(&self, order: SensorCommand) {
        self.watch.as_ref().unwrap().commands().send(order).unwrap();
    }

    fn attach(&mut self, container: &Container, image: &Image) {
        let id = container.id.clone();
        self.order(SensorCommand::Attach {
            container: id.clone(),
            pid: container.init.id(),
            rootfs: None,
        });
        self.order(SensorCommand::Trust {
            container: id.clone(),
            trust: Trust::UpTo(image.recorded),
        });
        self.order(SensorCommand::Scan { container: id.clone(), ticket: Some(1) });
        self.until("the first walk", |report| match report {
            SensorEvent::NotAttached { reason, .. } => panic!("not attached: {reason}"),
            SensorEvent::Scanned { container, ticket: Some(1), .. } => *container == id,
            _ => false,
        });
    }

    fn detach(&mut self, id: &ContainerId) {
        self.order(SensorCommand::Detach { container: id.clone(), pid: None });
        // Orders are carried out one after the other.
        let nobody = ContainerId::new("race", "nobody");
        self.order(SensorCommand::Scan { container: nobody.clone(), ticket: Some(2) });
        self.until(
            "the container to be forgotten",
            |report| matches!(report, SensorEvent::Scanned { container, .. } if *container == nobody),
        );
    }

    #[track_caller]
    fn until(&mut self, what: &str, mut is_it: impl FnMut(&SensorEvent) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let report = self.reports.recv_deadline(deadline);
            match report {
                Ok(report) if is_it(&report) => return,
                Ok(_) => (),
                Err(_) => panic!("waited in vain for {what}"),
            }
        }
    }

    /// Stops the gate's process, or lets it go on.
    fn signal_gate(&self, signal: Signal) {
        signal_process(self.watch.as_ref().unwrap().gate().id(), signal);
    }

    /// Runs a program until the kernel asks no more about it.
    #[track_caller]
    fn until_ignored(&self, path: &Path) {
        wait_for("the program to be ignored", || !self.is_asked_about(path));
    }

    fn answers(&self) -> u64 {
        self.health.gate_answers()
    }

    /// Runs a program, and says whether the kernel has asked.
    fn is_asked_about(&self, path: &Path) -> bool {
        let before = self.answers();
        run_surely(path);
        // Answers are counted before they are given.
        self.answers() != before
    }

    fn stop(mut self) {
        self.watch.take().unwrap().stop();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.stop();
        }
    }
}

/// Ways to make a file of the image another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// `open(O_RDWR)`, a shared mapping, `close`; the store comes last.
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

/// Makes the change; then these are to be asked about, after `last`.
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
            // SAFETY: nobody makes the file shorter.
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

/// Changes files of the image, most of them while they are executed, and executes
/// what came of it: it must be asked about.
fn race(mount_options: &str, containers: usize, rounds: usize) -> Tally {
    let image = Image::new(FILES);
    let mut node = Node::start(Gate::Free);
    let gate = node.watch.as_ref().unwrap().gate().id();
    let mut tally = Tally::default();
    let mut number = 0;
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    while tally.rounds < rounds {
        let all: Vec<Container> =
            (0..containers).map(|_| Container::start(&image, mount_options)).collect();
        for container in &all {
            node.attach(container, &image);
        }
        let free = node.health.gate_ignored();
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
                    // One in this container, one in a container of the same image.
                    let other = if containers > 1 && number % 4 < 2 {
                        &all[(turn + 1) % containers]
                    } else {
                        container
                    };
                    for path in [container.file(file), other.file(file)] {
                        let stop = stop.clone();
                        racers.push(thread::spawn(move || {
                            while !stop.load(Ordering::Relaxed) {
                                let _ = run(&path);
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
                // And it stays so: nothing that was changed is ever ignored.
                if number % 8 == 0 && !node.is_asked_about(&paths[0]) {
                    tally.missed += 1;
                    eprintln!("MISSED the second time: round {number}, {kind:?}");
                }
                while node.reports.try_recv().is_ok() {}
            }
        }
        let ignored = node.health.gate_ignored() - free;
        // Where directories can be moved, every program is asked about.
        let may_ignore = !mount_options.contains("redirect_dir=on");
        assert_eq!(ignored > 0, may_ignore, "ignored {ignored}");
        for container in all {
            container.stop(&mut node);
        }
    }
    eprintln!(
        "{mount_options:?}: {tally:?}, ignored {}, copy-ups {}, answers {}",
        node.health.gate_ignored(),
        node.health.copy_ups(),
        node.answers()
    );
    node.stop();
    tally
}

/// `make race` makes many times as many.
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
fn an_unchanged_program_is_asked_about_once() {
    let image = Image::new(4);
    let container = Container::start(&image, "");
    let mut node = Node::start(Gate::Free);
    node.attach(&container, &image);
    assert!(node.is_asked_about(&container.file(0)));
    node.until_ignored(&container.file(0));
    for _ in 0..20 {
        assert!(!node.is_asked_about(&container.file(0)));
    }
    // Another program is another question, and its copy-up everyone's.
    assert!(node.is_asked_about(&container.file(1)));
    fs::set_permissions(container.file(1), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(node.is_asked_about(&container.file(0)));
    wait_for("the copy-up to be over", || !node.is_asked_about(&container.file(0)));
    // What was changed is asked about for ever.
    for _ in 0..3 {
        assert!(node.is_asked_about(&container.file(1)));
    }
    container.stop(&mut node);
}

#[test]
fn with_another_trust_every_program_is_asked_about_anew() {
    let image = Image::new(1);
    let container = Container::start(&image, "");
    let mut node = Node::start(Gate::Free);
    node.attach(&container, &image);
    node.until_ignored(&container.file(0));
    node.order(SensorCommand::Trust { container: container.id.clone(), trust: Trust::Unknown });
    wait_for("the doubt", || node.is_asked_about(&container.file(0)));
    for _ in 0..3 {
        assert!(node.is_asked_about(&container.file(0)), "a doubtful file is never ignored");
    }
    container.stop(&mut node);
}

#[test]
fn while_the_gate_is_stopped_writers_wait_and_ignored_programs_do_not() {
    let image = Image::new(2);
    let container = Container::start(&image, "");
    let mut node = Node::start(Gate::Free);
    node.attach(&container, &image);
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
fn a_container_that_has_ended_leaves_no_gate_behind() {
    let image = Image::new(1);
    let mut container = Container::start(&image, "");
    let mut node = Node::start(Gate::Free);
    node.attach(&container, &image);
    let _ = container.init.kill();
    let _ = container.init.wait();
    node.detach(&container.id);
    node.signal_gate(Signal::SIGSTOP);
    // Nothing is asked, or this would wait for ever.
    OpenOptions::new().write(true).open(container.file(0)).map(drop).unwrap();
    node.signal_gate(Signal::SIGCONT);
}

#[test]
fn a_container_that_runs_already_is_asked_about_for_a_while() {
    let image = Image::new(1);
    let container = Container::start(&image, "");
    // A name that anybody can take, and a program of its own.
    write(&container.path("tmp/runc:[2:INIT]"), &elf(INIT));
    let mut entry = Command::new("chroot")
        .arg(container.path(""))
        .arg("/tmp/runc:[2:INIT]")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let comm = format!("/proc/{}/comm", entry.id());
    wait_for("the entry point", || fs::read(&comm).unwrap() == b"runc:[2:INIT]\n");
    let mut node = Node::start(Gate::Free);
    let id = container.id.clone();
    node.order(SensorCommand::Attach { container: id.clone(), pid: entry.id(), rootfs: None });
    node.order(SensorCommand::Trust { container: id.clone(), trust: Trust::UpTo(image.recorded) });
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
fn the_trial_finds_this_kernel_fit() {
    let dir = tempfile::tempdir().unwrap();
    watch::try_free_gate(dir.path()).unwrap();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "the trial leaves something behind");
}

#[test]
fn in_notify_mode_a_dropped_program_is_told_and_nobody_waits() {
    let image = Image::new(1);
    let container = Container::start(&image, "");
    let mut node = Node::start(Gate::Notify);
    node.attach(&container, &image);
    let path = container.path("tmp/dropped");
    write(&path, &program());
    run_surely(&path);
    node.until("the dropped program", |report| {
        matches!(report, SensorEvent::Observed(Observation { fact: Fact::Executed { path, .. }, .. })
            if path.as_bytes() == b"/tmp/dropped")
    });
    container.stop(&mut node);
}

/// Overlays as others mount them.
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
