//! What the watchers' threads have in common: the table, the way out, the flag
//! that ends them, and the one place where a loss is counted and answered.

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
use super::table::Table;
use super::watched::Watched;
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{ProcessIdentity, RootfsPath};
use crate::sys::procfs;
use crate::threads;

/// What a queue has for its thread.
pub(crate) enum Next<T> {
    Item(T),
    /// Nothing came in time.
    Nothing,
    /// The thread is to end.
    End,
}

/// What every thread of the watchers shares.
pub(crate) struct Core {
    pub(crate) settings: config::Watch,
    pub(crate) table: Table,
    pub(crate) health: Arc<Health>,
    reports: Sender<Box<SensorEvent>>,
    unsent_losses: Mutex<Vec<SensorEvent>>,
    /// Where executions and code wait for a thread.
    pub(crate) stages: OnceLock<Vec<(&'static str, Arc<dyn Waits>)>>,
    /// What reading and walking may take of the processors, for all containers.
    pace: Mutex<Pace>,
    wake_scan: Sender<()>,
    stopped_at: OnceLock<Instant>,
    /// What threads had taken from their queues when there was no more time for it.
    untold: AtomicU64,
    /// Readable once the watchers are to stop.
    end: OwnedFd,
    /// Of the thread that is asked before a runtime runs, if there is one.
    pub(crate) arming: Arming,
    /// Since when containers are watched, as processes tell when they started.
    began: u64,
}

/// What is known of the thread that is asked before a runtime runs.
#[derive(Debug, Default)]
pub(crate) struct Arming {
    /// Since when, in the clock ticks by which processes tell when they started;
    /// unset without such a thread.
    pub(crate) since: OnceLock<u64>,
}

/// Reading large files and walking takes at most one processor in so many, when what
/// it saved up is used.
const PART: u32 = 2;
const BURST: Duration = Duration::from_secs(2);

/// Losses that wait for room in the pipeline.
const MAX_UNSENT_LOSSES: usize = 1024;

/// How long a scan waits for room in the pipeline before it gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a stop waits for what was seen before it.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(4);

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
            stopped_at: OnceLock::new(),
            untold: AtomicU64::new(0),
            end,
            arming: Arming::default(),
            began: procfs::ticks_since_boot(),
        })
    }

    /// The first half of a stop; the thread of session activity is to be woken too.
    pub(crate) fn begin_stop(&self) {
        let _ = self.stopped_at.set(Instant::now());
        // Full, it is readable already.
        let _ = rustix::io::write(&self.end, &1_u64.to_ne_bytes());
        self.wake_scan();
    }

    /// Whether what was seen is still told: after a stop for a moment more, since no
    /// walk finds what was executed.
    pub(crate) fn may_tell(&self) -> bool {
        self.stopped_at.get().is_none_or(|stopped_at| stopped_at.elapsed() < LAST_WORDS)
    }

    /// The next item of a thread's queue. Whoever fills it ends when the watchers do;
    /// what a stop has no more time for is counted.
    pub(crate) fn next_to_tell<T: Owned>(&self, queue: &fair::Receiver<T>) -> Option<T> {
        match self.next_within(queue, Duration::MAX) {
            Next::Item(item) => Some(item),
            Next::Nothing | Next::End => None,
        }
    }

    /// The same, for as long as `patience`.
    pub(crate) fn next_within<T: Owned>(
        &self,
        queue: &fair::Receiver<T>,
        patience: Duration,
    ) -> Next<T> {
        // A stop makes nobody wait for longer than it takes itself.
        match queue.recv_timeout(patience) {
            Ok(item) if self.may_tell() => Next::Item(item),
            Ok(_) => {
                self.leave(1);
                Next::End
            }
            Err(RecvTimeoutError::Timeout) if self.may_tell() => Next::Nothing,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Next::End,
        }
    }

    /// Counts what a stop has no more time for.
    pub(crate) fn leave(&self, items: usize) {
        self.untold.fetch_add(items as u64, Ordering::Relaxed);
    }

    /// What was taken from queues and could not be told before the stop was over.
    pub(crate) fn untold(&self) -> u64 {
        self.untold.load(Ordering::Relaxed)
    }

    /// Says where executions and code wait.
    pub(crate) fn set_stages(&self, stages: Vec<(&'static str, Arc<dyn Waits>)>) {
        let _ = self.stages.set(stages);
    }

    /// Something that can wait has used the processor for so long.
    pub(crate) fn spend(&self, used: Duration) {
        self.pace().spend(used);
    }

    /// How long what can wait has to, so that it takes no more than its part of the
    /// processors.
    pub(crate) fn rest(&self) -> Duration {
        self.pace().wait(Instant::now())
    }

    /// Waits for that long, or until a stop.
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

    /// Somebody has come into a container.
    pub(crate) fn note_session(&self, watched: &Watched) {
        watched.set_has_sessions();
        if let Some(pulse) = self.health.pulse.get() {
            pulse.handles().store(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopped_at.get().is_some()
    }

    /// Waits until there is something to read, or the watchers are to stop.
    pub(crate) fn wait_for(&self, events: impl AsFd, at_most: Option<Duration>) {
        let mut fds = [events.as_fd(), self.end.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let at_most = at_most.and_then(|at_most| Timespec::try_from(at_most).ok());
        // An error here (a signal) only means that the turn comes early.
        let _ = threads::idle(|| rustix::event::poll(&mut fds, at_most.as_ref()));
    }

    /// Waits until the watchers are to stop, or `at_most` so long.
    pub(crate) fn wait_for_stop(&self, at_most: Duration) {
        self.wait_for(&self.end, Some(at_most));
    }

    /// Whether the daemon watched already when this container began.
    pub(crate) fn has_begun_before(&self, init: ProcessIdentity) -> bool {
        init.start_time > self.began
    }

    pub(crate) fn wake_scan(&self) {
        // Full: it has been woken already and has not looked yet.
        let _ = self.wake_scan.try_send(());
    }

    /// Waits until something is so, for a tenth of a second at most.
    pub(crate) fn wait_until(&self, is_so: impl Fn() -> bool) {
        const STEP: Duration = Duration::from_micros(100);
        const AT_MOST: u32 = 1000;
        for _ in 0..AT_MOST {
            if is_so() || self.is_stopping() {
                return;
            }
            std::thread::sleep(STEP);
        }
    }

    /// Whether what a path holds matters, be it a program or not.
    pub(crate) fn is_sensitive(&self, watched: &Watched, path: &RootfsPath) -> bool {
        self.settings.persistence.matches(path)
            || watched.is_entry_point(path)
            || watched.ways.leading_to(path).is_some_and(|as_well| {
                self.settings.persistence.matches(&as_well) || watched.is_entry_point(&as_well)
            })
            || self.known_as(watched, path).is_some()
    }

    /// The sensitive path for which this one stands in the image.
    pub(crate) fn known_as(&self, watched: &Watched, path: &RootfsPath) -> Option<RootfsPath> {
        watched.ways.known_as(path, |as_well| self.settings.persistence.matches(as_well))
    }

    /// Whether what lies below a path may matter, so that it does not stand for itself
    /// if it is a link.
    pub(crate) fn leads_to_sensitive(&self, watched: &Watched, path: &RootfsPath) -> bool {
        let persistence = &self.settings.persistence;
        persistence.leads_to(path)
            || watched.ways.leading_to(path).is_some_and(|path| persistence.leads_to(&path))
    }

    /// A container that began while driftd ran was not marked before its entry point ran.
    pub(crate) fn armed_late(&self, watched: &Watched) {
        let Watched { container, init, .. } = watched;
        let _ = self.health.record(Failure::ArmedLate);
        let marked = Timestamp::now();
        let began = marked - procfs::age(*init);
        tracing::warn!(%container, "its entry point ran before its marks were in place");
        let (container, pid) = (container.clone(), init.pid);
        self.say(SensorEvent::Unarmed { container, pid, began, marked });
    }

    /// Counts a loss, asks for the walks that make up for it, and says so once
    /// until that walk has begun.
    pub(crate) fn lose(&self, failure: Failure, watched: Option<&Arc<Watched>>, detail: &str) {
        // The reaction to every failure of the watchers is a rescan.
        let _ = self.health.record(failure);
        // Before the walk is asked for: one that begins after this makes up for it.
        let at = Timestamp::now();
        // Each failure by itself: a flood of one must not hide another.
        let is_news = |watched: &Arc<Watched>| {
            watched.ask_for_rescan();
            watched.loses(failure)
        };
        let is_news = match watched {
            Some(watched) => is_news(watched),
            None => self.table.all().iter().filter(|watched| is_news(watched)).count() > 0,
        };
        if is_news {
            let container = watched.map(|watched| watched.container.clone());
            tracing::warn!(
                failure = failure.name(),
                container = container.as_ref().map(tracing::field::display),
                "{detail}"
            );
            self.say(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
        }
        self.wake_scan();
    }

    /// Says what must not be dropped, without waiting: where there is no room, the scan
    /// thread says it later.
    pub(crate) fn say(&self, report: SensorEvent) {
        if let Err(TrySendError::Full(report)) = self.reports.try_send(Box::new(report)) {
            let _ = self.health.record(Failure::PipelineFull);
            let mut unsent = self.unsent_losses();
            // There are few for each container between two walks of it; more are
            // counted, and the walk makes up for them all the same.
            if unsent.len() < MAX_UNSENT_LOSSES {
                unsent.push(*report);
            }
        }
    }

    /// Says that less is seen from now on, once for each caller's news, until
    /// [`restore`](Core::restore) says that this is over or the container ends. No
    /// walk is asked for: it would not help.
    pub(crate) fn degrade(&self, failure: Failure, watched: Option<&Watched>, detail: &str) {
        let _ = self.health.record(failure);
        let container = watched.map(|watched| watched.container.clone());
        tracing::warn!(
            failure = failure.name(),
            container = container.as_ref().map(tracing::field::display),
            "{detail}"
        );
        let at = Timestamp::now();
        self.say(SensorEvent::Lost { failure, container, detail: detail.to_owned(), at });
    }

    /// What was degraded is seen again.
    pub(crate) fn restore(&self, failure: Failure, watched: Option<&Watched>) {
        let container = watched.map(|watched| watched.container.clone());
        self.say(SensorEvent::Over { failure, container });
    }

    fn unsent_losses(&self) -> MutexGuard<'_, Vec<SensorEvent>> {
        self.unsent_losses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the losses that found no room, for the scan thread only.
    pub(crate) fn report_losses(&self) {
        let unsent = std::mem::take(&mut *self.unsent_losses());
        for lost in unsent {
            if !self.report_patiently(lost) {
                return;
            }
        }
    }

    /// Sends without waiting and hands the report back if there is no room.
    #[expect(clippy::result_large_err, reason = "the report is the caller's own, handed back")]
    pub(crate) fn try_report(&self, report: SensorEvent) -> Result<(), SensorEvent> {
        match self.reports.try_send(Box::new(report)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => Ok(()),
            Err(TrySendError::Full(report)) => Err(*report),
        }
    }

    /// Waits for room in the pipeline, for the scan thread only. Whether it was
    /// sent.
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

    /// Whether the pipeline has caught up enough for what can wait.
    pub(crate) fn has_room(&self) -> bool {
        match self.reports.capacity() {
            Some(capacity) => self.reports.len() <= capacity / 2,
            None => true,
        }
    }
}
