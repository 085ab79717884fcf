//! What a container that attacks driftd costs the container beside it: how long the
//! neighbour's executions take, and how late its findings come.
//!
//! Each attack is made by a container that driftd leaves alone, and by one that it watches.
//! The first takes as much of the machine, so the difference is driftd's. The neighbour is
//! always watched. If another build is named, both builds meet each attack in turn. An attack
//! has a bounded time: if the neighbour hangs, that is shown, and the next attack begins.
//!
//! Needs root, containerd, `ctr`, runc, gcc and /dev/fuse (`scripts/setup`).
//! `DRIFTD_PROGRAM` names another build of driftd to be measured in place of this one,
//! `DRIFTD_BENCH_AGAINST` one to be measured beside it (`make bench-against`), of any
//! version, and `DRIFTD_BENCH_AGAINST_NAME` what the table calls it.
//! `DRIFTD_BENCH_ATTACK` names the attacks to be made, separated by commas.
//! `DRIFTD_BENCH_QUICK` makes everything small: to see that it runs.

#![allow(clippy::print_stdout)]

#[path = "../tests/node/cri.rs"]
#[allow(dead_code)]
mod cri;
#[path = "../tests/node/fuse.rs"]
#[allow(dead_code)]
mod fuse;
#[path = "../tests/node/image.rs"]
#[allow(dead_code)]
mod image;
#[path = "../tests/node/node.rs"]
#[allow(dead_code)]
mod node;
#[path = "../tests/node/programs.rs"]
#[allow(dead_code)]
mod programs;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use fuse::{Answers, Fuse, MAY_MOUNT, run_from_mnt};
use image::Layer;
use node::{Container, Deaf, Node, Setup, wait_within};

const IMAGE: &str = "registry.bench/hostile:1";

/// containerd's namespace that driftd leaves alone.
const UNWATCHED: &str = "left-alone";

/// A neighbour whose execution takes longer than this hangs.
const HANGS: Duration = Duration::from_secs(20);

/// A finding that comes later than this is missing.
const LATE: Duration = Duration::from_secs(30);

/// How long anything else may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// How an attack is made.
#[derive(Clone, Copy)]
struct Attack {
    name: &'static str,
    what: &'static str,
    /// A mode of `tests/data/flood.c`, which runs in four processes, and how often each of them
    /// repeats it (0: until the end).
    flood: Option<(&'static str, u32)>,
    /// Options of `ctr run` for the attacker.
    options: &'static [&'static str],
    /// The attacker serves a filesystem that answers no process outside, and runs from it.
    has_filesystem: bool,
    has_labels: bool,
    /// How many clients follow the findings and never read.
    followers: usize,
    /// How the daemon is ended meanwhile.
    end: Option<Signal>,
}

const NOTHING: Attack = Attack {
    name: "none",
    what: "no attack",
    flood: None,
    options: &[],
    has_filesystem: false,
    has_labels: false,
    followers: 0,
    end: None,
};

const fn flood(name: &'static str, what: &'static str) -> Attack {
    Attack { name, what, flood: Some((name, 0)), ..NOTHING }
}

const ATTACKS: [Attack; 16] = [
    NOTHING,
    Attack {
        name: "fuse",
        what: "programs and scripts on a FUSE server that answers no process outside",
        options: MAY_MOUNT,
        has_filesystem: true,
        ..NOTHING
    },
    Attack {
        name: "fuse-kill",
        what: "programs on such a server, and the daemon is killed (SIGKILL)",
        options: MAY_MOUNT,
        has_filesystem: true,
        end: Some(Signal::SIGKILL),
        ..NOTHING
    },
    Attack {
        name: "stop",
        what: "large new programs, and the daemon is stopped (SIGTERM)",
        flood: Some(("large", 0)),
        end: Some(Signal::SIGTERM),
        ..NOTHING
    },
    flood("holes", "new sparse programs of 1000 MiB"),
    flood("touched", "forty such programs, touched every two seconds"),
    flood("large", "new programs of 15 MiB"),
    flood("execs", "new programs, each run once and removed"),
    flood("same", "one program of the image, again and again"),
    flood("scripts", "new scripts, each run once and removed"),
    flood("renames", "programs and directories that are renamed"),
    flood("forks", "processes that end at once"),
    flood("names", "processes that call themselves the runtime's"),
    Attack {
        options: &["--cap-add", "CAP_SYS_ADMIN"],
        ..flood("mounts", "filesystems that are mounted, run from and unmounted")
    },
    Attack {
        name: "labels",
        what: "200 labels of 4,000 bytes, and 400 new programs",
        flood: Some(("spread", 100)),
        has_labels: true,
        ..NOTHING
    },
    Attack {
        name: "followers",
        what: "3,000 new programs, and 40 followers that never read",
        flood: Some(("spread", 750)),
        followers: 40,
        ..NOTHING
    },
];

/// What the containers run, `/app/program`.
const PROGRAM: &str = include_str!("../tests/data/flood.c");

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only asks whether it can be built.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    ensure!(nix::unistd::geteuid().is_root(), "not root (run: make bench)");
    let seconds = if std::env::var_os("DRIFTD_BENCH_QUICK").is_some() { 3 } else { 8 };
    let outcome = run(seconds);
    node::tear_down_everything();
    node::remove_bench();
    outcome
}

/// A build of driftd, and which container it watches.
struct Side {
    name: String,
    program: Option<PathBuf>,
    watches_attacker: bool,
    /// The p99 of executions and of findings without an attack.
    calm: Option<(f64, f64)>,
}

fn run(seconds: u64) -> anyhow::Result<()> {
    let side = |name: &str, watches_attacker| Side {
        name: name.to_owned(),
        program: None,
        watches_attacker,
        calm: None,
    };
    let mut sides = vec![side("left alone", false), side("this build", true)];
    if let Some(program) = std::env::var_os("DRIFTD_BENCH_AGAINST") {
        let name = std::env::var("DRIFTD_BENCH_AGAINST_NAME");
        let name = name.unwrap_or_else(|_| "the other".to_owned());
        sides.insert(1, Side { program: Some(program.into()), ..side(&name, true) });
    }
    let only = std::env::var("DRIFTD_BENCH_ATTACK").ok();
    let only: Option<Vec<&str>> = only.as_deref().map(|only| only.split(',').collect());
    println!(
        "{seconds} s for each attack; a ratio compares with no attack. The row `left alone` is the \
         attack by a container that driftd does not watch\n"
    );
    println!("{:<16} {:^36}  {:^34}  {:^20}", "", "neighbour's exec", "its finding", "driftd");
    println!(
        "{:<16} {:>8} {:>9} {:>7} {:>9}  {:>8} {:>8} {:>7} {:>8}  {:>5} {:>6} {:>7}",
        "attacker is",
        "p50 µs",
        "p99 µs",
        "ratio",
        "worst ms",
        "p50 ms",
        "p99 ms",
        "ratio",
        "reported",
        "CPU %",
        "RSS MB",
        "disk MB",
    );
    let mut failed = Vec::new();
    for attack in &ATTACKS {
        let is_wanted = |only: &Vec<&str>| only.contains(&attack.name);
        // All others are compared with the first.
        if attack.name != NOTHING.name && !only.as_ref().is_none_or(is_wanted) {
            continue;
        }
        println!("\n{} ({})", attack.what, attack.name);
        for side in &mut sides {
            node::use_program(side.program.clone());
            match make(attack, seconds, side.watches_attacker) {
                Ok(met) => show(attack, side, &met),
                Err(err) => {
                    println!("{:<16} failed: {err:#}", side.name);
                    failed.push(format!("{} by {}", attack.name, side.name));
                }
            }
        }
    }
    ensure!(failed.is_empty(), "not measured: {failed:?}");
    Ok(())
}

fn show(attack: &Attack, side: &mut Side, met: &Met) {
    let (exec, finding) = (at(&met.execs, 99), at(&met.findings, 99));
    if attack.name == NOTHING.name {
        side.calm = Some((exec, finding));
    }
    let ratio = |mine: f64, calm: Option<f64>| match calm {
        Some(calm) if mine.is_finite() && calm > 0.0 => format!("{:.1}", mine / calm),
        _ => "-".to_owned(),
    };
    let milliseconds = |value: f64| match value {
        value if value.is_infinite() => format!(">{}s", LATE.as_secs()),
        value if value.is_nan() => "-".to_owned(),
        value => format!("{value:.1}"),
    };
    let execs = if met.hangs {
        format!("{:>36}", format!("hangs (> {} s)", HANGS.as_secs()))
    } else {
        format!(
            "{:>8.0} {:>9.0} {:>7} {:>9.1}",
            at(&met.execs, 50) / 1e3,
            exec / 1e3,
            ratio(exec, side.calm.map(|calm| calm.0)),
            at(&met.execs, 100) / 1e6,
        )
    };
    let reported = met.findings.iter().filter(|delay| delay.is_finite()).count();
    let reported = if met.findings.is_empty() {
        "-".to_owned()
    } else {
        format!("{reported}/{}", met.findings.len())
    };
    println!(
        "{:<16} {execs}  {:>8} {:>8} {:>7} {reported:>8}  {:>5} {:>6} {:>7.1}{}",
        side.name,
        milliseconds(at(&met.findings, 50)),
        milliseconds(finding),
        ratio(finding, side.calm.map(|calm| calm.1)),
        met.processor.map_or_else(|| "-".to_owned(), |percent| format!("{percent:.0}")),
        met.memory.map_or_else(|| "-".to_owned(), |bytes| format!("{:.0}", bytes / 1e6)),
        met.disk / 1e6,
        met.losses,
    );
}

/// What was measured of the neighbour and of driftd.
struct Met {
    /// Nanoseconds of each execution, sorted.
    execs: Vec<f64>,
    /// One of them never ended.
    hangs: bool,
    /// Milliseconds from each dropped program's execution to its finding, sorted, and
    /// infinity where none came. None at all where the daemon was ended.
    findings: Vec<f64>,
    /// driftd's processor time, in percent of one processor.
    processor: Option<f64>,
    /// The peak memory of driftd's processes, in bytes.
    memory: Option<f64>,
    /// The size of the history, in bytes.
    disk: f64,
    losses: String,
}

/// One attack beside a neighbour, on a node of its own, so that no earlier attack matters.
fn make(attack: &Attack, seconds: u64, watches_attacker: bool) -> anyhow::Result<Met> {
    let node = Node::with_containerd(Setup { unwatched: Some(UNWATCHED), ..Setup::default() })?;
    write_image(&node)?;
    node.start_driftd()?;
    let daemon = Daemon::of(&node)?;
    let calm = node.container_of(IMAGE)?;
    let labels = if attack.has_labels { labels() } else { Vec::new() };
    let options: Vec<&str> =
        attack.options.iter().copied().chain(labels.iter().map(String::as_str)).collect();
    let attacker = if watches_attacker {
        let attacker = node.run(&node.namespace, IMAGE, &options)?;
        attacker.wait_until_watched()?;
        attacker
    } else {
        node.run(UNWATCHED, IMAGE, &options)?
    };
    let mut follower = Follower::start(&node, &calm)?;
    // The attack is under way before the neighbour is measured, and outlasts it.
    let lasts = seconds + 4;
    let fuse = if attack.has_filesystem { Some(serve(&attacker)?) } else { None };
    let flooding = match attack.flood {
        Some((what, times)) => {
            Some(attacker.begin(&format!("/app/program {what} {lasts} {times}"))?)
        }
        None if attack.has_filesystem => Some(attacker.begin(&run_from_mnt(lasts))?),
        None => None,
    };
    let deaf: Vec<Deaf> =
        (0..attack.followers).map(|_| Deaf::start(&node)).collect::<anyhow::Result<_>>()?;
    thread::sleep(Duration::from_secs(2));
    let (cpu, began) = (daemon.processor_time(), Instant::now());
    let probe = calm.begin(&format!("/app/program probe {seconds}"))?;
    let mut ended = Duration::ZERO;
    if let Some(signal) = attack.end {
        thread::sleep(Duration::from_secs(seconds) / 3);
        ended = SystemTime::now().duration_since(UNIX_EPOCH)?;
        kill(daemon.0, signal)?;
    }
    let left = (Duration::from_secs(seconds) + HANGS).saturating_sub(began.elapsed());
    let ran = probe.finish(left);
    let processor = cpu.zip(daemon.processor_time()).map(|(before, after)| {
        100.0 * after.saturating_sub(before).as_secs_f64() / began.elapsed().as_secs_f64()
    });
    let memory = attack.end.is_none().then(|| daemon.memory());
    let mut met = Met {
        execs: Vec::new(),
        hangs: ran.is_err(),
        findings: Vec::new(),
        processor: processor.filter(|_| attack.end.is_none()),
        memory,
        disk: 0.0,
        losses: String::new(),
    };
    if let Ok(ran) = ran {
        ensure!(ran.status == 0, "the neighbour failed: {ran:?}");
        let mut started = HashMap::new();
        for line in ran.output.lines() {
            match line.split_once(' ').context("no time")? {
                ("exec", times) => {
                    let (took, at) = times.split_once(' ').context("no time")?;
                    // The cost while the daemon runs belongs to another row.
                    if at.parse::<u128>()? >= ended.as_nanos() {
                        met.execs.push(took.parse()?);
                    }
                }
                (path, at) => drop(started.insert(path.to_owned(), at.parse::<f64>()?)),
            }
        }
        if attack.end.is_none() {
            met.findings = follower.delays(started)?;
            met.losses = losses(&node);
        }
    } else {
        // Waiting processes are released, or the node cannot be taken down.
        daemon.kill();
    }
    met.disk = size_of_history(&node);
    // Processes that wait for the container's filesystem go on. A container runs one command
    // after the other, and unmounts the filesystem by such a command.
    if let Some(fuse) = &fuse {
        fuse.abort();
    }
    drop(deaf);
    drop(flooding.map(|flooding| flooding.finish(PATIENCE)));
    drop(fuse);
    for series in [&mut met.execs, &mut met.findings] {
        series.sort_by(f64::total_cmp);
    }
    Ok(met)
}

/// Options of `ctr run` that label a container.
fn labels() -> Vec<String> {
    let text = "x".repeat(4000);
    (0..200).flat_map(|number| ["--label".to_owned(), format!("l{number}={text}")]).collect()
}

/// A filesystem of the attacker at `/mnt`, which answers no process outside.
fn serve<'a>(attacker: &'a Container<'_>) -> anyhow::Result<Fuse<'a>> {
    attacker.lay("s", b"#!/bin/sh\nsleep 60\n")?;
    Fuse::mount(attacker, "/mnt", Answers::Own, &[("x", "/app/program"), ("s", "/.control/s")])
}

/// Reads the neighbour's findings as they come.
struct Follower {
    child: Child,
    received: Receiver<(Duration, String)>,
}

impl Follower {
    fn start(node: &Node, calm: &Container<'_>) -> anyhow::Result<Follower> {
        let mut child = node
            .driftd_command(&["findings", "--follow", "-o", "jsonl", "--container", &calm.id])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
        let (send, received) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                if send.send((at, line)).is_err() {
                    return;
                }
            }
        });
        // It follows when it has read the first one.
        calm.begin("cp /app/tiny /tmp/first; echo 1 >> /tmp/first; /tmp/first")?
            .finish(PATIENCE)?;
        received.recv_timeout(Duration::from_secs(60)).context("the stream is silent")?;
        Ok(Follower { child, received })
    }

    /// How late each program's finding came, in milliseconds.
    fn delays(&mut self, mut started: HashMap<String, f64>) -> anyhow::Result<Vec<f64>> {
        let mut delays = Vec::new();
        let until = Instant::now() + LATE;
        while !started.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            let Ok((at, line)) = self.received.recv_timeout(left) else { break };
            let finding: serde_json::Value = serde_json::from_str(&line)?;
            let path = finding["file"]["path"].as_str().unwrap_or_default();
            if finding["kind"] == "exec.new"
                && let Some(began) = started.remove(path)
            {
                delays.push((at.as_nanos() as f64 - began) / 1e6);
            }
        }
        delays.extend(started.iter().map(|_| f64::INFINITY));
        Ok(delays)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn at(sorted: &[f64], percent: usize) -> f64 {
    let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

fn write_image(node: &Node) -> anyhow::Result<()> {
    let program = programs::compile(&node.path(""), "program", PROGRAM)?;
    let mut layer = Layer::new();
    for directory in ["/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/app", "/mnt"] {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer.directory("/usr", 0o755).directory("/usr/bin", 0o755);
    layer = layer.directory("/.control", 0o755).directory("/tmp", 0o1777);
    layer = layer.file("/bin/busybox", 0o755, &fs::read(programs::find("busybox")?)?);
    for applet in ["sh", "cp", "echo", "ln", "mkdir", "seq", "sleep"] {
        layer = layer.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    layer = layer.file("/app/program", 0o755, &program);
    let server = programs::compile(&node.path(""), "fuse-server", programs::FUSE)?;
    layer = layer.file(programs::FUSE_SERVER, 0o755, &server);
    layer = layer.file("/app/tiny", 0o755, &programs::tiny_program());
    let file = node.path("image.tar");
    image::write(&file, IMAGE, vec![layer])?;
    node.import(&file)?;
    node.ctr_in(UNWATCHED, &["images", "import", &file.to_string_lossy()]).map(drop)
}

/// The daemon and its children, as long as they are there.
struct Daemon(Pid);

impl Daemon {
    fn of(node: &Node) -> anyhow::Result<Daemon> {
        Ok(Daemon(node.driftd_pid()?))
    }

    fn processes(&self) -> Vec<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0)).into_iter().flatten().flatten();
        let children =
            tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: String = children.collect();
        let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        children.map(Pid::from_raw).chain([self.0]).collect()
    }

    /// As the scheduler counts it, to the nanosecond.
    fn processor_time(&self) -> Option<Duration> {
        let mut total = 0;
        for pid in self.processes() {
            for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
                let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
                total += text.split(' ').next().and_then(|t| t.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Some(Duration::from_nanos(total))
    }

    /// The peak of resident memory, in bytes.
    fn memory(&self) -> f64 {
        let of = |pid: Pid| -> Option<f64> {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
            line.split_whitespace().next()?.parse::<f64>().ok().map(|kibibytes| kibibytes * 1024.0)
        };
        self.processes().into_iter().filter_map(of).sum()
    }

    fn kill(&self) {
        for pid in self.processes() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// The size of the history's files, in bytes.
fn size_of_history(node: &Node) -> f64 {
    let size = |name: &str| fs::metadata(node.path(name)).map_or(0, |file| file.len());
    (size("driftd/history.db") + size("driftd/history.db-wal")) as f64
}

/// The losses in `driftd status`, if it answers in time.
fn losses(node: &Node) -> String {
    let ask = || -> anyhow::Result<Value> {
        let mut command = node.driftd_command(&["status", "-o", "json"]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let output = child.stdout.take().context("stdout is piped")?;
        let reads = thread::spawn(move || std::io::read_to_string(output));
        let ended = wait_within(PATIENCE, "an answer", || Ok(child.try_wait()?));
        let _ = child.kill();
        let _ = child.wait();
        ended?;
        Ok(serde_json::from_str(&reads.join().ok().context("it panicked")??)?)
    };
    let Ok(status) = ask() else { return "  status does not answer".to_owned() };
    let losses = status["losses"].as_array().cloned().unwrap_or_default();
    let losses: Vec<String> =
        losses.iter().map(|loss| format!("{} {}", loss["name"], loss["count"])).collect();
    let complete = if status["complete"] == true { "" } else { "  not complete" };
    let lost = if losses.is_empty() { "" } else { "  " };
    format!("{complete}{lost}{}", losses.join(", ").replace('"', ""))
}
