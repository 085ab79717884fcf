//! Code that is not executed itself, as a file: whose it is and what it holds.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{
    ContainerId, Content, FileState, FileTime, Filesystem, LowerTwin, RootfsPath, Unhashed,
};
use crate::sys::door::{self, Ground, Held, Listed, Local, Way};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::procfs::Handle;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Standing;
use crate::watch::core::table::Watched;
use crate::watch::exec::content::event_path;
use crate::watch::exec::writable;
use crate::watch::files::lower;
use crate::watch::files::state;
use crate::watch::files::state::Which;
use crate::watch::process::deeds;

/// A file of code that is not known to be the image's own.
#[derive(Clone, Debug)]
pub(in crate::watch) struct Code {
    pub(in crate::watch) path: RootfsPath,
    pub(in crate::watch) filesystem: Filesystem,
    pub(in crate::watch) state: FileState,
    pub(in crate::watch) lower: Option<LowerTwin>,
    /// The container in whose root it lies, where that is another one.
    pub(in crate::watch) file_of: Option<ContainerId>,
}

/// Hashes of such files, so that one that is loaded all the time is read once in a
/// while and not each time.
///
/// Only for a while, because its ctime does not tell everything: stores through a
/// shared mapping into a page that was dirty already leave it as it was.
#[derive(Debug, Default)]
pub(in crate::watch) struct Hashed {
    known: Mutex<HashMap<Key, Known>>,
}

/// What a file cannot change without changing this, short of such stores.
type Key = (u64, u64, FileTime, u64);

#[derive(Debug)]
struct Known {
    state: FileState,
    until: Instant,
}

/// More files than this are not remembered.
const MAX_KNOWN: usize = 4096;

/// How long a hash is good for at least; and how many times longer than it took,
/// so that hashing one file over and over takes a twentieth of a processor.
const GOOD_FOR: Duration = Duration::from_secs(1);
const TIMES_ITS_COST: u32 = 20;

/// A filesystem's clock may stand still for this long.
const SETTLED: Duration = Duration::from_millis(100);

fn key(stat: &Stat) -> Key {
    (stat.device, stat.inode, stat.changed, stat.size)
}

impl Hashed {
    /// What a file holds that is executed again and again; `None` if that is not known
    /// for certain. It cannot be executed while it is open for writing, and has another
    /// ctime after that.
    pub(in crate::watch) fn of_executed(&self, stat: &Stat) -> Option<FileState> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get(&key(stat)).filter(|known| known.until > Instant::now())?;
        Some(FileState { deleted: stat.links == 0, ..known.state.clone() })
    }

    /// Remembers what an executed file holds, unless another change of it might have
    /// the same time.
    pub(in crate::watch) fn remember_executed(&self, stat: &Stat, state: &FileState) {
        let is_hashed = matches!(state.content, Content::Hashed { .. });
        let is_settled = stat.age().is_some_and(|age| age > SETTLED);
        if is_hashed && is_settled {
            self.remember(key(stat), state.clone(), Instant::now() + GOOD_FOR);
        }
    }

    fn remember(&self, key: Key, state: FileState, until: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(key, Known { state, until });
    }

    fn state(&self, file: &OwnedFd, stat: &Stat, local: Local, max_hash_bytes: u64) -> FileState {
        let key = key(stat);
        let begun = Instant::now();
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = known.get(&key).filter(|known| known.until > begun) {
                let mut state = known.state.clone();
                state.deleted = stat.links == 0;
                return state;
            }
        }
        let Ok(readable) = door::reopen(file.as_fd(), local) else {
            return state::unopened(stat);
        };
        let state = state::of(readable.as_fd(), stat, Which::Always, max_hash_bytes);
        let until = Instant::now() + GOOD_FOR.max(begun.elapsed() * TIMES_ITS_COST);
        self.remember(key, state.clone(), until);
        state
    }
}

/// What the kernel calls a memfd, without what it adds to the name.
pub(in crate::watch) fn memfd_name(device: u64, name: &[u8]) -> Option<&[u8]> {
    let name = name.strip_suffix(b" (deleted)")?;
    (name.starts_with(b"/memfd:") && door::memfd_device() == Some(device)).then_some(name)
}

/// What a file of code is.
#[derive(Debug)]
pub(in crate::watch) enum Look {
    /// The image's own, as far as anybody knows.
    Image,
    Code(Code),
    /// It lies on a filesystem of the host that the container does not see: a library of
    /// its runtime, which is on its way in; or the container has detached the mount.
    Hosts(Code),
    /// No file with content, or the file of who is not in the container yet.
    Nothing,
}

/// Looks at a file by a descriptor that was opened only for that.
pub(in crate::watch) fn look_at(
    shared: &Shared,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Look {
    try_to_look_at(shared, watched, handle, fd).unwrap_or(Look::Nothing)
}

fn try_to_look_at(
    shared: &Shared,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Option<Look> {
    let stat = file::stat(fd).ok()?;
    if !stat.is_regular() {
        return None;
    }
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let owner = shared.table.owner(&stat);
    if let Some(owner) = owner.as_ref().filter(|owner| deeds::is_apart(shared, watched, owner)) {
        let path = RootfsPath::new(&file::name_of(fd.as_fd()).ok()?).ok()?;
        let state = match owner.local() {
            Some(local) => shared.hashed.state(fd, &stat, local, max_hash_bytes),
            None => state::unopened(&stat),
        };
        let (filesystem, file_of) = (Filesystem::Container, Some(owner.container.clone()));
        return Some(Look::Code(Code { path, filesystem, state, lower: None, file_of }));
    }
    if owner.is_some_and(|owner| Arc::ptr_eq(&owner, watched)) {
        if watched.has_foreign_layers() {
            let pid = handle.map_or(watched.init.pid, |handle| handle.identity().pid);
            let path = event_path(watched, fd, &stat, pid, None).ok()?;
            return Some(match of_unread(shared, watched, path, Some(&stat)) {
                Some(code) => Look::Code(code),
                None => Look::Image,
            });
        }
        match watched.standing(&stat) {
            Standing::Own => (),
            Standing::Doubtful(_) | Standing::Movable(_) | Standing::Image => {
                return Some(Look::Image);
            }
        }
        let pid = handle.map_or(watched.init.pid, |handle| handle.identity().pid);
        let path = event_path(watched, fd, &stat, pid, None).ok()?;
        let state = shared.hashed.state(fd, &stat, Local::by_layers(), max_hash_bytes);
        let could_change = writable::has_writer(watched, &path, &stat);
        let state = FileState { could_change, ..state };
        let lower = watched
            .layers()
            .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes));
        let (filesystem, file_of) = (Filesystem::Overlay, None);
        return Some(Look::Code(Code { path, filesystem, state, lower, file_of }));
    }
    let name = file::name_of(fd.as_fd()).ok()?;
    let is_memfd = memfd_name(stat.device, &name);
    if is_memfd.is_none() && handle.is_some_and(Handle::has_host_root) {
        return None;
    }
    let init = Handle::open_exactly(watched.init).ok();
    let view = watched.view(handle.into_iter().chain(&init));
    let ground = view.ground(&stat);
    let filesystem = match (is_memfd, ground) {
        (Some(_), _) => Filesystem::Anonymous,
        (None, Ground::Memory) => Filesystem::Tmpfs,
        (None, Ground::Disk | Ground::Kernel | Ground::Process | Ground::Foreign) => {
            Filesystem::Volume
        }
    };
    if !shared.settings.looks_at(filesystem) {
        return None;
    }
    let path = match is_memfd {
        Some(name) => name,
        None if stat.links == 0 => name.strip_suffix(file::DELETED).unwrap_or(&name),
        None => &name,
    };
    let path = RootfsPath::new(path).ok()?;
    let state = match ground.local() {
        Some(local) => shared.hashed.state(fd, &stat, local, max_hash_bytes),
        // Whoever answers for it might never.
        None => state::unopened(&stat),
    };
    let code = Code { path, filesystem, state, lower: None, file_of: None };
    let is_hosts = is_memfd.is_none() && view.listed(&stat) == Listed::ByHost;
    Some(if is_hosts { Look::Hosts(code) } else { Look::Code(code) })
}

/// The file of a library. `None` if it is the image's own, its runtime's, or no file with
/// content.
pub(in crate::watch) fn of_descriptor(
    shared: &Shared,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Option<Code> {
    match look_at(shared, watched, handle, fd) {
        Look::Code(code) => Some(code),
        Look::Image | Look::Hosts(_) | Look::Nothing => None,
    }
}

/// Looks up a name as a process does whose root is that of `handle`.
pub(in crate::watch) fn open_in(
    watched: &Watched,
    handle: &Handle,
    name: &[u8],
) -> Option<OwnedFd> {
    let view = watched.view([handle]);
    match door::walk(handle.open_root().ok()?, None, name, &view) {
        Ok(Way::Found(Held { fd, .. })) => Some(fd),
        Ok(Way::Foreign(_) | Way::Process(_)) | Err(_) => None,
    }
}

/// A file that lies where nobody may ask for it.
pub(in crate::watch) fn unasked(path: RootfsPath) -> Code {
    let state =
        FileState { content: Content::Unhashed(Unhashed::Unreadable), ..state::gone(false) };
    Code { path, filesystem: Filesystem::Volume, state, lower: None, file_of: None }
}

/// What is left to tell of a file that nobody can look at any more.
pub(in crate::watch) fn gone(path: RootfsPath, filesystem: Filesystem) -> Code {
    Code { path, filesystem, state: state::gone(true), lower: None, file_of: None }
}

/// A file of the container's own layer, by its name there.
#[derive(Debug)]
pub(in crate::watch) enum Upper {
    /// It has this inode in its own filesystem.
    File {
        fd: OwnedFd,
        stat: Stat,
    },
    /// Something that hides what the image has.
    Hidden,
    Absent,
    /// There is no telling.
    Unknown,
}

pub(in crate::watch) fn upper(watched: &Watched, path: &RootfsPath) -> Upper {
    let Some(layers) = watched.layers() else { return Upper::Unknown };
    let Ok(directory) = file::open_directory(&layers.dirs.upperdir) else { return Upper::Unknown };
    match file::open_path_beneath(&directory, path.relative()) {
        Ok(fd) => match file::stat(&fd) {
            Ok(stat) if stat.is_regular() => {
                // Only its metadata is the container's own. (A path descriptor has no
                // attributes to read.)
                let Ok(readable) = door::reopen(fd.as_fd(), Local::by_layers()) else {
                    return Upper::Unknown;
                };
                match overlay::is_metacopy(&readable, layers.userxattr) {
                    Ok(true) => Upper::Absent,
                    Ok(false) | Err(_) => Upper::File { fd, stat },
                }
            }
            Ok(_) => Upper::Hidden,
            Err(_) => Upper::Unknown,
        },
        Err(err) => match err.raw_os_error() {
            Some(libc::ENOENT) => Upper::Absent,
            _ => Upper::Hidden,
        },
    }
}

/// The container's own file as it is in its layer.
pub(in crate::watch) fn of_upper(
    shared: &Shared,
    watched: &Watched,
    path: RootfsPath,
    fd: &OwnedFd,
    stat: &Stat,
) -> Code {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let state = shared.hashed.state(fd, stat, Local::by_layers(), max_hash_bytes);
    let could_change = writable::has_writer(watched, &path, stat);
    let state = FileState { could_change, ..state };
    let lower = watched
        .layers()
        .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes));
    Code { path, filesystem: Filesystem::Overlay, state, lower, file_of: None }
}

/// A file of a root whose layers are not read: by what the upper layer has at its path.
/// `None` if that is nothing: then it is the image's, as far as anybody can know. `stat` is
/// the overlay's own word for the file, where there is one.
pub(in crate::watch) fn of_unread(
    shared: &Shared,
    watched: &Watched,
    path: RootfsPath,
    stat: Option<&Stat>,
) -> Option<Code> {
    match upper(watched, &path) {
        Upper::File { fd, stat } => Some(of_upper(shared, watched, path, &fd, &stat)),
        Upper::Hidden | Upper::Absent | Upper::Unknown => {
            // Its name is gone. What was made in the upper layer has its times.
            let stat = stat.filter(|stat| stat.links == 0)?;
            let is_own = watched.standing(stat) == Standing::Own;
            is_own.then(|| Code { state: state::unopened(stat), ..gone(path, Filesystem::Overlay) })
        }
    }
}

/// The inode that the image's layers have at a path, and its device.
pub(in crate::watch) fn image_inode(watched: &Watched, path: &RootfsPath) -> Option<(u64, u64)> {
    lower::inode(watched.layers()?, path)
}
