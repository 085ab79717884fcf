//! What a thread reads a guarded file for, while it waits: as a script that it was given, as a
//! library that it loads, or for anything else.
//!
//! A library is recognised by a read of its beginning that is as long as a dynamic linker's. A
//! program that copies, prints or examines the file reads more at once, or a few bytes. A script is recognised by the
//! interpreter's arguments, as `interpreters` does it when the read is over. The process can
//! change its arguments, and then reads what it should not; its execution was recorded, so it
//! is killed.
//!
//! `exec` asks this file and decides. Nothing is hashed here, and nothing is reported.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use super::given::{self, Given};
use super::scripts::{self, Language, Runs};
use crate::model::{Format, Process};
use crate::sys::fanotify::Range;
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle, ReadCall};
use crate::watch::core::watched::Watched;
use crate::watch::files::upper;
use crate::watch::process::describe;

/// A guarded file that is about to be read.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    /// On the filesystem below the overlay.
    pub(crate) file: &'a OwnedFd,
    pub(crate) stat: &'a Stat,
    pub(crate) range: Option<Range>,
    pub(crate) thread: u32,
}

/// What a file is read for.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// A dynamic linker reads it; with `by_linker`, as the program that it was given.
    Library {
        process: Process,
        by_linker: bool,
    },
    Script {
        process: Process,
    },
}

/// A dynamic linker reads the header of a library and what follows it with one read of about
/// this many bytes: 832 in glibc, 512 in an older one for 32 bits, about 950 in musl. Programs
/// that examine files read more at once, or a few bytes.
const LINKERS: std::ops::Range<u64> = 512..4096;

/// `Ok(None)` if it is read for anything else. An error if that cannot be found out.
pub(crate) fn purpose(watched: &Arc<Watched>, read: &Read<'_>) -> io::Result<Option<Purpose>> {
    // Before a program runs, the gate for executions decides, and the kernel reads the file
    // afterwards.
    let call = procfs::read_call(read.thread)?;
    if call == ReadCall::Execve {
        return Ok(None);
    }
    let handle = Handle::open(procfs::process_of(read.thread)?)?;
    let process = || describe::as_it_is(&handle, watched);
    if file::sniff(read.file.as_fd())? == Format::Elf {
        let is_head = read.range.is_none_or(Range::is_head);
        let is_linkers = matches!(call, ReadCall::Read(length) if LINKERS.contains(&length));
        let by_linker = || handle.exe().is_ok_and(|exe| scripts::is_linker(&exe));
        return Ok((is_head && is_linkers)
            .then(|| Purpose::Library { process: process(), by_linker: by_linker() }));
    }
    let is_script = is_its_script(watched, &handle, read.stat)?;
    Ok(is_script.then(|| Purpose::Script { process: process() }))
}

/// Whether a process is an interpreter that was given this file.
fn is_its_script(watched: &Arc<Watched>, handle: &Handle, stat: &Stat) -> io::Result<bool> {
    let (exe, Some(arguments)) = (handle.exe()?, handle.arguments()?) else { return Ok(false) };
    let is_multicall =
        handle.exe_identity().is_ok_and(|(device, inode)| watched.is_multicall(device, inode));
    let program = if is_multicall { b"busybox" } else { exe.as_slice() };
    let Some((language, rest)) = scripts::interpreter(program, &arguments) else {
        return Ok(false);
    };
    let is_it = |fd: &OwnedFd| file::stat(fd).is_ok_and(|found| upper::is_this(stat, &found));
    let name = match scripts::runs(language, rest) {
        Runs::File(name) => name,
        Runs::Input => {
            let given = given::by_descriptor(handle, 0);
            return Ok(matches!(given, Given::File(fd) if is_it(&fd)));
        }
        Runs::Inline => return Ok(false),
    };
    let named = match given::by_name(watched, handle, &name) {
        Given::File(named) => Some(named),
        _ => None,
    };
    if named.as_ref().is_some_and(is_it) {
        return Ok(true);
    }
    // The name leads elsewhere by now, but a shell has its script open. Other files that it has
    // open are no scripts.
    let held = match language {
        Language::Shell => given::held_by_shell(handle),
        _ => Vec::new(),
    };
    let identity = |fd: &OwnedFd| file::stat(fd).ok().map(|stat| (stat.device, stat.inode));
    let is_named = |fd: &OwnedFd| named.as_ref().is_some_and(|it| identity(it) == identity(fd));
    Ok(!held.iter().any(is_named) && held.iter().any(is_it))
}
