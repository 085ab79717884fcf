//! The programs that the processes of a container run already, found by a scan of all
//! processes.
//!
//! Reports each such file once, if it is not the image's or may not be. It must not choose
//! which processes are scanned, nor open sessions: `processes` does both.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use jiff::Timestamp;

use crate::health::Failure;
use crate::model::{
    ContainerId, Fact, FileFact, FileState, Filesystem, LayerFile, RootfsPath, Source,
};
use crate::sys::door::{self, Ground, View};
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle};
use crate::watch::code::inspect::{self, Code};
use crate::watch::core::trust::Verdict;
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::files::shared::Files;
use crate::watch::files::{paths, state};
use crate::watch::process::{attribution, describe};
use crate::watch::sessions::runtimes::Runtimes;

/// The programs of running processes that one scan has examined, each file once.
#[derive(Debug, Default)]
pub(crate) struct Running {
    pub(crate) examined: std::collections::HashSet<(u64, u64)>,
}

impl Running {
    /// Reports a process whose program is not the image's, or may not be.
    pub(crate) fn report(
        &mut self,
        shared: &Files,
        runtimes: &mut Runtimes,
        watched: &Arc<Watched>,
        handle: &Handle,
    ) {
        // A kernel thread has no program, and an ended process has none any more.
        let Ok(exe) = handle.open_exe() else { return };
        let Ok(stat) = file::stat(&exe) else { return };
        if !self.examined.insert((stat.device, stat.inode)) {
            return;
        }
        let max_hash_bytes = shared.settings.max_hash_bytes;
        let (is_overlays, file_of) = owner_of(shared, watched, &stat);
        let Some(standing) = stand(shared, watched, handle, (&exe, &stat), is_overlays) else {
            return;
        };
        let Judged { layer_file, is_movable, unread } = standing;
        let at = Timestamp::now();
        let process = describe::as_it_is(handle, watched);
        let name = handle.exe().unwrap_or_default();
        let ground = if is_overlays { Ground::Disk } else { ground_of(watched, handle, &stat) };
        let place = (is_overlays, file_of.is_some());
        let Some(filesystem) = filesystem_of(place, handle, (&name, &stat), ground) else {
            return;
        };
        if !shared.settings.looks_at(filesystem) {
            return;
        }
        let path = match path_of((watched, handle), (&exe, &stat, &name), filesystem) {
            Ok(path) => path,
            Err(why) => {
                let detail = format!("the path of a running program cannot be determined: {why}");
                shared.lose(Failure::EventUnreadable, Some(watched), &detail);
                return;
            }
        };
        if is_movable && paths::is_where_the_image_has_it(watched, &path, &stat) {
            return;
        }
        let known = layer_file.and_then(|file| watched.layer_files().known(&file));
        let state = known
            .or(unread.map(|code| code.state))
            .unwrap_or_else(|| state::state_of(exe.as_fd(), &stat, ground.local(), max_hash_bytes));
        drop(exe);
        if is_runtime(runtimes, handle, filesystem, &state, max_hash_bytes) {
            // It has not become a program of the container, or of the session, yet.
            return;
        }
        let lower = match layer_file {
            None if is_overlays => watched
                .layers()
                .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes)),
            Some(_) | None => None,
        };
        if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
            // First, so that the verdict on the file finds it.
            watched.layer_files_mut().note_reported(layer_file, state.clone(), at);
        }
        let fact = Fact::File(FileFact::Executed {
            invoked_as: None,
            path,
            filesystem,
            times: 1,
            running: true,
            denied: false,
            state,
            lower,
            process: Arc::new(process),
            layer_file,
            writer: None,
        });
        let is_reported = shared.observe_file_of(watched, file_of, at, Source::Scan, fact);
        if let Some(layer_file) = layer_file
            && !is_reported
        {
            watched.layer_files_mut().judge(&layer_file, Verdict::Lost);
        }
    }
}

/// Whether a program lies on the container's own overlay, and, if not, the other container
/// in whose root it lies.
fn owner_of(shared: &Files, watched: &Arc<Watched>, stat: &Stat) -> (bool, Option<ContainerId>) {
    let owner = shared.table.owner(stat);
    let is_apart = |owner: &&Arc<Watched>| {
        attribution::is_apart(shared, watched, owner)
            // A runtime that runs in a container is on its way into a container of its own.
            && !attribution::is_within(&shared.table, watched, owner)
    };
    let file_of = owner.as_ref().filter(is_apart).map(|owner| owner.container.clone());
    (owner.is_some() && file_of.is_none(), file_of)
}

fn ground_of(watched: &Watched, handle: &Handle, stat: &Stat) -> Ground {
    let init = Handle::open_exactly(watched.init).ok();
    View::of(std::iter::once(handle).chain(&init)).ground(stat)
}

/// Whether a process from outside still runs its runtime's program.
fn is_runtime(
    runtimes: &mut Runtimes,
    handle: &Handle,
    filesystem: Filesystem,
    state: &FileState,
    max_hash_bytes: u64,
) -> bool {
    let is_from_outside = || {
        procfs::mount_namespace_of(handle.first_stat().parent)
            .is_ok_and(procfs::is_host_mount_namespace)
    };
    matches!(filesystem, Filesystem::Anonymous | Filesystem::Volume)
        && is_from_outside()
        && runtimes.is_installed(state, max_hash_bytes)
}

/// How a running program is judged, where it lies on an overlay.
#[derive(Default)]
struct Judged {
    layer_file: Option<LayerFile>,
    is_movable: bool,
    /// The file in the upper layer, where the layers are not read.
    unread: Option<Code>,
}

/// `None` if there is nothing to report, or not yet.
fn stand(
    shared: &Files,
    watched: &Watched,
    handle: &Handle,
    (exe, stat): (&OwnedFd, &Stat),
    is_overlays: bool,
) -> Option<Judged> {
    let none = Judged::default();
    if !is_overlays {
        return Some(none);
    }
    if watched.has_foreign_layers() {
        let pid = handle.identity().pid;
        let path = paths::event_path(watched, exe, stat, pid, None).ok()?;
        let unread = inspect::of_unread(shared, watched, path, Some(stat))?;
        return Some(Judged { unread: Some(unread), ..none });
    }
    match watched.standing(stat) {
        Standing::Own => Some(none),
        Standing::Movable(file) => {
            Some(Judged { layer_file: Some(file), is_movable: true, ..none })
        }
        Standing::Doubtful(file) if watched.layer_files().is_known() => {
            Some(Judged { layer_file: Some(file), ..none })
        }
        // It is examined again when it is known which layer files to trust.
        Standing::Doubtful(_) | Standing::Image => None,
    }
}

/// `None` if the process runs a program of the host.
fn filesystem_of(
    (is_overlays, is_shared): (bool, bool),
    handle: &Handle,
    (name, stat): (&[u8], &Stat),
    ground: Ground,
) -> Option<Filesystem> {
    Some(if is_overlays {
        Filesystem::Overlay
    } else if is_shared {
        Filesystem::Container
    } else if handle.has_host_root() {
        return None;
    } else if door::memfd_device() == Some(stat.device) || name.starts_with(b"/memfd:") {
        Filesystem::Anonymous
    } else if ground == Ground::Memory {
        Filesystem::Tmpfs
    } else {
        Filesystem::Volume
    })
}

fn path_of(
    (watched, handle): (&Watched, &Handle),
    (exe, stat, name): (&OwnedFd, &Stat, &[u8]),
    filesystem: Filesystem,
) -> Result<RootfsPath, String> {
    if filesystem == Filesystem::Overlay {
        let (pid, parent) = (handle.identity().pid, handle.first_stat().parent);
        return paths::event_path(watched, exe, stat, pid, Some(parent))
            .map_err(|why| why.to_string());
    }
    let is_nameless = filesystem == Filesystem::Anonymous || stat.links == 0;
    paths::path(name, is_nameless).map_err(|why| why.to_string())
}
