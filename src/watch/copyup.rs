//! Copy-ups, met before they begin: what makes a gate sound that does not ask about
//! unchanged files of the image.
//!
//! An ignore mark tells the kernel to ask no more about an inode. Alone it is a
//! hole: `open(O_RDWR)`, a store through a shared mapping, `close`, and the changed
//! file runs unasked. But an overlay's lower file cannot be changed from above it
//! without being copied up first, and before there is anything to change the
//! overlay opens an unnamed file in its work directory, in the name of whoever wants
//! to write. There we are asked, too. So this can be held (docs/adr/0009):
//!
//! > A file carries an ignore mark only while it is a lower file and no copy-up is
//! > in flight in its shard.
//!
//! ```text
//! writer: open(O_RDWR) ── kernel: work/#12 ──> in flight + 1, generation + 1,
//!                                              flush the ignore marks, Allow
//! gate:   generation, in flight ── statx ── Allow ── still the same? add the mark
//! writer: done ── kernel: work/#12 closed ──> in flight - 1
//! ```
//!
//! A shard is an exec gate and a copy-up gate for some of the containers: the flush
//! takes the marks of all of them, and no name needs to be found to know whose
//! copy-up it is. What is lost here only makes the kernel ask more often.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::gate::{TURN, Turns, give_up};
use super::shared::Shared;
use crate::sys::fanotify::{
    self, Answer, Buffer, Event, Group, Incoming, Permission, Queue, ReadError,
};
use crate::sys::file;
use crate::sys::overlay::{self, CopyUp};
use crate::sys::procfs::{self, Handle};

/// More would spare containers one another's flushes; a user may have 128 groups,
/// and each takes two.
const SHARDS: usize = 8;

/// Who writes to a layer's directory from the host changes a file without a
/// copy-up. Marks that hide that are not older than this.
const REFRESH: Duration = Duration::from_secs(30);

/// A copy-up that began before we listened is not seen to begin. In a container that
/// runs already nothing is ignored until such a one must be over.
const SETTLES: Duration = Duration::from_secs(30);

/// Events of one read, each with a descriptor.
const READ_BYTES: usize = 4 * 1024;

/// The gates of some containers.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) gate: Arc<Group>,
    copy_ups: Group,
    /// Held while marks are set, and while they are taken away. The kernel takes them
    /// off the group's list first and off the inodes later, one by one: a second flush
    /// meanwhile finds nothing, and would let a writer go on under marks that still
    /// hold. And a mark that is just being set outlives a flush by as long as whoever
    /// sets it is not given the processor.
    marks: Mutex<()>,
    /// Moves with everything that may make an ignored file another one.
    generation: AtomicU64,
    in_flight: AtomicUsize,
    residents: AtomicUsize,
}

/// That nothing was in flight. Taken before a file is looked at, and compared after
/// it was ignored.
#[derive(Debug)]
pub(super) struct Calm {
    generation: u64,
}

impl Shard {
    fn new() -> Result<Shard, fanotify::Error> {
        Ok(Shard {
            gate: Arc::new(Group::exec_gate()?),
            copy_ups: Group::copy_up_gate()?,
            marks: Mutex::new(()),
            generation: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            residents: AtomicUsize::new(0),
        })
    }

    /// `None` while a copy-up is in flight.
    pub(super) fn calm(&self) -> Option<Calm> {
        // In this order: a copy-up that begins in between is seen by either.
        let generation = self.generation.load(Ordering::SeqCst);
        (self.in_flight.load(Ordering::SeqCst) == 0).then_some(Calm { generation })
    }

    /// Asks no more about a file, which was found to be the image's own after `calm`
    /// was taken.
    pub(super) fn ignore(&self, file: &OwnedFd, calm: &Calm) -> bool {
        // Whoever has it flushes: what we know is old.
        let Ok(_marks) = self.marks.try_lock() else { return false };
        // What moves the generation flushes after that, and so after us.
        self.generation.load(Ordering::SeqCst) == calm.generation
            // Where it fails, the file is asked about again: only time is lost.
            && self.gate.ignore(file.as_fd(), libc::FAN_OPEN_EXEC_PERM).is_ok()
    }

    /// Whatever was ignored is asked about again, when this returns.
    pub(super) fn forget(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        let _marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(err) = self.gate.flush() {
            give_up(&err);
        }
    }
}

/// Where a container's copy-ups are met.
#[derive(Debug)]
pub(super) struct Residence {
    pub(super) shard: Arc<Shard>,
    /// Its work directory's, on the host.
    directories: Vec<PathBuf>,
    free_from: Instant,
}

impl Residence {
    /// Whether a copy-up that was never seen to begin must be over.
    pub(super) fn has_settled(&self) -> bool {
        self.free_from <= Instant::now()
    }
}

/// Every shard.
#[derive(Debug)]
pub(super) struct Free {
    pub(super) shards: Vec<Arc<Shard>>,
    /// Told when a copy-up is over.
    closes: Group,
}

/// Why a container's programs are all asked about.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unfit {
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
    NoUnnamedFiles(#[source] std::io::Error),
    #[error("its work directory cannot be marked: {0}")]
    Unmarkable(#[source] std::io::Error),
}

impl Free {
    pub(super) fn new() -> Result<Free, fanotify::Error> {
        let shards = (0..SHARDS).map(|_| Shard::new().map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Free { shards, closes: Group::feed(Queue::Unlimited)? })
    }

    /// Listens for a container's copy-ups, before its overlay is marked in the
    /// shard. It is settled later, see [`Residence::settle`].
    pub(super) fn admit(&self, mount: &overlay::Mount, init: &Handle) -> Result<Residence, Unfit> {
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
        let shard = self
            .shards
            .iter()
            .min_by_key(|shard| shard.residents.load(Ordering::Relaxed))
            .expect("there are shards");
        shard.residents.fetch_add(1, Ordering::Relaxed);
        let residence = Residence {
            shard: shard.clone(),
            directories: opened.iter().map(|(path, _)| path.clone()).collect(),
            free_from: Instant::now() + SETTLES,
        };
        for (_, directory) in &opened {
            // Who is told of the end must be there first.
            let marked =
                self.closes.mark_children(directory.as_fd(), libc::FAN_CLOSE_WRITE).and_then(
                    |()| shard.copy_ups.mark_children(directory.as_fd(), libc::FAN_OPEN_PERM),
                );
            if let Err(err) = marked {
                self.leave(&residence);
                return Err(Unfit::Unmarkable(err));
            }
        }
        Ok(residence)
    }

    /// The container has ended.
    pub(super) fn leave(&self, residence: &Residence) {
        for path in &residence.directories {
            // It may be gone, and the marks with it. A later mount of the same layers
            // makes this directory anew, and is marked later.
            let Ok(directory) = file::open_directory(path) else { continue };
            let _ = self.closes.unmark_children(directory.as_fd(), libc::FAN_CLOSE_WRITE);
            let _ =
                residence.shard.copy_ups.unmark_children(directory.as_fd(), libc::FAN_OPEN_PERM);
        }
        residence.shard.residents.fetch_sub(1, Ordering::Relaxed);
        residence.shard.forget();
    }
}

impl Residence {
    /// Nobody in the container has run before its marks were there.
    pub(super) fn settle(&mut self) {
        self.free_from = Instant::now();
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

/// The thread that meets copy-ups: while it does not answer, who would change a file
/// of an image waits.
pub(super) struct CopyUps {
    pub(super) free: Arc<Free>,
    pub(super) shared: Arc<Shared>,
    pub(super) turns: Turns,
    /// For tests: as if the thread had been stopped.
    pub(super) held: Arc<AtomicBool>,
    /// Device and inode of the files that are being filled, and whose they are.
    in_flight: HashMap<(u64, u64), Arc<Shard>>,
    /// A copy-up was met whose end is not told.
    is_puzzled: bool,
    refreshed: Instant,
}

impl CopyUps {
    pub(super) fn new(
        free: Arc<Free>,
        shared: Arc<Shared>,
        turns: Turns,
        held: Arc<AtomicBool>,
    ) -> CopyUps {
        CopyUps {
            free,
            shared,
            turns,
            held,
            in_flight: HashMap::new(),
            is_puzzled: false,
            refreshed: Instant::now(),
        }
    }

    pub(super) fn run(mut self) {
        // Without CAP_SYS_NICE it runs like the others, only later under load.
        let _ = rustix::process::setpriority_process(None, -10);
        let free = self.free.clone();
        let mut buffer = Buffer::new();
        while !self.shared.is_stopping() {
            if self.held.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            self.wait();
            self.turns.turn();
            self.read(&free.closes, &mut buffer, |this, incoming| {
                if let Incoming::Notification(event) = incoming {
                    this.ended(&event);
                }
            });
            for shard in &free.shards {
                self.read(&shard.copy_ups, &mut buffer, |this, incoming| {
                    if let Incoming::Permission(permission) = incoming {
                        this.answer(shard, permission);
                    }
                });
            }
            if self.refreshed.elapsed() >= REFRESH {
                self.refreshed = Instant::now();
                free.shards.iter().for_each(|shard| shard.forget());
            }
        }
    }

    fn wait(&self) {
        let groups = self.free.shards.iter().map(|shard| &shard.copy_ups);
        let mut fds: Vec<PollFd<'_>> = groups
            .chain([&self.free.closes])
            .map(|group| PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(TURN).expect("a quarter of a second fits");
        // An error here (a signal) only means that the turn comes early.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
    }

    fn read(
        &mut self,
        group: &Group,
        buffer: &mut Buffer,
        mut take: impl FnMut(&mut CopyUps, Incoming<'_>),
    ) {
        match group.read(buffer, READ_BYTES) {
            Ok(incoming) => incoming.into_iter().for_each(|incoming| take(self, incoming)),
            Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                Some(Errno::AGAIN | Errno::INTR) => (),
                Some(Errno::BADF | Errno::INVAL | Errno::FAULT) | None => give_up(&err),
                // A copy-up that was denied, or one that is thought to go on for ever.
                Some(_) => {
                    tracing::warn!("an event of the copy-up gate could not be opened: {err}");
                }
            },
            Err(ReadError::Malformed(err)) => give_up(&err),
        }
    }

    fn answer(&mut self, shard: &Arc<Shard>, permission: Permission<'_>) {
        let file = &permission.event().file;
        let stat = file::stat(file);
        match stat.as_ref().map_or(Ok(CopyUp::Begins), |stat| overlay::copy_up(file.as_fd(), stat))
        {
            // A file that was copied up some time ago is opened by way of where it was
            // made. Never again is this file the place of a copy-up.
            Ok(CopyUp::Over) => {
                let _ = shard.copy_ups.ignore_for_good(file.as_fd(), libc::FAN_OPEN_PERM);
            }
            begins => {
                // An end that we shall know of, or none.
                let key = match (begins, &stat) {
                    (Ok(CopyUp::Begins), Ok(stat)) => Some((stat.device, stat.inode)),
                    _ => None,
                };
                self.begin(shard, key);
            }
        }
        let (_, answered) = permission.answer(Answer::Allow);
        if let Err(err) = answered {
            // ENOENT: the process was killed while it waited.
            if err.raw_os_error() != Some(Errno::NOENT.raw_os_error()) {
                give_up(&err);
            }
        }
    }

    fn begin(&mut self, shard: &Arc<Shard>, key: Option<(u64, u64)>) {
        shard.in_flight.fetch_add(1, Ordering::SeqCst);
        if let Some(key) = key {
            // Its number was given to another file: the one that had it is gone.
            if let Some(gone) = self.in_flight.insert(key, shard.clone()) {
                gone.in_flight.fetch_sub(1, Ordering::SeqCst);
            }
        } else if !std::mem::replace(&mut self.is_puzzled, true) {
            tracing::warn!(
                "a copy-up does not look as they do; from now on every program of some \
                 containers is asked about"
            );
        }
        shard.forget();
        self.shared.health.copy_ups.fetch_add(1, Ordering::Relaxed);
    }

    fn ended(&mut self, event: &Event) {
        let Ok(stat) = file::stat(&event.file) else { return };
        if let Some(shard) = self.in_flight.remove(&(stat.device, stat.inode)) {
            shard.in_flight.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
