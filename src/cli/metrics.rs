//! `driftd metrics`: the state of the daemon in the text format of Prometheus.
//!
//! Made for the textfile collector of node_exporter. Labels have few values: none is the name
//! of an image, a container or a path.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::client::{explain, talk};
use super::exit::Exit;
use super::output::write;
use super::status::seconds;
use crate::api::{convert, proto};
use crate::health::{Failure, STAGES};
use crate::model::Kind;

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

/// The values of one metric, in the order in which they are printed.
#[derive(Clone, Debug)]
enum Samples {
    Gauge(Vec<(Labels, f64)>),
    Counter(Vec<(Labels, u64)>),
}

impl EncodeMetric for Samples {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        match self {
            Samples::Gauge(values) => {
                for (labels, value) in values {
                    match labels.is_empty() {
                        true => encoder.encode_gauge(value)?,
                        false => encoder.encode_family(labels)?.encode_gauge(value)?,
                    }
                }
            }
            Samples::Counter(values) => {
                for (labels, value) in values {
                    match labels.is_empty() {
                        true => encoder.encode_counter::<NoLabelSet, _, u64>(value, None)?,
                        false => encoder
                            .encode_family(labels)?
                            .encode_counter::<NoLabelSet, _, u64>(value, None)?,
                    }
                }
            }
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        match self {
            Samples::Gauge(_) => MetricType::Gauge,
            Samples::Counter(_) => MetricType::Counter,
        }
    }
}

fn text(
    status: &proto::GetStatusResponse,
    containers: &[proto::Container],
) -> anyhow::Result<String> {
    let mut registry = Registry::with_prefix("driftd");
    for (name, help, samples) in metrics(status, containers)? {
        registry.register(name, help, samples);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(as_prometheus(&text))
}

type Metric = (&'static str, &'static str, Samples);

// Long: the list of all metrics, with the name and the help of each.
fn metrics(
    status: &proto::GetStatusResponse,
    containers: &[proto::Container],
) -> anyhow::Result<Vec<Metric>> {
    let started_at = convert::time_from_proto("started_at", status.started_at)?;
    let queue = status.baseline_queue.unwrap_or_default();
    let gate = status.gate.clone().unwrap_or_default();
    let policy = status.policy.clone().unwrap_or_default();
    let evidence = status.evidence.unwrap_or_default();
    let verified = status.baselines_verified;
    let by_label = |name, values: &[(&str, u32)]| {
        let labelled = |(value, count): &(&str, u32)| (label(name, value), f64::from(*count));
        Samples::Gauge(values.iter().map(labelled).collect())
    };
    // Exact: the history never keeps more findings than a float can count.
    #[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
    let float = |number: u64| number as f64;
    let large = |number: u64| gauge(float(number));

    Ok(vec![
        (
            "build_info",
            "The version of the running driftd",
            by_label("version", &[(&status.version, 1)]),
        ),
        (
            "start_time_seconds",
            "When driftd started, in Unix time",
            gauge(started_at.as_duration().as_secs_f64()),
        ),
        (
            "answers_stopped",
            "How many rules only report, because they would have answered in too many containers \
             (driftd status)",
            large(status.stopped_rules.len() as u64),
        ),
        (
            "view_complete",
            "Whether nothing is missing from the view (driftd status)",
            gauge(status.complete.into()),
        ),
        (
            "containerd_connected",
            "Whether the containerd at this socket is connected",
            Samples::Gauge(
                status
                    .endpoints
                    .iter()
                    .map(|endpoint| (label("socket", &endpoint.socket), endpoint.connected.into()))
                    .collect(),
            ),
        ),
        (
            "containers_watched",
            "Containers that the gate watches",
            gauge(status.containers_watched.into()),
        ),
        (
            "containers",
            "Containers, by whether they have a baseline",
            by_label("baseline", &by_baseline(containers)),
        ),
        (
            "baselines",
            "Images whose baseline is recorded, by how it is known",
            by_label(
                "known_by",
                &[("snapshot", status.baselines.saturating_sub(verified)), ("verified", verified)],
            ),
        ),
        (
            "baseline_queue_recording",
            "Baselines that are being recorded",
            gauge(queue.recording.into()),
        ),
        (
            "baseline_queue_waiting",
            "Baselines that wait to be recorded",
            gauge(queue.waiting.into()),
        ),
        (
            "baseline_queue_verifying",
            "Layers that wait to be compared with their blobs",
            gauge(queue.verifying.into()),
        ),
        (
            "baseline_queue_oldest_seconds",
            "How long the oldest baseline in the queue has been there",
            large(queue.oldest_seconds),
        ),
        ("evidence_cases", "Cases of evidence that are kept", large(evidence.cases)),
        ("evidence_bytes", "Bytes that all cases take", large(evidence.bytes)),
        ("evidence_max_bytes", "Bytes that all cases may take", large(evidence.max_bytes)),
        ("findings", "Findings in the history", large(status.findings)),
        (
            "findings_found",
            "New findings since the start, by kind and severity",
            by_kind(&status.findings_by_kind),
        ),
        (
            "gate_answers",
            "Executions that the gate has answered",
            Samples::Counter(vec![(Labels::new(), status.gate_answers)]),
        ),
        (
            "data_writes",
            "Writes of files that are not programs",
            Samples::Counter(vec![(Labels::new(), status.data_writes)]),
        ),
        (
            "gate_mode",
            "The mode of the gate: the setting watch.gate, or what is done instead",
            by_label("mode", &[(&gate.mode, 1)]),
        ),
        (
            "gate_ignored",
            "Unchanged programs about which the kernel asks no more",
            Samples::Counter(vec![(Labels::new(), gate.ignored)]),
        ),
        (
            "gate_copy_ups",
            "Files of images that were about to be changed, and are asked about again",
            Samples::Counter(vec![(Labels::new(), gate.copy_ups)]),
        ),
        (
            "gate_denied",
            "Programs that were not allowed to run, and reads of guarded files that were refused",
            Samples::Counter(vec![(Labels::new(), gate.denied)]),
        ),
        (
            "gate_undecided",
            "Programs that a rule may deny, and that were answered without a decision",
            Samples::Counter(vec![(Labels::new(), gate.undecided)]),
        ),
        (
            "gate_guarded",
            "Marks on files that may be code, before whose reading the kernel asks",
            Samples::Counter(vec![(Labels::new(), gate.guarded)]),
        ),
        (
            "gate_unguarded",
            "Files that may be code, before whose reading the kernel cannot ask",
            Samples::Counter(vec![(Labels::new(), gate.unguarded)]),
        ),
        (
            "gate_reads_undecided",
            "Reads of guarded files that were allowed without a decision",
            Samples::Counter(vec![(Labels::new(), gate.reads_undecided)]),
        ),
        (
            "left_to_sweeps",
            "Changes that scans had to find because too many came at once",
            Samples::Counter(vec![(Labels::new(), status.left_to_sweeps)]),
        ),
        (
            "arguments_unrecorded",
            "Executions whose arguments the kernel had no room to record",
            Samples::Counter(vec![(Labels::new(), status.arguments_unrecorded)]),
        ),
        (
            "backlog",
            "What waits to be examined, by where it waits",
            by_stage(&status.backlogs, false),
        ),
        (
            "backlog_oldest_seconds",
            "How long the oldest of it has waited: findings are delayed by this time",
            by_stage(&status.backlogs, true),
        ),
        (
            "thread_queue",
            "Items that wait for a thread",
            by_thread(status, |thread| thread.queued.map(float)),
        ),
        (
            "thread_queue_oldest_seconds",
            "How long the oldest item of a thread has waited",
            by_thread(status, |thread| thread.queued.map(|_| seconds(thread.oldest_milliseconds))),
        ),
        (
            "thread_still_seconds",
            "How long a thread has been busy with one item without any progress",
            by_thread(status, |thread| Some(seconds(thread.still_milliseconds))),
        ),
        (
            "policy_rules",
            "Rules in force, that of respond.kill_on included",
            gauge(policy.rules.into()),
        ),
        (
            "policy_refused",
            "Whether the policy files as they are now were refused: older rules are in force",
            gauge(u32::from(policy.refused.is_some()).into()),
        ),
        (
            "policy_info",
            "The version and the hash of the policy files in force",
            Samples::Gauge(vec![(policy_labels(&policy), 1.0)]),
        ),
        ("losses", "Times that driftd saw or kept less than it should", losses(&status.losses)),
    ])
}

fn policy_labels(policy: &proto::PolicyStatus) -> Labels {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    vec![("version", text(&policy.version)), ("digest", text(&policy.digest))]
}

/// Converts the text format of OpenMetrics to that of Prometheus, which the collector reads.
/// In OpenMetrics, a counter has `_total` in the samples only, and the text ends with a mark.
fn as_prometheus(text: &str) -> String {
    let mut counters: Vec<&str> = Vec::new();
    for line in text.lines() {
        let mut fields = line.split(' ');
        if let (Some("#"), Some("TYPE"), Some(name), Some("counter")) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        {
            counters.push(name);
        }
    }
    let mut prometheus = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let mut fields = line.splitn(4, ' ');
        match (fields.next(), fields.next(), fields.next(), fields.next()) {
            (Some("#"), Some(what @ ("HELP" | "TYPE")), Some(name), Some(rest))
                if counters.contains(&name) =>
            {
                prometheus.push_str(&format!("# {what} {name}_total {rest}\n"));
            }
            (..) => {
                prometheus.push_str(line);
                prometheus.push('\n');
            }
        }
    }
    prometheus
}

/// Includes the kinds that were not found, each with its usual severity and 0.
fn by_kind(found: &[proto::FindingCount]) -> Samples {
    let mut counts: BTreeMap<(&str, &str), u64> =
        Kind::ALL.iter().map(|kind| ((kind.name(), kind.severity().name()), 0)).collect();
    counts.extend(found.iter().map(|one| ((one.kind.as_str(), one.severity.as_str()), one.count)));
    let labelled = counts.into_iter().map(|((kind, severity), count)| {
        (vec![("kind", kind.to_owned()), ("severity", severity.to_owned())], count)
    });
    Samples::Counter(labelled.collect())
}

fn label(name: &'static str, value: &str) -> Labels {
    vec![(name, value.to_owned())]
}

fn gauge(value: f64) -> Samples {
    Samples::Gauge(vec![(Labels::new(), value)])
}

/// What waits at each stage, for all containers together. Includes stages where nothing waits.
fn by_stage(backlogs: &[proto::Backlog], oldest: bool) -> Samples {
    let mut stages: BTreeMap<&str, u64> = STAGES.into_iter().map(|stage| (stage, 0)).collect();
    for backlog in backlogs {
        let value = stages.entry(&backlog.stage).or_default();
        *value = match oldest {
            true => (*value).max(backlog.oldest_milliseconds),
            false => value.saturating_add(backlog.waiting),
        };
    }
    #[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
    let number = |value: u64| if oldest { value as f64 / 1000.0 } else { value as f64 };
    let labelled = stages.into_iter().map(|(stage, value)| (label("stage", stage), number(value)));
    Samples::Gauge(labelled.collect())
}

fn by_thread(
    status: &proto::GetStatusResponse,
    value: impl Fn(&proto::Thread) -> Option<f64>,
) -> Samples {
    let labelled = |thread: &proto::Thread| Some((label("thread", &thread.name), value(thread)?));
    Samples::Gauge(status.threads.iter().filter_map(labelled).collect())
}

/// Includes the losses that never happened: a counter that appears with its first increment
/// has no rate.
fn losses(losses: &[proto::Loss]) -> Samples {
    let mut counts: BTreeMap<&str, u64> =
        Failure::ALL.into_iter().map(|failure| (failure.name(), 0)).collect();
    counts.extend(losses.iter().map(|loss| (loss.name.as_str(), loss.count)));
    let labelled = counts.into_iter().map(|(name, count)| (label("name", name), count));
    Samples::Counter(labelled.collect())
}

fn by_baseline(containers: &[proto::Container]) -> [(&'static str, u32); 3] {
    let mut counts = [("ready", 0), ("pending", 0), ("none", 0)];
    for container in containers {
        let index = match container.baseline.as_str() {
            "ready" => 0,
            "pending" => 1,
            _ => 2,
        };
        counts[index].1 += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `promtool check metrics` checks.
    #[track_caller]
    fn assert_valid(text: &str) {
        let (mut helped, mut typed) = (BTreeMap::new(), BTreeMap::new());
        for line in text.lines() {
            let fields: Vec<&str> = line.splitn(4, ' ').collect();
            match fields[..] {
                ["#", "HELP", name, help] => {
                    assert!(!help.is_empty() && helped.insert(name, help).is_none(), "{line}");
                }
                ["#", "TYPE", name, kind] => {
                    assert!(["counter", "gauge"].contains(&kind), "{line}");
                    assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                    assert!(typed.insert(name, kind).is_none(), "{line}");
                }
                _ => {
                    assert!(!line.starts_with('#'), "{line}");
                    let name = line.split(['{', ' ']).next().unwrap();
                    assert!(helped.contains_key(name) && typed.contains_key(name), "{line}");
                }
            }
        }
        assert_eq!(helped.len(), typed.len());
    }

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
            gate: Some(proto::Gate { mode: "ask".into(), ..proto::Gate::default() }),
            left_to_sweeps: 12,
            arguments_unrecorded: 3,
            backlogs: vec![
                proto::Backlog {
                    container: "default/c1".into(),
                    stage: "large".into(),
                    waiting: 30,
                    oldest_milliseconds: 14_900,
                },
                proto::Backlog {
                    container: "default/c2".into(),
                    stage: "large".into(),
                    waiting: 1,
                    oldest_milliseconds: 3,
                },
            ],
            threads: vec![proto::Thread {
                name: "scan".into(),
                queued: Some(3),
                oldest_milliseconds: 1500,
                still_milliseconds: 250,
                stuck: false,
            }],
            losses: vec![proto::Loss { name: "pipeline_full".into(), count: 2 }],
            ..proto::GetStatusResponse::default()
        };
        let container = |baseline: &str| proto::Container {
            baseline: baseline.into(),
            ..proto::Container::default()
        };
        let containers =
            [container("ready"), container("none: not an overlay"), container("ready")];
        let text = text(&status, &containers).unwrap();
        insta::assert_snapshot!(text);
    }

    #[test]
    fn u16_each_metric_has_its_help_and_type_and_findings_are_counted_by_kind() {
        let status = proto::GetStatusResponse {
            started_at: Some(prost_types::Timestamp { seconds: 1000, nanos: 0 }),
            losses: vec![proto::Loss { name: "odd".into(), count: 2 }],
            findings_by_kind: vec![proto::FindingCount {
                kind: "exec.new".into(),
                severity: "critical".into(),
                count: 3,
            }],
            ..Default::default()
        };
        let text = text(&status, &[]).unwrap();
        assert_valid(&text);
        for line in [
            "driftd_findings_found_total{kind=\"exec.new\",severity=\"critical\"} 3",
            "driftd_findings_found_total{kind=\"file.added\",severity=\"low\"} 0",
            "# TYPE driftd_losses_total counter",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}: {text}");
        }
    }
}
