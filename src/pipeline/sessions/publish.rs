//! Publishes what is new in sessions and probes, and emits the findings that have waited long
//! enough. It records for the history; what a finding contains is decided in `report`.

use jiff::Timestamp;

use crate::history::Record;
use crate::model::{ContainerId, ProcessIdentity, SessionState, Source};
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

impl State {
    /// Publishes what is new in one session.
    pub(super) fn publish_session(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        effects: &mut Vec<Effect>,
    ) {
        self.sessions.unpublished.sessions.remove(&(container.clone(), root));
        let known = self.sessions.known(container);
        let Some(live) = known.live.get_mut(&root) else { return };
        if live.probe.is_some() {
            if live.session.state == SessionState::Closed {
                known.forget(root);
                known.order.retain(|one| *one != root);
            }
            return;
        }
        live.session.revision += 1;
        let commands = std::mem::take(&mut live.changed);
        let session = Box::new(live.session.clone());
        effects.push(Effect::Record(Record::Session { session, commands }));
    }

    /// Emits the findings that have waited long enough, and publishes what is new in sessions
    /// and probes.
    pub(in crate::pipeline) fn publish_sessions(
        &mut self,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        while let Some((until, container, root)) = self.sessions.held.first().cloned()
            && until <= now
        {
            self.sessions.held.pop_first();
            let live = self.sessions.known(&container).live.get(&root);
            let is_due = live.and_then(|live| live.held_until).is_some_and(|until| until <= now);
            if is_due {
                self.report_session(&container, root, Source::Gate, now, effects);
            }
        }
        self.sessions.unpublished.since = None;
        for (container, root) in std::mem::take(&mut self.sessions.unpublished.sessions) {
            self.publish_session(&container, root, effects);
        }
        for (container, id) in std::mem::take(&mut self.sessions.unpublished.probes) {
            self.publish_probe(&container, id, effects);
        }
    }

    /// Records every session and probe that is known, with the commands that run.
    pub(in crate::pipeline) fn record_sessions(&mut self, effects: &mut Vec<Effect>) {
        for known in self.sessions.containers.values() {
            let listed = known.live.values().filter(|live| live.probe.is_none());
            effects.extend(listed.map(|live| {
                let commands = live.running.values().cloned().collect();
                Effect::Record(Record::Session {
                    session: Box::new(live.session.clone()),
                    commands,
                })
            }));
            let probes = known.probes.values().cloned();
            effects.extend(probes.map(|probe| Effect::Record(Record::Probe(Box::new(probe)))));
        }
    }
}
