//! Finds the watched container of an event: by device, mount, namespace, control group or
//! process.
//!
//! The table owns these indexes and nothing else: it keeps no history, and decides nothing
//! about a process beyond its container. `control` adds and removes containers, `mounts`
//! sets their other mounts, and every thread reads it.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::watched::{MarkedMount, Watched};
use crate::model::{ContainerId, Filesystem};
use crate::sys::file::Stat;
use crate::sys::perf;
use crate::sys::procfs::{self, Handle, Whereabouts};

#[derive(Debug, Default)]
pub(crate) struct Table {
    maps: RwLock<Maps>,
    /// How many containers were ever inserted.
    generation: AtomicU64,
}

#[derive(Debug, Default)]
struct Maps {
    by_container: HashMap<ContainerId, Arc<Watched>>,
    by_device: HashMap<u64, Arc<Watched>>,
    by_mount: HashMap<u64, Arc<Watched>>,
    /// Filesystems that carry driftd's mark, with all containers that have them mounted.
    other_devices: HashMap<u64, Vec<Arc<Watched>>>,
    other_mounts: HashMap<u64, Arc<Watched>>,
    /// Since when the devices of `other_devices` are known, by the clock of the kernel's
    /// records.
    since: HashMap<u64, u64>,
    /// The kinds of the containers' other filesystems, by device, as last listed.
    kinds: HashMap<u64, Filesystem>,
    /// The containers of `by_container` by the properties of their processes: each record of
    /// the kernel needs one of these.
    by_mount_namespace: Index<u64>,
    by_pid_namespace: Index<u64>,
    by_perf_cgroup: Index<u64>,
    by_cgroup: Index<Vec<u8>>,
}

/// Containers by a value that several of them can share. The newest is the last.
#[derive(Debug)]
struct Index<K>(HashMap<K, Vec<Arc<Watched>>>);

impl<K> Default for Index<K> {
    fn default() -> Index<K> {
        Index(HashMap::new())
    }
}

impl<K: Eq + Hash> Index<K> {
    fn insert(&mut self, key: Option<K>, watched: &Arc<Watched>) {
        if let Some(key) = key {
            self.0.entry(key).or_default().push(watched.clone());
        }
    }

    fn remove<Q: ?Sized + Eq + Hash>(&mut self, key: Option<&Q>, watched: &Arc<Watched>)
    where
        K: Borrow<Q>,
    {
        let Some(key) = key else { return };
        if let Some(entries) = self.0.get_mut(key) {
            entries.retain(|entry| !Arc::ptr_eq(entry, watched));
            if entries.is_empty() {
                self.0.remove(key);
            }
        }
    }

    fn get<Q: ?Sized + Eq + Hash>(&self, key: &Q) -> &[Arc<Watched>]
    where
        K: Borrow<Q>,
    {
        self.0.get(key).map(Vec::as_slice).unwrap_or_default()
    }
}

/// More kinds than this are not remembered.
const MAX_KINDS: usize = 4096;

impl Maps {
    fn index(&mut self, watched: &Arc<Watched>) {
        self.by_mount_namespace.insert(watched.mount_namespace, watched);
        self.by_pid_namespace.insert(watched.pid_namespace, watched);
        self.by_perf_cgroup.insert(watched.perf_cgroup, watched);
        self.by_cgroup.insert(watched.cgroup.clone(), watched);
    }

    fn unindex(&mut self, watched: &Arc<Watched>) {
        self.by_mount_namespace.remove(watched.mount_namespace.as_ref(), watched);
        self.by_pid_namespace.remove(watched.pid_namespace.as_ref(), watched);
        self.by_perf_cgroup.remove(watched.perf_cgroup.as_ref(), watched);
        self.by_cgroup.remove(watched.cgroup.as_deref(), watched);
    }

    fn forget_mounts(&mut self, watched: &Arc<Watched>) {
        self.other_mounts.retain(|_, entry| !Arc::ptr_eq(entry, watched));
        self.other_devices.retain(|_, entries| {
            entries.retain(|entry| !Arc::ptr_eq(entry, watched));
            !entries.is_empty()
        });
    }
}

/// The control group of a process's parent in the unified hierarchy.
pub(crate) fn parents_cgroup(process: &Handle) -> Option<Vec<u8>> {
    Handle::open(process.stat().ok()?.parent).ok()?.cgroup().ok()
}

/// Whether a process that belongs to a container only by its pid namespace may be the first
/// process of a container that is not known yet. A process that only enters a namespace stays
/// in the control group of its parent. Processes that were never moved are in the root group.
pub(crate) fn is_put_elsewhere(cgroup: Option<&[u8]>, parents: Option<&[u8]>) -> bool {
    matches!((cgroup, parents), (Some(own), Some(parents)) if own != parents && own != b"/")
}

impl Table {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Maps> {
        // Every change is a few inserts. What a panic leaves half done does not harm readers.
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves when a new container is watched: what belonged to no container may belong to
    /// that one.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn insert(&self, watched: &Arc<Watched>) {
        self.put_in(watched);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    fn put_in(&self, watched: &Arc<Watched>) {
        let mut maps = self.write();
        let before = maps.by_container.insert(watched.container.clone(), watched.clone());
        if let Some(before) = before {
            maps.unindex(&before);
        }
        maps.index(watched);
        maps.by_device.insert(watched.device, watched.clone());
        if let Some(mount) = watched.mount {
            maps.by_mount.insert(mount, watched.clone());
        }
    }

    /// Removes this attachment, but no later one of the same container.
    pub(crate) fn remove(&self, watched: &Arc<Watched>) {
        let mut maps = self.write();
        let other = |entry: &Arc<Watched>| !Arc::ptr_eq(entry, watched);
        maps.unindex(watched);
        maps.by_container.retain(|_, entry| other(entry));
        maps.by_device.retain(|_, entry| other(entry));
        maps.by_mount.retain(|_, entry| other(entry));
        maps.forget_mounts(watched);
    }

    /// Replaces the container's other mounts.
    pub(crate) fn set_mounts(&self, watched: &Arc<Watched>, mounts: Vec<MarkedMount>) {
        let mut maps = self.write();
        maps.forget_mounts(watched);
        // The container may have been removed meanwhile.
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
        watched.set_mounts(mounts);
    }

    /// Remembers the kinds of filesystems: a mount may be gone when its kind is needed.
    pub(crate) fn note_kinds(&self, kinds: impl Iterator<Item = (u64, Filesystem)>) {
        let kinds: Vec<_> = kinds.take(MAX_KINDS).collect();
        let mut maps = self.write();
        if maps.kinds.len() + kinds.len() > MAX_KINDS {
            maps.kinds.clear();
        }
        maps.kinds.extend(kinds);
    }

    /// The kind of a filesystem, even if it is not mounted any more.
    pub(crate) fn kind_of(&self, device: u64) -> Option<Filesystem> {
        self.read().kinds.get(&device).copied()
    }

    /// Whether the gate is asked before a file of this device, reached through this
    /// mount, is executed.
    pub(crate) fn is_marked(&self, device: u64, mount: Option<u64>) -> bool {
        let maps = self.read();
        let is_gated = |watched: &Arc<Watched>| !watched.has_foreign_layers();
        maps.by_device.get(&device).is_some_and(is_gated)
            || maps.other_devices.contains_key(&device)
            || mount.is_some_and(|mount| {
                maps.by_mount.get(&mount).is_some_and(is_gated)
                    || maps.other_mounts.contains_key(&mount)
            })
    }

    /// Like [`is_marked`](Table::is_marked), for an execution at `time` by the clock of the
    /// kernel's records: the mark may be newer.
    pub(crate) fn was_marked(&self, device: u64, mount: Option<u64>, time: u64) -> bool {
        let is_younger = self.read().since.get(&device).is_some_and(|since| time < *since);
        !is_younger && self.is_marked(device, mount)
    }

    /// The container of an executed file that lies on no container's own overlay, by the
    /// process that executes it. A host process's program belongs to no container, even if it
    /// lies on a volume that a container shares.
    pub(crate) fn user_of(&self, stat: &Stat, process: &Whereabouts) -> Option<Arc<Watched>> {
        if let Some(watched) = self.of_whereabouts(process) {
            return Some(watched);
        }
        // What follows is for a process in a pid namespace of its own, with a control group
        // that identifies no container.
        if procfs::is_host_pid_namespace(process.pid_namespace?) {
            return None;
        }
        let maps = self.read();
        if let Some(watched) = stat.mount.and_then(|mount| maps.other_mounts.get(&mount)) {
            return Some(watched.clone());
        }
        match maps.other_devices.get(&stat.device).map(Vec::as_slice) {
            // A container with a control group would have been found by that.
            Some([watched]) if watched.cgroup.is_none() => Some(watched.clone()),
            Some(_) | None => None,
        }
    }

    /// The container with this device as its own overlay.
    pub(crate) fn by_device(&self, device: u64) -> Option<Arc<Watched>> {
        self.read().by_device.get(&device).cloned()
    }

    /// The container of a control group, as the kernel's records name it.
    pub(crate) fn by_perf_cgroup(&self, cgroup: u64) -> Option<Arc<Watched>> {
        self.read().by_perf_cgroup.get(&cgroup).last().cloned()
    }

    pub(crate) fn get(&self, container: &ContainerId) -> Option<Arc<Watched>> {
        self.read().by_container.get(container).cloned()
    }

    /// The container in whose root a file lies: by the device; or by the mount, for an overlay
    /// with layers on several filesystems.
    pub(crate) fn owner(&self, stat: &Stat) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_device.get(&stat.device).or_else(|| maps.by_mount.get(&stat.mount?)).cloned()
    }

    /// The container of a process: by its mount namespace; then by its control group, which it
    /// keeps in namespaces of its own; then by its pid namespace, into which other containers
    /// can be put. Namespaces that a container shares with the host do not count.
    pub(crate) fn of_process(&self, process: &Handle) -> Option<Arc<Watched>> {
        if let Ok(namespace) = process.mount_namespace()
            && !procfs::is_host_mount_namespace(namespace)
            && let Some(watched) = self.by_mount_namespace(namespace)
        {
            return Some(watched);
        }
        let cgroup = process.cgroup().ok();
        let by_cgroup = cgroup.as_deref().and_then(|cgroup| self.by_cgroup(cgroup));
        by_cgroup.or_else(|| {
            let namespace = process.pid_namespace().ok();
            let namespace = namespace.filter(|&it| !procfs::is_host_pid_namespace(it))?;
            let watched = self.by_pid_namespace(namespace)?;
            // The parent is read last: few processes need it.
            let may_be_unknown =
                is_put_elsewhere(cgroup.as_deref(), parents_cgroup(process).as_deref());
            (!may_be_unknown).then_some(watched)
        })
    }

    /// The container of a process that may have ended, by what was read of it.
    pub(crate) fn of_whereabouts(&self, process: &Whereabouts) -> Option<Arc<Watched>> {
        let Whereabouts { mount_namespace, pid_namespace, cgroup } = process;
        let by_mount_namespace = || {
            let namespace = mount_namespace.filter(|&it| !procfs::is_host_mount_namespace(it))?;
            self.by_mount_namespace(namespace)
        };
        let by_pid_namespace = || {
            let namespace = pid_namespace.filter(|&it| !procfs::is_host_pid_namespace(it))?;
            self.by_pid_namespace(namespace)
        };
        by_mount_namespace()
            .or_else(|| self.by_cgroup(cgroup.as_deref()?))
            .or_else(by_pid_namespace)
    }

    /// Whether a container has this mount namespace.
    pub(crate) fn is_mount_namespace(&self, namespace: u64) -> bool {
        self.by_mount_namespace(namespace).is_some()
    }

    fn by_mount_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_mount_namespace.get(&namespace);
        found.iter().rev().find(|watched| watched.has_namespaces()).cloned()
    }

    /// The innermost container whose control group is `cgroup` or contains it.
    fn by_cgroup(&self, cgroup: &[u8]) -> Option<Arc<Watched>> {
        let maps = self.read();
        let above = |path: &[u8]| path.iter().rposition(|&byte| byte == b'/');
        std::iter::successors(Some(cgroup), |path| above(path).map(|end| &path[..end]))
            .find_map(|path| maps.by_cgroup.get(path).last().cloned())
    }

    /// The only container in a pid namespace.
    pub(crate) fn by_pid_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_pid_namespace.get(&namespace);
        let mut found = found.iter().filter(|watched| watched.has_namespaces());
        let first = found.next()?;
        // Several containers of a pod can share a pid namespace. Then it identifies none.
        found.next().is_none().then(|| first.clone())
    }

    /// The container whose init is the first process of a pid namespace. Others may be in it.
    pub(crate) fn first_in_pid_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_pid_namespace.get(&namespace);
        let began = |watched: &&Arc<Watched>| watched.has_own_pid_namespace();
        found.iter().filter(began).find(|watched| watched.has_namespaces()).cloned()
    }

    /// The kernel has recorded the end of a process. If it was a container's first one, other
    /// namespaces may have the numbers of the container's namespaces from now on.
    pub(crate) fn ended(&self, pid: u32) {
        for watched in self.read().by_container.values() {
            if watched.init.pid == pid {
                watched.note_end_of_init();
            }
        }
    }

    /// All containers whose processes are in this pid namespace.
    pub(crate) fn in_pid_namespace(&self, namespace: u64) -> Vec<Arc<Watched>> {
        self.read().by_pid_namespace.get(&namespace).to_vec()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Watched>> {
        self.read().by_container.values().cloned().collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::model::{FileTime, FileType, OverlayDirs, ProcessIdentity};
    use crate::sys::{clock, file, overlay};
    use crate::watch::core::layers::{Layers, Place, place};
    use crate::watch::core::watched::ControlGroups;

    fn root(device: u64) -> Stat {
        let time = FileTime { seconds: 0, nanoseconds: 0 };
        Stat {
            device,
            inode: 1,
            born: None,
            changed: time,
            modified: time,
            file_type: FileType::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            node: (0, 0),
            mount: None,
        }
    }

    /// A container with this device as its overlay.
    pub(crate) fn watched(id: &str, device: u64) -> Watched {
        in_namespaces(id, device, None, None, None, None)
    }

    fn in_namespaces(
        id: &str,
        device: u64,
        pid: Option<u64>,
        mount: Option<u64>,
        cgroup: Option<&str>,
        perf: Option<u64>,
    ) -> Watched {
        let number = u32::try_from(device).unwrap();
        let init = ProcessIdentity { pid: number, start_time: device };
        let unified = cgroup.map(|cgroup| cgroup.as_bytes().to_vec());
        let groups = Some(ControlGroups { unified, perf });
        let id = ContainerId::new("default", id);
        Watched::new(id, init, &root(device), b"/".into(), pid, mount, groups)
    }

    #[test]
    fn d02_a_layer_is_cut_off_if_its_directory_existed_only_for_the_mount() {
        let scratch = tempfile::tempdir().unwrap();
        let [upperdir, kept, passing] =
            ["upper", "kept", "passing"].map(|name| scratch.path().join(name));
        for directory in [&upperdir, &kept, &passing] {
            std::fs::create_dir(directory).unwrap();
        }
        let layers = |lowerdirs: &[&std::path::PathBuf]| {
            let lowerdirs = lowerdirs.iter().map(|&lower| lower.clone()).collect();
            let dirs = OverlayDirs { upperdir: upperdir.clone(), lowerdirs };
            let (userxattr, redirects, is_exported) = (false, false, false);
            let mount = overlay::Mount { dirs, userxattr, redirects, workdir: None, is_exported };
            Layers::new(mount).unwrap()
        };
        let (whole, both) = (layers(&[&kept]), layers(&[&kept, &passing]));
        assert!(!whole.is_cut_off() && !both.is_cut_off());
        std::fs::remove_dir(&passing).unwrap();
        assert!(!whole.is_cut_off() && both.is_cut_off());
        assert!(layers(&[&passing]).is_cut_off(), "it was gone before");
        // What was mounted there is gone, and an empty directory is left.
        std::fs::create_dir(&passing).unwrap();
        std::fs::rename(&kept, scratch.path().join("moved")).unwrap();
        std::fs::create_dir(&kept).unwrap();
        assert!(whole.is_cut_off());
    }

    #[test]
    fn x19_a_file_older_than_its_upper_layer_shows_that_the_clock_was_set_back() {
        let scratch = tempfile::tempdir().unwrap();
        let early = scratch.path().join("early");
        std::fs::write(&early, b"x").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        let upperdir = scratch.path().join("upper");
        std::fs::create_dir(&upperdir).unwrap();
        let mount = || overlay::Mount {
            dirs: OverlayDirs { upperdir: upperdir.clone(), lowerdirs: Vec::new() },
            userxattr: false,
            redirects: false,
            workdir: None,
            is_exported: false,
        };
        let layers = Layers::new(mount()).unwrap();
        let late = upperdir.join("late");
        std::fs::write(&late, b"x").unwrap();
        let stat = |path| file::stat_path(path).unwrap();
        assert!(!layers.note_birth(&stat(&late)));
        assert!(layers.born().is_some(), "the filesystem keeps births");
        assert_eq!(place(&stat(&early), layers.born()), Place::Layers { is_young: false });
        // No file of the layer can be older than the layer.
        assert!(layers.note_birth(&stat(&early)));
        assert!(!layers.note_birth(&stat(&early)), "only the first is reported");
        assert_eq!(place(&stat(&early), layers.born()), Place::Own);

        let set_since =
            Layers { times_set: clock::times_set() + 1, ..Layers::new(mount()).unwrap() };
        assert_eq!(place(&stat(&early), set_since.born()), Place::Own, "the clock was set");
    }

    #[test]
    fn h18_a_container_is_found_by_each_property_of_a_process() {
        let table = Table::default();
        let id = |found: Option<Arc<Watched>>| found.map(|found| found.container.id.to_string());
        let id = |found| id(found).unwrap_or_default();
        let add = |id, device, pid, mount, cgroup, perf| {
            let watched = Arc::new(in_namespaces(id, device, pid, mount, cgroup, perf));
            table.insert(&watched);
            watched
        };
        let outer = add("outer", 1, Some(11), Some(21), Some("/k/outer"), Some(31));
        let inner = add("inner", 2, Some(12), Some(22), Some("/k/outer/x/inner"), Some(32));
        let beside = add("beside", 3, Some(12), Some(23), Some("/k/outerx"), Some(33));
        let bare = add("bare", 4, None, None, Some("/"), None);
        assert_eq!(id(table.by_perf_cgroup(32)), "inner");
        assert_eq!(id(table.by_perf_cgroup(39)), "");
        assert_eq!(id(table.by_mount_namespace(21)), "outer");
        assert_eq!(id(table.by_pid_namespace(11)), "outer");
        assert_eq!(id(table.by_pid_namespace(12)), "", "two containers share it");
        let by_cgroup = |path: &str| id(table.by_cgroup(path.as_bytes()));
        assert_eq!(by_cgroup("/k/outer"), "outer");
        assert_eq!(by_cgroup("/k/outer/x"), "outer");
        assert_eq!(by_cgroup("/k/outer/x/inner/deep/er"), "inner", "the innermost");
        assert_eq!(by_cgroup("/k/outerx"), "beside", "a common prefix of names is no match");
        assert_eq!(by_cgroup("/k/outery"), "");
        assert_eq!(by_cgroup("/k"), "");
        assert_eq!(by_cgroup("/"), "", "the root belongs to no container");

        // The container runs again, in namespaces and a group with the same numbers.
        let again = add("inner", 5, Some(12), Some(22), Some("/k/outer/x/inner"), Some(34));
        assert_eq!(id(table.by_perf_cgroup(32)), "", "the earlier run is gone");
        assert_eq!(table.by_mount_namespace(22).unwrap().device, 5);
        table.remove(&inner);
        assert_eq!(table.by_mount_namespace(22).unwrap().device, 5);
        assert_eq!(by_cgroup("/k/outer/x/inner"), "inner");
        table.remove(&beside);
        assert_eq!(id(table.by_pid_namespace(12)), "inner", "only one is left");
        for watched in [&outer, &again, &bare] {
            table.remove(watched);
        }
        let maps = table.read();
        assert!(maps.by_mount_namespace.0.is_empty() && maps.by_pid_namespace.0.is_empty());
        assert!(maps.by_perf_cgroup.0.is_empty() && maps.by_cgroup.0.is_empty());
    }

    #[test]
    fn w02_the_namespaces_of_a_container_are_forgotten_at_the_end_of_its_init() {
        let table = Table::default();
        let watched = Arc::new(in_namespaces("c", 5, Some(12), Some(22), Some("/k/c"), None));
        watched.set_has_own_pid_namespace();
        table.insert(&watched);
        let found = || {
            [
                table.by_pid_namespace(12),
                table.by_mount_namespace(22),
                table.first_in_pid_namespace(12),
            ]
            .map(|found| found.is_some())
        };
        table.ended(watched.init.pid + 1);
        assert_eq!(found(), [true; 3]);
        // The kernel records the end before containerd reports it, and reuses the numbers.
        table.ended(watched.init.pid);
        assert!(!watched.is_detaching());
        assert_eq!(found(), [false; 3]);
        assert!(table.by_cgroup(b"/k/c").is_some(), "control groups have names");
        // The namespaces of the host, or of a pod, do not end with it.
        let guest = Arc::new(in_namespaces("g", 6, Some(13), Some(23), None, None));
        table.insert(&guest);
        table.ended(guest.init.pid);
        assert!(table.by_pid_namespace(13).is_some() && table.by_mount_namespace(23).is_some());
    }

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
    fn a_file_that_may_have_been_made_in_the_container_is_its_own() {
        check(Some(50), 60, Place::Layers { is_young: false });
        // Written in place, in a layer.
        check(Some(50), 150, Place::Layers { is_young: true });
        check(Some(100), 100, Place::Own);
        check(Some(150), 150, Place::Own);
        // Replaced in a layer: it cannot be distinguished, and need not be.
        check(Some(150), 160, Place::Own);
        // The filesystem keeps no births.
        check(None, 60, Place::Layers { is_young: false });
        check(None, 150, Place::Own);
    }
}
