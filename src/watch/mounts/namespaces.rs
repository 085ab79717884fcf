//! Finds the mount namespace in which mounts have changed.
//!
//! One fanotify group reports the changes of all mount namespaces. An event has the unique ID
//! of the mount, which is used only once, but not the namespace. So this file keeps the IDs
//! of each namespace's mounts. If a mount is on no list, all namespaces are listed again: a
//! difference between the old and the new list is a change of that namespace.
//!
//! A removed mount stays listed until its namespace is listed again, because its events may
//! not be read yet. A list that is too long is not kept. Changes that no other namespace
//! explains may then belong to that one. Containers are not known here: `marking` maps them.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::pace::Pace;
use crate::sys::mounts::{self, Changes};

/// The most mounts that are kept of one namespace, and of all: together about ten MiB.
const MAX_OF_NAMESPACE: usize = 4 * 1024;
const MAX_OF_ALL: usize = 256 * 1024;

/// The most changed mounts that wait for their namespace to be found.
const MAX_UNEXPLAINED: usize = 16 * 1024;

/// The most time that one listing may take. It usually takes microseconds. If a container stacks
/// thousands of mounts on one another, the kernel goes through all of them for each mount.
const MAX_TIME: Duration = Duration::from_millis(10);

/// Which mounts are in which namespace.
#[derive(Default)]
pub(crate) struct Namespaces(Mutex<State>);

#[derive(Default)]
struct State {
    namespace_of: HashMap<u64, u64>,
    /// `None`: it has too many mounts, or the kernel did not list them.
    lists: HashMap<u64, Option<Vec<u64>>>,
    /// Changed mounts that are on no list.
    unexplained: HashSet<u64>,
    /// Changes have been dropped.
    is_incomplete: bool,
    pace: Pace,
}

/// Namespaces whose mounts are to be listed again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changed {
    pub(crate) certain: HashSet<u64>,
    /// No mount was added or removed there, but one may have been moved.
    pub(crate) possible: HashSet<u64>,
}

impl Namespaces {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a namespace. Call it before the namespace's mounts are read. An existing list stays:
    /// another container of the namespace may rely on it.
    pub(crate) fn know(&self, namespace: u64) {
        self.know_by(namespace, list);
    }

    fn know_by(&self, namespace: u64, list: impl Fn(u64) -> Option<Vec<u64>>) {
        if matches!(self.state().lists.get(&namespace), Some(Some(_))) {
            return;
        }
        let members = list(namespace);
        self.state().set(namespace, members);
    }

    pub(crate) fn forget(&self, namespace: u64) {
        let mut state = self.state();
        state.clear(namespace);
        state.lists.remove(&namespace);
    }

    /// Takes in reported changes. Returns their namespaces as far as they are known without
    /// listing any.
    pub(crate) fn take(&self, changes: Changes) -> HashSet<u64> {
        let mut state = self.state();
        state.is_incomplete |= changes.is_incomplete;
        let mut changed = HashSet::new();
        for mount in changes.mounts {
            if let Some(&namespace) = state.namespace_of.get(&mount) {
                changed.insert(namespace);
            } else if state.unexplained.len() < MAX_UNEXPLAINED {
                state.unexplained.insert(mount);
            } else {
                state.is_incomplete = true;
            }
        }
        changed
    }

    /// When [`Namespaces::explain`] may run next; `None` while it has nothing to do.
    pub(crate) fn next(&self) -> Option<Instant> {
        let state = self.state();
        (state.is_incomplete || !state.unexplained.is_empty()).then(|| state.pace.next())
    }

    /// Finds the namespaces of the remaining changes. That lists all namespaces, so it is
    /// limited to a twentieth of a processor: a container that mounts without end must not
    /// cause it at every mount.
    pub(crate) fn explain(&self, now: Instant) -> Changed {
        self.explain_by(now, list)
    }

    fn explain_by(&self, now: Instant, list: impl Fn(u64) -> Option<Vec<u64>>) -> Changed {
        let mut changed = Changed::default();
        if self.next().is_none_or(|next| next > now) {
            return changed;
        }
        let (mut unexplained, is_incomplete, namespaces) = {
            let mut state = self.state();
            let unexplained = std::mem::take(&mut state.unexplained);
            let is_incomplete = std::mem::take(&mut state.is_incomplete);
            let namespaces: Vec<u64> = state.lists.keys().copied().collect();
            (unexplained, is_incomplete, namespaces)
        };
        let mut unlisted = Vec::new();
        for namespace in namespaces {
            match self.state().lists.get(&namespace) {
                Some(Some(_)) => (),
                // It is listed again at its container's next listing, which counts there.
                Some(None) => {
                    unlisted.push(namespace);
                    continue;
                }
                None => continue,
            }
            // Not under the lock: attaching a container must not wait for all listings.
            let members = list(namespace);
            for member in members.iter().flatten() {
                unexplained.remove(member);
            }
            let mut state = self.state();
            let Some(old) = state.lists.get(&namespace) else { continue };
            if *old == members {
                if is_incomplete {
                    changed.possible.insert(namespace);
                }
            } else {
                changed.certain.insert(namespace);
                state.set(namespace, members);
            }
        }
        // A mount that was added and removed in between belongs to one of these too.
        if is_incomplete || !unexplained.is_empty() {
            changed.certain.extend(unlisted);
        }
        self.state().pace.spent(now, Instant::now());
        changed
    }
}

impl State {
    fn set(&mut self, namespace: u64, members: Option<Vec<u64>>) {
        self.clear(namespace);
        let has_room = |members: &Vec<u64>| {
            members.len() <= MAX_OF_NAMESPACE
                && self.namespace_of.len() + members.len() <= MAX_OF_ALL
        };
        let members = members.filter(has_room);
        let known = members.iter().flatten();
        self.namespace_of.extend(known.map(|&mount| (mount, namespace)));
        self.lists.insert(namespace, members);
    }

    fn clear(&mut self, namespace: u64) {
        for mount in self.lists.get(&namespace).into_iter().flatten().flatten() {
            // A mount can be moved to another namespace, and then belongs to that one.
            if self.namespace_of.get(mount) == Some(&namespace) {
                self.namespace_of.remove(mount);
            }
        }
    }
}

/// The mounts of a namespace; `None` if there are too many, listing takes too long, or the
/// kernel refuses.
fn list(namespace: u64) -> Option<Vec<u64>> {
    let start = Instant::now();
    let mut members: Vec<u64> = Vec::new();
    loop {
        let more = mounts::members_after(namespace, members.last().copied().unwrap_or(0)).ok()?;
        if more.is_empty() {
            return Some(members);
        }
        members.extend(more);
        if members.len() > MAX_OF_NAMESPACE || start.elapsed() > MAX_TIME {
            return None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// The namespaces of a simulated kernel.
    #[derive(Default)]
    struct Kernel {
        lists: RefCell<HashMap<u64, Vec<u64>>>,
        listings: Cell<u64>,
    }

    impl Kernel {
        fn set(&self, namespace: u64, members: &[u64]) {
            self.lists.borrow_mut().insert(namespace, members.to_vec());
        }

        fn list(&self, namespace: u64) -> Option<Vec<u64>> {
            self.listings.set(self.listings.get() + 1);
            self.lists.borrow().get(&namespace).cloned()
        }
    }

    /// Two known namespaces, 1 and 2.
    fn two() -> (Kernel, Namespaces) {
        let (kernel, namespaces) = (Kernel::default(), Namespaces::default());
        for (namespace, members) in [(1, &[10, 11]), (2, &[20, 21])] {
            kernel.set(namespace, members);
            namespaces.know_by(namespace, |namespace| kernel.list(namespace));
        }
        (kernel, namespaces)
    }

    fn changes(mounts: impl IntoIterator<Item = u64>) -> Changes {
        Changes { mounts: mounts.into_iter().collect(), is_incomplete: false }
    }

    fn explain(kernel: &Kernel, namespaces: &Namespaces) -> Changed {
        let now = Instant::now() + Duration::from_secs(3600);
        namespaces.explain_by(now, |namespace| kernel.list(namespace))
    }

    fn certain(namespaces: impl IntoIterator<Item = u64>) -> Changed {
        Changed { certain: namespaces.into_iter().collect(), ..Changed::default() }
    }

    #[test]
    fn a_mount_that_is_listed_is_attributed_without_another_list() {
        let (kernel, namespaces) = two();
        // It was removed or moved, and may change again before the namespace is listed again.
        for _ in 0..2 {
            assert_eq!(namespaces.take(changes([21])), HashSet::from([2]));
        }
        assert_eq!(namespaces.next(), None);
        assert_eq!(kernel.listings.get(), 2, "one for each when it became known");
    }

    #[test]
    fn a_new_mount_is_a_change_of_its_namespace_and_of_no_other() {
        let (kernel, namespaces) = two();
        kernel.set(1, &[10, 11, 12]);
        assert_eq!(namespaces.take(changes([12])), HashSet::new());
        assert!(namespaces.next().is_some());
        assert_eq!(explain(&kernel, &namespaces), certain([1]));
        assert_eq!(namespaces.next(), None);
        assert_eq!(namespaces.take(changes([12])), HashSet::from([1]));
        // A mount that was added and removed again belongs to no namespace.
        namespaces.take(changes([13]));
        assert_eq!(explain(&kernel, &namespaces), certain([]));
    }

    #[test]
    fn a_mount_removed_before_its_event_was_read_is_still_a_change() {
        let (kernel, namespaces) = two();
        // While a mount of namespace 1 is searched for, one of namespace 2 is removed.
        kernel.set(1, &[10, 11, 12]);
        kernel.set(2, &[20]);
        namespaces.take(changes([12]));
        assert_eq!(explain(&kernel, &namespaces), certain([1, 2]));
        // Its event comes later, when the change is already known.
        assert_eq!(namespaces.take(changes([21])), HashSet::new());
        assert_eq!(explain(&kernel, &namespaces), certain([]));
    }

    #[test]
    fn after_dropped_events_any_mount_may_have_moved() {
        let (kernel, namespaces) = two();
        kernel.set(2, &[20, 22]);
        namespaces.take(Changes { is_incomplete: true, ..Changes::default() });
        let possible = HashSet::from([1]);
        assert_eq!(explain(&kernel, &namespaces), Changed { possible, ..certain([2]) });
        assert_eq!(namespaces.next(), None);
    }

    #[test]
    fn unexplained_changes_belong_to_the_namespace_with_too_many_mounts() {
        let (kernel, namespaces) = two();
        let many: Vec<u64> = (1000..).take(MAX_OF_NAMESPACE + 1).collect();
        kernel.set(3, &many);
        namespaces.know_by(3, |namespace| kernel.list(namespace));
        // Nothing of it is kept.
        assert_eq!(namespaces.state().namespace_of.len(), 4);
        namespaces.take(changes([1001]));
        assert_eq!(explain(&kernel, &namespaces), certain([3]));
        // It is not listed for others.
        let before = kernel.listings.get();
        kernel.set(1, &[10]);
        namespaces.take(changes([11, 5000]));
        explain(&kernel, &namespaces);
        assert_eq!(kernel.listings.get() - before, 2);
        // The next listing of its container makes its mounts known again.
        kernel.set(3, &[1000]);
        namespaces.know_by(3, |namespace| kernel.list(namespace));
        assert_eq!(namespaces.take(changes([1000])), HashSet::from([3]));
    }

    #[test]
    fn all_namespaces_together_stay_within_the_limit() {
        let (kernel, namespaces) = two();
        let full = (MAX_OF_ALL / MAX_OF_NAMESPACE) as u64 + 8;
        for namespace in 3..full {
            let first = namespace << 20;
            let members: Vec<u64> = (first..).take(MAX_OF_NAMESPACE).collect();
            kernel.set(namespace, &members);
            namespaces.know_by(namespace, |namespace| kernel.list(namespace));
        }
        assert!(namespaces.state().namespace_of.len() <= MAX_OF_ALL);
        let last = full - 1;
        namespaces.take(changes([last << 20]));
        assert!(explain(&kernel, &namespaces).certain.contains(&last));
        for namespace in 1..full {
            namespaces.forget(namespace);
        }
        let state = namespaces.state();
        assert!(state.namespace_of.is_empty() && state.lists.is_empty());
    }

    #[test]
    fn mounting_without_end_costs_a_twentieth_of_a_processor() {
        let (kernel, namespaces) = two();
        let cost = Duration::from_millis(1);
        let start = Instant::now();
        let (mut explained, mut mount) = (0, 1 << 40);
        while start.elapsed() < Duration::from_millis(300) {
            mount += 1;
            namespaces.take(changes([mount]));
            let before = kernel.listings.get();
            namespaces.explain_by(Instant::now(), |namespace| {
                std::thread::sleep(cost);
                kernel.list(namespace)
            });
            explained += kernel.listings.get() - before;
        }
        // Twenty milliseconds without a pause, then fifteen more in three hundred.
        assert!((1..=60).contains(&explained), "{explained}");
        // The waiting events use bounded memory.
        namespaces.take(changes(0..100_000));
        assert!(namespaces.state().unexplained.len() <= MAX_UNEXPLAINED);
        assert!(namespaces.state().is_incomplete);
    }
}
