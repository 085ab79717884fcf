//! Responses (kill, pause, resume) and their outcomes.
//!
//! The outcome is a part of findings as well. A response's ticket is the pipeline's own, and is
//! not sent.

use super::container::{incarnation_from_proto, incarnation_to_proto};
use super::process::{identity_from_proto, identity_to_proto};
use super::value::{Malformed, missing, parsed, time_from_proto, time_to_proto};
use crate::api::proto;
use crate::model::{ContainerId, Outcome, Restarter};
use crate::pipeline::StoppedRule;
use crate::respond::{Action, KeptCase, Response};

pub fn action_to_proto(action: Action) -> proto::Action {
    match action {
        Action::Evidence => proto::Action::Evidence,
        Action::Hook => proto::Action::Hook,
        Action::KillProcess => proto::Action::KillProcess,
        Action::Kill => proto::Action::Kill,
        Action::Pause => proto::Action::Pause,
        Action::Resume => proto::Action::Resume,
    }
}

pub fn action_from_proto(action: proto::Action) -> Option<Action> {
    match action {
        proto::Action::Unspecified => None,
        proto::Action::Evidence => Some(Action::Evidence),
        proto::Action::Hook => Some(Action::Hook),
        proto::Action::KillProcess => Some(Action::KillProcess),
        proto::Action::Kill => Some(Action::Kill),
        proto::Action::Pause => Some(Action::Pause),
        proto::Action::Resume => Some(Action::Resume),
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
        process: response.process.map(identity_to_proto),
        case: response.case.map(case_to_proto),
    }
}

/// The case into which evidence was taken.
pub fn case_to_proto(KeptCase { id, digest }: KeptCase) -> proto::KeptCase {
    proto::KeptCase { id: id.to_string(), digest: digest.to_string() }
}

pub fn case_from_proto(case: proto::KeptCase) -> Result<KeptCase, Malformed> {
    let proto::KeptCase { id, digest } = case;
    let id = parsed("case.id", Some(id))?.ok_or_else(|| missing("case.id"))?;
    let digest = parsed("case.digest", Some(digest))?.ok_or_else(|| missing("case.digest"))?;
    Ok(KeptCase { id, digest })
}

/// A rule whose answers are stopped.
pub fn stopped_rule_to_proto(stopped: StoppedRule) -> proto::StoppedRule {
    let StoppedRule { rule, since, container, reason } = stopped;
    proto::StoppedRule {
        rule,
        since: Some(time_to_proto(since)),
        namespace: container.namespace.to_string(),
        container: container.id.to_string(),
        reason,
    }
}

pub fn response_from_proto(response: proto::Response) -> Result<Response, Malformed> {
    let outcome = response.outcome.ok_or_else(|| missing("response.outcome"))?;
    Ok(Response {
        ticket: 0,
        incarnation: response.incarnation.map(incarnation_from_proto).transpose()?,
        process: response.process.map(identity_from_proto),
        pod: None,
        image: None,
        changed: true,
        case: response.case.map(case_from_proto).transpose()?,
        container: ContainerId::new(&response.namespace, &response.container),
        reason: response.reason,
        requested_by: response.requested_by,
        requested_at: time_from_proto("response.requested_at", response.requested_at)?,
        finding: parsed("response.finding", response.finding)?,
        outcome: outcome_from_proto(outcome)?,
    })
}
