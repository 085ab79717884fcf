//! Files that are present or absent. Whether they were run does not matter here (`executed`,
//! `code`). Pure.

use super::image::{known_program, leads_to_program, occupies, origin, same};
use super::judgement::{Assessment, Change, Judgement};
use super::privileges::privileged;
use super::relocation::relocated;
use crate::baseline::{ImageBaseline, KnownBaseline};
use crate::model::{FileState, FileType, Kind, RootfsPath, Severity, programs};

pub(super) fn assess_present(
    image: &ImageBaseline,
    path: &RootfsPath,
    state: &FileState,
) -> Assessment {
    let known = image.get(path);
    let Some(expected) = known.clone().filter(occupies) else {
        let (change, main) = match origin(image, state).filter(|_| state.is_program()) {
            Some(origin) => {
                (Change::Relocated, Some(relocated(image, Kind::FileRelocated, path, origin)))
            }
            None if state.is_program() => {
                (Change::Added, Some(Judgement::of(Kind::FileAdded, None)))
            }
            None => (Change::Added, None),
        };
        // A file in the place of a directory hides all that the image has below it.
        let removed = known
            .clone()
            .filter(|_| state.file_type != FileType::Directory && image.has_program_below(path))
            .map(|known| Judgement {
                severity: removed_severity(image, path),
                ..Judgement::of(Kind::FileRemoved, Some(known))
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
            None => (Change::Modified, Some(Judgement::of(Kind::FileModified, Some(expected)))),
        }
    } else {
        (Change::Modified, None)
    };
    let privileged = privileged(known, state);
    Assessment { change, judgements: main.into_iter().chain(privileged).collect() }
}

pub(super) fn assess_absent(image: &ImageBaseline, path: &RootfsPath) -> Assessment {
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

/// A directory that is gone is as severe as the most severe file that the image has in it.
fn removed_severity(image: &ImageBaseline, path: &RootfsPath) -> Severity {
    let is_program =
        |known: KnownBaseline| known_program(&known) || leads_to_program(image, &known.entry.path);
    if programs::is_guard(path.file_name())
        || image.named_below(path, programs::is_guard).any(is_program)
    {
        Severity::Medium
    } else {
        Kind::FileRemoved.severity()
    }
}
