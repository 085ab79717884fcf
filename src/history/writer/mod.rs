//! Writes the history: one thread, the only one that writes.
//!
//! A record that comes after a pause is committed at once. Under load, commits are
//! `COMMIT_SPACING` apart, or as far as the disk's speed allows if there is a new finding,
//! session or response, and hold up to `BATCH` records. If a finding,
//! session or probe is revised several times within one batch, only its last revision is
//! stored, and the database keeps only the newest revision of each. So a program that runs a
//! thousand times a second cannot fill the disk.
//!
//! When a commit fails because the disk is full or gone, the history goes on in memory
//! ([`super::memory`]): readers and followers receive what is new, and all of it is written
//! once the disk has space again. If the memory is full, records are dropped as in a file that
//! is full. If even the memory cannot be used, the batch is kept and tried again. New records
//! join it up to a limit; beyond that the oldest are dropped, gaps first, and a gap of its own
//! counts them. Responses are never dropped: nothing else records what driftd did.
//!
//! The file is bounded in bytes. When it is full, rows of the container that takes the most
//! space are dropped: the least severe first, and among these the oldest. Responses stay.
//!
//! When the file is removed or replaced while driftd runs, a new one is begun, and the pipeline
//! is asked for everything that it still knows.

mod database;
mod disk;
mod findings;
mod handle;
mod keep;
mod pending;
mod replaced;
mod retention;
mod row;
mod schedule;
mod sessions;
mod shrink;
mod store;
mod writing;

pub use handle::Writer;
pub use keep::Keep;
