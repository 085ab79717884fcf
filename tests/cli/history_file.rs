//! `--history`: reading a history file without a daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use driftd::history::History;

use crate::node::Node;
use crate::program::run;
use crate::samples::{command, finding, session};

/// The files of a directory and their contents.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let all = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.is_file()).map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn u05_a_history_is_read_without_a_daemon_and_left_unchanged() {
    let mut node = Node::start();
    // Older than a daemon's retention.
    let old = finding(1, 40 * 24 * 60 * 60);
    let young = finding(2, 60);
    node.writer.take().unwrap().stop();
    let keep = Duration::from_secs(400 * 24 * 60 * 60);
    let writer = History::open(&node.dir.path().join("state")).unwrap().start(keep, Arc::default());
    node.writer = Some(writer);
    node.store_findings(&[young.clone(), old.clone()]);
    let visit = session(3, 30);
    node.store_session(&visit, &[command(&visit, 1, &["ls"], 20)]);

    // Copied from a running node: the newest records are only in the write-ahead log.
    let copy = tempfile::tempdir().unwrap();
    let state = node.dir.path().join("state");
    let rest = tempfile::tempdir().unwrap();
    for name in ["history.db", "history.db-wal"] {
        fs::copy(state.join(name), copy.path().join(name)).unwrap();
    }
    assert!(fs::metadata(copy.path().join("history.db-wal")).unwrap().len() > 0);
    let check = |history: &Path, is_unused: bool| {
        let before = contents(history.parent().unwrap());
        let run = |arguments: &[&str]| {
            let output = run(&[&["--history", history.to_str().unwrap()], arguments].concat());
            assert_eq!(output.code, 0, "{arguments:?}: {output:?}");
            output.out
        };
        assert_eq!(run(&["findings", "-q"]), format!("{}\n{}\n", young.id, old.id));
        assert!(run(&["show", &old.id.to_string()]).contains(&old.id.to_string()));
        assert_eq!(run(&["sessions", "-q"]), format!("{}\n", visit.id));
        assert_eq!(run(&["timeline", "web", "-o", "jsonl"]).lines().count(), 4);
        assert_eq!(run(&["summary"]).lines().count(), 2);
        if is_unused {
            assert_eq!(contents(history.parent().unwrap()), before, "nothing is written");
        }
    };
    check(&copy.path().join("history.db"), true);
    // The history in use.
    check(&state.join("history.db"), false);
    // A backup: everything in one file.
    let database = rusqlite::Connection::open(state.join("history.db")).unwrap();
    let backup = rest.path().join("history.db");
    database.execute("VACUUM INTO ?1", [backup.to_str().unwrap()]).unwrap();
    check(&rest.path().join("history.db"), true);
    let directory = run(&["--history", rest.path().to_str().unwrap(), "findings", "-q"]);
    assert_eq!(directory.out.lines().count(), 2, "the directory is accepted too");

    for (arguments, code) in [
        (&["status"][..], 64),
        (&["findings", "--follow"], 64),
        (&["respond", "kill", "web", "--reason", "x"], 64),
    ] {
        let path = rest.path().to_str().unwrap();
        let refused = run(&[&["--history", path], arguments].concat());
        assert_eq!(refused.code, code, "{refused:?}");
        assert!(refused.err.contains("--history is for findings"), "{}", refused.err);
    }
    let nothing = run(&["--history", "/no/such/history.db", "findings"]);
    assert!(nothing.code == 2 && nothing.err.contains("/no/such/history.db"), "{nothing:?}");
}
