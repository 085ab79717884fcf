//! The copy of one file of a container, by its descriptor.
//!
//! Holes stay holes. A file that is not longer than it may be is kept as it is; of a longer one,
//! the parts with data are kept one after the other, as many as may be. A container can change the
//! file meanwhile: what was read is what is hashed and kept, and the entry says so.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt as _;

use sha2::{Digest as _, Sha256};

use super::draft::{Cut, Draft, failed};
use super::entry::Entry;
use crate::model::Sha256Hash;
use crate::sys::extents::{next_data, read_at};
use crate::sys::file::{self, Stat};

const CHUNK: usize = 256 << 10;
/// How many parts of one file are listed.
const MOST_EXTENTS: usize = 4096;
const TOO_LONG: &str = "it is longer than evidence.max_file_bytes";

/// Copies an open regular file into the case, and says in the entry what was kept. An error ends
/// the take, after what was read of this file is kept.
pub(super) fn copy(
    draft: &mut Draft,
    from: BorrowedFd<'_>,
    before: &Stat,
    most: u64,
    entry: &mut Entry,
) -> Result<(), Cut> {
    let (path, to) = draft.object()?;
    let mut copy = Copy {
        from,
        to,
        hash: Sha256::new(),
        at: 0,
        stored: 0,
        extents: (before.size > most).then(Vec::new),
        buffer: vec![0; CHUNK],
    };
    let ended = copy.all(draft, before.size, most);
    let cut = match &ended {
        Ok(End::Whole) if before.size <= most => None,
        Ok(End::Whole | End::Limit) => Some(TOO_LONG.to_owned()),
        Ok(End::Shorter) => None,
        Ok(End::Unreadable(why)) => Some(format!("it could not be read to its end: {why}")),
        Err(Cut(why)) => Some(why.clone()),
    };
    let Copy { hash, at, stored, mut extents, to, .. } = copy;
    if let Some(extents) = &mut extents {
        extents.retain(|(_, length)| *length > 0);
    }
    let after = file::stat(from).ok();
    let is_same = after.is_some_and(|after| {
        (after.size, after.changed, after.modified)
            == (before.size, before.changed, before.modified)
    });
    let digest = Sha256Hash(hash.finalize().into());
    let length = if extents.is_some() { stored } else { at };
    // A write that has failed may have left more.
    to.set_len(length).map_err(|err| failed(&err))?;
    draft.name_object(&path, digest, length)?;
    entry.object = Some(digest);
    entry.stored = stored;
    entry.extents = extents;
    entry.cut = cut;
    entry.unstable = !is_same || matches!(ended, Ok(End::Shorter));
    ended.map(drop)
}

/// How a copy has ended.
enum End {
    Whole,
    /// As much as may be kept.
    Limit,
    /// The file became shorter meanwhile.
    Shorter,
    Unreadable(String),
}

struct Copy<'a> {
    from: BorrowedFd<'a>,
    to: File,
    hash: Sha256,
    /// How far the object goes, with its holes.
    at: u64,
    /// How many bytes were read.
    stored: u64,
    /// The parts, if they are kept one after the other.
    extents: Option<Vec<(u64, u64)>>,
    buffer: Vec<u8>,
}

impl Copy<'_> {
    fn all(&mut self, draft: &mut Draft, size: u64, most: u64) -> Result<End, Cut> {
        let mut from = 0;
        loop {
            let found = match next_data(self.from, from, size) {
                Ok(found) => found,
                Err(err) => return Ok(End::Unreadable(err.to_string())),
            };
            let Some((begin, end)) = found else { break };
            if let Some(extents) = &mut self.extents {
                if extents.len() >= MOST_EXTENTS {
                    return Ok(End::Limit);
                }
                extents.push((begin, 0));
            } else {
                self.skip_to(draft, begin)?;
            }
            from = end;
            if let Some(ended) = self.part(draft, begin, end, most)? {
                return Ok(ended);
            }
        }
        if self.extents.is_none() {
            self.skip_to(draft, size)?;
        }
        Ok(End::Whole)
    }

    /// Copies one part with data.
    fn part(
        &mut self,
        draft: &mut Draft,
        begin: u64,
        end: u64,
        most: u64,
    ) -> Result<Option<End>, Cut> {
        let mut offset = begin;
        while offset < end {
            let may = most.saturating_sub(self.stored);
            if may == 0 {
                return Ok(Some(End::Limit));
            }
            let want = (end - offset).min(may).min(CHUNK as u64);
            draft.claim(want)?;
            let want = usize::try_from(want).unwrap_or(CHUNK);
            let read = match read_at(self.from, &mut self.buffer[..want], offset) {
                Ok(read) => read,
                Err(err) => return Ok(Some(End::Unreadable(err.to_string()))),
            };
            draft.unclaim((want - read) as u64);
            if read == 0 {
                return Ok(Some(End::Shorter));
            }
            let to = if self.extents.is_some() { self.stored } else { offset };
            self.to.write_all_at(&self.buffer[..read], to).map_err(|err| failed(&err))?;
            self.hash.update(&self.buffer[..read]);
            offset += read as u64;
            self.stored += read as u64;
            match &mut self.extents {
                Some(extents) => {
                    if let Some((_, length)) = extents.last_mut() {
                        *length += read as u64;
                    }
                }
                None => self.at = offset,
            }
        }
        Ok(None)
    }

    /// Leaves a hole up to an offset. It counts like data: an archive of the case has it.
    fn skip_to(&mut self, draft: &mut Draft, offset: u64) -> Result<(), Cut> {
        const ZEROS: [u8; 16 << 10] = [0; 16 << 10];
        if offset <= self.at {
            return Ok(());
        }
        draft.claim(offset - self.at)?;
        self.to.set_len(offset).map_err(|err| failed(&err))?;
        while self.at < offset {
            let length = (offset - self.at).min(ZEROS.len() as u64);
            self.hash.update(&ZEROS[..usize::try_from(length).unwrap_or_default()]);
            self.at += length;
        }
        Ok(())
    }
}
