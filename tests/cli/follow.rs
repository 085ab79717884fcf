//! `--follow`: streams of findings and sessions, their cursors and gaps.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;
use std::sync::Arc;

use driftd::history::{Filter, History, Record};
use driftd::model::{ContainerId, Finding, Session};
use jiff::Timestamp;

use crate::node::{Node, RETENTION};
use crate::program::{Running, wait_until};
use crate::samples::{closed, command, finding, session};

/// A running `driftd findings --follow -o jsonl`, or `driftd sessions`.
pub(crate) struct Following {
    _child: Running,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
    err: BufReader<std::process::ChildStderr>,
}

impl Following {
    pub(crate) fn start(node: &Node, arguments: &[&str]) -> Following {
        Following::of("findings", node, arguments)
    }

    fn of(what: &str, node: &Node, arguments: &[&str]) -> Following {
        let mut child = node
            .command(&[what, "--follow", "-o", "jsonl"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let err = BufReader::new(child.stderr.take().unwrap());
        Following { _child: Running(child), lines, err }
    }

    #[track_caller]
    fn next(&mut self) -> serde_json::Value {
        serde_json::from_str(&self.lines.next().expect("the stream goes on").unwrap()).unwrap()
    }

    #[track_caller]
    pub(crate) fn expect(&mut self, finding: &Finding) {
        assert_eq!(self.next()["id"], finding.id.to_string());
    }

    /// The next line on stderr.
    fn stderr_line(&mut self) -> String {
        let mut line = String::new();
        self.err.read_line(&mut line).unwrap();
        line
    }
}

#[test]
fn u07_a_follower_resumes_after_its_cursor_when_the_daemon_is_back() {
    let mut node = Node::start();
    let all: Vec<Finding> = (1..=5).map(|number| finding(number, 0)).collect();
    node.store_findings(&all[..2]);
    let mut following = Following::start(&node, &["--container", "web"]);
    let mut latest = Following::start(&node, &["--after", "latest"]);
    for (index, finding) in all[..2].iter().enumerate() {
        let line = following.next();
        assert_eq!(line["id"], finding.id.to_string());
        assert_eq!(line["schema"], "driftd.finding/v1");
        assert_eq!(line["cursor"], index + 1, "each line names the cursor to go on with");
    }
    // It follows, and nothing has come yet.
    assert_eq!(latest.stderr_line(), "following what comes after 2\n");
    node.stop_server();
    node.writer.take().unwrap().stop();
    let dir = std::mem::replace(&mut node.dir, tempfile::tempdir().unwrap());
    node.writer = Some(History::open(node.dir.path()).unwrap().start(RETENTION, Arc::default()));
    assert!(
        following.stderr_line().contains("go on after 2"),
        "the follower reports where it goes on"
    );

    let node = Node::start_in(dir);
    node.store_findings(&all[2..4]);
    for finding in &all[2..4] {
        following.expect(finding);
        latest.expect(finding);
    }
    node.store_findings(&all[4..]);
    let line = following.next();
    assert_eq!((&line["id"], &line["cursor"]), (&all[4].id.to_string().into(), &5.into()));

    let mut resumed = Following::start(&node, &["--after", "3"]);
    resumed.expect(&all[3]);
    resumed.expect(&all[4]);
}

#[test]
fn session_followers_receive_sessions_and_no_findings() {
    let mut node = Node::start();
    let (first, second) = (session(1, 60), session(2, 30));
    node.store_session(&first, &[command(&first, 1, &["ls"], 50)]);
    node.store_findings(&[finding(3, 0)]);
    let mut findings = Following::start(&node, &[]);
    let mut sessions = Following::of("sessions", &node, &["-c", "web"]);
    let mut open = Following::of("sessions", &node, &["--open"]);
    let as_followed = |session: &Session, cursor: u64| {
        let mut json = serde_json::to_value(session).unwrap();
        json["cursor"] = cursor.into();
        json
    };
    assert_eq!(sessions.next(), as_followed(&first, 1));
    assert_eq!(open.next()["id"], first.id.to_string());
    let over = closed(&first, 0);
    node.store_session(&over, &[]);
    node.store_session(&second, &[]);
    assert_eq!(sessions.next(), as_followed(&over, 3));
    assert_eq!(sessions.next()["id"], second.id.to_string());
    assert_eq!(
        open.next()["id"],
        second.id.to_string(),
        "the end of a session is not followed with --open"
    );

    // A follower of findings receives findings only.
    findings.expect(&finding(3, 0));
    node.store_findings(&[finding(4, 0)]);
    findings.expect(&finding(4, 0));
    node.stop_server();
    assert!(sessions.stderr_line().contains("waiting for it, to go on after 5"));
}

#[test]
fn a_follower_receives_gaps() {
    let dir = tempfile::tempdir().unwrap();
    let writer = History::open(&dir.path().join("state")).unwrap().start(RETENTION, Arc::default());
    let mut committed = writer.committed();
    let month = 31 * 24 * 60 * 60;
    for finding in [finding(1, month), finding(2, month), finding(3, 0)] {
        writer.records().send(Record::Finding(Box::new(finding))).unwrap();
    }
    wait_until(|| *committed.borrow_and_update() >= 3);
    writer.stop();

    let node = Node::start_in(dir);
    node.store_findings(&[finding(3, 0)]);
    let records = node.writer.as_ref().unwrap().records();
    let lost = |container: &str| Record::Gap {
        name: "kernel_queue_overflow".into(),
        container: Some(ContainerId::new("default", container)),
        detail: "the kernel dropped events".into(),
        at: Timestamp::now(),
        until: None,
    };
    wait_until(|| {
        let reader = node.writer.as_ref().unwrap().reader();
        reader.after(0, &Filter::default(), 1).unwrap().pruned_through == 2
    });

    let mut following = Following::start(&node, &["--after", "1", "--container", "web"]);
    let gap = following.next();
    assert_eq!((&gap["schema"], &gap["name"]), (&"driftd.gap/v1".into(), &"history_pruned".into()));
    following.expect(&finding(3, 0));
    records.send(lost("other")).unwrap();
    records.send(lost("web")).unwrap();
    let gap = following.next();
    assert_eq!(gap["name"], "kernel_queue_overflow");
    assert_eq!(gap["container"]["id"], "web", "another container's gap is left out");

    // From the oldest kept finding on, nothing is missing.
    let mut whole = Following::start(&node, &[]);
    whole.expect(&finding(3, 0));

    // A cursor from a history that was replaced.
    let mut lost = Following::start(&node, &["--after", "1000000"]);
    assert_eq!(lost.next()["name"], "history_replaced");
    lost.expect(&finding(3, 0));
}

#[test]
fn a_follower_that_does_not_read_delays_no_other_client() {
    let node = Node::start();
    // Its pipe is soon full and stays full.
    let stuck = Following::start(&node, &[]);
    let many: Vec<Finding> = (0..2000_u32)
        .map(|number| {
            let mut finding = finding(0, 0);
            finding.id.0[..4].copy_from_slice(&number.to_be_bytes());
            finding
        })
        .collect();
    node.store_findings(&many);
    assert_eq!(node.run(&["findings", "-q"]).out.lines().count(), 2000);
    drop(stuck);
}
