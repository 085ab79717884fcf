//! Puts files into aggregated findings, counts them, and publishes the findings. Which finding
//! a file goes into is decided before (`emit`). A finding without room of its own is folded
//! here into the one of its kind that always has room.

use std::sync::Arc;

use jiff::Timestamp;

use super::group::{Common, Group, MAX_ACCEPTED, MAX_LISTED};
use super::packages::transaction_id;
use crate::budget;
use crate::history::{MemberChange, Record};
use crate::inventory::{Aspect, Reported};
use crate::model::finding::MEMBER_SCHEMA;
use crate::model::{
    Blake3Hash, ContainerId, Finding, FindingId, Kind, Member, Observation, Process, RootfsPath,
    Source,
};
use crate::pipeline::evidence::Emission;
use crate::pipeline::findings::{new_finding, set_container};
use crate::pipeline::messages::Effect;
use crate::pipeline::responses::{Actor, Cause, path_for};
use crate::pipeline::state::State;

/// The aggregated finding that a file goes into.
pub(super) enum Target {
    Group(Group),
    Transaction(Arc<Process>),
}

impl Target {
    fn id(&self, container: &ContainerId) -> FindingId {
        match self {
            Target::Group(group) => group.id(container),
            Target::Transaction(manager) => transaction_id(container, manager),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Target::Group(group) => group.kind,
            Target::Transaction(_) => Kind::PackageTransaction,
        }
    }
}

/// One file of an aggregated finding.
#[derive(Clone, Copy)]
pub(super) struct MemberFile<'a> {
    pub(super) aspect: Aspect,
    pub(super) path: &'a RootfsPath,
    pub(super) content: Option<Blake3Hash>,
    pub(super) reported: Reported,
}

impl State {
    /// Puts a file into a group and publishes it at once. A file that the group has already is
    /// counted.
    pub(super) fn put_or_count(
        &mut self,
        group: Group,
        file: MemberFile<'_>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let container = &emission.observation.container;
        let id = group.id(container);
        let entry = self.inventory.get(container);
        let known = entry.and_then(|entry| entry.members.of(file.aspect, file.path));
        if known == Some((id, file.reported)) {
            return self.seen_again(id, emission, effects);
        }
        self.put(&Target::Group(group), file, emission, effects);
        self.publish_aggregate(container, id, effects);
    }

    /// A known file is seen again. A scan always finds the known files again: it does not
    /// count.
    pub(super) fn seen_again(
        &mut self,
        id: FindingId,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let Emission { observation, evidence, now, .. } = *emission;
        if !emission.verdict.is_accept() {
            self.session_caused(observation, evidence.process, id, now, effects);
        }
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let run = entry.run_of(observation.init);
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        if observation.source != Source::Scan {
            finding.run = Some(run);
            finding.count += observation.times();
            finding.last_seen = finding.last_seen.max(observation.at);
            let kind = finding.kind;
            self.unpublished.push(container, id, None, now);
            let (actor, verdict) = (Actor::of(emission), emission.verdict);
            let path = path_for(verdict, evidence.path);
            let cause = Cause { container, actor, kind, verdict, finding: id, path };
            self.respond(&cause, now, effects);
        }
    }

    /// Puts a file into the finding of the exception that accepts it.
    pub(in crate::pipeline) fn put_accepted(
        &mut self,
        group: Group,
        path: &RootfsPath,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let kind = group.kind;
        let content = emission.evidence.content();
        let reported = match kind {
            Kind::FileRemoved => Reported::REMOVED,
            _ => Reported::content(content),
        };
        let file = MemberFile { aspect: Aspect::Accepted(kind), path, content, reported };
        self.put_or_count(group, file, emission, effects);
    }

    /// Puts a file into an aggregated finding, which is made if it is not there.
    pub(super) fn put(
        &mut self,
        target: &Target,
        file: MemberFile<'_>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let Emission { observation, evidence, now, .. } = *emission;
        let container = &observation.container;
        let id = target.id(container);
        let entry = self.inventory.get(container);
        let is_new = entry.is_some_and(|entry| !entry.findings.contains(&id));
        if is_new {
            self.put_first(target, file, emission, effects);
        } else {
            self.put_another(target, file, emission, effects);
        }
        let verdict = match target {
            Target::Group(_) => emission.verdict,
            // A transaction has a decision of its own.
            Target::Transaction(_) => {
                let entry = self.inventory.get(container);
                let finding = entry.and_then(|entry| entry.findings.get(&id));
                &finding.map_or_else(|| self.policy.report(), |finding| finding.verdict.clone())
            }
        };
        if verdict.is_accept() {
            return;
        }
        self.session_caused(observation, evidence.process, id, now, effects);
        // At once, not when the finding is published: the run may have ended by then.
        if is_new || observation.source != Source::Scan {
            let (actor, kind) = (Actor::of(emission), target.kind());
            let path = path_for(verdict, evidence.path);
            let cause = Cause { container, actor, kind, verdict, finding: id, path };
            self.respond(&cause, now, effects);
        }
    }

    /// Makes the finding of a target with its first file.
    fn put_first(
        &mut self,
        target: &Target,
        file: MemberFile<'_>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let Emission { observation, now, .. } = *emission;
        let container = &observation.container;
        let id = target.id(container);
        let finding = match target {
            Target::Group(group) => self.make_grouped(id, group, emission),
            Target::Transaction(manager) => self.make_transaction(id, manager, emission),
        };
        let is_aggregated = finding.files.is_some();
        // No container can make more of these than there are kinds and rules.
        let always_has_room = matches!(target, Target::Group(group) if group.is_rest())
            || finding.verdict.is_accept();
        let Some(entry) = self.inventory.get_mut(container) else { return };
        if !always_has_room && !entry.findings.has_room_for(&finding) {
            self.fold(emission, &finding, effects);
            return;
        }
        entry.insert_finding(finding);
        if !is_aggregated {
            self.publish(container, id, Actor::of(emission), now, effects);
            return;
        }
        let is_listed = entry.members.put(file.aspect, file.path, id, file.reported);
        // Publishing it raises the revision to 1.
        if let Some(finding) = entry.findings.get_mut(&id) {
            finding.revision = 0;
        }
        let change = is_listed.then(|| seen(&file, emission));
        self.unpublished.push(container, id, change, now);
        self.publish_aggregate(container, id, effects);
        if !is_listed {
            self.members_full(container, now, effects);
        }
    }

    /// Puts a file into a finding that is there.
    fn put_another(
        &mut self,
        target: &Target,
        file: MemberFile<'_>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) {
        let Emission { observation, judgement, now, .. } = *emission;
        let container = &observation.container;
        let id = target.id(container);
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(finding) = entry.findings.get(&id) else { return };
        let known = entry.members.of(file.aspect, file.path);
        let is_known = known.is_some_and(|(known, _)| known == id);
        let is_accepted = finding.verdict.is_accept();
        // What is expected leaves the room to what is not.
        let most = if is_accepted { MAX_ACCEPTED } else { MAX_LISTED };
        let has_room = is_known || finding.files.unwrap_or(1) < most;
        let is_listed = has_room && entry.members.put(file.aspect, file.path, id, file.reported);
        if !is_listed && observation.source == Source::Scan {
            // It is not known whether the file was counted already.
            return;
        }
        let run = entry.run_of(observation.init);
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        if observation.source != Source::Scan {
            finding.run = Some(run);
        }
        finding.count += observation.times();
        finding.first_seen = finding.first_seen.min(observation.at);
        finding.last_seen = finding.last_seen.max(observation.at);
        if emission.verdict.is_answered() {
            finding.verdict = emission.verdict.clone();
        }
        // Whatever is worse than a transaction has a finding of its own, except for the
        // scripts that every package may bring.
        if matches!(target, Target::Group(_)) {
            finding.severity = finding.severity.max(judgement.severity);
        }
        if !is_known {
            if finding.files.is_none() {
                // The first file was the only one until now.
                let first = first_member(finding).map(MemberChange::Seen);
                if let Target::Group(Group { common: Some(common), .. }) = target
                    && !common.explains_one()
                {
                    finding.detail = join(finding.detail.take(), common.detail());
                }
                self.unpublished.push(container, id, first, now);
            }
            finding.files = Some(finding.files.unwrap_or(1) + 1);
        }
        // A finding about one file contains the file itself.
        let is_aggregated = finding.files.is_some();
        let change = (is_listed && is_aggregated).then(|| seen(&file, emission));
        self.unpublished.push(container, id, change, now);
        if !is_listed && !is_accepted {
            self.members_full(container, now, effects);
        }
        if self.unpublished.is_full() {
            self.publish_aggregates(effects);
        }
    }

    /// A finding about the files of a group, with one of them.
    fn make_grouped(&self, id: FindingId, group: &Group, emission: &Emission<'_>) -> Finding {
        let mut finding = self.make_finding(id, emission);
        if group.begins_as_many() {
            finding.files = Some(1);
            finding.detail = group.detail();
        } else if group.common.as_ref().is_some_and(Common::explains_one) {
            finding.detail = join(finding.detail, group.detail());
        }
        if let Some(Common::Brought(transaction) | Common::Installed { transaction, .. }) =
            &group.common
        {
            finding.transaction = Some(*transaction);
        }
        finding
    }

    /// A finding about what a package manager does.
    fn make_transaction(
        &self,
        id: FindingId,
        manager: &Process,
        emission: &Emission<'_>,
    ) -> Finding {
        let observation = emission.observation;
        let (source, at) = (observation.source.name(), observation.at);
        let kind = Kind::PackageTransaction;
        let mut finding = new_finding(&self.node, self.policy.report(), id, kind, source, at);
        finding.files = Some(1);
        finding.process = Some(budget::process(manager));
        if let Some(entry) = self.inventory.get(&observation.container) {
            set_container(&mut finding, &observation.container, entry);
            finding.run = Some(entry.run_of(observation.init));
            finding.from_image = State::from_image(entry, std::iter::once(manager));
        }
        finding.session = self.session_of(observation, Some(manager));
        let container = &observation.container;
        let session = self.sessions.session(container, observation.session, Some(manager));
        self.decide_finding(&mut finding, session, emission.now);
        finding
    }

    /// Counts a finding that has no room in the finding of its kind that always has room, and
    /// responds to it as the settings say.
    pub(in crate::pipeline) fn fold(
        &mut self,
        emission: &Emission<'_>,
        finding: &Finding,
        effects: &mut Vec<Effect>,
    ) {
        let Emission { observation, judgement, evidence, verdict, now } = *emission;
        let container = &observation.container;
        let kind = judgement.kind;
        let Some(path) = evidence.path else {
            let id = self.fold_finding(container, Actor::of(emission), finding, now, effects);
            self.session_caused(observation, evidence.process, id, now, effects);
            return;
        };
        let content = evidence.content();
        let aspect = Aspect::of(kind);
        let reported = match kind {
            Kind::FileRemoved => Reported::REMOVED,
            _ => Reported::content(content),
        };
        let target = Target::Group(Group::rest(kind));
        let id = target.id(container);
        let known = self.inventory.get(container).and_then(|entry| entry.members.of(aspect, path));
        if known == Some((id, reported)) {
            self.seen_again(id, emission, effects);
        } else {
            self.count_folded(container, kind, now, effects);
            let file = MemberFile { aspect, path, content, reported };
            self.put(&target, file, emission, effects);
        }
        if verdict.is_answered() {
            self.publish_aggregate(container, id, effects);
        }
    }

    /// The same for a finding that is not about a file. Returns the finding that counts it.
    pub(in crate::pipeline) fn fold_finding(
        &mut self,
        container: &ContainerId,
        actor: Actor,
        finding: &Finding,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> FindingId {
        let group = Group::rest(finding.kind);
        let id = group.id(container);
        self.count_folded(container, finding.kind, now, effects);
        let Some(entry) = self.inventory.get_mut(container) else { return id };
        match entry.findings.get_mut(&id) {
            Some(rest) => {
                rest.count += finding.count;
                rest.first_seen = rest.first_seen.min(finding.first_seen);
                rest.last_seen = rest.last_seen.max(finding.last_seen);
                rest.severity = rest.severity.max(finding.severity);
                rest.run = finding.run.or(rest.run);
            }
            None => {
                let detail = group.detail();
                entry.insert_finding(Finding { id, revision: 0, detail, ..finding.clone() });
            }
        }
        let rest = entry.findings.get(&id);
        let is_first = rest.is_some_and(|rest| rest.revision == 0);
        self.unpublished.push(container, id, None, now);
        if is_first || finding.verdict.is_answered() {
            self.publish_aggregate(container, id, effects);
        }
        let (kind, verdict) = (finding.kind, &finding.verdict);
        let path = path_for(verdict, finding.file.as_ref().map(|file| &file.path));
        let cause = Cause { container, actor, kind, verdict, finding: id, path };
        self.respond(&cause, now, effects);
        id
    }

    fn count_folded(
        &mut self,
        container: &ContainerId,
        kind: Kind,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(entry) = self.inventory.get_mut(container) {
            entry.findings.fold();
        }
        let detail =
            format!("more {kind} than are kept one by one: they are counted in one finding");
        self.findings_full(container, detail, now, effects);
    }

    fn members_full(&mut self, container: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let detail = format!(
            "files are counted and not listed: of one finding {MAX_LISTED} are, of one container \
             {}, of all {}",
            budget::MEMBERS,
            budget::ALL_MEMBERS
        );
        self.findings_full(container, detail, now, effects);
    }

    /// A member of an aggregated finding is gone.
    pub(in crate::pipeline) fn mark_gone(
        &mut self,
        observation: &Observation,
        path: &RootfsPath,
        now: Timestamp,
    ) {
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let run = Kind::ALL.iter().filter(|kind| kind.is_run()).map(|kind| Aspect::of(*kind));
        for aspect in std::iter::once(Aspect::Written).chain(run).chain(Aspect::accepted()) {
            let Some((id, reported)) = entry.members.of(aspect, path) else { continue };
            if matches!(reported, Reported::GONE | Reported::REMOVED) {
                continue;
            }
            entry.members.put(aspect, path, id, Reported::GONE);
            if entry.findings.get(&id).is_some_and(|finding| finding.files.is_some()) {
                let change = MemberChange::Gone { path: path.clone(), at: observation.at };
                self.unpublished.push(container, id, Some(change), now);
            }
        }
    }

    /// Publishes what is new in one aggregated finding.
    pub(super) fn publish_aggregate(
        &mut self,
        container: &ContainerId,
        id: FindingId,
        effects: &mut Vec<Effect>,
    ) {
        let Some(changes) = self.unpublished.take(container, id) else { return };
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        finding.revision += 1;
        let finding = Box::new(finding.clone());
        effects.push(Effect::Record(Record::Aggregate { finding, changes }));
    }

    /// Publishes what is new in all of them.
    pub(in crate::pipeline) fn publish_aggregates(&mut self, effects: &mut Vec<Effect>) {
        for (container, id) in self.unpublished.findings() {
            self.publish_aggregate(&container, id, effects);
        }
    }
}

fn join(one: Option<String>, other: Option<String>) -> Option<String> {
    one.into_iter().chain(other).reduce(|all, next| all + "; " + &next)
}

/// A file as a member of its finding.
fn seen(file: &MemberFile<'_>, emission: &Emission<'_>) -> MemberChange {
    let Emission { observation, judgement, .. } = *emission;
    MemberChange::Seen(Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: file.path.clone(),
        kind: judgement.kind,
        blake3: file.content,
        first_seen: observation.at,
        last_seen: observation.at,
        removed: false,
    })
}

/// The file of a finding that was about one file, as a member.
fn first_member(finding: &Finding) -> Option<Member> {
    let file = finding.file.as_ref()?;
    Some(Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: file.path.clone(),
        kind: finding.kind,
        blake3: file.blake3,
        first_seen: finding.first_seen,
        last_seen: finding.first_seen,
        removed: file.deleted,
    })
}
