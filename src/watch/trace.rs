//! The second pair of eyes: what has run, by the kernel's own records.

use std::sync::Arc;

use super::shared::Shared;
use super::table::Watched;
use crate::sys::perf::{Executed, Mapped};

/// What else is made of the records, in the order of their times. It is called on
/// the thread that reads the rings and must be quick: what it does not do at once,
/// it hands to a thread of its own by a bounded channel.
pub(super) trait TraceConsumer: Send {
    /// A process of a container has become a program. `program` is the file that
    /// was mapped first: of a script, its interpreter. `None` if it was not seen.
    fn executed(
        &mut self,
        shared: &Shared,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    );

    /// A process of a container has mapped code of a file after its execve was over,
    /// so neither its program nor its dynamic linker.
    fn mapped(&mut self, shared: &Shared, watched: &Arc<Watched>, mapped: &Mapped);

    /// A process has ended, of a container or not.
    fn exited(&mut self, pid: u32);

    /// Records were lost: what is remembered of processes may be wrong.
    fn lost(&mut self);
}
