//! A node without containers: the API and the history as the daemon has them, and a script
//! in place of the pipeline and of containerd.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock};
use std::thread::JoinHandle;
use std::time::Duration;

use driftd::api::{Backend, Listener, PolicyReload};
use driftd::baseline::{
    KnownBy, LayerDifference, LayerReport, Progress, Proof, Recorded, Store, Witness,
};
use driftd::config::Config;
use driftd::health::Health;
use driftd::history::{FindingLookup, History, Record, SessionLookup, Writer};
use driftd::model::{
    Container, ContainerId, EntryPoint, Finding, ImageReference, Kind, Outcome, Restarter,
    RootfsPath, Session, Severity, Task,
};
use driftd::pipeline::{
    ApiRequest, ContainerView, Diff, Difference, DifferenceKind, EndpointView, LookupError, Status,
    StoppedRule,
};
use driftd::policy::{self, Policy, PolicyFile};
use driftd::respond::{Action, Response};
use driftd::{api, baseline, evidence, model};
use jiff::Timestamp;
use tokio::sync::oneshot;

use crate::program::{Output, driftd, wait_until};
use crate::samples::{probe, regular, shops};

pub(crate) const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// When the daemon of the script was started.
static STARTED_AT: LazyLock<Timestamp> = LazyLock::new(Timestamp::now);

struct NoBlobs;

impl baseline::Blobs for NoBlobs {
    fn open(&self, _: &driftd::model::Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
        Err("there is no content store here".into())
    }
}

pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) writer: Option<Writer>,
    shutdown: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl Node {
    pub(crate) fn start() -> Node {
        Node::start_in(tempfile::tempdir().unwrap())
    }

    pub(crate) fn start_in(dir: tempfile::TempDir) -> Node {
        Node::start_filled(dir, |_| ())
    }

    /// A node with the two images of one shop.
    pub(crate) fn with_shops() -> Node {
        Node::start_filled(tempfile::tempdir().unwrap(), shops)
    }

    /// A node whose pipeline takes requests and replies to none.
    pub(crate) fn stalled() -> Node {
        let keep = |requests: crossbeam_channel::Receiver<ApiRequest>, _| {
            // With the last sender, the test ends.
            let _kept: Vec<ApiRequest> = requests.into_iter().collect();
        };
        Node::start_with(tempfile::tempdir().unwrap(), |_| (), keep)
    }

    pub(crate) fn start_filled(dir: tempfile::TempDir, fill: impl FnOnce(&Store)) -> Node {
        let reply = |requests: crossbeam_channel::Receiver<ApiRequest>, records| {
            for request in requests {
                reply_to(request, &records);
            }
        };
        Node::start_with(dir, fill, reply)
    }

    fn start_with(
        dir: tempfile::TempDir,
        fill: impl FnOnce(&Store),
        pipeline: impl FnOnce(
            crossbeam_channel::Receiver<ApiRequest>,
            crossbeam_channel::Sender<Record>,
        ) + Send
        + 'static,
    ) -> Node {
        let health = Arc::new(Health::default());
        let history = History::open(&dir.path().join("state")).unwrap();
        let writer = history.start(RETENTION, health.clone());
        let (questions, requests) = crossbeam_channel::bounded(16);
        let records = writer.records();
        std::thread::spawn(move || pipeline(requests, records));
        let baselines = dir.path().join("state/baselines");
        let baselines = Arc::new(baseline::Store::open(&baselines, health.clone()).unwrap());
        fill(&baselines);
        let evidence = evidence::Store::open(
            dir.path().join("state/evidence"),
            &driftd::config::Evidence::default(),
            "node-1",
            &health,
        );
        let evidence = Arc::new(evidence);
        let (news, _) = crossbeam_channel::bounded(16);
        let (policy_reloads, mut reloads) = tokio::sync::mpsc::channel::<PolicyReload>(1);
        let backend = Backend {
            node: "node-1".into(),
            requests: questions,
            history: writer.reader(),
            committed: writer.committed(),
            health: health.clone(),
            recorder: baseline::Recorder::start(
                baselines.clone(),
                &driftd::config::Baseline { threads: 1, ..Default::default() },
                Arc::new(NoBlobs),
                news,
                health,
            ),
            images: Arc::new(Script(baselines.clone())),
            baselines,
            policy_reloads,
            evidence,
            hooks: driftd::hooks::Queue::default(),
        };
        let listener = Listener::bind(&dir.path().join("run/driftd.sock")).unwrap();
        let (shutdown, until) = oneshot::channel::<()>();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.spawn(async move {
                while let Some(client) = reloads.recv().await {
                    let _ = client.send(Ok(()));
                }
            });
            runtime
                .block_on(api::serve(listener, backend, async {
                    let _ = until.await;
                }))
                .unwrap();
        });
        Node { dir, writer: Some(writer), shutdown: Some(shutdown), server: Some(server) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("run/driftd.sock")
    }

    /// Stores findings and waits until they can be read.
    pub(crate) fn store_findings(&self, findings: &[Finding]) {
        let writer = self.writer.as_ref().unwrap();
        for finding in findings {
            writer.records().send(Record::Finding(Box::new(finding.clone()))).unwrap();
        }
        // Records are committed in order: the last one implies the others.
        let last = findings.last().unwrap();
        wait_until(|| {
            let kept = writer.reader().finding(&last.id.to_string()).unwrap();
            kept == FindingLookup::Found(Box::new(last.clone()))
        });
    }

    /// Stores a session's state and waits until it can be read.
    pub(crate) fn store_session(&self, session: &Session, commands: &[model::Command]) {
        let writer = self.writer.as_ref().unwrap();
        let record =
            Record::Session { session: Box::new(session.clone()), commands: commands.to_vec() };
        writer.records().send(record).unwrap();
        let kept = SessionLookup::Found(Box::new(session.clone()));
        let id = session.id.to_string();
        wait_until(|| writer.reader().session(&id).unwrap() == kept);
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = driftd(arguments);
        command.env("DRIFTD_SOCKET", self.socket());
        command
    }

    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        Output::of(self.command(arguments).output().unwrap())
    }

    pub(crate) fn stop_server(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
        self.server.take().unwrap().join().unwrap();
    }
}

impl Node {
    /// Runs the same command against the daemon and against its directory of baselines.
    #[track_caller]
    pub(crate) fn run_both(&self, arguments: &[&str]) -> Output {
        let served = self.run(arguments);
        let store = self.dir.path().join("state/baselines");
        let read = Output::of(driftd(arguments).arg("--store").arg(store).output().unwrap());
        assert_eq!((served.code, &served.out), (read.code, &read.out), "{served:?} {read:?}");
        assert_eq!(served.err, read.err);
        served
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.shutdown.is_some() {
            self.stop_server();
        }
        self.writer.take().unwrap().stop();
    }
}

/// Stands in for containerd: finds the store's images by their chain IDs. Every blob of
/// theirs is unchanged; the directories of `shop:2` are not.
struct Script(Arc<Store>);

impl Script {
    fn recorded(&self, name: &str, proof: Proof) -> Result<Recorded, String> {
        let unknown = |_| format!("no image `{name}` is known to containerd");
        let record = self.0.find(name).map_err(unknown)?;
        let named = |wanted: &str| record.names.iter().any(|image| image.name == wanted);
        if named("gone:1") {
            return Err("the image's \x1b[2J content is gone".into());
        }
        let baseline = self.0.image(record.chain_id).unwrap().unwrap();
        let report = |id| LayerReport {
            id,
            known_by: if named("bare:1") { KnownBy::Snapshot } else { KnownBy::Verified },
            blob: match named("bare:1") {
                true => Witness::Unavailable("containerd discards unpacked layers".into()),
                false => Witness::Same,
            },
            directory: match proof {
                Proof::Later | Proof::Blobs => Witness::NotAsked,
                Proof::Deep if named("shop:2") => Witness::Differs(3),
                Proof::Deep => Witness::Same,
            },
            differences: if named("shop:2") && proof == Proof::Deep {
                let path = RootfsPath::new("/bin/sh").unwrap();
                let added = RootfsPath::new(b"/tmp/\xff\x1b[2J").unwrap();
                let found = regular("/bin/sh", "changed", 0o4755);
                vec![
                    LayerDifference {
                        path: path.clone(),
                        expected: Some(regular("/bin/sh", "sh", 0o755)),
                        found: Some(found.clone()),
                    },
                    LayerDifference { path: added, expected: None, found: Some(found) },
                ]
            } else {
                Vec::new()
            },
        };
        Ok(Recorded { layers: baseline.layers().into_iter().map(report).collect(), baseline })
    }
}

impl api::RecordImage for Script {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Recorded, String>> + Send + 'a>> {
        progress.layers_total.store(3, std::sync::atomic::Ordering::Relaxed);
        Box::pin(async move { self.recorded(name, proof) })
    }

    fn problems(&self) -> Vec<String> {
        Vec::new()
    }
}

fn view() -> ContainerView {
    ContainerView {
        container: Container {
            id: ContainerId::new("default", "web"),
            endpoint: "/run/containerd/containerd.sock".into(),
            runtime: "io.containerd.runc.v2".into(),
            labels: BTreeMap::from([("app".into(), "shop".into())]).into(),
            pod: None,
            image: ImageReference { name: Some("shop:1".into()), ..ImageReference::default() },
            snapshotter: "overlayfs".into(),
            snapshot_key: "web".into(),
            layers: vec![],
            rootfs: None,
            created_at: None,
            task: Some(Task { pid: 4242, start_time: None, paused: false, terminal_input: None }),
            no_baseline: None,
            id_map: None,
            entry_point: EntryPoint::default(),
            probes: Vec::new(),
        },
        baseline: "ready".into(),
        watched: true,
        armed_before_start: true,
        problem: None,
        findings: 1,
        findings_by_severity: BTreeMap::from([(Severity::Critical, 1)]),
        incomplete: vec!["armed_late"],
    }
}

/// The rules of the script.
fn rules() -> Policy {
    let file = PolicyFile::new("10-app.toml", RULES);
    let loaded = policy::parse(Path::new("/etc/driftd/policy.d"), vec![file]).unwrap();
    Policy::of(&Config::default(), Some(&loaded))
}

pub(crate) const RULES: &str = r#"
version = "2026.11"

[[rule]]
id      = "app-plugins"
reason  = "installs its plugins at start"
owner   = "team-shop"
expires = "never"
effect  = "accept"
[rule.match]
kind = ["exec.*", "library.loaded"]
path = ["/opt/plugins/**"]

[[rule]]
id       = "curl"
reason   = "an attacker's first tool"
effect   = "severity"
severity = "critical"
answer   = ["kill"]
[rule.match]
path = ["/usr/bin/curl"]
"#;

/// A rule that would have answered in a fourth container.
fn stopped_rule() -> StoppedRule {
    StoppedRule {
        rule: "everything".into(),
        since: "2026-11-30T12:00:00Z".parse().unwrap(),
        container: ContainerId::new("default", "web"),
        reason: "it has answered in 3 containers within 10 min (a, b, c)".into(),
    }
}

/// The record that it answers again.
fn resumed() -> Response {
    Response {
        ticket: 0,
        incarnation: None,
        process: None,
        pod: None,
        image: None,
        case: None,
        changed: true,
        outcome: Outcome {
            action: "resume-answers".into(),
            succeeded: true,
            gone: false,
            message: "mended".into(),
            restarter: None,
            at: Timestamp::now(),
        },
        container: stopped_rule().container,
        reason: "rule everything: mended".into(),
        requested_by: "uid 0".into(),
        requested_at: Timestamp::now(),
        finding: None,
    }
}

/// The script: `web` has drifted, `clean` has not, `half` cannot be read completely, and
/// `w` is ambiguous.
fn reply_to(request: ApiRequest, records: &crossbeam_channel::Sender<Record>) {
    let lookup = |text: &str| match text {
        "web" | "default/web" => Ok(ContainerId::new("default", "web")),
        "default/clean" => Ok(ContainerId::new("default", "clean")),
        "clean" | "half" => Ok(ContainerId::new("default", text)),
        "w" => Err(LookupError::Ambiguous("w".into(), 2)),
        other => Err(LookupError::Unknown(other.into())),
    };
    match request {
        ApiRequest::Status(reply) => {
            let _ = reply.send(Status {
                started_at: *STARTED_AT,
                endpoints: vec![EndpointView {
                    socket: "/run/containerd/containerd.sock".into(),
                    connected: false,
                    reason: "connection refused".into(),
                }],
                containers_watched: 1,
                containers_waiting: 2,
                problems: vec!["containerd cannot be reached".into()],
                gaps: Vec::new(),
                stopped_rules: vec![stopped_rule()],
            });
        }
        ApiRequest::Containers(reply) => {
            let _ = reply.send(vec![view()]);
        }
        ApiRequest::Policy(reply) => {
            let _ = reply.send(rules());
        }
        ApiRequest::Diff { container, reply } => {
            let _ = reply.send(lookup(&container).map(|container| {
                let path = |text: &str| RootfsPath::new(text).unwrap();
                let mut differences = vec![Difference {
                    path: path("/bin/sh"),
                    change: DifferenceKind::Metadata,
                    finding: None,
                }];
                if &*container.id == "web" {
                    differences.push(Difference {
                        path: path("/tmp/x"),
                        change: DifferenceKind::Added,
                        finding: Some((Kind::FileAdded, Severity::Low)),
                    });
                }
                Diff { incomplete: &*container.id == "half", differences, container }
            }));
        }
        ApiRequest::ResumeAnswers { rule, reply, .. } => {
            let is_meant = rule.is_none_or(|rule| rule == stopped_rule().rule);
            if is_meant {
                let _ = records.send(Record::Response(Box::new(resumed())));
            }
            let _ = reply.send(is_meant.then(stopped_rule).into_iter().collect());
        }
        ApiRequest::Respond {
            container,
            cause,
            process,
            action,
            reason,
            requested_by,
            no_restart,
            environment: _,
            hook: _,
            reply,
        } => {
            let _ = reply.send(lookup(&container).map(|container| {
                let response = Response {
                    ticket: 1,
                    incarnation: None,
                    process: process.map(|process| *process),
                    pod: None,
                    image: None,
                    case: None,
                    changed: true,
                    outcome: Outcome {
                        action: action.name().into(),
                        succeeded: &*container.id == "web",
                        gone: false,
                        message: "as scripted".into(),
                        restarter: (action == Action::Kill && !no_restart)
                            .then_some(Restarter::RestartMonitor),
                        at: Timestamp::now(),
                    },
                    container,
                    reason,
                    requested_by,
                    requested_at: Timestamp::now(),
                    finding: cause.map(|cause| cause.0),
                };
                records.send(Record::Response(Box::new(response.clone()))).unwrap();
                response
            }));
        }
        ApiRequest::Lookup { container, reply } => {
            let _ = reply.send(lookup(&container));
        }
        ApiRequest::SetPolicy(_) | ApiRequest::PolicyRefused(_) => {
            unreachable!("no command of the client sends it")
        }
        ApiRequest::SetProbe { probe: id, reported, reply } => {
            let mut probe = probe();
            let _ = reply.send(if probe.id == id {
                probe.reported = reported;
                records.send(Record::Probe(Box::new(probe.clone()))).unwrap();
                Ok(probe)
            } else {
                Err(LookupError::UnknownProbe(id))
            });
        }
    }
}
