//! The recorder with blobs: what is proved, what differs, and what is not known.
//! Needs root: device nodes and `trusted.` attributes.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::fs::{CWD, Mode, XattrFlags, makedev, mknodat, setxattr};
use sha2::{Digest as _, Sha256};

use super::*;
use crate::baseline::{
    BaselineEvent, Blobs, ImageBaseline, KnownBy, LayerDifference, LayerEntry, LayerReport,
    Progress, Proof, RecordRequest, Recorded, Recorder, Store, Witness, blake3_of,
};
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{
    Blake3Hash, Blob, ChainId, ContainerId, DiffId, FileTime, Layer, LayerId, RootfsPath,
};

const SOON: Duration = Duration::from_secs(20);

#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what} did not come true");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// An archive, written as lines: `PATH MODE CONTENT`, `PATH MODE dir`, `- PATH`.
#[derive(Clone)]
struct Archive {
    text: &'static str,
    bytes: Vec<u8>,
}

fn archive(text: &'static str) -> Archive {
    let mut builder = tar::Builder::new(Vec::new());
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut header = tar::Header::new_ustar();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        let (path, content) = match words[..] {
            ["-", path] => {
                let (above, name) = path.rsplit_once('/').unwrap();
                (format!("{}/.wh.{name}", above.trim_start_matches('/')), "")
            }
            [path, mode, content] => {
                header.set_mode(u32::from_str_radix(mode, 8).unwrap());
                (path.to_owned(), content)
            }
            _ => panic!("no entry: `{line}`"),
        };
        let path = path.trim_start_matches('/').to_owned();
        if content == "dir" {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_size(0);
            builder.append_data(&mut header, format!("{path}/"), &b""[..]).unwrap();
        } else {
            header.set_entry_type(tar::EntryType::Regular);
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
    }
    Archive { text, bytes: builder.into_inner().unwrap() }
}

impl Archive {
    fn diff_id(&self) -> DiffId {
        DiffId(Sha256::digest(&self.bytes).into())
    }

    fn digest(&self) -> String {
        self.diff_id().to_string()
    }

    fn blob(&self) -> Blob {
        Blob {
            endpoint: "/run/test.sock".into(),
            namespace: "default".into(),
            digest: self.digest(),
            media_type: "application/vnd.oci.image.layer.v1.tar".into(),
            size: self.bytes.len() as u64,
        }
    }

    /// As containerd does it: whiteouts become devices, unless it is the bottom.
    fn unpack(&self, directory: &Path, bottom: bool) {
        fs::create_dir(directory).unwrap();
        set_mode(directory, 0o755);
        for line in self.text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let at = |path: &str| directory.join(path.trim_start_matches('/'));
            match words[..] {
                ["-", path] => {
                    fs::create_dir_all(at(path).parent().unwrap()).unwrap();
                    if !bottom {
                        let device = rustix::fs::FileType::CharacterDevice;
                        mknodat(CWD, at(path), device, Mode::empty(), makedev(0, 0))
                            .expect("this test must run as root, with CAP_MKNOD");
                    }
                }
                [path, mode, content] => {
                    let mode = u32::from_str_radix(mode, 8).unwrap();
                    if content == "dir" {
                        fs::create_dir_all(at(path)).unwrap();
                    } else {
                        fs::create_dir_all(at(path).parent().unwrap()).unwrap();
                        fs::write(at(path), content).unwrap();
                    }
                    set_mode(&at(path), mode);
                }
                _ => panic!("no entry: `{line}`"),
            }
        }
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A content store in memory.
#[derive(Default)]
struct Shelf {
    blobs: Mutex<HashMap<String, Vec<u8>>>,
    opened: AtomicUsize,
    /// While it is set, readers wait.
    held: AtomicBool,
}

impl Blobs for Shelf {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        let blobs = self.blobs.lock().unwrap();
        let bytes = blobs.get(&blob.digest).cloned().ok_or("containerd has no such blob")?;
        Ok(Box::new(io::Cursor::new(bytes)))
    }
}

/// A shelf whose readers wait while it is held.
struct Slow(Arc<Shelf>);

struct SlowReader {
    shelf: Arc<Shelf>,
    inner: Box<dyn Read + Send>,
}

impl Blobs for Slow {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        let inner = self.0.open(blob)?;
        Ok(Box::new(SlowReader { shelf: Arc::clone(&self.0), inner }))
    }
}

impl Read for SlowReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Few bytes at a time, so that a reader can be stopped in between.
        if self.shelf.held.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
            let length = buffer.len().min(1);
            return self.inner.read(&mut buffer[..length]);
        }
        self.inner.read(buffer)
    }
}

struct Bench {
    scratch: tempfile::TempDir,
    shelf: Arc<Shelf>,
    settings: config::Baseline,
    health: Arc<Health>,
    store: Arc<Store>,
    events: Receiver<BaselineEvent>,
    recorder: Recorder,
}

fn bench() -> Bench {
    bench_with(config::Baseline { threads: 2, ..Default::default() })
}

fn bench_with(settings: config::Baseline) -> Bench {
    let scratch = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let health = Arc::new(Health::default());
    let store = Store::open(&scratch.path().join("baselines"), Arc::clone(&health)).unwrap();
    let store = Arc::new(store);
    let (sender, events) = bounded(1000);
    let blobs = Arc::new(Slow(Arc::clone(&shelf)));
    let recorder = Recorder::start(Arc::clone(&store), &settings, blobs, sender, health.clone());
    Bench { scratch, shelf, settings, health, store, events, recorder }
}

impl Bench {
    /// As after a restart of the daemon.
    fn restart(self) -> Bench {
        let Bench { scratch, shelf, settings, health, store, recorder, .. } = self;
        recorder.stop();
        drop(store);
        let store = Store::open(&scratch.path().join("baselines"), Arc::clone(&health)).unwrap();
        let store = Arc::new(store);
        let (sender, events) = bounded(1000);
        let blobs = Arc::new(Slow(Arc::clone(&shelf)));
        let recorder =
            Recorder::start(Arc::clone(&store), &settings, blobs, sender, health.clone());
        Bench { scratch, shelf, settings, health, store, events, recorder }
    }

    fn has_blob(&self, archive: &Archive) {
        self.shelf.blobs.lock().unwrap().insert(archive.digest(), archive.bytes.clone());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// The layers of an image, unpacked into directories named for `user`, once.
    fn layers(&self, user: &str, archives: &[&Archive]) -> Vec<Layer> {
        let diff_ids: Vec<DiffId> = archives.iter().map(|archive| archive.diff_id()).collect();
        let chains = ChainId::of_layers(&diff_ids);
        let layers =
            archives.iter().zip(&chains).enumerate().map(|(place, (archive, chain_id))| {
                let directory = self.path(&format!("{user}-{}", &chain_id.hex()[..8]));
                if !directory.exists() {
                    archive.unpack(&directory, place == 0);
                }
                Layer {
                    id: LayerId::Diff(archive.diff_id()),
                    chain_id: *chain_id,
                    directory: Some(directory),
                    blob: Some(archive.blob()),
                }
            });
        layers.collect()
    }

    fn container(&self, name: &str, layers: &[Layer]) {
        let container = Some(ContainerId::new("default", name));
        self.recorder.submit(RecordRequest { container, ..job(layers) });
    }

    #[track_caller]
    fn asked(&self, layers: &[Layer], proof: Proof) -> Result<Recorded, String> {
        let (done, result) = bounded(1);
        self.recorder.submit(RecordRequest {
            proof,
            done: Some(Box::new(move |sent| done.send(sent).unwrap())),
            ..job(layers)
        });
        result.recv_timeout(SOON).expect("a job comes to its end")
    }

    fn known_by(&self, layers: &[Layer]) -> Vec<(KnownBy, Option<String>)> {
        let (_, layers) = self.store.known_by(chain_of(layers));
        layers.into_iter().map(|(_, known_by, why)| (known_by, why)).collect()
    }

    #[track_caller]
    fn is_verified(&self, layers: &[Layer]) {
        // What is not recorded yet is not known by a proof either.
        eventually("the proof", || self.store.known_by(chain_of(layers)).0 == KnownBy::Verified);
    }

    /// The reason why the only layer is not verified, once there is one.
    #[track_caller]
    fn reason(&self, layers: &[Layer]) -> String {
        let mut reason = None;
        eventually("a reason", || {
            let known = self.known_by(layers);
            reason = known.into_iter().find_map(|(known_by, why)| {
                assert_eq!(known_by, KnownBy::Snapshot);
                why
            });
            reason.is_some()
        });
        reason.unwrap()
    }

    /// The next event that is not the repetition of a baseline.
    #[track_caller]
    fn tampered(&self) -> (LayerId, String, Vec<LayerDifference>, u64) {
        loop {
            match self.events.recv_timeout(SOON).expect("the recorder sends an event") {
                BaselineEvent::Tampered { layer, compared_with, differences, total, .. } => {
                    return (layer, compared_with, differences, total);
                }
                BaselineEvent::Ready { .. } => (),
                BaselineEvent::Failed { reason, .. } => panic!("{reason}"),
            }
        }
    }

    #[track_caller]
    fn ready(&self) -> (Arc<ImageBaseline>, Option<FileTime>) {
        match self.events.recv_timeout(SOON).expect("the recorder sends an event") {
            BaselineEvent::Ready { baseline, unchanged_since, .. } => (baseline, unchanged_since),
            BaselineEvent::Tampered { compared_with, differences, .. } => {
                panic!("{compared_with}: {differences:?}")
            }
            BaselineEvent::Failed { reason, .. } => panic!("{reason}"),
        }
    }

    /// Waits until the directories are known to equal the baseline up to then.
    #[track_caller]
    fn known_until(&self, time: FileTime) {
        while self.ready().1 != Some(time) {}
    }

    /// Waits until the recorder has carried out all earlier requests.
    #[track_caller]
    fn wait(&self, layers: &[Layer]) {
        self.asked(layers, Proof::Later).unwrap();
        eventually("all comparisons", || self.recorder.queue().verifying == 0);
        self.asked(layers, Proof::Later).unwrap();
    }

    #[track_caller]
    fn nothing_tampered(&self) {
        for event in self.events.try_iter() {
            if let BaselineEvent::Tampered { compared_with, differences, .. } = event {
                panic!("{compared_with}: {differences:?}");
            }
        }
    }
}

fn job(layers: &[Layer]) -> RecordRequest {
    RecordRequest {
        image: None,
        container: None,
        layers: layers.to_vec(),
        proof: Proof::Later,
        progress: None,
        done: None,
    }
}

fn chain_of(layers: &[Layer]) -> ChainId {
    layers.last().unwrap().chain_id
}

fn content(baseline: &ImageBaseline, path: &str) -> Option<Blake3Hash> {
    baseline.get(&RootfsPath::new(path).unwrap()).and_then(|known| known.entry.blake3)
}

fn directory(layer: &Layer) -> &Path {
    layer.directory.as_deref().unwrap()
}

fn paths(differences: &[LayerDifference]) -> Vec<String> {
    differences.iter().map(|difference| difference.path.to_string()).collect()
}

const BASE: &str = "
    /bin 755 dir
    /bin/ls 755 ls
    /bin/sh 755 sh
    /etc 755 dir
    /etc/motd 644 welcome";
const UPPER: &str = "
    /opt 755 dir
    /opt/tool 755 tool";

// ---- blobs

#[test]
fn a_blob_with_the_same_content_proves_the_layer_and_is_read_once() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    bench.has_blob(&base);
    bench.has_blob(&upper);
    let layers = bench.layers("a", &[&base, &upper]);
    bench.recorder.submit(job(&layers));
    bench.is_verified(&layers);
    bench.nothing_tampered();
    assert_eq!(bench.shelf.opened.load(Ordering::Relaxed), 2);

    let bench = bench.restart();
    assert_eq!(bench.store.known_by(chain_of(&layers)).0, KnownBy::Verified);
    let recorded = bench.asked(&layers, Proof::Blobs).unwrap();
    assert!(recorded.layers.iter().all(|layer| layer.blob == Witness::NotAsked));
    assert_eq!(bench.shelf.opened.load(Ordering::Relaxed), 2, "nothing is verified twice");
    assert_eq!(bench.health.losses(), []);
}

#[test]
fn what_was_not_verified_before_a_restart_is_verified_when_its_blob_shows_up() {
    let bench = bench();
    let base = archive(BASE);
    let layers = bench.layers("a", &[&base]);
    bench.recorder.submit(job(&layers));
    assert_eq!(bench.reason(&layers), "containerd has no such blob");
    assert_eq!(bench.health.losses(), [], "that is no failure");

    let bench = bench.restart();
    assert_eq!(bench.reason(&layers), "containerd has no such blob");
    bench.has_blob(&base);
    bench.recorder.submit(job(&layers));
    bench.is_verified(&layers);
    assert_eq!(bench.known_by(&layers), [(KnownBy::Verified, None)]);
}

#[test]
fn a_directory_that_was_changed_before_it_was_recorded_is_found_by_the_blob() {
    let bench = bench();
    let base = archive(BASE);
    bench.has_blob(&base);
    let layers = bench.layers("a", &[&base]);
    fs::write(directory(&layers[0]).join("bin/ls"), "LS").unwrap();
    bench.container("c", &layers);
    assert_eq!(content(&bench.ready().0, "/bin/ls"), Some(blake3_of("LS")));

    let (layer, compared_with, differences, total) = bench.tampered();
    assert_eq!((layer, total), (layers[0].id, 1));
    assert!(compared_with.contains(directory(&layers[0]).to_str().unwrap()), "{compared_with}");
    assert_eq!(paths(&differences), ["/bin/ls"]);
    let hash = |entry: &Option<LayerEntry>| match entry {
        Some(LayerEntry::File(file)) => file.blake3,
        _ => None,
    };
    assert_eq!(hash(&differences[0].expected), Some(blake3_of("ls")), "as the blob says");
    assert_eq!(hash(&differences[0].found), Some(blake3_of("LS")), "as it is on disk");

    // The baseline is the blob's now, and the directory is not to be trusted.
    let (baseline, unchanged_since) = bench.ready();
    assert_eq!(content(&baseline, "/bin/ls"), Some(blake3_of("ls")));
    assert_eq!(unchanged_since, None);
    bench.is_verified(&layers);
    let bench = bench.restart();
    let stored = bench.store.image(chain_of(&layers)).unwrap().unwrap();
    assert_eq!(content(&stored, "/bin/ls"), Some(blake3_of("ls")));
    assert_eq!(bench.store.known_by(chain_of(&layers)).0, KnownBy::Verified);
}

/// The uppermost layer's /tmp is made 0755, below it is 1777.
#[track_caller]
fn check_directory(upper: &'static str, tampered: bool) {
    let bench = bench();
    let (base, upper) = (archive("tmp 1777 dir"), archive(upper));
    bench.has_blob(&base);
    bench.has_blob(&upper);
    let layers = bench.layers("a", &[&base, &upper]);
    set_mode(&directory(&layers[1]).join("tmp"), 0o755);
    bench.recorder.submit(job(&layers));
    if tampered {
        assert_eq!(paths(&bench.tampered().2), ["/tmp"]);
    }
    bench.is_verified(&layers);
    bench.nothing_tampered();
}

#[test]
fn unpackers_need_not_agree_on_directories_that_an_archive_does_not_name() {
    check_directory("tmp/x 644 X", false);
    check_directory("tmp 1777 dir\n tmp/x 644 X", true);
}

/// Records a layer beside a blob that `damage` has changed.
#[track_caller]
fn check_not_verified(damage: impl Fn(&mut Vec<u8>, &mut Blob), reason: &str, failures: u64) {
    let bench = bench();
    let base = archive(BASE);
    let mut layers = bench.layers("a", &[&base]);
    let mut bytes = base.bytes.clone();
    damage(&mut bytes, layers[0].blob.as_mut().unwrap());
    let digest = layers[0].blob.as_ref().unwrap().digest.clone();
    bench.shelf.blobs.lock().unwrap().insert(digest, bytes);
    bench.recorder.submit(job(&layers));
    let why = bench.reason(&layers);
    assert!(why.contains(reason), "{why}");
    assert_eq!(bench.health.count(Failure::BlobCorrupt), failures);
    bench.nothing_tampered();

    // The same without a directory: then there is no baseline, and nothing is kept.
    let other = archive(UPPER);
    let mut layers = bench.layers("a", &[&other]);
    let blob = layers[0].blob.as_mut().unwrap();
    let mut bytes = other.bytes.clone();
    damage(&mut bytes, blob);
    bench.shelf.blobs.lock().unwrap().insert(blob.digest.clone(), bytes);
    layers[0].directory = None;
    let why = bench.asked(&layers, Proof::Later).map(drop).unwrap_err();
    assert!(why.contains(reason), "{why}");
    assert!(why.contains(&layers[0].id.to_string()), "{why}");
    assert_eq!(bench.store.layers_of(chain_of(&layers)), None);
    assert!(!bench.store.has_layer(layers[0].id).unwrap());
}

#[test]
fn a_blob_with_another_digest_proves_nothing_and_is_reported() {
    check_not_verified(|bytes, _| bytes[600] ^= 1, "it is damaged, or it was changed", 1);
}

#[test]
fn a_truncated_blob_proves_nothing_and_is_reported() {
    let truncate = |bytes: &mut Vec<u8>, _: &mut Blob| bytes.truncate(bytes.len() / 3);
    check_not_verified(truncate, "it is damaged, or it was changed", 1);
}

#[test]
fn a_blob_that_is_longer_than_the_manifest_says_proves_nothing() {
    let extend = |bytes: &mut Vec<u8>, _: &mut Blob| bytes.extend([0; 4096]);
    check_not_verified(extend, "it is damaged, or it was changed", 1);
}

#[test]
fn a_blob_of_another_layer_proves_nothing_and_is_reported() {
    let other = archive("/x 644 other");
    let swap = |bytes: &mut Vec<u8>, blob: &mut Blob| {
        (*bytes, *blob) = (other.bytes.clone(), other.blob());
    };
    check_not_verified(swap, "not to the diff ID", 1);
}

#[test]
fn a_blob_that_is_no_archive_proves_nothing() {
    let noise = |bytes: &mut Vec<u8>, blob: &mut Blob| {
        *bytes = b"no archive at all".repeat(100);
        blob.digest = DiffId(Sha256::digest(&bytes).into()).to_string();
        blob.size = bytes.len() as u64;
    };
    check_not_verified(noise, "its blob sha256:", 0);
}

#[test]
fn foreign_and_encrypted_layers_have_their_reasons() {
    let foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
    check_not_verified(
        |_, blob| {
            blob.media_type = foreign.into();
            blob.digest = format!("sha256:{}", "0".repeat(64));
        },
        "",
        1,
    );
    let encrypted = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted";
    check_not_verified(|_, blob| blob.media_type = encrypted.into(), "encrypted", 0);

    let bench = bench();
    let base = archive(BASE);
    let mut layers = bench.layers("a", &[&base]);
    layers[0].blob.as_mut().unwrap().media_type = foreign.into();
    bench.recorder.submit(job(&layers));
    let reason = bench.reason(&layers);
    assert!(reason.starts_with("it is a foreign layer"), "{reason}");
}

#[test]
fn a_layer_without_a_blob_has_a_reason_and_no_failure() {
    let bench = bench();
    let base = archive(BASE);
    let mut layers = bench.layers("a", &[&base]);
    layers[0].blob = None;
    let recorded = bench.asked(&layers, Proof::Blobs).unwrap();
    assert_eq!(recorded.layers[0].blob, Witness::Unavailable(NO_BLOB.into()));
    assert_eq!(bench.known_by(&layers), [(KnownBy::Snapshot, Some(NO_BLOB.into()))]);
    assert_eq!(bench.health.losses(), []);

    layers[0].directory = None;
    layers[0].id = LayerId::Diff(DiffId([9; 32]));
    let reason = bench.asked(&layers, Proof::Later).map(drop).unwrap_err();
    assert!(reason.contains("it has no directory of its own, and containerd's"), "{reason}");
}

#[test]
fn a_bomb_is_refused_by_the_name_of_its_limit() {
    let settings = config::Baseline { max_layer_bytes: 2048, threads: 1, ..Default::default() };
    let bench = bench_with(settings);
    let base = archive(BASE);
    bench.has_blob(&base);
    let layers = bench.layers("a", &[&base]);
    bench.recorder.submit(job(&layers));
    let reason = bench.reason(&layers);
    assert!(reason.contains("max_layer_bytes"), "{reason}");
}

#[test]
fn a_layer_without_a_directory_is_recorded_from_its_blob_and_proved_by_that() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive("/bin/tool 755 tool"));
    bench.has_blob(&base);
    bench.has_blob(&upper);
    let mut layers = bench.layers("a", &[&base]);
    layers[0].directory = None;
    let above = ChainId::of_layers(&[base.diff_id(), upper.diff_id()])[1];
    layers.push(Layer {
        id: LayerId::Diff(upper.diff_id()),
        chain_id: above,
        directory: None,
        blob: Some(upper.blob()),
    });
    let recorded = bench.asked(&layers, Proof::Later).unwrap();
    assert!(recorded.layers.iter().all(|layer| layer.known_by == KnownBy::Verified));
    assert_eq!(content(&recorded.baseline, "/bin/ls"), Some(blake3_of("ls")));
    assert_eq!(content(&recorded.baseline, "/bin/tool"), Some(blake3_of("tool")));
    assert_eq!(bench.shelf.opened.load(Ordering::Relaxed), 2);
}

#[test]
fn a_directory_whose_content_is_elsewhere_gives_way_to_the_blob() {
    let bench = bench();
    let base = archive(BASE);
    bench.has_blob(&base);
    let layers = bench.layers("a", &[&base]);
    let bin = directory(&layers[0]).join("bin");
    setxattr(&bin, "trusted.overlay.redirect", b"/x", XattrFlags::empty())
        .expect("this test must run as root");
    let recorded = bench.asked(&layers, Proof::Later).unwrap();
    assert_eq!(recorded.layers[0].known_by, KnownBy::Verified);
    assert_eq!(content(&recorded.baseline, "/bin/ls"), Some(blake3_of("ls")));
}

// ---- what a layer hides

#[test]
fn a_layer_recorded_as_a_bottom_is_read_again_where_it_hides_something() {
    let bench = bench();
    let base = archive(BASE);
    let hiding = archive("/etc 755 dir\n/etc/new 644 new\n- /etc/motd");
    let alone = bench.layers("alone", &[&hiding]);
    bench.asked(&alone, Proof::Later).unwrap();
    assert!(!bench.recorder.unrecorded(&[alone[0].id]).contains(&alone[0].id));

    let stack = bench.layers("stack", &[&base, &hiding]);
    let ids: Vec<LayerId> = stack.iter().map(|layer| layer.id).collect();
    assert_eq!(bench.recorder.unrecorded(&ids), ids, "also the one that lacks its whiteouts");
    let recorded = bench.asked(&stack, Proof::Later).unwrap();
    assert_eq!(content(&recorded.baseline, "/etc/motd"), None);
    assert_eq!(content(&recorded.baseline, "/etc/new"), Some(blake3_of("new")));
    assert_eq!(bench.recorder.unrecorded(&ids), []);
    // Where it is the bottom it is still good, and nothing is read again for it.
    fs::remove_dir_all(directory(&alone[0])).unwrap();
    let again = bench.asked(&alone, Proof::Later).unwrap();
    assert_eq!(content(&again.baseline, "/etc/new"), Some(blake3_of("new")));
    bench.nothing_tampered();
}

#[test]
fn a_layer_whose_proof_was_lost_is_read_again_above_others() {
    let bench = bench();
    let base = archive(BASE);
    let hiding = archive("/etc 755 dir\n- /etc/motd");
    let mut alone = bench.layers("alone", &[&hiding]);
    alone[0].blob = None;
    bench.asked(&alone, Proof::Later).unwrap();
    for proof in files_below(&bench.path("baselines/proofs")) {
        fs::remove_file(proof).unwrap();
    }
    let bench = bench.restart();
    let mut stack = bench.layers("stack", &[&base, &hiding]);
    for layer in &mut stack {
        layer.blob = None;
    }
    let recorded = bench.asked(&stack, Proof::Later).unwrap();
    assert_eq!(content(&recorded.baseline, "/etc/motd"), None);

    // Nothing to read it from: then it is used as it is.
    for proof in files_below(&bench.path("baselines/proofs")) {
        fs::remove_file(proof).unwrap();
    }
    drop(recorded);
    let bench = bench.restart();
    for layer in &mut stack {
        layer.directory = None;
    }
    let recorded = bench.asked(&stack, Proof::Later).unwrap();
    assert_eq!(content(&recorded.baseline, "/etc/motd"), None);
}

#[test]
fn the_blob_gives_a_bottom_layer_what_it_hides() {
    let bench = bench();
    let hiding = archive("/etc 755 dir\n/etc/new 644 new\n- /etc/motd");
    bench.has_blob(&hiding);
    let alone = bench.layers("alone", &[&hiding]);
    bench.recorder.submit(job(&alone));
    bench.is_verified(&alone);
    bench.nothing_tampered();
    let base = archive(BASE);
    let stack = bench.layers("stack", &[&base, &hiding]);
    let ids: Vec<LayerId> = stack.iter().map(|layer| layer.id).collect();
    assert_eq!(bench.recorder.unrecorded(&ids), ids[..1]);
    let recorded = bench.asked(&stack, Proof::Deep).unwrap();
    assert_eq!(content(&recorded.baseline, "/etc/motd"), None);
    assert_eq!(recorded.layers[1].directory, Witness::Same);
}

// ---- on demand

/// Verifies deeply what `change` was done to.
#[track_caller]
fn check_deep(change: impl Fn(&Path), path: &str) {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    bench.has_blob(&base);
    bench.has_blob(&upper);
    let layers = bench.layers("a", &[&base, &upper]);
    bench.asked(&layers, Proof::Later).unwrap();
    let same = LayerReport {
        id: layers[0].id,
        known_by: KnownBy::Verified,
        blob: Witness::Same,
        directory: Witness::Same,
        differences: vec![],
    };
    let recorded = bench.asked(&layers, Proof::Deep).unwrap();
    assert_eq!(recorded.layers, [same.clone(), LayerReport { id: layers[1].id, ..same.clone() }]);
    bench.nothing_tampered();

    change(directory(&layers[0]));
    let recorded = bench.asked(&layers, Proof::Deep).unwrap();
    let report = &recorded.layers[0];
    assert_eq!((&report.blob, &report.directory), (&Witness::Same, &Witness::Differs(1)));
    assert_eq!(report.known_by, KnownBy::Verified);
    assert_eq!(paths(&report.differences), [path]);
    assert_eq!(recorded.layers[1].directory, Witness::Same);
    let (layer, compared_with, differences, total) = bench.tampered();
    assert_eq!((layer, paths(&differences), total), (layers[0].id, vec![path.to_owned()], 1));
    assert!(compared_with.contains(directory(&layers[0]).to_str().unwrap()), "{compared_with}");
    assert_eq!(content(&recorded.baseline, "/bin/ls"), Some(blake3_of("ls")));
}

#[test]
fn verifying_deeply_finds_a_flipped_byte() {
    check_deep(
        |directory| {
            let path = directory.join("bin/ls");
            let before = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, "lS").unwrap();
            fs::File::open(&path).unwrap().set_modified(before).unwrap();
        },
        "/bin/ls",
    );
}

#[test]
fn verifying_deeply_finds_a_file_that_was_added() {
    check_deep(|directory| fs::write(directory.join("bin/new"), "new").unwrap(), "/bin/new");
}

#[test]
fn verifying_deeply_finds_a_file_that_was_removed() {
    check_deep(|directory| fs::remove_file(directory.join("etc/motd")).unwrap(), "/etc/motd");
}

#[test]
fn verifying_deeply_finds_a_mode_that_was_changed() {
    check_deep(|directory| set_mode(&directory.join("bin/sh"), 0o4755), "/bin/sh");
}

#[test]
fn proof_on_demand_counts_its_progress() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    bench.has_blob(&base);
    let layers = bench.layers("a", &[&base, &upper]);
    let progress = Arc::new(Progress::default());
    let (done, result) = bounded(1);
    bench.recorder.submit(RecordRequest {
        proof: Proof::Deep,
        progress: Some(Arc::clone(&progress)),
        done: Some(Box::new(move |sent| done.send(sent).unwrap())),
        ..job(&layers)
    });
    let recorded = result.recv_timeout(SOON).unwrap().unwrap();
    assert_eq!(recorded.layers[0].known_by, KnownBy::Verified);
    assert_eq!(recorded.layers[1].known_by, KnownBy::Snapshot);
    let missing = Witness::Unavailable("containerd has no such blob".into());
    assert_eq!(recorded.layers[1].blob, missing);
    assert_eq!(progress.layers_done.load(Ordering::Relaxed), 2);
    assert_eq!(progress.layers_total.load(Ordering::Relaxed), 2);
    assert!(progress.bytes_done.load(Ordering::Relaxed) > 0);
    assert_eq!(bench.recorder.pending(), 0);
}

#[test]
fn the_same_layer_twice_in_a_stack_is_answered_twice() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    for archive in [&base, &upper] {
        bench.has_blob(archive);
    }
    let layers = bench.layers("a", &[&base, &upper, &base, &upper]);
    let recorded = bench.asked(&layers, Proof::Deep).unwrap();
    let reported: Vec<_> =
        recorded.layers.iter().map(|layer| (&layer.blob, &layer.directory)).collect();
    assert_eq!(reported, [(&Witness::Same, &Witness::Same); 4]);
}

// ---- up to when directories are known

fn newest_change(layers: &[Layer]) -> FileTime {
    use std::os::unix::fs::MetadataExt as _;
    let mut newest = FileTime { seconds: 0, nanoseconds: 0 };
    let mut open: Vec<PathBuf> = layers.iter().map(|layer| directory(layer).into()).collect();
    while let Some(path) = open.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let nanoseconds = u32::try_from(stat.ctime_nsec()).unwrap();
        newest = newest.max(FileTime { seconds: stat.ctime(), nanoseconds });
        if stat.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    newest
}

/// Lets the kernel's clock for files tick on.
fn tick() {
    std::thread::sleep(Duration::from_millis(60));
}

#[test]
fn a_ready_event_has_the_time_up_to_which_the_layers_are_known() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    let layers = bench.layers("a", &[&base, &upper]);
    tick();
    bench.container("c", &layers);
    assert_eq!(bench.ready().1, Some(newest_change(&layers)));

    // A layer is unpacked later: the older one is compared again.
    let newer = archive("/srv 755 dir\n/srv/www 644 www");
    let stack = bench.layers("a", &[&base, &newer]);
    tick();
    bench.container("d", &stack);
    let (_, first) = bench.ready();
    assert!(first.unwrap() < newest_change(&stack), "{first:?}");
    bench.known_until(newest_change(&stack));
    bench.wait(&stack);
    bench.nothing_tampered();
    let proof = bench.store.proof(layers[0].id).unwrap();
    let checked = proof.directory(directory(&layers[0])).unwrap();
    assert!(checked.checked_at < checked.unchanged_at, "{checked:?}");
}

#[test]
fn comparing_again_finds_what_was_changed_since() {
    let bench = bench();
    let base = archive(BASE);
    let layers = bench.layers("a", &[&base]);
    tick();
    bench.container("c", &layers);
    bench.ready();
    tick();
    fs::write(directory(&layers[0]).join("bin/sh"), "SH").unwrap();
    let newer = archive(UPPER);
    let stack = bench.layers("a", &[&base, &newer]);
    tick();
    bench.container("d", &stack);
    let (layer, _, differences, _) = bench.tampered();
    assert_eq!((layer, paths(&differences)), (layers[0].id, vec!["/bin/sh".to_owned()]));
    // Now every program of both containers is judged by its content.
    let reported: BTreeMap<ChainId, Option<FileTime>> = (0..2)
        .map(|_| match bench.events.recv_timeout(SOON).unwrap() {
            BaselineEvent::Ready { chain_id, unchanged_since, .. } => (chain_id, unchanged_since),
            event => panic!("{event:?}"),
        })
        .collect();
    assert_eq!(reported, BTreeMap::from([(chain_of(&layers), None), (chain_of(&stack), None)]));
}

#[test]
fn the_same_layers_unpacked_elsewhere_are_compared_before_they_are_trusted() {
    let bench = bench();
    let base = archive(BASE);
    let layers = bench.layers("a", &[&base]);
    tick();
    bench.container("c", &layers);
    assert!(bench.ready().1.is_some());
    let elsewhere = bench.layers("b", &[&base]);
    tick();
    bench.container("d", &elsewhere);
    assert_eq!(bench.ready().1, None);
    bench.known_until(newest_change(&elsewhere));

    let tampered = bench.layers("x", &[&base]);
    fs::write(directory(&tampered[0]).join("bin/evil"), "evil").unwrap();
    bench.container("e", &tampered);
    assert_eq!(bench.ready().1, None);
    let (_, compared_with, differences, _) = bench.tampered();
    assert_eq!(paths(&differences), ["/bin/evil"]);
    assert!(compared_with.contains(directory(&tampered[0]).to_str().unwrap()), "{compared_with}");
}

#[test]
fn a_directory_that_has_vanished_leaves_the_time_unknown() {
    let bench = bench();
    let base = archive(BASE);
    bench.asked(&bench.layers("a", &[&base]), Proof::Later).unwrap();
    let mut elsewhere = bench.layers("b", &[&base]);
    elsewhere[0].blob = None;
    fs::remove_dir_all(directory(&elsewhere[0])).unwrap();
    bench.ready();
    bench.container("c", &elsewhere);
    let (baseline, unchanged_since) = bench.ready();
    assert_eq!(unchanged_since, None);
    assert!(content(&baseline, "/bin/ls").is_some());
    bench.wait(&elsewhere);
    // It is not compared again and again.
    bench.container("c", &elsewhere);
    bench.asked(&elsewhere, Proof::Later).unwrap();
    assert_eq!(bench.recorder.queue().verifying, 0);
    for event in bench.events.try_iter() {
        assert!(matches!(event, BaselineEvent::Ready { unchanged_since: None, .. }), "{event:?}");
    }
}

// ---- periodically

#[test]
fn directories_in_use_are_compared_again_within_the_period() {
    let settings = config::Baseline {
        recheck_period: Duration::from_millis(400),
        threads: 1,
        ..Default::default()
    };
    let bench = bench_with(settings);
    let base = archive(BASE);
    let layers = bench.layers("a", &[&base]);
    tick();
    bench.container("c", &layers);
    bench.ready();
    let checked_at = || {
        let proof = bench.store.proof(layers[0].id).unwrap();
        proof.directory(directory(&layers[0])).map(|checked| checked.checked_at)
    };
    let first = checked_at();
    eventually("the second comparison", || checked_at() > first);
    bench.nothing_tampered();

    fs::write(directory(&layers[0]).join("bin/ls"), "LS").unwrap();
    let (_, _, differences, _) = bench.tampered();
    assert_eq!(paths(&differences), ["/bin/ls"]);
    eventually("the end of trust", || checked_at().is_none());

    // One that differs leaves the others their turns.
    let upper = archive(UPPER);
    let others = bench.layers("b", &[&upper]);
    bench.container("d", &others);
    let checked_at = || {
        let proof = bench.store.proof(others[0].id)?;
        proof.directory(directory(&others[0])).map(|checked| checked.checked_at)
    };
    eventually("the first comparison of the other", || checked_at().is_some());
    let first = checked_at();
    eventually("the second comparison of the other", || checked_at() > first);
}

// ---- containers first

#[test]
fn a_container_waits_for_no_verification() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    bench.has_blob(&base);
    bench.shelf.held.store(true, Ordering::Relaxed);
    let layers = bench.layers("a", &[&base]);
    bench.recorder.submit(job(&layers));
    bench.ready();
    eventually("the verification", || bench.shelf.opened.load(Ordering::Relaxed) == 1);
    let other = bench.layers("a", &[&upper]);
    bench.container("c", &other);
    assert_eq!(content(&bench.ready().0, "/opt/tool"), Some(blake3_of("tool")));
    assert!(bench.recorder.queue().verifying > 0);
    bench.shelf.held.store(false, Ordering::Relaxed);
    bench.is_verified(&layers);
}

#[test]
fn a_container_does_not_wait_for_the_rest_of_an_image() {
    let bench = bench();
    let (base, upper) = (archive(BASE), archive(UPPER));
    bench.has_blob(&base);
    bench.shelf.held.store(true, Ordering::Relaxed);
    // At a byte every five milliseconds this layer takes longer than the test may.
    let mut image = bench.layers("a", &[&base]);
    image[0].directory = None;
    bench.recorder.submit(job(&image));
    eventually("the recording", || bench.shelf.opened.load(Ordering::Relaxed) == 1);
    let queue = bench.recorder.queue();
    assert_eq!((queue.recording, queue.waiting), (1, 0));
    assert!(queue.oldest.is_some());

    let other = bench.layers("a", &[&upper]);
    bench.container("c", &other);
    assert_eq!(content(&bench.ready().0, "/opt/tool"), Some(blake3_of("tool")));
    assert!(!bench.store.has_layer(image[0].id).unwrap(), "the image is not recorded yet");
    bench.shelf.held.store(false, Ordering::Relaxed);
    assert_eq!(content(&bench.ready().0, "/bin/ls"), Some(blake3_of("ls")));
}

#[test]
fn stopping_ends_a_verification_and_the_jobs_that_wait() {
    let bench = bench();
    let base = archive(BASE);
    bench.has_blob(&base);
    let layers = bench.layers("a", &[&base]);
    bench.shelf.held.store(true, Ordering::Relaxed);
    let (done, result) = bounded(1);
    bench.recorder.submit(RecordRequest {
        proof: Proof::Blobs,
        done: Some(Box::new(move |sent| done.send(sent.map(drop)).unwrap())),
        ..job(&layers)
    });
    eventually("the verification", || bench.shelf.opened.load(Ordering::Relaxed) == 1);
    assert_eq!(bench.recorder.queue().recording, 1);
    let started = Instant::now();
    bench.recorder.stop();
    assert!(started.elapsed() < Duration::from_secs(5));
    assert_eq!(result.try_recv().unwrap(), Err("driftd is being stopped".to_owned()));
}

// ---- trouble

/// Unmounts when a test ends, also by a panic.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

#[test]
fn what_a_full_disk_kept_from_a_container_is_recorded_when_there_is_room() {
    let scratch = tempfile::tempdir().unwrap();
    let disk = scratch.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let status = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
        .arg(&disk)
        .status()
        .unwrap();
    assert!(status.success(), "this test must run as root");
    let mount = Mount(disk.clone());
    let health = Arc::new(Health::default());
    let store = Arc::new(Store::open(&mount.0.join("baselines"), Arc::clone(&health)).unwrap());
    let full = mount.0.join("full");
    let fills = fs::write(&full, vec![0; 1 << 20]).unwrap_err();
    assert_eq!(fills.kind(), io::ErrorKind::StorageFull);

    let (sender, events) = bounded(100);
    let settings = config::Baseline { threads: 1, ..Default::default() };
    let blobs = Arc::new(Shelf::default());
    let recorder = Recorder::start(Arc::clone(&store), &settings, blobs, sender, health.clone());
    let base = archive(BASE);
    let unpacked = scratch.path().join("layer");
    base.unpack(&unpacked, true);
    let layers = [Layer {
        id: LayerId::Diff(base.diff_id()),
        chain_id: ChainId::of_layers(&[base.diff_id()])[0],
        directory: Some(unpacked),
        blob: None,
    }];
    let container = Some(ContainerId::new("default", "c"));
    recorder.submit(RecordRequest { container, ..job(&layers) });
    match events.recv_timeout(SOON).unwrap() {
        BaselineEvent::Failed { reason, .. } => {
            assert!(reason.contains("is the disk full"), "{reason}");
        }
        event => panic!("{event:?}"),
    }
    assert_eq!(files_below(&mount.0.join("baselines")), Vec::<PathBuf>::new());
    assert_eq!(health.count(Failure::BaselineUnavailable), 1);

    fs::remove_file(full).unwrap();
    let recorded = std::iter::from_fn(|| Some(events.recv_timeout(SOON).unwrap()))
        .find(|event| matches!(event, BaselineEvent::Ready { .. }));
    assert!(recorded.is_some());
    assert!(store.has_layer(layers[0].id).unwrap());
    recorder.stop();
    drop(store);
}

#[test]
fn a_layer_removed_under_the_walk_is_no_baseline() {
    let bench = bench();
    let text: String =
        (0..3000).map(|number| format!("/{number} 644 content-{number}\n")).collect();
    let many = archive(text.leak());
    let mut layers = bench.layers("a", &[&many]);
    layers[0].blob = None;
    let path = directory(&layers[0]).to_owned();
    let removal = std::thread::spawn(move || fs::remove_dir_all(path).unwrap());
    let result = bench.asked(&layers, Proof::Later);
    removal.join().unwrap();
    match result {
        Ok(recorded) => assert_eq!(recorded.baseline.totals().files, 3000, "it was faster"),
        Err(reason) => {
            assert!(!bench.store.has_layer(layers[0].id).unwrap(), "{reason}");
            assert_eq!(bench.store.images(), []);
        }
    }
}

/// Records many small layers, over and over, until it is killed.
#[test]
#[ignore = "a_daemon_killed_at_any_time_leaves_only_whole_files runs it"]
fn records_until_it_is_killed() {
    let directory = PathBuf::from(std::env::var_os("DRIFTD_TEST_RECORDS_IN").unwrap());
    let health = Arc::new(Health::default());
    let store = Arc::new(Store::open(&directory.join("baselines"), health.clone()).unwrap());
    let shelf = Arc::new(Shelf::default());
    let (sender, events) = bounded(100);
    let settings = config::Baseline { threads: 2, ..Default::default() };
    let blobs: Arc<dyn Blobs> = shelf.clone();
    let recorder = Recorder::start(Arc::clone(&store), &settings, blobs, sender, health.clone());
    std::thread::spawn(move || for _ in events {});
    for turn in 0_u64.. {
        let number = turn % 20;
        let many = archive(layer_text(number));
        let unpacked = directory.join(format!("layer-{number}"));
        if !unpacked.exists() {
            // As containerd makes a snapshot: under another name first.
            let unfinished = directory.join(format!("unpacking-{}", std::process::id()));
            let _ = fs::remove_dir_all(&unfinished);
            many.unpack(&unfinished, true);
            fs::rename(unfinished, &unpacked).unwrap();
        }
        shelf.blobs.lock().unwrap().insert(many.digest(), many.bytes.clone());
        let chain_id = ChainId::of_layers(&[many.diff_id()])[0];
        let layer = Layer {
            id: LayerId::Diff(many.diff_id()),
            chain_id,
            directory: Some(unpacked),
            blob: Some(many.blob()),
        };
        let (done, result) = bounded(1);
        let container = Some(ContainerId::new("default", "c"));
        let done: crate::baseline::recorder::Done =
            Box::new(move |sent| done.send(sent.map(drop)).unwrap());
        recorder.submit(RecordRequest { container, done: Some(done), ..job(&[layer]) });
        result.recv().unwrap().unwrap();
        fs::write(directory.join("recorded"), vec![0; usize::try_from(turn + 1).unwrap()]).unwrap();
        if turn % 3 == 0 {
            // Again, from nothing.
            recorder.collect(std::collections::HashSet::new());
            let (done, result) = bounded(1);
            recorder.remove(chain_id, Box::new(move |sent| done.send(sent).unwrap()));
            result.recv().unwrap().unwrap();
        }
    }
}

fn layer_text(number: u64) -> &'static str {
    let lines = (0..200).map(|file| format!("/{number}-{file} 644 content-{number}-{file}\n"));
    lines.collect::<String>().leak()
}

#[test]
fn a_daemon_killed_at_any_time_leaves_only_whole_files() {
    let scratch = tempfile::tempdir().unwrap();
    let mut seen = 0;
    for turn in 0_u64..30 {
        let count = scratch.path().join("recorded");
        fs::write(&count, "").unwrap();
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "baseline::verify::tests::records_until_it_is_killed"])
            .env("DRIFTD_TEST_RECORDS_IN", scratch.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Any moment will do: of the start, of an unpacking, of a write, of a proof.
        let enough = turn % 4 * 2;
        eventually("the work of a child", || fs::metadata(&count).unwrap().len() >= enough);
        std::thread::sleep(Duration::from_millis(turn * 7 % 40));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9), "it was at work until then");

        let health = Arc::new(Health::default());
        let store = Store::open(&scratch.path().join("baselines"), Arc::clone(&health)).unwrap();
        for record in store.images() {
            let image = store.image(record.chain_id).unwrap().expect("its layers are whole");
            assert_eq!(image.totals().files, 200);
            for known in image.files().filter(|known| known.entry.blake3.is_some()) {
                let name = known.entry.path.to_string();
                let expected = blake3_of(&format!("content-{}", name.trim_start_matches('/')));
                assert_eq!(known.entry.blake3, Some(expected), "{name}");
            }
            seen += 1;
        }
        assert_eq!(health.losses(), [], "nothing had to be set aside");
        let unfinished = files_below(&scratch.path().join("baselines"))
            .into_iter()
            .find(|path| path.extension().is_some_and(|extension| extension == "tmp"));
        assert_eq!(unfinished, None);
    }
    assert!(seen > 30, "the children recorded next to nothing: {seen}");
}
