//! Which findings are told together, so that twenty thousand files are not twenty
//! thousand lines, and none of them is lost.
//!
//! ```text
//! written by a package manager ──────────────> its package.transaction
//! file.relocated ────────────────────────────> one for each content
//! file.added, .modified, .removed ─ many ────> one for each directory ─ many ─> one
//! executed in a root directory of its own ─ many ─> one for each such root
//! anything else, and anything worse than usual ─> stands alone
//! ```
//!
//! What only lies there is told together as soon as it is many; what is executed
//! stands alone, but for the programs of a root directory (chroot) that is not the
//! container's: each of them would be a finding.

use crate::inventory::Entry;
use crate::model::finding::Subject;
use crate::model::{
    Blake3Hash, ContainerId, FindingId, Kind, PackageManager, Process, RootfsPath, Severity,
    package_manager,
};

/// Files of one kind in one directory that stand alone, and anywhere.
const ALONE_IN_DIRECTORY: usize = 32;
const ALONE: usize = 256;
/// Directories of one kind that are told of one by one.
const DIRECTORIES: usize = 64;
/// Programs of one foreign root that stand alone.
const ALONE_IN_ROOT: usize = 8;

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
}

impl Group {
    pub(super) fn id(&self, container: &ContainerId) -> FindingId {
        let subject = Subject::Group { path: self.place.as_ref(), content: self.content };
        FindingId::new(Some(container), self.kind, &subject)
    }

    /// What found no room among the findings of a container, of one kind.
    pub(super) fn rest(kind: Kind) -> Group {
        Group { kind, place: None, content: None }
    }

    /// Whether this is the one that always has room.
    pub(super) fn is_rest(&self) -> bool {
        self.place.is_none() && self.content.is_none()
    }

    /// What the files have in common, in words.
    pub(super) fn detail(&self) -> Option<String> {
        let what = match self.kind {
            Kind::FileAdded => "added",
            Kind::FileModified => "changed",
            Kind::FileRemoved => "removed",
            kind if kind.is_exec() && self.place.is_some() => "executed",
            _ if self.is_rest() => return Some(REST.to_owned()),
            _ => return None,
        };
        let of_these = "what came after the first ones, which have findings of their own";
        Some(match &self.place {
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
    let group =
        |place: Option<&RootfsPath>, content| Group { kind, place: place.cloned(), content };
    match kind {
        Kind::FileRelocated => content.is_some().then(|| group(None, content)),
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
        Kind::ExecNew | Kind::ExecScript | Kind::ExecRelocated => {
            // An execution from elsewhere than the root it was made in is no part of it.
            let root = root.filter(|root| path.is_within(root))?;
            let is_many = entry.alone(kind, Some(root)) >= ALONE_IN_ROOT;
            is_many.then(|| group(Some(root), None))
        }
        _ => None,
    }
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
