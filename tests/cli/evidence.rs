//! `driftd evidence`: what users read of cases, and the exit codes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use driftd::config;
use driftd::evidence::{Keeper, Store};
use driftd::health::Health;
use driftd::history::History;
use driftd::model::{
    CaseId, Container, ContainerId, EntryPoint, ImageReference, OverlayDirs, RootfsPath,
};
use driftd::respond::{Action, Collector as _, Order, ResponseRequest, Task, Until};
use jiff::Timestamp;
use serde_json::Value;

use crate::node::Node;

const CASE: CaseId = CaseId([0x1c; 16]);

/// Takes evidence of a container that does not run, as the daemon does.
fn take(directory: &Path, reason: &str) {
    let upper = directory.join("upper");
    fs::create_dir_all(&upper).unwrap();
    fs::write(upper.join("x"), "payload").unwrap();
    let history = History::open(&directory.join("other")).unwrap();
    let health = Arc::new(Health::default());
    let settings = config::Evidence::default();
    let store = Store::open(directory.join("state/evidence"), &settings, "node-1", &health);
    let keeper = Keeper::start(Arc::new(store), history.reader(), &health).unwrap();
    let id = ContainerId::new("default", "web");
    let container = Container {
        id: id.clone(),
        endpoint: "/run/containerd/containerd.sock".into(),
        runtime: "io.containerd.runc.v2".into(),
        created_at: None,
        labels: Default::default(),
        pod: None,
        image: ImageReference::default(),
        snapshotter: "overlayfs".into(),
        snapshot_key: "web".into(),
        layers: Vec::new(),
        rootfs: Some(OverlayDirs { upperdir: upper, lowerdirs: Vec::new() }),
        task: None,
        no_baseline: None,
        id_map: None,
        entry_point: EntryPoint::default(),
        probes: Vec::new(),
    };
    let order = Order {
        case: CASE,
        container: Box::new(container),
        workload: "container default/web".into(),
        kind: None,
        process: None,
        path: Some(RootfsPath::new("/x").unwrap()),
        by_rule: false,
        environment: false,
        until: Until::default(),
    };
    let request = ResponseRequest {
        ticket: 1,
        container: id,
        pod: None,
        image: None,
        incarnation: None,
        process: None,
        action: Action::Evidence,
        reason: reason.into(),
        requested_by: "uid 0".into(),
        requested_at: Timestamp::now(),
        finding: None,
        no_restart: false,
        hook: None,
        evidence: None,
    };
    let specification = Ok(b"{}".to_vec());
    let task = Task { request, order, specification, is_frozen: false };
    let taken = keeper.take(task).blocking_recv().unwrap().unwrap();
    assert_eq!(taken.case, CASE);
}

fn with_case(reason: &str) -> (Node, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    take(directory.path(), reason);
    let case = directory.path().join("state/evidence").join(CASE.to_string());
    (Node::start_filled(directory, |_| ()), case)
}

#[test]
fn a_case_is_listed_shown_verified_exported_and_removed() {
    let (node, case) = with_case("a \u{1b}[2J test");
    let listed = node.run(&["evidence", "ls", "-o", "wide"]);
    assert_eq!((listed.code, listed.err.as_str()), (0, ""), "{listed:?}");
    for part in ["CASE", "1c1c1c1c1c1c", "default/web", "whole", "uid 0"] {
        assert!(listed.out.contains(part), "{part}: {listed:?}");
    }
    assert!(!listed.out.contains('\u{1b}'), "{listed:?}");
    let json: Value =
        serde_json::from_str(&node.run(&["evidence", "ls", "-o", "json"]).out).unwrap();
    assert_eq!((&json[0]["id"], json[0]["takes"].as_u64()), (&CASE.to_string().into(), Some(1)));
    let shown = node.run(&["evidence", "show", "1c1c"]);
    assert_eq!(shown.code, 0, "{shown:?}");
    assert!(shown.out.contains("1 of 1 files") && !shown.out.contains('\u{1b}'), "{shown:?}");
    let shown = node.run(&["evidence", "show", "1c1c", "-o", "json"]);
    let manifest: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(manifest["schema"], "driftd.evidence/v1");

    let verified = node.run(&["evidence", "verify", "1c1c", "-o", "json"]);
    let verified_json: Value = serde_json::from_str(&verified.out).unwrap();
    assert_eq!((verified.code, &verified_json["as_taken"]), (0, &true.into()), "{verified:?}");
    let status = node.run(&["status"]).out;
    assert!(status.contains("Evidence    1 cases"), "{status}");
    assert!(node.run(&["metrics"]).out.contains("driftd_evidence_cases 1"));

    let report = node.run(&["report", "1c1c1c1c", "-o", "json"]);
    let report: Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(
        (&report["case_id"], &report["container"]["id"]),
        (&CASE.to_string().into(), &"web".into())
    );

    let out = case.parent().unwrap().join("../case.tar.zst");
    let out = out.to_str().unwrap();
    let exported = node.run(&["evidence", "export", "1c1c", "-o", out]);
    assert_eq!(exported.code, 0, "{exported:?}");
    let again = node.run(&["evidence", "export", "1c1c", "-o", out]);
    assert_eq!(again.code, 2, "{again:?}");
    assert!(again.err.contains("is there already"), "{again:?}");
    let unpacked = tempfile::tempdir().unwrap();
    let plain = zstd::decode_all(fs::File::open(out).unwrap()).unwrap();
    tar::Archive::new(&plain[..]).unpack(unpacked.path()).unwrap();
    let copy = unpacked.path().join(CASE.to_string());
    let copy = copy.to_str().unwrap();
    let digest = verified_json["digest"].as_str().unwrap();
    // No daemon is needed.
    let elsewhere = |arguments: &[&str]| {
        let all = [&["--socket", "/nowhere", "evidence", "verify", copy], arguments].concat();
        node.run(&all)
    };
    assert_eq!(elsewhere(&["--digest", digest]).code, 0);
    let other = elsewhere(&["--digest", &digest.replace(|c: char| c.is_ascii_digit(), "0")]);
    assert_eq!(other.code, 1, "{other:?}");
    fs::write(Path::new(copy).join("more\u{1b}[2J"), "x").unwrap();
    let added = elsewhere(&[]);
    assert_eq!(added.code, 1, "{added:?}");
    assert!(
        added.out.contains("NOT as it was taken") && !added.out.contains('\u{1b}'),
        "{added:?}"
    );

    // What is changed on the node is found there, too.
    fs::write(case.join("takes/0001/container.json"), "{}").unwrap();
    let changed = node.run(&["evidence", "verify", "1c1c"]);
    assert_eq!(changed.code, 1, "{changed:?}");
    assert!(changed.out.contains("container.json was changed"), "{changed:?}");
    let removed = node.run(&["evidence", "rm", "1c1c"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    assert!(!case.exists());
    let listed = node.run(&["evidence", "ls"]);
    assert_eq!((listed.code, listed.err.as_str()), (0, "no evidence is kept\n"), "{listed:?}");
}

#[test]
fn what_is_no_case_is_an_error_that_names_the_next_step() {
    let (node, case) = with_case("a test");
    for command in ["show", "verify", "rm"] {
        for name in ["ffff\u{1b}[2J", "1c", ""] {
            let refused = node.run(&["evidence", command, name]);
            assert_eq!(refused.code, 2, "{command} {name}: {refused:?}");
            assert!(refused.err.contains("(see: driftd evidence ls)"), "{refused:?}");
            assert!(!refused.err.contains('\u{1b}'), "{refused:?}");
        }
    }
    let nowhere = node.run(&["evidence", "verify", "/nowhere/at/all"]);
    assert_eq!(nowhere.code, 2, "{nowhere:?}");
    assert!(nowhere.err.contains("cannot read the directory /nowhere/at/all"), "{nowhere:?}");
    let failed = node.run(&["evidence", "export", "1c1c", "-o", "/nowhere/x"]);
    assert_eq!(failed.code, 2, "{failed:?}");
    fs::remove_file(case.join("manifest.json")).unwrap();
    let shown = node.run(&["evidence", "show", "1c1c"]);
    assert_eq!(shown.code, 2, "{shown:?}");
    let part = case.parent().unwrap().join("../x.tar.zst");
    let failed = node.run(&["evidence", "export", "1c1c", "-o", part.to_str().unwrap()]);
    assert!(failed.code == 2 && failed.err.contains("manifest.json"), "{failed:?}");
    let left = fs::read_dir(part.parent().unwrap()).unwrap();
    let names = left.map(|one| one.unwrap().file_name().into_string().unwrap());
    let left = names.filter(|name| name.contains(".tar.zst"));
    assert_eq!(left.count(), 0, "nothing is left of a failed export");
    for arguments in [&["take"][..], &["take", "web", "--reason", ""], &["export", "1c1c"], &["rm"]]
    {
        let refused = node.run(&[&["evidence"], arguments].concat());
        assert_eq!(refused.code, 64, "{arguments:?}: {refused:?}");
    }
}

#[test]
fn evidence_is_asked_for_by_container_or_finding() {
    let node = Node::start();
    let begun = Instant::now();
    let taken = node.run(&["evidence", "take", "web", "--reason", "a test", "-o", "json"]);
    assert_eq!(taken.code, 0, "{taken:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    let json: Value = serde_json::from_str(&taken.out).unwrap();
    assert_eq!(json["outcome"]["action"], "evidence");
    let refused = node.run(&["evidence", "take", "nothing"]);
    assert_eq!(refused.code, 2, "{refused:?}");
}
