//! The script that an interpreter was given, found as the interpreter finds it: by a name
//! below its own root and working directory, by a descriptor, or, for a shell, by the
//! descriptor that the shell reads its script from.
//!
//! No filesystem is asked that may never respond: [`door`] decides that. `interpreters`
//! calls this file, and `inspect` reads the script that was found.

use std::os::fd::OwnedFd;

use super::shells::Pipe;
use crate::model::FileType;
use crate::sys::door::{self, Base, Held, Way};
use crate::sys::file;
use crate::sys::overlay::strip_directory;
use crate::sys::procfs::{self, Descriptor, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::reach;

/// What was found.
#[derive(Debug)]
pub(crate) enum Given {
    /// A regular file, opened only to be examined.
    File(OwnedFd),
    /// A pipe, or a FIFO.
    Pipe(Pipe),
    /// At this path, on a filesystem that must not be asked.
    Foreign(Vec<u8>),
    /// Something that holds no text: a terminal, a socket, a directory.
    Nothing,
    /// Unknown: the name leads nowhere any more, or the descriptor is closed.
    Missing,
}

/// A path through /proc may lead to another such path. More of them are not followed.
const MAX_DETOURS: u32 = 4;

/// What a name leads to, from a process's root and working directory.
pub(crate) fn by_name(watched: &Watched, handle: &Handle, name: &[u8]) -> Given {
    let base = handle.open_working_directory().ok().map(|fd| Base {
        fd,
        path: handle.cwd().map(|cwd| below_root(watched, handle, cwd)).unwrap_or_default(),
    });
    let start = Start { watched, handle, base, detours: MAX_DETOURS };
    start.look_up(name)
}

/// What a process has open under a number.
pub(crate) fn by_descriptor(handle: &Handle, number: u32) -> Given {
    match handle.descriptor(number) {
        Ok(Descriptor::Pipe { device, inode }) => Given::Pipe((device, inode)),
        Ok(Descriptor::Other) => held(handle.open_descriptor(number)),
        Ok(Descriptor::Socket(_) | Descriptor::Terminal(_) | Descriptor::TerminalMaster(_)) => {
            Given::Nothing
        }
        Err(_) => Given::Missing,
    }
}

/// The files that a shell may read its script from: under the number that bash uses, and under
/// the first numbers that other shells use for themselves. If the parent has the same file
/// under that number, the shell has inherited it and it is no script. It can also have been
/// given another file under such a number, by a redirection: then there are several.
pub(crate) fn held_by_shell(handle: &Handle) -> Vec<OwnedFd> {
    let parent = Handle::open(handle.first_stat().parent).ok();
    let identity = |fd: &OwnedFd| file::stat(fd).ok().map(|stat| (stat.device, stat.inode));
    let candidates = [255, 10, 11, 12].into_iter().filter_map(|number| {
        if !matches!(handle.access(number), Ok((true, false))) {
            return None;
        }
        let Given::File(fd) = by_descriptor(handle, number) else { return None };
        let parents = parent.as_ref().and_then(|parent| parent.open_descriptor(number).ok());
        let is_given = parents.is_some_and(|parents| identity(&parents) == identity(&fd));
        (!is_given).then_some(fd)
    });
    candidates.collect()
}

/// A path that the kernel reports to driftd, as seen from a process's root.
fn below_root(watched: &Watched, handle: &Handle, path: Vec<u8>) -> Vec<u8> {
    let root = handle.root().unwrap_or_default();
    let below =
        strip_directory(&path, &root).or_else(|| strip_directory(&path, &watched.root_name));
    below.map(<[u8]>::to_vec).unwrap_or(path)
}

fn held(opened: std::io::Result<OwnedFd>) -> Given {
    let Ok(fd) = opened else { return Given::Missing };
    match file::stat(&fd) {
        Ok(stat) => of_held(Held { fd, stat }),
        Err(_) => Given::Missing,
    }
}

fn of_held(Held { fd, stat }: Held) -> Given {
    match stat.file_type {
        FileType::Regular => Given::File(fd),
        FileType::Fifo => Given::Pipe((stat.device, stat.inode)),
        _ => Given::Nothing,
    }
}

/// The place from which a name is looked up.
struct Start<'a> {
    watched: &'a Watched,
    handle: &'a Handle,
    base: Option<Base>,
    detours: u32,
}

impl Start<'_> {
    fn look_up(self, name: &[u8]) -> Given {
        let Start { watched, handle, base, detours } = self;
        let Ok(root) = handle.open_root() else { return Given::Missing };
        if let Some(found) = within_own_layers(watched, &root, base.as_ref(), name) {
            return of_held(found);
        }
        let init = Handle::open_exactly(watched.init).ok();
        let view = watched.view(std::iter::once(handle).chain(&init));
        match door::walk(root, base, name, &view) {
            Ok(Way::Found(held)) => of_held(held),
            Ok(Way::Foreign(path)) => Given::Foreign(path),
            Ok(Way::Process(names)) => {
                let names: Vec<&[u8]> = names.iter().map(Vec::as_slice).collect();
                in_proc(watched, handle, &names, detours)
            }
            Err(_) => Given::Missing,
        }
    }
}

/// The common case: the whole path lies on the container's own overlay.
fn within_own_layers(
    watched: &Watched,
    root: &OwnedFd,
    base: Option<&Base>,
    name: &[u8],
) -> Option<Held> {
    let local = watched.local()?;
    let root_mount = file::stat(root).ok().filter(|root| root.device == watched.device)?.mount?;
    let path = match base.filter(|_| !name.starts_with(b"/")) {
        Some(base) if file::stat(&base.fd).ok()?.mount == Some(root_mount) => {
            [&base.path, &b"/"[..], name].concat()
        }
        Some(_) => return None,
        None => name.to_vec(),
    };
    door::find_on_one_mount(root, &path, local).ok()
}

/// What the rest of a path behind `/proc/` leads to.
fn in_proc(watched: &Watched, handle: &Handle, names: &[&[u8]], detours: u32) -> Given {
    let Some((process, names)) = names.split_first() else { return Given::Nothing };
    let Some(detours) = detours.checked_sub(1) else { return Given::Missing };
    let number = |name: &[u8]| str::from_utf8(name).ok()?.parse::<u32>().ok();
    let other;
    let handle = match *process {
        b"self" | b"thread-self" => handle,
        name => {
            let Some(wanted) = number(name) else { return Given::Missing };
            if handle.own_number() == Some(wanted) {
                handle
            } else {
                let mut all = reach::processes_of(watched).into_iter();
                let own = all.find(|process| process.own_number() == Some(wanted));
                other = own.or_else(|| in_pid_namespace_of(handle, wanted));
                let Some(other) = &other else { return Given::Missing };
                other
            }
        }
    };
    let names = match names {
        [b"task", _, rest @ ..] => rest,
        names => names,
    };
    let from = |base: Option<Base>, rest: &[&[u8]]| {
        let start = Start { watched, handle, base, detours };
        let name = rest.join(&b'/');
        start.look_up(if name.is_empty() { b"." } else { &name })
    };
    let base = |fd: std::io::Result<OwnedFd>, path: Vec<u8>| {
        Some(Base { fd: fd.ok()?, path: below_root(watched, handle, path) })
    };
    match names {
        [b"exe"] => held(handle.open_exe()),
        [b"root", rest @ ..] => from(None, rest),
        [b"cwd", rest @ ..] => {
            let cwd = base(handle.open_working_directory(), handle.cwd().unwrap_or_default());
            cwd.map_or(Given::Missing, |cwd| from(Some(cwd), rest))
        }
        [b"fd", name] => {
            number(name).map_or(Given::Missing, |number| by_descriptor(handle, number))
        }
        [b"fd", name, rest @ ..] => {
            let directory = number(name).and_then(|number| {
                let path = handle.descriptor_name(number).unwrap_or_default();
                base(handle.open_descriptor(number), path)
            });
            directory.map_or(Given::Missing, |directory| from(Some(directory), rest))
        }
        _ => Given::Missing,
    }
}

/// The process with this number in the pid namespace of another process. Several containers
/// may share that namespace.
fn in_pid_namespace_of(handle: &Handle, number: u32) -> Option<Handle> {
    let namespace = handle.pid_namespace().ok()?;
    let is_there = |pid: &u32| procfs::pid_namespace_of(*pid).is_ok_and(|it| it == namespace);
    let beside = procfs::all().ok()?.into_iter().filter(is_there);
    beside.filter_map(|pid| Handle::open(pid).ok()).find(|it| it.own_number() == Some(number))
}
