//! Sessions: a person or a program comes into a container, acts there, and leaves. What
//! happens meanwhile belongs to the session.
//!
//! A session is recorded when it opens, then at most five times a second, and when it closes.
//! Its finding waits a little if the command may turn out to be a probe, which is counted and
//! not reported. `store` holds the sessions of all containers; the other files add the rules
//! by subject.

mod activity;
mod cadence;
mod close;
mod execs;
mod open;
mod origin;
mod probes;
mod publish;
mod report;
mod store;

pub(super) use self::origin::{CONTAINERD, manager};
pub(super) use self::store::{ExecExit, Sessions};
