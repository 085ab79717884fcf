//! Baselines: listed, exported, compared, recorded and removed.
//!
//! Reads the store on threads that may block. Changes go to the recorder, which owns the store.
//! `verify.rs` has the verification.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::backend::{Backend, Service};
use crate::api::baselines::{self, Unusable};
use crate::api::failure::{stopping, unblock};
use crate::api::{convert, proto};
use crate::baseline::{self, Progress, Proof, Recorded};

/// Messages that may wait for a slow client.
pub(super) const STREAM: usize = 64;
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

impl Service {
    pub(super) async fn list_baselines(
        &self,
        image: String,
    ) -> Result<proto::ListBaselinesResponse, Status> {
        let store = self.store()?;
        let baselines =
            unblock(move || baselines::list(&store, &image)).await?.map_err(Unusable::from)?;
        Ok(proto::ListBaselinesResponse { baselines })
    }

    pub(super) async fn export_baseline(
        &self,
        image: String,
    ) -> Result<ReceiverStream<Result<proto::BaselineFile, Status>>, Status> {
        let store = self.store()?;
        let baseline = unblock(move || baselines::open(&store, &image)).await??;
        Ok(stream(move |send| baseline.files().map(baselines::file_to_proto).all(send)))
    }

    pub(super) async fn diff_baselines(
        &self,
        proto::DiffBaselinesRequest { a, b }: proto::DiffBaselinesRequest,
    ) -> Result<ReceiverStream<Result<proto::BaselineDifference, Status>>, Status> {
        let store = self.store()?;
        let (a, b) = unblock(move || {
            Ok::<_, Unusable>((baselines::open(&store, &a)?, baselines::open(&store, &b)?))
        })
        .await??;
        Ok(stream(move |send| baseline::diff(&a, &b).map(baselines::difference_to_proto).all(send)))
    }

    pub(super) fn record_baseline(
        &self,
        image: String,
    ) -> Result<ReceiverStream<Result<proto::RecordBaselineProgress, Status>>, Status> {
        let backend = self.backend()?.clone();
        let (client, stream) = mpsc::channel(STREAM);
        tokio::spawn(async move {
            let progress = Arc::new(Progress::default());
            let recording =
                backend.images.record_image(&image, Proof::Later, Arc::clone(&progress));
            let recorded = send_progress(recording, &client, || progress_to_proto(&progress)).await;
            let Some(recorded) = recorded else { return };
            let last = match recorded {
                Err(err) => Err(Status::failed_precondition(err)),
                Ok(recorded) => read_back(&backend, recorded).await.map(|baseline| {
                    let progress = progress_to_proto(&progress);
                    proto::RecordBaselineProgress { baseline: Some(baseline), ..progress }
                }),
            };
            // If the client has disconnected, the baseline is recorded all the same.
            let _ = client.send(last).await;
        });
        Ok(ReceiverStream::new(stream))
    }

    pub(super) async fn remove_baseline(
        &self,
        image: String,
    ) -> Result<proto::RemoveBaselineResponse, Status> {
        let store = self.store()?;
        let record = unblock(move || store.find(&image)).await?.map_err(Unusable::from)?;
        let (reply, answer) = oneshot::channel();
        // The receiver is gone if the client has disconnected before the end.
        let done = Box::new(move |result| drop(reply.send(result)));
        self.backend()?.recorder.remove(record.chain_id, done);
        answer.await.map_err(|_| stopping())?.map_err(Status::failed_precondition)?;
        Ok(proto::RemoveBaselineResponse {
            chain_id: record.chain_id.to_string(),
            names: record.names.into_iter().map(|name| name.name).collect(),
        })
    }

    pub(super) async fn prune_baselines(&self) -> Result<proto::PruneBaselinesResponse, Status> {
        let (reply, answer) = oneshot::channel();
        // As above.
        self.backend()?.recorder.prune(Box::new(move |result| drop(reply.send(result))));
        let collected = answer.await.map_err(|_| stopping())?.map_err(Status::internal)?;
        Ok(proto::PruneBaselinesResponse {
            images: convert::count(collected.images),
            layers: convert::count(collected.layers),
            bytes: collected.bytes,
        })
    }
}

/// The baseline that was just recorded, as a client sees it.
async fn read_back(backend: &Backend, recorded: Recorded) -> Result<proto::Baseline, Status> {
    let store = backend.baselines.clone();
    let found = unblock(move || {
        let record = store.find(&recorded.baseline.chain_id().to_string())?;
        Ok(baselines::baseline_to_proto(&store, record))
    });
    found.await?.map_err(|err| Unusable::NotFound(err).into())
}

/// Streams what `produce` sends, from a thread that may block. Its argument is false once
/// the client has disconnected.
fn stream<T: Send + 'static>(
    produce: impl FnOnce(&mut dyn FnMut(T) -> bool) -> bool + Send + 'static,
) -> ReceiverStream<Result<T, Status>> {
    let (client, stream) = mpsc::channel(STREAM);
    tokio::task::spawn_blocking(move || {
        produce(&mut |message| client.blocking_send(Ok(message)).is_ok())
    });
    ReceiverStream::new(stream)
}

pub(super) fn progress_to_proto(progress: &Progress) -> proto::RecordBaselineProgress {
    proto::RecordBaselineProgress {
        files_done: progress.files_done.load(Ordering::Relaxed),
        bytes_done: progress.bytes_done.load(Ordering::Relaxed),
        layers_done: progress.layers_done.load(Ordering::Relaxed),
        layers_total: progress.layers_total.load(Ordering::Relaxed),
        baseline: None,
    }
}

/// Waits for the work and sends its progress to the client. `None` if the client has
/// disconnected.
pub(super) async fn send_progress<T, M>(
    mut work: Pin<Box<dyn Future<Output = T> + Send + '_>>,
    client: &mpsc::Sender<Result<M, Status>>,
    now: impl Fn() -> M,
) -> Option<T> {
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            _ = ticks.tick() => client.send(Ok(now())).await.ok()?,
        }
    }
}
