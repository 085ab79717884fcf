//! Containers, their differences, the daemon's status, and responses.

use driftd::model::{ContainerId, Incarnation};

use crate::node::Node;
use crate::samples::finding;

#[test]
fn diff_reports_drift_by_its_exit_code() {
    let node = Node::start();
    let drifted = node.run(&["diff", "web"]);
    assert_eq!(drifted.code, 1);
    assert_eq!(
        drifted.out,
        "CHANGE    SEVERITY  KIND        PATH\n\
         metadata  -         -           /bin/sh\n\
         added     LOW       file.added  /tmp/x\n"
    );
    assert_eq!(drifted.err, "default/web: 2 differences, 1 of them drift\n");
    let drift = node.run(&["diff", "web", "--drift-only"]);
    assert_eq!((drift.code, drift.out.lines().count()), (1, 2), "u06: {drift:?}");
    assert_eq!(node.run(&["diff", "clean"]).code, 0);
    let half = node.run(&["diff", "half"]);
    assert_eq!(half.code, 2, "an incomplete comparison proves nothing: {half:?}");
}

#[test]
fn containers_status_and_baselines_are_shown() {
    let node = Node::start();
    let containers = node.run(&["containers"]);
    assert_eq!(
        containers.out,
        "NAMESPACE  CONTAINER  IMAGE   STATE    BASELINE  WATCHED       FINDINGS\n\
         default    web        shop:1  running  ready     before start  1\n"
    );
    assert_eq!(node.run(&["containers", "-q"]).out, "default/web\n");
    let json = node.run(&["containers", "-o", "jsonl"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&json["schema"], &json["pid"]), (&"driftd.container/v1".into(), &4242.into()));
    assert_eq!(json["findings_by_severity"], serde_json::json!({ "critical": 1 }));
    assert_eq!(json["incomplete"], serde_json::json!(["armed_late"]));

    let status = node.run(&["status"]);
    assert_eq!(status.code, 1, "u10: the daemon replies, and the view is incomplete");
    assert!(status.out.starts_with("View        INCOMPLETE\n"), "{}", status.out);
    let json = node.run(&["status", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["complete"], false);
    assert_eq!(json["baselines_pending"], 2);

    assert_eq!(node.run(&["baseline", "ls", "-o", "json"]).out, "[]\n");
    let unknown = node.run(&["baseline", "record", "no:1"]);
    assert_eq!(
        (unknown.code, unknown.err.as_str()),
        (2, "error: no image `no:1` is known to containerd\n")
    );
    assert_eq!(node.run(&["baseline", "show", "no:1"]).code, 2);
    assert_eq!(node.run(&["baseline", "export", "no:1"]).code, 2);
}

#[test]
fn status_and_metrics_count_baselines() {
    let node = Node::with_shops();
    let status = node.run(&["status"]).out;
    let line = "Baselines   2 recorded, 2 of them verified, 2 waited for\n";
    assert!(status.contains(line), "{status}");
    let metrics = node.run(&["metrics"]);
    assert_eq!((metrics.code, metrics.err.as_str()), (0, ""));
    for line in [
        "driftd_baselines{known_by=\"verified\"} 2.0\n",
        "driftd_containers{baseline=\"ready\"} 1.0\n",
        "driftd_view_complete 0.0\n",
        "driftd_containerd_connected{socket=\"/run/containerd/containerd.sock\"} 0.0\n",
        "driftd_losses_total{name=\"kernel_queue_overflow\"} 0\n",
    ] {
        assert!(metrics.out.contains(line), "{line}: {}", metrics.out);
    }
    assert!(!metrics.out.contains("# EOF"), "u16: the collector reads the format of Prometheus");
}

#[test]
fn a_response_is_kept_with_requester_and_reason() {
    let node = Node::start();
    let drift = finding(1, 60);
    node.store_findings(std::slice::from_ref(&drift));
    let id = drift.id.to_string();
    let done = node.run(&["respond", "kill", "web", "--reason", "  dropped a program "]);
    assert_eq!((done.code, done.err.as_str()), (0, ""));
    assert_eq!(done.out, "kill default/web: done: as scripted\n");
    let failed = node.run(&["respond", "pause", "clean", "--reason", "x"]);
    assert_eq!(failed.code, 2);
    assert_eq!(failed.out, "pause default/clean: FAILED: as scripted\n");

    // A response can name a finding instead of the container, if the finding names its run.
    let unnamed = node.run(&["respond", "kill", "--finding", &id, "--reason", "x"]);
    assert_eq!((unnamed.code, unnamed.out.as_str()), (2, ""));
    assert!(unnamed.err.contains("name the container instead"), "{}", unnamed.err);
    let mut named = finding(2, 60);
    named.run = Some(Incarnation { pid: 7, start_time: Some(700), created_at: None });
    named.container.as_mut().unwrap().id = ContainerId::new("default", "clean");
    node.store_findings(std::slice::from_ref(&named));
    let of_it = named.id.to_string();
    let done = node.run(&["respond", "pause", "--finding", &of_it[..8], "--reason", "x"]);
    assert_eq!(done.out, "pause default/clean: FAILED: as scripted\n", "{done:?}");
    let other = node.run(&["respond", "pause", "web", "--finding", &of_it, "--reason", "x"]);
    assert_eq!(other.code, 2);
    assert!(other.err.contains("is of container default/clean"), "{}", other.err);
    assert_eq!(node.run(&["respond", "pause", "--reason", "x"]).code, 64);

    // The history holds the response before the client gets its reply: no waiting here.
    let web = ContainerId::new("default", "web");
    let reader = node.writer.as_ref().unwrap().reader();
    let responses = reader.responses(&web).unwrap();
    assert_eq!(responses.len(), 1);
    assert_eq!(responses[0].reason, "dropped a program");
    let by = &responses[0].requested_by;
    assert!(by.starts_with("uid 0 pid "), "{by} (this test needs root)");
    assert!(by.ends_with(&format!(" ({})", env!("CARGO_BIN_EXE_driftd"))), "{by}");
    let shown = node.run(&["show", &id]).out;
    assert!(shown.contains("Response    kill done: as scripted ("), "{shown}");
    assert!(shown.contains("because dropped a program\n"), "{shown}");

    let restarter = |arguments: &[&str]| {
        let done = node.run(&[&["respond"], arguments, &["--reason", "x", "-o", "json"]].concat());
        serde_json::from_str::<serde_json::Value>(&done.out).unwrap()["outcome"]["restarter"]
            .clone()
    };
    assert_eq!(restarter(&["kill", "web"]), "restart_monitor", "d01");
    assert_eq!(restarter(&["kill", "web", "--no-restart"]), serde_json::Value::Null, "d01");
}
