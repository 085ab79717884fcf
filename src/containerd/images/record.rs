//! Records images: plans how the layers can be read, and requests the recording.
//!
//! The directories of the snapshotter are preferred. Where there are none, the archives of the
//! layers serve; where those are missing too, a whole copy of the image does.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_client::services::v1::InfoRequest;
use tokio::sync::oneshot;
use tonic::Status;

use super::error::ImageError;
use super::names::Key;
use super::state::{Facts, Images};
use crate::baseline::{ImageName, Progress, Proof, RecordRequest, Recorded};
use crate::containerd::blobs;
use crate::containerd::connection::{Namespace, found};
use crate::containerd::manifests::Descriptor;
use crate::containerd::snapshots::{self, Shape, Storage, Unavailable, View};
use crate::model::{ChainId, Layer, LayerId};

/// How a recording is requested.
#[derive(Clone, Debug, Default)]
pub(crate) struct RecordOptions {
    pub(crate) proof: Proof,
    pub(crate) progress: Option<Arc<Progress>>,
    /// A client waits: an unpack that may come is not waited for.
    pub(crate) now: bool,
}

/// How the layers of an image are read.
#[derive(Debug, PartialEq, Eq)]
enum Plan<'a> {
    /// All of them are recorded, and none has to be read.
    Nothing,
    /// From the directories of this snapshotter.
    Directories(&'a str),
    /// From their archives: why there are no directories.
    Archives(String),
}

fn plan(snapshotter: Option<&str>, nothing_to_read: bool) -> Plan<'_> {
    let Some(snapshotter) = snapshotter else {
        return Plan::Archives("it is not unpacked".to_owned());
    };
    match snapshots::storage(snapshotter) {
        Storage::Layers if nothing_to_read => Plan::Nothing,
        Storage::Layers => Plan::Directories(snapshotter),
        Storage::Copies => {
            Plan::Archives(snapshots::of(snapshotter, "it keeps whole copies, not layers"))
        }
        Storage::Unreadable(why) => Plan::Archives(snapshots::of(snapshotter, why)),
    }
}

impl Images {
    /// Has the image `key` recorded, and waits for that.
    pub(super) async fn record(
        &self,
        namespace: &Namespace,
        key: &Key,
        target: &Descriptor,
        options: RecordOptions,
    ) -> Result<Recorded, ImageError> {
        let facts = self.facts(namespace, target).await?;
        let Some(chain_id) = facts.chain_id() else { return Err(ImageError::NoImage) };
        // Noted before the snapshotters are asked, so that a commit in between is not missed.
        let has_waited = self.wait_for(key, chain_id);
        let snapshotter = snapshots::unpacked_by(namespace, chain_id)
            .await
            .map_err(|status| ImageError::of_call(status, &chain_id.to_string()))?;
        if snapshotter.is_none() && !has_waited && !options.now {
            return Err(ImageError::NotUnpacked { chain_id, reason: None });
        }

        let turn = Arc::clone(self.state().turns.entry(chain_id).or_default());
        let outcome = {
            let _turn = turn.lock().await;
            let _slot = self.recordings.acquire().await.expect("the semaphore is never closed");
            self.record_layers(namespace, key, &facts, snapshotter.as_deref(), options).await
        };
        drop(turn);
        self.state().turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        outcome
    }

    /// Notes that `key` waits for its layers. Whether it has done so for long.
    pub(super) fn wait_for(&self, key: &Key, chain_id: ChainId) -> bool {
        self.state().names.get_mut(key).is_some_and(|image| image.wait_for(chain_id))
    }

    async fn record_layers(
        &self,
        namespace: &Namespace,
        key: &Key,
        facts: &Facts,
        snapshotter: Option<&str>,
        options: RecordOptions,
    ) -> Result<Recorded, ImageError> {
        let Some(chain_id) = facts.chain_id() else { return Err(ImageError::NoImage) };
        let of_chain = |status| ImageError::of_call(status, &chain_id.to_string());
        let mut layers = self.layers_of(namespace, facts);
        let unrecorded = self.unrecorded(&layers).await;
        let nothing_to_read = unrecorded.is_empty() && options.proof == Proof::Later;

        let mut view = None;
        let no_directories = match plan(snapshotter, nothing_to_read) {
            Plan::Nothing => None,
            Plan::Archives(reason) => Some(reason),
            Plan::Directories(snapshotter) => {
                match self.view_of_layers(namespace, snapshotter, chain_id, layers.len()).await {
                    Ok((taken, directories)) => {
                        view = Some(taken);
                        for (layer, directory) in layers.iter_mut().zip(directories) {
                            layer.directory = Some(directory);
                        }
                        None
                    }
                    Err(Unavailable::Reason(why)) => Some(snapshots::of(snapshotter, &why)),
                    Err(Unavailable::Call(status)) => return Err(of_chain(status)),
                }
            }
        };
        if let Some(reason) = no_directories
            && let Some(missing) =
                self.no_archive_of(namespace, &layers, &unrecorded).await.map_err(of_chain)?
        {
            let reason = format!("{reason}, and {missing}");
            match snapshotter {
                None => return Err(ImageError::NotUnpacked { chain_id, reason: Some(reason) }),
                Some(copies) if snapshots::storage(copies) == Storage::Copies => {
                    let (copy, taken) =
                        self.whole_copy(namespace, copies, chain_id).await.map_err(of_chain)?;
                    layers = vec![copy];
                    view = taken;
                }
                Some(_) => {
                    return Err(ImageError::Bad {
                        digest: facts.manifest_digest.to_string(),
                        reason,
                    });
                }
            }
        }

        let image = ImageName {
            namespace: key.namespace.to_string(),
            name: key.name.clone(),
            manifest_digest: Some(facts.manifest_digest),
        };
        let outcome = self.submit(Some(image), layers, options).await;
        // Kept until now, so that no directory goes while it is read.
        if let Some(view) = view {
            view.release().await;
        }
        outcome.map_err(|reason| ImageError::NotRecorded { chain_id, reason })
    }

    /// The layers of an image, bottom first, with their archives and without directories.
    fn layers_of(&self, namespace: &Namespace, facts: &Facts) -> Vec<Layer> {
        let layers = facts.diff_ids.iter().zip(&facts.chain);
        let layer = |(&diff_id, &chain_id)| Layer {
            id: LayerId::Diff(diff_id),
            chain_id,
            directory: None,
            blob: self.blob(&namespace.name, chain_id),
        };
        layers.map(layer).collect()
    }

    /// The whole image as one layer. If it is not recorded yet, with a view of a copy.
    async fn whole_copy(
        &self,
        namespace: &Namespace,
        snapshotter: &str,
        chain_id: ChainId,
    ) -> Result<(Layer, Option<View>), Status> {
        let mut merged = merged_layer(chain_id);
        if self.unrecorded(std::slice::from_ref(&merged)).await.is_empty() {
            return Ok((merged, None));
        }
        // The snapshotter makes the view by copying, which may take longer than any deadline.
        let patient = namespace.clone().without_deadline();
        let view = View::take(&patient, snapshotter, chain_id, &self.leases).await?;
        merged.directory = match view.as_ref().map(|view| &view.shape) {
            Some(Shape::Bind(copy)) => Some(copy.clone()),
            Some(Shape::Overlay { .. } | Shape::Other(_)) | None => None,
        };
        Ok((merged, view))
    }

    /// A view of an image's layers, and their directories, bottom first.
    async fn view_of_layers(
        &self,
        namespace: &Namespace,
        snapshotter: &str,
        chain_id: ChainId,
        layers: usize,
    ) -> Result<(View, Vec<PathBuf>), Unavailable> {
        let Some(view) = View::take(namespace, snapshotter, chain_id, &self.leases).await? else {
            return Err(Unavailable::Reason("its snapshots have gone".into()));
        };
        match snapshots::readable_directories(&view.shape, layers).await {
            Ok(directories) => Ok((view, directories)),
            Err(err) => {
                view.release().await;
                Err(Unavailable::Reason(err.to_string()))
            }
        }
    }

    /// Hands a request to the recorder, and waits until it is done.
    async fn submit(
        &self,
        image: Option<ImageName>,
        layers: Vec<Layer>,
        options: RecordOptions,
    ) -> Result<Recorded, String> {
        let (done, finished) = oneshot::channel();
        let request = RecordRequest {
            image,
            container: None,
            layers,
            proof: options.proof,
            progress: options.progress,
            done: Some(Box::new(move |outcome| {
                let _ = done.send(outcome);
            })),
        };
        let recorder = Arc::clone(&self.recorder);
        // Submitting may wait until the recorder has room.
        tokio::task::spawn_blocking(move || recorder.submit(request))
            .await
            .map_err(|err| err.to_string())?;
        finished.await.map_err(|_| "the recorder has stopped".to_owned())?
    }

    /// The `layers` that have no baseline yet.
    async fn unrecorded(&self, layers: &[Layer]) -> Vec<LayerId> {
        let ids: Vec<LayerId> = layers.iter().map(|layer| layer.id).collect();
        let all = ids.clone();
        let recorder = Arc::clone(&self.recorder);
        tokio::task::spawn_blocking(move || recorder.unrecorded(&ids)).await.unwrap_or(all)
    }

    /// Why one of the layers `wanted` cannot be read from its archive. `None` if all can be.
    async fn no_archive_of(
        &self,
        namespace: &Namespace,
        layers: &[Layer],
        wanted: &[LayerId],
    ) -> Result<Option<String>, Status> {
        for layer in layers.iter().filter(|layer| wanted.contains(&layer.id)) {
            let reason = match &layer.blob {
                None => Some("its archive is not known any more".to_owned()),
                Some(blob) => match blobs::no_archive(&blob.media_type) {
                    Some(reason) => Some(reason),
                    None => {
                        let request = InfoRequest { digest: blob.digest.clone() };
                        let info = found(namespace.content().info(request).await)?;
                        info.is_none().then(|| blobs::missing(&blob.media_type))
                    }
                },
            };
            if let Some(reason) = reason {
                return Ok(Some(format!("layer {} has no archive: {reason}", layer.id)));
            }
        }
        Ok(None)
    }

    /// The layers of a container whose snapshotter has no directories of them, if their
    /// baselines can be made without.
    pub(crate) async fn without_directories(
        &self,
        namespace: &Namespace,
        snapshotter: &str,
        layers: Vec<Layer>,
    ) -> Result<Vec<Layer>, Unavailable> {
        let unrecorded = self.unrecorded(&layers).await;
        let Some(missing) = self.no_archive_of(namespace, &layers, &unrecorded).await? else {
            return Ok(layers);
        };
        if snapshots::storage(snapshotter) == Storage::Copies
            && let Some(top) = layers.last()
        {
            let merged = vec![merged_layer(top.chain_id)];
            if self.unrecorded(&merged).await.is_empty() {
                return Ok(merged);
            }
        }
        Err(Unavailable::Reason(missing))
    }

    /// Has the layers of a container recorded now, and waits for that. Its image may have no
    /// name any more.
    pub(crate) async fn record_stack(
        &self,
        layers: Vec<Layer>,
        options: RecordOptions,
    ) -> Result<Recorded, ImageError> {
        let Some(chain_id) = layers.last().map(|layer| layer.chain_id) else {
            return Err(ImageError::Unknown);
        };
        let outcome = self.submit(None, layers, options).await;
        outcome.map_err(|reason| ImageError::NotRecorded { chain_id, reason })
    }
}

/// A whole image as one layer, for a snapshotter that keeps only whole copies.
fn merged_layer(chain_id: ChainId) -> Layer {
    Layer { id: LayerId::Chain(chain_id), chain_id, directory: None, blob: None }
}
