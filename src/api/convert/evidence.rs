//! Cases of evidence, as they are listed.

use super::value::time_to_proto;
use crate::api::proto;
use crate::evidence::{Case, Manifest, Usage};

pub(crate) fn evidence_case_to_proto(case: &Case) -> proto::EvidenceCase {
    let mut message = proto::EvidenceCase {
        id: case.id.to_string(),
        files: case.files,
        processes: case.processes,
        bytes: case.bytes,
        began_at: case.began_at().map(time_to_proto),
        taken_at: case.taken_at().map(time_to_proto),
        ..proto::EvidenceCase::default()
    };
    match &case.manifest {
        Err(why) => message.damaged.clone_from(why),
        Ok(manifest) => {
            let Manifest { container, finding, takes, .. } = &**manifest;
            message.namespace = container.namespace.to_string();
            message.container = container.id.to_string();
            message.finding = finding.map(|finding| finding.to_string());
            if let Some(first) = takes.first() {
                message.reason.clone_from(&first.reason);
                message.requested_by.clone_from(&first.requested_by);
            }
            message.takes = u32::try_from(takes.len()).unwrap_or(u32::MAX);
            message.cut = manifest.cut();
        }
    }
    message
}

pub(crate) fn evidence_status_to_proto(usage: Usage) -> proto::EvidenceStatus {
    let Usage { cases, bytes, max_bytes } = usage;
    proto::EvidenceStatus { cases, bytes, max_bytes }
}
