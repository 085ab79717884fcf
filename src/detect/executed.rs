//! Programs and scripts that were executed, from the container's own filesystem or from
//! elsewhere. Pure. Code that an interpreter or the dynamic linker loads is in `code`.

use super::image::{occupies, origin, ran_as_known};
use super::judgement::{Assessment, Change, Judgement};
use super::privileges::privileged;
use super::relocation::relocated;
use crate::baseline::ImageBaseline;
use crate::model::{FileState, FileType, Filesystem, Format, Kind, RootfsPath};

/// A program from the container's own filesystem. If it runs the image's content from the
/// image's path, nothing is wrong. `running`: the process was found and its start was not
/// seen.
pub(super) fn assess_executed(
    image: &ImageBaseline,
    path: &RootfsPath,
    state: &FileState,
    running: bool,
) -> Assessment {
    let known = image.get(path);
    let (change, main) =
        if let Some(known) = known.as_ref().filter(|known| ran_as_known(known, state)) {
            debug_assert_eq!(known.entry.file_type, FileType::Regular);
            (Change::Metadata, None)
        } else {
            // Text without `#!` that was executed is run by the shell that tried.
            let script = matches!(state.format, Format::Script | Format::Data | Format::Empty);
            match (known.clone().filter(occupies), origin(image, state)) {
                // A symlink of the image that became a copy of one of its programs:
                // the path promised a name, not a content.
                (Some(known), Some(origin)) if known.entry.file_type == FileType::Symlink => {
                    (Change::Relocated, Some(relocated(image, Kind::ExecRelocated, path, origin)))
                }
                // Its start was not seen, and no name leads to the file any more: its path
                // is not certain.
                (known, _) if running && state.deleted => {
                    let change = if known.is_some() { Change::Modified } else { Change::Added };
                    (change, Some(Judgement::of(Kind::ExecDeleted, known)))
                }
                (Some(known), _) => {
                    let kind = if script { Kind::ExecScript } else { Kind::ExecModified };
                    (Change::Modified, Some(Judgement::of(kind, Some(known))))
                }
                (None, Some(origin)) => {
                    (Change::Relocated, Some(relocated(image, Kind::ExecRelocated, path, origin)))
                }
                (None, None) => {
                    let kind = if script { Kind::ExecScript } else { Kind::ExecNew };
                    (Change::Added, Some(Judgement::of(kind, None)))
                }
            }
        };
    let privileged = privileged(known, state);
    Assessment { change, judgements: main.into_iter().chain(privileged).collect() }
}

/// A program from a filesystem that is not part of the image. Its path means nothing, but
/// its content may be the image's.
pub(super) fn assess_executed_elsewhere(
    image: &ImageBaseline,
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
) -> Assessment {
    let origins = origin(image, state);
    let change = if origins.is_some() { Change::Relocated } else { Change::Added };
    let main = match (filesystem, origins) {
        (Filesystem::Volume | Filesystem::Tmpfs, Some(origins)) => {
            relocated(image, Kind::ExecRelocated, path, origins)
        }
        // Its path is that of another container and means nothing here.
        (Filesystem::Container, Some(origins)) => {
            Judgement::of(Kind::ExecRelocated, origins.into_iter().next())
        }
        (_, origins) => {
            let kind = match filesystem {
                Filesystem::Anonymous => Kind::ExecFileless,
                Filesystem::Tmpfs => Kind::ExecTmpfs,
                Filesystem::Volume | Filesystem::Overlay => Kind::ExecVolume,
                Filesystem::Container if state.format == Format::Script => Kind::ExecScript,
                Filesystem::Container => Kind::ExecNew,
            };
            Judgement::of(kind, origins.and_then(|origins| origins.into_iter().next()))
        }
    };
    let privileged = privileged(None, state);
    Assessment { change, judgements: std::iter::once(main).chain(privileged).collect() }
}
