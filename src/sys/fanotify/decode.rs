//! Decodes the events that fanotify(7) writes into a buffer. Pure: bytes in, values out.
//!
//! Events carry a descriptor of the file, or a directory's handle and a name, or a mount,
//! depending on the group.

use std::mem::offset_of;
use std::os::fd::{OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

use crate::sys::handle::FileHandle;

/// One event of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Event<Fd = OwnedFd> {
    /// The file, opened by the kernel with the group's event flags.
    pub file: Fd,
    /// The process, in driftd's pid namespace; 0 if it is not visible there.
    pub pid: u32,
    /// The same process as a handle, if the group reports it and the process still existed.
    pub pidfd: Option<Fd>,
    pub mask: u64,
    /// What is about to be read, in an event before a read.
    pub range: Option<Range>,
}

/// A part of a file. The kernel widens it to whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    pub offset: u64,
    pub length: u64,
}

impl Range {
    /// Whether this is the file's beginning and no more than the smallest page: a dynamic
    /// linker reads the header of a library so.
    pub fn is_head(self) -> bool {
        self.offset == 0 && self.length <= 4096
    }
}

/// An event in the buffer, before its descriptors are owned.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded<Fd> {
    Permission(Event<Fd>),
    Notification(Event<Fd>),
    Overflow,
    /// An event without a descriptor: it names no file, and needs no answer.
    WithoutFile {
        mask: u64,
    },
}

/// The buffer does not follow fanotify(7). The kernel never writes such a buffer; after the
/// error, the limits of the events in the buffer are not known any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("fanotify's metadata has version {0}, and driftd knows only version 3")]
    Version(u8),
    #[error("a fanotify event has a length of {event_len} bytes, and {left} bytes are left")]
    Length { event_len: u32, left: usize },
}

type Metadata = libc::fanotify_event_metadata;
type InfoHeader = libc::fanotify_event_info_header;

// Linux 6.14, and not yet in libc.
const FAN_EVENT_INFO_TYPE_RANGE: u8 = 6;
const FAN_EVENT_INFO_TYPE_MNT: u8 = 7;

/// A file is about to be read (Linux 6.14, and not yet in libc).
pub const FAN_PRE_ACCESS: u64 = 0x0010_0000;

const METADATA_LEN: usize = size_of::<Metadata>();
const INFO_HEADER_LEN: usize = size_of::<InfoHeader>();
const PERMISSION_EVENTS: u64 =
    libc::FAN_OPEN_PERM | libc::FAN_ACCESS_PERM | libc::FAN_OPEN_EXEC_PERM | FAN_PRE_ACCESS;

fn bytes_at<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk::<N>().copied()
}

/// Decodes the events of a group that reports files.
///
/// `take_fd` is called once for every descriptor in the buffer. What was decoded before a
/// malformed event is returned too, because those descriptors are open.
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
                let event = Event { file, pid, pidfd, mask, range: range_record(records) };
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

/// One event's fixed part, and the records after it.
struct Raw<'bytes> {
    mask: u64,
    fd: RawFd,
    /// 0 if it is not visible in driftd's pid namespace.
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

/// A change of one name in a marked directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub mask: u64,
    /// The acting process, in driftd's pid namespace; 0 if it is not visible there.
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
    /// The kernel could not name the place.
    Nameless {
        mask: u64,
    },
}

/// Decodes the events of a group that reports handles and names.
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

/// The directory's handle and the name in an event. Their record has the filesystem's ID,
/// the handle's length and type, the handle, the name, and a zero byte.
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

/// Decodes the events of a group that reports changes of mounts.
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

/// The mount in an event. Its record has a header, four bytes of padding, and the ID.
fn mount_record(mut records: &[u8]) -> Option<u64> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == FAN_EVENT_INFO_TYPE_MNT {
            return bytes_at(record, INFO_HEADER_LEN.next_multiple_of(8)).map(u64::from_ne_bytes);
        }
        records = following;
    }
}

/// The first of an event's records: its type, its bytes, and the rest. A record with a wrong
/// length ends the search.
fn split_record(records: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let [info_type] = bytes_at(records, offset_of!(InfoHeader, info_type))?;
    let len: usize = u16::from_ne_bytes(bytes_at(records, offset_of!(InfoHeader, len))?).into();
    if len < INFO_HEADER_LEN || len > records.len() {
        return None;
    }
    let (record, following) = records.split_at(len);
    Some((info_type, record, following))
}

/// The part of the file in an event before a read. Its record has a header, four bytes of
/// padding, the offset, and the length.
fn range_record(mut records: &[u8]) -> Option<Range> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == FAN_EVENT_INFO_TYPE_RANGE {
            let at = |offset| bytes_at(record, offset).map(u64::from_ne_bytes);
            let start = INFO_HEADER_LEN.next_multiple_of(8);
            return Some(Range { offset: at(start)?, length: at(start + 8)? });
        }
        records = following;
    }
}

/// The descriptor in an event's pidfd record. Records of other types are skipped.
fn pidfd_record(mut records: &[u8]) -> Option<RawFd> {
    loop {
        let (info_type, record, following) = split_record(records)?;
        if info_type == libc::FAN_EVENT_INFO_TYPE_PIDFD {
            let pidfd = RawFd::from_ne_bytes(bytes_at(record, INFO_HEADER_LEN)?);
            // FAN_NOPIDFD and FAN_EPIDFD are negative: the process has ended.
            return (pidfd >= 0).then_some(pidfd);
        }
        records = following;
    }
}

#[cfg(test)]
mod tests;
