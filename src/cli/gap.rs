//! Gaps as JSON: times in which the view of a container, or of all, was incomplete.
//!
//! `status`, `timeline` and the followed streams print the same keys.

use jiff::Timestamp;
use serde::Serialize;

use crate::api::{convert, proto};
use crate::model::ContainerId;

#[derive(Debug, Serialize)]
pub(super) struct GapJson {
    pub(super) schema: &'static str,
    pub(super) name: String,
    pub(super) at: Timestamp,
    /// Null if any container may be concerned.
    pub(super) container: Option<ContainerId>,
    pub(super) detail: String,
    pub(super) until: Option<Timestamp>,
}

pub(super) const SCHEMA: &str = "driftd.gap/v1";

pub(super) fn gap_json(gap: &proto::Gap) -> anyhow::Result<GapJson> {
    Ok(GapJson {
        schema: SCHEMA,
        name: gap.name.clone(),
        at: convert::time_from_proto("gap.at", gap.at)?,
        container: (!gap.container.is_empty())
            .then(|| ContainerId::new(&gap.namespace, &gap.container)),
        detail: gap.detail.clone(),
        until: convert::optional_time_from_proto("gap.until", gap.until)?,
    })
}
