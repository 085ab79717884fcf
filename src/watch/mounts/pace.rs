//! Limits the processor time for listing mounts, for one container or for all.
//!
//! It only counts time. `marking` and `namespaces` do the listing and ask it when the next one
//! may begin.

use std::time::{Duration, Instant};

/// Listings may take this long without a pause, which is enough for ten or twenty of them. After
/// that they take a twentieth of a processor. A container that mounts without end costs no more.
const BURST: Duration = Duration::from_millis(20);

const REST_PER_LISTING: u32 = 20;

/// The processor time that listings have used lately: those of one container, or all of one
/// kind.
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

    /// The earliest time of the next listing.
    pub(crate) fn next(&self) -> Instant {
        self.since + self.debt.saturating_sub(BURST) * REST_PER_LISTING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_wait_only_after_many() {
        let start = Instant::now();
        let mut pace = Pace { debt: Duration::ZERO, since: start };
        let cost = Duration::from_millis(1);
        let mut now = start;
        let mut immediate = 0;
        while pace.next() <= now {
            pace.spent(now, now + cost);
            now += cost;
            immediate += 1;
        }
        assert!((20..30).contains(&immediate), "{immediate}");
        // From here on, a twentieth of the time.
        let from = now;
        for _ in 0..100 {
            now = now.max(pace.next());
            pace.spent(now, now + cost);
            now += cost;
        }
        assert!(now - from >= cost * 1900, "{:?}", now - from);
        // After a pause, without waiting again.
        assert!(pace.next() <= now + Duration::from_secs(1));
    }
}
