//! The packets between the daemon and its gate.
//!
//! The daemon starts the gate from its own program file, so the encoding needs no versions.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::unchanged::File;
use crate::sys::fanotify::Range;
use crate::sys::file::Stat;
use crate::sys::procfs::Whereabouts;

/// The longest packet, which has a process's `/proc/PID/stat`.
pub(super) const MAX_PACKET: usize = 4 * 1024;

/// The longest path of a control group. A longer one is left out.
pub(super) const MAX_CGROUP: usize = 1024;

/// The first packet, with the memory of the pulse and the channel of executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// How many shards ask about an unchanged file only once.
    pub(super) shards: u8,
}

/// The group that carries a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// The group that asks about every execution.
    Plain,
    /// A group that asks about an unchanged file of an image only once.
    Shard(u8),
}

/// A container whose executions wait for a decision of the daemon, unless the file is known to
/// be the image's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforced {
    /// The device and the mount of the container's own overlay.
    pub device: u64,
    pub mount: Option<u64>,
    /// By these, a process that executes a file from elsewhere belongs to the container.
    pub pid_namespace: Option<u64>,
    pub mount_namespace: Option<u64>,
    pub cgroup: Option<Vec<u8>>,
    pub undecided: Undecided,
}

/// What happens to an execution about which no decision comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undecided {
    /// How long it waits for one.
    pub after: Duration,
    pub deny: bool,
}

/// A decision about an execution that waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Decision {
    Allow,
    Deny,
    /// No decision is possible: it is answered as one that comes too late.
    None,
}

/// A packet of the daemon in the channel of executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Decided {
    pub(super) number: u64,
    pub(super) decision: Decision,
}

/// A request of the daemon. The comments name the descriptors that come with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    /// Mark a container's own overlay: a descriptor of its root.
    MarkRoot(Place),
    /// Mark a whole filesystem: a descriptor of any file on it.
    MarkFilesystem,
    /// Mark a mount: a descriptor that was opened through it.
    MarkMount,
    /// Hold a runtime when a shim executes it: a descriptor of its program.
    MarkRuntime,
    /// Watch the copy-ups in a work directory: a descriptor of it.
    Meet { shard: u8 },
    /// A container has ended: descriptors of its remaining work directories.
    Leave { shard: u8 },
    /// Remove all ignore marks of a shard.
    Forget { shard: u8 },
    /// Ask no more about a file: a descriptor of it. Has no reply.
    Ignore(Calm),
    /// Let the runtime run that is held under this number. Has no reply.
    Release { number: u64 },
    /// Executions in this container wait for a decision.
    Enforce(Enforced),
    /// Executions in the container with this device wait no more.
    EnforceNoMore { device: u64 },
    /// Hand on no more executions of this file until it changes, and have the kernel ask no more
    /// about it from this time on, by the clock of its records. Has no reply.
    Unchanged { file: File, ignorable_from: Option<u64> },
    /// Hand on the executions of all files again of the container with this device.
    ForgetUnchanged { device: u64 },
    /// Ask before this file is read: a descriptor of it, on the filesystem below the overlay.
    /// Has no reply.
    Guard,
    /// Close every group. Executions that were answered before are still handed over.
    Close,
}

impl Request {
    pub(super) fn is_replied_to(&self) -> bool {
        match self {
            Request::Ignore(_)
            | Request::Release { .. }
            | Request::Unchanged { .. }
            | Request::Guard => false,
            Request::MarkRoot(_)
            | Request::MarkFilesystem
            | Request::MarkMount
            | Request::MarkRuntime
            | Request::Meet { .. }
            | Request::Leave { .. }
            | Request::Forget { .. }
            | Request::Enforce(_)
            | Request::EnforceNoMore { .. }
            | Request::ForgetUnchanged { .. }
            | Request::Close => true,
        }
    }
}

/// The result of a request: an error number of the kernel, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) errno: Option<i32>,
}

impl Reply {
    pub(super) fn outcome(self) -> std::io::Result<()> {
        match self.errno {
            None => Ok(()),
            Some(errno) => Err(std::io::Error::from_raw_os_error(errno)),
        }
    }
}

/// A proof that no copy-up was in flight in a shard. Taken before a file is examined, and
/// compared when the file is to be ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calm {
    pub shard: u8,
    pub(super) generation: u64,
}

/// A permission event of the kernel, as the gate saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub pid: u32,
    /// The time by the clock of the kernel's records.
    pub at: u64,
    /// The same time by the wall clock, in nanoseconds since 1970.
    pub time: i64,
    /// The file's attributes; an error number if they could not be read.
    pub stat: Result<Stat, i32>,
    /// The namespaces and the control group of the process, if the file is on no
    /// container's own overlay: such a file does not show its container.
    pub whereabouts: Option<Whereabouts>,
    /// Set if the file may be ignored, should the daemon find that it is the image's.
    pub calm: Option<Calm>,
    /// The execution waits under this number for a decision.
    pub waits: Option<u64>,
}

/// A message of the gate to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Message<'packet> {
    /// A program was allowed to run, or waits for a decision: a descriptor of its file and, if
    /// the process may be a runtime on its way into a container or sessions are open, a handle of
    /// the process.
    Executed {
        asked: Asked,
        /// The process's `/proc/PID/stat`, empty if it could not be read.
        #[serde(borrow)]
        process: &'packet [u8],
    },
    /// A thread is about to read a guarded file, and waits for a decision: a descriptor of the
    /// file.
    Reads {
        /// Its `pid` is the thread's.
        asked: Asked,
        range: Option<Range>,
    },
    /// What waited under this number was answered, at this time by the clock of the kernel's
    /// records.
    Answered { number: u64, denied: bool, at: u64, is_read: bool },
    /// A shim executes a runtime, which is held under this number.
    Runtime {
        number: u64,
        #[serde(borrow)]
        process: &'packet [u8],
    },
}

impl Message<'_> {
    /// Whether it stands for an execution that is counted as answered.
    pub(super) fn is_counted(&self) -> bool {
        match self {
            Message::Executed { asked, .. } => asked.waits.is_none(),
            Message::Answered { is_read, .. } => !is_read,
            Message::Reads { .. } | Message::Runtime { .. } => false,
        }
    }
}

pub(super) fn encode<'buffer, T: Serialize>(value: &T, buffer: &'buffer mut [u8]) -> &'buffer [u8] {
    postcard::to_slice(value, buffer).expect("no packet is longer than the buffer")
}

pub(super) fn decode<'packet, T: Deserialize<'packet>>(bytes: &'packet [u8]) -> std::io::Result<T> {
    postcard::from_bytes(bytes).map_err(|_| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FileTime, FileType};

    #[test]
    fn the_longest_packet_fits_and_comes_back_as_it_was() {
        let most = FileTime { seconds: i64::MAX, nanoseconds: u32::MAX };
        let stat = Stat {
            device: u64::MAX,
            inode: u64::MAX,
            born: Some(most),
            changed: most,
            modified: most,
            file_type: FileType::Socket,
            mode: u32::MAX,
            uid: u32::MAX,
            gid: u32::MAX,
            size: u64::MAX,
            links: u32::MAX,
            node: (u32::MAX, u32::MAX),
            mount: Some(u64::MAX),
        };
        let asked = Asked {
            pid: u32::MAX,
            at: u64::MAX,
            time: i64::MIN,
            stat: Ok(stat),
            whereabouts: Some(Whereabouts {
                mount_namespace: Some(u64::MAX),
                pid_namespace: Some(u64::MAX),
                cgroup: Some(vec![b'/'; MAX_CGROUP]),
            }),
            calm: Some(Calm { shard: u8::MAX, generation: u64::MAX }),
            waits: Some(u64::MAX),
        };
        let process = [b'9'; super::super::process::MAX_STAT];
        let message = Message::Executed { asked, process: &process };
        let mut buffer = [0; MAX_PACKET];
        let bytes = encode(&message, &mut buffer);
        assert_eq!(decode::<Message<'_>>(bytes).unwrap(), message);
        decode::<Message<'_>>(&bytes[..40]).unwrap_err();
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_message_or_none(bytes: Vec<u8>) {
            let _ = decode::<Message<'_>>(&bytes);
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Decided>(&bytes);
        }
    }
}
