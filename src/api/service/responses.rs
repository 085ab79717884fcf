//! Responses that a user requests: kill, pause or resume a container, kill one of its processes,
//! or let a rule answer again.
//!
//! Checks the request and the container that it names. The pipeline carries the response out;
//! a client receives the reply when the history has kept it.

use tonic::Status;

use super::backend::Service;
use crate::api::{convert, proto};
use crate::model::{Finding, FindingId, Incarnation, ProcessIdentity, printable};
use crate::pipeline::ApiRequest;
use crate::respond;

/// The longest reason that is kept, in bytes.
const MAX_REASON: usize = 4096;

/// What a response is meant for.
struct Target {
    container: String,
    /// The finding, and the run in which it was seen.
    cause: Option<Box<(FindingId, Incarnation)>>,
    /// The process of the finding.
    process: Option<ProcessIdentity>,
    finding: Option<Box<Finding>>,
}

fn checked_reason(reason: &str) -> Result<String, Status> {
    let reason = reason.trim();
    if reason.is_empty() || reason.len() > MAX_REASON {
        return Err(Status::invalid_argument(format!(
            "a response needs a reason, of at most {MAX_REASON} bytes: it is kept in the history"
        )));
    }
    Ok(reason.to_owned())
}

impl Service {
    /// `requested_by`: the client, as the history keeps it.
    pub(super) async fn carry_out(
        &self,
        request: proto::RespondRequest,
        requested_by: String,
    ) -> Result<proto::RespondResponse, Status> {
        let action = convert::action_from_proto(request.action()).ok_or_else(|| {
            Status::invalid_argument(
                "the action is missing: hook, kill-process, kill, pause or resume",
            )
        })?;
        if action == respond::Action::Evidence {
            return Err(Status::invalid_argument("evidence is taken by TakeEvidence"));
        }
        let reason = checked_reason(&request.reason)?;
        let no_restart = request.no_restart;
        if no_restart && action != respond::Action::Kill {
            return Err(Status::invalid_argument("only a kill can be without a restart"));
        }
        let is_of_process = action == respond::Action::KillProcess;
        if !is_of_process && request.pid != 0 {
            return Err(Status::invalid_argument("only a kill of one process can have a pid"));
        }
        let is_hook = action == respond::Action::Hook;
        if is_hook == request.hook.is_empty() || is_hook && request.finding.is_empty() {
            return Err(Status::invalid_argument(
                "a hook needs its name and a finding, and only a hook has a name",
            ));
        }
        let Target { container, cause, process, finding } =
            self.target(request.container, request.finding).await?;
        let process = match request.pid {
            0 => process,
            pid => Some(ProcessIdentity { pid, start_time: 0 }),
        };
        let process = process.filter(|_| is_of_process);
        if request.pid == 0 && process.is_some_and(|process| process.start_time == 0) {
            return Err(Status::failed_precondition(
                "the process of the finding had ended before it was examined, and another one may \
                 have its pid now: name a pid on the host",
            ));
        }
        if is_of_process && process.is_none_or(|process| process.pid == 0) {
            return Err(Status::invalid_argument(
                "the process is missing: name its pid on the host, or a finding that names it",
            ));
        }
        let hook = finding.filter(|_| is_hook).map(|finding| Box::new((request.hook, *finding)));
        let response = self
            .ask_for(|reply| ApiRequest::Respond {
                container,
                cause,
                process: process.map(Box::new),
                action,
                reason,
                requested_by,
                no_restart,
                environment: false,
                hook,
                reply,
            })
            .await?;
        self.wait_until_recorded(&response).await?;
        Ok(proto::RespondResponse {
            namespace: response.container.namespace.to_string(),
            container: response.container.id.to_string(),
            outcome: Some(convert::outcome_to_proto(response.outcome)),
        })
    }

    /// Takes evidence for a user.
    pub(super) async fn take_for(
        &self,
        container: String,
        finding: String,
        reason: &str,
        requested_by: String,
        environment: bool,
    ) -> Result<respond::Response, Status> {
        let reason = checked_reason(reason)?;
        let Target { container, cause, .. } = self.target(container, finding).await?;
        let response = self
            .ask_for(|reply| ApiRequest::Respond {
                container,
                cause,
                process: None,
                action: respond::Action::Evidence,
                reason,
                requested_by,
                no_restart: false,
                environment,
                hook: None,
                reply,
            })
            .await?;
        self.wait_until_recorded(&response).await?;
        Ok(response)
    }

    /// The container of a response: the one that the request names, or the one in which the
    /// named finding was seen, together with that run of it.
    async fn target(&self, container: String, finding: String) -> Result<Target, Status> {
        if finding.is_empty() {
            self.check_is_meant(&container).await?;
            return Ok(Target { container, cause: None, process: None, finding: None });
        }
        let finding = self.finding(finding).await?;
        let (id, run) = finding.container_id().zip(finding.run).ok_or_else(|| {
            Status::failed_precondition(format!(
                "finding {} does not say in which run of a container it was seen: name the \
                 container instead",
                finding.id
            ))
        })?;
        if !container.is_empty() && id.named_by(&container).is_none() {
            return Err(Status::invalid_argument(format!(
                "finding {} is of container {id}, and not of `{}`",
                finding.id,
                printable(container.as_bytes())
            )));
        }
        Ok(Target {
            container: format!("{}/{}", id.namespace, id.id),
            cause: Some(Box::new((finding.id, run))),
            process: finding.process.as_ref().map(|process| process.identity),
            finding: Some(finding),
        })
    }

    /// Lets a rule answer again, or all of them.
    pub(super) async fn resume_answers(
        &self,
        request: proto::ResumeAnswersRequest,
        requested_by: String,
    ) -> Result<proto::ResumeAnswersResponse, Status> {
        let reason = checked_reason(&request.reason)?;
        let rule = Some(request.rule).filter(|rule| !rule.is_empty());
        let named = rule.clone();
        let resumed = self
            .ask(|reply| ApiRequest::ResumeAnswers { rule, reason, requested_by, reply })
            .await?;
        if let Some(last) = resumed.last() {
            let container = last.container.clone();
            self.wait_until_kept("the answers are carried out again", move |reader| {
                let kept = reader.responses(&container)?;
                let is_it = |one: &respond::Response| one.outcome.action == respond::RESUME_ANSWERS;
                Ok(kept.iter().rev().take(8).any(is_it))
            })
            .await?;
        }
        if let (Some(rule), true) = (named, resumed.is_empty()) {
            return Err(Status::not_found(format!(
                "the answers of the rule `{}` are not stopped (see: driftd status)",
                printable(rule.as_bytes())
            )));
        }
        let resumed = resumed.into_iter().map(convert::stopped_rule_to_proto).collect();
        Ok(proto::ResumeAnswersResponse { resumed })
    }

    async fn wait_until_recorded(&self, response: &respond::Response) -> Result<(), Status> {
        let (container, requested_at) = (response.container.clone(), response.requested_at);
        self.wait_until_kept(&response.outcome.message, move |reader| {
            let kept = reader.responses(&container)?;
            Ok(kept.iter().any(|kept| kept.requested_at == requested_at))
        })
        .await
    }
}
