//! `driftd baseline record --from-archive`: records images of an archive in a directory.
//!
//! Needs no daemon and no containerd, and no root where the directory can be written.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use anyhow::Context as _;

use super::known::{BaselineJson, baseline_json};
use super::progress::{Bar, Done};
use crate::api::baselines;
use crate::baseline::archive::{self, Archive, ArchiveBlob, ArchiveImage};
use crate::baseline::{
    Blobs, ImageName, KnownBy, Progress, Proof, RecordRequest, Recorded, Recorder, Store,
};
use crate::cli::output::safe;
use crate::config;
use crate::health::Health;
use crate::model::{Blob, ChainId, Layer, LayerId, printable};

/// Which images of an archive are recorded, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Task<'a> {
    pub(super) file: &'a Path,
    pub(super) store: &'a Path,
    /// Only the image of this name; `None`: all.
    pub(super) image: Option<&'a str>,
    /// The name to record the image under, instead of those in the archive.
    pub(super) name: Option<&'a str>,
}

const TICK: Duration = Duration::from_millis(100);

/// Recorded in place of a namespace of containerd.
const NAMESPACE: &str = "archive";

/// Records images of an archive in a directory of baselines.
pub(super) fn record(
    task: &Task<'_>,
    settings: &config::Baseline,
) -> anyhow::Result<Vec<BaselineJson>> {
    let archive = archive::open(task.file)?;
    let images: Vec<ArchiveImage> = chosen(&archive, task)?.into_iter().cloned().collect();

    let health = Arc::new(Health::default());
    let _claim = Store::claim(task.store)?;
    let store = Arc::new(Store::open(task.store, Arc::clone(&health))?);
    let members = Arc::new(Members::of(archive));
    // The recorder reports to the watchers, and there are none.
    let (news, _) = crossbeam_channel::bounded(1);
    let recorder = Recorder::start(Arc::clone(&store), settings, members, news, health);
    let recorded = images.iter().map(|image| record_one(task, image, &recorder, &store)).collect();
    recorder.stop();
    recorded
}

fn chosen<'a>(archive: &'a Archive, task: &Task<'_>) -> anyhow::Result<Vec<&'a ArchiveImage>> {
    let file = task.file.display();
    let images = archive.images().iter();
    let found: Vec<&ArchiveImage> = match task.image {
        None => images.collect(),
        Some(wanted) => {
            images.filter(|image| image.names.iter().any(|name| name == wanted)).collect()
        }
    };
    let all = archive.images().iter().flat_map(|image| &image.names);
    let names: Vec<String> = all.map(|name| printable(name.as_bytes())).collect();
    let names = if names.is_empty() { "none with a name".to_owned() } else { names.join(", ") };
    if let (Some(wanted), true) = (task.image, found.is_empty()) {
        anyhow::bail!(
            "{file} holds no image `{}` (it holds: {names}; without --image, all are recorded)",
            printable(wanted.as_bytes())
        );
    }
    anyhow::ensure!(!found.is_empty(), "{file} holds no images");
    anyhow::ensure!(
        task.name.is_none() || found.len() == 1,
        "--name is for one image, and {file} holds {}: choose one with --image (it holds: {names})",
        found.len()
    );
    Ok(found)
}

fn record_one(
    task: &Task<'_>,
    image: &ArchiveImage,
    recorder: &Recorder,
    store: &Store,
) -> anyhow::Result<BaselineJson> {
    let chain_id = image.chain_id();
    let chain_id = chain_id.with_context(|| format!("{} has no layers", title(task, image)))?;
    let bar = Bar::new();
    bar.set_image(title(task, image));
    // The layers are read for the first name, and are known for the others.
    for name in names(task, image, chain_id) {
        let progress = Arc::new(Progress::default());
        let (done, over) = mpsc::channel();
        recorder.submit(RecordRequest {
            image: Some(ImageName {
                namespace: NAMESPACE.into(),
                name,
                manifest_digest: image.manifest_digest,
            }),
            container: None,
            layers: layers(task.file, image),
            proof: Proof::Later,
            progress: Some(Arc::clone(&progress)),
            done: Some(Box::new(move |result| {
                // Fails only if this thread has panicked.
                let _ = done.send(result);
            })),
        });
        let _recorded: Recorded = loop {
            match over.recv_timeout(TICK) {
                Ok(result) => break result.map_err(anyhow::Error::msg)?,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    anyhow::bail!("the recorder ended in the middle of it")
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    let done = Done {
                        layers: progress.layers_done.load(Ordering::Relaxed),
                        layers_total: progress.layers_total.load(Ordering::Relaxed),
                        files: progress.files_done.load(Ordering::Relaxed),
                        bytes: progress.bytes_done.load(Ordering::Relaxed),
                    };
                    bar.show(&done, "");
                }
            }
        };
    }
    bar.clear();
    let found = baselines::list(store, &chain_id.to_string())?.into_iter().next();
    let baseline = baseline_json(found.context("the baseline was not read back")?)?;
    // The store may hold layers that were recorded before, from other places.
    if store.known_by(chain_id).0 != KnownBy::Verified {
        eprintln!(
            "warning: {}: some layers were known before and are not verified (see: driftd \
             baseline show; remove them to have them read from the archive)",
            safe(baseline.name())
        );
    }
    Ok(baseline)
}

/// A name of the image, for people.
fn title(task: &Task<'_>, image: &ArchiveImage) -> String {
    match image.names.first() {
        Some(name) => printable(name.as_bytes()),
        None => task.file.display().to_string(),
    }
}

/// The names to record the image under: its digest if it has none.
fn names(task: &Task<'_>, image: &ArchiveImage, chain_id: ChainId) -> Vec<String> {
    match (task.name, &*image.names) {
        (Some(name), _) => vec![name.to_owned()],
        (None, []) => vec![match image.manifest_digest {
            Some(digest) => digest.to_string(),
            None => chain_id.to_string(),
        }],
        (None, names) => names.to_vec(),
    }
}

fn layers(file: &Path, image: &ArchiveImage) -> Vec<Layer> {
    let diff_ids: Vec<_> = image.layers.iter().map(|(diff_id, _)| *diff_id).collect();
    let chain_ids = ChainId::of_layers(&diff_ids);
    let endpoint: Arc<str> = file.display().to_string().into();
    image
        .layers
        .iter()
        .zip(chain_ids)
        .map(|((diff_id, blob), chain_id)| Layer {
            id: LayerId::Diff(*diff_id),
            chain_id,
            directory: None,
            blob: Some(Blob {
                endpoint: Arc::clone(&endpoint),
                namespace: NAMESPACE.into(),
                digest: digest_of(blob, &diff_id.to_string()),
                media_type: String::new(),
                // The archive says where the blob ends.
                size: u64::MAX,
            }),
        })
        .collect()
}

/// The blob's digest. Without a manifest, the blob is the uncompressed layer: its diff ID.
fn digest_of(blob: &ArchiveBlob, diff_id: &str) -> String {
    blob.digest.map_or_else(|| diff_id.to_owned(), |digest| format!("sha256:{digest}"))
}

/// The archive's layers by their digests.
struct Members {
    archive: Archive,
    blobs: HashMap<String, ArchiveBlob>,
}

impl Members {
    fn of(archive: Archive) -> Members {
        let layers = archive.images().iter().flat_map(|image| &image.layers);
        let blobs = layers
            .map(|(diff_id, blob)| (digest_of(blob, &diff_id.to_string()), blob.clone()))
            .collect();
        Members { archive, blobs }
    }
}

impl Blobs for Members {
    fn open(&self, blob: &Blob) -> Result<Box<dyn Read + Send>, String> {
        let member = self.blobs.get(&blob.digest).ok_or("the archive has no such blob")?;
        self.archive.layer(member).map_err(|err| format!("{:#}", anyhow::Error::from(err)))
    }
}
