//! Who comes into a container from outside: a process in one of the container's
//! namespaces, its control group or its root whose parent is in none of them, and that
//! is not the container's init.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::acts::Act;
use super::acts::Event;
use super::calls;
use crate::model::process::may_be_runtime;
use crate::model::{
    Ancestor, ContainerId, Entry, Fact, Interactive, Opening, Process, ProcessIdentity, Source,
    printable,
};
use crate::sys::door::View;
use crate::sys::procfs::{self, Handle, Stat};
use crate::sys::{file, overlay};
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;
use crate::watch::core::table::is_put_elsewhere;
use crate::watch::core::table::parents_cgroup;
use crate::watch::exec::unseen;
use crate::watch::exec::unseen::Runtimes;
use crate::watch::process::describe;
use crate::watch::process::describe::Caller;
use crate::watch::process::describe::Executing;
use crate::watch::process::roots::Arrived;
use crate::watch::process::roots::Maker;

/// Half of how many processes are remembered.
const GENERATION: usize = 16 * 1024;

/// Processes that have been judged, so that each session is told once and most
/// processes cost nothing the second time.
#[derive(Debug, Default)]
pub(in crate::watch) struct Sessions {
    judged: Recent,
    /// Those that were judged as the init of their container. Before that container was
    /// known, one of them may have been judged as any other process.
    inits: Recent,
    /// Those of them that are known to be in a container, as parents of others.
    inside: Recent,
    /// Gone before anybody looked, and the kernel's record of where they came from has
    /// not been read: the gate's facts of them, oldest first.
    unclear: VecDeque<Unclear>,
    /// Of containers that are not known yet, by all that can be seen, oldest first.
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

/// How long a container may take to be known after its first process runs. After that,
/// the process is judged by what can be seen of it.
const UNKNOWN: Duration = Duration::from_secs(10);
const MAX_ASIDE: usize = 256;

/// Whose a process is that may be in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::watch) enum Home {
    Own,
    /// It shares the pid namespace, and is in another container by all else.
    Anothers,
    /// It shares the pid namespace, and looks like the first process of a container that
    /// nobody has announced yet.
    Unknown,
}

/// What tells whose a process is.
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

/// Whose a process is that was found to be in a container by one of its namespaces. Others
/// can have been put into the same pid namespace.
pub(in crate::watch) fn home(shared: &Shared, handle: &Handle, watched: &Watched) -> Home {
    let identity = handle.identity();
    let is_certain = identity == watched.init || shared.births().is_born_inside(identity);
    if is_certain || is_within(handle, watched) || !is_known(handle) {
        return Home::Own;
    }
    let others = || {
        let namespace = handle.pid_namespace().ok();
        namespace.map(|namespace| shared.table.in_pid_namespace(namespace)).unwrap_or_default()
    };
    let is_in = |other: &Arc<Watched>| {
        other.container != watched.container && (identity == other.init || is_within(handle, other))
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

/// A process that may have opened a session.
#[derive(Debug)]
struct Unclear {
    caller: Caller,
    watched: Arc<Watched>,
    at: Timestamp,
}

/// More of them are not kept: their records are late, or nobody came from outside.
const MAX_UNCLEAR: usize = 1024;

/// How long others wait for the arguments of who opens a session: on a busy machine an
/// execve may take its time, and a session without its command says little. Not while
/// many wait: anybody can call himself a runtime's init.
const PATIENCE: Duration = Duration::from_millis(50);
const FEW: usize = 64;

/// Whether those who wait since `began` have waited long enough.
fn others_wait(began: Instant, waiting: usize) -> bool {
    waiting > FEW || waiting > 0 && began.elapsed() >= PATIENCE
}

/// A bounded set that forgets what was not asked for in a while.
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

/// Whether a process is called as a runtime's init is until it becomes the container's
/// program, or a session's command. A process chooses its name, so this is a reason to
/// look at it and evidence of nothing.
pub(in crate::watch) fn is_before_entry_point(comm: &[u8]) -> bool {
    may_be_runtime(comm)
}

/// Whether a process runs a program of the host's.
pub(in crate::watch) fn runs_program_of_host(handle: &Handle) -> bool {
    handle.has_host_root() || runs_from_outside(handle)
}

/// Whether a process is a runtime on its way into the container, before it becomes what it
/// was asked for. What a program of the host's calls itself may be believed.
pub(in crate::watch) fn is_on_its_way(handle: &Handle) -> bool {
    is_before_entry_point(&handle.first_stat().comm) && runs_program_of_host(handle)
}

/// Whether an init that was found is still its runtime's. It may wait for its start for
/// as long as its runtime likes.
pub(in crate::watch) fn has_not_begun(init: &Handle, max_hash_bytes: u64) -> bool {
    runs_program_of_host(init) || runs_copy_of_runtime(init, max_hash_bytes)
}

/// Whether a process that has been there for a while runs a runtime's copy of itself in
/// memory: known by its content, since anybody can run a file in memory.
fn runs_copy_of_runtime(handle: &Handle, max_hash_bytes: u64) -> bool {
    let Ok(exe) = handle.open_exe() else { return false };
    let Ok(stat) = file::stat(&exe) else { return false };
    let local = View::of([handle]).ground(&stat).local();
    stat.links == 0
        && Runtimes::default().is_installed(
            &unseen::state_of(exe.as_fd(), &stat, local, max_hash_bytes),
            max_hash_bytes,
        )
}

/// A runtime has no more time than this between its copy in memory and what it was asked
/// for, unless the copy is recognised.
const ON_ITS_WAY: Duration = Duration::from_secs(10);

impl Sessions {
    /// Judges a process that the gate saw; something once for each session's first process.
    /// `has_arrived`: whether the kernel has recorded that it came from outside, asked
    /// of a process that is gone.
    pub(in crate::watch) fn opens(
        &mut self,
        shared: &Shared,
        caller: &Stat,
        watched: &Watched,
        has_arrived: &mut dyn FnMut() -> bool,
    ) -> Option<Root> {
        let identity = caller.identity;
        let root = Root { is_in_control_group: None };
        if identity == watched.init || identity.pid == watched.init.pid {
            return self.opens_as_init(shared, identity, watched).then_some(root);
        }
        if self.judged.contains(identity) {
            return None;
        }
        if self.has_parent_inside(caller) || shared.births().is_born_inside(identity) {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return None;
        }
        let handle = Handle::open_exactly(identity).ok();
        // First: it may end at any moment, and nothing shows it afterwards.
        let is_in_control_group =
            handle.as_ref().and_then(|handle| is_in_control_group(handle, watched));
        let judged = handle.and_then(|handle| {
            let is_root = is_root(&handle, Some(caller.parent), watched)?;
            Some((handle, is_root))
        });
        let Some((handle, is_root)) = judged else {
            // Gone. Without a record of where it came from, no session is invented.
            let is_root = has_arrived();
            if is_root {
                self.judged.insert(identity);
                self.inside.insert(identity);
            }
            return is_root.then_some(root);
        };
        self.judged.insert(identity);
        if is_inside(&handle, watched) == Some(true) {
            self.inside.insert(identity);
        }
        is_root.then_some(Root { is_in_control_group })
    }

    /// Judges a process that a scan found.
    pub(in crate::watch) fn is_open(
        &mut self,
        shared: &Shared,
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
        // One that still runs the host's program has not become its command yet, and
        // may only start another one.
        let is_root = !self.judged.contains(stat.identity)
            && is_root(handle, None, watched) == Some(true)
            && !shared.births().is_born_inside(stat.identity)
            && is_from_outside(handle) == Some(false)
            && !is_on_its_way(handle);
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
        shared: &Shared,
        identity: ProcessIdentity,
        watched: &Watched,
    ) -> bool {
        let beside = beside(shared, watched);
        let namespace = watched.pid_namespace;
        let is_in_an_unknown_ones = beside.is_none()
            && !watched.has_own_pid_namespace()
            && namespace.is_some_and(|namespace| !procfs::is_host_pid_namespace(namespace));
        if is_in_an_unknown_ones {
            // It is judged when the container that began the namespace is known.
            return false;
        }
        self.is_new_init(identity) && beside.is_some()
    }

    /// True once for each container's init, whatever it was taken for before.
    fn is_new_init(&mut self, identity: ProcessIdentity) -> bool {
        if self.inits.contains(identity) {
            return false;
        }
        self.judged.insert(identity);
        self.inside.insert(identity);
        self.inits.insert(identity);
        true
    }

    /// Judges a process later, which may be the first one of a container that is not known
    /// yet; false if too many wait for that.
    pub(in crate::watch) fn put_aside(
        &mut self,
        identity: ProcessIdentity,
        watched: &Arc<Watched>,
    ) -> bool {
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

    /// Processes that were put aside and that are a container's after all: none that holds
    /// them has become known in time.
    pub(in crate::watch) fn take_unclaimed(
        &mut self,
        shared: &Shared,
    ) -> Vec<(Handle, Arc<Watched>)> {
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

    /// Opens a session if this is the first process of one, which is described then.
    /// It waits for that process to become what it is to be, and less long if
    /// `others` do.
    pub(in crate::watch) fn open(
        &mut self,
        shared: &Shared,
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
        Some(self.tell_of_caller(shared, (caller, stat), watched, at, arrival, &others_wait))
    }

    /// The kernel has recorded that a process came from outside that was gone before
    /// anybody looked: the gate was asked about it.
    pub(in crate::watch) fn open_gone(&mut self, shared: &Shared, pid: u32) {
        let arrival = |one: &Unclear| {
            let of_it = one.caller.pid == pid;
            of_it.then(|| Arrival::recorded(shared, &one.caller, &one.watched)).flatten()
        };
        let found = self.unclear.iter().enumerate().find_map(|(at, one)| Some((at, arrival(one)?)));
        let Some((at, arrival)) = found else { return };
        let Some(Unclear { caller, watched, at }) = self.unclear.remove(at) else { return };
        let Some(stat) = &caller.stat else { return };
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        self.tell_of_caller(shared, (&caller, stat), &watched, at, arrival, &|| true);
    }

    fn tell_of_caller(
        &mut self,
        shared: &Shared,
        (caller, stat): (&Caller, &Stat),
        watched: &Arc<Watched>,
        at: Timestamp,
        arrival: Arrival,
        others_wait: &dyn Fn() -> bool,
    ) -> Executing {
        // First: it ends when what it has started does. That a runtime was called for it
        // is known of the runtime; by its name is only known that it may be worth asking.
        let Arrival { is_in_control_group, .. } = arrival;
        let may_be_by_runtime = arrival.is_by_runtime() || is_before_entry_point(&stat.comm);
        let asked_for = may_be_by_runtime
            .then(|| calls::asked_for(&mut shared.calls(), stat.parent, watched, true))
            .flatten();
        let by_runtime =
            ByRuntime { was_called: asked_for.is_some(), is_in_control_group, asked: caller.asked };
        let mut executing = describe::after_exec(caller, watched, others_wait);
        let recorded =
            || describe::recorded_arguments(shared, (caller.pid, caller.asked), others_wait);
        if executing.process.argv.is_none() {
            executing.process.argv = recorded();
        }
        let mut process = executing.process.clone();
        if let Some(asked) = asked_for
            && process.argv.as_ref() != Some(&asked.argv)
        {
            // It was over, or had become another program already; or the call was meant for
            // another process, which only the kernel's record of this one can tell.
            let recorded = if asked.is_guess { recorded() } else { None };
            let argv = recorded.unwrap_or(asked.argv);
            if process.argv.as_ref() != Some(&argv) {
                (process.argv, process.exe) = (Some(argv), None);
            }
        }
        let pidfd = caller.pidfd.as_ref().and_then(|pidfd| pidfd.try_clone().ok());
        let opened = Opened { process, pidfd, by_runtime };
        if may_be_by_runtime && Handle::open_exactly(stat.identity).is_err() {
            // It has ended meanwhile: then only the records tell who made it.
            wait_for_makers(shared, caller, watched, others_wait);
        }
        self.tell(shared, watched, at, Source::Gate, opened);
        executing
    }

    /// Tells that a session has opened. If that is lost, the next look at the
    /// container's processes tells it again.
    pub(in crate::watch) fn tell(
        &mut self,
        shared: &Shared,
        watched: &Arc<Watched>,
        at: Timestamp,
        source: Source,
        opened: Opened,
    ) {
        let root = opened.process.identity;
        shared.note_session(watched);
        let handle = opened.pidfd;
        let opening = opening(shared, watched, opened.process, opened.by_runtime);
        let is_interactive = opening.interactive.is_some();
        let fact = Fact::SessionOpened { opening: Arc::new(opening) };
        if shared.observe(watched, at, source, fact) {
            // Behind it, so that what is done in it is not told before.
            shared.roots().open(&watched.container, root);
            let watched_too = watched.clone();
            let event =
                Event::Opened { watched: watched_too, root, is_interactive, process: handle };
            shared.act(watched, Act::Event(event));
        } else {
            self.judged.remove(root);
            self.inits.remove(root);
        }
    }

    fn has_parent_inside(&mut self, caller: &Stat) -> bool {
        procfs::read_stat(caller.parent).is_ok_and(|parent| {
            parent.identity.start_time <= caller.identity.start_time
                && self.inside.contains(parent.identity)
        })
    }
}

/// A session that was found to be open.
pub(in crate::watch) struct Opened {
    pub(in crate::watch) process: Process,
    /// A handle of its first process that was opened before it could end.
    pub(in crate::watch) pidfd: Option<OwnedFd>,
    pub(in crate::watch) by_runtime: ByRuntime,
}

/// The first process of a session.
pub(in crate::watch) struct Root {
    /// As it was when it was judged.
    is_in_control_group: Option<bool>,
}

impl Root {
    pub(in crate::watch) fn by_runtime(self) -> ByRuntime {
        ByRuntime { is_in_control_group: self.is_in_control_group, ..ByRuntime::default() }
    }
}

/// What is known of how a runtime has made a process, beside what the process shows.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::watch) struct ByRuntime {
    /// A runtime on the host was called to execute something in this container.
    was_called: bool,
    /// When it was judged, or by the kernel's record of one that is gone.
    is_in_control_group: Option<bool>,
    /// When the gate was asked about it, by the records' clock.
    asked: Option<u64>,
}

/// How a process came from outside.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    /// When it was judged, or by the kernel's record.
    is_in_control_group: Option<bool>,
    is_recorded: bool,
}

impl Arrival {
    /// By the kernel's record of what the gate was asked about.
    fn recorded(shared: &Shared, caller: &Caller, watched: &Watched) -> Option<Arrival> {
        let roots = shared.roots();
        let arrived = roots.arrival(&watched.container, caller.pid, caller.asked?)?;
        // What calls itself a runtime is judged by what a runtime does.
        let is_past_it = !arrived.is_in_control_group;
        if is_past_it && caller.stat.as_ref().is_none_or(|it| is_before_entry_point(&it.comm)) {
            return None;
        }
        let is_in_control_group = arrived.in_control_group();
        Some(Arrival { is_in_control_group, is_recorded: true })
    }

    /// Only a runtime puts a process into a container's control group that came from
    /// outside.
    fn is_by_runtime(self) -> bool {
        self.is_recorded && self.is_in_control_group == Some(true)
    }
}

/// Where the kernel has recorded that a process came from, which is gone by now. Waits
/// for its records only if it is worth asking, and not for long if `others_wait`.
fn recorded_arrival(
    shared: &Shared,
    caller: &Caller,
    watched: &Watched,
    others_wait: &dyn Fn() -> bool,
) -> Option<Arrival> {
    let asked = caller.asked?;
    let recorded = || Arrival::recorded(shared, caller, watched);
    let may_be_runtimes = caller.stat.as_ref().is_some_and(|it| is_before_entry_point(&it.comm));
    if may_be_runtimes && recorded().is_none() {
        describe::wait_for_records(shared, (caller.pid, asked), others_wait);
    }
    recorded()
}

/// Waits until the kernel's record of who made a process has been read, but not for long.
fn wait_for_makers(
    shared: &Shared,
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
        std::thread::sleep(STEP);
    }
}

/// Whether a process is in the container: by its mount namespace, its pid namespace,
/// its control group or its root directory. One of them is enough: who joins only one
/// of them is in it all the same. `None` of who is ending: nothing is known of it.
fn is_inside(handle: &Handle, watched: &Watched) -> Option<bool> {
    let shares_pids = || {
        handle.pid_namespace().is_ok_and(|namespace| {
            watched.has_namespaces()
                && watched.pid_namespace == Some(namespace)
                && !procfs::is_host_pid_namespace(namespace)
        })
    };
    let is_inside =
        is_within(handle, watched) || (watched.has_own_pid_namespace() && shares_pids());
    // Asked last: what can be read now could be read before.
    (is_inside || is_known(handle)).then_some(is_inside)
}

/// A process loses its namespaces while it ends.
fn is_known(handle: &Handle) -> bool {
    handle.mount_namespace().is_ok()
}

/// The same without the pid namespace, into which other containers can be put.
fn is_within(handle: &Handle, watched: &Watched) -> bool {
    let is_in_mount_namespace = handle.mount_namespace().is_ok_and(|namespace| {
        watched.has_namespaces()
            && watched.mount_namespace == Some(namespace)
            && !procfs::is_host_mount_namespace(namespace)
    });
    is_in_mount_namespace
        || is_in_control_group(handle, watched) == Some(true)
        || file::stat_path(handle.root_path())
            .is_ok_and(|root| root.device == watched.device && root.mount == watched.mount)
}

/// `None` if the container has none of its own, or the process is gone.
fn is_in_control_group(handle: &Handle, watched: &Watched) -> Option<bool> {
    let unified = || watched.holds_cgroup(&handle.cgroup().ok()?);
    // Where the unified hierarchy is not what runtimes use.
    let of_records = || Some(handle.perf_cgroup() == Some(watched.perf_cgroup?));
    let is_in = unified().or_else(of_records)?;
    // A process that has ended may be shown in another one, and never in a container's that
    // it was not in.
    (is_in || !handle.stat().ok()?.has_ended()).then_some(is_in)
}

/// Whether a process is in the container and its parent is not; `None` if that
/// cannot be told any more.
fn is_root(handle: &Handle, parent_at_exec: Option<u32>, watched: &Watched) -> Option<bool> {
    if !is_inside(handle, watched)? {
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
    // Who has joined and still runs a program of the host's has only come to start
    // another one: `nsenter` does so.
    let first = chain.find(|parent| {
        parent.identity() == watched.init
            || is_inside(parent, watched) != Some(true)
            || !runs_from_outside(parent)
    })?;
    Some(!is_inside(&first, watched)?)
}

/// Whether a process runs a program that lies on no mount of its own namespace: it
/// was started before the process came here.
fn runs_from_outside(handle: &Handle) -> bool {
    is_from_outside(handle) == Some(true)
}

/// The same; `None` of a process that has ended.
fn is_from_outside(handle: &Handle) -> Option<bool> {
    let exe = handle.open_exe().and_then(file::stat).ok()?;
    let Some(mount) = exe.mount else { return Some(false) };
    // A file in memory is on no mount, whoever runs it.
    let may_be = exe.links > 0 || procfs::age(handle.identity()) < ON_ITS_WAY;
    Some(may_be && overlay::find_place(&handle.mountinfo().ok()?, mount).is_none())
}

/// The container of which a process is the init, by the pid namespace that it is in.
pub(in crate::watch) fn of_init(shared: &Shared, handle: &Handle) -> Option<Arc<Watched>> {
    let namespace = handle.pid_namespace().ok()?;
    let found = shared.table.in_pid_namespace(namespace);
    found.into_iter().find(|watched| watched.init == handle.identity())
}

/// What is to be told of a session's beginning, gathered while it may be ending.
fn opening(
    shared: &Shared,
    watched: &Watched,
    mut process: Process,
    by_runtime: ByRuntime,
) -> Opening {
    let identity = process.identity;
    let handle = Handle::open_exactly(identity).ok();
    let has_terminal = process.tty.is_some()
        || handle.as_ref().is_some_and(|handle| handle.is_terminal(0) == Some(true));
    let shim = procfs::read_stat(watched.init.pid).ok().map(|init| init.parent);
    let parent = process.ancestors.last().map(|outermost| outermost.identity.pid);
    let parent = parent.or_else(|| Some(handle.as_ref()?.first_stat().parent));
    let mut chain = parent.map(procfs::chain).unwrap_or_default();
    if !is_whole(&chain)
        && let Some(reaper) = handle.as_ref().and_then(|handle| handle.stat().ok())
    {
        // Its parent has ended, and it was given to another one.
        chain = procfs::chain(reaper.parent);
    }
    // Of parents that have ended, the kernel's records tell.
    let recorded = if is_whole(&chain) {
        None
    } else {
        let since = by_runtime.asked.unwrap_or_default();
        shared.roots().arrival(&watched.container, identity.pid, since).cloned()
    };
    let makers = recorded.as_ref().map(|arrived| &*arrived.makers).unwrap_or_default();
    let is_shim = |pid| Some(pid) == shim;
    let evidence = Evidence {
        is_by_runtime: by_runtime.was_called,
        is_child_of_shim: chain.iter().any(|one| is_shim(one.identity().pid))
            || makers.iter().any(|maker| is_shim(maker.pid)),
        is_parent_gone: !is_whole(&chain) && (makers.is_empty() || shim.is_none()),
        is_in_control_group: handle
            .as_ref()
            .and_then(|one| is_in_control_group(one, watched))
            .or(by_runtime.is_in_control_group)
            .or(recorded.as_ref().and_then(Arrived::in_control_group)),
    };
    let beside = if identity == watched.init { beside(shared, watched) } else { None };
    let entry = if beside.is_some() { Entry::SharedPidNamespace } else { evidence.entry() };
    let host = if makers.is_empty() {
        chain.iter().map(describe::ancestor).collect()
    } else {
        made_by(makers)
    };
    let host = above(process.ancestors.last_mut(), host);
    let variables = &shared.settings.requester_variables;
    let requested_by = requester(variables, process.argv.as_deref().unwrap_or_default())
        .or_else(|| Some(printable(&handle.as_ref()?.variable(variables)?)));
    Opening {
        root: identity,
        entry,
        interactive: has_terminal.then_some(Interactive::Terminal),
        host,
        login: handle.as_ref().and_then(Handle::login),
        requested_by,
        beside,
        process,
    }
}

/// The parents that stand above the last one that is known of a process. That one may be
/// among them; if it had ended when it was looked at, they may know what it was.
fn above(last: Option<&mut Ancestor>, mut parents: Vec<Ancestor>) -> Vec<Ancestor> {
    let Some(last) = last else { return parents };
    let is_last = |parent: &Ancestor| parent.identity.pid == last.identity.pid;
    if let Some(place) = parents.iter().position(is_last) {
        let known = parents.drain(..=place).next_back();
        if last.exe.is_none()
            && let Some(known) = known
        {
            (last.exe, last.argv) = (known.exe, known.argv);
        }
    }
    parents
}

/// The parents of a process by the kernel's records, and those of the last of them by
/// /proc: what is recorded ends with what was there before.
fn made_by(makers: &[Maker]) -> Vec<Ancestor> {
    let by_record = |maker: &Maker| {
        let living = Handle::open(maker.pid).ok().map(|handle| describe::ancestor(&handle));
        let exe = maker.exe.as_deref().map(printable);
        // The number may be another process's by now.
        living.filter(|living| living.exe == exe || exe.is_none()).unwrap_or(Ancestor {
            identity: ProcessIdentity { pid: maker.pid, start_time: 0 },
            exe,
            argv: None,
        })
    };
    let above = makers.last().and_then(|last| procfs::read_stat(last.pid).ok());
    let above = above.map(|last| procfs::chain(last.parent)).unwrap_or_default();
    makers.iter().map(by_record).chain(above.iter().map(describe::ancestor)).collect()
}

/// Who asked for a session whose command is `env NAME=VALUE COMMAND`: webhooks name him
/// by putting that before what he asked for.
fn requester(variables: &[String], argv: &[String]) -> Option<String> {
    let (program, rest) = argv.split_first()?;
    if program.rsplit('/').next() != Some("env") {
        return None;
    }
    let mut assignments = rest.iter().map_while(|word| word.split_once('='));
    assignments
        .find_map(|(name, value)| variables.iter().any(|known| known == name).then_some(value))
        .map(ToOwned::to_owned)
}

/// Whether a chain of parents leads to the host's first process. Of who is ending the
/// kernel does not tell the parent any more.
fn is_whole(chain: &[Handle]) -> bool {
    chain.last().is_some_and(|last| last.identity().pid == 1)
}

/// The container in whose pid namespace this one was put, which is not its own.
fn beside(shared: &Shared, watched: &Watched) -> Option<ContainerId> {
    let namespace = watched.pid_namespace?;
    if watched.has_own_pid_namespace() || procfs::is_host_pid_namespace(namespace) {
        return None;
    }
    Some(shared.table.first_in_pid_namespace(namespace)?.container.clone())
}

/// By what it is told how a session came in. Names are no evidence: what a process
/// descends from and where its runtime has put it are.
#[derive(Clone, Copy, Debug)]
struct Evidence {
    is_by_runtime: bool,
    /// It descends from whoever started the container's init.
    is_child_of_shim: bool,
    /// Nothing is known of its parent: who is executed by a shim, and ends at once.
    is_parent_gone: bool,
    is_in_control_group: Option<bool>,
}

impl Evidence {
    fn entry(self) -> Entry {
        match self {
            Evidence { is_in_control_group: Some(false), .. } => Entry::Namespace,
            Evidence { is_child_of_shim: true, .. } => Entry::RuntimeExec,
            // A shim does not wait for what it has asked for; who calls a runtime by hand
            // does.
            Evidence { is_parent_gone: true, is_in_control_group: Some(true), .. }
            | Evidence { is_parent_gone: true, is_by_runtime: true, .. } => Entry::RuntimeExec,
            Evidence { is_by_runtime: true, .. } => Entry::RuntimeDirect,
            // A runtime puts what it executes into the container's control group.
            Evidence { is_in_control_group: Some(true), .. } => Entry::RuntimeDirect,
            Evidence { is_in_control_group: None, .. } => Entry::Namespace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a31_who_shares_a_pid_namespace_alone_may_be_a_container_that_is_not_known_yet() {
        let host = Some(&b"/system.slice/containerd.service"[..]);
        let pod = Some(&b"/kubepods/pod/x"[..]);
        let check = |is_within, is_in_another, cgroup, parents_cgroup, expected| {
            let signs = Signs { is_within, is_in_another, cgroup, parents_cgroup };
            assert_eq!(signs.home(), expected, "{signs:?}");
        };
        // A runtime has put it where its parent is not.
        check(false, false, pod, host, Home::Unknown);
        check(false, true, pod, host, Home::Anothers);
        check(false, true, host, host, Home::Anothers);
        check(true, true, pod, host, Home::Own);
        // Somebody has entered the namespace and nothing else.
        check(false, false, host, host, Home::Own);
        // Where control groups tell nothing.
        check(false, false, Some(b"/"), host, Home::Own);
        check(false, false, pod, None, Home::Own);
        check(false, false, None, None, Home::Own);
    }

    #[test]
    fn a31_an_init_that_was_judged_as_another_process_is_judged_as_an_init() {
        let init = ProcessIdentity { pid: 7, start_time: 1 };
        let mut sessions = Sessions::default();
        sessions.judged.insert(init);
        assert!(sessions.is_new_init(init));
        assert!(!sessions.is_new_init(init), "that is said once");
    }

    #[test]
    fn how_a_session_came_in_is_told_by_evidence() {
        let none = Evidence {
            is_by_runtime: false,
            is_child_of_shim: false,
            is_parent_gone: false,
            is_in_control_group: None,
        };
        let check = |evidence: Evidence, expected| assert_eq!(evidence.entry(), expected);
        let inside = Some(true);
        let shim = Evidence { is_child_of_shim: true, is_in_control_group: inside, ..none };
        check(shim, Entry::RuntimeExec);
        check(Evidence { is_by_runtime: true, ..shim }, Entry::RuntimeExec);
        let by_hand = Evidence { is_by_runtime: true, is_in_control_group: inside, ..none };
        check(by_hand, Entry::RuntimeDirect);
        check(Evidence { is_by_runtime: false, ..by_hand }, Entry::RuntimeDirect);
        // Over before anything but the gate's own facts could be read.
        let short = Evidence { is_by_runtime: true, is_parent_gone: true, ..none };
        check(short, Entry::RuntimeExec);
        let recorded = Evidence { is_parent_gone: true, is_in_control_group: inside, ..none };
        check(recorded, Entry::RuntimeExec);
        // Whatever it calls itself, no runtime has put it there.
        let outside = Some(false);
        check(Evidence { is_in_control_group: outside, ..none }, Entry::Namespace);
        check(Evidence { is_in_control_group: outside, ..by_hand }, Entry::Namespace);
        check(none, Entry::Namespace);
    }

    #[test]
    fn who_asked_for_a_session_is_told_by_the_command_that_a_webhook_has_changed() {
        let variables = ["SPO_EXEC_REQUEST_UID".to_owned(), "ASKED_BY".to_owned()];
        let of = |argv: &str| {
            let argv: Vec<String> = argv.split(' ').map(str::to_owned).collect();
            requester(&variables, &argv)
        };
        assert_eq!(of("env SPO_EXEC_REQUEST_UID=7f3 sh -i").as_deref(), Some("7f3"));
        assert_eq!(of("/usr/bin/env A=1 ASKED_BY=a=b sh").as_deref(), Some("a=b"));
        assert_eq!(of("env sh ASKED_BY=x"), None, "an argument of somebody else's");
        assert_eq!(of("sh ASKED_BY=x"), None);
        assert_eq!(requester(&variables, &[]), None);
    }

    #[test]
    fn the_parents_above_are_all_but_what_is_known_already() {
        let one = |pid: u32, exe: Option<&str>| Ancestor {
            identity: ProcessIdentity { pid, start_time: 1 },
            exe: exe.map(ToOwned::to_owned),
            argv: None,
        };
        let (runc, shim) = (|| one(9, Some("runc")), || one(5, Some("shim")));
        let check = |known: Option<Ancestor>, parents: &[Ancestor], expected: &[Ancestor]| {
            let mut known = known;
            assert_eq!(above(known.as_mut(), parents.to_vec()), expected);
            known
        };
        check(None, &[shim()], &[shim()]);
        check(Some(runc()), &[runc(), shim()], &[shim()]);
        // It has ended, and what it made has another parent now.
        check(Some(one(9, None)), &[shim()], &[shim()]);
        let known = check(Some(one(9, None)), &[runc(), shim()], &[shim()]);
        assert_eq!(known, Some(runc()));
    }

    #[test]
    fn what_is_asked_for_is_not_forgotten_and_the_rest_is() {
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
