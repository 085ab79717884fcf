//! Containers: the image, the pod, the labels and the run of one.
//!
//! The image, the labels and the pod are parts of findings, sessions and probes as well, so
//! their files use these functions.

use std::collections::{BTreeMap, HashMap};

use super::severity::severity_to_proto;
use super::value::{Malformed, filled, optional_time_from_proto, parsed, time_to_proto};
use crate::api::proto;
use crate::model::{ImageReference, Incarnation, Labels, Pod};
use crate::pipeline::ContainerView;

/// `known_by`: how the baseline of the container is known, if it has one.
pub fn container_to_proto(view: ContainerView, known_by: Option<&str>) -> proto::Container {
    let ContainerView {
        container,
        baseline,
        watched,
        armed_before_start,
        problem,
        findings,
        findings_by_severity,
        incomplete,
    } = view;
    proto::Container {
        namespace: container.id.namespace.to_string(),
        id: container.id.id.to_string(),
        runtime: container.runtime,
        image: Some(image_to_proto(&container.image)),
        pod: container.pod.map(pod_to_proto),
        labels: labels_to_proto(container.labels),
        pid: container.task.as_ref().map_or(0, |task| task.pid),
        paused: container.task.as_ref().is_some_and(|task| task.paused),
        baseline,
        watched,
        armed_before_start,
        problem: problem.unwrap_or_default(),
        findings,
        snapshotter: container.snapshotter,
        known_by: known_by.unwrap_or_default().into(),
        findings_by_severity: findings_by_severity
            .into_iter()
            .map(|(severity, count)| proto::SeverityCount {
                severity: severity_to_proto(severity).into(),
                count,
            })
            .collect(),
        incomplete: incomplete.into_iter().map(str::to_owned).collect(),
    }
}

pub(super) fn image_to_proto(image: &ImageReference) -> proto::Image {
    proto::Image {
        name: image.name.clone().unwrap_or_default(),
        manifest_digest: image.manifest_digest.map(|id| id.to_string()).unwrap_or_default(),
        chain_id: image.chain_id.map(|id| id.to_string()).unwrap_or_default(),
    }
}

pub fn image_from_proto(image: proto::Image) -> Result<ImageReference, Malformed> {
    Ok(ImageReference {
        name: filled(image.name),
        manifest_digest: parsed("image.manifest_digest", filled(image.manifest_digest))?,
        chain_id: parsed("image.chain_id", filled(image.chain_id))?,
    })
}

pub(super) fn pod_to_proto(pod: Pod) -> proto::Pod {
    proto::Pod {
        namespace: pod.namespace,
        name: pod.name,
        uid: pod.uid,
        container: pod.container.unwrap_or_default(),
    }
}

pub fn pod_from_proto(pod: proto::Pod) -> Pod {
    Pod { namespace: pod.namespace, name: pod.name, uid: pod.uid, container: filled(pod.container) }
}

pub(super) fn labels_to_proto(labels: Labels) -> HashMap<String, String> {
    BTreeMap::from(labels).into_iter().collect()
}

pub(super) fn labels_from_proto(labels: HashMap<String, String>) -> Labels {
    labels.into_iter().collect::<BTreeMap<_, _>>().into()
}

pub(super) fn incarnation_to_proto(incarnation: Incarnation) -> proto::Incarnation {
    let Incarnation { pid, start_time, created_at } = incarnation;
    proto::Incarnation { pid, start_time, created_at: created_at.map(time_to_proto) }
}

pub(super) fn incarnation_from_proto(
    incarnation: proto::Incarnation,
) -> Result<Incarnation, Malformed> {
    let proto::Incarnation { pid, start_time, created_at } = incarnation;
    let created_at = optional_time_from_proto("incarnation.created_at", created_at)?;
    Ok(Incarnation { pid, start_time, created_at })
}
