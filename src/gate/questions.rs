//! The executions and reads that wait for a decision: in which containers they wait, and for how
//! long.
//!
//! Only tables: nothing here reads, opens or answers anything. `process` answers.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use super::wire::{Enforced, Undecided};
use crate::sys::fanotify::Permission;
use crate::sys::file::Stat;
use crate::sys::procfs::Whereabouts;

/// How many executions may wait, in all and of one container. Each keeps a descriptor.
const MAX_WAITING: usize = 1024;
const MAX_OF_ONE: usize = 64;

/// Whether an execution waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waits {
    No,
    /// In the container with this device, under this number.
    Under(u64, u64),
    /// It should, and too many wait.
    NoRoom,
}

#[derive(Default)]
pub(super) struct Questions<'groups> {
    /// By the device of their overlay.
    containers: HashMap<u64, Container>,
    /// The devices of the same containers, by mount.
    mounts: HashMap<u64, u64>,
    /// By number, so the oldest is first.
    waiting: BTreeMap<u64, Waiting<'groups>>,
    asked_so_far: u64,
    undecided: Option<Undecided>,
}

struct Container {
    enforced: Enforced,
    waiting: usize,
    /// Reads that wait do not take the room of executions.
    reads: usize,
}

impl Container {
    fn waiting(&mut self, is_read: bool) -> &mut usize {
        if is_read { &mut self.reads } else { &mut self.waiting }
    }
}

struct Waiting<'groups> {
    container: u64,
    question: Question<'groups>,
    since: Instant,
}

/// A question of the kernel.
pub(super) struct Question<'groups> {
    pub(super) permission: Permission<'groups>,
    /// A thread reads a guarded file; otherwise a program is executed.
    pub(super) is_read: bool,
}

impl<'groups> Questions<'groups> {
    pub(super) fn enforce(&mut self, enforced: Enforced) {
        self.enforce_no_more(enforced.device);
        self.undecided = Some(enforced.undecided);
        if let Some(mount) = enforced.mount {
            self.mounts.insert(mount, enforced.device);
        }
        // With those that wait since before: the number is the same container's.
        let of_it = |one: &&Waiting<'_>| one.container == enforced.device;
        let (reads, others): (Vec<_>, Vec<_>) =
            self.waiting.values().filter(of_it).partition(|one| one.question.is_read);
        let (reads, waiting) = (reads.len(), others.len());
        self.containers.insert(enforced.device, Container { enforced, waiting, reads });
    }

    /// Those that wait already are decided about, or answered when their time is over.
    pub(super) fn enforce_no_more(&mut self, device: u64) {
        let known = self.containers.remove(&device);
        if let Some(mount) = known.and_then(|container| container.enforced.mount) {
            self.mounts.remove(&mount);
        }
    }

    /// Whether an execution waits. `whereabouts` are those of its process, if the file is on no
    /// container's own overlay.
    pub(super) fn of(&mut self, file: Option<&Stat>, whereabouts: Option<&Whereabouts>) -> Waits {
        // In most gates there is nothing to wait for.
        if self.containers.is_empty() {
            return Waits::No;
        }
        let Some(stat) = file else { return Waits::No };
        let Some(device) = self.container_of(stat, whereabouts) else { return Waits::No };
        self.turn_of(device, false)
    }

    /// The device of the container in which a thread reads a guarded file, if executions wait
    /// there.
    pub(super) fn reader(&self, whereabouts: &Whereabouts) -> Option<u64> {
        let holds = |(device, container): (&u64, &Container)| {
            container.enforced.holds(whereabouts).then_some(*device)
        };
        self.containers.iter().find_map(holds)
    }

    /// A number for a question of this container, if there is room.
    pub(super) fn turn_of(&mut self, device: u64, is_read: bool) -> Waits {
        let container = self.containers.get_mut(&device);
        let of_one = container.map_or(0, |container| *container.waiting(is_read));
        if self.waiting.len() >= MAX_WAITING || of_one >= MAX_OF_ONE {
            return Waits::NoRoom;
        }
        self.asked_so_far += 1;
        Waits::Under(device, self.asked_so_far)
    }

    fn container_of(&self, file: &Stat, whereabouts: Option<&Whereabouts>) -> Option<u64> {
        if self.containers.contains_key(&file.device) {
            return Some(file.device);
        }
        let by_mount = file.mount.and_then(|mount| self.mounts.get(&mount));
        by_mount.copied().or_else(|| self.reader(whereabouts?))
    }

    pub(super) fn wait(&mut self, (container, number): (u64, u64), question: Question<'groups>) {
        if let Some(container) = self.containers.get_mut(&container) {
            *container.waiting(question.is_read) += 1;
        }
        let since = Instant::now();
        self.waiting.insert(number, Waiting { container, question, since });
    }

    /// Takes a question that waits; `None` if it was answered.
    pub(super) fn take(&mut self, number: u64) -> Option<Question<'groups>> {
        let Waiting { container, question, .. } = self.waiting.remove(&number)?;
        if let Some(container) = self.containers.get_mut(&container) {
            let waiting = container.waiting(question.is_read);
            *waiting = waiting.saturating_sub(1);
        }
        Some(question)
    }

    /// How long until the oldest has waited too long.
    pub(super) fn due_in(&self) -> Option<Duration> {
        let (_, oldest) = self.waiting.first_key_value()?;
        Some(self.patience().saturating_sub(oldest.since.elapsed()))
    }

    /// The oldest, if it has waited too long.
    pub(super) fn take_late(&mut self) -> Option<(u64, Question<'groups>)> {
        let (_, oldest) = self.waiting.first_key_value()?;
        if oldest.since.elapsed() < self.patience() {
            return None;
        }
        self.take_first()
    }

    /// The oldest, however long it has waited.
    pub(super) fn take_first(&mut self) -> Option<(u64, Question<'groups>)> {
        let (number, _) = self.waiting.first_key_value()?;
        let number = *number;
        self.take(number).map(|question| (number, question))
    }

    fn patience(&self) -> Duration {
        self.undecided.map_or(Duration::ZERO, |undecided| undecided.after)
    }

    /// Whether an execution without a decision is denied.
    pub(super) fn denies_undecided(&self) -> bool {
        self.undecided.is_some_and(|undecided| undecided.deny)
    }
}

impl Enforced {
    /// Whether a process there belongs to the container.
    fn holds(&self, whereabouts: &Whereabouts) -> bool {
        let is_same = |one: Option<u64>, other: Option<u64>| one.is_some() && one == other;
        let in_cgroup = || {
            let cgroup = whereabouts.cgroup.as_deref()?;
            let below = cgroup.strip_prefix(self.cgroup.as_deref()?)?;
            Some(below.is_empty() || below.starts_with(b"/"))
        };
        is_same(self.pid_namespace, whereabouts.pid_namespace)
            || is_same(self.mount_namespace, whereabouts.mount_namespace)
            || in_cgroup().unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FileTime, FileType};

    fn enforced(device: u64) -> Enforced {
        Enforced {
            device,
            mount: Some(100 + device),
            pid_namespace: Some(200 + device),
            mount_namespace: Some(300 + device),
            cgroup: Some(b"/pod/one".to_vec()),
            undecided: Undecided { after: Duration::from_secs(1), deny: false },
        }
    }

    fn stat(device: u64, mount: u64) -> Stat {
        let time = FileTime { seconds: 1, nanoseconds: 2 };
        Stat {
            device,
            inode: 5,
            born: None,
            changed: time,
            modified: time,
            file_type: FileType::Regular,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 1,
            links: 1,
            node: (0, 0),
            mount: Some(mount),
        }
    }

    fn place(pid: u64, mount: u64, cgroup: &str) -> Whereabouts {
        let cgroup = Some(cgroup.as_bytes().to_vec());
        Whereabouts { pid_namespace: Some(pid), mount_namespace: Some(mount), cgroup }
    }

    #[test]
    fn executions_wait_in_the_containers_where_a_rule_may_deny_and_nowhere_else() {
        let mut questions = Questions::default();
        let waits = |questions: &mut Questions<'_>, stat: &Stat, place: Option<&Whereabouts>| {
            matches!(questions.of(Some(stat), place), Waits::Under(1, _))
        };
        assert!(!waits(&mut questions, &stat(1, 1), None));
        questions.enforce(enforced(1));
        assert!(waits(&mut questions, &stat(1, 1), None));
        // An overlay with layers on several filesystems shows its files with other devices.
        assert!(waits(&mut questions, &stat(9, 101), None));
        assert!(!waits(&mut questions, &stat(2, 102), None));
        // Files from elsewhere: by what holds the process.
        for (place, expected) in [
            (place(201, 8, "/x"), true),
            (place(8, 301, "/x"), true),
            (place(8, 8, "/pod/one/below"), true),
            (place(8, 8, "/pod/one"), true),
            (place(8, 8, "/pod/oneself"), false),
            (place(8, 8, "/pod"), false),
        ] {
            assert_eq!(waits(&mut questions, &stat(3, 3), Some(&place)), expected, "{place:?}");
        }
        assert_eq!(questions.of(None, None), Waits::No);
        questions.enforce_no_more(1);
        assert!(!waits(&mut questions, &stat(1, 1), None));
        assert!(questions.mounts.is_empty());
    }
}
