//! Mounts of another process: the kernel's list of them, how to open one without following
//! a link or waiting, and notifications of changes.
//!
//! `door` decides which mounts may be asked, `watch` what is marked.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::fanotify::{Buffer, DecodedMount, Group, ReadError};
use super::file::path_of;
use super::overlay::unescape_octal;
use super::procfs::Handle;

/// A line of `/proc/PID/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    /// The mount on which this one is mounted.
    pub parent: u64,
    /// The device of its superblock.
    pub device: u64,
    /// The directory (or file) of its filesystem that it shows.
    pub root: Vec<u8>,
    /// Its mount point, as the process sees it.
    pub mount_point: Vec<u8>,
    /// The filesystem's type: `ext4`, `fuse.sshfs`.
    pub kind: Vec<u8>,
}

/// How much of a mountinfo is read: a hundred thousand mounts.
pub const MAX_MOUNTINFO: u64 = 16 << 20;

/// Reads a mountinfo. Names are bytes: a container chooses them.
pub fn parse(mountinfo: &[u8]) -> impl Iterator<Item = Mount> {
    parse_lines(mountinfo).map(|(_, mount)| mount)
}

/// The same, each with its line.
pub(super) fn parse_lines(mountinfo: &[u8]) -> impl Iterator<Item = (&[u8], Mount)> {
    // After the last newline there is nothing, or a line that was cut.
    let end = mountinfo.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
    let lines = mountinfo[..end].split(|&byte| byte == b'\n');
    lines.filter_map(|line| Some((line, parse_line(line)?)))
}

/// Finds a mount by its ID, which statx(2) returns for an open file.
pub fn find(mountinfo: &[u8], id: u64) -> Option<Mount> {
    let id = id.to_string();
    find_line(mountinfo, |fields| fields.next() == Some(id.as_bytes()))
}

/// Finds a mount of the filesystem that has this device.
pub fn find_device(mountinfo: &[u8], device: u64) -> Option<Mount> {
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    find_line(mountinfo, |fields| fields.nth(2) == Some(device.as_bytes()))
}

fn find_line<'a>(
    mountinfo: &'a [u8],
    is_it: impl Fn(&mut dyn Iterator<Item = &'a [u8]>) -> bool,
) -> Option<Mount> {
    let mut lines = mountinfo.split(|&byte| byte == b'\n');
    lines.find(|line| is_it(&mut line.split(|&byte| byte == b' '))).and_then(parse_line)
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    // ID, parent, device, root, mount point, options, tags…, "-", type, source, options
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let number = |at: usize| str::from_utf8(fields.get(at)?).ok()?.parse::<u64>().ok();
    let (major, minor) = str::from_utf8(fields.get(2)?).ok()?.split_once(':')?;
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    Some(Mount {
        id: number(0)?,
        parent: number(1)?,
        device: rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?),
        root: unescape_octal(fields.get(3)?),
        mount_point: unescape_octal(fields.get(4)?),
        kind: unescape_octal(fields.get(dash + 1)?),
    })
}

/// Opens what is at `mount_point` below a process's root directory, as O_PATH: through no
/// symlink, and not out of that root. It never waits for a server or a disk, and fails
/// instead (before Linux 5.12 it always fails). Failures are rare, because a mount point and
/// the directories above it are in the kernel's memory.
pub fn reach(root: impl AsFd, mount_point: &[u8]) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::CACHED;
    // No O_NOFOLLOW: it would allow a link as the last name.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root, mount_point, flags, Mode::empty(), resolve)?)
}

/// The ID of the mount through which a descriptor was opened. Unlike statx(2), this asks no
/// filesystem, and so cannot wait for one.
pub fn mount_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    text.split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"mnt_id:"))
        .and_then(|id| str::from_utf8(id).ok()?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The unique ID of an open file's mount, which no other mount ever gets. `None` before Linux
/// 6.8.
pub fn unique_mount_of(fd: BorrowedFd<'_>) -> Option<u64> {
    /// `STATX_MNT_ID_UNIQUE`
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(fd, c"", flags, UNIQUE).ok()?;
    StatxFlags::from_bits_retain(statx.stx_mask).contains(UNIQUE).then_some(statx.stx_mnt_id)
}

/// Where changes of mounts are reported.
#[derive(Debug)]
pub struct Notifier {
    /// `None` on kernels before 6.14: there each process's mountinfo is polled.
    group: Option<Group>,
}

/// How changes of one mount namespace are reported.
#[derive(Debug)]
pub enum Listener {
    /// By the notifier's group, which reports changes of all namespaces. This is the ID of
    /// the namespace. The mark ends with the namespace and does not keep it alive.
    Group(u64),
    /// By polling. The open mountinfo keeps the mount namespace alive: drop this when the
    /// process ends, which its handle reports.
    Poll { mountinfo: File, process: OwnedFd },
}

/// What the notifier's group has reported.
#[derive(Debug, Default)]
pub struct Changes {
    /// Mounts that were attached, detached or moved, by their unique IDs. No ID is used
    /// twice.
    pub mounts: HashSet<u64>,
    /// Any other mount may have changed too.
    pub is_incomplete: bool,
}

/// Bounds of one [`Notifier::take`]: reads, and mounts by their IDs.
const MAX_READS: usize = 64;
const MAX_CHANGES: usize = 16 * 1024;

impl Notifier {
    /// Uses a group if this kernel has it and allows it. An event names a mount but no
    /// namespace, so a group is of use only if the mounts of a namespace can be listed by
    /// the same IDs. Otherwise polling reports as much, and keeps a file open for each
    /// container.
    pub fn new() -> Notifier {
        let can_list = || {
            let own = File::open("/proc/self/ns/mnt")?;
            members_after(namespace_id(own.as_fd())?, 0)
        };
        Notifier { group: Group::mounts().ok().filter(|_| can_list().is_ok()) }
    }

    /// Uses polling, which every kernel has.
    pub fn polling() -> Notifier {
        Notifier { group: None }
    }

    pub fn is_polling(&self) -> bool {
        self.group.is_none()
    }

    /// The group's descriptor, readable when mounts have changed.
    pub fn group(&self) -> Option<BorrowedFd<'_>> {
        self.group.as_ref().map(AsFd::as_fd)
    }

    /// Takes what the group has reported. Bounded, because mounts can change faster than
    /// this reads; the next call takes the rest.
    pub fn take(&self, buffer: &mut Buffer) -> Changes {
        let mut changes = Changes::default();
        let Some(group) = &self.group else { return changes };
        for _ in 0..MAX_READS {
            let events = match group.read_mounts(buffer) {
                Ok(events) => events,
                Err(ReadError::Os(err)) if Errno::from_io_error(&err) == Some(Errno::AGAIN) => {
                    break;
                }
                Err(_) => {
                    changes.is_incomplete = true;
                    break;
                }
            };
            for event in events {
                match event {
                    DecodedMount::Changed(mount) if changes.mounts.len() < MAX_CHANGES => {
                        changes.mounts.insert(mount);
                    }
                    DecodedMount::Changed(_) | DecodedMount::Unnamed => {
                        changes.is_incomplete = true;
                    }
                }
            }
        }
        changes
    }

    /// From now on, changes of the mount namespace of this process are reported.
    pub fn listen(&self, process: &Handle) -> io::Result<Listener> {
        if let Some(group) = &self.group {
            let namespace = process.open_file("ns/mnt")?;
            if let Ok(id) = namespace_id(namespace.as_fd())
                && group.mark_mount_namespace(namespace.as_fd()).is_ok()
            {
                return Ok(Listener::Group(id));
            }
        }
        let mountinfo = process.open_file("mountinfo")?;
        let identity = process.identity();
        let pid = i32::try_from(identity.pid).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        let handle = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
        // The pid may belong to another process by now.
        Handle::open_exactly(identity)?;
        Ok(Listener::Poll { mountinfo, process: handle })
    }
}

/// `_IOR(0xb7, 5, __u64)`: the ID of a mount namespace (Linux 6.11).
const NS_GET_MNTNS_ID: libc::c_ulong = 0x8008_b705;

fn namespace_id(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    let mut id = 0_u64;
    // SAFETY: the kernel writes the eight bytes of `id`, which lives during the call.
    let done = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_MNTNS_ID, &raw mut id) };
    if done == 0 { Ok(id) } else { Err(io::Error::last_os_error()) }
}

/// `struct mnt_id_req` with the namespace (Linux 6.11).
#[repr(C)]
struct ListRequest {
    size: u32,
    spare: u32,
    /// The mount below which to list.
    mount: u64,
    /// The ID after which to continue.
    last: u64,
    namespace: u64,
}

/// The number of listmount(2) on x86-64 and arm64; not yet in libc.
const SYS_LISTMOUNT: libc::c_long = 458;
/// The root of the namespace: lists all of its mounts.
const LSMT_ROOT: u64 = u64::MAX;
/// How many mounts one call lists. The kernel holds its lock of all mounts during a call,
/// and follows each mount up to the root.
const MEMBERS_AT_ONCE: usize = 64;

/// The next mounts of a namespace, by their unique IDs in ascending order: the first IDs that
/// are greater than `last`. Empty if there are no more.
pub fn members_after(namespace: u64, last: u64) -> io::Result<Vec<u64>> {
    let request = ListRequest { size: 32, spare: 0, mount: LSMT_ROOT, last, namespace };
    let mut members = vec![0_u64; MEMBERS_AT_ONCE];
    // SAFETY: `request` is as long as its field `size`, and `members` has room for
    // `MEMBERS_AT_ONCE` IDs, the number in the call; both live during the call.
    let listed = unsafe {
        libc::syscall(
            SYS_LISTMOUNT,
            &raw const request,
            members.as_mut_ptr(),
            MEMBERS_AT_ONCE,
            0_usize,
        )
    };
    let listed = usize::try_from(listed).map_err(|_| io::Error::last_os_error())?;
    members.truncate(listed);
    Ok(members)
}

impl Default for Notifier {
    fn default() -> Notifier {
        Notifier::new()
    }
}

impl Listener {
    /// The descriptors to poll: first for changes, then for the end of the process.
    pub fn poll_fds(&self) -> Option<[PollFd<'_>; 2]> {
        match self {
            Listener::Group(_) => None,
            Listener::Poll { mountinfo, process } => Some([
                PollFd::from_borrowed_fd(mountinfo.as_fd(), PollFlags::PRI),
                PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN),
            ]),
        }
    }
}

impl Group {
    /// Marks the whole filesystem of a descriptor's file.
    pub fn mark_filesystem_of(&self, fd: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.mark_at(libc::FAN_MARK_FILESYSTEM, mask, Path::new(&path_of(fd)))
    }

    /// Marks the mount through which a descriptor was opened.
    pub fn mark_mount_of(&self, fd: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.mark_at(libc::FAN_MARK_MOUNT, mask, Path::new(&path_of(fd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_a_container_chose_are_read_as_bytes() {
        let mountinfo = b"612 611 0:52 / / rw,relatime - overlay overlay rw\n\
            613 612 8:1 /a\\040b /\xff\\134x rw shared:1 master:2 - fuse.x - rw\n\
            garbage\n614 612 0:60 / /cut rw - tmp";
        let mounts: Vec<Mount> = parse(mountinfo).collect();
        assert_eq!(mounts.len(), 2);
        assert_eq!(
            mounts[1],
            Mount {
                id: 613,
                parent: 612,
                device: rustix::fs::makedev(8, 1),
                root: b"/a b".to_vec(),
                mount_point: b"/\xff\\x".to_vec(),
                kind: b"fuse.x".to_vec(),
            }
        );
    }

    #[test]
    fn a_mount_is_reached_through_no_link_and_known_by_its_number() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("here")).unwrap();
        symlink("here", dir.path().join("link")).unwrap();
        symlink("/proc", dir.path().join("out")).unwrap();
        let root = super::super::file::open_directory(dir.path()).unwrap();
        let here = reach(&root, b"/here").unwrap();
        let stat = super::super::file::stat(&here).unwrap();
        assert_eq!(Some(mount_of(here.as_fd()).unwrap()), stat.mount);
        for path in [b"/link".as_slice(), b"/out/self", b"/here/../link"] {
            assert_eq!(reach(&root, path).unwrap_err().raw_os_error(), Some(libc::ELOOP));
        }
        // Not out of the root, however often it is tried.
        let same = reach(&root, b"/../../here").unwrap();
        assert_eq!(super::super::file::stat(&same).unwrap().inode, stat.inode);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_mounts_or_none(mountinfo: Vec<u8>) {
            let _ = parse(&mountinfo).count();
        }
    }
}
