//! The tree that containerd makes of a layer's archive, made in memory: names,
//! owners and hashes, no content.
//!
//! Each rule here is one of containerd's (`pkg/archive` and continuity's
//! `fs.RootPath`), or of the kernel's below it, odd ones included: the root's own
//! entry counts for nothing; a name's `..` ends at the root; a directory over a
//! directory keeps what is in it, and anything else over anything replaces it; a
//! parent that is a symlink of the same layer is followed, one of a layer below is
//! not seen; a hard link gives its owner and mode to the file that it names, and
//! takes the file's capabilities if it brings none. Where containerd refuses to
//! unpack, so do we, and say which path is the reason. Where its versions differ
//! from each other, or the answer lies in files of the host, that is said too.
//!
//! In three places more is understood than containerd unpacks, because others do:
//! hard links to files that come later or that a layer below has, old GNU sparse
//! files, and an entry that comes before its own whiteout, which is then gone.

use std::collections::{HashMap, HashSet};

use super::layer::{Device, FileEntry, LayerBaseline, LayerEntry, MAX_PATH, Record};
use super::merge::ImageBaseline;
use super::tar::{Header, flag};
use crate::model::{Blake3Hash, FileType, Format, RootfsPath, printable};

/// How many bytes all names, link targets and capabilities of a layer may take.
pub const MAX_NAMES: u64 = 512 << 20;

/// The longest name of one file, as on every file system of Linux.
const MAX_NAME: usize = 255;

/// How many bytes of paths may be looked at to follow a layer's symlinks.
const MAX_FOLLOWED: u64 = 4 << 30;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why there is no such tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// An entry that containerd would not unpack, or of which it cannot be told
    /// how; the path is fit for people.
    Entry {
        path: String,
        why: &'static str,
    },
    /// [`MAX_NAMES`].
    Names,
    Entries,
}

fn refuse<T>(path: &[u8], why: &'static str) -> Result<T, Refusal> {
    Err(refusal(path, why))
}

fn refusal(path: &[u8], why: &'static str) -> Refusal {
    const SHOWN: usize = 200;
    let mut shown = printable(&path[..path.len().min(SHOWN)]);
    if path.len() > SHOWN {
        shown.push('…');
    }
    Refusal::Entry { path: shown, why }
}

/// A regular file's content.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    pub(super) blake3: Blake3Hash,
    pub(super) format: Format,
    pub(super) size: u64,
}

#[derive(Debug)]
pub(super) struct Tree {
    /// The first is the root.
    directories: Vec<Directory>,
    inodes: Vec<Inode>,
    links: Vec<Link>,
    /// Entries and directories they imply, and what their names take.
    entries: u64,
    max_entries: u64,
    names: u64,
    followed: u64,
    /// The directory that the entry before went into.
    recent: Option<Recent>,
    /// Names of directories that led through symlinks, and where to.
    through_symlinks: HashMap<Vec<u8>, Vec<u8>>,
    /// A directory in which a bottom layer loses what this tree keeps.
    swept_at_bottom: Option<String>,
}

#[derive(Debug)]
struct Recent {
    /// As the entry named it.
    name: Vec<u8>,
    directory: usize,
    /// How long its path is.
    length: usize,
}

/// What a directory has at a name.
#[derive(Clone, Copy, Debug)]
enum Child {
    Directory(usize),
    Inode(usize),
    Link(usize),
    Whiteout,
}

#[derive(Debug)]
struct Directory {
    owner: Owner,
    capability: Option<Box<[u8]>>,
    opaque: bool,
    /// Only paths below it name it; the layers below may know more of it.
    implied: Option<Implied>,
    children: HashMap<Box<[u8]>, Child>,
}

#[derive(Clone, Copy, Debug)]
struct Implied {
    /// Of a directory that was whited out before; the layers below say nothing.
    fresh: bool,
    /// The group that a directory made here gets; `None`: as its parent, which is
    /// implied itself, says.
    group: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    mode: u32,
    uid: u32,
    gid: u32,
}

/// Everything that is no directory. Hard links share one.
#[derive(Clone, Debug)]
struct Inode {
    owner: Owner,
    capability: Option<Box<[u8]>>,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Regular(Content),
    Symlink {
        target: Box<[u8]>,
        /// There was a directory before, and names may have led through it.
        over_directory: bool,
    },
    Character(Device),
    Block(Device),
    Fifo,
}

/// A hard link whose target has not been seen.
#[derive(Debug)]
struct Link {
    target: Vec<u8>,
    owner: Owner,
    capability: Option<Box<[u8]>>,
}

/// What a look at a path finds.
enum Seen {
    Nothing,
    Symlink(Box<[u8]>),
    Other,
}

impl Tree {
    pub(super) fn new(max_entries: u64) -> Tree {
        let root = Directory {
            // The snapshotter makes it, whatever the archive says.
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
            swept_at_bottom: None,
        }
    }

    /// Takes one entry in, as it comes.
    pub(super) fn apply(
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
        // A short name may lead far through a symlink.
        self.names += length as u64;

        if base == OPAQUE {
            if !std::mem::replace(&mut self.directories[parent].opaque, true) {
                self.look_for_swept(parent, &name);
            }
            return Ok(());
        }
        if let Some(original) = base.strip_prefix(WHITEOUT) {
            if let b"" | b"." | b".." = original {
                return refuse(&name, "is a whiteout of no name");
            }
            return self.put(parent, &name, original, Child::Whiteout);
        }

        let existing = self.directories[parent].children.get(base).copied();
        let owner = Owner {
            // Only the lower twelve bits are a mode, only 32 an ID to the kernel.
            mode: low(header.mode) & 0o7777,
            uid: low(header.uid),
            gid: low(header.gid),
        };
        let capability = match &header.capability {
            None => None,
            Some(raw) => match as_the_kernel_tells(raw) {
                None => return refuse(&name, "has a security.capability that no kernel takes"),
                told => told,
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
                return self.put(parent, &name, base, child);
            }
            // What is at its name goes, and nothing comes.
            (flag::PAX_GLOBAL, _) => {
                if self.directories[parent].children.remove(base).is_some() {
                    self.forget_recent();
                }
                return Ok(());
            }
            (flag::LINK, _) => {
                // It goes first, so that no link names itself.
                if self.directories[parent].children.remove(base).is_some() {
                    self.forget_recent();
                }
                let child = self.link(&name, &header.link, owner, capability)?;
                return self.put(parent, &name, base, child);
            }
            (flag::REGULAR | flag::GNU_SPARSE, Some(content)) => Kind::Regular(content),
            (flag::SYMLINK, _) => {
                if header.link.is_empty() || header.link.len() >= MAX_PATH {
                    return refuse(&name, "is a symlink without a target, or with one too long");
                }
                let over_directory = matches!(existing, Some(Child::Directory(_)));
                Kind::Symlink { target: header.link.into(), over_directory }
            }
            (flag::CHARACTER, _) => match device(&header.name, header.major, header.minor)? {
                // To overlayfs this is a whiteout, whoever made it.
                Device { major: 0, minor: 0 } => {
                    return self.put(parent, &name, base, Child::Whiteout);
                }
                device => Kind::Character(device),
            },
            (flag::BLOCK, _) => Kind::Block(device(&header.name, header.major, header.minor)?),
            (flag::FIFO, _) => Kind::Fifo,
            _ => return refuse(&name, "is of a type that containerd does not unpack"),
        };
        self.inodes.push(Inode { owner: owner.over(Owner::default()), capability, kind });
        self.put(parent, &name, base, Child::Inode(self.inodes.len() - 1))
    }

    /// Counts one more entry with names of so many bytes.
    fn count(&mut self, bytes: usize) -> Result<(), Refusal> {
        self.entries += 1;
        self.names += bytes as u64;
        if self.entries > self.max_entries {
            return Err(Refusal::Entries);
        }
        if self.names > MAX_NAMES { Err(Refusal::Names) } else { Ok(()) }
    }

    /// Counts a target that one more name repeats.
    fn count_again(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.names += bytes;
        if self.names > MAX_NAMES { Err(Refusal::Names) } else { Ok(()) }
    }

    fn put(
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

    /// After something is gone, the same name may lead elsewhere.
    fn forget_recent(&mut self) {
        self.recent = None;
    }

    /// The directory at `path`, which has no symlinks; it and those that lead to
    /// it are made if they are not there.
    fn make_directories(&mut self, path: &[u8]) -> Result<usize, Refusal> {
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
        // Only a plain name is below it; `..` climbs, and ends at the root.
        path = clean(&[&path[..], b"/", base].concat());
        match self.child(&path) {
            Some(Child::Inode(number)) => {
                let inode = &mut self.inodes[number];
                inode.owner = owner.over(inode.owner);
                // A change of the owner takes the capabilities.
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

    /// What is at `path`, no symlink followed.
    fn child(&self, path: &[u8]) -> Option<Child> {
        let mut child = Child::Directory(0);
        for name in components(path) {
            let Child::Directory(directory) = child else { return None };
            child = *self.directories[directory].children.get(name)?;
        }
        Some(child)
    }

    /// Where `path` leads below the root, every symlink followed.
    fn resolve(&mut self, path: &[u8]) -> Result<Vec<u8>, Refusal> {
        let (resolved, through_symlink) = match self.plain(path)? {
            Some(plain) => (plain, false),
            None => {
                let mut spent = self.followed;
                let (resolved, links) = follow(path, |path| self.look(path), &mut spent)?;
                self.followed = spent;
                (resolved, links > 0)
            }
        };
        // Some versions of containerd remember where a name led, others look again.
        let before = if through_symlink {
            self.names += path.len() as u64;
            self.through_symlinks.insert(path.to_vec(), resolved.clone())
        } else {
            self.through_symlinks.get(path).cloned()
        };
        if before.is_some_and(|before| before != resolved) {
            return refuse(
                path,
                "led elsewhere earlier in the archive; containerd's versions differ in where it leads",
            );
        }
        Ok(resolved)
    }

    /// Where `path` leads if no symlink is on the way.
    fn plain(&self, path: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
        let mut directory = Some(0);
        let mut plain = Vec::with_capacity(path.len() + 1);
        for name in components(path) {
            if name == b".." {
                return Ok(None);
            }
            plain.push(b'/');
            plain.extend_from_slice(name);
            let Some(number) = directory else { continue };
            directory = match self.directories[number].children.get(name) {
                None | Some(Child::Whiteout) => None,
                Some(Child::Directory(number)) => Some(*number),
                Some(Child::Inode(number))
                    if matches!(self.inodes[*number].kind, Kind::Symlink { .. }) =>
                {
                    return Ok(None);
                }
                Some(Child::Inode(_) | Child::Link(_)) => return Err(in_no_directory(&plain)),
            };
        }
        if plain.is_empty() {
            plain.push(b'/');
        }
        Ok(Some(plain))
    }

    /// What the kernel sees at a clean, absolute path when it follows the symlinks
    /// on the way, but not the last.
    fn look(&self, path: &[u8]) -> Result<Seen, Refusal> {
        const MAX_LINKS: usize = 40;
        let mut above: Vec<usize> = vec![0];
        let mut rest: Vec<&[u8]> = components(path).collect();
        rest.reverse();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                above.pop();
                if above.is_empty() {
                    return refuse(path, "leads out of the layer");
                }
                continue;
            }
            let directory = above.last().copied().unwrap_or(0);
            match self.directories[directory].children.get(name) {
                None | Some(Child::Whiteout) => return Ok(Seen::Nothing),
                Some(Child::Directory(number)) => above.push(*number),
                Some(Child::Inode(number)) => match &self.inodes[*number].kind {
                    Kind::Symlink { over_directory: true, .. } => {
                        return refuse(
                            path,
                            "leads through a symlink that has replaced a directory; containerd's versions differ in where it leads",
                        );
                    }
                    Kind::Symlink { target, .. } if rest.is_empty() => {
                        return Ok(Seen::Symlink(target.clone()));
                    }
                    Kind::Symlink { target, .. } => {
                        links += 1;
                        if target.starts_with(b"/") {
                            return refuse(path, "leads through a symlink to the host's files");
                        }
                        if links > MAX_LINKS {
                            return refuse(path, "leads through too many symlinks");
                        }
                        let mut names: Vec<&[u8]> = components(target).collect();
                        names.reverse();
                        rest.extend(names);
                    }
                    Kind::Regular(_) | Kind::Character(_) | Kind::Block(_) | Kind::Fifo => {
                        if !rest.is_empty() {
                            return Err(in_no_directory(path));
                        }
                    }
                },
                Some(Child::Link(_)) => return Err(in_no_directory(path)),
            }
        }
        Ok(Seen::Other)
    }

    /// In a bottom layer containerd takes an opaque mark for an order to remove
    /// what the archive has not named: also a directory that it only implies, with
    /// all that was unpacked in it.
    fn look_for_swept(&mut self, directory: usize, marker: &[u8]) {
        let mut open = vec![directory];
        while let Some(number) = open.pop() {
            for child in self.directories[number].children.values() {
                let Child::Directory(child) = child else { continue };
                if self.directories[*child].implied.is_some() {
                    self.swept_at_bottom.get_or_insert_with(|| printable(marker));
                    return;
                }
                open.push(*child);
            }
        }
    }

    /// The directories that have no entry of their own.
    pub(super) fn implied(&self) -> Result<HashSet<RootfsPath>, Refusal> {
        let mut implied = HashSet::new();
        let mut open = vec![(0, b"/".to_vec())];
        while let Some((number, path)) = open.pop() {
            let directory = &self.directories[number];
            for (name, child) in &directory.children {
                let Child::Directory(child) = child else { continue };
                let mut path = path.clone();
                if path != b"/" {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                open.push((*child, path));
            }
            if directory.implied.is_some() {
                implied.insert(rootfs_path(&path)?);
            }
        }
        Ok(implied)
    }

    /// The layer's entries, once it is known what it lies on; in no order.
    pub(super) fn settle(
        mut self,
        below: Option<&ImageBaseline>,
    ) -> Result<Vec<LayerEntry>, Refusal> {
        if let (None, Some(marker)) = (below, &self.swept_at_bottom) {
            return Err(Refusal::Entry {
                path: marker.clone(),
                why: "marks a directory of the lowest layer opaque after it was filled; what containerd leaves of it cannot be told",
            });
        }
        let links = self.settle_links(below)?;
        let mut entries = Vec::with_capacity(self.directories.len() + self.inodes.len());
        // Directories with their paths, and what their parents were implied to be.
        let mut open = vec![(0, b"/".to_vec(), Owner::default())];
        while let Some((number, path, above)) = open.pop() {
            let children = std::mem::take(&mut self.directories[number].children);
            let directory = &mut self.directories[number];
            if let Some(implied) = directory.implied {
                let known = if implied.fresh { None } else { implied_below(below, &path) };
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
                ..owner.entry(&path, FileType::Directory)?
            };
            entries.push(if directory.opaque {
                LayerEntry::OpaqueDirectory(entry)
            } else {
                LayerEntry::File(entry)
            });
            for (name, child) in children {
                let mut path = path.clone();
                if path != b"/" {
                    path.push(b'/');
                }
                path.extend_from_slice(&name);
                if path.len() > MAX_PATH {
                    return refuse(&path, "is longer than 4096 bytes");
                }
                match child {
                    Child::Directory(number) => open.push((number, path, owner)),
                    Child::Inode(number) => entries.push(self.inodes[number].entry(&path)?),
                    Child::Whiteout => entries.push(LayerEntry::Whiteout(rootfs_path(&path)?)),
                    Child::Link(number) => entries.push(match &links[number] {
                        Target::Inode(number) => {
                            self.count_again(self.inodes[*number].target_length())?;
                            self.inodes[*number].entry(&path)?
                        }
                        Target::Whiteout => LayerEntry::Whiteout(rootfs_path(&path)?),
                        Target::Below(entry) => {
                            let target =
                                entry.link_target.as_ref().map_or(0, |target| target.len());
                            self.count_again(target as u64)?;
                            let link = &self.links[number];
                            let owner = link.owner.over(Owner {
                                mode: entry.mode,
                                uid: entry.uid,
                                gid: entry.gid,
                            });
                            let keeps_mode = entry.file_type == FileType::Symlink;
                            LayerEntry::File(FileEntry {
                                path: rootfs_path(&path)?,
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
                            return refuse(&path, "is a hard link to a file that is not there");
                        }
                    }),
                }
            }
        }
        Ok(entries)
    }

    /// What the hard links mean whose targets had not been seen when they came.
    fn settle_links(&self, below: Option<&ImageBaseline>) -> Result<Vec<Target>, Refusal> {
        let mut targets: Vec<Option<Target>> = vec![None; self.links.len()];
        for first in 0..self.links.len() {
            // A link to a link to a link: each is looked at once.
            let mut chain = Vec::new();
            let mut next = first;
            let target = loop {
                if let Some(target) = &targets[next] {
                    break target.clone();
                }
                // While it is being looked at: a circle ends here.
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
                        let known = below.zip(RootfsPath::new(path).ok());
                        let known = known.and_then(|(below, path)| below.get(&path));
                        break match known.map(|known| known.entry) {
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

/// What a late hard link leads to.
#[derive(Clone, Debug)]
enum Target {
    Inode(usize),
    Below(Box<FileEntry>),
    Whiteout,
    Unknown,
}

impl Default for Owner {
    /// Of what has just been made.
    fn default() -> Owner {
        Owner { mode: 0, uid: 0, gid: 0 }
    }
}

impl Owner {
    /// -1 leaves an ID as it is, as chown(2) does.
    fn over(self, before: Owner) -> Owner {
        let id = |id, before| if id == u32::MAX { before } else { id };
        Owner { mode: self.mode, uid: id(self.uid, before.uid), gid: id(self.gid, before.gid) }
    }

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
    fn target_length(&self) -> u64 {
        match &self.kind {
            Kind::Symlink { target, .. } => target.len() as u64,
            Kind::Regular(_) | Kind::Character(_) | Kind::Block(_) | Kind::Fifo => 0,
        }
    }

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

/// What the layers below make of a directory that this layer only implies. Each is
/// asked for itself, from the top, and follows its own symlinks; the first that
/// has something there decides.
fn implied_below(below: Option<&ImageBaseline>, path: &[u8]) -> Option<(Owner, Option<Box<[u8]>>)> {
    if path == b"/" {
        let root = below?.get(&RootfsPath::root())?.entry;
        return Some((Owner { mode: 0o755, uid: root.uid, gid: root.gid }, None));
    }
    for layer in below?.layer_baselines().rev() {
        let look = |path: &[u8]| Ok(look_in(layer, path));
        let Ok((resolved, _)) = follow(path, look, &mut 0) else { return None };
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

fn look_in(layer: &LayerBaseline, path: &[u8]) -> Seen {
    let record = RootfsPath::new(path).ok().and_then(|path| layer.get(&path));
    match record.map(Record::to_entry) {
        None => Seen::Nothing,
        Some(LayerEntry::File(FileEntry { link_target: Some(target), .. })) => {
            Seen::Symlink(target)
        }
        Some(_) => Seen::Other,
    }
}

/// continuity's `RootPath`: follows symlinks from the left until none is met, and
/// bounds the outcome by the root. `spent` counts what it costs; returns how many
/// symlinks were followed, too.
fn follow(
    path: &[u8],
    look: impl Fn(&[u8]) -> Result<Seen, Refusal>,
    spent: &mut u64,
) -> Result<(Vec<u8>, u32), Refusal> {
    const MAX_LINKS: u32 = 255;
    let mut path = path.to_vec();
    let mut links = 0;
    loop {
        let before = links;
        let mut walked = Vec::new();
        if path.starts_with(b"/") {
            walked.push(b'/');
        }
        for name in components(&path) {
            let first = walked.is_empty();
            let next = join(&walked, name);
            let rooted = clean(&[b"/", &next[..]].concat());
            *spent += 2 * rooted.len() as u64;
            if rooted.len() > MAX_PATH || *spent > MAX_FOLLOWED {
                return refuse(&rooted, "leads through too many symlinks, or too long ones");
            }
            let seen = if rooted == b"/" { Seen::Other } else { look(&rooted)? };
            walked = match seen {
                Seen::Nothing | Seen::Other => rooted,
                Seen::Symlink(target) => {
                    // The kernel and Go count alike: the one after the last is too many.
                    if links > MAX_LINKS {
                        return refuse(&rooted, "leads through too many symlinks");
                    }
                    links += 1;
                    if first || target.starts_with(b"/") {
                        target.into_vec()
                    } else {
                        join(&walked, &target)
                    }
                }
            };
        }
        if before == links {
            let rooted = clean(&[b"/", &walked[..]].concat());
            if rooted == walked {
                return Ok((rooted, links));
            }
            walked = rooted;
        }
        path = walked;
    }
}

fn in_no_directory(path: &[u8]) -> Refusal {
    refusal(path, "is no directory, but another entry is in it")
}

/// Names from outside of this module are checked for NULs and `..` before.
fn rootfs_path(path: &[u8]) -> Result<RootfsPath, Refusal> {
    RootfsPath::new(path).map_err(|_| refusal(path, "is no path"))
}

/// The lower 32 bits: what reaches the kernel.
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

/// A `security.capability` as the kernel hands it out: of the first user
/// namespace's root in the shorter form (`struct vfs_cap_data`), whichever was
/// written. `None`: the kernel refuses to write it.
fn as_the_kernel_tells(raw: &[u8]) -> Option<Box<[u8]>> {
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

/// Go's `filepath.Split`: the directory without its last slash, unless it is the root.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        None => (b"", path),
        Some(slash) => (&path[..=slash], &path[slash + 1..]),
    }
}

fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."))
}

/// Go's `filepath.Join` of two.
fn join(one: &[u8], other: &[u8]) -> Vec<u8> {
    if one.is_empty() { other.to_vec() } else { clean(&[one, b"/", other].concat()) }
}

/// Go's `filepath.Clean`.
pub(super) fn clean(path: &[u8]) -> Vec<u8> {
    let mut cleaned = Vec::with_capacity(path.len() + 1);
    if path.first() == Some(&b'/') {
        cleaned.push(b'/');
    }
    let root = cleaned.len();
    // What is before this cannot be climbed out of.
    let mut fixed = root;
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => continue,
            b".." if cleaned.len() > fixed => {
                let last = cleaned[fixed..].iter().rposition(|&byte| byte == b'/');
                cleaned.truncate(fixed + last.unwrap_or(0));
                continue;
            }
            b".." if root > 0 => continue,
            _ => (),
        }
        if cleaned.len() > root {
            cleaned.push(b'/');
        }
        cleaned.extend_from_slice(name);
        if name == b".." {
            fixed = cleaned.len();
        }
    }
    if cleaned.is_empty() {
        cleaned.push(b'.');
    }
    cleaned
}
