//! The unchanged files of images: their execution is answered and not handed on.
//!
//! The daemon names each such file once. A file is known as it is now: whatever changes it, or
//! copies it up, moves its ctime, and the daemon forgets all files when the clock is set. So a
//! look-up needs one `statx`, and nothing is lost by forgetting.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::model::FileTime;
use crate::sys::file::Stat;

/// How many files are known. Then all are forgotten, and handed on again.
const MAX_KNOWN: usize = 16 * 1024;

/// A file of an image, as it was when the daemon last examined it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct File {
    device: u64,
    inode: u64,
    changed: FileTime,
}

impl File {
    pub fn of(stat: &Stat) -> File {
        File { device: stat.device, inode: stat.inode, changed: stat.changed }
    }
}

/// The known files, by the device of their container's overlay.
#[derive(Debug, Default)]
pub struct Unchanged {
    containers: HashMap<u64, Container>,
    len: usize,
}

#[derive(Debug, Default)]
struct Container {
    files: HashSet<(u64, FileTime)>,
    ignorable_from: Option<u64>,
}

impl Unchanged {
    /// `ignorable_from`: from when on the kernel need not even ask about files of this container
    /// (`shards`), by the clock of the kernel's records.
    pub fn add(&mut self, file: File, ignorable_from: Option<u64>) {
        if self.len >= MAX_KNOWN {
            *self = Unchanged::default();
        }
        let container = self.containers.entry(file.device).or_default();
        container.ignorable_from = ignorable_from;
        self.len += usize::from(container.files.insert((file.inode, file.changed)));
    }

    pub fn holds(&self, stat: &Stat) -> bool {
        let container = self.containers.get(&stat.device);
        container.is_some_and(|it| it.files.contains(&(stat.inode, stat.changed)))
    }

    /// Whether the kernel need not ask about the files of a container.
    pub(super) fn are_ignorable(&self, device: u64, now: impl Fn() -> u64) -> bool {
        let container = self.containers.get(&device);
        container.and_then(|it| it.ignorable_from).is_some_and(|from| from <= now())
    }

    /// Forgets the files of a container. The kernel uses the device's number again.
    pub fn forget(&mut self, device: u64) {
        let container = self.containers.remove(&device);
        self.len -= container.map_or(0, |it| it.files.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file;

    fn file(device: u64, inode: u64) -> File {
        File { device, inode, changed: FileTime { seconds: 1, nanoseconds: 2 } }
    }

    fn stat(of: File) -> Stat {
        let own = file::stat_path("/").unwrap();
        Stat { device: of.device, inode: of.inode, changed: of.changed, ..own }
    }

    #[test]
    fn a_file_is_known_until_it_changes_or_its_container_is_forgotten() {
        let mut unchanged = Unchanged::default();
        let (one, other) = (file(1, 5), file(2, 5));
        assert!(!unchanged.holds(&stat(one)));
        [one, one].into_iter().for_each(|file| unchanged.add(file, None));
        unchanged.add(other, Some(100));
        assert!(unchanged.holds(&stat(one)) && unchanged.holds(&stat(other)));
        let are_ignorable = |device, now| unchanged.are_ignorable(device, || now);
        assert!(!are_ignorable(1, 100) && !are_ignorable(2, 99) && !are_ignorable(3, 100));
        assert!(are_ignorable(2, 100));
        let later = FileTime { nanoseconds: 3, ..one.changed };
        assert!(!unchanged.holds(&stat(File { changed: later, ..one })));
        assert!(!unchanged.holds(&stat(file(1, 6))));
        unchanged.forget(1);
        assert!(!unchanged.holds(&stat(one)) && unchanged.holds(&stat(other)));
        assert_eq!(unchanged.len, 1);
        unchanged.forget(1);
        unchanged.forget(2);
        assert_eq!(unchanged.len, 0);
    }

    #[test]
    fn no_number_of_files_takes_more_memory() {
        let mut unchanged = Unchanged::default();
        let most = MAX_KNOWN as u64;
        (0..=most).for_each(|inode| unchanged.add(file(inode % 3, inode), None));
        assert_eq!(unchanged.len, 1);
        assert!(unchanged.holds(&stat(file(most % 3, most))));
    }
}
