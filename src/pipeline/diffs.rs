//! A diff that a client has requested, while the sensors compare the container. It collects
//! the differences within its bounds, and sends the reply at the end.

use tokio::sync::oneshot;

use super::requests::{Diff, Difference, LookupError};
use crate::model::ContainerId;

/// Number of differences in one reply.
const MAX_DIFFERENCES: usize = 100_000;
/// Bytes of paths in one reply.
const MAX_DIFFERENCE_BYTES: usize = 64 << 20;

#[derive(Debug)]
pub(super) struct PendingDiff {
    container: ContainerId,
    differences: Vec<Difference>,
    /// The bytes of their paths.
    bytes: usize,
    truncated: bool,
    reply: oneshot::Sender<Result<Diff, LookupError>>,
}

impl PendingDiff {
    pub(super) fn new(
        container: ContainerId,
        reply: oneshot::Sender<Result<Diff, LookupError>>,
    ) -> PendingDiff {
        PendingDiff { container, differences: Vec::new(), bytes: 0, truncated: false, reply }
    }

    /// Whether the client still waits.
    pub(super) fn is_wanted(&self) -> bool {
        !self.reply.is_closed()
    }

    pub(super) fn add(&mut self, difference: Difference) {
        self.bytes += difference.path.as_bytes().len();
        let is_full = self.differences.len() == MAX_DIFFERENCES;
        if is_full || self.bytes > MAX_DIFFERENCE_BYTES {
            self.truncated = true;
            return;
        }
        self.differences.push(difference);
    }

    /// A difference is missing.
    pub(super) fn truncate(&mut self) {
        self.truncated = true;
    }

    /// Sends the reply. `complete`: the sensors have compared everything.
    pub(super) fn finish(mut self, complete: bool) {
        self.differences.sort_by(|one, other| one.path.cmp(&other.path));
        let _ = self.reply.send(Ok(Diff {
            container: self.container,
            differences: self.differences,
            incomplete: self.truncated || !complete,
        }));
    }
}
