//! Records layers: from the directory in which each is unpacked, or else from its blob.
//!
//! The recording of an image is interrupted for containers, a few times for each layer.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::Timestamp;

use super::queue::{Done, RecordRequest, STOPPING, Submitted};
use super::worker::{PendingJob, Worker, directory_name, directory_of};
use crate::baseline::causes::with_causes;
use crate::baseline::compare::Comparison;
use crate::baseline::layer::LayerBaseline;
use crate::baseline::merge::ImageBaseline;
use crate::baseline::proof::{Checked, LayerProof};
use crate::baseline::store::{self, ImageName};
use crate::baseline::types::{BaselineEvent, KnownBy, Progress, Proof, Recorded};
use crate::baseline::urgency::hashing_pool;
use crate::baseline::verify::{NO_BLOB, Unpacked, Unproved, unpack, without_implied};
use crate::baseline::walk::{self, Reading, walk_to};
use crate::health::Failure;
use crate::model::{ContainerId, Layer, LayerId, printable};

/// How often the recording of one layer may be interrupted for a container that waits
/// for other layers.
const INTERRUPTIONS: u32 = 3;

/// Why the content of a directory was not recorded.
#[derive(Debug, thiserror::Error)]
enum RecordError {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Walk(#[from] walk::Error),
}

/// Why a layer was not recorded.
enum NotRecorded {
    /// Another job is more urgent, or the daemon stops.
    Interrupted,
    Failed(String),
}

impl Worker {
    /// `waited`: how long the container waited before this attempt, if it is not the first.
    pub(super) fn record(
        &mut self,
        Submitted { job, ticket }: Submitted,
        waited: Option<Duration>,
    ) {
        if job.container.is_some() {
            self.shared.urgency.raise();
        }
        self.shared.jobs.begin();
        self.shared.agenda.recording_begins();
        let result = self.baseline_of(&job);
        self.shared.agenda.recording_ends();
        if self.inbox.urgent.is_empty() {
            self.shared.urgency.lower();
        }
        let RecordRequest { image, container, layers, proof, progress, done } = *job;
        if let Some(container) = &container {
            self.containers.keep(container, &layers, result.is_err(), waited);
        }
        match result {
            Ok(baseline) => {
                let pending = self.request_comparisons(ticket, &layers, proof, progress, &baseline);
                self.recorded(ticket, &layers, container.is_some(), baseline, pending, done);
            }
            Err(reason) => {
                self.not_recorded(image, container, &reason);
                self.shared.jobs.finish(ticket);
                if let Some(layer) = layers.last() {
                    let chain_id = layer.chain_id;
                    self.send(BaselineEvent::Failed { chain_id, reason: reason.clone() });
                }
                if let Some(done) = done {
                    done(Err(reason));
                }
            }
        }
    }

    /// Reports a baseline, and requests what proves it and what else is compared with it.
    fn recorded(
        &mut self,
        ticket: u64,
        layers: &[Layer],
        for_container: bool,
        baseline: Arc<ImageBaseline>,
        pending: PendingJob,
        done: Option<Done>,
    ) {
        // A receiver of the event must find the job over.
        let waits = pending.open.iter().any(|open| *open > 0);
        if !waits {
            self.shared.jobs.finish(ticket);
        }
        if let Some(top) = layers.last() {
            self.send_ready(top.chain_id, Arc::clone(&baseline));
            if for_container {
                self.compare_directories(top.chain_id);
            }
        }
        self.verify_later(layers);
        if waits {
            self.comparisons.pending.insert(ticket, PendingJob { done, ..pending });
        } else if let Some(done) = done {
            done(Ok(Recorded { baseline, layers: pending.layers }));
        }
    }

    fn not_recorded(&self, image: Option<ImageName>, container: Option<ContainerId>, reason: &str) {
        let _degrade = self.shared.health.record(Failure::BaselineUnavailable);
        tracing::warn!(
            image = image.map(|image| printable(image.name.as_bytes())),
            container = container.map(|container| container.to_string()),
            "no baseline: {reason}"
        );
    }

    fn baseline_of(&mut self, job: &RecordRequest) -> Result<Arc<ImageBaseline>, String> {
        let Some(chain_id) = job.chain_id() else { return Err("there are no layers".into()) };
        let store = Arc::clone(&self.shared.store);
        // Each layer is counted once: when it is proved, if the job requests that.
        let counted = job.progress.as_deref().filter(|_| job.proof == Proof::Later);
        if let Some(progress) = &job.progress {
            let total = u32::try_from(job.layers.len()).unwrap_or(u32::MAX);
            progress.layers_total.store(total, Ordering::Relaxed);
        }
        let text = |err: store::Error| with_causes(&err);

        // Held open until the image holds them, so that each is checked once.
        let mut held = Vec::with_capacity(job.layers.len());
        let mut ids = Vec::with_capacity(job.layers.len());
        for layer in &job.layers {
            if job.container.is_none() {
                self.record_for_containers();
            }
            if !store.has_layer_for(layer.id, ids.is_empty()).map_err(text)? {
                self.record_layer(job, layer, &ids)?;
            }
            held.push(store.layer(layer.id).map_err(text)?);
            ids.push(layer.id);
            if let Some(progress) = counted {
                progress.layers_done.fetch_add(1, Ordering::Relaxed);
            }
        }
        if store.layers_of(chain_id).as_ref() == Some(&ids)
            && let Some(baseline) = store.image(chain_id).map_err(text)?
        {
            if let Some(image) = &job.image {
                store.name_image(chain_id, image).map_err(text)?;
            }
            return Ok(baseline);
        }
        store
            .write_image(chain_id, ids, job.image.as_ref())
            .map_err(text)?
            .ok_or_else(|| "a layer's baseline was lost while it was recorded".into())
    }

    /// Records what containers wait for, before the rest of an image.
    fn record_for_containers(&mut self) {
        while let Ok(job) = self.inbox.urgent.try_recv() {
            self.record(job, None);
        }
    }

    fn record_layer(
        &mut self,
        job: &RecordRequest,
        layer: &Layer,
        below: &[LayerId],
    ) -> Result<(), String> {
        let mut interruptions = if job.container.is_some() { 0 } else { INTERRUPTIONS };
        loop {
            self.shared.interruption.set_current((interruptions > 0).then_some(layer.id));
            let result = self.read_layer(layer, below, job.progress.as_deref());
            self.shared.interruption.set_current(None);
            match result {
                Ok(()) => return Ok(()),
                // It is recorded, but its proof was lost. It lacks what the layer hides if it
                // was an image's bottom layer then. That is better than no baseline.
                Err(NotRecorded::Failed(reason))
                    if self.shared.store.proof(layer.id).is_none()
                        && self.shared.store.has_layer(layer.id).unwrap_or(false) =>
                {
                    tracing::warn!(
                        layer = %layer.id,
                        "what was recorded earlier is used, because it cannot be read again: {reason}"
                    );
                    return Ok(());
                }
                Err(NotRecorded::Failed(reason)) => {
                    return Err(format!("layer {}: {reason}", layer.id));
                }
                Err(NotRecorded::Interrupted) if self.shared.interruption.is_stopped() => {
                    return Err(STOPPING.into());
                }
                Err(NotRecorded::Interrupted) => {
                    interruptions = interruptions.saturating_sub(1);
                    self.record_for_containers();
                    // A container may have needed this layer too.
                    let store = &self.shared.store;
                    if store.has_layer_for(layer.id, below.is_empty()).unwrap_or(false) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Records a layer from its directory, or else from its blob.
    fn read_layer(
        &mut self,
        layer: &Layer,
        below: &[LayerId],
        progress: Option<&Progress>,
    ) -> Result<(), NotRecorded> {
        let Some(directory) = directory_of(layer) else {
            return self.read_blob(layer, below, progress);
        };
        let started = Timestamp::now();
        let store = Arc::clone(&self.shared.store);
        // Read again because it was recorded as the bottom of an image: the proof still
        // holds, but the record lacks what the layer hides.
        let bottom = below.is_empty();
        let pool = self.take_pool()?;
        let before = store.proof(layer.id).filter(|proof| !proof.hides && !bottom);
        let before = match (before, store.layer(layer.id)) {
            (Some(proof), Ok(Some(known))) => Some((proof, known)),
            (_, _) => None,
        };
        let recorded = store.record_layer(layer.id, |found| {
            let interrupt = self.shared.interruption.flag();
            walk_to(&pool, directory, &Reading::default(), progress, interrupt, found)
        });
        self.pool = Some(pool);
        let newest_change = match recorded {
            Ok(newest_change) => newest_change,
            Err(RecordError::Walk(walk::Error::Stopped)) => return Err(NotRecorded::Interrupted),
            Err(RecordError::Walk(err)) if layer.blob.is_some() => {
                tracing::info!(
                    layer = %layer.id,
                    "recording from the blob, because its directory cannot be read: {}",
                    with_causes(&err)
                );
                return self.read_blob(layer, below, progress).map_err(|not| match not {
                    NotRecorded::Interrupted => NotRecorded::Interrupted,
                    NotRecorded::Failed(reason) => {
                        NotRecorded::Failed(format!("{}; and {reason}", with_causes(&err)))
                    }
                });
            }
            Err(err) => return Err(NotRecorded::Failed(with_causes(&err))),
        };
        let checked = Checked {
            path: directory.to_owned(),
            newest_change,
            checked_at: started,
            unchanged_at: started,
        };
        self.keep_recorded(layer, bottom, before, checked)
    }

    fn take_pool(&mut self) -> Result<rayon::ThreadPool, NotRecorded> {
        match self.pool.take() {
            Some(pool) => Ok(pool),
            None => hashing_pool(self.settings.threads, &self.shared.urgency)
                .map_err(|err| NotRecorded::Failed(with_causes(&err))),
        }
    }

    /// Keeps the proof of a layer that was recorded from a directory. `before`: what was
    /// recorded of it as the bottom of an image, with its proof.
    fn keep_recorded(
        &self,
        layer: &Layer,
        bottom: bool,
        before: Option<(LayerProof, Arc<LayerBaseline>)>,
        checked: Checked,
    ) -> Result<(), NotRecorded> {
        let failed = |err: store::Error| NotRecorded::Failed(with_causes(&err));
        let lost = || NotRecorded::Failed("it was not read back as it was written".to_owned());
        let written = self.shared.store.layer(layer.id).map_err(failed)?.ok_or_else(lost)?;
        let before =
            before.filter(|(_, known)| self.still_holds(layer, &checked.path, known, &written));
        let mut proof = match before {
            Some((proof, _)) => LayerProof { checksum: written.checksum(), ..proof },
            None => LayerProof::new(written.checksum(), layer.chain_id),
        };
        proof.hides = !bottom;
        proof.recorded_in = layer.chain_id;
        proof.not_verified = layer.blob.is_none().then(|| NO_BLOB.to_owned());
        proof.set_directory(checked);
        self.write_proof(layer.id, proof);
        Ok(())
    }

    /// Whether what was recorded of a layer as the bottom of an image equals what was now
    /// recorded of it elsewhere, apart from what the layer hides.
    ///
    /// If not, two directories of one layer differ, and it is not known which is right. The
    /// later one is needed; the blob, if there is one, decides later.
    fn still_holds(
        &self,
        layer: &Layer,
        directory: &Path,
        known: &LayerBaseline,
        written: &LayerBaseline,
    ) -> bool {
        let mut comparison = Comparison::new(known, true);
        written.entries().for_each(|record| comparison.found(&record.to_entry()));
        let (differences, total) = without_implied(comparison.finish(), false);
        if total > 0 {
            self.send(BaselineEvent::Tampered {
                layer: layer.id,
                compared_with: directory_name(directory),
                directories: vec![directory.to_owned()],
                differences,
                total,
            });
        }
        total == 0
    }

    fn read_blob(
        &mut self,
        layer: &Layer,
        below: &[LayerId],
        progress: Option<&Progress>,
    ) -> Result<(), NotRecorded> {
        let store = Arc::clone(&self.shared.store);
        let failed = |err: store::Error| NotRecorded::Failed(with_causes(&err));
        let stack = match below {
            [] => None,
            _ => store.stack(layer.chain_id, below).map_err(failed)?,
        };
        let unpacked = unpack(
            self.blobs.as_ref(),
            layer,
            stack.as_ref(),
            &self.limits,
            progress,
            self.shared.interruption.flag(),
        );
        let Unpacked { entries, .. } = unpacked.map_err(|unproved| {
            self.note_unproved(layer, &unproved);
            match unproved {
                Unproved::Stopped => NotRecorded::Interrupted,
                unproved if directory_of(layer).is_none() => NotRecorded::Failed(format!(
                    "it has no directory of its own, and {}",
                    unproved.reason()
                )),
                unproved => NotRecorded::Failed(unproved.reason().to_owned()),
            }
        })?;
        let written = store.write_layer(layer.id, entries).map_err(failed)?;
        self.write_proof(
            layer.id,
            LayerProof {
                known_by: KnownBy::Verified,
                blob: layer.blob.as_ref().map(|blob| blob.digest.clone()),
                verified_at: Some(Timestamp::now()),
                ..LayerProof::new(written.checksum(), layer.chain_id)
            },
        );
        Ok(())
    }
}
