//! How executions are recorded on this machine.

use crate::sys::connector::Connector;
use crate::sys::perf::Rings;

/// How executions are recorded on this machine.
#[derive(Debug)]
pub(crate) enum Recorder {
    Rings(Rings),
    /// Who ends at once is not seen, and no mapping is.
    Connector(Connector),
}

/// What the second pair of eyes sees on this machine, for people to be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executions {
    /// Every execution and every mapping of code.
    Recorded,
    /// Executions of programs that live long enough to be looked at; no mappings.
    Announced { why: String },
    /// Nothing but what the gate sees and a look at the running processes finds.
    Unseen { why: String },
}

impl Recorder {
    /// The best there is, and what that means.
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
