//! Why a walk ends before its end.

use std::path::PathBuf;

use rustix::io::Errno;

use crate::model::RootfsPath;

/// Why a layer could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "cannot open the layer directory {} (was the image removed or its layer cleaned up? pull the image again)",
        directory.display()
    )]
    Directory { directory: PathBuf, source: Errno },
    #[error("cannot {doing} {path} in the layer directory {}", directory.display())]
    Entry { directory: PathBuf, path: RootfsPath, doing: &'static str, source: Errno },
    #[error(
        "{path} in the layer directory {} changed while it was read; a layer that still changes has no baseline",
        directory.display()
    )]
    Changed { directory: PathBuf, path: RootfsPath },
    #[error(
        "{path} in the layer directory {} has the attribute {attribute}, whose meaning driftd does not know",
        directory.display()
    )]
    Unsupported { directory: PathBuf, path: RootfsPath, attribute: &'static str },
    #[error("the name `{name}` in {path} in the layer directory {} is too long or no name", directory.display())]
    Name { directory: PathBuf, path: RootfsPath, name: String },
    #[error("driftd is being stopped")]
    Stopped,
}

/// Why one entry ends the walk. The walk adds the path.
#[derive(Clone, Copy)]
pub(super) enum EntryError {
    Failed(&'static str, Errno),
    Changed,
    Unsupported(&'static str),
}

impl EntryError {
    pub(super) fn at(doing: &'static str) -> impl Fn(Errno) -> EntryError {
        move |errno| match errno {
            // The entry existed a moment ago, or had another type.
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::STALE => EntryError::Changed,
            _ => EntryError::Failed(doing, errno),
        }
    }
}

/// Why a walk ends early.
pub(super) enum WalkEnd<E> {
    /// The walk has failed, and keeps the reason.
    Failed,
    /// The function that receives the entries has refused one.
    Refused(E),
}
