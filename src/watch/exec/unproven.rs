//! Executions that the gate was asked about and that the kernel has not recorded: a mere
//! check (`AT_EXECVE_CHECK`), an execve that failed after the gate's answer, or one that is
//! still under way.
//!
//! Each waits here until the kernel records that its process has become a program, and is
//! reported only then. If the record does not come soon, the file is checked meanwhile: it is
//! new or changed, whether it runs or not. Where records were lost or are read much too late,
//! and at a stop, nothing can be proven: every execution that waits is reported.
//!
//! Pure: it reads no records and reports nothing. `trace` and `content` do.

use std::collections::{HashMap, VecDeque};

use crate::model::ProcessIdentity;
use crate::watch::core::fair::Owned;

/// How many processes' executions are remembered; the oldest is forgotten.
const MAX_RECORDED: usize = 16 * 1024;
/// How many may wait, for one container and for all.
const MAX_WAITING_OF_ONE: usize = 128;
const MAX_WAITING: usize = 1024;
/// How late a record may be read, in nanoseconds.
const MAX_LAG: u64 = 1_000_000_000;
/// How long most execves take at most, in nanoseconds.
const MOMENT: u64 = 250_000_000;

/// A request to the gate to permit an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) process: ProcessIdentity,
    /// When, by the clock of the kernel's records.
    pub(crate) asked: u64,
}

#[derive(Debug)]
struct Waiting<T> {
    request: Request,
    execution: T,
    /// Its file was checked without waiting for the record.
    is_checked: bool,
}

#[derive(Debug)]
pub(crate) struct Unproven<T> {
    /// When each process last became a program, by pid.
    recorded: HashMap<u32, u64>,
    /// The same in order of time. An entry is outdated if its process has become another
    /// program since.
    order: VecDeque<(u64, u32)>,
    /// Executions up to this time may be forgotten.
    forgotten: u64,
    waiting: HashMap<u32, Vec<Waiting<T>>>,
    /// All records from before this time have been read.
    read_until: u64,
}

impl<T> Default for Unproven<T> {
    fn default() -> Self {
        let (recorded, order, waiting) = Default::default();
        Unproven { recorded, order, forgotten: 0, waiting, read_until: 0 }
    }
}

impl<T: Owned> Unproven<T> {
    /// Whether the process has become a program since. Its mappings prove no more: with
    /// binfmt_misc, which a container can have for itself (Linux 6.7), it maps an interpreter
    /// for a program of any kind.
    pub(crate) fn is_proven(&self, request: &Request) -> bool {
        let last = self.recorded.get(&request.process.pid);
        request.asked <= self.forgotten || last.is_some_and(|&time| time >= request.asked)
    }

    /// Keeps an execution until it is proven. Without room it is returned.
    pub(crate) fn wait(&mut self, request: Request, execution: T) -> Result<(), T> {
        let owner = execution.owner();
        let waiting = || self.waiting.values().flatten();
        let of_one = waiting().filter(|other| other.execution.owner() == owner).count();
        if of_one >= MAX_WAITING_OF_ONE || waiting().count() >= MAX_WAITING {
            return Err(execution);
        }
        let waiting = Waiting { request, execution, is_checked: false };
        self.waiting.entry(request.process.pid).or_default().push(waiting);
        Ok(())
    }

    /// A process has become a program. Returns its executions that this proves.
    pub(crate) fn executed(&mut self, pid: u32, time: u64) -> Vec<T> {
        self.recorded.insert(pid, time);
        self.order.push_back((time, pid));
        self.keep_bounds();
        let proven = self.take(pid, |waiting| waiting.request.asked <= time);
        proven.into_iter().map(|waiting| waiting.execution).collect()
    }

    /// A process may have ended without running what waits for it. Returns the executions
    /// whose file was not checked, and whether a process with this pid goes on.
    pub(crate) fn ended(
        &mut self,
        pid: u32,
        goes_on: impl Fn(ProcessIdentity) -> bool,
    ) -> (Vec<T>, bool) {
        let over = self.take(pid, |waiting| !goes_on(waiting.request.process));
        let unchecked = over.into_iter().filter(|waiting| !waiting.is_checked);
        let executions = unchecked.map(|waiting| waiting.execution).collect();
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

    /// Records were lost, or there are none from before `now`, or none will be read any more.
    /// Returns everything that waits.
    pub(crate) fn forget_all(&mut self, now: u64) -> Vec<T> {
        let waiting = std::mem::take(&mut self.waiting).into_values().flatten();
        let waiting = waiting.map(|waiting| waiting.execution).collect();
        *self = Unproven { forgotten: now, read_until: self.read_until, ..Unproven::default() };
        waiting
    }

    pub(crate) fn has_read(&mut self, until: u64) {
        self.read_until = until;
    }

    /// The executions that the records read so far do not show, each once: an execve may
    /// be slow, or may have failed.
    pub(crate) fn not_executed(&mut self) -> impl Iterator<Item = &T> {
        let read_until = self.read_until;
        self.waiting.values_mut().flatten().filter_map(move |waiting| {
            let is_over = waiting.request.asked.saturating_add(MOMENT) < read_until;
            let is_first = is_over && !waiting.is_checked;
            waiting.is_checked |= is_over;
            is_first.then_some(&waiting.execution)
        })
    }

    /// The executions that have waited too long for records that are not read.
    pub(crate) fn overdue(&mut self, now: u64) -> Vec<T> {
        let read_until = self.read_until;
        let is_overdue = |waiting: &Waiting<T>| {
            let asked = waiting.request.asked;
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

    fn request(pid: u32, asked: u64) -> Request {
        Request { process: ProcessIdentity { pid, start_time: asked }, asked }
    }

    fn waits(unproven: &mut Unproven<Item>, container: &str, request: Request) -> bool {
        let container = ContainerId::new("test", container);
        unproven.wait(request, Item(container, request.asked)).is_ok()
    }

    fn asked(items: Vec<Item>) -> Vec<u64> {
        items.into_iter().map(|item| item.1).collect()
    }

    #[test]
    fn d04_an_execution_is_reported_when_it_is_recorded_and_a_check_never() {
        let mut unproven = Unproven::default();
        assert!(!unproven.is_proven(&request(7, 5)));
        assert!(waits(&mut unproven, "a", request(7, 5)));
        assert!(waits(&mut unproven, "a", request(8, 5)));
        assert!(waits(&mut unproven, "a", request(7, 25)));
        assert_eq!(asked(unproven.executed(7, 10)), [5]);
        assert!(unproven.is_proven(&request(7, 5)));
        assert!(!unproven.is_proven(&request(7, 25)));
        let (over, goes_on) = unproven.ended(8, |_| false);
        assert_eq!((asked(over), goes_on), (vec![5], false), "its file is still to be checked");
        assert_eq!(asked(unproven.executed(8, 40)), [0; 0], "another process has its pid");
        assert!(waits(&mut unproven, "a", request(7, 26)));
        let (over, goes_on) = unproven.ended(7, |process| process.start_time == 25);
        assert_eq!((asked(over), goes_on), (vec![26], true));
        assert_eq!(asked(unproven.executed(7, 40)), [25]);
        assert!(unproven.waiting.is_empty());
    }

    #[test]
    fn d04_a_file_not_executed_in_a_moment_is_checked_once_and_reported_when_it_is() {
        let checked = |unproven: &mut Unproven<Item>| -> Vec<u64> {
            unproven.not_executed().map(|item| item.1).collect()
        };
        let mut unproven = Unproven::default();
        assert!(waits(&mut unproven, "a", request(7, 5)));
        assert!(waits(&mut unproven, "a", request(8, 20)));
        unproven.has_read(5 + MOMENT);
        assert_eq!(checked(&mut unproven), [0; 0]);
        unproven.has_read(6 + MOMENT);
        assert_eq!(checked(&mut unproven), [5]);
        assert_eq!(checked(&mut unproven), [0; 0]);
        assert_eq!(asked(unproven.executed(7, MOMENT * 9)), [5]);
        unproven.has_read(21 + MOMENT);
        assert_eq!(checked(&mut unproven), [20]);
        assert_eq!(asked(unproven.ended(8, |_| false).0), [0; 0], "it was checked");
    }

    #[test]
    fn d04_where_records_were_lost_every_waiting_execution_is_reported() {
        let mut unproven = Unproven::default();
        assert!(waits(&mut unproven, "a", request(7, 5)));
        assert_eq!(asked(unproven.forget_all(50)), [5]);
        assert!(unproven.is_proven(&request(7, 50)));
        assert!(!unproven.is_proven(&request(7, 51)));
        for time in 0..=MAX_RECORDED as u64 {
            unproven.executed(1, 100 + time);
        }
        assert_eq!((unproven.order.len(), unproven.recorded.len()), (MAX_RECORDED, 1));
        assert!(unproven.is_proven(&request(7, 100)));
        assert!(!unproven.is_proven(&request(7, 101)));
    }

    #[test]
    fn d04_executions_whose_records_are_late_are_reported() {
        let mut unproven = Unproven::default();
        unproven.has_read(10);
        assert!(waits(&mut unproven, "a", request(7, 5)));
        assert!(waits(&mut unproven, "a", request(7, 20)));
        assert!(waits(&mut unproven, "a", request(8, 30)));
        assert_eq!(asked(unproven.overdue(20 + MAX_LAG)), [0; 0]);
        assert_eq!(asked(unproven.overdue(21 + MAX_LAG)), [20]);
        unproven.has_read(31);
        assert_eq!(asked(unproven.overdue(40 + MAX_LAG)), [0; 0], "they belong to a check");
    }

    #[test]
    fn d04_one_container_leaves_room_for_the_others_and_without_room_it_is_reported() {
        let mut unproven = Unproven::default();
        for number in 0..MAX_WAITING_OF_ONE as u64 {
            assert!(waits(&mut unproven, "a", request(7, number)));
        }
        assert!(!waits(&mut unproven, "a", request(8, 1)));
        assert!(waits(&mut unproven, "b", request(8, 1)));
    }
}
