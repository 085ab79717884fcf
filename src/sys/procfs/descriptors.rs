//! What a process has open, by the links below `/proc/PID/fd`.
//!
//! Nothing here opens a file for reading, or asks a filesystem that a process serves.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;

use super::handle::Handle;
use super::status::field;
use crate::model::FileType;
use crate::sys::file;

/// What a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// By its inode, of any family.
    Socket(u64),
    /// A pipe, or a FIFO.
    Pipe {
        device: u64,
        inode: u64,
    },
    /// A pseudo-terminal, by its number in its instance of devpts.
    Terminal(u32),
    /// The master side of a pseudo-terminal, by the same number: what is written to it is
    /// the terminal's input.
    TerminalMaster(u32),
    Other,
}

/// `/dev/ptmx` (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);

fn terminal_number((major, minor): (u32, u32)) -> Option<u32> {
    // Once eight major numbers had 256 terminals each; today all terminals have the first.
    (136..=143).contains(&major).then(|| (major - 136) * 256 + minor)
}

impl Handle {
    /// Opens the file of one of its descriptors, as O_PATH.
    pub fn open_descriptor(&self, number: u32) -> io::Result<OwnedFd> {
        self.open_link(&format!("fd/{number}"))
    }

    /// What one of its descriptors refers to, without opening it.
    pub fn descriptor(&self, number: u32) -> io::Result<Descriptor> {
        let path = format!("/proc/{}/fd/{number}", self.process.pid);
        let link = std::fs::read_link(&path)?;
        Ok(match Descriptor::parse(link.as_os_str().as_bytes()) {
            Some(descriptor) => descriptor,
            // `stat_path` returns what the kernel knows: a filesystem that a process serves
            // must not be asked.
            None => self.named_descriptor(number, &file::stat_path(&path)?),
        })
    }

    /// A descriptor of a file that has a name in a filesystem.
    fn named_descriptor(&self, number: u32, stat: &file::Stat) -> Descriptor {
        let terminal = terminal_number(stat.node);
        match stat.file_type {
            FileType::Fifo => Descriptor::Pipe { device: stat.device, inode: stat.inode },
            FileType::CharDevice if stat.node == PTMX => {
                self.terminal_of(number).map_or(Descriptor::Other, Descriptor::TerminalMaster)
            }
            FileType::CharDevice => terminal.map_or(Descriptor::Other, Descriptor::Terminal),
            _ => Descriptor::Other,
        }
    }

    /// The number of the terminal that belongs to this descriptor of `/dev/ptmx` (Linux
    /// 4.14).
    fn terminal_of(&self, number: u32) -> Option<u32> {
        let info = self.read(&format!("fdinfo/{number}"), 4096).ok()?;
        field(&info, "tty-index:")?.parse().ok()
    }

    /// Whether one of its descriptors is a terminal. `None` if it has no such descriptor.
    pub fn is_terminal(&self, number: u32) -> Option<bool> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.process.pid)).ok()?;
        let name = link.as_os_str().as_bytes();
        Some(name.starts_with(b"/dev/pts/") || name == b"/dev/console")
    }

    /// The numbers of its descriptors, at most `limit`.
    pub fn descriptors(&self, limit: usize) -> io::Result<Vec<u32>> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.process.pid))?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .take(limit)
            .collect())
    }

    /// The kernel's name for the file of one of its descriptors.
    pub fn descriptor_name(&self, number: u32) -> io::Result<Vec<u8>> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.process.pid))?;
        Ok(link.into_os_string().into_vec())
    }

    /// Whether a descriptor can be read from, and written to: by the mode of its link,
    /// because to read `fdinfo` the kernel would ask the open file.
    pub fn access(&self, number: u32) -> io::Result<(bool, bool)> {
        let link = std::fs::symlink_metadata(format!("/proc/{}/fd/{number}", self.process.pid))?;
        Ok((link.mode() & 0o400 != 0, link.mode() & 0o200 != 0))
    }
}

impl Descriptor {
    /// Reads the link of a descriptor. `None` for a file with a name, and for other files
    /// without one.
    fn parse(link: &[u8]) -> Option<Descriptor> {
        // These texts are not absolute paths, so no file can have them as a name.
        let number = |prefix: &[u8]| {
            str::from_utf8(link.strip_prefix(prefix)?.strip_suffix(b"]")?).ok()?.parse().ok()
        };
        if let Some(inode) = number(b"socket:[") {
            return Some(Descriptor::Socket(inode));
        }
        // All pipes without a name are on one filesystem.
        number(b"pipe:[").map(|inode| Descriptor::Pipe { device: 0, inode })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_known_by_their_links() {
        assert_eq!(Descriptor::parse(b"socket:[17]"), Some(Descriptor::Socket(17)));
        let pipe = Descriptor::Pipe { device: 0, inode: 18 };
        assert_eq!(Descriptor::parse(b"pipe:[18]"), Some(pipe));
        assert_eq!(Descriptor::parse(b"/tmp/socket:[17]"), None);
        assert_eq!(Descriptor::parse(b"anon_inode:[eventfd]"), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_descriptor_or_none(link: Vec<u8>) {
            let _ = Descriptor::parse(&link);
        }
    }
}
