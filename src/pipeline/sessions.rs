//! Who is inside: sessions open, act and close, and what is done meanwhile is theirs.
//!
//! A session is told when it opens, then at most five times a second, and when it
//! closes. What it is reported as (a finding) waits a little where it may turn out to
//! be a probe, which is counted and not reported.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::probes::{Cadences, Rhythm};
use super::{Effect, State, new_finding, whose};
use crate::budget::{self, Pool, Share};
use crate::health::Failure;
use crate::history::Record;
use crate::model::finding::Subject;
use crate::model::session::{
    COMMAND_SCHEMA, MAX_COMMANDS, MAX_SESSION_FINDINGS, PROBE_SCHEMA, SESSION_SCHEMA,
};
use crate::model::{
    Ancestor, Command, Container, ContainerId, Disposition, Entry, Exit, FindingId, Interactive,
    Kind, Observation, Opening, Probe, ProbeId, ProbeSource, Process, ProcessIdentity, Run,
    Session, SessionId, SessionState, Source,
};

/// Sessions of one container that are known at once, closed ones among them: what
/// they have left behind may still act. Those that come from within may be half as many,
/// so that no container hides who comes in.
const MAX_SESSIONS: usize = 2 * 1024;
/// Sessions of one container that are told while driftd runs, and half as many again
/// from within: whoever makes thousands of shells must not fill the disk with them.
const MAX_TOLD: usize = 64 * 1024;
/// Bytes of what the sessions of one container run, and those of all.
const MAX_BYTES: usize = 8 << 20;
const ALL_BYTES: usize = 64 << 20;
/// Executions that the runtime has told of before their process was seen.
const MAX_EXECS: usize = 1024;
const EXEC_WITHIN: SignedDuration = SignedDuration::from_secs(60);
const MAX_PROBES: usize = 256;
/// How soon what is new of a session is told.
const SAID_WITHIN: SignedDuration = SignedDuration::from_millis(200);
/// A rhythm that has begun is waited for, for this many of its intervals more.
const INTERVALS: i32 = 2;

/// The sessions of all containers.
#[derive(Debug)]
pub(super) struct Sessions {
    /// What they run takes a part of this.
    pool: Arc<Pool>,
    containers: HashMap<ContainerId, Known>,
    /// What is new of them, and since when.
    unsaid: BTreeSet<(ContainerId, ProcessIdentity)>,
    unsaid_probes: BTreeSet<(ContainerId, ProbeId)>,
    since: Option<Timestamp>,
    /// Whose finding waits, and until when.
    held: BTreeSet<(Timestamp, ContainerId, ProcessIdentity)>,
    /// What the history tells of containers that have not shown up yet.
    remembered: HashMap<ContainerId, Remembered>,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            pool: Pool::new(ALL_BYTES),
            containers: HashMap::new(),
            unsaid: BTreeSet::new(),
            unsaid_probes: BTreeSet::new(),
            since: None,
            held: BTreeSet::new(),
            remembered: HashMap::new(),
        }
    }
}

/// What the history tells of one container's.
#[derive(Debug, Default)]
struct Remembered {
    /// With those of their commands that have not ended.
    sessions: Vec<(Session, Vec<Command>)>,
    probes: Vec<Probe>,
}

/// What is known of one container's.
#[derive(Debug, Default)]
struct Known {
    live: HashMap<ProcessIdentity, Live>,
    order: VecDeque<ProcessIdentity>,
    execs: VecDeque<(u32, String, Timestamp)>,
    /// How many were told, by [`lane`].
    told: [u32; 2],
    cadences: Cadences,
    probes: HashMap<ProbeId, Probe>,
    /// What they take, by [`lane`].
    shares: [Share; 2],
}

impl Known {
    fn forget(&mut self, root: ProcessIdentity) {
        let Some(live) = self.live.remove(&root) else { return };
        let running = live.running.values().map(weight).sum::<usize>();
        self.shares[lane(live.session.entry)].give_back(running + live.bytes);
    }

    fn keep(&mut self, root: ProcessIdentity, live: Live) {
        self.shares[lane(live.session.entry)].take(live.bytes);
        self.order.push_back(root);
        self.live.insert(root, live);
    }
}

/// A container can make sessions from within, as many as it likes; those from outside
/// have room of their own.
fn lane(entry: Entry) -> usize {
    usize::from(entry == Entry::ReverseShell)
}

/// About how many bytes a session takes in memory, without what it runs.
fn weight_of(session: &Session) -> usize {
    size_of::<Live>()
        + 512
        + budget::weight_of_process(&session.process)
        + session.host.iter().map(weight_of_ancestor).sum::<usize>()
}

fn weight_of_ancestor(ancestor: &Ancestor) -> usize {
    ancestor.argv.iter().flatten().map(String::len).sum()
}

/// About how many bytes a command takes in memory.
fn weight(command: &Command) -> usize {
    let arguments = command.argv.iter().flatten().map(|one| size_of::<String>() + one.len());
    size_of::<Command>() + arguments.sum::<usize>()
}

#[derive(Debug)]
struct Live {
    session: Session,
    /// The init of the container's run that it came into, if that was seen.
    init: Option<ProcessIdentity>,
    /// What it took when it was opened.
    bytes: usize,
    /// What it runs, by pid, if it is listed.
    running: HashMap<u32, Command>,
    /// New commands, and such as have ended, in their order.
    changed: Vec<Command>,
    /// Its finding is not told before this, and not at all if it is a probe's by then.
    held_until: Option<Timestamp>,
    /// It is a probe, and not told as long as it does nothing else.
    probe: Option<ProbeId>,
    /// When it last ran something, or that ended.
    acted_at: Timestamp,
}

impl Live {
    fn new(session: Session, init: Option<ProcessIdentity>) -> Live {
        Live {
            acted_at: session.started_at,
            bytes: weight_of(&session),
            session,
            init,
            running: HashMap::new(),
            changed: Vec::new(),
            held_until: None,
            probe: None,
        }
    }

    fn end(&mut self, at: Timestamp, exit: Option<Exit>) {
        let session = &mut self.session;
        session.state = SessionState::Closed;
        // Whoever does something at a terminal is still there, whenever he typed it.
        let earliest = match session.entry {
            Entry::Attach => self.acted_at,
            _ => session.started_at,
        };
        session.ended_at = session.ended_at.or(Some(at.max(earliest)));
        session.exit = exit.or(session.exit);
    }
}

impl Sessions {
    /// Takes in what the history knows: sessions that were open, and probes.
    pub(super) fn remember(&mut self, sessions: Vec<(Session, Vec<Command>)>, probes: Vec<Probe>) {
        for session in sessions {
            let container = session.0.container.id.clone();
            self.remembered.entry(container).or_default().sessions.push(session);
        }
        for probe in probes {
            let container = probe.container.id.clone();
            self.remembered.entry(container).or_default().probes.push(probe);
        }
    }

    fn known(&mut self, container: &ContainerId) -> &mut Known {
        let (remembered, unsaid) = (&mut self.remembered, &mut self.unsaid);
        let (since, pool) = (&mut self.since, &self.pool);
        self.containers.entry(container.clone()).or_insert_with(|| {
            let shares = [pool.share(MAX_BYTES), pool.share(MAX_BYTES / 2)];
            let mut known = Known { shares, ..Known::default() };
            let Remembered { sessions, probes } = remembered.remove(container).unwrap_or_default();
            for (mut session, running) in sessions {
                let root = session.process.identity;
                let share = lane(session.entry);
                if session.entry == Entry::Attach {
                    // Whether somebody is still there, nobody knows any more.
                    session.state = SessionState::Closed;
                }
                if session.state == SessionState::Closed {
                    // It was over when driftd was started.
                    unsaid.insert((container.clone(), root));
                    since.get_or_insert(session.started_at);
                }
                let mut live = Live::new(session, None);
                live.running = running
                    .into_iter()
                    .filter(|command| known.shares[share].try_take(weight(command)))
                    .map(|command| (command.process.pid, command))
                    .collect();
                known.keep(root, live);
            }
            known.probes = probes.into_iter().map(|probe| (probe.id, probe)).collect();
            known
        })
    }

    fn changed(&mut self, container: &ContainerId, root: ProcessIdentity, now: Timestamp) {
        self.unsaid.insert((container.clone(), root));
        self.since.get_or_insert(now);
    }

    pub(super) fn due(&self) -> Option<Timestamp> {
        let said =
            self.since.map(|since| since.saturating_add(SAID_WITHIN).unwrap_or(Timestamp::MAX));
        let held = self.held.first().map(|(until, ..)| *until);
        [said, held].into_iter().flatten().min()
    }

    /// The session in which a process did something: as its descent tells, or by its
    /// living parents, the nearest first.
    pub(super) fn of(
        &self,
        container: &ContainerId,
        descent: Option<ProcessIdentity>,
        process: Option<&Process>,
    ) -> Option<ProcessIdentity> {
        descent.or_else(|| {
            let known = self.containers.get(container)?;
            let process = process?;
            std::iter::once(process.identity)
                .chain(process.ancestors.iter().map(|ancestor| ancestor.identity))
                .find(|identity| known.live.contains_key(identity))
        })
    }

    /// Whether a process belongs to a session in which somebody may type.
    pub(super) fn is_interactive(
        &self,
        container: &ContainerId,
        descent: Option<ProcessIdentity>,
        process: &Process,
    ) -> bool {
        let root = self.of(container, descent, Some(process));
        let known = self.containers.get(container).zip(root);
        let live = known.and_then(|(known, root)| known.live.get(&root));
        live.is_some_and(|live| {
            live.session.interactive.is_some() || live.session.entry == Entry::ReverseShell
        })
    }

    /// Makes room for one more; false if all that are known are open, or too many have
    /// been told.
    fn make_room(&mut self, session: &Session) -> bool {
        let known = self.known(&session.container.id);
        let own = lane(session.entry);
        let halves = if own == 0 { 1 } else { 2 };
        if known.told[own] as usize >= MAX_TOLD / halves {
            return false;
        }
        let bytes = weight_of(session);
        let is_own = |live: &Live| lane(live.session.entry) == own;
        loop {
            let number = known.live.values().filter(|live| is_own(live)).count();
            if number < MAX_SESSIONS / halves && known.shares[own].has_room(bytes) {
                return true;
            }
            let closed = known.order.iter().position(|root| {
                let live = known.live.get(root);
                live.is_none_or(|live| is_own(live) && live.session.state == SessionState::Closed)
            });
            let Some(root) = closed.and_then(|index| known.order.remove(index)) else {
                return false;
            };
            known.forget(root);
        }
    }
}

/// Which finding tells of a session, if it has not one already.
fn kinds(entry: Entry, interactive: Option<Interactive>) -> (Option<Kind>, Option<Kind>) {
    let terminal = interactive.map(|_| Kind::SessionInteractive);
    match entry {
        // The shell's own finding tells it.
        Entry::ReverseShell => (None, None),
        Entry::Namespace => (Some(Kind::NamespaceEntered), terminal),
        Entry::RuntimeExec | Entry::RuntimeDirect | Entry::SharedPidNamespace | Entry::Attach => {
            (terminal.or(Some(Kind::SessionExec)), None)
        }
    }
}

/// What is said of a session that did not come by the usual way.
fn in_words(entry: Entry) -> Option<&'static str> {
    match entry {
        Entry::RuntimeExec | Entry::ReverseShell => None,
        Entry::RuntimeDirect => Some("a container runtime was run by hand, past containerd"),
        Entry::Namespace => {
            Some("a process of the host's joined the container's namespaces, past its runtime")
        }
        Entry::SharedPidNamespace => {
            Some("this container was put into the pid namespace of another one")
        }
        Entry::Attach => Some("somebody was connected to the terminal of its first process"),
    }
}

/// What is said of a probe that is reported after all.
const IS_PROBE: &str = "it is run again and again like a probe, and ran what is not the image's";

/// By whom a container is managed, if by nobody above containerd.
pub(super) const CONTAINERD: &str = "containerd";

/// By whom a container is managed, as far as is known before its record is.
pub(super) fn manager(id: &ContainerId, container: Option<&Container>) -> &'static str {
    let is_cri =
        container.is_some_and(|container| container.labels.contains_key("io.cri-containerd.kind"));
    match &*id.namespace {
        "k8s.io" => "cri",
        "moby" => "docker",
        _ if is_cri => "cri",
        _ => CONTAINERD,
    }
}

/// Whom a session is of, where that can be known: who comes by the shim, or by what the
/// manager hands on, comes by the manager.
fn client(id: &ContainerId, container: Option<&Container>, opening: &Opening) -> Option<String> {
    let is_by_manager = match opening.entry {
        Entry::RuntimeExec => true,
        Entry::Attach => opening.root != opening.process.identity,
        Entry::RuntimeDirect
        | Entry::Namespace
        | Entry::SharedPidNamespace
        | Entry::ReverseShell => false,
    };
    is_by_manager.then(|| manager(id, container).to_owned())
}

impl State {
    /// Whether this is what holds a pod's namespaces, and no container of it.
    fn is_sandbox(&self, id: &ContainerId) -> bool {
        let container = self.inventory.get(id).and_then(|entry| entry.container.as_ref());
        let kind = container.and_then(|container| container.labels.get("io.cri-containerd.kind"));
        kind.is_some_and(|kind| kind == "sandbox")
    }

    /// Somebody or something has come in.
    pub(super) fn session_opened(
        &mut self,
        observation: &Observation,
        opening: &Opening,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let root = opening.root;
        if opening.beside.as_ref().is_some_and(|beside| self.is_sandbox(beside)) {
            // All containers of a pod may share the namespace of its sandbox.
            return;
        }
        if self.sessions.known(container).live.contains_key(&root) {
            // However often a shell re-executes itself, it is one session.
            return;
        }
        let Some(entry) = self.inventory.get(container) else { return };
        let (evidence, image) = whose(container, entry);
        let client = client(container, entry.container.as_ref(), opening);
        let known = self.sessions.known(container);
        let exec = known.execs.iter().position(|(pid, ..)| *pid == root.pid);
        let exec_id = exec.and_then(|index| known.execs.remove(index)).map(|(_, id, _)| id);
        let session = Session {
            schema: SESSION_SCHEMA.to_owned(),
            id: SessionId::new(container, root),
            revision: 0,
            state: SessionState::Open,
            node: self.node.clone(),
            runtime: "containerd".to_owned(),
            container: evidence,
            image,
            entry: opening.entry,
            client,
            exec_id,
            interactive: opening.interactive,
            process: budget::process(&opening.process),
            host: opening.host.clone(),
            login: opening.login,
            requested_by: opening.requested_by.clone(),
            discovered: observation.source.name().to_owned(),
            started_at: observation.at,
            ended_at: None,
            exit: None,
            commands: 0,
            finding: None,
            findings: Vec::new(),
            findings_total: 0,
        };
        if !self.sessions.make_room(&session) {
            let Observation { source, init, .. } = *observation;
            self.session_unlisted(&session, init, opening, source, now, effects);
            return;
        }
        let mut live = Live::new(session, Some(observation.init));
        let may_be_probe = opening.entry == Entry::RuntimeExec && opening.interactive.is_none();
        match opening.process.argv.as_deref() {
            Some(argv) if may_be_probe => {
                self.is_probe(container, &mut live, argv, observation.at, now);
            }
            // Whatever it was, it may have been one.
            None if may_be_probe => {
                live.held_until = self.hold_until(now);
                let held = live.held_until.map(|until| (until, container.clone(), root));
                self.sessions.held.extend(held);
            }
            Some(_) | None => (),
        }
        let is_told = live.probe.is_none();
        let is_held = live.held_until.is_some();
        let known = self.sessions.known(container);
        known.keep(root, live);
        if is_told {
            known.told[lane(opening.entry)] += 1;
            self.adopt(container, root);
            if !is_held {
                self.report_session(container, root, observation.source, now, effects);
            }
            self.say_session(container, root, effects);
        }
    }

    /// A session that finds no room is not listed. What it is reported as is reported
    /// and answered all the same.
    fn session_unlisted(
        &mut self,
        session: &Session,
        init: ProcessIdentity,
        opening: &Opening,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &session.container.id;
        let _ = self.health.record(Failure::FindingsFull);
        let detail = format!(
            "more than {MAX_SESSIONS} sessions are open in it, or more than {MAX_TOLD} were"
        );
        self.lost(Failure::FindingsFull, Some(container.clone()), detail, now, effects);
        let argv = opening.process.argv.as_deref().unwrap_or_default();
        let id = ProbeId::new(container, argv);
        let probe = self.sessions.known(container).probes.get(&id);
        if opening.entry == Entry::RuntimeExec && probe.is_some_and(|probe| !probe.reported) {
            return;
        }
        let (first, second) = kinds(session.entry, session.interactive);
        for kind in [first, second].into_iter().flatten() {
            self.tell_session_finding(
                opening.root,
                Some(init),
                session,
                kind,
                false,
                source,
                now,
                effects,
            );
        }
    }

    /// Until when it is waited for a rhythm.
    fn hold_until(&self, now: Timestamp) -> Option<Timestamp> {
        let verdict = self.policy.decide(Kind::SessionExec);
        let patience = self.policy.probe_patience;
        let is_held = verdict.disposition == Disposition::Report && patience.is_positive();
        is_held.then(|| now.saturating_add(patience).ok()).flatten()
    }

    /// Decides whether a command is a probe, may turn out to be one, or is none.
    fn is_probe(
        &mut self,
        container: &ContainerId,
        live: &mut Live,
        argv: &[String],
        at: Timestamp,
        now: Timestamp,
    ) {
        let declared = self
            .inventory
            .get(container)
            .and_then(|entry| entry.container.as_ref())
            .and_then(|record| record.probes.iter().find(|probe| probe.argv == argv))
            .map(|probe| probe.source);
        let hold = self.hold_until(now);
        let root = live.session.process.identity;
        let id = ProbeId::new(container, argv);
        let known = self.sessions.known(container);
        let is_full = known.probes.len() >= MAX_PROBES;
        if let Some(probe) = known.probes.get_mut(&id) {
            probe.count += 1;
            probe.last_seen = probe.last_seen.max(at);
            live.probe = (!probe.reported).then_some(id);
        } else if let Some(source) = declared.filter(|_| !is_full) {
            known.probes.insert(id, probe(live, id, argv, source, None, 1));
            live.probe = Some(id);
        } else if hold.is_some() {
            let rhythm = known.cadences.came(argv, at);
            let wait = match rhythm {
                Rhythm::Steady(interval) if !is_full => {
                    known.cadences.forget(argv);
                    let mut count = 1;
                    for earlier in waiting_with(known, argv) {
                        earlier.held_until = None;
                        count += 1;
                    }
                    let mut learned =
                        probe(live, id, argv, ProbeSource::Learned, Some(interval), count);
                    learned.first_seen = at.saturating_sub(interval * INTERVALS).unwrap_or(at);
                    known.probes.insert(id, learned);
                    live.probe = Some(id);
                    None
                }
                Rhythm::Perhaps(interval) => {
                    let next = now.saturating_add(interval * INTERVALS).ok();
                    hold.map(|until| next.map_or(until, |next| next.max(until)))
                }
                Rhythm::Steady(_) | Rhythm::None => hold,
            };
            live.held_until = wait;
            let Some(until) = live.held_until else { return };
            let mut waiting = vec![root];
            if let Rhythm::Perhaps(_) = rhythm {
                // Those before it wait with it.
                for earlier in waiting_with(known, argv) {
                    earlier.held_until = Some(until);
                    waiting.push(earlier.session.process.identity);
                }
            }
            let held = waiting.into_iter().map(|root| (until, container.clone(), root));
            self.sessions.held.extend(held);
        }
        if live.probe.is_some() {
            self.sessions.unsaid_probes.insert((container.clone(), id));
            self.sessions.since.get_or_insert(now);
        }
    }

    /// What was told already and is this session's: its first program may have been
    /// told before the session was.
    fn adopt(&mut self, container: &ContainerId, root: ProcessIdentity) {
        let id = SessionId::new(container, root);
        let Some(entry) = self.inventory.get(container) else { return };
        let mut own: Vec<_> = entry
            .findings
            .values()
            .filter(|finding| finding.session == Some(id))
            .map(|finding| (finding.first_seen, finding.id))
            .collect();
        own.sort();
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        for (_, finding) in own {
            caused(&mut live.session, finding, true);
        }
    }

    /// Tells a session as a finding.
    fn report_session(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        live.held_until = None;
        let session = &live.session;
        let (first, second) = kinds(session.entry, session.interactive);
        let has_one = session.finding.is_some();
        let told = [first.filter(|_| !has_one), second];
        for kind in told.into_iter().flatten() {
            self.session_finding(container, root, kind, source, now, effects);
        }
    }

    fn session_finding(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        kind: Kind,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(live) = self.sessions.known(container).live.get(&root) else { return };
        let (session, init) = (live.session.clone(), live.init);
        let is_probe = live.probe.is_some();
        let Some(id) =
            self.tell_session_finding(root, init, &session, kind, is_probe, source, now, effects)
        else {
            return;
        };
        if let Some(live) = self.sessions.known(container).live.get_mut(&root) {
            live.session.finding.get_or_insert(id);
        }
        self.sessions.changed(container, root, now);
    }

    /// Reports a session as a finding, which is answered as the policy says.
    #[expect(clippy::too_many_arguments, reason = "what is to be reported, and where to")]
    fn tell_session_finding(
        &mut self,
        root: ProcessIdentity,
        init: Option<ProcessIdentity>,
        session: &Session,
        kind: Kind,
        is_probe: bool,
        source: Source,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Option<FindingId> {
        let (container, process) = (&session.container.id, &session.process);
        let subject = if kind == Kind::SessionExec {
            Subject::Command { exe: process.exe.as_deref(), argv: process.argv.as_deref() }
        } else {
            Subject::Process(root)
        };
        let id = FindingId::new(Some(container), kind, &subject);
        let entry = self.inventory.get_mut(container)?;
        let seen = session.ended_at.unwrap_or(session.started_at);
        let run = init.map(|init| entry.run_of(init));
        if let Some(finding) = entry.findings.get_mut(&id) {
            // A look at the processes may find the one that was told before a restart.
            if source != Source::Scan && finding.session != Some(session.id) {
                finding.count += 1;
                finding.revision += 1;
                finding.last_seen = finding.last_seen.max(seen);
                finding.run = run.or(finding.run);
            }
        } else {
            let at = session.started_at;
            let mut finding =
                new_finding(&self.node, &self.policy, id, kind, &session.discovered, at);
            finding.belongs_to(container, entry);
            finding.run = run.or(finding.run);
            finding.process = Some(process.clone());
            finding.session = Some(session.id);
            finding.last_seen = seen;
            let detail = if is_probe { Some(IS_PROBE) } else { in_words(session.entry) };
            finding.detail = detail.map(ToOwned::to_owned);
            if !entry.has_room_for(&finding) {
                return Some(self.fold_finding(container, init, &finding, now, effects));
            }
            entry.insert_finding(finding);
        }
        self.publish(container, id, init, now, effects);
        Some(id)
    }

    /// A program was run in a session.
    pub(super) fn session_ran(
        &mut self,
        observation: &Observation,
        root: ProcessIdentity,
        run: &Run,
        now: Timestamp,
    ) {
        let container = &observation.container;
        let known = self.sessions.known(container);
        let Some(live) = known.live.get_mut(&root) else { return };
        live.acted_at = live.acted_at.max(observation.at);
        live.session.commands += 1;
        let number = live.session.commands;
        if number <= MAX_COMMANDS {
            let command = Command {
                schema: COMMAND_SCHEMA.to_owned(),
                session: live.session.id,
                number,
                process: run.process,
                exe: run.exe.clone(),
                argv: budget::arguments(&run.argv),
                started_at: observation.at.max(live.session.started_at),
                ended_at: None,
                exit: None,
            };
            let share = &mut known.shares[lane(live.session.entry)];
            live.changed.push(command.clone());
            if let Some(mut earlier) = live.running.remove(&run.process.pid) {
                // It has become another program.
                share.give_back(weight(&earlier));
                earlier.ended_at = Some(observation.at);
                live.changed.push(earlier);
            }
            if share.try_take(weight(&command)) {
                live.running.insert(run.process.pid, command);
            } else {
                // Its end will not be known.
                let _ = self.health.record(Failure::FindingsFull);
            }
        }
        self.sessions.changed(container, root, now);
    }

    pub(super) fn session_ran_more(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        times: u64,
        now: Timestamp,
    ) {
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        live.session.commands += times;
        self.sessions.changed(container, root, now);
    }

    /// A process of a session has opened a terminal.
    pub(super) fn session_interactive(
        &mut self,
        observation: &Observation,
        root: ProcessIdentity,
        interactive: Interactive,
        tty: Option<&str>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        if live.session.interactive.is_some() {
            return;
        }
        live.session.interactive = Some(interactive);
        live.session.process.tty = tty.map(ToOwned::to_owned);
        live.probe = None;
        live.held_until = None;
        if live.session.entry != Entry::ReverseShell {
            let (kind, source) = (Kind::SessionInteractive, observation.source);
            self.session_finding(container, root, kind, source, now, effects);
        }
        self.say_session(container, root, effects);
    }

    /// A process of a session has ended; with its first one, the session has.
    pub(super) fn session_process_ended(
        &mut self,
        observation: &Observation,
        root: ProcessIdentity,
        process: ProcessIdentity,
        exit: Option<Exit>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let known = self.sessions.known(container);
        let Some(live) = known.live.get_mut(&root) else { return };
        if let Some(mut command) = live.running.remove(&process.pid) {
            known.shares[lane(live.session.entry)].give_back(weight(&command));
            command.ended_at = Some(observation.at.max(command.started_at));
            command.exit = exit;
            live.changed.push(command);
            live.acted_at = live.acted_at.max(observation.at);
        }
        if process == root {
            live.end(observation.at, exit);
            self.session_closed(container, root, effects);
        } else {
            self.sessions.changed(container, root, now);
        }
    }

    fn session_closed(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        effects: &mut Vec<Effect>,
    ) {
        self.say_session(container, root, effects);
        let Some(live) = self.sessions.known(container).live.get(&root) else { return };
        // One session is one finding, which says how long it was.
        let Some((id, ended)) = live.session.finding.zip(live.session.ended_at) else { return };
        let session = live.session.id;
        let Some(entry) = self.inventory.get_mut(container) else { return };
        if let Some(finding) = entry.findings.get_mut(&id)
            && finding.session == Some(session)
            && finding.kind != Kind::SessionExec
            && finding.last_seen < ended
        {
            finding.last_seen = ended;
            finding.revision += 1;
            effects.push(Effect::record(finding));
        }
    }

    /// The runtime has told of what it was asked to execute.
    pub(super) fn exec_started(
        &mut self,
        container: &ContainerId,
        exec_id: String,
        pid: u32,
        now: Timestamp,
    ) {
        if self.inventory.get(container).is_none() {
            return;
        }
        let known = self.sessions.known(container);
        let own = known.order.iter().rev().find(|root| root.pid == pid).copied();
        let live = own.and_then(|root| known.live.get_mut(&root));
        match live.filter(|live| live.session.exec_id.is_none()) {
            Some(live) if live.session.entry == Entry::RuntimeExec => {
                live.session.exec_id = Some(exec_id);
                let root = live.session.process.identity;
                self.sessions.changed(container, root, now);
            }
            Some(_) | None => {
                known.execs.retain(|(_, _, at)| now.duration_since(*at) < EXEC_WITHIN);
                if known.execs.len() >= MAX_EXECS {
                    known.execs.pop_front();
                }
                known.execs.push_back((pid, exec_id, now));
            }
        }
    }

    /// The runtime has told how it ended.
    #[expect(clippy::too_many_arguments, reason = "what the runtime says of it")]
    pub(super) fn exec_exited(
        &mut self,
        container: &ContainerId,
        exec_id: &str,
        pid: u32,
        exit: Exit,
        at: Timestamp,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        if self.inventory.get(container).is_none() {
            return;
        }
        let known = self.sessions.known(container);
        let is_it = |root: &&ProcessIdentity| {
            root.pid == pid
                && known.live.get(root).is_some_and(|live| {
                    live.session.entry == Entry::RuntimeExec
                        && live.session.exec_id.as_deref().is_none_or(|own| own == exec_id)
                })
        };
        let Some(root) = known.order.iter().rev().find(is_it).copied() else { return };
        let Some(live) = known.live.get_mut(&root) else { return };
        live.session.exec_id.get_or_insert_with(|| exec_id.to_owned());
        if live.session.state == SessionState::Closed && live.session.exit.is_some() {
            self.sessions.changed(container, root, now);
            return;
        }
        live.end(at, Some(exit));
        if let Some(mut command) = live.running.remove(&pid) {
            known.shares[lane(live.session.entry)].give_back(weight(&command));
            command.ended_at = live.session.ended_at;
            command.exit = Some(exit);
            live.changed.push(command);
        }
        self.session_closed(container, root, effects);
    }

    /// The container's first process has ended, and all others with it.
    pub(super) fn sessions_ended(
        &mut self,
        container: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(known) = self.sessions.containers.get_mut(container) else { return };
        let open: Vec<ProcessIdentity> = known
            .live
            .iter()
            .filter(|(_, live)| live.session.state == SessionState::Open)
            .map(|(root, _)| *root)
            .collect();
        for root in open {
            let known = self.sessions.known(container);
            let Some(live) = known.live.get_mut(&root) else { continue };
            live.end(now, None);
            let ended = live.session.ended_at;
            for (_, mut command) in std::mem::take(&mut live.running) {
                known.shares[lane(live.session.entry)].give_back(weight(&command));
                command.ended_at = ended;
                live.changed.push(command);
            }
            if live.held_until.is_some() {
                self.report_session(container, root, Source::Trace, now, effects);
            }
            self.session_closed(container, root, effects);
        }
    }

    /// Everything that runs has shown up: whoever was in another container is there no
    /// more.
    pub(super) fn forget_remembered_sessions(&mut self, effects: &mut Vec<Effect>) {
        let remembered: Vec<ContainerId> = self.sessions.remembered.keys().cloned().collect();
        for container in remembered {
            let entry = self.inventory.get(&container);
            if entry.is_some_and(|entry| entry.pid.is_some()) {
                self.sessions.known(&container);
                continue;
            }
            let Some(gone) = self.sessions.remembered.remove(&container) else { continue };
            for (mut session, _) in gone.sessions {
                session.state = SessionState::Closed;
                session.revision += 1;
                let (session, commands) = (Box::new(session), Vec::new());
                effects.push(Effect::Record(Record::Session { session, commands }));
            }
        }
    }

    /// Hands on every session and probe that is known, with what runs in it.
    pub(super) fn sessions_again(&mut self, effects: &mut Vec<Effect>) {
        for known in self.sessions.containers.values() {
            let told = known.live.values().filter(|live| live.probe.is_none());
            effects.extend(told.map(|live| {
                let commands = live.running.values().cloned().collect();
                Effect::Record(Record::Session {
                    session: Box::new(live.session.clone()),
                    commands,
                })
            }));
            let probes = known.probes.values().cloned();
            effects.extend(probes.map(|probe| Effect::Record(Record::Probe(Box::new(probe)))));
        }
    }

    /// A container is forgotten. What is new of its sessions is told before.
    pub(super) fn forget_sessions(&mut self, container: &ContainerId, effects: &mut Vec<Effect>) {
        let own = |(of, root): &(ContainerId, _)| (of == container).then_some(*root);
        let sessions: Vec<ProcessIdentity> = self.sessions.unsaid.iter().filter_map(own).collect();
        for root in sessions {
            self.say_session(container, root, effects);
        }
        let own = |(of, id): &(ContainerId, _)| (of == container).then_some(*id);
        let probes: Vec<ProbeId> = self.sessions.unsaid_probes.iter().filter_map(own).collect();
        for id in probes {
            self.say_probe(container, id, effects);
        }
        self.sessions.unsaid.retain(|(of, _)| of != container);
        self.sessions.unsaid_probes.retain(|(of, _)| of != container);
        if self.sessions.unsaid.is_empty() && self.sessions.unsaid_probes.is_empty() {
            self.sessions.since = None;
        }
        self.sessions.containers.remove(container);
        self.sessions.held.retain(|(_, of, _)| of != container);
    }

    fn say_probe(&mut self, container: &ContainerId, id: ProbeId, effects: &mut Vec<Effect>) {
        if let Some(probe) = self.sessions.known(container).probes.get(&id) {
            effects.push(Effect::Record(Record::Probe(Box::new(probe.clone()))));
        }
    }

    /// A finding was made, or made again, by something that a session did.
    pub(super) fn session_caused(
        &mut self,
        observation: &Observation,
        process: Option<&Process>,
        finding: FindingId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let Some(root) = self.sessions.of(container, observation.session, process) else { return };
        let entry = self.inventory.get(container);
        let Some(told) = entry.and_then(|entry| entry.findings.get(&finding)) else { return };
        let is_new = told.count <= 1;
        let Some(live) = self.sessions.known(container).live.get_mut(&root) else { return };
        if live.session.finding == Some(finding) || !caused(&mut live.session, finding, is_new) {
            return;
        }
        if live.probe.is_some() || live.held_until.is_some() {
            // What departs from the image is no probe's business.
            self.report_session(container, root, observation.source, now, effects);
            if let Some(live) = self.sessions.known(container).live.get_mut(&root) {
                live.probe = None;
            }
        }
        self.sessions.changed(container, root, now);
    }

    /// The session in which something was done, by its name.
    pub(super) fn session_of(
        &self,
        observation: &Observation,
        process: Option<&Process>,
    ) -> Option<SessionId> {
        let container = &observation.container;
        let root = self.sessions.of(container, observation.session, process)?;
        Some(SessionId::new(container, root))
    }

    /// Tells what is new of one session.
    fn say_session(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        effects: &mut Vec<Effect>,
    ) {
        self.sessions.unsaid.remove(&(container.clone(), root));
        let known = self.sessions.known(container);
        let Some(live) = known.live.get_mut(&root) else { return };
        if live.probe.is_some() {
            if live.session.state == SessionState::Closed {
                known.forget(root);
                known.order.retain(|one| *one != root);
            }
            return;
        }
        live.session.revision += 1;
        let commands = std::mem::take(&mut live.changed);
        let session = Box::new(live.session.clone());
        effects.push(Effect::Record(Record::Session { session, commands }));
    }

    /// Tells what is due: of sessions, of probes, and of those that have turned out to
    /// be none.
    pub(super) fn say_sessions(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        while let Some((until, container, root)) = self.sessions.held.first().cloned()
            && until <= now
        {
            self.sessions.held.pop_first();
            let live = self.sessions.known(&container).live.get(&root);
            let is_due = live.and_then(|live| live.held_until).is_some_and(|until| until <= now);
            if is_due {
                self.report_session(&container, root, Source::Gate, now, effects);
            }
        }
        self.sessions.since = None;
        for (container, root) in std::mem::take(&mut self.sessions.unsaid) {
            self.say_session(&container, root, effects);
        }
        for (container, id) in std::mem::take(&mut self.sessions.unsaid_probes) {
            self.say_probe(&container, id, effects);
        }
    }

    /// A person says whether a probe is to be reported all the same.
    pub(super) fn set_probe(
        &mut self,
        id: ProbeId,
        reported: bool,
        effects: &mut Vec<Effect>,
    ) -> Option<Probe> {
        let all = self.sessions.containers.values_mut();
        let probe = all.into_iter().find_map(|known| known.probes.get_mut(&id))?;
        probe.reported = reported;
        let probe = probe.clone();
        effects.push(Effect::Record(Record::Probe(Box::new(probe.clone()))));
        Some(probe)
    }

    /// Whether this process is known for a shell on a connection.
    pub(super) fn is_reverse_shell(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
    ) -> bool {
        let live = self.sessions.known(container).live.get(&root);
        live.is_some_and(|live| live.session.entry == Entry::ReverseShell)
    }

    /// A shell on a connection is a session from within.
    pub(super) fn reverse_shell_opened(
        &mut self,
        observation: &Observation,
        process: &Process,
        is_direct: bool,
        finding: FindingId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let has_terminal = process.tty.is_some().then_some(Interactive::Terminal);
        let opening = Opening {
            root: process.identity,
            entry: Entry::ReverseShell,
            interactive: is_direct.then_some(Interactive::Socket).or(has_terminal),
            process: process.clone(),
            host: Vec::new(),
            login: None,
            requested_by: None,
            beside: None,
        };
        self.session_opened(observation, &opening, now, effects);
        let container = &observation.container;
        let known = self.sessions.known(container);
        if let Some(live) = known.live.get_mut(&process.identity) {
            live.session.finding.get_or_insert(finding);
            self.sessions.changed(container, process.identity, now);
        }
    }
}

/// The sessions whose finding waits, and that run the same command.
fn waiting_with<'a>(known: &'a mut Known, argv: &[String]) -> impl Iterator<Item = &'a mut Live> {
    known.live.values_mut().filter(move |earlier| {
        earlier.held_until.is_some() && earlier.session.process.argv.as_deref() == Some(argv)
    })
}

/// Takes note that a session has caused a finding; false if that was known. Of those
/// that are not listed any more, only new ones are counted.
fn caused(session: &mut Session, finding: FindingId, is_new: bool) -> bool {
    let is_full = session.findings.len() >= MAX_SESSION_FINDINGS;
    if session.findings.contains(&finding) || is_full && !is_new {
        return false;
    }
    session.findings_total += 1;
    if !is_full {
        session.findings.push(finding);
    }
    true
}

fn probe(
    live: &Live,
    id: ProbeId,
    argv: &[String],
    source: ProbeSource,
    interval: Option<SignedDuration>,
    count: u64,
) -> Probe {
    let session = &live.session;
    Probe {
        schema: PROBE_SCHEMA.to_owned(),
        id,
        container: session.container.clone(),
        image: session.image.clone(),
        argv: argv.to_vec(),
        source,
        interval_milliseconds: interval
            .map(|interval| u64::try_from(interval.as_millis()).unwrap_or_default()),
        count,
        first_seen: session.started_at,
        last_seen: session.started_at,
        reported: false,
    }
}
