//! An execution whose process has been described and whose file is being hashed, step by step.
//!
//! Owns the progress of the reading: of the executed file, then of the image's file at its
//! path. It must not report anything or choose which execution is read next: `content` does
//! both.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use jiff::Timestamp;

use super::writable::WriterCheck;
use crate::model::{
    ContainerId, Content, CouldChange, FileState, Filesystem, LayerFile, LowerTwin, RootfsPath,
    Unhashed,
};
use crate::sys::file::{self, Stat};
use crate::sys::{overlay, procfs};
use crate::watch::core::fair::Owned;
use crate::watch::core::held::{Held, Left};
use crate::watch::core::watched::Watched;
use crate::watch::files::lower::{Finding, TwinReading};
use crate::watch::files::paths;
use crate::watch::files::shared::Files;
use crate::watch::files::state::{self, Begun, Reading, Which};
use crate::watch::process::describe::Executing;

/// All that is known of one execution until it is reported.
// Long: all that one report needs, gathered by several threads one after another.
#[derive(Debug)]
pub(crate) struct Described {
    pub(crate) watched: Arc<Watched>,
    /// The container on whose mount the file lies. A process of another container may have
    /// entered its namespaces.
    pub(crate) holder: Arc<Watched>,
    /// The process, as the gate saw it.
    pub(crate) seen: Option<procfs::Stat>,
    pub(crate) filesystem: Filesystem,
    pub(crate) path: RootfsPath,
    pub(crate) file: Executed,
    pub(crate) stat: Stat,
    pub(crate) layer_file: Option<LayerFile>,
    pub(crate) is_movable: bool,
    pub(crate) writer_check: WriterCheck,
    pub(crate) could_change: Option<CouldChange>,
    pub(crate) executing: Executing,
    /// When the gate was asked, by the clock of the kernel's records.
    pub(crate) asked: Option<u64>,
    pub(crate) at: Timestamp,
    pub(crate) times: u64,
    pub(crate) progress: Progress,
}

/// Where the content of an executed file is read.
#[derive(Debug)]
pub(crate) enum Executed {
    Held(Held),
    /// Its container has ended: opened in the upper layer, where the host keeps it.
    Upper(OwnedFd, Stat),
}

/// How far the hashing of an executed file has come. It can be put aside in between.
#[derive(Debug)]
pub(crate) enum Progress {
    Waiting,
    Reading(Box<Reading>),
    /// The file below it, in the image's layers, is being read.
    Twin(FileState, Box<TwinReading>),
    Done(FileState, Option<LowerTwin>),
}

impl Owned for Described {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// Files longer than this take a noticeable time to hash.
pub(crate) const LARGE: u64 = 16 << 20;

impl Described {
    /// The filesystem and the path that its report names.
    pub(crate) fn named(&self) -> (Filesystem, RootfsPath) {
        // The gate read the links before the file ran. A file with a name may also just have
        // lost it.
        let is_nameless =
            self.layer_file.is_none() && self.stat.links == 0 && paths::has_a_number(&self.path);
        let filesystem = if is_nameless { Filesystem::Anonymous } else { self.filesystem };
        let path = paths::path(self.path.as_bytes(), is_nameless);
        (filesystem, path.unwrap_or_else(|_| self.path.clone()))
    }

    /// The place where a walk of the upper layer finds its file.
    pub(crate) fn place(&self) -> Option<(Arc<Watched>, RootfsPath)> {
        let is_on_overlay = self.filesystem == Filesystem::Overlay;
        is_on_overlay.then(|| (self.watched.clone(), self.path.clone()))
    }

    /// Whether the file that is read next is large. A file above the limit is not read at all.
    pub(crate) fn is_large(&self, shared: &Files) -> bool {
        let size = match &self.progress {
            Progress::Waiting | Progress::Reading(_) => self.stat.size,
            Progress::Twin(_, twin) => twin.size(),
            Progress::Done(..) => return false,
        };
        (LARGE..=shared.settings.max_hash_bytes).contains(&size)
    }

    /// Reads one step further. Returns true when everything has been read.
    pub(crate) fn read_on(&mut self, shared: &Files, is_busy: bool) -> bool {
        self.progress = match std::mem::replace(&mut self.progress, Progress::Waiting) {
            Progress::Waiting => self.begin(shared, is_busy),
            Progress::Reading(reading) => self.read_own(shared, reading),
            Progress::Twin(state, mut twin) => match twin.step(&shared.lower_twins, state::SLICE) {
                Some(lower) => Progress::Done(state, lower),
                None if !shared.may_report() => Progress::Done(state, None),
                None => Progress::Twin(state, twin),
            },
            done @ Progress::Done(..) => done,
        };
        matches!(self.progress, Progress::Done(..))
    }

    pub(crate) fn begin(&mut self, shared: &Files, is_busy: bool) -> Progress {
        // The lock is released before the file is read.
        let known = self.layer_file.and_then(|file| self.watched.layer_files().known(&file));
        // Else, in a storm of one program, all others would wait while it is hashed again.
        let known =
            known.or_else(|| is_busy.then(|| shared.hashed.of_executed(&self.stat)).flatten());
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
                        Begun::Reads(_) => self.holder.give_back(held, fd),
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

    pub(crate) fn read_own(&mut self, shared: &Files, mut reading: Box<Reading>) -> Progress {
        if !shared.may_report() {
            return Progress::Done(self.gone(), None);
        }
        let state = match &self.file {
            Executed::Held(held) => match held.take() {
                Left::Open(fd) => {
                    let state = reading.step(fd.as_fd(), state::SLICE);
                    match &state {
                        Some(state) => self.was_read(shared, &fd, state),
                        // Its container may end while it is put aside.
                        None => self.holder.give_back(held, fd),
                    }
                    state
                }
                // A file is copied only before its reading begins.
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
    pub(crate) fn was_read(&mut self, shared: &Files, fd: &OwnedFd, state: &FileState) {
        if self.could_change.is_none()
            && let Ok(now) = file::stat(fd)
        {
            let Described { writer_check, watched, path, stat, .. } = self;
            self.could_change = Some(writer_check.could_change(shared, watched, path, stat, &now));
        }
        self.remember(shared, state);
    }

    /// Remembers the state, unless the file may have been changed back meanwhile: such a file
    /// is read anew each time.
    pub(crate) fn remember(&self, shared: &Files, state: &FileState) {
        if self.could_change == Some(CouldChange::No) {
            shared.hashed.remember_executed(&self.stat, state);
        }
    }

    /// Continues with the file in the upper layer: the descriptor was closed when the
    /// container ended.
    pub(crate) fn find_in_upperdir(&mut self, shared: &Files) -> Progress {
        let is_own = self.filesystem == Filesystem::Overlay && self.layer_file.is_none();
        match is_own.then(|| in_upperdir(&self.watched, &self.path, &self.stat)).flatten() {
            Some((fd, stat)) => {
                self.file = Executed::Upper(fd, stat);
                Progress::Waiting
            }
            None => self.begin_twin(shared, self.gone()),
        }
    }

    pub(crate) fn gone(&self) -> FileState {
        FileState { content: Content::Unhashed(Unhashed::Gone), ..state::unopened(&self.stat) }
    }

    pub(crate) fn begin_twin(&self, shared: &Files, state: FileState) -> Progress {
        // A file of the image would be its own twin, and images have no files elsewhere.
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

/// Opens an executed file of an ended container again, in the upper layer where the host
/// keeps it. Its times and size show that it is the same file.
pub(crate) fn in_upperdir(
    watched: &Watched,
    path: &RootfsPath,
    stat: &Stat,
) -> Option<(OwnedFd, Stat)> {
    let layers = watched.layers()?;
    let upper = file::open_directory(&layers.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    let is_same = found.is_regular()
        && (found.changed, found.modified, found.size) == (stat.changed, stat.modified, stat.size);
    let is_whole = is_same && !overlay::is_metacopy(&fd, layers.userxattr).unwrap_or(true);
    is_whole.then_some((fd, found))
}
