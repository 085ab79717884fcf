//! Guarded files: files of a container's own layer that may be code, in a container where rules
//! may deny. The kernel asks the gate before such a file is read, if it was guarded when it was
//! opened (Linux 6.14, where the layer's filesystem takes part).
//!
//! The feed guards what was written, walks guard what is there. The mark is on the file below
//! the overlay, and costs nothing on any other file. The kernel forgets it with the inode, so a
//! walk guards again what was guarded long ago.
//!
//! This file owns what is known of guarded files and of the answers about them. `exec` asks for
//! the decisions, and `code` decides what a read is for.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::gate::Marks;
use crate::model::{FileTime, Format};
use crate::sys::file::{self, Stat};
use crate::sys::perf;
use crate::watch::core::watched::Watched;

/// How many files and answers are remembered. Then all are forgotten: files are guarded again.
const MOST: usize = 64 * 1024;

/// How long a mark is relied on.
const AGAIN: Duration = Duration::from_secs(600);

/// How long a walk waits for room in the gate's channel.
const PATIENCE: Duration = Duration::from_millis(100);

/// A file of a container's own layer, as it is below the overlay. The number of an inode is used
/// again, for a file that was made later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Guarded {
    /// The device of the container's overlay.
    container: u64,
    device: u64,
    inode: u64,
    born: Option<FileTime>,
}

impl Guarded {
    fn of(watched: &Watched, below: &Stat) -> Guarded {
        let Stat { device, inode, born, .. } = *below;
        Guarded { container: watched.device, device, inode, born }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Guards {
    /// `None` where the kernel does not wait for answers.
    marks: OnceLock<Marks>,
    known: Mutex<HashMap<Guarded, Known>>,
    /// The last read of a file that was denied to a process, by the clock of the kernel's
    /// records.
    denied: Mutex<HashMap<(u32, Guarded), u64>>,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// `None` for data, which is not guarded while it stays as it is.
    guarded: Option<u64>,
    /// When this was found out.
    since: Instant,
    changed: FileTime,
}

impl Guards {
    pub(crate) fn set_marks(&self, marks: Marks) {
        let _ = self.marks.set(marks);
    }

    /// A process of the container has written this file, and closed it. `upper` opens the same
    /// file below the overlay. A file with another name by now is guarded when that has settled.
    pub(super) fn written(
        &self,
        watched: &Watched,
        written: &OwnedFd,
        upper: impl FnOnce() -> Option<OwnedFd>,
    ) {
        if !watched.is_enforced() || !may_be_code(written.as_fd()) {
            return;
        }
        let Some(upper) = upper() else { return };
        let Ok(stat) = file::stat(&upper) else { return };
        // A walk guards it if the gate has no room now.
        if self.guard(watched, &stat, &upper, Duration::ZERO).is_err() {
            watched.ask_for_walk();
        }
    }

    /// A scan has found this name in the upper layer.
    pub(super) fn found(
        &self,
        watched: &Watched,
        directory: BorrowedFd<'_>,
        name: &[u8],
        stat: &Stat,
    ) {
        if !watched.is_enforced() || !stat.is_regular() || self.is_known(watched, stat) {
            return;
        }
        let Ok((upper, stat)) = file::open_file_beneath(directory, name) else { return };
        if !stat.is_regular() {
            return;
        }
        if may_be_code(upper.as_fd()) {
            // The next walk tries again.
            let _ = self.guard(watched, &stat, &upper, PATIENCE);
        } else {
            self.learn(watched, &stat, None);
        }
    }

    fn guard(
        &self,
        watched: &Watched,
        stat: &Stat,
        upper: &OwnedFd,
        patience: Duration,
    ) -> io::Result<()> {
        let Some(marks) = self.marks.get() else { return Ok(()) };
        let deadline = Instant::now() + patience;
        while let Err(err) = marks.guard(upper.as_fd()) {
            if err.kind() != io::ErrorKind::WouldBlock || Instant::now() >= deadline {
                return Err(err);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.learn(watched, stat, Some(perf::now()));
        Ok(())
    }

    fn learn(&self, watched: &Watched, stat: &Stat, guarded: Option<u64>) {
        let mut known = lock(&self.known);
        if known.len() >= MOST {
            known.clear();
        }
        let known_now = Known { guarded, since: Instant::now(), changed: stat.changed };
        known.insert(Guarded::of(watched, stat), known_now);
    }

    fn known(&self, watched: &Watched, stat: &Stat) -> Option<Known> {
        lock(&self.known).get(&Guarded::of(watched, stat)).copied()
    }

    /// Whether a walk need not look at a file.
    fn is_known(&self, watched: &Watched, stat: &Stat) -> bool {
        self.known(watched, stat).is_some_and(|known| {
            let is_as_before = known.guarded.is_some() || known.changed == stat.changed;
            is_as_before && known.since.elapsed() < AGAIN
        })
    }

    /// Whether a file was guarded before this time, by the clock of the kernel's records.
    pub(crate) fn was_guarded(&self, watched: &Watched, stat: &Stat, time: u64) -> bool {
        self.known(watched, stat).and_then(|known| known.guarded).is_some_and(|at| at < time)
    }

    /// A process was not allowed to read a file.
    pub(crate) fn deny(&self, watched: &Watched, pid: u32, stat: &Stat, at: u64) {
        let mut denied = lock(&self.denied);
        if denied.len() >= MOST {
            denied.clear();
        }
        denied.insert((pid, Guarded::of(watched, stat)), at);
    }

    /// Whether a process that runs this program since `since` was not allowed to read a file.
    pub(crate) fn is_denied(&self, watched: &Watched, pid: u32, stat: &Stat, since: u64) -> bool {
        let at = lock(&self.denied).get(&(pid, Guarded::of(watched, stat))).copied();
        at.is_some_and(|at| at >= since)
    }

    /// Forgets a container that has ended. The kernel uses the device's number again.
    pub(super) fn forget(&self, watched: &Watched) {
        lock(&self.known).retain(|file, _| file.container != watched.device);
        lock(&self.denied).retain(|(_, file), _| file.container != watched.device);
    }
}

fn lock<T>(table: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic leaves at worst a table that lacks an entry.
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a file may be code by its first bytes: a library, a program, or text. The data of
/// databases and archives would be asked about at each of many reads.
fn may_be_code(file: BorrowedFd<'_>) -> bool {
    let mut head = [0; 512];
    match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut head, 0)) {
        Ok(read) => holds_code(&head[..read]),
        Err(_) => false,
    }
}

fn holds_code(head: &[u8]) -> bool {
    /// The end of the four bytes with which every compiled file of Python begins, and the
    /// beginning of an archive that Java and Python execute.
    const PYTHON: &[u8] = b"\r\n";
    const ZIP: &[u8] = b"PK\x03\x04";
    let is_text = !head.is_empty() && !head.contains(&0);
    is_text
        || matches!(Format::sniff(&head[..head.len().min(Format::HEAD)]), Format::Elf)
        || head.starts_with(ZIP)
        || head.get(2..4) == Some(PYTHON)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_text_are_guarded_and_data_is_not() {
        let check =
            |head: &[u8], expected: bool| assert_eq!(holds_code(head), expected, "{head:?}");
        // A shared library, little-endian.
        let elf = [b"\x7fELF\x02\x01\x01".as_slice(), &[0; 9], &[3, 0], &[0; 46]].concat();
        check(&elf, true);
        check(b"#!/bin/sh\nexit\n", true);
        check(b"print(1)\n", true);
        check(b"PK\x03\x04\x14\x00", true);
        check(b"\xcb\x0d\x0d\x0a\x00\x00", true);
        check(b"", false);
        check(b"SQLite format 3\x00\x10\x00", false);
        check(b"\x00\x01\x02", false);
    }
}
