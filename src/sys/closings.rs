//! Which files in marked directories were executed, and which were closed by their last
//! writer: a descriptor, or a mapping that has outlived it.
//!
//! A fanotify group that names files by their handles (Linux 5.1). In a directory of an
//! overlay's upper layer, the events are those of the files that the overlay opens there,
//! and the event of closing comes when the last mapping ends (Linux 6.5).

use std::fmt;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use super::handle::FileHandle;

/// An event of a file, in the order of the kernel's queue. The kernel merges events of the
/// same process and file, as long as they are not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Happened {
    To {
        file: FileHandle,
        /// The acting process, in driftd's pid namespace.
        pid: u32,
        executed: bool,
        closed: bool,
    },
    /// An event that cannot be decoded, or an overflow: any file may be concerned.
    Unknown,
}

pub struct Closings {
    fanotify: Fanotify,
}

impl fmt::Debug for Closings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closings")
    }
}

impl AsFd for Closings {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fanotify.as_fd()
    }
}

const MASK: u64 = libc::FAN_CLOSE_WRITE | libc::FAN_OPEN_EXEC;

/// The bytes of one read: some hundred events.
pub const READ_BYTES: usize = 16 * 1024;

impl Closings {
    pub fn new() -> io::Result<Closings> {
        let flags = InitFlags::FAN_CLASS_NOTIF
            | InitFlags::FAN_CLOEXEC
            | InitFlags::FAN_NONBLOCK
            | InitFlags::FAN_UNLIMITED_QUEUE
            | InitFlags::FAN_UNLIMITED_MARKS
            | InitFlags::from_bits_retain(libc::FAN_REPORT_FID);
        Ok(Closings { fanotify: Fanotify::init(flags, EventFFlags::O_CLOEXEC)? })
    }

    /// From now on, the files in an open directory are reported.
    pub fn mark(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        self.change(directory, MarkFlags::FAN_MARK_ADD)
    }

    pub fn unmark(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        self.change(directory, MarkFlags::FAN_MARK_REMOVE)
    }

    fn change(&self, directory: BorrowedFd<'_>, action: MarkFlags) -> io::Result<()> {
        let mask = MaskFlags::from_bits_retain(MASK | libc::FAN_EVENT_ON_CHILD);
        let flags = action | MarkFlags::FAN_MARK_ONLYDIR;
        Ok(self.fanotify.mark(flags, mask, directory, Some("."))?)
    }

    /// From now on, an open file is reported, whatever its name and directory are. The mark ends
    /// with the file.
    pub fn mark_file(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let mask = MaskFlags::from_bits_retain(MASK);
        Ok(self.fanotify.mark(MarkFlags::FAN_MARK_ADD, mask, file, None::<&str>)?)
    }

    /// The same, for as long as the kernel keeps the file in memory (Linux 5.19).
    pub fn mark_file_loosely(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let mask = MaskFlags::from_bits_retain(MASK);
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_EVICTABLE;
        match self.fanotify.mark(flags, mask, file, None::<&str>) {
            // It has a mark that lasts longer.
            Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// Reads the events that are there, at most as many as the buffer holds; `WouldBlock` if
    /// there are none.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<Vec<Happened>> {
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.fanotify, &mut *buffer))?;
        Ok(decode(&buffer[..read]))
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// Decodes the bytes of a read. Pure.
fn decode(mut bytes: &[u8]) -> Vec<Happened> {
    let mut happened = Vec::new();
    while !bytes.is_empty() {
        let length = u32_at(bytes, offset_of!(libc::fanotify_event_metadata, event_len));
        let Some((event, rest)) = length.and_then(|length| bytes.split_at_checked(length as usize))
        else {
            happened.push(Happened::Unknown);
            break;
        };
        if event.is_empty() {
            happened.push(Happened::Unknown);
            break;
        }
        happened.push(decode_one(event).unwrap_or(Happened::Unknown));
        bytes = rest;
    }
    happened
}

/// Decodes one event. After it comes one record: its type, its length, the filesystem's
/// number, the handle's length and type, and the handle.
fn decode_one(event: &[u8]) -> Option<Happened> {
    type Metadata = libc::fanotify_event_metadata;
    if *event.get(offset_of!(Metadata, vers))? != libc::FANOTIFY_METADATA_VERSION {
        return None;
    }
    let mask = *event.get(offset_of!(Metadata, mask)..)?.first_chunk()?;
    let mask = u64::from_ne_bytes(mask);
    let metadata_len = *event.get(offset_of!(Metadata, metadata_len)..)?.first_chunk()?;
    let record = event.get(usize::from(u16::from_ne_bytes(metadata_len))..)?;
    if mask & libc::FAN_Q_OVERFLOW != 0 || *record.first()? != libc::FAN_EVENT_INFO_TYPE_FID {
        return None;
    }
    let filesystem = u64::from(u32_at(record, 4)?) | u64::from(u32_at(record, 8)?) << 32;
    let handle = record.get(20..)?.get(..u32_at(record, 12)? as usize)?;
    Some(Happened::To {
        file: FileHandle::new(filesystem, u32_at(record, 16)?, handle),
        pid: u32_at(event, offset_of!(Metadata, pid))?,
        executed: mask & libc::FAN_OPEN_EXEC != 0,
        closed: mask & libc::FAN_CLOSE_WRITE != 0,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(mask: u64, pid: i32, record: &[u8]) -> Vec<u8> {
        let length = u32::try_from(24 + record.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend([libc::FANOTIFY_METADATA_VERSION, 0]);
        bytes.extend(24_u16.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend((-1_i32).to_ne_bytes());
        bytes.extend(pid.to_ne_bytes());
        bytes.extend(record);
        bytes
    }

    fn record(handle: &[u8]) -> Vec<u8> {
        let length = u16::try_from(20 + handle.len()).unwrap();
        let mut bytes = vec![libc::FAN_EVENT_INFO_TYPE_FID, 0];
        bytes.extend(length.to_ne_bytes());
        bytes.extend(0x0000_0002_0000_0001_u64.to_ne_bytes());
        bytes.extend(u32::try_from(handle.len()).unwrap().to_ne_bytes());
        bytes.extend(1_u32.to_ne_bytes());
        bytes.extend(handle);
        bytes
    }

    #[test]
    fn files_are_named_by_their_handles() {
        let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, &record(b"abcd"));
        bytes.extend(event(libc::FAN_OPEN_EXEC, 8, &record(b"abcd")));
        bytes.extend(event(libc::FAN_Q_OVERFLOW, 0, &[]));
        let file = FileHandle::new(0x0000_0002_0000_0001, 1, b"abcd");
        let to = |pid, executed, closed| Happened::To { file: file.clone(), pid, executed, closed };
        let expected = [to(7, false, true), to(8, true, false), Happened::Unknown];
        assert_eq!(decode(&bytes), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            decode(&bytes);
        }

        #[test]
        fn nearly_valid_events_are_decoded_or_refused(
            at in 0_usize..60,
            byte: u8,
            cut in 0_usize..60,
        ) {
            let mut bytes = event(libc::FAN_CLOSE_WRITE, 7, &record(b"abcdefgh"));
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - cut % bytes.len());
            decode(&bytes);
        }
    }

    #[test]
    fn the_last_mapping_that_could_be_written_to_is_a_closing() {
        let dir = tempfile::tempdir().unwrap();
        let name = dir.path().join("f");
        std::fs::write(&name, "x").unwrap();
        let closings = Closings::new().unwrap_or_else(|err| panic!("run this as root: {err}"));
        let directory = std::fs::File::open(dir.path()).unwrap();
        closings.mark(directory.as_fd()).unwrap();
        let mut buffer = vec![0; READ_BYTES];
        let file = std::fs::File::options().read(true).write(true).open(&name).unwrap();
        let handle = FileHandle::of(&file).unwrap();
        // SAFETY: the kernel chooses the address of this new mapping, so it replaces none.
        let mapped = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                1,
                rustix::mm::ProtFlags::READ,
                rustix::mm::MapFlags::SHARED,
                &file,
                0,
            )
        };
        let mapped = mapped.unwrap();
        drop(file);
        let err = closings.read(&mut buffer).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::WouldBlock);
        // SAFETY: this mapping was made with this length, and nothing refers to it.
        unsafe { rustix::mm::munmap(mapped, 1) }.unwrap();
        let pid = std::process::id();
        let expected = [Happened::To { file: handle, pid, executed: false, closed: true }];
        assert_eq!(closings.read(&mut buffer).unwrap(), expected);
    }
}
