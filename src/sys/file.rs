//! Files by descriptor: what they are, what they hold, how to open them without
//! being led astray. Never by name twice.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::model::{FileTime, FileType, Format};

/// What statx(2) says of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    pub device: u64,
    pub inode: u64,
    /// `None` where the filesystem keeps no birth time.
    pub born: Option<FileTime>,
    pub changed: FileTime,
    pub modified: FileTime,
    pub file_type: FileType,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub links: u32,
    /// What a device node stands for: major and minor.
    pub node: (u32, u32),
    /// Which mount it was reached through; `None` before Linux 5.8.
    pub mount: Option<u64>,
}

impl Stat {
    /// A character device 0:0 is how an overlay's upper layer says that a name
    /// of the layers below is gone.
    pub fn is_whiteout_device(&self) -> bool {
        self.file_type == FileType::CharDevice && self.node == (0, 0)
    }

    pub fn is_regular(&self) -> bool {
        self.file_type == FileType::Regular
    }

    /// For how long nothing of it has changed; `None` if its last change lies ahead, as
    /// clocks go.
    pub fn age(&self) -> Option<Duration> {
        let seconds = u64::try_from(self.changed.seconds).unwrap_or(0);
        let changed = UNIX_EPOCH + Duration::new(seconds, self.changed.nanoseconds);
        SystemTime::now().duration_since(changed).ok()
    }
}

impl From<Statx> for Stat {
    fn from(statx: Statx) -> Stat {
        let time = |time: rustix::fs::StatxTimestamp| FileTime {
            seconds: time.tv_sec,
            nanoseconds: time.tv_nsec,
        };
        let known = StatxFlags::from_bits_retain(statx.stx_mask);
        let mode = u32::from(statx.stx_mode);
        Stat {
            device: rustix::fs::makedev(statx.stx_dev_major, statx.stx_dev_minor),
            inode: statx.stx_ino,
            born: known.contains(StatxFlags::BTIME).then(|| time(statx.stx_btime)),
            changed: time(statx.stx_ctime),
            modified: time(statx.stx_mtime),
            file_type: match rustix::fs::FileType::from_raw_mode(mode) {
                rustix::fs::FileType::RegularFile => FileType::Regular,
                rustix::fs::FileType::Directory => FileType::Directory,
                rustix::fs::FileType::Symlink => FileType::Symlink,
                rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
                rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
                rustix::fs::FileType::Fifo => FileType::Fifo,
                // statx knows no eighth type.
                rustix::fs::FileType::Socket | rustix::fs::FileType::Unknown => FileType::Socket,
            },
            mode: mode & 0o7777,
            uid: statx.stx_uid,
            gid: statx.stx_gid,
            size: statx.stx_size,
            links: statx.stx_nlink,
            node: (statx.stx_rdev_major, statx.stx_rdev_minor),
            mount: known.contains(StatxFlags::MNT_ID).then_some(statx.stx_mnt_id),
        }
    }
}

const WANTED: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

/// What the kernel knows by itself: a filesystem for which a process or another machine
/// answers is not asked for newer values, and nothing is mounted for us. To the
/// filesystems of this machine that makes no difference.
const AS_KNOWN: AtFlags = AtFlags::STATX_DONT_SYNC.union(AtFlags::NO_AUTOMOUNT);

/// What an open file is.
pub fn stat(fd: impl AsFd) -> io::Result<Stat> {
    Ok(rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AS_KNOWN, WANTED)?.into())
}

/// What a directory's entry is; a symlink itself, not its target.
pub fn stat_at(directory: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AS_KNOWN;
    Ok(rustix::fs::statx(directory, name, flags, WANTED)?.into())
}

/// What a path of the host leads to, links followed; or a link of /proc/PID. Not for
/// paths that a container can choose.
pub fn stat_path(path: impl rustix::path::Arg) -> io::Result<Stat> {
    Ok(rustix::fs::statx(rustix::fs::CWD, path, AS_KNOWN, WANTED)?.into())
}

/// What a regular file of the host's holds; an error if it is another kind of file or
/// longer than that.
pub fn read_regular(path: &std::path::Path, limit: u64) -> io::Result<Vec<u8>> {
    use std::io::Read as _;
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    if !stat(&file)?.is_regular() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file).take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Opens a file of the host's for reading, links followed. Not for paths that a container
/// can choose.
pub fn open_host_file(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a directory of the host, as a place to look below.
pub fn open_directory(path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The one way to open what a container may have put there: below `directory`,
/// through no symlink of any kind, onto no other mount.
pub(super) fn beneath(directory: impl AsFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let path = if path.is_empty() { b"." } else { path };
    // EAGAIN: a rename elsewhere raced with the look-up, which proves nothing.
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(&directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
        {
            Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
            opened => return Ok(opened?),
        }
    }
}

/// Opens whatever is there, only to ask what it is.
pub fn open_path_beneath(directory: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    beneath(directory, path, OFlags::PATH | OFlags::NOFOLLOW)
}

pub fn open_directory_beneath(directory: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    beneath(directory, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
}

/// Opens a file for reading and says what it is. It need not be a regular file:
/// without O_NONBLOCK a FIFO would wait for a writer, so what was opened must be
/// looked at before it is read.
pub fn open_file_beneath(directory: impl AsFd, path: &[u8]) -> io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let fd = match beneath(&directory, path, flags | OFlags::NOATIME) {
        // O_NOATIME is for a file's owner and CAP_FOWNER.
        Err(err) if err.raw_os_error() == Some(Errno::PERM.raw_os_error()) => {
            beneath(directory, path, flags)?
        }
        opened => opened?,
    };
    let stat = stat(&fd)?;
    Ok((fd, stat))
}

/// The device of every memfd. The kernel has one for all of them.
pub fn memfd_device() -> io::Result<u64> {
    let memfd = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(stat(&memfd)?.device)
}

/// Whether an open file is kept in memory only. For files of filesystems that carry our
/// marks: to others this is a question, which nobody may answer.
pub fn is_in_memory(fd: impl AsFd) -> io::Result<bool> {
    const TMPFS: u32 = 0x0102_1994;
    const RAMFS: u32 = 0x8584_58f6;
    const HUGETLBFS: u32 = 0x9584_58f6;
    let magic = rustix::fs::fstatfs(fd)?.f_type;
    Ok(u32::try_from(magic).is_ok_and(|magic| [TMPFS, RAMFS, HUGETLBFS].contains(&magic)))
}

/// An extended attribute; `None` if there is none or the filesystem has none.
pub fn xattr(fd: impl AsFd, name: &str) -> io::Result<Option<Box<[u8]>>> {
    // Longer than any `security.capability` (24 bytes) and any redirect (a path).
    let mut value = [0_u8; 4096];
    match rustix::fs::fgetxattr(fd, name, &mut value[..]) {
        Ok(len) => Ok(Some(value[..len].into())),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// The first bytes of a regular file, judged. The caller has looked: reading
/// anything else could wait for ever.
pub fn sniff(file: BorrowedFd<'_>) -> io::Result<Format> {
    let mut head = [0; Format::HEAD];
    let mut filled = 0;
    while filled < head.len() {
        let offset = filled as u64;
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut head[filled..], offset))? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(Format::sniff(&head[..filled]))
}

/// Reads what comes behind `bytes` in a regular file, at most that much, and adds it;
/// how much that was.
pub fn read_on(file: BorrowedFd<'_>, bytes: &mut Vec<u8>, most: usize) -> io::Result<usize> {
    let begin = bytes.len();
    bytes.resize(begin + most, 0);
    let offset = begin as u64;
    let read = rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut bytes[begin..], offset));
    bytes.truncate(begin + *read.as_ref().unwrap_or(&0));
    Ok(read?)
}

/// Where an open file is, or was when it had its last name.
pub fn name_of(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let mut name = link_of(fd)?;
    if name.ends_with(DELETED) && stat(fd)?.links == 0 {
        // Asked again: what was read before may have been a name that ended so.
        name = link_of(fd)?;
        name.truncate(name.strip_suffix(DELETED).map_or(name.len(), <[u8]>::len));
    }
    Ok(name)
}

/// What the kernel adds to the name of a file that was removed.
pub const DELETED: &[u8] = b" (deleted)";

/// The link of /proc/self/fd.
fn link_of(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::ffi::OsStringExt as _;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string().into_vec())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_fifo_named_like_a_program_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("ls");
        nix::unistd::mkfifo(&name, nix::sys::stat::Mode::from_bits_truncate(0o755)).unwrap();
        let root = open_directory(dir.path()).unwrap();
        let (_, stat) = open_file_beneath(&root, b"ls").unwrap();
        assert_eq!(stat.file_type, FileType::Fifo);
    }

    #[test]
    fn a_removed_file_keeps_the_name_it_had_and_no_other_loses_part_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        for name in ["ls", "ls (deleted)"] {
            let path = dir.join(name);
            let file = std::fs::File::create(&path).unwrap();
            let expected = path.as_os_str().as_encoded_bytes();
            assert_eq!(name_of(file.as_fd()).unwrap(), expected);
            std::fs::remove_file(&path).unwrap();
            assert_eq!(name_of(file.as_fd()).unwrap(), expected);
        }
    }

    #[test]
    fn no_symlink_leads_out_or_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/", dir.path().join("root")).unwrap();
        symlink("here", dir.path().join("link")).unwrap();
        std::fs::write(dir.path().join("here"), "x").unwrap();
        let root = open_directory(dir.path()).unwrap();
        for path in [b"root/etc/passwd".as_slice(), b"root", b"link", b"../etc", b"/etc/passwd"] {
            let err = open_file_beneath(&root, path).unwrap_err();
            assert!(matches!(err.raw_os_error(), Some(libc::ELOOP | libc::EXDEV)), "{err}");
        }
        assert!(open_file_beneath(&root, b"here").unwrap().1.is_regular());
    }
}
