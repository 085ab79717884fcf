//! What one comparison adds to the report on a layer. Pure.

use crate::baseline::types::{LayerDifference, LayerReport, MAX_DIFFERENCES, Witness};
use crate::baseline::verify::{ComparedWith, Task};

/// The result of one comparison, as a part of a layer's report.
#[derive(Default)]
pub(super) struct ComparisonReport {
    pub(super) blob: Option<Witness>,
    pub(super) directory: Option<Witness>,
    pub(super) differences: Vec<LayerDifference>,
}

impl ComparisonReport {
    pub(super) fn unavailable(&mut self, reason: String, task: &Task) {
        match task.with {
            ComparedWith::Blob => self.blob = Some(Witness::Unavailable(reason)),
            ComparedWith::Directory(_) | ComparedWith::Changes { .. } | ComparedWith::Again(_) => {
                self.directory = Some(Witness::Unavailable(reason));
            }
        }
    }

    pub(super) fn add_to(self, report: &mut LayerReport) {
        if let Some(blob) = self.blob {
            report.blob = blob;
        }
        if let Some(directory) = self.directory {
            let before = std::mem::replace(&mut report.directory, Witness::NotAsked);
            report.directory = worse(before, directory);
        }
        let room = MAX_DIFFERENCES.saturating_sub(report.differences.len());
        for difference in self.differences.into_iter().take(room) {
            if !report.differences.contains(&difference) {
                report.differences.push(difference);
            }
        }
    }
}

/// The result that stands for two directories of one layer.
fn worse(one: Witness, other: Witness) -> Witness {
    match (one, other) {
        (Witness::Differs(one), Witness::Differs(other)) => Witness::Differs(one.max(other)),
        (Witness::Differs(total), _) | (_, Witness::Differs(total)) => Witness::Differs(total),
        (Witness::Unavailable(reason), _) | (_, Witness::Unavailable(reason)) => {
            Witness::Unavailable(reason)
        }
        (Witness::Same, _) | (_, Witness::Same) => Witness::Same,
        (Witness::NotAsked, Witness::NotAsked) => Witness::NotAsked,
    }
}
