//! The baselines of this node, on disk.
//!
//! ```text
//! baselines/                             0700, root's
//!   layers/<diff ID in hex>.layer        one layer, whatever images use it
//!   layers/chain-<chain ID in hex>.layer a layer whose diff ID nobody knows
//!   images/<chain ID in hex>.json        what an image is called, and its layers
//!   proofs/<like its layer>.json         how far a layer is proved
//! ```
//!
//! A file is written under another name, synced, and renamed: under its own name
//! it is whole and never changes. Only the recorder's thread writes. The state's lock is
//! held by nobody who waits for the disk: whoever reads must not wait for that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::KnownBy;
use super::layer::{self, LayerBaseline, LayerEntry, OpenError, WriteError, parse_layer_id};
use super::merge::{ImageBaseline, Totals};
use super::proof::{self, LayerProof};
use crate::health::{Failure, Health};
use crate::model::{Blake3Hash, ChainId, LayerId, ManifestDigest, printable};

/// What an image is called in one of containerd's namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ImageName {
    pub namespace: String,
    pub name: String,
    pub manifest_digest: Option<ManifestDigest>,
}

impl ImageName {
    fn is(&self, namespace: &str, name: &str) -> bool {
        self.namespace == namespace && self.name == name
    }
}

fn give_name(names: &mut Vec<ImageName>, name: &ImageName) {
    names.retain(|known| !known.is(&name.namespace, &name.name));
    names.push(name.clone());
    names.sort();
}

/// A stack of layers that is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    pub chain_id: ChainId,
    /// Empty when the image was removed, or only containers ever named it.
    pub names: Vec<ImageName>,
    /// Of the manifest it was last seen with.
    pub manifest_digest: Option<ManifestDigest>,
    /// Bottom first.
    pub layers: Vec<LayerId>,
    pub recorded_at: Timestamp,
    pub totals: Totals,
    /// Since when no image and no container needs it, as far as was noticed.
    pub unneeded_since: Option<Timestamp>,
}

/// Why the store cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the baseline directory {} (driftd must be root, and the disk writable)", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("cannot read the baseline {} (to record it anew, remove it)", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write the baseline {} (is the disk full? try: df {})", path.display(), path.parent().unwrap_or(path).display())]
    Write { path: PathBuf, source: io::Error },
    #[error("another process writes to {} (a running driftd's baselines are its own: name another directory)", path.display())]
    InUse { path: PathBuf },
    #[error("layer {id} cannot be a baseline: {reason}")]
    Refused { id: LayerId, reason: String },
}

/// Why no image was found by what somebody typed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error(
        "no baseline of `{text}` is known (see: driftd baseline ls; record it with: driftd baseline record IMAGE)"
    )]
    Unknown { text: String },
    #[error("`{text}` may be any of: {} (name one of these)", candidates.join(", "))]
    Ambiguous { text: String, candidates: Vec<String> },
}

/// The right to write to a store.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "the lock is held while the file is open")] File);

/// All baselines of this node.
#[derive(Debug)]
pub struct Store {
    layers: PathBuf,
    images: PathBuf,
    proofs: PathBuf,
    health: Arc<Health>,
    read_only: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<ChainId, ImageRecord>,
    /// Each of the layer's file as it is now.
    proofs: HashMap<LayerId, LayerProof>,
    open_layers: HashMap<LayerId, Weak<LayerBaseline>>,
    open_images: HashMap<ChainId, Weak<ImageBaseline>>,
    /// Layers whose files were whole when they were last looked at.
    sound: HashSet<LayerId>,
    /// Which socket of containerd listed a name, by namespace and name. Not
    /// kept: after a restart, the first list that lacks a name removes it, and
    /// the next that has it brings it back.
    listed_by: HashMap<(String, String), String>,
}

/// What [`Store::collect`] has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub images: usize,
    pub layers: usize,
    /// Of the layers' files.
    pub bytes: u64,
}

const LAYER_SUFFIX: &str = ".layer";
const IMAGE_SUFFIX: &str = ".json";
const PROOF_SUFFIX: &str = ".json";
const UNFINISHED_SUFFIX: &str = ".tmp";
const CORRUPT_SUFFIX: &str = ".corrupt";

impl Store {
    /// Opens the store in `directory`, and makes it if it is not there.
    pub fn open(directory: &Path, health: Arc<Health>) -> Result<Store, Error> {
        let [layers, images, proofs] =
            ["layers", "images", "proofs"].map(|name| directory.join(name));
        make(directory).map_err(|source| Error::Directory { path: directory.into(), source })?;
        for path in [&layers, &images, &proofs] {
            make_private(path)
                .and_then(|()| remove_unfinished(path))
                .map_err(|source| Error::Directory { path: path.into(), source })?;
        }
        let state = Mutex::default();
        Store { layers, images, proofs, health, read_only: false, state }.loaded()
    }

    /// Opens a store that another process may be writing to. Nothing on the disk
    /// is changed: files appear whole and never change, so there is nothing to
    /// wait for. A file that is not whole is an error.
    pub fn open_to_read(directory: &Path, health: Arc<Health>) -> Result<Store, Error> {
        let [layers, images, proofs] =
            ["layers", "images", "proofs"].map(|name| directory.join(name));
        let state = Mutex::default();
        Store { layers, images, proofs, health, read_only: true, state }.loaded()
    }

    /// Claims the store in `directory` for one process that writes to it, until
    /// the claim is dropped or the process has ended. Comes before [`Store::open`],
    /// which removes what a process that died has left half written. Who only
    /// reads needs none.
    pub fn claim(directory: &Path) -> Result<Claim, Error> {
        let unusable = |source| Error::Directory { path: directory.into(), source };
        make(directory).map_err(unusable)?;
        let claimed = File::open(directory).map_err(unusable)?;
        match claimed.try_lock() {
            Ok(()) => Ok(Claim(claimed)),
            Err(TryLockError::WouldBlock) => Err(Error::InUse { path: directory.into() }),
            Err(TryLockError::Error(source)) => Err(unusable(source)),
        }
    }

    fn loaded(self) -> Result<Store, Error> {
        let (records, proofs) = (self.load_records()?, self.load_proofs()?);
        let mut state = self.state();
        (state.records, state.proofs) = (records, proofs);
        drop(state);
        Ok(self)
    }

    /// Every recorded image, by name.
    pub fn images(&self) -> Vec<ImageRecord> {
        let mut records: Vec<ImageRecord> = self.state().records.values().cloned().collect();
        records.sort_by(|a, b| (&a.names, a.chain_id).cmp(&(&b.names, b.chain_id)));
        records
    }

    /// The image that somebody means: by its name (`busybox` is
    /// `docker.io/library/busybox:latest`), its manifest digest, its chain ID, or
    /// the beginning of either.
    pub fn find(&self, text: &str) -> Result<ImageRecord, FindError> {
        let state = self.state();
        let wanted = full_name(text);
        let by_name = |record: &&ImageRecord| {
            record.names.iter().any(|image| image.name == text || full_name(&image.name) == wanted)
        };
        let hex = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
        let is_prefix = hex.len() >= 4 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        let by_digest = |record: &&ImageRecord| {
            let digests = record.names.iter().filter_map(|image| image.manifest_digest);
            let digests = digests.chain(record.manifest_digest).map(|digest| digest.hex());
            is_prefix
                && digests.chain([record.chain_id.hex()]).any(|digest| digest.starts_with(&hex))
        };

        let mut found: Vec<&ImageRecord> = state.records.values().filter(by_name).collect();
        if found.is_empty() {
            found = state.records.values().filter(by_digest).collect();
        }
        let text = printable(text.as_bytes());
        match found[..] {
            [] => Err(FindError::Unknown { text }),
            [record] => Ok(record.clone()),
            _ => Err(FindError::Ambiguous {
                text,
                candidates: found.iter().map(|record| record.chain_id.to_string()).collect(),
            }),
        }
    }

    /// The layers of a chain that is recorded, bottom first.
    pub fn layers_of(&self, chain_id: ChainId) -> Option<Vec<LayerId>> {
        self.state().records.get(&chain_id).map(|record| record.layers.clone())
    }

    /// The baseline of a chain; `None` if it is not recorded, or not whole any
    /// more.
    pub fn image(&self, chain_id: ChainId) -> Result<Option<Arc<ImageBaseline>>, Error> {
        if let Some(image) = self.state().open_images.get(&chain_id).and_then(Weak::upgrade) {
            return Ok(Some(image));
        }
        match self.layers_of(chain_id) {
            Some(layers) => self.assemble(chain_id, &layers),
            None => Ok(None),
        }
    }

    fn assemble(
        &self,
        chain_id: ChainId,
        ids: &[LayerId],
    ) -> Result<Option<Arc<ImageBaseline>>, Error> {
        let Some(image) = self.stack(chain_id, ids)?.map(Arc::new) else { return Ok(None) };
        self.state().open_images.insert(chain_id, Arc::downgrade(&image));
        Ok(Some(image))
    }

    /// One layer; `None` if it is not recorded. A file that is not whole is set
    /// aside, so that the layer can be recorded again.
    pub fn layer(&self, id: LayerId) -> Result<Option<Arc<LayerBaseline>>, Error> {
        if let Some(layer) = self.state().open_layers.get(&id).and_then(Weak::upgrade) {
            return Ok(Some(layer));
        }
        let path = self.layer_path(id);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                self.state().sound.remove(&id);
                return Ok(None);
            }
            Err(source) => return Err(Error::Read { path, source }),
        };
        let why = match LayerBaseline::open(&file) {
            Ok(layer) if layer.id() == id => {
                let layer = Arc::new(layer);
                let mut state = self.state();
                state.sound.insert(id);
                state.open_layers.insert(id, Arc::downgrade(&layer));
                return Ok(Some(layer));
            }
            Ok(layer) => format!("it holds layer {}", layer.id()),
            Err(OpenError::Invalid(invalid)) => invalid.to_string(),
            Err(OpenError::Io(source)) => return Err(Error::Read { path, source }),
        };
        self.state().sound.remove(&id);
        self.set_aside(&path, &why)?;
        Ok(None)
    }

    /// Whether a layer is recorded and whole.
    pub fn has_layer(&self, id: LayerId) -> Result<bool, Error> {
        if self.state().sound.contains(&id) && self.layer_path(id).exists() {
            return Ok(true);
        }
        Ok(self.layer(id)?.is_some())
    }

    /// Writes a layer, durably, in place of what was recorded for it. Who holds
    /// the old one keeps it; a proof of the old one is void.
    pub fn write_layer(
        &self,
        id: LayerId,
        entries: Vec<LayerEntry>,
    ) -> Result<Arc<LayerBaseline>, Error> {
        let path = self.layer_path(id);
        let written = write_whole(&path, |file| layer::write(id, entries, file).map(drop));
        written.map_err(|err| match err {
            WriteError::Io(source) => Error::Write { path: path.clone(), source },
            WriteError::Refused(reason) => Error::Refused { id, reason },
        })?;
        self.replaced(id)?;
        self.layer(id)?.ok_or_else(|| Error::Refused {
            id,
            reason: "it was not read back as it was written".into(),
        })
    }

    /// A layer has another file than before.
    fn replaced(&self, id: LayerId) -> Result<(), Error> {
        let checksum = checksum_of(&self.layer_path(id));
        let mut state = self.state();
        state.open_layers.remove(&id);
        state
            .open_images
            .retain(|_, image| image.upgrade().is_some_and(|image| !image.layers().contains(&id)));
        let is_void = state.proofs.get(&id).is_some_and(|proof| checksum != Some(proof.checksum));
        if is_void {
            state.proofs.remove(&id);
            drop(state);
            remove(&self.proof_path(id))?;
        }
        Ok(())
    }

    /// What is known of a layer's file besides what it says.
    pub fn proof(&self, id: LayerId) -> Option<LayerProof> {
        self.state().proofs.get(&id).cloned()
    }

    /// Keeps what is known of a layer's file. If it cannot be written it is known
    /// until the end of the process.
    pub fn write_proof(&self, id: LayerId, proof: LayerProof) -> Result<(), Error> {
        if self.proof(id).as_ref() == Some(&proof) {
            return Ok(());
        }
        let json = proof::to_json(id, &proof);
        self.state().proofs.insert(id, proof);
        let path = self.proof_path(id);
        write_whole(&path, |file| file.write_all(&json))
            .map_err(|source| Error::Write { path, source })
    }

    /// Whether a layer is known to be recorded in a way that it can be used at that
    /// place in a stack: above others it hides some of what they have.
    pub fn has_layer_for(&self, id: LayerId, bottom: bool) -> Result<bool, Error> {
        let hides = self.state().proofs.get(&id).is_some_and(|proof| proof.hides);
        Ok((bottom || hides) && self.has_layer(id)?)
    }

    /// These layers as one tree, without a record of it; `None` if one is not
    /// here.
    pub fn stack(
        &self,
        chain_id: ChainId,
        ids: &[LayerId],
    ) -> Result<Option<ImageBaseline>, Error> {
        let mut layers = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(layer) = self.layer(*id)? else { return Ok(None) };
            layers.push((*id, layer));
        }
        Ok(Some(ImageBaseline::new(chain_id, layers)))
    }

    /// The images that this layer is part of.
    pub fn images_with(&self, id: LayerId) -> Vec<ChainId> {
        let state = self.state();
        let with = state.records.values().filter(|record| record.layers.contains(&id));
        with.map(|record| record.chain_id).collect()
    }

    /// Records a layer whose entries come one by one, in the order of paths: `fill`
    /// is given what takes them. If it fails, nothing is recorded.
    pub fn record_layer<T, E: From<Error>>(
        &self,
        id: LayerId,
        fill: impl FnOnce(&mut dyn FnMut(LayerEntry) -> Result<(), E>) -> Result<T, E>,
    ) -> Result<T, E> {
        let path = self.layer_path(id);
        let fail = |err| match err {
            WriteError::Io(source) => Error::Write { path: path.clone(), source },
            WriteError::Refused(reason) => Error::Refused { id, reason },
        };
        let written = write_whole(&path, |file| {
            let mut writer = layer::Writer::new(id, file, scratch_beside(&path)?)?;
            let value = fill(&mut |entry| writer.push(&entry).map_err(|err| fail(err).into()))
                .map_err(Filling::Theirs)?;
            writer.finish()?;
            Ok(value)
        });
        let value = written.map_err(|err| match err {
            Filling::Ours(err) => fail(err).into(),
            Filling::Theirs(err) => err,
        })?;
        self.replaced(id)?;
        Ok(value)
    }

    /// Records that these layers, bottom first, are an image; a name that
    /// another image had is this one's now. `None` if a layer is not here.
    pub fn write_image(
        &self,
        chain_id: ChainId,
        layers: Vec<LayerId>,
        name: Option<&ImageName>,
    ) -> Result<Option<Arc<ImageBaseline>>, Error> {
        let Some(image) = self.assemble(chain_id, &layers)? else { return Ok(None) };
        let known = self.state().records.get(&chain_id).cloned();
        let (mut names, mut manifest_digest) = match known {
            Some(known) => (known.names, known.manifest_digest),
            None => (Vec::new(), None),
        };
        if let Some(name) = name {
            give_name(&mut names, name);
            manifest_digest = name.manifest_digest.or(manifest_digest);
        }
        let recorded_at = Timestamp::now();
        let totals = image.totals();
        let unneeded_since = None;
        let record = ImageRecord {
            chain_id,
            names,
            manifest_digest,
            layers,
            recorded_at,
            totals,
            unneeded_since,
        };
        self.write_record(&record)?;
        self.state().records.insert(chain_id, record);
        if let Some(name) = name {
            self.name_image(chain_id, name)?;
        }
        Ok(Some(image))
    }

    /// Gives a recorded image a name, and takes it from any other.
    pub fn name_image(&self, chain_id: ChainId, name: &ImageName) -> Result<(), Error> {
        let mut changed = Vec::new();
        for record in self.state().records.values_mut() {
            let before = (record.names.clone(), record.manifest_digest);
            if record.chain_id == chain_id {
                give_name(&mut record.names, name);
                record.unneeded_since = None;
                record.manifest_digest = name.manifest_digest.or(record.manifest_digest);
            } else {
                record.names.retain(|known| !known.is(&name.namespace, &name.name));
            }
            if before != (record.names.clone(), record.manifest_digest) {
                changed.push(record.clone());
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }

    /// What one socket of containerd lists; names of its that are not listed
    /// any more are gone.
    pub fn set_names(&self, endpoint: &str, listed: &[(ImageName, ChainId)]) -> Result<(), Error> {
        // A name that is listed twice is the last one's.
        let owners: HashMap<(&str, &str), (&ImageName, ChainId)> = listed
            .iter()
            .map(|(image, chain_id)| {
                ((image.namespace.as_str(), image.name.as_str()), (image, *chain_id))
            })
            .collect();
        let mut given: HashMap<ChainId, Vec<&ImageName>> = HashMap::new();
        for (image, chain_id) in owners.values() {
            given.entry(*chain_id).or_default().push(image);
        }
        let mut changed = Vec::new();
        {
            let mut state = self.state();
            let State { records, listed_by, .. } = &mut *state;
            for record in records.values_mut() {
                let before = (record.names.clone(), record.manifest_digest);
                record.names.retain(|image| {
                    if owners.contains_key(&(image.namespace.as_str(), image.name.as_str())) {
                        // Whoever has it now is given it below.
                        return false;
                    }
                    let key = (image.namespace.clone(), image.name.clone());
                    let is_gone = listed_by.get(&key).is_none_or(|by| by == endpoint);
                    if is_gone {
                        listed_by.remove(&key);
                    }
                    !is_gone
                });
                if let Some(names) = given.get(&record.chain_id) {
                    record.names.extend(names.iter().copied().cloned());
                    record.unneeded_since = None;
                    record.names.sort();
                    let mut digests = record.names.iter().filter_map(|image| image.manifest_digest);
                    // One that is still a name's own stays.
                    let is_named = digests.clone().any(|one| Some(one) == record.manifest_digest);
                    if !is_named {
                        record.manifest_digest = digests.next_back().or(record.manifest_digest);
                    }
                }
                if before != (record.names.clone(), record.manifest_digest) {
                    changed.push(record.clone());
                }
            }
            for (image, _) in listed {
                let key = (image.namespace.clone(), image.name.clone());
                listed_by.insert(key, endpoint.to_owned());
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }

    /// An image was removed. What was recorded stays until it is collected.
    pub fn remove_name(&self, namespace: &str, name: &str) -> Result<(), Error> {
        let mut changed = Vec::new();
        {
            let mut state = self.state();
            state.listed_by.remove(&(namespace.to_owned(), name.to_owned()));
            for record in state.records.values_mut() {
                let before = record.names.len();
                record.names.retain(|image| !image.is(namespace, name));
                if record.names.len() != before {
                    changed.push(record.clone());
                }
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }

    /// Forgets images that have had no name and no user for as long as
    /// `retention`, and then layers of no image.
    pub fn collect(
        &self,
        in_use: &HashSet<ChainId>,
        retention: Duration,
    ) -> Result<Collected, Error> {
        let now = Timestamp::now();
        let mut state = self.state();
        state.open_images.retain(|_, image| image.strong_count() > 0);
        let State { records, open_images, .. } = &mut *state;
        let (mut changed, mut forgotten) = (Vec::new(), Vec::new());
        for record in records.values_mut() {
            let chain_id = record.chain_id;
            let needed = !record.names.is_empty()
                || in_use.contains(&chain_id)
                || open_images.contains_key(&chain_id);
            let since = if needed { None } else { record.unneeded_since.or(Some(now)) };
            if since != record.unneeded_since {
                record.unneeded_since = since;
                changed.push(record.clone());
            }
            // A clock that was set back makes it wait longer.
            let age = since.and_then(|since| Duration::try_from(now.duration_since(since)).ok());
            if age.is_some_and(|age| age >= retention) {
                forgotten.push(chain_id);
            }
        }
        drop(state);
        changed.iter().try_for_each(|record| self.write_record(record))?;
        let mut collected = Collected { images: forgotten.len(), ..Collected::default() };
        for chain_id in forgotten {
            remove(&self.image_path(chain_id))?;
            self.state().records.remove(&chain_id);
        }
        self.remove_unneeded_layers(&mut collected)?;
        Ok(collected)
    }

    /// Forgets one image, and then the layers of no image. Whoever holds its
    /// baseline keeps it.
    pub fn remove(&self, chain_id: ChainId) -> Result<(), Error> {
        remove(&self.image_path(chain_id))?;
        let mut state = self.state();
        state.records.remove(&chain_id);
        state.open_images.remove(&chain_id);
        drop(state);
        self.remove_unneeded_layers(&mut Collected::default())
    }

    fn remove_unneeded_layers(&self, collected: &mut Collected) -> Result<(), Error> {
        let files = files_in(&self.layers, LAYER_SUFFIX)?;
        let needed: HashSet<LayerId> = {
            let mut state = self.state();
            state.open_layers.retain(|_, layer| layer.strong_count() > 0);
            let recorded = state.records.values().flat_map(|record| record.layers.iter().copied());
            recorded.chain(state.open_layers.keys().copied()).collect()
        };
        for (path, stem) in files {
            // A file of another name is not ours to remove.
            let Some(id) = layer_of_stem(&stem) else { continue };
            if needed.contains(&id) {
                continue;
            }
            {
                // Known by nobody first: it is not there any more in a moment. Whoever has
                // opened it since then keeps it.
                let mut state = self.state();
                if state.open_layers.get(&id).is_some_and(|layer| layer.strong_count() > 0) {
                    continue;
                }
                state.sound.remove(&id);
                state.proofs.remove(&id);
            }
            let bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            remove(&path)?;
            remove(&self.proof_path(id))?;
            collected.layers += 1;
            collected.bytes += bytes;
        }
        Ok(())
    }

    /// How an image's baseline is known: as its least known layer is. Then each of
    /// its layers, bottom first, with the reason why it is not verified.
    pub fn known_by(
        &self,
        chain_id: ChainId,
    ) -> (KnownBy, Vec<(LayerId, KnownBy, Option<String>)>) {
        let state = self.state();
        let ids = state.records.get(&chain_id).map(|record| record.layers.as_slice());
        let layers: Vec<_> = ids
            .unwrap_or_default()
            .iter()
            .map(|id| match state.proofs.get(id) {
                Some(proof) => (*id, proof.known_by, proof.not_verified.clone()),
                None => (*id, KnownBy::Snapshot, None),
            })
            .collect();
        let least = layers.iter().map(|(_, known_by, _)| *known_by).min();
        (least.unwrap_or(KnownBy::Snapshot), layers)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layer_path(&self, id: LayerId) -> PathBuf {
        self.layers.join(stem_of(id) + LAYER_SUFFIX)
    }

    fn proof_path(&self, id: LayerId) -> PathBuf {
        self.proofs.join(stem_of(id) + PROOF_SUFFIX)
    }

    fn image_path(&self, chain_id: ChainId) -> PathBuf {
        self.images.join(chain_id.hex() + IMAGE_SUFFIX)
    }

    fn write_record(&self, record: &ImageRecord) -> Result<(), Error> {
        let path = self.image_path(record.chain_id);
        let json = serde_json::to_vec_pretty(&RecordJson::from(record))
            .expect("a record has only text for keys");
        write_whole(&path, |file| file.write_all(&json))
            .map_err(|source| Error::Write { path, source })
    }

    fn load_records(&self) -> Result<BTreeMap<ChainId, ImageRecord>, Error> {
        let mut records = BTreeMap::new();
        for (path, stem) in files_in(&self.images, IMAGE_SUFFIX)? {
            let Some(json) = read_listed(&path)? else { continue };
            let record = serde_json::from_slice::<RecordJson>(&json)
                .map_err(|err| err.to_string())
                .and_then(ImageRecord::try_from);
            match record {
                Ok(record) if record.chain_id.hex() == stem => {
                    records.insert(record.chain_id, record);
                }
                Ok(record) => self.set_aside(&path, &format!("it holds {}", record.chain_id))?,
                Err(why) => self.set_aside(&path, &why)?,
            }
        }
        Ok(records)
    }

    fn load_proofs(&self) -> Result<HashMap<LayerId, LayerProof>, Error> {
        let mut proofs = HashMap::new();
        // A store that is only read may be older than proofs.
        if self.read_only && !self.proofs.exists() {
            return Ok(proofs);
        }
        for (path, stem) in files_in(&self.proofs, PROOF_SUFFIX)? {
            let Some(json) = read_listed(&path)? else { continue };
            match proof::from_json(&json) {
                Ok((id, _)) if stem_of(id) != stem => {
                    self.set_aside(&path, &format!("it is of layer {id}"))?;
                }
                Ok((id, proof)) if checksum_of(&self.layer_path(id)) == Some(proof.checksum) => {
                    proofs.insert(id, proof);
                }
                // The layer was recorded anew, or is gone, and then came a crash.
                Ok(_) if self.read_only => (),
                Ok(_) => remove(&path)?,
                Err(why) => self.set_aside(&path, &why)?,
            }
        }
        Ok(proofs)
    }

    /// Keeps a file that is not what it should be, under another name.
    fn set_aside(&self, path: &Path, why: &str) -> Result<(), Error> {
        if self.read_only {
            let source = io::Error::new(io::ErrorKind::InvalidData, why);
            return Err(Error::Read { path: path.into(), source });
        }
        let _retry = self.health.record(Failure::BaselineCorrupt);
        let mut aside = path.as_os_str().to_owned();
        aside.push(CORRUPT_SUFFIX);
        tracing::warn!(
            file = %path.display(),
            "a baseline file was set aside and will be recorded again: {why}"
        );
        match fs::rename(path, &aside) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Write { path: path.into(), source })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }
}

/// The name in full, as containerd keeps it.
fn full_name(name: &str) -> String {
    let (registry, rest) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            (first, rest.to_owned())
        }
        Some(_) => ("docker.io", name.to_owned()),
        None => ("docker.io", format!("library/{name}")),
    };
    let last = rest.rsplit('/').next().unwrap_or_default();
    let tag = if last.contains([':', '@']) { "" } else { ":latest" };
    format!("{registry}/{rest}{tag}")
}

fn stem_of(id: LayerId) -> String {
    match id {
        LayerId::Diff(diff_id) => diff_id.hex(),
        LayerId::Chain(chain_id) => format!("chain-{}", chain_id.hex()),
    }
}

fn layer_of_stem(stem: &str) -> Option<LayerId> {
    match stem.strip_prefix("chain-") {
        Some(hex) => parse_layer_id(&format!("chain-sha256:{hex}")),
        None => parse_layer_id(&format!("sha256:{stem}")),
    }
}

// ---- the file system

/// A directory that is there already is somebody's, and keeps its mode.
fn make(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn make_private(directory: &Path) -> io::Result<()> {
    make(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))
}

/// What the end of a layer's file says its checksum is.
fn checksum_of(path: &Path) -> Option<Blake3Hash> {
    let mut checksum = [0; 32];
    let file = File::open(path).ok()?;
    let at = file.metadata().ok()?.len().checked_sub(checksum.len() as u64)?;
    file.read_exact_at(&mut checksum, at).ok()?;
    Some(Blake3Hash(checksum))
}

/// What a crash or a full disk has left half written.
fn remove_unfinished(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.to_str().is_some_and(|path| path.ends_with(UNFINISHED_SUFFIX)) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// The files with this suffix, and their names without it.
fn files_in(directory: &Path, suffix: &str) -> Result<Vec<(PathBuf, String)>, Error> {
    let unreadable = |source| Error::Directory { path: directory.into(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let stem = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(suffix));
        if let Some(stem) = stem.map(str::to_owned) {
            files.push((path, stem));
        }
    }
    Ok(files)
}

/// A file that was in a list of its directory; `None` if it is gone since.
fn read_listed(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.into(), source }),
    }
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.into(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes a file that is there whole or not at all, also when power fails.
fn write_whole<T, E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<T, E>,
) -> Result<T, E> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(UNFINISHED_SUFFIX);
    let written = (|| {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)?;
        let value = write(&mut file)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        // The name itself is kept by the directory.
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(value)
    })();
    if written.is_err() {
        // Best effort: what stays is removed when the store is opened again.
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// A file without a name, on the disk that `path` is on.
fn scratch_beside(path: &Path) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".pool");
    name.push(UNFINISHED_SUFFIX);
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&name)?;
    fs::remove_file(&name)?;
    Ok(file)
}

/// Whether the filling of a layer failed, or the writing.
enum Filling<E> {
    Ours(WriteError),
    Theirs(E),
}

impl<E> From<WriteError> for Filling<E> {
    fn from(err: WriteError) -> Filling<E> {
        Filling::Ours(err)
    }
}

impl<E> From<io::Error> for Filling<E> {
    fn from(err: io::Error) -> Filling<E> {
        Filling::Ours(err.into())
    }
}

// ---- images/*.json

const SCHEMA: &str = "driftd.image/v1";

#[derive(Serialize, Deserialize)]
struct RecordJson {
    schema: String,
    chain_id: ChainId,
    names: Vec<ImageName>,
    manifest_digest: Option<ManifestDigest>,
    layers: Vec<String>,
    recorded_at: Timestamp,
    totals: Totals,
    #[serde(default)]
    unneeded_since: Option<Timestamp>,
}

impl From<&ImageRecord> for RecordJson {
    fn from(record: &ImageRecord) -> RecordJson {
        RecordJson {
            schema: SCHEMA.into(),
            chain_id: record.chain_id,
            names: record.names.clone(),
            manifest_digest: record.manifest_digest,
            layers: record.layers.iter().map(ToString::to_string).collect(),
            recorded_at: record.recorded_at,
            totals: record.totals,
            unneeded_since: record.unneeded_since,
        }
    }
}

impl TryFrom<RecordJson> for ImageRecord {
    type Error = String;

    fn try_from(json: RecordJson) -> Result<ImageRecord, String> {
        if json.schema != SCHEMA {
            return Err(format!(
                "its schema is {}; this driftd knows {SCHEMA}",
                printable(json.schema.as_bytes())
            ));
        }
        let layer = |text: &String| {
            parse_layer_id(text)
                .ok_or_else(|| format!("`{}` is no layer", printable(text.as_bytes())))
        };
        Ok(ImageRecord {
            chain_id: json.chain_id,
            names: json.names,
            manifest_digest: json.manifest_digest,
            layers: json.layers.iter().map(layer).collect::<Result<_, _>>()?,
            recorded_at: json.recorded_at,
            totals: json.totals,
            unneeded_since: json.unneeded_since,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::Command;

    use super::*;
    use crate::baseline::blake3_of;
    use crate::model::{DiffId, RootfsPath};

    fn diff(number: u8) -> LayerId {
        LayerId::Diff(DiffId([number; 32]))
    }

    fn chain(number: u8) -> ChainId {
        ChainId([number; 32])
    }

    fn manifest(number: u8) -> ManifestDigest {
        ManifestDigest([number; 32])
    }

    fn name(namespace: &str, name: &str, number: u8) -> ImageName {
        ImageName {
            namespace: namespace.into(),
            name: name.into(),
            manifest_digest: Some(manifest(number)),
        }
    }

    fn entries(text: &str) -> Vec<LayerEntry> {
        crate::baseline::text::entries(text, &mut BTreeMap::new())
    }

    fn open(directory: &Path) -> Store {
        Store::open(directory, Arc::new(Health::default())).unwrap()
    }

    /// Two images that share a layer: chain 1 is layer 1, chain 2 layers 1 and 2.
    fn two_images(directory: &Path) -> Store {
        let store = open(directory);
        store.write_layer(diff(1), entries("/bin/sh 755 elf sh")).unwrap();
        store.write_layer(diff(2), entries("/bin/ls 755 elf ls")).unwrap();
        let base = name("default", "docker.io/library/busybox:latest", 1);
        store.write_image(chain(1), vec![diff(1)], Some(&base)).unwrap();
        let app = name("default", "ghcr.io/team/app:1.0", 2);
        store.write_image(chain(2), vec![diff(1), diff(2)], Some(&app)).unwrap();
        store
    }

    /// All files of the store, by their paths in it.
    fn files(directory: &Path) -> Vec<String> {
        let mut files = Vec::new();
        for folder in ["layers", "images", "proofs"] {
            for entry in fs::read_dir(directory.join(folder)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let hex_at = name.find(|letter: char| letter.is_ascii_digit()).unwrap_or(0);
                let suffix = name.split_once('.').map_or("", |(_, suffix)| suffix);
                files.push(format!("{folder}/{}.{suffix}", &name[..hex_at + 2]));
            }
        }
        files.sort();
        files
    }

    #[test]
    fn what_is_recorded_is_there_after_a_restart() {
        let scratch = tempfile::tempdir().unwrap();
        let before = two_images(scratch.path()).images();
        let store = open(scratch.path());
        assert_eq!(store.images(), before);
        assert_eq!(store.layers_of(chain(2)), Some(vec![diff(1), diff(2)]));
        assert_eq!(before[1].totals, Totals { files: 2, bytes: 4 });

        let image = store.image(chain(2)).unwrap().unwrap();
        let shell = image.get(&RootfsPath::new("/bin/sh").unwrap()).unwrap();
        assert_eq!((shell.entry.blake3, shell.layer), (Some(blake3_of("sh")), diff(1)));
        assert!(Arc::ptr_eq(&image, &store.image(chain(2)).unwrap().unwrap()), "opened once");
        assert!(store.image(chain(3)).unwrap().is_none());
    }

    #[test]
    fn only_root_can_look_inside() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("baselines");
        two_images(&directory);
        for path in [directory.clone(), directory.join("layers"), directory.join("images")] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o700);
        }
        for file in fs::read_dir(directory.join("layers")).unwrap() {
            let mode = file.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o600);
        }
    }

    #[track_caller]
    fn check_set_aside(damage: impl Fn(&Path)) {
        let scratch = tempfile::tempdir().unwrap();
        let path = two_images(scratch.path()).layer_path(diff(1));
        damage(&path);
        let health = Arc::new(Health::default());
        let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
        assert!(store.image(chain(2)).unwrap().is_none());
        assert_eq!(health.count(Failure::BaselineCorrupt), 1);
        assert!(!store.has_layer(diff(1)).unwrap());
        assert!(store.has_layer(diff(2)).unwrap());
        assert_eq!(
            files(scratch.path()),
            ["images/01.json", "images/02.json", "layers/01.layer.corrupt", "layers/02.layer"]
        );

        store.write_layer(diff(1), entries("/bin/sh 755 elf sh")).unwrap();
        assert!(store.image(chain(2)).unwrap().is_some());
    }

    #[test]
    fn a_corrupt_layer_is_set_aside_and_can_be_recorded_again() {
        check_set_aside(|path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[40] ^= 1;
            fs::write(path, bytes).unwrap();
        });
        check_set_aside(|path| fs::write(path, "").unwrap());
        check_set_aside(|path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        });
    }

    #[test]
    fn a_layer_of_another_version_is_set_aside() {
        check_set_aside(|path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[8] = 99;
            fs::write(path, bytes).unwrap();
        });
    }

    #[test]
    fn a_layer_under_another_layers_name_is_set_aside() {
        check_set_aside(|path| {
            let other = path.with_file_name(format!("{}.layer", "02".repeat(32)));
            fs::copy(other, path).map(drop).unwrap();
        });
    }

    #[test]
    fn a_record_that_cannot_be_read_is_set_aside() {
        let scratch = tempfile::tempdir().unwrap();
        let path = two_images(scratch.path()).image_path(chain(1));
        fs::write(path, "{}").unwrap();
        let health = Arc::new(Health::default());
        let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
        let chains: Vec<ChainId> = store.images().iter().map(|record| record.chain_id).collect();
        assert_eq!(chains, [chain(2)]);
        assert_eq!(health.count(Failure::BaselineCorrupt), 1);
    }

    #[test]
    fn what_a_crash_left_half_written_is_removed() {
        let scratch = tempfile::tempdir().unwrap();
        two_images(scratch.path());
        fs::write(scratch.path().join("layers/03.layer.tmp"), "half").unwrap();
        fs::write(scratch.path().join("images/03.json.tmp"), "half").unwrap();
        open(scratch.path());
        assert_eq!(
            files(scratch.path()),
            ["images/01.json", "images/02.json", "layers/01.layer", "layers/02.layer"]
        );
    }

    /// Unmounts when a test ends, however it ends.
    struct Mount(PathBuf);

    impl Drop for Mount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(&self.0).status();
        }
    }

    #[test]
    fn a_full_disk_is_told_and_leaves_nothing_half_written() {
        let scratch = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
            .arg(scratch.path())
            .status()
            .unwrap();
        assert!(status.success(), "this test must run as root");
        let mount = Mount(scratch.path().into());
        let store = open(&mount.0);
        let many: String = (0..2000).map(|number| format!("/{number} 644 data x\n")).collect();
        let err = store.write_layer(diff(1), entries(&many)).unwrap_err();
        assert!(
            matches!(&err, Error::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull),
            "{err:?}"
        );
        assert!(err.to_string().contains("is the disk full"), "{err}");
        assert_eq!(files(&mount.0), [""; 0]);

        store.write_layer(diff(2), entries("/a 644 data x")).unwrap();
        assert_eq!(files(&mount.0), ["layers/02.layer"]);
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_named() {
        let scratch = tempfile::tempdir().unwrap();
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        let err = Store::open(&file, Arc::new(Health::default())).unwrap_err();
        assert!(err.to_string().contains(&file.display().to_string()), "{err}");
    }

    #[test]
    fn an_image_is_found_as_people_name_it() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let found = |text: &str| store.find(text).map(|record| record.chain_id);
        for text in [
            "busybox",
            "busybox:latest",
            "library/busybox",
            "docker.io/library/busybox",
            "docker.io/library/busybox:latest",
            "0101",
            "sha256:0101",
            &manifest(1).to_string(),
            &chain(1).to_string(),
            &chain(1).hex(),
        ] {
            assert_eq!(found(text), Ok(chain(1)), "{text}");
        }
        assert_eq!(found("ghcr.io/team/app:1.0"), Ok(chain(2)));
        for text in ["busybox:1.36", "team/app:1.0", "ghcr.io/team/app", "01", "", "0303", "\x1b["]
        {
            let err = found(text).unwrap_err();
            assert_eq!(err, FindError::Unknown { text: printable(text.as_bytes()) }, "{text}");
        }
    }

    #[test]
    fn a_name_that_means_two_images_is_answered_with_both() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        store.name_image(chain(2), &name("k8s.io", "docker.io/library/busybox:latest", 2)).unwrap();
        assert_eq!(
            store.find("busybox"),
            Err(FindError::Ambiguous {
                text: "busybox".into(),
                candidates: vec![chain(1).to_string(), chain(2).to_string()],
            })
        );
    }

    /// The names of each recorded chain, as `chain: names`.
    fn names(store: &Store) -> Vec<String> {
        let mut lines: Vec<String> = store
            .images()
            .iter()
            .map(|record| {
                let names: Vec<&str> =
                    record.names.iter().map(|image| image.name.as_str()).collect();
                format!("{}: {}", &record.chain_id.hex()[..2], names.join(" "))
            })
            .collect();
        lines.sort();
        lines
    }

    #[test]
    fn a_tag_that_moves_leaves_its_old_image() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let moved = name("default", "docker.io/library/busybox:latest", 9);
        store.name_image(chain(2), &moved).unwrap();
        let expected = ["01: ", "02: docker.io/library/busybox:latest ghcr.io/team/app:1.0"];
        assert_eq!(names(&store), expected);
        assert_eq!(names(&open(scratch.path())), expected);
        assert_eq!(store.find("busybox").unwrap().manifest_digest, Some(manifest(9)));
    }

    #[test]
    fn h14_thousands_of_names_are_set_in_one_pass_each_with_its_image() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let of = |number: usize| ImageName {
            namespace: "default".into(),
            name: format!("registry.test/{number}:1"),
            manifest_digest: None,
        };
        let list = |shift: usize| -> Vec<(ImageName, ChainId)> {
            let chain_of = |number: usize| chain(u8::try_from((number + shift) % 2 + 1).unwrap());
            (0..5000).map(|number| (of(number), chain_of(number))).collect()
        };
        let begun = std::time::Instant::now();
        store.set_names("socket", &list(0)).unwrap();
        store.set_names("socket", &list(1)).unwrap();
        // Compared each with each, this takes minutes.
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
        let images = store.images();
        assert_eq!(images.iter().map(|image| image.names.len()).sum::<usize>(), 5000);
        let second = images.iter().find(|image| image.chain_id == chain(2)).unwrap();
        assert!(second.names.contains(&of(0)) && !second.names.contains(&of(1)));
    }

    #[test]
    fn a_list_of_one_socket_says_nothing_of_anothers_images() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let busybox = name("default", "docker.io/library/busybox:latest", 1);
        let app = name("default", "ghcr.io/team/app:1.0", 2);
        // After a restart nobody knows whose names these are: the first list decides.
        store.set_names("/one.sock", &[(busybox.clone(), chain(1))]).unwrap();
        assert_eq!(names(&store), ["01: docker.io/library/busybox:latest", "02: "]);
        store.set_names("/two.sock", &[(app, chain(2))]).unwrap();
        let both = ["01: docker.io/library/busybox:latest", "02: ghcr.io/team/app:1.0"];
        assert_eq!(names(&store), both);
        store.set_names("/one.sock", &[(busybox, chain(1))]).unwrap();
        assert_eq!(names(&store), both);
        store.set_names("/one.sock", &[]).unwrap();
        assert_eq!(names(&store), ["01: ", "02: ghcr.io/team/app:1.0"]);
    }

    #[test]
    fn a_reader_changes_nothing_and_says_what_is_not_whole() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        fs::write(scratch.path().join("layers/03.layer.tmp"), "half").unwrap();
        let before = files(scratch.path());
        let read = || Store::open_to_read(scratch.path(), Arc::new(Health::default()));
        let reader = read().unwrap();
        assert_eq!(reader.images(), store.images());
        assert!(reader.image(chain(2)).unwrap().is_some());
        drop(reader);

        let path = store.layer_path(diff(1));
        fs::write(&path, "cut").unwrap();
        let err = read().unwrap().image(chain(2)).unwrap_err();
        assert!(err.to_string().contains(&path.display().to_string()), "{err}");
        assert_eq!(files(scratch.path()), before);
    }

    #[test]
    fn one_process_at_a_time_writes() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("baselines");
        let claim = Store::claim(&directory).unwrap();
        let err = Store::claim(&directory).unwrap_err();
        assert!(matches!(err, Error::InUse { .. }), "{err:?}");
        drop(claim);
        Store::claim(&directory).unwrap();
    }

    #[test]
    fn a_directory_that_was_there_keeps_its_mode() {
        let scratch = tempfile::tempdir().unwrap();
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        let _claim = Store::claim(scratch.path()).unwrap();
        open(scratch.path());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(scratch.path()), 0o1777);
        assert_eq!(mode(&scratch.path().join("layers")), 0o700);
    }

    #[test]
    fn only_what_nobody_names_or_uses_is_forgotten() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let nobody = HashSet::new();
        assert_eq!(store.collect(&nobody, Duration::ZERO).unwrap(), Collected::default());

        store.remove_name("default", "ghcr.io/team/app:1.0").unwrap();
        assert_eq!(
            store.collect(&HashSet::from([chain(2)]), Duration::ZERO).unwrap(),
            Collected::default()
        );
        let image = store.image(chain(2)).unwrap();
        assert_eq!(
            store.collect(&nobody, Duration::ZERO).unwrap(),
            Collected::default(),
            "somebody holds it"
        );
        drop(image);
        let bytes = fs::metadata(store.layer_path(diff(2))).unwrap().len();
        assert_eq!(
            store.collect(&nobody, Duration::ZERO).unwrap(),
            Collected { images: 1, layers: 1, bytes }
        );
        assert_eq!(files(scratch.path()), ["images/01.json", "layers/01.layer"]);
        assert_eq!(names(&store), ["01: docker.io/library/busybox:latest"]);
        assert!(store.image(chain(1)).unwrap().is_some());
    }

    fn proof_of(layer: &LayerBaseline) -> LayerProof {
        LayerProof {
            known_by: KnownBy::Verified,
            blob: Some("sha256:00".into()),
            ..LayerProof::new(layer.checksum(), chain(1))
        }
    }

    #[test]
    fn a_proof_is_of_one_file_and_goes_with_it() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        assert_eq!(store.known_by(chain(2)).0, KnownBy::Snapshot);
        for id in [diff(1), diff(2)] {
            let layer = store.layer(id).unwrap().unwrap();
            store.write_proof(id, proof_of(&layer)).unwrap();
        }
        assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);
        drop(store);
        let store = open(scratch.path());
        assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);

        // The same content again is the same file; other content is not.
        store.write_layer(diff(2), entries("/bin/ls 755 elf ls")).unwrap();
        assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);
        store.write_layer(diff(2), entries("/bin/ls 755 elf other")).unwrap();
        let known = vec![(diff(1), KnownBy::Verified, None), (diff(2), KnownBy::Snapshot, None)];
        assert_eq!(store.known_by(chain(2)), (KnownBy::Snapshot, known));
        assert_eq!(
            files(scratch.path()),
            [
                "images/01.json",
                "images/02.json",
                "layers/01.layer",
                "layers/02.layer",
                "proofs/01.json"
            ]
        );

        store.remove(chain(1)).unwrap();
        store.remove(chain(2)).unwrap();
        assert_eq!(files(scratch.path()), [""; 0]);
    }

    #[test]
    fn a_proof_of_a_file_that_is_not_there_any_more_is_void() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let layer = store.layer(diff(1)).unwrap().unwrap();
        store.write_proof(diff(1), proof_of(&layer)).unwrap();
        // As after a crash between the two files.
        drop((layer, store));
        let other = scratch.path().join(format!("layers/{}.layer", "02".repeat(32)));
        fs::copy(other, scratch.path().join(format!("layers/{}.layer", "01".repeat(32)))).unwrap();
        assert_eq!(open(scratch.path()).proof(diff(1)), None);
    }

    #[test]
    fn a_proof_that_cannot_be_read_is_set_aside() {
        let damages: [fn(Vec<u8>) -> Vec<u8>; 3] = [
            |json| json[..json.len() / 2].to_vec(),
            |_| Vec::new(),
            |json| String::from_utf8(json).unwrap().replace("01", "02").into_bytes(),
        ];
        for damage in damages {
            let scratch = tempfile::tempdir().unwrap();
            let store = two_images(scratch.path());
            let layer = store.layer(diff(1)).unwrap().unwrap();
            store.write_proof(diff(1), proof_of(&layer)).unwrap();
            let path = store.proof_path(diff(1));
            fs::write(&path, damage(fs::read(&path).unwrap())).unwrap();
            let health = Arc::new(Health::default());
            let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
            assert_eq!(health.count(Failure::BaselineCorrupt), 1);
            assert_eq!(store.proof(diff(1)), None);
            assert!(files(scratch.path()).contains(&"proofs/01.json.corrupt".to_owned()));
            assert!(store.image(chain(2)).unwrap().is_some(), "the baseline is none the worse");
        }
    }

    #[test]
    fn what_nobody_needs_is_kept_for_the_retention_period() {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let hour = Duration::from_secs(3600);
        store.remove_name("default", "ghcr.io/team/app:1.0").unwrap();
        let nobody = HashSet::new();
        assert_eq!(store.collect(&nobody, hour).unwrap(), Collected::default());
        // The time runs on while driftd does not.
        drop(store);
        let store = open(scratch.path());
        let unneeded = |store: &Store| {
            let records = store.images();
            records.iter().find(|record| record.chain_id == chain(2)).unwrap().unneeded_since
        };
        let since = unneeded(&store).unwrap();
        store.collect(&HashSet::from([chain(2)]), hour).unwrap();
        assert_eq!(unneeded(&store), None, "a container uses it again");
        store.collect(&nobody, hour).unwrap();
        assert!(unneeded(&store).unwrap() > since);

        store.state().records.get_mut(&chain(2)).unwrap().unneeded_since = Some(since - hour);
        let collected = store.collect(&nobody, hour).unwrap();
        assert!(matches!(collected, Collected { images: 1, layers: 1, .. }), "{collected:?}");
        // A clock that was set back forgets nothing early.
        store.remove_name("default", "docker.io/library/busybox:latest").unwrap();
        store.state().records.get_mut(&chain(1)).unwrap().unneeded_since =
            Some(Timestamp::now() + 3 * hour);
        assert_eq!(store.collect(&nobody, hour).unwrap(), Collected::default());
    }
}
