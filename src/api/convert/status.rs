//! The parts of the daemon's status.
//!
//! Converts in one direction only: the command line reads the messages themselves. Talks to no
//! other thread; the counters are read where they are.

use super::value::{count, milliseconds};
use crate::api::proto;
use crate::baseline;
use crate::health::{Backlog, Health, Loss, Missing};
use crate::pipeline::EndpointView;
use crate::threads::View;

pub(crate) fn endpoint_to_proto(endpoint: EndpointView) -> proto::Endpoint {
    let EndpointView { socket, connected, reason } = endpoint;
    proto::Endpoint { socket, connected, reason }
}

pub(crate) fn backlog_to_proto(backlog: Backlog) -> proto::Backlog {
    let Backlog { stage, container, waiting, oldest } = backlog;
    proto::Backlog {
        container,
        stage: stage.to_owned(),
        waiting: waiting as u64,
        oldest_milliseconds: milliseconds(oldest),
    }
}

pub(crate) fn thread_to_proto(view: &View) -> proto::Thread {
    proto::Thread {
        name: view.name.to_owned(),
        queued: view.depth,
        oldest_milliseconds: milliseconds(view.oldest),
        still_milliseconds: milliseconds(view.still),
        stuck: view.is_stuck,
    }
}

pub(crate) fn queue_to_proto(queue: &baseline::Queue) -> proto::BaselineQueue {
    proto::BaselineQueue {
        recording: count(queue.recording),
        waiting: count(queue.waiting),
        oldest_seconds: queue.oldest.map_or(0, |age| age.as_secs()),
        verifying: count(queue.verifying),
    }
}

pub(crate) fn loss_to_proto(loss: Loss) -> proto::Loss {
    proto::Loss { name: loss.name, count: loss.count }
}

pub(crate) fn missing_to_proto(missing: &Missing) -> proto::Missing {
    let Missing { name, since, meaning } = missing.clone();
    proto::Missing { name, since, meaning }
}

/// `None` until the gate's mode is decided.
pub(crate) fn gate_to_proto(health: &Health) -> Option<proto::Gate> {
    let (denied, undecided) = health.denied();
    let (guarded, unguarded) = health.guarded();
    health.gating.get().map(|gating| proto::Gate {
        mode: gating.mode.to_owned(),
        instead: gating.instead.clone().unwrap_or_default(),
        ignored: health.gate_ignored(),
        copy_ups: health.copy_ups(),
        denied,
        undecided,
        guarded,
        unguarded,
        reads_undecided: health.reads_undecided(),
    })
}

pub(crate) fn finding_count_to_proto(
    (kind, severity, count): (&'static str, &'static str, u64),
) -> proto::FindingCount {
    proto::FindingCount { kind: kind.to_owned(), severity: severity.to_owned(), count }
}
