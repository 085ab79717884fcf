//! What a case says of one file of the container, in `files.jsonl`.
//!
//! A published JSON schema (docs/evidence.md). Values only.

use serde::{Deserialize, Serialize};

use crate::model::finding::octal;
use crate::model::{
    FileTime, FileType, FindingId, ProcessIdentity, RootfsPath, Sha256Hash, printable,
};
use crate::sys::file::Stat;

/// Why a file is in the case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Why {
    /// A finding names it.
    Finding,
    /// A process runs it.
    Executable,
}

/// A file of the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    #[serde(flatten)]
    pub(super) path: RootfsPath,
    pub(super) why: Why,
    pub(super) finding: Option<FindingId>,
    pub(super) process: Option<ProcessIdentity>,
    /// How it was there; null if it was not found.
    pub(super) found: Option<Found>,
    /// The file of the case that has its content: `objects/` and this.
    pub(super) object: Option<Sha256Hash>,
    /// How many bytes of it are kept.
    pub(super) stored: u64,
    /// The parts that the object has, one after the other: where each begins in the file, and how
    /// long it is. Null if the object is the file as it is, or its beginning.
    pub(super) extents: Option<Vec<(u64, u64)>>,
    /// Why the object is not the whole file.
    pub(super) cut: Option<String>,
    /// It has changed while it was read.
    pub(super) unstable: bool,
    /// Why there is no object.
    pub(super) not_taken: Option<String>,
}

/// How a file was there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    #[serde(rename = "type")]
    pub(super) file_type: FileType,
    /// Octal, four digits.
    pub(super) mode: String,
    /// In the host's numbering.
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) links: u32,
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) changed: FileTime,
    pub(super) modified: FileTime,
    pub(super) born: Option<FileTime>,
    /// A device's major and minor number.
    pub(super) node: Option<(u32, u32)>,
    /// The text of a symlink, escaped. It was not followed.
    pub(super) target: Option<String>,
}

impl Found {
    pub(super) fn of(stat: &Stat, target: Option<&[u8]>) -> Found {
        let is_node = matches!(stat.file_type, FileType::CharDevice | FileType::BlockDevice);
        Found {
            file_type: stat.file_type,
            mode: octal(stat.mode),
            uid: stat.uid,
            gid: stat.gid,
            size: stat.size,
            links: stat.links,
            device: stat.device,
            inode: stat.inode,
            changed: stat.changed,
            modified: stat.modified,
            born: stat.born,
            node: is_node.then_some(stat.node),
            target: target.map(printable),
        }
    }

    /// Whether this is the same content, as far as its inode shows.
    pub(super) fn is_same(&self, stat: &Stat) -> bool {
        (self.device, self.inode, self.size, self.changed, self.modified)
            == (stat.device, stat.inode, stat.size, stat.changed, stat.modified)
    }
}

impl Entry {
    pub(super) fn new(path: RootfsPath, why: Why) -> Entry {
        Entry {
            path,
            why,
            finding: None,
            process: None,
            found: None,
            object: None,
            stored: 0,
            extents: None,
            cut: None,
            unstable: false,
            not_taken: None,
        }
    }

    pub(super) fn not_taken(mut self, why: impl Into<String>) -> Entry {
        self.not_taken = Some(why.into());
        self
    }
}
