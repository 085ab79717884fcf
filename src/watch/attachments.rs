//! Who is connected to the terminal of a container's init: whoever opens the FIFO
//! that leads to it, after the runtime did.
//!
//! The FIFO is the host's, and so is its directory, which is listened to. What is
//! handed on inside of one process (the kubelet's and Docker's way to attach) opens
//! nothing and is not seen.

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
use super::shared::Shared;
use super::table::Watched;
use crate::model::{Entry, Fact, Interactive, Opening, Source};
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
    pub(super) fn listen(&self, watched: &Arc<Watched>, fifo: &Path) -> io::Result<()> {
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
        inputs.insert(handle, Input { watched: watched.clone(), name });
        Ok(())
    }

    pub(super) fn run(&self, shared: &Shared) {
        let Some(group) = &self.group else { return };
        let mut buffer = Buffer::new();
        while !shared.is_stopping() {
            shared.wait_for(group.as_fd());
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
        let watched = match self.inputs().get(&named.directory) {
            Some(input) if input.name == named.name => input.watched.clone(),
            Some(_) | None => return,
        };
        let shim = procfs::read_stat(watched.init.pid).ok().map(|init| init.parent);
        if Some(named.pid) == shim {
            return;
        }
        let Ok(client) = Handle::open(named.pid) else { return };
        let root = client.identity();
        if shared.roots().is_open(root) {
            return;
        }
        let process = process::as_it_is(&client, &watched);
        let chain = procfs::chain(client.first_stat().parent);
        let known = process.ancestors.len();
        let opening = Opening {
            entry: Entry::Attach,
            interactive: Some(Interactive::Terminal),
            host: chain.iter().skip(known).map(process::ancestor).collect(),
            login: client.login(),
            requested_by: None,
            beside: None,
            process,
        };
        let fact = Fact::SessionOpened { opening: Arc::new(opening) };
        if shared.observe(&watched, Timestamp::now(), Source::Change, fact)
            && shared.roots().open(&watched.container, root)
        {
            let owned = watched.clone();
            let event = Event::Opened { watched: owned, root, is_interactive: true, process: None };
            shared.act(&watched, Act::Event(event));
        }
    }
}
