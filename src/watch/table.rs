//! The containers that are watched, by what an event can tell of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use crate::model::{ContainerId, FileTime, OverlayDirs, ProcessIdentity};
use crate::sys::file;
use crate::sys::overlay;

/// One container whose overlay carries our marks.
///
/// It holds no descriptor on the container's mount: an open one keeps the
/// superblock alive when the container is removed.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) container: ContainerId,
    pub(super) init: ProcessIdentity,
    /// The overlay's own device number, which its files show too unless the
    /// layers are on several filesystems.
    pub(super) device: u64,
    pub(super) mount: Option<u64>,
    /// What the kernel calls the root directory when we ask: `/` for a pivoted
    /// root, a directory of the host for a mere chroot.
    pub(super) root_name: Vec<u8>,
    pub(super) pid_namespace: Option<u64>,
    pub(super) mount_namespace: Option<u64>,
    layers: OnceLock<Layers>,
    /// The upperdir is to be walked again because something was not seen. One
    /// flag, so that a flood of losses asks for one walk.
    rescan: AtomicBool,
    /// The same for the container's processes.
    process_scan: AtomicBool,
    /// The container has ended: only the last walk is still to come.
    detaching: AtomicBool,
}

/// Where the overlay's layers lie on the host.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) dirs: OverlayDirs,
    pub(super) userxattr: bool,
    /// Since when the container has an upper layer. `None` where the filesystem
    /// keeps no birth times: the upperdir's ctime would be no substitute, since
    /// it moves with every entry made in it.
    born: Option<FileTime>,
}

impl Layers {
    /// `None` if there is no such upperdir.
    pub(super) fn new(mount: overlay::Mount) -> Option<Layers> {
        let born = file::stat_path(&mount.dirs.upperdir).ok()?.born;
        // A birth that is yet to come: the clock was set back, and files that are
        // made now would look older than their layer.
        let now = jiff::Timestamp::now().as_second();
        let born = born.filter(|born| born.seconds <= now);
        Some(Layers { dirs: mount.dirs, userxattr: mount.userxattr, born })
    }
}

impl Watched {
    pub(super) fn new(
        container: ContainerId,
        init: ProcessIdentity,
        root: &file::Stat,
        root_name: Vec<u8>,
        pid_namespace: Option<u64>,
        mount_namespace: Option<u64>,
    ) -> Watched {
        Watched {
            container,
            init,
            device: root.device,
            mount: root.mount,
            root_name,
            pid_namespace,
            mount_namespace,
            layers: OnceLock::new(),
            rescan: AtomicBool::new(false),
            process_scan: AtomicBool::new(false),
            detaching: AtomicBool::new(false),
        }
    }

    pub(super) fn layers(&self) -> Option<&Layers> {
        self.layers.get()
    }

    /// The first answer stays.
    pub(super) fn set_layers(&self, layers: Layers) {
        let _ = self.layers.set(layers);
    }

    /// Whether a file lives in the container's own layer. Its ctime and birth
    /// cannot be set from inside, and a file of the image that is touched is
    /// copied up and born anew. What cannot be told is treated as the
    /// container's own: its content is then compared, which is right for any file.
    pub(super) fn is_upper(&self, stat: &file::Stat) -> bool {
        match self.layers().and_then(|layers| layers.born) {
            Some(born) => {
                stat.changed >= born || stat.born.is_some_and(|file_born| file_born >= born)
            }
            None => true,
        }
    }

    /// Asks for a walk of everything; says whether none was asked for yet.
    pub(super) fn ask_for_rescan(&self) -> bool {
        self.process_scan.store(true, Ordering::Release);
        !self.rescan.swap(true, Ordering::AcqRel)
    }

    /// Says whether this is the first time.
    pub(super) fn detach(&self) -> bool {
        !self.detaching.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_detaching(&self) -> bool {
        self.detaching.load(Ordering::Acquire)
    }

    pub(super) fn wants_rescan(&self) -> bool {
        self.rescan.load(Ordering::Acquire)
    }

    pub(super) fn take_rescan(&self) -> bool {
        self.rescan.swap(false, Ordering::AcqRel)
    }

    pub(super) fn take_process_scan(&self) -> bool {
        self.process_scan.swap(false, Ordering::AcqRel)
    }
}

#[derive(Debug, Default)]
pub(super) struct Table {
    maps: RwLock<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    by_container: HashMap<ContainerId, Arc<Watched>>,
    by_device: HashMap<u64, Arc<Watched>>,
    by_mount: HashMap<u64, Arc<Watched>>,
}

impl Table {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Maps> {
        // Every change is a few inserts; a panic leaves nothing half done that
        // a reader could not live with.
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, watched: &Arc<Watched>) {
        let mut maps = self.write();
        maps.by_container.insert(watched.container.clone(), watched.clone());
        maps.by_device.insert(watched.device, watched.clone());
        if let Some(mount) = watched.mount {
            maps.by_mount.insert(mount, watched.clone());
        }
    }

    /// Forgets this attachment and no later one of the same container.
    pub(super) fn remove(&self, watched: &Arc<Watched>) {
        let mut maps = self.write();
        let other = |entry: &Arc<Watched>| !Arc::ptr_eq(entry, watched);
        maps.by_container.retain(|_, entry| other(entry));
        maps.by_device.retain(|_, entry| other(entry));
        maps.by_mount.retain(|_, entry| other(entry));
    }

    pub(super) fn get(&self, container: &ContainerId) -> Option<Arc<Watched>> {
        self.read().by_container.get(container).cloned()
    }

    /// Whose file this is: by its device; or by its mount, for an overlay whose
    /// layers are on several filesystems.
    pub(super) fn owner(&self, stat: &file::Stat) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_device.get(&stat.device).or_else(|| maps.by_mount.get(&stat.mount?)).cloned()
    }

    /// The container in whose pid namespace a process is.
    pub(super) fn by_pid_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let mut found =
            maps.by_container.values().filter(|watched| watched.pid_namespace == Some(namespace));
        let first = found.next()?;
        // Several containers of a pod can share one; then it names nobody.
        found.next().is_none().then(|| first.clone())
    }

    pub(super) fn all(&self) -> Vec<Arc<Watched>> {
        self.read().by_container.values().cloned().collect()
    }
}
