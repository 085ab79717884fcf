//! Builds the model's `FileState` from an open file: metadata, format and hash.
//!
//! All threads that hash files use it. A [`Reading`] can be put aside between slices, so that
//! a large file of one container does not delay another. Opening files is left to callers,
//! except for [`reopen`], which needs the proof of `sys::door` that reading cannot block.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sha2::Digest as _;

use crate::model::file::is_program;
use crate::model::{
    Blake3Hash, Content, CouldChange, FileState, FileType, Format, Sha256Hash, Unhashed,
};
use crate::sys::door::{self, Local};
use crate::sys::file::{self, Stat};
use crate::sys::hash::{self, Hashed, Hashes, Hashing};
use crate::threads;
use crate::watch::core::copy::Copy;

/// Which files are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Any file: it is being executed, its path is watched, or the image has a program there.
    Always,
    /// Only programs as the judgement defines them: data with an executable bit is not one, nor
    /// is a script without it. There may be much of both, written again and again.
    Programs,
}

/// The state of something that is not a regular file, or cannot be opened.
pub(crate) fn unopened(stat: &Stat) -> FileState {
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
        could_change: CouldChange::No,
    }
}

/// The state of a symlink whose target matters: its content is the text of the target.
pub(crate) fn of_link(stat: &Stat, target: &[u8]) -> FileState {
    let content = Content::Hashed {
        blake3: Blake3Hash(*blake3::hash(target).as_bytes()),
        sha256: Some(Sha256Hash(sha2::Sha256::digest(target).into())),
    };
    FileState { content, ..unopened(stat) }
}

/// The state of a file that cannot be examined any more.
pub(crate) fn gone(deleted: bool) -> FileState {
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
        could_change: CouldChange::No,
    }
}

/// The state of a file, from a copy of its content.
pub(crate) fn of_copy(copy: &Copy, stat: &Stat) -> FileState {
    let bytes = copy.bytes();
    let Hashes { blake3, sha256 } = hash::hash_bytes(bytes);
    FileState {
        format: Format::sniff(&bytes[..bytes.len().min(Format::HEAD)]),
        capability: copy.capability(),
        content: Content::Hashed { blake3, sha256 },
        ..unopened(stat)
    }
}

/// The state of a mount whose filesystem must not be accessed.
pub(crate) fn of_mount() -> FileState {
    FileState {
        file_type: FileType::Directory,
        content: Content::Unhashed(Unhashed::NotRegular),
        ..gone(false)
    }
}

/// How many bytes are read before the caller decides whether to continue.
pub(crate) const SLICE: u64 = 1 << 20;

/// A file that is being read. It can be put aside at any time.
#[derive(Debug)]
pub(crate) struct Reading {
    state: FileState,
    before: Stat,
    hash: Hashing,
    attempts: u32,
    /// The bytes of attempts that were given up.
    wasted: u64,
    max_hash_bytes: u64,
}

/// What is known of a file before its content is read.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "lives on the stack for a moment")]
pub(crate) enum Begun {
    Known(FileState),
    Reads(Reading),
}

/// A file that changes while it is read is read again: the hash would match no content that
/// the file ever had.
const ATTEMPTS: u32 = 3;

impl Reading {
    /// Begins to read an open file. The metadata is taken from `stat` and the content from
    /// `file`: for a metadata-only copy they are two inodes.
    pub(crate) fn begin(
        file: BorrowedFd<'_>,
        stat: &Stat,
        which: Which,
        max_hash_bytes: u64,
    ) -> Begun {
        let mut state = unopened(stat);
        if !stat.is_regular() {
            return Begun::Known(state);
        }
        state.capability = file::xattr(file, "security.capability").unwrap_or(None);
        let Ok(format) = file::sniff(file) else { return Begun::Known(state) };
        state.format = format;
        let is_wanted = which == Which::Always || is_program(format, stat.mode);
        if !is_wanted {
            state.content = Content::Unhashed(Unhashed::NotAProgram);
            return Begun::Known(state);
        }
        let Ok(before) = file::stat(file) else { return Begun::Known(state) };
        if before.size > max_hash_bytes {
            state.content = Content::Unhashed(Unhashed::Size);
            return Begun::Known(state);
        }
        let hash = Hashing::new(max_hash_bytes);
        Begun::Reads(Reading { state, before, hash, attempts: 1, wasted: 0, max_hash_bytes })
    }

    /// Reads one more slice. `None`: there is more to read.
    pub(crate) fn step(&mut self, file: BorrowedFd<'_>, slice: u64) -> Option<FileState> {
        threads::beat();
        let content = match self.hash.step(file, slice) {
            Ok(None) => return None,
            Ok(Some(Hashed::TooLong)) => Content::Unhashed(Unhashed::Size),
            Ok(Some(Hashed::Whole(hashes))) => {
                let Hashes { blake3, sha256 } = hashes;
                let after = file::stat(file);
                let is_same = after.as_ref().is_ok_and(|after| {
                    (after.modified, after.size) == (self.before.modified, self.before.size)
                });
                match after {
                    Ok(_) if is_same => Content::Hashed { blake3, sha256 },
                    Ok(after) if self.attempts < ATTEMPTS => {
                        self.attempts += 1;
                        self.before = after;
                        self.wasted += self.hash.cost();
                        self.hash = Hashing::new(self.max_hash_bytes);
                        return None;
                    }
                    _ => Content::Unhashed(Unhashed::Unreadable),
                }
            }
            Err(_) => Content::Unhashed(Unhashed::Unreadable),
        };
        Some(FileState { content, ..self.state.clone() })
    }

    /// How many bytes have been read or computed so far.
    pub(crate) fn cost(&self) -> u64 {
        self.wasted + self.hash.cost()
    }
}

/// The state of an open file, see [`Reading::begin`].
pub(crate) fn of(
    file: BorrowedFd<'_>,
    stat: &Stat,
    which: Which,
    max_hash_bytes: u64,
) -> FileState {
    while_wanted(file, stat, which, max_hash_bytes, &|| true).unwrap_or_else(|| unopened(stat))
}

/// Like [`of`], but returns `None` as soon as the state is not wanted any more.
pub(crate) fn while_wanted(
    file: BorrowedFd<'_>,
    stat: &Stat,
    which: Which,
    max_hash_bytes: u64,
    is_wanted: &dyn Fn() -> bool,
) -> Option<FileState> {
    let mut reading = match Reading::begin(file, stat, which, max_hash_bytes) {
        Begun::Known(state) => return Some(state),
        Begun::Reads(reading) => reading,
    };
    loop {
        if let Some(state) = reading.step(file, SLICE) {
            return Some(state);
        }
        if !is_wanted() {
            return None;
        }
    }
}

/// The state of a file that was opened with `O_PATH`. Without the proof that reading it cannot
/// block, the state has only the metadata.
pub(crate) fn state_of(
    file: BorrowedFd<'_>,
    stat: &Stat,
    local: Option<Local>,
    max_hash_bytes: u64,
) -> FileState {
    match reopen(file, stat, local) {
        Some(file) => of(file.as_fd(), stat, Which::Always, max_hash_bytes),
        None => unopened(stat),
    }
}

/// Opens the file for reading, if reading cannot block.
pub(crate) fn reopen(file: BorrowedFd<'_>, stat: &Stat, local: Option<Local>) -> Option<OwnedFd> {
    let readable = local.filter(|_| stat.is_regular());
    readable.and_then(|local| door::reopen(file, local).ok())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn w04_data_is_not_hashed_in_any_mode_and_programs_are_hashed_whole() {
        const SIZE: u64 = 4 << 20;
        let check = |head: &[u8], mode: u32, which: Which, expected: u64| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&vec![b'x'; 4 << 20], 0).unwrap();
            file.write_all_at(head, 0).unwrap();
            rustix::fs::fchmod(&file, mode.into()).unwrap();
            let stat = file::stat(&file).unwrap();
            let (hashed, state) = match Reading::begin(file.as_fd(), &stat, which, SIZE) {
                Begun::Known(state) => (0, state),
                Begun::Reads(mut reading) => loop {
                    if let Some(state) = reading.step(file.as_fd(), SLICE) {
                        break (reading.cost(), state);
                    }
                },
            };
            assert_eq!(hashed, expected, "{head:?} {mode:o} {which:?}");
            assert_eq!(state.blake3().is_some(), expected > 0);
            // A file that is hashed under `Programs` is judged as a program, and no other is.
            assert!(which == Which::Always || state.is_program() == (expected > 0));
        };
        let elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0";
        check(b"data", 0o777, Which::Programs, 0);
        check(b"data", 0o4755, Which::Programs, 0);
        check(b"#!/bin/sh\n", 0o644, Which::Programs, 0);
        check(b"#!/bin/sh\n", 0o755, Which::Programs, SIZE);
        check(elf, 0o644, Which::Programs, SIZE);
        check(b"data", 0o644, Which::Always, SIZE);
    }

    #[test]
    fn a_file_that_changes_while_it_is_put_aside_is_read_again() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        let stat = file::stat(&file).unwrap();
        let Begun::Reads(mut reading) = Reading::begin(file.as_fd(), &stat, Which::Always, 4 << 20)
        else {
            panic!("it is to be read")
        };
        assert_eq!(reading.step(file.as_fd(), SLICE), None);
        // A filesystem's clock may stand still for a moment.
        std::thread::sleep(std::time::Duration::from_millis(50));
        file.write_all_at(b"changed", 0).unwrap();
        let state = loop {
            if let Some(state) = reading.step(file.as_fd(), SLICE) {
                break state;
            }
        };
        let mut content = vec![0; 3 << 20];
        content[..7].copy_from_slice(b"changed");
        assert_eq!(state.blake3(), Some(Blake3Hash(*blake3::hash(&content).as_bytes())));
        assert!(reading.cost() > 3 << 20, "wasted reads count");
    }

    #[test]
    fn a_file_that_always_changes_is_given_up() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"x", (2 << 20) - 1).unwrap();
        let stat = file::stat(&file).unwrap();
        let mut changes = 0_u32;
        let Begun::Reads(mut reading) = Reading::begin(file.as_fd(), &stat, Which::Always, 4 << 20)
        else {
            panic!("it is to be read")
        };
        let state = loop {
            if let Some(state) = reading.step(file.as_fd(), SLICE) {
                break state;
            }
            changes += 1;
            std::thread::sleep(std::time::Duration::from_millis(20));
            file.write_all_at(&changes.to_le_bytes(), 0).unwrap();
        };
        assert_eq!(state.content, Content::Unhashed(Unhashed::Unreadable));
        assert!(changes <= 9, "{changes}");
    }
}
