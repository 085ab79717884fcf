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
use super::names::Deaf;
use super::shared::{DirtyPath, Shared};
use super::state::{self, Hashing};
use super::table::{Layers, Watched};
use super::ways;
use crate::health::Failure;
use crate::model::file::{SETGID, SETUID};
use crate::model::{
    ContainerId, Content, Fact, FileState, FileType, LowerTwin, Observation, Process, RootfsPath,
    Source, Unhashed,
};
use crate::sys::clock;
use crate::sys::file::{self, Stat};
use crate::sys::overlay::{self, Opacity};
use crate::threads;

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
        let mut times_set = clock::times_set();
        while !self.shared.is_stopping() {
            if times_set != clock::times_set() {
                times_set = clock::times_set();
                tracing::warn!(
                    "the machine's clock was set: programs of running containers are judged by \
                     their content alone"
                );
            }
            while let Some(order) = threads::try_next(&self.orders) {
                if self.shared.is_stopping() {
                    return;
                }
                match order {
                    Order::Scan { watched, ticket } => self.walk(&watched, ticket, false),
                    Order::Last { watched } => {
                        self.walk(&watched, None, true);
                        self.memories.remove(&watched.container);
                        self.shared.forget(&watched);
                    }
                }
            }
            while settle(&self.shared) && self.orders.is_empty() {}
            let due = self.due_walks();
            for watched in due {
                self.walk(&watched, None, false);
                if !self.orders.is_empty() || self.shared.is_stopping() {
                    break;
                }
            }
            let idle = self.idle_time();
            match threads::idle(|| self.wake.recv_timeout(idle)) {
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
        // Nobody wakes this thread for a path that is to settle first.
        let tick = self.shared.settings.settle.min(Duration::from_millis(250));
        let next = self.memories.values().map(|memory| memory.next_sweep.max(memory.may_walk_from));
        next.chain(self.shared.next_due())
            .min()
            .map_or(tick, |due| due.saturating_duration_since(now).min(tick))
            .max(Duration::from_millis(5))
    }

    fn walk(&mut self, watched: &Arc<Watched>, ticket: Option<u64>, is_last: bool) {
        // Told before the walk, so that the walk makes up for them.
        self.shared.report_losses();
        threads::about(&watched.container);
        // Before the walk, so that what is lost during it asks for another; and before
        // its time is taken, so that it never claims to make up for that.
        let is_lossy = watched.take_rescan();
        let began = Timestamp::now();
        self.shared.names.begin_walk(watched);
        watched.ways.begin_walk();
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
                .filter_map(|(path, dirty)| {
                    Some((path, self.shared.process_of(watched, dirty.writer?)?))
                })
                .collect()
        } else {
            HashMap::new()
        };
        let mut walk = Walk {
            shared: &self.shared,
            watched,
            ticket,
            extent: if is_last { Extent::Last } else { Extent::All },
            leaves_settling: ticket.is_none() && !is_lossy,
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
        if is_complete {
            watched.ways.end_walk();
            if self.shared.names.end_walk(watched) {
                self.shared.restore(Failure::NamesFull, Some(watched));
                self.shared.restore(Failure::MarkRefused, Some(watched));
            }
        }
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
                let detail = format!("a walk of its upper layer is incomplete: {problem}");
                self.shared.degrade(Failure::ScanIncomplete, Some(watched), &detail);
            }
        }
        let scanned = Report::Scanned {
            container: watched.container.clone(),
            ticket,
            began,
            complete: is_complete,
        };
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

/// Looks at paths that have settled, some of each container; false if there are
/// none.
fn settle(shared: &Shared) -> bool {
    let mut place: Option<Place> = None;
    let settled = shared.take_settled(Instant::now());
    let is_busy = !settled.is_empty();
    // Walked behind everything that is told by itself, so that nothing is told twice.
    let mut directories = Vec::new();
    for (path, dirty) in settled {
        if shared.is_stopping() {
            return false;
        }
        let DirtyPath { watched, writer, source, .. } = dirty;
        threads::about(&watched.container);
        let writer = writer.and_then(|writer| shared.process_of(&watched, writer));
        let Some(layers) = watched.layers() else { continue };
        let parent = path.parent().unwrap_or_else(RootfsPath::root);
        // Neighbours follow each other.
        let found = match place.take().filter(|place| place.is(&watched, &parent)) {
            Some(place) => Ok(place),
            None => Place::open(&watched, layers, parent),
        };
        let found = found.and_then(|found| place.insert(found).look(shared, layers, &path));
        let in_image = place.as_ref().is_none_or(|place| place.in_image);
        let tell = |fact| shared.observe_patiently(&watched, Timestamp::now(), source, fact);
        match found {
            Ok(Some(Found::Entry { stat, state, lower })) => {
                if stat.file_type != FileType::Symlink {
                    watched.ways.forget(&path);
                }
                if matters(shared, &watched, &path, &state, lower.as_ref()) {
                    let writer = writer.or_else(|| shared.last_writer(&watched, &stat));
                    tell(Fact::Present { path, state, lower, writer });
                }
            }
            // Whether the container or its owner removed it cannot be told.
            Ok(Some(Found::Whiteout) | None) if watched.is_detaching() => (),
            Ok(Some(Found::Whiteout)) => {
                watched.ways.forget(&path);
                tell(Fact::Absent { path, writer });
            }
            // The image's own file shows through: executed before it was known
            // which files are the image's.
            Ok(None) if in_image && lower::holds(layers, &path) => (),
            Ok(None) => {
                watched.ways.forget(&path);
                tell(Fact::Absent { path, writer });
            }
            Ok(Some(Found::Directory)) => {
                watched.ways.forget(&path);
                directories.push((watched.clone(), path));
            }
            Err(_) if watched.is_detaching() || shared.is_stopping() => (),
            Err(err) => {
                let detail = format!("the changed file {path} cannot be looked at: {err}");
                shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            }
        }
    }
    for (watched, path) in directories {
        if let Some(layers) = watched.layers() {
            walk_below(shared, &watched, layers, &path);
        }
    }
    is_busy
}

/// Whether something in an upper layer can be more than data. What a walk was
/// ordered for is told whole; what changes all the time is not.
fn matters(
    shared: &Shared,
    watched: &Watched,
    path: &RootfsPath,
    state: &FileState,
    lower: Option<&LowerTwin>,
) -> bool {
    lower.is_some()
        || state.capability.is_some()
        || state.mode & (SETUID | SETGID) != 0
        || !matches!(state.content, Content::Unhashed(Unhashed::NotAProgram | Unhashed::NotRegular))
        || shared.is_sensitive(watched, path)
}

/// A directory that is new or was moved: listens to everything below it, and tells
/// what it holds.
fn walk_below(shared: &Shared, watched: &Arc<Watched>, layers: &Layers, path: &RootfsPath) {
    let mut walk = Walk {
        shared,
        watched,
        ticket: None,
        extent: Extent::Below,
        leaves_settling: true,
        writers: HashMap::new(),
        known: Cache::new(),
        seen: Cache::new(),
        batch: Vec::new(),
        problem: None,
        since_look: 0,
    };
    if walk.below(layers, path).is_err() && !shared.is_stopping() {
        shared.lose(
            Failure::PipelineFull,
            Some(watched),
            "the pipeline had no room for a new directory's files for half a minute",
        );
    }
    // What could not be walked now is walked when all is.
    if walk.problem.is_some() {
        shared.mark_for_sweep(watched);
    }
}

#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
enum Found {
    Directory,
    Whiteout,
    Entry { stat: Stat, state: FileState, lower: Option<LowerTwin> },
}

/// A directory of an upper layer, in which names are looked at.
struct Place {
    watched: Arc<Watched>,
    path: RootfsPath,
    /// `None` if there is no such directory.
    open: Option<OpenPlace>,
    /// Whether the image has this directory too.
    in_image: bool,
}

struct OpenPlace {
    directory: OwnedFd,
    holds_file_whiteouts: bool,
    in_image: bool,
}

impl Place {
    fn open(watched: &Arc<Watched>, layers: &Layers, path: RootfsPath) -> io::Result<Place> {
        let gone = |err: &io::Error| {
            // A directory of the way was replaced: what the path named is not there.
            matches!(err.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP))
        };
        // Not part of the question: without the upperdir nothing is known of the path.
        let upper = file::open_directory(&layers.dirs.upperdir)?;
        let in_image = lower::holds(layers, &path);
        let open = match file::open_directory_beneath(&upper, path.relative()) {
            Ok(directory) => {
                let holds_file_whiteouts = overlay::opacity(&directory, layers.userxattr)
                    .is_ok_and(|opacity| opacity == Opacity::HoldsFileWhiteouts);
                Some(OpenPlace { directory, holds_file_whiteouts, in_image })
            }
            Err(err) if gone(&err) => None,
            Err(err) => return Err(err),
        };
        Ok(Place { watched: watched.clone(), path, open, in_image })
    }

    fn is(&self, watched: &Arc<Watched>, path: &RootfsPath) -> bool {
        Arc::ptr_eq(&self.watched, watched) && self.path == *path
    }

    /// What is under the last name of `path`; `None` if nothing.
    fn look(
        &self,
        shared: &Shared,
        layers: &Layers,
        path: &RootfsPath,
    ) -> io::Result<Option<Found>> {
        let Some(open) = &self.open else { return Ok(None) };
        let found = file::stat_at(&open.directory, path.file_name())
            .and_then(|stat| entry(shared, &self.watched, layers, open, path, stat));
        match found {
            Ok(found) => Ok(Some(found)),
            Err(err) if is_gone(&err) || err.raw_os_error() == Some(libc::ELOOP) => Ok(None),
            Err(err) => Err(err),
        }
    }
}

/// What a directory of the upper layer holds under the last name of `path`.
fn entry(
    shared: &Shared,
    watched: &Watched,
    layers: &Layers,
    place: &OpenPlace,
    path: &RootfsPath,
    stat: Stat,
) -> io::Result<Found> {
    if stat.is_whiteout_device() {
        return Ok(Found::Whiteout);
    }
    let OpenPlace { directory, holds_file_whiteouts, in_image } = place;
    let is_sensitive = shared.is_sensitive(watched, path);
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let below = |is_program| {
        let twins = in_image.then_some(&shared.lower_twins)?;
        twins.find(layers, path, is_program, max_hash_bytes)
    };
    match stat.file_type {
        FileType::Directory => return Ok(Found::Directory),
        FileType::Regular => (),
        FileType::Symlink if is_sensitive || shared.leads_to_sensitive(watched, path) => {
            let target = rustix::fs::readlinkat(directory, path.file_name(), Vec::new())?;
            ways::note_link(shared, watched, path, target.as_bytes());
            let state = state::of_link(&stat, target.as_bytes());
            return Ok(Found::Entry { stat, state, lower: below(false) });
        }
        // Where the image has a program, it matters that this is none.
        FileType::Symlink
        | FileType::CharDevice
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket => {
            return Ok(Found::Entry { stat, state: state::unopened(&stat), lower: below(false) });
        }
    }
    let (fd, stat) = file::open_file_beneath(directory, path.file_name())?;
    if !stat.is_regular() {
        // Exchanged since we looked; the next look will see what it is by then.
        return Ok(Found::Entry { stat, state: state::unopened(&stat), lower: None });
    }
    let user = layers.userxattr;
    if *holds_file_whiteouts && stat.size == 0 && overlay::is_file_whiteout(&fd, user)? {
        return Ok(Found::Whiteout);
    }
    let hashing = if is_sensitive { Hashing::Always } else { Hashing::Programs };
    // A large file is not what a stop waits for.
    let state_of = |file: &OwnedFd| {
        let is_wanted = || !shared.is_stopping();
        state::while_wanted(file.as_fd(), &stat, hashing, max_hash_bytes, &is_wanted)
            .ok_or(io::ErrorKind::Interrupted)
    };
    let state = if overlay::is_metacopy(&fd, user)? {
        // The content is in a layer below. The merged view knows where; once the
        // container has ended there is none.
        let merged = open_merged(watched, path).ok().and_then(|content| {
            // Open, it keeps the container's mount busy.
            let is_wanted = || !watched.is_detaching() && !shared.is_stopping();
            state::while_wanted(content.as_fd(), &stat, hashing, max_hash_bytes, &is_wanted)
        });
        let state = match merged {
            Some(state) => Some(state),
            None => open_below(layers, path, &fd).map(|content| state_of(&content)).transpose()?,
        };
        match state {
            Some(state) => {
                // The attributes are the upper file's.
                let capability = file::xattr(&fd, "security.capability").unwrap_or(None);
                FileState { capability, ..state }
            }
            None => state::unopened(&stat),
        }
    } else {
        state_of(&fd)?
    };
    let is_program = lower::looks_like_program(state.format, state.mode) || is_sensitive;
    Ok(Found::Entry { stat, state, lower: below(is_program) })
}

/// Opens the content of a metadata-only copy where the layers have it.
fn open_below(layers: &Layers, path: &RootfsPath, upper: &OwnedFd) -> Option<OwnedFd> {
    let redirect = overlay::redirect(upper, layers.userxattr).ok()?;
    let path = match redirect.as_deref() {
        None => path.clone(),
        Some(absolute) if absolute.starts_with(b"/") => RootfsPath::new(absolute).ok()?,
        Some(name) => path.parent()?.join(name).ok()?,
    };
    lower::open(layers, &path)
}

/// Opens a file as the container sees it. The descriptor is on the container's
/// mount and must not be kept.
fn open_merged(watched: &Watched, path: &RootfsPath) -> io::Result<OwnedFd> {
    let handle = crate::sys::procfs::Handle::open_exactly(watched.init)?;
    let root = handle.open_root()?;
    if file::stat(&root)?.device != watched.device {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (fd, stat) = file::open_file_beneath(&root, path.relative())?;
    if stat.is_regular() { Ok(fd) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// How much of an upperdir is walked, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    All,
    /// The container has ended.
    Last,
    /// One directory with everything below it.
    Below,
}

/// One walk of one upperdir.
struct Walk<'a> {
    shared: &'a Shared,
    watched: &'a Arc<Watched>,
    ticket: Option<u64>,
    extent: Extent,
    /// Files that have not settled are left to who looks at them then.
    leaves_settling: bool,
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
            Ok(upper) => self.directory(layers, upper, &RootfsPath::root(), 0, true)?,
            Err(err) => self.note(format!(
                "cannot open the upperdir {}: {err}",
                layers.dirs.upperdir.display()
            )),
        }
        self.flush()
    }

    /// Walks one directory.
    fn below(&mut self, layers: &Layers, path: &RootfsPath) -> Result<(), Interrupted> {
        let opened = file::open_directory(&layers.dirs.upperdir)
            .and_then(|upper| file::open_directory_beneath(&upper, path.relative()));
        match opened {
            Ok(directory) => {
                let depth = path.as_bytes().iter().filter(|&&byte| byte == b'/').count();
                let in_image = lower::holds(layers, path);
                self.directory(layers, directory, path, depth, in_image)?;
            }
            // Gone again, which is told too.
            Err(err) => self.note(format!("cannot open {path}: {err}")),
        }
        self.flush()
    }

    /// Listens to a directory before it is listed, or no more.
    fn listen(&mut self, path: &RootfsPath, directory: &OwnedFd) {
        let names = &self.shared.names;
        if self.extent == Extent::Last {
            names.unlisten(directory, &self.shared.attachments);
            self.shared.closings.unlisten(directory);
            return;
        }
        self.shared.closings.listen(directory);
        let (failure, why) = match names.listen(self.watched, path, directory) {
            Ok(()) | Err(Deaf::Missing | Deaf::Full(false) | Deaf::Refused(_, false)) => return,
            Err(Deaf::Full(true)) => {
                (Failure::NamesFull, "its upper layer has too many directories".to_owned())
            }
            Err(Deaf::Refused(err, true)) => (Failure::MarkRefused, format!("{path}: {err}")),
        };
        let detail = format!("not every directory can be listened to, sweeps do the rest: {why}");
        self.shared.degrade(failure, Some(self.watched), &detail);
    }

    fn note(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }

    /// Walks an open directory, depth first. One descriptor per level is open.
    fn directory(
        &mut self,
        layers: &Layers,
        directory: OwnedFd,
        path: &RootfsPath,
        depth: usize,
        in_image: bool,
    ) -> Result<(), Interrupted> {
        self.listen(path, &directory);
        let opacity = overlay::opacity(&directory, layers.userxattr).unwrap_or_else(|err| {
            self.note(format!("cannot tell what {path} hides: {err}"));
            Opacity::Transparent
        });
        if opacity == Opacity::Opaque {
            self.hidden(layers, &directory, path)?;
        }
        let entries = match Dir::read_from(&directory) {
            Ok(entries) => entries,
            Err(err) => {
                self.note(format!("cannot list {path}: {err}"));
                return Ok(());
            }
        };
        let holds_file_whiteouts = opacity == Opacity::HoldsFileWhiteouts;
        let place = OpenPlace { directory, holds_file_whiteouts, in_image };
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
            match file::stat_at(&place.directory, listed.file_name()) {
                Ok(stat) if stat.file_type == FileType::Directory => {
                    if depth >= MAX_DEPTH {
                        self.note(format!("{child} is more than {MAX_DEPTH} directories deep"));
                        continue;
                    }
                    match file::open_directory_beneath(&place.directory, name) {
                        Ok(fd) => {
                            let in_image = place.in_image && lower::holds(layers, &child);
                            self.directory(layers, fd, &child, depth + 1, in_image)?;
                        }
                        Err(err) if is_gone(&err) => (),
                        Err(err) => self.note(format!("cannot open {child}: {err}")),
                    }
                }
                Ok(stat) => {
                    if stat.is_regular() && layers.note_birth(&stat) {
                        let detail = format!("{child} looks older than the layer that holds it");
                        self.shared.lose(Failure::ClockSet, Some(self.watched), &detail);
                    }
                    self.entry(layers, &place, child, stat)?;
                }
                Err(err) if is_gone(&err) => (),
                Err(err) => self.note(format!("cannot look at {child}: {err}")),
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        layers: &Layers,
        place: &OpenPlace,
        path: RootfsPath,
        stat: Stat,
    ) -> Result<(), Interrupted> {
        if self.leaves_settling {
            // It is looked at when it has settled, and told with who wrote it.
            if self.shared.is_dirty(&self.watched.container, &path) {
                return Ok(());
            }
            // Its event may still be on its way. Where its change lies ahead, no waiting
            // would make it older.
            let is_young = stat.age().is_some_and(|age| age < self.shared.settings.settle);
            if self.extent != Extent::Last && is_young {
                self.shared.mark_dirty(self.watched, path, Source::Scan, None);
                return Ok(());
            }
        }
        let is_whole = |cached: &Cached| {
            // What starts the container is known later than what lies in it.
            // A link is looked at each time: where it leads is not remembered with it.
            match cached.state.file_type {
                FileType::Symlink => {
                    !self.shared.leads_to_sensitive(self.watched, &path)
                        && !self.shared.is_sensitive(self.watched, &path)
                }
                _ => {
                    cached.state.content != Content::Unhashed(Unhashed::NotAProgram)
                        || !self.shared.is_sensitive(self.watched, &path)
                }
            }
        };
        if let Some(cached) = self.known.remove(&path)
            && cached.stat == stat
            && is_whole(&cached)
        {
            return self.present(path, cached, true);
        }
        let is_stable = is_stable(&stat);
        match entry(self.shared, self.watched, layers, place, &path, stat) {
            Ok(Found::Entry { stat, state, lower }) => {
                self.present(path, Cached { stat, state, lower }, is_stable)
            }
            Ok(Found::Whiteout) => self.absent(path),
            Ok(Found::Directory) => Ok(()),
            Err(_) if self.shared.is_stopping() => Err(Interrupted),
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
        let Cached { state, lower, .. } = &cached;
        if self.extent == Extent::Below
            && !matters(self.shared, self.watched, &path, state, lower.as_ref())
        {
            return Ok(());
        }
        let writer = self.writer(&path);
        let writer = writer.or_else(|| self.shared.last_writer(self.watched, &cached.stat));
        let Cached { stat, state, lower } = cached;
        // What could not be read is tried again next time.
        let is_known = state.content != Content::Unhashed(Unhashed::Unreadable);
        if is_known && is_stable && self.seen.len() < MAX_CACHED {
            self.seen.insert(path.clone(), Cached { stat, state: state.clone(), lower });
        }
        self.push(Fact::Present { path, state, lower, writer })
    }

    fn absent(&mut self, path: RootfsPath) -> Result<(), Interrupted> {
        let writer = self.writer(&path);
        self.push(Fact::Absent { path, writer })
    }

    /// Who changed a path that has not settled yet: what is found here is told, and
    /// would be told without its writer.
    fn writer(&mut self, path: &RootfsPath) -> Option<Arc<Process>> {
        let known = self.writers.remove(path);
        known.or_else(|| self.shared.writer_of(self.watched, path))
    }

    /// What an opaque directory hides of the layers below it.
    fn hidden(
        &mut self,
        layers: &Layers,
        directory: &OwnedFd,
        path: &RootfsPath,
    ) -> Result<(), Interrupted> {
        match lower::names_in(layers, path) {
            LowerNames::NotADirectory => self.absent(path.clone()),
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
                        self.absent(path)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn push(&mut self, fact: Fact) -> Result<(), Interrupted> {
        let observation =
            self.shared.observation(self.watched, Timestamp::now(), Source::Scan, fact);
        self.batch.push(observation);
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
        threads::beat();
        self.since_look += 1;
        if self.since_look >= 64 {
            self.since_look = 0;
            if self.shared.is_stopping() {
                return Err(Interrupted);
            }
            // A new directory is walked by who looks at what has settled.
            if self.extent != Extent::Below {
                settle(self.shared);
            }
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
