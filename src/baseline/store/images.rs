//! Images in the store: stacks of recorded layers, and their records on disk.
//!
//! An image has no file of content: its baseline is assembled from its layers.

use std::io::Write as _;
use std::sync::{Arc, Weak};

use jiff::Timestamp;

use super::error::Error;
use super::files::write_whole;
use super::records::{ImageName, ImageRecord, RecordJson, give_name};
use super::state::Store;
use crate::baseline::merge::ImageBaseline;
use crate::baseline::types::KnownBy;
use crate::model::{ChainId, LayerId};

impl Store {
    /// Every recorded image, in the order of names.
    pub fn images(&self) -> Vec<ImageRecord> {
        let mut records: Vec<ImageRecord> = self.state().records.values().cloned().collect();
        records.sort_by(|a, b| (&a.names, a.chain_id).cmp(&(&b.names, b.chain_id)));
        records
    }

    /// The layers of a chain that is recorded, bottom first.
    pub fn layers_of(&self, chain_id: ChainId) -> Option<Vec<LayerId>> {
        self.state().records.get(&chain_id).map(|record| record.layers.clone())
    }

    /// The baseline of a chain; `None` if it is not recorded, or a layer's file is
    /// missing or not valid.
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

    /// These layers as one tree, without an image's record; `None` if a layer is not
    /// recorded.
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

    /// Records that these layers, bottom first, are an image. If another image had
    /// `name`, it loses it. `None` if a layer is not recorded.
    pub fn write_image(
        &self,
        chain_id: ChainId,
        layers: Vec<LayerId>,
        name: Option<&ImageName>,
    ) -> Result<Option<Arc<ImageBaseline>>, Error> {
        let Some(image) = self.assemble(chain_id, &layers)? else { return Ok(None) };
        let before = self.state().records.get(&chain_id).cloned();
        let (mut names, mut manifest_digest) = match before {
            Some(record) => (record.names, record.manifest_digest),
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

    /// How far an image's baseline is proved: as far as its least proved layer. Then the
    /// same for each of its layers, bottom first, with the reason why it is not verified.
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

    pub(super) fn write_record(&self, record: &ImageRecord) -> Result<(), Error> {
        let path = self.image_path(record.chain_id);
        let json = serde_json::to_vec_pretty(&RecordJson::from(record))
            .expect("a record has only text for keys");
        write_whole(&path, |file| file.write_all(&json))
            .map_err(|source| Error::Write { path, source })
    }
}
