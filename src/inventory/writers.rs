//! The processes of one container that are known to write programs: package managers and
//! linkers. What they write is reported as theirs. Bounded values; the pipeline decides which
//! processes they are.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use crate::model::{Ancestor, Blake3Hash, Process, ProcessIdentity, is_linker};

/// Package managers of one container whose descendants are recognised.
const MAX_PACKAGE_MANAGERS: usize = 256;
/// Contents of one container that a linker has written and that are remembered as such.
const MAX_LINKED: usize = 1024;

#[derive(Debug, Default)]
pub struct Writers {
    /// Contents that a linker has written, each with the linker's process: its program
    /// and its parents, and no more.
    linked: HashMap<Blake3Hash, Process>,
    /// The newest package managers at work, a parent before its children.
    package_managers: VecDeque<(ProcessIdentity, Arc<Process>)>,
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

    /// The linker that has written this content.
    pub fn linked(&self, content: Blake3Hash) -> Option<&Process> {
        self.linked.get(&content)
    }
}
