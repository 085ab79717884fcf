//! How records stand in the database's `json` columns.

use std::path::Path;

use jiff::Timestamp;
use rusqlite::Row;
use serde::{Deserialize, Serialize};

use super::{Error, Record};
use crate::model::{ContainerId, Finding, FindingId, Outcome};
use crate::respond::Response;

const RESPONSE_SCHEMA: &str = "driftd.response/v1";
const GAP_SCHEMA: &str = "driftd.gap/v1";

#[derive(Serialize, Deserialize)]
struct ResponseJson {
    schema: String,
    container: ContainerId,
    reason: String,
    requested_by: String,
    requested_at: Timestamp,
    finding: Option<FindingId>,
    outcome: Outcome,
}

#[derive(Serialize, Deserialize)]
struct GapJson {
    schema: String,
    name: String,
    container: Option<ContainerId>,
    detail: String,
    at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    until: Option<Timestamp>,
}

/// The text kept for a record.
pub(super) fn text(record: &Record) -> serde_json::Result<String> {
    match record {
        Record::Finding(finding) | Record::Aggregate { finding, .. } => {
            serde_json::to_string(finding)
        }
        Record::Session { session, .. } => serde_json::to_string(session),
        Record::Probe(probe) => serde_json::to_string(probe),
        Record::Response(response) => serde_json::to_string(&ResponseJson {
            schema: RESPONSE_SCHEMA.into(),
            container: response.container.clone(),
            reason: response.reason.clone(),
            requested_by: response.requested_by.clone(),
            requested_at: response.requested_at,
            finding: response.finding,
            outcome: response.outcome.clone(),
        }),
        Record::Gap { name, container, detail, at, until } => serde_json::to_string(&GapJson {
            schema: GAP_SCHEMA.into(),
            name: name.clone(),
            container: container.clone(),
            detail: detail.clone(),
            at: *at,
            until: *until,
        }),
    }
}

/// Reads a finding from the columns `id` and `json` of `row`.
pub(super) fn finding(
    row: &Row<'_>,
    id: usize,
    json: usize,
    path: &Path,
) -> Result<Finding, Error> {
    let failed = Error::sql("read", path);
    let text = row.get_ref(json).and_then(|value| Ok(value.as_str()?)).map_err(&failed)?;
    serde_json::from_str(text).map_err(|err| Error::Corrupt {
        path: path.into(),
        detail: format!("finding {}: {err}", row.get::<_, String>(id).unwrap_or_default()),
    })
}

/// Reads a record of the given type from the column `json` of `row`.
pub(super) fn record(row: &Row<'_>, kind: &str, json: usize, path: &Path) -> Result<Record, Error> {
    let failed = Error::sql("read", path);
    let text = row.get_ref(json).and_then(|value| Ok(value.as_str()?)).map_err(&failed)?;
    let parsed = match kind {
        "finding" => serde_json::from_str(text).map(Record::Finding),
        "response" => serde_json::from_str::<ResponseJson>(text).map(|json| {
            Record::Response(Box::new(Response {
                container: json.container,
                reason: json.reason,
                requested_by: json.requested_by,
                requested_at: json.requested_at,
                finding: json.finding,
                outcome: json.outcome,
            }))
        }),
        _ => serde_json::from_str::<GapJson>(text).map(|json| Record::Gap {
            name: json.name,
            container: json.container,
            detail: json.detail,
            at: json.at,
            until: json.until,
        }),
    };
    parsed.map_err(|err| Error::Corrupt { path: path.into(), detail: format!("a {kind}: {err}") })
}
