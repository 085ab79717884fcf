//! Images: from a name to the layers it stands for, and to their recording.
//!
//! Everything is keyed by digest. An event or a list only says *look at this
//! name again*; looking twice does no harm and, when nothing has changed, costs
//! one call. An image whose layers are not unpacked yet waits until its top
//! layer is committed; if nothing is unpacked for a while, its archives are read
//! instead of its directories.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use containerd_client::services::v1::{
    GetImageRequest, Image, InfoRequest, ListImagesRequest, ReadContentRequest,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tonic::Status;

use super::blobs;
use super::connection::{Namespace, found, interrupted, words};
use super::manifests::{self, Descriptor, Document, brief};
use super::probes::{self, HealthCheck};
use super::snapshots::{self, Held, Keeps, Shape, View};
use super::{ImageProblem, Recording};
use crate::baseline::{ImageName, Progress, Proof, RecordRequest, Recorded};
use crate::health::{Failure, Health};
use crate::model::{Blob, ChainId, DiffId, Layer, LayerId, ManifestDigest, printable};
use crate::sys::procfs::Handle;

/// Images whose layers are being recorded at the same time.
const RECORDINGS: usize = 4;
/// Images whose manifests are being read at the same time.
const LOOKS: usize = 8;
const INDEX_DEPTH: u32 = 3;
/// When an image that could not be recorded is tried again without an event:
/// at first, and at most.
const FIRST_RETRY: Duration = Duration::from_secs(60);
const LAST_RETRY: Duration = Duration::from_secs(3600);
/// The snapshotter that is asked first: containerd's default.
pub(super) const DEFAULT_SNAPSHOTTER: &str = "overlayfs";
/// How long an image waits for (more of) its layers to be unpacked, before its
/// archives are read.
const UNPACK_PATIENCE: Duration = Duration::from_secs(45);

/// What one containerd's images are. Survives connections: content has not
/// changed because a socket was closed.
pub(super) struct Images {
    endpoint: Arc<str>,
    recorder: Arc<dyn Recording>,
    health: Arc<Health>,
    held: Arc<Held>,
    recordings: Semaphore,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    names: HashMap<Key, Standing>,
    /// By target digest.
    facts: HashMap<String, Arc<Facts>>,
    layers: HashMap<ChainId, Below>,
    /// Of what the images of a namespace are made.
    blobs: HashMap<(Arc<str>, ChainId), Blob>,
    /// One recording per stack of layers at a time: the next one finds it done.
    turns: HashMap<ChainId, Arc<tokio::sync::Mutex<()>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    namespace: Arc<str>,
    name: String,
}

/// How far one image name is.
#[derive(Debug)]
struct Standing {
    target: Option<Descriptor>,
    last_heard: Instant,
    state: Readiness,
    /// Since when nothing of what it waits for was unpacked.
    waits_since: Instant,
    /// After a failure: how long lists leave it alone, and since when.
    patience: Duration,
    failed: Instant,
    /// What was last complained about: a digest and a reason.
    complaint: Option<(String, String)>,
    /// Somebody is looking at it.
    busy: bool,
    /// ... and has to look again.
    again: bool,
}

impl Standing {
    fn new() -> Standing {
        Standing {
            target: None,
            last_heard: Instant::now(),
            state: Readiness::New,
            waits_since: Instant::now(),
            patience: Duration::ZERO,
            failed: Instant::now(),
            complaint: None,
            busy: false,
            again: false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Readiness {
    New,
    /// Not unpacked: a job is submitted as soon as this chain is there.
    Waiting(ChainId),
    /// Nor can its archives be read; still waiting for this chain.
    Incomplete {
        chain_id: ChainId,
        reason: String,
    },
    Recorded {
        target: String,
    },
    /// A chart, a signature: nothing to compare a container with.
    NoImage,
    Problem {
        digest: String,
        reason: String,
    },
}

impl Readiness {
    fn waits_for(&self) -> Option<ChainId> {
        match self {
            Readiness::Waiting(chain_id) | Readiness::Incomplete { chain_id, .. } => {
                Some(*chain_id)
            }
            Readiness::New
            | Readiness::Recorded { .. }
            | Readiness::NoImage
            | Readiness::Problem { .. } => None,
        }
    }
}

/// What a chain ID stands for.
#[derive(Clone, Copy, Debug)]
struct Below {
    parent: Option<ChainId>,
    /// `None` if it is known from a snapshot only.
    diff_id: Option<DiffId>,
}

/// What an image's blobs say.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) manifest_digest: ManifestDigest,
    /// Bottom first; empty for what is no image.
    diff_ids: Vec<DiffId>,
    /// Of the same length.
    chain: Vec<ChainId>,
    /// Of the same length, or empty: then the manifest and the config disagree.
    blobs: Vec<Descriptor>,
    pub(super) health_check: HealthCheck,
}

impl Facts {
    pub(super) fn chain_id(&self) -> Option<ChainId> {
        self.chain.last().copied()
    }
}

/// Why an image could not be looked at.
#[derive(Debug)]
pub(super) enum Trouble {
    /// The connection failed; nothing was learnt.
    Interrupted(Status),
    /// There is no image of this name (any more).
    Unknown,
    /// It is something else than an image: a chart, a signature, a checkpoint.
    NoImage,
    /// And its archives are not to be read yet or, for a reason, cannot be read.
    NotUnpacked { chain_id: ChainId, reason: Option<String> },
    /// Something about the blob `digest` is wrong.
    Bad { digest: String, reason: String },
    /// The recorder gave up, and has counted and said so itself.
    NotRecorded { chain_id: ChainId, reason: String },
}

impl Trouble {
    /// What a failing call for the blob `digest` means.
    fn of(status: Status, digest: &str) -> Trouble {
        if interrupted(&status) {
            Trouble::Interrupted(status)
        } else {
            Trouble::Bad { digest: digest.into(), reason: words(&status) }
        }
    }
}

/// How an image is asked for.
#[derive(Clone, Debug, Default)]
pub(super) struct Ask {
    pub(super) proof: Proof,
    pub(super) progress: Option<Arc<Progress>>,
    /// Somebody waits: an unpack that may come is not waited for.
    pub(super) now: bool,
}

impl Images {
    pub(super) fn new(
        endpoint: Arc<str>,
        recorder: Arc<dyn Recording>,
        health: Arc<Health>,
    ) -> Images {
        Images {
            endpoint,
            recorder,
            health,
            held: Arc::default(),
            recordings: Semaphore::new(RECORDINGS),
            state: Mutex::default(),
        }
    }

    pub(super) fn held(&self) -> &Held {
        &self.held
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    // --- what containers ask ---

    pub(super) fn diff_id(&self, chain_id: ChainId) -> Option<DiffId> {
        let state = self.state();
        match state.layers.get(&chain_id) {
            Some(Below { diff_id: Some(diff_id), .. }) => Some(*diff_id),
            // The chain of a single layer is that layer.
            Some(Below { parent: None, .. }) => Some(DiffId(chain_id.0)),
            Some(_) | None => None,
        }
    }

    /// `None` if nothing is known of this chain, `Some(None)` if it is a bottom layer.
    pub(super) fn parent(&self, chain_id: ChainId) -> Option<Option<ChainId>> {
        self.state().layers.get(&chain_id).map(|below| below.parent)
    }

    /// The archive of the topmost layer of `chain_id`.
    pub(super) fn blob(&self, namespace: &str, chain_id: ChainId) -> Option<Blob> {
        self.state().blobs.get(&(namespace.into(), chain_id)).cloned()
    }

    pub(super) fn learn_parent(&self, chain_id: ChainId, parent: Option<ChainId>) {
        self.state().layers.entry(chain_id).or_insert(Below { parent, diff_id: None });
    }

    /// Learns the layers of an image a container was made from. That the image
    /// is gone or broken is no error here.
    pub(super) async fn look_at(&self, namespace: &Namespace, name: &str) -> Result<(), Status> {
        match self.look_up(namespace, name).await {
            Err(Trouble::Interrupted(status)) => Err(status),
            Ok(_)
            | Err(
                Trouble::Unknown
                | Trouble::NoImage
                | Trouble::NotUnpacked { .. }
                | Trouble::Bad { .. }
                | Trouble::NotRecorded { .. },
            ) => Ok(()),
        }
    }

    /// What an image says of itself, if its layers are those of `chain_id`: a name
    /// may have moved on since the container was made.
    pub(super) async fn facts_of(
        &self,
        namespace: &Namespace,
        name: &str,
        chain_id: ChainId,
    ) -> Result<Option<Arc<Facts>>, Status> {
        match self.look_up(namespace, name).await {
            Err(Trouble::Interrupted(status)) => Err(status),
            Ok(facts) if facts.chain_id() == Some(chain_id) => Ok(Some(facts)),
            Ok(_)
            | Err(
                Trouble::Unknown
                | Trouble::NoImage
                | Trouble::NotUnpacked { .. }
                | Trouble::Bad { .. }
                | Trouble::NotRecorded { .. },
            ) => Ok(None),
        }
    }

    async fn look_up(&self, namespace: &Namespace, name: &str) -> Result<Arc<Facts>, Trouble> {
        if name.is_empty() {
            return Err(Trouble::Unknown);
        }
        let target = target(namespace, name).await?;
        self.facts(namespace, &target).await
    }

    // --- following ---

    /// Something has happened to this image name.
    pub(super) fn changed(self: &Arc<Self>, namespace: &Namespace, name: &str) {
        let key = Key { namespace: Arc::clone(&namespace.name), name: name.into() };
        {
            let mut state = self.state();
            let standing = state.names.entry(key.clone()).or_insert_with(Standing::new);
            standing.last_heard = Instant::now();
            if standing.busy {
                standing.again = true;
                return;
            }
            standing.busy = true;
        }
        let images = Arc::clone(self);
        let namespace = namespace.clone();
        tokio::spawn(async move {
            loop {
                images.reconcile(&namespace, &key).await;
                let mut state = images.state();
                match state.names.get_mut(&key) {
                    Some(standing) if standing.again => standing.again = false,
                    Some(standing) => {
                        standing.busy = false;
                        break;
                    }
                    None => break,
                }
            }
        });
    }

    /// The image's record is gone; what stands on its layers keeps them.
    pub(super) fn removed(&self, namespace: &str, name: &str) {
        self.state().names.remove(&Key { namespace: namespace.into(), name: name.into() });
        self.recorder.image_removed(namespace, name);
    }

    /// A layer has been unpacked: whoever waited for it is looked at again.
    pub(super) fn layer_committed(self: &Arc<Self>, namespace: &Namespace, chain_id: ChainId) {
        for name in self.waiting_for(&namespace.name, chain_id) {
            self.changed(namespace, &name);
        }
    }

    /// The images that waited for this layer; those that wait for more of their
    /// layers are patient anew.
    fn waiting_for(&self, namespace: &str, chain_id: ChainId) -> Vec<String> {
        let mut state = self.state();
        let State { names, facts, .. } = &mut *state;
        let mut waiting = Vec::new();
        for (key, standing) in names.iter_mut().filter(|(key, _)| &*key.namespace == namespace) {
            let facts = standing.target.as_ref().and_then(|target| facts.get(&target.digest));
            if facts.is_some_and(|facts| facts.chain.contains(&chain_id)) {
                standing.waits_since = Instant::now();
            }
            if standing.state.waits_for() == Some(chain_id) {
                waiting.push(key.name.clone());
            }
        }
        waiting
    }

    /// Takes in a full list of a namespace's images. Returns when the layers of
    /// each are known; recording goes on behind.
    pub(super) async fn list(self: &Arc<Self>, namespace: &Namespace) -> Result<(), Status> {
        let asked = Instant::now();
        let answer = namespace.images().list(ListImagesRequest::default()).await?;
        let images = answer.into_inner().images;
        let gone: Vec<String> = {
            let listed: std::collections::HashSet<&str> =
                images.iter().map(|image| image.name.as_str()).collect();
            let state = self.state();
            state
                .names
                .iter()
                .filter(|(key, standing)| {
                    key.namespace == namespace.name
                        && standing.last_heard < asked
                        && !listed.contains(key.name.as_str())
                })
                .map(|(key, _)| key.name.clone())
                .collect()
        };
        for name in gone {
            self.removed(&namespace.name, &name);
        }
        self.learn(namespace, &images).await;
        for image in images {
            let Some(target) = image.target else { continue };
            let settled = self.listed(namespace, &image.name, Descriptor::of(target), asked);
            if !settled {
                self.changed(namespace, &image.name);
            }
        }
        Ok(())
    }

    /// Files where a list says that a name points; whether nothing is to be done.
    fn listed(
        &self,
        namespace: &Namespace,
        name: &str,
        target: Descriptor,
        asked: Instant,
    ) -> bool {
        let key = Key { namespace: Arc::clone(&namespace.name), name: name.into() };
        let mut state = self.state();
        let standing = state.names.entry(key).or_insert_with(Standing::new);
        let same = standing.target.as_ref().is_some_and(|known| known.digest == target.digest);
        let settled = match &standing.state {
            Readiness::Recorded { target: recorded } => *recorded == target.digest,
            Readiness::NoImage => same,
            Readiness::Problem { .. } => same && standing.failed.elapsed() < standing.patience,
            Readiness::New | Readiness::Waiting(_) | Readiness::Incomplete { .. } => false,
        };
        // What an event has said since is newer.
        if standing.target.is_none() || standing.last_heard < asked {
            standing.target = Some(target);
        }
        settled
    }

    /// Tells the recorder which names there are, after a full list: so that it
    /// forgets what was deleted while nobody listened.
    ///
    /// Said under the lock under which facts are learnt. A job is submitted only
    /// after that, so a name that is missing here is named again by its job.
    pub(super) fn tell_names(&self) {
        let state = self.state();
        let names = state
            .names
            .iter()
            .filter_map(|(key, standing)| {
                let facts = state.facts.get(&standing.target.as_ref()?.digest)?;
                let image = ImageName {
                    namespace: key.namespace.to_string(),
                    name: key.name.clone(),
                    manifest_digest: Some(facts.manifest_digest),
                };
                Some((image, facts.chain_id()?))
            })
            .collect();
        self.recorder.image_names(&self.endpoint, names);
    }

    /// Forgets the images of namespaces that do not exist any more, and what
    /// nobody's name points at.
    pub(super) fn retain_namespaces(&self, namespaces: &[String]) {
        let gone: Vec<Key> = self
            .state()
            .names
            .keys()
            .filter(|key| !namespaces.iter().any(|namespace| **namespace == *key.namespace))
            .cloned()
            .collect();
        for key in gone {
            self.removed(&key.namespace, &key.name);
        }
        let mut state = self.state();
        let State { names, facts, blobs, .. } = &mut *state;
        let targets: std::collections::HashSet<&str> = names
            .values()
            .filter_map(|standing| standing.target.as_ref())
            .map(|target| target.digest.as_str())
            .collect();
        // What the layers are stays known: containers outlive their images.
        facts.retain(|target, _| targets.contains(target.as_str()));
        blobs.clear();
        for (key, standing) in names.iter() {
            let Some(target) = &standing.target else { continue };
            if let Some(facts) = facts.get(&target.digest) {
                learn_blobs(blobs, &self.endpoint, &key.namespace, facts);
            }
        }
    }

    /// Learns the layers of many images at once. What goes wrong is found again,
    /// and said, when each of them is looked at.
    async fn learn(self: &Arc<Self>, namespace: &Namespace, images: &[Image]) {
        let mut looks = JoinSet::new();
        for target in images.iter().filter_map(|image| image.target.clone()).map(Descriptor::of) {
            if self.known_facts(&namespace.name, &target.digest).is_some() {
                continue;
            }
            if looks.len() == LOOKS {
                let _ = looks.join_next().await;
            }
            let (images, namespace) = (Arc::clone(self), namespace.clone());
            looks.spawn(async move {
                let _ = images.facts(&namespace, &target).await;
            });
        }
        while looks.join_next().await.is_some() {}
    }

    /// Makes one image known to the recorder, or says why not.
    async fn reconcile(&self, namespace: &Namespace, key: &Key) {
        let target = match target(namespace, &key.name).await {
            Ok(target) => target,
            Err(Trouble::Unknown) => {
                // Deleted meanwhile. Its event says the same; twice does no harm.
                self.removed(&key.namespace, &key.name);
                return;
            }
            // A connection that failed; the list after the next one looks again.
            Err(_) => return,
        };
        if let Some(standing) = self.state().names.get_mut(key) {
            standing.target = Some(target.clone());
        }
        let outcome = self.record(namespace, key, &target, Ask::default()).await;
        self.conclude(key, &outcome, &target);
    }

    /// Files how recording an image went.
    fn conclude(&self, key: &Key, outcome: &Result<Recorded, Trouble>, target: &Descriptor) {
        let next = match outcome {
            Ok(_) => Readiness::Recorded { target: target.digest.clone() },
            // The next list after the reconnection looks again.
            Err(Trouble::Interrupted(_)) => return,
            Err(Trouble::Unknown | Trouble::NoImage) => Readiness::NoImage,
            Err(Trouble::NotUnpacked { chain_id, reason: None }) => Readiness::Waiting(*chain_id),
            Err(Trouble::NotUnpacked { chain_id, reason: Some(reason) }) => {
                Readiness::Incomplete { chain_id: *chain_id, reason: reason.clone() }
            }
            Err(Trouble::Bad { digest, reason }) => {
                Readiness::Problem { digest: digest.clone(), reason: reason.clone() }
            }
            Err(Trouble::NotRecorded { chain_id, reason }) => {
                Readiness::Problem { digest: chain_id.to_string(), reason: reason.clone() }
            }
        };
        let mut state = self.state();
        let Some(standing) = state.names.get_mut(key) else {
            // It was deleted while it was being recorded.
            drop(state);
            self.recorder.image_removed(&key.namespace, &key.name);
            return;
        };
        if let Readiness::Problem { .. } = next {
            standing.failed = Instant::now();
            standing.patience = (standing.patience * 2).clamp(FIRST_RETRY, LAST_RETRY);
        } else {
            standing.patience = Duration::ZERO;
        }
        standing.state = next;
        let Err(Trouble::Bad { digest, reason }) = outcome else { return };
        // Once per image and reason, however often it is tried again.
        let complaint = Some((digest.clone(), reason.clone()));
        if standing.complaint == complaint {
            return;
        }
        standing.complaint = complaint;
        drop(state);
        let _degraded = self.health.record(Failure::BaselineUnavailable);
        tracing::warn!(
            namespace = %key.namespace,
            image = printable(key.name.as_bytes()),
            digest,
            "no baseline for this image: {reason}"
        );
    }

    /// Has the image `key` recorded and waits for it.
    async fn record(
        &self,
        namespace: &Namespace,
        key: &Key,
        target: &Descriptor,
        ask: Ask,
    ) -> Result<Recorded, Trouble> {
        let facts = self.facts(namespace, target).await?;
        let Some(chain_id) = facts.chain_id() else { return Err(Trouble::NoImage) };
        // Told before the question, so that a commit between the two is heard.
        let has_waited = self.wait_for(key, chain_id);
        let snapshotter = unpacked_by(namespace, chain_id)
            .await
            .map_err(|status| Trouble::of(status, &chain_id.to_string()))?;
        if snapshotter.is_none() && !has_waited && !ask.now {
            return Err(Trouble::NotUnpacked { chain_id, reason: None });
        }

        let turn = Arc::clone(self.state().turns.entry(chain_id).or_default());
        let outcome = {
            let _turn = turn.lock().await;
            let _slot = self.recordings.acquire().await.expect("the semaphore is never closed");
            self.record_layers(namespace, key, &facts, snapshotter.as_deref(), ask).await
        };
        drop(turn);
        self.state().turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        outcome
    }

    async fn record_layers(
        &self,
        namespace: &Namespace,
        key: &Key,
        facts: &Facts,
        snapshotter: Option<&str>,
        ask: Ask,
    ) -> Result<Recorded, Trouble> {
        let Some(chain_id) = facts.chain_id() else { return Err(Trouble::NoImage) };
        let of_chain = |status| Trouble::of(status, &chain_id.to_string());
        let mut layers: Vec<Layer> = facts
            .diff_ids
            .iter()
            .zip(&facts.chain)
            .map(|(&diff_id, &chain_id)| Layer {
                id: LayerId::Diff(diff_id),
                chain_id,
                directory: None,
                blob: self.blob(&namespace.name, chain_id),
            })
            .collect();
        let unrecorded = self.unrecorded(&layers).await;

        let mut view = None;
        // Why the directories cannot be read.
        let mut reason = None;
        match snapshotter {
            None => reason = Some("it is not unpacked".to_owned()),
            Some(snapshotter) => match snapshots::keeps(snapshotter) {
                // Nothing will be read.
                Keeps::Layers if unrecorded.is_empty() && ask.proof == Proof::Later => (),
                Keeps::Layers => {
                    match self.layers_below(namespace, snapshotter, chain_id, layers.len()).await {
                        Ok((taken, directories)) => {
                            view = Some(taken);
                            for (layer, directory) in layers.iter_mut().zip(directories) {
                                layer.directory = Some(directory);
                            }
                        }
                        Err(Ok(why)) => reason = Some(snapshots::of(snapshotter, &why)),
                        Err(Err(status)) => return Err(of_chain(status)),
                    }
                }
                Keeps::Copies => {
                    reason = Some(snapshots::of(snapshotter, "it keeps whole copies, not layers"));
                }
                Keeps::Nothing(why) => reason = Some(snapshots::of(snapshotter, why)),
            },
        }
        if let Some(reason) = reason
            && let Some(missing) =
                self.unreadable(namespace, &layers, &unrecorded).await.map_err(of_chain)?
        {
            let reason = format!("{reason}, and {missing}");
            match snapshotter {
                None => return Err(Trouble::NotUnpacked { chain_id, reason: Some(reason) }),
                Some(copies) if snapshots::keeps(copies) == Keeps::Copies => {
                    let merged = merged_layer(chain_id);
                    layers = vec![merged];
                    if !self.unrecorded(&layers).await.is_empty() {
                        // A view is a copy, which takes as long as it takes.
                        let patient = namespace.clone().without_deadline();
                        let taken = View::take(&patient, copies, chain_id, &self.held)
                            .await
                            .map_err(of_chain)?;
                        layers[0].directory = match taken.as_ref().map(|view| &view.shape) {
                            Some(Shape::Bind(copy)) => Some(copy.clone()),
                            Some(Shape::Overlay { .. } | Shape::Other(_)) | None => None,
                        };
                        view = taken;
                    }
                }
                Some(_) => {
                    return Err(Trouble::Bad { digest: facts.manifest_digest.to_string(), reason });
                }
            }
        }

        let image = ImageName {
            namespace: key.namespace.to_string(),
            name: key.name.clone(),
            manifest_digest: Some(facts.manifest_digest),
        };
        let outcome = self.submit(Some(image), layers, ask).await;
        // Kept until now, so that no directory goes while it is read.
        if let Some(view) = view {
            view.release().await;
        }
        outcome.map_err(|reason| Trouble::NotRecorded { chain_id, reason })
    }

    /// A view of an image's layers and their directories, bottom first. In the
    /// error, a reason or a failed call.
    async fn layers_below(
        &self,
        namespace: &Namespace,
        snapshotter: &str,
        chain_id: ChainId,
        layers: usize,
    ) -> Result<(View, Vec<std::path::PathBuf>), Result<String, Status>> {
        let view = match View::take(namespace, snapshotter, chain_id, &self.held).await {
            Ok(Some(view)) => view,
            Ok(None) => return Err(Ok("its snapshots have gone".into())),
            Err(status) => return Err(Err(status)),
        };
        match readable_directories(&view.shape, layers).await {
            Ok(directories) => Ok((view, directories)),
            Err(reason) => {
                view.release().await;
                Err(Ok(reason))
            }
        }
    }

    /// Hands a job to the recorder and waits for it.
    async fn submit(
        &self,
        image: Option<ImageName>,
        layers: Vec<Layer>,
        ask: Ask,
    ) -> Result<Recorded, String> {
        let (done, finished) = oneshot::channel();
        let job = RecordRequest {
            image,
            container: None,
            layers,
            proof: ask.proof,
            progress: ask.progress,
            done: Some(Box::new(move |outcome| {
                let _ = done.send(outcome);
            })),
        };
        let recorder = Arc::clone(&self.recorder);
        // Handing over may wait for room.
        tokio::task::spawn_blocking(move || recorder.submit(job))
            .await
            .map_err(|err| err.to_string())?;
        finished.await.map_err(|_| "the recorder has stopped".to_owned())?
    }

    /// Those of `layers` that have no baseline yet.
    async fn unrecorded(&self, layers: &[Layer]) -> Vec<LayerId> {
        let ids: Vec<LayerId> = layers.iter().map(|layer| layer.id).collect();
        let all = ids.clone();
        let recorder = Arc::clone(&self.recorder);
        tokio::task::spawn_blocking(move || recorder.unrecorded(&ids)).await.unwrap_or(all)
    }

    /// Why one of the layers `wanted` cannot be read from its archive.
    async fn unreadable(
        &self,
        namespace: &Namespace,
        layers: &[Layer],
        wanted: &[LayerId],
    ) -> Result<Option<String>, Status> {
        for layer in layers.iter().filter(|layer| wanted.contains(&layer.id)) {
            let reason = match &layer.blob {
                None => Some("nobody knows its archive any more".to_owned()),
                Some(blob) => match blobs::no_archive(&blob.media_type) {
                    Some(reason) => Some(reason),
                    None => {
                        let request = InfoRequest { digest: blob.digest.clone() };
                        let answer = found(namespace.content().info(request).await)?;
                        answer.is_none().then(|| blobs::missing(&blob.media_type))
                    }
                },
            };
            if let Some(reason) = reason {
                return Ok(Some(format!("layer {} has no archive: {reason}", layer.id)));
            }
        }
        Ok(None)
    }

    /// The layers of a container whose snapshotter has no directories of them, as
    /// far as their baselines can be had; else the reason why not.
    pub(super) async fn without_directories(
        &self,
        namespace: &Namespace,
        snapshotter: &str,
        layers: Vec<Layer>,
    ) -> Result<Result<Vec<Layer>, String>, Status> {
        let unrecorded = self.unrecorded(&layers).await;
        let Some(missing) = self.unreadable(namespace, &layers, &unrecorded).await? else {
            return Ok(Ok(layers));
        };
        if snapshots::keeps(snapshotter) == Keeps::Copies
            && let Some(top) = layers.last()
        {
            let merged = vec![merged_layer(top.chain_id)];
            if self.unrecorded(&merged).await.is_empty() {
                return Ok(Ok(merged));
            }
        }
        Ok(Err(missing))
    }

    /// Notes that `key` waits for its layers; whether it has done so for long.
    fn wait_for(&self, key: &Key, chain_id: ChainId) -> bool {
        let mut state = self.state();
        let Some(standing) = state.names.get_mut(key) else { return false };
        if standing.state.waits_for() != Some(chain_id) {
            standing.state = Readiness::Waiting(chain_id);
            standing.waits_since = Instant::now();
        }
        standing.waits_since.elapsed() >= UNPACK_PATIENCE
    }

    // --- what people ask ---

    /// Has an image recorded now, and waits for it. It may be asked for by its
    /// name, its manifest's digest or its chain ID.
    pub(super) async fn record_now(
        &self,
        namespace: &Namespace,
        name: &str,
        ask: Ask,
    ) -> Result<Recorded, Trouble> {
        let name = self.name_of(&namespace.name, name).unwrap_or_else(|| name.into());
        let target = target(namespace, &name).await?;
        let key = Key { namespace: Arc::clone(&namespace.name), name };
        self.state().names.entry(key.clone()).or_insert_with(Standing::new).target =
            Some(target.clone());
        let outcome = self.record(namespace, &key, &target, ask).await;
        self.conclude(&key, &outcome, &target);
        outcome
    }

    /// A name of the image with this manifest digest or chain ID.
    fn name_of(&self, namespace: &str, digest: &str) -> Option<String> {
        let manifest_digest: ManifestDigest = digest.parse().ok()?;
        let chain_id = ChainId(manifest_digest.0);
        let state = self.state();
        let mut names = state.names.iter().filter(|(key, standing)| {
            let target = standing.target.as_ref().map(|target| &target.digest);
            &*key.namespace == namespace
                && target.and_then(|target| state.facts.get(target)).is_some_and(|facts| {
                    facts.manifest_digest == manifest_digest || facts.chain_id() == Some(chain_id)
                })
        });
        names.next().map(|(key, _)| key.name.clone())
    }

    /// Has the layers of a container recorded now, and waits for it: its image
    /// may have no name any more.
    pub(super) async fn record_stack(
        &self,
        layers: Vec<Layer>,
        ask: Ask,
    ) -> Result<Recorded, Trouble> {
        let Some(chain_id) = layers.last().map(|layer| layer.chain_id) else {
            return Err(Trouble::Unknown);
        };
        let outcome = self.submit(None, layers, ask).await;
        outcome.map_err(|reason| Trouble::NotRecorded { chain_id, reason })
    }

    /// The images that have no baseline, and why.
    pub(super) fn problems(&self) -> Vec<ImageProblem> {
        let state = self.state();
        let mut problems: Vec<ImageProblem> = state
            .names
            .iter()
            .filter_map(|(key, standing)| {
                let (digest, reason) = match &standing.state {
                    Readiness::Problem { digest, reason } => (digest.clone(), reason.clone()),
                    Readiness::Waiting(chain_id) if !standing.busy => (
                        chain_id.to_string(),
                        "it is not unpacked yet; it will be recorded when it is".into(),
                    ),
                    Readiness::Incomplete { chain_id, reason } => {
                        (chain_id.to_string(), reason.clone())
                    }
                    Readiness::New
                    | Readiness::Waiting(_)
                    | Readiness::Recorded { .. }
                    | Readiness::NoImage => return None,
                };
                Some(ImageProblem {
                    endpoint: Arc::clone(&self.endpoint),
                    namespace: key.namespace.to_string(),
                    name: key.name.clone(),
                    digest,
                    reason,
                })
            })
            .collect();
        problems.sort_by(|one, other| {
            (&one.namespace, &one.name).cmp(&(&other.namespace, &other.name))
        });
        problems
    }

    // --- blobs ---

    /// What the blobs below `target` say; read once per target.
    async fn facts(
        &self,
        namespace: &Namespace,
        target: &Descriptor,
    ) -> Result<Arc<Facts>, Trouble> {
        if let Some(facts) = self.known_facts(&namespace.name, &target.digest) {
            return Ok(facts);
        }
        let facts = Arc::new(read_facts(namespace, target).await?);
        let mut state = self.state();
        let mut parent = None;
        for (&chain_id, &diff_id) in facts.chain.iter().zip(&facts.diff_ids) {
            state.layers.insert(chain_id, Below { parent, diff_id: Some(diff_id) });
            parent = Some(chain_id);
        }
        state.facts.insert(target.digest.clone(), Arc::clone(&facts));
        learn_blobs(&mut state.blobs, &self.endpoint, &namespace.name, &facts);
        Ok(facts)
    }

    /// What is known of a target already, which `namespace` has as well.
    fn known_facts(&self, namespace: &Arc<str>, target: &str) -> Option<Arc<Facts>> {
        let mut state = self.state();
        let facts = Arc::clone(state.facts.get(target)?);
        learn_blobs(&mut state.blobs, &self.endpoint, namespace, &facts);
        Some(facts)
    }
}

/// Notes the archives of an image's layers, by the chain IDs that they are the
/// top of. One layer may have several (gzip, zstd): which one is kept does not
/// depend on the order in which images are looked at.
fn learn_blobs(
    blobs: &mut HashMap<(Arc<str>, ChainId), Blob>,
    endpoint: &Arc<str>,
    namespace: &Arc<str>,
    facts: &Facts,
) {
    for (&chain_id, descriptor) in facts.chain.iter().zip(&facts.blobs) {
        let known = blobs.get(&(Arc::clone(namespace), chain_id));
        if known.is_some_and(|known| known.digest <= descriptor.digest) {
            continue;
        }
        let blob = Blob {
            endpoint: Arc::clone(endpoint),
            namespace: Arc::clone(namespace),
            digest: descriptor.digest.clone(),
            media_type: descriptor.media_type.clone(),
            size: descriptor.size,
        };
        blobs.insert((Arc::clone(namespace), chain_id), blob);
    }
}

/// A whole image, where only a copy of it all can be read.
fn merged_layer(chain_id: ChainId) -> Layer {
    Layer { id: LayerId::Chain(chain_id), chain_id, directory: None, blob: None }
}

/// The directories of a stack of layers, bottom first, if they can be read; an
/// error in words.
pub(super) async fn readable_directories(
    shape: &Shape,
    layers: usize,
) -> Result<Vec<std::path::PathBuf>, String> {
    let directories = snapshots::layer_directories(shape, layers)?;
    let mountinfo = tokio::task::spawn_blocking(|| {
        Handle::open(std::process::id()).and_then(|myself| myself.mountinfo())
    });
    let mountinfo = mountinfo.await.map_err(|err| err.to_string())?;
    let mountinfo = mountinfo.map_err(|err| format!("mounts cannot be told: {err}"))?;
    match snapshots::are_lazy(&directories, &mountinfo) {
        Some(reason) => Err(reason),
        None => Ok(directories),
    }
}

async fn target(namespace: &Namespace, name: &str) -> Result<Descriptor, Trouble> {
    let answer = namespace.images().get(GetImageRequest { name: name.into() }).await;
    found(answer)
        .map_err(|status| Trouble::of(status, ""))?
        .and_then(|response| response.into_inner().image)
        .and_then(|image| image.target)
        .map(Descriptor::of)
        .ok_or(Trouble::Unknown)
}

async fn read_facts(namespace: &Namespace, target: &Descriptor) -> Result<Facts, Trouble> {
    let (manifest, config, layers) = find_manifest(namespace, target).await?;
    let bad = |digest: &str, reason: String| Trouble::Bad { digest: brief(digest), reason };
    let manifest_digest =
        manifest.parse::<ManifestDigest>().map_err(|err| bad(&manifest, err.to_string()))?;
    let Some(bytes) = read(namespace, &config).await? else {
        return Err(bad(&config.digest, missing("config")));
    };
    let diff_ids = manifests::diff_ids(&bytes)
        .map_err(|reason| bad(&config.digest, format!("its config {reason}")))?
        .filter(|_| layers.iter().all(Descriptor::is_layer))
        .unwrap_or_default();
    let chain = ChainId::of_layers(&diff_ids);
    let blobs = if layers.len() == diff_ids.len() { layers } else { Vec::new() };
    Ok(Facts { manifest_digest, diff_ids, chain, blobs, health_check: probes::of_image(&bytes) })
}

fn missing(what: &str) -> String {
    format!("its {what} is missing from containerd's content store (pull the image again)")
}

/// Descends from an image's target to the manifest of this node's platform: its
/// digest, its config and its layers.
async fn find_manifest(
    namespace: &Namespace,
    target: &Descriptor,
) -> Result<(String, Descriptor, Vec<Descriptor>), Trouble> {
    // The best candidate is the last.
    let mut candidates = vec![(target.clone(), 0)];
    let mut first_missing = None;
    while let Some((candidate, depth)) = candidates.pop() {
        let Some(bytes) = read(namespace, &candidate).await? else {
            // Of an index' platforms only the one that was pulled is there.
            first_missing.get_or_insert(candidate.digest);
            continue;
        };
        let bad = |reason: String| Trouble::Bad { digest: brief(&candidate.digest), reason };
        let document =
            manifests::document(&bytes).map_err(|reason| bad(format!("its manifest {reason}")))?;
        match document {
            Document::Manifest { config, layers } => {
                return Ok((candidate.digest, config, layers));
            }
            Document::Index(_) if depth == INDEX_DEPTH => {
                return Err(bad(format!("its indexes are nested more than {INDEX_DEPTH} deep")));
            }
            Document::Index(entries) if manifests::holds_no_image(&entries) => {
                return Err(Trouble::NoImage);
            }
            Document::Index(entries) => {
                let entries = manifests::candidates(entries, manifests::host());
                candidates.extend(entries.into_iter().rev().map(|entry| (entry, depth + 1)));
            }
        }
    }
    Err(match first_missing {
        Some(digest) => Trouble::Bad { digest: brief(&digest), reason: missing("manifest") },
        None => {
            let (os, architecture) = manifests::host();
            Trouble::Bad {
                digest: brief(&target.digest),
                reason: format!("its index has no image for {os}/{architecture}"),
            }
        }
    })
}

/// A blob, checked against its digest; `None` if it is not there.
async fn read(namespace: &Namespace, blob: &Descriptor) -> Result<Option<Vec<u8>>, Trouble> {
    let bad = |reason: String| Trouble::Bad { digest: brief(&blob.digest), reason };
    let too_large = || bad(format!("it is larger than {} MiB", manifests::DOCUMENT_LIMIT >> 20));
    if blob.size > manifests::DOCUMENT_LIMIT {
        return Err(too_large());
    }
    let failed = |status| Trouble::of(status, &brief(&blob.digest));
    let request = ReadContentRequest { digest: blob.digest.clone(), offset: 0, size: 0 };
    let Some(answer) = found(namespace.content().read(request).await).map_err(failed)? else {
        return Ok(None);
    };
    let mut stream = answer.into_inner();
    let mut bytes = Vec::new();
    loop {
        match found(stream.message().await).map_err(failed)? {
            Some(Some(part)) => bytes.extend_from_slice(&part.data),
            Some(None) => break,
            // The server streams, so that the blob is missing comes here.
            None => return Ok(None),
        }
        if bytes.len() as u64 > manifests::DOCUMENT_LIMIT {
            return Err(too_large());
        }
    }
    let digest = format!("sha256:{}", ManifestDigest(Sha256::digest(&bytes).into()).hex());
    if digest != blob.digest {
        return Err(bad(format!("its content has another digest ({digest})")));
    }
    Ok(Some(bytes))
}

/// The snapshotter that holds these layers, one that keeps directories before
/// others; `None` while none does. The label that names it on the config blob is
/// set only after the last layer's commit was told, so the snapshotters
/// themselves are asked.
async fn unpacked_by(namespace: &Namespace, chain_id: ChainId) -> Result<Option<String>, Status> {
    if snapshots::is_unpacked(namespace, DEFAULT_SNAPSHOTTER, chain_id).await? {
        return Ok(Some(DEFAULT_SNAPSHOTTER.into()));
    }
    let mut others = snapshots::snapshotters(namespace).await?;
    others.retain(|snapshotter| snapshotter != DEFAULT_SNAPSHOTTER);
    others.sort_by_key(|snapshotter| match snapshots::keeps(snapshotter) {
        Keeps::Layers => 0,
        Keeps::Copies => 1,
        Keeps::Nothing(_) => 2,
    });
    for snapshotter in others {
        if snapshots::is_unpacked(namespace, &snapshotter, chain_id).await? {
            return Ok(Some(snapshotter));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody is asked to record anything.
    struct NoRecorder;

    impl Recording for NoRecorder {
        fn submit(&self, job: RecordRequest) {
            panic!("{job:?}");
        }

        fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
            layers.to_vec()
        }

        fn image_names(&self, _endpoint: &str, _listed: Vec<(ImageName, ChainId)>) {}

        fn image_removed(&self, _namespace: &str, _name: &str) {}
    }

    fn descriptor(digest: &str) -> Descriptor {
        manifests::Descriptor::of(containerd_client::types::Descriptor {
            digest: digest.into(),
            ..Default::default()
        })
    }

    fn facts(diff_ids: &[DiffId], archives: &[&str]) -> Facts {
        Facts {
            manifest_digest: ManifestDigest([7; 32]),
            diff_ids: diff_ids.to_vec(),
            chain: ChainId::of_layers(diff_ids),
            blobs: archives.iter().map(|digest| descriptor(digest)).collect(),
            health_check: None,
        }
    }

    #[test]
    fn an_unpack_is_waited_for_as_long_as_it_goes_on() {
        let images = Images::new("e".into(), Arc::new(NoRecorder), Arc::default());
        let facts = facts(&[DiffId([1; 32]), DiffId([2; 32])], &[]);
        let (bottom, top) = (facts.chain[0], facts.chain[1]);
        let key = Key { namespace: "default".into(), name: "web".into() };
        {
            let mut state = images.state();
            state.facts.insert("target".into(), Arc::new(facts));
            let mut standing = Standing::new();
            standing.target = Some(descriptor("target"));
            state.names.insert(key.clone(), standing);
        }
        let long_ago = || {
            let since = Instant::now().checked_sub(UNPACK_PATIENCE).unwrap();
            images.state().names.get_mut(&key).unwrap().waits_since = since;
        };
        assert!(!images.wait_for(&key, top), "it may be about to be unpacked");
        long_ago();
        assert!(images.wait_for(&key, top), "nobody unpacks it");
        // A layer below: more will come.
        assert_eq!(images.waiting_for("default", bottom), [""; 0]);
        assert!(!images.wait_for(&key, top));
        assert_eq!(images.waiting_for("other", top), [""; 0], "another namespace's");
        assert_eq!(images.waiting_for("default", top), ["web"]);
        // Its archives are missing, which takes nothing from what has been waited.
        long_ago();
        let trouble = Trouble::NotUnpacked { chain_id: top, reason: Some("gone".into()) };
        images.conclude(&key, &Err(trouble), &descriptor("target"));
        assert_eq!(images.problems()[0].reason, "gone");
        assert!(images.wait_for(&key, top));
        assert!(!images.wait_for(&key, bottom), "the name points at another image now");
    }

    #[test]
    fn which_archive_of_a_layer_is_named_does_not_depend_on_the_order() {
        let diff_ids = [DiffId([1; 32])];
        let (gzip, zstd) = (facts(&diff_ids, &["sha256:b"]), facts(&diff_ids, &["sha256:a"]));
        let namespace: Arc<str> = "default".into();
        let named = |order: [&Facts; 2]| {
            let mut blobs = HashMap::new();
            for facts in order {
                learn_blobs(&mut blobs, &"e".into(), &namespace, facts);
            }
            blobs[&(Arc::clone(&namespace), gzip.chain[0])].digest.clone()
        };
        assert_eq!(named([&gzip, &zstd]), "sha256:a");
        assert_eq!(named([&zstd, &gzip]), "sha256:a");
    }
}
