//! The limits of a layer's blob, and why a blob is refused.

use std::io;

use crate::baseline::tar::{Fault, MAX_EXTENSION};
use crate::baseline::unpack::{MAX_NAMES, Refusal};

/// How large a layer may be. A compressed blob can hold a thousand times its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the uncompressed archive, and of the holes of sparse files when expanded.
    pub bytes: u64,
    /// Entries, and the directories that only paths of entries name.
    pub entries: u64,
}

/// Why a blob is no layer, or none that can be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the blob at byte {at}")]
    Read { at: u64, source: io::Error },
    #[error("the blob is truncated at byte {at} (pull the image again)")]
    Truncated { at: u64 },
    #[error("the blob is not a layer's archive: it looks like {0}")]
    NotALayer(&'static str),
    #[error("the blob is not {format} all through: {reason}, before byte {at}")]
    Corrupt { format: &'static str, at: u64, reason: String },
    #[error("the archive in the blob is truncated at byte {at}, in the middle of an entry")]
    ArchiveTruncated { at: u64 },
    #[error("containerd would not unpack the archive: the header at its byte {at}: {why}")]
    Header { at: u64, why: &'static str },
    #[error(
        "the extended header at byte {at} of the archive is larger than {MAX_EXTENSION} bytes, the limit"
    )]
    Extension { at: u64 },
    #[error("containerd would not unpack the archive, or not always alike: {path} {why}")]
    Entry { path: String, why: &'static str },
    #[error(
        "the layer is larger than {0} bytes uncompressed (the setting `baseline.max_layer_bytes`)"
    )]
    Bytes(u64),
    #[error("the layer has more than {0} entries (the setting `baseline.max_layer_entries`)")]
    Entries(u64),
    #[error("the names of the layer's files take more than {MAX_NAMES} bytes, the limit")]
    Names,
    #[error("driftd is being stopped")]
    Stopped,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        match fault {
            Fault::Io(source) => Error::Read { at: 0, source },
            Fault::Truncated { at } => Error::ArchiveTruncated { at },
            Fault::Malformed { at, why } => Error::Header { at, why },
            Fault::Extension { at } => Error::Extension { at },
        }
    }
}

pub(super) fn refused(refusal: Refusal, entries: u64) -> Error {
    match refusal {
        Refusal::Entry { path, why } => Error::Entry { path, why },
        Refusal::Names => Error::Names,
        Refusal::Entries => Error::Entries(entries),
    }
}
