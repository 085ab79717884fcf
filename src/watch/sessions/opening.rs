//! What opens a session: a process in one of the container's namespaces, its control group
//! or its root whose parent is in none of them, and that is not the container's init.
//!
//! [`Openings`] judges each process once, for the thread `processes`: from the gate, from the
//! kernel's records and from scans. It reports the opening to the pipeline and then to the
//! thread `sessions`. `inside` reads where a process is, and `origin` how it came in. What
//! a session runs afterwards is the affair of `follow`.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::inside;
use super::invocations;
use super::origin::{self, ByRuntime};
use super::runtimes::Runtimes;
use super::shared::Sessions;
use crate::model::{Fact, Process, ProcessIdentity, SessionFact, Source};
use crate::sys::door::View;
use crate::sys::file;
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::table::{is_put_elsewhere, parents_cgroup};
use crate::watch::core::watched::Watched;
use crate::watch::files::state;
use crate::watch::process::activity::{Activity, Event};
use crate::watch::process::describe::{self, Caller, Executing};
use crate::watch::process::records::Born;
use crate::watch::process::{outside, recorded};

/// Half of the number of processes that are remembered.
const GENERATION: usize = 16 * 1024;

/// Processes that have been judged, so that each session is reported once and most
/// processes cost nothing the second time.
#[derive(Debug, Default)]
pub(crate) struct Openings {
    judged: Recent,
    /// Processes that were judged as the init of their container. Before that container was
    /// known, such a process may have been judged like any other.
    inits: Recent,
    /// Judged processes that are known to be in a container, as parents of others.
    inside: Recent,
    /// Processes that had ended when they were to be judged, and whose record of origin has
    /// not been read. Holds the gate's facts of them, oldest first.
    unclear: VecDeque<Unclear>,
    /// Processes that appear to belong to a container that is not known yet, oldest first.
    aside: VecDeque<Aside>,
}

/// A process that shares a container's pid namespace, and that a runtime has put into a
/// control group of its own.
#[derive(Debug)]
struct Aside {
    identity: ProcessIdentity,
    watched: Arc<Watched>,
    until: Instant,
}

/// How long a container may take to become known after its first process runs. After that,
/// the process is judged by what /proc shows of it.
const UNKNOWN: Duration = Duration::from_secs(10);
const MAX_ASIDE: usize = 256;

/// To which container a process belongs that may be in a given one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    Own,
    /// It shares the pid namespace, and all other signs place it in another container.
    Anothers,
    /// It shares the pid namespace, and appears to be the first process of a container that
    /// has not been announced yet.
    Unknown,
}

/// What decides to which container a process belongs.
#[derive(Clone, Copy, Debug)]
struct Signs<'a> {
    /// By its mount namespace, its control group or its root directory.
    is_within: bool,
    is_in_another: bool,
    /// Its control group in the unified hierarchy, and that of its parent.
    cgroup: Option<&'a [u8]>,
    parents_cgroup: Option<&'a [u8]>,
}

impl Signs<'_> {
    fn home(self) -> Home {
        match self {
            Signs { is_within: true, .. } => Home::Own,
            Signs { is_in_another: true, .. } => Home::Anothers,
            Signs { cgroup, parents_cgroup, .. } if is_put_elsewhere(cgroup, parents_cgroup) => {
                Home::Unknown
            }
            Signs { .. } => Home::Own,
        }
    }
}

/// To which container a process belongs that was found in `watched` by one of its
/// namespaces. Other containers can have been put into the same pid namespace.
pub(crate) fn home(shared: &Sessions, handle: &Handle, watched: &Watched) -> Home {
    let identity = handle.identity();
    let is_certain = identity == watched.init || shared.births().is_born_inside(identity);
    if is_certain || inside::is_within(handle, watched) || !inside::is_known(handle) {
        return Home::Own;
    }
    let others = || {
        let namespace = handle.pid_namespace().ok();
        namespace.map(|namespace| shared.table.in_pid_namespace(namespace)).unwrap_or_default()
    };
    let is_in = |other: &Arc<Watched>| {
        other.container != watched.container
            && (identity == other.init || inside::is_within(handle, other))
    };
    let (cgroup, parents) = (handle.cgroup().ok(), parents_cgroup(handle));
    let signs = Signs {
        is_within: false,
        is_in_another: others().iter().any(is_in),
        cgroup: cgroup.as_deref(),
        parents_cgroup: parents.as_deref(),
    };
    signs.home()
}

/// A process that had ended when it was to be judged, and that may have opened a session.
#[derive(Debug)]
struct Unclear {
    caller: Caller,
    watched: Arc<Watched>,
    at: Timestamp,
}

/// More of them are not kept: their records are late, or they did not come from outside.
const MAX_UNCLEAR: usize = 1024;

/// How long other processes wait for the arguments of a process that opens a session. On a
/// busy machine an execve may take long, and a session without its command shows little.
/// With more than [`FEW`] waiting there is no such delay: any process can take the name of a
/// runtime's init.
const PATIENCE: Duration = Duration::from_millis(50);
const FEW: usize = 64;

/// Whether the processes that wait since `began` have waited long enough.
fn others_wait(began: Instant, waiting: usize) -> bool {
    waiting > FEW || waiting > 0 && began.elapsed() >= PATIENCE
}

/// A bounded set that forgets what was not looked up for a while.
#[derive(Debug, Default)]
struct Recent {
    young: HashSet<ProcessIdentity>,
    old: HashSet<ProcessIdentity>,
}

impl Recent {
    fn insert(&mut self, identity: ProcessIdentity) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(identity);
    }

    fn remove(&mut self, identity: ProcessIdentity) {
        self.young.remove(&identity);
        self.old.remove(&identity);
    }

    fn contains(&mut self, identity: ProcessIdentity) -> bool {
        if self.young.contains(&identity) {
            return true;
        }
        let is_old = self.old.contains(&identity);
        if is_old {
            self.insert(identity);
        }
        is_old
    }
}

/// Whether an init still runs its runtime's program. An init can wait for its start for as
/// long as its runtime wants.
pub(crate) fn has_not_begun(init: &Handle, max_hash_bytes: u64) -> bool {
    outside::runs_program_of_host(init) || runs_copy_of_runtime(init, max_hash_bytes)
}

/// Whether a process runs the copy in memory that a runtime makes of itself. The content
/// decides, since any process can run a file in memory.
fn runs_copy_of_runtime(handle: &Handle, max_hash_bytes: u64) -> bool {
    let Ok(exe) = handle.open_exe() else { return false };
    let Ok(stat) = file::stat(&exe) else { return false };
    let local = View::of([handle]).ground(&stat).local();
    stat.links == 0
        && Runtimes::default().is_installed(
            &state::state_of(exe.as_fd(), &stat, local, max_hash_bytes),
            max_hash_bytes,
        )
}

impl Openings {
    /// Judges a process that the gate was asked about. Returns a root once for the first
    /// process of each session. `has_arrived`: whether the kernel has recorded that the
    /// process came from outside; used if the process has ended.
    pub(crate) fn opens(
        &mut self,
        shared: &Sessions,
        caller: &Stat,
        watched: &Watched,
        has_arrived: &mut dyn FnMut() -> bool,
    ) -> Option<Root> {
        let identity = caller.identity;
        let root = Root { is_in_control_group: None };
        if identity == watched.init || identity.pid == watched.init.pid {
            return self.opens_as_init(shared, identity, watched).then_some(root);
        }
        if self.is_judged(identity) {
            return None;
        }
        if self.has_parent_inside(caller) || shared.births().is_born_inside(identity) {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return None;
        }
        let handle = Handle::open_exactly(identity).ok();
        // Read first: the process may end at any moment, and nothing shows it afterwards.
        let is_in_control_group =
            handle.as_ref().and_then(|handle| inside::is_in_control_group(handle, watched));
        let judged = handle.and_then(|handle| {
            let is_root = is_root(&handle, Some(caller.parent), watched)?;
            Some((handle, is_root))
        });
        let Some((handle, is_root)) = judged else {
            // It has ended. Without a record of its origin, no session is reported.
            let is_root = has_arrived();
            if is_root {
                self.judged.insert(identity);
                self.inside.insert(identity);
            }
            return is_root.then_some(root);
        };
        self.judged.insert(identity);
        if inside::is_inside(&handle, watched) == Some(true) {
            self.inside.insert(identity);
        }
        is_root.then_some(Root { is_in_control_group })
    }

    /// Judges a process that a scan found.
    pub(crate) fn is_open(
        &mut self,
        shared: &Sessions,
        handle: &Handle,
        watched: &Watched,
    ) -> bool {
        let stat = handle.first_stat();
        if stat.has_ended() {
            return false;
        }
        if stat.identity == watched.init {
            return self.opens_as_init(shared, stat.identity, watched);
        }
        // A process that still runs a program of the host has not executed its command yet,
        // and may only start another process.
        let is_root = !self.judged.contains(stat.identity)
            && is_root(handle, None, watched) == Some(true)
            && !shared.births().is_born_inside(stat.identity)
            && outside::is_from_outside(handle) == Some(false)
            && !outside::is_on_its_way(handle);
        if !is_root {
            return false;
        }
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        true
    }

    /// The init of a container opens a session if the container was put into the pid
    /// namespace of another one.
    fn opens_as_init(
        &mut self,
        shared: &Sessions,
        identity: ProcessIdentity,
        watched: &Watched,
    ) -> bool {
        let beside = origin::beside(shared, watched);
        let namespace = watched.pid_namespace;
        let is_in_unknown_namespace = beside.is_none()
            && !watched.has_own_pid_namespace()
            && namespace.is_some_and(|namespace| !procfs::is_host_pid_namespace(namespace));
        if is_in_unknown_namespace {
            // It is judged when the container that created the namespace is known.
            return false;
        }
        self.is_new_init(identity) && beside.is_some()
    }

    /// True once for each container's init, also if it was judged as another process before.
    fn is_new_init(&mut self, identity: ProcessIdentity) -> bool {
        if self.inits.contains(identity) {
            return false;
        }
        self.judged.insert(identity);
        self.inside.insert(identity);
        self.inits.insert(identity);
        true
    }

    /// Puts aside a process that may be the first one of a container that is not known yet,
    /// to judge it later. False if too many wait for that.
    pub(crate) fn put_aside(&mut self, identity: ProcessIdentity, watched: &Arc<Watched>) -> bool {
        let is_known = self.judged.contains(identity)
            || self
                .aside
                .iter()
                .any(|one| one.identity == identity && one.watched.container == watched.container);
        if is_known {
            return true;
        }
        if self.aside.len() == MAX_ASIDE {
            return false;
        }
        let until = Instant::now() + UNKNOWN;
        self.aside.push_back(Aside { identity, watched: watched.clone(), until });
        true
    }

    /// Takes the processes that were put aside and that belong to their container after all:
    /// no other container with them has become known in time.
    pub(crate) fn take_unclaimed(&mut self, shared: &Sessions) -> Vec<(Handle, Arc<Watched>)> {
        let mut unclaimed = Vec::new();
        self.aside.retain(|Aside { identity, watched, until }| {
            let Ok(handle) = Handle::open_exactly(*identity) else { return false };
            match home(shared, &handle, watched) {
                Home::Anothers => false,
                Home::Unknown if Instant::now() < *until => true,
                Home::Unknown | Home::Own => {
                    unclaimed.push((handle, watched.clone()));
                    false
                }
            }
        });
        unclaimed
    }

    /// Opens a session if this is the first process of one, and describes the process. It
    /// waits until the process has executed its command, but less long if other processes
    /// wait. `others` returns how many.
    pub(crate) fn open(
        &mut self,
        shared: &Sessions,
        caller: &Caller,
        watched: &Arc<Watched>,
        at: Timestamp,
        others: &dyn Fn() -> usize,
    ) -> Option<Executing> {
        let stat = caller.stat.as_ref()?;
        let began = Instant::now();
        let others_wait = || others_wait(began, others());
        let mut recorded = None;
        let mut has_arrived = || {
            recorded = recorded_arrival(shared, caller, watched, &others_wait);
            recorded.is_some()
        };
        let Some(root) = self.opens(shared, stat, watched, &mut has_arrived) else {
            let is_unclear = !self.judged.contains(stat.identity) && caller.asked.is_some();
            if is_unclear && let Some(caller) = caller.try_clone() {
                if self.unclear.len() == MAX_UNCLEAR {
                    self.unclear.pop_front();
                }
                let watched = watched.clone();
                self.unclear.push_back(Unclear { caller, watched, at });
            }
            return None;
        };
        let arrival = recorded.unwrap_or(Arrival {
            is_in_control_group: root.is_in_control_group,
            is_recorded: false,
        });
        Some(self.report_caller(shared, (caller, stat), watched, at, arrival, &others_wait))
    }

    /// Opens a session for a process that had ended when it was to be judged: the gate was
    /// asked about it, and now the kernel's record shows that it came from outside.
    pub(crate) fn open_gone(&mut self, shared: &Sessions, pid: u32) {
        let arrival = |one: &Unclear| {
            let is_it = one.caller.pid == pid;
            is_it.then(|| Arrival::recorded(shared, &one.caller, &one.watched)).flatten()
        };
        let found = self.unclear.iter().enumerate().find_map(|(at, one)| Some((at, arrival(one)?)));
        let Some((at, arrival)) = found else { return };
        let Some(Unclear { caller, watched, at }) = self.unclear.remove(at) else { return };
        let Some(stat) = &caller.stat else { return };
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        self.report_caller(shared, (&caller, stat), &watched, at, arrival, &|| true);
    }

    /// Opens a session for a process that had ended when it was to be judged, and about which
    /// the gate did not report: the kernel's records are all that is known of it.
    pub(crate) fn open_recorded(
        &mut self,
        shared: &Sessions,
        (born, asked): (Born, u64),
        watched: &Arc<Watched>,
        at: Timestamp,
    ) {
        let Born { identity, parent } = born;
        let pid = identity.pid;
        if pid == watched.init.pid || self.is_judged(identity) {
            return;
        }
        let stat = Stat::of_ended(identity, parent);
        let caller = Caller { stat: Some(stat.clone()), pid, asked: Some(asked), pidfd: None };
        let Some(arrival) = Arrival::recorded(shared, &caller, watched) else { return };
        self.judged.insert(identity);
        self.inside.insert(identity);
        self.report_caller(shared, (&caller, &stat), watched, at, arrival, &|| true);
    }

    fn report_caller(
        &mut self,
        shared: &Sessions,
        (caller, stat): (&Caller, &Stat),
        watched: &Arc<Watched>,
        at: Timestamp,
        arrival: Arrival,
        others_wait: &dyn Fn() -> bool,
    ) -> Executing {
        // Read first: the runtime ends when the process that it has started ends. Only the
        // runtime's arguments prove that a runtime was invoked. The name of the process only
        // shows that reading them may be worthwhile.
        let Arrival { is_in_control_group, .. } = arrival;
        let may_be_by_runtime =
            arrival.is_by_runtime() || outside::is_before_entry_point(&stat.comm);
        let asked_for = may_be_by_runtime
            .then(|| invocations::asked_for(&mut shared.invocations(), stat.parent, watched, true))
            .flatten();
        let by_runtime = ByRuntime {
            was_invoked: asked_for.is_some(),
            is_in_control_group,
            asked: caller.asked,
        };
        let mut executing = describe::after_exec(caller, watched, others_wait);
        let recorded =
            || recorded::recorded_arguments(shared, (caller.pid, caller.asked), others_wait);
        if executing.process.argv.is_none() {
            executing.process.argv = recorded();
        }
        let mut process = executing.process.clone();
        if let Some(asked) = asked_for
            && process.argv.as_ref() != Some(&asked.argv)
        {
            // The process had ended, or had executed another program already. Or the
            // invocation was for another process: only the kernel's record of this process
            // can show that.
            let recorded = if asked.is_guess { recorded() } else { None };
            let argv = recorded.unwrap_or(asked.argv);
            if process.argv.as_ref() != Some(&argv) {
                (process.argv, process.exe) = (Some(argv), None);
            }
        }
        let pidfd = caller.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok());
        let opened = Opened { process, pidfd, by_runtime };
        if may_be_by_runtime && Handle::open_exactly(stat.identity).is_err() {
            // It has ended meanwhile. Then only the records show which process made it.
            wait_for_makers(shared, caller, watched, others_wait);
        }
        self.report(shared, watched, at, Source::Gate, opened);
        executing
    }

    /// Reports that a session has opened. If the report is lost, the next scan of the
    /// container's processes repeats it.
    pub(crate) fn report(
        &mut self,
        shared: &Sessions,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        opened: Opened,
    ) {
        let root = opened.process.identity;
        shared.note_session(watched);
        let handle = opened.pidfd;
        let opening = origin::opening(shared, watched, opened.process, opened.by_runtime);
        let is_interactive = opening.interactive.is_some();
        let fact = Fact::Session(SessionFact::Opened { opening: Arc::new(opening) });
        if shared.observe(watched, at, source, fact) {
            // After the opening, so that the session's activity is not reported before it.
            shared.open_root(watched, root);
            let owned = watched.clone();
            let event = Event::Opened { watched: owned, root, is_interactive, process: handle };
            shared.note_activity(watched, Activity::Event(event));
        } else {
            self.judged.remove(root);
            self.inits.remove(root);
        }
    }

    /// Whether a process was judged. The start time by its record may differ by a tick from that
    /// in `/proc`, and no pid is used twice within two ticks.
    fn is_judged(&mut self, identity: ProcessIdentity) -> bool {
        let ProcessIdentity { pid, start_time } = identity;
        let mut times = start_time.saturating_sub(1)..=start_time.saturating_add(1);
        times.any(|start_time| self.judged.contains(ProcessIdentity { pid, start_time }))
    }

    fn has_parent_inside(&mut self, caller: &Stat) -> bool {
        procfs::read_stat(caller.parent).is_ok_and(|parent| {
            parent.identity.start_time <= caller.identity.start_time
                && self.inside.contains(parent.identity)
        })
    }
}

/// A session that was found open, with what is known of its first process.
pub(crate) struct Opened {
    pub(crate) process: Process,
    /// A handle of the first process that was opened before the process could end.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) by_runtime: ByRuntime,
}

/// The first process of a session.
pub(crate) struct Root {
    /// As it was when the process was judged.
    is_in_control_group: Option<bool>,
}

impl Root {
    pub(crate) fn by_runtime(self) -> ByRuntime {
        ByRuntime { is_in_control_group: self.is_in_control_group, ..ByRuntime::default() }
    }
}

/// How a process came from outside.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// As it was when the process was judged, or by the kernel's record.
    is_in_control_group: Option<bool>,
    is_recorded: bool,
}

impl Arrival {
    /// By the kernel's record of the execution that the gate was asked about.
    fn recorded(shared: &Sessions, caller: &Caller, watched: &Watched) -> Option<Arrival> {
        let roots = shared.roots();
        let arrived = roots.arrival(&watched.container, caller.pid, caller.asked?)?;
        // A process with the name of a runtime's init counts only if it was put into the
        // control group, as a runtime does.
        let is_outside_cgroup = !arrived.is_in_control_group;
        if is_outside_cgroup
            && caller.stat.as_ref().is_none_or(|it| outside::is_before_entry_point(&it.comm))
        {
            return None;
        }
        let is_in_control_group = arrived.in_control_group();
        Some(Arrival { is_in_control_group, is_recorded: true })
    }

    /// Only a runtime puts a process from outside into a container's control group.
    fn is_by_runtime(self) -> bool {
        self.is_recorded && self.is_in_control_group == Some(true)
    }
}

/// The recorded origin of a process that has ended. Waits for its records only if it may be
/// a runtime's, and not for long if `others_wait`.
fn recorded_arrival(
    shared: &Sessions,
    caller: &Caller,
    watched: &Watched,
    others_wait: &dyn Fn() -> bool,
) -> Option<Arrival> {
    let asked = caller.asked?;
    let recorded = || Arrival::recorded(shared, caller, watched);
    let may_be_by_runtime =
        caller.stat.as_ref().is_some_and(|it| outside::is_before_entry_point(&it.comm));
    if may_be_by_runtime && recorded().is_none() {
        recorded::wait_for_records(shared, (caller.pid, asked), others_wait);
    }
    recorded()
}

/// Waits a short time until the kernel's record of a process's makers has been read.
fn wait_for_makers(
    shared: &Sessions,
    caller: &Caller,
    watched: &Watched,
    others_wait: &dyn Fn() -> bool,
) {
    const STEP: Duration = Duration::from_millis(1);
    const PATIENCE: Duration = Duration::from_millis(20);
    let began = Instant::now();
    let is_read = || {
        let asked = caller.asked.unwrap_or_default();
        shared.roots().arrival(&watched.container, caller.pid, asked).is_some()
    };
    while shared.records_executions() && !is_read() && began.elapsed() < PATIENCE && !others_wait()
    {
        shared.rest_of_trace.hurry();
        std::thread::sleep(STEP);
    }
}

/// Whether a process is in the container and its parent is not. `None` if that cannot be
/// read any more.
fn is_root(handle: &Handle, parent_at_exec: Option<u32>, watched: &Watched) -> Option<bool> {
    if !inside::is_inside(handle, watched)? {
        return Some(false);
    }
    let start_time = handle.identity().start_time;
    // The parent at the time of the exec may be gone; then the kernel has given
    // the process to the next reaper: the shim outside, or init inside.
    let parent = parent_at_exec
        .and_then(|pid| Handle::open(pid).ok())
        .filter(|parent| parent.identity().start_time <= start_time)
        .or_else(|| Handle::open(handle.stat().ok()?.parent).ok())?;
    let mut chain = procfs::chain(parent.identity().pid).into_iter();
    // A parent that has joined the container and still runs a program of the host only
    // starts another process, as `nsenter` does. It is skipped.
    let first = chain.find(|parent| {
        parent.identity() == watched.init
            || inside::is_inside(parent, watched) != Some(true)
            || !outside::runs_from_outside(parent)
    })?;
    Some(!inside::is_inside(&first, watched)?)
}

/// The container whose init this process is, by its pid namespace.
pub(crate) fn of_init(shared: &Sessions, handle: &Handle) -> Option<Arc<Watched>> {
    let namespace = handle.pid_namespace().ok()?;
    let found = shared.table.in_pid_namespace(namespace);
    found.into_iter().find(|watched| watched.init == handle.identity())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a31_a_process_that_shares_only_a_pid_namespace_may_belong_to_an_unknown_container() {
        let host = Some(&b"/system.slice/containerd.service"[..]);
        let pod = Some(&b"/kubepods/pod/x"[..]);
        let check = |is_within, is_in_another, cgroup, parents_cgroup, expected| {
            let signs = Signs { is_within, is_in_another, cgroup, parents_cgroup };
            assert_eq!(signs.home(), expected, "{signs:?}");
        };
        // A runtime has put it into another control group than its parent's.
        check(false, false, pod, host, Home::Unknown);
        check(false, true, pod, host, Home::Anothers);
        check(false, true, host, host, Home::Anothers);
        check(true, true, pod, host, Home::Own);
        // A process has entered the namespace and nothing else.
        check(false, false, host, host, Home::Own);
        // Control groups show nothing.
        check(false, false, Some(b"/"), host, Home::Own);
        check(false, false, pod, None, Home::Own);
        check(false, false, None, None, Home::Own);
    }

    #[test]
    fn a31_an_init_that_was_judged_as_another_process_is_judged_as_an_init() {
        let init = ProcessIdentity { pid: 7, start_time: 1 };
        let mut sessions = Openings::default();
        sessions.judged.insert(init);
        assert!(sessions.is_new_init(init));
        assert!(!sessions.is_new_init(init), "it is new only once");
    }

    #[test]
    fn what_is_looked_up_is_kept_and_the_rest_is_forgotten() {
        let process = |pid| ProcessIdentity { pid, start_time: 1 };
        let mut recent = Recent::default();
        for pid in 0..u32::try_from(4 * GENERATION).unwrap() {
            recent.insert(process(pid));
            assert!(recent.contains(process(0)), "after {pid}");
        }
        assert!(!recent.contains(process(1)));
        assert!(recent.young.len() + recent.old.len() <= 2 * GENERATION);
    }
}
