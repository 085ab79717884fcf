//! [`Files`]: the state of this wing that threads share. It holds the changed paths, the
//! writers, the marks of directories, and the hashes of files.
//!
//! It carries `Processes`, and with that the core. The wings above carry `Files`. This file
//! combines what `writers`, `packages` and the kernel's records know of a writer; each part
//! keeps its own state behind its own lock.

use std::ops::Deref;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::closings::Closings;
use super::dirty::DirtyPaths;
use super::guards::Guards;
use super::hashed::Hashed;
use super::inputs::Inputs;
use super::lower::LowerTwins;
use super::names::Names;
use super::packages::Packages;
use super::progress::Progress;
use super::writers::{Writer, Writers};
use crate::health::Backlog;
use crate::model::{Process, RootfsPath, Source};
use crate::sys::file;
use crate::watch::core::fair;
use crate::watch::core::watched::Watched;
use crate::watch::process::named::Named;
use crate::watch::process::shared::Processes;

/// The stage of changed files that have settled and wait to be examined.
const SETTLED: &str = "settled";

/// What is known of the files of all containers.
pub(crate) struct Files {
    pub(crate) processes: Arc<Processes>,
    pub(crate) lower_twins: LowerTwins,
    pub(crate) hashed: Hashed,
    pub(crate) names: Names,
    pub(crate) closings: Closings,
    pub(crate) inputs: Inputs,
    pub(crate) dirty: DirtyPaths,
    pub(crate) guards: Guards,
    pub(crate) progress: Progress,
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
            guards: Guards::default(),
            names,
            dirty: DirtyPaths::new(settle),
            progress: Progress::default(),
            packages: Mutex::default(),
            writers: Mutex::default(),
        }
    }

    /// Notes that a path is to be examined once it has settled.
    pub(crate) fn mark_dirty(
        &self,
        watched: &Arc<Watched>,
        path: RootfsPath,
        source: Source,
        writer: Option<Writer>,
    ) {
        if !self.dirty.mark(watched, path, source, writer) {
            // A scan finds the file too, but its writer is lost.
            self.health.left_to_sweeps.fetch_add(1, Ordering::Relaxed);
            watched.ask_for_walk();
        }
    }

    /// How much of each container waits in each stage, and for how long.
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

    /// The process that changed a file a moment ago.
    pub(crate) fn writer(&self, watched: &Arc<Watched>, pid: u32) -> Writer {
        let named = Named::now(pid);
        let process = self.writers().describe(pid, watched);
        if let Some(process) = &process {
            self.packages().note(self, watched, process);
        }
        let process = self.completed(named, process);
        Writer { named, process }
    }

    /// The process that wrote a file a moment ago. It is remembered for this file.
    pub(crate) fn writer_to(&self, watched: &Arc<Watched>, pid: u32, stat: &file::Stat) -> Writer {
        let writer = self.writer(watched, pid);
        self.writers().remember(watched.device, stat, writer.clone());
        writer
    }

    /// A process wrote data a moment ago.
    pub(crate) fn writer_to_data(&self, watched: &Watched, pid: u32, stat: &file::Stat) {
        self.writers().remember_data(watched.device, stat, pid);
    }

    /// The writer's process, if it was examined or descended from a package manager.
    pub(crate) fn process_of(&self, watched: &Watched, writer: Writer) -> Option<Arc<Process>> {
        let Writer { named, process } = writer;
        let descended = self.packages().descended(watched, &self.births(), named);
        let process = match (process, descended) {
            // Known from the kernel's records only, which have its parents but not their start
            // times. The descendants of package managers have them, and with them the transaction.
            (Some(recorded), Some(descended)) if recorded.identity.start_time == 0 => {
                let Process { exe, argv, .. } = Process::clone(&recorded);
                Some(Arc::new(Process { exe, argv, ..Process::clone(&descended) }))
            }
            // Its parents had ended when it was examined.
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

    /// The writer of a path that has not settled yet, if it is known.
    pub(crate) fn writer_of(&self, watched: &Watched, path: &RootfsPath) -> Option<Arc<Process>> {
        let writer = self.dirty.writer_of(watched, path)?;
        self.process_of(watched, writer)
    }

    /// The last writer of a file that is used now; `None` if it cannot be known, because the
    /// change feed has not read everything that was written.
    pub(crate) fn writer_of_used(
        &self,
        watched: &Watched,
        path: &RootfsPath,
        stat: &file::Stat,
        patience: Duration,
    ) -> Option<Arc<Process>> {
        self.progress.has_caught_up(patience).then(|| self.writer_read(watched, path, stat))?
    }

    /// The last writer of a file, where the change feed has read everything that was written
    /// before the file was used.
    pub(crate) fn writer_read(
        &self,
        watched: &Watched,
        path: &RootfsPath,
        stat: &file::Stat,
    ) -> Option<Arc<Process>> {
        // The writer of its content. The path may have been changed by another process, such as a chmod.
        self.writer_of_file(watched, stat).or_else(|| self.writer_of(watched, path))
    }

    /// The last writer of a file, whatever its name is now.
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
        self.closings.forget_files(&watched.container);
        // The kernel uses the number again, perhaps already.
        if self.table.by_device(watched.device).is_none() {
            self.guards.forget(watched);
        }
        self.roots().forget(&watched.container);
    }
}
