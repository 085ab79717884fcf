//! The processes of one container that are known to write programs: package managers, linkers
//! and archivers. What they write is reported as theirs. Bounded values; the pipeline decides which
//! processes they are.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::model::{Ancestor, Blake3Hash, FindingId, Process, ProcessIdentity, is_linker};

/// Package managers of one container whose descendants are recognised.
const MAX_PACKAGE_MANAGERS: usize = 256;
/// Contents of one container that a linker has written and that are remembered as such.
const MAX_LINKED: usize = 1024;
/// Processes of one container that run unpacked scripts and are remembered as such, and
/// processes that have unpacked them.
const MAX_UNPACKED: usize = 256;

#[derive(Debug, Default)]
pub struct Writers {
    /// Contents that a linker has written, each with the linker's process: its program
    /// and its parents, and no more.
    linked: HashMap<Blake3Hash, Process>,
    /// The newest package managers at work, a parent before its children.
    package_managers: VecDeque<(ProcessIdentity, Arc<Process>)>,
    /// Findings about what was unpacked.
    unpackings: VecDeque<(FindingId, Unpacking)>,
    /// Processes that run scripts which were unpacked here, each with the finding that reports
    /// its script.
    unpacked: VecDeque<(ProcessIdentity, FindingId)>,
}

/// The process that has unpacked files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacking {
    pub archiver: ProcessIdentity,
    pub exe: String,
}

impl Writers {
    /// A descendant of a known package manager belongs to that one.
    pub fn remember_package_manager(&mut self, process: Arc<Process>) {
        if self.package_manager_of(&process).is_some() {
            return;
        }
        if self.package_managers.len() == MAX_PACKAGE_MANAGERS {
            self.package_managers.pop_front();
        }
        self.package_managers.push_back((process.identity, process));
    }

    /// The package manager that this process is or descends from: the outermost.
    pub fn package_manager_of(&self, process: &Process) -> Option<&Arc<Process>> {
        let mut known = self.package_managers.iter();
        known.find(|(identity, _)| process.descends_from(*identity)).map(|(_, process)| process)
    }

    /// Remembers a content if a linker has written it. It is recognised again wherever it
    /// lies.
    pub fn remember_linked(&mut self, content: Blake3Hash, writer: &Process) {
        if self.linked.len() < MAX_LINKED && writer.exe.as_deref().is_some_and(is_linker) {
            let ancestors = writer.ancestors.iter();
            let ancestors = ancestors.map(|one| Ancestor { argv: None, ..one.clone() }).collect();
            let writer = Process { argv: None, ancestors, ..writer.clone() };
            self.linked.insert(content, writer);
        }
    }

    /// Remembers a finding about what was unpacked.
    pub fn remember_unpacking(&mut self, finding: FindingId, unpacking: &Unpacking) {
        if self.unpackings.iter().any(|(known, _)| *known == finding) {
            return;
        }
        if self.unpackings.len() == MAX_UNPACKED {
            self.unpackings.pop_front();
        }
        self.unpackings.push_back((finding, unpacking.clone()));
    }

    /// Remembers a process that runs a script which this finding reports, if the script was
    /// unpacked here.
    pub fn runs_unpacked(&mut self, finding: FindingId, process: ProcessIdentity) {
        let is_last = self.unpacked.back().is_some_and(|(last, _)| *last == process);
        if is_last || self.unpacking(finding).is_none() {
            return;
        }
        if self.unpacked.len() == MAX_UNPACKED {
            self.unpacked.pop_front();
        }
        self.unpacked.push_back((process, finding));
    }

    fn unpacking(&self, finding: FindingId) -> Option<&Unpacking> {
        let mut known = self.unpackings.iter();
        known.find(|(known, _)| *known == finding).map(|(_, unpacking)| unpacking)
    }

    /// The origin of the script that this process, or one above it, runs.
    pub fn unpacking_above(&self, process: &Process) -> Option<&Unpacking> {
        let mut newest = self.unpacked.iter().rev();
        let (_, finding) = newest.find(|(one, _)| process.may_descend_from(*one))?;
        self.unpacking(*finding)
    }

    /// The same process, as it is known already: the kernel's records do not have its start
    /// time.
    pub fn known_archiver(&self, archiver: ProcessIdentity) -> ProcessIdentity {
        let mut known = self.unpackings.iter().rev().map(|(_, unpacking)| unpacking.archiver);
        known.find(|one| one.may_be(archiver)).unwrap_or(archiver)
    }

    /// The linker that has written this content.
    pub fn linked(&self, content: Blake3Hash) -> Option<&Process> {
        self.linked.get(&content)
    }
}
