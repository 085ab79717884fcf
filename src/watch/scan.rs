//! Walks of upperdirs, and looks at single paths that have settled.
//!
//! Everything here is reached by descriptor, component by component, through no
//! symlink: the upperdir's content is the container's to choose, its path is not.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use jiff::Timestamp;
use rustix::fs::Dir;

use super::Report;
use super::lower::{self, LowerNames};
use super::shared::{DirtyPath, Shared};
use super::state::{self, Hashing};
use super::table::{Layers, Watched};
use crate::health::Failure;
use crate::model::{
    ContainerId, Content, Fact, FileState, FileType, LowerTwin, Observation, Process, RootfsPath,
    Source, Unhashed,
};
use crate::sys::file::{self, Stat};
use crate::sys::overlay::{self, Opacity};

/// An upperdir that is to be walked now.
#[derive(Debug)]
pub(super) enum Order {
    Scan {
        watched: Arc<Watched>,
        ticket: Option<u64>,
    },
    /// The container has ended: a last walk, then forget it.
    Last {
        watched: Arc<Watched>,
    },
}

const MAX_DEPTH: usize = 256;
const MAX_PATH: usize = 4096;
const BATCH: usize = 512;

/// Entries of one upperdir that are remembered between walks.
const MAX_CACHED: usize = 64 * 1024;

/// A file is hashed again in each walk until its ctime was this old when it was
/// hashed. A store through a shared mapping changes the content and leaves the
/// ctime as it is until the kernel has written the page back, half a minute later.
const STABLE_AFTER: Duration = Duration::from_secs(60);

/// A walk is made at most this much less often than it takes.
const REST_PER_WALK: u32 = 50;

/// What a walk found at a path, and by what it can be known again.
#[derive(Clone)]
struct Cached {
    stat: Stat,
    state: FileState,
    lower: Option<LowerTwin>,
}

type Cache = HashMap<RootfsPath, Cached>;

/// What the scan thread remembers of one container between walks.
struct Memory {
    watched: Arc<Watched>,
    cache: Cache,
    next_sweep: Instant,
    may_walk_from: Instant,
    /// After a loss the walk is made sooner, but not without end.
    may_rescan_from: Instant,
}

pub(super) struct Scan {
    pub(super) shared: Arc<Shared>,
    pub(super) orders: Receiver<Order>,
    pub(super) wake: Receiver<()>,
    memories: HashMap<ContainerId, Memory>,
}

/// The thread is to end, or the pipeline has no room.
struct Interrupted;

impl Scan {
    pub(super) fn new(shared: Arc<Shared>, orders: Receiver<Order>, wake: Receiver<()>) -> Scan {
        Scan { shared, orders, wake, memories: HashMap::new() }
    }

    pub(super) fn run(mut self) {
        while !self.shared.is_stopping() {
            while let Ok(order) = self.orders.try_recv() {
                if self.shared.is_stopping() {
                    return;
                }
                match order {
                    Order::Scan { watched, ticket } => self.walk(&watched, ticket, false),
                    Order::Last { watched } => {
                        self.walk(&watched, None, true);
                        self.memories.remove(&watched.container);
                        self.shared.table.remove(&watched);
                    }
                }
            }
            settle(&self.shared);
            let due = self.due_walks();
            for watched in due {
                self.walk(&watched, None, false);
                if !self.orders.is_empty() || self.shared.is_stopping() {
                    break;
                }
            }
            let idle = self.idle_time();
            match self.wake.recv_timeout(idle) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Containers to walk: those that lost something, those where drift was
    /// executed, and those whose turn has come.
    fn due_walks(&mut self) -> Vec<Arc<Watched>> {
        let now = Instant::now();
        let interval = self.shared.settings.sweep_interval;
        let all = self.shared.table.all();
        for watched in &all {
            let memory = self.memories.entry(watched.container.clone()).or_insert_with(|| Memory {
                watched: watched.clone(),
                cache: Cache::new(),
                next_sweep: now + interval,
                may_walk_from: now,
                may_rescan_from: now,
            });
            if !Arc::ptr_eq(&memory.watched, watched) {
                // The container runs anew.
                memory.watched = watched.clone();
                memory.cache = Cache::new();
            }
        }
        for container in self.shared.take_due_sweeps(now) {
            if let Some(memory) = self.memories.get_mut(&container) {
                memory.next_sweep = memory.next_sweep.min(now);
            }
        }
        let has_room = self.shared.has_room();
        let mut due = Vec::new();
        for watched in all {
            let memory = &self.memories[&watched.container];
            let is_lossy = has_room && watched.wants_rescan() && memory.may_rescan_from <= now;
            let is_due = memory.next_sweep.max(memory.may_walk_from) <= now;
            if is_lossy || is_due {
                due.push(watched);
            }
        }
        due
    }

    fn idle_time(&self) -> Duration {
        let now = Instant::now();
        let tick = Duration::from_millis(250);
        let next = self.memories.values().map(|memory| memory.next_sweep.max(memory.may_walk_from));
        next.chain(self.shared.next_due())
            .min()
            .map_or(tick, |due| due.saturating_duration_since(now).min(tick))
            .max(Duration::from_millis(5))
    }

    fn walk(&mut self, watched: &Arc<Watched>, ticket: Option<u64>, is_last: bool) {
        // Before the walk, so that what is lost during it asks for another.
        watched.take_rescan();
        let started = Instant::now();
        let memory = self.memories.remove(&watched.container);
        let cache = memory
            .filter(|memory| Arc::ptr_eq(&memory.watched, watched))
            .map(|memory| memory.cache)
            .unwrap_or_default();
        let writers = if is_last {
            self.shared
                .take_dirty_of(&watched.container)
                .into_iter()
                .filter_map(|(path, dirty)| Some((path, dirty.writer?)))
                .collect()
        } else {
            HashMap::new()
        };
        let mut walk = Walk {
            shared: &self.shared,
            watched,
            ticket,
            writers,
            known: cache,
            seen: Cache::new(),
            batch: Vec::new(),
            problem: None,
            since_look: 0,
        };
        let outcome = match watched.layers() {
            Some(layers) => walk.run(layers),
            None => {
                walk.problem = Some("the upperdir is not known".into());
                Ok(())
            }
        };
        let Walk { seen, problem, .. } = walk;
        let is_complete = outcome.is_ok() && problem.is_none();
        if outcome.is_err() && !self.shared.is_stopping() {
            self.shared.lose(
                Failure::PipelineFull,
                Some(watched),
                "the pipeline had no room for a scan for half a minute",
            );
        }
        if let Some(problem) = problem {
            // The snapshot of a container that has ended may go at any time.
            if !is_last {
                let _ = self.shared.health.record(Failure::ScanIncomplete);
                tracing::warn!(container = %watched.container, problem, "a scan is incomplete");
            }
        }
        let scanned =
            Report::Scanned { container: watched.container.clone(), ticket, complete: is_complete };
        let _ = self.shared.report_patiently(scanned);
        let now = Instant::now();
        let rest = (now - started) * REST_PER_WALK;
        self.memories.insert(
            watched.container.clone(),
            Memory {
                watched: watched.clone(),
                cache: seen,
                next_sweep: now + self.shared.settings.sweep_interval.max(rest),
                may_walk_from: now + rest,
                may_rescan_from: now + (now - started) * 2,
            },
        );
    }
}

/// Looks at the paths that have settled.
fn settle(shared: &Shared) {
    for (path, dirty) in shared.take_settled(Instant::now()) {
        if shared.is_stopping() {
            return;
        }
        let DirtyPath { watched, writer, source, .. } = dirty;
        let Some(layers) = watched.layers() else { continue };
        let tell = |fact| {
            shared.observe(&watched, Timestamp::now(), source, fact);
        };
        match look(shared, &watched, layers, &path) {
            Ok(Some(Found::Entry { state, lower, .. })) => {
                tell(Fact::Present { path, state, lower, writer });
            }
            // Whether the container or its owner removed it cannot be told.
            Ok(Some(Found::Whiteout) | None) if watched.is_detaching() => (),
            Ok(Some(Found::Whiteout)) => tell(Fact::Absent { path }),
            // The image's own file shows through: executed before it was known
            // which files are the image's.
            Ok(None) if lower::holds(layers, &path) => (),
            Ok(None) => tell(Fact::Absent { path }),
            Ok(Some(Found::Directory)) => (),
            Err(_) if watched.is_detaching() => (),
            Err(err) => {
                let detail = format!("the changed file {path} cannot be looked at: {err}");
                shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            }
        }
    }
}

#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
enum Found {
    Directory,
    Whiteout,
    Entry { stat: Stat, state: FileState, lower: Option<LowerTwin> },
}

/// What the upper layer holds at a path; `None` if nothing.
fn look(
    shared: &Shared,
    watched: &Watched,
    layers: &Layers,
    path: &RootfsPath,
) -> io::Result<Option<Found>> {
    let gone = |err: &io::Error| {
        // A directory of the way was replaced: what the path named is not there.
        matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
    };
    let parent = path.parent().unwrap_or_else(RootfsPath::root);
    // Not part of the question: without the upperdir nothing is known of the path.
    let upper = file::open_directory(&layers.dirs.upperdir)?;
    let found = file::open_directory_beneath(&upper, parent.relative()).and_then(|directory| {
        let holds_file_whiteouts = overlay::opacity(&directory, layers.userxattr)
            .is_ok_and(|opacity| opacity == Opacity::HoldsFileWhiteouts);
        let stat = file::stat_at(&directory, path.file_name())?;
        entry(shared, watched, layers, &directory, path, stat, holds_file_whiteouts)
    });
    match found {
        Ok(found) => Ok(Some(found)),
        Err(err) if gone(&err) => Ok(None),
        Err(err) => Err(err),
    }
}

/// What a directory of the upper layer holds under the last name of `path`.
fn entry(
    shared: &Shared,
    watched: &Watched,
    layers: &Layers,
    directory: &OwnedFd,
    path: &RootfsPath,
    stat: Stat,
    holds_file_whiteouts: bool,
) -> io::Result<Found> {
    if stat.is_whiteout_device() {
        return Ok(Found::Whiteout);
    }
    match stat.file_type {
        FileType::Directory => return Ok(Found::Directory),
        FileType::Regular => (),
        FileType::Symlink
        | FileType::CharDevice
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket => {
            return Ok(Found::Entry { stat, state: state::unopened(&stat), lower: None });
        }
    }
    let (fd, stat) = file::open_file_beneath(directory, path.file_name())?;
    if !stat.is_regular() {
        // Exchanged since we looked; the next look will see what it is by then.
        return Ok(Found::Entry { stat, state: state::unopened(&stat), lower: None });
    }
    let user = layers.userxattr;
    if holds_file_whiteouts && stat.size == 0 && overlay::is_file_whiteout(&fd, user)? {
        return Ok(Found::Whiteout);
    }
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let state = if overlay::is_metacopy(&fd, user)? {
        // The content is in a layer below, and only the merged view knows where.
        match open_merged(watched, path) {
            // Open, it keeps the container's mount busy.
            Ok(merged) => state::while_wanted(
                merged.as_fd(),
                &stat,
                Hashing::Programs,
                max_hash_bytes,
                &|| !watched.is_detaching(),
            )
            .unwrap_or_else(|| state::unopened(&stat)),
            Err(_) => state::unopened(&stat),
        }
    } else {
        state::of(fd.as_fd(), &stat, Hashing::Programs, max_hash_bytes)
    };
    let is_program = lower::looks_like_program(state.format, state.mode);
    let lower = shared.lower_twins.find(layers, path, is_program, max_hash_bytes);
    Ok(Found::Entry { stat, state, lower })
}

/// Opens a file as the container sees it. The descriptor is on the container's
/// mount and must not be kept.
fn open_merged(watched: &Watched, path: &RootfsPath) -> io::Result<OwnedFd> {
    let handle = crate::sys::procfs::Handle::open_exactly(watched.init)?;
    let root = file::open_root(&handle.root_path())?;
    if file::stat(&root)?.device != watched.device {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (fd, stat) = file::open_file_beneath(&root, path.relative())?;
    if stat.is_regular() { Ok(fd) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// One walk of one upperdir.
struct Walk<'a> {
    shared: &'a Shared,
    watched: &'a Arc<Watched>,
    ticket: Option<u64>,
    writers: HashMap<RootfsPath, Arc<Process>>,
    /// From the last walk, and for the next one.
    known: Cache,
    seen: Cache,
    batch: Vec<Observation>,
    /// The first reason for which the walk is not complete.
    problem: Option<String>,
    since_look: usize,
}

impl Walk<'_> {
    fn run(&mut self, layers: &Layers) -> Result<(), Interrupted> {
        match file::open_directory(&layers.dirs.upperdir) {
            Ok(upper) => self.directory(layers, &upper, &RootfsPath::root(), 0)?,
            Err(err) => self.note(format!(
                "cannot open the upperdir {}: {err}",
                layers.dirs.upperdir.display()
            )),
        }
        self.flush()
    }

    fn note(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }

    /// Walks an open directory, depth first. One descriptor per level is open.
    fn directory(
        &mut self,
        layers: &Layers,
        directory: &OwnedFd,
        path: &RootfsPath,
        depth: usize,
    ) -> Result<(), Interrupted> {
        let opacity = overlay::opacity(directory, layers.userxattr).unwrap_or_else(|err| {
            self.note(format!("cannot tell what {path} hides: {err}"));
            Opacity::Transparent
        });
        if opacity == Opacity::Opaque {
            self.hidden(layers, directory, path)?;
        }
        if overlay::is_redirected(directory, layers.userxattr).unwrap_or(false) {
            self.note(format!(
                "the directory {path} was moved and shows image files from elsewhere"
            ));
        }
        let entries = match Dir::read_from(directory) {
            Ok(entries) => entries,
            Err(err) => {
                self.note(format!("cannot list {path}: {err}"));
                return Ok(());
            }
        };
        let holds_file_whiteouts = opacity == Opacity::HoldsFileWhiteouts;
        for listed in entries {
            self.look_around()?;
            let listed = match listed {
                Ok(listed) => listed,
                Err(err) => {
                    self.note(format!("cannot list all of {path}: {err}"));
                    break;
                }
            };
            let name = listed.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let Ok(child) = path.join(name) else { continue };
            if child.as_bytes().len() > MAX_PATH {
                self.note(format!("{path} holds paths of more than {MAX_PATH} bytes"));
                continue;
            }
            // An entry that vanishes between listing and looking is no error.
            match file::stat_at(directory, listed.file_name()) {
                Ok(stat) if stat.file_type == FileType::Directory => {
                    if depth >= MAX_DEPTH {
                        self.note(format!("{child} is more than {MAX_DEPTH} directories deep"));
                        continue;
                    }
                    match file::open_directory_beneath(directory, name) {
                        Ok(fd) => self.directory(layers, &fd, &child, depth + 1)?,
                        Err(err) if is_gone(&err) => (),
                        Err(err) => self.note(format!("cannot open {child}: {err}")),
                    }
                }
                Ok(stat) => self.entry(layers, directory, child, stat, holds_file_whiteouts)?,
                Err(err) if is_gone(&err) => (),
                Err(err) => self.note(format!("cannot look at {child}: {err}")),
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        layers: &Layers,
        directory: &OwnedFd,
        path: RootfsPath,
        stat: Stat,
        holds_file_whiteouts: bool,
    ) -> Result<(), Interrupted> {
        if let Some(cached) = self.known.remove(&path)
            && cached.stat == stat
        {
            return self.present(path, cached, true);
        }
        let is_stable = is_stable(&stat);
        let found =
            entry(self.shared, self.watched, layers, directory, &path, stat, holds_file_whiteouts);
        match found {
            Ok(Found::Entry { stat, state, lower }) => {
                self.present(path, Cached { stat, state, lower }, is_stable)
            }
            Ok(Found::Whiteout) => self.push(Fact::Absent { path }),
            Ok(Found::Directory) => Ok(()),
            Err(err) if is_gone(&err) => Ok(()),
            Err(err) => {
                self.note(format!("cannot read {path}: {err}"));
                let state = state::unopened(&stat);
                self.present(path, Cached { stat, state, lower: None }, false)
            }
        }
    }

    fn present(
        &mut self,
        path: RootfsPath,
        cached: Cached,
        is_stable: bool,
    ) -> Result<(), Interrupted> {
        let writer = self.writers.remove(&path);
        let Cached { stat, state, lower } = cached;
        // What could not be read is tried again next time.
        let is_known = state.content != Content::Unhashed(Unhashed::Unreadable);
        if is_known && is_stable && self.seen.len() < MAX_CACHED {
            self.seen.insert(path.clone(), Cached { stat, state: state.clone(), lower });
        }
        self.push(Fact::Present { path, state, lower, writer })
    }

    /// What an opaque directory hides of the layers below it.
    fn hidden(
        &mut self,
        layers: &Layers,
        directory: &OwnedFd,
        path: &RootfsPath,
    ) -> Result<(), Interrupted> {
        match lower::names_in(layers, path) {
            LowerNames::NotADirectory => self.push(Fact::Absent { path: path.clone() }),
            LowerNames::Names(names) => {
                for name in names {
                    self.look_around()?;
                    let is_in_upper = match file::stat_at(directory, name.as_slice()) {
                        // A whiteout is reported when the walk comes to it.
                        Ok(_) => true,
                        Err(err) => !is_gone(&err),
                    };
                    if is_in_upper {
                        continue;
                    }
                    if let Ok(path) = path.join(&name) {
                        self.push(Fact::Absent { path })?;
                    }
                }
                Ok(())
            }
        }
    }

    fn push(&mut self, fact: Fact) -> Result<(), Interrupted> {
        self.batch.push(Observation {
            container: self.watched.container.clone(),
            at: Timestamp::now(),
            source: Source::Scan,
            fact,
        });
        if self.batch.len() >= BATCH { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), Interrupted> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let report = Report::ScanBatch {
            container: self.watched.container.clone(),
            ticket: self.ticket,
            observations: std::mem::take(&mut self.batch),
        };
        if self.shared.report_patiently(report) { Ok(()) } else { Err(Interrupted) }
    }

    /// A long walk must not keep settled files, or the end, waiting.
    fn look_around(&mut self) -> Result<(), Interrupted> {
        self.since_look += 1;
        if self.since_look >= 64 {
            self.since_look = 0;
            if self.shared.is_stopping() {
                return Err(Interrupted);
            }
            settle(self.shared);
        }
        Ok(())
    }
}

fn is_gone(err: &io::Error) -> bool {
    err.raw_os_error() == Some(libc::ENOENT)
}

/// Whether a hash made now stays true for as long as the file looks the same.
fn is_stable(stat: &Stat) -> bool {
    let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) else { return false };
    let Ok(changed) = u64::try_from(stat.changed.seconds) else { return true };
    now.as_secs() >= changed.saturating_add(STABLE_AFTER.as_secs())
}
