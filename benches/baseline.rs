//! Recording a layer beside `b3sum` hashing the same tree, and the opening of a
//! large image. Rounds alternate, so that both meet the same weather; the ratio
//! is the median of the rounds' ratios.
//!
//! `DRIFTD_BENCH_TREE=/usr/lib` measures another tree than the made-up one,
//! `DRIFTD_BENCH_ROUNDS` sets the rounds, `DRIFTD_BENCH_B3SUM` another b3sum.

#![allow(clippy::print_stdout)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use driftd::baseline::urgency::hashing_pool;
use driftd::baseline::walk::{Reading, walk_to};
use driftd::baseline::{FileEntry, ImageBaseline, LayerEntry, Store};
use driftd::health::Health;
use driftd::model::{Blake3Hash, ChainId, DiffId, FileType, Format, LayerId, RootfsPath};
use nix::sys::resource::{UsageWho, getrusage};

fn main() -> anyhow::Result<()> {
    // `cargo test --benches` wants to know only that this runs.
    let quick = !std::env::args().any(|argument| argument == "--bench");
    recording(quick)?;
    opening(quick)
}

#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
}

fn recording(quick: bool) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let tree = match std::env::var_os("DRIFTD_BENCH_TREE") {
        Some(tree) => PathBuf::from(tree),
        None => {
            let tree = scratch.path().join("tree");
            make_tree(&tree, if quick { 200 } else { 26_000 })?;
            // Else our fsync waits for the tree as well.
            nix::unistd::sync();
            tree
        }
    };
    let rounds = match std::env::var("DRIFTD_BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse().context("DRIFTD_BENCH_ROUNDS is no number")?,
        Err(_) if quick => 1,
        Err(_) => 9,
    };
    let state = scratch.path().join("state");
    let threads = std::thread::available_parallelism()?.get();

    let b3sum = std::env::var("DRIFTD_BENCH_B3SUM").unwrap_or_else(|_| "b3sum".into());
    let peers: Vec<(String, String)> = match Command::new(&b3sum).arg("--version").output() {
        Ok(_) => [
            format!("find -print0 | xargs -0 -P{threads} b3sum"),
            format!("find -print0 | xargs -0 -P{threads} -n 512 b3sum --num-threads 1"),
        ]
        .map(|line| {
            let command = line.replace("find", "find \"$1\" -type f").replace("b3sum", "\"$0\"");
            (line, command)
        })
        .into(),
        Err(_) => {
            println!("b3sum is not here: nothing to compare with (try: apt-get install b3sum)");
            Vec::new()
        }
    };

    // One round that does not count brings the tree into the page cache.
    let mut ours = Vec::new();
    let mut theirs: Vec<Vec<Cost>> = vec![Vec::new(); peers.len()];
    let mut entries = 0;
    let peak_before = memory("VmHWM")?;
    let mut peak = peak_before;
    for round in 0..=rounds {
        let cost = measure(UsageWho::RUSAGE_SELF, || {
            entries = record(&tree, &state)?;
            Ok(())
        })?;
        if round == 0 {
            peak = memory("VmHWM")?;
        } else {
            ours.push(cost);
        }
        for (costs, (_, command)) in theirs.iter_mut().zip(&peers) {
            let cost = measure(UsageWho::RUSAGE_CHILDREN, || {
                let status = Command::new("sh")
                    .args(["-c", command, &b3sum])
                    .arg(&tree)
                    .stdout(Stdio::null())
                    .status()?;
                if !status.success() {
                    bail!("`{command}` failed: {status}");
                }
                Ok(())
            })?;
            if round > 0 {
                costs.push(cost);
            }
        }
    }

    let totals = record_totals(&state)?;
    println!(
        "recording {} files, {} MB ({entries} entries) on {threads} threads, {rounds} rounds, warm",
        totals.0,
        totals.1 / 1_000_000
    );
    println!(
        "{:<58} {:>8} {:>8} {:>12} {:>12}",
        "", "wall s", "cpu s", "driftd wall×", "driftd cpu×"
    );
    println!("{:<58} {:>8.3} {:>8.3}", "driftd: walk, write, sync, open", wall(&ours), cpu(&ours));
    for ((name, _), costs) in peers.iter().zip(&theirs) {
        let ratio = |seconds: fn(&Cost) -> f64| {
            median(ours.iter().zip(costs).map(|(a, b)| seconds(a) / seconds(b)).collect())
        };
        println!(
            "{name:<58} {:>8.3} {:>8.3} {:>12.2} {:>12.2}",
            wall(costs),
            cpu(costs),
            ratio(|cost| cost.wall.as_secs_f64()),
            ratio(|cost| cost.cpu.as_secs_f64()),
        );
    }
    println!("peak memory: {:.1} MB, of which {:.1} MB before", mb(peak), mb(peak_before));
    println!();
    Ok(())
}

const LAYER: DiffId = DiffId([1; 32]);

/// What the recorder does with a layer that it does not know.
fn record(tree: &Path, state: &Path) -> anyhow::Result<usize> {
    if state.exists() {
        fs::remove_dir_all(state)?;
    }
    let store = Store::open(state, Arc::new(Health::default()))?;
    let pool = hashing_pool(0, &Arc::default())?;
    let mut count = 0;
    let t = Instant::now();
    let stop = AtomicBool::new(false);
    store.record_layer::<_, anyhow::Error>(LayerId::Diff(LAYER), |push| {
        let r = walk_to::<anyhow::Error>(&pool, tree, &Reading::default(), None, &stop, &mut |entry| {
            count += 1;
            push(entry)
        });
        println!("walk {:?}", t.elapsed());
        r
    })?;
    println!("written {:?}", t.elapsed());
    store
        .write_image(ChainId(LAYER.0), vec![LayerId::Diff(LAYER)], None)?
        .context("the layer that was just written is not there")?;
    Ok(count)
}

fn record_totals(state: &Path) -> anyhow::Result<(u64, u64)> {
    let store = Store::open(state, Arc::new(Health::default()))?;
    let image = store.image(ChainId(LAYER.0))?.context("nothing was recorded")?;
    Ok((image.totals().files, image.totals().bytes))
}

/// An image of 100,000 files in ten layers, brought into use.
fn opening(quick: bool) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let files: u32 = if quick { 1_000 } else { 100_000 };
    let chain_id = ChainId([9; 32]);
    {
        let store = Store::open(scratch.path(), Arc::new(Health::default()))?;
        let mut ids = Vec::new();
        for layer in 0..10_u8 {
            let id = LayerId::Diff(DiffId([layer; 32]));
            store.write_layer(id, many_entries(u32::from(layer), files / 10)?)?;
            ids.push(id);
        }
        store.write_image(chain_id, ids, None)?.context("a layer is not there")?;
    }
    let store = Store::open(scratch.path(), Arc::new(Health::default()))?;
    let mut opened = Vec::new();
    let mut private = 0;
    for _ in 0..if quick { 1 } else { 21 } {
        let before = memory("RssAnon")?;
        let start = Instant::now();
        let image = store.image(chain_id)?.context("the image is not there")?;
        opened.push(start.elapsed().as_secs_f64() * 1e3);
        private = memory("RssAnon")?.saturating_sub(before).max(private);
        drop(image);
    }
    let image = store.image(chain_id)?.context("the image is not there")?;
    let merging = Instant::now();
    let seen = image.files().count();
    let merging = merging.elapsed();
    println!("an image of {files} files in 10 layers");
    println!("opened and checked: {:.2} ms, {:.2} MB private", median(opened), mb(private));
    println!("look-up of a path: {:.2} µs", look_up(&image)?);
    println!("all {seen} entries merged and decoded: {:.1} ms", merging.as_secs_f64() * 1e3);
    Ok(())
}

fn look_up(image: &ImageBaseline) -> anyhow::Result<f64> {
    let paths: Vec<RootfsPath> = image.files().step_by(97).map(|known| known.entry.path).collect();
    let start = Instant::now();
    for path in &paths {
        image.get(path).context("a path of the image is not in the image")?;
    }
    #[allow(clippy::cast_precision_loss)]
    Ok(start.elapsed().as_secs_f64() * 1e6 / paths.len() as f64)
}

fn many_entries(layer: u32, files: u32) -> anyhow::Result<Vec<LayerEntry>> {
    let directory = |path: &str| -> anyhow::Result<FileEntry> {
        Ok(FileEntry::directory(RootfsPath::new(path)?, 0o755))
    };
    let mut entries = Vec::new();
    for path in ["/", "/usr", "/usr/lib", "/usr/lib/x86_64-linux-gnu"] {
        entries.push(LayerEntry::File(directory(path)?));
    }
    for number in 0..files {
        let parent = format!("/usr/lib/x86_64-linux-gnu/package-{layer}-{}", number / 25);
        if number % 25 == 0 {
            entries.push(LayerEntry::File(directory(&parent)?));
        }
        let content = blake3::hash(&(layer * files + number).to_le_bytes());
        entries.push(LayerEntry::File(FileEntry {
            file_type: FileType::Regular,
            format: Format::Data,
            size: 4096,
            blake3: Some(Blake3Hash(*content.as_bytes())),
            ..directory(&format!("{parent}/file-{number}.py"))?
        }));
    }
    Ok(entries)
}

/// A tree with sizes as in a distribution's /usr: most files are small, most
/// bytes are in few.
fn make_tree(tree: &Path, files: u64) -> anyhow::Result<()> {
    let mut noise = blake3::Hasher::new().update(b"driftd").finalize_xof();
    let mut random = || {
        let mut bytes = [0; 8];
        noise.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    };
    for number in 0..files {
        let directory = tree.join(format!("usr/{}/{}", number / 800, number / 20));
        fs::create_dir_all(&directory)?;
        let size = match random() % 1000 {
            0..600 => random() % (4 << 10),
            600..850 => (4 << 10) + random() % (12 << 10),
            850..974 => (16 << 10) + random() % (112 << 10),
            974..999 => (128 << 10) + random() % (896 << 10),
            _ => (1 << 20) + random() % (7 << 20),
        };
        let mut content = vec![0; usize::try_from(size)?];
        noise_of(number, &mut content);
        fs::write(directory.join(format!("file-{number}")), content)?;
    }
    Ok(())
}

fn noise_of(number: u64, content: &mut [u8]) {
    blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(content);
}

fn measure(who: UsageWho, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Cost> {
    let before = cpu_time(who)?;
    let start = Instant::now();
    work()?;
    let wall = start.elapsed();
    Ok(Cost { wall, cpu: cpu_time(who)?.saturating_sub(before) })
}

fn cpu_time(who: UsageWho) -> anyhow::Result<Duration> {
    let usage = getrusage(who)?;
    let seconds = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs())
            + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}

/// A figure from /proc/self/status, in bytes.
fn memory(name: &str) -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next())
        .with_context(|| format!("no {name} in /proc/self/status"))?
        .parse()?;
    Ok(kib * 1024)
}

#[allow(clippy::cast_precision_loss)]
fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn wall(costs: &[Cost]) -> f64 {
    median(costs.iter().map(|cost| cost.wall.as_secs_f64()).collect())
}

fn cpu(costs: &[Cost]) -> f64 {
    median(costs.iter().map(|cost| cost.cpu.as_secs_f64()).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
