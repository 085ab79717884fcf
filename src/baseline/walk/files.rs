//! Reads the files of a batch: attributes, format and content hash.
//!
//! Where the kernel allows it, reading changes neither a file's access time nor what the
//! node has in its page cache. Anything but a regular file or a directory is never opened.

use std::cell::RefCell;
use std::io::IoSliceMut;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, AtFlags, OFlags, Stat, fadvise, fstat, readlinkat, statat};
use rustix::io::{Errno, ReadWriteFlags};

use super::attributes::Attributes;
use super::batch::{Batch, BatchResult, Item};
use super::error::{EntryError, Error, WalkEnd};
use super::reading::{Moment, change_of, lock};
use super::walker::{ContentRead, Walk, open_below, relative};
use crate::baseline::layer::{Device, FileEntry, LayerEntry, parent_of};
use crate::model::{Blake3Hash, FileTime, FileType, Format, RootfsPath};
use crate::sys::map::any_cached;

/// How much of a file is read at once. Larger than a core's share of the cache
/// is slower; much smaller leaves BLAKE3 with less than it can do side by side.
pub(super) const BUFFER: usize = 128 * 1024;

thread_local! {
    static READ_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER].into());
}

/// Since Linux 6.14; rustix has no name for it. Pages that the read brings into the page
/// cache leave it again; pages that were there before stay.
pub(super) const RWF_DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

impl Walk<'_> {
    /// Reads what is in a batch; `None` if the walk is over.
    pub(super) fn read_batch(&self, batch: Batch) -> Option<BatchResult> {
        let mut read = BatchResult {
            entries: Vec::with_capacity(batch.items.len()),
            ..BatchResult::default()
        };
        let (mut files, mut bytes) = (0, 0);
        // Files are opened in their directory, which is opened for them once.
        let mut opened: Option<(RootfsPath, OwnedFd)> = None;
        for item in batch.items {
            let (path, regular, unchanged) = match item {
                Item::Directory { entry, changed } => {
                    read.entries.push(entry);
                    read.newest_change = read.newest_change.max(Some(changed));
                    continue;
                }
                Item::End { path, before } => {
                    read.ends.push((path, before));
                    continue;
                }
                Item::File { path, regular, unchanged } => (path, regular, unchanged),
            };
            if self.is_over() {
                return None;
            }
            let result = self.directory_of(&path, &mut opened).and_then(|directory| {
                let name = path.file_name();
                if regular {
                    self.read_regular(directory, name, &path, unchanged)
                } else {
                    read_special(directory, name, &path)
                }
            });
            match result {
                Ok((entry, changed)) => {
                    files += u64::from(regular);
                    if let LayerEntry::File(file) = &entry {
                        bytes += file.size;
                    }
                    read.entries.push(entry);
                    read.newest_change = read.newest_change.max(Some(changed));
                }
                Err(err) => {
                    let _: WalkEnd<Error> = self.fail(self.error(&path, err));
                    return None;
                }
            }
        }
        if let Some(progress) = self.progress {
            progress.files_done.fetch_add(files, Ordering::Relaxed);
            progress.bytes_done.fetch_add(bytes, Ordering::Relaxed);
        }
        Some(read)
    }

    /// The directory that holds `path`. It is opened, unless it is the one that was
    /// opened last.
    fn directory_of<'o>(
        &self,
        path: &RootfsPath,
        opened: &'o mut Option<(RootfsPath, OwnedFd)>,
    ) -> Result<BorrowedFd<'o>, EntryError> {
        let parent = parent_of(path.as_bytes()).unwrap_or(b"/");
        if opened.as_ref().is_none_or(|(known, _)| known.as_bytes() != parent) {
            let parent = path.parent().unwrap_or_else(RootfsPath::root);
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let directory = open_below(self.root.as_fd(), relative(&parent), flags)
                .map_err(EntryError::at("open"))?;
            *opened = Some((parent, directory));
        }
        opened.as_ref().map(|(_, directory)| directory.as_fd()).ok_or(EntryError::Changed)
    }

    fn read_regular(
        &self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        path: &RootfsPath,
        unchanged: bool,
    ) -> Result<(LayerEntry, FileTime), EntryError> {
        if unchanged && let Some(baseline) = &self.reading.unchanged {
            let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.map_err(EntryError::at("stat"))?;
            if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
                && let Some(file) = baseline.file(path, &stat)
            {
                let entry = FileEntry {
                    format: file.format,
                    blake3: file.blake3,
                    ..entry_of(path.clone(), FileType::Regular, &stat, file.capability)
                };
                return Ok((LayerEntry::File(entry), change_of(&stat)));
            }
        }
        let file = self.open(directory, name, OFlags::NONBLOCK).map_err(EntryError::at("open"))?;
        let stat = fstat(&file).map_err(EntryError::at("stat"))?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(EntryError::Changed);
        }
        let before = Moment::of(&stat);
        let attributes = Attributes::read(file.as_fd())?;
        if let Some(attribute) = attributes.unsupported {
            return Err(EntryError::Unsupported(attribute));
        }
        if attributes.whiteout && stat.st_size == 0 {
            return Ok((LayerEntry::Whiteout(path.clone()), before.changed));
        }
        let content = if stat.st_nlink <= 1 {
            self.hash(&file, &before)?
        } else {
            let inode = (before.device, before.inode);
            let read_before = lock(&self.links).get(&inode).copied();
            match read_before {
                Some((moment, content)) if moment == before => content,
                Some(_) => return Err(EntryError::Changed),
                None => {
                    let content = self.hash(&file, &before)?;
                    let mut links = lock(&self.links);
                    if links.len() < self.bounds.links {
                        links.insert(inode, (before, content));
                    }
                    content
                }
            }
        };
        let entry = FileEntry {
            format: content.format,
            blake3: Some(content.blake3),
            ..entry_of(path.clone(), FileType::Regular, &stat, attributes.capability)
        };
        Ok((LayerEntry::File(entry), before.changed))
    }

    fn hash(&self, file: &OwnedFd, before: &Moment) -> Result<ContentRead, EntryError> {
        let size = u64::try_from(before.size).unwrap_or(0);
        // Where reads cannot pass the page cache by, the file's pages are dropped
        // afterwards, unless some of them were in the cache before.
        let leave =
            self.uncached.load(Ordering::Relaxed) || any_cached(file.as_fd(), size).unwrap_or(true);
        let content = READ_BUFFER.with_borrow_mut(|buffer| {
            if size > BUFFER as u64 {
                // Advice only: without it the file is read all the same.
                let _ = fadvise(file, 0, None, Advice::Sequential);
            }
            let mut hasher = blake3::Hasher::new();
            let mut format = Format::Empty;
            let mut done = 0;
            while done < size {
                if self.is_over() {
                    // The walk is over: this result is not used.
                    return Err(EntryError::Changed);
                }
                if let Some(rate) = self.reading.rate {
                    rate.take((size - done).min(BUFFER as u64), self.stop);
                }
                let length = self.read(file, buffer, done)?;
                if length == 0 {
                    return Err(EntryError::Changed);
                }
                if done == 0 {
                    format = Format::sniff(&buffer[..length.min(Format::HEAD)]);
                }
                hasher.update(&buffer[..length]);
                done += length as u64;
            }
            Ok(ContentRead { blake3: Blake3Hash(*hasher.finalize().as_bytes()), format })
        })?;
        if !leave {
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
        // The end of the file was not read. If nothing was written, the size still holds.
        match fstat(file) {
            Ok(after) if Moment::of(&after) == *before => Ok(content),
            Ok(_) | Err(_) => Err(EntryError::Changed),
        }
    }

    /// Reads without evicting what the node has in its page cache: pages that were not
    /// in the cache before do not stay in it.
    fn read(&self, file: &OwnedFd, buffer: &mut [u8], offset: u64) -> Result<usize, EntryError> {
        let read = |buffer: &mut [u8], flags| {
            rustix::io::retry_on_intr(|| {
                rustix::io::preadv2(file, &mut [IoSliceMut::new(buffer)], offset, flags)
            })
        };
        let failed = |errno| EntryError::Failed("read", errno);
        if self.uncached.load(Ordering::Relaxed) {
            match read(buffer, RWF_DONTCACHE) {
                // The kernel is older, or the filesystem cannot do it.
                Err(Errno::OPNOTSUPP) => self.uncached.store(false, Ordering::Relaxed),
                result => return result.map_err(failed),
            }
        }
        read(buffer, ReadWriteFlags::empty()).map_err(failed)
    }
}

pub(super) fn entry_of(
    path: RootfsPath,
    file_type: FileType,
    stat: &Stat,
    capability: Option<Box<[u8]>>,
) -> FileEntry {
    FileEntry {
        path,
        file_type,
        format: Format::Unknown,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: match file_type {
            FileType::Regular | FileType::Symlink => u64::try_from(stat.st_size).unwrap_or(0),
            _ => 0,
        },
        blake3: None,
        capability,
        link_target: None,
        device: match file_type {
            FileType::CharDevice | FileType::BlockDevice => Some(Device {
                major: rustix::fs::major(stat.st_rdev),
                minor: rustix::fs::minor(stat.st_rdev),
            }),
            _ => None,
        },
    }
}

/// Reads a link, pipe, socket or device. None of these is ever opened.
fn read_special(
    directory: BorrowedFd<'_>,
    name: &[u8],
    path: &RootfsPath,
) -> Result<(LayerEntry, FileTime), EntryError> {
    let stat =
        statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(EntryError::at("stat"))?;
    let file_type = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        rustix::fs::FileType::Symlink => FileType::Symlink,
        rustix::fs::FileType::Fifo => FileType::Fifo,
        rustix::fs::FileType::Socket => FileType::Socket,
        rustix::fs::FileType::CharacterDevice => FileType::CharDevice,
        rustix::fs::FileType::BlockDevice => FileType::BlockDevice,
        rustix::fs::FileType::RegularFile
        | rustix::fs::FileType::Directory
        | rustix::fs::FileType::Unknown => return Err(EntryError::Changed),
    };
    let mut entry = entry_of(path.clone(), file_type, &stat, None);
    if entry.file_type == FileType::CharDevice
        && entry.device == Some(Device { major: 0, minor: 0 })
    {
        return Ok((LayerEntry::Whiteout(entry.path), change_of(&stat)));
    }
    if file_type == FileType::Symlink {
        let target = readlinkat(directory, name, Vec::new()).map_err(EntryError::at("read"))?;
        entry.link_target = Some(target.into_bytes().into());
    }
    Ok((LayerEntry::File(entry), change_of(&stat)))
}
