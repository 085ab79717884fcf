//! Decides whether a judgement goes into an aggregated finding, and into which one. `files`,
//! `code` and `packages` know the groups; `put` changes the findings. What is left gets a
//! finding of its own (`findings`).

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::code::{Used, is_reported_as_executed, used_group};
use super::files::{copies, group};
use super::group::{Candidate, Common, Group};
use super::packages::{
    Installer, accounts, add_command, installed, is_images_own, is_maintainer_script,
    is_run_by_manager, is_site_hook, transaction_id,
};
use super::put::{MemberFile, Target};
use crate::baseline::ImageBaseline;
use crate::detect::Judgement;
use crate::inventory::{Aspect, BaselineState, Entry, Reported};
use crate::model::finding::Subject;
use crate::model::{
    Blake3Hash, ContainerId, Filesystem, Finding, FindingId, Format, Kind, Process, RootfsPath,
    Severity, Source,
};
use crate::pipeline::evidence::Emission;
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

/// How soon a script runs the next package manager.
const ONE_SCRIPT: SignedDuration = SignedDuration::from_mins(2);
/// How long one run of a package manager may take, and how late it may be seen.
const ONE_RUN: SignedDuration = SignedDuration::from_mins(10);
const LEAD: SignedDuration = SignedDuration::from_secs(2);

impl State {
    /// Emits a judgement as part of an aggregated finding, if it belongs into one. False if
    /// it needs a finding of its own.
    pub(in crate::pipeline) fn emit_aggregated(
        &mut self,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Emission { observation, judgement, evidence, .. } = *emission;
        let Some(entry) = self.inventory.get(&observation.container) else { return true };
        let kind = judgement.kind;
        if kind.is_run() {
            return self.emit_code(emission, effects);
        }
        let Some(path) = evidence.path.filter(|_| evidence.filesystem == Filesystem::Overlay)
        else {
            return false;
        };
        let writer = evidence.process;
        let manager = writer.and_then(|process| entry.writers.package_manager_of(process));
        let manager = manager.cloned();
        let content = evidence.content();
        let reported = match kind {
            Kind::FileRemoved => Reported::REMOVED,
            _ => Reported::content(content),
        };
        let written = MemberFile { aspect: Aspect::Written, path, content, reported };
        match kind {
            Kind::FileAdded | Kind::FileModified | Kind::FileRelocated | Kind::FileRemoved => {
                self.emit_written(written, manager, emission, effects)
            }
            Kind::FilePrivileged | Kind::FilePersistence => {
                self.emit_sensitive(written, manager, emission, effects)
            }
            _ => false,
        }
    }

    /// Emits a file that was written or removed. `manager`: the package manager that did it.
    fn emit_written(
        &mut self,
        file: MemberFile<'_>,
        manager: Option<Arc<Process>>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Emission { observation, judgement, .. } = *emission;
        let container = &observation.container;
        let MemberFile { path, content, .. } = file;
        let Some(entry) = self.inventory.get(container) else { return true };
        let kind = judgement.kind;
        if kind.is_written() && is_reported_as_executed(entry, path, content) {
            // The file was run before its write was reported: the finding about the
            // execution reports it.
            if let Some(manager) = manager {
                self.link_to_transaction(container, path, content, &manager, effects);
                self.put(&Target::Transaction(manager), file, emission, effects);
            }
            return true;
        }
        if has_own_finding(entry, container, kind, &file) {
            return false;
        }
        let transaction = manager.as_ref().map(|manager| transaction_id(container, manager));
        if let Some((id, known)) = entry.members.of(Aspect::Written, path)
            && known == file.reported
            && transaction.is_none_or(|transaction| transaction == id)
        {
            self.seen_again(id, emission, effects);
            return true;
        }
        let target = match manager {
            Some(manager) => Some(Target::Transaction(manager)),
            None => {
                let candidate = candidate(judgement, path, content, None);
                group(entry, container, &candidate).map(Target::Group)
            }
        };
        let Some(target) = target else { return false };
        self.put(&target, file, emission, effects);
        true
    }

    /// Emits a file with a privilege, or one that other programs obey. If a package manager
    /// has written it, its transaction lists it too. The severity is the full one.
    fn emit_sensitive(
        &mut self,
        file: MemberFile<'_>,
        manager: Option<Arc<Process>>,
        emission: &Emission<'_>,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Emission { observation, judgement, evidence, .. } = *emission;
        let container = &observation.container;
        let MemberFile { path, content, reported, .. } = file;
        let Some(entry) = self.inventory.get(container) else { return true };
        let kind = judgement.kind;
        let has_own = has_own_finding(entry, container, kind, &file);
        let transaction = manager.as_ref().map(|manager| transaction_id(container, manager));
        if let Some(manager) = manager {
            let known = entry.members.of(Aspect::Written, path);
            if known.is_none_or(|known| Some(known.0) != transaction || known.1 != reported) {
                self.put(&Target::Transaction(manager), file, emission, effects);
            }
            if is_site_hook(path) {
                return true;
            }
        }
        if has_own {
            return false;
        }
        let Some(entry) = self.inventory.get(container) else { return true };
        // A scan knows less of what was reported already.
        if observation.source == Source::Scan
            && let Some((id, known)) = entry.members.of(Aspect::of(kind), path)
            && known == reported
            && let Some(finding) = entry.findings.get(&id)
            && finding.severity >= judgement.severity
        {
            return true;
        }
        let candidate = candidate(judgement, path, content, None);
        let transaction = transaction.or_else(|| during(entry, emission));
        let common = match (transaction, &entry.baseline.state) {
            (Some(transaction), _) => Some(installed(kind, transaction, judgement.severity)),
            (None, BaselineState::Ready(image)) if kind == Kind::FilePersistence => {
                accounts(entry, image, &candidate, evidence.process)
            }
            _ => None,
        };
        let Some(group) = common.or_else(|| group(entry, container, &candidate)) else {
            return false;
        };
        let sensitive = MemberFile { aspect: Aspect::of(kind), ..file };
        self.put_or_count(group, sensitive, emission, effects);
        true
    }

    /// Emits code that was run, if it belongs into an aggregated finding.
    fn emit_code(&mut self, emission: &Emission<'_>, effects: &mut Vec<Effect>) -> bool {
        let Emission { observation, judgement, evidence, .. } = *emission;
        let container = &observation.container;
        let Some(entry) = self.inventory.get(container) else { return true };
        let Some(path) = evidence.path else { return false };
        let (kind, process, content) = (judgement.kind, evidence.process, evidence.content());
        let reported = Reported::content(content);
        let file = MemberFile { aspect: Aspect::of(kind), path, content, reported };
        let is_script = evidence.state.is_some_and(|state| state.format == Format::Script);
        if let Some(process) = process
            && let Some(manager) = entry.writers.package_manager_of(process).cloned()
            && (is_maintainer_script(kind, path) || is_run_by_manager(kind, is_script, process))
        {
            let written = MemberFile { aspect: Aspect::Written, ..file };
            self.put(&Target::Transaction(manager), written, emission, effects);
            return true;
        }
        if has_own_finding(entry, container, kind, &file) {
            return false;
        }
        if let Some((id, known)) = entry.members.of(file.aspect, path)
            && known == reported
            && let Some(finding) = entry.findings.get(&id)
            && finding.severity >= judgement.severity
            && !evidence.could_change().is_possible()
        {
            let is_single = finding.files.is_none();
            self.runs_unpacked(container, id, process);
            self.seen_again(id, emission, effects);
            if is_single {
                self.publish_aggregate(container, id, effects);
            }
            return true;
        }
        let Some(group) = self.code_group(entry, path, emission) else { return false };
        if matches!(group.common, Some(Common::Built { .. })) {
            self.remember_linked(emission);
        }
        let most = match &group.common {
            // A rule says how severe it is.
            _ if emission.verdict.unchanged_severity.is_some() => judgement.severity,
            // The finding about the transaction lists it.
            Some(Common::Brought(_)) => Severity::Low,
            Some(Common::Built { .. }) => Severity::Medium,
            _ => judgement.severity,
        };
        let severity = judgement.severity.min(most);
        let judgement = Judgement { severity, ..judgement.clone() };
        let emission = Emission { judgement: &judgement, ..*emission };
        if let Some(Common::Unpacked(unpacking)) = &group.common
            && let Some(entry) = self.inventory.get_mut(container)
        {
            entry.writers.remember_unpacking(group.id(container), unpacking);
            self.runs_unpacked(container, group.id(container), process);
        }
        self.put_or_count(group, file, &emission, effects);
        true
    }

    /// Remembers what a linker of the image has written.
    pub(in crate::pipeline) fn remember_linked(&mut self, emission: &Emission<'_>) {
        let Emission { observation, evidence, .. } = *emission;
        if let (Some(writer), Some(content)) = (evidence.writer, evidence.content())
            && !evidence.could_change().is_possible()
            && let Some(entry) = self.inventory.get_mut(&observation.container)
            && let BaselineState::Ready(image) = &entry.baseline.state
            && writer.exe.as_deref().is_some_and(|exe| is_images_own(entry, image, exe))
        {
            entry.writers.remember_linked(content, writer);
        }
    }

    /// Remembers a process that runs what was unpacked: what it writes belongs to that.
    fn runs_unpacked(
        &mut self,
        container: &ContainerId,
        finding: FindingId,
        process: Option<&Process>,
    ) {
        let entry = self.inventory.get_mut(container);
        if let (Some(entry), Some(process)) = (entry, process) {
            entry.writers.runs_unpacked(finding, process.identity);
        }
    }

    /// The group of code that was run.
    fn code_group(
        &self,
        entry: &Entry,
        path: &RootfsPath,
        emission: &Emission<'_>,
    ) -> Option<Group> {
        let Emission { observation, judgement, evidence, .. } = *emission;
        let (container, process) = (&observation.container, evidence.process);
        let root = process.and_then(Process::own_root);
        let candidate = candidate(judgement, path, evidence.content(), root.as_ref());
        let is_interactive = process.is_none_or(|process| {
            process.tty.is_some()
                || self.sessions.is_interactive(container, observation.session, process)
        });
        let used = Used {
            file: candidate,
            process,
            writer: evidence.writer,
            could_change: evidence.could_change(),
            is_interactive,
            init: observation.init,
        };
        let used_group = match &entry.baseline.state {
            // Code in the root of another container has nothing in common with code here.
            BaselineState::Ready(image)
                if evidence.filesystem != Filesystem::Container
                    && !root.as_ref().is_some_and(|root| path.is_within(root)) =>
            {
                used_group(entry, image, container, &used)
            }
            _ => None,
        };
        used_group.or_else(|| match evidence.filesystem {
            Filesystem::Overlay => group(entry, container, &candidate),
            Filesystem::Container => None,
            _ => copies(&candidate),
        })
    }

    /// A package manager has written files that were reported as executed before: adds its
    /// transaction to their findings.
    fn link_to_transaction(
        &mut self,
        container: &ContainerId,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
        manager: &Process,
        effects: &mut Vec<Effect>,
    ) {
        let transaction = Some(transaction_id(container, manager));
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let executed: Vec<FindingId> = entry
            .findings
            .about_content(path, content)
            .filter(|finding| finding.kind.is_exec() && finding.transaction.is_none())
            .map(|finding| finding.id)
            .collect();
        for id in executed {
            let Some(finding) = entry.findings.get_mut(&id) else { continue };
            finding.transaction = transaction;
            finding.revision += 1;
            effects.push(Effect::finding(finding));
        }
    }

    /// Remembers a package manager at work, if it is the image's own.
    pub(in crate::pipeline) fn package_manager(
        &mut self,
        container: &ContainerId,
        process: &Arc<Process>,
        image: &ImageBaseline,
        at: Timestamp,
    ) {
        let (has_rules, generation) = (self.policy.has_rules(), self.policy.generation);
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(installer) = Installer::of(process) else { return };
        if installer.is_of_the_image(process, entry, image) {
            let Entry { run, findings, writers, .. } = entry;
            // Rules decide about each work; what an exception accepts stands apart.
            let continues = |first: &Process, is_same: bool| {
                let finding = findings.get(&transaction_id(container, first));
                finding.is_some_and(|finding| {
                    let verdict = &finding.verdict;
                    let is_recent = at.duration_since(finding.last_seen) < ONE_SCRIPT;
                    !verdict.is_accept()
                        && (is_same || is_recent)
                        && (!has_rules || is_same && verdict.policy_generation == generation)
                })
            };
            let first = writers.remember_package_manager(process, run.init, at, continues);
            if let Some(first) = first
                && let Some(finding) = findings.get_mut(&transaction_id(container, &first))
            {
                add_command(finding, process);
            }
        } else if installer.is_interpreted {
            entry.writers.remember_candidate(process.clone());
        }
    }

    /// Notes what a process executes, and remembers the package managers whose programs are
    /// known by now to be copies of the image's.
    pub(in crate::pipeline) fn note_copy(&mut self, emission: &Emission<'_>) {
        let Emission { observation, judgement, evidence, .. } = *emission;
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let is_script = matches!(judgement.kind, Kind::ExecScript | Kind::ExecInterpreted)
            || evidence.state.is_some_and(|state| state.format == Format::Script);
        let is_program = judgement.kind.is_exec() && !is_script;
        if let Some(process) = evidence.process.filter(|_| is_program) {
            let is_copy = judgement.kind == Kind::ExecRelocated
                && judgement.severity <= judgement.kind.severity()
                && !evidence.could_change().is_possible();
            entry.writers.runs_copy(process.identity, is_copy);
        }
        let candidates = entry.writers.take_candidates();
        let BaselineState::Ready(image) = &entry.baseline.state else { return };
        if candidates.is_empty() {
            return;
        }
        let image = image.clone();
        for process in candidates {
            self.package_manager(container, &process, &image, observation.at);
        }
    }
}

/// The transaction during which a file appeared whose writer is not known: the names in a
/// directory that is new in the container's layer are found by a scan.
fn during(entry: &Entry, emission: &Emission<'_>) -> Option<FindingId> {
    let Emission { observation, evidence, .. } = *emission;
    if observation.source != Source::Scan || evidence.process.is_some() {
        return None;
    }
    let changed = evidence.changed?;
    // A transaction may go on for weeks, and its package managers run for minutes.
    let is_during = |finding: &&Finding| {
        let mut began = finding.process.iter().flat_map(|first| entry.writers.began(first));
        changed <= finding.last_seen
            && began.any(|began| {
                let end = began.saturating_add(ONE_RUN).unwrap_or(Timestamp::MAX);
                let begin = began.saturating_sub(LEAD).unwrap_or(Timestamp::MIN);
                (begin..=end).contains(&changed)
            })
    };
    let is_transaction = |finding: &&Finding| finding.kind == Kind::PackageTransaction;
    let mut transactions = entry.findings.iter().filter(is_transaction);
    transactions.find(is_during).map(|finding| finding.id)
}

fn candidate<'a>(
    judgement: &Judgement,
    path: &'a RootfsPath,
    content: Option<Blake3Hash>,
    root: Option<&'a RootfsPath>,
) -> Candidate<'a> {
    Candidate { kind: judgement.kind, severity: judgement.severity, path, content, root }
}

/// Whether this file has a finding of its own already.
fn has_own_finding(
    entry: &Entry,
    container: &ContainerId,
    kind: Kind,
    file: &MemberFile<'_>,
) -> bool {
    let subject = Subject::File { path: file.path, content: file.content };
    entry.findings.contains(&FindingId::new(Some(container), kind, &subject))
}
