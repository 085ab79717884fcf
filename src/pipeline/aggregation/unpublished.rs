//! What is new in aggregated findings and not published yet. It bounds how much waits and how
//! long; `put` fills and empties it.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use crate::history::MemberChange;
use crate::model::{ContainerId, FindingId};

/// How long a file of an aggregated finding waits to be published, if it is not the first.
const PUBLISHED_WITHIN: SignedDuration = SignedDuration::from_secs(1);
/// How many files may wait.
const MAX_WAITING: usize = 2048;

#[derive(Debug, Default)]
pub(in crate::pipeline) struct Unpublished {
    changes: BTreeMap<(ContainerId, FindingId), Vec<MemberChange>>,
    waiting: usize,
    since: Option<Timestamp>,
}

impl Unpublished {
    /// A finding has changed and, unless it is `None`, one of its files.
    pub(in crate::pipeline) fn push(
        &mut self,
        container: &ContainerId,
        finding: FindingId,
        change: Option<MemberChange>,
        now: Timestamp,
    ) {
        let changes = self.changes.entry((container.clone(), finding)).or_default();
        self.waiting += usize::from(change.is_some());
        changes.extend(change);
        self.since.get_or_insert(now);
    }

    /// The changes of one finding, if there are any. They are published now.
    pub(super) fn take(
        &mut self,
        container: &ContainerId,
        finding: FindingId,
    ) -> Option<Vec<MemberChange>> {
        let changes = self.changes.remove(&(container.clone(), finding))?;
        self.waiting -= changes.len();
        Some(changes)
    }

    /// The findings that have changed. All of them are published now.
    pub(super) fn findings(&mut self) -> Vec<(ContainerId, FindingId)> {
        self.since = None;
        self.changes.keys().cloned().collect()
    }

    pub(super) fn is_full(&self) -> bool {
        self.waiting >= MAX_WAITING
    }

    pub(in crate::pipeline) fn due(&self) -> Option<Timestamp> {
        self.since.map(|since| since.saturating_add(PUBLISHED_WITHIN).unwrap_or(Timestamp::MAX))
    }
}
