//! Follows symlinks the way containerd does: those of the same layer, bounded by the root.
//!
//! Where versions of containerd lead elsewhere, or where the answer depends on files of
//! the host, the path is refused.

use super::path::{clean, components, join};
use super::refusal::{Refusal, in_no_directory, refuse};
use super::tree::{Child, Kind, Tree};
use crate::baseline::layer::MAX_PATH;

/// How many bytes of paths may be examined to follow a layer's symlinks.
const MAX_FOLLOWED: u64 = 4 << 30;

/// What is at a path.
pub(super) enum AtPath {
    Nothing,
    Symlink(Box<[u8]>),
    Other,
}

impl Tree {
    /// The path below the root that `path` leads to, with every symlink followed.
    pub(super) fn resolve(&mut self, path: &[u8]) -> Result<Vec<u8>, Refusal> {
        let (resolved, through_symlink) = match self.plain(path)? {
            Some(plain) => (plain, false),
            None => {
                let mut spent = self.followed;
                let (resolved, links) = follow(path, |path| self.at_path(path), &mut spent)?;
                self.followed = spent;
                (resolved, links > 0)
            }
        };
        // Some versions of containerd remember where a name led, others follow it again.
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

    /// The path that `path` leads to; `None` if a symlink or `..` is on the way.
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

    /// What the kernel finds at a clean, absolute path: it follows the symlinks on the way,
    /// but not the last name.
    fn at_path(&self, path: &[u8]) -> Result<AtPath, Refusal> {
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
                None | Some(Child::Whiteout) => return Ok(AtPath::Nothing),
                Some(Child::Directory(number)) => above.push(*number),
                Some(Child::Inode(number)) => match &self.inodes[*number].kind {
                    Kind::Symlink { over_directory: true, .. } => {
                        return refuse(
                            path,
                            "leads through a symlink that has replaced a directory; containerd's versions differ in where it leads",
                        );
                    }
                    Kind::Symlink { target, .. } if rest.is_empty() => {
                        return Ok(AtPath::Symlink(target.clone()));
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
        Ok(AtPath::Other)
    }
}

/// continuity's `RootPath`: follows symlinks from the left until none is left, and bounds
/// the result by the root. `spent` counts the bytes of paths that were examined. Returns
/// also how many symlinks were followed.
pub(super) fn follow(
    path: &[u8],
    at_path: impl Fn(&[u8]) -> Result<AtPath, Refusal>,
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
            let found = if rooted == b"/" { AtPath::Other } else { at_path(&rooted)? };
            walked = match found {
                AtPath::Nothing | AtPath::Other => rooted,
                AtPath::Symlink(target) => {
                    // As in Go: only the link after the last allowed one is too many.
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
