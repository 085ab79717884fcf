//! Evidence: it is taken by the pipeline's request like any response; cases are listed, verified,
//! sent and removed by the store.
//!
//! Cases hold secrets. The group `driftd` may take, list and verify them; only root may have their
//! content, keep values of variables, or remove a case.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::backend::Service;
use crate::api::failure::unblock;
use crate::api::{convert, proto};
use crate::evidence::{Case, FindError, export, verify};
use crate::respond::Response;

/// Parts of an archive that wait for the client.
const PARTS: usize = 8;

fn found(err: &FindError) -> Status {
    match err {
        FindError::Unknown(_) => Status::not_found(err.to_string()),
        FindError::Ambiguous(..) => Status::invalid_argument(err.to_string()),
    }
}

impl Service {
    pub(super) async fn take_evidence(
        &self,
        request: proto::TakeEvidenceRequest,
        requested_by: String,
    ) -> Result<proto::TakeEvidenceResponse, Status> {
        let proto::TakeEvidenceRequest { container, finding, reason, environment } = request;
        let response =
            self.take_for(container, finding, &reason, requested_by, environment).await?;
        let Response { container, outcome, case, .. } = response;
        Ok(proto::TakeEvidenceResponse {
            namespace: container.namespace.to_string(),
            container: container.id.to_string(),
            outcome: Some(convert::outcome_to_proto(outcome)),
            case: case.map(convert::case_to_proto),
        })
    }

    fn case(&self, text: &str) -> Result<Case, Status> {
        self.backend()?.evidence.find(text).map_err(|err| found(&err))
    }

    pub(super) fn list_evidence(&self) -> Result<proto::ListEvidenceResponse, Status> {
        let cases = self.backend()?.evidence.list();
        let cases = cases.iter().map(convert::evidence_case_to_proto).collect();
        Ok(proto::ListEvidenceResponse { cases })
    }

    pub(super) async fn get_evidence(
        &self,
        request: proto::GetEvidenceRequest,
    ) -> Result<proto::GetEvidenceResponse, Status> {
        let case = self.case(&request.case)?;
        let (store, id) = (self.backend()?.evidence.clone(), case.id);
        let manifest_json = unblock(move || store.manifest_text(id)).await?;
        let manifest_json = manifest_json.map_err(|err| {
            Status::data_loss(format!("the manifest of case {id} cannot be read: {err}"))
        })?;
        let case = Some(convert::evidence_case_to_proto(&case));
        Ok(proto::GetEvidenceResponse { case, manifest_json })
    }

    pub(super) async fn verify_evidence(
        &self,
        request: proto::VerifyEvidenceRequest,
    ) -> Result<proto::VerifyEvidenceResponse, Status> {
        let mut case = self.case(&request.case)?;
        let verified = loop {
            let directory = self.backend()?.evidence.path(case.id);
            let verified = unblock(move || verify(&directory)).await?;
            let now = self.case(&case.id.to_string())?;
            if now == case {
                break verified.map_err(|err| {
                    Status::data_loss(format!("the case {} cannot be read: {err}", case.id))
                })?;
            }
            // Something was added to it meanwhile.
            case = now;
        };
        let mut problems = verified.problems;
        let recorded = match &case.manifest {
            // A damaged manifest does not name the container.
            Err(_) => None,
            Ok(manifest) => {
                let (container, id) = (manifest.container.clone(), case.id);
                self.read(move |reader| {
                    let responses = reader.responses(&container)?;
                    let of_case = responses.iter().rev().filter_map(|one| one.case);
                    let digest = of_case.into_iter().find(|kept| kept.id == id);
                    Ok(digest.map(|kept| kept.digest))
                })
                .await?
            }
        };
        if verified.case.is_some_and(|id| id != case.id) {
            problems.push("its manifest is that of another case".to_owned());
        }
        let is_other = recorded.is_some_and(|recorded| verified.digest != Some(recorded));
        if is_other && problems.is_empty() {
            problems.push(
                "all of it is consistent, but the history has kept another digest".to_owned(),
            );
        }
        Ok(proto::VerifyEvidenceResponse {
            id: case.id.to_string(),
            digest: verified.digest.map(|digest| digest.to_string()).unwrap_or_default(),
            problems,
            recorded: recorded.map(|digest| digest.to_string()),
            files: verified.files,
            bytes: verified.bytes,
        })
    }

    pub(super) fn export_evidence(
        &self,
        request: &proto::ExportEvidenceRequest,
    ) -> Result<ReceiverStream<Result<proto::ExportEvidenceResponse, Status>>, Status> {
        let case = self.case(&request.case)?;
        let directory = self.backend()?.evidence.path(case.id);
        let (client, stream) = mpsc::channel(PARTS);
        tokio::task::spawn_blocking(move || {
            // The client may have disconnected: then no more is read.
            let mut send =
                |data| client.blocking_send(Ok(proto::ExportEvidenceResponse { data })).is_ok();
            if let Err(err) = export(&directory, &mut send) {
                let why = format!("the case {} cannot be exported: {err}", case.id);
                let _ = client.blocking_send(Err(Status::data_loss(why)));
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    pub(super) async fn remove_evidence(
        &self,
        request: proto::RemoveEvidenceRequest,
        client: &str,
    ) -> Result<proto::RemoveEvidenceResponse, Status> {
        let id = self.case(&request.case)?.id;
        let store = self.backend()?.evidence.clone();
        let removed = unblock(move || store.remove(id)).await?;
        let bytes = removed.map_err(|err| {
            Status::failed_precondition(format!("the case {id} cannot be removed: {err}"))
        })?;
        tracing::warn!("case {id} of evidence was removed by {client}");
        Ok(proto::RemoveEvidenceResponse { id: id.to_string(), bytes })
    }
}
