//! Reports of a running daemon.

use serde_json::Value;

use crate::node::Node;
use crate::program::assert_clean;
use crate::samples::{closed, command, finding, session};

#[test]
fn a_report_of_a_daemon_knows_what_a_history_does_not() {
    let node = Node::start();
    let mut drift = finding(1, 60);
    drift.verdict.rules = vec!["curl".into()];
    let visit = session(0xa1, 90);
    node.store_findings(&[drift]);
    node.store_session(&closed(&visit, 30), &[command(&visit, 1, &["id"], 80)]);
    let report = node.run(&["report", "web", "-o", "json"]);
    assert_eq!((report.code, report.err.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&report.out).unwrap();
    let made = &report["made"];
    assert_eq!((&made["from"], &made["node"]), (&"daemon".into(), &"node-1".into()));
    assert_eq!(made["daemon"], env!("CARGO_PKG_VERSION"));
    assert_eq!(report["container"]["now"]["state"], "running");
    assert_eq!(report["container"]["now"]["pid"], 4242);
    assert_eq!(report["container"]["image"]["name"], "registry.example/shop:1.4", "as recorded");
    assert_eq!(report["policy"]["now"]["version"], "2026.11");
    assert!(report["policy"]["now"]["digest"].as_str().unwrap().starts_with("blake3:"));
    let rule = &report["policy"]["rules"][0];
    let keys = ["id", "findings", "accepted", "effect", "reason"].map(|key| rule[key].clone());
    let expected: [Value; 5] =
        ["curl".into(), 1.into(), 0.into(), "severity".into(), "an attacker's first tool".into()];
    assert_eq!(keys, expected);
    assert_eq!(report["view"]["complete"], false);
    assert!(report["view"]["problems"][0].as_str().unwrap().contains("containerd"));
    assert_eq!(report["counts"]["commands_listed"], 1);

    let page = node.run(&["report", "default/web"]);
    assert_clean(&page.out);
    for text in [
        "the view of the node was incomplete",
        "its image is another one now",
        "2 rules, version 2026.11",
    ] {
        assert!(page.out.contains(text), "{text} is not in {}", page.out);
    }
}

#[test]
fn a_container_without_any_record_has_an_empty_report() {
    let node = Node::start();
    let page = node.run(&["report", "clean"]);
    assert_eq!((page.code, page.err.as_str()), (0, ""));
    for text in [
        "Nothing is recorded for this time.",
        "No session was seen.",
        "Nothing was found.",
        "No response is recorded for this time.",
    ] {
        assert!(page.out.contains(text), "{}", page.out);
    }
    let json: Value =
        serde_json::from_str(&node.run(&["report", "web", "-o", "json"]).out).unwrap();
    // Nothing is recorded, so the daemon's view of the container is all there is.
    assert_eq!(json["container"]["image"]["name"], "shop:1");
    assert_eq!(json["container"]["labels"]["app"], "shop");
    assert_eq!((&json["period"]["first"], &json["counts"]["findings"]), (&Value::Null, &0.into()));
    assert_eq!(json["counts"]["by_severity"]["critical"], 0);
}

#[test]
fn a_report_names_one_container_or_session() {
    let node = Node::start();
    node.store_session(&session(0xa1, 90), &[]);
    node.store_session(&session(0xa2, 80), &[]);
    let refused = node.run(&["report", "a"]);
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert!(refused.err.contains("could be 2 sessions"), "{}", refused.err);
    assert_eq!(node.run(&["report", "w"]).code, 2, "ambiguous");
    assert_eq!(node.run(&["report", "web", "-o", "pdf"]).code, 64);
    let mut node = node;
    node.stop_server();
    let gone = node.run(&["report", "web"]);
    assert!(gone.code == 2 && gone.err.contains("cannot reach driftd"), "{gone:?}");
}

#[test]
fn a_report_does_not_wait_for_a_daemon_that_is_stuck() {
    let node = Node::stalled();
    node.store_session(&session(0xa1, 90), &[]);
    // The name of a container is the pipeline's to resolve.
    let refused = node.run(&["report", "web"]);
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert!(refused.err.contains("--history"), "{}", refused.err);
    let state = node.dir.path().join("state");
    let offline = crate::program::run(&["--history", state.to_str().unwrap(), "report", "a1"]);
    assert_eq!((offline.code, offline.err.as_str()), (0, ""));
}
