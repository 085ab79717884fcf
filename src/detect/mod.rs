//! Decides how a fact departs from the image.
//!
//! Pure: no clock, no disk, no lock. A missed drift is the costly mistake. So everything
//! that is not provably the image's own file counts as drift. Path and content decide
//! between three outcomes: the image's own content at its own path (no drift, whatever its
//! owner, mode or time), other content at a path of the image, and content of the image at a
//! path that the image does not have.
//!
//! `assess` hands a fact to the file of its subject: `executed`, `code` or `files`.

mod code;
mod entry_point;
mod executed;
mod files;
mod image;
mod judgement;
mod persistence;
mod privileges;
mod relocation;

#[cfg(test)]
mod tests;

pub use self::code::{is_extracted_by_itself, is_generated};
pub use self::entry_point::entry_point;
pub use self::image::is_program_of;
pub use self::judgement::{Assessment, Change, Judgement};
pub use self::persistence::Sensitive;

use self::code::assess_code;
use self::executed::{assess_executed, assess_executed_elsewhere};
use self::files::{assess_absent, assess_present};
use self::persistence::persistence;
use crate::baseline::ImageBaseline;
use crate::model::{FileFact, Filesystem, Kind, Script, Severity};

/// Judges a fact about a file.
pub fn assess(image: &ImageBaseline, sensitive: Sensitive<'_>, fact: &FileFact) -> Assessment {
    match fact {
        FileFact::Executed { path, filesystem, running, state, .. } => match filesystem {
            Filesystem::Overlay => assess_executed(image, path, state, *running),
            Filesystem::Tmpfs
            | Filesystem::Volume
            | Filesystem::Anonymous
            | Filesystem::Container => assess_executed_elsewhere(image, path, *filesystem, state),
        },
        FileFact::Loaded { path, filesystem, state, is_shared, .. } => {
            let mut assessment = assess_code(image, Kind::LibraryLoaded, path, *filesystem, state);
            if is_generated(image, path, *filesystem, state, *is_shared) {
                for judgement in &mut assessment.judgements {
                    judgement.severity = Severity::Info;
                }
            }
            assessment
        }
        FileFact::Interpreted { script: Script::File { path, filesystem, state, .. }, .. } => {
            assess_code(image, Kind::ExecInterpreted, path, *filesystem, state)
        }
        FileFact::Interpreted { script: Script::Pipe { .. }, .. } => Assessment {
            change: Change::Added,
            judgements: vec![Judgement::of(Kind::ExecInterpreted, None)],
        },
        FileFact::Present { path, state, .. } => {
            let mut assessment = assess_present(image, path, state);
            if sensitive.covers(path, state) {
                // Behind the judgement of the file itself, before that of its privileges.
                let at = assessment.judgements.len().min(1);
                let found = persistence(image, path, state);
                assessment.judgements.splice(at..at, found);
            }
            assessment
        }
        FileFact::Absent { path, .. } => assess_absent(image, path),
    }
}

/// A shell with a network connection as its input and output. No image contains one.
/// `direct`: without pipes between the shell and its connection, which weaken the evidence.
pub fn reverse_shell(direct: bool) -> Assessment {
    let kind = Kind::ShellReverse;
    let severity = if direct { kind.severity() } else { Severity::High };
    let judgements = vec![Judgement { kind, severity, expected: None }];
    Assessment { change: Change::Added, judgements }
}
