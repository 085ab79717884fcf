//! Carries out commands. Marks first: until they are there, nothing is seen.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::copyup::{Free, Residence};
use super::gate::events;
use super::scan::Order;
use super::sessions;
use super::shared::Shared;
use super::table::{Layers, Watched};
use super::{Command, Report, Verdict};
use crate::health::Failure;
use crate::model::{ContainerId, OverlayDirs};
use crate::sys::fanotify::Group;
use crate::sys::procfs::Handle;
use crate::sys::{file, overlay};

pub(super) struct Control {
    pub(super) shared: Arc<Shared>,
    pub(super) gate: Arc<Group>,
    /// If unchanged programs are asked about only once.
    pub(super) free: Option<Arc<Free>>,
    pub(super) feed: Arc<Group>,
    pub(super) commands: Receiver<Command>,
    pub(super) orders: Sender<Order>,
    /// What the pipeline had no room for. It asked for these, so there are never
    /// more than it has asked for.
    pub(super) unsent: VecDeque<Report>,
}

/// Why a container cannot be watched. Its text is told to people.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("its init process {pid} is gone")]
    InitGone { pid: u32, source: std::io::Error },
    #[error("its root filesystem cannot be opened: {0}")]
    NoRoot(#[source] std::io::Error),
    #[error("its root filesystem is not an overlay, and driftd watches only overlays")]
    NotOverlay,
    #[error("its root filesystem is the host's own")]
    HostRoot,
    #[error("the kernel refuses to mark its overlay: {0}")]
    MarkRefused(#[source] std::io::Error),
}

impl Control {
    pub(super) fn run(mut self) {
        while !self.shared.is_stopping() {
            self.send_unsent();
            match self.commands.recv_timeout(Duration::from_millis(100)) {
                Ok(Command::Attach { container, pid, rootfs }) => {
                    self.attach(container, pid, rootfs);
                }
                Ok(Command::Detach { container }) => self.detach(&container),
                Ok(Command::Scan { container, ticket }) => self.scan(container, ticket),
                Ok(Command::Trust { container, trust }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.layer_files_mut().set_trust(trust);
                        forget(&watched);
                    }
                }
                Ok(Command::Judged { container, file, verdict }) => {
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
        }
    }

    fn report(&mut self, report: Report) {
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
        match self.mark(&container, pid, rootfs) {
            Ok(Some(before_start)) => {
                self.report(Report::Attached { container, before_start });
                self.shared.wake_scan();
            }
            Ok(None) => (),
            Err(refusal) => {
                if let Refusal::MarkRefused(_) = refusal {
                    let _ = self.shared.health.record(Failure::MarkRefused);
                }
                let reason = refusal.to_string();
                self.report(Report::NotAttached { container, reason });
            }
        }
    }

    /// Marks a container's overlay and says whether that was before its entry
    /// point ran; `None` if it was marked already.
    fn mark(
        &self,
        container: &ContainerId,
        pid: u32,
        rootfs: Option<OverlayDirs>,
    ) -> Result<Option<bool>, Refusal> {
        let init = Handle::open(pid).map_err(|source| Refusal::InitGone { pid, source })?;
        if let Some(watched) = self.shared.table.get(container)
            && watched.init == init.identity()
        {
            if watched.layers().is_none() {
                find_layers(&watched, &init, rootfs);
                watched.ask_for_rescan();
                self.shared.wake_scan();
            }
            return Ok(None);
        }
        let root = file::open_root(&init.root_path()).map_err(Refusal::NoRoot)?;
        if !overlay::is_overlay(&root).map_err(Refusal::NoRoot)? {
            return Err(Refusal::NotOverlay);
        }
        let stat = file::stat(&root).map_err(Refusal::NoRoot)?;
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
            init.cgroup().ok(),
            init.perf_cgroup(),
        ));
        // The container runs anew, and nobody has told us that it had ended.
        self.detach(container);
        // Known before it is marked, so that its first event finds it.
        self.shared.table.insert(&watched);
        let mut residence = self.admit(&watched, &init);
        let gate = residence.as_ref().map_or(&self.gate, |residence| &residence.shard.gate);
        let marked = gate
            .mark_filesystem(root.as_fd(), events(self.shared.settings.gate))
            .and_then(|()| self.feed.mark_filesystem(root.as_fd(), libc::FAN_CLOSE_WRITE));
        // The marks do not keep the mount busy, but this would.
        drop(root);
        if let Err(err) = marked {
            self.shared.table.remove(&watched);
            if let (Some(free), Some(residence)) = (&self.free, &residence) {
                free.leave(residence);
            }
            return Err(Refusal::MarkRefused(err));
        }
        // What init is now, after the marks: if it has not executed the entry
        // point by now, the gate will see it do so.
        let before_start =
            init.stat().is_ok_and(|stat| sessions::is_before_entry_point(&stat.comm));
        find_layers(&watched, &init, rootfs);
        if let Some(mut residence) = residence.take() {
            // A process can give itself any name, but is no program of the host's then.
            let is_from_outside = init
                .open_exe()
                .and_then(file::stat)
                .is_ok_and(|exe| exe.device != watched.device && exe.links > 0);
            if before_start && is_from_outside {
                residence.settle();
            }
            watched.set_residence(residence);
        }
        watched.ask_for_rescan();
        Ok(Some(before_start))
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

    fn detach(&self, container: &ContainerId) {
        let Some(watched) = self.shared.table.get(container) else { return };
        if !watched.detach() {
            return;
        }
        if let (Some(free), Some(residence)) = (&self.free, watched.residence()) {
            free.leave(residence);
        }
        if let Err(err) = self.orders.try_send(Order::Last { watched }) {
            let Order::Last { watched } = err.into_inner() else { return };
            self.shared.table.remove(&watched);
            let _ = self.shared.health.record(Failure::ScanIncomplete);
        }
        self.shared.wake_scan();
    }

    fn scan(&mut self, container: ContainerId, ticket: Option<u64>) {
        let ordered = match self.shared.table.get(&container) {
            Some(watched) => self.orders.try_send(Order::Scan { watched, ticket }).is_ok(),
            None => false,
        };
        if ordered {
            self.shared.wake_scan();
        } else {
            self.report(Report::Scanned { container, ticket, complete: false });
        }
    }
}

/// What was known of the image's files counts no more: all are asked about again.
fn forget(watched: &Watched) {
    if let Some(residence) = watched.residence() {
        residence.shard.forget();
    }
}

/// Finds where the layers lie: as containerd says, or else as the kernel says.
fn find_layers(watched: &Watched, init: &Handle, rootfs: Option<OverlayDirs>) {
    let mount = init
        .mountinfo()
        .ok()
        .and_then(|mountinfo| overlay::find_in_mountinfo(&mountinfo, watched.device));
    let userxattr = mount.as_ref().is_some_and(|mount| mount.userxattr);
    let told = rootfs.map(|dirs| overlay::Mount {
        dirs,
        userxattr,
        workdir: None,
        is_exported: false,
    });
    if let Some(layers) = [told, mount].into_iter().flatten().find_map(Layers::new) {
        watched.set_layers(layers);
    }
}
