//! Reads a blob to its very end, decompresses it, and sends the bytes on.
//!
//! gzip of any number of members, zstd of any number of frames, or a plain archive.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::Sender;

use super::chunks::{CHUNK, Chunk, Pool};
use super::error::Error;
use super::looks::looks_like;
use crate::baseline::tar;

/// The largest window a zstd frame may need, as a power of two: the default limit of
/// `zstd -d`. It bounds the memory of decompression. By default compressors make frames
/// that need 8 MiB or less.
pub const MAX_WINDOW: u32 = 27;

/// Why the reading of a blob ended early.
pub(super) enum StreamEnd {
    /// The receiving thread has ended; it has the reason.
    Abandoned,
    Failed(Error),
}

pub(super) struct Done {
    pub(super) plain: bool,
    pub(super) blob_bytes: u64,
    pub(super) bytes: u64,
}

/// The blob. Every byte that is read of it is sent to its digest.
pub(super) struct Source<'a, R> {
    pub(super) blob: R,
    pub(super) digest: Sender<Arc<Chunk>>,
    pub(super) pool: &'a Pool,
    pub(super) limit: u64,
    pub(super) stop: &'a AtomicBool,
    pub(super) current: Option<Arc<Chunk>>,
    pub(super) at: usize,
    pub(super) bytes: u64,
    /// Why the blob could not be read; the decompressors know only I/O errors.
    pub(super) failure: Option<Error>,
}

impl<R: Read> Source<'_, R> {
    /// The next chunk; `None` at the blob's end.
    fn next(&mut self) -> Result<Option<Arc<Chunk>>, Error> {
        // Small pieces are gathered, because each chunk wakes two threads.
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
        // No compression makes a blob so much larger than its content. Frames without
        // content do.
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
                // The digest's thread ends only after this one.
                let _ = self.digest.send(Arc::clone(chunk));
            }
        }
        Ok(self.current.as_ref().map_or(&[], |chunk| &chunk.filled()[self.at..]))
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}

/// Sends the content to its digest and to the archive's reader.
pub(super) struct Out {
    pub(super) diff_id: Sender<Arc<Chunk>>,
    pub(super) archive: Sender<Option<Arc<Chunk>>>,
    pub(super) bytes: u64,
    pub(super) limit: u64,
}

impl Out {
    fn send(&mut self, chunk: &Arc<Chunk>) -> Result<(), StreamEnd> {
        self.bytes += chunk.length as u64;
        if self.bytes > self.limit {
            return Err(StreamEnd::Failed(Error::Bytes(self.limit)));
        }
        self.diff_id.send(Arc::clone(chunk)).map_err(|_| StreamEnd::Abandoned)?;
        self.archive.send(Some(Arc::clone(chunk))).map_err(|_| StreamEnd::Abandoned)
    }

    fn end(&self) -> Result<(), StreamEnd> {
        self.archive.send(None).map_err(|_| StreamEnd::Abandoned)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
    Plain,
}

impl Compression {
    /// Recognised by the same bytes as in containerd.
    fn of(head: &[u8]) -> Compression {
        match head {
            [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame. A zstd blob may begin with some of them.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, _, _, _, _, ..] => Compression::Zstd,
            _ => Compression::Plain,
        }
    }
}

pub(super) fn decompress<R: Read>(
    mut source: Source<'_, R>,
    mut out: Out,
) -> Result<Done, StreamEnd> {
    let Ok(head) = source.fill_buf() else {
        return Err(ended(source.failure, "anything"));
    };
    let compression = Compression::of(head);
    match compression {
        Compression::Plain => {
            // An empty blob is an empty layer.
            if !head.is_empty() && !tar::is_header(head) {
                return Err(StreamEnd::Failed(Error::NotALayer(looks_like(head))));
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
                    return Err(StreamEnd::Failed(Error::Corrupt {
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

/// A plain archive is its own content.
fn copy<R: Read>(source: &mut Source<'_, R>, out: &mut Out) -> Result<(), StreamEnd> {
    let mut chunk = source.current.take();
    while let Some(filled) = chunk {
        out.send(&filled)?;
        source.pool.give_back(filled);
        chunk = source.next().map_err(StreamEnd::Failed)?;
    }
    out.end()
}

enum Pumped {
    All,
    Io(io::Error),
    Ended(StreamEnd),
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
) -> Result<Done, StreamEnd> {
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
            return Err(StreamEnd::Failed(error));
        }
        Pumped::All => (),
    }
    // A decompressor ends where the blob ends. If one ever did not, the rest would be
    // missing from the digest.
    match source.fill_buf() {
        Ok([]) => (),
        Ok(_) => {
            return Err(StreamEnd::Failed(Error::Corrupt {
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

fn ended(failure: Option<Error>, format: &'static str) -> StreamEnd {
    StreamEnd::Failed(failure.unwrap_or(Error::Corrupt {
        format,
        at: 0,
        reason: "it cannot be read".into(),
    }))
}
