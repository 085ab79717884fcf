//! Responses: what rules request for a finding, and what comes of responses.
//!
//! A kill or a pause is requested once for a run, a kill of a process once for each process, and
//! again while it fails. `breaker` limits how much rules may do. `respond` carries it out.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::breaker::{Asked, Refusal, StoppedRule};
use super::evidence::Emission;
use super::messages::Effect;
use super::process_kills::ProcessKills;
use super::state::{ResponseReply, State, successful_kill};
use crate::health::Failure;
use crate::history::Record;
use crate::inventory::{Answering, Entry, Killed};
use crate::model::{
    Answer, ContainerId, FindingId, Incarnation, Kind, Outcome, ProcessIdentity, RootfsPath,
    RuleAnswer, Verdict,
};
use crate::policy::{Hook, KILL_ON};
use crate::respond::{
    Action, BEGIN_EVIDENCE, HookCall, RESTART, RESUME_ANSWERS, Response, ResponseRequest,
    STOP_ANSWERS, TOO_MANY, hook_of,
};

/// The pauses before a failed response is tried again: each is twice as long as the last one.
const FIRST_PAUSE: SignedDuration = SignedDuration::from_secs(1);
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_secs(300);
/// For how long an answer stays refused by a limit, or because its rule is stopped. Then it is
/// asked for and recorded again.
const REFUSED: SignedDuration = SignedDuration::from_secs(60);
const MOST_REFUSED: SignedDuration = SignedDuration::from_secs(600);
/// The message of a hook that has no room.
const TOO_MANY_HOOKS: &str = "too many hooks of this container wait already";
/// The outcome of a denial.
const DENIED: &str = "not executed: execve(2) failed with EPERM";

/// Where something happened: the run of the container and the process.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Actor {
    /// The init of the run; without one it is the current run.
    pub(super) init: Option<ProcessIdentity>,
    /// The process that did it, if one is known.
    pub(super) process: Option<ProcessIdentity>,
    /// It was about to run a program, and was refused that.
    pub(super) is_denied: bool,
}

impl Actor {
    /// The run in which it happened, if that is known.
    pub(super) fn run_in(self, entry: &Entry) -> Option<Incarnation> {
        self.init.map_or_else(|| entry.incarnation(), |init| entry.incarnation_of(init))
    }

    pub(super) fn of(emission: &Emission<'_>) -> Actor {
        let Emission { observation, evidence, .. } = *emission;
        let process = evidence.process.map(|process| process.identity);
        Actor { init: Some(observation.init), process, is_denied: observation.is_denied() }
    }
}

/// Why a response may be due.
pub(super) struct Cause<'a> {
    pub(super) container: &'a ContainerId,
    pub(super) actor: Actor,
    pub(super) kind: Kind,
    pub(super) verdict: &'a Verdict,
    pub(super) finding: FindingId,
    /// The file that it is about, if evidence is to be taken.
    pub(super) path: Option<RootfsPath>,
}

/// The file of a finding, if evidence of it is to be taken.
pub(super) fn path_for(verdict: &Verdict, path: Option<&RootfsPath>) -> Option<RootfsPath> {
    path.filter(|_| verdict.wants_evidence()).cloned()
}

impl State {
    /// Responds to a finding as its verdict says. It makes no difference whether the finding is
    /// kept.
    pub(super) fn respond(&mut self, cause: &Cause<'_>, now: Timestamp, effects: &mut Vec<Effect>) {
        for answer in cause.verdict.answers.iter().filter(|answer| !answer.dry_run) {
            match answer.action {
                Answer::Evidence => self.take_evidence(cause, answer, now, effects),
                Answer::Deny if cause.actor.is_denied => {
                    self.record_denial(cause, &answer.rule, now, effects);
                }
                _ => self.answer(cause, answer, now, effects),
            }
        }
    }

    fn answer(
        &mut self,
        cause: &Cause<'_>,
        answer: &RuleAnswer,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Cause { container, actor, kind, finding, .. } = *cause;
        // It runs nevertheless: nothing was asked, no answer came in time, or its content was
        // changed after it was read.
        let is_denial = answer.action == Answer::Deny;
        let action = if is_denial { Answer::KillProcess } else { answer.action };
        let process = actor.process.filter(|_| action == Answer::KillProcess);
        let (number, limits) = (self.ticket(), self.policy.limits);
        let hook = answer.hook.clone().filter(|_| action == Answer::Hook);
        // One that may end a container is asked for once for its run, as a kill is.
        let ends_nothing = hook.as_ref().is_some_and(|hook| self.ends_nothing(hook));
        let Some(entry) = self.inventory.get_mut(container) else { return };
        if ends_nothing && has_run(entry, finding, hook.as_deref()) {
            return;
        }
        let meant = actor.run_in(entry);
        // The run that did it has ended: the current one is another.
        let Some(incarnation) = meant else { return };
        let is_it = |one: &Answering| {
            one.action == action
                && one.process == process
                && one.hook == hook
                && (!ends_nothing || one.finding == finding || one.refused.is_some())
                && is_same_run(&one.incarnation, &incarnation)
                // A limit of one rule is none of another.
                && (one.refused.is_none() || one.rule == answer.rule)
        };
        // After a clock was set back, it would last.
        let is_over = |until: Timestamp| until <= now || until.duration_since(now) > MOST_REFUSED;
        entry.run.forget_answers(|one| is_it(one) && one.refused.is_some_and(is_over));
        if let Some(known) = entry.run.answers().find(|one| is_it(one)) {
            // The turn of another finding was refused, and this one has none.
            let is_lost = ends_nothing && known.finding != finding;
            let _ = is_lost.then(|| self.health.record(Failure::ResponseQueueFull));
            return;
        }
        let answering = Answering {
            number,
            action,
            incarnation,
            process,
            hook,
            kind,
            finding,
            rule: answer.rule.clone(),
            ticket: None,
            failures: 0,
            due: None,
            refused: None,
        };
        // With its init, the whole run ends.
        let is_init = |one: ProcessIdentity| [entry.run.init, actor.init].contains(&Some(one));
        let is_whole = action != Answer::KillProcess || process.is_some_and(is_init);
        let asked = asked_in(container, entry, &answering, is_whole);
        let permitted = match impossible(entry, &answering, is_whole) {
            Some(why) => Err(Refusal::Limit(why.to_owned())),
            None if ends_nothing => Ok(()),
            None => self.responses.breaker.permit(asked, limits, now),
        };
        match permitted {
            Ok(()) => {
                entry.run.remember_answer(answering);
                self.request_answer(container, number, now, effects);
            }
            Err(refusal) => self.refuse(container, &answering, refusal, now, effects),
        }
    }

    /// Records that a program was not executed.
    fn record_denial(
        &mut self,
        cause: &Cause<'_>,
        rule: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Cause { container, actor, kind, finding, .. } = *cause;
        let Some(entry) = self.inventory.get(container) else { return };
        let incarnation = actor.run_in(entry);
        let (pod, image) = workload_of(entry);
        let mut response = Response {
            ticket: 0,
            container: container.clone(),
            incarnation,
            process: actor.process,
            pod,
            image,
            changed: true,
            reason: format!("{kind} {finding}"),
            requested_by: requested_by(rule),
            requested_at: now,
            finding: Some(finding),
            outcome: Outcome {
                action: Answer::Deny.name().to_owned(),
                succeeded: true,
                gone: false,
                message: DENIED.to_owned(),
                restarter: None,
                at: now,
            },
            case: None,
        };
        self.count_process_kill(&mut response);
        let outcome = response.outcome.clone();
        self.record_response(response, now, effects);
        let entry = self.inventory.get_mut(container);
        if let Some(finding) = entry.and_then(|entry| entry.findings.get_mut(&finding)) {
            finding.outcome = Some(outcome);
            finding.revision += 1;
            effects.push(Effect::finding(finding));
        }
    }

    /// Records an answer that is not carried out, and remembers that for a time.
    fn refuse(
        &mut self,
        container: &ContainerId,
        answering: &Answering,
        refusal: Refusal,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let time = match &refusal {
            Refusal::Limit(_) => REFUSED,
            Refusal::Stopped(..) => MOST_REFUSED,
        };
        if let Some(entry) = self.inventory.get_mut(container)
            && entry.run.make_room(false)
        {
            let refused = Some(now.saturating_add(time).unwrap_or(Timestamp::MAX));
            entry.run.remember_answer(Answering { refused, ..answering.clone() });
        }
        let message = match refusal {
            Refusal::Limit(why) => {
                if why == TOO_MANY_HOOKS {
                    let _ = self.health.record(Failure::ResponseQueueFull);
                }
                format!("not carried out: {why}")
            }
            Refusal::Stopped(stopped, is_new) => {
                if is_new {
                    self.report_stopped(&stopped, effects);
                }
                format!(
                    "not carried out: the answers of rule {} are stopped since {}: {} (go on \
                     with: driftd respond resume-answers {})",
                    stopped.rule, stopped.since, stopped.reason, stopped.rule
                )
            }
        };
        let ticket = self.ticket();
        let response = self.request_of(container, answering, ticket, now).failed(message);
        let entry = self.inventory.get_mut(container);
        let finding = entry.and_then(|entry| entry.findings.get_mut(&answering.finding));
        if let Some(finding) = finding {
            finding.outcome = Some(response.outcome.clone());
            finding.revision += 1;
            effects.push(Effect::finding(finding));
        }
        self.record_response(response, now, effects);
    }

    fn report_stopped(&mut self, stopped: &StoppedRule, effects: &mut Vec<Effect>) {
        let StoppedRule { rule, since, container, reason } = stopped;
        tracing::error!(
            rule,
            "the answers of a rule are stopped, and it only reports: {reason} (go on with: driftd \
             respond resume-answers {rule})"
        );
        let response = about_rule(STOP_ANSWERS, container, reason, requested_by(rule), *since);
        effects.push(Effect::Record(Record::Response(Box::new(response))));
    }

    /// Lets a rule answer again, or all of them.
    pub(super) fn resume_answers(
        &mut self,
        rule: Option<&str>,
        reason: &str,
        user: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Vec<StoppedRule> {
        let resumed = self.responses.breaker.resume(rule);
        for stopped in &resumed {
            let StoppedRule { rule, container, .. } = stopped;
            tracing::warn!(rule, "the answers of a rule are carried out again: {reason}");
            let reason = format!("{}: {reason}", requested_by(rule));
            let response = about_rule(RESUME_ANSWERS, container, &reason, user.to_owned(), now);
            effects.push(Effect::Record(Record::Response(Box::new(response))));
            for (_, entry) in self.inventory.iter_mut() {
                entry.run.forget_answers(|one| one.refused.is_some() && one.rule == *rule);
            }
        }
        resumed
    }

    /// Takes in the responses of the history that count for the limits, oldest first.
    pub fn remember_answers(&mut self, responses: Vec<Response>) {
        let (breaker, hooks) = (&mut self.responses.breaker, &self.policy.hooks);
        for response in responses {
            let Response { container, incarnation, process, pod, image, .. } = response;
            let Response { requested_by, requested_at, reason, outcome, .. } = response;
            match outcome.action.as_str() {
                STOP_ANSWERS => {
                    let Some(rule) = rule_of(&requested_by) else { continue };
                    let (rule, since) = (rule.to_owned(), requested_at);
                    breaker.stop(StoppedRule { rule, since, container, reason });
                }
                RESUME_ANSWERS => {
                    let rule = reason.split_once(": ").and_then(|(rule, _)| rule_of(rule));
                    if let Some(rule) = rule {
                        breaker.resume(Some(rule));
                    }
                }
                // These change nothing, or end nothing.
                action
                    if [Answer::Evidence.name(), Answer::Deny.name(), BEGIN_EVIDENCE]
                        .contains(&action) => {}
                _ if outcome.succeeded
                    && !hook_of(&outcome).is_some_and(|hook| ends_nothing(hooks, hook)) =>
                {
                    let action = &*outcome.action;
                    let Some(rule) = rule_of(&requested_by) else { continue };
                    let is_init = |process: ProcessIdentity| {
                        incarnation.is_some_and(|run| run.pid == process.pid)
                    };
                    let is_whole =
                        action != Answer::KillProcess.name() || process.is_some_and(is_init);
                    let (rule, number) = (rule.to_owned(), 0);
                    let asked = Asked { number, rule, container, pod, image, is_whole };
                    breaker.remember(requested_at, asked);
                }
                _ => (),
            }
        }
    }

    fn request_of(
        &self,
        container: &ContainerId,
        answering: &Answering,
        ticket: u64,
        now: Timestamp,
    ) -> ResponseRequest {
        let entry = self.inventory.get(container);
        let (pod, image) = entry.map(workload_of).unwrap_or_default();
        ResponseRequest {
            ticket,
            container: container.clone(),
            pod,
            image,
            incarnation: Some(answering.incarnation),
            process: answering.process,
            action: answering.action.into(),
            reason: format!("{} {}", answering.kind, answering.finding),
            requested_by: requested_by(&answering.rule),
            requested_at: now,
            finding: Some(answering.finding),
            no_restart: answering.action == Answer::Kill && self.policy.stop_restarts,
            evidence: None,
            hook: self.hook_call(container, answering),
        }
    }

    /// The hook of an answer, with what it gets. `None` if it is no hook, or if its finding is
    /// not kept any more.
    fn hook_call(&self, container: &ContainerId, answering: &Answering) -> Option<Box<HookCall>> {
        let name = answering.hook.clone()?;
        let finding = self.inventory.get(container)?.findings.get(&answering.finding)?.clone();
        let settings = self.policy.hooks.get(&name).cloned();
        let rule = Some(answering.rule.clone());
        Some(Box::new(HookCall { name, settings, rule, finding }))
    }

    fn ends_nothing(&self, hook: &str) -> bool {
        ends_nothing(&self.policy.hooks, hook)
    }

    /// Requests a response that a container's entry holds.
    fn request_answer(
        &mut self,
        container: &ContainerId,
        number: u64,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let ticket = self.ticket();
        let entry = self.inventory.get_mut(container);
        let known = entry.and_then(|entry| entry.run.answers_mut().find(|it| it.number == number));
        let Some(known) = known else { return };
        (known.ticket, known.due) = (Some(ticket), None);
        let answering = known.clone();
        let request = self.request_of(container, &answering, ticket, now);
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
        let mut response = response;
        self.count_process_kill(&mut response);
        self.record_response(response.clone(), now, effects);
        if let Some(entry) = self.inventory.get_mut(&response.container) {
            let is_it = |one: &&mut Answering| one.ticket == Some(response.ticket);
            if let Some(answering) = entry.run.answers_mut().find(is_it) {
                answering.ticket = None;
                if response.outcome.succeeded || response.outcome.gone || response.changed {
                    if !response.changed || response.outcome.gone {
                        self.responses.breaker.take_back(answering.number);
                    }
                } else {
                    // That others wait is no failure of this one.
                    let is_failure = response.outcome.message != TOO_MANY;
                    answering.failures = answering.failures.saturating_add(is_failure.into());
                    let pause = pause_after(answering.failures);
                    answering.due = Some(now.saturating_add(pause).unwrap_or(now));
                    self.responses.failed.insert(response.container.clone());
                }
            }
            if response.outcome.succeeded && response.outcome.action == Action::Resume.name() {
                entry.run.is_not_paused();
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
            process: None,
            pod: None,
            image: None,
            case: None,
            changed: true,
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

    /// Records a response. The kills of processes for one finding may be very many.
    fn record_response(&mut self, response: Response, now: Timestamp, effects: &mut Vec<Effect>) {
        let key = ProcessKills::key(&response);
        if response.process.is_some() && rule_of(&response.requested_by).is_some() {
            if let Some(kills) = self.responses.processes.get_mut(&key) {
                kills.count(response);
                return;
            }
            let kills = ProcessKills::begun(&response, now);
            self.responses.processes.insert(key, kills);
        }
        effects.push(Effect::Record(Record::Response(Box::new(response))));
    }

    /// Says in an outcome how many processes were killed for its finding.
    fn count_process_kill(&self, response: &mut Response) {
        let key = ProcessKills::key(response);
        if response.process.is_some()
            && response.outcome.succeeded
            && let Some(kills) = self.responses.processes.get(&key)
        {
            response.outcome.message += &format!(" ({} so far)", kills.total() + 1);
        }
    }

    /// Records the kills of processes that wait for that: those that are due, or all.
    pub(super) fn record_process_kills(
        &mut self,
        now: Timestamp,
        all: bool,
        effects: &mut Vec<Effect>,
    ) {
        self.responses.processes.retain(|_, kills| {
            if !all && !kills.is_due(now) {
                return true;
            }
            let record = kills.record(now);
            let is_going_on = record.is_some();
            effects.extend(
                record.map(|response| Effect::Record(Record::Response(Box::new(response)))),
            );
            is_going_on
        });
    }

    /// When a response that has failed is requested again, or kills of processes are recorded.
    pub(super) fn response_due(&self) -> Option<Timestamp> {
        let failed = self.responses.failed.iter();
        let answers = failed.filter_map(|id| self.inventory.get(id));
        let due = answers.flat_map(|entry| entry.run.answers()).filter_map(|answer| answer.due);
        let together = self.responses.processes.values().map(ProcessKills::due);
        due.chain(together).min()
    }

    /// Requests failed responses again, as long as their run is there.
    pub(super) fn retry_answers(&mut self, now: Timestamp, effects: &mut Vec<Effect>) {
        let is_due = |due: Timestamp| {
            // After a clock was set back it would be far away.
            due <= now || due.duration_since(now) > LONGEST_PAUSE
        };
        for id in std::mem::take(&mut self.responses.failed) {
            let Some(entry) = self.inventory.get(&id) else { continue };
            let waiting: Vec<_> =
                entry.run.answers().filter_map(|one| Some((one.due?, one.number))).collect();
            let mut is_left = false;
            for (due, number) in waiting {
                if is_due(due) {
                    self.request_answer(&id, number, now, effects);
                } else {
                    is_left = true;
                }
            }
            if is_left {
                self.responses.failed.insert(id);
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
        self.record_process_kills(Timestamp::now(), true, effects);
        count
    }
}

/// An answer in a container, as the limits count it.
fn asked_in(
    container: &ContainerId,
    entry: &Entry,
    answering: &Answering,
    is_whole: bool,
) -> Asked {
    let (pod, image) = workload_of(entry);
    let Answering { number, rule, .. } = answering;
    let (number, rule, container) = (*number, rule.clone(), container.clone());
    Asked { number, rule, container, pod, image, is_whole }
}

/// The pod of a container, as `NAMESPACE/NAME`, and its image.
pub(super) fn workload_of(entry: &Entry) -> (Option<String>, Option<String>) {
    let known = entry.container.as_ref();
    let pod = known.and_then(|known| known.pod.as_ref());
    let pod = pod.map(|pod| format!("{}/{}", pod.namespace, pod.name));
    (pod, known.and_then(|known| known.image.name.clone()))
}

/// How the history names a rule that has requested a response.
pub(super) fn requested_by(rule: &str) -> String {
    if rule == KILL_ON { format!("setting {rule}") } else { format!("rule {rule}") }
}

/// The rule that has requested a response, if it was one.
pub(super) fn rule_of(requested_by: &str) -> Option<&str> {
    let rule = requested_by.strip_prefix("rule ");
    rule.or_else(|| requested_by.strip_prefix("setting ").filter(|name| *name == KILL_ON))
}

/// A record about the answers of a rule. It names the container in which it would have answered.
fn about_rule(
    action: &str,
    container: &ContainerId,
    reason: &str,
    requested_by: String,
    at: Timestamp,
) -> Response {
    Response {
        ticket: 0,
        container: container.clone(),
        incarnation: None,
        process: None,
        pod: None,
        image: None,
        case: None,
        changed: true,
        reason: reason.to_owned(),
        requested_by,
        requested_at: at,
        finding: None,
        outcome: Outcome {
            action: action.to_owned(),
            succeeded: true,
            gone: false,
            message: reason.to_owned(),
            restarter: None,
            at,
        },
    }
}

/// Why an answer cannot be requested, whatever the limits of rules say. Makes room for it.
fn impossible(entry: &mut Entry, answering: &Answering, is_whole: bool) -> Option<&'static str> {
    match answering.process {
        None if answering.action == Answer::KillProcess => Some("no process is known that did it"),
        Some(ProcessIdentity { start_time: 0, .. }) => {
            Some("the process had ended before it was known well enough to be killed")
        }
        _ if answering.action == Answer::Hook => {
            (!entry.run.make_room_for_hook()).then_some(TOO_MANY_HOOKS)
        }
        _ => (!entry.run.make_room(is_whole)).then_some(TOO_MANY),
    }
}

/// Whether the limits of rules do not count a hook.
fn ends_nothing(hooks: &BTreeMap<String, Arc<Hook>>, name: &str) -> bool {
    hooks.get(name).is_some_and(|hook| !hook.counts)
}

/// Whether a hook has run for a finding, perhaps before driftd was started.
fn has_run(entry: &Entry, finding: FindingId, hook: Option<&str>) -> bool {
    let outcome = entry.findings.get(&finding).and_then(|finding| finding.outcome.as_ref());
    outcome.is_some_and(|outcome| outcome.succeeded && hook_of(outcome) == hook)
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
