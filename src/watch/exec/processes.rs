//! Processes that come into a container from outside, and what all of a container's
//! processes run when nobody has seen them start.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use super::running::Running;
use super::shared::Exec;
use crate::health::Failure;
use crate::model::{Process, Source};
use crate::sys::file;
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::watch::core::fair::{self, Receiver, Sender};
use crate::watch::core::shared::Next;
use crate::watch::core::watched::Watched;
use crate::watch::process::describe::{self, Caller};
use crate::watch::process::records::TraceConsumer;
use crate::watch::process::seen::Seen;
use crate::watch::process::shared::Processes;
use crate::watch::process::{deeds, membership, outside};
use crate::watch::sessions::calls;
use crate::watch::sessions::opening::{self, Home, Opened};
use crate::watch::sessions::origin::ByRuntime;
use crate::watch::sessions::runtimes::Runtimes;

/// Of how many that wait each one that belongs to a session is looked at.
const FEW: usize = 64;

/// How often it is asked whether all processes are to be looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

pub(crate) fn run(shared: &Exec, seen: &Receiver<Box<Seen>>) {
    let mut last_look = Instant::now();
    let mut runtimes = Runtimes::default();
    let mut pass: Option<Pass> = None;
    loop {
        if pass.is_none() && last_look.elapsed() >= LOOK_EVERY && !shared.is_stopping() {
            last_look = Instant::now();
            pass = Pass::begin(shared);
            find_unclaimed(shared);
        }
        let mut patience = LOOK_EVERY;
        if let Some(going) = &mut pass {
            patience = shared.rest();
            if patience.is_zero() {
                let used = fair::processor_time();
                let is_over = going.step(shared, &mut runtimes);
                shared.spend(fair::processor_time().saturating_sub(used));
                pass.take_if(|_| is_over);
            }
        }
        // What has just happened is over sooner than what has run for a while.
        for _ in 0..FEW {
            match shared.next_within(seen, patience) {
                Next::Item(one) => judge(shared, &one, seen),
                Next::Nothing => break,
                Next::End => return,
            }
            patience = Duration::ZERO;
        }
    }
}

fn judge(shared: &Exec, seen: &Seen, others: &Receiver<Box<Seen>>) {
    let Some(stat) = &seen.caller.stat else { return judge_running(shared, seen) };
    if deeds::is_of_another(shared, &seen.watched, &seen.caller) {
        return;
    }
    // First: what runs in a session may be over when its record is read.
    if others.len() < FEW && membership::is_in_session(shared, &seen.watched, stat) {
        let words = describe::words_after_exec(&seen.caller, &|| !others.is_empty());
        membership::keep_words(shared, &seen.watched, &seen.caller, words);
    }
    shared.packages().executes(shared, &seen.watched, stat);
    membership::keep_handle(shared, &seen.watched, &seen.caller);
    // Held until the session is told, so that it is told before what it does.
    let mut sessions = shared.openings();
    sessions.open(shared, &seen.caller, &seen.watched, seen.at, &|| others.len());
}

/// Nobody was asked before it became what it is.
fn judge_running(shared: &Exec, seen: &Seen) {
    shared.openings().open_gone(shared, seen.caller.pid);
    let handle = Handle::open(seen.caller.pid).ok();
    let Some(handle) = handle.filter(|handle| !handle.first_stat().has_ended()) else {
        if let Some(program) = &seen.program {
            shared.packages().has_run(shared, &seen.watched, seen.caller.pid, program);
        }
        return;
    };
    let stat = handle.first_stat();
    // What the runtime is on its way in will be seen again when it is there.
    if outside::is_on_its_way(&handle) {
        return;
    }
    match opening::home(shared, &handle, &seen.watched) {
        Home::Own => (),
        Home::Anothers => return,
        Home::Unknown => {
            if shared.openings().put_aside(handle.identity(), &seen.watched) {
                return;
            }
        }
    }
    let process = Arc::new(describe::as_it_is(&handle, &seen.watched));
    shared.packages().has_begun(shared, &seen.watched, &process);
    let mut sessions = shared.openings();
    if let Some(root) = sessions.opens(shared, stat, &seen.watched, &mut || false) {
        let mut process = Process::clone(&process);
        let asked_for = calls::asked_for(&mut shared.calls(), stat.parent, &seen.watched, false);
        process.argv = asked_for.map(|asked| asked.argv).or(process.argv);
        let opened = Opened { process, pidfd: None, by_runtime: root.by_runtime() };
        sessions.tell(shared, &seen.watched, seen.at, Source::Trace, opened);
    }
}

/// By the trace, which is not asked before: whoever comes into a container to execute
/// what the gate does not ask about.
pub(crate) struct Entries {
    processes: Sender<Box<Seen>>,
}

impl Entries {
    pub(crate) fn new(processes: Sender<Box<Seen>>) -> Entries {
        Entries { processes }
    }
}

impl TraceConsumer for Entries {
    fn entered(&mut self, shared: &Processes, watched: &Arc<Watched>, executed: &Executed) {
        let caller = Caller { stat: None, pid: executed.pid, asked: None, pidfd: None };
        let at = Timestamp::now();
        let seen = Seen { watched: watched.clone(), caller, at, program: None };
        match self.processes.try_send(Box::new(seen)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(seen)) => shared.lose(
                Failure::ProcessQueueFull,
                Some(&seen.watched),
                "too many processes wait to be looked at",
            ),
        }
    }

    fn executed(&mut self, _: &Processes, _: &Arc<Watched>, _: &Executed, _: Option<&Mapped>) {}
}

/// A container whose processes are to be looked at.
struct Wanted {
    watched: Arc<Watched>,
    /// What has started after this was seen when it did.
    since: u64,
}

/// One pass over all processes, for all containers that want one: sessions and
/// programs that were there before the marks, or whose start was lost. It goes on in
/// slices, so that what happens meanwhile does not wait.
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

    /// Looks at some processes; true when all have been looked at.
    fn step(&mut self, shared: &Exec, runtimes: &mut Runtimes) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < fair::SLICE {
            let Some(pid) = self.pids.next() else { return true };
            let Ok(handle) = Handle::open(pid) else { continue };
            if let Some(watched) = owner(shared, &self.wanted, &handle) {
                self.running.tell(shared, runtimes, &watched, &handle);
            }
            for number in self.places.may_hold(&Whereabouts::of(&handle)) {
                find_open_session(shared, &self.wanted[number].watched, &handle);
            }
        }
        false
    }
}

/// What tells which containers a process may be in.
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

/// Containers, by number, by what tells that a process may be in one of them. So each
/// process is compared with the one or two that it can be in, and not with all.
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
        // Its control group or one that holds it.
        let cgroup = cgroup.as_deref().unwrap_or_default();
        let ends = (0..cgroup.len()).filter(|&end| cgroup[end] == b'/').chain([cgroup.len()]);
        let by_cgroup = ends.filter_map(|end| self.cgroups.get(&cgroup[..end]));
        let found = by_mount.into_iter().chain(by_pid).chain(by_root).chain(by_cgroup);
        found.flatten().copied().collect()
    }
}

/// Whose process this is: by its namespaces and control group, or by what it runs.
fn owner(shared: &Exec, wanted: &[Wanted], handle: &Handle) -> Option<Arc<Watched>> {
    let own = shared.table.of_process(handle).or_else(|| {
        let stat = file::stat(handle.open_exe().ok()?).ok()?;
        shared.table.owner(&stat)
    })?;
    // Without records of executions, whatever is not on a marked filesystem is
    // found here or never.
    let is_late = |since| handle.identity().start_time > since && shared.records_executions();
    let wanted = wanted.iter().find(|wanted| Arc::ptr_eq(&wanted.watched, &own))?;
    (!is_late(wanted.since)).then_some(own)
}

fn find_open_session(shared: &Exec, watched: &Arc<Watched>, handle: &Handle) {
    match opening::home(shared, handle, watched) {
        Home::Own => open_session(shared, watched, handle),
        Home::Anothers => {
            // Its container may have been known before the one beside which it was put.
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

/// Those that were taken for a container's that is not known yet, and none has come.
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
        sessions.tell(shared, watched, began, Source::Scan, opened);
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
        // A process that joins only a part of a container is in several.
        let joined = Whereabouts {
            mount_namespace: Some(1001),
            cgroup: Some(b"/pods/9/x".to_vec()),
            ..none()
        };
        assert_eq!(may_hold(joined), [1, 9]);
    }
}
