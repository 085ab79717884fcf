//! One container: its record, its runs, its baseline, and how it is watched. It also
//! distinguishes the runs of a container, and the container from a former one with its ID.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::findings::{Findings, is_of_one_file};
use super::members::{Aspect, Members, Reported};
use super::writers::Writers;
use crate::baseline::ImageBaseline;
use crate::budget::Waiting;
use crate::model::{
    Answer, ChainId, Container, FileTime, Finding, FindingId, Incarnation, Kind, LayerId, Outcome,
    ProcessIdentity, RootfsPath,
};

/// Runs of one container that have ended and are remembered as such.
const MAX_ENDED: usize = 64;
/// Responses to processes of one run that are remembered, and refusals of others.
const MAX_ANSWERS: usize = 1024;
/// The hooks among them, and those of them that wait or are to be tried again.
const MAX_HOOKS: usize = 256;
const MAX_WAITING_HOOKS: usize = 16;

/// Everything about one container.
#[derive(Debug, Default)]
pub struct Entry {
    /// The runtime's record; a task may be seen before it.
    pub container: Option<Container>,
    pub run: CurrentRun,
    /// The container that had this ID before. Observations of it that arrive late are judged
    /// by its image.
    pub(super) former: Option<Box<Former>>,
    pub baseline: Baseline,
    pub watch: Watch,
    /// Its record is gone. The entry is forgotten once the last scan is over.
    pub removed: bool,
    /// The last kill that was carried out, until the container is seen to run again.
    pub killed: Option<Box<Killed>>,
    pub findings: Findings,
    /// The files that aggregated findings count.
    pub members: Members,
    pub writers: Writers,
    /// Observations that wait for the baseline.
    pub backlog: Waiting,
}

/// The run of the container, and those that have ended.
#[derive(Debug, Default)]
pub struct CurrentRun {
    /// The init process, while it runs.
    pub pid: Option<u32>,
    /// The same with its start time, once that is known.
    pub init: Option<ProcessIdentity>,
    /// When it began, if driftd saw that.
    pub began_at: Option<Timestamp>,
    /// The responses that rules request for this run and its processes, oldest first.
    answers: VecDeque<Answering>,
    /// The init processes of runs that have ended, the newest last.
    ended: VecDeque<u32>,
}

/// What the container is compared with.
#[derive(Debug, Default)]
pub struct Baseline {
    pub state: BaselineState,
    /// Files of the image that start the container.
    pub entry_point: Vec<RootfsPath>,
    /// Up to when the layers on disk are known to equal the baseline.
    pub unchanged_since: Option<FileTime>,
    /// Since when there is no baseline, for whatever reasons.
    pub missing_since: Option<Timestamp>,
}

/// Whether and since when the sensors watch the container.
#[derive(Debug, Default)]
pub struct Watch {
    pub state: WatchState,
    /// Whether the gate was in place before the entry point of the newest run.
    pub armed_before_start: bool,
    /// The init of the last run whose entry point ran before its marks were in place.
    pub unarmed_run: Option<u32>,
    /// Why programs that the next scan finds may have run unobserved.
    pub blind_spot: Option<&'static str>,
    /// Attached since the last listing began: no extra scan is due.
    pub fresh: bool,
    /// The run whose executions wait for decisions, how long, and whether they are denied then.
    pub enforced: Option<(u32, Duration, bool)>,
}

/// An automatic response to one run, or to one process of it. It is requested once, and again as
/// long as it fails.
#[derive(Clone, Debug)]
pub struct Answering {
    /// Its number among all.
    pub number: u64,
    pub action: Answer,
    pub incarnation: Incarnation,
    /// The process that is meant, if it is not the whole run.
    pub process: Option<ProcessIdentity>,
    /// Which hook, if it is one.
    pub hook: Option<String>,
    pub kind: Kind,
    pub finding: FindingId,
    /// The rule that asks for it.
    pub rule: String,
    /// The request that is being carried out.
    pub ticket: Option<u64>,
    /// How often it has failed.
    pub failures: u32,
    /// When it is requested again.
    pub due: Option<Timestamp>,
    /// Until when it stays refused by a limit.
    pub refused: Option<Timestamp>,
}

/// A kill that was carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    pub incarnation: Incarnation,
    pub finding: Option<FindingId>,
    pub outcome: Outcome,
}

/// A container whose ID has been given to another one.
#[derive(Debug, Default)]
pub(super) struct Former {
    ended: VecDeque<u32>,
    container: Option<Container>,
    baseline: BaselineState,
    entry_point: Vec<RootfsPath>,
}

/// The state of a container's baseline.
#[derive(Debug, Default)]
pub enum BaselineState {
    /// Not requested yet: the runtime's record is not there.
    #[default]
    Unknown,
    Pending(ChainId),
    Ready(Arc<ImageBaseline>),
    /// Recording failed; it is tried again at the next listing.
    Failed(ChainId, String),
    /// There cannot be one.
    None(String),
}

impl BaselineState {
    pub fn describe(&self) -> String {
        match self {
            BaselineState::Unknown | BaselineState::Pending(_) => "pending".into(),
            BaselineState::Ready(_) => "ready".into(),
            BaselineState::Failed(_, reason) | BaselineState::None(reason) => {
                format!("none: {reason}")
            }
        }
    }
}

/// Whether the gate watches a container.
#[derive(Debug, Default)]
pub enum WatchState {
    #[default]
    No,
    Requested,
    Attached {
        before_start: bool,
    },
    Refused(String),
}

impl CurrentRun {
    pub fn answers(&self) -> impl Iterator<Item = &Answering> {
        self.answers.iter()
    }

    pub fn answers_mut(&mut self) -> impl Iterator<Item = &mut Answering> {
        self.answers.iter_mut()
    }

    /// Makes room for a response. The oldest one that is over gives way: to a process, or a
    /// refusal. A response to the whole run always has room. False if there is none.
    pub fn make_room(&mut self, is_whole: bool) -> bool {
        if self.answers.len() >= MAX_ANSWERS {
            let is_over = |one: &Answering| {
                let is_kept = one.process.is_none() && one.refused.is_none();
                !is_kept && one.ticket.is_none() && one.due.is_none()
            };
            match self.answers.iter().position(is_over) {
                Some(at) => drop(self.answers.remove(at)),
                None => return is_whole,
            }
        }
        true
    }

    /// Makes room for a hook, so that hooks do not take the room of other answers: the oldest one
    /// that has ended is forgotten. False if too many wait.
    pub fn make_room_for_hook(&mut self) -> bool {
        let is_hook = |one: &&Answering| one.action == Answer::Hook;
        let is_waiting = |one: &&Answering| one.ticket.is_some() || one.due.is_some();
        if self.answers.iter().filter(is_hook).filter(is_waiting).count() >= MAX_WAITING_HOOKS {
            return false;
        }
        if self.answers.iter().filter(is_hook).count() >= MAX_HOOKS {
            let is_over = |one: &Answering| is_hook(&one) && !is_waiting(&one);
            let oldest = self.answers.iter().position(is_over);
            oldest.map(|at| self.answers.remove(at));
        }
        self.make_room(true)
    }

    pub fn remember_answer(&mut self, answer: Answering) {
        self.answers.push_back(answer);
    }

    /// The run goes on: it may be paused again.
    pub fn is_not_paused(&mut self) {
        let is_done = |one: &Answering| one.ticket.is_none() && one.due.is_none();
        self.forget_answers(|one| {
            one.action == Answer::Pause && one.refused.is_none() && is_done(one)
        });
    }

    pub fn forget_answers(&mut self, is_meant: impl Fn(&Answering) -> bool) {
        self.answers.retain(|answer| !is_meant(answer));
    }
}

impl Watch {
    pub fn is_attached(&self) -> bool {
        matches!(self.state, WatchState::Attached { .. })
    }

    /// Whether the sensors take commands for the container.
    pub fn takes_commands(&self) -> bool {
        matches!(self.state, WatchState::Requested | WatchState::Attached { .. })
    }
}

impl Entry {
    /// A run has begun whose init has this pid.
    pub fn began(&mut self, pid: u32) {
        if self.run.pid == Some(pid) {
            return;
        }
        // The run may have been seen, and a response requested, before containerd reported it.
        let mut answers = std::mem::take(&mut self.run.answers);
        answers.retain(|answer| answer.incarnation.pid == pid);
        self.run_ended();
        self.run.answers = answers;
        self.run.ended.retain(|ended| *ended != pid);
        if let Some(former) = &mut self.former {
            former.ended.retain(|ended| *ended != pid);
        }
        self.run.pid = Some(pid);
        self.run.began_at = None;
    }

    /// The run is over, and with it the responses that were requested for it. Returns the pid of
    /// its init, if there was one.
    pub fn run_ended(&mut self) -> Option<u32> {
        self.run.init = None;
        self.run.answers.clear();
        let pid = self.run.pid.take()?;
        if self.run.ended.len() == MAX_ENDED {
            self.run.ended.pop_front();
        }
        self.run.ended.push_back(pid);
        Some(pid)
    }

    /// The run that there is, if there is one.
    pub fn incarnation(&self) -> Option<Incarnation> {
        let pid = self.run.pid?;
        let start_time = self.run.init.filter(|init| init.pid == pid).map(|init| init.start_time);
        Some(Incarnation { pid, start_time, created_at: self.created_at() })
    }

    /// The run with this init; `None` if it has ended. A run that containerd has not
    /// reported yet counts as running: the call of its runtime was seen first.
    pub fn incarnation_of(&self, init: ProcessIdentity) -> Option<Incarnation> {
        let is_there = self.run.pid == Some(init.pid);
        let is_over = if is_there {
            // The same pid once more.
            self.run.init.is_some_and(|known| known.start_time > init.start_time)
        } else {
            let before = self.former.iter().flat_map(|former| &former.ended);
            self.run.ended.iter().chain(before).any(|ended| *ended == init.pid)
        };
        let start_time = Some(init.start_time);
        let created_at = self.created_at().filter(|_| is_there);
        (!is_over).then_some(Incarnation { pid: init.pid, start_time, created_at })
    }

    /// The name of the run with this init, whether it is there or not.
    pub fn run_of(&self, init: ProcessIdentity) -> Incarnation {
        let ProcessIdentity { pid, start_time } = init;
        Incarnation { pid, start_time: Some(start_time), created_at: self.created_at() }
    }

    fn created_at(&self) -> Option<Timestamp> {
        self.container.as_ref().and_then(|container| container.created_at)
    }

    /// Another container has this ID now. Nothing is known of it yet.
    pub fn replaced(&mut self) {
        self.run_ended();
        self.killed = None;
        let before = self.former.take().map(|former| former.ended).unwrap_or_default();
        let mut ended: VecDeque<u32> = before.into_iter().chain(self.run.ended.drain(..)).collect();
        ended.drain(..ended.len().saturating_sub(MAX_ENDED));
        self.former = Some(Box::new(Former {
            ended,
            container: self.container.take(),
            baseline: std::mem::take(&mut self.baseline.state),
            entry_point: std::mem::take(&mut self.baseline.entry_point),
        }));
        self.baseline.unchanged_since = None;
        self.baseline.missing_since = None;
    }

    /// Whether no later run has begun than the one with this init, which may be over.
    pub fn is_newest_run(&self, pid: u32) -> bool {
        self.run.pid.or(self.run.ended.back().copied()) == Some(pid)
    }

    /// Whether a run with this init was one of the container that had this ID before.
    pub fn is_of_former(&self, init: ProcessIdentity) -> bool {
        self.run.pid != Some(init.pid)
            && self.former.as_ref().is_some_and(|former| former.ended.contains(&init.pid))
    }

    pub fn has_former(&self) -> bool {
        self.former.is_some()
    }

    /// Exchanges the container that had this ID before and the one that has it now.
    pub fn swap_with_former(&mut self) {
        if let Some(former) = &mut self.former {
            std::mem::swap(&mut former.container, &mut self.container);
            std::mem::swap(&mut former.baseline, &mut self.baseline.state);
            std::mem::swap(&mut former.entry_point, &mut self.baseline.entry_point);
        }
    }

    /// Adds a finding, and remembers what it shows of members and writers.
    pub fn insert_finding(&mut self, finding: Finding) {
        if let Some(file) = &finding.file
            && finding.files.is_none()
            && !is_of_one_file(&finding, file)
        {
            // The first of what may be many.
            let reported = Reported::of_file(finding.kind, file);
            self.members.put(Aspect::of_finding(&finding), &file.path, finding.id, reported);
        }
        if finding.kind == Kind::FileAdded
            && !finding.verdict.is_accept()
            && finding.files.is_none()
            && let (Some(file), Some(writer)) = (&finding.file, &finding.process)
            && let Some(content) = file.blake3
        {
            self.writers.remember_linked(content, writer);
        }
        if finding.kind == Kind::PackageTransaction
            && let Some(process) = &finding.process
        {
            let process = Arc::new(process.clone());
            let began = finding.first_seen;
            let _ = self.writers.remember_package_manager(&process, None, began, |_, _| false);
        }
        self.findings.insert(finding);
    }

    /// Whether this socket of containerd has the container.
    pub fn belongs_to(&self, endpoint: &str) -> bool {
        self.container.as_ref().is_some_and(|container| *container.endpoint == *endpoint)
    }

    pub fn chain_id(&self) -> Option<ChainId> {
        self.container.as_ref().and_then(Container::chain_id)
    }

    /// Whether the container uses `layer` from one of these directories. If there are none,
    /// any directory counts.
    pub fn has_layer(&self, layer: LayerId, directories: &[PathBuf]) -> bool {
        let is_there = |directory: &Option<PathBuf>| {
            directories.is_empty()
                || directory.as_ref().is_some_and(|own| directories.contains(own))
        };
        let container = self.container.as_ref().filter(|_| !self.removed);
        container.is_some_and(|container| {
            container.layers.iter().any(|own| own.id == layer && is_there(&own.directory))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn init(pid: u32, start_time: u64) -> ProcessIdentity {
        ProcessIdentity { pid, start_time }
    }

    #[test]
    fn x11_a_run_that_has_ended_is_never_taken_for_a_later_one() {
        let mut entry = Entry::default();
        let runs = |entry: &Entry, one| entry.incarnation_of(one).is_some();
        assert!(runs(&entry, init(7, 100)), "armed, and containerd has not reported it yet");
        entry.began(7);
        assert!(runs(&entry, init(7, 100)));
        entry.run.init = Some(init(7, 100));
        assert!(entry.run_ended().is_some());
        assert!(entry.run_ended().is_none() && !runs(&entry, init(7, 100)));
        entry.began(8);
        assert!(!runs(&entry, init(7, 100)) && runs(&entry, init(8, 200)));
        assert!(runs(&entry, init(9, 300)), "the next one");
        // The same pid once more, for another process.
        entry.began(7);
        entry.run.init = Some(init(7, 400));
        assert!(!runs(&entry, init(8, 200)));
        assert!(!runs(&entry, init(7, 100)) && runs(&entry, init(7, 400)));
        // Another container of the same ID.
        entry.replaced();
        entry.began(10);
        assert!(!runs(&entry, init(7, 400)) && !runs(&entry, init(8, 200)));
        assert!(entry.is_of_former(init(7, 400)) && !entry.is_of_former(init(10, 500)));
        assert_eq!(entry.incarnation().map(|run| (run.pid, run.start_time)), Some((10, None)));
    }
}
