//! Whether the view is complete: every way to see less has a stable name, a counter and one
//! reaction.
//!
//! Rooms record their losses here; `status`, metrics and gaps show them.
//! `docs/operating.md` lists every name. The daemon's threads and the gate's counters are
//! reached from here too.

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
    /// More processes waited to be examined than may wait.
    ProcessQueueFull,
    /// More observations waited for the pipeline than may wait.
    PipelineFull,
    /// A fanotify event could not be read or decoded.
    EventUnreadable,
    /// The overlay of a container could not be marked.
    MarkRefused,
    /// A directory of the upperdir could not be scanned.
    ScanIncomplete,
    /// The event stream of containerd ended.
    ContainerdLost,
    /// An image could not be resolved, or its layers could not be read.
    BaselineUnavailable,
    /// A baseline file did not match its checksum and was set aside.
    BaselineCorrupt,
    /// The content store's copy of a layer does not match its digest.
    BlobCorrupt,
    /// More observations waited for a baseline than may wait.
    BaselineBacklogFull,
    /// The history could not be written.
    HistoryWrite,
    /// More responses were requested than may wait.
    ResponseQueueFull,
    /// A container has more findings than are kept: a new one was not reported.
    FindingsFull,
    /// The kernel dropped records of execs and mappings: its ring buffer was full.
    TraceLost,
    /// A mount of a container could not be marked, or it has more than are marked.
    MountsFull,
    /// More directories are in upper layers than are marked.
    NamesFull,
    /// A container's entry point ran before its marks were in place.
    ArmedLate,
    /// More libraries, scripts and shells waited to be examined than may wait.
    CodeQueueFull,
    /// containerd reported more execs than there was room for.
    ExecEventsFull,
    /// The gate had answered more executions than the daemon had taken.
    GateQueueFull,
    /// The memory of a process could not be read: its lock was held for long.
    ProcessUnreadable,
    /// A file of an upper layer has an older time than the layer: the clock was set back, and
    /// until then the file was taken for one of the image.
    ClockSet,
    /// An item of a container waited too long to be examined.
    FindingsDelayed,
    /// A thread was busy with one item for seconds and made no progress.
    ThreadStuck,
    /// The history had more bytes than it may: the least severe findings of the container
    /// with the most bytes were dropped.
    HistoryFull,
    /// The history's file was removed or replaced while driftd ran.
    HistoryGone,
    /// driftd did not run for a time.
    NotRunning,
    /// A process or another machine serves a container's layers: the gate has no mark there,
    /// and the content of the layers is not read.
    ForeignLayers,
    /// An execution that rules may deny was answered without a decision.
    Undecided,
    /// Evidence was not taken: the store is full, or too much waits.
    EvidenceRefused,
    /// Evidence was cut by its deadline, or by a disk that is nearly full.
    EvidenceCut,
    /// An answer did not wait any longer for evidence that comes before it.
    EvidenceLate,
    /// Evidence could not be kept, because of an error.
    EvidenceFailed,
}

/// What is done about a [`Failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// Scan the affected containers again: files are not lost for good.
    Rescan,
    /// Try again, by itself, until it works.
    Retry,
    /// Go on, and report in `status` that the view is incomplete.
    Degrade,
}

impl Failure {
    pub const ALL: [Failure; 35] = [
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
        Failure::Undecided,
        Failure::EvidenceRefused,
        Failure::EvidenceCut,
        Failure::EvidenceLate,
        Failure::EvidenceFailed,
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
            Failure::Undecided => "undecided",
            Failure::EvidenceRefused => "evidence_refused",
            Failure::EvidenceCut => "evidence_cut",
            Failure::EvidenceLate => "evidence_late",
            Failure::EvidenceFailed => "evidence_failed",
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
            | Failure::Undecided
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
            | Failure::ForeignLayers
            | Failure::EvidenceRefused
            | Failure::EvidenceCut
            | Failure::EvidenceLate
            | Failure::EvidenceFailed => Reaction::Degrade,
        }
    }
}

/// The mode of the gate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gating {
    /// The value of `watch.gate` that is in effect.
    pub mode: &'static str,
    /// Why this is not the value of the settings.
    pub instead: Option<String>,
}

/// A failure that makes the view incomplete.
#[derive(Debug)]
struct Lasting {
    detail: String,
    /// When it ends; `None`: when `Health::end` is called.
    until: Option<Instant>,
}

/// How long the view counts as incomplete after a loss that is not made good.
const RECENT: Duration = Duration::from_secs(60);

/// One counter for each failure.
#[derive(Debug)]
struct Counts([AtomicU64; Failure::ALL.len()]);

impl Default for Counts {
    fn default() -> Counts {
        Counts(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// The counters, one per failure, shared by every thread.
#[derive(Debug, Default)]
pub struct Health {
    counts: Counts,
    lasting: Mutex<BTreeMap<&'static str, Lasting>>,
    /// The daemon's threads: their queues, and whether they make progress.
    pub threads: Threads,
    /// Known once the daemon has begun to watch.
    pub gating: OnceLock<Gating>,
    /// The counters of the gate, once it has been started.
    pub pulse: OnceLock<Arc<Pulse>>,
    /// Writes of files that are not programs: seen and counted, but not reported.
    pub data_writes: AtomicU64,
    /// Changes that were left to a scan, because too many came at once. No change is lost,
    /// but the process that made it is not known.
    pub left_to_sweeps: AtomicU64,
    /// Executions in containers whose arguments the kernel had no room to record. They are
    /// reported, without their arguments if those were not read in time.
    pub arguments_unrecorded: AtomicU64,
    /// The same for the host's own programs, which are not reported.
    pub arguments_unrecorded_of_host: AtomicU64,
    /// New findings since the start, by the names of their kind and severity.
    found: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    /// What this kernel lacks, as found when the daemon started.
    pub missing: OnceLock<Vec<Missing>>,
    /// Lists what waits to be examined, once the daemon has begun to watch.
    pub backlogs: OnceLock<Backlogs>,
}

impl Health {
    /// Counts a failure and returns its reaction, so that no caller can have one without the
    /// other.
    #[must_use]
    pub fn record(&self, failure: Failure) -> Reaction {
        self.counts.0[failure as usize].fetch_add(1, Ordering::Relaxed);
        failure.reaction()
    }

    /// A failure that lasts begins, in a room that cannot report to the pipeline. The view is
    /// incomplete until it is over.
    pub fn begin(&self, failure: Failure, detail: &str) {
        let lasting = Lasting { detail: detail.to_owned(), until: None };
        self.lasting().insert(failure.name(), lasting);
    }

    /// A failure that lasts is over.
    pub fn end(&self, failure: Failure) {
        self.lasting().remove(failure.name());
    }

    /// A failure that is not made good: the view is incomplete for a minute.
    pub fn happened(&self, failure: Failure, detail: &str) {
        self.happened_at(failure, detail, Instant::now());
    }

    fn happened_at(&self, failure: Failure, detail: &str, now: Instant) {
        let lasting = Lasting { detail: detail.to_owned(), until: Some(now + RECENT) };
        self.lasting().insert(failure.name(), lasting);
    }

    /// The failures that last, each with its detail and name.
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
        self.counts.0[failure as usize].load(Ordering::Relaxed)
    }

    fn in_pulse(&self, counter: fn(&Pulse) -> &AtomicU64) -> u64 {
        self.pulse.get().map_or(0, |pulse| counter(pulse).load(Ordering::SeqCst))
    }

    /// Executions that the gate has answered.
    pub fn gate_answers(&self) -> u64 {
        self.in_pulse(Pulse::answers) + self.in_pulse(Pulse::unchanged)
    }

    /// Files that the free gate has marked to be ignored.
    pub fn gate_ignored(&self) -> u64 {
        self.in_pulse(Pulse::ignored)
    }

    /// Files of the image that were about to be changed, and are asked about again.
    pub fn copy_ups(&self) -> u64 {
        self.in_pulse(Pulse::copy_ups)
    }

    /// Programs that rules have denied, and those that were answered without a decision.
    pub fn denied(&self) -> (u64, u64) {
        (self.in_pulse(Pulse::denied), self.in_pulse(Pulse::undecided))
    }

    /// Files about whose reading the kernel asks, and those about which it cannot.
    pub fn guarded(&self) -> (u64, u64) {
        (self.in_pulse(Pulse::guarded), self.in_pulse(Pulse::unguarded))
    }

    /// Reads of such files that were allowed without a decision.
    pub fn reads_undecided(&self) -> u64 {
        self.in_pulse(Pulse::unread)
    }

    /// What waits to be examined, the oldest first.
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

/// A function that lists what waits to be examined.
pub struct Backlogs(pub Box<dyn Fn() -> Vec<Backlog> + Send + Sync>);

impl std::fmt::Debug for Backlogs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Backlogs")
    }
}

/// The items of one container that wait in one stage. Its findings are delayed by as much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backlog {
    pub stage: &'static str,
    pub container: String,
    pub waiting: usize,
    pub oldest: Duration,
}

/// The stages in which items can wait.
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

/// How long an item may wait before the view counts as incomplete.
pub const LATE: Duration = Duration::from_secs(10);

impl Backlog {
    pub fn is_late(&self) -> bool {
        self.oldest >= LATE
    }
}

/// A feature that this kernel lacks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    pub name: String,
    /// The kernel and settings that have it.
    pub since: String,
    /// What driftd cannot do without it.
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
        health.happened_at(Failure::ExecEventsFull, "execs were not reported", now);
        let (first, last) = (
            "execs were not reported (exec_events_full)".to_owned(),
            "the disk is full (history_write)".to_owned(),
        );
        assert_eq!(health.problems_at(now + RECENT / 2), [first, last.clone()]);
        assert_eq!(health.problems_at(now + RECENT), [last]);
        health.end(Failure::HistoryWrite);
        assert_eq!(health.problems_at(now), [""; 0]);
    }
}
