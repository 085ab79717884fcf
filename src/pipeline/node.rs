//! Events of the runtime: containers appear, run, end and go. It changes the inventory
//! accordingly, lets the sensors attach and detach, and requests baselines. Executions in
//! containers go to `sessions`.

use std::collections::HashSet;

use jiff::Timestamp;

use super::commands::{scan, send_entry_point, send_trust, trust};
use super::losses::record_closed;
use super::messages::Effect;
use super::sessions::{CONTAINERD, ExecExit, manager};
use super::state::State;
use crate::containerd::RuntimeEvent;
use crate::health::Failure;
use crate::inventory::{BaselineState, Entry, WatchState};
use crate::model::{ChainId, Container, ContainerId, OverlayDirs, ProcessIdentity, Task};
use crate::watch::{SensorCommand, Trust};

impl State {
    pub(super) fn runtime_event(
        &mut self,
        event: RuntimeEvent,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        match event {
            RuntimeEvent::Connected { endpoint } => self.endpoints.connected(endpoint),
            RuntimeEvent::Disconnected { endpoint, reason } => {
                let detail = format!("{endpoint}: {reason}");
                if self.endpoints.disconnected(endpoint, reason) {
                    self.lost(Failure::ContainerdLost, None, detail, now, effects);
                }
            }
            RuntimeEvent::TaskCreated { container, pid, rootfs } => {
                self.task_created(&container, pid, rootfs, now, effects);
            }
            RuntimeEvent::Container(container) => self.container_changed(*container, now, effects),
            RuntimeEvent::TaskExited { container } => self.task_exited(&container, now, effects),
            RuntimeEvent::ExecStarted { container, exec_id, pid } => {
                self.exec_started(&container, exec_id, pid, now);
            }
            RuntimeEvent::ExecExited { container, exec_id, pid, exit, at } => {
                let exited = ExecExit { exec_id: &exec_id, pid, exit, at };
                self.exec_exited(&container, &exited, now, effects);
            }
            RuntimeEvent::Removed { container } => {
                self.task_exited(&container, now, effects);
                self.forget(&container, effects);
            }
            RuntimeEvent::Listed { endpoint, containers } => {
                self.listed(&endpoint, &containers, now, effects);
            }
        }
    }

    fn task_created(
        &mut self,
        id: &ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let entry = self.inventory.entry(id);
        if std::mem::take(&mut entry.removed) {
            entry.replaced();
        }
        let is_new = entry.run.pid != Some(pid);
        entry.began(pid);
        if is_new {
            entry.run.began_at = Some(now);
        }
        entry.watch.state = WatchState::Requested;
        entry.watch.armed_before_start = false;
        entry.watch.fresh = true;
        let trust = trust(entry);
        effects.push(attach(id, pid, rootfs));
        self.announced(id, now, effects);
        if trust != Trust::Unknown {
            let container = id.clone();
            effects.push(Effect::Command(SensorCommand::Trust { container, trust }));
        }
        send_entry_point(id, self.inventory.entry(id), effects);
        self.enforce(id, false, now, effects);
        self.started_again(id, now, effects);
    }

    fn container_changed(
        &mut self,
        container: Container,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let id = container.id.clone();
        let entry = self.inventory.entry(&id);
        if std::mem::take(&mut entry.removed) || is_another(entry, &container) {
            let pid = entry.run.pid;
            entry.replaced();
            // A run that containerd has reported before this record belongs to it.
            if let Some(pid) = pid.filter(|pid| is_run_of(&container, *pid)) {
                entry.began(pid);
            }
        }
        let mut sent_trust = trust(entry);
        if let Some(task) = &container.task
            && task_changed(entry, &container, task, effects)
        {
            // Attaching resets the trust of the sensors.
            sent_trust = Trust::Unknown;
        }
        if let Some(chain_id) = wanted_baseline(entry, &container) {
            entry.baseline.state = BaselineState::Pending(chain_id);
            effects.push(Effect::record_baseline(&container));
        }
        if container.task.as_ref().is_some_and(|task| !task.paused) {
            entry.run.is_not_paused();
        }
        entry.container = Some(container);
        if trust(entry) != sent_trust {
            send_trust(&id, entry, effects);
        }
        if matches!(entry.baseline.state, BaselineState::Failed(..) | BaselineState::None(_)) {
            self.misses_baseline(&id, now);
        }
        self.enforce(&id, false, now, effects);
        self.started_again(&id, now, effects);
    }

    fn task_exited(&mut self, id: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        // First: a finding about a run that has ended must not request a kill of the next.
        let pid = self.inventory.get_mut(id).and_then(Entry::run_ended);
        self.sessions_ended(id, now, effects);
        let Some(entry) = self.inventory.get_mut(id) else { return };
        if let Some(pid) = pid {
            entry.watch.state = WatchState::No;
            if let Some(container) = &mut entry.container {
                container.task = None;
            }
            let container = id.clone();
            effects.push(Effect::Command(SensorCommand::Detach { container, pid: Some(pid) }));
            record_closed(self.gaps.ended(id, now), effects);
        }
    }

    /// The container's record is gone. What its last scan still finds is judged with the
    /// baseline that it had, so the entry stays until that scan is over.
    fn forget(&mut self, id: &ContainerId, effects: &mut Vec<Effect>) {
        self.publish_aggregates(effects);
        if let Some(entry) = self.inventory.get_mut(id) {
            entry.removed = true;
        }
        // A baseline is known to be unneeded only if all containers are known.
        if self.endpoints.is_whole() {
            effects.push(Effect::CollectBaselines(self.chains_in_use()));
        }
    }

    /// Nothing more will come of a container: everything about it is published and forgotten.
    pub(super) fn remove(&mut self, id: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        self.publish_aggregates(effects);
        self.inventory.remove(id);
        self.forget_sessions(id, effects);
        record_closed(self.gaps.gone(id, now), effects);
    }

    fn chains_in_use(&self) -> HashSet<ChainId> {
        self.inventory
            .iter()
            .filter(|(_, entry)| !entry.removed)
            .filter_map(|(_, entry)| entry.chain_id())
            .collect()
    }

    fn listed(
        &mut self,
        endpoint: &str,
        listed: &[ContainerId],
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let listed: HashSet<&ContainerId> = listed.iter().collect();
        let gone: Vec<ContainerId> = self
            .inventory
            .iter()
            .filter(|(id, entry)| !listed.contains(id) && entry.belongs_to(endpoint))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if self.inventory.get(&id).is_some_and(|entry| entry.removed) {
                // Its last scan was never reported.
                self.remove(&id, now, effects);
            } else {
                self.task_exited(&id, now, effects);
                self.forget(&id, effects);
            }
        }
        // Anything may have happened while the connection was lost. Without such a loss, the
        // periodic lists only confirm the events.
        let reconnected = self.endpoints.listed(endpoint);
        for (id, entry) in self.inventory.iter_mut() {
            if !entry.belongs_to(endpoint) || entry.removed {
                continue;
            }
            if let (BaselineState::Failed(chain_id, _), Some(container)) =
                (&entry.baseline.state, &entry.container)
            {
                let chain_id = *chain_id;
                effects.push(Effect::record_baseline(container));
                entry.baseline.state = BaselineState::Pending(chain_id);
                send_trust(id, entry, effects);
            }
            let fresh = std::mem::take(&mut entry.watch.fresh);
            if entry.run.pid.is_some() && reconnected && !fresh {
                effects.push(scan(id.clone()));
            }
        }
        if self.endpoints.is_whole() {
            self.all_listed(reconnected, now, effects);
        }
    }

    /// Every containerd is connected and has listed its containers.
    fn all_listed(&mut self, reconnected: bool, now: Timestamp, effects: &mut Vec<Effect>) {
        record_closed(self.gaps.over(Failure::ContainerdLost, None, now), effects);
        let will_be_scanned = |entry: &Entry| {
            entry.run.pid.is_some() && !matches!(entry.watch.state, WatchState::Refused(_))
        };
        let running = self.inventory.iter().filter(|(_, entry)| will_be_scanned(entry));
        let running = running.map(|(id, _)| id.clone()).collect();
        record_closed(self.gaps.listed(&running, now), effects);
        self.inventory.forget_remembered();
        self.forget_remembered_sessions(effects);
        if reconnected {
            // Containers may have gone while the connection was lost.
            effects.push(Effect::CollectBaselines(self.chains_in_use()));
        }
    }
}

/// Whether the record is that of another container than the one that has its ID.
fn is_another(entry: &Entry, container: &Container) -> bool {
    entry.container.as_ref().is_some_and(|known| {
        known.created_at.is_some()
            && container.created_at.is_some()
            && known.created_at != container.created_at
    })
}

/// Whether a run that was reported before its container's record belongs to that record.
fn is_run_of(container: &Container, pid: u32) -> bool {
    container.task.as_ref().is_none_or(|task| task.pid == pid)
}

fn attach(id: &ContainerId, pid: u32, rootfs: Option<OverlayDirs>) -> Effect {
    Effect::Command(SensorCommand::Attach { container: id.clone(), pid, rootfs })
}

/// Takes in the task of a container's record. True if the sensors attach to it anew.
fn task_changed(
    entry: &mut Entry,
    container: &Container,
    task: &Task,
    effects: &mut Vec<Effect>,
) -> bool {
    let id = &container.id;
    let rootfs_is_new = container.rootfs.is_some()
        && entry.container.as_ref().is_none_or(|known| known.rootfs.is_none());
    // The event of a task's start does not contain its terminal; the record that follows does.
    let known = entry.container.as_ref().and_then(|known| known.task.as_ref());
    let input_has_changed =
        known.and_then(|known| known.terminal_input.as_ref()) != task.terminal_input.as_ref();
    if entry.run.pid != Some(task.pid) || matches!(entry.watch.state, WatchState::No) {
        entry.began(task.pid);
        entry.watch.state = WatchState::Requested;
        entry.watch.fresh = true;
    }
    if let Some(start_time) = task.start_time {
        entry.run.init = Some(ProcessIdentity { pid: task.pid, start_time });
    }
    let is_attached_anew =
        entry.watch.fresh || rootfs_is_new || matches!(entry.watch.state, WatchState::Refused(_));
    if is_attached_anew {
        effects.push(attach(id, task.pid, container.rootfs.clone()));
        send_entry_point(id, entry, effects);
    }
    let input = task.terminal_input.clone();
    let input_is_new = input.is_some() && (is_attached_anew || input_has_changed);
    let is_handed_on = manager(id, Some(container)) != CONTAINERD;
    if is_attached_anew && is_handed_on || input_is_new {
        let container = id.clone();
        effects.push(Effect::Command(SensorCommand::Terminal { container, input, is_handed_on }));
    }
    is_attached_anew
}

/// The baseline to request for a container, if it is neither ready nor pending. Notes it if
/// there cannot be one.
fn wanted_baseline(entry: &mut Entry, container: &Container) -> Option<ChainId> {
    let Some(chain_id) = container.chain_id() else {
        let reason = container.no_baseline.clone();
        let reason = reason.unwrap_or_else(|| "the runtime names no layers".to_owned());
        entry.baseline.state = BaselineState::None(reason);
        return None;
    };
    let is_there = match &entry.baseline.state {
        BaselineState::Ready(baseline) => baseline.chain_id() == chain_id,
        BaselineState::Pending(pending) => *pending == chain_id,
        BaselineState::Unknown | BaselineState::Failed(..) | BaselineState::None(_) => false,
    };
    (!is_there).then_some(chain_id)
}
