//! What every thread of the watchers shares: the table of watched containers, fair
//! queues, the way out for events, and the stop.
//!
//! It knows no other wing.

pub(crate) mod copy;
pub(crate) mod copyup;
pub(crate) mod fair;
pub(crate) mod held;
pub(crate) mod layers;
pub(crate) mod message;
pub(crate) mod shared;
pub(crate) mod table;
pub(crate) mod trust;
pub(crate) mod watched;
pub(crate) mod ways;
