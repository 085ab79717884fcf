//! Listing, comparing, verifying and removing baselines.

use std::fs;

use driftd::baseline;
use driftd::model::{ChainId, DiffId};

use crate::node::Node;
use crate::program::{Output, driftd, settled};
use crate::samples::{directory, image, shops};

#[test]
fn baselines_are_listed_and_shown_with_how_they_are_known() {
    let node = Node::with_shops();
    node.run_both(&["baseline", "ls", "-o", "json"]);
    insta::assert_snapshot!(settled(&node.run(&["baseline", "ls"]).out));
    insta::assert_snapshot!(settled(&node.run_both(&["baseline", "show", "shop:1"]).out));
    let json = node.run_both(&["baseline", "show", "shop:2", "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["known_by"], "verified");
    assert_eq!(json["verified_at"], "2026-11-22T01:00:00Z");
    assert_eq!(json["proofs"][0]["layer"], json["layers"][0]);
    let unknown = node.run_both(&["baseline", "show", "no:1"]);
    assert_eq!(unknown.code, 2);
    assert!(unknown.err.contains("driftd baseline ls"), "{}", unknown.err);
}

#[test]
fn images_are_compared_by_their_files() {
    let node = Node::with_shops();
    let differ = node.run_both(&["baseline", "diff", "shop:1", "shop:2"]);
    assert_eq!(differ.code, 1);
    insta::assert_snapshot!(differ.out + &differ.err);
    let same = node.run_both(&["baseline", "diff", "shop:1", "shop:1"]);
    assert_eq!((same.code, same.err.as_str()), (0, "shop:1 and shop:1 hold the same files\n"));
    let unknown = node.run_both(&["baseline", "diff", "shop:1", "no:1"]);
    assert_eq!((unknown.code, unknown.out.as_str()), (2, ""));

    let lines = node.run_both(&["baseline", "diff", "shop:1", "shop:2", "-o", "jsonl"]).out;
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let changes: Vec<(&str, &str)> = lines
        .iter()
        .map(|line| (line["change"].as_str().unwrap(), line["path"].as_str().unwrap()))
        .collect();
    assert_eq!(
        changes,
        [
            ("modified", "/bin/lnk"),
            ("metadata", "/bin/ls"),
            ("added", "/bin/new\u{1b}[2J"),
            ("removed", "/bin/old"),
            ("modified", "/bin/sh"),
        ]
    );
    assert_eq!(lines[0]["a"]["link_target"], "sh");
    assert_eq!(lines[4]["b"]["blake3"], baseline::blake3_of("other").to_string());
}

#[test]
fn verify_reports_differences_by_its_exit_code() {
    let node = Node::start_filled(tempfile::tempdir().unwrap(), |store| {
        shops(store);
        image(store, 3, "bare:1", vec![directory("/")]);
        image(store, 4, "gone:1", vec![directory("/")]);
    });
    let good = node.run(&["baseline", "verify", "shop:1"]);
    assert_eq!((good.code, good.err.as_str()), (0, ""), "{good:?}");
    assert_eq!(node.run(&["baseline", "verify", "shop:2"]).code, 0, "its blob is unchanged");

    let tampered = node.run(&["baseline", "verify", "shop:2", "--deep"]);
    assert_eq!(tampered.code, 1);
    insta::assert_snapshot!(tampered.out);
    let unproved = node.run(&["baseline", "verify", "bare:1"]);
    assert_eq!(unproved.code, 2);
    assert!(unproved.out.starts_with("bare:1: NOT VERIFIED\n"), "{}", unproved.out);
    assert!(unproved.out.contains("containerd discards unpacked layers"), "{}", unproved.out);
    let unchanged = node.run(&["baseline", "verify", "bare:1", "--deep"]);
    assert_eq!(unchanged.code, 0, "its directory is unchanged: {unchanged:?}");
    assert!(unchanged.out.starts_with("bare:1: unchanged (but not verified)\n"), "{unchanged:?}");
    let failed = node.run(&["baseline", "verify", "gone:1"]);
    assert_eq!(failed.code, 2);
    assert!(failed.out.starts_with("gone:1: FAILED\n  the image's \\u{1b}[2J"), "{}", failed.out);
    assert_eq!(node.run(&["baseline", "verify", "no:1"]).code, 2);

    let all = node.run(&["baseline", "verify", "--deep", "-o", "jsonl"]);
    assert_eq!(all.code, 1, "a difference outranks a failure");
    let results: Vec<(String, String)> = all
        .out
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|line| {
            assert_eq!(line["schema"], "driftd.baseline_verification/v1");
            (line["image"].as_str().unwrap().into(), line["result"].as_str().unwrap().into())
        })
        .collect();
    let result = |image: &str, result: &str| (image.to_owned(), result.to_owned());
    assert_eq!(
        results,
        [
            result("bare:1", "same"),
            result("gone:1", "failed"),
            result("shop:1", "same"),
            result("shop:2", "differs"),
        ]
    );
    let json = node.run(&["baseline", "verify", "shop:2", "--deep", "-o", "json"]).out;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let layer = &json[0]["layers"][0];
    assert_eq!(layer["directory"]["state"], "differs");
    assert_eq!(layer["directory"]["differences"], 3);
    assert_eq!(layer["differences"][0]["found"]["mode"], "4755");
    assert_eq!(layer["differences"][1]["change"], "added");
}

#[test]
fn verify_reports_a_damaged_store() {
    let node = Node::with_shops();
    let store = node.dir.path().join("state/baselines");
    let verify =
        || Output::of(driftd(&["baseline", "verify", "--store"]).arg(&store).output().unwrap());
    assert_eq!(verify().code, 0);
    let layer = store.join(format!("layers/{}.layer", DiffId([1; 32]).hex()));
    let whole = fs::read(&layer).unwrap();
    fs::write(&layer, &whole[..whole.len() / 2]).unwrap();
    let cut = verify();
    assert_eq!(cut.code, 2);
    assert!(cut.out.contains("shop:1: FAILED"), "{}", cut.out);
    assert!(cut.out.contains("shop:2: verified"), "{}", cut.out);
    assert!(layer.exists(), "reading moves no file away");
}

#[test]
fn baselines_are_removed_and_pruned() {
    let node = Node::with_shops();
    let removed = node.run(&["baseline", "rm", "shop:1"]);
    assert_eq!((removed.code, removed.out), (0, format!("{}\n", ChainId([1; 32]))));
    assert!(removed.err.contains("shop:1 is still an image"), "{}", removed.err);
    assert_eq!(node.run(&["baseline", "show", "shop:1"]).code, 2);
    assert_eq!(node.run(&["baseline", "rm", "shop:1"]).code, 2);
    let pruned = node.run(&["baseline", "prune"]);
    assert_eq!((pruned.code, pruned.err.as_str()), (0, ""));
    assert_eq!(pruned.out, "forgot 0 images and 0 layers, 0 B on disk\n");
    assert_eq!(node.run(&["baseline", "show", "shop:2"]).code, 0, "it has a name");
}
