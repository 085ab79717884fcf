//! Executions that the gate was asked about and that the kernel has not recorded: a mere
//! check (`AT_EXECVE_CHECK`), an execve that failed after the question, or one that is
//! still under way. Each waits here until the kernel records that its process has become
//! a program, and is reported only then. Of one that is not recorded soon, the file is
//! looked at meanwhile: it is new or changed, whether it runs or not.
//!
//! Where records were lost, or are read much too late, and at a stop, nothing can be
//! proven: what waits is reported.

use std::collections::{HashMap, VecDeque};

use crate::model::ProcessIdentity;
use crate::watch::core::fair::Owned;

/// Executions of all processes that are remembered; the oldest is forgotten.
const MAX_RECORDED: usize = 16 * 1024;
/// How many may wait, of one container and of all.
const MAX_WAITING_OF_ONE: usize = 128;
const MAX_WAITING: usize = 1024;
/// How late a record may be read, in nanoseconds.
const MAX_LAG: u64 = 1_000_000_000;
/// How long an execve takes at most, mostly, in nanoseconds.
const MOMENT: u64 = 250_000_000;

/// What the gate was asked. Times are of the records' clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) process: ProcessIdentity,
    pub(crate) asked: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    question: Question,
    execution: T,
    /// Its file was looked at without waiting for it.
    is_looked_at: bool,
}

#[derive(Debug)]
pub(crate) struct Unproven<T> {
    /// When each process last became a program.
    recorded: HashMap<u32, u64>,
    /// The same by time; one that has become another since is not the last.
    order: VecDeque<(u64, u32)>,
    /// What was executed up to this time may be forgotten.
    forgotten: u64,
    waiting: HashMap<u32, Vec<Waiting<T>>>,
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
    pub(crate) fn is_proven(&self, question: &Question) -> bool {
        let last = self.recorded.get(&question.process.pid);
        question.asked <= self.forgotten || last.is_some_and(|&time| time >= question.asked)
    }

    /// Keeps an execution until it is proven; without room it is given back.
    pub(crate) fn wait(&mut self, question: Question, execution: T) -> Result<(), T> {
        let owner = execution.owner();
        let waiting = || self.waiting.values().flatten();
        let of_one = waiting().filter(|other| other.execution.owner() == owner).count();
        if of_one >= MAX_WAITING_OF_ONE || waiting().count() >= MAX_WAITING {
            return Err(execution);
        }
        let waiting = Waiting { question, execution, is_looked_at: false };
        self.waiting.entry(question.process.pid).or_default().push(waiting);
        Ok(())
    }

    /// A process has become a program: what of its own waited.
    pub(crate) fn executed(&mut self, pid: u32, time: u64) -> Vec<T> {
        self.recorded.insert(pid, time);
        self.order.push_back((time, pid));
        self.keep_bounds();
        let proven = self.take(pid, |waiting| waiting.question.asked <= time);
        proven.into_iter().map(|waiting| waiting.execution).collect()
    }

    /// A process may have ended without running what waits of it. Returns the executions
    /// whose file was not looked at, and whether a process with this pid goes on.
    pub(crate) fn ended(
        &mut self,
        pid: u32,
        goes_on: impl Fn(ProcessIdentity) -> bool,
    ) -> (Vec<T>, bool) {
        let over = self.take(pid, |waiting| !goes_on(waiting.question.process));
        let not_looked_at = over.into_iter().filter(|waiting| !waiting.is_looked_at);
        let executions = not_looked_at.map(|waiting| waiting.execution).collect();
        (executions, self.waiting.contains_key(&pid))
    }

    fn take(&mut self, pid: u32, is_taken: impl Fn(&Waiting<T>) -> bool) -> Vec<Waiting<T>> {
        let Some(waiting) = self.waiting.get_mut(&pid) else { return Vec::new() };
        let taken = waiting.extract_if(.., |waiting| is_taken(waiting)).collect();
        if waiting.is_empty() {
            self.waiting.remove(&pid);
        }
        taken
    }

    /// Records were lost, or there are none of before this, or none will be read any more.
    pub(crate) fn forget_all(&mut self, now: u64) -> Vec<T> {
        let waiting = std::mem::take(&mut self.waiting).into_values().flatten();
        let waiting = waiting.map(|waiting| waiting.execution).collect();
        *self = Unproven { forgotten: now, read_until: self.read_until, ..Unproven::default() };
        waiting
    }

    pub(crate) fn has_read(&mut self, until: u64) {
        self.read_until = until;
    }

    /// What the records that are read show to be no execution yet, once: it may have
    /// taken no time, or be none.
    pub(crate) fn not_executed(&mut self) -> impl Iterator<Item = &T> {
        let read_until = self.read_until;
        self.waiting.values_mut().flatten().filter_map(move |waiting| {
            let is_over = waiting.question.asked.saturating_add(MOMENT) < read_until;
            let is_first = is_over && !waiting.is_looked_at;
            waiting.is_looked_at |= is_over;
            is_first.then_some(&waiting.execution)
        })
    }

    /// What has waited for too long for records that are not read.
    pub(crate) fn overdue(&mut self, now: u64) -> Vec<T> {
        let read_until = self.read_until;
        let is_overdue = |waiting: &Waiting<T>| {
            let asked = waiting.question.asked;
            asked >= read_until && asked.saturating_add(MAX_LAG) < now
        };
        let mut overdue = Vec::new();
        self.waiting.retain(|_, waiting| {
            let taken = waiting.extract_if(.., |waiting| is_overdue(waiting));
            overdue.extend(taken.map(|waiting| waiting.execution));
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
        let (over, goes_on) = unproven.ended(8, |_| false);
        assert_eq!((asked(over), goes_on), (vec![5], false), "its file is still to be looked at");
        assert_eq!(asked(unproven.executed(8, 40)), [0; 0], "another has its number");
        assert!(waits(&mut unproven, "a", question(7, 26)));
        let (over, goes_on) = unproven.ended(7, |process| process.start_time == 25);
        assert_eq!((asked(over), goes_on), (vec![26], true));
        assert_eq!(asked(unproven.executed(7, 40)), [25]);
        assert!(unproven.waiting.is_empty());
    }

    #[test]
    fn d04_what_is_not_executed_in_a_moment_is_looked_at_once_and_reported_when_it_is() {
        let looked_at = |unproven: &mut Unproven<Item>| -> Vec<u64> {
            unproven.not_executed().map(|item| item.1).collect()
        };
        let mut unproven = Unproven::default();
        assert!(waits(&mut unproven, "a", question(7, 5)));
        assert!(waits(&mut unproven, "a", question(8, 20)));
        unproven.has_read(5 + MOMENT);
        assert_eq!(looked_at(&mut unproven), [0; 0]);
        unproven.has_read(6 + MOMENT);
        assert_eq!(looked_at(&mut unproven), [5]);
        assert_eq!(looked_at(&mut unproven), [0; 0]);
        assert_eq!(asked(unproven.executed(7, MOMENT * 9)), [5]);
        unproven.has_read(21 + MOMENT);
        assert_eq!(looked_at(&mut unproven), [20]);
        assert_eq!(asked(unproven.ended(8, |_| false).0), [0; 0], "it was looked at");
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
