//! A layer's archive, read into entries as it streams by. It proves what was recorded from
//! the layer's directory, and is the only source where no directory is kept.
//!
//! ```text
//!                       ┌─ blob ────> SHA-256: the digest that the manifest names
//!  blob ── decompress ──┤
//!                       ├─ content ─> SHA-256: the diff ID
//!                       └─ content ─> tar ── unpack: the tree that containerd makes of it
//! ```
//!
//! Each arrow is a bounded channel to a thread of its own; the buffers are used again.
//! Nothing is extracted, so no name and no link can reach a file.
//!
//! A blob is read to its very end, also after the archive's own end, because the digests
//! are over all of it. A blob with a fault is an error, and nothing of it is kept.

mod chunks;
mod decompress;
mod error;
mod looks;

use std::collections::HashSet;
use std::io::{BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::bounded;

pub use super::tar::MAX_EXTENSION;
pub use super::unpack::MAX_NAMES;
pub use decompress::MAX_WINDOW;
pub use error::{Error, Limits};

use super::layer::LayerEntry;
use super::merge::ImageBaseline;
use super::tar::{Reader, flag};
use super::types::Progress;
use super::unpack::{Content, Tree};
use crate::model::{Blake3Hash, DiffId, Format, RootfsPath};
use chunks::{Chunks, DEPTH, Pool, digest};
use decompress::{Out, Source, StreamEnd, decompress};
use error::refused;

/// The content of a layer's blob.
#[derive(Debug)]
pub struct Stream {
    pub blob_sha256: [u8; 32],
    pub blob_bytes: u64,
    pub diff_id: DiffId,
    /// The size of the uncompressed archive.
    pub bytes: u64,
    tree: Tree,
    entries: u64,
}

impl Stream {
    /// The directories that the archive does not name, but in which it has entries.
    pub fn implied(&self) -> Result<HashSet<RootfsPath>, Error> {
        self.tree.implied().map_err(|refusal| refused(refusal, self.entries))
    }

    /// The layer's entries in no order, made for the layers that this one lies on.
    ///
    /// An archive need not name every directory; containerd gives those it makes
    /// the owner and mode that the layers below have for them, or root's and 0755.
    /// A hard link may lead to a file of a layer below.
    pub fn settle(self, below: Option<&ImageBaseline>) -> Result<Vec<LayerEntry>, Error> {
        let entries = self.entries;
        self.tree.settle(below).map_err(|refusal| refused(refusal, entries))
    }
}

/// Reads a layer's blob to its end: gzip of any number of members, zstd of any
/// number of frames, or a plain archive. Their first bytes decide, as in containerd.
///
/// The calling thread and up to three more work until this returns; `stop` ends it
/// early.
pub fn read(
    blob: impl Read + Send,
    limits: &Limits,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Stream, Error> {
    let (to_blob_digest, blob_chunks) = bounded(DEPTH);
    let (to_diff_id, content_chunks) = bounded(DEPTH);
    let (to_archive, archive_chunks) = bounded(DEPTH);
    let pool = Pool::new();
    thread::scope(|scope| {
        let blob_digest = scope.spawn(|| digest(&blob_chunks, &pool));
        let diff_id = scope.spawn(|| digest(&content_chunks, &pool));
        let source = Source {
            blob,
            digest: to_blob_digest,
            pool: &pool,
            limit: limits.bytes,
            stop,
            current: None,
            at: 0,
            bytes: 0,
            failure: None,
        };
        let out = Out { diff_id: to_diff_id, archive: to_archive, bytes: 0, limit: limits.bytes };
        let decompress = scope.spawn(|| decompress(source, out));

        let mut chunks =
            Chunks { chunks: archive_chunks, pool: &pool, current: None, at: 0, ended: false };
        let unpacked = unpack(&mut chunks, limits, progress, stop);
        let cut_short = chunks.is_cut_short();
        if unpacked.is_ok() {
            chunks.drain();
        }
        // A thread that waits to send a chunk finds the channel closed, and ends.
        drop(chunks);
        let decompressed = joined(decompress);
        let blob_sha256 = joined(blob_digest);
        let diff_id = DiffId(joined(diff_id));
        let (tree, done) = match (unpacked, decompressed) {
            (_, Err(StreamEnd::Failed(error))) if cut_short || matches!(error, Error::Stopped) => {
                return Err(error);
            }
            (Err(error), _) | (Ok(_), Err(StreamEnd::Failed(error))) => return Err(error),
            (Ok(_), Err(StreamEnd::Abandoned)) => return Err(Error::Stopped),
            (Ok(tree), Ok(done)) => (tree, done),
        };
        Ok(Stream {
            // A plain archive is its own content.
            blob_sha256: if done.plain { diff_id.0 } else { blob_sha256 },
            blob_bytes: done.blob_bytes,
            diff_id,
            bytes: done.bytes,
            tree,
            entries: limits.entries,
        })
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn unpack(
    chunks: &mut Chunks<'_>,
    limits: &Limits,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Tree, Error> {
    let mut tree = Tree::new(limits.entries);
    let mut reader = Reader::new(chunks);
    let mut expanded: u64 = 0;
    while let Some(header) = reader.next()? {
        let content = match header.flag {
            flag::REGULAR | flag::GNU_SPARSE => {
                if reader.is_sparse() {
                    expanded = expanded.saturating_add(header.size);
                    if expanded > limits.bytes {
                        return Err(Error::Bytes(limits.bytes));
                    }
                }
                Some(hash(&mut reader, header.size, stop)?)
            }
            _ => None,
        };
        if let (Some(progress), Some(content)) = (progress, content) {
            progress.files_done.fetch_add(1, Ordering::Relaxed);
            progress.bytes_done.fetch_add(content.size, Ordering::Relaxed);
        }
        tree.apply(header, content).map_err(|refusal| refused(refusal, limits.entries))?;
    }
    Ok(tree)
}

fn hash<R: BufRead>(
    reader: &mut Reader<R>,
    size: u64,
    stop: &AtomicBool,
) -> Result<Content, Error> {
    let mut hasher = blake3::Hasher::new();
    let mut head = [0; Format::HEAD];
    let mut known = 0;
    reader.content(|bytes| {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let more = bytes.len().min(head.len() - known);
        head[known..known + more].copy_from_slice(&bytes[..more]);
        known += more;
        hasher.update(bytes);
        Ok(())
    })?;
    let blake3 = Blake3Hash(*hasher.finalize().as_bytes());
    Ok(Content { blake3, format: Format::sniff(&head[..known]), size })
}

#[cfg(test)]
mod tests;
