//! A layer read from its blob, decompressed, proved and hashed file by file, beside
//! the decompressor's own program and `sha256sum`, which only prove it. Rounds
//! alternate, so that other work of the machine affects both; the ratio is the median of the
//! rounds' ratios.
//!
//! `DRIFTD_BENCH_TREE=/usr/lib` measures a layer of that tree instead of a made-up
//! one, `DRIFTD_BENCH_ROUNDS` sets the rounds.

#![allow(clippy::print_stdout)]

mod cost;

use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::{Context as _, bail};
use driftd::baseline::stream::{Limits, read};
use nix::sys::resource::UsageWho;

use cost::{Cost, measure, median, memory};

/// How a layer is compressed, and the program that undoes it.
const COMPRESSIONS: [(&str, &[&str], &str); 2] = [
    ("gzip", &["gzip", "-6", "-c"], "gzip -dc"),
    ("zstd", &["zstd", "-3", "-q", "-c"], "zstd -qdc"),
];

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` wants to know only that this runs.
    let quick = !std::env::args().any(|argument| argument == "--bench");
    let rounds = match std::env::var("DRIFTD_BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse().context("DRIFTD_BENCH_ROUNDS is no number")?,
        Err(_) if quick => 1,
        Err(_) => 9,
    };
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let plain = scratch.path().join("layer.tar");
    make_layer(&plain, if quick { 200 } else { 8_000 })?;
    println!(
        "reading a layer of {} MB from its blob, {rounds} rounds, warm",
        size(&plain)? / 1_000_000
    );
    println!(
        "{:<44} {:>8} {:>8} {:>12} {:>12}",
        "", "wall s", "cpu s", "driftd wall×", "driftd cpu×"
    );
    for (name, compress, decompress) in COMPRESSIONS {
        let blob = scratch.path().join(format!("layer.{name}"));
        let status = Command::new(compress[0])
            .args(&compress[1..])
            .stdin(File::open(&plain)?)
            .stdout(File::create(&blob)?)
            .status();
        if status.is_ok_and(|status| status.success()) {
            compare(name, &blob, decompress, rounds)?;
        } else {
            println!("{name} is not here: nothing to compare with (try: apt-get install {name})");
        }
    }
    #[allow(clippy::cast_precision_loss)]
    let peak = memory("VmHWM")? as f64 / 1e6;
    println!("peak memory of driftd, with all entries: {peak:.1} MB");
    Ok(())
}

fn compare(name: &str, blob: &Path, decompress: &str, rounds: u32) -> anyhow::Result<()> {
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    let (mut diff_id, mut entries) = (String::new(), 0);
    // The first round only brings the blob into the page cache.
    for round in 0..=rounds {
        let our_cost = measure(UsageWho::RUSAGE_SELF, || {
            let limits = Limits { bytes: u64::MAX, entries: u64::MAX };
            let stream = read(File::open(blob)?, &limits, None, &AtomicBool::new(false))?;
            diff_id = stream.diff_id.hex();
            entries = stream.settle(None)?.len();
            Ok(())
        })?;
        let mut sum = String::new();
        let their_cost = measure(UsageWho::RUSAGE_CHILDREN, || {
            let output = Command::new("sh")
                .args(["-c", &format!("{decompress} \"$0\" | sha256sum")])
                .arg(blob)
                .stderr(Stdio::inherit())
                .output()?;
            sum = String::from_utf8(output.stdout)?;
            Ok(())
        })?;
        if !sum.starts_with(&diff_id) {
            bail!("{decompress} | sha256sum prints {sum}, driftd has {diff_id}");
        }
        if round > 0 {
            ours.push(our_cost);
            theirs.push(their_cost);
        }
    }
    let ratio = |of: fn(&Cost) -> Duration| {
        let pairs = ours.iter().zip(&theirs);
        median(pairs.map(|(a, b)| of(a).as_secs_f64() / of(b).as_secs_f64()).collect())
    };
    let line = format!("driftd: {name} blob of {} MB, {entries} entries", size(blob)? / 1_000_000);
    println!(
        "{line:<44} {:>8.3} {:>8.3}",
        seconds(&ours, |cost| cost.wall),
        seconds(&ours, |cost| cost.cpu)
    );
    println!(
        "{:<44} {:>8.3} {:>8.3} {:>12.2} {:>12.2}",
        format!("{decompress} | sha256sum"),
        seconds(&theirs, |cost| cost.wall),
        seconds(&theirs, |cost| cost.cpu),
        ratio(|cost| cost.wall),
        ratio(|cost| cost.cpu),
    );
    Ok(())
}

/// An archive with sizes as in a distribution's /usr (most files are small, most
/// bytes are in few) and with content that compresses about as programs do.
fn make_layer(path: &Path, files: u64) -> anyhow::Result<()> {
    let mut archive = tar::Builder::new(BufWriter::new(File::create(path)?));
    if let Some(tree) = std::env::var_os("DRIFTD_BENCH_TREE") {
        archive.follow_symlinks(false);
        archive.append_dir_all(".", PathBuf::from(tree))?;
    } else {
        let mut words = vec![0; 64 << 10];
        blake3::Hasher::new().update(b"words").finalize_xof().fill(&mut words);
        let mut noise = blake3::Hasher::new().update(b"driftd").finalize_xof();
        let mut random = || {
            let mut bytes = [0; 8];
            noise.fill(&mut bytes);
            u64::from_le_bytes(bytes)
        };
        for number in 0..files {
            let size = match random() % 1000 {
                0..600 => random() % (4 << 10),
                600..850 => (4 << 10) + random() % (12 << 10),
                850..974 => (16 << 10) + random() % (112 << 10),
                974..999 => (128 << 10) + random() % (896 << 10),
                _ => (1 << 20) + random() % (7 << 20),
            };
            let size = usize::try_from(size)?;
            let mut content = Vec::with_capacity(size + 64);
            while content.len() < size {
                let at = usize::try_from(random() % (64 << 10))?;
                let length = usize::try_from(random() % 24)?;
                content.extend_from_slice(&words[at..(at + length).min(words.len())]);
                content.extend_from_slice(&random().to_le_bytes()[..3]);
            }
            content.truncate(size);
            let mut header = tar::Header::new_gnu();
            header.set_size(size as u64);
            header.set_mode(0o644);
            let name = format!("usr/lib/{}/{}/file-{number}", number / 800, number / 20);
            archive.append_data(&mut header, name, &content[..])?;
        }
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

fn size(path: &Path) -> anyhow::Result<u64> {
    Ok(fs::metadata(path)?.len())
}

fn seconds(costs: &[Cost], of: fn(&Cost) -> Duration) -> f64 {
    median(costs.iter().map(|cost| of(cost).as_secs_f64()).collect())
}
