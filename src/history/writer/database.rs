//! The databases that are written to: the one on disk, and the one in memory that stands in
//! for it.
//!
//! Holds them and switches between them. When to switch is decided in `disk` and `replaced`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rusqlite::Connection;

use crate::history::error::Error;
use crate::history::files::{Identity, NOT_OPEN, StateLock, identity_of, open};
use crate::history::memory::{self, Disk, Overlay};
use crate::history::sql::newest_seq;

pub(super) struct Database {
    pub(super) disk: Connection,
    /// The file that `disk` has open.
    pub(super) identity: Identity,
    pub(super) path: PathBuf,
    /// Written to while the disk cannot be.
    pub(super) memory: Option<Connection>,
    /// The same, for readers.
    pub(super) overlay: memory::Shared,
    /// Raised whenever readers must open their connections again.
    pub(super) generation: Arc<AtomicU64>,
    pub(super) _lock: StateLock,
}

impl Database {
    /// The database that is written to now.
    pub(super) fn current(&mut self) -> &mut Connection {
        self.memory.as_mut().unwrap_or(&mut self.disk)
    }

    /// How many records are in memory only.
    pub(super) fn in_memory(&self) -> u64 {
        self.memory.as_ref().map_or(0, Overlay::count)
    }

    /// Whether the file that is open is still the one at its path.
    pub(super) fn is_in_place(&self) -> bool {
        identity_of(&self.path).is_ok_and(|found| found == self.identity)
    }

    /// Whether no file could be opened yet.
    pub(super) fn is_not_open(&self) -> bool {
        self.identity == NOT_OPEN
    }

    pub(super) fn open(&mut self) -> Result<(), Error> {
        (self.disk, self.identity) = open(&self.path)?;
        Ok(())
    }

    pub(super) fn readers_open_again(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Begins a database in memory over the one on disk. `committed` is the newest sequence
    /// number that followers know.
    pub(super) fn begin_memory(&mut self, committed: u64) -> Result<(), Error> {
        let newest = newest_seq(&self.disk).unwrap_or(committed);
        let overlay = Overlay::new(&self.path, Disk::Open);
        self.memory = Some(overlay.begin(newest, &self.path)?);
        self.overlay.set(Some(overlay));
        self.readers_open_again();
        Ok(())
    }

    pub(super) fn end_memory(&mut self) {
        self.memory = None;
        self.overlay.set(None);
        self.readers_open_again();
    }
}
