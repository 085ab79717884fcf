//! Decisions about executions that wait: the same judgement and the same rules as for what has
//! run, before it runs. No finding is made here: what is denied is observed and reported when
//! the kernel has the answer, and what is allowed when it has run.
//!
//! Also in which containers executions wait: where a rule may deny, by what is known of the
//! container alone.

use jiff::Timestamp;

use super::evidence::{Emission, Evidence};
use super::findings::{new_finding, set_container};
use super::judge::{executed, interpreted, sensitive};
use super::messages::Effect;
use super::state::State;
use crate::detect;
use crate::inventory::{BaselineState, Entry};
use crate::model::finding::Subject;
use crate::model::{
    Answer, ContainerId, Fact, FileFact, Finding, FindingId, Kind, Observation, RootfsPath,
    RuleAnswer,
};
use crate::watch::{Decision, Question, SensorCommand, Undecided};

impl State {
    pub(super) fn question(
        &mut self,
        question: &Question,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Question { number, observation } = question;
        let entry = self.inventory.get(&observation.container);
        // That of a container that had this ID before is decided by the image of that one.
        let is_of_former = entry.is_some_and(|entry| entry.is_of_former(observation.init));
        let swap = |state: &mut State| {
            let entry = state.inventory.get_mut(&observation.container);
            entry.into_iter().for_each(Entry::swap_with_former);
        };
        if is_of_former {
            swap(self);
        }
        let is_denied = self.is_denied(observation, now);
        if is_of_former {
            swap(self);
        }
        let is_denied = is_denied.unwrap_or(self.policy.deny.on_unknown);
        let decision = if is_denied { Decision::Deny } else { Decision::Allow };
        effects.push(Effect::Decide { number: *number, decision });
    }

    /// Whether a rule denies what is about to happen; `None` while there is no baseline to judge by.
    fn is_denied(&self, observation: &Observation, now: Timestamp) -> Option<bool> {
        let entry = self.inventory.get(&observation.container)?;
        let BaselineState::Ready(image) = &entry.baseline.state else { return None };
        let Fact::File(fact) = &observation.fact else { return None };
        let mut assessment =
            detect::assess(image, sensitive(&self.policy, entry, observation), fact);
        let evidence = match fact {
            FileFact::Loaded { .. } => self.loaded(observation, fact, &mut assessment, image),
            FileFact::Interpreted { .. } => interpreted(fact),
            _ => executed(fact),
        }?;
        let linker = self.linker_of(observation, &assessment, &evidence);
        let writer = evidence.writer.or(linker.as_ref());
        let evidence = &Evidence { writer, ..evidence };
        Some(assessment.judgements.iter().any(|judgement| {
            let verdict = &self.policy.report();
            let emission = Emission { observation, judgement, evidence, verdict, now };
            let verdict = self.decide_emission(&emission).verdict;
            let is_denial = |one: &&RuleAnswer| one.action == Answer::Deny;
            verdict.answers.iter().find(is_denial).is_some_and(|answer| !answer.dry_run)
        }))
    }

    /// A process has run another program of the same name after a denial: shells go on along
    /// PATH. The finding of the denial names the first such program.
    pub(super) fn ran_instead(
        &mut self,
        container: &ContainerId,
        denied: &RootfsPath,
        instead: &str,
        effects: &mut Vec<Effect>,
    ) {
        const RAN: &str = "after the denial, the process ran";
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let is_denial = |finding: &&Finding| {
            finding.outcome.as_ref().is_some_and(|it| it.action == Answer::Deny.name())
        };
        let known = entry.findings.about(denied).find(is_denial).map(|finding| finding.id);
        let Some(id) = known else { return };
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        if finding.detail.as_ref().is_some_and(|detail| detail.contains(RAN)) {
            return;
        }
        let ran = format!("{RAN} `{instead}` instead");
        finding.detail = Some(match finding.detail.take() {
            Some(detail) => format!("{detail}; {ran}"),
            None => ran,
        });
        finding.revision += 1;
        effects.push(Effect::finding(finding));
    }

    /// Sends the sensors whether executions of a container wait for decisions, if that is new
    /// for this run, or in any case with `again`.
    pub(super) fn enforce(
        &mut self,
        id: &ContainerId,
        again: bool,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let deny = &self.policy.deny;
        let undecided = Undecided { after: deny.deadline, deny: deny.on_timeout };
        let undecided = Some(undecided).filter(|_| self.may_deny(id, now));
        let Some(entry) = self.inventory.get_mut(id) else { return };
        let Some(pid) = entry.run.pid.filter(|_| entry.watch.takes_commands()) else { return };
        let wanted = undecided.map(|undecided| (pid, undecided.after, undecided.deny));
        if entry.watch.enforced == wanted && !(again && wanted.is_some()) {
            return;
        }
        entry.watch.enforced = wanted;
        let container = id.clone();
        effects.push(Effect::Command(SensorCommand::Enforce { container, undecided }));
    }

    /// The same for all containers: other rules are in force.
    pub(super) fn enforce_all(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let all: Vec<ContainerId> = self.inventory.iter().map(|(id, _)| id.clone()).collect();
        for id in all {
            self.enforce(&id, false, now, effects);
        }
    }

    /// Whether a rule may deny an execution in a container.
    fn may_deny(&self, id: &ContainerId, now: Timestamp) -> bool {
        let Some(entry) = self.inventory.get(id) else { return false };
        let subject = Subject::Reason("");
        let finding = FindingId::new(Some(id), Kind::ExecNew, &subject);
        let verdict = self.policy.report();
        let mut finding = new_finding(&self.node, verdict, finding, Kind::ExecNew, "", now);
        set_container(&mut finding, id, entry);
        self.policy.may_deny(&finding, now)
    }
}
