//! The state of a file, as a baseline recorded it or an observation found it: type, format,
//! mode, owner, content.
//!
//! Facts only. `detect` compares them.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::digest::{Blake3Hash, Sha256Hash};

/// A time of a filesystem: seconds and nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct FileTime {
    pub seconds: i64,
    pub nanoseconds: u32,
}

impl FileTime {
    /// `None` for a time that no clock shows.
    pub fn timestamp(self) -> Option<Timestamp> {
        Timestamp::new(self.seconds, i32::try_from(self.nanoseconds).ok()?).ok()
    }
}

/// The type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileType {
    Regular,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// The filesystem of a file, as its container sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filesystem {
    /// The container's root: the image's layers and the container's own layer.
    Overlay,
    /// Memory: `/dev/shm`, an emptyDir of medium Memory, a tmpfs that the container mounted.
    Tmpfs,
    /// Any other mount: volumes, directories of the host, overlays that the container made.
    Volume,
    /// A file without a name: a memfd, or a file made with `O_TMPFILE`.
    Anonymous,
    /// The root of another container, reached through `/proc/PID/root` or the like.
    Container,
}

impl Filesystem {
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Overlay => "overlay",
            Filesystem::Tmpfs => "tmpfs",
            Filesystem::Volume => "volume",
            Filesystem::Anonymous => "anonymous",
            Filesystem::Container => "container",
        }
    }
}

/// The format of a regular file, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// An ELF file the kernel or the dynamic linker can run: `ET_EXEC` or `ET_DYN`.
    Elf,
    /// An ELF file that cannot run: an object file or a core dump.
    ElfObject,
    /// An object file with the sections that the kernel expects of a module. The first
    /// bytes alone do not show it: an image's own modules are recorded as
    /// [`Format::ElfObject`].
    KernelModule,
    /// `#!` and an interpreter.
    Script,
    Data,
    Empty,
    /// The file was not read, or could not be.
    Unknown,
}

impl Format {
    /// How many bytes `sniff` needs.
    pub const HEAD: usize = 18;

    /// The format of a file by its first `HEAD` bytes (fewer if the file is shorter).
    pub fn sniff(head: &[u8]) -> Format {
        const EI_DATA: usize = 5;
        const ELFDATA2MSB: u8 = 2;
        match head {
            [] => Format::Empty,
            [b'#', b'!', ..] => Format::Script,
            [0x7f, b'E', b'L', b'F', ..] => {
                // e_type, at offset 16 in the byte order that e_ident names.
                let e_type = match head.get(16..18) {
                    Some(raw) if head[EI_DATA] == ELFDATA2MSB => {
                        u16::from_be_bytes([raw[0], raw[1]])
                    }
                    Some(raw) => u16::from_le_bytes([raw[0], raw[1]]),
                    None => return Format::Data,
                };
                match e_type {
                    2 | 3 => Format::Elf,
                    _ => Format::ElfObject,
                }
            }
            _ => Format::Data,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Format::Elf => "elf",
            Format::ElfObject => "elf_object",
            Format::KernelModule => "kernel_module",
            Format::Script => "script",
            Format::Data => "data",
            Format::Empty => "empty",
            Format::Unknown => "unknown",
        }
    }
}

/// The content of a regular file, or why it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Hashed {
        blake3: Blake3Hash,
        /// `None` for a file with large holes.
        sha256: Option<Sha256Hash>,
    },
    Unhashed(Unhashed),
}

/// Why a file's content was not hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unhashed {
    /// Not a regular file.
    NotRegular,
    /// Neither a program by its first bytes nor executable by its mode.
    NotAProgram,
    /// Larger than the setting `watch.max_hash_bytes`.
    Size,
    /// It could not be opened or read, or changed while it was read.
    Unreadable,
    /// It was gone before it could be read.
    Gone,
}

impl Unhashed {
    pub fn name(self) -> &'static str {
        match self {
            Unhashed::NotRegular => "not_regular",
            Unhashed::NotAProgram => "not_a_program",
            Unhashed::Size => "size",
            Unhashed::Unreadable => "unreadable",
            Unhashed::Gone => "gone",
        }
    }
}

/// Set-user-ID, set-group-ID.
pub const SETUID: u32 = 0o4000;
pub const SETGID: u32 = 0o2000;

/// One file as it was found: facts only.
#[derive(Clone, PartialEq, Eq)]
pub struct FileState {
    pub file_type: FileType,
    /// `Unknown` for anything that is not a regular file.
    pub format: Format,
    /// Permission bits with setuid, setgid and sticky (`st_mode & 0o7777`).
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// The raw `security.capability` xattr.
    pub capability: Option<Box<[u8]>>,
    pub content: Content,
    /// The inode has no name any more (`st_nlink == 0`).
    pub deleted: bool,
    pub could_change: CouldChange,
}

/// Whether the content, which was read after the execution, may differ from what was executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum CouldChange {
    #[default]
    No,
    /// The times of the file have changed since, and no proof is there that only its name did.
    Unproven,
    /// A process could write to the file.
    HadWriter,
}

impl CouldChange {
    pub fn is_possible(self) -> bool {
        self != CouldChange::No
    }
}

impl FileState {
    pub fn blake3(&self) -> Option<Blake3Hash> {
        match self.content {
            Content::Hashed { blake3, .. } => Some(blake3),
            Content::Unhashed(_) => None,
        }
    }

    /// Whether this file can be run: an ELF program or library, a kernel module, or an
    /// executable script. A mode bit alone does not make data a program.
    pub fn is_program(&self) -> bool {
        self.file_type == FileType::Regular && is_program(self.format, self.mode)
    }
}

/// Whether a regular file of this format and mode is a program.
pub fn is_program(format: Format, mode: u32) -> bool {
    match format {
        Format::Elf | Format::KernelModule => true,
        Format::Script => mode & 0o111 != 0,
        Format::ElfObject | Format::Data | Format::Empty | Format::Unknown => false,
    }
}

/// Whether running a file with this mode changes the user or group. Without the
/// group's execute bit, setgid once meant mandatory locking and grants nothing.
pub fn grants_identity(mode: u32) -> bool {
    mode & SETUID != 0 || mode & (SETGID | 0o010) == (SETGID | 0o010)
}

impl fmt::Debug for FileState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} {} {:04o} {}:{} {} bytes {:?}",
            self.file_type,
            self.format.name(),
            self.mode,
            self.uid,
            self.gid,
            self.size,
            self.content
        )?;
        if self.capability.is_some() {
            f.write_str(" with capabilities")?;
        }
        if self.deleted {
            f.write_str(" deleted")?;
        }
        if self.could_change.is_possible() {
            f.write_str(" that could change")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(e_type: u8) -> Vec<u8> {
        let mut head = b"\x7fELF\x02\x01\x01".to_vec();
        head.resize(16, 0);
        head.extend([e_type, 0]);
        head
    }

    #[test]
    fn only_elf_that_can_run_is_a_program() {
        assert_eq!(Format::sniff(&elf(2)), Format::Elf);
        assert_eq!(Format::sniff(&elf(3)), Format::Elf);
        assert_eq!(Format::sniff(&elf(1)), Format::ElfObject);
        assert_eq!(Format::sniff(&elf(4)), Format::ElfObject, "b20: a core dump is data");
        assert_eq!(Format::sniff(b"\x7fELF"), Format::Data);
        assert_eq!(Format::sniff(b"#!/bin/sh"), Format::Script);
        assert_eq!(Format::sniff(b""), Format::Empty);
    }

    #[test]
    fn a_mode_bit_alone_makes_no_program() {
        assert!(!is_program(Format::Data, 0o755), "b18");
        assert!(is_program(Format::Elf, 0o644));
        assert!(is_program(Format::KernelModule, 0o644), "w18");
        assert!(!is_program(Format::ElfObject, 0o755));
        assert!(is_program(Format::Script, 0o700));
        assert!(!is_program(Format::Script, 0o644));
    }

    #[test]
    fn setgid_without_group_execute_grants_nothing() {
        assert!(grants_identity(0o4755));
        assert!(grants_identity(0o2755));
        assert!(!grants_identity(0o2644));
    }
}
