//! What the daemon and its gate say to each other, as packets.
//!
//! Both are the same program, started one from the other, so that the encoding needs no
//! versions.

use serde::{Deserialize, Serialize};

use crate::sys::file::Stat;
use crate::sys::procfs::Whereabouts;

/// No packet is longer: the longest holds a process's `/proc/PID/stat`.
pub(super) const MAX_PACKET: usize = 4 * 1024;

/// A control group's path that is longer is left out.
pub(super) const MAX_CGROUP: usize = 1024;

/// The first packet, with the memory of the pulse and the channel of executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// How many shards ask about an unchanged file only once.
    pub(super) shards: u8,
}

/// Which group carries a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Place {
    /// The one that asks about every execution.
    Plain,
    /// One that asks about an unchanged file of an image only once.
    Shard(u8),
}

/// What the daemon asks for. Those that come with a descriptor say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Request {
    /// Ask about a container's own overlay, whose root the descriptor points at.
    MarkRoot(Place),
    /// Ask about the whole filesystem that the descriptor points into.
    MarkFilesystem,
    /// Ask about what is reached through the mount that the descriptor points into.
    MarkMount,
    /// Hold the shims' calls of the runtime that the descriptor points at.
    MarkRuntime,
    /// Meet the copy-ups in the work directory that the descriptor points at.
    Meet { shard: u8 },
    /// The container has ended. With descriptors of its work directories that are there.
    Leave { shard: u8 },
    /// Ask about everything in this shard again.
    Forget { shard: u8 },
    /// Ask no more about the file that the descriptor points at. Not replied to.
    Ignore(Calm),
    /// Let the runtime run that is held under this number. Not replied to.
    Release { number: u64 },
    /// Close every group. What was answered before is still handed over.
    Close,
}

impl Request {
    pub(super) fn is_replied_to(self) -> bool {
        !matches!(self, Request::Ignore(_) | Request::Release { .. })
    }
}

/// What came of a request: an error number of the kernel's, or none.
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

/// That no copy-up was in flight in a shard. Taken before a file is looked at, and
/// compared when it is to be ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calm {
    pub shard: u8,
    pub(super) generation: u64,
}

/// A question of the kernel's, as it was when it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub pid: u32,
    /// By the clock of the kernel's records.
    pub at: u64,
    /// The same moment by the clock on the wall, in nanoseconds since 1970.
    pub time: i64,
    /// What the file was; an error number if that could not be asked.
    pub stat: Result<Stat, i32>,
    /// Where the process was, for files that are on no container's own overlay: those
    /// do not say whose they are.
    pub whereabouts: Option<Whereabouts>,
    /// If it may be ignored, should the daemon find it to be the image's.
    pub calm: Option<Calm>,
}

/// What the gate hands to the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "nearly every message is an execution")]
pub(super) enum Message<'packet> {
    /// A program that was let run: with its file and, if it may be a runtime's on its
    /// way into a container, a handle of the process.
    Executed {
        asked: Asked,
        /// The process's `/proc/PID/stat`, empty if it could not be read.
        #[serde(borrow)]
        process: &'packet [u8],
    },
    /// A shim's call of a runtime, which is held under this number.
    Runtime {
        number: u64,
        #[serde(borrow)]
        process: &'packet [u8],
    },
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
        }
    }
}
