//! Losses: something was not seen, and the history gets a gap for it. This file decides what
//! ends a gap; `gaps` holds those that are open.

use std::collections::HashSet;

use jiff::Timestamp;

use super::gaps::{Gap, Until};
use super::messages::Effect;
use super::state::State;
use crate::health::{Failure, Reaction};
use crate::model::ContainerId;

impl State {
    /// Something was lost. While that lasts, the view is incomplete. The history has one gap
    /// for each cause and container, with its beginning and its end.
    pub(super) fn lost(
        &mut self,
        failure: Failure,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let until = match (failure, &container) {
            // Containers that were never announced: none of them can be scanned.
            (Failure::BaselineBacklogFull, container)
                if container.as_ref().is_none_or(|id| self.inventory.get(id).is_none()) =>
            {
                Until::Quiet
            }
            // Layers: no scan makes up for findings about them.
            (Failure::FindingsFull, None) => Until::Quiet,
            (Failure::ScanIncomplete, Some(container)) => {
                Until::Scanned(HashSet::from([container.clone()]))
            }
            // The process will not be read again.
            (Failure::ProcessUnreadable, _) => Until::Quiet,
            _ if failure.reaction() != Reaction::Rescan => Until::Over,
            (_, Some(container)) => Until::Scanned(HashSet::from([container.clone()])),
            (_, None) => Until::Scanned(
                self.inventory
                    .iter()
                    .filter(|(_, entry)| entry.watch.is_attached())
                    .map(|(id, _)| id.clone())
                    .collect(),
            ),
        };
        self.open_gap(Gap { failure, container, detail, since: at, until: None }, until, effects);
    }

    pub(super) fn open_gap(&mut self, gap: Gap, until: Until, effects: &mut Vec<Effect>) {
        // Over at once, if there is nothing that a scan could make up for.
        let is_over = until == Until::Scanned(HashSet::new());
        let recorded = Gap { until: gap.until.or(is_over.then_some(gap.since)), ..gap.clone() };
        if self.gaps.opened(gap, until) {
            effects.push(Effect::gap(recorded));
        }
    }

    /// More findings of a container than are kept one by one.
    pub(super) fn findings_full(
        &mut self,
        container: &ContainerId,
        detail: String,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let _ = self.health.record(Failure::FindingsFull);
        self.lost(Failure::FindingsFull, Some(container.clone()), detail, now, effects);
    }
}

/// Records the end of gaps whose beginning is recorded.
pub(super) fn record_closed(closed: Vec<Gap>, effects: &mut Vec<Effect>) {
    effects.extend(closed.into_iter().map(Effect::gap));
}
