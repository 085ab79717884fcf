//! Files by descriptor: their attributes, their content, and how to open them without
//! following a container's links. A name is resolved once, and then the descriptor is used.
//!
//! `door` decides whether a file may be opened for reading.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::model::{FileTime, FileType, Format};

/// The attributes of an inode (statx(2)).
// The fields are the kernel's, and readers take them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    pub device: u64,
    pub inode: u64,
    /// `None` if the filesystem keeps no birth time.
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
    /// The device of a device node: major and minor.
    pub node: (u32, u32),
    /// The mount through which it was reached; `None` before Linux 5.8.
    pub mount: Option<u64>,
}

impl Stat {
    /// Whether this is a character device 0:0: in an overlay's upper layer it means that a
    /// name of the layers below was removed.
    pub fn is_whiteout_device(&self) -> bool {
        self.file_type == FileType::CharDevice && self.node == (0, 0)
    }

    pub fn is_regular(&self) -> bool {
        self.file_type == FileType::Regular
    }

    /// The time since its last change; `None` if that lies in the future, because clocks
    /// were set.
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

/// Only what the kernel knows already: a filesystem for which a process or another machine
/// answers is not asked for newer values, and nothing is mounted for this call. For local
/// filesystems this makes no difference.
const AS_KNOWN: AtFlags = AtFlags::STATX_DONT_SYNC.union(AtFlags::NO_AUTOMOUNT);

/// The attributes of an open file.
pub fn stat(fd: impl AsFd) -> io::Result<Stat> {
    Ok(rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AS_KNOWN, WANTED)?.into())
}

/// The attributes of a directory's entry; of a symlink itself, not of its target.
pub fn stat_at(directory: impl AsFd, name: impl rustix::path::Arg) -> io::Result<Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AS_KNOWN;
    Ok(rustix::fs::statx(directory, name, flags, WANTED)?.into())
}

/// The attributes of the file at a path of the host or at a link of `/proc/PID`. Follows
/// links: not for paths that a container can choose.
pub fn stat_path(path: impl rustix::path::Arg) -> io::Result<Stat> {
    Ok(rustix::fs::statx(rustix::fs::CWD, path, AS_KNOWN, WANTED)?.into())
}

/// The content of a regular file of the host; an error if it is another kind of file or
/// longer than `limit`.
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

/// Opens a file of the host for reading. Follows links: not for paths that a container can
/// choose.
pub fn open_host_file(path: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Opens a directory of the host, for look-ups below it.
pub fn open_directory(path: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The only way to open what a container may have put there: below `directory`, through no
/// symlink of any kind, and on no other mount.
pub(super) fn beneath(directory: impl AsFd, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let path = if path.is_empty() { b"." } else { path };
    // EAGAIN: a rename elsewhere raced with the look-up. The file may still be there.
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(&directory, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
        {
            Err(Errno::AGAIN) if attempts < 16 => attempts += 1,
            opened => return Ok(opened?),
        }
    }
}

/// Opens a file of any kind, as O_PATH.
pub fn open_path_beneath(directory: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    beneath(directory, path, OFlags::PATH | OFlags::NOFOLLOW)
}

pub fn open_directory_beneath(directory: impl AsFd, path: &[u8]) -> io::Result<OwnedFd> {
    beneath(directory, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
}

/// Opens a file for reading, and returns its attributes. It need not be a regular file (so
/// O_NONBLOCK: a FIFO would wait for a writer), so the caller must check them before it
/// reads.
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

/// The names in an open directory, without `.` and `..`.
pub fn names_in(directory: OwnedFd) -> io::Result<impl Iterator<Item = io::Result<Vec<u8>>>> {
    let entries = rustix::fs::Dir::new(directory)?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_bytes().to_vec()));
    Ok(names.filter(|name| !name.as_ref().is_ok_and(|name| matches!(&name[..], b"." | b".."))))
}

/// The text of a symlink that was opened as O_PATH. Only for a filesystem for which the kernel
/// answers by itself.
pub fn link_target(link: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(link, c"", Vec::new())?.into_bytes())
}

/// How many bytes the filesystem of a directory of the host has left for root.
pub fn free_bytes(directory: &std::path::Path) -> io::Result<u64> {
    let found = rustix::fs::statvfs(directory)?;
    Ok(found.f_bfree.saturating_mul(found.f_frsize))
}

/// Writes everything of the filesystem of an open file to its disk.
pub fn sync_filesystem(file: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::syncfs(file)?)
}

/// The device of memfds. All of them have the same.
pub fn memfd_device() -> io::Result<u64> {
    let memfd = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC)?;
    Ok(stat(&memfd)?.device)
}

/// Whether an open file is kept in memory only. Only for files of filesystems with driftd's
/// marks: this asks the filesystem, and another filesystem may never answer.
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

/// The format of a regular file, by its first bytes, and by the names of its sections if it
/// is an object file. The caller has checked that it is a regular file: a read of another
/// kind could wait for ever.
pub fn sniff(file: BorrowedFd<'_>) -> io::Result<Format> {
    let mut head = [0; ELF64_HEADER];
    let head = read_at(file, &mut head, 0)?;
    Ok(match Format::sniff(&head[..head.len().min(Format::HEAD)]) {
        Format::ElfObject if is_kernel_module(file, head) => Format::KernelModule,
        format => format,
    })
}

/// Reads as many of these bytes as the file has.
fn read_at<'a>(file: BorrowedFd<'_>, bytes: &'a mut [u8], at: u64) -> io::Result<&'a [u8]> {
    let mut filled = 0;
    while filled < bytes.len() {
        let at = at.saturating_add(filled as u64);
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut bytes[filled..], at))? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(&bytes[..filled])
}

const ELF64_HEADER: usize = 64;

/// The section without which the kernel loads no module, whatever the file's name is.
const THIS_MODULE: &[u8] = b".gnu.linkonce.this_module\0";

/// How much of the names of sections is read. A module has a few KiB of them.
const MAX_SECTION_NAMES: u64 = 64 << 10;

/// Whether an object file of this machine's kind is a kernel module. Its offsets may lead
/// nowhere: then the kernel does not load it either.
fn is_kernel_module(file: BorrowedFd<'_>, header: &[u8]) -> bool {
    names_of_sections(file, header)
        .is_some_and(|names| names.windows(THIS_MODULE.len()).any(|name| name == THIS_MODULE))
}

fn names_of_sections(file: BorrowedFd<'_>, header: &[u8]) -> Option<Vec<u8>> {
    const ET_REL: u16 = 1;
    let is_native = *header.get(5)? == if cfg!(target_endian = "big") { 2 } else { 1 };
    let elf = Elf::of(header).filter(|_| is_native && u16_at(header, 16) == Some(ET_REL))?;
    let mut section = [0; ELF64_HEADER];
    let section = read_at(file, &mut section[..elf.section_size], elf.names_section).ok()?;
    let (offset, size) = elf.place(section)?;
    let mut names = vec![0; usize::try_from(size.min(MAX_SECTION_NAMES)).ok()?];
    let length = read_at(file, &mut names, offset).ok()?.len();
    names.truncate(length);
    Some(names)
}

/// The part of an ELF header that leads to the names of the sections.
struct Elf {
    is_64: bool,
    section_size: usize,
    /// Where the header of the section with the names lies.
    names_section: u64,
}

impl Elf {
    fn of(header: &[u8]) -> Option<Elf> {
        let (is_64, section_size, sections, rest) = match header.get(4)? {
            1 => (false, 40, u64::from(u32_at(header, 0x20)?), 0x2e),
            2 => (true, 64, u64_at(header, 0x28)?, 0x3a),
            _ => return None,
        };
        let [size, number, names] = [0, 2, 4].map(|at| u16_at(header, rest + at));
        let (size, number, names) = (size?, number?, names?);
        // The kernel accepts no other values.
        let is_sound = usize::from(size) == section_size && (1..number).contains(&names);
        let names_section = sections.checked_add(u64::from(names) * u64::from(size))?;
        is_sound.then_some(Elf { is_64, section_size, names_section })
    }

    /// Where a section lies in the file, and how long it is.
    fn place(&self, section: &[u8]) -> Option<(u64, u64)> {
        match self.is_64 {
            true => Some((u64_at(section, 0x18)?, u64_at(section, 0x20)?)),
            false => Some((u32_at(section, 0x10)?.into(), u32_at(section, 0x14)?.into())),
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads the part of a regular file that follows `bytes`, at most `most` bytes of it, and
/// appends it. Returns how many bytes were read.
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
    use std::os::unix::ffi::OsStringExt as _;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(link.into_os_string().into_vec())
}

/// Follows a link of the kernel below `/proc/PID`, which leads to a file without any name,
/// and opens the file as O_PATH.
pub(super) fn open_link(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// The path by which a system call reaches the file or directory of a descriptor.
pub(super) fn path_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
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

    /// An object file whose sections have these names.
    fn object(e_type: u8, names: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(64, 0);
        file[16] = e_type;
        let sections = 64 + names.len() as u64;
        file[0x28..0x30].copy_from_slice(&sections.to_ne_bytes());
        // Two sections, the second of which holds the names.
        for (at, value) in [(0x3a, 64_u16), (0x3c, 2), (0x3e, 1)] {
            file[at..at + 2].copy_from_slice(&value.to_ne_bytes());
        }
        file.extend(names);
        let mut section = [0; 128];
        section[64 + 0x18..64 + 0x20].copy_from_slice(&64_u64.to_ne_bytes());
        section[64 + 0x20..64 + 0x28].copy_from_slice(&(names.len() as u64).to_ne_bytes());
        file.extend(section);
        file
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn w18_a_kernel_module_is_known_by_what_the_kernel_looks_for() {
        let check = |bytes: &[u8], expected: Format| {
            let file = tempfile::tempfile().unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
            assert_eq!(sniff(file.as_fd()).unwrap(), expected);
        };
        let module = object(1, b"\0.text\0.rela.gnu.linkonce.this_module\0.modinfo\0");
        check(&module, Format::KernelModule);
        check(&object(1, b"\0.text\0.modinfo\0.gnu.linkonce.this_modules\0"), Format::ElfObject);
        check(&object(1, b"\0.text\0.data\0"), Format::ElfObject);
        check(&object(4, b"\0.gnu.linkonce.this_module\0"), Format::ElfObject);
        check(&object(3, b"\0.gnu.linkonce.this_module\0"), Format::Elf);
        // Whatever the numbers in it are, and wherever it ends.
        let cut = (Format::HEAD..module.len()).map(|length| module[..length].to_vec());
        let odd = (0x20..0x40).chain(module.len() - 64..module.len()).map(|at| {
            let mut bytes = module.clone();
            bytes[at] = 0xff;
            bytes
        });
        for bytes in cut.chain(odd) {
            let file = tempfile::tempfile().unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
            let format = sniff(file.as_fd()).unwrap();
            assert!(matches!(format, Format::ElfObject | Format::KernelModule), "{format:?}");
        }
        // Names of which only some are read.
        let mut long = vec![b'x'; 1 << 20];
        long.extend(THIS_MODULE);
        check(&object(1, &long), Format::ElfObject);
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
