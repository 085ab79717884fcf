//! Requests comparisons from the verifier: for a job, for containers' directories, for
//! layers that are not verified, and periodically.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::worker::{PendingJob, Worker, directory_of};
use crate::baseline::merge::ImageBaseline;
use crate::baseline::proof::{LayerProof, unchanged_since};
use crate::baseline::types::{KnownBy, LayerReport, Progress, Proof, Witness};
use crate::baseline::verify::{ComparedWith, NO_BLOB, Task};
use crate::model::{ChainId, Layer};

impl Worker {
    /// Requests the comparisons that a job waits for.
    pub(super) fn request_comparisons(
        &mut self,
        ticket: u64,
        layers: &[Layer],
        proof: Proof,
        progress: Option<Arc<Progress>>,
        baseline: &ImageBaseline,
    ) -> PendingJob {
        let store = Arc::clone(&self.shared.store);
        let mut pending = PendingJob {
            chain_id: baseline.chain_id(),
            layers: Vec::with_capacity(layers.len()),
            open: vec![0; layers.len()],
            progress,
            done: None,
        };
        for (place, layer) in layers.iter().enumerate() {
            let known_by = store.proof(layer.id).map_or(KnownBy::Snapshot, |proof| proof.known_by);
            let mut report = LayerReport {
                id: layer.id,
                known_by,
                blob: Witness::NotAsked,
                directory: Witness::NotAsked,
                differences: Vec::new(),
            };
            let mut comparisons = Vec::new();
            let with_blob = match proof {
                Proof::Later => false,
                Proof::Blobs => known_by != KnownBy::Verified,
                Proof::Deep => true,
            };
            if with_blob {
                comparisons.push(ComparedWith::Blob);
            }
            if proof == Proof::Deep {
                let directories = self.directories_of(layer);
                if directories.is_empty() {
                    let reason = "its snapshotter keeps no directory of it that is known";
                    report.directory = Witness::Unavailable(reason.into());
                }
                comparisons.extend(directories.into_iter().map(ComparedWith::Directory));
            }
            pending.open[place] = comparisons.len();
            if let (0, Some(progress), true) =
                (comparisons.len(), &pending.progress, proof != Proof::Later)
            {
                progress.layers_done.fetch_add(1, Ordering::Relaxed);
            }
            for with in comparisons {
                let progress = pending.progress.clone();
                let ticket = Some(ticket);
                self.shared.agenda.add(Task { ticket, progress, ..task(layers, place, with) });
            }
            pending.layers.push(report);
        }
        pending
    }

    /// The directories in which a layer is unpacked, as far as they are known.
    fn directories_of(&self, layer: &Layer) -> Vec<PathBuf> {
        let users = self.containers.users.values().flat_map(|user| &user.layers);
        let same = users.filter(|other| other.id == layer.id).filter_map(directory_of);
        let mut directories: Vec<PathBuf> =
            directory_of(layer).into_iter().chain(same).map(Path::to_owned).collect();
        directories.sort();
        directories.dedup();
        directories
    }

    /// Requests comparisons of the directories that containers have of this chain: those
    /// that were not compared yet, and those not compared since the newest was unpacked.
    pub(super) fn compare_directories(&self, chain_id: ChainId) {
        let store = &self.shared.store;
        let mut compared = Vec::new();
        for user in self.containers.of_chain(chain_id) {
            for (place, layer) in user.layers.iter().enumerate() {
                let Some(directory) = directory_of(layer) else { continue };
                let given_up = &self.comparisons.given_up;
                let proof = store.proof(layer.id);
                match proof.as_ref().and_then(|proof| proof.directory(directory)) {
                    Some(checked) => compared.push((user, place, checked.clone())),
                    None if given_up.contains(&(layer.id, directory.to_owned())) => (),
                    None => {
                        let with = ComparedWith::Directory(directory.to_owned());
                        self.shared.agenda.add(task(&user.layers, place, with));
                    }
                }
            }
        }
        let since = unchanged_since(compared.iter().map(|(_, _, checked)| Some(checked)));
        for (user, place, checked) in &compared {
            if since.is_some_and(|since| checked.seen_until() < since.newest) {
                let (directory, since) = (checked.path.clone(), checked.newest_change);
                let with = ComparedWith::Changes { directory, since };
                self.shared.agenda.add(task(&user.layers, *place, with));
            }
        }
    }

    /// Requests comparisons with the blobs of layers that are not verified, or keeps why
    /// they are not verified.
    pub(super) fn verify_later(&mut self, layers: &[Layer]) {
        for (place, layer) in layers.iter().enumerate() {
            let Some(proof) = self.proof_or_new(layer) else { continue };
            if proof.known_by == KnownBy::Verified {
                continue;
            }
            let reason = match &layer.blob {
                _ if !self.settings.verify => "verification is turned off (baseline.verify)",
                Some(blob) if self.comparisons.wrong_blobs.contains(blob) => continue,
                Some(_) => {
                    self.shared.agenda.add(task(layers, place, ComparedWith::Blob));
                    continue;
                }
                None if proof.not_verified.is_some() => continue,
                None => NO_BLOB,
            };
            self.write_proof(layer.id, LayerProof { not_verified: Some(reason.into()), ..proof });
        }
    }

    /// A layer's proof; an empty one if it was lost. `None` if the layer's file is lost too.
    pub(super) fn proof_or_new(&self, layer: &Layer) -> Option<LayerProof> {
        let store = &self.shared.store;
        store.proof(layer.id).or_else(|| {
            let file = store.layer(layer.id).ok()??;
            Some(LayerProof::new(file.checksum(), layer.chain_id))
        })
    }

    /// Requests the comparison of the directory that was compared the longest ago.
    ///
    /// Every directory has its turn within half of the period. A turn is left out only if
    /// the directory was compared within the other half. So no comparison gets older than
    /// the period, and the reading is spread over it.
    pub(super) fn recheck(&mut self, now: Instant) {
        let half = self.settings.recheck_period / 2;
        let rechecked = &mut self.comparisons.rechecked;
        let mut oldest: Option<(Option<Timestamp>, Task)> = None;
        let mut directories = HashSet::new();
        for user in self.containers.users.values() {
            for (place, layer) in user.layers.iter().enumerate() {
                let Some(directory) = directory_of(layer) else { continue };
                let key = (layer.id, directory.to_owned());
                let proof = self.shared.store.proof(layer.id);
                let checked = proof.as_ref().and_then(|proof| proof.directory(directory));
                // A directory that differs or cannot be read has its turn too, but not
                // every turn.
                let turn =
                    checked.map(|checked| checked.checked_at).max(rechecked.get(&key).copied());
                if !directories.insert(key) {
                    continue;
                }
                if oldest.as_ref().is_none_or(|(other, _)| turn < *other) {
                    let with = ComparedWith::Again(directory.to_owned());
                    oldest = Some((turn, task(&user.layers, place, with)));
                }
            }
        }
        let turns = u32::try_from(directories.len()).unwrap_or(u32::MAX).max(1);
        self.next_recheck = now + (half / turns).max(Duration::from_millis(10));
        rechecked.retain(|key, _| directories.contains(key));
        if let Some((turn, task)) = oldest
            && turn.is_none_or(|turn| age(turn) >= half)
            && let ComparedWith::Again(directory) = &task.with
        {
            rechecked.insert((task.layer.id, directory.clone()), Timestamp::now());
            self.shared.agenda.add(task);
        }
    }
}

/// A comparison of the layer at that place of a stack, which no job waits for.
fn task(layers: &[Layer], place: usize, with: ComparedWith) -> Task {
    Task {
        layer: layers[place].clone(),
        below: layers[..place].iter().map(|layer| layer.id).collect(),
        with,
        ticket: None,
        progress: None,
    }
}

fn age(time: Timestamp) -> Duration {
    // If the clock was set back, everything is young for a while.
    Duration::try_from(Timestamp::now().duration_since(time)).unwrap_or_default()
}
