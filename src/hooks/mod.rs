//! Hooks: programs of the administrator that run for a finding.
//!
//! ```text
//!  daemon                                  │ driftd hooks (root, or a user of its own)
//!  respond ─> queue ── one order at a time ┼─> execute ─> program
//!                 └<───── how it ended ────┼──────┘
//! ```
//!
//! The daemon starts none of them: its unit has no network and may write almost nothing, and a
//! child would inherit that. It holds the requests until a runner takes them (`queue`). The
//! runner starts the programs (`execute`) after a check of each (`program`). This room decides
//! on no response.

mod call;
mod execute;
mod program;
mod queue;

pub use self::call::{End, Ended, HookCall, MAX_OUTPUT, Order, Request};
pub use self::execute::execute;
pub use self::program::{check, faults};
pub use self::queue::{Busy, Connection, Queue};
