//! The path of a file in its container, from the name that the kernel gives it.
//!
//! The name of an event's descriptor depends on the mount through which it was opened. This
//! file translates it to the path in the container's root overlay. Files on other mounts are
//! found by `mounts::find`.

use std::os::fd::{AsFd as _, OwnedFd};

use super::lower;
use crate::model::{HostilePath, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::procfs::Handle;
use crate::watch::core::watched::Watched;

/// The kernel's present name for an event's file.
pub(crate) fn event_name(file: &OwnedFd) -> Result<Vec<u8>, UnknownPath> {
    let name = file::name_of(file.as_fd())?;
    if name.starts_with(b"/") { Ok(name) } else { Err(UnknownPath::NotAbsolute) }
}

/// The path of an event's file in its container: the path in the overlay, whatever mount it was
/// opened through.
pub(crate) fn event_path(
    watched: &Watched,
    file: &OwnedFd,
    stat: &Stat,
    pid: u32,
    parent: Option<u32>,
) -> Result<RootfsPath, UnknownPath> {
    let name = event_name(file)?;
    let mut name = name.as_slice();
    if let Some(rest) = name.strip_suffix(file::DELETED)
        && !is_somewhere(watched, name)
    {
        // The kernel added the suffix: this name was removed, and the file has another one.
        name = rest;
    }
    let below_root = overlay::strip_directory(name, &watched.root_name);
    if let Some(mount) = stat.mount
        && stat.mount != watched.mount
    {
        // Reached through the runtime's own mount on the host, or through a bind
        // mount or a mount namespace that the container made.
        let viewers = [Some(std::process::id()), Some(pid), parent];
        let inside = viewers.into_iter().flatten().find_map(|viewer| {
            let mountinfo = Handle::open(viewer).ok()?.mountinfo().ok()?;
            let place = overlay::find_place(&mountinfo, mount)?;
            place.inside(name).or_else(|| place.inside(below_root?))
        });
        if let Some(inside) = inside {
            return Ok(RootfsPath::new(inside)?);
        }
    }
    Ok(RootfsPath::new(below_root.unwrap_or(name))?)
}

/// Whether a name that the kernel gave exists in the container.
pub(crate) fn is_somewhere(watched: &Watched, name: &[u8]) -> bool {
    let below_root = overlay::strip_directory(name, &watched.root_name).unwrap_or(name);
    is_in_layers(watched, below_root).unwrap_or(true)
}

/// Whether a container's layers have this name; `None` if that cannot be checked.
pub(crate) fn is_in_layers(watched: &Watched, name: &[u8]) -> Option<bool> {
    let (Some(layers), Ok(path)) = (watched.layers(), RootfsPath::new(name)) else { return None };
    let is_in_upper = file::open_directory(&layers.dirs.upperdir)
        .and_then(|upper| file::open_path_beneath(&upper, path.relative()))
        .is_ok();
    Some(is_in_upper || lower::holds(layers, &path))
}

pub(crate) fn is_where_the_image_has_it(watched: &Watched, path: &RootfsPath, stat: &Stat) -> bool {
    watched.layers().is_some_and(|layers| lower::is_at(layers, path, stat))
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum UnknownPath {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the kernel gives no absolute path")]
    NotAbsolute,
    #[error(transparent)]
    Hostile(#[from] HostilePath),
}

/// The path to report for a file, from the kernel's name for it.
pub(crate) fn path(name: &[u8], is_nameless: bool) -> Result<RootfsPath, HostilePath> {
    if !is_nameless {
        return RootfsPath::new(name);
    }
    // Only for a nameless file: a real name may end like this too.
    RootfsPath::new(name.strip_suffix(file::DELETED).unwrap_or(name)).map(without_number)
}

/// Whether this may be the kernel's name for a file that never had one.
pub(crate) fn has_a_number(path: &RootfsPath) -> bool {
    let number = path.file_name().strip_prefix(b"#").unwrap_or_default();
    !number.is_empty() && number.iter().all(u8::is_ascii_digit)
}

/// The kernel names a file made with O_TMPFILE by its inode number, which differs each time.
/// Without the number, such files of one directory become one finding.
pub(crate) fn without_number(path: RootfsPath) -> RootfsPath {
    if !has_a_number(&path) {
        return path;
    }
    let directory = path.parent().unwrap_or_else(RootfsPath::root);
    directory.join(b"#tmpfile").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, is_nameless: bool, expected: &str) {
        let path = path(name.as_bytes(), is_nameless).unwrap();
        assert_eq!(path, RootfsPath::new(expected).unwrap());
    }

    #[test]
    fn a_nameless_file_is_reported_by_the_kernels_name() {
        check("/memfd:a (deleted)", true, "/memfd:a");
        check("/tmp/#4711 (deleted)", true, "/tmp/#tmpfile");
        check("/tmp/#47x (deleted)", true, "/tmp/#47x");
        check("/#4711", true, "/#tmpfile");
        check("/tmp/#4711", false, "/tmp/#4711");
        check("/tmp/x (deleted)", false, "/tmp/x (deleted)");
    }
}
