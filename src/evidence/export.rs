//! A case as one archive: a tar, compressed by zstd, with an in-toto statement beside the case.
//!
//! The archive holds the directory of the case as it is, so that `driftd evidence verify` reads it
//! where it is unpacked. The statement names the digest of each file; sign it with a tool of your
//! own.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::Path;

use serde_json::{Value, json};

use super::manifest::{MANIFEST, Manifest, SUMS};
use super::reading::{MAX_MANIFEST, digest_of, read_manifest};
use super::sums;
use crate::model::Sha256Hash;
use crate::sys::file::read_regular;

/// The type of the statement's predicate. It is a name only: docs/evidence.md defines it.
const PREDICATE_TYPE: &str = "urn:driftd:evidence:v1";
const LEVEL: i32 = 3;
const MAX_SUMS: u64 = 64 << 20;
/// How large the parts of an archive are.
const PIECE: usize = 256 << 10;

/// Takes the parts of an archive. False if no more are wanted.
pub type Piece<'a> = dyn FnMut(Vec<u8>) -> bool + 'a;

/// Writes the archive of the case in a directory.
pub fn export(directory: &Path, piece: &mut Piece<'_>) -> io::Result<()> {
    let manifest = read_manifest(directory).map_err(io::Error::other)?;
    // Both are of one moment: something may be added to the case meanwhile. The other files stay.
    let described = read_regular(&directory.join(MANIFEST), MAX_MANIFEST)?;
    let text = read_regular(&directory.join(SUMS), MAX_SUMS)?;
    let files = str::from_utf8(&text).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let files = sums::parse(files).map_err(|why| io::Error::other(format!("{SUMS}: {why}")))?;
    let statement = statement(&manifest, &files, digest_of(&text));
    let mut statement = serde_json::to_vec_pretty(&statement)?;
    statement.push(b'\n');

    let out = zstd::Encoder::new(Pieces { piece, waiting: Vec::new() }, LEVEL)?;
    let mut archive = tar::Builder::new(out);
    let at = manifest.takes.last().map_or(0, |take| take.ended_at.as_second());
    let at = u64::try_from(at).unwrap_or_default();
    let case = manifest.case;
    let header = header(statement.len() as u64, at);
    append(&mut archive, header, &format!("{case}.intoto.json"), &statement[..])?;
    for (name, content) in [(MANIFEST, &described), (SUMS, &text)] {
        let header = self::header(content.len() as u64, at);
        append(&mut archive, header, &format!("{case}/{name}"), &content[..])?;
    }
    for name in files.keys().filter(|name| *name != MANIFEST) {
        let file = File::open(directory.join(name))?;
        let length = file.metadata()?.len();
        // What grows meanwhile is cut; what becomes shorter is an error.
        append(
            &mut archive,
            self::header(length, at),
            &format!("{case}/{name}"),
            file.take(length),
        )?;
    }
    let mut out = archive.into_inner()?.finish()?;
    out.end()
}

fn header(length: u64, at: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(tar::EntryType::Regular);
    header.set_size(length);
    header.set_mode(0o600);
    header.set_mtime(at);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn append<W: Write>(
    archive: &mut tar::Builder<W>,
    mut header: tar::Header,
    name: &str,
    content: impl io::Read,
) -> io::Result<()> {
    let length = header.size()?;
    let mut counted = Counted { content, read: 0 };
    archive.append_data(&mut header, name, &mut counted)?;
    if counted.read != length {
        return Err(io::Error::other(format!("{name} became shorter while it was read")));
    }
    Ok(())
}

struct Counted<R> {
    content: R,
    read: u64,
}

impl<R: io::Read> io::Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.content.read(buffer)?;
        self.read += read as u64;
        Ok(read)
    }
}

/// An in-toto Statement v1 about all files of a case.
fn statement(
    manifest: &Manifest,
    files: &std::collections::BTreeMap<String, Sha256Hash>,
    digest: Sha256Hash,
) -> Value {
    let subject = |name: &str, digest: Sha256Hash| json!({"name": format!("{}/{name}", manifest.case), "digest": {"sha256": digest.hex()}});
    let mut subjects: Vec<Value> =
        files.iter().map(|(name, digest)| subject(name, *digest)).collect();
    subjects.push(subject(SUMS, digest));
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "case": manifest.case,
            "node": manifest.node,
            "container": manifest.container,
            "run": manifest.run,
            "finding": manifest.finding,
            "kind": manifest.kind,
            "takes": manifest.takes,
            "manifest": MANIFEST,
        },
    })
}

/// Hands an archive over in parts.
struct Pieces<'a, 'b> {
    piece: &'a mut Piece<'b>,
    waiting: Vec<u8>,
}

impl Pieces<'_, '_> {
    fn end(&mut self) -> io::Result<()> {
        let last = std::mem::take(&mut self.waiting);
        if last.is_empty() || (self.piece)(last) {
            return Ok(());
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Pieces<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= PIECE {
            self.end()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
