//! Visits the directories of a layer in the order of paths, and lists what is in them.
//!
//! One thread does this. Files are read elsewhere, in batches.

use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{AtFlags, RawDir, fstat, statat};

use super::attributes::Attributes;
use super::batch::{BATCH, Batch, Item};
use super::error::{EntryError, Error, WalkEnd};
use super::files::entry_of;
use super::names::{Kind, Names};
use super::reading::Moment;
use super::walker::{Walk, relative};
use crate::baseline::layer::{LayerEntry, MAX_PATH};
use crate::model::{FileType, RootfsPath, printable};

/// A directory that leads to the current place of the walk.
struct Visited {
    path: RootfsPath,
    before: Moment,
    unchanged: bool,
    names: Names,
    /// The last name that was taken.
    after: Vec<u8>,
    /// There are names that `names` does not hold.
    more: bool,
}

impl Walk<'_> {
    /// Visits all directories, in order, and passes what is in them to `dispatch`.
    pub(super) fn descend<E>(
        &self,
        mut dispatch: impl FnMut(Batch) -> Result<(), WalkEnd<E>>,
    ) -> Result<(), WalkEnd<E>> {
        let fail = |err| self.fail(err);
        let mut batch = Batch::default();
        let (root, entry) = self.enter(RootfsPath::root(), true).map_err(fail)?;
        batch.push(entry);
        let mut visited = vec![root];
        while let Some(current) = visited.last_mut() {
            if self.is_over() {
                return Err(WalkEnd::Failed);
            }
            if batch.items.len() >= BATCH {
                dispatch(std::mem::take(&mut batch))?;
            }
            let Some((name, kind)) = current.names.pop() else {
                if current.more {
                    self.list_again(current).map_err(fail)?;
                } else if let Some(Visited { path, before, .. }) = visited.pop() {
                    batch.push(Item::End { path, before });
                }
                continue;
            };
            let path = self.child(&current.path, name).map_err(fail)?;
            current.after.clear();
            current.after.extend_from_slice(name);
            match kind {
                Kind::Regular | Kind::Special => {
                    let (regular, unchanged) = (kind == Kind::Regular, current.unchanged);
                    batch.push(Item::File { path, regular, unchanged });
                }
                Kind::Directory => {
                    let (directory, entry) = self.enter(path, current.unchanged).map_err(fail)?;
                    batch.push(entry);
                    visited.push(directory);
                    forget_names(&mut visited, self.bounds.all_names);
                }
            }
        }
        dispatch(batch)
    }

    /// Reads a directory's own attributes and its names.
    fn enter(&self, path: RootfsPath, unchanged: bool) -> Result<(Visited, Item), Error> {
        let at = |err| self.error(&path, err);
        let directory = self.open_directory(&path).map_err(at)?;
        let stat = fstat(&directory).map_err(EntryError::at("stat")).map_err(at)?;
        let attributes = Attributes::read(directory.as_fd()).map_err(at)?;
        if let Some(attribute) = attributes.unsupported {
            return Err(at(EntryError::Unsupported(attribute)));
        }
        let entry = entry_of(path.clone(), FileType::Directory, &stat, attributes.capability);
        let entry = if attributes.opaque {
            LayerEntry::OpaqueDirectory(entry)
        } else {
            LayerEntry::File(entry)
        };
        let (names, more) = self.list(&path, &directory, &[])?;
        let before = Moment::of(&stat);
        let changed = before.changed;
        // A directory changes when something in it is added, removed or renamed.
        let since = self.reading.unchanged.map(|baseline| baseline.since);
        let unchanged = unchanged && since.is_some_and(|since| changed <= since);
        let visited = Visited { path, before, unchanged, names, after: Vec::new(), more };
        Ok((visited, Item::Directory { entry, changed }))
    }

    /// Lists the names that follow those used up.
    fn list_again(&self, current: &mut Visited) -> Result<(), Error> {
        let at = |err| self.error(&current.path, err);
        let directory = self.open_directory(&current.path).map_err(at)?;
        let now = fstat(&directory).map_err(EntryError::at("stat")).map_err(at)?;
        if Moment::of(&now) != current.before {
            return Err(at(EntryError::Changed));
        }
        (current.names, current.more) = self.list(&current.path, &directory, &current.after)?;
        Ok(())
    }

    /// The first names after `after`, and whether there are more.
    fn list(
        &self,
        path: &RootfsPath,
        directory: &OwnedFd,
        after: &[u8],
    ) -> Result<(Names, bool), Error> {
        let at = |err| self.error(path, err);
        let mut found = Names::default();
        // The names from here on are listed again later.
        let mut end: Option<Vec<u8>> = None;
        let mut buffer: Vec<u8> = Vec::with_capacity(32 * 1024);
        let mut names = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = names.next() {
            let entry = entry.map_err(EntryError::at("list")).map_err(at)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..")
                || (!after.is_empty() && name <= after)
                || end.as_deref().is_some_and(|end| name >= end)
            {
                continue;
            }
            let file_type = match entry.file_type() {
                rustix::fs::FileType::Unknown => {
                    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
                    let stat = stat.map_err(EntryError::at("stat")).map_err(at)?;
                    rustix::fs::FileType::from_raw_mode(stat.st_mode)
                }
                listed => listed,
            };
            let kind = match file_type {
                file_type if file_type.is_dir() => Kind::Directory,
                file_type if file_type.is_file() => Kind::Regular,
                _ => Kind::Special,
            };
            found.push(name, kind);
            if found.left.len() > 1 && found.memory() > 2 * self.bounds.names {
                if self.is_over() {
                    return Err(at(EntryError::Changed));
                }
                found.sort();
                let middle = found.left[found.left.len() / 2 - 1];
                end = Some(found.name(middle).to_vec());
                found.halve();
            }
        }
        found.sort();
        Ok((found, end.is_some()))
    }

    fn child(&self, path: &RootfsPath, name: &[u8]) -> Result<RootfsPath, Error> {
        let child = path.join(name).ok();
        child
            .filter(|child| child.as_bytes().len() <= MAX_PATH && child.file_name() == name)
            .ok_or_else(|| Error::Name {
                directory: self.directory.into(),
                path: path.clone(),
                name: printable(name),
            })
    }

    /// Fails if a directory has changed since it was listed: a file may have been added
    /// that the walk has not read.
    pub(super) fn check_unchanged(&self, path: &RootfsPath, before: &Moment) -> Result<(), Error> {
        match statat(&self.root, relative(path), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(after) if Moment::of(&after) == *before => Ok(()),
            Ok(_) | Err(_) => Err(self.error(path, EntryError::Changed)),
        }
    }
}

/// Drops names until they take no more than `most` bytes. The directories that are
/// farthest from the current place of the walk lose theirs first.
fn forget_names(visited: &mut [Visited], most: usize) {
    let mut memory: usize = visited.iter().map(|directory| directory.names.memory()).sum();
    for directory in visited {
        if memory <= most {
            return;
        }
        if !directory.names.left.is_empty() {
            memory -= directory.names.memory();
            directory.names = Names::default();
            directory.more = true;
        }
    }
}
