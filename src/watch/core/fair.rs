//! Fair turns between containers: each gets the same share of a thread's time, however much
//! of its work waits.
//!
//! [`Turns`] counts what each container has spent. The container that has spent least is
//! next (start-time fair queueing): a container waits for at most one piece of work of each
//! other container. [`Queue`] holds the waiting work, within one bound. When it is full, the
//! container with the most waiting entries loses one of its own. [`channel`] is such a queue
//! between two threads. [`Pace`] bounds the cost of all containers together. Nothing here
//! knows what the work is.

use std::borrow::Borrow;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, TrySendError};

use crate::model::ContainerId;
use crate::threads;

/// How long a thread works for one container while others wait.
pub(crate) const SLICE: Duration = Duration::from_millis(4);

/// The cost of a piece of work, in nanoseconds: its duration, and at least one for each byte
/// that was read or computed.
pub(crate) fn cost(took: Duration, bytes: u64) -> u64 {
    u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(bytes)
}

/// What each container has spent.
#[derive(Debug)]
pub(crate) struct Turns<K> {
    /// Only containers that have spent more than `floor`.
    spent: HashMap<K, u64>,
    /// What the container that was served last has spent. No container counts as having
    /// spent less: one that was idle has saved nothing up.
    floor: u64,
}

impl<K> Default for Turns<K> {
    fn default() -> Turns<K> {
        Turns { spent: HashMap::new(), floor: 0 }
    }
}

impl<K: Clone + Eq + Hash> Turns<K> {
    fn spent<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> u64
    where
        K: Borrow<Q>,
    {
        self.spent.get(key).copied().unwrap_or(0).max(self.floor)
    }

    /// The next one among those that have work.
    pub(crate) fn next<'a>(&mut self, ready: impl Iterator<Item = &'a K>) -> Option<&'a K>
    where
        K: 'a,
    {
        let (spent, next) =
            ready.map(|key| (self.spent(key), key)).min_by_key(|(spent, _)| *spent)?;
        if spent > self.floor {
            self.floor = spent;
            self.spent.retain(|_, spent| *spent > self.floor);
        }
        Some(next)
    }

    /// Charges a piece of work. It always costs something: free work could be repeated for
    /// ever.
    pub(crate) fn charge(&mut self, key: &K, cost: u64) {
        let spent = self.spent(key).saturating_add(cost.max(1));
        match self.spent.get_mut(key) {
            Some(known) => *known = spent,
            None => {
                self.spent.insert(key.clone(), spent);
            }
        }
    }
}

/// The waiting items, by container.
#[derive(Debug)]
pub(crate) struct Queue<K, T> {
    waiting: HashMap<K, VecDeque<(Instant, T)>>,
    turns: Turns<K>,
    len: usize,
    capacity: usize,
}

impl<K: Clone + Eq + Hash, T> Queue<K, T> {
    pub(crate) fn new(capacity: usize) -> Queue<K, T> {
        Queue { waiting: HashMap::new(), turns: Turns::default(), len: 0, capacity }
    }

    /// Adds an item. In a full queue, the newest item of the container with the most waiting
    /// items is dropped, and returned.
    pub(crate) fn push(&mut self, key: &K, item: T, now: Instant) -> Option<T> {
        let mut dropped = None;
        if self.len >= self.capacity {
            let own = self.len_of(key);
            let longest = self.waiting.values_mut().max_by_key(|queue| queue.len());
            match longest.filter(|longest| longest.len() > own) {
                Some(longest) => dropped = longest.pop_back().map(|(_, item)| item),
                None => return Some(item),
            }
        }
        if dropped.is_none() {
            self.len += 1;
        }
        match self.waiting.get_mut(key) {
            Some(queue) => queue.push_back((now, item)),
            None => {
                self.waiting.insert(key.clone(), VecDeque::from([(now, item)]));
            }
        }
        dropped
    }

    /// The next item, with its container and since when it has waited.
    pub(crate) fn pop(&mut self) -> Option<(K, Instant, T)> {
        let key = self.turns.next(self.waiting.keys())?.clone();
        let queue = self.waiting.get_mut(&key).expect("the key is one of these");
        let (since, item) = queue.pop_front().expect("empty queues are removed");
        if queue.is_empty() {
            self.waiting.remove(&key);
        }
        self.len -= 1;
        Some((key, since, item))
    }

    /// Returns an unfinished item: it is the next one of its container. It had a place
    /// before, so the bound is exceeded by one at most.
    pub(crate) fn put_back(&mut self, key: &K, item: T, since: Instant) {
        self.waiting.entry(key.clone()).or_default().push_front((since, item));
        self.len += 1;
    }

    /// Returns an item that waited elsewhere: it is the next one of its container.
    pub(crate) fn come_back(&mut self, key: &K, item: T, now: Instant) {
        let oldest = self.waiting.get(key).and_then(VecDeque::front);
        let since = oldest.map_or(now, |(since, _)| *since);
        self.put_back(key, item, since);
    }

    pub(crate) fn charge(&mut self, key: &K, cost: u64) {
        self.turns.charge(key, cost);
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn len_of(&self, key: &K) -> usize {
        self.waiting.get(key).map_or(0, VecDeque::len)
    }

    /// For each container, how many items wait, and since when the oldest one does.
    pub(crate) fn backlog(&self) -> impl Iterator<Item = (&K, usize, Instant)> {
        self.waiting.iter().filter_map(|(key, queue)| Some((key, queue.len(), queue.front()?.0)))
    }
}

/// An item that belongs to a container.
pub(crate) trait Owned {
    fn owner(&self) -> &ContainerId;
}

impl<T: Owned + ?Sized> Owned for Box<T> {
    fn owner(&self) -> &ContainerId {
        (**self).owner()
    }
}

/// A container, how many of its items wait, and since when the oldest one does.
pub(crate) type Waiting = (ContainerId, usize, Instant);

/// A place where work waits.
pub(crate) trait Waits: Send + Sync {
    fn waiting(&self) -> Vec<Waiting>;
}

/// A bounded channel to one thread, which serves containers by turns and is charged
/// for the time from one item to the next.
pub(crate) fn channel<T: Owned>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let state =
        State { queue: Queue::new(capacity), senders: 1, receivers: 1, waiting: 0, served: None };
    let channel = Arc::new(Channel { state: Mutex::new(state), wake: Condvar::new() });
    (Sender { channel: channel.clone() }, Receiver { channel })
}

#[derive(Debug)]
struct Channel<T> {
    state: Mutex<State<T>>,
    wake: Condvar,
}

#[derive(Debug)]
struct State<T> {
    queue: Queue<ContainerId, T>,
    senders: usize,
    receivers: usize,
    /// Receivers that must be woken.
    waiting: usize,
    served: Option<Served>,
}

/// The item that the receiver is at work on.
#[derive(Debug)]
struct Served {
    owner: ContainerId,
    since: Instant,
    begun: Instant,
}

impl<T> Channel<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // A panic ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes a receiver, only if one waits: that costs a system call, and the gate's thread is
    /// one of the senders.
    fn wake_one(&self, state: MutexGuard<'_, State<T>>) {
        let wakes = state.waiting > 0;
        drop(state);
        if wakes {
            self.wake.notify_one();
        }
    }
}

impl<T: Send> Waits for Channel<T> {
    fn waiting(&self) -> Vec<Waiting> {
        let state = self.lock();
        let mut all: Vec<Waiting> = state
            .queue
            .backlog()
            .map(|(owner, waiting, oldest)| (owner.clone(), waiting, oldest))
            .collect();
        if let Some(Served { owner, since, .. }) = &state.served {
            match all.iter_mut().find(|(waiting, ..)| waiting == owner) {
                Some((_, waiting, oldest)) => {
                    *waiting += 1;
                    *oldest = (*oldest).min(*since);
                }
                None => all.push((owner.clone(), 1, *since)),
            }
        }
        all
    }
}

#[derive(Debug)]
pub(crate) struct Sender<T> {
    channel: Arc<Channel<T>>,
}

impl<T: Owned> Sender<T> {
    /// Never waits. `Full` returns the dropped item. It may be another item, of another
    /// container: the one with the most waiting items.
    pub(crate) fn try_send(&self, item: T) -> Result<(), TrySendError<T>> {
        let mut state = self.channel.lock();
        if state.receivers == 0 {
            return Err(TrySendError::Disconnected(item));
        }
        let owner = item.owner().clone();
        let dropped = state.queue.push(&owner, item, Instant::now());
        self.channel.wake_one(state);
        dropped.map_or(Ok(()), |dropped| Err(TrySendError::Full(dropped)))
    }

    /// Sends an item that was received before and has waited elsewhere. A full queue takes it
    /// too: the other place has a bound of its own.
    pub(crate) fn send_back(&self, item: T) {
        let mut state = self.channel.lock();
        let owner = item.owner().clone();
        state.queue.come_back(&owner, item, Instant::now());
        self.channel.wake_one(state);
    }

    pub(crate) fn len(&self) -> usize {
        self.channel.lock().queue.len()
    }

    /// How many items of one container wait.
    pub(crate) fn len_of(&self, owner: &ContainerId) -> usize {
        self.channel.lock().queue.len_of(owner)
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.channel.lock().senders += 1;
        Sender { channel: self.channel.clone() }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.channel.lock().senders -= 1;
        self.channel.wake.notify_all();
    }
}

#[derive(Debug)]
pub(crate) struct Receiver<T> {
    channel: Arc<Channel<T>>,
}

impl<T: Owned> Receiver<T> {
    fn settle(state: &mut State<T>) -> Option<Served> {
        let served = state.served.take()?;
        state.queue.charge(&served.owner, cost(served.begun.elapsed(), 0));
        Some(served)
    }

    fn take(state: &mut State<T>) -> Option<T> {
        let (owner, since, item) = state.queue.pop()?;
        state.served = Some(Served { owner, since, begun: Instant::now() });
        Some(item)
    }

    /// Waits for the next item, for `at_most` that long. The item received before counts as
    /// finished. A thread that was replaced gets none.
    pub(crate) fn recv_timeout(&self, at_most: Duration) -> Result<T, RecvTimeoutError> {
        if threads::is_replaced() {
            return Err(RecvTimeoutError::Disconnected);
        }
        let item = threads::idle(|| self.wait_for(at_most))?;
        threads::took();
        threads::about(item.owner());
        Ok(item)
    }

    fn wait_for(&self, at_most: Duration) -> Result<T, RecvTimeoutError> {
        let until = Instant::now().checked_add(at_most);
        let mut state = self.channel.lock();
        Self::settle(&mut state);
        loop {
            if let Some(item) = Self::take(&mut state) {
                return Ok(item);
            }
            if state.senders == 0 {
                return Err(RecvTimeoutError::Disconnected);
            }
            let left =
                until.map_or(at_most, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Err(RecvTimeoutError::Timeout);
            }
            state.waiting += 1;
            (state, _) =
                self.channel.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    /// The item received last is finished: later time is not charged to it.
    pub(crate) fn finish(&self) {
        Self::settle(&mut self.channel.lock());
    }

    /// The item received last is not finished: other containers have their turn, then it
    /// continues.
    pub(crate) fn put_back(&self, item: T) {
        let mut state = self.channel.lock();
        let since = Self::settle(&mut state).map_or_else(Instant::now, |served| served.since);
        let owner = item.owner().clone();
        state.queue.put_back(&owner, item, since);
    }

    pub(crate) fn len(&self) -> usize {
        self.channel.lock().queue.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T: Owned + Send + 'static> Receiver<T> {
    /// Returns a function that counts the waiting items.
    pub(crate) fn depth(&self) -> threads::Depth {
        let channel = self.channel.clone();
        Box::new(move || channel.lock().queue.len())
    }

    /// The waiting items, for the statistics of backlogs.
    pub(crate) fn waits(&self) -> Arc<dyn Waits> {
        self.channel.clone()
    }
}

/// For a thread that replaces a stuck one. The stuck thread's work is still charged to its
/// container.
impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.channel.lock().receivers += 1;
        Receiver { channel: self.channel.clone() }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.channel.lock();
        state.receivers -= 1;
        if state.receivers > 0 {
            return;
        }
        // Closes the held files now, and not only when the last sender ends.
        let capacity = state.queue.capacity;
        let left = std::mem::replace(&mut state.queue, Queue::new(capacity));
        drop(state);
        drop(left);
    }
}

/// Bounds the use of a processor over time: a bucket that fills as time passes and is emptied
/// by use.
#[derive(Debug)]
pub(crate) struct Pace {
    /// The share is one in `part`.
    part: u32,
    /// The most that can be saved up, in nanoseconds.
    burst: i64,
    left: i64,
    at: Instant,
}

impl Pace {
    pub(crate) fn new(part: u32, burst: Duration, now: Instant) -> Pace {
        let burst = i64::try_from(burst.as_nanos()).unwrap_or(i64::MAX);
        Pace { part, burst, left: burst, at: now }
    }

    /// How long to wait before the processor may be used again; zero if it may be used now.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        let earned = now.saturating_duration_since(self.at) / self.part;
        // Less than a nanosecond is not lost, but counted later.
        if !earned.is_zero() {
            let earned = i64::try_from(earned.as_nanos()).unwrap_or(i64::MAX);
            self.left = self.left.saturating_add(earned).min(self.burst);
            self.at = now;
        }
        let owed = u64::try_from(self.left.saturating_neg()).unwrap_or(0);
        match self.left {
            ..=0 => Duration::from_nanos(owed + 1) * self.part,
            _ => Duration::ZERO,
        }
    }

    pub(crate) fn spend(&mut self, used: Duration) {
        let used = i64::try_from(used.as_nanos()).unwrap_or(i64::MAX);
        self.left = self.left.saturating_sub(used);
    }
}

/// The processor time of the calling thread since it began.
pub(crate) fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// Arrivals and services for three containers: `(container, cost)` arrives, or one item
    /// is served.
    fn events() -> impl Strategy<Value = Vec<Option<(u8, u64)>>> {
        prop::collection::vec(prop::option::of((0_u8..3, 1_u64..1000)), 1..400)
    }

    proptest! {
        #[test]
        fn x10_two_busy_containers_get_the_same_share(
            costs in prop::collection::vec((1_u64..1000, 1_u64..1000), 50..200),
        ) {
            let mut turns = Turns::default();
            let mut spent = [0_u64; 2];
            for (one, other) in costs {
                let &key = turns.next([0, 1].iter()).unwrap();
                let cost = [one, other][key];
                turns.charge(&key, cost);
                spent[key] += cost;
                // The difference is less than one piece of work of each.
                prop_assert!(spent[0].abs_diff(spent[1]) < 2000, "{spent:?}");
            }
        }

        #[test]
        fn x10_a_container_waits_for_at_most_one_piece_of_each_other(
            others in 1_usize..40, flood in prop::collection::vec(1_u64..1000, 40..400),
        ) {
            let mut queue = Queue::new(1000);
            let now = Instant::now();
            for (number, cost) in flood.iter().enumerate() {
                queue.push(&(number % others), *cost, now);
            }
            for _ in 0..flood.len() / 2 {
                let (key, _, cost) = queue.pop().unwrap();
                queue.charge(&key, cost);
            }
            let neighbour = others;
            queue.push(&neighbour, 1, now);
            let mut served = BTreeMap::<usize, usize>::new();
            loop {
                let (key, _, cost) = queue.pop().unwrap();
                if key == neighbour {
                    break;
                }
                queue.charge(&key, cost);
                *served.entry(key).or_default() += 1;
                prop_assert_eq!(served[&key], 1, "one of each at most");
            }
        }

        #[test]
        fn a_container_that_was_idle_has_saved_nothing_up(work in 1_u64..1000) {
            let mut turns = Turns::default();
            for _ in 0..100 {
                let &key = turns.next(["busy"].iter()).unwrap();
                turns.charge(&key, work);
            }
            // It takes turns from now on, and not a hundred at once.
            let mut order = Vec::new();
            for _ in 0..10 {
                let &key = turns.next(["busy", "late"].iter()).unwrap();
                turns.charge(&key, work);
                order.push(key);
            }
            let late = order.iter().filter(|key| **key == "late").count();
            prop_assert!((5..=6).contains(&late), "{order:?}");
        }

        #[test]
        fn x10_a_full_queue_drops_only_from_the_longest_backlog(events in events()) {
            const CAPACITY: usize = 16;
            let mut queue = Queue::new(CAPACITY);
            let now = Instant::now();
            let mut waiting = [0_usize; 3];
            let (mut pushed, mut popped, mut dropped) = (0, 0, 0);
            for event in events {
                match event {
                    Some((key, cost)) => {
                        let longest = *waiting.iter().max().unwrap();
                        waiting[usize::from(key)] += 1;
                        pushed += 1;
                        if let Some((owner, _)) = queue.push(&key, (key, cost), now) {
                            dropped += 1;
                            prop_assert_eq!(pushed - popped - dropped, CAPACITY);
                            let owner = usize::from(owner);
                            prop_assert!(waiting[owner] >= longest, "it has the most");
                            waiting[owner] -= 1;
                        }
                    }
                    None => if let Some((key, _, (owner, cost))) = queue.pop() {
                        prop_assert_eq!(key, owner);
                        queue.charge(&key, cost);
                        waiting[usize::from(key)] -= 1;
                        popped += 1;
                    }
                }
                prop_assert_eq!(queue.len(), pushed - popped - dropped);
                prop_assert!(queue.len() <= CAPACITY);
                let listed: usize = queue.backlog().map(|(_, waiting, _)| waiting).sum();
                prop_assert_eq!(listed, queue.len());
            }
        }

        #[test]
        fn w14_a_pace_holds_over_any_time(
            part in 1_u32..100, used in prop::collection::vec((1_u64..5_000_000, 0_u64..90_000_000), 1..200),
        ) {
            let start = Instant::now();
            let burst = Duration::from_millis(50);
            let mut pace = Pace::new(part, burst, start);
            let (mut now, mut spent, mut largest) = (start, Duration::ZERO, Duration::ZERO);
            for (piece, pause) in used {
                now += Duration::from_nanos(pause);
                let wait = pace.wait(now);
                if !wait.is_zero() {
                    now += wait;
                    prop_assert_eq!(pace.wait(now), Duration::ZERO, "the wait was long enough");
                }
                let piece = Duration::from_nanos(piece);
                pace.spend(piece);
                now += piece;
                spent += piece;
                largest = largest.max(piece);
                let allowed = (now - start) / part + burst + largest;
                prop_assert!(spent <= allowed, "{spent:?} of {allowed:?}");
            }
        }
    }

    #[derive(Debug, PartialEq, Eq)]
    struct Item(ContainerId, u32);

    impl Owned for Item {
        fn owner(&self) -> &ContainerId {
            &self.0
        }
    }

    fn item(name: &str, number: u32) -> Item {
        Item(ContainerId::new("n", name), number)
    }

    #[test]
    fn x10_a_flood_drops_its_own_and_a_neighbour_is_next() {
        let (sender, receiver) = channel(8);
        for number in 0..8 {
            sender.try_send(item("flood", number)).unwrap();
        }
        assert_eq!(sender.try_send(item("flood", 8)), Err(TrySendError::Full(item("flood", 8))));
        // The neighbour's item has room, and the flood loses one.
        assert_eq!(sender.try_send(item("calm", 0)), Err(TrySendError::Full(item("flood", 7))));
        let first = receiver.recv_timeout(LONG).unwrap();
        if first == item("flood", 0) {
            assert_eq!(receiver.recv_timeout(LONG).unwrap(), item("calm", 0));
        } else {
            assert_eq!(first, item("calm", 0));
        }
    }

    #[test]
    fn x10_an_item_that_is_put_back_lets_others_go_first_and_still_counts_as_waiting() {
        let (sender, receiver) = channel(8);
        sender.try_send(item("giant", 0)).unwrap();
        let giant = receiver.recv_timeout(LONG).unwrap();
        sender.try_send(item("giant", 1)).unwrap();
        sender.try_send(item("calm", 0)).unwrap();
        let waiting = |name: &str| {
            let all = receiver.waits().waiting();
            all.into_iter().find(|(owner, ..)| &*owner.id == name).map(|(_, waiting, _)| waiting)
        };
        assert_eq!((waiting("giant"), waiting("calm")), (Some(2), Some(1)));
        std::thread::sleep(Duration::from_millis(2));
        receiver.put_back(giant);
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), item("calm", 0));
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), item("giant", 0));
        assert_eq!((waiting("giant"), waiting("calm")), (Some(2), None));
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), item("giant", 1));
        drop(sender);
        assert_eq!(receiver.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
        assert_eq!(waiting("giant"), None);
    }

    #[test]
    fn d04_an_item_that_comes_back_has_room_in_a_full_queue_and_is_next() {
        let (sender, receiver) = channel(2);
        for number in 0..2 {
            sender.try_send(item("flood", number)).unwrap();
        }
        let since = |receiver: &Receiver<Item>| receiver.waits().waiting()[0].2;
        let before = since(&receiver);
        sender.send_back(item("flood", 9));
        assert_eq!(since(&receiver), before, "the others have waited for longer");
        assert_eq!(receiver.recv_timeout(LONG), Ok(item("flood", 9)));
        assert_eq!(receiver.recv_timeout(LONG), Ok(item("flood", 0)));
        assert_eq!(receiver.recv_timeout(LONG), Ok(item("flood", 1)));
    }

    #[test]
    fn a_channel_wakes_and_ends() {
        let (sender, receiver) = channel(8);
        let timeout = Duration::from_millis(1);
        assert_eq!(receiver.recv_timeout(timeout), Err(RecvTimeoutError::Timeout));
        let other = sender.clone();
        let thread = std::thread::spawn(move || {
            drop(sender);
            other.try_send(item("a", 1)).unwrap();
        });
        assert_eq!(receiver.recv_timeout(LONG), Ok(item("a", 1)));
        thread.join().unwrap();
        assert_eq!(receiver.recv_timeout(timeout), Err(RecvTimeoutError::Disconnected));
        let (sender, receiver) = channel(8);
        let another = receiver.clone();
        drop(receiver);
        sender.try_send(item("a", 1)).unwrap();
        assert_eq!(another.recv_timeout(LONG), Ok(item("a", 1)));
        drop(another);
        let item = item("a", 1);
        assert!(matches!(sender.try_send(item), Err(TrySendError::Disconnected(_))));
    }
}
