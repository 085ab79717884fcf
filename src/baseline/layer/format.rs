//! The bytes of a layer's file: offsets, codes and numbers, as
//! `docs/baseline-format.md` describes them. `write` and `read` share them.

use crate::model::{FileType, Format};

pub(super) const MAGIC: [u8; 8] = *b"driftdL\n";
pub(super) const VERSION: u32 = 1;
pub(super) const HEADER: usize = 32;
pub(super) const RECORD: usize = 72;
pub(super) const CHECKSUM: usize = 32;

pub(super) mod header {
    pub(crate) const VERSION: usize = 8;
    pub(crate) const ID_LENGTH: usize = 12;
    pub(crate) const RECORDS: usize = 16;
    pub(crate) const HASHED: usize = 20;
    pub(crate) const POOL_LENGTH: usize = 24;
}

pub(super) mod field {
    pub(crate) const PATH_OFFSET: usize = 0;
    pub(crate) const PATH_LENGTH: usize = 4;
    pub(crate) const KIND: usize = 6;
    pub(crate) const FORMAT: usize = 7;
    pub(crate) const MODE: usize = 8;
    pub(crate) const FLAGS: usize = 10;
    pub(crate) const UID: usize = 12;
    pub(crate) const GID: usize = 16;
    pub(crate) const EXTRA_OFFSET: usize = 20;
    pub(crate) const SIZE: usize = 24;
    pub(crate) const LINK_LENGTH: usize = 32;
    pub(crate) const CAPABILITY_LENGTH: usize = 34;
    pub(crate) const BLAKE3: usize = 40;
}

pub(super) const FLAG_OPAQUE: u16 = 1;
pub(super) const FLAG_CAPABILITY: u16 = 2;

pub(super) const WHITEOUT: u8 = 0;

pub(super) const REGULAR: u8 = 1;

pub(super) const KINDS: [(u8, FileType); 7] = [
    (REGULAR, FileType::Regular),
    (2, FileType::Directory),
    (3, FileType::Symlink),
    (4, FileType::CharDevice),
    (5, FileType::BlockDevice),
    (6, FileType::Fifo),
    (7, FileType::Socket),
];

pub(super) const FORMATS: [(u8, Format); 6] = [
    (0, Format::Unknown),
    (1, Format::Elf),
    (2, Format::ElfObject),
    (3, Format::Script),
    (4, Format::Data),
    (5, Format::Empty),
];

pub(super) fn code_of<T: PartialEq>(table: &[(u8, T)], value: &T) -> u8 {
    let entry = table.iter().find(|(_, known)| known == value);
    entry.expect("the table names every variant, as a test shows").0
}

pub(super) fn value_of<T: Copy>(table: &[(u8, T)], code: u8) -> Option<T> {
    table.iter().find(|(known, _)| *known == code).map(|(_, value)| *value)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u16::from_le_bytes(*raw))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u32::from_le_bytes(*raw))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |raw| u64::from_le_bytes(*raw))
}
