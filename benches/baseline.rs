//! What baselines cost, beside what else a node does with an image: importing and
//! unpacking it, `b3sum` hashing the same files, AIDE recording them. Rounds
//! alternate, so that other work of the machine affects all of them; a ratio is the median of the
//! rounds' ratios.
//!
//! Needs root, and containerd, `ctr`, `b3sum` and `aide` where they are to be
//! compared with: `scripts/setup` installs them. What is missing is named and left out. The
//! bench has a containerd of its own, which ends with it.
//!
//! `DRIFTD_BENCH_ROUNDS` sets the rounds, `DRIFTD_BENCH_B3SUM` another b3sum,
//! `DRIFTD_BENCH_DIRECTORY` the disk on which all this happens.

#![allow(clippy::print_stdout)]

mod cost;

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use driftd::baseline::urgency::hashing_pool;
use driftd::baseline::walk::{Reading, walk_to};
use driftd::baseline::{FileEntry, ImageBaseline, LayerEntry, Store, Urgency};
use driftd::health::Health;
use driftd::model::{Blake3Hash, ChainId, DiffId, FileType, Format, LayerId, RootfsPath};
use nix::sys::resource::UsageWho;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sha2::{Digest as _, Sha256};

use cost::{Cost, measure, median, memory};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((RECORD, arguments)) = arguments.split_first().map(|(a, b)| (a.as_str(), b)) {
        return record_and_print_memory(arguments);
    }
    // `cargo test --benches` wants to know only that this runs.
    let quick = !std::env::args().any(|argument| argument == "--bench");
    let scratch = match std::env::var_os("DRIFTD_BENCH_DIRECTORY") {
        Some(directory) => tempfile::tempdir_in(directory)?,
        None => tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?,
    };
    let rounds = match std::env::var("DRIFTD_BENCH_ROUNDS") {
        Ok(rounds) => rounds.parse().context("DRIFTD_BENCH_ROUNDS is no number")?,
        Err(_) if quick => 1,
        Err(_) => 9,
    };
    let image = Image { layers: 4, files: if quick { 50 } else { 6_600 } };
    let (layers, import) = if quick {
        (unpacked(&image, scratch.path())?, None)
    } else {
        imported(&image, scratch.path())?
    };
    recording(&layers, import, rounds, quick, scratch.path())?;
    known_and_shared(&layers, scratch.path())?;
    many_entries_in_one_directory(if quick { 1_000 } else { 1_000_000 }, scratch.path())?;
    a_hole(if quick { 1 << 20 } else { 10 << 30 }, scratch.path())?;
    opening(quick, scratch.path())
}

/// A layer's directory.
struct Unpacked {
    id: LayerId,
    directory: PathBuf,
}

fn recording(
    layers: &[Unpacked],
    import: Option<Duration>,
    rounds: usize,
    quick: bool,
    scratch: &Path,
) -> anyhow::Result<()> {
    // Otherwise our fsync waits for the unpacked files as well.
    nix::unistd::sync();
    let state = scratch.join("state");
    let threads = std::thread::available_parallelism()?.get();
    let directories: Vec<&Path> = layers.iter().map(|layer| layer.directory.as_path()).collect();
    let peers = peers(threads, quick, &directories, scratch)?;

    // One round that does not count: it fills the page cache.
    let mut ours = Vec::new();
    let mut theirs: Vec<Vec<Cost>> = vec![Vec::new(); peers.len()];
    for round in 0..=rounds {
        if state.exists() {
            fs::remove_dir_all(&state)?;
        }
        let cost = measure(UsageWho::RUSAGE_SELF, || record(layers, &state).map(drop))?;
        if round > 0 {
            ours.push(cost);
        }
        for (costs, peer) in theirs.iter_mut().zip(&peers) {
            if round > peer.rounds {
                continue;
            }
            let cost = measure(UsageWho::RUSAGE_CHILDREN, || {
                let status = Command::new("sh")
                    .args(["-c", &peer.command, "sh"])
                    .args(&directories)
                    .stdout(Stdio::null())
                    .status()?;
                ensure!(status.success(), "`{}` failed: {status}", peer.command);
                Ok(())
            })?;
            if round > 0 {
                costs.push(cost);
            }
        }
    }

    let store = Store::open(&state, Arc::new(Health::default()))?;
    let totals = store.image(chain_of(layers))?.context("nothing was recorded")?.totals();
    println!(
        "recording {} files, {} MB in {} layers, {threads} threads, {rounds} rounds, warm",
        totals.files,
        totals.bytes / 1_000_000,
        layers.len(),
    );
    println!(
        "{:<64} {:>8} {:>8} {:>12} {:>12}",
        "", "wall s", "cpu s", "driftd wall×", "driftd cpu×"
    );
    let name = "driftd: walk, hash, write, sync, open";
    println!("{name:<64} {:>8.3} {:>8.3}", wall(&ours), cpu(&ours));
    for (peer, costs) in peers.iter().zip(&theirs) {
        let ratio = |seconds: fn(&Cost) -> f64| {
            median(ours.iter().zip(costs).map(|(a, b)| seconds(a) / seconds(b)).collect())
        };
        println!(
            "{:<64} {:>8.3} {:>8.3} {:>12.2} {:>12.2}",
            peer.name,
            wall(costs),
            cpu(costs),
            ratio(|cost| cost.wall.as_secs_f64()),
            ratio(|cost| cost.cpu.as_secs_f64()),
        );
    }
    if let Some(import) = import {
        println!(
            "ctr images import, with the unpacking: {:.2} s; driftd takes {:.1} % of that",
            import.as_secs_f64(),
            wall(&ours) / import.as_secs_f64() * 100.0
        );
    }
    let peak = peak_memory(layers, &scratch.join("peak-state"))?;
    println!("extra memory at its peak: {:.1} MB", mb(peak));
    println!();
    Ok(())
}

/// A program that reads the same files.
struct Peer {
    name: String,
    /// For a shell; the directories are its arguments.
    command: String,
    /// How many rounds are enough for it.
    rounds: usize,
}

fn peers(
    threads: usize,
    quick: bool,
    directories: &[&Path],
    scratch: &Path,
) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    let b3sum = std::env::var("DRIFTD_BENCH_B3SUM").unwrap_or_else(|_| "b3sum".into());
    if Command::new(&b3sum).arg("--version").output().is_ok() {
        for arrangement in [
            format!("xargs -0 -P{threads} b3sum"),
            format!("xargs -0 -P{threads} -n 512 b3sum --num-threads 1"),
            format!("xargs -0 -P{threads} -n 128 b3sum --num-threads 1"),
            format!("xargs -0 -P{threads} -n 512 b3sum --no-mmap --num-threads 1"),
        ] {
            peers.push(Peer {
                name: format!("find -print0 | {arrangement}"),
                command: format!("find \"$@\" -type f -print0 | {arrangement}")
                    .replace("b3sum ", &format!("'{b3sum}' "))
                    .replace(" b3sum", &format!(" '{b3sum}'")),
                rounds: usize::MAX,
            });
        }
    } else {
        println!("b3sum is not here: nothing to compare with (try: scripts/setup)");
    }
    if quick {
        return Ok(peers);
    }
    match Command::new("aide").arg("--version").output() {
        Ok(output) => {
            let printed = [output.stdout, output.stderr].concat();
            let printed = String::from_utf8_lossy(&printed);
            let version = printed.lines().next().unwrap_or("AIDE").to_owned();
            let settings = scratch.join("aide.conf");
            let mut text = format!(
                "database_out=file:{}\ngzip_dbout=no\nnum_workers={threads}\n\
                 Recorded = p+ftype+l+u+g+s+xattrs+caps+sha256\n",
                scratch.join("aide.db").display()
            );
            for directory in directories {
                text += &format!("{} Recorded\n", directory.display());
            }
            fs::write(&settings, text)?;
            peers.push(Peer {
                name: format!("{version} --init, {threads} workers"),
                command: format!("aide --init --config='{}'", settings.display()),
                // It takes some twenty times as long as the others.
                rounds: 2,
            });
        }
        Err(_) => println!("aide is not here: nothing to compare with (try: scripts/setup)"),
    }
    Ok(peers)
}

fn chain_of(layers: &[Unpacked]) -> ChainId {
    let diff_ids: Vec<DiffId> = layers
        .iter()
        .map(|layer| match layer.id {
            LayerId::Diff(diff_id) => diff_id,
            LayerId::Chain(chain_id) => DiffId(chain_id.0),
        })
        .collect();
    ChainId::of_layers(&diff_ids).last().copied().unwrap_or(ChainId([0; 32]))
}

/// What the recorder does with layers while a container waits for them.
fn record(layers: &[Unpacked], state: &Path) -> anyhow::Result<Arc<ImageBaseline>> {
    let store = Store::open(state, Arc::new(Health::default()))?;
    let urgency = Arc::new(Urgency::default());
    urgency.raise();
    let pool = hashing_pool(0, &urgency)?;
    let stop = AtomicBool::new(false);
    let mut held = Vec::new();
    for Unpacked { id, directory } in layers {
        let mut known = store.layer(*id)?;
        if known.is_none() {
            store.record_layer::<_, anyhow::Error>(*id, |found| {
                walk_to(&pool, directory, &Reading::default(), None, &stop, found)
            })?;
            known = store.layer(*id)?;
        }
        held.push(known);
    }
    let ids = layers.iter().map(|layer| layer.id).collect();
    store
        .write_image(chain_of(layers), ids, None)?
        .context("a layer that was just written is not there")
}

const RECORD: &str = "--record-and-print-memory";

/// By how much recording lets a process grow. It runs in another process, because this one
/// still has memory from making the image.
fn peak_memory(layers: &[Unpacked], state: &Path) -> anyhow::Result<u64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(RECORD).arg(state).args(layers.iter().map(|layer| &layer.directory));
    let output = command.output()?;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    printed.trim().parse().with_context(|| format!("`{printed}` is no number"))
}

fn record_and_print_memory(arguments: &[String]) -> anyhow::Result<()> {
    let (state, directories) = arguments.split_first().context("no directory to record into")?;
    let layers = (0..).zip(directories).map(|(number, directory)| {
        Ok(Unpacked { id: layer_id(number)?, directory: directory.into() })
    });
    let layers: Vec<Unpacked> = layers.collect::<anyhow::Result<_>>()?;
    let before = memory("VmRSS")?;
    let baseline = record(&layers, Path::new(state))?;
    println!("{}", memory("VmHWM")?.saturating_sub(before));
    drop(baseline);
    Ok(())
}

/// An image again, and an image that has all but its top layer in common with it.
fn known_and_shared(layers: &[Unpacked], scratch: &Path) -> anyhow::Result<()> {
    let state = scratch.join("state");
    let top =
        Unpacked { id: LayerId::Diff(DiffId([77; 32])), directory: scratch.join("another-top") };
    for number in 0..100 {
        let path = top.directory.join(format!("opt/{}/{number}", number / 10));
        fs::create_dir_all(path.parent().context("it has a parent")?)?;
        fs::write(path, text(&mut Noise::new(number), 10_000))?;
    }
    nix::unistd::sync();
    let again = measure(UsageWho::RUSAGE_SELF, || record(layers, &state).map(drop))?;
    let mut other: Vec<Unpacked> = layers[..layers.len() - 1]
        .iter()
        .map(|layer| Unpacked { id: layer.id, directory: "/nowhere".into() })
        .collect();
    other.push(top);
    let shared = measure(UsageWho::RUSAGE_SELF, || record(&other, &state).map(drop))?;
    let ms = |cost: &Cost| cost.wall.as_secs_f64() * 1e3;
    println!("the same image again: {:.1} ms (files opened and checked, none read)", ms(&again));
    println!(
        "another image with the same layers below 100 files of its own: {:.1} ms",
        ms(&shared)
    );
    println!();
    Ok(())
}

/// A layer that is one large directory.
fn many_entries_in_one_directory(files: u32, scratch: &Path) -> anyhow::Result<()> {
    let directory = scratch.join("many");
    fs::create_dir(&directory)?;
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=75%,nr_inodes=0", "tmpfs"])
        .arg(&directory)
        .status()?
        .success();
    if !mounted {
        println!("not root: no directory of {files} files is measured");
        return Ok(());
    }
    let result = (|| {
        for number in 0..files {
            fs::write(directory.join(format!("a-file-of-{number:010}")), number.to_le_bytes())?;
        }
        let state = scratch.join("many-state");
        let layers =
            [Unpacked { id: LayerId::Diff(DiffId([78; 32])), directory: directory.clone() }];
        let cost = measure(UsageWho::RUSAGE_SELF, || record(&layers, &state).map(drop))?;
        let peak = peak_memory(&layers, &scratch.join("many-peak-state"))?;
        println!(
            "{files} small files in one directory: {:.2} s, {:.2} s of processor time, extra memory at its peak {:.1} MB",
            cost.wall.as_secs_f64(),
            cost.cpu.as_secs_f64(),
            mb(peak)
        );
        Ok(())
    })();
    let unmounted = Command::new("umount").arg(&directory).status()?;
    ensure!(unmounted.success(), "cannot unmount {}", directory.display());
    result
}

/// A file that takes no room on the disk.
fn a_hole(length: u64, scratch: &Path) -> anyhow::Result<()> {
    let directory = scratch.join("hole");
    fs::create_dir(&directory)?;
    File::create(directory.join("hole"))?.set_len(length)?;
    let layers = [Unpacked { id: LayerId::Diff(DiffId([79; 32])), directory }];
    let cost =
        measure(UsageWho::RUSAGE_SELF, || record(&layers, &scratch.join("hole-state")).map(drop))?;
    println!(
        "a hole of {} MiB: {:.2} s, {:.2} s of processor time",
        length >> 20,
        cost.wall.as_secs_f64(),
        cost.cpu.as_secs_f64()
    );
    println!();
    Ok(())
}

// ---- the image

/// A synthetic image: sizes as in a distribution's /usr, where most files are small and most
/// bytes are in few; text that packs as programs do.
struct Image {
    layers: u64,
    /// For each layer.
    files: u64,
}

impl Image {
    /// Calls `file` with every file of a layer.
    fn for_each(
        &self,
        layer: u64,
        mut file: impl FnMut(&str, &[u8]) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for number in layer * self.files..(layer + 1) * self.files {
            let mut noise = Noise::new(number);
            let size = match noise.next() % 1000 {
                0..600 => noise.next() % (4 << 10),
                600..850 => (4 << 10) + noise.next() % (12 << 10),
                850..974 => (16 << 10) + noise.next() % (112 << 10),
                974..999 => (128 << 10) + noise.next() % (896 << 10),
                _ => (1 << 20) + noise.next() % (7 << 20),
            };
            let path = format!("usr/{}/{}/file-{number}", number / 800, number / 20);
            file(&path, &text(&mut noise, size))?;
        }
        Ok(())
    }
}

/// Numbers that are the same in every run.
struct Noise(blake3::OutputReader);

impl Noise {
    fn new(seed: u64) -> Noise {
        Noise(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}

/// `size` bytes that pack to less than half.
fn text(noise: &mut Noise, size: u64) -> Vec<u8> {
    let size = usize::try_from(size).unwrap_or(0);
    let mut content = Vec::with_capacity(size + 64);
    let mut random = [0; 64];
    while content.len() < size {
        noise.0.fill(&mut random);
        content.extend_from_slice(&random[..24]);
        let start = content.len().saturating_sub(usize::from(random[24]) * 16 + 40);
        content.extend_from_within(start..content.len().min(start + 40));
    }
    content.truncate(size);
    content
}

/// The layers' directories, written by ourselves.
fn unpacked(image: &Image, scratch: &Path) -> anyhow::Result<Vec<Unpacked>> {
    let mut layers = Vec::new();
    for layer in 0..image.layers {
        let directory = scratch.join(format!("layer-{layer}"));
        image.for_each(layer, |path, content| {
            let path = directory.join(path);
            fs::create_dir_all(path.parent().context("it has a parent")?)?;
            Ok(fs::write(path, content)?)
        })?;
        layers.push(Unpacked { id: layer_id(layer)?, directory });
    }
    Ok(layers)
}

fn layer_id(layer: u64) -> anyhow::Result<LayerId> {
    Ok(LayerId::Diff(DiffId([u8::try_from(layer)? + 1; 32])))
}

/// The layers' directories, unpacked by containerd, and how long that took.
fn imported(image: &Image, scratch: &Path) -> anyhow::Result<(Vec<Unpacked>, Option<Duration>)> {
    let present = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !present("containerd") || !present("ctr") || !nix::unistd::geteuid().is_root() {
        println!("no containerd, or not root: nothing is imported (try: scripts/setup)");
        return Ok((unpacked(image, scratch)?, None));
    }
    let archive = scratch.join("image.tar");
    write_archive(image, scratch, &archive)?;
    nix::unistd::sync();
    let containerd = Containerd::start(&scratch.join("containerd"))?;
    let start = Instant::now();
    containerd.ctr(&["images", "import", "--snapshotter", "overlayfs", path_text(&archive)?])?;
    let took = start.elapsed();
    fs::remove_file(&archive)?;

    // A new containerd numbers its snapshots in the order of the layers.
    let snapshots =
        containerd.directory.join("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
    let mut numbers: Vec<u64> = fs::read_dir(&snapshots)
        .with_context(|| format!("cannot list {}", snapshots.display()))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    ensure!(numbers.len() as u64 == image.layers, "containerd has made {} layers", numbers.len());
    let layers = (0..image.layers).zip(numbers).map(|(layer, number)| {
        let directory = snapshots.join(number.to_string()).join("fs");
        Ok(Unpacked { id: layer_id(layer)?, directory })
    });
    Ok((layers.collect::<anyhow::Result<_>>()?, Some(took)))
}

fn path_text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// A containerd of the bench's own.
struct Containerd {
    directory: PathBuf,
    child: Child,
}

impl Containerd {
    fn start(directory: &Path) -> anyhow::Result<Containerd> {
        fs::create_dir(directory)?;
        let settings = directory.join("containerd.toml");
        let place = directory.display();
        fs::write(
            &settings,
            format!(
                r#"version = 2
root = "{place}/root"
state = "{place}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "{place}/containerd.sock"
[ttrpc]
  address = "{place}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{place}/opt"
"#
            ),
        )?;
        let log = File::create(directory.join("containerd.log"))?;
        let child = Command::new("containerd")
            .arg("--config")
            .arg(&settings)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        let containerd = Containerd { directory: directory.into(), child };
        let deadline = Instant::now() + Duration::from_secs(30);
        while let Err(err) = containerd.ctr(&["version"]) {
            ensure!(Instant::now() < deadline, "containerd does not answer: {err:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(containerd)
    }

    fn ctr(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(self.directory.join("containerd.sock"))
            .args(["--namespace", "driftd-bench"])
            .args(arguments)
            .output()?;
        if !output.status.success() {
            bail!("ctr {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.child.id()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

/// Hashes what it writes.
struct Hashed<W> {
    out: W,
    hasher: Sha256,
    length: u64,
}

impl<W: Write> Hashed<W> {
    fn new(out: W) -> Hashed<W> {
        Hashed { out, hasher: Sha256::new(), length: 0 }
    }

    fn digest(&self) -> String {
        driftd::model::finding::hex(&self.hasher.clone().finalize())
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The digest and length of a blob, and the diff ID if it is a layer.
struct BlobInfo {
    digest: String,
    length: u64,
    diff_id: String,
}

/// Writes the image as an OCI layout in one file, its layers packed with gzip.
fn write_archive(image: &Image, scratch: &Path, archive: &Path) -> anyhow::Result<()> {
    let blobs = std::thread::scope(|scope| {
        let packing: Vec<_> = (0..image.layers)
            .map(|layer| {
                let blob = scratch.join(format!("blob-{layer}"));
                scope.spawn(move || write_layer(image, layer, &blob))
            })
            .collect();
        packing
            .into_iter()
            .map(|thread| thread.join().expect("packing does not panic"))
            .collect::<anyhow::Result<Vec<BlobInfo>>>()
    })?;
    let mut out = tar::Builder::new(BufWriter::new(File::create(archive)?));
    let descriptor = |media_type: &str, digest: &str, size: u64| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": format!("sha256:{digest}"),
            "size": size,
        })
    };
    for (layer, blob) in blobs.iter().enumerate() {
        let path = scratch.join(format!("blob-{layer}"));
        let mut file = BufReader::new(File::open(&path)?);
        append(&mut out, &format!("blobs/sha256/{}", blob.digest), blob.length, &mut file)?;
        fs::remove_file(path)?;
    }
    let diff_ids: Vec<String> =
        blobs.iter().map(|blob| format!("sha256:{}", blob.diff_id)).collect();
    let config = serde_json::json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let layers: Vec<_> = blobs
        .iter()
        .map(|blob| descriptor("layer.v1.tar+gzip", &blob.digest, blob.length))
        .collect();
    let (config, length) = append_json(&mut out, &config)?;
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config, length),
        "layers": layers,
    });
    let (manifest, length) = append_json(&mut out, &manifest)?;
    let mut manifest = descriptor("manifest.v1+json", &manifest, length);
    manifest["annotations"] =
        serde_json::json!({"io.containerd.image.name": "example.org/driftd/bench:latest"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}).to_string();
    append(&mut out, "index.json", index.len() as u64, &mut index.as_bytes())?;
    let layout = r#"{"imageLayoutVersion":"1.0.0"}"#;
    append(&mut out, "oci-layout", layout.len() as u64, &mut layout.as_bytes())?;
    out.into_inner()?.flush()?;
    Ok(())
}

fn write_layer(image: &Image, layer: u64, blob: &Path) -> anyhow::Result<BlobInfo> {
    let packed = Hashed::new(BufWriter::new(File::create(blob)?));
    let packer = flate2::write::GzEncoder::new(packed, flate2::Compression::default());
    let mut tar = tar::Builder::new(Hashed::new(packer));
    let mut directories = std::collections::BTreeSet::new();
    image.for_each(layer, |path, content| {
        for (end, _) in path.match_indices('/') {
            if directories.insert(path[..end].to_owned()) {
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                tar.append_data(&mut header, format!("{}/", &path[..end]), io::empty())?;
            }
        }
        append(&mut tar, path, content.len() as u64, &mut &content[..])
    })?;
    let plain = tar.into_inner()?;
    let diff_id = plain.digest();
    let mut packed = plain.out.finish()?;
    packed.flush()?;
    Ok(BlobInfo { digest: packed.digest(), length: packed.length, diff_id })
}

fn append<W: Write>(
    out: &mut tar::Builder<W>,
    path: &str,
    length: u64,
    content: &mut dyn Read,
) -> anyhow::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(length);
    Ok(out.append_data(&mut header, path, content)?)
}

fn append_json<W: Write>(
    out: &mut tar::Builder<W>,
    value: &serde_json::Value,
) -> anyhow::Result<(String, u64)> {
    let bytes = serde_json::to_vec(value)?;
    let digest = driftd::model::finding::hex(&Sha256::digest(&bytes));
    append(out, &format!("blobs/sha256/{digest}"), bytes.len() as u64, &mut &bytes[..])?;
    Ok((digest, bytes.len() as u64))
}

// ---- opening

/// An image of 100,000 files in ten layers, and in one, brought into use.
fn opening(quick: bool, scratch: &Path) -> anyhow::Result<()> {
    let files: u32 = if quick { 1_000 } else { 100_000 };
    for layers in [10_u8, 1] {
        let state = scratch.join(format!("opening-{layers}"));
        let chain_id = ChainId([layers; 32]);
        {
            let store = Store::open(&state, Arc::new(Health::default()))?;
            let mut ids = Vec::new();
            for layer in 0..layers {
                let id = LayerId::Diff(DiffId([layer; 32]));
                let entries = many_entries(u32::from(layer), files / u32::from(layers))?;
                store.write_layer(id, entries)?;
                ids.push(id);
            }
            store.write_image(chain_id, ids, None)?.context("a layer is not there")?;
        }
        let store = Store::open(&state, Arc::new(Health::default()))?;
        let mut opened = Vec::new();
        let mut private = 0;
        for _ in 0..if quick { 1 } else { 41 } {
            let before = private_memory()?;
            let start = Instant::now();
            let image = store.image(chain_id)?.context("the image is not there")?;
            opened.push(start.elapsed().as_secs_f64() * 1e3);
            private = private_memory()?.saturating_sub(before).max(private);
            drop(image);
        }
        let image = store.image(chain_id)?.context("the image is not there")?;
        let merging = Instant::now();
        let seen = image.files().count();
        let merging = merging.elapsed();
        println!("an image of {files} files in {layers} layers");
        let least = opened.iter().copied().fold(f64::INFINITY, f64::min);
        println!(
            "opened and checked: {:.2} ms (least {least:.2}), {:.3} MB of private memory",
            median(opened),
            mb(private)
        );
        println!("look-up of a path: {:.2} µs", look_up(&image)?);
        println!("all {seen} entries merged and decoded: {:.1} ms", merging.as_secs_f64() * 1e3);
    }
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

/// Memory that no other process shares and that no file backs.
fn private_memory() -> anyhow::Result<u64> {
    let rollup = fs::read_to_string("/proc/self/smaps_rollup")?;
    let mut kib = 0;
    for line in rollup.lines() {
        if line.starts_with("Private_Dirty:") || line.starts_with("Private_Hugetlb:") {
            kib += line.split_whitespace().nth(1).context("no number")?.parse::<u64>()?;
        }
    }
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
