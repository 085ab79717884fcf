//! Who comes into a container from outside: a process in one of the container's
//! namespaces, its control group or its root whose parent is in none of them, and that
//! is not the container's init.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::acts::{Act, Event};
use super::calls;
use super::process::{self, Caller, Executing};
use super::shared::Shared;
use super::table::Watched;
use super::unseen::{self, Runtimes};
use crate::model::process::may_be_runtime;
use crate::model::{
    ContainerId, Entry, Fact, Interactive, Opening, Process, ProcessIdentity, Source, printable,
};
use crate::sys::door::View;
use crate::sys::procfs::{self, Handle, Stat};
use crate::sys::{file, overlay};

/// Half of how many processes are remembered.
const GENERATION: usize = 16 * 1024;

/// Processes that have been judged, so that each session is told once and most
/// processes cost nothing the second time.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    judged: Recent,
    /// Those of them that are known to be in a container, as parents of others.
    inside: Recent,
    /// Gone before anybody looked, and the kernel's record of where they came from has
    /// not been read: the gate's facts of them, oldest first.
    unclear: VecDeque<Unclear>,
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
pub(super) fn is_before_entry_point(comm: &[u8]) -> bool {
    may_be_runtime(comm)
}

/// Whether a process runs a program of the host's.
pub(super) fn runs_program_of_host(handle: &Handle) -> bool {
    handle.has_host_root() || runs_from_outside(handle)
}

/// Whether a process is a runtime on its way into the container, before it becomes what it
/// was asked for. What a program of the host's calls itself may be believed.
pub(super) fn is_on_its_way(handle: &Handle) -> bool {
    is_before_entry_point(&handle.first_stat().comm) && runs_program_of_host(handle)
}

/// Whether an init that was found is still its runtime's. It may wait for its start for
/// as long as its runtime likes.
pub(super) fn has_not_begun(init: &Handle, max_hash_bytes: u64) -> bool {
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
    /// Judges a process that the gate saw; true once for each session's first process.
    /// `has_arrived`: whether the kernel has recorded that it came from outside, asked
    /// of a process that is gone.
    pub(super) fn opens(
        &mut self,
        shared: &Shared,
        caller: &Stat,
        watched: &Watched,
        has_arrived: &mut dyn FnMut() -> bool,
    ) -> bool {
        let identity = caller.identity;
        if self.judged.contains(identity) {
            return false;
        }
        if identity == watched.init || identity.pid == watched.init.pid {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return beside(shared, watched).is_some();
        }
        if self.has_parent_inside(caller) || shared.births().is_born_inside(identity) {
            self.judged.insert(identity);
            self.inside.insert(identity);
            return false;
        }
        let handle = Handle::open_exactly(identity).ok();
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
            return is_root;
        };
        self.judged.insert(identity);
        if is_inside(&handle, watched) == Some(true) {
            self.inside.insert(identity);
        }
        is_root
    }

    /// Judges a process that a scan found.
    pub(super) fn is_open(&mut self, shared: &Shared, handle: &Handle, watched: &Watched) -> bool {
        let stat = handle.first_stat();
        if stat.has_ended() || self.judged.contains(stat.identity) {
            return false;
        }
        let is_root = if stat.identity == watched.init {
            beside(shared, watched).is_some()
        } else {
            // One that still runs the host's program has not become its command yet, and
            // may only start another one.
            is_root(handle, None, watched) == Some(true)
                && !shared.births().is_born_inside(stat.identity)
                && !runs_from_outside(handle)
                && !is_on_its_way(handle)
        };
        if !is_root {
            return false;
        }
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        true
    }

    /// Opens a session if this is the first process of one, which is described then.
    /// It waits for that process to become what it is to be, and less long if
    /// `others` do.
    pub(super) fn open(
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
        let mut arrival = None;
        let mut has_arrived = || {
            arrival = arrived(shared, caller, watched, &others_wait);
            arrival.is_some()
        };
        if !self.opens(shared, stat, watched, &mut has_arrived) {
            let is_unclear = !self.judged.contains(stat.identity)
                && is_before_entry_point(&stat.comm)
                && caller.asked.is_some();
            if is_unclear && let Some(caller) = caller.try_clone() {
                if self.unclear.len() == MAX_UNCLEAR {
                    self.unclear.pop_front();
                }
                let watched = watched.clone();
                self.unclear.push_back(Unclear { caller, watched, at });
            }
            return None;
        }
        Some(self.tell_of_caller(shared, (caller, stat), watched, at, arrival, &others_wait))
    }

    /// The kernel has recorded that a process came from outside that was gone before
    /// anybody looked: the gate was asked about it.
    pub(super) fn open_gone(&mut self, shared: &Shared, pid: u32) {
        let has_arrived = |one: &Unclear| {
            let asked = one.caller.asked.unwrap_or(u64::MAX);
            one.caller.pid == pid && shared.roots().has_arrived(&one.watched.container, pid, asked)
        };
        let Some(at) = self.unclear.iter().position(has_arrived) else { return };
        let Some(Unclear { caller, watched, at }) = self.unclear.remove(at) else { return };
        let Some(stat) = &caller.stat else { return };
        self.judged.insert(stat.identity);
        self.inside.insert(stat.identity);
        let caller = (&caller, stat);
        self.tell_of_caller(shared, caller, &watched, at, Some(Arrived), &|| true);
    }

    fn tell_of_caller(
        &mut self,
        shared: &Shared,
        (caller, stat): (&Caller, &Stat),
        watched: &Arc<Watched>,
        at: Timestamp,
        arrival: Option<Arrived>,
        others_wait: &dyn Fn() -> bool,
    ) -> Executing {
        // First: it ends when what it has started does. That a runtime was called for it
        // is known of the runtime; by its name is only known that it may be worth asking.
        let may_be_by_runtime = arrival.is_some() || is_before_entry_point(&stat.comm);
        let asked_for = may_be_by_runtime
            .then(|| calls::asked_for(&mut shared.calls(), stat.parent, watched, true))
            .flatten();
        let by_runtime = ByRuntime {
            was_called: asked_for.is_some(),
            is_in_control_group: arrival.map(|Arrived| true),
        };
        let mut executing = process::after_exec(caller, watched, others_wait);
        let recorded =
            || process::recorded_arguments(shared, (caller.pid, caller.asked), others_wait);
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
        self.tell(shared, watched, at, Source::Gate, opened);
        executing
    }

    /// Tells that a session has opened. If that is lost, the next look at the
    /// container's processes tells it again.
    pub(super) fn tell(
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
pub(super) struct Opened {
    pub(super) process: Process,
    /// A handle of its first process that was opened before it could end.
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) by_runtime: ByRuntime,
}

/// What is known of how a runtime has made a process, beside what the process shows.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ByRuntime {
    /// A runtime on the host was called to execute something in this container.
    was_called: bool,
    /// By the kernel's record, of one that is gone.
    is_in_control_group: Option<bool>,
}

/// The kernel has recorded that a process came from outside into the container's own
/// control group.
#[derive(Clone, Copy, Debug)]
struct Arrived;

/// Whether the kernel has recorded where a process came from that is gone by now. Waits
/// for its records only if it is worth asking, and not for long if `others_wait`.
fn arrived(
    shared: &Shared,
    caller: &Caller,
    watched: &Watched,
    others_wait: &dyn Fn() -> bool,
) -> Option<Arrived> {
    let asked = caller.asked?;
    let found = || shared.roots().has_arrived(&watched.container, caller.pid, asked);
    let may_be_runtimes = caller.stat.as_ref().is_some_and(|it| is_before_entry_point(&it.comm));
    if may_be_runtimes && !found() {
        process::wait_for_records(shared, (caller.pid, asked), others_wait);
    }
    found().then_some(Arrived)
}

/// Whether a process is in the container: by its mount namespace, its pid namespace,
/// its control group or its root directory. One of them is enough: who joins only one
/// of them is in it all the same. `None` of who is ending: nothing is known of it.
fn is_inside(handle: &Handle, watched: &Watched) -> Option<bool> {
    let own_namespace = handle.mount_namespace();
    let is_known = own_namespace.is_ok();
    let is_own = |own: Option<u64>, namespace: std::io::Result<u64>, is_hosts: fn(u64) -> bool| {
        namespace.is_ok_and(|namespace| own == Some(namespace) && !is_hosts(namespace))
    };
    let is_inside = is_own(watched.mount_namespace, own_namespace, procfs::is_host_mount_namespace)
        || (watched.has_own_pid_namespace()
            && is_own(watched.pid_namespace, handle.pid_namespace(), |namespace| {
                procfs::is_host_pid_namespace(namespace)
            }))
        || is_in_control_group(handle, watched) == Some(true)
        || file::stat_path(handle.root_path())
            .is_ok_and(|root| root.device == watched.device && root.mount == watched.mount);
    (is_inside || is_known).then_some(is_inside)
}

/// `None` if the container has none of its own, or the process is gone.
fn is_in_control_group(handle: &Handle, watched: &Watched) -> Option<bool> {
    let unified = || watched.holds_cgroup(&handle.cgroup().ok()?);
    // Where the unified hierarchy is not what runtimes use.
    let of_records = || Some(handle.perf_cgroup() == Some(watched.perf_cgroup?));
    let is_in = unified().or_else(of_records)?;
    // Of who has ended it may be another one.
    (!handle.stat().ok()?.has_ended()).then_some(is_in)
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
    let Ok(exe) = handle.open_exe().and_then(file::stat) else { return false };
    let Some(mount) = exe.mount else { return false };
    // A file in memory is on no mount, whoever runs it.
    let may_be = exe.links > 0 || procfs::age(handle.identity()) < ON_ITS_WAY;
    may_be && handle.mountinfo().is_ok_and(|mounts| overlay::find_place(&mounts, mount).is_none())
}

/// What is to be told of a session's beginning, gathered while it may be ending.
fn opening(shared: &Shared, watched: &Watched, process: Process, by_runtime: ByRuntime) -> Opening {
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
    let evidence = Evidence {
        is_by_runtime: by_runtime.was_called,
        is_child_of_shim: chain.iter().any(|one| Some(one.identity().pid) == shim),
        is_parent_gone: !is_whole(&chain),
        is_in_control_group: handle
            .as_ref()
            .and_then(|one| is_in_control_group(one, watched))
            .or(by_runtime.is_in_control_group),
    };
    let beside = if identity == watched.init { beside(shared, watched) } else { None };
    let entry = if beside.is_some() { Entry::SharedPidNamespace } else { evidence.entry() };
    let host = chain.iter().skip(usize::from(!process.ancestors.is_empty()));
    let variables = &shared.settings.requester_variables;
    let requested_by = requester(variables, process.argv.as_deref().unwrap_or_default())
        .or_else(|| Some(printable(&handle.as_ref()?.variable(variables)?)));
    Opening {
        root: identity,
        entry,
        interactive: has_terminal.then_some(Interactive::Terminal),
        host: host.map(process::ancestor).collect(),
        login: handle.as_ref().and_then(Handle::login),
        requested_by,
        beside,
        process,
    }
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
