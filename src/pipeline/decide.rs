//! The decision of the policy about what was found, before it becomes a finding: rules see the
//! finding that it would be. What an exception accepts is counted in one finding for each rule,
//! kind and container, apart from all that is reported.
//!
//! `policy` decides; `aggregation` keeps; `responses` requests what the decision asks for.

use jiff::{SignedDuration, Timestamp};

use super::aggregation::Group;
use super::evidence::Emission;
use super::messages::Effect;
use super::state::State;
use crate::inventory::{Aspect, BaselineState, Entry, Reported};
use crate::model::{
    ContainerId, Finding, FindingId, Kind, Observation, Process, ProcessIdentity, RootfsPath,
    Session, Source, bytes_of_printable,
};
use crate::policy::{Decision, Subject};

/// For how long after the end of a session something may have been done in it, if it is not
/// known what process has done it.
const AFTER_SESSION: SignedDuration = SignedDuration::from_mins(10);

impl State {
    /// The decision about one judgement.
    pub(super) fn decide_emission(&self, emission: &Emission<'_>) -> Decision {
        let Emission { observation, judgement, evidence, now, .. } = *emission;
        let id = FindingId::new(Some(&observation.container), judgement.kind, &evidence.subject());
        let finding = self.make_finding(id, emission);
        let session =
            self.sessions.session(&observation.container, observation.session, evidence.process);
        let decide = |finding: &Finding, may_be_of_session| {
            let severity = judgement.severity;
            let is_unproven = evidence.could_change().is_possible();
            let subject = Subject { finding, severity, session, may_be_of_session, is_unproven };
            self.policy.decide(&subject, now)
        };
        if let Some(accepted) = self.found_again(emission) {
            let decision = decide(&recalled(&finding, accepted), false);
            // Another rule decides by what is known now.
            if decision.verdict.is_accept() && decision.verdict.rule == accepted.verdict.rule {
                return decision;
            }
        }
        decide(&finding, self.may_be_of_session(observation, evidence.process))
    }

    /// What an exception has accepted before, if a scan finds it again. A scan knows less of it:
    /// by then its writer has ended, or driftd was started again.
    fn found_again(&self, emission: &Emission<'_>) -> Option<&Finding> {
        let Emission { observation, judgement, evidence, .. } = *emission;
        // A privilege may have changed with the same content.
        let is_content =
            observation.source == Source::Scan && judgement.kind != Kind::FilePrivileged;
        let path = evidence.path.filter(|_| is_content)?;
        let entry = self.inventory.get(&observation.container)?;
        let (id, reported) = entry.members.of(Aspect::Accepted(judgement.kind), path)?;
        let expected = match judgement.kind {
            Kind::FileRemoved => Reported::REMOVED,
            _ => Reported::content(Some(evidence.content()?)),
        };
        entry.findings.get(&id).filter(|_| reported == expected)
    }

    /// Decides about a finding that is no judgement of a fact: about a session itself, a
    /// transaction, a container or a layer.
    pub(super) fn decide_finding(
        &self,
        finding: &mut Finding,
        session: Option<&Session>,
        now: Timestamp,
    ) {
        let severity = finding.severity;
        let subject =
            Subject { finding, severity, session, may_be_of_session: false, is_unproven: false };
        let Decision { verdict, severity } = self.policy.decide(&subject, now);
        (finding.verdict, finding.severity) = (verdict, severity);
    }

    /// Whether a process that is not known, or whose parents are not, may have acted in a
    /// session.
    fn may_be_of_session(&self, observation: &Observation, process: Option<&Process>) -> bool {
        let descends = process.is_some_and(|process| process.descends_from(observation.init));
        let since = observation.at.saturating_sub(AFTER_SESSION).unwrap_or(Timestamp::MIN);
        !descends && self.sessions.had_any(&observation.container, since)
    }

    /// Counts what an exception accepts. It is kept, and nothing else follows from it.
    pub(super) fn accept(&mut self, emission: &Emission<'_>, effects: &mut Vec<Effect>) {
        let Emission { observation, judgement, evidence, now, .. } = *emission;
        let kind = judgement.kind;
        let group = Group::accepted(kind, emission.verdict.rule.as_deref().unwrap_or_default());
        let Some(path) = evidence.path else {
            let finding = self.make_finding(group.id(&observation.container), emission);
            self.accept_finding(&observation.container, finding, now, effects);
            return;
        };
        if kind.is_run() {
            self.remember_linked(emission);
        }
        self.put_accepted(group, path, emission, effects);
    }

    /// The same for a finding that is not about a file.
    pub(super) fn accept_finding(
        &mut self,
        container: &ContainerId,
        finding: Finding,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let rule = finding.verdict.rule.clone().unwrap_or_default();
        let id = Group::accepted(finding.kind, &rule).id(container);
        let Some(entry) = self.inventory.get_mut(container) else { return };
        match entry.findings.get_mut(&id) {
            Some(known) => {
                known.count += finding.count;
                known.last_seen = known.last_seen.max(finding.last_seen);
                known.run = finding.run.or(known.run);
                known.verdict = finding.verdict;
                self.unpublished.push(container, id, None, now);
            }
            None => {
                let finding = Finding { id, ..finding };
                effects.push(Effect::finding(&finding));
                entry.insert_finding(finding);
            }
        }
    }

    /// Which of the processes of a finding run an unchanged program of the image.
    pub(super) fn from_image<'a>(
        entry: &Entry,
        processes: impl Iterator<Item = &'a Process>,
    ) -> Option<Vec<ProcessIdentity>> {
        let BaselineState::Ready(image) = &entry.baseline.state else { return None };
        let is_own = |exe: Option<&str>| {
            let path = exe.and_then(|exe| RootfsPath::new(bytes_of_printable(exe)).ok());
            path.is_some_and(|path| super::aggregation::is_untouched(entry, image, &path))
        };
        let mut own = Vec::new();
        for process in processes {
            // With a root directory of its own, a path means another file.
            if process.root.is_some() {
                continue;
            }
            // The last ancestor may be the first one outside of the container.
            let inside = process.ancestors.len().saturating_sub(1);
            let ancestors = process.ancestors[..inside].iter();
            let all = ancestors.map(|ancestor| (ancestor.identity, ancestor.exe.as_deref()));
            let all = std::iter::once((process.identity, process.exe.as_deref())).chain(all);
            own.extend(all.filter(|(_, exe)| is_own(*exe)).map(|(identity, _)| identity));
        }
        own.sort_unstable();
        own.dedup();
        Some(own)
    }
}

/// What a scan finds again, completed by what was known when it was accepted.
fn recalled(finding: &Finding, accepted: &Finding) -> Finding {
    let mut finding = finding.clone();
    let is_known = |one: &Process| one.identity.start_time > 0;
    if !finding.process.as_ref().is_some_and(is_known) {
        finding.process.clone_from(&accepted.process);
    }
    if !finding.writer.as_ref().is_some_and(is_known) {
        finding.writer.clone_from(&accepted.writer);
    }
    if let (Some(known), Some(more)) = (&mut finding.from_image, &accepted.from_image) {
        known.extend(more);
        known.sort_unstable();
        known.dedup();
    }
    finding.after_start_milliseconds = accepted.after_start_milliseconds;
    finding
}

/// Whether an exception has accepted something about a path.
pub(super) fn was_accepted(entry: &Entry, path: &RootfsPath) -> bool {
    entry.findings.has_accepted()
        && Aspect::accepted().any(|aspect| entry.members.of(aspect, path).is_some())
}
