//! Limits: a flood of findings or sessions hides no finding and prevents no response.

use super::*;

#[test]
fn a_flood_of_new_programs_fills_no_memory_and_hides_no_execution() {
    let mut node = Node::running();
    for number in 0..20_000 {
        node.play(&format!("write c1 /tmp/x{number} evil{number}"));
    }
    node.publish();
    assert_eq!(node.kinds(), [(Kind::FileAdded, 33, 20_000)]);
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.findings.last().unwrap().kind, Kind::ExecNew);
    let one_by_one = budget::FINDINGS.number / 2;
    for number in 0..20_000 {
        node.play(&format!("exec c1 /tmp/y{number} evil{number}"));
    }
    node.publish();
    let programs = u64::try_from(20_001).unwrap();
    assert_eq!(node.kinds()[0], (Kind::ExecNew, one_by_one + 1, programs), "none is uncounted");
    let rest = node.findings.iter().rev().find(|finding| finding.kind == Kind::ExecNew).unwrap();
    assert_eq!(rest.files, Some(programs - one_by_one as u64));
    let listed = node.members().into_keys().filter(|(finding, _)| *finding == rest.id);
    assert_eq!(listed.count() as u64, programs - one_by_one as u64, "and each can be listed");
    assert_eq!(node.gaps.first().map(String::as_str), Some("findings_full"));
    // The problem lasts as long as the container is there, and concerns no other container.
    assert_eq!(node.problems().len(), 1, "{:?}", node.problems());
    node.play("start c2\nbaseline\nattached c2\nexec c2 /tmp/x evil");
    assert_eq!(node.findings.last().unwrap().container_id(), Some(&id("c2")));
    node.play("remove c1\nlist c2\nlist c2");
    assert!(node.problems().is_empty(), "{:?}", node.problems());
}

/// A node that kills on findings of this kind. Its container has caused the flood already.
fn flooded(kind: Kind, number: usize, flood: impl Fn(usize) -> Fact) -> Node {
    let mut node = Node::new(Respond { kill_on: [kind].into(), ..Respond::default() }, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    for number in 0..number {
        node.see(Source::Gate, flood(number));
    }
    assert!(node.requests.is_empty());
    node
}

#[test]
fn x12_no_number_of_new_programs_prevents_the_response_to_one_in_memory() {
    let mut node = flooded(Kind::ExecFileless, 32_768, |number| {
        exec(at(&format!("/tmp/{number}")), &format!("evil{number}"))
    });
    node.see(Source::Trace, fileless("evil"));
    let finding = node.findings.last().unwrap();
    assert_eq!(
        (finding.kind, finding.files),
        (Kind::ExecFileless, None),
        "it has a finding of its own"
    );
    assert_eq!(node.requests.len(), 1);
    assert_eq!(node.requests[0].finding, Some(finding.id));
}

#[test]
fn x12_no_number_of_scripts_prevents_the_response_to_a_line_in_crontab() {
    let mut node = flooded(Kind::FilePersistence, 17_000, |number| {
        let mut fact = exec(at(&format!("/tmp/{number}")), &format!("evil{number}"));
        if let Fact::File(FileFact::Executed { state, .. }) = &mut fact {
            state.format = Format::Script;
        }
        fact
    });
    assert_eq!(node.findings.last().unwrap().kind, Kind::ExecScript);
    node.state.policy.persistence = model::PathGlobs::new(vec!["/etc/crontab".to_owned()]).unwrap();
    node.see(Source::Change, present(at("/etc/crontab"), "job"));
    let finding =
        node.findings.iter().rev().find(|finding| finding.kind == Kind::FilePersistence).unwrap();
    assert_eq!(node.requests.len(), 1);
    assert_eq!(node.requests[0].finding, Some(finding.id));
}

#[test]
fn h01_a_finding_without_room_among_its_own_kind_gets_a_response() {
    // Every aggregated finding, whatever its files have in common.
    for (kind, fact) in
        [(Kind::ExecNew, exec(at("/tmp/last"), "last")), (Kind::ExecFileless, fileless("last"))]
    {
        let mut node = Node::new(Respond::default(), Vec::new());
        node.play("start c1\nbaseline\nattached c1");
        let most = budget::FINDINGS.number / 2;
        for number in 0..=most {
            match kind {
                Kind::ExecNew => {
                    let path = at(&format!("/tmp/{number}"));
                    node.see(Source::Gate, exec(path, &format!("evil{number}")));
                }
                _ => node.see(Source::Gate, fileless(&format!("evil{number}"))),
            }
        }
        node.publish();
        assert_eq!(node.newest().len(), most + 1);
        let mut restarted = node.restarted();
        restarted.state.policy.rules = Policy::killing(&[kind]).rules;
        restarted.requests.clear();
        // The findings of an earlier policy do not count.
        restarted
            .state
            .inventory
            .get_mut(&id("c1"))
            .unwrap()
            .findings
            .retain(|finding| finding.files.is_none());
        restarted.see(Source::Gate, fact.clone());
        restarted.see(Source::Gate, fact);
        restarted.publish();
        let rest = restarted.findings.last().unwrap().clone();
        assert_eq!((rest.kind, rest.files, rest.count), (kind, Some(1), 2));
        assert_eq!(restarted.requests.len(), 1);
        assert_eq!(restarted.requests[0].finding, Some(rest.id));
    }
}

#[test]
fn h01_a_session_is_reported_and_gets_a_response_when_no_more_are_listed() {
    let respond = Respond { kill_on: [Kind::SessionInteractive].into(), ..Respond::default() };
    let mut node = Node::new(respond, Vec::new());
    node.play("start c1\nbaseline\nattached c1");
    for pid in 1000..3100 {
        node.play(&format!("session c1 {pid} - true {pid}"));
    }
    assert!(node.gaps.contains(&"findings_full".to_owned()));
    node.play("session c1 5000 pts/0 sh");
    let finding = node.findings.last().unwrap();
    assert_eq!((finding.kind, node.requests.len()), (Kind::SessionInteractive, 1));
    assert_eq!(node.requests[0].finding, Some(finding.id));
}

#[test]
fn reverse_shells_take_no_room_from_sessions_from_outside() {
    let mut node = Node::running();
    for pid in 1000..4000 {
        let process = Arc::new(Process { argv: Some(texts(&["sh"])), ..process(pid) });
        let evidence = "a test".to_owned();
        node.see(
            Source::Trace,
            Fact::Session(SessionFact::ReverseShell { process, direct: true, evidence }),
        );
    }
    node.play("session c1 5000 pts/0 sh");
    assert_eq!(node.session(5000).entry, By::RuntimeExec);
}

#[test]
fn what_waits_for_a_baseline_is_bounded_and_the_worst_of_it_is_kept() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start c1\nattached c1");
    for number in 0..9000 {
        node.see(Source::Change, present(at(&format!("/tmp/{number}")), "ls"));
    }
    node.see(Source::Trace, fileless("evil"));
    node.play("baseline").publish();
    assert!(node.findings.iter().any(|finding| finding.kind == Kind::ExecFileless));
    assert_eq!(node.state.health.count(Failure::BaselineBacklogFull), 9001 - 8192);
}

#[test]
fn one_unannounced_container_takes_no_room_from_another_one() {
    let mut node = Node::new(Respond::default(), Vec::new());
    let of = |container: &str, fact| {
        let at = Timestamp::from_second(1).unwrap();
        let source = Source::Gate;
        let (container, session) = (id(container), None);
        let observation = Observation {
            container,
            init: init(7),
            at,
            source,
            session,
            file_of: None,
            reached_as: None,
            fact,
        };
        Input::Sensor(SensorEvent::Observed(observation))
    };
    node.give(of("c2", exec(at("/tmp/x"), "evil")));
    for number in 0..3000 {
        node.clock = 1;
        node.give(of("c1", exec(at(&format!("/tmp/{number}")), "evil")));
    }
    node.clock = 1;
    node.give(of("c3", exec(at("/tmp/x"), "evil")));
    node.clock = 1;
    for container in ["c2", "c3"] {
        node.clock = 1;
        let container = id(container);
        node.give(Input::Runtime(RuntimeEvent::TaskCreated { container, pid: 7, rootfs: None }));
    }
    node.play("start c2\nstart c3\nbaseline");
    let of: Vec<_> = node.findings.iter().filter_map(Finding::container_id).cloned().collect();
    assert_eq!(of, [id("c2"), id("c3")]);
}

/// A node with one exception, for what is in `/opt`.
fn accepting() -> Node {
    let rule = "[[rule]]\nid = \"opt\"\nreason = \"a test\"\nexpires = \"never\"\n\
                effect = \"accept\"\n[rule.match]\npath = [\"/opt/**\"]\n";
    let file = PolicyFile::new("a.toml", rule);
    let loaded = policy::parse(std::path::Path::new(""), vec![file]).unwrap();
    let mut node = Node::new(Respond::default(), Vec::new());
    node.state.policy = Policy::of(&config::Config::default(), Some(&loaded));
    node.play("start c1\nbaseline\nattached c1");
    node
}

#[test]
fn a_flood_of_what_is_accepted_takes_no_room_from_what_is_not() {
    let mut node = accepting();
    for number in 0..5000 {
        let path = at(&format!("/opt/{number}"));
        node.see(Source::Gate, exec(path, &format!("plugin{number}")));
    }
    node.publish();
    let accepted = node.findings.last().unwrap().clone();
    assert_eq!(accepted.verdict.disposition, model::Disposition::Accept);
    assert_eq!((accepted.count, accepted.files), (5000, Some(5000)));
    assert!(node.changes.len() <= 1001, "{} are listed", node.changes.len());
    assert!(node.gaps.is_empty() && node.problems().is_empty(), "{:?}", node.problems());
    node.play("exec c1 /tmp/x evil");
    let reported = node.findings.last().unwrap();
    assert_eq!(reported.verdict.disposition, model::Disposition::Report);
    assert_eq!((reported.kind, reported.files), (Kind::ExecNew, None));
}

#[test]
fn what_is_accepted_has_a_finding_of_its_own_though_there_is_no_room() {
    let mut node = accepting();
    let most = budget::FINDINGS.number / 2;
    for number in 0..=most {
        node.see(Source::Gate, exec(at(&format!("/tmp/{number}")), &format!("evil{number}")));
    }
    node.play("exec c1 /opt/a plugin\nexec c1 /tmp/last evil");
    node.publish();
    let accepted: Vec<&Finding> = node
        .newest()
        .into_iter()
        .filter(|one| one.verdict.disposition == model::Disposition::Accept)
        .collect();
    assert_eq!(accepted.len(), 1, "{accepted:#?}");
    assert_eq!((accepted[0].count, accepted[0].verdict.rule.as_deref()), (1, Some("opt")));
}

#[test]
fn what_was_accepted_by_its_writer_stays_accepted_when_a_scan_finds_it_again() {
    let rule = "[[rule]]\nid = \"curl\"\nreason = \"a test\"\nexpires = \"never\"\neffect = \"accept\"\n\
                [rule.match]\nwriter = { path = \"/usr/bin/curl\", from_image = true }\n";
    let rules = |node: &mut Node, text| {
        let files = vec![PolicyFile::new("a.toml", text)];
        let loaded = policy::parse(std::path::Path::new(""), files).unwrap();
        node.state.policy = Policy::of(&config::Config::default(), Some(&loaded));
    };
    let mut node = Node::running();
    rules(&mut node, rule);
    let curl = Process { exe: Some("/usr/bin/curl".to_owned()), ..process(50) };
    let plugin = written_by("/opt/plugin", "plugin", Some(Arc::new(curl)));
    node.see(Source::Change, plugin);
    let reported = |node: &mut Node, content: &str| {
        node.see(Source::Scan, present(at("/opt/plugin"), content));
        node.publish();
        let newest = node.newest();
        newest.into_iter().filter(|finding| !finding.verdict.is_accept()).count()
    };
    assert_eq!(reported(&mut node, "plugin"), 0);
    let mut restarted = node.restarted();
    rules(&mut restarted, rule);
    assert_eq!(reported(&mut restarted, "plugin"), 0);
    assert_eq!(reported(&mut restarted, "evil"), 1, "the same path with another content");
    // Without the rule it is reported.
    let mut without = node.restarted();
    rules(&mut without, &rule.replace("curl", "ls"));
    assert_eq!(reported(&mut without, "plugin"), 1);
}
