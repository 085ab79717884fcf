//! The counters that driftd's three processes share: the turns of each, which show its
//! progress, and what the gate has done.
//!
//! To count needs no system call. A process that is stopped, stuck or ended does not count
//! any more. A process checks the progress of another one by its own turns and not by
//! seconds: if the machine was suspended, or the checking process was stopped, the other has
//! not failed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::sys::counters::Counters;

/// The time between two turns: each process counts, and checks the others.
pub const TURN: Duration = Duration::from_millis(250);

/// How many turns without progress the guardian allows: it acts within three seconds.
pub const GUARDIANS_PATIENCE: u32 = 11;

/// How many turns the daemon and the gate allow: more, so that they act only if the guardian
/// does not.
pub const PATIENCE: u32 = 18;

/// The counters. A clone counts in the same memory.
#[derive(Debug)]
pub struct Pulse(Counters);

/// The number of a counter in the shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
enum Counter {
    Daemon,
    Gate,
    Guardian,
    Answers,
    Ignored,
    CopyUps,
    Dropped,
    Unreadable,
    Late,
    Handles,
    Denied,
    Undecided,
    Guarded,
    Unguarded,
    Unread,
    Unchanged,
    RuntimesUntil,
}

/// One of driftd's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Daemon,
    Gate,
    Guardian,
}

impl Pulse {
    pub fn new() -> io::Result<Pulse> {
        Ok(Pulse(Counters::new()?))
    }

    /// The counters of another process, which has sent their memory.
    pub fn share(memory: OwnedFd) -> io::Result<Pulse> {
        Ok(Pulse(Counters::map(memory)?))
    }

    fn counter(&self, counter: Counter) -> &AtomicU64 {
        self.0.at(counter as usize)
    }

    /// The turns of a process: 0 until it has begun.
    pub fn turns_of(&self, part: Part) -> &AtomicU64 {
        self.counter(match part {
            Part::Daemon => Counter::Daemon,
            Part::Gate => Counter::Gate,
            Part::Guardian => Counter::Guardian,
        })
    }

    /// This process makes progress.
    pub fn beat(&self, part: Part) {
        self.turns_of(part).fetch_add(1, Ordering::Relaxed);
    }

    /// Programs that were allowed to run, or, with `watch.gate = "notify"`, reported by the
    /// kernel.
    pub fn answers(&self) -> &AtomicU64 {
        self.counter(Counter::Answers)
    }

    /// Files that were marked to be ignored.
    pub fn ignored(&self) -> &AtomicU64 {
        self.counter(Counter::Ignored)
    }

    /// Files of an image that were about to be changed.
    pub fn copy_ups(&self) -> &AtomicU64 {
        self.counter(Counter::CopyUps)
    }

    /// Executions that were answered and could not be handed to the daemon.
    pub fn dropped(&self) -> &AtomicU64 {
        self.counter(Counter::Dropped)
    }

    /// Events that the kernel could not hand to the gate.
    pub fn unreadable(&self) -> &AtomicU64 {
        self.counter(Counter::Unreadable)
    }

    /// Not 0 once a session was opened: from then on the gate opens a handle of each process
    /// before it runs on, so that its exit can be read.
    pub fn handles(&self) -> &AtomicU64 {
        self.counter(Counter::Handles)
    }

    /// Programs that were not allowed to run.
    pub fn denied(&self) -> &AtomicU64 {
        self.counter(Counter::Denied)
    }

    /// Programs that were to wait for a decision and got the answer for those that get none.
    pub fn undecided(&self) -> &AtomicU64 {
        self.counter(Counter::Undecided)
    }

    /// Files about whose reading the kernel asks.
    pub fn guarded(&self) -> &AtomicU64 {
        self.counter(Counter::Guarded)
    }

    /// Files about whose reading the kernel was to ask, and does not.
    pub fn unguarded(&self) -> &AtomicU64 {
        self.counter(Counter::Unguarded)
    }

    /// Reads of guarded files that were allowed because no decision came.
    pub fn unread(&self) -> &AtomicU64 {
        self.counter(Counter::Unread)
    }

    /// Executions of unchanged files of images that were not handed to the daemon.
    pub fn unchanged(&self) -> &AtomicU64 {
        self.counter(Counter::Unchanged)
    }

    /// Until when a runtime may be on its way into a container, by the clock of the kernel's
    /// records, in nanoseconds.
    pub fn runtimes_until(&self) -> &AtomicU64 {
        self.counter(Counter::RuntimesUntil)
    }

    /// Held runtimes that the gate had to let run before the daemon requested it.
    pub fn late(&self) -> &AtomicU64 {
        self.counter(Counter::Late)
    }
}

impl AsFd for Pulse {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Checks whether a counter grows.
#[derive(Debug, Default)]
pub struct Silence {
    last: u64,
    turns: u32,
}

impl Silence {
    /// One turn of the checking process. Returns for how many turns in a row the counter has
    /// not grown. A process that has not begun is not silent.
    pub fn turn(&mut self, count: u64) -> u32 {
        if count == 0 || count != self.last {
            *self = Silence { last: count, turns: 0 };
        } else {
            self.turns += 1;
        }
        self.turns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pulse_is_shared_and_its_counters_are_apart() {
        let here = Pulse::new().unwrap();
        let there = Pulse::share(here.as_fd().try_clone_to_owned().unwrap()).unwrap();
        here.beat(Part::Gate);
        for counter in [there.answers(), there.ignored(), there.copy_ups(), there.dropped()] {
            assert_eq!(counter.fetch_add(2, Ordering::Relaxed), 0);
        }
        let turns = [Part::Daemon, Part::Gate, Part::Guardian]
            .map(|part| there.turns_of(part).load(Ordering::Relaxed));
        assert_eq!(turns, [0, 1, 0]);
        assert_eq!(here.unreadable().load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_process_that_has_not_begun_is_not_silent_and_one_that_stops_is() {
        let mut silence = Silence::default();
        assert_eq!([0, 0, 0].map(|count| silence.turn(count)), [0, 0, 0]);
        assert_eq!([1, 1, 1, 2, 2].map(|count| silence.turn(count)), [0, 1, 2, 0, 1]);
    }
}
