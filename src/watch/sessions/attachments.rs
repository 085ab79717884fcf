//! Who is connected to the terminal of a container's init: whoever opens the FIFO
//! that leads to it, after the runtime did.
//!
//! The FIFO is the host's, and so is its directory, which is listened to. Who attaches
//! through a process that has it open already is seen by `terminals`.
//!
//! The marks are in the group of `names`, which reads it and hands on what is for here. A
//! directory that both listen to has one mark, with what both listen for.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;

use super::acts::Act;
use super::acts::Event;
use crate::health::Failure;
use crate::model::{
    Ancestor, Entry, Fact, Interactive, Login, Opening, Process, ProcessIdentity, Source,
};
use crate::sys::fanotify::{DecodedName, Group, Named};
use crate::sys::file;
use crate::sys::handle::FileHandle;
use crate::sys::procfs::{self, Handle};
use crate::threads;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;
use crate::watch::process::describe;
use crate::watch::process::roots::Arrival;

/// FIFOs that are listened to at once.
const MAX_INPUTS: usize = 1024;

/// FIFOs that were opened and wait to be looked at.
const QUEUE: usize = 1024;

/// Without anything to do, the thread still checks whether it is to end.
const TURN: Duration = Duration::from_millis(500);

/// The process that starts a container opens the input within this time.
const START: Duration = Duration::from_secs(10);

/// What a directory with a FIFO is listened to for.
const MASK: u64 = libc::FAN_OPEN | libc::FAN_EVENT_ON_CHILD;

/// Listens to the inputs of terminals.
pub(in crate::watch) struct Attachments {
    /// `None` where the kernel cannot report names, or makes no more groups.
    group: Option<Arc<Group>>,
    inputs: Mutex<HashMap<FileHandle, Input>>,
    send: Sender<Named>,
    receive: Receiver<Named>,
}

struct Input {
    watched: Arc<Watched>,
    name: Box<[u8]>,
    /// Its manager opens it too, whenever that is started again.
    is_handed_on: bool,
}

impl Attachments {
    /// `group` is read by `names`, which also says if it is missing.
    pub(in crate::watch) fn new(group: Option<Arc<Group>>) -> Attachments {
        let (send, receive) = bounded(QUEUE);
        Attachments { group, inputs: Mutex::default(), send, receive }
    }

    fn inputs(&self) -> MutexGuard<'_, HashMap<FileHandle, Input>> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it is told who opens this FIFO.
    pub(in crate::watch) fn listen(
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

    /// What may be taken off the mark of this directory of all that is in `mask`, done by
    /// `unmark`: what is listened for here stays.
    pub(in crate::watch) fn unmark_the_rest(
        &self,
        directory: &OwnedFd,
        mask: u64,
        unmark: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        // Locked, so that the directory is not marked in between.
        let inputs = self.inputs();
        let is_shared = !inputs.is_empty()
            && FileHandle::of(directory).is_ok_and(|handle| inputs.contains_key(&handle));
        unmark(if is_shared { mask & !MASK } else { mask })
    }

    /// Takes from events what was listened for here, and leaves the rest.
    pub(in crate::watch) fn take(
        &self,
        shared: &Shared,
        events: Vec<DecodedName>,
    ) -> Vec<DecodedName> {
        let mut rest = Vec::with_capacity(events.len());
        for event in events {
            match event {
                DecodedName::Named(mut named) if named.mask & libc::FAN_OPEN != 0 => {
                    let opened = Some(&named).filter(|named| self.is_input(named)).cloned();
                    if opened.is_some_and(|opened| self.send.try_send(opened).is_err()) {
                        let detail = "who attached to a terminal was not looked at";
                        shared.lose(Failure::ProcessQueueFull, None, detail);
                    }
                    // The kernel merges what one process does to one name.
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

    pub(in crate::watch) fn run(&self, shared: &Shared) {
        while !shared.is_stopping() {
            if let Ok(named) = threads::recv_timeout(&self.receive, TURN) {
                self.opened(shared, &named);
            }
        }
    }

    fn opened(&self, shared: &Shared, named: &Named) {
        let (watched, is_handed_on) = match self.inputs().get(&named.directory) {
            Some(input) if input.name == named.name => (input.watched.clone(), input.is_handed_on),
            Some(_) | None => return,
        };
        let shim = procfs::read_stat(watched.init.pid).ok().map(|init| init.parent);
        if Some(named.pid) == shim {
            return;
        }
        let Ok(client) = Handle::open(named.pid) else { return };
        let root = client.identity();
        if has_started(root, watched.init, procfs::age(watched.init)) {
            return;
        }
        // A person has a terminal, and a manager that takes up its work again has none.
        if is_handed_on && client.first_stat().tty().is_none() {
            return;
        }
        if shared.roots().is_open(root) {
            return;
        }
        let process = describe::as_it_is(&client, &watched);
        let chain = procfs::chain(client.first_stat().parent);
        let known = process.ancestors.len();
        let host = chain.iter().skip(known).map(describe::ancestor).collect();
        let fact = opened(root, process, host, client.login());
        shared.note_session(&watched);
        let at = Timestamp::now();
        if shared.observe(&watched, at, Source::Change, fact)
            && shared.roots().open(&watched.container, root)
        {
            let arrival = Arrival { session: root, at, ticks: procfs::ticks_since_boot() };
            shared.roots().came_to_terminal(&watched.container, watched.init, arrival);
            let owned = watched.clone();
            let event = Event::Opened { watched: owned, root, is_interactive: true, process: None };
            shared.act(&watched, Act::Event(event));
        }
    }
}

/// Whether a process may have started the container: it was there before the container's
/// init, which has just begun. On a busy node it opens the input later than it is listened
/// to.
fn has_started(client: ProcessIdentity, init: ProcessIdentity, age: Duration) -> bool {
    client.start_time <= init.start_time && age < START
}

/// Somebody is at the terminal of a container's init.
pub(in crate::watch) fn opened(
    root: ProcessIdentity,
    process: Process,
    host: Vec<Ancestor>,
    login: Option<Login>,
) -> Fact {
    let opening = Opening {
        root,
        entry: Entry::Attach,
        interactive: Some(Interactive::Terminal),
        process,
        host,
        login,
        requested_by: None,
        beside: None,
    };
    Fact::SessionOpened { opening: Arc::new(opening) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_starts_a_container_does_not_attach_to_it() {
        let process = |start_time| ProcessIdentity { pid: 1, start_time };
        let (before, init, after) = (process(999_990), process(1_000_000), process(1_000_010));
        let seconds = Duration::from_secs;
        assert!(has_started(before, init, seconds(0)));
        assert!(has_started(before, init, seconds(9)));
        // A program that has been open for long attaches as well.
        assert!(!has_started(before, init, seconds(11)));
        assert!(!has_started(after, init, seconds(1)));
    }
}
