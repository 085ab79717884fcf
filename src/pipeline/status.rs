//! The status of the loop, and its containers, as clients see them. It only reads the state,
//! and names each problem in words.

use super::gaps::Gap;
use super::requests::{ContainerView, EndpointView, Status};
use super::state::State;
use crate::health::Failure;
use crate::inventory::{BaselineState, Entry, WatchState};
use crate::model::{ContainerId, Task};

impl State {
    pub fn status(&self) -> Status {
        let mut problems = Vec::new();
        let mut endpoints = Vec::new();
        for (socket, lost) in self.endpoints.iter() {
            if let Some(reason) = lost {
                problems.push(format!("not connected to {socket}: {reason}"));
            }
            endpoints.push(EndpointView {
                socket: socket.to_owned(),
                connected: lost.is_none(),
                reason: lost.cloned().unwrap_or_default(),
            });
        }
        let (mut watched, mut waiting) = (0, 0);
        for (id, entry) in self.inventory.iter().filter(|(_, entry)| entry.run.pid.is_some()) {
            match &entry.watch.state {
                WatchState::Attached { .. } => watched += 1,
                WatchState::Refused(reason) => {
                    problems.push(format!("container {id} is not watched: {reason}"));
                }
                WatchState::No | WatchState::Requested => (),
            }
            match &entry.baseline.state {
                BaselineState::Unknown | BaselineState::Pending(_) => waiting += 1,
                BaselineState::Failed(_, reason) | BaselineState::None(reason) => {
                    problems.push(format!("container {id} has no baseline: {reason}"));
                }
                BaselineState::Ready(_) => (),
            }
        }
        let is_connected = endpoints.iter().all(|one| one.connected);
        self.describe_losses(is_connected, &mut problems);
        Status {
            started_at: self.started_at,
            endpoints,
            containers_watched: watched,
            containers_waiting: waiting,
            problems,
            gaps: self.gaps.all(),
            stopped_rules: self.responses.breaker.stopped().cloned().collect(),
        }
    }

    fn describe_losses(&self, is_connected: bool, problems: &mut Vec<String>) {
        let folded = self.inventory.iter().map(|(id, entry)| (id, entry.findings.folded()));
        problems.extend(folded.filter(|(_, folded)| *folded > 0).map(|(id, folded)| {
            format!(
                "container {id} has more findings than are kept one by one: {folded} sightings \
                 are counted in one finding of each kind (findings_full)"
            )
        }));
        // A lost connection has a line of its own, and so have folded findings.
        let is_folded = |id: &ContainerId| {
            self.inventory.get(id).is_some_and(|entry| entry.findings.folded() > 0)
        };
        let needs_line = |gap: &&Gap| match gap.failure {
            Failure::ContainerdLost => is_connected,
            Failure::FindingsFull => !gap.container.as_ref().is_some_and(is_folded),
            _ => true,
        };
        problems.extend(self.gaps.open().filter(needs_line).map(|gap| {
            let container = gap
                .container
                .as_ref()
                .map_or("every container".to_owned(), |id| format!("container {id}"));
            let (since, name) = (gap.since, gap.failure.name());
            format!("the view of {container} is incomplete since {since} ({name}): {}", gap.detail)
        }));
    }
}

/// A container as clients see it; `None` if it has no record. `incomplete` names its losses.
pub(super) fn view(entry: &Entry, incomplete: Vec<&'static str>) -> Option<ContainerView> {
    let mut container = entry.container.clone().filter(|_| !entry.removed)?;
    if container.task.as_ref().map(|task| task.pid) != entry.run.pid {
        let task = |pid| Task {
            pid,
            start_time: entry.run.init.map(|init| init.start_time),
            paused: false,
            terminal_input: None,
        };
        container.task = entry.run.pid.map(task);
    }
    let problem = match (&entry.watch.state, &entry.baseline.state) {
        (WatchState::Refused(reason), _)
        | (_, BaselineState::Failed(_, reason) | BaselineState::None(reason)) => {
            Some(reason.clone())
        }
        _ => None,
    };
    Some(ContainerView {
        baseline: entry.baseline.state.describe(),
        watched: entry.watch.is_attached(),
        armed_before_start: entry.watch.armed_before_start,
        problem,
        findings: entry.findings.reported() as u64,
        findings_by_severity: entry.findings.by_severity(),
        incomplete,
        container,
    })
}
