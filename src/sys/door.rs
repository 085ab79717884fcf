//! The only way to files below a container's root, and to the targets of its links.
//!
//! A container can mount a filesystem that one of its own processes serves. A thread that
//! asks such a filesystem waits for as long as that process wants, and not even SIGKILL ends
//! the wait. So nothing here asks a filesystem before it is known what answers for it:
//!
//! - A file is held by a descriptor that was opened with O_PATH, through a link of
//!   `/proc/PID` or by [`walk`]. Neither asks the file's own filesystem.
//! - The file's attributes, and the mount through which it was reached, are those that the
//!   kernel already has ([`file::stat`], which never asks for newer values).
//! - What answers for that mount is read from the kernel's lists of mounts ([`View`]), never
//!   from the filesystem: fstatfs(2) asks the server of a FUSE filesystem.
//! - Only [`reopen`] opens the file for reading, and it requires a proof ([`Local`]).
//! - A look-up resolves one name at a time, and checks each mount before it enters it.
//!
//! The lists are read after the descriptor was opened. The descriptor keeps its mount, and
//! so the mount's number belongs to no other mount.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::file::{self, Stat};
use super::mounts::{self, Mount};
use super::overlay::{self, strip_directory};
use super::procfs::Handle;
use crate::model::FileType;

/// Filesystems in memory.
const MEMORY: &[&[u8]] = &[b"tmpfs", b"ramfs", b"devtmpfs", b"hugetlbfs"];

/// Filesystems on disks: as local as the disk is.
const DISK: &[&[u8]] = &[
    b"bcachefs",
    b"btrfs",
    b"erofs",
    b"exfat",
    b"ext2",
    b"ext3",
    b"ext4",
    b"f2fs",
    b"hfs",
    b"hfsplus",
    b"iso9660",
    b"jfs",
    b"minix",
    b"msdos",
    b"nilfs2",
    b"ntfs3",
    b"reiserfs",
    b"squashfs",
    b"udf",
    b"vfat",
    b"xfs",
    b"zfs",
];

/// Filesystems of the kernel itself.
const KERNEL: &[&[u8]] = &[
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
    b"pstore",
    b"resctrl",
    b"securityfs",
    b"selinuxfs",
    b"smackfs",
    b"sysfs",
    b"tracefs",
];

/// What answers for the files of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ground {
    /// The kernel, from memory.
    Memory,
    /// The kernel, from a disk of this machine that the host has mounted.
    Disk,
    /// The kernel, which makes each file when it is read. Nothing there can be executed.
    Kernel,
    /// The same, but some links there lead anywhere: procfs.
    Process,
    /// Perhaps a process or another machine, which may never answer: FUSE, networks, a disk
    /// or an overlay that only a container has mounted, a mount that is in no list.
    Foreign,
}

/// The proof that the kernel answers by itself for an open file.
#[derive(Clone, Copy, Debug)]
pub struct Local(());

impl Ground {
    pub fn local(self) -> Option<Local> {
        matches!(self, Ground::Memory | Ground::Disk).then_some(Local(()))
    }
}

impl Local {
    /// For a file that was reached by descriptors below a directory of containerd or of the
    /// host, without entering another mount ([`file::open_path_beneath`]); or that lies on a
    /// container's own overlay, which the host has mounted.
    pub fn by_layers() -> Local {
        Local(())
    }
}

/// Opens for reading a file that was opened with O_PATH. The caller has checked that it is a
/// regular file: to open any other kind could wait, or have an effect.
pub fn reopen(file: BorrowedFd<'_>, _: Local) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open(&path, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => Ok(rustix::fs::open(&path, flags, Mode::empty())?),
        opened => Ok(opened?),
    }
}

// ---- mounts

/// Which list of mounts has a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// That of a viewer: a process, or its container.
    Inside,
    /// Only that of the host.
    ByHost,
    /// None: the mount was detached, or belongs to a mount namespace without a viewer.
    Nowhere,
}

/// The mounts that some processes and the host see.
#[derive(Debug)]
pub struct View {
    inside: Vec<Vec<u8>>,
    host: Arc<HostMounts>,
    /// The device of a container's own overlay, which its runtime has mounted.
    root: Option<u64>,
    /// The device of an overlay that must not be asked.
    foreign_root: Option<u64>,
}

impl View {
    /// The lists of these processes, nearest first, and that of the host.
    pub fn of<'a>(viewers: impl IntoIterator<Item = &'a Handle>) -> View {
        let inside = viewers.into_iter().filter_map(|viewer| viewer.mountinfo().ok()).collect();
        View { inside, host: HostMounts::now(), root: None, foreign_root: None }
    }

    /// Trusts this filesystem too, the root of a watched container, even if it is in no
    /// list: its runtime may have mounted it in a mount namespace of its own.
    pub fn and_root(self, device: u64) -> View {
        View { root: Some(device), ..self }
    }

    /// Does not ask this filesystem, whatever type it has.
    pub fn without_root(self, device: u64) -> View {
        View { foreign_root: Some(device), ..self }
    }

    /// The mount of a held file.
    pub fn mount(&self, stat: &Stat) -> Option<Mount> {
        let by_number = stat.mount.and_then(|id| {
            let mut inside = self.inside.iter();
            inside
                .find_map(|mountinfo| mounts::find(mountinfo, id))
                .or_else(|| self.host.by_id.get(&id).cloned())
        });
        // Before Linux 5.8 the kernel does not report the mount. And the filesystem of a
        // detached mount may be mounted elsewhere.
        by_number.or_else(|| {
            let mut inside = self.inside.iter();
            inside
                .find_map(|mountinfo| mounts::find_device(mountinfo, stat.device))
                .or_else(|| self.host.by_device.get(&stat.device).cloned())
        })
    }

    pub fn listed(&self, stat: &Stat) -> Listed {
        let is_inside = |mountinfo: &Vec<u8>| match stat.mount {
            Some(id) => mounts::find(mountinfo, id).is_some(),
            None => mounts::find_device(mountinfo, stat.device).is_some(),
        };
        if self.inside.iter().any(is_inside) {
            Listed::Inside
        } else if self.host.by_device.contains_key(&stat.device) {
            Listed::ByHost
        } else {
            Listed::Nowhere
        }
    }

    /// What answers for a held file.
    pub fn ground(&self, stat: &Stat) -> Ground {
        if memfd_device() == Some(stat.device) {
            return Ground::Memory;
        }
        match self.mount(stat) {
            Some(mount) if Some(mount.device) == self.foreign_root => Ground::Foreign,
            Some(mount) if Some(mount.device) == self.root => Ground::Disk,
            Some(mount) => self.host.ground(&mount),
            None if Some(stat.device) == self.root => Ground::Disk,
            None => Ground::Foreign,
        }
    }

    /// Whether no autofs is mounted at a path: to enter an autofs can mean to wait for its
    /// daemon.
    fn is_free_of_autofs(&self, path: impl FnOnce() -> Vec<u8>) -> bool {
        const MARK: &[u8] = b" - autofs ";
        let has_any = |text: &Vec<u8>| text.windows(MARK.len()).any(|here| here == MARK);
        if !self.inside.iter().any(has_any) {
            return true;
        }
        let path = path();
        let mut mounts = self.inside.iter().flat_map(|text| mounts::parse(text));
        !mounts.any(|mount| mount.kind == b"autofs" && mount.mount_point == path)
    }

    /// What answers for the filesystem with this device, if no file of it can be held.
    pub fn ground_of_device(&self, device: u64) -> Option<Ground> {
        let mut inside = self.inside.iter();
        let mount = inside.find_map(|mountinfo| mounts::find_device(mountinfo, device))?;
        Some(self.host.ground(&mount))
    }
}

/// The host's mounts: from the lists of its first process and of driftd.
#[derive(Debug, Default)]
pub struct HostMounts {
    by_id: HashMap<u64, Mount>,
    by_device: HashMap<u64, Mount>,
    all: Vec<Mount>,
    /// The directories of each overlay, by its device.
    overlays: HashMap<u64, Vec<PathBuf>>,
    /// Whether the kernel answers by itself for an overlay, as far as that was checked.
    local_overlays: Mutex<HashMap<u64, bool>>,
}

/// How deep disks that are made of disks, and overlays of overlays, are followed.
const MOST_BELOW: u32 = 8;

/// The lists of the last read. An open list can be polled for changes.
#[derive(Debug)]
struct Cached {
    files: Vec<File>,
    mounts: Arc<HostMounts>,
}

impl HostMounts {
    /// The host's mounts now: read again only if the kernel reports a change.
    pub fn now() -> Arc<HostMounts> {
        static CACHED: Mutex<Option<Cached>> = Mutex::new(None);
        let mut cached = CACHED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = &*cached
            && !has_changed(&cached.files)
        {
            return cached.mounts.clone();
        }
        // Opened before it is read, so that the kernel reports a change in between.
        let files: Vec<File> = [1, std::process::id()]
            .iter()
            .filter_map(|pid| File::open(format!("/proc/{pid}/mountinfo")).ok())
            .collect();
        let texts: Vec<Vec<u8>> = files.iter().filter_map(|file| read(file).ok()).collect();
        let mounts = Arc::new(HostMounts::parse(texts.iter().map(Vec::as_slice)));
        *cached = Some(Cached { files, mounts: mounts.clone() });
        mounts
    }

    /// Reads these lists.
    pub fn parse<'a>(mountinfos: impl IntoIterator<Item = &'a [u8]>) -> HostMounts {
        let mut host = HostMounts::default();
        for (line, mount) in mountinfos.into_iter().flat_map(mounts::parse_lines) {
            if mount.kind == b"overlay" {
                let directories = host.overlays.entry(mount.device);
                directories.or_insert_with(|| overlay::directories(line));
            }
            host.by_id.insert(mount.id, mount.clone());
            host.by_device.entry(mount.device).or_insert_with(|| mount.clone());
            host.all.push(mount);
        }
        host
    }

    /// What answers for a mount of the host or of a container. A filesystem that is not in
    /// memory counts as local only if the host has mounted it too.
    pub fn ground(&self, mount: &Mount) -> Ground {
        let is_hosts = self.by_device.get(&mount.device).is_some_and(|own| own.kind == mount.kind);
        match mount.kind.as_slice() {
            kind if MEMORY.contains(&kind) => Ground::Memory,
            b"proc" => Ground::Process,
            kind if KERNEL.contains(&kind) => Ground::Kernel,
            b"overlay" if is_hosts && self.is_overlay_local(mount.device) => Ground::Disk,
            kind if is_hosts && DISK.contains(&kind) && self.is_disk(mount.device, 0) => {
                Ground::Disk
            }
            _ => Ground::Foreign,
        }
    }

    /// Whether the kernel answers by itself for an overlay that the host has mounted.
    fn is_overlay_local(&self, device: u64) -> bool {
        let known = || self.local_overlays.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(is_local) = known().get(&device) {
            return *is_local;
        }
        let directories = self.overlays.get(&device).map(Vec::as_slice).unwrap_or_default();
        let is_local = self.foreign_layer(directories, 0).is_none();
        known().insert(device, is_local);
        is_local
    }

    /// The first of an overlay's directories for which perhaps a process or another machine
    /// answers, by the names of the host's mounts. A name that is not the host's cannot be
    /// resolved without asking a filesystem; such a directory counts as local.
    fn foreign_layer<'a>(&self, directories: &'a [PathBuf], depth: u32) -> Option<&'a PathBuf> {
        directories.iter().find(|directory| {
            let holder = self.holder_of(directory.as_os_str().as_encoded_bytes());
            holder.is_some_and(|mount| !self.is_layers_ground(mount, directories, depth))
        })
    }

    /// The host's mount on which a path lies. The last of several mounts on one mount point
    /// covers the others.
    fn holder_of(&self, path: &[u8]) -> Option<&Mount> {
        let holders =
            self.all.iter().filter(|mount| strip_directory(path, &mount.mount_point).is_some());
        holders.max_by_key(|mount| mount.mount_point.len())
    }

    /// Whether the kernel answers by itself for a layer of an overlay on this mount.
    fn is_layers_ground(&self, mount: &Mount, directories: &[PathBuf], depth: u32) -> bool {
        // The host's own root is trusted like the host.
        if self.holder_of(b"/").is_some_and(|root| root.device == mount.device) {
            return true;
        }
        match mount.kind.as_slice() {
            kind if MEMORY.contains(&kind) => true,
            // An overlay can be mounted over its own layers.
            b"overlay" => {
                let below = self.overlays.get(&mount.device).map(Vec::as_slice).unwrap_or_default();
                below == directories
                    || depth < MOST_BELOW && self.foreign_layer(below, depth + 1).is_none()
            }
            kind => DISK.contains(&kind) && self.is_disk(mount.device, depth),
        }
    }

    /// Whether no process answers for the content of a disk.
    fn is_disk(&self, device: u64, depth: u32) -> bool {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        // These numbers belong to no device: btrfs, zfs, whose disks the host has chosen.
        major == 0
            || std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))
                .is_ok_and(|disk| self.is_disk_at(&disk, depth))
    }

    /// The same, by its directory in sysfs.
    fn is_disk_at(&self, disk: &Path, depth: u32) -> bool {
        let name = disk.file_name().unwrap_or_default().as_encoded_bytes();
        // A process serves the content of these.
        if depth > MOST_BELOW || name.starts_with(b"nbd") || name.starts_with(b"ublk") {
            return false;
        }
        if disk.join("partition").exists() {
            return disk.parent().is_some_and(|whole| self.is_disk_at(whole, depth + 1));
        }
        if disk.join("loop").exists() {
            let backing = std::fs::read(disk.join("loop/backing_file"));
            return backing.is_ok_and(|name| self.is_way_local(name.trim_ascii_end(), depth));
        }
        let parts: Vec<PathBuf> = std::fs::read_dir(disk.join("slaves"))
            .into_iter()
            .flatten()
            .filter_map(|part| std::fs::canonicalize(part.ok()?.path()).ok())
            .collect();
        parts.iter().all(|part| self.is_disk_at(part, depth + 1))
    }

    /// Whether the kernel answers by itself for every mount of the host on the way to a file.
    fn is_way_local(&self, path: &[u8], depth: u32) -> bool {
        let mut way = self
            .all
            .iter()
            .filter(|mount| strip_directory(path, &mount.mount_point).is_some())
            .peekable();
        way.peek().is_some()
            && way.all(|mount| match mount.kind.as_slice() {
                b"overlay" => true,
                kind if MEMORY.contains(&kind) => true,
                kind => DISK.contains(&kind) && self.is_disk(mount.device, depth + 1),
            })
    }
}

fn has_changed(files: &[File]) -> bool {
    let mut fds: Vec<PollFd<'_>> =
        files.iter().map(|file| PollFd::from_borrowed_fd(file.as_fd(), PollFlags::PRI)).collect();
    let at_once = Timespec::default();
    !matches!(rustix::event::poll(&mut fds, Some(&at_once)), Ok(0))
}

fn read(mut file: &File) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let mut text = Vec::new();
    (&mut file).take(mounts::MAX_MOUNTINFO).read_to_end(&mut text)?;
    Ok(text)
}

/// The first of an overlay's directories on the host for which perhaps a process or another
/// machine answers: a FUSE snapshotter, a network. To open a file of such an overlay can mean
/// to wait for them.
pub fn foreign_layer(directories: &[PathBuf]) -> Option<PathBuf> {
    let host = HostMounts::now();
    // The lists have the names of mounts without links. Layers lie next to each other, so
    // that one look-up is enough for them.
    let mut real: HashMap<PathBuf, PathBuf> = HashMap::new();
    let directories: Vec<PathBuf> = directories
        .iter()
        .map(|directory| {
            let Some(all) = directory.ancestors().nth(2) else { return directory.clone() };
            let real = real.entry(all.to_owned()).or_insert_with(|| {
                let held = on_host(all.as_os_str().as_encoded_bytes());
                let name = held.and_then(|held| file::name_of(held.fd.as_fd()));
                name.map_or_else(|_| all.to_owned(), |name| OsString::from_vec(name).into())
            });
            directory.strip_prefix(all).map_or_else(|_| directory.clone(), |rest| real.join(rest))
        })
        .collect();
    host.foreign_layer(&directories, 0).cloned()
}

// ---- look-ups

/// A file that is held by a descriptor with O_PATH.
#[derive(Debug)]
pub struct Held {
    pub fd: OwnedFd,
    pub stat: Stat,
}

impl Held {
    fn new(fd: OwnedFd) -> io::Result<Held> {
        let stat = file::stat(&fd)?;
        Ok(Held { fd, stat })
    }
}

/// A file of the host, by its path.
pub fn on_host(path: &[u8]) -> io::Result<Held> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    match walk(root, None, path, &View::of([]))? {
        Way::Found(held) => Ok(held),
        Way::Foreign(_) | Way::Process(_) => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The result of a look-up.
#[derive(Debug)]
pub enum Way {
    Found(Held),
    /// It ended before a filesystem that must not be asked. The whole path, with links
    /// resolved as far as they were followed.
    Foreign(Vec<u8>),
    /// It ended in `/proc`, whose links lead elsewhere: the rest of the path.
    Process(Vec<Vec<u8>>),
}

/// The directory from which a path is looked up.
#[derive(Debug)]
pub struct Base {
    pub fd: OwnedFd,
    /// Its path below the root of the look-up.
    pub path: Vec<u8>,
}

/// How many symlinks are followed, as in the kernel.
const MOST_LINKS: u32 = 40;
/// How many names are looked up, those of links included.
const MOST_NAMES: u32 = 4096;

/// Looks up a path below a directory for whose filesystem the kernel answers by itself, as
/// [`walk`] does. An error if the path leads to another mount.
pub fn find_on_one_mount(root: &OwnedFd, path: &[u8], _: Local) -> io::Result<Held> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Held::new(rustix::fs::openat2(root, path, flags, Mode::empty(), resolve)?)
}

/// Looks up a path as a process with this root would. A relative path begins at `base`, or
/// at the root without one. Symlinks are followed within the root and never lead out of it.
pub fn walk(root: OwnedFd, base: Option<Base>, path: &[u8], view: &View) -> io::Result<Way> {
    let mut look_up = LookUp::new(root, view)?;
    if !path.starts_with(b"/")
        && let Some(base) = base
    {
        look_up.base = Some((Held::new(base.fd)?, base.path));
    }
    look_up.push(path);
    look_up.run()
}

/// The same, and no symlink is followed: one at the end of the path is found itself, and a path
/// through one leads nowhere.
pub fn walk_exactly(root: OwnedFd, path: &[u8], view: &View) -> io::Result<Way> {
    let mut look_up = LookUp::new(root, view)?;
    look_up.follows = false;
    look_up.push(path);
    look_up.run()
}

/// A look-up in progress.
struct LookUp<'a> {
    view: &'a View,
    /// Whether symlinks are followed.
    follows: bool,
    root: Held,
    /// The way from the base, or from the root without one.
    below: Vec<(Held, Vec<u8>)>,
    base: Option<(Held, Vec<u8>)>,
    /// The names that are still to be looked up, the next one last.
    left: Vec<Vec<u8>>,
    links: u32,
}

impl<'a> LookUp<'a> {
    fn new(root: OwnedFd, view: &'a View) -> io::Result<LookUp<'a>> {
        Ok(LookUp {
            view,
            follows: true,
            root: Held::new(root)?,
            below: Vec::new(),
            base: None,
            left: Vec::new(),
            links: 0,
        })
    }

    fn run(mut self) -> io::Result<Way> {
        for _ in 0..MOST_NAMES {
            if !self.may_ask() {
                return Ok(self.stop());
            }
            let Some(name) = self.left.pop() else { return Ok(self.end()) };
            self.step(name)?;
        }
        Err(Errno::LOOP.into())
    }

    fn here(&self) -> &Held {
        let base = self.base.as_ref().map_or(&self.root, |(base, _)| base);
        self.below.last().map_or(base, |(held, _)| held)
    }

    fn push(&mut self, path: &[u8]) {
        let names = path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
        self.left.extend(names.rev().map(<[u8]>::to_vec));
    }

    /// Whether the current directory may be asked for the next name, and a mount at that name
    /// may be entered.
    fn may_ask(&self) -> bool {
        let Some(next) = self.left.last() else { return true };
        let may_ask = match self.view.ground(&self.here().stat) {
            Ground::Memory | Ground::Disk | Ground::Kernel => true,
            Ground::Process => !is_process(next),
            Ground::Foreign => false,
        };
        // To go back the same way asks no filesystem.
        next == b".." || may_ask && self.view.is_free_of_autofs(|| self.path(1))
    }

    /// The result if the current directory may not be asked.
    fn stop(self) -> Way {
        let ground = self.view.ground(&self.here().stat);
        if ground == Ground::Process {
            return Way::Process(self.left.into_iter().rev().collect());
        }
        Way::Foreign(self.path(self.left.len()))
    }

    /// The path so far, with the next `next` names that are left.
    fn path(&self, next: usize) -> Vec<u8> {
        let mut path = self.base.as_ref().map(|(_, path)| path.clone()).unwrap_or_default();
        let below = self.below.iter().map(|(_, name)| name);
        for name in below.chain(self.left.iter().rev().take(next)) {
            path.push(b'/');
            path.extend(name);
        }
        path
    }

    fn end(mut self) -> Way {
        Way::Found(match self.below.pop() {
            Some((held, _)) => held,
            None => self.base.map_or(self.root, |(base, _)| base),
        })
    }

    fn step(&mut self, name: Vec<u8>) -> io::Result<()> {
        if name == b".." {
            if self.below.pop().is_none()
                && let Some((_, path)) = self.base.take()
            {
                // Above the base: by the base's own path.
                let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
                self.push(&path[..end]);
            }
            return Ok(());
        }
        let held = self.open(&name)?;
        if held.stat.file_type != FileType::Symlink || !self.follows {
            self.below.push((held, name));
            return Ok(());
        }
        self.links += 1;
        if self.links > MOST_LINKS {
            return Err(Errno::LOOP.into());
        }
        // The link lies in the directory that was asked, or is the root of a mount.
        if self.view.ground(&held.stat) == Ground::Foreign {
            self.below.push((held, name));
            return Ok(());
        }
        let target = rustix::fs::readlinkat(&held.fd, c"", Vec::new())?.into_bytes();
        if target.starts_with(b"/") {
            self.below.clear();
            self.base = None;
        }
        self.push(&target);
        Ok(())
    }

    /// Opens a name of the current directory. A filesystem that is mounted there is not
    /// asked.
    fn open(&self, name: &[u8]) -> io::Result<Held> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(&self.here().fd, name, flags, Mode::empty(), resolve)?;
        Held::new(opened)
    }
}

/// Whether this is a directory of procfs whose links lead elsewhere.
fn is_process(name: &[u8]) -> bool {
    name.iter().all(u8::is_ascii_digit) || matches!(name, b"self" | b"thread-self")
}

/// The device of memfds, anonymous memory that only has a descriptor.
pub fn memfd_device() -> Option<u64> {
    static DEVICE: OnceLock<Option<u64>> = OnceLock::new();
    *DEVICE.get_or_init(|| file::memfd_device().ok())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mount(minor: u32, kind: &str) -> Mount {
        Mount {
            id: 7,
            parent: 1,
            device: rustix::fs::makedev(0, minor),
            root: b"/".to_vec(),
            mount_point: b"/m".to_vec(),
            kind: kind.into(),
        }
    }

    #[test]
    fn x01_only_what_the_host_has_mounted_or_memory_holds_answers_by_itself() {
        let host = HostMounts::parse([b"1 0 0:1 / / rw - btrfs /dev/sda rw\n\
            2 1 0:2 / /o rw - overlay o rw\n3 1 0:3 / /f rw - fuse x rw\n\
            4 1 0:4 / /t rw - tmpfs t rw\n5 1 43:0 / /n rw - ext4 /dev/nbd0 rw\n"
            .as_slice()]);
        let check = |minor, kind, expected| {
            assert_eq!(host.ground(&mount(minor, kind)), expected, "{minor} {kind}");
        };
        check(1, "btrfs", Ground::Disk);
        check(2, "overlay", Ground::Disk);
        check(3, "fuse", Ground::Foreign);
        check(4, "tmpfs", Ground::Memory);
        // Only a container has mounted these.
        check(8, "tmpfs", Ground::Memory);
        for kind in ["ext4", "overlay", "squashfs", "fuse", "nfs4", "9p", "autofs", "", "new"] {
            check(8, kind, Ground::Foreign);
        }
        // The device number belongs to another filesystem by now.
        check(1, "fuse", Ground::Foreign);
        check(8, "proc", Ground::Process);
        check(8, "sysfs", Ground::Kernel);
        let network = Mount { device: rustix::fs::makedev(43, 0), ..mount(0, "ext4") };
        assert_eq!(host.ground(&network), Ground::Foreign);
    }

    #[test]
    fn an_overlay_is_as_local_as_its_layers() {
        let host = HostMounts::parse([b"1 0 0:1 / / rw - virtiofs root rw\n\
            2 1 0:2 / /d rw - btrfs /dev/sda rw\n\
            3 2 0:3 / /d/s/2/fs rw - fuse.rawBridge stargz rw\n\
            4 1 0:4 / /n rw - nfs4 server:/n rw\n5 4 0:5 / /n/disk rw - btrfs /dev/sdb rw\n\
            10 1 0:10 / /a rw - overlay o rw,lowerdir=/d/s/1/fs:/host,upperdir=/d/s/9/fs\n\
            11 1 0:11 / /b rw - overlay o rw,lowerdir=1/fs:2/fs,upperdir=/d/s/9/fs\n\
            12 1 0:12 / /c ro - overlay o ro,lowerdir=/d/s/2/fs/x:/d/s/1/fs\n\
            13 1 0:13 / /e rw - overlay o rw,lowerdir=/n/layer,upperdir=/d/u\n\
            14 1 0:14 / /g rw - overlay o rw,lowerdir=/n/disk/layer,upperdir=/d/u\n\
            15 1 0:15 / /h rw - overlay o rw,lowerdir=/b/layer,upperdir=/d/u\n\
            16 1 0:16 / /i rw - overlay o rw,lowerdir=/i/layer,upperdir=/i/u\n"
            .as_slice()]);
        let local = [(10, true), (11, false), (12, false), (13, false), (14, true), (15, false)];
        for (minor, is_local) in local.into_iter().chain([(16, true)]) {
            let expected = if is_local { Ground::Disk } else { Ground::Foreign };
            assert_eq!(host.ground(&mount(minor, "overlay")), expected, "{minor}");
        }
    }

    fn find(root: &Path, base: Option<Base>, path: &str) -> String {
        let root = file::open_directory(root).unwrap();
        match walk(root, base, path.as_bytes(), &View::of([])) {
            Ok(Way::Found(held)) => {
                String::from_utf8(file::name_of(held.fd.as_fd()).unwrap()).unwrap()
            }
            Ok(Way::Foreign(path)) => format!("foreign {}", String::from_utf8(path).unwrap()),
            Ok(Way::Process(rest)) => {
                format!("proc {}", String::from_utf8(rest.join(&b'/')).unwrap())
            }
            Err(err) => err.raw_os_error().unwrap().to_string(),
        }
    }

    #[test]
    fn a_look_up_stays_in_its_root_and_follows_links_as_the_kernel_does() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let at = |name: &str| dir.join(name);
        std::fs::create_dir_all(at("a/b")).unwrap();
        std::fs::write(at("real"), "x").unwrap();
        std::fs::write(at("a/real"), "x").unwrap();
        symlink("/real", at("link")).unwrap();
        symlink("../real", at("a/up")).unwrap();
        symlink("/../../../etc/passwd", at("out")).unwrap();
        symlink("loop", at("loop")).unwrap();
        symlink("a", at("dir")).unwrap();
        let name = |name: &str| at(name).display().to_string();
        for path in ["/real", "real", "link", "/x/../real", "dir/../real", "a/up", "../../real"] {
            let expected =
                if path.starts_with("/x") { libc::ENOENT.to_string() } else { name("real") };
            assert_eq!(find(&dir, None, path), expected, "{path}");
        }
        for path in ["out", "/etc/passwd", "a/none"] {
            assert_eq!(find(&dir, None, path), libc::ENOENT.to_string(), "{path}");
        }
        assert_eq!(find(&dir, None, "loop"), libc::ELOOP.to_string());
        assert_eq!(find(&dir, None, "real/x"), libc::ENOTDIR.to_string());
        assert_eq!(find(&dir, None, "dir/."), name("a"));
        let base = |path: &str| {
            let fd = file::open_directory(at(path)).unwrap();
            Some(Base { fd, path: format!("/{path}").into_bytes() })
        };
        assert_eq!(find(&dir, base("a/b"), "../real"), name("a/real"));
        assert_eq!(find(&dir, base("a/b"), "../../real"), name("real"));
        assert_eq!(find(&dir, base("a"), "up"), name("real"));
        assert_eq!(find(&dir, base("a"), "/real"), name("real"));
        let local = View::of([]).ground(&file::stat_path(&dir).unwrap()).local().unwrap();
        let root = file::open_directory(&dir).unwrap();
        let found = find_on_one_mount(&root, b"a/up", local).unwrap();
        assert_eq!(found.stat, file::stat_path(at("real")).unwrap());
        let read = reopen(found.fd.as_fd(), local).unwrap();
        assert_eq!(file::sniff(read.as_fd()).unwrap(), crate::model::Format::Data);
    }

    #[test]
    fn an_exact_look_up_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a")).unwrap();
        std::fs::write(dir.path().join("a/real"), "x").unwrap();
        symlink("/etc/passwd", dir.path().join("a/link")).unwrap();
        symlink("a", dir.path().join("dir")).unwrap();
        let find = |path: &str| {
            let root = file::open_directory(dir.path()).unwrap();
            match walk_exactly(root, path.as_bytes(), &View::of([])) {
                Ok(Way::Found(held)) => format!("{:?}", held.stat.file_type),
                Ok(other) => format!("{other:?}"),
                Err(err) => err.raw_os_error().unwrap().to_string(),
            }
        };
        assert_eq!(find("/a/real"), "Regular");
        assert_eq!(find("/a/link"), "Symlink");
        assert_eq!(find("/dir/real"), libc::ENOTDIR.to_string());
        assert_eq!(find("/a/link/x"), libc::ENOTDIR.to_string());
        assert_eq!(find("/a/none"), libc::ENOENT.to_string());
    }

    #[test]
    fn links_of_proc_are_not_followed_but_returned() {
        let root = Path::new("/");
        assert_eq!(find(root, None, "/proc/self/fd/9"), "proc self/fd/9");
        assert_eq!(find(root, None, "/proc/self/root/etc/passwd"), "proc self/root/etc/passwd");
        assert_eq!(find(root, None, "/proc/1/cwd"), "proc 1/cwd");
        // Runtimes mount filesystems on such names.
        assert_eq!(find(root, None, "/proc/sys/kernel"), "/proc/sys/kernel");
        assert_eq!(find(root, None, "/proc/net/tcp"), "proc self/net/tcp");
        assert_eq!(find(root, None, "/sys/kernel"), "/sys/kernel");
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        symlink("/proc/self/cwd", dir.join("link")).unwrap();
        let link = dir.join("link/x").display().to_string();
        assert_eq!(find(root, None, &link), "proc self/cwd/x");
    }

    #[test]
    fn the_hosts_list_is_read_again_when_it_has_changed() {
        let before = HostMounts::now();
        assert!(before.all.iter().any(|mount| mount.mount_point == b"/"));
        assert_eq!(before.by_id.len(), HostMounts::now().by_id.len());
    }
}
