//! Executions, and reads of guarded files, that wait for a decision: what the pipeline needs to
//! know to decide.
//!
//! Where rules may deny, the gate keeps the kernel's question and hands the execution over
//! under a number. What is certainly the image's own is allowed at once. Everything else comes
//! here: the thread `questions` finds the path, describes the process, hashes the file and asks
//! the pipeline. Containers take turns, so a large file of one delays no other. If anything is
//! missing or late, the gate answers by itself when the time is over.
//!
//! ```text
//! gate ── waits under a number ──> questions ── Question ──> pipeline
//!   ^                                                           │
//!   └───────────────────────── Decision ────────────────────────┘
//! ```
//!
//! An execution that is allowed goes on to `take`, like every other. There it is examined
//! again: what ran may be something else by then.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;

use super::described::{Described, Executed, Progress};
use super::shared::Exec;
use super::writable::WriterCheck;
use crate::gate::{Decision, Decisions};
use crate::model::{
    ContainerId, CouldChange, Fact, FileFact, Filesystem, LayerFile, Observation, RootfsPath,
    Script, Source,
};
use crate::sys::fanotify::Range;
use crate::sys::file::{self, Stat};
use crate::sys::procfs;
use crate::threads;
use crate::watch::code::reads::{self, Purpose};
use crate::watch::core::fair::{self, Owned, Receiver};
use crate::watch::core::message::Question;
use crate::watch::core::watched::Watched;
use crate::watch::files::paths;
use crate::watch::mounts::find;
use crate::watch::process::attribution;
use crate::watch::process::describe::{self, Executing};

/// How long an execution waits for the change feed, which knows the writer of its file.
const FEED: Duration = Duration::from_millis(100);

/// An execution that waits, and the file that it is about.
#[derive(Debug)]
pub(crate) struct Asking {
    pub(crate) number: u64,
    pub(crate) stage: Stage,
}

#[derive(Debug)]
pub(crate) enum Stage {
    New(Box<New>),
    /// A thread waits to read a guarded file.
    Read(Box<NewRead>),
    Reading(Box<Described>, Use),
}

/// How the file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Executed,
    Loaded { by_linker: bool },
    Interpreted,
}

#[derive(Debug)]
pub(crate) struct NewRead {
    pub(crate) watched: Arc<Watched>,
    /// On the filesystem below the overlay.
    pub(crate) file: OwnedFd,
    pub(crate) stat: Stat,
    pub(crate) range: Option<Range>,
    pub(crate) thread: u32,
    pub(crate) at: Timestamp,
}

#[derive(Debug)]
pub(crate) struct New {
    pub(crate) watched: Arc<Watched>,
    pub(crate) filesystem: Filesystem,
    pub(crate) file: OwnedFd,
    pub(crate) stat: Stat,
    pub(crate) layer_file: Option<LayerFile>,
    pub(crate) is_movable: bool,
    /// The process before it becomes the program.
    pub(crate) caller: procfs::Stat,
    pub(crate) at: Timestamp,
}

impl Owned for Asking {
    fn owner(&self) -> &ContainerId {
        match &self.stage {
            Stage::New(new) => &new.watched.container,
            Stage::Read(read) => &read.watched.container,
            Stage::Reading(described, _) => &described.watched.container,
        }
    }
}

/// Asks the pipeline about each execution that waits.
pub(crate) fn run(
    shared: &Exec,
    asking: &Receiver<Asking>,
    decisions: &Decisions,
    questions: &Sender<Box<Question>>,
) {
    // Although a process waits, this thread is no more urgent than the containers' own work: it
    // hashes what they choose.
    while let Some(Asking { number, stage }) = shared.next_to_report(asking) {
        let described = match stage {
            // Without a path no rule can be applied.
            Stage::New(new) => {
                describe(shared, *new).map(|it| (it, Use::Executed)).ok_or(Decision::None)
            }
            Stage::Read(read) => match describe_read(shared, *read) {
                Ok(Some(described)) => Ok(described),
                // It is read for something that no finding is about.
                Ok(None) => Err(Decision::Allow),
                Err(_) => Err(Decision::None),
            },
            Stage::Reading(described, used) => Ok((described, used)),
        };
        let (mut described, used) = match described {
            Ok(described) => described,
            Err(decision) => {
                decisions.decide(number, decision);
                asking.finish();
                continue;
            }
        };
        let begun = Instant::now();
        let is_done = loop {
            if described.read_on(shared, false) {
                break true;
            }
            if begun.elapsed() >= fair::SLICE {
                break false;
            }
        };
        if !is_done {
            asking.put_back(Asking { number, stage: Stage::Reading(described, used) });
            continue;
        }
        let stat = described.stat;
        let observation = observe(shared, *described, used);
        let question = observation.map(|observation| {
            shared.observed().keep(number, observation.clone(), stat);
            Box::new(Question { number, observation })
        });
        match question.map(|question| questions.try_send(question)) {
            Some(Ok(())) => (),
            // It is the image's own file where the image has it.
            None => decisions.decide(number, Decision::Allow),
            Some(Err(_)) => decisions.decide(number, Decision::None),
        }
        asking.finish();
    }
}

/// Finds the path of the file, and describes the process as it will be.
fn describe(shared: &Exec, new: New) -> Option<Box<Described>> {
    let New { watched: holder, filesystem, file, stat, layer_file, is_movable, caller, at } = new;
    threads::about(&holder.container);
    let actor = attribution::other_than(shared, &holder, &caller);
    let watched = actor.unwrap_or_else(|| holder.clone());
    let (pid, parent) = (caller.identity.pid, Some(caller.parent));
    let path = match filesystem {
        Filesystem::Overlay => paths::event_path(&holder, &file, &stat, pid, parent).ok()?,
        Filesystem::Tmpfs | Filesystem::Volume | Filesystem::Anonymous | Filesystem::Container => {
            let name = paths::event_name(&file).ok()?;
            find::event_path(&holder, &name, &stat, pid, parent).ok()?.0
        }
    };
    let mut process = describe::before_exec(&caller, &watched, &path);
    if let Some(ancestors) = shared.packages().ancestors_of(caller.identity)
        && ancestors.len() > process.ancestors.len()
    {
        process.ancestors = ancestors.to_vec();
    }
    let file = Executed::Held(watched.hold(file));
    Some(Box::new(Described {
        watched,
        holder,
        seen: Some(caller),
        filesystem,
        path,
        file,
        stat,
        layer_file,
        is_movable,
        writer_check: WriterCheck::default(),
        // It is read before it runs: nothing here proves what will run.
        could_change: Some(CouldChange::Unproven),
        executing: Executing { process },
        asked: None,
        at,
        times: 1,
        progress: Progress::Waiting,
    }))
}

/// Describes the process that reads a guarded file; `None` if no rule can be about that, and an
/// error if that is not known.
fn describe_read(shared: &Exec, read: NewRead) -> io::Result<Option<(Box<Described>, Use)>> {
    let NewRead { watched, file, stat, range, thread, at } = read;
    threads::about(&watched.container);
    let asked = reads::Read { file: &file, stat: &stat, range, thread };
    let Some(purpose) = reads::purpose(&watched, &asked)? else { return Ok(None) };
    let Some(path) = path_below(&watched, &file, &stat)? else { return Ok(None) };
    let (process, used) = match purpose {
        Purpose::Library { process, by_linker } => (process, Use::Loaded { by_linker }),
        Purpose::Script { process } => (process, Use::Interpreted),
    };
    if used == Use::Interpreted && shared.observed().was_allowed(process.identity, &stat) {
        return Ok(None);
    }
    let file = Executed::Held(watched.hold(file));
    let described = Described {
        holder: watched.clone(),
        watched,
        seen: None,
        filesystem: Filesystem::Overlay,
        path,
        file,
        stat,
        layer_file: None,
        is_movable: false,
        writer_check: WriterCheck::default(),
        could_change: Some(CouldChange::Unproven),
        executing: Executing { process },
        asked: None,
        at,
        times: 1,
        progress: Progress::Waiting,
    };
    Ok(Some((Box::new(described), used)))
}

/// The path of a file of the container's layer, from the kernel's name for it: below the overlay,
/// the layer is the root. `None` for a file of another container, reached by /proc.
fn path_below(watched: &Watched, file: &OwnedFd, stat: &Stat) -> io::Result<Option<RootfsPath>> {
    let name = file::name_of(file.as_fd())?;
    let path = |name: &[u8]| RootfsPath::new(name).map_err(|_| io::ErrorKind::InvalidData);
    // One of several names can have been removed, too.
    let removed = name.strip_suffix(file::DELETED);
    if let Some(removed) = removed.filter(|_| stat.links == 0) {
        return Ok(Some(path(removed)?));
    }
    let layers = watched.layers().ok_or(io::ErrorKind::NotFound)?;
    let upper = file::open_directory(&layers.dirs.upperdir)?;
    for name in [Some(name.as_slice()), removed].into_iter().flatten() {
        let path = path(name)?;
        match file::open_path_beneath(&upper, path.relative()).and_then(file::stat) {
            Ok(found) if (found.device, found.inode) == (stat.device, stat.inode) => {
                return Ok(Some(path));
            }
            Ok(_) => return Ok(None),
            Err(_) => (),
        }
    }
    // It was renamed a moment ago, or its last known name was removed.
    match removed {
        Some(removed) => Ok(Some(path(removed)?)),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

/// What it will be; `None` if it is the image's own file where the image has it.
fn observe(shared: &Exec, described: Described, used: Use) -> Option<Observation> {
    let Described { watched, filesystem, path, stat, layer_file, .. } = &described;
    if described.is_movable && paths::is_where_the_image_has_it(watched, path, stat) {
        return None;
    }
    let is_own = *filesystem == Filesystem::Overlay && layer_file.is_none();
    let writer = is_own.then(|| shared.writer_of_used(watched, path, stat, FEED)).flatten();
    let (filesystem, path) = described.named();
    let Described { watched, holder, executing, layer_file, at, progress, .. } = described;
    let Progress::Done(state, lower) = progress else { return None };
    let (process, denied) = (Arc::new(executing.process), false);
    let fact = Fact::File(match used {
        Use::Executed => FileFact::Executed {
            path,
            filesystem,
            running: false,
            denied,
            times: 1,
            state,
            lower,
            process,
            invoked_as: None,
            layer_file,
            writer,
        },
        Use::Loaded { by_linker } => FileFact::Loaded {
            path,
            filesystem,
            state,
            lower,
            process,
            by_linker,
            is_shared: false,
            writer,
            denied,
        },
        Use::Interpreted => FileFact::Interpreted {
            script: Script::File { path, filesystem, state, lower },
            process,
            writer,
            denied,
        },
    });
    let file_of = (!Arc::ptr_eq(&holder, &watched)).then(|| holder.container.clone());
    Some(shared.observation_of(&watched, file_of, at, Source::Gate, fact))
}
