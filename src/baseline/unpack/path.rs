//! Paths as Go's `path/filepath` treats them, since containerd is written in Go. Pure.

use super::refusal::{Refusal, refusal};
use crate::model::RootfsPath;

/// Names that come from the archive are checked for NULs and `..` before.
pub(super) fn rootfs_path(path: &[u8]) -> Result<RootfsPath, Refusal> {
    RootfsPath::new(path).map_err(|_| refusal(path, "is no path"))
}

/// Go's `filepath.Split`: the directory without its last slash, unless it is the root.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        None => (b"", path),
        Some(slash) => (&path[..=slash], &path[slash + 1..]),
    }
}

pub(super) fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."))
}

/// Go's `filepath.Join` of two.
pub(super) fn join(one: &[u8], other: &[u8]) -> Vec<u8> {
    if one.is_empty() { other.to_vec() } else { clean(&[one, b"/", other].concat()) }
}

/// Go's `filepath.Clean`.
pub(crate) fn clean(path: &[u8]) -> Vec<u8> {
    let mut cleaned = Vec::with_capacity(path.len() + 1);
    if path.first() == Some(&b'/') {
        cleaned.push(b'/');
    }
    let root = cleaned.len();
    // `..` does not remove anything before this.
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
