//! How much the history keeps, by age and by size.
//!
//! The settings choose it; `retention` and `shrink` carry it out.

use std::time::Duration;

/// How much the history keeps.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// How long a record is kept after its subject was last seen.
    pub retention: Duration,
    /// How many bytes the file may take.
    pub max_bytes: u64,
}

impl From<Duration> for Keep {
    /// Without a bound in bytes.
    fn from(retention: Duration) -> Keep {
        Keep { retention, max_bytes: u64::MAX }
    }
}
