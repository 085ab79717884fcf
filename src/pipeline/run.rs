//! The thread of the pipeline: receives inputs, lets the state react, and carries the effects
//! out. It decides nothing. It may wait for the history, and reads the history when a
//! container appears. At a stop it takes in what is queued.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvError, SendTimeoutError, Sender, TryRecvError};
use jiff::Timestamp;
use tokio::sync::mpsc::error::TrySendError;

use super::messages::{Effect, Input};
use super::requests::ApiRequest;
use super::state::State;
use crate::baseline::{BaselineEvent, Recorder, Store};
use crate::containerd::RuntimeEvent;
use crate::health::Failure;
use crate::history::{self, Reader, Record};
use crate::model::{FindingId, ImageReference, LayerId};
use crate::respond::{Response, ResponseRequest, TOO_MANY};
use crate::threads;
use crate::watch::{Decisions, Question, SensorCommand, SensorEvent};

/// The channels from which the loop receives.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// Executions that wait for a decision.
    pub questions: Receiver<Box<Question>>,
    pub runtime_events: Receiver<RuntimeEvent>,
    pub sensor_events: Receiver<Box<SensorEvent>>,
    pub baseline_events: Receiver<BaselineEvent>,
    pub requests: Receiver<ApiRequest>,
    pub responses: Receiver<Response>,
    /// Receives something when the history begins anew.
    pub history_begun: Receiver<()>,
    /// Closed when the daemon stops.
    pub stop: Receiver<Infallible>,
}

/// The channels into which the loop sends.
#[derive(Debug)]
pub struct Outputs {
    pub commands: Sender<SensorCommand>,
    pub recorder: Recorder,
    pub records: Sender<Record>,
    pub response_requests: tokio::sync::mpsc::Sender<ResponseRequest>,
    /// Where the decisions about executions go, if any wait.
    pub decisions: Option<Decisions>,
}

/// How many executions are decided about before anything else has its turn.
const QUESTIONS_IN_A_ROW: u32 = 32;

/// The loop sleeps no longer than this: after a clock was set back, the time until something
/// is due seems longer than it is.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// When the daemon stops, the time for queued inputs and for responses that are being
/// carried out.
pub const DRAIN_WITHIN: Duration = Duration::from_millis(3500);

/// Runs until it is stopped, or the history cannot be read. Before it stops, it takes in
/// everything that is queued.
pub fn run(
    mut state: State,
    history: &Reader,
    inputs: &Inputs,
    outputs: &Outputs,
) -> Result<(), history::Error> {
    let mut carrier = Carrier { outputs, stop: &inputs.stop, dropped: 0 };
    let ended = run_until_stopped(&mut state, history, inputs, &mut carrier);
    let drained = match ended {
        Ok(Ended::Stopped) => drain(&mut state, history, inputs, &mut carrier),
        Ok(Ended::WithoutHistory) => Ok(()),
        Err(err) => Err(err),
    };
    finish(&mut state, inputs, &mut carrier);
    drained
}

/// Why the loop has ended.
enum Ended {
    Stopped,
    /// The history takes no records any more.
    WithoutHistory,
}

fn run_until_stopped(
    state: &mut State,
    history: &Reader,
    inputs: &Inputs,
    carrier: &mut Carrier<'_>,
) -> Result<Ended, history::Error> {
    // A channel whose senders are gone is closed here. The loop goes on.
    let mut open = inputs.clone();
    let (mut first_questions, no_question) = (inputs.questions.clone(), crossbeam_channel::never());
    let mut in_a_row = 0;
    loop {
        let due = match state.next_due() {
            Some(due) => {
                let left = due.duration_since(Timestamp::now());
                let left = Duration::try_from(left).unwrap_or_default();
                crossbeam_channel::after(left.min(LONGEST_SLEEP))
            }
            None => crossbeam_channel::never(),
        };
        // Biased: processes wait for decisions, and a new container must be marked within
        // milliseconds, however many observations wait. Each process that waits asks once, and
        // few of one container wait; still they take turns with all others.
        let questions = if in_a_row < QUESTIONS_IN_A_ROW { &first_questions } else { &no_question };
        let mut is_closed = false;
        let input = threads::idle(|| {
            crossbeam_channel::select_biased! {
                recv(inputs.stop) -> _ => None,
                recv(questions) -> question => {
                    is_closed = question.is_err();
                    Some(question.ok().map(Input::Question))
                }
                recv(open.runtime_events) -> event => {
                    Some(received(event, &mut open.runtime_events).map(Input::Runtime))
                }
                recv(open.baseline_events) -> event => {
                    let event = received(event, &mut open.baseline_events);
                    Some(event.map(|event| baseline_input(event, &carrier.outputs.recorder)))
                }
                recv(open.responses) -> response => {
                    Some(received(response, &mut open.responses).map(Input::Response))
                }
                recv(open.history_begun) -> begun => {
                    Some(received(begun, &mut open.history_begun).map(|()| Input::HistoryBegun))
                }
                recv(open.requests) -> request => {
                    Some(received(request, &mut open.requests).map(Input::Request))
                }
                recv(due) -> _ => Some(Some(Input::Due)),
                recv(open.sensor_events) -> event => {
                    let event = received(event, &mut open.sensor_events);
                    event.iter().for_each(|_| threads::took());
                    Some(event.map(|event| Input::Sensor(*event)))
                }
                recv(open.questions) -> question => {
                    in_a_row = 0;
                    Some(received(question, &mut open.questions).map(Input::Question))
                }
            }
        });
        let Some(input) = input else { return Ok(Ended::Stopped) };
        if is_closed {
            first_questions = crossbeam_channel::never();
        }
        in_a_row = if let Some(Input::Question(_)) = input { in_a_row + 1 } else { 0 };
        if let Some(input) = input
            && !carrier.react(state, history, input)?
        {
            return Ok(Ended::WithoutHistory);
        }
    }
}

/// What was received. If the senders are gone, the channel is replaced by one that is never
/// ready.
fn received<T>(received: Result<T, RecvError>, from: &mut Receiver<T>) -> Option<T> {
    if received.is_err() {
        *from = crossbeam_channel::never();
    }
    received.ok()
}

fn baseline_input(event: BaselineEvent, recorder: &Recorder) -> Input {
    let image = match &event {
        BaselineEvent::Tampered { layer, .. } => image_of(recorder.store(), *layer),
        BaselineEvent::Ready { .. } | BaselineEvent::Failed { .. } => ImageReference::default(),
    };
    Input::Baseline(event, image)
}

/// An image that contains a layer, preferably one with a name.
fn image_of(store: &Store, layer: LayerId) -> ImageReference {
    let images = store.images();
    let mut of_layer = images.iter().filter(|image| image.layers.contains(&layer));
    let Some(first) = of_layer.clone().find(|image| !image.names.is_empty()).or(of_layer.next())
    else {
        return ImageReference::default();
    };
    ImageReference {
        name: first.names.first().map(|name| name.name.clone()),
        manifest_digest: first.manifest_digest,
        chain_id: Some(first.chain_id),
    }
}

/// Takes in what is queued, and waits for the responses that are being carried out.
fn drain(
    state: &mut State,
    history: &Reader,
    inputs: &Inputs,
    carrier: &mut Carrier<'_>,
) -> Result<(), history::Error> {
    let deadline = Instant::now() + DRAIN_WITHIN;
    while Instant::now() < deadline {
        let input = match queued(inputs, &carrier.outputs.recorder) {
            Some(input) => input,
            None if !state.has_pending_responses() => break,
            None => {
                let wait = || inputs.responses.recv_deadline(deadline);
                match threads::blocked(wait) {
                    Ok(response) => Input::Response(response),
                    Err(_) => break,
                }
            }
        };
        if !carrier.react(state, history, input)? {
            break;
        }
    }
    Ok(())
}

/// The next input that is queued, if there is one.
fn queued(inputs: &Inputs, recorder: &Recorder) -> Option<Input> {
    let Inputs {
        runtime_events,
        sensor_events,
        baseline_events,
        requests,
        responses,
        history_begun,
        // The gate is closed by now: no execution waits any more.
        questions: _,
        stop: _,
    } = inputs;
    let baseline = || Some(baseline_input(baseline_events.try_recv().ok()?, recorder));
    let sensor = || {
        let event = sensor_events.try_recv().ok()?;
        threads::took();
        Some(Input::Sensor(*event))
    };
    let runtime = runtime_events.try_recv().ok().map(Input::Runtime);
    runtime
        .or_else(baseline)
        .or_else(|| responses.try_recv().ok().map(Input::Response))
        .or_else(sensor)
        .or_else(|| history_begun.try_recv().ok().map(|()| Input::HistoryBegun))
        .or_else(|| requests.try_recv().ok().map(Input::Request))
}

/// Publishes what was judged, and records the responses whose outcome is not known. Counts
/// the inputs for which there was no more time.
fn finish(state: &mut State, inputs: &Inputs, carrier: &mut Carrier<'_>) {
    let mut effects = Vec::new();
    state.publish_aggregates(&mut effects);
    state.publish_sessions(Timestamp::now(), &mut effects);
    let without_response = state.give_up_responses(&mut effects);
    effects.drain(..).for_each(|effect| drop(carrier.carry_out(effect)));
    let left = [
        ("sensor events", inputs.sensor_events.len()),
        ("runtime events", inputs.runtime_events.len()),
        ("baseline events", inputs.baseline_events.len()),
        ("requests", inputs.requests.len()),
        ("responses", without_response),
        ("records", carrier.dropped),
    ];
    let left: Vec<String> = left
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(what, count)| format!("{count} {what}"))
        .collect();
    if !left.is_empty() {
        tracing::warn!(left = left.join(", "), "a stop leaves what the pipeline had no time for");
    }
}

/// Carries out everything, also what follows from response requests that have no room. False
/// if the history takes no records any more.
pub(super) fn carry_out_all(
    state: &mut State,
    effects: Vec<Effect>,
    carry_out: &mut dyn FnMut(Effect) -> Carried,
) -> bool {
    let mut effects = VecDeque::from(effects);
    let mut more = Vec::new();
    while let Some(effect) = effects.pop_front() {
        match carry_out(effect) {
            Carried::Out => (),
            Carried::Back(request) => {
                let failure = Failure::ResponseQueueFull;
                let _ = state.health.record(failure);
                state.health.begin(failure, "responses are refused: too many wait");
                let refused = Input::Response(request.failed(TOO_MANY.to_owned()));
                state.handle(refused, Timestamp::now(), &mut more);
                effects.extend(more.drain(..));
            }
            Carried::Nowhere => return false,
        }
    }
    true
}

/// Reads the history of a container that appears, if it may have run before driftd was
/// started. The history of all containers that ever ran may be too large for the memory.
fn recall(state: &mut State, history: &Reader, event: &RuntimeEvent) -> Result<(), history::Error> {
    let container = match event {
        RuntimeEvent::TaskCreated { container, .. } => container,
        RuntimeEvent::Container(container) => &container.id,
        _ => return Ok(()),
    };
    if !state.inventory.may_remember(container) {
        return Ok(());
    }
    let findings = history.findings_of_container(Some(container))?;
    let aggregated: Vec<FindingId> =
        findings.iter().filter(|finding| finding.files.is_some()).map(|one| one.id).collect();
    state.remember(findings);
    for finding in aggregated {
        history.each_member(finding, |member| state.remember_member(finding, &member))?;
    }
    if let Some(last) = history.last_kill(container)? {
        state.remember_kill(&last);
    }
    Ok(())
}

/// What became of an effect.
pub(super) enum Carried {
    Out,
    /// Too many response requests wait already.
    Back(Box<ResponseRequest>),
    /// The history takes no records any more.
    Nowhere,
}

/// Carries effects out.
struct Carrier<'a> {
    outputs: &'a Outputs,
    stop: &'a Receiver<Infallible>,
    /// Records that the history did not take.
    dropped: usize,
}

impl Carrier<'_> {
    /// Lets the state react to an input. False if there is no history any more.
    fn react(
        &mut self,
        state: &mut State,
        history: &Reader,
        input: Input,
    ) -> Result<bool, history::Error> {
        if let Input::Runtime(event) = &input {
            recall(state, history, event)?;
        }
        let mut effects = Vec::new();
        state.handle(input, Timestamp::now(), &mut effects);
        let is_kept = carry_out_all(state, effects, &mut |effect| self.carry_out(effect));
        if !state.has_pending_responses() {
            state.health.end(Failure::ResponseQueueFull);
        }
        Ok(is_kept)
    }

    fn is_stopping(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    fn carry_out(&mut self, effect: Effect) -> Carried {
        let outputs = self.outputs;
        match effect {
            Effect::Command(command) => self.command(command),
            Effect::RecordBaseline(job) => outputs.recorder.submit(job),
            Effect::CollectBaselines(in_use) => outputs.recorder.collect(in_use),
            // Waits for the history: see the header of the module `pipeline`.
            Effect::Record(record) => {
                if threads::blocked(|| outputs.records.send(record)).is_err() {
                    self.dropped += 1;
                    return Carried::Nowhere;
                }
            }
            Effect::Decide { number, decision } => {
                outputs.decisions.iter().for_each(|to| to.decide(number, decision));
            }
            Effect::Respond(request) => match outputs.response_requests.try_send(request) {
                // If `respond` has ended, the request is given up at the end.
                Ok(()) | Err(TrySendError::Closed(_)) => (),
                Err(TrySendError::Full(request)) => return Carried::Back(Box::new(request)),
            },
        }
        Carried::Out
    }

    /// Sends a command to the sensors. When the daemon stops they take none any more, and
    /// the loop does not wait for them.
    fn command(&self, mut command: SensorCommand) {
        const STEP: Duration = Duration::from_millis(100);
        loop {
            if self.is_stopping() {
                return;
            }
            match threads::blocked(|| self.outputs.commands.send_timeout(command, STEP)) {
                Ok(()) | Err(SendTimeoutError::Disconnected(_)) => return,
                Err(SendTimeoutError::Timeout(back)) => command = back,
            }
        }
    }
}
