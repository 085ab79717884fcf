//! A hook as a response: what a request for it says, and what comes of it.

use super::{Action, Response, ResponseRequest};
use crate::hooks::{Queue, Request};
use crate::model::Outcome;

/// How the message about a hook begins, before its name.
pub(super) const BEGIN: &str = "hook ";

/// Waits until a runner has run the hook of a request.
pub(super) async fn run(hooks: &Queue, request: ResponseRequest) -> Response {
    let Some(call) = &request.hook else {
        return request.failed("not run: its finding is not kept any more".to_owned());
    };
    let ResponseRequest { container, reason, requested_by, requested_at, .. } = &request;
    let about = Request { container, reason, requested_by, requested_at: *requested_at };
    let (order, settings) = match (call.order(&about), &call.settings) {
        (Ok(order), Some(settings)) => (order, settings),
        (Err(why), _) => return request.failed(format!("not run: {why}")),
        (Ok(_), None) => return request.failed("not run".to_owned()),
    };
    let ended = hooks.run(container.clone(), order, settings.wait).await;
    let message = ended.message(settings.timeout);
    let mut response = request.ended(ended.is_done(), false, message);
    // Only the administrator knows whether it may do twice what it has perhaps done.
    response.changed = ended.is_done() || ended.is_unknown() && !settings.retry;
    response
}

/// The hook that an outcome is of.
pub fn hook_of(outcome: &Outcome) -> Option<&str> {
    let text = outcome.message.strip_prefix(BEGIN)?;
    let (name, _) = text.split_once(':')?;
    (outcome.action == Action::Hook.name()).then_some(name)
}
