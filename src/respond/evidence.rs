//! Evidence as a response: what a request for it says, and how it is asked for.
//!
//! The room `evidence` takes it (the trait `Collector`). Here it has its turn among the other
//! responses to its container: an answer that comes after it waits for it, up to a deadline, and
//! no longer. If the settings say so, the container is frozen meanwhile.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::{
    Action, Collector, Frozen, KeptCase, Notes, Order, Patience, Response, ResponseRequest,
    Runtime, Taken, Task, Until, send,
};
use crate::containerd::Error;
use crate::model::ContainerId;

/// How long evidence may take that a user asks for, as long as nothing waits for it.
const BY_HAND: Duration = Duration::from_secs(600);
/// How long the container runtime may take to return a specification.
const SPECIFICATION: Duration = Duration::from_millis(500);
/// How often a deadline that may have changed is looked at.
const STEP: Duration = Duration::from_millis(50);
/// How often a container that was left frozen is tried to be thawed, and how long.
const THAW_STEP: Duration = Duration::from_secs(3);
const THAW_TIMES: u32 = 100;
const THAW: Duration = Duration::from_secs(10);
/// How long a note may take to reach the disk.
const DISK: Duration = Duration::from_secs(2);

/// Takes evidence in its turn.
pub(super) async fn take(
    runtime: &impl Runtime,
    collector: &impl Collector,
    request: ResponseRequest,
    responses: &Sender<Response>,
) -> Response {
    let Some(order) = request.order() else {
        return request
            .failed("not carried out: containerd has not described the container yet".to_owned());
    };
    let Patience { deadline, pause } = collector.patience();
    let within = if order.by_rule { deadline } else { BY_HAND };
    order.until.shorten(Instant::now() + within);
    let specification = specification(runtime, &request.container).await;
    let frozen = if pause { freeze(runtime, collector, &request, &order).await } else { None };
    let is_frozen = frozen.is_some();
    let until = order.until.clone();
    let task = Task { request: request.clone(), order, specification, is_frozen };
    let mut receiver = collector.take(task);
    let taken = wait(&mut receiver, &until).await;
    if let Some(frozen) = frozen {
        thaw(runtime, collector, &frozen, &until).await;
    }
    if let Some(taken) = taken {
        return response_to(&request, taken);
    }
    collector.is_late();
    let late = request.failed(
        "it was not complete at its deadline (evidence.deadline), and nothing waits for it any \
         longer; what was taken is kept (driftd evidence ls)"
            .to_owned(),
    );
    // The history needs the digest of what was kept all the same.
    tokio::spawn(record_late(request, receiver, responses.clone()));
    late
}

fn response_to(request: &ResponseRequest, taken: Result<Taken, String>) -> Response {
    match taken {
        Ok(Taken { case, digest, message }) => {
            let mut response = request.ended(true, false, message);
            response.changed = false;
            response.case = Some(KeptCase { id: case, digest });
            response
        }
        Err(message) => request.failed(message),
    }
}

/// Records what comes of evidence after its deadline.
async fn record_late(
    request: ResponseRequest,
    receiver: oneshot::Receiver<Result<Taken, String>>,
    responses: Sender<Response>,
) {
    let Ok(taken) = receiver.await else { return };
    let mut response = response_to(&request, taken);
    response.ticket = 0;
    response.outcome.message += " (after its deadline)";
    send(&responses, response).await;
}

/// Waits for a result until the deadline, which may come earlier meanwhile.
async fn wait(
    receiver: &mut oneshot::Receiver<Result<Taken, String>>,
    until: &Until,
) -> Option<Result<Taken, String>> {
    loop {
        let left =
            until.get().map_or(STEP, |until| until.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return receiver.try_recv().ok();
        }
        match tokio::time::timeout(left.min(STEP), &mut *receiver).await {
            Ok(Ok(result)) => return Some(result),
            Ok(Err(_)) => return Some(Err("driftd failed while it was taken".to_owned())),
            Err(_) => (),
        }
    }
}

/// Lets a collector use its disk, on a thread that may wait. `None` if that takes too long.
async fn on_disk<T: Send + 'static>(
    collector: &impl Collector,
    work: impl FnOnce(&dyn Notes) -> T + Send + 'static,
) -> Option<T> {
    let collector = collector.clone();
    let done = tokio::task::spawn_blocking(move || work(&collector));
    tokio::time::timeout(DISK, done).await.ok()?.ok()
}

async fn specification(runtime: &impl Runtime, container: &ContainerId) -> Result<Vec<u8>, String> {
    let answer = tokio::time::timeout(SPECIFICATION, runtime.specification(container)).await;
    match answer {
        Ok(Ok(text)) => Ok(text),
        Ok(Err(err)) => Err(err.to_string()),
        Err(_) => Err(format!("no answer within {} ms", SPECIFICATION.as_millis())),
    }
}

/// Freezes the run, if it was not frozen before.
async fn freeze(
    runtime: &impl Runtime,
    collector: &impl Collector,
    request: &ResponseRequest,
    order: &Order,
) -> Option<Frozen> {
    let frozen = Frozen { container: request.container.clone(), run: request.incarnation? };
    let noted = frozen.clone();
    let noted = on_disk(collector, move |notes| notes.freezes(&noted)).await;
    if !matches!(noted, Some(Ok(()))) {
        // Without that, a frozen container could stay frozen for good.
        tracing::warn!(container = %frozen.container, "not frozen for its evidence: {noted:?}");
        return None;
    }
    // A part of the time is left for the evidence itself.
    let left = order.until.get().map(|until| until.saturating_duration_since(Instant::now()) / 2);
    let pause = runtime.pause(&frozen.container, Some(frozen.run));
    match tokio::time::timeout(left.unwrap_or(STEP), pause).await {
        Ok(Ok(paused)) if paused.changed => Some(frozen),
        // It may have been frozen all the same, later than that.
        Err(_) => Some(frozen),
        Ok(was) => {
            if let Err(err) = was {
                tracing::warn!(container = %frozen.container, "not frozen for its evidence: {err}");
            }
            has_thawed(collector, &frozen).await;
            None
        }
    }
}

async fn has_thawed(collector: &impl Collector, frozen: &Frozen) {
    let frozen = frozen.clone();
    let _ = on_disk(collector, move |notes| notes.has_thawed(&frozen)).await;
}

/// Thaws a run, unless a kill or a pause waits for its turn.
async fn thaw(runtime: &impl Runtime, collector: &impl Collector, frozen: &Frozen, until: &Until) {
    if until.0.is_followed_by_stronger.load(Ordering::Acquire) {
        has_thawed(collector, frozen).await;
        return;
    }
    match resume(runtime, frozen).await {
        Ok(_) => has_thawed(collector, frozen).await,
        Err(err) => tracing::error!(
            container = %frozen.container,
            "it was frozen for its evidence and could not be thawed: {err} (try: driftd respond resume)"
        ),
    }
}

/// What happened, as a text. A run that has ended needs nothing.
async fn resume(runtime: &impl Runtime, frozen: &Frozen) -> Result<String, String> {
    let resume = runtime.resume(&frozen.container, Some(frozen.run));
    match tokio::time::timeout(THAW, resume).await {
        Ok(Ok(message)) => Ok(message),
        Ok(Err(err @ Error::Gone(_))) => Ok(err.to_string()),
        Ok(Err(err)) => Err(err.to_string()),
        Err(_) => Err("the runtime did not answer".to_owned()),
    }
}

/// Thaws the runs that were frozen for their evidence when driftd ended.
pub(super) async fn thaw_left(
    runtime: impl Runtime,
    collector: impl Collector,
    responses: Sender<Response>,
) {
    let mut left = on_disk(&collector, |notes| notes.left_frozen()).await.unwrap_or_default();
    for _ in 0..THAW_TIMES {
        let mut again = Vec::new();
        for frozen in left {
            // containerd may not be connected yet.
            match resume(&runtime, &frozen).await {
                Err(_) => again.push(frozen),
                Ok(message) => {
                    has_thawed(&collector, &frozen).await;
                    if !send(&responses, thawed(&frozen, message)).await {
                        return;
                    }
                }
            }
        }
        if again.is_empty() {
            return;
        }
        left = again;
        tokio::time::sleep(THAW_STEP).await;
    }
    for frozen in left {
        tracing::error!(
            container = %frozen.container,
            "it was frozen for its evidence when driftd ended, and could not be thawed (try: \
             driftd respond resume)"
        );
    }
}

fn thawed(frozen: &Frozen, message: String) -> Response {
    let request = ResponseRequest {
        ticket: 0,
        container: frozen.container.clone(),
        pod: None,
        image: None,
        incarnation: Some(frozen.run),
        process: None,
        action: Action::Resume,
        reason: "it was frozen for its evidence when driftd ended".to_owned(),
        requested_by: "driftd".to_owned(),
        requested_at: Timestamp::now(),
        finding: None,
        no_restart: false,
        hook: None,
        evidence: None,
    };
    request.ended(true, false, message)
}
