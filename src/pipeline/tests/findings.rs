//! Findings: what makes one, what raises its count, and what it contains.

use super::*;

#[test]
fn a01_written_and_run_at_once_is_one_finding() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nwrite c1 /tmp/x evil").expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a01_a_file_written_and_later_run_has_linked_findings() {
    let mut node = Node::running();
    node.play("write c1 /tmp/x evil\nexec c1 /tmp/x evil")
        .expect(&["file.added /tmp/x x1 r1", "exec.new /tmp/x x1 r1"]);
    assert_eq!(node.findings[1].story, Some(node.findings[0].id));
}

fn load(path: &str, content: &str, loads: Process, writer: Option<Process>) -> Input {
    let fact = Fact::File(FileFact::Loaded {
        path: RootfsPath::new(path).unwrap(),
        filesystem: Filesystem::Overlay,
        state: state_of(content),
        lower: None,
        process: Arc::new(loads),
        by_linker: false,
        is_shared: false,
        writer: writer.map(Arc::new),
        denied: false,
    });
    let at = Timestamp::from_second(1).unwrap();
    let container = id("c1");
    Input::Sensor(SensorEvent::Observed(Observation {
        container,
        init: init(7),
        at,
        source: Source::Trace,
        session: None,
        file_of: None,
        reached_as: None,
        fact,
    }))
}

#[test]
fn a17_a_loaded_library_is_one_finding_and_its_file_is_not_reported_again() {
    let mut node = Node::running();
    node.give(load("/tmp/evil.so", "evil", process(42), None));
    node.give(load("/tmp/evil.so", "evil", process(43), None));
    node.play("write c1 /tmp/evil.so evil").expect(&["library.loaded /tmp/evil.so x2 r2"]);
    assert_eq!(node.findings[0].severity, Severity::High);
}

#[test]
fn b25_a_library_that_a_program_of_the_image_has_unpacked_is_recorded_and_no_alarm() {
    let app = || Process { exe: Some("/usr/bin/curl".into()), ..process(42) };
    let mut node = Node::running();
    node.give(load("/tmp/lib.so", "jni", app(), Some(app())));
    node.expect(&["library.loaded /tmp/lib.so x1 r1"]);
    assert_eq!(node.findings[0].severity, Severity::Info);
    assert!(node.findings[0].detail.as_deref().unwrap().contains("has written it itself"));

    // Written long ago: the finding about the write names the writer.
    let mut node = Node::running();
    let fact = Fact::File(FileFact::Present {
        path: RootfsPath::new("/tmp/lib.so").unwrap(),
        state: state_of("jni"),
        lower: None,
        writer: Some(Arc::new(app())),
        changed: None,
    });
    let at = Timestamp::from_second(1).unwrap();
    let (container, source) = (id("c1"), Source::Change);
    node.give(Input::Sensor(SensorEvent::Observed(Observation {
        container,
        init: init(7),
        at,
        source,
        session: None,
        file_of: None,
        reached_as: None,
        fact,
    })));
    node.give(load("/tmp/lib.so", "jni", app(), None));
    assert_eq!(node.findings[1].severity, Severity::Info);
    assert_eq!(node.findings[1].story, Some(node.findings[0].id));

    // The program is drift itself, or the writer of the library is not known.
    let mut node = Node::running();
    node.play("exec c1 /usr/bin/curl evil");
    node.give(load("/tmp/lib.so", "jni", app(), Some(app())));
    assert_eq!(node.findings[1].severity, Severity::High);
    node.give(load("/tmp/other.so", "other", app(), None));
    assert_eq!(node.findings[2].severity, Severity::High);
}

#[test]
fn owners_are_reported_as_the_container_names_them() {
    let mut node = Node::running();
    let mut in_user_namespace = container("c1", Some(7));
    let range = |host| vec![IdRange { container: 0, host, count: 65_536 }];
    in_user_namespace.id_map = Some(IdMap { uids: range(100_000), gids: range(200_000) });
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(in_user_namespace))));
    let owned = |path: &str, uid, gid| {
        let mut fact = exec(RootfsPath::new(path).unwrap(), "evil");
        if let Fact::File(FileFact::Executed { state, .. }) = &mut fact {
            (state.uid, state.gid) = (uid, gid);
        }
        let at = Timestamp::from_second(9).unwrap();
        SensorEvent::Observed(Observation {
            container: id("c1"),
            init: init(7),
            at,
            source: Source::Gate,
            session: None,
            file_of: None,
            reached_as: None,
            fact,
        })
    };
    node.give(Input::Sensor(owned("/tmp/x", 100_000, 200_033)));
    node.give(Input::Sensor(owned("/tmp/y", 0, 100_000)));
    let owners: Vec<(u32, u32)> = node
        .findings
        .iter()
        .filter_map(|finding| finding.file.as_ref())
        .map(|file| (file.uid, file.gid))
        .collect();
    assert_eq!(owners, [(0, 33), (65_534, 65_534)], "root of the host is unknown in the container");
}

#[test]
fn other_content_at_the_same_path_is_another_finding() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x worse")
        .expect(&["exec.new /tmp/x x1 r1", "exec.new /tmp/x x1 r1"]);
}

#[test]
fn every_execution_counts() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil\nexec c1 /tmp/x evil")
        .expect(&["exec.new /tmp/x x3 r3"]);
    assert_eq!(node.findings[2].first_seen, node.findings[0].first_seen);
    assert!(node.findings[2].last_seen > node.findings[0].last_seen);
}

#[test]
fn a_scan_reports_what_is_new_and_nothing_twice() {
    let mut node = Node::running();
    node.play("scan c1 /tmp/x evil /bin/ls -\nscan c1 /tmp/x evil /bin/ls -\nexec c1 /tmp/y y")
        .play("scan c1 /tmp/y y")
        .expect(&[
            "file.added /tmp/x x1 r1",
            "file.removed /bin/ls (deleted) x1 r1",
            "exec.new /tmp/y x1 r1",
        ]);
}

#[test]
fn a46_after_a_restart_a_finding_is_the_same_finding() {
    let mut before = Node::running();
    before.play("exec c1 /tmp/x evil\nwrite c1 /tmp/z zed");
    let mut after = Node::new(Respond::default(), before.findings.clone());
    after
        .play("start c1\nbaseline\nattached c1\nscan c1 /tmp/x evil /tmp/z zed /tmp/new new")
        .expect(&["file.added /tmp/new x1 r1"])
        .play("exec c1 /tmp/x evil")
        .expect(&["file.added /tmp/new x1 r1", "exec.new /tmp/x x2 r2"]);
}

#[test]
fn a45_drift_in_one_container_never_marks_another() {
    let mut node = Node::running();
    node.play("start c2\nattached c2\nbaseline\nexec c1 /tmp/x evil");
    assert_eq!(node.findings[0].container_id(), Some(&id("c1")));
    assert!(node.state.inventory.get(&id("c2")).unwrap().findings.iter().next().is_none());
}

#[test]
fn facts_wait_for_the_baseline() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1\nexec c1 /tmp/x evil\nexec c1 /bin/ls ls").expect(&[]);
    assert_eq!(node.jobs, 1);
    node.play("baseline").expect(&["exec.new /tmp/x x1 r1"]);
}

#[test]
fn a14_a_removed_program_is_reported_as_deleted() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\ngone c1 /tmp/x")
        .expect(&["exec.new /tmp/x (deleted) x1 r2"])
        .play("gone c1 /tmp/x")
        .expect(&["exec.new /tmp/x (deleted) x1 r2"]);
}

#[test]
fn expected_has_a_sha256_only_when_the_lower_file_is_what_the_baseline_says() {
    let mut node = Node::running();
    let twin = |content| LowerTwin {
        blake3: crate::baseline::blake3_of(content),
        sha256: Some(Sha256Hash([9; 32])),
    };
    for (content, lower, expected) in [
        ("one", Some(twin("curl")), Some(Sha256Hash([9; 32]))),
        ("two", Some(twin("tampered")), None),
        ("three", None, None),
    ] {
        let mut fact = present(RootfsPath::new("/usr/bin/curl").unwrap(), content);
        if let Fact::File(FileFact::Present { lower: slot, .. }) = &mut fact {
            *slot = lower;
        }
        let at = Timestamp::UNIX_EPOCH;
        node.give(Input::Sensor(SensorEvent::Observed(Observation {
            container: id("c1"),
            init: init(7),
            at,
            source: Source::Change,
            session: None,
            file_of: None,
            reached_as: None,
            fact,
        })));
        let finding = node.findings.last().unwrap();
        assert_eq!(finding.kind, Kind::FileModified);
        assert_eq!(finding.expected.as_ref().unwrap().sha256, expected, "{content}");
    }
}

#[test]
fn b32_a_clock_that_is_set_back_turns_no_finding_around_and_hides_no_gap() {
    let mut node = Node::running();
    let lost = |second| {
        Input::Sensor(SensorEvent::Lost {
            failure: Failure::KernelQueueOverflow,
            container: None,
            detail: "events were dropped".into(),
            at: Timestamp::from_second(second).unwrap(),
        })
    };
    node.clock = 100_000;
    node.give(lost(100_000));
    node.play("exec c1 /tmp/x evil");
    node.clock = 1_000;
    node.give(lost(1_000));
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/y other");
    assert_eq!(node.gaps.len(), 2, "{:?}", node.gaps);
    node.expect(&["exec.new /tmp/x x2 r2", "exec.new /tmp/y x1 r1"]);
    for finding in &node.findings {
        assert!(finding.first_seen <= finding.last_seen, "{finding:#?}");
    }
}
