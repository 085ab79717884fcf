//! What an executed file holds, taken as soon as the gate has handed it on.
//!
//! Whatever comes later is too late for two things. A file can be changed back before
//! it is read: see [`writable`]. And an open file keeps its mount busy, so that a
//! container could not unmount what it has just run a program from. So this thread
//! finds the path, asks whether the file has a writer, copies a small file into memory
//! and closes it. Who ran it is found out by the threads that follow, and what is
//! hashed is the copy.
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
use super::writable::Look;
use crate::health::Failure;
use crate::model::{ContainerId, Filesystem, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::threads;
use crate::watch::core::copy::{self, CHUNK, Copy};
use crate::watch::core::fair::{self, Owned, Receiver, Sender, Waits};
use crate::watch::core::held::Left;
use crate::watch::files::paths::{self, UnknownPath};
use crate::watch::files::shared::Files;
use crate::watch::mounts::find;

/// An execution whose file has been looked at.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) execution: Execution,
    /// In its container, and whether that is certain.
    pub(crate) path: Result<(RootfsPath, bool), UnknownPath>,
    /// The kernel's name of a file on a mount of the container's own, whose path is found
    /// when the file has been copied and closed.
    name: Option<Result<Vec<u8>, UnknownPath>>,
    pub(crate) look: Look,
    /// What it holds may not be what it held when it was executed; `None` until it was
    /// read.
    pub(crate) could_change: Option<bool>,
}

impl Owned for Taken {
    fn owner(&self) -> &ContainerId {
        &self.execution.watched.container
    }
}

/// Where executions enter, and how many of them wait to be described.
#[derive(Clone, Debug)]
pub(crate) struct Entrance {
    arrived: Sender<Execution>,
    asked: Sender<Taken>,
    taken: Sender<Taken>,
    room: Arc<AtomicUsize>,
}

impl Entrance {
    /// Copies a short file in memory before anybody else looks at it: a container that
    /// has mounted a tmpfs may unmount it as soon as its program has ended. The kernel's
    /// name for it, and its content.
    pub(crate) fn copy_at_once(&self, fd: &OwnedFd, stat: &Stat) -> Option<(Vec<u8>, Copy)> {
        if stat.size > CHUNK as u64 {
            return None;
        }
        Some((paths::event_name(fd).ok()?, Copy::of(&self.room, fd, stat)?))
    }

    pub(crate) fn len(&self) -> usize {
        self.arrived.len() + self.asked.len() + self.taken.len()
    }

    /// Never waits. `Full` hands back what was dropped, as every fair channel does.
    #[expect(clippy::result_large_err, reason = "it is counted as a loss, and then dropped")]
    pub(crate) fn try_send(&self, execution: Execution) -> Result<(), TrySendError<Execution>> {
        self.arrived.try_send(execution)
    }
}

/// The thread's own part.
pub(crate) struct Take {
    shared: Arc<Files>,
    arrived: Receiver<Execution>,
    /// Asked about, and still to be copied.
    asked: Sender<Taken>,
    waiting: Receiver<Taken>,
    taken: Sender<Taken>,
    room: Arc<AtomicUsize>,
}

/// The thread, where executions enter it, and where they leave it. No more than `limit`
/// of them wait in each place.
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

/// Finds the path of a file on a mount of the container's own.
fn place(taken: &mut Taken) {
    let Some(name) = taken.name.take() else { return };
    let Execution { watched, stat, caller, .. } = &taken.execution;
    let parent = caller.stat.as_ref().map(|stat| stat.parent);
    taken.path = name.and_then(|name| find::event_path(watched, &name, stat, caller.pid, parent));
}

impl Take {
    /// Where executions wait for this thread.
    pub(crate) fn arrived(&self) -> Receiver<Execution> {
        self.arrived.clone()
    }

    /// The same for another thread that takes this one's place.
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
        // A file can be changed back within microseconds. Without CAP_SYS_NICE it runs
        // like the others, and is late more often.
        let _ = rustix::process::setpriority_process(None, -10);
        while let Some(execution) = self.shared.next_to_tell(&self.arrived) {
            self.ask(execution);
            self.ask_others();
            while let Ok(mut one) = self.waiting.recv_timeout(Duration::ZERO) {
                self.copy(&mut one);
                place(&mut one);
                one.look.release();
                self.hand_on(&self.taken, one);
                self.ask_others();
            }
        }
    }

    /// What waits to be copied.
    pub(crate) fn waits(&self) -> Arc<dyn Waits> {
        self.waiting.waits()
    }

    fn ask_others(&self) {
        while let Ok(execution) = self.arrived.recv_timeout(Duration::ZERO) {
            self.ask(execution);
        }
        // What is done between is not the last one's cost.
        self.arrived.finish();
    }

    fn ask(&self, mut execution: Execution) {
        let early = execution.name.take();
        let Execution { watched, filesystem, file, stat, caller, .. } = &execution;
        threads::about(&watched.container);
        let mut look = Look::default();
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
                    // First it is closed: whoever unmounts it would be refused.
                    Filesystem::Tmpfs
                    | Filesystem::Volume
                    | Filesystem::Anonymous
                    | Filesystem::Container => {
                        name = Some(paths::event_name(&fd));
                        Err(UnknownPath::NotAbsolute)
                    }
                };
                let known = path.as_ref().ok().map(|(path, _)| path);
                look = Look::at(&self.shared, &execution, known);
                watched.give_back(file, fd);
                path
            }
            // The container has ended, and with it the mounts that say more.
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
        let taken = Taken { execution, path, name, look, could_change: None };
        self.hand_on(&self.asked, taken);
    }

    /// Copies a small file, so that it can be closed.
    fn copy(&self, taken: &mut Taken) {
        let Taken { execution, path, name, look, could_change } = taken;
        let Execution { watched, file, stat, .. } = execution;
        if stat.size > self.shared.settings.max_hash_bytes {
            return;
        }
        if file.is_copied() {
            *could_change = Some(look.had_writer());
            return;
        }
        let Some(mut copy) = Copy::begin(&self.room, stat) else { return };
        let Left::Open(fd) = file.take() else { return };
        if !copy.read(&fd, || self.ask_others()) {
            watched.give_back(file, fd);
            return;
        }
        if name.is_some() {
            *could_change = Some(look.had_writer());
        } else if let (Ok(now), Ok((path, _))) = (file::stat(&fd), path) {
            *could_change = Some(look.could_change(&self.shared, watched, path, stat, &now));
        }
        if *could_change == Some(false) {
            file.keep(copy);
        } else {
            // It is read again where it is hashed, until it holds still.
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
