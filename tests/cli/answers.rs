//! `driftd respond kill-process` and `resume-answers`, and what the status says of stopped rules.

use driftd::model::{ContainerId, Incarnation};

use crate::node::Node;
use crate::samples::finding;

#[test]
fn a_stopped_rule_is_named_with_its_reason_and_the_next_step() {
    let node = Node::start();
    let status = node.run(&["status"]).out;
    for part in [
        "of rule everything STOPPED since",
        "it has answered in 3 containers within 10 min (a, b, c)",
        "driftd respond resume-answers everything --reason TEXT",
    ] {
        assert!(status.contains(part), "{status}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&node.run(&["status", "-o", "json"]).out).unwrap();
    let stopped = &json["stopped_rules"][0];
    assert_eq!(stopped["rule"], "everything");
    assert_eq!(
        (&stopped["container"]["namespace"], &stopped["container"]["id"]),
        (&"default".into(), &"web".into())
    );
    assert!(node.run(&["metrics"]).out.contains("driftd_answers_stopped 1"), "in the metrics");
}

#[test]
fn a_rule_that_is_resumed_is_named_and_one_that_is_not_stopped_is_an_error() {
    let node = Node::start();
    for arguments in [&["everything"][..], &[]] {
        let all = [&["respond", "resume-answers"], arguments, &["--reason", "mended"]].concat();
        let resumed = node.run(&all);
        assert_eq!((resumed.code, resumed.err.as_str()), (0, ""), "{resumed:?}");
        assert!(
            resumed.out.starts_with("rule everything answers again (stopped since "),
            "{resumed:?}"
        );
    }
    let other = node.run(&["respond", "resume-answers", "other\u{1b}[2J", "--reason", "x"]);
    assert_eq!(other.code, 2, "{other:?}");
    assert!(other.err.contains("are not stopped (see: driftd status)"), "{other:?}");
    assert!(!other.err.contains('\u{1b}'), "{other:?}");
    for arguments in [&["--reason", ""][..], &[]] {
        let all = [&["respond", "resume-answers", "everything"], arguments].concat();
        assert_eq!(node.run(&all).code, 64, "without a reason");
    }
}

#[test]
fn a_hook_needs_a_finding_and_a_reason() {
    let node = Node::start();
    for (arguments, code) in [
        (&["page", "--reason", "x"][..], 64),
        (&["page", "--finding", "ffffffff"], 64),
        (&["page", "--finding", "ffffffff", "--reason", "x"], 2),
        (&["--finding", "ffffffff", "--reason", "x"], 64),
    ] {
        let refused = node.run(&[&["respond", "hook"], arguments].concat());
        assert_eq!(refused.code, code, "{arguments:?}: {refused:?}");
    }
    let mut named = finding(2, 60);
    named.run = Some(Incarnation { pid: 7, start_time: Some(700), created_at: None });
    named.container.as_mut().unwrap().id = ContainerId::new("default", "web");
    node.store_findings(std::slice::from_ref(&named));
    let id = named.id.to_string();
    let done = node.run(&["respond", "hook", "page", "--finding", &id, "--reason", "x"]);
    assert_eq!((done.code, done.out.as_str()), (0, "hook default/web: done: as scripted\n"));
}

#[test]
fn a_process_is_named_by_its_pid_or_by_a_finding() {
    let node = Node::start();
    let run = |arguments: &[&str]| {
        node.run(&[&["respond", "kill-process"], arguments, &["--reason", "x"]].concat())
    };
    let killed = run(&["web", "--pid", "4242"]);
    assert_eq!(
        (killed.code, killed.out.as_str()),
        (0, "kill-process default/web: done: as scripted\n")
    );
    for (arguments, code) in [
        (&["web"][..], 64),
        (&["web", "--pid", "0"], 64),
        (&["web", "--pid", "1"], 64),
        (&["web", "--pid", "-5"], 64),
        (&["web", "--pid", "99999999999"], 64),
        (&["--pid", "4242"], 64),
        (&["nothing", "--pid", "4242"], 2),
        (&["--finding", "ffffffff"], 2),
    ] {
        let refused = run(arguments);
        assert_eq!(refused.code, code, "{arguments:?}: {refused:?}");
    }
}
