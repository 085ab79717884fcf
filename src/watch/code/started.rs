//! A process that has become something that may be an interpreter.

use std::sync::Arc;

use jiff::Timestamp;

use crate::model::ContainerId;
use crate::watch::core::fair::Owned;
use crate::watch::core::watched::Watched;

/// A process of a container that has become something that may be an interpreter.
#[derive(Clone, Debug)]
pub(crate) struct Started {
    pub(crate) watched: Arc<Watched>,
    pub(crate) pid: u32,
    /// The program's own file, if it was recorded.
    pub(crate) file: Option<Arc<[u8]>>,
    /// As it was given to execve.
    pub(crate) exec_name: Box<[u8]>,
    /// When, by the clock of the kernel's records.
    pub(crate) executed: u64,
    pub(crate) at: Timestamp,
}

impl Owned for Started {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
