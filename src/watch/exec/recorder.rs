//! The source of the records of executions: the kernel's perf rings, or else the process
//! connector.
//!
//! Opens the best source that this machine has, and names what that source cannot record. It
//! must not read records: `trace` does that.

use crate::sys::connector::Connector;
use crate::sys::perf::Rings;

/// How executions are recorded on this machine.
#[derive(Debug)]
pub(crate) enum Recorder {
    Rings(Rings),
    /// It misses processes that end at once, and records no mappings.
    Connector(Connector),
}

/// Which executions are recorded on this machine besides the gate's, for messages to people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executions {
    /// Every execution and every mapping of code.
    Recorded,
    /// Executions of programs that live long enough to be examined; no mappings.
    Announced { why: String },
    /// Only what the gate sees, and what a scan of the running processes finds.
    Unseen { why: String },
}

impl Recorder {
    /// The best source there is, and what it records.
    pub(crate) fn open() -> (Option<Recorder>, Executions) {
        let why = match Rings::open() {
            Ok(rings) => return (Some(Recorder::Rings(rings)), Executions::Recorded),
            Err(err) => err,
        };
        match Connector::open() {
            Ok(connector) => {
                let why = why.to_string();
                (Some(Recorder::Connector(connector)), Executions::Announced { why })
            }
            Err(err) => {
                let why = format!("{why}; and there is no process connector: {err}");
                (None, Executions::Unseen { why })
            }
        }
    }
}
