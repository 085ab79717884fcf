//! Executions that wait until the change feed has read what was written before: only then the
//! writer of their file is known.
//!
//! They wait beside the queue, so no other execution waits for them. Pure: `content` puts them
//! in and takes them out, and `files::progress` knows how far the feed is.

use std::collections::VecDeque;
use std::time::Instant;

use crate::watch::files::progress::Backlog;

/// More are reported without their writers.
const MAX_WAITING: usize = 256;

#[derive(Debug)]
pub(crate) struct Late<T> {
    waiting: VecDeque<(Backlog, Instant, T)>,
}

impl<T> Default for Late<T> {
    fn default() -> Self {
        Late { waiting: VecDeque::new() }
    }
}

impl<T> Late<T> {
    /// Without room the execution is returned.
    pub(crate) fn wait(&mut self, backlog: Backlog, until: Instant, one: T) -> Result<(), T> {
        if self.waiting.len() >= MAX_WAITING {
            return Err(one);
        }
        self.waiting.push_back((backlog, until, one));
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The oldest, if the feed has read enough or it has waited for too long; and whether the
    /// feed has.
    pub(crate) fn take(
        &mut self,
        has_read: impl Fn(Backlog) -> bool,
        now: Instant,
    ) -> Option<(T, bool)> {
        let (backlog, until, _) = self.waiting.front()?;
        let is_read = has_read(*backlog);
        if !is_read && *until > now {
            return None;
        }
        let (_, _, one) = self.waiting.pop_front()?;
        Some((one, is_read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::files::progress::PATIENCE;

    #[test]
    fn one_waits_until_the_feed_has_read_enough_or_its_time_is_over() {
        let now = Instant::now();
        let mut late = Late::default();
        late.wait(Backlog(5), now + PATIENCE, "first").unwrap();
        late.wait(Backlog(7), now + PATIENCE, "second").unwrap();
        let read = |until: u64| move |backlog: Backlog| backlog.0 <= until;
        assert_eq!(late.take(read(4), now), None);
        assert_eq!(late.take(read(5), now), Some(("first", true)));
        assert_eq!(late.take(read(5), now), None);
        assert_eq!(late.take(read(5), now + PATIENCE), Some(("second", false)));
        assert!(late.is_empty());
    }

    #[test]
    fn no_number_of_executions_waits() {
        let now = Instant::now();
        let mut late = Late::default();
        assert!((0..MAX_WAITING).all(|one| late.wait(Backlog(1), now, one).is_ok()));
        assert_eq!(late.wait(Backlog(1), now, 7), Err(7));
    }
}
