//! Losses, the gaps that they leave, and the status.

use super::*;

fn lost(failure: Failure, name: &str, second: i64) -> Input {
    Input::Sensor(SensorEvent::Lost {
        failure,
        container: Some(id(name)),
        detail: "something".into(),
        at: Timestamp::from_second(second).unwrap(),
    })
}

#[test]
fn h02_a_degraded_view_is_incomplete_until_its_cause_is_over_or_the_container_ends() {
    let mut node = Node::running();
    for failure in [Failure::MountsFull, Failure::NamesFull, Failure::MarkRefused] {
        node.gaps.clear();
        node.give(lost(failure, "c1", 10));
        let problems = node.state.status().problems;
        assert!(problems.concat().contains(failure.name()), "{problems:?}");
        // A scan does not help.
        node.give(scanned("c1", 20));
        assert_eq!(node.state.status().problems.len(), 1);
        node.give(Input::Sensor(SensorEvent::Over { failure, container: Some(id("c1")) }));
        assert_eq!(node.state.status().problems, [""; 0]);
        assert_eq!(node.gaps, [failure.name(); 2], "its beginning and its end");
    }
    node.give(lost(Failure::MountsFull, "c1", 10));
    node.play("stop c1");
    assert_eq!(node.state.status().problems, [""; 0]);
}

#[test]
fn h02_an_incomplete_scan_lasts_until_a_complete_one() {
    let mut node = Node::running();
    node.give(lost(Failure::ScanIncomplete, "c1", 10));
    assert_eq!(node.state.status().problems.len(), 1);
    node.give(scanned("c1", 5));
    assert_eq!(node.state.status().problems.len(), 1, "it began before");
    node.give(scanned("c1", 11));
    assert_eq!(node.state.status().problems, [""; 0]);
}

#[test]
fn h07_a_flood_of_one_container_hides_no_gap_of_another() {
    let mut node = Node::running();
    node.play("start c2\nattached c2");
    for second in 0..100 {
        node.give(lost(Failure::PipelineFull, "c1", second));
    }
    node.give(lost(Failure::PipelineFull, "c2", 100));
    assert_eq!(node.gaps, ["pipeline_full"; 2], "each container's is kept once");
    let containers: Vec<_> =
        node.state.status().gaps.into_iter().filter_map(|gap| gap.container).collect();
    assert_eq!(containers, [id("c1"), id("c2")]);
}

#[test]
fn u03_a_time_without_driftd_is_a_gap_and_what_the_first_scan_finds_may_have_run() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let second = |second| Timestamp::from_second(second).unwrap();
    let gap = node.state.was_not_running(second(-30), second(0));
    let Record::Gap { name, container: None, at, until, .. } = gap else { panic!("{gap:?}") };
    assert_eq!((&*name, at, until), ("not_running", second(-30), Some(second(0))));
    let problems = |node: &Node| node.state.status().problems;
    assert!(problems(&node).concat().contains("not_running"), "{:?}", problems(&node));
    let attached = SensorEvent::Attached { container: id("c1"), pid: 7, before_start: false };
    node.play("connected\nstart c1\nbaseline");
    node.give(Input::Sensor(attached));
    node.play("list c1");
    assert_eq!(problems(&node).len(), 1, "c1 was not scanned yet");
    node.play("scan c1 /tmp/x new");
    let detail = node.findings.last().unwrap().detail.clone().unwrap_or_default();
    assert!(detail.contains("may have run"), "{detail:?}");
    node.give(scanned("c1", 1));
    assert_eq!(problems(&node), [""; 0]);
    assert_eq!(node.gaps, ["not_running"], "its end is recorded");
    let gaps = node.state.status().gaps;
    assert_eq!((gaps[0].since, gaps[0].until), (second(-30), Some(second(0))));
    // A later file was observed when it came.
    node.play("scan c1 /tmp/y newer");
    assert_eq!(node.findings.last().unwrap().detail, None);
}

#[test]
fn r36_a_container_that_ran_before_its_marks_is_a_gap_and_what_is_found_may_have_run() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline");
    let at = |millisecond| Timestamp::from_millisecond(millisecond).unwrap();
    let (began, marked) = (at(1000), at(1250));
    node.give(Input::Sensor(SensorEvent::Unarmed { container: id("c1"), pid: 7, began, marked }));
    let attached = SensorEvent::Attached { container: id("c1"), pid: 7, before_start: false };
    node.give(Input::Sensor(attached));
    let problems = node.state.status().problems;
    assert!(problems.concat().contains("armed_late") && problems.concat().contains("250 ms"));
    let gap = node.state.status().gaps.remove(0);
    assert_eq!((gap.container, gap.since, gap.until), (Some(id("c1")), began, Some(marked)));
    node.play("scan c1 /tmp/x new");
    let detail = node.findings.last().unwrap().detail.clone().unwrap_or_default();
    assert!(detail.contains("may have run"), "{detail:?}");
    // No scan finds what has gone, and a report about an earlier run changes nothing.
    node.give(scanned("c1", 5));
    let (container, reason) = (id("c1"), "its init is gone".to_owned());
    node.give(Input::Sensor(SensorEvent::NotAttached { container, pid: 3, reason }));
    assert_eq!(node.state.status().problems.len(), 1);
    node.clock = 100;
    node.give(Input::Due);
    assert_eq!(node.state.status().problems, [""; 0]);
    assert_eq!(node.gaps, ["armed_late"; 2], "its beginning and its end");
}
