//! Reads a layer's file: checks it once, and then looks paths and contents up in place.
//!
//! The file is mapped, not copied. Its bytes may have been changed by an attacker, so
//! none of them may cause a panic.

use std::cmp::Ordering;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;

use super::entry::{Device, FileEntry, LayerEntry, compare_paths, is_below, parse_layer_id};
use super::format::{
    CHECKSUM, FLAG_CAPABILITY, FLAG_OPAQUE, FORMATS, HEADER, KINDS, MAGIC, RECORD, REGULAR,
    VERSION, WHITEOUT, field, header, u16_at, u32_at, u64_at, value_of,
};
use crate::model::{Blake3Hash, DiffId, FileType, Format, LayerId, RootfsPath};
use crate::sys::map::{FileMap, map_immutable};

/// Why bytes are not a layer's file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("its length does not match its header")]
    Length,
    #[error("it does not begin like a baseline")]
    Magic,
    #[error("its format is version {0}; this driftd knows version {VERSION}")]
    Version(u32),
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("its header names layer `{0}`")]
    Identity(String),
    #[error("its record {0} is not valid")]
    Record(usize),
    #[error("its content index is not valid")]
    Index,
}

/// Why a layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

enum Bytes {
    Mapped(FileMap),
    Owned(Vec<u8>),
}

impl Bytes {
    fn forget(&self) {
        match self {
            Bytes::Mapped(map) => map.forget(),
            Bytes::Owned(_) => (),
        }
    }
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Owned(bytes) => bytes,
        }
    }
}

/// Stands for a layer's identity until that is read.
const NO_ID: LayerId = LayerId::Diff(DiffId([0; 32]));

/// After how many records a mapped file's pages are given back. That interrupts the
/// other processors, so it pays only for the largest layers.
pub(crate) const AT_A_TIME: usize = 1 << 17;

/// The BLAKE3 hash of `bytes`, and what `work` returns meanwhile. A container waits
/// for this, so two threads share a large file. `forget` is called often enough that
/// few of the pages that were read stay in memory.
pub(super) fn checksum_and<T>(
    bytes: &[u8],
    forget: impl Fn() + Sync,
    work: impl FnOnce() -> T,
) -> (blake3::Hash, T) {
    use blake3::hazmat::{HasherExt as _, Mode, left_subtree_len, merge_subtrees_root};

    // Below this, starting a thread costs more than it saves.
    const MUCH: usize = 1 << 19;
    let middle = usize::try_from(left_subtree_len(bytes.len().max(MUCH) as u64));
    let Some((left, right)) = middle.ok().and_then(|middle| bytes.split_at_checked(middle)) else {
        return (blake3::hash(bytes), work());
    };
    if right.is_empty() {
        return (blake3::hash(bytes), work());
    }
    let subtree = |bytes: &[u8], offset: usize| {
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(offset as u64);
        for piece in bytes.chunks(AT_A_TIME * RECORD) {
            hasher.update(piece);
            if piece.len() < bytes.len() {
                forget();
            }
        }
        hasher.finalize_non_root()
    };
    std::thread::scope(|scope| {
        let larger = || subtree(left, 0);
        let helper = std::thread::Builder::new().spawn_scoped(scope, larger);
        let right = subtree(right, left.len());
        let done = work();
        let left = match helper.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(left)) => left,
            // No other thread could be started, or it panicked.
            Ok(Err(_)) | Err(_) => larger(),
        };
        (merge_subtrees_root(&left, &right, Mode::Hash), done)
    })
}

/// The entries of one layer. Opening checks the checksum, every offset and every code
/// once, so that no look-up can fail.
pub struct LayerBaseline {
    bytes: Bytes,
    id: LayerId,
    pub(super) records: Range<usize>,
    pub(super) index: Range<usize>,
    pool: Range<usize>,
}

impl fmt::Debug for LayerBaseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerBaseline({}, {} entries)", self.id, self.len())
    }
}

impl LayerBaseline {
    /// Maps a file of the store; see [`map_immutable`] for what must hold.
    pub fn open(file: &File) -> Result<LayerBaseline, OpenError> {
        // The kernel refuses to map an empty file, with an error that explains nothing.
        if file.metadata()?.len() < (HEADER + CHECKSUM) as u64 {
            return Err(Invalid::Length.into());
        }
        Ok(LayerBaseline::check(Bytes::Mapped(map_immutable(file)?))?)
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Result<LayerBaseline, Invalid> {
        LayerBaseline::check(Bytes::Owned(bytes))
    }

    fn check(bytes: Bytes) -> Result<LayerBaseline, Invalid> {
        let Some(end) = bytes.len().checked_sub(CHECKSUM).filter(|end| *end >= HEADER) else {
            return Err(Invalid::Length);
        };
        if bytes[..MAGIC.len()] != MAGIC {
            return Err(Invalid::Magic);
        }
        let version = u32_at(&bytes, header::VERSION);
        if version != VERSION {
            return Err(Invalid::Version(version));
        }
        // Nothing below overflows: all but the pool's length are 32-bit numbers.
        let records = u64::from(u32_at(&bytes, header::RECORDS)) * RECORD as u64;
        let index = u64::from(u32_at(&bytes, header::HASHED)) * 4;
        let pool = u64_at(&bytes, header::POOL_LENGTH);
        let total = (HEADER as u64 + records + index).checked_add(pool);
        if total != Some(end as u64) {
            return Err(Invalid::Length);
        }
        let size = |length: u64| usize::try_from(length).map_err(|_| Invalid::Length);
        let records = HEADER..HEADER + size(records)?;
        let index = records.end..records.end + size(index)?;
        let pool = index.end..end;

        let id_length = u32_at(&bytes, header::ID_LENGTH) as usize;
        // Any bytes are safe to examine. So that is done while the checksum is computed,
        // and the result is used only if the checksum is right.
        let layer = LayerBaseline { bytes, id: NO_ID, records, index, pool };
        let checked = || {
            let id = layer.bytes[layer.pool.clone()].get(..id_length).ok_or(Invalid::Length)?;
            let id = str::from_utf8(id)
                .ok()
                .and_then(parse_layer_id)
                .ok_or_else(|| Invalid::Identity(crate::model::printable(id)))?;
            let regular = layer.check_records()?;
            layer.check_index(&regular)?;
            Ok(id)
        };
        let (checksum, checked) =
            checksum_and(&layer.bytes[..end], || layer.bytes.forget(), checked);
        layer.forget();
        if checksum.as_bytes() != &layer.bytes[end..] {
            return Err(Invalid::Checksum);
        }
        Ok(LayerBaseline { id: checked?, ..layer })
    }

    /// Returns which records are those of regular files, one bit each.
    fn check_records(&self) -> Result<Vec<u64>, Invalid> {
        let mut regular = vec![0_u64; self.len().div_ceil(64)];
        let pool = self.pool.len() as u64;
        for (number, raw) in self.records().iter().enumerate() {
            if number % AT_A_TIME == AT_A_TIME - 1 {
                self.forget();
            }
            let kind = raw[field::KIND];
            let path_end = u64::from(u32_at(raw, field::PATH_OFFSET))
                + u64::from(u16_at(raw, field::PATH_LENGTH));
            let extra_end = u64::from(u32_at(raw, field::EXTRA_OFFSET))
                + u64::from(u16_at(raw, field::LINK_LENGTH))
                + u64::from(u16_at(raw, field::CAPABILITY_LENGTH));
            let sound = path_end <= pool
                && extra_end <= pool
                && (kind == WHITEOUT || value_of(&KINDS, kind).is_some())
                && value_of(&FORMATS, raw[field::FORMAT]).is_some()
                && self.path_of(raw).first() == Some(&b'/');
            if !sound {
                return Err(Invalid::Record(number));
            }
            if kind == REGULAR {
                regular[number / 64] |= 1 << (number % 64);
            }
        }
        Ok(regular)
    }

    /// Reads no record: in the order of the index they are scattered over the file.
    fn check_index(&self, regular: &[u64]) -> Result<(), Invalid> {
        let records = self.len();
        let sound = self.index().iter().all(|raw| {
            let number = u32::from_le_bytes(*raw) as usize;
            number < records && regular[number / 64] >> (number % 64) & 1 == 1
        });
        if sound { Ok(()) } else { Err(Invalid::Index) }
    }

    /// Gives back the memory of the pages that were read, until they are read again.
    pub(crate) fn forget(&self) {
        self.bytes.forget();
    }

    pub fn id(&self) -> LayerId {
        self.id
    }

    /// The checksum over the whole file.
    pub fn checksum(&self) -> Blake3Hash {
        Blake3Hash(self.bytes.last_chunk().copied().unwrap_or_default())
    }

    /// How many entries there are, whiteouts and directories included.
    pub fn len(&self) -> usize {
        self.records().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn records(&self) -> &[[u8; RECORD]] {
        self.bytes[self.records.clone()].as_chunks().0
    }

    /// The numbers of records, in the order of their content hashes.
    pub(super) fn index(&self) -> &[[u8; 4]] {
        self.bytes[self.index.clone()].as_chunks().0
    }

    fn in_pool(&self, offset: u32, length: usize) -> &[u8] {
        let offset = offset as usize;
        // Checked when the file was opened.
        self.bytes[self.pool.clone()].get(offset..offset + length).unwrap_or_default()
    }

    fn path_of(&self, raw: &[u8; RECORD]) -> &[u8] {
        let length = u16_at(raw, field::PATH_LENGTH);
        self.in_pool(u32_at(raw, field::PATH_OFFSET), usize::from(length))
    }

    pub(crate) fn record(&self, number: usize) -> Option<Record<'_>> {
        self.records().get(number).map(|raw| Record { layer: self, raw })
    }

    /// What the layer itself holds at `path`.
    pub fn get(&self, path: &RootfsPath) -> Option<Record<'_>> {
        self.find(path.as_bytes())
            .map(|number| Record { layer: self, raw: &self.records()[number] })
    }

    pub(crate) fn find(&self, path: &[u8]) -> Option<usize> {
        self.records().binary_search_by(|raw| compare_paths(self.path_of(raw), path)).ok()
    }

    /// The numbers of the records below a directory, in the order of paths.
    pub(crate) fn range_below(&self, directory: &[u8]) -> Range<usize> {
        let records = self.records();
        let start = records.partition_point(|raw| {
            compare_paths(self.path_of(raw), directory) != Ordering::Greater
        });
        let length = records[start..].partition_point(|raw| is_below(self.path_of(raw), directory));
        start..start + length
    }

    /// All entries below a directory, in the order of paths.
    pub fn below(&self, directory: &RootfsPath) -> impl Iterator<Item = Record<'_>> {
        let range = self.range_below(directory.as_bytes());
        self.records()[range].iter().map(|raw| Record { layer: self, raw })
    }

    /// All entries, in the order of paths.
    pub fn entries(&self) -> impl Iterator<Item = Record<'_>> {
        self.records().iter().map(|raw| Record { layer: self, raw })
    }

    /// The regular files with this content, in the order of paths.
    pub fn with_content(&self, hash: &Blake3Hash) -> impl Iterator<Item = Record<'_>> {
        let records = self.records();
        let record = |raw: &[u8; 4]| Record {
            layer: self,
            // Checked when the file was opened.
            raw: &records[u32::from_le_bytes(*raw) as usize],
        };
        let index = self.index();
        let start = index.partition_point(|raw| record(raw).content() < hash.0);
        index[start..].iter().map(record).take_while(|found| found.content() == hash.0)
    }
}

/// One entry of a layer, in place in its file.
#[derive(Clone, Copy)]
pub struct Record<'a> {
    layer: &'a LayerBaseline,
    raw: &'a [u8; RECORD],
}

impl fmt::Debug for Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_entry())
    }
}

impl<'a> Record<'a> {
    pub fn path(self) -> &'a [u8] {
        self.layer.path_of(self.raw)
    }

    /// `None` for a whiteout.
    pub fn file_type(self) -> Option<FileType> {
        value_of(&KINDS, self.raw[field::KIND])
    }

    pub fn is_opaque(self) -> bool {
        u16_at(self.raw, field::FLAGS) & FLAG_OPAQUE != 0
    }

    pub fn mode(self) -> u32 {
        u32::from(u16_at(self.raw, field::MODE))
    }

    pub fn format(self) -> Format {
        value_of(&FORMATS, self.raw[field::FORMAT]).unwrap_or(Format::Unknown)
    }

    pub fn size(self) -> u64 {
        match self.device() {
            Some(_) => 0,
            None => u64_at(self.raw, field::SIZE),
        }
    }

    fn device(self) -> Option<Device> {
        match self.file_type() {
            Some(FileType::CharDevice | FileType::BlockDevice) => Some(Device {
                minor: u32_at(self.raw, field::SIZE),
                major: u32_at(self.raw, field::SIZE + 4),
            }),
            _ => None,
        }
    }

    /// The content's hash; zeros if it has none.
    fn content(self) -> [u8; 32] {
        self.raw[field::BLAKE3..].first_chunk().copied().unwrap_or_default()
    }

    /// The entry, decoded.
    pub fn to_entry(self) -> LayerEntry {
        // Only normalised paths are ever written.
        let path = RootfsPath::new(self.path()).unwrap_or_else(|_| RootfsPath::root());
        let Some(file_type) = self.file_type() else {
            return LayerEntry::Whiteout(path);
        };
        let link_length = usize::from(u16_at(self.raw, field::LINK_LENGTH));
        let capability_length = usize::from(u16_at(self.raw, field::CAPABILITY_LENGTH));
        let extra = self
            .layer
            .in_pool(u32_at(self.raw, field::EXTRA_OFFSET), link_length + capability_length);
        let (link_target, capability) = extra.split_at(link_length.min(extra.len()));
        let has_capability = u16_at(self.raw, field::FLAGS) & FLAG_CAPABILITY != 0;
        let file = FileEntry {
            path,
            file_type,
            format: self.format(),
            mode: self.mode(),
            uid: u32_at(self.raw, field::UID),
            gid: u32_at(self.raw, field::GID),
            size: self.size(),
            blake3: (file_type == FileType::Regular).then(|| Blake3Hash(self.content())),
            capability: has_capability.then(|| capability.into()),
            link_target: (file_type == FileType::Symlink).then(|| link_target.into()),
            device: self.device(),
        };
        if self.is_opaque() { LayerEntry::OpaqueDirectory(file) } else { LayerEntry::File(file) }
    }
}
