//! Keeps the results of comparisons: in the proofs, in the events, and in the reports that
//! jobs wait for.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use jiff::Timestamp;

use super::report::ComparisonReport;
use super::worker::{PendingJob, Worker, directory_name};
use crate::baseline::causes::with_causes;
use crate::baseline::layer::LayerEntry;
use crate::baseline::proof::{Checked, LayerProof};
use crate::baseline::types::{BaselineEvent, KnownBy, LayerDifference, Recorded, Witness};
use crate::baseline::verify::{ComparedWith, Outcome, Task, TaskResult, Unproved};
use crate::health::Failure;
use crate::model::{ChainId, FileTime, Layer, LayerId};

/// A directory as it was compared.
struct ComparedDirectory {
    started: Timestamp,
    differences: Vec<LayerDifference>,
    total: u64,
    newest_change: FileTime,
}

impl Worker {
    /// Keeps the result of a comparison.
    pub(super) fn keep(&mut self, Outcome { task, started, against, result }: Outcome) {
        let store = Arc::clone(&self.shared.store);
        let id = task.layer.id;
        // If the layer was recorded anew meanwhile, the result is about another file.
        let proof = self.proof_or_new(&task.layer).filter(|proof| against == Some(proof.checksum));
        let mut report = ComparisonReport::default();
        match (result, proof) {
            (TaskResult::Proved { .. } | TaskResult::Compared { .. }, None) => {
                if store.has_layer(id).unwrap_or(false) {
                    return self.shared.agenda.add_again(task);
                }
                report.unavailable("its baseline was removed meanwhile".to_owned(), &task);
            }
            (TaskResult::Proved { differences, total, entries }, Some(proof)) => {
                self.keep_proved(&task, &proof, differences, total, entries, &mut report);
            }
            (TaskResult::NotProved(unproved), proof) => {
                self.note_unproved(&task.layer, &unproved);
                let reason = unproved.reason();
                if let Some(proof) = proof.filter(|proof| proof.known_by != KnownBy::Verified) {
                    self.write_proof(
                        id,
                        LayerProof { not_verified: Some(reason.to_owned()), ..proof },
                    );
                }
                report.blob = Some(Witness::Unavailable(reason.to_owned()));
            }
            (TaskResult::Compared { differences, total, newest_change }, Some(proof)) => {
                let compared = ComparedDirectory { started, differences, total, newest_change };
                self.keep_compared(&task, proof, compared, &mut report);
            }
            (TaskResult::NotCompared(reason), proof) => {
                if let (
                    ComparedWith::Directory(path) | ComparedWith::Again(path),
                    Some(mut proof),
                ) = (&task.with, proof)
                {
                    tracing::debug!(layer = %id, "a directory was not compared: {reason}");
                    self.comparisons.given_up.insert((id, path.clone()));
                    proof.forget_directory(path);
                    self.write_proof(id, proof);
                }
                report.unavailable(reason, &task);
            }
        }
        self.update_containers(id, &task.with);
        if let Some(ticket) = task.ticket {
            self.add_to_job(ticket, id, report);
        }
    }

    fn keep_proved(
        &mut self,
        task: &Task,
        proof: &LayerProof,
        differences: Vec<LayerDifference>,
        total: u64,
        entries: Vec<LayerEntry>,
        report: &mut ComparisonReport,
    ) {
        let id = task.layer.id;
        let store = Arc::clone(&self.shared.store);
        let hides = |entry: &LayerEntry| match entry {
            LayerEntry::Whiteout(_) | LayerEntry::OpaqueDirectory(_) => true,
            LayerEntry::File(_) => false,
        };
        let lacks_what_it_hides = !proof.hides && entries.iter().any(hides);
        let mut proved = LayerProof {
            hides: true,
            known_by: KnownBy::Verified,
            blob: task.layer.blob.as_ref().map(|blob| blob.digest.clone()),
            verified_at: Some(Timestamp::now()),
            not_verified: None,
            ..proof.clone()
        };
        report.blob = Some(Witness::Same);
        if total > 0 || lacks_what_it_hides {
            match store.write_layer(id, entries) {
                Ok(layer) => proved.checksum = layer.checksum(),
                Err(err) => {
                    // The next job tries it again.
                    tracing::warn!("{}", with_causes(&err));
                    report.blob = Some(Witness::Unavailable(with_causes(&err)));
                    return;
                }
            }
        }
        let directories: Vec<PathBuf> =
            proof.directories.iter().map(|checked| checked.path.clone()).collect();
        if total > 0 {
            proved.recorded_in = task.layer.chain_id;
            proved.directories.clear();
        }
        self.write_proof(id, proved);
        if total == 0 {
            return;
        }
        let names: Vec<String> = directories.iter().map(|path| directory_name(path)).collect();
        let compared_with = match names.as_slice() {
            [] => "the directory it was recorded from".to_owned(),
            names => names.join(", "),
        };
        tracing::warn!(
            layer = %id,
            differences = total,
            "what was recorded from {compared_with} differs from the layer's blob; the baseline is the blob's now"
        );
        let differ = directories.iter().map(|path| (id, path.clone()));
        self.comparisons.given_up.extend(differ);
        self.send(BaselineEvent::Tampered {
            layer: id,
            compared_with,
            directories,
            differences: differences.clone(),
            total,
        });
        self.renew_images(id);
        report.directory = Some(Witness::Differs(total));
        report.differences = differences;
    }

    fn keep_compared(
        &mut self,
        task: &Task,
        mut proof: LayerProof,
        compared: ComparedDirectory,
        report: &mut ComparisonReport,
    ) {
        let ComparedDirectory { started, differences, total, newest_change } = compared;
        let id = task.layer.id;
        let (path, is_whole) = match &task.with {
            ComparedWith::Directory(path) | ComparedWith::Again(path) => (path, true),
            ComparedWith::Changes { directory, .. } => (directory, false),
            // A comparison with a blob ends in a proof.
            ComparedWith::Blob => return,
        };
        if total == 0 {
            let checked_at = match proof.directory(path) {
                Some(checked) if !is_whole => checked.checked_at,
                // It was given up meanwhile: the changes alone do not show that all of it is
                // equal.
                None if !is_whole => return,
                Some(_) | None => started,
            };
            // Directories of snapshots that were removed meanwhile are left out.
            proof.directories.retain(|checked| checked.path.exists());
            proof.set_directory(Checked {
                path: path.clone(),
                newest_change,
                checked_at,
                unchanged_at: started,
            });
            self.comparisons.given_up.remove(&(id, path.clone()));
            self.write_proof(id, proof);
            report.directory = Some(Witness::Same);
            return;
        }
        let compared_with = directory_name(path);
        tracing::warn!(
            layer = %id,
            differences = total,
            "{compared_with} differs from the layer's baseline"
        );
        proof.forget_directory(path);
        self.write_proof(id, proof);
        self.comparisons.given_up.insert((id, path.clone()));
        self.send(BaselineEvent::Tampered {
            layer: id,
            compared_with,
            directories: vec![path.clone()],
            differences: differences.clone(),
            total,
        });
        report.directory = Some(Witness::Differs(total));
        report.differences = differences;
    }

    /// Logs and counts a blob that does not have the content that the image names.
    pub(super) fn note_unproved(&mut self, layer: &Layer, unproved: &Unproved) {
        let Some(blob) = &layer.blob else { return };
        match unproved {
            Unproved::Wrong(reason) => {
                let _degrade = self.shared.health.record(Failure::BlobCorrupt);
                tracing::warn!(layer = %layer.id, "a layer cannot be verified: {reason}");
            }
            Unproved::Unreadable(reason) => {
                tracing::warn!(layer = %layer.id, "a layer cannot be verified: {reason}");
            }
            Unproved::Unavailable(_) | Unproved::Stopped => return,
        }
        self.comparisons.wrong_blobs.insert(blob.clone());
    }

    /// Assembles the images of a layer that was recorded anew, and reports them to their
    /// containers.
    fn renew_images(&mut self, id: LayerId) {
        let store = Arc::clone(&self.shared.store);
        for chain_id in store.images_with(id) {
            let layers = store.layers_of(chain_id).unwrap_or_default();
            match store.write_image(chain_id, layers, None) {
                Ok(Some(baseline)) => {
                    if self.containers.of_chain(chain_id).next().is_some() {
                        self.send_ready(chain_id, baseline);
                    }
                }
                Ok(None) => (),
                Err(err) => tracing::warn!("{}", with_causes(&err)),
            }
        }
    }

    /// After a comparison of a layer: reports to its containers if the time has changed up
    /// to which their directories are known, and requests what has to be compared next.
    fn update_containers(&mut self, id: LayerId, with: &ComparedWith) {
        let users = self.containers.users.values();
        let users = users.filter(|user| user.layers.iter().any(|layer| layer.id == id));
        let chains: HashSet<ChainId> = users.map(|user| user.chain_id).collect();
        for chain_id in chains {
            self.send_changed_since(chain_id);
            match with {
                ComparedWith::Directory(_) | ComparedWith::Again(_) => {
                    self.compare_directories(chain_id);
                }
                // Nothing follows, so that this ends also if a clock is wrong.
                ComparedWith::Changes { .. } | ComparedWith::Blob => (),
            }
        }
    }

    /// Adds to the report that a job waits for, and ends the job when its report is
    /// complete.
    fn add_to_job(&mut self, ticket: u64, id: LayerId, report: ComparisonReport) {
        let Some(job) = self.comparisons.pending.get_mut(&ticket) else { return };
        // A layer may be in a stack twice: each place has its own comparisons.
        let place =
            (0..job.layers.len()).find(|&place| job.layers[place].id == id && job.open[place] > 0);
        let Some(place) = place else { return };
        job.open[place] -= 1;
        report.add_to(&mut job.layers[place]);
        if job.open[place] == 0
            && let Some(progress) = &job.progress
        {
            progress.layers_done.fetch_add(1, Ordering::Relaxed);
        }
        if job.open.iter().any(|open| *open > 0) {
            return;
        }
        let Some(PendingJob { chain_id, mut layers, done, .. }) =
            self.comparisons.pending.remove(&ticket)
        else {
            return;
        };
        self.shared.jobs.finish(ticket);
        let store = &self.shared.store;
        for layer in &mut layers {
            let proof = store.proof(layer.id);
            layer.known_by = proof.map_or(KnownBy::Snapshot, |proof| proof.known_by);
        }
        let baseline = match store.image(chain_id) {
            Ok(Some(baseline)) => Ok(baseline),
            Ok(None) => Err("its baseline was removed meanwhile".to_owned()),
            Err(err) => Err(with_causes(&err)),
        };
        if let Some(done) = done {
            done(baseline.map(|baseline| Recorded { baseline, layers }));
        }
    }
}
