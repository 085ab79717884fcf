//! The files of an image that start a container, from the arguments of its specification.
//! Pure. A change of one of them is reported as `file.persistence`.

use super::image::{Followed, follow, known_program};
use crate::baseline::ImageBaseline;
use crate::model::{EntryPoint, Format, RootfsPath, programs};

/// The files of the image that start a container: its program, the programs and scripts in
/// the arguments of that program, and the symlinks that lead to them. Other arguments, such
/// as a configuration, may change in normal operation.
pub fn entry_point(image: &ImageBaseline, entry_point: &EntryPoint) -> Vec<RootfsPath> {
    let EntryPoint { arguments, search, directory } = entry_point;
    let Some((program, rest)) = arguments.split_first() else { return Vec::new() };
    let in_directory = |directory: &str, name: &str| {
        if name.starts_with('/') { name.to_owned() } else { format!("{directory}/{name}") }
    };
    let found = if program.contains('/') {
        follow(image, &in_directory(directory, program))
    } else {
        search.iter().find_map(|directory| follow(image, &in_directory(directory, program)))
    };
    let mut paths = Vec::new();
    if let Some(found) = found {
        paths.extend(found.way);
    }
    let name = program.rsplit('/').next().unwrap_or_default();
    let mut wants_script = programs::is_launcher(name.as_bytes());
    for argument in rest.iter().take(64).filter(|argument| !argument.starts_with('-')) {
        if !wants_script && !argument.starts_with('/') {
            continue;
        }
        let Some(found) = follow(image, &in_directory(directory, argument)) else { continue };
        let Followed { way, file } = found;
        let is_code = known_program(&file) || file.entry.format == Format::Script;
        if std::mem::take(&mut wants_script) || is_code {
            paths.extend(way);
        }
    }
    paths.sort();
    paths.dedup();
    paths
}
