//! The trace: what has run, by the kernel's own records.
//!
//! The gate is asked before a file on a filesystem with its mark is executed. This thread
//! reads that a file *was* executed, on whatever filesystem, and hands on what the gate cannot
//! have seen: memfds, filesystems mounted in mount namespaces of the container's own, mounts
//! that could not be marked.
//!
//! ```text
//! kernel ── rings ──> in order of time ── on a marked filesystem? ──> the gate reports it
//!                          │                    └ no ── container? ──> unseen (hashed there)
//!                          └── what containers run and map ──> consumers
//! ```
//!
//! An ordinary execution costs a look-up or two here and nothing in /proc. The container of a
//! process is remembered from its birth on, so that it is known also when the process is gone
//! before /proc is read. This thread must not hash files or describe processes: records wait
//! in rings of a fixed size.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;

use super::content;
use super::described::Described;
use super::examine::{Examiner, Execution};
use super::known::{self, Before, Known};
use super::recorder::Recorder;
use super::shared::Exec;
use super::unseen::Unseen;
use crate::health::Failure;
use crate::model::{ProcessIdentity, printable};
use crate::sys::connector::Connector;
use crate::sys::file;
use crate::sys::perf::{self, Executed, Mapped, Record, Rings};
use crate::sys::procfs::{self, Handle};
use crate::threads;
use crate::watch::core::fair::Sender;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::watched::Watched;
use crate::watch::process::attribution::{self, Attribution};
use crate::watch::process::outside;
use crate::watch::process::records::{self, Born, TraceConsumer};
use crate::watch::process::roots::Arrived;
use crate::watch::sessions::runtimes;

/// When as many files wait as may, each container may still have this many of them.
const FEW_FILES: usize = 8;

/// How long a turn lasts when nothing happens.
const TURN: Duration = Duration::from_millis(250);
/// How long records wait for earlier ones from other processors.
const SETTLE: Duration = Duration::from_millis(1);
/// How soon the rings are read again after they held records: the mappings of a new program
/// do not wake this thread, and the program may end right after them.
const SOON: Duration = Duration::from_millis(5);
/// How long the thread rests after records, so that a container that executes all the time does
/// not wake it for each program. What the gate did not see may end meanwhile: then the thread
/// stays awake for a while (`core::rest`), as it does when another thread waits for records.
const PACE: Duration = Duration::from_millis(2);
/// How often the thread checks whether processors have come or gone.
const CHECK_PROCESSORS: Duration = Duration::from_secs(1);
/// For how long a process that has ended is remembered: its first thread can end,
/// and then another of its threads can become a program under its pid.
const REMEMBERED: u64 = 1_000_000_000;
/// How long a runtime takes at most on its way into a container, in nanoseconds. If it takes
/// longer, its process is seen by the kernel's records alone.
const ENTERS_WITHIN: u64 = 5_000_000_000;
/// More processes than this are not remembered.
const MAX_PROCESSES: usize = 64 * 1024;

pub(crate) struct Trace {
    shared: Arc<Exec>,
    unseen: Sender<Box<Unseen>>,
    /// Takes the executions that have waited for their record.
    proven: Sender<Described>,
    /// How many files may be held open for the thread that hashes them.
    max_files: usize,
    consumers: Vec<Box<dyn TraceConsumer>>,
    processes: HashMap<u32, Known>,
    ended: VecDeque<(u64, u32)>,
    memfd_device: Option<u64>,
    /// The device of the host's root.
    host_device: Option<u64>,
    /// For a file mapped from an overlay the kernel reports the overlay's own device. Before
    /// 6.18 it may report the device of the file below.
    reports_overlays: bool,
    /// The records name control groups.
    has_cgroups: bool,
    /// Executions of containers in this turn whose arguments were not recorded.
    without_arguments: u64,
}

/// Divides lost records of arguments into those of containers and those of the host. The
/// kernel had no room for them and does not report whose they were. The containers' share
/// cannot exceed the number of their executions that came without arguments.
fn shares(lost: u64, without_arguments: u64) -> (u64, u64) {
    let of_containers = without_arguments.min(lost);
    (of_containers, lost - of_containers)
}

/// Whether a process runs a program of the container that it is in. False also for a process
/// that is on its way there, or ending.
fn runs_own_program(pid: u32) -> bool {
    Handle::open(pid)
        .is_ok_and(|handle| !outside::runs_program_of_host(&handle) && handle.open_exe().is_ok())
}

/// Whether a process is in the host's own namespaces.
fn is_of_host(pid: u32) -> bool {
    procfs::mount_namespace_of(pid).is_ok_and(procfs::is_host_mount_namespace)
        && procfs::pid_namespace_of(pid).is_ok_and(procfs::is_host_pid_namespace)
}

/// Whether a process is a container's init or a descendant of it. The parents of a process
/// from outside are outside.
fn descends_from(pid: u32, init: ProcessIdentity) -> bool {
    const MAX_GENERATIONS: usize = 64;
    let parents = std::iter::successors(procfs::read_stat(pid).ok(), |stat| {
        procfs::read_stat(stat.parent).ok()
    });
    parents.take(MAX_GENERATIONS).any(|stat| stat.identity == init)
}

/// The container of a process that has opened a session. The process may have ended, and one
/// that has come by `chroot` alone is in no namespace of a container.
fn of_session(shared: &Exec, pid: u32) -> Option<Arc<Watched>> {
    let roots = shared.roots();
    let (container, identity) = roots.opened_by(pid)?;
    let is_another = procfs::read_stat(pid).is_ok_and(|stat| stat.identity != identity);
    if is_another { None } else { shared.table.get(container) }
}

impl Trace {
    pub(crate) fn new(
        shared: Arc<Exec>,
        unseen: Sender<Box<Unseen>>,
        proven: Sender<Described>,
        max_files: usize,
        consumers: Vec<Box<dyn TraceConsumer>>,
    ) -> Trace {
        Trace {
            shared,
            unseen,
            proven,
            max_files,
            consumers,
            processes: HashMap::new(),
            ended: VecDeque::new(),
            memfd_device: file::memfd_device().ok(),
            host_device: file::stat_path("/").ok().map(|root| root.device),
            reports_overlays: false,
            has_cgroups: false,
            without_arguments: 0,
        }
    }

    pub(crate) fn run(mut self, recorder: Recorder) {
        // Records wait in rings of a fixed size.
        let _ = rustix::process::setpriority_process(None, -9);
        match recorder {
            Recorder::Rings(rings) => self.read_rings(rings),
            Recorder::Connector(connector) => self.listen(connector),
        }
    }

    fn read_rings(&mut self, mut rings: Rings) {
        self.has_cgroups = rings.layout().cgroup;
        let mut records = Vec::new();
        let mut last_check = Instant::now();
        // Turns without records since the last one with some.
        let mut quiet = 0_u32;
        let mut is_last = false;
        let mut lost_arguments = rings.lost_arguments();
        while !is_last {
            // Events from before a stop are still reported.
            is_last = self.shared.is_stopping();
            let rest = &self.shared.rest_of_trace;
            let may_rest = rest.may_rest();
            let has_gone = threads::idle(|| match (records.is_empty(), quiet) {
                _ if is_last => rings.wait(Duration::ZERO),
                (is_empty, 0) if may_rest => {
                    rest.rest(if is_empty { PACE } else { SETTLE });
                    // The kernel's note that there is something to read is used up: the next
                    // wait is for what comes later.
                    rings.wait(Duration::ZERO)
                }
                (false, _) => rings.wait(SETTLE),
                (true, 0 | 1) => rings.wait(SOON),
                (true, _) => rings.wait(TURN),
            });
            if has_gone || last_check.elapsed() >= CHECK_PROCESSORS {
                last_check = Instant::now();
                match rings.follow_processors() {
                    Ok(false) => (),
                    Ok(true) => self.lose(
                        "a processor came or went: the records of what ran there were not read",
                    ),
                    Err(err) => self.lose(&format!("a processor's records cannot be read: {err}")),
                }
                if has_gone {
                    // Also if no processor has gone: the ring would report it again at once.
                    std::thread::sleep(SETTLE);
                }
            }
            // All events from before this moment are in one of the rings by now.
            let horizon = perf::now();
            if let Err(err) = rings.read(&mut records) {
                self.lose(&format!("the kernel's records cannot be parsed: {err}"));
            }
            let lost_before = std::mem::replace(&mut lost_arguments, rings.lost_arguments());
            records.sort_by_key(Record::time);
            let complete = records.partition_point(|record| record.time() <= horizon);
            quiet = if complete > 0 { 0 } else { quiet.saturating_add(1) };
            for record in records.drain(..complete) {
                threads::beat();
                self.take(record);
            }
            self.lost_arguments(lost_arguments - lost_before);
            self.end_turn(horizon);
        }
    }

    fn lost_arguments(&mut self, lost: u64) {
        let (of_containers, of_host) = shares(lost, std::mem::take(&mut self.without_arguments));
        let health = &self.shared.health;
        health.arguments_unrecorded.fetch_add(of_containers, Ordering::Relaxed);
        health.arguments_unrecorded_of_host.fetch_add(of_host, Ordering::Relaxed);
    }

    fn listen(&mut self, mut connector: Connector) {
        let mut records = Vec::new();
        let mut is_last = false;
        while !is_last {
            // Events from before a stop are still reported.
            is_last = self.shared.is_stopping();
            let turn = if is_last { Duration::ZERO } else { TURN };
            threads::idle(|| connector.wait(turn));
            if let Err(err) = connector.read(&mut records) {
                self.lose(&format!("the process connector cannot be read: {err}"));
                std::thread::sleep(TURN);
            }
            for record in records.drain(..) {
                self.take(record);
            }
            self.end_turn(perf::now());
        }
    }

    fn lose(&mut self, detail: &str) {
        self.processes.clear();
        self.ended.clear();
        let now = perf::now();
        self.shared.arguments().forget_all(now);
        let unproven = self.shared.unproven().forget_all(now);
        self.hand_on_proven(unproven);
        self.consumers.iter_mut().for_each(|consumer| consumer.lost());
        self.shared.lose(Failure::TraceLost, None, detail);
        // Among the lost records may be that of a runtime.
        self.something_enters(now);
        self.shared.rest_of_trace.stay_awake();
    }

    fn end_turn(&mut self, now: u64) {
        self.shared.unproven().has_read(now);
        self.forget_ended(now);
        for consumer in &mut self.consumers {
            consumer.turn(&self.shared);
        }
    }

    fn forget_ended(&mut self, now: u64) {
        while let Some(&(ended, pid)) = self.ended.front()
            && ended.saturating_add(REMEMBERED) < now
        {
            self.ended.pop_front();
            // Another of its threads may be in an execve for a longer time.
            let (over, goes_on) = self.shared.unproven().ended(pid, procfs::has_threads);
            over.iter().for_each(|one| content::check_file(&self.shared, one.place()));
            if goes_on {
                self.ended.push_back((now, pid));
                continue;
            }
            // Another process may have this pid by now.
            if self.processes.get(&pid).is_some_and(|known| known.ended) {
                self.processes.remove(&pid);
            }
        }
    }

    fn known(&mut self, pid: u32) -> &mut Known {
        if self.processes.len() >= MAX_PROCESSES && !self.processes.contains_key(&pid) {
            for (watched, number) in known::make_room(&mut self.processes, MAX_PROCESSES) {
                let detail = format!(
                    "it has more processes than are remembered: {number} are looked up again, \
                     except those that have ended"
                );
                self.shared.lose(Failure::TraceLost, Some(&watched), &detail);
            }
            self.ended.retain(|(_, pid)| self.processes.contains_key(pid));
        }
        self.processes.entry(pid).or_default()
    }

    fn take(&mut self, record: Record) {
        match record {
            Record::Forked { pid, parent, time } => self.forked(pid, parent, time),
            Record::Began { pid, time: _ } => {
                let known = self.known(pid);
                known.is_beginning = true;
                known.first = None;
                known.arguments = None;
                known.ended = false;
            }
            Record::Mapped(mapped) => self.mapped(mapped),
            Record::Executed(executed) => {
                self.executed(&executed);
                // Last: by now its name and its arguments are known.
                let Executed { pid, time, .. } = executed;
                let proven = self.shared.unproven().executed(pid, time);
                self.hand_on_proven(proven);
            }
            Record::Arguments { pid, time: _, arguments } => {
                let Some(known) = self.processes.get_mut(&pid) else { return };
                if known.is_beginning {
                    known.arguments = Some(arguments);
                } else if known.watched.is_some() {
                    self.without_arguments = self.without_arguments.saturating_sub(1);
                    self.shared.arguments().add(pid, arguments);
                }
            }
            Record::Exited { pid, time } => self.exited(pid, time),
            Record::Lost { count, time: _ } => {
                self.lose(&format!("the kernel had no room for {count} records of executions"));
            }
        }
    }

    fn forked(&mut self, pid: u32, parent: u32, time: u64) {
        self.shared.roots().reborn(pid, records::ticks_of(time));
        let containers = self.shared.table.generation();
        let is_unknown = self.processes.get(&parent).is_none_or(|known| {
            known.watched.is_none() && (!known.was_looked_up || known.looked_up_among != containers)
        });
        if is_unknown {
            self.look_up_parent(parent, containers);
        }
        if let Some(known) = self.processes.get_mut(&parent)
            && known.watched.is_none()
        {
            known.watched = of_session(&self.shared, parent);
        }
        let (watched, is_resident, is_outside, program) =
            self.processes.get(&parent).map_or((None, false, false, None), |known| {
                let Known { is_resident, is_made_outside, .. } = *known;
                let (watched, program) = (known.watched.clone(), known.program.clone());
                (watched, is_resident, is_made_outside, program)
            });
        if watched.is_some() {
            let home = watched.as_ref().filter(|_| is_resident);
            for consumer in &mut self.consumers {
                consumer.forked(&self.shared, home, pid, parent);
            }
        }
        if watched.is_none() {
            // An entry under this pid belongs to an earlier process.
            self.shared.births().forget(pid);
        }
        let (parent, born) = (Some(parent), Some(time));
        let is_made_outside = !is_resident && is_outside;
        let known = Known {
            parent,
            born,
            watched,
            is_resident,
            is_made_outside,
            program,
            ..Known::default()
        };
        *self.known(pid) = known;
    }

    /// Looks up the container of a process that has made another one.
    fn look_up_parent(&mut self, parent: u32, containers: u64) {
        // The process was there before this thread, or before its container was known.
        let watched = self.look_up(parent);
        let is_of_host = is_of_host(parent);
        let runs_own = watched.is_some() && runs_own_program(parent);
        let program = self.processes.get(&parent).and_then(|it| it.program.clone());
        let ran_in = program.and_then(|it| self.shared.table.by_device(it.device));
        // The process came from outside. By the records it has become one of the container's
        // programs since, when its container was not known yet.
        let is_own = |watched: &Arc<Watched>| {
            ran_in.is_some_and(|ran_in| Arc::ptr_eq(&ran_in, watched))
                || descends_from(parent, watched.init)
        };
        let known = self.known(parent);
        let is_resident =
            runs_own && (!known.is_made_outside || watched.as_ref().is_some_and(is_own));
        known.watched = watched;
        known.is_resident = is_resident;
        known.is_made_outside |= is_of_host;
        known.is_made_outside &= !is_resident;
        known.was_looked_up = true;
        known.looked_up_among = containers;
    }

    fn exited(&mut self, pid: u32, time: u64) {
        if let Some(known) = self.processes.get_mut(&pid) {
            known.ended = true;
            self.ended.push_back((time, pid));
        }
        self.shared.table.ended(pid);
        // What is left are files that it tried to execute in vain.
        drop(self.shared.take_asked(pid, time));
        for consumer in &mut self.consumers {
            consumer.exited(&self.shared, pid, time);
        }
    }

    fn mapped(&mut self, mapped: Mapped) {
        if mapped.inode == 0 {
            return;
        }
        if let Some(known) = self.processes.get_mut(&mapped.pid)
            && known.is_beginning
        {
            known.first.get_or_insert(Arc::new(mapped));
            return;
        }
        if self.consumers.is_empty() {
            return;
        }
        let Some(watched) = self.user_of(&mapped) else { return };
        for consumer in &mut self.consumers {
            consumer.mapped(&self.shared, &watched, &mapped);
        }
    }

    /// The container of a process that maps a file.
    fn user_of(&mut self, mapped: &Mapped) -> Option<Arc<Watched>> {
        if let Some(known) = self.processes.get(&mapped.pid) {
            if let Some(watched) = &known.watched {
                return Some(watched.clone());
            }
            if known.was_looked_up {
                return self.shared.table.by_device(mapped.device);
            }
        }
        let watched =
            self.shared.table.by_device(mapped.device).or_else(|| self.look_up(mapped.pid));
        let known = self.known(mapped.pid);
        known.watched.clone_from(&watched);
        known.was_looked_up = true;
        watched
    }

    /// The container of a process that still lives, by /proc.
    fn look_up(&self, pid: u32) -> Option<Arc<Watched>> {
        // Most are the host's own: two links in /proc show that.
        if procfs::is_host_mount_namespace(procfs::mount_namespace_of(pid).ok()?)
            && procfs::is_host_pid_namespace(procfs::pid_namespace_of(pid).ok()?)
        {
            return None;
        }
        self.shared.table.of_process(&Handle::open(pid).ok()?)
    }

    /// Reports a program that runs in place of one that was denied.
    fn note_instead(&self, watched: &Watched, executed: &Executed) {
        let Executed { pid, time, file_name, .. } = executed;
        let denied = self.shared.observed().instead_of(*pid, *time, file_name);
        if let Some(denied) = denied {
            let (container, instead) = (watched.container.clone(), printable(file_name));
            // If there is no room, the finding of the denial is there all the same.
            let _ = self.shared.try_report(SensorEvent::RanInstead { container, denied, instead });
        }
    }

    fn executed(&mut self, executed: &Executed) {
        let before = self.known(executed.pid).end_execve();
        let Before { program, arguments, previous, inherited, parent, .. } = before;
        let Before { was_resident, is_made_outside, .. } = before;
        let table = &self.shared.table;
        let overlay = program.as_ref().and_then(|program| table.by_device(program.device));
        if overlay.is_some() && !std::mem::replace(&mut self.reports_overlays, true) {
            self.shared.set_shows_arrivals(self.has_cgroups);
        }
        let is_entry = overlay.as_ref().is_some_and(|overlay| {
            overlay.init.pid == executed.pid && !overlay.entry_is_recorded()
        });
        if is_entry || program.is_some() && overlay.is_none() {
            self.shared.wait_for_gate();
        }
        let asked = self.shared.take_asked(executed.pid, executed.time);
        let is_reported = program.as_ref().is_some_and(|program| {
            overlay.as_ref().is_some_and(|overlay| !overlay.has_foreign_layers())
                || asked.contains(&(program.device, program.inode))
                || self.examiner().gate_will_report(program.device, None, executed)
        });
        // A process cannot change its descent, but it can join cgroups and namespaces.
        let actor = inherited
            .clone()
            .filter(|_| was_resident)
            .or_else(|| executed.cgroup.and_then(|cgroup| table.by_perf_cgroup(cgroup)))
            .or_else(|| self.look_up(executed.pid));
        let is_certain = actor.is_some();
        let owner =
            overlay.or_else(|| self.examiner().owner_of_running(executed, program.as_deref()));
        let is_overlays = owner.is_some();
        let decision = Attribution::new(actor, owner, |inner, outer| {
            attribution::is_within(table, inner, outer)
        });
        let (watched, file_of) = match decision {
            Some(Attribution { watched, file_of }) => (Some(watched), file_of),
            None => (None, None),
        };
        let watched = watched
            .or(inherited)
            .or_else(|| of_session(&self.shared, executed.pid))
            .or_else(|| {
                // The process is gone, or was when it was looked up.
                let parent = parent?;
                let known = self.processes.get(&parent);
                known.and_then(|known| known.watched.clone())
            });
        let is_resident = was_resident || is_certain && (is_reported || is_overlays);
        let known = self.known(executed.pid);
        known.watched.clone_from(&watched);
        known.was_looked_up = true;
        known.is_resident = is_resident;
        let Some(watched) = watched else {
            self.note_entrance(executed);
            if runtimes::is_named_like_a_runtime(&executed.file_name) {
                for consumer in &mut self.consumers {
                    consumer.runtime_invoked(&self.shared, executed.pid);
                }
            }
            return;
        };
        self.note_instead(&watched, executed);
        let has_arrived =
            is_made_outside && self.note_arrival(executed, program.as_deref(), &watched);
        self.note_arguments(executed, program.as_deref(), arguments);
        self.notify_consumers(executed, program.as_deref(), &watched, parent, has_arrived);
        let execution = Execution {
            watched,
            executed,
            program,
            previous,
            parent,
            asked,
            was_resident,
            file_of: None,
        };
        self.hand_on_unseen(execution, file_of, Reported { is_reported, is_entry, is_overlays });
    }

    /// A program of the host may be about to enter a container. The gate then looks at each
    /// process for a while.
    fn note_entrance(&self, executed: &Executed) {
        // A runtime executes itself by a descriptor.
        let name = &executed.file_name;
        if runtimes::may_enter(name) || records::descriptor(name).is_some() {
            self.something_enters(executed.time);
        }
    }

    fn something_enters(&self, time: u64) {
        if let Some(pulse) = self.shared.health.pulse.get() {
            let until = time.saturating_add(ENTERS_WITHIN);
            pulse.runtimes_until().fetch_max(until, Ordering::Relaxed);
        }
    }

    /// Notes that a process has come from outside, and returns whether it has.
    fn note_arrival(
        &mut self,
        executed: &Executed,
        program: Option<&Mapped>,
        watched: &Arc<Watched>,
    ) -> bool {
        let is_in_control_group =
            watched.perf_cgroup.is_some() && executed.cgroup == watched.perf_cgroup;
        if !is_in_control_group && !self.examiner().sees_root(executed, program, watched) {
            return false;
        }
        // Before the arguments are noted: threads that wait for them may need this too.
        let arrived = Arrived {
            container: watched.container.clone(),
            pid: executed.pid,
            executed: executed.time,
            is_in_control_group,
            makers: self.examiner().makers(executed.pid),
        };
        self.shared.roots().arrived(arrived);
        // Processes that it makes from now on are made in the container.
        self.known(executed.pid).is_resident = true;
        true
    }

    fn note_arguments(
        &mut self,
        executed: &Executed,
        program: Option<&Mapped>,
        arguments: Option<Box<[u8]>>,
    ) {
        self.without_arguments += u64::from(arguments.is_none());
        let mut kept = self.shared.arguments();
        kept.executed(executed.pid, executed.time, arguments);
        let name = program.map(|program| &*program.name).unwrap_or_default();
        kept.named(executed.pid, &executed.file_name, name);
    }

    fn notify_consumers(
        &mut self,
        executed: &Executed,
        program: Option<&Mapped>,
        watched: &Arc<Watched>,
        parent: Option<u32>,
        has_arrived: bool,
    ) {
        let has_parent_inside = parent
            .and_then(|parent| self.processes.get(&parent))
            .is_some_and(|known| known.watched.is_some());
        let has_entered = !has_parent_inside || has_arrived;
        let born = if has_entered { self.birth_of(executed.pid) } else { None };
        for consumer in &mut self.consumers {
            consumer.executed(&self.shared, watched, executed, program);
            if has_entered {
                consumer.entered(&self.shared, watched, executed, born);
            }
        }
    }

    fn birth_of(&self, pid: u32) -> Option<Born> {
        let known = self.processes.get(&pid)?;
        let start_time = records::ticks_of(known.born?);
        Some(Born { identity: ProcessIdentity { pid, start_time }, parent: known.parent? })
    }

    /// Hands on an execution that the gate cannot have seen.
    fn hand_on_unseen(
        &self,
        mut execution: Execution<'_>,
        file_of: Option<Arc<Watched>>,
        Reported { is_reported, is_entry, is_overlays }: Reported,
    ) {
        if let Some(owner) = file_of {
            execution.file_of = Some(owner.container.clone());
            if let Some(found) = self.examiner().examine_in_other_root(&execution, &owner) {
                self.hand_on(found);
            }
            return;
        }
        if is_entry
            && is_reported
            && execution.watched.record_entry()
            && let Some(found) = self.examiner().examine_entry(&execution)
        {
            found.into_iter().for_each(|found| self.hand_on(found));
            return;
        }
        let by_descriptor = records::descriptor(&execution.executed.file_name);
        if is_reported && by_descriptor.is_none() {
            return;
        }
        if is_overlays && execution.watched.has_foreign_layers() && !is_reported {
            if let Some(found) = self.examiner().examine_unread(&execution) {
                self.hand_on(found);
            }
            return;
        }
        let found = self.examiner().examine(&execution).or_else(|| {
            // For a script the mapped file is the interpreter.
            self.examiner().examine_script(&execution, by_descriptor?)
        });
        if let Some(found) = found {
            self.hand_on(found);
        }
    }

    fn hand_on_proven(&self, executions: Vec<Described>) {
        executions.into_iter().for_each(|execution| self.proven.send_back(execution));
    }

    fn hand_on(&self, mut unseen: Unseen) {
        // It may end soon, and the next one too.
        self.shared.rest_of_trace.stay_awake();
        // A container with few waiting files does not lose by another container's flood.
        let has_many = || self.unseen.len_of(&unseen.watched.container) >= FEW_FILES;
        if self.unseen.len() >= self.max_files && has_many() {
            // The execution is still reported, but without its content.
            unseen.file = None;
            unseen.handle = None;
        }
        match self.unseen.try_send(Box::new(unseen)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(unseen)) => self.shared.lose(
                Failure::ContentQueueFull,
                Some(&unseen.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }

    fn examiner(&self) -> Examiner<'_> {
        Examiner {
            shared: &self.shared,
            processes: &self.processes,
            memfd_device: self.memfd_device,
            host_device: self.host_device,
            reports_overlays: self.reports_overlays,
        }
    }
}

/// What is known of an execution before its file is examined.
#[derive(Clone, Copy)]
struct Reported {
    /// The gate reports it.
    is_reported: bool,
    /// Init becomes the entry point by it.
    is_entry: bool,
    /// The program lies on a container's own overlay.
    is_overlays: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w13_arguments_of_the_hosts_programs_are_counted_apart() {
        // A build on the host: no execution of a container lacks its arguments.
        assert_eq!(shares(70, 0), (0, 70));
        assert_eq!(shares(70, 3), (3, 67));
        // Their arguments were read by other means, or come later: none were lost.
        assert_eq!(shares(0, 3), (0, 0));
        assert_eq!(shares(2, 3), (2, 0));
    }
}
