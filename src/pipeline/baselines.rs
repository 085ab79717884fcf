//! Baselines of images: they become ready, and what waited for them is judged; or they fail,
//! and a container without one is reported after a while. Layers that were tampered with go to
//! `layers`. The room `baseline` records; this file only requests and takes in.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::commands::{scan, send_entry_point, send_trust};
use super::findings::{new_finding, set_container};
use super::layers::Tampered;
use super::messages::Effect;
use super::responses::Actor;
use super::state::State;
use crate::baseline::{BaselineEvent, ImageBaseline};
use crate::detect;
use crate::health::Failure;
use crate::inventory::BaselineState;
use crate::model::finding::Subject;
use crate::model::{ChainId, ContainerId, FileTime, FindingId, ImageReference, Kind};

/// The source of findings about a missing baseline.
const BASELINE: &str = "baseline";

/// A baseline that is ready within this time was only late: the config of an image is read
/// a moment after its container, and a busy recorder tries again.
const PATIENCE: SignedDuration = SignedDuration::from_secs(10);

impl State {
    pub(super) fn baseline_event(
        &mut self,
        event: BaselineEvent,
        image: ImageReference,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        match event {
            BaselineEvent::Tampered { layer, compared_with, directories, differences, total } => {
                let tampered =
                    Tampered { layer, compared_with, directories, differences, total, image };
                self.layer_tampered(tampered, now, effects);
            }
            BaselineEvent::Ready { chain_id, baseline, unchanged_since } => {
                self.baseline_ready(chain_id, &baseline, unchanged_since, now, effects);
                self.former_baseline_ready(chain_id, &baseline, now, effects);
            }
            BaselineEvent::Failed { chain_id, reason } => {
                self.baseline_failed(chain_id, &reason, now, effects);
            }
        }
    }

    fn baseline_ready(
        &mut self,
        chain_id: ChainId,
        baseline: &Arc<ImageBaseline>,
        unchanged_since: Option<FileTime>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let waiting: Vec<ContainerId> = self
            .inventory
            .iter()
            .filter(|(_, entry)| entry.chain_id() == Some(chain_id))
            .map(|(id, _)| id.clone())
            .collect();
        for id in waiting {
            let entry = self.inventory.entry(&id);
            let is_known = entry.baseline.unchanged_since == unchanged_since
                && matches!(&entry.baseline.state, BaselineState::Ready(known)
                    if Arc::ptr_eq(known, baseline));
            if is_known {
                // The job of another container has ended.
                continue;
            }
            entry.baseline.state = BaselineState::Ready(baseline.clone());
            entry.baseline.unchanged_since = unchanged_since;
            entry.baseline.missing_since = None;
            self.without_baseline.remove(&id);
            send_trust(&id, entry, effects);
            if let Some(container) = &entry.container {
                let entry_point = detect::entry_point(baseline, &container.entry_point);
                entry.baseline.entry_point = entry_point;
            }
            send_entry_point(&id, entry, effects);
            for observation in entry.backlog.take() {
                self.judge(&observation, now, effects);
            }
            if self.gaps.is_open(Failure::BaselineBacklogFull, &id) {
                // The scan finds again what had no room in the backlog.
                effects.push(scan(id));
            }
        }
    }

    /// A container may have lost its ID to another one before its baseline was ready.
    fn former_baseline_ready(
        &mut self,
        chain_id: ChainId,
        baseline: &Arc<ImageBaseline>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let mut waiting = Vec::new();
        for (_, entry) in self.inventory.iter_mut().filter(|(_, entry)| entry.has_former()) {
            entry.swap_with_former();
            if entry.chain_id() == Some(chain_id)
                && !matches!(entry.baseline.state, BaselineState::Ready(_))
            {
                entry.baseline.state = BaselineState::Ready(Arc::clone(baseline));
                if let Some(container) = &entry.container {
                    let entry_point = detect::entry_point(baseline, &container.entry_point);
                    entry.baseline.entry_point = entry_point;
                }
                waiting.extend(entry.backlog.take());
            }
            entry.swap_with_former();
        }
        for observation in waiting {
            self.judge(&observation, now, effects);
        }
    }

    fn baseline_failed(
        &mut self,
        chain_id: ChainId,
        reason: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let mut failed = Vec::new();
        for (id, entry) in self.inventory.iter_mut() {
            if entry.chain_id() == Some(chain_id)
                && !matches!(entry.baseline.state, BaselineState::Ready(_))
            {
                entry.baseline.state = BaselineState::Failed(chain_id, reason.to_owned());
                send_trust(id, entry, effects);
                failed.push(id.clone());
            }
        }
        for id in failed {
            self.misses_baseline(&id, now);
        }
    }

    /// Notes that a container has no baseline. It is reported when this has lasted for a
    /// while.
    pub(super) fn misses_baseline(&mut self, id: &ContainerId, now: Timestamp) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        entry.baseline.missing_since.get_or_insert(now);
        self.without_baseline.insert(id.clone());
    }

    /// When the first missing baseline is to be reported.
    pub(super) fn missing_baseline_due(&self) -> Option<Timestamp> {
        self.without_baseline
            .iter()
            .filter_map(|id| self.inventory.get(id)?.baseline.missing_since)
            .min()
            .map(|since| since.saturating_add(PATIENCE).unwrap_or(Timestamp::MAX))
    }

    /// Reports the baselines that have been missing for long enough.
    pub(super) fn report_missing_baselines(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let missing: Vec<ContainerId> = self.without_baseline.iter().cloned().collect();
        for id in missing {
            let since = self.inventory.get(&id).and_then(|entry| entry.baseline.missing_since);
            if since.is_some_and(|since| now.duration_since(since).abs() < PATIENCE) {
                continue;
            }
            // While recording is tried again nothing is reported. If that fails too, the
            // container comes back here.
            self.without_baseline.remove(&id);
            self.report_missing_baseline(&id, now, effects);
        }
    }

    fn report_missing_baseline(
        &mut self,
        id: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        let reason = match &entry.baseline.state {
            BaselineState::Failed(_, reason) | BaselineState::None(reason) => reason.clone(),
            BaselineState::Unknown | BaselineState::Pending(_) | BaselineState::Ready(_) => return,
        };
        // A container that does not run has nothing to be compared.
        if entry.run.pid.is_none() || entry.removed {
            return;
        }
        let kind = Kind::BaselineUnavailable;
        let finding = FindingId::new(Some(id), kind, &Subject::Reason(&reason));
        if entry.findings.contains(&finding) {
            return;
        }
        let report = self.policy.report();
        let mut missing = new_finding(&self.node, report, finding, kind, BASELINE, now);
        set_container(&mut missing, id, entry);
        missing.detail = Some(reason);
        self.decide_finding(&mut missing, None, now);
        if missing.verdict.is_accept() {
            return self.accept_finding(id, missing, now, effects);
        }
        let Some(entry) = self.inventory.get_mut(id) else { return };
        if !entry.findings.has_room_for(&missing) {
            self.fold_finding(id, Actor::default(), &missing, now, effects);
            return;
        }
        entry.insert_finding(missing);
        self.publish(id, finding, Actor::default(), now, effects);
    }
}
