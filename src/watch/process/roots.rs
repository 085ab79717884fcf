//! The sessions by their first processes, and the session of each process.
//!
//! A process belongs to a session by descent, by the kernel's records, or because a client is
//! at the terminal of the container's init. The thread of the trace and the wing `sessions`
//! fill it; it reads nothing itself. It keeps sessions that are over too, because the
//! processes that they have left behind may run on. All of it is bounded.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;

use super::births::Births;
use super::named::Named;
use crate::model::{ContainerId, ProcessIdentity};

/// How many sessions are followed at once. The processes of further sessions are found only
/// by their living parents.
const MAX_ROOTS: usize = 8 * 1024;
/// How many processes of sessions are remembered.
const MAX_MEMBERS: usize = 64 * 1024;
/// How long an ended process is remembered, in clock ticks: Linux reports a hundred a second.
const KEPT: u64 = 15 * 100;
/// How far births are followed.
const MAX_GENERATIONS: usize = 256;

/// The first processes of sessions. Sessions that are over are included, because the
/// processes that they have left behind may run on.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    roots: HashMap<ProcessIdentity, Root>,
    /// The first process that has a pid now, or had it last.
    numbers: HashMap<u32, ProcessIdentity>,
    /// Processes whose end is recorded, and when, in clock ticks since boot: a session may be
    /// opened after the end of its first process has been read.
    exits: HashMap<u32, u64>,
    /// By pid and time, oldest first; also those whose pid another process has had since.
    exits_in_order: VecDeque<(u32, u64)>,
    /// How many living processes of each container's sessions are followed.
    live: HashMap<ContainerId, usize>,
    /// Counts the sessions that were opened.
    opened: u64,
    /// Processes that were born in a session.
    members: HashMap<u32, Member>,
    /// Members that have ended, and when, in clock ticks since boot.
    ended: VecDeque<(u64, u32)>,
    /// The present or last session at the terminal of a container's init, by init's pid.
    terminals: HashMap<u32, Terminal>,
    /// Processes that came from outside, by the kernel's records. They are kept as long as a
    /// request of the gate about one may wait to be examined.
    arrivals: VecDeque<Arrived>,
}

/// A process from outside has executed a program in a container.
#[derive(Clone, Debug)]
pub(crate) struct Arrived {
    pub(crate) container: ContainerId,
    pub(crate) pid: u32,
    /// By the clock of the kernel's records.
    pub(crate) executed: u64,
    /// A runtime put the process into the container's control group. Otherwise the process
    /// sees the container's root.
    pub(crate) is_in_control_group: bool,
    /// Its parents, the nearest first.
    pub(crate) makers: Arc<[Maker]>,
}

/// A process that has created another one, by the kernel's records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Maker {
    pub(crate) pid: u32,
    /// The program that it ran, where that was recorded.
    pub(crate) exe: Option<Box<[u8]>>,
}

impl Arrived {
    /// `None` if the process is in another control group: that may be below the container's.
    pub(crate) fn in_control_group(&self) -> Option<bool> {
        self.is_in_control_group.then_some(true)
    }
}

/// How many ends of processes are remembered.
const MAX_EXITS: usize = 16 * 1024;
/// A birth is recorded within the clock tick of its start time, or the next.
const TICK: u64 = 1;

/// How many arrivals are remembered.
const MAX_ARRIVALS: usize = 1024;

/// A session at the terminal of a container's init. Its commands are executed by init, and by
/// the processes that init creates meanwhile.
#[derive(Debug)]
struct Terminal {
    container: ContainerId,
    init: ProcessIdentity,
    arrival: Arrival,
    has_left: bool,
}

/// A session that began when a client attached to a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) session: ProcessIdentity,
    pub(crate) at: Timestamp,
    /// The same in clock ticks since boot: processes that are born later may belong to it.
    pub(crate) ticks: u64,
}

/// A process that was born in a session.
#[derive(Debug)]
struct Member {
    session: ProcessIdentity,
    /// `None` if its session was followed no more when it was born, or if it has ended.
    lives_in: Option<ContainerId>,
    /// When the record of its birth was read, in clock ticks since boot.
    born: u64,
}

#[derive(Debug)]
struct Root {
    container: ContainerId,
    identity: ProcessIdentity,
    /// The sessions are numbered in the order in which they opened.
    number: u64,
    /// By the kernel's records.
    has_ended: bool,
}

impl Roots {
    pub(crate) fn arrived(&mut self, arrived: Arrived) {
        if self.arrivals.len() == MAX_ARRIVALS {
            self.arrivals.pop_front();
        }
        self.arrivals.push_back(arrived);
    }

    /// The arrival of a process from outside that executed something after `since`, by the
    /// clock of the kernel's records.
    pub(crate) fn arrival(
        &self,
        container: &ContainerId,
        pid: u32,
        since: u64,
    ) -> Option<&Arrived> {
        self.arrivals.iter().find(|arrived| {
            arrived.pid == pid && arrived.executed >= since && arrived.container == *container
        })
    }

    /// Opens a session; false if it is open already.
    pub(crate) fn open(&mut self, container: &ContainerId, identity: ProcessIdentity) -> bool {
        if self.is_open(identity) {
            return false;
        }
        if self.roots.len() >= MAX_ROOTS
            && let Some(oldest) = self.roots.values().min_by_key(|root| root.number)
        {
            let oldest = oldest.identity;
            self.forget_root(oldest);
        }
        self.opened += 1;
        let number = self.opened;
        let ended = self.exits.get(&identity.pid).copied();
        let has_ended = ended.is_some_and(|ended| ended >= identity.start_time);
        if !has_ended {
            *self.live.entry(container.clone()).or_default() += 1;
        }
        let root = Root { container: container.clone(), identity, number, has_ended };
        self.roots.insert(identity, root);
        self.numbers.insert(identity.pid, identity);
        true
    }

    fn forget_root(&mut self, identity: ProcessIdentity) {
        if let Some(root) = self.roots.remove(&identity)
            && !root.has_ended
        {
            ends(&mut self.live, &root.container);
        }
        if self.numbers.get(&identity.pid) == Some(&identity) {
            self.numbers.remove(&identity.pid);
        }
    }

    /// A process was born at this time, in clock ticks since boot, in a container or not. An
    /// earlier process with its pid has ended. That one's session keeps the processes that it
    /// has left behind, and does not get those of the new process.
    pub(crate) fn reborn(&mut self, pid: u32, born: u64) {
        let is_older = |identity: &ProcessIdentity| identity.start_time + TICK < born;
        if self.numbers.get(&pid).is_some_and(is_older) {
            // Its end may not have been recorded.
            self.ends_as_root(pid);
            self.numbers.remove(&pid);
        }
        if self.members.get(&pid).is_some_and(|member| member.born + TICK < born) {
            self.forget_member(pid);
        }
        self.exits.remove(&pid);
    }

    pub(crate) fn is_open(&self, identity: ProcessIdentity) -> bool {
        self.roots.contains_key(&identity)
    }

    /// The session that a process has opened, unless the end of that process is recorded:
    /// then another process may have the pid.
    pub(crate) fn opened_by(&self, pid: u32) -> Option<(&ContainerId, ProcessIdentity)> {
        let root = self.roots.get(self.numbers.get(&pid)?).filter(|root| !root.has_ended)?;
        Some((&root.container, root.identity))
    }

    /// How many sessions have been opened so far.
    pub(crate) fn opened(&self) -> u64 {
        self.opened
    }

    /// The session of a process: that of its nearest ancestor, or of the process itself, that
    /// is the first process of a session, a member of one, or at a terminal.
    pub(crate) fn of(
        &self,
        container: &ContainerId,
        births: &Births,
        named: Named,
    ) -> Option<ProcessIdentity> {
        if self.roots.is_empty() && self.terminals.is_empty() {
            return None;
        }
        let by_identity = |identity: ProcessIdentity| {
            let root = self.roots.get(&identity)?;
            let is_it = root.container == *container
                && root.identity.start_time <= named.read_at.saturating_add(1);
            is_it.then_some(root.identity)
        };
        let root = |pid: u32| by_identity(*self.numbers.get(&pid)?);
        let at_terminal =
            |pid: u32| self.terminals.get(&pid).filter(|terminal| terminal.container == *container);
        let member = |pid: u32| {
            let session = self.members.get(&pid)?.session;
            // At a terminal, an earlier session counts too: it keeps the processes that it
            // has left behind.
            let was_at_terminal = || at_terminal(session.pid).map(|_| session);
            by_identity(session).or_else(was_at_terminal)
        };
        let mut child = None;
        let parents = births.parents_of(named).take(MAX_GENERATIONS);
        for pid in std::iter::once(named.pid).chain(parents) {
            if let Some(session) = root(pid).or_else(|| member(pid)) {
                return Some(session);
            }
            if let Some(Terminal { arrival, has_left, .. }) = at_terminal(pid) {
                // Processes that it created before belong to no session.
                let is_made_meanwhile = child.is_none_or(|child| {
                    births.read_at(child).is_some_and(|read_at| read_at >= arrival.ticks)
                });
                return (is_made_meanwhile && !has_left).then_some(arrival.session);
            }
            child = Some(pid);
        }
        None
    }

    /// A client has attached to the terminal of a container's init.
    pub(crate) fn came_to_terminal(
        &mut self,
        container: &ContainerId,
        init: ProcessIdentity,
        arrival: Arrival,
    ) {
        let container = container.clone();
        let terminal = Terminal { container, init, arrival, has_left: false };
        self.terminals.insert(init.pid, terminal);
        self.opened += 1;
    }

    /// Whether a session is open in a container: one of its processes lives, or its client is at
    /// the terminal.
    pub(crate) fn has_open(&self, container: &ContainerId, init: ProcessIdentity) -> bool {
        self.live.contains_key(container) || self.at_terminal(init).is_some()
    }

    /// The session that is at the terminal of a container's init.
    pub(crate) fn at_terminal(&self, init: ProcessIdentity) -> Option<Arrival> {
        let terminal = self.terminals.get(&init.pid)?;
        (terminal.init == init && !terminal.has_left).then_some(terminal.arrival)
    }

    /// The session has left its terminal. What it has begun continues.
    pub(crate) fn left_terminal(&mut self, session: ProcessIdentity) {
        for terminal in self.terminals.values_mut() {
            terminal.has_left |= terminal.arrival.session == session;
        }
    }

    /// A process of a container has created another one.
    pub(crate) fn born(&mut self, pid: u32, parent: u32, born: u64) {
        let root = self.numbers.get(&parent).copied();
        let at_terminal = || {
            let terminal = self.terminals.get(&parent).filter(|terminal| !terminal.has_left);
            terminal.map(|terminal| terminal.arrival.session)
        };
        let member = || self.members.get(&parent).map(|member| member.session);
        let session = root.or_else(at_terminal).or_else(member);
        match session {
            Some(session) if self.members.len() < MAX_MEMBERS => {
                self.forget_member(pid);
                let lives_in = self.container_of(session);
                if let Some(container) = &lives_in {
                    *self.live.entry(container.clone()).or_default() += 1;
                }
                self.members.insert(pid, Member { session, lives_in, born });
            }
            // An earlier process with this pid has ended.
            Some(_) | None => self.forget_member(pid),
        }
    }

    /// A process has ended. It is remembered for a while, because its writes are reported
    /// later.
    pub(crate) fn ended(&mut self, pid: u32, now: u64) {
        self.exits.insert(pid, now);
        self.exits_in_order.push_back((pid, now));
        if self.exits_in_order.len() > MAX_EXITS
            && let Some((oldest, at)) = self.exits_in_order.pop_front()
            && self.exits.get(&oldest) == Some(&at)
        {
            self.exits.remove(&oldest);
        }
        if let Some(session) = self.ends_as_root(pid) {
            self.left_terminal(session);
        }
        if self.members.contains_key(&pid) {
            self.ends_as_member(pid);
            self.ended.push_back((now, pid));
        }
        while let Some((ended, pid)) = self.ended.front().copied()
            && ended + KEPT < now
        {
            self.ended.pop_front();
            // Another process may have the pid by now.
            if self.members.get(&pid).is_some_and(|member| member.born <= ended) {
                self.forget_member(pid);
            }
        }
    }

    /// The container of a session that is followed.
    fn container_of(&self, session: ProcessIdentity) -> Option<ContainerId> {
        let at_terminal = || {
            let mut terminals = self.terminals.values();
            let it = terminals.find(|terminal| terminal.arrival.session == session)?;
            Some(it.container.clone())
        };
        self.roots.get(&session).map(|root| root.container.clone()).or_else(at_terminal)
    }

    /// The process was the first one of a session. Returns the session.
    fn ends_as_root(&mut self, pid: u32) -> Option<ProcessIdentity> {
        let root = self.roots.get_mut(self.numbers.get(&pid)?)?;
        if !std::mem::replace(&mut root.has_ended, true) {
            ends(&mut self.live, &root.container);
        }
        Some(root.identity)
    }

    fn ends_as_member(&mut self, pid: u32) {
        let member = self.members.get_mut(&pid);
        if let Some(container) = member.and_then(|member| member.lives_in.take()) {
            ends(&mut self.live, &container);
        }
    }

    fn forget_member(&mut self, pid: u32) {
        self.ends_as_member(pid);
        self.members.remove(&pid);
    }

    pub(crate) fn forget(&mut self, container: &ContainerId) {
        self.live.remove(container);
        self.roots.retain(|_, root| root.container != *container);
        self.numbers.retain(|_, identity| self.roots.contains_key(identity));
        self.terminals.retain(|_, terminal| terminal.container != *container);
        self.arrivals.retain(|arrived| arrived.container != *container);
    }
}

/// A process of a session has ended, or is followed no more.
fn ends(live: &mut HashMap<ContainerId, usize>, container: &ContainerId) {
    if let Some(sessions) = live.get_mut(container) {
        *sessions -= 1;
        if *sessions == 0 {
            live.remove(container);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_first_process_decides_the_session() {
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
        assert!(!roots.open(&container, identity(2)), "it is open already");
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
    fn a_session_is_open_until_its_first_process_ends_or_its_client_leaves() {
        let (one, other) = (ContainerId::new("default", "c1"), ContainerId::new("default", "c2"));
        let identity = |pid| ProcessIdentity { pid, start_time: 5 };
        let init = identity(1);
        let mut roots = Roots::default();
        let is_open = |roots: &Roots| [&one, &other].map(|it| roots.has_open(it, init));
        roots.open(&one, identity(2));
        roots.open(&one, identity(3));
        assert_eq!(is_open(&roots), [true, false]);
        [2, 2, 9].into_iter().for_each(|pid| roots.ended(pid, 10));
        assert_eq!(is_open(&roots), [true, false]);
        // What it has left behind, and the child of that.
        roots.born(7, 3, 10);
        roots.born(8, 7, 11);
        [3, 7].into_iter().for_each(|pid| roots.ended(pid, 12));
        assert_eq!(is_open(&roots), [true, false]);
        // Its end was not recorded.
        roots.reborn(8, 500);
        assert_eq!(is_open(&roots), [false, false]);
        roots.open(&one, identity(3));
        roots.open(&one, ProcessIdentity { pid: 5, start_time: 600 });
        assert_eq!(is_open(&roots), [true, false]);
        roots.reborn(5, 900);
        assert_eq!(is_open(&roots), [false, false]);
        // Its end was read before it was opened.
        roots.ended(4, 10);
        roots.open(&one, identity(4));
        assert_eq!(is_open(&roots), [false, false]);
        let arrival = Arrival { session: identity(6), at: Timestamp::UNIX_EPOCH, ticks: 5 };
        roots.came_to_terminal(&one, init, arrival);
        assert_eq!(is_open(&roots), [true, true], "the init decides");
        roots.left_terminal(identity(6));
        assert_eq!(is_open(&roots), [false, false]);
        for pid in 100..100 + u32::try_from(MAX_ROOTS).unwrap() + 5 {
            roots.open(&other, identity(pid));
        }
        assert_eq!(roots.live.get(&other), Some(&MAX_ROOTS), "the oldest are not followed");
        roots.forget(&other);
        assert_eq!(is_open(&roots), [false, false]);
    }

    #[test]
    fn h03_a_process_from_outside_is_known_by_its_record() {
        let container = |id| ContainerId::new("default", id);
        let makers: Arc<[Maker]> = Arc::new([Maker { pid: 6, exe: None }]);
        let arrived = |id, pid, executed| Arrived {
            container: container(id),
            pid,
            executed,
            is_in_control_group: true,
            makers: makers.clone(),
        };
        let mut roots = Roots::default();
        roots.arrived(arrived("c1", 7, 100));
        let knows = |roots: &Roots, id, pid, since| {
            let found = roots.arrival(&container(id), pid, since);
            assert!(found.is_none_or(|found| found.makers == makers));
            found.is_some()
        };
        assert!(knows(&roots, "c1", 7, 90));
        assert!(!knows(&roots, "c1", 7, 110), "another one by then");
        assert!(!knows(&roots, "c1", 8, 90));
        assert!(!knows(&roots, "c2", 7, 90));
        for pid in 0..2 * u32::try_from(MAX_ARRIVALS).unwrap() {
            roots.arrived(arrived("c2", 1000 + pid, 200));
        }
        assert_eq!(roots.arrivals.len(), MAX_ARRIVALS);
        assert!(!knows(&roots, "c1", 7, 90));
        roots.forget(&container("c2"));
        assert!(roots.arrivals.is_empty());
    }

    #[test]
    fn w01_a_closed_session_gets_nothing_of_a_process_that_reuses_its_pid() {
        let container = ContainerId::new("default", "c1");
        let first = ProcessIdentity { pid: 7, start_time: 10 };
        let births = Births::default();
        let mut roots = Roots::default();
        roots.open(&container, first);
        roots.born(8, 7, 12);
        // The record of its own birth may be read after the session was opened.
        roots.reborn(7, 11);
        let of = |roots: &Roots, pid| roots.of(&container, &births, Named { pid, read_at: 5000 });
        assert_eq!([7, 8].map(|pid| of(&roots, pid)), [Some(first); 2]);
        roots.ended(7, 20);
        assert_eq!(of(&roots, 7), Some(first), "its writes still belong to its session");
        roots.reborn(7, 4000);
        assert_eq!(of(&roots, 7), None);
        assert_eq!(of(&roots, 8), Some(first), "it is still running");
        roots.born(9, 7, 4001);
        assert_eq!(of(&roots, 9), None);
        // The new process opens a session too.
        let second = ProcessIdentity { pid: 7, start_time: 4000 };
        roots.open(&container, second);
        assert_eq!([7, 8].map(|pid| of(&roots, pid)), [Some(second), Some(first)]);
        roots.reborn(8, 4500);
        assert_eq!(of(&roots, 8), None);
    }

    #[test]
    fn w01_a_session_whose_end_was_recorded_before_it_opened_is_over() {
        let container = ContainerId::new("default", "c1");
        let mut roots = Roots::default();
        roots.ended(7, 20);
        roots.open(&container, ProcessIdentity { pid: 7, start_time: 10 });
        assert_eq!(roots.opened_by(7), None);
        roots.open(&container, ProcessIdentity { pid: 7, start_time: 30 });
        assert!(roots.opened_by(7).is_some(), "another process with its pid");
        for pid in 0..2 * u32::try_from(MAX_EXITS).unwrap() {
            roots.ended(1000 + pid, 40);
        }
        assert!(roots.exits.len() <= MAX_EXITS && roots.exits_in_order.len() <= MAX_EXITS);
    }

    #[test]
    fn a_process_that_has_ended_is_the_opener_of_no_session() {
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
    fn init_belongs_to_the_session_that_is_at_its_terminal() {
        let container = ContainerId::new("default", "c1");
        let init = ProcessIdentity { pid: 2, start_time: 1 };
        let arrival = |ticks| Arrival {
            session: ProcessIdentity { pid: 2, start_time: ticks },
            at: Timestamp::UNIX_EPOCH,
            ticks,
        };
        let mut births = Births::default();
        let mut roots = Roots::default();
        let born = |births: &mut Births, roots: &mut Roots, pid, parent, read_at| {
            births.born(pid, parent, read_at);
            roots.born(pid, parent, read_at);
        };
        born(&mut births, &mut roots, 3, 2, 10);
        // Its record was read before the attachment was known.
        born(&mut births, &mut roots, 4, 2, 20);
        let first = arrival(20);
        roots.came_to_terminal(&container, init, first);
        let there = |pid| roots.of(&container, &births, Named { pid, read_at: 20 });
        assert_eq!([2, 3, 4].map(there), [Some(first.session), None, Some(first.session)]);
        born(&mut births, &mut roots, 5, 2, 25);
        born(&mut births, &mut roots, 6, 5, 26);
        born(&mut births, &mut roots, 7, 3, 27);
        roots.left_terminal(first.session);
        born(&mut births, &mut roots, 8, 2, 40);
        born(&mut births, &mut roots, 9, 5, 41);
        let of = |roots: &Roots, pid| {
            roots.of(&container, &births, Named { pid, read_at: 50 }).map(|root| root.start_time)
        };
        assert_eq!(of(&roots, 2), None, "the client has left");
        assert_eq!([5, 6, 9].map(|pid| of(&roots, pid)), [Some(20); 3], "they are left behind");
        assert_eq!([3, 7, 8].map(|pid| of(&roots, pid)), [None; 3]);

        let second = arrival(30);
        roots.came_to_terminal(&container, init, second);
        assert_eq!(roots.at_terminal(init), Some(second));
        assert_eq!([2, 8].map(|pid| of(&roots, pid)), [Some(30); 2]);
        assert_eq!([5, 6, 9].map(|pid| of(&roots, pid)), [Some(20); 3], "of the first session");
        assert_eq!([3, 4, 7].map(|pid| of(&roots, pid)), [None; 3]);
        let other = ContainerId::new("default", "c2");
        assert_eq!(roots.of(&other, &births, Named { pid: 8, read_at: 50 }), None);
        roots.forget(&container);
        assert_eq!(of(&roots, 8), None);
    }

    #[test]
    fn a_client_leaves_a_terminal_when_it_ends() {
        let container = ContainerId::new("default", "c1");
        let identity = |pid| ProcessIdentity { pid, start_time: 1 };
        let mut roots = Roots::default();
        roots.open(&container, identity(90));
        let arrival = Arrival { session: identity(90), at: Timestamp::UNIX_EPOCH, ticks: 5 };
        roots.came_to_terminal(&container, identity(2), arrival);
        assert_eq!(roots.at_terminal(identity(2)), Some(arrival));
        roots.ended(90, 20);
        assert_eq!(roots.at_terminal(identity(2)), None);
    }

    #[test]
    fn the_oldest_session_is_forgotten_when_there_are_too_many() {
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
