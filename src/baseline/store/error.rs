//! Why the store cannot be used, and why an image is not found.
//!
//! Every message names the file and what an administrator can do about it.

use std::io;
use std::path::PathBuf;

use crate::model::LayerId;

/// Why the store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the baseline directory {} (driftd must be root, and the disk writable)", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot read the baseline {} (to record it anew, remove it)", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write the baseline {} (is the disk full? try: df {})", path.display(), path.parent().unwrap_or(path).display())]
    Write { path: PathBuf, source: io::Error },
    #[error("another process writes to {} (a running driftd's baselines are its own: name another directory)", path.display())]
    InUse { path: PathBuf },
    #[error("layer {id} cannot be a baseline: {reason}")]
    Refused { id: LayerId, reason: String },
}

/// Why a text that a user typed names no image.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error(
        "no baseline of `{text}` is known (see: driftd baseline ls; record it with: driftd baseline record IMAGE)"
    )]
    Unknown { text: String },
    #[error("`{text}` may be any of: {} (name one of these)", candidates.join(", "))]
    Ambiguous { text: String, candidates: Vec<String> },
}
