//! Programs of containers that the gate was not asked about: who ran them, and what
//! they hold. Also those that a look at the running processes finds.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use jiff::Timestamp;

use super::take;
use super::take::Copy;
use crate::health::Failure;
use crate::model::{
    Blake3Hash, ContainerId, Fact, FileState, Filesystem, HostilePath, Process, ProcessIdentity,
    RootfsPath, Source, printable,
};
use crate::sys::door::{self, Ground, Held, Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::perf::Mapped;
use crate::sys::procfs::{self, Handle};
use crate::watch::code::inspect;
use crate::watch::core::fair;
use crate::watch::core::fair::Owned;
use crate::watch::core::fair::Receiver;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;
use crate::watch::files::state;
use crate::watch::files::state::Begun;
use crate::watch::files::state::Reading;
use crate::watch::files::state::Which;
use crate::watch::process::deeds;
use crate::watch::process::describe;

/// A program that was executed, and that the gate has not seen.
#[derive(Debug)]
pub(in crate::watch) struct Unseen {
    pub(in crate::watch) watched: Arc<Watched>,
    pub(in crate::watch) at: Timestamp,
    pub(in crate::watch) filesystem: Filesystem,
    /// As its process sees it, ` (deleted)` and all.
    pub(in crate::watch) name: Vec<u8>,
    /// `None` if the process was gone. With the proof that it can be read, if it can.
    pub(in crate::watch) file: Option<(Held, Option<Local>)>,
    pub(in crate::watch) handle: Option<Handle>,
    pub(in crate::watch) pid: u32,
    /// When, by the clock of the kernel's records.
    pub(in crate::watch) executed: u64,
    pub(in crate::watch) parent: Option<u32>,
    pub(in crate::watch) exec_name: Vec<u8>,
    /// Its process runs an interpreter.
    pub(in crate::watch) is_script: bool,
    /// What the process, or who made it, ran before: only if who made it is in no
    /// container.
    pub(in crate::watch) previous: Option<Arc<Mapped>>,
    pub(in crate::watch) is_parent_outside: bool,
    /// The container in whose root the program lies, where that is another one.
    pub(in crate::watch) file_of: Option<ContainerId>,
    pub(in crate::watch) progress: Option<Box<InProgress>>,
}

/// A program whose process has been described and that is being read, put aside
/// between two slices.
#[derive(Debug)]
pub(in crate::watch) struct InProgress {
    process: Process,
    file: OwnedFd,
    reading: Reading,
}

impl Owned for Unseen {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// Describes and hashes what was executed.
pub(in crate::watch) fn run(shared: &Shared, unseen: &Receiver<Box<Unseen>>) {
    let mut runtimes = Runtimes::default();
    let room = take::room();
    // What it looks at is closed the sooner. Without CAP_SYS_NICE it runs like the others.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(mut one) = shared.next_to_tell(unseen) {
        let used = fair::processor_time();
        match read_on(shared, &room, &mut one) {
            Some((process, state)) => tell(shared, &mut runtimes, *one, process, state),
            None => {
                unseen.put_back(one);
                shared.spend(fair::processor_time().saturating_sub(used));
                shared.keep_pace();
            }
        }
    }
}

/// Describes who has executed it, and then reads a slice of what it holds. `None`:
/// there is more to read.
fn read_on(
    shared: &Shared,
    room: &Arc<AtomicUsize>,
    unseen: &mut Unseen,
) -> Option<(Process, FileState)> {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let mut progress = match unseen.progress.take() {
        Some(progress) if shared.may_tell() && !unseen.watched.is_detaching() => progress,
        Some(progress) => {
            let state = state::gone(unseen.filesystem == Filesystem::Anonymous);
            return Some((progress.process, state));
        }
        None => {
            let copied = copy(unseen, room, max_hash_bytes);
            // Before it is hashed: it may be ending.
            let mut process = describe(unseen, copied.as_ref().map(|(_, stat)| *stat));
            if process.argv.is_none() {
                // The record that it was handed on for has been read, and so has this one.
                let Unseen { pid, executed, .. } = *unseen;
                process.argv = describe::recorded(shared, pid, executed, executed);
            }
            if let Some((copy, stat)) = copied {
                return Some((process, state::of_copy(&copy, &stat)));
            }
            let Some((Held { fd, stat }, local)) = &unseen.file else {
                let state = state::gone(unseen.filesystem == Filesystem::Anonymous);
                return Some((process, state));
            };
            let Some(file) = reopen(fd.as_fd(), stat, *local) else {
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

/// Copies a small file and closes it: open, it keeps its mount busy.
fn copy(unseen: &mut Unseen, room: &Arc<AtomicUsize>, max_hash_bytes: u64) -> Option<(Copy, Stat)> {
    let (Held { fd, stat }, local) = unseen.file.as_ref()?;
    if stat.size > max_hash_bytes {
        return None;
    }
    let readable = reopen(fd.as_fd(), stat, *local)?;
    let copied = (Copy::of(room, &readable, stat)?, *stat);
    unseen.file = None;
    Some(copied)
}

fn tell(
    shared: &Shared,
    runtimes: &mut Runtimes,
    unseen: Unseen,
    process: Process,
    state: FileState,
) {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let is_runtimes_own = unseen.is_parent_outside
        && match unseen.filesystem {
            Filesystem::Anonymous => runtimes.is_runtimes_own(&unseen, &state, max_hash_bytes),
            // Or from a mount that nobody else sees.
            Filesystem::Volume => runtimes.is_installed(&state, max_hash_bytes),
            Filesystem::Tmpfs | Filesystem::Overlay | Filesystem::Container => false,
        };
    if is_runtimes_own {
        return;
    }
    let Unseen { watched, at, filesystem, name, exec_name, file_of, .. } = unseen;
    let is_nameless = filesystem == Filesystem::Anonymous || state.deleted;
    match path(&name, is_nameless) {
        Ok(path) => {
            let fact = Fact::Executed {
                invoked_as: describe::invoked_as(&exec_name, &path),
                path,
                filesystem,
                times: 1,
                running: false,
                state,
                lower: None,
                process: Arc::new(process),
                layer_file: None,
                writer: None,
            };
            shared.observe_file_of(&watched, file_of, at, Source::Trace, fact);
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be told: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
        }
    }
}

/// The state of a file that was opened only to ask what it is. Without the proof that
/// nobody can make us wait for it, that is what the kernel knows of it.
pub(in crate::watch) fn state_of(
    file: BorrowedFd<'_>,
    stat: &Stat,
    local: Option<Local>,
    max_hash_bytes: u64,
) -> FileState {
    match reopen(file, stat, local) {
        Some(file) => state::of(file.as_fd(), stat, Which::Always, max_hash_bytes),
        None => state::unopened(stat),
    }
}

/// Opens it for reading, if it can be read without waiting.
fn reopen(file: BorrowedFd<'_>, stat: &Stat, local: Option<Local>) -> Option<OwnedFd> {
    let readable = local.filter(|_| stat.is_regular());
    readable.and_then(|local| door::reopen(file, local).ok())
}

/// The path to tell of a file that the kernel names so.
pub(in crate::watch) fn path(name: &[u8], is_nameless: bool) -> Result<RootfsPath, HostilePath> {
    if !is_nameless {
        return RootfsPath::new(name);
    }
    // Only then: a file may be named so.
    RootfsPath::new(name.strip_suffix(file::DELETED).unwrap_or(name)).map(without_number)
}

/// Whether the kernel may have named a file so that never had a name.
pub(in crate::watch) fn has_a_number(path: &RootfsPath) -> bool {
    let number = path.file_name().strip_prefix(b"#").unwrap_or_default();
    !number.is_empty() && number.iter().all(u8::is_ascii_digit)
}

/// A file made with O_TMPFILE is named by its inode's number, which is another one
/// each time: many of the same are one finding.
pub(in crate::watch) fn without_number(path: RootfsPath) -> RootfsPath {
    if !has_a_number(&path) {
        return path;
    }
    let directory = path.parent().unwrap_or_else(RootfsPath::root);
    directory.join(b"#tmpfile").unwrap_or(path)
}

/// `copied` is what is known of a file that is closed already.
fn describe(unseen: &Unseen, copied: Option<Stat>) -> Process {
    let Unseen { watched, name, handle, pid, parent, file, .. } = unseen;
    let stat = copied.or(file.as_ref().map(|(held, _)| held.stat));
    if let Some(handle) = handle {
        let mut process = describe::as_it_is(handle, watched);
        // It may have gone on to another program meanwhile; a script's is another file.
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
    // Of a process that is gone, its parent still tells something.
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

/// Container runtimes execute themselves from a sealed copy in memory, so that no
/// container can overwrite them. Such a copy is known by its content.
#[derive(Debug, Default)]
pub(in crate::watch) struct Runtimes {
    hashes: HashMap<(u64, u64, crate::model::FileTime), Option<Blake3Hash>>,
}

/// Where runtimes are installed. Nothing is believed because of such a name: the
/// content that is executed must be the content found there.
const PLACES: [&str; 5] =
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec/crio"];
const NAMES: [&str; 4] = ["runc", "crun", "youki", "docker-runc"];

/// Whether a program has such a name: no more than a reason to look at it.
pub(in crate::watch) fn is_called_like_a_runtime(file_name: &[u8]) -> bool {
    let name = file_name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    NAMES.iter().any(|known| known.as_bytes() == name)
}

impl Runtimes {
    /// Whether a program in memory is the copy of a program of the host's: of what
    /// its process or who made it ran before, or of an installed runtime.
    fn is_runtimes_own(&mut self, unseen: &Unseen, state: &FileState, max: u64) -> bool {
        let previous = unseen.previous.as_deref().and_then(on_host);
        let Some(content) = state.blake3() else {
            // It is gone, like the process, which came from outside and ran a program
            // of the host's just before.
            return previous.is_some();
        };
        let of_parent = unseen.parent.and_then(|parent| {
            let fd = Handle::open(parent).ok()?.open_exe().ok()?;
            let stat = file::stat(&fd).ok()?;
            Some(Held { fd, stat })
        });
        previous
            .into_iter()
            .chain(of_parent)
            .any(|held| self.hash(&held, state.size, max) == Some(content))
            || self.is_installed(state, max)
    }

    /// Whether this is the content of a runtime that is installed on the host.
    pub(in crate::watch) fn is_installed(&mut self, state: &FileState, max: u64) -> bool {
        let Some(content) = state.blake3() else { return false };
        PLACES.iter().any(|place| {
            NAMES.iter().any(|name| {
                let Ok(held) = door::on_host(format!("{place}/{name}").as_bytes()) else {
                    return false;
                };
                self.hash(&held, state.size, max) == Some(content)
            })
        })
    }

    /// The hash of a program of the host's, if it is of this size at all.
    fn hash(&mut self, Held { fd, stat }: &Held, size: u64, max: u64) -> Option<Blake3Hash> {
        if stat.size != size || !stat.is_regular() {
            return None;
        }
        let key = (stat.device, stat.inode, stat.changed);
        if let Some(hash) = self.hashes.get(&key) {
            return *hash;
        }
        const MOST: usize = 64;
        if self.hashes.len() >= MOST {
            self.hashes.clear();
        }
        // Of a container's it would be no copy of the host's.
        let local = View::of([]).ground(stat).local();
        let hash = state_of(fd.as_fd(), stat, local, max).blake3();
        self.hashes.insert(key, hash);
        hash
    }
}

/// A mapped file by its name, if the host has the same file there.
fn on_host(mapped: &Mapped) -> Option<Held> {
    let held = door::on_host(&mapped.name).ok()?;
    ((held.stat.device, held.stat.inode) == (mapped.device, mapped.inode)).then_some(held)
}

/// What the programs of a container's running processes are, each file once.
#[derive(Debug, Default)]
pub(in crate::watch) struct Running {
    told: std::collections::HashSet<(u64, u64)>,
}

impl Running {
    /// Tells of a process whose program is not the image's, or may not be.
    pub(in crate::watch) fn tell(
        &mut self,
        shared: &Shared,
        runtimes: &mut Runtimes,
        watched: &Arc<Watched>,
        handle: &Handle,
    ) {
        use super::content::event_path;
        use crate::watch::core::table::Standing;
        // A kernel thread has none, and one that has ended none any more.
        let Ok(exe) = handle.open_exe() else { return };
        let Ok(stat) = file::stat(&exe) else { return };
        if !self.told.insert((stat.device, stat.inode)) {
            return;
        }
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let owner = shared.table.owner(&stat);
        let is_apart = |owner: &&Arc<Watched>| {
            deeds::is_apart(shared, watched, owner)
                // A runtime that runs in a container, on its way into one of its own.
                && !deeds::is_within(&shared.table, watched, owner)
        };
        let file_of = owner.as_ref().filter(is_apart).map(|owner| owner.container.clone());
        let is_overlays = owner.is_some() && file_of.is_none();
        let mut layer_file = None;
        let mut is_movable = false;
        let mut unread = None;
        if is_overlays && watched.has_foreign_layers() {
            let pid = handle.identity().pid;
            let Ok(path) = event_path(watched, &exe, &stat, pid, None) else { return };
            unread = inspect::of_unread(shared, watched, path, Some(&stat));
            if unread.is_none() {
                return;
            }
        } else if is_overlays {
            match watched.standing(&stat) {
                Standing::Own => (),
                Standing::Movable(file) => {
                    layer_file = Some(file);
                    is_movable = true;
                }
                Standing::Doubtful(file) if watched.layer_files().is_known() => {
                    layer_file = Some(file);
                }
                // It is looked at again when it is known what to trust.
                Standing::Doubtful(_) | Standing::Image => return,
            }
        }
        let at = Timestamp::now();
        let process = describe::as_it_is(handle, watched);
        let pid = handle.identity().pid;
        let name = handle.exe().unwrap_or_default();
        let ground = if is_overlays {
            Ground::Disk
        } else {
            let init = Handle::open_exactly(watched.init).ok();
            View::of(std::iter::once(handle).chain(&init)).ground(&stat)
        };
        let filesystem = if is_overlays {
            Filesystem::Overlay
        } else if file_of.is_some() {
            Filesystem::Container
        } else if handle.has_host_root() {
            return;
        } else if door::memfd_device() == Some(stat.device) || name.starts_with(b"/memfd:") {
            Filesystem::Anonymous
        } else if ground == Ground::Memory {
            Filesystem::Tmpfs
        } else {
            Filesystem::Volume
        };
        if !shared.settings.looks_at(filesystem) {
            return;
        }
        let path = if is_overlays {
            let parent = handle.first_stat().parent;
            match event_path(watched, &exe, &stat, pid, Some(parent)) {
                Ok(path) => Ok(path),
                Err(why) => Err(why.to_string()),
            }
        } else {
            let is_nameless = filesystem == Filesystem::Anonymous || stat.links == 0;
            path(&name, is_nameless).map_err(|why| why.to_string())
        };
        let path = match path {
            Ok(path) => path,
            Err(why) => {
                let detail = format!("the path of a running program cannot be told: {why}");
                shared.lose(Failure::EventUnreadable, Some(watched), &detail);
                return;
            }
        };
        if is_movable && super::content::is_where_the_image_has_it(watched, &path, &stat) {
            return;
        }
        let known = layer_file.and_then(|file| watched.layer_files().known(&file));
        let state = known
            .or(unread.map(|code| code.state))
            .unwrap_or_else(|| state_of(exe.as_fd(), &stat, ground.local(), max_hash_bytes));
        drop(exe);
        let is_from_outside = || {
            procfs::mount_namespace_of(handle.first_stat().parent)
                .is_ok_and(procfs::is_host_mount_namespace)
        };
        if matches!(filesystem, Filesystem::Anonymous | Filesystem::Volume)
            && is_from_outside()
            && runtimes.is_installed(&state, max_hash_bytes)
        {
            // It has not become the container's program, or the session's, yet.
            return;
        }
        let lower = match layer_file {
            None if is_overlays => watched
                .layers()
                .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes)),
            Some(_) | None => None,
        };
        if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
            // First, so that its judgement finds it.
            watched.layer_files_mut().tell(layer_file, state.clone(), at);
        }
        let fact = Fact::Executed {
            invoked_as: None,
            path,
            filesystem,
            times: 1,
            running: true,
            state,
            lower,
            process: Arc::new(process),
            layer_file,
            writer: None,
        };
        let is_told = shared.observe_file_of(watched, file_of, at, Source::Scan, fact);
        if let Some(layer_file) = layer_file
            && !is_told
        {
            watched.layer_files_mut().judge(&layer_file, crate::watch::core::trust::Verdict::Lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, is_nameless: bool, expected: &str) {
        let path = path(name.as_bytes(), is_nameless).unwrap();
        assert_eq!(path, RootfsPath::new(expected).unwrap());
    }

    #[test]
    fn what_has_no_name_is_told_by_what_the_kernel_calls_it() {
        check("/memfd:a (deleted)", true, "/memfd:a");
        check("/tmp/#4711 (deleted)", true, "/tmp/#tmpfile");
        check("/tmp/#47x (deleted)", true, "/tmp/#47x");
        check("/#4711", true, "/#tmpfile");
        check("/tmp/#4711", false, "/tmp/#4711");
        check("/tmp/x (deleted)", false, "/tmp/x (deleted)");
    }
}
