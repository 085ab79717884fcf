//! Facts as the kernel or a scan reported them. No judgement.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Blake3Hash, ContainerId, FileState, FileTime, Process, RootfsPath, Sha256Hash};

/// Who saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The gate: a program was about to run.
    Gate,
    /// The change feed: a file was closed after writing.
    Change,
    /// A walk of the upperdir, or of the container's processes.
    Scan,
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Gate => "gate",
            Source::Change => "change",
            Source::Scan => "scan",
        }
    }
}

/// One fact about one container.
#[derive(Clone, Debug)]
pub struct Observation {
    pub container: ContainerId,
    pub at: Timestamp,
    pub source: Source,
    pub fact: Fact,
}

#[derive(Clone, Debug)]
pub enum Fact {
    /// A file of the container's own (upper) layer was executed, or one of the
    /// image's layers that may have changed since its layer was known to equal the
    /// baseline. All others are recognised at the gate and never get here.
    Executed {
        path: RootfsPath,
        state: FileState,
        lower: Option<LowerTwin>,
        process: Arc<Process>,
        /// The name under which it was called, where that differs from `path`
        /// (a symlink); `None` when equal or unknown.
        invoked_as: Option<String>,
        /// Set for a file of the image's layers.
        layer_file: Option<LayerFile>,
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
    Absent { path: RootfsPath },
    /// A process of the container whose parent is outside of it, and that is not
    /// the container's init.
    SessionOpened { process: Arc<Process> },
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
    pub sha256: Sha256Hash,
}
