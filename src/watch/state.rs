//! An open file as the model's `FileState`.

use std::os::fd::BorrowedFd;

use sha2::Digest as _;

use super::lower::looks_like_program;
use super::take::Copy;
use crate::model::{Blake3Hash, Content, FileState, FileType, Format, Sha256Hash, Unhashed};
use crate::sys::file::{self, Stat};
use crate::threads;

/// Which files' content is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hashing {
    /// It is being executed, or its path is watched: so whatever it is.
    Always,
    /// Programs, by their first bytes or their mode.
    Programs,
}

/// The state of something that is not a regular file, or cannot be opened.
pub(super) fn unopened(stat: &Stat) -> FileState {
    let why = match stat.file_type {
        FileType::Regular => Unhashed::Unreadable,
        _ => Unhashed::NotRegular,
    };
    FileState {
        file_type: stat.file_type,
        format: Format::Unknown,
        mode: stat.mode,
        uid: stat.uid,
        gid: stat.gid,
        size: stat.size,
        capability: None,
        content: Content::Unhashed(why),
        deleted: stat.links == 0,
        could_change: false,
    }
}

/// The state of a symlink whose target matters: the text of it is its content.
pub(super) fn of_link(stat: &Stat, target: &[u8]) -> FileState {
    let content = Content::Hashed {
        blake3: Blake3Hash(*blake3::hash(target).as_bytes()),
        sha256: Sha256Hash(sha2::Sha256::digest(target).into()),
    };
    FileState { content, ..unopened(stat) }
}

/// What is left to tell of a file that nobody can look at any more.
pub(super) fn gone(deleted: bool) -> FileState {
    FileState {
        file_type: FileType::Regular,
        format: Format::Unknown,
        mode: 0,
        uid: 0,
        gid: 0,
        size: 0,
        capability: None,
        content: Content::Unhashed(Unhashed::Gone),
        deleted,
        could_change: false,
    }
}

/// The state of a file of which there is a copy.
pub(super) fn of_copy(copy: &Copy, stat: &Stat) -> FileState {
    let bytes = copy.bytes();
    let file::Hashes { blake3, sha256 } = file::hash_bytes(bytes);
    FileState {
        format: Format::sniff(&bytes[..bytes.len().min(Format::HEAD)]),
        capability: copy.capability(),
        content: Content::Hashed { blake3, sha256 },
        ..unopened(stat)
    }
}

/// The state of what was mounted somewhere and cannot be asked.
pub(super) fn of_mount() -> FileState {
    FileState {
        file_type: FileType::Directory,
        content: Content::Unhashed(Unhashed::NotRegular),
        ..gone(false)
    }
}

/// The state of an open file. `stat` is what its metadata is taken from, `file`
/// its content: of a metadata-only copy they are two inodes.
pub(super) fn of(
    file: BorrowedFd<'_>,
    stat: &Stat,
    hashing: Hashing,
    max_hash_bytes: u64,
) -> FileState {
    while_wanted(file, stat, hashing, max_hash_bytes, &|| true).unwrap_or_else(|| unopened(stat))
}

/// The same, given up as soon as nobody wants it any more: `None`.
pub(super) fn while_wanted(
    file: BorrowedFd<'_>,
    stat: &Stat,
    hashing: Hashing,
    max_hash_bytes: u64,
    is_wanted: &dyn Fn() -> bool,
) -> Option<FileState> {
    let mut state = unopened(stat);
    if !stat.is_regular() {
        return Some(state);
    }
    state.capability = file::xattr(file, "security.capability").unwrap_or(None);
    let Ok(format) = file::sniff(file) else { return Some(state) };
    state.format = format;
    state.content = match hashing {
        Hashing::Programs if !looks_like_program(format, stat.mode) => {
            Content::Unhashed(Unhashed::NotAProgram)
        }
        Hashing::Programs | Hashing::Always => content(file, max_hash_bytes, is_wanted)?,
    };
    Some(state)
}

fn content(
    file: BorrowedFd<'_>,
    max_hash_bytes: u64,
    is_wanted: &dyn Fn() -> bool,
) -> Option<Content> {
    // A file that changes while it is read has a hash that it never had.
    // A large file is read for minutes, and each part of it is progress.
    let is_wanted = || {
        threads::beat();
        is_wanted()
    };
    for _ in 0..3 {
        let Ok(before) = file::stat(file) else { break };
        if before.size > max_hash_bytes {
            return Some(Content::Unhashed(Unhashed::Size));
        }
        let hashes = match file::hash_while(file, max_hash_bytes, &is_wanted) {
            Ok(file::Hashed::Whole(hashes)) => hashes,
            Ok(file::Hashed::TooLong) => return Some(Content::Unhashed(Unhashed::Size)),
            Ok(file::Hashed::Unwanted) => return None,
            Err(_) => break,
        };
        if file::stat(file)
            .is_ok_and(|after| (after.modified, after.size) == (before.modified, before.size))
        {
            return Some(Content::Hashed { blake3: hashes.blake3, sha256: hashes.sha256 });
        }
    }
    Some(Content::Unhashed(Unhashed::Unreadable))
}
