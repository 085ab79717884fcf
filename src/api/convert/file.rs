//! What a finding records about a file, and what the image has in its place.
//!
//! A path may be any bytes, so it is never text in the proto. The names of file types and
//! formats are those of the JSON.

use super::value::{Malformed, malformed, missing, parsed};
use crate::api::proto;
use crate::model::{Expected, FileEvidence, FileType, Format, RootfsPath};

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

pub(super) fn file_from_proto(file: proto::File) -> Result<FileEvidence, Malformed> {
    Ok(FileEvidence {
        path: RootfsPath::new(file.path).map_err(malformed("file.path"))?,
        file_type: FILE_TYPES
            .into_iter()
            .find(|one| file_type_name(*one) == file.file_type)
            .ok_or_else(|| missing("file.file_type"))?,
        format: FORMATS
            .into_iter()
            .find(|one| one.name() == file.format)
            .ok_or_else(|| missing("file.format"))?,
        mode: file.mode,
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: file.capability,
        blake3: parsed("file.blake3", file.blake3)?,
        sha256: parsed("file.sha256", file.sha256)?,
        unhashed: file.unhashed,
        deleted: file.deleted,
        filesystem: file.filesystem,
    })
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

pub(super) fn expected_from_proto(expected: proto::ExpectedFile) -> Result<Expected, Malformed> {
    Ok(Expected {
        path: RootfsPath::new(expected.path).map_err(malformed("expected.path"))?,
        blake3: parsed("expected.blake3", expected.blake3)?,
        sha256: parsed("expected.sha256", expected.sha256)?,
        mode: expected.mode,
        uid: expected.uid,
        gid: expected.gid,
        size: expected.size,
        capability: expected.capability,
        layer: expected.layer,
    })
}

pub(super) const FILE_TYPES: [FileType; 7] = [
    FileType::Regular,
    FileType::Directory,
    FileType::Symlink,
    FileType::CharDevice,
    FileType::BlockDevice,
    FileType::Fifo,
    FileType::Socket,
];

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

pub(super) const FORMATS: [Format; 7] = [
    Format::Elf,
    Format::ElfObject,
    Format::KernelModule,
    Format::Script,
    Format::Data,
    Format::Empty,
    Format::Unknown,
];
