//! The free gate: it asks about an unchanged file of the image only once, and stays sound
//! because it sees every copy-up before the copy-up begins.
//!
//! With an ignore mark, the kernel asks no more about an inode. An ignore mark alone leaves
//! a hole: `open(O_RDWR)`, a store through a shared mapping, `close`, and the changed file
//! runs unasked. But a lower file of an overlay cannot be changed through the overlay
//! without a copy-up. At the beginning of a copy-up, the overlay opens an unnamed file in
//! its work directory, as the process that wants to write, and there the kernel asks the
//! gate, too. So this holds (docs/adr/0009):
//!
//! > A file carries an ignore mark only while it is a lower file and no copy-up is
//! > in flight in its shard.
//!
//! ```text
//! writer: open(O_RDWR) ── kernel: work/#12 ──> in flight + 1, generation + 1,
//!                                              flush the ignore marks, Allow
//! gate:   generation, in flight ── Allow ── daemon: it is the image's ──> still the
//!         same generation? add the mark
//! writer: done ── kernel: work/#12 closed ──> in flight - 1
//! ```
//!
//! One thread does all of it, one step after the other. A shard is a group for some of the
//! containers: a flush removes the marks of all of them. A lost mark only makes the kernel
//! ask more often.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::wire::Calm;
use crate::pulse::Pulse;
use crate::sys::fanotify::{self, Event, Group, Queue};
use crate::sys::file;
use crate::sys::overlay::{self, CopyUp};

/// The greatest age of an ignore mark: a write from the host into a layer's directory changes
/// a file without a copy-up.
const REFRESH: Duration = Duration::from_secs(30);

/// The groups that ask about an unchanged file only once. A shard has a group of its own for
/// copy-ups, because an event does not show in which work directory it happens. The first
/// shard uses the plain group for them, which is never flushed.
#[derive(Debug)]
pub(super) struct Shards {
    pub(super) groups: Vec<Group>,
    /// The groups for copy-ups, of every shard except the first.
    pub(super) copy_ups: Vec<Group>,
    /// Reports the ends of copy-ups; `None` without shards.
    pub(super) closes: Option<Group>,
}

impl Shards {
    pub(super) fn new(count: u8) -> Result<Shards, fanotify::Error> {
        let groups = (0..count).map(|_| Group::exec_gate()).collect::<Result<_, _>>()?;
        let copy_ups = (1..count).map(|_| Group::copy_up_gate()).collect::<Result<_, _>>()?;
        let closes = if count > 0 { Some(Group::feed(Queue::Unlimited)?) } else { None };
        Ok(Shards { groups, copy_ups, closes })
    }

    pub(super) fn into_groups(self) -> impl Iterator<Item = Group> {
        let Shards { groups, copy_ups, closes } = self;
        groups.into_iter().chain(copy_ups).chain(closes)
    }

    /// The group for a shard's copy-ups.
    fn copy_ups_of<'group>(&'group self, plain: &'group Group, shard: u8) -> &'group Group {
        let others = usize::from(shard).checked_sub(1);
        others.and_then(|other| self.copy_ups.get(other)).unwrap_or(plain)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Grows with every event after which an ignored file may have changed.
    generation: u64,
    in_flight: usize,
}

/// What is known of the copy-ups in each shard.
#[derive(Debug)]
pub(super) struct CopyUps {
    shards: Vec<State>,
    /// Device and inode of the files that are being filled, and their shards.
    filling: HashMap<(u64, u64), u8>,
    /// A copy-up began whose end will not be reported.
    is_puzzled: bool,
    refreshed: Instant,
}

impl CopyUps {
    pub(super) fn new(shards: usize) -> CopyUps {
        CopyUps {
            shards: vec![State::default(); shards],
            filling: HashMap::new(),
            is_puzzled: false,
            refreshed: Instant::now(),
        }
    }

    /// `None` while a copy-up is in flight.
    pub(super) fn calm(&self, shard: u8) -> Option<Calm> {
        let State { generation, in_flight } = *self.shards.get(usize::from(shard))?;
        (in_flight == 0).then_some(Calm { shard, generation })
    }

    /// Ignores a file from now on. It was found to be the image's own after `calm` was taken.
    pub(super) fn ignore(&self, groups: &Shards, pulse: &Pulse, calm: Calm, file: BorrowedFd<'_>) {
        if self.calm(calm.shard) != Some(calm) {
            return;
        }
        let Some(group) = groups.groups.get(usize::from(calm.shard)) else { return };
        // If it fails, the kernel asks about the file again, which only costs time.
        if group.ignore(file, libc::FAN_OPEN_EXEC_PERM).is_ok() {
            pulse.ignored().fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Removes all ignore marks of a shard. When this returns, its files are asked about
    /// again.
    pub(super) fn forget(&mut self, groups: &Shards, shard: u8) -> io::Result<()> {
        let (Some(state), Some(group)) =
            (self.shards.get_mut(usize::from(shard)), groups.groups.get(usize::from(shard)))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        state.generation += 1;
        group.flush()
    }

    /// Removes all ignore marks every thirty seconds.
    pub(super) fn refresh(&mut self, groups: &Shards) -> io::Result<()> {
        if self.refreshed.elapsed() < REFRESH {
            return Ok(());
        }
        self.refreshed = Instant::now();
        (0..self.shards.len()).try_for_each(|shard| self.forget(groups, number(shard)))
    }

    /// Watches the copy-ups in a work directory from now on.
    pub(super) fn meet(
        &self,
        plain: &Group,
        groups: &Shards,
        shard: u8,
        directory: &OwnedFd,
    ) -> io::Result<()> {
        let closes = groups.closes.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        self.shards.get(usize::from(shard)).ok_or(io::ErrorKind::InvalidInput)?;
        // First the mark that reports ends, so that no beginning is without an end.
        closes.mark_children(directory.as_fd(), libc::FAN_CLOSE_WRITE)?;
        groups.copy_ups_of(plain, shard).mark_children(directory.as_fd(), libc::FAN_OPEN_PERM)
    }

    /// A container has ended. The marks of removed work directories are gone with them.
    pub(super) fn leave(
        &mut self,
        plain: &Group,
        groups: &Shards,
        shard: u8,
        directories: &[OwnedFd],
    ) -> io::Result<()> {
        let closes = groups.closes.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        let copy_ups = groups.copy_ups_of(plain, shard);
        for directory in directories {
            let _ = closes.unmark_children(directory.as_fd(), libc::FAN_CLOSE_WRITE);
            let _ = copy_ups.unmark_children(directory.as_fd(), libc::FAN_OPEN_PERM);
        }
        self.forget(groups, shard)
    }

    /// A file is about to be opened in a work directory. Called before the answer.
    pub(super) fn met(
        &mut self,
        plain: &Group,
        groups: &Shards,
        pulse: &Pulse,
        shard: u8,
        event: &Event,
    ) -> io::Result<()> {
        let stat = file::stat(&event.file);
        let what = stat.as_ref().map(|stat| overlay::copy_up(event.file.as_fd(), stat));
        if let Ok(Ok(CopyUp::Over)) = what {
            // A file that was copied up before is opened by the place where it was made. This
            // file is never filled by a copy-up again.
            let copy_ups = groups.copy_ups_of(plain, shard);
            let _ = copy_ups.ignore_for_good(event.file.as_fd(), libc::FAN_OPEN_PERM);
            return Ok(());
        }
        // `Some` if the end will be reported.
        let key = match (what, &stat) {
            (Ok(Ok(CopyUp::Begins)), Ok(stat)) => Some((stat.device, stat.inode)),
            _ => None,
        };
        if let Some(state) = self.shards.get_mut(usize::from(shard)) {
            state.in_flight += 1;
        }
        if let Some(key) = key {
            // The number belongs to a new file, so the earlier file with it is gone.
            if let Some(gone) = self.filling.insert(key, shard) {
                self.over(gone);
            }
        } else if !std::mem::replace(&mut self.is_puzzled, true) {
            eprintln!(
                "driftd gate: a copy-up is of an unknown form; from now on the kernel asks about \
                 every program of some containers"
            );
        }
        self.forget(groups, shard)?;
        pulse.copy_ups().fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn over(&mut self, shard: u8) {
        if let Some(state) = self.shards.get_mut(usize::from(shard)) {
            state.in_flight = state.in_flight.saturating_sub(1);
        }
    }

    /// A file was closed in a work directory.
    pub(super) fn ended(&mut self, event: &Event) {
        let Ok(stat) = file::stat(&event.file) else { return };
        if let Some(shard) = self.filling.remove(&(stat.device, stat.inode)) {
            self.over(shard);
        }
    }
}

fn number(shard: usize) -> u8 {
    u8::try_from(shard).expect("there are a few shards")
}
