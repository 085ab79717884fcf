//! From when to when something was not seen: opened by a loss, closed when the
//! walk that makes up for it is complete.

use std::collections::{HashSet, VecDeque};

use jiff::Timestamp;

use crate::health::Failure;
use crate::model::ContainerId;

/// Gaps that are open at a time; what comes then widens one of them.
const MAX_OPEN: usize = 256;
/// Closed gaps that `status` remembers. The history has them all.
const MAX_CLOSED: usize = 64;

/// A time in which the view was incomplete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gap {
    pub failure: Failure,
    /// `None`: any container may be concerned.
    pub container: Option<ContainerId>,
    pub detail: String,
    pub since: Timestamp,
    /// `None`: it still is.
    pub until: Option<Timestamp>,
}

#[derive(Debug)]
struct Open {
    gap: Gap,
    /// Walks that began before this make up for nothing.
    last: Timestamp,
    /// Containers of which a complete walk is still to come.
    unwalked: HashSet<ContainerId>,
}

#[derive(Debug, Default)]
pub(super) struct Gaps {
    open: Vec<Open>,
    closed: VecDeque<Gap>,
}

impl Gaps {
    /// Something was not seen in `awaited`. Says whether that is news.
    pub(super) fn opened(&mut self, gap: Gap, awaited: HashSet<ContainerId>) -> bool {
        let is_full = self.open.len() >= MAX_OPEN;
        let same = self.open.iter_mut().find(|open| {
            open.gap.failure == gap.failure && (is_full || open.gap.container == gap.container)
        });
        match same {
            Some(open) => {
                open.last = open.last.max(gap.since);
                open.gap.since = open.gap.since.min(gap.since);
                if open.gap.container != gap.container {
                    open.gap.container = None;
                }
                open.unwalked.extend(awaited);
                false
            }
            None if awaited.is_empty() => {
                let until = Some(gap.since);
                self.remember(Gap { until, ..gap });
                false
            }
            None => {
                self.open.push(Open { last: gap.since, gap, unwalked: awaited });
                true
            }
        }
    }

    /// A walk of a container that began at `began` is complete. Hands back the gaps
    /// that it closes.
    pub(super) fn walked(
        &mut self,
        container: &ContainerId,
        began: Timestamp,
        now: Timestamp,
    ) -> Vec<Gap> {
        for open in self.open.iter_mut().filter(|open| began >= open.last) {
            open.unwalked.remove(container);
        }
        self.close(now)
    }

    /// A container has gone: of it nothing will be seen any more.
    pub(super) fn gone(&mut self, container: &ContainerId, now: Timestamp) -> Vec<Gap> {
        for open in &mut self.open {
            open.unwalked.remove(container);
        }
        self.close(now)
    }

    fn close(&mut self, now: Timestamp) -> Vec<Gap> {
        let is_over = |open: &mut Open| open.unwalked.is_empty();
        let closed: Vec<Gap> = self
            .open
            .extract_if(.., is_over)
            .map(|open| Gap { until: Some(now), ..open.gap })
            .collect();
        for gap in &closed {
            self.remember(gap.clone());
        }
        closed
    }

    fn remember(&mut self, gap: Gap) {
        if self.closed.len() >= MAX_CLOSED {
            self.closed.pop_front();
        }
        self.closed.push_back(gap);
    }

    /// Those that are open.
    pub(super) fn open(&self) -> impl Iterator<Item = &Gap> {
        self.open.iter().map(|open| &open.gap)
    }

    /// Those that are open, and then the others, newest first.
    pub(super) fn all(&self) -> Vec<Gap> {
        self.open().chain(self.closed.iter().rev()).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn id(name: &str) -> ContainerId {
        ContainerId::new("n", name)
    }

    fn gap(container: Option<&str>, since: i64) -> Gap {
        Gap {
            failure: Failure::PipelineFull,
            container: container.map(id),
            detail: "full".into(),
            since: at(since),
            until: None,
        }
    }

    fn awaited(names: &[&str]) -> HashSet<ContainerId> {
        names.iter().map(|name| id(name)).collect()
    }

    #[test]
    fn a_gap_ends_with_a_walk_that_began_after_the_last_loss() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(Some("a"), 10), awaited(&["a"])));
        assert!(!gaps.opened(gap(Some("a"), 20), awaited(&["a"])));
        assert_eq!(gaps.walked(&id("a"), at(15), at(16)), []);
        assert_eq!(gaps.walked(&id("b"), at(25), at(26)), []);
        let closed = Gap { until: Some(at(27)), ..gap(Some("a"), 10) };
        assert_eq!(gaps.walked(&id("a"), at(25), at(27)), std::slice::from_ref(&closed));
        assert_eq!(gaps.all(), [closed]);
        assert_eq!(gaps.open().count(), 0);
    }

    #[test]
    fn a_gap_of_all_ends_when_each_was_walked_or_has_gone() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(None, 10), awaited(&["a", "b"])));
        assert_eq!(gaps.walked(&id("a"), at(11), at(12)), []);
        assert_eq!(gaps.gone(&id("b"), at(13)), [Gap { until: Some(at(13)), ..gap(None, 10) }]);
        // There is nothing that could be walked.
        assert!(!gaps.opened(gap(None, 20), awaited(&[])));
        assert_eq!(gaps.all()[0], Gap { until: Some(at(20)), ..gap(None, 20) });
    }

    #[test]
    fn gaps_are_bounded() {
        let mut gaps = Gaps::default();
        for number in 0..1000 {
            let name = number.to_string();
            gaps.opened(gap(Some(&name), number), awaited(&[&name]));
        }
        assert_eq!(gaps.open.len(), MAX_OPEN);
        for number in 0..1000 {
            gaps.gone(&id(&number.to_string()), at(2000));
        }
        assert_eq!((gaps.open.len(), gaps.closed.len()), (0, MAX_CLOSED));
    }
}
