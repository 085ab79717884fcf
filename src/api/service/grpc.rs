//! Implements the generated trait: each request goes to the file of its subject.
//!
//! Must not do more than that: no decision is made here.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::backend::Service;
use super::baselines::STREAM;
use crate::api::outbox::Inbox;
use crate::api::peer::Peer;
use crate::api::proto::drift_service_server::DriftService;
use crate::api::{convert, proto};

type Reply<T> = Result<Response<T>, Status>;
type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl DriftService for Service {
    async fn get_status(
        &self,
        _: Request<proto::GetStatusRequest>,
    ) -> Reply<proto::GetStatusResponse> {
        self.status().await.map(Response::new)
    }

    async fn list_containers(
        &self,
        _: Request<proto::ListContainersRequest>,
    ) -> Reply<proto::ListContainersResponse> {
        self.list_containers().await.map(Response::new)
    }

    async fn diff_container(
        &self,
        request: Request<proto::DiffContainerRequest>,
    ) -> Reply<proto::DiffContainerResponse> {
        let diff = self.diff_container(request.into_inner().container).await?;
        Ok(Response::new(convert::diff_to_proto(&diff)))
    }

    type StreamDiffStream = Stream<proto::DiffContainerResponse>;

    async fn stream_diff(
        &self,
        request: Request<proto::DiffContainerRequest>,
    ) -> Reply<Self::StreamDiffStream> {
        self.stream_diff(request.into_inner().container).await.map(Response::new)
    }

    async fn list_baselines(
        &self,
        request: Request<proto::ListBaselinesRequest>,
    ) -> Reply<proto::ListBaselinesResponse> {
        self.list_baselines(request.into_inner().image).await.map(Response::new)
    }

    type ExportBaselineStream = Stream<proto::BaselineFile>;

    async fn export_baseline(
        &self,
        request: Request<proto::ExportBaselineRequest>,
    ) -> Reply<Self::ExportBaselineStream> {
        self.export_baseline(request.into_inner().image).await.map(Response::new)
    }

    type RecordBaselineStream = Stream<proto::RecordBaselineProgress>;

    async fn record_baseline(
        &self,
        request: Request<proto::RecordBaselineRequest>,
    ) -> Reply<Self::RecordBaselineStream> {
        self.record_baseline(request.into_inner().image).map(Response::new)
    }

    type VerifyBaselineStream = Stream<proto::VerifyBaselineProgress>;

    async fn verify_baseline(
        &self,
        request: Request<proto::VerifyBaselineRequest>,
    ) -> Reply<Self::VerifyBaselineStream> {
        self.backend()?;
        let (client, stream) = mpsc::channel(STREAM);
        tokio::spawn(self.clone().verify(request.into_inner(), client));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type DiffBaselinesStream = Stream<proto::BaselineDifference>;

    async fn diff_baselines(
        &self,
        request: Request<proto::DiffBaselinesRequest>,
    ) -> Reply<Self::DiffBaselinesStream> {
        self.diff_baselines(request.into_inner()).await.map(Response::new)
    }

    async fn remove_baseline(
        &self,
        request: Request<proto::RemoveBaselineRequest>,
    ) -> Reply<proto::RemoveBaselineResponse> {
        self.remove_baseline(request.into_inner().image).await.map(Response::new)
    }

    async fn prune_baselines(
        &self,
        _: Request<proto::PruneBaselinesRequest>,
    ) -> Reply<proto::PruneBaselinesResponse> {
        self.prune_baselines().await.map(Response::new)
    }

    async fn list_findings(
        &self,
        request: Request<proto::ListFindingsRequest>,
    ) -> Reply<proto::ListFindingsResponse> {
        self.list_findings(request.into_inner()).await.map(Response::new)
    }

    async fn get_finding(
        &self,
        request: Request<proto::GetFindingRequest>,
    ) -> Reply<proto::GetFindingResponse> {
        self.get_finding(request.into_inner()).await.map(Response::new)
    }

    async fn list_members(
        &self,
        request: Request<proto::ListMembersRequest>,
    ) -> Reply<proto::ListMembersResponse> {
        self.list_members(request.into_inner()).await.map(Response::new)
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Reply<proto::ListSessionsResponse> {
        self.list_sessions(request.into_inner()).await.map(Response::new)
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Reply<proto::GetSessionResponse> {
        self.get_session(request.into_inner()).await.map(Response::new)
    }

    async fn list_commands(
        &self,
        request: Request<proto::ListCommandsRequest>,
    ) -> Reply<proto::ListCommandsResponse> {
        self.list_commands(request.into_inner()).await.map(Response::new)
    }

    async fn get_timeline(
        &self,
        request: Request<proto::GetTimelineRequest>,
    ) -> Reply<proto::GetTimelineResponse> {
        self.timeline(request.into_inner()).await.map(Response::new)
    }

    async fn get_policy(
        &self,
        _: Request<proto::GetPolicyRequest>,
    ) -> Reply<proto::GetPolicyResponse> {
        self.get_policy().await.map(Response::new)
    }

    async fn reload_policy(
        &self,
        _: Request<proto::ReloadPolicyRequest>,
    ) -> Reply<proto::ReloadPolicyResponse> {
        self.reload_policy().await.map(Response::new)
    }

    async fn list_probes(
        &self,
        request: Request<proto::ListProbesRequest>,
    ) -> Reply<proto::ListProbesResponse> {
        self.list_probes(request.into_inner().container).await.map(Response::new)
    }

    async fn set_probe(
        &self,
        request: Request<proto::SetProbeRequest>,
    ) -> Reply<proto::SetProbeResponse> {
        self.set_probe(request.into_inner()).await.map(Response::new)
    }

    type FollowFindingsStream = Inbox;

    async fn follow_findings(
        &self,
        request: Request<proto::FollowFindingsRequest>,
    ) -> Reply<Self::FollowFindingsStream> {
        self.follow_findings(request.into_inner()).await.map(Response::new)
    }

    async fn respond(
        &self,
        request: Request<proto::RespondRequest>,
    ) -> Reply<proto::RespondResponse> {
        let client = client_of(&request)?;
        self.carry_out(request.into_inner(), client).await.map(Response::new)
    }

    async fn resume_answers(
        &self,
        request: Request<proto::ResumeAnswersRequest>,
    ) -> Reply<proto::ResumeAnswersResponse> {
        let client = client_of(&request)?;
        self.resume_answers(request.into_inner(), client).await.map(Response::new)
    }

    type RunHooksStream = Stream<proto::HookRun>;

    async fn run_hooks(
        &self,
        request: Request<proto::RunHooksRequest>,
    ) -> Reply<Self::RunHooksStream> {
        let client = client_of(&request)?;
        self.run_hooks(request.into_inner(), client).map(Response::new)
    }

    async fn end_hook(
        &self,
        request: Request<proto::EndHookRequest>,
    ) -> Reply<proto::EndHookResponse> {
        self.end_hook(request.into_inner()).map(Response::new)
    }

    async fn take_evidence(
        &self,
        request: Request<proto::TakeEvidenceRequest>,
    ) -> Reply<proto::TakeEvidenceResponse> {
        let client = client_of(&request)?;
        if request.get_ref().environment {
            check_root(&request, "may keep the values of environment variables")?;
        }
        self.take_evidence(request.into_inner(), client).await.map(Response::new)
    }

    async fn list_evidence(
        &self,
        _: Request<proto::ListEvidenceRequest>,
    ) -> Reply<proto::ListEvidenceResponse> {
        self.list_evidence().map(Response::new)
    }

    async fn get_evidence(
        &self,
        request: Request<proto::GetEvidenceRequest>,
    ) -> Reply<proto::GetEvidenceResponse> {
        self.get_evidence(request.into_inner()).await.map(Response::new)
    }

    async fn verify_evidence(
        &self,
        request: Request<proto::VerifyEvidenceRequest>,
    ) -> Reply<proto::VerifyEvidenceResponse> {
        self.verify_evidence(request.into_inner()).await.map(Response::new)
    }

    type ExportEvidenceStream = Stream<proto::ExportEvidenceResponse>;

    async fn export_evidence(
        &self,
        request: Request<proto::ExportEvidenceRequest>,
    ) -> Reply<Self::ExportEvidenceStream> {
        check_root(&request, "may export a case: it holds secrets")?;
        self.export_evidence(&request.into_inner()).map(Response::new)
    }

    async fn remove_evidence(
        &self,
        request: Request<proto::RemoveEvidenceRequest>,
    ) -> Reply<proto::RemoveEvidenceResponse> {
        check_root(&request, "may remove a case")?;
        let client = client_of(&request)?;
        self.remove_evidence(request.into_inner(), &client).await.map(Response::new)
    }
}

/// What the group may not do, because it would learn or destroy more than findings.
fn check_root<T>(request: &Request<T>, what: &str) -> Result<(), Status> {
    if request.extensions().get::<Peer>().is_some_and(Peer::is_root) {
        return Ok(());
    }
    Err(Status::permission_denied(format!("only root {what} (try: sudo)")))
}

fn client_of<T>(request: &Request<T>) -> Result<String, Status> {
    let client = request.extensions().get::<Peer>().map(ToString::to_string);
    client.ok_or_else(|| Status::permission_denied("the client is not known"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_of_a_case_is_for_root_and_not_for_the_group() {
        let check = |peer: Option<Peer>| {
            let mut request = Request::new(());
            if let Some(peer) = peer {
                request.extensions_mut().insert(peer);
            }
            check_root(&request, "may export a case").map_err(|status| status.code())
        };
        assert_eq!(check(Some(Peer::of(0))), Ok(()));
        for peer in [Some(Peer::of(1000)), None] {
            assert_eq!(check(peer), Err(tonic::Code::PermissionDenied));
        }
    }
}
