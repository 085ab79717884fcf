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

impl ProcessIdentity {
    /// Whether both may be one process. A process that is known from the kernel's records alone
    /// has no start time.
    pub fn may_be(self, other: ProcessIdentity) -> bool {
        let is_recorded = self.start_time == 0 || other.start_time == 0;
        self.pid == other.pid && (is_recorded || self.start_time == other.start_time)
    }
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
    /// The kernel's records prove that it belongs to the container. False where they do not, or
    /// were not asked. Only decisions need it, so it is not kept.
    #[serde(skip)]
    pub is_proven_inside: bool,
}

impl Process {
    /// Its root directory, if that is not the container's root.
    pub fn own_root(&self) -> Option<RootfsPath> {
        let root = self.root.as_deref()?;
        RootfsPath::new(bytes_of_printable(root)).ok().filter(|root| !root.relative().is_empty())
    }

    /// Whether `identity` may be this process or one of its ancestors.
    pub fn may_descend_from(&self, identity: ProcessIdentity) -> bool {
        let ancestors = self.ancestors.iter().map(|ancestor| ancestor.identity);
        std::iter::once(self.identity).chain(ancestors).any(|one| one.may_be(identity))
    }

    /// Whether `identity` is this process or one of its ancestors.
    pub fn descends_from(&self, identity: ProcessIdentity) -> bool {
        self.identity == identity
            || self.ancestors.iter().any(|ancestor| ancestor.identity == identity)
    }
}
