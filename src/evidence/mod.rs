//! The store of evidence: what is kept of a container before an answer destroys it.
//!
//! ```text
//!  respond ─ Task ─> keeper ─> take ─┬─ processes, programs ─┐
//!                                    ├─ story (the history) ─┼─> draft ─ rename ─> store ─> api
//!                                    └─ files, layer ────────┘
//! ```
//!
//! Nothing runs in the container and nothing is changed there. Its files are reached by
//! descriptors and through the door (`sys::door`) alone; no symlink of it is followed. A container
//! chooses how much there is, so everything has a limit, and what is left out is named in the
//! case. `verify` shows whether a case is as it was taken, also without a daemon.

mod copy;
mod draft;
mod entry;
mod export;
mod files;
mod keeper;
mod layer;
mod manifest;
mod processes;
mod quota;
mod reading;
mod redact;
mod store;
mod story;
mod sums;
mod take;
mod verify;

#[cfg(test)]
mod tests;

pub use self::export::{Piece, export};
pub use self::keeper::Keeper;
pub use self::manifest::{Kept, MANIFEST, Manifest, SCHEMA, SUMS, Take, summary};
pub use self::store::{Case, FindError, Store, Usage};
pub use self::verify::{Verified, verify};
