//! The containers that driftd knows, and what it knows about each of them.
//!
//! Plain values without clock, disk or lock: the pipeline alone owns and changes them.
//! `containers` holds all entries, `entry` one container, and the other files its parts:
//! the findings about it, the files that aggregated findings count, and the processes that
//! are known to write programs.

mod containers;
mod entry;
mod findings;
mod members;
mod writers;

pub use self::containers::Inventory;
pub use self::entry::{Answering, BaselineState, Entry, Killed, WatchState};
pub use self::members::{Aspect, Reported};
pub use self::writers::Unpacking;
