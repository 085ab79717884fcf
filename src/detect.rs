//! Says how a fact departs from the image.
//!
//! Pure: no clock, no disk, no lock. A false "no drift" is the costly mistake,
//! so anything that is not provably the image's own file counts as drift. Three
//! outcomes by path and content decide: the image's own content at its own path
//! (silent, whatever its owner, mode or time), other content at a path of the
//! image, and content of the image at a path that the image does not have.

use crate::baseline::{ImageBaseline, Known};
use crate::model::file::{grants_identity, is_program};
use crate::model::{
    Blake3Hash, Content, EntryPoint, Fact, FileState, FileType, Filesystem, Format, Kind,
    PathGlobs, Process, RootfsPath, Script, Severity, Unhashed, programs,
};

/// Where a file matters in a container whatever it holds: others run or obey it.
#[derive(Clone, Copy, Debug)]
pub struct Sensitive<'a> {
    /// As the settings say.
    pub persistence: &'a PathGlobs,
    /// As [`entry_point`] says.
    pub entry_point: &'a [RootfsPath],
    /// The path by which the container reaches the file as well.
    pub reached_as: Option<&'a RootfsPath>,
}

impl Sensitive<'_> {
    fn covers(self, path: &RootfsPath, state: &FileState) -> bool {
        // A directory is reported only if something was mounted there.
        let leads_away = matches!(state.file_type, FileType::Symlink | FileType::Directory);
        [Some(path), self.reached_as].into_iter().flatten().any(|path| {
            self.persistence.matches(path)
                || self.entry_point.contains(path)
                || leads_away && self.persistence.leads_to(path)
        })
    }
}

/// How one path of a container differs from its image, drift or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Added,
    /// Other content, or data, whose content is not compared.
    Modified,
    Removed,
    /// Same content; mode, owner, time or an attribute differ.
    Metadata,
    /// Content of the image at a new path.
    Relocated,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Judgement {
    pub kind: Kind,
    pub severity: Severity,
    /// What the image has instead: at the path or, for relocated content, where
    /// the content belongs.
    pub expected: Option<Known>,
}

/// What is to be said about one fact.
#[derive(Clone, Debug)]
pub struct Assessment {
    pub change: Change,
    /// Empty when the difference is no drift.
    pub judgements: Vec<Judgement>,
}

/// Judges a fact about a file. A session, or a shell and its connection, is no
/// fact about a file: `None`.
pub fn assess(image: &ImageBaseline, sensitive: Sensitive<'_>, fact: &Fact) -> Option<Assessment> {
    match fact {
        Fact::Executed { path, filesystem, running, state, .. } => Some(match filesystem {
            Filesystem::Overlay => assess_executed(image, path, state, *running),
            Filesystem::Tmpfs
            | Filesystem::Volume
            | Filesystem::Anonymous
            | Filesystem::Container => assess_executed_elsewhere(image, path, *filesystem, state),
        }),
        Fact::Loaded { path, filesystem, state, is_shared, .. } => {
            let mut assessment = assess_code(image, Kind::LibraryLoaded, path, *filesystem, state);
            if is_generated(image, path, *filesystem, state, *is_shared) {
                for judgement in &mut assessment.judgements {
                    judgement.severity = Severity::Info;
                }
            }
            Some(assessment)
        }
        Fact::Interpreted { script: Script::File { path, filesystem, state, .. }, .. } => {
            Some(assess_code(image, Kind::ExecInterpreted, path, *filesystem, state))
        }
        Fact::Interpreted { script: Script::Pipe { .. }, .. } => Some(Assessment {
            change: Change::Added,
            judgements: vec![judgement(Kind::ExecInterpreted, None)],
        }),
        Fact::Present { path, state, .. } => {
            let mut assessment = assess_present(image, path, state);
            if sensitive.covers(path, state) {
                // Before what it may grant, behind what it is.
                let at = assessment.judgements.len().min(1);
                let told = persistence(image, path, state);
                assessment.judgements.splice(at..at, told);
            }
            Some(assessment)
        }
        Fact::Absent { path, .. } => Some(assess_absent(image, path)),
        Fact::ReverseShell { .. }
        | Fact::PackageManager { .. }
        | Fact::SessionOpened { .. }
        | Fact::SessionRan { .. }
        | Fact::SessionRanMore { .. }
        | Fact::SessionInteractive { .. }
        | Fact::SessionProcessEnded { .. } => None,
    }
}

/// No image has such a thing. Pipes between the shell and its connection are
/// evidence, but less of it than the connection itself.
pub fn reverse_shell(direct: bool) -> Assessment {
    let kind = Kind::ShellReverse;
    let severity = if direct { kind.severity() } else { Severity::High };
    let judgements = vec![Judgement { kind, severity, expected: None }];
    Assessment { change: Change::Added, judgements }
}

/// A program from a filesystem that the image knows nothing of: its paths promise
/// nothing, its content may still be the image's.
fn assess_executed_elsewhere(
    image: &ImageBaseline,
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
) -> Assessment {
    let origins = origin(image, state);
    let change = if origins.is_some() { Change::Relocated } else { Change::Added };
    let main = match (filesystem, origins) {
        (Filesystem::Volume | Filesystem::Tmpfs, Some(origins)) => {
            relocated(image, Kind::ExecRelocated, path, origins)
        }
        // Its path is another container's and says nothing here.
        (Filesystem::Container, Some(origins)) => {
            judgement(Kind::ExecRelocated, origins.into_iter().next())
        }
        (_, origins) => {
            let kind = match filesystem {
                Filesystem::Anonymous => Kind::ExecFileless,
                Filesystem::Tmpfs => Kind::ExecTmpfs,
                Filesystem::Volume | Filesystem::Overlay => Kind::ExecVolume,
                Filesystem::Container if state.format == Format::Script => Kind::ExecScript,
                Filesystem::Container => Kind::ExecNew,
            };
            judgement(kind, origins.and_then(|origins| origins.into_iter().next()))
        }
    };
    let privileged = privileged(None, state);
    Assessment { change, judgements: std::iter::once(main).chain(privileged).collect() }
}

/// Code that is not executed itself: a library, or a script given to an
/// interpreter. The image's own content at its own path is silent.
fn assess_code(
    image: &ImageBaseline,
    kind: Kind,
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
) -> Assessment {
    let known = image.get(path).filter(|_| filesystem == Filesystem::Overlay);
    if known.as_ref().is_some_and(|known| ran_as_known(known, state)) {
        return Assessment { change: Change::Metadata, judgements: Vec::new() };
    }
    // Volumes are how scripts and drivers are handed to a container from outside.
    let severity = match filesystem {
        Filesystem::Volume => kind.severity().min(Severity::Medium),
        Filesystem::Overlay | Filesystem::Tmpfs | Filesystem::Anonymous | Filesystem::Container => {
            kind.severity()
        }
    };
    let severity = match (kind, filesystem) {
        (Kind::ExecInterpreted, Filesystem::Volume) => Severity::Low,
        _ => severity,
    };
    let origins = origin(image, state).filter(|_| known.is_none() || !state.could_change);
    if let Some(origins) = origins {
        // Known code from an unusual place: it can stand in for other code.
        let expected = origins.into_iter().next();
        let severity = severity.min(Severity::Medium);
        let judgements = vec![Judgement { kind, severity, expected }];
        return Assessment { change: Change::Relocated, judgements };
    }
    let change = if known.is_some() { Change::Modified } else { Change::Added };
    Assessment { change, judgements: vec![Judgement { kind, severity, expected: known }] }
}

/// Whether mapped code is what a program has generated for itself, and no library: the
/// dynamic linker takes nothing but ELF files, and maps them privately. What has taken
/// the place of a file of the image is never that.
pub fn is_generated(
    image: &ImageBaseline,
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
    is_shared: bool,
) -> bool {
    if filesystem == Filesystem::Overlay && image.get(path).is_some() {
        return false;
    }
    match state.format {
        Format::Elf => false,
        // A file without a name that nobody could read any more.
        Format::Unknown => is_shared && state.deleted,
        Format::ElfObject
        | Format::KernelModule
        | Format::Script
        | Format::Data
        | Format::Empty => true,
    }
}

/// Whether a library was laid there by the very program that loads it, as programs
/// do that carry libraries packed in themselves (netty, SQLite and others of a Java
/// program, single-file programs of other languages).
///
/// That is so if a program of the image, at its own path, wrote the file into a
/// temporary directory, or into one that the container has made outside of the system's
/// own, and loads it: the same process, or one that runs the same
/// program and has the writer for its parent (a worker of it). A shell is never
/// such a program: what it writes and loads is what it was told to. The caller
/// leaves out sessions, which do what a person wants, and programs that are drift
/// themselves.
pub fn is_extracted_by_itself(
    image: &ImageBaseline,
    path: &RootfsPath,
    process: &Process,
    writer: &Process,
) -> bool {
    let is_same_process = process.identity == writer.identity;
    let is_worker =
        process.ancestors.first().is_some_and(|parent| parent.identity == writer.identity);
    let exe = process.exe.as_ref().filter(|exe| Some(*exe) == writer.exe.as_ref());
    let Some(exe) = exe.and_then(|exe| RootfsPath::new(exe).ok()) else { return false };
    (is_same_process || is_worker)
        && (in_world_writable_directory(image, path) || in_directory_of_its_own(image, path))
        && image.get(&exe).as_ref().is_some_and(known_program)
        && !programs::is_shell(exe.file_name())
}

/// Whether the image does not have the directory of `path`, and nothing is looked for
/// there by itself.
fn in_directory_of_its_own(image: &ImageBaseline, path: &RootfsPath) -> bool {
    const SYSTEM: &[&str] = &["/bin", "/etc", "/lib", "/lib32", "/lib64", "/sbin", "/usr"];
    let is_of_system = SYSTEM
        .iter()
        .any(|system| RootfsPath::new(system).is_ok_and(|system| path.is_within(&system)));
    let parent = path.parent().unwrap_or_else(RootfsPath::root);
    !is_of_system && parent != RootfsPath::root() && image.get(&parent).is_none()
}

fn assess_executed(
    image: &ImageBaseline,
    path: &RootfsPath,
    state: &FileState,
    running: bool,
) -> Assessment {
    let known = image.get(path);
    let (change, main) =
        if let Some(known) = known.as_ref().filter(|known| ran_as_known(known, state)) {
            debug_assert_eq!(known.entry.file_type, FileType::Regular);
            (Change::Metadata, None)
        } else {
            // Text without `#!` that was executed is run by the shell that tried.
            let script = matches!(state.format, Format::Script | Format::Data | Format::Empty);
            match (known.clone().filter(occupies), origin(image, state)) {
                // A symlink of the image that became a copy of one of its programs:
                // the path promised a name, not a content.
                (Some(known), Some(origin)) if known.entry.file_type == FileType::Symlink => {
                    (Change::Relocated, Some(relocated(image, Kind::ExecRelocated, path, origin)))
                }
                // Nobody saw it start, and no name leads to it: what it was called is
                // hearsay.
                (known, _) if running && state.deleted => {
                    let change = if known.is_some() { Change::Modified } else { Change::Added };
                    (change, Some(judgement(Kind::ExecDeleted, known)))
                }
                (Some(known), _) => {
                    let kind = if script { Kind::ExecScript } else { Kind::ExecModified };
                    (Change::Modified, Some(judgement(kind, Some(known))))
                }
                (None, Some(origin)) => {
                    (Change::Relocated, Some(relocated(image, Kind::ExecRelocated, path, origin)))
                }
                (None, None) => {
                    let kind = if script { Kind::ExecScript } else { Kind::ExecNew };
                    (Change::Added, Some(judgement(kind, None)))
                }
            }
        };
    let privileged = privileged(known, state);
    Assessment { change, judgements: main.into_iter().chain(privileged).collect() }
}

fn assess_present(image: &ImageBaseline, path: &RootfsPath, state: &FileState) -> Assessment {
    let known = image.get(path);
    let Some(expected) = known.clone().filter(occupies) else {
        let (change, main) = match origin(image, state).filter(|_| state.is_program()) {
            Some(origin) => {
                (Change::Relocated, Some(relocated(image, Kind::FileRelocated, path, origin)))
            }
            None if state.is_program() => (Change::Added, Some(judgement(Kind::FileAdded, None))),
            None => (Change::Added, None),
        };
        // What took the place of a directory hides all that the image has below it.
        let removed = known
            .clone()
            .filter(|_| state.file_type != FileType::Directory && image.has_program_below(path))
            .map(|known| Judgement {
                severity: removed_severity(image, path),
                ..judgement(Kind::FileRemoved, Some(known))
            });
        let privileged = privileged(known, state);
        let judgements = main.into_iter().chain(removed).chain(privileged).collect();
        return Assessment { change, judgements };
    };
    let (change, main) = if same(&expected, state) {
        (Change::Metadata, None)
    } else if known_program(&expected) || state.is_program() {
        match origin(image, state).filter(|_| expected.entry.file_type == FileType::Symlink) {
            Some(origin) => {
                (Change::Relocated, Some(relocated(image, Kind::FileRelocated, path, origin)))
            }
            None => (Change::Modified, Some(judgement(Kind::FileModified, Some(expected)))),
        }
    } else {
        (Change::Modified, None)
    };
    let privileged = privileged(known, state);
    Assessment { change, judgements: main.into_iter().chain(privileged).collect() }
}

/// Something on a path that others run or obey is new, or not what the image has.
fn persistence(image: &ImageBaseline, path: &RootfsPath, state: &FileState) -> Option<Judgement> {
    let known = image.get(path).filter(occupies);
    let is_the_images =
        known.as_ref().is_some_and(|known| same(known, state) || is_same_link(known, state));
    // Nobody knew yet that it matters: it is read and told again.
    let is_unread = state.file_type == FileType::Regular
        && state.content == Content::Unhashed(Unhashed::NotAProgram);
    let told = (!is_the_images && !is_unread).then(|| judgement(Kind::FilePersistence, known))?;
    let is_from_skeleton = || {
        origin(image, state).into_iter().flatten().any(|origin| {
            origin.entry.path.file_name() == path.file_name()
                && origin.entry.path.parent().is_some_and(|parent| parent.as_bytes() == SKELETON)
        })
    };
    // A new home begins with these files. In the place of a file of the image they are none.
    let is_new_home = told.expected.is_none() && is_from_skeleton();
    let severity = if is_new_home { Severity::Info } else { told.severity };
    Some(Judgement { severity, ..told })
}

/// What a new user's home is filled with.
const SKELETON: &[u8] = b"/etc/skel";

/// Whether both are symlinks with one target, which is their content.
fn is_same_link(known: &Known, state: &FileState) -> bool {
    known.entry.file_type == FileType::Symlink
        && state.file_type == FileType::Symlink
        && known.entry.link_target.as_deref().is_some_and(|target| {
            state.blake3() == Some(Blake3Hash(*blake3::hash(target).as_bytes()))
        })
}

/// The files of the image that start a container: its program, the programs and
/// scripts that this one is given, and the symlinks that lead to them. Other
/// arguments, such as a configuration, may change in ordinary life.
pub fn entry_point(image: &ImageBaseline, entry_point: &EntryPoint) -> Vec<RootfsPath> {
    let EntryPoint { arguments, search, directory } = entry_point;
    let Some((program, rest)) = arguments.split_first() else { return Vec::new() };
    let in_directory = |directory: &str, name: &str| {
        if name.starts_with('/') { name.to_owned() } else { format!("{directory}/{name}") }
    };
    let found = if program.contains('/') {
        follow(image, &in_directory(directory, program))
    } else {
        search.iter().find_map(|directory| follow(image, &in_directory(directory, program)))
    };
    let mut paths = Vec::new();
    if let Some(found) = found {
        paths.extend(found.way);
    }
    let name = program.rsplit('/').next().unwrap_or_default();
    let mut wants_script = programs::is_launcher(name.as_bytes());
    for argument in rest.iter().take(64).filter(|argument| !argument.starts_with('-')) {
        if !wants_script && !argument.starts_with('/') {
            continue;
        }
        let Some(found) = follow(image, &in_directory(directory, argument)) else { continue };
        let Followed { way, file } = found;
        let is_code = known_program(&file) || file.entry.format == Format::Script;
        if std::mem::take(&mut wants_script) || is_code {
            paths.extend(way);
        }
    }
    paths.sort();
    paths.dedup();
    paths
}

/// A regular file of the image, and the symlinks by which it was reached.
struct Followed {
    /// Ends with the file's own path.
    way: Vec<RootfsPath>,
    file: Known,
}

/// Follows a path inside the image only, and not for ever.
fn follow(image: &ImageBaseline, path: &str) -> Option<Followed> {
    let components = |path: &[u8]| -> Vec<Vec<u8>> {
        // The next one is at the end.
        path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect()
    };
    let mut left = components(path.as_bytes());
    let mut at = RootfsPath::root();
    let mut way = Vec::new();
    while let Some(name) = left.pop() {
        match &*name {
            b"" | b"." => continue,
            b".." => at = at.parent().unwrap_or_else(RootfsPath::root),
            name => {
                let next = at.join(name).ok()?;
                match image.get(&next).and_then(|known| known.entry.link_target) {
                    Some(target) => {
                        way.push(next);
                        if way.len() > 16 {
                            return None;
                        }
                        if target.starts_with(b"/") {
                            at = RootfsPath::root();
                        }
                        left.extend(components(&target));
                    }
                    None => at = next,
                }
            }
        }
    }
    let file = image.get(&at).filter(|known| known.entry.file_type == FileType::Regular)?;
    way.push(at);
    Some(Followed { way, file })
}

fn assess_absent(image: &ImageBaseline, path: &RootfsPath) -> Assessment {
    let known = image.get(path);
    let removed = known.filter(|known| match known.entry.file_type {
        FileType::Regular => known_program(known),
        FileType::Directory => image.has_program_below(path),
        FileType::Symlink => leads_to_program(image, path),
        FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => false,
    });
    let judgements = removed.map(|known| {
        let severity = removed_severity(image, path);
        Judgement { kind: Kind::FileRemoved, severity, expected: Some(known) }
    });
    Assessment { change: Change::Removed, judgements: judgements.into_iter().collect() }
}

/// A directory that is gone is as bad as the worst that the image has in it.
fn removed_severity(image: &ImageBaseline, path: &RootfsPath) -> Severity {
    let is_program =
        |known: Known| known_program(&known) || leads_to_program(image, &known.entry.path);
    if programs::is_guard(path.file_name())
        || image.named_below(path, programs::is_guard).any(is_program)
    {
        Severity::Medium
    } else {
        Kind::FileRemoved.severity()
    }
}

fn judgement(kind: Kind, expected: Option<Known>) -> Judgement {
    Judgement { kind, severity: kind.severity(), expected }
}

/// Whether the image has a file here that another file can take the place of. A
/// directory of the image promises nothing about a file at its path.
fn occupies(known: &Known) -> bool {
    known.entry.file_type != FileType::Directory
}

/// Whether both are known to hold the same bytes. Unknown is not "same".
fn same(known: &Known, state: &FileState) -> bool {
    known.entry.file_type == FileType::Regular
        && state.file_type == FileType::Regular
        && known.entry.blake3.is_some()
        && known.entry.blake3 == state.blake3()
}

/// Whether a file that was run held what the image has there, and could not have held
/// anything else at that moment.
fn ran_as_known(known: &Known, state: &FileState) -> bool {
    same(known, state) && !state.could_change
}

/// Whether the image has a program at `path`.
pub fn is_program_of(image: &ImageBaseline, path: &RootfsPath) -> bool {
    image.get(path).as_ref().is_some_and(known_program)
}

fn known_program(known: &Known) -> bool {
    known.entry.file_type == FileType::Regular && is_program(known.entry.format, known.entry.mode)
}

/// Where the image has this content. An empty file is everywhere and nowhere.
fn origin(image: &ImageBaseline, state: &FileState) -> Option<Vec<Known>> {
    let blake3 = state.blake3().filter(|_| state.size > 0)?;
    // Names of one program: as many as a reader or the applet rule could want.
    const NAMES: usize = 512;
    Some(image.with_content(&blake3, NAMES)).filter(|origins| !origins.is_empty())
}

fn relocated(
    image: &ImageBaseline,
    kind: Kind,
    path: &RootfsPath,
    origins: Vec<Known>,
) -> Judgement {
    let disguised = kind == Kind::ExecRelocated
        && (in_world_writable_directory(image, path) || takes_a_name(image, path, &origins));
    let severity = if disguised { Severity::High } else { kind.severity() };
    Judgement { kind, severity, expected: origins.into_iter().next() }
}

/// Whether everybody may write into the directory that holds `path`.
fn in_world_writable_directory(image: &ImageBaseline, path: &RootfsPath) -> bool {
    let Some(parent) = path.parent() else { return false };
    match image.get(&parent) {
        Some(known) => known.entry.mode & 0o002 != 0,
        // Made by the container; its mode is not known here, its usual place is.
        None => ["/tmp", "/var/tmp", "/dev/shm"]
            .iter()
            .any(|usual| RootfsPath::new(usual).is_ok_and(|usual| parent.is_within(&usual))),
    }
}

/// Whether `path` has the name of another program than the one whose content it
/// has: a program that acts by its name (busybox) then does something else, and
/// a reader of a process list is misled.
fn takes_a_name(image: &ImageBaseline, path: &RootfsPath, origins: &[Known]) -> bool {
    let name = path.file_name();
    let own_name = origins.iter().any(|origin| origin.entry.path.file_name() == name)
        // The image itself gives this name here, as a symlink.
        || image.get(path).is_some();
    if own_name {
        return false;
    }
    // `python` is a name of python3.11.
    let is_other_version = origins.iter().any(|origin| {
        let origin = programs::without_version(origin.entry.path.file_name());
        !origin.is_empty() && origin == programs::without_version(name)
    });
    if is_other_version {
        return false;
    }
    let namesakes = PROGRAM_DIRECTORIES.iter().filter_map(|directory| {
        let there = RootfsPath::new(directory).and_then(|directory| directory.join(name)).ok()?;
        image.get(&there).map(|_| there)
    });
    let content = origins.first().and_then(|origin| origin.entry.blake3);
    // An applet by a name under which the image itself offers it does what that does.
    let mut is_offered = false;
    for namesake in namesakes {
        let file = std::str::from_utf8(namesake.as_bytes()).ok();
        let file = file.and_then(|namesake| follow(image, namesake));
        if content.is_none() || file.and_then(|found| found.file.entry.blake3) != content {
            return true;
        }
        is_offered = true;
    }
    !is_offered && programs::is_tool(name)
}

const PROGRAM_DIRECTORIES: &[&str] =
    &["/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];

/// Whether a symlink of the image leads to one of its programs. Followed inside
/// the image only, and not for ever.
fn leads_to_program(image: &ImageBaseline, path: &RootfsPath) -> bool {
    let mut path = path.clone();
    for _ in 0..8 {
        let Some(known) = image.get(&path) else { return false };
        match (known.entry.file_type, known.entry.link_target) {
            (FileType::Regular, _) => {
                return is_program(known.entry.format, known.entry.mode);
            }
            (FileType::Symlink, Some(target)) => match path.resolve(&target) {
                Some(next) => path = next,
                None => return false,
            },
            _ => return false,
        }
    }
    false
}

/// A way to more rights that the image does not give at this path.
fn privileged(known: Option<Known>, state: &FileState) -> Option<Judgement> {
    if state.file_type != FileType::Regular || !can_gain(state) {
        return None;
    }
    let known = known.filter(|known| known.entry.file_type == FileType::Regular);
    let expected_mode = known.as_ref().map_or(0, |known| known.entry.mode);
    let identity = grants_identity(state.mode)
        && (!grants_identity(expected_mode)
            || state.mode & 0o6000 & !(expected_mode & 0o6000) != 0);
    let expected_capability = known.as_ref().and_then(|known| known.entry.capability.as_ref());
    let capability = state.capability.is_some() && state.capability.as_ref() != expected_capability;
    (identity || capability).then(|| judgement(Kind::FilePrivileged, known))
}

/// Whether the kernel gives anything to what runs this file. It obeys these bits of an
/// executable ELF file alone: for a script they are the interpreter's that count. What is
/// written or made executable later is judged anew then.
fn can_gain(state: &FileState) -> bool {
    match state.format {
        Format::Elf => state.mode & 0o111 != 0,
        // Nobody has looked.
        Format::Unknown => true,
        Format::ElfObject
        | Format::KernelModule
        | Format::Script
        | Format::Data
        | Format::Empty => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::baseline::blake3_of;
    use crate::model::{Ancestor, ProcessIdentity, Sha256Hash};

    const IMAGE: &str = "
/bin 755 dir
/tmp 1777 dir
/bin/busybox 755 elf busybox
/bin/sh 777 symlink busybox
/bin/ls 755 elf ls
/lib/m.ko 644 elf_object mod
/bin/su 4755 elf su
/usr/bin 755 dir
/usr/bin/curl 755 elf curl
/usr/sbin 755 dir
/usr/sbin/auditctl 755 elf auditctl
/usr/lib/python3/a.py 644 data a
/opt/tool/run 755 script run
/etc/app.conf 644 data conf
/docker-entrypoint.sh 755 script entry
/etc/passwd 644 data users
/etc/skel 755 dir
/etc/skel/.bashrc 644 data skel
/etc/cron.d 755 dir
/etc/cron.weekly 777 symlink cron.d
/app 755 dir
/app/main.py 644 data main
/usr/local/bin/python3 777 symlink python3.11
/usr/local/bin/python3.11 755 elf python
";

    fn state(mode: u32, format: &str, content: &str) -> FileState {
        let format = match format {
            "elf" => Format::Elf,
            "object" => Format::ElfObject,
            "module" => Format::KernelModule,
            "script" => Format::Script,
            "data" | "unread" => Format::Data,
            other => panic!("bad format {other}"),
        };
        let content_of = match content {
            "-" => Content::Unhashed(Unhashed::NotAProgram),
            content => {
                Content::Hashed { blake3: blake3_of(content), sha256: Some(Sha256Hash([0; 32])) }
            }
        };
        FileState {
            file_type: FileType::Regular,
            format,
            mode,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
            capability: None,
            content: content_of,
            deleted: false,
            could_change: false,
        }
    }

    fn process() -> Arc<Process> {
        Arc::new(Process {
            identity: ProcessIdentity { pid: 1, start_time: 1 },
            exe: None,
            argv: None,
            uid: None,
            tty: None,
            root: None,
            ancestors: Vec::new(),
        })
    }

    fn fact(line: &str) -> Fact {
        let words: Vec<&str> = line.split_whitespace().collect();
        let path = || RootfsPath::new(words[1]).unwrap();
        let state = || FileState {
            could_change: words.get(5) == Some(&"written-to"),
            ..state(u32::from_str_radix(words[2], 8).unwrap(), words[3], words[4])
        };
        match words[0] {
            "exec" | "tmpfs" | "volume" | "memory" | "foreign" | "running" => Fact::Executed {
                path: path(),
                filesystem: match words[0] {
                    "tmpfs" => Filesystem::Tmpfs,
                    "volume" => Filesystem::Volume,
                    "memory" => Filesystem::Anonymous,
                    "foreign" => Filesystem::Container,
                    _ => Filesystem::Overlay,
                },
                running: words[0] == "running",
                times: 1,
                state: FileState { deleted: words[0] == "running", ..state() },
                lower: None,
                process: process(),
                invoked_as: None,
                layer_file: None,
                writer: None,
            },
            "load" | "load-volume" | "load-shared" => Fact::Loaded {
                path: path(),
                filesystem: match words[0] {
                    "load-volume" => Filesystem::Volume,
                    _ => Filesystem::Overlay,
                },
                state: match words[3] {
                    "gone" => FileState {
                        format: Format::Unknown,
                        content: Content::Unhashed(Unhashed::Gone),
                        deleted: true,
                        ..self::state(0, "data", "-")
                    },
                    _ => state(),
                },
                lower: None,
                process: process(),
                by_linker: false,
                is_shared: words[0] == "load-shared",
                writer: None,
            },
            "interpret" | "interpret-volume" => Fact::Interpreted {
                script: Script::File {
                    path: path(),
                    filesystem: match words[0] {
                        "interpret-volume" => Filesystem::Volume,
                        _ => Filesystem::Overlay,
                    },
                    state: state(),
                    lower: None,
                },
                process: process(),
            },
            "write" => Fact::Present { path: path(), state: state(), lower: None, writer: None },
            "link" | "mount" => Fact::Present {
                path: path(),
                state: FileState {
                    file_type: match words[0] {
                        "link" => FileType::Symlink,
                        _ => FileType::Directory,
                    },
                    content: match words[0] {
                        "link" => Content::Hashed {
                            blake3: blake3_of(words[2]),
                            sha256: Some(Sha256Hash([0; 32])),
                        },
                        _ => Content::Unhashed(Unhashed::NotRegular),
                    },
                    ..self::state(0o777, "data", "-")
                },
                lower: None,
                writer: None,
            },
            "remove" => Fact::Absent { path: path(), writer: None },
            other => panic!("bad verb {other}"),
        }
    }

    /// The one place that knows how to call `assess`; the tests below are data.
    #[track_caller]
    fn check(event: &str, expected: &str) {
        let image = ImageBaseline::from_text(&[IMAGE]);
        let globs = [
            "/etc/passwd",
            "/etc/cron.*/**",
            "**/.ssh/authorized_keys",
            "/home/*/.{profile,bashrc}",
        ];
        let globs = PathGlobs::new(globs.map(str::to_owned).into()).unwrap();
        let entry_point = [RootfsPath::new("/docker-entrypoint.sh").unwrap()];
        let (event, as_well) = match event.split_once(" as ") {
            Some((event, as_well)) => (event, Some(as_well)),
            None => (event, None),
        };
        let reached_as = as_well.map(|path| RootfsPath::new(path).unwrap());
        let sensitive = Sensitive {
            persistence: &globs,
            entry_point: &entry_point,
            reached_as: reached_as.as_ref(),
        };
        let assessment = assess(&image, sensitive, &fact(event)).unwrap();
        let said: Vec<String> = assessment
            .judgements
            .iter()
            .map(|judgement| {
                let from = judgement
                    .expected
                    .as_ref()
                    .map_or(String::new(), |known| format!(" from {}", known.entry.path));
                format!("{} {}{from}", judgement.kind, judgement.severity)
            })
            .collect();
        assert_eq!(format!("{:?}: {}", assessment.change, said.join(", ")), expected, "{event}");
    }

    #[test]
    fn a_program_the_image_lacks() {
        check("write /tmp/x 755 elf evil", "Added: file.added low");
        check("write /tmp/x 644 elf evil", "Added: file.added low");
        check("exec /tmp/x 755 elf evil", "Added: exec.new critical");
        check("exec /tmp/s 755 script evil", "Added: exec.script high");
        check("exec /tmp/s 755 data evil", "Added: exec.script high");
    }

    #[test]
    fn a_program_of_the_image_with_other_content() {
        check(
            "write /usr/bin/curl 755 elf evil",
            "Modified: file.modified medium from /usr/bin/curl",
        );
        check(
            "exec /usr/bin/curl 755 elf evil",
            "Modified: exec.modified critical from /usr/bin/curl",
        );
        // What it held when it was executed is not known.
        check(
            "exec /usr/bin/curl 755 elf curl written-to",
            "Modified: exec.modified critical from /usr/bin/curl",
        );
        check(
            "exec /opt/tool/run 755 script run written-to",
            "Modified: exec.script high from /opt/tool/run",
        );
        check("exec /tmp/ls 755 elf ls written-to", "Relocated: exec.relocated high from /bin/ls");
        check("load /bin/ls 755 elf ls written-to", "Modified: library.loaded high from /bin/ls");
        check(
            "exec /docker-entrypoint.sh 755 script evil",
            "Modified: exec.script high from /docker-entrypoint.sh",
        );
        check(
            "write /usr/bin/curl 644 data text",
            "Modified: file.modified medium from /usr/bin/curl",
        );
        // Its own path promised curl, so that the content is ls's is no excuse.
        check(
            "exec /usr/bin/curl 755 elf ls",
            "Modified: exec.modified critical from /usr/bin/curl",
        );
    }

    #[test]
    fn content_of_the_image_at_a_new_path() {
        check("write /bin/.cache-ls 755 elf ls", "Relocated: file.relocated info from /bin/ls");
        check("exec /bin/.cache-ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
        check("exec /tmp/ls 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
        check("exec /bin/nc 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
        check("exec /opt/curl 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
    }

    #[test]
    fn the_same_content_at_its_own_path_is_silent() {
        check("write /bin/ls 700 elf ls", "Metadata: ");
        check("exec /bin/ls 755 elf ls", "Metadata: ");
        check("exec /opt/tool/run 755 script run", "Metadata: ");
    }

    #[test]
    fn data_is_no_drift() {
        check("write /etc/app.conf 644 data other", "Modified: ");
        check("write /var/lib/x.csv 755 data odd", "Added: ");
        check("write /tmp/note.sh 644 script text", "Added: ");
    }

    #[test]
    fn rights_that_the_image_does_not_give() {
        check("write /bin/ls 4755 elf ls", "Metadata: file.privileged high from /bin/ls");
        check("write /bin/su 4755 elf su", "Metadata: ");
        check("write /bin/su 6755 elf su", "Metadata: file.privileged high from /bin/su");
        check("write /tmp/x 4755 elf evil", "Added: file.added low, file.privileged high");
        check("write /tmp/d 2644 data text", "Added: ");
    }

    #[test]
    fn a34_what_others_obey_is_told_whatever_it_holds() {
        check("write /etc/cron.d/a 644 data evil", "Added: file.persistence high");
        check("write /root/.ssh/authorized_keys 600 data evil", "Added: file.persistence high");
        check(
            "write /etc/passwd 644 data evil",
            "Modified: file.persistence high from /etc/passwd",
        );
        check("write /etc/passwd 600 data users", "Metadata: ");
        check(
            "write /etc/cron.daily/x 4755 elf evil",
            "Added: file.added low, file.persistence high, file.privileged high",
        );
        check("write /etc/cron.d/a 644 unread -", "Added: ");
    }

    #[test]
    fn x15_a_way_around_a_watched_directory_is_told_and_so_is_what_lies_behind_it() {
        check("link /etc/cron.d /tmp/cr", "Added: file.persistence high");
        check("link /root/.ssh /tmp/keys", "Added: file.persistence high");
        check("mount /etc/cron.d", "Added: file.persistence high");
        check("link /tmp/x /tmp/cr", "Added: ");
        check("mount /tmp/x", "Added: ");
        // The image has this very link.
        check("link /etc/cron.weekly cron.d", "Modified: ");
        check("write /tmp/cr/a 644 data evil as /etc/cron.d/a", "Added: file.persistence high");
        check("write /tmp/cr/a 644 data evil as /srv/a", "Added: ");
        // A link on the way of a link.
        check("link /tmp/cr /tmp/cr2 as /etc/cron.d", "Added: file.persistence high");
    }

    #[test]
    fn a35_the_entry_point_is_watched() {
        check(
            "write /docker-entrypoint.sh 755 script evil",
            "Modified: file.modified medium from /docker-entrypoint.sh, \
             file.persistence high from /docker-entrypoint.sh",
        );
        check("write /docker-entrypoint.sh 755 script entry", "Metadata: ");
    }

    #[test]
    fn what_starts_a_container_is_found_in_its_image() {
        let check = |arguments: &[&str], expected: &[&str]| {
            let image = ImageBaseline::from_text(&[IMAGE]);
            let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
            let started = EntryPoint {
                arguments: words(arguments),
                search: words(&["/usr/local/bin", "/usr/bin", "/bin"]),
                directory: "/app".into(),
            };
            let found: Vec<String> =
                entry_point(&image, &started).iter().map(ToString::to_string).collect();
            assert_eq!(found, expected, "{arguments:?}");
        };
        check(&["/docker-entrypoint.sh", "curl"], &["/docker-entrypoint.sh"]);
        check(&["sh", "-c", "ls"], &["/bin/busybox", "/bin/sh"]);
        check(
            &["python3", "-u", "main.py", "/etc/app.conf"],
            &["/app/main.py", "/usr/local/bin/python3", "/usr/local/bin/python3.11"],
        );
        check(&["/bin/ls", "/etc/app.conf", "/opt/tool/run"], &["/bin/ls", "/opt/tool/run"]);
        check(&["../bin/ls"], &["/bin/ls"]);
        check(&["missing"], &[]);
        check(&[], &[]);
    }

    #[test]
    fn what_is_gone() {
        check("remove /bin/ls", "Removed: file.removed low from /bin/ls");
        check("remove /usr/sbin/auditctl", "Removed: file.removed medium from /usr/sbin/auditctl");
        check("remove /bin/sh", "Removed: file.removed medium from /bin/sh");
        check("remove /opt", "Removed: file.removed low from /opt");
        check("remove /etc/app.conf", "Removed: ");
        check("remove /usr/lib/python3", "Removed: ");
        check("remove /tmp/never-was", "Removed: ");
    }

    #[test]
    fn programs_from_elsewhere_are_named_by_where() {
        check("memory /memfd:a 777 elf evil", "Added: exec.fileless critical");
        check("memory /memfd:a 777 elf ls", "Relocated: exec.fileless critical from /bin/ls");
        check("tmpfs /dev/shm/x 755 elf evil", "Added: exec.tmpfs high");
        check("tmpfs /dev/shm/x 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
        check("volume /data/x 755 elf evil", "Added: exec.volume medium");
        check("volume /data/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
        // What the volume hides promises nothing.
        check("volume /usr/bin/curl 755 elf evil", "Added: exec.volume medium");
        check("volume /data/x 4755 elf evil", "Added: exec.volume medium, file.privileged high");
    }

    #[test]
    fn x13_a_program_of_another_container_is_none_of_the_image() {
        check("foreign /usr/bin/nmap 755 elf nmap", "Added: exec.new critical");
        check("foreign /opt/run 755 script other", "Added: exec.script high");
        // The image has such a program too, but it is another container's file.
        check("foreign /bin/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
        check("foreign /tmp/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
    }

    #[test]
    fn a15_a_running_program_without_a_file_is_judged_by_its_content() {
        check("running /tmp/x 755 elf evil", "Added: exec.deleted high");
        check(
            "running /usr/bin/curl 755 elf evil",
            "Modified: exec.deleted high from /usr/bin/curl",
        );
        check("running /usr/bin/curl 755 elf curl", "Metadata: ");
    }

    #[test]
    fn code_that_is_not_executed_is_judged_all_the_same() {
        check("load /tmp/evil.so 644 elf evil", "Added: library.loaded high");
        check("load /bin/ls 644 elf evil", "Modified: library.loaded high from /bin/ls");
        check("load /bin/ls 644 elf ls", "Metadata: ");
        check("load /tmp/ls.so 644 elf ls", "Relocated: library.loaded medium from /bin/ls");
        check("interpret /tmp/i.sh 644 data evil", "Added: exec.interpreted medium");
        check("interpret /opt/tool/run 755 script run", "Metadata: ");
        check("load-volume /data/evil.so 644 elf evil", "Added: library.loaded medium");
        check("interpret-volume /scripts/run 644 data evil", "Added: exec.interpreted low");
    }

    /// `PID EXE` of who loads, of its parent, and of who has written.
    #[track_caller]
    fn check_extracted(path: &str, loads: &str, parent: &str, wrote: &str, expected: bool) {
        let identity = |text: &str| ProcessIdentity {
            pid: text.split_once(' ').unwrap().0.parse().unwrap(),
            start_time: 1,
        };
        let exe = |text: &str| Some(text.split_once(' ').unwrap().1.to_owned());
        let process = |text: &str| Process {
            identity: identity(text),
            exe: exe(text),
            ..(*self::process()).clone()
        };
        let parent = Ancestor { identity: identity(parent), exe: exe(parent), argv: None };
        let loads = Process { ancestors: vec![parent], ..process(loads) };
        let image = ImageBaseline::from_text(&[IMAGE]);
        let path = RootfsPath::new(path).unwrap();
        let told = is_extracted_by_itself(&image, &path, &loads, &process(wrote));
        assert_eq!(told, expected, "{path}");
    }

    #[test]
    fn b25_what_a_program_of_the_image_unpacks_for_itself_is_no_alarm() {
        let lib = "/tmp/libnetty_transport_native_epoll_x86_64123.so";
        let (init, app) = ("1 /bin/busybox", "7 /usr/bin/curl");
        check_extracted(lib, app, init, app, true);
        check_extracted("/tmp/deeper/lib.so", app, init, app, true);
        // A worker loads what its master has unpacked.
        check_extracted(lib, "8 /usr/bin/curl", app, app, true);
        check_extracted("/usr/lib/lib.so", app, init, app, false);
        check_extracted("/usr/lib/new/lib.so", app, init, app, false);
        check_extracted("/lib.so", app, init, app, false);
        check_extracted("/app/lib.so", app, init, app, false);
        // r17: a directory that it has made for them.
        check_extracted("/root/.cache/JNA/temp/jna123.tmp", app, init, app, true);
        check_extracted("/root/.cache/JNA/temp/a.so", app, init, "9 /bin/busybox", false);
        check_extracted(lib, "8 /usr/bin/curl", init, app, false);
        // The same process, but another program has written it: a shell, and exec.
        check_extracted(lib, app, init, "7 /bin/busybox", false);
        // bash's `enable -f`
        check_extracted(lib, "7 /bin/busybox", init, "7 /bin/busybox", false);
        check_extracted(lib, "7 /tmp/x", init, "7 /tmp/x", false);
    }

    #[test]
    fn r23_bits_that_grant_nothing_are_not_told_and_a_program_that_gains_is() {
        check("write /srv/a.txt 6755 data text", "Added: ");
        check("write /srv/a.sh 6755 script text", "Added: file.added low");
        check("write /srv/a.o 6755 object text", "Added: ");
        check("write /opt/lib.so 6644 elf lib", "Added: file.added low");
        check("write /etc/app.conf 6644 data conf", "Metadata: ");
        check("write /srv/a 6755 elf evil", "Added: file.added low, file.privileged high");
        check("write /bin/ls 2755 elf ls", "Metadata: file.privileged high from /bin/ls");
        check("exec /tmp/s 4755 script evil", "Added: exec.script high");
    }

    #[test]
    fn w18_a_kernel_module_is_a_new_program_and_a_compilers_object_is_data() {
        check("write /tmp/x.ko 644 module evil", "Added: file.added low");
        check("write /tmp/x 644 module evil", "Added: file.added low");
        check("write /tmp/x.o 644 object code", "Added: ");
        // Its bits grant nothing.
        check("write /tmp/x.ko 4755 module evil", "Added: file.added low");
        // Copied, or written anew: the image's own are known by their content alone.
        check("write /tmp/x.ko 644 module mod", "Relocated: file.relocated info from /lib/m.ko");
        check("write /lib/m.ko 644 module mod", "Metadata: ");
        check("write /lib/m.ko 644 module evil", "Modified: file.modified medium from /lib/m.ko");
    }

    #[test]
    fn w03_r15_code_that_a_program_generates_is_no_library_and_an_elf_file_stays_one() {
        check("load /tmp/jit-7.dump 600 data code", "Added: library.loaded info");
        check("load /tmp/#12345 600 data code", "Added: library.loaded info");
        check("load-shared /tmp/ffiAbCdEf 0 gone -", "Added: library.loaded info");
        check("load-volume /data/code 600 data code", "Added: library.loaded info");
        check("load-shared /tmp/evil.so 600 elf evil", "Added: library.loaded high");
        // The dynamic linker maps privately.
        check("load /tmp/evil.so 0 gone -", "Added: library.loaded high");
        check("load /bin/ls 644 data code", "Modified: library.loaded high from /bin/ls");
        check("load-shared /bin/ls 0 gone -", "Modified: library.loaded high from /bin/ls");
    }

    #[test]
    fn w09_r31_content_of_the_image_on_a_tmpfs_is_judged_as_on_a_volume() {
        check("tmpfs /run/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
        check(
            "tmpfs /run/s6/run 755 script run",
            "Relocated: exec.relocated medium from /opt/tool/run",
        );
        check("tmpfs /run/curl 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
        check("tmpfs /run/ls 755 elf evil", "Added: exec.tmpfs high");
    }

    #[test]
    fn w10_copies_in_a_new_home_or_under_their_own_names_are_no_disguise() {
        check("write /home/a/.bashrc 644 data skel", "Added: file.persistence info");
        check("write /home/a/.bashrc 644 data evil", "Added: file.persistence high");
        // Not what a new home begins with.
        check("write /home/a/.profile 644 data skel", "Added: file.persistence high");
        check("write /etc/cron.d/a 644 data skel", "Added: file.persistence high");
        check(
            "exec /venv/python 755 elf python",
            "Relocated: exec.relocated medium from /usr/local/bin/python3.11",
        );
        check(
            "exec /opt/bb/sh 755 elf busybox",
            "Relocated: exec.relocated medium from /bin/busybox",
        );
        check(
            "exec /opt/bb/nc 755 elf busybox",
            "Relocated: exec.relocated high from /bin/busybox",
        );
        check(
            "exec /opt/bb/ls 755 elf busybox",
            "Relocated: exec.relocated high from /bin/busybox",
        );
        check("exec /opt/python3 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
    }

    #[test]
    fn w16_a_removed_directory_is_as_bad_as_the_worst_in_it() {
        check("remove /usr/sbin", "Removed: file.removed medium from /usr/sbin");
        check("remove /bin", "Removed: file.removed medium from /bin");
        check("remove /usr/bin", "Removed: file.removed low from /usr/bin");
        check("write /bin 777 data nothing", "Added: file.removed medium from /bin");
    }

    #[test]
    fn what_takes_the_place_of_a_directory_removes_what_was_below() {
        check("write /usr/bin 777 data nothing", "Added: file.removed low from /usr/bin");
        check("write /tmp 777 data nothing", "Added: ");
    }

    #[test]
    fn a_symlink_that_became_a_copy_is_relocated() {
        check("exec /bin/sh 755 elf busybox", "Relocated: exec.relocated medium from /bin/busybox");
        check("exec /bin/sh 755 elf evil", "Modified: exec.modified critical from /bin/sh");
    }
}
