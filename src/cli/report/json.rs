//! A report as JSON: `driftd.report/v1`.
//!
//! Pure. `model.rs` owns the keys.

use super::model::Report;
use crate::cli::output::harmless;

pub(super) fn json(report: &Report) -> anyhow::Result<String> {
    Ok(harmless(&serde_json::to_string_pretty(report)?) + "\n")
}
