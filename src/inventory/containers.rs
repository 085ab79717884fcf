//! All containers, what the history knows of containers that have not appeared yet, and what
//! is left of those that were removed. The only way to an entry.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::RandomState;
use std::sync::Arc;

use super::entry::{Entry, Former};
use super::findings::Findings;
use super::members::{self, Aspect, Members, Reported};
use crate::budget::{self, Pool, Waiting};
use crate::model::{ContainerId, Finding, FindingId, Member, NamedBy};

/// Containers that were removed and are remembered, for late observations of them.
const MAX_GONE: usize = 256;

#[derive(Debug)]
pub struct Inventory {
    entries: BTreeMap<ContainerId, Entry>,
    pools: Pools,
    /// Hashes the paths of every entry's members.
    hasher: RandomState,
    remembered: Remembered,
    /// Everything that runs has appeared: what the history has of others is over.
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

/// What the history has of containers that have not appeared yet.
#[derive(Debug, Default)]
struct Remembered {
    findings: HashMap<ContainerId, Vec<Finding>>,
    /// The members of aggregated findings.
    members: HashMap<FindingId, Vec<(u64, Reported)>>,
    /// What the files of aggregated findings have in common.
    aspects: HashMap<FindingId, Aspect>,
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
            hasher: RandomState::new(),
            remembered: Remembered::default(),
            is_whole: false,
            gone: VecDeque::new(),
            of_layers: HashMap::new(),
        }
    }
}

impl Inventory {
    /// Starts with the findings from before the daemon was restarted.
    pub fn with_history(findings: Vec<Finding>) -> Inventory {
        let mut inventory = Inventory::default();
        inventory.remember(findings);
        inventory
    }

    /// Whether the history is to be read for a container: it is new here, and may have run
    /// before.
    pub fn may_remember(&self, id: &ContainerId) -> bool {
        !self.is_whole && !self.entries.contains_key(id)
    }

    /// Takes in findings of the history.
    pub fn remember(&mut self, findings: Vec<Finding>) {
        for finding in findings {
            if finding.files.is_some() {
                self.remembered.aspects.insert(finding.id, Aspect::of_finding(&finding));
            }
            match finding.container_id().cloned() {
                Some(container) => {
                    self.remembered.findings.entry(container).or_default().push(finding);
                }
                None => {
                    self.of_layers.insert(finding.id, finding);
                }
            }
        }
    }

    /// Takes in one member of a remembered finding.
    pub fn remember_member(&mut self, finding: FindingId, member: &Member) {
        // Without its finding it is nothing.
        let Some(&aspect) = self.remembered.aspects.get(&finding) else { return };
        let key = members::key(&self.hasher, aspect, &member.path);
        let known = self.remembered.members.entry(finding).or_default();
        known.push((key, Reported::of_member(member)));
    }

    /// Everything that runs has appeared: what is remembered of others is history.
    pub fn forget_remembered(&mut self) {
        self.is_whole = true;
        self.remembered = Remembered::default();
    }

    pub fn get(&self, id: &ContainerId) -> Option<&Entry> {
        self.entries.get(id)
    }

    pub fn get_mut(&mut self, id: &ContainerId) -> Option<&mut Entry> {
        self.entries.get_mut(id)
    }

    /// The entry of a container. A new one begins with what the history knows.
    pub fn entry(&mut self, id: &ContainerId) -> &mut Entry {
        let remembered = &mut self.remembered;
        let (hasher, pools, gone) = (&self.hasher, &self.pools, &mut self.gone);
        self.entries.entry(id.clone()).or_insert_with(|| {
            let before = gone.iter().rposition(|(gone, _)| gone == id);
            let share = pools.members.share(budget::MEMBERS);
            let mut entry = Entry {
                former: before.and_then(|index| gone.remove(index)).map(|(_, former)| former),
                findings: Findings::new(&pools.findings),
                members: Members::new(hasher.clone(), share),
                backlog: Waiting::new(&pools.backlogs, budget::BACKLOG),
                ..Entry::default()
            };
            let mut findings = remembered.findings.remove(id).unwrap_or_default();
            // If the history has more than fits, the worst and the newest are kept.
            findings.sort_by_key(|finding| {
                let is_group = finding.files.is_some();
                std::cmp::Reverse((is_group, finding.severity, finding.last_seen))
            });
            for finding in findings {
                if !entry.findings.has_room_for(&finding) {
                    continue;
                }
                for (key, reported) in remembered.members.remove(&finding.id).unwrap_or_default() {
                    entry.members.put_key(key, finding.id, reported);
                }
                entry.insert_finding(finding);
            }
            entry
        })
    }

    /// Removes a container. Observations of it that still arrive belong to the [`Former`]
    /// owner of its ID.
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

    /// The containers that a user names by `text`; see [`ContainerId::named_by`]. A whole
    /// ID is never the beginning of another one.
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
}
