//! What one layer holds at a path, and the order of paths.
//!
//! Paths are ordered component by component: `/` sorts before every other byte. So a
//! directory is followed by its whole subtree (`/a`, `/a/b`, `/a-b`; plain byte order
//! would put `/a-b` in between), and a subtree is a range.

use std::cmp::Ordering;

use crate::model::{Blake3Hash, FileType, Format, LayerId, RootfsPath};

/// A file, directory, link or device of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    pub path: RootfsPath,
    pub file_type: FileType,
    /// `Unknown` for anything that is not a regular file.
    pub format: Format,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// 0 for anything that is not a regular file or a symlink.
    pub size: u64,
    /// Every regular file has it, and nothing else.
    pub blake3: Option<Blake3Hash>,
    /// The raw `security.capability` xattr.
    pub capability: Option<Box<[u8]>>,
    /// Every symlink has it, and nothing else.
    pub link_target: Option<Box<[u8]>>,
    /// Every device has it, and nothing else.
    pub device: Option<Device>,
}

impl FileEntry {
    /// A directory that root owns. With other fields set, it serves for any other entry.
    pub fn directory(path: RootfsPath, mode: u32) -> FileEntry {
        FileEntry {
            path,
            file_type: FileType::Directory,
            format: Format::Unknown,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            blake3: None,
            capability: None,
            link_target: None,
            device: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

/// What a layer holds at one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerEntry {
    /// Hides what the layers below hold at this path.
    Whiteout(RootfsPath),
    File(FileEntry),
    /// A directory that hides what the layers below hold in it.
    OpaqueDirectory(FileEntry),
}

impl LayerEntry {
    pub fn path(&self) -> &RootfsPath {
        match self {
            LayerEntry::Whiteout(path) => path,
            LayerEntry::File(entry) | LayerEntry::OpaqueDirectory(entry) => &entry.path,
        }
    }
}

/// The longest path that a baseline holds: `PATH_MAX` of the kernel.
pub const MAX_PATH: usize = 4096;

/// Orders paths so that a directory's subtree follows it directly.
pub fn compare_paths(one: &[u8], other: &[u8]) -> Ordering {
    // No path holds a NUL, so NUL can stand for the slash.
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    let common = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    match (one.get(common), other.get(common)) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) => Ordering::Less,
        (Some(_), None) => Ordering::Greater,
        (Some(&a), Some(&b)) => rank(a).cmp(&rank(b)),
    }
}

/// Whether `path` lies below `directory` (and is not `directory` itself).
pub(crate) fn is_below(path: &[u8], directory: &[u8]) -> bool {
    match directory {
        b"/" => path.len() > 1,
        _ => path.strip_prefix(directory).is_some_and(|rest| rest.starts_with(b"/")),
    }
}

/// The directory that holds `path`; `None` for the root.
pub(crate) fn parent_of(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|&byte| byte == b'/')?;
    match (slash, path.len()) {
        (0, 1) => None,
        (0, _) => Some(b"/"),
        _ => Some(&path[..slash]),
    }
}

/// Parses the text form of a layer's identity.
pub(crate) fn parse_layer_id(text: &str) -> Option<LayerId> {
    match text.strip_prefix("chain-") {
        Some(chain_id) => chain_id.parse().ok().map(LayerId::Chain),
        None => text.parse().ok().map(LayerId::Diff),
    }
}
