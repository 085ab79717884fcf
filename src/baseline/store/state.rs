//! The store as a value: its directories, what is open, and what it knows of each
//! file. Opening it loads that from the disk.
//!
//! A thread that waits for the disk does not hold the state's lock, so readers of the
//! state never wait for the disk. Only the recorder's thread writes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::error::Error;
use super::files::{
    checksum_of, files_in, make, make_private, read_listed, remove, remove_unfinished,
};
use super::records::{ImageRecord, RecordJson};
use crate::baseline::layer::{LayerBaseline, parse_layer_id};
use crate::baseline::merge::ImageBaseline;
use crate::baseline::proof::{self, LayerProof};
use crate::health::{Failure, Health};
use crate::model::{ChainId, LayerId};

/// The right to write to a store.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "the lock is held while the file is open")] File);

/// All baselines of this node.
#[derive(Debug)]
pub struct Store {
    pub(super) layers: PathBuf,
    images: PathBuf,
    proofs: PathBuf,
    health: Arc<Health>,
    read_only: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) records: BTreeMap<ChainId, ImageRecord>,
    /// Each proof is of the layer's file as it is now.
    pub(super) proofs: HashMap<LayerId, LayerProof>,
    pub(super) open_layers: HashMap<LayerId, Weak<LayerBaseline>>,
    pub(super) open_images: HashMap<ChainId, Weak<ImageBaseline>>,
    /// Layers whose files were whole when they were last opened.
    pub(super) sound: HashSet<LayerId>,
    /// The socket of containerd that listed a name, by namespace and name. Not kept on
    /// disk: after a restart, the first list that lacks a name removes it, and the next
    /// list that has it adds it again.
    pub(super) listed_by: HashMap<(String, String), String>,
}

pub(super) const LAYER_SUFFIX: &str = ".layer";
const IMAGE_SUFFIX: &str = ".json";
const PROOF_SUFFIX: &str = ".json";
const CORRUPT_SUFFIX: &str = ".corrupt";

impl Store {
    /// Opens the store in `directory`; creates it if it does not exist.
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

    /// Opens a store that another process may write to at the same time. This changes
    /// nothing on the disk and waits for nothing: files appear whole and never change.
    /// A file that is not whole is an error.
    pub fn open_to_read(directory: &Path, health: Arc<Health>) -> Result<Store, Error> {
        let [layers, images, proofs] =
            ["layers", "images", "proofs"].map(|name| directory.join(name));
        let state = Mutex::default();
        Store { layers, images, proofs, health, read_only: true, state }.loaded()
    }

    /// Claims the store in `directory` for one process that writes to it, until the
    /// claim is dropped or the process ends. Call it before [`Store::open`], which
    /// removes what a process that died has left half written. A process that only
    /// reads needs no claim.
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

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn layer_path(&self, id: LayerId) -> PathBuf {
        self.layers.join(stem_of(id) + LAYER_SUFFIX)
    }

    pub(super) fn proof_path(&self, id: LayerId) -> PathBuf {
        self.proofs.join(stem_of(id) + PROOF_SUFFIX)
    }

    pub(super) fn image_path(&self, chain_id: ChainId) -> PathBuf {
        self.images.join(chain_id.hex() + IMAGE_SUFFIX)
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
        // A store that is only read may come from a version without proofs.
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
                // A crash came after the layer was recorded anew or removed.
                Ok(_) if self.read_only => (),
                Ok(_) => remove(&path)?,
                Err(why) => self.set_aside(&path, &why)?,
            }
        }
        Ok(proofs)
    }

    /// Renames a file that is not valid, so that it is kept but not read again.
    pub(super) fn set_aside(&self, path: &Path, why: &str) -> Result<(), Error> {
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

fn stem_of(id: LayerId) -> String {
    match id {
        LayerId::Diff(diff_id) => diff_id.hex(),
        LayerId::Chain(chain_id) => format!("chain-{}", chain_id.hex()),
    }
}

pub(super) fn layer_of_stem(stem: &str) -> Option<LayerId> {
    match stem.strip_prefix("chain-") {
        Some(hex) => parse_layer_id(&format!("chain-sha256:{hex}")),
        None => parse_layer_id(&format!("sha256:{stem}")),
    }
}
