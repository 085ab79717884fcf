//! The drifted files of a container, by their descriptors.
//!
//! A path is only a hint where to look. It is resolved in the container's own layer on the host,
//! without any link, or below the root of the container's init, by the door. Nothing is opened for
//! reading unless it is a regular file for which the kernel answers by itself: no FIFO, no device,
//! nothing on FUSE or a network.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use super::copy::copy;
use super::draft::{Cut, Draft};
use super::entry::{Entry, Found, Why};
use crate::model::{Container, FileTime, FileType, OverlayDirs, RootfsPath};
use crate::sys::door::{self, Ground, Held, Local, View, Way};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::procfs::Handle;

const FOREIGN: &str = "a process or another machine answers for its filesystem: it was not opened";
const KERNELS: &str = "the kernel makes it when it is read: it was not opened";

/// Where the files of one container are.
pub(super) struct Files {
    /// The container's own layer on the host; `None` if it is not known, or must not be asked.
    upper: Option<OwnedFd>,
    init: Option<Init>,
    max_file: u64,
    /// What is kept already, by what its inode shows.
    known: HashMap<Key, Entry>,
}

/// The root of a running container.
struct Init {
    handle: Handle,
    view: View,
    device: u64,
}

/// Device, inode, and time of change.
type Key = (u64, u64, FileTime, u64);

fn key(stat: &Stat) -> Key {
    (stat.device, stat.inode, stat.changed, stat.size)
}

impl Files {
    /// `earlier`: what former takes of the case have kept.
    pub(super) fn of(
        container: &Container,
        init: Option<Handle>,
        max_file: u64,
        earlier: Vec<Entry>,
    ) -> Files {
        let dirs = container.rootfs.as_ref();
        let is_local = dirs.is_some_and(|dirs| door::foreign_layer(&all_of(dirs)).is_none());
        let upper = dirs.filter(|_| is_local).and_then(|dirs| {
            // containerd or Docker has chosen this name, and no container.
            file::open_directory(&dirs.upperdir).ok()
        });
        let init = init.and_then(|handle| {
            let device = file::stat(handle.open_root().ok()?).ok()?.device;
            let view = View::of([&handle]);
            let view = if is_local { view.and_root(device) } else { view.without_root(device) };
            Some(Init { handle, view, device })
        });
        let mut known = HashMap::new();
        for entry in earlier {
            if let Some(found) = entry.found.clone().filter(|_| entry.object.is_some()) {
                let key = (found.device, found.inode, found.changed, found.size);
                known.insert(key, Entry { path: RootfsPath::root(), ..entry });
            }
        }
        Files { upper, init, max_file, known }
    }

    pub(super) fn upper(&self) -> Option<&OwnedFd> {
        self.upper.as_ref()
    }

    /// The mounts that the container's init sees.
    pub(super) fn mountinfo(&self) -> Option<Vec<u8>> {
        self.init.as_ref().and_then(|init| init.handle.mountinfo().ok())
    }

    /// Takes the file at a path of the container. The entry says what there was.
    pub(super) fn take(&mut self, draft: &mut Draft, entry: &mut Entry) -> Result<(), Cut> {
        draft.check_time()?;
        match self.find(&entry.path) {
            Ok(Place::Held(held, ground)) => self.take_held(draft, &held, ground, entry),
            Ok(Place::Removed(stat)) => {
                entry.found = Some(Found::of(&stat, None));
                entry.not_taken = Some("it was removed in the container".to_owned());
                Ok(())
            }
            Ok(Place::Foreign) => {
                entry.not_taken = Some(FOREIGN.to_owned());
                Ok(())
            }
            Err(err) => {
                entry.not_taken = Some(match err.kind() {
                    io::ErrorKind::NotFound => "it is gone".to_owned(),
                    _ => format!("it cannot be reached: {err}"),
                });
                Ok(())
            }
        }
    }

    fn find(&self, path: &RootfsPath) -> io::Result<Place> {
        if let Some(place) = self.upper.as_ref().and_then(|upper| in_layer(upper, path)) {
            return Ok(place);
        }
        let Some(Init { handle, view, .. }) = &self.init else {
            return Err(io::ErrorKind::NotFound.into());
        };
        Ok(match door::walk_exactly(handle.open_root()?, path.as_bytes(), view)? {
            Way::Found(held) => {
                let ground = view.ground(&held.stat);
                Place::Held(held, ground)
            }
            Way::Foreign(_) | Way::Process(_) => Place::Foreign,
        })
    }

    /// Takes a file that is held by a descriptor.
    fn take_held(
        &mut self,
        draft: &mut Draft,
        held: &Held,
        ground: Ground,
        entry: &mut Entry,
    ) -> Result<(), Cut> {
        let Held { fd, stat } = held;
        let local = ground.local();
        let target = match (stat.file_type, local) {
            (FileType::Symlink, Some(_)) => file::link_target(fd.as_fd()).ok(),
            _ => None,
        };
        entry.found = Some(Found::of(stat, target.as_deref()));
        if !stat.is_regular() {
            entry.not_taken = Some("it is no regular file".to_owned());
            return Ok(());
        }
        let Some(local) = local else {
            let is_kernels = matches!(ground, Ground::Kernel | Ground::Process);
            entry.not_taken = Some(if is_kernels { KERNELS } else { FOREIGN }.to_owned());
            return Ok(());
        };
        if let Some(known) = self.known.get(&key(stat))
            && known.found.as_ref().is_some_and(|found| found.is_same(stat))
        {
            // Its content is kept already.
            (entry.object, entry.stored) = (known.object, known.stored);
            entry.extents.clone_from(&known.extents);
            entry.cut.clone_from(&known.cut);
            entry.unstable = known.unstable;
            return Ok(());
        }
        self.read(draft, held, local, entry)
    }

    fn read(
        &mut self,
        draft: &mut Draft,
        held: &Held,
        local: Local,
        entry: &mut Entry,
    ) -> Result<(), Cut> {
        let opened = match door::reopen(held.fd.as_fd(), local) {
            Ok(opened) => opened,
            Err(err) => {
                // A process holds a lease of it, for example.
                entry.not_taken = Some(format!("it cannot be opened: {err}"));
                return Ok(());
            }
        };
        let ended = copy(draft, opened.as_fd(), &held.stat, self.max_file, entry);
        // A file that is being written is read again the next time.
        if !entry.unstable && ended.is_ok() {
            // A container chooses how long a path is.
            let known = Entry { path: RootfsPath::root(), ..entry.clone() };
            self.known.insert(key(&held.stat), known);
        }
        ended
    }

    /// Takes the program of a process. `None` if it is a file of the image, which need not be
    /// kept: only its name and its inode are known to be the image's.
    pub(super) fn take_program(
        &mut self,
        draft: &mut Draft,
        process: &Handle,
    ) -> Result<Option<Entry>, Cut> {
        draft.check_time()?;
        let name = process.exe().unwrap_or_default();
        let name = name.strip_suffix(file::DELETED).unwrap_or(&name);
        let path = RootfsPath::new(name).unwrap_or_else(|_| RootfsPath::root());
        let entry = Entry::new(path, Why::Executable);
        let mut entry = Entry { process: Some(process.identity()), ..entry };
        let held = process.open_exe().and_then(|fd| Ok(Held { stat: file::stat(&fd)?, fd }));
        let held = match held {
            Ok(held) => held,
            Err(err) => return Ok(Some(entry.not_taken(format!("it cannot be reached: {err}")))),
        };
        let is_in_root = self.init.as_ref().is_some_and(|init| init.device == held.stat.device);
        let is_images = is_in_root && held.stat.links > 0 && !self.is_in_own_layer(&entry.path);
        if is_images {
            return Ok(None);
        }
        let ground = match &self.init {
            Some(init) => init.view.ground(&held.stat),
            None => View::of([process]).ground(&held.stat),
        };
        self.take_held(draft, &held, ground, &mut entry)?;
        Ok(Some(entry))
    }

    fn is_in_own_layer(&self, path: &RootfsPath) -> bool {
        match &self.upper {
            Some(upper) => matches!(in_layer(upper, path), Some(Place::Held(..))),
            // Not known: it is kept.
            None => true,
        }
    }
}

/// Where a file was found.
enum Place {
    Held(Held, Ground),
    /// The layer says that the image's file was removed.
    Removed(Stat),
    Foreign,
}

/// A file of the container's own layer; `None` if the layer has none there that stands for
/// itself.
fn in_layer(upper: &OwnedFd, path: &RootfsPath) -> Option<Place> {
    let fd = file::open_path_beneath(upper, path.relative()).ok()?;
    let stat = file::stat(&fd).ok()?;
    if stat.is_whiteout_device() {
        return Some(Place::Removed(stat));
    }
    if stat.is_regular() {
        // A copy of the attributes alone: the content lies in a layer below. Overlays make such
        // copies with attributes that no container can set.
        let opened = door::reopen(fd.as_fd(), Local::by_layers()).ok()?;
        if overlay::is_metacopy(&opened, false).unwrap_or(false) {
            return None;
        }
    }
    Some(Place::Held(Held { fd, stat }, Ground::Disk))
}

fn all_of(dirs: &OverlayDirs) -> Vec<std::path::PathBuf> {
    dirs.lowerdirs.iter().chain([&dirs.upperdir]).cloned().collect()
}
