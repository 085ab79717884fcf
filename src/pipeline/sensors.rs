//! Events of the sensors: containers are attached or cannot be, observations and scans arrive,
//! and the sensors lose something. Observations go on to `judge`, losses to `losses`.

use jiff::Timestamp;

use super::gaps::{Gap, Until};
use super::judge::sensitive;
use super::losses::record_closed;
use super::messages::Effect;
use super::requests::Difference;
use super::state::State;
use crate::detect;
use crate::health::Failure;
use crate::inventory::{BaselineState, WatchState};
use crate::model::{ContainerId, Fact, FileFact, Observation};
use crate::watch::SensorEvent;

/// What findings say of programs that came unobserved.
const WHILE_DOWN: &str = "it was found after a time in which driftd did not run, and may have run";
const BEFORE_MARKS: &str =
    "it was found after a time in which the container was not watched yet, and may have run";

impl State {
    pub(super) fn sensor_event(
        &mut self,
        event: SensorEvent,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        match event {
            SensorEvent::Attached { container, pid, before_start } => {
                self.attached(&container, pid, before_start);
                self.enforce(&container, true, now, effects);
            }
            SensorEvent::NotAttached { container, pid, reason } => {
                if let Some(entry) = self.inventory.get_mut(&container)
                    && entry.is_newest_run(pid)
                {
                    entry.watch.state = WatchState::Refused(reason);
                    // It will not be scanned. The status reports it as not watched.
                    record_closed(self.gaps.gone(&container, now), effects);
                }
            }
            SensorEvent::Unarmed { container, pid, began, marked } => {
                self.armed_late(container, pid, began, marked, effects);
            }
            SensorEvent::Observed(observation) => self.judge(&observation, now, effects),
            SensorEvent::ScanBatch { ticket, observations, .. } => {
                for observation in observations {
                    if let Some(ticket) = ticket {
                        self.note_difference(ticket, &observation);
                    }
                    self.judge(&observation, now, effects);
                }
            }
            SensorEvent::Scanned { container, ticket, began, complete } => {
                self.scanned(&container, began, complete, now, effects);
                if let Some(pending) = ticket.and_then(|ticket| self.diffs.remove(&ticket)) {
                    pending.finish(complete);
                }
                if self.inventory.get(&container).is_some_and(|entry| {
                    entry.removed && matches!(entry.watch.state, WatchState::No)
                }) {
                    self.remove(&container, now, effects);
                }
            }
            SensorEvent::Compared { ticket, observations, end } => {
                for observation in &observations {
                    self.note_difference(ticket, observation);
                }
                if let Some(complete) = end
                    && let Some(pending) = self.diffs.remove(&ticket)
                {
                    pending.finish(complete);
                }
            }
            SensorEvent::Lost { failure, container, detail, at } => {
                self.lost(failure, container, detail, at, effects);
            }
            SensorEvent::RanInstead { container, denied, instead } => {
                self.ran_instead(&container, &denied, &instead, effects);
            }
            SensorEvent::Over { failure, container } => {
                record_closed(self.gaps.over(failure, container.as_ref(), now), effects);
            }
        }
    }

    fn attached(&mut self, id: &ContainerId, pid: u32, before_start: bool) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        if !entry.is_newest_run(pid) {
            return;
        }
        let is_first = !entry.watch.is_attached();
        if is_first && !before_start && self.was_down && entry.watch.blind_spot.is_none() {
            entry.watch.blind_spot = Some(WHILE_DOWN);
        }
        entry.watch.state = WatchState::Attached { before_start };
        entry.watch.armed_before_start = before_start && entry.watch.unarmed_run != Some(pid);
    }

    /// A container ran for a moment before its marks were in place.
    fn armed_late(
        &mut self,
        container: ContainerId,
        pid: u32,
        began: Timestamp,
        marked: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(entry) = self.inventory.get_mut(&container) {
            entry.watch.unarmed_run = Some(pid);
            if entry.is_newest_run(pid) {
                entry.watch.armed_before_start = false;
            }
            entry.watch.blind_spot = Some(BEFORE_MARKS);
        }
        let milliseconds = marked.duration_since(began).as_millis();
        let gap = Gap {
            failure: Failure::ArmedLate,
            container: Some(container),
            detail: format!(
                "it had run for {milliseconds} ms when its marks were in place: what ran \
                 meanwhile and left nothing was not seen"
            ),
            since: began,
            until: Some(marked),
        };
        // A scan does not find what was there and is gone.
        self.open_gap(gap, Until::Quiet, effects);
    }

    /// A scan of a container is over.
    fn scanned(
        &mut self,
        id: &ContainerId,
        began: Timestamp,
        complete: bool,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let has_ended = self.inventory.get(id).is_none_or(|entry| entry.run.pid.is_none());
        let closed = if complete {
            self.gaps.scanned(id, began, now)
        } else if has_ended {
            self.gaps.gone(id, now)
        } else {
            Vec::new()
        };
        record_closed(closed, effects);
        if complete && let Some(entry) = self.inventory.get_mut(id) {
            entry.watch.blind_spot = None;
        }
    }

    /// Adds what a scan has found to the diff that a client waits for.
    fn note_difference(&mut self, ticket: u64, observation: &Observation) {
        let Some(pending) = self.diffs.get_mut(&ticket) else { return };
        let entry = self.inventory.get(&observation.container);
        let Some((entry, baseline)) = entry.and_then(|entry| match &entry.baseline.state {
            BaselineState::Ready(baseline) => Some((entry, baseline)),
            _ => None,
        }) else {
            pending.truncate();
            return;
        };
        let Fact::File(fact) = &observation.fact else { return };
        let (FileFact::Present { path, .. } | FileFact::Absent { path, .. }) = fact else { return };
        let sensitive = sensitive(&self.policy, entry, observation);
        let assessment = detect::assess(baseline, sensitive, fact);
        pending.add(Difference {
            path: path.clone(),
            change: assessment.change,
            finding: assessment
                .judgements
                .iter()
                .map(|judgement| (judgement.kind, judgement.severity))
                .max_by_key(|(_, severity)| *severity),
        });
    }
}
