//! The recorder without blobs: its queue, the order of jobs, and what it removes.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::*;
use crate::baseline::blake3_of;
use crate::baseline::merge::ImageBaseline;
use crate::baseline::store::{Collected, ImageName};
use crate::baseline::types::{Progress, Proof};
use crate::model::{Blob, ChainId, ContainerId, DiffId, Layer, LayerId, RootfsPath};

const SOON: Duration = Duration::from_secs(20);

struct Bench {
    scratch: tempfile::TempDir,
    store: Arc<Store>,
    health: Arc<Health>,
    events: Receiver<BaselineEvent>,
    recorder: Recorder,
}

struct NoBlobs;

impl Blobs for NoBlobs {
    fn open(&self, _: &Blob) -> Result<Box<dyn std::io::Read + Send>, String> {
        Err("there are no blobs here".into())
    }
}

fn start(store: Arc<Store>, events: Sender<BaselineEvent>, health: Arc<Health>) -> Recorder {
    let settings = config::Baseline { threads: 2, retention: Duration::ZERO, ..Default::default() };
    Recorder::start(store, &settings, Arc::new(NoBlobs), events, health)
}

/// A recorder whose events are not read yet: `room` of them fit into the channel.
fn bench(room: usize) -> Bench {
    let scratch = tempfile::tempdir().unwrap();
    let health = Arc::new(Health::default());
    let store =
        Arc::new(Store::open(&scratch.path().join("baselines"), Arc::clone(&health)).unwrap());
    let (sender, events) = bounded(room);
    let recorder = start(Arc::clone(&store), sender, Arc::clone(&health));
    Bench { scratch, store, health, events, recorder }
}

impl Bench {
    fn layer_directory(&self, number: u8) -> PathBuf {
        self.scratch.path().join(format!("layer-{number}"))
    }

    /// Unpacks a layer with one file, which holds the layer's number.
    fn unpack(&self, number: u8) {
        fs::create_dir(self.layer_directory(number)).unwrap();
        fs::write(self.layer_directory(number).join("file"), number.to_string()).unwrap();
    }

    /// A job for a stack of layers; its chain ID is the last layer's number.
    fn job(&self, layers: &[u8]) -> RecordRequest {
        let layers = layers.iter().map(|number| Layer {
            id: LayerId::Diff(DiffId([*number; 32])),
            chain_id: chain(*number),
            directory: Some(self.layer_directory(*number)),
            blob: None,
        });
        RecordRequest {
            image: None,
            container: None,
            layers: layers.collect(),
            proof: Proof::Later,
            progress: None,
            done: None,
        }
    }

    fn image_job(&self, name: &str, layers: &[u8]) -> RecordRequest {
        let image =
            ImageName { namespace: "default".into(), name: name.into(), manifest_digest: None };
        RecordRequest { image: Some(image), ..self.job(layers) }
    }

    #[track_caller]
    fn next(&self) -> Result<(ChainId, Arc<ImageBaseline>), (ChainId, String)> {
        match self.events.recv_timeout(SOON).expect("the recorder sends an event") {
            BaselineEvent::Ready { chain_id, baseline, .. } => Ok((chain_id, baseline)),
            BaselineEvent::Failed { chain_id, reason } => Err((chain_id, reason)),
            BaselineEvent::Tampered { layer, .. } => panic!("{layer} was not tampered with"),
        }
    }
}

fn chain(number: u8) -> ChainId {
    ChainId([number; 32])
}

#[track_caller]
fn content_of(baseline: &ImageBaseline) -> Option<crate::model::Blake3Hash> {
    baseline.get(&RootfsPath::new("/file").unwrap()).unwrap().entry.blake3
}

#[test]
fn a_chain_is_recorded_once_and_then_known_without_its_directories() {
    let bench = bench(4);
    bench.unpack(1);
    bench.unpack(2);
    let progress = Arc::new(Progress::default());
    let (done, result) = bounded(1);
    bench.recorder.submit(RecordRequest {
        progress: Some(Arc::clone(&progress)),
        done: Some(Box::new(move |sent| done.send(sent).unwrap())),
        ..bench.image_job("busybox", &[1, 2])
    });
    let (chain_id, baseline) = bench.next().unwrap();
    assert_eq!((chain_id, content_of(&baseline)), (chain(2), Some(blake3_of("2"))));
    assert!(Arc::ptr_eq(&result.recv_timeout(SOON).unwrap().unwrap().baseline, &baseline));
    assert_eq!(progress.files_done.load(Ordering::Relaxed), 2);
    assert_eq!(progress.layers_done.load(Ordering::Relaxed), 2);
    assert_eq!(progress.layers_total.load(Ordering::Relaxed), 2);
    assert_eq!(bench.store.find("busybox").unwrap().chain_id, chain(2));

    fs::remove_dir_all(bench.layer_directory(1)).unwrap();
    fs::remove_dir_all(bench.layer_directory(2)).unwrap();
    assert_eq!(bench.recorder.unrecorded(&bench.store.layers_of(chain(2)).unwrap()), []);
    bench.recorder.submit(bench.job(&[1, 2]));
    assert!(Arc::ptr_eq(&bench.next().unwrap().1, &baseline));
    // Another image over a layer that is known.
    bench.unpack(3);
    bench.recorder.submit(bench.job(&[1, 3]));
    assert_eq!(bench.next().unwrap().0, chain(3));
    assert_eq!(bench.health.losses(), []);
    bench.recorder.stop();
}

#[test]
fn a_layer_that_is_gone_fails_its_image_and_no_other() {
    let bench = bench(4);
    bench.unpack(2);
    let (done, result) = bounded(1);
    bench.recorder.submit(RecordRequest {
        done: Some(Box::new(move |sent| done.send(sent.map(drop)).unwrap())),
        ..bench.job(&[1])
    });
    bench.recorder.submit(bench.job(&[2]));
    let (chain_id, reason) = bench.next().unwrap_err();
    assert_eq!(chain_id, chain(1));
    let directory = bench.layer_directory(1);
    assert!(reason.contains(directory.to_str().unwrap()), "{reason}");
    assert_eq!(result.recv_timeout(SOON).unwrap(), Err(reason));
    assert_eq!(bench.next().unwrap().0, chain(2));
    assert_eq!(bench.health.count(Failure::BaselineUnavailable), 1);
    assert_eq!(bench.recorder.pending(), 0);
    bench.recorder.stop();
}

fn corrupt(store: &Path) {
    for file in fs::read_dir(store.join("layers")).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        // A new file: the old one may be mapped.
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_corrupt_layer_is_recorded_again() {
    let bench = bench(4);
    bench.unpack(1);
    bench.recorder.submit(bench.job(&[1]));
    drop(bench.next().unwrap());
    corrupt(&bench.scratch.path().join("baselines"));
    // As after a restart; the receiver of the event has dropped the baseline too.
    bench.recorder.clone().stop();
    let store = Store::open(&bench.scratch.path().join("baselines"), Arc::clone(&bench.health));
    let (sender, events) = bounded(4);
    let again = start(Arc::new(store.unwrap()), sender, Arc::clone(&bench.health));
    assert_eq!(
        again.unrecorded(&[LayerId::Diff(DiffId([1; 32]))]),
        [LayerId::Diff(DiffId([1; 32]))]
    );
    again.submit(bench.job(&[1]));
    let event = events.recv_timeout(SOON).unwrap();
    assert!(matches!(event, BaselineEvent::Ready { .. }), "{event:?}");
    assert_eq!(bench.health.count(Failure::BaselineCorrupt), 1);
    again.stop();
}

#[test]
fn containers_go_before_images() {
    let bench = bench(0);
    for number in 1..=3 {
        bench.unpack(number);
    }
    // The first job's event waits for a reader, so the others queue up.
    bench.recorder.submit(bench.job(&[1]));
    while !bench.store.images().iter().any(|record| record.chain_id == chain(1)) {
        std::thread::yield_now();
    }
    bench.recorder.submit(bench.image_job("busybox", &[2]));
    let container = Some(ContainerId::new("default", "c"));
    bench.recorder.submit(RecordRequest { container, ..bench.job(&[3]) });
    let order: Vec<ChainId> = (0..3).map(|_| bench.next().unwrap().0).collect();
    assert_eq!(order, [chain(1), chain(3), chain(2)]);
    bench.recorder.stop();
}

#[test]
fn a_full_queue_turns_jobs_away_and_reports_them() {
    let bench = bench(0);
    let (done, result) = bounded(1);
    // The first job fails, and then waits until its event is read.
    bench.recorder.submit(bench.job(&[1]));
    while bench.health.count(Failure::BaselineUnavailable) < 1 {
        std::thread::yield_now();
    }
    for _ in 0..QUEUE {
        bench.recorder.submit(bench.job(&[1]));
    }
    assert_eq!(bench.health.count(Failure::BaselineUnavailable), 1);
    bench.recorder.submit(RecordRequest {
        done: Some(Box::new(move |sent| done.send(sent.map(drop)).unwrap())),
        ..bench.job(&[2])
    });
    let reason = result.try_recv().expect("submit answers at once").unwrap_err();
    assert!(reason.contains("tried again"), "{reason}");
    // The event of the job that was turned away comes as soon as there is room.
    let mut failures = std::iter::from_fn(|| Some(bench.next().unwrap_err()));
    assert!(failures.any(|(chain_id, why)| chain_id == chain(2) && why == reason));
    bench.recorder.stop();
}

#[test]
fn stopping_waits_for_no_reader_and_ends_every_job() {
    let bench = bench(0);
    let (done, result) = bounded(3);
    for _ in 0..3 {
        let done = done.clone();
        bench.recorder.submit(RecordRequest {
            done: Some(Box::new(move |sent| done.send(sent.map(drop)).unwrap())),
            ..bench.job(&[1])
        });
    }
    bench.recorder.clone().stop();
    assert_eq!(result.try_iter().count(), 3);
    assert_eq!(bench.recorder.pending(), 0);
}

#[test]
fn names_follow_the_images_and_what_has_none_is_removed() {
    let bench = bench(4);
    bench.unpack(1);
    bench.recorder.submit(bench.image_job("busybox", &[1]));
    drop(bench.next().unwrap());
    bench.recorder.image_removed("default", "busybox");
    bench.recorder.collect(HashSet::from([chain(1)]));
    bench.recorder.submit(bench.job(&[1]));
    drop(bench.next().unwrap());
    assert_eq!(bench.store.images()[0].names, []);

    bench.recorder.collect(HashSet::new());
    bench.recorder.submit(bench.job(&[9]));
    bench.next().unwrap_err();
    assert_eq!(bench.store.images(), []);
    bench.recorder.stop();
}

#[track_caller]
fn answer<T: Send + 'static>(request: impl FnOnce(Answer<T>)) -> Result<T, String> {
    let (done, result) = bounded(1);
    request(Box::new(move |sent| done.send(sent).unwrap()));
    result.recv_timeout(SOON).expect("every request is answered")
}

#[test]
fn what_a_container_uses_is_not_removed() {
    let bench = bench(10);
    bench.unpack(1);
    let container = Some(ContainerId::new("default", "shop"));
    bench.recorder.submit(RecordRequest { container, ..bench.image_job("busybox", &[1]) });
    drop(bench.next().unwrap());
    let refused = answer(|done| bench.recorder.remove(chain(1), done));
    assert_eq!(refused, Err("the container default/shop uses it".to_owned()));
    bench.recorder.image_removed("default", "busybox");
    let pruned = answer(|done| bench.recorder.prune(done));
    assert_eq!(pruned, Ok(Collected::default()));
    assert_eq!(bench.store.images().len(), 1);

    // The container is gone.
    bench.recorder.collect(HashSet::from([chain(9)]));
    assert_eq!(answer(|done| bench.recorder.remove(chain(1), done)), Ok(()));
    assert_eq!(bench.store.images(), []);
    bench.recorder.clone().stop();
    assert_eq!(
        answer(|done| bench.recorder.remove(chain(1), done)),
        Err("driftd is being stopped".to_owned())
    );
}

#[test]
fn pruning_does_not_wait_for_the_retention_period() {
    let scratch = tempfile::tempdir().unwrap();
    let health = Arc::new(Health::default());
    let store = Arc::new(Store::open(scratch.path(), Arc::clone(&health)).unwrap());
    let (sender, events) = bounded(4);
    let settings = config::Baseline { threads: 1, ..Default::default() };
    let recorder =
        Recorder::start(Arc::clone(&store), &settings, Arc::new(NoBlobs), sender, health);
    let directory = scratch.path().join("layer");
    fs::create_dir(&directory).unwrap();
    let layer = Layer {
        id: LayerId::Diff(DiffId([1; 32])),
        chain_id: chain(1),
        directory: Some(directory),
        blob: None,
    };
    recorder.submit(RecordRequest {
        image: None,
        container: None,
        layers: vec![layer],
        proof: Proof::Later,
        progress: None,
        done: None,
    });
    drop(events.recv_timeout(SOON).unwrap());
    recorder.collect(HashSet::new());
    let unneeded = || store.images().first().map(|record| record.unneeded_since.is_some());
    while unneeded() == Some(false) {
        std::thread::yield_now();
    }
    assert_eq!(unneeded(), Some(true), "kept for the retention period");
    let pruned = answer(|done| recorder.prune(done));
    assert!(matches!(pruned, Ok(Collected { images: 1, layers: 1, .. })), "{pruned:?}");
    assert_eq!(store.images(), []);
    recorder.stop();
}
