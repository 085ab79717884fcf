//! What a report says, in words, in the order in which it is read.
//!
//! Pure. `html.rs` and `markdown.rs` render the same page, so both say the same.

use jiff::Timestamp;
use jiff::tz::TimeZone;

use super::drawing::{Drawing, draw, unseen_in_words};
use super::events::{self, Events};
use super::found::{self, FindingText, process_in_short};
use super::model::{Counts, Report, SessionPart};
use super::phrase::{At, Phrase, Row, at, own, quoted, result_of};
use crate::cli::describe::{number, pod, program, shell_word};
use crate::cli::output::{safe, short, time};
use crate::cli::sessions::{entry, result, user};
use crate::cli::{policy, story, timeline};
use crate::model::{SessionState, Severity};

#[derive(Debug)]
pub(super) struct Page {
    pub(super) title: Phrase,
    pub(super) about: Phrase,
    pub(super) tiles: Vec<Tile>,
    /// The whole report in some sentences.
    pub(super) summary: Vec<Phrase>,
    pub(super) drawing: Option<Drawing>,
    pub(super) events: Events,
    pub(super) sessions: Section<SessionText>,
    pub(super) findings: Section<FindingText>,
    pub(super) responses: Section<ResponseText>,
    pub(super) gaps: Vec<GapText>,
    pub(super) unseen: Vec<Phrase>,
    pub(super) container: Vec<Row>,
    pub(super) rules: Vec<RuleText>,
    pub(super) made: Vec<Row>,
}

/// A list, and what is said about it: what it leaves out, or why it is empty.
#[derive(Debug)]
pub(super) struct Section<T> {
    pub(super) list: Vec<T>,
    pub(super) note: Option<Phrase>,
}

/// A number that is seen first.
#[derive(Debug)]
pub(super) struct Tile {
    /// The name of a severity, `good`, `bad` or `plain`.
    pub(super) class: &'static str,
    pub(super) value: String,
    pub(super) label: String,
}

#[derive(Debug)]
pub(super) struct SessionText {
    pub(super) id: String,
    pub(super) title: Phrase,
    pub(super) sentence: String,
    pub(super) rows: Vec<Row>,
    pub(super) commands: Vec<CommandText>,
    pub(super) commands_note: String,
}

#[derive(Debug)]
pub(super) struct CommandText {
    pub(super) number: u64,
    pub(super) at: At,
    pub(super) command: Phrase,
    pub(super) end: String,
}

#[derive(Debug)]
pub(super) struct ResponseText {
    pub(super) at: At,
    pub(super) what: Phrase,
    pub(super) result: &'static str,
    pub(super) message: Phrase,
    pub(super) asked_by: Phrase,
    pub(super) reason: Phrase,
}

#[derive(Debug)]
pub(super) struct GapText {
    pub(super) at: At,
    pub(super) until: String,
    pub(super) what: Phrase,
    pub(super) detail: Phrase,
    pub(super) place: &'static str,
}

#[derive(Debug)]
pub(super) struct RuleText {
    pub(super) id: Phrase,
    pub(super) findings: u64,
    pub(super) accepted: u64,
    pub(super) effect: Phrase,
    pub(super) reason: Phrase,
}

pub(super) fn page(report: &Report, zone: &TimeZone) -> Page {
    let id = &report.container.id;
    let title = match (report.session_id, report.case_id) {
        (None, None) => {
            own("Incident report: ").quoted(&format!("{}/{}", id.namespace, short(&id.id)))
        }
        (Some(id), _) => own("Incident report: session ").quoted(&short(&id.to_string())),
        (None, Some(id)) => own("Incident report: case ").quoted(&short(&id.to_string())),
    };
    Page {
        title,
        about: about(report),
        tiles: tiles(report),
        summary: summary(report),
        drawing: draw(report, zone),
        events: events::events(report),
        sessions: Section {
            list: report.sessions.iter().map(session_text).collect(),
            note: sessions_note(report),
        },
        findings: Section {
            list: report.findings.iter().map(|part| found::finding(part, report)).collect(),
            note: findings_note(report),
        },
        responses: Section { list: responses(report), note: Some(responses_note(report)) },
        gaps: gaps(report),
        unseen: unseen(report),
        container: container_rows(report),
        rules: rules(report),
        made: made(report),
    }
}

fn sessions_note(report: &Report) -> Option<Phrase> {
    let Counts { sessions, sessions_listed, .. } = report.counts;
    let what = "sessions, those that caused findings first";
    match sessions {
        0 => Some(own("No session was seen.")),
        all => left_out(all, sessions_listed, what, &listing(report, "sessions")),
    }
}

fn findings_note(report: &Report) -> Option<Phrase> {
    let Counts { findings, findings_listed, .. } = report.counts;
    match findings {
        0 => Some(own("Nothing was found.")),
        all => left_out(
            all,
            findings_listed,
            "findings, the worst first",
            &listing(report, "findings"),
        ),
    }
}

/// The command that lists all of them.
fn listing(report: &Report, command: &str) -> String {
    let mut text = match (command, report.session_id) {
        ("findings", Some(id)) => format!("driftd findings --session {id}"),
        (_, _) => {
            format!("driftd {command} --container {}", container_word(report))
        }
    };
    for (option, at) in [("since", report.period.since), ("until", report.period.until)] {
        text.extend(at.map(|at| format!(" --{option} {at}")));
    }
    text
}

/// What is not listed, and how it is.
fn left_out(all: u64, listed: u64, what: &str, command: &str) -> Option<Phrase> {
    (all > listed)
        .then(|| own(format!("Listed are {listed} of {all} {what}. All of them: ")).quoted(command))
}

fn about(report: &Report) -> Phrase {
    let container = &report.container;
    let is_of_container = report.session_id.is_none() && report.case_id.is_none();
    let mut about = match is_of_container {
        false => own("container ").quoted(&container.id.to_string()).own(", image "),
        true => own("image "),
    };
    about = match &container.image.name {
        Some(name) => about.quoted(name),
        None => about.own("unknown"),
    };
    if container.pod.is_some() {
        about = about.own(", pod ").quoted(&pod(container.pod.as_ref()));
    }
    match &report.made.node {
        Some(node) => about.own(", node ").quoted(node),
        None => about,
    }
}

fn tiles(report: &Report) -> Vec<Tile> {
    let counts = &report.counts;
    let tile = |class, value: String, label: &str| Tile { class, value, label: label.to_owned() };
    let mut tiles: Vec<Tile> = Vec::new();
    for severity in [Severity::Critical, Severity::High, Severity::Medium] {
        let count = counts.by_severity.get(&severity).copied().unwrap_or_default();
        let class = if count == 0 { "plain" } else { severity.name() };
        tiles.push(tile(class, count.to_string(), severity.name()));
    }
    let lower =
        [Severity::Low, Severity::Info].iter().filter_map(|one| counts.by_severity.get(one));
    tiles.push(tile("plain", lower.sum::<u64>().to_string(), "low and info"));
    let words = |count: u64, what: &str, rest: &str| {
        format!("{what}{}{rest}", if count == 1 { "" } else { "s" })
    };
    let (class, rest) = match counts.sessions_open {
        0 => ("plain", String::new()),
        open => ("bad", format!(", {open} open")),
    };
    let label = words(counts.sessions, "session", &rest);
    tiles.push(tile(class, counts.sessions.to_string(), &label));
    let failed = report.responses.iter().filter(|response| !response.outcome.succeeded).count();
    let (class, rest) = match (counts.responses, failed) {
        (0, _) => ("plain", String::new()),
        (_, 0) => ("good", ", done".to_owned()),
        (_, failed) => ("bad", format!(", {failed} not done")),
    };
    let label = words(counts.responses, "response", &rest);
    tiles.push(tile(class, counts.responses.to_string(), &label));
    let class = if counts.gaps == 0 { "good" } else { "bad" };
    let label = words(counts.gaps, "gap", " in the view");
    tiles.push(tile(class, counts.gaps.to_string(), &label));
    tiles
}

/// How many findings the summary names.
const NAMED: usize = 3;

fn summary(report: &Report) -> Vec<Phrase> {
    let counts = &report.counts;
    let mut all = Vec::new();
    if counts.findings == 0 {
        all.push(own("Nothing was found in this time."));
    }
    let worst = report.findings.first().map(|part| part.finding.severity);
    let most = report.findings.iter().filter(|part| Some(part.finding.severity) == worst);
    for part in most.clone().take(NAMED) {
        all.push(found::in_a_sentence(&part.finding, report));
    }
    let rest = counts.findings.saturating_sub(most.take(NAMED).count() as u64);
    if rest > 0 {
        all.push(own(format!("{}: see “What was found”.", number(rest, "more finding"))));
    }
    if counts.accepted > 0 {
        let accepted = number(counts.accepted, "more finding");
        let list = format!("{} --accepted", listing(report, "findings"));
        all.push(own(format!("Exceptions accept {accepted}, left out here: ")).quoted(&list));
    }
    all.push(sessions_in_short(report));
    all.push(match report.responses.last() {
        None => own("No response is recorded for this time."),
        Some(last) => own(match counts.responses {
            1 => "One response: ".to_owned(),
            several => format!("{several} responses, the last one: "),
        })
        .quoted(&last.outcome.action)
        .own(format!(
            " {} at {}.",
            result_of(last.outcome.succeeded, last.outcome.gone),
            time(last.outcome.at)
        )),
    });
    all.push(own(match counts.gaps {
        0 => "No gap in the view is recorded for this time.".to_owned(),
        gaps => format!(
            "The view had {} ({}): what happened then may be missing here.",
            number(gaps, "gap"),
            unseen_in_words(report)
        ),
    }));
    all
}

fn sessions_in_short(report: &Report) -> Phrase {
    let counts = &report.counts;
    if counts.sessions == 0 {
        return own("No session was seen: no user and no tool is known to have come in.");
    }
    let mut users: Vec<String> = Vec::new();
    let mut sessions: Vec<_> = report.sessions.iter().map(|part| &part.session).collect();
    sessions.sort_by_key(|session| std::cmp::Reverse(session.findings_total));
    for session in sessions {
        let user = user(session);
        if !user.is_empty() && !users.contains(&user) && users.len() < NAMED {
            users.push(user);
        }
    }
    let open = match counts.sessions_open {
        0 => "none is open".to_owned(),
        open => format!("{open} still open"),
    };
    let mut phrase = own(format!(
        "{} ({} with a terminal or a connection, {open})",
        number(counts.sessions, "session"),
        counts.sessions_interactive
    ));
    for (index, user) in users.iter().enumerate() {
        phrase = phrase.own(if index == 0 { ", for " } else { ", " }).quoted(user);
    }
    phrase.own(".")
}

fn session_text(part: &SessionPart) -> SessionText {
    let session = &part.session;
    let id = session.id.to_string();
    let mut title = own(entry(session.entry));
    let user = user(session);
    if !user.is_empty() {
        title = title.own(", ").quoted(&user);
    }
    title = match session.state {
        SessionState::Open => title.own(" (open)"),
        SessionState::Closed => title,
    };
    let process = &session.process;
    let first = process_in_short(process);
    let above = process.ancestors.iter().chain(&session.host);
    let above: Vec<Phrase> = above
        .map(|ancestor| {
            quoted(&program(ancestor.exe.as_deref(), ancestor.argv.as_deref()))
                .own(format!(", pid {}", ancestor.identity.pid))
        })
        .collect();
    let origin = story::origin(session).into_iter().map(|(what, name)| match name {
        Some(name) => own(format!("{what} ")).quoted(&name),
        None => own(what),
    });
    let mut rows: Vec<Row> = vec![
        ("Session", vec![quoted(&id)]),
        ("Origin", origin.collect()),
        ("Started", vec![own(time(session.started_at))]),
        ("Ended", vec![own(story::end(session))]),
        ("First process", vec![first]),
    ];
    if !above.is_empty() {
        rows.push(("Started by", above));
    }
    rows.push((
        "Findings",
        vec![match session.findings_total {
            0 => own("none"),
            total => own(format!("{total} ("))
                .quoted(&format!("driftd findings --session {}", short(&id)))
                .own(")"),
        }],
    ));
    let listed = part.commands.len() as u64;
    let total = session.commands.max(part.commands_kept);
    SessionText {
        title,
        sentence: story::sentence(session),
        rows,
        commands: part
            .commands
            .iter()
            .map(|command| command_text(command, session.state))
            .collect(),
        commands_note: match total {
            0 => "No command was seen.".to_owned(),
            total if total > part.commands_kept || total > listed => format!(
                "{}; {} kept, {listed} listed (all that are kept: driftd show {}).",
                number(total, "command"),
                part.commands_kept,
                short(&id)
            ),
            total => format!("{}.", number(total, "command")),
        },
        id,
    }
}

fn command_text(command: &crate::model::Command, state: SessionState) -> CommandText {
    let end = result(command.started_at, command.ended_at, command.exit);
    CommandText {
        number: command.number,
        at: at(command.started_at),
        command: quoted(&timeline::program(command)),
        end: end.unwrap_or_else(|| match state {
            SessionState::Open => "runs".to_owned(),
            SessionState::Closed => "its end was not seen".to_owned(),
        }),
    }
}

fn responses(report: &Report) -> Vec<ResponseText> {
    let text = |response: &timeline::ResponseJson| {
        let outcome = &response.outcome;
        let mut what = quoted(&outcome.action);
        if let Some(process) = response.process {
            what = what.own(format!(" pid {}", process.pid));
        }
        let mut message = quoted(&outcome.message);
        if let Some(restarter) = outcome.restarter {
            message = message.own(format!(" (starts it again: {restarter})"));
        }
        let mut reason = quoted(&response.reason);
        if let Some(finding) = response.finding {
            reason = reason.own(", finding ").then(found::link(finding, report));
        }
        ResponseText {
            at: at(outcome.at),
            what,
            result: result_of(outcome.succeeded, outcome.gone),
            message,
            asked_by: quoted(&response.requested_by),
            reason,
        }
    };
    report.responses.iter().map(text).collect()
}

fn responses_note(report: &Report) -> Phrase {
    let counts = &report.counts;
    match (counts.responses, counts.responses_listed) {
        (0, _) => own("No response is recorded for this time."),
        (all, listed) if all > listed => {
            own(format!("Listed are the newest {listed} of {all} responses. All of them: "))
                .quoted(&timeline_command(report))
        }
        (all, _) => own(format!("{}.", number(all, "response"))),
    }
}

fn timeline_command(report: &Report) -> String {
    format!("driftd timeline {}", container_word(report))
}

/// The container as one word of a command.
fn container_word(report: &Report) -> String {
    let id = &report.container.id;
    shell_word(&format!("{}/{}", safe(&id.namespace), short(&safe(&id.id))))
}

fn gaps(report: &Report) -> Vec<GapText> {
    let text = |gap: &crate::cli::gap::GapJson| GapText {
        at: at(gap.at),
        until: gap.until.map_or("not over".to_owned(), time),
        what: quoted(&gap.name),
        detail: quoted(&gap.detail),
        place: if gap.container.is_some() { "this container" } else { "any container" },
    };
    report.gaps.iter().map(text).collect()
}

/// What else may be missing.
fn unseen(report: &Report) -> Vec<Phrase> {
    let counts = &report.counts;
    let mut all = vec![own(match counts.gaps {
        0 => "No gap in the view is recorded for this time.".to_owned(),
        gaps => format!("{}: {}.", number(gaps, "gap"), unseen_in_words(report)),
    })];
    all.extend(left_out(
        counts.gaps,
        counts.gaps_listed,
        "gaps, the longest first",
        &timeline_command(report),
    ));
    if counts.unknown > 0 {
        all.push(own(format!(
            "{} of a kind that only a newer driftd knows: left out.",
            number(counts.unknown, "record")
        )));
    }
    if counts.commands > counts.commands_listed {
        all.push(own(format!(
            "Commands: {} were run in sessions, {} are listed.",
            counts.commands, counts.commands_listed
        )));
    }
    let view = &report.view;
    all.push(match view.complete {
        None => {
            own("The report was made from a history, which has no counters of what was lost: only \
             the gaps above.")
        }
        Some(true) => own("When the report was made, the view of the node was complete."),
        Some(false) => own("When the report was made, the view of the node was incomplete:"),
    });
    all.extend(view.problems.iter().take(20).map(|problem| quoted(problem)));
    for (name, count) in &view.losses {
        let since = view.daemon_started_at.map(|at| format!(" since {}", time(at)));
        all.push(
            own("Lost on the node: ")
                .quoted(name)
                .own(format!(", {count} times{}.", since.unwrap_or_default())),
        );
    }
    all.push(own(
        "driftd sees programs, files and sessions. It does not see network connections, system \
         calls, or code that is in no file.",
    ));
    all
}

fn container_rows(report: &Report) -> Vec<Row> {
    let container = &report.container;
    let unknown = || vec![own("unknown")];
    let mut rows: Vec<Row> = vec![
        ("Container", vec![quoted(&container.id.to_string())]),
        ("Image", container.image.name.as_deref().map_or_else(unknown, |name| vec![quoted(name)])),
    ];
    rows.extend(
        container.image.manifest_digest.map(|digest| ("Digest", vec![quoted(&digest.to_string())])),
    );
    rows.extend(
        container.image.chain_id.map(|chain| ("Chain ID", vec![quoted(&chain.to_string())])),
    );
    if let Some(pod) = &container.pod {
        let name = crate::cli::describe::pod(Some(pod));
        rows.push(("Pod", vec![quoted(&name), own("UID ").quoted(&pod.uid)]));
    }
    rows.extend(container.runtime.as_deref().map(|name| ("Runtime", vec![quoted(name)])));
    if !container.runs.is_empty() {
        let run = |run: &crate::model::Incarnation| {
            let created = run.created_at.map(|at| format!(", created {}", time(at)));
            own(format!("init pid {}{}", run.pid, created.unwrap_or_default()))
        };
        rows.push(("Runs", container.runs.iter().map(run).collect()));
    }
    if let Some(now) = &container.now {
        let pid = now.pid.map(|pid| format!(", init pid {pid}")).unwrap_or_default();
        let mut lines = vec![own(format!("{}{pid}", now.state))];
        if now.image.manifest_digest != container.image.manifest_digest {
            let name = now.image.name.as_deref().unwrap_or("unknown");
            lines.push(own("its image is another one now: ").quoted(name));
        }
        let baseline = own("baseline ").quoted(&now.baseline);
        lines.push(match &now.known_by {
            Some(by) => baseline.own(", known by ").quoted(by),
            None => baseline,
        });
        lines.push(own(if now.watched { "watched" } else { "NOT watched" }));
        lines.extend(now.problem.as_deref().map(|problem| own("problem: ").quoted(problem)));
        rows.push(("When the report was made", lines));
    }
    if !container.labels.is_empty() {
        let label = |(name, value): (&String, &String)| quoted(&format!("{name}={value}"));
        rows.push(("Labels", container.labels.iter().map(label).collect()));
    }
    rows
}

fn rules(report: &Report) -> Vec<RuleText> {
    let text = |rule: &super::model::RuleUsed| RuleText {
        id: quoted(&rule.id),
        findings: rule.findings,
        accepted: rule.accepted,
        effect: rule.effect.as_deref().map_or_else(|| own("unknown"), quoted),
        reason: match (&rule.reason, &rule.owner) {
            (Some(reason), Some(owner)) => quoted(reason).own(", owner ").quoted(owner),
            (Some(reason), None) => quoted(reason),
            (None, _) => own("unknown"),
        },
    };
    report.policy.rules.iter().map(text).collect()
}

fn made(report: &Report) -> Vec<Row> {
    let made = &report.made;
    let period = &report.period;
    let edge = |asked: Option<Timestamp>, seen: Option<Timestamp>, none: &str| match (asked, seen) {
        (Some(asked), _) => time(asked),
        (None, Some(seen)) => format!("{} ({none})", time(seen)),
        (None, None) => none.to_owned(),
    };
    let policy = &report.policy;
    let generations = match (policy.first_generation, policy.last_generation) {
        (Some(first), Some(last)) if first == last => format!("generation {first} has decided"),
        (Some(first), Some(last)) => format!("generations {first} to {last} have decided"),
        (_, _) => "no generation has decided about anything here".to_owned(),
    };
    let mut rules = vec![own(generations)];
    match &policy.now {
        Some(now) => {
            rules.push(own("in force when the report was made: ").quoted(&policy::summary(now)));
            rules.extend(now.digest.as_deref().map(quoted));
        }
        None => rules.push(own("the rules in force: not known without a daemon")),
    }
    vec![
        ("Made", vec![own(format!("{} by driftd {}", time(made.at), made.by))]),
        (
            "From",
            vec![match (made.from, &made.daemon) {
                ("daemon", Some(version)) => {
                    own("the daemon at ").quoted(&made.path).own(", driftd ").quoted(version)
                }
                ("daemon", None) => own("the daemon at ").quoted(&made.path),
                (_, _) => own("the history ").quoted(&made.path),
            }],
        ),
        ("Node", vec![made.node.as_deref().map_or_else(|| own("unknown"), quoted)]),
        (
            "Period",
            vec![own(format!(
                "{} to {}",
                edge(period.since, period.first, "the first record"),
                edge(period.until, period.last, "the last record")
            ))],
        ),
        ("Policy", rules),
    ]
}
