//! Reads of a group, and the answer to a permission event.
//!
//! Every descriptor in the buffer gets an owner here, and every permission event exactly one
//! answer. `decode` reads the bytes.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use super::decode::{
    Decoded, DecodedMount, DecodedName, Event, Malformed, decode, decode_mounts, decode_names,
};
use super::group::Group;

/// The answer to a permission event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Allow,
    Deny,
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

/// A permission event: a process waits for the answer, which is given exactly once.
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

    /// Answers, and returns the event with its descriptors, which the kernel does not need
    /// any more.
    pub fn answer(mut self, answer: Answer) -> (Event, io::Result<()>) {
        let event = self.event.take().expect("only `answer` takes it, and `answer` consumes self");
        let written = self.group.respond(event.file.as_fd(), answer);
        (event, written)
    }
}

impl Drop for Permission<'_> {
    fn drop(&mut self) {
        if let Some(event) = self.event.take() {
            // A failure cannot be handled here: to close the group, which answers
            // everything, is for its owner to decide.
            let _ = self.group.respond(event.file.as_fd(), Answer::Allow);
        }
    }
}

/// The memory that events are read into. fanotify's structs need eight-byte alignment, and
/// 64 KiB have room for more than a thousand events.
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

impl Group {
    /// Reads events of names; `WouldBlock` if there are none. For a group that reports
    /// names.
    pub fn read_names(&self, buffer: &mut Buffer) -> Result<Vec<DecodedName>, ReadError> {
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode_names(&buffer.0[..read]);
        outcome.map_err(ReadError::Malformed)?;
        Ok(decoded)
    }

    /// Reads events of mounts; `WouldBlock` if there are none. For a group that reports
    /// mounts.
    pub(in crate::sys) fn read_mounts(
        &self,
        buffer: &mut Buffer,
    ) -> Result<Vec<DecodedMount>, ReadError> {
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode_mounts(&buffer.0[..read]);
        outcome.map_err(ReadError::Malformed)?;
        Ok(decoded)
    }

    /// Reads events of files, at most `bytes` bytes of them; `WouldBlock` if there are none.
    ///
    /// The kernel opens a descriptor (or two) for every event of one read. When the process
    /// may open no more, the kernel drops a notification in silence and *denies* a
    /// permission. So the caller keeps `bytes` small enough.
    pub fn read<'group>(
        &'group self,
        buffer: &mut Buffer,
        bytes: usize,
    ) -> Result<Vec<Incoming<'group>>, ReadError> {
        let bytes = bytes.min(buffer.0.len());
        let read = rustix::io::read(&self.fanotify, &mut buffer.0[..bytes])
            .map_err(|errno| ReadError::Os(errno.into()))?;
        let (decoded, outcome) = decode(&buffer.0[..read], |fd| {
            // SAFETY: the kernel has just opened `fd` for this process as part of this read.
            // `decode` passes each descriptor once, so this is its only owner.
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

    /// How many events wait to be read, in a group that reports descriptors.
    pub fn queued(&self) -> io::Result<u64> {
        // The kernel adds up the sizes of the events as a read would return them.
        let bytes = rustix::io::ioctl_fionread(&self.fanotify)?;
        Ok(bytes / size_of::<libc::fanotify_event_metadata>() as u64)
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

/// Why events could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot read fanotify events: {0}")]
    Os(#[source] io::Error),
    #[error(transparent)]
    Malformed(#[from] Malformed),
}
