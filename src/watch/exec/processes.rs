//! The thread for processes: those that execute a file of the image, those that come into a
//! container from outside, and, in passes over all processes, those whose start was not seen.
//!
//! It opens their sessions, by `sessions::opening`, and reports the programs that they run, by
//! `running`. It works in slices, so that new processes do not wait for a pass. It must not
//! decide what a session is.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use super::running::Running;
use super::shared::Exec;
use crate::health::Failure;
use crate::model::{Process, Source};
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, pidfd};
use crate::watch::core::fair::{self, Receiver, Sender};
use crate::watch::core::shared::Next;
use crate::watch::core::watched::Watched;
use crate::watch::process::describe::{self, Caller};
use crate::watch::process::records::{self, Born, TraceConsumer};
use crate::watch::process::seen::Seen;
use crate::watch::process::shared::Processes;
use crate::watch::process::{attribution, membership, outside, recorded};
use crate::watch::sessions::invocations;
use crate::watch::sessions::opening::{self, Home, Opened};
use crate::watch::sessions::origin::ByRuntime;
use crate::watch::sessions::runtimes::Runtimes;

/// While fewer than this wait, each process that belongs to a session is examined.
const FEW: usize = 64;

/// How long a process that has ended is left to the gate, which knows more of it: its report may
/// come after the kernel's record.
const GATE_FIRST: Duration = Duration::from_millis(50);
/// No more of them wait.
const MAX_GONE: usize = 1024;

/// How often the thread checks whether a container wants a pass over all processes.
const CHECK_EVERY: Duration = Duration::from_millis(250);

pub(crate) fn run(shared: &Exec, seen: &Receiver<Box<Seen>>) {
    let mut last_check = Instant::now();
    let mut runtimes = Runtimes::default();
    let mut pass: Option<Pass> = None;
    let mut gone: VecDeque<(Instant, Box<Seen>)> = VecDeque::new();
    loop {
        while gone.front().is_some_and(|(at, _)| at.elapsed() >= GATE_FIRST)
            && let Some((_, one)) = gone.pop_front()
        {
            open_recorded(shared, &one);
        }
        if pass.is_none() && last_check.elapsed() >= CHECK_EVERY && !shared.is_stopping() {
            last_check = Instant::now();
            pass = Pass::begin(shared);
            find_unclaimed(shared);
        }
        let mut patience = if gone.is_empty() { CHECK_EVERY } else { GATE_FIRST };
        if let Some(going) = &mut pass {
            patience = shared.rest();
            if patience.is_zero() {
                let used = fair::processor_time();
                let is_over = going.step(shared, &mut runtimes);
                shared.spend(fair::processor_time().saturating_sub(used));
                pass.take_if(|_| is_over);
            }
        }
        // A new process ends sooner than one that has run for a while.
        for _ in 0..FEW {
            match shared.next_within(seen, patience) {
                Next::Item(one) => {
                    let has_gone = judge(shared, &one, seen);
                    if has_gone && one.born.is_some() && gone.len() < MAX_GONE {
                        gone.push_back((Instant::now(), one));
                    }
                }
                Next::Nothing => break,
                Next::End => return gone.iter().for_each(|(_, one)| open_recorded(shared, one)),
            }
            patience = Duration::ZERO;
        }
    }
}

/// Judges a process. Returns whether it had ended and was not seen by the gate, so that only its
/// records show what it was.
fn judge(shared: &Exec, seen: &Seen, others: &Receiver<Box<Seen>>) -> bool {
    let Some(stat) = &seen.caller.stat else { return judge_running(shared, seen) };
    if attribution::is_of_another(shared, &seen.watched, &seen.caller) {
        return false;
    }
    // First: a process in a session may have ended when its record is read.
    if others.len() < FEW && membership::is_in_session(shared, &seen.watched, stat) {
        let arguments = describe::program_after_exec(&seen.caller, &|| !others.is_empty());
        membership::keep_read_program(shared, &seen.watched, &seen.caller, arguments);
    }
    shared.packages().executes(shared, &seen.watched, stat);
    membership::keep_handle(shared, &seen.watched, &seen.caller);
    // Held until the session is reported, so that the session precedes its activity.
    let mut sessions = shared.openings();
    sessions.open(shared, &seen.caller, &seen.watched, seen.at, &|| others.len());
    false
}

/// Opens a session by the records alone, if the process came from outside.
fn open_recorded(shared: &Exec, seen: &Seen) {
    if let (Some(born), Some(asked)) = (seen.born, seen.caller.asked) {
        shared.openings().open_recorded(shared, (born, asked), &seen.watched, seen.at);
    }
}

/// The same, for a process for whose execution there was no permission event.
fn judge_running(shared: &Exec, seen: &Seen) -> bool {
    shared.openings().open_gone(shared, seen.caller.pid);
    let handle = Handle::open(seen.caller.pid).ok();
    let Some(handle) = handle.filter(|handle| !handle.first_stat().has_ended()) else {
        if let Some(program) = &seen.program {
            shared.packages().has_run(shared, &seen.watched, seen.caller.pid, program);
        }
        return true;
    };
    let stat = handle.first_stat();
    // A runtime on its way in is seen again when it has arrived.
    if outside::is_on_its_way(&handle) || outside::is_entering(&handle) {
        return false;
    }
    match opening::home(shared, &handle, &seen.watched) {
        Home::Own => (),
        Home::Anothers => return false,
        Home::Unknown => {
            if shared.openings().put_aside(handle.identity(), &seen.watched) {
                return false;
            }
        }
    }
    let process = Arc::new(describe::as_it_is(&handle, &seen.watched));
    shared.packages().has_begun(shared, &seen.watched, &process);
    let mut sessions = shared.openings();
    let Some(root) = sessions.opens(shared, stat, &seen.watched, &mut || false) else {
        // Perhaps it ended before it could be judged.
        return handle.has_ended();
    };
    let mut process = Process::clone(&process);
    let asked_for =
        invocations::asked_for(&mut shared.invocations(), stat.parent, &seen.watched, false);
    process.argv = asked_for.map(|asked| asked.argv).or(process.argv).or_else(|| {
        let time = seen.caller.asked?;
        recorded::recorded(shared, seen.caller.pid, time, time)
    });
    // A handle of this process, if it lives still.
    let pidfd = pidfd::open(seen.caller.pid).ok().filter(|_| !handle.has_ended());
    let opened = Opened { process, pidfd, by_runtime: root.by_runtime() };
    sessions.report(shared, &seen.watched, seen.at, Source::Trace, opened);
    false
}

/// A consumer of the trace: hands on processes that come into a container and execute a
/// file that the gate is not asked about.
pub(crate) struct Entries {
    processes: Sender<Box<Seen>>,
}

impl Entries {
    pub(crate) fn new(processes: Sender<Box<Seen>>) -> Entries {
        Entries { processes }
    }
}

impl TraceConsumer for Entries {
    fn entered(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        born: Option<Born>,
    ) {
        let Executed { pid, time, .. } = *executed;
        let caller = Caller { stat: None, pid, asked: Some(time), pidfd: None };
        let at = records::time_of(time);
        let seen = Seen { watched: watched.clone(), caller, at, born, program: None };
        match self.processes.try_send(Box::new(seen)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(seen)) => shared.lose(
                Failure::ProcessQueueFull,
                Some(&seen.watched),
                "too many processes wait to be examined",
            ),
        }
    }

    fn executed(&mut self, _: &Processes, _: &Arc<Watched>, _: &Executed, _: Option<&Mapped>) {}
}

/// A container whose processes are to be examined.
struct Wanted {
    watched: Arc<Watched>,
    /// Processes that started after this were seen when they started.
    since: u64,
}

/// One pass over all processes, for all containers that want one. It finds sessions and
/// programs that were there before the marks, or whose start was lost. It runs in slices, so
/// that new processes do not wait for it.
struct Pass {
    wanted: Vec<Wanted>,
    places: Places,
    pids: std::vec::IntoIter<u32>,
    running: Running,
}

impl Pass {
    fn begin(shared: &Exec) -> Option<Pass> {
        let wanted: Vec<Wanted> = shared
            .table
            .all()
            .into_iter()
            .filter_map(|watched| {
                let since = watched.take_process_scan()?;
                Some(Wanted { watched, since })
            })
            .collect();
        if wanted.is_empty() {
            return None;
        }
        let pids = procfs::all().ok()?.into_iter();
        let places = Places::of(wanted.iter().map(|wanted| &*wanted.watched));
        Some(Pass { wanted, places, pids, running: Running::default() })
    }

    /// Examines processes for one slice of time. Returns true when all have been examined.
    fn step(&mut self, shared: &Exec, runtimes: &mut Runtimes) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < fair::SLICE {
            let Some(pid) = self.pids.next() else { return true };
            let Ok(handle) = Handle::open(pid) else { continue };
            if let Some(watched) = owner(shared, &self.wanted, &handle) {
                self.running.report(shared, runtimes, &watched, &handle);
            }
            for number in self.places.may_hold(&Whereabouts::of(&handle)) {
                find_open_session(shared, &self.wanted[number].watched, &handle);
            }
        }
        false
    }
}

/// The places that show which containers a process may be in.
#[derive(Debug, Default)]
struct Whereabouts {
    mount_namespace: Option<u64>,
    pid_namespace: Option<u64>,
    cgroup: Option<Vec<u8>>,
    /// The device and the mount of its root directory.
    root: Option<(u64, Option<u64>)>,
}

impl Whereabouts {
    fn of(handle: &Handle) -> Whereabouts {
        let root = file::stat_path(handle.root_path()).ok();
        Whereabouts {
            mount_namespace: handle.mount_namespace().ok(),
            pid_namespace: handle.pid_namespace().ok(),
            cgroup: handle.cgroup().ok(),
            root: root.map(|root| (root.device, root.mount)),
        }
    }
}

/// The numbers of containers, by the places that show that a process may be in them. So each
/// process is compared with the one or two containers that it can be in, and not with all.
#[derive(Debug, Default)]
struct Places {
    mount_namespaces: HashMap<u64, Vec<usize>>,
    pid_namespaces: HashMap<u64, Vec<usize>>,
    cgroups: HashMap<Vec<u8>, Vec<usize>>,
    roots: HashMap<(u64, Option<u64>), Vec<usize>>,
}

impl Places {
    fn of<'a>(containers: impl Iterator<Item = &'a Watched>) -> Places {
        let mut places = Places::default();
        for (number, watched) in containers.enumerate() {
            if let Some(namespace) = watched.mount_namespace {
                places.mount_namespaces.entry(namespace).or_default().push(number);
            }
            if let Some(namespace) = watched.pid_namespace {
                places.pid_namespaces.entry(namespace).or_default().push(number);
            }
            if let Some(cgroup) = &watched.cgroup {
                places.cgroups.entry(cgroup.clone()).or_default().push(number);
            }
            places.roots.entry((watched.device, watched.mount)).or_default().push(number);
        }
        places
    }

    fn may_hold(&self, process: &Whereabouts) -> BTreeSet<usize> {
        let Whereabouts { mount_namespace, pid_namespace, cgroup, root } = process;
        let by_mount = mount_namespace.and_then(|namespace| self.mount_namespaces.get(&namespace));
        let by_pid = pid_namespace.and_then(|namespace| self.pid_namespaces.get(&namespace));
        let by_root = root.and_then(|root| self.roots.get(&root));
        // Its control group, or one that contains it.
        let cgroup = cgroup.as_deref().unwrap_or_default();
        let ends = (0..cgroup.len()).filter(|&end| cgroup[end] == b'/').chain([cgroup.len()]);
        let by_cgroup = ends.filter_map(|end| self.cgroups.get(&cgroup[..end]));
        let found = by_mount.into_iter().chain(by_pid).chain(by_root).chain(by_cgroup);
        found.flatten().copied().collect()
    }
}

/// The container of a process: by its namespaces and control group, or by its program.
fn owner(shared: &Exec, wanted: &[Wanted], handle: &Handle) -> Option<Arc<Watched>> {
    let own = shared.table.of_process(handle).or_else(|| {
        let stat = file::stat(handle.open_exe().ok()?).ok()?;
        shared.table.owner(&stat)
    })?;
    // Without records of executions, a program that is not on a marked filesystem is found
    // here or never.
    let is_late = |since| handle.identity().start_time > since && shared.records_executions();
    let wanted = wanted.iter().find(|wanted| Arc::ptr_eq(&wanted.watched, &own))?;
    (!is_late(wanted.since)).then_some(own)
}

fn find_open_session(shared: &Exec, watched: &Arc<Watched>, handle: &Handle) {
    match opening::home(shared, handle, watched) {
        Home::Own => open_session(shared, watched, handle),
        Home::Anothers => {
            // Its own container may have been known before the one whose processes are examined.
            if let Some(own) = opening::of_init(shared, handle) {
                open_session(shared, &own, handle);
            }
        }
        Home::Unknown => {
            let is_put_aside = shared.openings().put_aside(handle.identity(), watched);
            if !is_put_aside {
                open_session(shared, watched, handle);
            }
        }
    }
}

/// Opens sessions for processes that were put aside for a container that was not known yet,
/// where no such container has come.
fn find_unclaimed(shared: &Exec) {
    let unclaimed = shared.openings().take_unclaimed(shared);
    for (handle, watched) in unclaimed {
        open_session(shared, &watched, &handle);
    }
}

fn open_session(shared: &Exec, watched: &Arc<Watched>, handle: &Handle) {
    let mut sessions = shared.openings();
    if sessions.is_open(shared, handle, watched) {
        let process = describe::as_it_is(handle, watched);
        let opened = Opened { process, pidfd: None, by_runtime: ByRuntime::default() };
        let began = Timestamp::now() - procfs::age(handle.identity());
        sessions.report(shared, watched, began, Source::Scan, opened);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::watched::some_container;

    #[test]
    fn h09_a_process_is_compared_only_with_containers_that_it_can_be_in() {
        let containers: Vec<Watched> = (0..200).map(some_container).collect();
        let places = Places::of(containers.iter());
        let may_hold = |process| Vec::from_iter(places.may_hold(&process));
        let nowhere = Whereabouts {
            mount_namespace: Some(7),
            pid_namespace: Some(7000),
            cgroup: Some(b"/pods/1000".to_vec()),
            root: Some((8, Some(7))),
        };
        assert_eq!(may_hold(nowhere), [] as [usize; 0]);
        assert_eq!(may_hold(Whereabouts::default()), [] as [usize; 0]);
        let none = Whereabouts::default;
        assert_eq!(may_hold(Whereabouts { mount_namespace: Some(1042), ..none() }), [42]);
        assert_eq!(may_hold(Whereabouts { pid_namespace: Some(21), ..none() }), [42, 43]);
        assert_eq!(may_hold(Whereabouts { root: Some((42, Some(42))), ..none() }), [42]);
        for (cgroup, expected) in [
            ("/pods/42", vec![42]),
            ("/pods/42/system.slice/sshd", vec![42]),
            ("/pods/4", vec![4]),
            ("/pods", vec![]),
            ("/pods/42x", vec![]),
            ("/", vec![]),
        ] {
            let cgroup = Some(cgroup.into());
            assert_eq!(may_hold(Whereabouts { cgroup, ..none() }), expected);
        }
        // A process that joins only some namespaces of a container may be in several.
        let joined = Whereabouts {
            mount_namespace: Some(1001),
            cgroup: Some(b"/pods/9/x".to_vec()),
            ..none()
        };
        assert_eq!(may_hold(joined), [1, 9]);
    }
}
