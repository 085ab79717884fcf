//! The containers driftd knows, and what it knows about each. Owned and changed
//! by the pipeline alone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::baseline::ImageBaseline;
use crate::budget::{self, Account, Pool, Share, Waiting};
use crate::model::{
    Blake3Hash, ChainId, Container, ContainerId, FileTime, Finding, FindingId, Kind, LayerId,
    Member, Process, ProcessIdentity, RootfsPath,
};

/// Package managers of one container whose descendants are recognised.
const MAX_PACKAGE_MANAGERS: usize = 256;

/// Everything about one container.
#[derive(Debug, Default)]
pub struct Entry {
    /// The runtime's record; a task may be seen before it.
    pub container: Option<Container>,
    /// The init process, while it runs.
    pub pid: Option<u32>,
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
    /// Its record is gone; forgotten once the last scan is over.
    pub removed: bool,
    /// Attached since the last listing began: no extra scan is due.
    pub fresh: bool,
    /// The task for which a kill was ordered already.
    pub kill_ordered_for: Option<u32>,
    pub findings: HashMap<FindingId, Finding>,
    /// What these take.
    account: Account,
    /// The findings about each path.
    by_path: HashMap<RootfsPath, Vec<FindingId>>,
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

/// Written files and executed ones are told apart: one path may be both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Deed {
    Written,
    Executed,
    /// What found no room as a finding of this kind, and is neither of the others.
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
            Kind::ExecNew | Kind::ExecScript | Kind::ExecRelocated | Kind::ExecInterpreted => {
                Deed::Executed
            }
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
    pub fn insert_finding(&mut self, finding: Finding) {
        if let Some(file) = &finding.file {
            if finding.files.is_some() {
                *self.together.entry(finding.kind).or_default() += 1;
            } else if finding.kind == Kind::FileRelocated {
                // The first of what may be many.
                let told = if file.deleted { Told::GONE } else { Told::content(file.blake3) };
                self.members.put(Deed::Written, &file.path, finding.id, told);
            } else {
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
    match finding.kind {
        Kind::FileAdded | Kind::FileModified | Kind::FileRemoved => file.path.parent(),
        kind if kind.is_exec() => finding.process.as_ref()?.own_root(),
        _ => None,
    }
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
        let (hasher, pools) = (&self.hasher, &self.pools);
        self.entries.entry(id.clone()).or_insert_with(|| {
            let mut entry = Entry {
                account: Account::new(&pools.findings),
                backlog: Waiting::new(&pools.backlogs, budget::BACKLOG),
                ..Entry::default()
            };
            entry.members.hasher = hasher.clone();
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

    pub fn remove(&mut self, id: &ContainerId) {
        self.entries.remove(id);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&ContainerId, &Entry)> {
        self.entries.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&ContainerId, &mut Entry)> {
        self.entries.iter_mut()
    }

    /// The containers a person may mean by `text`: an ID, NAMESPACE/ID, or the
    /// beginning of an ID. An exact match is the only match.
    pub fn matching(&self, text: &str) -> Vec<&ContainerId> {
        let (namespace, id) = match text.split_once('/') {
            Some((namespace, id)) => (Some(namespace), id),
            None => (None, text),
        };
        let in_namespace =
            |known: &&ContainerId| namespace.is_none_or(|namespace| *known.namespace == *namespace);
        let candidates = || self.entries.keys().filter(in_namespace);
        let exact: Vec<_> = candidates().filter(|known| *known.id == *id).collect();
        if !exact.is_empty() || id.is_empty() {
            return exact;
        }
        candidates().filter(|known| known.id.starts_with(id)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let mut inventory = Inventory::default();
        for (namespace, id) in [("default", "web"), ("default", "web2"), ("k8s.io", "web")] {
            inventory.entry(&ContainerId::new(namespace, id));
        }
        let found: Vec<String> =
            inventory.matching(text).into_iter().map(ToString::to_string).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn a_container_is_found_by_id_namespace_or_prefix() {
        check("web2", &["default/web2"]);
        check("web", &["default/web", "k8s.io/web"]);
        check("k8s.io/web", &["k8s.io/web"]);
        check("default/we", &["default/web", "default/web2"]);
        check("db", &[]);
        check("", &[]);
    }
}
