//! The thread `mounts`: marks the filesystems of a container besides its root overlay, and
//! follows changes of its mounts while it runs.
//!
//! `control` attaches and detaches containers, `namespaces` finds where mounts have changed, and
//! `marks` places the marks. [`Treatment`] gives the reasons why a filesystem is marked or not.
//! This thread never waits for a filesystem: look-ups use the kernel's memory
//! (`RESOLVE_CACHED`). Only what is not found there is read, and only from this machine's own
//! disks.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::marks::ExecMarks;
use super::namespaces::Namespaces;
use super::pace::Pace;
use crate::health::Failure;
use crate::model::{ContainerId, Filesystem};
use crate::sys::door::{self, Ground, HostMounts, View, Way};
use crate::sys::fanotify::Buffer;
use crate::sys::mounts::{self, Listener, MAX_MOUNTINFO, Mount, Notifier};
use crate::sys::procfs::Handle;
use crate::sys::{file, overlay};
use crate::threads;
use crate::watch::core::message::Error;
use crate::watch::core::watched::{MarkedMount, Watched};
use crate::watch::files::ways;
use crate::watch::process::shared::Processes;

/// The most marks of one container. If it has more mounts, that is reported once.
const MAX_MARKS: usize = 256;

/// How many mounts of one filesystem are tried until one can be opened.
const MAX_TRIES: usize = 4;

/// How often the thread tries to open a mount that exists and cannot be opened.
const MAX_ATTEMPTS: u8 = 3;

/// How often an idle thread checks whether it is to end.
const TURN: Duration = Duration::from_millis(500);

/// The host's devices are read again when they are this old.
const HOST_DEVICES_AGE: Duration = Duration::from_secs(60);

/// The kernel's own filesystems, from which nothing can be executed.
const NO_PROGRAMS: &[&[u8]] = &[
    b"autofs",
    b"binder",
    b"binfmt_misc",
    b"bpf",
    b"cgroup",
    b"cgroup2",
    b"configfs",
    b"cpuset",
    b"debugfs",
    b"devpts",
    b"efivarfs",
    b"fusectl",
    b"mqueue",
    b"nsfs",
    b"proc",
    b"pstore",
    b"resctrl",
    b"rpc_pipefs",
    b"securityfs",
    b"selinuxfs",
    b"smackfs",
    b"sysfs",
    b"tracefs",
];

/// The usual directories of the host's own programs and files.
const HOST_DIRECTORIES: &[&str] = &[
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/dev/shm",
    "/etc",
    "/home",
    "/lib",
    "/lib64",
    "/nix",
    "/opt",
    "/root",
    "/run",
    "/run/lock",
    "/sbin",
    "/snap",
    "/srv",
    "/sys/fs/cgroup",
    "/tmp",
    "/usr",
    "/usr/local",
    "/var",
    "/var/lib",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/kubelet",
    "/var/log",
    "/var/tmp",
];

/// How one mount is treated.
///
/// A filesystem that only containers use (a tmpfs, a volume) is marked as a whole, so that no
/// bind mount or namespace avoids the mark. A filesystem that the host also runs programs from
/// is marked by mount only, since the host's programs must not wait for driftd. A copy of such
/// a mount carries no mark; the trace reports executions from it.
///
/// Opening an event's file accesses its filesystem. If a process (FUSE, 9p) or a network serves
/// it, that server could block the gate forever. So only filesystems that are known to be local
/// are marked ([`door::Ground`]). A disk that only a container has mounted may be a file on such
/// a filesystem, and an overlay is as local as its layers, which cannot be determined from
/// outside. Programs on an overlay that a container has mounted are reported when their real
/// files below it are opened. The trace reports the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Treatment {
    /// Nothing on it can be executed, or it is the container's root, which is marked already.
    Ignore,
    /// Opening a file there may wait for a process or a network: left to the trace.
    Refuse,
    MarkFilesystem,
    MarkMount,
}

fn treat(mount: &Mount, own_device: u64, ground: Ground, host: &HashSet<u64>) -> Treatment {
    let kind = mount.kind.as_slice();
    let is_hosts = host.contains(&mount.device);
    if mount.device == own_device || NO_PROGRAMS.contains(&kind) {
        Treatment::Ignore
    } else if ground.local().is_none() || kind == b"overlay" && !is_hosts {
        Treatment::Refuse
    } else if is_hosts {
        Treatment::MarkMount
    } else {
        Treatment::MarkFilesystem
    }
}

/// The devices that the host itself runs from. They come from mountinfo and not from the
/// filesystems, because one of these may be on a network.
fn host_devices<'a>(mountinfos: impl IntoIterator<Item = &'a [u8]>) -> HashSet<u64> {
    let mut devices = HashSet::new();
    for mountinfo in mountinfos {
        let mounts: Vec<Mount> = mounts::parse(mountinfo).collect();
        for path in HOST_DIRECTORIES.iter().map(|path| path.as_bytes()) {
            // The mount with the longest matching mount point. `max_by_key` takes the last of
            // several on one mount point, which covers the others.
            let holder = mounts
                .iter()
                .filter(|mount| overlay::strip_directory(path, &mount.mount_point).is_some())
                .max_by_key(|mount| mount.mount_point.len());
            devices.extend(holder.map(|mount| mount.device));
            let there = mounts.iter().filter(|mount| mount.mount_point == path);
            devices.extend(there.map(|mount| mount.device));
        }
    }
    devices
}

/// The mounts to mark, up to the limit. For a filesystem that is marked as a whole, the inner
/// list holds the mounts through which it may be opened.
#[derive(Debug, Default, PartialEq, Eq)]
struct Choice {
    filesystems: Vec<Vec<Mount>>,
    mounts: Vec<Mount>,
    is_full: bool,
}

fn choose(
    mounts: impl Iterator<Item = Mount>,
    own: u64,
    ground: impl Fn(&Mount) -> Ground,
    host: &HashSet<u64>,
) -> Choice {
    let mut choice = Choice::default();
    let mut by_device: HashMap<u64, usize> = HashMap::new();
    for mount in mounts {
        let is_full = choice.filesystems.len() + choice.mounts.len() >= MAX_MARKS;
        match treat(&mount, own, ground(&mount), host) {
            Treatment::Ignore | Treatment::Refuse => (),
            Treatment::MarkFilesystem => match by_device.get(&mount.device) {
                Some(&at) => choice.filesystems[at].push(mount),
                None if is_full => choice.is_full = true,
                None => {
                    by_device.insert(mount.device, choice.filesystems.len());
                    choice.filesystems.push(vec![mount]);
                }
            },
            Treatment::MarkMount if is_full => choice.is_full = true,
            Treatment::MarkMount => choice.mounts.push(mount),
        }
    }
    choice
}

/// A mount that is about to be marked.
///
/// A container can change its mounts while they are being marked. So a mount is first remembered
/// by its unique ID, and then looked up again. Before Linux 6.8 there is no such ID: there a
/// descriptor holds the mount, which keeps its number from being reused.
#[derive(Debug)]
struct Reached<'a> {
    mount: &'a Mount,
    kept: Kept,
    /// The device that its files report.
    shown: u64,
    whole: bool,
}

/// Identifies a mount, so that it can be found to be still the same one.
#[derive(Debug)]
enum Kept {
    /// Its unique ID. A descriptor would keep the mount busy, and unmounting it meanwhile would
    /// fail.
    Known(u64),
    /// A descriptor, where the kernel has no unique IDs.
    Open(OwnedFd),
}

impl Reached<'_> {
    fn new(mount: &Mount, fd: OwnedFd, whole: bool) -> Reached<'_> {
        // Read from the kernel's memory only: this may be another filesystem by now, whose server
        // could block.
        let shown = file::stat(&fd).map_or(mount.device, |stat| stat.device);
        let kept = match mounts::unique_mount_of(fd.as_fd()) {
            Some(unique) => Kept::Known(unique),
            None => Kept::Open(fd),
        };
        Reached { mount, kept, shown, whole }
    }
}

/// Whether no path leads to a mount, because another mount covers it or a directory above it.
fn is_covered(mount: &Mount, by_id: &HashMap<u64, Mount>) -> bool {
    let mut way = HashSet::from([mount.id]);
    let mut parent = mount.parent;
    while way.insert(parent) {
        let Some(mount) = by_id.get(&parent) else { break };
        parent = mount.parent;
    }
    by_id.values().any(|other| {
        !way.contains(&other.id)
            && overlay::strip_directory(&mount.mount_point, &other.mount_point).is_some()
    })
}

/// The state of the thread that keeps the marks current, shared with the thread that attaches
/// and detaches containers.
pub(crate) struct Mounts {
    shared: Arc<Processes>,
    marks: ExecMarks,
    notifier: Notifier,
    namespaces: Namespaces,
    wake: OwnedFd,
    tracked: Mutex<HashMap<ContainerId, Tracked>>,
    /// The pace of listings that may not be needed, for all containers together.
    guesses: Mutex<Pace>,
    host: Mutex<Option<(Instant, Arc<HashSet<u64>>)>>,
}

struct Tracked {
    watched: Arc<Watched>,
    listener: Option<Arc<Listener>>,
    /// Its mounts have changed and have not been listed since.
    is_due: bool,
    /// They may not have changed: such listings of all containers share one bounded pace.
    is_guess: bool,
    pace: Pace,
    /// How often its mounts have been listed.
    listings: u64,
    attempts: u8,
    /// That some of its mounts are not marked has been reported.
    is_reported: bool,
}

impl Tracked {
    fn namespace(&self) -> Option<u64> {
        match self.listener.as_deref() {
            Some(Listener::Group(namespace)) => Some(*namespace),
            Some(Listener::Poll { .. }) | None => None,
        }
    }

    /// Its mounts have changed, or may have.
    fn set_due(&mut self, is_guess: bool) {
        self.is_guess = is_guess && (self.is_guess || !self.is_due);
        self.is_due = true;
        self.attempts = 0;
    }

    /// The earliest time at which its mounts may be listed.
    fn next(&self, next_guess: Instant) -> Instant {
        if self.is_guess { self.pace.next().max(next_guess) } else { self.pace.next() }
    }
}

/// The result of marking a container's mounts.
#[derive(Default)]
struct Outcome {
    /// A mount exists and was not opened. It may have been moved meanwhile.
    missed: Option<String>,
    refused: Option<String>,
    is_full: bool,
}

impl Mounts {
    pub(crate) fn new(
        shared: Arc<Processes>,
        marks: ExecMarks,
        notifier: Notifier,
    ) -> Result<Mounts, Error> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = rustix::event::eventfd(0, flags).map_err(|errno| Error::Wake(errno.into()))?;
        Ok(Mounts {
            shared,
            marks,
            notifier,
            namespaces: Namespaces::default(),
            wake,
            tracked: Mutex::default(),
            guesses: Mutex::default(),
            host: Mutex::default(),
        })
    }

    fn tracked(&self) -> MutexGuard<'_, HashMap<ContainerId, Tracked>> {
        self.tracked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guesses(&self) -> MutexGuard<'_, Pace> {
        self.guesses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Marks the mounts of a container, and keeps marking new ones. Listens for changes first,
    /// so that no mount is missed in between.
    pub(crate) fn attach(&self, watched: &Arc<Watched>, init: &Handle) {
        if !self.shared.settings.volumes {
            return;
        }
        let listener = self.notifier.listen(init);
        let mut all = self.tracked();
        self.remove(&mut all, &watched.container);
        // Inserted before its mounts are listed: a change that is reported meanwhile waits for the
        // lock, and then for the next listing.
        let mut entry = all.entry(watched.container.clone()).insert_entry(Tracked {
            watched: watched.clone(),
            listener: None,
            is_due: false,
            is_guess: false,
            pace: Pace::default(),
            listings: 0,
            attempts: 0,
            is_reported: false,
        });
        let tracked = entry.get_mut();
        match listener {
            Ok(listener) => tracked.listener = Some(Arc::new(listener)),
            Err(err) => {
                self.report(tracked, &format!("changes of its mounts cannot be followed: {err}"));
            }
        }
        self.list(tracked);
        drop(all);
        self.wake();
    }

    /// The container has ended: closes what is open for it.
    pub(crate) fn detach(&self, watched: &Arc<Watched>) {
        let mut tracked = self.tracked();
        if tracked.get(&watched.container).is_some_and(|own| Arc::ptr_eq(&own.watched, watched)) {
            self.remove(&mut tracked, &watched.container);
            self.wake();
        }
    }

    fn remove(&self, all: &mut HashMap<ContainerId, Tracked>, container: &ContainerId) {
        let namespace = all.remove(container).and_then(|removed| removed.namespace());
        let is_used = |namespace| all.values().any(|other| other.namespace() == Some(namespace));
        if let Some(namespace) = namespace.filter(|namespace| !is_used(*namespace)) {
            self.namespaces.forget(namespace);
        }
    }

    /// How often a container's mounts have been listed.
    pub(crate) fn listings(&self, container: &ContainerId) -> Option<u64> {
        Some(self.tracked().get(container)?.listings)
    }

    pub(crate) fn run(&self) {
        // Soon after a mount, because until it is marked only the trace reports executions there.
        let _ = rustix::process::setpriority_process(None, -10);
        let mut buffer = Buffer::new();
        while !self.shared.is_stopping() {
            self.wait(&mut buffer);
            self.explain();
            for container in self.due(Instant::now()) {
                // Locked for one container at a time, because attaching another one waits for it.
                if let Some(tracked) = self.tracked().get_mut(&container) {
                    let start = Instant::now();
                    if tracked.next(self.guesses().next()) > start {
                        continue;
                    }
                    tracked.is_due = false;
                    self.list(tracked);
                    if std::mem::take(&mut tracked.is_guess) {
                        self.guesses().spent(start, Instant::now());
                    }
                }
            }
        }
    }

    /// The containers whose mounts are to be listed now. Those listed longest ago come first, so
    /// that no container delays another one.
    fn due(&self, now: Instant) -> Vec<ContainerId> {
        let next_guess = self.guesses().next();
        let tracked = self.tracked();
        let mut due: Vec<(Instant, &ContainerId)> = tracked
            .iter()
            .filter(|(_, tracked)| tracked.is_due && tracked.next(next_guess) <= now)
            .map(|(container, tracked)| (tracked.pace.since, container))
            .collect();
        due.sort_unstable();
        due.into_iter().map(|(_, container)| container.clone()).collect()
    }

    /// Finds the containers of changes whose namespace was not known immediately.
    fn explain(&self) {
        let changed = self.namespaces.explain(Instant::now());
        if changed.certain.is_empty() && changed.possible.is_empty() {
            return;
        }
        for tracked in self.tracked().values_mut() {
            let Some(namespace) = tracked.namespace() else { continue };
            if changed.certain.contains(&namespace) {
                tracked.set_due(false);
            } else if changed.possible.contains(&namespace) {
                tracked.set_due(true);
            }
        }
    }

    /// Waits until mounts change, and notes the containers.
    fn wait(&self, buffer: &mut Buffer) {
        let (listeners, timeout) = {
            let next_guess = self.guesses().next();
            let tracked = self.tracked();
            let next = tracked.values().filter(|tracked| tracked.is_due);
            let next = next.map(|tracked| tracked.next(next_guess));
            let next = next.chain(self.namespaces.next()).min();
            let now = Instant::now();
            let timeout = next.map_or(TURN, |next| next.saturating_duration_since(now).min(TURN));
            let polled: Vec<(ContainerId, Arc<Listener>)> = tracked
                .iter()
                .filter_map(|(container, tracked)| {
                    let listener = tracked.listener.clone()?;
                    listener.poll_fds()?;
                    Some((container.clone(), listener))
                })
                .collect();
            (polled, timeout)
        };
        let mut fds = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        fds.extend(self.notifier.group().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let first_listener = fds.len();
        fds.extend(listeners.iter().filter_map(|(_, listener)| listener.poll_fds()).flatten());
        let timeout = Timespec::try_from(timeout).expect("half a second fits");
        if threads::idle(|| rustix::event::poll(&mut fds, Some(&timeout))).is_err() {
            return;
        }
        let happened: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if happened[0] {
            let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        }
        let changed = if happened[1..first_listener].contains(&true) {
            self.namespaces.take(self.notifier.take(buffer))
        } else {
            HashSet::new()
        };
        let mut tracked = self.tracked();
        if !changed.is_empty() {
            for tracked in tracked.values_mut() {
                if tracked.namespace().is_some_and(|namespace| changed.contains(&namespace)) {
                    tracked.set_due(false);
                }
            }
        }
        for ((container, listener), happened) in
            listeners.iter().zip(happened[first_listener..].chunks(2))
        {
            let tracked = tracked.get_mut(container).filter(|tracked| {
                tracked.listener.as_ref().is_some_and(|own| Arc::ptr_eq(own, listener))
            });
            let Some(tracked) = tracked else { continue };
            if happened[0] {
                tracked.set_due(false);
            }
            if happened[1] {
                tracked.listener = None;
            }
        }
    }

    /// Lists a container's mounts and marks all of them again, because device numbers and mount
    /// IDs may have been reused since.
    fn list(&self, tracked: &mut Tracked) {
        let start = Instant::now();
        tracked.listings += 1;
        // Before its mounts are read, so that a change in between is reported and becomes due.
        if let Some(namespace) = tracked.namespace() {
            self.namespaces.know(namespace);
        }
        threads::about(&tracked.watched.container);
        let outcome = self.mark_all(&tracked.watched);
        tracked.pace.spent(start, Instant::now());
        // An error means that the process has ended, and its mounts with it.
        let Ok(outcome) = outcome else { return };
        let fits = outcome.refused.is_none() && outcome.missed.is_none() && !outcome.is_full;
        if fits && tracked.listener.is_some() && std::mem::take(&mut tracked.is_reported) {
            self.shared.restore(Failure::MountsFull, Some(&tracked.watched));
        }
        if let Some(detail) = outcome.refused {
            self.report(tracked, &detail);
        }
        if outcome.is_full {
            self.report(tracked, "it has more mounts than can be marked");
        }
        if let Some(detail) = outcome.missed {
            tracked.attempts += 1;
            if tracked.attempts < MAX_ATTEMPTS {
                tracked.is_due = true;
            } else {
                self.report(tracked, &detail);
            }
        }
    }

    /// Counts that some mounts are not marked, and reports it once while it lasts.
    fn report(&self, tracked: &mut Tracked, detail: &str) {
        if std::mem::replace(&mut tracked.is_reported, true) {
            let _ = self.shared.health.record(Failure::MountsFull);
        } else {
            self.shared.degrade(Failure::MountsFull, Some(&tracked.watched), detail);
        }
    }

    fn host_devices(&self) -> Arc<HashSet<u64>> {
        let mut host = self.host.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((since, devices)) = &*host
            && since.elapsed() < HOST_DEVICES_AGE
        {
            return devices.clone();
        }
        let mountinfos: Vec<Vec<u8>> = [1, std::process::id()]
            .into_iter()
            .filter_map(|pid| Handle::open(pid).and_then(|host| host.mountinfo()).ok())
            .collect();
        let mountinfos = mountinfos.iter().map(Vec::as_slice);
        let devices = Arc::new(host_devices(mountinfos));
        *host = Some((Instant::now(), devices.clone()));
        devices
    }

    fn mark_all(&self, watched: &Arc<Watched>) -> io::Result<Outcome> {
        let init = Handle::open_exactly(watched.init)?;
        let mountinfo = init.mountinfo()?;
        ways::note_mounts(&self.shared, watched, &init, mounts::parse(&mountinfo));
        let host = HostMounts::now();
        let ground = |mount: &Mount| host.ground(mount);
        let all = mounts::parse(&mountinfo);
        let choice = choose(all, watched.device, ground, &self.host_devices());
        self.shared.table.note_kinds(mounts::parse(&mountinfo).map(|mount| {
            let is_in_memory = host.ground(&mount) == Ground::Memory;
            let kind = if is_in_memory { Filesystem::Tmpfs } else { Filesystem::Volume };
            (mount.device, kind)
        }));
        let is_cut = mountinfo.len() as u64 >= MAX_MOUNTINFO;
        let mut outcome = Outcome { is_full: choice.is_full || is_cut, ..Outcome::default() };
        drop(mountinfo);
        let view = watched.view([&init]);
        // Closed as soon as possible: the descriptor keeps the container's root busy.
        let root = init.open_root()?;
        let (held, unreached) = Mounts::reach_all(&root, &view, &choice);
        drop(root);

        // Open descriptors keep the mounts and their numbers, so a mount that is still listed
        // under its number is the one that was opened. A mount without a descriptor is opened
        // again below and compared by its unique ID.
        let mountinfo = init.mountinfo()?;
        let now: HashMap<u64, Mount> =
            mounts::parse(&mountinfo).map(|mount| (mount.id, mount)).collect();
        drop(mountinfo);
        let is_still = |mount: &Mount| now.get(&mount.id) == Some(mount);
        for mount in unreached {
            if is_still(mount) && !is_covered(mount, &now) {
                outcome.missed = Some(format!("the mount {} cannot be reached", name_of(mount)));
            }
        }
        let (held, moved): (Vec<_>, Vec<_>) =
            held.into_iter().partition(|reached| is_still(reached.mount));
        if let Some(Reached { mount, .. }) = moved.first() {
            outcome.missed =
                Some(format!("the mount {} changes while it is being marked", name_of(mount)));
        }
        drop(moved);

        // Added to the table before it is marked, so that its first event finds it.
        self.shared.table.set_mounts(watched, known(&held, &now));
        let root = init.open_root()?;
        let (names, marked) = reach_again(&root, &view, held);
        drop(root);
        for (mount, done) in names.iter().zip(self.marks.mark_others(marked)) {
            if let Err(err) = done {
                outcome.refused =
                    Some(format!("the kernel refuses to mark {}: {err}", name_of(mount)));
            }
        }
        Ok(outcome)
    }

    /// Opens the mounts to be marked. Also returns those that cannot be opened.
    fn reach_all<'a>(
        root: &OwnedFd,
        view: &View,
        choice: &'a Choice,
    ) -> (Vec<Reached<'a>>, Vec<&'a Mount>) {
        let mut held: Vec<Reached<'_>> = Vec::new();
        let mut unreached: Vec<&Mount> = Vec::new();
        for ways in &choice.filesystems {
            let reached = ways.iter().take(MAX_TRIES).find_map(|mount| {
                Some(Reached::new(mount, Mounts::reach(root, view, mount)?, true))
            });
            match reached {
                Some(reached) => held.push(reached),
                None => unreached.extend(ways.first()),
            }
        }
        for mount in &choice.mounts {
            match Mounts::reach(root, view, mount) {
                Some(fd) => held.push(Reached::new(mount, fd, false)),
                None => unreached.push(mount),
            }
        }
        (held, unreached)
    }

    /// Opens a mount's own root; `None` if another mount is there now, or the path leads through a
    /// filesystem that may not answer.
    fn reach(root: &OwnedFd, view: &View, mount: &Mount) -> Option<OwnedFd> {
        threads::beat();
        let slowly = || match door::walk(root.try_clone().ok()?, None, &mount.mount_point, view) {
            Ok(Way::Found(held)) => Some(held.fd),
            Ok(Way::Foreign(_) | Way::Process(_)) | Err(_) => None,
        };
        let fd = mounts::reach(root, &mount.mount_point).ok().or_else(slowly);
        fd.filter(|fd| mounts::mount_of(fd.as_fd()).is_ok_and(|id| id == mount.id))
    }
}

/// The marked mounts for the table of the core. For a filesystem that is marked as a whole, these
/// are all of its mounts, since events may come from each.
fn known(held: &[Reached<'_>], now: &HashMap<u64, Mount>) -> Vec<MarkedMount> {
    let marked_whole: HashSet<u64> =
        held.iter().filter(|it| it.whole).map(|it| it.mount.device).collect();
    let mut known: Vec<MarkedMount> = Vec::new();
    for Reached { mount, shown, whole, .. } in held {
        let (mount, shown) = (*mount, *shown);
        let devices = [mount.device, shown];
        // The files of a btrfs subvolume report a device of their own.
        let devices = if shown == mount.device { &devices[..1] } else { &devices[..] };
        known.extend(devices.iter().map(|device| marked(mount, *device, *whole)));
    }
    let more = now.values().filter(|mount| marked_whole.contains(&mount.device));
    for mount in more.take(16 * MAX_MARKS) {
        if !held.iter().any(|held| held.mount.id == mount.id) {
            known.push(marked(mount, mount.device, true));
        }
    }
    known
}

/// Opens again the mounts that are known by their unique ID only. Returns what to mark, with the
/// mounts.
fn reach_again<'a>(
    root: &OwnedFd,
    view: &View,
    held: Vec<Reached<'a>>,
) -> (Vec<&'a Mount>, Vec<(OwnedFd, bool)>) {
    let (mut names, mut marked) = (Vec::new(), Vec::new());
    for Reached { mount, kept, whole, .. } in held {
        let fd = match kept {
            Kept::Open(fd) => Some(fd),
            // A mount that was added or removed since is reported to this thread too.
            Kept::Known(unique) => Mounts::reach(root, view, mount)
                .filter(|fd| mounts::unique_mount_of(fd.as_fd()) == Some(unique)),
        };
        if let Some(fd) = fd {
            names.push(mount);
            marked.push((fd, whole));
        }
    }
    (names, marked)
}

fn marked(mount: &Mount, device: u64, whole_filesystem: bool) -> MarkedMount {
    MarkedMount {
        id: mount.id,
        device,
        root: mount.root.clone(),
        mount_point: mount.mount_point.clone(),
        whole_filesystem,
    }
}

fn name_of(mount: &Mount) -> String {
    crate::model::printable(&mount.mount_point)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(major: u32, minor: u32) -> u64 {
        rustix::fs::makedev(major, minor)
    }

    fn mount(id: u64, parent: u64, minor: u32, at: &str, kind: &str) -> Mount {
        Mount {
            id,
            parent,
            device: device(0, minor),
            root: b"/".to_vec(),
            mount_point: at.into(),
            kind: kind.into(),
        }
    }

    #[track_caller]
    fn check(kind: &str, is_hosts: bool, expected: Treatment) {
        let host = if is_hosts { HashSet::from([device(0, 7)]) } else { HashSet::new() };
        let mount = mount(2, 1, 7, "/m", kind);
        let treatment = treat(&mount, device(0, 1), ground(&mount), &host);
        assert_eq!(treatment, expected, "{kind}, the host's: {is_hosts}");
    }

    /// The ground of a mount, as if the host had mounted everything.
    fn ground(mount: &Mount) -> Ground {
        HostMounts::parse([format!(
            "1 0 {}:{} / / rw - {} x rw\n",
            0,
            rustix::fs::minor(mount.device),
            String::from_utf8_lossy(&mount.kind)
        )
        .as_bytes()])
        .ground(mount)
    }

    #[test]
    fn only_filesystems_that_cannot_block_are_marked() {
        for kind in ["tmpfs", "ramfs", "ext4", "xfs", "btrfs", "squashfs"] {
            check(kind, false, Treatment::MarkFilesystem);
            check(kind, true, Treatment::MarkMount);
        }
        for kind in [
            "fuse",
            "fuse.sshfs",
            "fuseblk",
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "9p",
            "virtiofs",
            "ceph",
            "overlay",
            "fuse-overlayfs",
            "ecryptfs",
            "from-the-future",
            "",
        ] {
            check(kind, false, Treatment::Refuse);
        }
        for kind in ["fuse", "nfs4", "9p", "virtiofs"] {
            check(kind, true, Treatment::Refuse);
        }
        check("overlay", true, Treatment::MarkMount);
        for kind in ["proc", "sysfs", "cgroup2", "mqueue", "devpts"] {
            check(kind, false, Treatment::Ignore);
            check(kind, true, Treatment::Ignore);
        }
    }

    #[test]
    fn a_filesystem_is_marked_once_and_the_containers_root_not_again() {
        let own = device(0, 1);
        let host = HashSet::from([device(0, 9)]);
        let mounts = [
            mount(10, 1, 1, "/", "overlay"),
            mount(11, 10, 2, "/dev", "tmpfs"),
            mount(12, 10, 9, "/etc/hosts", "ext4"),
            mount(13, 10, 9, "/host", "ext4"),
            mount(14, 10, 2, "/again", "tmpfs"),
            mount(15, 10, 1, "/bind", "overlay"),
        ];
        let choice = choose(mounts.clone().into_iter(), own, ground, &host);
        let [_, dev, hosts, directory, again, _] = mounts;
        let expected = Choice {
            filesystems: vec![vec![dev, again]],
            mounts: vec![hosts, directory],
            is_full: false,
        };
        assert_eq!(choice, expected);
    }

    #[test]
    fn a_container_cannot_have_more_marks_than_the_limit() {
        let many = (0..1000_u32).map(|n| mount(u64::from(n), 0, n + 10, "/m", "tmpfs"));
        let choice = choose(many, device(0, 1), ground, &HashSet::new());
        assert_eq!((choice.filesystems.len(), choice.is_full), (MAX_MARKS, true));
        // Mounts of one filesystem, or of its own root, do not count.
        let many = (0..10_000).flat_map(|n| {
            [mount(n, 0, 1, "/m", "overlay"), mount(n + 10_000, 0, 2, "/n", "tmpfs")]
        });
        let choice = choose(many, device(0, 1), ground, &HashSet::new());
        assert_eq!((choice.filesystems.len(), choice.is_full), (1, false));
    }

    #[test]
    fn the_hosts_devices_are_where_its_directories_are() {
        let mountinfo = b"1 0 8:1 / / rw - ext4 /dev/sda rw\n\
            2 1 0:5 / /dev rw - devtmpfs d rw\n3 2 0:6 / /dev/shm rw - tmpfs t rw\n\
            4 2 0:7 / /dev/shm rw - tmpfs t rw\n5 1 8:2 / /var rw - ext4 /dev/sdb rw\n\
            6 5 8:3 / /var/lib/kubelet/pods/p/volumes/v rw - ext4 /dev/sdc rw\n\
            7 1 8:4 / /mnt/data rw - xfs /dev/sdd rw\n";
        let host = host_devices([mountinfo.as_slice()]);
        let numbers = [(8, 1), (0, 5), (0, 6), (0, 7), (8, 2)];
        assert_eq!(host, numbers.into_iter().map(|(major, minor)| device(major, minor)).collect());
    }

    #[test]
    fn a_mount_above_another_covers_it() {
        let mounts = [
            mount(1, 0, 1, "/", "overlay"),
            mount(2, 1, 2, "/a/b", "tmpfs"),
            mount(3, 1, 3, "/a", "tmpfs"),
            mount(4, 1, 4, "/c", "tmpfs"),
            mount(5, 4, 5, "/c", "tmpfs"),
            mount(6, 5, 6, "/c/d", "tmpfs"),
            mount(7, 1, 7, "/ab", "tmpfs"),
        ];
        let by_id: HashMap<u64, Mount> =
            mounts.into_iter().map(|mount| (mount.id, mount)).collect();
        let covered: Vec<bool> = (1..=7).map(|id| is_covered(&by_id[&id], &by_id)).collect();
        assert_eq!(covered, [false, true, false, true, false, false, false]);
    }
}
