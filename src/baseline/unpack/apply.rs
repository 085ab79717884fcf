//! Takes the entries of an archive in, one after the other, as containerd does.

use std::collections::HashMap;

use super::path::{clean, split};
use super::refusal::{Refusal, refuse};
use super::tree::{Child, Content, Directory, Inode, Kind, Link, Owner, Recent, Tree};
use crate::baseline::layer::{Device, MAX_PATH};
use crate::baseline::tar::{Header, flag};
use crate::model::printable;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

impl Tree {
    /// Takes one entry in, as it comes.
    pub(crate) fn apply(
        &mut self,
        header: Header,
        content: Option<Content>,
    ) -> Result<(), Refusal> {
        let capability = header.capability.as_ref().map_or(0, |capability| capability.len());
        self.count(header.name.len() + header.link.len() + capability)?;
        let name = clean(&header.name);
        if name.contains(&0) || header.link.contains(&0) {
            return refuse(&name, "has a NUL byte in its name or target");
        }
        let (directory, base) = split(&name);
        if let b"" | b"." | b".." = base {
            // The root, under one of its names.
            return Ok(());
        }
        let parent = self.directory_for(directory)?;
        if base == OPAQUE {
            if !std::mem::replace(&mut self.directories[parent].opaque, true) {
                self.note_if_emptied(parent, &name);
            }
            return Ok(());
        }
        if let Some(original) = base.strip_prefix(WHITEOUT) {
            if let b"" | b"." | b".." = original {
                return refuse(&name, "is a whiteout of no name");
            }
            return self.put(parent, &name, original, Child::Whiteout);
        }
        self.apply_file(header, content, parent, &name)
    }

    /// The directory that a name's first part leads to; it is made if it does not exist.
    fn directory_for(&mut self, directory: &[u8]) -> Result<usize, Refusal> {
        let (parent, length) = match &self.recent {
            Some(recent) if recent.name == directory => (recent.directory, recent.length),
            Some(_) | None => {
                let path = self.resolve(directory)?;
                let parent = self.make_directories(&path)?;
                let name = directory.to_vec();
                self.recent = Some(Recent { name, directory: parent, length: path.len() });
                (parent, path.len())
            }
        };
        // A short name may lead to a long path through a symlink.
        self.names += length as u64;
        Ok(parent)
    }

    /// Takes in an entry that is no mark of a whiteout or of an opaque directory.
    fn apply_file(
        &mut self,
        header: Header,
        content: Option<Content>,
        parent: usize,
        name: &[u8],
    ) -> Result<(), Refusal> {
        let (_, base) = split(name);
        let existing = self.directories[parent].children.get(base).copied();
        let owner = Owner {
            // The kernel keeps only twelve bits of a mode, and 32 of an ID.
            mode: low(header.mode) & 0o7777,
            uid: low(header.uid),
            gid: low(header.gid),
        };
        let capability = match &header.capability {
            None => None,
            Some(raw) => match as_the_kernel_returns(raw) {
                None => return refuse(name, "has a security.capability that no kernel takes"),
                returned => returned,
            },
        };
        let kind = match (header.flag, content) {
            (flag::DIRECTORY, _) => {
                if let Some(Child::Directory(directory)) = existing {
                    let directory = &mut self.directories[directory];
                    directory.owner = owner.over(directory.owner);
                    directory.implied = None;
                    directory.capability = capability.or(directory.capability.take());
                    return Ok(());
                }
                self.directories.push(Directory {
                    owner: owner.over(Owner::default()),
                    capability,
                    opaque: false,
                    implied: None,
                    children: HashMap::new(),
                });
                let child = Child::Directory(self.directories.len() - 1);
                return self.put(parent, name, base, child);
            }
            // It removes what is at its name, and puts nothing there.
            (flag::PAX_GLOBAL, _) => {
                self.remove(parent, base);
                return Ok(());
            }
            (flag::LINK, _) => {
                // What is at its name is removed first, so that no link names itself.
                self.remove(parent, base);
                let child = self.link(name, &header.link, owner, capability)?;
                return self.put(parent, name, base, child);
            }
            (flag::REGULAR | flag::GNU_SPARSE, Some(content)) => Kind::Regular(content),
            (flag::SYMLINK, _) => {
                if header.link.is_empty() || header.link.len() >= MAX_PATH {
                    return refuse(name, "is a symlink without a target, or with one too long");
                }
                let over_directory = matches!(existing, Some(Child::Directory(_)));
                Kind::Symlink { target: header.link.into(), over_directory }
            }
            (flag::CHARACTER, _) => match device(&header.name, header.major, header.minor)? {
                // overlayfs takes such a device for a whiteout, wherever it comes from.
                Device { major: 0, minor: 0 } => {
                    return self.put(parent, name, base, Child::Whiteout);
                }
                device => Kind::Character(device),
            },
            (flag::BLOCK, _) => Kind::Block(device(&header.name, header.major, header.minor)?),
            (flag::FIFO, _) => Kind::Fifo,
            _ => return refuse(name, "is of a type that containerd does not unpack"),
        };
        self.inodes.push(Inode { owner: owner.over(Owner::default()), capability, kind });
        self.put(parent, name, base, Child::Inode(self.inodes.len() - 1))
    }

    /// What a hard link becomes.
    fn link(
        &mut self,
        name: &[u8],
        target: &[u8],
        owner: Owner,
        capability: Option<Box<[u8]>>,
    ) -> Result<Child, Refusal> {
        let (directory, base) = split(target);
        let mut path = self.resolve(directory)?;
        // `..` as the last part leads to the directory above, and no higher than the root.
        path = clean(&[&path[..], b"/", base].concat());
        match self.child(&path) {
            Some(Child::Inode(number)) => {
                let inode = &mut self.inodes[number];
                inode.owner = owner.over(inode.owner);
                // A change of the owner removes the capabilities.
                inode.capability = capability;
                self.names += inode.target_length();
                Ok(Child::Inode(number))
            }
            Some(Child::Whiteout) => Ok(Child::Whiteout),
            Some(Child::Directory(_)) => refuse(name, "is a hard link to a directory"),
            Some(Child::Link(_)) | None => {
                if path == b"/" {
                    return refuse(name, "is a hard link to a directory");
                }
                self.links.push(Link { target: path, owner, capability });
                Ok(Child::Link(self.links.len() - 1))
            }
        }
    }

    /// Notes an opaque mark that removes files of this archive. In a bottom layer containerd
    /// removes at an opaque mark what the archive has not named: also a directory that it
    /// only implies, with all that was unpacked in it.
    fn note_if_emptied(&mut self, directory: usize, marker: &[u8]) {
        let mut open = vec![directory];
        while let Some(number) = open.pop() {
            for child in self.directories[number].children.values() {
                let Child::Directory(child) = child else { continue };
                if self.directories[*child].implied.is_some() {
                    self.emptied_at_bottom.get_or_insert_with(|| printable(marker));
                    return;
                }
                open.push(*child);
            }
        }
    }
}

/// The lower 32 bits: those that reach the kernel.
fn low(number: i64) -> u32 {
    let [a, b, c, d, ..] = number.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// mknod(2) keeps twelve bits of the major and twenty of the minor number.
fn device(name: &[u8], major: i64, minor: i64) -> Result<Device, Refusal> {
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) => Ok(Device { major: major & 0xfff, minor: minor & 0xf_ffff }),
        _ => refuse(name, "is a device with a number that no device has"),
    }
}

/// A `security.capability` as the kernel returns it. That of the first user namespace's
/// root comes in the shorter form (`struct vfs_cap_data`), also if the longer was written.
/// `None`: the kernel refuses to write it.
fn as_the_kernel_returns(raw: &[u8]) -> Option<Box<[u8]>> {
    const REVISION_2: u32 = 0x0200_0000;
    const REVISION_3: u32 = 0x0300_0000;
    const EFFECTIVE: u32 = 1;
    let (magic, rest) = raw.split_first_chunk::<4>()?;
    let magic = u32::from_le_bytes(*magic);
    match (magic & !EFFECTIVE, rest.len()) {
        (REVISION_2, 16) => Some(raw.into()),
        (REVISION_3, 20) if rest[16..] == [0; 4] => {
            let magic = REVISION_2 | magic & EFFECTIVE;
            Some([&magic.to_le_bytes(), &rest[..16]].concat().into())
        }
        (REVISION_3, 20) => Some(raw.into()),
        _ => None,
    }
}
