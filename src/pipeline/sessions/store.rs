//! The sessions of all containers: which are known, what they take in memory, and what is not
//! published yet. Plain values with their bounds. The rules are in the files beside this one.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::cadence::Cadences;
use crate::budget::{self, Pool, Share};
use crate::model::{
    Ancestor, Command, ContainerId, Entry, Exit, Probe, ProbeId, Process, ProcessIdentity, Session,
    SessionState,
};

/// Sessions of one container that are known at once, closed ones among them: their processes
/// may still act. Sessions from within may be half as many, so that no container can hide
/// sessions from outside.
pub(super) const MAX_SESSIONS: usize = 2 * 1024;
/// Sessions of one container that are listed while driftd runs, and half as many again from
/// within: a container that makes thousands of shells must not fill the disk with them.
pub(super) const MAX_LISTED: usize = 64 * 1024;
/// Bytes of the commands of one container's sessions, and of all.
const MAX_BYTES: usize = 8 << 20;
const ALL_BYTES: usize = 64 << 20;
/// How soon changes of a session are published.
const PUBLISHED_WITHIN: SignedDuration = SignedDuration::from_millis(200);

/// The sessions of all containers.
#[derive(Debug)]
pub(in crate::pipeline) struct Sessions {
    /// Their commands take parts of this.
    pool: Arc<Pool>,
    pub(super) containers: HashMap<ContainerId, Known>,
    pub(super) unpublished: Unpublished,
    /// The sessions whose finding waits, and until when.
    pub(super) held: BTreeSet<(Timestamp, ContainerId, ProcessIdentity)>,
    /// From the history, for containers that have not appeared yet.
    pub(super) remembered: HashMap<ContainerId, Remembered>,
}

/// The sessions and probes that have changed, and since when.
#[derive(Debug, Default)]
pub(super) struct Unpublished {
    pub(super) sessions: BTreeSet<(ContainerId, ProcessIdentity)>,
    pub(super) probes: BTreeSet<(ContainerId, ProbeId)>,
    pub(super) since: Option<Timestamp>,
}

/// What the history has of one container.
#[derive(Debug, Default)]
pub(super) struct Remembered {
    /// With those of their commands that have not ended.
    pub(super) sessions: Vec<(Session, Vec<Command>)>,
    probes: Vec<Probe>,
}

/// The sessions of one container.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) live: HashMap<ProcessIdentity, Live>,
    pub(super) order: VecDeque<ProcessIdentity>,
    /// Executions that the runtime has reported before their process was seen.
    pub(super) execs: VecDeque<(u32, String, Timestamp)>,
    /// How many were listed, by [`lane`].
    pub(super) listed: [u32; 2],
    pub(super) cadences: Cadences,
    pub(super) probes: HashMap<ProbeId, Probe>,
    /// The bytes that they take, by [`lane`].
    pub(super) shares: [Share; 2],
}

/// One session, open or closed.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) session: Session,
    /// The init of the container's run that it came into, if that was seen.
    pub(super) init: Option<ProcessIdentity>,
    /// The bytes that it took when it was opened.
    bytes: usize,
    /// Its running commands, by pid, as far as they are listed.
    pub(super) running: HashMap<u32, Command>,
    /// Commands that are new or have ended, in their order.
    pub(super) changed: Vec<Command>,
    /// Its finding is not emitted before this, and not at all if the session turns out to be
    /// a probe.
    pub(super) held_until: Option<Timestamp>,
    /// It is a probe, and not recorded as long as it does nothing else.
    pub(super) probe: Option<ProbeId>,
    /// When it last ran a command, or a command ended.
    pub(super) acted_at: Timestamp,
}

/// The end of an execution, as the runtime reports it.
pub(in crate::pipeline) struct ExecExit<'a> {
    pub(in crate::pipeline) exec_id: &'a str,
    pub(in crate::pipeline) pid: u32,
    pub(in crate::pipeline) exit: Exit,
    pub(in crate::pipeline) at: Timestamp,
}

impl Default for Sessions {
    fn default() -> Sessions {
        Sessions {
            pool: Pool::new(ALL_BYTES),
            containers: HashMap::new(),
            unpublished: Unpublished::default(),
            held: BTreeSet::new(),
            remembered: HashMap::new(),
        }
    }
}

impl Known {
    pub(super) fn forget(&mut self, root: ProcessIdentity) {
        let Some(live) = self.live.remove(&root) else { return };
        let running = live.running.values().map(weight).sum::<usize>();
        self.shares[lane(live.session.entry)].give_back(running + live.bytes);
    }

    pub(super) fn keep(&mut self, root: ProcessIdentity, live: Live) {
        self.shares[lane(live.session.entry)].take(live.bytes);
        self.order.push_back(root);
        self.live.insert(root, live);
    }
}

impl Live {
    pub(super) fn new(session: Session, init: Option<ProcessIdentity>) -> Live {
        Live {
            acted_at: session.started_at,
            bytes: weight_of_session(&session),
            session,
            init,
            running: HashMap::new(),
            changed: Vec::new(),
            held_until: None,
            probe: None,
        }
    }

    pub(super) fn end(&mut self, at: Timestamp, exit: Option<Exit>) {
        let session = &mut self.session;
        session.state = SessionState::Closed;
        // A command that was typed at a terminal proves that the client was still there, even
        // if it runs after the client has left.
        let earliest = match session.entry {
            Entry::Attach => self.acted_at,
            _ => session.started_at,
        };
        session.ended_at = session.ended_at.or(Some(at.max(earliest)));
        session.exit = exit.or(session.exit);
    }
}

/// Sessions from outside and those from within have room of their own: a container can make as
/// many sessions from within as it likes.
pub(super) fn lane(entry: Entry) -> usize {
    usize::from(entry == Entry::ReverseShell)
}

/// About how many bytes a session takes in memory, without its commands.
fn weight_of_session(session: &Session) -> usize {
    size_of::<Live>()
        + 512
        + budget::weight_of_process(&session.process)
        + session.host.iter().map(weight_of_ancestor).sum::<usize>()
}

fn weight_of_ancestor(ancestor: &Ancestor) -> usize {
    ancestor.argv.iter().flatten().map(String::len).sum()
}

/// About how many bytes a command takes in memory.
pub(super) fn weight(command: &Command) -> usize {
    let arguments = command.argv.iter().flatten().map(|one| size_of::<String>() + one.len());
    size_of::<Command>() + arguments.sum::<usize>()
}

impl Sessions {
    /// Takes in the sessions of the history that were open, and its probes.
    pub(in crate::pipeline) fn remember(
        &mut self,
        sessions: Vec<(Session, Vec<Command>)>,
        probes: Vec<Probe>,
    ) {
        for session in sessions {
            let container = session.0.container.id.clone();
            self.remembered.entry(container).or_default().sessions.push(session);
        }
        for probe in probes {
            let container = probe.container.id.clone();
            self.remembered.entry(container).or_default().probes.push(probe);
        }
    }

    /// The sessions of a container. A new container begins with those of the history.
    pub(super) fn known(&mut self, container: &ContainerId) -> &mut Known {
        let (remembered, unpublished) = (&mut self.remembered, &mut self.unpublished);
        let pool = &self.pool;
        self.containers.entry(container.clone()).or_insert_with(|| {
            let shares = [pool.share(MAX_BYTES), pool.share(MAX_BYTES / 2)];
            let mut known = Known { shares, ..Known::default() };
            let Remembered { sessions, probes } = remembered.remove(container).unwrap_or_default();
            for (mut session, running) in sessions {
                let root = session.process.identity;
                let share = lane(session.entry);
                if session.entry == Entry::Attach {
                    // Whether the client is still there is not known any more.
                    session.state = SessionState::Closed;
                }
                if session.state == SessionState::Closed {
                    // It was over when driftd was started.
                    unpublished.sessions.insert((container.clone(), root));
                    unpublished.since.get_or_insert(session.started_at);
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

    pub(super) fn changed(
        &mut self,
        container: &ContainerId,
        root: ProcessIdentity,
        now: Timestamp,
    ) {
        self.unpublished.sessions.insert((container.clone(), root));
        self.unpublished.since.get_or_insert(now);
    }

    /// When something is to be published, or a finding no longer waits.
    pub(in crate::pipeline) fn due(&self) -> Option<Timestamp> {
        let since = self.unpublished.since;
        let published =
            since.map(|since| since.saturating_add(PUBLISHED_WITHIN).unwrap_or(Timestamp::MAX));
        let held = self.held.first().map(|(until, ..)| *until);
        [published, held].into_iter().flatten().min()
    }

    /// The session in which a process acted: by its recorded descent, or else by its living
    /// parents, the nearest first.
    pub(in crate::pipeline) fn of(
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

    /// Whether a process belongs to a session in which a person may type.
    pub(in crate::pipeline) fn is_interactive(
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

    /// The session in which a process acted.
    pub(in crate::pipeline) fn session(
        &self,
        container: &ContainerId,
        descent: Option<ProcessIdentity>,
        process: Option<&Process>,
    ) -> Option<&Session> {
        let root = self.of(container, descent, process)?;
        self.containers.get(container)?.live.get(&root).map(|live| &live.session)
    }

    /// Whether a session was open in the container after `since`. Probes do not count.
    pub(in crate::pipeline) fn had_any(&self, container: &ContainerId, since: Timestamp) -> bool {
        let was_open = |live: &Live| {
            live.probe.is_none() && live.session.ended_at.is_none_or(|end| end >= since)
        };
        self.containers.get(container).is_some_and(|known| known.live.values().any(was_open))
            || self.remembered.get(container).is_some_and(|before| !before.sessions.is_empty())
    }

    /// Makes room for one more. False if all that are known are open, or too many were listed.
    pub(super) fn make_room(&mut self, session: &Session) -> bool {
        let known = self.known(&session.container.id);
        let own = lane(session.entry);
        let halves = if own == 0 { 1 } else { 2 };
        if known.listed[own] as usize >= MAX_LISTED / halves {
            return false;
        }
        let bytes = weight_of_session(session);
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
