//! The value that the threads share about processes: births, arguments, sessions, and the
//! channel to the thread `sessions`. It carries [`Core`].
//!
//! It also makes observations and sends them to the pipeline: each observation names the
//! session to which it belongs. A lock here must not be held while something waits.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Sender, TrySendError};
use jiff::Timestamp;

use super::activity::Activity;
use super::arguments::{Arguments, Program, Recorded};
use super::births::Births;
use super::describe;
use super::named::{Named, record_time_of};
use super::roots::{Arrival, Roots};
use crate::health::Failure;
use crate::model::{
    Ancestor, ContainerId, Fact, FileFact, Observation, Process, ProcessIdentity, Source,
};
use crate::sys::procfs::Handle;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::shared::Core;
use crate::watch::core::watched::Watched;

/// How many parents of a process are described by the kernel's records.
const MAX_RECORDED_PARENTS: usize = 16;

/// The shared knowledge of processes, for all containers.
pub(crate) struct Processes {
    pub(crate) core: Arc<Core>,
    roots: Mutex<Roots>,
    activity: Sender<Box<Activity>>,
    arguments: Mutex<Arguments>,
    births: Mutex<Births>,
    records_executions: AtomicBool,
    records_arguments: AtomicBool,
    shows_arrivals: AtomicBool,
}

impl Deref for Processes {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.core
    }
}

impl Processes {
    pub(crate) fn new(core: Arc<Core>, activity: Sender<Box<Activity>>) -> Processes {
        Processes {
            core,
            roots: Mutex::default(),
            activity,
            arguments: Mutex::default(),
            births: Mutex::default(),
            records_executions: AtomicBool::new(false),
            records_arguments: AtomicBool::new(false),
            shows_arrivals: AtomicBool::new(false),
        }
    }

    pub(crate) fn stop(&self) {
        self.core.begin_stop();
        // If the channel is full, its reader is awake.
        let _ = self.activity.try_send(Box::new(Activity::End));
    }

    /// The kernel records every execution for the daemon.
    pub(crate) fn set_records(&self) {
        self.records_executions.store(true, Ordering::Release);
    }

    pub(crate) fn records_executions(&self) -> bool {
        self.records_executions.load(Ordering::Acquire)
    }

    /// The records show each process that comes into a container from outside: they name
    /// overlays, and control groups too.
    pub(crate) fn set_shows_arrivals(&self, shows: bool) {
        self.shows_arrivals.store(shows, Ordering::Release);
    }

    pub(crate) fn shows_arrivals(&self) -> bool {
        self.shows_arrivals.load(Ordering::Acquire)
    }

    /// The kernel records arguments for the daemon.
    pub(crate) fn set_records_arguments(&self) {
        self.records_arguments.store(true, Ordering::Release);
    }

    pub(crate) fn records_arguments(&self) -> bool {
        self.records_arguments.load(Ordering::Acquire)
    }

    /// Completes the description of a process that had ended, or was ending, when it was read:
    /// by the kernel's records.
    pub(crate) fn complete(&self, named: Named, mut known: Process) -> Process {
        let Some(recorded) = self.recorded_process(named) else { return known };
        // What was read while it was ending belongs to the same program, or is missing.
        if known.exe.is_none() || known.exe == recorded.exe {
            known.exe = recorded.exe;
            known.argv = known.argv.or(recorded.argv);
        }
        if known.ancestors.len() < recorded.ancestors.len() {
            known.ancestors = recorded.ancestors;
        }
        known
    }

    /// The same, for a process of which the program or the parents could not be read: it had
    /// ended.
    pub(crate) fn complete_if_ended(&self, named: Named, process: Process) -> Process {
        match process.exe.is_none() || process.ancestors.is_empty() {
            true => self.complete(named, process),
            false => process,
        }
    }

    pub(crate) fn completed(
        &self,
        named: Named,
        process: Option<Arc<Process>>,
    ) -> Option<Arc<Process>> {
        match process {
            Some(known) if known.exe.is_some() && known.argv.is_some() => Some(known),
            Some(known) => Some(Arc::new(self.complete(named, Process::clone(&known)))),
            None => self.recorded_process(named).map(Arc::new),
        }
    }

    /// A process by the kernel's records alone. `None` if it has run nothing lately.
    pub(crate) fn recorded_process(&self, named: Named) -> Option<Process> {
        let mut pids = vec![named.pid];
        let mut are_inside = vec![];
        for birth in self.births().births_above(named).take(MAX_RECORDED_PARENTS) {
            pids.push(birth.parent);
            are_inside.push(birth.home.is_some());
        }
        let at = record_time_of(named.read_at);
        let mut programs: Vec<Option<Program>> = {
            let arguments = self.arguments();
            pids.iter().map(|pid| arguments.running(*pid, at)).collect()
        };
        if programs.iter().all(Option::is_none) {
            // Their programs were executed before the container was watched.
            let unrecorded = |pid: &u32| self.unrecorded_program(Named { pid: *pid, ..named }, at);
            for (program, pid) in programs.iter_mut().zip(&pids) {
                *program = unrecorded(pid);
                if program.is_some() {
                    break;
                }
            }
        }
        // A process that has executed nothing runs its parent's program.
        let of = |index: usize| programs[index..].iter().flatten().next().cloned();
        let identity = |pid| ProcessIdentity { pid, start_time: 0 };
        let Program { exe, argv } = of(0)?;
        let ancestors = pids.iter().enumerate().skip(1).map(|(index, pid)| {
            // It is known that it was there, although not what it ran.
            let (exe, argv) = of(index).map_or((None, None), |one| (one.exe, one.argv));
            let is_proven_inside = are_inside[..index].iter().all(|is_inside| *is_inside);
            Ancestor { identity: identity(*pid), exe, argv, is_proven_inside }
        });
        Some(Process {
            identity: identity(named.pid),
            exe,
            argv,
            uid: None,
            tty: None,
            root: None,
            ancestors: ancestors.collect(),
        })
    }

    /// The program of a container's process that existed at a time and has executed nothing
    /// since.
    fn unrecorded_program(&self, named: Named, at: u64) -> Option<Program> {
        let handle = Handle::open(named.pid).ok()?;
        let stat = handle.first_stat();
        let is_it = stat.identity.start_time <= named.read_at && !stat.has_ended();
        let is_containers = || self.table.of_process(&handle).is_some();
        if !is_it || !is_containers() {
            return None;
        }
        let Ancestor { exe, argv, .. } = describe::ancestor(&handle);
        // Checked last: an execve meanwhile is recorded by now, or no program was read.
        let has_executed = self.arguments().of(named.pid, at, u64::MAX) != Recorded::NotYet;
        (exe.is_some() && !has_executed).then_some(Program { exe, argv })
    }

    pub(crate) fn births(&self) -> MutexGuard<'_, Births> {
        self.births.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an observation of a fact, with the session to which it belongs.
    pub(crate) fn observation(
        &self,
        watched: &Watched,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> Observation {
        self.observation_of(watched, None, at, source, fact)
    }

    /// Like [`observation`](Processes::observation), for a file in the root of the container
    /// `file_of`, if that is another one.
    pub(crate) fn observation_of(
        &self,
        watched: &Watched,
        file_of: Option<ContainerId>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> Observation {
        let session = fact.process().and_then(|process| {
            let named = Named::now(process.identity.pid);
            self.roots().of(&watched.container, &self.births(), named)
        });
        let reached_as = match &fact {
            Fact::File(FileFact::Present { path, .. }) => {
                watched.ways.leading_to(path).or_else(|| self.known_as(watched, path))
            }
            _ => None,
        };
        let (container, init) = (watched.container.clone(), watched.init);
        Observation { container, init, at, source, session, file_of, reached_as, fact }
    }

    pub(crate) fn roots(&self) -> MutexGuard<'_, Roots> {
        self.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows a session from now on; false if it is followed already.
    pub(crate) fn open_root(&self, watched: &Watched, root: ProcessIdentity) -> bool {
        let is_new = self.roots().open(&watched.container, root);
        // What it executes is examined while it lives.
        self.forget_unchanged(watched);
        is_new
    }

    /// A client has attached to the terminal of a container's init.
    pub(crate) fn came_to_terminal(&self, watched: &Watched, arrival: Arrival) {
        self.roots().came_to_terminal(&watched.container, watched.init, arrival);
        self.forget_unchanged(watched);
    }

    /// Sends session activity to the thread `sessions`, and never waits.
    pub(crate) fn note_activity(&self, watched: &Arc<Watched>, activity: Activity) {
        match self.activity.try_send(Box::new(activity)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(_)) => self.lose(
                Failure::ProcessQueueFull,
                Some(watched),
                "the queue of session activity is full",
            ),
        }
    }

    /// The recorded executions of processes, with their arguments.
    pub(crate) fn arguments(&self) -> MutexGuard<'_, Arguments> {
        self.arguments.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A runtime was invoked. If there is no room, its invocation is read when a session
    /// opens.
    pub(crate) fn note_runtime(&self, pid: u32) {
        let _ = self.activity.try_send(Box::new(Activity::Runtime { pid }));
    }

    /// Sends an observation and never waits; false if it was lost.
    pub(crate) fn observe(
        &self,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> bool {
        self.observe_file_of(watched, None, at, source, fact)
    }

    /// Like [`observe`](Processes::observe), for a file in the root of the container
    /// `file_of`, if that is another one.
    pub(crate) fn observe_file_of(
        &self,
        watched: &Arc<Watched>,
        file_of: Option<ContainerId>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) -> bool {
        let observation = self.observation_of(watched, file_of, at, source, fact);
        match self.try_report(SensorEvent::Observed(observation)) {
            Ok(()) => true,
            Err(_) => {
                self.lose(
                    Failure::PipelineFull,
                    Some(watched),
                    "the pipeline has no room for an observation",
                );
                false
            }
        }
    }

    /// Sends an observation and waits for room, for the scan thread only.
    pub(crate) fn observe_patiently(
        &self,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        fact: Fact,
    ) {
        let observation = self.observation(watched, at, source, fact);
        if !self.report_patiently(SensorEvent::Observed(observation)) && !self.is_stopping() {
            self.lose(
                Failure::PipelineFull,
                Some(watched),
                "the pipeline had no room for an observation for half a minute",
            );
        }
    }
}
