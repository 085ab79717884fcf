//! The loop: its channels, its end, and a history that begins anew.

use super::*;
use crate::pipeline::run;

#[test]
fn h12_each_client_gets_its_own_reply_when_many_requests_are_refused_at_once() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start web\nstart db");
    let mut replies = [node.respond("web"), node.respond("db"), node.respond("web")];
    let mut refused = VecDeque::from(std::mem::take(&mut node.requests));
    let mut kept = Vec::new();
    let mut carry = |effect| match effect {
        Effect::Respond(request) => Carried::Back(Box::new(request)),
        Effect::Record(Record::Response(response)) => {
            kept.push(response.requested_at);
            Carried::Out
        }
        _ => Carried::Out,
    };
    // All of them in the effects of one input.
    let effects = refused.drain(..).map(Effect::Respond).collect();
    assert!(carry_out_all(&mut node.state, effects, &mut carry));
    assert_eq!(kept.len(), 3);
    for reply in &mut replies {
        let response = reply.try_recv().unwrap().unwrap();
        assert_eq!(response.outcome.message, TOO_MANY);
    }
    assert!(!node.state.has_pending_responses());
    assert_eq!(node.state.health.count(Failure::ResponseQueueFull), 3);
}

#[test]
fn h17_a_stop_records_requests_without_a_response() {
    let mut node = Node::running();
    let mut reply = node.respond("c1");
    let mut effects = Vec::new();
    node.state.give_up_responses(&mut effects);
    let [Effect::Record(Record::Response(kept))] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((kept.outcome.succeeded, &*kept.container.id), (false, "c1"));
    assert!(kept.outcome.message.contains("it may happen"), "{}", kept.outcome.message);
    assert!(reply.try_recv().is_err(), "the client learns that driftd is stopping");
}

struct NoBlobs;

impl crate::baseline::Blobs for NoBlobs {
    fn open(&self, _: &crate::model::Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
        Err("there are none".into())
    }
}

/// Everything that the loop needs. Nothing is stopped yet.
struct Loop {
    state: State,
    reader: Reader,
    inputs: Inputs,
    outputs: Outputs,
    runtime_events: Sender<RuntimeEvent>,
    sensor_events: Sender<Box<SensorEvent>>,
    responses: Sender<Response>,
    requests: Sender<ApiRequest>,
    stop: Sender<std::convert::Infallible>,
    response_requests: tokio::sync::mpsc::Receiver<ResponseRequest>,
    records: Receiver<Record>,
    /// These are not taken.
    _commands: Receiver<SensorCommand>,
    _directory: tempfile::TempDir,
}

fn a_loop(room_for_commands: usize) -> Loop {
    use crossbeam_channel::{bounded, unbounded};
    let directory = tempfile::tempdir().unwrap();
    let health = Arc::new(Health::default());
    let history = crate::history::History::open(directory.path()).unwrap();
    let store = Store::open(&directory.path().join("baselines"), health.clone()).unwrap();
    let (event_sender, baseline_events) = bounded(16);
    let settings = config::Baseline::default();
    let recorder =
        Recorder::start(Arc::new(store), &settings, Arc::new(NoBlobs), event_sender, health);
    let (runtime_sender, runtime_events) = unbounded();
    let (sensor_sender, sensor_events) = unbounded();
    let (request_sender, requests) = unbounded();
    let (response_sender, responses) = unbounded();
    let (stop_sender, stop) = bounded(0);
    let (commands, taken_commands) = bounded(room_for_commands);
    let (records, taken_records) = unbounded();
    let (response_requests, taken_requests) = tokio::sync::mpsc::channel(256);
    Loop {
        state: Node::running().state,
        reader: history.reader(),
        inputs: Inputs {
            questions: crossbeam_channel::never(),
            runtime_events,
            sensor_events,
            baseline_events,
            requests,
            responses,
            history_begun: crossbeam_channel::never(),
            stop,
        },
        outputs: Outputs { commands, recorder, records, response_requests, decisions: None },
        runtime_events: runtime_sender,
        sensor_events: sensor_sender,
        responses: response_sender,
        requests: request_sender,
        stop: stop_sender,
        response_requests: taken_requests,
        records: taken_records,
        _commands: taken_commands,
        _directory: directory,
    }
}

#[test]
fn h05_h06_what_is_queued_at_a_stop_is_taken_in_although_its_senders_have_gone() {
    const PROGRAMS: usize = 3000;
    let parts = a_loop(4);
    let script = Node::running();
    for number in 0..PROGRAMS {
        let line = format!("exec c1 /tmp/x{number} evil{number}");
        let Input::Sensor(event) = script.input(&line) else { panic!("no event") };
        parts.sensor_events.send(Box::new(event)).unwrap();
    }
    // Each causes a command that is not taken; the API and containerd have ended.
    let Loop { state, reader, inputs, outputs, records, stop, .. } = parts;
    drop((parts.runtime_events, parts.requests, parts.sensor_events, parts.responses, stop));
    run(state, &reader, &inputs, &outputs).unwrap();
    let reported = records.try_iter().filter(|record| matches!(record, Record::Finding(_))).count();
    assert_eq!(reported, PROGRAMS);
    outputs.recorder.stop();
}

#[test]
fn h05_a_loop_whose_clients_have_gone_goes_on_until_it_is_stopped() {
    let parts = a_loop(1024);
    let Loop { state, reader, inputs, outputs, records, stop, sensor_events, .. } = parts;
    drop((parts.runtime_events, parts.requests, parts.responses));
    let running = std::thread::spawn(move || {
        run(state, &reader, &inputs, &outputs).unwrap();
        outputs.recorder.stop();
    });
    let Input::Sensor(event) = Node::running().input("exec c1 /tmp/x evil") else { panic!() };
    sensor_events.send(Box::new(event)).unwrap();
    let record = records.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
    assert!(matches!(record, Record::Finding(_)), "{record:?}");
    drop(stop);
    running.join().unwrap();
}

#[test]
fn a_stop_waits_for_the_response_that_is_being_carried_out() {
    let parts = a_loop(1024);
    let Loop { mut state, reader, inputs, outputs, records, stop, sensor_events, .. } = parts;
    let mut requests = parts.response_requests;
    state.policy.rules = Policy::killing(&[Kind::ExecNew]).rules;
    let Input::Sensor(event) = Node::running().input("exec c1 /tmp/x evil") else { panic!() };
    sensor_events.send(Box::new(event)).unwrap();
    drop(stop);
    let responses = parts.responses;
    let responding = std::thread::spawn(move || {
        let request = requests.blocking_recv().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        responses.send(request.failed(TOO_MANY.to_owned())).unwrap();
    });
    run(state, &reader, &inputs, &outputs).unwrap();
    responding.join().unwrap();
    let messages = records.try_iter().filter_map(|record| match record {
        Record::Response(response) => Some(response.outcome.message),
        _ => None,
    });
    assert_eq!(messages.collect::<Vec<_>>(), [TOO_MANY]);
    outputs.recorder.stop();
}

#[test]
fn x18_a_history_that_begins_anew_is_given_everything_that_is_known() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nsession c1 100 pts/0 sh\nran c1 100 102 ls").wait(1);
    let (known, sessions) = (node.newest().len(), node.newest_sessions().len());
    assert_eq!((known, sessions), (2, 1));
    let findings: Vec<Finding> = node.newest().into_iter().cloned().collect();
    node.findings.clear();
    node.sessions.clear();
    node.give(Input::HistoryBegun);
    let mut again: Vec<Finding> = node.findings.clone();
    again.sort_by_key(|finding| findings.iter().position(|known| known.id == finding.id));
    assert_eq!(again, findings, "in the revisions that they have");
    assert_eq!(node.commands_of(100), ["ls: runs"]);
}
