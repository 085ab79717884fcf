//! Recording baselines from archives, without a daemon.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use driftd::baseline::Store;
use driftd::model::ManifestDigest;

use crate::program::run;

/// The archive of a layer: paths and contents; directories end with a slash.
fn layer_tar(entries: &[(&str, &str)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.set_entry_type(match path.ends_with('/') {
            true => tar::EntryType::Directory,
            false => tar::EntryType::Regular,
        });
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    ManifestDigest(sha2::Sha256::digest(bytes).into()).hex()
}

/// An OCI layout in a directory.
struct Layout(tempfile::TempDir);

impl Layout {
    fn new() -> Layout {
        let layout = Layout(tempfile::tempdir().unwrap());
        fs::create_dir_all(layout.0.path().join("blobs/sha256")).unwrap();
        fs::write(layout.0.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        layout
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    fn blob_path(&self, hex: &str) -> PathBuf {
        self.0.path().join("blobs/sha256").join(hex)
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let hex = sha256(bytes);
        fs::write(self.blob_path(&hex), bytes).unwrap();
        serde_json::json!({
            "mediaType": media_type,
            "digest": format!("sha256:{hex}"),
            "size": bytes.len(),
        })
    }

    /// Adds an image of these layers, gzipped, and returns its descriptor.
    fn image(&self, name: &str, layers: &[Vec<u8>]) -> serde_json::Value {
        let diff_ids: Vec<String> =
            layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(
                "application/vnd.oci.image.config.v1+json",
                config.to_string().as_bytes(),
            ),
            "layers": layers
                .iter()
                .map(|layer| {
                    self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(layer))
                })
                .collect::<Vec<_>>(),
        });
        let mut descriptor = self
            .blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes());
        descriptor["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
        descriptor
    }

    fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.0.path().join("index.json"), index.to_string()).unwrap();
    }
}

fn base_layer() -> Vec<u8> {
    layer_tar(&[("bin/", ""), ("bin/ls", "ls"), ("bin/sh", "sh")])
}

#[test]
fn archives_are_recorded_exported_and_compared_without_a_daemon() {
    let layout = Layout::new();
    let old = layout.image("shop:1", &[base_layer()]);
    let new =
        layout.image("shop:2", &[base_layer(), layer_tar(&[("bin/", ""), ("bin/sh", "changed")])]);
    layout.index(&[old, new]);
    let scratch = tempfile::tempdir().unwrap();
    let store = scratch.path().join("baselines");
    let at = ["--store", store.to_str().unwrap()];
    let offline = |arguments: &[&str]| run(&[arguments, &at].concat());

    let recorded = offline(&["baseline", "record", "--from-archive", layout.path()]);
    assert_eq!((recorded.code, recorded.err.as_str()), (0, ""), "{recorded:?}");
    assert_eq!(
        recorded.out,
        "shop:1: 2 files, 4 B in 1 layers, verified\nshop:2: 2 files, 9 B in 2 layers, verified\n"
    );
    assert_eq!(offline(&["baseline", "verify"]).code, 0);
    let differ = offline(&["baseline", "diff", "shop:1", "shop:2", "-q"]);
    assert_eq!((differ.code, differ.out.as_str()), (1, "/bin/sh\n"), "{differ:?}");

    let rootfs = scratch.path().join("rootfs/bin");
    fs::create_dir_all(&rootfs).unwrap();
    fs::write(rootfs.join("ls"), "ls").unwrap();
    fs::write(rootfs.join("sh"), "changed").unwrap();
    let sums = scratch.path().join("sums");
    fs::write(&sums, offline(&["baseline", "export", "shop:2"]).out).unwrap();
    let checked = Command::new("b3sum")
        .args(["--check", sums.to_str().unwrap()])
        .current_dir(scratch.path().join("rootfs"))
        .output()
        .expect("b3sum is installed by scripts/setup");
    assert_eq!(String::from_utf8_lossy(&checked.stdout), "./bin/ls: OK\n./bin/sh: OK\n");

    // Another store, filled at another time, exports the same bytes.
    let elsewhere = scratch.path().join("elsewhere");
    let elsewhere = ["--store", elsewhere.to_str().unwrap()];
    let again = ["baseline", "record", "--from-archive", layout.path()];
    assert_eq!(run(&[&again[..], &elsewhere].concat()).code, 0);
    for format in ["b3sum", "jsonl", "cyclonedx", "in-toto"] {
        let export = ["baseline", "export", "shop:2", "-o", format];
        let (one, other) = (offline(&export), run(&[&export[..], &elsewhere].concat()));
        assert_eq!((one.code, &one.out), (0, &other.out), "{format}");
    }
}

#[test]
fn a_docker_archive_is_recorded_under_the_given_name() {
    let layer = base_layer();
    let config = serde_json::json!({
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", sha256(&layer))]},
    });
    let manifest = serde_json::json!([
        {"Config": "config.json", "RepoTags": ["shop:saved"], "Layers": ["abc/layer.tar"]},
    ]);
    let mut saved = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("abc/layer.tar", layer.as_slice()),
        ("config.json", config.to_string().as_bytes()),
        ("manifest.json", manifest.to_string().as_bytes()),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        saved.append_data(&mut header, name, bytes).unwrap();
    }
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("saved.tar");
    fs::write(&file, saved.into_inner().unwrap()).unwrap();
    let store = scratch.path().join("baselines");
    let record = |more: &[&str]| {
        let file = file.to_str().unwrap();
        let store = store.to_str().unwrap();
        run(&[&["baseline", "record", "--from-archive", file, "--store", store], more].concat())
    };
    let unknown = record(&["--image", "shop:\u{1b}[2J"]);
    assert_eq!((unknown.code, unknown.out.as_str()), (2, ""));
    assert!(unknown.err.contains("shop:saved"), "{}", unknown.err);
    let recorded = record(&["--image", "shop:saved", "--name", "shop:ci", "-o", "json"]);
    assert_eq!(recorded.code, 0, "{recorded:?}");
    let json: serde_json::Value = serde_json::from_str(&recorded.out).unwrap();
    assert_eq!(json[0]["names"], serde_json::json!(["shop:ci"]));
    assert_eq!(
        (&json[0]["known_by"], &json[0]["manifest_digest"]),
        (&"verified".into(), &().into())
    );

    // The archive has no manifest digest: the statement is about the layer.
    let export = ["baseline", "export", "shop:ci", "-o", "in-toto", "--store"];
    let statement = run(&[&export[..], &[store.to_str().unwrap()]].concat());
    let statement: serde_json::Value = serde_json::from_str(&statement.out).unwrap();
    assert_eq!(statement["subject"][0]["digest"]["sha256"], sha256(&layer));
}

#[test]
fn an_archive_that_differs_from_its_digests_stores_nothing() {
    let layout = Layout::new();
    layout.index(&[layout.image("shop:1", &[base_layer()])]);
    let layer = layout.blob_path(&sha256(&gzip(&base_layer())));
    let whole = fs::read(&layer).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let store = scratch.path().join("baselines");
    let record = || {
        let store = store.to_str().unwrap();
        run(&["baseline", "record", "--from-archive", layout.path(), "--store", store])
    };
    let other = gzip(&layer_tar(&[("bin/", ""), ("bin/ls", "evil")]));
    for damaged in [&whole[..whole.len() / 2], &other] {
        fs::write(&layer, damaged).unwrap();
        let refused = record();
        assert_eq!((refused.code, refused.out.as_str()), (2, ""), "{refused:?}");
        assert!(refused.err.contains("it is damaged, or it was changed"), "{}", refused.err);
        let kept: Vec<_> = fs::read_dir(store.join("layers")).unwrap().collect();
        assert_eq!(kept.len(), 0, "{kept:?}");
    }
    fs::write(&layer, &whole).unwrap();
    assert_eq!(record().code, 0);

    let wrong = ["baseline", "record", "--from-archive", "/dev/null", "--store", "/tmp/x"];
    assert_eq!(run(&wrong).code, 2);
    assert_eq!(run(&wrong[..4]).code, 64, "a directory must be named");
}

#[test]
fn no_other_process_writes_to_a_running_daemons_store() {
    let layout = Layout::new();
    layout.index(&[layout.image("shop:1", &[base_layer()])]);
    let directory = tempfile::tempdir().unwrap();
    let claim = Store::claim(directory.path()).unwrap();
    Store::open(directory.path(), Arc::default()).unwrap();
    let record = || {
        let store = directory.path().to_str().unwrap();
        run(&["baseline", "record", "--from-archive", layout.path(), "--store", store])
    };
    let refused = record();
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("another process writes to"), "{}", refused.err);
    let read = ["baseline", "ls", "--store", directory.path().to_str().unwrap()];
    assert_eq!(run(&read).code, 0, "reading is allowed");
    drop(claim);
    assert_eq!(record().code, 0);
}
