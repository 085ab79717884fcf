//! Places and removes the marks of containers.
//!
//! Owns the order of these steps: the container is in the table before it is marked, and init
//! is examined after that. `commands` and `arm` call it, one container at a time. It decides
//! whether a container can be watched, and must not scan or report its files.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;
use jiff::Timestamp;

use crate::gate::{Place, Undecided};
use crate::health::Failure;
use crate::model::{ContainerId, OverlayDirs, printable};
use crate::sys::door::{self, View};
use crate::sys::fanotify::Group;
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, overlay};
use crate::watch::core::copyup::{Free, Residence};
use crate::watch::core::layers::Layers;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::shared::Core;
use crate::watch::core::watched::{ControlGroups, Watched};
use crate::watch::files::shared::Files;
use crate::watch::files::work::ScanRequest;
use crate::watch::mounts::marking::Mounts;
use crate::watch::mounts::marks::ExecMarks;
use crate::watch::sessions::opening;

/// Places a container's marks, for the first that needs them: the command to attach to it,
/// or the runtime that is about to start it.
pub(crate) struct Marker {
    pub(crate) shared: Arc<Files>,
    pub(crate) marks: ExecMarks,
    /// Set if the gate is asked about unchanged programs only once.
    pub(crate) free: Option<Arc<Free>>,
    pub(crate) feed: Arc<Group>,
    pub(crate) mounts: Arc<Mounts>,
    pub(crate) orders: Sender<ScanRequest>,
    /// One container at a time.
    pub(crate) turn: Mutex<()>,
}

/// The result of marking a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Marked {
    /// The marks were there before its entry point ran.
    pub(crate) before_start: bool,
    /// They were placed just now.
    pub(crate) is_news: bool,
}

/// Why a container cannot be watched. Its text is a message to people.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("its init process {pid} is gone")]
    InitGone { pid: u32, source: std::io::Error },
    #[error("its root filesystem cannot be opened: {0}")]
    NoRoot(#[source] std::io::Error),
    #[error("its root filesystem is not an overlay, and driftd watches only overlays")]
    NotOverlay,
    #[error("its root filesystem is the host's own")]
    HostRoot,
    #[error(
        "its upper layer {0} lies on a filesystem that a process or another machine answers for"
    )]
    ForeignUpper(String),
    #[error("the kernel refuses to mark its overlay: {0}")]
    MarkRefused(#[source] std::io::Error),
}

impl Marker {
    /// Marks a container's overlay, unless it is marked, and returns whether that was before
    /// its entry point ran.
    pub(crate) fn mark(
        &self,
        container: &ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
    ) -> Result<Marked, Refusal> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let init = match Handle::open(pid) {
            Ok(init) => init,
            Err(source) => {
                // It was marked when its runtime was invoked, and has ended already.
                return match self.shared.table.get(container) {
                    Some(watched) if watched.init.pid == pid => {
                        Ok(Marked { before_start: watched.is_armed_before_start(), is_news: false })
                    }
                    Some(_) | None => Err(Refusal::InitGone { pid, source }),
                };
            }
        };
        if let Some(watched) = self.shared.table.get(container)
            && watched.init == init.identity()
        {
            if watched.layers().is_none() {
                find_layers(&watched, &init, rootfs);
                watched.ask_for_rescan();
                self.shared.wake_scan();
            }
            return Ok(Marked { before_start: watched.is_armed_before_start(), is_news: false });
        }
        let (watched, root) = watch(container, &init)?;
        let foreign = foreign_layer(&watched, &init, rootfs.as_ref())?;
        // The container runs anew, and the end of its earlier run was not reported.
        self.detach(container);
        // It is in the table before it is marked, so that its first event finds it.
        self.shared.table.insert(&watched);
        let mut residence = if foreign.is_none() { self.admit(&watched, &init) } else { None };
        let place = residence.as_ref().map_or(Place::Plain, Residence::place);
        // On a foreign layer, the gate would wait for the process or machine that serves the
        // layer to open an executed file. Written files lie in the upper layer.
        let marked = match foreign {
            None => self.marks.mark_root(place, root.as_fd()),
            Some(_) => Ok(()),
        }
        .and_then(|()| self.feed.mark_filesystem(root.as_fd(), libc::FAN_CLOSE_WRITE));
        // The marks do not keep the mount busy, but this descriptor does.
        drop(root);
        if let Err(err) = marked {
            self.shared.table.remove(&watched);
            if let Some(residence) = &residence {
                residence.leave();
            }
            return Err(Refusal::MarkRefused(err));
        }
        if let Some(layer) = foreign {
            self.degrade_foreign(&watched, &layer);
        }
        self.mounts.attach(&watched, &init);
        // Init is examined after the marks were placed: if it has not executed the entry point
        // by now, the gate will see that execution.
        let max_hash_bytes = self.shared.settings.max_hash_bytes;
        let before_start = opening::has_not_begun(&init, max_hash_bytes);
        watched.set_armed(before_start);
        find_layers(&watched, &init, rootfs);
        if let Some(mut residence) = residence.take() {
            if before_start && is_from_outside(&init, &watched) {
                residence.settle();
            }
            watched.set_residence(residence);
        }
        watched.ask_for_rescan();
        if !before_start && self.shared.has_begun_before(init.identity()) {
            self.shared.armed_late(&watched);
        }
        Ok(Marked { before_start, is_news: true })
    }

    fn degrade_foreign(&self, watched: &Arc<Watched>, layer: &str) {
        let detail = format!(
            "its layer {layer} lies on a filesystem that a process or another machine \
             answers for: the gate is not asked about its programs, and what its layers \
             hold is not read"
        );
        self.shared.degrade(Failure::ForeignLayers, Some(watched), &detail);
    }

    /// Gives a container a residence, by which the gate is asked about each unchanged program
    /// only once.
    pub(crate) fn admit(&self, watched: &Watched, init: &Handle) -> Option<Residence> {
        let free = self.free.as_ref()?;
        let mountinfo = init.mountinfo().ok()?;
        let mount = overlay::find_in_mountinfo(&mountinfo, watched.device)?;
        match free.admit(&mount, init) {
            Ok(residence) => Some(residence),
            Err(unfit) => {
                tracing::info!(
                    container = tracing::field::display(&watched.container),
                    "the gate is asked about every execution: {unfit}"
                );
                None
            }
        }
    }

    /// Forgets containers that were armed and have ended, and that containerd has never
    /// announced.
    pub(crate) fn forget_unannounced(&self) {
        for watched in self.shared.table.all() {
            if watched.is_unannounced() && Handle::open_exactly(watched.init).is_err() {
                self.detach(&watched.container);
            }
        }
    }

    /// Has the executions of a container wait for decisions, or wait no more.
    pub(crate) fn enforce(&self, container: &ContainerId, undecided: Option<Undecided>) {
        let Some(watched) = self.shared.table.get(container) else { return };
        let done = match undecided {
            Some(undecided) => self.marks.enforce(watched.enforced(undecided)),
            None => self.marks.enforce_no_more(watched.device),
        };
        if let Err(err) = done {
            tracing::error!(%container, "the gate does not take whether rules may deny here: {err}");
        }
        // What is there already is guarded by a walk.
        if watched.set_enforced(undecided.is_some()) && watched.is_enforced() {
            watched.ask_for_walk();
        }
    }

    pub(crate) fn detach(&self, container: &ContainerId) {
        let Some(watched) = self.shared.table.get(container) else { return };
        if !watched.detach() {
            return;
        }
        if let Some(residence) = watched.residence() {
            residence.leave();
        }
        watched.files.close();
        // The kernel uses the device's number again, perhaps already.
        let is_its = |it: Arc<Watched>| Arc::ptr_eq(&it, &watched);
        if self.shared.table.by_device(watched.device).is_none_or(is_its) {
            let _ = self.marks.enforce_no_more(watched.device);
            self.shared.forget_unchanged(&watched);
        }
        self.mounts.detach(&watched);
        if let Err(err) = self.orders.try_send(ScanRequest::Last { watched }) {
            let ScanRequest::Last { watched } = err.into_inner() else { return };
            self.shared.forget(&watched);
            let _ = self.shared.health.record(Failure::ScanIncomplete);
            let _ = self.shared.try_report(SensorEvent::Scanned {
                container: container.clone(),
                ticket: None,
                began: Timestamp::now(),
                complete: false,
            });
        }
        self.shared.wake_scan();
    }
}

/// The container, as its init shows it, and its opened root. An error if it cannot be watched.
fn watch(container: &ContainerId, init: &Handle) -> Result<(Arc<Watched>, OwnedFd), Refusal> {
    let root = init.open_root().map_err(Refusal::NoRoot)?;
    let stat = file::stat(&root).map_err(Refusal::NoRoot)?;
    // By the kernel's list of mounts: to query the filesystem could mean to wait for a
    // process.
    if View::of([init]).mount(&stat).is_none_or(|mount| mount.kind != b"overlay") {
        return Err(Refusal::NotOverlay);
    }
    // A mark on the host's root would make driftd's own executions wait for driftd.
    if file::stat_path("/").is_ok_and(|host| host.device == stat.device) {
        return Err(Refusal::HostRoot);
    }
    let watched = Arc::new(Watched::new(
        container.clone(),
        init.identity(),
        &stat,
        file::name_of(root.as_fd()).map_err(Refusal::NoRoot)?,
        init.pid_namespace().ok(),
        init.mount_namespace().ok(),
        Some(ControlGroups { unified: init.cgroup().ok(), perf: init.perf_cgroup() }),
    ));
    if init.is_first_in_pid_namespace() {
        watched.set_has_own_pid_namespace();
    }
    Ok((watched, root))
}

/// Whether init still runs the runtime's program. A process can give itself any name. But the
/// runtime's program lies on the host, or, if it is a copy in memory, its process was started a
/// moment ago.
pub(crate) fn is_from_outside(init: &Handle, watched: &Watched) -> bool {
    const MOMENT: Duration = Duration::from_secs(10);
    init.open_exe().and_then(file::stat).is_ok_and(|exe| {
        exe.device != watched.device && (exe.links > 0 || procfs::age(init.identity()) < MOMENT)
    })
}

/// Forgets which of the image's files are unchanged: the gate is asked about all of them
/// again, and hands them on.
pub(crate) fn forget(shared: &Core, watched: &Watched) {
    shared.forget_unchanged(watched);
    if let Some(residence) = watched.residence() {
        residence.forget();
    }
}

/// Notes whether one of a container's layers is served by another process or machine, and
/// returns that layer.
pub(crate) fn foreign_layer(
    watched: &Watched,
    init: &Handle,
    rootfs: Option<&OverlayDirs>,
) -> Result<Option<String>, Refusal> {
    let mountinfo = init.mountinfo().unwrap_or_default();
    let named = overlay::directories_of(&mountinfo, watched.device);
    let upper = overlay::find_in_mountinfo(&mountinfo, watched.device);
    let upper = upper.map(|mount| mount.dirs.upperdir);
    let announced = rootfs.map(|dirs| dirs.lowerdirs.iter().chain([&dirs.upperdir]).cloned());
    let all: Vec<PathBuf> = named.into_iter().chain(announced.into_iter().flatten()).collect();
    let Some(foreign) = door::foreign_layer(&all) else { return Ok(None) };
    let uppers: Vec<PathBuf> =
        upper.into_iter().chain(rootfs.map(|dirs| dirs.upperdir.clone())).collect();
    let name = |path: &Path| printable(path.as_os_str().as_bytes());
    if let Some(upper) = door::foreign_layer(&uppers) {
        return Err(Refusal::ForeignUpper(name(&upper)));
    }
    watched.set_has_foreign_layers();
    Ok(Some(name(&foreign)))
}

/// Finds where the layers lie: as containerd reports it, or else as the kernel does.
pub(crate) fn find_layers(watched: &Watched, init: &Handle, rootfs: Option<OverlayDirs>) {
    let mount = init
        .mountinfo()
        .ok()
        .and_then(|mountinfo| overlay::find_in_mountinfo(&mountinfo, watched.device));
    let userxattr = mount.as_ref().is_some_and(|mount| mount.userxattr);
    let redirects =
        mount.as_ref().map_or_else(overlay::redirects_by_default, |mount| mount.redirects);
    let announced = rootfs.map(|dirs| overlay::Mount {
        dirs,
        userxattr,
        redirects,
        workdir: None,
        is_exported: false,
    });
    let mut mounts: Vec<overlay::Mount> = [announced, mount].into_iter().flatten().collect();
    if watched.has_foreign_layers() {
        // The lower layers are not read then.
        mounts.iter_mut().for_each(|mount| mount.dirs.lowerdirs.clear());
    }
    if let Some(layers) = mounts.into_iter().find_map(Layers::new) {
        watched.set_layers(layers);
    }
}
