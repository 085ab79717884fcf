//! The findings about one container, found by ID, by path and by kind, and the room that they
//! take. It makes and changes no finding: the pipeline does.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::budget::{self, Account, Pool};
use crate::model::finding::Subject;
use crate::model::{
    Blake3Hash, FileEvidence, Finding, FindingId, Kind, Process, RootfsPath, Severity,
};

#[derive(Debug, Default)]
pub struct Findings {
    by_id: HashMap<FindingId, Finding>,
    by_path: HashMap<RootfsPath, Vec<FindingId>>,
    /// How many findings are about one file each: by kind, in a place and anywhere.
    single: HashMap<(Kind, Option<RootfsPath>), usize>,
    /// How many findings are about several files, by kind.
    aggregated: HashMap<Kind, usize>,
    /// How many are accepted by exceptions.
    accepted: usize,
    account: Account,
}

impl Findings {
    pub(super) fn new(pool: &Arc<Pool>) -> Findings {
        Findings { account: Account::new(pool), ..Findings::default() }
    }

    pub fn get(&self, id: &FindingId) -> Option<&Finding> {
        self.by_id.get(id)
    }

    pub fn get_mut(&mut self, id: &FindingId) -> Option<&mut Finding> {
        self.by_id.get_mut(id)
    }

    pub fn contains(&self, id: &FindingId) -> bool {
        self.by_id.contains_key(id)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Finding> {
        self.by_id.values()
    }

    /// Whether any is accepted by an exception.
    pub fn has_accepted(&self) -> bool {
        self.accepted > 0
    }

    /// How many are reported.
    pub fn reported(&self) -> usize {
        self.by_id.len() - self.accepted
    }

    /// The severities of those that are reported, and how many have each.
    pub fn by_severity(&self) -> BTreeMap<Severity, u64> {
        let mut counts = BTreeMap::new();
        for finding in self.iter().filter(|finding| !finding.verdict.is_accept()) {
            *counts.entry(finding.severity).or_default() += 1;
        }
        counts
    }

    /// Forgets findings, and not the room that they take.
    #[cfg(test)]
    pub fn retain(&mut self, keep: impl Fn(&Finding) -> bool) {
        self.by_id.retain(|_, finding| keep(finding));
    }

    pub(super) fn insert(&mut self, finding: Finding) {
        let is_accepted = finding.verdict.is_accept();
        // What is accepted stands apart: it explains nothing that is reported, and hides
        // nothing.
        if let Some(file) = finding.file.as_ref().filter(|_| !is_accepted) {
            if finding.files.is_some() {
                *self.aggregated.entry(finding.kind).or_default() += 1;
            } else {
                if let Some(place) = place_of(&finding) {
                    *self.single.entry((finding.kind, Some(place))).or_default() += 1;
                }
                *self.single.entry((finding.kind, None)).or_default() += 1;
            }
            let ids = self.by_path.entry(file.path.clone()).or_default();
            if !ids.contains(&finding.id) {
                ids.push(finding.id);
            }
        }
        let (kind, severity, bytes) = (finding.kind, finding.severity, budget::weight(&finding));
        if self.by_id.insert(finding.id, finding).is_none() {
            self.accepted += usize::from(is_accepted);
            self.account.keep(kind, severity, bytes);
        }
    }

    /// How many findings of this kind are about one file each in this place; anywhere, for
    /// `None`.
    pub fn single(&self, kind: Kind, place: Option<&RootfsPath>) -> usize {
        self.single.get(&(kind, place.cloned())).copied().unwrap_or_default()
    }

    /// How many findings of this kind are about several files.
    pub fn aggregated(&self, kind: Kind) -> usize {
        self.aggregated.get(&kind).copied().unwrap_or_default()
    }

    /// Whether this finding may be kept as one of its own.
    pub fn has_room_for(&self, finding: &Finding) -> bool {
        self.account.has_room(finding.kind, finding.severity, budget::weight(finding))
    }

    /// A finding has no room: another one counts it.
    pub fn fold(&mut self) {
        self.account.fold();
    }

    /// How many sightings had no room for findings of their own.
    pub fn folded(&self) -> u64 {
        self.account.folded()
    }

    /// The findings about `path`, of any content.
    pub fn about(&self, path: &RootfsPath) -> impl Iterator<Item = &Finding> {
        self.by_path.get(path).into_iter().flatten().filter_map(|id| self.by_id.get(id))
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
}

/// The place in which the file of a finding is one of many: its directory or, for executed
/// files, the root directory that their process has of its own.
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

/// Whether this can never become a finding about several files.
pub(super) fn is_of_one_file(finding: &Finding, file: &FileEvidence) -> bool {
    let subject = Subject::File { path: &file.path, content: file.blake3 };
    FindingId::new(finding.container_id(), finding.kind, &subject) == finding.id
}
