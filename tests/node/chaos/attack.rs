//! Containers that attack driftd, beside those that are compared with the truth.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nix::sys::signal::{Signal, kill};

use super::{IMAGE, PATIENCE, Random, Stage, truth::Sight};
use crate::fuse::{Answers, Fuse, MAY_MOUNT, run_from_mnt};
use crate::gate::{Processes, is_there};
use crate::node::{Container, Deaf, Node, lock, wait_within};

/// What the attacking containers run, `/app/flood`.
pub(super) const FLOOD: &str = include_str!("../../data/flood.c");

/// What an attacker does, and whether driftd must report it.
#[derive(Clone, Copy, Debug)]
enum Attack {
    /// A mode of `tests/data/flood.c`, and how often each of its processes does it.
    Flood { what: &'static str, times: u32, is_drift: bool },
    /// Mounts a filesystem that answers no process outside, and runs from it.
    Filesystem,
    /// Many findings, and clients that follow them and never read.
    Followers,
}

const fn drift(what: &'static str) -> Attack {
    Attack::Flood { what, times: 0, is_drift: true }
}

const fn no_drift(what: &'static str) -> Attack {
    Attack::Flood { what, times: 0, is_drift: false }
}

const ATTACKS: &[Attack] = &[
    drift("holes"),
    drift("touched"),
    drift("large"),
    drift("execs"),
    drift("scripts"),
    drift("mounts"),
    // They are in directories of their own, and become as many findings.
    Attack::Flood { what: "spread", times: 100, is_drift: true },
    no_drift("same"),
    no_drift("forks"),
    no_drift("names"),
    no_drift("renames"),
    Attack::Filesystem,
    Attack::Followers,
];

const FOLLOWERS: usize = 10;

/// Lets one container after the other attack until the run ends. Each attack comes once before
/// one comes again. `CHAOS_ATTACK` selects a single one.
pub(super) fn attack(stage: &Stage<'_>, mut random: Random) -> anyhow::Result<()> {
    let only = std::env::var("CHAOS_ATTACK").ok();
    let is_wanted = |attack: &Attack| match (&only, attack) {
        (None, _) => true,
        (Some(only), Attack::Flood { what, .. }) => only == what,
        (Some(only), other) => *only == format!("{other:?}").to_lowercase(),
    };
    let wanted: Vec<Attack> = ATTACKS.iter().copied().filter(is_wanted).collect();
    ensure!(!wanted.is_empty(), "there is no attack {only:?}");
    let mut left = Vec::new();
    while !stage.ended.load(std::sync::atomic::Ordering::SeqCst) {
        if left.is_empty() {
            left.clone_from(&wanted);
        }
        let attack = left.swap_remove(random.below(left.len()));
        let seconds = 2 + random.next() % 6;
        let began = Instant::now();
        one_attack(stage, attack, seconds).with_context(|| format!("during {attack:?}"))?;
        eprintln!("chaos: {attack:?} for {:?}", began.elapsed());
        thread::sleep(Duration::from_millis(random.next() % 3000));
    }
    Ok(())
}

fn one_attack(stage: &Stage<'_>, attack: Attack, seconds: u64) -> anyhow::Result<()> {
    let node = stage.node;
    let container = {
        let _services = stage.services.read();
        let container = node.run(&node.namespace, IMAGE, MAY_MOUNT)?;
        container.wait_until_watched()?;
        container
    };
    let flood = |what: &str, times: u32| -> anyhow::Result<()> {
        let commands = format!("/app/flood {what} {seconds} {times}");
        container.begin(&commands)?.finish(PATIENCE).map(drop)
    };
    let began = Instant::now();
    let is_drift = match attack {
        Attack::Flood { what, times, is_drift } => {
            flood(what, times)?;
            is_drift
        }
        Attack::Filesystem => {
            from_filesystem(&container, seconds)?;
            true
        }
        Attack::Followers => {
            let _deaf: Vec<Deaf> =
                (0..FOLLOWERS).map(|_| Deaf::start(node)).collect::<anyhow::Result<_>>()?;
            flood("spread", 200)?;
            true
        }
    };
    let sight = lock(&stage.blindness).sight(began, Instant::now());
    let _services = stage.services.read();
    if is_drift && sight == Sight::Sure {
        let reported = wait_within(PATIENCE, "the attack to be reported", || {
            Ok((!container.findings()?.is_empty()).then_some(()))
        });
        reported.with_context(|| match node.status() {
            Ok(status) => format!("in {}: {status:#}", container.id),
            Err(err) => err.to_string(),
        })?;
    }
    container.remove()
}

/// Runs programs and scripts of a filesystem that makes every process from outside wait.
fn from_filesystem(container: &Container<'_>, seconds: u64) -> anyhow::Result<()> {
    container.lay("s", b"#!/bin/sh\nsleep 60\n")?;
    let files = [("x", "/app/flood"), ("s", "/.control/s")];
    let fuse = Fuse::mount(container, "/mnt", Answers::Own, &files)?;
    container.begin(&run_from_mnt(seconds))?.finish(PATIENCE)?;
    ensure!(fuse.unanswered().is_empty(), "driftd asked it: {:?}", fuse.unanswered());
    Ok(())
}

// ---- driftd's processes are stopped

/// Which of the daemon, the gate and the guardian are stopped.
pub(super) type Frozen = [bool; 3];

/// Each of them alone, and every combination.
pub(super) const FREEZES: [Frozen; 7] = [
    [true, false, false],
    [false, true, false],
    [false, false, true],
    [true, true, false],
    [true, false, true],
    [false, true, true],
    [true, true, true],
];

/// For how long all three are stopped. No process is left that could end them.
const ALL: Duration = Duration::from_secs(2);

/// How long a program of a container may wait meanwhile, on a busy machine.
const HELD_UP: Duration = Duration::from_secs(12);

/// Stops processes of driftd, and returns whether the daemon has ended.
pub(super) fn freeze(node: &Node, which: Frozen) -> anyhow::Result<bool> {
    let container = node.container_of(IMAGE)?;
    let processes = Processes::of(node)?;
    let all = [processes.daemon, processes.gate, processes.guardian];
    let frozen: Vec<_> =
        all.into_iter().zip(which).filter_map(|(process, is)| is.then_some(process)).collect();
    for process in &frozen {
        kill(*process, Signal::SIGSTOP)?;
    }
    let go_on = || {
        for process in frozen.iter().filter(|process| is_there(**process)) {
            let _ = kill(*process, Signal::SIGCONT);
        }
    };
    let running = container.begin("/app/tiny; /app/tiny")?;
    if which == [true; 3] {
        thread::sleep(ALL);
        go_on();
    }
    let ran = running.finish(HELD_UP);
    if ran.is_err() {
        // While they are stopped, the containers cannot be ended.
        for process in [processes.gate, processes.daemon] {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
    ran.context("a program was held up")?;
    let mut has_ended = which != [true; 3] && node.driftd_ended(Duration::from_secs(15)).is_ok();
    if !has_ended {
        // A stopped process ends no other. When it goes on, it sees that it is alone.
        go_on();
        has_ended = node.driftd_ended(Duration::from_secs(10)).is_ok();
    }
    if has_ended {
        wait_within(Duration::from_secs(15), "driftd's other processes to end", || {
            Ok(all.iter().all(|process| !is_there(*process)).then_some(()))
        })?;
    } else {
        ensure!(all.iter().all(|process| is_there(*process)), "a process of driftd is missing");
    }
    container.remove()?;
    Ok(has_ended)
}
