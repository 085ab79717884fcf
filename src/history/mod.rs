//! What happened, kept (SQLite).

use jiff::Timestamp;

use crate::model::{ContainerId, Finding};
use crate::respond::Response;

/// One line of the history, in the order in which the pipeline decided it.
#[derive(Debug, Clone)]
pub enum Record {
    /// A finding's newest revision.
    Finding(Box<Finding>),
    Response(Box<Response>),
    /// Something was not seen: a named loss.
    Gap {
        name: String,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
    },
}
