//! Mounts of another process: what /proc says of them, how to reach one without
//! being led astray or made to wait, and how to be told that they change.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::fanotify::{Buffer, DecodedMount, Group, ReadError};
use super::overlay::unescape_octal;
use super::procfs::Handle;

/// A line of /proc/PID/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    pub id: u64,
    /// The mount that this one stands on.
    pub parent: u64,
    /// Of its superblock.
    pub device: u64,
    /// The directory (or file) of its filesystem that it shows.
    pub root: Vec<u8>,
    /// Where, as the process sees it.
    pub mount_point: Vec<u8>,
    /// The filesystem's type: `ext4`, `fuse.sshfs`.
    pub kind: Vec<u8>,
}

/// The most of a mountinfo that is read: a hundred thousand mounts.
pub const MAX_MOUNTINFO: u64 = 16 << 20;

/// Reads a mountinfo. Names are bytes: a container chooses them.
pub fn parse(mountinfo: &[u8]) -> impl Iterator<Item = Mount> {
    parse_lines(mountinfo).map(|(_, mount)| mount)
}

/// The same, each with its line.
pub(super) fn parse_lines(mountinfo: &[u8]) -> impl Iterator<Item = (&[u8], Mount)> {
    // Behind the last newline there is nothing, or a line that was cut.
    let end = mountinfo.iter().rposition(|&byte| byte == b'\n').unwrap_or(0);
    let lines = mountinfo[..end].split(|&byte| byte == b'\n');
    lines.filter_map(|line| Some((line, parse_line(line)?)))
}

/// Finds a mount by its ID, which statx(2) tells of an open file.
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

/// Opens what is at `mount_point` below a process's root directory, only to point
/// at it: through no symlink, and not out of that root. It never waits, neither for a
/// server nor for a disk, and fails instead (Linux 5.12; always before). A mount point and
/// all above it are in the kernel's memory, so that this is rare.
pub fn reach(root: impl AsFd, mount_point: &[u8]) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::CACHED;
    // Without O_NOFOLLOW, which would allow a link as the last part.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root, mount_point, flags, Mode::empty(), resolve)?)
}

/// Through which mount a descriptor was opened. Asks no filesystem, as statx(2)
/// would, and so cannot wait for one.
pub fn mount_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let text = std::fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    text.split(|&byte| byte == b'\n')
        .find_map(|line| line.strip_prefix(b"mnt_id:"))
        .and_then(|id| str::from_utf8(id).ok()?.trim().parse().ok())
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The number of an open file's mount that no other mount ever gets. `None` before
/// Linux 6.8.
pub fn unique_mount_of(fd: BorrowedFd<'_>) -> Option<u64> {
    /// `STATX_MNT_ID_UNIQUE`
    const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let statx = rustix::fs::statx(fd, c"", flags, UNIQUE).ok()?;
    StatxFlags::from_bits_retain(statx.stx_mask).contains(UNIQUE).then_some(statx.stx_mnt_id)
}

/// The path by which a system call reaches what a descriptor points at, be it a
/// directory or a file.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Where changes of mounts are reported.
#[derive(Debug)]
pub struct Notifier {
    /// `None` on kernels before 6.14: there each process's mountinfo is polled.
    group: Option<Group>,
}

/// By what a change of one mount namespace is reported.
#[derive(Debug)]
pub enum Listener {
    /// The notifier's group, which reports changes of all namespaces; this one has this
    /// ID. The mark goes with the namespace and keeps nothing alive.
    Group(u64),
    /// An open mountinfo keeps the mount namespace alive: to be dropped when the
    /// process ends, which its handle reports.
    Poll { mountinfo: File, process: OwnedFd },
}

/// What the notifier's group has reported.
#[derive(Debug, Default)]
pub struct Changes {
    /// Mounts that came, went or moved, by their unique IDs. None is used twice.
    pub mounts: HashSet<u64>,
    /// Any other mount may have changed too.
    pub is_incomplete: bool,
}

/// One taking of the group's events: so many reads, and so many mounts by name.
const MAX_READS: usize = 64;
const MAX_CHANGES: usize = 16 * 1024;

impl Notifier {
    /// Uses what this kernel has and allows. An event names a mount and no namespace, so
    /// a group serves only where a namespace's mounts can be listed by the same IDs.
    /// Polling reports as much, and keeps a file open for each container.
    pub fn new() -> Notifier {
        let can_list = || {
            let own = File::open("/proc/self/ns/mnt")?;
            members_after(namespace_id(own.as_fd())?, 0)
        };
        Notifier { group: Group::mounts().ok().filter(|_| can_list().is_ok()) }
    }

    /// Uses what every kernel has.
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

    /// Takes what the group has reported. Bounded, because mounts may come faster than
    /// this: the rest is taken the next time.
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
        // The pid may be another's by now.
        Handle::open_exactly(identity)?;
        Ok(Listener::Poll { mountinfo, process: handle })
    }
}

/// `_IOR(0xb7, 5, __u64)`: the ID of a mount namespace (Linux 6.11).
const NS_GET_MNTNS_ID: libc::c_ulong = 0x8008_b705;

fn namespace_id(namespace: BorrowedFd<'_>) -> io::Result<u64> {
    let mut id = 0_u64;
    // SAFETY: the kernel writes eight bytes to `id`, which lives during the call.
    let done = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_MNTNS_ID, &raw mut id) };
    if done == 0 { Ok(id) } else { Err(io::Error::last_os_error()) }
}

/// `struct mnt_id_req` with the namespace (Linux 6.11).
#[repr(C)]
struct ListRequest {
    size: u32,
    spare: u32,
    /// Of the mount below which to list.
    mount: u64,
    /// Behind which ID to go on.
    last: u64,
    namespace: u64,
}

/// The number of listmount(2) on x86-64 and arm64; not yet in libc.
const SYS_LISTMOUNT: libc::c_long = 458;
/// The root of the namespace, and so all of it.
const LSMT_ROOT: u64 = u64::MAX;
/// The kernel holds its lock of all mounts during a call, and walks to the root for each.
const MEMBERS_AT_ONCE: usize = 64;

/// Some of a namespace's mounts, by their unique IDs in ascending order: the first ones
/// that are greater than `last`. None: there are no more.
pub fn members_after(namespace: u64, last: u64) -> io::Result<Vec<u64>> {
    let request = ListRequest { size: 32, spare: 0, mount: LSMT_ROOT, last, namespace };
    let mut members = vec![0_u64; MEMBERS_AT_ONCE];
    // SAFETY: `request` is as long as it says, and `members` has room for as many IDs as
    // the call says; both live during the call.
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
    /// What to poll: changes first, then the process's end.
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
    /// Marks everything on the filesystem that a descriptor points into.
    pub fn mark_filesystem_of(&self, fd: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.mark_at(libc::FAN_MARK_FILESYSTEM, mask, Path::new(&path_of(fd)))
    }

    /// Marks what is reached through the mount that a descriptor was opened through.
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
