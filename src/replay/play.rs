//! Plays a script: each step becomes inputs of the pipeline's state, and what that asks
//! for in return (marks, baselines, responses) is answered as a node would, at once.
//!
//! It owns the node that the script describes: the time, which containers run, and what
//! was reported. It reads no clock and no file.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::future::ready;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::{SignedDuration, Timestamp};

use super::script::{
    Expectation, FileAction, FileStep, Pattern, Script, StartStep, Step, StepAction, WrongLine,
};
use crate::baseline::{BaselineEvent, ImageBaseline, blake3_of};
use crate::containerd::{Error, Killed, RuntimeEvent};
use crate::health::Health;
use crate::history::Record;
use crate::model::{
    Ancestor, ChainId, Container, ContainerId, Content, CouldChange, DiffId, EntryPoint, Exit,
    Fact, FileFact, FileState, FileType, Finding, ImageReference, Incarnation, Interactive, Labels,
    Layer, LayerId, Observation, Opening, OverlayDirs, Pod, Process, ProcessIdentity, RootfsPath,
    Run, Script as ScriptFact, SessionFact, Source, Task,
};
use crate::pipeline::{ApiRequest, Effect, Input, State};
use crate::policy::Policy;
use crate::respond::{self, Response, ResponseRequest, Runtime};
use crate::watch::{Decision, Question, SensorCommand, SensorEvent};

/// What a replay has made happen, in its order.
#[derive(Debug)]
pub enum Happened {
    /// A finding's newest revision.
    Finding(Box<Finding>),
    /// A response was carried out, or refused.
    Response(Box<Response>),
    /// Something was not seen: the name of a loss, and the reason.
    Loss {
        name: String,
        detail: String,
    },
    Session {
        container: ContainerId,
        entry: &'static str,
        is_open: bool,
    },
}

/// Expectations that were not met, with their lines.
pub type Unmet = Vec<WrongLine>;

/// How often one moment may bring something that is due.
const MOST_DUE: usize = 10_000;

/// How many inputs may follow from one step.
const MOST_INPUTS: usize = 10_000;

/// Plays a script. `each` receives what happens and when, by the script's clock.
pub fn play(
    script: &Script,
    each: &mut dyn FnMut(Timestamp, &Happened),
) -> Result<Unmet, WrongLine> {
    let mut node = Node::new(script, each).map_err(|problem| WrongLine { line: 1, problem })?;
    let mut unmet = Vec::new();
    for Step { line, action } in &script.steps {
        let at_line = |problem| WrongLine { line: *line, problem };
        match action {
            StepAction::Expect(expectation) => {
                unmet.extend(node.check(expectation).err().map(at_line));
                node.is_quiet = true;
            }
            action => node.take(action).map_err(at_line)?,
        }
    }
    Ok(unmet)
}

struct Image {
    baseline: Arc<ImageBaseline>,
    layers: Vec<Layer>,
}

/// One run of a container.
#[derive(Clone)]
struct Running {
    id: ContainerId,
    init: ProcessIdentity,
}

struct Node<'a> {
    state: State,
    health: Arc<Health>,
    now: Timestamp,
    images: BTreeMap<String, Image>,
    containers: BTreeMap<String, Container>,
    runtime: ReplayedRuntime,
    is_connected: bool,
    /// For the pids of containers that name none.
    next_pid: u32,
    findings: Vec<Finding>,
    responses: Vec<Response>,
    /// There was no finding since the last expectation.
    is_quiet: bool,
    each: &'a mut dyn FnMut(Timestamp, &Happened),
}

/// The socket that the containers of a script come from.
const ENDPOINT: &str = "/replay";

impl<'a> Node<'a> {
    fn new(
        script: &Script,
        each: &'a mut dyn FnMut(Timestamp, &Happened),
    ) -> Result<Node<'a>, String> {
        let policy = Policy::of(&script.settings, script.rules.as_ref());
        let health = Arc::new(Health::default());
        let begins_at = script.begins_at;
        let state = State::new(script.node.clone(), policy, health.clone(), Vec::new(), begins_at);
        let image = |(name, layers): (&String, &Vec<String>)| {
            let texts: Vec<&str> = layers.iter().map(String::as_str).collect();
            let baseline = ImageBaseline::parse(&texts).map_err(|err| format!("{name}: {err}"))?;
            let layer = |(id, chain_id)| Layer {
                id,
                chain_id,
                directory: Some("/replay/layer".into()),
                blob: None,
            };
            let layers = chain_of(&baseline).map(layer).collect();
            Ok((name.clone(), Image { baseline: Arc::new(baseline), layers }))
        };
        let images = script.images.iter().map(image).collect::<Result<_, String>>()?;
        let mut node = Node {
            state,
            health,
            now: begins_at,
            images,
            containers: BTreeMap::new(),
            runtime: ReplayedRuntime::default(),
            next_pid: 100,
            findings: Vec::new(),
            responses: Vec::new(),
            is_quiet: true,
            is_connected: false,
            each,
        };
        let endpoint: Arc<str> = ENDPOINT.into();
        node.give(Input::Runtime(RuntimeEvent::Connected { endpoint: endpoint.clone() }));
        node.give(Input::Runtime(RuntimeEvent::Listed { endpoint, containers: Vec::new() }));
        Ok(node)
    }

    /// Lets the state react, and answers what it asks for.
    fn give(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        for _ in 0..MOST_INPUTS {
            let Some(input) = inputs.pop_front() else { return };
            let mut effects = Vec::new();
            self.state.handle(input, self.now, &mut effects);
            for effect in effects {
                inputs.extend(self.answer(effect));
            }
        }
    }

    /// What a node does about an effect, and what it reports of that.
    fn answer(&mut self, effect: Effect) -> Vec<Input> {
        match effect {
            Effect::Command(command) => {
                self.sense(command).into_iter().map(Input::Sensor).collect()
            }
            Effect::RecordBaseline(request) => {
                let wanted = request.layers.last().map(|layer| layer.chain_id);
                let image = self
                    .images
                    .values()
                    .find(|image| image.layers.last().map(|layer| layer.chain_id) == wanted);
                let ready = image.zip(wanted).map(|(image, chain_id)| {
                    let baseline = image.baseline.clone();
                    let ready = BaselineEvent::Ready { chain_id, baseline, unchanged_since: None };
                    Input::Baseline(ready, ImageReference::default())
                });
                ready.into_iter().collect()
            }
            Effect::CollectBaselines(_) => Vec::new(),
            Effect::Record(record) => {
                self.record(record);
                Vec::new()
            }
            Effect::Respond(request) => self.respond(&request),
            // Asked for in `asked` alone.
            Effect::Decide { .. } => Vec::new(),
        }
    }

    fn sense(&self, command: SensorCommand) -> Option<SensorEvent> {
        match command {
            SensorCommand::Attach { container, pid, .. } => {
                Some(SensorEvent::Attached { container, pid, before_start: true })
            }
            SensorCommand::Scan { container, ticket } => {
                Some(SensorEvent::Scanned { container, ticket, began: self.now, complete: true })
            }
            SensorCommand::Compare { ticket, .. } => {
                Some(SensorEvent::Compared { ticket, observations: Vec::new(), end: Some(true) })
            }
            SensorCommand::Detach { .. }
            | SensorCommand::Trust { .. }
            | SensorCommand::Enforce { .. }
            | SensorCommand::EntryPoint { .. }
            | SensorCommand::Terminal { .. }
            | SensorCommand::Judged { .. } => None,
        }
    }

    fn respond(&mut self, request: &ResponseRequest) -> Vec<Input> {
        let container = request.container.clone();
        let mut response = respond::carry_out_now(&self.runtime, request);
        response.outcome.at = self.now;
        let has_ended = self.runtime.is_gone(&container);
        let mut inputs = vec![Input::Response(response)];
        if has_ended {
            inputs.push(Input::Runtime(RuntimeEvent::TaskExited { container }));
        }
        inputs
    }

    fn record(&mut self, record: Record) {
        let happened = match record {
            Record::Finding(finding) | Record::Aggregate { finding, .. } => {
                self.is_quiet &= finding.verdict.is_accept();
                self.findings.retain(|known| known.id != finding.id);
                self.findings.push((*finding).clone());
                Happened::Finding(finding)
            }
            Record::Response(response) => {
                self.responses.push((*response).clone());
                Happened::Response(response)
            }
            Record::Gap { name, detail, until: None, .. } => Happened::Loss { name, detail },
            Record::Session { session, .. } => Happened::Session {
                container: session.container.id.clone(),
                entry: session.entry.name(),
                is_open: session.ended_at.is_none(),
            },
            Record::Gap { .. } | Record::Probe(_) => return,
        };
        (self.each)(self.now, &happened);
    }

    fn take(&mut self, action: &StepAction) -> Result<(), String> {
        let input = match action {
            StepAction::Wait(time) => return self.wait(*time),
            StepAction::Connected => {
                self.is_connected = true;
                self.give(Input::Runtime(RuntimeEvent::Connected { endpoint: ENDPOINT.into() }));
                let containers = self.containers.values().map(|one| one.id.clone()).collect();
                Input::Runtime(RuntimeEvent::Listed { endpoint: ENDPOINT.into(), containers })
            }
            StepAction::Disconnected => {
                self.is_connected = false;
                let endpoint = ENDPOINT.into();
                let reason = "the script disconnects it".into();
                Input::Runtime(RuntimeEvent::Disconnected { endpoint, reason })
            }
            StepAction::Start(step) => self.start(step)?,
            StepAction::Stop { container } => {
                let Running { id, .. } = self.running(container)?;
                self.runtime.end(&id);
                Input::Runtime(RuntimeEvent::TaskExited { container: id })
            }
            StepAction::Remove { container } => {
                let known = self.containers.remove(container);
                let id = known.ok_or_else(|| format!("no container `{container}`"))?.id;
                self.runtime.end(&id);
                Input::Runtime(RuntimeEvent::Removed { container: id })
            }
            StepAction::Lost { failure, container } => {
                let container = self.named(container.as_deref())?;
                let detail = "the script loses it".to_owned();
                let _ = self.health.record(*failure);
                let lost = SensorEvent::Lost { failure: *failure, container, detail, at: self.now };
                Input::Sensor(lost)
            }
            StepAction::Over { failure, container } => {
                let container = self.named(container.as_deref())?;
                Input::Sensor(SensorEvent::Over { failure: *failure, container })
            }
            StepAction::Respond { action, container, pid } => {
                let (reply, _) = tokio::sync::oneshot::channel();
                let Running { id, .. } = self.running(container)?;
                Input::Request(ApiRequest::Respond {
                    container: id.to_string(),
                    cause: None,
                    process: pid.map(|pid| Box::new(ProcessIdentity { pid, start_time: 0 })),
                    action: *action,
                    reason: "the script asks for it".into(),
                    requested_by: "replay".into(),
                    no_restart: false,
                    environment: false,
                    hook: None,
                    reply,
                })
            }
            observed => self.observed(observed)?,
        };
        let input = self.asked(input);
        self.give(input);
        Ok(())
    }

    /// Asks for a decision about an execution, as the gate does before it runs.
    fn asked(&mut self, input: Input) -> Input {
        let Input::Sensor(SensorEvent::Observed(mut observation)) = input else { return input };
        if matches!(observation.fact, Fact::File(FileFact::Executed { .. })) {
            let mut effects = Vec::new();
            let question = Question { number: 0, observation: observation.clone() };
            self.state.handle(Input::Question(Box::new(question)), self.now, &mut effects);
            let is_denied = effects
                .iter()
                .any(|effect| matches!(effect, Effect::Decide { decision: Decision::Deny, .. }));
            if let Fact::File(FileFact::Executed { denied, .. }) = &mut observation.fact {
                *denied = is_denied;
            }
        }
        Input::Sensor(SensorEvent::Observed(observation))
    }

    /// Lets time pass, with everything that becomes due in it.
    fn wait(&mut self, time: SignedDuration) -> Result<(), String> {
        let end = self.now.checked_add(time).map_err(|err| err.to_string())?;
        for _ in 0..MOST_DUE {
            match self.state.next_due().filter(|due| *due <= end) {
                Some(due) => {
                    self.now = self.now.max(due);
                    self.give(Input::Due);
                }
                None => break,
            }
        }
        self.now = end;
        Ok(())
    }

    fn start(&mut self, step: &StartStep) -> Result<Input, String> {
        let StartStep { container: name, image: image_name, pid, labels, pod, runtime } = step;
        let image =
            self.images.get(image_name).ok_or_else(|| format!("no image `{image_name}`"))?;
        let id = match name.split_once('/') {
            Some((namespace, name)) => ContainerId::new(namespace, name),
            None => ContainerId::new("default", name),
        };
        let pid = pid.unwrap_or(self.next_pid);
        self.next_pid = self.next_pid.max(pid) + 100;
        let init = ProcessIdentity { pid, start_time: u64::from(pid) * 100 };
        let container = Container {
            id: id.clone(),
            endpoint: ENDPOINT.into(),
            runtime: runtime.clone().unwrap_or_else(|| "replay".into()),
            labels: Labels::from(labels.clone()),
            pod: pod.as_ref().map(|(namespace, name)| Pod {
                namespace: namespace.clone(),
                name: name.clone(),
                uid: "replay".into(),
                container: None,
            }),
            image: ImageReference {
                name: Some(image_name.into()),
                chain_id: image.layers.last().map(|layer| layer.chain_id),
                manifest_digest: None,
            },
            snapshotter: "replay".into(),
            snapshot_key: id.to_string(),
            layers: image.layers.clone(),
            rootfs: Some(OverlayDirs {
                upperdir: "/replay/upper".into(),
                lowerdirs: vec!["/replay/layer".into()],
            }),
            created_at: Some(
                self.containers
                    .get(name)
                    .map_or(self.now, |known| known.created_at.unwrap_or(self.now)),
            ),
            task: Some(Task {
                pid,
                start_time: Some(init.start_time),
                paused: false,
                terminal_input: None,
            }),
            no_baseline: None,
            id_map: None,
            entry_point: EntryPoint::default(),
            probes: Vec::new(),
        };
        self.runtime.begin(&id, init);
        self.containers.insert(name.into(), container.clone());
        if self.is_connected {
            // A container that starts before that is only listed: nothing shows since when it runs.
            let created = RuntimeEvent::TaskCreated { container: id, pid, rootfs: None };
            self.give(Input::Runtime(created));
        }
        Ok(Input::Runtime(RuntimeEvent::Container(Box::new(container))))
    }

    /// The run of a container that the script names.
    fn running(&self, name: &str) -> Result<Running, String> {
        let known = self.containers.get(name).ok_or_else(|| format!("no container `{name}`"))?;
        let init = self.runtime.init_of(&known.id);
        let init = init.ok_or_else(|| format!("container `{name}` does not run"))?;
        Ok(Running { id: known.id.clone(), init })
    }

    fn named(&self, name: Option<&str>) -> Result<Option<ContainerId>, String> {
        name.map(|name| self.running(name).map(|running| running.id)).transpose()
    }

    // Long: one arm for each step.
    /// What a watcher would report of a step.
    fn observed(&self, step: &StepAction) -> Result<Input, String> {
        let (container, source, session, fact) = match step {
            StepAction::File(step) => {
                let Running { init, .. } = self.running(&step.container)?;
                let source = match step.action {
                    FileAction::Executed => Source::Gate,
                    FileAction::Loaded | FileAction::Interpreted => Source::Trace,
                    FileAction::Written => Source::Change,
                };
                (&step.container, source, step.session, fact_of(step, init))
            }
            StepAction::Deleted { container, path, by } => {
                let Running { init, .. } = self.running(container)?;
                let writer = by.as_deref().map(|exe| Arc::new(process(WRITER, exe, None, init)));
                (
                    container,
                    Source::Change,
                    None,
                    Fact::File(FileFact::Absent { path: path.clone(), writer }),
                )
            }
            StepAction::Session { container, pid, entry, tty, requester, argv } => {
                let Running { init, .. } = self.running(container)?;
                let mut process = process(*pid, "", None, init);
                process.exe = argv.first().cloned();
                process.argv = Some(argv.clone()).filter(|argv| !argv.is_empty());
                process.tty.clone_from(tty);
                process.ancestors = vec![outside()];
                let opening = Opening {
                    root: process.identity,
                    entry: *entry,
                    interactive: tty.is_some().then_some(Interactive::Terminal),
                    process,
                    host: Vec::new(),
                    login: None,
                    requested_by: requester.clone(),
                    beside: None,
                };
                let fact = Fact::Session(SessionFact::Opened { opening: Arc::new(opening) });
                (container, Source::Trace, None, fact)
            }
            StepAction::Ran { container, session, pid, argv } => {
                let run = Run {
                    process: identity(*pid),
                    exe: argv.first().cloned(),
                    argv: Some(argv.clone()),
                    tty: None,
                };
                let fact = Fact::Session(SessionFact::Ran {
                    root: identity(*session),
                    run: Arc::new(run),
                });
                (container, Source::Trace, Some(*session), fact)
            }
            StepAction::Ended { container, session, pid, code } => {
                let (root, process) = (identity(*session), identity(*pid));
                let exit = Some(Exit { code: Some(*code), signal: None });
                let fact = Fact::Session(SessionFact::ProcessEnded { root, process, exit });
                (container, Source::Trace, Some(*session), fact)
            }
            StepAction::ReverseShell { container, pid, exe } => {
                let Running { init, .. } = self.running(container)?;
                let process = Arc::new(process(*pid, exe, None, init));
                let evidence = "its input and output are one connection".to_owned();
                let fact =
                    Fact::Session(SessionFact::ReverseShell { process, direct: true, evidence });
                (container, Source::Trace, None, fact)
            }
            other => return Err(format!("no watcher reports {other:?}")),
        };
        let Running { id, init } = self.running(container)?;
        Ok(Input::Sensor(SensorEvent::Observed(Observation {
            container: id,
            init,
            at: self.now,
            source,
            session: session.map(identity),
            file_of: None,
            reached_as: None,
            fact,
        })))
    }

    fn check(&self, expectation: &Expectation) -> Result<(), String> {
        match expectation {
            Expectation::Nothing if self.is_quiet => Ok(()),
            Expectation::Nothing => {
                let last = self.findings.last().map(describe).unwrap_or_default();
                Err(format!("nothing was expected, and there is {last}"))
            }
            Expectation::Finding(pattern) => {
                if self.findings.iter().any(|finding| pattern.fits(finding)) {
                    return Ok(());
                }
                let there: Vec<String> = self.findings.iter().map(describe).collect();
                Err(format!("there is no such finding; there are: [{}]", there.join(", ")))
            }
            Expectation::NoFinding(pattern) => {
                match self.findings.iter().find(|finding| pattern.fits(finding)) {
                    Some(finding) => Err(format!("there is {}", describe(finding))),
                    None => Ok(()),
                }
            }
            Expectation::Response { action, container, succeeded } => {
                let is_it = |response: &Response| {
                    response.outcome.action == *action
                        && response.container.named_by(container).is_some()
                        && response.outcome.succeeded == *succeeded
                };
                match self.responses.iter().any(is_it) {
                    true => Ok(()),
                    false => Err(format!("there was no such response in {}", self.responses.len())),
                }
            }
            Expectation::Complete(expected) => {
                let problems = self.state.status().problems;
                match problems.is_empty() == *expected {
                    true => Ok(()),
                    false => Err(format!("the view's problems are {problems:?}")),
                }
            }
        }
    }
}

impl Pattern {
    fn fits(&self, finding: &Finding) -> bool {
        let container =
            |name: &String| finding.container_id().is_some_and(|id| id.named_by(name).is_some());
        let path = |path: &RootfsPath| finding.file.as_ref().is_some_and(|file| file.path == *path);
        finding.kind == self.kind
            && self.container.as_ref().is_none_or(container)
            && self.path.as_ref().is_none_or(path)
            && self.severity.is_none_or(|severity| finding.severity == severity)
            && self.count.is_none_or(|count| finding.count == count)
            && self.rule.as_ref().is_none_or(|rule| finding.verdict.rule.as_ref() == Some(rule))
            && self.verdict.map_or(!finding.verdict.is_accept(), |verdict| {
                finding.verdict.disposition == verdict
            })
    }
}

/// The layers of an image, each with the chain ID of the stack that it tops.
fn chain_of(baseline: &ImageBaseline) -> impl Iterator<Item = (LayerId, ChainId)> {
    let layers = baseline.layers();
    let diff_ids: Vec<DiffId> = layers
        .iter()
        .filter_map(|layer| match layer {
            LayerId::Diff(diff_id) => Some(*diff_id),
            LayerId::Chain(_) => None,
        })
        .collect();
    layers.into_iter().zip(ChainId::of_layers(&diff_ids))
}

/// A finding as an error names it.
fn describe(finding: &Finding) -> String {
    let path = finding.file.as_ref().map(|file| format!(" {}", file.path)).unwrap_or_default();
    let accepted = if finding.verdict.is_accept() { ", accepted" } else { "" };
    format!("{} ({}, {} times{accepted}){path}", finding.kind, finding.severity, finding.count)
}

/// The pids of processes to which a script gives none.
const WRITER: u32 = 2;
const RUNNER: u32 = 3;

fn identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start_time: 1 }
}

/// The process of the host that all containers descend from.
fn outside() -> Ancestor {
    Ancestor {
        identity: identity(1),
        exe: Some("/usr/bin/containerd-shim-runc-v2".into()),
        argv: None,
        is_proven_inside: false,
    }
}

fn process(pid: u32, exe: &str, parent: Option<&str>, init: ProcessIdentity) -> Process {
    let parent = parent.map(|exe| Ancestor {
        identity: identity(WRITER),
        exe: Some(exe.into()),
        argv: None,
        is_proven_inside: false,
    });
    let init = Ancestor { identity: init, exe: None, argv: None, is_proven_inside: false };
    Process {
        identity: identity(pid),
        exe: Some(exe.into()),
        argv: None,
        uid: Some(0),
        tty: None,
        root: None,
        ancestors: parent.into_iter().chain([init, outside()]).collect(),
    }
}

fn state_of(step: &FileStep) -> FileState {
    FileState {
        file_type: FileType::Regular,
        format: step.format,
        mode: step.mode,
        uid: 0,
        gid: 0,
        size: step.content.len() as u64,
        capability: None,
        content: Content::Hashed { blake3: blake3_of(&step.content), sha256: None },
        deleted: false,
        could_change: CouldChange::No,
    }
}

fn fact_of(step: &FileStep, init: ProcessIdentity) -> Fact {
    let FileStep { path, filesystem, by, pid, .. } = step;
    let (path, filesystem, state) = (path.clone(), *filesystem, state_of(step));
    let by = by.as_deref();
    let mut runner = process(pid.unwrap_or(RUNNER), path.to_string().as_str(), by, init);
    if let Some(session) = step.session {
        let root = Ancestor {
            identity: identity(session),
            exe: None,
            argv: None,
            is_proven_inside: false,
        };
        runner.ancestors = vec![root, outside()];
    }
    runner.uid = step.user.or(runner.uid);
    runner.argv.clone_from(&step.argv);
    let writer = step.writer.as_deref().map(|exe| Arc::new(process(WRITER, exe, None, init)));
    match step.action {
        FileAction::Executed => Fact::File(FileFact::Executed {
            path,
            filesystem,
            running: false,
            denied: false,
            times: step.times,
            state,
            lower: None,
            process: Arc::new(runner),
            invoked_as: None,
            layer_file: None,
            writer,
        }),
        FileAction::Loaded => {
            runner.exe = by.map(Into::into);
            Fact::File(FileFact::Loaded {
                path,
                filesystem,
                state,
                lower: None,
                process: Arc::new(runner),
                by_linker: false,
                is_shared: false,
                writer,
                denied: false,
            })
        }
        FileAction::Interpreted => {
            runner.exe = by.map(Into::into);
            let script = ScriptFact::File { path, filesystem, state, lower: None };
            let process = Arc::new(runner);
            Fact::File(FileFact::Interpreted { script, process, writer, denied: false })
        }
        FileAction::Written => {
            let writer = by.map(|exe| Arc::new(process(WRITER, exe, None, init)));
            Fact::File(FileFact::Present { path, state, lower: None, writer, changed: None })
        }
    }
}

/// A runtime whose containers are those of the script.
#[derive(Clone, Debug, Default)]
struct ReplayedRuntime {
    running: Arc<Mutex<HashMap<ContainerId, ProcessIdentity>>>,
}

impl ReplayedRuntime {
    fn with<T>(&self, look: impl FnOnce(&mut HashMap<ContainerId, ProcessIdentity>) -> T) -> T {
        look(&mut self.running.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn begin(&self, container: &ContainerId, init: ProcessIdentity) {
        self.with(|running| running.insert(container.clone(), init));
    }

    fn end(&self, container: &ContainerId) {
        self.with(|running| running.remove(container));
    }

    fn init_of(&self, container: &ContainerId) -> Option<ProcessIdentity> {
        self.with(|running| running.get(container).copied())
    }

    fn is_gone(&self, container: &ContainerId) -> bool {
        self.init_of(container).is_none()
    }

    /// The run that is meant, if it is the one that there is.
    fn find(&self, container: &ContainerId, meant: Option<Incarnation>) -> Result<(), Error> {
        let init = self.init_of(container);
        let init = init.ok_or_else(|| Error::UnknownContainer(container.clone()))?;
        match meant {
            Some(meant) if meant.pid != init.pid => {
                Err(Error::Gone(format!("container {container} runs anew")))
            }
            Some(_) | None => Ok(()),
        }
    }
}

impl Runtime for ReplayedRuntime {
    fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        _no_restart: bool,
    ) -> impl Future<Output = Result<Killed, Error>> + Send {
        let found = self.find(container, meant);
        if found.is_ok() {
            self.end(container);
        }
        let killed = || Killed {
            message: "all processes were killed".into(),
            restarter: None,
            changed: true,
        };
        ready(found.map(|()| killed()))
    }

    fn kill_process(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        process: ProcessIdentity,
    ) -> impl Future<Output = Result<String, Error>> + Send {
        let killed = || format!("killed the process {}", process.pid);
        ready(self.find(container, meant).map(|()| killed()))
    }

    fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> impl Future<Output = Result<Killed, Error>> + Send {
        let message = "the container is paused".into();
        let paused = Killed { message, restarter: None, changed: true };
        ready(self.find(container, meant).map(|()| paused))
    }

    fn resume(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> impl Future<Output = Result<String, Error>> + Send {
        ready(self.find(container, meant).map(|()| "the container runs again".into()))
    }

    fn specification(
        &self,
        container: &ContainerId,
    ) -> impl Future<Output = Result<Vec<u8>, Error>> + Send {
        ready(self.find(container, None).map(|()| b"{}".to_vec()))
    }
}
