//! The kernel's records of what every process runs and maps: perf_event_open(2).
//!
//! Each processor has one ring buffer, into which two events write: the tracepoint
//! `sched:sched_process_exec`, and an event that counts nothing and makes the kernel record
//! every mapping of code, every fork and every exit. No process waits for the reader: the
//! kernel counts the records for which the ring has no room ([`Record::Lost`]).
//!
//! An execve leaves its records in this order: [`Record::Began`], a [`Record::Mapped`] for
//! the program and another one for its dynamic linker, [`Record::Executed`]. They can be in
//! the rings of two processors; their times give the order.
//!
//! A third event, with a ring of its own, copies the stack of each new program just after
//! the kernel has written it, and so its arguments, even if the process ends at once.
//! Nothing depends on it: where it is not available, or its ring is full, there is no
//! [`Record::Arguments`], and that is no loss.

mod buffer;
mod decode;
mod error;
mod event;
mod record;
mod ring;
mod rings;
mod tracepoint;

pub use decode::{Layout, Malformed, decode, decode_arguments};
pub use error::Error;
pub use record::{Executed, Mapped, Record};
pub use rings::{Rings, now};
