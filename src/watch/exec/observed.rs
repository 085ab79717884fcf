//! What is known of executions that wait for a decision, until they are answered.
//!
//! Owns the observations alone. `questions` makes them, and `gate` reports those of executions
//! that were denied.

use std::collections::HashMap;

use crate::model::Observation;

/// How many are kept: more than may wait.
const MAX_OBSERVED: usize = 2048;

/// The observations of executions that wait, by number: what is denied is reported by them.
#[derive(Debug, Default)]
pub(crate) struct Observed(HashMap<u64, Observation>);

impl Observed {
    pub(crate) fn keep(&mut self, number: u64, observation: Observation) {
        // A number whose answer was lost stays. Each is a moment old at most.
        if self.0.len() >= MAX_OBSERVED {
            self.0.clear();
        }
        self.0.insert(number, observation);
    }

    pub(crate) fn take(&mut self, number: u64) -> Option<Observation> {
        self.0.remove(&number)
    }
}
