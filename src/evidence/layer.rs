//! The list of a container's own layer: everything that differs from the layers of its image.
//!
//! Attributes only; no file is opened for reading. The layer is walked by descriptors, below its
//! root, and no symlink is followed.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use serde::Serialize;

use super::draft::{Cut, Draft};
use crate::model::finding::octal;
use crate::model::{FileTime, FileType, RootfsPath};
use crate::sys::file::{self, Stat};

/// The most entries that are listed, and how deep.
const MOST: usize = 100_000;
const MAX_DEPTH: usize = 256;
const MAX_PATH: usize = 4096;

/// One entry of the layer. A published JSON schema (docs/evidence.md).
#[derive(Debug, Serialize)]
struct LayerEntry<'a> {
    #[serde(flatten)]
    path: &'a RootfsPath,
    #[serde(rename = "type")]
    file_type: FileType,
    /// It stands for a name of the image that was removed.
    removed: bool,
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    changed: FileTime,
    modified: FileTime,
}

/// A directory that is being listed.
struct Level {
    directory: OwnedFd,
    path: RootfsPath,
    names: Box<dyn Iterator<Item = io::Result<Vec<u8>>>>,
}

impl Level {
    fn new(directory: OwnedFd, path: RootfsPath) -> io::Result<Level> {
        let names = Box::new(file::names_in(directory.try_clone()?)?);
        Ok(Level { directory, path, names })
    }
}

/// Lists the layer into a file of the case. Returns what is missing, in words.
pub(super) fn list(draft: &mut Draft, upper: &OwnedFd, name: &str) -> Result<Vec<String>, Cut> {
    let mut lines = draft.lines(name)?;
    let (mut missing, mut count) = (Vec::new(), 0);
    let mut note = |why: String| {
        if missing.len() < 8 && !missing.contains(&why) {
            missing.push(why);
        }
    };
    let opened = file::open_directory_beneath(upper, b"");
    let mut levels: Vec<Level> = Vec::new();
    match opened.and_then(|directory| Level::new(directory, RootfsPath::root())) {
        Ok(level) => levels.push(level),
        Err(err) => note(format!("the container's own layer cannot be listed: {err}")),
    }
    let mut ended = Ok(());
    loop {
        let depth = levels.len();
        let Some(level) = levels.last_mut() else { break };
        let name = match level.names.next() {
            None => {
                levels.pop();
                continue;
            }
            Some(Ok(name)) => name,
            Some(Err(err)) => {
                note(format!("a directory cannot be listed to its end: {err}"));
                levels.pop();
                continue;
            }
        };
        let Ok(path) = level.path.join(&name) else { continue };
        // An entry that has vanished is not an error.
        let Ok(stat) = file::stat_at(&level.directory, &name[..]) else { continue };
        count += 1;
        if count > MOST {
            note(format!("the container's own layer has more than {MOST} entries"));
            break;
        }
        ended = lines.add(draft, &entry(&path, &stat));
        if ended.is_err() {
            break;
        }
        if stat.file_type == FileType::Directory {
            if depth >= MAX_DEPTH || path.as_bytes().len() > MAX_PATH {
                note(format!("directories more than {MAX_DEPTH} deep are not listed"));
                continue;
            }
            let below = file::open_directory_beneath(level.directory.as_fd(), &name);
            match below.and_then(|directory| Level::new(directory, path)) {
                Ok(below) => levels.push(below),
                Err(err) => note(format!("a directory cannot be listed: {err}")),
            }
        }
    }
    lines.end(draft)?;
    ended.map(|()| missing)
}

fn entry<'a>(path: &'a RootfsPath, stat: &Stat) -> LayerEntry<'a> {
    LayerEntry {
        path,
        file_type: stat.file_type,
        removed: stat.is_whiteout_device(),
        mode: octal(stat.mode),
        uid: stat.uid,
        gid: stat.gid,
        size: stat.size,
        changed: stat.changed,
        modified: stat.modified,
    }
}
