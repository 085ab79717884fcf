//! Content of the image at a path that the image does not have: a plain copy, or a disguise
//! that makes it worse. Pure. The names of programs decide what is a disguise.

use super::image::{follow, in_world_writable_directory};
use super::judgement::Judgement;
use crate::baseline::{ImageBaseline, KnownBaseline};
use crate::model::{Kind, RootfsPath, Severity, programs};

pub(super) fn relocated(
    image: &ImageBaseline,
    kind: Kind,
    path: &RootfsPath,
    origins: Vec<KnownBaseline>,
) -> Judgement {
    let disguised = kind == Kind::ExecRelocated
        && (in_world_writable_directory(image, path) || takes_a_name(image, path, &origins));
    let severity = if disguised { Severity::High } else { kind.severity() };
    Judgement { kind, severity, expected: origins.into_iter().next() }
}

/// Whether `path` has the name of another program than the one whose content it has. A
/// program that acts by its name (busybox) then does something else, and a reader of a
/// process list is misled.
fn takes_a_name(image: &ImageBaseline, path: &RootfsPath, origins: &[KnownBaseline]) -> bool {
    let name = path.file_name();
    let own_name = origins.iter().any(|origin| origin.entry.path.file_name() == name)
        // The image itself gives this name here, as a symlink.
        || image.get(path).is_some();
    if own_name {
        return false;
    }
    // `python` is a name of python3.11.
    let is_other_version = origins.iter().any(|origin| {
        let origin = programs::without_version(origin.entry.path.file_name());
        !origin.is_empty() && origin == programs::without_version(name)
    });
    if is_other_version {
        return false;
    }
    let namesakes = PROGRAM_DIRECTORIES.iter().filter_map(|directory| {
        let there = RootfsPath::new(directory).and_then(|directory| directory.join(name)).ok()?;
        image.get(&there).map(|_| there)
    });
    let content = origins.first().and_then(|origin| origin.entry.blake3);
    // An applet with a name that the image itself offers does what the image's applet does.
    let mut is_offered = false;
    for namesake in namesakes {
        let file = std::str::from_utf8(namesake.as_bytes()).ok();
        let file = file.and_then(|namesake| follow(image, namesake));
        if content.is_none() || file.and_then(|found| found.file.entry.blake3) != content {
            return true;
        }
        is_offered = true;
    }
    // An interpreter's name makes a process a package manager, with the right arguments.
    !is_offered
        && (programs::is_tool(programs::without_version(name)) || programs::runs_installers(name))
}

const PROGRAM_DIRECTORIES: &[&str] =
    &["/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin"];
