//! The daemon's side: starts the gate, asks it for marks, takes what it hands on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::wire::{self, Asked, Calm, Hello, MAX_PACKET, Message, Place, Reply, Request};
use crate::pulse::Pulse;
use crate::sys::channel::{Channel, Packet};
use crate::sys::fanotify;
use crate::sys::process;
use crate::sys::procfs::Stat;

/// A gate that takes longer than this to reply is being ended by the guardian.
const PATIENCE: Duration = Duration::from_secs(5);

/// Requests that are sent before their replies are read: those fit into a socket.
const MAX_OUTSTANDING: usize = 32;

/// This program, also after an upgrade: by this link it is still the very same.
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
    /// Ends with the daemon. Once it has ended, nothing is asked any more.
    pub child: Child,
    pub marks: Marks,
    pub events: Events,
    pub pulse: Arc<Pulse>,
}

impl Gate {
    /// Starts one, which is `program` called as `driftd gate`. `shards` is how many
    /// groups ask about an unchanged file only once.
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
        let mut gate = Gate { child, marks: Marks::new(requests), events: Events(events), pulse };
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

/// Asks the gate for marks. Each request waits for its reply, but never for long.
#[derive(Clone, Debug)]
pub struct Marks(Arc<Mutex<Line>>);

#[derive(Debug)]
struct Line {
    channel: Channel,
    /// A reply did not come in time: the next one that comes would be another request's.
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
        Marks(Arc::new(Mutex::new(Line { channel, is_broken: false })))
    }

    fn line(&self) -> std::sync::MutexGuard<'_, Line> {
        // Broken or not, the line says so itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn request(&self, request: Request, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut buffer = [0; MAX_PACKET];
        let bytes = wire::encode(&request, &mut buffer);
        let mut line = self.line();
        if line.is_broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if !request.is_replied_to() {
            return line.channel.try_send(bytes, descriptors);
        }
        line.channel.send(bytes, descriptors, PATIENCE)?;
        line.reply().and_then(Reply::outcome)
    }

    /// Sends all of these, and lets go of each descriptor before the replies are waited
    /// for: nothing that they point at is kept busy for longer than the gate needs.
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

    /// Marks what each descriptor points into: the whole filesystem where that is said,
    /// or what is reached through its mount. Never a filesystem that a process or a
    /// network answers for: opening an event's file there could wait.
    pub fn mark_others(&self, within: Vec<(OwnedFd, bool)>) -> Vec<io::Result<()>> {
        let request = |is_whole| match is_whole {
            true => Request::MarkFilesystem,
            false => Request::MarkMount,
        };
        let requests = within.into_iter().map(|(within, is_whole)| (request(is_whole), within));
        self.request_all(requests.collect())
    }

    /// Asks about a container's own overlay.
    pub fn mark_root(&self, place: Place, root: BorrowedFd<'_>) -> io::Result<()> {
        self.request(Request::MarkRoot(place), &[root])
    }

    /// Holds the shims' calls of a runtime for a moment, see [`Event::Runtime`].
    pub fn mark_runtime(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        self.request(Request::MarkRuntime, &[program])
    }

    /// Meets the copy-ups in a work directory.
    pub fn meet(&self, shard: u8, work: BorrowedFd<'_>) -> io::Result<()> {
        self.request(Request::Meet { shard }, &[work])
    }

    /// A container has ended; these of its work directories are still there.
    pub fn leave(&self, shard: u8, work: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.request(Request::Leave { shard }, work)
    }

    /// Asks again about everything that is ignored in a shard.
    pub fn forget(&self, shard: u8) -> io::Result<()> {
        self.request(Request::Forget { shard }, &[])
    }

    /// Asks no more about a file, unless something was copied up since it was looked at.
    /// Where this finds no room, the file is asked about again.
    pub fn ignore(&self, calm: Calm, file: BorrowedFd<'_>) {
        let _ = self.request(Request::Ignore(calm), &[file]);
    }

    /// Lets a runtime run that is held. Where this finds no room, the gate does so itself
    /// in a moment.
    pub fn release(&self, number: u64) {
        let _ = self.request(Request::Release { number }, &[]);
    }

    /// What closes the gate.
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

    /// What was answered before is still handed over.
    pub fn close(&self) -> io::Result<()> {
        self.0.request(Request::Close, &[])
    }
}

/// What the gate hands on.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly every event is an execution")]
pub enum Event {
    /// A program was let run.
    Executed {
        asked: Asked,
        /// Before it became the program.
        process: Option<Stat>,
        file: OwnedFd,
        /// Of the process, if it may be a runtime's on its way into a container.
        handle: Option<OwnedFd>,
    },
    /// A shim has called a runtime, which is held until [`Marks::release`], or half a
    /// second.
    Runtime { number: u64, process: Option<Stat> },
}

/// Where answered executions come from, in the order of the answers.
#[derive(Debug)]
pub struct Events(Channel);

impl Events {
    /// The next one. `WouldBlock` if there is none; `UnexpectedEof` when the gate has
    /// ended and nothing is left.
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
