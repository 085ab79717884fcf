//! Changed paths that are looked at when they have been left alone for a while.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::writers::Writer;
use crate::model::{ContainerId, RootfsPath, Source};
use crate::watch::core::fair;
use crate::watch::core::watched::Watched;

/// More paths of one container than this are not waited for one by one: it is
/// walked. One container's flood takes nothing from another.
const MAX_DIRTY_PATHS: usize = 4 * 1024;

/// How many paths of one container are taken at once.
const TAKEN: usize = 32;

/// What of one container has changed and is to be looked at when it has been left
/// alone.
#[derive(Default)]
struct Dirty {
    paths: HashMap<RootfsPath, DirtyPath>,
    sweep: Option<Instant>,
}

struct DirtyPath {
    watched: Arc<Watched>,
    writer: Option<Writer>,
    /// `Change` if it was written, `Scan` if it was only executed.
    source: Source,
    first: Instant,
    last: Instant,
    /// Somebody is looking at it.
    is_taken: bool,
}

/// A path that is being looked at.
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

    /// Notes that a path is to be looked at once it has settled. The scan thread
    /// looks often enough to need no waking. False if the container has too many.
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

    /// Whether a path will be looked at by itself.
    pub(crate) fn is_dirty(&self, container: &ContainerId, path: &RootfsPath) -> bool {
        self.dirty().get(container).is_some_and(|dirty| dirty.paths.contains_key(path))
    }

    /// Notes that a container's upperdir is to be walked once it has settled.
    pub(crate) fn mark_for_sweep(&self, watched: &Arc<Watched>) {
        let due = Instant::now() + self.settle;
        self.dirty().entry(watched.container.clone()).or_default().sweep.get_or_insert(due);
    }

    /// Takes the sweeps that are due.
    pub(crate) fn take_due_sweeps(&self, now: Instant) -> Vec<ContainerId> {
        let mut all = self.dirty();
        let is_due = |dirty: &Dirty| dirty.sweep.is_some_and(|due| due <= now);
        let due = all.iter_mut().filter(|(_, dirty)| is_due(dirty));
        due.map(|(container, dirty)| {
            dirty.sweep = None;
            container.clone()
        })
        .collect()
    }

    /// Containers of which paths have settled, or never do: how many, and since when
    /// the oldest is due.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<fair::Waiting> {
        let settle = self.settle;
        let mut all = self.dirty();
        all.retain(|_, dirty| !dirty.paths.is_empty() || dirty.sweep.is_some());
        let overdue = all.iter().filter_map(|(container, dirty)| {
            let due = dirty.paths.values().map(|path| path.due(settle)).filter(|due| *due <= now);
            let (waiting, oldest) = due.fold((0, None), |(waiting, oldest), due| {
                (waiting + 1, Some(oldest.map_or(due, |oldest: Instant| oldest.min(due))))
            });
            Some((container.clone(), waiting, oldest?))
        });
        overdue.collect()
    }

    /// Takes some paths of a container that have settled. They stay known until they
    /// are [`done`](Self::done), and are sorted, so that neighbours follow each other.
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

    /// A path that was taken has been looked at. It stays if it has changed since.
    pub(crate) fn done(&self, container: &ContainerId, path: &RootfsPath) {
        if let Some(dirty) = self.dirty().get_mut(container)
            && dirty.paths.get(path).is_some_and(|path| path.is_taken)
        {
            dirty.paths.remove(path);
        }
    }

    /// Takes all of one container's paths, with who wrote them.
    pub(crate) fn take_dirty_of(&self, container: &ContainerId) -> Vec<(RootfsPath, Writer)> {
        let dirty = self.dirty().remove(container).map(|dirty| dirty.paths).unwrap_or_default();
        dirty.into_iter().filter_map(|(path, dirty)| Some((path, dirty.writer?))).collect()
    }

    /// How many paths have not been looked at yet.
    pub(crate) fn unsettled(&self) -> u64 {
        self.dirty().values().map(|dirty| dirty.paths.len() as u64).sum()
    }

    /// When the next path or sweep is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        let settle = self.settle;
        let all = self.dirty();
        let paths = all.values().flat_map(|dirty| dirty.paths.values());
        let paths = paths.filter(|path| !path.is_taken);
        let sweeps = all.values().filter_map(|dirty| dirty.sweep);
        paths.map(|path| path.due(settle)).chain(sweeps).min()
    }

    /// The writer of a path that has not settled yet, as far as it is known.
    pub(crate) fn writer_of(&self, watched: &Watched, path: &RootfsPath) -> Option<Writer> {
        self.dirty().get(&watched.container)?.paths.get(path)?.writer.clone()
    }
}

impl DirtyPath {
    /// A file that is written all the time must be judged all the same.
    fn due(&self, settle: Duration) -> Instant {
        (self.last + settle).min(self.first + settle * 10)
    }
}
