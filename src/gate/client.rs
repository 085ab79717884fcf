//! The daemon's side of the gate: starts it, requests marks, and receives the executions that
//! it has answered. `watch` decides what is marked.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::unchanged::File;
use super::wire::{
    self, Asked, Calm, Decided, Decision, Enforced, Hello, MAX_PACKET, Message, Place, Reply,
    Request,
};
use crate::pulse::Pulse;
use crate::sys::channel::{Channel, Packet};
use crate::sys::fanotify::{self, Range};
use crate::sys::process;
use crate::sys::procfs::Stat;

/// How long a reply may take. The guardian ends a gate that takes longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many requests are sent before their replies are read: so many fit into a socket.
const MAX_OUTSTANDING: usize = 32;

/// This program. The link leads to the same file even after an upgrade.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// Why there is no gate, or none any more.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot start the gate's process: {0}")]
    Start(#[source] io::Error),
    #[error("the gate's process does not answer: {0}")]
    Silent(#[source] io::Error),
    #[error(transparent)]
    Fanotify(#[from] fanotify::Error),
}

/// A running gate.
#[derive(Debug)]
pub struct Gate {
    /// Ends with the daemon. Once it has ended, the kernel asks no more.
    pub child: Child,
    pub marks: Marks,
    pub events: Events,
    pub pulse: Arc<Pulse>,
}

impl Gate {
    /// Starts a gate: `program`, executed as `driftd gate`. `shards` is the number of groups
    /// that ask about an unchanged file only once.
    pub fn start(program: &Path, shards: u8) -> Result<Gate, Error> {
        let pulse = Arc::new(Pulse::new().map_err(Error::Start)?);
        let (requests, its_requests) = Channel::pair().map_err(Error::Start)?;
        let (its_events, events) = Channel::pair().map_err(Error::Start)?;
        let child = Command::new(program)
            .arg("gate")
            .env_clear()
            .envs(process::journal())
            .stdin(Stdio::from(OwnedFd::from(its_requests)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(Error::Start)?;
        let mut gate =
            Gate { child, marks: Marks::new(requests), events: Events(Arc::new(events)), pulse };
        match gate.greet(shards, &its_events) {
            Ok(()) => Ok(gate),
            Err(err) => {
                let _ = gate.child.kill();
                let _ = gate.child.wait();
                Err(err)
            }
        }
    }

    fn greet(&self, shards: u8, its_events: &Channel) -> Result<(), Error> {
        let mut buffer = [0; MAX_PACKET];
        let hello = wire::encode(&Hello { shards }, &mut buffer);
        let mut line = self.marks.line();
        let descriptors = [self.pulse.as_fd(), its_events.as_fd()];
        line.channel.send(hello, &descriptors, PATIENCE).map_err(Error::Silent)?;
        match line.reply().map_err(Error::Silent)? {
            Reply { errno: None } => Ok(()),
            Reply { errno: Some(errno) } => {
                Err(fanotify::Error::from_errno(io::Error::from_raw_os_error(errno)).into())
            }
        }
    }
}

/// Requests to the gate. Most wait for a reply, but never for long.
#[derive(Clone, Debug)]
pub struct Marks {
    /// Requests without a reply do not wait for the others'.
    channel: Arc<Channel>,
    line: Arc<Mutex<Line>>,
}

#[derive(Debug)]
struct Line {
    channel: Arc<Channel>,
    /// A reply did not come in time: the next reply would be taken for another request's.
    is_broken: bool,
}

impl Line {
    fn reply(&mut self) -> io::Result<Reply> {
        let mut buffer = [0; MAX_PACKET];
        let reply = self
            .channel
            .receive(&mut buffer, PATIENCE)
            .and_then(|packet| wire::decode(packet.bytes));
        self.is_broken |= reply.is_err();
        reply
    }
}

impl Marks {
    fn new(channel: Channel) -> Marks {
        let channel = Arc::new(channel);
        let line = Line { channel: channel.clone(), is_broken: false };
        Marks { channel, line: Arc::new(Mutex::new(line)) }
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        // After a panic the field `is_broken` still holds.
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut buffer = [0; MAX_PACKET];
        let bytes = wire::encode(request, &mut buffer);
        if !request.is_replied_to() {
            return self.channel.try_send(bytes, descriptors);
        }
        let mut line = self.line();
        if line.is_broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        line.channel.send(bytes, descriptors, PATIENCE)?;
        line.reply().and_then(Reply::outcome)
    }

    /// Sends all of these requests, and closes each descriptor before it waits for the
    /// replies: no mount is kept busy for longer than the gate needs.
    fn request_all(&self, requests: Vec<(Request, OwnedFd)>) -> Vec<io::Result<()>> {
        let mut line = self.line();
        let mut done = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter();
        loop {
            let mut sent = 0;
            for (request, descriptor) in requests.by_ref().take(MAX_OUTSTANDING) {
                let mut buffer = [0; MAX_PACKET];
                let bytes = wire::encode(&request, &mut buffer);
                let outcome = match line.is_broken {
                    true => Err(io::ErrorKind::BrokenPipe.into()),
                    false => line.channel.send(bytes, &[descriptor.as_fd()], PATIENCE),
                };
                if let Err(err) = outcome {
                    line.is_broken = true;
                    done.push(Err(err));
                    continue;
                }
                sent += 1;
            }
            if sent == 0 {
                return done;
            }
            for _ in 0..sent {
                done.push(match line.is_broken {
                    true => Err(io::ErrorKind::BrokenPipe.into()),
                    false => line.reply().and_then(Reply::outcome),
                });
            }
        }
    }

    /// Marks for each descriptor the whole filesystem, if the flag is set, or else the mount.
    /// Never a filesystem that a process or a network serves: to open an event's file there
    /// could wait.
    pub fn mark_others(&self, within: Vec<(OwnedFd, bool)>) -> Vec<io::Result<()>> {
        let request = |is_whole| match is_whole {
            true => Request::MarkFilesystem,
            false => Request::MarkMount,
        };
        let requests = within.into_iter().map(|(within, is_whole)| (request(is_whole), within));
        self.request_all(requests.collect())
    }

    /// Marks a container's own overlay.
    pub fn mark_root(&self, place: Place, root: BorrowedFd<'_>) -> io::Result<()> {
        self.request(&Request::MarkRoot(place), &[root])
    }

    /// Holds a runtime for a moment when a shim executes it, see [`Event::Runtime`].
    pub fn mark_runtime(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        self.request(&Request::MarkRuntime, &[program])
    }

    /// Watches the copy-ups in a work directory.
    pub fn meet(&self, shard: u8, work: BorrowedFd<'_>) -> io::Result<()> {
        self.request(&Request::Meet { shard }, &[work])
    }

    /// Watches no more: a container has ended, and these are its remaining work directories.
    pub fn leave(&self, shard: u8, work: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.request(&Request::Leave { shard }, work)
    }

    /// Removes all ignore marks of a shard: its files are asked about again.
    pub fn forget(&self, shard: u8) -> io::Result<()> {
        self.request(&Request::Forget { shard }, &[])
    }

    /// Asks no more about a file, unless a file was copied up since `calm` was taken. If the
    /// channel is full, the file is asked about again.
    pub fn ignore(&self, calm: Calm, file: BorrowedFd<'_>) {
        let _ = self.request(&Request::Ignore(calm), &[file]);
    }

    /// Lets a held runtime run. If the channel is full, the gate lets it run in a moment.
    pub fn release(&self, number: u64) {
        let _ = self.request(&Request::Release { number }, &[]);
    }

    /// From now on, executions in a container wait for a decision.
    pub fn enforce(&self, enforced: Enforced) -> io::Result<()> {
        self.request(&Request::Enforce(enforced), &[])
    }

    /// Executions in the container with this device wait no more.
    pub fn enforce_no_more(&self, device: u64) -> io::Result<()> {
        self.request(&Request::EnforceNoMore { device }, &[])
    }

    /// Hands on no more executions of a file of an image until it changes. Never waits; if the
    /// channel is full, the next execution is handed on as well.
    pub fn is_unchanged(&self, file: File, ignorable_from: Option<u64>) {
        let _ = self.request(&Request::Unchanged { file, ignorable_from }, &[]);
    }

    /// When this returns, the executions of all files are handed on again in the container with
    /// this device.
    pub fn forget_unchanged(&self, device: u64) -> io::Result<()> {
        self.request(&Request::ForgetUnchanged { device }, &[])
    }

    /// From now on the kernel asks before this file is read, and the reading waits for a
    /// decision where executions do. Never waits for the gate.
    pub fn guard(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.request(&Request::Guard, &[file])
    }

    /// A value that can close the gate.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.clone())
    }
}

/// Closes the gate: the kernel lets everything run from then on.
#[derive(Clone, Debug)]
pub struct Stopper(Marks);

impl Stopper {
    /// The marks of the gate that this closes.
    pub fn marks(&self) -> Marks {
        self.0.clone()
    }

    /// Executions that were answered before are still handed over.
    pub fn close(&self) -> io::Result<()> {
        self.0.request(&Request::Close, &[])
    }
}

/// What the gate hands to the daemon.
#[derive(Debug)]
pub enum Event {
    /// A program was allowed to run, or waits for a decision (`asked.waits`).
    Executed {
        asked: Asked,
        /// The process before it became the program.
        process: Option<Stat>,
        file: OwnedFd,
        /// The process, if the gate has kept a handle of it: see `Message::Executed`.
        handle: Option<OwnedFd>,
    },
    /// A thread waits to read a guarded file (`asked.pid` is the thread's).
    Reads { asked: Asked, range: Option<Range>, file: OwnedFd },
    /// An execution or a read that waited was answered.
    Answered { number: u64, denied: bool, at: u64, is_read: bool },
    /// A shim executes a runtime, which is held until [`Marks::release`], or for half a
    /// second.
    Runtime { number: u64, process: Option<Stat> },
}

/// The channel of answered executions, in the order of the answers.
#[derive(Debug)]
pub struct Events(Arc<Channel>);

/// The decisions about executions that wait. They have a way of their own: a request may wait
/// until a mark is placed.
#[derive(Clone, Debug)]
pub struct Decisions(Arc<Channel>);

impl Decisions {
    /// Never waits. If the channel is full, the gate answers when its time is over.
    pub fn decide(&self, number: u64, decision: Decision) {
        let mut buffer = [0; 32];
        let bytes = wire::encode(&Decided { number, decision }, &mut buffer);
        let _ = self.0.try_send(bytes, &[]);
    }
}

impl Events {
    pub fn decisions(&self) -> Decisions {
        Decisions(self.0.clone())
    }

    /// The next event. `WouldBlock` if there is none; `UnexpectedEof` if the gate has ended
    /// and no event is left.
    pub fn receive(&self) -> io::Result<Event> {
        let mut buffer = [0; MAX_PACKET];
        let Packet { bytes, descriptors } = self.0.try_receive(&mut buffer)?;
        let mut descriptors = descriptors.into_iter();
        Ok(match wire::decode(bytes)? {
            Message::Executed { asked, process } => Event::Executed {
                asked,
                process: Stat::parse(process),
                file: descriptors.next().ok_or(io::ErrorKind::InvalidData)?,
                handle: descriptors.next(),
            },
            Message::Reads { asked, range } => {
                let file = descriptors.next().ok_or(io::ErrorKind::InvalidData)?;
                Event::Reads { asked, range, file }
            }
            Message::Answered { number, denied, at, is_read } => {
                Event::Answered { number, denied, at, is_read }
            }
            Message::Runtime { number, process } => {
                Event::Runtime { number, process: Stat::parse(process) }
            }
        })
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
