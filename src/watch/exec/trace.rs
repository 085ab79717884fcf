//! The second pair of eyes: what has run, by the kernel's own records.
//!
//! The gate is asked before a file is executed that lies on a filesystem it has
//! marked. This thread reads that something *was* executed, whatever it lay on, and
//! hands on what the gate cannot have seen: memfds, filesystems mounted in mount
//! namespaces of the container's own, mounts that could not be marked.
//!
//! ```text
//! kernel ── rings ──> in order of time ── on a marked filesystem? ──> the gate has told it
//!                          │                    └ no ── whose? ──> unseen (hashed there)
//!                          └── what containers run and map ──> consumers
//! ```
//!
//! What is ordinary costs a look-up or two here and nothing in /proc. Whose a
//! process is, is remembered from its birth on, so that it is known of those that
//! are gone before anybody looks.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::{SignedDuration, Timestamp};

use super::content;
use super::content::Described;
use super::unseen;
use super::unseen::Unseen;
use crate::config;
use crate::health::Failure;
use crate::model::{ContainerId, Filesystem, Format, ProcessIdentity};
use crate::sys::connector::Connector;
use crate::sys::door::{self, Ground, Held, Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::perf::{self, Executed, Mapped, Record, Rings};
use crate::sys::procfs::{self, Handle};
use crate::threads;
use crate::watch::code::inspect;
use crate::watch::code::inspect::Upper;
use crate::watch::core::fair::Sender;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Standing;
use crate::watch::core::table::Watched;
use crate::watch::process::deeds;
use crate::watch::process::deeds::Deed;
use crate::watch::process::roots::Arrived;
use crate::watch::process::roots::Maker;
use crate::watch::sessions::opening;

/// Where all files that may wait do, a container may have so many all the same.
const FEW_FILES: usize = 8;

/// What else is made of the records, in the order of their times. It is called on
/// the thread that reads the rings and must be quick: what it does not do at once,
/// it hands to a thread of its own by a bounded channel.
pub(in crate::watch) trait TraceConsumer: Send {
    /// A process of a container has made another. `home` is that container where it is
    /// certain: the parent may also be of the host and run a file of the container's.
    fn forked(&mut self, _: &Shared, _home: Option<&Arc<Watched>>, _pid: u32, _parent: u32) {}

    /// A process of a container has become a program. `program` is the file that
    /// was mapped first: of a script, its interpreter. `None` if it was not seen.
    fn executed(
        &mut self,
        shared: &Shared,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    );

    /// A process of the host's has become a program that is called like a container
    /// runtime.
    fn runtime_called(&mut self, _: &Shared, _pid: u32) {}

    /// A process of a container has become a program, and who made it is in none.
    fn entered(&mut self, _: &Shared, _: &Arc<Watched>, _: &Executed) {}

    /// A process of a container has mapped code of a file after its execve was over,
    /// so neither its program nor its dynamic linker.
    fn mapped(&mut self, _: &Shared, _: &Arc<Watched>, _: &Mapped) {}

    /// A process has ended, of a container or not, at this time by the records' clock.
    fn exited(&mut self, _: &Shared, _pid: u32, _time: u64) {}

    /// The records that were there have been read. Called a few times a second, also
    /// when there are none.
    fn turn(&mut self, _: &Shared) {}

    /// Records were lost: what is remembered of processes may be wrong.
    fn lost(&mut self) {}
}

/// How executions are recorded on this machine.
#[derive(Debug)]
pub(in crate::watch) enum Recorder {
    Rings(Rings),
    /// Who ends at once is not seen, and no mapping is.
    Connector(Connector),
}

/// What the second pair of eyes sees on this machine, for people to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executions {
    /// Every execution and every mapping of code.
    Recorded,
    /// Executions of programs that live long enough to be looked at; no mappings.
    Announced { why: String },
    /// Nothing but what the gate sees and a look at the running processes finds.
    Unseen { why: String },
}

impl Recorder {
    /// The best there is, and what that means.
    pub(in crate::watch) fn open() -> (Option<Recorder>, Executions) {
        let why = match Rings::open() {
            Ok(rings) => return (Some(Recorder::Rings(rings)), Executions::Recorded),
            Err(err) => err,
        };
        match Connector::open() {
            Ok(connector) => {
                let why = why.to_string();
                (Some(Recorder::Connector(connector)), Executions::Announced { why })
            }
            Err(err) => {
                let why = format!("{why}; and there is no process connector: {err}");
                (None, Executions::Unseen { why })
            }
        }
    }
}

/// How long a turn lasts when nothing happens.
const TURN: Duration = Duration::from_millis(250);
/// How long records wait for those that another processor wrote before them.
const SETTLE: Duration = Duration::from_millis(1);
/// How soon the rings are read again after there was something in them: what a new
/// program maps wakes nobody, and the program may end as soon as it has.
const SOON: Duration = Duration::from_millis(5);
/// How often it is asked whether processors have come or gone.
const LOOK_FOR_PROCESSORS: Duration = Duration::from_secs(1);
/// For how long a process that has ended is remembered: its first thread can end,
/// and another one of its threads become a program under its number.
const REMEMBERED: u64 = 1_000_000_000;
/// How far it is followed who made whom.
const MAX_MAKERS: usize = 16;
/// More processes than this are not remembered.
const MAX_PROCESSES: usize = 64 * 1024;

/// What is known of a process by its records.
#[derive(Debug, Default)]
struct Known {
    parent: Option<u32>,
    watched: Option<Arc<Watched>>,
    /// It is of that container without doubt: it or an ancestor has become a program of
    /// the container's while it was in the container. A runtime on its way in has not.
    is_resident: bool,
    /// It is one of the host's, or was made by such a process: without a record or a look
    /// that says so, it is not.
    is_made_outside: bool,
    /// Whose it is was looked up in /proc, if anybody's.
    was_looked_up: bool,
    /// By then, so many containers had been watched: it may be of one that came later.
    looked_up_among: u64,
    /// An execve is under way.
    is_beginning: bool,
    /// The first file that this execve has mapped.
    first: Option<Arc<Mapped>>,
    /// With what arguments, if that was told first.
    arguments: Option<Box<[u8]>>,
    /// What it runs.
    program: Option<Arc<Mapped>>,
    ended: bool,
}

/// Forgets enough processes for a quarter of `most` to be free, and hands back of which
/// containers, and how many. The host's own go first: they can be looked up again. Then
/// those of the containers that have the most, so that none makes another one's unknown.
fn make_room(processes: &mut HashMap<u32, Known>, most: usize) -> Vec<(Arc<Watched>, usize)> {
    let enough = most - most / 4;
    processes.retain(|_, known| known.watched.is_some());
    let mut by_container: HashMap<*const Watched, Vec<u32>> = HashMap::new();
    for (pid, known) in &*processes {
        let Some(watched) = &known.watched else { continue };
        by_container.entry(Arc::as_ptr(watched)).or_default().push(*pid);
    }
    // The least that each may keep, so that all of them together are few enough.
    let mut sizes: Vec<usize> = by_container.values().map(Vec::len).collect();
    sizes.sort_unstable();
    let (mut room, mut each) = (enough, enough);
    for (index, size) in sizes.iter().enumerate() {
        each = room / (sizes.len() - index);
        if *size > each {
            break;
        }
        room -= size;
    }
    let mut forgotten = Vec::new();
    for pids in by_container.into_values().filter(|pids| pids.len() > each) {
        let more = pids.len() - each;
        let mut watched = None;
        // Those that live can be looked up again.
        let (living, ended): (Vec<u32>, Vec<u32>) =
            pids.into_iter().partition(|pid| processes.get(pid).is_some_and(|known| !known.ended));
        for pid in ended.into_iter().chain(living).take(more) {
            watched = processes.remove(&pid).and_then(|known| known.watched).or(watched);
        }
        forgotten.extend(watched.map(|watched| (watched, more)));
    }
    forgotten
}

pub(in crate::watch) struct Trace {
    shared: Arc<Shared>,
    unseen: Sender<Box<Unseen>>,
    /// What has waited for the record of its execution.
    proven: Sender<Described>,
    /// How many files may be held open for who hashes them.
    max_files: usize,
    consumers: Vec<Box<dyn TraceConsumer>>,
    processes: HashMap<u32, Known>,
    ended: VecDeque<(u64, u32)>,
    memfd_device: Option<u64>,
    /// What the host's root is on.
    host_device: Option<u64>,
    /// The kernel tells an overlay's own device of what is mapped from it. Before
    /// 6.18 it may tell that of the file below.
    tells_overlays: bool,
    /// Executions of containers in this turn whose arguments were not recorded.
    without_arguments: u64,
}

/// The kernel had no room for so many records of arguments, and does not report whose
/// they were: how many are counted as containers', and how many as the host's. No more can
/// be containers' than their executions that came without arguments.
fn shares(lost: u64, without_arguments: u64) -> (u64, u64) {
    let of_containers = without_arguments.min(lost);
    (of_containers, lost - of_containers)
}

/// What was executed, and whether anybody need be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judged {
    /// By the gate, or it is no program of a container.
    Known,
    Unseen(Filesystem),
}

/// What there is to judge an execution by.
#[derive(Clone, Copy, Debug)]
struct Evidence<'a> {
    mapped: Option<&'a Mapped>,
    is_mapped_marked: bool,
    /// `None` if the process is gone, or runs something else by now.
    exe: Option<Exe>,
    memfd_device: Option<u64>,
    /// The kernel may tell the device below an overlay's, and this is one that the
    /// container's layers are on.
    is_mapped_below: bool,
    /// Who made the process is in no container: if it is gone, it may have been on its
    /// way into one.
    is_parent_outside: bool,
    /// What is mounted with this device where the process lives or lived.
    mounted: Option<Filesystem>,
}

#[derive(Clone, Copy, Debug)]
struct Exe {
    device: u64,
    links: u32,
    is_marked: bool,
    is_on_tmpfs: bool,
    /// The process sees what the host sees: it is on its way into the container.
    is_host: bool,
}

/// The name that the kernel gives what memfd_create(2) makes. A container can give
/// a file such a name too, but not where the kernel shows the root directory's
/// entries, unless it says the same of itself: that it is deleted.
fn is_memfd_name(name: &[u8]) -> bool {
    name.starts_with(b"/memfd:") && name.ends_with(file::DELETED)
}

/// Whether a process runs a program of the container that it is in. Of one that is on
/// its way there, or ending, that cannot be said.
fn runs_own_program(pid: u32) -> bool {
    Handle::open(pid)
        .is_ok_and(|handle| !opening::runs_program_of_host(&handle) && handle.open_exe().is_ok())
}

/// Whether a process is in the host's own namespaces.
fn is_of_host(pid: u32) -> bool {
    procfs::mount_namespace_of(pid).is_ok_and(procfs::is_host_mount_namespace)
        && procfs::pid_namespace_of(pid).is_ok_and(procfs::is_host_pid_namespace)
}

/// Whether a process is a container's init, or the child of a child of it. What comes from
/// outside has its parents there.
fn descends_from(pid: u32, init: ProcessIdentity) -> bool {
    const MAX_GENERATIONS: usize = 64;
    let parents = std::iter::successors(procfs::read_stat(pid).ok(), |stat| {
        procfs::read_stat(stat.parent).ok()
    });
    parents.take(MAX_GENERATIONS).any(|stat| stat.identity == init)
}

/// Whose a process is that has opened a session: it may have ended, and who has come by
/// `chroot` alone is in no namespace of a container's.
fn of_session(shared: &Shared, pid: u32) -> Option<Arc<Watched>> {
    let roots = shared.roots();
    let (container, identity) = roots.opened_by(pid)?;
    let is_another = procfs::read_stat(pid).is_ok_and(|stat| stat.identity != identity);
    if is_another { None } else { shared.table.get(container) }
}

fn judge(evidence: &Evidence<'_>) -> Judged {
    if evidence.is_mapped_marked {
        return Judged::Known;
    }
    let name = evidence.mapped.map(|mapped| &*mapped.name).unwrap_or_default();
    let is_memfd = |device: Option<u64>| device.is_some() && device == evidence.memfd_device;
    if let Some(exe) = evidence.exe {
        return if exe.is_marked {
            Judged::Known
        } else if is_memfd(Some(exe.device)) || is_memfd_name(name) {
            // Also on its way into the container: whose it is, its content tells.
            Judged::Unseen(Filesystem::Anonymous)
        } else if exe.is_host {
            Judged::Known
        } else if exe.links == 0 && (name.is_empty() || name.ends_with(file::DELETED)) {
            Judged::Unseen(Filesystem::Anonymous)
        } else if exe.is_on_tmpfs {
            Judged::Unseen(Filesystem::Tmpfs)
        } else {
            Judged::Unseen(Filesystem::Volume)
        };
    }
    match evidence.mapped {
        // Nothing is known of it but that it was.
        None => Judged::Known,
        Some(mapped) if is_memfd(Some(mapped.device)) || is_memfd_name(name) => {
            Judged::Unseen(Filesystem::Anonymous)
        }
        Some(_) if evidence.is_mapped_below || evidence.is_parent_outside => Judged::Known,
        Some(_) if name.ends_with(file::DELETED) => Judged::Unseen(Filesystem::Anonymous),
        Some(_) => Judged::Unseen(evidence.mounted.unwrap_or(Filesystem::Volume)),
    }
}

/// The number of the descriptor that was given to execve instead of a name.
pub(in crate::watch) fn descriptor(file_name: &[u8]) -> Option<u32> {
    let rest = match file_name.strip_prefix(b"/dev/fd/") {
        Some(rest) => rest,
        None => {
            let (_, rest) = file_name.strip_prefix(b"/proc/").and_then(|rest| {
                let slash = rest.iter().position(|&byte| byte == b'/')?;
                Some(rest.split_at(slash))
            })?;
            rest.strip_prefix(b"/fd/")?
        }
    };
    str::from_utf8(rest).ok()?.parse().ok()
}

/// What is mounted with this device.
fn mounted(mountinfo: &[u8], device: u64) -> Option<Filesystem> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("{major}:{minor}").into_bytes();
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let mut words = line.split(|&byte| byte == b' ');
        if words.nth(2)? != device {
            return None;
        }
        let kind = words.skip_while(|word| *word != b"-").nth(1)?;
        Some(match kind {
            b"tmpfs" | b"ramfs" => Filesystem::Tmpfs,
            _ => Filesystem::Volume,
        })
    })
}

impl Trace {
    pub(in crate::watch) fn new(
        shared: Arc<Shared>,
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
            tells_overlays: false,
            without_arguments: 0,
        }
    }

    pub(in crate::watch) fn run(mut self, recorder: Recorder) {
        // Records wait in rings of a fixed size.
        let _ = rustix::process::setpriority_process(None, -9);
        match recorder {
            Recorder::Rings(rings) => self.read_rings(rings),
            Recorder::Connector(connector) => self.listen(connector),
        }
    }

    fn read_rings(&mut self, mut rings: Rings) {
        let mut records = Vec::new();
        let mut last_look = Instant::now();
        let mut is_busy = false;
        let mut is_last = false;
        let mut lost_arguments = rings.lost_arguments();
        while !is_last {
            // What happened before a stop is told.
            is_last = self.shared.is_stopping();
            let turn = match (records.is_empty(), is_busy) {
                _ if is_last => Duration::ZERO,
                (false, _) => SETTLE,
                (true, true) => SOON,
                (true, false) => TURN,
            };
            let has_gone = threads::idle(|| rings.wait(turn));
            if has_gone || last_look.elapsed() >= LOOK_FOR_PROCESSORS {
                last_look = Instant::now();
                match rings.follow_processors() {
                    Ok(false) => (),
                    Ok(true) => self.lose("a processor came or went: what ran there was not read"),
                    Err(err) => self.lose(&format!("a processor's records cannot be read: {err}")),
                }
                if has_gone {
                    // Also if it has not: a ring that says so would say it at once again.
                    std::thread::sleep(SETTLE);
                }
            }
            // Whatever happened before this is in one of the rings by now.
            let horizon = perf::now();
            if let Err(err) = rings.read(&mut records) {
                self.lose(&format!("the kernel's records are not understood: {err}"));
            }
            let lost_before = std::mem::replace(&mut lost_arguments, rings.lost_arguments());
            records.sort_by_key(Record::time);
            let complete = records.partition_point(|record| record.time() <= horizon);
            is_busy = complete > 0;
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
            // What happened before a stop is told.
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
            // Another of its threads may be in an execve for longer than that.
            let (over, goes_on) = self.shared.unproven().ended(pid, procfs::has_threads);
            over.iter().for_each(|one| content::look_at_file(&self.shared, one.place()));
            if goes_on {
                self.ended.push_back((now, pid));
                continue;
            }
            // The number may be another process's by now.
            if self.processes.get(&pid).is_some_and(|known| known.ended) {
                self.processes.remove(&pid);
            }
        }
    }

    fn known(&mut self, pid: u32) -> &mut Known {
        if self.processes.len() >= MAX_PROCESSES && !self.processes.contains_key(&pid) {
            for (watched, number) in make_room(&mut self.processes, MAX_PROCESSES) {
                let detail = format!(
                    "it has more processes than are remembered: {number} are looked up again, \
                     and those that have ended cannot be"
                );
                self.shared.lose(Failure::TraceLost, Some(&watched), &detail);
            }
            self.ended.retain(|(_, pid)| self.processes.contains_key(pid));
        }
        self.processes.entry(pid).or_default()
    }

    fn take(&mut self, record: Record) {
        match record {
            Record::Forked { pid, parent, time } => {
                self.shared.roots().reborn(pid, ticks_of(time));
                let containers = self.shared.table.generation();
                let is_unknown = self.processes.get(&parent).is_none_or(|known| {
                    known.watched.is_none()
                        && (!known.was_looked_up || known.looked_up_among != containers)
                });
                if is_unknown {
                    // It was there before us, or before its container was known.
                    let watched = self.look_up(parent);
                    let is_of_host = is_of_host(parent);
                    let runs_own = watched.is_some() && runs_own_program(parent);
                    let program = self.processes.get(&parent).and_then(|it| it.program.clone());
                    let ran_in = program.and_then(|it| self.shared.table.by_device(it.device));
                    // It came from outside; by the records it has become one of the
                    // container's programs since, when that was not known yet.
                    let is_own = |watched: &Arc<Watched>| {
                        ran_in.is_some_and(|ran_in| Arc::ptr_eq(&ran_in, watched))
                            || descends_from(parent, watched.init)
                    };
                    let known = self.known(parent);
                    let is_resident = runs_own
                        && (!known.is_made_outside || watched.as_ref().is_some_and(is_own));
                    known.watched = watched;
                    known.is_resident = is_resident;
                    known.is_made_outside |= is_of_host;
                    known.is_made_outside &= !is_resident;
                    known.was_looked_up = true;
                    known.looked_up_among = containers;
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
                    // Before another one had this number.
                    self.shared.births().forget(pid);
                }
                let parent = Some(parent);
                let is_made_outside = !is_resident && is_outside;
                let known = Known {
                    parent,
                    watched,
                    is_resident,
                    is_made_outside,
                    program,
                    ..Known::default()
                };
                *self.known(pid) = known;
            }
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
            Record::Exited { pid, time } => {
                if let Some(known) = self.processes.get_mut(&pid) {
                    known.ended = true;
                    self.ended.push_back((time, pid));
                }
                self.shared.table.ended(pid);
                // It has tried what it was not let execute.
                drop(self.shared.take_asked(pid, time));
                for consumer in &mut self.consumers {
                    consumer.exited(&self.shared, pid, time);
                }
            }
            Record::Lost { count, time: _ } => {
                self.lose(&format!("the kernel had no room for {count} records of executions"));
            }
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

    /// Whose a process is that still lives, by what /proc says.
    fn look_up(&self, pid: u32) -> Option<Arc<Watched>> {
        // Most are the host's own: two looks tell them.
        if procfs::is_host_mount_namespace(procfs::mount_namespace_of(pid).ok()?)
            && procfs::is_host_pid_namespace(procfs::pid_namespace_of(pid).ok()?)
        {
            return None;
        }
        self.shared.table.of_process(&Handle::open(pid).ok()?)
    }

    fn executed(&mut self, executed: &Executed) {
        let known = self.known(executed.pid);
        known.is_beginning = false;
        let program = known.first.take();
        let arguments = known.arguments.take();
        let previous = std::mem::replace(&mut known.program, program.clone());
        let inherited = known.watched.clone();
        let was_resident = known.is_resident;
        let is_made_outside = known.is_made_outside && !was_resident;
        let parent = known.parent;
        let table = &self.shared.table;
        let overlay = program.as_ref().and_then(|program| table.by_device(program.device));
        self.tells_overlays |= overlay.is_some();
        let is_entry = overlay.as_ref().is_some_and(|overlay| {
            overlay.init.pid == executed.pid && !overlay.entry_is_recorded()
        });
        if is_entry || program.is_some() && overlay.is_none() {
            self.shared.wait_for_gate();
        }
        let asked = self.shared.take_asked(executed.pid, executed.time);
        let is_told = program.as_ref().is_some_and(|program| {
            overlay.as_ref().is_some_and(|overlay| !overlay.has_foreign_layers())
                || asked.contains(&(program.device, program.inode))
                || self.will_be_told(program.device, None, executed)
        });
        // Who made it cannot be changed; what it has joined can.
        let actor = inherited
            .clone()
            .filter(|_| was_resident)
            .or_else(|| executed.cgroup.and_then(|cgroup| table.by_perf_cgroup(cgroup)))
            .or_else(|| self.look_up(executed.pid));
        let is_certain = actor.is_some();
        let owner = overlay.or_else(|| self.owner_of_running(executed, program.as_deref()));
        let is_overlays = owner.is_some();
        let deed = Deed::new(actor, owner, |inner, outer| deeds::is_within(table, inner, outer));
        let (watched, file_of) = match deed {
            Some(Deed { watched, file_of }) => (Some(watched), file_of),
            None => (None, None),
        };
        let watched = watched
            .or(inherited)
            .or_else(|| of_session(&self.shared, executed.pid))
            .or_else(|| {
                // It is gone, or was when we looked.
                let parent = parent?;
                let known = self.processes.get(&parent);
                known.and_then(|known| known.watched.clone())
            });
        let is_resident = was_resident || is_certain && (is_told || is_overlays);
        let known = self.known(executed.pid);
        known.watched.clone_from(&watched);
        known.was_looked_up = true;
        known.is_resident = is_resident;
        let Some(watched) = watched else {
            if unseen::is_called_like_a_runtime(&executed.file_name) {
                for consumer in &mut self.consumers {
                    consumer.runtime_called(&self.shared, executed.pid);
                }
            }
            return;
        };
        let is_in_control_group =
            watched.perf_cgroup.is_some() && executed.cgroup == watched.perf_cgroup;
        let sees_root = || self.sees_root(executed, program.as_deref(), &watched);
        let has_arrived = is_made_outside && (is_in_control_group || sees_root());
        if has_arrived {
            // First: who waits for the arguments may want to know this too.
            let arrived = Arrived {
                container: watched.container.clone(),
                pid: executed.pid,
                executed: executed.time,
                is_in_control_group,
                makers: self.makers(executed.pid),
            };
            self.shared.roots().arrived(arrived);
            // What it makes from now on was made in the container.
            self.known(executed.pid).is_resident = true;
        }
        self.without_arguments += u64::from(arguments.is_none());
        {
            let mut kept = self.shared.arguments();
            kept.executed(executed.pid, executed.time, arguments);
            let name = program.as_ref().map(|program| &*program.name).unwrap_or_default();
            kept.named(executed.pid, &executed.file_name, name);
        }
        let has_parent_inside = parent
            .and_then(|parent| self.processes.get(&parent))
            .is_some_and(|known| known.watched.is_some());
        for consumer in &mut self.consumers {
            consumer.executed(&self.shared, &watched, executed, program.as_deref());
            if !has_parent_inside || has_arrived {
                consumer.entered(&self.shared, &watched, executed);
            }
        }
        let mut execution = Execution {
            watched,
            executed,
            program,
            previous,
            parent,
            asked,
            was_resident,
            file_of: None,
        };
        if let Some(owner) = file_of {
            execution.file_of = Some(owner.container.clone());
            if let Some(found) = self.look_at_anothers(&execution, &owner) {
                self.hand_on(found);
            }
            return;
        }
        if is_entry
            && is_told
            && execution.watched.record_entry()
            && let Some(found) = self.look_at_entry(&execution)
        {
            found.into_iter().for_each(|found| self.hand_on(found));
            return;
        }
        let by_descriptor = descriptor(&executed.file_name);
        if is_told && by_descriptor.is_none() {
            return;
        }
        if is_overlays && execution.watched.has_foreign_layers() && !is_told {
            if let Some(found) = self.look_at_unread(&execution) {
                self.hand_on(found);
            }
            return;
        }
        let found = self.look_at(&execution).or_else(|| {
            // The file that was mapped is the interpreter.
            self.look_at_script(&execution, by_descriptor?)
        });
        if let Some(found) = found {
            self.hand_on(found);
        }
    }

    /// Looks at an entry point whose execve had opened its file when the marks came. The
    /// gate was not asked about that file then, and a look at init does not show it.
    fn look_at_entry(&self, execution: &Execution<'_>) -> Option<Vec<Unseen>> {
        let Execution { watched, executed, program, asked, .. } = execution;
        let name = &executed.file_name;
        let is_script = program.as_ref().is_some_and(|program| program.name != *name);
        let script = || is_script.then(|| self.look_at_name(execution, name)).flatten();
        self.shared.wait_until(|| !watched.is_being_armed());
        // The process does not wait for an answer here: the gate's event may come later.
        if self.shared.settings.gate == config::Gate::Notify {
            self.shared.wait_until(|| watched.init_was_asked_about());
        }
        if watched.init_was_asked_about() {
            // About the interpreter alone: the script had been opened.
            return (asked.len() == 1).then(script).flatten().map(|script| vec![script]);
        }
        if !watched.take_armed_before_start() {
            // It is known, and what runs there was looked at.
            return None;
        }
        self.shared.armed_late(watched);
        Some(self.look_at_unread(execution).into_iter().chain(script()).collect())
    }

    /// Whether a process that a runtime has not put into the container sees its root, by
    /// setns(2) or chroot(2): it was asked to execute, by a name of its own, one of the
    /// container's programs, and the kernel names that as the container does. The host
    /// names it by a directory of its own, below /proc, or by a descriptor.
    fn sees_root(&self, executed: &Executed, program: Option<&Mapped>, watched: &Watched) -> bool {
        let is_elsewhere = watched.perf_cgroup.is_some()
            && executed.cgroup.is_some_and(|it| self.shared.table.by_perf_cgroup(it).is_none());
        let name = &executed.file_name;
        let is_by_own_name =
            name.starts_with(b"/") && !name.starts_with(b"/proc/") && descriptor(name).is_none();
        is_elsewhere
            && is_by_own_name
            && program.is_some_and(|program| {
                let owner = self.shared.table.by_device(program.device);
                owner.is_some_and(|owner| owner.container == watched.container)
                    && content::is_in_layers(watched, &program.name) == Some(true)
            })
    }

    /// Who made a process, who made that one, and so on, as far as it is recorded.
    fn makers(&self, pid: u32) -> Arc<[Maker]> {
        let parent = |pid: u32| self.processes.get(&pid)?.parent;
        let pids = std::iter::successors(parent(pid), |pid| parent(*pid));
        let maker = |pid| {
            let program = self.processes.get(&pid).and_then(|known| known.program.as_ref());
            Maker { pid, exe: program.map(|program| program.name.clone()) }
        };
        pids.take(MAX_MAKERS).map(maker).collect()
    }

    /// Where no mapping is recorded: the container in whose root the program lies.
    fn owner_of_running(
        &self,
        executed: &Executed,
        program: Option<&Mapped>,
    ) -> Option<Arc<Watched>> {
        if program.is_some() {
            return None;
        }
        let exe = Handle::open(executed.pid).ok()?.open_exe().ok()?;
        self.shared.table.owner(&file::stat(exe).ok()?)
    }

    /// Looks at a program in another container's root.
    fn look_at_anothers(&self, execution: &Execution<'_>, owner: &Watched) -> Option<Unseen> {
        let handle = Handle::open(execution.executed.pid).ok();
        let mapped = execution.program.as_deref();
        let file = deeds::open_program(owner, handle.as_ref(), mapped);
        let name = match &file {
            Some(Held { fd, .. }) => file::name_of(fd.as_fd()).ok()?,
            None => mapped?.name.to_vec(),
        };
        // It lies on the other container's own overlay.
        let file = file.map(|held| (held, owner.local()));
        Some(execution.unseen(Filesystem::Container, name, file, handle, false))
    }

    /// Looks at a program of a root whose layers are not read, by what the upper layer has
    /// at its path.
    fn look_at_unread(&self, execution: &Execution<'_>) -> Option<Unseen> {
        let Execution { watched, executed, program, .. } = execution;
        if !self.shared.settings.looks_at(Filesystem::Overlay) {
            return None;
        }
        let handle = Handle::open(executed.pid).ok();
        let exe = handle.as_ref().and_then(|handle| {
            let fd = handle.open_exe().ok()?;
            let stat = file::stat(&fd).ok()?;
            let is_it = match program.as_deref() {
                Some(mapped) => (mapped.device, mapped.inode) == (stat.device, stat.inode),
                None => stat.device == watched.device,
            };
            is_it.then_some(Held { fd, stat })
        });
        let name = match (program.as_deref(), &exe) {
            (Some(mapped), _) => mapped.name.to_vec(),
            (None, Some(exe)) => file::name_of(exe.fd.as_fd()).ok()?,
            (None, None) => return None,
        };
        let path = unseen::path(&name, name.ends_with(file::DELETED)).ok()?;
        let file = match inspect::upper(watched, &path) {
            Upper::File { fd, stat } => (Held { fd, stat }, Some(Local::by_layers())),
            // It has no name any more, and what was made in the upper layer has its times.
            Upper::Hidden | Upper::Absent | Upper::Unknown => {
                let exe = exe.filter(|exe| exe.stat.links == 0)?;
                if watched.standing(&exe.stat) != Standing::Own {
                    return None;
                }
                (exe, None)
            }
        };
        let is_parent_outside = self.is_parent_outside(execution);
        let name = path.as_bytes().to_vec();
        Some(execution.unseen(Filesystem::Overlay, name, Some(file), handle, is_parent_outside))
    }

    /// Looks at what the kernel was asked to execute, if that is a script: what was mapped
    /// is its interpreter then. A program can have several names.
    fn look_at_name(&self, execution: &Execution<'_>, name: &[u8]) -> Option<Unseen> {
        let path = unseen::path(name, false).ok()?;
        let Upper::File { fd, stat } = inspect::upper(&execution.watched, &path) else {
            return None;
        };
        let readable = door::reopen(fd.as_fd(), Local::by_layers()).ok()?;
        if file::sniff(readable.as_fd()).ok()? != Format::Script {
            return None;
        }
        let file = Some((Held { fd, stat }, Some(Local::by_layers())));
        let handle = Handle::open(execution.executed.pid).ok();
        let is_parent_outside = self.is_parent_outside(execution);
        let filesystem = Filesystem::Overlay;
        let found = execution.unseen(filesystem, name.to_vec(), file, handle, is_parent_outside);
        Some(Unseen { is_script: true, ..found })
    }

    /// Whether the gate tells of what is executed from there, although it was not asked
    /// before: where nobody is to wait, it is told at the same time as we are.
    fn will_be_told(&self, device: u64, mount: Option<u64>, executed: &Executed) -> bool {
        self.shared.settings.gate == config::Gate::Notify
            && self.shared.table.was_marked(device, mount, executed.time)
    }

    /// Looks at a program that the gate may not have seen.
    fn look_at(&self, execution: &Execution<'_>) -> Option<Unseen> {
        let Execution { watched, executed, program, asked, was_resident, .. } = execution;
        let was_resident = *was_resident;
        let table = &self.shared.table;
        let program = program.as_deref();
        let handle = Handle::open(executed.pid).ok();
        let opened = handle.as_ref().and_then(|handle| {
            let exe = handle.open_exe().ok()?;
            let stat = file::stat(&exe).ok()?;
            Some((exe, stat))
        });
        let is_host = handle.as_ref().is_some_and(|handle| {
            handle.mount_namespace().is_ok_and(procfs::is_host_mount_namespace)
                || handle.has_host_root()
        });
        // By a mount that it does not see itself: on its way in, by setns(2) or chroot(2).
        let is_behind = |stat: &Stat| {
            Some(stat.device) == self.host_device
                && handle.as_ref().and_then(|handle| handle.mountinfo().ok()).is_none_or(
                    |mountinfo| {
                        stat.mount
                            .is_some_and(|mount| overlay::find_place(&mountinfo, mount).is_none())
                    },
                )
        };
        // Below an overlay, or another one by now: then it must not be taken for what
        // was executed.
        let is_same = |stat: &Stat| {
            program.is_none_or(|mapped| (mapped.device, mapped.inode) == (stat.device, stat.inode))
        };
        let may_be_below = !self.tells_overlays;
        let is_marked = |stat: &Stat| {
            table.owner(stat).is_some()
                || asked.contains(&(stat.device, stat.inode))
                || self.will_be_told(stat.device, stat.mount, executed)
        };
        // Asked now: its mounts may be gone with it. Lists of mounts can be long, so only
        // where it matters.
        let ground = match &opened {
            // Memory needs no list.
            Some((_, stat)) if Some(stat.device) == self.memfd_device => Ground::Memory,
            Some((_, stat)) if !is_host && is_same(stat) && !is_marked(stat) => {
                self.ground(execution, handle.as_ref(), stat)
            }
            Some(_) | None => Ground::Foreign,
        };
        let exe = opened.as_ref().and_then(|(_, stat)| {
            let is_marked = is_marked(stat);
            (is_same(stat) || (may_be_below && is_marked)).then(|| Exe {
                device: stat.device,
                links: stat.links,
                is_marked,
                is_on_tmpfs: ground == Ground::Memory,
                // Only who comes from outside is on its way in.
                is_host: !was_resident && (is_host || is_behind(stat)),
            })
        });
        // Of who is gone, or runs something else by now, a file of the host's own root
        // tells nothing: the gate was asked about what is mounted from there.
        let is_mapped_below = program.is_some_and(|mapped| {
            !was_resident && self.host_device == Some(mapped.device)
                || may_be_below && watched.layers().is_none_or(|layers| layers.is_on(mapped.device))
        });
        let is_mapped_marked = program.is_some_and(|mapped| {
            table.by_device(mapped.device).is_some()
                || asked.contains(&(mapped.device, mapped.inode))
                || self.will_be_told(mapped.device, None, executed)
        });
        let mounted = match (&exe, program) {
            (None, Some(mapped)) if !is_mapped_marked => self.mounted(execution, mapped.device),
            _ => None,
        };
        let memfd_device = self.memfd_device;
        let is_parent_outside = self.is_parent_outside(execution);
        let evidence = Evidence {
            mapped: program,
            is_mapped_marked,
            exe,
            memfd_device,
            is_mapped_below,
            is_parent_outside,
            mounted,
        };
        let Judged::Unseen(filesystem) = judge(&evidence) else { return None };
        if !self.shared.settings.looks_at(filesystem) {
            return None;
        }
        let file = opened.filter(|_| exe.is_some());
        let file = file.map(|(fd, stat)| (Held { fd, stat }, ground.local()));
        let name = match (program, &file) {
            (Some(mapped), _) => mapped.name.to_vec(),
            (None, Some((exe, _))) => file::name_of(exe.fd.as_fd()).ok()?,
            (None, None) => return None,
        };
        Some(execution.unseen(filesystem, name, file, handle, is_parent_outside))
    }

    /// Who answers for a program's file, as its process sees it, or else its parent.
    fn ground(&self, execution: &Execution<'_>, handle: Option<&Handle>, stat: &Stat) -> Ground {
        if Some(stat.device) == self.memfd_device {
            return Ground::Memory;
        }
        let view = View::of(handle);
        if view.mount(stat).is_some() {
            return view.ground(stat);
        }
        let parent = execution.parent.and_then(|parent| Handle::open(parent).ok());
        View::of(&parent).ground(stat)
    }

    /// A script that was executed by its descriptor: the file that was mapped is its
    /// interpreter, which is given the descriptor too and so leaves it open.
    fn look_at_script(&self, execution: &Execution<'_>, descriptor: u32) -> Option<Unseen> {
        let handle = Handle::open(execution.executed.pid).ok()?;
        let fd = handle.open_descriptor(descriptor).ok()?;
        let stat = file::stat(&fd).ok()?;
        let table = &self.shared.table;
        if !stat.is_regular()
            || table.is_marked(stat.device, stat.mount)
            || table.owner(&stat).is_some()
        {
            return None;
        }
        let ground = View::of([&handle]).ground(&stat);
        // Of what cannot be read it is enough that its interpreter runs.
        if let Some(local) = ground.local() {
            let script = door::reopen(fd.as_fd(), local).ok()?;
            if file::sniff(script.as_fd()).ok()? != Format::Script {
                return None;
            }
        }
        let filesystem = if Some(stat.device) == self.memfd_device || stat.links == 0 {
            Filesystem::Anonymous
        } else if ground == Ground::Memory {
            Filesystem::Tmpfs
        } else {
            Filesystem::Volume
        };
        let name = file::name_of(fd.as_fd()).ok()?;
        let is_parent_outside = self.is_parent_outside(execution);
        let file = Some((Held { fd, stat }, ground.local()));
        let found = execution.unseen(filesystem, name, file, Some(handle), is_parent_outside);
        Some(Unseen { is_script: true, ..found })
    }

    /// What is mounted where the process, its parent or its container lives.
    fn mounted(&self, execution: &Execution<'_>, device: u64) -> Option<Filesystem> {
        let viewers =
            [Some(execution.executed.pid), execution.parent, Some(execution.watched.init.pid)];
        viewers
            .into_iter()
            .flatten()
            .find_map(|viewer| mounted(&Handle::open(viewer).ok()?.mountinfo().ok()?, device))
            .or_else(|| self.shared.table.kind_of(device))
    }

    /// Whether who made this process is not in a container.
    fn is_parent_outside(&self, execution: &Execution<'_>) -> bool {
        let parent = execution
            .parent
            .or_else(|| Some(procfs::read_stat(execution.executed.pid).ok()?.parent));
        let Some(parent) = parent else { return false };
        match self.processes.get(&parent) {
            Some(Known { watched: Some(_), .. }) => false,
            Some(_) | None => {
                procfs::mount_namespace_of(parent).is_ok_and(procfs::is_host_mount_namespace)
            }
        }
    }

    fn hand_on_proven(&self, executions: Vec<Described>) {
        executions.into_iter().for_each(|execution| self.proven.send_back(execution));
    }

    fn hand_on(&self, mut unseen: Unseen) {
        // A container that has few waiting does not pay for another's flood.
        let has_many = || self.unseen.len_of(&unseen.watched.container) >= FEW_FILES;
        if self.unseen.len() >= self.max_files && has_many() {
            // It is told all the same; its content is not known.
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
}

/// When something happened, by a record's time.
/// When this was, in clock ticks since boot.
pub(in crate::watch) fn ticks_of(record: u64) -> u64 {
    let age = Duration::from_nanos(perf::now().saturating_sub(record));
    procfs::ticks_since_boot().saturating_sub(procfs::ticks_in(age))
}

pub(in crate::watch) fn time_of(record: u64) -> Timestamp {
    let age = perf::now().saturating_sub(record);
    let age = SignedDuration::from_nanos(i64::try_from(age).unwrap_or(0));
    let now = Timestamp::now();
    now.saturating_sub(age).unwrap_or(now)
}

/// One execve, with what is known from before it.
struct Execution<'a> {
    watched: Arc<Watched>,
    executed: &'a Executed,
    program: Option<Arc<Mapped>>,
    previous: Option<Arc<Mapped>>,
    parent: Option<u32>,
    /// What the gate was asked about, by device and inode.
    asked: Vec<(u64, u64)>,
    /// The process was the container's before, and does not come from outside.
    was_resident: bool,
    /// The container in whose root the program lies, where that is another one.
    file_of: Option<ContainerId>,
}

impl Execution<'_> {
    fn unseen(
        &self,
        filesystem: Filesystem,
        name: Vec<u8>,
        file: Option<(Held, Option<Local>)>,
        handle: Option<Handle>,
        is_parent_outside: bool,
    ) -> Unseen {
        Unseen {
            watched: self.watched.clone(),
            at: time_of(self.executed.time),
            filesystem,
            name,
            file,
            handle,
            pid: self.executed.pid,
            executed: self.executed.time,
            parent: self.parent,
            exec_name: self.executed.file_name.to_vec(),
            is_script: false,
            previous: self.previous.clone().filter(|_| is_parent_outside),
            is_parent_outside,
            progress: None,
            file_of: self.file_of.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerId, FileTime, FileType, ProcessIdentity};

    const MEMFD: u64 = 1;

    fn mapped(device: u64, name: &str) -> Mapped {
        let name = name.as_bytes().into();
        Mapped { pid: 7, time: 0, address: 0, length: 0, device, inode: 9, is_shared: false, name }
    }

    fn exe(device: u64) -> Exe {
        Exe { device, links: 1, is_marked: false, is_on_tmpfs: false, is_host: false }
    }

    fn evidence(mapped: &Mapped) -> Evidence<'_> {
        Evidence {
            mapped: Some(mapped),
            is_mapped_marked: false,
            exe: None,
            memfd_device: Some(MEMFD),
            is_mapped_below: false,
            is_parent_outside: false,
            mounted: None,
        }
    }

    #[track_caller]
    fn check(evidence: Evidence<'_>, expected: Option<Filesystem>) {
        assert_eq!(judge(&evidence), expected.map_or(Judged::Known, Judged::Unseen));
    }

    #[test]
    fn w13_arguments_of_the_hosts_programs_are_counted_apart() {
        // A build on the host: none of the containers' executions lacks its arguments.
        assert_eq!(shares(70, 0), (0, 70));
        assert_eq!(shares(70, 3), (3, 67));
        // Read by other means, or not made yet: nothing was lost of them.
        assert_eq!(shares(0, 3), (0, 0));
        assert_eq!(shares(2, 3), (2, 0));
    }

    #[test]
    fn h17_no_container_makes_anothers_processes_unknown() {
        let time = FileTime { seconds: 0, nanoseconds: 0 };
        let root = Stat {
            device: 1,
            inode: 1,
            born: None,
            changed: time,
            modified: time,
            file_type: FileType::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            node: (0, 0),
            mount: None,
        };
        let watched = |name: &str| {
            let (id, path) = (ContainerId::new("n", name), b"/".to_vec());
            let init = ProcessIdentity { pid: 1, start_time: 1 };
            Arc::new(Watched::new(id, init, &root, path, None, None, None))
        };
        let (noisy, quiet) = (watched("noisy"), watched("quiet"));
        let mut processes = HashMap::new();
        let mut add = |pids: std::ops::Range<u32>, watched: Option<&Arc<Watched>>| {
            for pid in pids {
                let known =
                    Known { watched: watched.cloned(), ended: pid % 2 == 0, ..Known::default() };
                processes.insert(pid, known);
            }
        };
        add(0..100, None);
        add(1000..1800, Some(&noisy));
        add(2000..2100, Some(&quiet));
        let forgotten = make_room(&mut processes, 1000);
        let left = |watched: &Arc<Watched>, living: bool| {
            let is_it = |known: &&Known| {
                known.ended != living
                    && known.watched.as_ref().is_some_and(|one| Arc::ptr_eq(one, watched))
            };
            processes.values().filter(is_it).count()
        };
        assert_eq!((left(&quiet, true), left(&quiet, false)), (50, 50));
        assert_eq!((left(&noisy, true), left(&noisy, false)), (400, 250), "the ended go first");
        assert_eq!(processes.len(), 750, "the host's own are asked for again");
        assert_eq!(forgotten.len(), 1);
        assert!(Arc::ptr_eq(&forgotten[0].0, &noisy) && forgotten[0].1 == 150);
    }

    #[test]
    fn the_gate_has_told_of_what_is_marked() {
        let program = mapped(40, "/bin/x");
        check(Evidence { is_mapped_marked: true, ..evidence(&program) }, None);
        // A mount of the host's directory that carries a mark of its own.
        let marked = Exe { is_marked: true, ..exe(40) };
        check(Evidence { exe: Some(marked), ..evidence(&program) }, None);
    }

    #[test]
    fn a_memfd_is_anonymous_alive_or_gone_and_wherever_it_comes_from() {
        let program = mapped(MEMFD, "/memfd:a (deleted)");
        let anonymous = Some(Filesystem::Anonymous);
        check(evidence(&program), anonymous);
        check(Evidence { exe: Some(exe(MEMFD)), ..evidence(&program) }, anonymous);
        // Whether it is the runtime's, its content tells and not its name.
        let host = Exe { is_host: true, ..exe(MEMFD) };
        check(Evidence { exe: Some(host), ..evidence(&program) }, anonymous);
        check(Evidence { is_parent_outside: true, ..evidence(&program) }, anonymous);
        // One of huge pages is on another device.
        check(evidence(&mapped(12, "/memfd:a (deleted)")), anonymous);
        // A record that was lost.
        let unmapped = Evidence { mapped: None, exe: Some(exe(MEMFD)), ..evidence(&program) };
        check(unmapped, anonymous);
    }

    #[test]
    fn what_never_had_a_name_is_anonymous_and_what_lost_it_later_is_not() {
        let nameless = mapped(40, "/vol/#12 (deleted)");
        let gone = Exe { links: 0, ..exe(40) };
        check(evidence(&nameless), Some(Filesystem::Anonymous));
        check(Evidence { exe: Some(gone), ..evidence(&nameless) }, Some(Filesystem::Anonymous));
        let named = mapped(40, "/vol/x");
        check(Evidence { exe: Some(gone), ..evidence(&named) }, Some(Filesystem::Volume));
        // Only its name says so.
        let lying = Evidence { exe: Some(exe(40)), ..evidence(&nameless) };
        check(lying, Some(Filesystem::Volume));
    }

    #[test]
    fn other_filesystems_are_told_by_what_they_are() {
        let program = mapped(40, "/mnt/x");
        let memory = Exe { is_on_tmpfs: true, ..exe(40) };
        check(Evidence { exe: Some(memory), ..evidence(&program) }, Some(Filesystem::Tmpfs));
        check(Evidence { exe: Some(exe(40)), ..evidence(&program) }, Some(Filesystem::Volume));
        let mounted = Some(Filesystem::Tmpfs);
        check(Evidence { mounted, ..evidence(&program) }, mounted);
        check(evidence(&program), Some(Filesystem::Volume));
    }

    #[test]
    fn who_is_on_the_way_into_a_container_runs_the_hosts_programs() {
        let runtime = mapped(40, "/usr/sbin/runc");
        let host = Exe { is_host: true, ..exe(40) };
        check(Evidence { exe: Some(host), ..evidence(&runtime) }, None);
        check(Evidence { is_parent_outside: true, ..evidence(&runtime) }, None);
    }

    #[test]
    fn on_older_kernels_the_file_below_an_overlay_is_the_overlays() {
        let below = mapped(40, "/bin/x");
        let overlays = Exe { is_marked: true, ..exe(50) };
        let old = Evidence { is_mapped_below: true, ..evidence(&below) };
        check(Evidence { exe: Some(overlays), ..old }, None);
        // Gone: on that filesystem it was the overlay's.
        check(old, None);
        // Alive, it can be told from a volume that is on the same filesystem.
        check(Evidence { exe: Some(exe(40)), ..old }, Some(Filesystem::Volume));
    }

    #[test]
    fn descriptors_are_recognised() {
        assert_eq!(descriptor(b"/dev/fd/3"), Some(3));
        assert_eq!(descriptor(b"/proc/self/fd/12"), Some(12));
        assert_eq!(descriptor(b"/proc/7/fd/0"), Some(0));
        assert_eq!(descriptor(b"/proc/self/exe"), None);
        assert_eq!(descriptor(b"/dev/fd/3/x"), None);
        assert_eq!(descriptor(b"/bin/sh"), None);
    }

    #[test]
    fn what_is_mounted_is_found_by_its_device() {
        let mountinfo = b"1 0 0:40 / / rw - overlay overlay rw\n\
            2 1 0:41 / /dev/shm rw shared:1 - tmpfs shm rw\n3 1 8:1 /x /x rw - ext4 /dev/sda rw";
        let device = |major, minor| rustix::fs::makedev(major, minor);
        assert_eq!(mounted(mountinfo, device(0, 41)), Some(Filesystem::Tmpfs));
        assert_eq!(mounted(mountinfo, device(8, 1)), Some(Filesystem::Volume));
        assert_eq!(mounted(mountinfo, device(8, 2)), None);
    }
}
