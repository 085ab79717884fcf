//! Layers of images that differ on disk from their baseline (`baseline.tampered`). A
//! difference is reported for each container that sees it, or without a container. The room
//! `baseline` finds the differences; this file makes the findings.

use std::collections::HashSet;
use std::path::PathBuf;

use jiff::Timestamp;

use super::evidence::{entry_evidence, expected, removed_evidence};
use super::findings::{new_finding, set_container};
use super::gaps::{Gap, Until};
use super::messages::Effect;
use super::responses::Actor;
use super::state::State;
use crate::baseline::merge::Shown;
use crate::baseline::{FileEntry, KnownBaseline, LayerDifference, LayerEntry};
use crate::budget;
use crate::health::Failure;
use crate::inventory::{BaselineState, Entry};
use crate::model::file::is_program;
use crate::model::finding::Subject;
use crate::model::{
    ContainerId, FileEvidence, FileType, FindingId, ImageReference, Kind, LayerId, RootfsPath,
};

/// The source of these findings.
const VERIFY: &str = "verify";

/// The filesystem of their files.
const LAYER: &str = "layer";

/// How many differences of one layer are reported one by one, for each container.
pub(super) const MAX_REPORTED: usize = 100;

/// A layer that differs from its baseline.
pub(super) struct Tampered {
    pub(super) layer: LayerId,
    pub(super) compared_with: String,
    /// Where the layer was found; empty if that is not known any more.
    pub(super) directories: Vec<PathBuf>,
    pub(super) differences: Vec<LayerDifference>,
    pub(super) total: u64,
    /// An image that contains the layer, if one is known.
    pub(super) image: ImageReference,
}

impl State {
    pub(super) fn layer_tampered(
        &mut self,
        mut tampered: Tampered,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        // Programs first: the last ones may not be reported one by one.
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
            self.report_tampered(&tampered, Some(id), &visible, now, effects);
        }
        let unseen: Vec<&LayerDifference> = tampered
            .differences
            .iter()
            .filter(|difference| !seen.contains(&difference.path))
            .collect();
        self.report_tampered(&tampered, None, &unseen, now, effects);
    }

    fn report_tampered(
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
        let unreported =
            (differences.len().saturating_sub(MAX_REPORTED) as u64).saturating_add(unlisted);
        let reported = &differences[..differences.len().min(MAX_REPORTED)];
        for (number, difference) in reported.iter().enumerate() {
            let mut detail = format!("layer {}, {}", tampered.layer, tampered.compared_with);
            if unreported > 0 && number + 1 == reported.len() {
                detail =
                    format!("{detail}; {unreported} more differences are not reported one by one");
            }
            self.report_difference(tampered, container, difference, detail, now, effects);
        }
        if unreported > 0 {
            let _ = self.health.record(Failure::FindingsFull);
            let detail = format!(
                "layer {} differs in {} places, {unreported} of them were not reported one by one",
                tampered.layer, tampered.total
            );
            // The layer is reported, if not each difference: no scan makes up for these.
            let (failure, container) = (Failure::FindingsFull, container.cloned());
            let gap = Gap { failure, container, detail, since: now, until: None };
            self.open_gap(gap, Until::Quiet, effects);
        }
    }

    fn report_difference(
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
                (Some(entry), entry.findings.contains(&id), true)
            }
            None => {
                let known = &self.inventory.of_layers;
                (None, known.contains_key(&id), known.len() < budget::FINDINGS.number)
            }
        };
        // The layer may be compared often: a difference is reported once.
        if is_known {
            return;
        }
        if !has_room {
            let _ = self.health.record(Failure::FindingsFull);
            let detail = format!("{} differs in {layer} and is not reported", difference.path);
            self.lost(Failure::FindingsFull, container.cloned(), detail, now, effects);
            return;
        }
        let mut finding = new_finding(&self.node, self.policy.report(), id, kind, VERIFY, now);
        match (container, entry) {
            (Some(container), Some(entry)) => set_container(&mut finding, container, entry),
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
        self.decide_finding(&mut finding, None, now);
        match container {
            Some(container) if finding.verdict.is_accept() => {
                self.accept_finding(container, finding, now, effects);
            }
            Some(container) => {
                let Some(entry) = self.inventory.get_mut(container) else { return };
                if !entry.findings.has_room_for(&finding) {
                    self.fold_finding(container, Actor::default(), &finding, now, effects);
                    return;
                }
                entry.insert_finding(finding);
                self.publish(container, id, Actor::default(), now, effects);
            }
            None => {
                effects.push(Effect::finding(&finding));
                self.inventory.of_layers.insert(id, finding);
            }
        }
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
    // Whether it hides the path in the layers below.
    let hides = |entry: &Option<LayerEntry>| match entry {
        Some(LayerEntry::File(file)) => file.file_type != FileType::Directory,
        Some(LayerEntry::Whiteout(_) | LayerEntry::OpaqueDirectory(_)) => true,
        None => false,
    };
    match &entry.baseline.state {
        BaselineState::Ready(image) => match image.shown_of(layer, &difference.path) {
            Shown::All => true,
            Shown::Below => hides(&difference.expected) != hides(&difference.found),
            Shown::Nothing => false,
        },
        // Not known yet: a difference too many is better than one too few.
        BaselineState::Unknown
        | BaselineState::Pending(_)
        | BaselineState::Failed(..)
        | BaselineState::None(_) => true,
    }
}

/// What should be at the path: the entry of the layer or, if it has none, what a container
/// sees of the layers below.
fn expected_of(
    entry: Option<&Entry>,
    layer: LayerId,
    difference: &LayerDifference,
) -> Option<KnownBaseline> {
    let own = difference.expected.as_ref().and_then(file_of);
    match (own, entry.map(|entry| &entry.baseline.state)) {
        (Some(file), _) => Some(KnownBaseline { entry: file.clone(), layer }),
        // An entry of the image that comes from this layer was recorded wrongly.
        (None, Some(BaselineState::Ready(image))) => {
            image.get(&difference.path).filter(|known| known.layer != layer)
        }
        (None, _) => None,
    }
}

/// Every byte in which two entries of a layer can differ.
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
