//! Responses: the kill that a rule requests for a finding, and what comes of responses.
//!
//! A kill is requested once for a run, and again while it fails. `respond` carries it out.

use jiff::{SignedDuration, Timestamp};

use super::messages::Effect;
use super::state::{ResponseReply, State, successful_kill};
use crate::history::Record;
use crate::inventory::{Kill, Killed};
use crate::model::{
    ContainerId, Disposition, FindingId, Incarnation, Kind, Outcome, ProcessIdentity, Verdict,
};
use crate::policy::KILL_ON;
use crate::respond::{Action, RESTART, Response, ResponseRequest};

/// The pauses before a failed kill is tried again: each is twice as long as the last one.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_secs(300);

/// Why a response may be due.
pub(super) struct Cause<'a> {
    pub(super) container: &'a ContainerId,
    /// The init of the run that the finding is about; without one it is the current run.
    pub(super) init: Option<ProcessIdentity>,
    pub(super) kind: Kind,
    pub(super) verdict: &'a Verdict,
    pub(super) finding: FindingId,
}

impl State {
    /// Responds to a finding as its verdict says, once for a run. It makes no difference
    /// whether the finding is kept.
    pub(super) fn respond(&mut self, cause: &Cause<'_>, now: Timestamp, effects: &mut Vec<Effect>) {
        let Cause { container, init, kind, verdict, finding } = *cause;
        if verdict.disposition != Disposition::Kill {
            return;
        }
        let Some(entry) = self.inventory.get_mut(container) else { return };
        let meant = init.map_or_else(|| entry.incarnation(), |init| entry.incarnation_of(init));
        // The run that did it has ended: the current one is another.
        let Some(incarnation) = meant else { return };
        let known = entry.run.kill.as_ref();
        if known.is_some_and(|kill| is_same_run(&kill.incarnation, &incarnation)) {
            return;
        }
        let (ticket, failures, due) = (None, 0, None);
        let rule = verdict.rule.clone().unwrap_or_default();
        entry.run.kill = Some(Kill { incarnation, kind, finding, rule, ticket, failures, due });
        self.request_kill(container, now, effects);
    }

    /// Requests the kill that a container's entry holds.
    fn request_kill(&mut self, container: &ContainerId, now: Timestamp, effects: &mut Vec<Effect>) {
        let ticket = self.ticket();
        let kill = self.inventory.get_mut(container).and_then(|entry| entry.run.kill.as_mut());
        let Some(kill) = kill else { return };
        (kill.ticket, kill.due) = (Some(ticket), None);
        let request = ResponseRequest {
            ticket,
            container: container.clone(),
            incarnation: Some(kill.incarnation),
            action: Action::Kill,
            reason: format!("{} {}", kill.kind, kill.finding),
            requested_by: match kill.rule.as_str() {
                KILL_ON => format!("setting {KILL_ON}"),
                rule => format!("rule {rule}"),
            },
            requested_at: now,
            finding: Some(kill.finding),
            no_restart: false,
        };
        self.request_response(request, None, effects);
    }

    /// Requests a response. `reply` goes to the client that waits for it.
    pub(super) fn request_response(
        &mut self,
        request: ResponseRequest,
        reply: Option<ResponseReply>,
        effects: &mut Vec<Effect>,
    ) {
        self.responses.pending.insert(request.ticket, (request.clone(), reply));
        effects.push(Effect::Respond(request));
    }

    /// A response was carried out, or has failed.
    pub(super) fn response_ended(
        &mut self,
        response: Response,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        effects.push(Effect::Record(Record::Response(Box::new(response.clone()))));
        if let Some(entry) = self.inventory.get_mut(&response.container) {
            if let Some(kill) = &mut entry.run.kill
                && kill.ticket == Some(response.ticket)
            {
                kill.ticket = None;
                if !response.outcome.succeeded && !response.outcome.gone {
                    kill.failures = kill.failures.saturating_add(1);
                    kill.due = Some(now.saturating_add(pause_after(kill.failures)).unwrap_or(now));
                    self.responses.failed_kills.insert(response.container.clone());
                }
            }
            if let Some(finding) = response.finding.and_then(|id| entry.findings.get_mut(&id)) {
                finding.outcome = Some(response.outcome.clone());
                finding.revision += 1;
                effects.push(Effect::finding(finding));
            }
            if let Some(killed) = successful_kill(&response) {
                entry.killed = Some(Box::new(killed));
                let container = response.container.clone();
                self.started_again(&container, now, effects);
            }
        }
        if let Some((_, Some(reply))) = self.responses.pending.remove(&response.ticket) {
            let _ = reply.send(Ok(response));
        }
    }

    /// Records that a container runs again whose run was killed, if it does.
    pub(super) fn started_again(
        &mut self,
        id: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get_mut(id) else { return };
        let Some(incarnation) = entry.incarnation() else { return };
        let Some(killed) =
            entry.killed.take_if(|killed| !is_same_run(&killed.incarnation, &incarnation))
        else {
            return;
        };
        let Killed { incarnation: before, finding, outcome } = *killed;
        let is_another = before
            .created_at
            .is_some_and(|created_at| incarnation.created_at.is_some_and(|is| is != created_at));
        if is_another {
            return;
        }
        let seconds = now.duration_since(outcome.at).as_secs_f64().max(0.0);
        let message = format!(
            "started again (pid {}), seen {seconds:.1} s after the kill; its files are those of \
             before",
            incarnation.pid
        );
        tracing::warn!(container = %id, "a killed container was {message}");
        let by = match outcome.restarter {
            Some(restarter) => format!("{restarter}, as was expected"),
            None => "nothing that driftd knows of".to_owned(),
        };
        effects.push(Effect::Record(Record::Response(Box::new(Response {
            ticket: 0,
            container: id.clone(),
            incarnation: Some(incarnation),
            reason: format!("pid {} was killed", before.pid),
            requested_by: by,
            requested_at: outcome.at,
            finding,
            outcome: Outcome {
                action: RESTART.to_owned(),
                succeeded: true,
                gone: false,
                message,
                restarter: outcome.restarter,
                at: now,
            },
        }))));
    }

    /// When a kill that has failed is requested again.
    pub(super) fn kill_due(&self) -> Option<Timestamp> {
        let failed = self.responses.failed_kills.iter();
        let kills = failed.filter_map(|id| self.inventory.get(id)?.run.kill.as_ref());
        kills.filter_map(|kill| kill.due).min()
    }

    /// Requests failed kills again, as long as their run is there.
    pub(super) fn retry_kills(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let is_due = |due: Timestamp| {
            // After a clock was set back it would be far away.
            due <= now || due.duration_since(now) > LONGEST_PAUSE
        };
        for id in std::mem::take(&mut self.responses.failed_kills) {
            let kill = self.inventory.get(&id).and_then(|entry| entry.run.kill.as_ref());
            match kill.and_then(|kill| kill.due) {
                Some(due) if is_due(due) => self.request_kill(&id, now, effects),
                Some(_) => {
                    self.responses.failed_kills.insert(id);
                }
                None => (),
            }
        }
    }

    /// Whether a response was requested whose outcome is not known.
    pub(super) fn has_pending_responses(&self) -> bool {
        !self.responses.pending.is_empty()
    }

    /// Records that the outcome of the pending responses is not known. Returns their number.
    pub(super) fn give_up_responses(&mut self, effects: &mut Vec<Effect>) -> usize {
        let pending = std::mem::take(&mut self.responses.pending);
        let count = pending.len();
        for (_, (request, _)) in pending {
            let message = "driftd was stopped before the outcome was known; it may happen";
            let response = request.failed(message.to_owned());
            effects.push(Effect::Record(Record::Response(Box::new(response))));
        }
        count
    }
}

fn pause_after(failures: u32) -> SignedDuration {
    (FIRST_PAUSE * (1 << failures.saturating_sub(1).min(16))).min(LONGEST_PAUSE)
}

/// Whether both name one run, as far as their parts are known.
pub(super) fn is_same_run(one: &Incarnation, other: &Incarnation) -> bool {
    one.pid == other.pid
        && one.start_time.zip(other.start_time).is_none_or(|(one, other)| one == other)
        && one.created_at.zip(other.created_at).is_none_or(|(one, other)| one == other)
}
