//! The history in SQLite compared with the same work in sled, as driftd does it:
//! durable groups of findings, pages of a container or a span of time, and
//! retention. Evidence for docs/adr/0002.
//!
//! `cargo bench --bench history` prints one small table; medians of some rounds.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use driftd::history::{Filter, History, Keep, Record, Writer};
use driftd::model::{ContainerId, Finding};
use jiff::{Timestamp, ToSpan as _};

const FINDINGS: u32 = 20_000;
/// Their containers.
const CONTAINERS: u32 = 50;
/// Nine of ten findings are older than the retention.
const OLD_OF_TEN: u32 = 9;
const ROUNDS: usize = 3;
const PAGES: u32 = 200;
const PAGE: usize = 100;
const SINGLES: u32 = 20;
const RETENTION: Duration = Duration::from_secs(30 * 24 * 60 * 60);

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let findings =
        if std::env::args().any(|argument| argument == "--bench") { FINDINGS } else { 500 };
    let findings = workload(findings);
    let bytes: usize = findings.iter().map(|one| json(one).len()).sum();
    println!(
        "{} findings of {} containers, {} bytes of JSON each, groups of 1000, {ROUNDS} rounds\n",
        findings.len(),
        CONTAINERS,
        bytes / findings.len()
    );
    println!("{:<46} {:>12} {:>12} {:>8}", "", "SQLite", "sled 0.34", "ratio");

    let sqlite: Vec<Figures> = (0..ROUNDS).map(|_| with_sqlite(&findings)).collect();
    let sled: Vec<Figures> = (0..ROUNDS).map(|_| with_sled(&findings)).collect();
    let row = |label: &str, figure: fn(&Figures) -> f64| {
        let median = |all: &[Figures]| {
            let mut figures: Vec<f64> = all.iter().map(figure).collect();
            figures.sort_by(f64::total_cmp);
            figures[figures.len() / 2]
        };
        let (ours, theirs) = (median(&sqlite), median(&sled));
        println!("{label:<46} {ours:>12.1} {theirs:>12.1} {:>8.2}", ours / theirs);
    };
    row("stored in groups, findings/s *", |figures| figures.stored_per_second);
    row("one finding until it is stored, ms *", |figures| figures.single_ms);
    row("page of 100 of one container, pages/s", |figures| figures.container_pages);
    row("page of 100 of a span of time, pages/s", |figures| figures.time_pages);
    row("retention forgets 90 %, findings/s", |figures| figures.forgotten_per_second);
    row("on disk after storing, MB", |figures| figures.full_mb);
    row("on disk after forgetting 90 %, MB", |figures| figures.forgotten_mb);
    row("open again with the remaining 10 %, ms", |figures| figures.open_ms);
    println!(
        "\n* SQLite: fsync'd, durable against a loss of power. sled: after flush(), which issues \
         no fsync on Linux (strace: sync_file_range only), so not durable."
    );
}

struct Figures {
    stored_per_second: f64,
    single_ms: f64,
    container_pages: f64,
    time_pages: f64,
    forgotten_per_second: f64,
    full_mb: f64,
    forgotten_mb: f64,
    open_ms: f64,
}

fn workload(count: u32) -> Vec<Finding> {
    let sample: Finding =
        serde_json::from_str(include_str!("../tests/data/finding.json")).expect("it is a finding");
    let now = Timestamp::now();
    (0..count)
        .map(|number| {
            let mut finding = sample.clone();
            // IDs are hashes: they come in no order.
            let id = blake3::hash(&number.to_le_bytes());
            finding.id.0.copy_from_slice(&id.as_bytes()[..16]);
            finding.container.as_mut().expect("the sample has one").id = container(number);
            let days = if number % 10 < OLD_OF_TEN { 40 } else { 1 };
            finding.last_seen = now - (days * 24).hours() + i64::from(number).milliseconds();
            finding.first_seen = finding.last_seen;
            finding
        })
        .collect()
}

fn container(number: u32) -> ContainerId {
    let id = blake3::hash(&(number % CONTAINERS).to_be_bytes());
    ContainerId::new("k8s.io", &id.to_hex())
}

fn json(finding: &Finding) -> Vec<u8> {
    serde_json::to_vec(finding).expect("a finding is JSON")
}

fn per_second(count: usize, began: Instant) -> f64 {
    f64::from(u32::try_from(count).expect("few")) / began.elapsed().as_secs_f64()
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

#[allow(clippy::cast_precision_loss, reason = "megabytes for people")]
fn megabytes(dir: &Path) -> f64 {
    fn bytes(dir: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        fs::read_dir(dir)
            .expect("it is there")
            .map(|entry| {
                let entry = entry.expect("it can be read");
                let metadata = entry.metadata().expect("it is there");
                if metadata.is_dir() { bytes(&entry.path()) } else { metadata.blocks() * 512 }
            })
            .sum()
    }
    bytes(dir) as f64 / 1e6
}

// ---- SQLite, through driftd's own history

fn with_sqlite(findings: &[Finding]) -> Figures {
    let dir = tempfile::tempdir().expect("a scratch directory");
    // Everything is younger than the retention, so nothing is forgotten yet.
    let writer = open(dir.path(), RETENTION * 100);

    let began = Instant::now();
    for finding in findings {
        store(&writer, finding);
    }
    wait_for(&writer, findings.len() as u64);
    let stored_per_second = per_second(findings.len(), began);

    let mut singles = Vec::new();
    for number in 0..SINGLES {
        std::thread::sleep(Duration::from_millis(110));
        let mut finding = findings[0].clone();
        finding.id.0 = [0xff; 16];
        finding.revision = number.into();
        let began = Instant::now();
        store(&writer, &finding);
        wait_for(&writer, findings.len() as u64 + u64::from(number) + 1);
        singles.push(milliseconds(began));
    }
    singles.sort_by(f64::total_cmp);

    let reader = writer.reader();
    let began = Instant::now();
    for number in 0..PAGES {
        let filter = Filter { container: Some(container(number)), ..Filter::default() };
        let page = reader.findings(&filter, None, PAGE).expect("readable");
        assert!(!page.findings.is_empty());
    }
    let container_pages = per_second(PAGES as usize, began);
    let began = Instant::now();
    for number in 0..PAGES {
        let until = findings[(number * 97) as usize % findings.len()].last_seen;
        let filter = Filter { until: Some(until), ..Filter::default() };
        reader.findings(&filter, None, PAGE).expect("readable");
    }
    let time_pages = per_second(PAGES as usize, began);
    writer.stop();
    let full_mb = megabytes(dir.path());

    let began = Instant::now();
    let writer = open(dir.path(), RETENTION);
    let left = findings.len() / 10;
    while writer.reader().count().expect("readable") > left as u64 + 1 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let forgotten_per_second = per_second(findings.len() - left, began);
    writer.stop();
    let forgotten_mb = megabytes(dir.path());

    let began = Instant::now();
    let writer = open(dir.path(), RETENTION);
    writer.reader().newest().expect("readable");
    let open_ms = milliseconds(began);
    writer.stop();
    Figures {
        stored_per_second,
        single_ms: singles[singles.len() / 2],
        container_pages,
        time_pages,
        forgotten_per_second,
        full_mb,
        forgotten_mb,
        open_ms,
    }
}

fn open(dir: &Path, retention: Duration) -> Writer {
    let keep = Keep { retention, max_bytes: 1 << 40 };
    History::open(dir).expect("it opens").start(keep, Arc::default())
}

fn store(writer: &Writer, finding: &Finding) {
    writer.records().send(Record::Finding(Box::new(finding.clone()))).expect("it is written");
}

fn wait_for(writer: &Writer, seq: u64) {
    let mut committed = writer.committed();
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(committed.wait_for(|newest| *newest >= seq)).expect("the writer runs");
}

// ---- sled: the same keys by hand, since it has no indexes

struct Sled {
    database: sled::Db,
    findings: sled::Tree,
    by_container: sled::Tree,
    by_time: sled::Tree,
    records: sled::Tree,
}

impl Sled {
    fn open(dir: &Path) -> Sled {
        let database =
            sled::Config::new().path(dir).cache_capacity(64 << 20).open().expect("it opens");
        let tree = |name| database.open_tree(name).expect("it opens");
        Sled {
            findings: tree("finding"),
            by_container: tree("by_container"),
            by_time: tree("by_time"),
            records: tree("record"),
            database,
        }
    }

    fn keys(finding: &Finding) -> (Vec<u8>, Vec<u8>) {
        let time = finding.last_seen.as_microsecond().to_be_bytes();
        let container = finding.container_id().expect("the sample has one").to_string();
        let by_container = [container.as_bytes(), b"\0", &time, &finding.id.0].concat();
        (by_container, [&time[..], &finding.id.0].concat())
    }

    fn store(&self, findings: &[Finding], first_seq: u64) {
        let (mut all, mut by_container, mut by_time, mut records) = (
            sled::Batch::default(),
            sled::Batch::default(),
            sled::Batch::default(),
            sled::Batch::default(),
        );
        for (seq, finding) in (first_seq..).zip(findings) {
            let (container_key, time_key) = Sled::keys(finding);
            all.insert(&finding.id.0, json(finding));
            by_container.insert(container_key, &[]);
            by_time.insert(time_key, &[]);
            records.insert(&seq.to_be_bytes(), &finding.id.0);
        }
        self.findings.apply_batch(all).expect("it is written");
        self.by_container.apply_batch(by_container).expect("it is written");
        self.by_time.apply_batch(by_time).expect("it is written");
        self.records.apply_batch(records).expect("it is written");
        self.database.flush().expect("it is flushed");
    }

    /// Newest first, as driftd's pages are, parsed as they are there.
    fn page(&self, keys: impl DoubleEndedIterator<Item = sled::Result<(sled::IVec, sled::IVec)>>) {
        for key in keys.rev().take(PAGE) {
            let (key, _) = key.expect("readable");
            let json = self.findings.get(&key[key.len() - 16..]).expect("readable");
            let finding: Finding =
                serde_json::from_slice(&json.expect("it is there")).expect("it is a finding");
            std::hint::black_box(finding);
        }
    }
}

fn with_sled(findings: &[Finding]) -> Figures {
    let dir = tempfile::tempdir().expect("a scratch directory");
    let sled = Sled::open(dir.path());

    let began = Instant::now();
    for (group, part) in (0_u64..).zip(findings.chunks(1000)) {
        sled.store(part, group * 1000);
    }
    let stored_per_second = per_second(findings.len(), began);

    let mut singles = Vec::new();
    for number in 0..SINGLES {
        std::thread::sleep(Duration::from_millis(110));
        let began = Instant::now();
        sled.store(&findings[..1], u64::from(u32::MAX) + u64::from(number));
        singles.push(milliseconds(began));
    }
    singles.sort_by(f64::total_cmp);

    let began = Instant::now();
    for number in 0..PAGES {
        let prefix = [container(number).to_string().as_bytes(), b"\0"].concat();
        sled.page(sled.by_container.scan_prefix(prefix));
    }
    let container_pages = per_second(PAGES as usize, began);
    let began = Instant::now();
    for number in 0..PAGES {
        let until = findings[(number * 97) as usize % findings.len()].last_seen;
        sled.page(sled.by_time.range(..=until.as_microsecond().to_be_bytes().to_vec()));
    }
    let time_pages = per_second(PAGES as usize, began);
    drop(sled);
    let full_mb = megabytes(dir.path());

    let sled = Sled::open(dir.path());
    let began = Instant::now();
    let cutoff = (Timestamp::now() - 720.hours()).as_microsecond().to_be_bytes();
    let mut forgotten = 0;
    for (seq, finding) in (0_u64..).zip(findings) {
        let (container_key, time_key) = Sled::keys(finding);
        if time_key[..8] < cutoff[..] {
            sled.findings.remove(finding.id.0).expect("it is written");
            sled.by_container.remove(container_key).expect("it is written");
            sled.by_time.remove(time_key).expect("it is written");
            sled.records.remove(seq.to_be_bytes()).expect("it is written");
            forgotten += 1;
            if forgotten % 500 == 0 {
                sled.database.flush().expect("it is flushed");
            }
        }
    }
    sled.database.flush().expect("it is flushed");
    let forgotten_per_second = per_second(forgotten, began);
    drop(sled);
    let forgotten_mb = megabytes(dir.path());

    let began = Instant::now();
    let sled = Sled::open(dir.path());
    sled.records.last().expect("readable");
    let open_ms = milliseconds(began);
    drop(sled);
    Figures {
        stored_per_second,
        single_ms: singles[singles.len() / 2],
        container_pages,
        time_pages,
        forgotten_per_second,
        full_mb,
        forgotten_mb,
        open_ms,
    }
}
