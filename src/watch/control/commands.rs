//! Carries out commands. Marks first: until they are there, nothing is seen.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use jiff::Timestamp;

use crate::gate::Place;
use crate::health::Failure;
use crate::model::{ContainerId, OverlayDirs, RootfsPath, printable};
use crate::sys::door::{self, View};
use crate::sys::fanotify::Group;
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, overlay};
use crate::threads;
use crate::watch::core::copyup::Free;
use crate::watch::core::copyup::Residence;
use crate::watch::core::message::SensorCommand;
use crate::watch::core::message::SensorEvent;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::ControlGroups;
use crate::watch::core::table::Layers;
use crate::watch::core::table::Watched;
use crate::watch::core::trust::Verdict;
use crate::watch::exec::gate::ExecMarks;
use crate::watch::files::scan::ScanRequest;
use crate::watch::mounts::marking::Mounts;
use crate::watch::sessions::opening;

pub(in crate::watch) struct Control {
    pub(in crate::watch) shared: Arc<Shared>,
    pub(in crate::watch) marker: Arc<Marker>,
    pub(in crate::watch) commands: Receiver<SensorCommand>,
    pub(in crate::watch) orders: Sender<ScanRequest>,
    /// What the pipeline had no room for. It asked for these, so there are never
    /// more than it has asked for.
    pub(in crate::watch) unsent: VecDeque<SensorEvent>,
}

/// Places a container's marks, for whoever comes first: the command to attach to
/// it, or the runtime that is about to start it.
pub(in crate::watch) struct Marker {
    pub(in crate::watch) shared: Arc<Shared>,
    pub(in crate::watch) marks: ExecMarks,
    /// If unchanged programs are asked about only once.
    pub(in crate::watch) free: Option<Arc<Free>>,
    pub(in crate::watch) feed: Arc<Group>,
    pub(in crate::watch) mounts: Arc<Mounts>,
    pub(in crate::watch) orders: Sender<ScanRequest>,
    /// One container at a time.
    pub(in crate::watch) turn: Mutex<()>,
}

/// How a container was found to be marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::watch) struct Marked {
    /// The marks were there before its entry point ran.
    pub(in crate::watch) before_start: bool,
    /// They are there only now.
    pub(in crate::watch) is_news: bool,
}

/// Why a container cannot be watched. Its text is told to people.
#[derive(Debug, thiserror::Error)]
pub(in crate::watch) enum Refusal {
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

impl Control {
    pub(in crate::watch) fn run(mut self) {
        let mut last_look = Instant::now();
        while !self.shared.is_stopping() {
            self.send_unsent();
            match threads::recv_timeout(&self.commands, Duration::from_millis(250)) {
                Ok(SensorCommand::Attach { container, pid, rootfs }) => {
                    self.attach(container, pid, rootfs);
                }
                Ok(SensorCommand::Detach { container, pid }) => self.detach(&container, pid),
                Ok(SensorCommand::Scan { container, ticket }) => self.scan(container, ticket),
                Ok(SensorCommand::Compare { container, ticket, rootfs, entry_point }) => {
                    self.compare(container, ticket, rootfs, entry_point);
                }
                Ok(SensorCommand::Trust { container, trust }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.layer_files_mut().set_trust(trust);
                        watched.ask_for_processes();
                        forget(&watched);
                    }
                }
                Ok(SensorCommand::EntryPoint { container, paths }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.set_entry_point(paths);
                        watched.ask_for_walk();
                    }
                }
                Ok(SensorCommand::Terminal { container, input, is_handed_on }) => {
                    if let Some(watched) = self.shared.table.get(&container)
                        && let Err(err) = self.listen(&watched, input.as_deref(), is_handed_on)
                    {
                        let input = input.unwrap_or_default();
                        let input = printable(input.as_os_str().as_bytes());
                        tracing::warn!(%container, input, "who attaches is not seen: {err}");
                    }
                }
                Ok(SensorCommand::Judged { container, file, verdict }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.layer_files_mut().judge(&file, verdict);
                        match verdict {
                            Verdict::Image => (),
                            Verdict::Drift | Verdict::Lost => forget(&watched),
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if last_look.elapsed() >= Duration::from_secs(10) {
                last_look = Instant::now();
                self.marker.forget_unannounced();
            }
        }
    }

    /// From now on it is seen who comes to the terminal of its init.
    fn listen(
        &self,
        watched: &Arc<Watched>,
        input: Option<&Path>,
        is_handed_on: bool,
    ) -> io::Result<()> {
        if is_handed_on {
            self.shared.terminals.listen(watched)?;
        }
        let listen = |input| self.shared.attachments.listen(watched, input, is_handed_on);
        input.map_or(Ok(()), listen)
    }

    fn report(&mut self, report: SensorEvent) {
        self.unsent.push_back(report);
        self.send_unsent();
    }

    fn send_unsent(&mut self) {
        while let Some(report) = self.unsent.pop_front() {
            if let Err(report) = self.shared.try_report(report) {
                self.unsent.push_front(report);
                break;
            }
        }
    }

    fn attach(&mut self, container: ContainerId, pid: u32, rootfs: Option<OverlayDirs>) {
        threads::about(&container);
        let is_outdated = self.shared.table.get(&container).is_some_and(|watched| {
            watched.init.pid != pid
                && Handle::open_exactly(watched.init)
                    .is_ok_and(|init| !init.first_stat().has_ended())
                && !watched.is_unannounced()
        });
        if is_outdated {
            // What containerd said last has come by a faster way: it runs anew already.
            return;
        }
        let marked = self.marker.mark(&container, pid, rootfs);
        if let Some(watched) = self.shared.table.get(&container) {
            watched.set_unannounced(false);
        }
        match marked {
            Ok(Marked { before_start, is_news }) => {
                // Also when it is no news to us: it may be to who asks.
                self.report(SensorEvent::Attached { container, pid, before_start });
                if is_news {
                    self.shared.wake_scan();
                }
            }
            Err(refusal) => {
                if let Refusal::MarkRefused(_) = refusal {
                    let _ = self.shared.health.record(Failure::MarkRefused);
                }
                let reason = refusal.to_string();
                self.report(SensorEvent::NotAttached { container, pid, reason });
            }
        }
    }

    fn detach(&self, container: &ContainerId, pid: Option<u32>) {
        let is_another = |watched: Arc<Watched>| pid.is_some_and(|pid| watched.init.pid != pid);
        if self.shared.table.get(container).is_some_and(is_another) {
            return;
        }
        // What has ended is the run before the one that was armed meanwhile; the
        // command to attach to that one is still to come.
        let is_outdated = self.shared.table.get(container).is_some_and(|watched| {
            watched.is_unannounced() && Handle::open_exactly(watched.init).is_ok()
        });
        if !is_outdated {
            self.marker.detach(container);
        }
    }

    fn scan(&mut self, container: ContainerId, ticket: Option<u64>) {
        let ordered = match self.shared.table.get(&container) {
            Some(watched) => self.orders.try_send(ScanRequest::Scan { watched, ticket }).is_ok(),
            None => false,
        };
        if ordered {
            self.shared.wake_scan();
        } else {
            let began = Timestamp::now();
            self.report(SensorEvent::Scanned { container, ticket, began, complete: false });
        }
    }

    fn compare(
        &mut self,
        container: ContainerId,
        ticket: u64,
        rootfs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    ) {
        let watched = Watched::stopped(container, rootfs, entry_point).map(Arc::new);
        let ordered = watched.is_some_and(|watched| {
            self.orders.try_send(ScanRequest::Compare { watched, ticket }).is_ok()
        });
        if ordered {
            self.shared.wake_scan();
        } else {
            self.report(SensorEvent::Compared {
                ticket,
                observations: Vec::new(),
                end: Some(false),
            });
        }
    }
}

impl Marker {
    /// Marks a container's overlay, unless it is marked, and says whether that was
    /// before its entry point ran.
    pub(in crate::watch) fn mark(
        &self,
        container: &ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
    ) -> Result<Marked, Refusal> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let init = match Handle::open(pid) {
            Ok(init) => init,
            Err(source) => {
                // Marked when its runtime was called, and over already.
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
        let root = init.open_root().map_err(Refusal::NoRoot)?;
        let stat = file::stat(&root).map_err(Refusal::NoRoot)?;
        // By the kernel's list: to ask the filesystem could mean to wait for a process.
        if View::of([&init]).mount(&stat).is_none_or(|mount| mount.kind != b"overlay") {
            return Err(Refusal::NotOverlay);
        }
        // A gate on the host's root would ask us before our own programs run.
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
        let foreign = foreign_layer(&watched, &init, rootfs.as_ref())?;
        // The container runs anew, and nobody has told us that it had ended.
        self.detach(container);
        // Known before it is marked, so that its first event finds it.
        self.shared.table.insert(&watched);
        let mut residence = if foreign.is_none() { self.admit(&watched, &init) } else { None };
        let place = residence.as_ref().map_or(Place::Plain, Residence::place);
        // To open an executed file, the gate would wait for whoever answers for its layer.
        // What was written lies in the upper layer.
        let marked = match foreign {
            None => self.marks.mark_root(place, root.as_fd()),
            Some(_) => Ok(()),
        }
        .and_then(|()| self.feed.mark_filesystem(root.as_fd(), libc::FAN_CLOSE_WRITE));
        // The marks do not keep the mount busy, but this would.
        drop(root);
        if let Err(err) = marked {
            self.shared.table.remove(&watched);
            if let Some(residence) = &residence {
                residence.leave();
            }
            return Err(Refusal::MarkRefused(err));
        }
        if let Some(layer) = foreign {
            let detail = format!(
                "its layer {layer} lies on a filesystem that a process or another machine \
                 answers for: the gate is not asked about its programs, and what its layers \
                 hold is not read"
            );
            self.shared.degrade(Failure::ForeignLayers, Some(&watched), &detail);
        }
        self.mounts.attach(&watched, &init);
        // What init is now, after the marks: if it has not executed the entry
        // point by now, the gate will see it do so.
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

    /// Finds a container a place where its unchanged programs are asked about once.
    fn admit(&self, watched: &Watched, init: &Handle) -> Option<Residence> {
        let free = self.free.as_ref()?;
        let mountinfo = init.mountinfo().ok()?;
        let mount = overlay::find_in_mountinfo(&mountinfo, watched.device)?;
        match free.admit(&mount, init) {
            Ok(residence) => Some(residence),
            Err(unfit) => {
                tracing::info!(
                    container = tracing::field::display(&watched.container),
                    "every program is asked about: {unfit}"
                );
                None
            }
        }
    }

    /// Forgets containers that were armed, that have ended, and of which containerd
    /// has told nothing.
    fn forget_unannounced(&self) {
        for watched in self.shared.table.all() {
            if watched.is_unannounced() && Handle::open_exactly(watched.init).is_err() {
                self.detach(&watched.container);
            }
        }
    }

    pub(in crate::watch) fn detach(&self, container: &ContainerId) {
        let Some(watched) = self.shared.table.get(container) else { return };
        if !watched.detach() {
            return;
        }
        if let Some(residence) = watched.residence() {
            residence.leave();
        }
        watched.files.close();
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

/// A process can give itself any name. But a runtime's is of the host, or, if it has
/// made itself a copy in memory, was started a moment ago.
fn is_from_outside(init: &Handle, watched: &Watched) -> bool {
    const MOMENT: Duration = Duration::from_secs(10);
    init.open_exe().and_then(file::stat).is_ok_and(|exe| {
        exe.device != watched.device && (exe.links > 0 || procfs::age(init.identity()) < MOMENT)
    })
}

/// What was known of the image's files counts no more: all are asked about again.
fn forget(watched: &Watched) {
    if let Some(residence) = watched.residence() {
        residence.forget();
    }
}

/// Notes whether a container's layers lie where somebody else answers, and says which one.
fn foreign_layer(
    watched: &Watched,
    init: &Handle,
    rootfs: Option<&OverlayDirs>,
) -> Result<Option<String>, Refusal> {
    let mountinfo = init.mountinfo().unwrap_or_default();
    let named = overlay::directories_of(&mountinfo, watched.device);
    let upper = overlay::find_in_mountinfo(&mountinfo, watched.device);
    let upper = upper.map(|mount| mount.dirs.upperdir);
    let told = rootfs.map(|dirs| dirs.lowerdirs.iter().chain([&dirs.upperdir]).cloned());
    let all: Vec<PathBuf> = named.into_iter().chain(told.into_iter().flatten()).collect();
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

/// Finds where the layers lie: as containerd says, or else as the kernel says.
fn find_layers(watched: &Watched, init: &Handle, rootfs: Option<OverlayDirs>) {
    let mount = init
        .mountinfo()
        .ok()
        .and_then(|mountinfo| overlay::find_in_mountinfo(&mountinfo, watched.device));
    let userxattr = mount.as_ref().is_some_and(|mount| mount.userxattr);
    let redirects =
        mount.as_ref().map_or_else(overlay::redirects_by_default, |mount| mount.redirects);
    let told = rootfs.map(|dirs| overlay::Mount {
        dirs,
        userxattr,
        redirects,
        workdir: None,
        is_exported: false,
    });
    let mut mounts: Vec<overlay::Mount> = [told, mount].into_iter().flatten().collect();
    if watched.has_foreign_layers() {
        // Nobody looks there.
        mounts.iter_mut().for_each(|mount| mount.dirs.lowerdirs.clear());
    }
    if let Some(layers) = mounts.into_iter().find_map(Layers::new) {
        watched.set_layers(layers);
    }
}
