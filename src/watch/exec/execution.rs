//! A file that is being executed and is to be judged by its content.
//!
//! Owns the record alone, and must not open or read anything. `gate` makes it, `take` checks
//! and copies its file, and `content` describes its process.

use std::sync::Arc;

use jiff::Timestamp;

use super::repeats::More;
use crate::model::{ContainerId, Filesystem, LayerFile};
use crate::sys::file;
use crate::watch::core::fair::Owned;
use crate::watch::core::held::Held;
use crate::watch::core::watched::Watched;
use crate::watch::process::describe::Caller;

/// One execution as the gate hands it on, or several like it.
#[derive(Debug)]
pub(crate) struct Execution {
    pub(crate) watched: Arc<Watched>,
    pub(crate) filesystem: Filesystem,
    pub(crate) file: Held,
    /// The kernel's name for it, if it was copied and closed already.
    pub(crate) name: Option<Vec<u8>>,
    pub(crate) stat: file::Stat,
    /// `None` for a file of the container's own layer.
    pub(crate) layer_file: Option<LayerFile>,
    /// It is the image's own file, unless it has been moved to another path.
    pub(crate) is_movable: bool,
    pub(crate) caller: Caller,
    pub(crate) at: Timestamp,
    /// Counts others like it, if too many wait to examine each one.
    pub(crate) more: Option<Arc<More>>,
}

impl Owned for Execution {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
