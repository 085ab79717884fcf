//! Findings and the members of aggregated findings.
//!
//! A finding is made of the parts in `container.rs`, `file.rs`, `process.rs` and `response.rs`.
//! A client that asks for JSON receives the text of the history, and nothing is converted.

use std::sync::Arc;

use super::container::{image_to_proto, incarnation_to_proto, labels_to_proto, pod_to_proto};
use super::file::{expected_to_proto, file_to_proto};
use super::process::{identity_to_proto, process_to_proto};
use super::response::outcome_to_proto;
use super::severity::severity_to_proto;
use super::value::{Malformed, malformed, missing, parsed, time_from_proto, time_to_proto};
use crate::api::proto;
use crate::history::{AlsoIn, FindingText};
use crate::model::finding::{ContainerEvidence, MEMBER_SCHEMA};
use crate::model::{Attack, ContainerId, Finding, Labels, Member, RootfsPath, RuleAnswer};

// Long: one line for each field of the message.
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
        container_runtime,
        container,
        run,
        image,
        file,
        expected,
        process,
        writer,
        from_image,
        after_start_milliseconds,
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
        writer: writer.map(process_to_proto),
        from_image: from_image.map(|processes| proto::ProcessList {
            processes: processes.into_iter().map(identity_to_proto).collect(),
        }),
        after_start_milliseconds,
        container_runtime,
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
            rules: verdict.rules,
            dry_run: verdict.dry_run,
            unchanged_severity: verdict.unchanged_severity.map(|one| one.name().to_owned()),
            answers: verdict.answers.into_iter().map(answer_to_proto).collect(),
        }),
        outcome: outcome.map(outcome_to_proto),
        attack: attack.map(|Attack { technique, tactic }| proto::Attack { technique, tactic }),
        detail,
        json: None,
    }
}

fn answer_to_proto(answer: RuleAnswer) -> proto::Answer {
    let RuleAnswer { action, rule, dry_run, hook } = answer;
    proto::Answer { action: action.name().into(), rule, dry_run, hook }
}

/// A stored finding in the form that the request asks for.
pub fn stored_finding_to_proto(
    text: FindingText,
    as_json: bool,
) -> serde_json::Result<proto::Finding> {
    if as_json { Ok(finding_text_to_proto(text)) } else { text.parse().map(finding_to_proto) }
}

pub fn finding_text_to_proto(text: FindingText) -> proto::Finding {
    proto::Finding { json: Some(text.0), ..proto::Finding::default() }
}

/// Reads a finding that was requested as JSON.
pub fn finding_from_proto(finding: proto::Finding) -> Result<Finding, Malformed> {
    let json = finding.json.ok_or_else(|| missing("finding.json"))?;
    serde_json::from_str(&json).map_err(malformed("finding.json"))
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
