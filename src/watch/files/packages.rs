//! Package managers that run, and the processes that descend from them.
//!
//! The files that a package manager writes are reported as one transaction, if the writer is
//! known to be the package manager or a descendant. Most writers still live when the change
//! feed reports their file, and then their parents do too. The others (a `cp` in a package's
//! script) are remembered from their first execution on, or by the kernel's record of their
//! birth. Descendants are kept for as long as a change of theirs may still be reported. This
//! file does not check that the image has the package manager at its path; the pipeline does.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use crate::health::Failure;
use crate::model::{
    Ancestor, ContainerId, Fact, PackageManager, Process, ProcessIdentity, Source,
    may_be_package_manager, package_manager,
};
use crate::sys::file;
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::fair::Sender;
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::process::attribution;
use crate::watch::process::births::{Births, LAG};
use crate::watch::process::describe::{self, Caller};
use crate::watch::process::named::Named;
use crate::watch::process::records::TraceConsumer;
use crate::watch::process::seen::Seen;
use crate::watch::process::shared::Processes;

/// The most processes that are remembered: descendants of package managers, and others.
const MAX_DESCENDANTS: usize = 16 * 1024;
const MAX_OTHERS: usize = 64 * 1024;
const MAX_REPORTED: usize = 1024;
/// How long a process is remembered after its end, in clock ticks. A file that is written all
/// the time is reported ten times as late as others.
const KEPT: u64 = 15 * 100;
const MAX_GENERATIONS: usize = 64;
/// How often ended processes are searched for.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// The descendants of package managers, in all containers.
///
/// A program counts as a package manager by its name, and only if it runs from a file of the
/// image's layers through the container's own mount: not a copy, and not a file mounted over it.
/// An interpreter may be a copy in the container's own layer.
#[derive(Debug, Default)]
pub(crate) struct Packages {
    descendants: HashMap<u32, Descendant>,
    /// Processes whose present program neither is nor descends from a package manager.
    others: HashSet<u32>,
    /// Package managers that have been reported to the pipeline.
    reported: VecDeque<ProcessIdentity>,
    next_check: Option<Instant>,
}

#[derive(Debug)]
struct Descendant {
    container: ContainerId,
    process: Arc<Process>,
    /// Since when it is known to have ended, in clock ticks since boot.
    ended: Option<u64>,
}

impl Packages {
    /// Takes in a process that was examined while it lived. It is remembered if it is a package
    /// manager or descends from one.
    pub(crate) fn note(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        process: &Arc<Process>,
    ) {
        let pid = process.identity.pid;
        if self.others.contains(&pid) {
            return;
        }
        if let Some(known) = self.descendants.get(&pid)
            && known.process.identity == process.identity
            && known.process.exe.is_some()
        {
            return;
        }
        let own = (process.identity, process.exe.as_deref(), process.argv.as_deref());
        let others = process
            .ancestors
            .iter()
            .map(|ancestor| (ancestor.identity, ancestor.exe.as_deref(), ancestor.argv.as_deref()));
        // The outermost package manager counts: what it starts belongs to it.
        let chain: Vec<_> = std::iter::once(own).chain(others).collect();
        let manager = chain.into_iter().rev().find_map(|(identity, exe, argv)| {
            if self.reported.contains(&identity) {
                return Some(identity);
            }
            let manager = package_manager(exe?, argv.unwrap_or_default())?;
            self.report_manager(shared, watched, identity, manager).then_some(identity)
        });
        let is_remembered = manager.is_some()
            || process.ancestors.iter().any(|ancestor| {
                let known = self.descendants.get(&ancestor.identity.pid);
                known.is_some_and(|known| known.process.identity == ancestor.identity)
            });
        if is_remembered {
            self.remember(watched, process.clone());
        } else if self.others.len() < MAX_OTHERS {
            self.others.insert(pid);
        } else {
            self.others.clear();
        }
    }

    /// Reports a package manager to the pipeline; false if it cannot be a program of the image.
    fn report_manager(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        identity: ProcessIdentity,
        manager: PackageManager<'_>,
    ) -> bool {
        let Ok(handle) = Handle::open_exactly(identity) else { return false };
        if !runs_from_the_image(&handle, watched, manager) {
            return false;
        }
        let process = Arc::new(describe::as_it_is(&handle, watched));
        self.remember(watched, process.clone());
        self.report(shared, watched, process)
    }

    fn report(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        process: Arc<Process>,
    ) -> bool {
        let identity = process.identity;
        if self.reported.len() == MAX_REPORTED {
            self.reported.pop_front();
        }
        let fact = Fact::PackageManager { process };
        // If the report is lost, its files are findings of their own, and it is reported again
        // when it is next examined.
        let is_reported = shared.observe(watched, Timestamp::now(), Source::Change, fact);
        if is_reported {
            self.reported.push_back(identity);
        }
        is_reported
    }

    /// A process runs another program now, which has begun.
    pub(crate) fn has_begun(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        process: &Arc<Process>,
    ) {
        self.others.remove(&process.identity.pid);
        self.note(shared, watched, process);
    }

    /// A process that may be a package manager ended before it could be examined. The kernel's
    /// records show its program and its parent.
    pub(crate) fn has_run(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        pid: u32,
        program: &Mapped,
    ) {
        let named = Named::now(pid);
        let manager = self.descended(watched, &shared.births(), named);
        if manager.is_some() {
            return;
        }
        let Some(mut process) = shared.recorded_process(named) else { return };
        let (Some(exe), argv) = (&process.exe, process.argv.as_deref()) else { return };
        let Some(manager) = package_manager(exe, argv.unwrap_or_default()) else { return };
        let held = attribution::open_program(watched, None, Some(program));
        if !held.is_some_and(|held| may_be_of_the_image(&held.stat, watched, manager)) {
            return;
        }
        // Not zero: another process may have this pid later.
        process.identity.start_time = shared.births().read_at(pid).unwrap_or(named.read_at);
        let process = Arc::new(process);
        self.remember(watched, process.clone());
        self.report(shared, watched, process);
    }

    /// A process executes a file. It is a descendant if its parent is one.
    pub(crate) fn executes(&mut self, shared: &Processes, watched: &Arc<Watched>, stat: &Stat) {
        let pid = stat.identity.pid;
        // It runs another program now.
        self.others.remove(&pid);
        self.forget_ended();
        if let Some(known) = self.descendants.get(&pid) {
            if known.process.identity == stat.identity {
                return;
            }
            self.descendants.remove(&pid);
        }
        if self.others.contains(&stat.parent) {
            return;
        }
        if !self.descendants.contains_key(&stat.parent) {
            let Ok(handle) = Handle::open(stat.parent) else { return };
            if handle.pid_namespace().ok() != watched.pid_namespace {
                return;
            }
            let parent = Arc::new(describe::as_it_is(&handle, watched));
            self.note(shared, watched, &parent);
        }
        let Some(parent) = self.descendants.get(&stat.parent) else { return };
        if parent.process.identity.start_time > stat.identity.start_time {
            return;
        }
        let process = child_of(&parent.process, stat.identity, stat.tty());
        self.remember(watched, Arc::new(process));
    }

    fn remember(&mut self, watched: &Watched, process: Arc<Process>) {
        let pid = process.identity.pid;
        if self.descendants.len() >= MAX_DESCENDANTS && !self.descendants.contains_key(&pid) {
            // The files of a process that is not remembered are findings of their own.
            return;
        }
        self.others.remove(&pid);
        let container = watched.container.clone();
        self.descendants.insert(pid, Descendant { container, process, ended: None });
    }

    /// The ancestors of a process that descends from a package manager.
    pub(crate) fn ancestors_of(&self, identity: ProcessIdentity) -> Option<&[Ancestor]> {
        let known = self.descendants.get(&identity.pid)?;
        (known.process.identity == identity).then_some(&*known.process.ancestors)
    }

    /// The description of a process that descended from a package manager.
    pub(crate) fn descended(
        &self,
        watched: &Watched,
        births: &Births,
        named: Named,
    ) -> Option<Arc<Process>> {
        if let Some(known) = self.descendant(watched, named) {
            return Some(known.clone());
        }
        // A process that has executed nothing is a descendant if its parent is one.
        let parents = births.parents_of(named);
        let parent = parents
            .take(MAX_GENERATIONS)
            .find_map(|pid| self.descendant(watched, Named { pid, ..named }))?;
        let identity = ProcessIdentity { pid: named.pid, start_time: 0 };
        Some(Arc::new(child_of(parent, identity, parent.tty.clone())))
    }

    fn descendant(&self, watched: &Watched, named: Named) -> Option<&Arc<Process>> {
        let known = self.descendants.get(&named.pid)?;
        let was_there = known.process.identity.start_time <= named.read_at
            && known.ended.is_none_or(|ended| named.read_at < ended + LAG);
        (was_there && known.container == watched.container).then_some(&known.process)
    }

    fn forget_ended(&mut self) {
        let now = Instant::now();
        if self.descendants.is_empty() || self.next_check.is_some_and(|next| now < next) {
            return;
        }
        self.next_check = Some(now + CHECK_EVERY);
        let now = procfs::ticks_since_boot();
        self.descendants.retain(|_, known| {
            if Handle::open_exactly(known.process.identity).is_ok() {
                return true;
            }
            now < *known.ended.get_or_insert(now) + KEPT
        });
    }
}

/// Takes from the kernel's records which processes are born in containers, and which may have
/// become a package manager.
pub(crate) struct Descent {
    processes: Sender<Box<Seen>>,
}

impl Descent {
    pub(crate) fn new(processes: Sender<Box<Seen>>) -> Descent {
        Descent { processes }
    }
}

impl TraceConsumer for Descent {
    fn forked(&mut self, shared: &Processes, home: Option<&Arc<Watched>>, pid: u32, parent: u32) {
        let now = procfs::ticks_since_boot();
        match home {
            Some(home) => shared.births().born_in(home.clone(), pid, parent, now),
            None => shared.births().born(pid, parent, now),
        }
        shared.roots().born(pid, parent, now);
    }

    fn executed(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    ) {
        let name = program.map_or(&executed.file_name, |program| &program.name);
        if str::from_utf8(name).is_ok_and(may_be_package_manager) {
            let caller = Caller { stat: None, pid: executed.pid, asked: None, pidfd: None };
            let (watched, program) = (watched.clone(), program.cloned());
            let at = Timestamp::now();
            let seen = Seen { watched, caller, at, born: None, program };
            if let Err(TrySendError::Full(dropped)) = self.processes.try_send(Box::new(seen)) {
                shared.lose(
                    Failure::ProcessQueueFull,
                    Some(&dropped.watched),
                    "too many processes wait to be examined",
                );
            }
        }
    }
}

/// Whether a process's program may be the image's, and is reached through the container's own
/// mount.
fn runs_from_the_image(handle: &Handle, watched: &Watched, manager: PackageManager<'_>) -> bool {
    let Ok(stat) = file::stat_path(handle.exe_path()) else { return false };
    let is_still_itself = handle.stat().is_ok_and(|stat| stat.identity == handle.identity());
    is_still_itself && may_be_of_the_image(&stat, watched, manager)
}

/// An interpreter may be a copy of the image's: the pipeline knows its content.
fn may_be_of_the_image(stat: &file::Stat, watched: &Watched, manager: PackageManager<'_>) -> bool {
    let is_image = matches!(watched.standing(stat), Standing::Image | Standing::Doubtful(_));
    let is_interpreted = manager != PackageManager::Program;
    stat.mount == watched.mount && stat.mount.is_some() && (is_image || is_interpreted)
}

/// The description of a process of which only the parent is known.
fn child_of(parent: &Process, identity: ProcessIdentity, tty: Option<String>) -> Process {
    let own = Ancestor {
        identity: parent.identity,
        exe: parent.exe.clone(),
        argv: parent.argv.clone(),
        is_proven_inside: true,
    };
    Process {
        identity,
        exe: None,
        argv: None,
        uid: None,
        tty,
        root: parent.root.clone(),
        ancestors: std::iter::once(own).chain(parent.ancestors.iter().cloned()).collect(),
    }
}
