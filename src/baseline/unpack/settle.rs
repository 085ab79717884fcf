//! Makes a layer's entries of the tree, once the layers below are known.
//!
//! The layers below decide the owner and mode of directories that the archive does not
//! name, and may hold the targets of hard links.

use std::collections::HashSet;

use super::follow::{AtPath, follow};
use super::path::rootfs_path;
use super::refusal::{Refusal, refuse};
use super::tree::{Child, Inode, Kind, Owner, Tree};
use crate::baseline::layer::{FileEntry, LayerBaseline, LayerEntry, MAX_PATH, Record};
use crate::baseline::merge::ImageBaseline;
use crate::model::{FileType, RootfsPath};

impl Tree {
    /// The directories that the archive does not name.
    pub(crate) fn implied(&self) -> Result<HashSet<RootfsPath>, Refusal> {
        let mut implied = HashSet::new();
        let mut open = vec![(0, b"/".to_vec())];
        while let Some((number, path)) = open.pop() {
            let directory = &self.directories[number];
            for (name, child) in &directory.children {
                let Child::Directory(child) = child else { continue };
                open.push((*child, below_directory(&path, name)));
            }
            if directory.implied.is_some() {
                implied.insert(rootfs_path(&path)?);
            }
        }
        Ok(implied)
    }

    /// The layer's entries in no order, made for the layers that this one lies on.
    pub(crate) fn settle(
        mut self,
        below: Option<&ImageBaseline>,
    ) -> Result<Vec<LayerEntry>, Refusal> {
        if let (None, Some(marker)) = (below, &self.emptied_at_bottom) {
            return Err(Refusal::Entry {
                path: marker.clone(),
                why: "marks a directory of the lowest layer opaque after it was filled; what containerd leaves of it is not known",
            });
        }
        let links = self.settle_links(below)?;
        let mut entries = Vec::with_capacity(self.directories.len() + self.inodes.len());
        // Directories with their paths and their parents' owners.
        let mut open = vec![(0, b"/".to_vec(), Owner::default())];
        while let Some((number, path, above)) = open.pop() {
            let children = std::mem::take(&mut self.directories[number].children);
            let (entry, owner) = self.settle_directory(number, &path, above, below)?;
            entries.push(entry);
            for (name, child) in children {
                let path = below_directory(&path, &name);
                if path.len() > MAX_PATH {
                    return refuse(&path, "is longer than 4096 bytes");
                }
                match child {
                    Child::Directory(number) => open.push((number, path, owner)),
                    Child::Inode(number) => entries.push(self.inodes[number].entry(&path)?),
                    Child::Whiteout => entries.push(LayerEntry::Whiteout(rootfs_path(&path)?)),
                    Child::Link(number) => {
                        entries.push(self.settle_link(number, &links[number], &path)?);
                    }
                }
            }
        }
        Ok(entries)
    }

    /// One directory's entry, and its owner, which directories in it may inherit.
    fn settle_directory(
        &mut self,
        number: usize,
        path: &[u8],
        above: Owner,
        below: Option<&ImageBaseline>,
    ) -> Result<(LayerEntry, Owner), Refusal> {
        let directory = &mut self.directories[number];
        if let Some(implied) = directory.implied {
            let known = if implied.fresh { None } else { implied_below(below, path) };
            match known {
                Some((owner, capability)) => {
                    directory.owner = owner;
                    directory.capability = capability;
                }
                None => {
                    let inherited = if above.mode & 0o2000 != 0 { above.gid } else { 0 };
                    directory.owner.gid = implied.group.unwrap_or(inherited);
                }
            }
        }
        let owner = directory.owner;
        let entry = FileEntry {
            capability: directory.capability.take(),
            ..owner.entry(path, FileType::Directory)?
        };
        let entry = if directory.opaque {
            LayerEntry::OpaqueDirectory(entry)
        } else {
            LayerEntry::File(entry)
        };
        Ok((entry, owner))
    }

    /// The entry of a hard link whose target came after it, or is in a layer below.
    fn settle_link(
        &mut self,
        number: usize,
        target: &Target,
        path: &[u8],
    ) -> Result<LayerEntry, Refusal> {
        Ok(match target {
            Target::Inode(number) => {
                self.count_again(self.inodes[*number].target_length())?;
                self.inodes[*number].entry(path)?
            }
            Target::Whiteout => LayerEntry::Whiteout(rootfs_path(path)?),
            Target::Below(entry) => {
                let target = entry.link_target.as_ref().map_or(0, |target| target.len());
                self.count_again(target as u64)?;
                let link = &self.links[number];
                let owner =
                    link.owner.over(Owner { mode: entry.mode, uid: entry.uid, gid: entry.gid });
                let keeps_mode = entry.file_type == FileType::Symlink;
                LayerEntry::File(FileEntry {
                    path: rootfs_path(path)?,
                    mode: if keeps_mode { entry.mode } else { owner.mode },
                    uid: owner.uid,
                    gid: owner.gid,
                    capability: match entry.file_type {
                        FileType::Regular => link.capability.clone(),
                        _ => None,
                    },
                    ..(**entry).clone()
                })
            }
            Target::Unknown => {
                return refuse(path, "is a hard link to a file that is not there");
            }
        })
    }

    /// The targets of the hard links that came before their targets.
    fn settle_links(&self, below: Option<&ImageBaseline>) -> Result<Vec<Target>, Refusal> {
        let mut targets: Vec<Option<Target>> = vec![None; self.links.len()];
        for first in 0..self.links.len() {
            // A link may lead to a link to a link: each is resolved once.
            let mut chain = Vec::new();
            let mut next = first;
            let target = loop {
                if let Some(target) = &targets[next] {
                    break target.clone();
                }
                // A circle of links ends here.
                targets[next] = Some(Target::Unknown);
                chain.push(next);
                let path = &self.links[next].target;
                match self.child(path) {
                    Some(Child::Inode(number)) => break Target::Inode(number),
                    Some(Child::Whiteout) => break Target::Whiteout,
                    Some(Child::Directory(_)) => {
                        return refuse(path, "is a directory, and a hard link's target");
                    }
                    Some(Child::Link(link)) => next = link,
                    None => {
                        let at_path = below.zip(RootfsPath::new(path).ok());
                        let found = at_path.and_then(|(below, path)| below.get(&path));
                        break match found.map(|found| found.entry) {
                            Some(entry) if entry.file_type != FileType::Directory => {
                                Target::Below(Box::new(entry))
                            }
                            Some(_) | None => Target::Unknown,
                        };
                    }
                }
            };
            for link in chain {
                targets[link] = Some(target.clone());
            }
        }
        Ok(targets.into_iter().map(|target| target.unwrap_or(Target::Unknown)).collect())
    }
}

/// The target of a hard link that came before its target.
#[derive(Clone, Debug)]
enum Target {
    Inode(usize),
    Below(Box<FileEntry>),
    Whiteout,
    Unknown,
}

impl Owner {
    fn entry(self, path: &[u8], file_type: FileType) -> Result<FileEntry, Refusal> {
        Ok(FileEntry {
            file_type,
            uid: self.uid,
            gid: self.gid,
            ..FileEntry::directory(rootfs_path(path)?, self.mode)
        })
    }
}

impl Inode {
    fn entry(&self, path: &[u8]) -> Result<LayerEntry, Refusal> {
        let of = |file_type| self.owner.entry(path, file_type);
        Ok(LayerEntry::File(match &self.kind {
            Kind::Regular(content) => FileEntry {
                format: content.format,
                size: content.size,
                blake3: Some(content.blake3),
                capability: self.capability.clone(),
                ..of(FileType::Regular)?
            },
            Kind::Symlink { target, .. } => FileEntry {
                // A link has no mode of its own on Linux.
                mode: 0o777,
                size: target.len() as u64,
                link_target: Some(target.clone()),
                ..of(FileType::Symlink)?
            },
            Kind::Character(device) => {
                FileEntry { device: Some(*device), ..of(FileType::CharDevice)? }
            }
            Kind::Block(device) => {
                FileEntry { device: Some(*device), ..of(FileType::BlockDevice)? }
            }
            Kind::Fifo => of(FileType::Fifo)?,
        }))
    }
}

/// The owner and the capability that the layers below have for a directory that this
/// layer only implies. Each layer is searched alone, from the top, and its own symlinks
/// are followed. The first that has something there decides.
fn implied_below(below: Option<&ImageBaseline>, path: &[u8]) -> Option<(Owner, Option<Box<[u8]>>)> {
    if path == b"/" {
        let root = below?.get(&RootfsPath::root())?.entry;
        return Some((Owner { mode: 0o755, uid: root.uid, gid: root.gid }, None));
    }
    for layer in below?.layer_baselines().rev() {
        let at_path = |path: &[u8]| Ok(at_path_in(layer, path));
        let Ok((resolved, _)) = follow(path, at_path, &mut 0) else { return None };
        let Some(record) = RootfsPath::new(&resolved).ok().and_then(|path| layer.get(&path)) else {
            continue;
        };
        return match record.to_entry() {
            LayerEntry::File(entry) | LayerEntry::OpaqueDirectory(entry)
                if entry.file_type == FileType::Directory =>
            {
                let owner = Owner { mode: entry.mode, uid: entry.uid, gid: entry.gid };
                Some((owner, entry.capability))
            }
            LayerEntry::File(_) | LayerEntry::OpaqueDirectory(_) | LayerEntry::Whiteout(_) => None,
        };
    }
    None
}

fn at_path_in(layer: &LayerBaseline, path: &[u8]) -> AtPath {
    let record = RootfsPath::new(path).ok().and_then(|path| layer.get(&path));
    match record.map(Record::to_entry) {
        None => AtPath::Nothing,
        Some(LayerEntry::File(FileEntry { link_target: Some(target), .. })) => {
            AtPath::Symlink(target)
        }
        Some(_) => AtPath::Other,
    }
}

fn below_directory(directory: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = directory.to_vec();
    if path != b"/" {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}
