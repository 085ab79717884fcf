//! What is to be done for one container by the scan thread, and what of it may be done now.

use std::collections::VecDeque;
use std::sync::Arc;

use super::dirty::Settled;
use super::entry::EntryReading;
use super::walk::Walk;
use crate::model::RootfsPath;
use crate::watch::core::watched::Watched;

/// An upperdir that is to be walked now.
#[derive(Debug)]
pub(crate) enum ScanRequest {
    Scan {
        watched: Arc<Watched>,
        ticket: Option<u64>,
    },
    /// The container has ended: a last walk, then forget it.
    Last {
        watched: Arc<Watched>,
    },
    /// The container does not run, and somebody asks what it holds.
    Compare {
        watched: Arc<Watched>,
        ticket: u64,
    },
}

/// What of one container is being done, and what is to be done next.
#[derive(Default)]
pub(crate) struct Work {
    /// Some of its paths have settled.
    pub(crate) has_settled: bool,
    pub(crate) taken: VecDeque<Settled>,
    pub(crate) reading: Option<(Settled, Box<EntryReading>)>,
    pub(crate) walk: Option<Walk>,
    pub(crate) orders: VecDeque<ScanRequest>,
    /// Directories that are new or were moved.
    pub(crate) below: VecDeque<(Arc<Watched>, RootfsPath)>,
    pub(crate) due: Option<Due>,
}

/// A walk that nobody has ordered.
pub(crate) struct Due {
    pub(crate) watched: Arc<Watched>,
    pub(crate) is_urgent: bool,
}

/// Which kinds of work may be done now.
#[derive(Clone, Copy)]
pub(crate) struct Allowed {
    pub(crate) urgent: bool,
    pub(crate) sweeps: bool,
    /// Another walk may begin.
    pub(crate) begin: bool,
}

impl Work {
    pub(crate) fn settles(&self) -> bool {
        self.has_settled || self.reading.is_some() || !self.taken.is_empty()
    }

    pub(crate) fn walks(&self, allowed: Allowed) -> bool {
        let Allowed { urgent, sweeps, begin } = allowed;
        let may = |is_urgent| if is_urgent { urgent } else { sweeps };
        match (&self.walk, &self.due) {
            (Some(walk), _) => may(walk.is_urgent),
            (None, _) if !self.orders.is_empty() || !self.below.is_empty() => begin && urgent,
            (None, Some(due)) => begin && may(due.is_urgent),
            (None, None) => false,
        }
    }

    pub(crate) fn is_ready(&self, allowed: Allowed) -> bool {
        allowed.urgent && self.settles() || self.walks(allowed)
    }

    pub(crate) fn is_idle(&self) -> bool {
        let everything = Allowed { urgent: true, sweeps: true, begin: true };
        !self.is_ready(everything)
    }

    /// Something is to be walked that a walk which has begun does not make up for:
    /// that one is not to keep it waiting.
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

    const CLOSED: Allowed = Allowed { urgent: false, sweeps: false, begin: true };
    const URGENT: Allowed = Allowed { urgent: true, ..CLOSED };
    const SWEEPS: Allowed = Allowed { sweeps: true, ..CLOSED };

    #[track_caller]
    fn check(work: &Work, expected: [bool; 3]) {
        let ready = [CLOSED, URGENT, SWEEPS].map(|allowed| work.is_ready(allowed));
        assert_eq!(ready, expected, "closed, urgent, sweeps");
        // However much waits, no walk begins where too many directories are open.
        let begins = work.walk.is_none() && !work.settles();
        assert!(!begins || !work.is_ready(Allowed { begin: false, ..URGENT }));
    }

    #[test]
    fn w14_sweeps_wait_for_their_pace_and_nothing_else_does() {
        let watched = Arc::new(some_container(1));
        let due = |is_urgent| Some(Due { watched: watched.clone(), is_urgent });
        check(&Work::default(), [false; 3]);
        check(&Work { due: due(false), ..Work::default() }, [false, false, true]);
        check(&Work { due: due(true), ..Work::default() }, [false, true, false]);
        check(&Work { has_settled: true, ..Work::default() }, [false, true, false]);
        let order = ScanRequest::Scan { watched: watched.clone(), ticket: Some(1) };
        check(&Work { orders: [order].into(), ..Work::default() }, [false, true, false]);
        let walk = |is_urgent| Some(Walk::new(&watched, Extent::All, is_urgent));
        let mut work = Work { walk: walk(false), due: due(true), ..Work::default() };
        check(&work, [false, false, true]);
        // What a sweep does not make up for is not to wait for its end.
        work.hurry();
        check(&work, [false, true, false]);
    }
}
