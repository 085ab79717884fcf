//! `driftd show`: one finding or one session with everything that is known about it.
//!
//! Finds out which of both an ID is, and prints the finding. `story.rs` prints the session.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;
use tonic::{Code, Status};

use super::client::{Client, Server, explain, talk};
use super::describe::{Lines, number, pod, shell_word};
use super::exit::Exit;
use super::output::{Output, age, one, safe, short, size, time};
use super::story::Story;
use crate::api::{convert, proto};
use crate::history::AlsoIn;
use crate::model::{Expected, FileEvidence, FileType, Finding, Kind, Outcome};

#[derive(Debug, clap::Args)]
pub(super) struct Show {
    /// A finding's or a session's ID, or the beginning of it
    id: String,
    #[command(flatten)]
    output: Output,
}

enum Shown {
    Finding(Box<Whole>),
    Session(Box<Story>),
}

/// A finding, with the responses and the other containers that are known for it.
#[derive(Serialize)]
struct Whole {
    #[serde(flatten)]
    finding: Finding,
    #[serde(skip)]
    responses: Vec<proto::Response>,
    /// `None` from an older driftd.
    #[serde(skip_serializing_if = "Option::is_none")]
    also_in: Option<AlsoIn>,
}

impl Show {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let now = Timestamp::now();
        match talk(server, |client| find(client, self.id))? {
            Shown::Finding(whole) => one(&whole, self.output.format, || text(&whole, now))?,
            Shown::Session(story) => one(&story, self.output.format, || story.text(now))?,
        }
        Ok(Exit::Clean)
    }
}

/// What `driftd show` prints for people.
pub(super) async fn text_of(client: Client, id: String) -> anyhow::Result<String> {
    let now = Timestamp::now();
    Ok(match find(client, id).await? {
        Shown::Finding(whole) => text(&whole, now),
        Shown::Session(story) => story.text(now),
    })
}

/// The one finding or session whose ID begins with `id`.
async fn find(mut client: Client, id: String) -> anyhow::Result<Shown> {
    // An older driftd has no sessions.
    let is_none = |status: &Status| matches!(status.code(), Code::NotFound | Code::Unimplemented);
    let finding =
        client.get_finding(proto::GetFindingRequest { id: id.clone(), as_json: true }).await;
    let session =
        client.get_session(proto::GetSessionRequest { id: id.clone(), as_json: true }).await;
    match (finding, session) {
        (Ok(reply), Err(status)) if is_none(&status) => {
            let reply = reply.into_inner();
            let finding =
                reply.finding.ok_or_else(|| anyhow::anyhow!("driftd returned no finding"))?;
            Ok(Shown::Finding(Box::new(Whole {
                finding: convert::finding_from_proto(finding)?,
                responses: reply.responses,
                also_in: reply.also_in.as_ref().map(convert::also_in_from_proto),
            })))
        }
        (Err(status), Ok(reply)) if is_none(&status) => {
            let story = Story::fetch(&mut client, reply.into_inner()).await?;
            Ok(Shown::Session(Box::new(story)))
        }
        (Ok(_), Ok(_)) => Err(anyhow::anyhow!(
            "`{}` could be a finding or a session: write more of the ID",
            safe(&id)
        )),
        (Err(status), Err(other)) if is_none(&status) && is_none(&other) => Err(anyhow::anyhow!(
            "no finding or session `{}` (see: driftd findings, driftd sessions)",
            safe(&id)
        )),
        (Err(status), Err(other)) if is_none(&status) => Err(explain(other)),
        (Err(status), _) | (_, Err(status)) => Err(explain(status)),
    }
}

/// What a kind means, in a sentence.
pub(super) fn sentence(kind: Kind) -> &'static str {
    match kind {
        Kind::ExecNew => "A program was executed that is not in the image.",
        Kind::ExecModified => "A program of the image was executed with other content.",
        Kind::ExecRelocated => "A program of the image was executed from another path.",
        Kind::ExecScript => "A script was executed that is not in the image, or was changed.",
        Kind::ExecInterpreted => {
            "An interpreter of the image was started on a script that is not the image's."
        }
        Kind::ExecFileless => "A program was executed from memory, without a file.",
        Kind::ExecTmpfs => "A program was executed from a tmpfs.",
        Kind::ExecVolume => "A program was executed from a volume or another mount.",
        Kind::ExecDeleted => "A program is running whose file is gone and never was the image's.",
        Kind::LibraryLoaded => "A program loaded code that is not the image's.",
        Kind::FileAdded => "A program was written that is not in the image.",
        Kind::FileModified => "A program of the image was changed.",
        Kind::FileRelocated => "A file of the image was copied or moved to another path.",
        Kind::FileRemoved => "A program of the image was removed.",
        Kind::FilePrivileged => {
            "A file has a setuid or setgid bit or a capability that the image does not give it."
        }
        Kind::FilePersistence => {
            "A file was changed that makes something run later, or gives access."
        }
        Kind::PackageTransaction => "A package manager changed what is installed.",
        Kind::ShellReverse => "The input and output of a shell are a network connection.",
        Kind::SessionInteractive => "A process entered the container, with a terminal.",
        Kind::SessionExec => "A process entered the container, without a terminal.",
        Kind::NamespaceEntered => {
            "A process of the host's has joined the container's namespaces, past its runtime."
        }
        Kind::BaselineTampered => "A layer on this node does not hold what its image says.",
        Kind::BaselineUnavailable => "The container cannot be compared with its image.",
    }
}

fn text(whole: &Whole, now: Timestamp) -> String {
    let finding = &whole.finding;
    let mut lines = Lines(format!(
        "{} {}\n{}\n\n",
        finding.severity.name().to_uppercase(),
        finding.kind,
        sentence(finding.kind)
    ));
    add_when_and_where(&mut lines, finding, now);
    add_files(&mut lines, whole);
    if let Some(process) = &finding.process {
        lines.add_process(process);
    }
    let links = [
        ("Session", finding.session.map(|id| id.to_string())),
        ("Before", finding.story.map(|id| id.to_string())),
        ("Brought by", finding.transaction.map(|id| id.to_string())),
    ];
    for (label, id) in links {
        if let Some(id) = id {
            lines.add(label, &format!("{id} (driftd show {})", short(&id)));
        }
    }
    add_responses(&mut lines, whole);
    if let Some(attack) = &finding.attack {
        let (technique, tactic) = (safe(&attack.technique), safe(&attack.tactic));
        lines.add("ATT&CK", &format!("{technique} ({tactic})"));
    }
    lines.0 + &next_steps(finding)
}

fn add_when_and_where(lines: &mut Lines, finding: &Finding, now: Timestamp) {
    lines.add("Finding", &format!("{} (revision {})", finding.id, finding.revision));
    let count = match finding.count {
        1 => "once".to_owned(),
        count => format!("{count} times"),
    };
    lines.add("Seen", &format!("{count}, by the {}", safe(&finding.source)));
    lines.add("  first", &time(finding.first_seen));
    lines.add("  last", &format!("{} ({})", time(finding.last_seen), age(now, finding.last_seen)));
    lines.add("Node", &safe(&finding.node));
    if let Some(container) = &finding.container {
        lines.add("Container", &container.id.to_string());
        if container.pod.is_some() {
            lines.add("Pod", &pod(container.pod.as_ref()));
        }
    } else {
        lines.add("Container", "none that is watched uses this layer");
    }
    if let Some(files) = finding.files {
        let list = format!("driftd members {}", short(&finding.id.to_string()));
        lines.add("Stands for", &format!("{} ({list})", number(files, "file")));
    }
    if let Some(detail) = &finding.detail {
        lines.add("Detail", &safe(detail));
    }
    lines.add("Image", &safe(finding.image.name.as_deref().unwrap_or("unknown")));
    if let Some(digest) = finding.image.manifest_digest {
        lines.add("", &digest.to_string());
    }
}

/// What the image has, what was found, and where else the content was found.
fn add_files(lines: &mut Lines, Whole { finding, also_in, .. }: &Whole) {
    if let Some(expected) = &finding.expected {
        add_expected(lines, expected);
    } else if finding.file.is_some() {
        lines.add("Expected", "nothing: the image has no such file");
    }
    if let Some(file) = &finding.file {
        add_file(lines, file, if finding.files.is_some() { "First" } else { "Found" });
        if let Some(expected) = &finding.expected {
            lines.add("Differs in", &differences(expected, file));
        }
        if let (Some(also_in), Some(content)) = (also_in, file.blake3) {
            add_also_in(lines, also_in, &content.to_string());
        }
    }
    if let Some(name) = &finding.invoked_as {
        lines.add("Called as", &safe(name));
    }
}

/// The verdict on the finding, and what was done to its container.
fn add_responses(lines: &mut Lines, Whole { finding, responses, .. }: &Whole) {
    let rule = finding.verdict.rule.as_deref().unwrap_or("the default");
    lines.add("Verdict", &format!("{}, by {}", finding.verdict.disposition, safe(rule)));
    if let Some(severity) = finding.verdict.unchanged_severity {
        lines.add("", &format!("a rule has changed the severity: it was {severity}"));
    }
    if let Some(action) = finding.verdict.action.as_deref().filter(|_| finding.verdict.dry_run) {
        lines.add("", &format!("{} is not carried out: policy.enforce is dry-run", safe(action)));
    }
    match &finding.outcome {
        None if responses.is_empty() => lines.add("Outcome", "none: nothing was done"),
        // The responses follow.
        None => (),
        Some(outcome) => lines.add("Outcome", &done(outcome)),
    }
    for response in responses {
        let Some(outcome) =
            response.outcome.clone().and_then(|outcome| convert::outcome_from_proto(outcome).ok())
        else {
            continue;
        };
        lines.add("Response", &done(&outcome));
        lines.add("", &format!("asked by {}", safe(&response.requested_by)));
        lines.add("", &format!("because {}", safe(&response.reason)));
    }
}

fn done(outcome: &Outcome) -> String {
    let result = if outcome.succeeded { "done" } else { "FAILED" };
    let (action, message) = (safe(&outcome.action), safe(&outcome.message));
    format!("{action} {result}: {message} ({})", time(outcome.at))
}

fn add_expected(lines: &mut Lines, expected: &Expected) {
    lines.add("Expected", &expected.path.to_string());
    lines.add(
        "",
        &format!(
            "mode {}, owner {}:{}, {}",
            safe(&expected.mode),
            expected.uid,
            expected.gid,
            size(expected.size)
        ),
    );
    add_content(lines, expected.blake3, expected.sha256, expected.capability.as_deref());
    lines.add("", &format!("layer  {}", safe(&expected.layer)));
}

fn add_file(lines: &mut Lines, file: &FileEvidence, label: &str) {
    let deleted = if file.deleted { " (deleted)" } else { "" };
    lines.add(label, &format!("{}{deleted}", file.path));
    lines.add(
        "",
        &format!(
            "mode {}, owner {}:{}, {}, {}",
            safe(&file.mode),
            file.uid,
            file.gid,
            size(file.size),
            match file.file_type {
                FileType::Regular => file.format.name(),
                other => convert::file_type_name(other),
            },
        ),
    );
    add_content(lines, file.blake3, file.sha256, file.capability.as_deref());
    if let Some(reason) = &file.unhashed {
        lines.add("", &format!("not hashed: {}", safe(reason)));
    }
}

fn add_also_in(lines: &mut Lines, also_in: &AlsoIn, content: &str) {
    if also_in.containers == 0 {
        return;
    }
    let list = format!("driftd findings --hash {}", short(content));
    let containers = number(also_in.containers.into(), "container");
    lines.add("Also in", &format!("{containers} ({list})"));
    for container in also_in.newest.iter().take(3) {
        lines.add("", &safe(&container.to_string()));
    }
}

fn add_content(
    lines: &mut Lines,
    blake3: Option<crate::model::Blake3Hash>,
    sha256: Option<crate::model::Sha256Hash>,
    capability: Option<&str>,
) {
    if let Some(hash) = blake3 {
        lines.add("", &format!("blake3 {hash}"));
    }
    if let Some(hash) = sha256 {
        lines.add("", &format!("sha256 {hash}"));
    }
    if let Some(capability) = capability {
        lines.add("", &format!("capability {}", safe(capability)));
    }
}

/// In which respects a file is not as the image has it.
pub(super) fn differences(expected: &Expected, file: &FileEvidence) -> String {
    let content = match (expected.blake3, file.blake3) {
        (Some(one), Some(other)) => one != other,
        // Without hashes, only sizes that differ prove another content.
        (_, _) => expected.size != file.size,
    };
    let all = [
        ("path", expected.path != file.path),
        ("content", content),
        ("mode", expected.mode != file.mode),
        ("owner", (expected.uid, expected.gid) != (file.uid, file.gid)),
        ("capability", expected.capability != file.capability),
    ];
    let names: Vec<&str> =
        all.iter().filter(|(_, differs)| *differs).map(|(name, _)| *name).collect();
    if names.is_empty() { "nothing".into() } else { names.join(", ") }
}

fn next_steps(finding: &Finding) -> String {
    let Some(container) = finding.container_id() else { return String::new() };
    let container = shell_word(&short(&safe(&container.id)));
    let mut text =
        format!("\nNext:\n  driftd diff {container}\n  driftd findings --container {container}\n");
    // There is nothing to respond to once that run of the container has ended.
    let is_over = finding
        .outcome
        .as_ref()
        .is_some_and(|outcome| outcome.gone || (outcome.succeeded && outcome.action == "kill"));
    if !is_over {
        let id = short(&finding.id.to_string());
        // The finding stands for that run of the container only. The container's name would
        // stand for a later run as well.
        let (target, why) = match finding.run {
            Some(_) => (format!("--finding {id}"), "it is drift".to_owned()),
            None => (container, format!("finding {id}")),
        };
        for action in ["pause", "kill"] {
            writeln!(text, "  driftd respond {action} {target} --reason '{why}'")
                .expect("writing to a String cannot fail");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::findings::tests::samples;
    use crate::model::{ContainerId, Incarnation};

    #[test]
    fn a_finding_as_a_person_sees_it() {
        let now = "2026-11-20T10:08:30Z".parse().unwrap();
        let [modified, session, hostile]: [Finding; 3] = samples().try_into().unwrap();
        let killed = proto::Response {
            outcome: Some(convert::outcome_to_proto(Outcome {
                action: "kill".into(),
                succeeded: true,
                gone: false,
                message: "killed (pid 4100, exit status 137)".into(),
                restarter: None,
                at: now,
            })),
            reason: "who is\x1b[2J this".into(),
            requested_by: "uid 0 pid 77 (/usr/bin/driftd)".into(),
            requested_at: Some(convert::time_to_proto(now)),
            ..Default::default()
        };
        let whole = |finding: &Finding| Whole {
            finding: finding.clone(),
            responses: Vec::new(),
            also_in: Some(AlsoIn::default()),
        };
        let many = AlsoIn {
            containers: 12,
            newest: ["web", "shop\x1b[2J", "pay", "mail"]
                .map(|id| ContainerId::new("default", id))
                .into(),
        };
        insta::assert_snapshot!(text(&Whole { also_in: Some(many), ..whole(&modified) }, now));
        let run = Some(Incarnation { pid: 4100, start_time: Some(7), created_at: None });
        let shown = text(&whole(&Finding { run, ..modified.clone() }), now);
        let id = short(&modified.id.to_string());
        assert!(shown.contains(&format!("driftd respond kill --finding {id} --reason")), "{shown}");
        insta::assert_snapshot!(text(&Whole { responses: vec![killed], ..whole(&session) }, now));
        insta::assert_snapshot!(text(&whole(&hostile), now));
    }
}
