//! Reads a layer's blob and checks its digests.
//!
//! A blob proves a layer only if its own digest and that of its content are right.

use std::collections::HashSet;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use super::task::Unproved;
use crate::baseline::causes::with_causes;
use crate::baseline::layer::LayerEntry;
use crate::baseline::merge::ImageBaseline;
use crate::baseline::proof::may_be_implied;
use crate::baseline::stream::{self, Limits};
use crate::baseline::types::{Blobs, LayerDifference, Progress};
use crate::config;
use crate::model::{Blob, Layer, LayerId, ManifestDigest, RootfsPath, printable};

/// The reason for a layer whose blob was never found.
pub(crate) const NO_BLOB: &str = "containerd's content store did not have its blob when it was looked for (discard_unpacked_layers removes blobs, and foreign layers have none)";

/// The content of a layer's blob, if the digests are right.
pub(crate) fn unpack(
    blobs: &dyn Blobs,
    layer: &Layer,
    below: Option<&ImageBaseline>,
    limits: &Limits,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Unpacked, Unproved> {
    let blob = layer.blob.as_ref().ok_or_else(|| Unproved::Unavailable(NO_BLOB.into()))?;
    let LayerId::Diff(diff_id) = layer.id else {
        let reason = "its diff ID is not known any more: the image's config is gone";
        return Err(Unproved::Unavailable(reason.into()));
    };
    let media_type = printable(blob.media_type.as_bytes());
    if blob.media_type.ends_with("+encrypted") {
        return Err(Unproved::Unavailable(format!("its blob is encrypted ({media_type})")));
    }
    let open = || {
        let opened = blobs.open(blob).map_err(|reason| {
            Unproved::Unavailable(if is_foreign(&blob.media_type) {
                format!(
                    "it is a foreign layer ({media_type}), whose blob is kept elsewhere: {reason}"
                )
            } else {
                reason
            })
        })?;
        // A blob that is longer than the manifest states has another digest anyway.
        Ok(Stoppable { inner: opened, stop }.take(blob.size.saturating_add(1)))
    };
    let read = stream::read(open()?, limits, progress, stop);
    if stop.load(Ordering::Relaxed) {
        return Err(Unproved::Stopped);
    }
    let digest = printable(blob.digest.as_bytes());
    let stream = match read {
        Ok(stream) => stream,
        Err(err) => {
            // Perhaps it cannot be read because it is not the blob that was pulled.
            let actual = sha256_of(open()?).map_err(|err| {
                Unproved::Unavailable(format!("its blob {digest} cannot be read: {err}"))
            });
            if stop.load(Ordering::Relaxed) {
                return Err(Unproved::Stopped);
            }
            let actual = actual?;
            check_digest(blob, actual)?;
            return Err(Unproved::Unreadable(format!("its blob {digest}: {}", with_causes(&err))));
        }
    };
    check_digest(blob, stream.blob_sha256)?;
    if stream.diff_id != diff_id {
        return Err(Unproved::Wrong(format!(
            "its blob {digest} unpacks to {}, not to the diff ID that the image's config names",
            stream.diff_id
        )));
    }
    let unreadable = |err: stream::Error| {
        Unproved::Unreadable(format!("its blob {digest}: {}", with_causes(&err)))
    };
    let implied = stream.implied().map_err(unreadable)?;
    Ok(Unpacked { entries: stream.settle(below).map_err(unreadable)?, implied })
}

/// What a blob holds.
pub(crate) struct Unpacked {
    /// In no order.
    pub(crate) entries: Vec<LayerEntry>,
    /// Directories that the archive does not name.
    pub(crate) implied: HashSet<RootfsPath>,
}

/// A reader that ends with an error once `stop` is set, however slow its source is.
struct Stoppable<'a> {
    inner: Box<dyn Read + Send>,
    stop: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("stopped"));
        }
        self.inner.read(buffer)
    }
}

fn check_digest(blob: &Blob, actual: [u8; 32]) -> Result<(), Unproved> {
    let expected = &blob.digest;
    let digest = printable(expected.as_bytes());
    if !expected.starts_with("sha256:") {
        let reason = format!("the digest of its blob is no SHA-256 ({digest})");
        return Err(Unproved::Unavailable(reason));
    }
    let actual = ManifestDigest(actual).to_string();
    if actual == *expected {
        return Ok(());
    }
    Err(Unproved::Wrong(format!(
        "its blob {digest} in the content store of {} (namespace {}) has the digest {actual}: it is damaged, or it was changed",
        printable(blob.endpoint.as_bytes()),
        printable(blob.namespace.as_bytes()),
    )))
}

fn sha256_of(mut blob: impl Read) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match blob.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(length) => hasher.update(&buffer[..length]),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => (),
            Err(err) => return Err(err),
        }
    }
}

/// Layers that registries did not pass on (OCI calls them non-distributable).
fn is_foreign(media_type: &str) -> bool {
    media_type.contains(".nondistributable.") || media_type.contains(".foreign.")
}

/// Leaves out the differences that come from the layers below, if the layer was recorded
/// in another stack.
pub(crate) fn without_implied(
    (mut differences, mut total): (Vec<LayerDifference>, u64),
    same_stack: bool,
) -> (Vec<LayerDifference>, u64) {
    if !same_stack {
        let all = differences.len();
        differences.retain(|difference| !may_be_implied(difference));
        total = total.saturating_sub((all - differences.len()) as u64);
    }
    (differences, total)
}

pub(crate) fn limits(settings: &config::Baseline) -> Limits {
    Limits { bytes: settings.max_layer_bytes, entries: settings.max_layer_entries }
}
