//! Marks of a group: on filesystems, mounts, mount namespaces, directories and files.
//!
//! The caller has checked that no process or network serves what is marked: the kernel opens
//! the files of events, and could wait there.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use nix::sys::fanotify::{MarkFlags, MaskFlags};

use super::decode::FAN_PRE_ACCESS;
use super::group::Group;
use crate::sys::file;

// Linux 6.14, and not yet in libc.
const FAN_MARK_MNTNS: u32 = 0x110;
const FAN_MNT_ATTACH: u64 = 0x0100_0000;
const FAN_MNT_DETACH: u64 = 0x0200_0000;

impl Group {
    /// Marks a mount namespace, a file of `/proc/PID/ns`: its mounts are reported.
    pub(in crate::sys) fn mark_mount_namespace(&self, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let path = file::path_of(namespace);
        self.mark_at(FAN_MARK_MNTNS, FAN_MNT_ATTACH | FAN_MNT_DETACH, Path::new(&path))
    }

    /// Sets a mark of this `kind` on the object at `path`.
    pub(in crate::sys) fn mark_at(&self, kind: u32, mask: u64, path: &Path) -> io::Result<()> {
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::from_bits_retain(kind),
                MaskFlags::from_bits_retain(mask),
                nix::fcntl::AT_FDCWD,
                Some(path),
            )
            .map_err(io::Error::from)
    }

    /// Marks the whole filesystem that `directory` is on.
    pub fn mark_filesystem(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        // The empty path is not allowed; "." below an O_PATH descriptor means the same.
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM,
                MaskFlags::from_bits_retain(mask),
                directory,
                Some("."),
            )
            .map_err(io::Error::from)
    }

    /// Marks one file of the host. The mark stays when the file is renamed.
    pub fn mark_host_file(&self, path: &Path, mask: u64) -> io::Result<()> {
        self.fanotify
            .mark(
                MarkFlags::FAN_MARK_ADD,
                MaskFlags::from_bits_retain(mask),
                nix::fcntl::AT_FDCWD,
                Some(path),
            )
            .map_err(io::Error::from)
    }

    /// Marks one open directory. A second mark changes nothing.
    pub fn mark_directory(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.directory_mark(directory, MarkFlags::FAN_MARK_ADD, mask)
    }

    pub fn unmark_directory(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.directory_mark(directory, MarkFlags::FAN_MARK_REMOVE, mask)
    }

    fn directory_mark(
        &self,
        directory: BorrowedFd<'_>,
        action: MarkFlags,
        mask: u64,
    ) -> io::Result<()> {
        self.fanotify
            .mark(
                action | MarkFlags::FAN_MARK_ONLYDIR,
                MaskFlags::from_bits_retain(mask),
                directory,
                Some("."),
            )
            .map_err(io::Error::from)
    }
}

/// Marks on single inodes, by a descriptor.
impl Group {
    fn mark_object(&self, flags: MarkFlags, mask: u64, object: BorrowedFd<'_>) -> io::Result<()> {
        // Without a path, the mark is on the open file itself.
        let path: Option<&Path> = None;
        self.fanotify
            .mark(flags, MaskFlags::from_bits_retain(mask), object, path)
            .map_err(io::Error::from)
    }

    /// Marks the files directly in an open directory.
    pub fn mark_children(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_ONLYDIR;
        self.mark_object(flags, mask | libc::FAN_EVENT_ON_CHILD, directory)
    }

    pub fn unmark_children(&self, directory: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_REMOVE | MarkFlags::FAN_MARK_ONLYDIR;
        self.mark_object(flags, mask | libc::FAN_EVENT_ON_CHILD, directory)
    }

    /// Marks an open file.
    pub fn mark_file(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        self.mark_object(MarkFlags::FAN_MARK_ADD, mask, file)
    }

    /// From now on, reads of an open file wait for this group's answer. Files that were opened
    /// before are not asked about. The mark ends when the kernel drops the inode from its
    /// memory: so any number of files can be marked.
    pub fn guard(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_EVICTABLE;
        self.mark_object(flags, FAN_PRE_ACCESS, file)
    }

    /// From now on the group gets no events of `mask` for an open file, until the file is
    /// written to, or [`Group::flush`] removes the marks, or the kernel drops the inode from
    /// its memory, which the mark does not prevent.
    ///
    /// Sound only for a file that cannot change otherwise than by write(2), see
    /// docs/adr/0009.
    pub fn ignore(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD
            | MarkFlags::FAN_MARK_IGNORED_MASK
            | MarkFlags::FAN_MARK_EVICTABLE;
        self.mark_object(flags, mask, file)
    }

    /// The same as [`Group::ignore`], but a write does not end it.
    pub fn ignore_for_good(&self, file: BorrowedFd<'_>, mask: u64) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_ADD
            | MarkFlags::FAN_MARK_IGNORED_MASK
            | MarkFlags::FAN_MARK_IGNORED_SURV_MODIFY
            | MarkFlags::FAN_MARK_EVICTABLE;
        self.mark_object(flags, mask, file)
    }

    /// Removes every mark on an inode, those on directories too. Marks on filesystems and
    /// mounts stay.
    pub fn flush(&self) -> io::Result<()> {
        let path: Option<&Path> = None;
        self.fanotify
            .mark(MarkFlags::FAN_MARK_FLUSH, MaskFlags::empty(), nix::fcntl::AT_FDCWD, path)
            .map_err(io::Error::from)
    }
}
