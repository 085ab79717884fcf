//! Gaps: times during which the view of a container, or of all, was incomplete.
//!
//! Used by the status, by followers and by the timeline, which have gaps from different
//! sources.

use super::value::{names, time_to_proto};
use crate::api::proto;
use crate::model::ContainerId;
use crate::pipeline::Gap;
use jiff::Timestamp;

pub(crate) fn gap(
    name: String,
    container: Option<ContainerId>,
    detail: String,
    at: Timestamp,
    until: Option<Timestamp>,
) -> proto::Gap {
    let (namespace, container) = names(container);
    proto::Gap {
        name,
        at: Some(time_to_proto(at)),
        namespace,
        container,
        detail,
        until: until.map(time_to_proto),
    }
}

pub fn gap_to_proto(open: Gap) -> proto::Gap {
    let Gap { container, failure, since, until, detail } = open;
    gap(failure.name().into(), container, detail, since, until)
}
