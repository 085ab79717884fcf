//! The text of records in the database's `json` columns, and how it is read back.
//!
//! Labels are stored in a table of their own, so that the many rows of a container share them.

use std::path::Path;

use jiff::Timestamp;
use rusqlite::Row;
use serde::{Deserialize, Serialize};

use super::error::Error;
use super::record::Record;
use super::schema::whole_json;
use crate::model::finding::hex;
use crate::model::{
    Command, ContainerId, Finding, FindingId, Incarnation, Labels, Outcome, Probe, ProcessIdentity,
    Session, printable,
};
use crate::respond::{KeptCase, Response};

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
    #[serde(default)]
    incarnation: Option<Incarnation>,
    #[serde(default)]
    process: Option<ProcessIdentity>,
    /// What the limits of rules count, in a rule's response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    /// The case into which evidence was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    case: Option<KeptCase>,
    outcome: Outcome,
}

#[derive(Serialize, Deserialize)]
pub(super) struct GapJson {
    schema: String,
    pub(super) name: String,
    pub(super) container: Option<ContainerId>,
    pub(super) detail: String,
    at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) until: Option<Timestamp>,
}

/// The text that is stored for a record. Its labels are stored apart: see [`labels`].
pub(super) fn text(record: &Record) -> serde_json::Result<String> {
    match record {
        Record::Finding(finding) | Record::Aggregate { finding, .. } => {
            let mut finding = finding.clone();
            if let Some(container) = &mut finding.container {
                container.labels = Labels::default();
            }
            serde_json::to_string(&finding)
        }
        Record::Session { session, .. } => {
            let mut session = session.clone();
            session.container.labels = Labels::default();
            serde_json::to_string(&session)
        }
        Record::Probe(probe) => {
            let mut probe = probe.clone();
            probe.container.labels = Labels::default();
            serde_json::to_string(&probe)
        }
        Record::Response(response) => serde_json::to_string(&ResponseJson {
            schema: RESPONSE_SCHEMA.into(),
            container: response.container.clone(),
            reason: response.reason.clone(),
            requested_by: response.requested_by.clone(),
            requested_at: response.requested_at,
            finding: response.finding,
            incarnation: response.incarnation,
            process: response.process,
            pod: response.pod.clone(),
            image: response.image.clone(),
            case: response.case,
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

/// The same for the log, where nothing may fail and the text may be hostile.
pub(super) fn shown(record: &Record) -> String {
    text(record).map_or_else(|err| err.to_string(), |text| printable(text.as_bytes()))
}

/// The labels of a container as text, with an ID that depends on the labels alone.
pub(super) fn labels(labels: &Labels) -> serde_json::Result<(String, String)> {
    let text = serde_json::to_string(labels)?;
    let hash = blake3::hash(text.as_bytes());
    Ok((hex(&hash.as_bytes()[..16]), text))
}

/// A type that is stored as JSON.
pub(super) trait Kept: Sized {
    /// Its table. Messages call one of its rows by the same name.
    const TABLE: &'static str;

    fn read(text: &str) -> serde_json::Result<Self>;

    /// The SQL expression of its whole JSON.
    fn column() -> String {
        whole_json(Self::TABLE)
    }

    /// The labels that it shares with other rows of its container.
    fn labels(&mut self) -> Option<&mut Labels> {
        None
    }
}

/// A finding as the text that is stored, for a reader that sends it on as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FindingText(pub String);

impl FindingText {
    pub fn parse(&self) -> serde_json::Result<Finding> {
        serde_json::from_str(&self.0)
    }
}

impl Kept for FindingText {
    const TABLE: &'static str = Finding::TABLE;

    fn read(text: &str) -> serde_json::Result<FindingText> {
        Ok(FindingText(text.to_owned()))
    }
}

impl Kept for Finding {
    const TABLE: &'static str = "finding";

    fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    fn labels(&mut self) -> Option<&mut Labels> {
        self.container.as_mut().map(|container| &mut container.labels)
    }
}

impl Kept for Session {
    const TABLE: &'static str = "session";

    fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    fn labels(&mut self) -> Option<&mut Labels> {
        Some(&mut self.container.labels)
    }
}

impl Kept for Command {
    const TABLE: &'static str = "command";

    fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    fn column() -> String {
        "json".to_owned()
    }
}

impl Kept for Response {
    const TABLE: &'static str = "response";

    fn read(text: &str) -> serde_json::Result<Self> {
        let ResponseJson {
            schema: _,
            container,
            reason,
            requested_by,
            requested_at,
            finding,
            incarnation,
            process,
            pod,
            image,
            case,
            outcome,
        } = serde_json::from_str(text)?;
        Ok(Response {
            ticket: 0,
            incarnation,
            process,
            pod,
            image,
            case,
            changed: true,
            container,
            reason,
            requested_by,
            requested_at,
            finding,
            outcome,
        })
    }
}

impl Kept for Probe {
    const TABLE: &'static str = "probe";

    fn read(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }

    fn labels(&mut self) -> Option<&mut Labels> {
        Some(&mut self.container.labels)
    }
}

/// Reads a value from the columns `id` and `json` of `row`.
pub(super) fn kept<T: Kept>(
    row: &Row<'_>,
    id: usize,
    json: usize,
    path: &Path,
) -> Result<T, Error> {
    let failed = Error::sql("read", path);
    let text = row.get_ref(json).and_then(|value| Ok(value.as_str()?)).map_err(&failed)?;
    T::read(text).map_err(|err| Error::Corrupt {
        path: path.into(),
        detail: format!("{} {}: {err}", T::TABLE, row.get::<_, String>(id).unwrap_or_default()),
    })
}

/// Reads a record of the given type.
pub(super) fn record(kind: &str, text: &str) -> serde_json::Result<Record> {
    Ok(match kind {
        "finding" => Record::Finding(serde_json::from_str(text)?),
        "session" => Record::Session { session: serde_json::from_str(text)?, commands: Vec::new() },
        "response" => Record::Response(Box::new(Response::read(text)?)),
        _ => {
            let GapJson { schema: _, name, container, detail, at, until } = gap(text)?;
            Record::Gap { name, container, detail, at, until }
        }
    })
}

pub(super) fn gap(text: &str) -> serde_json::Result<GapJson> {
    serde_json::from_str(text)
}
