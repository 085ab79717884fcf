//! The process connector: the kernel's older way to report every execve, by netlink
//! (`CN_PROC`). It reports the process, but neither the program nor the control group. A
//! process that ends before it is read is known by its pid alone.
//!
//! `watch` uses it where there are no perf events; its records are those of `perf`.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::perf::{Executed, Record};

/// A socket that receives an event of every process.
#[derive(Debug)]
pub struct Connector {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

const NETLINK_HEADER: usize = 16;
/// `struct cn_msg`: id (two words), seq, ack, len, flags.
const CONNECTOR_HEADER: usize = 20;
/// `struct proc_event`: what, cpu, timestamp; then the fields of the event.
const EVENT_HEADER: usize = 16;
const LISTEN: u32 = 1;
const EVENT_FORK: u32 = 1;
const EVENT_EXEC: u32 = 2;
const EVENT_EXIT: u32 = 0x8000_0000;
const INDEX: u32 = 1;
const VALUE: u32 = 1;
/// Room for some thousand events.
const RECEIVE_BYTES: libc::c_int = 1 << 20;

impl Connector {
    pub fn open() -> io::Result<Connector> {
        // SAFETY: the call takes three numbers and touches no memory of this process.
        let fd = unsafe {
            let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_CONNECTOR)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened `fd` for this call, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: all zeros are a valid `sockaddr_nl`.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).expect("a small number");
        address.nl_groups = INDEX;
        // SAFETY: `address` lives during the call, and `length` is its length.
        let bound = unsafe {
            let length = libc::socklen_t::try_from(size_of_val(&address)).expect("twelve bytes");
            libc::bind(fd, ptr::from_ref(&address).cast(), length)
        };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the option's value is a static number, and `length` is its length. The call
        // may fail, without CAP_NET_ADMIN: then the buffer keeps its size, which is no error.
        unsafe {
            let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).expect("four bytes");
            let value = ptr::from_ref(&RECEIVE_BYTES).cast();
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, value, length);
        }
        rustix::io::write(&socket, &subscription())?;
        Ok(Connector { socket, buffer: vec![0; 64 * 1024] })
    }

    pub fn wait(&self, timeout: Duration) {
        let mut events = [PollFd::from_borrowed_fd(self.socket.as_fd(), PollFlags::IN)];
        let timeout = Timespec::try_from(timeout).ok();
        // An error here (a signal) only ends the wait early.
        let _ = rustix::event::poll(&mut events, timeout.as_ref());
    }

    /// Reads the events that are there, in the order in which they happened.
    pub fn read(&mut self, records: &mut Vec<Record>) -> io::Result<()> {
        loop {
            // SAFETY: `self.buffer`, `sender` and `length` live during the call, which gets
            // the lengths of both; all zeros are a valid `sockaddr_nl`.
            let (read, sender) = unsafe {
                let mut sender: libc::sockaddr_nl = std::mem::zeroed();
                let mut length =
                    libc::socklen_t::try_from(size_of_val(&sender)).expect("twelve bytes");
                let read = libc::recvfrom(
                    self.socket.as_raw_fd(),
                    self.buffer.as_mut_ptr().cast(),
                    self.buffer.len(),
                    0,
                    ptr::from_mut(&mut sender).cast(),
                    &raw mut length,
                );
                (read, sender)
            };
            let Ok(read) = usize::try_from(read) else {
                let err = io::Error::last_os_error();
                match err.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => return Ok(()),
                    // The socket was full.
                    Some(libc::ENOBUFS) => {
                        records.push(Record::Lost { count: 1, time: super::perf::now() });
                    }
                    _ => return Err(err),
                }
                continue;
            };
            // Only the kernel sends as number 0.
            if sender.nl_pid == 0 {
                decode(&self.buffer[..read], records);
            }
        }
    }
}

/// The request to send the events of processes.
fn subscription() -> Vec<u8> {
    let length = NETLINK_HEADER + CONNECTOR_HEADER + 4;
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).expect("forty bytes").to_ne_bytes());
    let done = u16::try_from(libc::NLMSG_DONE).expect("a small number");
    message.extend(done.to_ne_bytes());
    message.extend(0_u16.to_ne_bytes());
    for word in [0, std::process::id(), INDEX, VALUE, 0, 0] {
        message.extend(word.to_ne_bytes());
    }
    message.extend(4_u16.to_ne_bytes());
    message.extend(0_u16.to_ne_bytes());
    message.extend(LISTEN.to_ne_bytes());
    message
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

/// Decodes one datagram. A message that cannot be decoded is skipped, because its length is
/// known.
fn decode(mut bytes: &[u8], records: &mut Vec<Record>) {
    while let Some(length) = u32_at(bytes, 0) {
        let length = length as usize;
        let Some(message) = bytes.get(NETLINK_HEADER..length) else { return };
        records.extend(decode_one(message));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

fn decode_one(message: &[u8]) -> Option<Record> {
    if (u32_at(message, 0)?, u32_at(message, 4)?) != (INDEX, VALUE) {
        return None;
    }
    let event = message.get(CONNECTOR_HEADER..)?;
    let time = event.get(8..)?.first_chunk().copied().map(u64::from_ne_bytes)?;
    let word = |index: usize| u32_at(event, EVENT_HEADER + 4 * index);
    match u32_at(event, 0)? {
        // Parent and child, each as thread and process.
        EVENT_FORK if word(2)? == word(3)? => {
            Some(Record::Forked { pid: word(3)?, parent: word(1)?, time })
        }
        EVENT_EXEC => Some(Record::Executed(Executed {
            pid: word(1)?,
            time,
            file_name: Box::default(),
            cgroup: None,
        })),
        EVENT_EXIT if word(0)? == word(1)? => Some(Record::Exited { pid: word(1)?, time }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(what: u32, words: &[u32]) -> Vec<u8> {
        let mut body = [what, 0].iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        body.extend(5_u64.to_ne_bytes());
        body.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let length = NETLINK_HEADER + CONNECTOR_HEADER + body.len();
        let mut message = u32::try_from(length).unwrap().to_ne_bytes().to_vec();
        message.resize(NETLINK_HEADER, 0);
        message.extend([INDEX, VALUE, 0, 0, 0].iter().flat_map(|word| word.to_ne_bytes()));
        message.extend(body);
        message
    }

    fn decoded(bytes: &[u8]) -> Vec<Record> {
        let mut records = Vec::new();
        decode(bytes, &mut records);
        records
    }

    #[test]
    fn processes_are_reported_and_threads_are_not() {
        let bytes = [
            event(EVENT_FORK, &[7, 7, 8, 8]),
            event(EVENT_FORK, &[7, 7, 9, 8]),
            event(EVENT_EXEC, &[8, 8]),
            event(EVENT_EXIT, &[9, 8, 0, 0]),
            event(EVENT_EXIT, &[8, 8, 0, 0]),
        ];
        let executed = Executed { pid: 8, time: 5, file_name: Box::default(), cgroup: None };
        let expected = [
            Record::Forked { pid: 8, parent: 7, time: 5 },
            Record::Executed(executed),
            Record::Exited { pid: 8, time: 5 },
        ];
        assert_eq!(decoded(&bytes.concat()), expected);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_decoded_to_their_end(bytes: Vec<u8>) {
            let _ = decoded(&bytes);
        }
    }

    #[test]
    fn our_own_child_is_heard_of() {
        let mut connector =
            Connector::open().unwrap_or_else(|err| panic!("no process connector: {err}"));
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let mut records = Vec::new();
        let has_run = |records: &[Record]| {
            records.iter().any(|record| matches!(record, Record::Executed(e) if e.pid == pid))
        };
        while !has_run(&records) {
            assert!(std::time::Instant::now() < deadline, "{records:?}");
            connector.wait(Duration::from_millis(10));
            connector.read(&mut records).unwrap();
        }
    }
}
