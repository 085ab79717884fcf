//! A watched container: what is known of it, and what is asked for it.
//!
//! It holds no descriptor on the container's mount.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::copyup::Residence;
use super::held::{Held, HeldFiles};
use super::layers::{self, Layers};
use super::trust::LayerFiles;
use super::ways::Ways;
use crate::health::Failure;
use crate::model::{ContainerId, LayerFile, OverlayDirs, ProcessIdentity, RootfsPath};
use crate::sys::door::{Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle};
use crate::sys::{overlay, pidfd};

/// One container whose overlay carries our marks.
///
/// It holds no descriptor on the container's mount: an open one keeps the
/// superblock alive when the container is removed.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) container: ContainerId,
    pub(crate) init: ProcessIdentity,
    /// The overlay's own device number, which its files show too unless the
    /// layers are on several filesystems.
    pub(crate) device: u64,
    pub(crate) mount: Option<u64>,
    /// What the kernel calls the root directory when we ask: `/` for a pivoted
    /// root, a directory of the host for a mere chroot.
    pub(crate) root_name: Vec<u8>,
    pub(crate) pid_namespace: Option<u64>,
    pub(crate) mount_namespace: Option<u64>,
    /// Its control group in the unified hierarchy; `None` where there is none of
    /// its own.
    pub(crate) cgroup: Option<Vec<u8>>,
    /// The same group as the kernel's records name it.
    pub(crate) perf_cgroup: Option<u64>,
    /// Its other mounts that carry our marks.
    mounts: RwLock<Arc<[MarkedMount]>>,
    /// How its files are reached beside their own paths.
    pub(crate) ways: Ways,
    /// The event files that wait to be looked into.
    pub(crate) files: HeldFiles,
    image: Image,
    scans: Scans,
    run: Run,
}

/// What is known of a container's layers and their files.
#[derive(Debug, Default)]
struct Image {
    has_foreign_layers: AtomicBool,
    layers: OnceLock<Layers>,
    /// Inodes of the image's programs that are many, such as busybox, whose hard links are
    /// named like other programs.
    multicall: OnceLock<Vec<u64>>,
    /// Where its unchanged programs are asked about only once; `None` if nowhere.
    residence: OnceLock<Residence>,
    /// Files that matter whatever they hold, beside those that the settings name.
    entry_point: RwLock<Vec<RootfsPath>>,
    /// Locked for a look-up or an insert at a time: the gate reads it.
    layer_files: RwLock<LayerFiles>,
}

/// What is asked of the next scans of a container.
#[derive(Debug, Default)]
struct Scans {
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
}

/// How a container's run has begun, and whether it is over.
#[derive(Debug, Default)]
struct Run {
    has_own_pid_namespace: AtomicBool,
    /// Somebody has come into it from outside.
    has_sessions: AtomicBool,
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
    /// Marked because its runtime was called; containerd has not told of it yet.
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

/// A mount of a container, beside its root, that carries our mark: all of its
/// filesystem, or only what is reached through the mount itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkedMount {
    pub(crate) id: u64,
    /// What the files on it show as theirs.
    pub(crate) device: u64,
    /// The directory (or file) of the filesystem that stands at `mount_point`.
    pub(crate) root: Vec<u8>,
    pub(crate) mount_point: Vec<u8>,
    pub(crate) whole_filesystem: bool,
}

/// What the gate makes of an executed file.
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

/// Whether any thread of a process is alive: its first one may have ended before.
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

    /// A container that does not run, for a walk of its layers alone; `None` if they are
    /// gone. It belongs in no table: nothing that happens is its.
    pub(crate) fn stopped(
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
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        self.run.has_own_pid_namespace.load(Ordering::Acquire)
    }

    /// Whether a process in one of its namespaces is its. With the first process of a
    /// pid namespace all others end, and the kernel gives the numbers out again.
    pub(crate) fn has_namespaces(&self) -> bool {
        let has_ended = || {
            self.is_detaching()
                || self.run.init_may_have_ended.load(Ordering::Acquire) && !is_alive(self.init)
        };
        !(self.has_own_pid_namespace() && has_ended())
    }

    /// Whether this control group is its own or within it; `None` if it has none.
    pub(crate) fn holds_cgroup(&self, cgroup: &[u8]) -> Option<bool> {
        let below = cgroup.strip_prefix(self.cgroup.as_deref()?);
        Some(below.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/")))
    }

    /// Whether somebody has come into it from outside since it is watched.
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

    /// Whether opening a file of its root may mean to wait for a process or another
    /// machine. Then the root carries no mark of the gate, and only files of the upper
    /// layer are read, by their names there.
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

    /// What is mounted, as some processes of it see it.
    pub(crate) fn view<'a>(&self, viewers: impl IntoIterator<Item = &'a Handle>) -> View {
        let view = View::of(viewers);
        match self.has_foreign_layers() {
            true => view.without_root(self.device),
            false => view.and_root(self.device),
        }
    }

    /// The first answer stays.
    pub(crate) fn set_layers(&self, layers: Layers) {
        let _ = self.image.layers.set(layers);
    }

    /// Asks once, when its layers are known, which inodes its programs have that are many.
    pub(crate) fn learn_multicall(&self, inodes: impl FnOnce(&Watched) -> Vec<u64>) {
        if self.layers().is_some() {
            self.image.multicall.get_or_init(|| inodes(self));
        }
    }

    /// Whether a program is one of those, whatever its file is called.
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

    /// Whether a file is the image's own as far as anybody can know, until it changes.
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

    /// Its other mounts that carry our marks, as they were when last looked at.
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

    /// The kernel has recorded the end of its first process, or of that one's first thread.
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

    /// Whose an executed file is.
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

    /// Asks for a walk of everything.
    pub(crate) fn ask_for_rescan(&self) {
        self.scans.seen_since.store(procfs::ticks_since_boot(), Ordering::Release);
        self.ask_for_processes();
        self.scans.code_scan.store(true, Ordering::Release);
        self.scans.rescan.store(true, Ordering::Release);
    }

    /// Notes a loss; says whether it is the first of its kind since a walk began.
    pub(crate) fn loses(&self, failure: Failure) -> bool {
        let bit = 1_u64 << failure as u32;
        self.scans.losses.fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Asks for a walk of the upperdir alone.
    pub(crate) fn ask_for_walk(&self) {
        self.scans.walk.store(true, Ordering::Release);
    }

    /// Says whether this is the first time.
    pub(crate) fn detach(&self) -> bool {
        !self.run.detaching.swap(true, Ordering::AcqRel)
    }

    pub(crate) fn is_detaching(&self) -> bool {
        self.run.detaching.load(Ordering::Acquire)
    }

    pub(crate) fn is_armed_before_start(&self) -> bool {
        self.run.armed_before_start.load(Ordering::Acquire)
    }

    /// Its marks are in place. That init had not become the entry point by then is what a
    /// look can tell; an execve that had opened its file already is not seen by it.
    pub(crate) fn set_armed(&self, before_start: bool) {
        self.run.armed_before_start.store(before_start, Ordering::Release);
        self.run.is_being_armed.store(false, Ordering::Release);
    }

    pub(crate) fn is_being_armed(&self) -> bool {
        self.run.is_being_armed.load(Ordering::Acquire)
    }

    /// It turned out that its entry point had begun before its marks were in place. True
    /// once, and only where the opposite was believed.
    pub(crate) fn take_armed_before_start(&self) -> bool {
        self.run.armed_before_start.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn set_init_asked_about(&self) {
        self.run.init_was_asked_about.store(true, Ordering::Release);
    }

    pub(crate) fn init_was_asked_about(&self) -> bool {
        self.run.init_was_asked_about.load(Ordering::Acquire)
    }

    /// Says whether this is news.
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

    /// A walk begins. Says whether it is to make up for a loss.
    pub(crate) fn take_rescan(&self) -> bool {
        self.scans.walk.store(false, Ordering::Release);
        self.scans.losses.store(0, Ordering::Release);
        self.scans.rescan.swap(false, Ordering::AcqRel)
    }

    /// Asks for a look at the processes whose start was not seen.
    pub(crate) fn ask_for_processes(&self) {
        self.scans
            .process_scan
            .fetch_max(self.scans.seen_since.load(Ordering::Acquire), Ordering::AcqRel);
    }

    pub(crate) fn take_code_scan(&self) -> bool {
        self.scans.code_scan.swap(false, Ordering::AcqRel)
    }

    /// Whether the container's processes are to be looked at, and since when the
    /// start of every other one has been seen.
    pub(crate) fn take_process_scan(&self) -> Option<u64> {
        Some(self.scans.process_scan.swap(0, Ordering::AcqRel)).filter(|&since| since > 0)
    }
}

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
