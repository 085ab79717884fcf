//! fanotify(7): groups, marks, and a reader of the events.
//!
//! [`Group::read`] makes every descriptor that the kernel put into the buffer an `OwnedFd`
//! before it returns, so that none can leak or be closed twice. A permission event comes as
//! a [`Permission`], which answers the kernel exactly once: with the decision of its owner,
//! or with ALLOW when it is dropped. The event's descriptor stays open until after the
//! answer, because the kernel finds the event by that number. A library that closes it
//! earlier answers the wrong event (docs/adr/0003).
//!
//! Which groups exist, and what is marked, is decided by `gate` and `watch`.

mod decode;
mod error;
mod group;
mod marks;
mod probe;
mod read;

pub use decode::{
    Decoded, DecodedMount, DecodedName, Event, FAN_PRE_ACCESS, Malformed, Named, Range, decode,
    decode_mounts, decode_names,
};
pub use error::{Error, GROUPS_OF_A_DAEMON, max_user_groups};
pub use group::{Group, Queue};
pub use probe::{Capabilities, GroupsLeft, asks_before_reads, groups_left, probe};
pub use read::{Answer, Buffer, Incoming, Permission, ReadError};
