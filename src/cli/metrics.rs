//! `driftd metrics`: the state of the daemon in the OpenMetrics text format, for
//! node_exporter's textfile collector. Labels have few values: no image, no
//! container and no path is one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::client::{explain, talk};
use super::exit::Exit;
use super::output::write;
use crate::api::{convert, proto};
use crate::health::Failure;

#[derive(Debug, clap::Args)]
pub(super) struct Metrics {}

impl Metrics {
    pub(super) fn run(&self, socket: &Path) -> anyhow::Result<Exit> {
        let (status, containers) = talk(socket, |mut client| async move {
            let request = proto::GetStatusRequest {};
            let status = client.get_status(request).await.map_err(explain)?.into_inner();
            let request = proto::ListContainersRequest {};
            let containers = client.list_containers(request).await.map_err(explain)?.into_inner();
            Ok((status, containers.containers))
        })?;
        write(text(&status, &containers)?.as_bytes())?;
        Ok(Exit::Clean)
    }
}

type Labels = Vec<(&'static str, String)>;
type Count = Gauge<u64, AtomicU64>;

fn text(
    status: &proto::GetStatusResponse,
    containers: &[proto::Container],
) -> anyhow::Result<String> {
    let mut registry = Registry::with_prefix("driftd");
    let started_at = convert::time_from_proto("started_at", status.started_at)?;
    let queue = status.baseline_queue.unwrap_or_default();

    let build = [(vec![("version", status.version.clone())], 1)];
    family(&mut registry, "build_info", "The version of the running driftd", build);
    let seconds = Gauge::<f64, AtomicU64>::default();
    seconds.set(started_at.as_duration().as_secs_f64());
    registry.register("start_time_seconds", "When driftd started, in Unix time", seconds);
    gauge(
        &mut registry,
        "view_complete",
        "Whether nothing is missing from the view (driftd status)",
        status.complete.into(),
    );
    family(
        &mut registry,
        "containerd_connected",
        "Whether the containerd at this socket is connected",
        status.endpoints.iter().map(|endpoint| {
            (vec![("socket", endpoint.socket.clone())], endpoint.connected.into())
        }),
    );

    let verified = status.baselines_verified.into();
    let rest = u64::from(status.baselines).saturating_sub(verified);
    family(
        &mut registry,
        "baselines",
        "Images whose baseline is recorded, by how it is known",
        [("snapshot", rest), ("verified", verified)]
            .map(|(known_by, count)| (vec![("known_by", known_by.to_owned())], count)),
    );
    for (name, help, value) in [
        (
            "baseline_queue_recording",
            "Baselines that are being recorded",
            queue.recording.into(),
        ),
        ("baseline_queue_waiting", "Baselines that wait to be recorded", queue.waiting.into()),
        (
            "baseline_queue_verifying",
            "Layers that wait to be compared with their blobs",
            queue.verifying.into(),
        ),
        (
            "baseline_queue_oldest_seconds",
            "How long the oldest baseline in the queue has been there",
            queue.oldest_seconds,
        ),
        ("containers_watched", "Containers that the gate watches", status.containers_watched.into()),
        ("findings", "Findings in the history", status.findings),
    ] {
        gauge(&mut registry, name, help, value);
    }
    family(
        &mut registry,
        "containers",
        "Containers, by whether they have a baseline",
        by_baseline(containers)
            .into_iter()
            .map(|(baseline, count)| (vec![("baseline", baseline.to_owned())], count)),
    );

    for (name, help, value) in [
        ("gate_answers", "Executions that the gate has answered", status.gate_answers),
        ("data_writes", "Writes of files that are no programs", status.data_writes),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
    // Those that never happened are told as well: a counter that appears with its
    // first increment has no rate.
    let mut losses: BTreeMap<String, u64> =
        Failure::ALL.into_iter().map(|failure| (failure.name().to_owned(), 0)).collect();
    losses.extend(status.losses.iter().map(|loss| (loss.name.clone(), loss.count)));
    let counters = Family::<Labels, Counter>::default();
    for (name, count) in losses {
        counters.get_or_create(&vec![("name", name)]).inc_by(count);
    }
    registry.register("losses", "Times that driftd saw or kept less than it should", counters);

    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn gauge(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Count::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

fn family(
    registry: &mut Registry,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = (Labels, u64)>,
) {
    let family = Family::<Labels, Count>::default();
    for (labels, value) in values {
        family.get_or_create(&labels).set(value);
    }
    registry.register(name, help, family);
}

fn by_baseline(containers: &[proto::Container]) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::from([("ready", 0), ("pending", 0), ("none", 0)]);
    for container in containers {
        let baseline = match container.baseline.as_str() {
            "ready" => "ready",
            "pending" => "pending",
            _ => "none",
        };
        *counts.entry(baseline).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_as_a_collector_reads_them() {
        let status = proto::GetStatusResponse {
            version: "0.1.0".into(),
            node: "node-1".into(),
            started_at: Some(prost_types::Timestamp { seconds: 1000, nanos: 500_000_000 }),
            complete: false,
            endpoints: vec![proto::Endpoint {
                socket: "/run/odd\"\\\nname.sock".into(),
                connected: true,
                reason: String::new(),
            }],
            containers_watched: 3,
            baselines: 5,
            baselines_verified: 2,
            baseline_queue: Some(proto::BaselineQueue {
                recording: 1,
                waiting: 2,
                oldest_seconds: 61,
                verifying: 4,
            }),
            findings: 7,
            gate_answers: 1234,
            data_writes: 9,
            losses: vec![proto::Loss { name: "pipeline_full".into(), count: 2 }],
            ..proto::GetStatusResponse::default()
        };
        let container = |baseline: &str| proto::Container {
            baseline: baseline.into(),
            ..proto::Container::default()
        };
        let containers =
            [container("ready"), container("none: not an overlay"), container("ready")];
        insta::assert_snapshot!(text(&status, &containers).unwrap());
    }
}
