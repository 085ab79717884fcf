//! Probes: commands that run in containers again and again, and whether each is reported.
//!
//! Reads the history, and sends changes to the pipeline. A client receives the reply when the
//! history has kept the change.

use tonic::Status;

use super::backend::Service;
use crate::api::failure::the_one;
use crate::api::{convert, proto};
use crate::history::ProbeLookup;
use crate::model::printable;
use crate::pipeline::ApiRequest;

impl Service {
    pub(super) async fn list_probes(
        &self,
        container: String,
    ) -> Result<proto::ListProbesResponse, Status> {
        let container = self.resolve_any(container).await?;
        let probes = self.read(move |reader| reader.probes(container.as_ref())).await?;
        Ok(proto::ListProbesResponse {
            probes: probes.into_iter().map(convert::probe_to_proto).collect(),
        })
    }

    pub(super) async fn set_probe(
        &self,
        proto::SetProbeRequest { probe: text, reported }: proto::SetProbeRequest,
    ) -> Result<proto::SetProbeResponse, Status> {
        let shown = printable(text.as_bytes());
        let found = self.read(move |reader| reader.probe(&text)).await?;
        let id = the_one(found, "probe", &shown)?.id;
        let probe =
            self.ask_for(|reply| ApiRequest::SetProbe { probe: id, reported, reply }).await?;
        let what = if reported { "reported" } else { "counted" };
        self.wait_until_kept(&format!("probe {id} is {what}"), move |reader| {
            let kept = reader.probe(&id.to_string())?;
            Ok(matches!(kept, ProbeLookup::Found(kept) if kept.reported == reported))
        })
        .await?;
        Ok(proto::SetProbeResponse { probe: Some(convert::probe_to_proto(probe)) })
    }
}
