//! The rings of all processors, as one source of records.
//!
//! Opens and closes rings as processors come and go. `watch` puts the records of several
//! rings in the order of their times.

use std::fmt;
use std::io;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::decode::{Layout, Malformed, decode, decode_arguments};
use super::error::Error;
use super::record::Record;
use super::ring::Ring;
use super::tracepoint::Tracepoint;

/// The rings of all processors.
pub struct Rings {
    rings: Vec<Ring>,
    tracepoint: Tracepoint,
    layout: Layout,
    lost_arguments: u64,
    scratch: Vec<u8>,
}

impl fmt::Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rings({})", self.rings.len())
    }
}

impl Rings {
    pub fn open() -> Result<Rings, Error> {
        let tracepoint = Tracepoint::find()?;
        let mut refused = None;
        for cgroup in [true, false] {
            let layout = Layout { cgroup, file_name: tracepoint.file_name };
            let mut rings = Rings {
                rings: Vec::new(),
                tracepoint,
                layout,
                lost_arguments: 0,
                scratch: Vec::new(),
            };
            match rings.follow_processors() {
                Ok(_) if !rings.rings.is_empty() => return Ok(rings),
                Ok(_) => (),
                Err(err) if err.raw_os_error() == Some(libc::EINVAL) => refused = Some(err),
                Err(err) => return Err(err.into()),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::NotFound.into()).into())
    }

    /// Opens a ring for each new processor, and closes the rings of those that have gone.
    /// Returns whether there were any: what ran there meanwhile was not recorded.
    pub fn follow_processors(&mut self) -> io::Result<bool> {
        let online = online_processors()?;
        let before = self.rings.len();
        self.rings.retain(|ring| online.contains(&ring.processor));
        let mut has_changed = self.rings.len() != before;
        let processors = online.len();
        for processor in online {
            if self.rings.iter().any(|ring| ring.processor == processor) {
                continue;
            }
            match Ring::open(processor, self.tracepoint.id, self.layout.cgroup) {
                Ok(ring) => self.rings.push(ring),
                // The processor has gone since it was listed.
                Err(err) if err.raw_os_error() == Some(libc::ENODEV) => (),
                Err(err) => return Err(err),
            }
            has_changed = true;
        }
        if has_changed {
            // Last: the other rings come first where the memory that may be locked is short.
            for ring in self.rings.iter_mut().filter(|ring| ring.arguments().is_none()) {
                let _ = ring.open_arguments(self.tracepoint.id, processors);
            }
        }
        Ok(has_changed)
    }

    /// Waits until there is something to read. Returns whether a processor may have gone.
    pub fn wait(&self, timeout: std::time::Duration) -> bool {
        let mut events: Vec<PollFd<'_>> = self
            .rings
            .iter()
            .map(|ring| PollFd::from_borrowed_fd(ring.readable(), PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(timeout).ok();
        // An error here (a signal) only ends the wait early.
        let _ = rustix::event::poll(&mut events, timeout.as_ref());
        events.iter().any(|event| event.revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Reads the rings, one after the other: the records of one ring are in order, those of
    /// several are not.
    pub fn read(&mut self, records: &mut Vec<Record>) -> Result<(), Malformed> {
        let mut outcome = Ok(());
        for ring in &mut self.rings {
            self.scratch.clear();
            ring.buffer.take(&mut self.scratch);
            outcome = outcome.and(decode(&self.scratch, self.layout, records));
            // The environment, which is copied with the arguments, stays in `scratch`.
            let Some(arguments) = ring.arguments() else { continue };
            self.scratch.clear();
            arguments.take(&mut self.scratch);
            match decode_arguments(&self.scratch, records) {
                Ok(lost) => self.lost_arguments = self.lost_arguments.saturating_add(lost),
                Err(_) => ring.close_arguments(),
            }
        }
        outcome
    }

    /// Whether there are [`Record::Arguments`] from every processor.
    pub fn has_arguments(&self) -> bool {
        self.rings.iter().all(|ring| ring.arguments().is_some())
    }

    /// How many records of arguments found no room.
    pub fn lost_arguments(&self) -> u64 {
        self.lost_arguments
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }
}

/// The time by the clock of the records, in nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

fn online_processors() -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse_processors(text.trim_end()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `0-3,5`
fn parse_processors(text: &str) -> Option<Vec<u32>> {
    const MOST: u32 = 1 << 16;
    let mut processors = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        processors.extend(first..=last);
    }
    Some(processors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::perf::Mapped;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(parse_processors("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_processors("0"), Some(vec![0]));
        assert_eq!(parse_processors("0-4294967295"), None);
        assert_eq!(parse_processors(""), None);
    }

    #[test]
    fn our_own_execve_is_recorded_in_its_order() {
        let mut rings = Rings::open().unwrap_or_else(|err| panic!("{err} (run as root)"));
        let before = now();
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        let mut records = Vec::new();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !records
            .iter()
            .any(|record| matches!(record, Record::Exited { pid: p, .. } if *p == pid))
        {
            assert!(std::time::Instant::now() < deadline, "{records:?}");
            rings.wait(std::time::Duration::from_millis(10));
            rings.read(&mut records).unwrap();
        }
        records.sort_by_key(Record::time);
        let index = |wanted: &dyn Fn(&Record) -> bool| records.iter().position(wanted);
        let forked = index(&|record| matches!(record, Record::Forked { pid: p, .. } if *p == pid));
        let began = index(&|record| matches!(record, Record::Began { pid: p, .. } if *p == pid));
        let mapped = index(
            &|record| matches!(record, Record::Mapped(Mapped { pid: p, inode: 1.., .. }) if *p == pid),
        );
        let executed = index(&|record| match record {
            Record::Executed(executed) => {
                executed.pid == pid && *executed.file_name == *b"/bin/true"
            }
            _ => false,
        });
        let exited = index(&|record| matches!(record, Record::Exited { pid: p, .. } if *p == pid));
        let order = [forked, began, mapped, executed, exited];
        assert!(order.iter().all(Option::is_some), "{order:?} of {records:?}");
        assert!(order.is_sorted(), "{order:?} of {records:?}");
        assert!(records[forked.unwrap()].time() >= before);
        assert!(records[exited.unwrap()].time() <= now());
    }

    #[test]
    fn the_arguments_of_what_ends_at_once_are_recorded() {
        let mut rings = Rings::open().unwrap_or_else(|err| panic!("{err} (run as root)"));
        assert!(rings.has_arguments());
        let expected = *b"/bin/true\0one\0\0two words\0";
        // Not for each execution: by chance an unwritten page may lie between the stack
        // pointer and the arguments.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut records = Vec::new();
        let mut is_recorded = false;
        while !is_recorded {
            assert!(std::time::Instant::now() < deadline, "{records:?}");
            let mut command = std::process::Command::new("/bin/true");
            let mut child = command.args(["one", "", "two words"]).env_clear().spawn().unwrap();
            child.wait().unwrap();
            records.clear();
            rings.read(&mut records).unwrap();
            is_recorded = records.iter().any(|record| {
                matches!(record, Record::Arguments { pid, arguments, .. }
                    if *pid == child.id() && **arguments == expected)
            });
        }
    }
}
