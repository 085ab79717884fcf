//! The status of the daemon: what it watches, and what is missing from the view.
//!
//! Reads counters, the store and the history, and asks the pipeline. If the pipeline does not
//! reply, the status is sent without its part: it must always come.

use std::sync::atomic::Ordering;

use tonic::Status;

use super::backend::{BUSY, Service};
use crate::api::failure::unblock;
use crate::api::{convert, proto};
use crate::baseline::KnownBy;
use crate::health::{Backlog, Failure};
use crate::pipeline::{self, ApiRequest, ContainerView};
use crate::policy::Policy;
use crate::threads::View;

/// What has to be read from a disk.
struct Kept {
    baselines: usize,
    verified: usize,
    /// How many findings the history holds, or why that is not known.
    findings: Result<u64, String>,
}

impl Service {
    pub(super) async fn status(&self) -> Result<proto::GetStatusResponse, Status> {
        let backend = self.backend()?;
        let health = &backend.health;
        let (status, containers, policy) = self.pipeline_status().await?;
        let without_baseline =
            containers.iter().filter(|view| view.baseline.starts_with("none")).count();
        let now = jiff::Timestamp::now();
        let policy = policy.map(|policy| convert::policy_status_to_proto(&policy, now));
        let kept = self.kept().await?;
        let backlogs = health.backlogs();

        let mut problems = status.problems;
        problems.extend(health.problems());
        problems.extend(backend.images.problems());
        problems.extend(backlogs.iter().filter(|backlog| backlog.is_late()).map(delay));
        let findings = kept.findings.unwrap_or_else(|err| {
            problems.push(err);
            0
        });
        let pending = convert::count(backend.recorder.pending());
        let missing = health.missing.get().into_iter().flatten();
        let counter = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let (runner, waiting, running) = backend.hooks.view();
        let (waiting, running) = (convert::count(waiting), convert::count(running));
        Ok(proto::GetStatusResponse {
            policy,
            hooks: Some(proto::HooksStatus { runner, waiting, running }),
            evidence: Some(convert::evidence_status_to_proto(backend.evidence.usage())),
            version: env!("CARGO_PKG_VERSION").into(),
            node: backend.node.clone(),
            started_at: Some(convert::time_to_proto(status.started_at)),
            complete: problems.is_empty(),
            problems,
            endpoints: status.endpoints.into_iter().map(convert::endpoint_to_proto).collect(),
            containers_watched: status.containers_watched,
            baselines: convert::count(kept.baselines),
            baselines_pending: status.containers_waiting.saturating_add(pending),
            findings,
            gate_answers: health.gate_answers(),
            data_writes: counter(&health.data_writes),
            losses: health.losses().into_iter().map(convert::loss_to_proto).collect(),
            backlogs: backlogs.into_iter().map(convert::backlog_to_proto).collect(),
            gaps: status.gaps.into_iter().map(convert::gap_to_proto).collect(),
            stopped_rules: status
                .stopped_rules
                .into_iter()
                .map(convert::stopped_rule_to_proto)
                .collect(),
            missing: missing.map(convert::missing_to_proto).collect(),
            baseline_queue: Some(convert::queue_to_proto(&backend.recorder.queue())),
            baselines_verified: convert::count(kept.verified),
            containers_without_baseline: convert::count(without_baseline),
            gate: convert::gate_to_proto(health),
            threads: health.threads.views().iter().map(convert::thread_to_proto).collect(),
            findings_by_kind: health
                .found()
                .into_iter()
                .map(convert::finding_count_to_proto)
                .collect(),
            left_to_sweeps: counter(&health.left_to_sweeps),
            arguments_unrecorded: counter(&health.arguments_unrecorded),
            arguments_unrecorded_of_host: counter(&health.arguments_unrecorded_of_host),
        })
    }

    /// What the pipeline knows, or what is known without it if it does not reply in time.
    async fn pipeline_status(
        &self,
    ) -> Result<(pipeline::Status, Vec<ContainerView>, Option<Policy>), Status> {
        let replies = async {
            let status = self.ask(ApiRequest::Status).await?;
            let containers = self.ask(ApiRequest::Containers).await?;
            Ok::<_, Status>((status, containers, Some(self.ask(ApiRequest::Policy).await?)))
        };
        match tokio::time::timeout(BUSY, replies).await {
            Ok(replies) => replies,
            Err(_) => Ok((no_reply(&self.backend()?.health.threads.views()), Vec::new(), None)),
        }
    }

    async fn kept(&self) -> Result<Kept, Status> {
        let (store, reader) = (self.store()?, self.history.clone());
        unblock(move || {
            let images = store.images();
            let is_verified = |chain_id| store.known_by(chain_id).0 == KnownBy::Verified;
            Kept {
                baselines: images.len(),
                verified: images.iter().filter(|image| is_verified(image.chain_id)).count(),
                findings: reader.count().map_err(|err| err.to_string()),
            }
        })
        .await
    }
}

fn delay(backlog: &Backlog) -> String {
    let Backlog { stage, container, waiting, oldest } = backlog;
    let (name, seconds) = (Failure::FindingsDelayed.name(), oldest.as_secs());
    format!(
        "findings of container {container} are delayed by {seconds}s ({name}): \
         {waiting} waiting in {stage}"
    )
}

/// The status of a daemon whose pipeline does not reply, with the threads that may be the
/// cause.
fn no_reply(threads: &[View]) -> pipeline::Status {
    let seconds = BUSY.as_secs();
    let mut problems = vec![format!("the pipeline has not answered for {seconds} s")];
    problems.extend(threads.iter().filter(|thread| thread.is_stuck).map(|thread| {
        let View { name, still, .. } = thread;
        format!("the thread `{name}` has made no progress for {} s", still.as_secs())
    }));
    pipeline::Status {
        started_at: jiff::Timestamp::now(),
        endpoints: Vec::new(),
        containers_watched: 0,
        containers_waiting: 0,
        problems,
        gaps: Vec::new(),
        stopped_rules: Vec::new(),
    }
}
