//! When the writing thread has what to do: commits, tries after a failure, pruning, and checks
//! of the file.
//!
//! Only times and periods; the work itself is in the other files.

use std::time::{Duration, Instant};

/// How long to wait after the first failed commit before the next try, and at most.
const RETRY_FIRST: Duration = Duration::from_millis(250);
pub(super) const RETRY_LAST: Duration = Duration::from_secs(10);
/// How often old records are pruned.
const PRUNE_EVERY: Duration = Duration::from_secs(60 * 60);
/// How often it is checked that the file is still in its place.
const CHECK_FILE_EVERY: Duration = Duration::from_secs(1);

/// Least time between two commits, unless a batch is full.
const COMMIT_SPACING: Duration = Duration::from_millis(100);
/// The same before a commit with something new in it: so many times what the last one took, so
/// that a slow disk has time for others, and at least this.
const NEWS_SPACED: u32 = 10;
const NEWS_SPACING: Duration = Duration::from_millis(10);

pub(super) struct Schedule {
    /// When the last commit began, and how long it took.
    last_commit: Option<(Instant, Duration)>,
    /// After a failed commit: when to try again, and how long to wait after the next failure.
    retry: Option<(Instant, Duration)>,
    pub(super) next_prune: Instant,
    pub(super) next_file_check: Instant,
}

impl Schedule {
    pub(super) fn new() -> Schedule {
        Schedule {
            last_commit: None,
            retry: None,
            next_prune: Instant::now(),
            next_file_check: Instant::now() + CHECK_FILE_EVERY,
        }
    }

    /// Notes a commit that has ended now.
    pub(super) fn committed(&mut self, began: Instant) {
        self.last_commit = Some((began, began.elapsed()));
    }

    /// When the next commit is due: sooner if there is something new.
    pub(super) fn next_commit(&self, has_news: bool) -> Instant {
        let Some((began, took)) = self.last_commit else { return Instant::now() };
        let for_news = (took * NEWS_SPACED).clamp(NEWS_SPACING, COMMIT_SPACING);
        began + if has_news { for_news } else { COMMIT_SPACING }
    }

    /// Whether the last write to the disk failed.
    pub(super) fn has_failed(&self) -> bool {
        self.retry.is_some()
    }

    /// When to try again after a failed write.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        self.retry.map(|(at, _)| at)
    }

    /// Whether the disk may be written now.
    pub(super) fn may_write(&self) -> bool {
        self.retry_at().is_none_or(|at| at <= Instant::now())
    }

    /// Notes a failed write. Each pause is longer than the one before; returns it.
    pub(super) fn retry_later(&mut self) -> Duration {
        let pause = self.retry.map_or(RETRY_FIRST, |(_, pause)| pause);
        self.retry = Some((Instant::now() + pause, (pause * 2).min(RETRY_LAST)));
        pause
    }

    /// Writes nothing until the next check of the file.
    pub(super) fn retry_after_file_check(&mut self) {
        self.retry = Some((self.next_file_check, RETRY_FIRST));
    }

    /// Notes that the disk can be written. Whether it could not be before.
    pub(super) fn end_retry(&mut self) -> bool {
        self.retry.take().is_some()
    }

    pub(super) fn prune_later(&mut self) {
        self.next_prune = Instant::now() + PRUNE_EVERY;
    }

    pub(super) fn check_file_later(&mut self) {
        self.next_file_check = Instant::now() + CHECK_FILE_EVERY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_new_is_committed_soon_and_a_slow_disk_has_time_for_others() {
        let began = Instant::now();
        let spacing = |took, has_news| {
            let last_commit = Some((began, Duration::from_millis(took)));
            Schedule { last_commit, ..Schedule::new() }.next_commit(has_news) - began
        };
        let spaced = [(0, true), (1, true), (3, true), (30, true), (1, false)];
        assert_eq!(
            spaced.map(|(took, has_news)| spacing(took, has_news).as_millis()),
            [10, 10, 30, 100, 100]
        );
        assert!(Schedule::new().next_commit(false) <= Instant::now());
    }
}
