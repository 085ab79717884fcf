//! Remembers the parent of each recent process, by the kernel's records, and the container in
//! which it was born.
//!
//! The thread of the trace fills it, many threads ask it. It is bounded, and it reads nothing
//! itself: a pid may be reused, so each answer compares times.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::named::Named;
use crate::model::ProcessIdentity;
use crate::watch::core::watched::Watched;

/// How long an event may lag behind the end of the process that it names, in clock ticks:
/// Linux reports a hundred a second. After that, its pid may belong to another process.
pub(crate) const LAG: u64 = 2 * 100;

/// How many births are remembered.
pub(crate) const MAX_BIRTHS: usize = 64 * 1024;

/// The parents of all containers' processes that were born lately. The thread that reads the
/// kernel's records writes it and must not wait for it: never hold its lock while reading
/// /proc.
#[derive(Debug, Default)]
pub(crate) struct Births {
    pub(crate) parents: HashMap<u32, Birth>,
    /// Births by pid and number, oldest first; also those that another one has replaced.
    order: VecDeque<(u32, u64)>,
    /// The number of the newest birth.
    newest: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Birth {
    pub(crate) parent: u32,
    /// When its record was read, in clock ticks since boot.
    pub(crate) read_at: u64,
    /// The container in which it was born, if that is certain. Its parent belonged to it then.
    pub(crate) home: Option<Arc<Watched>>,
    /// Births are numbered, because many of them may have one pid.
    number: u64,
}

impl Births {
    fn insert(&mut self, pid: u32, parent: u32, read_at: u64, home: Option<Arc<Watched>>) {
        self.newest += 1;
        let number = self.newest;
        self.parents.insert(pid, Birth { parent, read_at, home, number });
        self.order.push_back((pid, number));
        while self.parents.len() > MAX_BIRTHS || self.order.len() > 2 * MAX_BIRTHS {
            let Some((oldest, number)) = self.order.pop_front() else { break };
            // A later process may have the pid.
            if self.parents.get(&oldest).is_some_and(|birth| birth.number == number) {
                self.parents.remove(&oldest);
            }
        }
    }

    pub(crate) fn born(&mut self, pid: u32, parent: u32, read_at: u64) {
        self.insert(pid, parent, read_at, None);
    }

    /// Like [`born`](Births::born), for a process with a parent that certainly belongs to a
    /// container.
    pub(crate) fn born_in(&mut self, home: Arc<Watched>, pid: u32, parent: u32, read_at: u64) {
        self.insert(pid, parent, read_at, Some(home));
    }

    /// The container in which a process was born, even if it has joined others since. The
    /// process must be alive, or must have just ended.
    pub(crate) fn home_of(&self, identity: ProcessIdentity) -> Option<&Arc<Watched>> {
        let birth = self.parents.get(&identity.pid)?;
        // The record of a birth is read after the birth, and before another process has the
        // pid. An older record belongs to another process: if many processes are created, a
        // pid is reused within seconds, and the record of the new birth may be late or lost.
        birth.home.as_ref().filter(|_| identity.start_time <= birth.read_at + 1)
    }

    /// Whether such a process was born in a container, even if its parents have left it.
    pub(crate) fn is_born_inside(&self, identity: ProcessIdentity) -> bool {
        self.home_of(identity).is_some()
    }

    /// A process that was created outside of containers has this pid now.
    pub(crate) fn forget(&mut self, pid: u32) {
        self.parents.remove(&pid);
    }

    /// When the record of a birth was read, in clock ticks since boot.
    pub(crate) fn read_at(&self, pid: u32) -> Option<u64> {
        Some(self.parents.get(&pid)?.read_at)
    }

    /// The parent, its parent, and so on.
    pub(crate) fn parents_of(&self, named: Named) -> impl Iterator<Item = u32> {
        self.births_above(named).map(|birth| birth.parent)
    }

    /// The birth of the process, that of its parent, and so on.
    pub(crate) fn births_above(&self, named: Named) -> impl Iterator<Item = &Birth> {
        // A later birth belongs to another process that has the pid by now.
        let birth =
            move |pid| self.parents.get(&pid).filter(|it| it.read_at <= named.read_at + LAG);
        std::iter::successors(birth(named.pid), move |child: &&Birth| birth(child.parent))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::table::tests::watched;

    #[test]
    fn x13_a_process_has_no_home_by_the_birth_of_an_earlier_process_with_its_pid() {
        let home = Arc::new(watched("a", 1));
        let mut births = Births::default();
        births.born_in(home, 7, 1, 100);
        let has_home =
            |start_time| births.home_of(ProcessIdentity { pid: 7, start_time }).is_some();
        // The record is read at once, or some time after the birth.
        assert!(has_home(100) && has_home(101) && has_home(50));
        // Another process has the pid. Its own birth is not known yet, or will never be.
        assert!(!has_home(102) && !has_home(100 + LAG));
    }

    #[test]
    fn w08_the_births_above_a_process_show_how_far_the_container_certainly_goes() {
        let home = Arc::new(watched("a", 1));
        let mut births = Births::default();
        births.born(3, 2, 10);
        births.born_in(home.clone(), 4, 3, 20);
        births.born_in(home, 5, 4, 30);
        let above = births.births_above(Named { pid: 5, read_at: 30 });
        let above: Vec<(u32, bool)> = above.map(|it| (it.parent, it.home.is_some())).collect();
        assert_eq!(above, [(4, true), (3, true), (2, false)]);
    }

    #[test]
    fn births_are_followed_to_the_parents_as_far_as_they_are_remembered() {
        let mut births = Births::default();
        let mut born = |pid, parent, read_at| births.born(pid, parent, read_at);
        born(2, 1, 10);
        born(3, 2, 20);
        born(4, 3, 30);
        // Another process has this pid by now.
        born(9, 3, 30 + LAG + 1);
        let parents = |births: &Births, pid| -> Vec<u32> {
            births.parents_of(Named { pid, read_at: 30 }).collect()
        };
        assert_eq!(parents(&births, 4), [3, 2, 1]);
        assert!(parents(&births, 9).is_empty());
        for pid in 0..u32::try_from(MAX_BIRTHS).unwrap() {
            births.born(100 + pid, 4, 40);
        }
        assert!(parents(&births, 4).is_empty());
        assert_eq!((births.parents.len(), births.order.len()), (MAX_BIRTHS, MAX_BIRTHS));
    }

    #[test]
    fn a_birth_is_not_forgotten_for_an_earlier_one_with_its_pid() {
        let mut births = Births::default();
        // A small pid_max: the same pids again and again, inside and outside of containers.
        let pids = u32::try_from(MAX_BIRTHS / 8).unwrap();
        for round in 0..40 {
            for pid in 2..pids {
                births.born(pid, 1, round);
                if pid % 3 == 0 {
                    births.forget(pid);
                }
            }
        }
        let known = (2..pids).filter(|pid| births.read_at(*pid) == Some(39)).count();
        assert_eq!(known, (2..pids).filter(|pid| pid % 3 != 0).count());
        assert!(births.order.len() <= 2 * MAX_BIRTHS);
    }
}
