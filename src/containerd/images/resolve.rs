//! Resolves names: from a name to its target, and from there to the manifest and the config of
//! this node's platform.
//!
//! Reads documents from containerd's content store and uses only those that have their digest.

use std::sync::Arc;

use containerd_client::services::v1::{GetImageRequest, ReadContentRequest};
use sha2::{Digest as _, Sha256};
use tonic::Status;

use super::error::ImageError;
use super::state::{Facts, Images};
use crate::containerd::connection::{Namespace, found};
use crate::containerd::manifests::{self, Descriptor, Document, brief};
use crate::containerd::probes;
use crate::model::{ChainId, ManifestDigest};

const INDEX_DEPTH: u32 = 3;

impl Images {
    /// Learns the layers of an image from which a container was made. That the image is gone
    /// or broken is no error here.
    pub(crate) async fn learn_image(
        &self,
        namespace: &Namespace,
        name: &str,
    ) -> Result<(), Status> {
        self.find(namespace, name).await.map(drop)
    }

    /// The facts of an image, if its layers are those of `chain_id`: the name may have moved to
    /// another image since the container was made.
    pub(crate) async fn facts_of(
        &self,
        namespace: &Namespace,
        name: &str,
        chain_id: ChainId,
    ) -> Result<Option<Arc<Facts>>, Status> {
        let facts = self.find(namespace, name).await?;
        Ok(facts.filter(|facts| facts.chain_id() == Some(chain_id)))
    }

    /// The facts of an image. `None` if it is gone or broken.
    async fn find(&self, namespace: &Namespace, name: &str) -> Result<Option<Arc<Facts>>, Status> {
        if name.is_empty() {
            return Ok(None);
        }
        let facts = match target(namespace, name).await {
            Ok(target) => self.facts(namespace, &target).await,
            Err(err) => Err(err),
        };
        match facts {
            Ok(facts) => Ok(Some(facts)),
            Err(ImageError::Interrupted(status)) => Err(status),
            Err(
                ImageError::Unknown
                | ImageError::NoImage
                | ImageError::NotUnpacked { .. }
                | ImageError::Bad { .. }
                | ImageError::NotRecorded { .. },
            ) => Ok(None),
        }
    }

    /// The facts of `target`; read once per target.
    pub(super) async fn facts(
        &self,
        namespace: &Namespace,
        target: &Descriptor,
    ) -> Result<Arc<Facts>, ImageError> {
        if let Some(facts) = self.known_facts(&namespace.name, &target.digest) {
            return Ok(facts);
        }
        let facts = Arc::new(read_facts(namespace, target).await?);
        self.learn_facts(&namespace.name, target, &facts);
        Ok(facts)
    }
}

pub(super) async fn target(namespace: &Namespace, name: &str) -> Result<Descriptor, ImageError> {
    let answer = namespace.images().get(GetImageRequest { name: name.into() }).await;
    found(answer)
        .map_err(|status| ImageError::of_call(status, ""))?
        .and_then(|response| response.into_inner().image)
        .and_then(|image| image.target)
        .map(Descriptor::of)
        .ok_or(ImageError::Unknown)
}

async fn read_facts(namespace: &Namespace, target: &Descriptor) -> Result<Facts, ImageError> {
    let (manifest, config, layers) = find_manifest(namespace, target).await?;
    let bad = |digest: &str, reason: String| ImageError::Bad { digest: brief(digest), reason };
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
) -> Result<(String, Descriptor, Vec<Descriptor>), ImageError> {
    // The best candidate is the last.
    let mut candidates = vec![(target.clone(), 0)];
    let mut first_missing = None;
    while let Some((candidate, depth)) = candidates.pop() {
        let Some(bytes) = read(namespace, &candidate).await? else {
            // An index names several platforms. Only the one that was pulled is there.
            first_missing.get_or_insert(candidate.digest);
            continue;
        };
        let bad = |reason: String| ImageError::Bad { digest: brief(&candidate.digest), reason };
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
                return Err(ImageError::NoImage);
            }
            Document::Index(entries) => {
                let entries = manifests::candidates(entries, manifests::host());
                candidates.extend(entries.into_iter().rev().map(|entry| (entry, depth + 1)));
            }
        }
    }
    Err(match first_missing {
        Some(digest) => ImageError::Bad { digest: brief(&digest), reason: missing("manifest") },
        None => {
            let (os, architecture) = manifests::host();
            ImageError::Bad {
                digest: brief(&target.digest),
                reason: format!("its index has no image for {os}/{architecture}"),
            }
        }
    })
}

/// A blob, checked against its digest; `None` if it is not there.
async fn read(namespace: &Namespace, blob: &Descriptor) -> Result<Option<Vec<u8>>, ImageError> {
    let bad = |reason: String| ImageError::Bad { digest: brief(&blob.digest), reason };
    let too_large = || bad(format!("it is larger than {} MiB", manifests::DOCUMENT_LIMIT >> 20));
    if blob.size > manifests::DOCUMENT_LIMIT {
        return Err(too_large());
    }
    let failed = |status| ImageError::of_call(status, &brief(&blob.digest));
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
            // The server streams, so a missing blob is reported here.
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
