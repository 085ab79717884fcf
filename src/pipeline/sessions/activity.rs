//! What happens in a session: its processes run commands, open a terminal and end. Commands
//! are listed up to a limit, and counted beyond it.

use jiff::Timestamp;

use super::store::{lane, weight};
use crate::budget;
use crate::health::Failure;
use crate::model::session::{COMMAND_SCHEMA, MAX_COMMANDS};
use crate::model::{
    Command, ContainerId, Entry, Exit, Interactive, Kind, Observation, ProcessIdentity, Run,
};
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

impl State {
    /// A program was run in a session.
    pub(in crate::pipeline) fn session_ran(
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
                // The process has executed another program.
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

    /// Further programs were run in a session and are only counted.
    pub(in crate::pipeline) fn session_ran_more(
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
    pub(in crate::pipeline) fn session_interactive(
        &mut self,
        observation: &Observation,
        root: ProcessIdentity,
        (interactive, tty): (Interactive, Option<&str>),
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
            self.report_session_as(container, root, kind, source, now, effects);
        }
        self.publish_session(container, root, effects);
    }

    /// A process of a session has ended. The session ends with its first process.
    pub(in crate::pipeline) fn session_process_ended(
        &mut self,
        observation: &Observation,
        root: ProcessIdentity,
        (process, exit): (ProcessIdentity, Option<Exit>),
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
}
