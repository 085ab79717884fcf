//! Serves the requests of the API: looks containers up by the text of a user, starts diffs,
//! requests responses, and takes in new settings. The status is made in `status`.

use jiff::Timestamp;
use tokio::sync::oneshot;

use super::case_requests::Wanted;
use super::diffs::PendingDiff;
use super::messages::Effect;
use super::requests::{ApiRequest, Diff, LookupError};
use super::responses::{Actor, is_same_run};
use super::state::State;
use super::status::view;
use crate::inventory::{BaselineState, WatchState};
use crate::model::{
    ContainerId, Finding, FindingId, Incarnation, OverlayDirs, RootfsPath, printable,
};
use crate::policy::Policy;
use crate::respond::{Action, HookCall, Order, ResponseRequest};
use crate::watch::SensorCommand;

/// How many containers are named to a client that may have meant one of them.
const MAX_ALIKE: usize = 3;

/// The layers and the entry point of a container that does not run, for a comparison.
struct Stopped {
    rootfs: OverlayDirs,
    entry_point: Vec<RootfsPath>,
}

impl State {
    // Long: one arm for each request.
    pub(super) fn serve(&mut self, request: ApiRequest, now: Timestamp, effects: &mut Vec<Effect>) {
        // The client may have gone: a reply without a receiver is no error.
        match request {
            ApiRequest::Status(reply) => {
                let _ = reply.send(self.status());
            }
            ApiRequest::Containers(reply) => {
                let views = self
                    .inventory
                    .iter()
                    .filter_map(|(id, entry)| view(entry, self.gaps.names_of(id)));
                let views = views.collect();
                let _ = reply.send(views);
            }
            ApiRequest::Lookup { container, reply } => {
                let _ = reply.send(self.lookup(&container));
            }
            ApiRequest::SetPolicy(policy) => {
                let generation = self.policy.generation + 1;
                self.policy = Policy { generation, ..*policy };
                self.enforce_all(now, effects);
            }
            ApiRequest::PolicyRefused(why) => self.policy.refused = Some(why),
            ApiRequest::Policy(reply) => {
                let _ = reply.send(self.policy.clone());
            }
            ApiRequest::SetProbe { probe, reported, reply } => {
                let changed = self.set_probe(probe, reported, effects);
                let _ = reply.send(changed.ok_or(LookupError::UnknownProbe(probe)));
            }
            ApiRequest::ResumeAnswers { rule, reason, requested_by, reply } => {
                let rule = rule.as_deref();
                let resumed = self.resume_answers(rule, &reason, &requested_by, now, effects);
                let _ = reply.send(resumed);
            }
            ApiRequest::Diff { container, reply } => self.start_diff(&container, reply, effects),
            ApiRequest::Respond {
                container,
                cause,
                process,
                action,
                reason,
                requested_by,
                no_restart,
                environment,
                hook,
                reply,
            } => {
                let cause = cause.map(|cause| *cause);
                let found = self.respondable(&container, cause.map(|(_, run)| run));
                let found = found.and_then(|found| Ok((found, self.hook_by_hand(hook)?)));
                match found {
                    Err(err) => {
                        let _ = reply.send(Err(err));
                    }
                    Ok(((container, incarnation), hook)) => {
                        let finding = cause.map(|(finding, _)| finding);
                        let evidence = (action == Action::Evidence)
                            .then(|| {
                                self.evidence(&container, incarnation, finding, environment, now)
                            })
                            .flatten();
                        let request = ResponseRequest {
                            ticket: self.ticket(),
                            container,
                            pod: None,
                            image: None,
                            incarnation,
                            process: process.map(|process| *process),
                            action,
                            reason,
                            requested_by,
                            requested_at: now,
                            finding,
                            no_restart,
                            evidence,
                            hook,
                        };
                        self.request_response(request, Some(reply), effects);
                    }
                }
            }
        }
    }

    /// The order to take evidence that a user asks for.
    fn evidence(
        &self,
        container: &ContainerId,
        run: Option<Incarnation>,
        finding: Option<FindingId>,
        environment: bool,
        now: Timestamp,
    ) -> Option<Box<Order>> {
        let entry = self.inventory.get(container)?;
        let known = finding.and_then(|finding| entry.findings.get(&finding));
        let process = known.and_then(|known| known.process.as_ref());
        let process = process.map(|process| process.identity);
        let wanted = Wanted {
            run,
            finding,
            kind: known.map(|known| known.kind),
            actor: Actor { process, ..Actor::default() },
            path: known.and_then(|known| known.file.as_ref()).map(|file| file.path.clone()),
            by_rule: false,
            environment,
        };
        wanted.order(entry, container, now).map(Box::new)
    }

    /// The hook that a user asks for.
    fn hook_by_hand(
        &self,
        hook: Option<Box<(String, Finding)>>,
    ) -> Result<Option<Box<HookCall>>, LookupError> {
        let Some((name, finding)) = hook.map(|hook| *hook) else { return Ok(None) };
        let settings = self.policy.hooks.get(&name).cloned();
        match settings {
            None => Err(LookupError::UnknownHook(printable(name.as_bytes()))),
            Some(_) => Ok(Some(Box::new(HookCall { name, settings, rule: None, finding }))),
        }
    }

    /// Lets the sensors compare a container. The reply is sent when they have ended.
    fn start_diff(
        &mut self,
        container: &str,
        reply: oneshot::Sender<Result<Diff, LookupError>>,
        effects: &mut Vec<Effect>,
    ) {
        let (container, stopped) = match self.diffable(container) {
            Ok(found) => found,
            Err(err) => {
                let _ = reply.send(Err(err));
                return;
            }
        };
        let ticket = self.ticket();
        self.diffs.retain(|_, pending| pending.is_wanted());
        self.diffs.insert(ticket, PendingDiff::new(container.clone(), reply));
        effects.push(Effect::Command(match stopped {
            Some(Stopped { rootfs, entry_point }) => {
                SensorCommand::Compare { container, ticket, rootfs, entry_point }
            }
            None => SensorCommand::Scan { container, ticket: Some(ticket) },
        }));
    }

    fn lookup(&self, text: &str) -> Result<ContainerId, LookupError> {
        let text_safe = || printable(text.as_bytes());
        match self.inventory.named(text)[..] {
            [] => {
                let mut alike = self.inventory.beginning_with(text).peekable();
                if alike.peek().is_none() {
                    return Err(LookupError::Unknown(text_safe()));
                }
                let alike: Vec<String> = alike.take(MAX_ALIKE).map(ToString::to_string).collect();
                Err(LookupError::NotWhole(text_safe(), alike.join(", ")))
            }
            [id] => Ok(id.clone()),
            ref several => Err(LookupError::Ambiguous(text_safe(), several.len())),
        }
    }

    /// The container to respond to, and its run: `meant`, if the client names one.
    fn respondable(
        &self,
        text: &str,
        meant: Option<Incarnation>,
    ) -> Result<(ContainerId, Option<Incarnation>), LookupError> {
        let id = self.lookup(text)?;
        let entry = self.inventory.get(&id).filter(|entry| !entry.removed);
        let Some(entry) = entry else { return Err(LookupError::Gone(id.to_string())) };
        let run = entry.incarnation();
        let is_meant = meant.is_none_or(|meant| run.is_some_and(|run| is_same_run(&run, &meant)));
        if is_meant { Ok((id, run)) } else { Err(LookupError::RunGone(id.to_string())) }
    }

    /// The container to compare, with its layers if it does not run.
    fn diffable(&self, text: &str) -> Result<(ContainerId, Option<Stopped>), LookupError> {
        let id = self.lookup(text)?;
        let entry = self.inventory.get(&id).ok_or(LookupError::Unknown(text.to_owned()))?;
        let refuse = |reason: String| Err(LookupError::NotWatched(id.to_string(), reason));
        match (&entry.watch.state, &entry.baseline.state) {
            (WatchState::No, _) if entry.removed => refuse("it was removed".into()),
            (WatchState::Refused(reason), _) => refuse(reason.clone()),
            (WatchState::Requested | WatchState::Attached { .. }, BaselineState::Ready(_)) => {
                Ok((id, None))
            }
            (WatchState::No, BaselineState::Ready(_)) => {
                let rootfs = entry.container.as_ref().and_then(|known| known.rootfs.clone());
                let Some(rootfs) = rootfs else {
                    return refuse("it does not run, and where its files are is not known".into());
                };
                let entry_point = entry.baseline.entry_point.clone();
                Ok((id, Some(Stopped { rootfs, entry_point })))
            }
            (_, baseline) => refuse(format!("its baseline is {}", baseline.describe())),
        }
    }
}
