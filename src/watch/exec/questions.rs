//! Executions that wait for a decision: what the pipeline needs to know to decide.
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

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;

use super::described::{Described, Executed, Progress};
use super::shared::Exec;
use super::writable::WriterCheck;
use crate::gate::{Decision, Decisions};
use crate::model::{
    ContainerId, CouldChange, Fact, FileFact, Filesystem, LayerFile, Observation, Source,
};
use crate::sys::file::Stat;
use crate::sys::procfs;
use crate::threads;
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
    Reading(Box<Described>),
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
            Stage::Reading(described) => &described.watched.container,
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
            Stage::New(new) => describe(shared, *new),
            Stage::Reading(described) => Some(described),
        };
        let Some(mut described) = described else {
            // Without a path no rule can be applied.
            decisions.decide(number, Decision::None);
            continue;
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
            asking.put_back(Asking { number, stage: Stage::Reading(described) });
            continue;
        }
        let observation = observe(shared, *described);
        let question = observation.map(|observation| {
            shared.observed().keep(number, observation.clone());
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

/// What the execution will be; `None` if it is the image's own file where the image has it.
fn observe(shared: &Exec, described: Described) -> Option<Observation> {
    let Described { watched, filesystem, path, stat, layer_file, .. } = &described;
    if described.is_movable && paths::is_where_the_image_has_it(watched, path, stat) {
        return None;
    }
    let is_own = *filesystem == Filesystem::Overlay && layer_file.is_none();
    let writer = is_own.then(|| shared.writer_of_used(watched, path, stat, FEED)).flatten();
    let (filesystem, path) = described.named();
    let Described { watched, holder, executing, layer_file, at, progress, .. } = described;
    let Progress::Done(state, lower) = progress else { return None };
    let fact = Fact::File(FileFact::Executed {
        path,
        filesystem,
        running: false,
        denied: false,
        times: 1,
        state,
        lower,
        process: Arc::new(executing.process),
        invoked_as: None,
        layer_file,
        writer,
    });
    let file_of = (!Arc::ptr_eq(&holder, &watched)).then(|| holder.container.clone());
    Some(shared.observation_of(&watched, file_of, at, Source::Gate, fact))
}
