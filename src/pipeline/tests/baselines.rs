//! Baselines, how far layers are trusted, and containers without a baseline.

use super::*;

#[test]
fn a_baseline_that_failed_is_requested_again() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nexec c1 /tmp/x evil");
    node.play("failed full-disk");
    assert_eq!(node.state.status().problems.len(), 1);
    node.play("list c1");
    assert_eq!(node.jobs, 2);
    node.play("baseline").expect(&["exec.new /tmp/x x1 r1"]);
}

/// The trust that was sent to the sensors, in order.
fn trusts(node: &mut Node) -> Vec<Trust> {
    std::mem::take(&mut node.commands)
        .into_iter()
        .filter_map(|command| match command {
            SensorCommand::Trust { container, trust } => {
                assert_eq!(container, id("c1"));
                Some(trust)
            }
            _ => None,
        })
        .collect()
}

#[test]
fn the_sensors_get_to_know_how_far_to_trust_the_layers() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nbaseline");
    assert_eq!(trusts(&mut node), [Trust::Unknown], "no comparison yet");
    node.play("trusted 100\ntrusted 200");
    assert_eq!(trusts(&mut node), [Trust::UpTo(up_to(100)), Trust::UpTo(up_to(200))]);
    // The same container runs again.
    node.play("stop c1\nstart c1\nattached c1");
    let [
        SensorCommand::Detach { .. },
        SensorCommand::Attach { .. },
        SensorCommand::Trust { trust, .. },
    ] = &node.commands[..]
    else {
        panic!("{:?}", node.commands)
    };
    assert_eq!(*trust, Trust::UpTo(up_to(200)));
}

#[test]
fn files_that_are_in_no_directory_are_not_trusted_for_what_was_seen_in_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut container = container("c1", Some(7));
    container.layers[0].directory = None;
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container))));
    node.play("attached c1\nbaseline\ntrusted 100");
    assert_eq!(trusts(&mut node), [Trust::Unknown, Trust::Unknown]);
}

#[test]
fn without_a_baseline_no_file_of_a_layer_is_examined_until_there_may_be_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed full-disk\nlist c1\ntrusted 100");
    assert_eq!(trusts(&mut node), [Trust::NoBaseline, Trust::Unknown, Trust::UpTo(up_to(100))]);
}

#[test]
fn the_end_of_another_containers_job_voids_no_judgement() {
    let mut node = Node::running();
    let BaselineEvent::Ready { baseline, chain_id, .. } = ready(None) else { unreachable!() };
    for _ in 0..2 {
        node.commands.clear();
        let unchanged_since = Some(up_to(7));
        let event = BaselineEvent::Ready { baseline: baseline.clone(), chain_id, unchanged_since };
        node.give(Input::Baseline(event, ImageReference::default()));
    }
    assert_eq!(node.commands, []);
}

#[test]
fn a_container_without_a_baseline_is_reported_once_for_each_reason() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed full-disk").wait(5).expect(&[]);
    assert!(node.state.next_due().is_some());
    node.wait(10).expect(&["baseline.unavailable (full-disk) x1 r1"]);
    assert_eq!(node.state.next_due(), None);
    let finding = &node.findings[0];
    assert_eq!(
        (finding.severity, &finding.attack, finding.source.as_str()),
        (Severity::Info, &None, "baseline")
    );
    // Tried again, it fails for the same reason, and then for another one.
    node.play("list c1\nfailed full-disk").wait(0);
    assert_eq!(node.findings.len(), 1);
    node.play("list c1\nfailed no-layers").wait(0).expect(&[
        "baseline.unavailable (full-disk) x1 r1",
        "baseline.unavailable (no-layers) x1 r1",
    ]);
    // The baseline comes after all: the findings stay as they are.
    node.play("list c1\nbaseline").wait(100);
    assert_eq!((node.findings.len(), node.state.next_due()), (2, None));
    let mut after = Node::new(Respond::default(), node.findings.clone());
    after.play("start c1\nattached c1\nfailed full-disk").wait(20).expect(&[]);
}

#[test]
fn a_baseline_that_is_only_late_is_no_finding() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed busy\nlist c1").wait(3);
    node.play("baseline").wait(60).expect(&[]);
    // While it is tried again, nothing is reported.
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nfailed busy\nlist c1").wait(60).expect(&[]);
    assert_eq!(node.state.next_due(), None);
    node.play("failed busy").wait(0).expect(&["baseline.unavailable (busy) x1 r1"]);
}

#[test]
fn a_container_that_cannot_have_a_baseline_shows_why() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let mut one = container("c1", Some(7));
    one.layers = Vec::new();
    one.no_baseline = Some("it runs in a sandbox of its own (gVisor)".into());
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(one.clone()))));
    assert_eq!(node.commands.len(), 2, "{:?}", node.commands);
    node.wait(20)
        .expect(&["baseline.unavailable (it runs in a sandbox of its own (gVisor)) x1 r1"]);
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(one))));
    node.wait(20);
    assert_eq!(node.findings.len(), 1);
}

#[test]
fn what_does_not_run_misses_no_baseline() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container("c1", None)))));
    node.play("failed full-disk").wait(60).expect(&[]);
    node.play("start c1").wait(0).expect(&[]);
    node.play("failed full-disk").wait(0).expect(&["baseline.unavailable (full-disk) x1 r1"]);
}

#[test]
fn a_rootfs_that_is_no_overlay_has_a_baseline_and_is_not_watched() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline");
    node.give(Input::Sensor(SensorEvent::NotAttached {
        container: id("c1"),
        pid: 7,
        reason: "it is not an overlay".into(),
    }));
    let (reply, mut replied) = oneshot::channel();
    node.give(Input::Request(ApiRequest::Containers(reply)));
    let [view] = &replied.try_recv().unwrap()[..] else { panic!("one container") };
    assert_eq!((view.baseline.as_str(), view.watched), ("ready", false));
    assert_eq!(view.problem.as_deref(), Some("it is not an overlay"));
    node.wait(60).expect(&[]);
}
