//! What the threads of one blob pass to each other: chunks of bytes in buffers that are
//! used again, and a digest and a reader over them.

use std::io::{self, BufRead, Read};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use sha2::{Digest as _, Sha256};

/// How many bytes one thread sends another at once.
pub(super) const CHUNK: usize = 256 * 1024;
/// How many chunks a channel holds.
pub(super) const DEPTH: usize = 8;

pub(super) struct Chunk {
    pub(super) bytes: Box<[u8]>,
    pub(super) length: usize,
}

impl Chunk {
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Buffers that are not in use at the moment.
pub(super) struct Pool {
    free: Receiver<Box<[u8]>>,
    put: Sender<Box<[u8]>>,
}

impl Pool {
    pub(super) fn new() -> Pool {
        let (put, free) = bounded(4 * DEPTH);
        Pool { free, put }
    }

    pub(super) fn take(&self) -> Box<[u8]> {
        self.free.try_recv().unwrap_or_else(|_| vec![0; CHUNK].into())
    }

    /// Returns a chunk's buffer to the pool when its last user gives it back.
    pub(super) fn give_back(&self, chunk: Arc<Chunk>) {
        if let Some(chunk) = Arc::into_inner(chunk) {
            // If the pool is full, it has enough buffers.
            let _ = self.put.try_send(chunk.bytes);
        }
    }
}

pub(super) fn digest(chunks: &Receiver<Arc<Chunk>>, pool: &Pool) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for chunk in chunks {
        hasher.update(chunk.filled());
        pool.give_back(chunk);
    }
    hasher.finalize().into()
}

/// The chunks that the decompressor sends, as a reader.
pub(super) struct Chunks<'a> {
    pub(super) chunks: Receiver<Option<Arc<Chunk>>>,
    pub(super) pool: &'a Pool,
    pub(super) current: Option<Arc<Chunk>>,
    pub(super) at: usize,
    /// The decompressor has sent the content's end.
    pub(super) ended: bool,
}

impl Chunks<'_> {
    /// Whether the content ended early; the decompressor has the reason.
    pub(super) fn is_cut_short(&self) -> bool {
        !self.ended && self.chunks.is_empty() && self.current.is_none()
    }

    /// Passes over the rest, because the digests are over all of it.
    pub(super) fn drain(&mut self) {
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
