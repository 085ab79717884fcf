//! Findings: each judgement makes one, raises the count of one, or goes into an aggregated one
//! (`aggregation`). A new revision is recorded, and the settings decide on a response to it
//! (`responses`). What a finding contains comes from `evidence`.

use jiff::Timestamp;

use super::aggregation::{is_reported_as_executed, transaction_id};
use super::evidence::{Emission, Evidence, expected, file_evidence, removed_evidence};
use super::messages::Effect;
use super::responses::{Actor, Cause, path_for};
use super::state::State;
use crate::budget;
use crate::detect::{Assessment, Judgement};
use crate::inventory::{Aspect, Entry, Reported};
use crate::model::finding::{ContainerEvidence, SCHEMA};
use crate::model::{
    Blake3Hash, ContainerId, FileState, Finding, FindingId, ImageReference, Kind, Observation,
    Process, RootfsPath, Source, Verdict,
};
use crate::policy::Decision;

/// The detail of a finding about code that could be written to while it was run.
const COULD_CHANGE: &str = "its content could change between its execution and the moment it was \
     read: what ran may not be the content that is reported here";

impl State {
    /// Emits each judgement of a fact, into an aggregated finding or as one of its own.
    pub(super) fn emit(
        &mut self,
        observation: &Observation,
        assessment: &Assessment,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let linker = self.linker_of(observation, assessment, evidence);
        let writer = evidence.writer.or(linker.as_ref());
        let evidence = &Evidence { writer, ..*evidence };
        for judgement in &assessment.judgements {
            let verdict = self.policy.report();
            let emission = Emission { observation, judgement, evidence, verdict: &verdict, now };
            if !observation.is_denied() {
                self.note_copy(&emission);
            }
            if !self.policy.has_rules() {
                self.emit_one(&emission, effects);
                continue;
            }
            let Decision { verdict, severity } = self.decide_emission(&emission);
            let judgement = &Judgement { severity, ..judgement.clone() };
            self.emit_one(&Emission { judgement, verdict: &verdict, ..emission }, effects);
        }
    }

    /// The linker that has made this content, if its writer is not known here: a build copies
    /// what it has linked, and runs it before the change feed has read what was written.
    pub(super) fn linker_of(
        &self,
        observation: &Observation,
        assessment: &Assessment,
        evidence: &Evidence<'_>,
    ) -> Option<Process> {
        let is_code = assessment.judgements.iter().any(|judgement| judgement.kind.is_run());
        let is_unknown = evidence.writer.is_none() && !evidence.could_change().is_possible();
        let content = evidence.content().filter(|_| is_code && is_unknown)?;
        let entry = self.inventory.get(&observation.container)?;
        entry.writers.linked(content).cloned()
    }

    fn emit_one(&mut self, emission: &Emission<'_>, effects: &mut Vec<Effect>) {
        if emission.verdict.is_accept() {
            self.accept(emission, effects);
        } else if !self.emit_aggregated(emission, effects) {
            self.emit_single(emission, effects);
        }
    }

    /// Emits a judgement as a finding of its own.
    fn emit_single(&mut self, emission: &Emission<'_>, effects: &mut Vec<Effect>) {
        let Emission { observation, judgement, evidence, verdict, now } = *emission;
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let content = evidence.content();
        let kind = judgement.kind;
        let id = match evidence.path.filter(|_| content.is_none() && kind.is_run()) {
            // The file was gone before it could be read. One with its name is more likely
            // the same program than another one.
            Some(path) => {
                let mut about = entry.findings.about(path);
                about.find(|finding| finding.kind == kind).map(|finding| finding.id)
            }
            None => None,
        };
        let id = id.unwrap_or_else(|| FindingId::new(Some(container), kind, &evidence.subject()));
        // The file was run before its write was reported, or was seen when it started: the
        // finding about the execution reports it.
        if (kind.is_written() || kind == Kind::ExecDeleted)
            && !entry.findings.contains(&id)
            && evidence.path.is_some_and(|path| is_reported_as_executed(entry, path, content))
        {
            return;
        }
        let run = entry.run_of(observation.init);
        if let Some(finding) = entry.findings.get_mut(&id) {
            if observation.source == Source::Scan {
                // A scan finds again what is reported already.
                return;
            }
            finding.run = Some(run);
            if finding.verdict != *verdict {
                // Other rules are in force.
                finding.verdict = verdict.clone();
                finding.severity = judgement.severity;
            }
            finding.count += observation.times();
            finding.revision += 1;
            finding.last_seen = finding.last_seen.max(observation.at);
            if let (Some(file), Some(state)) = (&mut finding.file, evidence.state) {
                file.deleted = state.deleted;
            }
        } else {
            let finding = self.make_finding(id, emission);
            let Some(entry) = self.inventory.get_mut(container) else { return };
            if !entry.findings.has_room_for(&finding) {
                self.fold(emission, &finding, effects);
                return;
            }
            entry.insert_finding(finding);
        }
        self.session_caused(observation, evidence.process, id, now, effects);
        self.publish(container, id, Actor::of(emission), now, effects);
    }

    /// A finding that has not been reported yet.
    pub(super) fn make_finding(&self, id: FindingId, emission: &Emission<'_>) -> Finding {
        let Emission { observation, judgement, evidence, verdict, .. } = *emission;
        let (source, at) = (observation.source.name(), observation.at);
        let mut finding = new_finding(&self.node, verdict.clone(), id, judgement.kind, source, at);
        finding.severity = judgement.severity;
        finding.count = observation.times();
        finding.process = evidence.process.map(budget::process);
        finding.writer = evidence.writer.map(budget::process);
        finding.invoked_as = evidence.invoked_as.map(ToOwned::to_owned);
        let entry = self.inventory.get(&observation.container);
        finding.detail = detail(emission, entry);
        let Some(entry) = entry else { return finding };
        set_container(&mut finding, &observation.container, entry);
        finding.run = Some(entry.run_of(observation.init));
        let id_map = entry.container.as_ref().and_then(|known| known.id_map.as_ref());
        finding.file = evidence
            .path
            .zip(evidence.state)
            .map(|(path, state)| file_evidence(path, evidence.filesystem, state, id_map));
        finding.expected = judgement
            .expected
            .as_ref()
            .map(|known| expected(known, evidence.lower, evidence.state));
        if finding.file.is_none() {
            // A removed file is described by what the image has in its place.
            let removed = evidence.path.zip(judgement.expected.as_ref());
            finding.file = removed.map(|(path, known)| removed_evidence(path, known));
        }
        // What could change may have another writer than the one that is known.
        if !evidence.could_change().is_possible() {
            let processes = finding.process.iter().chain(&finding.writer);
            finding.from_image = State::from_image(entry, processes);
        }
        finding.session = self.session_of(observation, evidence.process);
        link_to_writer(&mut finding, entry, observation, evidence);
        finding
    }

    /// Records the newest revision of a finding, and responds to it as the settings say.
    pub(super) fn publish(
        &mut self,
        container: &ContainerId,
        id: FindingId,
        actor: Actor,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(finding) = entry.findings.get(&id) else { return };
        effects.push(Effect::finding(finding));
        let (kind, verdict) = (finding.kind, &finding.verdict.clone());
        let path = path_for(verdict, finding.file.as_ref().map(|file| &file.path));
        let cause = Cause { container, actor, kind, verdict, finding: id, path };
        self.respond(&cause, now, effects);
    }

    /// An executed file was removed, or is back.
    pub(super) fn mark_deleted(
        &mut self,
        container: &ContainerId,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
        deleted: bool,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let changed: Vec<FindingId> = entry
            .findings
            .about(path)
            .filter(|finding| {
                finding.kind.is_exec()
                    && finding.file.as_ref().is_some_and(|file| {
                        file.deleted != deleted && (deleted || file.blake3 == content)
                    })
            })
            .map(|finding| finding.id)
            .collect();
        for id in changed {
            let Some(finding) = entry.findings.get_mut(&id) else { continue };
            if let Some(file) = &mut finding.file {
                file.deleted = deleted;
            }
            finding.revision += 1;
            effects.push(Effect::finding(finding));
        }
    }
}

/// What a finding says beside its other fields: first where its file lies, then how it came,
/// then what is uncertain.
fn detail(emission: &Emission<'_>, entry: Option<&Entry>) -> Option<String> {
    let Emission { observation, evidence, .. } = *emission;
    let owner = observation.file_of.as_ref();
    let owner = owner.map(|owner| format!("the file lies in the root of the container {owner}"));
    let way = observation.reached_as.as_ref();
    let way = way.map(|path| match path.parent().and_then(|home| home.parent()) {
        // A home that lies elsewhere has this name only through its user.
        Some(homes) if homes.as_bytes() == b"/home" => format!("it counts as {path}"),
        _ => format!("the container reaches it as {path}"),
    });
    let could_change = evidence.could_change().is_possible().then(|| COULD_CHANGE.to_owned());
    let is_program_of_scan = observation.source == Source::Scan
        && evidence.process.is_none()
        && evidence.state.is_some_and(FileState::is_program);
    let blind_spot = entry.and_then(|entry| entry.watch.blind_spot).filter(|_| is_program_of_scan);
    let parts = owner
        .into_iter()
        .chain(way)
        .chain(evidence.detail.map(ToOwned::to_owned))
        .chain(could_change)
        .chain(blind_spot.map(ToOwned::to_owned));
    parts.reduce(|all, next| all + "; " + &next)
}

/// Names the findings about the writing of a file that was run, and the transaction of a
/// package manager that has written it.
fn link_to_writer(
    finding: &mut Finding,
    entry: &Entry,
    observation: &Observation,
    evidence: &Evidence<'_>,
) {
    let container = &observation.container;
    let Some(path) = evidence.path else { return };
    let content = evidence.content();
    if !finding.kind.is_run() {
        let manager = evidence.process.and_then(|writer| entry.writers.package_manager_of(writer));
        finding.transaction = manager.map(|manager| transaction_id(container, manager));
        return;
    }
    let mut own = entry.findings.about_content(path, content);
    finding.story = own.find(|other| other.kind.is_written()).map(|other| other.id);
    if let Some((writing, reported)) = entry.members.of(Aspect::Written, path)
        && reported == Reported::content(content)
    {
        match entry.findings.get(&writing).map(|other| other.kind) {
            Some(Kind::PackageTransaction) => finding.transaction = Some(writing),
            Some(_) => finding.story = finding.story.or(Some(writing)),
            None => (),
        }
    }
    if finding.transaction.is_none() {
        let manager = evidence.writer.and_then(|writer| entry.writers.package_manager_of(writer));
        finding.transaction = manager.map(|manager| transaction_id(container, manager));
    }
}

/// A finding without a container and a subject.
pub(super) fn new_finding(
    node: &str,
    verdict: Verdict,
    id: FindingId,
    kind: Kind,
    source: &str,
    at: Timestamp,
) -> Finding {
    Finding {
        schema: SCHEMA.to_owned(),
        id,
        revision: 1,
        kind,
        severity: kind.severity(),
        first_seen: at,
        last_seen: at,
        count: 1,
        source: source.to_owned(),
        node: node.to_owned(),
        runtime: "containerd".to_owned(),
        container_runtime: None,
        container: None,
        run: None,
        image: ImageReference::default(),
        file: None,
        expected: None,
        process: None,
        writer: None,
        from_image: None,
        after_start_milliseconds: None,
        invoked_as: None,
        session: None,
        story: None,
        transaction: None,
        files: None,
        verdict,
        outcome: None,
        attack: kind.attack(),
        detail: None,
    }
}

/// Makes a finding one of this container and its current run.
pub(super) fn set_container(finding: &mut Finding, id: &ContainerId, entry: &Entry) {
    let (container, image) = container_evidence(id, entry);
    (finding.container, finding.image) = (Some(container), image);
    finding.run = entry.incarnation();
    finding.container_runtime = entry.container.as_ref().map(|known| known.runtime.clone());
    let after = entry.run.began_at.map(|began| finding.last_seen.duration_since(began));
    finding.after_start_milliseconds =
        after.map(|after| u64::try_from(after.as_millis()).unwrap_or_default());
}

/// The container and its image, as findings and sessions name them.
pub(super) fn container_evidence(
    id: &ContainerId,
    entry: &Entry,
) -> (ContainerEvidence, ImageReference) {
    let container = entry.container.as_ref();
    let evidence = ContainerEvidence {
        id: id.clone(),
        labels: container.map(|container| container.labels.clone()).unwrap_or_default(),
        pod: container.and_then(|container| container.pod.clone()),
    };
    let mut image = container.map(|container| container.image.clone()).unwrap_or_default();
    image.chain_id = image.chain_id.or_else(|| entry.chain_id());
    (evidence, image)
}
