//! Files that give more rights to the process that runs them than the image gives. Pure. The
//! files of the other subjects add this judgement to their own.

use super::judgement::Judgement;
use crate::baseline::KnownBaseline;
use crate::model::file::grants_identity;
use crate::model::{FileState, FileType, Format, Kind};

/// An identity or a capability that the file grants and the image does not grant at this
/// path.
pub(super) fn privileged(known: Option<KnownBaseline>, state: &FileState) -> Option<Judgement> {
    if state.file_type != FileType::Regular || !can_gain(state) {
        return None;
    }
    let known = known.filter(|known| known.entry.file_type == FileType::Regular);
    let expected_mode = known.as_ref().map_or(0, |known| known.entry.mode);
    let identity = grants_identity(state.mode)
        && (!grants_identity(expected_mode)
            || state.mode & 0o6000 & !(expected_mode & 0o6000) != 0);
    let expected_capability = known.as_ref().and_then(|known| known.entry.capability.as_ref());
    let capability = state.capability.is_some() && state.capability.as_ref() != expected_capability;
    (identity || capability).then(|| Judgement::of(Kind::FilePrivileged, known))
}

/// Whether the kernel grants rights to a process that runs this file. It obeys these bits
/// only in executable ELF files: for a script those of its interpreter count. A file that
/// is written or made executable later is judged again then.
fn can_gain(state: &FileState) -> bool {
    match state.format {
        Format::Elf => state.mode & 0o111 != 0,
        // The content was not read.
        Format::Unknown => true,
        Format::ElfObject
        | Format::KernelModule
        | Format::Script
        | Format::Data
        | Format::Empty => false,
    }
}
