//! Package managers and other tools of the image that write many files: what they write and
//! run, and which files make a process a package manager. Pure.

use super::group::{Candidate, Common, Group};
use crate::baseline::{ImageBaseline, KnownBaseline};
use crate::detect;
use crate::inventory::{Aspect, Entry};
use crate::model::file::is_program;
use crate::model::finding::Subject;
use crate::model::{
    ContainerId, FileType, Finding, FindingId, Kind, PackageManager, Process, RootfsPath, Severity,
    package_manager, programs,
};
use crate::pipeline::decide::was_accepted;

/// The finding that counts what a package manager writes.
pub(in crate::pipeline) fn transaction_id(container: &ContainerId, manager: &Process) -> FindingId {
    let subject = Subject::Process(manager.identity);
    FindingId::new(Some(container), Kind::PackageTransaction, &subject)
}

/// The group of files that a package manager writes with a privilege, or where other
/// programs obey them.
pub(super) fn installed(kind: Kind, transaction: FindingId, severity: Severity) -> Group {
    let common = Some(Common::Installed { transaction, severity });
    Group { kind, place: None, content: None, common }
}

/// The group of the files that one command changes when it changes accounts.
pub(super) fn accounts(
    entry: &Entry,
    image: &ImageBaseline,
    file: &Candidate<'_>,
    process: Option<&Process>,
) -> Option<Group> {
    const FILES: &[&str] = &["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/gshadow"];
    let is_one = FILES.iter().any(|one| one.as_bytes() == file.path.as_bytes());
    let process = process.filter(|one| is_one && one.identity.start_time > 0)?;
    let exe = process.exe.as_deref()?;
    let called = programs::called_as(exe, process.argv.as_deref());
    let is_images = is_images_own(entry, image, exe);
    (is_images && programs::changes_accounts(called.as_bytes())).then_some(Group {
        kind: file.kind,
        place: None,
        content: None,
        common: Some(Common::Accounts { process: process.identity }),
    })
}

/// Whether the program at this path is the image's, and nothing was reported of it.
pub(super) fn is_images_own(entry: &Entry, image: &ImageBaseline, exe: &str) -> bool {
    RootfsPath::new(exe).is_ok_and(|file| {
        detect::is_program_of(image, &file) && entry.findings.about(&file).next().is_none()
    })
}

/// Whether a package manager itself runs this script, directly or with an interpreter.
/// Further descendants are no part of the package manager.
pub(super) fn is_run_by_manager(kind: Kind, is_script: bool, process: &Process) -> bool {
    let can_be = match kind {
        Kind::ExecScript | Kind::ExecInterpreted => true,
        Kind::ExecFileless | Kind::ExecTmpfs | Kind::ExecVolume => is_script,
        _ => false,
    };
    // apt executes dpkg, and whatever its settings name.
    let runs_scripts = |exe: &str, argv: &[String]| {
        let name = exe.rsplit('/').next().unwrap_or_default();
        let is_asking = argv.iter().take(3).any(|one| one.ends_with("/dpkg-preconfigure"));
        let is_manager = package_manager(exe, argv) == Some(PackageManager::Program);
        is_asking || is_manager && !name.starts_with("apt")
    };
    can_be
        && process.ancestors.first().is_some_and(|parent| {
            let argv = parent.argv.as_deref().unwrap_or_default();
            parent.exe.as_deref().is_some_and(|exe| runs_scripts(exe, argv))
        })
}

/// Whether a file is run by every Python program of its environment. Packages bring such
/// files, and programs that import a package run its code anyway.
pub(super) fn is_site_hook(path: &RootfsPath) -> bool {
    let Some(parent) = path.parent() else { return false };
    let (directory, name) = (parent.file_name(), path.file_name());
    let is_site = directory == b"site-packages" || directory == b"dist-packages";
    let is_customization =
        name.starts_with(b"sitecustomize.") || name.starts_with(b"usercustomize.");
    is_site && (name.ends_with(b".pth") || is_customization)
        || directory.starts_with(b"python") && is_customization
}

/// Whether this is a script that a package brings to be run while it is installed, at the
/// place where package managers put such scripts.
pub(super) fn is_maintainer_script(kind: Kind, path: &RootfsPath) -> bool {
    const DIRECTORIES: &[&str] =
        &["/var/lib/dpkg/info", "/var/lib/dpkg/tmp.ci", "/lib/apk/exec", "/usr/lib/apk/exec"];
    let is_script = matches!(kind, Kind::ExecScript | Kind::ExecInterpreted);
    // rpm has no directory of its own for them.
    is_script
        && (path.parent().is_some_and(|parent| {
            DIRECTORIES.iter().any(|directory| parent.as_bytes() == directory.as_bytes())
                || (parent.as_bytes() == b"/var/tmp" && path.file_name().starts_with(b"rpm-tmp."))
        }))
}

/// The files that make a process a package manager.
pub(super) struct Installer {
    program: RootfsPath,
    /// The script that the program interprets, which is the package manager.
    script: Option<RootfsPath>,
    /// Its program may be found to be a copy of the image's once it has been read.
    pub(super) is_interpreted: bool,
}

impl Installer {
    /// `None` if the process is no package manager.
    pub(super) fn of(process: &Process) -> Option<Installer> {
        let exe = process.exe.as_deref()?;
        let manager = package_manager(exe, process.argv.as_deref().unwrap_or_default())?;
        let script = match manager {
            // A relative path may be that of a script of the container's own.
            PackageManager::Script(Some(script)) if !script.starts_with('/') => return None,
            PackageManager::Script(Some(script)) => Some(RootfsPath::new(script).ok()?),
            PackageManager::Script(None) | PackageManager::Program => None,
        };
        let is_interpreted = manager != PackageManager::Program;
        Some(Installer { program: RootfsPath::new(exe).ok()?, script, is_interpreted })
    }

    /// Whether it is the image's own. An interpreter may also be a plain copy of the image's, if
    /// this very process was seen to run it, and a script may be one that a package manager has
    /// brought: an environment of Python has both.
    /// A process that can replace such a script can as well have the image's own package
    /// manager run the same code.
    pub(super) fn is_of_the_image(
        &self,
        process: &Process,
        entry: &Entry,
        image: &ImageBaseline,
    ) -> bool {
        let Installer { program, script, is_interpreted } = self;
        let is_copy = || *is_interpreted && entry.writers.is_copy(process.identity);
        (is_untouched(entry, image, program) || is_copy())
            && script.as_ref().is_none_or(|script| {
                is_untouched(entry, image, script) || is_brought(entry, script)
            })
    }
}

/// The most characters of further command lines that a transaction names.
const MOST_COMMANDS: usize = 1000;

/// Names the command line of a further package manager of a transaction.
pub(super) fn add_command(finding: &mut Finding, process: &Process) {
    let own = finding.process.as_ref().and_then(|first| first.argv.clone());
    let Some(argv) = process.argv.as_ref().filter(|argv| own.as_ref() != Some(argv)) else {
        return;
    };
    let detail = finding.detail.get_or_insert_with(|| "one after the other with:".to_owned());
    let command = format!(" `{}`", argv.join(" "));
    if detail.contains(&command) {
        return;
    }
    if detail.len() + command.len() <= MOST_COMMANDS {
        *detail += &command;
    } else if !detail.ends_with('…') {
        *detail += " …";
    }
}

/// Whether a package manager has brought the file at this path.
fn is_brought(entry: &Entry, path: &RootfsPath) -> bool {
    let written = entry.members.of(Aspect::Written, path);
    let finding = written.and_then(|(id, _)| entry.findings.get(&id));
    finding.is_some_and(|finding| finding.kind == Kind::PackageTransaction)
}

/// Whether the image has a program here, and nothing was ever reported of the path, or accepted.
pub(in crate::pipeline) fn is_untouched(
    entry: &Entry,
    image: &ImageBaseline,
    path: &RootfsPath,
) -> bool {
    let is_of_image = |known: KnownBaseline| match known.entry.file_type {
        FileType::Regular => is_program(known.entry.format, known.entry.mode),
        FileType::Symlink => true,
        _ => false,
    };
    image.get(path).is_some_and(is_of_image)
        && entry.findings.about(path).next().is_none()
        && entry.members.of(Aspect::Written, path).is_none()
        && !was_accepted(entry, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maintainer_scripts_are_known_by_where_they_lie() {
        let check = |path: &str, expected| {
            let path = RootfsPath::new(path).unwrap();
            assert_eq!(is_maintainer_script(Kind::ExecScript, &path), expected, "{path}");
            assert!(!is_maintainer_script(Kind::ExecNew, &path), "{path}");
        };
        check("/var/lib/dpkg/info/nmap.postinst", true);
        check("/var/lib/dpkg/tmp.ci/preinst", true);
        check("/var/lib/dpkg/info/sub/nmap.postinst", false);
        check("/lib/apk/exec/socat-1.post-install", true);
        check("/var/tmp/rpm-tmp.kKzhZb", true);
        check("/var/tmp/x", false);
        check("/tmp/nmap.postinst", false);
    }
}
