//! The containers that are watched, by what an event can tell of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::copyup::Residence;
use super::files::Files;
use super::trust::LayerFiles;
use crate::model::{
    ContainerId, FileTime, Filesystem, LayerFile, OverlayDirs, ProcessIdentity, RootfsPath,
};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::perf;
use crate::sys::procfs::{self, Handle};

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
    has_own_pid_namespace: AtomicBool,
    /// Somebody has come into it from outside.
    has_sessions: AtomicBool,
    pub(super) mount_namespace: Option<u64>,
    /// Its control group in the unified hierarchy; `None` where there is none of
    /// its own.
    pub(super) cgroup: Option<Vec<u8>>,
    /// The same group as the kernel's records name it.
    pub(super) perf_cgroup: Option<u64>,
    layers: OnceLock<Layers>,
    /// Where its unchanged programs are asked about only once; `None` if nowhere.
    residence: OnceLock<Residence>,
    /// Its other mounts that carry our marks.
    mounts: RwLock<Arc<[MarkedMount]>>,
    /// Files that matter whatever they hold, beside those that the settings name.
    entry_point: RwLock<Vec<RootfsPath>>,
    /// Locked for a look-up or an insert at a time: the gate reads it.
    layer_files: RwLock<LayerFiles>,
    /// The upperdir is to be walked again because something was not seen. One
    /// flag, so that a flood of losses asks for one walk.
    rescan: AtomicBool,
    /// It is to be walked although nothing was lost.
    walk: AtomicBool,
    /// The same for the container's processes: those that were there at this time
    /// after boot, in clock ticks. 0 if none are to be looked at.
    process_scan: AtomicU64,
    /// Since when the start of every process of it has been seen.
    seen_since: AtomicU64,
    /// What they have loaded is to be looked at.
    code_scan: AtomicBool,
    /// The container has ended: only the last walk is still to come.
    detaching: AtomicBool,
    /// The marks were there before its entry point ran.
    armed_before_start: AtomicBool,
    /// The event files that wait to be looked into.
    pub(super) files: Files,
    /// Marked because its runtime was called; containerd has not told of it yet.
    unannounced: AtomicBool,
}

/// The control groups of a container's init.
#[derive(Debug, Default)]
pub(super) struct ControlGroups {
    /// Its path in the unified hierarchy.
    pub(super) unified: Option<Vec<u8>>,
    /// As the kernel's records name it.
    pub(super) perf: Option<u64>,
}

/// Where the overlay's layers lie on the host.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) dirs: OverlayDirs,
    pub(super) userxattr: bool,
    /// A directory of the image can be moved, and its files then have other paths
    /// than the image's.
    pub(super) redirects: bool,
    /// Since when the container has an upper layer. `None` where the filesystem
    /// keeps no birth times: the upperdir's ctime would be no substitute, since
    /// it moves with every entry made in it.
    born: Option<FileTime>,
    /// The filesystems that its directories are on.
    devices: Vec<u64>,
}

/// A mount of a container, beside its root, that carries our mark: all of its
/// filesystem, or only what is reached through the mount itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MarkedMount {
    pub(super) id: u64,
    /// What the files on it show as theirs.
    pub(super) device: u64,
    /// The directory (or file) of the filesystem that stands at `mount_point`.
    pub(super) root: Vec<u8>,
    pub(super) mount_point: Vec<u8>,
    pub(super) whole_filesystem: bool,
}

/// What the gate makes of an executed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The container's own.
    Own,
    /// A file of the image's layers that may have been changed there.
    Doubtful(LayerFile),
    /// A file of the image's layers, whose directory may have been moved.
    Movable(LayerFile),
    Image,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Own,
    /// `is_young`: changed after the container was made.
    Layers {
        is_young: bool,
    },
}

/// Whether a file lives in the container's own layer, which is there since `own`.
/// Its ctime and birth cannot be set from inside, and a file of the image that is
/// touched is copied up and born anew. What cannot be told is treated as the
/// container's own: its content is then compared, which is right for any file.
fn place(stat: &Stat, own: Option<FileTime>) -> Place {
    let Some(own) = own else { return Place::Own };
    let is_young = stat.changed >= own;
    match stat.born {
        Some(born) if born < own => Place::Layers { is_young },
        None if !is_young => Place::Layers { is_young },
        Some(_) | None => Place::Own,
    }
}

impl Layers {
    /// `None` if there is no such upperdir.
    pub(super) fn new(mount: overlay::Mount) -> Option<Layers> {
        let upper = file::stat_path(&mount.dirs.upperdir).ok()?;
        let born = upper.born;
        let lower = mount.dirs.lowerdirs.iter().filter_map(|lower| file::stat_path(lower).ok());
        let devices = lower.map(|lower| lower.device).chain([upper.device]).collect();
        // A birth that is yet to come: the clock was set back, and files that are
        // made now would look older than their layer.
        let now = jiff::Timestamp::now().as_second();
        let born = born.filter(|born| born.seconds <= now);
        Some(Layers {
            dirs: mount.dirs,
            userxattr: mount.userxattr,
            redirects: mount.redirects,
            born,
            devices,
        })
    }

    /// Whether some of it is on this filesystem.
    pub(super) fn is_on(&self, device: u64) -> bool {
        self.devices.contains(&device)
    }
}

impl Watched {
    pub(super) fn new(
        container: ContainerId,
        init: ProcessIdentity,
        root: &Stat,
        root_name: Vec<u8>,
        pid_namespace: Option<u64>,
        mount_namespace: Option<u64>,
        groups: Option<ControlGroups>,
    ) -> Watched {
        let ControlGroups { unified, perf } = groups.unwrap_or_default();
        Watched {
            container,
            init,
            device: root.device,
            mount: root.mount,
            root_name,
            pid_namespace,
            has_own_pid_namespace: AtomicBool::new(false),
            has_sessions: AtomicBool::new(false),
            mount_namespace,
            cgroup: unified.filter(|cgroup| cgroup.len() > 1),
            perf_cgroup: perf,
            layers: OnceLock::new(),
            residence: OnceLock::new(),
            mounts: RwLock::default(),
            entry_point: RwLock::default(),
            layer_files: RwLock::default(),
            rescan: AtomicBool::new(false),
            walk: AtomicBool::new(false),
            process_scan: AtomicU64::new(0),
            seen_since: AtomicU64::new(0),
            code_scan: AtomicBool::new(false),
            detaching: AtomicBool::new(false),
            armed_before_start: AtomicBool::new(false),
            unannounced: AtomicBool::new(false),
            files: Files::default(),
        }
    }

    /// Whether its init is the first process of a pid namespace, as its processes
    /// number themselves: another container may be in that too, but was put there.
    pub(super) fn has_own_pid_namespace(&self) -> bool {
        self.has_own_pid_namespace.load(Ordering::Acquire)
    }

    /// Whether this control group is its own or within it; `None` if it has none.
    pub(super) fn holds_cgroup(&self, cgroup: &[u8]) -> Option<bool> {
        let below = cgroup.strip_prefix(self.cgroup.as_deref()?);
        Some(below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")))
    }

    /// Whether somebody has come into it from outside since it is watched.
    pub(super) fn has_sessions(&self) -> bool {
        self.has_sessions.load(Ordering::Acquire)
    }

    pub(super) fn set_has_sessions(&self) {
        self.has_sessions.store(true, Ordering::Release);
    }

    pub(super) fn set_has_own_pid_namespace(&self) {
        self.has_own_pid_namespace.store(true, Ordering::Release);
    }

    pub(super) fn layers(&self) -> Option<&Layers> {
        self.layers.get()
    }

    /// The first answer stays.
    pub(super) fn set_layers(&self, layers: Layers) {
        let _ = self.layers.set(layers);
    }

    pub(super) fn residence(&self) -> Option<&Residence> {
        self.residence.get()
    }

    pub(super) fn set_residence(&self, residence: Residence) {
        let _ = self.residence.set(residence);
    }

    /// Whether a file is the image's own as far as anybody can know, until it changes.
    pub(super) fn is_certain(&self, stat: &Stat) -> bool {
        let born = self.layers().and_then(|layers| layers.born);
        match place(stat, born) {
            Place::Own => false,
            Place::Layers { is_young } => {
                let Stat { device, inode, changed, .. } = *stat;
                self.layer_files().is_certain(&LayerFile { device, inode, changed }, is_young)
            }
        }
    }

    /// Its other mounts that carry our marks, as they were when last looked at.
    pub(super) fn mounts(&self) -> Arc<[MarkedMount]> {
        self.mounts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_entry_point(&self, paths: Vec<RootfsPath>) {
        *self.entry_point.write().unwrap_or_else(PoisonError::into_inner) = paths;
    }

    /// Whether a file at `path` takes part in starting the container.
    pub(super) fn is_entry_point(&self, path: &RootfsPath) -> bool {
        self.entry_point.read().unwrap_or_else(PoisonError::into_inner).contains(path)
    }

    pub(super) fn layer_files(&self) -> RwLockReadGuard<'_, LayerFiles> {
        // A change is one insert or removal: a panic leaves nothing half done.
        self.layer_files.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn layer_files_mut(&self) -> RwLockWriteGuard<'_, LayerFiles> {
        self.layer_files.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose an executed file is.
    pub(super) fn standing(&self, stat: &Stat) -> Standing {
        let born = self.layers().and_then(|layers| layers.born);
        match place(stat, born) {
            Place::Own => Standing::Own,
            Place::Layers { is_young } => {
                let Stat { device, inode, changed, .. } = *stat;
                let file = LayerFile { device, inode, changed };
                if self.layer_files().is_doubtful(&file, is_young) {
                    Standing::Doubtful(file)
                } else if self.layers().is_some_and(|layers| layers.redirects) {
                    Standing::Movable(file)
                } else {
                    Standing::Image
                }
            }
        }
    }

    /// Asks for a walk of everything; says whether none was asked for yet.
    pub(super) fn ask_for_rescan(&self) -> bool {
        self.seen_since.store(procfs::ticks_since_boot(), Ordering::Release);
        self.ask_for_processes();
        self.code_scan.store(true, Ordering::Release);
        !self.rescan.swap(true, Ordering::AcqRel)
    }

    /// Asks for a walk of the upperdir alone.
    pub(super) fn ask_for_walk(&self) {
        self.walk.store(true, Ordering::Release);
    }

    /// Says whether this is the first time.
    pub(super) fn detach(&self) -> bool {
        !self.detaching.swap(true, Ordering::AcqRel)
    }

    pub(super) fn is_detaching(&self) -> bool {
        self.detaching.load(Ordering::Acquire)
    }

    pub(super) fn is_armed_before_start(&self) -> bool {
        self.armed_before_start.load(Ordering::Acquire)
    }

    pub(super) fn set_armed_before_start(&self) {
        self.armed_before_start.store(true, Ordering::Release);
    }

    pub(super) fn is_unannounced(&self) -> bool {
        self.unannounced.load(Ordering::Acquire)
    }

    pub(super) fn set_unannounced(&self, unannounced: bool) {
        self.unannounced.store(unannounced, Ordering::Release);
    }

    pub(super) fn wants_rescan(&self) -> bool {
        self.rescan.load(Ordering::Acquire) || self.walk.load(Ordering::Acquire)
    }

    /// A walk begins. Says whether it is to make up for a loss.
    pub(super) fn take_rescan(&self) -> bool {
        self.walk.store(false, Ordering::Release);
        self.rescan.swap(false, Ordering::AcqRel)
    }

    /// Asks for a look at the processes whose start was not seen.
    pub(super) fn ask_for_processes(&self) {
        self.process_scan.fetch_max(self.seen_since.load(Ordering::Acquire), Ordering::AcqRel);
    }

    pub(super) fn take_code_scan(&self) -> bool {
        self.code_scan.swap(false, Ordering::AcqRel)
    }

    /// Whether the container's processes are to be looked at, and since when the
    /// start of every other one has been seen.
    pub(super) fn take_process_scan(&self) -> Option<u64> {
        Some(self.process_scan.swap(0, Ordering::AcqRel)).filter(|&since| since > 0)
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
    /// Filesystems that carry our mark, with everyone who has them mounted.
    other_devices: HashMap<u64, Vec<Arc<Watched>>>,
    other_mounts: HashMap<u64, Arc<Watched>>,
    /// Since when the devices of `other_devices` are known, by the clock of the
    /// kernel's records.
    since: HashMap<u64, u64>,
    /// What the devices of containers' other filesystems were when they were listed last.
    kinds: HashMap<u64, Filesystem>,
}

/// More kinds than this are not remembered.
const MAX_KINDS: usize = 4096;

impl Maps {
    fn forget_mounts(&mut self, watched: &Arc<Watched>) {
        self.other_mounts.retain(|_, entry| !Arc::ptr_eq(entry, watched));
        self.other_devices.retain(|_, entries| {
            entries.retain(|entry| !Arc::ptr_eq(entry, watched));
            !entries.is_empty()
        });
    }
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
        maps.forget_mounts(watched);
    }

    /// These, and no others any more, are the container's other mounts.
    pub(super) fn set_mounts(&self, watched: &Arc<Watched>, mounts: Vec<MarkedMount>) {
        let mut maps = self.write();
        maps.forget_mounts(watched);
        // Not of a container that has been forgotten meanwhile.
        if maps.by_container.get(&watched.container).is_some_and(|own| Arc::ptr_eq(own, watched)) {
            for mount in &mounts {
                maps.other_mounts.insert(mount.id, watched.clone());
                if mount.whole_filesystem {
                    maps.since.entry(mount.device).or_insert_with(perf::now);
                    let users = maps.other_devices.entry(mount.device).or_default();
                    if !users.iter().any(|user| Arc::ptr_eq(user, watched)) {
                        users.push(watched.clone());
                    }
                }
            }
        }
        let Maps { since, other_devices, .. } = &mut *maps;
        since.retain(|device, _| other_devices.contains_key(device));
        *watched.mounts.write().unwrap_or_else(PoisonError::into_inner) = mounts.into();
    }

    /// Remembers what filesystems are. A mount may be gone when it is asked for.
    pub(super) fn note_kinds(&self, kinds: impl Iterator<Item = (u64, Filesystem)>) {
        let kinds: Vec<_> = kinds.take(MAX_KINDS).collect();
        let mut maps = self.write();
        if maps.kinds.len() + kinds.len() > MAX_KINDS {
            maps.kinds.clear();
        }
        maps.kinds.extend(kinds);
    }

    /// What a filesystem was that nothing is mounted from any more.
    pub(super) fn kind_of(&self, device: u64) -> Option<Filesystem> {
        self.read().kinds.get(&device).copied()
    }

    /// Whether the gate is asked before a file of this device, reached through this
    /// mount, is executed.
    pub(super) fn is_marked(&self, device: u64, mount: Option<u64>) -> bool {
        let maps = self.read();
        maps.by_device.contains_key(&device)
            || maps.other_devices.contains_key(&device)
            || mount.is_some_and(|mount| {
                maps.by_mount.contains_key(&mount) || maps.other_mounts.contains_key(&mount)
            })
    }

    /// The same of a file that was executed at a time, by the clock of the kernel's
    /// records: the mark may be newer.
    pub(super) fn was_marked(&self, device: u64, mount: Option<u64>, time: u64) -> bool {
        let is_younger = self.read().since.get(&device).is_some_and(|since| time < *since);
        !is_younger && self.is_marked(device, mount)
    }

    /// Whose an executed file is that lies on no container's own overlay: by who
    /// executes it. A program of the host's is nobody's, even from a volume that a
    /// container shares.
    pub(super) fn user_of(&self, stat: &Stat, process: &Handle) -> Option<Arc<Watched>> {
        if let Some(watched) = self.of_process(process) {
            return Some(watched);
        }
        // In namespaces of its own, where control groups tell nothing.
        if procfs::is_host_pid_namespace(process.pid_namespace().ok()?) {
            return None;
        }
        let maps = self.read();
        if let Some(watched) = stat.mount.and_then(|mount| maps.other_mounts.get(&mount)) {
            return Some(watched.clone());
        }
        match maps.other_devices.get(&stat.device).map(Vec::as_slice) {
            // One that has a control group would have been found by it.
            Some([watched]) if watched.cgroup.is_none() => Some(watched.clone()),
            Some(_) | None => None,
        }
    }

    /// The container whose own overlay has this device.
    pub(super) fn by_device(&self, device: u64) -> Option<Arc<Watched>> {
        self.read().by_device.get(&device).cloned()
    }

    /// The container of a control group, as the kernel's records name it.
    pub(super) fn by_perf_cgroup(&self, cgroup: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_container.values().find(|watched| watched.perf_cgroup == Some(cgroup)).cloned()
    }

    pub(super) fn get(&self, container: &ContainerId) -> Option<Arc<Watched>> {
        self.read().by_container.get(container).cloned()
    }

    /// Whose file this is: by its device; or by its mount, for an overlay whose
    /// layers are on several filesystems.
    pub(super) fn owner(&self, stat: &Stat) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_device.get(&stat.device).or_else(|| maps.by_mount.get(&stat.mount?)).cloned()
    }

    /// Whose a process is, whatever it does: by its mount namespace, its pid
    /// namespace, and its control group, which it keeps in namespaces of its own.
    /// A container may share namespaces of the host; they say nothing then.
    pub(super) fn of_process(&self, process: &Handle) -> Option<Arc<Watched>> {
        if let Ok(namespace) = process.mount_namespace()
            && !procfs::is_host_mount_namespace(namespace)
            && let Some(watched) = self.by_mount_namespace(namespace)
        {
            return Some(watched);
        }
        if let Ok(namespace) = process.pid_namespace()
            && !procfs::is_host_pid_namespace(namespace)
            && let Some(watched) = self.by_pid_namespace(namespace)
        {
            return Some(watched);
        }
        self.by_cgroup(&process.cgroup().ok()?)
    }

    /// Whether a container is in this mount namespace.
    pub(super) fn is_mount_namespace(&self, namespace: u64) -> bool {
        self.by_mount_namespace(namespace).is_some()
    }

    fn by_mount_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_container
            .values()
            .find(|watched| watched.mount_namespace == Some(namespace))
            .cloned()
    }

    /// The container whose control group is `cgroup`, or holds it.
    fn by_cgroup(&self, cgroup: &[u8]) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_container
            .values()
            .find(|watched| watched.holds_cgroup(cgroup) == Some(true))
            .cloned()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::FileType;

    #[track_caller]
    fn check(born: Option<i64>, changed: i64, expected: Place) {
        let time = |seconds| FileTime { seconds, nanoseconds: 0 };
        let stat = Stat {
            device: 1,
            inode: 1,
            born: born.map(time),
            changed: time(changed),
            modified: time(0),
            file_type: FileType::Regular,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            node: (0, 0),
            mount: None,
        };
        assert_eq!(place(&stat, Some(time(100))), expected, "born {born:?}, changed {changed}");
        assert_eq!(place(&stat, None), Place::Own);
    }

    #[test]
    fn a_file_is_the_containers_own_if_it_may_have_been_made_there() {
        check(Some(50), 60, Place::Layers { is_young: false });
        // Written to where it lies, in a layer.
        check(Some(50), 150, Place::Layers { is_young: true });
        check(Some(100), 100, Place::Own);
        check(Some(150), 150, Place::Own);
        // Exchanged in a layer: it cannot be told apart, and need not be.
        check(Some(150), 160, Place::Own);
        // The filesystem keeps no births.
        check(None, 60, Place::Layers { is_young: false });
        check(None, 150, Place::Own);
    }
}
