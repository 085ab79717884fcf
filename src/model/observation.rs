//! Facts as the kernel or a scan reported them.
//!
//! `watch` makes them, the pipeline hands them to `detect`, which judges them. A fact has no
//! judgement, and its variant says what happened, never whether that is allowed.

use std::sync::Arc;

use jiff::Timestamp;

use super::container::ContainerId;
use super::digest::{Blake3Hash, Sha256Hash};
use super::file::{FileState, FileTime, Filesystem};
use super::path::RootfsPath;
use super::process::{Process, ProcessIdentity};
use super::session::{Exit, Interactive, Opening, Run};

/// The watcher that saw a fact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The gate: a program was about to run.
    Gate,
    /// The change feed: a file was closed after writing.
    Change,
    /// The kernel's record of an execve or of a mapping that has happened.
    Trace,
    /// A scan of the upperdir, or of the container's processes.
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
    /// The init process of the container run in which it was seen: the container's ID may
    /// mean a later run when this is read.
    pub init: ProcessIdentity,
    pub at: Timestamp,
    pub source: Source,
    /// The first process of the acting process's session, if that is known by descent.
    /// `None` also for a process whose parents have ended, because its ancestors do not
    /// lead there.
    pub session: Option<ProcessIdentity>,
    /// The container in whose root the file lies, if that is another container.
    pub file_of: Option<ContainerId>,
    /// Another path by which the container reaches the file: through a link or a mount.
    pub reached_as: Option<RootfsPath>,
    pub fact: Fact,
}

impl Observation {
    /// Whether it was denied: it was about to happen, and the kernel has refused it.
    pub fn is_denied(&self) -> bool {
        match self.fact {
            Fact::File(
                FileFact::Executed { denied, .. }
                | FileFact::Loaded { denied, .. }
                | FileFact::Interpreted { denied, .. },
            ) => denied,
            _ => false,
        }
    }

    pub fn set_denied(&mut self) {
        if let Fact::File(
            FileFact::Executed { denied, .. }
            | FileFact::Loaded { denied, .. }
            | FileFact::Interpreted { denied, .. },
        ) = &mut self.fact
        {
            *denied = true;
        }
    }

    /// How often it happened.
    pub fn times(&self) -> u64 {
        match self.fact {
            Fact::File(FileFact::Executed { times, .. }) => times,
            _ => 1,
        }
    }
}

/// What happened, by its subject: each kind of fact has its own way through the pipeline.
#[expect(
    clippy::large_enum_variant,
    reason = "most facts are about files, and a box would cost an allocation for each"
)]
#[derive(Clone, Debug)]
pub enum Fact {
    /// It is compared with the image.
    File(FileFact),
    /// It needs no image.
    Session(SessionFact),
    /// A package manager, whose file is one of the image's layers', is at work: what
    /// it and its descendants write is its transaction.
    PackageManager { process: Arc<Process> },
}

impl Fact {
    /// The acting process, if that is known.
    pub fn process(&self) -> Option<&Arc<Process>> {
        match self {
            Fact::File(fact) => fact.process(),
            Fact::Session(SessionFact::ReverseShell { process, .. })
            | Fact::PackageManager { process } => Some(process),
            Fact::Session(
                SessionFact::Opened { .. }
                | SessionFact::Ran { .. }
                | SessionFact::RanMore { .. }
                | SessionFact::Interactive { .. }
                | SessionFact::ProcessEnded { .. },
            ) => None,
        }
    }
}

/// A file of a container's filesystems: it is there, it has gone, or it is used.
#[derive(Clone, Debug)]
pub enum FileFact {
    /// A file was executed: one of the container's own (upper) layer, one on another
    /// filesystem than the root, or one of the image's layers that may have changed since
    /// its layer was known to equal the baseline. The gate recognises all others, and no
    /// observation is made of them.
    Executed {
        /// In the container, whatever filesystem is mounted there.
        path: RootfsPath,
        filesystem: Filesystem,
        /// It was found running; its execution was not seen.
        running: bool,
        /// It was about to be executed, and the kernel has refused that.
        denied: bool,
        /// How many executions this observation stands for, if there were too many to
        /// report each.
        times: u64,
        state: FileState,
        lower: Option<LowerTwin>,
        process: Arc<Process>,
        /// The name under which it was executed, if that differs from `path` (a symlink);
        /// `None` if equal or unknown.
        invoked_as: Option<String>,
        /// Set for a file of the image's layers.
        layer_file: Option<LayerFile>,
        /// The writer of the file, if that is known.
        writer: Option<Arc<Process>>,
    },
    /// A program mapped code of a file that is not known to be the image's own.
    Loaded {
        path: RootfsPath,
        filesystem: Filesystem,
        state: FileState,
        lower: Option<LowerTwin>,
        process: Arc<Process>,
        /// The dynamic linker was executed with this file as the program to run.
        by_linker: bool,
        /// The mapping is shared; the mappings of libraries are private.
        is_shared: bool,
        /// The writer of the file, if the change feed has just reported it.
        writer: Option<Arc<Process>>,
        /// It was about to be read, and the kernel has refused that.
        denied: bool,
    },
    /// An interpreter of the image was started on a script from elsewhere.
    Interpreted {
        script: Script,
        process: Arc<Process>,
        /// The writer of the script, if that is known.
        writer: Option<Arc<Process>>,
        /// It was about to be read, and the kernel has refused that.
        denied: bool,
    },
    /// The container's own layer holds this at `path`.
    Present {
        path: RootfsPath,
        state: FileState,
        lower: Option<LowerTwin>,
        /// The last writer, if the change feed could still see it.
        writer: Option<Arc<Process>>,
        /// When the file last changed (`st_ctime`).
        changed: Option<FileTime>,
    },
    /// Nothing is at `path` any more: a whiteout or an opaque directory hides
    /// the image's file, or the container's own file is gone.
    Absent {
        path: RootfsPath,
        /// The process that removed it, if that was seen.
        writer: Option<Arc<Process>>,
    },
}

impl FileFact {
    /// The process that uses the file, or the one that wrote or removed it.
    pub fn process(&self) -> Option<&Arc<Process>> {
        match self {
            FileFact::Executed { process, .. }
            | FileFact::Loaded { process, .. }
            | FileFact::Interpreted { process, .. } => Some(process),
            FileFact::Present { writer, .. } | FileFact::Absent { writer, .. } => writer.as_ref(),
        }
    }

    /// The file. Text that comes through a pipe has none.
    pub fn path(&self) -> Option<&RootfsPath> {
        match self {
            FileFact::Executed { path, .. }
            | FileFact::Loaded { path, .. }
            | FileFact::Interpreted { script: Script::File { path, .. }, .. }
            | FileFact::Present { path, .. }
            | FileFact::Absent { path, .. } => Some(path),
            FileFact::Interpreted { script: Script::Pipe { .. }, .. } => None,
        }
    }
}

/// A session in a container: it begins, it does something, it ends.
#[derive(Clone, Debug)]
pub enum SessionFact {
    /// A process from outside, or a reverse shell, is in the container.
    Opened { opening: Arc<Opening> },
    /// A process of the session whose first process is `root` has become a program.
    Ran { root: ProcessIdentity, run: Arc<Run> },
    /// More programs were run in the session than are reported one by one.
    RanMore { root: ProcessIdentity, times: u64 },
    /// A process of a session has opened a terminal.
    Interactive { root: ProcessIdentity, interactive: Interactive, tty: Option<String> },
    /// A process of a session has ended; if it is `root`, so has the session.
    ProcessEnded { root: ProcessIdentity, process: ProcessIdentity, exit: Option<Exit> },
    /// A shell's input and output lead to one connection: a session that the process itself
    /// has opened.
    ReverseShell {
        process: Arc<Process>,
        /// Both are the socket itself; otherwise pipes lead there.
        direct: bool,
        /// What shows it, as a sentence.
        evidence: String,
    },
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
    /// Its text came through a pipe, from this program if that is known.
    Pipe {
        from: Option<String>,
    },
}

/// A file of the image's layers as a container's overlay shows it, and the time of its
/// last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerFile {
    pub device: u64,
    pub inode: u64,
    pub changed: FileTime,
}

/// The content of the image's layers at the path of an upper file. It gives a finding the
/// SHA-256 of the expected file, which baselines do not keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowerTwin {
    pub blake3: Blake3Hash,
    pub sha256: Option<Sha256Hash>,
}
