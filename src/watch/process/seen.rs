//! A process that was seen executing a file: an item of the queue to the thread `processes`.
//!
//! The gate's thread and the trace send it. This file holds only the type.

use std::sync::Arc;

use jiff::Timestamp;

use super::describe::Caller;
use super::records::Born;
use crate::model::ContainerId;
use crate::sys::perf::Mapped;
use crate::watch::core::fair::Owned;
use crate::watch::core::watched::Watched;

/// A process that executes a file of the image.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) watched: Arc<Watched>,
    /// As it was before it became the program. If the gate was not asked, the event comes
    /// after that, and `stat` is `None`.
    pub(crate) caller: Caller,
    pub(crate) at: Timestamp,
    /// Its birth, where only the kernel's records show the process.
    pub(crate) born: Option<Born>,
    /// The program that the kernel has recorded, if it may be a package manager.
    pub(crate) program: Option<Mapped>,
}

impl Owned for Seen {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
