//! Responses that a user requests: kill, pause or resume a container.
//!
//! Checks the request and the container that it names. The pipeline carries the response out;
//! a client receives the reply when the history has kept it.

use tonic::Status;

use super::backend::Service;
use crate::api::{convert, proto};
use crate::model::{FindingId, Incarnation, printable};
use crate::pipeline::ApiRequest;
use crate::respond;

/// The longest reason that is kept, in bytes.
const MAX_REASON: usize = 4096;

impl Service {
    /// `requested_by`: the client, as the history keeps it.
    pub(super) async fn carry_out(
        &self,
        request: proto::RespondRequest,
        requested_by: String,
    ) -> Result<proto::RespondResponse, Status> {
        let action = convert::action_from_proto(request.action()).ok_or_else(|| {
            Status::invalid_argument("the action is missing: kill, pause or resume")
        })?;
        let reason = request.reason.trim().to_owned();
        if reason.is_empty() || reason.len() > MAX_REASON {
            return Err(Status::invalid_argument(format!(
                "a response needs a reason, of at most {MAX_REASON} bytes: it is kept in the history"
            )));
        }
        let no_restart = request.no_restart;
        if no_restart && action != respond::Action::Kill {
            return Err(Status::invalid_argument("only a kill can be without a restart"));
        }
        let (container, cause) = self.target(request.container, request.finding).await?;
        let response = self
            .ask_for(|reply| ApiRequest::Respond {
                container,
                cause,
                action,
                reason,
                requested_by,
                no_restart,
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

    /// The container of a response: the one that the request names, or the one in which the
    /// named finding was seen, together with that run of it.
    async fn target(
        &self,
        container: String,
        finding: String,
    ) -> Result<(String, Option<Box<(FindingId, Incarnation)>>), Status> {
        if finding.is_empty() {
            self.check_is_meant(&container).await?;
            return Ok((container, None));
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
        Ok((format!("{}/{}", id.namespace, id.id), Some(Box::new((finding.id, run)))))
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
