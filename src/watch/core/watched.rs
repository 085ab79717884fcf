//! A watched container: its identity, its layers, the progress of its run, and the scans
//! that are requested for it.
//!
//! It must hold no descriptor on the container's mount: an open one keeps the superblock
//! alive when the container is removed. All threads share a value of it; the table
//! (`table`) finds it. It does not mark or scan.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::copyup::Residence;
use super::held::{Held, HeldFiles};
use super::layers::{self, Layers};
use super::trust::LayerFiles;
use super::ways::Ways;
use crate::gate::{Enforced, Undecided};
use crate::health::Failure;
use crate::model::{ContainerId, LayerFile, OverlayDirs, ProcessIdentity, RootfsPath};
use crate::sys::door::{Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle};
use crate::sys::{overlay, pidfd};

/// One container whose overlay carries driftd's marks.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) container: ContainerId,
    pub(crate) init: ProcessIdentity,
    /// The overlay's own device number. Its files show it too, unless the layers are on
    /// several filesystems.
    pub(crate) device: u64,
    pub(crate) mount: Option<u64>,
    /// The name of the root directory that the kernel shows to driftd: `/` for a pivoted
    /// root, a directory of the host for a mere chroot.
    pub(crate) root_name: Vec<u8>,
    pub(crate) pid_namespace: Option<u64>,
    pub(crate) mount_namespace: Option<u64>,
    /// Its control group in the unified hierarchy; `None` if it has none of its own.
    pub(crate) cgroup: Option<Vec<u8>>,
    /// The same group as the kernel's records name it.
    pub(crate) perf_cgroup: Option<u64>,
    /// Its other mounts that carry driftd's marks.
    mounts: RwLock<Arc<[MarkedMount]>>,
    /// The other paths by which its files are reached.
    pub(crate) ways: Ways,
    /// The files of events that wait to be read.
    pub(crate) files: HeldFiles,
    image: Image,
    scans: Scans,
    run: Run,
}

/// A container's layers and their files.
#[derive(Debug, Default)]
struct Image {
    has_foreign_layers: AtomicBool,
    layers: OnceLock<Layers>,
    /// Inodes of the image's multi-call programs, such as busybox: their hard links have the
    /// names of other programs.
    multicall: OnceLock<Vec<u64>>,
    /// The shard where its unchanged programs are asked about only once, if it is in one.
    residence: OnceLock<Residence>,
    /// Files that matter whatever their content is, beside those that the settings name.
    entry_point: RwLock<Vec<RootfsPath>>,
    /// Locked only for one look-up or insert at a time, because the gate reads it.
    layer_files: RwLock<LayerFiles>,
}

/// Requests for the next scans of a container.
#[derive(Debug, Default)]
struct Scans {
    /// The upperdir must be scanned again because something was not seen. It is a flag, so
    /// that a flood of losses requests one scan.
    rescan: AtomicBool,
    /// Failures that were reported since the last scan began, a bit for each.
    losses: AtomicU64,
    /// The upperdir must be scanned although nothing was lost.
    walk: AtomicBool,
    /// The container's processes must be checked: those that existed at this time after boot,
    /// in clock ticks. 0 if none must be checked.
    process_scan: AtomicU64,
    /// Since this time, the start of each of its processes has been seen.
    seen_since: AtomicU64,
    /// The code that its processes have loaded must be checked.
    code_scan: AtomicBool,
}

/// How a container's run has begun, and whether it is over.
#[derive(Debug, Default)]
struct Run {
    has_own_pid_namespace: AtomicBool,
    /// Rules may deny here: executions wait for decisions.
    is_enforced: AtomicBool,
    /// A session was opened in it.
    has_sessions: AtomicBool,
    /// The container has ended: only its last scan remains.
    detaching: AtomicBool,
    /// The kernel has recorded the end of its first process, or of the first thread of that.
    init_may_have_ended: AtomicBool,
    /// The marks were in place before its entry point ran.
    armed_before_start: AtomicBool,
    /// True until that has been checked.
    is_being_armed: AtomicBool,
    /// The gate was asked about a program that init executes.
    init_was_asked_about: AtomicBool,
    /// The kernel has recorded that init became its entry point.
    entry_is_recorded: AtomicBool,
    /// Marked because its runtime was invoked; containerd has not announced it yet.
    unannounced: AtomicBool,
}

/// The control groups of a container's init.
#[derive(Debug, Default)]
pub(crate) struct ControlGroups {
    /// Its path in the unified hierarchy.
    pub(crate) unified: Option<Vec<u8>>,
    /// As the kernel's records name it.
    pub(crate) perf: Option<u64>,
}

/// A mount of a container, beside its root, that carries driftd's mark. The mark is on the
/// whole filesystem, or only on what is reached through this mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkedMount {
    pub(crate) id: u64,
    /// The device number that the files on it show.
    pub(crate) device: u64,
    /// The directory (or file) of the filesystem that is mounted at `mount_point`.
    pub(crate) root: Vec<u8>,
    pub(crate) mount_point: Vec<u8>,
    pub(crate) whole_filesystem: bool,
}

/// The origin of an executed file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The container's own.
    Own,
    /// A file of the image's layers that may have been changed there.
    Doubtful(LayerFile),
    /// A file of the image's layers, whose directory may have been moved.
    Movable(LayerFile),
    Image,
}

/// Whether any thread of a process is alive: the first thread may have ended before.
pub(crate) fn is_alive(process: ProcessIdentity) -> bool {
    let Ok(handle) = pidfd::open(process.pid) else { return false };
    procfs::read_stat(process.pid).is_ok_and(|stat| stat.identity == process)
        && !pidfd::has_ended(handle.as_fd())
}

impl Watched {
    pub(crate) fn new(
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
            mount_namespace,
            cgroup: unified.filter(|cgroup| cgroup.len() > 1),
            perf_cgroup: perf,
            mounts: RwLock::default(),
            ways: Ways::default(),
            files: HeldFiles::default(),
            image: Image::default(),
            scans: Scans::default(),
            run: Run { is_being_armed: AtomicBool::new(true), ..Run::default() },
        }
    }

    /// A container that does not run, for a scan of its layers; `None` if they are gone. It
    /// must not be put into a table: no event belongs to it.
    pub(crate) fn stopped(
        container: ContainerId,
        dirs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    ) -> Option<Watched> {
        let no_process = ProcessIdentity { pid: 0, start_time: 0 };
        let upper = file::stat_path(&dirs.upperdir).ok()?;
        let watched = Watched::new(container, no_process, &upper, Vec::new(), None, None, None);
        let redirects = overlay::redirects_by_default();
        let (userxattr, workdir, is_exported) = (false, None, false);
        let mount = overlay::Mount { dirs, userxattr, redirects, workdir, is_exported };
        watched.set_layers(Layers::new(mount)?);
        watched.set_entry_point(entry_point);
        Some(watched)
    }

    /// Whether its init is the first process of its pid namespace, by the numbers inside.
    /// Another container may be in the namespace too, but joined it later.
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        self.run.has_own_pid_namespace.load(Ordering::Acquire)
    }

    /// Whether a process in one of its namespaces belongs to it. When the first process of a
    /// pid namespace ends, all others end too, and the kernel reuses the namespace numbers.
    pub(crate) fn has_namespaces(&self) -> bool {
        let has_ended = || {
            self.is_detaching()
                || self.run.init_may_have_ended.load(Ordering::Acquire) && !is_alive(self.init)
        };
        !(self.has_own_pid_namespace() && has_ended())
    }

    /// Whether `cgroup` is the container's control group or lies within it; `None` if the
    /// container has none.
    pub(crate) fn holds_cgroup(&self, cgroup: &[u8]) -> Option<bool> {
        let below = cgroup.strip_prefix(self.cgroup.as_deref()?);
        Some(below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")))
    }

    /// How the gate recognises its executions, where they wait for decisions.
    pub(crate) fn enforced(&self, undecided: Undecided) -> Enforced {
        // A container in one of the host's namespaces has not the host's processes.
        let own = Handle::open(std::process::id()).map(|own| own.whereabouts());
        let (pids, mounts) =
            own.map_or((None, None), |own| (own.pid_namespace, own.mount_namespace));
        Enforced {
            device: self.device,
            mount: self.mount,
            pid_namespace: self.pid_namespace.filter(|one| Some(*one) != pids),
            mount_namespace: self.mount_namespace.filter(|one| Some(*one) != mounts),
            cgroup: self.cgroup.clone(),
            undecided,
        }
    }

    /// Whether rules may deny what is run in it.
    pub(crate) fn is_enforced(&self) -> bool {
        self.run.is_enforced.load(Ordering::Acquire)
    }

    /// True if that is new.
    pub(crate) fn set_enforced(&self, is_enforced: bool) -> bool {
        self.run.is_enforced.swap(is_enforced, Ordering::AcqRel) != is_enforced
    }

    /// Whether a session was opened in it since it is watched.
    pub(crate) fn has_sessions(&self) -> bool {
        self.run.has_sessions.load(Ordering::Acquire)
    }

    pub(crate) fn set_has_sessions(&self) {
        self.run.has_sessions.store(true, Ordering::Release);
    }

    pub(crate) fn set_has_own_pid_namespace(&self) {
        self.run.has_own_pid_namespace.store(true, Ordering::Release);
    }

    pub(crate) fn layers(&self) -> Option<&Layers> {
        self.image.layers.get()
    }

    /// Whether opening a file of its root may wait for a process or for another machine. Then
    /// the root carries no mark of the gate, and only files of the upper layer are read, by
    /// their names there.
    pub(crate) fn has_foreign_layers(&self) -> bool {
        self.image.has_foreign_layers.load(Ordering::Acquire)
    }

    pub(crate) fn set_has_foreign_layers(&self) {
        self.image.has_foreign_layers.store(true, Ordering::Release);
    }

    /// The proof that files of its root can be opened, if they can.
    pub(crate) fn local(&self) -> Option<Local> {
        (!self.has_foreign_layers()).then(Local::by_layers)
    }

    /// The mounts that some of its processes see.
    pub(crate) fn view<'a>(&self, viewers: impl IntoIterator<Item = &'a Handle>) -> View {
        let view = View::of(viewers);
        match self.has_foreign_layers() {
            true => view.without_root(self.device),
            false => view.and_root(self.device),
        }
    }

    /// Sets the layers. The first value stays.
    pub(crate) fn set_layers(&self, layers: Layers) {
        let _ = self.image.layers.set(layers);
    }

    /// Reads the inodes of its multi-call programs, once, when its layers are known.
    pub(crate) fn learn_multicall(&self, inodes: impl FnOnce(&Watched) -> Vec<u64>) {
        if self.layers().is_some() {
            self.image.multicall.get_or_init(|| inodes(self));
        }
    }

    /// Whether a program is a multi-call program, under any name.
    pub(crate) fn is_multicall(&self, device: u64, inode: u64) -> bool {
        device == self.device
            && self.image.multicall.get().is_some_and(|inodes| inodes.contains(&inode))
    }

    pub(crate) fn residence(&self) -> Option<&Residence> {
        self.image.residence.get()
    }

    pub(crate) fn set_residence(&self, residence: Residence) {
        let _ = self.image.residence.set(residence);
    }

    /// Whether a file certainly is the image's own, until it changes.
    pub(crate) fn is_certain(&self, stat: &Stat) -> bool {
        let born = self.layers().and_then(Layers::born);
        match layers::place(stat, born) {
            layers::Place::Own => false,
            layers::Place::Layers { is_young } => {
                let Stat { device, inode, changed, .. } = *stat;
                self.layer_files().is_certain(&LayerFile { device, inode, changed }, is_young)
            }
        }
    }

    /// Its other mounts that carry driftd's marks, as they were when they were last listed.
    pub(crate) fn mounts(&self) -> Arc<[MarkedMount]> {
        self.mounts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Holds a file of this container until the container ends.
    pub(crate) fn hold(&self, file: OwnedFd) -> Held {
        Held::new(&self.files, file)
    }

    pub(crate) fn give_back(&self, held: &Held, fd: OwnedFd) {
        held.give_back(fd, || self.is_detaching());
    }

    pub(crate) fn set_mounts(&self, mounts: Vec<MarkedMount>) {
        *self.mounts.write().unwrap_or_else(PoisonError::into_inner) = mounts.into();
    }

    /// The kernel has recorded the end of its first process, or of the first thread of that.
    pub(crate) fn note_end_of_init(&self) {
        self.run.init_may_have_ended.store(true, Ordering::Release);
    }

    pub(crate) fn set_entry_point(&self, paths: Vec<RootfsPath>) {
        *self.image.entry_point.write().unwrap_or_else(PoisonError::into_inner) = paths;
    }

    /// Whether a file at `path` takes part in starting the container.
    pub(crate) fn is_entry_point(&self, path: &RootfsPath) -> bool {
        self.image.entry_point.read().unwrap_or_else(PoisonError::into_inner).contains(path)
    }

    pub(crate) fn layer_files(&self) -> RwLockReadGuard<'_, LayerFiles> {
        // A change is one insert or removal: a panic leaves nothing half done.
        self.image.layer_files.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn layer_files_mut(&self) -> RwLockWriteGuard<'_, LayerFiles> {
        self.image.layer_files.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The origin of an executed file.
    pub(crate) fn standing(&self, stat: &Stat) -> Standing {
        let born = self.layers().and_then(Layers::born);
        match layers::place(stat, born) {
            layers::Place::Own => Standing::Own,
            layers::Place::Layers { is_young } => {
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

    /// Requests a scan of everything: files, processes and loaded code.
    pub(crate) fn ask_for_rescan(&self) {
        self.scans.seen_since.store(procfs::ticks_since_boot(), Ordering::Release);
        self.ask_for_processes();
        self.scans.code_scan.store(true, Ordering::Release);
        self.scans.rescan.store(true, Ordering::Release);
    }

    /// Notes a loss; true if it is the first of its kind since a scan began.
    pub(crate) fn note_loss(&self, failure: Failure) -> bool {
        let bit = 1_u64 << failure as u32;
        self.scans.losses.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Requests a scan of the upperdir alone.
    pub(crate) fn ask_for_walk(&self) {
        self.scans.walk.store(true, Ordering::Release);
    }

    /// Notes the end of the container; true the first time.
    pub(crate) fn detach(&self) -> bool {
        !self.run.detaching.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_detaching(&self) -> bool {
        self.run.detaching.load(Ordering::Acquire)
    }

    pub(crate) fn is_armed_before_start(&self) -> bool {
        self.run.armed_before_start.load(Ordering::Acquire)
    }

    /// Its marks are in place. `before_start`: a check found that init had not become the
    /// entry point by then. The check does not see an execve that had already opened its file.
    pub(crate) fn set_armed(&self, before_start: bool) {
        self.run.armed_before_start.store(before_start, Ordering::Release);
        self.run.is_being_armed.store(false, Ordering::Release);
    }

    pub(crate) fn is_being_armed(&self) -> bool {
        self.run.is_being_armed.load(Ordering::Acquire)
    }

    /// Its entry point had begun before its marks were in place after all. True once, and only
    /// if the opposite was assumed.
    pub(crate) fn take_armed_before_start(&self) -> bool {
        self.run.armed_before_start.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn set_init_asked_about(&self) {
        self.run.init_was_asked_about.store(true, Ordering::Release);
    }

    pub(crate) fn init_was_asked_about(&self) -> bool {
        self.run.init_was_asked_about.load(Ordering::Acquire)
    }

    /// Notes the record of its entry point; true the first time.
    pub(crate) fn record_entry(&self) -> bool {
        !self.run.entry_is_recorded.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn entry_is_recorded(&self) -> bool {
        self.run.entry_is_recorded.load(Ordering::Acquire)
    }

    pub(crate) fn is_unannounced(&self) -> bool {
        self.run.unannounced.load(Ordering::Acquire)
    }

    pub(crate) fn set_unannounced(&self, unannounced: bool) {
        self.run.unannounced.store(unannounced, Ordering::Release);
    }

    pub(crate) fn wants_rescan(&self) -> bool {
        self.scans.rescan.load(Ordering::Acquire) || self.scans.walk.load(Ordering::Acquire)
    }

    /// A scan begins. True if it must make up for a loss.
    pub(crate) fn take_rescan(&self) -> bool {
        self.scans.walk.store(false, Ordering::Release);
        self.scans.losses.store(0, Ordering::Release);
        self.scans.rescan.swap(false, Ordering::AcqRel)
    }

    /// Requests a check of the processes whose start was not seen.
    pub(crate) fn ask_for_processes(&self) {
        self.scans
            .process_scan
            .fetch_max(self.scans.seen_since.load(Ordering::Acquire), Ordering::AcqRel);
    }

    pub(crate) fn take_code_scan(&self) -> bool {
        self.scans.code_scan.swap(false, Ordering::AcqRel)
    }

    /// Whether the container's processes must be checked, and since when the start of every
    /// other process has been seen.
    pub(crate) fn take_process_scan(&self) -> Option<u64> {
        Some(self.scans.process_scan.swap(0, Ordering::AcqRel)).filter(|&since| since > 0)
    }
}

/// A container that is known only by its numbers. Two of a pod share a pid namespace.
#[cfg(test)]
pub(crate) fn some_container(number: u64) -> Watched {
    use crate::model::{ContainerId, FileTime, FileType, ProcessIdentity};
    let time = FileTime { seconds: 0, nanoseconds: 0 };
    let root = file::Stat {
        device: number,
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
        mount: Some(number),
    };
    let unified = Some(format!("/pods/{number}").into_bytes());
    Watched::new(
        ContainerId::new("n", &number.to_string()),
        ProcessIdentity { pid: 1, start_time: 1 },
        &root,
        b"/".to_vec(),
        Some(number / 2),
        Some(1000 + number),
        Some(ControlGroups { unified, perf: None }),
    )
}
