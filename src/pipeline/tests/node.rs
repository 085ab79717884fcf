//! Events of the runtime.

use super::*;

#[test]
fn h16_news_of_a_forgotten_container_is_published_and_nothing_is_left() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 101 id\nremove c1");
    node.give(Input::Sensor(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert_eq!(node.commands_of(100), ["id: ended"]);
    assert_eq!(node.state.sessions.due(), None);
}

#[test]
fn after_containerd_was_lost_everything_is_scanned_again() {
    let mut node = Node::running();
    node.play("list c1");
    node.commands.clear();
    node.play("connected\ndisconnected\nconnected\nstart c1\nlist c1");
    assert_eq!(node.gaps, ["containerd_lost"; 2], "its beginning and its end");
    assert_eq!(node.commands, [SensorCommand::Scan { container: id("c1"), ticket: None }]);
    node.play("list c1\nlist c1");
    assert_eq!(node.commands.len(), 1, "a list without a loss asks for no scan");
}

#[test]
fn what_a_listing_does_not_name_is_gone() {
    let mut node = Node::running();
    node.commands.clear();
    node.play("list");
    let pid = Some(7);
    assert_eq!(node.commands, [SensorCommand::Detach { container: id("c1"), pid }]);
    // The last scan is still judged, then the container is forgotten.
    node.play("scan c1 /tmp/x evil").expect(&["file.added /tmp/x x1 r1"]);
    node.give(Input::Sensor(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert!(node.state.inventory.get(&id("c1")).is_none());
}

#[test]
fn a_task_is_marked_before_its_record_is_known() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.give(Input::Runtime(RuntimeEvent::TaskCreated {
        container: id("c1"),
        pid: 7,
        rootfs: None,
    }));
    assert_eq!(
        node.commands,
        [SensorCommand::Attach { container: id("c1"), pid: 7, rootfs: None }]
    );
    node.play("attached c1\nexec c1 /tmp/x evil\nstart c1\nbaseline")
        .expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a_report_about_an_earlier_run_does_not_change_the_newest() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nbaseline\nstop c1");
    node.give(Input::Runtime(RuntimeEvent::TaskCreated {
        container: id("c1"),
        pid: 8,
        rootfs: None,
    }));
    let view = |node: &mut Node| {
        let (reply, mut replied) = oneshot::channel();
        node.give(Input::Request(ApiRequest::Containers(reply)));
        let [view] = &replied.try_recv().unwrap()[..] else { panic!("one container") };
        (view.watched, view.armed_before_start, view.problem.clone())
    };
    // The first run was armed before its start; the second one was over too soon.
    node.play("attached c1");
    assert_eq!(view(&mut node), (false, false, None));
    let reason = "its init process 8 is gone";
    node.give(Input::Sensor(SensorEvent::NotAttached {
        container: id("c1"),
        pid: 8,
        reason: reason.into(),
    }));
    assert_eq!(view(&mut node), (false, false, Some(reason.to_owned())));
    node.play("attached c1");
    assert_eq!(view(&mut node), (false, false, Some(reason.to_owned())));
}
