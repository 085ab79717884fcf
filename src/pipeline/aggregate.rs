//! Which findings are told together, so that twenty thousand files are not twenty
//! thousand lines, and none of them is lost.
//!
//! ```text
//! written by a package manager ──────────────> its package.transaction
//! file.relocated ────────────────────────────> one for each content ─ many ─> one
//! file.added, .modified, .removed ─ many ────> one for each directory ─ many ─> one
//! file.privileged, exec.interpreted ─ many ──> one for each directory
//! executed in a root directory of its own ─ many ─> one for each such root
//! exec.relocated, medium ─ many ─────────────> one
//! obeyed or privileged, by a package manager ─> one for each transaction and kind
//! used, as a package manager has brought it ──> one for each transaction and kind
//! run, as the image's linker has made it ─────> one for each linker
//! libraries of one directory, by one process ─> one
//! run under a name that a machine has made up ─> one for each pattern and who runs it;
//!                        executed, and high or worse: one for each content
//! anything else, and anything worse than usual ─> stands alone
//! ```
//!
//! What only lies there is told together as soon as it is many. What is executed stands
//! alone unless it has something in common with others that does not depend on a name,
//! or a name that says nothing. How bad it is is a part of that: nothing is told
//! together with what is less.

use super::names;
use crate::baseline::ImageBaseline;
use crate::detect;
use crate::inventory::{Entry, Told};
use crate::model::finding::Subject;
use crate::model::{
    Blake3Hash, ContainerId, FindingId, Kind, PackageManager, Process, ProcessIdentity, RootfsPath,
    Severity, is_linker, package_manager, printable, programs,
};

/// Files of one kind in one directory that stand alone, and anywhere.
const ALONE_IN_DIRECTORY: usize = 32;
const ALONE: usize = 256;
/// Directories of one kind that are told of one by one.
const DIRECTORIES: usize = 64;
/// Programs of one foreign root that stand alone, and scripts of one directory.
const ALONE_IN_ROOT: usize = 8;
/// Programs of one directory that have gained a privilege, and stand alone.
const ALONE_PRIVILEGED: usize = 8;
/// Contents of the image of which copies are told by themselves.
const ALONE_COPIES: usize = 4;

/// Files of one finding that are known one by one and can be listed. More are
/// counted.
pub(super) const MAX_LISTED: u64 = 100_000;

/// A finding that tells of several files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) kind: Kind,
    /// The directory, or the root directory, that holds all of them.
    pub(super) place: Option<RootfsPath>,
    pub(super) content: Option<Blake3Hash>,
    /// What else they have in common.
    pub(super) common: Option<Common>,
}

/// What files have in common that were run, or used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Common {
    /// A package manager has brought them, as they are.
    Brought(FindingId),
    /// A package manager has written them, where others obey them or with a privilege.
    Installed { transaction: FindingId, severity: Severity },
    /// A linker of the image has made them.
    Built { linker: String },
    /// One process has loaded them.
    Loaded { process: ProcessIdentity, severity: Severity },
    /// Names that a machine has made up by one pattern, and the program that runs them.
    Pattern { pattern: Vec<u8>, by: Option<String>, severity: Severity },
    /// A program that manages accounts has written them.
    Accounts { process: ProcessIdentity },
    /// They are no worse than this.
    Severity(Severity),
}

impl Common {
    fn key(&self) -> String {
        let of = |process: &ProcessIdentity| format!("{} {}", process.pid, process.start_time);
        match self {
            Common::Brought(transaction) => format!("brought {transaction}"),
            Common::Installed { transaction, severity } => {
                format!("installed {severity} {transaction}")
            }
            Common::Built { linker } => format!("built {linker}"),
            Common::Loaded { process, severity } => format!("loaded {severity} {}", of(process)),
            Common::Pattern { pattern, by, severity } => {
                let by = by.as_deref().unwrap_or_default();
                format!("pattern {severity} {} {by}", printable(pattern))
            }
            Common::Accounts { process } => format!("accounts {}", of(process)),
            Common::Severity(severity) => format!("severity {severity}"),
        }
    }

    /// In words, for a finding of several files.
    pub(super) fn detail(&self) -> Option<String> {
        Some(match self {
            Common::Brought(_) => {
                "used as a package manager of the image has brought it: what else of it was used \
                 is counted here"
                    .to_owned()
            }
            Common::Installed { .. } => {
                "written in one transaction of a package manager".to_owned()
            }
            Common::Built { linker } => format!(
                "built here: {linker} of the image has written it, and the processes that began \
                 the build run it"
            ),
            Common::Loaded { .. } => "libraries of one directory, loaded by one process".to_owned(),
            Common::Pattern { pattern, .. } => {
                format!("names that a machine has made up, like {}", printable(pattern))
            }
            Common::Accounts { .. } => "accounts, changed by one command".to_owned(),
            Common::Severity(_) => return None,
        })
    }

    /// Whether that is said of a finding of one file too.
    pub(super) fn explains_one(&self) -> bool {
        matches!(self, Common::Brought(_) | Common::Built { .. })
    }
}

impl Group {
    pub(super) fn id(&self, container: &ContainerId) -> FindingId {
        if let Some(common) = &self.common {
            let by = common.key();
            let (path, content) = (self.place.as_ref(), self.content);
            let subject = Subject::Common { path, content, by: &by };
            return FindingId::new(Some(container), self.kind, &subject);
        }
        let subject = Subject::Group { path: self.place.as_ref(), content: self.content };
        FindingId::new(Some(container), self.kind, &subject)
    }

    /// What found no room among the findings of a container, of one kind.
    pub(super) fn rest(kind: Kind) -> Group {
        Group { kind, place: None, content: None, common: None }
    }

    /// Whether it is one of several files from the first one on.
    pub(super) fn begins_as_many(&self) -> bool {
        self.content.is_none() && self.common.is_none()
    }

    /// Whether this is the one that always has room.
    pub(super) fn is_rest(&self) -> bool {
        self.place.is_none() && self.content.is_none() && self.common.is_none()
    }

    /// What the files have in common, in words.
    pub(super) fn detail(&self) -> Option<String> {
        if let Some(common) = &self.common {
            return common.detail();
        }
        let what = match self.kind {
            Kind::FileRelocated if self.is_rest() => return Some(COPIES.to_owned()),
            Kind::FilePrivileged if self.place.is_some() => "that gained a privilege",
            Kind::ExecInterpreted if self.place.is_some() => "run as scripts",
            Kind::FileAdded => "added",
            Kind::FileModified => "changed",
            Kind::FileRemoved => "removed",
            kind if kind.is_exec() && self.place.is_some() => "executed",
            _ if self.is_rest() => return Some(REST.to_owned()),
            _ => return None,
        };
        let of_these = "what came after the first ones, which have findings of their own";
        Some(match &self.place {
            Some(place) if self.kind == Kind::ExecInterpreted => {
                format!("files {what} in {place}: {of_these}")
            }
            Some(place) if self.kind.is_exec() => {
                format!("programs {what} with {place} as their root directory: {of_these}")
            }
            Some(place) => format!("programs {what} in {place}: {of_these}"),
            None => format!("programs {what} in many directories: {of_these}"),
        })
    }
}

/// What is said of a finding that stands for those that found no room.
const REST: &str = "more of this kind than are kept one by one: what came after the first ones, \
     which have findings of their own, is counted here";

const COPIES: &str = "copies of programs of the image: what came after the first contents, which \
     have findings of their own";

/// What is known of a file that has no finding yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) kind: Kind,
    pub(super) severity: Severity,
    pub(super) path: &'a RootfsPath,
    pub(super) content: Option<Blake3Hash>,
    /// The root directory of the process that executes it.
    pub(super) root: Option<&'a RootfsPath>,
}

/// Which finding a file is put into; `None` if it has one of its own.
pub(super) fn group(entry: &Entry, container: &ContainerId, file: &Candidate<'_>) -> Option<Group> {
    let Candidate { kind, severity, path, content, root } = *file;
    let group = |place: Option<&RootfsPath>, content| Group {
        kind,
        place: place.cloned(),
        content,
        common: None,
    };
    match kind {
        Kind::FileRelocated => {
            let own = content.is_some().then(|| group(None, content))?;
            let is_room = entry.findings.contains_key(&own.id(container))
                || entry.alone(kind, None) < ALONE_COPIES;
            Some(if is_room { own } else { group(None, None) })
        }
        // A new home, and what is known to harm nobody.
        Kind::FilePersistence if severity < kind.severity() => {
            let common = Some(Common::Severity(severity));
            Some(Group { common, ..group(path.parent().as_ref(), None) })
        }
        // A shell or a guard that is gone is not one of many.
        _ if severity > kind.severity() => None,
        Kind::FileAdded | Kind::FileModified | Kind::FileRemoved => {
            let directory = path.parent()?;
            let is_room = entry.alone(kind, Some(&directory)) < ALONE_IN_DIRECTORY
                && entry.alone(kind, None) < ALONE;
            if is_room {
                return None;
            }
            let here = group(Some(&directory), None);
            let is_told = entry.findings.contains_key(&here.id(container));
            let is_one_more = is_told || entry.together(kind) < DIRECTORIES;
            Some(if is_one_more { here } else { group(None, None) })
        }
        Kind::FilePrivileged => {
            let directory = path.parent()?;
            let is_many = entry.alone(kind, Some(&directory)) >= ALONE_PRIVILEGED;
            is_many.then(|| group(Some(&directory), None))
        }
        Kind::ExecInterpreted => {
            let directory = path.parent()?;
            let is_many = entry.alone(kind, Some(&directory)) >= ALONE_IN_ROOT;
            is_many.then(|| group(Some(&directory), None))
        }
        Kind::ExecNew | Kind::ExecScript | Kind::ExecRelocated => {
            // An execution from elsewhere than the root it was made in is no part of it.
            let Some(root) = root.filter(|root| path.is_within(root)) else {
                // Nobody is in disguise here: those are worse, and stand alone.
                let is_many = kind == Kind::ExecRelocated
                    && severity == kind.severity()
                    && entry.alone(kind, None) >= ALONE_COPIES;
                let common = Some(Common::Severity(severity));
                return is_many.then(|| Group { common, ..group(None, None) });
            };
            let is_many = entry.alone(kind, Some(root)) >= ALONE_IN_ROOT;
            is_many.then(|| group(Some(root), None))
        }
        _ => None,
    }
}

/// What is known of code that was run or loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Used<'a> {
    pub(super) file: Candidate<'a>,
    pub(super) process: Option<&'a Process>,
    pub(super) writer: Option<&'a Process>,
    /// It may have held something else when it was run.
    pub(super) could_change: bool,
    /// Somebody may type what the process does.
    pub(super) is_interactive: bool,
}

/// What was run or loaded and has something in common with others. `None`: it has not.
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
    let pattern = match kind {
        // What a program makes or unpacks for itself: any name is by chance.
        Kind::LibraryLoaded if severity == Severity::Info => any_name_beside(path),
        _ => names::pattern(path),
    };
    let is_handed_over = matches!(kind, Kind::ExecInterpreted | Kind::LibraryLoaded);
    if severity >= Severity::High && !is_handed_over {
        // One content, by whatever name.
        let is_one_of_many = pattern.is_some() && content.is_some();
        return is_one_of_many.then(|| group(None, content, Common::Severity(severity)));
    }
    let by = match kind {
        Kind::ExecInterpreted | Kind::LibraryLoaded => used.process.and_then(|one| one.exe.clone()),
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

/// The pattern of everything in the directory of a file, whose own name may be made up too.
fn any_name_beside(path: &RootfsPath) -> Option<Vec<u8>> {
    let all = path.parent()?.join(b"*").ok()?;
    Some(names::pattern(&all).unwrap_or_else(|| all.as_bytes().to_vec()))
}

/// The transaction that has brought a file exactly as it was run.
pub(super) fn brought_by(
    entry: &Entry,
    container: &ContainerId,
    used: &Used<'_>,
) -> Option<FindingId> {
    let Candidate { path, content, .. } = used.file;
    content.filter(|_| !used.could_change)?;
    let written = entry.members.of(crate::inventory::Deed::Written, path);
    if let Some((id, told)) = written
        && told == Told::content(content)
        && entry.findings.get(&id).is_some_and(|told| told.kind == Kind::PackageTransaction)
    {
        return Some(id);
    }
    let manager = entry.package_manager_of(used.writer?)?;
    Some(super::together::transaction_id(container, manager))
}

/// What a package manager writes where others obey it, or with a privilege.
pub(super) fn installed(kind: Kind, transaction: FindingId, severity: Severity) -> Group {
    let common = Some(Common::Installed { transaction, severity });
    Group { kind, place: None, content: None, common }
}

/// The linker of the image that has made what is run, by the tree of processes that has
/// run the linker. What is typed by somebody is not a build. A copy that others have made
/// of what a linker has written (`make install`) is the same content.
fn built_by(entry: &Entry, image: &ImageBaseline, used: &Used<'_>) -> Option<String> {
    if used.could_change || used.is_interactive {
        return None;
    }
    let is_code = matches!(used.file.kind, Kind::ExecNew | Kind::LibraryLoaded);
    let process = used.process.filter(|_| is_code)?;
    let is_written = |writer: &&Process| writer.exe.as_deref().is_some_and(is_linker);
    let writer = used.writer.filter(is_written);
    let writer = writer.or_else(|| entry.linked(used.file.content?))?;
    let linker = writer.exe.as_deref()?;
    let file = RootfsPath::new(linker).ok()?;
    let is_images = detect::is_program_of(image, &file) && entry.about(&file).next().is_none();
    // Behind the last one is what started the container, which everything has in common.
    let inside = writer.ancestors.split_last().map_or(&[][..], |(_, inside)| inside);
    let is_one_tree = inside.iter().any(|one| process.descends_from(one.identity));
    (is_images && is_one_tree).then(|| linker.to_owned())
}

/// The command by which accounts were changed, for the files that it changes.
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
    let name = |text: &str| text.rsplit('/').next().unwrap_or_default().to_owned();
    // What busybox does, its arguments say.
    let called = match name(exe).as_str() {
        "busybox" => name(process.argv.as_ref()?.first()?),
        other => other.to_owned(),
    };
    let program = RootfsPath::new(exe).ok()?;
    let is_images =
        detect::is_program_of(image, &program) && entry.about(&program).next().is_none();
    (is_images && programs::changes_accounts(called.as_bytes())).then_some(Group {
        kind: file.kind,
        place: None,
        content: None,
        common: Some(Common::Accounts { process: process.identity }),
    })
}

/// Whether a package manager itself runs this script: its own process has become it, or
/// it has given it to an interpreter. Deeper below, others decide what is run.
pub(super) fn is_run_by_manager(kind: Kind, is_script: bool, process: &Process) -> bool {
    let can_be = match kind {
        Kind::ExecScript | Kind::ExecInterpreted => true,
        Kind::ExecFileless | Kind::ExecTmpfs | Kind::ExecVolume => is_script,
        _ => false,
    };
    // apt executes dpkg, and otherwise what it is told to.
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
/// files, and what they bring is run by those who import it anyway.
pub(super) fn is_site_hook(path: &RootfsPath) -> bool {
    let Some(parent) = path.parent() else { return false };
    let (directory, name) = (parent.file_name(), path.file_name());
    let is_site = directory == b"site-packages" || directory == b"dist-packages";
    let is_customization =
        name.starts_with(b"sitecustomize.") || name.starts_with(b"usercustomize.");
    is_site && (name.ends_with(b".pth") || is_customization)
        || directory.starts_with(b"python") && is_customization
}

/// Whether this is one of the scripts that a package brings to be run while it is
/// installed, where package managers put them.
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

/// The files that make this process a package manager: its program and, for one
/// that is a script, that too. `None` if it is none.
pub(super) fn files_of_package_manager(process: &Process) -> Option<Vec<RootfsPath>> {
    let exe = process.exe.as_deref()?;
    let manager = package_manager(exe, process.argv.as_deref().unwrap_or_default())?;
    let mut files = vec![RootfsPath::new(exe).ok()?];
    match manager {
        // A relative one cannot be told apart from one of the container's own.
        PackageManager::Script(Some(script)) if !script.starts_with('/') => return None,
        PackageManager::Script(Some(script)) => files.push(RootfsPath::new(script).ok()?),
        PackageManager::Script(None) | PackageManager::Program => (),
    }
    Some(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file<'a>(kind: Kind, path: &'a RootfsPath, root: Option<&'a RootfsPath>) -> Candidate<'a> {
        let content = Some(Blake3Hash([7; 32]));
        Candidate { kind, severity: kind.severity(), path, content, root }
    }

    #[test]
    fn what_is_executed_stands_alone() {
        let container = ContainerId::new("default", "c1");
        let path = RootfsPath::new("/tmp/x").unwrap();
        for kind in Kind::ALL.iter().filter(|kind| kind.is_exec()) {
            assert_eq!(group(&Entry::default(), &container, &file(*kind, &path, None)), None);
        }
    }

    #[test]
    fn copies_are_told_by_their_content() {
        let container = ContainerId::new("default", "c1");
        let (one, other) = (RootfsPath::new("/tmp/a").unwrap(), RootfsPath::new("/b").unwrap());
        let of =
            |path| group(&Entry::default(), &container, &file(Kind::FileRelocated, path, None));
        assert_eq!(of(&one), of(&other));
        assert!(of(&one).is_some_and(|group| group.place.is_none()));
        let unhashed = Candidate { content: None, ..file(Kind::FileRelocated, &one, None) };
        assert_eq!(group(&Entry::default(), &container, &unhashed), None);
    }

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
