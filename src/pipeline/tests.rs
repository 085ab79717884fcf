//! The loop's rules, by value: a script of inputs in, what was reported out.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::responses::{Actor, Cause};
use super::run::{Carried, carry_out_all};
use super::{ApiRequest, Effect, Input, Inputs, LookupError, Outputs, State};
use crate::baseline::{
    BaselineEvent, FileEntry, ImageBaseline, LayerDifference, LayerEntry, Recorder, Store,
    blake3_of,
};
use crate::budget;
use crate::config::{self, Respond};
use crate::containerd::RuntimeEvent;
use crate::health::{Failure, Health};
use crate::history::{MemberChange, Reader, Record};
use crate::inventory::BaselineState;
use crate::model::{
    self, Ancestor, ChainId, Container, ContainerId, Content, CouldChange, DeclaredProbe, DiffId,
    Entry as By, EntryPoint, Exit, Fact, FileFact, FileState, FileTime, FileType, Filesystem,
    Finding, FindingId, Format, IdMap, IdRange, ImageReference, Incarnation, Interactive, Kind,
    Layer, LayerFile, LayerId, LowerTwin, Member, Observation, Opening, OverlayDirs, Probe,
    ProbeSource, Process, ProcessIdentity, Restarter, RootfsPath, Run, Script, Session,
    SessionFact, SessionState, Severity, Sha256Hash, Source, Task,
};
use crate::policy::{self, Policy, PolicyFile};
use crate::respond::{Action, Response, ResponseRequest, TOO_MANY};
use crate::watch::{SensorCommand, SensorEvent, Trust, Verdict};

mod aggregation;
mod baselines;
mod findings;
mod layers;
mod limits;
mod losses;
mod node;
mod questions;
mod quiet;
mod requests;
mod responses;
mod run;
mod sessions;

const IMAGE: &str = "
/bin 755 dir
/tmp 1777 dir
/bin/busybox 755 elf busybox
/bin/ls 755 elf ls
/usr/bin/curl 755 elf curl
/usr/bin/dpkg 755 elf dpkg
/usr/bin/ld 755 elf ld
/usr/bin/tar 755 elf tar
/usr/sbin/useradd 755 elf useradd
/etc/app.conf 644 data conf
";

const ENDPOINT: &str = "/run/containerd/containerd.sock";

/// A node whose life is a script: one input for each line.
struct Node {
    state: State,
    clock: i64,
    /// The run in which things are observed.
    init: ProcessIdentity,
    /// Every finding revision that was recorded, in order.
    findings: Vec<Finding>,
    commands: Vec<SensorCommand>,
    requests: Vec<ResponseRequest>,
    responses: Vec<Response>,
    gaps: Vec<String>,
    /// The changes of aggregated findings' files.
    changes: Vec<(FindingId, MemberChange)>,
    jobs: usize,
    /// Every revision of a session, and its new commands.
    sessions: Vec<(Session, Vec<model::Command>)>,
    probes: Vec<Probe>,
}

impl Node {
    fn new(respond: Respond, known: Vec<Finding>) -> Node {
        let kill_on: Vec<Kind> = respond.kill_on.into_iter().collect();
        let policy =
            Policy { generation: 1, rules: Policy::killing(&kill_on).rules, ..Policy::default() };
        let state = State::new("node".into(), policy, Arc::default(), known, Timestamp::UNIX_EPOCH);
        Node {
            state,
            clock: 0,
            init: init(7),
            findings: Vec::new(),
            commands: Vec::new(),
            requests: Vec::new(),
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
                Effect::Command(command) => self.commands.push(command),
                Effect::RecordBaseline(_) => self.jobs += 1,
                Effect::CollectBaselines(_) => (),
                Effect::Record(Record::Finding(finding)) => self.findings.push(*finding),
                Effect::Record(Record::Aggregate { finding, changes }) => {
                    let id = finding.id;
                    self.changes.extend(changes.into_iter().map(|change| (id, change)));
                    self.findings.push(*finding);
                }
                Effect::Record(Record::Session { session, commands }) => {
                    self.sessions.push((*session, commands));
                }
                Effect::Record(Record::Probe(probe)) => self.probes.push(*probe),
                Effect::Record(Record::Response(response)) => self.responses.push(*response),
                Effect::Record(Record::Gap { name, .. }) => self.gaps.push(name),
                Effect::Respond(request) => self.requests.push(request),
                Effect::Decide { .. } => unreachable!("no question was asked"),
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
                Input::Runtime(RuntimeEvent::Container(Box::new(container(name, Some(7)))))
            }
            ["stop", name] => Input::Runtime(RuntimeEvent::TaskExited { container: id(name) }),
            ["remove", name] => Input::Runtime(RuntimeEvent::Removed { container: id(name) }),
            ["list", ref names @ ..] => Input::Runtime(RuntimeEvent::Listed {
                endpoint: ENDPOINT.into(),
                containers: names.iter().map(|name| id(name)).collect(),
            }),
            ["connected"] => Input::Runtime(RuntimeEvent::Connected { endpoint: ENDPOINT.into() }),
            ["disconnected"] => Input::Runtime(RuntimeEvent::Disconnected {
                endpoint: ENDPOINT.into(),
                reason: "the stream ended".into(),
            }),
            ["attached", name] => Input::Sensor(SensorEvent::Attached {
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
                if let Fact::File(FileFact::Executed { layer_file, .. }) = &mut fact {
                    *layer_file = Some(layer_file_of(content));
                }
                Input::Sensor(SensorEvent::Observed(observed(Source::Gate, fact)))
            }
            ["exec", _, _, content] => {
                Input::Sensor(SensorEvent::Observed(observed(Source::Gate, exec(path(), content))))
            }
            ["write", _, _, content] => Input::Sensor(SensorEvent::Observed(observed(
                Source::Change,
                present(path(), content),
            ))),
            ["gone", _, _] => Input::Sensor(SensorEvent::Observed(observed(
                Source::Change,
                Fact::File(FileFact::Absent { path: path(), writer: None }),
            ))),
            ["scan", name, ref rest @ ..] => {
                let observations = rest
                    .chunks(2)
                    .map(|pair| {
                        let path = RootfsPath::new(pair[0]).unwrap();
                        let fact = match pair[1] {
                            "-" => Fact::File(FileFact::Absent { path, writer: None }),
                            content => present(path, content),
                        };
                        observed(Source::Scan, fact)
                    })
                    .collect();
                Input::Sensor(SensorEvent::ScanBatch {
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
                let fact = Fact::Session(SessionFact::Opened { opening: Arc::new(opening) });
                Input::Sensor(SensorEvent::Observed(observed(source, fact)))
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
                let fact = Fact::Session(SessionFact::Opened { opening: Arc::new(opening) });
                Input::Sensor(SensorEvent::Observed(observed(Source::Change, fact)))
            }
            ["ran-more", _, root, times] => {
                let times = times.parse().unwrap();
                let fact = Fact::Session(SessionFact::RanMore { root: identity(root), times });
                Input::Sensor(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["ran", _, root, pid, ref argv @ ..] => {
                let run = Run {
                    process: identity(pid),
                    exe: Some(argv[0].to_owned()),
                    argv: Some(texts(argv)),
                    tty: None,
                };
                let fact =
                    Fact::Session(SessionFact::Ran { root: identity(root), run: Arc::new(run) });
                Input::Sensor(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["terminal", _, root, tty] => {
                let (interactive, tty) = (Interactive::TerminalLater, Some(tty.to_owned()));
                let fact = Fact::Session(SessionFact::Interactive {
                    root: identity(root),
                    interactive,
                    tty,
                });
                Input::Sensor(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["ended", _, root, pid, code] => {
                let exit = code.parse().ok().map(|code| Exit { code: Some(code), signal: None });
                let (root, process) = (identity(root), identity(pid));
                let fact = Fact::Session(SessionFact::ProcessEnded { root, process, exit });
                Input::Sensor(SensorEvent::Observed(observed(Source::Trace, fact)))
            }
            ["exec-started", name, exec_id, pid] => Input::Runtime(RuntimeEvent::ExecStarted {
                container: id(name),
                exec_id: exec_id.to_owned(),
                pid: pid.parse().unwrap(),
            }),
            ["exec-exited", name, exec_id, pid, code] => Input::Runtime(RuntimeEvent::ExecExited {
                container: id(name),
                exec_id: exec_id.to_owned(),
                pid: pid.parse().unwrap(),
                exit: Exit { code: code.parse().ok(), signal: None },
                at: Timestamp::from_second(self.clock + 1).unwrap(),
            }),
            ["interpret", _, _, content] => {
                let (path, filesystem, lower) = (path(), Filesystem::Overlay, None);
                let state = FileState { format: Format::Data, ..state_of(content) };
                let script = Script::File { path, filesystem, state, lower };
                let process = Arc::new(Process { exe: Some("/bin/sh".into()), ..process(42) });
                let (writer, denied) = (None, false);
                let fact = FileFact::Interpreted { script, process, writer, denied };
                Input::Sensor(SensorEvent::Observed(observed(Source::Gate, Fact::File(fact))))
            }
            ["load", _, _, content] => {
                let fact = FileFact::Loaded {
                    path: path(),
                    filesystem: Filesystem::Overlay,
                    state: state_of(content),
                    lower: None,
                    process: Arc::new(process(42)),
                    by_linker: false,
                    is_shared: false,
                    writer: None,
                    denied: false,
                };
                Input::Sensor(SensorEvent::Observed(observed(Source::Gate, Fact::File(fact))))
            }
            // Executed by a process that descends from `root`, whose parents have ended.
            ["left-behind", _, _, content, root] => {
                let mut observation = observed(Source::Gate, exec(path(), content));
                if let Fact::File(FileFact::Executed { process, .. }) = &mut observation.fact {
                    Arc::make_mut(process).ancestors.clear();
                }
                observation.session = Some(identity(root));
                Input::Sensor(SensorEvent::Observed(observation))
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

    /// The commands of the session whose first process is `pid`: arguments, and how they ended.
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

    /// The newest revision of every finding reported so far.
    fn newest(&self) -> Vec<&Finding> {
        let mut newest: Vec<&Finding> = Vec::new();
        let mut places = HashMap::new();
        for finding in &self.findings {
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

    /// Checks the newest revision of every finding reported so far.
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

impl Node {
    /// Lets time pass.
    fn wait(&mut self, seconds: i64) -> &mut Node {
        self.clock += seconds;
        self.give(Input::Due);
        self
    }
}

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
        self.give(Input::Sensor(SensorEvent::Observed(observation)));
    }

    /// The kinds of findings, each with the number of findings and of their files.
    fn kinds(&self) -> Vec<(Kind, usize, u64)> {
        let mut kinds: BTreeMap<Kind, (usize, u64)> = BTreeMap::new();
        for finding in self.newest() {
            let (findings, files) = kinds.entry(finding.kind).or_default();
            *findings += 1;
            *files += finding.files.unwrap_or(1);
        }
        kinds.into_iter().map(|(kind, (findings, files))| (kind, findings, files)).collect()
    }

    /// The members of aggregated findings, as the history would hold them.
    fn members(&self) -> BTreeMap<(FindingId, RootfsPath), Member> {
        let mut members = BTreeMap::new();
        for (finding, change) in &self.changes {
            match change {
                MemberChange::Seen(member) => {
                    members.insert((*finding, member.path.clone()), member.clone());
                }
                MemberChange::Gone { path, .. } => {
                    members.get_mut(&(*finding, path.clone())).expect("was reported").removed =
                        true;
                }
            }
        }
        members
    }

    fn publish(&mut self) {
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
            is_proven_inside: false,
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
        could_change: CouldChange::No,
    }
}

fn exec(path: RootfsPath, content: &str) -> Fact {
    let process = Arc::new(process(42));
    Fact::File(FileFact::Executed {
        path,
        filesystem: Filesystem::Overlay,
        running: false,
        denied: false,
        times: 1,
        state: state_of(content),
        lower: None,
        process,
        invoked_as: None,
        layer_file: None,
        writer: None,
    })
}

fn present(path: RootfsPath, content: &str) -> Fact {
    Fact::File(FileFact::Present {
        path,
        state: state_of(content),
        lower: None,
        writer: None,
        changed: None,
    })
}

fn fileless(content: &str) -> Fact {
    let mut fact = exec(at("/memfd:x"), content);
    if let Fact::File(FileFact::Executed { filesystem, .. }) = &mut fact {
        *filesystem = Filesystem::Anonymous;
    }
    fact
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
        is_proven_inside: false,
    };
    Arc::new(Process { ancestors: ancestors.iter().map(named).collect(), ..process(pid) })
}

fn dpkg(exe: &str) -> Fact {
    let argv = Some(vec!["dpkg".to_owned(), "-i".to_owned(), "nmap.deb".to_owned()]);
    let process = Process { exe: Some(exe.to_owned()), argv, ..process(50) };
    Fact::PackageManager { process: Arc::new(process) }
}

fn written_by(path: &str, content: &str, writer: Option<Arc<Process>>) -> Fact {
    Fact::File(FileFact::Present {
        path: at(path),
        state: state_of(content),
        lower: None,
        writer,
        changed: None,
    })
}

/// What became of a request, as `respond` reports it.
fn became(request: &ResponseRequest, succeeded: bool, gone: bool) -> Input {
    let mut response = request.failed("for the test".into());
    (response.outcome.succeeded, response.outcome.gone) = (succeeded, gone);
    Input::Response(response)
}

fn killing(kinds: &[Kind]) -> Node {
    let kill_on = kinds.iter().copied().collect();
    let mut node = Node::new(Respond { kill_on, ..Respond::default() }, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    node
}

fn scanned(name: &str, began: i64) -> Input {
    Input::Sensor(SensorEvent::Scanned {
        container: id(name),
        ticket: None,
        began: Timestamp::from_second(began).unwrap(),
        complete: true,
    })
}
