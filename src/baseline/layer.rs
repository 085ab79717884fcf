//! One layer of an image as one immutable file: sorted, checksummed, and used
//! where it lies. `docs/baseline-format.md` describes every byte.
//!
//! Paths are ordered component by component: `/` sorts before every other byte.
//! So a directory is followed by its whole subtree (`/a`, `/a/b`, `/a-b`; plain
//! byte order would put `/a-b` in between), and a subtree is a range.

use std::cmp::Ordering;
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use crate::model::{Blake3Hash, DiffId, FileType, Format, LayerId, RootfsPath};
use crate::sys::map::{FileMap, map_immutable};

/// A file, directory, link or device of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileEntry {
    pub path: RootfsPath,
    pub file_type: FileType,
    /// `Unknown` for anything that is not a regular file.
    pub format: Format,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// 0 for anything that is not a regular file or a symlink.
    pub size: u64,
    /// Of every regular file, and of nothing else.
    pub blake3: Option<Blake3Hash>,
    /// The raw `security.capability` xattr.
    pub capability: Option<Box<[u8]>>,
    /// Of every symlink, and of nothing else.
    pub link_target: Option<Box<[u8]>>,
    /// Of every device, and of nothing else.
    pub device: Option<Device>,
}

impl FileEntry {
    /// A directory of root's; with other fields, a start for any other entry.
    pub fn directory(path: RootfsPath, mode: u32) -> FileEntry {
        FileEntry {
            path,
            file_type: FileType::Directory,
            format: Format::Unknown,
            mode,
            uid: 0,
            gid: 0,
            size: 0,
            blake3: None,
            capability: None,
            link_target: None,
            device: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    pub major: u32,
    pub minor: u32,
}

/// What a layer says about one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayerEntry {
    /// Whatever the layers below hold at this path is gone.
    Whiteout(RootfsPath),
    File(FileEntry),
    /// A directory that hides what the layers below hold in it.
    OpaqueDirectory(FileEntry),
}

impl LayerEntry {
    pub fn path(&self) -> &RootfsPath {
        match self {
            LayerEntry::Whiteout(path) => path,
            LayerEntry::File(entry) | LayerEntry::OpaqueDirectory(entry) => &entry.path,
        }
    }
}

/// The longest path a baseline holds: what the kernel calls `PATH_MAX`.
pub const MAX_PATH: usize = 4096;

/// Orders paths so that a directory's subtree follows it directly.
pub fn compare_paths(one: &[u8], other: &[u8]) -> Ordering {
    // No path holds a NUL, so it is free to stand for the slash.
    let rank = |byte: u8| if byte == b'/' { 0 } else { byte };
    let common = one.iter().zip(other).take_while(|(a, b)| a == b).count();
    match (one.get(common), other.get(common)) {
        (None, None) => Ordering::Equal,
        (None, Some(_)) => Ordering::Less,
        (Some(_), None) => Ordering::Greater,
        (Some(&a), Some(&b)) => rank(a).cmp(&rank(b)),
    }
}

/// Whether `path` lies below `directory` (and is not `directory` itself).
pub(super) fn is_below(path: &[u8], directory: &[u8]) -> bool {
    match directory {
        b"/" => path.len() > 1,
        _ => path.strip_prefix(directory).is_some_and(|rest| rest.starts_with(b"/")),
    }
}

// ---- the format

const MAGIC: [u8; 8] = *b"driftdL\n";
const VERSION: u32 = 1;
const HEADER: usize = 32;
const RECORD: usize = 72;
const CHECKSUM: usize = 32;

mod header {
    pub(super) const VERSION: usize = 8;
    pub(super) const ID_LENGTH: usize = 12;
    pub(super) const RECORDS: usize = 16;
    pub(super) const HASHED: usize = 20;
    pub(super) const POOL_LENGTH: usize = 24;
}

mod field {
    pub(super) const PATH_OFFSET: usize = 0;
    pub(super) const PATH_LENGTH: usize = 4;
    pub(super) const KIND: usize = 6;
    pub(super) const FORMAT: usize = 7;
    pub(super) const MODE: usize = 8;
    pub(super) const FLAGS: usize = 10;
    pub(super) const UID: usize = 12;
    pub(super) const GID: usize = 16;
    pub(super) const EXTRA_OFFSET: usize = 20;
    pub(super) const SIZE: usize = 24;
    pub(super) const LINK_LENGTH: usize = 32;
    pub(super) const CAPABILITY_LENGTH: usize = 34;
    pub(super) const BLAKE3: usize = 40;
}

const FLAG_OPAQUE: u16 = 1;
const FLAG_CAPABILITY: u16 = 2;

const WHITEOUT: u8 = 0;

const REGULAR: u8 = 1;

const KINDS: [(u8, FileType); 7] = [
    (REGULAR, FileType::Regular),
    (2, FileType::Directory),
    (3, FileType::Symlink),
    (4, FileType::CharDevice),
    (5, FileType::BlockDevice),
    (6, FileType::Fifo),
    (7, FileType::Socket),
];

const FORMATS: [(u8, Format); 6] = [
    (0, Format::Unknown),
    (1, Format::Elf),
    (2, Format::ElfObject),
    (3, Format::Script),
    (4, Format::Data),
    (5, Format::Empty),
];

fn code_of<T: PartialEq>(table: &[(u8, T)], value: &T) -> u8 {
    let known = table.iter().find(|(_, known)| known == value);
    known.expect("the table names every variant, as a test shows").0
}

fn value_of<T: Copy>(table: &[(u8, T)], code: u8) -> Option<T> {
    table.iter().find(|(known, _)| *known == code).map(|(_, value)| *value)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u16::from_le_bytes(*raw))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u32::from_le_bytes(*raw))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u64::from_le_bytes(*raw))
}

/// The text of a layer's identity, read back.
pub(super) fn parse_layer_id(text: &str) -> Option<LayerId> {
    match text.strip_prefix("chain-") {
        Some(chain_id) => chain_id.parse().ok().map(LayerId::Chain),
        None => text.parse().ok().map(LayerId::Diff),
    }
}

// ---- writing

/// Why a layer could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The entries are no tree, or too many for the format.
    #[error("{0}")]
    Refused(String),
}

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
    /// What goes behind the records, of which nobody knows yet how many come.
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
    /// `out` becomes the layer's file; `scratch` is of no use afterwards. Both
    /// are empty.
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
                "{path} is a file without a hash, or has a hash and is none"
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

    /// Completes the file. What is on the disk is the caller's concern.
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

/// Appends the content index. The hashes are fetched from the records, as often
/// as needed, so that few of them are in memory: twice what is sorted `at_once`.
fn write_index<W: Read + Write + Seek>(
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

/// Checks that sorted entries are a tree: the root first, every path once, and
/// every entry in a directory that is an entry too.
#[derive(Debug, Default)]
struct Tree {
    previous: Vec<u8>,
    /// The directories that lead to `previous`, itself included: how much of it
    /// each of them is.
    open: Vec<usize>,
}

impl Tree {
    fn check(&mut self, entry: &LayerEntry) -> Result<(), WriteError> {
        let path = entry.path();
        let bytes = path.as_bytes();
        let refuse = |why: &str| Err(WriteError::Refused(format!("{path} {why}")));

        if self.previous.is_empty() && bytes != b"/" {
            return Err(WriteError::Refused(NO_ROOT.into()));
        }
        match compare_paths(&self.previous, bytes) {
            Ordering::Less => (),
            Ordering::Equal => return refuse("is named twice"),
            Ordering::Greater => return refuse("comes too late"),
        }
        if bytes.len() > MAX_PATH {
            return refuse("is longer than 4096 bytes");
        }
        while self.open.last().is_some_and(|end| !is_below(bytes, &self.previous[..*end])) {
            self.open.pop();
        }
        if self.open.last().map(|end| &self.previous[..*end]) != parent_of(bytes) {
            return refuse("is in a directory that is missing");
        }
        let directory = match entry {
            LayerEntry::Whiteout(_) => false,
            LayerEntry::File(file) => file.file_type == FileType::Directory,
            LayerEntry::OpaqueDirectory(file) if file.file_type == FileType::Directory => true,
            LayerEntry::OpaqueDirectory(_) => return refuse("is opaque but no directory"),
        };
        match (bytes, directory) {
            (_, true) => self.open.push(bytes.len()),
            (b"/", false) => return refuse("is no directory"),
            (_, false) => (),
        }
        self.previous.clear();
        self.previous.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&self) -> Result<(), WriteError> {
        if self.previous.is_empty() { Err(WriteError::Refused(NO_ROOT.into())) } else { Ok(()) }
    }
}

const NO_ROOT: &str = "it has no root directory";

/// The directory that holds `path`; `None` for the root.
pub(super) fn parent_of(path: &[u8]) -> Option<&[u8]> {
    let slash = path.iter().rposition(|&byte| byte == b'/')?;
    match (slash, path.len()) {
        (0, 1) => None,
        (0, _) => Some(b"/"),
        _ => Some(&path[..slash]),
    }
}

/// One record; `offset` is where in the pool its bytes begin, and moves on.
fn encode(entry: &LayerEntry, offset: &mut u32) -> Result<[u8; RECORD], WriteError> {
    let mut record = [0; RECORD];
    let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);

    let path = entry.path();
    let path_length = short(path.as_bytes().len(), path)?;
    put(field::PATH_OFFSET, &offset.to_le_bytes());
    put(field::PATH_LENGTH, &path_length.to_le_bytes());
    // Whoever calls this refuses a pool that reaches the end.
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

// ---- reading

/// Why bytes are no layer of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("it is shorter than its header says, or longer")]
    Length,
    #[error("it does not begin like a baseline")]
    Magic,
    #[error("its format is version {0}; this driftd knows version {VERSION}")]
    Version(u32),
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("it says it is layer `{0}`")]
    Identity(String),
    #[error("its record {0} makes no sense")]
    Record(usize),
    #[error("its content index makes no sense")]
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

/// The identity of a layer whose own is not read yet.
const NOBODY: LayerId = LayerId::Diff(DiffId([0; 32]));

/// After how many records a mapped file's pages are given back. That interrupts
/// the other processors, so that only the largest layers are worth it.
pub(super) const AT_A_TIME: usize = 1 << 17;

/// The BLAKE3 hash of `bytes`, and what `work` returns meanwhile. A container
/// waits for this, so that two processors share it if it is much. Of what was
/// read, `forget` is called often enough that little stays in memory.
fn checksum_and<T>(
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
            // There is no other thread to be had.
            Ok(Err(_)) | Err(_) => larger(),
        };
        (merge_subtrees_root(&left, &right, Mode::Hash), done)
    })
}

/// What one layer says about its paths. Opening checks the checksum, every
/// offset and every code once, so that no look-up can fail.
pub struct LayerBaseline {
    bytes: Bytes,
    id: LayerId,
    records: Range<usize>,
    index: Range<usize>,
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
        // Mapping an empty file is refused by the kernel with a riddle.
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
        // Whatever the bytes are, looking at them is safe; so that is done while
        // the checksum is computed, and told after it.
        let layer = LayerBaseline { bytes, id: NOBODY, records, index, pool };
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

    /// Returns which records are of regular files, one bit each.
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

    /// Looks at no record: in the order of the index that is all over the file.
    fn check_index(&self, regular: &[u64]) -> Result<(), Invalid> {
        let records = self.len();
        let sound = self.index().iter().all(|raw| {
            let number = u32::from_le_bytes(*raw) as usize;
            number < records && regular[number / 64] >> (number % 64) & 1 == 1
        });
        if sound { Ok(()) } else { Err(Invalid::Index) }
    }

    /// Takes what was looked at out of this process's memory, until it is looked
    /// at again.
    pub(super) fn forget(&self) {
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

    /// Numbers of records, in the order of their content.
    fn index(&self) -> &[[u8; 4]] {
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

    pub(super) fn record(&self, number: usize) -> Option<Record<'_>> {
        self.records().get(number).map(|raw| Record { layer: self, raw })
    }

    /// What the layer itself says about `path`.
    pub fn get(&self, path: &RootfsPath) -> Option<Record<'_>> {
        self.find(path.as_bytes())
            .map(|number| Record { layer: self, raw: &self.records()[number] })
    }

    pub(super) fn find(&self, path: &[u8]) -> Option<usize> {
        self.records().binary_search_by(|raw| compare_paths(self.path_of(raw), path)).ok()
    }

    /// The numbers of the records below a directory, in the order of paths.
    pub(super) fn range_below(&self, directory: &[u8]) -> Range<usize> {
        let records = self.records();
        let start = records.partition_point(|raw| {
            compare_paths(self.path_of(raw), directory) != Ordering::Greater
        });
        let length = records[start..].partition_point(|raw| is_below(self.path_of(raw), directory));
        start..start + length
    }

    /// Everything the layer says about what is below a directory.
    pub fn below(&self, directory: &RootfsPath) -> impl Iterator<Item = Record<'_>> {
        let range = self.range_below(directory.as_bytes());
        self.records()[range].iter().map(|raw| Record { layer: self, raw })
    }

    /// Everything the layer says, in the order of paths.
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

/// One entry of a layer, where it lies in the file.
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

    /// The content's hash; zeros where there is none.
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

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::baseline::blake3_of;
    use crate::model::{ChainId, DiffId};

    const ID: LayerId = LayerId::Diff(DiffId([7; 32]));

    /// Few names, so that layers meet; `a-` and `a!` sort before `a/` byte by byte.
    const NAMES: [&str; 5] = ["a", "a-", "b", "a!", "\u{e9}"];

    /// All paths that [`any_layer`] can make, but for the root.
    pub(in crate::baseline) fn every_path() -> Vec<RootfsPath> {
        let mut paths = vec![RootfsPath::root()];
        for depth in 0..3 {
            let parents: Vec<RootfsPath> = paths
                .iter()
                .filter(|path| path.relative().split(|&byte| byte == b'/').count() >= depth)
                .cloned()
                .collect();
            for parent in parents {
                paths.extend(NAMES.map(|name| parent.join(name.as_bytes()).unwrap()));
            }
        }
        paths.sort();
        paths.dedup();
        paths
    }

    fn any_path() -> impl Strategy<Value = RootfsPath> {
        proptest::collection::vec(proptest::sample::select(&NAMES[..]), 1..4)
            .prop_map(|names| RootfsPath::new(names.join("/")).unwrap())
    }

    fn any_entry() -> impl Strategy<Value = LayerEntry> {
        let modes = proptest::sample::select(vec![0o755, 0o644, 0o4755, 0o1777]);
        let words = proptest::sample::select(vec!["x", "y", ""]);
        let extra = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20));
        (any_path(), 0..9_u8, modes, words, extra, any::<(u32, u32)>()).prop_map(
            |(path, kind, mode, word, extra, (uid, gid))| {
                let plain = FileEntry {
                    path: path.clone(),
                    file_type: FileType::Directory,
                    format: Format::Unknown,
                    mode,
                    uid,
                    gid,
                    size: 0,
                    blake3: None,
                    capability: None,
                    link_target: None,
                    device: None,
                };
                let device = Some(Device { major: uid, minor: gid });
                match kind {
                    0 | 1 => LayerEntry::Whiteout(path),
                    2 => LayerEntry::OpaqueDirectory(plain),
                    3 => LayerEntry::File(plain),
                    4 => LayerEntry::File(FileEntry {
                        file_type: FileType::Symlink,
                        link_target: Some(extra.unwrap_or_default().into()),
                        ..plain
                    }),
                    5 => LayerEntry::File(FileEntry {
                        file_type: FileType::BlockDevice,
                        device,
                        ..plain
                    }),
                    6 => LayerEntry::File(FileEntry { file_type: FileType::Fifo, ..plain }),
                    _ => LayerEntry::File(FileEntry {
                        file_type: FileType::Regular,
                        format: if word == "x" { Format::Elf } else { Format::Script },
                        size: u64::from(gid) << 8,
                        blake3: Some(blake3_of(word)),
                        capability: extra.map(Into::into),
                        ..plain
                    }),
                }
            },
        )
    }

    /// A layer as a tree: what would lie below something that is no directory is
    /// left out, and missing directories are put in.
    pub(in crate::baseline) fn any_layer() -> impl Strategy<Value = Vec<LayerEntry>> {
        proptest::collection::vec(any_entry(), 0..12).prop_map(|entries| {
            let directory = |path: RootfsPath| LayerEntry::File(FileEntry::directory(path, 0o755));
            let is_directory = |entry: &LayerEntry| match entry {
                LayerEntry::Whiteout(_) => false,
                LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => {
                    file.file_type == FileType::Directory
                }
            };
            let root = RootfsPath::root();
            let mut tree = BTreeMap::from([(root.clone(), directory(root))]);
            for entry in entries {
                let path = entry.path().clone();
                let above: Vec<_> =
                    std::iter::successors(path.parent(), RootfsPath::parent).collect();
                let blocked = above
                    .iter()
                    .any(|path| tree.get(path).is_some_and(|known| !is_directory(known)));
                if blocked || tree.keys().any(|known| *known != path && known.is_within(&path)) {
                    continue;
                }
                for path in above {
                    tree.entry(path.clone()).or_insert_with(|| directory(path));
                }
                tree.insert(path, entry);
            }
            tree.into_values().collect()
        })
    }

    fn written(entries: &[LayerEntry]) -> Vec<u8> {
        write(ID, entries.to_vec(), Vec::new()).unwrap()
    }

    fn read_back(layer: &LayerBaseline) -> Vec<LayerEntry> {
        layer.entries().map(Record::to_entry).collect()
    }

    /// Asks everything that can be asked.
    fn ask_everything(layer: &LayerBaseline) {
        for path in every_path() {
            let _ = layer.get(&path).map(Record::to_entry);
            let _ = layer.below(&path).map(Record::to_entry).count();
        }
        for word in ["x", "y", ""] {
            let _ = layer.with_content(&blake3_of(word)).map(Record::to_entry).count();
        }
        let _ = layer.with_content(&Blake3Hash([0; 32])).count();
        let _ = read_back(layer);
    }

    fn seal(bytes: &mut [u8]) {
        if let Some(end) = bytes.len().checked_sub(CHECKSUM) {
            let checksum = blake3::hash(&bytes[..end]);
            bytes[end..].copy_from_slice(checksum.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(entries in any_layer()) {
            let layer = LayerBaseline::from_bytes(written(&entries)).unwrap();
            let mut sorted = entries.clone();
            sorted.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
            prop_assert_eq!(layer.id(), ID);
            prop_assert_eq!(read_back(&layer), sorted.clone());
            for path in every_path() {
                let expected = sorted.iter().find(|entry| *entry.path() == path).cloned();
                prop_assert_eq!(layer.get(&path).map(Record::to_entry), expected);
                let below: Vec<_> = sorted
                    .iter()
                    .filter(|entry| *entry.path() != path && entry.path().is_within(&path))
                    .cloned()
                    .collect();
                prop_assert_eq!(layer.below(&path).map(Record::to_entry).collect::<Vec<_>>(), below);
            }
            for word in ["x", "y", "", "none"] {
                let hash = blake3_of(word);
                let expected: Vec<_> = sorted
                    .iter()
                    .filter(|entry| matches!(entry, LayerEntry::File(file) if file.blake3 == Some(hash)))
                    .cloned()
                    .collect();
                let found: Vec<_> = layer.with_content(&hash).map(Record::to_entry).collect();
                prop_assert_eq!(found, expected);
            }
        }

        /// The content index is made in passes, however few fit into one.
        #[test]
        fn the_content_index_is_the_same_in_any_number_of_passes(
            entries in any_layer(), at_once in 1..4_usize,
        ) {
            let whole = written(&entries);
            let layer = LayerBaseline::from_bytes(whole.clone()).unwrap();
            let hashed = u32::try_from(layer.index().len()).unwrap();
            let records = u32::try_from(layer.len()).unwrap();
            let mut out = Cursor::new(whole[..layer.records.end].to_vec());
            write_index(&mut out, records, hashed, at_once).unwrap();
            prop_assert_eq!(out.get_ref(), &whole[..layer.index.end]);
        }

        #[test]
        fn a_checksum_is_the_same_whoever_computes_it(length in 0..3_000_000_usize) {
            let bytes = vec![7; length];
            prop_assert_eq!(checksum_and(&bytes, || (), || 1), (blake3::hash(&bytes), 1));
        }

        #[test]
        fn a_changed_byte_is_noticed(
            entries in any_layer(), at: proptest::sample::Index, by in 1..=255_u8,
        ) {
            let mut bytes = written(&entries);
            let at = at.index(bytes.len());
            bytes[at] ^= by;
            prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
        }

        #[test]
        fn a_file_cut_short_is_noticed(entries in any_layer(), at: proptest::sample::Index) {
            let mut bytes = written(&entries);
            bytes.truncate(at.index(bytes.len()));
            prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
        }

        /// Bytes that somebody made to look right must not stop the daemon.
        #[test]
        fn no_look_up_panics_whatever_the_file_holds(
            entries in any_layer(),
            changes in proptest::collection::vec(
                (any::<proptest::sample::Index>(), any::<u8>()), 1..8,
            ),
        ) {
            let mut bytes = written(&entries);
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            seal(&mut bytes);
            if let Ok(layer) = LayerBaseline::from_bytes(bytes) {
                ask_everything(&layer);
            }
        }

        #[test]
        fn random_bytes_are_no_layer(mut bytes: Vec<u8>) {
            seal(&mut bytes);
            prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
        }
    }

    #[track_caller]
    fn check_order(one: &str, other: &str) {
        assert_eq!(compare_paths(one.as_bytes(), other.as_bytes()), Ordering::Less);
        assert_eq!(compare_paths(other.as_bytes(), one.as_bytes()), Ordering::Greater);
        assert_eq!(compare_paths(one.as_bytes(), one.as_bytes()), Ordering::Equal);
    }

    #[test]
    fn a_directory_is_followed_by_its_subtree() {
        check_order("/", "/a");
        check_order("/a", "/a/b");
        check_order("/a/b", "/a-b");
        check_order("/a/b", "/a!");
        check_order("/a/z", "/ab");
    }

    fn entries_of(text: &str) -> Vec<LayerEntry> {
        crate::baseline::text::entries(text, &mut BTreeMap::new())
    }

    #[track_caller]
    fn check_refused(entries: Vec<LayerEntry>, expected: &str) {
        let err = write(ID, entries, Vec::new()).unwrap_err();
        assert_eq!(err.to_string(), expected);
    }

    #[test]
    fn entries_that_are_no_tree_are_refused() {
        check_refused(vec![], "it has no root directory");
        check_refused(
            entries_of("/a 644 data x").into_iter().chain(entries_of("/a 644 data y")).collect(),
            "/ is named twice",
        );
        let orphan = |entry: &LayerEntry| entry.path().as_bytes() != b"/a";
        check_refused(
            entries_of("/a/b 644 data x").into_iter().filter(orphan).collect(),
            "/a/b is in a directory that is missing",
        );
        check_refused(
            entries_of("/a 755 dir")
                .into_iter()
                .map(|entry| match entry {
                    LayerEntry::File(file) => {
                        LayerEntry::File(FileEntry { blake3: Some(blake3_of("")), ..file })
                    }
                    other => other,
                })
                .collect(),
            "/ is a file without a hash, or has a hash and is none",
        );
        let mut below_a_file = entries_of("/a/b 644 data x");
        below_a_file.retain(orphan);
        below_a_file.extend(entries_of("/a 644 data x").into_iter().filter(|entry| !orphan(entry)));
        check_refused(below_a_file, "/a/b is in a directory that is missing");
    }

    #[test]
    fn entries_that_come_one_by_one_come_in_order() {
        let memory = || Cursor::new(Vec::new());
        let mut writer = Writer::new(ID, memory(), memory()).unwrap();
        let mut entries = entries_of("/a 644 data x\n/b 644 data x");
        entries.swap(1, 2);
        let result = entries.iter().try_for_each(|entry| writer.push(entry));
        assert_eq!(result.unwrap_err().to_string(), "/a comes too late");
    }

    /// A layer whose checksum two threads share, with every kind of entry.
    fn large_layer() -> Vec<u8> {
        let mut text = "opaque /o 755\n- /w\n/l 777 symlink x\n/p 755 elf x cap=raw\n".to_owned();
        for number in 0..8_000 {
            text += &format!("/d{}/file-{number} 644 data {}\n", number % 50, number / 3);
        }
        written(&entries_of(&text))
    }

    #[test]
    fn a_file_that_lost_its_end_is_no_layer() {
        let whole = large_layer();
        assert!(whole.len() > 1 << 19);
        for part in 0..16 {
            let mut cut = whole.clone();
            cut.truncate(whole.len() / 16 * part);
            let err = LayerBaseline::from_bytes(cut).unwrap_err();
            assert_eq!(err, Invalid::Length, "cut at {part}/16");
            let file = tempfile::tempfile().unwrap();
            (&file).write_all(&whole[..whole.len() / 16 * part]).unwrap();
            let err = LayerBaseline::open(&file).unwrap_err();
            assert!(matches!(err, OpenError::Invalid(Invalid::Length)), "cut at {part}/16: {err}");
        }
        LayerBaseline::from_bytes(whole).unwrap();
    }

    /// A disk that loses the end of a file may leave zeros in its place.
    #[test]
    fn a_file_whose_end_is_zeros_is_no_layer() {
        let whole = large_layer();
        for part in 1..16 {
            let mut cut = whole.clone();
            cut[whole.len() / 16 * part..].fill(0);
            assert_eq!(LayerBaseline::from_bytes(cut).unwrap_err(), Invalid::Checksum);
        }
    }

    #[test]
    fn a_flipped_bit_is_noticed_wherever_it_is() {
        let whole = large_layer();
        for at in (0..whole.len()).step_by(whole.len() / 64) {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            LayerBaseline::from_bytes(flipped).unwrap_err();
        }
    }

    #[test]
    fn a_later_version_is_named_as_such() {
        let mut bytes = written(&entries_of("/a 644 data x"));
        bytes[header::VERSION] = 2;
        seal(&mut bytes);
        assert_eq!(LayerBaseline::from_bytes(bytes).unwrap_err(), Invalid::Version(2));
    }

    #[test]
    fn a_layer_without_a_diff_id_keeps_its_name() {
        let id = LayerId::Chain(ChainId([3; 32]));
        let bytes = write(id, entries_of(""), Vec::new()).unwrap();
        assert_eq!(LayerBaseline::from_bytes(bytes).unwrap().id(), id);
    }

    #[test]
    fn every_type_and_format_has_a_code() {
        let types = KINDS.map(|(_, file_type)| match file_type {
            FileType::Regular
            | FileType::Directory
            | FileType::Symlink
            | FileType::CharDevice
            | FileType::BlockDevice
            | FileType::Fifo
            | FileType::Socket => code_of(&KINDS, &file_type),
        });
        assert_eq!(types, [1, 2, 3, 4, 5, 6, 7]);
        let formats = FORMATS.map(|(_, format)| match format {
            Format::Unknown
            | Format::Elf
            | Format::ElfObject
            | Format::Script
            | Format::Data
            | Format::Empty => code_of(&FORMATS, &format),
            Format::KernelModule => unreachable!("first bytes do not show it"),
        });
        assert_eq!(formats, [0, 1, 2, 3, 4, 5]);
    }
}
