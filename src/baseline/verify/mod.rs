//! Layers are compared with what proves them: their blobs, and the directories that
//! containers use.
//!
//! One thread does it, in the background: while layers are recorded, it starts no
//! comparison and reads no further in a blob. Comparisons that a job waits for go first.
//! The thread only reads; the recorder's thread keeps the results.

mod agenda;
mod blob;
mod task;
mod verifier;

pub(super) use agenda::Agenda;
pub(super) use blob::{NO_BLOB, Unpacked, limits, unpack, without_implied};
pub(super) use task::{ComparedWith, Outcome, Task, TaskResult, Unproved};
pub(super) use verifier::Verifier;

#[cfg(test)]
mod tests;
