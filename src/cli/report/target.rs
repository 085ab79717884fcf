//! What the argument of `driftd report` names.
//!
//! The only place that decides this. What else can be reported on becomes another [`Target`].

use std::time::Duration;

use tokio::time::timeout;
use tonic::{Code, Response, Status};

use crate::api::{convert, proto};
use crate::cli::client::{Client, explain};
use crate::cli::output::{safe, short};
use crate::model::{CaseId, ContainerId, NamedBy, Session};

/// How long a daemon may take to answer a small question.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) enum Target {
    Container(ContainerId),
    Session(Box<Session>),
    /// A case of evidence: its container is reported on.
    Case {
        id: CaseId,
        container: ContainerId,
    },
}

impl Target {
    /// The container whose timeline is read.
    pub(super) fn container(&self) -> &ContainerId {
        match self {
            Target::Container(container) | Target::Case { container, .. } => container,
            Target::Session(session) => &session.container.id,
        }
    }
}

/// Asks what `text` names. A whole name of a container wins over the beginning of a session's
/// ID.
pub(super) async fn resolve(client: &mut Client, text: &str) -> anyhow::Result<Target> {
    let container = container(client, text).await;
    if let Ok(container) = &container
        && container.named_by(text) == Some(NamedBy::WholeId)
    {
        return Ok(Target::Container(container.clone()));
    }
    let request = proto::GetSessionRequest { id: text.to_owned(), as_json: true };
    let session = client.get_session(request).await.map(Response::into_inner);
    match (container, session) {
        (Ok(_), Ok(_)) => Err(anyhow::anyhow!(
            "`{}` could be a container or a session: write more of the ID",
            safe(text)
        )),
        (Ok(container), Err(status)) if is_none(&status) => Ok(Target::Container(container)),
        (Err(status), Ok(reply)) if is_none(&status) => {
            let session =
                reply.session.ok_or_else(|| anyhow::anyhow!("driftd returned no session"))?;
            Ok(Target::Session(Box::new(convert::session_from_proto(session)?)))
        }
        (Err(status), Err(other)) if is_none(&status) && is_none(&other) => {
            match case(client, text).await? {
                Some(case) => Ok(case),
                None => Err(unknown(client, text, &status).await),
            }
        }
        (Err(status), Err(other)) if is_none(&status) => Err(explain(other)),
        (Err(status), _) | (_, Err(status)) => Err(explain(status)),
    }
}

/// An older driftd has no sessions.
fn is_none(status: &Status) -> bool {
    matches!(status.code(), Code::NotFound | Code::Unimplemented)
}

async fn container(client: &mut Client, text: &str) -> Result<ContainerId, Status> {
    let request = proto::GetTimelineRequest {
        container: text.to_owned(),
        page_size: 1,
        as_json: true,
        ..proto::GetTimelineRequest::default()
    };
    let reply = timeout(PATIENCE, client.get_timeline(request)).await;
    let late = |_| {
        Status::failed_precondition(
            "driftd has not answered in time (see: driftd status). A report can be made of its \
             history alone: driftd --history /var/lib/driftd report …",
        )
    };
    let reply = reply.map_err(late)??.into_inner();
    Ok(ContainerId::new(&reply.namespace, &reply.container))
}

/// The case of evidence that has this ID. A history alone has none.
async fn case(client: &mut Client, text: &str) -> anyhow::Result<Option<Target>> {
    let request = proto::GetEvidenceRequest { case: text.to_owned() };
    let Ok(reply) = timeout(PATIENCE, client.get_evidence(request)).await else { return Ok(None) };
    let Ok(reply) = reply else { return Ok(None) };
    let case = reply.into_inner().case;
    let case = case.ok_or_else(|| anyhow::anyhow!("driftd returned no case"))?;
    let id = case.id.parse().map_err(|_| anyhow::anyhow!("driftd returned no ID of a case"))?;
    Ok(Some(Target::Case { id, container: ContainerId::new(&case.namespace, &case.container) }))
}

/// The error for a text that names none of them. The ID of a finding leads to its container.
async fn unknown(client: &mut Client, text: &str, no_container: &Status) -> anyhow::Error {
    let shown = safe(text);
    let request = proto::GetFindingRequest { id: text.to_owned(), as_json: true };
    let finding =
        client.get_finding(request).await.ok().and_then(|reply| reply.into_inner().finding);
    let finding = finding.and_then(|finding| convert::finding_from_proto(finding).ok());
    match finding.as_ref().and_then(|finding| Some((finding, finding.container_id()?))) {
        Some((finding, container)) => {
            let session =
                finding.session.map(|id| format!(", or its session: {}", short(&id.to_string())));
            anyhow::anyhow!(
                "`{shown}` is a finding: name its container: {container}{}",
                session.unwrap_or_default()
            )
        }
        None => anyhow::anyhow!(
            "{}, and no session or case `{shown}` (see: driftd sessions, driftd evidence ls)",
            safe(no_container.message())
        ),
    }
}
