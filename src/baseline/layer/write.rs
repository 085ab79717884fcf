//! Writes a layer's file, from entries in memory or from entries that come one by one.
//!
//! It writes to any writer; the store makes the file durable.

use std::io::{self, BufReader, BufWriter, Cursor, Read, Seek, SeekFrom, Write};

use super::entry::{Device, LayerEntry, compare_paths};
use super::format::{
    FLAG_CAPABILITY, FLAG_OPAQUE, FORMATS, HEADER, KINDS, MAGIC, RECORD, REGULAR, VERSION, code_of,
    field,
};
use super::tree::{Tree, WriteError};
use crate::model::{FileType, LayerId, RootfsPath};

/// Writes a layer. The entries may come in any order; every one but the root
/// needs its parent directory among them. Its file is in memory until it is
/// complete: for layers of any size there is [`Writer`].
pub fn write<W: Write>(
    id: LayerId,
    mut entries: Vec<LayerEntry>,
    mut out: W,
) -> Result<W, WriteError> {
    entries.sort_unstable_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
    let memory = || Cursor::new(Vec::new());
    let mut writer = Writer::new(id, memory(), memory())?;
    for entry in &entries {
        writer.push(entry)?;
    }
    out.write_all(writer.finish()?.get_ref())?;
    out.flush()?;
    Ok(out)
}

/// Writes a layer whose entries come one by one, in the order of paths. However
/// many there are, they are not kept in memory.
#[derive(Debug)]
pub struct Writer<W: Write, S: Write> {
    id: String,
    out: BufWriter<W>,
    /// The bytes that follow the records. They wait here, because the number of records
    /// is not known before the end.
    pool: BufWriter<S>,
    tree: Tree,
    records: u32,
    hashed: u32,
    pool_length: u32,
}

const WRITE_BUFFER: usize = 1 << 17;

/// How many entries of the content index are sorted at once.
const SORTED_AT_ONCE: usize = 1 << 17;

impl<W: Read + Write + Seek, S: Read + Write + Seek> Writer<W, S> {
    /// `out` becomes the layer's file; `scratch` is not needed afterwards. Both must be
    /// empty.
    pub fn new(id: LayerId, out: W, scratch: S) -> Result<Writer<W, S>, WriteError> {
        let id = id.to_string();
        let mut out = BufWriter::with_capacity(WRITE_BUFFER, out);
        out.write_all(&[0; HEADER])?;
        let mut pool = BufWriter::with_capacity(WRITE_BUFFER, scratch);
        pool.write_all(id.as_bytes())?;
        let pool_length = count(id.len())?;
        Ok(Writer { id, out, pool, tree: Tree::default(), records: 0, hashed: 0, pool_length })
    }

    pub fn push(&mut self, entry: &LayerEntry) -> Result<(), WriteError> {
        self.tree.check(entry)?;
        if let LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) = entry
            && file.blake3.is_some() != (file.file_type == FileType::Regular)
        {
            let path = entry.path();
            return Err(WriteError::Refused(format!(
                "{path} is a regular file without a hash, or has a hash and is no regular file"
            )));
        }
        let too_many = || {
            WriteError::Refused("it has more entries or longer names than a baseline holds".into())
        };
        let mut end = self.pool_length;
        let record = encode(entry, &mut end)?;
        if end == u32::MAX {
            return Err(too_many());
        }
        self.out.write_all(&record)?;
        self.pool.write_all(entry.path().as_bytes())?;
        if let LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) = entry {
            self.pool.write_all(file.link_target.as_deref().unwrap_or_default())?;
            self.pool.write_all(file.capability.as_deref().unwrap_or_default())?;
            self.hashed += u32::from(file.blake3.is_some());
        }
        self.pool_length = end;
        self.records = self.records.checked_add(1).ok_or_else(too_many)?;
        Ok(())
    }

    /// Completes the file. The caller syncs it to the disk.
    pub fn finish(self) -> Result<W, WriteError> {
        self.tree.finish()?;
        let mut out = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        let mut pool = self.pool.into_inner().map_err(io::IntoInnerError::into_error)?;

        write_index(&mut out, self.records, self.hashed, SORTED_AT_ONCE)?;
        pool.rewind()?;
        io::copy(&mut BufReader::with_capacity(WRITE_BUFFER, pool), &mut out)?;

        let mut header = Vec::with_capacity(HEADER);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&count(self.id.len())?.to_le_bytes());
        header.extend_from_slice(&self.records.to_le_bytes());
        header.extend_from_slice(&self.hashed.to_le_bytes());
        header.extend_from_slice(&u64::from(self.pool_length).to_le_bytes());
        out.rewind()?;
        out.write_all(&header)?;

        out.rewind()?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(&mut out)?;
        out.write_all(hasher.finalize().as_bytes())?;
        out.flush()?;
        Ok(out)
    }
}

/// Appends the content index. The records are read as many times as needed, so that
/// few hashes are in memory: twice as many as are sorted `at_once`.
pub(super) fn write_index<W: Read + Write + Seek>(
    out: &mut W,
    records: u32,
    hashed: u32,
    at_once: usize,
) -> Result<(), WriteError> {
    let mut index: Vec<u8> = Vec::with_capacity(hashed as usize * 4);
    let mut last: Option<([u8; 32], u32)> = None;
    while index.len() < hashed as usize * 4 {
        let mut least: Vec<([u8; 32], u32)> = Vec::new();
        out.seek(SeekFrom::Start(HEADER as u64))?;
        let mut reader = BufReader::with_capacity(WRITE_BUFFER, &mut *out);
        for number in 0..records {
            let mut record = [0; RECORD];
            reader.read_exact(&mut record)?;
            let content = record[field::BLAKE3..].first_chunk().copied().unwrap_or_default();
            let key = (content, number);
            if record[field::KIND] == REGULAR && last.is_none_or(|last| key > last) {
                if least.len() == 2 * at_once {
                    least.select_nth_unstable(at_once);
                    least.truncate(at_once);
                }
                least.push(key);
            }
        }
        least.sort_unstable();
        least.truncate(at_once);
        last = least.last().copied();
        index.extend(least.iter().flat_map(|(_, number)| number.to_le_bytes()));
        if last.is_none() {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
    }
    out.seek(SeekFrom::Start(HEADER as u64 + u64::from(records) * RECORD as u64))?;
    out.write_all(&index)?;
    Ok(())
}

fn length_of(bytes: Option<&[u8]>) -> usize {
    bytes.map_or(0, <[u8]>::len)
}

fn count(length: usize) -> Result<u32, WriteError> {
    u32::try_from(length).map_err(|_| {
        WriteError::Refused(format!("it counts {length} where the format ends at {}", u32::MAX))
    })
}

fn short(length: usize, path: &RootfsPath) -> Result<u16, WriteError> {
    u16::try_from(length).map_err(|_| {
        WriteError::Refused(format!(
            "{path} has an attribute of {length} bytes; 65535 is the limit"
        ))
    })
}

/// Encodes one record. `offset` is where its bytes begin in the pool; it is moved to
/// their end.
fn encode(entry: &LayerEntry, offset: &mut u32) -> Result<[u8; RECORD], WriteError> {
    let mut record = [0; RECORD];
    let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);

    let path = entry.path();
    let path_length = short(path.as_bytes().len(), path)?;
    put(field::PATH_OFFSET, &offset.to_le_bytes());
    put(field::PATH_LENGTH, &path_length.to_le_bytes());
    // The caller refuses a pool that reaches the end of the range.
    *offset = offset.saturating_add(u32::from(path_length));

    let (file, opaque) = match entry {
        LayerEntry::Whiteout(_) => return Ok(record),
        LayerEntry::File(file) => (file, 0),
        LayerEntry::OpaqueDirectory(file) => (file, FLAG_OPAQUE),
    };
    let capability = if file.capability.is_some() { FLAG_CAPABILITY } else { 0 };
    let link_length = short(length_of(file.link_target.as_deref()), path)?;
    let capability_length = short(length_of(file.capability.as_deref()), path)?;
    let size = match file.device {
        Some(Device { major, minor }) => u64::from(major) << 32 | u64::from(minor),
        None => file.size,
    };
    put(field::KIND, &[code_of(&KINDS, &file.file_type)]);
    put(field::FORMAT, &[code_of(&FORMATS, &file.format)]);
    // Only the lower twelve bits are a mode.
    put(field::MODE, &file.mode.to_le_bytes()[..2]);
    put(field::FLAGS, &(opaque | capability).to_le_bytes());
    put(field::UID, &file.uid.to_le_bytes());
    put(field::GID, &file.gid.to_le_bytes());
    put(field::EXTRA_OFFSET, &offset.to_le_bytes());
    put(field::SIZE, &size.to_le_bytes());
    put(field::LINK_LENGTH, &link_length.to_le_bytes());
    put(field::CAPABILITY_LENGTH, &capability_length.to_le_bytes());
    if let Some(hash) = &file.blake3 {
        put(field::BLAKE3, &hash.0);
    }
    *offset =
        offset.saturating_add(u32::from(link_length)).saturating_add(u32::from(capability_length));
    Ok(record)
}
