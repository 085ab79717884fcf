//! The loop's rules, by value: a script of inputs in, what was told out.

use super::*;
use crate::baseline::{FileEntry, ImageBaseline, LayerDifference, LayerEntry, blake3_of};
use crate::config::Respond;
use crate::history::MemberChange;
use crate::model::{
    self, Ancestor, DeclaredProbe, DiffId, Entry as By, EntryPoint, Exit, FileTime, FileType,
    Format, IdRange, ImageReference, Interactive, Layer, LayerFile, LayerId, Opening, OverlayDirs,
    ProbeSource, ProcessIdentity, Restarter, Run, SessionState, Sha256Hash, Task,
};
use crate::watch::Verdict;

mod quiet;

const IMAGE: &str = "
/bin 755 dir
/tmp 1777 dir
/bin/busybox 755 elf busybox
/bin/ls 755 elf ls
/usr/bin/curl 755 elf curl
/usr/bin/dpkg 755 elf dpkg
/usr/bin/ld 755 elf ld
/usr/sbin/useradd 755 elf useradd
/etc/app.conf 644 data conf
";
const ENDPOINT: &str = "/run/containerd/containerd.sock";

/// A node that is a list of lines.
struct Node {
    state: State,
    clock: i64,
    /// The run in which things are observed.
    init: ProcessIdentity,
    /// Every finding revision that was recorded, in order.
    told: Vec<Finding>,
    commands: Vec<SensorCommand>,
    orders: Vec<ResponseRequest>,
    responses: Vec<Response>,
    gaps: Vec<String>,
    /// What was told of aggregated findings' files.
    changes: Vec<(FindingId, MemberChange)>,
    jobs: usize,
    /// Every revision of a session, and its new commands.
    sessions: Vec<(Session, Vec<model::Command>)>,
    probes: Vec<Probe>,
}

impl Node {
    fn new(respond: Respond, known: Vec<Finding>) -> Node {
        let policy = Policy { generation: 1, respond, ..Policy::default() };
        let state = State::new("node".into(), policy, Arc::default(), known, Timestamp::UNIX_EPOCH);
        Node {
            state,
            clock: 0,
            init: init(7),
            told: Vec::new(),
            commands: Vec::new(),
            orders: Vec::new(),
            responses: Vec::new(),
            gaps: Vec::new(),
            changes: Vec::new(),
            jobs: 0,
            sessions: Vec::new(),
            probes: Vec::new(),
        }
    }

    /// A node that runs container `c1`, whose baseline is ready.
    fn running() -> Node {
        let mut node = Node::new(Respond::default(), Vec::new());
        node.play("start c1\nbaseline\nattached c1");
        node
    }

    fn play(&mut self, script: &str) -> &mut Node {
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let input = self.input(line);
            self.give(input);
        }
        self
    }

    fn give(&mut self, input: Input) {
        self.clock += 1;
        let now = Timestamp::from_second(self.clock).unwrap();
        let mut effects = Vec::new();
        self.state.handle(input, now, &mut effects);
        for effect in effects {
            match effect {
                Effect::Watch(command) => self.commands.push(command),
                Effect::RecordBaseline(_) => self.jobs += 1,
                Effect::CollectBaselines(_) => (),
                Effect::Record(Record::Finding(finding)) => self.told.push(*finding),
                Effect::Record(Record::Aggregate { finding, changes }) => {
                    let id = finding.id;
                    self.changes.extend(changes.into_iter().map(|change| (id, change)));
                    self.told.push(*finding);
                }
                Effect::Record(Record::Session { session, commands }) => {
                    self.sessions.push((*session, commands));
                }
                Effect::Record(Record::Probe(probe)) => self.probes.push(*probe),
                Effect::Record(Record::Response(response)) => self.responses.push(*response),
                Effect::Record(Record::Gap { name, .. }) => self.gaps.push(name),
                Effect::Respond(order) => self.orders.push(order),
            }
        }
    }

    fn input(&self, line: &str) -> Input {
        let words: Vec<&str> = line.split_whitespace().collect();
        let observed = |source, fact| {
            let at = Timestamp::from_second(self.clock + 1).unwrap();
            Observation {
                container: id(words[1]),
                init: self.init,
                at,
                source,
                session: None,
                file_of: None,
                reached_as: None,
                fact,
            }
        };
        let path = || RootfsPath::new(words[2]).unwrap();
        match words[..] {
            ["start", name] => {
                Input::Node(RuntimeEvent::Container(Box::new(container(name, Some(7)))))
            }
            ["stop", name] => Input::Node(RuntimeEvent::TaskExited { container: id(name) }),
            ["remove", name] => Input::Node(RuntimeEvent::Removed { container: id(name) }),
            ["list", ref names @ ..] => Input::Node(RuntimeEvent::Listed {
                endpoint: ENDPOINT.into(),
                containers: names.iter().map(|name| id(name)).collect(),
            }),
            ["connected"] => Input::Node(RuntimeEvent::Connected { endpoint: ENDPOINT.into() }),
            ["disconnected"] => Input::Node(RuntimeEvent::Disconnected {
                endpoint: ENDPOINT.into(),
                reason: "the stream ended".into(),
            }),
            ["attached", name] => Input::Watch(SensorEvent::Attached {
                container: id(name),
                pid: 7,
                before_start: true,
            }),
            ["baseline"] => Input::Baseline(ready(None), ImageReference::default()),
            ["trusted", time] => {
                let ready = ready(Some(time.parse().unwrap()));
                Input::Baseline(ready, ImageReference::default())
            }
            ["failed", reason] => {
                let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
                let failed = BaselineEvent::Failed { chain_id, reason: reason.to_owned() };
                Input::Baseline(failed, ImageReference::default())
            }
            ["layer-exec", _, _, content] => {
                let mut fact = exec(path(), content);
                if let Fact::Executed { layer_file, .. } = &mut fact {
                    *layer_file = Some(layer_file_of(content));
                }
                Input::Watch(SensorEvent::Observed(observed(Source::Gate, fact)))
            }
            ["exec", _, _, content] => {
                Input::Watch(SensorEvent::Observed(observed(Source::Gate, exec(path(), content))))
            }
            ["write", _, _, content] => Input::Watch(SensorEvent::Observed(observed(
                Source::Change,
                present(path(), content),
            ))),
            ["gone", _, _] => Input::Watch(SensorEvent::Observed(observed(
                Source::Change,
                Fact::Absent { path: path(), writer: None },
            ))),
            ["scan", name, ref rest @ ..] => {
                let observations = rest
                    .chunks(2)
                    .map(|pair| {
                        let path = RootfsPath::new(pair[0]).unwrap();
                        let fact = match pair[1] {
                            "-" => Fact::Absent { path, writer: None },
                            content => present(path, content),
                        };
                        observed(Source::Scan, fact)
                    })
                    .collect();
                Input::Watch(SensorEvent::ScanBatch {
                    container: id(name),
                    ticket: None,
                    observations,
                })
            }
            ["session" | "entered" | "found", _, pid, tty, ref argv @ ..] => {
                let mut process = process(pid.parse().unwrap());
                process.tty = Some(tty.to_owned()).filter(|tty| tty != "-");
                process.argv = Some(texts(argv)).filter(|argv| !argv.is_empty());
                let is_entered = words[0] == "entered";
                let opening = Opening {
                    root: process.identity,
                    entry: if is_entered { By::Namespace } else { By::RuntimeExec },
                    interactive: process.tty.is_some().then_some(Interactive::Terminal),
                    process,
                    host: Vec::new(),
                    login: None,
                    requested_by: None,
                    beside: None,
                };
                let source = if words[0] == "found" { Source::Scan } else { Source::Gate };
                let fact = Fact::SessionOpened { opening: Arc::new(opening) };
                Input::Watch(SensorEvent::Observed(observed(source, fact)))
            }
            ["came", _, root, pid, ref argv @ ..] => {
                let mut process = process(pid.parse().unwrap());
                process.argv = Some(texts(argv));
                let opening = Opening {
                    root: identity(root),
                    entry: By::Attach,
                    interactive: Some(Interactive::Terminal),
                    process,
                    host: Vec::new(),
                    login: None,
                    requested_by: None,
                    beside: None,
                };
                let fact = Fact::SessionOpened { opening: Arc::new(opening) };
                Input::Watch(SensorEvent::Observed(observed(Source::Change, fact)))
            }
            ["ran-more", _, root, times] => {
                let times = times.parse().unwrap();
                let fact = Fact::SessionRanMore { root: identity(root), times };
                Input::Watch(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["ran", _, root, pid, ref argv @ ..] => {
                let run = Run {
                    process: identity(pid),
                    exe: Some(argv[0].to_owned()),
                    argv: Some(texts(argv)),
                    tty: None,
                };
                let fact = Fact::SessionRan { root: identity(root), run: Arc::new(run) };
                Input::Watch(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["terminal", _, root, tty] => {
                let (interactive, tty) = (Interactive::TerminalLater, Some(tty.to_owned()));
                let fact = Fact::SessionInteractive { root: identity(root), interactive, tty };
                Input::Watch(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["ended", _, root, pid, code] => {
                let exit = code.parse().ok().map(|code| Exit { code: Some(code), signal: None });
                let (root, process) = (identity(root), identity(pid));
                let fact = Fact::SessionProcessEnded { root, process, exit };
                Input::Watch(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["exec-started", name, exec_id, pid] => Input::Node(RuntimeEvent::ExecStarted {
                container: id(name),
                exec_id: exec_id.to_owned(),
                pid: pid.parse().unwrap(),
            }),
            ["exec-exited", name, exec_id, pid, code] => Input::Node(RuntimeEvent::ExecExited {
                container: id(name),
                exec_id: exec_id.to_owned(),
                pid: pid.parse().unwrap(),
                exit: Exit { code: code.parse().ok(), signal: None },
                at: Timestamp::from_second(self.clock + 1).unwrap(),
            }),
            // Executed by a process that descends from `root`, whose parents have ended.
            ["left-behind", _, _, content, root] => {
                let mut observation = observed(Source::Gate, exec(path(), content));
                if let Fact::Executed { process, .. } = &mut observation.fact {
                    Arc::make_mut(process).ancestors.clear();
                }
                observation.session = Some(identity(root));
                Input::Watch(SensorEvent::Observed(observation))
            }
            _ => panic!("bad line: {line:?}"),
        }
    }

    /// The newest revision of the session whose first process is `pid`.
    #[track_caller]
    fn session(&self, pid: u32) -> &Session {
        let mut sessions = self.sessions.iter().rev().map(|(session, _)| session);
        sessions.find(|session| session.process.identity.pid == pid).expect("a session")
    }

    /// The newest revision of every session, in the order of their opening.
    fn newest_sessions(&self) -> Vec<&Session> {
        let mut newest: Vec<&Session> = Vec::new();
        for (session, _) in &self.sessions {
            match newest.iter_mut().find(|known| known.id == session.id) {
                Some(known) => *known = session,
                None => newest.push(session),
            }
        }
        newest
    }

    /// Its commands: arguments, and how they ended.
    fn commands_of(&self, pid: u32) -> Vec<String> {
        let mut newest = BTreeMap::new();
        for (session, commands) in &self.sessions {
            if session.process.identity.pid == pid {
                newest.extend(commands.iter().map(|command| (command.number, command)));
            }
        }
        let text = |command: &model::Command| {
            let exit = command.exit.and_then(|exit| exit.code);
            let end = match (command.ended_at, exit) {
                (None, _) => "runs".to_owned(),
                (Some(_), None) => "ended".to_owned(),
                (Some(_), Some(code)) => code.to_string(),
            };
            format!("{}: {end}", command.argv.as_ref().unwrap().join(" "))
        };
        newest.into_values().map(text).collect()
    }

    /// The newest revision of every finding told so far.
    fn newest(&self) -> Vec<&Finding> {
        let mut newest: Vec<&Finding> = Vec::new();
        let mut places = HashMap::new();
        for finding in &self.told {
            let place = *places.entry(finding.id).or_insert(newest.len());
            match newest.get_mut(place) {
                Some(known) => *known = finding,
                None => newest.push(finding),
            }
        }
        newest
    }

    fn problems(&self) -> Vec<String> {
        self.state.status().problems
    }

    /// Checks the newest revision of every finding told so far.
    #[track_caller]
    fn expect(&mut self, expected: &[&str]) -> &mut Node {
        let actual: Vec<String> = self
            .newest()
            .iter()
            .map(|finding| {
                let subject = match (&finding.file, &finding.process) {
                    (Some(file), _) => {
                        format!("{}{}", file.path, if file.deleted { " (deleted)" } else { "" })
                    }
                    (None, Some(process)) => format!("pid {}", process.identity.pid),
                    (None, None) => format!("({})", finding.detail.as_deref().unwrap()),
                };
                format!("{} {subject} x{} r{}", finding.kind, finding.count, finding.revision)
            })
            .collect();
        assert_eq!(actual, expected);
        self
    }
}

fn id(name: &str) -> ContainerId {
    ContainerId::new("default", name)
}

/// The layers of `ImageBaseline::from_text` are numbered.
fn layer(number: u8) -> LayerId {
    LayerId::Diff(DiffId([number; 32]))
}

fn up_to(seconds: i64) -> FileTime {
    FileTime { seconds, nanoseconds: 0 }
}

fn ready(unchanged_since: Option<i64>) -> BaselineEvent {
    let baseline = Arc::new(ImageBaseline::from_text(&[IMAGE]));
    let chain_id = baseline.chain_id();
    BaselineEvent::Ready { chain_id, baseline, unchanged_since: unchanged_since.map(up_to) }
}

fn layer_file_of(content: &str) -> LayerFile {
    LayerFile { device: 1, inode: content.len() as u64, changed: up_to(5) }
}

/// The init of a run, by its pid.
fn init(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start_time: u64::from(pid) * 100 }
}

fn container(name: &str, pid: Option<u32>) -> Container {
    let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
    Container {
        id: id(name),
        endpoint: ENDPOINT.into(),
        runtime: "io.containerd.runc.v2".into(),
        labels: model::Labels::default(),
        pod: None,
        image: ImageReference::default(),
        snapshotter: "overlayfs".into(),
        snapshot_key: name.into(),
        layers: vec![Layer {
            id: layer(1),
            chain_id,
            directory: Some("/lower".into()),
            blob: None,
        }],
        rootfs: Some(OverlayDirs { upperdir: "/upper".into(), lowerdirs: vec!["/lower".into()] }),
        created_at: Some(Timestamp::UNIX_EPOCH),
        task: pid.map(|pid| Task {
            pid,
            start_time: Some(u64::from(pid) * 100),
            paused: false,
            terminal_input: None,
        }),
        no_baseline: None,
        id_map: None,
        entry_point: EntryPoint::default(),
        probes: Vec::new(),
    }
}

fn texts(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn identity(pid: &str) -> ProcessIdentity {
    ProcessIdentity { pid: pid.parse().unwrap(), start_time: 1 }
}

fn process(pid: u32) -> Process {
    Process {
        identity: ProcessIdentity { pid, start_time: 1 },
        exe: None,
        argv: None,
        uid: Some(0),
        tty: None,
        root: None,
        ancestors: vec![Ancestor {
            identity: ProcessIdentity { pid: 100, start_time: 1 },
            exe: None,
            argv: None,
        }],
    }
}

fn state_of(content: &str) -> FileState {
    FileState {
        file_type: FileType::Regular,
        format: Format::Elf,
        mode: 0o755,
        uid: 0,
        gid: 0,
        size: content.len() as u64,
        capability: None,
        content: Content::Hashed {
            blake3: crate::baseline::blake3_of(content),
            sha256: Some(Sha256Hash([0; 32])),
        },
        deleted: false,
        could_change: false,
    }
}

fn exec(path: RootfsPath, content: &str) -> Fact {
    let process = Arc::new(process(42));
    Fact::Executed {
        path,
        filesystem: Filesystem::Overlay,
        running: false,
        times: 1,
        state: state_of(content),
        lower: None,
        process,
        invoked_as: None,
        layer_file: None,
        writer: None,
    }
}

fn present(path: RootfsPath, content: &str) -> Fact {
    Fact::Present { path, state: state_of(content), lower: None, writer: None }
}

#[test]
fn a01_written_and_run_at_once_is_one_finding() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nwrite c1 /tmp/x evil").expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a01_written_and_later_run_is_one_story() {
    let mut node = Node::running();
    node.play("write c1 /tmp/x evil\nexec c1 /tmp/x evil")
        .expect(&["file.added /tmp/x x1 r1", "exec.new /tmp/x x1 r1"]);
    assert_eq!(node.told[1].story, Some(node.told[0].id));
}

fn load(path: &str, content: &str, loads: Process, writer: Option<Process>) -> Input {
    let fact = Fact::Loaded {
        path: RootfsPath::new(path).unwrap(),
        filesystem: Filesystem::Overlay,
        state: state_of(content),
        lower: None,
        process: Arc::new(loads),
        by_linker: false,
        is_shared: false,
        writer: writer.map(Arc::new),
    };
    let at = Timestamp::from_second(1).unwrap();
    let container = id("c1");
    Input::Watch(SensorEvent::Observed(Observation {
        container,
        init: init(7),
        at,
        source: Source::Trace,
        session: None,
        file_of: None,
        reached_as: None,
        fact,
    }))
}

#[test]
fn a17_a_loaded_library_is_one_finding_and_its_file_is_not_told_again() {
    let mut node = Node::running();
    node.give(load("/tmp/evil.so", "evil", process(42), None));
    node.give(load("/tmp/evil.so", "evil", process(43), None));
    node.play("write c1 /tmp/evil.so evil").expect(&["library.loaded /tmp/evil.so x2 r2"]);
    assert_eq!(node.told[0].severity, Severity::High);
}

#[test]
fn b25_a_library_that_a_program_of_the_image_has_unpacked_is_recorded_and_no_alarm() {
    let app = || Process { exe: Some("/usr/bin/curl".into()), ..process(42) };
    let mut node = Node::running();
    node.give(load("/tmp/lib.so", "jni", app(), Some(app())));
    node.expect(&["library.loaded /tmp/lib.so x1 r1"]);
    assert_eq!(node.told[0].severity, Severity::Info);
    assert!(node.told[0].detail.as_deref().unwrap().contains("has written it itself"));

    // Written long ago: the finding that told it knows the writer.
    let mut node = Node::running();
    let fact = Fact::Present {
        path: RootfsPath::new("/tmp/lib.so").unwrap(),
        state: state_of("jni"),
        lower: None,
        writer: Some(Arc::new(app())),
    };
    let at = Timestamp::from_second(1).unwrap();
    let (container, source) = (id("c1"), Source::Change);
    node.give(Input::Watch(SensorEvent::Observed(Observation {
        container,
        init: init(7),
        at,
        source,
        session: None,
        file_of: None,
        reached_as: None,
        fact,
    })));
    node.give(load("/tmp/lib.so", "jni", app(), None));
    assert_eq!(node.told[1].severity, Severity::Info);
    assert_eq!(node.told[1].story, Some(node.told[0].id));

    // The program is drift itself, or nobody knows who has written the library.
    let mut node = Node::running();
    node.play("exec c1 /usr/bin/curl evil");
    node.give(load("/tmp/lib.so", "jni", app(), Some(app())));
    assert_eq!(node.told[1].severity, Severity::High);
    node.give(load("/tmp/other.so", "other", app(), None));
    assert_eq!(node.told[2].severity, Severity::High);
}

#[test]
fn owners_are_told_as_the_container_names_them() {
    let mut node = Node::running();
    let mut in_user_namespace = container("c1", Some(7));
    let range = |host| vec![IdRange { container: 0, host, count: 65_536 }];
    in_user_namespace.id_map = Some(IdMap { uids: range(100_000), gids: range(200_000) });
    node.give(Input::Node(RuntimeEvent::Container(Box::new(in_user_namespace))));
    let owned = |path: &str, uid, gid| {
        let mut fact = exec(RootfsPath::new(path).unwrap(), "evil");
        if let Fact::Executed { state, .. } = &mut fact {
            (state.uid, state.gid) = (uid, gid);
        }
        let at = Timestamp::from_second(9).unwrap();
        SensorEvent::Observed(Observation {
            container: id("c1"),
            init: init(7),
            at,
            source: Source::Gate,
            session: None,
            file_of: None,
            reached_as: None,
            fact,
        })
    };
    node.give(Input::Watch(owned("/tmp/x", 100_000, 200_033)));
    node.give(Input::Watch(owned("/tmp/y", 0, 100_000)));
    let owners: Vec<(u32, u32)> = node
        .told
        .iter()
        .filter_map(|told| told.file.as_ref())
        .map(|file| (file.uid, file.gid))
        .collect();
    assert_eq!(owners, [(0, 33), (65_534, 65_534)], "root of the host is nobody to the container");
}

#[test]
fn other_content_at_the_same_path_is_another_finding() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x worse")
        .expect(&["exec.new /tmp/x x1 r1", "exec.new /tmp/x x1 r1"]);
}

#[test]
fn every_execution_counts() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil\nexec c1 /tmp/x evil")
        .expect(&["exec.new /tmp/x x3 r3"]);
    assert_eq!(node.told[2].first_seen, node.told[0].first_seen);
    assert!(node.told[2].last_seen > node.told[0].last_seen);
}

#[test]
fn a_scan_tells_what_is_new_and_nothing_twice() {
    let mut node = Node::running();
    node.play("scan c1 /tmp/x evil /bin/ls -\nscan c1 /tmp/x evil /bin/ls -\nexec c1 /tmp/y y")
        .play("scan c1 /tmp/y y")
        .expect(&[
            "file.added /tmp/x x1 r1",
            "file.removed /bin/ls (deleted) x1 r1",
            "exec.new /tmp/y x1 r1",
        ]);
}

#[test]
fn a46_after_a_restart_a_finding_is_the_same_finding() {
    let mut before = Node::running();
    before.play("exec c1 /tmp/x evil\nwrite c1 /tmp/z zed");
    let mut after = Node::new(Respond::default(), before.told.clone());
    after
        .play("start c1\nbaseline\nattached c1\nscan c1 /tmp/x evil /tmp/z zed /tmp/new new")
        .expect(&["file.added /tmp/new x1 r1"])
        .play("exec c1 /tmp/x evil")
        .expect(&["file.added /tmp/new x1 r1", "exec.new /tmp/x x2 r2"]);
}

#[test]
fn a45_drift_in_one_container_never_marks_another() {
    let mut node = Node::running();
    node.play("start c2\nattached c2\nbaseline\nexec c1 /tmp/x evil");
    assert_eq!(node.told[0].container_id(), Some(&id("c1")));
    assert!(node.state.inventory.get(&id("c2")).unwrap().findings.is_empty());
}

#[test]
fn facts_wait_for_the_baseline() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nexec c1 /tmp/x evil\nexec c1 /bin/ls ls").expect(&[]);
    assert_eq!(node.jobs, 1);
    node.play("baseline").expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a14_a_removed_program_is_told_as_deleted() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\ngone c1 /tmp/x")
        .expect(&["exec.new /tmp/x (deleted) x1 r2"])
        .play("gone c1 /tmp/x")
        .expect(&["exec.new /tmp/x (deleted) x1 r2"]);
}

#[test]
fn one_session_is_one_finding_and_its_drift_names_it() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0\nsession c1 100 pts/0\nexec c1 /tmp/x evil")
        .expect(&["session.interactive pid 100 x1 r1", "exec.new /tmp/x x1 r1"]);
    assert!(node.told[0].session.is_some());
    assert_eq!(node.told[1].session, node.told[0].session);
    node.play("session c1 200 -").expect(&[
        "session.interactive pid 100 x1 r1",
        "exec.new /tmp/x x1 r1",
        "session.exec pid 200 x1 r1",
    ]);
}

#[test]
fn a_probe_is_one_finding_with_a_count() {
    let mut node = Node::running();
    node.play("session c1 200 -\nsession c1 201 -\nsession c1 202 -\nsession c1 202 -")
        .expect(&["session.exec pid 200 x3 r3"]);
}

#[test]
fn a_flood_of_new_programs_fills_no_memory_and_hides_no_execution() {
    let mut node = Node::running();
    for number in 0..20_000 {
        node.play(&format!("write c1 /tmp/x{number} evil{number}"));
    }
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 33, 20_000)]);
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.told.last().unwrap().kind, Kind::ExecNew);
    let one_by_one = budget::FINDINGS.number / 2;
    for number in 0..20_000 {
        node.play(&format!("exec c1 /tmp/y{number} evil{number}"));
    }
    node.say_all();
    let programs = u64::try_from(20_001).unwrap();
    assert_eq!(node.kinds()[0], (Kind::ExecNew, one_by_one + 1, programs), "none is uncounted");
    let rest = node.told.iter().rev().find(|told| told.kind == Kind::ExecNew).unwrap();
    assert_eq!(rest.files, Some(programs - one_by_one as u64));
    let listed = node.members().into_keys().filter(|(finding, _)| *finding == rest.id);
    assert_eq!(listed.count() as u64, programs - one_by_one as u64, "and each can be listed");
    assert_eq!(node.gaps.first().map(String::as_str), Some("findings_full"));
    // It lasts as long as the container is there, and concerns no other one.
    assert_eq!(node.problems().len(), 1, "{:?}", node.problems());
    node.play("start c2\nbaseline\nattached c2\nexec c2 /tmp/x evil");
    assert_eq!(node.told.last().unwrap().container_id(), Some(&id("c2")));
    node.play("remove c1\nlist c2\nlist c2");
    assert!(node.problems().is_empty(), "{:?}", node.problems());
}

/// A node that kills on findings of this kind, in whose container `flood` happened.
fn flooded(kind: Kind, number: usize, flood: impl Fn(usize) -> Fact) -> Node {
    let mut node = Node::new(Respond { kill_on: [kind].into() }, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    for number in 0..number {
        node.see(Source::Gate, flood(number));
    }
    assert!(node.orders.is_empty());
    node
}

fn fileless(content: &str) -> Fact {
    let mut fact = exec(at("/memfd:x"), content);
    if let Fact::Executed { filesystem, .. } = &mut fact {
        *filesystem = Filesystem::Anonymous;
    }
    fact
}

#[test]
fn x12_no_number_of_new_programs_keeps_one_in_memory_from_its_answer() {
    let mut node = flooded(Kind::ExecFileless, 32_768, |number| {
        exec(at(&format!("/tmp/{number}")), &format!("evil{number}"))
    });
    node.see(Source::Trace, fileless("evil"));
    let told = node.told.last().unwrap();
    assert_eq!((told.kind, told.files), (Kind::ExecFileless, None), "it stands alone");
    assert_eq!(node.orders.len(), 1);
    assert_eq!(node.orders[0].finding, Some(told.id));
}

#[test]
fn x12_no_number_of_scripts_keeps_a_line_in_crontab_from_its_answer() {
    let mut node = flooded(Kind::FilePersistence, 17_000, |number| {
        let mut fact = exec(at(&format!("/tmp/{number}")), &format!("evil{number}"));
        if let Fact::Executed { state, .. } = &mut fact {
            state.format = Format::Script;
        }
        fact
    });
    assert_eq!(node.told.last().unwrap().kind, Kind::ExecScript);
    node.state.policy.persistence = model::PathGlobs::new(vec!["/etc/crontab".to_owned()]).unwrap();
    node.see(Source::Change, present(at("/etc/crontab"), "job"));
    let told = node.told.iter().rev().find(|told| told.kind == Kind::FilePersistence).unwrap();
    assert_eq!(node.orders.len(), 1);
    assert_eq!(node.orders[0].finding, Some(told.id));
}

#[test]
fn h01_what_finds_no_room_even_among_its_own_kind_is_answered() {
    // Everything that is one of many is told with others, for whatever reason.
    for (kind, fact) in
        [(Kind::ExecNew, exec(at("/tmp/last"), "last")), (Kind::ExecFileless, fileless("last"))]
    {
        let mut node = Node::new(Respond::default(), Vec::new());
        node.play("start c1\nbaseline\nattached c1");
        let most = budget::FINDINGS.number / 2;
        for number in 0..=most {
            match kind {
                Kind::ExecNew => {
                    let path = at(&format!("/tmp/{number}"));
                    node.see(Source::Gate, exec(path, &format!("evil{number}")));
                }
                _ => node.see(Source::Gate, fileless(&format!("evil{number}"))),
            }
        }
        node.say_all();
        assert_eq!(node.newest().len(), most + 1);
        let mut restarted = node.restarted();
        let policy = Respond { kill_on: [kind].into() };
        restarted.state.policy.respond = policy;
        restarted.orders.clear();
        // What an earlier policy has said of the others is not asked again.
        restarted
            .state
            .inventory
            .get_mut(&id("c1"))
            .unwrap()
            .findings
            .retain(|_, told| told.files.is_none());
        restarted.see(Source::Gate, fact.clone());
        restarted.see(Source::Gate, fact);
        restarted.say_all();
        let rest = restarted.told.last().unwrap().clone();
        assert_eq!((rest.kind, rest.files, rest.count), (kind, Some(1), 2));
        assert_eq!(restarted.orders.len(), 1);
        assert_eq!(restarted.orders[0].finding, Some(rest.id));
    }
}

#[test]
fn h01_who_comes_in_is_reported_and_answered_when_no_more_sessions_are_listed() {
    let respond = Respond { kill_on: [Kind::SessionInteractive].into() };
    let mut node = Node::new(respond, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    for pid in 1000..3100 {
        node.play(&format!("session c1 {pid} - true {pid}"));
    }
    assert!(node.gaps.contains(&"findings_full".to_owned()));
    node.play("session c1 5000 pts/0 sh");
    let told = node.told.last().unwrap();
    assert_eq!((told.kind, node.orders.len()), (Kind::SessionInteractive, 1));
    assert_eq!(node.orders[0].finding, Some(told.id));
}

#[test]
fn shells_on_connections_take_no_room_from_who_comes_in() {
    let mut node = Node::running();
    for pid in 1000..4000 {
        let process = Arc::new(Process { argv: Some(texts(&["sh"])), ..process(pid) });
        let evidence = "a test".to_owned();
        node.see(Source::Trace, Fact::ReverseShell { process, direct: true, evidence });
    }
    node.play("session c1 5000 pts/0 sh");
    assert_eq!(node.session(5000).entry, By::RuntimeExec);
}

#[test]
fn what_waits_for_a_baseline_is_bounded_and_the_worst_of_it_is_kept() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1");
    for number in 0..9000 {
        node.see(Source::Change, present(at(&format!("/tmp/{number}")), "ls"));
    }
    node.see(Source::Trace, fileless("evil"));
    node.play("baseline").say_all();
    assert!(node.told.iter().any(|told| told.kind == Kind::ExecFileless));
    assert_eq!(node.state.health.count(Failure::BaselineBacklogFull), 9001 - 8192);
}

#[test]
fn one_container_that_nobody_has_reported_takes_no_room_from_another_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let of = |container: &str, fact| {
        let at = Timestamp::from_second(1).unwrap();
        let source = Source::Gate;
        let (container, session) = (id(container), None);
        let observation = Observation {
            container,
            init: init(7),
            at,
            source,
            session,
            file_of: None,
            reached_as: None,
            fact,
        };
        Input::Watch(SensorEvent::Observed(observation))
    };
    node.give(of("c2", exec(at("/tmp/x"), "evil")));
    for number in 0..3000 {
        node.clock = 1;
        node.give(of("c1", exec(at(&format!("/tmp/{number}")), "evil")));
    }
    node.clock = 1;
    node.give(of("c3", exec(at("/tmp/x"), "evil")));
    node.clock = 1;
    for container in ["c2", "c3"] {
        node.clock = 1;
        let container = id(container);
        node.give(Input::Node(RuntimeEvent::TaskCreated { container, pid: 7, rootfs: None }));
    }
    node.play("start c2\nstart c3\nbaseline");
    let of: Vec<_> = node.told.iter().filter_map(Finding::container_id).cloned().collect();
    assert_eq!(of, [id("c2"), id("c3")]);
}

#[test]
fn h16_what_is_new_of_a_container_that_is_forgotten_is_told_and_nothing_is_left() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 101 id\nremove c1");
    node.give(Input::Watch(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert_eq!(node.commands_of(100), ["id: ended"]);
    assert_eq!(node.state.sessions.due(), None);
}

#[test]
fn expected_has_a_sha256_only_when_the_lower_file_is_what_the_baseline_says() {
    let mut node = Node::running();
    let twin = |content| LowerTwin {
        blake3: crate::baseline::blake3_of(content),
        sha256: Some(Sha256Hash([9; 32])),
    };
    for (content, lower, expected) in [
        ("one", Some(twin("curl")), Some(Sha256Hash([9; 32]))),
        ("two", Some(twin("tampered")), None),
        ("three", None, None),
    ] {
        let mut fact = present(RootfsPath::new("/usr/bin/curl").unwrap(), content);
        if let Fact::Present { lower: slot, .. } = &mut fact {
            *slot = lower;
        }
        let at = Timestamp::UNIX_EPOCH;
        node.give(Input::Watch(SensorEvent::Observed(Observation {
            container: id("c1"),
            init: init(7),
            at,
            source: Source::Change,
            session: None,
            file_of: None,
            reached_as: None,
            fact,
        })));
        let told = node.told.last().unwrap();
        assert_eq!(told.kind, Kind::FileModified);
        assert_eq!(told.expected.as_ref().unwrap().sha256, expected, "{content}");
    }
}

// ---- answers

/// What became of an order, as `respond` says it.
fn became(order: &ResponseRequest, succeeded: bool, gone: bool) -> Input {
    let mut response = order.failed("as the test says".into());
    (response.outcome.succeeded, response.outcome.gone) = (succeeded, gone);
    Input::Responded(response)
}

fn killing(kinds: &[Kind]) -> Node {
    let mut node = Node::new(Respond { kill_on: kinds.iter().copied().collect() }, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    node
}

#[test]
fn a_kill_is_ordered_once_for_a_run_and_names_it() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("write c1 /tmp/x evil");
    assert!(node.orders.is_empty());
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil\nexec c1 /tmp/y other");
    assert_eq!(node.orders.len(), 1);
    let order = node.orders.remove(0);
    assert_eq!(order.action, Action::Kill);
    let run = node.told.iter().find(|told| told.kind == Kind::ExecNew).unwrap().id;
    assert_eq!(order.finding, Some(run));
    let created_at = Some(Timestamp::UNIX_EPOCH);
    let meant = Incarnation { pid: 7, start_time: Some(700), created_at };
    assert_eq!(order.incarnation, Some(meant));
    node.give(became(&order, true, false));
    assert_eq!(node.told.last().unwrap().outcome.as_ref().map(|o| o.succeeded), Some(true));
    node.play("exec c1 /tmp/x evil").wait(1000);
    assert!(node.orders.is_empty(), "it is killed already");
    // It runs again, and so does what it was killed for.
    node.play("stop c1").init = init(8);
    node.give(Input::Node(RuntimeEvent::Container(Box::new(container("c1", Some(8))))));
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.orders.iter().map(|one| one.incarnation.unwrap().pid).collect::<Vec<_>>(), [8]);
}

#[test]
fn h10_a_failed_kill_is_ordered_again_while_the_run_is_there_and_each_failure_is_kept() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let order = node.orders.pop().expect("it is ordered again");
        assert!(node.orders.is_empty());
        node.give(became(&order, false, false));
        let from = node.clock;
        while node.orders.is_empty() {
            // However often it is seen, that makes it no faster.
            node.play("exec c1 /tmp/x evil").wait(0);
            assert!(node.clock - from < 1000, "{pauses:?}");
        }
        pauses.push(node.clock - from);
    }
    assert_eq!(node.responses.len(), 12);
    assert!(node.responses.iter().all(|kept| !kept.outcome.succeeded));
    assert!(pauses.is_sorted() && pauses[0] <= 3, "{pauses:?}");
    assert!((300..=303).contains(pauses.last().unwrap()), "bounded in rate: {pauses:?}");
    // The reason is gone with the run.
    let order = node.orders.pop().unwrap();
    node.give(became(&order, false, false));
    node.play("stop c1").wait(1000);
    assert!(node.orders.is_empty() && node.state.kill_due().is_none());
    assert_eq!(node.responses.len(), 13);
}

#[test]
fn h10_a_run_that_is_gone_is_not_tried_again_and_a_clock_that_is_set_back_delays_nothing() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil").clock = 1_000_000;
    let order = node.orders.pop().unwrap();
    node.give(became(&order, false, false));
    node.clock = 1;
    node.give(Input::Due);
    let order = node.orders.pop().expect("it is ordered again at once");
    node.give(became(&order, false, true));
    assert!(node.told.last().unwrap().outcome.as_ref().is_some_and(|outcome| outcome.gone));
    node.play("exec c1 /tmp/x evil").wait(1000);
    assert!(node.orders.is_empty());
}

/// The actions of the recorded responses, and the inits of their runs.
fn recorded(node: &Node) -> Vec<(&str, u32)> {
    let named = |one: &Response| one.incarnation.unwrap().pid;
    node.responses.iter().map(|one| (&*one.outcome.action, named(one))).collect()
}

/// Carries out the one kill that is ordered.
fn kill(node: &mut Node, succeeded: bool) {
    let order = node.orders.remove(0);
    let Input::Responded(mut response) = became(&order, succeeded, false) else { unreachable!() };
    response.outcome.restarter = Some(Restarter::RestartMonitor);
    response.outcome.at = Timestamp::from_second(node.clock).unwrap();
    node.give(Input::Responded(response));
}

fn runs_with(node: &mut Node, pid: u32) {
    node.give(Input::Node(RuntimeEvent::Container(Box::new(container("c1", Some(pid))))));
}

#[test]
fn d01_a_killed_container_that_runs_again_is_recorded_once_with_what_was_to_start_it() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    runs_with(&mut node, 7);
    assert_eq!(recorded(&node), [("kill", 7)], "it is still that run");
    node.play("stop c1");
    assert_eq!(recorded(&node), [("kill", 7)]);
    node.clock += 3;
    runs_with(&mut node, 8);
    runs_with(&mut node, 8);
    node.play("stop c1");
    runs_with(&mut node, 9);
    assert_eq!(recorded(&node), [("kill", 7), ("restart", 8)]);
    let [kill, restart] = &node.responses[..] else { unreachable!() };
    assert_eq!(restart.finding, kill.finding);
    assert_eq!(restart.requested_by, "containerd's restart monitor, as was expected");
    assert_eq!(restart.outcome.restarter, Some(Restarter::RestartMonitor));
    let message = &restart.outcome.message;
    assert!(message.starts_with("started again (pid 8), seen 7.0 s after the kill"), "{message}");
    let last = node.told.last().unwrap().outcome.as_ref().unwrap();
    assert_eq!(last.action, "kill", "what driftd did stays the finding's outcome");
}

#[test]
fn d01_a_restart_that_is_quicker_than_the_response_is_recorded_too() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil\nstop c1");
    let change = RuntimeEvent::TaskCreated { container: id("c1"), pid: 8, rootfs: None };
    node.give(Input::Node(change));
    kill(&mut node, true);
    assert_eq!(recorded(&node), [("kill", 7), ("restart", 8)]);
}

#[test]
fn d01_what_was_not_killed_or_is_another_container_has_not_started_again() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, false);
    node.play("stop c1");
    runs_with(&mut node, 8);
    assert_eq!(recorded(&node), [("kill", 7)], "it ended by itself");

    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    node.play("stop c1\nremove c1");
    runs_with(&mut node, 8);
    assert_eq!(recorded(&node), [("kill", 7)], "another one has its ID");

    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    node.play("stop c1");
    let created_at = Some(Timestamp::from_second(5).unwrap());
    let other = Container { created_at, ..container("c1", Some(8)) };
    node.give(Input::Node(RuntimeEvent::Container(Box::new(other))));
    assert_eq!(recorded(&node), [("kill", 7)], "another one has its ID");
}

#[test]
fn d01_a_restart_while_driftd_is_stopped_is_recorded_by_the_next_one() {
    let mut before = killing(&[Kind::ExecNew]);
    before.play("exec c1 /tmp/x evil");
    kill(&mut before, true);
    let killed = before.responses.remove(0);
    let mut after = Node::new(Respond::default(), Vec::new());
    after.state.remember_kill(&killed);
    runs_with(&mut after, 8);
    assert_eq!(recorded(&after), [("restart", 8)]);
    let restart = after.responses.remove(0);
    let mut later = Node::new(Respond::default(), Vec::new());
    later.state.remember_kill(&restart);
    runs_with(&mut later, 9);
    assert_eq!(recorded(&later), [], "it was recorded before");
}

#[test]
fn u08_settings_that_were_read_again_decide_from_then_on_and_verdicts_name_them() {
    let mut node = killing(&[]);
    let before = node.state.policy.generation;
    let set = |node: &mut Node, kinds: &[Kind]| {
        let respond = Respond { kill_on: kinds.iter().copied().collect() };
        let patience = jiff::SignedDuration::from_secs(7);
        let policy = Policy { respond, probe_patience: patience, ..Policy::default() };
        node.give(Input::Asked(ApiRequest::SetPolicy(Box::new(policy))));
        assert_eq!(node.state.policy.probe_patience, patience);
    };
    node.play("exec c1 /tmp/a evil");
    set(&mut node, &[Kind::ExecNew]);
    assert!(node.orders.is_empty(), "what was decided before is not decided again");
    node.play("exec c1 /tmp/b other");
    assert_eq!(node.orders.len(), 1);
    let verdict = node.told.last().unwrap().verdict.clone();
    assert_eq!(
        (verdict.rule.as_deref(), verdict.policy_generation),
        (Some("respond.kill_on"), before + 1)
    );

    let mut node = killing(&[]);
    set(&mut node, &[Kind::ExecNew]);
    set(&mut node, &[]);
    node.play("exec c1 /tmp/a evil");
    assert!(node.orders.is_empty());
    assert_eq!(node.told.last().unwrap().verdict.policy_generation, before + 2);
}

#[test]
fn x11_what_is_told_late_of_an_ended_run_orders_nothing_for_a_later_one() {
    let mut node = killing(&[Kind::ExecNew, Kind::FileAdded, Kind::SessionInteractive]);
    // It ends, and another container gets its ID.
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    node.play("stop c1\nremove c1");
    node.give(Input::Node(RuntimeEvent::TaskCreated { container: id("c1"), pid: 8, rootfs: None }));
    node.give(Input::Node(RuntimeEvent::Container(Box::new(next))));
    node.play("baseline\nexec c1 /tmp/big evil\nwrite c1 /tmp/y evil\nsession c1 100 pts/0");
    let kinds: Vec<Kind> = node.told.iter().map(|told| told.kind).collect();
    assert!(kinds.contains(&Kind::ExecNew) && kinds.contains(&Kind::FileAdded), "{kinds:?}");
    assert!(node.orders.is_empty(), "{:?}", node.orders);
    // The new one answers for what it does itself.
    node.init = init(8);
    node.play("exec c1 /tmp/big evil");
    let created_at = Some(Timestamp::from_second(60).unwrap());
    let meant = Incarnation { pid: 8, start_time: Some(800), created_at };
    assert_eq!(node.orders.iter().map(|one| one.incarnation).collect::<Vec<_>>(), [Some(meant)]);
}

#[test]
fn x11_what_a_container_did_is_judged_by_its_own_image_after_its_id_was_given_away() {
    let mut node = killing(&[Kind::ExecNew]);
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    next.labels = BTreeMap::from([("app".to_owned(), "clean".to_owned())]).into();
    next.image.name = Some("other:1".into());
    next.layers[0].chain_id = ChainId([9; 32]);
    node.play("stop c1\nremove c1");
    node.give(Input::Node(RuntimeEvent::Container(Box::new(next))));
    // `ls` is of the former image, and nothing is known of the new one's yet.
    node.play("exec c1 /bin/ls ls\nexec c1 /tmp/x evil");
    let told: Vec<_> = node.told.iter().map(|told| (told.kind, &told.image.name)).collect();
    assert_eq!(told, [(Kind::ExecNew, &None)]);
    assert!(node.told[0].container.as_ref().unwrap().labels.is_empty());
    // What the new one does waits for its baseline.
    node.init = init(8);
    node.play("exec c1 /tmp/z evil");
    assert_eq!(node.told.len(), 1);
    assert!(node.orders.is_empty());
}

#[test]
fn x11_a_container_is_remembered_after_its_last_scan_for_what_comes_later_still() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("stop c1\nremove c1");
    node.give(Input::Watch(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert!(node.state.inventory.get(&id("c1")).is_none());
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    next.image.name = Some("other:1".into());
    next.layers[0].chain_id = ChainId([9; 32]);
    node.give(Input::Node(RuntimeEvent::Container(Box::new(next))));
    node.play("exec c1 /bin/ls ls\nexec c1 /tmp/x evil");
    let told: Vec<_> = node.told.iter().map(|told| (told.kind, &told.image.name)).collect();
    assert_eq!(told, [(Kind::ExecNew, &None)]);
    assert_eq!(node.told[0].run.map(|run| run.pid), Some(7));
    assert!(node.orders.is_empty(), "{:?}", node.orders);
}

#[test]
fn x11_a_run_that_was_seen_before_containerd_told_of_it_is_answered() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("stop c1").init = init(8);
    node.play("exec c1 /tmp/x evil");
    let order = node.orders.pop().expect("it runs, whoever has told of it");
    assert_eq!(order.incarnation.map(|run| (run.pid, run.start_time)), Some((8, Some(800))));
    node.give(Input::Node(RuntimeEvent::TaskCreated { container: id("c1"), pid: 8, rootfs: None }));
    // containerd did not know it yet.
    node.give(became(&order, false, false));
    node.wait(2);
    assert_eq!(node.orders.len(), 1);
}

#[test]
fn an_answer_needs_no_finding_that_is_kept() {
    let mut node = killing(&[Kind::ExecFileless]);
    let container = id("c1");
    let (finding, kind) = (FindingId([9; 16]), Kind::ExecFileless);
    let mut effects = Vec::new();
    let cause = Cause { container: &container, init: Some(init(7)), kind, finding };
    node.state.answer(&cause, Timestamp::UNIX_EPOCH, &mut effects);
    let [Effect::Respond(order)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((order.finding, order.incarnation.unwrap().pid), (Some(finding), 7));
}

type Answered = oneshot::Receiver<Result<Response, LookupError>>;

impl Node {
    fn respond(&mut self, container: &str) -> Answered {
        self.respond_to(container, None)
    }

    fn respond_to(&mut self, container: &str, cause: Option<(FindingId, Incarnation)>) -> Answered {
        let (reply, answered) = oneshot::channel();
        self.give(Input::Asked(ApiRequest::Respond {
            container: container.into(),
            cause: cause.map(Box::new),
            action: Action::Pause,
            reason: "a test".into(),
            requested_by: "uid 0".into(),
            no_restart: false,
            reply,
        }));
        answered
    }
}

#[test]
fn u19_an_answer_takes_a_whole_name_and_refuses_what_is_gone() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start web\nstart web-canary");
    let mut answered = node.respond("web");
    let order = node.orders.pop().unwrap();
    assert_eq!((&*order.container.id, order.incarnation.unwrap().pid), ("web", 7));
    node.give(became(&order, true, false));
    answered.try_recv().unwrap().unwrap();
    // Its last scan is not over yet, and the other one's name begins like its own.
    node.play("attached web\nstop web\nremove web");
    let refused = |node: &mut Node, text: &str| {
        let refused = node.respond(text).try_recv().unwrap().unwrap_err();
        assert!(node.orders.is_empty(), "{text}");
        refused
    };
    assert!(matches!(refused(&mut node, "web"), LookupError::Gone(_)));
    node.give(Input::Watch(SensorEvent::Scanned {
        container: id("web"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    let alike = LookupError::NotWhole("web".into(), "default/web-canary".into());
    assert_eq!(refused(&mut node, "web"), alike);
    assert_eq!(refused(&mut node, "db"), LookupError::Unknown("db".into()));
    for text in ["diff", "lookup"] {
        let (reply, mut diff) = oneshot::channel();
        let (reply_to_lookup, mut lookup) = oneshot::channel();
        let container = "web".to_owned();
        if text == "diff" {
            node.give(Input::Asked(ApiRequest::Diff { container, reply }));
            assert_eq!(diff.try_recv().unwrap().unwrap_err(), alike);
        } else {
            let reply = reply_to_lookup;
            node.give(Input::Asked(ApiRequest::Lookup { container, reply }));
            assert_eq!(lookup.try_recv().unwrap().unwrap_err(), alike);
        }
    }
}

#[test]
fn u19_an_answer_to_a_finding_refuses_when_its_run_is_over() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil");
    let told = node.told.last().unwrap();
    let (id, run) = (told.id, told.run.expect("a finding names the run it was seen in"));
    assert_eq!((run.pid, run.start_time), (7, Some(700)));
    let mut answered = node.respond_to("default/c1", Some((id, run)));
    let order = node.orders.pop().unwrap();
    assert_eq!((order.finding, order.incarnation), (Some(id), Some(run)));
    node.give(became(&order, true, false));
    answered.try_recv().unwrap().unwrap();
    let told = node.told.last().unwrap();
    assert_eq!((told.id, told.outcome.is_some()), (id, true));
    // It was started again, by the name of which one may still write.
    node.play("stop c1");
    let refused = |node: &mut Node| {
        let refused = node.respond_to("default/c1", Some((id, run))).try_recv().unwrap();
        assert!(node.orders.is_empty());
        refused.unwrap_err()
    };
    assert_eq!(refused(&mut node), LookupError::RunGone("default/c1".into()));
    node.give(Input::Node(RuntimeEvent::Container(Box::new(container("c1", Some(8))))));
    assert_eq!(refused(&mut node), LookupError::RunGone("default/c1".into()));
    // Seen again, it is of the run that there is.
    node.init = init(8);
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.told.last().unwrap().run.map(|run| run.pid), Some(8));
}

#[test]
fn h12_each_asker_hears_of_its_own_order_when_many_are_refused_at_once() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start web\nstart db");
    let mut answers = [node.respond("web"), node.respond("db"), node.respond("web")];
    let mut refused = VecDeque::from(std::mem::take(&mut node.orders));
    let mut kept = Vec::new();
    let mut carry = |effect| match effect {
        Effect::Respond(order) => Carried::Back(order),
        Effect::Record(Record::Response(response)) => {
            kept.push(response.requested_at);
            Carried::Out
        }
        _ => Carried::Out,
    };
    // All of them in the effects of one input.
    let effects = refused.drain(..).map(Effect::Respond).collect();
    assert!(carry_out_all(&mut node.state, effects, &mut carry));
    assert_eq!(kept.len(), 3);
    for answered in &mut answers {
        let response = answered.try_recv().unwrap().unwrap();
        assert_eq!(response.outcome.message, TOO_MANY);
    }
    assert!(!node.state.has_orders_out());
    assert_eq!(node.state.health.count(Failure::ResponseQueueFull), 3);
}

#[test]
fn h17_a_stop_keeps_what_was_ordered_and_has_no_response_yet() {
    let mut node = Node::running();
    let mut answered = node.respond("c1");
    let mut effects = Vec::new();
    node.state.give_up_orders(&mut effects);
    let [Effect::Record(Record::Response(kept))] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((kept.outcome.succeeded, &*kept.container.id), (false, "c1"));
    assert!(kept.outcome.message.contains("it may happen"), "{}", kept.outcome.message);
    assert!(answered.try_recv().is_err(), "whoever asked is told that driftd is stopping");
}

#[test]
fn out_of_the_box_nothing_is_ever_ordered() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nsession c1 100 pts/0");
    assert!(node.orders.is_empty());
}

#[test]
fn after_containerd_was_lost_everything_is_scanned_again() {
    let mut node = Node::running();
    node.play("list c1");
    node.commands.clear();
    node.play("connected\ndisconnected\nconnected\nstart c1\nlist c1");
    assert_eq!(node.gaps, ["containerd_lost"; 2], "its beginning and its end");
    assert_eq!(node.commands, [SensorCommand::Scan { container: id("c1"), ticket: None }]);
    node.play("list c1\nlist c1");
    assert_eq!(node.commands.len(), 1, "a list without a loss asks for no scan");
}

#[test]
fn a_baseline_that_failed_is_asked_for_again() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nexec c1 /tmp/x evil");
    node.play("failed full-disk");
    assert_eq!(node.state.status().problems.len(), 1);
    node.play("list c1");
    assert_eq!(node.jobs, 2);
    node.play("baseline").expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn what_a_listing_does_not_name_is_gone() {
    let mut node = Node::running();
    node.commands.clear();
    node.play("list");
    let pid = Some(7);
    assert_eq!(node.commands, [SensorCommand::Detach { container: id("c1"), pid }]);
    // The last scan is still judged, then the container is forgotten.
    node.play("scan c1 /tmp/x evil").expect(&["file.added /tmp/x x1 r1"]);
    node.give(Input::Watch(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert!(node.state.inventory.get(&id("c1")).is_none());
}

#[test]
fn a_task_is_marked_before_its_record_is_known() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.give(Input::Node(RuntimeEvent::TaskCreated { container: id("c1"), pid: 7, rootfs: None }));
    assert_eq!(
        node.commands,
        [SensorCommand::Attach { container: id("c1"), pid: 7, rootfs: None }]
    );
    node.play("attached c1\nexec c1 /tmp/x evil\nstart c1\nbaseline")
        .expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a_diff_names_every_difference_and_which_are_findings() {
    let mut node = Node::running();
    let (reply, mut answer) = oneshot::channel();
    node.give(Input::Asked(ApiRequest::Diff { container: "c1".into(), reply }));
    let Some(SensorCommand::Scan { ticket, .. }) = node.commands.pop() else { panic!("no scan") };
    let observations = [("/usr/bin/curl", "evil"), ("/bin/ls", "ls"), ("/bin/.ls", "ls")]
        .map(|(path, content)| Observation {
            container: id("c1"),
            init: init(7),
            at: Timestamp::UNIX_EPOCH,
            source: Source::Scan,
            session: None,
            file_of: None,
            reached_as: None,
            fact: present(RootfsPath::new(path).unwrap(), content),
        })
        .into();
    node.give(Input::Watch(SensorEvent::ScanBatch { container: id("c1"), ticket, observations }));
    node.give(Input::Watch(SensorEvent::Scanned {
        container: id("c1"),
        ticket,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    let diff = answer.try_recv().unwrap().unwrap();
    let lines: Vec<String> = diff
        .differences
        .iter()
        .map(|difference| {
            let kind = difference.finding.map_or("-", |(kind, _)| kind.name());
            format!("{:?} {} {kind}", difference.change, difference.path)
        })
        .collect();
    assert_eq!(
        lines,
        [
            "Relocated /bin/.ls file.relocated",
            "Metadata /bin/ls -",
            "Modified /usr/bin/curl file.modified",
        ]
    );
    assert!(!diff.incomplete);
}

#[test]
fn u06_a_stopped_container_is_compared_where_its_layer_lies_and_nothing_is_judged() {
    let mut node = Node::running();
    node.play("stop c1");
    let (reply, mut answer) = oneshot::channel();
    node.give(Input::Asked(ApiRequest::Diff { container: "c1".into(), reply }));
    let Some(SensorCommand::Compare { container, ticket, rootfs, .. }) = node.commands.pop() else {
        panic!("no walk: {:?}", answer.try_recv())
    };
    let dirs = OverlayDirs { upperdir: "/upper".into(), lowerdirs: vec!["/lower".into()] };
    assert_eq!((container, rootfs), (id("c1"), dirs));
    let observation = Observation {
        container: id("c1"),
        init: init(0),
        at: Timestamp::UNIX_EPOCH,
        source: Source::Scan,
        session: None,
        file_of: None,
        reached_as: None,
        fact: present(RootfsPath::new("/tmp/x").unwrap(), "evil"),
    };
    let compared =
        |observations, end| Input::Watch(SensorEvent::Compared { ticket, observations, end });
    node.give(compared(vec![observation], None));
    assert!(answer.try_recv().is_err(), "it is not over");
    node.give(compared(Vec::new(), Some(true)));
    let diff = answer.try_recv().unwrap().unwrap();
    let paths: Vec<_> = diff.differences.iter().map(|one| one.path.to_string()).collect();
    assert_eq!((paths, diff.incomplete), (vec!["/tmp/x".to_owned()], false));
    assert!(node.told.is_empty(), "a question changes nothing");
}

#[test]
fn a_container_that_cannot_be_compared_has_no_diff_but_a_reason() {
    let mut node = Node::running();
    node.play("start c2\nstop c1\nremove c2");
    let nowhere = Container { rootfs: None, ..container("c1", None) };
    node.give(Input::Node(RuntimeEvent::Container(Box::new(nowhere))));
    for (name, expected) in [
        ("c1", "container default/c1 is not watched: it does not run, and where its files are"),
        ("c2", "container default/c2 is not watched: it was removed"),
        ("zz", "no container"),
    ] {
        let (reply, mut answer) = oneshot::channel();
        node.give(Input::Asked(ApiRequest::Diff { container: name.into(), reply }));
        let err = answer.try_recv().unwrap().unwrap_err().to_string();
        assert!(err.starts_with(expected), "{err}");
    }
}

// ---- files of the layers

/// What the watchers were told of trust, in order.
fn trusts(node: &mut Node) -> Vec<Trust> {
    std::mem::take(&mut node.commands)
        .into_iter()
        .filter_map(|command| match command {
            SensorCommand::Trust { container, trust } => {
                assert_eq!(container, id("c1"));
                Some(trust)
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_watchers_are_told_how_far_to_trust_the_layers() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nbaseline");
    assert_eq!(trusts(&mut node), [Trust::Unknown], "nobody has looked");
    node.play("trusted 100\ntrusted 200");
    assert_eq!(trusts(&mut node), [Trust::UpTo(up_to(100)), Trust::UpTo(up_to(200))]);
    // The same container runs again.
    node.play("stop c1\nstart c1\nattached c1");
    let [
        SensorCommand::Detach { .. },
        SensorCommand::Attach { .. },
        SensorCommand::Trust { trust, .. },
    ] = &node.commands[..]
    else {
        panic!("{:?}", node.commands)
    };
    assert_eq!(*trust, Trust::UpTo(up_to(200)));
}

#[test]
fn files_that_are_in_no_directory_are_not_trusted_for_what_was_seen_in_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut container = container("c1", Some(7));
    container.layers[0].directory = None;
    node.give(Input::Node(RuntimeEvent::Container(Box::new(container))));
    node.play("attached c1\nbaseline\ntrusted 100");
    assert_eq!(trusts(&mut node), [Trust::Unknown, Trust::Unknown]);
}

#[test]
fn without_a_baseline_no_file_of_a_layer_is_looked_at_until_there_may_be_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed full-disk\nlist c1\ntrusted 100");
    assert_eq!(trusts(&mut node), [Trust::NoBaseline, Trust::Unknown, Trust::UpTo(up_to(100))]);
}

#[test]
fn the_answer_to_another_containers_job_voids_no_judgement() {
    let mut node = Node::running();
    let BaselineEvent::Ready { baseline, chain_id, .. } = ready(None) else { unreachable!() };
    for _ in 0..2 {
        node.commands.clear();
        let unchanged_since = Some(up_to(7));
        let news = BaselineEvent::Ready { baseline: baseline.clone(), chain_id, unchanged_since };
        node.give(Input::Baseline(news, ImageReference::default()));
    }
    assert_eq!(node.commands, []);
}

#[test]
fn a38_a_layer_changed_on_disk_is_told_when_it_is_executed() {
    let mut node = Node::running();
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls ls").expect(&[]);
    let verdict = |content, verdict| SensorCommand::Judged {
        container: id("c1"),
        file: layer_file_of(content),
        verdict,
    };
    assert_eq!(node.commands, [verdict("ls", Verdict::Image)]);
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls other\nlayer-exec c1 /bin/ls other")
        .expect(&["exec.modified /bin/ls x2 r2"]);
    assert_eq!(node.commands, [verdict("other", Verdict::Drift), verdict("other", Verdict::Drift)]);
    let told = node.told.last().unwrap();
    assert_eq!(told.expected.as_ref().unwrap().layer, layer(1).to_string());
    assert!(told.detail.as_ref().unwrap().contains("layer of the image"), "{told:?}");
}

#[test]
fn a38_a_layer_changed_before_its_baseline_was_there_is_told_when_it_is() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nlayer-exec c1 /bin/ls other\nbaseline")
        .expect(&["exec.modified /bin/ls x1 r1"]);
}

#[test]
fn a_file_of_a_layer_that_finds_no_room_is_asked_for_again() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1");
    for number in 0..budget::BACKLOG.number {
        node.play(&format!("exec c1 /tmp/x{number} evil"));
    }
    node.commands.clear();
    node.play("layer-exec c1 /bin/ls other");
    assert!(
        matches!(node.commands[..], [SensorCommand::Judged { verdict: Verdict::Lost, .. }]),
        "{:?}",
        node.commands
    );
}

// ---- layers that were tampered with

fn program(path: &str, content: &str) -> LayerEntry {
    LayerEntry::File(FileEntry {
        file_type: FileType::Regular,
        format: Format::Elf,
        size: content.len() as u64,
        blake3: Some(blake3_of(content)),
        ..FileEntry::directory(RootfsPath::new(path).unwrap(), 0o755)
    })
}

fn differs(path: &str, expected: Option<LayerEntry>, found: Option<LayerEntry>) -> LayerDifference {
    LayerDifference { path: RootfsPath::new(path).unwrap(), expected, found }
}

fn tampered(number: u8, differences: Vec<LayerDifference>) -> Input {
    let total = differences.len() as u64;
    let compared_with = "directory /lower".to_owned();
    let image = ImageReference { name: Some("img:1".into()), ..ImageReference::default() };
    let layer = layer(number);
    let directories = vec!["/lower".into()];
    Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, directories, differences, total },
        image,
    )
}

fn changed_ls() -> LayerDifference {
    differs("/bin/ls", Some(program("/bin/ls", "ls")), Some(program("/bin/ls", "evil")))
}

#[test]
fn a38_a_tampered_layer_is_told_for_every_container_that_shows_it() {
    let mut node = Node::running();
    node.play("start c2\nattached c2\nbaseline");
    node.give(tampered(1, vec![changed_ls()]));
    node.expect(&["baseline.tampered /bin/ls x1 r1", "baseline.tampered /bin/ls x1 r1"]);
    let containers: Vec<_> = node.told.iter().map(|told| told.container_id().cloned()).collect();
    assert_eq!(containers, [Some(id("c1")), Some(id("c2"))]);
    let told = &node.told[0];
    assert_eq!((told.severity, told.source.as_str()), (Severity::Critical, "verify"));
    assert_eq!(told.file.as_ref().unwrap().blake3, Some(blake3_of("evil")));
    let expected = told.expected.as_ref().unwrap();
    assert_eq!(expected.blake3, Some(blake3_of("ls")));
    assert_eq!(expected.layer, layer(1).to_string());
    assert!(told.detail.as_ref().unwrap().contains("directory /lower"));
    assert!(node.orders.is_empty());

    // Compared again, and again after a restart: it is the same finding.
    let known = node.told.clone();
    node.give(tampered(1, vec![changed_ls()]));
    assert_eq!(node.told.len(), 2);
    let mut after = Node::new(Respond::default(), known);
    after.play("start c1\nstart c2\nbaseline");
    after.give(tampered(1, vec![changed_ls()]));
    after.expect(&[]);
    // Tampered with once more, it is another one.
    let again = Some(program("/bin/ls", "worse"));
    after.give(tampered(1, vec![differs("/bin/ls", Some(program("/bin/ls", "ls")), again)]));
    assert_eq!(after.told.len(), 2);
}

#[test]
fn a_tampered_layer_that_no_container_uses_is_told_with_its_image() {
    let mut node = Node::running();
    node.give(tampered(9, vec![changed_ls()]));
    node.give(tampered(9, vec![changed_ls()]));
    node.expect(&["baseline.tampered /bin/ls x1 r1"]);
    let told = node.told[0].clone();
    assert_eq!((told.container_id(), told.image.name.as_deref()), (None, Some("img:1")));
    let mut after = Node::new(Respond::default(), vec![told]);
    after.give(tampered(9, vec![changed_ls()]));
    after.expect(&[]);
}

#[test]
fn the_same_layer_from_another_directory_is_whole() {
    let mut node = Node::running();
    let mut other = container("c2", Some(8));
    other.layers[0].directory = Some("/other".into());
    node.give(Input::Node(RuntimeEvent::Container(Box::new(other))));
    node.play("baseline");
    node.give(tampered(1, vec![changed_ls()]));
    let told: Vec<_> = node.told.iter().map(Finding::container_id).collect();
    assert_eq!(told, [Some(&id("c1"))]);
    // Nobody knows any more where it was.
    let Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, differences, total, .. },
        image,
    ) = tampered(1, vec![changed_ls()])
    else {
        unreachable!()
    };
    let directories = Vec::new();
    let news = BaselineEvent::Tampered { layer, compared_with, directories, differences, total };
    node.give(Input::Baseline(news, image));
    let told: Vec<_> = node.told.iter().map(Finding::container_id).collect();
    assert_eq!(told, [Some(&id("c1")), Some(&id("c2"))]);
}

#[test]
fn a_change_that_a_layer_above_hides_is_told_of_the_layer_alone() {
    let image = ImageBaseline::from_text(&["/bin/ls 755 elf old\n/bin/ps 755 elf ps", IMAGE]);
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut one = container("c1", Some(7));
    let chain_id = image.chain_id();
    let below = Layer { id: layer(1), chain_id, directory: Some("/lower".into()), blob: None };
    one.layers = vec![below.clone(), Layer { id: layer(2), ..below }];
    node.give(Input::Node(RuntimeEvent::Container(Box::new(one))));
    let news = BaselineEvent::Ready { chain_id, baseline: Arc::new(image), unchanged_since: None };
    node.give(Input::Baseline(news, ImageReference::default()));
    let hidden = differs("/bin/ls", Some(program("/bin/ls", "old")), None);
    let shown = differs("/bin/ps", Some(program("/bin/ps", "ps")), None);
    // What is hidden by a whiteout that was put there.
    let hiding = LayerEntry::Whiteout(RootfsPath::new("/bin/ps").unwrap());
    node.give(tampered(1, vec![hidden, shown]));
    node.give(tampered(2, vec![differs("/bin/ps", None, Some(hiding))]));
    let told: Vec<String> = node
        .told
        .iter()
        .map(|told| {
            let container = told.container_id().map_or("-".into(), ToString::to_string);
            let file = told.file.as_ref().unwrap();
            let expected = told.expected.as_ref().map_or("-", |expected| &expected.layer[..9]);
            format!("{container} {} {:?} {} {expected}", file.path, file.file_type, file.deleted)
        })
        .collect();
    assert_eq!(
        told,
        [
            "default/c1 /bin/ps Regular true sha256:01",
            "- /bin/ls Regular true sha256:01",
            "default/c1 /bin/ps CharDevice false sha256:01",
        ]
    );
}

#[test]
fn a_wholly_different_layer_is_told_by_some_of_it_and_in_words() {
    let mut node = Node::running();
    let data = |number: usize| {
        let path = format!("/etc/a{number:04}");
        let mut file = program(&path, "x");
        if let LayerEntry::File(file) = &mut file {
            (file.format, file.mode) = (Format::Data, 0o644);
        }
        differs(&path, None, Some(file))
    };
    let mut differences: Vec<LayerDifference> = (0..500).map(data).collect();
    differences.push(changed_ls());
    let Input::Baseline(
        BaselineEvent::Tampered { layer, compared_with, directories, differences, .. },
        image,
    ) = tampered(1, differences)
    else {
        unreachable!()
    };
    let news =
        BaselineEvent::Tampered { layer, compared_with, directories, differences, total: 70_000 };
    node.give(Input::Baseline(news, image));
    assert_eq!(node.told.len(), layers::MAX_TOLD);
    let path = |told: &Finding| told.file.as_ref().unwrap().path.to_string();
    assert_eq!(path(&node.told[0]), "/bin/ls", "programs first");
    let last = node.told.last().unwrap().detail.as_ref().unwrap();
    assert!(last.ends_with("; 69900 more differences are not told one by one"), "{last}");
    assert_eq!(node.gaps, ["findings_full"]);
}

#[test]
fn a_setting_may_kill_what_runs_from_a_tampered_layer() {
    let respond = Respond { kill_on: [Kind::BaselineTampered].into() };
    let mut node = Node::new(respond, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    node.give(tampered(1, vec![changed_ls()]));
    node.give(tampered(9, vec![changed_ls()]));
    assert_eq!(node.orders.len(), 1);
    assert_eq!(node.orders[0].container, id("c1"));
}

// ---- no baseline

impl Node {
    /// Lets time pass.
    fn wait(&mut self, seconds: i64) -> &mut Node {
        self.clock += seconds;
        self.give(Input::Due);
        self
    }
}

#[test]
fn a_container_without_a_baseline_is_told_once_for_each_reason() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed full-disk").wait(5).expect(&[]);
    assert!(node.state.next_due().is_some());
    node.wait(10).expect(&["baseline.unavailable (full-disk) x1 r1"]);
    assert_eq!(node.state.next_due(), None);
    let told = &node.told[0];
    assert_eq!(
        (told.severity, &told.attack, told.source.as_str()),
        (Severity::Info, &None, "baseline")
    );
    // Tried again, in vain; and then for another reason.
    node.play("list c1\nfailed full-disk").wait(0);
    assert_eq!(node.told.len(), 1);
    node.play("list c1\nfailed no-layers").wait(0).expect(&[
        "baseline.unavailable (full-disk) x1 r1",
        "baseline.unavailable (no-layers) x1 r1",
    ]);
    // It comes after all: what was told stays as it is.
    node.play("list c1\nbaseline").wait(100);
    assert_eq!((node.told.len(), node.state.next_due()), (2, None));
    let mut after = Node::new(Respond::default(), node.told.clone());
    after.play("start c1\nattached c1\nfailed full-disk").wait(20).expect(&[]);
}

#[test]
fn a_baseline_that_is_only_late_is_no_finding() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed busy\nlist c1").wait(3);
    node.play("baseline").wait(60).expect(&[]);
    // Being tried again is not the end either.
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed busy\nlist c1").wait(60).expect(&[]);
    assert_eq!(node.state.next_due(), None);
    node.play("failed busy").wait(0).expect(&["baseline.unavailable (busy) x1 r1"]);
}

#[test]
fn a_container_that_cannot_have_a_baseline_says_why() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut one = container("c1", Some(7));
    one.layers = Vec::new();
    one.no_baseline = Some("it runs in a sandbox of its own (gVisor)".into());
    node.give(Input::Node(RuntimeEvent::Container(Box::new(one.clone()))));
    assert_eq!(node.commands.len(), 2, "{:?}", node.commands);
    node.wait(20)
        .expect(&["baseline.unavailable (it runs in a sandbox of its own (gVisor)) x1 r1"]);
    node.give(Input::Node(RuntimeEvent::Container(Box::new(one))));
    node.wait(20);
    assert_eq!(node.told.len(), 1);
}

#[test]
fn what_does_not_run_misses_no_baseline() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.give(Input::Node(RuntimeEvent::Container(Box::new(container("c1", None)))));
    node.play("failed full-disk").wait(60).expect(&[]);
    node.play("start c1").wait(0).expect(&[]);
    node.play("failed full-disk").wait(0).expect(&["baseline.unavailable (full-disk) x1 r1"]);
}

#[test]
fn a_rootfs_that_is_no_overlay_has_a_baseline_and_is_not_watched() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline");
    node.give(Input::Watch(SensorEvent::NotAttached {
        container: id("c1"),
        pid: 7,
        reason: "it is not an overlay".into(),
    }));
    let (reply, mut answer) = oneshot::channel();
    node.give(Input::Asked(ApiRequest::Containers(reply)));
    let [view] = &answer.try_recv().unwrap()[..] else { panic!("one container") };
    assert_eq!((view.baseline.as_str(), view.watched), ("ready", false));
    assert_eq!(view.problem.as_deref(), Some("it is not an overlay"));
    node.wait(60).expect(&[]);
}

#[test]
fn what_is_reported_of_an_earlier_run_says_nothing_of_the_newest() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline\nstop c1");
    node.give(Input::Node(RuntimeEvent::TaskCreated { container: id("c1"), pid: 8, rootfs: None }));
    let view = |node: &mut Node| {
        let (reply, mut answer) = oneshot::channel();
        node.give(Input::Asked(ApiRequest::Containers(reply)));
        let [view] = &answer.try_recv().unwrap()[..] else { panic!("one container") };
        (view.watched, view.armed_before_start, view.problem.clone())
    };
    // The first run was armed before its start; the second one was over too soon.
    node.play("attached c1");
    assert_eq!(view(&mut node), (false, false, None));
    let reason = "its init process 8 is gone";
    node.give(Input::Watch(SensorEvent::NotAttached {
        container: id("c1"),
        pid: 8,
        reason: reason.into(),
    }));
    assert_eq!(view(&mut node), (false, false, Some(reason.to_owned())));
    node.play("attached c1");
    assert_eq!(view(&mut node), (false, false, Some(reason.to_owned())));
}

#[test]
fn b32_a_clock_that_is_set_back_turns_no_finding_around_and_hides_no_gap() {
    let mut node = Node::running();
    let lost = |second| {
        Input::Watch(SensorEvent::Lost {
            failure: Failure::KernelQueueOverflow,
            container: None,
            detail: "events were dropped".into(),
            at: Timestamp::from_second(second).unwrap(),
        })
    };
    node.clock = 100_000;
    node.give(lost(100_000));
    node.play("exec c1 /tmp/x evil");
    node.clock = 1_000;
    node.give(lost(1_000));
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/y other");
    assert_eq!(node.gaps.len(), 2, "{:?}", node.gaps);
    node.expect(&["exec.new /tmp/x x2 r2", "exec.new /tmp/y x1 r1"]);
    for finding in &node.told {
        assert!(finding.first_seen <= finding.last_seen, "{finding:#?}");
    }
}

// ---- what is told together

impl Node {
    fn see(&mut self, source: Source, fact: Fact) {
        let at = Timestamp::from_second(self.clock + 1).unwrap();
        let observation = Observation {
            container: id("c1"),
            init: self.init,
            at,
            source,
            session: None,
            file_of: None,
            reached_as: None,
            fact,
        };
        self.give(Input::Watch(SensorEvent::Observed(observation)));
    }

    /// The kind of every finding, how many of it there are, and how many files they
    /// tell of.
    fn kinds(&self) -> Vec<(Kind, usize, u64)> {
        let mut kinds: BTreeMap<Kind, (usize, u64)> = BTreeMap::new();
        for finding in self.newest() {
            let (findings, files) = kinds.entry(finding.kind).or_default();
            *findings += 1;
            *files += finding.files.unwrap_or(1);
        }
        kinds.into_iter().map(|(kind, (findings, files))| (kind, findings, files)).collect()
    }

    /// What the history would hold of an aggregated finding's files.
    fn members(&self) -> BTreeMap<(FindingId, RootfsPath), Member> {
        let mut members = BTreeMap::new();
        for (finding, change) in &self.changes {
            match change {
                MemberChange::Seen(member) => {
                    members.insert((*finding, member.path.clone()), member.clone());
                }
                MemberChange::Gone { path, .. } => {
                    members.get_mut(&(*finding, path.clone())).expect("was told").removed = true;
                }
            }
        }
        members
    }

    fn say_all(&mut self) {
        self.clock += 2;
        self.give(Input::Due);
    }

    /// The daemon as it is after a restart.
    fn restarted(&self) -> Node {
        let known = self.newest().into_iter().cloned().collect();
        let mut node = Node::new(Respond::default(), known);
        for ((finding, _), member) in self.members() {
            node.state.remember_member(finding, &member);
        }
        node.clock = self.clock;
        node.play("start c1\nbaseline\nattached c1");
        node
    }
}

fn at(path: &str) -> RootfsPath {
    RootfsPath::new(path).unwrap()
}

/// A process with these ancestors, nearest first.
fn descendant(pid: u32, ancestors: &[u32]) -> Arc<Process> {
    let named = |pid: &u32| Ancestor {
        identity: ProcessIdentity { pid: *pid, start_time: 1 },
        exe: None,
        argv: None,
    };
    Arc::new(Process { ancestors: ancestors.iter().map(named).collect(), ..process(pid) })
}

fn dpkg(exe: &str) -> Fact {
    let argv = Some(vec!["dpkg".to_owned(), "-i".to_owned(), "nmap.deb".to_owned()]);
    let process = Process { exe: Some(exe.to_owned()), argv, ..process(50) };
    Fact::PackageManager { process: Arc::new(process) }
}

fn written_by(path: &str, content: &str, writer: Option<Arc<Process>>) -> Fact {
    Fact::Present { path: at(path), state: state_of(content), lower: None, writer }
}

#[test]
fn a39_twenty_thousand_copies_are_one_finding_and_the_evil_one_is_another() {
    let mut node = Node::running();
    for number in 0..20_000 {
        node.see(Source::Change, present(at(&format!("/tmp/t{number}")), "ls"));
        if number == 10_000 {
            node.see(Source::Gate, exec(at("/tmp/x"), "evil"));
            assert_eq!(node.told.last().unwrap().kind, Kind::ExecNew, "told at once");
        }
    }
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 1, 1), (Kind::FileRelocated, 1, 20_000)]);
    assert_eq!(node.members().len(), 20_000);
    assert!(node.told.len() < 200, "{} revisions", node.told.len());
    let relocated = node.newest()[0].clone();
    assert_eq!(relocated.file.as_ref().unwrap().path, at("/tmp/t0"));

    // A walk and a restart find the same again.
    let mut restarted = node.restarted();
    for node in [&mut node, &mut restarted] {
        let told = node.told.len();
        for number in 0..20_000 {
            node.see(Source::Scan, present(at(&format!("/tmp/t{number}")), "ls"));
        }
        node.say_all();
        assert_eq!(node.told.len(), told, "nothing is told twice");
        node.see(Source::Change, present(at("/tmp/more"), "ls"));
        node.say_all();
        assert_eq!(node.told.last().unwrap().files, Some(20_001));
        assert_eq!(node.told.last().unwrap().id, relocated.id);
    }

    // One of them is run: that is a finding, and its story is the copying.
    node.see(Source::Gate, exec(at("/tmp/t7"), "ls"));
    let run = node.told.last().unwrap();
    assert_eq!((run.kind, run.story), (Kind::ExecRelocated, Some(relocated.id)));
}

#[test]
fn one_copy_is_about_one_file_and_two_are_counted() {
    let mut node = Node::running();
    node.play("write c1 /tmp/a ls").say_all();
    assert_eq!(node.told.iter().map(|told| told.files).collect::<Vec<_>>(), [None]);
    assert!(node.members().is_empty());
    node.play("write c1 /tmp/b ls").say_all();
    assert_eq!(node.told.last().unwrap().files, Some(2));
    assert_eq!(node.members().len(), 2);
    // A copy that goes is gone, and is no file more when it comes back.
    node.play("gone c1 /tmp/b").say_all();
    assert_eq!(node.members().values().filter(|member| member.removed).count(), 1);
    node.play("write c1 /tmp/b ls").say_all();
    assert_eq!(node.told.last().unwrap().files, Some(2));
    assert_eq!(node.members().values().filter(|member| member.removed).count(), 0);
}

#[test]
fn many_files_of_a_directory_are_told_together_and_none_is_lost() {
    let mut node = Node::running();
    for number in 0..500 {
        node.see(Source::Change, present(at(&format!("/opt/t/{number}")), &number.to_string()));
    }
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 33, 500)]);
    let members = node.members();
    assert_eq!(members.len(), 500 - 32);
    let paths: HashSet<_> = members.into_keys().map(|(_, path)| path).collect();
    let alone = node.newest().into_iter().filter(|told| told.files.is_none());
    let alone: HashSet<_> = alone.map(|told| told.file.as_ref().unwrap().path.clone()).collect();
    assert_eq!(paths.union(&alone).count(), 500);

    let mut restarted = node.restarted();
    for number in 0..500 {
        restarted.see(Source::Scan, present(at(&format!("/opt/t/{number}")), &number.to_string()));
    }
    restarted.say_all();
    assert_eq!(restarted.told, []);
}

#[test]
fn a37_a_tree_of_programs_is_a_bounded_number_of_findings() {
    let mut node = Node::running();
    for number in 0..5000 {
        let path = format!("/opt/{}/{number}", number / 10);
        node.see(Source::Change, present(at(&path), &number.to_string()));
    }
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 256 + 64 + 1, 5000)]);
    // What was built and then is run stands alone, however many there are.
    for number in 0..300 {
        let path = format!("/opt/{}/{number}", number / 10);
        node.see(Source::Gate, exec(at(&path), &number.to_string()));
    }
    assert_eq!(node.kinds()[0], (Kind::ExecNew, 300, 300));
    assert!(node.told.iter().rev().take(300).all(|told| told.story.is_some()));
}

#[test]
fn what_a_package_manager_writes_is_one_transaction() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    assert_eq!(node.told, [], "nothing is written yet");
    node.see(Source::Change, written_by("/usr/bin/nmap", "nmap", Some(descendant(50, &[]))));
    let transaction = node.told[0].clone();
    assert_eq!((transaction.kind, transaction.files), (Kind::PackageTransaction, Some(1)));
    assert_eq!(transaction.process.as_ref().unwrap().identity.pid, 50);
    node.see(Source::Change, written_by("/usr/bin/ncat", "ncat", Some(descendant(52, &[51, 50]))));
    let gone = Fact::Absent { path: at("/usr/bin/curl"), writer: Some(descendant(50, &[])) };
    node.see(Source::Change, gone);
    // Who wrote it is not known: it may have been anybody.
    node.see(Source::Change, written_by("/usr/bin/evil", "evil", None));
    node.see(Source::Change, written_by("/usr/bin/other", "other", Some(descendant(60, &[1]))));
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 2, 2), (Kind::PackageTransaction, 1, 3)]);

    // Its program is run: that is told, and where it came from.
    node.see(Source::Gate, exec(at("/usr/bin/nmap"), "nmap"));
    let run = node.told.last().unwrap();
    assert_eq!((run.kind, run.transaction), (Kind::ExecNew, Some(transaction.id)));
    // Other content at the same path was not brought by it.
    node.see(Source::Gate, exec(at("/usr/bin/ncat"), "worse"));
    assert_eq!(node.told.last().unwrap().transaction, None);

    let mut restarted = node.restarted();
    for (path, content) in [("/usr/bin/nmap", "nmap"), ("/usr/bin/ncat", "ncat")] {
        restarted.see(Source::Scan, present(at(path), content));
    }
    restarted.see(Source::Scan, Fact::Absent { path: at("/usr/bin/curl"), writer: None });
    restarted.say_all();
    assert_eq!(restarted.told, []);
}

#[test]
fn a_program_that_is_run_before_it_settles_is_brought_by_its_transaction() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    node.see(Source::Gate, exec(at("/usr/bin/nmap"), "nmap"));
    node.see(Source::Change, written_by("/usr/bin/nmap", "nmap", Some(descendant(50, &[]))));
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 1, 1), (Kind::PackageTransaction, 1, 1)]);
    let run = node.newest()[0];
    assert_eq!(run.transaction, Some(node.newest()[1].id));
}

#[test]
fn scripts_of_a_package_belong_to_its_transaction_and_what_they_give_away_stands_alone() {
    let mut node = Node::running();
    node.see(Source::Change, dpkg("/usr/bin/dpkg"));
    let script = |path: &str, process: Arc<Process>| {
        let mut fact = exec(at(path), "script");
        if let Fact::Executed { process: runner, state, .. } = &mut fact {
            (*runner, state.format) = (process, Format::Script);
        }
        fact
    };
    let own = descendant(51, &[50]);
    node.see(Source::Gate, script("/var/lib/dpkg/info/nmap.postinst", own.clone()));
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::PackageTransaction, 1, 1)]);
    let mut privileged = state_of("ls");
    privileged.mode = 0o4755;
    let (path, writer) = (at("/bin/ls"), Some(own.clone()));
    node.see(Source::Change, Fact::Present { path, state: privileged, lower: None, writer });
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FilePrivileged, 1, 1), (Kind::PackageTransaction, 1, 2)]);
    let told = node.newest();
    let privileged = told.iter().find(|told| told.kind == Kind::FilePrivileged).unwrap();
    assert_eq!(privileged.transaction, Some(told[0].id));
    // The same scripts, run by somebody else or from somewhere else.
    node.see(Source::Gate, script("/tmp/nmap.postinst", own));
    node.see(Source::Gate, script("/var/lib/dpkg/info/x.postinst", descendant(60, &[1])));
    assert_eq!(node.kinds()[0], (Kind::ExecScript, 2, 2));
}

#[test]
fn what_only_calls_itself_a_package_manager_is_none() {
    for (before, exe) in
        [("write c1 /usr/bin/dpkg evil", "/usr/bin/dpkg"), ("exec c1 /tmp/dpkg evil", "/tmp/dpkg")]
    {
        let mut node = Node::running();
        node.play(before);
        node.see(Source::Change, dpkg(exe));
        node.see(Source::Change, written_by("/usr/bin/x", "x", Some(descendant(50, &[]))));
        assert!(node.told.iter().all(|told| told.kind != Kind::PackageTransaction), "{exe}");
    }
}

#[test]
fn a42_the_programs_of_a_foreign_root_are_told_together_after_the_first_ones() {
    let mut node = Node::running();
    let run = |path: &str, content: &str, root: Option<&str>| {
        let mut fact = exec(at(path), content);
        if let Fact::Executed { process: runner, .. } = &mut fact {
            *runner = Arc::new(Process { root: root.map(Into::into), ..process(42) });
        }
        fact
    };
    for number in 0..100 {
        let (path, content) = (format!("/tmp/alpine/bin/{number}"), number.to_string());
        let told = node.told.len();
        node.see(Source::Gate, run(&path, &content, Some("/tmp/alpine")));
        assert_eq!(node.told.len(), told + 1, "each is told at once");
        // Written files are told when they settle, and these have been run.
        node.see(Source::Change, present(at(&path), &content));
    }
    assert_eq!(node.kinds(), [(Kind::ExecNew, 9, 100)]);
    // The same again is one more sighting, not one more file.
    node.see(Source::Gate, run("/tmp/alpine/bin/50", "50", Some("/tmp/alpine")));
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::ExecNew, 9, 100)]);
    assert_eq!(node.told.last().unwrap().count, 93);
    // What is run elsewhere stands alone.
    node.see(Source::Gate, run("/tmp/x", "evil", None));
    assert_eq!(node.kinds(), [(Kind::ExecNew, 10, 101)]);
}

#[test]
fn the_removal_of_a_guard_is_never_one_of_many() {
    let mut image = IMAGE.to_owned();
    for number in 0..500 {
        image.push_str(&format!("/sbin/{number} 755 elf {number}\n"));
    }
    image.push_str("/sbin/tcpdump 755 elf tcpdump\n");
    let mut node = Node::running();
    let baseline = Arc::new(ImageBaseline::from_text(&[&image]));
    let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
    let ready = BaselineEvent::Ready { chain_id, baseline, unchanged_since: None };
    node.give(Input::Baseline(ready, ImageReference::default()));
    for number in 0..500 {
        node.see(Source::Scan, Fact::Absent { path: at(&format!("/sbin/{number}")), writer: None });
    }
    node.see(Source::Scan, Fact::Absent { path: at("/sbin/tcpdump"), writer: None });
    node.say_all();
    assert_eq!(node.kinds(), [(Kind::FileRemoved, 34, 501)]);
    let guard = node.newest().into_iter().find(|told| told.severity == Severity::Medium).unwrap();
    assert_eq!(guard.file.as_ref().unwrap().path, at("/sbin/tcpdump"));
}

/// A node whose sessions are watched for a rhythm.
fn patient() -> Node {
    let mut node = Node::running();
    node.state.policy.probe_patience = jiff::SignedDuration::from_secs(30);
    node
}

fn code(code: i32) -> Option<Exit> {
    Some(Exit { code: Some(code), signal: None })
}

/// A node whose container `c1` declares one probe: `check`.
fn declaring() -> Node {
    let mut node = patient();
    let mut one = container("c1", Some(7));
    let (argv, source) = (texts(&["check"]), ProbeSource::Healthcheck);
    one.probes = vec![DeclaredProbe { argv, source }];
    node.give(Input::Node(RuntimeEvent::Container(Box::new(one))));
    node
}

#[test]
fn a_session_is_told_from_its_opening_to_its_end_with_its_commands_in_order() {
    let mut node = Node::running();
    node.play(
        "session c1 100 pts/0 sh
         exec-started c1 shell 100
         ran c1 100 100 sh
         ran c1 100 101 cp /bin/ls /tmp/x
         ended c1 100 101 0
         ran c1 100 102 /tmp/x
         exec c1 /tmp/x evil
         ended c1 100 102 3
         ran c1 100 103 rm /tmp/x",
    )
    .wait(1);
    let session = node.session(100);
    assert_eq!((session.state, session.commands), (SessionState::Open, 4));
    assert_eq!(session.exec_id.as_deref(), Some("shell"));
    let commands = ["sh: runs", "cp /bin/ls /tmp/x: 0", "/tmp/x: 3", "rm /tmp/x: runs"];
    assert_eq!(node.commands_of(100), commands);
    // Both name each other.
    let found = node.told.iter().find(|told| told.kind == Kind::ExecNew).unwrap();
    assert_eq!(found.session, Some(session.id));
    assert_eq!(session.findings, [found.id]);
    let own = node.told.iter().find(|told| told.kind == Kind::SessionInteractive).unwrap();
    assert_eq!(session.finding, Some(own.id));

    node.play("ended c1 100 103 0\nended c1 100 100 7");
    let session = node.session(100);
    assert_eq!((session.state, session.exit), (SessionState::Closed, code(7)));
    assert!(session.ended_at.unwrap() > session.started_at);
    assert_eq!(node.commands_of(100)[0], "sh: 7");
    // One session is one finding, which lasts as long as it.
    let own = node.told.iter().rev().find(|told| told.kind == Kind::SessionInteractive).unwrap();
    assert_eq!((own.count, Some(own.last_seen)), (1, session.ended_at));
}

#[test]
fn a_program_that_becomes_another_one_has_ended_and_the_session_goes_on() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh\nran c1 100 100 bash").wait(1);
    assert_eq!(node.commands_of(100), ["sh: ended", "bash: runs"]);
    assert_eq!(node.session(100).state, SessionState::Open);
}

#[test]
fn what_a_session_leaves_behind_is_still_its_own() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nended c1 100 100 0\nleft-behind c1 /tmp/x evil 100")
        .wait(1);
    let session = node.session(100);
    assert_eq!((session.state, session.findings_total), (SessionState::Closed, 1));
    assert_eq!(node.told.last().unwrap().session, Some(session.id));
}

#[test]
fn what_was_told_before_its_session_is_the_sessions() {
    let mut node = Node::running();
    node.play("left-behind c1 /tmp/x evil 100\nsession c1 100 pts/0 sh");
    assert_eq!(node.session(100).findings, [node.told[0].id]);
}

#[test]
fn a30_whoever_joins_the_namespaces_is_told_so_and_with_a_terminal_twice() {
    let mut node = Node::running();
    node.play("entered c1 200 - ls /").expect(&["namespace.entered pid 200 x1 r1"]);
    node.play("entered c1 300 pts/0 sh").expect(&[
        "namespace.entered pid 200 x1 r1",
        "namespace.entered pid 300 x1 r1",
        "session.interactive pid 300 x1 r1",
    ]);
    assert!(node.told[0].detail.as_ref().unwrap().contains("past its runtime"));
    node.wait(1);
    assert_eq!(node.session(300).finding, Some(node.told[1].id));
}

#[test]
fn a_terminal_that_is_opened_later_makes_a_session_interactive() {
    let mut node = patient();
    node.play("session c1 100 - python3 -c x\nterminal c1 100 pts/3\nterminal c1 100 pts/4")
        .expect(&["session.interactive pid 100 x1 r1"]);
    let session = node.session(100);
    assert_eq!(session.interactive, Some(Interactive::TerminalLater));
    assert_eq!(session.process.tty.as_deref(), Some("pts/3"));
}

#[test]
fn b15_a_command_at_a_steady_rhythm_is_counted_and_never_reported() {
    let mut node = patient();
    for pid in 200..212 {
        node.play(&format!("session c1 {pid} - pg_isready -q\nended c1 {pid} {pid} 0")).wait(8);
    }
    node.wait(60).expect(&[]);
    let probe = node.probes.last().unwrap();
    assert_eq!((probe.source, probe.count), (ProbeSource::Learned, 12));
    assert_eq!(probe.interval_milliseconds, Some(11_000));
    // Before it was known for one, it was a session like others.
    let told: HashSet<u32> =
        node.sessions.iter().map(|(session, _)| session.process.identity.pid).collect();
    assert_eq!(told, (200..204).collect());
}

#[test]
fn a29_a_command_that_comes_once_is_reported_when_no_rhythm_has_come() {
    let mut node = patient();
    node.play("session c1 200 - cat /etc/passwd\nended c1 200 200 0").expect(&[]);
    assert_eq!(node.session(200).finding, None);
    node.wait(40).expect(&["session.exec pid 200 x1 r1"]);
    assert_eq!(node.session(200).finding, Some(node.told[0].id));
    // Where driftd is to answer, nothing waits.
    let mut node = patient();
    node.state.policy.respond.kill_on = [Kind::SessionExec].into();
    node.play("session c1 200 - cat /etc/passwd").expect(&["session.exec pid 200 x1 r1"]);
    assert_eq!(node.orders.len(), 1);
    // Nor where nothing is to be learned.
    let mut node = Node::running();
    for pid in 200..210 {
        node.play(&format!("session c1 {pid} - check\nended c1 {pid} {pid} 0")).wait(8);
    }
    node.expect(&["session.exec pid 200 x10 r10"]);
    assert!(node.probes.is_empty());
}

#[test]
fn a_declared_probe_is_counted_from_the_first_time_on() {
    let mut node = declaring();
    node.play("session c1 200 - check\nran c1 200 200 check").wait(60).expect(&[]);
    assert!(node.sessions.is_empty());
    assert_eq!(node.probes.last().unwrap().count, 1);
    // With other arguments it is no probe.
    node.play("session c1 201 - check --all").wait(60).expect(&["session.exec pid 201 x1 r1"]);
}

#[test]
fn a_probe_that_runs_what_is_not_the_images_is_reported() {
    let mut node = declaring();
    node.play("session c1 100 - check\nran c1 100 100 check\nexec c1 /tmp/x evil").wait(1);
    let kinds: Vec<Kind> = node.told.iter().map(|told| told.kind).collect();
    assert!(kinds.contains(&Kind::SessionExec) && kinds.contains(&Kind::ExecNew), "{kinds:?}");
    let session = node.session(100);
    assert_eq!((session.findings_total, session.commands), (1, 1));
    assert_eq!(node.commands_of(100), ["check: runs"]);
    let own = node.told.iter().find(|told| told.kind == Kind::SessionExec).unwrap();
    assert!(own.detail.as_ref().unwrap().contains("probe"), "{:?}", own.detail);
}

#[test]
fn a_probe_that_is_to_be_reported_is_reported() {
    let mut node = patient();
    for pid in 200..206 {
        node.play(&format!("session c1 {pid} - check\nended c1 {pid} {pid} 0"));
    }
    node.wait(1);
    let id = node.probes.last().unwrap().id;
    let mut effects = Vec::new();
    assert!(node.state.set_probe(id, true, &mut effects).unwrap().reported);
    assert_eq!(effects.len(), 1);
    node.play("session c1 300 - check").wait(60).expect(&["session.exec pid 300 x1 r1"]);
    assert_eq!(node.state.set_probe(model::ProbeId([0; 16]), true, &mut effects), None);
}

#[test]
fn a_session_that_was_open_before_a_restart_goes_on() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh").wait(1);
    let mut after = Node::new(Respond::default(), node.told.clone());
    let mut gone = node.session(100).clone();
    gone.process.identity.pid = 99;
    gone.id = model::SessionId::new(&id("c1"), gone.process.identity);
    // Its first process is gone.
    gone.state = SessionState::Closed;
    after.state.remember_sessions(
        vec![(node.session(100).clone(), Vec::new()), (gone, Vec::new())],
        Vec::new(),
    );
    after.play("start c1\nbaseline\nattached c1\nfound c1 100 pts/0 sh").wait(1).expect(&[]);
    after.play("ran c1 100 102 ls\nended c1 100 100 0");
    let session = after.session(100);
    assert_eq!((session.state, session.commands), (SessionState::Closed, 2));
    assert!(session.revision > node.session(100).revision);
    let gone = after.session(99);
    assert_eq!((gone.state, gone.ended_at), (SessionState::Closed, None));
}

/// Each time somebody comes to the terminal of init is a session of its own, and after
/// a restart nobody knows whether he is still there.
#[test]
fn who_comes_to_a_terminal_is_known_by_when() {
    let mut node = Node::running();
    node.play("came c1 501 1 sh\nran c1 501 102 ls\nended c1 501 501 ?").wait(1);
    node.play("came c1 502 1 sh").wait(1);
    let seen = node.newest_sessions();
    let states: Vec<_> = seen.iter().map(|one| (one.state, one.client.as_deref())).collect();
    let by = Some("containerd");
    assert_eq!(states, [(SessionState::Closed, by), (SessionState::Open, by)]);
    assert!(seen.iter().all(|one| one.process.identity.pid == 1));
    let told: Vec<_> = node.newest().iter().map(|told| (told.kind, told.session)).collect();
    let expected = [0, 1].map(|index| (Kind::SessionInteractive, Some(seen[index].id)));
    assert_eq!(told, expected);

    let mut after = Node::new(Respond::default(), node.told.clone());
    after.state.remember_sessions(vec![(seen[1].clone(), Vec::new())], Vec::new());
    after.play("start c1\nbaseline\nattached c1\ncame c1 503 1 sh").wait(9);
    let left = after.newest_sessions().into_iter().find(|one| one.id == seen[1].id).unwrap();
    assert_eq!((left.id, left.state, left.ended_at), (seen[1].id, SessionState::Closed, None));
}

#[test]
fn sessions_end_with_their_container() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh\nstop c1");
    assert_eq!(node.session(100).state, SessionState::Closed);
    assert_eq!(node.commands_of(100), ["sh: ended"]);
}

#[test]
fn the_runtime_tells_how_an_execution_ended_whoever_tells_first() {
    let mut node = Node::running();
    node.play("exec-started c1 one 100\nsession c1 100 - true\nended c1 100 100 ?");
    assert_eq!(node.session(100).exec_id.as_deref(), Some("one"));
    assert_eq!((node.session(100).state, node.session(100).exit), (SessionState::Closed, None));
    node.play("exec-exited c1 one 100 5");
    assert_eq!(node.session(100).exit, code(5));
    // Another one that has the same pid.
    node.play("exec-exited c1 two 100 9").wait(1);
    assert_eq!(node.session(100).exit, code(5));
}

#[test]
fn commands_beyond_those_that_are_listed_are_counted() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh");
    for pid in 1000..1600 {
        node.play(&format!("ran c1 100 {pid} true"));
    }
    node.play("ran-more c1 100 400").wait(1);
    assert_eq!(node.session(100).commands, 1000);
    let listed: usize = node.sessions.iter().map(|(_, commands)| commands.len()).sum();
    assert_eq!(listed, 512);
}

#[test]
fn thousands_of_sessions_are_told_and_not_all_remembered() {
    let mut node = Node::running();
    for pid in 1000..4000 {
        node.play(&format!("session c1 {pid} - true {pid}\nended c1 {pid} {pid} 0"));
    }
    let told: HashSet<_> = node.sessions.iter().map(|(session, _)| session.id).collect();
    assert_eq!(told.len(), 3000);
    assert!(node.gaps.is_empty());
}

// ---- losses that last, and stops

fn lost(failure: Failure, name: &str, second: i64) -> Input {
    Input::Watch(SensorEvent::Lost {
        failure,
        container: Some(id(name)),
        detail: "something".into(),
        at: Timestamp::from_second(second).unwrap(),
    })
}

#[test]
fn h02_a_degraded_view_is_incomplete_until_its_cause_is_over_or_the_container_ends() {
    let mut node = Node::running();
    for failure in [Failure::MountsFull, Failure::NamesFull, Failure::MarkRefused] {
        node.gaps.clear();
        node.give(lost(failure, "c1", 10));
        let problems = node.state.status().problems;
        assert!(problems.concat().contains(failure.name()), "{problems:?}");
        // A walk does not help.
        node.give(scanned("c1", 20));
        assert_eq!(node.state.status().problems.len(), 1);
        node.give(Input::Watch(SensorEvent::Over { failure, container: Some(id("c1")) }));
        assert_eq!(node.state.status().problems, [""; 0]);
        assert_eq!(node.gaps, [failure.name(); 2], "its beginning and its end");
    }
    node.give(lost(Failure::MountsFull, "c1", 10));
    node.play("stop c1");
    assert_eq!(node.state.status().problems, [""; 0]);
}

#[test]
fn h02_an_incomplete_walk_lasts_until_a_complete_one() {
    let mut node = Node::running();
    node.give(lost(Failure::ScanIncomplete, "c1", 10));
    assert_eq!(node.state.status().problems.len(), 1);
    node.give(scanned("c1", 5));
    assert_eq!(node.state.status().problems.len(), 1, "it began before");
    node.give(scanned("c1", 11));
    assert_eq!(node.state.status().problems, [""; 0]);
}

#[test]
fn h07_a_flood_of_one_container_hides_no_gap_of_another() {
    let mut node = Node::running();
    node.play("start c2\nattached c2");
    for second in 0..100 {
        node.give(lost(Failure::PipelineFull, "c1", second));
    }
    node.give(lost(Failure::PipelineFull, "c2", 100));
    assert_eq!(node.gaps, ["pipeline_full"; 2], "each container's is kept once");
    let containers: Vec<_> =
        node.state.status().gaps.into_iter().filter_map(|gap| gap.container).collect();
    assert_eq!(containers, [id("c1"), id("c2")]);
}

fn scanned(name: &str, began: i64) -> Input {
    Input::Watch(SensorEvent::Scanned {
        container: id(name),
        ticket: None,
        began: Timestamp::from_second(began).unwrap(),
        complete: true,
    })
}

#[test]
fn u03_a_time_without_driftd_is_a_gap_and_what_the_first_walk_finds_may_have_run() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let second = |second| Timestamp::from_second(second).unwrap();
    let gap = node.state.was_not_running(second(-30), second(0));
    let Record::Gap { name, container: None, at, until, .. } = gap else { panic!("{gap:?}") };
    assert_eq!((&*name, at, until), ("not_running", second(-30), Some(second(0))));
    let problems = |node: &Node| node.state.status().problems;
    assert!(problems(&node).concat().contains("not_running"), "{:?}", problems(&node));
    let attached = SensorEvent::Attached { container: id("c1"), pid: 7, before_start: false };
    node.play("connected\nstart c1\nbaseline");
    node.give(Input::Watch(attached));
    node.play("list c1");
    assert_eq!(problems(&node).len(), 1, "c1 was not walked yet");
    node.play("scan c1 /tmp/x new");
    let detail = node.told.last().unwrap().detail.clone().unwrap_or_default();
    assert!(detail.contains("may have run"), "{detail:?}");
    node.give(scanned("c1", 1));
    assert_eq!(problems(&node), [""; 0]);
    assert_eq!(node.gaps, ["not_running"], "its end is told");
    let gaps = node.state.status().gaps;
    assert_eq!((gaps[0].since, gaps[0].until), (second(-30), Some(second(0))));
    // What comes later was seen to come.
    node.play("scan c1 /tmp/y newer");
    assert_eq!(node.told.last().unwrap().detail, None);
}

#[test]
fn r36_a_container_that_ran_before_its_marks_is_a_gap_and_what_is_found_may_have_run() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline");
    let at = |millisecond| Timestamp::from_millisecond(millisecond).unwrap();
    let (began, marked) = (at(1000), at(1250));
    node.give(Input::Watch(SensorEvent::Unarmed { container: id("c1"), pid: 7, began, marked }));
    let attached = SensorEvent::Attached { container: id("c1"), pid: 7, before_start: false };
    node.give(Input::Watch(attached));
    let problems = node.state.status().problems;
    assert!(problems.concat().contains("armed_late") && problems.concat().contains("250 ms"));
    let gap = node.state.status().gaps.remove(0);
    assert_eq!((gap.container, gap.since, gap.until), (Some(id("c1")), began, Some(marked)));
    node.play("scan c1 /tmp/x new");
    let detail = node.told.last().unwrap().detail.clone().unwrap_or_default();
    assert!(detail.contains("may have run"), "{detail:?}");
    // No walk finds what has gone, and an earlier run says nothing of this one.
    node.give(scanned("c1", 5));
    let (container, reason) = (id("c1"), "its init is gone".to_owned());
    node.give(Input::Watch(SensorEvent::NotAttached { container, pid: 3, reason }));
    assert_eq!(node.state.status().problems.len(), 1);
    node.clock = 100;
    node.give(Input::Due);
    assert_eq!(node.state.status().problems, [""; 0]);
    assert_eq!(node.gaps, ["armed_late"; 2], "its beginning and its end");
}

struct NoBlobs;

impl crate::baseline::Blobs for NoBlobs {
    fn open(&self, _: &crate::model::Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
        Err("there are none".into())
    }
}

/// Everything that the loop needs, and nothing of it is stopped yet.
struct Loop {
    state: State,
    reader: Reader,
    inputs: Inputs,
    outputs: Outputs,
    changes: Sender<RuntimeEvent>,
    reports: Sender<Box<SensorEvent>>,
    responses: Sender<Response>,
    questions: Sender<ApiRequest>,
    stop: Sender<std::convert::Infallible>,
    orders: tokio::sync::mpsc::Receiver<ResponseRequest>,
    records: Receiver<Record>,
    /// Nobody takes these.
    _commands: Receiver<SensorCommand>,
    _directory: tempfile::TempDir,
}

fn a_loop(room_for_commands: usize) -> Loop {
    use crossbeam_channel::{bounded, unbounded};
    let directory = tempfile::tempdir().unwrap();
    let health = Arc::new(Health::default());
    let history = crate::history::History::open(directory.path()).unwrap();
    let store = Store::open(&directory.path().join("baselines"), health.clone()).unwrap();
    let (news_sender, news) = bounded(16);
    let settings = crate::config::Baseline::default();
    let recorder =
        Recorder::start(Arc::new(store), &settings, Arc::new(NoBlobs), news_sender, health);
    let (changes_sender, changes) = unbounded();
    let (reports_sender, reports) = unbounded();
    let (questions_sender, questions) = unbounded();
    let (responses_sender, responses) = unbounded();
    let (stop_sender, stop) = bounded(0);
    let (commands, taken_commands) = bounded(room_for_commands);
    let (records, taken_records) = unbounded();
    let (orders, taken_orders) = tokio::sync::mpsc::channel(256);
    Loop {
        state: Node::running().state,
        reader: history.reader(),
        inputs: Inputs {
            changes,
            reports,
            news,
            questions,
            responses,
            history_begun: crossbeam_channel::never(),
            stop,
        },
        outputs: Outputs { commands, recorder, records, orders },
        changes: changes_sender,
        reports: reports_sender,
        responses: responses_sender,
        questions: questions_sender,
        stop: stop_sender,
        orders: taken_orders,
        records: taken_records,
        _commands: taken_commands,
        _directory: directory,
    }
}

#[test]
fn h05_h06_what_is_queued_at_a_stop_is_taken_in_whoever_has_gone_already() {
    const PROGRAMS: usize = 3000;
    let parts = a_loop(4);
    let script = Node::running();
    for number in 0..PROGRAMS {
        let line = format!("exec c1 /tmp/x{number} evil{number}");
        let Input::Watch(report) = script.input(&line) else { panic!("no report") };
        parts.reports.send(Box::new(report)).unwrap();
    }
    // A command for each that nobody takes; and the API and containerd have ended.
    let Loop { state, reader, inputs, outputs, records, stop, .. } = parts;
    drop((parts.changes, parts.questions, parts.reports, parts.responses, stop));
    run(state, &reader, &inputs, &outputs).unwrap();
    let told = records.try_iter().filter(|record| matches!(record, Record::Finding(_))).count();
    assert_eq!(told, PROGRAMS);
    outputs.recorder.stop();
}

#[test]
fn h05_a_loop_whose_askers_have_gone_goes_on_until_it_is_stopped() {
    let parts = a_loop(1024);
    let Loop { state, reader, inputs, outputs, records, stop, reports, .. } = parts;
    drop((parts.changes, parts.questions, parts.responses));
    let running = std::thread::spawn(move || {
        run(state, &reader, &inputs, &outputs).unwrap();
        outputs.recorder.stop();
    });
    let Input::Watch(report) = Node::running().input("exec c1 /tmp/x evil") else { panic!() };
    reports.send(Box::new(report)).unwrap();
    let record = records.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
    assert!(matches!(record, Record::Finding(_)), "{record:?}");
    drop(stop);
    running.join().unwrap();
}

#[test]
fn a_stop_waits_for_the_response_that_is_being_carried_out() {
    let parts = a_loop(1024);
    let Loop { mut state, reader, inputs, outputs, records, stop, reports, mut orders, .. } = parts;
    state.policy.respond.kill_on = ["exec.new".parse().unwrap()].into();
    let Input::Watch(report) = Node::running().input("exec c1 /tmp/x evil") else { panic!() };
    reports.send(Box::new(report)).unwrap();
    drop(stop);
    let responses = parts.responses;
    let responding = std::thread::spawn(move || {
        let order = orders.blocking_recv().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        responses.send(order.failed(TOO_MANY.to_owned())).unwrap();
    });
    run(state, &reader, &inputs, &outputs).unwrap();
    responding.join().unwrap();
    let messages = records.try_iter().filter_map(|record| match record {
        Record::Response(response) => Some(response.outcome.message),
        _ => None,
    });
    assert_eq!(messages.collect::<Vec<_>>(), [TOO_MANY]);
    outputs.recorder.stop();
}

#[test]
fn x18_a_history_that_begins_anew_is_given_everything_that_is_known() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nsession c1 100 pts/0 sh\nran c1 100 102 ls").wait(1);
    let (known, sessions) = (node.newest().len(), node.newest_sessions().len());
    assert_eq!((known, sessions), (2, 1));
    let findings: Vec<Finding> = node.newest().into_iter().cloned().collect();
    node.told.clear();
    node.sessions.clear();
    node.give(Input::HistoryBegun);
    let mut again: Vec<Finding> = node.told.clone();
    again.sort_by_key(|finding| findings.iter().position(|known| known.id == finding.id));
    assert_eq!(again, findings, "in the revisions that they have");
    assert_eq!(node.commands_of(100), ["ls: runs"]);
}
