//! The containers that are watched, by what an event can tell of them.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::copyup::Residence;
use super::held::Files;
use super::trust::LayerFiles;
use crate::health::Failure;
use crate::model::{
    ContainerId, FileTime, Filesystem, LayerFile, OverlayDirs, ProcessIdentity, RootfsPath,
};
use crate::sys::clock;
use crate::sys::door::{Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::perf;
use crate::sys::pidfd;
use crate::sys::procfs::{self, Handle, Whereabouts};
use crate::watch::files::ways::Ways;

/// One container whose overlay carries our marks.
///
/// It holds no descriptor on the container's mount: an open one keeps the
/// superblock alive when the container is removed.
#[derive(Debug)]
pub(in crate::watch) struct Watched {
    pub(in crate::watch) container: ContainerId,
    pub(in crate::watch) init: ProcessIdentity,
    /// The overlay's own device number, which its files show too unless the
    /// layers are on several filesystems.
    pub(in crate::watch) device: u64,
    pub(in crate::watch) mount: Option<u64>,
    /// What the kernel calls the root directory when we ask: `/` for a pivoted
    /// root, a directory of the host for a mere chroot.
    pub(in crate::watch) root_name: Vec<u8>,
    pub(in crate::watch) pid_namespace: Option<u64>,
    has_own_pid_namespace: AtomicBool,
    has_foreign_layers: AtomicBool,
    /// Somebody has come into it from outside.
    has_sessions: AtomicBool,
    pub(in crate::watch) mount_namespace: Option<u64>,
    /// Its control group in the unified hierarchy; `None` where there is none of
    /// its own.
    pub(in crate::watch) cgroup: Option<Vec<u8>>,
    /// The same group as the kernel's records name it.
    pub(in crate::watch) perf_cgroup: Option<u64>,
    layers: OnceLock<Layers>,
    /// Inodes of the image's programs that are many, such as busybox, whose hard links are
    /// named like other programs.
    multicall: OnceLock<Vec<u64>>,
    /// Where its unchanged programs are asked about only once; `None` if nowhere.
    residence: OnceLock<Residence>,
    /// Its other mounts that carry our marks.
    mounts: RwLock<Arc<[MarkedMount]>>,
    /// How its files are reached beside their own paths.
    pub(in crate::watch) ways: Ways,
    /// Files that matter whatever they hold, beside those that the settings name.
    entry_point: RwLock<Vec<RootfsPath>>,
    /// Locked for a look-up or an insert at a time: the gate reads it.
    layer_files: RwLock<LayerFiles>,
    /// The upperdir is to be walked again because something was not seen. One
    /// flag, so that a flood of losses asks for one walk.
    rescan: AtomicBool,
    /// Failures that were said since the last walk began, a bit for each.
    losses: AtomicU64,
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
    /// The kernel has recorded the end of its first process, or of that one's first thread.
    init_may_have_ended: AtomicBool,
    /// The marks were there before its entry point ran.
    armed_before_start: AtomicBool,
    /// Until it has been looked whether that is so.
    is_being_armed: AtomicBool,
    /// The gate was asked about a program of init's.
    init_was_asked_about: AtomicBool,
    /// The kernel has recorded that init became its entry point.
    entry_is_recorded: AtomicBool,
    /// The event files that wait to be looked into.
    pub(in crate::watch) files: Files,
    /// Marked because its runtime was called; containerd has not told of it yet.
    unannounced: AtomicBool,
}

/// The control groups of a container's init.
#[derive(Debug, Default)]
pub(in crate::watch) struct ControlGroups {
    /// Its path in the unified hierarchy.
    pub(in crate::watch) unified: Option<Vec<u8>>,
    /// As the kernel's records name it.
    pub(in crate::watch) perf: Option<u64>,
}

/// Where the overlay's layers lie on the host.
#[derive(Debug)]
pub(in crate::watch) struct Layers {
    pub(in crate::watch) dirs: OverlayDirs,
    pub(in crate::watch) userxattr: bool,
    /// A directory of the image can be moved, and its files then have other paths
    /// than the image's.
    pub(in crate::watch) redirects: bool,
    /// Since when the container has an upper layer. `None` where the filesystem
    /// keeps no birth times: the upperdir's ctime would be no substitute, since
    /// it moves with every entry made in it.
    born: Option<FileTime>,
    /// How often the clock had been set by then.
    times_set: u64,
    /// A file was found in the upper layer that looks older than the layer: the clock was
    /// set while nobody could notice.
    holds_older: AtomicBool,
    /// The filesystems that its directories are on.
    devices: Vec<u64>,
    /// Which directories the lower layers were.
    lower: Vec<Option<(u64, u64)>>,
}

/// A mount of a container, beside its root, that carries our mark: all of its
/// filesystem, or only what is reached through the mount itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::watch) struct MarkedMount {
    pub(in crate::watch) id: u64,
    /// What the files on it show as theirs.
    pub(in crate::watch) device: u64,
    /// The directory (or file) of the filesystem that stands at `mount_point`.
    pub(in crate::watch) root: Vec<u8>,
    pub(in crate::watch) mount_point: Vec<u8>,
    pub(in crate::watch) whole_filesystem: bool,
}

/// What the gate makes of an executed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::watch) enum Standing {
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

/// Whether any thread of a process is alive: its first one may have ended before.
fn is_alive(process: ProcessIdentity) -> bool {
    let Ok(handle) = pidfd::open(process.pid) else { return false };
    procfs::read_stat(process.pid).is_ok_and(|stat| stat.identity == process)
        && !pidfd::has_ended(handle.as_fd())
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

/// Device and inode of a layer's directory.
fn identity_of(directory: &std::path::PathBuf) -> Option<(u64, u64)> {
    file::stat_path(directory).ok().map(|stat| (stat.device, stat.inode))
}

impl Layers {
    /// `None` if there is no such upperdir.
    pub(in crate::watch) fn new(mount: overlay::Mount) -> Option<Layers> {
        let times_set = clock::times_set();
        let upper = file::stat_path(&mount.dirs.upperdir).ok()?;
        let born = upper.born;
        let lower: Vec<Option<(u64, u64)>> = mount.dirs.lowerdirs.iter().map(identity_of).collect();
        let devices = lower.iter().flatten().map(|(device, _)| *device);
        let devices = devices.chain([upper.device]).collect();
        // A birth that is yet to come: the clock was set back, and files that are
        // made now would look older than their layer.
        let now = jiff::Timestamp::now().as_second();
        let born = born.filter(|born| born.seconds <= now);
        Some(Layers {
            dirs: mount.dirs,
            userxattr: mount.userxattr,
            redirects: mount.redirects,
            born,
            times_set,
            holds_older: AtomicBool::new(false),
            devices,
            lower,
        })
    }

    /// Whether a lower layer cannot be seen by its directory, or not any more. Where IDs
    /// are mapped, the overlay is made of mounts that are gone right afterwards.
    pub(in crate::watch) fn is_cut_off(&self) -> bool {
        let mut all = self.dirs.lowerdirs.iter().zip(&self.lower);
        all.any(|(directory, known)| known.is_none() || identity_of(directory) != *known)
    }

    /// Since when the container has an upper layer, as long as times tell anything: a
    /// file that was made after the clock was set back looks older than it is. Then
    /// nothing is known by its times, and all is compared by content.
    fn born(&self) -> Option<FileTime> {
        let is_trusted =
            clock::times_set() == self.times_set && !self.holds_older.load(Ordering::Acquire);
        self.born.filter(|_| is_trusted)
    }

    /// Notes the birth of a file of the upper layer. True if it is the first that cannot
    /// be true.
    pub(in crate::watch) fn note_birth(&self, stat: &Stat) -> bool {
        let is_older = match (stat.born, self.born) {
            (Some(file), Some(layer)) => file < layer,
            _ => false,
        };
        is_older && !self.holds_older.swap(true, Ordering::AcqRel)
    }

    /// Whether some of it is on this filesystem.
    pub(in crate::watch) fn is_on(&self, device: u64) -> bool {
        self.devices.contains(&device)
    }
}

impl Watched {
    pub(in crate::watch) fn new(
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
            has_foreign_layers: AtomicBool::new(false),
            has_sessions: AtomicBool::new(false),
            mount_namespace,
            cgroup: unified.filter(|cgroup| cgroup.len() > 1),
            perf_cgroup: perf,
            layers: OnceLock::new(),
            multicall: OnceLock::new(),
            residence: OnceLock::new(),
            mounts: RwLock::default(),
            ways: Ways::default(),
            entry_point: RwLock::default(),
            layer_files: RwLock::default(),
            rescan: AtomicBool::new(false),
            losses: AtomicU64::new(0),
            walk: AtomicBool::new(false),
            process_scan: AtomicU64::new(0),
            seen_since: AtomicU64::new(0),
            code_scan: AtomicBool::new(false),
            detaching: AtomicBool::new(false),
            init_may_have_ended: AtomicBool::new(false),
            armed_before_start: AtomicBool::new(false),
            is_being_armed: AtomicBool::new(true),
            init_was_asked_about: AtomicBool::new(false),
            entry_is_recorded: AtomicBool::new(false),
            unannounced: AtomicBool::new(false),
            files: Files::default(),
        }
    }

    /// A container that does not run, for a walk of its layers alone; `None` if they are
    /// gone. It belongs in no table: nothing that happens is its.
    pub(in crate::watch) fn stopped(
        container: ContainerId,
        dirs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    ) -> Option<Watched> {
        let nobody = ProcessIdentity { pid: 0, start_time: 0 };
        let upper = file::stat_path(&dirs.upperdir).ok()?;
        let watched = Watched::new(container, nobody, &upper, Vec::new(), None, None, None);
        let redirects = overlay::redirects_by_default();
        let (userxattr, workdir, is_exported) = (false, None, false);
        let mount = overlay::Mount { dirs, userxattr, redirects, workdir, is_exported };
        watched.set_layers(Layers::new(mount)?);
        watched.set_entry_point(entry_point);
        Some(watched)
    }

    /// Whether its init is the first process of a pid namespace, as its processes
    /// number themselves: another container may be in that too, but was put there.
    pub(in crate::watch) fn has_own_pid_namespace(&self) -> bool {
        self.has_own_pid_namespace.load(Ordering::Acquire)
    }

    /// Whether a process in one of its namespaces is its. With the first process of a
    /// pid namespace all others end, and the kernel gives the numbers out again.
    pub(in crate::watch) fn has_namespaces(&self) -> bool {
        let has_ended = || {
            self.is_detaching()
                || self.init_may_have_ended.load(Ordering::Acquire) && !is_alive(self.init)
        };
        !(self.has_own_pid_namespace() && has_ended())
    }

    /// Whether this control group is its own or within it; `None` if it has none.
    pub(in crate::watch) fn holds_cgroup(&self, cgroup: &[u8]) -> Option<bool> {
        let below = cgroup.strip_prefix(self.cgroup.as_deref()?);
        Some(below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")))
    }

    /// Whether somebody has come into it from outside since it is watched.
    pub(in crate::watch) fn has_sessions(&self) -> bool {
        self.has_sessions.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn set_has_sessions(&self) {
        self.has_sessions.store(true, Ordering::Release);
    }

    pub(in crate::watch) fn set_has_own_pid_namespace(&self) {
        self.has_own_pid_namespace.store(true, Ordering::Release);
    }

    pub(in crate::watch) fn layers(&self) -> Option<&Layers> {
        self.layers.get()
    }

    /// Whether opening a file of its root may mean to wait for a process or another
    /// machine. Then the root carries no mark of the gate, and only files of the upper
    /// layer are read, by their names there.
    pub(in crate::watch) fn has_foreign_layers(&self) -> bool {
        self.has_foreign_layers.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn set_has_foreign_layers(&self) {
        self.has_foreign_layers.store(true, Ordering::Release);
    }

    /// The proof that files of its root can be opened, if they can.
    pub(in crate::watch) fn local(&self) -> Option<Local> {
        (!self.has_foreign_layers()).then(Local::by_layers)
    }

    /// What is mounted, as some processes of it see it.
    pub(in crate::watch) fn view<'a>(&self, viewers: impl IntoIterator<Item = &'a Handle>) -> View {
        let view = View::of(viewers);
        match self.has_foreign_layers() {
            true => view.without_root(self.device),
            false => view.and_root(self.device),
        }
    }

    /// The first answer stays.
    pub(in crate::watch) fn set_layers(&self, layers: Layers) {
        let _ = self.layers.set(layers);
    }

    /// Asks once, when its layers are known, which inodes its programs have that are many.
    pub(in crate::watch) fn learn_multicall(&self, inodes: impl FnOnce(&Watched) -> Vec<u64>) {
        if self.layers().is_some() {
            self.multicall.get_or_init(|| inodes(self));
        }
    }

    /// Whether a program is one of those, whatever its file is called.
    pub(in crate::watch) fn is_multicall(&self, device: u64, inode: u64) -> bool {
        device == self.device && self.multicall.get().is_some_and(|inodes| inodes.contains(&inode))
    }

    pub(in crate::watch) fn residence(&self) -> Option<&Residence> {
        self.residence.get()
    }

    pub(in crate::watch) fn set_residence(&self, residence: Residence) {
        let _ = self.residence.set(residence);
    }

    /// Whether a file is the image's own as far as anybody can know, until it changes.
    pub(in crate::watch) fn is_certain(&self, stat: &Stat) -> bool {
        let born = self.layers().and_then(Layers::born);
        match place(stat, born) {
            Place::Own => false,
            Place::Layers { is_young } => {
                let Stat { device, inode, changed, .. } = *stat;
                self.layer_files().is_certain(&LayerFile { device, inode, changed }, is_young)
            }
        }
    }

    /// Its other mounts that carry our marks, as they were when last looked at.
    pub(in crate::watch) fn mounts(&self) -> Arc<[MarkedMount]> {
        self.mounts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(in crate::watch) fn set_entry_point(&self, paths: Vec<RootfsPath>) {
        *self.entry_point.write().unwrap_or_else(PoisonError::into_inner) = paths;
    }

    /// Whether a file at `path` takes part in starting the container.
    pub(in crate::watch) fn is_entry_point(&self, path: &RootfsPath) -> bool {
        self.entry_point.read().unwrap_or_else(PoisonError::into_inner).contains(path)
    }

    pub(in crate::watch) fn layer_files(&self) -> RwLockReadGuard<'_, LayerFiles> {
        // A change is one insert or removal: a panic leaves nothing half done.
        self.layer_files.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::watch) fn layer_files_mut(&self) -> RwLockWriteGuard<'_, LayerFiles> {
        self.layer_files.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose an executed file is.
    pub(in crate::watch) fn standing(&self, stat: &Stat) -> Standing {
        let born = self.layers().and_then(Layers::born);
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

    /// Asks for a walk of everything.
    pub(in crate::watch) fn ask_for_rescan(&self) {
        self.seen_since.store(procfs::ticks_since_boot(), Ordering::Release);
        self.ask_for_processes();
        self.code_scan.store(true, Ordering::Release);
        self.rescan.store(true, Ordering::Release);
    }

    /// Notes a loss; says whether it is the first of its kind since a walk began.
    pub(in crate::watch) fn loses(&self, failure: Failure) -> bool {
        let bit = 1_u64 << failure as u32;
        self.losses.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Asks for a walk of the upperdir alone.
    pub(in crate::watch) fn ask_for_walk(&self) {
        self.walk.store(true, Ordering::Release);
    }

    /// Says whether this is the first time.
    pub(in crate::watch) fn detach(&self) -> bool {
        !self.detaching.swap(true, Ordering::AcqRel)
    }

    pub(in crate::watch) fn is_detaching(&self) -> bool {
        self.detaching.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn is_armed_before_start(&self) -> bool {
        self.armed_before_start.load(Ordering::Acquire)
    }

    /// Its marks are in place. That init had not become the entry point by then is what a
    /// look can tell; an execve that had opened its file already is not seen by it.
    pub(in crate::watch) fn set_armed(&self, before_start: bool) {
        self.armed_before_start.store(before_start, Ordering::Release);
        self.is_being_armed.store(false, Ordering::Release);
    }

    pub(in crate::watch) fn is_being_armed(&self) -> bool {
        self.is_being_armed.load(Ordering::Acquire)
    }

    /// It turned out that its entry point had begun before its marks were in place. True
    /// once, and only where the opposite was believed.
    pub(in crate::watch) fn take_armed_before_start(&self) -> bool {
        self.armed_before_start.swap(false, Ordering::AcqRel)
    }

    pub(in crate::watch) fn set_init_asked_about(&self) {
        self.init_was_asked_about.store(true, Ordering::Release);
    }

    pub(in crate::watch) fn init_was_asked_about(&self) -> bool {
        self.init_was_asked_about.load(Ordering::Acquire)
    }

    /// Says whether this is news.
    pub(in crate::watch) fn record_entry(&self) -> bool {
        !self.entry_is_recorded.swap(true, Ordering::AcqRel)
    }

    pub(in crate::watch) fn entry_is_recorded(&self) -> bool {
        self.entry_is_recorded.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn is_unannounced(&self) -> bool {
        self.unannounced.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn set_unannounced(&self, unannounced: bool) {
        self.unannounced.store(unannounced, Ordering::Release);
    }

    pub(in crate::watch) fn wants_rescan(&self) -> bool {
        self.rescan.load(Ordering::Acquire) || self.walk.load(Ordering::Acquire)
    }

    /// A walk begins. Says whether it is to make up for a loss.
    pub(in crate::watch) fn take_rescan(&self) -> bool {
        self.walk.store(false, Ordering::Release);
        self.losses.store(0, Ordering::Release);
        self.rescan.swap(false, Ordering::AcqRel)
    }

    /// Asks for a look at the processes whose start was not seen.
    pub(in crate::watch) fn ask_for_processes(&self) {
        self.process_scan.fetch_max(self.seen_since.load(Ordering::Acquire), Ordering::AcqRel);
    }

    pub(in crate::watch) fn take_code_scan(&self) -> bool {
        self.code_scan.swap(false, Ordering::AcqRel)
    }

    /// Whether the container's processes are to be looked at, and since when the
    /// start of every other one has been seen.
    pub(in crate::watch) fn take_process_scan(&self) -> Option<u64> {
        Some(self.process_scan.swap(0, Ordering::AcqRel)).filter(|&since| since > 0)
    }
}

#[derive(Debug, Default)]
pub(in crate::watch) struct Table {
    maps: RwLock<Maps>,
    /// How many containers were ever put in.
    generation: AtomicU64,
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
    /// The containers of `by_container` by what their processes show: each record of
    /// the kernel asks for one of these.
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
pub(in crate::watch) fn parents_cgroup(process: &Handle) -> Option<Vec<u8>> {
    Handle::open(process.stat().ok()?.parent).ok()?.cgroup().ok()
}

/// Whether a process that is in a container by nothing but its pid namespace may be the
/// first one of a container that is not known yet. Who only enters a namespace stays in
/// the control group of who has called them. The root is where processes are that nobody
/// has put anywhere.
pub(in crate::watch) fn is_put_elsewhere(cgroup: Option<&[u8]>, parents: Option<&[u8]>) -> bool {
    matches!((cgroup, parents), (Some(own), Some(parents)) if own != parents && own != b"/")
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

    /// Moves when a container is watched: what was no container's may be one's.
    pub(in crate::watch) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(in crate::watch) fn insert(&self, watched: &Arc<Watched>) {
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

    /// Forgets this attachment and no later one of the same container.
    pub(in crate::watch) fn remove(&self, watched: &Arc<Watched>) {
        let mut maps = self.write();
        let other = |entry: &Arc<Watched>| !Arc::ptr_eq(entry, watched);
        maps.unindex(watched);
        maps.by_container.retain(|_, entry| other(entry));
        maps.by_device.retain(|_, entry| other(entry));
        maps.by_mount.retain(|_, entry| other(entry));
        maps.forget_mounts(watched);
    }

    /// These, and no others any more, are the container's other mounts.
    pub(in crate::watch) fn set_mounts(&self, watched: &Arc<Watched>, mounts: Vec<MarkedMount>) {
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
    pub(in crate::watch) fn note_kinds(&self, kinds: impl Iterator<Item = (u64, Filesystem)>) {
        let kinds: Vec<_> = kinds.take(MAX_KINDS).collect();
        let mut maps = self.write();
        if maps.kinds.len() + kinds.len() > MAX_KINDS {
            maps.kinds.clear();
        }
        maps.kinds.extend(kinds);
    }

    /// What a filesystem was that nothing is mounted from any more.
    pub(in crate::watch) fn kind_of(&self, device: u64) -> Option<Filesystem> {
        self.read().kinds.get(&device).copied()
    }

    /// Whether the gate is asked before a file of this device, reached through this
    /// mount, is executed.
    pub(in crate::watch) fn is_marked(&self, device: u64, mount: Option<u64>) -> bool {
        let maps = self.read();
        let is_gated = |watched: &Arc<Watched>| !watched.has_foreign_layers();
        maps.by_device.get(&device).is_some_and(is_gated)
            || maps.other_devices.contains_key(&device)
            || mount.is_some_and(|mount| {
                maps.by_mount.get(&mount).is_some_and(is_gated)
                    || maps.other_mounts.contains_key(&mount)
            })
    }

    /// The same of a file that was executed at a time, by the clock of the kernel's
    /// records: the mark may be newer.
    pub(in crate::watch) fn was_marked(&self, device: u64, mount: Option<u64>, time: u64) -> bool {
        let is_younger = self.read().since.get(&device).is_some_and(|since| time < *since);
        !is_younger && self.is_marked(device, mount)
    }

    /// Whose an executed file is that lies on no container's own overlay: by who
    /// executes it. A program of the host's is nobody's, even from a volume that a
    /// container shares.
    pub(in crate::watch) fn user_of(
        &self,
        stat: &Stat,
        process: &Whereabouts,
    ) -> Option<Arc<Watched>> {
        if let Some(watched) = self.of_whereabouts(process) {
            return Some(watched);
        }
        // In namespaces of its own, where control groups tell nothing.
        if procfs::is_host_pid_namespace(process.pid_namespace?) {
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
    pub(in crate::watch) fn by_device(&self, device: u64) -> Option<Arc<Watched>> {
        self.read().by_device.get(&device).cloned()
    }

    /// The container of a control group, as the kernel's records name it.
    pub(in crate::watch) fn by_perf_cgroup(&self, cgroup: u64) -> Option<Arc<Watched>> {
        self.read().by_perf_cgroup.get(&cgroup).last().cloned()
    }

    pub(in crate::watch) fn get(&self, container: &ContainerId) -> Option<Arc<Watched>> {
        self.read().by_container.get(container).cloned()
    }

    /// Whose file this is: by its device; or by its mount, for an overlay whose
    /// layers are on several filesystems.
    pub(in crate::watch) fn owner(&self, stat: &Stat) -> Option<Arc<Watched>> {
        let maps = self.read();
        maps.by_device.get(&stat.device).or_else(|| maps.by_mount.get(&stat.mount?)).cloned()
    }

    /// Whose a process is, whatever it does: by its mount namespace, its control group,
    /// which it keeps in namespaces of its own, and its pid namespace, into which other
    /// containers can be put. A container may share namespaces of the host; they say
    /// nothing then.
    pub(in crate::watch) fn of_process(&self, process: &Handle) -> Option<Arc<Watched>> {
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
            // The parent is looked at last: few processes get so far.
            let may_be_unknown =
                is_put_elsewhere(cgroup.as_deref(), parents_cgroup(process).as_deref());
            (!may_be_unknown).then_some(watched)
        })
    }

    /// The same of a process that may be gone by now.
    pub(in crate::watch) fn of_whereabouts(&self, process: &Whereabouts) -> Option<Arc<Watched>> {
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

    /// Whether a container is in this mount namespace.
    pub(in crate::watch) fn is_mount_namespace(&self, namespace: u64) -> bool {
        self.by_mount_namespace(namespace).is_some()
    }

    fn by_mount_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_mount_namespace.get(&namespace);
        found.iter().rev().find(|watched| watched.has_namespaces()).cloned()
    }

    /// The container whose control group is `cgroup`, or holds it: the innermost.
    fn by_cgroup(&self, cgroup: &[u8]) -> Option<Arc<Watched>> {
        let maps = self.read();
        let above = |path: &[u8]| path.iter().rposition(|&byte| byte == b'/');
        std::iter::successors(Some(cgroup), |path| above(path).map(|end| &path[..end]))
            .find_map(|path| maps.by_cgroup.get(path).last().cloned())
    }

    /// The container in whose pid namespace a process is.
    pub(in crate::watch) fn by_pid_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_pid_namespace.get(&namespace);
        let mut found = found.iter().filter(|watched| watched.has_namespaces());
        let first = found.next()?;
        // Several containers of a pod can share one; then it names nobody.
        found.next().is_none().then(|| first.clone())
    }

    /// The container that began a pid namespace, in which others may be too.
    pub(in crate::watch) fn first_in_pid_namespace(&self, namespace: u64) -> Option<Arc<Watched>> {
        let maps = self.read();
        let found = maps.by_pid_namespace.get(&namespace);
        let began = |watched: &&Arc<Watched>| watched.has_own_pid_namespace();
        found.iter().filter(began).find(|watched| watched.has_namespaces()).cloned()
    }

    /// The kernel has recorded the end of a process: if it is a container's first one, the
    /// numbers of the container's namespaces may be another's from here on.
    pub(in crate::watch) fn ended(&self, pid: u32) {
        for watched in self.read().by_container.values() {
            if watched.init.pid == pid {
                watched.init_may_have_ended.store(true, Ordering::Release);
            }
        }
    }

    /// All containers whose processes are in this pid namespace.
    pub(in crate::watch) fn in_pid_namespace(&self, namespace: u64) -> Vec<Arc<Watched>> {
        self.read().by_pid_namespace.get(&namespace).to_vec()
    }

    pub(in crate::watch) fn all(&self) -> Vec<Arc<Watched>> {
        self.read().by_container.values().cloned().collect()
    }
}

#[cfg(test)]
pub(in crate::watch) mod tests {
    use super::*;
    use crate::model::FileType;

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

    /// A container whose overlay has this device.
    pub(in crate::watch) fn watched(id: &str, device: u64) -> Watched {
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
    fn d02_a_layer_whose_directory_was_only_there_for_the_mount_is_cut_off() {
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
    fn x19_what_the_upper_layer_holds_shows_that_the_clock_was_set_back() {
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
        assert!(layers.born().is_some(), "a filesystem that keeps births");
        assert_eq!(place(&stat(&early), layers.born()), Place::Layers { is_young: false });
        // No file can be made in the layer before the layer.
        assert!(layers.note_birth(&stat(&early)));
        assert!(!layers.note_birth(&stat(&early)), "that is said once");
        assert_eq!(place(&stat(&early), layers.born()), Place::Own);

        let set_since =
            Layers { times_set: clock::times_set() + 1, ..Layers::new(mount()).unwrap() };
        assert_eq!(place(&stat(&early), set_since.born()), Place::Own, "the clock was set");
    }

    #[test]
    fn h18_who_is_meant_is_found_by_each_thing_that_a_process_shows() {
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
        assert_eq!(id(table.by_pid_namespace(12)), "", "two share it");
        let by_cgroup = |path: &str| id(table.by_cgroup(path.as_bytes()));
        assert_eq!(by_cgroup("/k/outer"), "outer");
        assert_eq!(by_cgroup("/k/outer/x"), "outer");
        assert_eq!(by_cgroup("/k/outer/x/inner/deep/er"), "inner", "the innermost");
        assert_eq!(by_cgroup("/k/outerx"), "beside", "no mere beginning of a name");
        assert_eq!(by_cgroup("/k/outery"), "");
        assert_eq!(by_cgroup("/k"), "");
        assert_eq!(by_cgroup("/"), "", "the root is nobody's own");

        // The container runs anew, in namespaces and a group that have the same numbers.
        let again = add("inner", 5, Some(12), Some(22), Some("/k/outer/x/inner"), Some(34));
        assert_eq!(id(table.by_perf_cgroup(32)), "", "the earlier run has gone");
        assert_eq!(table.by_mount_namespace(22).unwrap().device, 5);
        table.remove(&inner);
        assert_eq!(table.by_mount_namespace(22).unwrap().device, 5);
        assert_eq!(by_cgroup("/k/outer/x/inner"), "inner");
        table.remove(&beside);
        assert_eq!(id(table.by_pid_namespace(12)), "inner", "nobody shares it any more");
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
        // The kernel records it before containerd reports it, and gives the numbers to
        // somebody else.
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
