//! The host's container runtimes that wait until their container is marked
//! (`watch.arm = "strict"`).

use std::time::{Duration, Instant};

use crate::sys::fanotify::{Event, Permission};
use crate::sys::file::{self, Stat};

/// How long a runtime may be held, and how many at a time.
const HELD_FOR: Duration = Duration::from_millis(500);
const MAX_HELD: usize = 256;

/// A runtime that waits until its container is marked.
pub(super) struct Held<'groups> {
    pub(super) number: u64,
    pub(super) permission: Permission<'groups>,
    pub(super) since: Instant,
}

#[derive(Default)]
pub(super) struct Runtimes<'groups> {
    /// The device and inode of each.
    files: Vec<(u64, u64)>,
    held: Vec<Held<'groups>>,
    held_so_far: u64,
}

impl<'groups> Runtimes<'groups> {
    pub(super) fn add(&mut self, runtime: &Stat) {
        let file = (runtime.device, runtime.inode);
        if !self.files.contains(&file) {
            self.files.push(file);
        }
    }

    /// Whether the file of an event is one of them.
    pub(super) fn are_of(&self, event: &Event) -> bool {
        if self.files.is_empty() {
            return false;
        }
        let Ok(stat) = file::stat(&event.file) else { return false };
        self.files.contains(&(stat.device, stat.inode))
    }

    pub(super) fn next_number(&mut self) -> u64 {
        self.held_so_far += 1;
        self.held_so_far
    }

    pub(super) fn has_room(&self) -> bool {
        self.held.len() < MAX_HELD
    }

    pub(super) fn hold(&mut self, held: Held<'groups>) {
        self.held.push(held);
    }

    pub(super) fn take(&mut self, number: u64) -> Option<Held<'groups>> {
        let at = self.held.iter().position(|held| held.number == number)?;
        Some(self.held.swap_remove(at))
    }

    /// How long until the first has been held for too long.
    pub(super) fn due_in(&self) -> Option<Duration> {
        self.held.iter().map(|held| HELD_FOR.saturating_sub(held.since.elapsed())).min()
    }

    pub(super) fn take_late(&mut self) -> impl Iterator<Item = Held<'groups>> {
        self.held.extract_if(.., |held| held.since.elapsed() >= HELD_FOR)
    }
}
