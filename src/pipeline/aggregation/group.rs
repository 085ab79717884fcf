//! The groups of aggregated findings: what their files have in common, the ID that follows
//! from it, and how a finding describes it. Pure: which group a file belongs to is decided in
//! `files`, `code` and `packages`.

use crate::inventory::Unpacking;
use crate::model::finding::Subject;
use crate::model::{
    Blake3Hash, ContainerId, FindingId, Kind, ProcessIdentity, RootfsPath, Severity, printable,
};

/// Files of one finding that are known one by one and can be listed. More are counted.
pub(super) const MAX_LISTED: u64 = 100_000;

/// The same, of what an exception accepts.
pub(super) const MAX_ACCEPTED: u64 = 1000;

/// What the files of an aggregated finding have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::pipeline) struct Group {
    pub(super) kind: Kind,
    /// The directory, or the root directory, that holds all of them.
    pub(super) place: Option<RootfsPath>,
    pub(super) content: Option<Blake3Hash>,
    /// What else they have in common.
    pub(super) common: Option<Common>,
}

/// What files have in common beside their place and content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::pipeline) enum Common {
    /// A package manager has brought them, and they are unchanged since.
    Brought(FindingId),
    /// A package manager has written them, with a privilege or where other programs obey
    /// them.
    Installed { transaction: FindingId, severity: Severity },
    /// Linkers of the image have made them. This one made the first.
    Built { linker: String },
    /// One process of the image has unpacked them, or what it has unpacked has written them.
    Unpacked(Unpacking),
    /// One process has loaded them.
    Loaded { process: ProcessIdentity, severity: Severity },
    /// Generated names of one pattern, and the program that runs them.
    Pattern { pattern: Vec<u8>, by: Option<String>, severity: Severity },
    /// A program that manages accounts has written them.
    Accounts { process: ProcessIdentity },
    /// They have this severity.
    Severity(Severity),
    /// The exception with this ID accepts them.
    Accepted(String),
}

impl Common {
    fn key(&self) -> String {
        let of = |process: &ProcessIdentity| format!("{} {}", process.pid, process.start_time);
        match self {
            Common::Brought(transaction) => format!("brought {transaction}"),
            Common::Installed { transaction, severity } => {
                format!("installed {severity} {transaction}")
            }
            // A build may copy what it has linked, with a program that links as well.
            Common::Built { .. } => "built".to_owned(),
            Common::Unpacked(Unpacking { archiver, exe }) => {
                format!("unpacked {} {exe}", of(&archiver.identity))
            }
            Common::Loaded { process, severity } => format!("loaded {severity} {}", of(process)),
            Common::Pattern { pattern, by, severity } => {
                let by = by.as_deref().unwrap_or_default();
                format!("pattern {severity} {} {by}", printable(pattern))
            }
            Common::Accounts { process } => format!("accounts {}", of(process)),
            Common::Severity(severity) => format!("severity {severity}"),
            Common::Accepted(rule) => format!("accepted {rule}"),
        }
    }

    /// The detail of a finding about several files.
    pub(super) fn detail(&self) -> Option<String> {
        Some(match self {
            Common::Brought(_) => {
                "used as a package manager of the image has brought it: what else of it was used \
                 is counted here"
                    .to_owned()
            }
            Common::Installed { .. } => {
                "written in one transaction of a package manager, or while it went on, by a \
                 process that is not known"
                    .to_owned()
            }
            Common::Built { linker } => format!(
                "built here: {linker} of the image has written it, and the processes that began \
                 the build run it"
            ),
            Common::Unpacked(Unpacking { exe, .. }) => format!(
                "unpacked here: {exe} of the image has written it, or a script that came from \
                 there has, and the processes that began this run it: what else of it was run \
                 is counted here"
            ),
            Common::Loaded { .. } => "libraries of one directory, loaded by one process".to_owned(),
            Common::Pattern { pattern, .. } => {
                format!("generated names, like {}", printable(pattern))
            }
            Common::Accounts { .. } => "accounts, changed by one command".to_owned(),
            Common::Accepted(rule) => {
                format!("accepted by the rule {rule}: what else it accepts is counted here")
            }
            Common::Severity(_) => return None,
        })
    }

    /// Whether this is the detail of a finding about one file too.
    pub(super) fn explains_one(&self) -> bool {
        matches!(
            self,
            Common::Brought(_) | Common::Built { .. } | Common::Unpacked(_) | Common::Accepted(_)
        )
    }
}

impl Group {
    pub(in crate::pipeline) fn id(&self, container: &ContainerId) -> FindingId {
        if let Some(common) = &self.common {
            let by = common.key();
            let (path, content) = (self.place.as_ref(), self.content);
            let subject = Subject::Common { path, content, by: &by };
            return FindingId::new(Some(container), self.kind, &subject);
        }
        let subject = Subject::Group { path: self.place.as_ref(), content: self.content };
        FindingId::new(Some(container), self.kind, &subject)
    }

    /// The group of everything of one kind that an exception accepts.
    pub(in crate::pipeline) fn accepted(kind: Kind, rule: &str) -> Group {
        let common = Some(Common::Accepted(rule.to_owned()));
        Group { kind, place: None, content: None, common }
    }

    /// The group of all findings of one kind that have no room of their own.
    pub(super) fn rest(kind: Kind) -> Group {
        Group { kind, place: None, content: None, common: None }
    }

    /// Whether the finding counts as one about several files from its first file on.
    pub(super) fn begins_as_many(&self) -> bool {
        self.content.is_none() && self.common.is_none()
    }

    /// Whether this is the group that always has room.
    pub(super) fn is_rest(&self) -> bool {
        self.place.is_none() && self.content.is_none() && self.common.is_none()
    }

    /// The detail of the finding.
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

/// The detail of a finding that counts those without room of their own.
const REST: &str = "more of this kind than are kept one by one: what came after the first ones, \
     which have findings of their own, is counted here";

/// The detail of a finding about copies with many contents.
const COPIES: &str = "copies of programs of the image: what came after the first contents, which \
     have findings of their own";

/// A file that has no finding yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) kind: Kind,
    pub(super) severity: Severity,
    pub(super) path: &'a RootfsPath,
    pub(super) content: Option<Blake3Hash>,
    /// The root directory of the process that executes it.
    pub(super) root: Option<&'a RootfsPath>,
}
