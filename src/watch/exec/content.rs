//! Executed files of the container's own layer, and those of the image's layers
//! that may have been changed there: who runs them, and what they hold. Hashed
//! by the descriptor that the kernel opened for the event, so that no rename can
//! put another file in its place.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use super::crowd;
use super::gate::Execution;
use super::take::Taken;
use super::trace;
use super::unproven::Question;
use super::unseen;
use super::writable::Look;
use crate::health::Failure;
use crate::model::{
    ContainerId, Content, Fact, FileState, Filesystem, Format, HostilePath, LayerFile, LowerTwin,
    RootfsPath, Source, Unhashed,
};
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle};
use crate::sys::{overlay, perf, priority};
use crate::threads;
use crate::watch::core::fair;
use crate::watch::core::fair::Owned;
use crate::watch::core::fair::Receiver;
use crate::watch::core::fair::Sender;
use crate::watch::core::held::Held;
use crate::watch::core::held::Left;
use crate::watch::core::shared::Next;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;
use crate::watch::core::trust::Verdict;
use crate::watch::files::lower;
use crate::watch::files::lower::Finding;
use crate::watch::files::lower::TwinReading;
use crate::watch::files::state;
use crate::watch::files::state::Begun;
use crate::watch::files::state::Reading;
use crate::watch::files::state::Which;
use crate::watch::files::writers::Named;
use crate::watch::mounts::marking;
use crate::watch::process::arguments::Words;
use crate::watch::process::deeds;
use crate::watch::process::describe;
use crate::watch::process::describe::Executing;
use crate::watch::sessions::acts;

/// An execution whose process has been described, and whose file is still to be
/// hashed.
#[derive(Debug)]
pub(in crate::watch) struct Described {
    watched: Arc<Watched>,
    /// The container on whose mount the file lies; a process of another one may have
    /// entered its namespaces.
    holder: Arc<Watched>,
    /// The process, as the gate saw it.
    seen: Option<procfs::Stat>,
    filesystem: Filesystem,
    path: RootfsPath,
    file: Executed,
    stat: Stat,
    layer_file: Option<LayerFile>,
    is_movable: bool,
    look: Look,
    could_change: Option<bool>,
    executing: Executing,
    /// When the gate was asked, by the clock of the kernel's records.
    asked: Option<u64>,
    at: Timestamp,
    times: u64,
    progress: Progress,
}

/// Where the content of an executed file is read.
#[derive(Debug)]
enum Executed {
    Held(Held),
    /// Found again where the host keeps it, because its container has ended.
    Upper(OwnedFd, Stat),
}

/// How far the hashing of an executed file has come. It can be put aside in between.
#[derive(Debug)]
enum Progress {
    Waiting,
    Reading(Box<Reading>),
    /// The file below it, in the image's layers, is being read.
    Twin(FileState, Box<TwinReading>),
    Done(FileState, Option<LowerTwin>),
}

impl Owned for Execution {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

impl Owned for Described {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// How long an execve may take, in clock ticks.
const MOMENT: u64 = 25;

/// How often those are looked for that are not recorded.
const LOOK_FOR_UNPROVEN: Duration = Duration::from_millis(250);

/// Files longer than this take a noticeable time to hash.
const LARGE: u64 = 16 << 20;

/// Describes processes. A thread of its own, because a process may live for less
/// time than the file before it takes to hash.
pub(in crate::watch) fn describe(
    shared: &Shared,
    executions: &Receiver<Taken>,
    described: &Sender<Described>,
) {
    // Without CAP_SYS_NICE it runs like the others, and is late more often.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(execution) = shared.next_to_tell(executions) {
        let Some(execution) = describe_one(shared, execution, executions) else {
            continue;
        };
        match described.try_send(execution) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(execution)) => shared.lose(
                Failure::ContentQueueFull,
                Some(&execution.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }
}

fn describe_one(shared: &Shared, taken: Taken, others: &Receiver<Taken>) -> Option<Described> {
    let Taken { execution, path, look, could_change, .. } = taken;
    let Execution {
        watched, filesystem, file, stat, layer_file, is_movable, caller, at, more, ..
    } = execution;
    let times = 1 + more.map_or(0, |more| more.take());
    threads::about(&watched.container);
    let holder = watched;
    let seen = caller.stat.clone();
    let actor = seen.as_ref().and_then(|seen| deeds::other_than(shared, &holder, seen));
    if filesystem == Filesystem::Overlay && actor.is_some() {
        return None;
    }
    let watched = actor.unwrap_or_else(|| holder.clone());

    let executing = {
        // Held until the session is told, so that it is told before what it does.
        let mut sessions = shared.sessions();
        sessions.open(shared, &caller, &watched, at, &|| others.len())
    };
    acts::keep_handle(shared, &watched, &caller);
    let mut executing = executing.unwrap_or_else(|| {
        let executing = describe::after_exec(&caller, &watched, &|| !others.is_empty());
        let described = &executing.process;
        let words = described.argv.clone().map(|argv| Words { exe: described.exe.clone(), argv });
        acts::keep_words(shared, &watched, &caller, words);
        executing
    });
    if let Some(stat) = &caller.stat {
        let mut packages = shared.packages();
        packages.executes(shared, &watched, stat);
        // Its parents may have ended with it.
        if let Some(ancestors) = packages.ancestors_of(stat.identity)
            && ancestors.len() > executing.process.ancestors.len()
        {
            executing.process.ancestors = ancestors.to_vec();
        }
    }
    if let (Ok((path, _)), None) = (&path, &executing.process.root) {
        executing.process.root = describe::root_by_name(path, executing.process.exe.as_deref());
    }
    match path {
        // The common case, where directories can be moved at all.
        Ok((path, _)) if is_movable && is_where_the_image_has_it(&watched, &path, &stat) => None,
        Ok((path, is_certain)) => {
            let exe = executing.process.exe.as_deref().filter(|_| !is_certain);
            let path = exe.and_then(|exe| marking::path_of_program(exe, &path)).unwrap_or(path);
            Some(Described {
                watched,
                holder,
                seen,
                filesystem,
                path,
                file: Executed::Held(file),
                stat,
                layer_file,
                is_movable,
                look,
                could_change,
                executing,
                asked: caller.asked,
                at,
                times,
                progress: Progress::Waiting,
            })
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be told: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            None
        }
    }
}

pub(in crate::watch) fn is_where_the_image_has_it(
    watched: &Watched,
    path: &RootfsPath,
    stat: &Stat,
) -> bool {
    watched.layers().is_some_and(|layers| lower::is_at(layers, path, stat))
}

/// Hashes what was executed, but for large files, which must not keep the others
/// waiting.
pub(in crate::watch) fn hash(
    shared: &Shared,
    described: &Receiver<Described>,
    large: &Sender<Described>,
) {
    let mut last_look = Instant::now();
    loop {
        if last_look.elapsed() >= LOOK_FOR_UNPROVEN {
            last_look = Instant::now();
            look_for_unproven(shared);
        }
        let mut execution = match shared.next_within(described, LOOK_FOR_UNPROVEN) {
            Next::Item(execution) => execution,
            Next::Nothing => continue,
            Next::End => return report_unproven(shared),
        };
        let is_crowded = described.len() >= crowd::FEW;
        loop {
            if execution.is_large(shared) {
                hand_on_large(shared, execution, large);
                break;
            }
            if execution.read_on(shared, is_crowded) {
                tell(shared, execution, is_crowded);
                break;
            }
        }
    }
}

fn hand_on_large(shared: &Shared, execution: Described, large: &Sender<Described>) {
    match large.try_send(execution) {
        Ok(()) | Err(TrySendError::Disconnected(_)) => (),
        Err(TrySendError::Full(execution)) => shared.lose(
            Failure::ContentQueueFull,
            Some(&execution.watched),
            "too many large executed files wait to be hashed",
        ),
    }
}

/// Hashes large files that were executed, when nobody else needs the processor: a
/// slice of one, then a slice of another container's.
pub(in crate::watch) fn hash_large(shared: &Shared, large: &Receiver<Described>) {
    let _ = priority::set(priority::current(), 10, priority::Disk::Usual);
    while let Some(mut execution) = shared.next_to_tell(large) {
        let (begun, used) = (Instant::now(), fair::processor_time());
        let is_done = loop {
            if execution.read_on(shared, false) {
                break true;
            }
            if begun.elapsed() >= fair::SLICE {
                break false;
            }
        };
        shared.spend(fair::processor_time().saturating_sub(used));
        if is_done {
            tell(shared, execution, false);
            large.finish();
        } else {
            large.put_back(execution);
        }
        shared.keep_pace();
    }
}

impl Described {
    /// Where a walk finds its file.
    pub(in crate::watch) fn place(&self) -> Option<(Arc<Watched>, RootfsPath)> {
        let is_on_overlay = self.filesystem == Filesystem::Overlay;
        is_on_overlay.then(|| (self.watched.clone(), self.path.clone()))
    }

    /// Whether what is read next is large. What is above the limit is not read at all.
    fn is_large(&self, shared: &Shared) -> bool {
        let size = match &self.progress {
            Progress::Waiting | Progress::Reading(_) => self.stat.size,
            Progress::Twin(_, twin) => twin.size(),
            Progress::Done(..) => return false,
        };
        (LARGE..=shared.settings.max_hash_bytes).contains(&size)
    }

    /// Reads a little more; whether all has been read.
    fn read_on(&mut self, shared: &Shared, is_crowded: bool) -> bool {
        self.progress = match std::mem::replace(&mut self.progress, Progress::Waiting) {
            Progress::Waiting => self.begin(shared, is_crowded),
            Progress::Reading(reading) => self.read_own(shared, reading),
            Progress::Twin(state, mut twin) => match twin.step(&shared.lower_twins, state::SLICE) {
                Some(lower) => Progress::Done(state, lower),
                None if !shared.may_tell() => Progress::Done(state, None),
                None => Progress::Twin(state, twin),
            },
            done @ Progress::Done(..) => done,
        };
        matches!(self.progress, Progress::Done(..))
    }

    fn begin(&mut self, shared: &Shared, is_crowded: bool) -> Progress {
        // The guard is gone before the file is read.
        let known = self.layer_file.and_then(|file| self.watched.layer_files().known(&file));
        // In a storm of one program every other would wait for its hashes.
        let known =
            known.or_else(|| is_crowded.then(|| shared.hashed.of_executed(&self.stat)).flatten());
        if let Some(state) = known {
            return self.begin_twin(shared, state);
        }
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let begin =
            |file: BorrowedFd<'_>, stat| Reading::begin(file, stat, Which::Always, max_hash_bytes);
        let begun = match &self.file {
            Executed::Held(held) => match held.take() {
                Left::Open(fd) => {
                    let begun = begin(fd.as_fd(), &self.stat);
                    match &begun {
                        Begun::Known(state) => self.was_read(shared, &fd, state),
                        Begun::Reads(_) => held.give_back(&self.holder, fd),
                    }
                    begun
                }
                Left::Copy(copy) => {
                    let state = state::of_copy(&copy, &self.stat);
                    self.remember(shared, &state);
                    Begun::Known(state)
                }
                Left::Name(_) => return self.find_in_upperdir(shared),
            },
            Executed::Upper(fd, stat) => begin(fd.as_fd(), stat),
        };
        match begun {
            Begun::Known(state) => self.begin_twin(shared, state),
            Begun::Reads(reading) => Progress::Reading(Box::new(reading)),
        }
    }

    fn read_own(&mut self, shared: &Shared, mut reading: Box<Reading>) -> Progress {
        if !shared.may_tell() {
            return Progress::Done(self.gone(), None);
        }
        let state = match &self.file {
            Executed::Held(held) => match held.take() {
                Left::Open(fd) => {
                    let state = reading.step(fd.as_fd(), state::SLICE);
                    match &state {
                        Some(state) => self.was_read(shared, &fd, state),
                        // Its container may end while it is put aside.
                        None => held.give_back(&self.holder, fd),
                    }
                    state
                }
                // Only what has not been begun is copied.
                Left::Name(_) | Left::Copy(_) => return self.find_in_upperdir(shared),
            },
            Executed::Upper(fd, _) => reading.step(fd.as_fd(), state::SLICE),
        };
        match state {
            Some(state) => self.begin_twin(shared, state),
            None => Progress::Reading(reading),
        }
    }

    /// The file as it was executed has been read to its end.
    fn was_read(&mut self, shared: &Shared, fd: &OwnedFd, state: &FileState) {
        if self.could_change.is_none()
            && let Ok(now) = file::stat(fd)
        {
            let Described { look, watched, path, stat, .. } = self;
            self.could_change = Some(look.could_change(shared, watched, path, stat, &now));
        }
        self.remember(shared, state);
    }

    /// What may have been changed back meanwhile is read anew each time.
    fn remember(&self, shared: &Shared, state: &FileState) {
        if self.could_change == Some(false) {
            shared.hashed.remember_executed(&self.stat, state);
        }
    }

    /// The file is not open any more, because its container has ended.
    fn find_in_upperdir(&mut self, shared: &Shared) -> Progress {
        let is_own = self.filesystem == Filesystem::Overlay && self.layer_file.is_none();
        match is_own.then(|| in_upperdir(&self.watched, &self.path, &self.stat)).flatten() {
            Some((fd, stat)) => {
                self.file = Executed::Upper(fd, stat);
                Progress::Waiting
            }
            None => self.begin_twin(shared, self.gone()),
        }
    }

    fn gone(&self) -> FileState {
        FileState { content: Content::Unhashed(Unhashed::Gone), ..state::unopened(&self.stat) }
    }

    fn begin_twin(&self, shared: &Shared, state: FileState) -> Progress {
        // It would be its own twin, or no image has anything there.
        if self.filesystem != Filesystem::Overlay || self.layer_file.is_some() {
            return Progress::Done(state, None);
        }
        let Some(layers) = self.watched.layers() else { return Progress::Done(state, None) };
        let max_hash_bytes = shared.settings.max_hash_bytes;
        match shared.lower_twins.begin(layers, &self.path, true, max_hash_bytes) {
            Finding::Known(lower) => Progress::Done(state, lower),
            Finding::Reads(twin) => Progress::Twin(state, twin),
        }
    }
}

/// What the kernel records if the gate's question becomes an execution. `None` of another
/// kind of file: its execve fails, and the shell that tried it reads the text itself.
fn question(shared: &Shared, execution: &Described) -> Option<Question> {
    let Progress::Done(state, _) = &execution.progress else { return None };
    // Of many that are counted, the others may be executions.
    if !matches!(state.format, Format::Elf | Format::Script) || execution.times > 1 {
        return None;
    }
    let process = execution.seen.as_ref()?.identity;
    let asked = execution.asked.filter(|_| shared.records_executions())?;
    Some(Question { process, asked })
}

/// An execution that the kernel has recorded. One that it has not may be a mere check or
/// an execve that failed, and waits.
fn proven(shared: &Shared, execution: Described) -> Option<Described> {
    let Some(question) = question(shared, &execution) else { return Some(execution) };
    let mut unproven = shared.unproven();
    // After a stop no record is read that could prove it.
    if unproven.is_proven(&question) || shared.is_stopping() {
        return Some(execution);
    }
    if let Executed::Held(held) = &execution.file {
        // Open, it keeps its mount busy.
        drop(held.take());
    }
    unproven.wait(question, execution).err()
}

/// Reports what waits for records that are not read, and looks at the files of what is
/// not recorded.
fn look_for_unproven(shared: &Shared) {
    let overdue = shared.unproven().overdue(perf::now());
    overdue.into_iter().for_each(|execution| report(shared, execution, false));
    let not_executed: Vec<_> = shared.unproven().not_executed().map(Described::place).collect();
    not_executed.into_iter().for_each(|place| look_at_file(shared, place));
}

/// Nothing is recorded any more.
fn report_unproven(shared: &Shared) {
    let waiting = shared.unproven().forget_all(perf::now());
    for execution in waiting {
        if shared.may_tell() {
            report(shared, execution, true);
        } else {
            shared.leave(1);
        }
    }
}

/// Looks at the file of what was not executed: a walk finds those of an upper layer.
pub(in crate::watch) fn look_at_file(shared: &Shared, place: Option<(Arc<Watched>, RootfsPath)>) {
    if let Some((watched, path)) = place {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
}

/// Reports what was executed and what it holds.
fn tell(shared: &Shared, execution: Described, is_crowded: bool) {
    if let Some(execution) = proven(shared, execution) {
        report(shared, execution, is_crowded);
    }
}

fn report(shared: &Shared, execution: Described, is_crowded: bool) {
    let Described {
        mut watched,
        holder,
        seen,
        filesystem,
        path,
        file,
        stat,
        layer_file,
        is_movable,
        look,
        could_change,
        executing,
        asked,
        at,
        times,
        progress,
    } = execution;
    drop(file);
    let Progress::Done(mut state, lower) = progress else { return };
    state.could_change |= could_change.unwrap_or(look.had_writer());
    let is_on_overlay = filesystem == Filesystem::Overlay;
    let Executing { mut process } = executing;
    if process.argv.is_none() {
        // Here and not where it was described: those who wait there may be ending.
        let execve = (process.identity.pid, asked);
        process.argv = describe::recorded_arguments(shared, execve, &|| is_crowded);
    }
    if process.exe.is_none() {
        // It has ended, or it reads a text without `#!` itself: then it is what it was.
        let pid = process.identity.pid;
        let read_at = asked.map_or_else(procfs::ticks_since_boot, trace::ticks_of);
        // Its execve is over within a moment, and later its number may be another's.
        let named = Named { pid, read_at: read_at.saturating_add(MOMENT) };
        process = shared.complete(named, process);
    }
    let execve = (process.identity.pid, asked);
    let exec_name = describe::recorded_name(shared, execve, &|| is_crowded);
    // By now the record of its birth has been read.
    if filesystem != Filesystem::Overlay
        && Arc::ptr_eq(&holder, &watched)
        && let Some(other) = seen.and_then(|seen| deeds::other_than(shared, &holder, &seen))
    {
        watched = other;
    }
    let is_deleted = state.deleted;
    // The gate looked before it ran. It may also just have lost its name.
    let is_nameless = layer_file.is_none() && stat.links == 0 && unseen::has_a_number(&path);
    let filesystem = if is_nameless { Filesystem::Anonymous } else { filesystem };
    let path = unseen::path(path.as_bytes(), is_nameless).unwrap_or(path);
    // What is said of a file that was moved holds for its new path only.
    if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
        // First, so that its judgement finds it.
        watched.layer_files_mut().tell(layer_file, state.clone(), at);
    }
    let writer = match filesystem {
        Filesystem::Overlay if layer_file.is_none() => shared.writer_of_file(&watched, &stat),
        _ => None,
    };
    let fact = Fact::Executed {
        invoked_as: exec_name.and_then(|name| describe::invoked_as(&name, &path)),
        path: path.clone(),
        filesystem,
        running: false,
        times,
        state,
        lower,
        process: Arc::new(process),
        layer_file,
        writer,
    };
    let file_of = (!Arc::ptr_eq(&holder, &watched)).then(|| holder.container.clone());
    let is_told = shared.observe_file_of(&watched, file_of, at, Source::Gate, fact);
    if let Some(layer_file) = layer_file {
        if !is_told {
            watched.layer_files_mut().judge(&layer_file, Verdict::Lost);
        }
        // It is not in the upper layer: no walk would find it.
        return;
    }
    if !is_on_overlay {
        // No walk goes there.
        return;
    }

    // The overlay's marks do not see renames, removals and chmod; where drift is
    // executed, they are looked for soon.
    if !is_deleted {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
    shared.mark_for_sweep(&watched);
}

/// A file that is not open any more, because its container has ended: found again
/// where the host keeps it, and known by its times.
fn in_upperdir(watched: &Watched, path: &RootfsPath, stat: &Stat) -> Option<(OwnedFd, Stat)> {
    let layers = watched.layers()?;
    let upper = file::open_directory(&layers.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    let is_same = found.is_regular()
        && (found.changed, found.modified, found.size) == (stat.changed, stat.modified, stat.size);
    let is_whole = is_same && !overlay::is_metacopy(&fd, layers.userxattr).unwrap_or(true);
    is_whole.then_some((fd, found))
}

/// What the kernel calls an event's file when we ask.
pub(in crate::watch) fn event_name(file: &OwnedFd) -> Result<Vec<u8>, UnknownPath> {
    let name = file::name_of(file.as_fd())?;
    if name.starts_with(b"/") { Ok(name) } else { Err(UnknownPath::NotAbsolute) }
}

/// The path of an event's file in its container: as the overlay has it, by
/// whichever mount it was reached.
pub(in crate::watch) fn event_path(
    watched: &Watched,
    file: &OwnedFd,
    stat: &Stat,
    pid: u32,
    parent: Option<u32>,
) -> Result<RootfsPath, UnknownPath> {
    let name = event_name(file)?;
    let mut name = name.as_slice();
    if let Some(rest) = name.strip_suffix(file::DELETED)
        && !is_somewhere(watched, name)
    {
        // This name was removed, and the file has another one.
        name = rest;
    }
    let below_root = overlay::strip_directory(name, &watched.root_name);
    if let Some(mount) = stat.mount
        && stat.mount != watched.mount
    {
        // Reached through the runtime's own mount on the host, or through a bind
        // mount or a mount namespace that the container made.
        let viewers = [Some(std::process::id()), Some(pid), parent];
        let inside = viewers.into_iter().flatten().find_map(|viewer| {
            let mountinfo = Handle::open(viewer).ok()?.mountinfo().ok()?;
            let place = overlay::find_place(&mountinfo, mount)?;
            place.inside(name).or_else(|| place.inside(below_root?))
        });
        if let Some(inside) = inside {
            return Ok(RootfsPath::new(inside)?);
        }
    }
    Ok(RootfsPath::new(below_root.unwrap_or(name))?)
}

/// Whether a name that the kernel gave is one that the container has.
fn is_somewhere(watched: &Watched, name: &[u8]) -> bool {
    let below_root = overlay::strip_directory(name, &watched.root_name).unwrap_or(name);
    is_in_layers(watched, below_root).unwrap_or(true)
}

/// Whether a container's layers have this name; `None` if that cannot be asked.
pub(in crate::watch) fn is_in_layers(watched: &Watched, name: &[u8]) -> Option<bool> {
    let (Some(layers), Ok(path)) = (watched.layers(), RootfsPath::new(name)) else { return None };
    let is_in_upper = file::open_directory(&layers.dirs.upperdir)
        .and_then(|upper| file::open_path_beneath(&upper, path.relative()))
        .is_ok();
    Some(is_in_upper || lower::holds(layers, &path))
}

#[derive(Debug, thiserror::Error)]
pub(in crate::watch) enum UnknownPath {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the kernel gives no absolute path")]
    NotAbsolute,
    #[error(transparent)]
    Hostile(#[from] HostilePath),
}
