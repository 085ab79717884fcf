//! What every thread of the watchers shares: the table of watched containers, fair
//! queues, the way out for events, and the stop.
//!
//! It knows no other wing.

pub(in crate::watch) mod copyup;
pub(in crate::watch) mod fair;
pub(in crate::watch) mod held;
pub(in crate::watch) mod message;
pub(in crate::watch) mod shared;
pub(in crate::watch) mod table;
pub(in crate::watch) mod trust;
