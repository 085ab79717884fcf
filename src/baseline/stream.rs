//! A layer's archive, read into entries as it streams by: the second witness of
//! what a layer holds, and the only one where no directory is.
//!
//! ```text
//!                       ┌─ blob ────> SHA-256: the digest that the manifest says
//!  blob ── decompress ──┤
//!                       ├─ content ─> SHA-256: the diff ID
//!                       └─ content ─> tar ── unpack: what containerd makes of it
//! ```
//!
//! Each arrow is a bounded channel to a thread of its own; the buffers go round.
//! Nothing is extracted, so nothing that a name or a link says can reach a file.
//!
//! A blob is read to its very end, whatever comes after the archive's own end: the
//! digests are over all of it. What is wrong with a blob is an error, and nothing
//! of it is kept: a stream tells everything or fails.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded};
use sha2::{Digest as _, Sha256};

use super::layer::LayerEntry;
use super::merge::ImageBaseline;
use super::tar::{self, Fault, Reader, flag};
use super::unpack::{Content, Refusal, Tree};
use super::Progress;
use crate::model::{Blake3Hash, DiffId, Format};

pub use super::tar::MAX_EXTENSION;
pub use super::unpack::MAX_NAMES;

/// The largest window a zstd frame may ask for, as a power of two: what `zstd -d`
/// accepts without being told to. It bounds the memory of decompression; frames
/// that compressors make without being asked take 8 MiB or less.
pub const MAX_WINDOW: u32 = 27;

/// How large a layer may be. A compressed blob can hold a thousand times its size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of the uncompressed archive, and of what the holes of sparse files expand to.
    pub bytes: u64,
    /// Entries, and the directories that only their paths name.
    pub entries: u64,
}

/// Why a blob is no layer, or none that can be known.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the blob at byte {at}")]
    Read { at: u64, source: io::Error },
    #[error("the blob is truncated at byte {at} (pull the image again)")]
    Truncated { at: u64 },
    #[error("the blob is not a layer's archive: it looks like {0}")]
    NotALayer(&'static str),
    #[error("the blob is not {format} all through: {reason}, before byte {at}")]
    Corrupt { format: &'static str, at: u64, reason: String },
    #[error("the archive in the blob is truncated at byte {at}, in the middle of an entry")]
    ArchiveTruncated { at: u64 },
    #[error("containerd would not unpack the archive: the header at its byte {at}: {why}")]
    Header { at: u64, why: &'static str },
    #[error(
        "the extended header at byte {at} of the archive is larger than {MAX_EXTENSION} bytes, the limit"
    )]
    Extension { at: u64 },
    #[error("containerd would not unpack the archive, or not always alike: {path} {why}")]
    Entry { path: String, why: &'static str },
    #[error("the layer is larger than {0} bytes uncompressed (the setting `baseline.max_layer_bytes`)")]
    Bytes(u64),
    #[error("the layer has more than {0} entries (the setting `baseline.max_layer_entries`)")]
    Entries(u64),
    #[error("the names of the layer's files take more than {MAX_NAMES} bytes, the limit")]
    Names,
    #[error("driftd is being stopped")]
    Stopped,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Error {
        match fault {
            Fault::Io(source) => Error::Read { at: 0, source },
            Fault::Truncated { at } => Error::ArchiveTruncated { at },
            Fault::Malformed { at, why } => Error::Header { at, why },
            Fault::Extension { at } => Error::Extension { at },
        }
    }
}

/// A layer as its blob tells it.
#[derive(Debug)]
pub struct Stream {
    pub blob_sha256: [u8; 32],
    pub blob_bytes: u64,
    pub diff_id: DiffId,
    /// Of the uncompressed archive.
    pub bytes: u64,
    tree: Tree,
    entries: u64,
}

impl Stream {
    /// The layer's entries, in no order, once it is known what the layer lies on.
    ///
    /// An archive need not name every directory; containerd gives those it makes
    /// the owner and mode that the layers below have for them, or root's and 0755.
    /// A hard link may lead to a file of a layer below.
    pub fn settle(self, below: Option<&ImageBaseline>) -> Result<Vec<LayerEntry>, Error> {
        let entries = self.entries;
        self.tree.settle(below).map_err(|refusal| refused(refusal, entries))
    }
}

fn refused(refusal: Refusal, entries: u64) -> Error {
    match refusal {
        Refusal::Entry { path, why } => Error::Entry { path, why },
        Refusal::Names => Error::Names,
        Refusal::Entries => Error::Entries(entries),
    }
}

/// How much is handed from thread to thread at once.
const CHUNK: usize = 256 * 1024;
/// How many chunks a channel holds.
const DEPTH: usize = 4;

/// Reads a layer's blob to its end: gzip of any number of members, zstd of any
/// number of frames, or a plain archive, told apart by their first bytes as
/// containerd does it.
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

        let mut chunks = Chunks { chunks: archive_chunks, pool: &pool, current: None, at: 0, ended: false };
        let unpacked = unpack(&mut chunks, limits, progress, stop);
        let cut_short = chunks.is_cut_short();
        if unpacked.is_ok() {
            chunks.drain();
        }
        // Whoever still waits to hand something over sees that nobody takes it.
        drop(chunks);
        let decompressed = joined(decompress);
        let blob_sha256 = joined(blob_digest);
        let diff_id = DiffId(joined(diff_id));
        let (tree, done) = match (unpacked, decompressed) {
            (_, Err(Ended::Failed(error))) if cut_short || matches!(error, Error::Stopped) => {
                return Err(error);
            }
            (Err(error), _) | (Ok(_), Err(Ended::Failed(error))) => return Err(error),
            (Ok(_), Err(Ended::Abandoned)) => return Err(Error::Stopped),
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

// ---- buffers

struct Chunk {
    bytes: Box<[u8]>,
    length: usize,
}

impl Chunk {
    fn filled(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Buffers that nobody uses at the moment.
struct Pool {
    free: Receiver<Box<[u8]>>,
    put: Sender<Box<[u8]>>,
}

impl Pool {
    fn new() -> Pool {
        let (put, free) = bounded(4 * DEPTH);
        Pool { free, put }
    }

    fn take(&self) -> Box<[u8]> {
        self.free.try_recv().unwrap_or_else(|_| vec![0; CHUNK].into())
    }

    /// The last one to let a chunk go brings it back.
    fn give_back(&self, chunk: Arc<Chunk>) {
        if let Some(chunk) = Arc::into_inner(chunk) {
            // A full pool has enough.
            let _ = self.put.try_send(chunk.bytes);
        }
    }
}

fn digest(chunks: &Receiver<Arc<Chunk>>, pool: &Pool) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for chunk in chunks {
        hasher.update(chunk.filled());
        pool.give_back(chunk);
    }
    hasher.finalize().into()
}

// ---- the blob, and what is in it

/// How the reading of a blob came to no good end.
enum Ended {
    /// Nobody wants more of it; the reason is elsewhere.
    Abandoned,
    Failed(Error),
}

struct Done {
    plain: bool,
    blob_bytes: u64,
    bytes: u64,
}

/// The blob, every byte of which goes to its digest.
struct Source<'a, R> {
    blob: R,
    digest: Sender<Arc<Chunk>>,
    pool: &'a Pool,
    limit: u64,
    stop: &'a AtomicBool,
    current: Option<Arc<Chunk>>,
    at: usize,
    bytes: u64,
    /// Why the blob could not be read; the decompressors know only I/O errors.
    failure: Option<Error>,
}

impl<R: Read> Source<'_, R> {
    /// The next chunk; `None` at the blob's end.
    fn next(&mut self) -> Result<Option<Arc<Chunk>>, Error> {
        // Small pieces are gathered: each costs two threads a look.
        const ENOUGH: usize = CHUNK / 4;
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Stopped);
        }
        let mut bytes = self.pool.take();
        let mut length = 0;
        while length < ENOUGH {
            match self.blob.read(&mut bytes[length..]) {
                Ok(0) => break,
                Ok(more) => length += more.min(CHUNK - length),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(source) => {
                    return Err(Error::Read { at: self.bytes + length as u64, source });
                }
            }
        }
        self.bytes += length as u64;
        // No compression makes content larger than this; frames that hold nothing do.
        if self.bytes > self.limit.saturating_add(self.limit / 64).saturating_add(1 << 20) {
            return Err(Error::Bytes(self.limit));
        }
        Ok((length > 0).then(|| Arc::new(Chunk { bytes, length })))
    }
}

impl<R: Read> Read for Source<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.fill_buf()?;
        let length = bytes.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

impl<R: Read> BufRead for Source<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.as_ref().is_none_or(|chunk| self.at >= chunk.length) {
            if let Some(chunk) = self.current.take() {
                self.pool.give_back(chunk);
            }
            self.at = 0;
            match self.next() {
                Ok(next) => self.current = next,
                Err(error) => {
                    self.failure = Some(error);
                    return Err(io::Error::other("the blob cannot be read"));
                }
            }
            if let Some(chunk) = &self.current {
                // It ends only after this thread does.
                let _ = self.digest.send(Arc::clone(chunk));
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.filled()[self.at..]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

/// Where the content goes.
struct Out {
    diff_id: Sender<Arc<Chunk>>,
    archive: Sender<Option<Arc<Chunk>>>,
    bytes: u64,
    limit: u64,
}

impl Out {
    fn send(&mut self, chunk: &Arc<Chunk>) -> Result<(), Ended> {
        self.bytes += chunk.length as u64;
        if self.bytes > self.limit {
            return Err(Ended::Failed(Error::Bytes(self.limit)));
        }
        self.diff_id.send(Arc::clone(chunk)).map_err(|_| Ended::Abandoned)?;
        self.archive.send(Some(Arc::clone(chunk))).map_err(|_| Ended::Abandoned)
    }

    fn end(&self) -> Result<(), Ended> {
        self.archive.send(None).map_err(|_| Ended::Abandoned)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
    Plain,
}

impl Compression {
    /// By the same bytes as containerd.
    fn of(head: &[u8]) -> Compression {
        match head {
            [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A frame to be skipped, of which zstd may begin with some.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, _, _, _, _, ..] => Compression::Zstd,
            _ => Compression::Plain,
        }
    }
}

fn decompress<R: Read>(mut source: Source<'_, R>, mut out: Out) -> Result<Done, Ended> {
    let head = match source.fill_buf() {
        Ok(head) => head,
        Err(_) => return Err(ended(source.failure, "unreadable")),
    };
    let compression = Compression::of(head);
    match compression {
        Compression::Plain => {
            // An empty blob is an empty layer.
            if !head.is_empty() && !tar::is_header(head) {
                return Err(Ended::Failed(Error::NotALayer(looks_like(head))));
            }
            copy(&mut source, &mut out)?;
            Ok(Done { plain: true, blob_bytes: source.bytes, bytes: out.bytes })
        }
        Compression::Gzip => {
            let mut decoder = flate2::bufread::MultiGzDecoder::new(source);
            let result = pump(&mut decoder, &mut out);
            finish("gzip", result, decoder.into_inner(), &out)
        }
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(source);
            let decoder = decoder.and_then(|mut decoder| {
                decoder.window_log_max(MAX_WINDOW)?;
                Ok(decoder)
            });
            let mut decoder = match decoder {
                Ok(decoder) => decoder,
                Err(error) => {
                    return Err(Ended::Failed(Error::Corrupt {
                        format: "zstd",
                        at: 0,
                        reason: error.to_string(),
                    }));
                }
            };
            let result = pump(&mut decoder, &mut out);
            finish("zstd", result, decoder.finish(), &out)
        }
    }
}

/// A plain archive: the same chunks go both ways.
fn copy<R: Read>(source: &mut Source<'_, R>, out: &mut Out) -> Result<(), Ended> {
    let mut chunk = source.current.take();
    while let Some(filled) = chunk {
        out.send(&filled)?;
        source.pool.give_back(filled);
        chunk = source.next().map_err(Ended::Failed)?;
    }
    out.end()
}

enum Pumped {
    All,
    Io(io::Error),
    Ended(Ended),
}

fn pump<'a, R: Read + 'a, D>(decoder: &mut D, out: &mut Out) -> Pumped
where
    D: Read + HasSource<'a, R>,
{
    loop {
        let mut bytes = decoder.source().pool.take();
        let mut length = 0;
        let mut failed = None;
        while length < CHUNK {
            match decoder.read(&mut bytes[length..]) {
                Ok(0) => break,
                Ok(more) => length += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if length > 0 {
            let chunk = Arc::new(Chunk { bytes, length });
            if let Err(ended) = out.send(&chunk) {
                return Pumped::Ended(ended);
            }
            decoder.source().pool.give_back(chunk);
        }
        match failed {
            Some(error) => return Pumped::Io(error),
            None if length < CHUNK => return Pumped::All,
            None => (),
        }
    }
}

/// The blob below a decompressor.
trait HasSource<'a, R: 'a> {
    fn source(&mut self) -> &mut Source<'a, R>;
}

impl<'a, R: Read + 'a> HasSource<'a, R> for flate2::bufread::MultiGzDecoder<Source<'a, R>> {
    fn source(&mut self) -> &mut Source<'a, R> {
        self.get_mut()
    }
}

impl<'a, R: Read + 'a> HasSource<'a, R> for zstd::stream::read::Decoder<'_, Source<'a, R>> {
    fn source(&mut self) -> &mut Source<'a, R> {
        self.get_mut()
    }
}

fn finish<R: Read>(
    format: &'static str,
    pumped: Pumped,
    mut source: Source<'_, R>,
    out: &Out,
) -> Result<Done, Ended> {
    match pumped {
        Pumped::Ended(ended) => return Err(ended),
        Pumped::Io(error) => {
            if source.failure.is_some() {
                return Err(ended(source.failure, format));
            }
            let at = source.bytes - source.current.as_ref().map_or(0, |chunk| chunk.length as u64)
                + source.at as u64;
            let error = match error.kind() {
                io::ErrorKind::UnexpectedEof => Error::Truncated { at: source.bytes },
                _ => Error::Corrupt { format, at, reason: error.to_string() },
            };
            return Err(Ended::Failed(error));
        }
        Pumped::All => (),
    }
    // A decompressor ends where the blob does; if one ever did not, what is left
    // would be missing from the digest.
    match source.fill_buf() {
        Ok([]) => (),
        Ok(_) => {
            return Err(Ended::Failed(Error::Corrupt {
                format,
                at: source.bytes,
                reason: "something else follows".into(),
            }));
        }
        Err(_) => return Err(ended(source.failure, format)),
    }
    out.end()?;
    Ok(Done { plain: false, blob_bytes: source.bytes, bytes: out.bytes })
}

fn ended(failure: Option<Error>, format: &'static str) -> Ended {
    Ended::Failed(failure.unwrap_or(Error::Corrupt { format, at: 0, reason: "it cannot be read".into() }))
}

/// What bytes look like that are no archive.
fn looks_like(head: &[u8]) -> &'static str {
    const EROFS: &[u8] = &[0xe2, 0xe1, 0xf5, 0xe0];
    match head {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "an xz archive, which containerd does not unpack",
        [b'B', b'Z', b'h', ..] => "a bzip2 archive, which containerd does not unpack",
        [0x04, 0x22, 0x4d, 0x18, ..] => "an lz4 archive, which containerd does not unpack",
        [b'P', b'K', 3 | 5, ..] => "a zip archive",
        [b'h', b's', b'q', b's', ..] => "a SquashFS image",
        [b'{' | b'[', ..] => "a JSON document",
        [0x7f, b'E', b'L', b'F', ..] => "an ELF program",
        _ if head.get(1024..1028) == Some(EROFS) => "an EROFS image",
        // Neither a type of file nor anything repeated: no byte is rare.
        _ if head.len() >= 4096 && is_noise(&head[..4096]) => "encrypted data",
        _ => "no kind of file known here (its first header has a wrong checksum)",
    }
}

/// Whether all values of a byte are about as frequent.
fn is_noise(bytes: &[u8]) -> bool {
    let mut counts = [0_usize; 256];
    for byte in bytes {
        counts[usize::from(*byte)] += 1;
    }
    let expected = bytes.len() / 256;
    counts.iter().all(|count| *count <= 4 * expected)
        && counts.iter().filter(|count| **count == 0).count() < 8
}

// ---- the archive

/// What the decompressor hands over, as a reader.
struct Chunks<'a> {
    chunks: Receiver<Option<Arc<Chunk>>>,
    pool: &'a Pool,
    current: Option<Arc<Chunk>>,
    at: usize,
    /// The content's end was told, so that it is not an early one.
    ended: bool,
}

impl Chunks<'_> {
    /// Whether it ended without being told so: the decompressor knows why.
    fn is_cut_short(&self) -> bool {
        !self.ended && self.chunks.is_empty() && self.current.is_none()
    }

    /// Lets the rest go by; the digests are over all of it.
    fn drain(&mut self) {
        while let Ok(Some(chunk)) = self.chunks.recv() {
            self.pool.give_back(chunk);
        }
    }
}

impl Read for Chunks<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut bytes = self.fill_buf()?;
        let length = bytes.read(buffer)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Chunks<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if !self.ended && self.current.as_ref().is_none_or(|chunk| self.at >= chunk.length) {
            if let Some(chunk) = self.current.take() {
                self.pool.give_back(chunk);
            }
            self.at = 0;
            match self.chunks.recv() {
                Ok(Some(chunk)) => self.current = Some(chunk),
                Ok(None) => self.ended = true,
                Err(_) => return Err(io::Error::other("the content ended early")),
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.filled()[self.at..]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
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
