//! What the gate costs a container: without a listener, with the smallest possible one, and
//! with driftd in each of its modes, also where a rule may deny, in one run.
//!
//! One container (an overlay as its root, a pid and a mount namespace of its own) in
//! which a small program starts another and waits for it, or opens, reads and closes
//! a file. The listeners alternate in short blocks, so that other work of the machine affects
//! all of them. The median of each block counts, and its difference from the block without a
//! listener in the same round.
#![allow(clippy::print_stdout)] // what a bench prints is its result

mod cost;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use driftd::config::{self, Gate};
use driftd::health::Health;
use driftd::model::{ContainerId, FileTime, OverlayDirs};
use driftd::sys::fanotify::{Answer, Buffer, Group, Incoming};
use driftd::watch::{self, SensorEvent, Watch};
use nix::sys::resource::UsageWho;

/// Operations in one block, and rounds of blocks: 20,000 of each kind.
const BLOCK: u32 = 500;
const ROUNDS: usize = 40;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listener {
    None,
    Responder,
    Notified,
    Driftd(Gate),
    /// driftd, where a rule may deny what runs in the container.
    Enforcing(Gate),
}

const LISTENERS: [Listener; 8] = [
    Listener::None,
    Listener::Responder,
    Listener::Notified,
    Listener::Driftd(Gate::Ask),
    Listener::Driftd(Gate::Free),
    Listener::Driftd(Gate::Notify),
    Listener::Enforcing(Gate::Ask),
    Listener::Enforcing(Gate::Free),
];

impl Listener {
    fn name(self) -> &'static str {
        match self {
            Listener::None => "no listener",
            Listener::Responder => "minimal responder",
            Listener::Notified => "minimal notified",
            Listener::Driftd(Gate::Ask) => "driftd, ask",
            Listener::Driftd(Gate::Free) => "driftd, free",
            Listener::Driftd(Gate::Notify) => "driftd, notify",
            Listener::Enforcing(Gate::Free) => "driftd, free, deny",
            Listener::Enforcing(Gate::Ask | Gate::Notify) => "driftd, ask, deny",
        }
    }
}

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only asks whether it can be built.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    ensure!(nix::unistd::geteuid().is_root(), "not root (run: make bench)");
    let rounds = std::env::var("DRIFTD_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    let rounds = rounds.unwrap_or(ROUNDS);
    let scratch = tempfile::Builder::new().prefix("driftd-bench.").tempdir()?;
    let mut container = Container::start(scratch.path())?;
    println!("{rounds} rounds of {BLOCK} each, in one container\n");
    compare("execution of a program of the image", &mut container, "e /program", rounds)?;
    compare("open, read and close of a file of the image", &mut container, "o /program", rounds)?;
    let copy = container.merged.join("dropped");
    fs::copy(container.merged.join("program"), &copy)?;
    let mut bytes = fs::read(&copy)?;
    bytes.extend_from_slice(b"not in the image");
    fs::write(&copy, bytes)?;
    let few = rounds.div_ceil(4);
    compare("execution of a dropped program", &mut container, "e /dropped", few)?;
    compare("open, read and close of a dropped file", &mut container, "o /dropped", few)?;
    Ok(())
}

/// One block's figures, in microseconds.
#[derive(Clone, Copy, Debug)]
struct Block {
    median: f64,
    worst: f64,
    /// The listener's processor time for each operation.
    cpu: f64,
}

fn compare(
    what: &str,
    container: &mut Container,
    order: &str,
    rounds: usize,
) -> anyhow::Result<()> {
    let mut blocks: [Vec<Block>; LISTENERS.len()] = Default::default();
    for round in 0..rounds {
        // No listener always goes first.
        for turn in 0..LISTENERS.len() {
            let index = (round + turn) % LISTENERS.len();
            blocks[index].push(block(LISTENERS[index], container, order)?);
        }
    }
    println!("{what}");
    println!(
        "  {:<18} {:>9} {:>9} {:>10} {:>7} {:>10} {:>8}",
        "", "median", "least", "over none", "ratio", "worst", "CPU"
    );
    for (listener, series) in LISTENERS.iter().zip(&blocks) {
        let paired = || series.iter().zip(&blocks[0]);
        let over: Vec<f64> = paired().map(|(one, none)| one.median - none.median).collect();
        let ratio: Vec<f64> = paired().map(|(one, none)| one.median / none.median).collect();
        let medians: Vec<f64> = series.iter().map(|block| block.median).collect();
        println!(
            "  {:<18} {:>6.1} µs {:>6.1} µs {:>+7.1} µs {:>7.3} {:>7.0} µs {:>5.1} µs",
            listener.name(),
            cost::median(medians.clone()),
            medians.into_iter().fold(f64::INFINITY, f64::min),
            cost::median(over),
            cost::median(ratio),
            series.iter().map(|block| block.worst).fold(0.0, f64::max),
            cost::median(series.iter().map(|block| block.cpu).collect()),
        );
    }
    println!();
    Ok(())
}

fn block(listener: Listener, container: &mut Container, order: &str) -> anyhow::Result<Block> {
    let asks = order.starts_with('e');
    let measured = |container: &mut Container| {
        container.order(order, BLOCK / 10)?;
        let mut figures = Err(anyhow::anyhow!("not measured"));
        let cost = cost::measure(UsageWho::RUSAGE_SELF, || {
            figures = container.order(order, BLOCK);
            Ok(())
        })?;
        let (median, worst) = figures?;
        let cpu = cost.cpu.as_secs_f64() * 1e6 / f64::from(BLOCK);
        anyhow::Ok(Block { median, worst, cpu })
    };
    match listener {
        Listener::None => measured(container),
        Listener::Responder | Listener::Notified => {
            let responder = Responder::start(container, listener)?;
            let block = measured(container)?;
            let seen = responder.stop();
            ensure!(!asks || seen >= u64::from(BLOCK), "{seen} of {BLOCK}: a vacuous bench");
            Ok(block)
        }
        Listener::Driftd(gate) | Listener::Enforcing(gate) => {
            let is_enforcing = matches!(listener, Listener::Enforcing(_));
            let driftd = Driftd::start(container, gate, is_enforcing)?;
            let before = cost::cpu_time_of(driftd.watch.gate().id())?;
            let mut block = measured(container)?;
            // Only this figure includes the warm-up, a tenth of a block.
            let of_gate = cost::cpu_time_of(driftd.watch.gate().id())?.saturating_sub(before);
            block.cpu += of_gate.as_secs_f64() * 1e6 / f64::from(BLOCK + BLOCK / 10);
            let seen = driftd.health.gate_answers();
            let ignored = driftd.health.gate_ignored();
            let losses = driftd.health.losses();
            ensure!(losses.is_empty(), "driftd lost something: {losses:?}");
            driftd.stop();
            let is_free = gate == Gate::Free && order == "e /program";
            ensure!(
                !asks || seen >= u64::from(BLOCK) || (is_free && ignored > 0),
                "driftd saw {seen} of {BLOCK} and ignored {ignored}: a vacuous bench"
            );
            ensure!(!is_free || seen < 20, "driftd was asked {seen} times: it is not free");
            Ok(block)
        }
    }
}

/// Executes or opens files: it reads orders such as `e PATH TIMES`, and prints the median and
/// the worst time in nanoseconds.
const WORKER: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static long now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000L + t.tv_nsec; }
static int order(const void *a, const void *b) { long x = *(long *)a, y = *(long *)b; return (x > y) - (x < y); }
int main(int count, char **words) {
    if (count != 2 || chroot(words[1]) || chdir("/")) return 1;
    char what, path[256], buffer[4096]; int times;
    static long took[100000];
    while (scanf(" %c %255s %d", &what, path, &times) == 3) {
        prctl(PR_SET_NAME, "worker");
        for (int i = 0; i < times; i++) {
            long began = now();
            if (what == 'e') {
                pid_t pid; int status; char *arguments[] = { path, 0 }, *environment[] = { 0 };
                if (posix_spawn(&pid, path, 0, 0, arguments, environment) || waitpid(pid, &status, 0) != pid || status) return 1;
            } else {
                int fd = open(path, O_RDONLY);
                if (fd < 0 || read(fd, buffer, sizeof buffer) < 1 || close(fd)) return 1;
            }
            took[i] = now() - began;
        }
        prctl(PR_SET_NAME, "runc:[2:INIT]");
        qsort(took, times, sizeof *took, order);
        printf("%ld %ld\n", took[times / 2], took[times - 1]);
        fflush(stdout);
    }
    return 0;
}
"#;

/// The name of runc's init until the entry point runs. Like runc's init, the worker is a
/// program of the host, so that driftd knows that nothing can have changed the image's files
/// before it watched. At work it has another name, because a child of a runtime's init is a
/// session.
const WORKER_NAME: &str = "runc:[2:INIT]";

fn compile(source: &str, program: &Path) -> anyhow::Result<()> {
    let file = program.with_extension("c");
    fs::write(&file, source)?;
    let status = Command::new("gcc")
        .args(["-static", "-Os", "-s", "-o"])
        .arg(program)
        .arg(&file)
        .status()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(status.success(), "gcc -static failed (run: make setup)");
    Ok(fs::remove_file(file)?)
}

struct Container {
    merged: PathBuf,
    directories: OverlayDirs,
    outer: Child,
    init: u32,
    orders: ChildStdin,
    figures: BufReader<ChildStdout>,
}

impl Container {
    fn start(scratch: &Path) -> anyhow::Result<Container> {
        let at = |part: &str| scratch.join(part);
        let (lower, upper, work, merged) = (at("lower"), at("upper"), at("work"), at("merged"));
        for directory in [&lower, &upper, &work, &merged] {
            fs::create_dir(directory)?;
        }
        compile("int main(void) { return 0; }\n", &lower.join("program"))?;
        compile(WORKER, &at("worker"))?;
        fs::rename(at("worker"), at(WORKER_NAME))?;
        thread::sleep(Duration::from_millis(50));
        // What is older than the upperdir is the image's.
        fs::remove_dir(&upper)?;
        fs::create_dir(&upper)?;
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        let status = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options])
            .arg(&merged)
            .status()?;
        ensure!(status.success(), "cannot mount an overlay in {}", scratch.display());
        // As under a shim, init's parent is in the host's mount namespace.
        let mut outer = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "unshare", "--mount"])
            .arg(at(WORKER_NAME))
            .arg(&merged)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run unshare")?;
        let orders = outer.stdin.take().expect("it is piped");
        let figures = BufReader::new(outer.stdout.take().expect("it is piped"));
        let children = format!("/proc/{0}/task/{0}/children", outer.id());
        let init = loop {
            let child = fs::read_to_string(&children)?.trim().parse::<u32>().ok();
            let comm = child.map(|pid| fs::read(format!("/proc/{pid}/comm")).unwrap_or_default());
            match (child, comm) {
                (Some(pid), Some(comm)) if comm.trim_ascii() == WORKER_NAME.as_bytes() => {
                    break pid;
                }
                _ => thread::sleep(Duration::from_millis(1)),
            }
        };
        let directories = OverlayDirs { upperdir: upper, lowerdirs: vec![lower] };
        Ok(Container { merged, directories, outer, init, orders, figures })
    }

    /// The median and the worst, in microseconds.
    fn order(&mut self, order: &str, times: u32) -> anyhow::Result<(f64, f64)> {
        writeln!(self.orders, "{order} {times}")?;
        let mut line = String::new();
        self.figures.read_line(&mut line)?;
        let mut figures = line.split_whitespace().map(str::parse::<f64>);
        let mut next = || anyhow::Ok(figures.next().context("the container's worker failed")??);
        Ok((next()? / 1e3, next()? / 1e3))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.outer.kill();
        let _ = self.outer.wait();
        let _ = Command::new("umount").arg("--lazy").arg(&self.merged).status();
    }
}

/// The smallest listener: it reads each event and allows it, or only reads it.
struct Responder {
    stop: Arc<AtomicBool>,
    seen: Arc<AtomicU64>,
    thread: thread::JoinHandle<()>,
}

impl Responder {
    fn start(container: &Container, listener: Listener) -> anyhow::Result<Responder> {
        let (group, events) = match listener {
            Listener::Notified => (Group::exec_feed()?, nix::libc::FAN_OPEN_EXEC),
            _ => (Group::exec_gate()?, nix::libc::FAN_OPEN_EXEC_PERM),
        };
        group.mark_filesystem(File::open(&container.merged)?.as_fd(), events)?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(AtomicU64::new(0));
        let (asked_to_stop, count) = (Arc::clone(&stop), Arc::clone(&seen));
        let thread = thread::spawn(move || {
            let _ = rustix::process::setpriority_process(None, -10);
            let mut buffer = Buffer::new();
            while !asked_to_stop.load(Ordering::Relaxed) {
                let fd = nix::poll::PollFd::new(group.as_fd(), nix::poll::PollFlags::POLLIN);
                if nix::poll::poll(&mut [fd], 50_u16) != Ok(1) {
                    continue;
                }
                for incoming in group.read(&mut buffer, 4096).unwrap_or_default() {
                    if let Incoming::Permission(permission) = incoming {
                        let _ = permission.answer(Answer::Allow);
                    }
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Responder { stop, seen, thread })
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        self.seen.load(Ordering::Relaxed)
    }
}

/// driftd's own watchers, and a thread that takes what they report.
struct Driftd {
    watch: Watch,
    health: Arc<Health>,
    drain: thread::JoinHandle<()>,
}

impl Driftd {
    fn start(container: &Container, gate: Gate, is_enforcing: bool) -> anyhow::Result<Driftd> {
        let health = Arc::new(Health::default());
        let (reports, received) = crossbeam_channel::bounded(16_384);
        let settings = config::Watch { gate, ..config::Watch::default() };
        let program = Path::new(env!("CARGO_BIN_EXE_driftd"));
        let process = driftd::gate::Gate::start(program, watch::shards(gate))?;
        let watch = Watch::start(&settings, reports, Arc::clone(&health), process)?;
        let id = ContainerId::new("bench", "watched");
        watch.commands().send(watch::SensorCommand::Attach {
            container: id.clone(),
            pid: container.init,
            rootfs: Some(container.directories.clone()),
        })?;
        // As after a recording: nothing in the layers is newer than this.
        let lower = &container.directories.lowerdirs[0];
        let newest = fs::metadata(lower.join("program"))?.ctime() + 1;
        let trust = watch::Trust::UpTo(FileTime { seconds: newest, nanoseconds: 0 });
        watch.commands().send(watch::SensorCommand::Trust { container: id.clone(), trust })?;
        if is_enforcing {
            let undecided = watch::Undecided { after: Duration::from_secs(1), deny: false };
            let container = id.clone();
            let command = watch::SensorCommand::Enforce { container, undecided: Some(undecided) };
            watch.commands().send(command)?;
            // No rule denies anything: what counts is how long a decision takes.
            let (questions, decisions) = watch.questions();
            thread::spawn(move || {
                for question in questions {
                    decisions.decide(question.number, watch::Decision::Allow);
                }
            });
        }
        watch.commands().send(watch::SensorCommand::Scan { container: id, ticket: Some(1) })?;
        loop {
            match *received.recv_timeout(Duration::from_secs(10)).context("not attached")? {
                SensorEvent::Scanned { ticket: Some(1), .. } => break,
                SensorEvent::NotAttached { reason, .. } => anyhow::bail!("not attached: {reason}"),
                _ => (),
            }
        }
        let drain = thread::spawn(move || while received.recv().is_ok() {});
        Ok(Driftd { watch, health, drain })
    }

    fn stop(self) {
        self.watch.stop();
        let _ = self.drain.join();
    }
}
