//! The group of a file that only its place, its content or its severity decides on, and how
//! many files of a kind have findings of their own before that. Pure.

use super::group::{Candidate, Common, Group};
use crate::inventory::Entry;
use crate::model::{ContainerId, Kind, RootfsPath};

/// Number of files of one kind that have findings of their own: in one directory, and
/// anywhere.
const MAX_SINGLE_IN_DIRECTORY: usize = 32;
const MAX_SINGLE: usize = 256;
/// Number of directories of one kind that have findings of their own.
const MAX_DIRECTORIES: usize = 64;
/// Number of programs of one root directory, and of scripts of one directory, that have
/// findings of their own.
const MAX_SINGLE_IN_ROOT: usize = 8;
/// Number of programs of one directory that have gained a privilege and have findings of
/// their own.
const MAX_SINGLE_PRIVILEGED: usize = 8;
/// Number of contents of the image whose copies have findings of their own.
const MAX_SINGLE_COPIES: usize = 4;

/// The group of a file; `None` if it has a finding of its own.
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
            let is_room = entry.findings.contains(&own.id(container))
                || entry.findings.single(kind, None) < MAX_SINGLE_COPIES;
            Some(if is_room { own } else { group(None, None) })
        }
        // The files of a new home, which are known to be harmless.
        Kind::FilePersistence if severity < kind.severity() => {
            let common = Some(Common::Severity(severity));
            Some(Group { common, ..group(path.parent().as_ref(), None) })
        }
        Kind::ExecRelocated if root.is_none_or(|root| !path.is_within(root)) => copies(file),
        // A removed shell or guard is worse than usual, and has a finding of its own.
        _ if severity > kind.severity() => None,
        Kind::FileAdded | Kind::FileModified | Kind::FileRemoved => {
            let directory = path.parent()?;
            let is_room = entry.findings.single(kind, Some(&directory)) < MAX_SINGLE_IN_DIRECTORY
                && entry.findings.single(kind, None) < MAX_SINGLE;
            if is_room {
                return None;
            }
            let here = group(Some(&directory), None);
            let is_known = entry.findings.contains(&here.id(container));
            let is_one_more = is_known || entry.findings.aggregated(kind) < MAX_DIRECTORIES;
            Some(if is_one_more { here } else { group(None, None) })
        }
        Kind::FilePrivileged => {
            let directory = path.parent()?;
            let is_many = entry.findings.single(kind, Some(&directory)) >= MAX_SINGLE_PRIVILEGED;
            is_many.then(|| group(Some(&directory), None))
        }
        Kind::ExecInterpreted => {
            let directory = path.parent()?;
            let is_many = entry.findings.single(kind, Some(&directory)) >= MAX_SINGLE_IN_ROOT;
            is_many.then(|| group(Some(&directory), None))
        }
        Kind::ExecNew | Kind::ExecScript | Kind::ExecRelocated => {
            // The file must lie in the root directory that its process has.
            let root = root.filter(|root| path.is_within(root))?;
            let is_many = entry.findings.single(kind, Some(root)) >= MAX_SINGLE_IN_ROOT;
            is_many.then(|| group(Some(root), None))
        }
        _ => None,
    }
}

/// The group of a copy that was executed. Plain copies are one finding, whatever filesystem they
/// lie on. Disguised ones, which are worse, are one for each content and directory: the applets
/// of a multi-call program.
pub(super) fn copies(file: &Candidate<'_>) -> Option<Group> {
    let Candidate { kind, severity, path, content, .. } = *file;
    if kind != Kind::ExecRelocated {
        return None;
    }
    let common = Some(Common::Severity(severity));
    if severity == kind.severity() {
        return Some(Group { kind, place: None, content: None, common });
    }
    Some(Group { kind, place: Some(path.parent()?), content: Some(content?), common })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Blake3Hash;

    fn file<'a>(kind: Kind, path: &'a RootfsPath, root: Option<&'a RootfsPath>) -> Candidate<'a> {
        let content = Some(Blake3Hash([7; 32]));
        Candidate { kind, severity: kind.severity(), path, content, root }
    }

    #[test]
    fn an_executed_file_has_a_finding_of_its_own() {
        let container = ContainerId::new("default", "c1");
        let path = RootfsPath::new("/tmp/x").unwrap();
        let has_own = |kind: &&Kind| kind.is_exec() && **kind != Kind::ExecRelocated;
        for kind in Kind::ALL.iter().filter(has_own) {
            assert_eq!(group(&Entry::default(), &container, &file(*kind, &path, None)), None);
        }
    }

    #[test]
    fn copies_are_grouped_by_their_content() {
        let container = ContainerId::new("default", "c1");
        let (one, other) = (RootfsPath::new("/tmp/a").unwrap(), RootfsPath::new("/b").unwrap());
        let of =
            |path| group(&Entry::default(), &container, &file(Kind::FileRelocated, path, None));
        assert_eq!(of(&one), of(&other));
        assert!(of(&one).is_some_and(|group| group.place.is_none()));
        let unhashed = Candidate { content: None, ..file(Kind::FileRelocated, &one, None) };
        assert_eq!(group(&Entry::default(), &container, &unhashed), None);
    }
}
