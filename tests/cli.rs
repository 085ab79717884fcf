//! The built binary, the API and the history together. The pipeline is played
//! by a thread that answers questions from a fixed script.

#[path = "node/executable.rs"]
mod executable;

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use driftd::api::{self, Backend, Listener};
use driftd::baseline::proof::LayerProof;
use driftd::baseline::{
    self, FileEntry, ImageName, KnownBy, LayerDifference, LayerEntry, LayerReport, Progress, Proof,
    Recorded, Store, Witness,
};
use driftd::health::Health;
use driftd::history::{
    Filter, FindingLookup, History, MemberChange, Record, SessionLookup, Writer,
};
use driftd::model::finding::MEMBER_SCHEMA;
use driftd::model::{
    self, ChainId, Container, ContainerId, DiffId, EntryPoint, Exit, FileType, Finding, Format,
    ImageReference, Incarnation, Kind, LayerId, ManifestDigest, Member, Outcome, Probe, Restarter,
    RootfsPath, Session, SessionState, Severity, Task,
};
use driftd::pipeline::{
    ApiRequest, ContainerView, Diff, Difference, DifferenceKind, EndpointView, LookupError, Status,
};
use driftd::respond::{Action, Response};
use jiff::{Timestamp, ToSpan as _};
use tokio::sync::oneshot;

const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const PATIENCE: Duration = Duration::from_secs(60);

// ---- a node without containers

struct NoBlobs;

impl baseline::Blobs for NoBlobs {
    fn open(&self, _: &driftd::model::Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
        Err("there is no content store here".into())
    }
}

struct Node {
    dir: tempfile::TempDir,
    writer: Option<Writer>,
    shutdown: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl Node {
    fn start() -> Node {
        Node::start_in(tempfile::tempdir().unwrap())
    }

    fn start_in(dir: tempfile::TempDir) -> Node {
        Node::start_filled(dir, |_| ())
    }

    fn start_filled(dir: tempfile::TempDir, fill: impl FnOnce(&Store)) -> Node {
        let health = Arc::new(Health::default());
        let history = History::open(&dir.path().join("state")).unwrap();
        let writer = history.start(RETENTION, health.clone());
        let (questions, asked) = crossbeam_channel::bounded(16);
        let records = writer.records();
        std::thread::spawn(move || {
            for question in asked {
                answer(question, &records);
            }
        });
        let baselines = dir.path().join("state/baselines");
        let baselines = Arc::new(baseline::Store::open(&baselines, health.clone()).unwrap());
        fill(&baselines);
        let (news, _) = crossbeam_channel::bounded(16);
        let backend = Backend {
            node: "node-1".into(),
            questions,
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
        };
        let listener = Listener::bind(&dir.path().join("run/driftd.sock")).unwrap();
        let (shutdown, until) = oneshot::channel::<()>();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime
                .block_on(api::serve(listener, backend, async {
                    let _ = until.await;
                }))
                .unwrap();
        });
        Node { dir, writer: Some(writer), shutdown: Some(shutdown), server: Some(server) }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("run/driftd.sock")
    }

    /// Stores findings and waits until they are there to be read.
    fn found(&self, findings: &[Finding]) {
        let writer = self.writer.as_ref().unwrap();
        for finding in findings {
            writer.records().send(Record::Finding(Box::new(finding.clone()))).unwrap();
        }
        // Records are committed in order: with the last one, all are there.
        let last = findings.last().unwrap();
        wait_until(|| {
            let kept = writer.reader().finding(&last.id.to_string()).unwrap();
            kept == FindingLookup::Found(Box::new(last.clone()))
        });
    }

    /// Stores what a session has become and waits until it is there to be read.
    fn told(&self, session: &Session, commands: &[model::Command]) {
        let writer = self.writer.as_ref().unwrap();
        let record =
            Record::Session { session: Box::new(session.clone()), commands: commands.to_vec() };
        writer.records().send(record).unwrap();
        let kept = SessionLookup::Found(Box::new(session.clone()));
        let id = session.id.to_string();
        wait_until(|| writer.reader().session(&id).unwrap() == kept);
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = driftd(arguments);
        command.env("DRIFTD_SOCKET", self.socket());
        command
    }

    #[track_caller]
    fn run(&self, arguments: &[&str]) -> Answer {
        Answer::of(self.command(arguments).output().unwrap())
    }

    fn stop_server(&mut self) {
        self.shutdown.take().unwrap().send(()).unwrap();
        self.server.take().unwrap().join().unwrap();
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

/// Knows the images of the store by their chain IDs, and verifies them as a script
/// says: every blob is the same, the directories of `shop:2` are not.
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

fn regular(path: &str, content: &str, mode: u32) -> LayerEntry {
    let path = RootfsPath::new(path).unwrap();
    LayerEntry::File(FileEntry {
        file_type: FileType::Regular,
        format: Format::sniff(content.as_bytes()),
        size: content.len() as u64,
        blake3: Some(baseline::blake3_of(content)),
        ..FileEntry::directory(path, mode)
    })
}

fn directory(path: &str) -> LayerEntry {
    LayerEntry::File(FileEntry::directory(RootfsPath::new(path).unwrap(), 0o755))
}

/// Records an image of one layer in namespace `default`; all but `bare:1` are
/// known by their blobs.
fn image(store: &Store, number: u8, name: &str, entries: Vec<LayerEntry>) {
    let diff_id = DiffId([number; 32]);
    let id = LayerId::Diff(diff_id);
    let chain_id = ChainId::of_layers(&[diff_id])[0];
    let layer = store.write_layer(id, entries).unwrap();
    store
        .write_proof(
            id,
            LayerProof {
                known_by: match name {
                    "bare:1" => KnownBy::Snapshot,
                    _ => KnownBy::Verified,
                },
                verified_at: Some("2026-11-22T01:00:00Z".parse().unwrap()),
                ..LayerProof::new(layer.checksum(), chain_id)
            },
        )
        .unwrap();
    let name = ImageName {
        namespace: "default".into(),
        name: name.into(),
        manifest_digest: Some(ManifestDigest([number; 32])),
    };
    store.write_image(chain_id, vec![id], Some(&name)).unwrap();
}

/// Two images of one shop.
fn shops(store: &Store) {
    let link = |target: &str| {
        LayerEntry::File(FileEntry {
            file_type: FileType::Symlink,
            size: target.len() as u64,
            link_target: Some(target.as_bytes().into()),
            ..FileEntry::directory(RootfsPath::new("/bin/lnk").unwrap(), 0o777)
        })
    };
    let common = || vec![directory("/"), directory("/bin")];
    let first = [
        regular("/bin/ls", "ls", 0o755),
        regular("/bin/old", "old", 0o755),
        regular("/bin/sh", "sh", 0o755),
        link("sh"),
    ];
    image(store, 1, "shop:1", [common(), first.into()].concat());
    let second = [
        regular("/bin/ls", "ls", 0o4755),
        regular("/bin/new\u{1b}[2J", "new", 0o755),
        regular("/bin/sh", "other", 0o755),
        link("ls"),
    ];
    image(store, 2, "shop:2", [common(), second.into()].concat());
}

fn view() -> ContainerView {
    ContainerView {
        container: Container {
            id: ContainerId::new("default", "web"),
            endpoint: "/run/containerd/containerd.sock".into(),
            runtime: "io.containerd.runc.v2".into(),
            labels: std::collections::BTreeMap::from([("app".into(), "shop".into())]).into(),
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
    }
}

/// `web` has drifted, `clean` has not, `half` cannot be read whole, and `w` could
/// be two containers.
fn answer(question: ApiRequest, records: &crossbeam_channel::Sender<Record>) {
    let lookup = |text: &str| match text {
        "web" | "default/web" => Ok(ContainerId::new("default", "web")),
        "default/clean" => Ok(ContainerId::new("default", "clean")),
        "clean" | "half" => Ok(ContainerId::new("default", text)),
        "w" => Err(LookupError::Ambiguous("w".into(), 2)),
        other => Err(LookupError::Unknown(other.into())),
    };
    match question {
        ApiRequest::Status(reply) => {
            let _ = reply.send(Status {
                started_at: Timestamp::now(),
                endpoints: vec![EndpointView {
                    socket: "/run/containerd/containerd.sock".into(),
                    connected: false,
                    reason: "connection refused".into(),
                }],
                containers_watched: 1,
                containers_waiting: 2,
                problems: vec!["containerd cannot be reached".into()],
                gaps: Vec::new(),
            });
        }
        ApiRequest::Containers(reply) => {
            let _ = reply.send(vec![view()]);
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
        ApiRequest::Respond {
            container,
            cause,
            action,
            reason,
            requested_by,
            no_restart,
            reply,
        } => {
            let _ = reply.send(lookup(&container).map(|container| {
                let response = Response {
                    ticket: 1,
                    incarnation: None,
                    outcome: Outcome {
                        action: action.name().into(),
                        succeeded: &*container.id == "web",
                        gone: false,
                        message: "as the script says".into(),
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
        ApiRequest::SetPolicy(_) => unreachable!("no command of the client asks for it"),
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

fn sample() -> Finding {
    serde_json::from_str(include_str!("data/finding.json")).unwrap()
}

/// A finding in the container `default/web`, seen that many seconds ago.
fn finding(number: u8, ago: i64) -> Finding {
    let mut finding = sample();
    finding.id.0[0] = number;
    finding.container.as_mut().unwrap().id = ContainerId::new("default", "web");
    finding.last_seen = Timestamp::now() - ago.seconds();
    finding.first_seen = finding.last_seen;
    finding
}

/// A session in the container `default/web` that began that many seconds ago and
/// goes on.
fn session(number: u8, ago: i64) -> Session {
    let mut session: Session = serde_json::from_str(include_str!("data/session.json")).unwrap();
    session.id.0[0] = number;
    session.container.id = ContainerId::new("default", "web");
    session.started_at = Timestamp::now() - ago.seconds();
    (session.revision, session.state) = (1, SessionState::Open);
    (session.ended_at, session.exit) = (None, None);
    session
}

fn closed(session: &Session, ago: i64) -> Session {
    let mut session = session.clone();
    (session.revision, session.state) = (session.revision + 1, SessionState::Closed);
    session.ended_at = Some(Timestamp::now() - ago.seconds());
    session.exit = Some(Exit { code: Some(0), signal: None });
    session
}

/// A command of a session, begun that many seconds ago, that took one second.
fn command(session: &Session, number: u64, argv: &[&str], ago: i64) -> model::Command {
    let mut command: model::Command =
        serde_json::from_str(include_str!("data/command.json")).unwrap();
    (command.session, command.number) = (session.id, number);
    command.argv = Some(argv.iter().copied().map(str::to_owned).collect());
    command.started_at = Timestamp::now() - ago.seconds();
    command.ended_at = Some(command.started_at + 1.seconds());
    command.exit = Some(Exit { code: Some(0), signal: None });
    command
}

fn probe() -> Probe {
    let mut probe: Probe = serde_json::from_str(include_str!("data/probe.json")).unwrap();
    probe.container.id = ContainerId::new("default", "web");
    probe.last_seen = Timestamp::now() - 5.seconds();
    probe
}

// ---- running the binary

fn driftd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_driftd"));
    command.args(arguments).env_remove("DRIFTD_SOCKET").stdin(Stdio::null());
    command
}

#[derive(Debug)]
struct Answer {
    code: i32,
    out: String,
    talk: String,
}

impl Answer {
    fn of(output: Output) -> Answer {
        Answer {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            talk: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

#[track_caller]
fn run(arguments: &[&str]) -> Answer {
    Answer::of(driftd(arguments).output().unwrap())
}

#[track_caller]
fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Ends a child that a failed test leaves behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

// ---- the command line by itself

#[test]
fn every_command_has_help() {
    for command in [
        &["--help"][..],
        &["run", "--help"],
        &["doctor", "--help"],
        &["status", "--help"],
        &["baseline", "--help"],
        &["baseline", "ls", "--help"],
        &["baseline", "show", "--help"],
        &["baseline", "record", "--help"],
        &["baseline", "verify", "--help"],
        &["baseline", "export", "--help"],
        &["baseline", "diff", "--help"],
        &["baseline", "rm", "--help"],
        &["baseline", "prune", "--help"],
        &["metrics", "--help"],
        &["containers", "--help"],
        &["diff", "--help"],
        &["findings", "--help"],
        &["summary", "--help"],
        &["show", "--help"],
        &["sessions", "--help"],
        &["timeline", "--help"],
        &["probes", "--help"],
        &["probes", "report", "--help"],
        &["probes", "count", "--help"],
        &["members", "--help"],
        &["respond", "--help"],
        &["respond", "kill", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
        &["--version"],
    ] {
        let answer = run(command);
        assert_eq!((answer.code, answer.talk.as_str()), (0, ""), "{command:?}");
        assert!(answer.out.contains("driftd"), "{command:?}: {}", answer.out);
    }
    assert!(!run(&["--help"]).out.contains("guardian"));
}

#[test]
fn a_wrong_command_line_is_64() {
    for (arguments, hint) in [
        (&[][..], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["diff"], "CONTAINER"),
        (&["findings", "--kind", "exec.odd"], "exec.new"),
        (&["findings", "--severity", "terrible"], "critical"),
        (&["findings", "--since", "soonish"], "yesterday"),
        (&["findings", "--kind", "exek.*"], "exec.new"),
        (&["findings", "-o", "custom-columns=PATH"], ".file.path"),
        (&["findings", "--follow", "--after", "newest"], "latest"),
        (&["findings", "--follow", "--exit-code"], "--exit-code"),
        (&["findings", "--follow", "-o", "json"], "jsonl"),
        (&["findings", "-o", "xml"], "jsonl"),
        (&["sessions", "--follow", "-o", "json"], "jsonl"),
        (&["sessions", "--after", "3"], "--follow"),
        (&["sessions", "--until", "soon"], "2h"),
        (&["timeline"], "CONTAINER"),
        (&["probes", "report"], "PROBE"),
        (&["probes", "-c", "web", "count", "ab"], "--container"),
        (&["baseline", "diff", "one"], "OTHER"),
        (&["baseline", "rm"], "IMAGE"),
        (&["baseline", "export", "a", "-o", "spdx"], "cyclonedx"),
        (&["baseline", "verify", "--deep", "--store", "/x"], "--store"),
        (&["respond", "kill", "web"], "--reason"),
        (&["respond", "kill", "web", "--reason", ""], "--reason"),
    ] {
        let answer = run(arguments);
        assert_eq!((answer.code, answer.out.as_str()), (64, ""), "{arguments:?}: {answer:?}");
        assert!(answer.talk.contains(hint), "{arguments:?}: {}", answer.talk);
    }
}

#[test]
fn wrong_settings_are_64_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("driftd.toml");
    let name = file.to_str().unwrap();

    let answer = run(&["run", "--config", name]);
    assert_eq!((answer.code, answer.out.as_str()), (64, ""));
    assert_eq!(
        answer.talk,
        format!("error: cannot read the settings {name}: No such file or directory (os error 2)\n")
    );

    fs::write(&file, "[respond]\nkil_on = []\n").unwrap();
    for command in ["run", "doctor"] {
        let answer = run(&[command, "--config", name]);
        assert_eq!((answer.code, answer.out.as_str()), (64, ""));
        let start = format!("error: the settings {name} are wrong: ");
        assert!(answer.talk.starts_with(&start), "{}", answer.talk);
        assert!(answer.talk.contains("kil_on"), "{}", answer.talk);
    }
}

#[test]
fn a_daemon_that_is_not_there_is_2_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("driftd.sock");
    for arguments in [
        &["status"][..],
        &["containers"],
        &["findings"],
        &["findings", "--follow"],
        &["show", "ab"],
        &["members", "ab"],
        &["sessions"],
        &["sessions", "--follow"],
        &["timeline", "web"],
        &["probes"],
        &["probes", "report", "ab"],
        &["diff", "web"],
        &["baseline", "ls"],
        &["baseline", "record", "x"],
        &["baseline", "verify"],
        &["baseline", "diff", "x", "y"],
        &["baseline", "rm", "x"],
        &["baseline", "prune"],
        &["metrics"],
        &["respond", "kill", "web", "--reason", "x"],
    ] {
        let output = driftd(arguments).arg("--socket").arg(&socket).output().unwrap();
        let answer = Answer::of(output);
        assert_eq!((answer.code, answer.out.as_str()), (2, ""), "{arguments:?}");
        assert_eq!(
            answer.talk,
            format!(
                "error: cannot reach driftd at {} (is the daemon running? try: systemctl status \
                 driftd)\n",
                socket.display()
            )
        );
    }
}

#[test]
fn completions_and_the_manual_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let answer = run(&["completions", shell]);
        assert_eq!((answer.code, answer.talk.as_str()), (0, ""));
        assert!(answer.out.contains("exec.modified"), "{shell}: kinds are completed");
    }
    let answer = run(&["man"]);
    assert_eq!(answer.code, 0);
    assert!(answer.out.contains(".TH driftd 1"), "{}", answer.out);
    let dir = tempfile::tempdir().unwrap();
    let answer = run(&["man", "--directory", dir.path().to_str().unwrap()]);
    assert_eq!((answer.code, answer.out.as_str()), (0, ""));
    assert!(dir.path().join("driftd-respond-kill.1").is_file());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = driftd(&["completions", "bash"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    let answer = Answer::of(output);
    assert_eq!((answer.code, answer.talk.as_str()), (0, ""));
}

#[test]
fn doctor_says_what_works_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("containerd.sock");
    let state = dir.path().join("state");
    let arguments = [
        "doctor",
        "--containerd",
        nowhere.to_str().unwrap(),
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let answer = run(&arguments);
    assert_eq!((answer.code, answer.talk.as_str()), (2, ""), "{answer:?}");
    for line in answer.out.lines() {
        assert!(["OK    ", "WARN  ", "FAIL  "].iter().any(|word| line.starts_with(word)), "{line}");
    }
    assert!(answer.out.contains(&format!("cannot be reached at {}", nowhere.display())));
    assert!(answer.out.contains("history          none yet"), "{}", answer.out);
    assert!(!state.exists(), "doctor changes nothing");

    let json = Answer::of(driftd(&arguments).args(["-o", "json"]).output().unwrap());
    let checks: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(checks[0]["schema"], "driftd.check/v1");
    assert_eq!(checks[0]["name"], "kernel");
    assert_eq!(checks[0]["result"], "ok");
}

// ---- with a daemon

#[test]
fn findings_are_listed_filtered_and_shown() {
    let node = Node::start();
    let empty = node.run(&["findings", "--exit-code"]);
    assert_eq!(empty.code, 0);
    assert!(empty.talk.contains("driftd status"), "{}", empty.talk);

    let (old, mut young) = (finding(1, 7200), finding(2, 10));
    (young.kind, young.severity) = (Kind::FileAdded, Severity::Low);
    let elsewhere = sample();
    node.found(&[old.clone(), young.clone(), elsewhere.clone()]);

    let json = node.run(&["findings", "-o", "json"]);
    assert_eq!((json.code, json.talk.as_str()), (0, ""));
    let listed: Vec<Finding> = serde_json::from_str(&json.out).unwrap();
    let mut expected = vec![old.clone(), young.clone(), elsewhere.clone()];
    expected.sort_by_key(|finding| std::cmp::Reverse(finding.last_seen));
    assert_eq!(listed, expected);

    let ids = |arguments: &[&str]| {
        let answer = node.run(&[&["findings", "-q"], arguments].concat());
        assert_eq!(answer.code, 0, "{answer:?}");
        answer.out.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let newest_first = |findings: &[&Finding]| {
        let mut findings = findings.to_vec();
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.last_seen));
        findings.iter().map(|finding| finding.id.to_string()).collect::<Vec<String>>()
    };
    let elsewhere_id = elsewhere.container_id().unwrap().to_string();
    assert_eq!(ids(&["--container", "web"]), newest_first(&[&old, &young]));
    let digits = &elsewhere.container_id().unwrap().id[..8];
    assert_eq!(ids(&["--container", digits]), newest_first(&[&elsewhere]), "gone, by its prefix");
    for beginning in ["4f1c", "we"] {
        let refused = node.run(&["findings", "--container", beginning]);
        assert_eq!((refused.code, refused.out.as_str()), (2, ""), "u19: {beginning}");
        let told = &refused.talk;
        assert!(told.contains("write the whole ID") && told.contains("(there is: "), "{told}");
    }
    assert_eq!(ids(&["--container", &elsewhere_id]), newest_first(&[&elsewhere]));
    assert_eq!(ids(&["--kind", "file.added"]), newest_first(&[&young]));
    assert_eq!(ids(&["--severity", "high", "--container", "web"]), newest_first(&[&old]));
    assert_eq!(ids(&["--since", "1h", "--container", "web"]), newest_first(&[&young]));
    assert_eq!(ids(&["--until", "1h", "--container", "web"]), newest_first(&[&old]));
    assert_eq!(ids(&["--limit", "1"]).len(), 1);
    assert_eq!(ids(&["--image", "no/such:image"]), Vec::<String>::new());

    assert_eq!(node.run(&["findings", "--exit-code"]).code, 1);
    assert_eq!(node.run(&["findings", "--exit-code", "--kind", "exec.new"]).code, 0);
    let table = node.run(&["findings"]);
    assert!(table.out.starts_with("SEVERITY  KIND "), "{}", table.out);
    assert!(!table.out.contains('\x1b'), "no colour in a pipe");

    let whole = node.run(&["show", &old.id.to_string()[..8]]);
    assert_eq!(whole.code, 0, "{whole:?}");
    assert!(whole.out.starts_with("CRITICAL exec.modified\n"), "{}", whole.out);
    let whole = node.run(&["show", &old.id.to_string(), "-o", "json"]);
    assert_eq!(serde_json::from_str::<Finding>(&whole.out).unwrap(), old);
    let nothing = node.run(&["show", "ee"]);
    assert_eq!(
        (nothing.code, nothing.talk.as_str()),
        (2, "error: no finding or session `ee` (see: driftd findings, driftd sessions)\n")
    );
    let several = node.run(&["show", "0"]);
    assert_eq!(
        (several.code, several.talk.as_str()),
        (2, "error: `0` could be 3 findings: write more of the ID\n")
    );
}

/// Text that is compared says minutes: a slow test takes some seconds.
const MINUTE: i64 = 60;

/// A node on which somebody was in `web`, and somebody else still is.
fn visited_node() -> (Node, Session, Session) {
    let node = Node::start();
    let mut drift = finding(1, 80 * MINUTE);
    let mut over = session(0xa1, 100 * MINUTE);
    over.findings = vec![drift.id];
    (over.finding, over.findings_total) = (None, 1);
    drift.session = Some(over.id);
    let commands = [
        command(&over, 1, &["ls", "-la"], 90 * MINUTE),
        command(&over, 2, &["sh", "-c", "echo \u{1b}[2J\n\u{202e}"], 85 * MINUTE),
    ];
    let mut going_on = session(0xa2, 50 * MINUTE);
    going_on.container.id = ContainerId::new("default", "db\u{1b}[31m");
    (going_on.requested_by, going_on.process.tty) = (None, Some("pts/0\u{9b}".into()));
    node.found(std::slice::from_ref(&drift));
    let over = closed(&over, 60 * MINUTE);
    node.told(&over, &commands);
    node.told(&going_on, &[]);
    (node, over, going_on)
}

#[track_caller]
fn assert_clean(text: &str) {
    let is_dirty = |one: char| one != '\n' && one.is_control() || one == '\u{202e}';
    assert!(!text.contains(is_dirty), "{text:?}");
}

/// Without times: each is one second from another.
fn timeless(text: &str) -> String {
    let mut all = String::new();
    for line in settled(text).lines() {
        let words = line.split(' ').map(|word| match word.parse::<jiff::civil::Time>() {
            Ok(_) if word.contains(':') => "TIME",
            _ => match word.parse::<jiff::civil::Date>() {
                Ok(_) => "DATE",
                Err(_) => word,
            },
        });
        all += &words.collect::<Vec<_>>().join(" ");
        all.push('\n');
    }
    all
}

#[test]
fn sessions_are_listed_filtered_and_told_as_stories() {
    let nobody = Node::start().run(&["sessions"]);
    assert_eq!(nobody.code, 0);
    assert!(nobody.talk.contains("driftd status"), "{}", nobody.talk);

    let (node, over, going_on) = visited_node();
    let table = node.run(&["sessions"]);
    assert_eq!((table.code, table.talk.as_str()), (0, ""));
    assert_clean(&table.out);
    insta::assert_snapshot!(settled(&table.out));
    let ids = |arguments: &[&str]| {
        let answer = node.run(&[&["sessions", "-q"], arguments].concat());
        assert_eq!(answer.code, 0, "{answer:?}");
        answer.out.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let (first, second) = (over.id.to_string(), going_on.id.to_string());
    assert_eq!(ids(&[]), [second.clone(), first.clone()]);
    assert_eq!(ids(&["-c", "web"]), std::slice::from_ref(&first));
    assert_eq!(ids(&["-c", "db\u{1b}[31m"]), std::slice::from_ref(&second), "it has no finding");
    assert_eq!(ids(&["--open"]), std::slice::from_ref(&second));
    assert_eq!(ids(&["--since", "55m"]), std::slice::from_ref(&second));
    assert_eq!(ids(&["--until", "55m"]), std::slice::from_ref(&first));
    let json = node.run(&["sessions", "-o", "json"]);
    assert_eq!(serde_json::from_str::<Vec<Session>>(&json.out).unwrap(), [going_on, over.clone()]);

    let shown = node.run(&["show", "a1"]);
    assert_eq!((shown.code, shown.talk.as_str()), (0, ""));
    assert_clean(&shown.out);
    insta::assert_snapshot!(timeless(&shown.out));
    assert_clean(&node.run(&["show", "a2"]).out);
    let story: serde_json::Value =
        serde_json::from_str(&node.run(&["show", &first, "-o", "json"]).out).unwrap();
    assert_eq!(story["schema"], "driftd.session_story/v1");
    assert_eq!(story["session"]["id"], first);
    assert_eq!(story["commands"].as_array().unwrap().len(), 2);
    assert_eq!(story["findings"][0]["session"], first);

    // The finding says in which session it was, and how to see that.
    let drift = node.run(&["show", "01"]).out;
    let expected = format!("Session     {first} (driftd show {})\n", &first[..12]);
    assert!(drift.contains(&expected), "{drift}");
    let several = node.run(&["show", "a"]);
    assert_eq!(several.talk, "error: `a` could be 2 sessions: write more of the ID\n");
    let mut alike = finding(0xa1, 0);
    alike.container = None;
    node.found(&[alike]);
    let both = node.run(&["show", "a1"]);
    assert_eq!(
        (both.code, both.talk.as_str()),
        (2, "error: `a1` could be a finding or a session: write more of the ID\n")
    );
}

#[test]
fn a_timeline_tells_what_happened_in_order() {
    let (node, over, _) = visited_node();
    let killed = node.run(&["respond", "kill", "web", "--reason", "drift\u{1b}[2J"]);
    assert_eq!(killed.code, 0);
    let records = node.writer.as_ref().unwrap().records();
    let gap = Record::Gap {
        name: "pipeline_full".into(),
        container: None,
        detail: "7 observations\r".into(),
        at: Timestamp::now() + 1.seconds(),
        until: None,
    };
    records.send(gap).unwrap();
    let list = |arguments: &[&str]| node.run(&[&["timeline", "web"], arguments].concat());
    wait_until(|| list(&["-q"]).out.ends_with("pipeline_full\n"));

    let told = list(&[]);
    assert_eq!((told.code, told.talk.as_str()), (0, ""));
    assert_clean(&told.out);
    let (before, after) = told.out.split_once("(asked by uid 0 pid ").unwrap();
    let (_, after) = after.split_once(" (").unwrap();
    let (_, after) = after.split_once(')').unwrap();
    insta::assert_snapshot!(timeless(&format!("{before}(asked by …{after}")));
    assert_clean(&list(&["--no-trunc", "-o", "wide"]).out);

    let json = list(&["-o", "json"]);
    let entries: Vec<serde_json::Value> = serde_json::from_str(&json.out).unwrap();
    let kinds: Vec<&str> = entries.iter().map(|entry| entry["type"].as_str().unwrap()).collect();
    let expected =
        ["session_opened", "command", "command", "finding", "session_closed", "response", "gap"];
    assert_eq!(kinds, expected);
    assert_eq!(entries[1]["session_id"], over.id.to_string());
    assert_eq!(list(&["-o", "jsonl"]).out.lines().count(), 7);
    assert_eq!(list(&["-q", "--since", "70m", "--until", "55m"]).out, format!("{}\n", over.id));
    let nothing = list(&["--until", "3h"]);
    assert_eq!((nothing.code, nothing.out.as_str()), (0, ""));
    assert!(nothing.talk.contains("driftd status"), "{}", nothing.talk);
    let unknown = node.run(&["timeline", "nowhere"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.talk.contains("no container `nowhere`"), "{}", unknown.talk);
}

#[test]
fn a_timeline_longer_than_a_page_is_told_whole() {
    let node = Node::start();
    let long = session(1, 5000);
    let commands: Vec<model::Command> =
        (1..=2500).map(|number| command(&long, number, &["true"], 4000 - number as i64)).collect();
    node.told(&closed(&long, 0), &commands);
    let lines = node.run(&["timeline", "web", "-q"]).out;
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 2502);
    assert_eq!(lines[2500], format!("{}#2500", long.id));
    let story = node.run(&["show", &long.id.to_string(), "-o", "jsonl"]).out;
    let story: serde_json::Value = serde_json::from_str(&story).unwrap();
    assert_eq!(story["commands"].as_array().unwrap().len(), 2500);
}

#[test]
fn probes_are_listed_reported_and_counted_again() {
    let node = Node::start();
    assert_eq!(node.run(&["probes"]).talk, "no probe is known\n");
    let records = node.writer.as_ref().unwrap().records();
    let mut gone = probe();
    gone.id.0[0] = 1;
    gone.container.id = ContainerId::new("default", "gone");
    gone.argv = vec!["\u{1b}[2J".into()];
    for probe in [probe(), gone] {
        records.send(Record::Probe(Box::new(probe))).unwrap();
    }
    wait_until(|| node.run(&["probes", "-q"]).out.lines().count() == 2);
    let table = node.run(&["probes", "-c", "web"]);
    assert_eq!((table.code, table.talk.as_str()), (0, ""));
    insta::assert_snapshot!(settled(&table.out));
    assert_clean(&node.run(&["probes", "-o", "wide"]).out);

    let id = probe().id.to_string();
    let report = node.run(&["probes", "report", &id[..6]]);
    assert_eq!((report.code, report.talk.as_str()), (0, ""));
    assert!(report.out.starts_with(&format!("{id} is reported from now on: ")), "{}", report.out);
    let state = || {
        let json = node.run(&["probes", "-c", "web", "-o", "json"]).out;
        serde_json::from_str::<Vec<Probe>>(&json).unwrap()[0].reported
    };
    assert!(state(), "whoever is told finds it in the history");
    let count = node.run(&["probes", "count", &id, "-o", "json"]);
    assert!(!serde_json::from_str::<Probe>(&count.out).unwrap().reported);
    assert!(!state());
    let nothing = node.run(&["probes", "report", "ee"]);
    assert_eq!(
        (nothing.code, nothing.talk.as_str()),
        (2, "error: no probe `ee` (see: driftd probes)\n")
    );
    let gone = node.run(&["probes", "report", "01"]);
    assert_eq!(gone.code, 2);
    assert!(gone.talk.contains("belongs to no container on this node"), "{}", gone.talk);
}

#[test]
fn the_files_of_an_aggregated_finding_are_all_listed() {
    let node = Node::start();
    let (mut aggregate, alone) = (finding(1, 10), finding(2, 10));
    (aggregate.kind, aggregate.severity) = (Kind::FileRelocated, Severity::Info);
    aggregate.files = Some(2500);
    let changes = (0..2500_u32).map(|number| {
        let path: &[u8] = if number == 0 { b"/tmp/\x1b[2J\xff" } else { b"/tmp/t" };
        let path = [path, format!("{number:05}").as_bytes()].concat();
        MemberChange::Seen(Member {
            schema: MEMBER_SCHEMA.into(),
            path: RootfsPath::new(path).unwrap(),
            kind: Kind::FileRelocated,
            blake3: None,
            first_seen: aggregate.first_seen,
            last_seen: aggregate.first_seen,
            removed: number == 7,
        })
    });
    let changes = changes.collect();
    let record = Record::Aggregate { finding: Box::new(aggregate.clone()), changes };
    node.writer.as_ref().unwrap().records().send(record).unwrap();
    node.found(std::slice::from_ref(&alone));

    let id = aggregate.id.to_string();
    let names = node.run(&["members", &id[..8], "-q"]);
    assert_eq!((names.code, names.out.lines().count()), (0, 2500));
    assert!(names.out.starts_with("/tmp/\\u{1b}[2J\\xff00000\n"), "{}", &names.out[..80]);
    assert_eq!(node.run(&["members", &id, "-q", "--limit", "1200"]).out.lines().count(), 1200);
    let json = node.run(&["members", &id, "-o", "json"]);
    let members: Vec<Member> = serde_json::from_str(&json.out).unwrap();
    assert_eq!(members.len(), 2500);
    assert_eq!(members.iter().filter(|member| member.removed).count(), 1);
    let lines = node.run(&["members", &id, "-o", "jsonl"]);
    assert_eq!(lines.out.lines().count(), 2500);
    let table = node.run(&["members", &id]);
    assert!(table.out.starts_with("PATH "), "{}", &table.out[..80]);
    assert!(!table.out.contains('\x1b'));

    let shown = node.run(&["show", &id]);
    let expected = format!("Stands for  2500 files (driftd members {})", &id[..12]);
    assert!(shown.out.contains(&expected), "{}", shown.out);
    let listed = node.run(&["findings"]);
    assert!(listed.out.contains(" (2500 files)"), "{}", listed.out);

    let one = node.run(&["members", &alone.id.to_string()]);
    assert_eq!((one.code, one.out.lines().count()), (0, 1), "{one:?}");
    assert!(one.talk.contains("driftd show"), "{}", one.talk);
    let nothing = node.run(&["members", "ee"]);
    assert_eq!(
        (nothing.code, nothing.talk.as_str()),
        (2, "error: no finding `ee` (see: driftd findings)\n")
    );
}

/// Findings of the last hours, one behind the other, made within the database.
fn fill(node: &Node, number: u32) {
    node.found(&[finding(0, 0)]);
    let database = rusqlite::Connection::open(node.dir.path().join("state/history.db")).unwrap();
    database.busy_timeout(PATIENCE).unwrap();
    database
        .execute(
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1)
             INSERT INTO finding
             SELECT printf('%032x', n), revision, namespace, container, image, manifest_digest,
                    kind, severity, first_seen - n, last_seen - n, count,
                    json_set(json, '$.id', printf('%032x', n)), labels
             FROM finding, numbers",
            [number - 1],
        )
        .unwrap();
}

#[test]
fn u11_a_long_history_is_listed_in_little_time_and_memory() {
    // 250,000 were tried; what is promised does not depend on it, and filling takes a minute.
    const MANY: u32 = 30_000;
    let node = Node::start();
    fill(&node, MANY);
    // With more heap than this the client ends.
    let run = |arguments: &[&str]| {
        let mut command = Command::new("prlimit");
        command.arg("--data=62914560").arg(env!("CARGO_BIN_EXE_driftd")).args(arguments);
        command.env("DRIFTD_SOCKET", node.socket());
        Answer::of(command.output().unwrap())
    };
    let begun = Instant::now();
    let table = run(&["findings"]);
    // It does not depend on how many there are; a debug build on a busy machine is slow.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((table.code, table.talk.as_str()), (0, ""));
    assert_eq!(table.out.lines().count(), 1002, "a header, the newest 1,000, and a last line");
    let last = table.out.lines().last().unwrap();
    assert!(last.starts_with("… the newest 1000 are shown, and there are more: --limit"), "{last}");
    assert_eq!(run(&["findings", "--limit", "3"]).out.lines().count(), 5);

    // The next page begins where this one has ended.
    let token = last.split("--page ").nth(1).unwrap().split(' ').next().unwrap();
    let ids = |arguments: &[&str]| -> Vec<String> {
        let answer = run(&[&["findings", "-q", "--limit", "1500"], arguments].concat());
        answer.out.lines().map(str::to_owned).collect()
    };
    assert_eq!(ids(&["--page", token])[0], ids(&[])[1000]);

    let lines = run(&["findings", "-o", "jsonl", "--limit", "20000"]);
    assert_eq!((lines.code, lines.out.lines().count()), (0, 20_000));
    let json = run(&["findings", "-o", "json", "--limit", "0", "--until", "1970-01-01"]);
    assert_eq!(json.out, "[]\n");
    let document = run(&["findings", "-o", "json", "--limit", "3000"]);
    let document: Vec<Finding> = serde_json::from_str(&document.out).unwrap();
    assert_eq!(document.len(), 3000);
}

/// The files of a directory with what they hold.
fn contents(directory: &Path) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
    let all = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.is_file()).map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn u05_a_history_is_read_without_a_daemon_and_nothing_of_it_changes() {
    let mut node = Node::start();
    // Older than what a daemon would keep.
    let old = finding(1, 40 * 24 * 60 * 60);
    let young = finding(2, 60);
    node.writer.take().unwrap().stop();
    let keep = Duration::from_secs(400 * 24 * 60 * 60);
    let writer = History::open(&node.dir.path().join("state")).unwrap().start(keep, Arc::default());
    node.writer = Some(writer);
    node.found(&[young.clone(), old.clone()]);
    let told = session(3, 30);
    node.told(&told, &[command(&told, 1, &["ls"], 20)]);

    // As it is copied from a node that runs: the newest records are in the log only.
    let copy = tempfile::tempdir().unwrap();
    let state = node.dir.path().join("state");
    let rest = tempfile::tempdir().unwrap();
    for name in ["history.db", "history.db-wal"] {
        fs::copy(state.join(name), copy.path().join(name)).unwrap();
    }
    assert!(fs::metadata(copy.path().join("history.db-wal")).unwrap().len() > 0);
    let check = |history: &Path, is_unused: bool| {
        let before = contents(history.parent().unwrap());
        let run = |arguments: &[&str]| {
            let answer = run(&[&["--history", history.to_str().unwrap()], arguments].concat());
            assert_eq!(answer.code, 0, "{arguments:?}: {answer:?}");
            answer.out
        };
        assert_eq!(run(&["findings", "-q"]), format!("{}\n{}\n", young.id, old.id));
        assert!(run(&["show", &old.id.to_string()]).contains(&old.id.to_string()));
        assert_eq!(run(&["sessions", "-q"]), format!("{}\n", told.id));
        assert_eq!(run(&["timeline", "web", "-o", "jsonl"]).lines().count(), 4);
        assert_eq!(run(&["summary"]).lines().count(), 2);
        if is_unused {
            assert_eq!(contents(history.parent().unwrap()), before, "nothing is written");
        }
    };
    check(&copy.path().join("history.db"), true);
    // The one that is in use.
    check(&state.join("history.db"), false);
    // As a backup has it: all in one file.
    let database = rusqlite::Connection::open(state.join("history.db")).unwrap();
    let backup = rest.path().join("history.db");
    database.execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    check(&rest.path().join("history.db"), true);
    let directory = run(&["--history", rest.path().to_str().unwrap(), "findings", "-q"]);
    assert_eq!(directory.out.lines().count(), 2, "its directory names it too");

    for (arguments, code) in [
        (&["status"][..], 64),
        (&["findings", "--follow"], 64),
        (&["respond", "kill", "web", "--reason", "x"], 64),
    ] {
        let path = rest.path().to_str().unwrap();
        let refused = run(&[&["--history", path], arguments].concat());
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(refused.talk.contains("--history is for findings"), "{}", refused.talk);
    }
    let nothing = run(&["--history", "/no/such/history.db", "findings"]);
    assert!(nothing.code == 2 && nothing.talk.contains("/no/such/history.db"), "{nothing:?}");
}

#[test]
fn u15_a_page_is_written_for_every_command_also_into_a_new_directory() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("share/man/man1");
    let written = run(&["man", "--directory", new.to_str().unwrap()]);
    assert_eq!((written.code, written.talk.as_str()), (0, ""));
    let top = fs::read_to_string(new.join("driftd.1")).unwrap().replace("\\-", "-");
    let named: Vec<&str> =
        top.split_whitespace().filter_map(|word| word.strip_suffix("(1)")).collect();
    assert!(named.len() > 15, "{named:?}");
    for page in named {
        assert!(new.join(format!("{page}.1")).exists(), "{page} is named, and not there");
    }
    assert!(new.join("driftd-findings.1").exists() && new.join("driftd-summary.1").exists());
    // `make install` puts them all there.
    assert!(include_str!("../Makefile").contains("man --directory $(DESTDIR)$(mandir)"));

    fs::write(dir.path().join("file"), "").unwrap();
    let refused = run(&["man", "--directory", dir.path().join("file/man").to_str().unwrap()]);
    assert!(refused.code == 2 && refused.talk.contains("file/man"), "u18: {refused:?}");
}

#[test]
fn u18_the_usage_shows_no_option_as_required_because_the_environment_sets_it() {
    let mut command = driftd(&["findings", "--no-such-option"]);
    let answer = Answer::of(command.env("DRIFTD_SOCKET", "/x").output().unwrap());
    assert_eq!(answer.code, 64);
    assert!(answer.talk.contains("Usage: driftd findings [OPTIONS]"), "{}", answer.talk);
}

#[test]
fn u14_findings_are_found_by_what_is_in_them() {
    let node = Node::start();
    let [mut curl, mut shell, mut mined, plain] =
        [(1, 10), (2, 20), (3, 30), (4, 40)].map(|(number, ago)| finding(number, ago));
    curl.image.name = Some("docker.io/library/nginx:1.25".into());
    curl.session = Some("ffeeddccbbaa99887766554433221100".parse().unwrap());
    shell.file = None;
    shell.expected = None;
    shell.kind = Kind::SessionInteractive;
    shell.severity = Severity::Medium;
    let container = shell.container.as_mut().unwrap();
    container.labels =
        std::collections::BTreeMap::from([("app.kubernetes.io/name".into(), "Pay \"x\"".into())])
            .into();
    container.pod = Some(model::Pod {
        namespace: "payments".into(),
        name: "pay-7d9f".into(),
        uid: "u".into(),
        container: None,
    });
    let argv = vec!["sh".into(), "-c".into(), "curl -s http://EVIL.example".into()];
    shell.process.as_mut().unwrap().argv = Some(argv);
    mined.kind = Kind::FileAdded;
    let file = mined.file.as_mut().unwrap();
    file.path = RootfsPath::new("/tmp/[x]/xmrig").unwrap();
    file.blake3 = Some(model::Blake3Hash([0xcd; 32]));
    mined.expected = None;
    node.found(&[curl.clone(), shell.clone(), mined.clone(), plain.clone()]);
    let mut group = finding(5, 50);
    (group.kind, group.files) = (Kind::FileAdded, Some(1));
    let member = Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: RootfsPath::new("/opt/Hidden/tool").unwrap(),
        kind: Kind::FileAdded,
        blake3: Some(model::Blake3Hash([0xee; 32])),
        first_seen: group.first_seen,
        last_seen: group.last_seen,
        removed: false,
    };
    let record = Record::Aggregate {
        finding: Box::new(group.clone()),
        changes: vec![MemberChange::Seen(member)],
    };
    let writer = node.writer.as_ref().unwrap();
    writer.records().send(record).unwrap();
    wait_until(|| writer.reader().count().unwrap() == 5);

    let all = [&curl, &shell, &mined, &plain, &group];
    for (arguments, expected) in [
        (&["--path", "/tmp/[x]/xmrig"][..], &[&mined][..]),
        (&["--path", "/tmp"], &[&mined]),
        (&["--path", "/tm"], &[]),
        (&["--path", "/tmp/[x]/*"], &[&mined]),
        (&["--path", "*/xmrig", "--path", "/opt"], &[&mined, &group]),
        (&["--path", "/opt/Hidden/tool"], &[&group]),
        (&["--hash", "cdcdcdcd"], &[&mined]),
        (&["--hash", "blake3:EEEEEEEEEE"], &[&group]),
        (&["--session", "ffeeddcc", "--kind", "exec.*", "--image", "nginx"], &[&curl]),
        (&["--pod", "pay-*"], &[&shell]),
        (&["--pod", "payments/pay-7d9f"], &[&shell]),
        (&["--pod-namespace", "payments"], &[&shell]),
        (&["--label", "app.kubernetes.io/name"], &[&shell]),
        (&["-l", "app.kubernetes.io/name=Pay \"x\""], &[&shell]),
        (&["-l", "app.kubernetes.io/name=pay"], &[]),
        (&["--text", "evil.EXAMPLE"], &[&shell]),
        (&["--text", "-c curl"], &[&shell]),
        (&["--text", "hidden/TOOL"], &[&group]),
        (&["--text", "schema"], &[]),
        (&["--text", "curl", "--text", "evil"], &[&shell]),
        (&["--image", "nginx"], &[&curl]),
        (&["--image", "nginx:1.2"], &[]),
        (&["--kind", "FILE.*,session.interactive"], &[&shell, &mined, &group]),
        (&["--severity", "MEDIUM", "--kind", "session.*"], &[&shell]),
        (&["-c", "web", "--since", "2 hours ago", "--until", "now"], &all),
        (&["--since", "2026-11-27", "--until", "1970-01-01 10:00"], &[]),
    ] {
        let answer = node.run(&[&["findings", "-q"], arguments].concat());
        let expected: String = expected.iter().map(|one| format!("{}\n", one.id)).collect();
        assert_eq!((answer.out, answer.code), (expected, 0), "{arguments:?} {}", answer.talk);
    }
    let shown = node.run(&["show", &mined.id.to_string(), "-o", "json"]);
    assert_eq!(shown.code, 0, "{}", shown.talk);
    let shown: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["id"], mined.id.to_string());
    assert_eq!(shown["also_in"], serde_json::json!({ "containers": 0, "newest": [] }));
    for (arguments, reason) in [
        (&["--hash", "cdcd"][..], "8 or more hexadecimal digits"),
        (&["--session", "no-session"], "8 or more hexadecimal digits"),
    ] {
        let answer = node.run(&[&["findings"], arguments].concat());
        assert_eq!(answer.code, 2);
        assert!(answer.talk.contains(reason), "{}", answer.talk);
    }
    // A follower's filter is the same.
    let mut following = Following::start(&node, &["--pod", "pay-*"]);
    following.expect(&shell);

    let shown = |arguments: &[&str]| {
        let mut command = node.command(arguments);
        command.env("TZ", "TST-5");
        Answer::of(command.output().unwrap()).out
    };
    let id = curl.id.to_string();
    assert!(shown(&["show", &id]).contains(" UTC\n"));
    assert!(shown(&["--local-time", "show", &id]).contains(" TST\n"));
}

#[test]
fn answers_are_yaml_or_the_columns_that_are_asked_for() {
    let node = Node::start();
    let mut one = finding(1, 10);
    one.image.name = Some("a: \u{1b}[2J\u{202e}\n- x".into());
    node.found(&[one.clone(), finding(2, 20)]);
    let yaml = node.run(&["findings", "-o", "yaml"]).out;
    assert!(!yaml.contains(['\u{1b}', '\u{202e}']), "{yaml}");
    assert_eq!(yaml.lines().filter(|line| line.starts_with("- ")).count(), 2, "{yaml}");
    assert!(yaml.contains(&format!("id: {}", finding(2, 20).id)), "{yaml}");
    let columns = "custom-columns=ID:.id,PATH:file.path,UPPER:.process.argv[0],APP:.no.such\\.key";
    let table = node.run(&["findings", "-o", columns]).out;
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "PATH", "UPPER", "APP"]);
    assert_eq!(lines[1][0], one.id.to_string());
    assert_eq!((lines[1][1], lines[1][3]), ("/usr/bin/curl", "<none>"), "{table}");
    let shown = node.run(&["show", &one.id.to_string(), "-o", "custom-columns=KIND:.kind"]).out;
    assert_eq!(shown, format!("KIND\n{}\n", one.kind));
}

#[test]
fn more_findings_than_fit_on_a_page_are_all_listed() {
    let node = Node::start();
    let many: Vec<Finding> = (0..2500_u32)
        .map(|number| {
            let mut finding = finding(0, i64::from(number));
            finding.id.0[..4].copy_from_slice(&number.to_be_bytes());
            finding
        })
        .collect();
    node.found(&many);
    let listed = node.run(&["findings", "-q"]);
    let expected: String = many.iter().map(|finding| format!("{}\n", finding.id)).collect();
    assert_eq!(listed.out, expected);
}

#[test]
fn an_unknown_or_ambiguous_container_is_told() {
    let node = Node::start();
    for (name, message) in [
        ("nope", "error: no container `nope` is known (see: driftd containers)\n"),
        ("w", "error: `w` could be 2 containers: write more of the ID, or NAMESPACE/ID\n"),
    ] {
        for arguments in [&["findings", "--container", name][..], &["diff", name]] {
            let answer = node.run(arguments);
            assert_eq!((answer.code, answer.talk.as_str()), (2, message), "{arguments:?}");
        }
    }
}

#[test]
fn diff_tells_drift_by_its_exit_code() {
    let node = Node::start();
    let drifted = node.run(&["diff", "web"]);
    assert_eq!(drifted.code, 1);
    assert_eq!(
        drifted.out,
        "CHANGE    SEVERITY  KIND        PATH\n\
         metadata  -         -           /bin/sh\n\
         added     LOW       file.added  /tmp/x\n"
    );
    assert_eq!(drifted.talk, "default/web: 2 differences, 1 of them drift\n");
    let drift = node.run(&["diff", "web", "--drift-only"]);
    assert_eq!((drift.code, drift.out.lines().count()), (1, 2), "u06: {drift:?}");
    assert_eq!(node.run(&["diff", "clean"]).code, 0);
    let half = node.run(&["diff", "half"]);
    assert_eq!(half.code, 2, "nothing found in a part is no answer: {half:?}");
}

#[test]
fn containers_status_and_baselines_answer() {
    let node = Node::start();
    let containers = node.run(&["containers"]);
    assert_eq!(
        containers.out,
        "NAMESPACE  CONTAINER  IMAGE   STATE    BASELINE  WATCHED       FINDINGS\n\
         default    web        shop:1  running  ready     before start  1\n"
    );
    assert_eq!(node.run(&["containers", "-q"]).out, "default/web\n");
    let json = node.run(&["containers", "-o", "jsonl"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&json["schema"], &json["pid"]), (&"driftd.container/v1".into(), &4242.into()));

    let status = node.run(&["status"]);
    assert_eq!(status.code, 1, "u10: answered, and the view is incomplete");
    assert!(status.out.starts_with("View        INCOMPLETE\n"), "{}", status.out);
    let json = node.run(&["status", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["complete"], false);
    assert_eq!(json["baselines_pending"], 2);

    assert_eq!(node.run(&["baseline", "ls", "-o", "json"]).out, "[]\n");
    let unknown = node.run(&["baseline", "record", "no:1"]);
    assert_eq!(
        (unknown.code, unknown.talk.as_str()),
        (2, "error: no image `no:1` is known to containerd\n")
    );
    assert_eq!(node.run(&["baseline", "show", "no:1"]).code, 2);
    assert_eq!(node.run(&["baseline", "export", "no:1"]).code, 2);
}

// ---- baselines

fn shop_node() -> Node {
    Node::start_filled(tempfile::tempdir().unwrap(), shops)
}

impl Node {
    /// The same question to the daemon, and to its directory of baselines.
    #[track_caller]
    fn ask_both(&self, arguments: &[&str]) -> Answer {
        let asked = self.run(arguments);
        let store = self.dir.path().join("state/baselines");
        let read = Answer::of(driftd(arguments).arg("--store").arg(store).output().unwrap());
        assert_eq!((asked.code, &asked.out), (read.code, &read.out), "{asked:?} {read:?}");
        assert_eq!(asked.talk, read.talk);
        asked
    }
}

/// Without what differs from run to run.
fn settled(text: &str) -> String {
    let mut lines = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let shown: Vec<&str> = words
            .iter()
            .enumerate()
            .map(|(at, word)| match words.get(at + 1) {
                Some(&"ago") => "…",
                _ => *word,
            })
            .collect();
        lines += &match shown.first() {
            Some(&"Recorded") => "Recorded …".to_owned(),
            _ => shown.join(" "),
        };
        lines.push('\n');
    }
    lines
}

#[test]
fn baselines_are_listed_and_shown_with_how_they_are_known() {
    let node = shop_node();
    node.ask_both(&["baseline", "ls", "-o", "json"]);
    insta::assert_snapshot!(settled(&node.run(&["baseline", "ls"]).out));
    insta::assert_snapshot!(settled(&node.ask_both(&["baseline", "show", "shop:1"]).out));
    let json = node.ask_both(&["baseline", "show", "shop:2", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["known_by"], "verified");
    assert_eq!(json["verified_at"], "2026-11-22T01:00:00Z");
    assert_eq!(json["proofs"][0]["layer"], json["layers"][0]);
    let unknown = node.ask_both(&["baseline", "show", "no:1"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.talk.contains("driftd baseline ls"), "{}", unknown.talk);
}

#[test]
fn images_are_compared_by_their_files() {
    let node = shop_node();
    let differ = node.ask_both(&["baseline", "diff", "shop:1", "shop:2"]);
    assert_eq!(differ.code, 1);
    insta::assert_snapshot!(differ.out + &differ.talk);
    let same = node.ask_both(&["baseline", "diff", "shop:1", "shop:1"]);
    assert_eq!((same.code, same.talk.as_str()), (0, "shop:1 and shop:1 hold the same files\n"));
    let unknown = node.ask_both(&["baseline", "diff", "shop:1", "no:1"]);
    assert_eq!((unknown.code, unknown.out.as_str()), (2, ""));

    let lines = node.ask_both(&["baseline", "diff", "shop:1", "shop:2", "-o", "jsonl"]).out;
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let changes: Vec<(&str, &str)> = lines
        .iter()
        .map(|line| (line["change"].as_str().unwrap(), line["path"].as_str().unwrap()))
        .collect();
    assert_eq!(
        changes,
        [
            ("modified", "/bin/lnk"),
            ("metadata", "/bin/ls"),
            ("added", "/bin/new\u{1b}[2J"),
            ("removed", "/bin/old"),
            ("modified", "/bin/sh"),
        ]
    );
    assert_eq!(lines[0]["a"]["link_target"], "sh");
    assert_eq!(lines[4]["b"]["blake3"], baseline::blake3_of("other").to_string());
}

#[test]
fn verifying_tells_by_its_exit_code_what_differs() {
    let node = Node::start_filled(tempfile::tempdir().unwrap(), |store| {
        shops(store);
        image(store, 3, "bare:1", vec![directory("/")]);
        image(store, 4, "gone:1", vec![directory("/")]);
    });
    let good = node.run(&["baseline", "verify", "shop:1"]);
    assert_eq!((good.code, good.talk.as_str()), (0, ""), "{good:?}");
    assert_eq!(node.run(&["baseline", "verify", "shop:2"]).code, 0, "its blob is the same");

    let tampered = node.run(&["baseline", "verify", "shop:2", "--deep"]);
    assert_eq!(tampered.code, 1);
    insta::assert_snapshot!(tampered.out);
    let unproved = node.run(&["baseline", "verify", "bare:1"]);
    assert_eq!(unproved.code, 2);
    assert!(unproved.out.starts_with("bare:1: NOT VERIFIED\n"), "{}", unproved.out);
    assert!(unproved.out.contains("containerd discards unpacked layers"), "{}", unproved.out);
    let unchanged = node.run(&["baseline", "verify", "bare:1", "--deep"]);
    assert_eq!(unchanged.code, 0, "its directory is the same: {unchanged:?}");
    assert!(unchanged.out.starts_with("bare:1: unchanged (but not verified)\n"), "{unchanged:?}");
    let failed = node.run(&["baseline", "verify", "gone:1"]);
    assert_eq!(failed.code, 2);
    assert!(failed.out.starts_with("gone:1: FAILED\n  the image's \\u{1b}[2J"), "{}", failed.out);
    assert_eq!(node.run(&["baseline", "verify", "no:1"]).code, 2);

    let all = node.run(&["baseline", "verify", "--deep", "-o", "jsonl"]);
    assert_eq!(all.code, 1, "a difference is told before a failure");
    let results: Vec<(String, String)> = all
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| {
            assert_eq!(line["schema"], "driftd.baseline_verification/v1");
            (line["image"].as_str().unwrap().into(), line["result"].as_str().unwrap().into())
        })
        .collect();
    let result = |image: &str, result: &str| (image.to_owned(), result.to_owned());
    assert_eq!(
        results,
        [
            result("bare:1", "same"),
            result("gone:1", "failed"),
            result("shop:1", "same"),
            result("shop:2", "differs"),
        ]
    );
    let json = node.run(&["baseline", "verify", "shop:2", "--deep", "-o", "json"]).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let layer = &json[0]["layers"][0];
    assert_eq!(layer["directory"]["state"], "differs");
    assert_eq!(layer["directory"]["differences"], 3);
    assert_eq!(layer["differences"][0]["found"]["mode"], "4755");
    assert_eq!(layer["differences"][1]["change"], "added");
}

#[test]
fn a_store_whose_files_are_not_whole_is_told_by_verify() {
    let node = shop_node();
    let store = node.dir.path().join("state/baselines");
    let verify =
        || Answer::of(driftd(&["baseline", "verify", "--store"]).arg(&store).output().unwrap());
    assert_eq!(verify().code, 0);
    let layer = store.join(format!("layers/{}.layer", DiffId([1; 32]).hex()));
    let whole = fs::read(&layer).unwrap();
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    let cut = verify();
    assert_eq!(cut.code, 2);
    assert!(cut.out.contains("shop:1: FAILED"), "{}", cut.out);
    assert!(cut.out.contains("shop:2: verified"), "{}", cut.out);
    assert!(layer.exists(), "nothing was set aside by a reader");
}

#[test]
fn baselines_are_removed_and_pruned() {
    let node = shop_node();
    let removed = node.run(&["baseline", "rm", "shop:1"]);
    assert_eq!((removed.code, removed.out), (0, format!("{}\n", ChainId([1; 32]))));
    assert!(removed.talk.contains("shop:1 is still an image"), "{}", removed.talk);
    assert_eq!(node.run(&["baseline", "show", "shop:1"]).code, 2);
    assert_eq!(node.run(&["baseline", "rm", "shop:1"]).code, 2);
    let pruned = node.run(&["baseline", "prune"]);
    assert_eq!((pruned.code, pruned.talk.as_str()), (0, ""));
    assert_eq!(pruned.out, "forgot 0 images and 0 layers, 0 B on disk\n");
    assert_eq!(node.run(&["baseline", "show", "shop:2"]).code, 0, "it has a name");
}

#[test]
fn status_and_metrics_count_baselines() {
    let node = shop_node();
    let status = node.run(&["status"]).out;
    let line = "Baselines   2 recorded, 2 of them verified, 2 waited for\n";
    assert!(status.contains(line), "{status}");
    let metrics = node.run(&["metrics"]);
    assert_eq!((metrics.code, metrics.talk.as_str()), (0, ""));
    for line in [
        "driftd_baselines{known_by=\"verified\"} 2.0\n",
        "driftd_containers{baseline=\"ready\"} 1.0\n",
        "driftd_view_complete 0.0\n",
        "driftd_containerd_connected{socket=\"/run/containerd/containerd.sock\"} 0.0\n",
        "driftd_losses_total{name=\"kernel_queue_overflow\"} 0\n",
    ] {
        assert!(metrics.out.contains(line), "{line}: {}", metrics.out);
    }
    assert!(!metrics.out.contains("# EOF"), "u16: the collector reads the format of Prometheus");
}

/// Names that nobody should give a file.
const HOSTILE: [&[u8]; 8] = [
    b"plain",
    b"back\\slash",
    b"new\nline",
    b"both\\n\nof\rthem",
    b"re\rturn",
    b" spaces  twice ",
    b"\x1b[2J\"quotes\"",
    b"not-utf8-\xff\xfe",
];

/// A directory of files with odd names, and a node on which it is an image.
fn hostile_node() -> (tempfile::TempDir, Node) {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let rootfs = tempfile::tempdir().unwrap();
    let inside = rootfs.path().join("dir");
    fs::create_dir(&inside).unwrap();
    for (number, name) in HOSTILE.iter().enumerate() {
        fs::write(inside.join(OsStr::from_bytes(name)), format!("content {number}")).unwrap();
    }
    fs::write(inside.join("re\u{fffd}placement"), "x").unwrap();
    std::os::unix::fs::symlink(OsStr::from_bytes(b"to-\xff"), inside.join("link")).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let walked = baseline::walk::walk(
        &pool,
        rootfs.path(),
        None,
        &std::sync::atomic::AtomicBool::new(false),
    );
    let node = Node::start_filled(tempfile::tempdir().unwrap(), |store| {
        image(store, 7, "docker.io/library/odd:1", walked.unwrap().entries);
    });
    (rootfs, node)
}

#[test]
fn b3sum_accepts_what_is_exported_for_it() {
    let (rootfs, node) = hostile_node();
    let export = node.ask_both(&["baseline", "export", "odd:1"]);
    assert_eq!(export.code, 0);
    assert_eq!(
        export.talk,
        "warning: 2 files were left out, because b3sum cannot check names that are not UTF-8 or \
         hold U+FFFD (use -o jsonl)\n"
    );
    let sums = node.dir.path().join("sums");
    fs::write(&sums, &export.out).unwrap();
    let check = || {
        Command::new("b3sum")
            .arg("--check")
            .arg(&sums)
            .current_dir(rootfs.path())
            .output()
            .expect("b3sum is installed by scripts/setup")
    };
    let checked = check();
    assert!(checked.status.success(), "{checked:?}");
    let lines = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(lines.matches(": OK\n").count(), HOSTILE.len() - 1, "{lines}");

    fs::write(rootfs.path().join("dir/new\nline"), "other").unwrap();
    let checked = check();
    assert!(!checked.status.success());
    let lines = String::from_utf8(checked.stdout).unwrap();
    assert!(lines.contains("\\./dir/new\\nline: FAILED"), "{lines}");
}

#[test]
fn exported_lines_hold_every_file_whole() {
    let (_rootfs, node) = hostile_node();
    let lines = node.ask_both(&["baseline", "export", "odd:1", "-o", "jsonl"]).out;
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (number, name) in HOSTILE.iter().enumerate() {
        let path = RootfsPath::new([b"/dir/", *name].concat()).unwrap();
        let is_it = |line: &&serde_json::Value| {
            serde_json::from_value::<RootfsPath>((*line).clone()).unwrap() == path
        };
        let found: Vec<_> = lines.iter().filter(is_it).collect();
        let [line] = found[..] else { panic!("{path}: {found:?}") };
        let hash = baseline::blake3_of(&format!("content {number}"));
        assert_eq!(line["blake3"], hash.to_string());
        assert_eq!((&line["file_type"], &line["uid"]), (&"regular".into(), &0.into()));
    }
    let link = lines.iter().find(|line| line["path"] == "/dir/link").unwrap();
    assert_eq!((&link["link_target"], &link["blake3"]), (&"to-\\xff".into(), &().into()));
    assert_eq!(link["link_target_bytes"], "dG8t/w==");
    let all: std::collections::BTreeSet<String> = lines
        .iter()
        .map(|line| line["path"].to_string() + &line["path_bytes"].to_string())
        .collect();
    assert_eq!(all.len(), lines.len(), "no path is there twice");
}

#[test]
fn a_bom_has_what_its_schema_asks_for() {
    let (_rootfs, node) = hostile_node();
    let export = node.ask_both(&["baseline", "export", "odd:1", "-o", "cyclonedx"]);
    assert_eq!((export.code, export.talk.as_str()), (0, ""));
    assert_eq!(export.out, node.run(&["baseline", "export", "odd:1", "-o", "cyclonedx"]).out);
    let bom: serde_json::Value = serde_json::from_str(&export.out).unwrap();
    assert_eq!((&bom["bomFormat"], &bom["specVersion"]), (&"CycloneDX".into(), &"1.6".into()));
    assert_eq!(bom["version"], 1);
    assert!(bom["serialNumber"].as_str().unwrap().starts_with("urn:uuid:"));
    let image = &bom["metadata"]["component"];
    assert_eq!(
        (&image["type"], &image["name"]),
        (&"container".into(), &"docker.io/library/odd:1".into())
    );
    assert_eq!(image["version"], ManifestDigest([7; 32]).to_string());
    assert_eq!(
        image["hashes"],
        serde_json::json!([{"alg": "SHA-256", "content": ManifestDigest([7; 32]).hex()}])
    );
    assert_eq!(
        image["purl"],
        format!(
            "pkg:oci/odd@sha256%3A{}?repository_url=docker.io/library/odd&tag=1",
            ManifestDigest([7; 32]).hex()
        )
    );
    let components = bom["components"].as_array().unwrap();
    assert_eq!(components.len(), HOSTILE.len() + 1, "regular files, and nothing else");
    let mut references: std::collections::BTreeSet<&str> =
        components.iter().map(|component| component["bom-ref"].as_str().unwrap()).collect();
    references.insert(image["bom-ref"].as_str().unwrap());
    assert_eq!(references.len(), components.len() + 1, "every reference is there once");
    for component in components {
        assert_eq!(component["type"], "file");
        assert!(component["name"].as_str().unwrap().starts_with("/dir/"));
        assert_eq!(component["hashes"][0]["alg"], "BLAKE3");
        assert_eq!(component["hashes"][0]["content"].as_str().unwrap().len(), 64);
    }
}

#[test]
fn a_statement_is_about_the_images_manifest() {
    let (_rootfs, node) = hostile_node();
    let export = node.ask_both(&["baseline", "export", "odd:1", "-o", "in-toto"]);
    assert_eq!((export.code, export.talk.as_str()), (0, ""));
    let statement: serde_json::Value = serde_json::from_str(&export.out).unwrap();
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    assert_eq!(
        statement["subject"],
        serde_json::json!([{
            "name": "docker.io/library/odd:1",
            "digest": {"sha256": ManifestDigest([7; 32]).hex()},
        }])
    );
    assert_eq!(statement["predicateType"], "urn:driftd:baseline:v1");
    let predicate = &statement["predicate"];
    assert_eq!(predicate["known_by"], "verified");
    assert_eq!(predicate["layers"][0]["id"], DiffId([7; 32]).to_string());
    let files = predicate["files"].as_array().unwrap();
    // The root, the directory, the link, and the files.
    assert_eq!(files.len(), 3 + HOSTILE.len() + 1);
    assert!(!export.out.contains(&Timestamp::now().to_string()[..10]), "no clock is in it");
}

// ---- without a daemon

/// The archive of a layer: paths and contents; directories end with a slash.
fn layer_tar(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_entry_type(match path.ends_with('/') {
            true => tar::EntryType::Directory,
            false => tar::EntryType::Regular,
        });
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    ManifestDigest(sha2::Sha256::digest(bytes).into()).hex()
}

/// An OCI layout in a directory.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new() -> Layout {
        let layout = Layout(tempfile::tempdir().unwrap());
        fs::create_dir_all(layout.0.path().join("blobs/sha256")).unwrap();
        fs::write(layout.0.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layout
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn blob_path(&self, hex: &str) -> PathBuf {
        self.0.path().join("blobs/sha256").join(hex)
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let hex = sha256(bytes);
        fs::write(self.blob_path(&hex), bytes).unwrap();
        serde_json::json!({
            "mediaType": media_type,
            "digest": format!("sha256:{hex}"),
            "size": bytes.len(),
        })
    }

    /// Adds an image of these layers, gzipped, and answers with its manifest.
    fn image(&self, name: &str, layers: &[Vec<u8>]) -> serde_json::Value {
        let diff_ids: Vec<String> =
            layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(
                "application/vnd.oci.image.config.v1+json",
                config.to_string().as_bytes(),
            ),
            "layers": layers
                .iter()
                .map(|layer| {
                    self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(layer))
                })
                .collect::<Vec<_>>(),
        });
        let mut descriptor = self
            .blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
        descriptor["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        descriptor
    }

    fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.0.path().join("index.json"), index.to_string()).unwrap();
    }
}

fn base_layer() -> Vec<u8> {
    layer_tar(&[("bin/", ""), ("bin/ls", "ls"), ("bin/sh", "sh")])
}

#[test]
fn a_pipeline_records_exports_and_compares_without_a_daemon() {
    let layout = Layout::new();
    let old = layout.image("shop:1", &[base_layer()]);
    let new =
        layout.image("shop:2", &[base_layer(), layer_tar(&[("bin/", ""), ("bin/sh", "changed")])]);
    layout.index(&[old, new]);
    let scratch = tempfile::tempdir().unwrap();
    let store = scratch.path().join("baselines");
    let at = ["--store", store.to_str().unwrap()];
    let offline = |arguments: &[&str]| run(&[arguments, &at].concat());

    let recorded = offline(&["baseline", "record", "--from-archive", layout.path()]);
    assert_eq!((recorded.code, recorded.talk.as_str()), (0, ""), "{recorded:?}");
    assert_eq!(
        recorded.out,
        "shop:1: 2 files, 4 B in 1 layers, verified\nshop:2: 2 files, 9 B in 2 layers, verified\n"
    );
    assert_eq!(offline(&["baseline", "verify"]).code, 0);
    let differ = offline(&["baseline", "diff", "shop:1", "shop:2", "-q"]);
    assert_eq!((differ.code, differ.out.as_str()), (1, "/bin/sh\n"), "{differ:?}");

    let rootfs = scratch.path().join("rootfs/bin");
    fs::create_dir_all(&rootfs).unwrap();
    fs::write(rootfs.join("ls"), "ls").unwrap();
    fs::write(rootfs.join("sh"), "changed").unwrap();
    let sums = scratch.path().join("sums");
    fs::write(&sums, offline(&["baseline", "export", "shop:2"]).out).unwrap();
    let checked = Command::new("b3sum")
        .args(["--check", sums.to_str().unwrap()])
        .current_dir(scratch.path().join("rootfs"))
        .output()
        .expect("b3sum is installed by scripts/setup");
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "./bin/ls: OK\n./bin/sh: OK\n");

    // Another machine records the same bytes at another time.
    let elsewhere = scratch.path().join("elsewhere");
    let elsewhere = ["--store", elsewhere.to_str().unwrap()];
    let again = ["baseline", "record", "--from-archive", layout.path()];
    assert_eq!(run(&[&again[..], &elsewhere].concat()).code, 0);
    for format in ["b3sum", "jsonl", "cyclonedx", "in-toto"] {
        let export = ["baseline", "export", "shop:2", "-o", format];
        let (one, other) = (offline(&export), run(&[&export[..], &elsewhere].concat()));
        assert_eq!((one.code, &one.out), (0, &other.out), "{format}");
    }
}

#[test]
fn what_docker_saves_is_recorded_under_the_name_it_is_given() {
    let layer = base_layer();
    let config = serde_json::json!({
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
    });
    let manifest = serde_json::json!([
        {"Config": "config.json", "RepoTags": ["shop:saved"], "Layers": ["abc/layer.tar"]},
    ]);
    let mut saved = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("abc/layer.tar", layer.as_slice()),
        ("config.json", config.to_string().as_bytes()),
        ("manifest.json", manifest.to_string().as_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        saved.append_data(&mut header, name, bytes).unwrap();
    }
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("saved.tar");
    fs::write(&file, saved.into_inner().unwrap()).unwrap();
    let store = scratch.path().join("baselines");
    let record = |more: &[&str]| {
        let file = file.to_str().unwrap();
        let store = store.to_str().unwrap();
        run(&[&["baseline", "record", "--from-archive", file, "--store", store], more].concat())
    };
    let unknown = record(&["--image", "shop:\u{1b}[2J"]);
    assert_eq!((unknown.code, unknown.out.as_str()), (2, ""));
    assert!(unknown.talk.contains("shop:saved"), "{}", unknown.talk);
    let recorded = record(&["--image", "shop:saved", "--name", "shop:ci", "-o", "json"]);
    assert_eq!(recorded.code, 0, "{recorded:?}");
    let json: serde_json::Value = serde_json::from_str(&recorded.out).unwrap();
    assert_eq!(json[0]["names"], serde_json::json!(["shop:ci"]));
    assert_eq!(
        (&json[0]["known_by"], &json[0]["manifest_digest"]),
        (&"verified".into(), &().into())
    );

    // Nobody knows its manifest: a statement is about the layer.
    let export = ["baseline", "export", "shop:ci", "-o", "in-toto", "--store"];
    let statement = run(&[&export[..], &[store.to_str().unwrap()]].concat());
    let statement: serde_json::Value = serde_json::from_str(&statement.out).unwrap();
    assert_eq!(statement["subject"][0]["digest"]["sha256"], sha256(&layer));
}

#[test]
fn an_archive_that_is_not_what_its_digests_say_stores_nothing() {
    let layout = Layout::new();
    layout.index(&[layout.image("shop:1", &[base_layer()])]);
    let layer = layout.blob_path(&sha256(&gzip(&base_layer())));
    let whole = fs::read(&layer).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let store = scratch.path().join("baselines");
    let record = || {
        let store = store.to_str().unwrap();
        run(&["baseline", "record", "--from-archive", layout.path(), "--store", store])
    };
    let other = gzip(&layer_tar(&[("bin/", ""), ("bin/ls", "evil")]));
    for damaged in [&whole[..whole.len() / 2], &other] {
        fs::write(&layer, damaged).unwrap();
        let refused = record();
        assert_eq!((refused.code, refused.out.as_str()), (2, ""), "{refused:?}");
        assert!(refused.talk.contains("it is damaged, or somebody changed it"), "{}", refused.talk);
        let kept: Vec<_> = fs::read_dir(store.join("layers")).unwrap().collect();
        assert_eq!(kept.len(), 0, "{kept:?}");
    }
    fs::write(&layer, &whole).unwrap();
    assert_eq!(record().code, 0);

    let wrong = ["baseline", "record", "--from-archive", "/dev/null", "--store", "/tmp/x"];
    assert_eq!(run(&wrong).code, 2);
    assert_eq!(run(&wrong[..4]).code, 64, "a directory must be named");
}

#[test]
fn a_running_daemons_store_is_not_written_by_others() {
    let layout = Layout::new();
    layout.index(&[layout.image("shop:1", &[base_layer()])]);
    let directory = tempfile::tempdir().unwrap();
    let claim = Store::claim(directory.path()).unwrap();
    Store::open(directory.path(), Arc::default()).unwrap();
    let record = || {
        let store = directory.path().to_str().unwrap();
        run(&["baseline", "record", "--from-archive", layout.path(), "--store", store])
    };
    let refused = record();
    assert_eq!(refused.code, 2);
    assert!(refused.talk.contains("another process writes to"), "{}", refused.talk);
    let read = ["baseline", "ls", "--store", directory.path().to_str().unwrap()];
    assert_eq!(run(&read).code, 0, "reading is no matter");
    drop(claim);
    assert_eq!(record().code, 0);
}

#[test]
fn a_response_is_kept_with_who_asked_and_why() {
    let node = Node::start();
    let drift = finding(1, 60);
    node.found(std::slice::from_ref(&drift));
    let id = drift.id.to_string();
    let done = node.run(&["respond", "kill", "web", "--reason", "  dropped a program "]);
    assert_eq!((done.code, done.talk.as_str()), (0, ""));
    assert_eq!(done.out, "kill default/web: done: as the script says\n");
    let failed = node.run(&["respond", "pause", "clean", "--reason", "x"]);
    assert_eq!(failed.code, 2);
    assert_eq!(failed.out, "pause default/clean: FAILED: as the script says\n");

    // A finding that names its run is answered by its ID; one that does not cannot be.
    let unnamed = node.run(&["respond", "kill", "--finding", &id, "--reason", "x"]);
    assert_eq!((unnamed.code, unnamed.out.as_str()), (2, ""));
    assert!(unnamed.talk.contains("name the container instead"), "{}", unnamed.talk);
    let mut named = finding(2, 60);
    named.run = Some(Incarnation { pid: 7, start_time: Some(700), created_at: None });
    named.container.as_mut().unwrap().id = ContainerId::new("default", "clean");
    node.found(std::slice::from_ref(&named));
    let of_it = named.id.to_string();
    let done = node.run(&["respond", "pause", "--finding", &of_it[..8], "--reason", "x"]);
    assert_eq!(done.out, "pause default/clean: FAILED: as the script says\n", "{done:?}");
    let other = node.run(&["respond", "pause", "web", "--finding", &of_it, "--reason", "x"]);
    assert_eq!(other.code, 2);
    assert!(other.talk.contains("is of container default/clean"), "{}", other.talk);
    assert_eq!(node.run(&["respond", "pause", "--reason", "x"]).code, 64);

    // Whoever was answered finds the response in the history: no waiting here.
    let web = ContainerId::new("default", "web");
    let reader = node.writer.as_ref().unwrap().reader();
    let responses = reader.responses(&web).unwrap();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].reason, "dropped a program");
    let by = &responses[0].requested_by;
    assert!(by.starts_with("uid 0 pid "), "{by} (this test needs root)");
    assert!(by.ends_with(&format!(" ({})", env!("CARGO_BIN_EXE_driftd"))), "{by}");
    let shown = node.run(&["show", &id]).out;
    assert!(shown.contains("Response    kill done: as the script says ("), "{shown}");
    assert!(shown.contains("because dropped a program\n"), "{shown}");

    let restarter = |arguments: &[&str]| {
        let done = node.run(&[&["respond"], arguments, &["--reason", "x", "-o", "json"]].concat());
        serde_json::from_str::<serde_json::Value>(&done.out).unwrap()["outcome"]["restarter"]
            .clone()
    };
    assert_eq!(restarter(&["kill", "web"]), "restart_monitor", "d01");
    assert_eq!(restarter(&["kill", "web", "--no-restart"]), serde_json::Value::Null, "d01");
}

// ---- following

/// Reads from `driftd findings --follow -o jsonl`, or from `driftd sessions`.
struct Following {
    _child: Running,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    talk: BufReader<std::process::ChildStderr>,
}

impl Following {
    fn start(node: &Node, arguments: &[&str]) -> Following {
        Following::of("findings", node, arguments)
    }

    fn of(what: &str, node: &Node, arguments: &[&str]) -> Following {
        let mut child = node
            .command(&[what, "--follow", "-o", "jsonl"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let talk = BufReader::new(child.stderr.take().unwrap());
        Following { _child: Running(child), lines, talk }
    }

    #[track_caller]
    fn next(&mut self) -> serde_json::Value {
        serde_json::from_str(&self.lines.next().expect("the stream goes on").unwrap()).unwrap()
    }

    #[track_caller]
    fn expect(&mut self, finding: &Finding) {
        assert_eq!(self.next()["id"], finding.id.to_string());
    }

    /// The next line on stderr.
    fn says(&mut self) -> String {
        let mut line = String::new();
        self.talk.read_line(&mut line).unwrap();
        line
    }
}

#[test]
fn u07_a_follower_goes_on_behind_its_cursor_when_the_daemon_is_back() {
    let mut node = Node::start();
    let all: Vec<Finding> = (1..=5).map(|number| finding(number, 0)).collect();
    node.found(&all[..2]);
    let mut following = Following::start(&node, &["--container", "web"]);
    let mut latest = Following::start(&node, &["--after", "latest"]);
    for (index, finding) in all[..2].iter().enumerate() {
        let line = following.next();
        assert_eq!(line["id"], finding.id.to_string());
        assert_eq!(line["schema"], "driftd.finding/v1");
        assert_eq!(line["cursor"], index + 1, "each line names the cursor to go on with");
    }
    // It has begun, and nothing has come yet.
    assert_eq!(latest.says(), "following what comes after 2\n");
    node.stop_server();
    node.writer.take().unwrap().stop();
    let dir = std::mem::replace(&mut node.dir, tempfile::tempdir().unwrap());
    node.writer = Some(History::open(node.dir.path()).unwrap().start(RETENTION, Arc::default()));
    assert!(following.says().contains("go on after 2"), "the follower reports where it goes on");

    let node = Node::start_in(dir);
    node.found(&all[2..4]);
    for finding in &all[2..4] {
        following.expect(finding);
        latest.expect(finding);
    }
    node.found(&all[4..]);
    let line = following.next();
    assert_eq!((&line["id"], &line["cursor"]), (&all[4].id.to_string().into(), &5.into()));

    let mut resumed = Following::start(&node, &["--after", "3"]);
    resumed.expect(&all[3]);
    resumed.expect(&all[4]);
}

#[test]
fn sessions_are_told_to_those_who_follow_them() {
    let mut node = Node::start();
    let (first, second) = (session(1, 60), session(2, 30));
    node.told(&first, &[command(&first, 1, &["ls"], 50)]);
    node.found(&[finding(3, 0)]);
    let mut findings = Following::start(&node, &[]);
    let mut sessions = Following::of("sessions", &node, &["-c", "web"]);
    let mut open = Following::of("sessions", &node, &["--open"]);
    let as_followed = |session: &Session, cursor: u64| {
        let mut json = serde_json::to_value(session).unwrap();
        json["cursor"] = cursor.into();
        json
    };
    assert_eq!(sessions.next(), as_followed(&first, 1));
    assert_eq!(open.next()["id"], first.id.to_string());
    let over = closed(&first, 0);
    node.told(&over, &[]);
    node.told(&second, &[]);
    assert_eq!(sessions.next(), as_followed(&over, 3));
    assert_eq!(sessions.next()["id"], second.id.to_string());
    assert_eq!(open.next()["id"], second.id.to_string(), "its end is not told");

    // Whoever follows findings is told of findings.
    findings.expect(&finding(3, 0));
    node.found(&[finding(4, 0)]);
    findings.expect(&finding(4, 0));
    node.stop_server();
    assert!(sessions.says().contains("waiting for it, to go on after 5"));
}

#[test]
fn a_follower_is_told_of_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let writer = History::open(&dir.path().join("state")).unwrap().start(RETENTION, Arc::default());
    let mut committed = writer.committed();
    let month = 31 * 24 * 60 * 60;
    for finding in [finding(1, month), finding(2, month), finding(3, 0)] {
        writer.records().send(Record::Finding(Box::new(finding))).unwrap();
    }
    wait_until(|| *committed.borrow_and_update() >= 3);
    writer.stop();

    let node = Node::start_in(dir);
    node.found(&[finding(3, 0)]);
    let records = node.writer.as_ref().unwrap().records();
    let lost = |container: &str| Record::Gap {
        name: "kernel_queue_overflow".into(),
        container: Some(ContainerId::new("default", container)),
        detail: "the kernel dropped events".into(),
        at: Timestamp::now(),
        until: None,
    };
    wait_until(|| {
        let reader = node.writer.as_ref().unwrap().reader();
        reader.after(0, &Filter::default(), 1).unwrap().pruned_through == 2
    });

    let mut following = Following::start(&node, &["--after", "1", "--container", "web"]);
    let gap = following.next();
    assert_eq!((&gap["schema"], &gap["name"]), (&"driftd.gap/v1".into(), &"history_pruned".into()));
    following.expect(&finding(3, 0));
    records.send(lost("other")).unwrap();
    records.send(lost("web")).unwrap();
    let gap = following.next();
    assert_eq!(gap["name"], "kernel_queue_overflow");
    assert_eq!(gap["container"]["id"], "web", "another container's gap is not told");

    // From the oldest kept on, nothing is missing.
    let mut whole = Following::start(&node, &[]);
    whole.expect(&finding(3, 0));

    // A cursor of a history that was moved aside.
    let mut lost = Following::start(&node, &["--after", "1000000"]);
    assert_eq!(lost.next()["name"], "history_replaced");
    lost.expect(&finding(3, 0));
}

#[test]
fn a_follower_that_does_not_read_holds_up_nobody() {
    let node = Node::start();
    // Its pipe is full soon, and it stays so.
    let stuck = Following::start(&node, &[]);
    let many: Vec<Finding> = (0..2000_u32)
        .map(|number| {
            let mut finding = finding(0, 0);
            finding.id.0[..4].copy_from_slice(&number.to_be_bytes());
            finding
        })
        .collect();
    node.found(&many);
    assert_eq!(node.run(&["findings", "-q"]).out.lines().count(), 2000);
    drop(stuck);
}

// ---- who may ask

#[test]
fn strangers_are_refused_by_name() {
    let node = Node::start();
    let mode = fs::metadata(node.socket()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660);

    // The socket's mode keeps strangers out; here it is lifted, to meet the second lock.
    for directory in [node.dir.path(), &node.dir.path().join("run")] {
        fs::set_permissions(directory, Permissions::from_mode(0o755)).unwrap();
    }
    let binary = node.dir.path().join("driftd");
    executable::write(&binary, &fs::read(env!("CARGO_BIN_EXE_driftd")).unwrap()).unwrap();
    let ask = || {
        let output = Command::new(&binary)
            .arg("findings")
            .env("DRIFTD_SOCKET", node.socket())
            .current_dir("/")
            .uid(65534)
            .gid(65534)
            .output()
            .expect("this test needs root");
        Answer::of(output)
    };
    let locked_out = ask();
    assert_eq!(locked_out.code, 2);
    assert_eq!(
        locked_out.talk,
        format!(
            "error: may not use {}: only root and members of the group driftd may (try: sudo)\n",
            node.socket().display()
        )
    );
    fs::set_permissions(node.socket(), Permissions::from_mode(0o666)).unwrap();
    let refused = ask();
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert!(refused.talk.starts_with("error: uid 65534 may not ask driftd: "), "{refused:?}");
}

#[track_caller]
fn refusal(path: &Path) -> String {
    Listener::bind(path).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn a_socket_is_taken_over_only_from_the_dead() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run/driftd.sock");

    let first = Listener::bind(&path).unwrap();
    let err = refusal(&path);
    assert!(err.starts_with(&format!("another driftd serves {}", path.display())), "{err}");
    drop(first);
    assert!(!path.exists(), "removed at the end");

    // A daemon that was killed leaves its socket behind.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(Listener::bind(&path).unwrap());

    fs::write(&path, "precious").unwrap();
    let err = refusal(&path);
    assert!(err.contains("is no socket"), "{err}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn health_and_reflection_are_served() {
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let node = Node::start();
    let address = format!("unix:{}", node.socket().display());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let channel =
            tonic::transport::Endpoint::try_from(address).unwrap().connect().await.unwrap();
        let request = HealthCheckRequest { service: "driftd.v1.DriftService".into() };
        let health = HealthClient::new(channel.clone()).check(request).await.unwrap();
        assert_eq!(health.into_inner().status(), ServingStatus::Serving);

        let other = channel.clone();
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let answer = ServerReflectionClient::new(channel)
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
            panic!("{answer:?}");
        };
        let names: Vec<String> = services.service.into_iter().map(|service| service.name).collect();
        assert!(names.contains(&"driftd.v1.DriftService".to_owned()), "{names:?}");

        use tonic_reflection::pb::v1alpha as alpha;
        let request = alpha::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(alpha::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            )),
        };
        let answer = alpha::server_reflection_client::ServerReflectionClient::new(other)
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap()
            .into_inner()
            .message()
            .await
            .unwrap()
            .unwrap();
        assert!(format!("{answer:?}").contains("driftd.v1.DriftService"), "u09: {answer:?}");
    });
}
