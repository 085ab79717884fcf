//! What all threads of the watchers share: the table of watched containers, fair queues,
//! reporting to the pipeline, losses, and the stop.
//!
//! It is the lowest wing: every other wing uses it, and it uses none of them.

pub(crate) mod copy;
pub(crate) mod copyup;
pub(crate) mod fair;
pub(crate) mod held;
pub(crate) mod layers;
pub(crate) mod message;
pub(crate) mod rest;
pub(crate) mod shared;
pub(crate) mod table;
pub(crate) mod trust;
pub(crate) mod unchanged;
pub(crate) mod watched;
pub(crate) mod ways;
