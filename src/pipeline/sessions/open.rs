//! A session opens: it gets its record, and either a finding or the time to turn out to be a
//! probe. Reverse shells are sessions too. A session without room is not listed, but reported.

use jiff::Timestamp;

use super::origin::client;
use super::report::{SessionReport, caused, kinds};
use super::store::{Live, MAX_LISTED, MAX_SESSIONS, lane};
use crate::budget;
use crate::model::session::SESSION_SCHEMA;
use crate::model::{
    ContainerId, Entry, FindingId, Interactive, Observation, Opening, ProbeId, Process,
    ProcessIdentity, Session, SessionId, SessionState,
};
use crate::pipeline::findings::container_evidence;
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

impl State {
    pub(in crate::pipeline) fn session_opened(
        &mut self,
        observation: &Observation,
        opening: &Opening,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let root = opening.root;
        if opening.beside.as_ref().is_some_and(|beside| self.is_sandbox(beside)) {
            // All containers of a pod may share the namespace of its sandbox.
            return;
        }
        if self.sessions.known(container).live.contains_key(&root) {
            // A shell may execute itself again: it stays one session.
            return;
        }
        let Some(session) = self.new_session(observation, opening) else { return };
        if !self.sessions.make_room(&session) {
            self.session_unlisted(&session, observation, opening, now, effects);
            return;
        }
        let mut live = Live::new(session, Some(observation.init));
        let may_be_probe = opening.entry == Entry::RuntimeExec && opening.interactive.is_none();
        match opening.process.argv.as_deref() {
            Some(argv) if may_be_probe => {
                self.classify(container, &mut live, argv, observation.at, now);
            }
            // The command is not known: it may be a probe.
            None if may_be_probe => {
                live.held_until = self.hold_until(now);
                let held = live.held_until.map(|until| (until, container.clone(), root));
                self.sessions.held.extend(held);
            }
            Some(_) | None => (),
        }
        let is_listed = live.probe.is_none();
        let is_held = live.held_until.is_some();
        let known = self.sessions.known(container);
        known.keep(root, live);
        if is_listed {
            known.listed[lane(opening.entry)] += 1;
            self.adopt(container, root);
            if !is_held {
                self.report_session(container, root, observation.source, now, effects);
            }
            self.publish_session(container, root, effects);
        }
    }

    fn new_session(&mut self, observation: &Observation, opening: &Opening) -> Option<Session> {
        let container = &observation.container;
        let root = opening.root;
        let entry = self.inventory.get(container)?;
        let (evidence, image) = container_evidence(container, entry);
        let client = client(container, entry.container.as_ref(), opening);
        let known = self.sessions.known(container);
        let exec = known.execs.iter().position(|(pid, ..)| *pid == root.pid);
        let exec_id = exec.and_then(|index| known.execs.remove(index)).map(|(_, id, _)| id);
        Some(Session {
            schema: SESSION_SCHEMA.to_owned(),
            id: SessionId::new(container, root),
            revision: 0,
            state: SessionState::Open,
            node: self.node.clone(),
            runtime: "containerd".to_owned(),
            container: evidence,
            image,
            entry: opening.entry,
            client,
            exec_id,
            interactive: opening.interactive,
            process: budget::process(&opening.process),
            host: opening.host.clone(),
            login: opening.login,
            requested_by: opening.requested_by.clone(),
            discovered: observation.source.name().to_owned(),
            started_at: observation.at,
            ended_at: None,
            exit: None,
            commands: 0,
            finding: None,
            findings: Vec::new(),
            findings_total: 0,
        })
    }

    /// Whether this container holds the namespaces of a pod, and nothing else.
    fn is_sandbox(&self, id: &ContainerId) -> bool {
        let container = self.inventory.get(id).and_then(|entry| entry.container.as_ref());
        let kind = container.and_then(|container| container.labels.get("io.cri-containerd.kind"));
        kind.is_some_and(|kind| kind == "sandbox")
    }

    /// A session without room is not listed. Its finding is emitted all the same, and a
    /// response requested.
    fn session_unlisted(
        &mut self,
        session: &Session,
        observation: &Observation,
        opening: &Opening,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &session.container.id;
        let detail = format!(
            "more than {MAX_SESSIONS} sessions are open in it, or more than {MAX_LISTED} were"
        );
        self.findings_full(container, detail, now, effects);
        let argv = opening.process.argv.as_deref().unwrap_or_default();
        let id = ProbeId::new(container, argv);
        let probe = self.sessions.known(container).probes.get(&id);
        if opening.entry == Entry::RuntimeExec && probe.is_some_and(|probe| !probe.reported) {
            return;
        }
        let report = SessionReport {
            session,
            root: opening.root,
            init: Some(observation.init),
            is_probe: false,
            source: observation.source,
            now,
        };
        let (first, second) = kinds(session.entry, session.interactive);
        for kind in [first, second].into_iter().flatten() {
            self.emit_session_finding(&report, kind, effects);
        }
    }

    /// Adds the findings that belong to a new session: its first program may have been
    /// reported before the session was.
    fn adopt(&mut self, container: &ContainerId, root: ProcessIdentity) {
        let id = SessionId::new(container, root);
        let Some(entry) = self.inventory.get(container) else { return };
        let mut own: Vec<_> = entry
            .findings
            .iter()
            .filter(|finding| finding.session == Some(id))
            .map(|finding| (finding.first_seen, finding.id))
            .collect();
        own.sort();
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        for (_, finding) in own {
            caused(&mut live.session, finding, true);
        }
    }

    /// Whether this process is already known as a reverse shell.
    pub(in crate::pipeline) fn is_reverse_shell(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
    ) -> bool {
        let live = self.sessions.known(container).live.get(&root);
        live.is_some_and(|live| live.session.entry == Entry::ReverseShell)
    }

    /// A reverse shell is a session from within.
    pub(in crate::pipeline) fn reverse_shell_opened(
        &mut self,
        observation: &Observation,
        process: &Process,
        is_direct: bool,
        finding: FindingId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let has_terminal = process.tty.is_some().then_some(Interactive::Terminal);
        let opening = Opening {
            root: process.identity,
            entry: Entry::ReverseShell,
            interactive: is_direct.then_some(Interactive::Socket).or(has_terminal),
            process: process.clone(),
            host: Vec::new(),
            login: None,
            requested_by: None,
            beside: None,
        };
        self.session_opened(observation, &opening, now, effects);
        let container = &observation.container;
        let known = self.sessions.known(container);
        if let Some(live) = known.live.get_mut(&process.identity) {
            live.session.finding.get_or_insert(finding);
            self.sessions.changed(container, process.identity, now);
        }
    }
}
