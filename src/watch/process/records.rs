//! The interface to consumers of the kernel's records, and conversions of the records' times.
//!
//! The thread `trace` (`exec::trace`) reads the records and calls each [`TraceConsumer`].
//! The wings above implement it. A consumer must never block that thread.

use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::shared::Processes;
use crate::model::ProcessIdentity;
use crate::sys::perf::{self, Executed, Mapped};
use crate::sys::procfs;
use crate::watch::core::watched::Watched;

/// A consumer of the records, in the order of their times. It is called on the thread that
/// reads the rings and must be quick: it hands longer work to a thread of its own by a bounded
/// channel.
pub(crate) trait TraceConsumer: Send {
    /// A process of a container has created another. `home` is that container if it is
    /// certain: the parent may also be a host process that runs a file of the container.
    fn forked(&mut self, _: &Processes, _home: Option<&Arc<Watched>>, _pid: u32, _parent: u32) {}

    /// A process of a container has executed a program. `program` is the file that was mapped
    /// first: for a script, its interpreter. `None` if it was not seen.
    fn executed(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    );

    /// A process of the host has executed a program with the name of a container runtime.
    fn runtime_invoked(&mut self, _: &Processes, _pid: u32) {}

    /// A process of a container has executed a program, and its creator is in no container.
    /// `born` is its birth, if that was recorded.
    fn entered(&mut self, _: &Processes, _: &Arc<Watched>, _: &Executed, _born: Option<Born>) {}

    /// A process of a container has mapped code of a file after its execve was over. So the
    /// file is neither its program nor its dynamic linker.
    fn mapped(&mut self, _: &Processes, _: &Arc<Watched>, _: &Mapped) {}

    /// A process has ended, in a container or not, at this time by the records' clock.
    fn exited(&mut self, _: &Processes, _pid: u32, _time: u64) {}

    /// All available records have been read. Called a few times a second, even if there are
    /// none.
    fn turn(&mut self, _: &Processes) {}

    /// Records were lost: what is known of processes may be wrong.
    fn lost(&mut self) {}
}

/// A birth, by its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Born {
    /// The start time may be a clock tick later than that in `/proc`.
    pub(crate) identity: ProcessIdentity,
    pub(crate) parent: u32,
}

/// The number of the descriptor that was given to execve instead of a name.
pub(crate) fn descriptor(file_name: &[u8]) -> Option<u32> {
    let rest = match file_name.strip_prefix(b"/dev/fd/") {
        Some(rest) => rest,
        None => {
            let (_, rest) = file_name.strip_prefix(b"/proc/").and_then(|rest| {
                let slash = rest.iter().position(|&byte| byte == b'/')?;
                Some(rest.split_at(slash))
            })?;
            rest.strip_prefix(b"/fd/")?
        }
    };
    str::from_utf8(rest).ok()?.parse().ok()
}

/// The time of a record, in clock ticks since boot.
pub(crate) fn ticks_of(record: u64) -> u64 {
    let age = Duration::from_nanos(perf::now().saturating_sub(record));
    procfs::ticks_since_boot().saturating_sub(procfs::ticks_in(age))
}

/// The time of a record, as a timestamp.
pub(crate) fn time_of(record: u64) -> Timestamp {
    let age = perf::now().saturating_sub(record);
    let age = SignedDuration::from_nanos(i64::try_from(age).unwrap_or(0));
    let now = Timestamp::now();
    now.saturating_sub(age).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_recognised() {
        assert_eq!(descriptor(b"/dev/fd/3"), Some(3));
        assert_eq!(descriptor(b"/proc/self/fd/12"), Some(12));
        assert_eq!(descriptor(b"/proc/7/fd/0"), Some(0));
        assert_eq!(descriptor(b"/proc/self/exe"), None);
        assert_eq!(descriptor(b"/dev/fd/3/x"), None);
        assert_eq!(descriptor(b"/bin/sh"), None);
    }
}
