//! Open sessions by their first processes, and whose session a process belongs to.

use std::collections::{HashMap, VecDeque};

use super::packages::Births;
use super::writers::Named;
use crate::model::{ContainerId, ProcessIdentity};

/// How many sessions are followed at once. Of more, what they do is known by their
/// processes' living parents only.
const MAX_ROOTS: usize = 8 * 1024;
/// How many of their processes.
const MAX_MEMBERS: usize = 64 * 1024;
/// How long one that has ended is remembered, in clock ticks, of which Linux tells a
/// hundred a second.
const KEPT: u64 = 15 * 100;
/// How far births are followed.
const MAX_GENERATIONS: usize = 256;

/// The first processes of sessions, also of those that are over while what they have
/// left behind may run on.
#[derive(Debug, Default)]
pub(super) struct Roots {
    roots: HashMap<u32, Root>,
    /// Moves with each session that opens.
    opened: u64,
    /// Who was born in one.
    members: HashMap<u32, ProcessIdentity>,
    /// Those of them that have ended, and when, in clock ticks since boot.
    ended: VecDeque<(u64, u32)>,
}

#[derive(Debug)]
struct Root {
    container: ContainerId,
    identity: ProcessIdentity,
    /// In the order of their opening.
    number: u64,
    /// By the kernel's records.
    has_ended: bool,
}

impl Roots {
    /// False if it is open already.
    pub(super) fn open(&mut self, container: &ContainerId, identity: ProcessIdentity) -> bool {
        if self.is_open(identity) {
            return false;
        }
        if self.roots.len() >= MAX_ROOTS
            && let Some(oldest) = self.roots.values().min_by_key(|root| root.number)
        {
            let oldest = oldest.identity.pid;
            self.roots.remove(&oldest);
        }
        self.opened += 1;
        let number = self.opened;
        let root = Root { container: container.clone(), identity, number, has_ended: false };
        self.roots.insert(identity.pid, root);
        true
    }

    pub(super) fn is_open(&self, identity: ProcessIdentity) -> bool {
        self.roots.get(&identity.pid).is_some_and(|root| root.identity == identity)
    }

    /// The session that a process has opened of which no end is recorded. Who has this
    /// number now may be another one.
    pub(super) fn opened_by(&self, pid: u32) -> Option<(&ContainerId, ProcessIdentity)> {
        let root = self.roots.get(&pid).filter(|root| !root.has_ended)?;
        Some((&root.container, root.identity))
    }

    /// How many have been opened so far.
    pub(super) fn opened(&self) -> u64 {
        self.opened
    }

    /// The session of a process: the nearest of its parents, or itself, that is the
    /// first one of a session.
    pub(super) fn of(
        &self,
        container: &ContainerId,
        births: &Births,
        named: Named,
    ) -> Option<ProcessIdentity> {
        if self.roots.is_empty() {
            return None;
        }
        let root = |pid: u32| {
            let root = self.roots.get(&pid)?;
            let is_it = root.container == *container
                && root.identity.start_time <= named.read_at.saturating_add(1);
            is_it.then_some(root.identity)
        };
        let known = |pid: u32| {
            let member = || self.members.get(&pid).and_then(|member| root(member.pid));
            root(pid).or_else(member)
        };
        known(named.pid).or_else(|| births.parents_of(named).take(MAX_GENERATIONS).find_map(known))
    }

    /// A process of a container has made another one.
    pub(super) fn born(&mut self, pid: u32, parent: u32) {
        let session = match self.roots.get(&parent) {
            Some(root) => Some(root.identity),
            None => self.members.get(&parent).copied(),
        };
        match session {
            Some(root) if self.members.len() < MAX_MEMBERS => {
                self.members.insert(pid, root);
            }
            // Whoever had this number is gone.
            Some(_) | None => {
                self.members.remove(&pid);
            }
        }
    }

    /// A process has ended. What it has written is told later.
    pub(super) fn ended(&mut self, pid: u32, now: u64) {
        if let Some(root) = self.roots.get_mut(&pid) {
            root.has_ended = true;
        }
        if self.members.contains_key(&pid) {
            self.ended.push_back((now, pid));
        }
        while let Some((ended, pid)) = self.ended.front().copied()
            && ended + KEPT < now
        {
            self.ended.pop_front();
            self.members.remove(&pid);
        }
    }

    pub(super) fn forget(&mut self, container: &ContainerId) {
        self.roots.retain(|_, root| root.container != *container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_first_process_names_the_session() {
        let container = ContainerId::new("default", "c1");
        let identity = |pid| ProcessIdentity { pid, start_time: 5 };
        let mut births = Births::default();
        let mut born = |pid, parent| births.born(pid, parent, 10);
        born(3, 2);
        born(4, 3);
        born(5, 4);
        born(9, 1);
        let mut roots = Roots::default();
        let of = |roots: &Roots, pid| roots.of(&container, &births, Named { pid, read_at: 12 });
        assert_eq!(of(&roots, 5), None);
        assert!(roots.open(&container, identity(2)));
        assert!(!roots.open(&container, identity(2)), "it is the same one");
        assert_eq!(of(&roots, 2), Some(identity(2)));
        assert_eq!(of(&roots, 5), Some(identity(2)));
        assert_eq!(of(&roots, 9), None);
        roots.open(&container, identity(4));
        assert_eq!(of(&roots, 5), Some(identity(4)), "one inside of the other");
        assert_eq!(of(&roots, 3), Some(identity(2)));
        let other = ContainerId::new("default", "c2");
        assert_eq!(roots.of(&other, &births, Named { pid: 5, read_at: 12 }), None);
        roots.forget(&container);
        assert_eq!(of(&roots, 5), None);
    }

    #[test]
    fn who_has_ended_is_nobodys_opener() {
        let (container, identity) =
            (ContainerId::new("default", "c1"), ProcessIdentity { pid: 7, start_time: 1 });
        let mut roots = Roots::default();
        roots.open(&container, identity);
        assert_eq!(roots.opened_by(7), Some((&container, identity)));
        assert_eq!(roots.opened_by(8), None);
        roots.ended(7, 20);
        assert_eq!(roots.opened_by(7), None);
    }

    #[test]
    fn the_oldest_is_forgotten_when_there_are_too_many() {
        let container = ContainerId::new("default", "c1");
        let births = Births::default();
        let mut roots = Roots::default();
        let most = u32::try_from(MAX_ROOTS).unwrap();
        for pid in 1..=most + 1 {
            roots.open(&container, ProcessIdentity { pid, start_time: 1 });
        }
        let of = |pid| roots.of(&container, &births, Named { pid, read_at: 1 });
        assert_eq!(of(1), None);
        assert!(of(2).is_some() && of(most + 1).is_some());
    }
}
