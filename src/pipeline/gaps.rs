//! The times in which something was not seen. A loss opens a gap; the gap closes when its
//! cause is over or a scan has made up for it. Pure, and bounded: `losses` decides what a gap
//! lasts for, and records it.

use std::collections::{HashSet, VecDeque};

use jiff::{SignedDuration, Timestamp};

use crate::health::Failure;
use crate::history::Record;
use crate::model::ContainerId;

/// Gaps that are open at a time. A further loss widens one of them.
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
    /// `None`: it still is. The time may be over while a scan still has to find what was not
    /// seen in it.
    pub until: Option<Timestamp>,
}

impl Gap {
    pub(super) fn into_record(self) -> Record {
        Record::Gap {
            name: self.failure.name().to_owned(),
            container: self.container,
            detail: self.detail,
            at: self.since,
            until: self.until,
        }
    }
}

/// How long a gap stays open after the last loss, if nothing makes up for it.
const QUIET: SignedDuration = SignedDuration::from_secs(60);

/// What a gap lasts for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until each of these containers was scanned completely, by a scan that began after the
    /// loss.
    Scanned(HashSet<ContainerId>),
    /// The same, for all containers, once they are known.
    Listed,
    /// Until its cause is reported as over, or its container has ended.
    Over,
    /// Nothing makes up for it: until a while after the last one.
    Quiet,
}

#[derive(Debug)]
struct Open {
    gap: Gap,
    /// The last loss of it.
    last: Timestamp,
    until: Until,
}

impl Open {
    fn is_over(&self) -> bool {
        matches!(&self.until, Until::Scanned(unscanned) if unscanned.is_empty())
    }
}

#[derive(Debug, Default)]
pub(super) struct Gaps {
    open: Vec<Open>,
    closed: VecDeque<Gap>,
}

impl Gaps {
    /// Something was not seen. True if the history does not know it yet.
    pub(super) fn opened(&mut self, gap: Gap, until: Until) -> bool {
        let is_full = self.open.len() >= MAX_OPEN;
        let same = self.open.iter_mut().find(|open| {
            open.gap.failure == gap.failure && (is_full || open.gap.container == gap.container)
        });
        match same {
            Some(open) => {
                // After a clock was set back, no scan would ever begin after the last loss.
                let is_set_back = open.last.duration_since(gap.since) > QUIET;
                open.last = if is_set_back { gap.since } else { open.last.max(gap.since) };
                open.gap.since = open.gap.since.min(gap.since);
                match (&mut open.until, until) {
                    (Until::Scanned(unscanned), Until::Scanned(more)) => unscanned.extend(more),
                    (_, until) => open.until = until,
                }
                // From here on the gap may concern any container.
                let is_widened =
                    open.gap.container.is_some() && open.gap.container != gap.container;
                if is_widened {
                    open.gap.container = None;
                }
                is_widened || is_set_back
            }
            None if until == Until::Scanned(HashSet::new()) => {
                let until = Some(gap.since);
                self.remember(Gap { until, ..gap });
                true
            }
            None => {
                self.open.push(Open { last: gap.since, gap, until });
                true
            }
        }
    }

    /// A scan of a container that began at `began` is complete. Returns the gaps that it
    /// closes.
    pub(super) fn scanned(
        &mut self,
        container: &ContainerId,
        began: Timestamp,
        now: Timestamp,
    ) -> Vec<Gap> {
        for open in self.open.iter_mut().filter(|open| began >= open.last) {
            if let Until::Scanned(unscanned) = &mut open.until {
                unscanned.remove(container);
            }
        }
        self.close(now, Open::is_over)
    }

    /// Every containerd has listed the containers that run.
    pub(super) fn listed(&mut self, running: &HashSet<ContainerId>, now: Timestamp) -> Vec<Gap> {
        for open in self.open.iter_mut().filter(|open| open.until == Until::Listed) {
            open.until = Until::Scanned(running.clone());
        }
        self.close(now, Open::is_over)
    }

    /// A container has gone: nothing more will be seen of it.
    pub(super) fn gone(&mut self, container: &ContainerId, now: Timestamp) -> Vec<Gap> {
        for open in &mut self.open {
            if let Until::Scanned(unscanned) = &mut open.until {
                unscanned.remove(container);
            }
        }
        let mut closed = self.close(now, Open::is_over);
        closed.extend(self.ended(container, now));
        closed
    }

    /// A container has ended. Its files may still be scanned; a loss that lasted while it ran
    /// is over.
    pub(super) fn ended(&mut self, container: &ContainerId, now: Timestamp) -> Vec<Gap> {
        self.close(now, |open| {
            open.until == Until::Over && open.gap.container.as_ref() == Some(container)
        })
    }

    /// The cause of a loss is over.
    pub(super) fn over(
        &mut self,
        failure: Failure,
        container: Option<&ContainerId>,
        now: Timestamp,
    ) -> Vec<Gap> {
        self.close(now, |open| {
            open.until == Until::Over
                && open.gap.failure == failure
                && open.gap.container.as_ref() == container
        })
    }

    /// When the next gap closes by itself.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        let quiet = self.open.iter().filter(|open| open.until == Until::Quiet);
        quiet.filter_map(|open| open.last.checked_add(QUIET).ok()).min()
    }

    /// Closes the gaps without a new loss for long enough. A clock that was set back does
    /// not make them wait longer.
    pub(super) fn due(&mut self, now: Timestamp) -> Vec<Gap> {
        self.close(now, |open| {
            open.until == Until::Quiet && now.duration_since(open.last).abs() >= QUIET
        })
    }

    /// Whether there is a gap of this kind and container.
    pub(super) fn is_open(&self, failure: Failure, container: &ContainerId) -> bool {
        self.open().any(|gap| gap.failure == failure && gap.container.as_ref() == Some(container))
    }

    fn close(&mut self, now: Timestamp, is_over: impl Fn(&Open) -> bool) -> Vec<Gap> {
        let closed: Vec<Gap> = self
            .open
            .extract_if(.., |open| is_over(open))
            .map(|open| Gap { until: open.gap.until.or(Some(now)), ..open.gap })
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

    /// The failures whose gaps are open for a container.
    pub(super) fn names_of(&self, container: &ContainerId) -> Vec<&'static str> {
        let concerns = |gap: &&Gap| gap.container.as_ref().is_none_or(|id| id == container);
        let mut names: Vec<_> =
            self.open().filter(concerns).map(|gap| gap.failure.name()).collect();
        names.sort_unstable();
        names.dedup();
        names
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

    fn awaited(names: &[&str]) -> Until {
        Until::Scanned(names.iter().map(|name| id(name)).collect())
    }

    #[test]
    fn h02_a_loss_that_lasts_is_open_until_its_cause_is_over_or_its_container_ends() {
        let mut gaps = Gaps::default();
        let full =
            |name: Option<&str>, since| Gap { failure: Failure::MountsFull, ..gap(name, since) };
        assert!(gaps.opened(full(Some("a"), 10), Until::Over));
        assert!(gaps.opened(full(Some("b"), 11), Until::Over));
        // Reported again, it is known already, and no scan ends it.
        assert!(!gaps.opened(full(Some("a"), 12), Until::Over));
        assert_eq!(gaps.scanned(&id("a"), at(20), at(21)), []);
        assert_eq!(gaps.over(Failure::NamesFull, Some(&id("a")), at(22)), []);
        let closed = |name, since, until| Gap { until: Some(at(until)), ..full(Some(name), since) };
        assert_eq!(gaps.over(Failure::MountsFull, Some(&id("a")), at(23)), [closed("a", 10, 23)]);
        assert_eq!(gaps.ended(&id("b"), at(24)), [closed("b", 11, 24)]);
        assert_eq!(gaps.open().count(), 0);
    }

    #[test]
    fn h02_a_loss_that_nothing_makes_up_for_is_open_for_a_while() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(None, 100), Until::Quiet));
        assert!(!gaps.opened(gap(None, 130), Until::Quiet));
        assert_eq!(gaps.next_due(), Some(at(190)));
        assert_eq!(gaps.due(at(189)), []);
        assert_eq!(gaps.due(at(190)), [Gap { until: Some(at(190)), ..gap(None, 100) }]);
        assert_eq!(gaps.next_due(), None);
    }

    #[test]
    fn h07_a_containers_gap_is_recorded_beside_anothers_of_the_same_kind() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(Some("flood"), 10), awaited(&["flood"])));
        assert!(gaps.opened(gap(Some("quiet"), 10), awaited(&["quiet"])));
        // Also where there is no room for one of its own.
        for number in 0..MAX_OPEN as i64 {
            let name = number.to_string();
            gaps.opened(gap(Some(&name), number), awaited(&[&name]));
        }
        assert!(gaps.is_open(Failure::PipelineFull, &id("quiet")));
        assert!(gaps.opened(gap(Some("late"), 10), awaited(&["late"])));
    }

    #[test]
    fn a_gap_ends_with_a_scan_that_began_after_the_last_loss() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(Some("a"), 10), awaited(&["a"])));
        assert!(!gaps.opened(gap(Some("a"), 20), awaited(&["a"])));
        assert_eq!(gaps.scanned(&id("a"), at(15), at(16)), []);
        assert_eq!(gaps.scanned(&id("b"), at(25), at(26)), []);
        let closed = Gap { until: Some(at(27)), ..gap(Some("a"), 10) };
        assert_eq!(gaps.scanned(&id("a"), at(25), at(27)), std::slice::from_ref(&closed));
        assert_eq!(gaps.all(), [closed]);
        assert_eq!(gaps.open().count(), 0);
    }

    #[test]
    fn a_gap_of_all_ends_when_each_was_scanned_or_has_gone() {
        let mut gaps = Gaps::default();
        assert!(gaps.opened(gap(None, 10), awaited(&["a", "b"])));
        assert_eq!(gaps.scanned(&id("a"), at(11), at(12)), []);
        assert_eq!(gaps.gone(&id("b"), at(13)), [Gap { until: Some(at(13)), ..gap(None, 10) }]);
        // There is nothing that could be scanned.
        assert!(gaps.opened(gap(None, 20), awaited(&[])));
        assert_eq!(gaps.all()[0], Gap { until: Some(at(20)), ..gap(None, 20) });
    }

    #[test]
    fn u03_a_time_that_is_over_is_open_until_every_container_that_ran_was_scanned() {
        let mut gaps = Gaps::default();
        let down = Gap { failure: Failure::NotRunning, until: Some(at(20)), ..gap(None, 10) };
        assert!(gaps.opened(down.clone(), Until::Listed));
        assert_eq!(gaps.scanned(&id("a"), at(21), at(22)), []);
        assert_eq!(gaps.listed(&HashSet::from([id("a"), id("b")]), at(23)), []);
        assert_eq!(gaps.scanned(&id("a"), at(24), at(25)), []);
        assert_eq!(gaps.open().cloned().collect::<Vec<_>>(), std::slice::from_ref(&down));
        assert_eq!(gaps.gone(&id("b"), at(26)), std::slice::from_ref(&down));
        // Nothing ran.
        assert!(gaps.opened(down.clone(), Until::Listed));
        assert_eq!(gaps.listed(&HashSet::new(), at(30)), [down]);
    }

    #[test]
    fn the_losses_of_a_container_are_those_that_are_not_made_up_for() {
        let mut gaps = Gaps::default();
        let late = Gap { failure: Failure::ArmedLate, until: Some(at(11)), ..gap(Some("a"), 10) };
        gaps.opened(late, awaited(&["a"]));
        gaps.opened(gap(Some("b"), 10), awaited(&["b"]));
        gaps.opened(gap(None, 12), awaited(&["a", "b"]));
        assert_eq!(gaps.names_of(&id("a")), ["armed_late", "pipeline_full"]);
        assert_eq!(gaps.names_of(&id("b")), ["pipeline_full"]);
        assert_eq!(gaps.names_of(&id("c")), ["pipeline_full"]);
        gaps.scanned(&id("a"), at(20), at(21));
        assert_eq!(gaps.names_of(&id("a")), ["pipeline_full"], "the other one waits for b");
        gaps.scanned(&id("b"), at(20), at(21));
        assert_eq!(gaps.names_of(&id("a")), [""; 0]);
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
