//! A process that was seen executing something, for the thread that judges processes.

use std::sync::Arc;

use jiff::Timestamp;

use super::describe::Caller;
use crate::model::ContainerId;
use crate::sys::perf::Mapped;
use crate::watch::core::fair::Owned;
use crate::watch::core::watched::Watched;

/// A process that executes a file of the image.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) watched: Arc<Watched>,
    /// Before it became the program, or, if nobody had to be asked, after that: then
    /// its `stat` is `None`.
    pub(crate) caller: Caller,
    pub(crate) at: Timestamp,
    /// What the kernel has recorded that it runs, where that may be a package manager.
    pub(crate) program: Option<Mapped>,
}

impl Owned for Seen {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
