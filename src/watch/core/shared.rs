//! The value that all threads of the watchers share: settings, the table of containers, the
//! channel to the pipeline, the pace of background work, and the stop.
//!
//! It is the one place where a loss is counted, reported and made up for by a scan. It knows
//! nothing of the threads themselves. Only the scan thread may wait for the pipeline.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, SendTimeoutError, Sender, TrySendError};
use jiff::Timestamp;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::fair::{self, Owned, Pace, Waits};
use super::message::SensorEvent;
use super::rest::Rest;
use super::table::Table;
use super::unchanged::Unchanged;
use super::watched::Watched;
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{ProcessIdentity, RootfsPath};
use crate::sys::procfs;
use crate::threads;

/// The result of waiting for a queue.
pub(crate) enum Next<T> {
    Item(T),
    /// Nothing came in time.
    Nothing,
    /// The thread must end.
    End,
}

/// The value that all threads of the watchers share.
pub(crate) struct Core {
    pub(crate) settings: config::Watch,
    pub(crate) table: Table,
    pub(crate) health: Arc<Health>,
    reports: Sender<Box<SensorEvent>>,
    unsent_losses: Mutex<Vec<SensorEvent>>,
    /// The queues in which executions and code wait, by name.
    pub(crate) stages: OnceLock<Vec<(&'static str, Arc<dyn Waits>)>>,
    /// Bounds the processor time of reading and scanning, for all containers together.
    pace: Mutex<Pace>,
    wake_scan: Sender<()>,
    unchanged: OnceLock<Unchanged>,
    stopped_at: OnceLock<Instant>,
    /// Items that threads had taken from their queues and had no time to report.
    unreported: AtomicU64,
    /// Readable as soon as the watchers must stop.
    end: OwnedFd,
    pub(crate) rest_of_trace: Rest,
    pub(crate) arming: Arming,
    /// Since when containers are watched, in the clock ticks of process start times.
    began: u64,
}

/// The thread `arming`, which the gate asks before a container runtime runs.
#[derive(Debug, Default)]
pub(crate) struct Arming {
    /// Since when it is asked, in the clock ticks of process start times; unset without such
    /// a thread.
    pub(crate) since: OnceLock<u64>,
}

/// Reading large files and scanning takes at most one processor in `PART`, once the saved
/// `BURST` is used.
const PART: u32 = 2;
const BURST: Duration = Duration::from_secs(2);

/// Losses that may wait for room in the pipeline.
const MAX_UNSENT_LOSSES: usize = 1024;

/// How long a scan waits for room in the pipeline before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long events that were seen before a stop are still reported.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(4);

impl Core {
    pub(crate) fn new(
        settings: config::Watch,
        reports: Sender<Box<SensorEvent>>,
        health: Arc<Health>,
        wake_scan: Sender<()>,
    ) -> io::Result<Core> {
        let end = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Core {
            settings,
            table: Table::default(),
            health,
            reports,
            unsent_losses: Mutex::default(),
            stages: OnceLock::new(),
            pace: Mutex::new(Pace::new(PART, BURST, Instant::now())),
            wake_scan,
            unchanged: OnceLock::new(),
            stopped_at: OnceLock::new(),
            unreported: AtomicU64::new(0),
            end,
            rest_of_trace: Rest::new()?,
            arming: Arming::default(),
            began: procfs::ticks_since_boot(),
        })
    }

    /// The first half of a stop. The caller must also wake the thread of session activity.
    pub(crate) fn begin_stop(&self) {
        let _ = self.stopped_at.set(Instant::now());
        // If it is full, it is readable already.
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
        self.wake_scan();
    }

    /// Whether events are still reported. After a stop they are for a moment more, because no
    /// scan finds what was executed.
    pub(crate) fn may_report(&self) -> bool {
        self.stopped_at.get().is_none_or(|stopped_at| stopped_at.elapsed() < STOP_GRACE)
    }

    /// The next item of a thread's queue. The queue's senders end when the watchers do. After
    /// a stop, items for which there is no more time are counted.
    pub(crate) fn next_to_report<T: Owned>(&self, queue: &fair::Receiver<T>) -> Option<T> {
        match self.next_within(queue, Duration::MAX) {
            Next::Item(item) => Some(item),
            Next::Nothing | Next::End => None,
        }
    }

    /// Like [`next_to_report`](Core::next_to_report), but waits only for `patience`.
    pub(crate) fn next_within<T: Owned>(
        &self,
        queue: &fair::Receiver<T>,
        patience: Duration,
    ) -> Next<T> {
        // This needs no wake-up at a stop: the senders end then, and that ends the wait.
        match queue.recv_timeout(patience) {
            Ok(item) if self.may_report() => Next::Item(item),
            Ok(_) => {
                self.leave(1);
                Next::End
            }
            Err(RecvTimeoutError::Timeout) if self.may_report() => Next::Nothing,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// Counts items that were taken and that a stop leaves no time to report.
    pub(crate) fn leave(&self, items: usize) {
        self.unreported.fetch_add(items as u64, Ordering::Relaxed);
    }

    /// How many items were taken from queues and not reported before the stop was over.
    pub(crate) fn unreported(&self) -> u64 {
        self.unreported.load(Ordering::Relaxed)
    }

    /// Sets the queues in which executions and code wait.
    pub(crate) fn set_stages(&self, stages: Vec<(&'static str, Arc<dyn Waits>)>) {
        let _ = self.stages.set(stages);
    }

    /// Background work has used the processor for this long.
    pub(crate) fn spend(&self, used: Duration) {
        self.pace().spend(used);
    }

    /// How long background work must wait, so that it takes no more than its part of the
    /// processors.
    pub(crate) fn rest(&self) -> Duration {
        self.pace().wait(Instant::now())
    }

    /// Waits as long as background work must wait, or until a stop.
    pub(crate) fn keep_pace(&self) {
        loop {
            let rest = self.rest();
            if rest.is_zero() || self.is_stopping() {
                return;
            }
            threads::idle(|| std::thread::sleep(rest.min(Duration::from_millis(20))));
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_unchanged(&self, unchanged: Unchanged) {
        let _ = self.unchanged.set(unchanged);
    }

    /// The unchanged files of images. `None` until the gate is there.
    pub(crate) fn unchanged(&self) -> Option<&Unchanged> {
        self.unchanged.get()
    }

    /// When this returns, each execution in a container is handed on again.
    pub(crate) fn forget_unchanged(&self, watched: &Watched) {
        if let Some(unchanged) = self.unchanged() {
            unchanged.forget(watched.device);
        }
    }

    /// A session was opened in a container.
    pub(crate) fn note_session(&self, watched: &Watched) {
        watched.set_has_sessions();
        if let Some(pulse) = self.health.pulse.get() {
            pulse.handles().store(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// Waits until there is something to read, or the watchers must stop.
    pub(crate) fn wait_for(&self, events: impl AsFd, at_most: Option<Duration>) {
        let mut fds = [events.as_fd(), self.end.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let at_most = at_most.and_then(|at_most| Timespec::try_from(at_most).ok());
        // An error here (a signal) only ends the wait early.
        let _ = threads::idle(|| rustix::event::poll(&mut fds, at_most.as_ref()));
    }

    /// Waits until the watchers must stop, or `at_most` that long.
    pub(crate) fn wait_for_stop(&self, at_most: Duration) {
        self.wait_for(&self.end, Some(at_most));
    }

    /// Whether the daemon was watching when this container began.
    pub(crate) fn has_begun_before(&self, init: ProcessIdentity) -> bool {
        init.start_time > self.began
    }

    pub(crate) fn wake_scan(&self) {
        // If it is full, the thread was woken before and has not run yet.
        let _ = self.wake_scan.try_send(());
    }

    /// Waits until a condition is true, for a tenth of a second at most.
    pub(crate) fn wait_until(&self, is_true: impl Fn() -> bool) {
        const STEP: Duration = Duration::from_micros(100);
        const AT_MOST: u32 = 1000;
        for _ in 0..AT_MOST {
            if is_true() || self.is_stopping() {
                return;
            }
            std::thread::sleep(STEP);
        }
    }

    /// Whether the content of a path matters, even if it is not a program.
    pub(crate) fn is_sensitive(&self, watched: &Watched, path: &RootfsPath) -> bool {
        self.settings.persistence.matches(path)
            || watched.is_entry_point(path)
            || watched.ways.leading_to(path).is_some_and(|other| {
                self.settings.persistence.matches(&other) || watched.is_entry_point(&other)
            })
            || self.known_as(watched, path).is_some()
    }

    /// The sensitive path that leads to this one in the image.
    pub(crate) fn known_as(&self, watched: &Watched, path: &RootfsPath) -> Option<RootfsPath> {
        watched.ways.known_as(path, |other| self.settings.persistence.matches(other))
    }

    /// Whether something below a path may matter. Then a link there must be followed.
    pub(crate) fn leads_to_sensitive(&self, watched: &Watched, path: &RootfsPath) -> bool {
        let persistence = &self.settings.persistence;
        persistence.leads_to(path)
            || watched.ways.leading_to(path).is_some_and(|path| persistence.leads_to(&path))
    }

    /// Reports a container that began while driftd ran and was not marked before its entry
    /// point ran.
    pub(crate) fn armed_late(&self, watched: &Watched) {
        let Watched { container, init, .. } = watched;
        let _ = self.health.record(Failure::ArmedLate);
        let marked = Timestamp::now();
        let began = marked - procfs::age(*init);
        tracing::warn!(%container, "its entry point ran before its marks were in place");
        let (container, pid) = (container.clone(), init.pid);
        self.report(SensorEvent::Unarmed { container, pid, began, marked });
    }

    /// Counts a loss and requests the scans that make up for it. Reports it once until that
    /// scan has begun.
    pub(crate) fn lose(&self, failure: Failure, watched: Option<&Arc<Watched>>, detail: &str) {
        // The reaction to every failure of the watchers is a rescan.
        let _ = self.health.record(failure);
        // Taken before the scan is requested: a scan that begins later makes up for the loss.
        let at = Timestamp::now();
        // Each failure is noted by itself: a flood of one must not hide another.
        let is_first = |watched: &Arc<Watched>| {
            watched.ask_for_rescan();
            watched.note_loss(failure)
        };
        let is_first = match watched {
            Some(watched) => is_first(watched),
            None => self.table.all().iter().filter(|watched| is_first(watched)).count() > 0,
        };
        if is_first {
            let container = watched.map(|watched| watched.container.clone());
            tracing::warn!(
                failure = failure.name(),
                container = container.as_ref().map(tracing::field::display),
                "{detail}"
            );
            self.report(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
        }
        self.wake_scan();
    }

    /// Sends a report that must not be dropped, without waiting: if there is no room, the
    /// scan thread sends it later.
    pub(crate) fn report(&self, report: SensorEvent) {
        if let Err(TrySendError::Full(report)) = self.reports.try_send(Box::new(report)) {
            let _ = self.health.record(Failure::PipelineFull);
            let mut unsent = self.unsent_losses();
            // There are few for each container between two of its scans. More are counted,
            // and the scan makes up for them too.
            if unsent.len() < MAX_UNSENT_LOSSES {
                unsent.push(*report);
            }
        }
    }

    /// Reports that less is seen from now on, until [`restore`](Core::restore) or the end of
    /// the container. Each call sends a report: the caller must report a change only once. No
    /// scan is requested, because it would not help.
    pub(crate) fn degrade(&self, failure: Failure, watched: Option<&Watched>, detail: &str) {
        let _ = self.health.record(failure);
        let container = watched.map(|watched| watched.container.clone());
        tracing::warn!(
            failure = failure.name(),
            container = container.as_ref().map(tracing::field::display),
            "{detail}"
        );
        let at = Timestamp::now();
        self.report(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
    }

    /// Reports that a degradation is over.
    pub(crate) fn restore(&self, failure: Failure, watched: Option<&Watched>) {
        let container = watched.map(|watched| watched.container.clone());
        self.report(SensorEvent::Over { failure, container });
    }

    fn unsent_losses(&self) -> MutexGuard<'_, Vec<SensorEvent>> {
        self.unsent_losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends the losses for which there was no room, for the scan thread only.
    pub(crate) fn report_losses(&self) {
        let unsent = std::mem::take(&mut *self.unsent_losses());
        for lost in unsent {
            if !self.report_patiently(lost) {
                return;
            }
        }
    }

    /// Sends without waiting. Returns the report if there is no room.
    #[expect(clippy::result_large_err, reason = "the report is the caller's own, handed back")]
    pub(crate) fn try_report(&self, report: SensorEvent) -> Result<(), SensorEvent> {
        match self.reports.try_send(Box::new(report)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(report)) => Err(*report),
        }
    }

    /// Waits for room in the pipeline, for the scan thread only. True if the report was sent.
    #[must_use]
    pub(crate) fn report_patiently(&self, report: SensorEvent) -> bool {
        let mut report = Box::new(report);
        let deadline = Instant::now() + PATIENCE;
        while !self.is_stopping() {
            let sent = || self.reports.send_timeout(report, Duration::from_millis(100));
            match threads::blocked(sent) {
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

    /// Whether the pipeline has enough room for reports that can wait.
    pub(crate) fn has_room(&self) -> bool {
        match self.reports.capacity() {
            Some(capacity) => self.reports.len() <= capacity / 2,
            None => true,
        }
    }
}
