//! What a container that floods driftd costs the container beside it: how long the
//! neighbour's executions take, and how late its findings come.
//!
//! Each flood is played twice: from a container that driftd watches, and from one that
//! it leaves alone. The second takes as much of the machine, so the difference is
//! driftd's. The neighbour is always watched.
//!
//! Needs root, containerd, `ctr`, runc and gcc (`scripts/setup`).
//! `DRIFTD_PROGRAM` names another build of driftd to be measured, of any version.
//! `DRIFTD_BENCH_FLOOD` names the one flood to be played (`holes`, `scripts`, …).
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
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, ensure};

use image::Layer;
use node::{Container, Node, Setup};

const IMAGE: &str = "registry.bench/hostile:1";

/// containerd's namespace that driftd leaves alone.
const UNWATCHED: &str = "left-alone";

const PATIENCE: Duration = Duration::from_secs(120);

/// The floods, by the names that the program below knows.
const FLOODS: [(&str, &str); 6] = [
    ("nothing", "nobody floods"),
    ("holes", "programs of 1000 MiB that are holes"),
    ("execs", "new programs"),
    ("scripts", "new scripts"),
    ("renames", "programs and directories that are renamed"),
    ("forks", "processes that end at once"),
];

/// `probe SECONDS` is the neighbour: it executes a program of its image, and a dropped
/// one ten times a second. The floods last as many seconds, in four processes each.
const PROGRAM: &str = r##"
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

static char tiny[1 << 16];
static int tiny_size;

/// Writes a program that is like no other.
static int drop(const char *path, int number, long long length)
{
    char mark[64];
    int size = sprintf(mark, "%d %d", getpid(), number);
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0755);
    if (fd < 0 || write(fd, tiny, tiny_size) != tiny_size || write(fd, mark, size) != size)
        return 1;
    if (length && ftruncate(fd, length))
        return 1;
    return close(fd);
}

static void flood(const char *what, int who, long long until)
{
    char path[256], other[256];
    snprintf(path, sizeof path, "/tmp/%d", who);
    mkdir(path, 0755);
    for (int i = 0; now(CLOCK_MONOTONIC) < until; i++) {
        snprintf(path, sizeof path, "/tmp/%d/%d", who, i % 64);
        snprintf(other, sizeof other, "/tmp/%d/other%d", who, i % 64);
        if (!strcmp(what, "holes")) {
            if (!drop(path, i, 1000LL << 20))
                spawn(path);
        } else if (!strcmp(what, "execs")) {
            if (!drop(path, i, 0))
                spawn(path);
            unlink(path);
        } else if (!strcmp(what, "scripts")) {
            int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0755);
            dprintf(fd, "#!/app/tiny\n%d %d\n", who, i);
            close(fd);
            spawn(path);
            unlink(path);
        } else if (!strcmp(what, "renames")) {
            if (i < 64)
                drop(path, i, 0);
            rename(path, other);
            rename(other, path);
            snprintf(path, sizeof path, "/tmp/%d/directory", who);
            mkdir(path, 0755);
            rename(path, other);
            rmdir(other);
        } else {
            pid_t child = fork();
            if (!child)
                _exit(0);
            waitpid(child, 0, 0);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    long long until = now(CLOCK_MONOTONIC) + atoi(argv[2]) * 1000000000LL;
    int fd = open("/app/tiny", O_RDONLY);
    tiny_size = read(fd, tiny, sizeof tiny);
    close(fd);
    if (strcmp(argv[1], "probe")) {
        for (int who = 0; strcmp(argv[1], "nothing") && who < 4; who++)
            if (!fork()) {
                flood(argv[1], who, until);
                _exit(0);
            }
        while (wait(0) > 0)
            ;
        return 0;
    }
    long long next = 0;
    for (int i = 0; now(CLOCK_MONOTONIC) < until; i++) {
        long long began = now(CLOCK_MONOTONIC);
        if (spawn("/app/tiny"))
            return 1;
        long long ended = now(CLOCK_MONOTONIC);
        printf("exec %lld\n", ended - began);
        if (ended >= next) {
            char path[64];
            snprintf(path, sizeof path, "/tmp/probe%d", i);
            if (drop(path, i, 0))
                return 1;
            printf("%s %lld\n", path, now(CLOCK_REALTIME));
            if (spawn(path))
                return 1;
            next = ended + 100000000;
        }
        usleep(2000);
    }
    return 0;
}
"##;

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only asks whether it can be built.
    if !std::env::args().any(|argument| argument == "--bench") {
        return Ok(());
    }
    ensure!(nix::unistd::geteuid().is_root(), "not root (run: make bench)");
    let seconds = if std::env::var_os("DRIFTD_BENCH_QUICK").is_some() { 3 } else { 15 };
    let outcome = run(seconds);
    node::tear_down_everything();
    node::remove_bench();
    outcome
}

fn run(seconds: u64) -> anyhow::Result<()> {
    println!("{seconds} s of each flood; the neighbour's executions, and its findings");
    println!(
        "{:<42} {:>8} {:>8}   {:>8} {:>8} {:>9} {:>9} {:>6} {:>6}",
        "", "p50 µs", "p99 µs", "p50 µs", "p99 µs", "p50 ms", "p99 ms", "told", "CPU %"
    );
    println!(
        "{:<42} {:>17}   {:>17} {:>19}",
        "flood", "exec, unwatched", "exec, watched", "finding, watched"
    );
    let only = std::env::var("DRIFTD_BENCH_FLOOD").ok();
    for (flood, what) in FLOODS {
        if only.as_deref().is_some_and(|only| only != flood) {
            continue;
        }
        let alone = play(flood, seconds, Flooder::Unwatched)?;
        let with = play(flood, seconds, Flooder::Watched)?;
        println!(
            "{what:<42} {:>8.0} {:>8.0}   {:>8.0} {:>8.0} {:>9.1} {:>9.1} {:>6} {:>6.0}{}",
            at(&alone.execs, 50) / 1e3,
            at(&alone.execs, 99) / 1e3,
            at(&with.execs, 50) / 1e3,
            at(&with.execs, 99) / 1e3,
            at(&with.findings, 50),
            at(&with.findings, 99),
            format!("{}/{}", with.findings.len(), with.dropped),
            with.processor,
            with.losses,
        );
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Flooder {
    Watched,
    Unwatched,
}

/// What the neighbour has met.
struct Met {
    /// Nanoseconds of each execution, sorted.
    execs: Vec<f64>,
    /// Milliseconds from each dropped program's execution to its finding, sorted.
    findings: Vec<f64>,
    dropped: usize,
    /// Of driftd, in percent of one.
    processor: f64,
    losses: String,
}

/// One flood beside a neighbour, on a node of its own: nothing is left of others.
fn play(flood: &str, seconds: u64, flooder: Flooder) -> anyhow::Result<Met> {
    let node = Node::with_containerd(Setup { unwatched: Some(UNWATCHED), ..Setup::default() })?;
    write_image(&node)?;
    node.start_driftd()?;
    let calm = node.container_of(IMAGE)?;
    let noisy = match flooder {
        Flooder::Watched => node.container_of(IMAGE)?,
        Flooder::Unwatched => node.unwatched_container_in(UNWATCHED, IMAGE)?,
    };
    let mut follower = Follower::start(&node, &calm)?;
    // The flood is under way before the neighbour is looked at, and outlasts it.
    let flooding = noisy.begin(&format!("/app/program {flood} {}", seconds + 4))?;
    thread::sleep(Duration::from_secs(2));
    let (cpu, began) = (processor_time(&node)?, Instant::now());
    let ran = calm.begin(&format!("/app/program probe {seconds}"))?.finish(PATIENCE)?;
    ensure!(ran.status == 0, "the neighbour failed: {ran:?}");
    let used = processor_time(&node)?.saturating_sub(cpu);
    let processor = 100.0 * used.as_secs_f64() / began.elapsed().as_secs_f64();
    let mut execs = Vec::new();
    let mut started = HashMap::new();
    for line in ran.output.lines() {
        match line.split_once(' ').context("no time")? {
            ("exec", took) => execs.push(took.parse()?),
            (path, at) => drop(started.insert(path.to_owned(), at.parse::<f64>()?)),
        }
    }
    let dropped = started.len();
    let mut findings = follower.delays(started)?;
    flooding.finish(PATIENCE)?;
    for series in [&mut execs, &mut findings] {
        series.sort_by(f64::total_cmp);
    }
    let status = node.status()?;
    let losses = match status["losses"].as_array() {
        Some(losses) if !losses.is_empty() => {
            let losses = losses.iter().map(|loss| format!("{} {}", loss["name"], loss["count"]));
            format!("  {}", losses.collect::<Vec<_>>().join(", ").replace('"', ""))
        }
        _ => String::new(),
    };
    Ok(Met { execs, findings, dropped, processor, losses })
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

    /// How late each program's finding came, in milliseconds, as far as it came.
    fn delays(&mut self, mut started: HashMap<String, f64>) -> anyhow::Result<Vec<f64>> {
        let mut delays = Vec::new();
        let until = Instant::now() + Duration::from_secs(60);
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
    let (source, program) = (node.path("program.c"), node.path("program"));
    fs::write(&source, PROGRAM)?;
    let status = Command::new("gcc")
        .args(["-static", "-Os", "-s", "-w", "-o"])
        .arg(&program)
        .arg(&source)
        .status()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(status.success(), "gcc -static failed (run: make setup)");
    let mut layer = Layer::new();
    for directory in ["/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/app", "/.control"] {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer.directory("/tmp", 0o1777);
    layer = layer.file("/bin/busybox", 0o755, &fs::read(programs::find("busybox")?)?);
    for applet in ["sh", "cp", "echo", "sleep"] {
        layer = layer.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    layer = layer.file("/app/program", 0o755, &fs::read(&program)?);
    layer = layer.file("/app/tiny", 0o755, &programs::tiny_program());
    let file = node.path("image.tar");
    image::write(&file, IMAGE, vec![layer])?;
    node.import(&file)?;
    node.ctr_in(UNWATCHED, &["images", "import", &file.to_string_lossy()]).map(drop)
}

/// Of the daemon and its children, to the nanosecond: what the scheduler has counted.
fn processor_time(node: &Node) -> anyhow::Result<Duration> {
    let daemon = node.driftd_pid()?.as_raw();
    let children = fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
    let children = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
    let mut total = 0;
    for pid in children.chain([daemon]) {
        for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
            let Ok(text) = fs::read_to_string(thread?.path().join("schedstat")) else { continue };
            total += text.split(' ').next().and_then(|time| time.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(Duration::from_nanos(total))
}
