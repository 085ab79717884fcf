//! Decides which threads are stuck, by samples of them. Pure: it has no clock and no threads.
//! `harness` takes the samples and acts on the result.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

/// A thread that has been busy for so long without a beat is stuck.
pub const STUCK: Duration = Duration::from_secs(5);
/// How many stuck threads of one name are replaced.
pub const MAX_REPLACED: usize = 3;
/// The time between two checks of the supervisor.
pub const TURN: Duration = Duration::from_millis(250);
/// How many points of a queue's past are remembered.
const MAX_POINTS: usize = 256;

/// What a thread owns, and so what is done when it is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It takes items from a queue and owns nothing else.
    Consumer,
    /// It owns state that no other thread has.
    Owner,
    /// It waits for the disk of the state directory. A new daemon would wait for the same
    /// disk, so it has far more time.
    Disk,
    /// Another part of driftd watches it.
    Unsupervised,
}

impl Role {
    /// How long one item may take before the daemon ends because of it.
    pub fn patience(self) -> Duration {
        match self {
            Role::Consumer | Role::Owner => Duration::from_secs(20),
            Role::Disk => Duration::from_secs(120),
            Role::Unsupervised => Duration::MAX,
        }
    }
}

/// What a thread does. The lowest bits of its turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Idle = 0,
    Busy = 1,
    Blocked = 2,
}

/// How much one step adds to a thread's turns.
pub(super) const STEP: u64 = 4;

impl State {
    pub(super) fn of(turns: u64) -> State {
        match turns % STEP {
            0 => State::Idle,
            1 => State::Busy,
            _ => State::Blocked,
        }
    }
}

/// One thread at the time of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub id: u64,
    pub name: &'static str,
    pub role: Role,
    pub turns: u64,
    pub is_replaced: bool,
    /// It is ready to run and gets hardly any processor time.
    pub is_starved: bool,
    /// How many items wait in its queue, and how many were ever taken from that.
    pub queue: Option<(u64, u64)>,
}

impl Sample {
    /// Whether it should make progress.
    pub(super) fn is_to_move(&self) -> bool {
        match State::of(self.turns) {
            _ if self.role == Role::Unsupervised => false,
            State::Busy => true,
            State::Blocked => false,
            State::Idle => !self.is_replaced && self.queue.is_some_and(|(depth, _)| depth > 0),
        }
    }
}

/// What the supervisor has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Stuck {
        id: u64,
        name: &'static str,
        still: Duration,
        is_replaced: bool,
    },
    /// No thread is stuck any more.
    Recovered,
    /// No thread can replace it: the daemon has to end.
    GivenUp {
        name: &'static str,
        still: Duration,
    },
}

/// A thread or a queue, as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    pub name: &'static str,
    /// How many items wait; `None` if there is no queue.
    pub depth: Option<u64>,
    /// How long the oldest item has waited.
    pub oldest: Duration,
    /// How long it has made no progress.
    pub still: Duration,
    pub is_stuck: bool,
}

/// Remembers the previous checks, and decides which threads are stuck.
#[derive(Debug, Default)]
pub struct Supervisor {
    seen: BTreeMap<u64, Seen>,
    queues: HashMap<&'static str, Past>,
    is_any_stuck: bool,
    now: Duration,
}

#[derive(Debug, Default)]
struct Seen {
    turns: u64,
    still: Duration,
    is_reported: bool,
    is_given_up: bool,
}

/// Times, each with the number of items that had been put into a queue until then.
#[derive(Debug, Default)]
struct Past(VecDeque<(Duration, u64)>);

impl Past {
    /// How long the oldest item has waited, to the precision of one check.
    fn oldest(&mut self, depth: u64, taken: u64, now: Duration) -> Duration {
        while self.0.front().is_some_and(|(_, put)| *put <= taken) {
            self.0.pop_front();
        }
        let put = taken + depth;
        if depth > 0
            && self.0.back().is_none_or(|(_, last)| *last < put)
            && self.0.len() < MAX_POINTS
        {
            self.0.push_back((now, put));
        }
        match self.0.front() {
            Some((since, _)) if depth > 0 => now - *since,
            _ => Duration::ZERO,
        }
    }
}

impl Supervisor {
    /// Checks every thread that has not ended, `elapsed` after the last check.
    pub fn turn(&mut self, threads: &[Sample], elapsed: Duration) -> (Vec<Found>, Vec<View>) {
        // The supervisor itself did not run for longer than that: no thread has failed.
        let elapsed = elapsed.min(4 * TURN);
        self.now += elapsed;
        let mut found = Vec::new();
        let mut views: Vec<View> = Vec::new();
        self.seen.retain(|id, _| threads.iter().any(|sample| sample.id == *id));
        let mut replaced: HashMap<&str, usize> = HashMap::new();
        for sample in threads.iter().filter(|sample| sample.is_replaced) {
            *replaced.entry(sample.name).or_default() += 1;
        }
        for sample in threads {
            let seen = self.seen.entry(sample.id).or_default();
            if sample.is_to_move() && seen.turns == sample.turns {
                seen.still += if sample.is_starved { Duration::ZERO } else { elapsed };
            } else {
                *seen = Seen { turns: sample.turns, ..Seen::default() };
            }
            let is_stuck = seen.still >= STUCK;
            if is_stuck && !seen.is_reported {
                seen.is_reported = true;
                let others = replaced.entry(sample.name).or_default();
                let is_replaced = sample.role == Role::Consumer && *others < MAX_REPLACED;
                *others += usize::from(is_replaced);
                let Sample { id, name, .. } = *sample;
                found.push(Found::Stuck { id, name, still: seen.still, is_replaced });
            }
            if seen.still >= sample.role.patience() && !sample.is_replaced && !seen.is_given_up {
                seen.is_given_up = true;
                found.push(Found::GivenUp { name: sample.name, still: seen.still });
            }
            let (depth, oldest) = match sample.queue {
                Some((depth, taken)) => {
                    let past = self.queues.entry(sample.name).or_default();
                    (Some(depth), past.oldest(depth, taken, self.now))
                }
                None => (None, Duration::ZERO),
            };
            let still = seen.still;
            // A thread and its replacements have one line together.
            match views.iter_mut().find(|view| view.name == sample.name) {
                Some(view) => {
                    view.still = view.still.max(still);
                    view.is_stuck |= is_stuck;
                }
                None => {
                    views.push(View { name: sample.name, depth, oldest, still, is_stuck });
                }
            }
        }
        let is_any_stuck = self.seen.values().any(|seen| seen.is_reported);
        if std::mem::replace(&mut self.is_any_stuck, is_any_stuck) && !is_any_stuck {
            found.push(Found::Recovered);
        }
        (found, views)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: u64, name: &'static str, role: Role, turns: u64) -> Sample {
        Sample { id, name, role, turns, is_replaced: false, is_starved: false, queue: None }
    }

    fn names(found: &[Found]) -> Vec<String> {
        let name = |found: &Found| match found {
            Found::Stuck { name, is_replaced, .. } => format!("stuck {name} {is_replaced}"),
            Found::Recovered => "recovered".into(),
            Found::GivenUp { name, .. } => format!("given up {name}"),
        };
        found.iter().map(name).collect()
    }

    /// What is found within so many seconds in which nothing changes.
    fn within(supervisor: &mut Supervisor, threads: &[Sample], seconds: u32) -> Vec<String> {
        let turns = 0..seconds * 4;
        turns.flat_map(|_| names(&supervisor.turn(threads, TURN).0)).collect()
    }

    #[test]
    fn x02_a_busy_thread_without_progress_is_stuck_and_an_idle_one_is_not() {
        let mut supervisor = Supervisor::default();
        let threads = [sample(1, "idle", Role::Owner, 4), sample(2, "busy", Role::Consumer, 5)];
        assert_eq!(within(&mut supervisor, &threads, 5), [""; 0]);
        assert_eq!(within(&mut supervisor, &threads, 1), ["stuck busy true"]);
        let views = supervisor.turn(&threads, TURN).1;
        let seen: Vec<_> = views.iter().map(|view| (view.name, view.is_stuck)).collect();
        assert_eq!(seen, [("idle", false), ("busy", true)]);
        // It has come back.
        let threads = [sample(1, "idle", Role::Owner, 4), sample(2, "busy", Role::Consumer, 9)];
        assert_eq!(within(&mut supervisor, &threads, 1), ["recovered"]);
    }

    #[test]
    fn x02_a_thread_that_does_not_take_what_waits_for_it_is_stuck_and_a_blocked_one_is_not() {
        let mut supervisor = Supervisor::default();
        let waits = |id, name, turns| Sample {
            queue: Some((3, 0)),
            ..sample(id, name, Role::Consumer, turns)
        };
        let threads = [waits(1, "frozen", 4), waits(2, "blocked", 4 + State::Blocked as u64)];
        assert_eq!(within(&mut supervisor, &threads, 30), ["stuck frozen true", "given up frozen"]);
    }

    #[test]
    fn long_work_that_beats_is_never_stuck() {
        let mut supervisor = Supervisor::default();
        for turn in 0..400 {
            let threads = [sample(1, "large", Role::Consumer, STEP * (turn / 8) + 1)];
            assert_eq!(names(&supervisor.turn(&threads, TURN).0), [""; 0]);
        }
    }

    #[test]
    fn a_thread_without_a_processor_is_not_stuck() {
        let mut supervisor = Supervisor::default();
        let starved = Sample { is_starved: true, ..sample(1, "large", Role::Consumer, 1) };
        assert_eq!(within(&mut supervisor, &[starved], 60), [""; 0]);
    }

    #[test]
    fn an_owner_is_given_up_after_its_patience_and_a_disk_later() {
        let mut supervisor = Supervisor::default();
        let threads = [sample(1, "scan", Role::Owner, 1), sample(2, "history", Role::Disk, 1)];
        assert_eq!(
            within(&mut supervisor, &threads, 25),
            ["stuck scan false", "stuck history false", "given up scan"]
        );
        assert_eq!(within(&mut supervisor, &threads, 100), ["given up history"]);
    }

    #[test]
    fn replacements_are_few_and_the_last_one_that_is_stuck_ends_the_daemon() {
        let mut supervisor = Supervisor::default();
        let mut threads = Vec::new();
        let mut found = Vec::new();
        for id in 1..10 {
            if found.last().is_none_or(|last: &String| last == "stuck content true") {
                for sample in &mut threads {
                    let Sample { is_replaced, .. } = sample;
                    *is_replaced = true;
                }
                threads.push(sample(id, "content", Role::Consumer, 1));
            }
            found.extend(within(&mut supervisor, &threads, 6));
        }
        let replaced = vec!["stuck content true"; MAX_REPLACED];
        assert_eq!(found, [replaced, vec!["stuck content false", "given up content"]].concat());
    }

    #[test]
    fn a_machine_that_was_suspended_has_no_stuck_threads() {
        let mut supervisor = Supervisor::default();
        let threads = [sample(1, "scan", Role::Owner, 1)];
        let asleep = Duration::from_secs(3600);
        assert_eq!(names(&supervisor.turn(&threads, asleep).0), [""; 0]);
        assert_eq!(names(&supervisor.turn(&threads, asleep).0), [""; 0]);
    }

    #[test]
    fn a_queue_shows_its_depth_and_for_how_long_the_oldest_item_has_waited() {
        let mut supervisor = Supervisor::default();
        let mut ages = Vec::new();
        // Two items, then a third; the first two are taken; then the last.
        for queue in [(0, 0), (2, 0), (2, 0), (3, 0), (1, 2), (1, 2), (0, 3)] {
            let thread = Sample { queue: Some(queue), ..sample(1, "describe", Role::Consumer, 4) };
            let view = supervisor.turn(&[thread], TURN).1.remove(0);
            ages.push((view.depth.unwrap(), view.oldest.as_millis()));
        }
        assert_eq!(ages, [(0, 0), (2, 0), (2, 250), (3, 500), (1, 250), (1, 500), (0, 0)]);
    }
}
