//! How a baseline is known: proved by the blobs, compared with the directories. And what is
//! reported when one of them has changed.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::{Digests, Image, Layer, Packing};
use crate::node::{KUBERNETES, Node, SETTLE, Setup, bench, only, summaries, talk, wait_for};
use crate::programs::WORKBENCH;
use crate::{registry, test, test_alone, test_on};

const DISCARDING: Setup = Setup {
    driftd: "",
    cri: Some("discard_unpacked_layers = true"),
    own_runtime: false,
    unwatched: None,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a_baseline_is_proved_by_its_blobs_and_directories", proved),
        test_alone("a38_a_layer_changed_after_the_start_is_reported_when_it_runs", "", a38_after),
        test_alone("a38_a_layer_changed_before_the_start_is_reported_when_it_runs", "", a38_before),
        test_alone("a38_a_changed_layer_is_found_by_verify", "", a38_verify),
        test_alone("a_changed_layer_without_a_container_is_found_by_verify", "", without_container),
        test_alone(
            "a_changed_layer_is_found_by_the_periodic_recheck",
            "[baseline]\nrecheck_period = \"10s\"",
            recheck,
        ),
        test_alone("the_same_layers_in_two_namespaces_are_watched_separately", "", two_namespaces),
        test_on("discarded_blobs_are_a_stated_reason", DISCARDING, discarded),
        test_alone("removed_blobs_are_a_stated_reason", "", blobs_removed),
        test_alone("a_wrong_blob_is_reported_and_proves_nothing", "", wrong_blob),
        test_alone("a_baseline_that_a_container_uses_is_not_removed", "", in_use),
    ]
}

fn proved(node: &Node) -> anyhow::Result<()> {
    node.wait_until_known_as(WORKBENCH, "verified")?;
    let (code, answers) = node.verify(&[WORKBENCH])?;
    assert_eq!(code, 0, "{answers:#?}");
    assert_eq!(results(&answers), ["same"], "{answers:#?}");

    let (code, answers) = node.verify(&[WORKBENCH, "--deep"])?;
    assert_eq!(code, 0, "{answers:#?}");
    let [answer] = &answers[..] else { anyhow::bail!("not one answer: {answers:#?}") };
    assert_eq!(answer["known_by"], "verified", "{answer:#}");
    let layers = answer["layers"].as_array().context("no layers")?;
    assert_eq!(layers.len(), 3, "{answer:#}");
    for layer in layers {
        assert_eq!(layer["blob"]["state"], "same", "{layer:#}");
        assert_eq!(layer["directory"]["state"], "same", "{layer:#}");
        assert_eq!(layer["differences"], Value::Array(Vec::new()), "{layer:#}");
    }
    Ok(())
}

fn results(answers: &[Value]) -> Vec<&str> {
    answers.iter().filter_map(|answer| answer["result"].as_str()).collect()
}

// ---- a layer's directory changes

/// The file of the image that containerd has unpacked, wherever it keeps it. `nth`
/// counts the copies, oldest first.
fn unpacked(node: &Node, path: &str, nth: usize) -> anyhow::Result<PathBuf> {
    let snapshots = node.path("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(&snapshots)? {
        let entry = entry?;
        let file = entry.path().join("fs").join(path.trim_start_matches('/'));
        if file.is_file() {
            found.push((entry.file_name().to_string_lossy().parse()?, file));
        }
    }
    found.sort();
    let file = found.into_iter().nth(nth).map(|(_, file)| file);
    file.with_context(|| format!("{path} is not below {}", snapshots.display()))
}

/// Changes the last byte of a file. Its size and its time of modification stay.
fn flip(file: &Path) -> anyhow::Result<()> {
    let before = fs::metadata(file)?;
    let open = fs::File::options().read(true).write(true).open(file)?;
    let last = before.len() - 1;
    let mut byte = [0];
    open.read_exact_at(&mut byte, last)?;
    open.write_all_at(&[byte[0] ^ 1], last)?;
    open.set_modified(before.modified()?)?;
    Ok(())
}

fn a38_after(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("/usr/bin/curl; /usr/bin/app")?;
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    container.sh("/usr/bin/curl; /usr/bin/app")?;
    let findings = container.expect_findings(&["critical exec.modified /usr/bin/curl"])?;
    let modified = only(&findings, "exec.modified")?;
    assert_eq!(modified["expected"]["path"], "/usr/bin/curl", "{modified:#}");
    assert_eq!(modified["expected"]["size"], modified["file"]["size"], "{modified:#}");
    assert_ne!(modified["expected"]["blake3"], modified["file"]["blake3"], "{modified:#}");
    Ok(())
}

fn a38_before(node: &Node) -> anyhow::Result<()> {
    node.wait_until_known_as(WORKBENCH, "verified")?;
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    let container = node.container()?;
    container.sh("/usr/bin/app; /usr/bin/curl")?;
    container.expect_findings(&["critical exec.modified /usr/bin/curl"]).map(drop)
}

/// The findings about layers, of a container or of none.
fn tampered(node: &Node) -> anyhow::Result<Vec<Value>> {
    node.answer(&["findings", "--kind", "baseline.tampered"])
}

fn a38_verify(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let other = node.container()?;
    node.wait_until_known_as(WORKBENCH, "verified")?;
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    // The blobs are as they were, so only reading the directories can find it.
    let (code, answers) = node.verify(&[WORKBENCH])?;
    assert_eq!((code, results(&answers)), (0, vec!["same"]), "{answers:#?}");

    let (code, answers) = node.verify(&[WORKBENCH, "--deep"])?;
    assert_eq!((code, results(&answers)), (1, vec!["differs"]), "{answers:#?}");
    let layers = answers[0]["layers"].as_array().context("no layers")?;
    let differing: Vec<&Value> =
        layers.iter().filter(|layer| layer["result"] == "differs").collect();
    let [layer] = differing[..] else { anyhow::bail!("not one layer: {layers:#?}") };
    assert_eq!(layer["blob"]["state"], "same", "{layer:#}");
    assert_eq!(layer["directory"]["state"], "differs", "{layer:#}");
    let differences = layer["differences"].as_array().context("no differences")?;
    assert_eq!(differences.len(), 1, "{layer:#}");
    assert_eq!(differences[0]["path"], "/usr/bin/curl", "{layer:#}");
    assert_eq!(differences[0]["change"], "modified", "{layer:#}");

    // The image is still what it was, and both containers have a finding.
    for container in [&container, &other] {
        container.expect_findings(&["critical baseline.tampered /usr/bin/curl"])?;
    }
    let reported = tampered(node)?;
    assert_eq!(reported.len(), 2, "{reported:#?}");

    // Put back, it is clean again, and nothing is reported twice.
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    let (code, answers) = node.verify(&[WORKBENCH, "--deep"])?;
    assert_eq!((code, results(&answers)), (0, vec!["same"]), "{answers:#?}");
    assert_eq!(tampered(node)?.len(), 2);
    Ok(())
}

fn without_container(node: &Node) -> anyhow::Result<()> {
    node.wait_until_known_as(WORKBENCH, "verified")?;
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    let (code, answers) = node.verify(&["--deep"])?;
    assert_eq!((code, results(&answers)), (1, vec!["differs"]), "{answers:#?}");
    let reported = wait_for("the finding", || {
        let reported = tampered(node)?;
        Ok((!reported.is_empty()).then_some(reported))
    })?;
    assert_eq!(summaries(&reported), ["critical baseline.tampered /usr/bin/curl"], "{reported:#?}");
    assert_eq!(reported[0]["container"], Value::Null, "{reported:#?}");
    Ok(())
}

fn recheck(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    node.wait_until_known_as(WORKBENCH, "verified")?;
    flip(&unpacked(node, "/usr/bin/curl", 0)?)?;
    // No process runs it, and no client asks for a verification.
    container.expect_findings(&["critical baseline.tampered /usr/bin/curl"])?;
    // Found at each round, reported once.
    thread::sleep(Duration::from_secs(12));
    let reported = tampered(node)?;
    assert_eq!(summaries(&reported), ["critical baseline.tampered /usr/bin/curl"], "{reported:#?}");
    Ok(())
}

/// Two namespaces unpack the same layers twice, and only one copy is changed.
fn two_namespaces(node: &Node) -> anyhow::Result<()> {
    let here = node.container()?;
    let file = bench()?.workbench.to_string_lossy();
    node.ctr_in("elsewhere", &["images", "import", &file])?;
    let there = node.container_in("elsewhere", WORKBENCH)?;
    let baselines = node.answer(&["baseline", "ls"])?;
    assert_eq!(baselines.len(), 1, "recorded twice: {baselines:#?}");
    // The second copy is compared in the background; what is changed before that
    // would be found by then.
    wait_for("both copies of each layer to be compared", || {
        let mut compared = Vec::new();
        for proof in fs::read_dir(node.store().join("proofs"))? {
            let proof: Value = serde_json::from_slice(&fs::read(proof?.path())?)?;
            compared.push(proof["directories"].as_array().map_or(0, Vec::len));
        }
        Ok((compared == [2, 2, 2]).then_some(()))
    })?;

    flip(&unpacked(node, "/usr/bin/curl", 1)?)?;
    for container in [&here, &there] {
        container.sh("/usr/bin/curl; /usr/bin/app")?;
    }
    there.expect_findings(&["critical exec.modified /usr/bin/curl"])?;
    here.expect_silence()
}

// ---- blobs that are not there, or not what they should be

/// Waits until every layer of an image has a reason why it is not verified.
fn reasons(node: &Node, image: &str) -> anyhow::Result<Vec<String>> {
    wait_for("the reasons", || {
        let Some(baseline) = node.baseline_of(image)? else { return Ok(None) };
        assert_eq!(baseline["known_by"], "snapshot", "{baseline:#}");
        let proofs = baseline["proofs"].as_array().context("no proofs")?;
        let reasons: Option<Vec<String>> =
            proofs.iter().map(|proof| proof["reason"].as_str().map(str::to_owned)).collect();
        Ok(reasons.filter(|reasons| !reasons.is_empty()))
    })
}

/// Makes sure that nothing is proved, and that nothing is wrong.
fn unproved_but_not_wrong(node: &Node, image: &str) -> anyhow::Result<()> {
    let (code, answers) = node.verify(&[image])?;
    assert_eq!((code, results(&answers)), (2, vec!["unproved"]), "{answers:#?}");
    // The directories can still be compared with what was recorded.
    let (code, answers) = node.verify(&[image, "--deep"])?;
    assert_eq!(code, 0, "{answers:#?}");
    for layer in answers[0]["layers"].as_array().context("no layers")? {
        assert_eq!(layer["blob"]["state"], "unavailable", "{layer:#}");
        ensure!(layer["blob"]["reason"].is_string(), "{layer:#}");
        assert_eq!(layer["directory"]["state"], "same", "{layer:#}");
    }
    assert_eq!(tampered(node)?.len(), 0);
    Ok(())
}

fn discarded(node: &Node) -> anyhow::Result<()> {
    // An image that no other namespace of this node has.
    let file = node.path("discarded.tar");
    let name = "registry.test/discarded:1";
    Image::new(name)
        .layer(Layer::new().file("/bin/one", 0o755, b"#!/bin/sh\necho one\n"), Packing::Gzip)
        .layer(Layer::new().file("/bin/two", 0o755, b"#!/bin/sh\necho two\n"), Packing::Gzip)
        .write(&file)?;
    let name = registry::publish(&file, "shop/discarded:1")?;
    // containerd removes the blobs a moment after the unpack; a quick driftd would have read
    // them by then.
    node.stop_driftd()?;
    node.cri().pull(&name)?;
    let mut left = String::new();
    wait_for("the blobs to be removed", || {
        // Not every version collects garbage by itself after a pull.
        let lease = node.ctr_in(KUBERNETES, &["leases", "create"])?;
        node.ctr_in(KUBERNETES, &["leases", "delete", "--sync", lease.trim()])?;
        left = node.ctr_in(KUBERNETES, &["images", "check", &format!("name=={name}")])?;
        Ok(left.contains("incomplete").then_some(()))
    })
    .with_context(|| left.clone())?;
    node.start_driftd()?;
    for reason in reasons(node, &name)? {
        ensure!(reason.contains("content store"), "{reason}");
    }
    unproved_but_not_wrong(node, &name)
}

/// Imports an image while driftd does not run, and damages it before driftd starts.
fn import_damaged(
    node: &Node,
    name: &str,
    damage: impl FnOnce(&Digests) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    node.stop_driftd()?;
    let file = node.path("damaged.tar");
    let digests = Image::new(name)
        .layer(Layer::new().file("/bin/one", 0o755, b"#!/bin/sh\necho 1\n"), Packing::Gzip)
        .layer(Layer::new().file("/bin/two", 0o755, b"#!/bin/sh\necho 2\n"), Packing::Plain)
        .write(&file)?;
    node.import(&file)?;
    damage(&digests)?;
    node.start_driftd()
}

fn in_use(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let refused = node.driftd(&["baseline", "rm", WORKBENCH])?;
    assert_eq!(refused.status.code(), Some(2), "{}", talk(&refused));
    ensure!(talk(&refused).contains(&container.id), "{}", talk(&refused));
    let metrics = node.driftd(&["metrics"])?;
    // The view is complete only if the container was marked before it began.
    for line in ["driftd_containers{baseline=\"ready\"} 1", "\ndriftd_view_complete "] {
        ensure!(talk(&metrics).contains(line), "no `{line}` in {}", talk(&metrics));
    }

    let name = "registry.test/unused:1";
    let file = node.path("unused.tar");
    let layer = Layer::new().file("/bin/unused", 0o755, b"#!/bin/sh\n");
    Image::new(name).layer(layer, Packing::Gzip).write(&file)?;
    node.import(&file)?;
    node.wait_until_known_as(name, "verified")?;
    let removed = node.driftd(&["baseline", "rm", name])?;
    ensure!(removed.status.success(), "{}", talk(&removed));
    ensure!(node.baseline_of(name)?.is_none(), "{name} is still there");
    let pruned = node.driftd(&["baseline", "prune"])?;
    ensure!(pruned.status.success(), "{}", talk(&pruned));
    ensure!(node.baseline_of(WORKBENCH)?.is_some(), "a baseline in use was pruned");
    container.expect_silence()
}

fn blobs_removed(node: &Node) -> anyhow::Result<()> {
    let name = "registry.test/without-blobs:1";
    import_damaged(node, name, |digests| {
        for layer in &digests.layers {
            node.ctr(&["content", "rm", layer])?;
        }
        // containerd removes the files later, and until then each is still a blob.
        let lease = node.ctr(&["leases", "create"])?;
        node.ctr(&["leases", "delete", "--sync", lease.trim()])?;
        let blobs = node.path("root/io.containerd.content.v1.content/blobs/sha256");
        let files = digests.layers.iter().map(|layer| layer.trim_start_matches("sha256:"));
        wait_for("the blobs to be removed", || {
            Ok(files.clone().all(|hex| !blobs.join(hex).exists()).then_some(()))
        })
    })?;
    for reason in reasons(node, name)? {
        ensure!(reason.contains("content store"), "{reason}");
    }
    unproved_but_not_wrong(node, name)
}

fn wrong_blob(node: &Node) -> anyhow::Result<()> {
    let name = "registry.test/wrong-blob:1";
    let mut wrong = Vec::new();
    import_damaged(node, name, |digests| {
        let blobs = node.path("root/io.containerd.content.v1.content/blobs/sha256");
        for layer in &digests.layers {
            let hex = layer.trim_start_matches("sha256:");
            let blob = blobs.join(hex);
            flip(&blob).with_context(|| format!("no {}", blob.display()))?;
            wrong.push(hex.to_owned());
        }
        Ok(())
    })?;
    for (reason, digest) in reasons(node, name)?.iter().zip(&wrong) {
        ensure!(reason.contains(digest) || reason.contains("sha256"), "{reason}");
    }
    // The containers use the directories, which are as they were.
    let (code, answers) = node.verify(&[name, "--deep"])?;
    for layer in answers[0]["layers"].as_array().context("no layers")? {
        assert_eq!(layer["directory"]["state"], "same", "{layer:#}");
        ensure!(layer["blob"]["state"] != "same", "{layer:#}");
        ensure!(layer["known_by"] == "snapshot", "{layer:#}");
    }
    ensure!(code == 0 || code == 1, "{code}: {answers:#?}");
    let shown = node.driftd(&["baseline", "verify", name, "--deep"])?;
    ensure!(talk(&shown).contains("sha256"), "{}", talk(&shown));
    thread::sleep(SETTLE);
    Ok(())
}
