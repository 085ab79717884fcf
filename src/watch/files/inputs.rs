//! The FIFOs that lead to the terminals of containers, and which process opens one.
//!
//! The marks are in the fanotify group of `names`. Its reader (`changes`) passes the openings
//! of FIFOs to this file, and the thread `attachments` in `sessions` takes them from here and
//! decides what they mean. A directory that both this file and `names` listen to has one
//! mark with the masks of both, so neither may remove the other's bits.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::health::Failure;
use crate::sys::fanotify::{DecodedName, Group, Named};
use crate::sys::file;
use crate::sys::handle::FileHandle;
use crate::threads;
use crate::watch::core::shared::Core;
use crate::watch::core::watched::Watched;

/// The most FIFOs that are listened to at the same time.
const MAX_INPUTS: usize = 1024;

/// The most openings that wait to be examined.
const QUEUE: usize = 1024;

/// The events that are listened for in a FIFO's directory.
const MASK: u64 = libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD;

/// Listens to the inputs of terminals.
pub(crate) struct Inputs {
    /// `None` if the kernel cannot report names, or refuses to create another group.
    group: Option<Arc<Group>>,
    inputs: Mutex<HashMap<FileHandle, Input>>,
    send: Sender<Named>,
    receive: Receiver<Named>,
}

struct Input {
    watched: Arc<Watched>,
    name: Box<[u8]>,
    /// Its manager opens it too, each time the manager is restarted.
    is_handed_on: bool,
}

impl Inputs {
    /// `group` belongs to `names`, which also logs if it is missing.
    pub(crate) fn new(group: Option<Arc<Group>>) -> Inputs {
        let (send, receive) = bounded(QUEUE);
        Inputs { group, inputs: Mutex::default(), send, receive }
    }

    fn inputs(&self) -> MutexGuard<'_, HashMap<FileHandle, Input>> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on, each opening of this FIFO is reported, with the process that opens it.
    pub(crate) fn listen(
        &self,
        watched: &Arc<Watched>,
        fifo: &Path,
        is_handed_on: bool,
    ) -> io::Result<()> {
        let Some(group) = &self.group else { return Ok(()) };
        let (Some(directory), Some(name)) = (fifo.parent(), fifo.file_name()) else {
            return Ok(());
        };
        let directory = file::open_directory(directory)?;
        let handle = FileHandle::of(&directory)?;
        let mut inputs = self.inputs();
        inputs.retain(|_, input| !input.watched.is_detaching());
        if inputs.len() >= MAX_INPUTS {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        group.mark_children(directory.as_fd(), MASK)?;
        let name = name.as_bytes().into();
        inputs.insert(handle, Input { watched: watched.clone(), name, is_handed_on });
        Ok(())
    }

    /// Removes `mask` from the mark of a directory by calling `unmark`, without the bits that
    /// this file needs there.
    pub(crate) fn unmark_the_rest(
        &self,
        directory: &OwnedFd,
        mask: u64,
        unmark: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        // The lock is held so that the directory is not marked in between.
        let inputs = self.inputs();
        let is_shared = !inputs.is_empty()
            && FileHandle::of(directory).is_ok_and(|handle| inputs.contains_key(&handle));
        unmark(if is_shared { mask & !MASK } else { mask })
    }

    /// Takes the openings of FIFOs out of `events`, and returns the rest.
    pub(crate) fn take(&self, shared: &Core, events: Vec<DecodedName>) -> Vec<DecodedName> {
        let mut rest = Vec::with_capacity(events.len());
        for event in events {
            match event {
                DecodedName::Named(mut named) if named.mask & libc::FAN_OPEN != 0 => {
                    let opened = Some(&named).filter(|named| self.is_input(named)).cloned();
                    if opened.is_some_and(|opened| self.send.try_send(opened).is_err()) {
                        let detail = "an attachment to a terminal was not examined";
                        shared.lose(Failure::ProcessQueueFull, None, detail);
                    }
                    // The kernel merges the events of one process and one name: keep the others.
                    named.mask &= !libc::FAN_OPEN;
                    if named.mask & !(libc::FAN_ONDIR | libc::FAN_EVENT_ON_CHILD) != 0 {
                        rest.push(DecodedName::Named(named));
                    }
                }
                other => rest.push(other),
            }
        }
        rest
    }

    fn is_input(&self, named: &Named) -> bool {
        self.inputs().get(&named.directory).is_some_and(|input| input.name == named.name)
    }

    /// The next opening of a FIFO; `None` if there is none within `patience`.
    pub(crate) fn next(&self, patience: Duration) -> Option<Named> {
        threads::recv_timeout(&self.receive, patience).ok()
    }

    /// The container to whose terminal an opened FIFO leads, and whether its manager also
    /// opens it.
    pub(crate) fn of(&self, named: &Named) -> Option<(Arc<Watched>, bool)> {
        match self.inputs().get(&named.directory) {
            Some(input) if input.name == named.name => {
                Some((input.watched.clone(), input.is_handed_on))
            }
            Some(_) | None => None,
        }
    }
}
