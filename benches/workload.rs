//! What driftd costs the containers beside it, and itself: the real daemon, a real
//! containerd, and pairs of containers of one image. driftd watches one of each pair and
//! leaves the other alone. Rounds alternate, so that other work of the machine affects both;
//! a ratio is the median of the rounds' ratios.
//!
//! Needs root, containerd, `ctr`, runc and gcc (`scripts/setup`).
//! `DRIFTD_BENCH_QUICK` makes everything small: to see that it runs.

#![allow(clippy::print_stdout)]

#[path = "../tests/node/cri.rs"]
#[allow(dead_code)]
mod cri;
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
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};

use image::Layer;
use node::{Container, Node, Setup};

const IMAGE: &str = "registry.bench/workload:1";

/// The work of a container, timed inside it by the clock that all share.
const WORKER: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    long long x = *(const long long *)a, y = *(const long long *)b;
    return (x > y) - (x < y);
}

static int spawn(const char *path)
{
    pid_t pid;
    char *argv[] = { (char *)path, 0 };
    char *environment[] = { 0 };
    int status;
    if (posix_spawn(&pid, path, 0, 0, argv, environment))
        return 1;
    return waitpid(pid, &status, 0) != pid || status;
}

int main(int argc, char **argv)
{
    static char block[1 << 20], program[1 << 16];
    if (argc < 4)
        return 2;
    int count = atoi(argv[3]);
    long long *times = calloc(count + 1, sizeof *times), began = now(CLOCK_MONOTONIC);
    char path[256];
    int fd, size = 0;
    if (!strcmp(argv[1], "drop")) {
        fd = open("/app/tiny", O_RDONLY);
        size = read(fd, program, sizeof program - 64);
        close(fd);
    }
    for (int i = 0; i < count; i++) {
        long long start = now(CLOCK_MONOTONIC);
        snprintf(path, sizeof path, "%s/f%d", argv[2], i);
        if (!strcmp(argv[1], "create")) {
            if ((fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0644)) < 0 ||
                write(fd, block, 2048) != 2048 || close(fd))
                return 1;
        } else if (!strcmp(argv[1], "read")) {
            if ((fd = open(path, O_RDONLY)) < 0 || read(fd, block, 2048) != 2048 || close(fd))
                return 1;
        } else if (!strcmp(argv[1], "write")) {
            if (!i && (size = open(argv[2], O_CREAT | O_WRONLY | O_TRUNC, 0644)) < 0)
                return 1;
            if (write(size, block, sizeof block) != sizeof block)
                return 1;
        } else if (!strcmp(argv[1], "spawn")) {
            if (spawn(argv[2]))
                return 1;
        } else if (!strcmp(argv[1], "drop")) {
            int length = size + sprintf(program + size, "%d", i);
            if ((fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0755)) < 0 ||
                write(fd, program, length) != length || close(fd))
                return 1;
            long long at = now(CLOCK_REALTIME);
            if (spawn(path) || unlink(path))
                return 1;
            printf("%s %lld\n", path, at);
            if (argc > 4)
                usleep(1000 * atoi(argv[4]));
        }
        times[i] = now(CLOCK_MONOTONIC) - start;
    }
    long long took = now(CLOCK_MONOTONIC) - began;
    qsort(times, count, sizeof *times, compare);
    if (strcmp(argv[1], "drop"))
        printf("%lld %lld %lld\n", times[count / 2], times[count - 1], took);
    return 0;
}
"#;

/// How much of everything.
struct Size {
    files: usize,
    mebibytes: usize,
    execs: usize,
    rounds: usize,
    many: [usize; 3],
    dropped: usize,
    one_by_one: usize,
    idle: Duration,
}

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only asks whether it can be built.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    ensure!(nix::unistd::geteuid().is_root(), "not root (run: make bench)");
    let size = match std::env::var_os("DRIFTD_BENCH_QUICK") {
        None => Size {
            files: 20_000,
            mebibytes: 1024,
            execs: 2_000,
            rounds: 7,
            many: [1, 10, 50],
            dropped: 1000,
            one_by_one: 200,
            idle: Duration::from_secs(30),
        },
        Some(_) => Size {
            files: 2_000,
            mebibytes: 64,
            execs: 300,
            rounds: 3,
            many: [1, 3, 6],
            dropped: 200,
            one_by_one: 50,
            idle: Duration::from_secs(10),
        },
    };
    let outcome = run(&size);
    node::tear_down_everything();
    node::remove_bench();
    outcome
}

fn run(size: &Size) -> anyhow::Result<()> {
    let node = Node::with_containerd(Setup { unwatched: Some(UNWATCHED), ..Setup::default() })?;
    write_image(&node)?;
    node.start_driftd()?;
    let watched = node.container_of(IMAGE)?;
    let unwatched = node.unwatched_container_in(UNWATCHED, IMAGE)?;
    idle(&node, size, 1)?;

    let tar = small_files(&node, size.files)?;
    for container in [&watched, &unwatched] {
        fs::hard_link(&tar, container.laid("small.tar"))?;
    }
    let pair = Pair { watched: &watched, unwatched: &unwatched, rounds: size.rounds };
    let files = size.files;
    println!("\n{:<44} {:>12} {:>12} {:>8}", "inside one container", "alone", "watched", "ratio");
    pair.compare(&format!("untar of {files} files, ms"), 1e6, |container| {
        let began = Instant::now();
        container.begin("mkdir /tmp/u; tar xf /.control/small.tar -C /tmp/u")?.finish(PATIENCE)?;
        let took = began.elapsed();
        container.begin("rm -rf /tmp/u")?.finish(PATIENCE)?;
        Ok(took.as_nanos() as f64)
    })?;
    pair.compare("create+write+close of 2 KiB, µs", 1e3, |container| {
        let took =
            worker(container, &format!("mkdir -p /tmp/c; /app/worker create /tmp/c {files}"))?;
        Ok(took.median)
    })?;
    pair.compare("open+read+close of 2 KiB, µs", 1e3, |container| {
        Ok(worker(container, &format!("/app/worker read /tmp/c {files}"))?.median)
    })?;
    pair.compare("the same of an image's file, µs", 1e3, |container| {
        Ok(worker(container, "/app/worker read /files 500")?.median)
    })?;
    let mebibytes = size.mebibytes;
    pair.compare(&format!("sequential write of {mebibytes} MiB, ms"), 1e6, |container| {
        let took = worker(container, &format!("/app/worker write /tmp/large {mebibytes}"))?.total;
        container.begin("rm /tmp/large; rm -rf /tmp/c")?.finish(PATIENCE)?;
        worker(container, &format!("mkdir -p /tmp/c; /app/worker create /tmp/c {files}"))?;
        Ok(took)
    })?;
    let execs = size.execs;
    pair.compare("spawn and wait of an image's program, µs", 1e3, |container| {
        Ok(worker(container, &format!("/app/worker spawn /app/tiny {execs}"))?.median)
    })?;
    pair.compare("  the slowest of these, µs", 1e3, |container| {
        Ok(worker(container, &format!("/app/worker spawn /app/tiny {execs}"))?.worst)
    })?;
    reported(&node, &watched, size)?;
    stress(&node, size, (watched, unwatched))?;
    let status = node.status()?;
    println!("\nlosses: {}", status["losses"]);
    Ok(())
}

/// containerd's namespace that driftd leaves alone.
const UNWATCHED: &str = "left-alone";

const PATIENCE: Duration = Duration::from_secs(600);

fn write_image(node: &Node) -> anyhow::Result<()> {
    let compile = |name: &str, source: &str| -> anyhow::Result<Vec<u8>> {
        let (file, program) = (node.path(&format!("{name}.c")), node.path(name));
        fs::write(&file, source)?;
        let status = Command::new("gcc")
            .args(["-static", "-Os", "-s", "-w", "-o"])
            .arg(&program)
            .arg(&file)
            .status()
            .context("cannot run gcc (run: make setup)")?;
        ensure!(status.success(), "gcc -static failed (run: make setup)");
        Ok(fs::read(program)?)
    };
    let mut layer = Layer::new();
    for directory in
        ["/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/app", "/.control", "/files"]
    {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer.directory("/tmp", 0o1777);
    layer = layer.file("/bin/busybox", 0o755, &fs::read(programs::find("busybox")?)?);
    for applet in ["sh", "tar", "rm", "mkdir", "sleep"] {
        layer = layer.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    layer = layer.file("/app/worker", 0o755, &compile("worker", WORKER)?);
    layer = layer.file("/app/tiny", 0o755, &programs::tiny_program());
    for number in 0..500 {
        layer = layer.file(format!("/files/f{number}"), 0o644, &[b'x'; 2048]);
    }
    let file = node.path("image.tar");
    image::write(&file, IMAGE, vec![layer])?;
    node.import(&file)?;
    node.ctr_in(UNWATCHED, &["images", "import", &file.to_string_lossy()]).map(drop)
}

fn small_files(node: &Node, count: usize) -> anyhow::Result<PathBuf> {
    let file = node.path("small.tar");
    let mut archive = tar::Builder::new(fs::File::create(&file)?);
    let content = [b'x'; 1024];
    for number in 0..count {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, format!("{}/{number}", number / 500), &content[..])?;
    }
    archive.into_inner()?.sync_all()?;
    Ok(file)
}

// ---- pairs

struct Pair<'a> {
    watched: &'a Container<'a>,
    unwatched: &'a Container<'a>,
    rounds: usize,
}

impl Pair<'_> {
    /// `measure` returns nanoseconds; a row shows them in `unit`s.
    fn compare(
        &self,
        what: &str,
        unit: f64,
        mut measure: impl FnMut(&Container<'_>) -> anyhow::Result<f64>,
    ) -> anyhow::Result<()> {
        let (mut alone, mut with) = (Vec::new(), Vec::new());
        // The first round only fills caches.
        for round in 0..=self.rounds {
            let mut both = [0.0; 2];
            for turn in 0..2 {
                let which = (round + turn) % 2;
                both[which] = measure([self.unwatched, self.watched][which])?;
            }
            if round > 0 {
                alone.push(both[0]);
                with.push(both[1]);
            }
        }
        row(what, unit, &alone, &with);
        Ok(())
    }
}

fn row(what: &str, unit: f64, alone: &[f64], with: &[f64]) {
    let ratios: Vec<f64> = with.iter().zip(alone).map(|(with, alone)| with / alone).collect();
    println!(
        "{what:<44} {:>12.1} {:>12.1} {:>7.3}x  [{:.2}–{:.2}]",
        median(alone) / unit,
        median(with) / unit,
        median(&ratios),
        ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratios.iter().copied().fold(0.0, f64::max),
    );
}

fn median(series: &[f64]) -> f64 {
    let mut sorted = series.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

struct Took {
    median: f64,
    worst: f64,
    total: f64,
}

fn worker(container: &Container<'_>, commands: &str) -> anyhow::Result<Took> {
    took(&container.begin(&format!("set -e\n{commands}"))?.finish(PATIENCE)?)
}

fn took(ran: &node::Ran) -> anyhow::Result<Took> {
    ensure!(ran.status == 0, "the worker failed: {ran:?}");
    let numbers: Vec<f64> =
        ran.output.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [median, worst, total] = numbers[..] else { anyhow::bail!("no numbers in {ran:?}") };
    Ok(Took { median, worst, total })
}

// ---- from the execution to the stream

/// How long after the start of a dropped program its finding is on the API's stream: one by one,
/// with pauses in which all is stored, and as fast as they can.
fn reported(node: &Node, container: &Container<'_>, size: &Size) -> anyhow::Result<()> {
    latencies(node, container, ("/app", size.one_by_one, "200"))?;
    latencies(node, container, ("/tmp", size.dropped, "0"))
}

fn latencies(
    node: &Node,
    container: &Container<'_>,
    (directory, count, pause): (&str, usize, &str),
) -> anyhow::Result<()> {
    let mut follower = node
        .driftd_command(&["findings", "--follow", "-o", "jsonl", "--kind", "exec.new"])
        .stdout(Stdio::piped())
        .spawn()?;
    let lines = BufReader::new(follower.stdout.take().context("stdout is piped")?).lines();
    let (send, received) = mpsc::channel();
    let reading = thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            if send.send((at, line)).is_err() {
                return;
            }
        }
    });
    // It follows when it has read the first one.
    container.begin("/app/worker drop /run 1")?.finish(PATIENCE)?;
    received.recv_timeout(Duration::from_secs(60)).context("the stream is silent")?;
    let cpu = processor_time(node)?;
    let drops = format!("/app/worker drop {directory} {count} {pause}");
    let ran = container.begin(&drops)?.finish(PATIENCE)?;
    ensure!(ran.status == 0, "{ran:?}");
    let mut started: HashMap<&str, f64> = HashMap::new();
    for line in ran.output.lines() {
        let (path, at) = line.split_once(' ').context("no time")?;
        started.insert(path, at.parse()?);
    }
    let mut latencies = Vec::new();
    while latencies.len() < count {
        let Ok((at, line)) = received.recv_timeout(Duration::from_secs(20)) else { break };
        let finding: serde_json::Value = serde_json::from_str(&line)?;
        let path = finding["file"]["path"].as_str().unwrap_or_default();
        // A finding is revised when its file is removed; the first revision counts.
        if let Some(began) = started.remove(path) {
            latencies.push((at.as_nanos() as f64 - began) / 1e6);
        }
    }
    let cpu = processor_time(node)?.saturating_sub(cpu);
    let _ = follower.kill();
    let _ = follower.wait();
    drop(received);
    let _ = reading.join();
    latencies.sort_by(f64::total_cmp);
    let at = |percent: usize| {
        latencies
            .get((latencies.len() * percent / 100).min(latencies.len().saturating_sub(1)))
            .copied()
            .unwrap_or(f64::NAN)
    };
    println!(
        "\n{count} dropped programs, {pause} ms apart, gone at once: {} reported; from spawn to the API stream p50 {:.2} ms, \
         p90 {:.2} ms, p99 {:.2} ms; the daemon's processor time {:.0} µs each",
        latencies.len(),
        at(50),
        at(90),
        at(99),
        cpu.as_secs_f64() * 1e6 / count as f64,
    );
    ensure!(
        latencies.len() == count,
        "not all were reported: {:?}",
        started.keys().take(5).collect::<Vec<_>>()
    );
    Ok(())
}

// ---- many containers

fn stress<'a>(
    node: &'a Node,
    size: &Size,
    (watched, unwatched): (Container<'a>, Container<'a>),
) -> anyhow::Result<()> {
    let (mut watched, mut unwatched) = (vec![watched], vec![unwatched]);
    println!(
        "\n{:<44} {:>12} {:>12} {:>8}",
        "execs of all containers at once, µs each", "alone", "watched", "ratio"
    );
    for many in size.many {
        while watched.len() < many {
            watched.push(node.unwatched_container_of(IMAGE)?);
            unwatched.push(node.unwatched_container_in(UNWATCHED, IMAGE)?);
        }
        for container in &watched {
            container.wait_until_watched()?;
        }
        let (mut alone, mut with) = (Vec::new(), Vec::new());
        let each = (size.execs / many).max(20);
        for round in 0..=size.rounds {
            let mut both = [0.0; 2];
            for turn in 0..2 {
                let which = (round + turn) % 2;
                both[which] = at_once(if which == 0 { &unwatched } else { &watched }, each)?;
            }
            if round > 0 {
                alone.push(both[0]);
                with.push(both[1]);
            }
        }
        row(&format!("{many} containers"), 1e3, &alone, &with);
    }
    idle(node, size, watched.len())
}

/// Nanoseconds for each execution while all containers execute.
fn at_once(containers: &[Container<'_>], each: usize) -> anyhow::Result<f64> {
    let began = Instant::now();
    let running = containers
        .iter()
        .map(|container| container.begin(&format!("/app/worker spawn /app/tiny {each}")))
        .collect::<anyhow::Result<Vec<_>>>()?;
    for running in running {
        took(&running.finish(PATIENCE)?)?;
    }
    Ok(began.elapsed().as_nanos() as f64 / (containers.len() * each) as f64)
}

/// Memory and processor time of the daemon and its guardian while nothing happens.
fn idle(node: &Node, size: &Size, containers: usize) -> anyhow::Result<()> {
    // Recording and scanning must have ended.
    thread::sleep(Duration::from_secs(5));
    let before = processor_time(node)?;
    let began = Instant::now();
    thread::sleep(size.idle);
    let share = (processor_time(node)? - before).as_secs_f64() / began.elapsed().as_secs_f64();
    let pids = daemon_and_guardian(node)?;
    let of = |name: &str, what: &str| -> anyhow::Result<f64> {
        pids.iter().map(|pid| memory(*pid, name, what)).sum()
    };
    println!(
        "idle with {containers} containers: RSS {:.1} MB (anonymous {:.1}), PSS {:.1} MB, processor {:.2} %",
        memory(pids[0], "status", "VmRSS:")?,
        memory(pids[0], "status", "RssAnon:")?,
        of("smaps_rollup", "Pss:")?,
        share * 100.0,
    );
    Ok(())
}

/// The daemon first.
fn daemon_and_guardian(node: &Node) -> anyhow::Result<Vec<i32>> {
    let daemon = node.driftd_pid()?.as_raw();
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
    let mut pids = vec![daemon];
    pids.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    Ok(pids)
}

fn memory(pid: i32, file: &str, name: &str) -> anyhow::Result<f64> {
    let text = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join(file))?;
    let kibibytes: f64 = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("no {name} in /proc/{pid}/{file}"))?;
    Ok(kibibytes * 1024.0 / 1e6)
}

/// The processor time of all threads, as the scheduler counts it, to the nanosecond.
fn processor_time(node: &Node) -> anyhow::Result<Duration> {
    let mut total = 0;
    for pid in daemon_and_guardian(node)? {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let text = fs::read_to_string(thread?.path().join("schedstat"))?;
            total += text.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(total))
}
