//! Follows the names of images: events and lists come in, each name is checked again, and the
//! recorder learns which names there are.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use containerd_client::services::v1::{Image, ListImagesRequest};
use tokio::task::JoinSet;
use tonic::Status;

use super::error::ImageError;
use super::names::{ImageState, Key, Readiness};
use super::record::RecordOptions;
use super::resolve;
use super::state::{Images, State, learn_blobs};
use crate::baseline::{ImageName, Recorded};
use crate::containerd::connection::Namespace;
use crate::containerd::manifests::Descriptor;
use crate::containerd::recording::ImageProblem;
use crate::health::Failure;
use crate::model::{ChainId, ManifestDigest, printable};

/// Images whose manifests are being read at the same time.
const READS: usize = 8;

impl Images {
    /// An event concerns this image name: it is checked again.
    pub(crate) fn changed(self: &Arc<Self>, namespace: &Namespace, name: &str) {
        let key = Key { namespace: Arc::clone(&namespace.name), name: name.into() };
        {
            let mut state = self.state();
            let image = state.names.entry(key.clone()).or_insert_with(ImageState::new);
            image.last_event = Instant::now();
            if image.is_being_checked {
                image.check_again = true;
                return;
            }
            image.is_being_checked = true;
        }
        let images = Arc::clone(self);
        let namespace = namespace.clone();
        tokio::spawn(async move {
            loop {
                images.reconcile(&namespace, &key).await;
                let mut state = images.state();
                match state.names.get_mut(&key) {
                    Some(image) if image.check_again => image.check_again = false,
                    Some(image) => {
                        image.is_being_checked = false;
                        break;
                    }
                    None => break,
                }
            }
        });
    }

    /// The image's record is gone. Its layers stay known: containers may stand on them.
    pub(crate) fn removed(&self, namespace: &str, name: &str) {
        self.state().names.remove(&Key { namespace: namespace.into(), name: name.into() });
        self.recorder.image_removed(namespace, name);
    }

    /// A layer has been unpacked: the images that waited for it are checked again.
    pub(crate) fn layer_committed(self: &Arc<Self>, namespace: &Namespace, chain_id: ChainId) {
        for name in self.waiting_for(&namespace.name, chain_id) {
            self.changed(namespace, &name);
        }
    }

    /// The images that waited for this layer. The patience of those that wait for more of their
    /// layers begins anew.
    pub(super) fn waiting_for(&self, namespace: &str, chain_id: ChainId) -> Vec<String> {
        let mut state = self.state();
        let State { names, facts, .. } = &mut *state;
        let mut waiting = Vec::new();
        for (key, image) in names.iter_mut().filter(|(key, _)| &*key.namespace == namespace) {
            let facts = image.target.as_ref().and_then(|target| facts.get(&target.digest));
            if facts.is_some_and(|facts| facts.chain.contains(&chain_id)) {
                image.waits_since = Instant::now();
            }
            if image.waits_for() == Some(chain_id) {
                waiting.push(key.name.clone());
            }
        }
        waiting
    }

    /// Takes in a full list of a namespace's images. Returns when the layers of each are known;
    /// recording goes on in the background.
    pub(crate) async fn list(self: &Arc<Self>, namespace: &Namespace) -> Result<(), Status> {
        let requested = Instant::now();
        let response = namespace.images().list(ListImagesRequest::default()).await?;
        let images = response.into_inner().images;
        for name in self.not_listed(namespace, &images, requested) {
            self.removed(&namespace.name, &name);
        }
        self.resolve_all(namespace, &images).await;
        for image in images {
            let Some(target) = image.target else { continue };
            let key = Key { namespace: Arc::clone(&namespace.name), name: image.name };
            let settled = {
                let mut state = self.state();
                let known = state.names.entry(key.clone()).or_insert_with(ImageState::new);
                known.listed(Descriptor::of(target), requested)
            };
            if !settled {
                self.changed(namespace, &key.name);
            }
        }
        Ok(())
    }

    /// The names that are known but not in the list, unless an event has come since.
    fn not_listed(
        &self,
        namespace: &Namespace,
        images: &[Image],
        requested: Instant,
    ) -> Vec<String> {
        let listed: HashSet<&str> = images.iter().map(|image| image.name.as_str()).collect();
        let state = self.state();
        let gone = state.names.iter().filter(|(key, image)| {
            key.namespace == namespace.name
                && image.last_event < requested
                && !listed.contains(key.name.as_str())
        });
        gone.map(|(key, _)| key.name.clone()).collect()
    }

    /// Reports to the recorder which names there are, after a full list, so that it forgets
    /// names that were deleted while driftd was not connected.
    ///
    /// Done under the lock under which facts are learnt. A recording is requested only after
    /// that, so a name that is missing here is named again by its request.
    pub(crate) fn report_names(&self) {
        let state = self.state();
        let names = state
            .names
            .iter()
            .filter_map(|(key, image)| {
                let facts = state.facts.get(&image.target.as_ref()?.digest)?;
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

    /// Forgets the images of namespaces that do not exist any more, and the facts to which no
    /// name points.
    pub(crate) fn retain_namespaces(&self, namespaces: &[String]) {
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
        let targets: HashSet<&str> = names
            .values()
            .filter_map(|image| image.target.as_ref())
            .map(|target| target.digest.as_str())
            .collect();
        // The layers stay known: containers outlive their images.
        facts.retain(|target, _| targets.contains(target.as_str()));
        blobs.clear();
        for (key, image) in names.iter() {
            let Some(target) = &image.target else { continue };
            if let Some(facts) = facts.get(&target.digest) {
                learn_blobs(blobs, &self.endpoint, &key.namespace, facts);
            }
        }
    }

    /// Learns the layers of many images at once. Errors are found again, and reported, when
    /// each image is checked.
    async fn resolve_all(self: &Arc<Self>, namespace: &Namespace, images: &[Image]) {
        let mut reads = JoinSet::new();
        for target in images.iter().filter_map(|image| image.target.clone()).map(Descriptor::of) {
            if self.known_facts(&namespace.name, &target.digest).is_some() {
                continue;
            }
            if reads.len() == READS {
                let _ = reads.join_next().await;
            }
            let (images, namespace) = (Arc::clone(self), namespace.clone());
            reads.spawn(async move {
                let _ = images.facts(&namespace, &target).await;
            });
        }
        while reads.join_next().await.is_some() {}
    }

    /// Has one image recorded, or files why it cannot be.
    async fn reconcile(&self, namespace: &Namespace, key: &Key) {
        let target = match resolve::target(namespace, &key.name).await {
            Ok(target) => target,
            Err(ImageError::Unknown) => {
                // Deleted meanwhile. Its event does the same; twice does no harm.
                self.removed(&key.namespace, &key.name);
                return;
            }
            // A connection that failed. The list after the next connection checks again.
            Err(_) => return,
        };
        if let Some(image) = self.state().names.get_mut(key) {
            image.target = Some(target.clone());
        }
        let outcome = self.record(namespace, key, &target, RecordOptions::default()).await;
        self.conclude(key, &outcome, &target);
    }

    /// Files how the recording of an image went.
    pub(super) fn conclude(
        &self,
        key: &Key,
        outcome: &Result<Recorded, ImageError>,
        target: &Descriptor,
    ) {
        let Some(next) = Readiness::after(outcome, target) else { return };
        let mut state = self.state();
        let Some(image) = state.names.get_mut(key) else {
            // It was deleted while it was being recorded.
            drop(state);
            self.recorder.image_removed(&key.namespace, &key.name);
            return;
        };
        image.move_to(next);
        let Err(ImageError::Bad { digest, reason }) = outcome else { return };
        if !image.is_new_warning(digest, reason) {
            return;
        }
        drop(state);
        let _degraded = self.health.record(Failure::BaselineUnavailable);
        tracing::warn!(
            namespace = %key.namespace,
            image = printable(key.name.as_bytes()),
            digest,
            "no baseline for this image: {reason}"
        );
    }

    /// Has an image recorded now, and waits for that. The name may also be the digest of its
    /// manifest, or its chain ID.
    pub(crate) async fn record_now(
        &self,
        namespace: &Namespace,
        name: &str,
        options: RecordOptions,
    ) -> Result<Recorded, ImageError> {
        let name = self.name_of(&namespace.name, name).unwrap_or_else(|| name.into());
        let target = resolve::target(namespace, &name).await?;
        let key = Key { namespace: Arc::clone(&namespace.name), name };
        self.state().names.entry(key.clone()).or_insert_with(ImageState::new).target =
            Some(target.clone());
        let outcome = self.record(namespace, &key, &target, options).await;
        self.conclude(&key, &outcome, &target);
        outcome
    }

    /// A name of the image with this manifest digest or chain ID.
    fn name_of(&self, namespace: &str, digest: &str) -> Option<String> {
        let manifest_digest: ManifestDigest = digest.parse().ok()?;
        let chain_id = ChainId(manifest_digest.0);
        let state = self.state();
        let mut names = state.names.iter().filter(|(key, image)| {
            let target = image.target.as_ref().map(|target| &target.digest);
            &*key.namespace == namespace
                && target.and_then(|target| state.facts.get(target)).is_some_and(|facts| {
                    facts.manifest_digest == manifest_digest || facts.chain_id() == Some(chain_id)
                })
        });
        names.next().map(|(key, _)| key.name.clone())
    }

    /// The images that have no baseline, and why.
    pub(crate) fn problems(&self) -> Vec<ImageProblem> {
        let state = self.state();
        let mut problems: Vec<ImageProblem> = state
            .names
            .iter()
            .filter_map(|(key, image)| {
                let (digest, reason) = image.problem()?;
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
}
