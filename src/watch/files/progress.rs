//! Whether the change feed has read all that was written until now.
//!
//! Without that, the last writer of a file may be the one before the last: a process that
//! overwrites a file and runs it at once would pass as the file's former writer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::sys::fanotify::Group;

/// How long nothing waits for the feed after a wait in vain: a container that writes all the
/// time must not hold up what is reported.
const GIVEN_UP_FOR: Duration = Duration::from_secs(1);

/// How long a program or library that is used waits for the feed, where no thread waits with it: a
/// container that writes all the time must not hold up what is reported.
pub(crate) const PATIENCE: Duration = Duration::from_millis(500);

/// A number of events that the feed is to have read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backlog(pub(crate) u64);

/// What the thread `feed` has done.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    group: OnceLock<Arc<Group>>,
    /// It reads, or works on what it has read.
    is_working: AtomicBool,
    /// Events that were read, and events whose writers are remembered.
    read: AtomicU64,
    done: AtomicU64,
    given_up: Mutex<Option<Instant>>,
}

impl Progress {
    /// The group whose events the feed reads.
    pub(super) fn follows(&self, group: &Arc<Group>) {
        let _ = self.group.set(group.clone());
    }

    pub(super) fn begins(&self) {
        self.is_working.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_read(&self, events: usize) {
        self.read.fetch_add(events as u64, Ordering::SeqCst);
    }

    pub(super) fn has_done_one(&self) {
        self.done.fetch_add(1, Ordering::SeqCst);
    }

    pub(super) fn rests(&self) {
        self.is_working.store(false, Ordering::SeqCst);
    }

    /// What the feed has to read until the writers of everything that was closed until now are
    /// remembered.
    pub(crate) fn backlog(&self) -> Backlog {
        // In this order: what is read in between is counted twice, and not left out.
        let queued = self.group.get().and_then(|group| group.queued().ok());
        let read = self.read.load(Ordering::SeqCst);
        Backlog(queued.map_or(u64::MAX, |queued| read.saturating_add(queued)))
    }

    /// Whether the feed has read so much.
    pub(crate) fn has_reached(&self, Backlog(events): Backlog) -> bool {
        let Some(group) = self.group.get() else { return false };
        let is_idle = || {
            group.queued().is_ok_and(|queued| queued == 0)
                && !self.is_working.load(Ordering::SeqCst)
        };
        self.done.load(Ordering::SeqCst) >= events || is_idle()
    }

    /// Whether the writers of everything that was closed until now are remembered. Waits for it
    /// for at most `patience`.
    pub(crate) fn has_caught_up(&self, patience: Duration) -> bool {
        let backlog = self.backlog();
        let is_done = || self.has_reached(backlog);
        if is_done() {
            return true;
        }
        // Not locked while it waits: others must not wait for this.
        let given_up = || self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up().is_some_and(|at| at.elapsed() < GIVEN_UP_FOR) {
            return false;
        }
        let begun = Instant::now();
        while begun.elapsed() < patience {
            std::thread::sleep(Duration::from_millis(1));
            if is_done() {
                return true;
            }
        }
        if !patience.is_zero() {
            *given_up() = Some(Instant::now());
        }
        false
    }
}
