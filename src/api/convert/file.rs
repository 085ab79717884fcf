//! What a finding records about a file, and what the image has in its place.
//!
//! A path may be any bytes, so it is never text in the proto. The names of file types and
//! formats are those of the JSON.

use crate::api::proto;
use crate::model::{Expected, FileEvidence, FileType};

pub(super) fn file_to_proto(file: FileEvidence) -> proto::File {
    proto::File {
        path: file.path.as_bytes().to_vec(),
        file_type: file_type_name(file.file_type).into(),
        format: file.format.name().into(),
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: file.capability,
        blake3: file.blake3.map(|hash| hash.to_string()),
        sha256: file.sha256.map(|hash| hash.to_string()),
        unhashed: file.unhashed,
        deleted: file.deleted,
        filesystem: file.filesystem,
    }
}

pub(super) fn expected_to_proto(expected: Expected) -> proto::ExpectedFile {
    proto::ExpectedFile {
        path: expected.path.as_bytes().to_vec(),
        blake3: expected.blake3.map(|hash| hash.to_string()),
        sha256: expected.sha256.map(|hash| hash.to_string()),
        mode: expected.mode,
        uid: expected.uid,
        gid: expected.gid,
        size: expected.size,
        capability: expected.capability,
        layer: expected.layer,
    }
}

/// The name that JSON has for it, too.
pub fn file_type_name(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Regular => "regular",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::CharDevice => "char_device",
        FileType::BlockDevice => "block_device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
    }
}
