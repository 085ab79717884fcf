//! Tar archives, read the way Go's `archive/tar` reads them.
//!
//! A container runs what containerd made of the archive, and containerd reads it with Go's
//! reader. Where two readers see two different trees in the same bytes, the author of the
//! image chooses which of them is believed. That is why the `tar` crate is not used; it
//! differs from Go in some bytes. It does not know PAX sparse files (their names and
//! contents come out wrong), skips the content that a directory or a link claims to have,
//! keeps global PAX headers for the entries that follow, takes any regular file with a
//! trailing slash for a directory, and puts no limit on the size of an extended header.
//! Here each of these is decided as Go decides it, and a header that Go refuses is refused,
//! because containerd does not unpack it.
//!
//! Every size that an archive names has a limit, and no bytes make this panic.

use std::io::{self, BufRead};

/// The largest extended header (PAX records, a GNU long name): Go's own limit.
pub const MAX_EXTENSION: u64 = 1 << 20;
/// How many fragments a sparse file may have: Go's own limit.
const MAX_FRAGMENTS: usize = 1 << 20;

const BLOCK: usize = 512;
const CAPABILITY: &[u8] = b"SCHILY.xattr.security.capability";

/// Type flags.
pub(super) mod flag {
    pub(in super::super) const REGULAR: u8 = b'0';
    /// In archives older than POSIX; a directory if the name ends in `/`.
    pub(super) const OLD_REGULAR: u8 = 0;
    pub(in super::super) const LINK: u8 = b'1';
    pub(in super::super) const SYMLINK: u8 = b'2';
    pub(in super::super) const CHARACTER: u8 = b'3';
    pub(in super::super) const BLOCK: u8 = b'4';
    pub(in super::super) const DIRECTORY: u8 = b'5';
    pub(in super::super) const FIFO: u8 = b'6';
    pub(super) const PAX: u8 = b'x';
    pub(in super::super) const PAX_GLOBAL: u8 = b'g';
    pub(super) const GNU_NAME: u8 = b'L';
    pub(super) const GNU_LINK: u8 = b'K';
    pub(in super::super) const GNU_SPARSE: u8 = b'S';
}

/// Why an archive cannot be read further. `at` is a byte of the archive.
#[derive(Debug)]
pub(super) enum Fault {
    Io(io::Error),
    /// The archive ends inside of an entry.
    Truncated {
        at: u64,
    },
    /// Go's reader refuses it.
    Malformed {
        at: u64,
        why: &'static str,
    },
    /// An extended header of more than [`MAX_EXTENSION`] bytes.
    Extension {
        at: u64,
    },
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        Fault::Io(error)
    }
}

/// One entry, with its extended headers applied.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    /// The file's size, holes included.
    pub(super) size: u64,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) major: i64,
    pub(super) minor: i64,
    /// The raw `security.capability`.
    pub(super) capability: Option<Box<[u8]>>,
}

/// A part of a sparse file that is stored; all else is zeros.
#[derive(Clone, Copy)]
struct Fragment {
    offset: u64,
    length: u64,
}

pub(super) struct Reader<R> {
    source: R,
    /// How far `source` has been read.
    position: u64,
    /// How many bytes of the entry's data in the archive are not read yet.
    data: u64,
    padding: u64,
    /// The entry's fragments, if it is sparse.
    sparse: Option<Vec<Fragment>>,
    size: u64,
}

/// The layout of a header, recognised as Go does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    V7,
    Ustar,
    Star,
    Gnu,
}

impl<R: BufRead> Reader<R> {
    pub(super) fn new(source: R) -> Reader<R> {
        Reader { source, position: 0, data: 0, padding: 0, sparse: None, size: 0 }
    }

    /// Where in the archive the next byte of the entry's data is.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// How many bytes of the archive are left of the entry, padding included.
    pub(super) fn left(&self) -> u64 {
        self.data.saturating_add(self.padding)
    }

    /// The same without the padding, which the end of an archive may lack.
    pub(super) fn left_of_data(&self) -> u64 {
        self.data
    }

    pub(super) fn is_sparse(&self) -> bool {
        self.sparse.is_some()
    }

    /// The next entry; `None` at the archive's end. What was not read of the
    /// entry before is skipped.
    pub(super) fn next(&mut self) -> Result<Option<Header>, Fault> {
        let mut pax = Pax::default();
        let mut long_name = Vec::new();
        let mut long_link = Vec::new();
        loop {
            self.skip()?;
            let at = self.position;
            let Some(mut header) = self.header()? else { return Ok(None) };
            let mut size = header.signed_size;
            self.begin(header.flag, size, at)?;
            match header.flag {
                flag::PAX => pax = self.pax(at)?,
                flag::PAX_GLOBAL => {
                    // Go returns it as an entry of its own, and then forgets it and the
                    // extended headers before it.
                    if let Some(name) = self.pax(at)?.filled(Key::Path) {
                        header.name = name.to_vec();
                    }
                    return Ok(Some(Header {
                        flag: flag::PAX_GLOBAL,
                        name: header.name,
                        ..Header::default()
                    }));
                }
                flag::GNU_NAME => long_name = self.long(at)?,
                flag::GNU_LINK => long_link = self.long(at)?,
                _ => {
                    pax.merge(&mut header, &mut size, at)?;
                    if !long_name.is_empty() {
                        header.name = long_name;
                    }
                    if !long_link.is_empty() {
                        header.link = long_link;
                    }
                    if header.flag == flag::OLD_REGULAR {
                        header.flag = match header.name.last() {
                            Some(b'/') => flag::DIRECTORY,
                            Some(_) | None => flag::REGULAR,
                        };
                    }
                    self.begin(header.flag, size, at)?;
                    return self.finish(header, size, &pax, at).map(Some);
                }
            }
        }
    }

    /// Passes the whole content of the entry to `each`, in pieces of any size.
    pub(super) fn content<E: From<Fault>>(
        &mut self,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
        let Some(fragments) = self.sparse.take() else {
            let length = self.data;
            return self.data_of(length, &mut each);
        };
        let mut at = 0;
        let end = Fragment { offset: self.size, length: 0 };
        for Fragment { offset, length } in fragments.into_iter().chain([end]) {
            let mut hole = offset - at;
            while hole > 0 {
                let piece = usize::try_from(hole).unwrap_or(ZEROS.len()).min(ZEROS.len());
                each(&ZEROS[..piece])?;
                hole -= piece as u64;
            }
            self.data_of(length, &mut each)?;
            at = offset + length;
        }
        Ok(())
    }

    fn data_of<E: From<Fault>>(
        &mut self,
        mut length: u64,
        each: &mut impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while length > 0 {
            let bytes = self.source.fill_buf().map_err(Fault::Io)?;
            if bytes.is_empty() {
                return Err(Fault::Truncated { at: self.position }.into());
            }
            let piece = usize::try_from(length).unwrap_or(bytes.len()).min(bytes.len());
            each(&bytes[..piece])?;
            self.source.consume(piece);
            self.position += piece as u64;
            self.data -= piece as u64;
            length -= piece as u64;
        }
        Ok(())
    }

    /// Sets up the reading of an entry's data. Links, devices and directories
    /// have none, even if they name a size.
    fn begin(&mut self, flag: u8, size: i64, at: u64) -> Result<(), Fault> {
        let size = if has_no_data(flag) { 0 } else { size };
        self.data = u64::try_from(size)
            .map_err(|_| Fault::Malformed { at, why: "its size is negative" })?;
        self.padding = self.data.wrapping_neg() % BLOCK as u64;
        self.sparse = None;
        self.size = self.data;
        Ok(())
    }

    fn finish(
        &mut self,
        header: RawHeader,
        size: i64,
        pax: &Pax,
        at: u64,
    ) -> Result<Header, Fault> {
        let malformed = |why| Fault::Malformed { at, why };
        let mut name = header.name;
        let mut logical = size;
        let fragments = if header.flag == flag::GNU_SPARSE {
            if header.layout != Layout::Gnu {
                return Err(malformed("it is a sparse file of an unknown format"));
            }
            let number = |field: &[u8]| numeric(field).ok_or(malformed("a number is not valid"));
            logical = number(&header.block[483..495])?;
            Some(self.gnu_map(header.block, at)?)
        } else {
            let version = (pax.text(Key::SparseMajor), pax.text(Key::SparseMinor));
            let in_data = match version {
                (b"0", b"0" | b"1") => Some(false),
                (b"1", b"0") => Some(true),
                (b"", b"") if pax.filled(Key::SparseMap).is_some() => Some(false),
                _ => None,
            };
            match in_data {
                None => None,
                Some(in_data) => {
                    if let Some(real) = pax.filled(Key::SparseName) {
                        name = real.to_vec();
                    }
                    let real = pax.filled(Key::SparseSize).or(pax.filled(Key::SparseRealSize));
                    if let Some(real) = real {
                        logical = decimal(real).ok_or(malformed("a number is not valid"))?;
                    }
                    Some(if in_data { self.map_in_data(at)? } else { pax.map(at)? })
                }
            }
        };
        if let Some(fragments) = fragments {
            let logical = u64::try_from(logical).map_err(|_| malformed("its size is negative"))?;
            if has_no_data(header.flag) {
                return Err(malformed("what is no file cannot be sparse"));
            }
            let mut end = 0;
            let mut stored = 0_u64;
            for Fragment { offset, length } in &fragments {
                let next = offset.checked_add(*length).filter(|next| *next <= logical);
                let Some(next) = next.filter(|_| *offset >= end) else {
                    return Err(malformed("its map of holes is not valid"));
                };
                end = next;
                stored += length;
            }
            if stored != self.data {
                return Err(malformed("the amount of its data does not match its map of holes"));
            }
            self.size = logical;
            self.sparse = Some(fragments);
        }
        Ok(Header {
            flag: header.flag,
            name,
            link: header.link,
            size: self.size,
            mode: header.mode,
            uid: header.uid,
            gid: header.gid,
            major: header.major,
            minor: header.minor,
            capability: pax.filled(Key::Capability).map(Into::into),
        })
    }

    /// Skips what is left of an entry. An archive may end in the padding.
    fn skip(&mut self) -> Result<(), Fault> {
        self.sparse = None;
        let length = self.data;
        self.data_of(length, &mut |_: &[u8]| Ok::<(), Fault>(()))?;
        while self.padding > 0 {
            let bytes = self.source.fill_buf()?.len();
            if bytes == 0 {
                break;
            }
            let piece = usize::try_from(self.padding).unwrap_or(bytes).min(bytes);
            self.source.consume(piece);
            self.position += piece as u64;
            self.padding -= piece as u64;
        }
        self.padding = 0;
        Ok(())
    }

    /// One block; `None` if the archive ends before it.
    fn block(&mut self) -> Result<Option<Box<[u8; BLOCK]>>, Fault> {
        let mut block = Box::new([0; BLOCK]);
        let mut filled = 0;
        while filled < BLOCK {
            let bytes = self.source.fill_buf()?;
            if bytes.is_empty() {
                if filled == 0 {
                    return Ok(None);
                }
                return Err(Fault::Truncated { at: self.position });
            }
            let piece = bytes.len().min(BLOCK - filled);
            block[filled..filled + piece].copy_from_slice(&bytes[..piece]);
            self.source.consume(piece);
            self.position += piece as u64;
            filled += piece;
        }
        Ok(Some(block))
    }

    /// The next header; `None` at the end: no bytes, one block of zeros and then
    /// none, or two blocks of zeros.
    fn header(&mut self) -> Result<Option<RawHeader>, Fault> {
        let at = self.position;
        let malformed = |why| Fault::Malformed { at, why };
        let Some(block) = self.block()? else { return Ok(None) };
        if *block == [0; BLOCK] {
            return match self.block()? {
                None => Ok(None),
                Some(second) if *second == [0; BLOCK] => Ok(None),
                Some(_) => Err(malformed("a block of zeros is followed by something else")),
            };
        }
        let layout = layout_of(&block).ok_or(malformed(match at {
            // Not even its first header is one.
            0 => "it is no tar archive",
            _ => "its checksum does not match",
        }))?;
        RawHeader::parse(block, layout).ok_or(malformed("a number in it is not valid")).map(Some)
    }

    /// The whole of an extended header.
    fn extension(&mut self, at: u64) -> Result<Vec<u8>, Fault> {
        if self.data > MAX_EXTENSION {
            return Err(Fault::Extension { at });
        }
        let mut bytes = Vec::new();
        let length = self.data;
        self.data_of(length, &mut |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok::<(), Fault>(())
        })?;
        Ok(bytes)
    }

    fn long(&mut self, at: u64) -> Result<Vec<u8>, Fault> {
        let mut bytes = self.extension(at)?;
        bytes.truncate(text(&bytes).len());
        Ok(bytes)
    }

    fn pax(&mut self, at: u64) -> Result<Pax, Fault> {
        let bytes = self.extension(at)?;
        Pax::parse(&bytes)
            .ok_or(Fault::Malformed { at, why: "its extended header (PAX) is not well-formed" })
    }

    /// The map of an old GNU sparse file: in the header, and in blocks that the
    /// size does not count.
    fn gnu_map(&mut self, mut block: Box<[u8; BLOCK]>, at: u64) -> Result<Vec<Fragment>, Fault> {
        let malformed = |why| Fault::Malformed { at, why };
        let mut fragments = Vec::new();
        let mut area = 386..483;
        loop {
            let entries = (area.len() - 1) / 24;
            let map = &block[area];
            for entry in map.chunks_exact(24).take(entries) {
                if entry[0] == 0 {
                    break;
                }
                let number = |field: &[u8]| {
                    numeric(field)
                        .and_then(|number| u64::try_from(number).ok())
                        .ok_or(malformed("a number in its map of holes is not valid"))
                };
                fragments.push(Fragment {
                    offset: number(&entry[..12])?,
                    length: number(&entry[12..])?,
                });
            }
            if fragments.len() > MAX_FRAGMENTS {
                return Err(malformed("its map of holes is too long"));
            }
            if map[entries * 24] == 0 {
                return Ok(fragments);
            }
            block = self.block()?.ok_or(Fault::Truncated { at: self.position })?;
            area = 0..505;
        }
    }

    /// The map of a PAX sparse file of version 1.0: lines of decimal numbers that
    /// fill the first blocks of the data.
    fn map_in_data(&mut self, at: u64) -> Result<Vec<Fragment>, Fault> {
        let malformed = |why| Fault::Malformed { at, why };
        let mut block: Box<[u8; BLOCK]> = Box::new([0; BLOCK]);
        let mut next = BLOCK;
        let mut number = |reader: &mut Reader<R>| {
            let mut digits = Vec::new();
            loop {
                if next == BLOCK {
                    if reader.data < BLOCK as u64 {
                        return Err(Fault::Truncated { at: reader.position });
                    }
                    block = reader.block()?.ok_or(Fault::Truncated { at: reader.position })?;
                    reader.data -= BLOCK as u64;
                    next = 0;
                }
                let byte = block[next];
                next += 1;
                if byte == b'\n' {
                    break;
                }
                digits.push(byte);
                if digits.len() > BLOCK {
                    return Err(malformed("a number in its map of holes is too long"));
                }
            }
            decimal(&digits)
                .and_then(|number| u64::try_from(number).ok())
                .ok_or(malformed("a number in its map of holes is not valid"))
        };
        let entries = number(self)?;
        if entries > MAX_FRAGMENTS as u64 {
            return Err(malformed("its map of holes is too long"));
        }
        let mut fragments = Vec::new();
        for _ in 0..entries {
            fragments.push(Fragment { offset: number(self)?, length: number(self)? });
        }
        Ok(fragments)
    }
}

/// A header's own fields.
struct RawHeader {
    block: Box<[u8; BLOCK]>,
    layout: Layout,
    flag: u8,
    name: Vec<u8>,
    link: Vec<u8>,
    signed_size: i64,
    mode: i64,
    uid: i64,
    gid: i64,
    major: i64,
    minor: i64,
}

impl RawHeader {
    /// `None` if a number in it is not valid.
    fn parse(block: Box<[u8; BLOCK]>, layout: Layout) -> Option<RawHeader> {
        let mut header = RawHeader {
            layout,
            flag: block[156],
            name: text(&block[..100]).to_vec(),
            link: text(&block[157..257]).to_vec(),
            signed_size: numeric(&block[124..136])?,
            mode: numeric(&block[100..108])?,
            uid: numeric(&block[108..116])?,
            gid: numeric(&block[116..124])?,
            major: 0,
            minor: 0,
            block,
        };
        let block = &header.block;
        // The time of the last change: not kept, but a header with a bad one is refused.
        numeric(&block[136..148])?;
        if layout == Layout::V7 {
            return Some(header);
        }
        header.major = numeric(&block[329..337])?;
        header.minor = numeric(&block[337..345])?;
        let prefix: &[u8] = match layout {
            Layout::V7 => b"",
            Layout::Ustar => text(&block[345..500]),
            Layout::Star => {
                numeric(&block[476..488])?;
                numeric(&block[488..500])?;
                text(&block[345..476])
            }
            Layout::Gnu => {
                // Two times are here. Old versions of Go's writer put a prefix in
                // their place, which its reader still finds if they are no times.
                let is_time = |field: &[u8]| field[0] == 0 || numeric(field).is_some();
                let prefix = text(&block[345..500]);
                if (is_time(&block[345..357]) && is_time(&block[357..369])) || !prefix.is_ascii() {
                    b""
                } else {
                    prefix
                }
            }
        };
        if !prefix.is_empty() {
            let name = std::mem::take(&mut header.name);
            header.name = [prefix, b"/", &name].concat();
        }
        Some(header)
    }
}

/// Whether `block` could be the beginning of an archive.
pub(super) fn is_header(block: &[u8]) -> bool {
    block.first_chunk().is_some_and(|block| *block == [0; BLOCK] || layout_of(block).is_some())
}

/// `None` if the checksum is wrong.
fn layout_of(block: &[u8; BLOCK]) -> Option<Layout> {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let expected = octal(&block[CHECKSUM])?;
    let sum = |of: fn(u8) -> i64| -> i64 {
        let counted = block
            .iter()
            .enumerate()
            .map(|(at, byte)| if CHECKSUM.contains(&at) { b' ' } else { *byte });
        counted.map(of).sum()
    };
    // Sun's tar summed up signed bytes.
    if expected != sum(i64::from) && expected != sum(|byte| i64::from(byte.cast_signed())) {
        return None;
    }
    Some(match &block[257..265] {
        [b'u', b's', b't', b'a', b'r', 0, ..] if &block[508..] == b"tar\0" => Layout::Star,
        [b'u', b's', b't', b'a', b'r', 0, ..] => Layout::Ustar,
        b"ustar  \0" => Layout::Gnu,
        _ => Layout::V7,
    })
}

fn has_no_data(flag: u8) -> bool {
    matches!(
        flag,
        flag::LINK | flag::SYMLINK | flag::CHARACTER | flag::BLOCK | flag::DIRECTORY | flag::FIFO
    )
}

/// Up to the first NUL.
fn text(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    &bytes[..end]
}

/// A number in octal digits, or, if its highest bit is set, in binary (base 256).
fn numeric(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // A negative number is the complement of a positive one.
    let inverted = if first & 0x40 != 0 { 0xff } else { 0 };
    let mut value: u64 = 0;
    for (at, &byte) in field.iter().enumerate() {
        let byte = byte ^ inverted;
        let byte = if at == 0 { byte & 0x7f } else { byte };
        if value >> 56 > 0 {
            return None;
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).ok()?;
    Some(if inverted == 0 { value } else { !value })
}

fn octal(field: &[u8]) -> Option<i64> {
    let padding = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| !padding(byte));
    let Some(start) = start else { return Some(0) };
    let end = field.iter().rposition(|byte| !padding(byte))?;
    text(&field[start..=end]).iter().try_fold(0_i64, |value, &byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

fn decimal(digits: &[u8]) -> Option<i64> {
    str::from_utf8(digits).ok()?.parse().ok()
}

/// The records of a PAX header that this reader or Go's uses.
#[derive(Clone, Copy)]
enum Key {
    Path,
    LinkPath,
    Size,
    Uid,
    Gid,
    ModificationTime,
    AccessTime,
    ChangeTime,
    Capability,
    SparseMajor,
    SparseMinor,
    SparseName,
    SparseSize,
    SparseRealSize,
    SparseMap,
    SparseBlocks,
}

const KEYS: [(&[u8], Key); 16] = [
    (b"path", Key::Path),
    (b"linkpath", Key::LinkPath),
    (b"size", Key::Size),
    (b"uid", Key::Uid),
    (b"gid", Key::Gid),
    (b"mtime", Key::ModificationTime),
    (b"atime", Key::AccessTime),
    (b"ctime", Key::ChangeTime),
    (CAPABILITY, Key::Capability),
    (b"GNU.sparse.major", Key::SparseMajor),
    (b"GNU.sparse.minor", Key::SparseMinor),
    (b"GNU.sparse.name", Key::SparseName),
    (b"GNU.sparse.size", Key::SparseSize),
    (b"GNU.sparse.realsize", Key::SparseRealSize),
    (b"GNU.sparse.map", Key::SparseMap),
    (b"GNU.sparse.numblocks", Key::SparseBlocks),
];

#[derive(Default)]
struct Pax {
    values: [Option<Vec<u8>>; KEYS.len()],
}

impl Pax {
    /// `None` if the records are not well-formed.
    fn parse(mut bytes: &[u8]) -> Option<Pax> {
        let mut pax = Pax::default();
        // Version 0.0 repeats two keys, one pair for a fragment.
        let mut map: Vec<u8> = Vec::new();
        let mut numbers = 0;
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes)?;
            bytes = rest;
            if let b"GNU.sparse.offset" | b"GNU.sparse.numbytes" = key {
                let expected: &[u8] =
                    if numbers % 2 == 0 { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
                if key != expected || value.contains(&b',') {
                    return None;
                }
                if numbers > 0 {
                    map.push(b',');
                }
                map.extend_from_slice(value);
                numbers += 1;
            } else if let Some((_, key)) = KEYS.iter().find(|(name, _)| *name == key) {
                pax.values[*key as usize] = Some(value.to_vec());
            }
        }
        if numbers > 0 {
            pax.values[Key::SparseMap as usize] = Some(map);
        }
        Some(pax)
    }

    /// A value that is there and not empty; an empty one leaves the header's.
    fn filled(&self, key: Key) -> Option<&[u8]> {
        self.values[key as usize].as_deref().filter(|value| !value.is_empty())
    }

    fn text(&self, key: Key) -> &[u8] {
        self.filled(key).unwrap_or_default()
    }

    fn merge(&self, header: &mut RawHeader, size: &mut i64, at: u64) -> Result<(), Fault> {
        let malformed =
            Fault::Malformed { at, why: "a number in its extended header is not valid" };
        if let Some(path) = self.filled(Key::Path) {
            header.name = path.to_vec();
        }
        if let Some(path) = self.filled(Key::LinkPath) {
            header.link = path.to_vec();
        }
        let number = |key, to: &mut i64| match self.filled(key) {
            None => true,
            Some(value) => decimal(value).map(|number| *to = number).is_some(),
        };
        let time = |key| self.filled(key).is_none_or(is_time);
        let fine = number(Key::Size, size)
            && number(Key::Uid, &mut header.uid)
            && number(Key::Gid, &mut header.gid)
            && time(Key::ModificationTime)
            && time(Key::AccessTime)
            && time(Key::ChangeTime);
        if fine { Ok(()) } else { Err(malformed) }
    }

    /// The map of a PAX sparse file of version 0.0 or 0.1.
    fn map(&self, at: u64) -> Result<Vec<Fragment>, Fault> {
        let malformed = |why| Fault::Malformed { at, why };
        let entries = decimal(self.text(Key::SparseBlocks))
            .and_then(|entries| usize::try_from(entries).ok())
            .ok_or(malformed("the length of its map of holes is missing"))?;
        let numbers: Option<Vec<u64>> = self
            .text(Key::SparseMap)
            .split(|&byte| byte == b',')
            .map(|number| decimal(number).and_then(|number| u64::try_from(number).ok()))
            .collect();
        let numbers = numbers.ok_or(malformed("a number in its map of holes is not valid"))?;
        if Some(numbers.len()) != entries.checked_mul(2) || entries > MAX_FRAGMENTS {
            return Err(malformed("its map of holes does not have the stated length"));
        }
        let pairs = numbers.chunks_exact(2);
        Ok(pairs.map(|pair| Fragment { offset: pair[0], length: pair[1] }).collect())
    }
}

/// The first record: `LENGTH KEY=VALUE\n`, where the length counts all of it.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    if length < 5 || length > bytes.len() || length < space + 2 {
        return None;
    }
    let (record, rest) = bytes.split_at(length);
    let record = record[space + 1..].strip_suffix(b"\n")?;
    let equals = record.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    let hostile = match key {
        b"" => true,
        b"path" | b"linkpath" | b"uname" | b"gname" => value.contains(&0),
        _ => key.contains(&0),
    };
    (!hostile).then_some((key, value, rest))
}

/// Seconds, and perhaps a fraction.
fn is_time(value: &[u8]) -> bool {
    let mut parts = value.splitn(2, |&byte| byte == b'.');
    let seconds = parts.next().unwrap_or_default();
    let fraction = parts.next().unwrap_or_default();
    decimal(seconds).is_some() && fraction.iter().all(u8::is_ascii_digit)
}
