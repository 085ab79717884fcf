//! Packets with descriptors between two processes: a pair of Unix sockets
//! (`SOCK_SEQPACKET`), so that each packet arrives whole and in order, or not at all.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// How many descriptors a packet carries at most.
pub const MAX_DESCRIPTORS: usize = 4;
const SPACE: usize = cmsg_space!(ScmRights(MAX_DESCRIPTORS));

/// One end of the connection.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A received packet.
#[derive(Debug)]
pub struct Packet<'buffer> {
    pub bytes: &'buffer [u8],
    pub descriptors: Vec<OwnedFd>,
}

impl Channel {
    /// Two ends that are connected to each other, closed on exec.
    pub fn pair() -> io::Result<(Channel, Channel)> {
        let (one, other) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Channel(one), Channel(other)))
    }

    /// Sends a packet without waiting: `WouldBlock` if there is no room for it.
    pub fn try_send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // NOSIGNAL: a closed other end is an error, and must not end this process.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let slices = [IoSlice::new(bytes)];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.0, &slices, &mut ancillary, flags)
        })?;
        Ok(())
    }

    /// Sends a packet, and waits at most `patience` for room.
    pub fn send(
        &self,
        bytes: &[u8],
        descriptors: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> io::Result<()> {
        match self.try_send(bytes, descriptors) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                self.wait(PollFlags::OUT, patience)?;
                self.try_send(bytes, descriptors)
            }
            sent => sent,
        }
    }

    /// Takes the next packet without waiting: `WouldBlock` if there is none,
    /// `UnexpectedEof` if the other end is closed and no packet is left. A packet that is
    /// larger than the buffer is an error, and is lost.
    pub fn try_receive<'buffer>(&self, buffer: &'buffer mut [u8]) -> io::Result<Packet<'buffer>> {
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = loop {
            let mut slices = [IoSliceMut::new(&mut *buffer)];
            match rustix::net::recvmsg(&self.0, &mut slices, &mut ancillary, flags) {
                Err(Errno::INTR) => (),
                received => break received?,
            }
        };
        let mut descriptors = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                descriptors.extend(received);
            }
        }
        // No packet is empty: zero bytes mean that the other end is closed.
        if received.bytes == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(Packet { bytes: &buffer[..received.bytes], descriptors })
    }

    /// Takes the next packet, and waits at most `patience` for it.
    pub fn receive<'buffer>(
        &self,
        buffer: &'buffer mut [u8],
        patience: Duration,
    ) -> io::Result<Packet<'buffer>> {
        self.wait(PollFlags::IN, patience)?;
        self.try_receive(buffer)
    }

    fn wait(&self, wanted: PollFlags, patience: Duration) -> io::Result<()> {
        let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), wanted)];
        let patience = Timespec::try_from(patience).map_err(|_| io::ErrorKind::InvalidInput)?;
        match rustix::io::retry_on_intr(|| rustix::event::poll(&mut fds, Some(&patience)))? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }
}

/// Closes every descriptor except the three standard ones: the parent may have left others
/// open. Only for the start of a process, before it has opened anything.
pub fn close_inherited() {
    // SAFETY: the caller calls this before anything in this process owns a descriptor above
    // 2. Before Linux 5.9 the call fails and closes nothing, which is harmless.
    unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Channel {
    fn from(socket: OwnedFd) -> Channel {
        Channel(socket)
    }
}

impl From<Channel> for OwnedFd {
    fn from(channel: Channel) -> OwnedFd {
        channel.0
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn packets_arrive_whole_in_order_and_with_their_descriptors() {
        let (here, there) = Channel::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, b"content").unwrap();
        here.try_send(b"one", &[file.as_fd(), file.as_fd()]).unwrap();
        here.try_send(b"two", &[]).unwrap();
        drop(here);
        let mut buffer = [0; 16];
        let packet = there.try_receive(&mut buffer).unwrap();
        assert_eq!((packet.bytes, packet.descriptors.len()), (b"one".as_slice(), 2));
        let mut received = std::fs::File::from(packet.descriptors.into_iter().next().unwrap());
        std::io::Seek::rewind(&mut received).unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert_eq!(there.try_receive(&mut buffer).unwrap().bytes, b"two");
        let err = there.try_receive(&mut buffer).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn nothing_waits_for_an_end_that_does_not_read() {
        let (here, there) = Channel::pair().unwrap();
        let mut sent = 0;
        let err = loop {
            match here.try_send(&[0; 512], &[]) {
                Ok(()) => sent += 1,
                Err(err) => break err,
            }
        };
        assert_eq!(err.kind(), io::ErrorKind::WouldBlock);
        assert!(sent > 16, "{sent}");
        let err = here.send(b"x", &[], Duration::from_millis(1)).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::TimedOut);
        let mut buffer = [0; 8];
        assert_eq!(there.try_receive(&mut buffer).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(there);
        // A process that another test has forked may hold the end until it executes.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let err = loop {
            match here.try_send(b"x", &[]) {
                Err(err) if err.kind() != io::ErrorKind::WouldBlock => break err.kind(),
                Ok(()) | Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
            assert!(std::time::Instant::now() < deadline, "the other end is not gone");
        };
        // With something left unread it is the one, else the other.
        assert!(matches!(err, io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset), "{err}");
    }
}
