//! The containers driftd knows, and what it knows about each. Owned and changed
//! by the pipeline alone.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::baseline::ImageBaseline;
use crate::model::{
    Blake3Hash, ChainId, Container, ContainerId, FileTime, Finding, FindingId, Kind, LayerId,
    Observation, ProcessIdentity, RootfsPath,
};

/// Findings of one container that are kept in memory.
pub const MAX_FINDINGS: usize = 32 * 1024;
const MAX_SESSIONS: usize = 1024;

/// Everything about one container.
#[derive(Debug, Default)]
pub struct Entry {
    /// The runtime's record; a task may be seen before it.
    pub container: Option<Container>,
    /// The init process, while it runs.
    pub pid: Option<u32>,
    pub baseline: BaselineState,
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
    /// The findings about each path.
    by_path: HashMap<RootfsPath, Vec<FindingId>>,
    /// The newest session roots and their findings.
    sessions: VecDeque<(ProcessIdentity, FindingId)>,
    /// Seen before the baseline was there.
    pub backlog: VecDeque<Observation>,
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
            let ids = self.by_path.entry(file.path.clone()).or_default();
            if !ids.contains(&finding.id) {
                ids.push(finding.id);
            }
        }
        if matches!(finding.kind, Kind::SessionInteractive | Kind::SessionExec)
            && let Some(process) = &finding.process
        {
            self.remember_session(process.identity, finding.id);
        }
        self.findings.insert(finding.id, finding);
    }

    /// A container that is probed every second has as many sessions; which drift
    /// belongs to one is asked while it is young.
    pub fn remember_session(&mut self, root: ProcessIdentity, finding: FindingId) {
        if self.sessions.len() == MAX_SESSIONS {
            self.sessions.pop_front();
        }
        self.sessions.push_back((root, finding));
    }

    /// The finding of the session whose root is `root`.
    pub fn session(&self, root: ProcessIdentity) -> Option<FindingId> {
        self.session_where(|known| known == root)
    }

    /// The newest session for whose root `belongs` says yes.
    pub fn session_where(&self, belongs: impl Fn(ProcessIdentity) -> bool) -> Option<FindingId> {
        self.sessions.iter().rev().find(|(root, _)| belongs(*root)).map(|(_, finding)| *finding)
    }

    /// Whether another finding of this kind may be kept. A container can make new
    /// programs faster than anybody can read of them, and must not fill the
    /// daemon's memory; what was run has more room than what only lies there.
    pub fn has_room_for(&self, kind: Kind) -> bool {
        self.findings.len() < if kind.is_exec() { MAX_FINDINGS } else { MAX_FINDINGS / 2 }
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

/// All containers.
#[derive(Debug, Default)]
pub struct Inventory {
    entries: BTreeMap<ContainerId, Entry>,
    /// What the history tells of containers that have not shown up yet.
    remembered: HashMap<ContainerId, Vec<Finding>>,
    /// Findings about layers on disk, without a container.
    pub of_layers: HashMap<FindingId, Finding>,
}

impl Inventory {
    /// Starts with what was told before the daemon was restarted.
    pub fn with_history(findings: Vec<Finding>) -> Inventory {
        let mut inventory = Inventory::default();
        for finding in findings {
            match finding.container_id().cloned() {
                Some(container) => {
                    inventory.remembered.entry(container).or_default().push(finding);
                }
                None => {
                    inventory.of_layers.insert(finding.id, finding);
                }
            }
        }
        inventory
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
        self.entries.entry(id.clone()).or_insert_with(|| {
            let mut entry = Entry::default();
            for finding in remembered.remove(id).unwrap_or_default() {
                entry.insert_finding(finding);
            }
            entry
        })
    }

    /// Everything that runs has shown up: what is remembered of others is history.
    pub fn forget_remembered(&mut self) {
        self.remembered = HashMap::new();
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
