//! What the kernel recorded, as values.
//!
//! `decode` makes them from a ring's bytes, and `connector` from its messages.

/// One record. Pids are those of the pid namespace in which the rings were opened; times
/// are of the clock of [`super::now`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A process has left its old program: its mappings from here on belong to the new one.
    Began { pid: u32, time: u64 },
    /// Code was mapped.
    Mapped(Mapped),
    /// A process has become a program.
    Executed(Executed),
    /// The arguments with which a process has become a program, separated as in
    /// `/proc/PID/cmdline`. They come shortly before or after the [`Record::Executed`], and
    /// not for every execution.
    Arguments { pid: u32, time: u64, arguments: Box<[u8]> },
    /// A process has made another process. New threads are not reported.
    Forked { pid: u32, parent: u32, time: u64 },
    /// A process has ended.
    Exited { pid: u32, time: u64 },
    /// There was no room for `count` records.
    Lost { count: u64, time: u64 },
}

impl Record {
    pub fn time(&self) -> u64 {
        match self {
            Record::Mapped(Mapped { time, .. })
            | Record::Executed(Executed { time, .. })
            | Record::Began { time, .. }
            | Record::Arguments { time, .. }
            | Record::Forked { time, .. }
            | Record::Exited { time, .. }
            | Record::Lost { time, .. } => *time,
        }
    }
}

/// A file, or memory that is none, was mapped for execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub pid: u32,
    pub time: u64,
    pub address: u64,
    pub length: u64,
    /// The device of the superblock, as in [`crate::sys::file::Stat`]. Kernels before 6.18
    /// may report the file below an overlay's file.
    pub device: u64,
    /// 0 for memory that is no file.
    pub inode: u64,
    /// `MAP_SHARED`: other processes that map it see what is written to it.
    pub is_shared: bool,
    /// As the process sees it, ` (deleted)` and all.
    pub name: Box<[u8]>,
}

/// A process has become a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    pub pid: u32,
    pub time: u64,
    /// As execve received it: it can be relative, or a script's name; `/dev/fd/N` for a
    /// program that was given as a descriptor.
    pub file_name: Box<[u8]>,
    /// The inode of its control group's directory, in the hierarchy that perf belongs to:
    /// the unified one, unless perf is mounted elsewhere. `None` if the kernel does not
    /// report it (before Linux 5.7).
    pub cgroup: Option<u64>,
}
