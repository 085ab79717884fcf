//! Sessions close: one by itself, all of a container with its first process, or those of the
//! history whose container is gone. Their last changes are published before they are
//! forgotten.

use jiff::Timestamp;

use super::store::{lane, weight};
use crate::history::Record;
use crate::model::{ContainerId, Kind, ProbeId, ProcessIdentity, SessionState, Source};
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

impl State {
    pub(super) fn session_closed(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        effects: &mut Vec<Effect>,
    ) {
        self.publish_session(container, root, effects);
        let Some(live) = self.sessions.known(container).live.get(&root) else { return };
        // The finding about the session also shows how long the session was.
        let Some((id, ended)) = live.session.finding.zip(live.session.ended_at) else { return };
        let session = live.session.id;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        if let Some(finding) = entry.findings.get_mut(&id)
            && finding.session == Some(session)
            && finding.kind != Kind::SessionExec
            && finding.last_seen < ended
        {
            finding.last_seen = ended;
            finding.revision += 1;
            effects.push(Effect::finding(finding));
        }
    }

    /// The container's first process has ended, and all others with it.
    pub(in crate::pipeline) fn sessions_ended(
        &mut self,
        container: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(known) = self.sessions.containers.get_mut(container) else { return };
        let open: Vec<ProcessIdentity> = known
            .live
            .iter()
            .filter(|(_, live)| live.session.state == SessionState::Open)
            .map(|(root, _)| *root)
            .collect();
        for root in open {
            let known = self.sessions.known(container);
            let Some(live) = known.live.get_mut(&root) else { continue };
            live.end(now, None);
            let ended = live.session.ended_at;
            for (_, mut command) in std::mem::take(&mut live.running) {
                known.shares[lane(live.session.entry)].give_back(weight(&command));
                command.ended_at = ended;
                live.changed.push(command);
            }
            if live.held_until.is_some() {
                self.report_session(container, root, Source::Trace, now, effects);
            }
            self.session_closed(container, root, effects);
        }
    }

    /// Everything that runs has appeared: the sessions of other containers are over.
    pub(in crate::pipeline) fn forget_remembered_sessions(&mut self, effects: &mut Vec<Effect>) {
        let remembered: Vec<ContainerId> = self.sessions.remembered.keys().cloned().collect();
        for container in remembered {
            let entry = self.inventory.get(&container);
            if entry.is_some_and(|entry| entry.run.pid.is_some()) {
                self.sessions.known(&container);
                continue;
            }
            let Some(gone) = self.sessions.remembered.remove(&container) else { continue };
            for (mut session, _) in gone.sessions {
                session.state = SessionState::Closed;
                session.revision += 1;
                let (session, commands) = (Box::new(session), Vec::new());
                effects.push(Effect::Record(Record::Session { session, commands }));
            }
        }
    }

    /// Forgets a container, and publishes before what is new in its sessions.
    pub(in crate::pipeline) fn forget_sessions(
        &mut self,
        container: &ContainerId,
        effects: &mut Vec<Effect>,
    ) {
        let unpublished = &self.sessions.unpublished;
        let own = |(of, root): &(ContainerId, _)| (of == container).then_some(*root);
        let sessions: Vec<ProcessIdentity> = unpublished.sessions.iter().filter_map(own).collect();
        let own = |(of, id): &(ContainerId, _)| (of == container).then_some(*id);
        let probes: Vec<ProbeId> = unpublished.probes.iter().filter_map(own).collect();
        for root in sessions {
            self.publish_session(container, root, effects);
        }
        for id in probes {
            self.publish_probe(container, id, effects);
        }
        let unpublished = &mut self.sessions.unpublished;
        unpublished.sessions.retain(|(of, _)| of != container);
        unpublished.probes.retain(|(of, _)| of != container);
        if unpublished.sessions.is_empty() && unpublished.probes.is_empty() {
            unpublished.since = None;
        }
        self.sessions.containers.remove(container);
        self.sessions.held.retain(|(_, of, _)| of != container);
    }
}
