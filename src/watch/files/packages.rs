//! Package managers at work, and who descends from them.
//!
//! What a package manager writes is told as one transaction, if it is known that
//! it or a descendant of it was the writer. Most writers still live when the change
//! feed tells of them, and then their parents do too. The others (a `cp` in a
//! script of a package) are remembered from the moment at which they executed
//! something, or by the kernel's record of their birth: who descends from a package
//! manager is kept here for as long as anybody may ask who a writer was.
//!
//! A program counts as a package manager by its name, and if it runs from a file of
//! the image's layers, by the container's own mount: not a copy, and not something
//! mounted over it. Whether the image has that file there is the pipeline's
//! question.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use crate::health::Failure;
use crate::model::{
    Ancestor, ContainerId, Fact, Process, ProcessIdentity, Source, may_be_package_manager,
    package_manager,
};
use crate::sys::file;
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle, Stat};
use crate::watch::core::fair::Sender;
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::process::births::{Births, LAG};
use crate::watch::process::deeds;
use crate::watch::process::describe::{self, Caller};
use crate::watch::process::named::Named;
use crate::watch::process::records::TraceConsumer;
use crate::watch::process::seen::Seen;
use crate::watch::process::shared::Processes;

/// Processes that are remembered: of package managers, and others.
const MAX_DESCENDANTS: usize = 16 * 1024;
const MAX_OTHERS: usize = 64 * 1024;
const MAX_TOLD: usize = 1024;
/// How long who has ended is remembered: a file that is written all the time is
/// told ten times as late as another.
const KEPT: u64 = 15 * 100;
const MAX_GENERATIONS: usize = 64;
/// How often it is asked who has ended.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Who descends from a package manager, in all containers.
#[derive(Debug, Default)]
pub(crate) struct Packages {
    descendants: HashMap<u32, Descendant>,
    /// Pids whose present program is none of a package manager.
    others: HashSet<u32>,
    /// Package managers that the pipeline knows.
    told: VecDeque<ProcessIdentity>,
    next_look: Option<Instant>,
}

#[derive(Debug)]
struct Descendant {
    container: ContainerId,
    process: Arc<Process>,
    /// Since when it is known to have ended, in clock ticks since boot.
    ended: Option<u64>,
}

impl Packages {
    /// A process that was looked at while it lived: it is remembered if it is, or
    /// descends from, a package manager.
    pub(crate) fn looked_at(
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
        // The outermost first: what it starts belongs to it.
        let chain: Vec<_> = std::iter::once(own).chain(others).collect();
        let manager = chain.into_iter().rev().find_map(|(identity, exe, argv)| {
            if self.told.contains(&identity) {
                return Some(identity);
            }
            package_manager(exe?, argv.unwrap_or_default())?;
            self.tell(shared, watched, identity).then_some(identity)
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

    /// Tells the pipeline of a package manager; false if it is none of the image's.
    fn tell(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        identity: ProcessIdentity,
    ) -> bool {
        let Ok(handle) = Handle::open_exactly(identity) else { return false };
        if !runs_from_the_image(&handle, watched) {
            return false;
        }
        let process = Arc::new(describe::as_it_is(&handle, watched));
        self.remember(watched, process.clone());
        self.tell_of(shared, watched, process)
    }

    fn tell_of(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        process: Arc<Process>,
    ) -> bool {
        let identity = process.identity;
        if self.told.len() == MAX_TOLD {
            self.told.pop_front();
        }
        let fact = Fact::PackageManager { process };
        // Lost, its files stand alone; asked again, it is told again.
        let is_told = shared.observe(watched, Timestamp::now(), Source::Change, fact);
        if is_told {
            self.told.push_back(identity);
        }
        is_told
    }

    /// A process has become another program, which has begun.
    pub(crate) fn has_begun(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        process: &Arc<Process>,
    ) {
        self.others.remove(&process.identity.pid);
        self.looked_at(shared, watched, process);
    }

    /// A process that may be a package manager had ended before it could be looked at: the
    /// kernel's records tell what it was, and by whom it was made.
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
        let is_one = package_manager(exe, argv.unwrap_or_default()).is_some();
        let is_image = || {
            let held = deeds::open_program(watched, None, Some(program));
            held.is_some_and(|held| is_of_the_image(&held.stat, watched))
        };
        if !is_one || !is_image() {
            return;
        }
        // Not zero: another one may have this number later.
        process.identity.start_time = shared.births().read_at(pid).unwrap_or(named.read_at);
        let process = Arc::new(process);
        self.remember(watched, process.clone());
        self.tell_of(shared, watched, process);
    }

    /// A process executes something: it is whatever its parent is.
    pub(crate) fn executes(&mut self, shared: &Processes, watched: &Arc<Watched>, stat: &Stat) {
        let pid = stat.identity.pid;
        // Another program now.
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
            self.looked_at(shared, watched, &parent);
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
            // What is not remembered stands alone.
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

    /// Who a process was, if it descended from a package manager.
    pub(crate) fn descended(
        &self,
        watched: &Watched,
        births: &Births,
        named: Named,
    ) -> Option<Arc<Process>> {
        if let Some(known) = self.descendant(watched, named) {
            return Some(known.clone());
        }
        // One that has executed nothing is whatever its parent is.
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
        if self.descendants.is_empty() || self.next_look.is_some_and(|next| now < next) {
            return;
        }
        self.next_look = Some(now + LOOK_EVERY);
        let now = procfs::ticks_since_boot();
        self.descendants.retain(|_, known| {
            if Handle::open_exactly(known.process.identity).is_ok() {
                return true;
            }
            now < *known.ended.get_or_insert(now) + KEPT
        });
    }
}

/// By the kernel's records: who is born in a container, and who may have become a
/// package manager.
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
            let seen = Seen { watched, caller, at: Timestamp::now(), program };
            if let Err(TrySendError::Full(dropped)) = self.processes.try_send(Box::new(seen)) {
                shared.lose(
                    Failure::ProcessQueueFull,
                    Some(&dropped.watched),
                    "too many processes wait to be looked at",
                );
            }
        }
    }
}

/// Whether a process's program is a file of the image's layers, by the container's
/// own mount.
fn runs_from_the_image(handle: &Handle, watched: &Watched) -> bool {
    let Ok(stat) = file::stat_path(handle.exe_path()) else { return false };
    let is_still_itself = handle.stat().is_ok_and(|stat| stat.identity == handle.identity());
    is_still_itself && is_of_the_image(&stat, watched)
}

fn is_of_the_image(stat: &file::Stat, watched: &Watched) -> bool {
    stat.mount == watched.mount
        && stat.mount.is_some()
        && matches!(watched.standing(stat), Standing::Image | Standing::Doubtful(_))
}

/// A process of which only its parent is known.
fn child_of(parent: &Process, identity: ProcessIdentity, tty: Option<String>) -> Process {
    let own =
        Ancestor { identity: parent.identity, exe: parent.exe.clone(), argv: parent.argv.clone() };
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
