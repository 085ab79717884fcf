//! Files of code that are not executed themselves: whether a file is the image's and what it
//! holds.
//!
//! [`examine`] decides whether a file is the image's, the host's, or code to be reported, and
//! hashes it. It works on descriptors that were opened for this only. A filesystem that may
//! never respond is not read. `libraries`, `interpreters` and the wing `exec` use it.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use crate::model::{
    ContainerId, Content, CouldChange, FileState, Filesystem, LowerTwin, RootfsPath, Unhashed,
};
use crate::sys::door::{self, Ground, Listed, Local};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::procfs::Handle;
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::files::shared::Files;
use crate::watch::files::{lower, paths, state, upper};
use crate::watch::process::attribution;

/// A file of code that is not known to be the image's own.
#[derive(Clone, Debug)]
pub(crate) struct Code {
    pub(crate) path: RootfsPath,
    pub(crate) filesystem: Filesystem,
    pub(crate) state: FileState,
    pub(crate) lower: Option<LowerTwin>,
    /// The container in whose root it lies, where that is another one.
    pub(crate) file_of: Option<ContainerId>,
}

/// The name of a memfd, without the suffix that the kernel adds.
pub(crate) fn memfd_name(device: u64, name: &[u8]) -> Option<&[u8]> {
    let name = name.strip_suffix(b" (deleted)")?;
    (name.starts_with(b"/memfd:") && door::memfd_device() == Some(device)).then_some(name)
}

/// What a file of code is.
#[derive(Debug)]
pub(crate) enum Examined {
    /// The image's own, as far as is known.
    Image,
    Code(Code),
    /// It lies on a filesystem of the host that the container does not see: a library of
    /// its runtime, which is on its way in; or the container has detached the mount.
    Hosts(Code),
    /// No file with content, or the file of a process that is not in the container yet.
    Nothing,
}

/// Examines a file by a descriptor that was opened only for that.
pub(crate) fn examine(
    shared: &Files,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Examined {
    try_to_examine(shared, watched, handle, fd).unwrap_or(Examined::Nothing)
}

fn try_to_examine(
    shared: &Files,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Option<Examined> {
    let stat = file::stat(fd).ok()?;
    if !stat.is_regular() {
        return None;
    }
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let owner = shared.table.owner(&stat);
    if let Some(owner) =
        owner.as_ref().filter(|owner| attribution::is_apart(shared, watched, owner))
    {
        let path = RootfsPath::new(&file::name_of(fd.as_fd()).ok()?).ok()?;
        let state = match owner.local() {
            Some(local) => shared.hashed.state(fd, &stat, local, max_hash_bytes),
            None => state::unopened(&stat),
        };
        let (filesystem, file_of) = (Filesystem::Container, Some(owner.container.clone()));
        return Some(Examined::Code(Code { path, filesystem, state, lower: None, file_of }));
    }
    if owner.is_some_and(|owner| Arc::ptr_eq(&owner, watched)) {
        return examine_own(shared, watched, handle, fd, &stat);
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
        // The process or the network that serves this filesystem may never respond.
        None => state::unopened(&stat),
    };
    let code = Code { path, filesystem, state, lower: None, file_of: None };
    let is_hosts = is_memfd.is_none() && view.listed(&stat) == Listed::ByHost;
    Some(if is_hosts { Examined::Hosts(code) } else { Examined::Code(code) })
}

/// The same, for a file on the container's own overlay.
fn examine_own(
    shared: &Files,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
    stat: &Stat,
) -> Option<Examined> {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    if watched.has_foreign_layers() {
        let pid = handle.map_or(watched.init.pid, |handle| handle.identity().pid);
        let path = paths::event_path(watched, fd, stat, pid, None).ok()?;
        return Some(match of_unread(shared, watched, path, Some(stat)) {
            Some(code) => Examined::Code(code),
            None => Examined::Image,
        });
    }
    match watched.standing(stat) {
        Standing::Own => (),
        Standing::Doubtful(_) | Standing::Movable(_) | Standing::Image => {
            return Some(Examined::Image);
        }
    }
    let pid = handle.map_or(watched.init.pid, |handle| handle.identity().pid);
    let path = paths::event_path(watched, fd, stat, pid, None).ok()?;
    let state = shared.hashed.state(fd, stat, Local::by_layers(), max_hash_bytes);
    let could_change = match upper::has_writer(watched, &path, stat) {
        true => CouldChange::HadWriter,
        false => CouldChange::No,
    };
    let state = FileState { could_change, ..state };
    let lower = watched
        .layers()
        .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes));
    let (filesystem, file_of) = (Filesystem::Overlay, None);
    Some(Examined::Code(Code { path, filesystem, state, lower, file_of }))
}

/// The file of a library. `None` if it is the image's own, its runtime's, or no file with
/// content.
pub(crate) fn of_descriptor(
    shared: &Files,
    watched: &Arc<Watched>,
    handle: Option<&Handle>,
    fd: &OwnedFd,
) -> Option<Code> {
    match examine(shared, watched, handle, fd) {
        Examined::Code(code) => Some(code),
        Examined::Image | Examined::Hosts(_) | Examined::Nothing => None,
    }
}

/// A file on a filesystem that must not be asked.
pub(crate) fn unasked(path: RootfsPath) -> Code {
    let state =
        FileState { content: Content::Unhashed(Unhashed::Unreadable), ..state::gone(false) };
    Code { path, filesystem: Filesystem::Volume, state, lower: None, file_of: None }
}

/// What is left to report of a file that cannot be read any more.
pub(crate) fn gone(path: RootfsPath, filesystem: Filesystem) -> Code {
    Code { path, filesystem, state: state::gone(true), lower: None, file_of: None }
}

/// A file of the container's own layer, by its name there.
#[derive(Debug)]
pub(crate) enum Upper {
    /// It has this inode in its own filesystem.
    File {
        fd: OwnedFd,
        stat: Stat,
    },
    /// Something that hides what the image has.
    Hidden,
    Absent,
    /// It cannot be determined.
    Unknown,
}

pub(crate) fn upper(watched: &Watched, path: &RootfsPath) -> Upper {
    let Some(layers) = watched.layers() else { return Upper::Unknown };
    let Ok(directory) = file::open_directory(&layers.dirs.upperdir) else { return Upper::Unknown };
    match file::open_path_beneath(&directory, path.relative()) {
        Ok(fd) => match file::stat(&fd) {
            Ok(stat) if stat.is_regular() => {
                // A metacopy has only its metadata in the container's layer. (A path
                // descriptor has no attributes to read.)
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

/// The container's own file, as it is in the container's layer.
pub(crate) fn of_upper(
    shared: &Files,
    watched: &Watched,
    path: RootfsPath,
    fd: &OwnedFd,
    stat: &Stat,
) -> Code {
    let max_hash_bytes = shared.settings.max_hash_bytes;
    let state = shared.hashed.state(fd, stat, Local::by_layers(), max_hash_bytes);
    let could_change = match upper::has_writer(watched, &path, stat) {
        true => CouldChange::HadWriter,
        false => CouldChange::No,
    };
    let state = FileState { could_change, ..state };
    let lower = watched
        .layers()
        .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes));
    Code { path, filesystem: Filesystem::Overlay, state, lower, file_of: None }
}

/// A file of a root whose layers are not read, by what the upper layer has at its path.
/// `None` if the upper layer has nothing: then it is the image's, as far as can be known.
/// `stat` is the overlay's own metadata of the file, if there is any.
pub(crate) fn of_unread(
    shared: &Files,
    watched: &Watched,
    path: RootfsPath,
    stat: Option<&Stat>,
) -> Option<Code> {
    match upper(watched, &path) {
        Upper::File { fd, stat } => Some(of_upper(shared, watched, path, &fd, &stat)),
        Upper::Hidden | Upper::Absent | Upper::Unknown => {
            // Its name is gone. A file that was created in the upper layer is known by its
            // times.
            let stat = stat.filter(|stat| stat.links == 0)?;
            let is_own = watched.standing(stat) == Standing::Own;
            is_own.then(|| Code { state: state::unopened(stat), ..gone(path, Filesystem::Overlay) })
        }
    }
}

/// The inode that the image's layers have at a path, and its device.
pub(crate) fn image_inode(watched: &Watched, path: &RootfsPath) -> Option<(u64, u64)> {
    lower::inode(watched.layers()?, path)
}
