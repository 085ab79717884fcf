//! Who is connected to the terminal of a container's init: whoever opens the FIFO
//! that leads to it, after the runtime did.
//!
//! The FIFO is the host's, and so is its directory, which is listened to. Who attaches
//! through a process that has it open already is seen by `terminals`.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use rustix::io::Errno;

use super::acts::{Act, Event};
use super::process;
use super::roots::Arrival;
use super::shared::Shared;
use super::table::Watched;
use crate::model::{
    Ancestor, Entry, Fact, Interactive, Login, Opening, Process, ProcessIdentity, Source,
};
use crate::sys::fanotify::{Buffer, DecodedName, Group, Named, ReadError};
use crate::sys::file;
use crate::sys::handle::FileHandle;
use crate::sys::procfs::{self, Handle};

/// FIFOs that are listened to at once.
const MAX_INPUTS: usize = 1024;

/// Listens to the inputs of terminals.
pub(super) struct Attachments {
    /// `None` where the kernel cannot tell names.
    group: Option<Group>,
    inputs: Mutex<HashMap<FileHandle, Input>>,
}

struct Input {
    watched: Arc<Watched>,
    name: Box<[u8]>,
    /// Its manager opens it too, whenever that is started again.
    is_handed_on: bool,
}

impl Attachments {
    pub(super) fn new() -> Attachments {
        // That it is missing is said once, by who listens to names.
        Attachments { group: Group::names().ok(), inputs: Mutex::default() }
    }

    fn inputs(&self) -> MutexGuard<'_, HashMap<FileHandle, Input>> {
        self.inputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it is told who opens this FIFO.
    pub(super) fn listen(
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
        group.mark_children(directory.as_fd(), libc::FAN_OPEN)?;
        let name = name.as_bytes().into();
        inputs.insert(handle, Input { watched: watched.clone(), name, is_handed_on });
        Ok(())
    }

    pub(super) fn run(&self, shared: &Shared) {
        let Some(group) = &self.group else { return };
        let mut buffer = Buffer::new();
        while !shared.is_stopping() {
            shared.wait_for(group, None);
            match group.read_names(&mut buffer) {
                Ok(events) => {
                    for event in events {
                        // Without a name, or too many: nobody is told who attached.
                        let DecodedName::Named(named) = event else { continue };
                        self.opened(shared, &named);
                    }
                }
                Err(ReadError::Os(err)) if Errno::from_io_error(&err) == Some(Errno::AGAIN) => (),
                Err(err) => {
                    tracing::warn!("who attaches to terminals is not seen any more: {err}");
                    return;
                }
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
        // A person has a terminal, and a manager that takes up its work again has none.
        if is_handed_on && client.first_stat().tty().is_none() {
            return;
        }
        if shared.roots().is_open(root) {
            return;
        }
        let process = process::as_it_is(&client, &watched);
        let chain = procfs::chain(client.first_stat().parent);
        let known = process.ancestors.len();
        let host = chain.iter().skip(known).map(process::ancestor).collect();
        let fact = opened(root, process, host, client.login());
        watched.set_has_sessions();
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

/// Somebody is at the terminal of a container's init.
pub(super) fn opened(
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
