//! Copy-ups, met before they begin: what makes a gate sound that does not ask about
//! unchanged files of the image.
//!
//! An ignore mark tells the kernel to ask no more about an inode. Alone it is a
//! hole: `open(O_RDWR)`, a store through a shared mapping, `close`, and the changed
//! file runs unasked. But an overlay's lower file cannot be changed from above it
//! without being copied up first, and before there is anything to change the
//! overlay opens an unnamed file in its work directory, in the name of the process that
//! wants to write. The gate is asked there, too. So this holds (docs/adr/0009):
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
//! One thread does all of it, one step after the other. A shard is a group for some of
//! the containers: a flush takes the marks of all of them. What is lost here only makes
//! the kernel ask more often.

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

/// A write from the host to a layer's directory changes a file without a copy-up. Marks
/// that hide that are not older than this.
const REFRESH: Duration = Duration::from_secs(30);

/// The groups that ask about an unchanged file only once. A shard meets its copy-ups in a
/// group of its own, since the kernel does not say in whose work directory one happens:
/// the first shard in the plain group, which nothing flushes.
#[derive(Debug)]
pub(super) struct Shards {
    pub(super) groups: Vec<Group>,
    /// Of every shard but the first.
    pub(super) copy_ups: Vec<Group>,
    /// Reports when a copy-up is over; `None` without shards.
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

    /// The group in which a shard's copy-ups are met.
    fn copy_ups_of<'group>(&'group self, plain: &'group Group, shard: u8) -> &'group Group {
        let others = usize::from(shard).checked_sub(1);
        others.and_then(|other| self.copy_ups.get(other)).unwrap_or(plain)
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Moves with everything that may make an ignored file another one.
    generation: u64,
    in_flight: usize,
}

/// What is known of the copy-ups in each shard.
#[derive(Debug)]
pub(super) struct CopyUps {
    shards: Vec<State>,
    /// Device and inode of the files that are being filled, and their shards.
    filling: HashMap<(u64, u64), u8>,
    /// A copy-up was met whose end is not reported.
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

    /// Asks no more about a file, which was found to be the image's own after `calm` was
    /// taken.
    pub(super) fn ignore(&self, groups: &Shards, pulse: &Pulse, calm: Calm, file: BorrowedFd<'_>) {
        if self.calm(calm.shard) != Some(calm) {
            return;
        }
        let Some(group) = groups.groups.get(usize::from(calm.shard)) else { return };
        // Where it fails, the file is asked about again: only time is lost.
        if group.ignore(file, libc::FAN_OPEN_EXEC_PERM).is_ok() {
            pulse.ignored().fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Whatever was ignored in a shard is asked about again, when this returns.
    pub(super) fn forget(&mut self, groups: &Shards, shard: u8) -> io::Result<()> {
        let (Some(state), Some(group)) =
            (self.shards.get_mut(usize::from(shard)), groups.groups.get(usize::from(shard)))
        else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        state.generation += 1;
        group.flush()
    }

    /// All of it, now and then.
    pub(super) fn refresh(&mut self, groups: &Shards) -> io::Result<()> {
        if self.refreshed.elapsed() < REFRESH {
            return Ok(());
        }
        self.refreshed = Instant::now();
        (0..self.shards.len()).try_for_each(|shard| self.forget(groups, number(shard)))
    }

    /// Meets the copy-ups in a work directory from now on.
    pub(super) fn meet(
        &self,
        plain: &Group,
        groups: &Shards,
        shard: u8,
        directory: &OwnedFd,
    ) -> io::Result<()> {
        let closes = groups.closes.as_ref().ok_or(io::ErrorKind::InvalidInput)?;
        self.shards.get(usize::from(shard)).ok_or(io::ErrorKind::InvalidInput)?;
        // The report of the end must be there first.
        closes.mark_children(directory.as_fd(), libc::FAN_CLOSE_WRITE)?;
        groups.copy_ups_of(plain, shard).mark_children(directory.as_fd(), libc::FAN_OPEN_PERM)
    }

    /// A container has ended. Those of its work directories that are gone have taken
    /// their marks with them.
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

    /// A file is about to be opened in a work directory; to be answered afterwards.
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
            // A file that was copied up some time ago is opened by way of where it was
            // made. Never again is this file the place of a copy-up.
            let copy_ups = groups.copy_ups_of(plain, shard);
            let _ = copy_ups.ignore_for_good(event.file.as_fd(), libc::FAN_OPEN_PERM);
            return Ok(());
        }
        // An end that will be reported, or none.
        let key = match (what, &stat) {
            (Ok(Ok(CopyUp::Begins)), Ok(stat)) => Some((stat.device, stat.inode)),
            _ => None,
        };
        if let Some(state) = self.shards.get_mut(usize::from(shard)) {
            state.in_flight += 1;
        }
        if let Some(key) = key {
            // Its number was given to another file: the one that had it is gone.
            if let Some(gone) = self.filling.insert(key, shard) {
                self.over(gone);
            }
        } else if !std::mem::replace(&mut self.is_puzzled, true) {
            eprintln!(
                "driftd gate: a copy-up does not look as they do; from now on every program \
                 of some containers is asked about"
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
