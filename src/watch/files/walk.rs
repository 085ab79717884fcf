//! One recursive walk of an upper layer: a value that waits between its slices.
//!
//! It marks each directory before it lists it (`names`, `closings`), reads files with `entry`,
//! and sends observations in batches. Files that have not settled are left to `settle`. It
//! does not decide when a walk begins or how fast it goes on: that is `scan`.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use rustix::fs::Dir;

use super::entry::{self, EntryReading, Examined, Found, OpenPlace, Slice};
use super::lower::{self, LowerNames};
use super::names::Deaf;
use super::shared::Files;
use super::state;
use crate::health::Failure;
use crate::model::file::{SETGID, SETUID};
use crate::model::{
    Content, Fact, FileFact, FileState, FileType, LowerTwin, Observation, Process, RootfsPath,
    Source, Unhashed,
};
use crate::sys::file::{self, Stat};
use crate::sys::overlay::{self, Opacity};
use crate::threads;
use crate::watch::core::layers::Layers;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::watched::Watched;

pub(crate) const MAX_DEPTH: usize = 256;

pub(crate) const MAX_PATH: usize = 4096;

pub(crate) const BATCH: usize = 512;

/// The most entries of one upperdir that are remembered between walks.
pub(crate) const MAX_CACHED: usize = 64 * 1024;

/// A file is hashed again in each walk until its ctime was this old when it was hashed. A store
/// through a shared mapping changes the content but not the ctime until the kernel has written
/// the page back, half a minute later.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);

/// What a walk found at a path, and the metadata by which it is recognised.
#[derive(Clone)]
pub(crate) struct Cached {
    pub(crate) stat: Stat,
    pub(crate) state: FileState,
    pub(crate) lower: Option<LowerTwin>,
}

pub(crate) type Cache = HashMap<RootfsPath, Cached>;

/// How much of an upperdir is walked, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    All,
    /// The container has ended.
    Last,
    /// One directory with everything below it.
    Below,
    /// The container does not run: no directory is marked, and no writer is known.
    Stopped,
}

/// One walk of one upperdir, depth first. It can be put aside at any time.
pub(crate) struct Walk {
    pub(crate) watched: Arc<Watched>,
    pub(crate) ticket: Option<u64>,
    pub(crate) extent: Extent,
    /// Requested, after a loss, or for a new directory: not bound to the pace of periodic scans.
    pub(crate) is_urgent: bool,
    /// Files that have not settled are left to `settle`.
    pub(crate) leaves_settling: bool,
    pub(crate) writers: HashMap<RootfsPath, Arc<Process>>,
    /// From the last walk, and for the next one.
    pub(crate) known: Cache,
    pub(crate) seen: Cache,
    pub(crate) batch: Vec<Observation>,
    /// The first reason why the walk is incomplete.
    pub(crate) problem: Option<String>,
    pub(crate) began: Timestamp,
    /// The processor time that it has used.
    pub(crate) cost: Duration,
    /// The directories from its start to the current one, with one open descriptor each.
    pub(crate) directories: Vec<Directory>,
    pub(crate) reading: Option<WalkedFile>,
}

/// A directory that is being walked.
pub(crate) struct Directory {
    pub(crate) entries: Dir,
    pub(crate) path: RootfsPath,
    pub(crate) depth: usize,
    pub(crate) holds_file_whiteouts: bool,
    pub(crate) in_image: bool,
    /// The names in the layers below that it hides, if it is opaque.
    pub(crate) hidden: std::vec::IntoIter<Vec<u8>>,
}

/// A file that a walk has reached and is reading.
pub(crate) struct WalkedFile {
    pub(crate) path: RootfsPath,
    pub(crate) is_stable: bool,
    pub(crate) reading: Box<EntryReading>,
}

/// The thread is to end, or the pipeline accepts no more.
pub(crate) struct Interrupted;

impl Walk {
    pub(crate) fn new(watched: &Arc<Watched>, extent: Extent, is_urgent: bool) -> Walk {
        Walk {
            watched: watched.clone(),
            ticket: None,
            extent,
            is_urgent,
            leaves_settling: true,
            writers: HashMap::new(),
            known: Cache::new(),
            seen: Cache::new(),
            batch: Vec::new(),
            problem: None,
            began: Timestamp::now(),
            cost: Duration::ZERO,
            directories: Vec::new(),
            reading: None,
        }
    }

    /// A walk of a directory that is new or was moved: listens to all directories below it and
    /// reports what they hold.
    pub(crate) fn below(shared: &Files, watched: &Arc<Watched>, path: &RootfsPath) -> Option<Walk> {
        let layers = watched.layers()?;
        let mut walk = Walk::new(watched, Extent::Below, true);
        let opened = file::open_directory(&layers.dirs.upperdir)
            .and_then(|upper| file::open_directory_beneath(&upper, path.relative()));
        match opened {
            Ok(directory) => {
                let depth = path.as_bytes().iter().filter(|&&byte| byte == b'/').count();
                let in_image = lower::holds(layers, path);
                walk.enter(shared, layers, directory, path.clone(), depth, in_image);
            }
            // If it is gone again, an event reports that too.
            Err(err) => walk.note(format!("cannot open {path}: {err}")),
        }
        Some(walk)
    }

    pub(crate) fn stopped(shared: &Files, watched: &Arc<Watched>, ticket: u64) -> Walk {
        threads::about(&watched.container);
        let mut walk = Walk::new(watched, Extent::Stopped, true);
        walk.ticket = Some(ticket);
        walk.leaves_settling = false;
        walk.open_root(shared);
        walk
    }

    pub(crate) fn open_root(&mut self, shared: &Files) {
        let watched = self.watched.clone();
        let Some(layers) = watched.layers() else {
            return self.note("the upperdir is not known".into());
        };
        match file::open_directory(&layers.dirs.upperdir) {
            Ok(upper) => self.enter(shared, layers, upper, RootfsPath::root(), 0, true),
            Err(err) => self.note(format!(
                "cannot open the upperdir {}: {err}",
                layers.dirs.upperdir.display()
            )),
        }
    }

    /// How many directories it holds open.
    pub(crate) fn open(&self) -> usize {
        self.directories.len()
    }

    /// Starts to listen to a directory before it is listed, or stops in the last walk.
    pub(crate) fn listen(&mut self, shared: &Files, path: &RootfsPath, directory: &OwnedFd) {
        let names = &shared.names;
        if self.extent == Extent::Stopped {
            return;
        }
        if self.extent == Extent::Last {
            names.unlisten(directory, &shared.inputs);
            shared.closings.unlisten(directory);
            return;
        }
        shared.closings.listen(directory);
        let (failure, why) = match names.listen(&self.watched, path, directory) {
            Ok(()) | Err(Deaf::Missing | Deaf::Full(false) | Deaf::Refused(_, false)) => return,
            Err(Deaf::Full(true)) => {
                (Failure::NamesFull, "its upper layer has too many directories".to_owned())
            }
            Err(Deaf::Refused(err, true)) => (Failure::MarkRefused, format!("{path}: {err}")),
        };
        let detail =
            format!("only scans find changes in some directories, which cannot be marked: {why}");
        shared.degrade(failure, Some(&self.watched), &detail);
    }

    pub(crate) fn note(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }

    /// Continues the walk in a directory.
    pub(crate) fn enter(
        &mut self,
        shared: &Files,
        layers: &Layers,
        directory: OwnedFd,
        path: RootfsPath,
        depth: usize,
        in_image: bool,
    ) {
        self.listen(shared, &path, &directory);
        let opacity = overlay::opacity(&directory, layers.userxattr).unwrap_or_else(|err| {
            self.note(format!("cannot find out what {path} hides: {err}"));
            Opacity::Transparent
        });
        let mut hidden = Vec::new();
        if opacity == Opacity::Opaque {
            match lower::names_in(layers, &path) {
                LowerNames::NotADirectory => self.absent(shared, path.clone()),
                LowerNames::Names(names) => hidden = names.into_iter().collect(),
            }
        }
        match Dir::new(directory) {
            Ok(entries) => self.directories.push(Directory {
                entries,
                path,
                depth,
                holds_file_whiteouts: opacity == Opacity::HoldsFileWhiteouts,
                in_image,
                hidden: hidden.into_iter(),
            }),
            Err(err) => self.note(format!("cannot list {path}: {err}")),
        }
    }

    /// Continues for a slice. Returns true when the walk is done.
    pub(crate) fn step(&mut self, shared: &Files, slice: &mut Slice) -> Result<bool, Interrupted> {
        let watched = self.watched.clone();
        let Some(layers) = watched.layers() else { return Ok(true) };
        while !slice.is_over() {
            if shared.is_stopping() {
                return Err(Interrupted);
            }
            if self.batch.len() >= BATCH {
                self.flush(shared)?;
            }
            if let Some(WalkedFile { path, is_stable, mut reading }) = self.reading.take() {
                match reading.step(shared, slice) {
                    None => self.reading = Some(WalkedFile { path, is_stable, reading }),
                    Some(found) => self.found(shared, path, found, is_stable),
                }
                continue;
            }
            let Some(directory) = self.directories.last_mut() else {
                self.flush(shared)?;
                return Ok(true);
            };
            if let Some(name) = directory.hidden.next() {
                let path = directory.hides(&name);
                if let Some(path) = path {
                    self.absent(shared, path);
                }
                continue;
            }
            match directory.entries.next() {
                None => drop(self.directories.pop()),
                Some(Ok(listed)) => self.listed(shared, layers, listed.file_name()),
                Some(Err(err)) => {
                    let problem = format!("cannot list all of {}: {err}", directory.path);
                    self.note(problem);
                    self.directories.pop();
                }
            }
        }
        Ok(false)
    }

    /// Handles one name in the directory that the walk is in.
    pub(crate) fn listed(&mut self, shared: &Files, layers: &Layers, name: &CStr) {
        let Some(directory) = self.directories.last() else { return };
        if matches!(name.to_bytes(), b"." | b"..") {
            return;
        }
        let Ok(child) = directory.path.join(name.to_bytes()) else { return };
        let (depth, in_image) = (directory.depth, directory.in_image);
        if child.as_bytes().len() > MAX_PATH {
            let problem = format!("{} holds paths of more than {MAX_PATH} bytes", directory.path);
            return self.note(problem);
        }
        let opened = directory.open();
        // An entry that vanishes after it was listed is not an error.
        match opened.and_then(|place| Ok((place, file::stat_at(place.directory, name)?))) {
            Ok((place, stat)) if stat.file_type == FileType::Directory => {
                if depth >= MAX_DEPTH {
                    return self.note(format!("{child} is more than {MAX_DEPTH} directories deep"));
                }
                match file::open_directory_beneath(place.directory, name.to_bytes()) {
                    Ok(fd) => {
                        let in_image = in_image && lower::holds(layers, &child);
                        self.enter(shared, layers, fd, child, depth + 1, in_image);
                    }
                    Err(err) if entry::is_gone(&err) => (),
                    Err(err) => self.note(format!("cannot open {child}: {err}")),
                }
            }
            Ok((place, stat)) => {
                let is_watched = self.extent != Extent::Stopped;
                if is_watched && stat.is_regular() && layers.note_birth(&stat) {
                    let detail = format!("{child} looks older than the layer that holds it");
                    shared.lose(Failure::ClockSet, Some(&self.watched), &detail);
                    shared.forget_unchanged(&self.watched);
                }
                if is_watched {
                    shared.guards.found(&self.watched, place.directory, name.to_bytes(), &stat);
                }
                self.entry(shared, layers, child, stat);
            }
            Err(err) if entry::is_gone(&err) => (),
            Err(err) => self.note(format!("cannot examine {child}: {err}")),
        }
    }

    pub(crate) fn entry(&mut self, shared: &Files, layers: &Layers, path: RootfsPath, stat: Stat) {
        if self.leaves_settling {
            // It is examined when it has settled, and reported with its writer.
            if shared.dirty.is_dirty(&self.watched.container, &path) {
                return;
            }
            // Its event may still be on its way. A file whose change lies in the future has no
            // age, since waiting would not make it older.
            let is_young = stat.age().is_some_and(|age| age < shared.settings.settle);
            if self.extent != Extent::Last && is_young {
                return shared.mark_dirty(&self.watched, path, Source::Scan, None);
            }
        }
        let is_whole = |cached: &Cached| {
            // Whether a path is sensitive may become known after it was cached, with the process
            // that starts the container. A link is read each time: its target is not cached.
            match cached.state.file_type {
                FileType::Symlink => {
                    !shared.leads_to_sensitive(&self.watched, &path)
                        && !shared.is_sensitive(&self.watched, &path)
                }
                // A requested comparison must know whether a data file differs.
                _ => {
                    cached.state.content != Content::Unhashed(Unhashed::NotAProgram)
                        || self.ticket.is_none() && !shared.is_sensitive(&self.watched, &path)
                }
            }
        };
        if let Some(cached) = self.known.remove(&path)
            && cached.stat == stat
            && is_whole(&cached)
        {
            return self.present(shared, path, cached, true);
        }
        let is_stable = is_stable(&stat);
        let Some(directory) = self.directories.last() else { return };
        let compares_data = self.ticket.is_some();
        let examined = directory.open().and_then(|place| {
            let place = OpenPlace { compares_data, ..place };
            entry::entry(shared, &self.watched, layers, place, &path, stat)
        });
        match examined {
            Ok(Examined::Reading(reading)) => {
                self.reading = Some(WalkedFile { path, is_stable, reading });
            }
            Ok(Examined::Found(found)) => self.found(shared, path, found, is_stable),
            Err(err) if entry::is_gone(&err) => (),
            Err(err) => {
                self.note(format!("cannot read {path}: {err}"));
                let state = state::unopened(&stat);
                self.present(shared, path, Cached { stat, state, lower: None }, false);
            }
        }
    }

    pub(crate) fn found(
        &mut self,
        shared: &Files,
        path: RootfsPath,
        found: Found,
        is_stable: bool,
    ) {
        match found {
            Found::Entry { stat, state, lower } => {
                self.present(shared, path, Cached { stat, state, lower }, is_stable);
            }
            Found::Whiteout => self.absent(shared, path),
            Found::Directory => (),
        }
    }

    pub(crate) fn present(
        &mut self,
        shared: &Files,
        path: RootfsPath,
        cached: Cached,
        is_stable: bool,
    ) {
        let Cached { state, lower, .. } = &cached;
        if self.extent == Extent::Below
            && !matters(shared, &self.watched, &path, state, lower.as_ref())
        {
            return;
        }
        let writer = self.writer(shared, &path).or_else(|| {
            let is_watched = self.extent != Extent::Stopped;
            is_watched.then(|| shared.writer_of_file(&self.watched, &cached.stat)).flatten()
        });
        let Cached { stat, state, lower } = cached;
        let changed = Some(stat.changed);
        // A file that could not be read is tried again in the next walk.
        let is_known = state.content != Content::Unhashed(Unhashed::Unreadable);
        if is_known && is_stable && self.seen.len() < MAX_CACHED {
            self.seen.insert(path.clone(), Cached { stat, state: state.clone(), lower });
        }
        self.push(shared, Fact::File(FileFact::Present { path, state, lower, writer, changed }));
    }

    pub(crate) fn absent(&mut self, shared: &Files, path: RootfsPath) {
        let writer = self.writer(shared, &path);
        self.push(shared, Fact::File(FileFact::Absent { path, writer }));
    }

    /// The writer of a path that has not settled yet. The walk reports the path first, and would
    /// otherwise report it without its writer.
    pub(crate) fn writer(&mut self, shared: &Files, path: &RootfsPath) -> Option<Arc<Process>> {
        if self.extent == Extent::Stopped {
            return None;
        }
        let known = self.writers.remove(path);
        known.or_else(|| shared.writer_of(&self.watched, path))
    }

    pub(crate) fn push(&mut self, shared: &Files, fact: Fact) {
        let observation = shared.observation(&self.watched, Timestamp::now(), Source::Scan, fact);
        self.batch.push(observation);
    }

    pub(crate) fn flush(&mut self, shared: &Files) -> Result<(), Interrupted> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let observations = std::mem::take(&mut self.batch);
        let report = match (self.extent, self.ticket) {
            (Extent::Stopped, Some(ticket)) => {
                SensorEvent::Compared { ticket, observations, end: None }
            }
            (_, ticket) => {
                let container = self.watched.container.clone();
                SensorEvent::ScanBatch { container, ticket, observations }
            }
        };
        if shared.report_patiently(report) { Ok(()) } else { Err(Interrupted) }
    }
}

impl Directory {
    pub(crate) fn open(&self) -> io::Result<OpenPlace<'_>> {
        let Directory { holds_file_whiteouts, in_image, .. } = *self;
        let directory = self.entries.fd()?;
        Ok(OpenPlace { directory, holds_file_whiteouts, in_image, compares_data: false })
    }

    /// The path of a name in the layers below, if this directory hides it.
    pub(crate) fn hides(&self, name: &[u8]) -> Option<RootfsPath> {
        // A whiteout is reported when the walk reaches it.
        let stat = self.open().and_then(|place| file::stat_at(place.directory, name));
        if stat.is_err_and(|err| entry::is_gone(&err)) { self.path.join(name).ok() } else { None }
    }
}

/// Whether a hash computed now stays valid as long as the file's metadata stay the same.
pub(crate) fn is_stable(stat: &Stat) -> bool {
    let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) else { return false };
    let Ok(changed) = u64::try_from(stat.changed.seconds) else { return true };
    now.as_secs() >= changed.saturating_add(STABLE_AFTER.as_secs())
}

/// Whether something in an upper layer can be more than data. A full scan reports everything
/// that it finds. Single changes and new directories, of which there may be many, are reported
/// only as far as this holds.
pub(crate) fn matters(
    shared: &Files,
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
