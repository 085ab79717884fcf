//! What the image has at a path or with a content, as the other files of this room need it.
//! Pure lookups in the baseline: nothing is judged here.

use crate::baseline::{ImageBaseline, KnownBaseline};
use crate::model::file::is_program;
use crate::model::{FileState, FileType, RootfsPath};

/// Whether the image has a file here whose place another file can take. A directory of the
/// image does not count: a file in its place counts as added.
pub(super) fn occupies(known: &KnownBaseline) -> bool {
    known.entry.file_type != FileType::Directory
}

/// Whether both are known to hold the same bytes. An unknown content is never the same.
pub(super) fn same(known: &KnownBaseline, state: &FileState) -> bool {
    known.entry.file_type == FileType::Regular
        && state.file_type == FileType::Regular
        && known.entry.blake3.is_some()
        && known.entry.blake3 == state.blake3()
}

/// Whether a file that was run held what the image has there, and could not have held
/// anything else at that moment.
pub(super) fn ran_as_known(known: &KnownBaseline, state: &FileState) -> bool {
    same(known, state) && !state.could_change.is_possible()
}

/// Whether the image has a program at `path`.
pub fn is_program_of(image: &ImageBaseline, path: &RootfsPath) -> bool {
    image.get(path).as_ref().is_some_and(known_program)
}

pub(super) fn known_program(known: &KnownBaseline) -> bool {
    known.entry.file_type == FileType::Regular && is_program(known.entry.format, known.entry.mode)
}

/// The paths at which the image has this content. An empty file has no origin: too many
/// files are empty.
pub(super) fn origin(image: &ImageBaseline, state: &FileState) -> Option<Vec<KnownBaseline>> {
    let blake3 = state.blake3().filter(|_| state.size > 0)?;
    // Enough for programs with very many names, such as busybox.
    const NAMES: usize = 512;
    Some(image.with_content(&blake3, NAMES)).filter(|origins| !origins.is_empty())
}

/// Whether every user may write into the directory that holds `path`.
pub(super) fn in_world_writable_directory(image: &ImageBaseline, path: &RootfsPath) -> bool {
    let Some(parent) = path.parent() else { return false };
    match image.get(&parent) {
        Some(known) => known.entry.mode & 0o002 != 0,
        // The container has made the directory. Its mode is not known here: the usual places
        // of temporary files decide.
        None => ["/tmp", "/var/tmp", "/dev/shm"]
            .iter()
            .any(|usual| RootfsPath::new(usual).is_ok_and(|usual| parent.is_within(&usual))),
    }
}

/// A regular file of the image, and the symlinks by which it was reached.
pub(super) struct Followed {
    /// Ends with the file's own path.
    pub(super) way: Vec<RootfsPath>,
    pub(super) file: KnownBaseline,
}

/// Follows a path and its symlinks inside the image, through a limited number of symlinks.
pub(super) fn follow(image: &ImageBaseline, path: &str) -> Option<Followed> {
    let components = |path: &[u8]| -> Vec<Vec<u8>> {
        // The next one is at the end.
        path.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec).collect()
    };
    let mut left = components(path.as_bytes());
    let mut at = RootfsPath::root();
    let mut way = Vec::new();
    while let Some(name) = left.pop() {
        match &*name {
            b"" | b"." => continue,
            b".." => at = at.parent().unwrap_or_else(RootfsPath::root),
            name => {
                let next = at.join(name).ok()?;
                match image.get(&next).and_then(|known| known.entry.link_target) {
                    Some(target) => {
                        way.push(next);
                        if way.len() > 16 {
                            return None;
                        }
                        if target.starts_with(b"/") {
                            at = RootfsPath::root();
                        }
                        left.extend(components(&target));
                    }
                    None => at = next,
                }
            }
        }
    }
    let file = image.get(&at).filter(|known| known.entry.file_type == FileType::Regular)?;
    way.push(at);
    Some(Followed { way, file })
}

/// Whether a symlink of the image leads to one of its programs. Only a limited number of
/// symlinks inside the image is followed.
pub(super) fn leads_to_program(image: &ImageBaseline, path: &RootfsPath) -> bool {
    let mut path = path.clone();
    for _ in 0..8 {
        let Some(known) = image.get(&path) else { return false };
        match (known.entry.file_type, known.entry.link_target) {
            (FileType::Regular, _) => {
                return is_program(known.entry.format, known.entry.mode);
            }
            (FileType::Symlink, Some(target)) => match path.resolve(&target) {
                Some(next) => path = next,
                None => return false,
            },
            _ => return false,
        }
    }
    false
}
