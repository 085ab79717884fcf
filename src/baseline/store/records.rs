//! What the store knows of an image besides its files: its names, its layers, and
//! since when nothing needs it. And how that is written in `images/*.json`.
//!
//! Values and their JSON only. `images` keeps them, `names` and `collect` change them.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::baseline::layer::parse_layer_id;
use crate::baseline::merge::Totals;
use crate::model::{ChainId, LayerId, ManifestDigest, printable};

/// What an image is called in one of containerd's namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ImageName {
    pub namespace: String,
    pub name: String,
    pub manifest_digest: Option<ManifestDigest>,
}

impl ImageName {
    pub(super) fn is(&self, namespace: &str, name: &str) -> bool {
        self.namespace == namespace && self.name == name
    }
}

pub(super) fn give_name(names: &mut Vec<ImageName>, name: &ImageName) {
    names.retain(|other| !other.is(&name.namespace, &name.name));
    names.push(name.clone());
    names.sort();
}

/// A stack of layers that is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageRecord {
    pub chain_id: ChainId,
    /// Empty when the image was removed, or when only containers used its layers.
    pub names: Vec<ImageName>,
    /// The digest of the manifest that it was last listed with.
    pub manifest_digest: Option<ManifestDigest>,
    /// Bottom first.
    pub layers: Vec<LayerId>,
    pub recorded_at: Timestamp,
    pub totals: Totals,
    /// When the store first found that no image and no container needs it.
    pub unneeded_since: Option<Timestamp>,
}

// ---- images/*.json

const SCHEMA: &str = "driftd.image/v1";

#[derive(Serialize, Deserialize)]
pub(super) struct RecordJson {
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
