//! The daemon while it records: crashes, disks that fill, pulls that are cancelled,
//! directories that vanish. No wrong baseline is kept, and recording goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::image::{Digests, Image, Layer, Packing};
use crate::node::{Node, talk, wait_for};
use crate::sources::{export_equals_mount, layer_in};
use crate::{test_alone, test_of_recording};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_of_recording("kill_9_while_an_image_is_recorded_is_recovered_from", killed),
        test_of_recording("a_directory_removed_while_it_is_read_does_no_harm", removed),
        test_of_recording("a_full_disk_is_reported_and_recovered_from", disk_full),
        test_alone("many_pulls_at_once_are_all_recorded", "", many_pulls),
        test_alone("a_cancelled_import_leaves_nothing_wrong", "", cancelled),
        test_alone("an_image_removed_while_it_is_recorded_does_no_harm", "", image_removed),
    ]
}

/// Content that differs for every seed and cannot be packed.
fn noise(seed: &str, bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut noise);
    noise
}

/// `files` different files of `size` bytes.
fn bulk(seed: &str, files: usize, size: usize) -> Layer {
    (0..files).fold(Layer::new().directory("/bulk", 0o755), |layer, number| {
        let content = noise(&format!("{seed} {number}"), size);
        layer.file(format!("/bulk/{number}"), 0o755, &content)
    })
}

const BIG: &str = "registry.test/big:1";

/// An image that takes a while: three layers of 40 MB.
fn write_big(node: &Node, seed: &str) -> anyhow::Result<(PathBuf, Digests)> {
    let file = node.path("big.tar");
    let image = (0..3).fold(Image::new(BIG), |image, layer| {
        image.layer(bulk(&format!("{seed} {layer}"), 40, 1 << 20), Packing::Plain)
    });
    let digests = image.write(&file)?;
    Ok((file, digests))
}

/// Files that a writer has not finished, wherever they are below the store.
fn unfinished(store: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    for directory in ["layers", "images", "proofs"] {
        let Ok(entries) = fs::read_dir(store.join(directory)) else { continue };
        for entry in entries {
            let path = entry?.path();
            let known = path
                .extension()
                .is_some_and(|extension| extension == "layer" || extension == "json");
            if !known {
                left.push(path);
            }
        }
    }
    Ok(left)
}

/// Makes sure that the image's baseline is whole, proved, and equal to what `b3sum` reads.
fn is_right(node: &Node, image: &str) -> anyhow::Result<()> {
    node.wait_until_known_as(image, "verified")?;
    export_equals_mount(node, image)?;
    let left = unfinished(&node.store())?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

fn killed(node: &Node) -> anyhow::Result<()> {
    let (file, _) = write_big(node, "killed")?;
    node.import(&file)?;
    // At several points of the recording, which takes some hundred milliseconds.
    let mut cut_short = 0;
    for milliseconds in [0, 40, 150, 400, 800] {
        node.start_driftd()?;
        thread::sleep(Duration::from_millis(milliseconds));
        let known = node.baseline_of(BIG)?;
        cut_short += u32::from(known.is_none_or(|known| known["known_by"] != "verified"));
        node.crash_driftd()?;
    }
    ensure!(cut_short > 0, "it was done before the first kill: a vacuous test");
    node.start_driftd()?;
    is_right(node, BIG)
}

fn removed(node: &Node) -> anyhow::Result<()> {
    let (file, digests) = write_big(node, "removed")?;
    node.import(&file)?;
    let snapshots = node.path("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let mut directories: Vec<PathBuf> = fs::read_dir(&snapshots)?
        .map(|entry| Ok(entry?.path().join("fs/bulk")))
        .collect::<anyhow::Result<_>>()?;
    directories.retain(|directory| directory.is_dir());
    assert_eq!(directories.len(), 3);
    node.start_driftd()?;
    for directory in &directories {
        for number in (0..40).step_by(2) {
            fs::remove_file(directory.join(number.to_string()))?;
        }
    }
    // The blobs decide what the image holds, whatever was found in the directories.
    node.wait_until_known_as(BIG, "verified")?;
    let store = node.record_archive(&file)?;
    for diff_id in &digests.diff_ids {
        ensure!(
            layer_in(&node.store(), diff_id)? == layer_in(&store, diff_id)?,
            "the baseline of {diff_id} is not the image's"
        );
    }
    // A verification reports what is missing.
    let (code, answers) = node.verify(&[BIG, "--deep"])?;
    assert_eq!(code, 1, "{answers:#?}");
    wait_for("the findings", || {
        let reported = node.answer(&["findings", "--kind", "baseline.tampered"])?;
        Ok((reported.len() >= 40).then_some(()))
    })
}

fn disk_full(node: &Node) -> anyhow::Result<()> {
    let state = node.path("driftd");
    fs::create_dir_all(&state)?;
    mount_tmpfs(&state, "1m")?;
    node.start_driftd()?;
    // A baseline of this image needs more than there is.
    let file = node.path("many.tar");
    let name = "registry.test/many-files:1";
    Image::new(name).layer(bulk("many", 12_000, 16), Packing::Plain).write(&file)?;
    node.import(&file)?;
    let problem = wait_for("the problem to be reported", || {
        let status = node.status()?;
        let problems = status["problems"].as_array().context("no problems")?;
        let text = |problem: &Value| problem.as_str().unwrap_or_default().to_owned();
        Ok(problems.iter().map(text).find(|text| text.contains("space")))
    })?;
    ensure!(problem.contains("baseline") || problem.contains(name), "{problem}");
    ensure!(node.baseline_of(name)?.is_none(), "it is kept although there was no room");

    mount_tmpfs(&state, "64m")?;
    let recorded = node.driftd(&["baseline", "record", name])?;
    ensure!(recorded.status.success(), "{}", talk(&recorded));
    is_right(node, name)?;
    node.wait_until_complete()
}

/// Mounts a small disk; if it is mounted already, its size is changed.
fn mount_tmpfs(directory: &Path, size: &str) -> anyhow::Result<()> {
    let is_mounted = fs::read_to_string("/proc/self/mounts")?
        .lines()
        .any(|line| line.split(' ').nth(1) == directory.to_str());
    let options = format!("size={size}{}", if is_mounted { ",remount" } else { "" });
    let output = Command::new("mount")
        .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
        .arg(directory)
        .output()?;
    ensure!(output.status.success(), "{}", talk(&output));
    Ok(())
}

fn wait_until_recorded(node: &Node) -> anyhow::Result<()> {
    wait_for("the queue to be empty", || {
        let queue = node.status()?["baseline_queue"].clone();
        let empty = ["recording", "waiting", "verifying"].iter().all(|name| queue[*name] == 0);
        Ok(empty.then_some(()))
    })
}

const PULLS: usize = 24;

fn many_pulls(node: &Node) -> anyhow::Result<()> {
    let name = |number: usize| format!("registry.test/pulled-{number}:1");
    let mut files = Vec::new();
    for number in 0..PULLS {
        let file = node.path(&format!("pulled-{number}.tar"));
        // A layer that all of them share, and one of its own.
        Image::new(&name(number))
            .layer(bulk("shared", 20, 64 << 10), Packing::Gzip)
            .layer(bulk(&format!("own {number}"), 8, 64 << 10), Packing::Zstd)
            .write(&file)?;
        files.push(file);
    }
    let done = AtomicBool::new(false);
    let busy = thread::scope(|scope| -> anyhow::Result<u32> {
        let watcher = scope.spawn(|| -> anyhow::Result<u32> {
            let mut busy = 0;
            while !done.load(Ordering::SeqCst) {
                let queue = node.status()?["baseline_queue"].clone();
                let number = |name: &str| queue[name].as_u64().context("no queue in the status");
                let waits = number("recording")? + number("waiting")? + number("verifying")?;
                busy += u32::from(waits > 0);
            }
            Ok(busy)
        });
        let imports: Vec<_> = (0..4)
            .map(|lane| {
                let files = &files;
                scope.spawn(move || -> anyhow::Result<()> {
                    for file in files.iter().skip(lane).step_by(4) {
                        node.import(file)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let imported: anyhow::Result<Vec<()>> =
            imports.into_iter().map(|import| import.join().expect("no panic")).collect();
        let recorded = imported.and_then(|_| {
            (0..PULLS).try_for_each(|number| {
                node.wait_until_known_as(&name(number), "verified").map(drop)
            })
        });
        done.store(true, Ordering::SeqCst);
        let busy = watcher.join().expect("no panic");
        recorded?;
        busy
    })?;
    ensure!(busy > 0, "the queue was never seen at work");
    wait_until_recorded(node)?;
    // The shared layer was recorded once.
    let layers = fs::read_dir(node.store().join("layers"))?.count();
    assert_eq!(layers, 3 + 1 + PULLS, "the workbench's, the shared one and each its own");
    let lost = node.losses("baseline_backlog_full")?;
    ensure!(lost == 0, "the queue was full {lost} times");
    Ok(())
}

fn cancelled(node: &Node) -> anyhow::Result<()> {
    let (file, _) = write_big(node, "cancelled")?;
    for milliseconds in [50, 200, 500] {
        let mut import = node
            .ctr_command(&["images", "import", &file.to_string_lossy()])?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        thread::sleep(Duration::from_millis(milliseconds));
        kill(Pid::from_raw(import.id().try_into()?), Signal::SIGKILL)?;
        import.wait()?;
    }
    // A whole image may be recorded by now; a partial one must not be.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(2) {
        if node.baseline_of(BIG)?.is_some_and(|known| known["known_by"] == "verified") {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    let (code, answers) = node.verify(&[])?;
    ensure!(code != 1, "a cancelled import is taken for drift: {answers:#?}");
    node.import(&file)?;
    is_right(node, BIG)
}

fn image_removed(node: &Node) -> anyhow::Result<()> {
    let (file, _) = write_big(node, "image removed")?;
    for _ in 0..3 {
        node.import(&file)?;
        node.ctr(&["images", "rm", "--sync", BIG])?;
    }
    wait_until_recorded(node)?;
    let reported = node.answer(&["findings", "--kind", "baseline.tampered"])?;
    ensure!(reported.is_empty(), "an image that went away is taken for drift: {reported:#?}");
    node.import(&file)?;
    is_right(node, BIG)
}
