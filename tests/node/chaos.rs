//! Everything at once, for a while: containers drift at random, and driftd is stopped, killed
//! and started again, its containerd crashes, the kernel drops its events, its disk is full.
//! The test records what really happened; at the end the history must agree.
//!
//! `make soak` does this for an hour, or `SOAK_SECONDS`, while other containers attack
//! driftd and its processes are frozen one by one and together. A run prints its seed, and
//! `CHAOS_SEED` chooses the same actions again; their times depend on the machine.

mod attack;
mod truth;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use self::truth::{Blindness, Claim, Reported, Sight};
use crate::image::Layer;
use crate::node::{Container, Node, Setup, lock, wait_for, wait_within};
use crate::{programs, run_without_driftd, test_without_node};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_without_node("chaos_the_truth_by_value", || {
            truth::by_value();
            Ok(())
        }),
        Trial::test("chaos_the_history_equals_the_truth", || {
            run_without_driftd(SETUP, |node| chaos(node, SHORT, Others::Peaceful))
        }),
        Trial::test("chaos_soak", || {
            run_without_driftd(SETUP, |node| {
                let seconds = match std::env::var("SOAK_SECONDS") {
                    Ok(seconds) => seconds.parse().context("SOAK_SECONDS is no number")?,
                    Err(_) => 60 * 60,
                };
                chaos(node, Duration::from_secs(seconds), Others::Hostile)
            })
        })
        .with_ignored_flag(true),
    ]
}

/// The kernel's queue gets its length from [`QUEUE`].
const SETUP: Setup =
    Setup { driftd: "bounded_queue = true", cri: None, own_runtime: false, unwatched: None };

/// What the containers beside those that drift do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Others {
    Peaceful,
    Hostile,
}

/// How long containers drift in `make test`. Each disturbance comes once.
const SHORT: Duration = Duration::from_secs(25);

/// How many containers drift at once.
const WORKERS: u64 = 3;

/// Actions in one container before the next takes its place.
const LIFE: usize = 60;

/// `fs.fanotify.max_queued_events` while driftd starts.
const QUEUE: &str = "256";

/// The history may lack what happened so shortly before a kill.
const UNWRITTEN: Duration = Duration::from_secs(3);

/// How soon all findings of a container must be there, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const IMAGE: &str = "registry.test/chaos:1";

/// Programs of the image, each for one action.
const PROGRAMS: usize = 96;

/// Random numbers (SplitMix64), good enough for these choices.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("below a usize")
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// What all threads of one run share.
struct Stage<'a> {
    node: &'a Node,
    program: &'a [u8],
    blindness: Mutex<Blindness>,
    /// Read by what needs containerd and driftd, written by what stops them.
    services: RwLock<()>,
    ended: AtomicBool,
    actions: AtomicUsize,
    containers: AtomicUsize,
    /// The number of containers whose missing findings are explained by a named loss.
    accounted_for: AtomicUsize,
}

fn chaos(node: &Arc<Node>, length: Duration, others: Others) -> anyhow::Result<()> {
    let seed = match std::env::var("CHAOS_SEED") {
        Ok(seed) => seed.parse().context("CHAOS_SEED is no number")?,
        Err(_) => {
            u64::from(std::process::id()) ^ jiff::Timestamp::now().as_microsecond().unsigned_abs()
        }
    };
    eprintln!("chaos: {} s, CHAOS_SEED={seed}", length.as_secs());
    let program = tiny_program(node)?;
    write_image(node, &program)?;
    let disk = Disk::mount(node, length)?;
    start_with_short_queue(node)?;
    let stage = Stage {
        node,
        program: &program,
        blindness: Mutex::default(),
        services: RwLock::new(()),
        ended: AtomicBool::new(false),
        actions: AtomicUsize::new(0),
        containers: AtomicUsize::new(0),
        accounted_for: AtomicUsize::new(0),
    };
    let attackers = u64::from(others == Others::Hostile);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS + attackers)
            .map(|worker| {
                let stage = &stage;
                let random = Random(seed.wrapping_add(worker));
                scope.spawn(move || {
                    let outcome = match worker {
                        0..WORKERS => drift(stage, random),
                        _ => attack::attack(stage, random),
                    };
                    // After a failure there is nothing left to prove.
                    stage.ended.fetch_or(outcome.is_err(), Ordering::SeqCst);
                    outcome
                })
            })
            .collect();
        let disturbed = disturb(&stage, &disk, Random(!seed), length, others);
        stage.ended.store(true, Ordering::SeqCst);
        let outcomes = workers.into_iter().map(|worker| {
            worker.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a container's thread panicked")))
        });
        // The first error, of any thread.
        outcomes.chain([disturbed]).collect::<anyhow::Result<()>>()
    })
    .with_context(|| format!("with CHAOS_SEED={seed}"))?;
    let gaps = gaps(node)?;
    eprintln!(
        "chaos: {} actions in {} containers, {} of them with findings missing by a named loss, gaps: {gaps:?}",
        stage.actions.load(Ordering::Relaxed),
        stage.containers.load(Ordering::Relaxed),
        stage.accounted_for.load(Ordering::Relaxed),
    );
    for name in ["kernel_queue_overflow", "containerd_lost"] {
        ensure!(gaps.contains_key(name), "no gap says {name}: {gaps:?} (CHAOS_SEED={seed})");
    }
    Ok(())
}

// ---- the image

/// A program of less than a page, so that no reader ever reads half of it.
fn tiny_program(node: &Node) -> anyhow::Result<Vec<u8>> {
    const SOURCE: &str = r#"
void _start(void)
{
#if defined(__x86_64__)
    __asm__ volatile("mov $231, %eax; xor %edi, %edi; syscall");
#elif defined(__aarch64__)
    __asm__ volatile("mov x0, #0; mov x8, #94; svc #0");
#else
#error "say how a program ends on this processor"
#endif
}
"#;
    let (source, program) = (node.path("tiny.c"), node.path("tiny"));
    fs::write(&source, SOURCE)?;
    let output = Command::new("gcc")
        .args(["-static", "-nostdlib", "-Os", "-s", "-Wl,-n,--build-id=none,-z,noseparate-code"])
        .arg("-o")
        .arg(&program)
        .arg(&source)
        .output()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(program)?;
    ensure!(bytes.len() < 3072, "{} bytes do not fit in a page with a mark", bytes.len());
    Ok(bytes)
}

fn marked(program: &[u8], mark: &str) -> Vec<u8> {
    [program, mark.as_bytes()].concat()
}

fn image_program(number: usize) -> String {
    format!("/opt/p{number:03}")
}

fn write_image(node: &Node, program: &[u8]) -> anyhow::Result<()> {
    let mut base = Layer::new();
    for directory in ["/bin", "/dev", "/etc", "/opt", "/proc", "/run", "/sys", "/usr", "/var"] {
        base = base.directory(directory, 0o755);
    }
    for directory in
        ["/.control", "/app", "/mnt", "/usr/bin", "/usr/local", "/usr/local/bin", "/var/lib"]
    {
        base = base.directory(directory, 0o755);
    }
    base = base.directory("/tmp", 0o1777).file(
        "/bin/busybox",
        0o755,
        &fs::read(programs::find("busybox")?)?,
    );
    for applet in
        ["sh", "cp", "mv", "ln", "rm", "chmod", "touch", "cat", "mkdir", "true", "seq", "sleep"]
    {
        base = base.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    // What attackers run.
    let compile = |name, text| programs::compile(&node.path(""), name, text);
    base = base.file("/app/flood", 0o755, &compile("flood", attack::FLOOD)?);
    base = base.file(programs::FUSE_SERVER, 0o755, &compile("fuse-server", programs::FUSE)?);
    base = base.file("/app/tiny", 0o755, &programs::tiny_program());
    let mut top = Layer::new();
    for number in 0..PROGRAMS {
        let path = image_program(number);
        top = top.file(&path, 0o755, &marked(program, &path));
    }
    node.import_layers(IMAGE, vec![base, top]).map(drop)
}

// ---- drift

/// An action of a container.
#[derive(Clone, Copy, Debug)]
enum Action {
    Drop,
    DropAndRun,
    DropRunAndRemove,
    Script,
    Copy,
    CopyAndRun,
    Link,
    Move,
    Append,
    ReplaceAndRun,
    Remove,
    Privilege,
    // These are no drift.
    Data,
    Touch,
    Run,
}

const ACTIONS: &[Action] = &[
    Action::Drop,
    Action::DropAndRun,
    Action::DropAndRun,
    Action::DropAndRun,
    Action::DropRunAndRemove,
    Action::DropRunAndRemove,
    Action::Script,
    Action::Copy,
    Action::CopyAndRun,
    Action::Link,
    Action::Move,
    Action::Append,
    Action::ReplaceAndRun,
    Action::ReplaceAndRun,
    Action::Remove,
    Action::Privilege,
    Action::Data,
    Action::Touch,
    Action::Run,
];

const PLACES: &[&str] = &["/tmp", "/usr/bin", "/usr/local/bin", "/var/lib", "/opt"];

/// A container, and what really happened in it.
struct Drifting<'a> {
    container: Container<'a>,
    claims: Vec<(Claim, Instant, Instant)>,
    /// Commands that came from outside, with when they did.
    sessions: Vec<(Instant, Instant)>,
    /// The next program of the image that is still unchanged.
    unspoilt: usize,
    actions: usize,
    /// Its losses, read when something is missing.
    losses: Losses,
}

/// When driftd lost something of a container, by its own account.
#[derive(Debug, Default)]
struct Losses {
    executions: Blindness,
    /// Losses of the kernel's records, by which driftd knows that a process came from outside.
    sessions: Blindness,
}

/// Lets one container after the other drift until the run ends.
fn drift(stage: &Stage<'_>, mut random: Random) -> anyhow::Result<()> {
    while !stage.ended.load(Ordering::SeqCst) {
        let mut drifting = {
            let _services = stage.services.read();
            Drifting {
                container: stage.node.container_of(IMAGE)?,
                claims: Vec::new(),
                sessions: Vec::new(),
                unspoilt: 0,
                actions: 0,
                losses: Losses::default(),
            }
        };
        stage.containers.fetch_add(1, Ordering::Relaxed);
        while drifting.actions < LIFE && !stage.ended.load(Ordering::SeqCst) {
            drifting.actions += 1;
            stage.actions.fetch_add(1, Ordering::Relaxed);
            if random.below(20) == 0 {
                come_from_outside(stage, &mut drifting)?;
            } else {
                act(stage, &mut drifting, &mut random)?;
            }
            thread::sleep(Duration::from_millis(random.next() % 200));
        }
        // No service is stopped while this container is judged.
        let _services = stage.services.read();
        judge(stage, &mut drifting)?;
        retire(stage, &drifting)?;
    }
    Ok(())
}

fn act(stage: &Stage<'_>, drifting: &mut Drifting<'_>, random: &mut Random) -> anyhow::Result<()> {
    let number = drifting.actions;
    let path = format!("{}/d{number}", random.of(PLACES));
    let action = *random.of(ACTIONS);
    let lay = |content: &[u8]| -> anyhow::Result<String> {
        drifting.container.lay(&format!("laid{number}"), content)?;
        Ok(blake3::hash(content).to_hex().to_string())
    };
    let laid = format!("/.control/laid{number}");
    let mark = format!("{} {} {number}", stage.node.namespace, drifting.container.id);
    let dropped = |blake3: String| Claim {
        path: path.clone(),
        lies: Some("file.added"),
        blake3: Some(blake3),
        ..Claim::default()
    };
    let spoilt = image_program(drifting.unspoilt);
    let original = blake3::hash(&marked(stage.program, &spoilt)).to_hex().to_string();
    let relocated = |path: String| Claim {
        path,
        lies: Some("file.relocated"),
        blake3: Some(original.clone()),
        ..Claim::default()
    };
    let changed = format!("{} changed {number}\n", drifting.container.id);
    let modified = || Claim {
        path: spoilt.clone(),
        lies: Some("file.modified"),
        blake3: Some(
            blake3::hash(&marked(stage.program, &format!("{spoilt}{changed}")))
                .to_hex()
                .to_string(),
        ),
        ..Claim::default()
    };
    let (commands, claims) = match action {
        Action::Drop => {
            let claim = dropped(lay(&marked(stage.program, &mark))?);
            (format!("cp {laid} {path}"), vec![claim])
        }
        Action::DropAndRun => {
            let claim = dropped(lay(&marked(stage.program, &mark))?);
            let times = 1 + random.next() % 4;
            let runs = format!("; {path}").repeat(usize::try_from(times)?);
            (
                format!("cp {laid} {path}{runs}"),
                vec![Claim { ran: Some(("exec.new", times)), ..claim }],
            )
        }
        Action::DropRunAndRemove => {
            let claim = dropped(lay(&marked(stage.program, &mark))?);
            (
                format!("cp {laid} {path}; {path}; rm {path}"),
                vec![Claim {
                    ran: Some(("exec.new", 1)),
                    lies: None,
                    passed: &["file.added"],
                    ..claim
                }],
            )
        }
        Action::Script => {
            let claim = dropped(lay(format!("#!/bin/sh\n: {mark}\n").as_bytes())?);
            (
                format!("cp {laid} {path}; {path}"),
                vec![Claim { ran: Some(("exec.script", 1)), ..claim }],
            )
        }
        Action::Copy => (format!("cp {spoilt} {path}"), vec![relocated(path.clone())]),
        Action::CopyAndRun => (
            format!("cp {spoilt} {path}; {path}"),
            vec![Claim { ran: Some(("exec.relocated", 1)), ..relocated(path.clone()) }],
        ),
        Action::Link => (
            format!("ln {spoilt} {path}; {path}"),
            vec![Claim { ran: Some(("exec.relocated", 1)), ..relocated(path.clone()) }],
        ),
        Action::Move => (
            format!("mv {spoilt} {path}; {path}"),
            vec![
                Claim { ran: Some(("exec.relocated", 1)), ..relocated(path.clone()) },
                Claim { path: spoilt.clone(), lies: Some("file.removed"), ..Claim::default() },
            ],
        ),
        Action::Append => (format!("printf '{changed}' >> {spoilt}"), vec![modified()]),
        Action::ReplaceAndRun => (
            format!(
                "cp {spoilt} {path}; printf '{changed}' >> {path}; mv {path} {spoilt}; {spoilt}"
            ),
            vec![
                Claim { ran: Some(("exec.modified", 1)), ..modified() },
                Claim {
                    path: path.clone(),
                    passed: &["file.relocated", "file.added"],
                    ..Claim::default()
                },
            ],
        ),
        Action::Remove => (
            format!("rm {spoilt}"),
            vec![Claim { path: spoilt.clone(), lies: Some("file.removed"), ..Claim::default() }],
        ),
        Action::Privilege => (
            format!("chmod u+s {spoilt}"),
            vec![Claim { path: spoilt.clone(), lies: Some("file.privileged"), ..Claim::default() }],
        ),
        Action::Data => (
            format!("echo {number} >> /var/lib/data; mkdir -p /var/lib/{number}; echo x > {path}"),
            vec![Claim { path: path.clone(), ..Claim::default() }],
        ),
        Action::Touch => (
            format!("touch {spoilt}; chmod 0755 {spoilt}; {spoilt}"),
            vec![Claim { path: spoilt.clone(), ..Claim::default() }],
        ),
        Action::Run => (spoilt.clone(), vec![Claim { path: spoilt.clone(), ..Claim::default() }]),
    };
    drifting.unspoilt += 1;
    ensure!(drifting.unspoilt < PROGRAMS, "no program of the image is left");
    let began = Instant::now();
    drifting.container.sh(&commands).with_context(|| format!("{action:?}"))?;
    let ended = Instant::now();
    drifting.claims.extend(claims.into_iter().map(|claim| (claim, began, ended)));
    Ok(())
}

/// Runs a command as a user or a probe does.
fn come_from_outside(stage: &Stage<'_>, drifting: &mut Drifting<'_>) -> anyhow::Result<()> {
    // Not while containerd is stopped.
    let Ok(_services) = stage.services.try_read() else { return Ok(()) };
    let fifo = stage.node.path("fifo");
    let number = drifting.actions;
    let began = Instant::now();
    stage.node.ctr(&[
        "task",
        "exec",
        "--fifo-dir",
        &fifo.to_string_lossy(),
        "--exec-id",
        &format!("outside{number}"),
        &drifting.container.id,
        "/bin/true",
    ])?;
    drifting.sessions.push((began, Instant::now()));
    Ok(())
}

// ---- the judgement

fn judge(stage: &Stage<'_>, drifting: &mut Drifting<'_>) -> anyhow::Result<()> {
    let mut verdict = truth::Verdict::default();
    let mut refused = None;
    let waited = wait_within(PATIENCE, "the history to be true", || {
        // A driftd that is stopped at this moment answers later.
        match drifting.container.diff().and_then(|_| compare(stage, drifting)) {
            Ok(seen) => (verdict, refused) = (seen, None),
            Err(err) => refused = Some(err),
        }
        let is_over = verdict.is_good() || !verdict.wrong.is_empty();
        Ok((refused.is_none() && is_over).then_some(()))
    });
    if let Some(err) = refused {
        return Err(err.context(format!("driftd does not answer for {}", drifting.container.id)));
    }
    if waited.is_err() && verdict.wrong.is_empty() {
        // A named loss must explain what is missing.
        drifting.losses = losses_of(stage.node, &drifting.container.id)?;
        verdict = compare(stage, drifting)?;
        stage.accounted_for.fetch_add(usize::from(verdict.is_good()), Ordering::Relaxed);
    }
    let container = &drifting.container;
    if !verdict.is_good() {
        anyhow::bail!(
            "the history of {} is not true: {verdict:#?}\nlosses: {}\nfindings: {:#?}",
            container.id,
            stage.node.status().map_or_else(
                |err| err.to_string(),
                |status| format!("{} gaps: {}", status["losses"], status["gaps"])
            ),
            container.findings()?
        );
    }
    Ok(())
}

fn compare(stage: &Stage<'_>, drifting: &Drifting<'_>) -> anyhow::Result<truth::Verdict> {
    let blindness = lock(&stage.blindness);
    let Losses { executions, sessions } = &drifting.losses;
    let sight = |lost: &Blindness, began, ended| match blindness.sight(began, ended) {
        Sight::Sure => lost.sight(began, ended),
        Sight::Unsure => Sight::Unsure,
    };
    let claims: Vec<(Claim, Sight)> = drifting
        .claims
        .iter()
        .map(|(claim, began, ended)| (claim.clone(), sight(executions, *began, *ended)))
        .collect();
    let sure: Vec<Instant> = drifting
        .sessions
        .iter()
        .filter(|(began, ended)| sight(sessions, *began, *ended) == Sight::Sure)
        .map(|(began, _)| *began)
        .collect();
    let sure_sessions = sure.len() as u64;
    drop(blindness);
    let (mut files, mut sessions) = (Vec::new(), 0);
    for finding in drifting.container.findings()? {
        let count = finding["count"].as_u64().context("no count")?;
        if finding["kind"] == "session.exec" {
            sessions += count;
        } else if finding["files"].is_null() {
            files.push(reported(&finding, &finding["file"], count)?);
        } else {
            let id = finding["id"].as_str().context("no id")?;
            for member in stage.node.answer(&["members", id])? {
                files.push(reported(&member, &member, 1)?);
            }
        }
    }
    let mut verdict = truth::compare(&claims, &files);
    if sessions < sure_sessions {
        let now = jiff::Timestamp::now();
        let began = sure.iter().filter_map(|began| now.checked_sub(began.elapsed()).ok());
        let began: Vec<String> = began.map(|began| began.to_string()).collect();
        let expected = format!("{sure_sessions} sessions, not {sessions}; they began at {began:?}");
        verdict.missing.push(expected);
    }
    if sessions > drifting.sessions.len() as u64 {
        verdict.wrong.push(format!("{} sessions, not {sessions}", drifting.sessions.len()));
    }
    Ok(verdict)
}

/// What a finding, or a member of one, reports about a file.
fn reported(finding: &Value, file: &Value, count: u64) -> anyhow::Result<Reported> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    Ok(Reported {
        kind: text(&finding["kind"]).context("no kind")?,
        path: text(&file["path"]).with_context(|| format!("no path: {finding:#}"))?,
        count,
        blake3: text(&file["blake3"]),
    })
}

/// Ends a container. That its files go with it is no drift.
fn retire(stage: &Stage<'_>, drifting: &Drifting<'_>) -> anyhow::Result<()> {
    let id = &drifting.container.id;
    drifting.container.remove()?;
    wait_for("driftd to forget the container", || {
        let known = stage.node.answer(&["containers"])?;
        Ok(known.iter().all(|container| container["id"] != id.as_str()).then_some(()))
    })?;
    let verdict = compare(stage, drifting)?;
    ensure!(verdict.is_good(), "the end of {id} was reported as drift: {verdict:#?}");
    Ok(())
}

/// How much earlier than its record a loss may have been.
const UNNOTICED: Duration = Duration::from_secs(2);

/// Names of losses of executions that the gate saw.
const OF_EXECUTIONS: &[&str] = &[
    "content_queue_full",
    "event_unreadable",
    "gate_queue_full",
    "pipeline_full",
    "process_queue_full",
    "thread_stuck",
];

/// The losses of a container in the history, and those that may affect any container.
fn losses_of(node: &Node, id: &str) -> anyhow::Result<Losses> {
    let history = history_of(node)?;
    let mut query = history.prepare("SELECT json FROM record WHERE type = 'gap'")?;
    let records = query.query_map([], |row| row.get::<_, String>(0))?;
    let (now, wall) = (Instant::now(), jiff::Timestamp::now());
    let instant = |time: &Value| -> anyhow::Result<Instant> {
        let time: jiff::Timestamp = time.as_str().context("no time")?.parse()?;
        let ago = Duration::try_from(time.until(wall)?).unwrap_or_default();
        now.checked_sub(ago).context("before this machine was started")
    };
    let mut losses = Losses::default();
    for record in records {
        let gap: Value = serde_json::from_str(&record?)?;
        if !gap["container"].is_null() && gap["container"]["id"] != id {
            continue;
        }
        let at = instant(&gap["at"])?;
        let until = if gap["until"].is_null() { at } else { instant(&gap["until"])? };
        let from = at.checked_sub(UNNOTICED).unwrap_or(at);
        let name = gap["name"].as_str().unwrap_or_default();
        let is_of_executions = OF_EXECUTIONS.contains(&name);
        if is_of_executions {
            losses.executions.add(from, until);
        }
        if is_of_executions || name == "trace_lost" {
            losses.sessions.add(from, until);
        }
    }
    Ok(losses)
}

fn history_of(node: &Node) -> anyhow::Result<rusqlite::Connection> {
    let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
    Ok(rusqlite::Connection::open_with_flags(node.path("driftd/history.db"), flags)?)
}

/// The gaps in the history, by name.
fn gaps(node: &Node) -> anyhow::Result<BTreeMap<String, i64>> {
    let history = history_of(node)?;
    let mut query = history.prepare(
        "SELECT json_extract(json, '$.name'), count(*) FROM record WHERE type = 'gap' GROUP BY 1",
    )?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

// ---- disturbances

#[derive(Clone, Copy, Debug)]
enum Disturbance {
    Stop,
    Kill,
    CrashContainerd,
    Overflow,
    FillDisk,
    FillDiskAndKill,
    Freeze(attack::Frozen),
}

const DISTURBANCES: [Disturbance; 6] = [
    Disturbance::Stop,
    Disturbance::Overflow,
    Disturbance::Kill,
    Disturbance::CrashContainerd,
    Disturbance::FillDisk,
    Disturbance::FillDiskAndKill,
];

/// Disturbs until the time is over, and each way at least once.
fn disturb(
    stage: &Stage<'_>,
    disk: &Disk,
    mut random: Random,
    length: Duration,
    others: Others,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + length;
    let mut all = DISTURBANCES.to_vec();
    if others == Others::Hostile {
        all.extend(attack::FREEZES.map(Disturbance::Freeze));
    }
    let mut first = all.clone();
    let pause = length / (2 * u32::try_from(all.len())?);
    let pause = u64::try_from(pause.min(Duration::from_secs(20)).as_millis())?;
    while (Instant::now() < deadline || !first.is_empty()) && !stage.ended.load(Ordering::SeqCst) {
        thread::sleep(Duration::from_millis(pause / 2 + random.next() % pause));
        let disturbance = if first.is_empty() {
            *random.of(&all)
        } else {
            first.swap_remove(random.below(first.len()))
        };
        let began = Instant::now();
        let down = Duration::from_millis(random.next() % 1500);
        let _services = stage.services.write();
        one_disturbance(stage, disk, disturbance, down)
            .with_context(|| format!("during {disturbance:?}"))?;
        eprintln!("chaos: {disturbance:?} for {:?}", began.elapsed());
    }
    Ok(())
}

fn one_disturbance(
    stage: &Stage<'_>,
    disk: &Disk,
    disturbance: Disturbance,
    down: Duration,
) -> anyhow::Result<()> {
    let node = stage.node;
    let began = Instant::now();
    match disturbance {
        Disturbance::Stop => {
            node.stop_driftd()?;
            thread::sleep(down);
            start_and_wait(stage)?;
            // A stop loses nothing of what ended before it.
            lock(&stage.blindness).add(began, Instant::now());
        }
        Disturbance::Kill => {
            node.crash_driftd()?;
            thread::sleep(down);
            start_and_wait(stage)?;
            lock(&stage.blindness).add(before(began), Instant::now());
        }
        Disturbance::CrashContainerd => {
            // The watch goes on without containerd.
            let lost = node.losses("containerd_lost")?;
            node.crash_containerd()?;
            wait_for("driftd to notice", || {
                Ok((node.losses("containerd_lost")? > lost).then_some(()))
            })?;
            thread::sleep(down);
            node.start_containerd()?;
            wait_for("driftd to be connected again", || {
                Ok((node.status()?["endpoints"][0]["connected"] == true).then_some(()))
            })?;
        }
        Disturbance::Overflow => overflow(stage)?,
        Disturbance::FillDisk => {
            disk.fill()?;
            // Findings wait in memory meanwhile.
            thread::sleep(Duration::from_secs(1) + down);
            disk.free()?;
            // A kill before that would lose more than `UNWRITTEN`.
            wait_for("the history to be on the disk again", || {
                let problems = node.status()?["problems"].to_string();
                Ok((!problems.contains("history_write")).then_some(()))
            })?;
        }
        Disturbance::FillDiskAndKill => {
            disk.fill()?;
            thread::sleep(down);
            node.crash_driftd()?;
            disk.free()?;
            start_and_wait(stage)?;
            lock(&stage.blindness).add(before(began), Instant::now());
        }
        Disturbance::Freeze(which) => {
            // A daemon that goes on has lost nothing.
            if attack::freeze(node, which)? {
                start_and_wait(stage)?;
                lock(&stage.blindness).add(before(began), Instant::now());
            }
        }
    }
    Ok(())
}

fn before(moment: Instant) -> Instant {
    moment.checked_sub(UNWRITTEN).unwrap_or(moment)
}

/// Starts driftd while the kernel's queues are short.
fn start_with_short_queue(node: &Node) -> anyhow::Result<()> {
    /// Only one thread of this process changes the limit at a time.
    static SETTING: Mutex<()> = Mutex::new(());
    let _one_at_a_time = lock(&SETTING);
    let limit = Path::new("/proc/sys/fs/fanotify/max_queued_events");
    let usual = fs::read_to_string(limit)
        .context("this kernel has no fs.fanotify.max_queued_events (Linux 5.13 or newer has)")?;
    fs::write(limit, QUEUE)?;
    let started = node.start_driftd();
    fs::write(limit, usual)?;
    started
}

fn start_and_wait(stage: &Stage<'_>) -> anyhow::Result<()> {
    start_with_short_queue(stage.node)?;
    wait_for("driftd to watch every container again", || {
        let known = stage.node.answer(&["containers"])?;
        let running: Vec<_> = known
            .iter()
            .filter(|container| container["namespace"] == stage.node.namespace.as_str())
            .collect();
        let is_whole = stage.node.status()?["endpoints"][0]["connected"] == true
            && running
                .iter()
                .all(|container| container["watched"] == true && container["baseline"] == "ready");
        Ok(is_whole.then_some(()))
    })
}

/// Writes more than the kernel queues for a daemon that does not read.
fn overflow(stage: &Stage<'_>) -> anyhow::Result<()> {
    let node = stage.node;
    let container = node.container_of(IMAGE)?;
    let before = node.losses("kernel_queue_overflow")?;
    let daemon = node.driftd_pid()?;
    wait_for("the queue to overflow", || {
        // Shorter than the guardian's patience. The flood executes nothing.
        kill(daemon, Signal::SIGSTOP)?;
        let flooded = container
            .begin("i=0; while [ $i -lt 600 ]; do : > /tmp/f$i; i=$((i+1)); done")
            .and_then(|running| running.finish(Duration::from_secs(1)));
        kill(daemon, Signal::SIGCONT)?;
        if flooded.is_err() {
            // The machine is busy, and the flood goes on by itself.
            thread::sleep(Duration::from_secs(1));
        }
        Ok((node.losses("kernel_queue_overflow")? > before).then_some(()))
    })?;
    container.remove()
}

/// A small disk for driftd's state. It grows with the length of the run, as the history does.
struct Disk {
    filler: PathBuf,
}

impl Disk {
    fn mount(node: &Node, length: Duration) -> anyhow::Result<Disk> {
        let place = node.path("driftd");
        fs::create_dir(&place)?;
        // The node unmounts what it finds below its directory.
        // An attack can make a megabyte of findings a second, and the history holds 1 GiB.
        let size = (64 + length.as_secs()).min(1280);
        let options = format!("size={size}m,mode=0700");
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(&place)
            .status()?;
        ensure!(status.success(), "cannot mount a tmpfs at {}", place.display());
        Ok(Disk { filler: place.join("filler") })
    }

    fn fill(&self) -> anyhow::Result<()> {
        let mut filler = File::create(&self.filler)?;
        for size in [1 << 20, 4096] {
            let block = vec![1; size];
            while filler.write_all(&block).is_ok() {}
        }
        Ok(())
    }

    fn free(&self) -> anyhow::Result<()> {
        Ok(fs::remove_file(&self.filler)?)
    }
}
