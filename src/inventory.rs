//! The containers driftd knows, and what it knows about each. Owned and changed
//! by the pipeline alone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::baseline::ImageBaseline;
use crate::budget::{self, Account, Pool, Share, Waiting};
use crate::model::finding::Subject;
use crate::model::{
    Ancestor, Blake3Hash, ChainId, Container, ContainerId, FileEvidence, FileTime, Finding,
    FindingId, Incarnation, Kind, LayerId, Member, NamedBy, Outcome, Process, ProcessIdentity,
    RootfsPath, is_linker,
};

/// Package managers of one container whose descendants are recognised.
const MAX_PACKAGE_MANAGERS: usize = 256;
/// Containers that were removed and are remembered, for what comes late of them.
const MAX_GONE: usize = 256;
/// Contents of one container that a linker has written and that are remembered as such.
const MAX_LINKED: usize = 1024;
/// Runs of one container that have ended and are remembered as such.
const MAX_ENDED: usize = 64;

/// Everything about one container.
#[derive(Debug, Default)]
pub struct Entry {
    /// The runtime's record; a task may be seen before it.
    pub container: Option<Container>,
    /// The init process, while it runs.
    pub pid: Option<u32>,
    /// The same with its start time, once that is known.
    pub init: Option<ProcessIdentity>,
    /// The init processes of runs that have ended, the newest last.
    ended: VecDeque<u32>,
    /// The container that had this ID before: what was seen of it and comes late is judged
    /// by its image.
    former: Option<Box<Former>>,
    pub baseline: BaselineState,
    /// Files of the image that start the container.
    pub entry_point: Vec<RootfsPath>,
    /// Up to when the layers on disk are known to equal the baseline.
    pub unchanged_since: Option<FileTime>,
    /// Since when there is no baseline, for whatever reasons.
    pub without_baseline: Option<Timestamp>,
    pub watch: WatchState,
    /// Whether the gate was in place before the entry point of the newest run.
    pub armed_before_start: bool,
    /// The init of the last run whose entry point ran before its marks were in place.
    pub unarmed_run: Option<u32>,
    /// Why what the next walk finds may have run unseen.
    pub unwatched: Option<&'static str>,
    /// Its record is gone; forgotten once the last scan is over.
    pub removed: bool,
    /// Attached since the last listing began: no extra scan is due.
    pub fresh: bool,
    /// What the settings have ordered for the run that there is.
    pub kill: Option<Kill>,
    /// The last kill that was carried out, until the container is seen to run again.
    pub killed: Option<Box<Killed>>,
    pub findings: HashMap<FindingId, Finding>,
    /// What these take.
    account: Account,
    /// The findings about each path.
    by_path: HashMap<RootfsPath, Vec<FindingId>>,
    /// Contents that a linker has written, and that process with nothing but its program
    /// and its parents.
    linked: HashMap<Blake3Hash, Process>,
    /// The newest package managers at work, a parent before its children.
    package_managers: VecDeque<(ProcessIdentity, Arc<Process>)>,
    /// The files that findings tell together.
    pub members: Members,
    /// How many findings tell of one file each, by kind: in a place, and anywhere.
    alone: HashMap<(Kind, Option<RootfsPath>), usize>,
    /// How many findings tell of several files, by kind.
    together: HashMap<Kind, usize>,
    /// Seen before the baseline was there.
    pub backlog: Waiting,
}

/// An automatic kill of one run. It is ordered once, and again as long as it fails.
#[derive(Debug)]
pub struct Kill {
    pub incarnation: Incarnation,
    pub kind: Kind,
    pub finding: FindingId,
    /// The order that is being carried out.
    pub ticket: Option<u64>,
    /// How often it has failed.
    pub failures: u32,
    /// When it is ordered again.
    pub due: Option<Timestamp>,
}

/// A kill that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    pub incarnation: Incarnation,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}

/// A container whose ID has been given to another one.
#[derive(Debug, Default)]
struct Former {
    ended: VecDeque<u32>,
    container: Option<Container>,
    baseline: BaselineState,
    entry_point: Vec<RootfsPath>,
}

/// Which finding tells of each file that has none of its own. A file is told by one
/// finding at a time: the newest that it was put into.
#[derive(Debug, Default)]
pub struct Members {
    /// Keyed, so that no container can choose two paths that look the same.
    hasher: RandomState,
    groups: Vec<FindingId>,
    indexes: HashMap<FindingId, u32>,
    known: HashMap<u64, (u32, Told)>,
    share: Share,
}

/// Written files and those that were run in one way or another are told apart: one path
/// may be all of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    Written,
    Counted(Kind),
}

impl Deed {
    /// What the files of an aggregated finding of this kind have in common.
    pub fn of(kind: Kind) -> Deed {
        match kind {
            Kind::FileAdded
            | Kind::FileModified
            | Kind::FileRelocated
            | Kind::FileRemoved
            | Kind::PackageTransaction => Deed::Written,
            kind => Deed::Counted(kind),
        }
    }
}

/// What was told of a member, short enough to keep many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told(u32);

impl Told {
    /// It was there, and is gone.
    pub const GONE: Told = Told(0);
    /// That it is missing is what was told.
    pub const REMOVED: Told = Told(1);
    const UNHASHED: Told = Told(2);

    pub fn content(blake3: Option<Blake3Hash>) -> Told {
        let Some(Blake3Hash([a, b, c, d, ..])) = blake3 else { return Told::UNHASHED };
        Told(u32::from_le_bytes([a, b, c, d]).max(3))
    }

    /// Of a file that a finding tells of.
    pub fn of_file(kind: Kind, file: &FileEvidence) -> Told {
        match kind {
            Kind::FileRemoved => Told::REMOVED,
            kind if file.deleted && !is_run(kind) => Told::GONE,
            _ => Told::content(file.blake3),
        }
    }

    /// Of a member as the history keeps it.
    pub fn of(member: &Member) -> Told {
        match member {
            Member { removed: true, .. } => Told::GONE,
            Member { kind: Kind::FileRemoved, .. } => Told::REMOVED,
            member => Told::content(member.blake3),
        }
    }
}

impl Members {
    fn key(&self, deed: Deed, path: &RootfsPath) -> u64 {
        self.hasher.hash_one((deed, path.as_bytes()))
    }

    /// The finding that tells of this file, and what it told last.
    pub fn of(&self, deed: Deed, path: &RootfsPath) -> Option<(FindingId, Told)> {
        let (group, told) = *self.known.get(&self.key(deed, path))?;
        Some((self.groups[group as usize], told))
    }

    /// False if there is no room for another file.
    pub fn put(&mut self, deed: Deed, path: &RootfsPath, finding: FindingId, told: Told) -> bool {
        self.put_key(self.key(deed, path), finding, told)
    }

    fn put_key(&mut self, key: u64, finding: FindingId, told: Told) -> bool {
        if !self.known.contains_key(&key) && !self.share.try_take(1) {
            return false;
        }
        let groups = &mut self.groups;
        let group = *self.indexes.entry(finding).or_insert_with(|| {
            groups.push(finding);
            u32::try_from(groups.len() - 1).expect("there are fewer findings")
        });
        self.known.insert(key, (group, told));
        true
    }
}

/// Where a container's baseline stands.
#[derive(Debug, Default)]
pub enum BaselineState {
    /// Nothing was asked yet: the runtime's record is not there.
    #[default]
    Unknown,
    Pending(ChainId),
    Ready(Arc<ImageBaseline>),
    /// Tried and failed; tried again at the next listing.
    Failed(ChainId, String),
    /// There cannot be one.
    None(String),
}

impl BaselineState {
    pub fn describe(&self) -> String {
        match self {
            BaselineState::Unknown | BaselineState::Pending(_) => "pending".into(),
            BaselineState::Ready(_) => "ready".into(),
            BaselineState::Failed(_, reason) | BaselineState::None(reason) => {
                format!("none: {reason}")
            }
        }
    }
}

/// Whether the gate watches a container.
#[derive(Debug, Default)]
pub enum WatchState {
    #[default]
    No,
    Asked,
    Attached {
        before_start: bool,
    },
    Refused(String),
}

impl Entry {
    /// A run has begun whose init has this pid.
    pub fn began(&mut self, pid: u32) {
        if self.pid == Some(pid) {
            return;
        }
        // It may have been seen, and answered, before containerd told of it.
        let kill = self.kill.take().filter(|kill| kill.incarnation.pid == pid);
        self.run_ended();
        self.kill = kill;
        self.ended.retain(|ended| *ended != pid);
        if let Some(former) = &mut self.former {
            former.ended.retain(|ended| *ended != pid);
        }
        self.pid = Some(pid);
    }

    /// The run is over; hands back its init's pid, if there was one. What was ordered for it
    /// is settled.
    pub fn run_ended(&mut self) -> Option<u32> {
        self.init = None;
        self.kill = None;
        let pid = self.pid.take()?;
        if self.ended.len() == MAX_ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(pid);
        Some(pid)
    }

    /// The run that there is, if there is one.
    pub fn incarnation(&self) -> Option<Incarnation> {
        let pid = self.pid?;
        let start_time = self.init.filter(|init| init.pid == pid).map(|init| init.start_time);
        Some(Incarnation { pid, start_time, created_at: self.created_at() })
    }

    /// The run with this init; `None` if it has ended. One that containerd has not told of
    /// yet may run: its runtime's call was seen first.
    pub fn incarnation_of(&self, init: ProcessIdentity) -> Option<Incarnation> {
        let is_there = self.pid == Some(init.pid);
        let is_over = if is_there {
            // The same number once more.
            self.init.is_some_and(|known| known.start_time > init.start_time)
        } else {
            let before = self.former.iter().flat_map(|former| &former.ended);
            self.ended.iter().chain(before).any(|ended| *ended == init.pid)
        };
        let start_time = Some(init.start_time);
        let created_at = self.created_at().filter(|_| is_there);
        (!is_over).then_some(Incarnation { pid: init.pid, start_time, created_at })
    }

    /// The name of the run with this init, whether it is there or not.
    pub fn run_of(&self, init: ProcessIdentity) -> Incarnation {
        let ProcessIdentity { pid, start_time } = init;
        Incarnation { pid, start_time: Some(start_time), created_at: self.created_at() }
    }

    fn created_at(&self) -> Option<Timestamp> {
        self.container.as_ref().and_then(|container| container.created_at)
    }

    /// Another container has this ID now, of which nothing is known yet.
    pub fn replaced(&mut self) {
        self.run_ended();
        self.killed = None;
        let before = self.former.take().map(|former| former.ended).unwrap_or_default();
        let mut ended: VecDeque<u32> = before.into_iter().chain(self.ended.drain(..)).collect();
        ended.drain(..ended.len().saturating_sub(MAX_ENDED));
        self.former = Some(Box::new(Former {
            ended,
            container: self.container.take(),
            baseline: std::mem::take(&mut self.baseline),
            entry_point: std::mem::take(&mut self.entry_point),
        }));
        self.unchanged_since = None;
        self.without_baseline = None;
    }

    /// Whether no later run has begun than the one with this init, which may be over.
    pub fn is_newest_run(&self, pid: u32) -> bool {
        self.pid.or(self.ended.back().copied()) == Some(pid)
    }

    /// Whether a run with this init was one of the container that had this ID before.
    pub fn is_of_former(&self, init: ProcessIdentity) -> bool {
        self.pid != Some(init.pid)
            && self.former.as_ref().is_some_and(|former| former.ended.contains(&init.pid))
    }

    pub fn has_former(&self) -> bool {
        self.former.is_some()
    }

    /// Puts the container that had this ID before in the place of the one that has it now,
    /// and the other way round.
    pub fn swap_with_former(&mut self) {
        if let Some(former) = &mut self.former {
            std::mem::swap(&mut former.container, &mut self.container);
            std::mem::swap(&mut former.baseline, &mut self.baseline);
            std::mem::swap(&mut former.entry_point, &mut self.entry_point);
        }
    }

    pub fn insert_finding(&mut self, finding: Finding) {
        if let Some(file) = &finding.file {
            if finding.files.is_some() {
                *self.together.entry(finding.kind).or_default() += 1;
            } else {
                if !is_of_one_file(&finding, file) {
                    // The first of what may be many.
                    let told = Told::of_file(finding.kind, file);
                    self.members.put(Deed::of(finding.kind), &file.path, finding.id, told);
                }
                if let Some(place) = place_of(&finding) {
                    *self.alone.entry((finding.kind, Some(place))).or_default() += 1;
                }
                *self.alone.entry((finding.kind, None)).or_default() += 1;
            }
            let ids = self.by_path.entry(file.path.clone()).or_default();
            if !ids.contains(&finding.id) {
                ids.push(finding.id);
            }
        }
        if finding.kind == Kind::FileAdded
            && finding.files.is_none()
            && let (Some(file), Some(writer)) = (&finding.file, &finding.process)
            && let Some(content) = file.blake3
        {
            self.remember_linked(content, writer);
        }
        if finding.kind == Kind::PackageTransaction
            && let Some(process) = &finding.process
        {
            self.remember_package_manager(Arc::new(process.clone()));
        }
        let (kind, severity, bytes) = (finding.kind, finding.severity, budget::weight(&finding));
        if self.findings.insert(finding.id, finding).is_none() {
            self.account.keep(kind, severity, bytes);
        }
    }

    /// Whoever descends from a known one belongs to that.
    pub fn remember_package_manager(&mut self, process: Arc<Process>) {
        if self.package_manager_of(&process).is_some() {
            return;
        }
        if self.package_managers.len() == MAX_PACKAGE_MANAGERS {
            self.package_managers.pop_front();
        }
        self.package_managers.push_back((process.identity, process));
    }

    /// The package manager that this process is or descends from: the outermost.
    pub fn package_manager_of(&self, process: &Process) -> Option<&Arc<Process>> {
        let mut known = self.package_managers.iter();
        known.find(|(identity, _)| process.descends_from(*identity)).map(|(_, process)| process)
    }

    /// How many findings of this kind tell of one file each in this place; anywhere,
    /// for `None`.
    pub fn alone(&self, kind: Kind, place: Option<&RootfsPath>) -> usize {
        self.alone.get(&(kind, place.cloned())).copied().unwrap_or_default()
    }

    /// How many findings of this kind tell of several files.
    pub fn together(&self, kind: Kind) -> usize {
        self.together.get(&kind).copied().unwrap_or_default()
    }

    /// Whether this finding may be kept as one of its own.
    pub fn has_room_for(&self, finding: &Finding) -> bool {
        self.account.has_room(finding.kind, finding.severity, budget::weight(finding))
    }

    /// A finding found no room: it is counted in another one.
    pub fn fold(&mut self) {
        self.account.fold();
    }

    /// How many sightings found no room for findings of their own.
    pub fn folded(&self) -> u64 {
        self.account.folded()
    }

    /// The findings about `path`, of any content.
    pub fn about(&self, path: &RootfsPath) -> impl Iterator<Item = &Finding> {
        self.by_path.get(path).into_iter().flatten().filter_map(|id| self.findings.get(id))
    }

    /// The findings about exactly this content at `path`.
    pub fn about_content(
        &self,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
    ) -> impl Iterator<Item = &Finding> {
        self.about(path)
            .filter(move |finding| finding.file.as_ref().is_some_and(|file| file.blake3 == content))
    }

    /// What a linker has written is known again by its content, wherever it lies.
    pub fn remember_linked(&mut self, content: Blake3Hash, writer: &Process) {
        if self.linked.len() < MAX_LINKED && writer.exe.as_deref().is_some_and(is_linker) {
            let ancestors = writer.ancestors.iter();
            let ancestors = ancestors.map(|one| Ancestor { argv: None, ..one.clone() }).collect();
            let writer = Process { argv: None, ancestors, ..writer.clone() };
            self.linked.insert(content, writer);
        }
    }

    /// The linker that has written this content, wherever it lies by now.
    pub fn linked(&self, content: Blake3Hash) -> Option<&Process> {
        self.linked.get(&content)
    }

    /// Whether this socket of containerd has the container.
    pub fn belongs_to(&self, endpoint: &str) -> bool {
        self.container.as_ref().is_some_and(|container| *container.endpoint == *endpoint)
    }

    pub fn chain_id(&self) -> Option<ChainId> {
        self.container.as_ref().and_then(Container::chain_id)
    }

    /// Whether the container uses `layer` from one of these directories; any
    /// directory will do if there are none.
    pub fn has_layer(&self, layer: LayerId, directories: &[PathBuf]) -> bool {
        let is_there = |directory: &Option<PathBuf>| {
            directories.is_empty()
                || directory.as_ref().is_some_and(|own| directories.contains(own))
        };
        let container = self.container.as_ref().filter(|_| !self.removed);
        container.is_some_and(|container| {
            container.layers.iter().any(|own| own.id == layer && is_there(&own.directory))
        })
    }

    pub fn is_attached(&self) -> bool {
        matches!(self.watch, WatchState::Attached { .. })
    }
}

/// Where a finding's file is one of many: its directory or, for what is executed,
/// the root directory that its process has of its own.
fn place_of(finding: &Finding) -> Option<RootfsPath> {
    let file = finding.file.as_ref()?;
    let own_root = finding.process.as_ref().and_then(Process::own_root);
    match finding.kind {
        Kind::FileAdded | Kind::FileModified | Kind::FileRemoved | Kind::FilePrivileged => {
            file.path.parent()
        }
        Kind::ExecInterpreted => own_root.or_else(|| file.path.parent()),
        kind if kind.is_exec() => own_root,
        _ => None,
    }
}

/// Whether files of this kind were run in one way or another.
fn is_run(kind: Kind) -> bool {
    kind.is_exec() || kind == Kind::LibraryLoaded
}

/// Whether this can never become a finding of several files.
fn is_of_one_file(finding: &Finding, file: &FileEvidence) -> bool {
    let subject = Subject::File { path: &file.path, content: file.blake3 };
    FindingId::new(finding.container_id(), finding.kind, &subject) == finding.id
}

/// All containers.
#[derive(Debug)]
pub struct Inventory {
    entries: BTreeMap<ContainerId, Entry>,
    pools: Pools,
    /// The files that remembered findings tell together.
    remembered_members: HashMap<FindingId, Vec<(u64, Told)>>,
    /// What the files of remembered findings have in common.
    deeds: HashMap<FindingId, Deed>,
    /// Reads what is remembered as every entry's `Members` do.
    hasher: RandomState,
    /// What the history tells of containers that have not shown up yet.
    remembered: HashMap<ContainerId, Vec<Finding>>,
    /// Everything that runs has shown up: what the history tells of others is over.
    is_whole: bool,
    /// Containers that were removed, the newest last.
    gone: VecDeque<(ContainerId, Box<Former>)>,
    /// Findings about layers on disk, without a container.
    pub of_layers: HashMap<FindingId, Finding>,
}

/// What the containers share.
#[derive(Debug)]
struct Pools {
    findings: Arc<Pool>,
    members: Arc<Pool>,
    backlogs: Arc<Pool>,
}

impl Default for Inventory {
    fn default() -> Inventory {
        Inventory {
            entries: BTreeMap::new(),
            pools: Pools {
                findings: Pool::new(budget::ALL_FINDINGS),
                members: Pool::new(budget::ALL_MEMBERS),
                backlogs: Pool::new(budget::ALL_BACKLOGS),
            },
            remembered_members: HashMap::new(),
            deeds: HashMap::new(),
            hasher: RandomState::new(),
            remembered: HashMap::new(),
            gone: VecDeque::new(),
            is_whole: false,
            of_layers: HashMap::new(),
        }
    }
}

impl Inventory {
    /// Starts with what was told before the daemon was restarted.
    pub fn with_history(findings: Vec<Finding>) -> Inventory {
        let mut inventory = Inventory::default();
        inventory.remember(findings);
        inventory
    }

    /// Whether what the history tells of a container is asked for: it is new here, and
    /// may have run before.
    pub fn may_remember(&self, id: &ContainerId) -> bool {
        !self.is_whole && !self.entries.contains_key(id)
    }

    /// Takes in what the history tells.
    pub fn remember(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            if finding.files.is_some() {
                self.deeds.insert(finding.id, Deed::of(finding.kind));
            }
            match finding.container_id().cloned() {
                Some(container) => {
                    self.remembered.entry(container).or_default().push(finding);
                }
                None => {
                    self.of_layers.insert(finding.id, finding);
                }
            }
        }
    }

    pub fn get(&self, id: &ContainerId) -> Option<&Entry> {
        self.entries.get(id)
    }

    pub fn get_mut(&mut self, id: &ContainerId) -> Option<&mut Entry> {
        self.entries.get_mut(id)
    }

    /// The entry of a container; a new one remembers what the history knows.
    pub fn entry(&mut self, id: &ContainerId) -> &mut Entry {
        let remembered = &mut self.remembered;
        let members = &mut self.remembered_members;
        let (hasher, pools, gone) = (&self.hasher, &self.pools, &mut self.gone);
        self.entries.entry(id.clone()).or_insert_with(|| {
            let mut entry = Entry {
                account: Account::new(&pools.findings),
                backlog: Waiting::new(&pools.backlogs, budget::BACKLOG),
                ..Entry::default()
            };
            entry.members.hasher = hasher.clone();
            let before = gone.iter().rposition(|(gone, _)| gone == id);
            entry.former = before.and_then(|index| gone.remove(index)).map(|(_, former)| former);
            entry.members.share = pools.members.share(budget::MEMBERS);
            let mut findings = remembered.remove(id).unwrap_or_default();
            // If the history has more than fits, the worst and the newest are known.
            findings.sort_by_key(|finding| {
                let is_group = finding.files.is_some();
                std::cmp::Reverse((is_group, finding.severity, finding.last_seen))
            });
            for finding in findings {
                if !entry.has_room_for(&finding) {
                    continue;
                }
                for (key, told) in members.remove(&finding.id).unwrap_or_default() {
                    entry.members.put_key(key, finding.id, told);
                }
                entry.insert_finding(finding);
            }
            entry
        })
    }

    /// What the history tells of one file of a finding that is remembered.
    pub fn remember_member(&mut self, finding: FindingId, member: &Member) {
        // Without its finding it is nothing.
        let Some(&deed) = self.deeds.get(&finding) else { return };
        let key = self.hasher.hash_one((deed, member.path.as_bytes()));
        self.remembered_members.entry(finding).or_default().push((key, Told::of(member)));
    }

    /// Everything that runs has shown up: what is remembered of others is history.
    pub fn forget_remembered(&mut self) {
        self.is_whole = true;
        self.remembered = HashMap::new();
        self.remembered_members = HashMap::new();
        self.deeds = HashMap::new();
    }

    /// What is seen of it and comes later still is of the [`Former`] owner of its ID.
    pub fn remove(&mut self, id: &ContainerId) {
        let Some(mut entry) = self.entries.remove(id) else { return };
        entry.replaced();
        if let Some(former) = entry.former {
            if self.gone.len() == MAX_GONE {
                self.gone.pop_front();
            }
            self.gone.push_back((id.clone(), former));
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ContainerId, &Entry)> {
        self.entries.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&ContainerId, &mut Entry)> {
        self.entries.iter_mut()
    }

    /// The containers that a person names by `text`; see [`ContainerId::named_by`]. A
    /// whole ID is never the beginning of another one.
    pub fn named(&self, text: &str) -> Vec<&ContainerId> {
        let by = |how| self.entries.keys().filter(move |id| id.named_by(text) == Some(how));
        let whole: Vec<_> = by(NamedBy::WholeId).collect();
        if whole.is_empty() { by(NamedBy::FirstDigits).collect() } else { whole }
    }

    /// Those whose ID begins with `text`, which does not name them.
    pub fn beginning_with(&self, text: &str) -> impl Iterator<Item = &ContainerId> {
        let id = text.split_once('/').map_or(text, |(_, id)| id);
        self.entries.keys().filter(move |known| !id.is_empty() && known.id.starts_with(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATED: &str = "4f2a90cc1b7de3054f2a90cc1b7de3054f2a90cc1b7de3054f2a90cc1b7de305";
    const OTHER: &str = "4f2a90cc0000000000000000000000000000000000000000000000000000ffff";

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let mut inventory = Inventory::default();
        for (namespace, id) in [
            ("default", "web"),
            ("default", "web2"),
            ("k8s.io", "web"),
            ("k8s.io", GENERATED),
            ("moby", OTHER),
        ] {
            inventory.entry(&ContainerId::new(namespace, id));
        }
        let found: Vec<&str> = inventory.named(text).into_iter().map(|id| &*id.id).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn u19_a_container_is_found_by_what_names_it_and_by_nothing_else() {
        check("web2", &["web2"]);
        check("web", &["web", "web"]);
        check("k8s.io/web", &["web"]);
        check("default/we", &[]);
        check("we", &[]);
        check("db", &[]);
        check("", &[]);
        check(GENERATED, &[GENERATED]);
        check("4f2a90cc1b", &[GENERATED]);
        check("4f2a90cc", &[GENERATED, OTHER]);
        check("moby/4f2a90cc", &[OTHER]);
        check("4f2a90c", &[]);
    }

    fn init(pid: u32, start_time: u64) -> ProcessIdentity {
        ProcessIdentity { pid, start_time }
    }

    #[test]
    fn x11_a_run_that_has_ended_is_never_taken_for_a_later_one() {
        let mut entry = Entry::default();
        let runs = |entry: &Entry, one| entry.incarnation_of(one).is_some();
        assert!(runs(&entry, init(7, 100)), "armed, and containerd has not told of it yet");
        entry.began(7);
        assert!(runs(&entry, init(7, 100)));
        entry.init = Some(init(7, 100));
        assert!(entry.run_ended().is_some());
        assert!(entry.run_ended().is_none() && !runs(&entry, init(7, 100)));
        entry.began(8);
        assert!(!runs(&entry, init(7, 100)) && runs(&entry, init(8, 200)));
        assert!(runs(&entry, init(9, 300)), "the next one");
        // The same number once more, for a process of its own.
        entry.began(7);
        entry.init = Some(init(7, 400));
        assert!(!runs(&entry, init(8, 200)));
        assert!(!runs(&entry, init(7, 100)) && runs(&entry, init(7, 400)));
        // Another container of the same ID.
        entry.replaced();
        entry.began(10);
        assert!(!runs(&entry, init(7, 400)) && !runs(&entry, init(8, 200)));
        assert!(entry.is_of_former(init(7, 400)) && !entry.is_of_former(init(10, 500)));
        assert_eq!(entry.incarnation().map(|run| (run.pid, run.start_time)), Some((10, None)));
    }
}
