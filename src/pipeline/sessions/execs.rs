//! Executions that the runtime reports: they name the session whose first process they are,
//! and how it ended. The events may come before or after the sensors have seen the process.

use jiff::{SignedDuration, Timestamp};

use super::store::{ExecExit, lane, weight};
use crate::model::{ContainerId, Entry, ProcessIdentity, SessionState};
use crate::pipeline::messages::Effect;
use crate::pipeline::state::State;

/// Executions that the runtime has reported before their process was seen, and how long they
/// are kept.
const MAX_EXECS: usize = 1024;
const EXEC_WITHIN: SignedDuration = SignedDuration::from_secs(60);

impl State {
    pub(in crate::pipeline) fn exec_started(
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

    pub(in crate::pipeline) fn exec_exited(
        &mut self,
        container: &ContainerId,
        exited: &ExecExit<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let ExecExit { exec_id, pid, exit, at } = *exited;
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
}
