//! Takes the content of an executed file as soon as the gate has handed the file on.
//!
//! Two things cannot wait. A file can be changed back before it is read: see `writable`.
//! And an open file keeps its mount busy, so that a container could not unmount the
//! filesystem from which it has just run a program. So this thread finds the path, checks
//! whether the file has a writer, copies a small file into memory and closes it.
//!
//! It must not describe the process or hash the file: the threads that follow find out which
//! process executed it, and hash the copy.
//!
//! ```text
//! gate ── Execution ──> take ── Taken ──> describe ──> content
//! ```

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crossbeam_channel::TrySendError;

use super::execution::Execution;
use super::writable::WriterCheck;
use crate::health::Failure;
use crate::model::{ContainerId, CouldChange, Filesystem, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::threads;
use crate::watch::core::copy::{self, CHUNK, Copy};
use crate::watch::core::fair::{self, Owned, Receiver, Sender, Waits};
use crate::watch::core::held::Left;
use crate::watch::files::paths::{self, UnknownPath};
use crate::watch::files::shared::Files;
use crate::watch::mounts::find;

/// An execution whose file has been checked for writers.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) execution: Execution,
    /// The path in its container, and whether that path is certain.
    pub(crate) path: Result<(RootfsPath, bool), UnknownPath>,
    /// The kernel's name of a file on another mount of the container. Its path is found when
    /// the file has been copied and closed.
    name: Option<Result<Vec<u8>, UnknownPath>>,
    pub(crate) writer_check: WriterCheck,
    /// Its content may differ from the content that was executed; `None` until it was read.
    pub(crate) could_change: Option<CouldChange>,
}

impl Owned for Taken {
    fn owner(&self) -> &ContainerId {
        &self.execution.watched.container
    }
}

/// Where executions enter. It also counts those that are not described yet.
#[derive(Clone, Debug)]
pub(crate) struct Entrance {
    arrived: Sender<Execution>,
    asked: Sender<Taken>,
    taken: Sender<Taken>,
    room: Arc<AtomicUsize>,
}

impl Entrance {
    /// Copies a short file in memory before any other thread reads it: a container that has
    /// mounted a tmpfs may unmount it as soon as its program has ended. Returns the kernel's
    /// name for the file, and its content.
    pub(crate) fn copy_at_once(&self, fd: &OwnedFd, stat: &Stat) -> Option<(Vec<u8>, Copy)> {
        if stat.size > CHUNK as u64 {
            return None;
        }
        Some((paths::event_name(fd).ok()?, Copy::of(&self.room, fd, stat)?))
    }

    pub(crate) fn len(&self) -> usize {
        self.arrived.len() + self.asked.len() + self.taken.len()
    }

    /// Never waits. `Full` returns the execution that was dropped, as every fair channel does.
    #[expect(clippy::result_large_err, reason = "it is counted as a loss, and then dropped")]
    pub(crate) fn try_send(&self, execution: Execution) -> Result<(), TrySendError<Execution>> {
        self.arrived.try_send(execution)
    }
}

/// The state of the thread.
pub(crate) struct Take {
    shared: Arc<Files>,
    arrived: Receiver<Execution>,
    /// Executions whose file has been checked, and is still to be copied.
    asked: Sender<Taken>,
    waiting: Receiver<Taken>,
    taken: Sender<Taken>,
    room: Arc<AtomicUsize>,
}

/// The thread, the entrance for executions, and the queue where they leave. No more than
/// `limit` of them wait in each queue.
pub(crate) fn new(shared: Arc<Files>, limit: usize) -> (Take, Entrance, Receiver<Taken>) {
    let (arrived, receive_arrived) = fair::channel(limit);
    let (asked, waiting) = fair::channel(limit);
    let (taken, receive_taken) = fair::channel(limit);
    let room = copy::room();
    let entrance =
        Entrance { arrived, asked: asked.clone(), taken: taken.clone(), room: room.clone() };
    let take = Take { shared, arrived: receive_arrived, asked, waiting, taken, room };
    (take, entrance, receive_taken)
}

/// Finds the path of a file on another mount of the container.
fn place(taken: &mut Taken) {
    let Some(name) = taken.name.take() else { return };
    let Execution { watched, stat, caller, .. } = &taken.execution;
    let parent = caller.stat.as_ref().map(|stat| stat.parent);
    taken.path = name.and_then(|name| find::event_path(watched, &name, stat, caller.pid, parent));
}

impl Take {
    /// The queue in which executions wait for this thread.
    pub(crate) fn arrived(&self) -> Receiver<Execution> {
        self.arrived.clone()
    }

    /// The same state for another thread that replaces this one.
    pub(crate) fn again(&self) -> Take {
        Take {
            shared: self.shared.clone(),
            arrived: self.arrived.clone(),
            asked: self.asked.clone(),
            waiting: self.waiting.clone(),
            taken: self.taken.clone(),
            room: self.room.clone(),
        }
    }

    pub(crate) fn run(self) {
        // A file can be changed back within microseconds. Without CAP_SYS_NICE this thread
        // runs like the others, and is late more often.
        let _ = rustix::process::setpriority_process(None, -10);
        while let Some(execution) = self.shared.next_to_report(&self.arrived) {
            self.ask(execution);
            self.ask_others();
            while let Ok(mut one) = self.waiting.recv_timeout(Duration::ZERO) {
                self.copy(&mut one);
                place(&mut one);
                one.writer_check.release();
                self.hand_on(&self.taken, one);
                self.ask_others();
            }
        }
    }

    /// The queue of files that wait to be copied.
    pub(crate) fn waits(&self) -> Arc<dyn Waits> {
        self.waiting.waits()
    }

    fn ask_others(&self) {
        while let Ok(execution) = self.arrived.recv_timeout(Duration::ZERO) {
            self.ask(execution);
        }
        // The work in between is not charged to the owner of the last one.
        self.arrived.finish();
    }

    fn ask(&self, mut execution: Execution) {
        let early = execution.name.take();
        let Execution { watched, filesystem, file, stat, caller, .. } = &execution;
        threads::about(&watched.container);
        let mut writer_check = WriterCheck::default();
        let mut name = None;
        // The mounts by which the file was reached may be gone with the process.
        let parent = caller.stat.as_ref().map(|stat| stat.parent);
        let path = match file.take() {
            Left::Open(fd) => {
                let path = match filesystem {
                    Filesystem::Overlay => {
                        paths::event_path(watched, &fd, stat, caller.pid, parent)
                            .map(|path| (path, true))
                    }
                    // It is closed first: while it is open, a process that unmounts it is
                    // refused.
                    Filesystem::Tmpfs
                    | Filesystem::Volume
                    | Filesystem::Anonymous
                    | Filesystem::Container => {
                        name = Some(paths::event_name(&fd));
                        Err(UnknownPath::NotAbsolute)
                    }
                };
                let known = path.as_ref().ok().map(|(path, _)| path);
                writer_check = WriterCheck::at(&self.shared, &execution, &fd, known);
                watched.give_back(file, fd);
                path
            }
            // The container has ended, and with it the mounts that show more.
            Left::Name(Some(name)) => {
                let below_root = overlay::strip_directory(&name, &watched.root_name);
                RootfsPath::new(below_root.unwrap_or(&name))
                    .map(|path| (path, true))
                    .map_err(UnknownPath::from)
            }
            Left::Copy(copy) => {
                file.keep(copy);
                name = early.map(Ok);
                Err(UnknownPath::NotAbsolute)
            }
            Left::Name(None) => Err(UnknownPath::NotAbsolute),
        };
        let taken = Taken { execution, path, name, writer_check, could_change: None };
        self.hand_on(&self.asked, taken);
    }

    /// Copies a small file, so that it can be closed.
    fn copy(&self, taken: &mut Taken) {
        let Taken { execution, path, name, writer_check, could_change } = taken;
        let Execution { watched, file, stat, .. } = execution;
        if stat.size > self.shared.settings.max_hash_bytes {
            return;
        }
        if file.is_copied() {
            *could_change = Some(writer_check.had_writer());
            return;
        }
        let Some(mut copy) = Copy::begin(&self.room, stat) else { return };
        let Left::Open(fd) = file.take() else { return };
        if !copy.read(&fd, || self.ask_others()) {
            watched.give_back(file, fd);
            return;
        }
        if name.is_some() {
            *could_change = Some(writer_check.had_writer());
        } else if let (Ok(now), Ok((path, _))) = (file::stat(&fd), path) {
            *could_change =
                Some(writer_check.could_change(&self.shared, watched, path, stat, &now));
        }
        if *could_change == Some(CouldChange::No) {
            file.keep(copy);
        } else {
            // It is read again where it is hashed, until it is stable.
            watched.give_back(file, fd);
        }
    }

    fn hand_on(&self, next: &Sender<Taken>, taken: Taken) {
        match next.try_send(taken) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(taken)) => self.shared.lose(
                Failure::ContentQueueFull,
                Some(&taken.execution.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }
}
