//! Containers in which the kernel asks about an unchanged program only once (docs/adr/0009):
//! the gate must see their copy-ups before they begin.
//!
//! This file decides whether a container fits, assigns it to a shard of the gate and marks
//! its work directories. The gate's process receives the events; this file never sees them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::gate::{Marks, Place};
use crate::sys::procfs::{self, Handle};
use crate::sys::{file, overlay, perf};

/// The begin of a copy-up is not seen if it was before the marks. In a container that runs
/// already, nothing is ignored until such a copy-up must be over.
const SETTLES: Duration = Duration::from_secs(30);

/// The shards of the gate, with the number of containers in each.
#[derive(Debug)]
pub(crate) struct Free {
    marks: Marks,
    residents: Vec<AtomicUsize>,
}

/// A container's place in a shard.
#[derive(Debug)]
pub(crate) struct Residence {
    free: Arc<Free>,
    shard: u8,
    /// The directories in its work directory, on the host.
    directories: Vec<PathBuf>,
    free_from: Instant,
}

/// Why a container does not fit: each execution in it is asked about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("its overlay does not name its work directory")]
    NoWorkdir,
    #[error("it was mounted in another mount namespace than the host's")]
    OtherNamespace,
    #[error("its layers are served by another process or machine")]
    Remote,
    #[error("it can be exported by NFS, which changes how files are copied up")]
    Exported,
    #[error("its work directory is not beside its upper layer")]
    WorkdirElsewhere,
    #[error("its upper layer's filesystem has no unnamed files: {0}")]
    NoUnnamedFiles(#[source] io::Error),
    #[error("its work directory cannot be marked: {0}")]
    Unmarkable(#[source] io::Error),
}

impl Free {
    pub(crate) fn new(marks: Marks, shards: u8) -> Free {
        let residents = (0..shards).map(|_| AtomicUsize::new(0)).collect();
        Free { marks, residents }
    }

    /// Marks a container's work directories for copy-ups, before its overlay is marked in the
    /// shard. It settles later, see [`Residence::settle`].
    pub(crate) fn admit(
        self: &Arc<Free>,
        mount: &overlay::Mount,
        init: &Handle,
    ) -> Result<Residence, Unfit> {
        let workdir = mount.workdir.as_deref().ok_or(Unfit::NoWorkdir)?;
        if mount.is_exported {
            return Err(Unfit::Exported);
        }
        if !is_mounted_here(init) {
            return Err(Unfit::OtherNamespace);
        }
        let layers = mount.dirs.lowerdirs.iter().chain([&mount.dirs.upperdir]);
        if layers.into_iter().any(|layer| overlay::is_remote(layer).unwrap_or(true)) {
            return Err(Unfit::Remote);
        }
        // With `index=on`, the directory `index` is used as a work directory, too.
        let directories = ["work", "index"].map(|name| workdir.join(name));
        let opened: Vec<(PathBuf, OwnedFd)> = directories
            .into_iter()
            .filter_map(|path| file::open_directory(&path).ok().map(|directory| (path, directory)))
            .collect();
        let upper = file::stat_path(&mount.dirs.upperdir).map_err(|_| Unfit::WorkdirElsewhere)?;
        if opened.is_empty()
            || !opened
                .iter()
                .all(|(_, opened)| file::stat(opened).is_ok_and(|stat| stat.device == upper.device))
        {
            return Err(Unfit::WorkdirElsewhere);
        }
        for (path, _) in &opened {
            has_unnamed_files(path).map_err(Unfit::NoUnnamedFiles)?;
        }
        let (shard, residents) = (0_u8..)
            .zip(&self.residents)
            .min_by_key(|(_, residents)| residents.load(Ordering::Relaxed))
            .expect("there are shards");
        residents.fetch_add(1, Ordering::Relaxed);
        let residence = Residence {
            free: self.clone(),
            shard,
            directories: opened.iter().map(|(path, _)| path.clone()).collect(),
            free_from: Instant::now() + SETTLES,
        };
        for (_, directory) in &opened {
            if let Err(err) = self.marks.meet(shard, directory.as_fd()) {
                residence.leave();
                return Err(Unfit::Unmarkable(err));
            }
        }
        Ok(residence)
    }
}

impl Residence {
    /// Where the container's overlay must be marked.
    pub(crate) fn place(&self) -> Place {
        Place::Shard(self.shard)
    }

    /// No process of the container ran before its marks were in place.
    pub(crate) fn settle(&mut self) {
        self.free_from = Instant::now();
    }

    /// Whether every copy-up that began unseen must be over.
    pub(crate) fn has_settled(&self) -> bool {
        self.free_from <= Instant::now()
    }

    /// When every copy-up that began unseen must be over, by the clock of the kernel's records.
    pub(crate) fn ignorable_from(&self) -> u64 {
        let left = self.free_from.saturating_duration_since(Instant::now());
        perf::now().saturating_add(u64::try_from(left.as_nanos()).unwrap_or(u64::MAX))
    }

    /// When this returns, every program is asked about again.
    pub(crate) fn forget(&self) {
        // An error means that the gate has ended: then nothing is ignored any more.
        let _ = self.free.marks.forget(self.shard);
    }

    /// Gives up the place, because the container has ended.
    pub(crate) fn leave(&self) {
        // A directory may be gone, and its marks with it. A later mount of the same layers
        // makes a new one, which is marked then.
        let opened: Vec<OwnedFd> =
            self.directories.iter().filter_map(|path| file::open_directory(path).ok()).collect();
        let opened: Vec<_> = opened.iter().map(OwnedFd::as_fd).collect();
        let _ = self.free.marks.leave(self.shard, &opened);
        if let Some(residents) = self.free.residents.get(usize::from(self.shard)) {
            residents.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether the paths of an overlay's options mean the same here as for the process that
/// mounted it: the container's shim, which is the parent of its init.
fn is_mounted_here(init: &Handle) -> bool {
    Handle::open(init.first_stat().parent)
        .and_then(|parent| parent.mount_namespace())
        .is_ok_and(procfs::is_host_mount_namespace)
}

/// Checks for unnamed files (`O_TMPFILE`). Copy-ups use them where they can. A copy-up
/// without them cannot be distinguished from a file that is copied up already.
fn has_unnamed_files(directory: &Path) -> std::io::Result<()> {
    let made =
        OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)?;
    match file::stat(&made)?.links {
        0 => Ok(()),
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    }
}
