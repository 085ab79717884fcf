//! fanotify(7): groups, marks, and our own reader of the event stream.
//!
//! Who owns what: [`Group::read`] makes every descriptor that the kernel put
//! into the buffer an [`OwnedFd`] before it returns, so none can leak or be
//! closed twice. A permission event comes as a [`Permission`], which answers the
//! kernel exactly once: with what its owner says, or with ALLOW when it is
//! dropped. The event's descriptor stays open until after the answer, because
//! the kernel finds the event by that number; a library that closes it earlier
//! answers the wrong event (docs/adr/0003).

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use super::handle::FileHandle;

/// Answers to a permission event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Allow,
    Deny,
}

/// One event's descriptors and facts.
#[derive(Debug, PartialEq, Eq)]
pub struct Event<Fd = OwnedFd> {
    /// The file, opened by the kernel with the group's event flags.
    pub file: Fd,
    /// The process, in our pid namespace; 0 if it is not visible from there.
    pub pid: u32,
    /// The same process as a handle, if the group reports it and it still lived.
    pub pidfd: Option<Fd>,
    pub mask: u64,
}

/// What one read of a group brought.
#[derive(Debug)]
pub enum Incoming<'group> {
    /// A process waits for the answer.
    Permission(Permission<'group>),
    /// Something has happened.
    Notification(Event),
    /// The kernel had to drop events (`FAN_Q_OVERFLOW`).
    Overflow,
}

/// A process waiting for an answer, which it gets exactly once.
#[derive(Debug)]
pub struct Permission<'group> {
    group: &'group Group,
    // `None` only between `answer` taking it and the end of `self`.
    event: Option<Event>,
}

impl Permission<'_> {
    pub fn event(&self) -> &Event {
        self.event.as_ref().expect("only `answer` takes it, and `answer` consumes self")
    }

    /// Answers and hands over the descriptors, which the kernel needs no more.
    pub fn answer(mut self, answer: Answer) -> (Event, io::Result<()>) {
        let event = self.event.take().expect("only `answer` takes it, and `answer` consumes self");
        let written = self.group.respond(event.file.as_fd(), answer);
        (event, written)
    }
}

impl Drop for Permission<'_> {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            // Nothing can be done about a failure here: closing the group, which
            // answers everything, is the owner's decision.
            let _ = self.group.respond(event.file.as_fd(), Answer::Allow);
        }
    }
}

/// What an event in the buffer says, before anyone owns its descriptors.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<Fd> {
    Permission(Event<Fd>),
    Notification(Event<Fd>),
    Overflow,
    /// An event that carries no descriptor: nothing to look at and nothing to answer.
    WithoutFile {
        mask: u64,
    },
}

/// The buffer is not what fanotify(7) says. The kernel never does this; after
/// it, no event boundary in the buffer can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("fanotify's metadata has version {0}, and driftd knows only version 3")]
    Version(u8),
    #[error("a fanotify event says it is {event_len} bytes long where {left} bytes are left")]
    Length { event_len: u32, left: usize },
}

type Metadata = libc::fanotify_event_metadata;
type InfoHeader = libc::fanotify_event_info_header;

// Linux 6.14, and not yet in libc.
const FAN_REPORT_MNT: u32 = 0x4000;
const FAN_MARK_MNTNS: u32 = 0x110;
const FAN_MNT_ATTACH: u64 = 0x0100_0000;
const FAN_MNT_DETACH: u64 = 0x0200_0000;
const FAN_EVENT_INFO_TYPE_MNT: u8 = 7;

const METADATA_LEN: usize = size_of::<Metadata>();
const INFO_HEADER_LEN: usize = size_of::<InfoHeader>();
const PERMISSION_EVENTS: u64 =
    libc::FAN_OPEN_PERM | libc::FAN_ACCESS_PERM | libc::FAN_OPEN_EXEC_PERM;

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

/// Decodes what a read of a group returned.
///
/// Pure: `take_fd` is called once for every descriptor in the buffer, and is the
/// only one to give the numbers a meaning. What was decoded before a malformed
/// event is handed over all the same, because those descriptors are real.
pub fn decode<Fd>(
    bytes: &[u8],
    mut take_fd: impl FnMut(RawFd) -> Fd,
) -> (Vec<Decoded<Fd>>, Result<(), Malformed>) {
    let mut decoded = Vec::with_capacity(bytes.len() / METADATA_LEN);
    let mut rest = bytes;
    while !rest.is_empty() {
        let (Raw { mask, fd, pid, records }, following) = match split_event(rest) {
            Ok(split) => split,
            Err(malformed) => return (decoded, Err(malformed)),
        };
        rest = following;

        // A negative number is FAN_NOFD or an error, never a descriptor.
        let file = (fd >= 0).then(|| take_fd(fd));
        let pidfd = pidfd_record(records).map(&mut take_fd);
        decoded.push(match file {
            _ if mask & libc::FAN_Q_OVERFLOW != 0 => Decoded::Overflow,
            None => Decoded::WithoutFile { mask },
            Some(file) => {
                let event = Event { file, pid, pidfd, mask };
                if mask & PERMISSION_EVENTS == 0 {
                    Decoded::Notification(event)
                } else {
                    Decoded::Permission(event)
                }
            }
        });
    }
    (decoded, Ok(()))
}

/// One event's fixed part, and the records behind it.
struct Raw<'bytes> {
    mask: u64,
    fd: RawFd,
    /// 0 if it is not visible in our pid namespace.
    pid: u32,
    records: &'bytes [u8],
}

/// Takes the first event off a buffer that is not empty.
fn split_event(bytes: &[u8]) -> Result<(Raw<'_>, &[u8]), Malformed> {
    let left = bytes.len();
    let Some(event_len) = bytes_at(bytes, offset_of!(Metadata, event_len)).map(u32::from_ne_bytes)
    else {
        return Err(Malformed::Length { event_len: 0, left });
    };
    let event_len_bytes = event_len as usize;
    if event_len_bytes < METADATA_LEN || event_len_bytes > left {
        return Err(Malformed::Length { event_len, left });
    }
    let (event, following) = bytes.split_at(event_len_bytes);

    let [vers] = bytes_at(event, offset_of!(Metadata, vers)).expect("inside the metadata");
    if vers != libc::FANOTIFY_METADATA_VERSION {
        return Err(Malformed::Version(vers));
    }
    let metadata_len = u16::from_ne_bytes(
        bytes_at(event, offset_of!(Metadata, metadata_len)).expect("inside the metadata"),
    ) as usize;
    if metadata_len < METADATA_LEN || metadata_len > event_len_bytes {
        return Err(Malformed::Length { event_len, left });
    }
    let mask = u64::from_ne_bytes(
        bytes_at(event, offset_of!(Metadata, mask)).expect("inside the metadata"),
    );
    let fd = RawFd::from_ne_bytes(
        bytes_at(event, offset_of!(Metadata, fd)).expect("inside the metadata"),
    );
    let pid = i32::from_ne_bytes(
        bytes_at(event, offset_of!(Metadata, pid)).expect("inside the metadata"),
    );
    let pid = u32::try_from(pid).unwrap_or_default();
    Ok((Raw { mask, fd, pid, records: &event[metadata_len..] }, following))
}

/// What has happened to one name of a marked directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub mask: u64,
    /// Who did it, in our pid namespace; 0 if it is not visible from there.
    pub pid: u32,
    pub directory: FileHandle,
    /// One component; `.` for the directory itself.
    pub name: Box<[u8]>,
}

/// An event of a group that reports directories by handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodedName {
    Named(Named),
    Overflow,
    /// The kernel could not say where it was.
    Nameless {
        mask: u64,
    },
}

/// Decodes what a read of a group that reports handles and names returned. Pure.
pub fn decode_names(bytes: &[u8]) -> (Vec<DecodedName>, Result<(), Malformed>) {
    let mut decoded = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (Raw { mask, pid, records, .. }, following) = match split_event(rest) {
            Ok(split) => split,
            Err(malformed) => return (decoded, Err(malformed)),
        };
        rest = following;
        decoded.push(if mask & libc::FAN_Q_OVERFLOW != 0 {
            DecodedName::Overflow
        } else {
            match name_record(records) {
                Some((directory, name)) => {
                    DecodedName::Named(Named { mask, pid, directory, name: name.into() })
                }
                None => DecodedName::Nameless { mask },
            }
        });
    }
    (decoded, Ok(()))
}

/// The directory's handle and the name in an event's record of both: the
/// filesystem's ID, the handle's length and type, the handle, the name, a zero.
fn name_record(mut records: &[u8]) -> Option<(FileHandle, &[u8])> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == libc::FAN_EVENT_INFO_TYPE_DFID_NAME {
            let at = |offset| bytes_at(record, offset).map(u32::from_ne_bytes);
            let filesystem =
                u64::from(at(INFO_HEADER_LEN)?) | u64::from(at(INFO_HEADER_LEN + 4)?) << 32;
            let length = at(INFO_HEADER_LEN + 8)? as usize;
            let kind = at(INFO_HEADER_LEN + 12)?;
            let rest = record.get(INFO_HEADER_LEN + 16..)?;
            let (handle, name) = rest.split_at_checked(length)?;
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            return Some((FileHandle::new(filesystem, kind, handle), name));
        }
        records = following;
    }
}

/// An event of a group that reports changes of mounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodedMount {
    /// The mount with this unique ID was attached, detached or moved.
    Changed(u64),
    /// The kernel dropped events, or does not name the mount.
    Unnamed,
}

/// Decodes what a read of a group that reports changes of mounts returned. Pure.
pub fn decode_mounts(bytes: &[u8]) -> (Vec<DecodedMount>, Result<(), Malformed>) {
    let mut decoded = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (Raw { records, .. }, following) = match split_event(rest) {
            Ok(split) => split,
            Err(malformed) => return (decoded, Err(malformed)),
        };
        rest = following;
        // An overflow has no record.
        decoded.push(mount_record(records).map_or(DecodedMount::Unnamed, DecodedMount::Changed));
    }
    (decoded, Ok(()))
}

/// The mount in an event's record of it: behind the header and four bytes of padding.
fn mount_record(mut records: &[u8]) -> Option<u64> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == FAN_EVENT_INFO_TYPE_MNT {
            return bytes_at(record, INFO_HEADER_LEN.next_multiple_of(8)).map(u64::from_ne_bytes);
        }
        records = following;
    }
}

/// The first of an event's records: its type, itself, and what follows. One that
/// lies about its length ends the search.
fn split_record(records: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let [info_type] = bytes_at(records, offset_of!(InfoHeader, info_type))?;
    let len: usize = u16::from_ne_bytes(bytes_at(records, offset_of!(InfoHeader, len))?).into();
    if len < INFO_HEADER_LEN || len > records.len() {
        return None;
    }
    let (record, following) = records.split_at(len);
    Some((info_type, record, following))
}

/// The descriptor in an event's pidfd record. Records of other types are
/// skipped by their length.
fn pidfd_record(mut records: &[u8]) -> Option<RawFd> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == libc::FAN_EVENT_INFO_TYPE_PIDFD {
            let pidfd = RawFd::from_ne_bytes(bytes_at(record, INFO_HEADER_LEN)?);
            // FAN_NOPIDFD and FAN_EPIDFD are negative: the process is gone.
            return (pidfd >= 0).then_some(pidfd);
        }
        records = following;
    }
}

/// Where events are read to. fanotify's structs want eight-byte alignment, and
/// 64 KiB holds more than a thousand events.
#[repr(C, align(8))]
pub struct Buffer([u8; 64 * 1024]);

impl Buffer {
    pub fn new() -> Box<Buffer> {
        Box::new(Buffer([0; _]))
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Buffer")
    }
}

/// Why a group could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this kernel has no fanotify (driftd needs CONFIG_FANOTIFY and Linux 5.6 or newer)")]
    Missing,
    #[error(
        "the kernel refuses fanotify to this process: it must be root in the host's user \
         namespace with CAP_SYS_ADMIN (try: sudo driftd run, or systemctl start driftd)"
    )]
    NotPermitted,
    #[error(
        "the kernel cannot ask before a program runs (driftd needs \
         CONFIG_FANOTIFY_ACCESS_PERMISSIONS and Linux 5.0 or newer)"
    )]
    NoPermissionEvents,
    #[error("{}", too_many())]
    TooMany,
    #[error("cannot make a fanotify group: {0}")]
    Other(#[source] io::Error),
}

/// The most groups that a daemon and its gate take together.
pub const GROUPS_OF_A_DAEMON: u64 = 8;

/// How many groups one user may have; `None` before Linux 5.13, where it is 128.
pub fn max_user_groups() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/fs/fanotify/max_user_groups").ok()?.trim().parse().ok()
}

fn too_many() -> String {
    let limit = max_user_groups().unwrap_or(128);
    format!(
        "no more fanotify groups can be made: driftd takes up to {GROUPS_OF_A_DAEMON}, and this \
         user may have {limit} in all, those of containers without a user namespace included \
         (try: sysctl fs.fanotify.max_user_groups={}; driftd doctor reports how many are left; \
         or the limit of open files is reached)",
        limit.saturating_mul(2),
    )
}

/// How many groups can still be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupsLeft {
    pub count: u64,
    /// There are more, which were not counted.
    pub is_more: bool,
}

/// Counts the groups that this user can still make, up to `at_most`. The kernel shows the
/// number nowhere, so they are made and closed at once: for that moment no other process
/// of the user can make one.
pub fn groups_left(at_most: u64) -> Result<GroupsLeft, Error> {
    let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC;
    let mut made = Vec::new();
    for count in 0..at_most {
        match Fanotify::init(flags, EventFFlags::O_CLOEXEC) {
            Ok(group) => made.push(group),
            Err(Errno::EMFILE) => {
                // The same error says that no more files may be open.
                let is_more = std::fs::File::open("/proc/self/stat").is_err();
                return Ok(GroupsLeft { count, is_more });
            }
            Err(errno) => return Err(Error::from_init(errno)),
        }
    }
    Ok(GroupsLeft { count: at_most, is_more: true })
}

/// How many events the kernel keeps for a group that reads more slowly than things
/// happen. Each that waits keeps its file in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    Unlimited,
    /// `fs.fanotify.max_queued_events`; what does not fit is dropped, and
    /// [`Incoming::Overflow`] says so.
    Bounded,
}

/// A fanotify group.
pub struct Group {
    fanotify: Fanotify,
    /// Whether events carry a pidfd (Linux 5.15, or 5.10.220).
    pub reports_pidfd: bool,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group({})", self.fanotify.as_fd().as_raw_fd())
    }
}

impl Group {
    /// A group that is asked before a program runs. It must never hold
    /// notification events too: a permission event that meets a full queue is
    /// allowed in silence, so its queue has no limit.
    pub fn gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, true)
    }

    /// The same, whose events do not bring a handle of the process. The kernel makes
    /// one for every event, and most are not looked at.
    pub fn exec_gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, false)
    }

    /// A group that is told of what has happened.
    pub fn feed(queue: Queue) -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_NOTIF, queue, false)
    }

    /// A group that is told of names and metadata, by a directory's handle and the
    /// name in it (Linux 5.9). Its queue has no limit, so that one container's
    /// flood cannot push out another's events; where the kernel has no memory for
    /// an event it says so, as an overflow.
    pub fn names() -> Result<Group, Error> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::from_bits_retain(libc::FAN_REPORT_DFID_NAME);
        let fanotify = Fanotify::init(flags, EventFFlags::O_CLOEXEC).map_err(Error::from_init)?;
        Ok(Group { fanotify, reports_pidfd: false })
    }

    /// A group that is told of programs that were opened for execution. Nobody waits
    /// for it.
    pub fn exec_feed() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_NOTIF, Queue::Unlimited, false)
    }

    /// A group that is asked before a file is opened, as an overlay does when it
    /// copies one up. The same holds for its queue as for the gate's.
    pub fn copy_up_gate() -> Result<Group, Error> {
        Group::richest(InitFlags::FAN_CLASS_CONTENT, Queue::Unlimited, false)
    }

    /// Tries flags from rich to poor, since versions of kernels do not tell what
    /// was ported back to them.
    fn richest(class: InitFlags, queue: Queue, want_pidfd: bool) -> Result<Group, Error> {
        let queue = match queue {
            Queue::Unlimited => InitFlags::FAN_UNLIMITED_QUEUE,
            Queue::Bounded => InitFlags::empty(),
        };
        let flags = class
            | queue
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_MARKS;
        // O_NONBLOCK: the kernel opens the file for us, and a FIFO opened without
        // it would wait for a writer inside our read.
        let plain = EventFFlags::from_bits_retain(0)
            | EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NONBLOCK;
        let mut refused = Errno::EINVAL;
        for reports_pidfd in [true, false] {
            if reports_pidfd && !want_pidfd {
                continue;
            }
            let pidfd =
                if reports_pidfd { InitFlags::FAN_REPORT_PIDFD } else { InitFlags::empty() };
            for event_flags in [plain | EventFFlags::O_NOATIME, plain] {
                match Fanotify::init(flags | pidfd, event_flags) {
                    Ok(fanotify) => return Ok(Group { fanotify, reports_pidfd }),
                    Err(Errno::EINVAL) => refused = Errno::EINVAL,
                    Err(errno) => return Err(Error::from_init(errno)),
                }
            }
        }
        Err(Error::from_init(refused))
    }

    /// A group that reports mounts that come and go (Linux 6.14). Its queue may
    /// overflow: then any mount may have changed.
    pub(super) fn mounts() -> Result<Group, Error> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::from_bits_retain(FAN_REPORT_MNT);
        let fanotify = Fanotify::init(flags, EventFFlags::O_CLOEXEC).map_err(Error::from_init)?;
        Ok(Group { fanotify, reports_pidfd: false })
    }

    /// Listens to a mount namespace: the file of /proc/PID/ns.
    pub(super) fn mark_mount_namespace(&self, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let path = super::mounts::path_of(namespace);
        self.mark_at(FAN_MARK_MNTNS, FAN_MNT_ATTACH | FAN_MNT_DETACH, Path::new(&path))
    }

    /// Marks what is at `path`, of this `kind`.
    pub(super) fn mark_at(&self, kind: u32, mask: u64, path: &Path) -> io::Result<()> {
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::from_bits_retain(kind),
                MaskFlags::from_bits_retain(mask),
                nix::fcntl::AT_FDCWD,
                Some(path),
            )
            .map_err(io::Error::from)
    }

    /// Marks the whole filesystem that `directory` is on.
    pub fn mark_filesystem(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        // The empty path is not allowed, and "." below an O_PATH descriptor is it.
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM,
                MaskFlags::from_bits_retain(mask),
                directory,
                Some("."),
            )
            .map_err(io::Error::from)
    }

    /// Marks one file of the host, whatever its name will be.
    pub fn mark_host_file(&self, path: &Path, mask: u64) -> io::Result<()> {
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD,
                MaskFlags::from_bits_retain(mask),
                nix::fcntl::AT_FDCWD,
                Some(path),
            )
            .map_err(io::Error::from)
    }

    /// Marks one open directory. Doing so again changes nothing.
    pub fn mark_directory(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.directory_mark(directory, MarkFlags::FAN_MARK_ADD, mask)
    }

    pub fn unmark_directory(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.directory_mark(directory, MarkFlags::FAN_MARK_REMOVE, mask)
    }

    fn directory_mark(
        &self,
        directory: BorrowedFd<'_>,
        action: MarkFlags,
        mask: u64,
    ) -> io::Result<()> {
        self.fanotify
            .mark(
                action | MarkFlags::FAN_MARK_ONLYDIR,
                MaskFlags::from_bits_retain(mask),
                directory,
                Some("."),
            )
            .map_err(io::Error::from)
    }

    /// Reads what has happened to names; `WouldBlock` if nothing has. For a group
    /// that reports names.
    pub fn read_names(&self, buffer: &mut Buffer) -> Result<Vec<DecodedName>, ReadError> {
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode_names(&buffer.0[..read]);
        outcome.map_err(ReadError::Malformed)?;
        Ok(decoded)
    }

    /// Reads which mounts have changed; `WouldBlock` if none has.
    pub(super) fn read_mounts(&self, buffer: &mut Buffer) -> Result<Vec<DecodedMount>, ReadError> {
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode_mounts(&buffer.0[..read]);
        outcome.map_err(ReadError::Malformed)?;
        Ok(decoded)
    }

    /// Reads what is there, at most `bytes` of it; `WouldBlock` if there is
    /// nothing.
    ///
    /// The kernel opens a descriptor (or two) for every event of one read, and
    /// when we have no more to give it, it drops a notification in silence and
    /// *denies* a permission. Whoever reads keeps `bytes` small enough.
    pub fn read<'group>(
        &'group self,
        buffer: &mut Buffer,
        bytes: usize,
    ) -> Result<Vec<Incoming<'group>>, ReadError> {
        let bytes = bytes.min(buffer.0.len());
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..bytes])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode(&buffer.0[..read], |fd| {
            // SAFETY: the kernel has just opened `fd` for us as part of this
            // read; `decode` passes each number once, so this is its one owner.
            unsafe { OwnedFd::from_raw_fd(fd) }
        });
        let incoming = decoded
            .into_iter()
            .filter_map(|decoded| match decoded {
                Decoded::Permission(event) => {
                    Some(Incoming::Permission(Permission { group: self, event: Some(event) }))
                }
                Decoded::Notification(event) => Some(Incoming::Notification(event)),
                Decoded::Overflow => Some(Incoming::Overflow),
                Decoded::WithoutFile { .. } => None,
            })
            .collect();
        outcome.map_err(ReadError::Malformed)?;
        Ok(incoming)
    }

    fn respond(&self, file: BorrowedFd<'_>, answer: Answer) -> io::Result<()> {
        let response = match answer {
            Answer::Allow => libc::FAN_ALLOW,
            Answer::Deny => libc::FAN_DENY,
        };
        // struct fanotify_response: the event's descriptor, then the answer.
        let mut bytes = [0; size_of::<libc::fanotify_response>()];
        bytes[..4].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
        bytes[4..].copy_from_slice(&response.to_ne_bytes());
        rustix::io::retry_on_intr(|| rustix::io::write(&self.fanotify, &bytes))?;
        Ok(())
    }
}

/// Marks on single inodes.
impl Group {
    fn mark_object(&self, flags: MarkFlags, mask: u64, object: BorrowedFd<'_>) -> io::Result<()> {
        // Without a path it is the open file itself.
        let path: Option<&Path> = None;
        self.fanotify
            .mark(flags, MaskFlags::from_bits_retain(mask), object, path)
            .map_err(io::Error::from)
    }

    /// Marks the files directly in an open directory.
    pub fn mark_children(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_ONLYDIR;
        self.mark_object(flags, mask | libc::FAN_EVENT_ON_CHILD, directory)
    }

    pub fn unmark_children(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_REMOVE | MarkFlags::FAN_MARK_ONLYDIR;
        self.mark_object(flags, mask | libc::FAN_EVENT_ON_CHILD, directory)
    }

    /// Marks an open file.
    pub fn mark_file(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.mark_object(MarkFlags::FAN_MARK_ADD, mask, file)
    }

    /// From now on the group is not told `mask` of an open file, until the file is
    /// written to, or [`Group::flush`] takes the marks away, or the kernel has no
    /// more use for the inode, which is not kept in memory for this.
    ///
    /// Sound only for what cannot change in another way than by a write(2), see
    /// docs/adr/0009.
    pub fn ignore(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD
            | MarkFlags::FAN_MARK_IGNORED_MASK
            | MarkFlags::FAN_MARK_EVICTABLE;
        self.mark_object(flags, mask, file)
    }

    /// As [`Group::ignore`], and a write does not end it.
    pub fn ignore_for_good(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD
            | MarkFlags::FAN_MARK_IGNORED_MASK
            | MarkFlags::FAN_MARK_IGNORED_SURV_MODIFY
            | MarkFlags::FAN_MARK_EVICTABLE;
        self.mark_object(flags, mask, file)
    }

    /// Takes every mark on an inode away, those of directories too. Marks on
    /// filesystems and mounts stay.
    pub fn flush(&self) -> io::Result<()> {
        let path: Option<&Path> = None;
        self.fanotify
            .mark(MarkFlags::FAN_MARK_FLUSH, MaskFlags::empty(), nix::fcntl::AT_FDCWD, path)
            .map_err(io::Error::from)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fanotify.as_fd()
    }
}

/// Why events could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read fanotify events: {0}")]
    Os(#[source] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

impl Error {
    /// What another process could not make a group for.
    pub fn from_errno(err: io::Error) -> Error {
        match err.raw_os_error() {
            Some(errno) => Error::from_init(Errno::from_raw(errno)),
            None => Error::Other(err),
        }
    }

    /// The kernel's number for it.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Missing => libc::ENOSYS,
            Error::NotPermitted => libc::EPERM,
            Error::TooMany => libc::EMFILE,
            Error::NoPermissionEvents => libc::EINVAL,
            Error::Other(err) => err.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    fn from_init(errno: Errno) -> Error {
        match errno {
            Errno::ENOSYS => Error::Missing,
            Errno::EPERM => Error::NotPermitted,
            Errno::EMFILE | Errno::ENFILE => Error::TooMany,
            // The permission classes are the only flags that a kernel without
            // them refuses after everything newer was left out.
            errno => Error::Other(errno.into()),
        }
    }
}

/// What this kernel's fanotify offers to this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Events of the gate name the process by a handle, not only by its pid.
    pub pidfd: bool,
    /// Renames, removals and changes of metadata are told as they happen. Without
    /// it only sweeps find them.
    pub names: bool,
}

/// Tries what the watchers need; the error says in words what is missing.
pub fn probe() -> Result<Capabilities, Error> {
    let gate = Group::gate()?;
    // A directory is never opened for execution, so this mark sees nothing.
    match gate.fanotify.mark(
        MarkFlags::FAN_MARK_ADD,
        MaskFlags::FAN_OPEN_EXEC_PERM,
        nix::fcntl::AT_FDCWD,
        Some(Path::new("/")),
    ) {
        Ok(()) => (),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Err(Error::NoPermissionEvents),
        Err(errno) => return Err(Error::Other(errno.into())),
    }
    Group::feed(Queue::Unlimited)?;
    Ok(Capabilities { pidfd: gate.reports_pidfd, names: Group::names().is_ok() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An event as the kernel writes it.
    fn event(mask: u64, fd: i32, pid: i32, records: &[u8]) -> Vec<u8> {
        let len = u32::try_from(METADATA_LEN + records.len()).unwrap();
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.push(libc::FANOTIFY_METADATA_VERSION);
        bytes.push(0);
        bytes.extend(u16::try_from(METADATA_LEN).unwrap().to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(fd.to_ne_bytes());
        bytes.extend(pid.to_ne_bytes());
        bytes.extend(records);
        bytes
    }

    fn record(info_type: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![info_type, 0];
        bytes.extend(u16::try_from(INFO_HEADER_LEN + body.len()).unwrap().to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    fn pidfd(fd: i32) -> Vec<u8> {
        record(libc::FAN_EVENT_INFO_TYPE_PIDFD, &fd.to_ne_bytes())
    }

    #[track_caller]
    fn check(bytes: &[u8], expected: &[Decoded<i32>]) {
        let (decoded, outcome) = decode(bytes, |fd| fd);
        assert_eq!(outcome, Ok(()));
        assert_eq!(decoded, expected);
    }

    #[test]
    fn events_are_told_apart() {
        let exec = libc::FAN_OPEN_EXEC_PERM;
        let written = libc::FAN_CLOSE_WRITE;
        let mut bytes = event(exec, 7, 42, &pidfd(8));
        bytes.extend(event(written, 9, 43, &[]));
        bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
        check(
            &bytes,
            &[
                Decoded::Permission(Event { file: 7, pid: 42, pidfd: Some(8), mask: exec }),
                Decoded::Notification(Event { file: 9, pid: 43, pidfd: None, mask: written }),
                Decoded::Overflow,
            ],
        );
    }

    #[test]
    fn a_process_that_is_gone_has_no_pidfd() {
        for gone in [libc::FAN_NOPIDFD, libc::FAN_EPIDFD] {
            let expected = Event { file: 7, pid: 42, pidfd: None, mask: libc::FAN_OPEN_EXEC_PERM };
            check(
                &event(libc::FAN_OPEN_EXEC_PERM, 7, 42, &pidfd(gone)),
                &[Decoded::Permission(expected)],
            );
        }
    }

    #[test]
    fn unknown_records_are_stepped_over() {
        let mut records = record(200, b"from the future");
        records.extend(pidfd(8));
        let expected = Event { file: 7, pid: 1, pidfd: Some(8), mask: libc::FAN_CLOSE_WRITE };
        check(&event(libc::FAN_CLOSE_WRITE, 7, 1, &records), &[Decoded::Notification(expected)]);
    }

    #[test]
    fn a_name_in_a_record_is_never_taken_for_a_descriptor() {
        // What makes fanotify-rs close descriptors of the process.
        let name = record(2, b"\x01\0\0\0me-0 \x01\0\0\0");
        let (decoded, outcome) =
            decode(&event(libc::FAN_CREATE, libc::FAN_NOFD, 1, &name), |fd| -> () {
                panic!("{fd} is no descriptor")
            });
        assert_eq!((decoded.len(), outcome), (1, Ok(())));
    }

    #[test]
    fn a_truncated_event_is_refused_and_those_before_it_are_kept() {
        let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, 1, &[]);
        bytes.extend(&event(libc::FAN_CLOSE_WRITE, 8, 1, &[])[..20]);
        let (decoded, outcome) = decode(&bytes, |fd| fd);
        assert_eq!(decoded.len(), 1);
        assert_eq!(outcome, Err(Malformed::Length { event_len: 24, left: 20 }));
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, 1, &[]);
        bytes[offset_of!(Metadata, vers)] = 4;
        let (decoded, outcome) = decode(&bytes, |fd| -> () { panic!("{fd} was trusted") });
        assert_eq!((decoded, outcome), (vec![], Err(Malformed::Version(4))));
    }

    /// A record of a directory and a name in it, as the kernel writes it.
    fn named(filesystem: u64, kind: u32, handle: &[u8], name: &[u8]) -> Vec<u8> {
        let halves = [filesystem & u64::from(u32::MAX), filesystem >> 32];
        let mut body: Vec<u8> =
            halves.iter().flat_map(|half| u32::try_from(*half).unwrap().to_ne_bytes()).collect();
        body.extend(u32::try_from(handle.len()).unwrap().to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(handle);
        body.extend(name);
        body.extend(vec![0; 4 - name.len() % 4]);
        record(libc::FAN_EVENT_INFO_TYPE_DFID_NAME, &body)
    }

    #[test]
    fn names_are_told_with_their_directory() {
        let created = libc::FAN_CREATE;
        let records = [pidfd(8), named(1 << 40, 1, b"12345678", b"a\xff\n")].concat();
        let mut bytes = event(created, libc::FAN_NOFD, 42, &records);
        bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
        bytes.extend(event(created, libc::FAN_NOFD, 42, &[]));
        let (decoded, outcome) = decode_names(&bytes);
        assert_eq!(outcome, Ok(()));
        assert_eq!(
            decoded,
            [
                DecodedName::Named(Named {
                    mask: created,
                    pid: 42,
                    directory: FileHandle::new(1 << 40, 1, b"12345678"),
                    name: (*b"a\xff\n").into(),
                }),
                DecodedName::Overflow,
                DecodedName::Nameless { mask: created },
            ]
        );
    }

    #[test]
    fn too_few_groups_are_an_error_with_the_number_and_the_next_step() {
        let limit = max_user_groups().unwrap_or(128);
        let said = Error::from_init(Errno::EMFILE).to_string();
        for part in [
            "up to 8".to_owned(),
            format!("may have {limit} in all"),
            format!("sysctl fs.fanotify.max_user_groups={}", limit * 2),
        ] {
            assert!(said.contains(&part), "{said}");
        }
    }

    #[test]
    fn a_changed_mount_is_known_by_its_unique_id() {
        let mount =
            |id: u64| record(FAN_EVENT_INFO_TYPE_MNT, &[&[0; 4][..], &id.to_ne_bytes()].concat());
        let moved = FAN_MNT_ATTACH | FAN_MNT_DETACH;
        let mut bytes = event(moved, libc::FAN_NOFD, 0, &mount(1 << 40));
        bytes.extend(event(libc::FAN_Q_OVERFLOW, libc::FAN_NOFD, 0, &[]));
        bytes.extend(event(FAN_MNT_ATTACH, libc::FAN_NOFD, 0, &mount(7)[..12]));
        let expected =
            [DecodedMount::Changed(1 << 40), DecodedMount::Unnamed, DecodedMount::Unnamed];
        assert_eq!(decode_mounts(&bytes), (expected.to_vec(), Ok(())));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = decode(&bytes, |fd| fd);
            let _ = decode_names(&bytes);
            let _ = decode_mounts(&bytes);
        }

        #[test]
        fn nearly_valid_names_are_decoded_or_refused(
            mask: u64, filesystem: u64, kind: u32, handle: Vec<u8>, name: Vec<u8>,
            at in 0usize..96, byte: u8,
        ) {
            let mut bytes = event(mask, -1, 1, &named(filesystem, kind, &handle, &name));
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            let (decoded, _) = decode_names(&bytes);
            prop_assert!(decoded.len() <= 1);
        }

        #[test]
        fn every_name_is_told_once(
            names in prop::collection::vec((any::<u64>(), any::<u32>(), any::<[u8; 8]>(), "[a-z.]{1,20}"), 0..50),
        ) {
            let mut bytes = Vec::new();
            for (filesystem, kind, handle, name) in &names {
                let records = named(*filesystem, *kind, handle, name.as_bytes());
                bytes.extend(event(libc::FAN_ATTRIB, -1, 1, &records));
            }
            let expected: Vec<DecodedName> = names
                .iter()
                .map(|(filesystem, kind, handle, name)| DecodedName::Named(Named {
                    mask: libc::FAN_ATTRIB,
                    pid: 1,
                    directory: FileHandle::new(*filesystem, *kind, handle),
                    name: name.as_bytes().into(),
                }))
                .collect();
            prop_assert_eq!(decode_names(&bytes), (expected, Ok(())));
        }

        #[test]
        fn nearly_valid_events_are_decoded_or_refused(
            mask: u64, fd: i32, pid: i32, records: Vec<u8>, at in 0usize..64, byte: u8,
        ) {
            let mut bytes = event(mask, fd, pid, &records);
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            let mut taken = Vec::new();
            let (decoded, _) = decode(&bytes, |fd| taken.push(fd));
            prop_assert!(taken.iter().all(|fd| *fd >= 0));
            prop_assert!(decoded.len() <= 1 && taken.len() <= 2);
        }

        #[test]
        fn every_descriptor_is_taken_once(events in prop::collection::vec((0i32..1000, prop::option::of(0i32..1000)), 0..50)) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (fd, pid_fd) in &events {
                bytes.extend(event(libc::FAN_OPEN_EXEC_PERM, *fd, 1, &pid_fd.map(pidfd).unwrap_or_default()));
                expected.push(*fd);
                expected.extend(*pid_fd);
            }
            let mut taken = Vec::new();
            let (decoded, outcome) = decode(&bytes, |fd| taken.push(fd));
            prop_assert_eq!(outcome, Ok(()));
            prop_assert_eq!(decoded.len(), events.len());
            prop_assert_eq!(taken, expected);
        }
    }
}
