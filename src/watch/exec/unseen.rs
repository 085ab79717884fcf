//! Describes, hashes and reports the programs of containers that the gate was not asked about.
//!
//! The `trace` thread finds them and hands them on; this thread describes their processes,
//! reads the files in slices, and drops the programs of container runtimes on their way in.
//! It must not decide whether the gate has seen an execution: `examine` does.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use jiff::Timestamp;

use crate::health::Failure;
use crate::model::{
    ContainerId, Fact, FileFact, FileState, Filesystem, Process, ProcessIdentity, Source, printable,
};
use crate::sys::door::{Held, Local};
use crate::sys::file::{self, Stat};
use crate::sys::perf::Mapped;
use crate::sys::procfs::Handle;
use crate::watch::core::copy::{self, Copy};
use crate::watch::core::fair::{self, Owned, Receiver};
use crate::watch::core::watched::Watched;
use crate::watch::files::paths;
use crate::watch::files::shared::Files;
use crate::watch::files::state::{self, Begun, Reading, Which};
use crate::watch::process::{describe, recorded};
use crate::watch::sessions::runtimes::Runtimes;

/// A program that was executed, and that the gate has not seen.
#[derive(Debug)]
pub(crate) struct Unseen {
    pub(crate) watched: Arc<Watched>,
    pub(crate) at: Timestamp,
    pub(crate) filesystem: Filesystem,
    /// As its process sees it, including ` (deleted)`.
    pub(crate) name: Vec<u8>,
    /// `None` if the process was gone. With the proof that the file can be read, if it can.
    pub(crate) file: Option<(Held, Option<Local>)>,
    pub(crate) handle: Option<Handle>,
    pub(crate) pid: u32,
    /// When it was executed, by the clock of the kernel's records.
    pub(crate) executed: u64,
    pub(crate) parent: Option<u32>,
    pub(crate) exec_name: Vec<u8>,
    /// The file is a script: its process runs an interpreter.
    pub(crate) is_script: bool,
    /// The program that the process or its parent ran before. Only if the parent is in no
    /// container.
    pub(crate) previous: Option<Arc<Mapped>>,
    pub(crate) is_parent_outside: bool,
    /// The container in whose root the program lies, if that is another container.
    pub(crate) file_of: Option<ContainerId>,
    pub(crate) progress: Option<Box<InProgress>>,
}

/// A program that is put aside between two slices of its reading. Its process has been
/// described.
#[derive(Debug)]
pub(crate) struct InProgress {
    process: Process,
    file: OwnedFd,
    reading: Reading,
}

impl Owned for Unseen {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// The thread: describes, hashes and reports each program.
pub(crate) fn run(shared: &Files, unseen: &Receiver<Box<Unseen>>) {
    let mut runtimes = Runtimes::default();
    let room = copy::room();
    // So that files are closed sooner. Without CAP_SYS_NICE it runs like the others.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(mut one) = shared.next_to_report(unseen) {
        let used = fair::processor_time();
        match read_on(shared, &room, &mut one) {
            Some((process, state)) => report(shared, &mut runtimes, *one, process, state),
            None => {
                unseen.put_back(one);
                shared.spend(fair::processor_time().saturating_sub(used));
                shared.keep_pace();
            }
        }
    }
}

/// Describes the process that has executed it, and then reads a slice of the file. Returns
/// `None` if there is more to read.
fn read_on(
    shared: &Files,
    room: &Arc<AtomicUsize>,
    unseen: &mut Unseen,
) -> Option<(Process, FileState)> {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let mut progress = match unseen.progress.take() {
        Some(progress) if shared.may_report() && !unseen.watched.is_detaching() => progress,
        Some(progress) => {
            let state = state::gone(unseen.filesystem == Filesystem::Anonymous);
            return Some((progress.process, state));
        }
        None => {
            let copied = copy(unseen, room, max_hash_bytes);
            // Before the file is hashed: the process may be ending.
            let mut process = describe(unseen, copied.as_ref().map(|(_, stat)| *stat));
            if process.argv.is_none() {
                // `trace` has read the record of the execution, and so that of the arguments.
                let Unseen { pid, executed, .. } = *unseen;
                process.argv = recorded::recorded(shared, pid, executed, executed);
            }
            if let Some((copy, stat)) = copied {
                return Some((process, state::of_copy(&copy, &stat)));
            }
            let Some((Held { fd, stat }, local)) = &unseen.file else {
                let state = state::gone(unseen.filesystem == Filesystem::Anonymous);
                return Some((process, state));
            };
            let Some(file) = state::reopen(fd.as_fd(), stat, *local) else {
                return Some((process, state::unopened(stat)));
            };
            match Reading::begin(file.as_fd(), stat, Which::Always, max_hash_bytes) {
                Begun::Known(state) => return Some((process, state)),
                Begun::Reads(reading) => Box::new(InProgress { process, file, reading }),
            }
        }
    };
    let begun = Instant::now();
    loop {
        if let Some(state) = progress.reading.step(progress.file.as_fd(), state::SLICE) {
            return Some((progress.process, state));
        }
        if begun.elapsed() >= fair::SLICE {
            unseen.progress = Some(progress);
            return None;
        }
    }
}

/// Copies a small file and closes it: an open file keeps its mount busy.
fn copy(unseen: &mut Unseen, room: &Arc<AtomicUsize>, max_hash_bytes: u64) -> Option<(Copy, Stat)> {
    let (Held { fd, stat }, local) = unseen.file.as_ref()?;
    if stat.size > max_hash_bytes {
        return None;
    }
    let readable = state::reopen(fd.as_fd(), stat, *local)?;
    let copied = (Copy::of(room, &readable, stat)?, *stat);
    unseen.file = None;
    Some(copied)
}

fn report(
    shared: &Files,
    runtimes: &mut Runtimes,
    unseen: Unseen,
    process: Process,
    state: FileState,
) {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let is_runtimes_own = unseen.is_parent_outside
        && match unseen.filesystem {
            Filesystem::Anonymous => runtimes.is_runtimes_own(
                unseen.previous.as_deref(),
                unseen.parent,
                &state,
                max_hash_bytes,
            ),
            // A runtime can also run from a mount that no other process sees.
            Filesystem::Volume => runtimes.is_installed(&state, max_hash_bytes),
            Filesystem::Tmpfs | Filesystem::Overlay | Filesystem::Container => false,
        };
    if is_runtimes_own {
        return;
    }
    let Unseen { watched, at, filesystem, name, exec_name, file_of, .. } = unseen;
    let is_nameless = filesystem == Filesystem::Anonymous || state.deleted;
    match paths::path(&name, is_nameless) {
        Ok(path) => {
            let fact = Fact::File(FileFact::Executed {
                invoked_as: describe::invoked_as(&exec_name, &path),
                path,
                filesystem,
                times: 1,
                running: false,
                denied: false,
                state,
                lower: None,
                process: Arc::new(process),
                layer_file: None,
                writer: None,
            });
            shared.observe_file_of(&watched, file_of, at, Source::Trace, fact);
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be determined: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
        }
    }
}

/// `copied` is the state of a file that was copied and is closed already.
fn describe(unseen: &Unseen, copied: Option<Stat>) -> Process {
    let Unseen { watched, name, handle, pid, parent, file, .. } = unseen;
    let stat = copied.or(file.as_ref().map(|(held, _)| held.stat));
    if let Some(handle) = handle {
        let mut process = describe::as_it_is(handle, watched);
        // It may run another program by now. With a script that is always another file.
        if !unseen.is_script
            && let Some(stat) = stat
            && let Ok(now) = handle.open_exe().and_then(file::stat)
            && (now.device, now.inode) != (stat.device, stat.inode)
        {
            process.exe = Some(printable(name));
            process.argv = None;
        }
        return process;
    }
    // The process is gone, but its parent may still be known.
    let ancestors = parent.map(|parent| describe::ancestors_from(parent, watched));
    Process {
        identity: ProcessIdentity { pid: *pid, start_time: 0 },
        exe: Some(printable(name)),
        argv: None,
        uid: None,
        tty: None,
        root: None,
        ancestors: ancestors.unwrap_or_default(),
    }
}
