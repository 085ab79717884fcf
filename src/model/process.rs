//! Processes. A process is a pid *and* its start time; a pid alone is reused.

use serde::{Deserialize, Serialize};

/// Names one process for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// In the host's pid namespace.
    pub pid: u32,
    /// Clock ticks after boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// What was known of a process when it was looked at. Text that is not UTF-8 is
/// escaped by [`super::printable`]; everything here is chosen by the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    /// The executable's path; `None` when the process was gone too soon.
    pub exe: Option<String>,
    /// `None` when the process was gone too soon.
    pub argv: Option<Vec<String>>,
    pub uid: Option<u32>,
    /// The controlling terminal, e.g. `pts/0`.
    pub tty: Option<String>,
    /// Parents, nearest first, up to and including the first one outside the
    /// container.
    pub ancestors: Vec<Ancestor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    pub exe: Option<String>,
    pub argv: Option<Vec<String>>,
}

impl Process {
    /// Whether `identity` is this process or one of its ancestors.
    pub fn descends_from(&self, identity: ProcessIdentity) -> bool {
        self.identity == identity
            || self.ancestors.iter().any(|ancestor| ancestor.identity == identity)
    }
}
