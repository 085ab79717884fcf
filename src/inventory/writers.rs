//! The processes of one container that are known to write programs: package managers, linkers
//! and archivers. What they write is reported as theirs. Bounded values; the pipeline decides which
//! processes they are.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;

use crate::model::{Ancestor, Blake3Hash, FindingId, Process, ProcessIdentity, is_linker};

/// Package managers of one container whose descendants are recognised.
const MAX_PACKAGE_MANAGERS: usize = 256;
const MAX_CANDIDATES: usize = 16;
const MAX_COPIES: usize = 256;
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
    package_managers: VecDeque<PackageManager>,
    /// Processes that may be package managers; their programs have not been read yet.
    candidates: VecDeque<Arc<Process>>,
    /// Processes that run a plain copy of an image's program.
    copies: VecDeque<ProcessIdentity>,
    /// Findings about what was unpacked.
    unpackings: VecDeque<(FindingId, Unpacking)>,
    /// Processes that run scripts which were unpacked here, each with the finding that reports
    /// its script.
    unpacked: VecDeque<(ProcessIdentity, FindingId)>,
}

#[derive(Debug)]
struct PackageManager {
    identity: ProcessIdentity,
    /// The first one that did the same work: its transaction is continued.
    first: Arc<Process>,
    began: Timestamp,
}

/// The process that has unpacked files; of several that did the same work, the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacking {
    pub archiver: Arc<Process>,
    /// Its program.
    pub exe: String,
}

impl Writers {
    /// A descendant of a known package manager belongs to that one. A package manager that the
    /// container's own work runs once more, or right after another one, continues the
    /// transaction of the first one, if `continues` allows it: it gets the first one, and whether
    /// it did the very same. Returns that first one.
    pub fn remember_package_manager(
        &mut self,
        process: &Arc<Process>,
        init: Option<ProcessIdentity>,
        began: Timestamp,
        continues: impl Fn(&Process, bool) -> bool,
    ) -> Option<Arc<Process>> {
        if self.package_manager_of(process).is_some() {
            return None;
        }
        let first = init.and_then(|init| {
            let own = Work::of(process, init)?;
            let known = self.package_managers.iter().map(|known| &known.first);
            let known = known.filter_map(|first| Some((first, Work::of(first, init)?)));
            let mut same = known.clone().filter(|(_, work)| own.is_same(work)).peekable();
            // If an exception accepted the same work, it may accept this too.
            if same.peek().is_some() {
                return same.map(|(first, _)| first).find(|first| continues(first, true));
            }
            let mut beside = known.filter(|(_, work)| own.is_of_one_script(work));
            beside.find(|(first, _)| continues(first, false)).map(|(first, _)| first)
        });
        let continued = first.cloned();
        if self.package_managers.len() == MAX_PACKAGE_MANAGERS {
            self.package_managers.pop_front();
        }
        let first = continued.clone().unwrap_or_else(|| process.clone());
        let identity = process.identity;
        self.package_managers.push_back(PackageManager { identity, first, began });
        continued
    }

    /// When the package managers of a transaction began, by their first one.
    pub fn began(&self, first: &Process) -> impl Iterator<Item = Timestamp> {
        let of_it = self.package_managers.iter();
        of_it.filter(|known| known.first.identity == first.identity).map(|known| known.began)
    }

    /// A process executes a plain copy of an image's program, or something else.
    pub fn runs_copy(&mut self, process: ProcessIdentity, is_copy: bool) {
        let is_known = self.copies.contains(&process);
        if is_copy && !is_known {
            if self.copies.len() == MAX_COPIES {
                self.copies.pop_front();
            }
            self.copies.push_back(process);
        } else if !is_copy && is_known {
            self.copies.retain(|one| *one != process);
            self.package_managers.retain(|known| known.identity != process);
        }
    }

    pub fn is_copy(&self, process: ProcessIdentity) -> bool {
        self.copies.contains(&process)
    }

    /// Remembers a process that is a package manager if its program turns out to be a copy of
    /// the image's.
    pub fn remember_candidate(&mut self, process: Arc<Process>) {
        if self.candidates.len() == MAX_CANDIDATES {
            self.candidates.pop_front();
        }
        self.candidates.push_back(process);
    }

    pub fn take_candidates(&mut self) -> VecDeque<Arc<Process>> {
        std::mem::take(&mut self.candidates)
    }

    /// The package manager that this process is or descends from: the outermost.
    pub fn package_manager_of(&self, process: &Process) -> Option<&Arc<Process>> {
        let mut known = self.package_managers.iter();
        known.find(|known| process.descends_from(known.identity)).map(|known| &known.first)
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

    /// The archiver as it is known already: the kernel's records do not have its start time. Or
    /// the first one that did the same work: a build that begins again unpacks its sources again.
    pub fn known_archiver(
        &self,
        archiver: &Process,
        init: ProcessIdentity,
    ) -> Option<Arc<Process>> {
        let mut known = self.unpackings.iter().map(|(_, unpacking)| &unpacking.archiver);
        let itself = known.clone().rev().find(|one| one.identity.may_be(archiver.identity));
        let same = || {
            let own = Work::of(archiver, init)?;
            known.find(|one| Work::of(one, init).is_some_and(|work| own.is_same(&work)))
        };
        itself.or_else(same).cloned()
    }

    /// The linker that has written this content.
    pub fn linked(&self, content: Blake3Hash) -> Option<&Process> {
        self.linked.get(&content)
    }
}

/// A process and those above it in its container, up to init. What a person runs has none, and
/// neither has a child of init: any orphan becomes one.
struct Work<'a> {
    process: &'a Process,
    above: &'a [Ancestor],
}

impl<'a> Work<'a> {
    fn of(process: &'a Process, init: ProcessIdentity) -> Option<Work<'a>> {
        let at = process.ancestors.iter().position(|above| above.identity.may_be(init))?;
        let above = &process.ancestors[..=at];
        (at > 0 && process.tty.is_none()).then_some(Work { process, above })
    }

    /// The same program with the same arguments, run by the same programs. The user is not known
    /// of a process that is known from the kernel's records alone.
    fn is_same(&self, earlier: &Work<'_>) -> bool {
        let Work { process, above } = self;
        let own = |one: &Process| (one.exe.clone(), one.argv.clone(), one.root.clone());
        let is_same_user = process.uid.is_none()
            || earlier.process.uid.is_none()
            || process.uid == earlier.process.uid;
        let programs = |above: &[Ancestor]| -> Option<Vec<String>> {
            above.iter().map(|above| above.exe.clone()).collect()
        };
        process.argv.is_some()
            && is_same_user
            && own(process) == own(earlier.process)
            && programs(above).is_some_and(|above| programs(earlier.above) == Some(above))
    }

    /// One process has started both, and has run the same program with the same arguments: a
    /// script of the entry point may become the service itself (`exec`), which is attacked later.
    fn is_of_one_script(&self, earlier: &Work<'_>) -> bool {
        self.above[0] == earlier.above[0]
    }
}
