//! Which containers' unchanged programs the kernel asks about only once
//! (docs/adr/0009): those whose copy-ups the gate can meet before they begin.

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
use crate::sys::{file, overlay};

/// A copy-up that began before we listened is not seen to begin. In a container that
/// runs already nothing is ignored until such a one must be over.
const SETTLES: Duration = Duration::from_secs(30);

/// Every shard of the gate, with the number of its containers.
#[derive(Debug)]
pub(crate) struct Free {
    marks: Marks,
    residents: Vec<AtomicUsize>,
}

/// Where a container's copy-ups are met.
#[derive(Debug)]
pub(crate) struct Residence {
    free: Arc<Free>,
    shard: u8,
    /// Its work directory's, on the host.
    directories: Vec<PathBuf>,
    free_from: Instant,
}

/// Why a container's programs are all asked about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("its overlay does not say where its work directory is")]
    NoWorkdir,
    #[error("it was mounted in another mount namespace than the host's")]
    OtherNamespace,
    #[error("its layers are served by another process or machine")]
    Remote,
    #[error("it can be exported by NFS, and then copies up in another way")]
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

    /// Listens for a container's copy-ups, before its overlay is marked in the
    /// shard. It is settled later, see [`Residence::settle`].
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
        // With `index=on`, the index is the work directory as well.
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
    /// Where the container's overlay is to be marked.
    pub(crate) fn place(&self) -> Place {
        Place::Shard(self.shard)
    }

    /// Nobody in the container has run before its marks were there.
    pub(crate) fn settle(&mut self) {
        self.free_from = Instant::now();
    }

    /// Whether a copy-up that was never seen to begin must be over.
    pub(crate) fn has_settled(&self) -> bool {
        self.free_from <= Instant::now()
    }

    /// Everything is asked about again, when this returns.
    pub(crate) fn forget(&self) {
        // An error: the gate has ended, and nothing is ignored any more.
        let _ = self.free.marks.forget(self.shard);
    }

    /// The container has ended.
    pub(crate) fn leave(&self) {
        // A directory may be gone, and the marks with it. A later mount of the same
        // layers makes it anew, and is marked later.
        let opened: Vec<OwnedFd> =
            self.directories.iter().filter_map(|path| file::open_directory(path).ok()).collect();
        let opened: Vec<_> = opened.iter().map(OwnedFd::as_fd).collect();
        let _ = self.free.marks.leave(self.shard, &opened);
        if let Some(residents) = self.free.residents.get(usize::from(self.shard)) {
            residents.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether the paths of an overlay's options mean here what they meant to who
/// mounted it: the container's shim, which is its init's parent.
fn is_mounted_here(init: &Handle) -> bool {
    Handle::open(init.first_stat().parent)
        .and_then(|parent| parent.mount_namespace())
        .is_ok_and(procfs::is_host_mount_namespace)
}

/// Copy-ups use unnamed files where they can; others cannot be told from what is
/// already copied up.
fn has_unnamed_files(directory: &Path) -> std::io::Result<()> {
    let made =
        OpenOptions::new().write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(directory)?;
    match file::stat(&made)?.links {
        0 => Ok(()),
        _ => Err(std::io::ErrorKind::Unsupported.into()),
    }
}
