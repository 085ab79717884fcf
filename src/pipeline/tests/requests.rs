//! Requests for diffs.

use super::*;

#[test]
fn a_diff_names_every_difference_and_which_are_findings() {
    let mut node = Node::running();
    let (reply, mut replied) = oneshot::channel();
    node.give(Input::Request(ApiRequest::Diff { container: "c1".into(), reply }));
    let Some(SensorCommand::Scan { ticket, .. }) = node.commands.pop() else { panic!("no scan") };
    let observations = [("/usr/bin/curl", "evil"), ("/bin/ls", "ls"), ("/bin/.ls", "ls")]
        .map(|(path, content)| Observation {
            container: id("c1"),
            init: init(7),
            at: Timestamp::UNIX_EPOCH,
            source: Source::Scan,
            session: None,
            file_of: None,
            reached_as: None,
            fact: present(RootfsPath::new(path).unwrap(), content),
        })
        .into();
    node.give(Input::Sensor(SensorEvent::ScanBatch { container: id("c1"), ticket, observations }));
    node.give(Input::Sensor(SensorEvent::Scanned {
        container: id("c1"),
        ticket,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    let diff = replied.try_recv().unwrap().unwrap();
    let lines: Vec<String> = diff
        .differences
        .iter()
        .map(|difference| {
            let kind = difference.finding.map_or("-", |(kind, _)| kind.name());
            format!("{:?} {} {kind}", difference.change, difference.path)
        })
        .collect();
    assert_eq!(
        lines,
        [
            "Relocated /bin/.ls file.relocated",
            "Metadata /bin/ls -",
            "Modified /usr/bin/curl file.modified",
        ]
    );
    assert!(!diff.incomplete);
}

#[test]
fn u06_a_stopped_container_is_compared_where_its_layer_lies_and_nothing_is_judged() {
    let mut node = Node::running();
    node.play("stop c1");
    let (reply, mut replied) = oneshot::channel();
    node.give(Input::Request(ApiRequest::Diff { container: "c1".into(), reply }));
    let Some(SensorCommand::Compare { container, ticket, rootfs, .. }) = node.commands.pop() else {
        panic!("no comparison: {:?}", replied.try_recv())
    };
    let dirs = OverlayDirs { upperdir: "/upper".into(), lowerdirs: vec!["/lower".into()] };
    assert_eq!((container, rootfs), (id("c1"), dirs));
    let observation = Observation {
        container: id("c1"),
        init: init(0),
        at: Timestamp::UNIX_EPOCH,
        source: Source::Scan,
        session: None,
        file_of: None,
        reached_as: None,
        fact: present(RootfsPath::new("/tmp/x").unwrap(), "evil"),
    };
    let compared =
        |observations, end| Input::Sensor(SensorEvent::Compared { ticket, observations, end });
    node.give(compared(vec![observation], None));
    assert!(replied.try_recv().is_err(), "it is not over");
    node.give(compared(Vec::new(), Some(true)));
    let diff = replied.try_recv().unwrap().unwrap();
    let paths: Vec<_> = diff.differences.iter().map(|one| one.path.to_string()).collect();
    assert_eq!((paths, diff.incomplete), (vec!["/tmp/x".to_owned()], false));
    assert!(node.findings.is_empty(), "a request for a diff changes nothing");
}

#[test]
fn a_container_that_cannot_be_compared_has_no_diff_but_a_reason() {
    let mut node = Node::running();
    node.play("start c2\nstop c1\nremove c2");
    let nowhere = Container { rootfs: None, ..container("c1", None) };
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(nowhere))));
    for (name, expected) in [
        ("c1", "container default/c1 is not watched: it does not run, and where its files are"),
        ("c2", "container default/c2 is not watched: it was removed"),
        ("zz", "no container"),
    ] {
        let (reply, mut replied) = oneshot::channel();
        node.give(Input::Request(ApiRequest::Diff { container: name.into(), reply }));
        let err = replied.try_recv().unwrap().unwrap_err().to_string();
        assert!(err.starts_with(expected), "{err}");
    }
}

#[test]
fn the_findings_of_a_container_are_counted_by_severity() {
    let mut node = Node::running();
    let counted = |node: &mut Node| {
        let (reply, mut replied) = oneshot::channel();
        node.give(Input::Request(ApiRequest::Containers(reply)));
        let views = replied.try_recv().unwrap();
        views.into_iter().map(|view| (view.findings, view.findings_by_severity)).collect::<Vec<_>>()
    };
    assert_eq!(counted(&mut node), [(0, BTreeMap::new())]);
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/y other");
    let both = BTreeMap::from([(Severity::Critical, 2)]);
    assert_eq!(counted(&mut node), [(2, both)]);
}
