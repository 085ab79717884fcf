//! The built binary, the API and the history together. The pipeline is played
//! by a thread that answers questions from a fixed script.

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
use driftd::baseline::{self, Progress, Proof, Recorded};
use driftd::health::Health;
use driftd::history::{Filter, FindingLookup, History, Record, Writer};
use driftd::model::{
    Container, ContainerId, Finding, ImageReference, Kind, Outcome, RootfsPath, Severity,
    Task,
};
use driftd::pipeline::{
    ContainerView, Diff, Difference, DifferenceKind, EndpointView, LookupError, Question, Status,
};
use driftd::respond::Response;
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
            baselines,
            images: Arc::new(NoImages),
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

struct NoImages;

impl api::RecordImage for NoImages {
    fn record_image<'a>(
        &'a self,
        name: &'a str,
        _proof: Proof,
        progress: Arc<Progress>,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Recorded, String>> + Send + 'a>> {
        progress.layers_total.store(3, std::sync::atomic::Ordering::Relaxed);
        Box::pin(async move { Err(format!("no image `{name}` is known to containerd")) })
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
            labels: [("app".into(), "shop".into())].into(),
            pod: None,
            image: ImageReference { name: Some("shop:1".into()), ..ImageReference::default() },
            snapshotter: "overlayfs".into(),
            snapshot_key: "web".into(),
            layers: vec![],
            rootfs: None,
            task: Some(Task { pid: 4242, paused: false }),
            no_baseline: None,
            id_map: None,
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
fn answer(question: Question, records: &crossbeam_channel::Sender<Record>) {
    let lookup = |text: &str| match text {
        "web" | "default/web" => Ok(ContainerId::new("default", "web")),
        "clean" | "half" => Ok(ContainerId::new("default", text)),
        "w" => Err(LookupError::Ambiguous("w".into(), 2)),
        other => Err(LookupError::Unknown(other.into())),
    };
    match question {
        Question::Status(reply) => {
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
            });
        }
        Question::Containers(reply) => {
            let _ = reply.send(vec![view()]);
        }
        Question::Diff { container, reply } => {
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
        Question::Respond { container, action, reason, requested_by, reply } => {
            let _ = reply.send(lookup(&container).map(|container| {
                let response = Response {
                    outcome: Outcome {
                        action: action.name().into(),
                        succeeded: &*container.id == "web",
                        message: "as the script says".into(),
                        at: Timestamp::now(),
                    },
                    container,
                    reason,
                    requested_by,
                    requested_at: Timestamp::now(),
                    finding: None,
                };
                records.send(Record::Response(Box::new(response.clone()))).unwrap();
                response
            }));
        }
        Question::Lookup { container, reply } => {
            let _ = reply.send(lookup(&container));
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
        &["baseline", "export", "--help"],
        &["containers", "--help"],
        &["diff", "--help"],
        &["findings", "--help"],
        &["show", "--help"],
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
        (&["findings", "--since", "yesterday"], "2h"),
        (&["findings", "--follow", "--exit-code"], "--exit-code"),
        (&["findings", "--follow", "-o", "json"], "jsonl"),
        (&["findings", "-o", "xml"], "jsonl"),
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
        &["diff", "web"],
        &["baseline", "ls"],
        &["baseline", "record", "x"],
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
    assert_eq!(ids(&["--container", "4f1c"]), newest_first(&[&elsewhere]), "gone, by its prefix");
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
        (2, "error: no finding `ee` (see: driftd findings)\n")
    );
    let several = node.run(&["show", "0"]);
    assert_eq!(
        (several.code, several.talk.as_str()),
        (2, "error: `0` could be 3 findings: write more of the ID\n")
    );
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
    assert_eq!(status.code, 0, "answered");
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
}

// ---- following

/// Reads findings' IDs from `driftd findings --follow -o jsonl`.
struct Following {
    child: Running,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Following {
    fn start(node: &Node, arguments: &[&str]) -> Following {
        let mut child = node
            .command(&["findings", "--follow", "-o", "jsonl"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Following { child: Running(child), lines }
    }

    #[track_caller]
    fn next(&mut self) -> serde_json::Value {
        serde_json::from_str(&self.lines.next().expect("the stream goes on").unwrap()).unwrap()
    }

    #[track_caller]
    fn expect(&mut self, finding: &Finding) {
        assert_eq!(self.next()["id"], finding.id.to_string());
    }

    fn end(mut self) -> (i32, String) {
        assert!(self.lines.next().is_none());
        let mut talk = String::new();
        let mut stderr = self.child.0.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut stderr, &mut talk).unwrap();
        (self.child.0.wait().unwrap().code().unwrap(), talk)
    }
}

#[test]
fn a_follower_sees_what_is_kept_then_what_comes_and_resumes() {
    let mut node = Node::start();
    let all: Vec<Finding> = (1..=4).map(|number| finding(number, 0)).collect();
    node.found(&all[..2]);
    let mut following = Following::start(&node, &["--container", "web"]);
    following.expect(&all[0]);
    following.expect(&all[1]);
    node.found(&all[2..3]);
    following.expect(&all[2]);

    // driftd stops: the follower is told where to go on.
    node.stop_server();
    let (code, talk) = following.end();
    assert_eq!(code, 2);
    assert_eq!(
        talk,
        "error: driftd has stopped (when it runs again, go on with: driftd findings --follow \
         --after 3)\n"
    );

    node.writer.take().unwrap().stop();
    let dir = std::mem::replace(&mut node.dir, tempfile::tempdir().unwrap());
    node.writer = Some(History::open(node.dir.path()).unwrap().start(RETENTION, Arc::default()));
    let node = Node::start_in(dir);
    let mut following = Following::start(&node, &["--after", "3"]);
    node.found(&all[3..]);
    following.expect(&all[3]);
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
    fs::copy(env!("CARGO_BIN_EXE_driftd"), &binary).unwrap();
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
    });
}
