//! Why an archive is refused, with the path that is the reason.

use crate::model::printable;

/// How many bytes all names, link targets and capabilities of a layer may take.
pub const MAX_NAMES: u64 = 512 << 20;

/// Why containerd makes no tree of the archive, or driftd keeps none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// An entry that containerd would not unpack, or would not always unpack alike. The
    /// path is printable.
    Entry { path: String, why: &'static str },
    /// The names take more than [`MAX_NAMES`] bytes.
    Names,
    /// There are more entries than the limit.
    Entries,
}

pub(super) fn refuse<T>(path: &[u8], why: &'static str) -> Result<T, Refusal> {
    Err(refusal(path, why))
}

pub(super) fn refusal(path: &[u8], why: &'static str) -> Refusal {
    const SHOWN: usize = 200;
    let mut shown = printable(&path[..path.len().min(SHOWN)]);
    if path.len() > SHOWN {
        shown.push('…');
    }
    Refusal::Entry { path: shown, why }
}

pub(super) fn in_no_directory(path: &[u8]) -> Refusal {
    refusal(path, "is no directory, but another entry is in it")
}
