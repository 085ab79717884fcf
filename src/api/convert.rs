//! Model to proto and back, and nothing else.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use prost::Message as _;

use super::proto;
use crate::history::{AlsoIn, Happened, TimelineEntry};
use crate::model::finding::{ContainerEvidence, MEMBER_SCHEMA};
use crate::model::session::{COMMAND_SCHEMA, PROBE_SCHEMA, SESSION_SCHEMA};
use crate::model::{
    self, Ancestor, Attack, Command, ContainerId, Entry, Exit, Expected, FileEvidence, FileType,
    Finding, Format, ImageReference, Incarnation, Interactive, Labels, Login, Member, Outcome, Pod,
    Probe, ProbeSource, Process, ProcessIdentity, Restarter, RootfsPath, Session, SessionState,
    Severity, Verdict,
};
use crate::pipeline::{ContainerView, Diff, Difference, DifferenceKind, EndpointView};
use crate::respond::{Action, Response};

/// A message that this version of driftd cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is missing or not understood{detail} (is the other side another version?)")]
pub struct Malformed {
    field: &'static str,
    detail: String,
}

fn missing(field: &'static str) -> Malformed {
    Malformed { field, detail: String::new() }
}

fn malformed<E: std::fmt::Display>(field: &'static str) -> impl Fn(E) -> Malformed {
    move |err| Malformed { field, detail: format!(": {err}") }
}

// ---- findings

pub fn finding_to_proto(finding: Finding) -> proto::Finding {
    let Finding {
        schema: _,
        id,
        revision,
        kind,
        severity,
        first_seen,
        last_seen,
        count,
        source,
        node,
        runtime,
        container,
        run,
        image,
        file,
        expected,
        process,
        invoked_as,
        session,
        story,
        transaction,
        files,
        verdict,
        outcome,
        attack,
        detail,
    } = finding;
    let (container, labels, pod) = match container {
        Some(ContainerEvidence { id, labels, pod }) => (Some(id), labels, pod),
        None => (None, Labels::default(), None),
    };
    let text = |text: Option<&Arc<str>>| text.map(ToString::to_string).unwrap_or_default();
    proto::Finding {
        id: id.to_string(),
        revision,
        kind: kind.name().into(),
        severity: severity_to_proto(severity).into(),
        first_seen: Some(time_to_proto(first_seen)),
        last_seen: Some(time_to_proto(last_seen)),
        count,
        source,
        node,
        runtime,
        namespace: text(container.as_ref().map(|id| &id.namespace)),
        container: text(container.as_ref().map(|id| &id.id)),
        labels: labels_to_proto(labels),
        pod: pod.map(pod_to_proto),
        image: Some(image_to_proto(&image)),
        file: file.map(file_to_proto),
        expected: expected.map(expected_to_proto),
        process: process.map(process_to_proto),
        run: run.map(incarnation_to_proto),
        invoked_as,
        session: session.map(|id| id.to_string()),
        story: story.map(|id| id.to_string()),
        transaction: transaction.map(|id| id.to_string()),
        files,
        verdict: Some(proto::Verdict {
            disposition: verdict.disposition.name().into(),
            action: verdict.action,
            rule: verdict.rule,
            policy_generation: verdict.policy_generation,
        }),
        outcome: outcome.map(outcome_to_proto),
        attack: attack.map(|Attack { technique, tactic }| proto::Attack { technique, tactic }),
        detail,
    }
}

fn labels_to_proto(labels: Labels) -> HashMap<String, String> {
    BTreeMap::from(labels).into_iter().collect()
}

fn labels_from_proto(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect::<BTreeMap<_, _>>().into()
}

pub fn finding_from_proto(finding: proto::Finding) -> Result<Finding, Malformed> {
    let severity = finding.severity();
    let proto::Finding {
        id,
        revision,
        kind,
        severity: _,
        first_seen,
        last_seen,
        count,
        source,
        node,
        runtime,
        namespace,
        container,
        labels,
        pod,
        image,
        file,
        expected,
        process,
        invoked_as,
        run,
        session,
        story,
        transaction,
        files,
        verdict,
        outcome,
        attack,
        detail,
    } = finding;
    let verdict = verdict.ok_or_else(|| missing("verdict"))?;
    Ok(Finding {
        schema: model::finding::SCHEMA.into(),
        id: id.parse().map_err(malformed("id"))?,
        revision,
        kind: kind.parse().map_err(malformed("kind"))?,
        severity: severity_from_proto(severity).ok_or_else(|| missing("severity"))?,
        first_seen: time_from_proto("first_seen", first_seen)?,
        last_seen: time_from_proto("last_seen", last_seen)?,
        count,
        source,
        node,
        runtime,
        container: (!container.is_empty()).then(|| ContainerEvidence {
            id: ContainerId::new(&namespace, &container),
            labels: labels_from_proto(labels),
            pod: pod.map(pod_from_proto),
        }),
        run: run.map(incarnation_from_proto).transpose()?,
        image: image_from_proto(image.unwrap_or_default())?,
        file: file.map(file_from_proto).transpose()?,
        expected: expected.map(expected_from_proto).transpose()?,
        process: process.map(process_from_proto),
        invoked_as,
        session: parsed("session", session)?,
        story: parsed("story", story)?,
        transaction: parsed("transaction", transaction)?,
        files,
        verdict: Verdict {
            disposition: verdict.disposition.parse().map_err(malformed("disposition"))?,
            action: verdict.action,
            rule: verdict.rule,
            policy_generation: verdict.policy_generation,
        },
        outcome: outcome.map(outcome_from_proto).transpose()?,
        attack: attack.map(|proto::Attack { technique, tactic }| Attack { technique, tactic }),
        detail,
    })
}

pub fn also_in_to_proto(also_in: &AlsoIn) -> proto::AlsoIn {
    let newest = also_in.newest.iter().map(|container| proto::ContainerName {
        namespace: container.namespace.to_string(),
        container: container.id.to_string(),
    });
    proto::AlsoIn { containers: also_in.containers, newest: newest.collect() }
}

pub fn also_in_from_proto(also_in: &proto::AlsoIn) -> AlsoIn {
    let newest = also_in.newest.iter().map(|proto::ContainerName { namespace, container }| {
        ContainerId::new(namespace, container)
    });
    AlsoIn { containers: also_in.containers, newest: newest.collect() }
}

pub fn member_to_proto(member: &Member) -> proto::Member {
    proto::Member {
        path: member.path.as_bytes().to_vec(),
        kind: member.kind.name().into(),
        blake3: member.blake3.map(|hash| hash.to_string()),
        first_seen: Some(time_to_proto(member.first_seen)),
        last_seen: Some(time_to_proto(member.last_seen)),
        removed: member.removed,
    }
}

pub fn member_from_proto(member: proto::Member) -> Result<Member, Malformed> {
    Ok(Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: RootfsPath::new(member.path).map_err(malformed("member.path"))?,
        kind: member.kind.parse().map_err(malformed("member.kind"))?,
        blake3: parsed("member.blake3", member.blake3)?,
        first_seen: time_from_proto("member.first_seen", member.first_seen)?,
        last_seen: time_from_proto("member.last_seen", member.last_seen)?,
        removed: member.removed,
    })
}

fn file_to_proto(file: FileEvidence) -> proto::File {
    proto::File {
        path: file.path.as_bytes().to_vec(),
        file_type: file_type_name(file.file_type).into(),
        format: file.format.name().into(),
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: file.capability,
        blake3: file.blake3.map(|hash| hash.to_string()),
        sha256: file.sha256.map(|hash| hash.to_string()),
        unhashed: file.unhashed,
        deleted: file.deleted,
        filesystem: file.filesystem,
    }
}

fn file_from_proto(file: proto::File) -> Result<FileEvidence, Malformed> {
    Ok(FileEvidence {
        path: RootfsPath::new(file.path).map_err(malformed("file.path"))?,
        file_type: FILE_TYPES
            .into_iter()
            .find(|one| file_type_name(*one) == file.file_type)
            .ok_or_else(|| missing("file.file_type"))?,
        format: FORMATS
            .into_iter()
            .find(|one| one.name() == file.format)
            .ok_or_else(|| missing("file.format"))?,
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: file.capability,
        blake3: parsed("file.blake3", file.blake3)?,
        sha256: parsed("file.sha256", file.sha256)?,
        unhashed: file.unhashed,
        deleted: file.deleted,
        filesystem: file.filesystem,
    })
}

fn expected_to_proto(expected: Expected) -> proto::ExpectedFile {
    proto::ExpectedFile {
        path: expected.path.as_bytes().to_vec(),
        blake3: expected.blake3.map(|hash| hash.to_string()),
        sha256: expected.sha256.map(|hash| hash.to_string()),
        mode: expected.mode,
        uid: expected.uid,
        gid: expected.gid,
        size: expected.size,
        capability: expected.capability,
        layer: expected.layer,
    }
}

fn expected_from_proto(expected: proto::ExpectedFile) -> Result<Expected, Malformed> {
    Ok(Expected {
        path: RootfsPath::new(expected.path).map_err(malformed("expected.path"))?,
        blake3: parsed("expected.blake3", expected.blake3)?,
        sha256: parsed("expected.sha256", expected.sha256)?,
        mode: expected.mode,
        uid: expected.uid,
        gid: expected.gid,
        size: expected.size,
        capability: expected.capability,
        layer: expected.layer,
    })
}

fn process_to_proto(process: Process) -> proto::Process {
    proto::Process {
        pid: process.identity.pid,
        start_time: process.identity.start_time,
        exe: process.exe,
        argv: process.argv.map(|values| proto::Arguments { values }),
        uid: process.uid,
        tty: process.tty,
        root: process.root,
        ancestors: process.ancestors.into_iter().map(ancestor_to_proto).collect(),
    }
}

fn ancestor_to_proto(ancestor: Ancestor) -> proto::Ancestor {
    proto::Ancestor {
        pid: ancestor.identity.pid,
        start_time: ancestor.identity.start_time,
        exe: ancestor.exe,
        argv: ancestor.argv.map(|values| proto::Arguments { values }),
    }
}

fn ancestor_from_proto(ancestor: proto::Ancestor) -> Ancestor {
    Ancestor {
        identity: ProcessIdentity { pid: ancestor.pid, start_time: ancestor.start_time },
        exe: ancestor.exe,
        argv: ancestor.argv.map(|argv| argv.values),
    }
}

fn process_from_proto(process: proto::Process) -> Process {
    Process {
        identity: ProcessIdentity { pid: process.pid, start_time: process.start_time },
        exe: process.exe,
        argv: process.argv.map(|argv| argv.values),
        uid: process.uid,
        tty: process.tty,
        root: process.root,
        ancestors: process.ancestors.into_iter().map(ancestor_from_proto).collect(),
    }
}

pub fn outcome_to_proto(outcome: Outcome) -> proto::Outcome {
    proto::Outcome {
        action: outcome.action,
        succeeded: outcome.succeeded,
        gone: outcome.gone,
        message: outcome.message,
        restarter: match outcome.restarter {
            None => proto::Restarter::Unspecified,
            Some(Restarter::RestartMonitor) => proto::Restarter::RestartMonitor,
            Some(Restarter::Docker) => proto::Restarter::Docker,
            Some(Restarter::Kubelet) => proto::Restarter::Kubelet,
        }
        .into(),
        at: Some(time_to_proto(outcome.at)),
    }
}

pub fn outcome_from_proto(outcome: proto::Outcome) -> Result<Outcome, Malformed> {
    Ok(Outcome {
        restarter: match outcome.restarter() {
            proto::Restarter::Unspecified => None,
            proto::Restarter::RestartMonitor => Some(Restarter::RestartMonitor),
            proto::Restarter::Docker => Some(Restarter::Docker),
            proto::Restarter::Kubelet => Some(Restarter::Kubelet),
        },
        action: outcome.action,
        succeeded: outcome.succeeded,
        gone: outcome.gone,
        message: outcome.message,
        at: time_from_proto("outcome.at", outcome.at)?,
    })
}

pub fn response_to_proto(response: Response) -> proto::Response {
    proto::Response {
        outcome: Some(outcome_to_proto(response.outcome)),
        reason: response.reason,
        requested_by: response.requested_by,
        requested_at: Some(time_to_proto(response.requested_at)),
        finding: response.finding.map(|id| id.to_string()),
        namespace: response.container.namespace.to_string(),
        container: response.container.id.to_string(),
        incarnation: response.incarnation.map(incarnation_to_proto),
    }
}

fn incarnation_to_proto(incarnation: Incarnation) -> proto::Incarnation {
    let Incarnation { pid, start_time, created_at } = incarnation;
    proto::Incarnation { pid, start_time, created_at: created_at.map(time_to_proto) }
}

fn incarnation_from_proto(incarnation: proto::Incarnation) -> Result<Incarnation, Malformed> {
    let proto::Incarnation { pid, start_time, created_at } = incarnation;
    let created_at = optional_time_from_proto("incarnation.created_at", created_at)?;
    Ok(Incarnation { pid, start_time, created_at })
}

pub fn response_from_proto(response: proto::Response) -> Result<Response, Malformed> {
    let outcome = response.outcome.ok_or_else(|| missing("response.outcome"))?;
    Ok(Response {
        ticket: 0,
        incarnation: response.incarnation.map(incarnation_from_proto).transpose()?,
        container: ContainerId::new(&response.namespace, &response.container),
        reason: response.reason,
        requested_by: response.requested_by,
        requested_at: time_from_proto("response.requested_at", response.requested_at)?,
        finding: parsed("response.finding", response.finding)?,
        outcome: outcome_from_proto(outcome)?,
    })
}

// ---- sessions

pub fn session_to_proto(session: Session) -> proto::Session {
    let ContainerEvidence { id: container, labels, pod } = session.container;
    proto::Session {
        id: session.id.to_string(),
        revision: session.revision,
        state: state_to_proto(session.state).into(),
        node: session.node,
        runtime: session.runtime,
        namespace: container.namespace.to_string(),
        container: container.id.to_string(),
        labels: labels_to_proto(labels),
        pod: pod.map(pod_to_proto),
        image: Some(image_to_proto(&session.image)),
        entry: session.entry.name().into(),
        client: session.client,
        exec_id: session.exec_id,
        interactive: session.interactive.map(|how| how.name().into()),
        process: Some(process_to_proto(session.process)),
        host: session.host.into_iter().map(ancestor_to_proto).collect(),
        login: session
            .login
            .map(|Login { uid, audit_session }| proto::Login { uid, audit_session }),
        requested_by: session.requested_by,
        discovered: session.discovered,
        started_at: Some(time_to_proto(session.started_at)),
        ended_at: session.ended_at.map(time_to_proto),
        exit: session.exit.map(exit_to_proto),
        commands: session.commands,
        finding: session.finding.map(|id| id.to_string()),
        findings: session.findings.iter().map(ToString::to_string).collect(),
        findings_total: session.findings_total,
    }
}

pub fn session_from_proto(session: proto::Session) -> Result<Session, Malformed> {
    let state = state_from_proto(session.state()).ok_or_else(|| missing("session.state"))?;
    let interactive = session.interactive.map(|word| {
        named(Interactive::ALL, Interactive::name, &word)
            .ok_or_else(|| missing("session.interactive"))
    });
    let findings = session.findings.into_iter().map(|id| id.parse());
    Ok(Session {
        schema: SESSION_SCHEMA.into(),
        id: session.id.parse().map_err(malformed("session.id"))?,
        revision: session.revision,
        state,
        node: session.node,
        runtime: session.runtime,
        container: ContainerEvidence {
            id: ContainerId::new(&session.namespace, &session.container),
            labels: labels_from_proto(session.labels),
            pod: session.pod.map(pod_from_proto),
        },
        image: image_from_proto(session.image.unwrap_or_default())?,
        entry: named(Entry::ALL, Entry::name, &session.entry)
            .ok_or_else(|| missing("session.entry"))?,
        client: session.client,
        exec_id: session.exec_id,
        interactive: interactive.transpose()?,
        process: process_from_proto(session.process.ok_or_else(|| missing("session.process"))?),
        host: session.host.into_iter().map(ancestor_from_proto).collect(),
        login: session
            .login
            .map(|proto::Login { uid, audit_session }| Login { uid, audit_session }),
        requested_by: session.requested_by,
        discovered: session.discovered,
        started_at: time_from_proto("session.started_at", session.started_at)?,
        ended_at: optional_time_from_proto("session.ended_at", session.ended_at)?,
        exit: session.exit.map(exit_from_proto),
        commands: session.commands,
        finding: parsed("session.finding", session.finding)?,
        findings: findings.collect::<Result<_, _>>().map_err(malformed("session.findings"))?,
        findings_total: session.findings_total,
    })
}

pub fn state_to_proto(state: SessionState) -> proto::SessionState {
    match state {
        SessionState::Open => proto::SessionState::Open,
        SessionState::Closed => proto::SessionState::Closed,
    }
}

pub fn state_from_proto(state: proto::SessionState) -> Option<SessionState> {
    match state {
        proto::SessionState::Unspecified => None,
        proto::SessionState::Open => Some(SessionState::Open),
        proto::SessionState::Closed => Some(SessionState::Closed),
    }
}

fn exit_to_proto(exit: Exit) -> proto::ExitStatus {
    proto::ExitStatus { code: exit.code, signal: exit.signal }
}

fn exit_from_proto(exit: proto::ExitStatus) -> Exit {
    Exit { code: exit.code, signal: exit.signal }
}

pub fn command_to_proto(command: Command) -> proto::Command {
    proto::Command {
        session: command.session.to_string(),
        number: command.number,
        pid: command.process.pid,
        start_time: command.process.start_time,
        exe: command.exe,
        argv: command.argv.map(|values| proto::Arguments { values }),
        started_at: Some(time_to_proto(command.started_at)),
        ended_at: command.ended_at.map(time_to_proto),
        exit: command.exit.map(exit_to_proto),
    }
}

pub fn command_from_proto(command: proto::Command) -> Result<Command, Malformed> {
    Ok(Command {
        schema: COMMAND_SCHEMA.into(),
        session: command.session.parse().map_err(malformed("command.session"))?,
        number: command.number,
        process: ProcessIdentity { pid: command.pid, start_time: command.start_time },
        exe: command.exe,
        argv: command.argv.map(|argv| argv.values),
        started_at: time_from_proto("command.started_at", command.started_at)?,
        ended_at: optional_time_from_proto("command.ended_at", command.ended_at)?,
        exit: command.exit.map(exit_from_proto),
    })
}

pub fn probe_to_proto(probe: Probe) -> proto::Probe {
    let ContainerEvidence { id: container, labels, pod } = probe.container;
    proto::Probe {
        id: probe.id.to_string(),
        namespace: container.namespace.to_string(),
        container: container.id.to_string(),
        labels: labels_to_proto(labels),
        pod: pod.map(pod_to_proto),
        image: Some(image_to_proto(&probe.image)),
        argv: probe.argv,
        source: probe.source.name().into(),
        interval_milliseconds: probe.interval_milliseconds,
        count: probe.count,
        first_seen: Some(time_to_proto(probe.first_seen)),
        last_seen: Some(time_to_proto(probe.last_seen)),
        reported: probe.reported,
    }
}

pub fn probe_from_proto(probe: proto::Probe) -> Result<Probe, Malformed> {
    Ok(Probe {
        schema: PROBE_SCHEMA.into(),
        id: probe.id.parse().map_err(malformed("probe.id"))?,
        container: ContainerEvidence {
            id: ContainerId::new(&probe.namespace, &probe.container),
            labels: labels_from_proto(probe.labels),
            pod: probe.pod.map(pod_from_proto),
        },
        image: image_from_proto(probe.image.unwrap_or_default())?,
        argv: probe.argv,
        source: named(ProbeSource::ALL, ProbeSource::name, &probe.source)
            .ok_or_else(|| missing("probe.source"))?,
        interval_milliseconds: probe.interval_milliseconds,
        count: probe.count,
        first_seen: time_from_proto("probe.first_seen", probe.first_seen)?,
        last_seen: time_from_proto("probe.last_seen", probe.last_seen)?,
        reported: probe.reported,
    })
}

pub fn timeline_entry_to_proto(entry: TimelineEntry) -> proto::TimelineEntry {
    use proto::timeline_entry::What;
    let what = match entry.what {
        Happened::SessionOpened(session) => What::SessionOpened(session_to_proto(*session)),
        Happened::Command(command) => What::Command(command_to_proto(*command)),
        Happened::Finding(finding) => What::Finding(finding_to_proto(*finding)),
        Happened::SessionClosed(session) => What::SessionClosed(session_to_proto(*session)),
        Happened::Response(response) => What::Response(response_to_proto(*response)),
        Happened::Gap { name, container, detail, until } => {
            let (namespace, container) = names(container);
            What::Gap(proto::Gap {
                name,
                at: Some(time_to_proto(entry.at)),
                namespace,
                container,
                detail,
                until: until.map(time_to_proto),
            })
        }
    };
    proto::TimelineEntry { at: Some(time_to_proto(entry.at)), what: Some(what) }
}

/// `None`: of a newer driftd.
pub fn timeline_entry_from_proto(
    entry: proto::TimelineEntry,
) -> Result<Option<TimelineEntry>, Malformed> {
    use proto::timeline_entry::What;
    let at = time_from_proto("entry.at", entry.at)?;
    let what = match entry.what {
        None => return Ok(None),
        Some(What::SessionOpened(session)) => {
            Happened::SessionOpened(Box::new(session_from_proto(session)?))
        }
        Some(What::Command(command)) => Happened::Command(Box::new(command_from_proto(command)?)),
        Some(What::Finding(finding)) => Happened::Finding(Box::new(finding_from_proto(finding)?)),
        Some(What::SessionClosed(session)) => {
            Happened::SessionClosed(Box::new(session_from_proto(session)?))
        }
        Some(What::Response(response)) => {
            Happened::Response(Box::new(response_from_proto(response)?))
        }
        Some(What::Gap(gap)) => Happened::Gap {
            name: gap.name,
            container: (!gap.container.is_empty())
                .then(|| ContainerId::new(&gap.namespace, &gap.container)),
            detail: gap.detail,
            until: optional_time_from_proto("gap.until", gap.until)?,
        },
    };
    Ok(Some(TimelineEntry { at, what }))
}

// ---- containers

fn pod_to_proto(pod: Pod) -> proto::Pod {
    proto::Pod {
        namespace: pod.namespace,
        name: pod.name,
        uid: pod.uid,
        container: pod.container.unwrap_or_default(),
    }
}

pub fn pod_from_proto(pod: proto::Pod) -> Pod {
    Pod { namespace: pod.namespace, name: pod.name, uid: pod.uid, container: filled(pod.container) }
}

fn image_to_proto(image: &ImageReference) -> proto::Image {
    proto::Image {
        name: image.name.clone().unwrap_or_default(),
        manifest_digest: image.manifest_digest.map(|id| id.to_string()).unwrap_or_default(),
        chain_id: image.chain_id.map(|id| id.to_string()).unwrap_or_default(),
    }
}

pub fn image_from_proto(image: proto::Image) -> Result<ImageReference, Malformed> {
    Ok(ImageReference {
        name: filled(image.name),
        manifest_digest: parsed("image.manifest_digest", filled(image.manifest_digest))?,
        chain_id: parsed("image.chain_id", filled(image.chain_id))?,
    })
}

/// `known_by`: how its baseline is known, if it has one.
pub fn container_to_proto(view: ContainerView, known_by: Option<&str>) -> proto::Container {
    let ContainerView { container, baseline, watched, armed_before_start, problem, findings } =
        view;
    proto::Container {
        namespace: container.id.namespace.to_string(),
        id: container.id.id.to_string(),
        runtime: container.runtime,
        image: Some(image_to_proto(&container.image)),
        pod: container.pod.map(pod_to_proto),
        labels: labels_to_proto(container.labels),
        pid: container.task.as_ref().map_or(0, |task| task.pid),
        paused: container.task.as_ref().is_some_and(|task| task.paused),
        baseline,
        watched,
        armed_before_start,
        problem: problem.unwrap_or_default(),
        findings,
        snapshotter: container.snapshotter,
        known_by: known_by.unwrap_or_default().into(),
    }
}

pub fn gap_to_proto(gap: crate::pipeline::Gap) -> proto::Gap {
    let (namespace, container) = names(gap.container);
    proto::Gap {
        name: gap.failure.name().into(),
        at: Some(time_to_proto(gap.since)),
        namespace,
        container,
        detail: gap.detail,
        until: gap.until.map(time_to_proto),
    }
}

pub fn backlog_to_proto(backlog: crate::health::Backlog) -> proto::Backlog {
    let crate::health::Backlog { stage, container, waiting, oldest } = backlog;
    proto::Backlog {
        container,
        stage: stage.to_owned(),
        waiting: waiting as u64,
        oldest_milliseconds: u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX),
    }
}

pub fn endpoint_to_proto(endpoint: EndpointView) -> proto::Endpoint {
    proto::Endpoint {
        socket: endpoint.socket,
        connected: endpoint.connected,
        reason: endpoint.reason,
    }
}

/// Most bytes of one message, beside what one difference takes: a client reads 4 MiB
/// unless it is told otherwise, and ours 64.
const ONE_MESSAGE: usize = 32 << 20;
const ONE_OF_MANY: usize = 1 << 20;

/// What one message can hold; what it cannot makes it incomplete.
pub fn diff_to_proto(diff: &Diff) -> proto::DiffContainerResponse {
    let mut pages = pages(diff, ONE_MESSAGE);
    let first = pages.next().unwrap_or_default();
    let incomplete = diff.incomplete || pages.next().is_some();
    proto::DiffContainerResponse { incomplete, ..first }
}

/// All of it, in messages of bounded size: at least one.
pub fn diff_to_protos(diff: &Diff) -> impl Iterator<Item = proto::DiffContainerResponse> {
    pages(diff, ONE_OF_MANY)
}

fn pages(diff: &Diff, most: usize) -> impl Iterator<Item = proto::DiffContainerResponse> {
    let mut rest = diff.differences.iter().peekable();
    let mut is_first = true;
    std::iter::from_fn(move || {
        if !std::mem::take(&mut is_first) && rest.peek().is_none() {
            return None;
        }
        let mut page = proto::DiffContainerResponse {
            namespace: diff.container.namespace.to_string(),
            id: diff.container.id.to_string(),
            differences: Vec::new(),
            incomplete: diff.incomplete,
        };
        let mut bytes = 0;
        while bytes < most
            && let Some(difference) = rest.next()
        {
            let difference = difference_to_proto(difference);
            // With its tag and length.
            bytes += difference.encoded_len() + 8;
            page.differences.push(difference);
        }
        Some(page)
    })
}

pub fn difference_to_proto(difference: &Difference) -> proto::Difference {
    use proto::difference::Change;
    let change = match difference.change {
        DifferenceKind::Added => Change::Added,
        DifferenceKind::Modified => Change::Modified,
        DifferenceKind::Removed => Change::Removed,
        DifferenceKind::Metadata => Change::Metadata,
        DifferenceKind::Relocated => Change::Relocated,
    };
    proto::Difference {
        path: difference.path.as_bytes().to_vec(),
        change: change.into(),
        kind: difference.finding.map(|(kind, _)| kind.name().to_owned()).unwrap_or_default(),
        severity: difference
            .finding
            .map_or(proto::Severity::Unspecified, |(_, severity)| severity_to_proto(severity))
            .into(),
    }
}

pub fn difference_from_proto(difference: &proto::Difference) -> Result<Difference, Malformed> {
    use proto::difference::Change;
    let finding = match difference.kind.as_str() {
        "" => None,
        kind => Some((
            kind.parse().map_err(malformed("difference.kind"))?,
            severity_from_proto(difference.severity())
                .ok_or_else(|| missing("difference.severity"))?,
        )),
    };
    Ok(Difference {
        path: RootfsPath::new(&difference.path).map_err(malformed("difference.path"))?,
        change: match difference.change() {
            Change::Unspecified => return Err(missing("difference.change")),
            Change::Added => DifferenceKind::Added,
            Change::Modified => DifferenceKind::Modified,
            Change::Removed => DifferenceKind::Removed,
            Change::Metadata => DifferenceKind::Metadata,
            Change::Relocated => DifferenceKind::Relocated,
        },
        finding,
    })
}

// ---- words

pub fn severity_to_proto(severity: Severity) -> proto::Severity {
    match severity {
        Severity::Info => proto::Severity::Info,
        Severity::Low => proto::Severity::Low,
        Severity::Medium => proto::Severity::Medium,
        Severity::High => proto::Severity::High,
        Severity::Critical => proto::Severity::Critical,
    }
}

pub fn severity_from_proto(severity: proto::Severity) -> Option<Severity> {
    match severity {
        proto::Severity::Unspecified => None,
        proto::Severity::Info => Some(Severity::Info),
        proto::Severity::Low => Some(Severity::Low),
        proto::Severity::Medium => Some(Severity::Medium),
        proto::Severity::High => Some(Severity::High),
        proto::Severity::Critical => Some(Severity::Critical),
    }
}

pub fn action_to_proto(action: Action) -> proto::Action {
    match action {
        Action::Kill => proto::Action::Kill,
        Action::Pause => proto::Action::Pause,
        Action::Resume => proto::Action::Resume,
    }
}

pub fn action_from_proto(action: proto::Action) -> Option<Action> {
    match action {
        proto::Action::Unspecified => None,
        proto::Action::Kill => Some(Action::Kill),
        proto::Action::Pause => Some(Action::Pause),
        proto::Action::Resume => Some(Action::Resume),
    }
}

const FILE_TYPES: [FileType; 7] = [
    FileType::Regular,
    FileType::Directory,
    FileType::Symlink,
    FileType::CharDevice,
    FileType::BlockDevice,
    FileType::Fifo,
    FileType::Socket,
];

/// The same words as in JSON.
pub fn file_type_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Regular => "regular",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::CharDevice => "char_device",
        FileType::BlockDevice => "block_device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
    }
}

const FORMATS: [Format; 7] = [
    Format::Elf,
    Format::ElfObject,
    Format::KernelModule,
    Format::Script,
    Format::Data,
    Format::Empty,
    Format::Unknown,
];

pub fn time_to_proto(time: Timestamp) -> prost_types::Timestamp {
    let nanoseconds = time.as_nanosecond();
    // Both quotient and remainder fit: jiff's times end in the year 9999.
    prost_types::Timestamp {
        seconds: i64::try_from(nanoseconds.div_euclid(1_000_000_000)).unwrap_or(i64::MAX),
        nanos: i32::try_from(nanoseconds.rem_euclid(1_000_000_000)).unwrap_or(0),
    }
}

pub fn time_from_proto(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Timestamp, Malformed> {
    let time = time.ok_or_else(|| missing(field))?;
    Timestamp::new(time.seconds, time.nanos).map_err(malformed(field))
}

pub fn optional_time_from_proto(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Malformed> {
    match time {
        None => Ok(None),
        some => time_from_proto(field, some).map(Some),
    }
}

/// The one of this name.
fn named<T: Copy>(all: &[T], name: fn(T) -> &'static str, word: &str) -> Option<T> {
    all.iter().copied().find(|one| name(*one) == word)
}

/// A container's namespace and ID; both empty for none.
pub(super) fn names(container: Option<ContainerId>) -> (String, String) {
    container.map(|id| (id.namespace.to_string(), id.id.to_string())).unwrap_or_default()
}

fn parsed<T>(field: &'static str, text: Option<String>) -> Result<Option<T>, Malformed>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    text.map(|text| text.parse().map_err(malformed(field))).transpose()
}

/// Proto's empty text is "none" for names that are never empty.
fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Kind;

    fn sample() -> Finding {
        serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap()
    }

    #[track_caller]
    fn check(finding: &Finding) {
        use prost::Message as _;
        let wire = finding_to_proto(finding.clone()).encode_to_vec();
        let read = proto::Finding::decode(&wire[..]).unwrap();
        assert_eq!(finding_from_proto(read).as_ref(), Ok(finding));
    }

    #[test]
    fn h15_a_diff_of_any_size_comes_in_messages_that_can_be_read() {
        let differences: Vec<Difference> = (0..20_000)
            .map(|number| Difference {
                path: RootfsPath::new(format!("/{number:05}{}", "x".repeat(4000))).unwrap(),
                change: DifferenceKind::Added,
                finding: None,
            })
            .collect();
        let container = ContainerId::new("default", "c1");
        let diff = Diff { container, differences, incomplete: false };
        let one = diff_to_proto(&diff);
        assert!(one.encoded_len() < 64 << 20 && one.incomplete, "{}", one.encoded_len());
        assert!(one.differences.len() > 8000);
        let mut all = Vec::new();
        for page in diff_to_protos(&diff) {
            assert!(page.encoded_len() < 2 << 20 && !page.incomplete);
            all.extend(page.differences);
        }
        let expected: Vec<_> = diff.differences.iter().map(difference_to_proto).collect();
        assert_eq!(all, expected);
        let small = Diff { differences: diff.differences[..3].to_vec(), ..diff.clone() };
        assert!(!diff_to_proto(&small).incomplete);
        let none = Diff { differences: Vec::new(), incomplete: true, ..diff };
        assert_eq!(diff_to_protos(&none).map(|page| page.incomplete).collect::<Vec<_>>(), [true]);
    }

    #[test]
    fn a_finding_survives_the_wire() {
        let full = sample();
        check(&full);

        let mut bare = full.clone();
        (bare.file, bare.expected, bare.process) = (None, None, None);
        (bare.session, bare.outcome) = (None, None);
        bare.container.as_mut().unwrap().pod = None;
        bare.image = ImageReference::default();
        check(&bare);

        let mut of_a_layer = full.clone();
        (of_a_layer.container, of_a_layer.attack) = (None, None);
        of_a_layer.detail = Some("the layer's directory".into());
        check(&of_a_layer);

        let mut answered = full.clone();
        answered.outcome = Some(Outcome {
            action: "kill".into(),
            succeeded: false,
            gone: true,
            message: "no such task".into(),
            restarter: None,
            at: Timestamp::new(-1, -5).unwrap(),
        });
        answered.story = Some(answered.id);
        answered.run = Some(Incarnation { pid: 7, start_time: Some(700), created_at: None });
        answered.transaction = Some(answered.id);
        answered.files = Some(3);
        answered.invoked_as = Some("/bin/x".into());
        check(&answered);

        // Unknown arguments are not the same as no arguments.
        let mut silent = full;
        silent.process.as_mut().unwrap().argv = Some(vec![]);
        check(&silent);
        silent.process.as_mut().unwrap().argv = None;
        check(&silent);
    }

    #[test]
    fn names_that_are_not_utf8_survive_the_wire_and_json() {
        let mut finding = sample();
        let odd = RootfsPath::new(b"/tmp/\xff\x1b[2J\n\\x".as_slice()).unwrap();
        finding.file.as_mut().unwrap().path = odd.clone();
        finding.expected.as_mut().unwrap().path = odd;
        check(&finding);
        let json = serde_json::to_string(&finding).unwrap();
        assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), finding);
    }

    #[test]
    fn every_word_survives_the_wire() {
        for kind in Kind::ALL {
            for severity in Severity::ALL {
                let mut finding = sample();
                (finding.kind, finding.severity) = (*kind, *severity);
                check(&finding);
            }
        }
        for file_type in FILE_TYPES {
            let json = serde_json::to_value(file_type).unwrap();
            assert_eq!(json, file_type_name(file_type));
            for format in FORMATS {
                let mut finding = sample();
                let file = finding.file.as_mut().unwrap();
                (file.file_type, file.format) = (file_type, format);
                check(&finding);
            }
        }
    }

    fn session() -> Session {
        serde_json::from_str(include_str!("../../tests/data/session.json")).unwrap()
    }

    fn command() -> Command {
        serde_json::from_str(include_str!("../../tests/data/command.json")).unwrap()
    }

    #[track_caller]
    fn check_entry(what: Happened) {
        use prost::Message as _;
        let entry = TimelineEntry { at: "2026-11-20T10:00:00.25Z".parse().unwrap(), what };
        let wire = timeline_entry_to_proto(entry.clone()).encode_to_vec();
        let read = proto::TimelineEntry::decode(&wire[..]).unwrap();
        assert_eq!(timeline_entry_from_proto(read), Ok(Some(entry)));
    }

    #[test]
    fn a_session_survives_the_wire_and_json() {
        let text = include_str!("../../tests/data/session.json");
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(session()).unwrap(), json, "its schema");
        check_entry(Happened::SessionOpened(Box::new(session())));
        let mut bare = session();
        bare.state = SessionState::Open;
        (bare.client, bare.exec_id, bare.interactive) = (None, None, None);
        (bare.login, bare.requested_by, bare.ended_at, bare.exit) = (None, None, None, None);
        (bare.finding, bare.findings, bare.host) = (None, vec![], vec![]);
        (bare.container.pod, bare.image) = (None, ImageReference::default());
        check_entry(Happened::SessionClosed(Box::new(bare)));
        for entry in Entry::ALL {
            check_entry(Happened::SessionOpened(Box::new(Session { entry: *entry, ..session() })));
        }
        for how in Interactive::ALL {
            let interactive = Some(*how);
            check_entry(Happened::SessionOpened(Box::new(Session { interactive, ..session() })));
        }
        let odd = proto::Session { entry: "window".into(), ..session_to_proto(session()) };
        let err = session_from_proto(odd).unwrap_err().to_string();
        assert!(err.starts_with("`session.entry` is missing or not understood"), "{err}");
    }

    #[test]
    fn commands_and_probes_survive_the_wire_and_json() {
        let json: serde_json::Value =
            serde_json::from_str(include_str!("../../tests/data/command.json")).unwrap();
        assert_eq!(serde_json::to_value(command()).unwrap(), json, "its schema");
        check_entry(Happened::Command(Box::new(command())));
        let mut running = command();
        (running.exe, running.argv, running.ended_at) = (None, None, None);
        running.exit = Some(Exit { code: Some(-1), signal: None });
        check_entry(Happened::Command(Box::new(running)));

        let text = include_str!("../../tests/data/probe.json");
        let probe: Probe = serde_json::from_str(text).unwrap();
        let json: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&probe).unwrap(), json, "its schema");
        for source in ProbeSource::ALL {
            let probe = Probe {
                source: *source,
                interval_milliseconds: None,
                reported: true,
                ..probe.clone()
            };
            assert_eq!(probe_from_proto(probe_to_proto(probe.clone())), Ok(probe));
        }
        assert_eq!(probe_from_proto(probe_to_proto(probe.clone())), Ok(probe));
    }

    #[test]
    fn every_entry_of_a_timeline_survives_the_wire() {
        let at = "2026-11-20T10:00:00Z".parse().unwrap();
        check_entry(Happened::Finding(Box::new(sample())));
        let whole = Incarnation { pid: 7, start_time: Some(u64::MAX), created_at: Some(at) };
        let bare = Incarnation { start_time: None, created_at: None, ..whole };
        for (finding, incarnation) in
            [(None, None), (Some(sample().id), Some(whole)), (None, Some(bare))]
        {
            check_entry(Happened::Response(Box::new(Response {
                ticket: 0,
                incarnation,
                container: ContainerId::new("default", "web"),
                reason: "a\u{1b}b".into(),
                requested_by: "uid 0".into(),
                requested_at: at,
                finding,
                outcome: Outcome {
                    action: "kill".into(),
                    succeeded: true,
                    gone: false,
                    message: "killed".into(),
                    restarter: None,
                    at,
                },
            })));
        }
        for (container, until) in
            [(None, None), (Some(ContainerId::new("default", "web")), Some(at))]
        {
            let (name, detail) = ("pipeline_full".to_owned(), "7".to_owned());
            check_entry(Happened::Gap { name, container, detail, until });
        }
        let newer = proto::TimelineEntry { at: Some(time_to_proto(at)), what: None };
        assert_eq!(timeline_entry_from_proto(newer), Ok(None));
    }

    #[test]
    fn a_message_that_is_not_understood_names_the_field() {
        let mut message = finding_to_proto(sample());
        message.kind = "exec.odd".into();
        let err = finding_from_proto(message).unwrap_err().to_string();
        assert!(err.starts_with("`kind` is missing or not understood: `exec.odd`"), "{err}");
    }

    #[test]
    fn a_difference_survives_the_wire() {
        for change in [
            DifferenceKind::Added,
            DifferenceKind::Modified,
            DifferenceKind::Removed,
            DifferenceKind::Metadata,
            DifferenceKind::Relocated,
        ] {
            for finding in [None, Some((Kind::FileAdded, Severity::Low))] {
                let path = RootfsPath::new(b"/\xfe").unwrap();
                let difference = Difference { path, change, finding };
                let message = difference_to_proto(&difference);
                assert_eq!(difference_from_proto(&message), Ok(difference));
            }
        }
    }
}
