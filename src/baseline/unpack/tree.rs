//! The tree that is being made: directories, files, hard links, and what they cost.
//!
//! Plain data and its counters. `apply` takes entries in, `settle` makes a layer of the
//! tree.

use std::collections::HashMap;

use super::path::components;
use super::refusal::{MAX_NAMES, Refusal, refuse};
use crate::baseline::layer::{Device, MAX_PATH};
use crate::model::{Blake3Hash, Format};

/// The longest name of one file, as on every file system of Linux.
const MAX_NAME: usize = 255;

/// A regular file's content.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content {
    pub(crate) blake3: Blake3Hash,
    pub(crate) format: Format,
    pub(crate) size: u64,
}

#[derive(Debug)]
pub(crate) struct Tree {
    /// The first is the root.
    pub(super) directories: Vec<Directory>,
    pub(super) inodes: Vec<Inode>,
    pub(super) links: Vec<Link>,
    /// The number of entries and of the directories that they imply.
    pub(super) entries: u64,
    pub(super) max_entries: u64,
    /// How many bytes all names take; at most [`MAX_NAMES`].
    pub(super) names: u64,
    /// How many bytes of paths were examined to follow symlinks.
    pub(super) followed: u64,
    /// The directory that received the entry before.
    pub(super) recent: Option<Recent>,
    /// Names of directories that led through symlinks, and the paths they led to.
    pub(super) through_symlinks: HashMap<Vec<u8>, Vec<u8>>,
    /// The opaque mark by which a bottom layer loses files that this tree keeps.
    pub(super) emptied_at_bottom: Option<String>,
}

#[derive(Debug)]
pub(super) struct Recent {
    /// The directory's name in the entry.
    pub(super) name: Vec<u8>,
    pub(super) directory: usize,
    /// The length of its path.
    pub(super) length: usize,
}

/// What a directory holds at a name.
#[derive(Clone, Copy, Debug)]
pub(super) enum Child {
    Directory(usize),
    Inode(usize),
    Link(usize),
    Whiteout,
}

#[derive(Debug)]
pub(super) struct Directory {
    pub(super) owner: Owner,
    pub(super) capability: Option<Box<[u8]>>,
    pub(super) opaque: bool,
    /// Set if the archive names it only in paths below it. The layers below may have its
    /// owner and mode.
    pub(super) implied: Option<Implied>,
    pub(super) children: HashMap<Box<[u8]>, Child>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Implied {
    /// A whiteout was at its name before, so the layers below have nothing there.
    pub(super) fresh: bool,
    /// The group that it has if the layers below have no such directory. `None`: its
    /// parent, which is implied too, decides.
    pub(super) group: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// Everything that is no directory. Hard links share one.
#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) owner: Owner,
    pub(super) capability: Option<Box<[u8]>>,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Regular(Content),
    Symlink {
        target: Box<[u8]>,
        /// A directory was at its name before, and names may have led through it.
        over_directory: bool,
    },
    Character(Device),
    Block(Device),
    Fifo,
}

/// A hard link whose target has not come yet.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) target: Vec<u8>,
    pub(super) owner: Owner,
    pub(super) capability: Option<Box<[u8]>>,
}

impl Tree {
    pub(crate) fn new(max_entries: u64) -> Tree {
        let root = Directory {
            // The snapshotter makes it; the archive's entry for it counts for nothing.
            owner: Owner { mode: 0o755, uid: 0, gid: 0 },
            capability: None,
            opaque: false,
            implied: Some(Implied { fresh: false, group: Some(0) }),
            children: HashMap::new(),
        };
        Tree {
            directories: vec![root],
            inodes: Vec::new(),
            links: Vec::new(),
            entries: 0,
            max_entries,
            names: 0,
            followed: 0,
            recent: None,
            through_symlinks: HashMap::new(),
            emptied_at_bottom: None,
        }
    }

    /// Counts one more entry, whose names take `bytes`.
    pub(super) fn count(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.entries += 1;
        self.names += bytes as u64;
        if self.entries > self.max_entries {
            return Err(Refusal::Entries);
        }
        if self.names > MAX_NAMES { Err(Refusal::Names) } else { Ok(()) }
    }

    /// Counts a link target that one more name repeats.
    pub(super) fn count_again(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.names += bytes;
        if self.names > MAX_NAMES { Err(Refusal::Names) } else { Ok(()) }
    }

    pub(super) fn put(
        &mut self,
        parent: usize,
        path: &[u8],
        base: &[u8],
        child: Child,
    ) -> Result<(), Refusal> {
        if base.len() > MAX_NAME {
            return refuse(path, "has a name of more than 255 bytes");
        }
        if self.directories[parent].children.insert(base.into(), child).is_some() {
            self.forget_recent();
        }
        Ok(())
    }

    /// Once an entry is removed or replaced, the same name may lead elsewhere.
    fn forget_recent(&mut self) {
        self.recent = None;
    }

    pub(super) fn remove(&mut self, parent: usize, base: &[u8]) {
        if self.directories[parent].children.remove(base).is_some() {
            self.forget_recent();
        }
    }

    /// The directory at `path`, which leads through no symlink. It and the directories that
    /// lead to it are made if they do not exist.
    pub(super) fn make_directories(&mut self, path: &[u8]) -> Result<usize, Refusal> {
        let mut parent = 0;
        let mut end = 0;
        for name in components(path) {
            end += 1 + name.len();
            let fresh = match self.directories[parent].children.get(name) {
                Some(Child::Directory(directory)) => {
                    parent = *directory;
                    continue;
                }
                Some(Child::Whiteout) => true,
                None => false,
                Some(Child::Inode(_) | Child::Link(_)) => {
                    return refuse(&path[..end], "is no directory, but another entry is in it");
                }
            };
            self.count(end)?;
            if end > MAX_PATH {
                return refuse(&path[..end], "is longer than 4096 bytes");
            }
            let above = &self.directories[parent];
            let group = match above.implied {
                Some(_) if parent != 0 => None,
                Some(_) => Some(0),
                None => Some(if above.owner.mode & 0o2000 != 0 { above.owner.gid } else { 0 }),
            };
            self.directories.push(Directory {
                owner: Owner { mode: 0o755, uid: 0, gid: 0 },
                capability: None,
                opaque: fresh,
                implied: Some(Implied { fresh, group }),
                children: HashMap::new(),
            });
            let made = self.directories.len() - 1;
            self.put(parent, &path[..end], name, Child::Directory(made))?;
            parent = made;
        }
        Ok(parent)
    }

    /// What is at `path`; no symlink is followed.
    pub(super) fn child(&self, path: &[u8]) -> Option<Child> {
        let mut child = Child::Directory(0);
        for name in components(path) {
            let Child::Directory(directory) = child else { return None };
            child = *self.directories[directory].children.get(name)?;
        }
        Some(child)
    }
}

impl Default for Owner {
    /// The owner of a file that the kernel has just made.
    fn default() -> Owner {
        Owner { mode: 0, uid: 0, gid: 0 }
    }
}

impl Owner {
    /// An ID of -1 keeps the one before, as in chown(2).
    pub(super) fn over(self, before: Owner) -> Owner {
        let id = |id, before| if id == u32::MAX { before } else { id };
        Owner { mode: self.mode, uid: id(self.uid, before.uid), gid: id(self.gid, before.gid) }
    }
}

impl Inode {
    pub(super) fn target_length(&self) -> u64 {
        match &self.kind {
            Kind::Symlink { target, .. } => target.len() as u64,
            Kind::Regular(_) | Kind::Character(_) | Kind::Block(_) | Kind::Fifo => 0,
        }
    }
}
