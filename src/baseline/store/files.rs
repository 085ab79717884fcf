//! The store's files: how they are listed, read, removed, and written durably.
//!
//! This is the whole of the crash model. A file is written under another name, synced,
//! and renamed; then its directory is synced. So a file under its own name is whole
//! and never changes. Nothing here knows what a file means.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};

use super::error::Error;
use crate::model::Blake3Hash;

const UNFINISHED_SUFFIX: &str = ".tmp";

/// A directory that exists already may have another use, so it keeps its mode.
pub(super) fn make(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

pub(super) fn make_private(directory: &Path) -> io::Result<()> {
    make(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))
}

/// The checksum that the last bytes of a layer's file hold.
pub(super) fn checksum_of(path: &Path) -> Option<Blake3Hash> {
    let mut checksum = [0; 32];
    let file = File::open(path).ok()?;
    let at = file.metadata().ok()?.len().checked_sub(checksum.len() as u64)?;
    file.read_exact_at(&mut checksum, at).ok()?;
    Some(Blake3Hash(checksum))
}

/// Removes what a crash or a full disk has left half written.
pub(super) fn remove_unfinished(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.to_str().is_some_and(|path| path.ends_with(UNFINISHED_SUFFIX)) {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// The files with this suffix, and their names without it.
pub(super) fn files_in(directory: &Path, suffix: &str) -> Result<Vec<(PathBuf, String)>, Error> {
    let unreadable = |source| Error::Directory { path: directory.into(), source };
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let stem = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_suffix(suffix));
        if let Some(stem) = stem.map(str::to_owned) {
            files.push((path, stem));
        }
    }
    Ok(files)
}

/// Reads a file that was listed in its directory; `None` if it was removed since.
pub(super) fn read_listed(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read { path: path.into(), source }),
    }
}

pub(super) fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(Error::Write { path: path.into(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes a file so that the whole of it exists or nothing of it, even after a power
/// failure.
pub(super) fn write_whole<T, E: From<io::Error>>(
    path: &Path,
    write: impl FnOnce(&mut File) -> Result<T, E>,
) -> Result<T, E> {
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(UNFINISHED_SUFFIX);
    let written = (|| {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)?;
        let value = write(&mut file)?;
        file.sync_all()?;
        fs::rename(&unfinished, path)?;
        // The name is an entry of the directory, so that must reach the disk too.
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        Ok(value)
    })();
    if written.is_err() {
        // Best effort: what is left is removed when the store is opened again.
        let _ = fs::remove_file(&unfinished);
    }
    written
}

/// A file without a name, on the filesystem of `path`.
pub(super) fn scratch_beside(path: &Path) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(".pool");
    name.push(UNFINISHED_SUFFIX);
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&name)?;
    fs::remove_file(&name)?;
    Ok(file)
}
