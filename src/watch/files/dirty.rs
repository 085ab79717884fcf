//! Changed paths of all containers that wait until they have settled.
//!
//! A path settles when it has not changed for `settle`, or when ten times `settle` have passed
//! since its first change. The threads `feed` and `names` add paths, `exec` adds files that
//! were executed, a walk adds files that are too young, and the thread `scan` takes them.
//! Nothing here reads a file.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::writers::Writer;
use crate::model::{ContainerId, RootfsPath, Source};
use crate::watch::core::fair;
use crate::watch::core::watched::Watched;

/// Beyond this many paths of one container, its upper layer is scanned instead. The limit is
/// per container, so that a flood in one takes nothing from another.
const MAX_DIRTY_PATHS: usize = 4 * 1024;

/// How many paths of one container are taken at a time.
const TAKEN: usize = 32;

/// The unsettled changes of one container.
#[derive(Default)]
struct Dirty {
    paths: HashMap<RootfsPath, DirtyPath>,
    /// When its whole upper layer is to be scanned.
    scan: Option<Instant>,
}

struct DirtyPath {
    watched: Arc<Watched>,
    writer: Option<Writer>,
    /// `Change` if it was written, `Scan` if it was only executed.
    source: Source,
    first: Instant,
    last: Instant,
    /// The scan thread is examining it.
    is_taken: bool,
}

/// A path that is being examined.
pub(crate) struct Settled {
    pub(crate) path: RootfsPath,
    pub(crate) watched: Arc<Watched>,
    pub(crate) writer: Option<Writer>,
    pub(crate) source: Source,
}

/// Paths of all containers that have changed and have not settled.
pub(crate) struct DirtyPaths {
    settle: Duration,
    all: Mutex<HashMap<ContainerId, Dirty>>,
}

impl DirtyPaths {
    pub(crate) fn new(settle: Duration) -> DirtyPaths {
        DirtyPaths { settle, all: Mutex::default() }
    }

    fn dirty(&self) -> MutexGuard<'_, HashMap<ContainerId, Dirty>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a path is to be examined once it has settled. The scan thread checks often
    /// enough and need not be woken. False if the container has too many paths.
    pub(crate) fn mark(
        &self,
        watched: &Arc<Watched>,
        path: RootfsPath,
        source: Source,
        writer: Option<Writer>,
    ) -> bool {
        let now = Instant::now();
        let mut all = self.dirty();
        let dirty = all.entry(watched.container.clone()).or_default();
        if let Some(entry) = dirty.paths.get_mut(&path) {
            if std::mem::take(&mut entry.is_taken) {
                entry.first = now;
            }
            entry.last = now;
            entry.watched = watched.clone();
            entry.writer = writer.or(entry.writer.take());
            if source == Source::Change {
                entry.source = source;
            }
        } else if dirty.paths.len() < MAX_DIRTY_PATHS {
            let watched = watched.clone();
            let (first, last) = (now, now);
            let entry = DirtyPath { watched, writer, source, first, last, is_taken: false };
            dirty.paths.insert(path, entry);
        } else {
            return false;
        }
        true
    }

    /// The process that created a path counts until the writer of its content is known, which
    /// the change feed may have reported before.
    pub(crate) fn created_by(&self, container: &ContainerId, path: &RootfsPath, creator: Writer) {
        let mut all = self.dirty();
        let entry = all.get_mut(container).and_then(|dirty| dirty.paths.get_mut(path));
        if let Some(entry) = entry {
            entry.writer.get_or_insert(creator);
        }
    }

    /// Whether a path waits to be examined by itself.
    pub(crate) fn is_dirty(&self, container: &ContainerId, path: &RootfsPath) -> bool {
        self.dirty().get(container).is_some_and(|dirty| dirty.paths.contains_key(path))
    }

    /// Notes that a container's whole upperdir is to be scanned after `settle`.
    pub(crate) fn mark_for_scan(&self, watched: &Arc<Watched>) {
        let due = Instant::now() + self.settle;
        self.dirty().entry(watched.container.clone()).or_default().scan.get_or_insert(due);
    }

    /// Takes the containers whose whole upperdir is due to be scanned.
    pub(crate) fn take_due_scans(&self, now: Instant) -> Vec<ContainerId> {
        let mut all = self.dirty();
        let is_due = |dirty: &Dirty| dirty.scan.is_some_and(|due| due <= now);
        let due = all.iter_mut().filter(|(_, dirty)| is_due(dirty));
        due.map(|(container, dirty)| {
            dirty.scan = None;
            container.clone()
        })
        .collect()
    }

    /// The containers with paths that are due: how many paths, and since when the oldest is.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<fair::Waiting> {
        let settle = self.settle;
        let mut all = self.dirty();
        all.retain(|_, dirty| !dirty.paths.is_empty() || dirty.scan.is_some());
        let overdue = all.iter().filter_map(|(container, dirty)| {
            let due = dirty.paths.values().map(|path| path.due(settle)).filter(|due| *due <= now);
            let (waiting, oldest) = due.fold((0, None), |(waiting, oldest), due| {
                (waiting + 1, Some(oldest.map_or(due, |oldest: Instant| oldest.min(due))))
            });
            Some((container.clone(), waiting, oldest?))
        });
        overdue.collect()
    }

    /// Takes some settled paths of a container, sorted, so that paths of one directory are
    /// adjacent. They stay known until they are [`done`](Self::done).
    pub(crate) fn take_settled(&self, container: &ContainerId, now: Instant) -> Vec<Settled> {
        let settle = self.settle;
        let mut all = self.dirty();
        let Some(dirty) = all.get_mut(container) else { return Vec::new() };
        let due =
            dirty.paths.iter_mut().filter(|(_, path)| !path.is_taken && path.due(settle) <= now);
        let taken = due.take(TAKEN).map(|(path, dirty)| {
            dirty.is_taken = true;
            let DirtyPath { watched, writer, source, .. } = dirty;
            let (path, watched, writer) = (path.clone(), watched.clone(), writer.clone());
            Settled { path, watched, writer, source: *source }
        });
        let mut taken: Vec<Settled> = taken.collect();
        taken.sort_by(|one, other| one.path.cmp(&other.path));
        taken
    }

    /// A taken path has been examined. It stays if it has changed since.
    pub(crate) fn done(&self, container: &ContainerId, path: &RootfsPath) {
        if let Some(dirty) = self.dirty().get_mut(container)
            && dirty.paths.get(path).is_some_and(|path| path.is_taken)
        {
            dirty.paths.remove(path);
        }
    }

    /// Takes all paths of one container whose writer is known.
    pub(crate) fn take_dirty_of(&self, container: &ContainerId) -> Vec<(RootfsPath, Writer)> {
        let dirty = self.dirty().remove(container).map(|dirty| dirty.paths).unwrap_or_default();
        dirty.into_iter().filter_map(|(path, dirty)| Some((path, dirty.writer?))).collect()
    }

    /// How many paths have not been examined yet.
    pub(crate) fn unsettled(&self) -> u64 {
        self.dirty().values().map(|dirty| dirty.paths.len() as u64).sum()
    }

    /// When the next path or scan is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let settle = self.settle;
        let all = self.dirty();
        let paths = all.values().flat_map(|dirty| dirty.paths.values());
        let paths = paths.filter(|path| !path.is_taken);
        let scans = all.values().filter_map(|dirty| dirty.scan);
        paths.map(|path| path.due(settle)).chain(scans).min()
    }

    /// The writer of an unsettled path, if it is known.
    pub(crate) fn writer_of(&self, watched: &Watched, path: &RootfsPath) -> Option<Writer> {
        self.dirty().get(&watched.container)?.paths.get(path)?.writer.clone()
    }
}

impl DirtyPath {
    /// Bounded by the first change: a file that is written all the time must be examined too.
    fn due(&self, settle: Duration) -> Instant {
        (self.last + settle).min(self.first + settle * 10)
    }
}
