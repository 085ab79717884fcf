//! Where the layers of a container lie on the host, and which files belong to its own layer.
//!
//! A file belongs to the container's own layer if it was born there. That is decided by
//! times, as long as the clock can be trusted. This file reads the layers' directories; it
//! compares no content.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::model::{FileTime, OverlayDirs};
use crate::sys::file::{self, Stat};
use crate::sys::{clock, overlay};

/// Where the overlay's layers lie on the host.
#[derive(Debug)]
pub(crate) struct Layers {
    pub(crate) dirs: OverlayDirs,
    pub(crate) userxattr: bool,
    /// A directory of the image can be moved. Its files then have other paths than in the
    /// image.
    pub(crate) redirects: bool,
    /// When the upper layer was made. `None` if the filesystem keeps no birth times. The
    /// upperdir's ctime is no substitute: it moves with every entry made in it.
    pub(crate) born: Option<FileTime>,
    /// How often the clock had been set when this was read.
    pub(crate) times_set: u64,
    /// A file was found in the upper layer that looks older than the layer: the clock was
    /// set back, and driftd did not notice.
    pub(crate) holds_older: AtomicBool,
    /// The filesystems of its directories.
    pub(crate) devices: Vec<u64>,
    /// Device and inode of each lower layer's directory, if it could be read.
    pub(crate) lower: Vec<Option<(u64, u64)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Own,
    /// `is_young`: changed after the container was made.
    Layers {
        is_young: bool,
    },
}

/// Whether a file lies in the container's own layer, which was made at `own`. A container
/// cannot set the ctime and the birth of a file, and a file of the image that is changed is
/// copied up and born anew. If the layer is not certain, the file counts as the container's
/// own: its content is then compared, which is right for any file.
pub(crate) fn place(stat: &Stat, own: Option<FileTime>) -> Place {
    let Some(own) = own else { return Place::Own };
    let is_young = stat.changed >= own;
    match stat.born {
        Some(born) if born < own => Place::Layers { is_young },
        None if !is_young => Place::Layers { is_young },
        Some(_) | None => Place::Own,
    }
}

/// Device and inode of a layer's directory.
pub(crate) fn identity_of(directory: &std::path::PathBuf) -> Option<(u64, u64)> {
    file::stat_path(directory).ok().map(|stat| (stat.device, stat.inode))
}

impl Layers {
    /// `None` if the upperdir does not exist.
    pub(crate) fn new(mount: overlay::Mount) -> Option<Layers> {
        let times_set = clock::times_set();
        let upper = file::stat_path(&mount.dirs.upperdir).ok()?;
        let born = upper.born;
        let lower: Vec<Option<(u64, u64)>> = mount.dirs.lowerdirs.iter().map(identity_of).collect();
        let devices = lower.iter().flatten().map(|(device, _)| *device);
        let devices = devices.chain([upper.device]).collect();
        // A birth in the future: the clock was set back, and files made now would look older
        // than their layer.
        let now = jiff::Timestamp::now().as_second();
        let born = born.filter(|born| born.seconds <= now);
        Some(Layers {
            dirs: mount.dirs,
            userxattr: mount.userxattr,
            redirects: mount.redirects,
            born,
            times_set,
            holds_older: AtomicBool::new(false),
            devices,
            lower,
        })
    }

    /// Whether the directory of a lower layer does not (or no longer) show that layer. With
    /// mapped IDs, the overlay is made of mounts that are removed right afterwards.
    pub(crate) fn is_cut_off(&self) -> bool {
        let mut all = self.dirs.lowerdirs.iter().zip(&self.lower);
        all.any(|(directory, known)| known.is_none() || identity_of(directory) != *known)
    }

    /// When the upper layer was made; `None` if times cannot be trusted. A file that was made
    /// after the clock was set back looks older than it is. Then times decide nothing, and
    /// every file is compared by content.
    pub(crate) fn born(&self) -> Option<FileTime> {
        let is_trusted =
            clock::times_set() == self.times_set && !self.holds_older.load(Ordering::Acquire);
        self.born.filter(|_| is_trusted)
    }

    /// Notes the birth of a file of the upper layer. True for the first birth that is
    /// impossible: one before the layer's own.
    pub(crate) fn note_birth(&self, stat: &Stat) -> bool {
        let is_older = match (stat.born, self.born) {
            (Some(file), Some(layer)) => file < layer,
            _ => false,
        };
        is_older && !self.holds_older.swap(true, Ordering::AcqRel)
    }

    /// Whether one of the directories is on this filesystem.
    pub(crate) fn is_on(&self, device: u64) -> bool {
        self.devices.contains(&device)
    }
}
