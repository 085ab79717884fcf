//! The one loop that owns driftd's mutable state.
//!
//! ```text
//!  containerd ── RuntimeEvent ──┐                      ┌─ Record ───────────> history ──> api
//!  baseline ──── BaselineEvent ─┤                      ├─ ResponseRequest ──> respond
//!  watch ─────── SensorEvent ───┼─> Input ─> [State] ──┼─ RecordRequest ────> baseline
//!  api ───────── ApiRequest ────┤                      └─ SensorCommand ────> watch
//!  respond ───── Response ──────┘
//! ```
//!
//! [`State::handle`] is pure apart from the clock it is given: an input in, effects out.
//! [`run`] carries the effects out and does nothing else. When the history falls behind,
//! the loop waits for it and drops no finding. The sensors never wait: when their channel
//! is full, they ask themselves for a rescan.
//!
//! The rules are spread over files by subject; each of them adds methods to [`State`].

mod aggregation;
mod baselines;
mod breaker;
mod case_requests;
mod cases;
mod commands;
mod decide;
mod diffs;
mod endpoints;
mod evidence;
mod findings;
mod gaps;
mod judge;
mod layers;
mod losses;
mod messages;
mod node;
mod process_kills;
mod questions;
mod requests;
mod responses;
mod run;
mod sensors;
mod serve;
mod sessions;
mod state;
mod status;
mod unannounced;

#[cfg(test)]
mod tests;

pub use self::breaker::StoppedRule;
pub use self::gaps::Gap;
pub use self::messages::{Effect, Input};
pub use self::requests::{
    ApiRequest, ContainerView, Diff, Difference, DifferenceKind, EndpointView, LookupError, Status,
};
pub use self::run::{DRAIN_WITHIN, Inputs, Outputs, run};
pub use self::state::State;
