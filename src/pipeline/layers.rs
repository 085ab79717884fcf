//! What is said of an image's layers themselves: that they are not what they
//! should be, or that nobody knows what they should be.

use std::collections::HashSet;
use std::path::PathBuf;

use jiff::{SignedDuration, Timestamp};

use super::gaps::Until;
use super::{
    Effect, Gap, State, entry_evidence, expected, new_finding, removed_evidence, tell_closed,
};
use crate::baseline::merge::Shown;
use crate::baseline::{FileEntry, Known, LayerDifference, LayerEntry};
use crate::budget;
use crate::health::Failure;
use crate::inventory::{BaselineState, Entry, WatchState};
use crate::model::file::is_program;
use crate::model::finding::Subject;
use crate::model::{
    ContainerId, FileEvidence, FileType, FindingId, ImageReference, Kind, LayerId, RootfsPath,
};
use crate::watch::{SensorCommand, Trust};

/// Who has seen what is wrong with a layer, and who misses a baseline.
const VERIFY: &str = "verify";
const BASELINE: &str = "baseline";

/// Where a file lies that is told of here.
const LAYER: &str = "layer";

/// How many differences of one layer are told one by one, for each container.
pub(super) const MAX_TOLD: usize = 100;

/// A baseline that is there within this time was only late: an image's config is
/// read a moment after its container, and a busy recorder tries again.
pub(super) const PATIENCE: SignedDuration = SignedDuration::from_secs(10);

/// A layer that is not what its baseline says.
pub(super) struct Tampered {
    pub(super) layer: LayerId,
    pub(super) witness: String,
    /// Where it was found; empty if that is not known any more.
    pub(super) directories: Vec<PathBuf>,
    pub(super) differences: Vec<LayerDifference>,
    pub(super) total: u64,
    /// One that the layer is of, if it is known.
    pub(super) image: ImageReference,
}

impl State {
    // ---- a layer that was tampered with

    pub(super) fn layer_tampered(
        &mut self,
        mut tampered: Tampered,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        // What may not be told for want of room should not be the programs.
        tampered.differences.sort_by_key(|difference| !concerns_program(difference));
        let holders: Vec<ContainerId> = self
            .inventory
            .iter()
            .filter(|(_, entry)| entry.has_layer(tampered.layer, &tampered.directories))
            .map(|(id, _)| id.clone())
            .collect();
        let mut seen = HashSet::new();
        for id in &holders {
            let Some(entry) = self.inventory.get(id) else { continue };
            let visible: Vec<&LayerDifference> = tampered
                .differences
                .iter()
                .filter(|difference| is_visible(entry, tampered.layer, difference))
                .collect();
            seen.extend(visible.iter().map(|difference| difference.path.clone()));
            self.tell_tampered(&tampered, Some(id), &visible, now, effects);
        }
        let unseen: Vec<&LayerDifference> = tampered
            .differences
            .iter()
            .filter(|difference| !seen.contains(&difference.path))
            .collect();
        self.tell_tampered(&tampered, None, &unseen, now, effects);
    }

    fn tell_tampered(
        &mut self,
        tampered: &Tampered,
        container: Option<&ContainerId>,
        differences: &[&LayerDifference],
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if differences.is_empty() {
            return;
        }
        let unlisted = tampered.total.saturating_sub(tampered.differences.len() as u64);
        let untold = (differences.len().saturating_sub(MAX_TOLD) as u64).saturating_add(unlisted);
        let told = &differences[..differences.len().min(MAX_TOLD)];
        for (number, difference) in told.iter().enumerate() {
            let mut detail = format!("layer {}, {}", tampered.layer, tampered.witness);
            if untold > 0 && number + 1 == told.len() {
                detail = format!("{detail}; {untold} more differences are not told one by one");
            }
            self.tell_difference(tampered, container, difference, detail, now, effects);
        }
        if untold > 0 {
            let _ = self.health.record(Failure::FindingsFull);
            let detail = format!(
                "layer {} differs in {} places, {untold} of them were not told one by one",
                tampered.layer, tampered.total
            );
            // Said whole, if not one by one: more is not to come.
            let (failure, container) = (Failure::FindingsFull, container.cloned());
            let gap = Gap { failure, container, detail, since: now, until: None };
            self.open_gap(gap, Until::Quiet, effects);
        }
    }

    fn tell_difference(
        &mut self,
        tampered: &Tampered,
        container: Option<&ContainerId>,
        difference: &LayerDifference,
        detail: String,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let kind = Kind::BaselineTampered;
        let layer = tampered.layer.to_string();
        let found = fingerprint(difference.found.as_ref());
        let subject = Subject::Layer { layer: &layer, path: &difference.path, found: &found };
        let id = FindingId::new(container, kind, &subject);
        let (entry, is_known, has_room) = match container {
            Some(container) => {
                let Some(entry) = self.inventory.get(container) else { return };
                (Some(entry), entry.findings.contains_key(&id), true)
            }
            None => {
                let known = &self.inventory.of_layers;
                (None, known.contains_key(&id), known.len() < budget::FINDINGS.number)
            }
        };
        // However often the layer is compared, it is told once.
        if is_known {
            return;
        }
        if !has_room {
            let _ = self.health.record(Failure::FindingsFull);
            let detail = format!("{} differs in {layer} and is not told", difference.path);
            self.lost(Failure::FindingsFull, container.cloned(), detail, now, effects);
            return;
        }
        let mut finding = new_finding(&self.node, &self.policy, id, kind, VERIFY, now);
        match (container, entry) {
            (Some(container), Some(entry)) => finding.belongs_to(container, entry),
            _ => finding.image = tampered.image.clone(),
        }
        let known = expected_of(entry, tampered.layer, difference);
        finding.expected = known.as_ref().map(|known| expected(known, None, None));
        finding.file = match (&difference.found, &known) {
            (Some(found), _) => Some(evidence(found)),
            (None, Some(known)) => Some(FileEvidence {
                filesystem: LAYER.to_owned(),
                ..removed_evidence(&difference.path, known)
            }),
            (None, None) => None,
        };
        finding.detail = Some(detail);
        match container {
            Some(container) => {
                let Some(entry) = self.inventory.get_mut(container) else { return };
                if !entry.has_room_for(&finding) {
                    self.fold_finding(container, None, &finding, now, effects);
                    return;
                }
                entry.insert_finding(finding);
                self.publish(container, id, None, now, effects);
            }
            None => {
                effects.push(Effect::record(&finding));
                self.inventory.of_layers.insert(id, finding);
            }
        }
    }

    // ---- a baseline that cannot be had

    /// Notes that a container has no baseline. It is told when that has been so for
    /// a while.
    pub(super) fn misses_baseline(&mut self, id: &ContainerId, now: Timestamp) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        entry.without_baseline.get_or_insert(now);
        self.unsettled.insert(id.clone());
    }

    /// When something is to be done although nothing happens.
    pub fn next_due(&self) -> Option<Timestamp> {
        let without_baseline = self
            .unsettled
            .iter()
            .filter_map(|id| self.inventory.get(id)?.without_baseline)
            .min()
            .map(|since| since.saturating_add(PATIENCE).unwrap_or(Timestamp::MAX));
        let others = [self.unsaid.due(), self.sessions.due(), self.gaps.next_due()];
        others.into_iter().chain([without_baseline, self.kill_due()]).flatten().min()
    }

    pub(super) fn due(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        tell_closed(self.gaps.due(now), effects);
        if self.unsaid.due().is_some_and(|due| due <= now) {
            self.say_all(effects);
        }
        if self.sessions.due().is_some_and(|due| due <= now) {
            self.say_sessions(now, effects);
        }
        self.kill_again(now, effects);
        let unsettled: Vec<ContainerId> = self.unsettled.iter().cloned().collect();
        for id in unsettled {
            let since = self.inventory.get(&id).and_then(|entry| entry.without_baseline);
            if since.is_some_and(|since| now.duration_since(since).abs() < PATIENCE) {
                continue;
            }
            // While it is being tried again nothing is said. If that fails too, it
            // comes back here.
            self.unsettled.remove(&id);
            self.tell_missing_baseline(&id, now, effects);
        }
    }

    fn tell_missing_baseline(
        &mut self,
        id: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        let reason = match &entry.baseline {
            BaselineState::Failed(_, reason) | BaselineState::None(reason) => reason.clone(),
            BaselineState::Unknown | BaselineState::Pending(_) | BaselineState::Ready(_) => return,
        };
        // What does not run has nothing to be compared.
        if entry.pid.is_none() || entry.removed {
            return;
        }
        let kind = Kind::BaselineUnavailable;
        let finding = FindingId::new(Some(id), kind, &Subject::Reason(&reason));
        if entry.findings.contains_key(&finding) {
            return;
        }
        let mut missing = new_finding(&self.node, &self.policy, finding, kind, BASELINE, now);
        missing.belongs_to(id, entry);
        missing.detail = Some(reason);
        if !entry.has_room_for(&missing) {
            self.fold_finding(id, None, &missing, now, effects);
            return;
        }
        entry.insert_finding(missing);
        self.publish(id, finding, None, now, effects);
    }
}

/// How far a container's lower files are trusted. What was seen in another
/// snapshotter's directories of the same layers says nothing of files that are in
/// none.
pub(super) fn trust(entry: &Entry) -> Trust {
    let has_directories = entry
        .container
        .as_ref()
        .is_some_and(|container| container.layers.iter().all(|layer| layer.directory.is_some()));
    match &entry.baseline {
        BaselineState::Ready(_) => {
            entry.unchanged_since.filter(|_| has_directories).map_or(Trust::Unknown, Trust::UpTo)
        }
        BaselineState::Unknown | BaselineState::Pending(_) => Trust::Unknown,
        BaselineState::Failed(..) | BaselineState::None(_) => Trust::NoBaseline,
    }
}

/// Tells the watchers how far to trust, if they watch the container.
pub(super) fn tell_trust(id: &ContainerId, entry: &Entry, effects: &mut Vec<Effect>) {
    match entry.watch {
        WatchState::Asked | WatchState::Attached { .. } => {
            let trust = trust(entry);
            effects.push(Effect::Watch(SensorCommand::Trust { container: id.clone(), trust }));
        }
        WatchState::No | WatchState::Refused(_) => (),
    }
}

/// Tells the watchers what starts the container, if they watch it.
pub(super) fn tell_entry_point(id: &ContainerId, entry: &Entry, effects: &mut Vec<Effect>) {
    let is_watched = matches!(entry.watch, WatchState::Asked | WatchState::Attached { .. });
    if is_watched && !entry.entry_point.is_empty() {
        let (container, paths) = (id.clone(), entry.entry_point.clone());
        effects.push(Effect::Watch(SensorCommand::EntryPoint { container, paths }));
    }
}

fn file_of(entry: &LayerEntry) -> Option<&FileEntry> {
    match entry {
        LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => Some(file),
        LayerEntry::Whiteout(_) => None,
    }
}

fn concerns_program(difference: &LayerDifference) -> bool {
    [&difference.expected, &difference.found]
        .into_iter()
        .flatten()
        .filter_map(file_of)
        .any(|file| file.file_type == FileType::Regular && is_program(file.format, file.mode))
}

/// Whether a container sees that its layer differs here.
fn is_visible(entry: &Entry, layer: LayerId, difference: &LayerDifference) -> bool {
    // What hides the layers below, by being there or by being gone.
    let hides = |entry: &Option<LayerEntry>| match entry {
        Some(LayerEntry::File(file)) => file.file_type != FileType::Directory,
        Some(LayerEntry::Whiteout(_) | LayerEntry::OpaqueDirectory(_)) => true,
        None => false,
    };
    match &entry.baseline {
        BaselineState::Ready(image) => match image.shown_of(layer, &difference.path) {
            Shown::All => true,
            Shown::Below => hides(&difference.expected) != hides(&difference.found),
            Shown::Nothing => false,
        },
        // Not known yet: better told once too often.
        BaselineState::Unknown
        | BaselineState::Pending(_)
        | BaselineState::Failed(..)
        | BaselineState::None(_) => true,
    }
}

/// What should be at the path: what the layer has there or, if it has nothing,
/// what a container sees of the layers below.
fn expected_of(
    entry: Option<&Entry>,
    layer: LayerId,
    difference: &LayerDifference,
) -> Option<Known> {
    let own = difference.expected.as_ref().and_then(file_of);
    match (own, entry.map(|entry| &entry.baseline)) {
        (Some(file), _) => Some(Known { entry: file.clone(), layer }),
        // What the layer itself had there, as it was recorded, was wrong.
        (None, Some(BaselineState::Ready(image))) => {
            image.get(&difference.path).filter(|known| known.layer != layer)
        }
        (None, _) => None,
    }
}

/// Every byte of what a layer holds that two of them can differ in.
fn fingerprint(found: Option<&LayerEntry>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut part = |part: &[u8]| {
        bytes.extend((part.len() as u64).to_le_bytes());
        bytes.extend(part);
    };
    let Some(found) = found else { return Vec::new() };
    let file = match found {
        LayerEntry::Whiteout(_) => {
            part(b"whiteout");
            return bytes;
        }
        LayerEntry::OpaqueDirectory(file) => {
            part(b"opaque");
            file
        }
        LayerEntry::File(file) => file,
    };
    part(match file.file_type {
        FileType::Regular => b"regular",
        FileType::Directory => b"directory",
        FileType::Symlink => b"symlink",
        FileType::CharDevice => b"char",
        FileType::BlockDevice => b"block",
        FileType::Fifo => b"fifo",
        FileType::Socket => b"socket",
    });
    for number in [file.mode, file.uid, file.gid] {
        part(&number.to_le_bytes());
    }
    part(&file.size.to_le_bytes());
    part(file.blake3.as_ref().map_or(&[], |hash| &hash.0[..]));
    part(file.capability.as_deref().unwrap_or_default());
    part(file.link_target.as_deref().unwrap_or_default());
    if let Some(device) = file.device {
        part(&device.major.to_le_bytes());
        part(&device.minor.to_le_bytes());
    }
    bytes
}

/// What lies in the layer on disk.
fn evidence(found: &LayerEntry) -> FileEvidence {
    let whiteout = |path: &RootfsPath| FileEntry {
        file_type: FileType::CharDevice,
        ..FileEntry::directory(path.clone(), 0)
    };
    let file = match found {
        LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => file.clone(),
        LayerEntry::Whiteout(path) => whiteout(path),
    };
    FileEvidence {
        unhashed: (file.file_type != FileType::Regular).then(|| "not_regular".to_owned()),
        ..entry_evidence(&file, LAYER)
    }
}
