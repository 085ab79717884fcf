//! Is the view complete? Every way to see less has a stable name, a counter and
//! one planned reaction.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::pulse::Pulse;
use crate::threads::Threads;

/// Ways in which the daemon can see or keep less than it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Failure {
    /// The kernel dropped fanotify events (`FAN_Q_OVERFLOW`).
    KernelQueueOverflow,
    /// More executed files waited to be hashed than may wait.
    ContentQueueFull,
    /// More processes waited to be looked at than may wait.
    ProcessQueueFull,
    /// More observations waited for the pipeline than may wait.
    PipelineFull,
    /// A fanotify event could not be read or understood.
    EventUnreadable,
    /// The overlay of a container could not be marked.
    MarkRefused,
    /// A directory of the upperdir could not be walked.
    ScanIncomplete,
    /// The event stream of containerd ended.
    ContainerdLost,
    /// An image could not be resolved or its layers not be read.
    BaselineUnavailable,
    /// A baseline file did not match its checksum and was set aside.
    BaselineCorrupt,
    /// The content store's copy of a layer is not what its digest says.
    BlobCorrupt,
    /// More observations waited for a baseline than may wait.
    BaselineBacklogFull,
    /// The history could not be written.
    HistoryWrite,
    /// More responses were asked for than may wait.
    ResponseQueueFull,
    /// A container has more findings than are kept: a new one was not told.
    FindingsFull,
    /// The kernel dropped records of execs and mappings: its ring buffer was full.
    TraceLost,
    /// A mount of a container could not be marked, or it has more than are marked.
    MountsFull,
    /// More directories are in upper layers than are listened to.
    NamesFull,
    /// A container's entry point ran before its marks were in place.
    ArmedLate,
    /// More libraries, scripts and shells waited to be looked at than may wait.
    CodeQueueFull,
    /// containerd told of more execs than there was room for.
    ExecEventsFull,
    /// The gate had answered more executions than the daemon had taken.
    GateQueueFull,
    /// The memory of a process could not be read: something held its lock for long.
    ProcessUnreadable,
    /// A file of an upper layer looks older than the layer: the clock was set back, and
    /// until then it passed for a file of the image.
    ClockSet,
    /// Something of a container waited for too long to be looked at.
    FindingsDelayed,
    /// A thread was busy with one item for seconds and made no progress.
    ThreadStuck,
    /// The history holds more bytes than it may: the least severe of the container that
    /// takes most of it was dropped.
    HistoryFull,
    /// The history's file was removed or replaced while driftd ran.
    HistoryGone,
    /// driftd did not run for a time.
    NotRunning,
    /// A container's layers lie where a process or another machine answers: the gate is
    /// not asked there, and what the layers hold is not read.
    ForeignLayers,
}

/// What is done about a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Scan the affected containers again: files are not lost for good.
    Rescan,
    /// Try again, by itself, until it works.
    Retry,
    /// Go on, and say in `status` that the view is incomplete.
    Degrade,
}

impl Failure {
    pub const ALL: [Failure; 30] = [
        Failure::KernelQueueOverflow,
        Failure::ContentQueueFull,
        Failure::ProcessQueueFull,
        Failure::PipelineFull,
        Failure::EventUnreadable,
        Failure::MarkRefused,
        Failure::ScanIncomplete,
        Failure::ContainerdLost,
        Failure::BaselineUnavailable,
        Failure::BaselineCorrupt,
        Failure::BlobCorrupt,
        Failure::BaselineBacklogFull,
        Failure::HistoryWrite,
        Failure::ResponseQueueFull,
        Failure::FindingsFull,
        Failure::TraceLost,
        Failure::MountsFull,
        Failure::NamesFull,
        Failure::ArmedLate,
        Failure::CodeQueueFull,
        Failure::ExecEventsFull,
        Failure::GateQueueFull,
        Failure::ProcessUnreadable,
        Failure::ClockSet,
        Failure::FindingsDelayed,
        Failure::ThreadStuck,
        Failure::HistoryFull,
        Failure::HistoryGone,
        Failure::NotRunning,
        Failure::ForeignLayers,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Failure::KernelQueueOverflow => "kernel_queue_overflow",
            Failure::ContentQueueFull => "content_queue_full",
            Failure::ProcessQueueFull => "process_queue_full",
            Failure::PipelineFull => "pipeline_full",
            Failure::EventUnreadable => "event_unreadable",
            Failure::MarkRefused => "mark_refused",
            Failure::ScanIncomplete => "scan_incomplete",
            Failure::ContainerdLost => "containerd_lost",
            Failure::BaselineUnavailable => "baseline_unavailable",
            Failure::BaselineCorrupt => "baseline_corrupt",
            Failure::BlobCorrupt => "blob_corrupt",
            Failure::BaselineBacklogFull => "baseline_backlog_full",
            Failure::HistoryWrite => "history_write",
            Failure::ResponseQueueFull => "response_queue_full",
            Failure::FindingsFull => "findings_full",
            Failure::TraceLost => "trace_lost",
            Failure::MountsFull => "mounts_full",
            Failure::NamesFull => "names_full",
            Failure::ArmedLate => "armed_late",
            Failure::CodeQueueFull => "code_queue_full",
            Failure::ExecEventsFull => "exec_events_full",
            Failure::GateQueueFull => "gate_queue_full",
            Failure::ProcessUnreadable => "process_unreadable",
            Failure::ClockSet => "clock_set",
            Failure::FindingsDelayed => "findings_delayed",
            Failure::ThreadStuck => "thread_stuck",
            Failure::HistoryFull => "history_full",
            Failure::HistoryGone => "history_gone",
            Failure::NotRunning => "not_running",
            Failure::ForeignLayers => "foreign_layers",
        }
    }

    pub fn reaction(self) -> Reaction {
        match self {
            Failure::KernelQueueOverflow
            | Failure::ContentQueueFull
            | Failure::ProcessQueueFull
            | Failure::PipelineFull
            | Failure::EventUnreadable
            | Failure::TraceLost
            | Failure::CodeQueueFull
            | Failure::ArmedLate
            | Failure::GateQueueFull
            | Failure::ClockSet
            | Failure::NotRunning
            | Failure::BaselineBacklogFull => Reaction::Rescan,
            Failure::ContainerdLost
            | Failure::BaselineCorrupt
            | Failure::HistoryWrite
            | Failure::HistoryGone => Reaction::Retry,
            Failure::MarkRefused
            | Failure::ScanIncomplete
            | Failure::BaselineUnavailable
            | Failure::BlobCorrupt
            | Failure::ResponseQueueFull
            | Failure::FindingsFull
            | Failure::MountsFull
            | Failure::NamesFull
            | Failure::ThreadStuck
            | Failure::ExecEventsFull
            | Failure::ProcessUnreadable
            | Failure::FindingsDelayed
            | Failure::HistoryFull
            | Failure::ForeignLayers => Reaction::Degrade,
        }
    }
}

/// How the node is told of programs that are about to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gating {
    /// The setting's word for what is done.
    pub mode: &'static str,
    /// Why that is not what the settings ask for.
    pub instead: Option<String>,
}

/// A failure that makes the view incomplete.
#[derive(Debug)]
struct Lasting {
    detail: String,
    /// When it does so no more; `None`: when it is said to be over.
    until: Option<Instant>,
}

/// How long the view counts as incomplete after something that nothing makes up for.
const RECENT: Duration = Duration::from_secs(60);

/// The counters, one per failure, shared by every thread.
#[derive(Debug, Default)]
pub struct Health {
    counts: [AtomicU64; Failure::ALL.len()],
    lasting: Mutex<BTreeMap<&'static str, Lasting>>,
    /// The daemon's threads: what waits for them, and whether they make progress.
    pub threads: Threads,
    /// Known once the daemon has begun to watch.
    pub gating: OnceLock<Gating>,
    /// What the gate counts, once it has been started.
    pub pulse: OnceLock<Arc<Pulse>>,
    /// Writes of files that are no programs: seen, counted, not reported.
    pub data_writes: AtomicU64,
    /// Changes that a walk had to find because too many came at once. None of them
    /// is lost but the name of who made it.
    pub left_to_sweeps: AtomicU64,
    /// Executions in containers whose arguments the kernel had no room to record. They are told, and
    /// without their arguments if nobody has read those in time.
    pub arguments_unrecorded: AtomicU64,
    /// The same of the host's own programs, which nobody is told of.
    pub arguments_unrecorded_of_host: AtomicU64,
    /// New findings since the start, by the names of their kind and severity.
    found: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    /// What this kernel lacks, as found when the daemon started.
    pub missing: OnceLock<Vec<Missing>>,
    /// Says what waits to be looked at, once the daemon has begun to watch.
    pub backlogs: OnceLock<Backlogs>,
}

impl Health {
    /// Counts a failure and hands back what to do about it, so that no caller
    /// can do one without the other.
    #[must_use]
    pub fn record(&self, failure: Failure) -> Reaction {
        self.counts[failure as usize].fetch_add(1, Ordering::Relaxed);
        failure.reaction()
    }

    /// A failure that lasts, seen by who cannot tell the pipeline: until it is over,
    /// the view is incomplete.
    pub fn begin(&self, failure: Failure, detail: &str) {
        let lasting = Lasting { detail: detail.to_owned(), until: None };
        self.lasting().insert(failure.name(), lasting);
    }

    /// It is over.
    pub fn end(&self, failure: Failure) {
        self.lasting().remove(failure.name());
    }

    /// A failure that nothing makes up for: the view is incomplete for a while.
    pub fn happened(&self, failure: Failure, detail: &str) {
        self.happened_at(failure, detail, Instant::now());
    }

    fn happened_at(&self, failure: Failure, detail: &str, now: Instant) {
        let lasting = Lasting { detail: detail.to_owned(), until: Some(now + RECENT) };
        self.lasting().insert(failure.name(), lasting);
    }

    /// Failures that last, each with its name.
    pub fn problems(&self) -> Vec<String> {
        self.problems_at(Instant::now())
    }

    fn problems_at(&self, now: Instant) -> Vec<String> {
        let mut lasting = self.lasting();
        lasting.retain(|_, lasting| lasting.until.is_none_or(|until| now < until));
        lasting.iter().map(|(name, Lasting { detail, .. })| format!("{detail} ({name})")).collect()
    }

    fn lasting(&self) -> MutexGuard<'_, BTreeMap<&'static str, Lasting>> {
        self.lasting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count(&self, failure: Failure) -> u64 {
        self.counts[failure as usize].load(Ordering::Relaxed)
    }

    fn in_pulse(&self, counter: fn(&Pulse) -> &AtomicU64) -> u64 {
        self.pulse.get().map_or(0, |pulse| counter(pulse).load(Ordering::SeqCst))
    }

    /// Executions that the gate has answered.
    pub fn gate_answers(&self) -> u64 {
        self.in_pulse(Pulse::answers)
    }

    /// Files that the kernel was told to ask no more about.
    pub fn gate_ignored(&self) -> u64 {
        self.in_pulse(Pulse::ignored)
    }

    /// Files of the image that were about to be changed, and were asked about again.
    pub fn copy_ups(&self) -> u64 {
        self.in_pulse(Pulse::copy_ups)
    }

    /// What waits to be looked at, the oldest first.
    pub fn backlogs(&self) -> Vec<Backlog> {
        let mut all = self.backlogs.get().map(|backlogs| backlogs.0()).unwrap_or_default();
        all.sort_by_key(|backlog| std::cmp::Reverse(backlog.oldest));
        all
    }

    /// Counts a finding that is new.
    pub fn count_finding(&self, kind: &'static str, severity: &'static str) {
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        *found.entry((kind, severity)).or_default() += 1;
    }

    /// New findings since the start: kind, severity and how many.
    pub fn found(&self) -> Vec<(&'static str, &'static str, u64)> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.iter().map(|((kind, severity), count)| (*kind, *severity, *count)).collect()
    }

    /// Every failure that has happened, with its count.
    pub fn losses(&self) -> Vec<Loss> {
        Failure::ALL
            .into_iter()
            .map(|failure| Loss { name: failure.name().into(), count: self.count(failure) })
            .filter(|loss| loss.count > 0)
            .collect()
    }
}

/// Asks what waits to be looked at.
pub struct Backlogs(pub Box<dyn Fn() -> Vec<Backlog> + Send + Sync>);

impl std::fmt::Debug for Backlogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Backlogs")
    }
}

/// What of one container waits in one place: so long its findings are delayed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backlog {
    pub stage: &'static str,
    pub container: String,
    pub waiting: usize,
    pub oldest: Duration,
}

/// Where something may wait.
pub const STAGES: [&str; 9] = [
    "take",
    "describe",
    "content",
    "large",
    "settled",
    "processes",
    "unseen",
    "libraries",
    "interpreters",
];

/// What waits for longer makes the view incomplete.
pub const LATE: Duration = Duration::from_secs(10);

impl Backlog {
    pub fn is_late(&self) -> bool {
        self.oldest >= LATE
    }
}

/// Something that this kernel lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    pub name: String,
    /// Where it comes from.
    pub since: String,
    /// What it means that it is not there.
    pub meaning: String,
}

/// A failure's name and how often it happened since the daemon started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    pub name: String,
    pub count: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_has_its_own_counter_and_name() {
        let health = Health::default();
        for failure in Failure::ALL {
            let _ = health.record(failure);
            assert_eq!(health.count(failure), 1, "{}", failure.name());
        }
        let names: std::collections::BTreeSet<_> = Failure::ALL.map(Failure::name).into();
        assert_eq!(names.len(), Failure::ALL.len());
    }

    #[test]
    fn h02_a_failure_is_a_problem_until_it_is_over_or_was_a_while_ago() {
        let health = Health::default();
        let now = Instant::now();
        health.begin(Failure::HistoryWrite, "the disk is full");
        health.happened_at(Failure::ExecEventsFull, "execs were not told", now);
        let (first, last) = (
            "execs were not told (exec_events_full)".to_owned(),
            "the disk is full (history_write)".to_owned(),
        );
        assert_eq!(health.problems_at(now + RECENT / 2), [first, last.clone()]);
        assert_eq!(health.problems_at(now + RECENT), [last]);
        health.end(Failure::HistoryWrite);
        assert_eq!(health.problems_at(now), [""; 0]);
    }
}
