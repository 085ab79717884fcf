//! Executed files of the container's own layer, and those of the image's layers
//! that may have been changed there: who runs them, and what they hold. Hashed
//! by the descriptor that the kernel opened for the event, so that no rename can
//! put another file in its place.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use jiff::Timestamp;

use super::acts;
use super::arguments::Words;
use super::crowd;
use super::deeds;
use super::files::{Held, Left};
use super::gate::Execution;
use super::lower;
use super::mounts;
use super::process::{self, Executing};
use super::shared::Shared;
use super::state::{self, Hashing};
use super::table::Watched;
use super::take::Taken;
use super::trust::Verdict;
use super::unseen;
use super::writable::Look;
use crate::health::Failure;
use crate::model::{
    Content, Fact, FileState, Filesystem, HostilePath, LayerFile, RootfsPath, Source, Unhashed,
};
use crate::sys::file::{self, Stat};
use crate::sys::procfs::Handle;
use crate::sys::{overlay, priority};
use crate::threads;

/// An execution whose process has been described, and whose file is still to be
/// hashed.
#[derive(Debug)]
pub(super) struct Described {
    watched: Arc<Watched>,
    filesystem: Filesystem,
    path: RootfsPath,
    file: Held,
    stat: Stat,
    layer_file: Option<LayerFile>,
    is_movable: bool,
    look: Look,
    could_change: Option<bool>,
    executing: Executing,
    /// When the gate was asked, by the clock of the kernel's records.
    asked: Option<u64>,
    at: Timestamp,
    times: u64,
}

/// Files longer than this take a noticeable time to hash.
const LARGE: u64 = 16 << 20;

impl Described {
    fn is_large(&self, shared: &Shared) -> bool {
        // What is above the limit is not read at all.
        (LARGE..=shared.settings.max_hash_bytes).contains(&self.stat.size)
    }
}

/// Describes processes. A thread of its own, because a process may live for less
/// time than the file before it takes to hash.
pub(super) fn describe(
    shared: &Shared,
    executions: &Receiver<Taken>,
    described: &Sender<Described>,
) {
    // Without CAP_SYS_NICE it runs like the others, and is late more often.
    let _ = rustix::process::setpriority_process(None, -5);
    while let Some(execution) = shared.next_to_tell(executions) {
        let Some(execution) = describe_one(shared, execution, executions) else {
            continue;
        };
        match described.try_send(execution) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(execution)) => shared.lose(
                Failure::ContentQueueFull,
                Some(&execution.watched),
                "too many executed files wait to be hashed",
            ),
        }
    }
}

fn describe_one(shared: &Shared, taken: Taken, others: &Receiver<Taken>) -> Option<Described> {
    let Taken { execution, path, look, could_change } = taken;
    let Execution { watched, filesystem, file, stat, layer_file, is_movable, caller, at, more } =
        execution;
    let times = 1 + more.map_or(0, |more| more.take());
    threads::about(&watched.container);
    if filesystem == Filesystem::Overlay && deeds::is_of_another(shared, &watched, &caller) {
        return None;
    }

    let executing = {
        // Held until the session is told, so that it is told before what it does.
        let mut sessions = shared.sessions();
        sessions.open(shared, &caller, &watched, at, &|| others.len())
    };
    acts::keep_handle(shared, &watched, &caller);
    let mut executing = executing.unwrap_or_else(|| {
        let executing = process::after_exec(&caller, &watched, &|| !others.is_empty());
        let described = &executing.process;
        let words = described.argv.clone().map(|argv| Words { exe: described.exe.clone(), argv });
        acts::keep_words(shared, &watched, &caller, words);
        executing
    });
    if let Some(stat) = &caller.stat {
        let mut packages = shared.packages();
        packages.executes(shared, &watched, stat);
        // Its parents may have ended with it.
        if let Some(ancestors) = packages.ancestors_of(stat.identity)
            && ancestors.len() > executing.process.ancestors.len()
        {
            executing.process.ancestors = ancestors.to_vec();
        }
    }
    if let (Ok((path, _)), None) = (&path, &executing.process.root) {
        executing.process.root = process::root_by_name(path, executing.process.exe.as_deref());
    }
    match path {
        // The common case, where directories can be moved at all.
        Ok((path, _)) if is_movable && is_where_the_image_has_it(&watched, &path, &stat) => None,
        Ok((path, is_certain)) => {
            let exe = executing.process.exe.as_deref().filter(|_| !is_certain);
            let path = exe.and_then(|exe| mounts::path_of_program(exe, &path)).unwrap_or(path);
            Some(Described {
                watched,
                filesystem,
                path,
                file,
                stat,
                layer_file,
                is_movable,
                look,
                could_change,
                executing,
                asked: caller.asked,
                at,
                times,
            })
        }
        Err(why) => {
            let detail = format!("the path of an executed file cannot be told: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            None
        }
    }
}

pub(super) fn is_where_the_image_has_it(watched: &Watched, path: &RootfsPath, stat: &Stat) -> bool {
    watched.layers().is_some_and(|layers| lower::is_at(layers, path, stat))
}

/// Hashes what was executed, but for large files, which must not keep the others
/// waiting.
pub(super) fn hash(shared: &Shared, described: &Receiver<Described>, large: &Sender<Described>) {
    while let Some(execution) = shared.next_to_tell(described) {
        if !execution.is_large(shared) {
            hash_one(shared, execution, described.len() >= crowd::FEW);
            continue;
        }
        match large.try_send(execution) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => (),
            Err(TrySendError::Full(execution)) => shared.lose(
                Failure::ContentQueueFull,
                Some(&execution.watched),
                "too many large executed files wait to be hashed",
            ),
        }
    }
}

/// Hashes large files that were executed, when nobody else needs the processor.
pub(super) fn hash_large(shared: &Shared, large: &Receiver<Described>) {
    let _ = priority::set(priority::current(), 10, priority::Disk::Usual);
    while let Some(execution) = shared.next_to_tell(large) {
        hash_one(shared, execution, false);
    }
}

fn hash_one(shared: &Shared, execution: Described, is_crowded: bool) {
    let Described {
        watched,
        filesystem,
        path,
        file,
        stat,
        layer_file,
        is_movable,
        look,
        mut could_change,
        executing,
        asked,
        at,
        times,
    } = execution;
    threads::about(&watched.container);
    let max_hash_bytes = shared.settings.max_hash_bytes;
    // The guard is gone before the file is read.
    let known = layer_file.and_then(|layer_file| watched.layer_files().known(&layer_file));
    // In a storm of one program every other would wait for its hashes.
    let is_own = filesystem == Filesystem::Overlay && layer_file.is_none();
    let known = known.or_else(|| is_crowded.then(|| shared.hashed.of_executed(&stat)).flatten());
    let mut state = known.unwrap_or_else(|| {
        let is_wanted = || !watched.is_detaching() && shared.may_tell();
        let open = match file.take() {
            Left::Open(fd) => {
                let state = state::while_wanted(
                    fd.as_fd(),
                    &stat,
                    Hashing::Always,
                    max_hash_bytes,
                    &is_wanted,
                );
                let now = state.as_ref().and_then(|_| file::stat(&fd).ok());
                if could_change.is_none() {
                    could_change =
                        now.map(|now| look.could_change(shared, &watched, &path, &stat, &now));
                }
                state
            }
            Left::Copy(copy) => Some(state::of_copy(&copy, &stat)),
            Left::Name(_) => None,
        };
        if let Some(state) = open.as_ref().filter(|_| could_change == Some(false)) {
            shared.hashed.remember_executed(&stat, state);
        }
        open.or_else(|| if is_own { in_upperdir(shared, &watched, &path, &stat) } else { None })
            .unwrap_or_else(|| FileState {
                content: Content::Unhashed(Unhashed::Gone),
                ..state::unopened(&stat)
            })
    });
    drop(file);
    state.could_change |= could_change.unwrap_or(look.had_writer());
    let is_on_overlay = filesystem == Filesystem::Overlay;
    let lower = match layer_file {
        None if is_on_overlay => watched
            .layers()
            .and_then(|layers| shared.lower_twins.find(layers, &path, true, max_hash_bytes)),
        // It would be its own twin, or no image has anything there.
        Some(_) | None => None,
    };
    let Executing { mut process } = executing;
    if process.argv.is_none() {
        // Here and not where it was described: those who wait there may be ending.
        let execve = (process.identity.pid, asked);
        process.argv = process::recorded_arguments(shared, execve, &|| is_crowded);
    }
    let execve = (process.identity.pid, asked);
    let exec_name = process::recorded_name(shared, execve, &|| is_crowded);
    let is_deleted = state.deleted;
    // The gate looked before it ran. It may also just have lost its name.
    let is_nameless = layer_file.is_none() && stat.links == 0 && unseen::has_a_number(&path);
    let filesystem = if is_nameless { Filesystem::Anonymous } else { filesystem };
    let path = unseen::path(path.as_bytes(), is_nameless).unwrap_or(path);
    // What is said of a file that was moved holds for its new path only.
    if let Some(layer_file) = layer_file.filter(|_| !is_movable) {
        // First, so that its judgement finds it.
        watched.layer_files_mut().tell(layer_file, state.clone(), at);
    }
    let fact = Fact::Executed {
        invoked_as: exec_name.and_then(|name| process::invoked_as(&name, &path)),
        path: path.clone(),
        filesystem,
        running: false,
        times,
        state,
        lower,
        process: Arc::new(process),
        layer_file,
    };
    let is_told = shared.observe(&watched, at, Source::Gate, fact);
    if let Some(layer_file) = layer_file {
        if !is_told {
            watched.layer_files_mut().judge(&layer_file, Verdict::Lost);
        }
        // It is not in the upper layer: no walk would find it.
        return;
    }
    if !is_on_overlay {
        // No walk goes there.
        return;
    }

    // The overlay's marks do not see renames, removals and chmod; where drift is
    // executed, they are looked for soon.
    if !is_deleted {
        shared.mark_dirty(&watched, path, Source::Scan, None);
    }
    shared.mark_for_sweep(&watched);
}

/// The state of a file that is not open any more, because its container has ended:
/// found again where the host keeps it, and known by its times.
fn in_upperdir(
    shared: &Shared,
    watched: &Watched,
    path: &RootfsPath,
    stat: &Stat,
) -> Option<FileState> {
    let layers = watched.layers()?;
    let upper = file::open_directory(&layers.dirs.upperdir).ok()?;
    let (fd, found) = file::open_file_beneath(&upper, path.relative()).ok()?;
    let is_same = found.is_regular()
        && (found.changed, found.modified, found.size) == (stat.changed, stat.modified, stat.size);
    if !is_same || overlay::is_metacopy(&fd, layers.userxattr).unwrap_or(true) {
        return None;
    }
    let max_hash_bytes = shared.settings.max_hash_bytes;
    state::while_wanted(fd.as_fd(), &found, Hashing::Always, max_hash_bytes, &|| shared.may_tell())
}

/// What the kernel calls an event's file when we ask.
pub(super) fn event_name(file: &OwnedFd) -> Result<Vec<u8>, UnknownPath> {
    let name = file::name_of(file.as_fd())?;
    if name.starts_with(b"/") { Ok(name) } else { Err(UnknownPath::NotAbsolute) }
}

/// The path of an event's file in its container: as the overlay has it, by
/// whichever mount it was reached.
pub(super) fn event_path(
    watched: &Watched,
    file: &OwnedFd,
    stat: &Stat,
    pid: u32,
    parent: Option<u32>,
) -> Result<RootfsPath, UnknownPath> {
    let name = event_name(file)?;
    let mut name = name.as_slice();
    if let Some(rest) = name.strip_suffix(file::DELETED)
        && !is_somewhere(watched, name)
    {
        // This name was removed, and the file has another one.
        name = rest;
    }
    let below_root = overlay::strip_directory(name, &watched.root_name);
    if let Some(mount) = stat.mount
        && stat.mount != watched.mount
    {
        // Reached through the runtime's own mount on the host, or through a bind
        // mount or a mount namespace that the container made.
        let viewers = [Some(std::process::id()), Some(pid), parent];
        let inside = viewers.into_iter().flatten().find_map(|viewer| {
            let mountinfo = Handle::open(viewer).ok()?.mountinfo().ok()?;
            let place = overlay::find_place(&mountinfo, mount)?;
            place.inside(name).or_else(|| place.inside(below_root?))
        });
        if let Some(inside) = inside {
            return Ok(RootfsPath::new(inside)?);
        }
    }
    Ok(RootfsPath::new(below_root.unwrap_or(name))?)
}

/// Whether a name that the kernel gave is one that the container has.
fn is_somewhere(watched: &Watched, name: &[u8]) -> bool {
    let below_root = overlay::strip_directory(name, &watched.root_name).unwrap_or(name);
    let (Some(layers), Ok(path)) = (watched.layers(), RootfsPath::new(below_root)) else {
        return true;
    };
    let is_in_upper = file::open_directory(&layers.dirs.upperdir)
        .and_then(|upper| file::open_path_beneath(&upper, path.relative()))
        .is_ok();
    is_in_upper || lower::holds(layers, &path)
}

#[derive(Debug, thiserror::Error)]
pub(super) enum UnknownPath {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the kernel gives no absolute path")]
    NotAbsolute,
    #[error(transparent)]
    Hostile(#[from] HostilePath),
}
