//! Sessions, timelines and probes.

use driftd::history::Record;
use driftd::model::{self, ContainerId, Probe, Session};
use jiff::{Timestamp, ToSpan as _};

use crate::node::Node;
use crate::program::{assert_clean, settled, timeless, wait_until};
use crate::samples::{closed, command, finding, probe, session};

/// Ages in compared text are minutes: they do not depend on the seconds a slow test takes.
const MINUTE: i64 = 60;

/// A node with a closed session in `web` and an open one in another container.
fn visited_node() -> (Node, Session, Session) {
    let node = Node::start();
    let mut drift = finding(1, 80 * MINUTE);
    let mut over = session(0xa1, 100 * MINUTE);
    over.findings = vec![drift.id];
    (over.finding, over.findings_total) = (None, 1);
    drift.session = Some(over.id);
    let commands = [
        command(&over, 1, &["ls", "-la"], 90 * MINUTE),
        command(&over, 2, &["sh", "-c", "echo \u{1b}[2J\n\u{202e}"], 85 * MINUTE),
    ];
    let mut going_on = session(0xa2, 50 * MINUTE);
    going_on.container.id = ContainerId::new("default", "db\u{1b}[31m");
    (going_on.requested_by, going_on.process.tty) = (None, Some("pts/0\u{9b}".into()));
    node.store_findings(std::slice::from_ref(&drift));
    let over = closed(&over, 60 * MINUTE);
    node.store_session(&over, &commands);
    node.store_session(&going_on, &[]);
    (node, over, going_on)
}

#[test]
fn sessions_are_listed_filtered_and_shown() {
    let none = Node::start().run(&["sessions"]);
    assert_eq!(none.code, 0);
    assert!(none.err.contains("driftd status"), "{}", none.err);

    let (node, over, going_on) = visited_node();
    let table = node.run(&["sessions"]);
    assert_eq!((table.code, table.err.as_str()), (0, ""));
    assert_clean(&table.out);
    insta::assert_snapshot!(settled(&table.out));
    let ids = |arguments: &[&str]| {
        let output = node.run(&[&["sessions", "-q"], arguments].concat());
        assert_eq!(output.code, 0, "{output:?}");
        output.out.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let (first, second) = (over.id.to_string(), going_on.id.to_string());
    assert_eq!(ids(&[]), [second.clone(), first.clone()]);
    assert_eq!(ids(&["-c", "web"]), std::slice::from_ref(&first));
    assert_eq!(ids(&["-c", "db\u{1b}[31m"]), std::slice::from_ref(&second), "it has no finding");
    assert_eq!(ids(&["--open"]), std::slice::from_ref(&second));
    assert_eq!(ids(&["--since", "55m"]), std::slice::from_ref(&second));
    assert_eq!(ids(&["--until", "55m"]), std::slice::from_ref(&first));
    let json = node.run(&["sessions", "-o", "json"]);
    assert_eq!(serde_json::from_str::<Vec<Session>>(&json.out).unwrap(), [going_on, over.clone()]);

    let shown = node.run(&["show", "a1"]);
    assert_eq!((shown.code, shown.err.as_str()), (0, ""));
    assert_clean(&shown.out);
    insta::assert_snapshot!(timeless(&shown.out));
    assert_clean(&node.run(&["show", "a2"]).out);
    let story: serde_json::Value =
        serde_json::from_str(&node.run(&["show", &first, "-o", "json"]).out).unwrap();
    assert_eq!(story["schema"], "driftd.session_story/v1");
    assert_eq!(story["session"]["id"], first);
    assert_eq!(story["commands"].as_array().unwrap().len(), 2);
    assert_eq!(story["findings"][0]["session"], first);

    // The finding names its session and the command that shows it.
    let drift = node.run(&["show", "01"]).out;
    let expected = format!("Session     {first} (driftd show {})\n", &first[..12]);
    assert!(drift.contains(&expected), "{drift}");
    let several = node.run(&["show", "a"]);
    assert_eq!(several.err, "error: `a` could be 2 sessions: write more of the ID\n");
    let mut alike = finding(0xa1, 0);
    alike.container = None;
    node.store_findings(&[alike]);
    let both = node.run(&["show", "a1"]);
    assert_eq!(
        (both.code, both.err.as_str()),
        (2, "error: `a1` could be a finding or a session: write more of the ID\n")
    );
}

#[test]
fn a_timeline_lists_events_in_order() {
    let (node, over, _) = visited_node();
    let killed = node.run(&["respond", "kill", "web", "--reason", "drift\u{1b}[2J"]);
    assert_eq!(killed.code, 0);
    let records = node.writer.as_ref().unwrap().records();
    let gap = Record::Gap {
        name: "pipeline_full".into(),
        container: None,
        detail: "7 observations\r".into(),
        at: Timestamp::now() + 1.seconds(),
        until: None,
    };
    records.send(gap).unwrap();
    let list = |arguments: &[&str]| node.run(&[&["timeline", "web"], arguments].concat());
    wait_until(|| list(&["-q"]).out.ends_with("pipeline_full\n"));

    let listed = list(&[]);
    assert_eq!((listed.code, listed.err.as_str()), (0, ""));
    assert_clean(&listed.out);
    let (before, after) = listed.out.split_once("(asked by uid 0 pid ").unwrap();
    let (_, after) = after.split_once(" (").unwrap();
    let (_, after) = after.split_once(')').unwrap();
    insta::assert_snapshot!(timeless(&format!("{before}(asked by …{after}")));
    assert_clean(&list(&["--no-trunc", "-o", "wide"]).out);

    let json = list(&["-o", "json"]);
    let entries: Vec<serde_json::Value> = serde_json::from_str(&json.out).unwrap();
    let kinds: Vec<&str> = entries.iter().map(|entry| entry["type"].as_str().unwrap()).collect();
    let expected =
        ["session_opened", "command", "command", "finding", "session_closed", "response", "gap"];
    assert_eq!(kinds, expected);
    assert_eq!(entries[1]["session_id"], over.id.to_string());
    assert_eq!(list(&["-o", "jsonl"]).out.lines().count(), 7);
    assert_eq!(list(&["-q", "--since", "70m", "--until", "55m"]).out, format!("{}\n", over.id));
    let nothing = list(&["--until", "3h"]);
    assert_eq!((nothing.code, nothing.out.as_str()), (0, ""));
    assert!(nothing.err.contains("driftd status"), "{}", nothing.err);
    let unknown = node.run(&["timeline", "nowhere"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.err.contains("no container `nowhere`"), "{}", unknown.err);
}

#[test]
fn a_timeline_longer_than_a_page_is_listed_whole() {
    let node = Node::start();
    let long = session(1, 5000);
    let commands: Vec<model::Command> =
        (1..=2500).map(|number| command(&long, number, &["true"], 4000 - number as i64)).collect();
    node.store_session(&closed(&long, 0), &commands);
    let lines = node.run(&["timeline", "web", "-q"]).out;
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 2502);
    assert_eq!(lines[2500], format!("{}#2500", long.id));
    let story = node.run(&["show", &long.id.to_string(), "-o", "jsonl"]).out;
    let story: serde_json::Value = serde_json::from_str(&story).unwrap();
    assert_eq!(story["commands"].as_array().unwrap().len(), 2500);
}

#[test]
fn probes_are_listed_reported_and_counted_again() {
    let node = Node::start();
    assert_eq!(node.run(&["probes"]).err, "no probe is known\n");
    let records = node.writer.as_ref().unwrap().records();
    let mut gone = probe();
    gone.id.0[0] = 1;
    gone.container.id = ContainerId::new("default", "gone");
    gone.argv = vec!["\u{1b}[2J".into()];
    for probe in [probe(), gone] {
        records.send(Record::Probe(Box::new(probe))).unwrap();
    }
    wait_until(|| node.run(&["probes", "-q"]).out.lines().count() == 2);
    let table = node.run(&["probes", "-c", "web"]);
    assert_eq!((table.code, table.err.as_str()), (0, ""));
    insta::assert_snapshot!(settled(&table.out));
    assert_clean(&node.run(&["probes", "-o", "wide"]).out);

    let id = probe().id.to_string();
    let report = node.run(&["probes", "report", &id[..6]]);
    assert_eq!((report.code, report.err.as_str()), (0, ""));
    assert!(report.out.starts_with(&format!("{id} is reported from now on: ")), "{}", report.out);
    let state = || {
        let json = node.run(&["probes", "-c", "web", "-o", "json"]).out;
        serde_json::from_str::<Vec<Probe>>(&json).unwrap()[0].reported
    };
    assert!(state(), "the history holds it before the client gets the reply");
    let count = node.run(&["probes", "count", &id, "-o", "json"]);
    assert!(!serde_json::from_str::<Probe>(&count.out).unwrap().reported);
    assert!(!state());
    let nothing = node.run(&["probes", "report", "ee"]);
    assert_eq!(
        (nothing.code, nothing.err.as_str()),
        (2, "error: no probe `ee` (see: driftd probes)\n")
    );
    let gone = node.run(&["probes", "report", "01"]);
    assert_eq!(gone.code, 2);
    assert!(gone.err.contains("belongs to no container on this node"), "{}", gone.err);
}
