//! Code that a process has mapped, from `/proc/PID/maps`.
//!
//! To read it takes locks of the process's memory, so all reads go through `errand`.

use std::io;
use std::os::fd::OwnedFd;

use super::handle::{Handle, MAX_TABLE_BYTES};
use crate::sys::file;

/// One line of `/proc/PID/maps`: code that is mapped from a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub is_shared: bool,
    pub device: u64,
    pub inode: u64,
    /// As driftd's root sees it, including the kernel's ` (deleted)`.
    pub name: Vec<u8>,
}

impl Mapping {
    fn parse(line: &[u8]) -> Option<Mapping> {
        // ADDRESSES PERMISSIONS OFFSET DEVICE INODE, spaces, NAME
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        let mut field = || fields.next().and_then(|field| str::from_utf8(field).ok());
        let (start, end) = field()?.split_once('-')?;
        let permissions = field()?.as_bytes();
        let _offset = field()?;
        let (major, minor) = field()?.split_once(':')?;
        let inode = field()?.parse().ok().filter(|inode| *inode != 0)?;
        let hexadecimal = |text| u32::from_str_radix(text, 16).ok();
        if permissions.get(2) != Some(&b'x') {
            return None;
        }
        Some(Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            is_shared: permissions.get(3) == Some(&b's'),
            device: rustix::fs::makedev(hexadecimal(major)?, hexadecimal(minor)?),
            inode,
            name: unescape_newlines(fields.next()?.trim_ascii_start()),
        })
    }
}

/// In `maps`, only newlines are escaped.
fn unescape_newlines(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, after)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(br"\012") {
            plain.push(b'\n');
            rest = behind;
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

impl Handle {
    /// The code that it has mapped from files.
    pub fn mapped_code(&self) -> io::Result<Vec<Mapping>> {
        let maps = self.read_memory("maps", MAX_TABLE_BYTES)?;
        Ok(maps.split(|&byte| byte == b'\n').filter_map(Mapping::parse).collect())
    }

    /// Opens the file that is mapped at these addresses, as O_PATH.
    pub fn open_mapped(&self, start: u64, end: u64) -> io::Result<OwnedFd> {
        self.patiently(move |pid| {
            file::open_link(&format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
        })
        .and_then(|file| self.if_still_there(file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_code_is_read_and_nothing_else() {
        let parse = |line: &str| Mapping::parse(line.as_bytes());
        let expected = Mapping {
            start: 0x7f00,
            end: 0x8000,
            is_shared: false,
            device: rustix::fs::makedev(0, 0x27),
            inode: 99,
            name: b"/tmp/a b.so\n (deleted)".to_vec(),
        };
        let line = "7f00-8000 r-xp 00001000 00:27 99        /tmp/a b.so\\012 (deleted)";
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse("7f00-8000 rw-p 00001000 00:27 99   /tmp/a.so"), None);
        assert_eq!(parse("7f00-8000 r-xp 00000000 00:00 0    [vdso]"), None);
        assert_eq!(parse(""), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_mapping_or_none(line: Vec<u8>) {
            let _ = Mapping::parse(&line);
        }
    }
}
