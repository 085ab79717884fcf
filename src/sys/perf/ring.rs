//! The rings of one processor: one for executions and mappings, and one for arguments.
//!
//! `event` makes the events, `buffer` has the memory, `rings` reads all processors.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use super::buffer::Buffer;
use super::event::{self, Attributes};

/// The bytes of a ring, tried from the first on: the kernel's limit is shared with
/// everything else that driftd has locked in memory (`kernel.perf_event_mlock_kb`). One
/// execve leaves about a kilobyte of records.
const RING_BYTES: [usize; 3] = [256 << 10, 128 << 10, 64 << 10];

/// The bytes of a ring for arguments, some forty executions, tried from the first on as
/// well. The rings of all processors together take no more than the bound, unless there
/// are very many processors.
const ARGUMENT_RING_BYTES: [usize; 4] = [512 << 10, 256 << 10, 128 << 10, 64 << 10];
const MAX_ARGUMENT_RINGS_BYTES: usize = 16 << 20;

fn argument_ring_sizes(processors: usize) -> impl Iterator<Item = usize> {
    let [.., least] = ARGUMENT_RING_BYTES;
    ARGUMENT_RING_BYTES.into_iter().filter(move |&bytes| {
        bytes == least || bytes.saturating_mul(processors) <= MAX_ARGUMENT_RINGS_BYTES
    })
}

/// One processor's rings.
pub(super) struct Ring {
    pub(super) processor: u32,
    executions: OwnedFd,
    /// Writes into the ring of the executions, until it is closed.
    _mappings: OwnedFd,
    pub(super) buffer: Buffer,
    arguments: Option<(OwnedFd, Buffer)>,
}

impl Ring {
    pub(super) fn open(processor: u32, tracepoint: u64, with_cgroup: bool) -> io::Result<Ring> {
        let executions =
            event::open(&Attributes::of_executions(tracepoint, with_cgroup), processor)?;
        let mappings = event::open(&Attributes::of_mappings(), processor)?;
        let buffer = Buffer::map(executions.as_fd(), RING_BYTES)?;
        event::redirect(mappings.as_fd(), executions.as_fd())?;
        event::enable(mappings.as_fd())?;
        event::enable(executions.as_fd())?;
        Ok(Ring { processor, executions, _mappings: mappings, buffer, arguments: None })
    }

    /// Opens the event for arguments. The kernel writes its record before it wakes the
    /// reader, if this is called after [`Ring::open`].
    pub(super) fn open_arguments(&mut self, tracepoint: u64, processors: usize) -> io::Result<()> {
        let attributes = Attributes::of_arguments(tracepoint).ok_or(io::ErrorKind::Unsupported)?;
        let event = event::open(&attributes, self.processor)?;
        let buffer = Buffer::map(event.as_fd(), argument_ring_sizes(processors))?;
        event::enable(event.as_fd())?;
        self.arguments = Some((event, buffer));
        Ok(())
    }

    pub(super) fn arguments(&self) -> Option<&Buffer> {
        self.arguments.as_ref().map(|(_, buffer)| buffer)
    }

    pub(super) fn close_arguments(&mut self) {
        self.arguments = None;
    }

    /// Readable when there are records of executions.
    pub(super) fn readable(&self) -> BorrowedFd<'_> {
        self.executions.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_for_arguments_are_bounded_over_all_processors() {
        let largest = |processors| argument_ring_sizes(processors).next();
        assert_eq!(largest(1), Some(512 << 10));
        assert_eq!(largest(32), Some(512 << 10));
        assert_eq!(largest(33), Some(256 << 10));
        assert_eq!(largest(256), Some(64 << 10));
        assert_eq!(largest(8192), Some(64 << 10));
        assert_eq!(argument_ring_sizes(2).count(), ARGUMENT_RING_BYTES.len());
    }
}
