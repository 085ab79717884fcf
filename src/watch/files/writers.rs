//! Who wrote what, for as long as anybody may ask.
//!
//! An event names its writer by a pid, and the writer may be gone when the event is
//! read. Then who it was is asked later, when the change is told: by then it is
//! known which processes descend from a package manager. And a file may have
//! another name when a walk finds it than it had when it was written, so writers
//! are remembered by the file.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{FileTime, Process};
use crate::sys::file;
use crate::sys::procfs::{ArgumentArea, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::describe;
use crate::watch::process::named::Named;

/// Processes that have been described.
const MOST_PROCESSES: usize = 64;
/// Half of how many files are remembered.
const GENERATION: usize = 8 * 1024;

/// Who wrote a file, as far as that is known.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub(crate) named: Named,
    /// `None` if it had ended before it could be looked at.
    pub(crate) process: Option<Arc<Process>>,
}

/// A file of a container, whatever its name is. The number of its inode is used
/// again, the time of its birth is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Written {
    overlay: u64,
    inode: u64,
    born: FileTime,
}

impl Written {
    fn new(overlay: u64, stat: &file::Stat) -> Option<Written> {
        Some(Written { overlay, inode: stat.inode, born: stat.born? })
    }
}

#[derive(Debug, Default)]
pub(crate) struct Writers {
    /// One that unpacks an archive writes thousands of files, and need not be
    /// described for each.
    processes: HashMap<u32, (ArgumentArea, Arc<Process>)>,
    young: HashMap<Written, Writer>,
    old: HashMap<Written, Writer>,
}

impl Writers {
    /// The process with this pid, if it lives.
    pub(crate) fn describe(&mut self, pid: u32, watched: &Watched) -> Option<Arc<Process>> {
        let handle = Handle::open(pid).ok()?;
        let stat = handle.first_stat();
        if stat.has_ended() {
            return None;
        }
        if let Some((area, process)) = self.processes.get(&pid)
            && process.identity == stat.identity
            && *area == stat.area
        {
            return Some(process.clone());
        }
        let process = Arc::new(describe::as_it_is(&handle, watched));
        if self.processes.len() >= MOST_PROCESSES {
            self.processes.clear();
        }
        self.processes.insert(pid, (stat.area, process.clone()));
        Some(process)
    }

    /// The last one who wrote a file is remembered, known or not.
    pub(crate) fn remember(&mut self, overlay: u64, stat: &file::Stat, writer: Writer) {
        let Some(written) = Written::new(overlay, stat) else { return };
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(written, writer);
    }

    /// Who wrote a file last. The file is one of an upper layer, looked at there.
    pub(crate) fn of(&self, overlay: u64, stat: &file::Stat) -> Option<Writer> {
        let written = Written::new(overlay, stat)?;
        self.young.get(&written).or_else(|| self.old.get(&written)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    fn written_by(pid: u32) -> Writer {
        Writer { named: Named::now(pid), process: None }
    }

    fn pid(writer: Option<Writer>) -> Option<u32> {
        Some(writer?.named.pid)
    }

    #[test]
    fn a_file_is_known_by_any_name_until_another_takes_its_place() {
        let scratch = tempfile::tempdir().unwrap();
        let (one, other) = (scratch.path().join("x.new"), scratch.path().join("x"));
        std::fs::write(&one, b"x").unwrap();
        let stat = |path| file::stat_path(path).unwrap();
        let mut writers = Writers::default();
        writers.remember(1, &stat(&one), written_by(7));
        std::fs::rename(&one, &other).unwrap();
        assert_eq!(pid(writers.of(1, &stat(&other))), Some(7));
        // The number of a file that is gone is soon another's.
        let inode = std::fs::metadata(&other).unwrap().ino();
        std::fs::remove_file(&other).unwrap();
        std::fs::write(&one, b"y").unwrap();
        let reborn = file::Stat { inode, ..stat(&one) };
        assert_eq!(pid(writers.of(1, &reborn)), None);
        assert_eq!(pid(writers.of(2, &reborn)), None);
    }

    #[test]
    fn files_beyond_what_is_remembered_take_nothing_from_the_youngest() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let stat = file::stat_path(scratch.path()).unwrap();
        let mut writers = Writers::default();
        for inode in 0..3 * GENERATION as u64 {
            let stat = file::Stat { inode, ..stat };
            writers.remember(1, &stat, written_by(7));
            assert_eq!(pid(writers.of(1, &stat)), Some(7));
        }
        assert!(writers.young.len() + writers.old.len() <= 2 * GENERATION);
    }
}
