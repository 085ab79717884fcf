//! Why a layer is refused when it is written, and the check that its entries form a
//! tree.

use std::cmp::Ordering;
use std::io;

use super::entry::{LayerEntry, MAX_PATH, compare_paths, is_below, parent_of};
use crate::model::FileType;

/// Why a layer could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The entries form no tree, or are too many for the format.
    #[error("{0}")]
    Refused(String),
}

/// Checks that sorted entries form a tree: the root first, every path once, and every
/// entry in a directory that is an entry too.
#[derive(Debug, Default)]
pub(super) struct Tree {
    previous: Vec<u8>,
    /// The directories that lead to `previous`, itself included: for each, how many
    /// bytes of `previous` are its path.
    open: Vec<usize>,
}

impl Tree {
    pub(super) fn check(&mut self, entry: &LayerEntry) -> Result<(), WriteError> {
        let path = entry.path();
        let bytes = path.as_bytes();
        let refuse = |why: &str| Err(WriteError::Refused(format!("{path} {why}")));

        if self.previous.is_empty() && bytes != b"/" {
            return Err(WriteError::Refused(NO_ROOT.into()));
        }
        match compare_paths(&self.previous, bytes) {
            Ordering::Less => (),
            Ordering::Equal => return refuse("is named twice"),
            Ordering::Greater => return refuse("comes too late"),
        }
        if bytes.len() > MAX_PATH {
            return refuse("is longer than 4096 bytes");
        }
        while self.open.last().is_some_and(|end| !is_below(bytes, &self.previous[..*end])) {
            self.open.pop();
        }
        if self.open.last().map(|end| &self.previous[..*end]) != parent_of(bytes) {
            return refuse("is in a directory that is missing");
        }
        let directory = match entry {
            LayerEntry::Whiteout(_) => false,
            LayerEntry::File(file) => file.file_type == FileType::Directory,
            LayerEntry::OpaqueDirectory(file) if file.file_type == FileType::Directory => true,
            LayerEntry::OpaqueDirectory(_) => return refuse("is opaque but no directory"),
        };
        match (bytes, directory) {
            (_, true) => self.open.push(bytes.len()),
            (b"/", false) => return refuse("is no directory"),
            (_, false) => (),
        }
        self.previous.clear();
        self.previous.extend_from_slice(bytes);
        Ok(())
    }

    pub(super) fn finish(&self) -> Result<(), WriteError> {
        if self.previous.is_empty() { Err(WriteError::Refused(NO_ROOT.into())) } else { Ok(()) }
    }
}

const NO_ROOT: &str = "it has no root directory";
