//! Opens the file of a recorded execution that the gate may not have seen, while its process
//! lives, and gathers the evidence about it.
//!
//! `trace` calls it for each such execve and hands on what it finds; `evidence` judges. It
//! borrows what is known of processes and must not change it, and it must not hash files.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::sync::Arc;

use super::evidence::{self, Evidence, Exe, Judged};
use super::known::Known;
use super::shared::Exec;
use super::unseen::Unseen;
use crate::config;
use crate::model::{ContainerId, Filesystem, Format};
use crate::sys::door::{self, Ground, Held, Local, View};
use crate::sys::file::{self, Stat};
use crate::sys::overlay;
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::watch::code::inspect::{self, Upper};
use crate::watch::core::watched::{Standing, Watched};
use crate::watch::files::paths;
use crate::watch::process::roots::Maker;
use crate::watch::process::{attribution, records};

/// How many generations of parents are followed.
const MAX_MAKERS: usize = 16;

/// Examines what the gate may not have seen, with what is known of processes.
pub(crate) struct Examiner<'a> {
    pub(crate) shared: &'a Exec,
    pub(crate) processes: &'a HashMap<u32, Known>,
    pub(crate) memfd_device: Option<u64>,
    /// The device of the host's root.
    pub(crate) host_device: Option<u64>,
    /// For a file mapped from an overlay the kernel reports the overlay's own device. Before
    /// 6.18 it may report the device of the file below.
    pub(crate) reports_overlays: bool,
}

impl Examiner<'_> {
    /// Examines an entry point whose execve had opened its file before the marks were placed.
    /// The gate was not asked about that file then, and init does not show it.
    pub(crate) fn examine_entry(&self, execution: &Execution<'_>) -> Option<Vec<Unseen>> {
        let Execution { watched, executed, program, asked, .. } = execution;
        let name = &executed.file_name;
        let is_script = program.as_ref().is_some_and(|program| program.name != *name);
        let script = || is_script.then(|| self.examine_name(execution, name)).flatten();
        self.shared.wait_until(|| !watched.is_being_armed());
        // The process does not wait for an answer here: the gate's event may come later.
        if self.shared.settings.gate == config::Gate::Notify {
            self.shared.wait_until(|| watched.init_was_asked_about());
        }
        if watched.init_was_asked_about() {
            // If only about the interpreter, the script had been opened before.
            return (asked.len() == 1).then(script).flatten().map(|script| vec![script]);
        }
        if !watched.take_armed_before_start() {
            // The late start is known, and the running programs were examined.
            return None;
        }
        self.shared.armed_late(watched);
        Some(self.examine_unread(execution).into_iter().chain(script()).collect())
    }

    /// Whether a process that no runtime has put into the container sees the container's root,
    /// by setns(2) or chroot(2). It does if it executed one of the container's programs by an
    /// absolute path, and the kernel names the program as the container does. A process that
    /// sees the host's root names such a program by a directory of the host, by a path below
    /// /proc, or by a descriptor.
    pub(crate) fn sees_root(
        &self,
        executed: &Executed,
        program: Option<&Mapped>,
        watched: &Watched,
    ) -> bool {
        let is_elsewhere = watched.perf_cgroup.is_some()
            && executed.cgroup.is_some_and(|it| self.shared.table.by_perf_cgroup(it).is_none());
        let name = &executed.file_name;
        let is_by_own_name = name.starts_with(b"/")
            && !name.starts_with(b"/proc/")
            && records::descriptor(name).is_none();
        is_elsewhere
            && is_by_own_name
            && program.is_some_and(|program| {
                let owner = self.shared.table.by_device(program.device);
                owner.is_some_and(|owner| owner.container == watched.container)
                    && paths::is_in_layers(watched, &program.name) == Some(true)
            })
    }

    /// The parent of a process, the parent's parent, and so on, as far as recorded.
    pub(crate) fn makers(&self, pid: u32) -> Arc<[Maker]> {
        let parent = |pid: u32| self.processes.get(&pid)?.parent;
        let pids = std::iter::successors(parent(pid), |pid| parent(*pid));
        let maker = |pid| {
            let program = self.processes.get(&pid).and_then(|known| known.program.as_ref());
            Maker { pid, exe: program.map(|program| program.name.clone()) }
        };
        pids.take(MAX_MAKERS).map(maker).collect()
    }

    /// The container in whose root the program lies, where no mapping was recorded.
    pub(crate) fn owner_of_running(
        &self,
        executed: &Executed,
        program: Option<&Mapped>,
    ) -> Option<Arc<Watched>> {
        if program.is_some() {
            return None;
        }
        let exe = Handle::open(executed.pid).ok()?.open_exe().ok()?;
        self.shared.table.owner(&file::stat(exe).ok()?)
    }

    /// Examines a program in another container's root.
    pub(crate) fn examine_in_other_root(
        &self,
        execution: &Execution<'_>,
        owner: &Watched,
    ) -> Option<Unseen> {
        let handle = Handle::open(execution.executed.pid).ok();
        let mapped = execution.program.as_deref();
        let file = attribution::open_program(owner, handle.as_ref(), mapped);
        let name = match &file {
            Some(Held { fd, .. }) => file::name_of(fd.as_fd()).ok()?,
            None => mapped?.name.to_vec(),
        };
        // It lies on the other container's own overlay.
        let file = file.map(|held| (held, owner.local()));
        Some(execution.unseen(Filesystem::Container, name, file, handle, false))
    }

    /// Examines a program of a root whose layers are not read, by the file that the upper
    /// layer has at its path.
    pub(crate) fn examine_unread(&self, execution: &Execution<'_>) -> Option<Unseen> {
        let Execution { watched, executed, program, .. } = execution;
        if !self.shared.settings.looks_at(Filesystem::Overlay) {
            return None;
        }
        let handle = Handle::open(executed.pid).ok();
        let exe = handle.as_ref().and_then(|handle| {
            let fd = handle.open_exe().ok()?;
            let stat = file::stat(&fd).ok()?;
            let is_it = match program.as_deref() {
                Some(mapped) => (mapped.device, mapped.inode) == (stat.device, stat.inode),
                None => stat.device == watched.device,
            };
            is_it.then_some(Held { fd, stat })
        });
        let name = match (program.as_deref(), &exe) {
            (Some(mapped), _) => mapped.name.to_vec(),
            (None, Some(exe)) => file::name_of(exe.fd.as_fd()).ok()?,
            (None, None) => return None,
        };
        let path = paths::path(&name, name.ends_with(file::DELETED)).ok()?;
        let file = match inspect::upper(watched, &path) {
            Upper::File { fd, stat } => (Held { fd, stat }, Some(Local::by_layers())),
            // The file has no name any more. Its times show whether it was made in the upper
            // layer.
            Upper::Hidden | Upper::Absent | Upper::Unknown => {
                let exe = exe.filter(|exe| exe.stat.links == 0)?;
                if watched.standing(&exe.stat) != Standing::Own {
                    return None;
                }
                (exe, None)
            }
        };
        let is_parent_outside = self.is_parent_outside(execution);
        let name = path.as_bytes().to_vec();
        Some(execution.unseen(Filesystem::Overlay, name, Some(file), handle, is_parent_outside))
    }

    /// Examines the file that was named to execve, if it is a script: the mapped file is its
    /// interpreter then. For a program the name proves nothing, because it can have several.
    fn examine_name(&self, execution: &Execution<'_>, name: &[u8]) -> Option<Unseen> {
        let path = paths::path(name, false).ok()?;
        let Upper::File { fd, stat } = inspect::upper(&execution.watched, &path) else {
            return None;
        };
        let readable = door::reopen(fd.as_fd(), Local::by_layers()).ok()?;
        if file::sniff(readable.as_fd()).ok()? != Format::Script {
            return None;
        }
        let file = Some((Held { fd, stat }, Some(Local::by_layers())));
        let handle = Handle::open(execution.executed.pid).ok();
        let is_parent_outside = self.is_parent_outside(execution);
        let filesystem = Filesystem::Overlay;
        let found = execution.unseen(filesystem, name.to_vec(), file, handle, is_parent_outside);
        Some(Unseen { is_script: true, ..found })
    }

    /// Whether the gate will report an execution from there that it has not reported yet: with
    /// `watch.gate = "notify"` no process waits, and its event may come after the record.
    pub(crate) fn gate_will_report(
        &self,
        device: u64,
        mount: Option<u64>,
        executed: &Executed,
    ) -> bool {
        self.shared.settings.gate == config::Gate::Notify
            && self.shared.table.was_marked(device, mount, executed.time)
    }

    /// Examines a program that the gate may not have seen.
    pub(crate) fn examine(&self, execution: &Execution<'_>) -> Option<Unseen> {
        let Execution { watched, executed, program, was_resident, .. } = execution;
        let was_resident = *was_resident;
        let program = program.as_deref();
        let handle = Handle::open(executed.pid).ok();
        let opened = handle.as_ref().and_then(|handle| {
            let exe = handle.open_exe().ok()?;
            let stat = file::stat(&exe).ok()?;
            Some((exe, stat))
        });
        let is_host = handle.as_ref().is_some_and(|handle| {
            handle.mount_namespace().is_ok_and(procfs::is_host_mount_namespace)
                || handle.has_host_root()
        });
        let is_behind = |stat: &Stat| self.is_behind(handle.as_ref(), stat);
        // Otherwise the mapped file lies below an overlay, or the process runs another program
        // by now, which must not be mistaken for the executed one.
        let is_same = |stat: &Stat| {
            program.is_none_or(|mapped| (mapped.device, mapped.inode) == (stat.device, stat.inode))
        };
        let may_be_below = !self.reports_overlays;
        let is_marked = |stat: &Stat| self.is_marked(execution, stat);
        // Read now: the mounts may be gone with the process. Lists of mounts can be long, so
        // they are read only where it matters.
        let ground = match &opened {
            // For memory no list is needed.
            Some((_, stat)) if Some(stat.device) == self.memfd_device => Ground::Memory,
            Some((_, stat)) if !is_host && is_same(stat) && !is_marked(stat) => {
                self.ground(execution, handle.as_ref(), stat)
            }
            Some(_) | None => Ground::Foreign,
        };
        let exe = opened.as_ref().and_then(|(_, stat)| {
            let is_marked = is_marked(stat);
            (is_same(stat) || (may_be_below && is_marked)).then(|| Exe {
                device: stat.device,
                links: stat.links,
                is_marked,
                is_on_tmpfs: ground == Ground::Memory,
                // Only a process from outside can be on its way in.
                is_host: !was_resident && (is_host || is_behind(stat)),
            })
        });
        // If the process is gone or runs another program by now, a file of the host's own root
        // proves nothing: the gate was asked about what is mounted from there.
        let is_mapped_below = program.is_some_and(|mapped| {
            !was_resident && self.host_device == Some(mapped.device)
                || may_be_below && watched.layers().is_none_or(|layers| layers.is_on(mapped.device))
        });
        let is_mapped_marked =
            program.is_some_and(|mapped| self.is_mapped_marked(execution, mapped));
        let mounted = match (&exe, program) {
            (None, Some(mapped)) if !is_mapped_marked => self.mounted(execution, mapped.device),
            _ => None,
        };
        let memfd_device = self.memfd_device;
        let is_parent_outside = self.is_parent_outside(execution);
        let evidence = Evidence {
            mapped: program,
            is_mapped_marked,
            exe,
            memfd_device,
            is_mapped_below,
            is_parent_outside,
            mounted,
        };
        let Judged::Unseen(filesystem) = evidence::judge(&evidence) else { return None };
        if !self.shared.settings.looks_at(filesystem) {
            return None;
        }
        let file = opened.filter(|_| exe.is_some());
        let file = file.map(|(fd, stat)| (Held { fd, stat }, ground.local()));
        let name = match (program, &file) {
            (Some(mapped), _) => mapped.name.to_vec(),
            (None, Some((exe, _))) => file::name_of(exe.fd.as_fd()).ok()?,
            (None, None) => return None,
        };
        Some(execution.unseen(filesystem, name, file, handle, is_parent_outside))
    }

    /// Whether a file lies on a mount that its process does not see itself. Such a process is
    /// on its way in, by setns(2) or chroot(2).
    fn is_behind(&self, handle: Option<&Handle>, stat: &Stat) -> bool {
        let is_hidden = |mountinfo: Vec<u8>| {
            stat.mount.is_some_and(|mount| overlay::find_place(&mountinfo, mount).is_none())
        };
        Some(stat.device) == self.host_device
            && handle.and_then(|handle| handle.mountinfo().ok()).is_none_or(is_hidden)
    }

    /// Whether the gate reports an execution, by the file that its process runs.
    fn is_marked(&self, execution: &Execution<'_>, stat: &Stat) -> bool {
        self.shared.table.owner(stat).is_some()
            || execution.asked.contains(&(stat.device, stat.inode))
            || self.gate_will_report(stat.device, stat.mount, execution.executed)
    }

    /// Whether the gate reports an execution, by the file that was mapped first.
    fn is_mapped_marked(&self, execution: &Execution<'_>, mapped: &Mapped) -> bool {
        self.shared.table.by_device(mapped.device).is_some()
            || execution.asked.contains(&(mapped.device, mapped.inode))
            || self.gate_will_report(mapped.device, None, execution.executed)
    }

    /// What serves the filesystem of a program's file, as its process sees it, or else its
    /// parent.
    fn ground(&self, execution: &Execution<'_>, handle: Option<&Handle>, stat: &Stat) -> Ground {
        if Some(stat.device) == self.memfd_device {
            return Ground::Memory;
        }
        let view = View::of(handle);
        if view.mount(stat).is_some() {
            return view.ground(stat);
        }
        let parent = execution.parent.and_then(|parent| Handle::open(parent).ok());
        View::of(&parent).ground(stat)
    }

    /// Examines a script that was executed by its descriptor. The mapped file is its
    /// interpreter, which gets the descriptor too, so that it stays open.
    pub(crate) fn examine_script(
        &self,
        execution: &Execution<'_>,
        descriptor: u32,
    ) -> Option<Unseen> {
        let handle = Handle::open(execution.executed.pid).ok()?;
        let fd = handle.open_descriptor(descriptor).ok()?;
        let stat = file::stat(&fd).ok()?;
        let table = &self.shared.table;
        if !stat.is_regular()
            || table.is_marked(stat.device, stat.mount)
            || table.owner(&stat).is_some()
        {
            return None;
        }
        let ground = View::of([&handle]).ground(&stat);
        // For a file that cannot be read it is enough that its interpreter runs.
        if let Some(local) = ground.local() {
            let script = door::reopen(fd.as_fd(), local).ok()?;
            if file::sniff(script.as_fd()).ok()? != Format::Script {
                return None;
            }
        }
        let filesystem = if Some(stat.device) == self.memfd_device || stat.links == 0 {
            Filesystem::Anonymous
        } else if ground == Ground::Memory {
            Filesystem::Tmpfs
        } else {
            Filesystem::Volume
        };
        let name = file::name_of(fd.as_fd()).ok()?;
        let is_parent_outside = self.is_parent_outside(execution);
        let file = Some((Held { fd, stat }, ground.local()));
        let found = execution.unseen(filesystem, name, file, Some(handle), is_parent_outside);
        Some(Unseen { is_script: true, ..found })
    }

    /// The kind of filesystem that is mounted where the process, its parent or its container
    /// lives.
    fn mounted(&self, execution: &Execution<'_>, device: u64) -> Option<Filesystem> {
        let viewers =
            [Some(execution.executed.pid), execution.parent, Some(execution.watched.init.pid)];
        viewers
            .into_iter()
            .flatten()
            .find_map(|viewer| {
                evidence::mounted(&Handle::open(viewer).ok()?.mountinfo().ok()?, device)
            })
            .or_else(|| self.shared.table.kind_of(device))
    }

    /// Whether the parent of this process is in no container.
    fn is_parent_outside(&self, execution: &Execution<'_>) -> bool {
        let parent = execution
            .parent
            .or_else(|| Some(procfs::read_stat(execution.executed.pid).ok()?.parent));
        let Some(parent) = parent else { return false };
        match self.processes.get(&parent) {
            Some(Known { watched: Some(_), .. }) => false,
            Some(_) | None => {
                procfs::mount_namespace_of(parent).is_ok_and(procfs::is_host_mount_namespace)
            }
        }
    }
}

/// One execve, with what was known before it.
pub(crate) struct Execution<'a> {
    pub(crate) watched: Arc<Watched>,
    pub(crate) executed: &'a Executed,
    pub(crate) program: Option<Arc<Mapped>>,
    pub(crate) previous: Option<Arc<Mapped>>,
    pub(crate) parent: Option<u32>,
    /// The files that the gate was asked about, by device and inode.
    pub(crate) asked: Vec<(u64, u64)>,
    /// The process belonged to the container before, and does not come from outside.
    pub(crate) was_resident: bool,
    /// The container in whose root the program lies, if that is another container.
    pub(crate) file_of: Option<ContainerId>,
}

impl Execution<'_> {
    fn unseen(
        &self,
        filesystem: Filesystem,
        name: Vec<u8>,
        file: Option<(Held, Option<Local>)>,
        handle: Option<Handle>,
        is_parent_outside: bool,
    ) -> Unseen {
        Unseen {
            watched: self.watched.clone(),
            at: records::time_of(self.executed.time),
            filesystem,
            name,
            file,
            handle,
            pid: self.executed.pid,
            executed: self.executed.time,
            parent: self.parent,
            exec_name: self.executed.file_name.to_vec(),
            is_script: false,
            previous: self.previous.clone().filter(|_| is_parent_outside),
            is_parent_outside,
            progress: None,
            file_of: self.file_of.clone(),
        }
    }
}
