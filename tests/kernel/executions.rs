//! Reports of executed programs: paths, hashes, arguments, and files without a name.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use driftd::model::{
    Content, Fact, FileFact, Filesystem, Format, Observation, RootfsPath, Source, Unhashed,
};
use driftd::watch::SensorEvent;

use crate::common::{is_emulated, patience, run};
use crate::container::{BUSYBOX, Container, Family, hash_of};
use crate::node::{Executed, Node, attached, path};
use crate::{executable, kernel_version};

#[test]
fn a_dropped_program_is_reported_with_path_and_hash_and_image_programs_are_not() {
    let container = Container::start();
    let mut node = Node::start();
    assert!(!node.attach(&container), "its entry point was already running");
    let blake3 = container.drop_program("/tmp/true");
    container.shell("/bin/true; /bin/cat /etc/config; /tmp/true an argument; /bin/true");
    let Executed { state, .. } = node.until_executed(&path("/tmp/true"));
    assert_eq!(state.blake3(), Some(blake3));
    assert_eq!((state.format, state.mode, state.deleted), (Format::Elf, 0o755, false));
    let blake3 = container.drop_program("/tmp/sleep");
    // Long enough that the process still exists when driftd describes it.
    container.shell("/tmp/sleep 2");
    let Executed { state, process, invoked_as } = node.until_executed(&path("/tmp/sleep"));
    assert_eq!(state.blake3(), Some(blake3));
    assert_eq!((invoked_as, process.uid), (None, Some(0)));
    // The shell does not count: it is in the host's mount namespace.
    assert_eq!(process.ancestors.len(), 1);
    assert_eq!(
        node.executed_paths(),
        ["/tmp/true", "/tmp/sleep"],
        "the image's own programs are not reported"
    );
    node.assert_no_loss();
}

#[test]
fn reported_arguments_are_the_new_programs_and_not_its_callers() {
    let (container, mut node) = attached();
    container.drop_program("/tmp/busybox");
    for name in ["sh", "sleep"] {
        symlink("busybox", container.merged().join("tmp").join(name)).unwrap();
    }
    // The caller runs the same file: only the arguments differ.
    let child = container.command(&["/tmp/sh", "-c", "exec /tmp/sleep 30"]).spawn().unwrap();
    let child = Family(child);
    let (process, invoked_as) =
        node.until_observed("the second program", |observation| match &observation.fact {
            Fact::File(FileFact::Executed { process, invoked_as, .. })
                if invoked_as.as_deref() == Some("/tmp/sleep") =>
            {
                Some((process.clone(), invoked_as.clone()))
            }
            _ => None,
        });
    assert_eq!(process.argv, Some(vec!["/tmp/sleep".into(), "30".into()]));
    assert!(process.exe.as_deref().is_some_and(|exe| exe.ends_with("/tmp/busybox")));
    assert_eq!(process.identity.pid, child.0.id());
    assert_eq!(invoked_as.as_deref(), Some("/tmp/sleep"));
    // The first may be described only after the second has begun: then both reports
    // show the second program's arguments.
    let mut executions = 0;
    node.until_observed("both executions", |observation| {
        executions += u32::from(matches!(observation.fact, Fact::File(FileFact::Executed { .. })));
        (executions == 2).then_some(())
    });
    assert_eq!(node.executed_paths(), ["/tmp/busybox", "/tmp/busybox"]);
    node.assert_no_loss();
}

#[test]
fn a_script_is_reported_by_its_own_path() {
    let (container, mut node) = attached();
    let script = container.merged().join("tmp/script");
    executable::write(&script, b"#!/bin/sh\nexec /bin/sleep 30\n").unwrap();
    let _child = Family(container.command(&["/tmp/script", "now"]).spawn().unwrap());
    let executed = node.until_executed(&path("/tmp/script"));
    assert_eq!(executed.state.format, Format::Script);
    assert_eq!(executed.state.blake3(), Some(hash_of(&script)));
    assert_eq!(node.executed_paths(), ["/tmp/script"]);
}

#[test]
fn a_thousand_executions_are_all_counted() {
    let (container, mut node) = attached();
    let blake3 = container.drop_program("/tmp/true");
    container.shell("i=0; while [ $i -lt 1000 ]; do /tmp/true; i=$((i+1)); done");
    let mut executed = 0;
    node.until_observed("a thousand executions", |observation| match &observation.fact {
        Fact::File(FileFact::Executed { path, state, .. }) => {
            assert_eq!((path.to_string().as_str(), state.blake3()), ("/tmp/true", Some(blake3)));
            // Under load, executions of one file by one parent are coalesced.
            executed += observation.times();
            assert!(executed <= 1000, "{executed} of 1000 executions");
            (executed == 1000).then_some(())
        }
        _ => None,
    });
    node.assert_no_loss();
    assert!(node.watchers.health.gate_answers() >= 1000);
}

/// An environment of a length with which the data that execve(2) writes on the stack
/// begins just below the end of a page. On x86-64 an untouched page may lie between the
/// arguments and the stack pointer, and no copy of the stack reaches beyond it. This
/// happens the more often, the less of their page the arguments, the environment and
/// the program's name leave free.
fn environment(words: &[&str]) -> Vec<(&'static str, String)> {
    const PAGE: usize = 4096;
    let search = std::env::var("PATH").unwrap();
    let length = |text: &str| text.len() + 1;
    let used = words.iter().map(|word| length(word)).sum::<usize>()
        + length(words[0])
        + length("PATH=") + search.len()
        + length("FILL=")
        // Follows the program's name.
        + size_of::<u64>();
    let filler = (2 * PAGE + 1).checked_sub(used).expect("a short PATH");
    vec![("PATH", search), ("FILL", "x".repeat(filler % PAGE))]
}

#[test]
fn programs_that_end_at_once_are_reported_with_their_arguments() {
    // So few at a time that none are coalesced.
    const TURN: usize = 40;
    const TURNS: usize = 25;
    let (container, mut node) = attached();
    container.drop_program("/tmp/true");
    let mut with_arguments = 0;
    for turn in 0..TURNS {
        let mut expected = BTreeMap::new();
        for number in 0..TURN {
            let number = format!("{:04}", turn * TURN + number);
            let words = ["/tmp/true", "", "number", &number];
            let mut command = container.command(&words);
            let mut child = command.env_clear().envs(environment(&words)).spawn().unwrap();
            expected.insert(child.id(), words.map(str::to_owned).to_vec());
            assert!(child.wait().unwrap().success());
        }
        node.received.clear();
        let mut seen = 0;
        node.until_observed("all executions", |observation| match &observation.fact {
            Fact::File(FileFact::Executed { process, .. }) => {
                if let Some(argv) = &process.argv {
                    assert_eq!(*argv, expected[&process.identity.pid]);
                    with_arguments += 1;
                }
                seen += 1;
                (seen == TURN).then_some(())
            }
            _ => None,
        });
    }
    let count = TURNS * TURN;
    eprintln!("{with_arguments} of {count} were reported with their arguments");
    let least = if is_emulated() { count / 2 } else { count * 97 / 100 };
    assert!(with_arguments >= least, "{with_arguments} of {count}");
    node.assert_no_loss();
}

/// Compiles the loader, which runs programs in ways that leave no name behind.
pub(crate) fn compile_loader(directory: &Path) -> PathBuf {
    let (source, program) = (directory.join("loader.c"), directory.join("loader"));
    fs::write(&source, include_str!("../data/loader.c")).unwrap();
    run(&[
        OsStr::new("gcc"),
        "-static".as_ref(),
        "-Os".as_ref(),
        "-o".as_ref(),
        program.as_ref(),
        source.as_ref(),
    ]);
    program
}

#[test]
fn a10_a_thousand_executed_memfds_are_a_thousand_observations() {
    let (container, mut node) = with_loader();
    // Each runs for less than a millisecond.
    container.inside("/tmp/loader memfd 1000 /tmp/loader exit");
    let (mut hashed, mut with_arguments) = (0, 0);
    let wanted = path("/memfd:a");
    let expected = hash_of(container.merged().join("tmp/loader"));
    let deadline = Instant::now() + 4 * patience();
    let mut count = 0;
    while count < 1000 {
        let Ok(report) = node.watchers.reports.recv_deadline(deadline) else {
            // The records of several processors are ordered by time, and emulated
            // processors do not quite agree on it.
            assert!(is_emulated() && count >= 990, "{count} of 1000, {hashed} hashed");
            break;
        };
        let report = *report;
        if let SensorEvent::Observed(Observation {
            source,
            fact: Fact::File(FileFact::Executed { path, filesystem, state, running, process, .. }),
            ..
        }) = &report
            && *path == wanted
        {
            if let Some(argv) = &process.argv {
                assert_eq!(*argv, ["a", "exit"]);
                with_arguments += 1;
            }
            assert_eq!(
                (*source, *filesystem, *running, state.deleted),
                (Source::Trace, Filesystem::Anonymous, false, true)
            );
            match state.content {
                Content::Hashed { blake3, .. } => {
                    assert_eq!(blake3, expected);
                    hashed += 1;
                }
                Content::Unhashed(why) => assert_eq!(why, Unhashed::Gone),
            }
            count += 1;
        }
        node.received.push(report);
    }
    eprintln!("{hashed} of {count} memfds were hashed, {with_arguments} have arguments");
    // The number depends on the length of the environment.
    assert!(with_arguments > count / 4, "{with_arguments} of {count}");
    node.scan(&container);
    let executed = node.executed_paths();
    assert_eq!(executed.iter().filter(|path| *path == "/memfd:a").count(), count);
    node.assert_no_loss();
}

/// A container with the loader as a dropped program, and a node that watches it.
fn with_loader() -> (Container, Node) {
    let container = Container::start();
    let loader = compile_loader(container.dir.path());
    let mut node = Node::start();
    node.attach(&container);
    let program = fs::read(&loader).unwrap();
    executable::write(&container.merged().join("tmp/loader"), &program).unwrap();
    (container, node)
}

/// Starts a loader whose execve waits for an argument, until a line is written to it.
pub(crate) fn begin_late(loader: &mut Command) -> (Family, ChildStdin) {
    let mut loader = loader.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let resume = loader.stdin.take().unwrap();
    let mut line = [0; 6];
    loader.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"asked\n");
    (Family(loader), resume)
}

impl Container {
    /// What the loader prints.
    #[track_caller]
    fn loader(&self, arguments: &[&str]) -> String {
        let output = self.command(&[&["/tmp/loader"], arguments].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Node {
    /// Executes another program, waits for its report, and returns how often `program` was
    /// executed before it.
    #[track_caller]
    fn times_of(&mut self, container: &Container, program: &str) -> usize {
        container.drop_program("/tmp/true");
        container.shell("/tmp/true");
        self.until_executed(&path("/tmp/true"));
        self.executed_paths().iter().filter(|path| *path == program).count()
    }
}

#[test]
fn d04_a_program_that_is_only_checked_is_a_new_file_and_no_execution() {
    let (container, mut node) = with_loader();
    for name in ["/tmp/checked", "/tmp/script"] {
        container.drop_program(name);
    }
    executable::write(&container.merged().join("tmp/script"), b"#!/bin/sh\nexit 0\n").unwrap();
    let has_check = kernel_version() >= (6, 14);
    let expected = if has_check { "0" } else { "22" };
    assert_eq!(container.loader(&["check", "/tmp/checked"]), expected);
    assert_eq!(container.loader(&["check", "/tmp/script"]), expected);
    assert_eq!(node.times_of(&container, "/tmp/checked"), 0);
    assert_eq!(node.times_of(&container, "/tmp/script"), 0);
    node.until_present("/tmp/checked", |state| state.mode == 0o755);
    node.until_present("/tmp/script", |state| state.mode == 0o755);
    // Now the checked files are executed.
    container.shell("/tmp/checked true; /tmp/script");
    node.until_executed(&path("/tmp/checked"));
    node.until_executed(&path("/tmp/script"));
    node.assert_no_loss();
}

#[test]
fn d04_a_program_that_the_kernel_does_not_run_is_a_new_file_and_no_execution() {
    let (container, mut node) = with_loader();
    let mut program = fs::read(BUSYBOX).unwrap();
    // e_machine: none.
    program[18..20].copy_from_slice(&[0, 0]);
    executable::write(&container.merged().join("tmp/foreign"), &program).unwrap();
    executable::write(&container.merged().join("tmp/script"), b"#!/none\n").unwrap();
    assert_eq!(container.loader(&["try", "/tmp/foreign"]), libc::ENOEXEC.to_string());
    assert_eq!(container.loader(&["try", "/tmp/script"]), libc::ENOENT.to_string());
    assert_eq!(node.times_of(&container, "/tmp/foreign"), 0);
    assert_eq!(node.times_of(&container, "/tmp/script"), 0);
    node.until_present("/tmp/foreign", |state| state.mode == 0o755);
    node.assert_no_loss();
}

#[test]
fn d04_a_slow_execve_is_reported_even_when_the_first_thread_has_ended() {
    let (container, mut node) = with_loader();
    container.drop_program("/tmp/sleep");
    let mut loader = container.command(&["/tmp/loader", "late-thread", "/tmp/sleep"]);
    let (_loader, mut resume) = begin_late(&mut loader);
    // Longer than driftd waits for an unread record.
    std::thread::sleep(Duration::from_millis(1500));
    resume.write_all(b"\n").unwrap();
    let executed = node.until_executed(&path("/tmp/sleep"));
    assert_eq!(executed.state.blake3(), Some(hash_of(container.merged().join("tmp/sleep"))));
    assert_eq!(executed.invoked_as.as_deref(), None);
    node.assert_no_loss();
}

/// Prints the processor time of fork and exec with and without the rings. It hardly
/// depends on how busy the machine is.
#[test]
#[ignore = "measures, and takes a minute"]
fn cost_of_the_rings_per_execve() {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    const ROUNDS: usize = 20;
    const EXECUTIONS: i32 = 1000;
    let directory = tempfile::tempdir().unwrap();
    let loader = compile_loader(directory.path());
    let used = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
    };
    let round = || {
        let before = used();
        let mut command = Command::new(&loader);
        command.args(["memfd", &EXECUTIONS.to_string()]).arg(&loader).arg("exit");
        assert!(command.status().unwrap().success());
        (used() - before) / i64::from(EXECUTIONS)
    };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(round());
        let node = Node::start();
        with.push(round());
        drop(node);
    }
    for (name, times) in [("without", &mut without), ("with", &mut with)] {
        times.sort_unstable();
        eprintln!("{name}: min {} median {} us of processor time", times[0], times[ROUNDS / 2]);
    }
}

#[test]
fn a_name_that_is_not_utf8_is_reported_whole() {
    let (container, mut node) = attached();
    let name = OsStr::from_bytes(b"/tmp/ev\xffil (deleted)");
    let target = container.merged().join(OsStr::from_bytes(&name.as_bytes()[1..]));
    executable::write(&target, &fs::read(BUSYBOX).unwrap()).unwrap();
    // busybox knows no such applet, but it has been executed by then.
    container.command(&[]).arg(name).output().unwrap();
    let executed = node.until_executed(&RootfsPath::new(name.as_bytes()).unwrap());
    assert!(!executed.state.deleted);
    node.assert_no_loss();
}

#[test]
fn a_deleted_program_is_reported_as_deleted() {
    let (container, mut node) = attached();
    let blake3 = container.drop_program("/tmp/program");
    let name = container.merged().join("tmp/program");
    let file = fs::File::open(&name).unwrap();
    fs::remove_file(&name).unwrap();
    let open = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Command::new(open).output().unwrap();
    let executed = node.until_executed(&path("/tmp/program"));
    assert_eq!((executed.state.deleted, executed.state.blake3()), (true, Some(blake3)));
}

#[test]
fn a_program_reached_through_a_bind_mount_is_reported_by_its_own_path() {
    let (container, mut node) = attached();
    container.drop_program("/tmp/true");
    let script = "mount --bind \"$0/tmp\" \"$0/mnt\" && chroot \"$0\" /mnt/true; sleep 1";
    run(&[
        OsStr::new("unshare"),
        "--mount".as_ref(),
        "sh".as_ref(),
        "-c".as_ref(),
        script.as_ref(),
        container.merged().as_ref(),
    ]);
    let executed = node.until_observed("the program", |observation| match &observation.fact {
        Fact::File(FileFact::Executed { path, .. }) => Some(path.to_string()),
        _ => None,
    });
    assert_eq!(executed, "/tmp/true");
}

#[test]
fn executions_before_a_stop_are_reported() {
    const PROGRAMS: usize = 200;
    let (container, mut node) = attached();
    container.drop_program("/tmp/true");
    let lay =
        format!("i=0; while [ $i -lt {PROGRAMS} ]; do cp /tmp/true /opt/t$i; i=$((i+1)); done");
    container.shell(&lay);
    // Busybox knows no applets of these names and ends.
    let run = format!("i=0; while [ $i -lt {PROGRAMS} ]; do /opt/t$i; i=$((i+1)); done; true");
    container.shell(&run);
    node.watchers.stop();
    let mut executed = BTreeSet::new();
    for report in node.watchers.reports.try_iter() {
        if let SensorEvent::Observed(Observation {
            fact: Fact::File(FileFact::Executed { path, state, .. }),
            ..
        }) = &*report
            && path.to_string().starts_with("/opt/t")
        {
            assert!(state.blake3().is_some(), "{path} was not hashed");
            executed.insert(path.to_string());
        }
    }
    assert_eq!(executed.len(), PROGRAMS);
}
