//! Changes of names and metadata: the kernel reports when a name in an upper layer is
//! created, removed or renamed, and when a file's mode, owner or attributes change.
//!
//! It owns the marks on the directories of upper layers, and the path of each directory. Walks
//! place the marks. `changes` reads the events and finds the changed path here. Where the
//! kernel has no such marks, or there are too many directories, periodic scans find the same
//! changes later.
//!
//! ```text
//! walk ── directory, path ──> marks and handles ──> kernel
//!                                   │                 │ mode, rename, link, unlink
//!                                   v                 v
//!                            handle → path ───────> names ── dirty path ──> scan
//! ```

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Bound;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::inputs::Inputs;
use crate::model::{ContainerId, RootfsPath};
use crate::sys::fanotify::{self, Group, Named};
use crate::sys::handle::FileHandle;
use crate::watch::core::watched::Watched;

/// The most directories of one container, and of all containers, that are listened to. Each
/// pins an inode of about a kilobyte.
const MAX_OF_CONTAINER: usize = 8 * 1024;
const MAX_OF_ALL: usize = 64 * 1024;

/// The events that are listened for. Not `MODIFY`: it makes writes of a page a third slower,
/// and would only add truncate(2) of a file that is in the upper layer already, which closes
/// nothing. A walk finds that change, and an execution of the file is reported immediately.
const MASK: u64 = libc::FAN_CREATE
    | libc::FAN_MOVED_TO
    | libc::FAN_MOVED_FROM
    | libc::FAN_DELETE
    | libc::FAN_ATTRIB
    | libc::FAN_ONDIR
    | libc::FAN_EVENT_ON_CHILD;

/// Events after which the name refers to something else, or to nothing.
const RENAMING: u64 =
    libc::FAN_CREATE | libc::FAN_MOVED_TO | libc::FAN_MOVED_FROM | libc::FAN_DELETE;

/// The directories that are listened to.
///
/// The overlay's own marks report writes only. So every directory of an upper layer carries its
/// own mark, on the host's side of the overlay. There are only as many as the container has
/// changed something in. A walk marks each directory before it lists it, so that either the
/// event or the listing shows a change. Events name the directory by its handle. The handle is
/// compared and never opened; the walk supplies the path.
pub(crate) struct Names {
    /// `None` if the kernel does not support it, or refuses to create another group.
    group: Option<Arc<Group>>,
    /// The kernel supports it, but refuses to create another group.
    lacks_group: bool,
    map: Mutex<Map>,
}

#[derive(Default)]
struct Map {
    directories: HashMap<FileHandle, Directory>,
    containers: HashMap<ContainerId, Marked>,
}

struct Directory {
    watched: Arc<Watched>,
    /// `None` after it was moved, until a walk finds it again.
    path: Option<RootfsPath>,
    /// The last walk that found it.
    walk: u64,
}

struct Marked {
    watched: Arc<Watched>,
    by_path: BTreeMap<RootfsPath, FileHandle>,
    count: usize,
    walk: u64,
    /// That some directories are not marked has been reported.
    was_reported: bool,
    /// The last walk in which a directory could not be marked.
    deaf_in: Option<u64>,
}

/// Why a directory is not listened to.
#[derive(Debug)]
pub(crate) enum Deaf {
    /// This kernel does not support it. That was logged at start.
    Missing,
    /// There are too many directories; true if this has not been reported yet.
    Full(bool),
    /// This filesystem or kernel refuses; true if this has not been reported yet.
    Refused(io::Error, bool),
}

impl Names {
    pub(crate) fn new() -> Names {
        let group = Group::names().inspect_err(|err| {
            tracing::warn!(
                "only periodic scans will find renames, removals and changes of metadata: {err}"
            );
        });
        let lacks_group = matches!(group, Err(fanotify::Error::TooMany));
        Names { group: group.ok().map(Arc::new), lacks_group, map: Mutex::default() }
    }

    /// The group of the marks, also of those that `inputs` places.
    pub(crate) fn group(&self) -> Option<Arc<Group>> {
        self.group.clone()
    }

    fn map(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A walk of a container's whole upperdir begins.
    pub(crate) fn begin_walk(&self, watched: &Arc<Watched>) {
        let mut map = self.map();
        let Map { containers, .. } = &mut *map;
        let is_other = |marked: &Marked| !Arc::ptr_eq(&marked.watched, watched);
        if containers.get(&watched.container).is_some_and(is_other) {
            map.forget(&watched.container);
        }
        map.marked(watched).walk += 1;
    }

    /// The walk is complete: directories that it has not found do not exist any more. Returns
    /// whether all directories are marked again after some were not.
    pub(crate) fn end_walk(&self, watched: &Arc<Watched>) -> bool {
        let mut map = self.map();
        let walk = map.marked(watched).walk;
        map.remove_where(watched, |directory| directory.walk != walk);
        let marked = map.marked(watched);
        marked.deaf_in != Some(walk) && std::mem::take(&mut marked.was_reported)
    }

    /// Listens to an open directory of an upper layer from now on.
    pub(crate) fn listen(
        &self,
        watched: &Arc<Watched>,
        path: &RootfsPath,
        directory: &OwnedFd,
    ) -> Result<(), Deaf> {
        let Some(group) = &self.group else {
            if !self.lacks_group {
                return Err(Deaf::Missing);
            }
            let is_news = self.map().is_news(watched);
            return Err(Deaf::Refused(io::Error::other(fanotify::Error::TooMany), is_news));
        };
        let handle = match FileHandle::of(directory) {
            Ok(handle) => handle,
            Err(err) => {
                let is_news = self.map().is_news(watched);
                return Err(Deaf::Refused(err, is_news));
            }
        };
        let mut map = self.map();
        if map.find_again(watched, path, &handle) {
            return Ok(());
        }
        let all = map.directories.len();
        if map.marked(watched).count >= MAX_OF_CONTAINER || all >= MAX_OF_ALL {
            return Err(Deaf::Full(map.is_news(watched)));
        }
        // Inserted before it is marked, so that its first event finds it.
        map.insert(watched, path, handle.clone());
        match group.mark_directory(directory.as_fd(), MASK) {
            Ok(()) => Ok(()),
            Err(err) => {
                map.remove(&handle);
                let is_news = map.is_news(watched);
                let is_full =
                    matches!(Errno::from_io_error(&err), Some(Errno::NOSPC | Errno::NOMEM));
                Err(if is_full { Deaf::Full(is_news) } else { Deaf::Refused(err, is_news) })
            }
        }
    }

    /// Stops listening to an open directory.
    pub(crate) fn unlisten(&self, directory: &OwnedFd, inputs: &Inputs) {
        let Some(group) = &self.group else { return };
        // Most errors mean that there is no mark. The others do not matter: a mark ends with its
        // directory.
        let unmark = |mask| group.unmark_directory(directory.as_fd(), mask);
        let _ = inputs.unmark_the_rest(directory, MASK, unmark);
    }

    /// Forgets this attachment of a container, but not a later one.
    pub(crate) fn forget(&self, watched: &Arc<Watched>) {
        let mut map = self.map();
        let is_this = |marked: &Marked| Arc::ptr_eq(&marked.watched, watched);
        if map.containers.get(&watched.container).is_some_and(is_this) {
            map.forget(&watched.container);
        }
    }

    /// The container and the path of a changed name; without a path if it is not known now.
    /// `None` if no container or nothing of interest has changed.
    pub(crate) fn changed(&self, named: &Named) -> Option<(Arc<Watched>, Option<RootfsPath>)> {
        let mut map = self.map();
        let directory = map.directories.get(&named.directory)?;
        let watched = directory.watched.clone();
        let Some(parent) = &directory.path else { return Some((watched, None)) };
        if matches!(&*named.name, b"" | b".") {
            // The directory's own mode or times. A change of what it hides comes with its name.
            return None;
        }
        let is_directory = named.mask & libc::FAN_ONDIR != 0;
        if is_directory && named.mask & RENAMING == 0 {
            return None;
        }
        let path = parent.join(&named.name).ok()?;
        if named.mask & RENAMING != 0 {
            map.lose_paths(&watched, &path);
        }
        Some((watched, Some(path)))
    }
}

impl Map {
    fn marked(&mut self, watched: &Arc<Watched>) -> &mut Marked {
        self.containers.entry(watched.container.clone()).or_insert_with(|| Marked {
            watched: watched.clone(),
            by_path: BTreeMap::new(),
            count: 0,
            walk: 0,
            was_reported: false,
            deaf_in: None,
        })
    }

    /// Notes that a directory is not marked. Returns whether this has not been reported yet, or
    /// not since all directories of the container were marked.
    fn is_news(&mut self, watched: &Arc<Watched>) -> bool {
        let marked = self.marked(watched);
        marked.deaf_in = Some(marked.walk);
        !std::mem::replace(&mut marked.was_reported, true)
    }

    /// Notes that a marked directory was found at `path`; false if it is not marked.
    fn find_again(
        &mut self,
        watched: &Arc<Watched>,
        path: &RootfsPath,
        handle: &FileHandle,
    ) -> bool {
        let walk = self.marked(watched).walk;
        let Some(directory) = self.directories.get_mut(handle) else { return false };
        if !Arc::ptr_eq(&directory.watched, watched) {
            self.remove(handle);
            return false;
        }
        directory.walk = walk;
        if directory.path.as_ref() == Some(path) {
            return true;
        }
        let old = directory.path.replace(path.clone());
        let by_path = &mut self.marked(watched).by_path;
        if let Some(old) = old
            && by_path.get(&old) == Some(handle)
        {
            by_path.remove(&old);
        }
        let replaced = by_path.insert(path.clone(), handle.clone());
        self.lose_path_of(replaced.as_ref(), handle);
        true
    }

    fn insert(&mut self, watched: &Arc<Watched>, path: &RootfsPath, handle: FileHandle) {
        let marked = self.marked(watched);
        marked.count += 1;
        let walk = marked.walk;
        let replaced = marked.by_path.insert(path.clone(), handle.clone());
        self.lose_path_of(replaced.as_ref(), &handle);
        let directory = Directory { watched: watched.clone(), path: Some(path.clone()), walk };
        self.directories.insert(handle, directory);
    }

    /// Another directory has taken the path of `replaced`.
    fn lose_path_of(&mut self, replaced: Option<&FileHandle>, by: &FileHandle) {
        if let Some(replaced) = replaced.filter(|replaced| *replaced != by)
            && let Some(directory) = self.directories.get_mut(replaced)
        {
            directory.path = None;
        }
    }

    /// Directories at `path` and below may not be there any more: forgets their paths.
    fn lose_paths(&mut self, watched: &Arc<Watched>, path: &RootfsPath) {
        let by_path = &mut self.marked(watched).by_path;
        let mut lost: Vec<FileHandle> = by_path.remove(path).into_iter().collect();
        let mut below = path.as_bytes().to_vec();
        below.push(b'/');
        // Siblings such as `a-b` sort between `a` and `a/b`: skip those, and stop after the last
        // path that starts with `a/`.
        let mut from: Vec<RootfsPath> = Vec::new();
        for key in
            by_path.range((Bound::Excluded(path.clone()), Bound::Unbounded)).map(|(key, _)| key)
        {
            if key.as_bytes().starts_with(&below) {
                from.push(key.clone());
            } else if key.as_bytes() > below.as_slice() {
                break;
            }
        }
        lost.extend(from.iter().filter_map(|key| by_path.remove(key)));
        for handle in lost {
            if let Some(directory) = self.directories.get_mut(&handle) {
                directory.path = None;
            }
        }
    }

    fn remove(&mut self, handle: &FileHandle) {
        let Some(directory) = self.directories.remove(handle) else { return };
        let Some(marked) = self.containers.get_mut(&directory.watched.container) else { return };
        marked.count = marked.count.saturating_sub(1);
        if let Some(path) = directory.path
            && marked.by_path.get(&path) == Some(handle)
        {
            marked.by_path.remove(&path);
        }
    }

    fn remove_where(&mut self, watched: &Arc<Watched>, is_gone: impl Fn(&Directory) -> bool) {
        let gone: Vec<FileHandle> = self
            .directories
            .iter()
            .filter(|(_, directory)| Arc::ptr_eq(&directory.watched, watched) && is_gone(directory))
            .map(|(handle, _)| handle.clone())
            .collect();
        for handle in gone {
            self.remove(&handle);
        }
    }

    fn forget(&mut self, container: &ContainerId) {
        if let Some(marked) = self.containers.remove(container) {
            self.directories
                .retain(|_, directory| !Arc::ptr_eq(&directory.watched, &marked.watched));
        }
    }
}
