//! What a report says about one finding.
//!
//! Pure. The sentences about kinds are those of `driftd show`.

use super::model::{FindingPart, Report};
use super::phrase::{Phrase, Row, own, quoted, result_of};
use crate::api::convert;
use crate::cli::describe::{command_line, number, program};
use crate::cli::output::{short, size, time};
use crate::cli::sessions::user;
use crate::cli::show::{differences, sentence};
use crate::model::{
    Blake3Hash, Expected, FileEvidence, FileType, Finding, FindingId, Process, SessionId,
    Sha256Hash,
};

/// Parents of a process that are named.
const MOST_ANCESTORS: usize = 6;

#[derive(Debug)]
pub(super) struct FindingText {
    pub(super) id: String,
    pub(super) severity: &'static str,
    pub(super) kind: &'static str,
    pub(super) subject: Phrase,
    pub(super) sentence: &'static str,
    pub(super) rows: Vec<Row>,
}

/// What a finding is about: a file, or the command that was run.
pub(super) fn subject(finding: &Finding) -> Phrase {
    let subject = match (&finding.file, &finding.process) {
        (Some(file), _) => quoted(&file.path.to_string()),
        (None, Some(process)) => quoted(&command_line(process)),
        (None, None) => match &finding.detail {
            Some(detail) => quoted(detail),
            None => own("the container"),
        },
    };
    match finding.files {
        Some(files) => subject.own(format!(" ({})", number(files, "file"))),
        None => subject,
    }
}

/// A finding that the report may list.
pub(super) fn link(id: FindingId, report: &Report) -> Phrase {
    let text = id.to_string();
    match report.listed.contains(&id) {
        true => Phrase::default().link(format!("finding-{text}"), short(&text)),
        false => quoted(&short(&text)),
    }
}

/// A session that the report may list.
fn session_link(id: SessionId, report: &Report) -> Phrase {
    let text = id.to_string();
    match report.sessions.iter().any(|part| part.session.id == id) {
        true => Phrase::default().link(format!("session-{text}"), short(&text)),
        false => quoted(&short(&text)),
    }
}

/// The finding for the summary.
pub(super) fn in_a_sentence(finding: &Finding, report: &Report) -> Phrase {
    let severity = capitalised(finding.severity.name());
    let seen = format!(" First seen {}", time(finding.first_seen));
    let mut phrase = own(format!("{severity}: "))
        .then(subject(finding))
        .own(format!(". {}{seen}", sentence(finding.kind)));
    if let Some(id) = finding.session {
        phrase = phrase.own(", in session ").then(session_link(id, report));
        let part = report.sessions.iter().find(|part| part.session.id == id);
        let user = part.map(|part| user(&part.session)).unwrap_or_default();
        if !user.is_empty() {
            phrase = phrase.own(" (").quoted(&user).own(")");
        }
    }
    phrase.own(".")
}

fn capitalised(name: &str) -> String {
    let (first, rest) = name.split_at(1);
    first.to_uppercase() + rest
}

pub(super) fn finding(part: &FindingPart, report: &Report) -> FindingText {
    let finding = &part.finding;
    let mut rows: Vec<Row> = vec![("Seen", vec![seen(finding)])];
    if let Some(file) = &finding.file {
        rows.push(("The image has", expected(finding.expected.as_ref(), file)));
        rows.push(("Found", found(file)));
        if let Some(expected) = &finding.expected {
            rows.push(("Differs in", vec![own(differences(expected, file))]));
        }
    }
    rows.extend(members(part));
    if let Some(name) = &finding.invoked_as {
        rows.push(("Called as", vec![quoted(name)]));
    }
    if let Some(writer) = &finding.writer {
        rows.push(("Written by", process(writer)));
    }
    if let Some(by) = &finding.process {
        rows.push((if finding.kind.is_exec() { "Run as" } else { "Done by" }, process(by)));
    }
    if let Some(session) = finding.session {
        rows.push(("Session", vec![session_link(session, report)]));
    }
    let links = [("Before", finding.story), ("Brought by", finding.transaction)];
    for (label, id) in links {
        rows.extend(id.map(|id| (label, vec![link(id, report)])));
    }
    rows.push(("Answer", answer(finding)));
    if let Some(detail) = &finding.detail {
        rows.push(("Detail", vec![quoted(detail)]));
    }
    if let Some(attack) = &finding.attack {
        let technique = quoted(&attack.technique).own(" (").quoted(&attack.tactic).own(")");
        rows.push(("ATT&CK", vec![technique]));
    }
    let id = finding.id.to_string();
    rows.push(("Finding", vec![quoted(&id)]));
    FindingText {
        id,
        severity: finding.severity.name(),
        kind: finding.kind.name(),
        subject: subject(finding),
        sentence: sentence(finding.kind),
        rows,
    }
}

fn seen(finding: &Finding) -> Phrase {
    let first = time(finding.first_seen);
    let times = match finding.count {
        1 => format!("once, {first}, by the "),
        count => format!("{count} times, {first} to {}, first by the ", time(finding.last_seen)),
    };
    let seen = own(times).quoted(&finding.source);
    match finding.after_start_milliseconds {
        Some(after) if after < 120_000 => {
            seen.own(format!(", {} s after the container's start", after / 1000))
        }
        _ => seen,
    }
}

fn expected(expected: Option<&Expected>, file: &FileEvidence) -> Vec<Phrase> {
    let Some(expected) = expected else {
        return vec![own("nothing: the image has no such file")];
    };
    let mut lines = Vec::new();
    if expected.path != file.path {
        lines.push(own("at ").quoted(&expected.path.to_string()));
    }
    lines.extend(hashes(expected.blake3, expected.sha256));
    let owner = format!("{}:{}", expected.uid, expected.gid);
    let mut attributes = own("mode ").quoted(&expected.mode);
    attributes = attributes.own(format!(", owner {owner}, {}", size(expected.size)));
    if let Some(capability) = &expected.capability {
        attributes = attributes.own(", capability ").quoted(capability);
    }
    lines.push(attributes);
    lines.push(own("layer ").quoted(&expected.layer));
    lines
}

fn found(file: &FileEvidence) -> Vec<Phrase> {
    let mut lines = hashes(file.blake3, file.sha256);
    let kind = match file.file_type {
        FileType::Regular => file.format.name(),
        other => convert::file_type_name(other),
    };
    let deleted = if file.deleted { ", deleted" } else { "" };
    let mut attributes = own("mode ").quoted(&file.mode);
    attributes = attributes.own(format!(
        ", owner {}:{}, {}, {kind}{deleted}, on ",
        file.uid,
        file.gid,
        size(file.size)
    ));
    attributes = attributes.quoted(&file.filesystem);
    if let Some(capability) = &file.capability {
        attributes = attributes.own(", capability ").quoted(capability);
    }
    lines.push(attributes);
    lines.extend(file.unhashed.as_deref().map(|reason| own("not hashed: ").quoted(reason)));
    lines
}

fn hashes(blake3: Option<Blake3Hash>, sha256: Option<Sha256Hash>) -> Vec<Phrase> {
    let mut lines = Vec::new();
    lines.extend(blake3.map(|hash| own("BLAKE3 ").quoted(&hash.to_string())));
    lines.extend(sha256.map(|hash| own("SHA-256 ").quoted(&hash.to_string())));
    lines
}

/// The first files of an aggregated finding.
fn members(part: &FindingPart) -> Option<Row> {
    let files = part.finding.files?;
    let mut lines: Vec<Phrase> = part
        .members
        .iter()
        .map(|member| {
            let gone = if member.removed { ", gone again" } else { "" };
            quoted(&member.path.to_string()).own(format!(" ({}{gone})", member.kind))
        })
        .collect();
    if files > lines.len() as u64 {
        let id = short(&part.finding.id.to_string());
        lines.push(
            own(format!("{} in all: ", number(files, "file")))
                .quoted(&format!("driftd members {id}")),
        );
    }
    Some(("Stands for", lines))
}

/// The program of a process, its pid, its user and its terminal.
pub(super) fn process_in_short(process: &Process) -> Phrase {
    let mut text = quoted(&program(process.exe.as_deref(), process.argv.as_deref()))
        .own(format!(", pid {}", process.identity.pid));
    if let Some(uid) = process.uid {
        text = text.own(format!(", uid {uid}"));
    }
    if let Some(tty) = &process.tty {
        text = text.own(", terminal ").quoted(tty);
    }
    text
}

fn process(process: &Process) -> Vec<Phrase> {
    let mut first = process_in_short(process);
    if let Some(root) = &process.root {
        first = first.own(", root ").quoted(root);
    }
    let mut lines = vec![first];
    for ancestor in process.ancestors.iter().take(MOST_ANCESTORS) {
        let program = program(ancestor.exe.as_deref(), ancestor.argv.as_deref());
        let pid = ancestor.identity.pid;
        lines.push(own("child of ").quoted(&program).own(format!(", pid {pid}")));
    }
    match process.ancestors.len().saturating_sub(MOST_ANCESTORS) {
        0 => (),
        more => lines.push(own(format!("and {more} more above"))),
    }
    lines
}

/// What the rules decided, and what was done.
fn answer(finding: &Finding) -> Vec<Phrase> {
    let verdict = &finding.verdict;
    let mut lines = Vec::new();
    let decided = own(format!("{}, by ", verdict.disposition));
    lines.push(match &verdict.rule {
        Some(rule) => decided.own("rule ").quoted(rule),
        None => decided.own("the default"),
    });
    if let Some(severity) = verdict.unchanged_severity {
        lines.push(own(format!("a rule has changed the severity: it was {severity}")));
    }
    for answer in verdict.answers.iter().filter(|answer| answer.dry_run) {
        let line = own(format!("{} is not carried out (dry-run), rule ", answer.action.name()));
        lines.push(line.quoted(&answer.rule));
    }
    if let Some(outcome) = &finding.outcome {
        let result = result_of(outcome.succeeded, outcome.gone);
        lines.push(
            quoted(&outcome.action)
                .own(format!(" {result}: "))
                .quoted(&outcome.message)
                .own(format!(" ({})", time(outcome.at))),
        );
    }
    lines
}
