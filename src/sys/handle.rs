//! File handles: the kernel's identifier of an inode, independent of the file's names.
//!
//! They are compared and never opened: to open one would bypass every directory above the
//! file.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

/// An inode of a filesystem.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FileHandle {
    filesystem: u64,
    kind: u32,
    bytes: Box<[u8]>,
}

impl FileHandle {
    pub fn new(filesystem: u64, kind: u32, bytes: &[u8]) -> FileHandle {
        FileHandle { filesystem, kind, bytes: bytes.into() }
    }

    /// The handle of an open file, as it is in fanotify's events.
    pub fn of(fd: impl AsFd) -> io::Result<FileHandle> {
        /// `struct file_handle` with room for the longest handle there is
        /// (`MAX_HANDLE_SZ`).
        #[repr(C)]
        struct Room {
            head: libc::file_handle,
            handle: [u8; 128],
        }
        let mut room = Room {
            head: libc::file_handle { handle_bytes: 128, handle_type: 0, f_handle: [] },
            handle: [0; 128],
        };
        let mut mount = 0;
        // SAFETY: the path is a C string. `room` has room for `handle_bytes` bytes directly
        // after its head (both have an alignment of at most 4, and the head is 8 bytes
        // long). `room` and `mount` live until after the call.
        let outcome = unsafe {
            libc::name_to_handle_at(
                fd.as_fd().as_raw_fd(),
                c"".as_ptr(),
                (&raw mut room).cast(),
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        let length = usize::try_from(room.head.handle_bytes).unwrap_or(usize::MAX);
        let bytes = room.handle.get(..length).ok_or(io::ErrorKind::InvalidData)?;
        let filesystem = rustix::fs::fstatvfs(fd)?.f_fsid;
        Ok(FileHandle::new(filesystem, room.head.handle_type.cast_unsigned(), bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_is_the_inodes_and_not_the_names() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| std::fs::File::open(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join("a"), "x").unwrap();
        std::fs::write(dir.path().join("b"), "x").unwrap();
        let before = FileHandle::of(open("a")).unwrap();
        assert_ne!(before, FileHandle::of(open("b")).unwrap());
        std::fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        assert_eq!(before, FileHandle::of(open("c")).unwrap());
    }
}
