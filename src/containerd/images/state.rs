//! What is known of the images of one containerd: their names, manifests and layers.
//!
//! Memory only: nothing here calls containerd or requests a recording. One lock guards all of it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Semaphore;

use super::names::{ImageState, Key};
use crate::containerd::manifests::Descriptor;
use crate::containerd::probes::HealthCheck;
use crate::containerd::recording::Recording;
use crate::containerd::snapshots::HeldLeases;
use crate::health::Health;
use crate::model::{Blob, ChainId, DiffId, ManifestDigest};

/// Images whose layers are being recorded at the same time.
const RECORDINGS: usize = 4;

/// The images of one containerd. Survives connections: content does not change because a
/// socket was closed.
pub(crate) struct Images {
    pub(super) endpoint: Arc<str>,
    pub(super) recorder: Arc<dyn Recording>,
    pub(super) health: Arc<Health>,
    pub(super) leases: Arc<HeldLeases>,
    pub(super) recordings: Semaphore,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) names: HashMap<Key, ImageState>,
    /// By the digest of the target.
    pub(super) facts: HashMap<String, Arc<Facts>>,
    layers: HashMap<ChainId, ParentLayer>,
    /// The archives of the layers that the images of a namespace are made of.
    pub(super) blobs: HashMap<(Arc<str>, ChainId), Blob>,
    /// One recording at a time per stack of layers: the next one finds it done.
    pub(super) turns: HashMap<ChainId, Arc<tokio::sync::Mutex<()>>>,
}

/// What a chain ID stands for: a layer on top of a parent.
#[derive(Clone, Copy, Debug)]
struct ParentLayer {
    parent: Option<ChainId>,
    /// `None` if the chain is known from a snapshot only.
    diff_id: Option<DiffId>,
}

/// What an image's manifest and config state.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) manifest_digest: ManifestDigest,
    /// Bottom first; empty if the target is no image.
    pub(super) diff_ids: Vec<DiffId>,
    /// As long as `diff_ids`.
    pub(super) chain: Vec<ChainId>,
    /// As long as `diff_ids`, or empty if the manifest and the config disagree.
    pub(super) blobs: Vec<Descriptor>,
    pub(crate) health_check: HealthCheck,
}

impl Facts {
    pub(crate) fn chain_id(&self) -> Option<ChainId> {
        self.chain.last().copied()
    }
}

impl Images {
    pub(crate) fn new(
        endpoint: Arc<str>,
        recorder: Arc<dyn Recording>,
        health: Arc<Health>,
    ) -> Images {
        Images {
            endpoint,
            recorder,
            health,
            leases: Arc::default(),
            recordings: Semaphore::new(RECORDINGS),
            state: Mutex::default(),
        }
    }

    pub(crate) fn leases(&self) -> &HeldLeases {
        &self.leases
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    pub(crate) fn diff_id(&self, chain_id: ChainId) -> Option<DiffId> {
        let state = self.state();
        match state.layers.get(&chain_id) {
            Some(ParentLayer { diff_id: Some(diff_id), .. }) => Some(*diff_id),
            // The chain of a single layer is that layer.
            Some(ParentLayer { parent: None, .. }) => Some(DiffId(chain_id.0)),
            Some(_) | None => None,
        }
    }

    /// The chain below this one. `None` if this chain is not known, `Some(None)` if it is a
    /// bottom layer.
    pub(crate) fn parent(&self, chain_id: ChainId) -> Option<Option<ChainId>> {
        self.state().layers.get(&chain_id).map(|layer| layer.parent)
    }

    /// The archive of the topmost layer of `chain_id`.
    pub(crate) fn blob(&self, namespace: &str, chain_id: ChainId) -> Option<Blob> {
        self.state().blobs.get(&(namespace.into(), chain_id)).cloned()
    }

    pub(crate) fn learn_parent(&self, chain_id: ChainId, parent: Option<ChainId>) {
        self.state().layers.entry(chain_id).or_insert(ParentLayer { parent, diff_id: None });
    }

    /// Files the facts of `target`, an image of `namespace`.
    pub(super) fn learn_facts(
        &self,
        namespace: &Arc<str>,
        target: &Descriptor,
        facts: &Arc<Facts>,
    ) {
        let mut state = self.state();
        let mut parent = None;
        for (&chain_id, &diff_id) in facts.chain.iter().zip(&facts.diff_ids) {
            state.layers.insert(chain_id, ParentLayer { parent, diff_id: Some(diff_id) });
            parent = Some(chain_id);
        }
        state.facts.insert(target.digest.clone(), Arc::clone(facts));
        learn_blobs(&mut state.blobs, &self.endpoint, namespace, facts);
    }

    /// The facts of a target that is known already. `namespace` has it too.
    pub(super) fn known_facts(&self, namespace: &Arc<str>, target: &str) -> Option<Arc<Facts>> {
        let mut state = self.state();
        let facts = Arc::clone(state.facts.get(target)?);
        learn_blobs(&mut state.blobs, &self.endpoint, namespace, &facts);
        Some(facts)
    }
}

/// Stores each archive of an image's layers under the chain ID of the stack that ends with
/// its layer. A layer may have several archives (gzip, zstd). Which one is kept does not depend
/// on the order in which images are resolved.
pub(super) fn learn_blobs(
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
