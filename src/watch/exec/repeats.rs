//! Repeats: executions of one file by one parent, while many executions wait.
//!
//! The first of them waits in the queue, and the others are only counted with it. So a storm
//! of one program takes no room from the execution of another. Owns the counts alone: the
//! `gate` thread adds to them, and `content` takes them when it describes the first one.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::FileTime;
use crate::sys::file::Stat;

/// So many are examined one by one, each with its arguments.
pub(crate) const FEW: usize = 64;
/// How many files are remembered as waiting.
const MOST: usize = 1024;

/// What makes executions alike: the file in its present state, and the parent of the process
/// that executes it. A process that comes from outside has another parent, and so stays apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Alike {
    device: u64,
    inode: u64,
    changed: FileTime,
    parent: u32,
}

/// Counts the executions that are like the one that waits.
#[derive(Debug, Default)]
pub(crate) struct More(AtomicU64);

/// The execution that waited is being examined: one that comes now waits by itself.
const TAKEN: u64 = u64::MAX;

impl More {
    fn count(&self) -> bool {
        let one_more = |count: u64| (count < TAKEN - 1).then(|| count + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Ends the counting and returns the count.
    pub(crate) fn take(&self) -> u64 {
        match self.0.swap(TAKEN, Ordering::AcqRel) {
            TAKEN => 0,
            count => count,
        }
    }
}

/// One thread's memory of the executions that it has handed on.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    waiting: HashMap<Alike, Arc<More>>,
}

impl Repeats {
    /// Counts an execution with one like it that waits, and returns `None`. Without such a
    /// one, returns the count with which this execution is to wait itself.
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
    fn a_storm_waits_as_one_execution_and_loses_none() {
        let stat = file::stat_path("/proc/self/exe").unwrap();
        let mut repeats = Repeats::default();
        let first = repeats.join(&stat, 7).unwrap();
        assert!(repeats.join(&stat, 7).is_none());
        assert!(repeats.join(&stat, 7).is_none());
        assert_eq!(first.take(), 2);
        // An execution that comes after the first was examined is reported by itself.
        let second = repeats.join(&stat, 7).unwrap();
        assert!(repeats.join(&stat, 7).is_none());
        assert_eq!((first.take(), second.take()), (0, 1));
    }

    #[test]
    fn another_file_or_parent_waits_by_itself() {
        let stat = file::stat_path("/proc/self/exe").unwrap();
        let changed = FileTime { nanoseconds: stat.changed.nanoseconds ^ 1, ..stat.changed };
        let mut repeats = Repeats::default();
        assert!(repeats.join(&stat, 7).is_some());
        assert!(repeats.join(&stat, 8).is_some());
        assert!(repeats.join(&Stat { changed, ..stat }, 7).is_some());
        assert!(repeats.join(&Stat { inode: stat.inode ^ 1, ..stat }, 7).is_some());
        for inode in 0..2 * MOST as u64 {
            assert!(repeats.join(&Stat { inode, device: 0, ..stat }, 7).is_some());
        }
        assert!(repeats.waiting.len() <= MOST);
    }
}
