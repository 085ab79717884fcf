//! How much is kept of what a container can multiply. Pure: rooms ask before they keep.
//!
//! Four rules:
//!
//! 1. The verdict and the response come first. Whether a finding is kept as one of its own is
//!    decided after them.
//! 2. More severe findings always have room. Each severity may fill only a part of a
//!    container's room, and the less severe it is, the smaller its part. No kind fills more
//!    than half. And each kind and severity has a small reserve of its own.
//! 3. No container takes the room that another one needs. All of them share a [`Pool`]. When
//!    the pool is full, each may still have an equal part of half of it.
//! 4. Bytes count, not only numbers: one finding can have a hundred kilobytes of arguments.
//!
//! Nothing is dropped in silence: findings without room are counted in one finding of their
//! kind, and everything else is a named loss.

use std::collections::{HashMap, VecDeque};
use std::mem::size_of;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::model::{
    Fact, FileEvidence, FileFact, Filesystem, Finding, Kind, Observation, Process, SessionFact,
    Severity, shorten,
};

/// A number of entries, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    pub number: usize,
    pub bytes: usize,
}

/// Findings of one container that are kept one by one.
pub const FINDINGS: Size = Size { number: 8 * 1024, bytes: 20 << 20 };
/// The reserve of one kind and severity.
pub const RESERVED: Size = Size { number: 32, bytes: 64 << 10 };
/// Bytes of the findings of all containers, without the reserves.
pub const ALL_FINDINGS: usize = 160 << 20;

/// Files that findings of one container list one by one, about 32 bytes each.
pub const MEMBERS: usize = 256 * 1024;
/// The same for all containers.
pub const ALL_MEMBERS: usize = 2 * 1024 * 1024;

/// Observations of one container that wait for its baseline.
pub const BACKLOG: Size = Size { number: 8 * 1024, bytes: 8 << 20 };
/// Bytes of such observations of all containers.
pub const ALL_BACKLOGS: usize = 64 << 20;

/// Observations of one container that wait for containerd to report it.
pub const UNANNOUNCED: Size = Size { number: 512, bytes: 1 << 20 };
/// Bytes of such observations of all those containers.
pub const ALL_UNANNOUNCED: usize = 8 << 20;

/// Bytes that one follower of the history may leave unread.
pub const FOLLOWER: usize = 256 << 10;
/// Bytes that all followers may leave unread.
pub const ALL_FOLLOWERS: usize = 8 << 20;

/// The room that all containers share.
#[derive(Debug)]
pub struct Pool {
    capacity: usize,
    used: AtomicUsize,
    shares: AtomicUsize,
}

impl Pool {
    pub fn new(capacity: usize) -> Arc<Pool> {
        Arc::new(Pool { capacity, used: AtomicUsize::new(0), shares: AtomicUsize::new(0) })
    }

    /// One more share, which may take up to `most`.
    pub fn share(self: &Arc<Pool>, most: usize) -> Share {
        self.shares.fetch_add(1, Ordering::Relaxed);
        Share { pool: Arc::clone(self), used: 0, most }
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The part that each share may have, whatever the others take.
    fn equal_part(&self) -> usize {
        self.capacity / 2 / self.shares.load(Ordering::Relaxed).max(1)
    }
}

/// The part of one container. Gives back what it has when it is dropped.
#[derive(Debug)]
pub struct Share {
    pool: Arc<Pool>,
    used: usize,
    most: usize,
}

impl Default for Share {
    /// A share without limits, of a pool of its own.
    fn default() -> Share {
        Pool::new(usize::MAX).share(usize::MAX)
    }
}

impl Share {
    pub fn used(&self) -> usize {
        self.used
    }

    /// Whether this share may take `amount` more, up to `most` in total.
    fn has_room_up_to(&self, amount: usize, most: usize) -> bool {
        let after = self.used.saturating_add(amount);
        after <= most
            && (self.pool.used().saturating_add(amount) <= self.pool.capacity
                || after <= self.pool.equal_part())
    }

    pub fn has_room(&self, amount: usize) -> bool {
        self.has_room_up_to(amount, self.most)
    }

    /// Takes `amount`, whether there is room or not.
    pub fn take(&mut self, amount: usize) {
        self.used += amount;
        self.pool.used.fetch_add(amount, Ordering::Relaxed);
    }

    /// Takes `amount` if there is room.
    #[must_use]
    pub fn try_take(&mut self, amount: usize) -> bool {
        let has_room = self.has_room(amount);
        if has_room {
            self.take(amount);
        }
        has_room
    }

    pub fn give_back(&mut self, amount: usize) {
        let amount = amount.min(self.used);
        self.used -= amount;
        self.pool.used.fetch_sub(amount, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.used);
        self.pool.shares.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The findings of one container, by kind and severity.
#[derive(Debug, Default)]
pub struct Account {
    share: Share,
    number: usize,
    kinds: HashMap<(Kind, Severity), Size>,
    folded: u64,
}

impl Account {
    pub fn new(pool: &Arc<Pool>) -> Account {
        Account { share: pool.share(FINDINGS.bytes), ..Account::default() }
    }

    /// Whether a finding of this kind, severity and [`weight`] may be kept as one of its own.
    pub fn has_room(&self, kind: Kind, severity: Severity, bytes: usize) -> bool {
        let own = self.kinds.get(&(kind, severity)).copied().unwrap_or_default();
        if own.number < RESERVED.number && own.bytes + bytes <= RESERVED.bytes {
            return true;
        }
        let of_kind = Severity::ALL.iter().filter_map(|one| self.kinds.get(&(kind, *one)));
        let of_kind = of_kind.fold(Size::default(), |sum, one| Size {
            number: sum.number + one.number,
            bytes: sum.bytes + one.bytes,
        });
        let limit = part(severity);
        self.number < limit.number
            && of_kind.number < FINDINGS.number / 2
            && of_kind.bytes + bytes <= FINDINGS.bytes / 2
            && self.share.has_room_up_to(bytes, limit.bytes)
    }

    /// Counts a finding that is kept.
    pub fn keep(&mut self, kind: Kind, severity: Severity, bytes: usize) {
        let own = self.kinds.entry((kind, severity)).or_default();
        own.number += 1;
        own.bytes += bytes;
        self.number += 1;
        self.share.take(bytes);
    }

    /// Counts a finding without room, which is counted in another finding.
    pub fn fold(&mut self) {
        self.folded += 1;
    }

    /// How many times a finding had no room.
    pub fn folded(&self) -> u64 {
        self.folded
    }
}

/// The part of a container's room that findings up to this severity may fill.
fn part(severity: Severity) -> Size {
    let sixteenths = match severity {
        Severity::Info => 6,
        Severity::Low => 8,
        Severity::Medium => 10,
        Severity::High => 13,
        Severity::Critical => 16,
    };
    Size { number: FINDINGS.number / 16 * sixteenths, bytes: FINDINGS.bytes / 16 * sixteenths }
}

/// Bytes of the arguments of a process in a finding, a session or a command, and of those of
/// each of its ancestors. A container can give each process sixty kilobytes.
pub const ARGUMENTS: usize = 16 << 10;
pub const ANCESTORS_ARGUMENTS: usize = 2 << 10;
/// Marks that arguments were left out.
const MORE: &str = "…";

/// The process with its arguments cut to what is kept. A cut is marked.
pub fn process(process: &Process) -> Process {
    let mut process = process.clone();
    cut(&mut process.argv, ARGUMENTS);
    for ancestor in &mut process.ancestors {
        cut(&mut ancestor.argv, ANCESTORS_ARGUMENTS);
    }
    process
}

/// The same for arguments alone.
pub fn arguments(argv: &Option<Vec<String>>) -> Option<Vec<String>> {
    let mut argv = argv.clone();
    cut(&mut argv, ARGUMENTS);
    argv
}

fn cut(argv: &mut Option<Vec<String>>, most: usize) {
    let Some(argv) = argv else { return };
    let mut room = most;
    for index in 0..argv.len() {
        // An empty argument takes a byte too.
        let bytes = argv[index].len() + 1;
        if bytes <= room {
            room -= bytes;
            continue;
        }
        shorten(&mut argv[index], room.saturating_sub(MORE.len()));
        argv[index].push_str(MORE);
        argv.truncate(index + 1);
        argv.shrink_to_fit();
        return;
    }
}

/// About how many bytes a finding takes in memory.
pub fn weight(finding: &Finding) -> usize {
    // Its entries in maps, and its small texts.
    const AROUND: usize = 512;
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    size_of::<Finding>()
        + AROUND
        + finding.file.as_ref().map_or(0, |file: &FileEvidence| 3 * file.path.as_bytes().len())
        + finding.expected.as_ref().map_or(0, |expected| expected.path.as_bytes().len())
        + finding.process.as_ref().map_or(0, weight_of_process)
        + finding.writer.as_ref().map_or(0, weight_of_process)
        + text(&finding.invoked_as)
        + text(&finding.detail)
        + text(&finding.image.name)
}

/// The same for a process.
pub fn weight_of_process(process: &Process) -> usize {
    let text =
        |text: &Option<String>| text.as_ref().map_or(0, |text| size_of::<String>() + text.len());
    let list = |argv: &Option<Vec<String>>| {
        argv.iter().flatten().map(|one| size_of::<String>() + one.len()).sum::<usize>()
    };
    let own = [&process.exe, &process.tty, &process.root].into_iter().map(text).sum::<usize>();
    let ancestors = process.ancestors.iter().map(|ancestor| {
        size_of::<crate::model::Ancestor>() + text(&ancestor.exe) + list(&ancestor.argv)
    });
    own + list(&process.argv) + ancestors.sum::<usize>()
}

/// About how many bytes an observation takes in memory.
fn weight_of_observation(observation: &Observation) -> usize {
    let process = observation.fact.process().map_or(0, |process| weight_of_process(process));
    let other = observation.reached_as.as_ref().map_or(0, |path| path.as_bytes().len());
    let own = match &observation.fact {
        Fact::File(fact) => fact.path().map_or(0, |path| path.as_bytes().len()),
        Fact::Session(fact) => weight_of_session_fact(fact),
        Fact::PackageManager { .. } => 0,
    };
    size_of::<Observation>() + process + own + other
}

fn weight_of_session_fact(fact: &SessionFact) -> usize {
    match fact {
        SessionFact::Opened { opening } => weight_of_process(&opening.process),
        SessionFact::Ran { run, .. } => run.argv.iter().flatten().map(String::len).sum(),
        SessionFact::RanMore { .. }
        | SessionFact::Interactive { .. }
        | SessionFact::ProcessEnded { .. }
        | SessionFact::ReverseShell { .. } => 0,
    }
}

/// How bad it is to lose an observation that was not judged yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    /// A scan finds the file again.
    LiesThere,
    /// It may never be seen again.
    Happened,
    /// The same, and it cannot be the image's, whatever the image has.
    Foreign,
}

fn rank(fact: &Fact) -> Rank {
    match fact {
        Fact::File(fact) => match fact {
            FileFact::Present { .. } | FileFact::Absent { .. } => Rank::LiesThere,
            FileFact::Executed { filesystem: Filesystem::Anonymous, .. } => Rank::Foreign,
            FileFact::Executed { .. } | FileFact::Loaded { .. } | FileFact::Interpreted { .. } => {
                Rank::Happened
            }
        },
        Fact::Session(fact) => match fact {
            SessionFact::Opened { .. }
            | SessionFact::Interactive { .. }
            | SessionFact::ReverseShell { .. } => Rank::Foreign,
            SessionFact::Ran { .. }
            | SessionFact::RanMore { .. }
            | SessionFact::ProcessEnded { .. } => Rank::Happened,
        },
        Fact::PackageManager { .. } => Rank::Happened,
    }
}

/// Observations of one container that cannot be judged yet, in their order.
#[derive(Debug)]
pub struct Waiting {
    queue: VecDeque<(Rank, Observation)>,
    share: Share,
    most: Size,
}

impl Default for Waiting {
    fn default() -> Waiting {
        Waiting { queue: VecDeque::new(), share: Share::default(), most: BACKLOG }
    }
}

impl Waiting {
    pub fn new(pool: &Arc<Pool>, most: Size) -> Waiting {
        Waiting { queue: VecDeque::new(), share: pool.share(most.bytes), most }
    }

    /// Adds an observation. Returns what is lost because there is no room: the oldest of a
    /// lower rank, or else this one.
    pub fn push(&mut self, observation: Observation) -> Vec<Observation> {
        let bytes = weight_of_observation(&observation);
        let rank = rank(&observation.fact);
        let mut lost = Vec::new();
        while self.queue.len() >= self.most.number || !self.share.has_room(bytes) {
            let worst = self.queue.iter().map(|(rank, _)| *rank).min();
            let victim = worst
                .filter(|worst| *worst < rank)
                .and_then(|worst| self.queue.iter().position(|(rank, _)| *rank == worst))
                .and_then(|index| self.queue.remove(index));
            let Some((_, victim)) = victim else {
                lost.push(observation);
                return lost;
            };
            self.share.give_back(weight_of_observation(&victim));
            lost.push(victim);
        }
        self.share.take(bytes);
        self.queue.push_back((rank, observation));
        lost
    }

    /// Takes all of them out.
    pub fn take(&mut self) -> impl Iterator<Item = Observation> + use<> {
        self.share.give_back(self.share.used());
        std::mem::take(&mut self.queue).into_iter().map(|(_, observation)| observation)
    }

    /// The oldest one.
    pub fn first(&self) -> Option<&Observation> {
        self.queue.front().map(|(_, observation)| observation)
    }

    pub fn pop(&mut self) -> Option<Observation> {
        let (_, observation) = self.queue.pop_front()?;
        self.share.give_back(weight_of_observation(&observation));
        Some(observation)
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerId, RootfsPath, Source};
    use jiff::Timestamp;

    #[test]
    fn no_flood_takes_the_room_of_what_is_worse() {
        let mut account = Account::new(&Pool::new(ALL_FINDINGS));
        for severity in Severity::ALL {
            for kind in Kind::ALL {
                while account.has_room(*kind, *severity, 1024) {
                    account.keep(*kind, *severity, 1024);
                }
            }
            let worse = Severity::ALL.iter().filter(|one| *one > severity);
            for worse in worse {
                assert!(account.has_room(Kind::ExecFileless, *worse, 1024), "{severity} {worse}");
            }
        }
        let reserved = Kind::ALL.len() * Severity::ALL.len() * RESERVED.number;
        assert!(account.number <= FINDINGS.number + reserved, "{}", account.number);
    }

    #[test]
    fn no_kind_takes_the_room_of_another_one_as_bad() {
        let mut account = Account::new(&Pool::new(ALL_FINDINGS));
        let (kind, severity) = (Kind::ExecNew, Severity::Critical);
        while account.has_room(kind, severity, 1024) {
            account.keep(kind, severity, 1024);
        }
        assert_eq!(account.number, FINDINGS.number / 2);
        assert!(account.has_room(Kind::ExecFileless, severity, 1024));
        // Few large ones are as many bytes.
        let mut account = Account::new(&Pool::new(ALL_FINDINGS));
        while account.has_room(kind, severity, 130 << 10) {
            account.keep(kind, severity, 130 << 10);
        }
        assert_eq!(account.number, (FINDINGS.bytes / 2) / (130 << 10));
        assert!(account.has_room(Kind::ExecFileless, severity, 60 << 10));
    }

    #[test]
    fn a_full_pool_leaves_each_its_part_and_gets_back_what_was_taken() {
        let pool = Pool::new(1000);
        let mut noisy = pool.share(900);
        assert!(noisy.try_take(900) && !noisy.try_take(1), "it has a limit of its own");
        let mut quiet = pool.share(900);
        assert!(quiet.try_take(250), "a quarter is its own");
        assert!(!quiet.try_take(1) && !noisy.try_take(1), "the pool is full");
        drop(noisy);
        assert_eq!(pool.used(), 250);
        assert!(quiet.try_take(650));
        quiet.give_back(100);
        assert_eq!((quiet.used(), pool.used()), (800, 800));
    }

    #[test]
    fn arguments_without_end_are_cut_and_the_cut_is_marked() {
        let argv = |number: usize, bytes: usize| Some(vec!["a".repeat(bytes); number]);
        let ancestor = crate::model::Ancestor {
            identity: crate::model::ProcessIdentity { pid: 1, start_time: 1 },
            exe: None,
            argv: argv(128, 4096),
            is_proven_inside: false,
        };
        let whole = Process {
            identity: ancestor.identity,
            exe: Some("/bin/x".into()),
            argv: argv(128, 4096),
            uid: None,
            tty: None,
            root: None,
            ancestors: vec![ancestor; 32],
        };
        let kept = process(&whole);
        let bytes = |argv: &Option<Vec<String>>| argv.iter().flatten().map(String::len).sum();
        let own: usize = bytes(&kept.argv);
        assert!(own <= ARGUMENTS && own > ARGUMENTS / 2, "{own}");
        assert!(kept.ancestors.iter().all(|one| {
            let bytes: usize = bytes(&one.argv);
            bytes <= ANCESTORS_ARGUMENTS && one.argv.as_ref().unwrap()[0].ends_with(MORE)
        }));
        assert!(weight_of_process(&kept) < 100 << 10);
        assert_eq!(process(&kept), kept, "it is cut once");
        let usual = Process { argv: argv(3, 100), ancestors: Vec::new(), ..whole };
        assert_eq!(process(&usual), usual);
    }

    fn observed(number: usize, fact: Fact) -> Observation {
        Observation {
            container: ContainerId::new("default", "c1"),
            init: crate::model::ProcessIdentity { pid: 7, start_time: 1 },
            file_of: None,
            reached_as: None,
            at: Timestamp::from_second(number as i64).unwrap(),
            source: Source::Gate,
            session: None,
            fact,
        }
    }

    #[test]
    fn what_can_be_found_again_makes_room_for_what_cannot() {
        let pool = Pool::new(ALL_BACKLOGS);
        let mut waiting = Waiting::new(&pool, Size { number: 3, ..BACKLOG });
        let gone =
            || Fact::File(FileFact::Absent { path: RootfsPath::new("/x").unwrap(), writer: None });
        let happened = |times| {
            Fact::Session(SessionFact::RanMore {
                root: crate::model::ProcessIdentity { pid: 1, start_time: 1 },
                times,
            })
        };
        for (number, fact) in [gone(), happened(1), gone()].into_iter().enumerate() {
            assert!(waiting.push(observed(number, fact)).is_empty());
        }
        let lost = |lost: Vec<Observation>| -> Vec<i64> {
            lost.iter().map(|one| one.at.as_second()).collect()
        };
        assert_eq!(lost(waiting.push(observed(3, gone()))), [3], "no better than the others");
        assert_eq!(lost(waiting.push(observed(4, happened(2)))), [0]);
        assert_eq!(lost(waiting.push(observed(5, happened(3)))), [2]);
        assert_eq!(lost(waiting.push(observed(6, happened(4)))), [6]);
        let order: Vec<i64> = waiting.take().map(|one| one.at.as_second()).collect();
        assert_eq!((order, pool.used()), (vec![1, 4, 5], 0));
    }
}
