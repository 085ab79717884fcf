//! The loop's rules, by value: a script of inputs in, what was told out.

use super::*;
use crate::baseline::ImageBaseline;
use crate::config::Respond;
use crate::model::{
    Ancestor, FileType, Format, ImageReference, Layer, LayerId, Outcome, OverlayDirs,
    ProcessIdentity, Sha256Hash, Task,
};

const IMAGE: &str = "
/bin 755 dir
/tmp 1777 dir
/bin/busybox 755 elf busybox
/bin/ls 755 elf ls
/usr/bin/curl 755 elf curl
/etc/app.conf 644 data conf
";
const ENDPOINT: &str = "/run/containerd/containerd.sock";

/// A node that is a list of lines.
struct Node {
    state: State,
    clock: i64,
    /// Every finding revision that was recorded, in order.
    told: Vec<Finding>,
    commands: Vec<Command>,
    orders: Vec<Order>,
    gaps: Vec<String>,
    jobs: usize,
}

impl Node {
    fn new(respond: Respond, known: Vec<Finding>) -> Node {
        let policy = Policy { generation: 1, respond };
        let state = State::new("node".into(), policy, Arc::default(), known, Timestamp::UNIX_EPOCH);
        Node {
            state,
            clock: 0,
            told: Vec::new(),
            commands: Vec::new(),
            orders: Vec::new(),
            gaps: Vec::new(),
            jobs: 0,
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
                Effect::Record(Record::Response(_)) => (),
                Effect::Record(Record::Gap { name, .. }) => self.gaps.push(name),
                Effect::Respond(order) => self.orders.push(order),
            }
        }
    }

    fn input(&self, line: &str) -> Input {
        let words: Vec<&str> = line.split_whitespace().collect();
        let observed = |source, fact| {
            let at = Timestamp::from_second(self.clock + 1).unwrap();
            Observation { container: id(words[1]), at, source, fact }
        };
        let path = || RootfsPath::new(words[2]).unwrap();
        match words[..] {
            ["start", name] => Input::Node(Change::Container(Box::new(container(name, Some(7))))),
            ["stop", name] => Input::Node(Change::TaskExited { container: id(name) }),
            ["remove", name] => Input::Node(Change::Removed { container: id(name) }),
            ["list", ref names @ ..] => Input::Node(Change::Listed {
                endpoint: ENDPOINT.into(),
                containers: names.iter().map(|name| id(name)).collect(),
            }),
            ["connected"] => Input::Node(Change::Connected { endpoint: ENDPOINT.into() }),
            ["disconnected"] => Input::Node(Change::Disconnected {
                endpoint: ENDPOINT.into(),
                reason: "the stream ended".into(),
            }),
            ["attached", name] => {
                Input::Watch(Report::Attached { container: id(name), before_start: true })
            }
            ["baseline"] => {
                let baseline = Arc::new(ImageBaseline::from_text(&[IMAGE]));
                Input::Baseline(News::Ready {
                    chain_id: baseline.chain_id(),
                    baseline,
                    unchanged_since: None,
                })
            }
            ["exec", _, _, content] => {
                Input::Watch(Report::Observed(observed(Source::Gate, exec(path(), content))))
            }
            ["write", _, _, content] => {
                Input::Watch(Report::Observed(observed(Source::Change, present(path(), content))))
            }
            ["gone", _, _] => Input::Watch(Report::Observed(observed(
                Source::Change,
                Fact::Absent { path: path() },
            ))),
            ["scan", name, ref rest @ ..] => {
                let observations = rest
                    .chunks(2)
                    .map(|pair| {
                        let path = RootfsPath::new(pair[0]).unwrap();
                        let fact = match pair[1] {
                            "-" => Fact::Absent { path },
                            content => present(path, content),
                        };
                        observed(Source::Scan, fact)
                    })
                    .collect();
                Input::Watch(Report::ScanBatch { container: id(name), ticket: None, observations })
            }
            ["session", _, pid, tty] => {
                let mut process = process(pid.parse().unwrap());
                process.tty = Some(tty.to_owned()).filter(|tty| tty != "-");
                let fact = Fact::SessionOpened { process: Arc::new(process) };
                Input::Watch(Report::Observed(observed(Source::Gate, fact)))
            }
            _ => panic!("bad line: {line:?}"),
        }
    }

    /// Checks the newest revision of every finding told so far.
    #[track_caller]
    fn expect(&mut self, expected: &[&str]) -> &mut Node {
        let mut newest: Vec<&Finding> = Vec::new();
        for finding in &self.told {
            match newest.iter_mut().find(|known| known.id == finding.id) {
                Some(known) => *known = finding,
                None => newest.push(finding),
            }
        }
        let actual: Vec<String> = newest
            .iter()
            .map(|finding| {
                let subject = finding.file.as_ref().map_or_else(
                    || format!("pid {}", finding.process.as_ref().unwrap().identity.pid),
                    |file| format!("{}{}", file.path, if file.deleted { " (deleted)" } else { "" }),
                );
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

fn container(name: &str, pid: Option<u32>) -> Container {
    let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
    Container {
        id: id(name),
        endpoint: ENDPOINT.into(),
        runtime: "io.containerd.runc.v2".into(),
        labels: BTreeMap::new(),
        pod: None,
        image: ImageReference::default(),
        snapshotter: "overlayfs".into(),
        snapshot_key: name.into(),
        layers: vec![Layer {
            id: LayerId::Chain(chain_id),
            chain_id,
            directory: Some("/lower".into()),
            blob: None,
        }],
        rootfs: Some(OverlayDirs { upperdir: "/upper".into(), lowerdirs: vec!["/lower".into()] }),
        task: pid.map(|pid| Task { pid, paused: false }),
        no_baseline: None,
        id_map: None,
    }
}

fn process(pid: u32) -> Process {
    Process {
        identity: ProcessIdentity { pid, start_time: 1 },
        exe: None,
        argv: None,
        uid: Some(0),
        tty: None,
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
            sha256: Sha256Hash([0; 32]),
        },
        deleted: false,
    }
}

fn exec(path: RootfsPath, content: &str) -> Fact {
    let process = Arc::new(process(42));
    Fact::Executed { path, state: state_of(content), lower: None, process, invoked_as: None }
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
    assert_eq!(node.told[0].container.id, id("c1"));
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
    assert_eq!(node.told[1].session, Some(node.told[0].id));
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
    for number in 0..MAX_FINDINGS / 2 + 10 {
        node.play(&format!("write c1 /tmp/x{number} evil{number}"));
    }
    assert_eq!(node.told.len(), MAX_FINDINGS / 2);
    assert_eq!(node.gaps.first().map(String::as_str), Some("findings_full"));
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.told.last().unwrap().kind, Kind::ExecNew);
}

#[test]
fn expected_has_a_sha256_only_when_the_lower_file_is_what_the_baseline_says() {
    let mut node = Node::running();
    let twin = |content| LowerTwin {
        blake3: crate::baseline::blake3_of(content),
        sha256: Sha256Hash([9; 32]),
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
        node.give(Input::Watch(Report::Observed(Observation {
            container: id("c1"),
            at,
            source: Source::Change,
            fact,
        })));
        let told = node.told.last().unwrap();
        assert_eq!(told.kind, Kind::FileModified);
        assert_eq!(told.expected.as_ref().unwrap().sha256, expected, "{content}");
    }
}

#[test]
fn a_kill_is_ordered_once_for_a_task_and_again_when_it_failed() {
    let respond = Respond { kill_on: [Kind::ExecNew].into() };
    let mut node = Node::new(respond, Vec::new());
    node.play("start c1\nbaseline\nattached c1\nwrite c1 /tmp/x evil");
    assert!(node.orders.is_empty());
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil");
    assert_eq!(node.orders.len(), 1);
    let order = node.orders.remove(0);
    assert_eq!(order.action, Action::Kill);
    assert_eq!(order.finding, Some(node.told.last().unwrap().id));
    node.give(Input::Responded(Response {
        container: order.container,
        reason: order.reason,
        requested_by: order.requested_by,
        requested_at: order.requested_at,
        finding: order.finding,
        outcome: Outcome {
            action: "kill".into(),
            succeeded: false,
            message: "containerd is gone".into(),
            at: Timestamp::UNIX_EPOCH,
        },
    }));
    assert_eq!(node.told.last().unwrap().outcome.as_ref().map(|o| o.succeeded), Some(false));
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.orders.len(), 1);
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
    assert_eq!(node.gaps, ["containerd_lost"]);
    assert_eq!(node.commands, [Command::Scan { container: id("c1"), ticket: None }]);
    node.play("list c1\nlist c1");
    assert_eq!(node.commands.len(), 1, "a list without a loss asks for no scan");
}

#[test]
fn a_baseline_that_failed_is_asked_for_again() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nexec c1 /tmp/x evil");
    let chain_id = ImageBaseline::from_text(&[IMAGE]).chain_id();
    node.give(Input::Baseline(News::Failed { chain_id, reason: "the disk is full".into() }));
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
    assert_eq!(node.commands, [Command::Detach { container: id("c1") }]);
    // The last scan is still judged, then the container is forgotten.
    node.play("scan c1 /tmp/x evil").expect(&["file.added /tmp/x x1 r1"]);
    node.give(Input::Watch(Report::Scanned { container: id("c1"), ticket: None, complete: true }));
    assert!(node.state.inventory.get(&id("c1")).is_none());
}

#[test]
fn a_task_is_marked_before_its_record_is_known() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.give(Input::Node(Change::TaskCreated { container: id("c1"), pid: 7, rootfs: None }));
    assert_eq!(node.commands, [Command::Attach { container: id("c1"), pid: 7, rootfs: None }]);
    node.play("attached c1\nexec c1 /tmp/x evil\nstart c1\nbaseline")
        .expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a_diff_names_every_difference_and_which_are_findings() {
    let mut node = Node::running();
    let (reply, mut answer) = oneshot::channel();
    node.give(Input::Asked(Question::Diff { container: "c1".into(), reply }));
    let Some(Command::Scan { ticket, .. }) = node.commands.pop() else { panic!("no scan") };
    let observations = [("/usr/bin/curl", "evil"), ("/bin/ls", "ls"), ("/bin/.ls", "ls")]
        .map(|(path, content)| Observation {
            container: id("c1"),
            at: Timestamp::UNIX_EPOCH,
            source: Source::Scan,
            fact: present(RootfsPath::new(path).unwrap(), content),
        })
        .into();
    node.give(Input::Watch(Report::ScanBatch { container: id("c1"), ticket, observations }));
    node.give(Input::Watch(Report::Scanned { container: id("c1"), ticket, complete: true }));
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
fn a_container_that_is_not_running_has_no_diff_but_a_reason() {
    let mut node = Node::running();
    node.play("stop c1");
    for (name, expected) in
        [("c1", "container default/c1 is not watched: it is not running"), ("zz", "no container")]
    {
        let (reply, mut answer) = oneshot::channel();
        node.give(Input::Asked(Question::Diff { container: name.into(), reply }));
        let err = answer.try_recv().unwrap().unwrap_err().to_string();
        assert!(err.starts_with(expected), "{err}");
    }
}
