//! What a thread reads a guarded file for, while it waits: as a script that it was given, as a
//! library that it loads, or for anything else.
//!
//! A library is recognised by the read of its header alone, as every dynamic linker begins. A
//! program that copies or prints the file reads more at once. A script is recognised by the
//! interpreter's arguments, as `interpreters` does it when the read is over. The process can
//! change its arguments, and then reads what it should not; its execution was recorded, so it
//! is killed.
//!
//! `exec` asks this file and decides. Nothing is hashed here, and nothing is reported.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use super::given::{self, Given};
use super::scripts::{self, Language, Runs};
use crate::model::{Format, Process};
use crate::sys::fanotify::Range;
use crate::sys::file::{self, Stat};
use crate::sys::procfs::{self, Handle};
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

/// `None` if it is read for anything else, or if the process is gone.
pub(crate) fn purpose(watched: &Arc<Watched>, read: &Read<'_>) -> Option<Purpose> {
    // Before a program runs, the gate for executions decides, and the kernel reads the file
    // afterwards.
    if procfs::is_in_execve(read.thread) {
        return None;
    }
    let handle = Handle::open(procfs::process_of(read.thread).ok()?).ok()?;
    let process = || describe::as_it_is(&handle, watched);
    if file::sniff(read.file.as_fd()).ok()? == Format::Elf {
        let is_header = read.range.is_none_or(Range::is_head);
        let by_linker = || handle.exe().is_ok_and(|exe| scripts::is_linker(&exe));
        return is_header.then(|| Purpose::Library { process: process(), by_linker: by_linker() });
    }
    is_its_script(watched, &handle, read.stat).then(|| Purpose::Script { process: process() })
}

/// Whether a process is an interpreter that was given this file.
fn is_its_script(watched: &Arc<Watched>, handle: &Handle, stat: &Stat) -> bool {
    let is_it = |fd: &OwnedFd| file::stat(fd).is_ok_and(|found| upper::is_same(stat, &found));
    let is_given = |given| matches!(given, Given::File(fd) if is_it(&fd));
    let is_script = || {
        let (exe, arguments) = (handle.exe().ok()?, handle.arguments().ok()??);
        let is_multicall =
            handle.exe_identity().is_ok_and(|(device, inode)| watched.is_multicall(device, inode));
        let program = if is_multicall { b"busybox" } else { exe.as_slice() };
        let (language, rest) = scripts::interpreter(program, &arguments)?;
        Some(match scripts::runs(language, rest) {
            Runs::File(name) => {
                // A shell has it open by now, wherever the name leads.
                let is_shells = language == Language::Shell;
                is_given(given::by_name(watched, handle, &name))
                    || is_shells && given::held_by_shell(handle).iter().any(is_it)
            }
            Runs::Input => is_given(given::by_descriptor(handle, 0)),
            Runs::Inline => false,
        })
    };
    is_script().unwrap_or(false)
}
