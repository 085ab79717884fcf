//! Sessions as findings, and the findings that sessions cause. Findings are kept and published
//! by `findings`; this file decides which ones a session has.

use jiff::Timestamp;

use super::origin::describe;
use crate::model::finding::Subject;
use crate::model::session::MAX_SESSION_FINDINGS;
use crate::model::{
    ContainerId, Entry, Finding, FindingId, Interactive, Kind, Observation, Process,
    ProcessIdentity, Session, SessionId, Source,
};
use crate::pipeline::findings::{new_finding, set_container};
use crate::pipeline::messages::Effect;
use crate::pipeline::responses::Actor;
use crate::pipeline::state::State;

/// The detail of a finding about a probe that is reported after all.
const IS_PROBE: &str = "it is run again and again like a probe, and ran what is not the image's";

/// A session that becomes a finding.
pub(super) struct SessionReport<'a> {
    pub(super) session: &'a Session,
    /// The first process of the session.
    pub(super) root: ProcessIdentity,
    /// The init of the container's run, if it is known.
    pub(super) init: Option<ProcessIdentity>,
    pub(super) is_probe: bool,
    pub(super) source: Source,
    pub(super) now: Timestamp,
}

/// The kinds of findings that report a session: one if the session has no finding yet, and
/// one in any case.
pub(super) fn kinds(
    entry: Entry,
    interactive: Option<Interactive>,
) -> (Option<Kind>, Option<Kind>) {
    let terminal = interactive.map(|_| Kind::SessionInteractive);
    match entry {
        // The finding about the reverse shell reports it.
        Entry::ReverseShell => (None, None),
        Entry::Namespace => (Some(Kind::NamespaceEntered), terminal),
        Entry::RuntimeExec | Entry::RuntimeDirect | Entry::SharedPidNamespace | Entry::Attach => {
            (terminal.or(Some(Kind::SessionExec)), None)
        }
    }
}

impl State {
    /// Emits a session as a finding.
    pub(super) fn report_session(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        live.held_until = None;
        let session = &live.session;
        let (first, second) = kinds(session.entry, session.interactive);
        let has_one = session.finding.is_some();
        let kinds = [first.filter(|_| !has_one), second];
        for kind in kinds.into_iter().flatten() {
            self.report_session_as(container, root, kind, source, now, effects);
        }
    }

    pub(super) fn report_session_as(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        kind: Kind,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(live) = self.sessions.known(container).live.get(&root) else { return };
        let (session, init, is_probe) = (live.session.clone(), live.init, live.probe.is_some());
        let report = SessionReport { session: &session, root, init, is_probe, source, now };
        let Some(id) = self.emit_session_finding(&report, kind, effects) else { return };
        if let Some(live) = self.sessions.known(container).live.get_mut(&root) {
            live.session.finding.get_or_insert(id);
        }
        self.sessions.changed(container, root, now);
    }

    /// Makes the finding about a session, or raises its count, and responds to it as the
    /// settings say.
    pub(super) fn emit_session_finding(
        &mut self,
        report: &SessionReport<'_>,
        kind: Kind,
        effects: &mut Vec<Effect>,
    ) -> Option<FindingId> {
        let SessionReport { session, root, init, source, now, .. } = *report;
        let (container, process) = (&session.container.id, &session.process);
        let subject = if kind == Kind::SessionExec {
            Subject::Command { exe: process.exe.as_deref(), argv: process.argv.as_deref() }
        } else {
            Subject::Process(root)
        };
        let id = FindingId::new(Some(container), kind, &subject);
        let seen = session.ended_at.unwrap_or(session.started_at);
        let found = self.session_finding(report, kind, id)?;
        let run = found.run;
        let verdict = found.verdict.clone();
        let actor = Actor { init, process: Some(root), is_denied: false };
        if verdict.is_accept() {
            self.accept_finding(container, found, now, effects);
            return None;
        }
        let entry = self.inventory.get_mut(container)?;
        if let Some(finding) = entry.findings.get_mut(&id) {
            // A scan of the processes may find a session that was reported before a restart.
            if source != Source::Scan && finding.session != Some(session.id) {
                finding.count += 1;
                finding.revision += 1;
                finding.last_seen = finding.last_seen.max(seen);
                finding.run = run.or(finding.run);
                if finding.verdict != verdict {
                    (finding.verdict, finding.severity) = (verdict, found.severity);
                }
            }
        } else {
            if !entry.findings.has_room_for(&found) {
                return Some(self.fold_finding(container, actor, &found, now, effects));
            }
            entry.insert_finding(found);
        }
        self.publish(container, id, actor, now, effects);
        Some(id)
    }

    /// The finding about a session, with the decision of the policy.
    fn session_finding(
        &self,
        report: &SessionReport<'_>,
        kind: Kind,
        id: FindingId,
    ) -> Option<Finding> {
        let SessionReport { session, init, is_probe, now, .. } = *report;
        let container = &session.container.id;
        let entry = self.inventory.get(container)?;
        let (verdict, at) = (self.policy.report(), session.started_at);
        let mut finding = new_finding(&self.node, verdict, id, kind, &session.discovered, at);
        set_container(&mut finding, container, entry);
        finding.run = init.map(|init| entry.run_of(init)).or(finding.run);
        finding.process = Some(session.process.clone());
        finding.session = Some(session.id);
        finding.last_seen = session.ended_at.unwrap_or(at);
        let detail = if is_probe { Some(IS_PROBE) } else { describe(session.entry) };
        finding.detail = detail.map(ToOwned::to_owned);
        self.decide_finding(&mut finding, Some(session), now);
        Some(finding)
    }

    /// A session has caused a finding, once or again.
    pub(in crate::pipeline) fn session_caused(
        &mut self,
        observation: &Observation,
        process: Option<&Process>,
        finding: FindingId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let Some(root) = self.sessions.of(container, observation.session, process) else { return };
        let entry = self.inventory.get(container);
        let Some(known) = entry.and_then(|entry| entry.findings.get(&finding)) else { return };
        let is_new = known.count <= 1;
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        if live.session.finding == Some(finding) || !caused(&mut live.session, finding, is_new) {
            return;
        }
        if live.probe.is_some() || live.held_until.is_some() {
            // A session that departs from the image is reported, even if it is a probe.
            self.report_session(container, root, observation.source, now, effects);
            if let Some(live) = self.sessions.known(container).live.get_mut(&root) {
                live.probe = None;
            }
        }
        self.sessions.changed(container, root, now);
    }

    /// The ID of the session in which a process acted.
    pub(in crate::pipeline) fn session_of(
        &self,
        observation: &Observation,
        process: Option<&Process>,
    ) -> Option<SessionId> {
        let container = &observation.container;
        let root = self.sessions.of(container, observation.session, process)?;
        Some(SessionId::new(container, root))
    }
}

/// Notes that a session has caused a finding. False if this was known. If the list is full,
/// only new findings are counted.
pub(super) fn caused(session: &mut Session, finding: FindingId, is_new: bool) -> bool {
    let is_full = session.findings.len() >= MAX_SESSION_FINDINGS;
    if session.findings.contains(&finding) || is_full && !is_new {
        return false;
    }
    session.findings_total += 1;
    if !is_full {
        session.findings.push(finding);
    }
    true
}
