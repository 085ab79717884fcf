//! What the gate costs an execution: nobody asked, the least that could be asked,
//! and driftd, in one run.
//!
//! Three overlays over the same lower directory: one is not marked, one is marked
//! by a responder of thirty lines that only says yes, one is watched by driftd's
//! own watchers. The same static program is started from each, in short blocks
//! that alternate, so that whatever else the machine does falls on all of them.
#![allow(clippy::print_stdout)] // what a bench prints is its result

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use driftd::config;
use driftd::health::Health;
use driftd::model::{ContainerId, FileTime, OverlayDirs};
use driftd::sys::fanotify::{Answer, Buffer, Group, Incoming};
use driftd::watch::{self, Report, Watch};

/// Executions in one block, and blocks of each kind.
const BLOCK: u32 = 200;
const ROUNDS: usize = 30;

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` only asks whether it can be built.
    if std::env::args().any(|argument| argument == "--test") {
        return Ok(());
    }
    ensure!(nix::unistd::geteuid().is_root(), "not root (run: make bench)");
    let scratch = tempfile::Builder::new().prefix("driftd-bench.").tempdir()?;
    let lower = scratch.path().join("lower");
    fs::create_dir(&lower)?;
    compile(&lower.join("program"))?;

    let free = Overlay::mount(scratch.path(), "free", &lower)?;
    let minimal = Overlay::mount(scratch.path(), "minimal", &lower)?;
    let watched = Overlay::mount(scratch.path(), "watched", &lower)?;
    let responder = Responder::start(&minimal)?;
    let driftd = Driftd::start(&watched)?;

    println!("posix_spawn and wait of a static program, {ROUNDS} rounds of {BLOCK} each\n");
    compare("a program of the image", &free, &minimal, &watched, "program")?;
    for overlay in [&free, &minimal, &watched] {
        let copy = overlay.merged.join("dropped");
        fs::copy(overlay.merged.join("program"), &copy)?;
        let mut bytes = fs::read(&copy)?;
        bytes.extend_from_slice(b"not in the image");
        fs::write(&copy, bytes)?;
    }
    compare("a dropped program (driftd hashes it)", &free, &minimal, &watched, "dropped")?;

    let answers = driftd.health.gate_answers.load(Ordering::Relaxed);
    let expected = 2 * ROUNDS as u64 * u64::from(BLOCK);
    ensure!(answers >= expected, "the gate answered {answers} of {expected}: a vacuous bench");
    let asked = responder.stop();
    ensure!(asked >= expected, "the responder answered {asked} of {expected}: a vacuous bench");
    println!("losses: {:?}", driftd.health.losses());
    driftd.stop();
    Ok(())
}

fn compare(
    what: &str,
    free: &Overlay,
    minimal: &Overlay,
    watched: &Overlay,
    program: &str,
) -> anyhow::Result<()> {
    let overlays = [free, minimal, watched];
    for overlay in overlays {
        block(&overlay.merged.join(program))?;
    }
    let mut times: [Vec<f64>; 3] = Default::default();
    for round in 0..ROUNDS {
        // Nobody always goes first.
        for turn in 0..overlays.len() {
            let index = (round + turn) % overlays.len();
            times[index].push(block(&overlays[index].merged.join(program))?);
        }
    }
    println!("{what}");
    let plain = median(&times[0]);
    for (name, series) in ["no mark", "minimal responder", "driftd"].iter().zip(&times) {
        let differences: Vec<f64> =
            series.iter().zip(&times[0]).map(|(one, other)| one - other).collect();
        println!(
            "  {name:<18} median {:>7.1} µs   least {:>7.1} µs   over no mark {:>+6.1} µs   x{:.3}",
            median(series),
            series.iter().copied().fold(f64::INFINITY, f64::min),
            median(&differences),
            median(series) / plain,
        );
    }
    println!();
    Ok(())
}

/// Microseconds that an execution took, in the middle of a block: a block's mean
/// would tell what else the machine was doing.
fn block(program: &Path) -> anyhow::Result<f64> {
    let mut times = Vec::with_capacity(BLOCK as usize);
    for _ in 0..BLOCK {
        let began = Instant::now();
        let status = Command::new(program).stdin(Stdio::null()).status()?;
        times.push(began.elapsed().as_secs_f64() * 1e6);
        ensure!(status.success(), "{} failed", program.display());
    }
    Ok(median(&times))
}

fn median(series: &[f64]) -> f64 {
    let mut sorted = series.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn compile(program: &Path) -> anyhow::Result<()> {
    let source = program.with_extension("c");
    fs::write(
        &source,
        "#include <unistd.h>\nint main(int argc, char **argv) { (void)argv; if (argc > 1) pause(); return 0; }\n",
    )?;
    let status = Command::new("gcc")
        .args(["-static", "-Os", "-s", "-o"])
        .arg(program)
        .arg(&source)
        .status()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(status.success(), "gcc -static failed (run: make setup)");
    Ok(fs::remove_file(source)?)
}

/// A mounted overlay, unmounted when dropped.
struct Overlay {
    merged: PathBuf,
    directories: OverlayDirs,
}

impl Overlay {
    fn mount(scratch: &Path, name: &str, lower: &Path) -> anyhow::Result<Overlay> {
        let at = |part: &str| scratch.join(format!("{name}-{part}"));
        let (upper, work, merged) = (at("upper"), at("work"), at("merged"));
        for directory in [&upper, &work, &merged] {
            fs::create_dir(directory)?;
        }
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
        let directories = OverlayDirs { upperdir: upper, lowerdirs: vec![lower.to_path_buf()] };
        Ok(Overlay { merged, directories })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.merged).status();
    }
}

/// The least that can be between a program and its start: read, say yes.
struct Responder {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<u64>,
}

impl Responder {
    fn start(overlay: &Overlay) -> anyhow::Result<Responder> {
        let group = Group::gate()?;
        let root = File::open(&overlay.merged)?;
        group.mark_filesystem(root.as_fd(), nix::libc::FAN_OPEN_EXEC_PERM)?;
        let stop = Arc::new(AtomicBool::new(false));
        let asked_to_stop = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut buffer = Buffer::new();
            let mut answers = 0;
            while !asked_to_stop.load(Ordering::Relaxed) {
                let fd = nix::poll::PollFd::new(group.as_fd(), nix::poll::PollFlags::POLLIN);
                if nix::poll::poll(&mut [fd], 250_u16) != Ok(1) {
                    continue;
                }
                for incoming in group.read(&mut buffer, 64 * 1024).unwrap_or_default() {
                    if let Incoming::Permission(permission) = incoming {
                        let _ = permission.answer(Answer::Allow);
                        answers += 1;
                    }
                }
            }
            answers
        });
        Ok(Responder { stop, thread })
    }

    fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or(0)
    }
}

/// driftd's own watchers, and somebody who takes what they report.
struct Driftd {
    watch: Watch,
    health: Arc<Health>,
    drain: thread::JoinHandle<()>,
    init: Child,
}

impl Driftd {
    fn start(overlay: &Overlay) -> anyhow::Result<Driftd> {
        // The watchers find a container's overlay through its init's root.
        let init = Command::new("chroot")
            .arg(&overlay.merged)
            .args(["/program", "wait"])
            .stdin(Stdio::null())
            .spawn()
            .context("cannot run chroot")?;
        let root = PathBuf::from(format!("/proc/{}/root", init.id()));
        while fs::read_link(&root).is_ok_and(|root| root != overlay.merged) {
            thread::sleep(Duration::from_millis(1));
        }

        let health = Arc::new(Health::default());
        let (reports, received) = crossbeam_channel::bounded(16_384);
        let watch = Watch::start(&config::Watch::default(), reports, Arc::clone(&health), None)?;
        let container = ContainerId::new("bench", "watched");
        watch.commands().send(watch::Command::Attach {
            container: container.clone(),
            pid: init.id(),
            rootfs: Some(overlay.directories.clone()),
        })?;
        // As after a recording: nothing in the layers is newer than this.
        let program = fs::metadata(overlay.directories.lowerdirs[0].join("program"))?;
        let time =
            FileTime { seconds: program.ctime(), nanoseconds: program.ctime_nsec().try_into()? };
        let trust = watch::Trust::UpTo(time);
        watch.commands().send(watch::Command::Trust { container, trust })?;
        loop {
            match received.recv_timeout(Duration::from_secs(10)).context("not attached")? {
                Report::Attached { .. } => break,
                Report::NotAttached { reason, .. } => anyhow::bail!("not attached: {reason}"),
                _ => (),
            }
        }
        let drain = thread::spawn(move || while received.recv().is_ok() {});
        Ok(Driftd { watch, health, drain, init })
    }

    fn stop(mut self) {
        self.watch.stop();
        let _ = self.drain.join();
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}
