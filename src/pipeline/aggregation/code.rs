//! The group of code that was run or loaded: by the package manager that brought it, the
//! linker that made it, or the process that runs it. Pure. What only its place decides on is
//! in `files`.

use std::sync::Arc;

use super::group::{Candidate, Common, Group};
use super::packages::{is_images_own, transaction_id};
use crate::baseline::ImageBaseline;
use crate::inventory::{Aspect, Entry, Reported, Unpacking};
use crate::model::{
    Ancestor, Blake3Hash, ContainerId, CouldChange, FindingId, Kind, Process, ProcessIdentity,
    RootfsPath, Severity, generated, is_linker, programs,
};

/// Code that was run or loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used<'a> {
    pub(super) file: Candidate<'a>,
    pub(super) process: Option<&'a Process>,
    pub(super) writer: Option<&'a Process>,
    /// The file may have held other code when it was run.
    pub(super) could_change: CouldChange,
    /// A person may type the commands of the process.
    pub(super) is_interactive: bool,
    /// The container's init.
    pub(super) init: ProcessIdentity,
}

/// The group of code that has something in common with other code; `None` if it has not.
pub(super) fn used_group(
    entry: &Entry,
    image: &ImageBaseline,
    container: &ContainerId,
    used: &Used<'_>,
) -> Option<Group> {
    let Candidate { kind, severity, path, content, .. } = used.file;
    let group = |place, content, common| Group { kind, place, content, common: Some(common) };
    if let Some(transaction) = brought_by(entry, container, used) {
        return Some(group(None, None, Common::Brought(transaction)));
    }
    if let Some(linker) = built_by(entry, image, used) {
        return Some(group(None, None, Common::Built { linker }));
    }
    if let Some(unpacking) = unpacked_by(entry, image, used) {
        let common = Common::Unpacked(unpacking);
        let executed = Group { kind: Kind::ExecScript, ..group(None, None, common.clone()) };
        // A script that an interpreter was given by name is worth no line of its own.
        let is_known = entry.findings.contains(&executed.id(container));
        return Some(if is_known { executed } else { group(None, None, common) });
    }
    let pattern = match kind {
        // A program makes or unpacks it for itself: any name may be generated.
        Kind::LibraryLoaded if severity == Severity::Info => any_name_beside(path),
        _ => generated::pattern(path),
    };
    let is_handed_over = matches!(kind, Kind::ExecInterpreted | Kind::LibraryLoaded);
    if severity >= Severity::High && !is_handed_over {
        // The same content, whatever its name.
        let is_one_of_many = pattern.is_some() && content.is_some();
        return is_one_of_many.then(|| group(None, content, Common::Severity(severity)));
    }
    let by = match kind {
        // One program writes scripts for `sh` and for `bash`.
        Kind::ExecInterpreted => used.process.and_then(|one| interpreter_of(one.exe.as_deref()?)),
        Kind::LibraryLoaded => used.process.and_then(|one| one.exe.clone()),
        _ => used.process.and_then(|one| one.ancestors.first()?.exe.clone()),
    };
    if let Some(pattern) = pattern {
        return Some(group(None, None, Common::Pattern { pattern, by, severity }));
    }
    let process = used.process.map(|process| process.identity);
    match (kind, process.filter(|process| process.pid > 0)) {
        (Kind::LibraryLoaded, Some(process)) => {
            Some(group(path.parent(), None, Common::Loaded { process, severity }))
        }
        _ => None,
    }
}

/// The interpreter, or all shells for a shell.
fn interpreter_of(exe: &str) -> Option<String> {
    let name = exe.rsplit('/').next()?;
    let is_shell = programs::is_shell(name.as_bytes());
    Some(if is_shell { "shells".to_owned() } else { exe.to_owned() })
}

/// The pattern of all names in the directory of a file. The directory's name may be
/// generated too.
fn any_name_beside(path: &RootfsPath) -> Option<Vec<u8>> {
    let all = path.parent()?.join(b"*").ok()?;
    Some(generated::pattern(&all).unwrap_or_else(|| all.as_bytes().to_vec()))
}

/// The transaction that has brought a file with the content that was run.
fn brought_by(entry: &Entry, container: &ContainerId, used: &Used<'_>) -> Option<FindingId> {
    let Candidate { path, content, .. } = used.file;
    content.filter(|_| !used.could_change.is_possible())?;
    let written = entry.members.of(Aspect::Written, path);
    if let Some((id, reported)) = written
        && reported == Reported::content(content)
        && entry.findings.get(&id).is_some_and(|finding| finding.kind == Kind::PackageTransaction)
    {
        return Some(id);
    }
    let manager = entry.writers.package_manager_of(used.writer?)?;
    Some(transaction_id(container, manager))
}

/// The linker of the image that has made the code, if the process belongs to the tree of
/// processes that has run the linker. What a person runs interactively is no build. A copy of
/// a linked file (`make install`) has the same content, and counts. A build removes what it has
/// run, sometimes before it is read: that nothing proves the content then is no reason to report
/// it alone. A writer beside the linker is one.
fn built_by(entry: &Entry, image: &ImageBaseline, used: &Used<'_>) -> Option<String> {
    if used.could_change == CouldChange::HadWriter || used.is_interactive {
        return None;
    }
    let is_code = matches!(used.file.kind, Kind::ExecNew | Kind::LibraryLoaded);
    let process = used.process.filter(|_| is_code)?;
    let is_written = |writer: &&Process| writer.exe.as_deref().is_some_and(is_linker);
    let writer = used.writer.filter(is_written);
    let writer = writer.or_else(|| entry.writers.linked(used.file.content?))?;
    let linker = writer.exe.as_deref()?;
    let is_built = is_images_own(entry, image, linker) && are_one_tree(writer, process, used.init);
    is_built.then(|| linker.to_owned())
}

/// The process of the image that has unpacked a script, or from whose files comes the script
/// that has written this one. Its tree of processes runs the script. What a person runs
/// interactively does not count, and neither does anything worse than a script usually is.
fn unpacked_by(entry: &Entry, image: &ImageBaseline, used: &Used<'_>) -> Option<Unpacking> {
    let Candidate { kind, severity, content, .. } = used.file;
    if used.could_change.is_possible() || used.is_interactive || severity > kind.severity() {
        return None;
    }
    let is_script = matches!(kind, Kind::ExecScript | Kind::ExecInterpreted);
    let process = used.process.filter(|_| is_script)?;
    content?;
    let above = |process: &Process| entry.writers.unpacking_above(process).cloned();
    let Some(writer) = used.writer else {
        // Written just now, most likely by the script that hands it to the interpreter.
        return above(process).filter(|_| kind == Kind::ExecInterpreted);
    };
    if !are_one_tree(writer, process, used.init) {
        return None;
    }
    let exe = writer.exe.as_deref()?;
    let called = programs::called_as(exe, writer.argv.as_deref());
    if programs::is_archiver(called.as_bytes()) && is_images_own(entry, image, exe) {
        let known = entry.writers.known_archiver(writer, used.init);
        let archiver = known.unwrap_or_else(|| Arc::new(writer.clone()));
        return Some(Unpacking { archiver, exe: exe.to_owned() });
    }
    above(writer)
}

/// Whether a process belongs to the tree of processes that has run the writer: it is above the
/// writer, or both descend from one process of the container. A process outside has started the
/// container, or has come in: it is no common origin.
fn are_one_tree(writer: &Process, process: &Process, init: ProcessIdentity) -> bool {
    let is_above = |above: &[Ancestor], one: ProcessIdentity| {
        above.iter().any(|ancestor| ancestor.identity.may_be(one))
    };
    let mut inside = inside(&writer.ancestors, init).iter().chain(inside(&process.ancestors, init));
    is_above(&writer.ancestors, process.identity)
        || inside.any(|one| {
            is_above(&writer.ancestors, one.identity) && is_above(&process.ancestors, one.identity)
        })
}

/// The ancestors that are in the container for certain. They end with init, or with the first
/// process outside. The kernel's records have no start times; they may end too early, or go on
/// outside.
fn inside(ancestors: &[Ancestor], init: ProcessIdentity) -> &[Ancestor] {
    let is_recorded = |ancestor: &Ancestor| ancestor.identity.start_time == 0;
    match ancestors.iter().position(|ancestor| ancestor.identity.may_be(init)) {
        Some(at) => &ancestors[..=at],
        None if ancestors.iter().any(is_recorded) => {
            let proven = ancestors.iter().take_while(|ancestor| ancestor.is_proven_inside);
            &ancestors[..proven.count()]
        }
        None => ancestors.split_last().map_or(&[], |(_, inside)| inside),
    }
}

/// Whether a finding reports that this content was run.
pub(in crate::pipeline) fn is_reported_as_executed(
    entry: &Entry,
    path: &RootfsPath,
    content: Option<Blake3Hash>,
) -> bool {
    entry.findings.about_content(path, content).any(|finding| finding.kind.is_run())
        || Kind::ALL.iter().filter(|kind| kind.is_run()).any(|kind| {
            let known = entry.members.of(Aspect::of(*kind), path);
            known.is_some_and(|(_, reported)| reported == Reported::content(content))
        })
}
