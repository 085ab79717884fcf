//! Observations of containers that containerd has not announced yet. They wait for a short
//! time, and in a limited number. Pure: `judge` puts them in, and judges them when the
//! container is announced.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use crate::budget::{self, Pool, Waiting};
use crate::model::{ContainerId, Observation};

/// How long observations may wait for containerd to announce their container.
const ANNOUNCED_WITHIN: SignedDuration = SignedDuration::from_secs(10);
/// Number of containers whose observations may wait.
const MAX_UNANNOUNCED: usize = 256;

#[derive(Debug)]
pub(super) struct Unannounced {
    waiting: BTreeMap<ContainerId, Waiting>,
    pool: Arc<Pool>,
}

impl Default for Unannounced {
    fn default() -> Unannounced {
        Unannounced { waiting: BTreeMap::new(), pool: Pool::new(budget::ALL_UNANNOUNCED) }
    }
}

impl Unannounced {
    /// Keeps an observation. Returns those that have no room.
    pub(super) fn keep(&mut self, observation: &Observation, now: Timestamp) -> Vec<Observation> {
        self.waiting.retain(|_, waiting| {
            let is_old = |one: &Observation| now.duration_since(one.at) >= ANNOUNCED_WITHIN;
            while waiting.first().is_some_and(is_old) {
                waiting.pop();
            }
            !waiting.is_empty()
        });
        let container = &observation.container;
        if !self.waiting.contains_key(container) && self.waiting.len() >= MAX_UNANNOUNCED {
            return vec![observation.clone()];
        }
        let pool = &self.pool;
        let waiting = self
            .waiting
            .entry(container.clone())
            .or_insert_with(|| Waiting::new(pool, budget::UNANNOUNCED));
        waiting.push(observation.clone())
    }

    /// The container is announced: returns its observations.
    pub(super) fn take(&mut self, container: &ContainerId) -> Vec<Observation> {
        let waiting = self.waiting.remove(container);
        waiting.map(|mut waiting| waiting.take().collect()).unwrap_or_default()
    }
}
