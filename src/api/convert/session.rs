//! Sessions, the commands that they run, and probes.
//!
//! They must come back from proto exactly as they were: their JSON is made on the other side.
//! Uses `container.rs` and `process.rs` for their parts.

use super::container::{
    image_from_proto, image_to_proto, labels_from_proto, labels_to_proto, pod_from_proto,
    pod_to_proto,
};
use super::process::{
    ancestor_from_proto, ancestor_to_proto, process_from_proto, process_to_proto,
};
use super::value::{
    Malformed, malformed, missing, named, optional_time_from_proto, parsed, time_from_proto,
    time_to_proto,
};
use crate::api::proto;
use crate::model::finding::ContainerEvidence;
use crate::model::session::{COMMAND_SCHEMA, PROBE_SCHEMA, SESSION_SCHEMA};
use crate::model::{
    Command, ContainerId, Entry, Exit, Interactive, Login, Probe, ProbeSource, ProcessIdentity,
    Session, SessionState,
};

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
    let interactive = session.interactive.map(|name| {
        named(Interactive::ALL, Interactive::name, &name)
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
