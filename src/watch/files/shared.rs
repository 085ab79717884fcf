//! What the threads share of files: what has changed, by which process, and what layers
//! hold.
//!
//! It carries what is known of processes, and with that the core.

use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::closings::Closings;
use super::dirty::DirtyPaths;
use super::hashed::Hashed;
use super::inputs::Inputs;
use super::lower::LowerTwins;
use super::names::Names;
use super::packages::Packages;
use super::writers::{Writer, Writers};
use crate::health::Backlog;
use crate::model::{Process, RootfsPath, Source};
use crate::sys::file;
use crate::watch::core::fair;
use crate::watch::core::watched::Watched;
use crate::watch::process::named::Named;
use crate::watch::process::shared::Processes;

/// Changed files that have settled and wait to be looked at.
const SETTLED: &str = "settled";

/// What is known of files, for all containers.
pub(crate) struct Files {
    pub(crate) processes: Arc<Processes>,
    pub(crate) lower_twins: LowerTwins,
    pub(crate) hashed: Hashed,
    pub(crate) names: Names,
    pub(crate) closings: Closings,
    pub(crate) inputs: Inputs,
    pub(crate) dirty: DirtyPaths,
    packages: Mutex<Packages>,
    writers: Mutex<Writers>,
}

impl Deref for Files {
    type Target = Processes;

    fn deref(&self) -> &Processes {
        &self.processes
    }
}

impl Files {
    pub(crate) fn new(processes: Arc<Processes>) -> Files {
        let names = Names::new();
        let settle = processes.settings.settle;
        Files {
            processes,
            lower_twins: LowerTwins::default(),
            hashed: Hashed::default(),
            inputs: Inputs::new(names.group()),
            closings: Closings::new(),
            names,
            dirty: DirtyPaths::new(settle),
            packages: Mutex::default(),
            writers: Mutex::default(),
        }
    }

    /// Notes that a path is to be looked at once it has settled.
    pub(crate) fn mark_dirty(
        &self,
        watched: &Arc<Watched>,
        path: RootfsPath,
        source: Source,
        writer: Option<Writer>,
    ) {
        if !self.dirty.mark(watched, path, source, writer) {
            // A walk finds it too; only who wrote it is not known any more.
            self.health.left_to_sweeps.fetch_add(1, Ordering::Relaxed);
            watched.ask_for_walk();
        }
    }

    /// What waits, of each container in each place, and for how long.
    pub(crate) fn backlogs(&self) -> Vec<Backlog> {
        let now = Instant::now();
        let stages = self.stages.get().into_iter().flatten();
        let waiting = stages.flat_map(|(stage, waits)| {
            waits.waiting().into_iter().map(|waiting| (*stage, waiting))
        });
        let settled = self.dirty.overdue(now).into_iter().map(|waiting| (SETTLED, waiting));
        let backlog = |(stage, (container, waiting, since)): (_, fair::Waiting)| Backlog {
            stage,
            container: container.to_string(),
            waiting,
            oldest: now.saturating_duration_since(since),
        };
        waiting.chain(settled).map(backlog).collect()
    }

    pub(crate) fn packages(&self) -> MutexGuard<'_, Packages> {
        self.packages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who changed a file a moment ago.
    pub(crate) fn writer(&self, watched: &Arc<Watched>, pid: u32) -> Writer {
        let named = Named::now(pid);
        let process = self.writers().describe(pid, watched);
        if let Some(process) = &process {
            self.packages().looked_at(self, watched, process);
        }
        let process = self.completed(named, process);
        Writer { named, process }
    }

    /// Who wrote a file a moment ago, which is remembered of the file.
    pub(crate) fn writer_to(&self, watched: &Arc<Watched>, pid: u32, stat: &file::Stat) -> Writer {
        let writer = self.writer(watched, pid);
        self.writers().remember(watched.device, stat, writer.clone());
        writer
    }

    /// Who wrote a file of the upper layer last, by whatever name.
    pub(crate) fn last_writer(&self, watched: &Watched, stat: &file::Stat) -> Option<Arc<Process>> {
        let writer = self.writers().of(watched.device, stat)?;
        self.process_of(watched, writer)
    }

    /// The process, if it was looked at or descended from a package manager.
    pub(crate) fn process_of(&self, watched: &Watched, writer: Writer) -> Option<Arc<Process>> {
        let Writer { named, process } = writer;
        let descended = self.packages().descended(watched, &self.births(), named);
        let process = match (process, descended) {
            // Known by the records alone, which name its parents and not their start times:
            // those of a package manager's descendants say whose transaction it is.
            (Some(recorded), Some(descended)) if recorded.identity.start_time == 0 => {
                let Process { exe, argv, .. } = Process::clone(&recorded);
                Some(Arc::new(Process { exe, argv, ..Process::clone(&descended) }))
            }
            // Its parents had ended when it was looked at.
            (Some(process), Some(descended))
                if [0, process.identity.start_time].contains(&descended.identity.start_time)
                    && process.ancestors.len() < descended.ancestors.len() =>
            {
                let ancestors = descended.ancestors.clone();
                Some(Arc::new(Process { ancestors, ..Process::clone(&process) }))
            }
            (process, descended) => process.or(descended),
        };
        self.completed(named, process)
    }

    fn writers(&self) -> MutexGuard<'_, Writers> {
        self.writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who wrote a path that has not settled yet, if that is known.
    pub(crate) fn writer_of(&self, watched: &Watched, path: &RootfsPath) -> Option<Arc<Process>> {
        let writer = self.dirty.writer_of(watched, path)?;
        self.process_of(watched, writer)
    }

    /// Who wrote a file last, whatever it is called by now.
    pub(crate) fn writer_of_file(
        &self,
        watched: &Watched,
        stat: &file::Stat,
    ) -> Option<Arc<Process>> {
        let writer = self.writers().of(watched.device, stat)?;
        self.process_of(watched, writer)
    }

    /// Forgets a container that has ended, or this attachment of it.
    pub(crate) fn forget(&self, watched: &Arc<Watched>) {
        self.table.remove(watched);
        self.names.forget(watched);
        self.roots().forget(&watched.container);
    }
}
