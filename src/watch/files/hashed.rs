//! Hashes of files that are executed or loaded again and again, for all containers.
//!
//! `exec` and `code` use it so that such a file is not read each time. An entry is found by
//! device, inode, ctime and size, and is valid for a short time only. This file does not
//! decide whether a file may have changed after the check: that is `closings` and `exec`.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::state::{self, Which};
use crate::model::{Content, FileState, FileTime};
use crate::sys::door::{self, Local};
use crate::sys::file::Stat;

/// Hashes of files, so that one that is loaded all the time is read once in a while and not
/// each time.
///
/// They expire, because the ctime does not show every change: stores through a shared mapping
/// into a page that was dirty already leave it as it was.
#[derive(Debug, Default)]
pub(crate) struct Hashed {
    pub(crate) known: Mutex<HashMap<Key, Known>>,
}

/// Changes whenever the file's content changes, except by such stores.
pub(crate) type Key = (u64, u64, FileTime, u64);

#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) state: FileState,
    pub(crate) until: Instant,
}

/// More files than this are not remembered.
pub(crate) const MAX_KNOWN: usize = 4096;

/// How long a hash is valid: at least `GOOD_FOR`, and at least `TIMES_ITS_COST` times as long
/// as hashing took, so that hashing one file repeatedly takes a twentieth of a processor.
pub(crate) const GOOD_FOR: Duration = Duration::from_secs(1);

pub(crate) const TIMES_ITS_COST: u32 = 20;

/// A filesystem's clock may stand still for this long.
pub(crate) const SETTLED: Duration = Duration::from_millis(100);

pub(crate) fn key(stat: &Stat) -> Key {
    (stat.device, stat.inode, stat.changed, stat.size)
}

impl Hashed {
    /// The content of an executed file; `None` if it is not known for certain. A file cannot be
    /// executed while it is open for writing, and has another ctime after that.
    pub(crate) fn of_executed(&self, stat: &Stat) -> Option<FileState> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get(&key(stat)).filter(|known| known.until > Instant::now())?;
        Some(FileState { deleted: stat.links == 0, ..known.state.clone() })
    }

    /// Remembers the content of an executed file, unless a later change might get the same
    /// ctime.
    pub(crate) fn remember_executed(&self, stat: &Stat, state: &FileState) {
        let is_hashed = matches!(state.content, Content::Hashed { .. });
        let is_settled = stat.age().is_some_and(|age| age > SETTLED);
        if is_hashed && is_settled {
            self.remember(key(stat), state.clone(), Instant::now() + GOOD_FOR);
        }
    }

    pub(crate) fn remember(&self, key: Key, state: FileState, until: Instant) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(key, Known { state, until });
    }

    pub(crate) fn state(
        &self,
        file: &OwnedFd,
        stat: &Stat,
        local: Local,
        max_hash_bytes: u64,
    ) -> FileState {
        let key = key(stat);
        let begun = Instant::now();
        {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = known.get(&key).filter(|known| known.until > begun) {
                let mut state = known.state.clone();
                state.deleted = stat.links == 0;
                return state;
            }
        }
        let Ok(readable) = door::reopen(file.as_fd(), local) else {
            return state::unopened(stat);
        };
        let state = state::of(readable.as_fd(), stat, Which::Always, max_hash_bytes);
        let until = Instant::now() + GOOD_FOR.max(begun.elapsed() * TIMES_ITS_COST);
        self.remember(key, state.clone(), until);
        state
    }
}
