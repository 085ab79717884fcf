//! Removes what is needed no more: images without a name and a container, and the
//! layers of no image.
//!
//! Nothing that is open is removed. What a thread holds stays mapped for it anyway.

use std::collections::HashSet;
use std::fs;
use std::time::Duration;

use jiff::Timestamp;

use super::error::Error;
use super::files::{files_in, remove};
use super::state::{LAYER_SUFFIX, State, Store, layer_of_stem};
use crate::model::{ChainId, LayerId};

/// What [`Store::collect`] has removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub images: usize,
    pub layers: usize,
    /// The size of the layers' files.
    pub bytes: u64,
}

impl Store {
    /// Removes images that have had no name and no container for as long as `retention`,
    /// and then layers of no image.
    pub fn collect(
        &self,
        in_use: &HashSet<ChainId>,
        retention: Duration,
    ) -> Result<Collected, Error> {
        let now = Timestamp::now();
        let mut state = self.state();
        state.open_images.retain(|_, image| image.strong_count() > 0);
        let State { records, open_images, .. } = &mut *state;
        let (mut changed, mut expired) = (Vec::new(), Vec::new());
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
            // If the clock was set back, the image waits longer.
            let age = since.and_then(|since| Duration::try_from(now.duration_since(since)).ok());
            if age.is_some_and(|age| age >= retention) {
                expired.push(chain_id);
            }
        }
        drop(state);
        changed.iter().try_for_each(|record| self.write_record(record))?;
        let mut collected = Collected { images: expired.len(), ..Collected::default() };
        for chain_id in expired {
            remove(&self.image_path(chain_id))?;
            self.state().records.remove(&chain_id);
        }
        self.remove_unneeded_layers(&mut collected)?;
        Ok(collected)
    }

    /// Removes one image, and then the layers of no image. A thread that holds its
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
            // A file with another kind of name is not the store's to remove.
            let Some(id) = layer_of_stem(&stem) else { continue };
            if needed.contains(&id) {
                continue;
            }
            {
                // Forget it before the file is removed, so that no thread takes it for
                // recorded. A thread that has opened it since then keeps it.
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
}
