//! The containers' own overlays, by the numbers that their files have.

use std::collections::HashSet;

use crate::sys::file;

/// The containers' own overlays: a file on one of them shows its container.
#[derive(Debug, Default)]
pub(super) struct Roots {
    devices: HashSet<u64>,
    /// If an overlay's layers are on several filesystems, its files have other devices than
    /// its root. Then the mount identifies it.
    mounts: HashSet<u64>,
}

impl Roots {
    pub(super) fn insert(&mut self, root: &file::Stat) {
        self.devices.insert(root.device);
        self.mounts.extend(root.mount);
    }

    /// The kernel uses both numbers again after the end of a container.
    pub(super) fn remove(&mut self, other: &file::Stat) {
        self.devices.remove(&other.device);
        if let Some(mount) = other.mount {
            self.mounts.remove(&mount);
        }
    }

    pub(super) fn hold(&self, file: &file::Stat) -> bool {
        self.devices.contains(&file.device)
            || file.mount.is_some_and(|mount| self.mounts.contains(&mount))
    }
}
