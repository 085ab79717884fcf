//! The timeline of one container: each entry holds a record of another kind.
//!
//! The records themselves are converted by `finding.rs`, `session.rs`, `response.rs` and
//! `gap.rs`.

use super::finding::{finding_from_proto, stored_finding_to_proto};
use super::gap::gap;
use super::response::{response_from_proto, response_to_proto};
use super::session::{command_from_proto, command_to_proto, session_from_proto, session_to_proto};
use super::value::{Malformed, optional_time_from_proto, time_from_proto, time_to_proto};
use crate::api::proto;
use crate::history::{FindingText, Happened, TimelineEntry};
use crate::model::ContainerId;

pub fn timeline_entry_to_proto(
    entry: TimelineEntry<FindingText>,
    as_json: bool,
) -> serde_json::Result<proto::TimelineEntry> {
    use proto::timeline_entry::What;
    let what = match entry.what {
        Happened::SessionOpened(session) => What::SessionOpened(session_to_proto(*session)),
        Happened::Command(command) => What::Command(command_to_proto(*command)),
        Happened::Finding(text) => What::Finding(stored_finding_to_proto(*text, as_json)?),
        Happened::SessionClosed(session) => What::SessionClosed(session_to_proto(*session)),
        Happened::Response(response) => What::Response(response_to_proto(*response)),
        Happened::Gap { name, container, detail, until } => {
            What::Gap(gap(name, container, detail, entry.at, until))
        }
    };
    Ok(proto::TimelineEntry { at: Some(time_to_proto(entry.at)), what: Some(what) })
}

/// `None` for a kind of entry that only a newer driftd knows.
pub fn timeline_entry_from_proto(
    entry: proto::TimelineEntry,
) -> Result<Option<TimelineEntry>, Malformed> {
    use proto::timeline_entry::What;
    let at = time_from_proto("entry.at", entry.at)?;
    let what = match entry.what {
        None => return Ok(None),
        Some(What::SessionOpened(session)) => {
            Happened::SessionOpened(Box::new(session_from_proto(session)?))
        }
        Some(What::Command(command)) => Happened::Command(Box::new(command_from_proto(command)?)),
        Some(What::Finding(finding)) => Happened::Finding(Box::new(finding_from_proto(finding)?)),
        Some(What::SessionClosed(session)) => {
            Happened::SessionClosed(Box::new(session_from_proto(session)?))
        }
        Some(What::Response(response)) => {
            Happened::Response(Box::new(response_from_proto(response)?))
        }
        Some(What::Gap(gap)) => Happened::Gap {
            name: gap.name,
            container: (!gap.container.is_empty())
                .then(|| ContainerId::new(&gap.namespace, &gap.container)),
            detail: gap.detail,
            until: optional_time_from_proto("gap.until", gap.until)?,
        },
    };
    Ok(Some(TimelineEntry { at, what }))
}
