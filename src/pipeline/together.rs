//! Aggregated findings: each file is counted when it comes; the first is told at
//! once, the others in batches.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::aggregate::{self, Candidate, Common, Group, MAX_LISTED};
use super::{Cause, Effect, Evidence, State, is_run, is_told_as_executed, new_finding};
use crate::baseline::{ImageBaseline, Known};
use crate::budget;
use crate::detect::Judgement;
use crate::health::Failure;
use crate::history::{MemberChange, Record};
use crate::inventory::{BaselineState, Deed, Entry, Told};
use crate::model::file::is_program;
use crate::model::finding::{MEMBER_SCHEMA, Subject};
use crate::model::{
    Blake3Hash, ContainerId, Disposition, FileState, FileType, Filesystem, Finding, FindingId,
    Format, Kind, Member, Observation, Process, ProcessIdentity, RootfsPath, Severity, Source,
};

/// How long a file of an aggregated finding that is told already may wait to be told.
const SAID_WITHIN: SignedDuration = SignedDuration::from_secs(1);
/// How many may wait.
const MOST_UNSAID: usize = 2048;

/// What is new of aggregated findings and not told yet.
#[derive(Debug, Default)]
pub(super) struct Unsaid {
    changes: BTreeMap<(ContainerId, FindingId), Vec<MemberChange>>,
    held: usize,
    since: Option<Timestamp>,
}

impl Unsaid {
    fn push(
        &mut self,
        container: &ContainerId,
        finding: FindingId,
        change: Option<MemberChange>,
        now: Timestamp,
    ) {
        let changes = self.changes.entry((container.clone(), finding)).or_default();
        self.held += usize::from(change.is_some());
        changes.extend(change);
        self.since.get_or_insert(now);
    }

    pub(super) fn due(&self) -> Option<Timestamp> {
        self.since.map(|since| since.saturating_add(SAID_WITHIN).unwrap_or(Timestamp::MAX))
    }
}

/// The finding that a package manager's writes are counted in.
pub(super) fn transaction_id(container: &ContainerId, manager: &Process) -> FindingId {
    let subject = Subject::Process(manager.identity);
    FindingId::new(Some(container), Kind::PackageTransaction, &subject)
}

/// Which finding a file goes into.
enum Into {
    Group(Group),
    Transaction(Arc<Process>),
}

impl Into {
    fn id(&self, container: &ContainerId) -> FindingId {
        match self {
            Into::Group(group) => group.id(container),
            Into::Transaction(manager) => transaction_id(container, manager),
        }
    }

    fn kind(&self) -> Kind {
        match self {
            Into::Group(group) => group.kind,
            Into::Transaction(_) => Kind::PackageTransaction,
        }
    }
}

/// What one file of an aggregated finding is.
#[derive(Clone, Copy)]
struct File<'a> {
    deed: Deed,
    path: &'a RootfsPath,
    content: Option<Blake3Hash>,
    told: Told,
}

impl State {
    /// Tells one thing as part of an aggregated finding, if it belongs into one; false
    /// if it is to have a finding of its own.
    pub(super) fn tell_together(
        &mut self,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let container = &observation.container;
        let Some(entry) = self.inventory.get(container) else { return true };
        let kind = judgement.kind;
        if is_run(kind) {
            return self.tell_run_together(observation, judgement, evidence, now, effects);
        }
        let Some(path) = evidence.path.filter(|_| evidence.filesystem == Filesystem::Overlay)
        else {
            return false;
        };
        let content = evidence.state.and_then(FileState::blake3);
        let manager = evidence.process.and_then(|process| entry.package_manager_of(process));
        let manager = manager.cloned();
        let told = if kind == Kind::FileRemoved { Told::REMOVED } else { Told::content(content) };
        let written = File { deed: Deed::Written, path, content, told };
        let is_own = {
            let subject = Subject::File { path, content };
            entry.findings.contains_key(&FindingId::new(Some(container), kind, &subject))
        };
        match kind {
            Kind::FileAdded | Kind::FileModified | Kind::FileRelocated | Kind::FileRemoved => {
                if kind.is_written() && is_told_as_executed(entry, path, content) {
                    // Run before it settled: the execution's finding tells it.
                    if let Some(manager) = manager {
                        self.brought_by(container, path, content, &manager, effects);
                        let into = Into::Transaction(manager);
                        self.put(&into, written, observation, judgement, evidence, now, effects);
                    }
                    return true;
                }
                if is_own {
                    return false;
                }
                let known = entry.members.of(Deed::Written, path);
                let transaction =
                    manager.as_ref().map(|manager| transaction_id(container, manager));
                if let Some((id, known)) = known
                    && known == told
                    && transaction.is_none_or(|transaction| transaction == id)
                {
                    self.seen_again(id, observation, evidence, now, effects);
                    return true;
                }
                let into = match manager {
                    Some(manager) => Some(Into::Transaction(manager)),
                    None => {
                        let severity = judgement.severity;
                        let file = Candidate { kind, severity, path, content, root: None };
                        aggregate::group(entry, container, &file).map(Into::Group)
                    }
                };
                let Some(into) = into else { return false };
                self.put(&into, written, observation, judgement, evidence, now, effects);
                true
            }
            // At full severity, and whoever lists the transaction misses nothing.
            Kind::FilePrivileged | Kind::FilePersistence => {
                let transaction =
                    manager.as_ref().map(|manager| transaction_id(container, manager));
                if let Some(manager) = manager
                    && entry.members.of(Deed::Written, path).is_none_or(|(id, known)| {
                        id != transaction_id(container, &manager) || known != told
                    })
                {
                    let is_hook = aggregate::is_site_hook(path);
                    let into = Into::Transaction(manager);
                    self.put(&into, written, observation, judgement, evidence, now, effects);
                    if is_hook {
                        return true;
                    }
                }
                if is_own {
                    return false;
                }
                let Some(entry) = self.inventory.get(container) else { return true };
                let severity = judgement.severity;
                let file = Candidate { kind, severity, path, content, root: None };
                let group = match (transaction, &entry.baseline) {
                    (Some(transaction), _) => {
                        Some(aggregate::installed(kind, transaction, severity))
                    }
                    (None, BaselineState::Ready(image)) if kind == Kind::FilePersistence => {
                        aggregate::accounts(entry, image, &file, evidence.process)
                    }
                    _ => None,
                };
                let group = group.or_else(|| aggregate::group(entry, container, &file));
                let Some(group) = group else { return false };
                let gained = File { deed: Deed::of(kind), ..written };
                self.put_or_count(group, gained, observation, judgement, evidence, now, effects);
                true
            }
            _ => false,
        }
    }

    /// Tells code that was run as part of an aggregated finding, if it belongs into one.
    fn tell_run_together(
        &mut self,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let container = &observation.container;
        let Some(entry) = self.inventory.get(container) else { return true };
        let Some(path) = evidence.path else { return false };
        let (kind, process) = (judgement.kind, evidence.process);
        let content = evidence.state.and_then(FileState::blake3);
        let told = Told::content(content);
        let file = File { deed: Deed::of(kind), path, content, told };
        let is_script = evidence.state.is_some_and(|state| state.format == Format::Script);
        if let Some(process) = process
            && let Some(manager) = entry.package_manager_of(process).cloned()
            && (aggregate::is_maintainer_script(kind, path)
                || aggregate::is_run_by_manager(kind, is_script, process))
        {
            let written = File { deed: Deed::Written, ..file };
            let into = Into::Transaction(manager);
            self.put(&into, written, observation, judgement, evidence, now, effects);
            return true;
        }
        let subject = Subject::File { path, content };
        if entry.findings.contains_key(&FindingId::new(Some(container), kind, &subject)) {
            return false;
        }
        let could_change = evidence.state.is_some_and(|state| state.could_change);
        if let Some((id, known)) = entry.members.of(file.deed, path)
            && known == told
            && entry.findings.get(&id).is_some_and(|told| told.severity >= judgement.severity)
            && !could_change
        {
            let is_alone = entry.findings.get(&id).is_some_and(|told| told.files.is_none());
            self.seen_again(id, observation, evidence, now, effects);
            if is_alone {
                self.say(observation.container.clone(), id, effects);
            }
            return true;
        }
        let root = process.and_then(Process::own_root);
        let severity = judgement.severity;
        let candidate = Candidate { kind, severity, path, content, root: root.as_ref() };
        let is_interactive = process.is_none_or(|process| {
            process.tty.is_some()
                || self.sessions.is_interactive(container, observation.session, process)
        });
        let writer = evidence.writer;
        let used =
            aggregate::Used { file: candidate, process, writer, could_change, is_interactive };
        let on_overlay = evidence.filesystem == Filesystem::Overlay;
        let group = match &entry.baseline {
            // What lies in another container's root is nobody's habit here.
            BaselineState::Ready(image)
                if evidence.filesystem != Filesystem::Container
                    && !root.as_ref().is_some_and(|root| path.is_within(root)) =>
            {
                aggregate::used_group(entry, image, container, &used)
            }
            _ => None,
        };
        let group =
            group.or_else(|| aggregate::group(entry, container, &candidate).filter(|_| on_overlay));
        let Some(group) = group else { return false };
        if let (Some(Common::Built { .. }), Some(writer), Some(content)) =
            (&group.common, writer, content)
            && let Some(entry) = self.inventory.get_mut(container)
        {
            entry.remember_linked(content, writer);
        }
        // What is known to be a package's or a build's is as bad as that.
        let severity = match &group.common {
            Some(Common::Brought(_) | Common::Built { .. }) => severity.min(Severity::Medium),
            _ => severity,
        };
        let judgement = Judgement { severity, ..judgement.clone() };
        self.put_or_count(group, file, observation, &judgement, evidence, now, effects);
        true
    }

    /// Puts a file into a group and reports it at once; one that the group has is counted.
    #[expect(clippy::too_many_arguments, reason = "what is to be told, and where to")]
    fn put_or_count(
        &mut self,
        group: Group,
        file: File<'_>,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let id = group.id(container);
        let entry = self.inventory.get(container);
        if entry.and_then(|entry| entry.members.of(file.deed, file.path)) == Some((id, file.told)) {
            return self.seen_again(id, observation, evidence, now, effects);
        }
        let into = Into::Group(group);
        self.put(&into, file, observation, judgement, evidence, now, effects);
        self.say(container.clone(), id, effects);
    }

    /// A file that is known is seen again; what a scan finds again was told already.
    fn seen_again(
        &mut self,
        id: FindingId,
        observation: &Observation,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        self.session_caused(observation, evidence.process, id, now, effects);
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let run = entry.run_of(observation.init);
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        if observation.source != Source::Scan {
            finding.run = Some(run);
            finding.count += observation.times();
            finding.last_seen = finding.last_seen.max(observation.at);
            let kind = finding.kind;
            self.unsaid.push(container, id, None, now);
            let cause = Cause { container, init: Some(observation.init), kind, finding: id };
            self.answer(&cause, now, effects);
        }
    }

    /// Puts a file into an aggregated finding, which is made if it is not there.
    #[expect(clippy::too_many_arguments, reason = "what is to be told, and where to")]
    fn put(
        &mut self,
        into: &Into,
        file: File<'_>,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let id = into.id(container);
        let entry = self.inventory.get(container);
        let is_new = entry.is_some_and(|entry| !entry.findings.contains_key(&id));
        self.put_in(into, file, observation, judgement, evidence, now, effects);
        self.session_caused(observation, evidence.process, id, now, effects);
        // At once, and not when it is told: the run that did it may have ended by then.
        if is_new || observation.source != Source::Scan {
            let init = Some(observation.init);
            let cause = Cause { container, init, kind: into.kind(), finding: id };
            self.answer(&cause, now, effects);
        }
    }

    #[expect(clippy::too_many_arguments, reason = "what is to be told, and where to")]
    fn put_in(
        &mut self,
        into: &Into,
        file: File<'_>,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let id = into.id(container);
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let change = MemberChange::Seen(Member {
            schema: MEMBER_SCHEMA.to_owned(),
            path: file.path.clone(),
            kind: judgement.kind,
            blake3: file.content,
            first_seen: observation.at,
            last_seen: observation.at,
            removed: false,
        });
        let Some(finding) = entry.findings.get(&id) else {
            let finding = match into {
                Into::Group(group) => {
                    let mut finding = self.about_file(id, observation, judgement, evidence);
                    if group.begins_as_many() {
                        finding.files = Some(1);
                        finding.detail = group.detail();
                    } else if group.common.as_ref().is_some_and(Common::explains_one) {
                        finding.detail = join(finding.detail, group.detail());
                    }
                    if let Some(
                        Common::Brought(transaction) | Common::Installed { transaction, .. },
                    ) = &group.common
                    {
                        finding.transaction = Some(*transaction);
                    }
                    finding
                }
                Into::Transaction(manager) => self.transaction(id, manager, observation),
            };
            let is_one_of_many = finding.files.is_some();
            let has_room = matches!(into, Into::Group(group) if group.is_rest());
            let Some(entry) = self.inventory.get_mut(container) else { return };
            if !has_room && !entry.has_room_for(&finding) {
                self.fold(observation, judgement, evidence, &finding, now, effects);
                return;
            }
            entry.insert_finding(finding);
            if is_one_of_many {
                let is_listed = entry.members.put(file.deed, file.path, id, file.told);
                // What is told at once has revision 1.
                if let Some(finding) = entry.findings.get_mut(&id) {
                    finding.revision = 0;
                }
                self.unsaid.push(container, id, is_listed.then_some(change), now);
                self.say(container.clone(), id, effects);
                if !is_listed {
                    self.unlisted(container, now, effects);
                }
            } else {
                let (container, init) = (container.clone(), Some(observation.init));
                self.publish(&container, id, init, now, effects);
            }
            return;
        };
        let is_known = entry.members.of(file.deed, file.path).is_some_and(|(known, _)| known == id);
        let is_room = is_known || finding.files.unwrap_or(1) < MAX_LISTED;
        let is_listed = is_room && entry.members.put(file.deed, file.path, id, file.told);
        if !is_listed && observation.source == Source::Scan {
            // Whether it was counted already is not known.
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
        // Whatever is worse than the transaction stands alone, but for the scripts that
        // every package may bring.
        if matches!(into, Into::Group(_)) {
            finding.severity = finding.severity.max(judgement.severity);
        }
        if !is_known {
            if finding.files.is_none() {
                // The first one was alone until now.
                let first = first_member(finding).map(MemberChange::Seen);
                if let Into::Group(Group { common: Some(common), .. }) = into
                    && !common.explains_one()
                {
                    finding.detail = join(finding.detail.take(), common.detail());
                }
                self.unsaid.push(container, id, first, now);
            }
            finding.files = Some(finding.files.unwrap_or(1) + 1);
        }
        // Of one file alone the finding itself tells.
        let is_one_of_many = finding.files.is_some();
        self.unsaid.push(container, id, Some(change).filter(|_| is_listed && is_one_of_many), now);
        if !is_listed {
            self.unlisted(container, now, effects);
        }
        if self.unsaid.held >= MOST_UNSAID {
            self.say_all(effects);
        }
    }

    /// Counts what found no room as a finding of its own in the one of its kind that
    /// always has room, and answers it as the policy says.
    pub(super) fn fold(
        &mut self,
        observation: &Observation,
        judgement: &Judgement,
        evidence: &Evidence<'_>,
        finding: &Finding,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let kind = judgement.kind;
        let Some(path) = evidence.path else {
            let id = self.fold_finding(container, Some(observation.init), finding, now, effects);
            self.session_caused(observation, evidence.process, id, now, effects);
            return;
        };
        let content = evidence.state.and_then(FileState::blake3);
        let deed = Deed::of(kind);
        let told = if kind == Kind::FileRemoved { Told::REMOVED } else { Told::content(content) };
        let into = Into::Group(Group::rest(kind));
        let id = into.id(container);
        let known = self.inventory.get(container).and_then(|entry| entry.members.of(deed, path));
        if known == Some((id, told)) {
            self.seen_again(id, observation, evidence, now, effects);
        } else {
            self.findings_full(container, kind, now, effects);
            let file = File { deed, path, content, told };
            self.put(&into, file, observation, judgement, evidence, now, effects);
        }
        if self.policy.decide(kind).disposition != Disposition::Report {
            self.say(container.clone(), id, effects);
        }
    }

    /// The same of what is no file. Hands back the finding that it is counted in.
    pub(super) fn fold_finding(
        &mut self,
        container: &ContainerId,
        init: Option<ProcessIdentity>,
        finding: &Finding,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> FindingId {
        let group = Group::rest(finding.kind);
        let id = group.id(container);
        self.findings_full(container, finding.kind, now, effects);
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
        self.unsaid.push(container, id, None, now);
        let entry = self.inventory.get(container);
        let told = entry.and_then(|entry| entry.findings.get(&id));
        let is_first = told.is_some_and(|told| told.revision == 0);
        if is_first || finding.verdict.disposition != Disposition::Report {
            self.say(container.clone(), id, effects);
        }
        let cause = Cause { container, init, kind: finding.kind, finding: id };
        self.answer(&cause, now, effects);
        id
    }

    fn unlisted(&mut self, container: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let _ = self.health.record(Failure::FindingsFull);
        let detail = format!(
            "files are counted and not listed: of one finding {MAX_LISTED} are, of one container \
             {}, of all {}",
            budget::MEMBERS,
            budget::ALL_MEMBERS
        );
        self.lost(Failure::FindingsFull, Some(container.clone()), detail, now, effects);
    }

    /// The finding about what a package manager does.
    fn transaction(&self, id: FindingId, manager: &Process, observation: &Observation) -> Finding {
        let (source, at) = (observation.source.name(), observation.at);
        let kind = Kind::PackageTransaction;
        let mut finding = new_finding(&self.node, &self.policy, id, kind, source, at);
        finding.files = Some(1);
        finding.process = Some(budget::process(manager));
        if let Some(entry) = self.inventory.get(&observation.container) {
            finding.belongs_to(&observation.container, entry);
            finding.run = Some(entry.run_of(observation.init));
        }
        finding.session = self.session_of(observation, Some(manager));
        finding
    }

    /// A package manager wrote what was executed before that was known.
    fn brought_by(
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
            .about_content(path, content)
            .filter(|told| told.kind.is_exec() && told.transaction.is_none())
            .map(|told| told.id)
            .collect();
        for id in executed {
            let Some(finding) = entry.findings.get_mut(&id) else { continue };
            finding.transaction = transaction;
            finding.revision += 1;
            effects.push(Effect::record(finding));
        }
    }

    /// A file that was told together with others is gone.
    pub(super) fn mark_gone(
        &mut self,
        observation: &Observation,
        path: &RootfsPath,
        now: Timestamp,
    ) {
        let container = &observation.container;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let run = Kind::ALL.iter().filter(|kind| is_run(**kind)).map(|kind| Deed::of(*kind));
        for deed in std::iter::once(Deed::Written).chain(run) {
            let Some((id, told)) = entry.members.of(deed, path) else { continue };
            if matches!(told, Told::GONE | Told::REMOVED) {
                continue;
            }
            entry.members.put(deed, path, id, Told::GONE);
            if entry.findings.get(&id).is_some_and(|finding| finding.files.is_some()) {
                let change = MemberChange::Gone { path: path.clone(), at: observation.at };
                self.unsaid.push(container, id, Some(change), now);
            }
        }
    }

    /// Remembers a package manager at work, if it is the image's own.
    pub(super) fn package_manager(
        &mut self,
        container: &ContainerId,
        process: &Arc<Process>,
        image: &ImageBaseline,
    ) {
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let Some(files) = aggregate::files_of_package_manager(process) else { return };
        if files.iter().all(|file| is_unchanged(entry, image, file)) {
            entry.remember_package_manager(process.clone());
        }
    }

    // ---- telling

    /// Tells what is new of one aggregated finding.
    fn say(&mut self, container: ContainerId, id: FindingId, effects: &mut Vec<Effect>) {
        let key = (container, id);
        let Some(changes) = self.unsaid.changes.remove(&key) else { return };
        self.unsaid.held -= changes.len();
        let Some(entry) = self.inventory.get_mut(&key.0) else { return };
        let Some(finding) = entry.findings.get_mut(&id) else { return };
        finding.revision += 1;
        let finding = Box::new(finding.clone());
        effects.push(Effect::Record(Record::Aggregate { finding, changes }));
    }

    /// Tells what is new of all of them.
    pub(super) fn say_all(&mut self, effects: &mut Vec<Effect>) {
        self.unsaid.since = None;
        let waiting: Vec<(ContainerId, FindingId)> = self.unsaid.changes.keys().cloned().collect();
        for (container, id) in waiting {
            self.say(container, id, effects);
        }
    }
}

fn join(one: Option<String>, other: Option<String>) -> Option<String> {
    one.into_iter().chain(other).reduce(|all, next| all + "; " + &next)
}

/// What a finding told of one file, as one of many.
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

/// Whether the image has a program here, and nothing was ever told of it.
fn is_unchanged(entry: &Entry, image: &ImageBaseline, path: &RootfsPath) -> bool {
    let is_of_image = |known: Known| match known.entry.file_type {
        FileType::Regular => is_program(known.entry.format, known.entry.mode),
        FileType::Symlink => true,
        _ => false,
    };
    image.get(path).is_some_and(is_of_image)
        && entry.about(path).next().is_none()
        && entry.members.of(Deed::Written, path).is_none()
}
