//! What is known of executions and reads that wait for a decision, until they are answered, and
//! of those that were answered a moment ago.
//!
//! Owns the tables alone. `questions` makes the observations, `gate` reports those of what was
//! denied, and `trace` asks what a process runs instead.

use std::collections::{BTreeMap, HashMap};

use crate::model::{Observation, ProcessIdentity, RootfsPath};
use crate::sys::file::Stat;
use crate::watch::files::upper;

/// How many are kept: more than may wait.
const MAX_OBSERVED: usize = 2048;
const MAX_DENIED: usize = 2048;
const MAX_ALLOWED: usize = 16 * 1024;

/// How soon a process runs something else in place of what was denied, in nanoseconds.
const MOMENT: u64 = 1_000_000_000;

/// The observations of what waits, with its file, by number: what is denied is reported by them.
#[derive(Debug, Default)]
pub(crate) struct Observed {
    waiting: BTreeMap<u64, (Observation, Stat)>,
    /// The last file that each process was allowed to execute, as it was on the overlay.
    allowed: HashMap<ProcessIdentity, Stat>,
    /// The last denial of each process: when, by the clock of the kernel's records, and of what.
    denied: HashMap<u32, (u64, RootfsPath)>,
}

impl Observed {
    pub(crate) fn keep(&mut self, number: u64, observation: Observation, file: Stat) {
        // A number whose answer was lost stays. Each is a moment old at most.
        if self.waiting.len() >= MAX_OBSERVED {
            self.waiting.pop_first();
        }
        self.waiting.insert(number, (observation, file));
    }

    pub(crate) fn take(&mut self, number: u64) -> Option<(Observation, Stat)> {
        self.waiting.remove(&number)
    }

    /// A process was allowed to execute a file.
    pub(crate) fn allowed(&mut self, process: ProcessIdentity, file: &Stat) {
        if self.allowed.len() >= MAX_ALLOWED {
            self.allowed.clear();
        }
        self.allowed.insert(process, *file);
    }

    /// Whether this is the last file that a process was allowed to execute, unchanged since: a
    /// script, which its interpreter reads.
    pub(crate) fn was_allowed(&self, process: ProcessIdentity, upper: &Stat) -> bool {
        let is_it = |file: &Stat| upper::is_this(upper, file) && !upper::has_changed(upper, file);
        self.allowed.get(&process).is_some_and(is_it)
    }

    /// An execution was denied to a process.
    pub(crate) fn denied(&mut self, pid: u32, at: u64, path: RootfsPath) {
        if self.denied.len() >= MAX_DENIED {
            self.denied.retain(|_, (time, _)| time.saturating_add(MOMENT) > at);
        }
        if self.denied.len() < MAX_DENIED {
            self.denied.insert(pid, (at, path));
        }
    }

    /// What was denied to a process that now runs a program of the same name: shells go on along
    /// PATH after a denial.
    pub(crate) fn instead_of(&mut self, pid: u32, time: u64, name: &[u8]) -> Option<RootfsPath> {
        if self.denied.is_empty() {
            return None;
        }
        let (at, path) = self.denied.remove(&pid)?;
        let last = name.rsplit(|&byte| byte == b'/').next();
        let is_soon = (at..at.saturating_add(MOMENT)).contains(&time);
        (is_soon && last == Some(path.file_name()) && name != path.as_bytes()).then_some(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_runs_instead_has_the_same_name_and_comes_at_once() {
        let check = |time: u64, name: &str, expected: bool| {
            let mut observed = Observed::default();
            observed.denied(7, 1000, RootfsPath::new("/opt/bin/ls").unwrap());
            assert_eq!(observed.instead_of(8, time, name.as_bytes()), None, "another process");
            let found = observed.instead_of(7, time, name.as_bytes());
            assert_eq!(found.is_some(), expected, "{time} {name}");
            assert_eq!(observed.instead_of(7, time, name.as_bytes()), None, "once");
        };
        check(1000, "/bin/ls", true);
        check(1001, "ls", true);
        check(999, "/bin/ls", false);
        check(1000 + MOMENT, "/bin/ls", false);
        check(1001, "/bin/cat", false);
        check(1001, "/opt/bin/ls", false);
    }

    #[test]
    fn a_storm_of_denials_takes_no_more_room() {
        let mut observed = Observed::default();
        for pid in 0..10_000 {
            observed.denied(pid, 1000, RootfsPath::new("/x").unwrap());
        }
        assert_eq!(observed.denied.len(), MAX_DENIED);
        observed.denied(1, 1000 + MOMENT, RootfsPath::new("/x").unwrap());
        assert_eq!(observed.denied.len(), 1);
    }
}
