//! Files on mounts other than a container's root overlay: which container they belong to, and
//! their paths as that container sees them.
//!
//! `exec` uses it for executed files. Paths in the root overlay are found by `files::paths`. It
//! reads mount tables and the marked mounts of the core; it places no
//! marks.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::model::{Filesystem, RootfsPath};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::procfs::{Handle, Whereabouts};
use crate::watch::core::table::Table;
use crate::watch::core::watched::{MarkedMount, Watched};
use crate::watch::files::paths::UnknownPath;
use crate::watch::process::reach;

/// The container of an executed file that is on no container's root overlay, and the kind of its
/// filesystem.
pub(crate) fn whose(
    table: &Table,
    file: &OwnedFd,
    stat: &Stat,
    process: &Whereabouts,
) -> Option<(Arc<Watched>, Filesystem)> {
    if overlay::is_overlay(file).ok()? {
        // An overlay with layers on several filesystems, in a mount namespace of the process's own.
        let watched = table.by_pid_namespace(process.pid_namespace?)?;
        return Some((watched, Filesystem::Overlay));
    }
    let watched = table.user_of(stat, process)?;
    let is_in_memory = file::is_in_memory(file).ok()?;
    Some((watched, if is_in_memory { Filesystem::Tmpfs } else { Filesystem::Volume }))
}

/// The path of an event's file as its container sees it, from the kernel's name for it, whatever
/// namespace or mount it was opened through; and whether that path is certain. It is not
/// certain for a layer of an overlay that the container has mounted: that is in no mount table.
pub(crate) fn event_path(
    watched: &Watched,
    name: &[u8],
    stat: &Stat,
    pid: u32,
    parent: Option<u32>,
) -> Result<(RootfsPath, bool), UnknownPath> {
    let below_root = overlay::strip_directory(name, &watched.root_name);
    let own = watched.mounts();
    let is_own = |mount: u64| own.iter().any(|own| own.id == mount);
    let mut is_certain = true;
    if let Some(mount) = stat.mount.filter(|mount| !is_own(*mount)) {
        let viewers = [Some(pid), parent, Some(std::process::id())];
        let inside = viewers.into_iter().flatten().find_map(|viewer| {
            let viewer = Handle::open(viewer).ok()?;
            let place = overlay::find_place(&viewer.mountinfo().ok()?, mount)?;
            // Mount points are relative to the viewer's root, the name is not.
            let root = viewer.root().ok()?;
            place.inside(overlay::strip_directory(name, &root)?)
        });
        is_certain = inside.is_some();
        if let Some(path) = inside.and_then(|inside| seen_from(&own, stat.device, &inside)) {
            return Ok((RootfsPath::new(path)?, true));
        }
        if !is_certain && let Some(path) = by_a_twin(watched, &own, stat, name) {
            return Ok((path, true));
        }
    }
    Ok((RootfsPath::new(below_root.unwrap_or(name))?, is_certain))
}

/// The path of a file whose mount ended with its namespace. The kernel's name for it then starts
/// at that mount's root. If a mount of the container, of which it was a copy, has the same
/// file there, that is its path.
pub(crate) fn by_a_twin(
    watched: &Watched,
    own: &[MarkedMount],
    stat: &Stat,
    name: &[u8],
) -> Option<RootfsPath> {
    let init = Handle::open_exactly(watched.init).ok()?;
    own.iter().filter(|mount| mount.device == stat.device).find_map(|mount| {
        let path = [&mount.mount_point[..], name].concat();
        let found = file::stat(&reach::open_in(watched, &init, &path)?).ok()?;
        let is_it = (found.device, found.inode) == (stat.device, stat.inode);
        is_it.then(|| RootfsPath::new(path).ok()).flatten()
    })
}

/// The program's path as its process reports it, if it ends with `below`, the part of the file's
/// path that is known.
pub(crate) fn path_of_program(exe: &str, below: &RootfsPath) -> Option<RootfsPath> {
    // With an escape sequence it is not the exact path.
    let exe = Some(exe).filter(|exe| !exe.contains('\\'))?;
    exe.as_bytes().ends_with(below.as_bytes()).then(|| RootfsPath::new(exe).ok())?
}

/// The path at which a container's own mounts show `inside`, a path in their filesystem.
pub(crate) fn seen_from(own: &[MarkedMount], device: u64, inside: &[u8]) -> Option<Vec<u8>> {
    // `/a` and `//a` are one path.
    let inside = RootfsPath::new(inside).ok()?;
    let inside = inside.as_bytes();
    let (mount, below) = own
        .iter()
        .filter(|mount| mount.device == device)
        .filter_map(|mount| Some((mount, overlay::strip_directory(inside, &mount.root)?)))
        .max_by_key(|(mount, _)| mount.root.len())?;
    let mut path = mount.mount_point.clone();
    path.push(b'/');
    path.extend_from_slice(below);
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_reported_as_the_container_sees_it() {
        let own = |root: &str, mount_point: &str| MarkedMount {
            id: 1,
            device: 9,
            root: root.into(),
            mount_point: mount_point.into(),
            whole_filesystem: true,
        };
        let mounts = [own("/", "/all"), own("/sub", "/vol"), own("/file", "/one")];
        let seen = |inside: &str| {
            seen_from(&mounts, 9, inside.as_bytes()).map(|path| RootfsPath::new(path).unwrap())
        };
        let path = |text: &str| Some(RootfsPath::new(text).unwrap());
        assert_eq!(seen("//sub//x"), path("/vol/x"));
        assert_eq!(seen("/subway/x"), path("/all/subway/x"));
        assert_eq!(seen("/file"), path("/one"));
        assert_eq!(seen_from(&mounts, 8, b"/sub/x"), None);
        let program = |exe| path_of_program(exe, &RootfsPath::new("/bin/x").unwrap());
        assert_eq!(program("/merged/bin/x"), path("/merged/bin/x"));
        for exe in ["/merged/bin/y", "/a\\n/bin/x", "bin/x", "/sh"] {
            assert_eq!(program(exe), None, "{exe}");
        }
    }
}
