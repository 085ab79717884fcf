//! A file that is being executed and is to be judged by its content.

use std::sync::Arc;

use jiff::Timestamp;

use super::crowd::More;
use crate::model::{ContainerId, Filesystem, LayerFile};
use crate::sys::file;
use crate::watch::core::fair::Owned;
use crate::watch::core::held::Held;
use crate::watch::core::watched::Watched;
use crate::watch::process::describe::Caller;

/// A file that is being executed and is to be judged by its content.
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
    /// It is the image's own, unless its path has become another.
    pub(crate) is_movable: bool,
    pub(crate) caller: Caller,
    pub(crate) at: Timestamp,
    /// Others like it, if too many wait to look at each.
    pub(crate) more: Option<Arc<More>>,
}

impl Owned for Execution {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}
