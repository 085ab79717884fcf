//! Verifies baselines on request: one image after the other, with progress.
//!
//! The recorder compares a baseline with its blobs and directories; this sends it one image
//! after the other and sends the results to the client.

use std::sync::Arc;

use tokio::sync::mpsc;
use tonic::Status;

use super::backend::Service;
use super::baselines::{progress_to_proto, send_progress};
use crate::api::baselines::{self, Unusable};
use crate::api::failure::unblock;
use crate::api::proto;
use crate::baseline::{FindError, ImageRecord, Progress, Proof, Recorded};

/// An image to be verified.
enum Target {
    Recorded(Box<ImageRecord>),
    /// Not recorded; containerd may know the image by this name.
    Named(String),
}

impl Target {
    /// A name for people.
    fn name(&self) -> String {
        match self {
            Target::Named(name) => name.clone(),
            Target::Recorded(record) => match record.names.first() {
                Some(name) => name.name.clone(),
                None => record.chain_id.to_string(),
            },
        }
    }
}

type Client = mpsc::Sender<Result<proto::VerifyBaselineProgress, Status>>;

impl Service {
    /// Verifies until all images are done or the client has disconnected.
    pub(super) async fn verify(self, request: proto::VerifyBaselineRequest, client: Client) {
        let proof = if request.deep { Proof::Deep } else { Proof::Blobs };
        let targets = match self.targets(request.image).await {
            Ok(targets) => targets,
            Err(status) => {
                // The client may have disconnected.
                let _ = client.send(Err(status)).await;
                return;
            }
        };
        let images_total = u32::try_from(targets.len()).unwrap_or(u32::MAX);
        for (images_done, target) in (0..).zip(&targets) {
            let progress = Arc::new(Progress::default());
            let head = proto::VerifyBaselineProgress {
                images_done,
                images_total,
                image: target.name(),
                ..proto::VerifyBaselineProgress::default()
            };
            let verifying = Box::pin(self.verify_one(target, proof, Arc::clone(&progress)));
            let outcome = send_progress(verifying, &client, || at(&head, &progress)).await;
            let Some(outcome) = outcome else { return };
            let result = self.result_of(target, outcome).await;
            let last = proto::VerifyBaselineProgress {
                images_done: images_done.saturating_add(1),
                result: Some(result),
                ..at(&head, &progress)
            };
            if client.send(Ok(last)).await.is_err() {
                return;
            }
        }
    }

    async fn targets(&self, image: String) -> Result<Vec<Target>, Status> {
        let store = self.store()?;
        unblock(move || {
            if image.is_empty() {
                let all = store.images().into_iter();
                return Ok(all.map(|record| Target::Recorded(Box::new(record))).collect());
            }
            match store.find(&image) {
                Ok(record) => Ok(vec![Target::Recorded(Box::new(record))]),
                Err(FindError::Unknown { .. }) => Ok(vec![Target::Named(image)]),
                Err(err @ FindError::Ambiguous { .. }) => Err(Unusable::from(err).into()),
            }
        })
        .await?
    }

    async fn verify_one(
        &self,
        target: &Target,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> Result<Recorded, String> {
        let backend = self.backend().map_err(|status| status.message().to_owned())?;
        let images = &backend.images;
        match target {
            Target::Named(name) => images.record_image(name, proof, progress).await,
            // Not by its name: that may stand for another image by now.
            Target::Recorded(record) => {
                images.record_image(&record.chain_id.to_string(), proof, progress).await
            }
        }
    }

    async fn result_of(
        &self,
        target: &Target,
        outcome: Result<Recorded, String>,
    ) -> proto::VerifyBaselineResult {
        let chain_id = match (&outcome, target) {
            (Ok(recorded), _) => Some(recorded.baseline.chain_id()),
            (Err(_), Target::Recorded(record)) => Some(record.chain_id),
            (Err(_), Target::Named(_)) => None,
        };
        let store = self.live.as_ref().map(|backend| backend.baselines.clone());
        let baseline = unblock(move || {
            let store = store?;
            let record = store.find(&chain_id?.to_string()).ok()?;
            Some(baselines::baseline_to_proto(&store, record))
        });
        let (layers, error) = match outcome {
            Ok(recorded) => (recorded.layers, String::new()),
            Err(err) => (Vec::new(), err),
        };
        proto::VerifyBaselineResult {
            image: target.name(),
            baseline: baseline.await.ok().flatten(),
            layers: layers.into_iter().map(baselines::report_to_proto).collect(),
            error,
        }
    }
}

fn at(head: &proto::VerifyBaselineProgress, progress: &Progress) -> proto::VerifyBaselineProgress {
    let proto::RecordBaselineProgress { files_done, bytes_done, layers_done, layers_total, .. } =
        progress_to_proto(progress);
    proto::VerifyBaselineProgress {
        files_done,
        bytes_done,
        layers_done,
        layers_total,
        ..head.clone()
    }
}
