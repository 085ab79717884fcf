//! Processes, and what is known of each. A process is its pid *and* its start time: a pid
//! alone is used again.

use serde::{Deserialize, Serialize};

use super::path::RootfsPath;
use super::printable::bytes_of_printable;

pub use super::programs::may_be_runtime;

/// Identifies one process for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// In the host's pid namespace.
    pub pid: u32,
    /// Clock ticks after boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// What was known of a process when it was read. The container chooses all text here. In
/// memory, text is what [`super::printable`] makes of it; [`super::text`] is its form in
/// JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    /// The executable's path; `None` if the process had ended before it was read.
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    /// `None` if the process had ended before they were read.
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
    pub uid: Option<u32>,
    /// The controlling terminal, e.g. `pts/0`.
    pub tty: Option<String>,
    /// Its root directory in the container, if that is not the container's root (chroot).
    #[serde(flatten, with = "super::text::root")]
    pub root: Option<String>,
    /// Parents, nearest first, up to and including the first one outside the container.
    pub ancestors: Vec<Ancestor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
}

impl Process {
    /// Its root directory, if that is not the container's root.
    pub fn own_root(&self) -> Option<RootfsPath> {
        let root = self.root.as_deref()?;
        RootfsPath::new(bytes_of_printable(root)).ok().filter(|root| !root.relative().is_empty())
    }

    /// Whether `identity` is this process or one of its ancestors.
    pub fn descends_from(&self, identity: ProcessIdentity) -> bool {
        self.identity == identity
            || self.ancestors.iter().any(|ancestor| ancestor.identity == identity)
    }
}
