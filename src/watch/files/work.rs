//! The work of the thread `scan` for one container, and which of it may be done now.
//!
//! `control` sends [`ScanRequest`]s, and the scan thread adds what is due. This file decides
//! what is ready, from values alone. `scan` does the work.

use std::collections::VecDeque;
use std::sync::Arc;

use super::dirty::Settled;
use super::entry::EntryReading;
use super::walk::Walk;
use crate::model::RootfsPath;
use crate::watch::core::watched::Watched;

/// A request to scan an upperdir now.
#[derive(Debug)]
pub(crate) enum ScanRequest {
    Scan {
        watched: Arc<Watched>,
        ticket: Option<u64>,
    },
    /// The container has ended: a last scan, then forget it.
    Last {
        watched: Arc<Watched>,
    },
    /// The container does not run, and a client asks what it holds.
    Compare {
        watched: Arc<Watched>,
        ticket: u64,
    },
}

/// The current and the next work for one container.
#[derive(Default)]
pub(crate) struct Work {
    /// Some of its paths have settled.
    pub(crate) has_settled: bool,
    pub(crate) taken: VecDeque<Settled>,
    pub(crate) reading: Option<(Settled, Box<EntryReading>)>,
    pub(crate) walk: Option<Walk>,
    pub(crate) requests: VecDeque<ScanRequest>,
    /// Directories that are new or were moved.
    pub(crate) below: VecDeque<(Arc<Watched>, RootfsPath)>,
    pub(crate) due: Option<Due>,
}

/// A scan that is due without a request.
pub(crate) struct Due {
    pub(crate) watched: Arc<Watched>,
    pub(crate) is_urgent: bool,
}

/// Which kinds of work may be done now.
#[derive(Clone, Copy)]
pub(crate) struct Allowed {
    pub(crate) urgent: bool,
    /// Periodic scans, which are not urgent.
    pub(crate) periodic: bool,
    /// Another walk may begin.
    pub(crate) begin: bool,
}

impl Work {
    pub(crate) fn settles(&self) -> bool {
        self.has_settled || self.reading.is_some() || !self.taken.is_empty()
    }

    pub(crate) fn walks(&self, allowed: Allowed) -> bool {
        let Allowed { urgent, periodic, begin } = allowed;
        let may = |is_urgent| if is_urgent { urgent } else { periodic };
        match (&self.walk, &self.due) {
            (Some(walk), _) => may(walk.is_urgent),
            (None, _) if !self.requests.is_empty() || !self.below.is_empty() => begin && urgent,
            (None, Some(due)) => begin && may(due.is_urgent),
            (None, None) => false,
        }
    }

    pub(crate) fn is_ready(&self, allowed: Allowed) -> bool {
        allowed.urgent && self.settles() || self.walks(allowed)
    }

    pub(crate) fn is_idle(&self) -> bool {
        let everything = Allowed { urgent: true, periodic: true, begin: true };
        !self.is_ready(everything)
    }

    /// Makes the current walk urgent: something else waits for its end that it does not cover.
    pub(crate) fn hurry(&mut self) {
        if let Some(walk) = &mut self.walk {
            walk.is_urgent = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::watched::some_container;
    use crate::watch::files::walk::Extent;

    const CLOSED: Allowed = Allowed { urgent: false, periodic: false, begin: true };
    const URGENT: Allowed = Allowed { urgent: true, ..CLOSED };
    const PERIODIC: Allowed = Allowed { periodic: true, ..CLOSED };

    #[track_caller]
    fn check(work: &Work, expected: [bool; 3]) {
        let ready = [CLOSED, URGENT, PERIODIC].map(|allowed| work.is_ready(allowed));
        assert_eq!(ready, expected, "closed, urgent, periodic");
        // However much waits, no walk begins while too many directories are open.
        let begins = work.walk.is_none() && !work.settles();
        assert!(!begins || !work.is_ready(Allowed { begin: false, ..URGENT }));
    }

    #[test]
    fn w14_only_periodic_scans_wait_for_their_pace() {
        let watched = Arc::new(some_container(1));
        let due = |is_urgent| Some(Due { watched: watched.clone(), is_urgent });
        check(&Work::default(), [false; 3]);
        check(&Work { due: due(false), ..Work::default() }, [false, false, true]);
        check(&Work { due: due(true), ..Work::default() }, [false, true, false]);
        check(&Work { has_settled: true, ..Work::default() }, [false, true, false]);
        let request = ScanRequest::Scan { watched: watched.clone(), ticket: Some(1) };
        check(&Work { requests: [request].into(), ..Work::default() }, [false, true, false]);
        let walk = |is_urgent| Some(Walk::new(&watched, Extent::All, is_urgent));
        let mut work = Work { walk: walk(false), due: due(true), ..Work::default() };
        check(&work, [false, false, true]);
        // Work that a periodic scan does not cover must not wait for its end.
        work.hurry();
        check(&work, [false, true, false]);
    }
}
