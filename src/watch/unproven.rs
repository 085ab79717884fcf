//! Executions that the gate was asked about and that the kernel has not recorded: a mere
//! check (`AT_EXECVE_CHECK`), an execve that failed after the question, or one that is
//! still under way. Each waits here until the kernel records that its process has become
//! a program, and is reported only then.
//!
//! Where records were lost, or are read much too late, nothing can be proven: what waits
//! is reported.

use std::collections::{HashMap, VecDeque};

use super::fair::Owned;
use crate::model::ProcessIdentity;

/// Executions of all processes that are remembered; the oldest is forgotten.
const MAX_RECORDED: usize = 16 * 1024;
/// How many may wait, of one container and of all.
const MAX_WAITING_OF_ONE: usize = 128;
const MAX_WAITING: usize = 1024;
/// How late a record may be read, in nanoseconds.
const MAX_LAG: u64 = 1_000_000_000;

/// What the gate was asked. Times are of the records' clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) process: ProcessIdentity,
    pub(super) asked: u64,
}

#[derive(Debug)]
pub(super) struct Unproven<T> {
    /// When each process last became a program.
    recorded: HashMap<u32, u64>,
    /// The same by time; one that has become another since is not the last.
    order: VecDeque<(u64, u32)>,
    /// What was executed up to this time may be forgotten.
    forgotten: u64,
    waiting: HashMap<u32, Vec<(Question, T)>>,
    /// All records of before this time are read.
    read_until: u64,
}

impl<T> Default for Unproven<T> {
    fn default() -> Self {
        let (recorded, order, waiting) = Default::default();
        Unproven { recorded, order, forgotten: 0, waiting, read_until: 0 }
    }
}

impl<T: Owned> Unproven<T> {
    /// Whether the process has become a program since. What it maps says no more: with
    /// binfmt_misc, which a container can have for itself (Linux 6.7), that is an interpreter
    /// for a program of any kind.
    pub(super) fn is_proven(&self, question: &Question) -> bool {
        let last = self.recorded.get(&question.process.pid);
        question.asked <= self.forgotten || last.is_some_and(|&time| time >= question.asked)
    }

    /// Keeps an execution until it is proven; without room it is given back.
    pub(super) fn wait(&mut self, question: Question, execution: T) -> Result<(), T> {
        let owner = execution.owner();
        let waiting = || self.waiting.values().flatten();
        let of_one = waiting().filter(|(_, other)| other.owner() == owner).count();
        if of_one >= MAX_WAITING_OF_ONE || waiting().count() >= MAX_WAITING {
            return Err(execution);
        }
        self.waiting.entry(question.process.pid).or_default().push((question, execution));
        Ok(())
    }

    /// A process has become a program: what of its own waited.
    pub(super) fn executed(&mut self, pid: u32, time: u64) -> Vec<T> {
        self.recorded.insert(pid, time);
        self.order.push_back((time, pid));
        self.keep_bounds();
        let Some(waiting) = self.waiting.get_mut(&pid) else { return Vec::new() };
        let proven = waiting.extract_if(.., |(question, _)| question.asked <= time);
        let proven = proven.map(|(_, item)| item).collect();
        if waiting.is_empty() {
            self.waiting.remove(&pid);
        }
        proven
    }

    /// A process may have ended, and with it what it did not come to run. Whether one
    /// that has this number goes on.
    pub(super) fn ended(&mut self, pid: u32, goes_on: impl Fn(ProcessIdentity) -> bool) -> bool {
        let Some(waiting) = self.waiting.get_mut(&pid) else { return false };
        waiting.retain(|(question, _)| goes_on(question.process));
        let is_rest = !waiting.is_empty();
        if !is_rest {
            self.waiting.remove(&pid);
        }
        is_rest
    }

    /// Records were lost, or there are none of before this.
    pub(super) fn forget_all(&mut self, now: u64) -> Vec<T> {
        let waiting = std::mem::take(&mut self.waiting).into_values().flatten();
        let waiting = waiting.map(|(_, item)| item).collect();
        *self = Unproven { forgotten: now, read_until: self.read_until, ..Unproven::default() };
        waiting
    }

    pub(super) fn has_read(&mut self, until: u64) {
        self.read_until = until;
    }

    /// What has waited for too long for records that are not read.
    pub(super) fn overdue(&mut self, now: u64) -> Vec<T> {
        let read_until = self.read_until;
        let is_overdue = |question: &Question| {
            question.asked >= read_until && question.asked.saturating_add(MAX_LAG) < now
        };
        let mut overdue = Vec::new();
        self.waiting.retain(|_, waiting| {
            let taken = waiting.extract_if(.., |(question, _)| is_overdue(question));
            overdue.extend(taken.map(|(_, item)| item));
            !waiting.is_empty()
        });
        overdue
    }

    fn keep_bounds(&mut self) {
        while self.order.len() > MAX_RECORDED
            && let Some((time, pid)) = self.order.pop_front()
        {
            self.forgotten = time;
            if self.recorded.get(&pid) == Some(&time) {
                self.recorded.remove(&pid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ContainerId;

    struct Item(ContainerId, u64);

    impl Owned for Item {
        fn owner(&self) -> &ContainerId {
            &self.0
        }
    }

    fn question(pid: u32, asked: u64) -> Question {
        Question { process: ProcessIdentity { pid, start_time: asked }, asked }
    }

    fn waits(unproven: &mut Unproven<Item>, container: &str, question: Question) -> bool {
        let container = ContainerId::new("test", container);
        unproven.wait(question, Item(container, question.asked)).is_ok()
    }

    fn asked(items: Vec<Item>) -> Vec<u64> {
        items.into_iter().map(|item| item.1).collect()
    }

    #[test]
    fn d04_an_execution_is_reported_when_it_is_recorded_and_a_check_never() {
        let mut unproven = Unproven::default();
        assert!(!unproven.is_proven(&question(7, 5)));
        assert!(waits(&mut unproven, "a", question(7, 5)));
        assert!(waits(&mut unproven, "a", question(8, 5)));
        assert!(waits(&mut unproven, "a", question(7, 25)));
        assert_eq!(asked(unproven.executed(7, 10)), [5]);
        assert!(unproven.is_proven(&question(7, 5)));
        assert!(!unproven.is_proven(&question(7, 25)));
        assert!(!unproven.ended(8, |_| false));
        assert_eq!(asked(unproven.executed(8, 40)), [0; 0], "another has its number");
        assert!(waits(&mut unproven, "a", question(7, 26)));
        assert!(unproven.ended(7, |process| process.start_time == 25));
        assert_eq!(asked(unproven.executed(7, 40)), [25]);
        assert!(unproven.waiting.is_empty());
    }

    #[test]
    fn d04_where_records_were_lost_what_waits_is_reported() {
        let mut unproven = Unproven::default();
        assert!(waits(&mut unproven, "a", question(7, 5)));
        assert_eq!(asked(unproven.forget_all(50)), [5]);
        assert!(unproven.is_proven(&question(7, 50)));
        assert!(!unproven.is_proven(&question(7, 51)));
        for time in 0..=MAX_RECORDED as u64 {
            unproven.executed(1, 100 + time);
        }
        assert_eq!((unproven.order.len(), unproven.recorded.len()), (MAX_RECORDED, 1));
        assert!(unproven.is_proven(&question(7, 100)));
        assert!(!unproven.is_proven(&question(7, 101)));
    }

    #[test]
    fn d04_what_the_records_are_late_for_is_reported() {
        let mut unproven = Unproven::default();
        unproven.has_read(10);
        assert!(waits(&mut unproven, "a", question(7, 5)));
        assert!(waits(&mut unproven, "a", question(7, 20)));
        assert!(waits(&mut unproven, "a", question(8, 30)));
        assert_eq!(asked(unproven.overdue(20 + MAX_LAG)), [0; 0]);
        assert_eq!(asked(unproven.overdue(21 + MAX_LAG)), [20]);
        unproven.has_read(31);
        assert_eq!(asked(unproven.overdue(40 + MAX_LAG)), [0; 0], "they are a check's");
    }

    #[test]
    fn d04_one_container_leaves_room_for_the_others_and_without_room_it_is_reported() {
        let mut unproven = Unproven::default();
        for number in 0..MAX_WAITING_OF_ONE as u64 {
            assert!(waits(&mut unproven, "a", question(7, number)));
        }
        assert!(!waits(&mut unproven, "a", question(8, 1)));
        assert!(waits(&mut unproven, "b", question(8, 1)));
    }
}
