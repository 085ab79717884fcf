//! One layer of an image as one immutable file: sorted, checksummed, and used in place.
//! `docs/baseline-format.md` describes every byte.
//!
//! `entry` is what a layer holds, `write` makes the file, `read` uses it. Where the file
//! is and whether it is on the disk is the store's business; how layers are merged is
//! `merge`'s.

mod entry;
mod format;
mod read;
mod tree;
mod write;

pub use entry::{Device, FileEntry, LayerEntry, MAX_PATH, compare_paths};
pub(crate) use entry::{is_below, parent_of, parse_layer_id};
pub(crate) use read::AT_A_TIME;
pub use read::{Invalid, LayerBaseline, OpenError, Record};
pub use tree::WriteError;
pub use write::{Writer, write};

#[cfg(test)]
pub(super) mod tests;
