//! Layers in the store, and their proofs: opened, checked, replaced.
//!
//! A layer's file is mapped and checked when it is opened, and shared while it is in
//! use. A proof is valid for one file, which it names by its checksum.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Arc, Weak};

use super::error::Error;
use super::files::{checksum_of, remove, scratch_beside, write_whole};
use super::state::Store;
use crate::baseline::layer::{self, LayerBaseline, LayerEntry, OpenError, WriteError};
use crate::baseline::proof::{self, LayerProof};
use crate::model::LayerId;

impl Store {
    /// One layer; `None` if it is not recorded. A file that is not valid is set aside,
    /// so that the layer can be recorded again.
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

    /// Writes a layer durably, in place of what was recorded for it. A thread that holds
    /// the old baseline keeps it; a proof of the old one is void.
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

    /// A layer's file was replaced: forgets what was known of the old one.
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

    /// How far a layer's file is proved.
    pub fn proof(&self, id: LayerId) -> Option<LayerProof> {
        self.state().proofs.get(&id).cloned()
    }

    /// Keeps how far a layer's file is proved. If the disk refuses it, it is kept in
    /// memory until the process ends.
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

    /// Whether a layer is recorded so that it can be used at that place in a stack. Above
    /// other layers, the record must also have what the layer hides of them.
    pub fn has_layer_for(&self, id: LayerId, bottom: bool) -> Result<bool, Error> {
        let hides = self.state().proofs.get(&id).is_some_and(|proof| proof.hides);
        Ok((bottom || hides) && self.has_layer(id)?)
    }

    /// Records a layer whose entries come one by one, in the order of paths: `fill`
    /// passes each to the function that it receives. If it fails, nothing is recorded.
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
                .map_err(RecordError::Fill)?;
            writer.finish()?;
            Ok(value)
        });
        let value = written.map_err(|err| match err {
            RecordError::Write(err) => fail(err).into(),
            RecordError::Fill(err) => err,
        })?;
        self.replaced(id)?;
        Ok(value)
    }
}

/// Why a layer was not recorded: its source failed, or the store.
enum RecordError<E> {
    Write(WriteError),
    Fill(E),
}

impl<E> From<WriteError> for RecordError<E> {
    fn from(err: WriteError) -> RecordError<E> {
        RecordError::Write(err)
    }
}

impl<E> From<io::Error> for RecordError<E> {
    fn from(err: io::Error) -> RecordError<E> {
        RecordError::Write(err.into())
    }
}
