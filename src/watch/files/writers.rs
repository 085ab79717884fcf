//! The last writer of each file, kept until the change has been reported.
//!
//! An event names its writer by a pid, and the writer may have ended when the event is read.
//! Then it is identified later, when the change is reported: by then the descendants of
//! package managers are known (`packages`, `shared`). A file may also have another name when
//! a walk finds it than when it was written, so writers are remembered by file, not by name.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::{FileTime, Process};
use crate::sys::file;
use crate::sys::procfs::{ArgumentArea, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::describe;
use crate::watch::process::named::Named;

/// The most described processes that are kept.
const MOST_PROCESSES: usize = 64;
/// Half of the number of files that are remembered.
const GENERATION: usize = 8 * 1024;

/// The writer of a file, as far as it is known.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub(crate) named: Named,
    /// `None` if it had ended before it could be examined.
    pub(crate) process: Option<Arc<Process>>,
}

/// Identifies a file of a container whatever its name. Inode numbers are reused, the time of
/// birth is not.
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
    /// A process that unpacks an archive writes thousands of files and is described once.
    processes: HashMap<u32, (ArgumentArea, Arc<Process>)>,
    /// Programs, and files that other programs obey.
    sensitive: Generations,
    /// All other files, which may be many: an interpreter may be given one of them.
    data: Generations,
}

/// The youngest files.
#[derive(Debug, Default)]
struct Generations {
    young: HashMap<Written, Writer>,
    old: HashMap<Written, Writer>,
}

impl Generations {
    fn insert(&mut self, written: Written, writer: Writer) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(written, writer);
    }

    fn get(&self, written: &Written) -> Option<&Writer> {
        self.young.get(written).or_else(|| self.old.get(written))
    }

    fn remove(&mut self, written: &Written) {
        self.young.remove(written);
        self.old.remove(written);
    }
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

    /// Remembers the last writer of a file, even if its process is not known.
    pub(crate) fn remember(&mut self, overlay: u64, stat: &file::Stat, writer: Writer) {
        if let Some(written) = Written::new(overlay, stat) {
            self.sensitive.insert(written, writer);
        }
    }

    /// Remembers the last writer of data by its pid alone: it is identified if it is asked for.
    pub(crate) fn remember_data(&mut self, overlay: u64, stat: &file::Stat, pid: u32) {
        if let Some(written) = Written::new(overlay, stat) {
            self.sensitive.remove(&written);
            self.data.insert(written, Writer { named: Named::now(pid), process: None });
        }
    }

    /// The last writer of a file of an upper layer that was examined there.
    pub(crate) fn of(&self, overlay: u64, stat: &file::Stat) -> Option<Writer> {
        let written = Written::new(overlay, stat)?;
        self.sensitive.get(&written).or_else(|| self.data.get(&written)).cloned()
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
        // The inode number of a removed file is soon reused.
        let inode = std::fs::metadata(&other).unwrap().ino();
        std::fs::remove_file(&other).unwrap();
        std::fs::write(&one, b"y").unwrap();
        let reborn = file::Stat { inode, ..stat(&one) };
        assert_eq!(pid(writers.of(1, &reborn)), None);
        assert_eq!(pid(writers.of(2, &reborn)), None);
    }

    #[test]
    fn files_beyond_the_limit_do_not_displace_the_youngest() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let stat = file::stat_path(scratch.path()).unwrap();
        let mut writers = Writers::default();
        for inode in 0..3 * GENERATION as u64 {
            let stat = file::Stat { inode, ..stat };
            writers.remember(1, &stat, written_by(7));
            assert_eq!(pid(writers.of(1, &stat)), Some(7));
        }
        let Generations { young, old } = &writers.sensitive;
        assert!(young.len() + old.len() <= 2 * GENERATION);
    }

    #[test]
    fn w12_the_last_writer_counts_whether_it_wrote_a_program_or_data() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        let stat = file::stat_path(scratch.path()).unwrap();
        let mut writers = Writers::default();
        writers.remember_data(1, &stat, 7);
        assert_eq!(pid(writers.of(1, &stat)), Some(7));
        writers.remember(1, &stat, written_by(8));
        assert_eq!(pid(writers.of(1, &stat)), Some(8));
        writers.remember_data(1, &stat, 9);
        assert_eq!(pid(writers.of(1, &stat)), Some(9));
    }
}
