//! `driftd status`: whether the view is complete, and what is missing from it.
//!
//! Owns the JSON of the status and its text for people. The daemon decides what is complete;
//! this only prints it.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, call};
use super::evidence::size;
use super::exit::Exit;
use super::gap::{GapJson, gap_json};
use super::output::{Output, age, one, safe, time};
use super::policy::{self, PolicyJson, policy_json};
use super::respond::{StoppedRuleJson, stopped_rule_json};
use crate::api::{convert, proto};
use crate::config;
use crate::health::{Loss, Missing};

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    #[command(flatten)]
    output: Output,
}

// Long: each field is a key of the published JSON.
#[derive(Serialize)]
pub(super) struct StatusJson {
    schema: &'static str,
    pub(super) version: String,
    pub(super) node: String,
    pub(super) started_at: Timestamp,
    pub(super) complete: bool,
    pub(super) problems: Vec<String>,
    pub(super) endpoints: Vec<EndpointJson>,
    pub(super) containers_watched: u32,
    baselines: u32,
    baselines_verified: u32,
    baselines_pending: u32,
    baseline_queue: QueueJson,
    containers_without_baseline: u32,
    pub(super) findings: u64,
    pub(super) gate_answers: u64,
    data_writes: u64,
    /// Null until the daemon has begun to watch.
    pub(super) gate: Option<GateJson>,
    /// Changes that scans found, without the process that made them.
    left_to_sweeps: u64,
    /// Executions whose arguments the kernel had no room to record.
    arguments_unrecorded: u64,
    /// The same for programs of the host, which are not watched.
    arguments_unrecorded_of_host: u64,
    /// What waits to be examined, the oldest first.
    pub(super) backlogs: Vec<BacklogJson>,
    pub(super) losses: Vec<Loss>,
    /// What waits for the daemon's threads, and whether they make progress.
    threads: Vec<ThreadJson>,
    /// The times in which the view was incomplete: the open ones, then the newest.
    pub(super) gaps: Vec<GapJson>,
    /// Null if the pipeline does not reply, or the daemon has no rules yet.
    policy: Option<PolicyJson>,
    /// The rules whose answers are stopped: they only report.
    stopped_rules: Vec<StoppedRuleJson>,
    /// The store of evidence; null if the daemon is older.
    evidence: Option<EvidenceJson>,
    /// The runner of hooks, and what waits for it; null if the daemon is older.
    hooks: Option<HooksJson>,
    /// What this kernel lacks.
    missing: Vec<Missing>,
}

#[derive(Serialize)]
struct HooksJson {
    runner: Option<String>,
    waiting: u32,
    running: u32,
}

#[derive(Serialize)]
struct EvidenceJson {
    cases: u64,
    bytes: u64,
    /// What all cases may take.
    max_bytes: u64,
}

#[derive(Serialize)]
pub(super) struct BacklogJson {
    pub(super) container: String,
    stage: String,
    waiting: u64,
    pub(super) oldest_milliseconds: u64,
}

#[derive(Serialize)]
pub(super) struct ThreadJson {
    name: String,
    /// Null for a thread without a queue.
    queued: Option<u64>,
    /// For how long the oldest item has waited.
    oldest_seconds: f64,
    /// For how long the thread has been busy with one item without any progress.
    still_seconds: f64,
    stuck: bool,
}

/// Milliseconds as seconds.
pub(super) fn seconds(milliseconds: u64) -> f64 {
    Duration::from_millis(milliseconds).as_secs_f64()
}

#[derive(Serialize)]
pub(super) struct QueueJson {
    recording: u32,
    waiting: u32,
    oldest_seconds: u64,
    verifying: u32,
}

#[derive(Serialize)]
pub(super) struct GateJson {
    pub(super) mode: String,
    /// Why the mode is not the one in the settings.
    instead: Option<String>,
    ignored: u64,
    copy_ups: u64,
    denied: u64,
    undecided: u64,
    guarded: u64,
    unguarded: u64,
    reads_undecided: u64,
}

#[derive(Serialize)]
pub(super) struct EndpointJson {
    socket: String,
    pub(super) connected: bool,
    reason: Option<String>,
}

impl Status {
    pub(super) fn run(&self, socket: &Path) -> anyhow::Result<Exit> {
        let status = call(socket, proto::GetStatusRequest {}, Client::get_status)?;
        let status = status_json(status)?;
        one(&status, self.output.format, || text(&status, Timestamp::now()))?;
        Ok(if status.complete { Exit::Clean } else { Exit::Drift })
    }
}

// Long: one line for each key.
pub(super) fn status_json(status: proto::GetStatusResponse) -> anyhow::Result<StatusJson> {
    Ok(StatusJson {
        schema: "driftd.status/v1",
        started_at: convert::time_from_proto("started_at", status.started_at)?,
        version: status.version,
        node: status.node,
        complete: status.complete,
        problems: status.problems,
        endpoints: map(status.endpoints, |proto::Endpoint { socket, connected, reason }| {
            EndpointJson { socket, connected, reason: filled(reason) }
        }),
        containers_watched: status.containers_watched,
        baselines: status.baselines,
        baselines_verified: status.baselines_verified,
        baselines_pending: status.baselines_pending,
        baseline_queue: {
            let proto::BaselineQueue { recording, waiting, oldest_seconds, verifying } =
                status.baseline_queue.unwrap_or_default();
            QueueJson { recording, waiting, oldest_seconds, verifying }
        },
        containers_without_baseline: status.containers_without_baseline,
        findings: status.findings,
        gate_answers: status.gate_answers,
        data_writes: status.data_writes,
        gate: status.gate.map(|gate| GateJson {
            mode: gate.mode,
            instead: filled(gate.instead),
            ignored: gate.ignored,
            copy_ups: gate.copy_ups,
            denied: gate.denied,
            undecided: gate.undecided,
            guarded: gate.guarded,
            unguarded: gate.unguarded,
            reads_undecided: gate.reads_undecided,
        }),
        left_to_sweeps: status.left_to_sweeps,
        arguments_unrecorded: status.arguments_unrecorded,
        arguments_unrecorded_of_host: status.arguments_unrecorded_of_host,
        backlogs: map(status.backlogs, |backlog| {
            let proto::Backlog { container, stage, waiting, oldest_milliseconds } = backlog;
            BacklogJson { container, stage, waiting, oldest_milliseconds }
        }),
        losses: map(status.losses, |proto::Loss { name, count }| Loss { name, count }),
        threads: map(status.threads, |thread| ThreadJson {
            name: thread.name,
            queued: thread.queued,
            oldest_seconds: seconds(thread.oldest_milliseconds),
            still_seconds: seconds(thread.still_milliseconds),
            stuck: thread.stuck,
        }),
        gaps: status.gaps.iter().map(gap_json).collect::<anyhow::Result<_>>()?,
        policy: status.policy.map(policy_json).transpose()?,
        stopped_rules: status
            .stopped_rules
            .into_iter()
            .map(stopped_rule_json)
            .collect::<anyhow::Result<_>>()?,
        evidence: status.evidence.map(|proto::EvidenceStatus { cases, bytes, max_bytes }| {
            EvidenceJson { cases, bytes, max_bytes }
        }),
        hooks: status.hooks.map(|proto::HooksStatus { runner, waiting, running }| HooksJson {
            runner,
            waiting,
            running,
        }),
        missing: map(status.missing, |proto::Missing { name, since, meaning }| Missing {
            name,
            since,
            meaning,
        }),
    })
}

fn map<A, B>(items: Vec<A>, convert: impl FnMut(A) -> B) -> Vec<B> {
    items.into_iter().map(convert).collect()
}

/// `None` for empty text, which stands for no value in proto.
fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// The lines for people: a label, and a text. The label is empty in lines that continue.
struct Lines(String);

impl Lines {
    fn add(&mut self, label: &str, value: &str) {
        writeln!(self.0, "{label:<12}{value}").expect("writing to a String cannot fail");
    }
}

fn text(status: &StatusJson, now: Timestamp) -> String {
    let mut lines = Lines(String::new());
    add_view(&mut lines, status, now);
    add_counts(&mut lines, status);
    add_missing(&mut lines, status);
    lines.0
}

fn add_view(lines: &mut Lines, status: &StatusJson, now: Timestamp) {
    lines.add("View", if status.complete { "complete" } else { "INCOMPLETE" });
    for problem in &status.problems {
        lines.add("", &format!("- {}", safe(problem)));
    }
    let (version, node) = (safe(&status.version), safe(&status.node));
    let started = age(now, status.started_at);
    lines.add("driftd", &format!("{version} on {node}, started {started}"));
    for endpoint in &status.endpoints {
        let state = match &endpoint.reason {
            _ if endpoint.connected => "connected".to_owned(),
            Some(reason) => format!("NOT CONNECTED: {}", safe(reason)),
            None => "NOT CONNECTED".to_owned(),
        };
        lines.add("containerd", &format!("{} {state}", safe(&endpoint.socket)));
    }
}

fn add_counts(lines: &mut Lines, status: &StatusJson) {
    let without = match status.containers_without_baseline {
        0 => String::new(),
        count => format!(", {count} WITHOUT A BASELINE (driftd containers)"),
    };
    lines.add("Containers", &format!("{} watched{without}", status.containers_watched));
    lines.add(
        "Baselines",
        &format!(
            "{} recorded, {} of them verified, {} waited for",
            status.baselines, status.baselines_verified, status.baselines_pending
        ),
    );
    if let Some(queue) = queue(&status.baseline_queue) {
        lines.add("Queue", &queue);
    }
    if let Some(policy) = &status.policy {
        add_policy(lines, policy);
    }
    for stopped in &status.stopped_rules {
        let (rule, since) = (safe(&stopped.rule), time(stopped.since));
        lines.add("Answers", &format!("of rule {rule} STOPPED since {since}: it only reports"));
        lines.add("", &safe(&stopped.reason));
        lines.add("", &format!("go on with: driftd respond resume-answers {rule} --reason TEXT"));
    }
    if let Some(evidence) = status.evidence.as_ref().filter(|evidence| evidence.cases > 0) {
        let (bytes, most) = (size(evidence.bytes), size(evidence.max_bytes));
        let cases = evidence.cases;
        lines.add("Evidence", &format!("{cases} cases, {bytes} of {most} (driftd evidence ls)"));
    }
    if let Some(hooks) = &status.hooks {
        add_hooks(lines, hooks);
    }
    lines.add("Findings", &format!("{} kept (driftd findings)", status.findings));
    lines.add(
        "Seen",
        &format!("{} executions, {} writes of data", status.gate_answers, status.data_writes),
    );
    if let Some(gate) = &status.gate {
        lines.add("Gate", &gate_line(gate));
    }
    if status.left_to_sweeps > 0 {
        let count = status.left_to_sweeps;
        lines.add("", &format!("{count} changes came too fast to name their processes"));
    }
    if status.arguments_unrecorded > 0 {
        let count = status.arguments_unrecorded;
        lines.add("", &format!("the arguments of {count} executions could not be recorded"));
    }
}

/// The rules in force, and what a person has to do about them.
fn add_policy(lines: &mut Lines, policy: &PolicyJson) {
    lines.add("Policy", &policy::summary(policy));
    if let Some(refused) = &policy.refused {
        lines.add("", "REFUSED: the policy files as they are now. The rules before stay:");
        for fault in refused.lines() {
            lines.add("", &format!("- {}", safe(fault)));
        }
    }
    for end in &policy.ends {
        let (id, at) = (safe(&end.id), time(end.expires));
        let state = if end.expired { "HAS ENDED" } else { "ends soon" };
        lines.add("", &format!("the rule {id} {state}: {at}"));
    }
}

/// What is delayed, was lost or was never seen, and what the kernel lacks.
fn add_missing(lines: &mut Lines, status: &StatusJson) {
    for backlog in delayed(&status.backlogs) {
        lines.add("Delayed", &backlog);
    }
    for thread in status.threads.iter().filter_map(behind) {
        lines.add("Behind", &thread);
    }
    for loss in &status.losses {
        lines.add("Loss", &format!("{} ({} times)", safe(&loss.name), loss.count));
    }
    for gap in status.gaps.iter().take(MAX_GAPS) {
        lines.add("Incomplete", &interval(gap));
    }
    if status.gaps.len() > MAX_GAPS {
        lines.add("", &format!("and {} more (-o json)", status.gaps.len() - MAX_GAPS));
    }
    for missing in &status.missing {
        let (name, meaning) = (safe(&missing.name), safe(&missing.meaning));
        let since = safe(&missing.since);
        lines.add("Kernel", &format!("has no {name}: {meaning} (it comes with {since})"));
    }
}

/// Containers whose findings are delayed by more than a moment.
fn delayed(backlogs: &[BacklogJson]) -> Vec<String> {
    const MOST: usize = 8;
    const MOMENT: u64 = 1000;
    let mut late = backlogs.iter().filter(|backlog| backlog.oldest_milliseconds >= MOMENT);
    let shown = late.by_ref().take(MOST).map(|backlog| {
        let BacklogJson { container, stage, waiting, oldest_milliseconds } = backlog;
        let seconds = oldest_milliseconds / 1000;
        let (container, stage) = (safe(container), safe(stage));
        format!("findings of {container} by {seconds}s ({waiting} waiting in {stage})")
    });
    let mut lines: Vec<String> = shown.collect();
    let more = late.count();
    if more > 0 {
        lines.push(format!("and {more} more (-o json)"));
    }
    lines
}

/// How long a queue may be behind before people are shown it, in seconds.
const BEHIND: f64 = 2.0;

/// The line for a thread that is stuck or behind; `None` for others.
fn behind(thread: &ThreadJson) -> Option<String> {
    let ThreadJson { name, queued, oldest_seconds, still_seconds, stuck } = thread;
    let name = safe(name);
    if *stuck {
        return Some(format!("{name} IS STUCK: it has made no progress for {still_seconds:.0}s"));
    }
    let queued = queued.filter(|_| *oldest_seconds >= BEHIND)?;
    Some(format!("{name}: {queued} wait, the oldest for {oldest_seconds:.0}s"))
}

/// How many gaps people are shown.
const MAX_GAPS: usize = 8;

/// The line for a gap.
fn interval(gap: &GapJson) -> String {
    let whose = gap
        .container
        .as_ref()
        .map_or("every container".to_owned(), |container| safe(&container.to_string()));
    let until = match gap.until {
        Some(until) => format!("to {until}"),
        None => "until now".to_owned(),
    };
    format!("from {} {until}: {}, {whose}: {}", gap.at, safe(&gap.name), safe(&gap.detail))
}

fn add_hooks(lines: &mut Lines, hooks: &HooksJson) {
    let HooksJson { runner, waiting, running } = hooks;
    match runner {
        Some(runner) => {
            let runner = safe(runner);
            lines.add("Hooks", &format!("{running} run, {waiting} wait (runner: {runner})"));
        }
        None if *waiting > 0 => {
            lines.add("Hooks", &format!("{waiting} wait, and NO RUNNER is connected"));
            lines.add("", "start it: systemctl enable --now driftd-hooks");
        }
        None => (),
    }
}

fn gate_line(gate: &GateJson) -> String {
    let mut words = safe(&gate.mode);
    if gate.mode == config::Gate::Free.name() {
        let GateJson { ignored, copy_ups, .. } = gate;
        let more =
            format!(": {ignored} programs let through unasked, {copy_ups} asked about again");
        words.push_str(&more);
    }
    if gate.denied + gate.undecided > 0 {
        let GateJson { denied, undecided, .. } = gate;
        words.push_str(&format!(
            ", {denied} programs or reads denied, {undecided} without a decision"
        ));
    }
    if gate.unguarded > 0 {
        let unguarded = gate.unguarded;
        words.push_str(&format!(
            ", the reading of {unguarded} files cannot be denied (see: driftd doctor)"
        ));
    }
    if let Some(instead) = &gate.instead {
        words.push_str(&format!(", NOT AS IN THE SETTINGS: {}", safe(instead)));
    }
    words
}

/// The line for the recorder's work; `None` if there is none.
fn queue(queue: &QueueJson) -> Option<String> {
    let QueueJson { recording, waiting, oldest_seconds, verifying } = *queue;
    let mut words = Vec::new();
    if recording + waiting > 0 {
        words.push(format!("{recording} being recorded, {waiting} waiting"));
        words.push(format!("the oldest for {oldest_seconds}s"));
    }
    if verifying > 0 {
        words.push(format!("{verifying} layers to be verified"));
    }
    (!words.is_empty()).then(|| words.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(container: Option<crate::model::ContainerId>, until: Option<i64>) -> GapJson {
        GapJson {
            schema: "driftd.gap/v1",
            name: "pipeline_full".into(),
            at: Timestamp::from_second(7100).unwrap(),
            container,
            detail: "no room".into(),
            until: until.map(|second| Timestamp::from_second(second).unwrap()),
        }
    }

    #[test]
    fn status_shows_what_is_missing() {
        let status = StatusJson {
            schema: "driftd.status/v1",
            version: "0.1.0".into(),
            node: "node-1".into(),
            started_at: Timestamp::from_second(1000).unwrap(),
            complete: false,
            problems: vec!["containerd at /run/a.sock cannot be reached".into()],
            endpoints: vec![
                EndpointJson {
                    socket: "/run/a.sock".into(),
                    connected: false,
                    reason: Some("no such file".into()),
                },
                EndpointJson { socket: "/run/b.sock".into(), connected: true, reason: None },
            ],
            containers_watched: 3,
            baselines: 2,
            baselines_verified: 1,
            baselines_pending: 1,
            baseline_queue: QueueJson {
                recording: 1,
                waiting: 2,
                oldest_seconds: 75,
                verifying: 3,
            },
            containers_without_baseline: 1,
            findings: 7,
            gate_answers: 1234,
            data_writes: 9,
            gate: Some(GateJson {
                mode: "ask".into(),
                instead: Some("this kernel is Linux 5.10".into()),
                ignored: 0,
                copy_ups: 0,
                denied: 0,
                undecided: 0,
                guarded: 0,
                unguarded: 0,
                reads_undecided: 0,
            }),
            policy: Some(PolicyJson {
                generation: 4,
                version: Some("2026.11".into()),
                digest: Some(format!("blake3:{}", "5".repeat(64))),
                enforce: "dry-run".into(),
                rules: 12,
                refused: Some("/etc/driftd/policy.d/a.toml:3:1: no\u{1b}".into()),
                ends: vec![
                    policy::RuleEndJson {
                        id: "app-plugins".into(),
                        expires: Timestamp::from_second(9000).unwrap(),
                        expired: false,
                    },
                    policy::RuleEndJson {
                        id: "old".into(),
                        expires: Timestamp::from_second(900).unwrap(),
                        expired: true,
                    },
                ],
                profiles: vec!["apt".into(), "pip".into()],
                signed: Some("set 7".into()),
                container_profiles: vec!["npm".into()],
            }),
            left_to_sweeps: 12,
            arguments_unrecorded: 3,
            arguments_unrecorded_of_host: 70,
            backlogs: vec![
                BacklogJson {
                    container: "default/c\u{1b}1".into(),
                    stage: "large".into(),
                    waiting: 31,
                    oldest_milliseconds: 14_900,
                },
                BacklogJson {
                    container: "default/c2".into(),
                    stage: "content".into(),
                    waiting: 1,
                    oldest_milliseconds: 3,
                },
            ],
            losses: vec![Loss { name: "pipeline_full".into(), count: 2 }],
            threads: [("describe", Some(7), 3.2, 0.0, false), ("scan", Some(0), 0.0, 6.1, true)]
                .into_iter()
                .chain([("content", Some(1), 0.5, 0.5, false), ("trace", None, 0.0, 0.0, false)])
                .map(|(name, queued, oldest_seconds, still_seconds, stuck)| ThreadJson {
                    name: name.into(),
                    queued,
                    oldest_seconds,
                    still_seconds,
                    stuck,
                })
                .collect(),
            gaps: vec![
                gap(None, None),
                gap(Some(crate::model::ContainerId::new("default", "c\u{1b}1")), Some(7200)),
            ],
            stopped_rules: Vec::new(),
            evidence: None,
            hooks: Some(HooksJson { runner: None, waiting: 2, running: 0 }),
            missing: vec![Missing {
                name: "fanotify_mounts".into(),
                since: "Linux 6.14".into(),
                meaning: "it takes a moment".into(),
            }],
        };
        insta::assert_snapshot!(text(&status, Timestamp::from_second(8200).unwrap()));
    }
}
