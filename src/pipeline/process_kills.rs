//! Kills of processes and denied executions for one finding: a program that is started again and
//! again is killed or denied again and again. The first one has a record of its own; the others
//! are recorded together, with their number. Pure.

use jiff::{SignedDuration, Timestamp};

use crate::model::{Answer, ContainerId, FindingId, Outcome};
use crate::respond::Response;

/// They are recorded once in this time.
const TOGETHER: SignedDuration = SignedDuration::from_secs(10);

/// Kills of processes for one finding that are recorded together.
#[derive(Debug)]
pub(super) struct ProcessKills {
    /// When they were recorded last.
    recorded: Timestamp,
    /// All for this finding.
    total: u64,
    /// Since then.
    killed: u64,
    gone: u64,
    failed: u64,
    last: Response,
}

/// What is recorded together: all of one action for one finding.
pub(super) type Key = (ContainerId, Option<FindingId>, String);

impl ProcessKills {
    pub(super) fn key(response: &Response) -> Key {
        (response.container.clone(), response.finding, response.outcome.action.clone())
    }

    /// The first one has a record of its own.
    pub(super) fn begun(first: &Response, now: Timestamp) -> ProcessKills {
        let total = u64::from(first.outcome.succeeded);
        let (killed, gone, failed) = (0, 0, 0);
        ProcessKills { recorded: now, total, killed, gone, failed, last: first.clone() }
    }

    /// How many processes were killed for the finding.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    pub(super) fn due(&self) -> Timestamp {
        self.recorded.saturating_add(TOGETHER).unwrap_or(Timestamp::MAX)
    }

    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        // After a clock was set back, too.
        now.duration_since(self.recorded).abs() >= TOGETHER
    }

    pub(super) fn count(&mut self, response: Response) {
        match &response.outcome {
            Outcome { succeeded: true, .. } => {
                (self.killed, self.total) = (self.killed + 1, self.total + 1);
            }
            Outcome { gone: true, .. } => self.gone += 1,
            _ => self.failed += 1,
        }
        self.last = response;
    }

    /// One record of all since the last one.
    pub(super) fn record(&mut self, now: Timestamp) -> Option<Response> {
        let (killed, gone, failed) = (self.killed, self.gone, self.failed);
        if killed + gone + failed == 0 {
            return None;
        }
        let mut response = self.last.clone();
        let what = if response.outcome.action == Answer::Deny.name() {
            format!("{killed} more executions denied")
        } else {
            format!("{killed} more processes killed, {gone} had ended before, {failed} failed")
        };
        let last = &response.outcome.message;
        response.outcome.message = format!("since {}: {what}; the last one: {last}", self.recorded);
        response.outcome.succeeded = killed > 0;
        response.outcome.gone = failed == 0 && killed == 0;
        (self.recorded, self.killed, self.gone, self.failed) = (now, 0, 0, 0);
        Some(response)
    }
}
