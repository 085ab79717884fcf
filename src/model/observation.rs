//! Facts as the kernel or a scan reported them. No judgement.

use std::sync::Arc;

use jiff::Timestamp;

use super::{
    Blake3Hash, ContainerId, Exit, FileState, FileTime, Filesystem, Interactive, Opening, Process,
    ProcessIdentity, RootfsPath, Run, Sha256Hash,
};

/// Who saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The gate: a program was about to run.
    Gate,
    /// The change feed: a file was closed after writing.
    Change,
    /// The kernel's record of an execve or of a mapping that has happened.
    Trace,
    /// A walk of the upperdir, or of the container's processes.
    Scan,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Gate => "gate",
            Source::Change => "change",
            Source::Trace => "trace",
            Source::Scan => "scan",
        }
    }
}

/// One fact about one container.
#[derive(Clone, Debug)]
pub struct Observation {
    pub container: ContainerId,
    /// The init process of the run in which it was seen: the container's ID may name a
    /// later run by the time this is read.
    pub init: ProcessIdentity,
    pub at: Timestamp,
    pub source: Source,
    /// The first process of the session to which the one that did it belongs, where
    /// that is known by its descent. A process whose parents have ended has no
    /// ancestors that tell.
    pub session: Option<ProcessIdentity>,
    /// The container in whose root the file lies, where that is another one.
    pub file_of: Option<ContainerId>,
    /// Another path by which the container reaches the file: through a link, or a mount.
    pub reached_as: Option<RootfsPath>,
    pub fact: Fact,
}

impl Observation {
    /// How often it was observed.
    pub fn times(&self) -> u64 {
        match self.fact {
            Fact::Executed { times, .. } => times,
            _ => 1,
        }
    }
}

impl Fact {
    /// Who did it, where that is known.
    pub fn process(&self) -> Option<&Arc<Process>> {
        match self {
            Fact::Executed { process, .. }
            | Fact::Loaded { process, .. }
            | Fact::Interpreted { process, .. }
            | Fact::ReverseShell { process, .. }
            | Fact::PackageManager { process } => Some(process),
            Fact::Present { writer, .. } | Fact::Absent { writer, .. } => writer.as_ref(),
            Fact::SessionOpened { .. }
            | Fact::SessionRan { .. }
            | Fact::SessionRanMore { .. }
            | Fact::SessionInteractive { .. }
            | Fact::SessionProcessEnded { .. } => None,
        }
    }
}

#[derive(Clone, Debug)]
pub enum Fact {
    /// A file of the container's own (upper) layer was executed, one from another
    /// filesystem than its root, or one of the image's layers that may have changed
    /// since its layer was known to equal the baseline. All others are recognised at
    /// the gate and never get here.
    Executed {
        /// In the container, whatever filesystem is mounted there.
        path: RootfsPath,
        filesystem: Filesystem,
        /// It was found running, not seen being executed.
        running: bool,
        /// How often, where it happened too often to tell of each.
        times: u64,
        state: FileState,
        lower: Option<LowerTwin>,
        process: Arc<Process>,
        /// The name under which it was called, where that differs from `path`
        /// (a symlink); `None` when equal or unknown.
        invoked_as: Option<String>,
        /// Set for a file of the image's layers.
        layer_file: Option<LayerFile>,
        /// Who has written the file, where that is known.
        writer: Option<Arc<Process>>,
    },
    /// A program mapped code of a file that is not known to be the image's own.
    Loaded {
        path: RootfsPath,
        filesystem: Filesystem,
        state: FileState,
        lower: Option<LowerTwin>,
        process: Arc<Process>,
        /// The dynamic linker was run as a program and given this file as one.
        by_linker: bool,
        /// Its mapping is shared, as no library's is.
        is_shared: bool,
        /// Who has written the file, when the change feed has just told.
        writer: Option<Arc<Process>>,
    },
    /// An interpreter of the image was started on a script from elsewhere.
    Interpreted { script: Script, process: Arc<Process> },
    /// A shell's input and output lead to one connection.
    ReverseShell {
        process: Arc<Process>,
        /// Both are the socket itself; otherwise pipes lead there.
        direct: bool,
        /// By what it was recognised, in words.
        evidence: String,
    },
    /// The container's own layer holds this at `path`.
    Present {
        path: RootfsPath,
        state: FileState,
        lower: Option<LowerTwin>,
        /// The last writer, when the change feed could still see it.
        writer: Option<Arc<Process>>,
    },
    /// Nothing is at `path` any more: a whiteout or an opaque directory hides
    /// the image's file, or the container's own file is gone.
    Absent {
        path: RootfsPath,
        /// Who removed it, where that could be seen.
        writer: Option<Arc<Process>>,
    },
    /// A package manager, whose file is one of the image's layers', is at work: what
    /// it and its descendants write is its transaction.
    PackageManager { process: Arc<Process> },
    /// Somebody or something that did not begin there is in the container.
    SessionOpened { opening: Arc<Opening> },
    /// A process of the session whose first process is `root` has become a program.
    SessionRan { root: ProcessIdentity, run: Arc<Run> },
    /// Programs that were run in it beyond those that are told one by one.
    SessionRanMore { root: ProcessIdentity, times: u64 },
    /// A process of a session has opened a terminal.
    SessionInteractive { root: ProcessIdentity, interactive: Interactive, tty: Option<String> },
    /// A process of a session has ended; if it is `root`, so has the session.
    SessionProcessEnded { root: ProcessIdentity, process: ProcessIdentity, exit: Option<Exit> },
}

/// What an interpreter runs.
#[derive(Clone, Debug)]
pub enum Script {
    File {
        path: RootfsPath,
        filesystem: Filesystem,
        state: FileState,
        lower: Option<LowerTwin>,
    },
    /// Its text came through a pipe, from this program if that could be told.
    Pipe {
        from: Option<String>,
    },
}

/// A file of the image's layers as a container's overlay shows it, and since when
/// it is as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerFile {
    pub device: u64,
    pub inode: u64,
    pub changed: FileTime,
}

/// What the layers on disk hold at the same path below an upper file. It gives a
/// finding the SHA-256 of what was expected there, which baselines do not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowerTwin {
    pub blake3: Blake3Hash,
    pub sha256: Option<Sha256Hash>,
}
