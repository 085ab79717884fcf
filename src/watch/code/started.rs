//! A process that has executed a program which may be an interpreter.
//!
//! `libraries` makes this value from the trace's records, and `interpreters` takes it from
//! the queue. It only carries what was recorded.

use std::sync::Arc;

use jiff::Timestamp;

use crate::model::ContainerId;
use crate::watch::core::fair::Owned;
use crate::watch::core::watched::Watched;

/// A process of a container that has executed a program which may be an interpreter.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    pub(crate) watched: Arc<Watched>,
    pub(crate) pid: u32,
    /// The program's own file, if it was recorded.
    pub(crate) file: Option<Arc<[u8]>>,
    /// The name that was given to execve.
    pub(crate) exec_name: Box<[u8]>,
    /// The time of the execve, by the clock of the kernel's records.
    pub(crate) executed: u64,
    pub(crate) at: Timestamp,
}

impl Owned for Started {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
