//! An image's baseline without its files, as JSON, as text and as a row of a table.
//!
//! `ls`, `show`, `record`, `verify` and `export` use it.

use std::fmt::Write as _;

use anyhow::Context as _;
use indicatif::HumanCount;
use jiff::Timestamp;
use serde::Serialize;

use super::source::Source;
use crate::api::{convert, proto};
use crate::cli::output::{Field, Listed, Style, age, safe, size, time};

#[derive(Debug, Serialize)]
pub(super) struct BaselineJson {
    pub(super) schema: &'static str,
    pub(super) chain_id: String,
    pub(super) names: Vec<String>,
    pub(super) manifest_digest: Option<String>,
    /// Bottom first.
    pub(super) layers: Vec<String>,
    pub(super) recorded_at: Timestamp,
    pub(super) files: u64,
    pub(super) bytes: u64,
    pub(super) state: String,
    /// Null if the baseline is not recorded.
    pub(super) known_by: Option<String>,
    /// When the last layer was verified; null unless all are.
    pub(super) verified_at: Option<Timestamp>,
    /// How the baseline of each layer is known, bottom first.
    pub(super) proofs: Vec<ProofJson>,
}

#[derive(Debug, Serialize)]
pub(super) struct ProofJson {
    pub(super) layer: String,
    pub(super) known_by: String,
    /// Why the layer is not verified, if that was tried.
    pub(super) reason: Option<String>,
    pub(super) verified_at: Option<Timestamp>,
}

impl ProofJson {
    pub(super) fn is_verified(&self) -> bool {
        self.known_by == "verified"
    }
}

impl BaselineJson {
    /// A name for people.
    pub(super) fn name(&self) -> &str {
        self.names.first().unwrap_or(&self.chain_id)
    }
}

pub(super) fn baseline_json(baseline: proto::Baseline) -> anyhow::Result<BaselineJson> {
    let proofs = baseline.layers.iter().zip(baseline.proofs).map(|(layer, proof)| {
        Ok(ProofJson {
            layer: layer.clone(),
            known_by: proof.known_by,
            reason: (!proof.reason.is_empty()).then_some(proof.reason),
            verified_at: convert::optional_time_from_proto(
                "proofs.verified_at",
                proof.verified_at,
            )?,
        })
    });
    Ok(BaselineJson {
        schema: "driftd.baseline/v1",
        proofs: proofs.collect::<anyhow::Result<_>>()?,
        chain_id: baseline.chain_id,
        names: baseline.names,
        manifest_digest: (!baseline.manifest_digest.is_empty()).then_some(baseline.manifest_digest),
        layers: baseline.layers,
        recorded_at: convert::time_from_proto("recorded_at", baseline.recorded_at)?,
        files: baseline.files,
        bytes: baseline.bytes,
        state: baseline.state,
        known_by: (!baseline.known_by.is_empty()).then_some(baseline.known_by),
        verified_at: convert::optional_time_from_proto("verified_at", baseline.verified_at)?,
    })
}

/// The one baseline that `image` names.
pub(super) fn named(source: &Source, image: &str) -> anyhow::Result<BaselineJson> {
    anyhow::ensure!(!image.is_empty(), "name an image (see: driftd baseline ls)");
    let found = source.list(image)?.into_iter().next();
    baseline_json(found.context("driftd returned no baseline")?)
}

pub(super) fn text(baseline: &BaselineJson) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        writeln!(text, "{label:<10} {value}").expect("writing to a String cannot fail");
    };
    for name in &baseline.names {
        line("Image", &safe(name));
    }
    if let Some(digest) = &baseline.manifest_digest {
        line("Manifest", &safe(digest));
    }
    line("Chain ID", &safe(&baseline.chain_id));
    line("State", &safe(&baseline.state));
    let known_by = match (baseline.known_by.as_deref(), baseline.verified_at) {
        (Some("snapshot"), _) => {
            "snapshot: read from what was unpacked, not (wholly) compared with the image's blobs"
                .to_owned()
        }
        (Some("verified"), Some(at)) => {
            format!("verified: compared with the image's blobs at {}", time(at))
        }
        (Some("verified"), None) => "verified: compared with the image's blobs".to_owned(),
        (known_by, _) => safe(known_by.unwrap_or("-")),
    };
    line("Known by", &known_by);
    line("Recorded", &time(baseline.recorded_at));
    line("Files", &format!("{}, {}", HumanCount(baseline.files), size(baseline.bytes)));
    for (index, proof) in baseline.proofs.iter().enumerate() {
        let label = if index == 0 { "Layers" } else { "" };
        line(label, &format!("{}  {}", safe(&proof.layer), safe(&proof.known_by)));
        if let Some(reason) = &proof.reason {
            line("", &format!("  {}", safe(reason)));
        }
    }
    text
}

impl Listed for BaselineJson {
    type Json<'a> = &'a BaselineJson;

    fn json(&self) -> &BaselineJson {
        self
    }

    fn name(&self) -> String {
        safe(&self.chain_id)
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header =
            vec!["IMAGE", "FILES", "SIZE", "LAYERS", "STATE", "KNOWN BY", "RECORDED", "CHAIN ID"];
        if wide {
            header.push("MANIFEST DIGEST");
        }
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            safe(self.names.first().map_or("-", String::as_str)).into(),
            self.files.to_string().into(),
            size(self.bytes).into(),
            self.layers.len().to_string().into(),
            safe(&self.state).into(),
            safe(self.known_by.as_deref().unwrap_or("-")).into(),
            age(style.now, self.recorded_at).into(),
            style.id(&self.chain_id).into(),
        ];
        if style.wide {
            row.push(style.id(self.manifest_digest.as_deref().unwrap_or("-")).into());
        }
        row
    }
}
