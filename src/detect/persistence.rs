//! Files that other programs run or obey, whatever they hold. The settings and the entry point
//! name their paths. Pure. `assess` adds this judgement to that of the file itself.

use super::image::{occupies, origin, same};
use super::judgement::Judgement;
use crate::baseline::{ImageBaseline, KnownBaseline};
use crate::model::{
    Blake3Hash, Content, FileState, FileType, Kind, PathGlobs, RootfsPath, Severity, Unhashed,
};

/// The paths of a container at which a file matters whatever it holds, because other
/// programs run or obey it.
#[derive(Clone, Copy, Debug)]
pub struct Sensitive<'a> {
    /// From the settings.
    pub persistence: &'a PathGlobs,
    /// From [`entry_point`](super::entry_point()).
    pub entry_point: &'a [RootfsPath],
    /// Another path by which the container reaches the file.
    pub reached_as: Option<&'a RootfsPath>,
}

impl Sensitive<'_> {
    pub(super) fn covers(self, path: &RootfsPath, state: &FileState) -> bool {
        // A directory is reported only if something was mounted there.
        let leads_away = matches!(state.file_type, FileType::Symlink | FileType::Directory);
        [Some(path), self.reached_as].into_iter().flatten().any(|path| {
            self.persistence.matches(path)
                || self.entry_point.contains(path)
                || leads_away && self.persistence.leads_to(path)
        })
    }
}

/// A file at such a path is new, or differs from the image.
pub(super) fn persistence(
    image: &ImageBaseline,
    path: &RootfsPath,
    state: &FileState,
) -> Option<Judgement> {
    let known = image.get(path).filter(occupies);
    let is_the_images =
        known.as_ref().is_some_and(|known| same(known, state) || is_same_link(known, state));
    // The sensor did not know yet that the file matters: it will read and report it again.
    let is_unread = state.file_type == FileType::Regular
        && state.content == Content::Unhashed(Unhashed::NotAProgram);
    let found =
        (!is_the_images && !is_unread).then(|| Judgement::of(Kind::FilePersistence, known))?;
    let is_from_skeleton = || {
        origin(image, state).into_iter().flatten().any(|origin| {
            origin.entry.path.file_name() == path.file_name()
                && origin.entry.path.parent().is_some_and(|parent| parent.as_bytes() == SKELETON)
        })
    };
    // A new home begins with these files. They do not take the place of a file of the image.
    let is_new_home = found.expected.is_none() && is_from_skeleton();
    let severity = if is_new_home { Severity::Info } else { found.severity };
    Some(Judgement { severity, ..found })
}

/// The home of a new user begins with a copy of this directory.
const SKELETON: &[u8] = b"/etc/skel";

/// Whether both are symlinks with the same target. The content of a symlink is its target.
fn is_same_link(known: &KnownBaseline, state: &FileState) -> bool {
    known.entry.file_type == FileType::Symlink
        && state.file_type == FileType::Symlink
        && known.entry.link_target.as_deref().is_some_and(|target| {
            state.blake3() == Some(Blake3Hash(*blake3::hash(target).as_bytes()))
        })
}
