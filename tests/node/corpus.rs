//! Ordinary work in a whole distribution's container, twelve workloads side by side for
//! an hour (`make corpus`): driftd, as installed, reports next to nothing about them,
//! with rules nothing at all, and an attack in each of these containers at full severity.
//!
//! A workload is a file in `tests/corpus/`. Three daemons watch the same containers at the same
//! time: this build with its default settings, this build with the rules of
//! `tests/corpus/rules.toml` and the shipped profiles, and an older build. `CORPUS_SECONDS`
//! makes it shorter, to see that it runs; the limit for each hour then does not apply.
//! `CORPUS_ONLY` names the workloads, separated by commas.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{
    Container, Node, Setup, bench, end, spawn_daemon, summaries, tail, talk, wait_for, wait_within,
};
use crate::profiles::lay_profiles;
use crate::{run_without_driftd, test_without_node};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_without_node("corpus_workloads_are_complete", || workloads().map(drop)),
        Trial::test("corpus", || run_without_driftd(Setup::default(), corpus))
            .with_ignored_flag(true),
    ]
}

/// The name that `scripts/corpus-image` gives it.
const IMAGE: &str = "registry.test/corpus:1";

/// How long each workload goes on.
const LENGTH: Duration = Duration::from_secs(60 * 60);

/// A workload rests this many times as long as it has worked, so that two processors
/// suit twelve of them.
const REST: u32 = 5;

/// Findings at medium or above that a workload may cause in an hour, without settings.
const AN_HOUR: f64 = 2.0;

/// The part of the older build's findings that this build may still report.
const PART: f64 = 0.2;

/// How long the image's import, its baseline, or an attack's findings may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How lines of a workload's head begin that name a finding which is meant.
const REPORTED: &str = "Reported: ";

/// In every container, beside the workload's own attack.
const ATTACK: &str = r#"
cp /.control/payload /tmp/dropped
/tmp/dropped
python3 -c 'import os
file = os.memfd_create("program")
os.write(file, open("/.control/payload", "rb").read())
os.execve(file, ["program"], {})'
echo '* * * * * root /tmp/dropped' >>/etc/crontab
attack
"#;
const ATTACK_IS: [&str; 3] = [
    "critical exec.new /tmp/dropped",
    "critical exec.fileless ",
    "high file.persistence /etc/crontab",
];

#[derive(Debug)]
struct Workload {
    name: String,
    /// One sentence about it.
    about: String,
    /// The finding that its own attack must cause, as `SEVERITY KIND PATH`.
    attack: String,
    /// What driftd is meant to report of the work itself, in the same form: it must be
    /// reported, and does not count.
    reported: Vec<String>,
    script: String,
}

fn workloads() -> anyhow::Result<Vec<Workload>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut workloads = Vec::new();
    for entry in fs::read_dir(&directory)? {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "sh") {
            continue;
        }
        let name = path.file_stem().context("a name")?.to_string_lossy().into_owned();
        workloads.push(read(&name, &path).with_context(|| path.display().to_string())?);
    }
    workloads.sort_by(|one, other| one.name.cmp(&other.name));
    ensure!(workloads.len() == 12, "{} workloads", workloads.len());
    Ok(workloads)
}

fn read(name: &str, path: &Path) -> anyhow::Result<Workload> {
    let script = fs::read_to_string(path)?;
    let (head, body) = script.split_once("\n\n").context("no empty line after the head")?;
    let head: Vec<&str> = head.lines().filter_map(|line| line.strip_prefix("# ")).collect();
    let (attack, about) = head.split_last().context("no head")?;
    let attack = attack.strip_prefix("Attack: ").context("the head does not end with an attack")?;
    for function in ["round() {", "attack() {"] {
        ensure!(body.contains(function), "no {function}");
    }
    let parsed = Command::new("sh").arg("-n").arg(path).output()?;
    ensure!(parsed.status.success(), "{}", talk(&parsed));
    let (reported, about): (Vec<&str>, Vec<&str>) =
        about.iter().partition(|line| line.starts_with(REPORTED));
    let reported = reported.iter().filter_map(|line| line.strip_prefix(REPORTED));
    Ok(Workload {
        name: name.to_owned(),
        about: about.join(" "),
        attack: attack.to_owned(),
        reported: reported.map(str::to_owned).collect(),
        script,
    })
}

impl Workload {
    /// The script of the container's shell, which works for so long.
    fn work(&self, length: Duration) -> String {
        format!(
            r#"prepare() {{ :; }}
{script}
set -e
mkdir -p /root
end=$(($(date +%s) + {length})) rounds=0
prepare
while :; do
    began=$(date +%s)
    round
    now=$(date +%s) rounds=$((rounds + 1))
    [ "$now" -lt "$end" ] || break
    rest=$(((now - began + 1) * {REST}))
    [ "$rest" -lt $((end - now)) ] || rest=$((end - now))
    sleep "$rest"
    [ "$(date +%s)" -lt "$end" ] || break
done
echo "rounds: $rounds"
"#,
            script = self.script,
            length = length.as_secs(),
        )
    }
}

/// A driftd that watches the corpus.
struct Daemon {
    name: &'static str,
    program: PathBuf,
    directory: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts one with its default settings, and with this table of them.
    fn start(
        node: &Node,
        name: &'static str,
        program: PathBuf,
        policy: &str,
    ) -> anyhow::Result<Daemon> {
        let directory = node.path(name);
        fs::create_dir(&directory)?;
        let settings = directory.join("driftd.toml");
        let here = directory.display();
        let containerd = node.path("containerd.sock");
        fs::write(
            &settings,
            format!(
                "state_dir = \"{here}/state\"\nsocket = \"{here}/driftd.sock\"\n\
                 [containerd]\nsockets = [\"{}\"]\n{policy}",
                containerd.display()
            ),
        )?;
        let mut command = Command::new(&program);
        command.args(["run", "--config"]).arg(&settings);
        let child = spawn_daemon(&mut command, &directory.join("log"))?;
        let daemon = Daemon { name, program, directory, child };
        wait_for(&format!("{name} to answer"), || Ok(daemon.answer(&["containers"]).ok()))
            .with_context(|| daemon.log())?;
        Ok(daemon)
    }

    fn log(&self) -> String {
        tail(&self.directory.join("log"))
    }

    fn answer(&self, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
        let output = Command::new(&self.program)
            .args(arguments)
            .args(["-o", "jsonl"])
            .env("DRIFTD_SOCKET", self.directory.join("driftd.sock"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "{} {arguments:?}: {}\n{}",
            self.name,
            output.status,
            talk(&output)
        );
        let lines = String::from_utf8(output.stdout)?;
        lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    fn watches(&self, id: &str) -> anyhow::Result<bool> {
        let known = self.answer(&["containers"])?;
        Ok(known
            .iter()
            .any(|one| one["id"] == id && one["watched"] == true && one["baseline"] == "ready"))
    }

    fn findings(&self, id: &str) -> anyhow::Result<Vec<Value>> {
        self.answer(&["findings", "--container", id])
    }

    /// Its losses by name.
    fn losses(&self) -> anyhow::Result<String> {
        let status = self.answer(&["status"])?;
        let losses = status.first().and_then(|status| status["losses"].as_array());
        let losses = losses.into_iter().flatten().filter_map(|loss| {
            let count = loss["count"].as_u64().filter(|count| *count > 0)?;
            Some(format!("{} {count}", loss["name"].as_str()?))
        });
        Ok(losses.collect::<Vec<_>>().join(", "))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// The settings of a daemon with rules: the shipped profiles, and the exceptions that an
/// administrator of these containers writes.
fn rules(node: &Node) -> anyhow::Result<String> {
    lay_profiles(node)?;
    let directory = node.path("rules");
    fs::create_dir(&directory)?;
    let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/rules.toml");
    let own = directory.join("corpus.toml");
    fs::write(&own, fs::read(rules)?)?;
    fs::set_permissions(&own, fs::Permissions::from_mode(0o644))?;
    Ok(format!(
        "[policy]\ndir = \"{}\"\nprofile_dir = \"{}\"\nprofiles = [\"apt\", \"ci-runner\", \
         \"jvm-native-libraries\", \"pip\"]\n",
        directory.display(),
        node.path("baselines").display()
    ))
}

fn is_worth_a_page(finding: &Value) -> bool {
    finding["severity"].as_str().is_some_and(|one| ["medium", "high", "critical"].contains(&one))
}

/// The result of a workload.
struct Outcome {
    minutes: f64,
    rounds: String,
    /// Findings at medium or above: of the older build, and of this one with and without rules.
    older: usize,
    ours: Vec<String>,
    ruled: Vec<String>,
    /// What is meant to be reported of the work, and was not.
    absent: Vec<String>,
    /// Attacks that were not reported, each alone and at full severity.
    missed: Vec<String>,
}

fn corpus(node: &Arc<Node>) -> anyhow::Result<()> {
    let file = |variable: &str| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .with_context(|| format!("{variable} is not set (run: make corpus)"))
    };
    let length = match std::env::var("CORPUS_SECONDS") {
        Ok(seconds) => Duration::from_secs(seconds.parse().context("CORPUS_SECONDS is no number")?),
        Err(_) => LENGTH,
    };
    let mut workloads = workloads()?;
    if let Ok(only) = std::env::var("CORPUS_ONLY") {
        workloads.retain(|workload| only.split(',').any(|name| name == workload.name));
    }
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("corpus");
    fs::create_dir_all(&results)?;
    node.import(&file("CORPUS_IMAGE")?)?;
    let older = Daemon::start(node, "older", file("CORPUS_AGAINST")?, "")?;
    let program = file("DRIFTD_PROGRAM")?;
    let ours = Daemon::start(node, "ours", program.clone(), "")?;
    let ruled = Daemon::start(node, "ruled", program, &rules(node)?)?;
    let sides = [&older, &ours, &ruled];

    let mut containers = Vec::new();
    for workload in &workloads {
        let container = node.unwatched_container_of(IMAGE)?;
        container.lay("payload", &bench()?.payload.marked(&workload.name))?;
        containers.push(container);
    }
    for (side, container) in sides.iter().flat_map(|side| containers.iter().map(move |c| (side, c)))
    {
        wait_within(PATIENCE, &format!("{} to watch {}", side.name, container.id), || {
            Ok(side.watches(&container.id)?.then_some(()))
        })
        .with_context(|| side.log())?;
    }
    eprintln!("corpus: {} workloads, {} s", workloads.len(), length.as_secs());
    let outcomes: Vec<anyhow::Result<Outcome>> = thread::scope(|scope| {
        let runs: Vec<_> = workloads
            .iter()
            .zip(&containers)
            .map(|(workload, container)| {
                let results = &results;
                scope.spawn(move || {
                    play(workload, container, length, sides, results)
                        .with_context(|| workload.name.clone())
                })
            })
            .collect();
        runs.into_iter()
            .map(|run| run.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread panicked"))))
            .collect()
    });
    let losses = sides.map(|side| side.losses().unwrap_or_else(|err| format!("{err:#}")));
    let rows: Vec<_> = workloads
        .iter()
        .zip(&outcomes)
        .filter_map(|(workload, outcome)| Some((workload, outcome.as_ref().ok()?)))
        .collect();
    let table = table(&rows);
    fs::write(results.join("table.md"), &table)?;
    eprintln!("{table}");
    for (side, losses) in sides.iter().zip(&losses) {
        eprintln!("losses of {}: {losses}", side.name);
    }
    let failed: Vec<String> = outcomes
        .iter()
        .filter_map(|outcome| Some(format!("{:#}", outcome.as_ref().err()?)))
        .collect();
    ensure!(failed.is_empty(), "{failed:#?}");
    judge(&rows, length)
}

/// Plays a workload, counts, attacks.
fn play(
    workload: &Workload,
    container: &Container<'_>,
    length: Duration,
    sides: [&Daemon; 3],
    results: &Path,
) -> anyhow::Result<Outcome> {
    let began = Instant::now();
    let ran = container.begin(&workload.work(length))?.finish(length + 4 * PATIENCE)?;
    fs::write(results.join(format!("{}.log", workload.name)), &ran.output)?;
    let last: Vec<&str> = ran.output.lines().rev().take(20).collect();
    ensure!(ran.status == 0, "ended with {}; its last lines, backwards: {last:#?}", ran.status);
    let rounds = last.first().and_then(|line| line.strip_prefix("rounds: "));
    let rounds = rounds.context("it does not print its rounds")?.to_owned();
    // What was written last is judged after it has settled.
    thread::sleep(Duration::from_secs(5));
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    let [older, ours, ruled] = sides.map(|side| {
        let mut findings = side.findings(&container.id)?;
        let mut lines = String::new();
        for finding in &findings {
            writeln!(lines, "{finding}")?;
        }
        fs::write(results.join(format!("{}.{}.jsonl", workload.name, side.name)), lines)?;
        findings.retain(is_worth_a_page);
        anyhow::Ok(summaries(&findings))
    });

    let ran = container
        .begin(&format!("{}\nset -e\ncd /\n{ATTACK}", workload.script))?
        .finish(PATIENCE)?;
    ensure!(ran.status == 0, "the attack failed: {ran:?}");
    let mut missed = Vec::new();
    for side in &sides[1..] {
        let expected = ATTACK_IS.into_iter().chain([&*workload.attack]);
        missed.extend(missing(side, container, &expected.collect::<Vec<_>>())?);
    }
    let mut ours = ours?;
    let mut absent = Vec::new();
    for meant in &workload.reported {
        match ours.iter().position(|line| line.starts_with(meant)) {
            Some(at) => drop(ours.remove(at)),
            None => absent.push(meant.clone()),
        }
    }
    Ok(Outcome { minutes, rounds, older: older?.len(), ours, ruled: ruled?, absent, missed })
}

/// Which of these findings of an attack a daemon does not report, each alone.
fn missing(
    side: &Daemon,
    container: &Container<'_>,
    expected: &[&str],
) -> anyhow::Result<Vec<String>> {
    let mut missed = Vec::new();
    let all_reported = wait_within(Duration::from_secs(60), "the attack's findings", || {
        let mut findings = side.findings(&container.id)?;
        // A finding for several files does not name this file.
        findings.retain(|finding| finding["files"].is_null());
        let lines = summaries(&findings);
        missed = expected
            .iter()
            .filter(|one| !lines.iter().any(|line| line.starts_with(**one)))
            .map(|one| format!("{}: {one}", side.name))
            .collect();
        Ok(missed.is_empty().then_some(()))
    });
    ensure!(all_reported.is_ok() || !missed.is_empty(), "{all_reported:?}");
    Ok(missed)
}

type Row<'a> = (&'a Workload, &'a Outcome);

fn an_hour(count: usize, minutes: f64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "a few hundred")]
    let count = count as f64;
    count * 60.0 / minutes
}

fn total(rows: &[Row<'_>]) -> (usize, usize) {
    rows.iter().fold((0, 0), |(older, ours), (_, outcome)| {
        (older + outcome.older, ours + outcome.ours.len())
    })
}

fn table(rows: &[Row<'_>]) -> String {
    let mut text = String::from(
        "| workload | what it does | rounds | 0.1.0 | now | now, each hour | with rules | attack reported |\n\
         |---|---|---|---|---|---|---|---|\n",
    );
    for (workload, outcome) in rows {
        let attack = if outcome.missed.is_empty() { "yes" } else { "**no**" };
        let _ = writeln!(
            text,
            "| `{}` | {} | {} | {} | {} | {:.1} | {} | {attack} |",
            workload.name,
            workload.about,
            outcome.rounds,
            outcome.older,
            outcome.ours.len(),
            an_hour(outcome.ours.len(), outcome.minutes),
            outcome.ruled.len(),
        );
    }
    let (older, ours) = total(rows);
    let ruled: usize = rows.iter().map(|(_, outcome)| outcome.ruled.len()).sum();
    let _ = writeln!(text, "| all | | | {older} | {ours} | | {ruled} | |");
    for (workload, outcome) in rows {
        for line in &outcome.ours {
            let _ = writeln!(text, "{}: {line}", workload.name);
        }
        for line in &outcome.ruled {
            let _ = writeln!(text, "{}: in spite of the rules: {line}", workload.name);
        }
        for line in &outcome.absent {
            let _ = writeln!(text, "{}: not reported: {line}", workload.name);
        }
        for line in &outcome.missed {
            let _ = writeln!(text, "{}: not reported alone: {line}", workload.name);
        }
    }
    text
}

fn judge(rows: &[Row<'_>], length: Duration) -> anyhow::Result<()> {
    let mut broken = Vec::new();
    for (workload, outcome) in rows {
        let hourly = an_hour(outcome.ours.len(), outcome.minutes);
        if length >= LENGTH && hourly > AN_HOUR {
            broken.push(format!("{}: {hourly:.1} findings an hour", workload.name));
        }
        if !outcome.ruled.is_empty() {
            broken.push(format!("{}: {:?} in spite of the rules", workload.name, outcome.ruled));
        }
        if length >= LENGTH && !outcome.absent.is_empty() {
            broken.push(format!("{}: {:?} not reported", workload.name, outcome.absent));
        }
        if !outcome.missed.is_empty() {
            broken.push(format!("{}: {:?} not reported", workload.name, outcome.missed));
        }
    }
    let (older, ours) = total(rows);
    #[allow(clippy::cast_precision_loss, reason = "a few hundred")]
    if ours as f64 > PART * older as f64 {
        broken.push(format!("{ours} findings where the older build has {older}"));
    }
    ensure!(broken.is_empty(), "not quiet, or too quiet: {broken:#?}");
    Ok(())
}
