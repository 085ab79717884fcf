//! What the watchers' threads have in common: the table, the way out, the flag
//! that ends them, and the one place where a loss is counted and answered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{SendTimeoutError, Sender, TrySendError};
use jiff::Timestamp;

use super::Report;
use super::lower::LowerTwins;
use super::sessions::Sessions;
use super::table::{Table, Watched};
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{ContainerId, Fact, Observation, Process, ProcessIdentity, RootfsPath, Source};

pub(super) struct Shared {
    pub(super) settings: config::Watch,
    pub(super) table: Table,
    pub(super) health: Arc<Health>,
    pub(super) lower_twins: LowerTwins,
    reports: Sender<Report>,
    dirty: Mutex<Dirty>,
    sessions: Mutex<Sessions>,
    wake_scan: Sender<()>,
    stopping: AtomicBool,
    /// Of the thread that is asked before a runtime runs, if there is one.
    pub(super) arming: Arming,
}

/// What is known of the thread that is asked before a runtime runs.
#[derive(Debug, Default)]
pub(super) struct Arming {
    /// Since when, in the clock ticks by which processes tell when they started;
    /// unset without such a thread.
    pub(super) since: OnceLock<u64>,
    pub(super) turns: AtomicU64,
}

/// More paths than this are not waited for one by one; the container is walked.
const MAX_DIRTY_PATHS: usize = 16 * 1024;

/// How long a scan waits for room in the pipeline before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// What has changed and is to be looked at when it has been left alone.
#[derive(Default)]
struct Dirty {
    paths: HashMap<(ContainerId, RootfsPath), DirtyPath>,
    sweeps: HashMap<ContainerId, Instant>,
}

pub(super) struct DirtyPath {
    pub(super) watched: Arc<Watched>,
    pub(super) writer: Option<Arc<Process>>,
    /// `Change` if it was written, `Scan` if it was only executed.
    pub(super) source: Source,
    first: Instant,
    last: Instant,
}

impl Shared {
    pub(super) fn new(
        settings: config::Watch,
        reports: Sender<Report>,
        health: Arc<Health>,
        wake_scan: Sender<()>,
    ) -> Shared {
        Shared {
            settings,
            table: Table::default(),
            health,
            lower_twins: LowerTwins::default(),
            reports,
            dirty: Mutex::default(),
            sessions: Mutex::default(),
            wake_scan,
            stopping: AtomicBool::new(false),
            arming: Arming::default(),
        }
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake_scan();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether this container should have been armed before it started.
    pub(super) fn is_armed_against(&self, init: ProcessIdentity) -> bool {
        self.arming.since.get().is_some_and(|since| init.start_time > *since)
    }

    pub(super) fn wake_scan(&self) {
        // Full: it has been woken already and has not looked yet.
        let _ = self.wake_scan.try_send(());
    }

    pub(super) fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands an observation on without ever waiting; false if it was lost.
    pub(super) fn observe(
        &self,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> bool {
        let observation = Observation { container: watched.container.clone(), at, source, fact };
        match self.reports.try_send(Report::Observed(observation)) {
            // Nobody listens any more: the daemon is ending.
            Ok(()) | Err(TrySendError::Disconnected(_)) => true,
            Err(TrySendError::Full(_)) => {
                self.lose(
                    Failure::PipelineFull,
                    Some(watched),
                    "the pipeline has no room for an observation",
                );
                false
            }
        }
    }

    /// Counts a loss, asks for the walks that make up for it, and says so once
    /// until that walk has begun.
    pub(super) fn lose(&self, failure: Failure, watched: Option<&Arc<Watched>>, detail: &str) {
        // The reaction to every failure of the watchers is a rescan.
        let _ = self.health.record(failure);
        let is_news = match watched {
            Some(watched) => watched.ask_for_rescan(),
            None => {
                let watched = self.table.all();
                watched.iter().filter(|watched| watched.ask_for_rescan()).count() > 0
            }
        };
        if is_news {
            let container = watched.map(|watched| watched.container.clone());
            tracing::warn!(
                failure = failure.name(),
                container = container.as_ref().map(tracing::field::display),
                "{detail}"
            );
            let lost = Report::Lost { failure, container, detail: detail.to_owned() };
            if self.reports.try_send(lost).is_err() {
                let _ = self.health.record(Failure::PipelineFull);
            }
        }
        self.wake_scan();
    }

    /// Sends without waiting and hands the report back if there is no room.
    #[expect(clippy::result_large_err, reason = "the report is the caller's own, handed back")]
    pub(super) fn try_report(&self, report: Report) -> Result<(), Report> {
        match self.reports.try_send(report) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(report)) => Err(report),
        }
    }

    /// Waits for room in the pipeline, for the scan thread only. Whether it was
    /// sent.
    #[must_use]
    pub(super) fn report_patiently(&self, mut report: Report) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_stopping() {
            match self.reports.send_timeout(report, Duration::from_millis(100)) {
                Ok(()) => return true,
                Err(SendTimeoutError::Disconnected(_)) => return false,
                Err(SendTimeoutError::Timeout(unsent)) if Instant::now() < deadline => {
                    report = unsent;
                }
                Err(SendTimeoutError::Timeout(_)) => return false,
            }
        }
        false
    }

    /// Whether the pipeline has caught up enough for what can wait.
    pub(super) fn has_room(&self) -> bool {
        match self.reports.capacity() {
            Some(capacity) => self.reports.len() <= capacity / 2,
            None => true,
        }
    }

    fn dirty(&self) -> MutexGuard<'_, Dirty> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a path is to be looked at once it has settled.
    pub(super) fn mark_dirty(
        &self,
        watched: &Arc<Watched>,
        path: RootfsPath,
        source: Source,
        writer: Option<Arc<Process>>,
    ) {
        let now = Instant::now();
        let mut dirty = self.dirty();
        let is_full = dirty.paths.len() >= MAX_DIRTY_PATHS;
        let key = (watched.container.clone(), path);
        if let Some(entry) = dirty.paths.get_mut(&key) {
            entry.last = now;
            entry.watched = watched.clone();
            entry.writer = writer.or(entry.writer.take());
            if source == Source::Change {
                entry.source = source;
            }
        } else if !is_full {
            let entry =
                DirtyPath { watched: watched.clone(), writer, source, first: now, last: now };
            dirty.paths.insert(key, entry);
        }
        drop(dirty);
        if is_full {
            self.lose(
                Failure::ContentQueueFull,
                Some(watched),
                "too many changed files wait to settle",
            );
        } else {
            self.wake_scan();
        }
    }

    /// Notes that a container's upperdir is to be walked once it has settled.
    pub(super) fn mark_for_sweep(&self, watched: &Arc<Watched>) {
        let due = Instant::now() + self.settings.settle;
        self.dirty().sweeps.entry(watched.container.clone()).or_insert(due);
        self.wake_scan();
    }

    /// Takes the sweeps that are due.
    pub(super) fn take_due_sweeps(&self, now: Instant) -> Vec<ContainerId> {
        let mut dirty = self.dirty();
        dirty.sweeps.extract_if(|_, due| *due <= now).map(|(container, _)| container).collect()
    }

    /// Takes the paths that have settled, or that never do.
    pub(super) fn take_settled(&self, now: Instant) -> Vec<(RootfsPath, DirtyPath)> {
        let settle = self.settings.settle;
        let mut dirty = self.dirty();
        dirty
            .paths
            .extract_if(|_, path| path.due(settle) <= now)
            .map(|((_, path), dirty)| (path, dirty))
            .collect()
    }

    /// Takes all of one container's paths.
    pub(super) fn take_dirty_of(&self, container: &ContainerId) -> Vec<(RootfsPath, DirtyPath)> {
        let mut dirty = self.dirty();
        dirty.sweeps.remove(container);
        dirty
            .paths
            .extract_if(|(owner, _), _| owner == container)
            .map(|((_, path), dirty)| (path, dirty))
            .collect()
    }

    /// When the next path or sweep is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let settle = self.settings.settle;
        let dirty = self.dirty();
        let paths = dirty.paths.values().map(|path| path.due(settle));
        paths.chain(dirty.sweeps.values().copied()).min()
    }
}

impl DirtyPath {
    /// A file that is written all the time must be judged all the same.
    fn due(&self, settle: Duration) -> Instant {
        (self.last + settle).min(self.first + settle * 10)
    }
}
