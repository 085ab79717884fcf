//! Exports of baselines, with hostile file names.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use driftd::baseline;
use driftd::model::{DiffId, ManifestDigest, RootfsPath};
use jiff::Timestamp;

use crate::node::Node;
use crate::samples::image;

/// Hostile file names.
const HOSTILE: [&[u8]; 8] = [
    b"plain",
    b"back\\slash",
    b"new\nline",
    b"both\\n\nof\rthem",
    b"re\rturn",
    b" spaces  twice ",
    b"\x1b[2J\"quotes\"",
    b"not-utf8-\xff\xfe",
];

/// A directory of files with odd names, and a node on which it is an image.
fn hostile_node() -> (tempfile::TempDir, Node) {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let rootfs = tempfile::tempdir().unwrap();
    let inside = rootfs.path().join("dir");
    fs::create_dir(&inside).unwrap();
    for (number, name) in HOSTILE.iter().enumerate() {
        fs::write(inside.join(OsStr::from_bytes(name)), format!("content {number}")).unwrap();
    }
    fs::write(inside.join("re\u{fffd}placement"), "x").unwrap();
    std::os::unix::fs::symlink(OsStr::from_bytes(b"to-\xff"), inside.join("link")).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let walked = baseline::walk::walk(
        &pool,
        rootfs.path(),
        None,
        &std::sync::atomic::AtomicBool::new(false),
    );
    let node = Node::start_filled(tempfile::tempdir().unwrap(), |store| {
        image(store, 7, "docker.io/library/odd:1", walked.unwrap().entries);
    });
    (rootfs, node)
}

#[test]
fn b3sum_accepts_its_export() {
    let (rootfs, node) = hostile_node();
    let export = node.run_both(&["baseline", "export", "odd:1"]);
    assert_eq!(export.code, 0);
    assert_eq!(
        export.err,
        "warning: 2 files were left out, because b3sum cannot check names that are not UTF-8 or \
         hold U+FFFD (use -o jsonl)\n"
    );
    let sums = node.dir.path().join("sums");
    fs::write(&sums, &export.out).unwrap();
    let check = || {
        Command::new("b3sum")
            .arg("--check")
            .arg(&sums)
            .current_dir(rootfs.path())
            .output()
            .expect("b3sum is installed by scripts/setup")
    };
    let checked = check();
    assert!(checked.status.success(), "{checked:?}");
    let lines = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(lines.matches(": OK\n").count(), HOSTILE.len() - 1, "{lines}");

    fs::write(rootfs.path().join("dir/new\nline"), "other").unwrap();
    let checked = check();
    assert!(!checked.status.success());
    let lines = String::from_utf8(checked.stdout).unwrap();
    assert!(lines.contains("\\./dir/new\\nline: FAILED"), "{lines}");
}

#[test]
fn exported_jsonl_holds_every_file() {
    let (_rootfs, node) = hostile_node();
    let lines = node.run_both(&["baseline", "export", "odd:1", "-o", "jsonl"]).out;
    let lines: Vec<serde_json::Value> =
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (number, name) in HOSTILE.iter().enumerate() {
        let path = RootfsPath::new([b"/dir/", *name].concat()).unwrap();
        let is_it = |line: &&serde_json::Value| {
            serde_json::from_value::<RootfsPath>((*line).clone()).unwrap() == path
        };
        let found: Vec<_> = lines.iter().filter(is_it).collect();
        let [line] = found[..] else { panic!("{path}: {found:?}") };
        let hash = baseline::blake3_of(&format!("content {number}"));
        assert_eq!(line["blake3"], hash.to_string());
        assert_eq!((&line["file_type"], &line["uid"]), (&"regular".into(), &0.into()));
    }
    let link = lines.iter().find(|line| line["path"] == "/dir/link").unwrap();
    assert_eq!((&link["link_target"], &link["blake3"]), (&"to-\\xff".into(), &().into()));
    assert_eq!(link["link_target_bytes"], "dG8t/w==");
    let all: BTreeSet<String> = lines
        .iter()
        .map(|line| line["path"].to_string() + &line["path_bytes"].to_string())
        .collect();
    assert_eq!(all.len(), lines.len(), "no path is there twice");
}

#[test]
fn a_bom_has_the_fields_its_schema_requires() {
    let (_rootfs, node) = hostile_node();
    let export = node.run_both(&["baseline", "export", "odd:1", "-o", "cyclonedx"]);
    assert_eq!((export.code, export.err.as_str()), (0, ""));
    assert_eq!(export.out, node.run(&["baseline", "export", "odd:1", "-o", "cyclonedx"]).out);
    let bom: serde_json::Value = serde_json::from_str(&export.out).unwrap();
    assert_eq!((&bom["bomFormat"], &bom["specVersion"]), (&"CycloneDX".into(), &"1.6".into()));
    assert_eq!(bom["version"], 1);
    assert!(bom["serialNumber"].as_str().unwrap().starts_with("urn:uuid:"));
    let image = &bom["metadata"]["component"];
    assert_eq!(
        (&image["type"], &image["name"]),
        (&"container".into(), &"docker.io/library/odd:1".into())
    );
    assert_eq!(image["version"], ManifestDigest([7; 32]).to_string());
    assert_eq!(
        image["hashes"],
        serde_json::json!([{"alg": "SHA-256", "content": ManifestDigest([7; 32]).hex()}])
    );
    assert_eq!(
        image["purl"],
        format!(
            "pkg:oci/odd@sha256%3A{}?repository_url=docker.io/library/odd&tag=1",
            ManifestDigest([7; 32]).hex()
        )
    );
    let components = bom["components"].as_array().unwrap();
    assert_eq!(components.len(), HOSTILE.len() + 1, "regular files, and nothing else");
    let mut references: BTreeSet<&str> =
        components.iter().map(|component| component["bom-ref"].as_str().unwrap()).collect();
    references.insert(image["bom-ref"].as_str().unwrap());
    assert_eq!(references.len(), components.len() + 1, "every reference is there once");
    for component in components {
        assert_eq!(component["type"], "file");
        assert!(component["name"].as_str().unwrap().starts_with("/dir/"));
        assert_eq!(component["hashes"][0]["alg"], "BLAKE3");
        assert_eq!(component["hashes"][0]["content"].as_str().unwrap().len(), 64);
    }
}

#[test]
fn an_in_toto_statement_names_the_images_manifest() {
    let (_rootfs, node) = hostile_node();
    let export = node.run_both(&["baseline", "export", "odd:1", "-o", "in-toto"]);
    assert_eq!((export.code, export.err.as_str()), (0, ""));
    let statement: serde_json::Value = serde_json::from_str(&export.out).unwrap();
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    assert_eq!(
        statement["subject"],
        serde_json::json!([{
            "name": "docker.io/library/odd:1",
            "digest": {"sha256": ManifestDigest([7; 32]).hex()},
        }])
    );
    assert_eq!(statement["predicateType"], "urn:driftd:baseline:v1");
    let predicate = &statement["predicate"];
    assert_eq!(predicate["known_by"], "verified");
    assert_eq!(predicate["layers"][0]["id"], DiffId([7; 32]).to_string());
    let files = predicate["files"].as_array().unwrap();
    // The root, the directory, the link, and the files.
    assert_eq!(files.len(), 3 + HOSTILE.len() + 1);
    assert!(!export.out.contains(&Timestamp::now().to_string()[..10]), "no clock is in it");
}
