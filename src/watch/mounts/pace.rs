//! How often mounts may be listed.

use std::time::{Duration, Instant};

/// Listings of a container take this long at once, some ten or twenty of them, and
/// after that a twentieth of a processor: all that a container which does nothing
/// but mount can cost.
const BURST: Duration = Duration::from_millis(20);

const REST_PER_LISTING: u32 = 20;

/// How much of a processor's time listings have had lately: those of a container, or all
/// of a kind.
pub(crate) struct Pace {
    pub(crate) debt: Duration,
    pub(crate) since: Instant,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace { debt: Duration::ZERO, since: Instant::now() }
    }
}

impl Pace {
    pub(crate) fn spent(&mut self, start: Instant, end: Instant) {
        let paid = start.saturating_duration_since(self.since) / REST_PER_LISTING;
        self.debt = self.debt.saturating_sub(paid) + (end - start);
        self.since = end;
    }

    /// From when on there may be another one.
    pub(crate) fn next(&self) -> Instant {
        self.since + self.debt.saturating_sub(BURST) * REST_PER_LISTING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_come_at_once_until_they_are_many() {
        let start = Instant::now();
        let mut pace = Pace { debt: Duration::ZERO, since: start };
        let cost = Duration::from_millis(1);
        let mut now = start;
        let mut at_once = 0;
        while pace.next() <= now {
            pace.spent(now, now + cost);
            now += cost;
            at_once += 1;
        }
        assert!((20..30).contains(&at_once), "{at_once}");
        // From now on one in twenty.
        let from = now;
        for _ in 0..100 {
            now = now.max(pace.next());
            pace.spent(now, now + cost);
            now += cost;
        }
        assert!(now - from >= cost * 1900, "{:?}", now - from);
        // And when it was left alone, at once again.
        assert!(pace.next() <= now + Duration::from_secs(1));
    }
}
