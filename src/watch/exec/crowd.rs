//! Executions of one file that wait to be looked at. Where many wait, more of the
//! same are only counted, so that a storm of one program takes no room from the
//! execution of another.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::FileTime;
use crate::sys::file::Stat;

/// So many are looked at one by one, each with its arguments.
pub(crate) const FEW: usize = 64;
/// Files that are known to wait.
const MOST: usize = 1024;

/// What makes executions alike: the file as it is, and who executes it. A parent
/// of its own keeps apart whoever comes from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Alike {
    device: u64,
    inode: u64,
    changed: FileTime,
    parent: u32,
}

/// How many executions were like the one that waits.
#[derive(Debug, Default)]
pub(crate) struct More(AtomicU64);

/// The one that waited is being looked at: what comes now waits by itself.
const TAKEN: u64 = u64::MAX;

impl More {
    fn count(&self) -> bool {
        let one_more = |count: u64| (count < TAKEN - 1).then(|| count + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Ends the counting.
    pub(crate) fn take(&self) -> u64 {
        match self.0.swap(TAKEN, Ordering::AcqRel) {
            TAKEN => 0,
            count => count,
        }
    }
}

/// One thread's memory of what it has handed on.
#[derive(Debug, Default)]
pub(crate) struct Crowd {
    waiting: HashMap<Alike, Arc<More>>,
}

impl Crowd {
    /// Counts an execution with one like it that waits: then `None`. Otherwise it is
    /// to wait itself, with this.
    pub(crate) fn join(&mut self, stat: &Stat, parent: u32) -> Option<Arc<More>> {
        let Stat { device, inode, changed, .. } = *stat;
        let alike = Alike { device, inode, changed, parent };
        if self.waiting.get(&alike).is_some_and(|more| more.count()) {
            return None;
        }
        if self.waiting.len() >= MOST {
            self.waiting.clear();
        }
        let more = Arc::new(More::default());
        self.waiting.insert(alike, more.clone());
        Some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file;

    #[test]
    fn a_storm_waits_once_and_none_of_it_is_lost() {
        let stat = file::stat_path("/proc/self/exe").unwrap();
        let mut crowd = Crowd::default();
        let first = crowd.join(&stat, 7).unwrap();
        assert!(crowd.join(&stat, 7).is_none());
        assert!(crowd.join(&stat, 7).is_none());
        assert_eq!(first.take(), 2);
        // What comes after it was looked at is told by itself.
        let second = crowd.join(&stat, 7).unwrap();
        assert!(crowd.join(&stat, 7).is_none());
        assert_eq!((first.take(), second.take()), (0, 1));
    }

    #[test]
    fn another_file_or_parent_waits_by_itself() {
        let stat = file::stat_path("/proc/self/exe").unwrap();
        let changed = FileTime { nanoseconds: stat.changed.nanoseconds ^ 1, ..stat.changed };
        let mut crowd = Crowd::default();
        assert!(crowd.join(&stat, 7).is_some());
        assert!(crowd.join(&stat, 8).is_some());
        assert!(crowd.join(&Stat { changed, ..stat }, 7).is_some());
        assert!(crowd.join(&Stat { inode: stat.inode ^ 1, ..stat }, 7).is_some());
        for inode in 0..2 * MOST as u64 {
            assert!(crowd.join(&Stat { inode, device: 0, ..stat }, 7).is_some());
        }
        assert!(crowd.waiting.len() <= MOST);
    }
}
