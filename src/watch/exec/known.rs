//! What is known of processes by the kernel's records, and which of it is forgotten first.
//!
//! Owns the entry of one process and the choice of the entries that make room for others. It
//! reads no record and no file of /proc: `trace` does, and `examine` reads the entries.

use std::collections::HashMap;
use std::sync::Arc;

use crate::sys::perf::Mapped;
use crate::watch::core::watched::Watched;

/// What is known of one process by its records.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) parent: Option<u32>,
    /// When it was born, by the clock of the records.
    pub(crate) born: Option<u64>,
    pub(crate) watched: Option<Arc<Watched>>,
    /// It certainly belongs to that container: it or an ancestor has become a program of the
    /// container while it was in the container. A runtime on its way in has not.
    pub(crate) is_resident: bool,
    /// It is a process of the host, or was made by one. False where neither a record nor
    /// /proc shows it.
    pub(crate) is_made_outside: bool,
    /// Its container was looked up in /proc; it may have none.
    pub(crate) was_looked_up: bool,
    /// The table's generation at that time: it may belong to a container that came later.
    pub(crate) looked_up_among: u64,
    /// An execve is under way.
    pub(crate) is_beginning: bool,
    /// The first file that this execve has mapped.
    pub(crate) first: Option<Arc<Mapped>>,
    /// The arguments of this execve, if their record came first.
    pub(crate) arguments: Option<Box<[u8]>>,
    /// The program that it runs.
    pub(crate) program: Option<Arc<Mapped>>,
    pub(crate) ended: bool,
}

/// What was known of a process until its execve was over.
pub(crate) struct Before {
    pub(crate) program: Option<Arc<Mapped>>,
    pub(crate) arguments: Option<Box<[u8]>>,
    /// The program that it ran until then.
    pub(crate) previous: Option<Arc<Mapped>>,
    pub(crate) inherited: Option<Arc<Watched>>,
    pub(crate) was_resident: bool,
    pub(crate) is_made_outside: bool,
    pub(crate) parent: Option<u32>,
}

impl Known {
    /// Its execve is over.
    pub(crate) fn end_execve(&mut self) -> Before {
        self.is_beginning = false;
        let program = self.first.take();
        Before {
            arguments: self.arguments.take(),
            previous: std::mem::replace(&mut self.program, program.clone()),
            program,
            inherited: self.watched.clone(),
            was_resident: self.is_resident,
            is_made_outside: self.is_made_outside && !self.is_resident,
            parent: self.parent,
        }
    }
}

/// Forgets enough processes for a quarter of `most` to be free, and returns how many of which
/// container. The host's own go first: they can be looked up again. Then those of the
/// containers that have the most, so that no container makes another one's processes unknown.
pub(crate) fn make_room(
    processes: &mut HashMap<u32, Known>,
    most: usize,
) -> Vec<(Arc<Watched>, usize)> {
    let enough = most - most / 4;
    processes.retain(|_, known| known.watched.is_some());
    let mut by_container: HashMap<*const Watched, Vec<u32>> = HashMap::new();
    for (pid, known) in &*processes {
        let Some(watched) = &known.watched else { continue };
        by_container.entry(Arc::as_ptr(watched)).or_default().push(*pid);
    }
    // How many each container may keep, so that all of them together are few enough.
    let mut sizes: Vec<usize> = by_container.values().map(Vec::len).collect();
    sizes.sort_unstable();
    let (mut room, mut each) = (enough, enough);
    for (index, size) in sizes.iter().enumerate() {
        each = room / (sizes.len() - index);
        if *size > each {
            break;
        }
        room -= size;
    }
    let mut forgotten = Vec::new();
    for pids in by_container.into_values().filter(|pids| pids.len() > each) {
        let more = pids.len() - each;
        let mut watched = None;
        // Those that live can be looked up again.
        let (living, ended): (Vec<u32>, Vec<u32>) =
            pids.into_iter().partition(|pid| processes.get(pid).is_some_and(|known| !known.ended));
        for pid in ended.into_iter().chain(living).take(more) {
            watched = processes.remove(&pid).and_then(|known| known.watched).or(watched);
        }
        forgotten.extend(watched.map(|watched| (watched, more)));
    }
    forgotten
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerId, FileTime, FileType, ProcessIdentity};
    use crate::sys::file::Stat;

    #[test]
    fn h17_no_container_makes_anothers_processes_unknown() {
        let time = FileTime { seconds: 0, nanoseconds: 0 };
        let root = Stat {
            device: 1,
            inode: 1,
            born: None,
            changed: time,
            modified: time,
            file_type: FileType::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            links: 1,
            node: (0, 0),
            mount: None,
        };
        let watched = |name: &str| {
            let (id, path) = (ContainerId::new("n", name), b"/".to_vec());
            let init = ProcessIdentity { pid: 1, start_time: 1 };
            Arc::new(Watched::new(id, init, &root, path, None, None, None))
        };
        let (noisy, quiet) = (watched("noisy"), watched("quiet"));
        let mut processes = HashMap::new();
        let mut add = |pids: std::ops::Range<u32>, watched: Option<&Arc<Watched>>| {
            for pid in pids {
                let known =
                    Known { watched: watched.cloned(), ended: pid % 2 == 0, ..Known::default() };
                processes.insert(pid, known);
            }
        };
        add(0..100, None);
        add(1000..1800, Some(&noisy));
        add(2000..2100, Some(&quiet));
        let forgotten = make_room(&mut processes, 1000);
        let left = |watched: &Arc<Watched>, living: bool| {
            let is_it = |known: &&Known| {
                known.ended != living
                    && known.watched.as_ref().is_some_and(|one| Arc::ptr_eq(one, watched))
            };
            processes.values().filter(is_it).count()
        };
        assert_eq!((left(&quiet, true), left(&quiet, false)), (50, 50));
        assert_eq!((left(&noisy, true), left(&noisy, false)), (400, 250), "the ended go first");
        assert_eq!(processes.len(), 750, "the host's own can be looked up again");
        assert_eq!(forgotten.len(), 1);
        assert!(Arc::ptr_eq(&forgotten[0].0, &noisy) && forgotten[0].1 == 150);
    }
}
