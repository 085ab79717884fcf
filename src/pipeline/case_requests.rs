//! Requests for evidence, by rules and by users: what is known of the container and the finding.
//!
//! `cases` has how often rules may ask; `respond` gives the request its turn.

use jiff::Timestamp;

use super::cases::Permit;
use super::messages::Effect;
use super::responses::{Actor, Cause, requested_by, workload_of};
use super::state::State;
use crate::history::Record;
use crate::inventory::Entry;
use crate::model::{CaseId, ContainerId, FindingId, Incarnation, Kind, RootfsPath, RuleAnswer};
use crate::respond::{Action, BEGIN_EVIDENCE, Order, ResponseRequest, Until};

/// What evidence is asked for.
pub(super) struct Wanted {
    pub(super) run: Option<Incarnation>,
    pub(super) finding: Option<FindingId>,
    pub(super) kind: Option<Kind>,
    pub(super) actor: Actor,
    pub(super) path: Option<RootfsPath>,
    pub(super) by_rule: bool,
    pub(super) environment: bool,
}

impl Wanted {
    /// `None` while the container's record is not known.
    pub(super) fn order(self, entry: &Entry, id: &ContainerId, now: Timestamp) -> Option<Order> {
        let container = entry.container.clone()?;
        let at = self.finding.is_none().then_some(now);
        Some(Order {
            case: CaseId::new(id, self.run, self.finding, at),
            workload: workload(entry, id),
            container: Box::new(container),
            kind: self.kind,
            process: self.actor.process,
            path: self.path,
            by_rule: self.by_rule,
            environment: self.environment,
            until: Until::default(),
        })
    }
}

/// What shares a limit: containers of one pod do.
fn workload(entry: &Entry, id: &ContainerId) -> String {
    match workload_of(entry).0 {
        Some(pod) => format!("pod {pod}"),
        None => format!("container {id}"),
    }
}

impl State {
    /// Asks for the evidence that a rule wants.
    pub(super) fn take_evidence(
        &mut self,
        cause: &Cause<'_>,
        answer: &RuleAnswer,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Cause { container, actor, kind, finding, .. } = *cause;
        let ticket = self.ticket();
        let Some(entry) = self.inventory.get(container) else { return };
        let run = actor.run_in(entry);
        // The run that did it has ended: its processes are gone.
        let Some(run) = run else { return };
        let (pod, image) = workload_of(entry);
        let wanted = Wanted {
            run: Some(run),
            finding: Some(finding),
            kind: Some(kind),
            actor,
            path: cause.path.clone(),
            by_rule: true,
            environment: false,
        };
        let case = CaseId::new(container, Some(run), Some(finding), None);
        let permit = self.responses.cases.permit(case, &workload(entry, container), now);
        let order = wanted.order(entry, container, now);
        let request = ResponseRequest {
            ticket,
            container: container.clone(),
            pod,
            image,
            incarnation: Some(run),
            process: None,
            action: Action::Evidence,
            reason: format!("{kind} {finding}"),
            requested_by: requested_by(&answer.rule),
            requested_at: now,
            finding: Some(finding),
            no_restart: false,
            hook: None,
            evidence: order.map(Box::new),
        };
        let record = |response| Effect::Record(Record::Response(Box::new(response)));
        match permit {
            Permit::Known | Permit::RefusedAgain => (),
            Permit::Refused(why) => effects.push(record(request.failed(why))),
            Permit::Take if request.evidence.is_none() => {
                let why = "not carried out: containerd has not described the container yet";
                effects.push(record(request.failed(why.to_owned())));
            }
            Permit::Take => {
                let message = format!("evidence is taken into case {case}");
                effects.push(record(request.begins(BEGIN_EVIDENCE, message)));
                self.request_response(request, None, effects);
            }
        }
    }
}
